//! Each frame of a directory, as it stands on disk.

use std::{collections::BTreeMap, fmt, ops::ControlFlow, path::Path, path::PathBuf, sync::Arc};

use bytes::Bytes;
use pontoon_proto::GroupId;

use crate::{
    Error, Fs, KeyId, KeyProvider, Lsn, Result,
    crypt::Keyring,
    footer::Footer,
    frame::{BLOCK, CIPHER_NONE, FLAG_OPENING, FLAG_WATERMARK, FRAME_HEADER, FrameHeader, HOT, Probe},
    fs::OpenMode,
    manifest::{MANIFEST_NAMES, Manifest},
    record::{self, Head, Kind},
    recovery::{
        self,
        chain::Chain,
        cold::Cold,
        scan::{Found, Scan, read_frame},
    },
    segment::{Segment, segment_name},
};

/// Whether a frame counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameState {
    /// It is part of the log, and was durable when something later was written.
    Live,
    /// It is part of the log; that it was ever acknowledged is not proven.
    Last,
    /// It is behind a torn frame, or torn itself: the next open cuts it.
    Torn,
    /// A later open cut it, or the log has gone on without it: it is nothing.
    Void,
}

impl fmt::Display for FrameState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FrameState::Live => "live",
            FrameState::Last => "last",
            FrameState::Torn => "torn",
            FrameState::Void => "void",
        })
    }
}

/// A frame that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FrameInfo {
    /// The segment's file.
    pub path: PathBuf,
    /// The segment.
    pub segment: u32,
    /// Where in the file it begins.
    pub offset: u64,
    /// Its length, a multiple of 4,096.
    pub bytes: u64,
    /// Whether it counts.
    pub state: FrameState,
    /// 0 hot, 1 cold.
    pub stream: u8,
    /// Its number in its stream.
    pub seq: u64,
    /// The frames of its stream up to this one were durable when it was built.
    pub durable_seq: u64,
    /// The token of the open that wrote it.
    pub incarnation: u64,
    /// The ordinal of that open.
    pub ordinal: u64,
    /// It is the first frame of its open.
    pub is_opening: bool,
    /// It holds no records and proves that those before it are durable.
    pub is_watermark: bool,
    /// The newest checkpoint that was durable when it was built.
    pub checkpoint: u64,
    /// The LSN of its first record.
    pub first_lsn: Lsn,
    /// The key with which its records are encrypted; `None` if they are not.
    pub key: Option<KeyId>,
    /// Its own head is readable, directory included.
    pub is_head_intact: bool,
    /// The copy of its head is readable; `None` if there is none yet.
    pub is_copy_intact: Option<bool>,
    /// Its records in order; `None` if no copy of the directory is readable.
    pub records: Option<Vec<RecordInfo>>,
}

/// A record of a frame, as the frame's directory names it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecordInfo {
    /// Its place in the order.
    pub lsn: Lsn,
    /// What it is, in words.
    pub kind: &'static str,
    /// Whose it is.
    pub group: GroupId,
    /// The index that it names, 0 for none.
    pub index: u64,
    /// The entries that it holds, `[low, high)`.
    pub entries: Option<(u64, u64)>,
    /// Where in the file it begins.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// Its bytes are what was written.
    pub is_intact: bool,
}

/// Something on disk that is not as it was written. What it costs is told by [`Fault::loses`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file.
    pub path: PathBuf,
    /// The segment.
    pub segment: u32,
    /// Where in the file.
    pub offset: u64,
    /// The frame's number, if one is concerned.
    pub frame: Option<u64>,
    /// What.
    pub kind: FaultKind,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// The segment belongs to the log and its file is missing.
    SegmentMissing,
    /// The segment's file has another length.
    SegmentLength {
        /// The length that it has.
        bytes: u64,
    },
    /// A frame's head is damaged; the copy of it is readable.
    Head,
    /// The copy of a frame's head is damaged; the frame is readable.
    Copy,
    /// Some of the frame's records are damaged.
    Records {
        /// How many.
        count: usize,
    },
    /// The segment's footer cannot be read: opens scan the segment.
    Footer,
    /// The segment's footer lists what its frames do not hold.
    FooterWrong,
    /// The frame is gone; a copy of its head tells what it held.
    Gone,
    /// The frame is gone with every copy of its head: nobody knows whom it hits.
    Unknown,
}

