//! The checkpoint, which is the manifest too: which segments belong to the log, and what every group holds besides its
//! entries. Two files are written in turn; `docs/wal-format.md` gives each byte.

use std::{collections::BTreeSet, sync::Arc};

use bytes::{BufMut, Bytes};
use pontoon_proto::GroupId;

use crate::{
    Error, KeyId, Lsn, MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES,
    codec::{Decoder, put_bytes, round_up},
    crypt::{self, BLOB_EXTRA, Keyring},
    frame::{BLOCK, COLD},
    index::{Index, SHARDS},
    record::{MAX_INDEX, decode_snapshot, put_hard_state, put_snapshot},
    rng::Rng,
    types::{Damage, HardState, SnapshotMeta},
};

/// The two files, written in turn.
pub(crate) const MANIFEST_NAMES: [&str; 2] = ["manifest-a", "manifest-b"];
/// The format that is written, and the newest that is read.
pub(crate) const FORMAT: u16 = 1;

const MAGIC: &[u8; 8] = b"PNTNMANI";
/// Features, one bit each, that a reader must know: there are cold frames.
const HAS_COLD: u64 = 1;
/// A feature: groups and tombstones are encrypted.
const SEALED: u64 = 1 << 2;
/// All that are known here.
const KNOWN_FEATURES: u64 = HAS_COLD | SEALED;
const HEADER: usize = 128;

/// How a segment is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Listing {
    /// May have taken frames after the checkpoint.
    Prepared,
    /// Takes frames from `first_seq` on.
    Active,
    /// Holds the frames from `first_seq` to `last_seq`; whatever else it holds is void.
    Sealed,
}

/// A segment of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ListedSegment {
    pub(crate) id: u32,
    pub(crate) epoch: u128,
    pub(crate) listing: Listing,
    pub(crate) stream: u8,
    /// The open that wrote it; a segment never holds frames of two that are both live.
    pub(crate) incarnation: u64,
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
    /// The key with which its frames are encrypted, 0 for none.
    pub(crate) key_id: u32,
    /// Where the extents of a sealed segment are listed.
    pub(crate) footer: Option<FooterAt>,
}

/// Where a segment's footer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FooterAt {
    /// The block where it begins.
    pub(crate) block: u32,
    pub(crate) len: u32,
    /// Of all its bytes.
    pub(crate) crc: u32,
}

/// The LSN of each shard of the groups at which a checkpoint describes it: they are captured one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ShardLsns(pub(crate) [u64; SHARDS]);

impl Default for ShardLsns {
    fn default() -> Self {
        ShardLsns([0; SHARDS])
    }
}

impl ShardLsns {
    /// The LSN that counts for a group.
    pub(crate) fn of(&self, group: GroupId) -> u64 {
        self.0[Index::shard_of(group)]
    }

    /// When the capture began. Whatever is at or below is in the state.
    pub(crate) fn least(&self) -> u64 {
        self.0.into_iter().min().unwrap_or(0)
    }

    /// When it ended. Nothing above is in the state.
    pub(crate) fn most(&self) -> u64 {
        self.0.into_iter().max().unwrap_or(0)
    }
}

/// The moment that the checkpoint describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct AsOf {
    /// The open that made the checkpoint, and its ordinal.
    pub(crate) incarnation: u64,
    pub(crate) ordinal: u64,
    /// Per stream: all frames up to here are durable.
    pub(crate) seqs: [u64; 2],
    /// All records up to here are durable and in the state of their group's shard; no later one is.
    pub(crate) lsns: ShardLsns,
}

/// A group's state besides its entries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct GroupState {
    pub(crate) hard_state: HardState,
    pub(crate) truncated: (u64, u64),
    pub(crate) last: (u64, u64),
    pub(crate) snapshot: Option<Arc<SnapshotMeta>>,
    pub(crate) meta: Vec<(Bytes, Bytes)>,
    pub(crate) damage: Option<Damage>,
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Manifest {
    pub(crate) seq: u64,
    pub(crate) store: u128,
    pub(crate) segment_bytes: u64,
    pub(crate) next_segment: u32,
    pub(crate) as_of: AsOf,
    pub(crate) segments: Vec<ListedSegment>,
    pub(crate) groups: Vec<(GroupId, GroupState)>,
    pub(crate) tombstones: Vec<(GroupId, u64)>,
    /// The key with which groups and tombstones are encrypted in the file that this was read from, 0 for none. Read without
    /// keys, such a file has neither.
    pub(crate) key_id: u32,
}

