//! The envelope of a normal entry, and the request ids in it.

use bytes::Bytes;
use pontoon_proto::v1;
use prost::Message;

use crate::{error::Error, types::RequestId};

/// The newest format this version writes and reads.
pub(crate) const FORMAT: u32 = 1;

/// What an envelope adds to a payload at most, in bytes.
pub(crate) const OVERHEAD: u64 = 128;

/// Wraps a command.
pub(crate) fn seal(
    kind: v1::EntryKind,
    epoch: u64,
    timestamp: u64,
    request: Option<RequestId>,
    payload: Bytes,
) -> Vec<u8> {
    v1::Envelope {
        format: FORMAT,
        kind: kind as i32,
        epoch,
        timestamp,
        request: request.map(|r| v1::RequestId {
            client_high: (r.client >> 64) as u64,
            client_low: r.client as u64,
            stamp: r.stamp,
            seq: r.seq,
            acked_below: r.acked_below,
        }),
        payload,
    }
    .encode_to_vec()
}

/// An opened envelope.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) kind: v1::EntryKind,
    pub(crate) epoch: u64,
    pub(crate) timestamp: u64,
    pub(crate) request: Option<RequestId>,
    pub(crate) payload: Bytes,
}

/// Opens an envelope. What cannot be opened stops the replica: skipping it would let replicas drift apart.
pub(crate) fn open(data: Bytes) -> Result<Opened, Error> {
    let unknown = |found| Error::UnknownFormat { what: "a log entry", found, known: FORMAT };
    let envelope = v1::Envelope::decode(data).map_err(|_| unknown(0))?;
    if envelope.format != FORMAT {
        return Err(unknown(envelope.format));
    }
    let kind = match v1::EntryKind::try_from(envelope.kind) {
        Ok(v1::EntryKind::Unspecified) | Err(_) => {
            return Err(Error::UnknownFormat {
                what: "a log entry's kind",
                found: envelope.kind as u32,
                known: v1::EntryKind::Verify as u32,
            });
        }
        Ok(kind) => kind,
    };
    Ok(Opened {
        kind,
        epoch: envelope.epoch,
        timestamp: envelope.timestamp,
        request: envelope.request.map(|r| RequestId {
            client: (u128::from(r.client_high) << 64) | u128::from(r.client_low),
            stamp: r.stamp,
            seq: r.seq,
            acked_below: r.acked_below,
        }),
        payload: envelope.payload,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_and_what_is_unknown_is_refused() {
        let request = RequestId { client: u128::MAX - 3, stamp: 9, seq: 4, acked_below: 2 };
        let sealed = seal(v1::EntryKind::Command, 7, 11, Some(request), Bytes::from_static(b"x"));
        assert!(sealed.len() as u64 <= OVERHEAD + 1);
        let opened = open(sealed.into()).unwrap();
        assert_eq!((opened.epoch, opened.timestamp, opened.request), (7, 11, Some(request)));
        assert_eq!(opened.kind, v1::EntryKind::Command);

        let newer = v1::Envelope { format: 2, kind: 1, ..Default::default() }.encode_to_vec();
        assert!(matches!(open(newer.into()), Err(Error::UnknownFormat { found: 2, .. })));
        let kind = v1::Envelope { format: 1, kind: 99, ..Default::default() }.encode_to_vec();
        assert!(matches!(open(kind.into()), Err(Error::UnknownFormat { found: 99, .. })));
    }
}
