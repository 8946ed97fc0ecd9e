//! The threads that step the log in production: one for the writer, one for the background.

use std::{
    sync::{Arc, PoisonError},
    thread::{Builder, JoinHandle},
};

use crate::{
    Error, Result,
    queue::Sleeping,
    shared::Shared,
    writer::{Step, Stepper},
};

/// The threads of one open log.
#[derive(Debug, Default)]
pub(crate) struct Threads {
    writer: Option<JoinHandle<()>>,
    background: Option<JoinHandle<()>>,
}

impl Threads {
    /// Starts both.
    pub(crate) fn start(shared: &Arc<Shared>) -> Result<Threads> {
        let spawn = |name: &str, body: fn(&Shared)| {
            let shared = shared.clone();
            let dir = shared.options.dir.clone();
            let thread = Builder::new().name(name.to_owned()).spawn(move || body(&shared));
            thread.map_err(|source| Error::io("start a thread for", dir, source))
        };
        let writer = Some(spawn("wal-writer", run_writer)?);
        let background = Some(spawn("wal-background", run_background)?);
        Ok(Threads { writer, background })
    }

    /// Lets the writer finish what is queued, then ends both. The queue is closed already.
    pub(crate) fn stop(&mut self, shared: &Shared) {
        shared.queue().stop = true;
        shared.wake_writer();
        join(self.writer.take());
        shared.background_signal().stop = true;
        shared.wake_background();
        join(self.background.take());
    }
}

fn join(thread: Option<JoinHandle<()>>) {
    // The last handle may be dropped by one of the threads themselves, from a sink.
    if let Some(thread) = thread.filter(|thread| thread.thread().id() != std::thread::current().id())
        && thread.join().is_err()
    {
        tracing::error!("a thread of the log panicked");
    }
}

fn run_writer(shared: &Shared) {
    loop {
        let seen = shared.queue().signal;
        let now = shared.options.clock.now();
        let step = shared.writer().step(shared, now, Stepper::Driver);
        let timeout = match step {
            Step::Progress => continue,
            Step::Io(ticket) => {
                ticket.ready();
                continue;
            }
            Step::Timer(at) => Some(at.saturating_sub(now)),
            Step::Blocked => None,
        };
        let mut queue = shared.queue();
        if queue.stop && (queue.poison.is_some() || !queue.wants_write() || is_stuck(shared)) {
            return;
        }
        if queue.signal != seen {
            continue;
        }
        // Woken for whatever reason, it looks again.
        match timeout {
            Some(timeout) => {
                queue.sleeping = Sleeping::Timed;
                queue = shared.work.wait_timeout(queue, timeout).unwrap_or_else(PoisonError::into_inner).0;
            }
            None => {
                queue.sleeping = Sleeping::Untold;
                queue = shared.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
        queue.sleeping = Sleeping::No;
    }
}

/// Whether the writer waits for a segment that the disk does not allow.
fn is_stuck(shared: &Shared) -> bool {
    let table = shared.table();
    table.disk_full || table.usable() == 0 && table.free.is_empty() && !shared.may_grow(&table)
}

fn run_background(shared: &Shared) {
    loop {
        let seen = shared.background_signal().count;
        let now = shared.options.clock.now();
        let step = shared.background().step(shared, now);
        let timeout = match step {
            Step::Progress => continue,
            Step::Io(ticket) => {
                ticket.ready();
                continue;
            }
            Step::Timer(at) => Some(at.saturating_sub(now)),
            Step::Blocked => None,
        };
        let signal = shared.background_signal();
        shared.background_done.notify_all();
        if signal.stop {
            return;
        }
        if signal.count != seen {
            continue;
        }
        match timeout {
            Some(timeout) => {
                drop(
                    shared
                        .background_work
                        .wait_timeout(signal, timeout)
                        .unwrap_or_else(PoisonError::into_inner),
                );
            }
            None => drop(shared.background_work.wait(signal).unwrap_or_else(PoisonError::into_inner)),
        }
    }
}
