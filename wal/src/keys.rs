//! Data keys and where they come from.
//!
//! The log never stores a key. It asks a [`KeyProvider`] by number, derives a key of its own for each use of a segment and
//! for each manifest (`crypt.rs`), and writes down the number.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use zeroize::Zeroizing;

mod file;

pub use file::{KeyFile, KeyFileError};

/// Bytes of a data key.
pub const KEY_BYTES: usize = 32;

/// The number under which a data key is known for ever. 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub u32);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A key of 256 bits, from which the keys that encrypt are derived. Wiped when it is dropped; never printed.
#[derive(Clone)]
pub struct DataKey(Zeroizing<[u8; KEY_BYTES]>);

impl DataKey {
    /// Takes the bytes over. They must come from a source of randomness that is fit for keys.
    pub fn new(bytes: [u8; KEY_BYTES]) -> DataKey {
        DataKey(Zeroizing::new(bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(..)")
    }
}

/// What a provider of keys may fail with.
pub type KeyError = Box<dyn std::error::Error + Send + Sync>;

/// Where data keys come from: a file, a key service, a vault.
///
/// A number names one key for ever. A provider keeps each key for as long as
/// [`Wal::key_ids_in_use`](crate::Wal::key_ids_in_use) names it: what was written with a key is lost without it. Calls come
/// from the thread that opens the log and from the log's background, never from its write path; they may block.
pub trait KeyProvider: Send + Sync {
    /// The key that is used for what is written from now on. Asked at each open, at each new segment and by
    /// [`Wal::rotate_key`](crate::Wal::rotate_key).
    ///
    /// # Errors
    /// Whatever keeps the provider from answering. An open fails with it; a running log goes on with the key that it has.
    fn current(&self) -> Result<(KeyId, DataKey), KeyError>;

    /// The key of this number; `None` if it is not known.
    ///
    /// # Errors
    /// Whatever keeps the provider from answering.
    fn key(&self, id: KeyId) -> Result<Option<DataKey>, KeyError>;

    /// Names the provider in messages, as "the key file /etc/pontoon/keys" would.
    fn name(&self) -> String;
}

/// Keys in memory, for those who get them elsewhere. The one added last is the current one.
#[derive(Debug, Default)]
pub struct KeySet(Mutex<Vec<(KeyId, DataKey)>>);

impl KeySet {
    /// A set of one key.
    pub fn new(id: KeyId, key: DataKey) -> KeySet {
        KeySet(Mutex::new(vec![(id, key)]))
    }

    fn keys(&self) -> MutexGuard<'_, Vec<(KeyId, DataKey)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a key, which is the current one from now on. A number that is there already changes its key.
    pub fn add(&self, id: KeyId, key: DataKey) {
        let mut keys = self.keys();
        keys.retain(|(known, _)| *known != id);
        keys.push((id, key));
    }

    /// Forgets a key.
    pub fn remove(&self, id: KeyId) {
        self.keys().retain(|(known, _)| *known != id);
    }
}

impl KeyProvider for KeySet {
    fn current(&self) -> Result<(KeyId, DataKey), KeyError> {
        self.keys().last().cloned().ok_or_else(|| "the set of keys is empty".into())
    }

    fn key(&self, id: KeyId) -> Result<Option<DataKey>, KeyError> {
        Ok(self.keys().iter().find(|(known, _)| *known == id).map(|(_, key)| key.clone()))
    }

    fn name(&self) -> String {
        "the keys that were given".to_owned()
    }
}
