//! Writes around the system's cache. Each is durable when it returns, by itself: no other dirty page is waited for, and
//! several can be under way on one file.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// What every file system with direct I/O is content with, and what the log's frames are multiples of.
const ALIGNMENT: usize = 4096;
/// Zeros are written in pieces of this size: a larger one would hold up the log's own writes.
const PIECE: usize = 256 << 10;

pub(super) struct Direct(File);

/// A buffer with room for `len` bytes from a multiple of the alignment, and where that is.
fn aligned(len: usize) -> (Vec<u8>, usize) {
    let buffer = vec![0; len + ALIGNMENT];
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    (buffer, start)
}

impl Direct {
    /// Whether a write of these bytes may go this way.
    pub(super) fn takes(&self, data: &[u8], offset: u64) -> bool {
        offset.is_multiple_of(ALIGNMENT as u64)
            && data.len().is_multiple_of(ALIGNMENT)
            && data.as_ptr().align_offset(ALIGNMENT) == 0
    }
}

#[cfg(target_os = "linux")]
impl Direct {
    /// `None` if the file system has no direct I/O, or wants more alignment than the log's frames have.
    pub(super) fn open(path: &Path) -> Option<Direct> {
        use rustix::fs::{AtFlags, CWD, OFlags, StatxFlags, statx};
        use std::os::unix::fs::OpenOptionsExt;

        let flags = OFlags::DIRECT.bits() as i32;
        let file = File::options().read(true).write(true).custom_flags(flags).open(path).ok()?;
        let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::DIOALIGN).ok();
        let stated = stat.filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        let usable = match stated {
            Some(stat) => [stat.stx_dio_mem_align, stat.stx_dio_offset_align]
                .into_iter()
                .all(|align| align > 0 && align as usize <= ALIGNMENT),
            // An older system does not tell: a read of one block does.
            None => {
                let (mut block, start) = aligned(ALIGNMENT);
                file.read_at(&mut block[start..start + ALIGNMENT], 0).is_ok()
            }
        };
        usable.then_some(Direct(file))
    }

    pub(super) fn write_durable(&self, mut data: &[u8], mut offset: u64) -> io::Result<()> {
        use rustix::io::{Errno, ReadWriteFlags, pwritev2};

        while !data.is_empty() {
            match pwritev2(&self.0, &[io::IoSlice::new(data)], offset, ReadWriteFlags::DSYNC) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                // A write that stops short stops at a block.
                Ok(n) => (data, offset) = (&data[n..], offset + n as u64),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
impl Direct {
    pub(super) fn open(_path: &Path) -> Option<Direct> {
        None
    }

    pub(super) fn write_durable(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Writes zeros, not durably; around the cache where that works, so that they push nothing else out of it.
pub(super) fn zero(file: &File, direct: Option<&Direct>, offset: u64, len: u64) -> io::Result<()> {
    static ZEROS: [u8; PIECE + ALIGNMENT] = [0; PIECE + ALIGNMENT];
    let start = ZEROS.as_ptr().align_offset(ALIGNMENT);
    let zeros = &ZEROS[start..start + PIECE];
    let end = offset + len;
    for at in (offset..end).step_by(zeros.len()) {
        let piece = &zeros[..zeros.len().min((end - at) as usize)];
        match direct.filter(|direct| direct.takes(piece, at)) {
            Some(Direct(direct)) => direct.write_all_at(piece, at)?,
            None => file.write_all_at(piece, at)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_around_the_cache_is_read_through_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        file.set_len(8 << 12).unwrap();
        let direct = Direct::open(&path);
        zero(&file, direct.as_ref(), 0, 8 << 12).unwrap();
        let mut seen = vec![1; 3 << 12];
        file.read_at(&mut seen, 0).unwrap();
        assert!(seen.iter().all(|byte| *byte == 0));
        let Some(direct) = direct else { return };
        let (mut data, start) = aligned(2 << 12);
        data.fill(7);
        let data = &data[start..start + (2 << 12)];
        assert!(direct.takes(data, 4096) && !direct.takes(data, 4097) && !direct.takes(&data[1..], 4096));
        direct.write_durable(data, 4096).unwrap();
        file.read_at(&mut seen, 0).unwrap();
        assert!(seen[..4096].iter().all(|byte| *byte == 0) && seen[4096..] == *data);
    }
}
