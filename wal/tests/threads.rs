//! The log on its own threads and a real disk: committers, a submitter, readers and collection at once.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use pontoon_wal::{Batch, Clock, Entry, Error, GroupId, HardState, Options, PersistSink, Persisted, Wal};

fn entry(group: u64, index: u64) -> Entry {
    Entry { index, term: 1, kind: 1, data: format!("{group}/{index}").repeat(20).into() }
}

fn small(dir: &std::path::Path) -> Options {
    Options { segment_bytes: 1 << 20, cache_bytes: 1 << 20, ..Options::new(dir.join("log")) }
}

#[derive(Default)]
struct Count(Mutex<Vec<Persisted>>, Condvar);

impl PersistSink for Count {
    fn persisted(&self, done: &[Persisted]) {
        self.0.lock().unwrap().extend(done);
        self.1.notify_all();
    }

    fn failed(&self, error: &Error) {
        panic!("{error}");
    }
}

impl Count {
    fn wait_for(&self, count: usize) {
        let mut done = self.0.lock().unwrap();
        while done.len() < count {
            done = self.1.wait(done).unwrap();
        }
    }
}

#[test]
fn committers_submitters_readers_and_collection_go_together() {
    const COMMITTERS: u64 = 6;
    const ROUNDS: u64 = 300;
    let dir = tempfile::tempdir().unwrap();
    let (wal, _) = Wal::open(small(dir.path())).unwrap();
    std::thread::scope(|scope| {
        for group in 1..=COMMITTERS {
            let wal = wal.clone();
            scope.spawn(move || {
                for index in 1..=ROUNDS {
                    let mut batch = Batch::new();
                    batch.append(GroupId(group), &[entry(group, index)]);
                    batch.hard_state(GroupId(group), HardState { term: 1, vote: group, commit: index });
                    if index % 50 == 0 {
                        batch.truncate_prefix(GroupId(group), index - 10, 1);
                    }
                    wal.commit(batch).unwrap();
                    let mut read = Vec::new();
                    wal.entries(GroupId(group), index..index + 1, 0, &mut read).unwrap();
                    assert_eq!(read, [entry(group, index)]);
                }
            });
        }
        let (wal, count) = (wal.clone(), Arc::new(Count::default()));
        scope.spawn(move || {
            let door = wal.submitter(count.clone());
            for token in 0..ROUNDS * 10 {
                let (group, index) = (100 + token % 10, token / 10 + 1);
                let mut batch = Batch::new();
                batch.append(GroupId(group), &[entry(group, index)]);
                let room = door.try_reserve(GroupId(group), batch.size_bytes()).unwrap();
                door.submit(batch, room, token).unwrap();
                if token % 500 == 0 {
                    wal.gc_once().unwrap();
                }
            }
            count.wait_for(ROUNDS as usize * 10);
            let done = count.0.lock().unwrap();
            assert!(
                done.iter().map(|done| done.token).eq(0..ROUNDS * 10),
                "acknowledged in order, each once"
            );
            assert!(done.is_sorted_by_key(|done| done.lsn));
        });
    });
    assert_eq!(wal.usage().pending_bytes, 0);
    wal.close().unwrap();
    let (wal, report) = Wal::open(small(dir.path())).unwrap();
    assert!(report.damaged.is_empty() && report.torn.is_none(), "{report:?}");
    let expected: BTreeMap<u64, u64> =
        (1..=COMMITTERS).map(|group| (group, ROUNDS - 9)).chain((100..110).map(|group| (group, 1))).collect();
    assert_eq!(wal.groups(), expected.keys().map(|group| GroupId(*group)).collect::<Vec<_>>());
    for (group, first) in expected {
        let view = wal.group(GroupId(group)).unwrap();
        assert_eq!((view.first_index, view.last_index), (first, ROUNDS));
        let mut read = Vec::new();
        wal.entries(GroupId(group), first..ROUNDS + 1, u64::MAX, &mut read).unwrap();
        assert!(read.into_iter().eq((first..=ROUNDS).map(|index| entry(group, index))));
    }
}

#[test]
fn a_relaxed_commit_returns_when_the_log_is_idle() {
    let dir = tempfile::tempdir().unwrap();
    let (wal, _) = Wal::open(small(dir.path())).unwrap();
    for index in 1..=3 {
        let mut batch = Batch::new();
        batch.append(GroupId(1), &[entry(1, index)]).relaxed();
        wal.commit(batch).unwrap();
    }
    assert_eq!(wal.usage().pending_bytes, 0);
}

