//! Syncs fjall's journals without the lock that fjall holds while it does, and that every batch needs.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the journals are the engine's files"
)]

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// The journals in a directory.
pub(super) struct Journals {
    dir: PathBuf,
    /// The newest one, as far as it is known, and its number. The handle is kept until there is a newer one: by it we hear of each write that
    /// failed in the meantime. One that failed before was heard by fjall, which then refuses to go on.
    newest: Mutex<Option<(u64, Arc<File>)>>,
}

impl Journals {
    pub(super) fn new(dir: PathBuf) -> Journals {
        Journals { dir, newest: Mutex::default() }
    }

    /// Makes durable what fjall has handed over to the system. `None`: there is no journal to be found.
    ///
    /// Why the newest is enough: fjall syncs a journal before it begins the next one. One that is begun after we have looked makes no
    /// difference: then the one that we found is synced by fjall, and by us as well.
    pub(super) fn sync(&self) -> Option<io::Result<()>> {
        Some(self.newest()?.sync_data())
    }

    fn newest(&self) -> Option<Arc<File>> {
        let numbers = fs::read_dir(&self.dir).ok()?.filter_map(|entry| {
            let name = entry.ok()?.file_name();
            name.to_str()?.strip_suffix(".jnl")?.parse::<u64>().ok()
        });
        let newest = numbers.max()?;
        let mut held = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, journal)) = held.as_ref().filter(|(number, _)| *number >= newest) {
            return Some(journal.clone());
        }
        let journal = Arc::new(File::open(self.dir.join(format!("{newest}.jnl"))).ok()?);
        *held = Some((newest, journal.clone()));
        Some(journal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_journal_is_found_and_kept_until_there_is_a_newer_one() {
        let scratch = tempfile::tempdir().unwrap();
        let journals = Journals::new(scratch.path().to_owned());
        assert!(journals.sync().is_none(), "there is none");
        for name in ["9.jnl", "10.jnl", "LOCK", "x.jnl"] {
            fs::write(scratch.path().join(name), name).unwrap();
        }
        let read = |journal: &Arc<File>| io::read_to_string(&**journal).unwrap();
        let first = journals.newest().unwrap();
        assert_eq!(read(&first), "10.jnl", "by number, not by name");
        assert!(Arc::ptr_eq(&first, &journals.newest().unwrap()));
        fs::write(scratch.path().join("11.jnl"), "11.jnl").unwrap();
        assert_eq!(read(&journals.newest().unwrap()), "11.jnl");
        journals.sync().unwrap().unwrap();
    }
}
