//! Keys in a text file: a number and 64 hexadecimal digits per line, the last line is the current key.
//!
//! Crash argument of making and extending it: the whole content goes to `FILE.new`, which is synced, then renamed to `FILE`,
//! then the directory is synced. A cut leaves the old file or the new one, perhaps with a `FILE.new` beside it, which
//! nobody used: a log learns of a key only from `FILE`.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the key file is no part of a log's directory; no disk that a log is tested on holds it"
)]

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write as _},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use super::{DataKey, KEY_BYTES, KeyError, KeyId, KeyProvider};

/// The file is made under its name with this at the end.
const MAKING: &str = ".new";
const HEAD: &str = "\
# Keys of a Pontoon log: a number and 64 hexadecimal digits per line; the last line is the current key.
# Keep a copy in a safe place: what was written with a key cannot be read without it.
";

/// Why a key file is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// The system refuses.
    #[error("cannot {action} the key file {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others than its owner may read or change the file.
    #[error("the key file {} is open to others (mode {mode:03o}); run: chmod 600 {}", path.display(), path.display())]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A line is not a number and 64 hexadecimal digits. The line itself is not repeated: it may be a key.
    #[error(
        "line {line} of the key file {} is not a number above 0, a space and 64 hexadecimal digits; mend it, or restore a copy",
        path.display()
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// Two lines have the same number.
    #[error("line {line} of the key file {} has key {id} a second time; each number names one key for ever", path.display())]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The number.
        id: KeyId,
    },
    /// There is no key in it.
    #[error("the key file {} holds no key; restore a copy, or make one with: pontoon wal key new", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// There is a file of that name already.
    #[error("the key file {} is there already; to add a key to it: pontoon wal key rotate {}", path.display(), path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else is making or extending the file, or was interrupted.
    #[error("{} is there: somebody is changing the keys, or was cut short; if nobody is, remove it", path.display())]
    Making {
        /// The file that is in the way.
        path: PathBuf,
    },
}

/// A file of keys. It is read when it is opened, whenever the current key is asked for and when a number is not known, so a
/// key that is added to it comes into use without a restart.
#[derive(Debug)]
pub struct KeyFile {
    path: PathBuf,
    keys: Mutex<Vec<(KeyId, DataKey)>>,
}

impl KeyFile {
    /// Reads a file of keys.
    ///
    /// # Errors
    /// [`KeyFileError`]; nothing of a file with one bad line is used.
    pub fn open(path: impl Into<PathBuf>) -> Result<KeyFile, KeyFileError> {
        let path = path.into();
        let keys = Mutex::new(read(&path)?);
        Ok(KeyFile { path, keys })
    }

    /// Makes a file with one key, number 1, drawn from the system's randomness. It is durable on return.
    ///
    /// # Errors
    /// [`KeyFileError::Exists`], [`KeyFileError::Making`], [`KeyFileError::Io`].
    pub fn create(path: &Path) -> Result<KeyId, KeyFileError> {
        change(path, || match path.symlink_metadata() {
            Ok(_) => Err(KeyFileError::Exists { path: path.to_owned() }),
            Err(_) => Ok(Vec::new()),
        })
    }

    /// Adds a key, numbered above all others, which is the current one from now on. It is durable on return. The older keys
    /// stay: what they wrote needs them.
    ///
    /// # Errors
    /// [`KeyFileError`].
    pub fn rotate(path: &Path) -> Result<KeyId, KeyFileError> {
        change(path, || read(path))
    }

    /// The numbers in the file as it was read last, in its order.
    pub fn ids(&self) -> Vec<KeyId> {
        self.keys().iter().map(|(id, _)| *id).collect()
    }

    fn keys(&self) -> MutexGuard<'_, Vec<(KeyId, DataKey)>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the file holds by now.
    fn refresh(&self) -> Result<MutexGuard<'_, Vec<(KeyId, DataKey)>>, KeyFileError> {
        let fresh = read(&self.path)?;
        let mut keys = self.keys();
        *keys = fresh;
        Ok(keys)
    }
}

