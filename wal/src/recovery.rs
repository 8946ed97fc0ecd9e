//! Opening an existing log: manifests, frames, state. Nothing new is written; what was read beyond the proven mark is
//! written again as it stands, and synced.
//!
//! Steps: the newer readable manifest says which segments there are ([`load`]); `scan` finds their frames; `chain` decides
//! which are live and which are missing; `replay` applies them. A second crash at any point of this finds the same disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use pontoon_proto::GroupId;

use crate::{
    DriverMode, Error, KeyId, Lsn, Options, Result,
    background::Background,
    crypt::{Expected, Guard, Keyring, Use},
    footer::Footer,
    frame::{BLOCK, Cut, HOT},
    fs::{File, FileOp, Fs, OpenMode, read_whole, sync},
    manifest::{ListedSegment, Listing, MANIFEST_NAMES, Manifest, Unreadable},
    record::{Head, Kind},
    rules::{Rule, is_broken},
    segment::{Segment, segment_id, segment_name},
    shared::Parts,
    table::{Free, Sealed, Span, Table},
    types::Damage,
    writer::{Identity, Writer},
};

pub(crate) mod chain;
pub(crate) mod cold;
pub(crate) mod footers;
mod replay;
pub(crate) mod scan;
mod whole;

use chain::Chain;
use cold::Cold;
use replay::{Held, Replay};
use scan::{Found, Scan, read_frame};

/// More threads than this only wait for the disk.
const MAX_THREADS: usize = 8;

/// What opening a log found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// The directory was made by this open.
    pub created: bool,
    /// The number of the checkpoint that recovery started from.
    pub checkpoint: u64,
    /// Segments that belong to the log.
    pub segments: usize,
    /// Segments of which the footer was read instead of the frames. Rot in their records shows when those are read, or by
    /// a scrub.
    pub footers: usize,
    /// Bytes read to find frames.
    pub bytes_scanned: u64,
    /// Live frames that were read.
    pub frames: u64,
    /// Frames in listed segments that a later open cut, or that were relocated and never counted by a checkpoint. Nothing.
    pub void_frames: u64,
    /// Frames that were acknowledged and are gone; what they held is in `damaged`.
    pub lost_frames: u64,
    /// Records in those frames.
    pub records: u64,
    /// Where unacknowledged bytes were cut, if there were any.
    pub torn: Option<TornTail>,
    /// A manifest file that could not be read. A crash may leave one; the other is complete.
    pub unreadable_manifest: Option<PathBuf>,
    /// Records that were acknowledged and are damaged, whether or not anything still needs them.
    pub damaged: Vec<DamagedRecord>,
    /// Groups that lost something that they need. The others are whole.
    pub damaged_groups: BTreeMap<GroupId, Damage>,
    /// The last record's LSN.
    pub last_lsn: Lsn,
}

/// Where the torn tail begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TornTail {
    /// The segment's file.
    pub path: PathBuf,
    /// The offset of the first frame that was cut.
    pub offset: u64,
    /// Why it was.
    pub why: TornWhy,
}

/// Why an unacknowledged frame was cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TornWhy {
    /// Not all of it reached the disk.
    NotWhole,
    /// The frame before it did not.
    AfterGap,
}

impl std::fmt::Display for TornWhy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TornWhy::NotWhole => "not all of it reached the disk",
            TornWhy::AfterGap => "the frame before it did not reach the disk",
        })
    }
}

impl TornTail {
    pub(crate) fn at(found: &Found, why: TornWhy) -> TornTail {
        TornTail { path: found.segment.path.clone(), offset: u64::from(found.block) * BLOCK as u64, why }
    }
}

/// A record that was acknowledged and is not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedRecord {
    /// The segment's file.
    pub path: PathBuf,
    /// The segment.
    pub segment: u32,
    /// Where in the file.
    pub offset: u64,
    /// How long.
    pub bytes: u64,
    /// Whose it was.
    pub group: GroupId,
    /// The entries that it held, `[low, high)`.
    pub entries: Option<(u64, u64)>,
    /// What is wrong with it.
    pub why: DamageWhy,
}

