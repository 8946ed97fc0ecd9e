//! The file `ENGINE`: whose directory this is, and whether it was closed in order.
//!
//! ```text
//! pontoon engine 1
//! kind fjall
//! store 0b6f…
//! boot 5f0e…
//! state open | clean
//! ```
//!
//! The file is replaced whole (temporary name, fsync, rename, fsync of the directory), and it is there before the
//! engine's first file: a crash in between leaves an empty store that opens as such.

#![expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "the marker is a file")]

use std::{
    fs::{self, File, TryLockError},
    io::Write,
    path::{Path, PathBuf},
};

use super::EngineKind;
use crate::error::Error;

/// The newest layout of directory and rows.
const FORMAT: u32 = 1;
const MARKER: &str = "ENGINE";
const LOCK: &str = "LOCK";
const DATA: &str = "data";

/// What an engine asks of the system when it opens.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// The id of this run of the operating system; `None` reads it from the kernel. Where neither is known, a sled
    /// directory that was not closed in order is refused.
    pub boot_id: Option<String>,
}

impl OpenOptions {
    fn boot_id(&self) -> String {
        match &self.boot_id {
            Some(id) => id.clone(),
            None => {
                fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
            }
        }
    }
}

/// An engine's directory, locked for this process until dropped.
#[derive(Debug)]
pub(super) struct Home {
    dir: PathBuf,
    kind: EngineKind,
    store: String,
    boot: String,
    _lock: File,
}

impl Home {
    /// Locks and checks the directory and marks it as open.
    pub(super) fn open(kind: EngineKind, dir: &Path, options: &OpenOptions) -> Result<Home, Error> {
        fs::create_dir_all(dir).map_err(io(dir))?;
        let lock_path = dir.join(LOCK);
        let lock = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&lock_path)
            .map_err(io(&lock_path))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Error::Locked { path: dir.into() },
            TryLockError::Error(source) => Error::Io { path: lock_path, source },
        })?;
        let boot = options.boot_id();
        let store = match read_marker(dir)? {
            Some(marker) => {
                if marker.kind != kind.to_string() {
                    return Err(Error::OtherEngine { path: dir.into(), found: marker.kind, wanted: kind });
                }
                let same_boot = !boot.is_empty() && marker.boot == boot;
                if kind == EngineKind::Sled && !marker.clean && !same_boot {
                    return Err(Error::Untrusted { path: dir.into() });
                }
                marker.store
            }
            None => uuid::Uuid::new_v4().to_string(),
        };
        let home = Home { dir: dir.into(), kind, store, boot, _lock: lock };
        home.write(false)?;
        Ok(home)
    }

    /// Where the engine keeps its own files.
    pub(super) fn data(&self) -> PathBuf {
        self.dir.join(DATA)
    }

    /// Makes the names durable that stand in the directory, and its own.
    pub(super) fn sync_names(&self) -> Result<(), Error> {
        sync_dir(&self.dir)?;
        match self.dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
            Some(_) => sync_dir(Path::new(".")),
            None => Ok(()),
        }
    }

    /// Says on disk that everything is durable and nobody writes any more.
    pub(super) fn mark_clean(&self) -> Result<(), Error> {
        self.write(true)
    }

    fn write(&self, clean: bool) -> Result<(), Error> {
        let state = if clean { "clean" } else { "open" };
        let text = format!(
            "pontoon engine {FORMAT}\nkind {}\nstore {}\nboot {}\nstate {state}\n",
            self.kind, self.store, self.boot
        );
        let (path, temporary) = (self.dir.join(MARKER), self.dir.join("ENGINE.new"));
        let mut file = File::create(&temporary).map_err(io(&temporary))?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io(&temporary))?;
        fs::rename(&temporary, &path).map_err(io(&path))?;
        sync_dir(&self.dir)
    }
}

struct Marker {
    kind: String,
    store: String,
    boot: String,
    clean: bool,
}

fn read_marker(dir: &Path) -> Result<Option<Marker>, Error> {
    let path = dir.join(MARKER);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            for entry in fs::read_dir(dir).map_err(io(dir))? {
                let name = entry.map_err(io(dir))?.file_name();
                if name != LOCK && name != "ENGINE.new" {
                    let reason = format!("it holds {} and no file {MARKER}", name.to_string_lossy());
                    return Err(Error::Foreign { path: dir.into(), reason });
                }
            }
            return Ok(None);
        }
        Err(source) => return Err(Error::Io { path, source }),
    };
    let foreign = |reason: &str| Error::Foreign { path: path.clone(), reason: reason.into() };
    let mut lines = text.lines();
    let format: u32 = lines
        .next()
        .and_then(|line| line.strip_prefix("pontoon engine "))
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| foreign("its first line is not `pontoon engine N`"))?;
    if format > FORMAT {
        return Err(Error::NewerFormat { path: dir.into(), found: format, known: FORMAT });
    }
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).map(str::to_owned)
    };
    Ok(Some(Marker {
        kind: field("kind").ok_or_else(|| foreign("it names no engine"))?,
        store: field("store").unwrap_or_default(),
        boot: field("boot").unwrap_or_default(),
        clean: field("state").as_deref() == Some("clean"),
    }))
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io(dir))
}

/// Names the file in an error.
pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { path, source }
}
