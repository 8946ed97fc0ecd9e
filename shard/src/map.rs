//! The map: a predicate's state machine, from subject key to value.
//!
//! A command is a list of operations that take effect together or, if an expectation of one does not hold, not at all.
//! Every row keeps the index of the command that last wrote it, for conditional writes and change streams.

mod machine;
mod reader;

use bytes::Bytes;
use pontoon_proto::v1::{self, map_op::Op};
use prost::Message;

pub(crate) use self::machine::MapMachine;
pub use self::reader::{MapReader, Page, Row, Scan};
use crate::error::Error;

/// The longest key.
pub const MAX_KEY_BYTES: usize = 4 << 10;
/// The longest value.
pub const MAX_VALUE_BYTES: usize = 1 << 20;
/// The most operations of one command.
pub const MAX_OPS: usize = 16_384;
/// The largest encoded command: it must fit an entry of the log, which is a quarter of a batch of at most 16 MiB.
pub const MAX_COMMAND_BYTES: usize = 3 << 20;

/// The format of commands.
const FORMAT: u32 = 1;

/// What a compare-and-set expects of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// There is no row.
    Absent,
    /// There is a row with this value.
    Value(Bytes),
    /// There is a row that was last written at this index.
    Index(u64),
}

/// Builds a command.
///
/// # Examples
/// ```
/// use pontoon_shard::{Expect, MapCommand};
///
/// let payload = MapCommand::new()
///     .put("alice", "1")
///     .cas("bob", Expect::Absent, Some("2".into()))
///     .encode()?;
/// # let _ = payload;
/// # Ok::<(), pontoon_shard::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MapCommand {
    ops: Vec<v1::MapOp>,
}

impl MapCommand {
    /// A command without operations yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes a row over whatever is there.
    #[must_use]
    pub fn put(self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        self.op(Op::Put(v1::MapPut { key: key.into(), value: value.into() }))
    }

    /// Removes a row, if there is one.
    #[must_use]
    pub fn delete(self, key: impl Into<Bytes>) -> Self {
        self.op(Op::Delete(v1::MapDelete { key: key.into() }))
    }

    /// Writes `value` (removes the row, if `None`) if the row is as expected.
    #[must_use]
    pub fn cas(self, key: impl Into<Bytes>, expect: Expect, value: Option<Bytes>) -> Self {
        let expect = match expect {
            Expect::Absent => v1::map_cas::Expect::Absent(true),
            Expect::Value(value) => v1::map_cas::Expect::Present(value),
            Expect::Index(index) => v1::map_cas::Expect::Index(index),
        };
        self.op(Op::Cas(v1::MapCas { key: key.into(), expect: Some(expect), value }))
    }

    fn op(mut self, op: Op) -> Self {
        self.ops.push(v1::MapOp { op: Some(op) });
        self
    }

    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there are no operations.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Checks the limits and encodes the command for a proposal.
    ///
    /// # Errors
    /// [`Error::OpCount`], [`Error::KeyTooLarge`], [`Error::ValueTooLarge`], [`Error::CommandTooLarge`].
    pub fn encode(self) -> Result<Bytes, Error> {
        let command = v1::MapCommand { format: FORMAT, ops: self.ops };
        check(&command)?;
        Ok(command.encode_to_vec().into())
    }
}

/// The limits, the same before a proposal and when a command is applied.
fn check(command: &v1::MapCommand) -> Result<(), Error> {
    if command.ops.is_empty() || command.ops.len() > MAX_OPS {
        return Err(Error::OpCount { count: command.ops.len(), max: MAX_OPS });
    }
    for op in &command.ops {
        let (key, values) = match &op.op {
            Some(Op::Put(put)) => (&put.key, [Some(&put.value), None]),
            Some(Op::Delete(delete)) => (&delete.key, [None, None]),
            Some(Op::Cas(cas)) => {
                let expected = match &cas.expect {
                    Some(v1::map_cas::Expect::Present(value)) => Some(value),
                    _ => None,
                };
                (&cas.key, [cas.value.as_ref(), expected])
            }
            None => continue,
        };
        if key.len() > MAX_KEY_BYTES {
            return Err(Error::KeyTooLarge { len: key.len(), max: MAX_KEY_BYTES });
        }
        for value in values.into_iter().flatten() {
            if value.len() > MAX_VALUE_BYTES {
                return Err(Error::ValueTooLarge { len: value.len(), max: MAX_VALUE_BYTES });
            }
        }
    }
    let len = command.encoded_len();
    if len > MAX_COMMAND_BYTES {
        return Err(Error::CommandTooLarge { len, max: MAX_COMMAND_BYTES });
    }
    Ok(())
}

/// Reads the answer to a command.
///
/// # Errors
/// [`Error::Decode`].
pub fn decode_map_reply(reply: &[u8]) -> Result<v1::MapReply, Error> {
    Ok(v1::MapReply::decode(reply)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_a_limit_is_refused_by_name() {
        let long = vec![b'k'; MAX_KEY_BYTES + 1];
        let put = |key: Vec<u8>, value: Vec<u8>| MapCommand::new().put(key, value).encode();
        assert!(matches!(put(long.clone(), vec![]), Err(Error::KeyTooLarge { .. })));
        assert!(matches!(put(vec![], vec![0; MAX_VALUE_BYTES + 1]), Err(Error::ValueTooLarge { .. })));
        assert!(put(vec![b'k'; MAX_KEY_BYTES], vec![0; MAX_VALUE_BYTES]).is_ok());
        assert!(matches!(MapCommand::new().encode(), Err(Error::OpCount { count: 0, .. })));
        assert!(matches!(MapCommand::new().delete(long).encode(), Err(Error::KeyTooLarge { .. })));
        let value = Bytes::from(vec![0; MAX_VALUE_BYTES]);
        let many = (0..4).fold(MapCommand::new(), |command, key| command.put(vec![key], value.clone()));
        assert!(matches!(many.encode(), Err(Error::CommandTooLarge { .. })));
    }
}