impl DamagedRecord {
    /// A record that a directory names, at its offset in the segment.
    fn of(head: &Head, segment: &Segment, offset: u32) -> DamagedRecord {
        DamagedRecord {
            path: segment.path.clone(),
            segment: segment.id,
            offset: u64::from(offset),
            bytes: u64::from(head.len),
            group: head.group,
            entries: (head.kind == Kind::Entries).then(|| (head.index, head.index + u64::from(head.count))),
            why: DamageWhy::Changed,
        }
    }
}

/// What is wrong with an acknowledged record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DamageWhy {
    /// Its bytes are not those that its CRC was made of.
    Changed,
    /// Its frame is gone; a copy of the frame's head tells what it held.
    Gone,
}

impl std::fmt::Display for DamageWhy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DamageWhy::Changed => "its bytes changed",
            DamageWhy::Gone => "its frame is gone",
        })
    }
}

/// The readable manifests of a directory.
pub(crate) struct Loaded {
    pub(crate) manifests: [Option<Manifest>; 2],
    pub(crate) unreadable: Option<PathBuf>,
}

/// Reads both manifest files. `None` if there is neither.
pub(crate) fn load(fs: &dyn Fs, dir: &Path, keyring: &Keyring) -> Result<Option<Loaded>> {
    let mut loaded = Loaded { manifests: [None, None], unreadable: None };
    let mut any = false;
    for (slot, name) in MANIFEST_NAMES.into_iter().enumerate() {
        let path = dir.join(name);
        let file = match fs.open(&path, OpenMode::Read) {
            Ok(file) => file,
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
                ) =>
            {
                loaded.unreadable = Some(path);
                continue;
            }
            Err(source) => return Err(Error::io("open", path, source)),
        };
        any = true;
        let bytes = read_whole(&*file).map_err(|source| Error::io("read", &path, source))?;
        match Manifest::decode(&bytes, keyring) {
            Ok(manifest) => loaded.manifests[slot] = Some(manifest),
            Err(Unreadable::Damaged) => loaded.unreadable = Some(path),
            Err(Unreadable::Newer(found)) => {
                return Err(Error::NewerFormat {
                    path,
                    found,
                    supported: u32::from(crate::manifest::FORMAT),
                });
            }
            // A crash leaves no such file: the other one is no way out of a key that is missing or wrong.
            Err(Unreadable::Key(error)) => return Err(error),
            Err(Unreadable::WrongKey(key_id)) => return Err(keyring.wrong(key_id, &path)),
        }
    }
    if !any {
        return Ok(None);
    }
    if let [Some(a), Some(b)] = &loaded.manifests
        && a.store != b.store
    {
        let what = "the two manifests belong to different logs".to_owned();
        return Err(Error::Foreign { path: dir.to_owned(), what });
    }
    if loaded.manifests.iter().all(Option::is_none) {
        let what = "neither manifest is readable; restore the directory or replace the node".to_owned();
        return Err(Error::Corrupt { path: dir.join(MANIFEST_NAMES[0]), offset: 0, what });
    }
    Ok(Some(loaded))
}