/// Why bytes are no manifest.
#[derive(Debug, Clone)]
pub(crate) enum Unreadable {
    /// Not one, torn or damaged.
    Damaged,
    /// Intact, but of a format or with a feature that is not known here.
    Newer(u32),
    /// Intact, but encrypted with a key that is not there.
    Key(Error),
    /// Intact, but not what was encrypted with the key of this number.
    WrongKey(KeyId),
}

/// What the encrypted part is, for its key.
const SEALED_PART: &str = "pontoon-wal manifest 1";
/// Up to here the header is vouched for by the encrypted part's tag. What follows is the CRC of that part.
const VOUCHED: std::ops::Range<usize> = 12..64;

impl Manifest {
    /// The file's whole content. Encrypted if there are keys, with a salt drawn from `rng`; `key_id` says with which.
    pub(crate) fn encode(&mut self, keyring: &Keyring, rng: &mut Rng) -> Vec<u8> {
        let mut out = vec![0; BLOCK];
        self.encode_places(&mut out);
        let clear_len = out.len() - BLOCK;
        let mut state = Vec::new();
        self.encode_state(&mut state);
        let sealed = keyring.is_on();
        let body_len = clear_len + state.len() + if sealed { BLOB_EXTRA } else { 0 };
        let mut header = Vec::with_capacity(HEADER);
        header.put_slice(MAGIC);
        header.put_u32_le(0);
        header.put_u16_le(FORMAT);
        header.put_u16_le(0);
        header.put_u128_le(self.store);
        header.put_u64_le(self.seq);
        header.put_u64_le(self.features() | if sealed { SEALED } else { 0 });
        header.put_u64_le(self.segment_bytes);
        header.put_u64_le(body_len as u64);
        if sealed {
            let vouched = [&header[VOUCHED], &out[BLOCK..]].concat();
            let blob = keyring.seal_blob(SEALED_PART, &vouched, &state, rng.next_u128());
            state = blob.expect("a log with keys has a current one");
        }
        self.key_id = crypt::blob_key(&state).filter(|_| sealed).map_or(0, |id| id.0);
        out.put_slice(&state);
        debug_assert_eq!(out.len() - BLOCK, body_len);
        header.put_u32_le(crc32c::crc32c(&out[BLOCK..]));
        header.put_u32_le(if sealed { clear_len as u32 } else { 0 });
        header.resize(HEADER, 0);
        let crc = crc32c::crc32c(&header[12..]);
        header[8..12].copy_from_slice(&crc.to_le_bytes());
        out[..HEADER].copy_from_slice(&header);
        out.resize(round_up(out.len(), BLOCK), 0);
        out
    }

    /// What a reader must know.
    fn features(&self) -> u64 {
        let is_cold = self.as_of.seqs[1] > 0 || self.segments.iter().any(|segment| segment.stream == COLD);
        if is_cold { HAS_COLD } else { 0 }
    }

