//! Copying what is readable of a log into a fresh one.
//!
//! What was acknowledged and is lost stays lost: a group that is damaged here is damaged in the copy, with the entries
//! before the first loss, and takes nothing but `destroy`. A replica that forgot what it promised must not come back to life
//! because somebody copied it.
//!
//! Crash argument: the copy is made as `NAME.repairing` and renamed to `NAME` when it is closed, and the names are synced
//! after. Until then there is nothing under `NAME`, and the original is only read.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use pontoon_proto::GroupId;

use super::lenient::{Lenient, Unreadable};
use crate::{
    Batch, Damage, Entry, Error, GroupView, KeyProvider, Options, Result, TornTail, Wal, WalReader,
    create::LOCK_NAME,
    fs::{Fs, LockGuard},
    manifest::Manifest,
    recovery,
};

/// The copy is made under its name with this at the end.
const MAKING: &str = ".repairing";
/// Bytes of entries that are read and written at a time.
const PAGE_BYTES: u64 = 1 << 20;
/// More than a record takes besides what it holds.
const RECORD_OVERHEAD: u64 = 256;

/// What of a group goes into a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupCopy {
    /// The group.
    pub group: GroupId,
    /// The first index that is copied.
    pub first_index: u64,
    /// The last index that is copied; `first_index - 1` if there is none.
    pub last_index: u64,
    /// What the group loses, and remains damaged by: all entries from the first that cannot be read. `None` for a whole
    /// group.
    pub lost: Option<Damage>,
}

/// What a copy holds.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopyReport {
    /// All groups, ascending.
    pub groups: Vec<GroupCopy>,
    /// Unacknowledged bytes that are left out, as the next open would. With unreadable bytes from there on, what was left out
    /// may have been acknowledged.
    pub torn: Option<TornTail>,
    /// What the disk did not give.
    pub unreadable: Vec<Unreadable>,
}

impl CopyReport {
    /// The groups that lose something.
    pub fn losing(&self) -> impl Iterator<Item = &GroupCopy> {
        self.groups.iter().filter(|group| group.lost.is_some())
    }
}

/// What a copy of the log in a directory would hold. Reads every entry, writes and locks nothing.
///
/// # Errors
/// As [`WalReader::open`], but not for a disk that does not answer everywhere.
pub fn plan_copy(fs: Arc<dyn Fs>, source: &Path, keys: Option<Arc<dyn KeyProvider>>) -> Result<CopyReport> {
    let lenient = Lenient::new(fs);
    let reader = WalReader::open_with(Arc::new(lenient.clone()), source, keys)?;
    plan(&reader, &lenient)
}

fn plan(reader: &WalReader, lenient: &Lenient) -> Result<CopyReport> {
    let mut groups = Vec::new();
    for group in reader.groups() {
        let Some(view) = reader.group(group) else { continue };
        groups.push(plan_group(reader, group, &view)?);
    }
    let (torn, unreadable) = (reader.report().torn.clone(), lenient.unreadable());
    Ok(CopyReport { groups, torn, unreadable })
}

fn plan_group(reader: &WalReader, group: GroupId, view: &GroupView) -> Result<GroupCopy> {
    let end = view.last_index + 1;
    let known = view.damaged.iter().flat_map(|damage| damage.entries.iter().map(|(low, _)| *low));
    let mut gone = known.filter(|low| *low < end).min().unwrap_or(end);
    let mut next = view.first_index;
    while next < gone {
        let page = reader.salvage(group, next..gone, PAGE_BYTES)?;
        gone = page.lost.first().map_or(gone, |(low, _)| *low);
        next = page.next;
    }
    let mut damage = view.damaged.clone().unwrap_or_default();
    damage.entries = if gone < end { vec![(gone, end)] } else { damage.entries };
    Ok(GroupCopy {
        group,
        first_index: view.first_index,
        last_index: gone - 1,
        lost: (!damage.is_empty()).then_some(damage),
    })
}

/// Copies what is readable of the log in `source` into a new one, whose directory `target` names and which is durable on
/// return. Its segments are as large as the original's. The source is locked meanwhile if it has a lock file, and never
/// written to. The copy has an id of its own; groups, metadata, snapshots and tombstones are the same. A torn tail is left
/// out, as the next open would. The target's keys open the source as well; with keys the copy is encrypted, whatever the
/// source was.
///
/// # Errors
/// [`Error::Locked`] if a process has the source open. [`Error::BadOption`] if the target exists or a copy that was
/// interrupted is in its way. [`Error::TooLarge`] for an entry that fits a batch only compressed, if the target does not
/// compress. [`Error::Corrupt`] if nobody knows whom the damage hits: then no group can be vouched for.
/// Otherwise as [`WalReader::open`] for the source and [`Wal::open`] and [`Wal::commit`] for the target.
pub fn copy(source: &Path, mut target: Options) -> Result<CopyReport> {
    let fs = target.fs.clone();
    let dir = target.dir.clone();
    target.check()?;
    let mut making = dir.file_name().unwrap_or_default().to_owned();
    making.push(MAKING);
    let making = dir.with_file_name(making);
    for path in [&dir, &making] {
        refuse_existing(&*fs, path)?;
    }
    let lock = lock(&*fs, source)?;
    let lenient = Lenient::new(fs.clone());
    let reader = WalReader::open_with(Arc::new(lenient.clone()), source, target.keys.clone())?;
    let report = plan(&reader, &lenient)?;
    target.dir.clone_from(&making);
    target.segment_bytes = reader.segment_bytes();
    let (wal, _) = Wal::open(target)?;
    write(&wal, &reader, &report)?;
    wal.close()?;
    fs.rename(&making, &dir).map_err(|source| Error::io("rename", &making, source))?;
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs.sync_dir(parent).map_err(|source| Error::io("sync", parent, source))?;
    drop(lock);
    Ok(report)
}