/// Rebuilds the state of an existing log. `options` takes the log's own segment size.
pub(crate) fn recover(
    options: &mut Options,
    keyring: Arc<Keyring>,
    loaded: Loaded,
    read_only: bool,
) -> Result<(Parts, RecoveryReport)> {
    let Loaded { manifests, unreadable } = loaded;
    let mut report = RecoveryReport { unreadable_manifest: unreadable, ..RecoveryReport::default() };
    let listed_in = |slot: usize| -> BTreeSet<u32> {
        manifests[slot]
            .iter()
            .flat_map(|manifest| manifest.segments.iter().map(|segment| segment.id))
            .collect()
    };
    let seq_of = |slot: usize| manifests[slot].as_ref().map_or(0, |manifest: &Manifest| manifest.seq);
    let mut table = Table {
        listed: [listed_in(0), listed_in(1)],
        manifest_seqs: [seq_of(0), seq_of(1)],
        manifest_keys: manifests
            .each_ref()
            .map(|manifest| manifest.iter().flat_map(Manifest::keys).collect()),
        ..Table::default()
    };
    let [first, second] = manifests;
    let newest = first.into_iter().chain(second).max_by_key(|manifest| manifest.seq);
    let Some(manifest) = newest else { return Err(Error::Closed) };
    options.segment_bytes = manifest.segment_bytes;
    report.checkpoint = manifest.seq;
    report.segments = manifest.segments.len();
    table.next_id = manifest.next_segment;

    let segments = open_segments(options, &keyring, &manifest, read_only)?;
    let threads = threads(options);
    let footers = footers::read(&segments, &manifest, threads)?;
    // Whoever only looks at a log looks at all of it.
    let none = BTreeMap::new();
    let mut believed = if read_only { &none } else { &footers };
    let look = Look { options, manifest: &manifest, segments: &segments, footers: &footers, threads };
    let (mut chain, mut cold, mut touched) = look.frames(believed, &mut report)?;
    let mut replay = Replay::new(&manifest);
    let whole = whole::replay(&mut replay, &chain, &cold, believed, threads)?;
    let is_whole = whole.is_some();
    match whole {
        Some(whole) => {
            (report.frames, report.records) = (whole.frames, whole.records);
            replay.run(&chain, true, &mut report)?;
        }
        None => {
            // Nothing was decided yet: what the segments count as live is counted anew, and every frame is looked at.
            drop(replay);
            segments.values().for_each(|segment| segment.forget_live());
            if !believed.is_empty() {
                (chain, cold, touched) = look.frames(&none, &mut report)?;
                believed = &none;
            }
            replay = Replay::new(&manifest);
            let is_needed =
                |head: &Head, lsn| !replay.is_news(head.group, lsn) && replay.is_within_bounds(head);
            let lines = cold.salvage(is_needed, &mut report)?;
            replay.bring(lines);
            replay.run(&chain, false, &mut report)?;
        }
    }
    let (last_lsn, last_seq) = (replay.last_lsn, replay.last_seq);
    report.last_lsn = Lsn(last_lsn);
    if !read_only && !is_broken(Rule::RecoverySyncs) {
        make_durable(&replay.unproven)?;
    }
    let carry = std::mem::take(&mut replay.carry);
    let mut held = std::mem::take(&mut replay.held);
    // What the checkpoint counts of the cold stream; the frames behind that stay void.
    held.extend(cold.ranges.iter().map(|(id, (first_seq, last_seq, incarnation))| {
        let (first_seq, last_seq, incarnation) = (*first_seq, *last_seq, *incarnation);
        (*id, Held { incarnation, first_seq, last_seq, span: Span::default() })
    }));
    report.footers = believed.len();
    let index = replay.finish(&mut report);
    file_segments(&mut table, look, &held, &touched, is_whole);
    drop((segments, footers));
    find_free(options, &mut table)?;

    let ordinal = chain.ordinal.max(last_lsn >> Lsn::COUNTER_BITS) + 1;
    let mut rng = options.rng();
    for value in [manifest.store as u64, ordinal, manifest.seq, last_lsn] {
        rng.mix(value);
    }
    let identity = Identity {
        store: manifest.store,
        incarnation: rng.token(),
        ordinal,
        cuts: [
            Cut { incarnation: chain.incarnation, seq: last_seq },
            Cut { incarnation: chain.incarnation, seq: manifest.as_of.seqs[1] },
        ],
    };
    let next_lsn = (ordinal << Lsn::COUNTER_BITS).max(last_lsn) + 1;
    (table.done_seq, table.done_lsn, table.cold_seq) = (last_seq, next_lsn - 1, manifest.as_of.seqs[1]);
    let writer = Writer::new(identity.clone(), last_seq, carry);
    let background = Background::new(identity.clone(), rng, manifest.as_of.seqs[1]);
    Ok((Parts { keyring, identity, index, table, writer, background, next_lsn, lock: None }, report))
}

/// Makes the frames beyond the proven mark durable: nobody may see what a power cut could still take back. They are
/// written again first, byte for byte. After a sync that failed in an earlier process the system may hold blocks for clean
/// that never reached the disk, and shows them to readers; a sync alone would succeed without them.
fn make_durable(frames: &[Found]) -> Result<()> {
    let mut segments: BTreeMap<u32, &Arc<Segment>> = BTreeMap::new();
    for found in frames {
        if !is_broken(Rule::RecoveryRewrites) {
            let op =
                FileOp::Write { offset: u64::from(found.block) * BLOCK as u64, data: read_frame(found)? };
            let written = found.segment.file.submit(op).wait();
            written.map_err(|source| Error::io("write", &found.segment.path, source))?;
        }
        segments.insert(found.segment.id, &found.segment);
    }
    for segment in segments.values() {
        sync(&*segment.file).map_err(|source| Error::io("sync", &segment.path, source))?;
    }
    Ok(())
}

