//! The log: a predicate's state machine that only grows at its end.
//!
//! Records are bytes. They get offsets that follow each other without a gap, from 0; the log has the records with offsets
//! in [lowest, next).
//!
//! - **append** adds records at `next`, all of a command or none; on demand only if `next` is what the caller expects.
//! - **truncate** moves `lowest` up: what lies below is gone for readers at once.
//! - **reset** drops everything and begins anew at a given offset, in a new **era**. Within an era an offset names one
//!   record for ever; who has read in an older era must not go on.
//!
//! # How rows go
//!
//! ```text
//! 0                   LogState: lowest, next, era, and which rows are garbage
//! 1 ‖ era ‖ offset    a record
//! ```
//!
//! A truncation or reset changes the state's row alone, whatever it drops; what is garbage from then on is remembered
//! there. Every command sweeps some of it, in its own batch: how much depends on the log alone, so that the
//! replicas' rows stay the same, which snapshots and state hashes rest on. A new era has rows of its own, so a record never
//! meets garbage of the same offset.

mod machine;
mod reader;

use bytes::{BufMut, Bytes, BytesMut};
use pontoon_proto::v1::{self, log_command::Body};
use prost::Message;

pub(crate) use self::machine::LogMachine;
pub use self::reader::{LogPage, LogReader, Records};
use crate::{
    engine::EngineSnapshot,
    error::Error,
    layout::{DATA, row_key},
    map::{MAX_COMMAND_BYTES, MAX_OPS, MAX_VALUE_BYTES},
    store::GroupView,
};

/// The longest record.
pub const MAX_RECORD_BYTES: usize = MAX_VALUE_BYTES;
/// The most records of one append.
pub const MAX_RECORDS: usize = MAX_OPS;
/// The highest offset that a log can be reset to.
pub const MAX_RESET_OFFSET: u64 = 1 << 62;

/// The format of commands and of the state's row.
const FORMAT: u32 = 1;
/// The logical key of the state's row.
const STATE: [u8; 2] = [DATA, 0];
/// How many rows of garbage a command drops at most: a few milliseconds of work.
const SWEEP_ROWS: u64 = 1_024;

/// Which offsets a log has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogBounds {
    /// The first record's offset; `next` if there are no records.
    pub lowest: u64,
    /// The offset of the record that is appended next.
    pub next: u64,
    /// Counts resets, from 1.
    pub era: u64,
}

impl LogBounds {
    /// The highest offset; `None` if there are no records.
    pub fn highest(&self) -> Option<u64> {
        self.next.checked_sub(1).filter(|_| !self.is_empty())
    }

    /// Whether there are no records.
    pub fn is_empty(&self) -> bool {
        self.lowest == self.next
    }
}

/// A command of a log.
///
/// # Examples
/// ```
/// use pontoon_shard::LogCommand;
///
/// let payload = LogCommand::Append { records: vec!["one".into(), "two".into()], expect_offset: Some(7) }.encode()?;
/// # let _ = payload;
/// # Ok::<(), pontoon_shard::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogCommand {
    /// Adds records at the end.
    Append {
        /// The records, in order.
        records: Vec<Bytes>,
        /// Only if the first one gets this offset.
        expect_offset: Option<u64>,
    },
    /// Drops every record below an offset, which may be the log's next one.
    Truncate {
        /// The lowest offset afterwards.
        below: u64,
    },
    /// Drops every record and goes on at an offset, in a new era.
    Reset {
        /// The next offset afterwards, at most [`MAX_RESET_OFFSET`].
        at: u64,
        /// Only if this is the next offset before.
        expect_next: Option<u64>,
    },
    /// Drops some rows of what was truncated or reset. The answer says whether more are left.
    Sweep,
}

impl LogCommand {
    /// Checks the limits and encodes the command for a proposal.
    ///
    /// # Errors
    /// [`Error::OpCount`], [`Error::ValueTooLarge`], [`Error::CommandTooLarge`], [`Error::OffsetTooLarge`].
    pub fn encode(self) -> Result<Bytes, Error> {
        let body = match self {
            LogCommand::Append { records, expect_offset } => {
                Body::Append(v1::LogAppend { records, expect_offset })
            }
            LogCommand::Truncate { below } => Body::Truncate(v1::LogTruncate { below }),
            LogCommand::Reset { at, expect_next } => Body::Reset(v1::LogReset { at, expect_next }),
            LogCommand::Sweep => Body::Sweep(true),
        };
        check(&body)?;
        Ok(v1::LogCommand { format: FORMAT, body: Some(body) }.encode_to_vec().into())
    }
}

