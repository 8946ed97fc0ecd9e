//! Memory for batches, used again: a batch is built, written and gone within a millisecond, and fresh pages for each cost
//! more than all the rest of its way. One pool serves all logs of the process.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

/// Smaller ones are cheap to allocate.
const LEAST: usize = 256;
/// Larger ones are rare, and too much to hold.
const MOST: usize = 4 << 20;
/// What is held for later in all.
const BUDGET: usize = 32 << 20;

#[derive(Default)]
struct Pool {
    /// The last one that came back is the warmest.
    spare: Vec<Vec<u8>>,
    bytes: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { spare: Vec::new(), bytes: 0 });

/// An empty buffer.
pub(crate) fn take() -> Vec<u8> {
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let buffer = pool.spare.pop().unwrap_or_default();
    pool.bytes -= buffer.capacity();
    buffer
}

/// Gives a buffer back.
pub(crate) fn give(mut buffer: Vec<u8>) {
    if !(LEAST..=MOST).contains(&buffer.capacity()) {
        return;
    }
    buffer.clear();
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if pool.bytes + buffer.capacity() <= BUDGET {
        pool.bytes += buffer.capacity();
        pool.spare.push(buffer);
    }
}

/// A buffer that goes back when the last of those who share it drops it.
struct Shared(Vec<u8>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        give(std::mem::take(&mut self.0));
    }
}

/// Shares a buffer.
pub(crate) fn share(buffer: Vec<u8>) -> Bytes {
    Bytes::from_owner(Shared(buffer))
}
