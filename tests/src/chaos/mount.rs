//! A [`Disk`] as a file system that any process can use, by FUSE. Nothing is cached in the kernel: what a process reads is what
//! the disk would give after that moment's power cut, or more.

use std::{
    ffi::OsStr,
    fs::Metadata,
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};

use super::disk::Disk;

/// Nothing that was said holds for any time.
const TTL: Duration = Duration::ZERO;
/// The flag of files whose writes are durable: `O_DSYNC`, which `O_SYNC` contains.
const DSYNC: i32 = rustix::fs::OFlags::DSYNC.bits().cast_signed();
const BLOCK: u32 = 4_096;
/// What a disk pretends to have, and to have left, in blocks.
const BLOCKS: u64 = 4 << 20;

/// Mounts a disk; it is unmounted with the value.
///
/// # Errors
/// If this process may not mount.
pub fn mount(disk: Arc<Disk>, at: &Path) -> io::Result<BackgroundSession> {
    std::fs::create_dir_all(at)?;
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("pontoon-chaos".to_owned()), MountOption::NoAtime];
    fuser::spawn_mount(Mounted(disk), at, &config)
}

struct Mounted(Arc<Disk>);

fn kind(of: std::fs::FileType) -> FileType {
    FileType::from_std(of).unwrap_or(FileType::RegularFile)
}

fn attributes(number: u64, about: &Metadata) -> FileAttr {
    let time = |seconds: i64| UNIX_EPOCH + Duration::from_secs(seconds.max(0).cast_unsigned());
    FileAttr {
        ino: INodeNo(number),
        size: about.len(),
        blocks: about.blocks(),
        atime: time(about.atime()),
        mtime: time(about.mtime()),
        ctime: time(about.ctime()),
        crtime: UNIX_EPOCH,
        kind: kind(about.file_type()),
        perm: (about.mode() & 0o7777) as u16,
        nlink: about.nlink() as u32,
        uid: about.uid(),
        gid: about.gid(),
        rdev: 0,
        blksize: BLOCK,
        flags: 0,
    }
}

/// Answers with what was found, or with the error.
macro_rules! answer {
    ($reply:ident, $result:expr, $found:pat => $answer:expr) => {
        match $result {
            Ok($found) => $answer,
            Err(error) => $reply.error(Errno::from(error)),
        }
    };
}

impl Filesystem for Mounted {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.0.wait();
        answer!(reply, self.0.find(parent.0, name), (number, about) => {
            reply.entry(&TTL, &attributes(number, &about), Generation(0));
        });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.0.about(ino.0), about => reply.attr(&TTL, &attributes(ino.0, &about)));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        // Who may read a file is not what is tried here.
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.0.wait();
        let done = size.map_or(Ok(()), |size| self.0.set_len(ino.0, size)).and_then(|()| self.0.about(ino.0));
        answer!(reply, done, about => reply.attr(&TTL, &attributes(ino.0, &about)));
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        self.0.wait();
        answer!(reply, self.0.make_dir(parent.0, name), (number, about) => {
            reply.entry(&TTL, &attributes(number, &about), Generation(0));
        });
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.0.wait();
        answer!(reply, self.0.remove(parent.0, name), () => reply.ok());
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.0.wait();
        answer!(reply, self.0.remove(parent.0, name), () => reply.ok());
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.0.wait();
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        answer!(reply, self.0.rename((parent.0, name), (newparent.0, newname)), () => reply.ok());
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.0.wait();
        answer!(reply, self.0.open(ino.0), handle => {
            reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO);
        });
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        self.0.wait();
        answer!(reply, self.0.make_file(parent.0, name), (number, about, handle) => {
            let (handle, direct) = (FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO);
            reply.created(&TTL, &attributes(number, &about), Generation(0), handle, direct);
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.0.wait();
        answer!(reply, self.0.read(fh.0, offset, size as usize), data => reply.data(&data));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.0.wait();
        let durable = flags.0 & DSYNC != 0;
        answer!(reply, self.0.write(fh.0, offset, data, durable), () => reply.written(data.len() as u32));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.0.close(fh.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.wait();
        self.0.sync(ino.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.wait();
        answer!(reply, self.0.sync_dir(ino.0), () => reply.ok());
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.0.wait();
        match self.0.list(ino.0) {
            Ok(entries) => {
                for (at, (number, of, name)) in entries.into_iter().enumerate().skip(offset as usize) {
                    if reply.add(INodeNo(number), at as u64 + 1, kind(of), name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(error) => reply.error(Errno::from(error)),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let left = if self.0.is_full() { 0 } else { BLOCKS / 2 };
        reply.statfs(BLOCKS, left, left, 1 << 20, 1 << 19, BLOCK, 255, BLOCK);
    }
}
