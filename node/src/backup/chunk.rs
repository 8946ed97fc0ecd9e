//! A chunk as it is stored: whole, or as what differs from another one.
//!
//! ```text
//! "PBC1"  encoding (1 byte)  0 0 0  length of the rows (8, little endian)  [hash of the base (32)]  payload
//! ```
//!
//! | encoding | payload |
//! |---|---|
//! | 0 | the rows |
//! | 1 | the rows, zstd |
//! | 2 | the rows, zstd with the rows of the base as its dictionary |
//!
//! A base is never based on another one, so reading a chunk reads two files at most.

use bytes::Bytes;

const MAGIC: &[u8; 4] = b"PBC1";
const HEAD: usize = 16;
const LEVEL: i32 = 3;
/// The longest chunk: the last row may go beyond where one ends.
const MOST_BYTES: u64 = 8 << 20;

/// What a stored chunk begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    encoding: u8,
    bytes: usize,
    /// What the chunk is based on.
    pub(super) base: Option<blake3::Hash>,
}

/// How many bytes of a file tell its head.
pub(super) const HEAD_MOST: usize = HEAD + blake3::OUT_LEN;

/// Encodes a chunk in the shortest way, over the base only if that is worth it.
pub(super) fn encode(data: &[u8], base: Option<(blake3::Hash, &[u8])>) -> Vec<u8> {
    let head = |encoding: u8| {
        let mut out = Vec::with_capacity(HEAD + data.len() / 2);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&[encoding, 0, 0, 0]);
        out.extend_from_slice(&(data.len() as u64).to_le_bytes());
        out
    };
    let mut best = head(0);
    best.extend_from_slice(data);
    // What does not compress is kept as it is.
    if let Ok(packed) = zstd::bulk::compress(data, LEVEL)
        && HEAD + packed.len() < best.len()
    {
        best = head(1);
        best.extend_from_slice(&packed);
    }
    if let Some((hash, base)) = base
        && let Ok(packed) =
            zstd::bulk::Compressor::with_dictionary(LEVEL, base).and_then(|mut zstd| zstd.compress(data))
        // Being based on another file has its price: it must be worth it.
        && (HEAD_MOST + packed.len()) * 2 < best.len()
    {
        best = head(2);
        best.extend_from_slice(hash.as_bytes());
        best.extend_from_slice(&packed);
    }
    best
}

/// Reads the head of a stored chunk; `stored` may end behind it.
pub(super) fn head(stored: &[u8]) -> Result<Head, String> {
    if stored.len() < HEAD || &stored[..4] != MAGIC {
        return Err("it does not begin as a chunk does".to_owned());
    }
    let encoding = stored[4];
    if encoding > 2 {
        return Err(format!("it has the encoding {encoding}, this version knows 0 to 2"));
    }
    let bytes = u64::from_le_bytes(stored[8..HEAD].try_into().map_err(|_| "it is too short")?);
    if bytes > MOST_BYTES {
        return Err(format!("it says to have {bytes} bytes, the most is {MOST_BYTES}"));
    }
    let base = match encoding {
        2 => {
            let base: [u8; blake3::OUT_LEN] = stored
                .get(HEAD..HEAD_MOST)
                .and_then(|base| base.try_into().ok())
                .ok_or("it ends inside the name of its base")?;
            Some(blake3::Hash::from_bytes(base))
        }
        _ => None,
    };
    Ok(Head { encoding, bytes: bytes as usize, base })
}

/// Decodes a chunk and checks it against its hash. `base`: the rows of the one that the head names.
pub(super) fn decode(stored: &[u8], base: Option<&[u8]>, hash: blake3::Hash) -> Result<Bytes, String> {
    let Head { encoding, bytes, .. } = head(stored)?;
    let unpack = |error: std::io::Error| format!("it does not unpack ({error})");
    let data = match (encoding, base) {
        (0, _) => stored[HEAD..].to_vec(),
        (1, _) => zstd::bulk::decompress(&stored[HEAD..], bytes).map_err(unpack)?,
        (_, Some(base)) => zstd::bulk::Decompressor::with_dictionary(base)
            .and_then(|mut zstd| zstd.decompress(&stored[HEAD_MOST..], bytes))
            .map_err(unpack)?,
        (_, None) => return Err("what it is based on is missing".to_owned()),
    };
    match blake3::hash(&data) == hash {
        true => Ok(data.into()),
        false => Err("its rows do not have its hash".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn every_encoding_comes_back_and_the_shortest_is_taken() {
        let (random, text) = (noise(1, 200_000), b"the same again. ".repeat(10_000));
        for (data, encoding) in [(&random, 0), (&text, 1), (&Vec::new(), 0)] {
            let stored = encode(data, None);
            assert_eq!(stored[4], encoding);
            assert_eq!(decode(&stored, None, blake3::hash(data)).unwrap(), data[..]);
        }
    }

    #[test]
    fn few_changed_rows_cost_few_bytes_over_a_base() {
        // A chunk is longer only if a single row is: what differs is then out of zstd's reach, and it is stored whole.
        for len in [150_000, 1 << 20] {
            let old = noise(2, len);
            let mut new = old.clone();
            for at in (0..len).step_by(10_000) {
                new[at..at + 100].copy_from_slice(&noise(at as u64, 100));
            }
            let base = blake3::hash(&old);
            let stored = encode(&new, Some((base, &old)));
            assert!(stored.len() < len / 40, "{} of {len}", stored.len());
            assert_eq!(head(&stored[..HEAD_MOST]).unwrap().base, Some(base));
            assert_eq!(decode(&stored, Some(&old), blake3::hash(&new)).unwrap(), new[..]);
            assert!(decode(&stored, None, blake3::hash(&new)).is_err());
            assert!(decode(&stored, Some(&noise(3, len)), blake3::hash(&new)).is_err());
        }
        let stored = encode(&noise(4, 9_000), Some((blake3::hash(b"x"), &noise(5, 9_000))));
        assert_eq!(head(&stored).unwrap().base, None, "nothing in common");
    }

    #[test]
    fn no_flipped_bit_and_no_cut_goes_unnoticed() {
        let data = noise(6, 2_000);
        let stored = encode(&data, None);
        for at in 0..stored.len() {
            let mut bad = stored.clone();
            bad[at] ^= 0x10;
            // The three bytes behind the encoding are kept for later, and the length matters to what is packed alone.
            let counts = !(5..HEAD).contains(&at);
            assert!(!counts || decode(&bad, None, blake3::hash(&data)).is_err(), "{at}");
            assert!(decode(&stored[..at], None, blake3::hash(&data)).is_err(), "{at}");
        }
    }
}
