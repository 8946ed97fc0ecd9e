//! Frames: one write to disk with many batches. `docs/wal-format.md` gives each byte.
//!
//! ```text
//!  header 256 | directory | copy of the previous frame's head | records | zeros to 4 KiB | copy of this frame's head
//! ```
//!
//! A head is header and directory. A frame of several blocks ends with a copy of its own; a frame of one block has it
//! copied into the next frame. So one damaged block never hides whom it hit.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    Lsn,
    codec::{Decoder, round_up},
    crypt::{Seal, TAG},
    pool,
    record::Head,
    rules::{Rule, is_broken},
};

/// Frames begin and end on multiples of this; a block that holds acknowledged bytes is never written again.
pub(crate) const BLOCK: usize = 4096;
/// Bytes of a header.
pub(crate) const FRAME_HEADER: usize = 256;
/// The format that is written, and the newest that is read.
pub(crate) const FORMAT: u16 = 1;

/// The stream of the writer's frames.
pub(crate) const HOT: u8 = 0;
/// The stream of relocated records. Its frames always end with a copy of their head, so that none needs another one, and
/// their directories hold each record's LSN.
pub(crate) const COLD: u8 = 1;

const MAGIC: &[u8; 8] = b"PNTNFRAM";
const COPY_MAGIC: &[u8; 8] = b"PNTNCOPY";
/// The CRC covers what follows it, so that the copy's other magic does not change it.
const CRC_FROM: usize = 12;
/// Where the header's own tag stands.
const TAG_AT: usize = 224;

/// Nothing is encrypted.
pub(crate) const CIPHER_NONE: u8 = 0;
/// AES-256-GCM, as `crypt.rs` says.
pub(crate) const CIPHER_AES: u8 = 1;

/// The first frame of an open.
pub(crate) const FLAG_OPENING: u16 = 1;
/// Holds no records; proves that the frames before it are durable.
pub(crate) const FLAG_WATERMARK: u16 = 2;

/// The last live frame of a stream when a log was opened: what lies beyond it in that incarnation is void.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Cut {
    pub(crate) incarnation: u64,
    pub(crate) seq: u64,
}

/// A frame's header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct FrameHeader {
    pub(crate) flags: u16,
    pub(crate) store: u128,
    pub(crate) epoch: u128,
    pub(crate) segment: u32,
    /// Where the frame begins in its segment, in blocks.
    pub(crate) block: u32,
    pub(crate) incarnation: u64,
    pub(crate) ordinal: u64,
    pub(crate) stream: u8,
    pub(crate) cipher: u8,
    pub(crate) compression: u8,
    pub(crate) key_id: u32,
    pub(crate) seq: u64,
    pub(crate) durable_seq: u64,
    pub(crate) first_lsn: u64,
    pub(crate) records: u32,
    /// Length of the frame, the copy of its head included.
    pub(crate) blocks: u32,
    pub(crate) dir_len: u32,
    pub(crate) dir_crc: u32,
    pub(crate) carry_offset: u32,
    pub(crate) carry_len: u32,
    pub(crate) records_offset: u32,
    pub(crate) records_len: u32,
    /// The block of the frame where the copy of its head begins, 0 if the next frame has it.
    pub(crate) copy_block: u32,
    /// The frame_seq of the incarnation's opening frame.
    pub(crate) opening_seq: u64,
    /// Where the incarnation's opening cut the hot and the cold stream.
    pub(crate) cuts: [Cut; 2],
    /// The newest durable checkpoint when the frame was built.
    pub(crate) checkpoint: u64,
    /// In an encrypted frame, what vouches for the directory, for the head that it carries, and for this header with all of
    /// that. Otherwise zero.
    pub(crate) dir_tag: [u8; TAG],
    pub(crate) carry_tag: [u8; TAG],
    pub(crate) tag: [u8; TAG],
}

/// What a block that might begin a head turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Probe {
    /// No head, or a damaged one.
    Nothing,
    /// The head of a frame that begins here.
    Frame(FrameHeader),
    /// A copy of the head of a frame that begins elsewhere.
    Copy(FrameHeader),
    /// An intact head of a format that is not known here.
    Newer(u16),
}

