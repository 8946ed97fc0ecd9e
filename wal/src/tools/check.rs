//! Reading a whole log and naming everything in it that is not as it was written.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use pontoon_proto::GroupId;
use uuid::Uuid;

use super::{
    footers::{self, Seen},
    frames::{Fault, FaultKind, FrameInfo, RecordInfo, Survey},
    lenient::{Lenient, Unreadable},
};
use crate::{
    Damage, DamageWhy, DamagedRecord, Error, Fs, KeyId, KeyProvider, Result, TornTail, TornWhy, WalReader,
    frame::BLOCK,
};

/// Bytes of entries that are read at a time.
const PAGE_BYTES: u64 = 4 << 20;

/// What a full check found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CheckReport {
    /// The store's id.
    pub store: Uuid,
    /// The number of the newest checkpoint that is readable.
    pub checkpoint: u64,
    /// Segments that belong to the log.
    pub segments: usize,
    /// Bytes of those segments that were walked.
    pub bytes: u64,
    /// Frames of the log that were read.
    pub frames: u64,
    /// Segments with a footer that is what the manifest says. It was compared with the frames.
    pub footers: usize,
    /// Frames that a later open cut: nothing, and not checked.
    pub void_frames: u64,
    /// Records that were read.
    pub records: u64,
    /// Entries that were read by their groups.
    pub entries: u64,
    /// Where the next open will cut unacknowledged bytes. No damage.
    pub torn: Option<TornTail>,
    /// A manifest file that cannot be read. A crash may leave one; no damage, the other is complete.
    pub unreadable_manifest: Option<PathBuf>,
    /// What the disk did not give; everything else was checked as if zeros stood there.
    pub unreadable: Vec<Unreadable>,
    /// Everything that is not as it was written.
    pub faults: Vec<Fault>,
    /// The records among it, whether or not anything still needs them.
    pub damaged: Vec<DamagedRecord>,
    /// What groups lost that they need, by group. Empty if the log does not open, since then nobody can tell.
    pub lost: BTreeMap<GroupId, Damage>,
    /// Why the log does not open.
    pub refused: Option<Error>,
    /// The log is encrypted, newest with this key, and no keys were given: `entries` and `lost` could not be looked at.
    pub sealed: Option<KeyId>,
}

impl CheckReport {
    /// Whether everything that was looked at is as it was written. A torn tail or one manifest that a crash left torn is no damage.
    pub fn is_whole(&self) -> bool {
        self.unreadable.is_empty()
            && self.faults.is_empty()
            && self.damaged.is_empty()
            && self.lost.is_empty()
            && self.refused.is_none()
    }
}

/// Reads all of a log: every frame that counts, both copies of its head, every record, and then every entry by its group.
/// Whatever an open may take on trust, this does not.
///
/// # Errors
/// As [`Wal::open_read_only`](crate::Wal::open_read_only) where there is nothing to report on: no manifest, a newer format.
/// Damage is no error, nor is a disk that does not answer everywhere.
///
/// Without the keys of an encrypted log, everything that has a CRC is checked; what its groups hold cannot be, and
/// [`CheckReport::sealed`] says so.
pub fn check(fs: Arc<dyn Fs>, dir: &Path, keys: Option<Arc<dyn KeyProvider>>) -> Result<CheckReport> {
    let lenient = Lenient::new(fs);
    let fs: Arc<dyn Fs> = Arc::new(lenient.clone());
    let survey = Survey::new(&*fs, dir, keys.clone())?;
    let mut report = CheckReport {
        store: Uuid::from_u128(survey.manifest.store),
        checkpoint: survey.manifest.seq,
        segments: survey.segments,
        bytes: survey.bytes,
        frames: 0,
        footers: 0,
        void_frames: 0,
        records: 0,
        entries: 0,
        torn: None,
        unreadable_manifest: survey.unreadable_manifest.clone(),
        unreadable: Vec::new(),
        faults: survey.absent.clone(),
        damaged: Vec::new(),
        lost: BTreeMap::new(),
        refused: None,
        sealed: None,
    };
    let seen = check_frames(&survey, &mut report)?;
    check_missing(&survey, &mut report)?;
    report.footers = survey.footers.len();
    let wanting: BTreeSet<u32> =
        report.faults.iter().filter(|fault| fault.loses()).map(|fault| fault.segment).collect();
    report.faults.extend(footers::check(&survey, &seen, &wanting));
    report.faults.sort_by_key(|fault| (fault.segment, fault.offset));
    report.damaged.sort_by_key(|record| (record.segment, record.offset));
    if keys.is_none() && survey.manifest.key_id > 0 {
        report.sealed = Some(KeyId(survey.manifest.key_id));
        return Ok(report);
    }
    match WalReader::open_with(fs, dir, keys) {
        Ok(reader) => check_groups(&reader, &mut report)?,
        Err(error) => report.refused = Some(error),
    }
    report.unreadable = lenient.unreadable();
    Ok(report)
}