impl Fault {
    /// Whether something that was acknowledged is gone with it, needed or not.
    pub fn loses(&self) -> bool {
        !matches!(self.kind, FaultKind::Head | FaultKind::Copy | FaultKind::Footer)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at offset {}: ", self.path.display(), self.offset)?;
        if let Some(frame) = self.frame {
            write!(f, "frame {frame}: ")?;
        }
        match self.kind {
            FaultKind::SegmentMissing => f.write_str("the segment is missing"),
            FaultKind::SegmentLength { bytes } => write!(f, "the segment has {bytes} bytes"),
            FaultKind::Head => {
                f.write_str("its head is damaged; the copy stands in, nothing is lost by that")
            }
            FaultKind::Copy => {
                f.write_str("the copy of its head is damaged; its own stands, nothing is lost by that")
            }
            FaultKind::Records { count } => write!(f, "{count} of its records are damaged"),
            FaultKind::Footer => f.write_str(
                "the segment's footer is damaged; opens scan the segment, nothing is lost by that",
            ),
            FaultKind::FooterWrong => f.write_str("the segment's footer lists what the frames do not hold"),
            FaultKind::Gone => f.write_str("it is gone; the copy of its head tells what it held"),
            FaultKind::Unknown => {
                f.write_str("it is gone with every copy of its head; nobody knows whom it hits")
            }
        }
    }
}

/// Visits each frame that is found, void ones included, by segment and offset, until `visit` breaks.
///
/// # Errors
/// As [`Wal::open_read_only`](crate::Wal::open_read_only); damage to frames is no error.
pub fn frames(fs: &dyn Fs, dir: &Path, mut visit: impl FnMut(FrameInfo) -> ControlFlow<()>) -> Result<()> {
    let survey = Survey::new(fs, dir, None)?;
    let torn = survey.torn_from()?;
    for found in &survey.found {
        if visit(survey.look(found, torn)?).is_break() {
            break;
        }
    }
    Ok(())
}

/// All frames of a directory, found by walking each segment that is listed from its first block to its last.
pub(super) struct Survey {
    dir: PathBuf,
    pub(super) manifest: Manifest,
    pub(super) unreadable_manifest: Option<PathBuf>,
    pub(super) chain: Chain,
    /// The cold frames that count.
    pub(super) cold: Cold,
    pub(super) found: Vec<Found>,
    /// The segments that can be walked.
    pub(super) files: BTreeMap<u32, Arc<Segment>>,
    /// Footers that are what the manifest says, by segment.
    pub(super) footers: BTreeMap<u32, Footer>,
    /// Segments that cannot be walked.
    pub(super) absent: Vec<Fault>,
    pub(super) segments: usize,
    /// Bytes read to find frames.
    pub(super) bytes: u64,
}

