//! Reads that nobody waits for: they queue for a few threads, which start with the first of them.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{Builder, JoinHandle},
};

use pontoon_proto::GroupId;

use crate::{
    DriverMode, Entry, Error, Result,
    driver::join,
    metrics::add,
    read::{self, Wait},
    shared::Shared,
};

/// Hears what was read.
pub(crate) type Done = Box<dyn FnOnce(Result<Vec<Entry>>) + Send>;

/// A read of a group's entries.
pub(crate) struct Fetch {
    pub(crate) group: GroupId,
    pub(crate) range: Range<u64>,
    pub(crate) max_bytes: u64,
    pub(crate) done: Done,
}

impl Fetch {
    fn run(self, shared: &Shared) {
        add(&shared.counters.fetches, 1);
        let mut entries = Vec::new();
        let read = read::entries(shared, self.group, self.range, self.max_bytes, Wait::Disk, &mut entries);
        (self.done)(read.map(|_| entries));
    }
}

/// The reads that wait, and who carries them out.
#[derive(Default)]
pub(crate) struct Fetches {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Fetch>,
    threads: Vec<JoinHandle<()>>,
    idle: usize,
    stop: bool,
}

impl Fetches {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a read; starts a thread if all are busy and there may be another.
    pub(crate) fn submit(shared: &Arc<Shared>, fetch: Fetch) -> Result<()> {
        let fetches = &shared.fetches;
        let mut state = fetches.state();
        if state.stop {
            return Err(Error::Closed);
        }
        let busy = state.idle <= state.waiting.len();
        let by_threads = shared.options.driver == DriverMode::Threads;
        if by_threads && busy && state.threads.len() < shared.options.read_threads {
            let name = format!("wal-reader-{}", state.threads.len());
            let body = shared.clone();
            let thread = Builder::new().name(name).spawn(move || run(&body));
            let dir = &shared.options.dir;
            state.threads.push(thread.map_err(|source| Error::io("start a thread for", dir, source))?);
        }
        state.waiting.push_back(fetch);
        drop(state);
        fetches.work.notify_one();
        Ok(())
    }

    /// For a log that is stepped by hand: carries out one read; whether there was one.
    pub(crate) fn step(shared: &Shared) -> bool {
        let next = shared.fetches.state().waiting.pop_front();
        next.map(|fetch| fetch.run(shared)).is_some()
    }

    /// Takes no more reads, carries out those that wait, and ends the threads.
    pub(crate) fn stop(shared: &Shared) {
        let threads = {
            let mut state = shared.fetches.state();
            state.stop = true;
            std::mem::take(&mut state.threads)
        };
        shared.fetches.work.notify_all();
        threads.into_iter().for_each(join);
    }
}

fn run(shared: &Shared) {
    let fetches = &shared.fetches;
    loop {
        let mut state = fetches.state();
        let fetch = loop {
            match state.waiting.pop_front() {
                Some(fetch) => break fetch,
                None if state.stop => return,
                None => {
                    state.idle += 1;
                    state = fetches.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                    state.idle -= 1;
                }
            }
        };
        drop(state);
        fetch.run(shared);
    }
}
