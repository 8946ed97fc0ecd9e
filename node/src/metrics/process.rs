//! What the system knows of this process, under the names that every exporter gives it. Only where there is a `/proc`.

use std::fs;

use super::{
    page::Page,
    table::{
        PROCESS_CPU_SECONDS, PROCESS_MAX_FDS, PROCESS_OPEN_FDS, PROCESS_RESIDENT_BYTES,
        PROCESS_START_SECONDS, PROCESS_THREADS, PROCESS_VIRTUAL_BYTES,
    },
};

pub(super) fn process(page: &mut Page) {
    let Some(stat) = fs::read_to_string("/proc/self/stat").ok() else { return };
    // The name of the program stands in parentheses and may hold anything.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
    // As `man proc` counts them, from 1; the first after the name is the third.
    let field = |nth: usize| fields.get(nth - 3).and_then(|text| text.parse::<u64>().ok());
    let ticks = rustix::param::clock_ticks_per_second().max(1) as f64;
    if let (Some(user), Some(system)) = (field(14), field(15)) {
        page.put(&PROCESS_CPU_SECONDS, (user + system) as f64 / ticks);
    }
    if let Some(threads) = field(20) {
        page.put(&PROCESS_THREADS, threads);
    }
    if let (Some(started), Some(booted)) = (field(22), booted()) {
        page.put(&PROCESS_START_SECONDS, booted + started as f64 / ticks);
    }
    if let Some(bytes) = field(23) {
        page.put(&PROCESS_VIRTUAL_BYTES, bytes);
    }
    if let Some(pages) = field(24) {
        page.put(&PROCESS_RESIDENT_BYTES, pages * rustix::param::page_size() as u64);
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        page.put(&PROCESS_OPEN_FDS, open.count());
    }
    if let Some(most) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        page.put(&PROCESS_MAX_FDS, most);
    }
}

/// When the machine started, in seconds since 1970.
fn booted() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}