    /// The keys without which it cannot be used.
    pub(crate) fn keys(&self) -> impl Iterator<Item = KeyId> + '_ {
        let ids = self.segments.iter().map(|segment| segment.key_id).chain([self.key_id]);
        ids.filter(|id| *id > 0).map(KeyId)
    }

    /// Appends what says where everything is. It is never encrypted.
    fn encode_places(&self, out: &mut Vec<u8>) {
        out.put_u32_le(self.next_segment);
        out.put_u64_le(self.as_of.incarnation);
        out.put_u64_le(self.as_of.ordinal);
        self.as_of.seqs.iter().for_each(|seq| out.put_u64_le(*seq));
        self.as_of.lsns.0.iter().for_each(|lsn| out.put_u64_le(*lsn));
        out.put_u32_le(self.segments.len() as u32);
        for segment in &self.segments {
            out.put_u32_le(segment.id);
            out.put_u128_le(segment.epoch);
            out.put_u8(match segment.listing {
                Listing::Prepared => 0,
                Listing::Active => 1,
                Listing::Sealed => 2,
            });
            out.put_u8(segment.stream);
            out.put_u64_le(segment.incarnation);
            out.put_u64_le(segment.first_seq);
            out.put_u64_le(segment.last_seq);
            out.put_u32_le(segment.key_id);
            let footer = segment.footer.unwrap_or(FooterAt { block: 0, len: 0, crc: 0 });
            [footer.block, footer.len, footer.crc].iter().for_each(|value| out.put_u32_le(*value));
        }
    }

    /// Appends what the groups hold.
    fn encode_state(&self, out: &mut Vec<u8>) {
        out.put_u64_le(self.groups.len() as u64);
        for (group, state) in &self.groups {
            out.put_u64_le(group.0);
            encode_group(state, out);
        }
        out.put_u64_le(self.tombstones.len() as u64);
        for (group, min_replica) in &self.tombstones {
            out.put_u64_le(group.0);
            out.put_u64_le(*min_replica);
        }
    }

    /// Reads a file's content. With [`Keyring::blind`], what is encrypted is left out.
    pub(crate) fn decode(bytes: &[u8], keyring: &Keyring) -> Result<Manifest, Unreadable> {
        let header = bytes.get(..HEADER).ok_or(Unreadable::Damaged)?;
        if &header[..8] != MAGIC || header[8..12] != crc32c::crc32c(&header[12..]).to_le_bytes() {
            return Err(Unreadable::Damaged);
        }
        let mut d = Decoder(&header[12..]);
        let mut fixed = || {
            Some((d.u16()?, d.u16()?, d.u128()?, d.u64()?, d.u64()?, d.u64()?, d.u64()?, d.u32()?, d.u32()?))
        };
        let (format, _, store, seq, features, segment_bytes, body_len, body_crc, clear_len) =
            fixed().ok_or(Unreadable::Damaged)?;
        if format != FORMAT {
            return Err(Unreadable::Newer(u32::from(format)));
        }
        if features & !KNOWN_FEATURES != 0 {
            // Written by a later version that says so by a feature: the next format as far as this one can tell.
            return Err(Unreadable::Newer(u32::from(FORMAT) + 1));
        }
        let body = usize::try_from(body_len).ok().and_then(|len| bytes.get(BLOCK..)?.get(..len));
        let body = body.filter(|body| crc32c::crc32c(body) == body_crc).ok_or(Unreadable::Damaged)?;
        let mut manifest = Manifest { seq, store, segment_bytes, ..Manifest::default() };
        let state = match features & SEALED {
            0 => manifest.decode_places(body).map(|rest| Some(rest.to_vec())),
            _ => {
                let (clear, blob) = body.split_at_checked(clear_len as usize).ok_or(Unreadable::Damaged)?;
                let key_id = crypt::blob_key(blob).ok_or(Unreadable::Damaged)?;
                manifest.key_id = key_id.0;
                let state = match keyring.is_blind() {
                    true => None,
                    false => {
                        let vouched = [&header[VOUCHED], clear].concat();
                        let plain =
                            keyring.open_blob(SEALED_PART, &vouched, blob).map_err(Unreadable::Key)?;
                        Some(plain.ok_or(Unreadable::WrongKey(key_id))?)
                    }
                };
                manifest.decode_places(clear).filter(|rest| rest.is_empty()).map(|_| state)
            }
        };
        let decoded = state.and_then(|state| state.map_or(Some(()), |state| manifest.decode_state(&state)));
        decoded.filter(|()| manifest.is_sound()).ok_or(Unreadable::Damaged)?;
        Ok(manifest)
    }

    /// Reads where everything is; what follows.
    fn decode_places<'a>(&mut self, body: &'a [u8]) -> Option<&'a [u8]> {
        let mut d = Decoder(body);
        self.next_segment = d.u32()?;
        self.as_of = AsOf {
            incarnation: d.u64()?,
            ordinal: d.u64()?,
            seqs: [d.u64()?, d.u64()?],
            lsns: ShardLsns::default(),
        };
        for lsn in &mut self.as_of.lsns.0 {
            *lsn = d.u64()?;
        }
        for _ in 0..d.u32()? {
            self.segments.push(ListedSegment {
                id: d.u32()?,
                epoch: d.u128()?,
                listing: match d.u8()? {
                    0 => Listing::Prepared,
                    1 => Listing::Active,
                    2 => Listing::Sealed,
                    _ => return None,
                },
                stream: d.u8()?,
                incarnation: d.u64()?,
                first_seq: d.u64()?,
                last_seq: d.u64()?,
                key_id: d.u32()?,
                footer: Some(FooterAt { block: d.u32()?, len: d.u32()?, crc: d.u32()? })
                    .filter(|footer| footer.len > 0),
            });
        }
        Some(d.0)
    }

    /// Reads what the groups hold.
    fn decode_state(&mut self, state: &[u8]) -> Option<()> {
        let mut d = Decoder(state);
        for _ in 0..d.u64()? {
            self.groups.push((GroupId(d.u64()?), decode_group(&mut d)?));
        }
        for _ in 0..d.u64()? {
            self.tombstones.push((GroupId(d.u64()?), d.u64()?));
        }
        d.end()
    }

    /// Whether all numbers are in the ranges that everybody after relies on.
    fn is_sound(&self) -> bool {
        let AsOf { ordinal, seqs, lsns, .. } = self.as_of;
        let groups = || self.groups.iter().map(|(_, state)| state);
        let ids: BTreeSet<u32> = self.segments.iter().map(|segment| segment.id).collect();
        (MIN_SEGMENT_BYTES..=MAX_SEGMENT_BYTES).contains(&self.segment_bytes)
            && self.segment_bytes.is_multiple_of(BLOCK as u64)
            && [self.seq, seqs[0], seqs[1]].iter().all(|n| *n < 1 << 62)
            && ordinal < 1 << (64 - Lsn::COUNTER_BITS)
            && lsns.most() < u64::MAX
            && ids.len() == self.segments.len()
            && self.segments.iter().all(|segment| segment.stream <= COLD)
            && ids.last().is_none_or(|last| *last < self.next_segment)
            && self.segments.iter().all(|segment| segment.first_seq.max(segment.last_seq) < 1 << 62)
            && self.segments.iter().filter_map(|segment| segment.footer).all(|footer| {
                u64::from(footer.block) * BLOCK as u64 + u64::from(footer.len) <= self.segment_bytes
            })
            && groups().all(|state| state.truncated.0 <= state.last.0 && state.last.0 < 2 * MAX_INDEX)
            && groups()
                .filter_map(|state| state.damage.as_ref())
                .flat_map(|damage| &damage.entries)
                .all(|(low, high)| low <= high && *high < 2 * MAX_INDEX)
    }
}

