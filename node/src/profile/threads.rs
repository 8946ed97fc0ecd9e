//! What the threads of a process do, as its system tells: no thread is stopped or interrupted for it.
//!
//! Times come from the system's own accounts at the beginning and at the end. In between, a look now and then says what each thread
//! is at; the time since the look before is put down to that.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use pontoon_proto::v1;

use super::calls;

/// So many threads are told of.
const THREADS_MOST: usize = 4_096;

/// A thread by its number, and when it started: numbers are used again.
type Key = (u32, u64);

/// The accounts of a thread since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Accounts {
    user_ticks: u64,
    system_ticks: u64,
    /// On a core, and waiting for one; where the kernel counts them.
    scheduled: Option<(Duration, Duration)>,
    switches: u64,
    preemptions: u64,
}

/// The line `stat` of a thread.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    state: char,
    user_ticks: u64,
    system_ticks: u64,
    started: u64,
}

#[derive(Debug, Default)]
struct Seen {
    name: String,
    before: Accounts,
    now: Accounts,
    /// By the letter of the state and the number of the system call.
    doing: BTreeMap<(char, Option<u32>), Duration>,
}

/// The threads under watch.
#[derive(Debug)]
pub(super) struct Watch {
    tasks: PathBuf,
    seen: BTreeMap<Key, Seen>,
    looked: Instant,
}

impl Watch {
    /// Begins to watch the threads in this directory of `/proc`.
    pub(super) fn begin(tasks: &Path) -> io::Result<Watch> {
        let mut watch = Watch { tasks: tasks.to_owned(), seen: BTreeMap::new(), looked: Instant::now() };
        for task in watch.tasks()? {
            if let Some((key, seen)) = watch.stat(task).map(|(key, stat)| (key, Seen::of(&stat))) {
                let before = accounts(&watch.tasks.join(task.to_string()), seen.now);
                watch.seen.insert(key, Seen { before, now: before, ..seen });
            }
        }
        Ok(watch)
    }

    /// Sees what each thread is at.
    pub(super) fn look(&mut self) {
        let since = self.looked.elapsed();
        self.looked += since;
        // Threads that cannot be listed now were listed before: the next look sees them.
        for task in self.tasks().unwrap_or_default() {
            let Some((key, stat)) = self.stat(task) else { continue };
            let call = match stat.state {
                'R' => None,
                _ => fs::read_to_string(self.tasks.join(format!("{task}/syscall"))).ok(),
            };
            // It may have gone on since its state was read.
            let runs = stat.state == 'R' || call.as_deref().is_some_and(|call| call.starts_with("running"));
            let call = call.and_then(|call| call.split_whitespace().next()?.parse().ok());
            let room = self.seen.len() < THREADS_MOST;
            let seen = match self.seen.get_mut(&key) {
                Some(seen) => seen,
                None if room => self.seen.entry(key).or_default(),
                None => continue,
            };
            // Threads of a pool are made under the name of another.
            seen.name = stat.name;
            (seen.now.user_ticks, seen.now.system_ticks) = (stat.user_ticks, stat.system_ticks);
            *seen.doing.entry((if runs { 'R' } else { stat.state }, call)).or_default() += since;
        }
    }

    /// Ends the watch: what each thread did, the busiest first.
    pub(super) fn end(mut self) -> Vec<v1::ThreadProfile> {
        self.look();
        for (&(task, _), seen) in &mut self.seen {
            seen.now = accounts(&self.tasks.join(task.to_string()), seen.now);
        }
        let tick =
            Duration::from_secs(1) / rustix::param::clock_ticks_per_second().clamp(1, 1_000_000) as u32;
        let told = self.seen.into_iter().map(|((task, _), seen)| seen.tell(task, tick));
        let mut told: Vec<_> = told.collect();
        told.sort_by_key(|thread| Reverse(thread.cpu_us));
        told
    }

    fn tasks(&self) -> io::Result<Vec<u32>> {
        let names = fs::read_dir(&self.tasks)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| name.parse().ok()).take(THREADS_MOST).collect())
    }

    /// `None` if the thread has ended.
    fn stat(&self, task: u32) -> Option<(Key, Stat)> {
        let text = fs::read(self.tasks.join(format!("{task}/stat"))).ok()?;
        let stat = stat(&String::from_utf8_lossy(&text))?;
        Some(((task, stat.started), stat))
    }
}

impl Seen {
    fn of(stat: &Stat) -> Seen {
        let now =
            Accounts { user_ticks: stat.user_ticks, system_ticks: stat.system_ticks, ..Accounts::default() };
        Seen { name: stat.name.clone(), now, ..Seen::default() }
    }

