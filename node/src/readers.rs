//! Short reads of the engine, away from the network's threads: the engine may go to disk.
//!
//! A thread that is woken for one read takes those that came meanwhile, so that many at once do not cost a wake-up each.
//! With more of them waiting than one thread should have before it, more threads help.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
};

use tokio::sync::oneshot;
use tonic::Status;

/// Reads that wait for one thread before another one helps.
const WAITING_PER_THREAD: usize = 16;
const MOST_THREADS: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
}

/// The reads of a node that wait for a thread.
#[derive(Default)]
pub(crate) struct Readers {
    queue: Arc<Mutex<Queue>>,
}

impl Readers {
    /// Runs a read on a thread that may block.
    ///
    /// # Errors
    /// `INTERNAL` if the read panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Status> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move || {
            // A panic ends this read alone. Whoever asked may be gone.
            if let Ok(read) = catch_unwind(AssertUnwindSafe(read)) {
                let _ = answer.send(read);
            }
        });
        let helps = {
            let mut queue = lock(&self.queue);
            queue.jobs.push_back(job);
            let helps = queue.threads < MOST_THREADS && queue.jobs.len() > queue.threads * WAITING_PER_THREAD;
            queue.threads += usize::from(helps);
            helps
        };
        if helps {
            let queue = self.queue.clone();
            tokio::task::spawn_blocking(move || std::iter::from_fn(|| next(&queue)).for_each(|job| job()));
        }
        answered.await.map_err(|_| Status::internal("a read of the engine did not end"))
    }
}

/// The next read for a thread; with none left the thread counts no more, before anybody can rely on it.
fn next(queue: &Mutex<Queue>) -> Option<Job> {
    let mut queue = lock(queue);
    let job = queue.jobs.pop_front();
    queue.threads -= usize::from(job.is_none());
    job
}

fn lock(queue: &Mutex<Queue>) -> std::sync::MutexGuard<'_, Queue> {
    // Nothing under this lock can be left half changed by a panic.
    queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use futures::future::join_all;

    use super::*;

    #[tokio::test]
    async fn every_read_is_answered_whatever_becomes_of_the_others() {
        let readers = Readers::default();
        for round in 0..50usize {
            let reads = (0..200usize).map(|number| {
                readers.run(move || {
                    assert!(number % 7 != 3, "a read that breaks");
                    round + number
                })
            });
            for (number, read) in join_all(reads).await.into_iter().enumerate() {
                assert_eq!(read.ok(), (number % 7 != 3).then_some(round + number));
            }
        }
    }
}
