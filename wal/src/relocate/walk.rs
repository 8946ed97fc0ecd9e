//! Walking a segment that is to become free: from frame to frame, to each record that somebody still needs.

use std::{collections::VecDeque, ops::RangeInclusive, sync::Arc};

use bytes::Bytes;
use pontoon_proto::GroupId;

use crate::{
    Error, Result,
    frame::{BLOCK, FRAME_HEADER, FrameHeader, Probe},
    fs::read_exact,
    index::Index,
    record::{self, Head, Kind},
    segment::Segment,
};

/// One read asks for at most this much, unless a record is larger.
const READ_BYTES: usize = 256 << 10;

/// A record that somebody needed when the walk began.
struct Wanted {
    offset: u32,
    group: GroupId,
    first: u64,
}

/// A record of the segment, with its bytes.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) head: Head,
    pub(super) lsn: u64,
    pub(super) offset: u32,
    /// The plain record and its padding, or what stands there instead.
    pub(super) bytes: Bytes,
}

/// What a step of a walk found.
#[derive(Debug)]
pub(super) enum Turn {
    /// Nothing yet.
    On,
    /// A record that is as it was written.
    Record(Taken),
    /// A record that changed on disk.
    Bad(Taken),
    /// A frame's head is not readable where it begins, so that nobody knows the LSNs.
    Lost,
    /// Nothing more.
    End,
}

/// A frame of the segment that holds wanted records.
struct Frame {
    end: u64,
    /// Its records from the next one on, with LSN and offset in the segment.
    lines: VecDeque<(Head, u64, u32)>,
}

/// A walk under way.
///
/// Invariants: `wanted` ascends by offset; frames before `block` are done, the one that ends there is `frame`.
pub(super) struct Walk {
    pub(super) segment: Arc<Segment>,
    incarnation: u64,
    seqs: RangeInclusive<u64>,
    segment_bytes: u64,
    wanted: VecDeque<Wanted>,
    block: u32,
    frame: Option<Frame>,
    window: (u64, Bytes),
    /// Bytes read since somebody last asked.
    read: u64,
}

impl Walk {
    /// Begins with the frames `seqs` of one open, which the segment holds from its beginning on.
    pub(super) fn new(
        index: &Index,
        segment: Arc<Segment>,
        incarnation: u64,
        seqs: RangeInclusive<u64>,
        segment_bytes: u64,
    ) -> Walk {
        let mut wanted = Vec::new();
        index.for_each(|group, state| {
            state.extents_in(&segment, |offset, _, first, _| wanted.push(Wanted { offset, group, first }));
        });
        wanted.sort_unstable_by_key(|wanted| wanted.offset);
        Walk {
            segment,
            incarnation,
            seqs,
            segment_bytes,
            wanted: wanted.into(),
            block: 0,
            frame: None,
            window: (0, Bytes::new()),
            read: 0,
        }
    }

    /// Bytes read since this was last asked.
    pub(super) fn take_read(&mut self) -> u64 {
        std::mem::take(&mut self.read)
    }

    /// Goes on to the next wanted record, by at most one read of small frames.
    pub(super) fn next(&mut self) -> Result<Turn> {
        let Some(wanted) = self.wanted.front() else { return Ok(Turn::End) };
        let (offset, group, first) = (wanted.offset, wanted.group, wanted.first);
        while self.frame.as_ref().is_none_or(|frame| u64::from(offset) >= frame.end) {
            if self.read > 0 {
                return Ok(Turn::On);
            }
            if !self.open_frame(u64::from(offset))? {
                return Ok(Turn::Lost);
            }
        }
        let Some(frame) = &mut self.frame else { return Ok(Turn::Lost) };
        while frame.lines.pop_front_if(|(_, _, at)| *at < offset).is_some() {}
        let is_it = |(head, _, at): &mut (Head, u64, u32)| {
            *at == offset && head.kind == Kind::Entries && head.group == group && head.index == first
        };
        let Some((head, lsn, offset)) = frame.lines.pop_front_if(is_it) else { return Ok(Turn::Lost) };
        self.wanted.pop_front();
        let bytes = self.bytes(u64::from(offset), head.padded())?;
        let is_good = record::verify(&bytes, &head);
        let plain = is_good.then(|| self.segment.open(offset, bytes.clone())).flatten();
        Ok(match plain {
            Some(bytes) => Turn::Record(Taken { head, lsn, offset, bytes }),
            None => Turn::Bad(Taken { head, lsn, offset, bytes }),
        })
    }

    /// Passes to the next frame, whose directory is read if this offset is in it; `false` if no head is readable there.
    fn open_frame(&mut self, offset: u64) -> Result<bool> {
        let start = u64::from(self.block) * BLOCK as u64;
        if start >= self.segment_bytes {
            return Ok(false);
        }
        let Probe::Frame(header) = FrameHeader::probe(&self.bytes(start, FRAME_HEADER)?) else {
            return Ok(false);
        };
        let end = start + u64::from(header.blocks) * BLOCK as u64;
        let is_mine = header.epoch == self.segment.epoch
            && header.segment == self.segment.id
            && header.block == self.block
            && header.incarnation == self.incarnation
            && self.segment.admits(&header)?
            && header.seq == *self.seqs.start()
            && !self.seqs.is_empty()
            && end <= self.segment_bytes;
        if !is_mine {
            return Ok(false);
        }
        let mut frame = Frame { end, lines: VecDeque::new() };
        if offset < end {
            let dir = self.bytes(start + FRAME_HEADER as u64, header.dir_len as usize)?;
            let Some(lines) = self.segment.lines(&header, &dir) else { return Ok(false) };
            let mut at = start as u32 + header.records_offset;
            frame.lines.extend(lines.into_iter().map(|(head, lsn)| {
                let line = (head, lsn, at);
                at += head.padded() as u32;
                line
            }));
        }
        self.seqs = header.seq + 1..=*self.seqs.end();
        self.block += header.blocks;
        self.frame = Some(frame);
        Ok(true)
    }

    /// Bytes of the segment. What follows them is read with them, since frames and records are mostly small.
    fn bytes(&mut self, offset: u64, len: usize) -> Result<Bytes> {
        let (start, window) = &self.window;
        let from = offset.checked_sub(*start).map(|from| from as usize);
        if let Some(bytes) = from.filter(|from| from + len <= window.len()) {
            return Ok(window.slice(bytes..bytes + len));
        }
        let left = self.segment_bytes - offset;
        let mut bytes = vec![0; (len.max(READ_BYTES) as u64).min(left) as usize];
        if bytes.len() < len {
            // A length that leaves the segment is none that the log wrote.
            return Ok(Bytes::new());
        }
        read_exact(&*self.segment.file, &mut bytes, offset)
            .map_err(|source| Error::io("read", &self.segment.path, source))?;
        self.read += bytes.len() as u64;
        self.window = (offset, bytes.into());
        Ok(self.window.1.slice(..len))
    }
}