impl KeyProvider for KeyFile {
    fn current(&self) -> Result<(KeyId, DataKey), KeyError> {
        let keys = self.refresh()?;
        keys.last().cloned().ok_or_else(|| KeyFileError::Empty { path: self.path.clone() }.into())
    }

    fn key(&self, id: KeyId) -> Result<Option<DataKey>, KeyError> {
        let find = |keys: &[(KeyId, DataKey)]| {
            keys.iter().find(|(known, _)| *known == id).map(|(_, key)| key.clone())
        };
        let known = find(&self.keys());
        match known {
            Some(key) => Ok(Some(key)),
            None => Ok(find(&self.refresh()?)),
        }
    }

    fn name(&self) -> String {
        format!("the key file {}", self.path.display())
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyFileError {
    move |source| KeyFileError::Io { action, path: path.to_owned(), source }
}

fn read(path: &Path) -> Result<Vec<(KeyId, DataKey)>, KeyFileError> {
    let mut file = File::open(path).map_err(io_error("open", path))?;
    let metadata = file.metadata().map_err(io_error("look at", path))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Permissions { path: path.to_owned(), mode });
    }
    // Room for all of it, so that no part is left behind in memory that was outgrown.
    let mut bytes = Zeroizing::new(Vec::with_capacity(metadata.len() as usize + 1));
    file.read_to_end(&mut bytes).map_err(io_error("read", path))?;
    parse(path, &bytes)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<(KeyId, DataKey)>, KeyFileError> {
    let mut keys: Vec<(KeyId, DataKey)> = Vec::new();
    for (nth, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let line_nr = nth + 1;
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let (id, key) =
            parse_line(line).ok_or_else(|| KeyFileError::Line { path: path.to_owned(), line: line_nr })?;
        if keys.iter().any(|(known, _)| *known == id) {
            return Err(KeyFileError::Duplicate { path: path.to_owned(), line: line_nr, id });
        }
        keys.push((id, key));
    }
    match keys.is_empty() {
        true => Err(KeyFileError::Empty { path: path.to_owned() }),
        false => Ok(keys),
    }
}

fn parse_line(line: &[u8]) -> Option<(KeyId, DataKey)> {
    let gap = line.iter().position(u8::is_ascii_whitespace)?;
    let (id, digits) = (std::str::from_utf8(&line[..gap]).ok()?, line[gap..].trim_ascii());
    let id: u32 = id.parse().ok().filter(|id| *id > 0)?;
    if digits.len() != 2 * KEY_BYTES {
        return None;
    }
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16).map(|digit| digit as u8);
        *byte = digit(0)? << 4 | digit(1)?;
    }
    Some((KeyId(id), DataKey::new(*key)))
}

/// Writes what is there and a fresh key under the next number. The new file is made first of all, so that of two who change
/// the keys at once one is refused, and none builds on what the other replaces.
fn change(
    path: &Path,
    existing: impl FnOnce() -> Result<Vec<(KeyId, DataKey)>, KeyFileError>,
) -> Result<KeyId, KeyFileError> {
    let mut making = path.as_os_str().to_owned();
    making.push(MAKING);
    let making = PathBuf::from(making);
    let file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&making) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(KeyFileError::Making { path: making });
        }
        opened => opened.map_err(io_error("make", &making))?,
    };
    let changed = existing().and_then(|keys| write(path, &making, file, keys));
    if changed.is_err() {
        // What is left of it is of no use to anybody; if it cannot be removed, the next change says so.
        let _ = fs::remove_file(&making);
    }
    changed
}

