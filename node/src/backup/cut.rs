//! Cuts rows into chunks at borders that the keys alone decide.
//!
//! A border does not depend on what stands before it, so a row that comes or goes changes the chunk that it lies in, and seldom
//! the next one: all others keep their bytes and their hashes, from one backup to the next.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Below this a chunk does not end: each one is a file.
const LEAST_BYTES: usize = 128 << 10;
/// At this it ends whatever its next key is. The row that comes last may go beyond, so a chunk has at most 2 MiB and a key.
const MOST_BYTES: usize = 1 << 20;
/// One key in so many is a border.
const BORDER_BITS: u32 = 6;

/// A stretch of rows in key order, encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) hash: blake3::Hash,
    pub(crate) rows: u64,
    pub(crate) first_key: Bytes,
    pub(crate) data: Bytes,
}

/// What all chunks are together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Whole {
    /// Of the bytes of all chunks, one after the other: where they are cut does not matter.
    pub(crate) hash: blake3::Hash,
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    pub(crate) chunks: u64,
}

/// Takes rows in ascending order of their keys.
#[derive(Debug, Default)]
pub(crate) struct Cutter {
    data: BytesMut,
    rows: u64,
    first_key: Bytes,
    all: blake3::Hasher,
    all_rows: u64,
    all_bytes: u64,
    chunks: u64,
}

impl Cutter {
    /// Takes a row in. Returns the chunk that ends before it, if one does.
    pub(crate) fn push(&mut self, key: &[u8], value: &[u8]) -> Option<Cut> {
        let full = self.data.len() >= MOST_BYTES || (self.data.len() >= LEAST_BYTES && is_border(key));
        let cut = if full { self.cut() } else { None };
        if self.rows == 0 {
            self.first_key = Bytes::copy_from_slice(key);
        }
        self.data.put_u32_le(key.len() as u32);
        self.data.put_u32_le(value.len() as u32);
        self.data.put_slice(key);
        self.data.put_slice(value);
        self.rows += 1;
        cut
    }

    /// Ends the last chunk, if there is one.
    pub(crate) fn finish(mut self) -> (Option<Cut>, Whole) {
        let last = self.cut();
        let whole = Whole {
            hash: self.all.finalize(),
            rows: self.all_rows,
            bytes: self.all_bytes,
            chunks: self.chunks,
        };
        (last, whole)
    }

    fn cut(&mut self) -> Option<Cut> {
        if self.rows == 0 {
            return None;
        }
        let data = self.data.split().freeze();
        self.all.update(&data);
        self.all_rows += self.rows;
        self.all_bytes += data.len() as u64;
        self.chunks += 1;
        let (rows, first_key) = (std::mem::take(&mut self.rows), std::mem::take(&mut self.first_key));
        Some(Cut { hash: blake3::hash(&data), rows, first_key, data })
    }
}

/// FNV-1a: spreads borders evenly over any kind of keys. Its high bits are the better ones.
fn is_border(key: &[u8]) -> bool {
    let hash =
        key.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    hash >> (u32::BITS - BORDER_BITS) == 0
}

/// The rows of a chunk. What does not read as rows is none, whatever its hash is.
pub(crate) fn rows_of(mut data: Bytes) -> Result<Vec<(Bytes, Bytes)>, &'static str> {
    let mut rows = Vec::new();
    while !data.is_empty() {
        if data.len() < 8 {
            return Err("it ends inside a row");
        }
        let (key, value) = (data.get_u32_le() as usize, data.get_u32_le() as usize);
        if data.len() < key.saturating_add(value) {
            return Err("it ends inside a row");
        }
        rows.push((data.split_to(key), data.split_to(value)));
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn cut(rows: &[(Vec<u8>, Vec<u8>)]) -> (Vec<Cut>, Whole) {
        let mut cutter = Cutter::default();
        let mut cuts: Vec<Cut> = rows.iter().filter_map(|(key, value)| cutter.push(key, value)).collect();
        let (last, whole) = cutter.finish();
        cuts.extend(last);
        (cuts, whole)
    }

    fn rows(count: u32) -> Vec<(Vec<u8>, Vec<u8>)> {
        (0..count).map(|n| (format!("key-{n:07}").into_bytes(), vec![n as u8; 100])).collect()
    }

    #[test]
    fn rows_come_back_and_the_whole_is_their_sum() {
        for count in [0, 1, 30_000] {
            let made = rows(count);
            let (cuts, whole) = cut(&made);
            let back: Vec<_> = cuts.iter().flat_map(|cut| rows_of(cut.data.clone()).unwrap()).collect();
            assert_eq!(back.len(), made.len());
            assert!(back.iter().zip(&made).all(|(a, b)| a.0 == b.0 && a.1 == b.1));
            assert_eq!((whole.rows, whole.chunks), (u64::from(count), cuts.len() as u64));
            assert_eq!(whole.bytes, cuts.iter().map(|cut| cut.data.len() as u64).sum::<u64>());
            let all: Vec<u8> = cuts.iter().flat_map(|cut| cut.data.to_vec()).collect();
            assert_eq!(whole.hash, blake3::hash(&all));
        }
    }

    #[test]
    fn a_row_that_comes_or_goes_changes_few_chunks() {
        let before = rows(50_000);
        let mut after = before.clone();
        after.insert(25_000, (b"key-0024999-x".to_vec(), vec![7; 3_000]));
        after.remove(100);
        let old: BTreeSet<_> = cut(&before).0.iter().map(|cut| *cut.hash.as_bytes()).collect();
        let new = cut(&after).0;
        let fresh = new.iter().filter(|cut| !old.contains(cut.hash.as_bytes())).count();
        assert!(new.len() > 30 && fresh <= 8, "{fresh} of {} chunks are new", new.len());
    }

    #[test]
    fn offsets_of_a_log_have_borders_too_and_no_chunk_is_too_large() {
        let records: Vec<_> = (0..40_000_u64).map(|n| (n.to_be_bytes().to_vec(), vec![1; 200])).collect();
        let (cuts, _) = cut(&records);
        let most = cuts.iter().map(|cut| cut.data.len()).max().unwrap();
        assert!(cuts.len() > 20 && most < MOST_BYTES, "{} chunks, the largest has {most}", cuts.len());
        let large: Vec<_> = (0..5_u64).map(|n| (n.to_be_bytes().to_vec(), vec![1; 1 << 20])).collect();
        assert_eq!(cut(&large).0.len(), 5);
    }

    #[test]
    fn what_is_cut_off_is_not_read() {
        let data = cut(&rows(3)).0[0].data.clone();
        assert!(rows_of(data.slice(..data.len() - 1)).is_err() && rows_of(data.slice(..5)).is_err());
    }
}