impl FrameHeader {
    fn encode(&self, magic: &[u8; 8]) -> [u8; FRAME_HEADER] {
        let mut bytes = [0; FRAME_HEADER];
        let mut out = &mut bytes[..];
        out.put_slice(magic);
        out.put_u32_le(0);
        out.put_u16_le(FORMAT);
        out.put_u16_le(self.flags);
        out.put_u128_le(self.store);
        out.put_u128_le(self.epoch);
        out.put_u32_le(self.segment);
        out.put_u32_le(self.block);
        out.put_u64_le(self.incarnation);
        out.put_u64_le(self.ordinal);
        out.put_slice(&[self.stream, self.cipher, self.compression, 0]);
        out.put_u32_le(self.key_id);
        out.put_u64_le(self.seq);
        out.put_u64_le(self.durable_seq);
        out.put_u64_le(self.first_lsn);
        for value in [
            self.records,
            self.blocks,
            self.dir_len,
            self.dir_crc,
            self.carry_offset,
            self.carry_len,
            self.records_offset,
            self.records_len,
            self.copy_block,
            0,
        ] {
            out.put_u32_le(value);
        }
        out.put_u64_le(self.opening_seq);
        for cut in &self.cuts {
            out.put_u64_le(cut.incarnation);
            out.put_u64_le(cut.seq);
        }
        out.put_u64_le(self.checkpoint);
        out.put_slice(&self.dir_tag);
        out.put_slice(&self.carry_tag);
        out.put_slice(&self.tag);
        let crc = crc32c::crc32c(&bytes[CRC_FROM..]);
        bytes[8..CRC_FROM].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// What the header's own tag vouches for: all of it but magic and CRC, which differ between the two places where it
    /// stands, and the tag.
    pub(crate) fn vouched_bytes(&self) -> [u8; TAG_AT - CRC_FROM] {
        self.encode(MAGIC)[CRC_FROM..TAG_AT].try_into().expect("it is so long")
    }

    fn decode(bytes: &[u8]) -> Option<FrameHeader> {
        let mut d = Decoder(bytes);
        d.take(CRC_FROM + 2)?;
        let mut header = FrameHeader {
            flags: d.u16()?,
            store: d.u128()?,
            epoch: d.u128()?,
            segment: d.u32()?,
            block: d.u32()?,
            incarnation: d.u64()?,
            ordinal: d.u64()?,
            stream: d.u8()?,
            cipher: d.u8()?,
            compression: d.u8()?,
            ..FrameHeader::default()
        };
        d.u8()?;
        header.key_id = d.u32()?;
        header.seq = d.u64()?;
        header.durable_seq = d.u64()?;
        header.first_lsn = d.u64()?;
        for field in [
            &mut header.records,
            &mut header.blocks,
            &mut header.dir_len,
            &mut header.dir_crc,
            &mut header.carry_offset,
            &mut header.carry_len,
            &mut header.records_offset,
            &mut header.records_len,
            &mut header.copy_block,
        ] {
            *field = d.u32()?;
        }
        d.u32()?;
        header.opening_seq = d.u64()?;
        for cut in &mut header.cuts {
            *cut = Cut { incarnation: d.u64()?, seq: d.u64()? };
        }
        header.checkpoint = d.u64()?;
        for tag in [&mut header.dir_tag, &mut header.carry_tag, &mut header.tag] {
            *tag = d.take(TAG)?.try_into().ok()?;
        }
        header.is_sound().then_some(header)
    }

    /// Whether all lengths stay inside the frame, so that nobody after needs to ask.
    fn is_sound(&self) -> bool {
        let end = self.blocks as u64 * BLOCK as u64;
        let within = |offset: u64, len: u64| offset + len <= end;
        // The cuts lie before the frame, and numbers leave room for one more.
        let is_before = |seq: u64| seq < self.seq.max(1);
        let counts = is_before(self.durable_seq)
            && (self.stream > 0 || is_before(self.cuts[0].seq))
            && [self.seq, self.checkpoint, self.cuts[0].seq, self.cuts[1].seq].iter().all(|n| *n < 1 << 62)
            && self.ordinal < 1 << (64 - Lsn::COUNTER_BITS)
            && self.first_lsn.checked_add(u64::from(self.records) + 1).is_some();
        counts
            && self.blocks > 0
            && self
                .block
                .checked_add(self.blocks)
                .is_some_and(|end| u64::from(end) * (BLOCK as u64) < 1 << 32)
            && end <= u64::from(u32::MAX)
            && within(FRAME_HEADER as u64, u64::from(self.dir_len))
            && within(u64::from(self.carry_offset), u64::from(self.carry_len))
            && within(u64::from(self.records_offset), u64::from(self.records_len))
            && self.records_offset.is_multiple_of(8)
            && (self.copy_block == 0
                || within(
                    self.copy_block as u64 * BLOCK as u64 + FRAME_HEADER as u64,
                    u64::from(self.dir_len),
                ))
    }

    /// Looks whether a head begins here.
    pub(crate) fn probe(bytes: &[u8]) -> Probe {
        let Some(bytes) = bytes.get(..FRAME_HEADER) else { return Probe::Nothing };
        let copy = &bytes[..8] == COPY_MAGIC;
        if !copy && &bytes[..8] != MAGIC
            || bytes[8..CRC_FROM] != crc32c::crc32c(&bytes[CRC_FROM..]).to_le_bytes()
        {
            return Probe::Nothing;
        }
        match (u16::from_le_bytes([bytes[12], bytes[13]]), FrameHeader::decode(bytes)) {
            (FORMAT, Some(header)) if copy => Probe::Copy(header),
            (FORMAT, Some(header)) => Probe::Frame(header),
            (FORMAT, None) => Probe::Nothing,
            (newer, _) => Probe::Newer(newer),
        }
    }

    /// The copy of a frame's head that the next frame carries.
    pub(crate) fn copy_of_head(&self, frame: &[u8]) -> Vec<u8> {
        let mut copy = self.encode(COPY_MAGIC).to_vec();
        copy.put_slice(&frame[FRAME_HEADER..][..self.dir_len as usize]);
        copy
    }

    /// The directory, if these are its bytes and unchanged.
    pub(crate) fn directory(&self, bytes: &[u8]) -> Option<Vec<Head>> {
        Some(self.lines(bytes)?.into_iter().map(|(head, _)| head).collect())
    }

    /// The directory with each record's LSN, if these are its bytes and unchanged.
    pub(crate) fn lines(&self, bytes: &[u8]) -> Option<Vec<(Head, u64)>> {
        let dir = bytes.get(..self.dir_len as usize)?;
        if crc32c::crc32c(dir) != self.dir_crc {
            return None;
        }
        let mut decoder = Decoder(dir);
        let mut lines = Vec::new();
        for nth in 0..u64::from(self.records) {
            let head = Head::decode_dir(&mut decoder)?;
            let lsn = if self.stream == COLD { decoder.varint()? } else { self.first_lsn + nth };
            lines.push((head, lsn));
        }
        decoder.end()?;
        let total: u64 = lines.iter().map(|(head, _)| head.padded() as u64).sum();
        (total == u64::from(self.records_len)).then_some(lines)
    }
}

/// How many blocks a frame takes.
pub(crate) fn frame_blocks(dir_len: usize, carry_len: usize, records_len: usize) -> usize {
    let body = body_len(dir_len, carry_len, records_len);
    let blocks = body.div_ceil(BLOCK);
    if blocks == 1 { 1 } else { blocks + (FRAME_HEADER + dir_len).div_ceil(BLOCK) }
}

/// How many blocks a frame of relocated records takes.
pub(crate) fn cold_frame_blocks(dir_len: usize, records_len: usize) -> usize {
    body_len(dir_len, 0, records_len).div_ceil(BLOCK) + (FRAME_HEADER + dir_len).div_ceil(BLOCK)
}

fn body_len(dir_len: usize, carry_len: usize, records_len: usize) -> usize {
    round_up(round_up(FRAME_HEADER + dir_len, 8) + carry_len, 8) + records_len
}

/// A frame of which everything is settled but where its records are copied to.
pub(crate) struct Plan {
    pub(crate) header: FrameHeader,
    /// Header, directory and carried head, up to where the records begin.
    head: Vec<u8>,
    /// The head that the next frame must carry.
    pub(crate) carry: Option<Vec<u8>>,
    /// Encrypts the records on their way out.
    seal: Option<Arc<Seal>>,
}

/// Settles a frame. The header brings identity and position; lengths, tags and CRC are filled in here. `records_len` is what
/// the records take in the frame, sealed if there is a seal.
pub(crate) fn plan<'a>(
    mut header: FrameHeader,
    carry: &[u8],
    dirs: impl Iterator<Item = &'a [u8]>,
    records_len: usize,
    seal: Option<Arc<Seal>>,
) -> Plan {
    let mut head = pool::take();
    head.resize(FRAME_HEADER, 0);
    dirs.for_each(|dir| head.put_slice(dir));
    let dir_end = head.len();
    let dir_len = dir_end - FRAME_HEADER;
    header.dir_len = dir_len as u32;
    header.dir_crc = crc32c::crc32c(&head[FRAME_HEADER..]);
    head.resize(round_up(dir_end, 8), 0);
    header.carry_offset = head.len() as u32;
    header.carry_len = carry.len() as u32;
    head.put_slice(carry);
    head.resize(round_up(head.len(), 8), 0);
    header.records_offset = head.len() as u32;
    header.records_len = records_len as u32;
    debug_assert_eq!(head.len() + records_len, body_len(dir_len, carry.len(), records_len));
    let body_blocks = (head.len() + records_len).div_ceil(BLOCK);
    let single = body_blocks == 1 && header.stream == HOT;
    header.copy_block = if single { 0 } else { body_blocks as u32 };
    header.blocks = match header.stream {
        HOT => frame_blocks(dir_len, carry.len(), records_len),
        _ => cold_frame_blocks(dir_len, records_len),
    } as u32;
    if let Some(seal) = &seal {
        seal.vouch_head(&mut header, &head[FRAME_HEADER..dir_end], carry);
    }
    head[..FRAME_HEADER].copy_from_slice(&header.encode(MAGIC));
    let carry = single.then(|| [COPY_MAGIC, &head[COPY_MAGIC.len()..dir_end]].concat());
    Plan { header, head, carry: carry.filter(|_| !is_broken(Rule::HeadsCopied)), seal }
}

