//! Compression of payloads, record by record, by the submitter. The table of an entries record stays as it is, so that
//! replay and term lookups never decompress.

use bytes::{BufMut, Bytes};

use crate::{
    Batch, Error, Result,
    batch::MAX_BATCH_BYTES,
    codec::round_up,
    record::{self, Head},
};

/// How payloads are kept in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// As they are.
    #[default]
    None,
    /// LZ4: fast both ways.
    Lz4,
    /// Zstandard at this level, from 1 (fast) to 22 (small).
    Zstd(i32),
}

/// A codec as a record's flags name it; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    Lz4 = 1,
    Zstd = 2,
}

impl Codec {
    /// The codec of a record's flags. `Err`: a codec, or another flag, that this version does not know.
    pub(crate) fn of_flags(flags: u8) -> std::result::Result<Option<Codec>, u8> {
        match flags {
            0 => Ok(None),
            1 => Ok(Some(Codec::Lz4)),
            2 => Ok(Some(Codec::Zstd)),
            unknown => Err(unknown),
        }
    }

    /// Restores a payload of exactly this length; `None` if these are not its bytes. The length is one that a batch may
    /// have, so nobody can ask for more memory than that.
    pub(crate) fn decompress(self, bytes: &[u8], len: usize) -> Option<Bytes> {
        if len as u64 > MAX_BATCH_BYTES {
            return None;
        }
        let payload = match self {
            Codec::Lz4 => lz4_flex::block::decompress(bytes, len).ok()?,
            Codec::Zstd => zstd::bulk::decompress(bytes, len).ok()?,
        };
        (payload.len() == len).then(|| payload.into())
    }
}

impl Compression {
    /// # Errors
    /// [`Error::BadOption`] for a level that Zstandard does not have.
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Compression::Zstd(level) if !(1..=22).contains(&level) => Err(Error::BadOption {
                option: "compression",
                reason: format!("Zstandard has levels 1 to 22, not {level}"),
            }),
            _ => Ok(()),
        }
    }

    fn squeeze(self, payload: &[u8]) -> Option<(Codec, Vec<u8>)> {
        let (codec, bytes) = match self {
            Compression::None => return None,
            Compression::Lz4 => (Codec::Lz4, lz4_flex::block::compress(payload)),
            Compression::Zstd(level) => (Codec::Zstd, zstd::bulk::compress(payload, level).ok()?),
        };
        // Less than an eighth saved is not worth the work of every reader.
        (bytes.len() <= payload.len() / 8 * 7).then_some((codec, bytes))
    }
}

/// Compresses the payloads of at least `above` bytes in a batch that is about to be submitted.
pub(crate) fn batch(batch: Batch, compression: Compression, above: usize) -> Batch {
    let large = |head: &Head| {
        record::payload_offset(head).filter(|offset| head.len as usize - offset >= above.max(1))
    };
    let untouched =
        compression == Compression::None || Heads::of(&batch.data).all(|(head, _)| large(&head).is_none());
    if untouched {
        return batch;
    }
    let mut out = Batch::default();
    (out.relaxed, out.records) = (batch.relaxed, batch.records);
    out.entry_records = batch.entry_records;
    for (head, at) in Heads::of(&batch.data) {
        let record = &batch.data[at..at + head.len as usize];
        let squeezed =
            large(&head).and_then(|offset| Some((offset, compression.squeeze(&record[offset..])?)));
        match squeezed {
            Some((offset, (codec, payload))) => {
                record::encode_squeezed(&mut out.data, &mut out.dir, &record[..offset], codec, &payload);
            }
            None => {
                out.data.put_slice(record);
                out.data.resize(round_up(out.data.len(), 8), 0);
                head.encode_dir(&mut out.dir);
            }
        }
    }
    out
}

/// The heads of a batch's records, each with its offset.
pub(crate) struct Heads<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Heads<'a> {
    pub(crate) fn of(data: &'a [u8]) -> Heads<'a> {
        Heads { data, at: 0 }
    }
}

impl Iterator for Heads<'_> {
    type Item = (Head, usize);

    fn next(&mut self) -> Option<(Head, usize)> {
        let at = self.at;
        let head = record::decode_head(self.data.get(at..)?)?;
        self.at += head.padded();
        Some((head, at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Entry, HardState,
        record::{Body, Kind},
    };
    use pontoon_proto::GroupId;

    fn entry(index: u64, data: Vec<u8>) -> Entry {
        Entry { index, term: 3, kind: 1, data: data.into() }
    }

    /// Bytes that nothing makes smaller.
    fn noise(len: usize) -> Vec<u8> {
        let mut word = 1u64;
        (0..len)
            .map(|_| {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (word >> 56) as u8
            })
            .collect()
    }

    fn read(data: &Bytes) -> Vec<Entry> {
        let mut entries = Vec::new();
        for (_, at) in Heads::of(data) {
            if let (_, Body::Entries(found)) = record::decode(&data.slice(at..)).unwrap() {
                let took = found.read(0, u64::MAX, |entry| {
                    entries.push(entry);
                    true
                });
                assert_eq!(took, Some(true));
            }
        }
        entries
    }

    #[test]
    fn payloads_come_back_and_only_large_ones_that_shrink_are_touched() {
        let group = GroupId(1);
        let large: Vec<Entry> = (1..=3).map(|index| entry(index, vec![7; 5_000])).collect();
        let others = [entry(4, noise(9_000))];
        let small = [entry(5, vec![1; 100])];
        for compression in [Compression::Lz4, Compression::Zstd(3)] {
            let mut original = Batch::new();
            original.append(group, &large).hard_state(group, HardState::default());
            original.append(group, &others).append(group, &small);
            let before = original.data.len();
            let squeezed = batch(original.clone(), compression, 4096);
            assert!(squeezed.data.len() < before - 14_000, "{}", squeezed.data.len());
            assert_eq!(squeezed.records, 4);
            let data = Bytes::from(squeezed.data.clone());
            for (head, at) in Heads::of(&data) {
                assert!(record::verify(&data[at..], &head));
                let flags = data[at + 9];
                assert_eq!(flags != 0, head.index == 1 && head.kind == Kind::Entries, "{head:?}");
            }
            let all: Vec<Entry> = large.iter().chain(&others).chain(&small).cloned().collect();
            assert_eq!(read(&data), all);
            assert_eq!(read(&Bytes::from(original.data.clone())), all);
        }
    }

    #[test]
    fn garbage_and_lies_about_the_length_are_refused() {
        for compression in [Compression::Lz4, Compression::Zstd(1)] {
            let (codec, bytes) = compression.squeeze(&[9; 1000]).unwrap();
            assert_eq!(codec.decompress(&bytes, 1000).unwrap(), vec![9; 1000]);
            assert_eq!(codec.decompress(&bytes, 999), None);
            assert_eq!(codec.decompress(&bytes, 1001), None);
            assert_eq!(codec.decompress(&bytes[1..], 1000), None);
            assert_eq!(codec.decompress(&bytes, usize::MAX), None);
        }
        assert!(Compression::Zstd(0).check().is_err());
        assert_eq!(Codec::of_flags(9), Err(9));
    }
}
