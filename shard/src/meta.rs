//! The meta group: nodes, shards, moves and what happened, as a state machine of group 1.
//!
//! It holds intent. Who is a member of a group is decided by the group's own configuration; the members in a shard's
//! record are a cache for routing, and what a move wants is carried out by its driver.
//!
//! Applying is a pure function of state and command. Each object is one row, so the state is checkpointed and installed
//! like any other; a copy in memory is published after each commit.

mod apply;
mod machine;
mod moves;
mod recover;
mod replace;
mod state;
mod version;
mod wishes;

use bytes::Bytes;
use pontoon_proto::v1;
use prost::Message;

pub(crate) use self::machine::MetaMachine;
pub use self::{moves::legal, state::MetaState};
use crate::error::Error;

/// The meta group's own name among the predicates. Names that begin with `@` are reserved.
pub const META_PREDICATE: &str = "@meta";
/// How many events are kept.
pub const MAX_EVENTS: usize = 1_000;
/// The longest name of a predicate.
pub const MAX_PREDICATE_BYTES: usize = 1_024;

/// The format of commands and of the header row.
const FORMAT: u32 = 1;

/// Encodes a command for a proposal to the meta group. `now_ms` is the proposer's wall clock.
pub fn meta_command(now_ms: u64, body: v1::meta_command::Body) -> Bytes {
    v1::MetaCommand { format: FORMAT, now_ms, body: Some(body) }.encode_to_vec().into()
}

/// Reads the answer to a command: what came of it, or why it was refused.
///
/// # Errors
/// [`Error::Decode`].
pub fn decode_meta_reply(reply: &[u8]) -> Result<Result<v1::meta_reply::Body, Box<v1::MetaRefused>>, Error> {
    use v1::meta_reply::Body;
    Ok(match v1::MetaReply::decode(reply)?.body {
        Some(Body::Refused(refused)) => Err(Box::new(refused)),
        Some(body) => Ok(body),
        None => Ok(Body::Done(true)),
    })
}