const HAS_SNAPSHOT: u8 = 1;
const HAS_DAMAGE: u8 = 2;

fn encode_group(state: &GroupState, out: &mut Vec<u8>) {
    put_hard_state(out, &state.hard_state);
    for value in [state.truncated.0, state.truncated.1, state.last.0, state.last.1] {
        out.put_u64_le(value);
    }
    let flag = |present, flag| if present { flag } else { 0 };
    out.put_u8(flag(state.snapshot.is_some(), HAS_SNAPSHOT) | flag(state.damage.is_some(), HAS_DAMAGE));
    if let Some(snapshot) = &state.snapshot {
        put_snapshot(out, snapshot);
    }
    if let Some(damage) = &state.damage {
        out.put_u8(
            u8::from(damage.hard_state) | u8::from(damage.truncation) << 1 | u8::from(damage.meta) << 2,
        );
        out.put_u32_le(damage.entries.len() as u32);
        for (low, high) in &damage.entries {
            out.put_u64_le(*low);
            out.put_u64_le(*high);
        }
    }
    out.put_u32_le(state.meta.len() as u32);
    for (key, value) in &state.meta {
        put_bytes(out, key);
        put_bytes(out, value);
    }
}

fn decode_group(d: &mut Decoder<'_>) -> Option<GroupState> {
    let mut state = GroupState {
        hard_state: HardState { term: d.u64()?, vote: d.u64()?, commit: d.u64()? },
        truncated: (d.u64()?, d.u64()?),
        last: (d.u64()?, d.u64()?),
        ..GroupState::default()
    };
    let flags = d.u8()?;
    if flags & HAS_SNAPSHOT != 0 {
        let mut snapshot = decode_snapshot(d)?;
        snapshot.data = Bytes::copy_from_slice(d.bytes()?);
        state.snapshot = Some(Arc::new(snapshot));
    }
    if flags & HAS_DAMAGE != 0 {
        let bits = d.u8()?;
        let mut damage = Damage {
            hard_state: bits & 1 != 0,
            truncation: bits & 2 != 0,
            meta: bits & 4 != 0,
            entries: Vec::new(),
        };
        for _ in 0..d.u32()? {
            damage.entries.push((d.u64()?, d.u64()?));
        }
        state.damage = Some(damage);
    }
    for _ in 0..d.u32()? {
        state.meta.push((Bytes::copy_from_slice(d.bytes()?), Bytes::copy_from_slice(d.bytes()?)));
    }
    Some(state)
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use super::*;
    use crate::{DataKey, KEY_BYTES, KeyFault, KeyProvider, KeySet};

    fn sample() -> Manifest {
        let state = GroupState {
            hard_state: HardState { term: 3, vote: 2, commit: 9 },
            truncated: (4, 2),
            last: (12, 3),
            snapshot: Some(Arc::new(SnapshotMeta {
                index: 4,
                term: 2,
                data: "x".into(),
                ..SnapshotMeta::default()
            })),
            meta: vec![("k".into(), "v".into())],
            damage: Some(Damage { entries: vec![(5, 7)], meta: true, ..Damage::default() }),
        };
        Manifest {
            seq: 7,
            store: 42,
            segment_bytes: 1 << 20,
            next_segment: 4,
            as_of: AsOf { incarnation: 5, ordinal: 2, seqs: [10, 0], lsns: ShardLsns([99; SHARDS]) },
            segments: vec![ListedSegment {
                id: 3,
                epoch: 77,
                listing: Listing::Sealed,
                stream: 0,
                incarnation: 5,
                first_seq: 2,
                last_seq: 8,
                key_id: 0,
                footer: Some(FooterAt { block: 9, len: 300, crc: 5 }),
            }],
            groups: vec![(GroupId(4), state)],
            tombstones: vec![(GroupId(5), 6)],
            key_id: 0,
        }
    }

    fn keyring(key: Option<(u32, u8)>) -> Arc<Keyring> {
        let provider = |(id, byte)| {
            Arc::new(KeySet::new(KeyId(id), DataKey::new([byte; KEY_BYTES]))) as Arc<dyn KeyProvider>
        };
        Keyring::new(Path::new("log"), key.map(provider)).unwrap()
    }

    fn encoded(key: Option<(u32, u8)>) -> Vec<u8> {
        sample().encode(&keyring(key), &mut Rng::new(1))
    }

    #[test]
    fn a_manifest_comes_back_as_it_was() {
        assert_eq!(Manifest::decode(&encoded(None), &keyring(None)).unwrap(), sample());
        let sealed = Manifest { key_id: 3, ..sample() };
        let bytes = encoded(Some((3, 1)));
        assert_eq!(Manifest::decode(&bytes, &keyring(Some((3, 1)))).unwrap(), sealed);
        let places = Manifest { groups: Vec::new(), tombstones: Vec::new(), ..sealed };
        assert_eq!(Manifest::decode(&bytes, &Keyring::blind(Path::new("log"))).unwrap(), places);
    }

    #[test]
    fn a_key_that_is_missing_or_wrong_is_told_from_damage_and_each_write_looks_different() {
        let bytes = encoded(Some((3, 1)));
        let refusal = |bytes: &[u8], key| Manifest::decode(bytes, &keyring(key)).unwrap_err();
        assert!(matches!(
            refusal(&bytes, None),
            Unreadable::Key(Error::Key { key_id: KeyId(3), fault: KeyFault::NoKeys, .. })
        ));
        assert!(matches!(
            refusal(&bytes, Some((4, 1))),
            Unreadable::Key(Error::Key { key_id: KeyId(3), fault: KeyFault::Missing { .. }, .. })
        ));
        assert!(matches!(refusal(&bytes, Some((3, 2))), Unreadable::WrongKey(KeyId(3))));
        // Changed on purpose, with the CRC that fits: header, list of segments, ciphertext, tag.
        let body_len = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) as usize;
        for at in [33, 49, BLOCK + 4, BLOCK + 60, BLOCK + body_len - 30, BLOCK + body_len - 1] {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            let crc = crc32c::crc32c(&bad[BLOCK..BLOCK + body_len]);
            bad[64..68].copy_from_slice(&crc.to_le_bytes());
            let crc = crc32c::crc32c(&bad[12..HEADER]);
            bad[8..12].copy_from_slice(&crc.to_le_bytes());
            assert!(matches!(refusal(&bad, Some((3, 1))), Unreadable::WrongKey(KeyId(3))), "byte {at}");
        }
        let again = sample().encode(&keyring(Some((3, 1))), &mut Rng::new(2));
        let same = bytes.iter().zip(&again).skip(BLOCK + 150).filter(|(a, b)| a == b).count();
        assert!(same < bytes.len() - BLOCK - 150, "the ciphertext repeats");
    }

    #[test]
    fn damage_and_newer_formats_are_told_apart() {
        let good = encoded(None);
        let decode = |bytes: &[u8]| Manifest::decode(bytes, &keyring(None)).unwrap_err();
        for at in [0, 9, 30, 100, BLOCK, BLOCK + 60] {
            let mut bad = good.clone();
            bad[at] ^= 4;
            assert!(matches!(decode(&bad), Unreadable::Damaged), "byte {at}");
        }
        let mut newer = good;
        newer[12] = 9;
        let crc = crc32c::crc32c(&newer[12..HEADER]);
        newer[8..12].copy_from_slice(&crc.to_le_bytes());
        assert!(matches!(decode(&newer), Unreadable::Newer(9)));
        assert!(matches!(decode(&[]), Unreadable::Damaged));
    }
}
