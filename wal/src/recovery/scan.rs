//! Finding frames in a segment: walking from frame to frame, and searching block by block where that breaks.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;

use crate::{
    Error, Result,
    frame::{BLOCK, Cut, FORMAT, FrameHeader, HOT, Probe},
    fs::read_exact,
    segment::Segment,
};

/// How much is read at once while frames are small.
const WINDOW_BYTES: usize = 1 << 20;

/// A frame that was found, by its own head or by the copy behind it.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) segment: Arc<Segment>,
    pub(crate) stream: u8,
    pub(crate) incarnation: u64,
    pub(crate) seq: u64,
    pub(crate) block: u32,
    pub(crate) blocks: u32,
    pub(crate) first_lsn: u64,
    pub(crate) records: u32,
    /// Its own head is damaged: this block holds the copy of it.
    pub(crate) copy_at: Option<u32>,
}

/// What the frames of one open say about it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Incarnation {
    pub(crate) ordinal: u64,
    pub(crate) cuts: [Cut; 2],
}

/// What all segments hold.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) frames: Vec<Found>,
    /// Frames of the cold stream.
    pub(crate) cold: Vec<Found>,
    pub(crate) incarnations: HashMap<u64, Incarnation>,
    /// (incarnation, seq of the frame, durable_seq that it claims): the highest claim of each incarnation and segment.
    pub(crate) claims: Vec<(u64, u64, u64)>,
    /// The newest checkpoint that a frame knows to be durable.
    pub(crate) checkpoint: u64,
    pub(crate) bytes: u64,
}

/// A window of a file, so that small frames do not cost a read each.
struct Window<'a> {
    segment: &'a Segment,
    len: u64,
    start: u64,
    bytes: Vec<u8>,
    read: u64,
}

impl Window<'_> {
    /// The block's bytes.
    fn block(&mut self, block: u32) -> Result<&[u8]> {
        let offset = u64::from(block) * BLOCK as u64;
        if offset < self.start || offset + BLOCK as u64 > self.start + self.bytes.len() as u64 {
            let len = WINDOW_BYTES.min((self.len - offset) as usize);
            self.bytes.resize(len, 0);
            // A read that fails is an error, never the end of the log.
            read_exact(&*self.segment.file, &mut self.bytes, offset)
                .map_err(|source| Error::io("read", &self.segment.path, source))?;
            self.start = offset;
            self.read += len as u64;
        }
        let at = (offset - self.start) as usize;
        Ok(&self.bytes[at..at + BLOCK])
    }
}

impl Scan {
    /// Adds what another scan found.
    pub(crate) fn join(&mut self, other: Scan) {
        self.frames.extend(other.frames);
        self.cold.extend(other.cold);
        self.incarnations.extend(other.incarnations);
        self.claims.extend(other.claims);
        self.checkpoint = self.checkpoint.max(other.checkpoint);
        self.bytes += other.bytes;
    }

    /// Adds what a segment holds.
    pub(crate) fn segment(&mut self, segment: &Arc<Segment>, store: u128, segment_bytes: u64) -> Result<()> {
        let total = (segment_bytes / BLOCK as u64) as u32;
        let mut window = Window { segment, len: segment_bytes, start: 0, bytes: Vec::new(), read: 0 };
        let mut block = 0;
        while block < total {
            let mine = |header: &FrameHeader| {
                header.store == store && header.epoch == segment.epoch && header.segment == segment.id
            };
            let probe = match FrameHeader::probe(window.block(block)?) {
                // What this log did not write is nothing, however right its CRC is.
                Probe::Frame(header) | Probe::Copy(header)
                    if mine(&header) && !segment.admits(&header)? =>
                {
                    Probe::Nothing
                }
                probe => probe,
            };
            block = match probe {
                Probe::Frame(header)
                    if mine(&header) && header.block == block && block + header.blocks <= total =>
                {
                    self.frame(segment, &header, None);
                    block + header.blocks
                }
                Probe::Copy(header)
                    if mine(&header)
                        && header.block.checked_add(header.copy_block) == Some(block)
                        && header.block + header.blocks <= total =>
                {
                    // Reached by searching only: the frame's own head did not say that it is here.
                    self.frame(segment, &header, Some(block));
                    (header.block + header.blocks).max(block + 1)
                }
                Probe::Newer(found) if block == 0 => {
                    return Err(Error::NewerFormat {
                        path: segment.path.clone(),
                        found: u32::from(found),
                        supported: u32::from(FORMAT),
                    });
                }
                Probe::Frame(header) | Probe::Copy(header) if mine(&header) => {
                    // In another's place, which it destroyed. It is no frame, yet what it says is true: that the frames
                    // before it were durable must not be lost with its own place.
                    self.note(&header);
                    block + 1
                }
                _ => block + 1,
            };
        }
        self.bytes += window.read;
        Ok(())
    }

    fn frame(&mut self, segment: &Arc<Segment>, header: &FrameHeader, copy_at: Option<u32>) {
        self.note(header);
        let found = Found {
            segment: segment.clone(),
            stream: header.stream,
            incarnation: header.incarnation,
            seq: header.seq,
            block: header.block,
            blocks: header.blocks,
            first_lsn: header.first_lsn,
            records: header.records,
            copy_at,
        };
        match header.stream {
            HOT => self.frames.push(found),
            _ => self.cold.push(found),
        }
    }

    fn note(&mut self, header: &FrameHeader) {
        let FrameHeader { ordinal, cuts, .. } = *header;
        self.incarnations.insert(header.incarnation, Incarnation { ordinal, cuts });
        self.checkpoint = self.checkpoint.max(header.checkpoint);
        if header.stream != HOT {
            // What counts of the cold stream is what the checkpoint says.
            return;
        }
        let claim = (header.incarnation, header.seq, header.durable_seq);
        match self.claims.last_mut() {
            // Within an open, later frames claim at least as much.
            Some(last) if last.0 == claim.0 && last.1 <= claim.1 => *last = claim,
            _ => self.claims.push(claim),
        }
    }
}

/// Reads a frame's bytes.
pub(crate) fn read_frame(found: &Found) -> Result<Bytes> {
    read_blocks(&found.segment, found.block, found.blocks)
}

/// Reads some blocks of a segment.
pub(crate) fn read_blocks(segment: &Segment, block: u32, blocks: u32) -> Result<Bytes> {
    let mut bytes = vec![0; blocks as usize * BLOCK];
    read_exact(&*segment.file, &mut bytes, u64::from(block) * BLOCK as u64)
        .map_err(|source| Error::io("read", &segment.path, source))?;
    Ok(bytes.into())
}