fn refuse_existing(fs: &dyn Fs, path: &PathBuf) -> Result<()> {
    match fs.read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Ok(_) => Err(exists(path)),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Err(exists(path)),
        Err(source) => Err(Error::io("list", path, source)),
    }
}

fn exists(path: &Path) -> Error {
    Error::BadOption { option: "target", reason: format!("{} exists already", path.display()) }
}

/// Locks the source if anybody ever opened it where it is: a log without a lock file is a copy that nobody runs on, and
/// stays without one.
fn lock(fs: &dyn Fs, source: &Path) -> Result<Option<Box<dyn LockGuard>>> {
    let names = match fs.read_dir(source) {
        Ok(names) => names,
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
        {
            // Opening it says what is wrong.
            return Ok(None);
        }
        Err(error) => return Err(Error::io("list", source, error)),
    };
    if !names.iter().any(|name| name == LOCK_NAME) {
        return Ok(None);
    }
    let path = source.join(LOCK_NAME);
    let lock = fs.lock(&path).map_err(|error| Error::io("lock", path, error))?;
    lock.map(Some).ok_or_else(|| Error::Locked { path: source.to_owned() })
}

fn write(wal: &Wal, reader: &WalReader, report: &CopyReport) -> Result<()> {
    let mut out = Gather { wal, batch: Batch::new(), limit: wal.max_batch_bytes() };
    for (group, min_replica) in reader.tombstones() {
        out.add(0, |batch| batch.destroy(group, min_replica))?;
    }
    for copied in &report.groups {
        write_group(&mut out, reader, copied)?;
    }
    out.flush()?;
    let losing = report.losing().count();
    if losing == 0 {
        return Ok(());
    }
    for copied in report.losing() {
        let damage = copied.lost.clone().map(Box::new);
        wal.shared().index.with_entry(copied.group, |state| state.damage = damage);
    }
    // Damage is remembered by checkpoints alone: each of the two files must have it, since either may rot. A checkpoint
    // that was under way already knows nothing of it.
    loop {
        wal.gc_once()?;
        let options = &wal.shared().options;
        let loaded = recovery::load(&*options.fs, &options.dir, &wal.shared().keyring)?;
        let mut manifests = loaded.into_iter().flat_map(|loaded| loaded.manifests);
        let remembers = |manifest: Option<Manifest>| {
            let groups = manifest.into_iter().flat_map(|manifest| manifest.groups);
            groups.filter(|(_, state)| state.damage.is_some()).count() == losing
        };
        if manifests.all(remembers) {
            return Ok(());
        }
    }
}

fn write_group(out: &mut Gather<'_>, reader: &WalReader, copied: &GroupCopy) -> Result<()> {
    let group = copied.group;
    let Some(view) = reader.group(group) else { return Ok(()) };
    // Written whatever it says: a group exists once it has a record.
    out.add(0, |batch| batch.hard_state(group, view.hard_state))?;
    if let Some(snapshot) = &view.snapshot {
        let conf = &snapshot.conf_state;
        let ids = [&conf.voters, &conf.learners, &conf.voters_outgoing, &conf.learners_next];
        let bytes = snapshot.data.len() + ids.iter().map(|ids| ids.len() * 8).sum::<usize>();
        out.add(bytes as u64, |batch| batch.snapshot_meta(group, snapshot))?;
    }
    if view.truncated != (0, 0) {
        out.add(0, |batch| batch.reset_to(group, view.truncated.0, view.truncated.1))?;
    }
    for (key, value) in reader.all_meta(group) {
        out.add((key.len() + value.len()) as u64, |batch| batch.put_meta(group, &key, &value))?;
    }
    let mut next = copied.first_index;
    while next <= copied.last_index {
        let page = reader.salvage(group, next..copied.last_index + 1, PAGE_BYTES)?;
        if let Some((low, _)) = page.lost.first() {
            // It was readable when the copy was planned: the disk is failing under us.
            let what = format!("entries from {low} of {group} cannot be read any more");
            return Err(Error::Corrupt { path: reader.dir().to_owned(), offset: 0, what });
        }
        out.entries(group, &page.entries)?;
        next = page.next;
    }
    Ok(())
}

/// Gathers records into batches, so that small groups do not cost a sync each.
struct Gather<'a> {
    wal: &'a Wal,
    batch: Batch,
    limit: u64,
}

impl Gather<'_> {
    /// Adds records that hold this many bytes. A batch goes to the disk before it would be too large.
    fn add(&mut self, bytes: u64, add: impl FnOnce(&mut Batch) -> &mut Batch) -> Result<()> {
        if self.batch.size_bytes() + bytes + RECORD_OVERHEAD > self.limit {
            self.flush()?;
        }
        add(&mut self.batch);
        Ok(())
    }

    fn entries(&mut self, group: GroupId, entries: &[Entry]) -> Result<()> {
        let bytes_of = |entry: &Entry| entry.data.len() as u64 + RECORD_OVERHEAD;
        let mut rest = entries;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest.iter().take_while(|entry| {
                bytes += bytes_of(entry);
                bytes <= self.limit / 2
            });
            let (now, later) = rest.split_at(fits.count().max(1));
            let bytes = now.iter().map(bytes_of).sum();
            self.add(bytes, |batch| batch.append(group, now))?;
            rest = later;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        if !batch.is_empty() {
            self.wal.commit(batch)?;
        }
        Ok(())
    }
}