/// How many threads read and replay. A log that is stepped by hand has none of its own.
fn threads(options: &Options) -> usize {
    match options.driver {
        DriverMode::Threads => std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS)),
        DriverMode::Manual => 1,
    }
}

/// What recovery looks at.
#[derive(Clone, Copy)]
struct Look<'a> {
    options: &'a Options,
    manifest: &'a Manifest,
    segments: &'a BTreeMap<u32, Arc<Segment>>,
    /// All that are what the manifest says, believed or not.
    footers: &'a BTreeMap<u32, Footer>,
    threads: usize,
}

impl Look<'_> {
    /// Finds the live frames of all segments whose footer is not believed, and tells which of those segments hold frames.
    fn frames(
        &self,
        believed: &BTreeMap<u32, Footer>,
        report: &mut RecoveryReport,
    ) -> Result<(Chain, Cold, BTreeSet<u32>)> {
        let mut scan = self.scan(believed)?;
        report.bytes_scanned += scan.bytes;
        let found = scan.frames.len() + scan.cold.len();
        self.check_checkpoint(&scan)?;
        let touched = scan.frames.iter().chain(&scan.cold).map(|found| found.segment.id).collect();
        let cold = Cold::new(std::mem::take(&mut scan.cold), self.manifest);
        let Manifest { as_of, segments, .. } = self.manifest;
        let chain = Chain::new(scan, as_of, segments, |id| believed.contains_key(&id));
        report.void_frames = (found - chain.frames.len() - cold.frames.len()) as u64;
        Ok((chain.with_spare(self.footers.values()), cold, touched))
    }

    fn scan(&self, believed: &BTreeMap<u32, Footer>) -> Result<Scan> {
        let all: Vec<&Arc<Segment>> =
            self.segments.values().filter(|segment| !believed.contains_key(&segment.id)).collect();
        let mut scan = Scan::default();
        for some in all.chunks(self.threads) {
            let read = |segment: &Arc<Segment>| {
                let mut found = Scan::default();
                found.segment(segment, self.manifest.store, self.manifest.segment_bytes)?;
                Ok(found)
            };
            let found = whole::on_threads(some.iter().map(|&segment| move || read(segment)).collect());
            found.into_iter().try_for_each(|found: Result<Scan>| found.map(|found| scan.join(found)))?;
        }
        Ok(scan)
    }

    /// Frames know which checkpoint was durable before them. With both manifests in place the newest one that a frame
    /// knows must be one of the two; with one lost, the other is at most one older.
    fn check_checkpoint(&self, scan: &Scan) -> Result<()> {
        let seq = self.manifest.seq;
        if scan.checkpoint > seq + 1 {
            let what = format!("it holds checkpoint {seq}, frames know of checkpoint {}", scan.checkpoint);
            let path = self.options.dir.join(MANIFEST_NAMES[0]);
            return Err(Error::Corrupt { path, offset: 0, what });
        }
        Ok(())
    }
}

/// Scans one segment and replays what it holds as a log of its own.
#[cfg(feature = "testing")]
pub(crate) fn replay_one(segment: &Arc<Segment>, store: u128, segment_bytes: u64) {
    let manifest = Manifest::default();
    let mut scan = Scan::default();
    if scan.segment(segment, store, segment_bytes).is_err() {
        return;
    }
    let cold = Cold::new(std::mem::take(&mut scan.cold), &manifest);
    let chain = Chain::new(scan, &manifest.as_of, &manifest.segments, |_| false);
    let (mut replay, mut report) = (Replay::new(&manifest), RecoveryReport::default());
    let is_whole = matches!(whole::replay(&mut replay, &chain, &cold, &BTreeMap::new(), 1), Ok(Some(_)));
    if !is_whole {
        segment.forget_live();
        replay = Replay::new(&manifest);
    }
    if replay.run(&chain, is_whole, &mut report).is_ok() {
        replay.finish(&mut report);
    }
}

/// Every frame that a segment shows, live or not.
pub(crate) fn frames_in(segment: &Arc<Segment>, store: u128, segment_bytes: u64) -> Result<Vec<Found>> {
    let mut scan = Scan::default();
    scan.segment(segment, store, segment_bytes)?;
    Ok([scan.frames, scan.cold].concat())
}