impl Plan {
    /// Lays the frame out in `out`, which is empty and has room for it. The records are plain ones; they are sealed here, where
    /// no lock is held.
    pub(crate) fn lay_out<'a>(&self, mut out: BytesMut, records: impl Iterator<Item = &'a [u8]>) -> Bytes {
        out.put_slice(&self.head);
        match &self.seal {
            None => records.for_each(|record| out.put_slice(record)),
            Some(seal) => {
                let base = self.header.block * BLOCK as u32;
                records.for_each(|batch| seal.seal_batch(&mut out, base, batch));
            }
        }
        pad(&mut out, BLOCK);
        if self.header.copy_block > 0 {
            // The CRC leaves the magic out: the copy differs in nothing else.
            out.put_slice(COPY_MAGIC);
            out.put_slice(&self.head[COPY_MAGIC.len()..FRAME_HEADER + self.header.dir_len as usize]);
            pad(&mut out, BLOCK);
        }
        debug_assert_eq!(out.len(), self.header.blocks as usize * BLOCK);
        out.freeze()
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        pool::give(std::mem::take(&mut self.head));
    }
}

/// Adds zeros up to a multiple.
fn pad(out: &mut BytesMut, multiple: usize) {
    out.put_bytes(0, round_up(out.len(), multiple) - out.len());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{self, Kind};
    use pontoon_proto::GroupId;

    struct Sample {
        header: FrameHeader,
        bytes: Bytes,
        carry: Option<Vec<u8>>,
    }

    fn sample(payload: usize, carry: &[u8]) -> Sample {
        let (mut data, mut dir) = (Vec::new(), Vec::new());
        record::encode(&mut data, &mut dir, (Kind::PutMeta, GroupId(9), 0, 0), |out| {
            out.resize(out.len() + payload, 7)
        });
        let header = FrameHeader { seq: 5, records: 1, incarnation: 3, ..FrameHeader::default() };
        let plan = plan(header, carry, [&dir[..]].into_iter(), data.len(), None);
        let bytes = plan.lay_out(BytesMut::new(), [&data[..]].into_iter());
        Sample { header: plan.header.clone(), bytes, carry: plan.carry.clone() }
    }

    #[test]
    fn a_frame_of_one_block_leaves_its_head_to_the_next() {
        let frame = sample(100, &[]);
        assert_eq!(frame.bytes.len(), BLOCK);
        assert_eq!(FrameHeader::probe(&frame.bytes), Probe::Frame(frame.header.clone()));
        let next = sample(100, frame.carry.as_deref().unwrap());
        let carried = &next.bytes[next.header.carry_offset as usize..][..next.header.carry_len as usize];
        assert_eq!(FrameHeader::probe(carried), Probe::Copy(frame.header.clone()));
        assert_eq!(frame.header.directory(&carried[FRAME_HEADER..]).unwrap().len(), 1);
    }

    #[test]
    fn a_frame_of_many_blocks_ends_with_a_copy_of_its_head() {
        let frame = sample(3 * BLOCK, &[1; 40]);
        assert!(frame.carry.is_none());
        let copy = &frame.bytes[frame.header.copy_block as usize * BLOCK..];
        assert_eq!(FrameHeader::probe(copy), Probe::Copy(frame.header.clone()));
        assert!(frame.header.directory(&copy[FRAME_HEADER..]).is_some());
    }

    #[test]
    fn any_flipped_bit_in_a_header_is_noticed() {
        let frame = sample(10, &[]);
        for bit in 0..FRAME_HEADER * 8 {
            let mut bytes = frame.bytes.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(FrameHeader::probe(&bytes), Probe::Nothing, "bit {bit}");
        }
    }
}
