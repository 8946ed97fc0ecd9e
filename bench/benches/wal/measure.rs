//! What a round cost: time, processor, memory, sectors.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::work::Outcome;

/// The result of one round, or the medians of several.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) entries_per_s: f64,
    pub(crate) mb_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) cpu_s_per_million: f64,
    pub(crate) rss_mb: f64,
    /// Bytes that the device wrote per byte of payload.
    pub(crate) device_write_amp: f64,
    /// How long the scene's one operation took, where it has one.
    pub(crate) seconds: f64,
    /// What the log's open added to the process, where that is the question.
    pub(crate) index_mb: f64,
    /// What the log takes on disk after the round, where that is the question.
    pub(crate) disk_mb: f64,
}

impl Figures {
    /// The median of each figure, and lowest and highest of the entries per second.
    pub(crate) fn median(rounds: &[Figures]) -> (Figures, f64, f64) {
        let pick = |field: fn(&Figures) -> f64| {
            let mut values: Vec<f64> = rounds.iter().map(field).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let middle = |field| pick(field)[rounds.len() / 2];
        let speeds = pick(|f| f.entries_per_s);
        let figures = Figures {
            entries_per_s: middle(|f| f.entries_per_s),
            mb_per_s: middle(|f| f.mb_per_s),
            p50_us: middle(|f| f.p50_us),
            p99_us: middle(|f| f.p99_us),
            p999_us: middle(|f| f.p999_us),
            cpu_s_per_million: middle(|f| f.cpu_s_per_million),
            rss_mb: middle(|f| f.rss_mb),
            device_write_amp: middle(|f| f.device_write_amp),
            seconds: middle(|f| f.seconds),
            index_mb: middle(|f| f.index_mb),
            disk_mb: middle(|f| f.disk_mb),
        };
        (figures, speeds[0], speeds[speeds.len() - 1])
    }
}

/// The size of all files below a directory.
pub(crate) fn disk_mb(dir: &Path) -> Outcome<f64> {
    let mut bytes = 0.0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += if meta.is_dir() { disk_mb(&entry.path())? } else { meta.len() as f64 / 1e6 };
    }
    Ok(bytes)
}

/// Counters at the start of a round.
pub(crate) struct Meter {
    start: Instant,
    cpu: Duration,
    sectors: Option<u64>,
    stat: Option<PathBuf>,
}

impl Meter {
    pub(crate) fn start(dir: &Path) -> Meter {
        let stat = device_stat(dir);
        Meter { cpu: cpu(), sectors: stat.as_deref().and_then(sectors), stat, start: Instant::now() }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// The round's figures.
    pub(crate) fn stop(self, entries: u64, value_bytes: usize, times: &Histogram<u64>) -> Outcome<Figures> {
        let seconds = self.start.elapsed().as_secs_f64();
        let cpu = cpu() - self.cpu;
        let bytes = entries as f64 * value_bytes as f64;
        let written = self.stat.as_deref().and_then(sectors).zip(self.sectors);
        let quantile = |q| times.value_at_quantile(q) as f64 / 1e3;
        Ok(Figures {
            entries_per_s: entries as f64 / seconds,
            mb_per_s: bytes / seconds / 1e6,
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
            cpu_s_per_million: cpu.as_secs_f64() / entries as f64 * 1e6,
            rss_mb: rss_mb()?,
            device_write_amp: written.map_or(0.0, |(after, before)| (after - before) as f64 * 512.0 / bytes),
            seconds,
            index_mb: 0.0,
            disk_mb: 0.0,
        })
    }
}

/// Nanoseconds up to ten seconds, three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 10_000_000_000, 3).expect("the bounds are sound")
}

fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Memory of this process that is in use.
pub(crate) fn rss_mb() -> Outcome<f64> {
    let statm = fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = statm.split(' ').nth(1).ok_or("no resident pages")?.parse()?;
    Ok(pages * 4096.0 / 1e6)
}

/// Where the system counts what the device of a directory writes.
fn device_stat(dir: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let device = fs::metadata(dir).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    Some(PathBuf::from(format!("/sys/dev/block/{major}:{minor}/stat")))
}

fn sectors(stat: &Path) -> Option<u64> {
    fs::read_to_string(stat).ok()?.split_whitespace().nth(6)?.parse().ok()
}

/// Drops the pages of all files below a directory from the system's cache.
pub(crate) fn chill(dir: &Path) -> Outcome<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            chill(&path)?;
        } else {
            let file = fs::File::open(&path)?;
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}
