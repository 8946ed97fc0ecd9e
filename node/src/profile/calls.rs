//! The names of the system calls that threads wait in.

/// A call by its name, or its number if it is none of those that a node waits in.
pub(super) fn name(call: u32) -> String {
    let known = CALLS.iter().chain(OLDER).find(|(number, _)| *number == call);
    known.map_or_else(|| format!("call {call}"), |(_, name)| (*name).to_owned())
}

#[cfg(target_os = "linux")]
use linux_raw_sys::general as linux;

#[cfg(target_os = "linux")]
const CALLS: &[(u32, &str)] = &[
    (linux::__NR_futex, "futex"),
    (linux::__NR_epoll_pwait, "epoll_wait"),
    (linux::__NR_ppoll, "poll"),
    (linux::__NR_clock_nanosleep, "sleep"),
    (linux::__NR_nanosleep, "sleep"),
    (linux::__NR_fsync, "fsync"),
    (linux::__NR_fdatasync, "fdatasync"),
    (linux::__NR_sync_file_range, "sync_file_range"),
    (linux::__NR_fallocate, "fallocate"),
    (linux::__NR_ftruncate, "ftruncate"),
    (linux::__NR_read, "read"),
    (linux::__NR_pread64, "pread"),
    (linux::__NR_readv, "readv"),
    (linux::__NR_preadv, "preadv"),
    (linux::__NR_preadv2, "preadv"),
    (linux::__NR_write, "write"),
    (linux::__NR_pwrite64, "pwrite"),
    (linux::__NR_writev, "writev"),
    (linux::__NR_pwritev, "pwritev"),
    (linux::__NR_pwritev2, "pwritev"),
    (linux::__NR_openat, "open"),
    (linux::__NR_close, "close"),
    (linux::__NR_renameat, "rename"),
    (linux::__NR_renameat2, "rename"),
    (linux::__NR_unlinkat, "unlink"),
    (linux::__NR_getdents64, "getdents"),
    (linux::__NR_statx, "stat"),
    (linux::__NR_madvise, "madvise"),
    (linux::__NR_mmap, "mmap"),
    (linux::__NR_munmap, "munmap"),
    (linux::__NR_sched_yield, "yield"),
    (linux::__NR_accept4, "accept"),
    (linux::__NR_connect, "connect"),
    (linux::__NR_recvfrom, "recv"),
    (linux::__NR_recvmsg, "recv"),
    (linux::__NR_sendto, "send"),
    (linux::__NR_sendmsg, "send"),
];

#[cfg(not(target_os = "linux"))]
const CALLS: &[(u32, &str)] = &[];

/// Calls that younger processors never had.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
const OLDER: &[(u32, &str)] = &[
    (linux::__NR_epoll_wait, "epoll_wait"),
    (linux::__NR_poll, "poll"),
    (linux::__NR_open, "open"),
    (linux::__NR_rename, "rename"),
    (linux::__NR_unlink, "unlink"),
];

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
const OLDER: &[(u32, &str)] = &[];

#[cfg(test)]
mod tests {
    #[cfg(target_os = "linux")]
    #[test]
    fn calls_have_names_or_numbers() {
        assert_eq!(super::name(linux_raw_sys::general::__NR_fdatasync), "fdatasync");
        assert_eq!(super::name(99_999), "call 99999");
    }
}