impl Survey {
    /// Without keys what is encrypted is covered by CRCs only; heads and directories are in the clear.
    pub(super) fn new(fs: &dyn Fs, dir: &Path, keys: Option<Arc<dyn KeyProvider>>) -> Result<Survey> {
        let keyring = match keys {
            Some(keys) => Keyring::new(dir, Some(keys))?,
            None => Keyring::blind(dir),
        };
        let loaded = recovery::load(fs, dir, &keyring)?;
        let unreadable_manifest = loaded.as_ref().and_then(|loaded| loaded.unreadable.clone());
        let manifests = loaded.into_iter().flat_map(|loaded| loaded.manifests).flatten();
        let newest = manifests.max_by_key(|manifest| manifest.seq);
        let manifest = newest.ok_or_else(|| Error::Foreign {
            path: dir.to_owned(),
            what: "it holds no manifest".to_owned(),
        })?;
        let (mut scan, mut absent, mut files) = (Scan::default(), Vec::new(), BTreeMap::new());
        for listed in &manifest.segments {
            let path = dir.join(segment_name(listed.id));
            let fault = |kind| Fault { path: path.clone(), segment: listed.id, offset: 0, frame: None, kind };
            let file = match fs.open(&path, OpenMode::Read) {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    absent.push(fault(FaultKind::SegmentMissing));
                    continue;
                }
                Err(source) => return Err(Error::io("open", path, source)),
            };
            let bytes = file.len().map_err(|source| Error::io("read", &path, source))?;
            if bytes != manifest.segment_bytes {
                absent.push(fault(FaultKind::SegmentLength { bytes }));
                continue;
            }
            let segment = recovery::listed_segment(&keyring, &manifest, listed, path.clone(), file)?;
            let segment = Arc::new(segment);
            scan.segment(&segment, manifest.store, manifest.segment_bytes)?;
            files.insert(listed.id, segment);
        }
        let footers = recovery::footers::read(&files, &manifest, 1)?;
        let mut found = [&scan.frames[..], &scan.cold[..]].concat();
        found.sort_by_key(|found| (found.segment.id, found.block));
        if scan.checkpoint > manifest.seq + 1 {
            let what = format!(
                "it holds checkpoint {}, frames know of checkpoint {}",
                manifest.seq, scan.checkpoint
            );
            return Err(Error::Corrupt { path: dir.join(MANIFEST_NAMES[0]), offset: 0, what });
        }
        let (segments, bytes) = (manifest.segments.len(), scan.bytes);
        let cold = Cold::new(std::mem::take(&mut scan.cold), &manifest);
        let chain = Chain::new(scan, &manifest.as_of, &manifest.segments, |_| false);
        let chain = chain.with_spare(footers.values());
        let dir = dir.to_owned();
        Ok(Survey {
            dir,
            manifest,
            unreadable_manifest,
            chain,
            cold,
            found,
            files,
            footers,
            absent,
            segments,
            bytes,
        })
    }

    /// The number of the first frame beyond the proven mark that is cut, if there is one.
    pub(super) fn torn_from(&self) -> Result<Option<u64>> {
        for (expected, (seq, found)) in
            (self.chain.proven + 1..).zip(self.chain.frames.range(self.chain.proven + 1..))
        {
            let info = self.look(found, None)?;
            let whole = info.is_head_intact
                && info.records.is_some_and(|records| records.iter().all(|record| record.is_intact));
            if *seq != expected || !whole {
                return Ok(Some(*seq));
            }
        }
        Ok(None)
    }

    fn is_live(&self, found: &Found) -> bool {
        let frames = if found.stream == HOT { &self.chain.frames } else { &self.cold.frames };
        frames.get(&found.seq).is_some_and(|live| {
            (live.segment.id, live.block, live.incarnation)
                == (found.segment.id, found.block, found.incarnation)
        })
    }

    /// The file of a segment.
    pub(super) fn path(&self, id: u32) -> PathBuf {
        self.dir.join(segment_name(id))
    }

    /// Reads a frame and judges each of its parts.
    pub(super) fn look(&self, found: &Found, torn_from: Option<u64>) -> Result<FrameInfo> {
        let bytes = read_frame(found)?;
        let state = match self.is_live(found) {
            false => FrameState::Void,
            // The checkpoint counts it.
            true if found.stream != HOT => FrameState::Live,
            true if found.seq <= self.chain.proven => FrameState::Live,
            true if torn_from.is_some_and(|torn| found.seq >= torn) => FrameState::Torn,
            true => FrameState::Last,
        };
        let own = head_at(&bytes, 0).filter(|_| found.copy_at.is_none());
        // The copy that the frame has itself, or else the next one.
        let copy = match (&own, found.copy_at) {
            (Some((header, _)), _) if header.copy_block > 0 => {
                Some(head_at(&bytes, header.copy_block as usize * BLOCK))
            }
            (_, Some(block)) => Some(head_at(&bytes, (block - found.block) as usize * BLOCK)),
            _ if state == FrameState::Void => None,
            _ => self.carried(found.seq)?,
        };
        let sound = |head: &Option<Placed>| matches!(head, Some((_, Some(_))));
        let (is_head_intact, is_copy_intact) = (sound(&own), copy.as_ref().map(sound));
        let (header, directory) = match (own, copy.flatten()) {
            (Some((header, Some(heads))), _) => (header, Some(heads)),
            (Some((header, None)), copy) => (header, copy.and_then(|(_, heads)| heads)),
            (None, Some((header, heads))) => (header, heads),
            // It was there a moment ago: somebody writes here.
            (None, None) => (FrameHeader::default(), None),
        };
        if state != FrameState::Void {
            found.segment.adopt(&header)?;
        }
        let records = directory.map(|heads| self.records(found, &header, heads, &bytes));
        Ok(FrameInfo {
            path: found.segment.path.clone(),
            segment: found.segment.id,
            offset: u64::from(found.block) * BLOCK as u64,
            bytes: bytes.len() as u64,
            state,
            stream: header.stream,
            seq: found.seq,
            durable_seq: header.durable_seq,
            incarnation: found.incarnation,
            ordinal: header.ordinal,
            is_opening: header.flags & FLAG_OPENING != 0,
            is_watermark: header.flags & FLAG_WATERMARK != 0,
            checkpoint: header.checkpoint,
            first_lsn: Lsn(header.first_lsn),
            key: (header.cipher != CIPHER_NONE).then_some(KeyId(header.key_id)),
            is_head_intact,
            is_copy_intact,
            records,
        })
    }

    /// What a frame held that nobody found, and where, if the next one carries its head.
    pub(super) fn gone(&self, seq: u64) -> Result<Option<(Fault, Vec<RecordInfo>)>> {
        let Some(Some((header, Some(heads)))) = self.carried(seq)? else { return Ok(None) };
        let Some(segment) = self.files.get(&header.segment) else { return Ok(None) };
        let found = Found {
            segment: segment.clone(),
            stream: HOT,
            incarnation: header.incarnation,
            seq,
            block: header.block,
            blocks: header.blocks,
            first_lsn: header.first_lsn,
            records: header.records,
            copy_at: None,
        };
        let records = self.records(&found, &header, heads, &Bytes::new());
        let fault = Fault {
            path: segment.path.clone(),
            segment: segment.id,
            offset: u64::from(header.block) * BLOCK as u64,
            frame: Some(seq),
            kind: FaultKind::Gone,
        };
        Ok(Some((fault, records)))
    }

    /// The head of a frame as the live frame after it carries it, or its segment's footer; `None` if neither is there.
    fn carried(&self, seq: u64) -> Result<Option<Option<Placed>>> {
        let spare = self.chain.spare.get(&seq).map(|(_, head)| head_at(head, 0));
        let Some(next) = self.chain.frames.get(&(seq + 1)) else { return Ok(spare) };
        let bytes = read_frame(next)?;
        let at = next.copy_at.map_or(0, |block| (block - next.block) as usize * BLOCK);
        let Some((outer, _)) = head_at(&bytes, at).filter(|(outer, _)| outer.carry_len > 0) else {
            return Ok(spare);
        };
        let carry = &bytes[outer.carry_offset as usize..][..outer.carry_len as usize];
        let carried = head_at(carry, 0).filter(|(header, _)| header.seq == seq);
        Ok(Some(carried.or(spare.flatten())))
    }

    fn records(
        &self,
        found: &Found,
        header: &FrameHeader,
        lines: Vec<(Head, u64)>,
        bytes: &Bytes,
    ) -> Vec<RecordInfo> {
        let mut at = header.records_offset as usize;
        let base = u64::from(found.block) * BLOCK as u64;
        let mut records = Vec::new();
        for (head, lsn) in lines {
            let record = bytes.get(at..).unwrap_or_default();
            records.push(RecordInfo {
                lsn: Lsn(lsn),
                kind: kind_name(head.kind),
                group: head.group,
                index: head.index,
                entries: (head.kind == Kind::Entries)
                    .then(|| (head.index, head.index.saturating_add(u64::from(head.count)))),
                offset: base + at as u64,
                bytes: u64::from(head.len),
                is_intact: record::verify(record, &head)
                    && found.segment.vouches_for(base as u32 + at as u32, record),
            });
            at += head.padded();
        }
        records
    }
}

/// A header, and its directory if that is readable.
type Placed = (FrameHeader, Option<Vec<(Head, u64)>>);

/// The head that stands here, a frame's own or a copy.
fn head_at(bytes: &[u8], at: usize) -> Option<Placed> {
    let bytes = bytes.get(at..)?;
    let (Probe::Frame(header) | Probe::Copy(header)) = FrameHeader::probe(bytes) else { return None };
    let lines = header.lines(&bytes[FRAME_HEADER..]);
    Some((header, lines))
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Entries => "entries",
        Kind::HardState => "hard state",
        Kind::TruncatePrefix => "truncate prefix",
        Kind::ResetTo => "reset",
        Kind::Snapshot => "snapshot",
        Kind::PutMeta => "metadata",
        Kind::Destroy => "destroy",
    }
}
