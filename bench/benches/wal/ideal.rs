//! The device's own limit: a group commit without index, records or recovery. One file that was written before, one buffer;
//! submitters add their bytes, and whoever finds nobody writing writes what is there.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{Condvar, Mutex, PoisonError},
};

use rustix::fs::OFlags;

use crate::{
    engine::Engine,
    work::{Item, Outcome},
};

const BLOCK: usize = 4096;
/// The most that one write takes.
const MAX_WRITE: usize = 64 << 20;
const SPAN: u64 = 256 << 20;

#[derive(Default)]
struct State {
    /// What waits for the next write; the bytes begin at `start`, which is aligned.
    pending: Vec<u8>,
    start: usize,
    /// The number of the write that will take it.
    next: u64,
    done: u64,
    writing: bool,
    offset: u64,
    spare: Vec<u8>,
}

pub(crate) struct Ideal {
    file: File,
    direct: bool,
    sync: bool,
    state: Mutex<State>,
    more: Condvar,
}

/// An empty buffer whose bytes will begin on a block.
fn aligned(mut buffer: Vec<u8>) -> (Vec<u8>, usize) {
    buffer.clear();
    buffer.reserve(MAX_WRITE + BLOCK);
    let start = buffer.as_ptr().align_offset(BLOCK);
    buffer.resize(start, 0);
    (buffer, start)
}

impl Ideal {
    pub(crate) fn open(dir: &Path, direct: bool, sync: bool) -> Outcome<Ideal> {
        let path = dir.join("ideal");
        let file = File::options().create(true).truncate(false).write(true).open(&path)?;
        if file.metadata()?.len() < SPAN {
            let zeros = vec![0; 1 << 20];
            for offset in (0..SPAN).step_by(zeros.len()) {
                file.write_all_at(&zeros, offset)?;
            }
        }
        file.sync_all()?;
        let mut flags = OFlags::empty();
        if direct {
            flags |= OFlags::DIRECT;
            flags.set(OFlags::DSYNC, sync);
        }
        let file = OpenOptions::new().write(true).custom_flags(flags.bits() as i32).open(&path)?;
        let (pending, start) = aligned(Vec::new());
        let (spare, _) = aligned(Vec::new());
        let state = State { pending, start, next: 1, spare, ..State::default() };
        Ok(Ideal { file, direct, sync, state: Mutex::new(state), more: Condvar::new() })
    }
}

impl Engine for Ideal {
    fn write(&self, items: &[Item]) -> Outcome<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (group, index, value) in items {
            state.pending.extend_from_slice(&group.to_le_bytes());
            state.pending.extend_from_slice(&index.to_le_bytes());
            state.pending.extend_from_slice(value);
        }
        let mine = state.next;
        loop {
            if state.done >= mine {
                return Ok(());
            }
            if state.writing {
                state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.writing = true;
            let (empty, empty_start) = aligned(std::mem::take(&mut state.spare));
            let mut bytes = std::mem::replace(&mut state.pending, empty);
            let start = std::mem::replace(&mut state.start, empty_start);
            let number = state.next;
            state.next += 1;
            let len = (bytes.len() - start).next_multiple_of(BLOCK);
            if state.offset + len as u64 > SPAN {
                state.offset = 0;
            }
            let offset = state.offset;
            state.offset += len as u64;
            drop(state);
            bytes.resize(start + len, 0);
            self.file.write_all_at(&bytes[start..], offset)?;
            if self.sync && !self.direct {
                self.file.sync_data()?;
            }
            state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.spare = bytes;
            state.done = number;
            state.writing = false;
            self.more.notify_all();
        }
    }
}