fn check_frames(survey: &Survey, report: &mut CheckReport) -> Result<Seen> {
    let torn_from = survey.torn_from()?;
    if let Some(found) = torn_from.and_then(|seq| survey.chain.frames.get(&seq)) {
        let before = found.seq - 1;
        let is_after_gap = before > survey.chain.proven && !survey.chain.frames.contains_key(&before);
        let why = if is_after_gap { TornWhy::AfterGap } else { TornWhy::NotWhole };
        report.torn = Some(TornTail::at(found, why));
    }
    let mut seen = Seen::default();
    let hot = survey.chain.frames.range(..torn_from.unwrap_or(u64::MAX));
    for found in hot.chain(&survey.cold.frames).map(|(_, found)| found) {
        let info = survey.look(found, torn_from)?;
        seen.note(survey, &info);
        report.frames += 1;
        let fault = |kind| fault_of(&info, kind);
        match (info.is_head_intact, info.is_copy_intact, &info.records) {
            (_, _, None) => report.faults.push(fault(FaultKind::Unknown)),
            (false, _, _) => report.faults.push(fault(FaultKind::Head)),
            (true, Some(false), _) => report.faults.push(fault(FaultKind::Copy)),
            (true, _, _) => {}
        }
        let records = info.records.as_deref().unwrap_or_default();
        report.records += records.len() as u64;
        let bad: Vec<&RecordInfo> = records.iter().filter(|record| !record.is_intact).collect();
        if !bad.is_empty() {
            report.faults.push(fault(FaultKind::Records { count: bad.len() }));
        }
        report.damaged.extend(bad.into_iter().map(|record| damaged(&info.path, info.segment, record)));
    }
    let live = survey.chain.frames.len() + survey.cold.frames.len();
    report.void_frames = (survey.found.len() - live) as u64;
    Ok(seen)
}

fn fault_of(info: &FrameInfo, kind: FaultKind) -> Fault {
    Fault { path: info.path.clone(), segment: info.segment, offset: info.offset, frame: Some(info.seq), kind }
}

fn damaged(path: &Path, segment: u32, record: &RecordInfo) -> DamagedRecord {
    DamagedRecord {
        path: path.to_owned(),
        segment,
        offset: record.offset,
        bytes: record.bytes,
        group: record.group,
        entries: record.entries,
        why: DamageWhy::Changed,
    }
}

fn check_missing(survey: &Survey, report: &mut CheckReport) -> Result<()> {
    for seq in &survey.cold.missing {
        let segment = survey.cold.ranges.iter().find(|(_, (first, last, _))| (first..=last).contains(&seq));
        report.faults.extend(segment.map(|(id, _)| Fault {
            path: survey.path(*id),
            segment: *id,
            offset: 0,
            frame: Some(*seq),
            kind: FaultKind::Unknown,
        }));
    }
    for seq in survey.chain.missing() {
        if let Some((fault, records)) = survey.gone(seq)? {
            let records = records.iter().map(|record| damaged(&fault.path, fault.segment, record));
            report.damaged.extend(records);
            report.faults.push(fault);
            continue;
        }
        // Where it must have begun: behind the frame before it, or nobody can say.
        let before = survey.chain.frames.range(..seq).next_back().map(|(_, found)| found);
        report.faults.extend(before.map(|found| Fault {
            path: found.segment.path.clone(),
            segment: found.segment.id,
            offset: u64::from(found.block + found.blocks) * BLOCK as u64,
            frame: Some(seq),
            kind: FaultKind::Unknown,
        }));
    }
    Ok(())
}

/// Reads all entries the way that a replica would, which shows that the index points at them.
fn check_groups(reader: &WalReader, report: &mut CheckReport) -> Result<()> {
    report.lost = reader.report().damaged_groups.clone();
    for group in reader.groups() {
        let Some(view) = reader.group(group) else { continue };
        let mut next = view.first_index;
        while next <= view.last_index {
            let page = reader.salvage(group, next..view.last_index + 1, PAGE_BYTES)?;
            report.entries += page.entries.len() as u64;
            for lost in page.lost {
                let known = report.lost.entry(group).or_default();
                if !known.entries.iter().any(|(low, high)| *low <= lost.0 && lost.1 <= *high) {
                    known.entries.push(lost);
                }
            }
            next = page.next;
        }
    }
    Ok(())
}