#[test]
fn a_dropped_log_has_written_what_was_submitted() {
    let dir = tempfile::tempdir().unwrap();
    let (wal, _) = Wal::open(small(dir.path())).unwrap();
    let count = Arc::new(Count::default());
    let door = wal.submitter(count.clone());
    let mut batch = Batch::new();
    batch.append(GroupId(1), &[entry(1, 1)]).relaxed();
    let room = door.try_reserve(GroupId(1), batch.size_bytes()).unwrap();
    door.submit(batch, room, 1).unwrap();
    drop(wal);
    assert_eq!(count.0.lock().unwrap().len(), 1);
    let mut batch = Batch::new();
    batch.append(GroupId(1), &[entry(1, 2)]);
    assert!(matches!(door.try_reserve(GroupId(1), 1), Err(Error::Closed)));
    let (wal, _) = Wal::open(small(dir.path())).unwrap();
    assert_eq!(wal.group(GroupId(1)).unwrap().last_index, 1);
}

/// A clock that stands still, and can hold up the writer's thread when it looks at it.
#[derive(Default)]
struct Gate {
    state: Mutex<Look>,
    changed: Condvar,
}

#[derive(Default)]
struct Look {
    /// How many more looks pass before one is held; `None`: all pass.
    hold_after: Option<usize>,
    held: bool,
}

impl Clock for Gate {
    fn now(&self) -> Duration {
        if std::thread::current().name().is_some_and(|name| name.starts_with("wal-writer")) {
            let mut state = self.state.lock().unwrap();
            match state.hold_after {
                Some(0) => state.held = true,
                Some(more) => state.hold_after = Some(more - 1),
                None => {}
            }
            self.changed.notify_all();
            while state.held {
                state = self.changed.wait(state).unwrap();
            }
        }
        Duration::ZERO
    }
}

#[test]
fn a_close_while_the_writer_looks_at_the_clock_still_proves_the_last_frame() {
    // It looks twice a round: whoever is held at the second look has not seen the close.
    for looks in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let gate = Arc::new(Gate::default());
        let mut options = small(dir.path());
        options.clock = gate.clone();
        options.idle_watermark = Duration::from_millis(1);
        options.write_depth = 1;
        let (wal, _) = Wal::open(options).unwrap();
        let door = wal.submitter(Arc::new(Count::default()));
        let mut batch = Batch::new();
        batch.append(GroupId(1), &[entry(1, 1)]);
        wal.commit(batch).unwrap();

        let mut state = gate.state.lock().unwrap();
        state.hold_after = Some(looks);
        while !state.held {
            state = gate.changed.wait(state).unwrap();
        }
        drop(state);
        let closing = std::thread::spawn(move || wal.close());
        while !matches!(door.try_reserve(GroupId(1), 1), Err(Error::Closed)) {
            std::thread::yield_now();
        }
        // From here on it asks the threads to stop.
        (0..1000).for_each(|_| std::thread::yield_now());
        *gate.state.lock().unwrap() = Look::default();
        gate.changed.notify_all();
        closing.join().unwrap().unwrap();
    }
}

#[test]
fn readers_that_nobody_waits_for_share_a_few_threads() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { cache_bytes: 0, read_threads: 3, ..small(dir.path()) };
    let (wal, _) = Wal::open(options).unwrap();
    for index in 1..=50 {
        let mut batch = Batch::new();
        for group in 1..=8 {
            batch.append(GroupId(group), &[entry(group, index)]);
        }
        wal.commit(batch).unwrap();
    }
    let done = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
    for nth in 0..200 {
        let (done, group) = (done.clone(), 1 + nth % 8);
        let tell = move |read: pontoon_wal::Result<Vec<Entry>>| {
            let thread = std::thread::current().name().unwrap_or_default().to_owned();
            done.0.lock().unwrap().push((thread, group, read.unwrap()));
            done.1.notify_all();
        };
        wal.entries_async(GroupId(group), 1..51, u64::MAX, tell).unwrap();
    }
    let mut told = done.0.lock().unwrap();
    while told.len() < 200 {
        told = done.1.wait(told).unwrap();
    }
    let threads: std::collections::BTreeSet<_> = told.iter().map(|(thread, ..)| thread.clone()).collect();
    assert!((1..=3).contains(&threads.len()) && threads.iter().all(|name| name.starts_with("wal-reader-")));
    for (_, group, read) in told.iter() {
        let wanted: Vec<_> = (1..=50).map(|index| entry(*group, index)).collect();
        assert_eq!(*read, wanted);
    }
    drop(told);
    // One that holds the log itself, and comes last.
    let (last, held) = (done.clone(), wal.clone());
    let tell = move |read: pontoon_wal::Result<Vec<Entry>>| {
        last.0.lock().unwrap().push((String::new(), held.groups().len() as u64, read.unwrap()));
    };
    wal.entries_async(GroupId(1), 1..2, 0, tell).unwrap();
    wal.close().unwrap();
    assert_eq!(done.0.lock().unwrap().len(), 201);
}