    fn tell(self, thread: u32, tick: Duration) -> v1::ThreadProfile {
        let (before, now) = (self.before, self.now);
        let ticks = |then: u64, now: u64| tick * u32::try_from(now.saturating_sub(then)).unwrap_or(u32::MAX);
        let system = ticks(before.system_ticks, now.system_ticks);
        // A thread that has ended is told of by its ticks alone.
        let exact = now.scheduled.map(|(ran, waited)| {
            let (ran_before, waited_before) = before.scheduled.unwrap_or_default();
            (ran.saturating_sub(ran_before), waited.saturating_sub(waited_before))
        });
        let cpu = exact.map_or(ticks(before.user_ticks, now.user_ticks) + system, |(ran, _)| ran);
        let mut states: Vec<_> = self
            .doing
            .into_iter()
            .map(|((state, call), time)| v1::ThreadState {
                state: state_word(state).to_owned(),
                call: call.map(calls::name).unwrap_or_default(),
                ms: time.as_millis() as u64,
            })
            .collect();
        states.sort_by_key(|state| Reverse(state.ms));
        v1::ThreadProfile {
            thread,
            name: self.name,
            cpu_us: cpu.as_micros() as u64,
            system_us: system.min(cpu).as_micros() as u64,
            delayed_us: exact.map(|(_, waited)| waited.as_micros() as u64),
            switches: now.switches.saturating_sub(before.switches),
            preemptions: now.preemptions.saturating_sub(before.preemptions),
            states,
        }
    }
}

/// The accounts of a thread; what cannot be read any more stays as it was.
fn accounts(task: &Path, last: Accounts) -> Accounts {
    let mut accounts = last;
    let scheduled = fs::read_to_string(task.join("schedstat")).ok();
    if let Some(scheduled) = scheduled.as_deref().and_then(schedstat) {
        accounts.scheduled = Some(scheduled);
    }
    if let Ok(status) = fs::read(task.join("status")) {
        let status = String::from_utf8_lossy(&status);
        let count = |name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)).and_then(|rest| rest.trim().parse().ok())
        };
        accounts.switches = count("voluntary_ctxt_switches:").unwrap_or(last.switches);
        accounts.preemptions = count("nonvoluntary_ctxt_switches:").unwrap_or(last.preemptions);
    }
    accounts
}

/// Time on a core and time waiting for one. A kernel that does not count says zero.
fn schedstat(text: &str) -> Option<(Duration, Duration)> {
    let mut words = text.split_whitespace().map_while(|word| word.parse().ok().map(Duration::from_nanos));
    let (ran, waited) = (words.next()?, words.next()?);
    (!ran.is_zero()).then_some((ran, waited))
}

fn stat(text: &str) -> Option<Stat> {
    // The name stands in parentheses and may hold anything.
    let (head, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // As `man proc` counts them, from 1; the first after the name is the third.
    let field = |nth: usize| fields.get(nth - 3)?.parse::<u64>().ok();
    Some(Stat {
        name: head.split_once('(')?.1.to_owned(),
        state: fields.first()?.chars().next()?,
        user_ticks: field(14)?,
        system_ticks: field(15)?,
        started: field(22)?,
    })
}

fn state_word(state: char) -> &'static str {
    match state {
        'R' => "runs",
        'S' => "sleeps",
        'D' => "waits for a device",
        'T' | 't' => "is stopped",
        'Z' | 'X' => "has ended",
        _ => "is idle",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_system_are_read() {
        let line = "77 (a (b) c) S 1 77 77 0 -1 4194368 9 0 0 0 123 45 0 0 20 0 33 0 9876 1024 7 18446744073709551615";
        let expected =
            Stat { name: "a (b) c".to_owned(), state: 'S', user_ticks: 123, system_ticks: 45, started: 9876 };
        assert_eq!(stat(line), Some(expected));
        assert_eq!(stat("77 (short) S 1 77"), None);
        assert_eq!(stat(""), None);
        let (ran, waited) = schedstat("1500 2500 7\n").unwrap();
        assert_eq!((ran.as_nanos(), waited.as_nanos()), (1_500, 2_500));
        assert_eq!(schedstat("0 0 0"), None);
        assert_eq!(schedstat("x"), None);
    }

    #[test]
    fn a_thread_that_ended_is_told_by_its_ticks() {
        let before = Accounts { user_ticks: 10, system_ticks: 5, ..Accounts::default() };
        let now = Accounts { user_ticks: 14, system_ticks: 6, ..before };
        let doing = BTreeMap::from([(('R', None), Duration::from_millis(50))]);
        let told = Seen { name: "t".to_owned(), before, now, doing }.tell(7, Duration::from_millis(10));
        assert_eq!((told.cpu_us, told.system_us, told.delayed_us), (50_000, 10_000, None));
        assert_eq!(told.states[0].state, "runs");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn own_threads_are_seen_at_what_they_do() {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let sleeper = std::thread::Builder::new().name("sleeper".to_owned()).spawn(move || stopped.recv());
        let sleeper = sleeper.unwrap();
        let mut watch = Watch::begin(Path::new("/proc/self/task")).unwrap();
        // Until the thread has come to wait, which some look sees.
        let waits = |watch: &Watch| {
            let seen = watch.seen.values().find(|seen| seen.name == "sleeper");
            seen.is_some_and(|seen| seen.doing.keys().any(|&(state, _)| state == 'S'))
        };
        while !waits(&watch) {
            watch.look();
            std::thread::yield_now();
        }
        let told = watch.end();
        drop(stop);
        drop(sleeper.join());
        let sleeper = told.iter().find(|thread| thread.name == "sleeper").unwrap();
        let waited = sleeper.states.iter().find(|state| state.state == "sleeps").unwrap();
        assert!(waited.call == "futex" || waited.call.is_empty(), "{waited:?}");
        assert!(Watch::begin(Path::new("/nowhere")).is_err());
    }
}
