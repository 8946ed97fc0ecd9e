//! The allocator of the program `pontoon`, and its profiler. Who embeds the crates chooses for himself.

use std::{fs, io, path::Path};

use pontoon_node::{HeapProfiler, HeapUsage};
use tikv_jemalloc_ctl::{Access, AsName, Error, epoch, profiling, stats};

/// Threads of a node free what others have allocated: decision 25.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Records who allocates, one allocation in half a megabyte on average: decision 31.
#[derive(Debug)]
pub(crate) struct Profiler {
    /// Where a dump is written to and read again; ends with a zero. The allocator keeps what it is told for ever.
    dump: &'static str,
}

impl Profiler {
    /// Of a node with this data directory. There is one in a process.
    pub(crate) fn new(dir: &Path) -> Profiler {
        let dump = dir.join("heap.profile").display().to_string();
        Profiler { dump: format!("{dump}\0").leak() }
    }

    fn path(&self) -> &Path {
        Path::new(self.dump.trim_end_matches('\0'))
    }
}

impl HeapProfiler for Profiler {
    fn start(&self) -> Result<(), String> {
        if !profiling::prof::read().unwrap_or(false) {
            return Err("the heap is not profiled in this process: it was built, or started with _RJEM_MALLOC_CONF, without prof:true; \
                        start the node with _RJEM_MALLOC_CONF=prof:true,prof_active:false,prof_accum:true"
                .to_owned());
        }
        forget()
            .and_then(|()| activate(true))
            .map_err(|error| format!("the allocator records nothing: {error}"))
    }

    fn dump(&self) -> Result<String, String> {
        let written: Result<(), Error> = "prof.dump\0".name().write(self.dump);
        written
            .map_err(|error| format!("the allocator does not write to {}: {error}", self.path().display()))?;
        let read = fs::read_to_string(self.path());
        let removed = fs::remove_file(self.path());
        let text = read.and_then(|text| removed.map(|()| text));
        text.map_err(|error: io::Error| format!("{}: {error}", self.path().display()))
    }

    fn stop(&self) {
        if profiling::prof::read().unwrap_or(false)
            && let Err(error) = activate(false).and_then(|()| forget())
        {
            tracing::error!(%error, "the allocator goes on recording who allocates; it costs little, and ends with the process");
        }
    }

    fn usage(&self) -> HeapUsage {
        // Figures stand still until they are asked to go on.
        let _ = epoch::advance();
        let figure = |read: Result<usize, Error>| read.unwrap_or(0) as u64;
        HeapUsage {
            allocated: figure(stats::allocated::read()),
            active: figure(stats::active::read()),
            resident: figure(stats::resident::read()),
            retained: figure(stats::retained::read()),
        }
    }
}

fn activate(active: bool) -> Result<(), Error> {
    "prof.active\0".name().write(active)
}

/// Forgets what was recorded; the rate of samples stays.
fn forget() -> Result<(), Error> {
    let rate: usize = "prof.lg_sample\0".name().read()?;
    "prof.reset\0".name().write(rate)
}