/// The limits, the same before a proposal and when a command is applied.
fn check(body: &Body) -> Result<(), Error> {
    match body {
        Body::Append(append) => {
            let count = append.records.len();
            if count == 0 || count > MAX_RECORDS {
                return Err(Error::OpCount { count, max: MAX_RECORDS });
            }
            if let Some(large) = append.records.iter().find(|record| record.len() > MAX_RECORD_BYTES) {
                return Err(Error::ValueTooLarge { len: large.len(), max: MAX_RECORD_BYTES });
            }
            match append.encoded_len() {
                len if len > MAX_COMMAND_BYTES => Err(Error::CommandTooLarge { len, max: MAX_COMMAND_BYTES }),
                _ => Ok(()),
            }
        }
        Body::Reset(reset) if reset.at > MAX_RESET_OFFSET => {
            Err(Error::OffsetTooLarge { offset: reset.at, max: MAX_RESET_OFFSET })
        }
        Body::Truncate(_) | Body::Reset(_) | Body::Sweep(_) => Ok(()),
    }
}

/// Reads the answer to a command.
///
/// # Errors
/// [`Error::Decode`].
pub fn decode_log_reply(reply: &[u8]) -> Result<v1::LogReply, Error> {
    Ok(v1::LogReply::decode(reply)?)
}

/// The logical key of a record.
pub(crate) fn record_key(era: u64, offset: u64) -> Bytes {
    let mut key = BytesMut::with_capacity(18);
    key.put_slice(&[DATA, 1]);
    key.put_u64(era);
    key.put_u64(offset);
    key.freeze()
}

/// The state of a log that was never written to.
fn fresh() -> v1::LogState {
    v1::LogState { format: FORMAT, era: 1, ..Default::default() }
}

fn bounds_of(state: &v1::LogState) -> LogBounds {
    LogBounds { lowest: state.lowest, next: state.next, era: state.era }
}

/// Which offsets the log has, as a snapshot of one of its generations shows it.
pub(crate) fn bounds_in(
    view: &GroupView,
    snapshot: &dyn EngineSnapshot,
    generation: u32,
) -> Result<LogBounds, Error> {
    let row = snapshot.get(view.space, &row_key(view.group, generation, &STATE))?;
    Ok(bounds_of(&decode_state(view.group, row)?))
}

/// Reads the state's row.
fn decode_state(group: pontoon_proto::GroupId, row: Option<Bytes>) -> Result<v1::LogState, Error> {
    let Some(row) = row else { return Ok(fresh()) };
    let damaged = || Error::Damaged { group, what: "the state of a log" };
    let state = v1::LogState::decode(row).map_err(|_| damaged())?;
    match state.format {
        FORMAT if state.lowest <= state.next => Ok(state),
        FORMAT => Err(damaged()),
        found => Err(Error::UnknownFormat { group, what: "the state of a log", found, known: FORMAT }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_a_limit_is_refused_by_name() {
        let append = |records: Vec<Bytes>| LogCommand::Append { records, expect_offset: None }.encode();
        let record = |len: usize| Bytes::from(vec![0; len]);
        assert!(matches!(append(vec![]), Err(Error::OpCount { count: 0, .. })));
        assert!(matches!(append(vec![record(0); MAX_RECORDS + 1]), Err(Error::OpCount { .. })));
        assert!(matches!(append(vec![record(MAX_RECORD_BYTES + 1)]), Err(Error::ValueTooLarge { .. })));
        assert!(matches!(append(vec![record(MAX_RECORD_BYTES); 4]), Err(Error::CommandTooLarge { .. })));
        assert!(append(vec![record(MAX_RECORD_BYTES), record(0)]).is_ok());
        let reset = LogCommand::Reset { at: MAX_RESET_OFFSET + 1, expect_next: None };
        assert!(matches!(reset.encode(), Err(Error::OffsetTooLarge { .. })));
    }

    #[test]
    fn a_command_of_the_map_never_reads_as_one_of_the_log_nor_the_other_way_round() {
        let map = crate::MapCommand::new().put("k", "v").encode().unwrap();
        assert_eq!(v1::LogCommand::decode(map).unwrap(), v1::LogCommand::default());
        let log = LogCommand::Append { records: vec!["r".into()], expect_offset: None }.encode().unwrap();
        assert_eq!(v1::MapCommand::decode(log).unwrap(), v1::MapCommand::default());
    }
}
