//! What a node does with its time and its memory, measured for some seconds because somebody asks.
//!
//! - One profile at a time. It ends with its call: when the caller goes, what was begun is stopped.
//! - No code of the node is interrupted and no stack is walked from a signal; threads are read from outside ([`threads`]), and the
//!   allocator records where it is called anyway ([`heap`]). Why: decision 31.
//! - All of it runs on threads that may block.

mod calls;
mod heap;
mod threads;

use std::{path::Path, sync::Arc, time::Duration};

use pontoon_proto::v1;
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until},
};
use tonic::Status;

use crate::{config::HeapProfiler, shared::Shared};

/// For how many seconds a node can be profiled.
const SECONDS: std::ops::RangeInclusive<u32> = 1..=60;
/// Between two looks at the threads, at least.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A look is followed by a pause so many times as long: looking takes a twentieth of one core at most.
const PAUSE_PER_LOOK: u32 = 19;
/// Where the system tells of this process's threads.
const TASKS: &str = "/proc/self/task";

/// Who profiles this node.
pub(crate) struct Profiles {
    turn: Arc<Mutex<()>>,
    heap: Option<Arc<dyn HeapProfiler>>,
}

impl Profiles {
    pub(crate) fn new(heap: Option<Arc<dyn HeapProfiler>>) -> Profiles {
        Profiles { turn: Arc::default(), heap }
    }
}

impl Shared {
    /// Profiles this node.
    ///
    /// # Cancel safety
    /// Dropping this ends the profile.
    pub(crate) async fn profile(
        self: &Arc<Self>,
        request: v1::ProfileRequest,
    ) -> Result<v1::ProfileReply, Status> {
        let kind = v1::ProfileKind::try_from(request.kind).map_err(|_| {
            Status::invalid_argument(format!(
                "profiles of kind {} are not known to this release: upgrade the node",
                request.kind
            ))
        })?;
        if !SECONDS.contains(&request.seconds) {
            return Err(Status::invalid_argument(format!(
                "a profile lasts {} to {} seconds, not {}",
                SECONDS.start(),
                SECONDS.end(),
                request.seconds
            )));
        }
        let turn = self.profiles.turn.clone().try_lock_owned().map_err(|_| {
            Status::failed_precondition(format!(
                "{} is being profiled already, and one at a time: ask again in a minute at most",
                self.own
            ))
        })?;
        let began = Instant::now();
        let until = began + Duration::from_secs(request.seconds.into());
        let mut reply = v1::ProfileReply { node: self.own.get(), ..Default::default() };
        match kind {
            v1::ProfileKind::Threads => {
                (reply.threads, reply.looks) = watch_threads(Path::new(TASKS), until).await?;
                reply.took_ms = began.elapsed().as_millis() as u64;
                drop(turn);
            }
            v1::ProfileKind::Heap => {
                let profiler = self.profiles.heap.clone().ok_or_else(|| {
                    Status::failed_precondition(format!(
                        "{} runs in a program that does not say how its allocator is profiled (`NodeConfig::heap`); only `pontoon node` does",
                        self.own
                    ))
                })?;
                // Naming functions takes time, too, which is not measured.
                reply.took_ms = u64::from(request.seconds) * 1_000;
                reply.heap =
                    Some(watch_heap(Recording { profiler, turn: Some(turn) }, until, request.raw).await?);
            }
        }
        Ok(reply)
    }
}

async fn watch_threads(
    tasks: &'static Path,
    until: Instant,
) -> Result<(Vec<v1::ThreadProfile>, u32), Status> {
    let mut watched = blocking(move || threads::Watch::begin(tasks)).await?.map_err(|error| {
        Status::failed_precondition(format!(
            "the system does not tell what threads do: {}: {error}",
            tasks.display()
        ))
    })?;
    let mut looks = 0;
    let mut pause = LOOK_EVERY;
    while Instant::now() + pause < until {
        sleep(pause).await;
        let began = Instant::now();
        watched = blocking(move || {
            watched.look();
            watched
        })
        .await?;
        looks += 1;
        pause = LOOK_EVERY.max(began.elapsed() * PAUSE_PER_LOOK);
    }
    sleep_until(until).await;
    Ok((blocking(move || watched.end()).await?, looks))
}

/// The heap's profiler at work. It is stopped when nobody has this any more, a call of it that is still under way included; only then
/// somebody else may begin.
struct Recording {
    profiler: Arc<dyn HeapProfiler>,
    turn: Option<OwnedMutexGuard<()>>,
}

impl Drop for Recording {
    fn drop(&mut self) {
        let (profiler, turn) = (self.profiler.clone(), self.turn.take());
        spawn_blocking(move || {
            profiler.stop();
            drop(turn);
        });
    }
}

async fn watch_heap(recording: Recording, until: Instant, raw: bool) -> Result<v1::HeapProfile, Status> {
    let recording = Arc::new(recording);
    let held = recording.clone();
    blocking(move || held.profiler.start()).await?.map_err(Status::failed_precondition)?;
    sleep_until(until).await;
    // The node allocates while its dump is read, too: not any more for this profile.
    let (dump, usage) = blocking(move || (recording.profiler.dump(), recording.profiler.usage())).await?;
    let dump = dump.map_err(Status::internal)?;
    blocking(move || heap::profile(dump, raw, usage)).await?
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    spawn_blocking(work).await.map_err(|error| Status::internal(error.to_string()))
}