fn write(
    path: &Path,
    making: &Path,
    mut file: File,
    mut keys: Vec<(KeyId, DataKey)>,
) -> Result<KeyId, KeyFileError> {
    let highest = keys.iter().map(|(id, _)| id.0).max().unwrap_or(0);
    let id = highest.checked_add(1).map(KeyId).ok_or_else(|| {
        io_error("add a key to", path)(io::Error::other("its highest number is the highest that there is"))
    })?;
    let mut fresh = Zeroizing::new([0; KEY_BYTES]);
    SystemRandom::new()
        .fill(&mut *fresh)
        .map_err(|_| io_error("draw a key for", path)(io::Error::other("the system gives no randomness")))?;
    keys.push((id, DataKey::new(*fresh)));
    // Room for all of it, so that no part is left behind in memory that was outgrown.
    let mut text = Zeroizing::new(String::with_capacity(HEAD.len() + keys.len() * (2 * KEY_BYTES + 12)));
    text.push_str(HEAD);
    for (id, key) in &keys {
        let _ = write!(text, "{id} ");
        key.bytes().iter().for_each(|byte| {
            let _ = write!(text, "{byte:02x}");
        });
        text.push('\n');
    }
    file.write_all(text.as_bytes()).map_err(io_error("write", making))?;
    file.sync_all().map_err(io_error("sync", making))?;
    fs::rename(making, path).map_err(io_error("rename", making))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(io_error("sync the directory of", path))?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        parse(Path::new("keys"), text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_file_that_is_made_and_extended_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        assert_eq!(KeyFile::create(&path).unwrap(), KeyId(1));
        assert!(matches!(KeyFile::create(&path), Err(KeyFileError::Exists { .. })));
        let keys = KeyFile::open(&path).unwrap();
        let (first, _) = keys.current().unwrap();
        assert_eq!(KeyFile::rotate(&path).unwrap(), KeyId(2));
        let (second, fresh) = keys.current().unwrap();
        assert_eq!((first, second), (KeyId(1), KeyId(2)));
        let old = keys.key(first).unwrap().unwrap();
        assert_ne!(old.bytes(), fresh.bytes());
        assert_eq!(keys.ids(), [KeyId(1), KeyId(2)]);
        assert!(keys.key(KeyId(3)).unwrap().is_none());
        assert_eq!(format!("{keys:?}").matches("DataKey(..)").count(), 2, "keys are never printed");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        KeyFile::create(&path).unwrap();
        for mode in [0o640, 0o604, 0o660, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = KeyFile::open(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("{mode:03o}")) && error.contains("chmod 600"), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        assert!(KeyFile::open(&path).is_ok());
    }

    #[test]
    fn garbage_duplicates_and_nothing_are_refused_without_repeating_a_key() {
        let digits = "0123456789abcdef".repeat(4);
        for line in
            ["1", "x y", "0 DIGITS", "-1 DIGITS", "1 DIGITSa", "1 DIGITS 2", "1 DIGITg", "4294967296 DIGITS"]
        {
            let line = line.replace("DIGITS", &digits).replace("DIGIT", &digits[1..]);
            let refusal = refusal(&format!("# keys\n{line}\n"));
            assert!(refusal.starts_with("line 2 of the key file keys is not"), "{line}: {refusal}");
            assert!(!refusal.contains("89abcdef"), "{refusal}");
        }
        let twice = refusal(&format!("7 {digits}\n8 {digits}\n7 {digits}"));
        assert!(twice.starts_with("line 3 of the key file keys has key 7 a second time"), "{twice}");
        assert!(refusal("# nothing\n").contains("holds no key"));
        let good =
            parse(Path::new("keys"), format!("  7\t{}  \r\n", digits.to_uppercase()).as_bytes()).unwrap();
        assert_eq!((good[0].0, good[0].1.bytes()[1]), (KeyId(7), 0x23));
    }

    #[test]
    fn an_interrupted_change_is_named_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        KeyFile::create(&path).unwrap();
        fs::write(dir.path().join("keys.new"), "half").unwrap();
        let error = KeyFile::rotate(&path).unwrap_err();
        assert!(matches!(&error, KeyFileError::Making { path } if path.ends_with("keys.new")), "{error}");
        assert_eq!(KeyFile::open(&path).unwrap().ids(), [KeyId(1)]);
    }
}