/// Opens the files that the manifest lists; one that is missing or of another length is corruption.
fn open_segments(
    options: &Options,
    keyring: &Arc<Keyring>,
    manifest: &Manifest,
    read_only: bool,
) -> Result<BTreeMap<u32, Arc<Segment>>> {
    let mode = if read_only { OpenMode::Read } else { OpenMode::Write };
    let mut segments = BTreeMap::new();
    for listed in &manifest.segments {
        let path = options.dir.join(segment_name(listed.id));
        let corrupt = |what: String| Error::Corrupt { path: path.clone(), offset: 0, what };
        let file = match options.fs.open(&path, mode) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(corrupt("the segment belongs to the log and is missing; restore it".to_owned()));
            }
            Err(source) => return Err(Error::io("open", path, source)),
        };
        let len = file.len().map_err(|source| Error::io("read", &path, source))?;
        if len != manifest.segment_bytes {
            return Err(corrupt(format!(
                "the segment has {len} bytes instead of {}",
                manifest.segment_bytes
            )));
        }
        segments.insert(listed.id, Arc::new(listed_segment(keyring, manifest, listed, path, file)?));
    }
    Ok(segments)
}

/// A segment as a manifest lists it, with what it takes to tell its own frames from others' and to open them.
pub(crate) fn listed_segment(
    keyring: &Arc<Keyring>,
    manifest: &Manifest,
    listed: &ListedSegment,
    path: PathBuf,
    file: Arc<dyn File>,
) -> Result<Segment> {
    let ListedSegment { id, epoch, incarnation, key_id, .. } = *listed;
    let expected = match listed.listing {
        Listing::Prepared => Expected::Unused { encrypted: manifest.key_id > 0 },
        Listing::Active | Listing::Sealed => Expected::Written { key_id, incarnation },
    };
    let segment = Segment::new(id, epoch, path, file).guarded(Guard::new(keyring.clone(), expected));
    if key_id > 0 && !keyring.is_blind() {
        let of = Use { store: manifest.store, epoch, segment: id, incarnation };
        segment.set_seal(Some(keyring.seal(KeyId(key_id), &of)?));
    }
    Ok(segment)
}

/// Gives each listed segment its place.
fn file_segments(
    table: &mut Table,
    look: Look<'_>,
    held: &BTreeMap<u32, Held>,
    touched: &BTreeSet<u32>,
    is_whole: bool,
) {
    for listed in &look.manifest.segments {
        let segment = look.segments[&listed.id].clone();
        let mut held = held.get(&listed.id).copied();
        if (listed.listing, listed.stream) == (Listing::Sealed, HOT) {
            let ListedSegment { incarnation, first_seq, last_seq, .. } = *listed;
            // Without its last frame nobody knows where it ends.
            let span =
                held.filter(|held| held.last_seq == last_seq).map_or(Span::default(), |held| held.span);
            held = Some(Held { incarnation, first_seq, last_seq, span });
        }
        match held {
            Some(Held { incarnation, first_seq, last_seq, span }) => {
                let (stream, footer) = (listed.stream, look.footers.get(&listed.id).map(Footer::listed));
                // Where something is damaged, the index may point at copies instead of records here.
                let span = if is_whole { span } else { Span::default() };
                let sealed = Sealed { segment, stream, incarnation, first_seq, last_seq, span, footer };
                table.sealed.insert(listed.id, sealed);
            }
            // Only void or torn frames: it must not take new ones under the same epoch.
            None if touched.contains(&listed.id) || listed.listing != Listing::Prepared => {
                table.retired.push(segment)
            }
            None => table.prepared.push_back(segment),
        }
    }
}

/// Segment files that the manifest does not list are free, whatever they hold.
fn find_free(options: &Options, table: &mut Table) -> Result<()> {
    let names =
        options.fs.read_dir(&options.dir).map_err(|source| Error::io("list", &options.dir, source))?;
    for id in names.iter().filter_map(|name| segment_id(name)) {
        let known = table.sealed.contains_key(&id)
            || table.prepared.iter().chain(&table.retired).any(|segment| segment.id == id);
        // The other manifest may list it still: then it waits until that one is written over.
        if known {
            continue;
        }
        if table.listed.iter().any(|listed| listed.contains(&id)) {
            table.waiting.push(id);
        } else {
            table.free.push(Free { id, formed: false });
        }
        table.next_id = table.next_id.max(id.saturating_add(1));
    }
    Ok(())
}
