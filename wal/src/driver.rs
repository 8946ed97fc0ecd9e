//! The threads that step the log in production: as many for the writer as frames may be under way, one for the background.

use std::{
    sync::{Arc, PoisonError},
    thread::{Builder, JoinHandle},
};

use crate::{
    Error, Result,
    queue::{Ack, Waiter, Wake},
    shared::Shared,
    writer::{self, Step, Stepper},
};

/// The threads of one open log.
#[derive(Debug, Default)]
pub(crate) struct Threads {
    writers: Vec<JoinHandle<()>>,
    background: Option<JoinHandle<()>>,
}

impl Threads {
    /// Starts all.
    pub(crate) fn start(shared: &Arc<Shared>) -> Result<Threads> {
        let spawn = |name: String, body: fn(&Shared)| {
            let shared = shared.clone();
            let dir = shared.options.dir.clone();
            let thread = Builder::new().name(name).spawn(move || body(&shared));
            thread.map_err(|source| Error::io("start a thread for", dir, source))
        };
        let writers = (0..shared.options.depth()).map(|nth| spawn(format!("wal-writer-{nth}"), run_writer));
        let writers = writers.collect::<Result<_>>()?;
        let background = Some(spawn("wal-background".to_owned(), run_background)?);
        Ok(Threads { writers, background })
    }

    /// Lets the writer finish what is queued, then ends all. The queue is closed already.
    pub(crate) fn stop(&mut self, shared: &Shared) {
        {
            let mut queue = shared.queue();
            queue.stop = true;
            queue.signal += 1;
            shared.work.notify_all();
        }
        self.writers.drain(..).for_each(join);
        shared.background_signal().stop = true;
        shared.wake_background();
        self.background.take().into_iter().for_each(join);
    }
}

/// Waits for a thread's end.
pub(crate) fn join(thread: JoinHandle<()>) {
    // The last handle may be dropped by one of the threads themselves, from a sink.
    if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
        tracing::error!("a thread of the log panicked");
    }
}

/// One step of the writer; wakes whose batches became durable by it.
pub(crate) fn step(shared: &Shared, stepper: Stepper) -> Step {
    let now = shared.options.clock.now();
    let mut writer = shared.writer();
    let step = writer.step(shared, now, stepper);
    let woken = writer.take_woken();
    drop(writer);
    writer::wake(woken);
    step
}

fn run_writer(shared: &Shared) {
    loop {
        let seen = shared.queue().signal;
        let timeout = match step(shared, Stepper::Driver) {
            Step::Progress => continue,
            Step::Write(job) => {
                job.begin().ready();
                continue;
            }
            Step::Io(ticket) => {
                ticket.ready();
                continue;
            }
            Step::Tell(news) => {
                news.tell(shared);
                shared.writer().told();
                continue;
            }
            Step::Timer(at) => Some(at.saturating_sub(shared.options.clock.now())),
            Step::Blocked => None,
        };
        let mut queue = shared.queue();
        // First of all: a step that came before the close has not seen that a watermark is wanted at once.
        if queue.signal != seen {
            continue;
        }
        // Whoever has a frame under way comes back and sees to the rest.
        let idle = queue.flying_frames == 0 && (!queue.has_work() || is_stuck(shared));
        if queue.stop && (queue.poison.is_some() || idle) {
            shared.work.notify_all();
            return;
        }
        queue.sleeping += 1;
        // Woken for whatever reason, it looks again. One thread that looks at the clock is enough.
        match timeout.filter(|_| !queue.watched) {
            Some(timeout) => {
                queue.watched = true;
                queue = shared.work.wait_timeout(queue, timeout).unwrap_or_else(PoisonError::into_inner).0;
                queue.watched = false;
            }
            None => queue = shared.work.wait(queue).unwrap_or_else(PoisonError::into_inner),
        }
        queue.sleeping -= 1;
    }
}

/// Waits for a batch. A thread that `leads` writes first what waits; it may be asked to while it waits.
pub(crate) fn commit(shared: &Shared, waiter: &Waiter, leads: bool) -> Result<()> {
    if leads {
        lead(shared, waiter);
    }
    loop {
        match waiter.wait() {
            Wake::Done(result) => return result,
            Wake::Lead => lead(shared, waiter),
        }
    }
}

/// Writes a frame of what waits. Leaves the rest to others: first of all, somebody begins the next frame.
fn lead(shared: &Shared, waiter: &Waiter) {
    while waiter.poll().is_none() {
        match step(shared, Stepper::Committer) {
            Step::Progress => {}
            Step::Write(job) => {
                // A write that takes too long and the watermark after it are the business of a thread that does not wait.
                call_thread(shared);
                job.begin().ready();
                let mut writer = shared.writer();
                writer.reap(shared, shared.options.clock.now());
                let woken = writer.take_woken();
                drop(writer);
                hand_over(shared);
                return writer::wake(woken);
            }
            Step::Io(_) | Step::Tell(_) | Step::Timer(_) | Step::Blocked => break,
        }
    }
    hand_over(shared);
}

/// Sees to it that what waits is written: by the thread whose batch is next, since that has to be woken anyway, or by one
/// of the writer's.
fn hand_over(shared: &Shared) {
    let mut queue = shared.queue();
    let next = match queue.batches.front().map(|batch| &batch.ack) {
        Some(Ack::Waiter(waiter)) if queue.wants_write() => Some(waiter.clone()),
        _ => None,
    };
    queue.signal += 1;
    if next.is_none() && queue.wants_thread() {
        shared.work.notify_one();
    }
    drop(queue);
    next.into_iter().for_each(|waiter| waiter.lead());
}

fn call_thread(shared: &Shared) {
    let mut queue = shared.queue();
    if queue.wants_thread() {
        queue.signal += 1;
        shared.work.notify_one();
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
            Step::Write(_) | Step::Tell(_) | Step::Blocked => None,
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
