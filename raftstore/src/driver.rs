//! Threads around the core: loops, appliers, the snapshot server and the flusher.
//!
//! ```text
//!  handles ─┐                  ┌─> transport
//!  peers ───┼─> loop thread ───┼─> apply threads ──┬──> stage threads (chunks of received states)
//!  log sink ┘   (Core)   ^     └─> snapshot thread ─> transport
//!                        └─────────────────────────┘
//! ```
//!
//! Clocks and threads live here and nowhere below.

#![expect(clippy::disallowed_methods, reason = "threads and clocks live here")]

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use dashmap::DashMap;
use pontoon_proto::{GroupId, NodeId};
use pontoon_wal::{self as wal, PersistSink, Persisted, Wal};
use tokio::sync::{broadcast, oneshot};

use crate::{
    apply::{Applier, ApplyOutcome, ApplyTask, StageBack, StageWork},
    board::{Board, lock},
    budget::{Ledger, SnapshotBudget},
    core::Core,
    door::{Door, Inbox, ToLoop, door},
    effects::{Answer, Effects, Input, Now, Token},
    error::Error,
    lanes::Lane,
    machine::Machines,
    pace::Pace,
    priority::give_way,
    snapshot::{ServeTask, Served, SnapshotServer},
    stats::{Counters, Stats, add},
    transport::{Class, Transport},
    types::Config,
};

/// Inputs that one turn takes before it submits, so that a flood does not keep the log idle.
const INPUTS_PER_TURN: usize = 2048;

/// Bytes per second that are read of states at least, to be cut or hashed: that costs less than to receive them, and whoever waits for it
/// counts on it.
const SCAN_LEAST: u64 = 32 << 20;

/// How much nicer than the rest of the process threads are that read, hash and stage whole states.
const NICER: i32 = 10;

struct LoopSink(Door);

impl PersistSink for LoopSink {
    fn persisted(&self, done: &[Persisted]) {
        // Acknowledgements come in prefix order: the last one speaks for all.
        if let Some(last) = done.last() {
            self.0.first(Input::Persisted { submission: last.token });
        }
    }

    fn failed(&self, error: &wal::Error) {
        self.0.first(Input::LogFailed { reason: error.to_string() });
    }
}

/// The running threads.
pub(crate) struct Threads {
    pub(crate) board: Arc<Board>,
    pub(crate) ledger: Arc<Ledger>,
    tick: Duration,
    loops: Mutex<Vec<JoinHandle<()>>>,
    /// The channel ends that keep the other threads alive; dropped to stop them.
    workers: Mutex<Option<Workers>>,
}

struct Workers {
    apply: Vec<Arc<Lane>>,
    serve: Sender<ServeTask>,
    flush_stop: Sender<()>,
    handles: Vec<JoinHandle<()>>,
}

type Dirty = Arc<Mutex<BTreeMap<GroupId, u64>>>;

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    thread::Builder::new()
        .name(name.clone())
        .spawn(work)
        .map_err(|error| Error::Config(format!("the thread {name} does not start: {error}")))
}

pub(crate) fn start(
    config: &Config,
    node: NodeId,
    wal: &Wal,
    machines: &Arc<dyn Machines>,
    transport: &Arc<dyn Transport>,
) -> Result<Threads, Error> {
    let (loop_ends, receivers): (Vec<_>, Vec<_>) =
        (0..config.core_threads).map(|_| door(config.urgent_group)).unzip();
    let board = Arc::new(Board {
        statuses: DashMap::new(),
        dead: Mutex::default(),
        events: broadcast::channel(1024).0,
        counters: Counters::default(),
        standings: loop_ends.iter().map(|_| Mutex::default()).collect(),
        loops: loop_ends,
    });
    let dirty: Dirty = Arc::default();
    let mut handles = Vec::new();
    let mut apply = Vec::new();
    for i in 0..config.apply_threads {
        let lane = Arc::new(Lane::new(config.urgent_group));
        apply.push(lane.clone());
        let applier = Applier::new(machines.clone(), config.session_ttl);
        let (board, dirty) = (board.clone(), dirty.clone());
        // One chunk at a time waits per group that receives, and those are bounded by the turns of pulls.
        let (lent, works) = crossbeam_channel::unbounded();
        let returned: Returned = Arc::default();
        handles.push(spawn(format!("stage-{i}"), {
            let (lane, board, returned) = (lane.clone(), board.clone(), returned.clone());
            move || run_stager(&works, &returned, &lane, &board)
        })?);
        let stager = Stager { lent, returned };
        let run = move || run_applier(applier, &lane, &stager, &board, &dirty);
        handles.push(spawn(format!("apply-{i}"), run)?);
    }
    let (serve, serve_tasks) = crossbeam_channel::unbounded();
    let server = SnapshotServer::new(
        config.chunk_bytes,
        config.snapshots.max_views,
        wal.incarnation() & (u64::MAX >> 1),
    );
    let ledger: Arc<Ledger> = Arc::default();
    let serving = Serving {
        server,
        tasks: serve_tasks,
        transport: transport.clone(),
        board: board.clone(),
        ledger: ledger.clone(),
        budget: config.snapshots,
        started: Instant::now(),
    };
    let serve_all = move || serving.run();
    handles.push(spawn("snapshots".to_owned(), serve_all)?);
    let (flush_stop, stop) = crossbeam_channel::bounded(1);
    let flusher =
        Flusher { machines: machines.clone(), dirty, board: board.clone(), interval: config.flush_interval };
    handles.push(spawn("flush".to_owned(), move || flusher.run(&stop))?);

    let mut loops = Vec::new();
    for (i, inputs) in receivers.into_iter().enumerate() {
        let submitter = wal.submitter(Arc::new(LoopSink(board.loops[i].clone())));
        // Read contexts and pull ids of different loops and incarnations never meet.
        let unique = wal.incarnation().wrapping_add((i as u64) << 48);
        let looper = Looper {
            core: Core::new(
                config.clone(),
                node,
                wal.clone(),
                submitter,
                unique,
                (i as u32, config.core_threads as u32),
            )
            .sharing(ledger.clone()),
            inputs,
            apply: apply.clone(),
            serve: serve.clone(),
            transport: transport.clone(),
            wal: wal.clone(),
            at: i,
            board: board.clone(),
            waiting: HashMap::new(),
            tick: config.tick,
            started: Instant::now(),
        };
        loops.push(spawn(format!("raft-{i}"), move || looper.run())?);
    }
    let workers = Workers { apply, serve, flush_stop, handles };
    Ok(Threads {
        board,
        ledger,
        tick: config.tick,
        loops: Mutex::new(loops),
        workers: Mutex::new(Some(workers)),
    })
}

impl Threads {
    /// What was counted, and how things stand.
    pub(crate) fn stats(&self) -> Stats {
        let waiting = |workers: &Workers| workers.apply.iter().map(|lane| lane.len() as u64).sum();
        let queued_applies = lock(&self.workers).as_ref().map_or(0, waiting);
        Stats { queued_applies, ..self.board.stats(self.tick) }
    }

    /// Stops the loops, then the workers after what they were given, then flushes once more. Blocks.
    pub(crate) fn stop(&self) {
        self.board.loops.iter().for_each(Door::stop);
        for handle in lock(&self.loops).drain(..) {
            let _ = handle.join();
        }
        if let Some(workers) = lock(&self.workers).take() {
            let Workers { apply, serve, flush_stop, handles } = workers;
            apply.iter().for_each(|lane| lane.close());
            drop(serve);
            // The flusher goes last: it makes durable what the appliers did at the end.
            let (mut handles, flusher) = split_last(handles);
            for handle in handles.drain(..) {
                let _ = handle.join();
            }
            drop(flush_stop);
            if let Some(flusher) = flusher {
                let _ = flusher.join();
            }
        }
        self.board.statuses.clear();
    }
}

fn split_last<T>(mut all: Vec<T>) -> (Vec<T>, Option<T>) {
    let last = all.pop();
    (all, last)
}

struct Looper {
    core: Core,
    inputs: Inbox,
    apply: Vec<Arc<Lane>>,
    serve: Sender<ServeTask>,
    transport: Arc<dyn Transport>,
    wal: Wal,
    /// Which of the loops this is.
    at: usize,
    board: Arc<Board>,
    waiting: HashMap<Token, oneshot::Sender<Answer>>,
    tick: Duration,
    started: Instant,
}

impl Looper {
    fn run(mut self) {
        let mut fx = Effects::default();
        let mut next_tick = Instant::now() + self.tick;
        loop {
            // Of what is left to do, the next part follows the inputs that are there.
            let until = if self.core.has_more() { Instant::now() } else { next_tick };
            let Ok(first) = self.inputs.next(until) else { return };
            // Time first: after a pause nobody may take what it heard last for fresh.
            let now = Instant::now();
            if now >= next_tick {
                let late = now.duration_since(next_tick).as_nanos() / self.tick.as_nanos();
                let ticks = 1 + late as u64;
                next_tick += self.tick * ticks as u32;
                self.core.handle(self.now(), Input::Tick(ticks), &mut fx);
            }
            let mut next = first;
            let mut taken = 0;
            while let Some(input) = next {
                if !self.take(input, &mut fx) {
                    return;
                }
                taken += 1;
                next = if taken < INPUTS_PER_TURN { self.inputs.try_next() } else { None };
            }
            self.core.go_on(&mut fx);
            self.core.poll(&mut fx);
            self.dispatch(&mut fx);
            add(&self.board.counters.turns, 1);
            add(&self.board.counters.inputs, taken as u64);
            *lock(&self.board.standings[self.at]) = self.core.standing();
        }
    }

    fn now(&self) -> Now {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Now { wall_ms: wall.map_or(0, |since| since.as_millis() as u64), clock: self.started.elapsed() }
    }

    fn take(&mut self, message: ToLoop, fx: &mut Effects) -> bool {
        self.inputs.taken(&message);
        match message {
            ToLoop::Input(input) => self.core.handle(self.now(), input, fx),
            ToLoop::Ask(input, token, answer) => {
                self.waiting.insert(token, answer);
                self.core.handle(self.now(), input, fx);
            }
            ToLoop::Stop => return false,
        }
        true
    }

    fn dispatch(&mut self, fx: &mut Effects) {
        let mut batches: BTreeMap<(NodeId, Class), Vec<_>> = BTreeMap::new();
        for (node, class, message) in fx.send.drain(..) {
            batches.entry((node, class)).or_default().push(message);
        }
        for ((node, class), messages) in batches {
            self.transport.send(node, class, messages);
        }
        let lanes = self.apply.len();
        for (at, lane) in self.apply.iter().enumerate() {
            let is_here = |task: &mut ApplyTask| (task.group().0 >> 1) as usize % lanes == at;
            let mut tasks = fx.apply.extract_if(.., is_here).peekable();
            if tasks.peek().is_some() {
                lane.push_all(tasks);
            }
        }
        for task in fx.serve.drain(..) {
            let _ = self.serve.send(task);
        }
        for task in fx.fetch.drain(..) {
            let door = self.board.door(task.group).clone();
            task.begin(&self.wal, move |input| door.first(input));
        }
        for status in fx.statuses.drain(..) {
            self.board.publish(status);
        }
        for group in fx.gone.drain(..) {
            self.board.statuses.remove(&group);
            lock(&self.board.dead).remove(&group);
        }
        // Last, so that a caller who was answered finds the status that goes with it.
        for (token, answer) in fx.answers.drain(..) {
            if let Some(waiter) = self.waiting.remove(&token) {
                // A caller that went away no longer wants the answer.
                let _ = waiter.send(answer);
            }
        }
        for event in fx.events.drain(..) {
            self.board.tell(event);
        }
    }
}

/// Stages that were lent and are back.
type Returned = Arc<Mutex<Vec<StageBack>>>;

/// An applier's way to the thread that stages for it.
struct Stager {
    lent: Sender<StageWork>,
    returned: Returned,
}

/// The stage is back before its group is released, and that before anybody hears of the chunk: whatever follows finds it.
fn run_stager(works: &Receiver<StageWork>, returned: &Returned, lane: &Lane, board: &Board) {
    give_way(NICER);
    for work in works {
        let (back, outcome) = work.run();
        let group = back.group;
        lock(returned).push(back);
        lane.release(group);
        board.door(group).first(Input::Outcome(outcome));
    }
}

fn run_applier(
    mut applier: Applier,
    lane: &Lane,
    stager: &Stager,
    board: &Board,
    dirty: &Mutex<BTreeMap<GroupId, u64>>,
) {
    let mut outcomes = Vec::new();
    while let Some(task) = lane.take() {
        lock(&stager.returned).drain(..).for_each(|back| applier.take_back(back));
        let group = task.group();
        match task {
            ApplyTask::StageChunk { chunk, .. } => {
                let work = applier.lend(group, chunk);
                // The other thread outlives this one's end of the channel.
                if work.is_none_or(|work| stager.lent.send(work).is_err()) {
                    lane.release(group);
                }
                continue;
            }
            ApplyTask::Entries { ref entries, .. } => {
                let (count, begun) = (entries.len() as u64, Instant::now());
                applier.run(task, &mut outcomes);
                board.counters.apply_times.note(begun.elapsed());
                add(&board.counters.applied_entries, count);
            }
            task => applier.run(task, &mut outcomes),
        }
        for outcome in outcomes.drain(..) {
            // What a flush reports must be known as applied: the loop hears of it first.
            let mut applied = None;
            match &outcome {
                ApplyOutcome::Applied { mark, .. } => applied = Some(mark.index),
                // What was read at open may not be durable yet.
                ApplyOutcome::Opened { mark: Some(mark), .. } => applied = Some(mark.index),
                ApplyOutcome::Installed { group, .. } | ApplyOutcome::Destroyed { group } => {
                    lock(dirty).remove(group);
                }
                ApplyOutcome::EngineFailed { reason } => {
                    board.engine_failed(reason);
                    continue;
                }
                _ => {}
            }
            board.door(group).first(Input::Outcome(outcome));
            if let Some(index) = applied {
                lock(dirty).insert(group, index);
            }
        }
    }
}

/// The thread that reads whole states.
struct Serving {
    server: SnapshotServer,
    tasks: Receiver<ServeTask>,
    transport: Arc<dyn Transport>,
    board: Arc<Board>,
    ledger: Arc<Ledger>,
    budget: SnapshotBudget,
    started: Instant,
}

impl Serving {
    fn run(mut self) {
        give_way(NICER);
        let mut pace = Pace::default();
        loop {
            let task = match self.tasks.try_recv() {
                Err(TryRecvError::Empty) if self.server.read_ahead() => continue,
                Err(TryRecvError::Empty) if self.server.scans() => match pace.rest(self.started.elapsed()) {
                    Duration::ZERO => {
                        self.scan(&mut pace);
                        continue;
                    }
                    rest => match self.tasks.recv_timeout(rest) {
                        Err(RecvTimeoutError::Timeout) => continue,
                        task => task.ok(),
                    },
                },
                Err(TryRecvError::Empty) => self.tasks.recv().ok(),
                task => task.ok(),
            };
            let Some(task) = task else { return };
            let scanned = self.server.scans();
            pace.look(self.started.elapsed(), scanned, self.ledger.is_strained());
            if let ServeTask::Budget(budget) = &task {
                self.budget = *budget;
            }
            let served = self.server.run(task);
            self.answer(served);
            if self.server.scans() != scanned {
                self.ledger.set_copying(!scanned);
            }
        }
    }

    /// Reads a piece of a state.
    fn scan(&mut self, pace: &mut Pace) {
        let now = self.started.elapsed();
        pace.look(now, true, self.ledger.is_strained());
        let (bytes, served) = self.server.go_on();
        let rate = pace.rate(self.budget).map(|rate| rate.max(SCAN_LEAST));
        pace.spend(now, bytes, rate);
        self.answer(served);
        if !self.server.scans() {
            self.ledger.set_copying(false);
        }
    }

    fn answer(&self, served: Option<Served>) {
        match served {
            Some(Served::Send(to, message)) => self.transport.send(to, Class::Snapshot, vec![message]),
            Some(Served::Verified { group, index, hash }) => {
                self.board.door(group).first(Input::Verified { group, index, hash });
            }
            None => {}
        }
    }
}

struct Flusher {
    machines: Arc<dyn Machines>,
    dirty: Dirty,
    board: Arc<Board>,
    interval: Duration,
}

impl Flusher {
    fn run(self, stop: &Receiver<()>) {
        loop {
            let stopping = !matches!(stop.recv_timeout(self.interval), Err(RecvTimeoutError::Timeout));
            // Marks are read before the flush begins: what is applied meanwhile waits for the next one.
            let marks = std::mem::take(&mut *lock(&self.dirty));
            if !marks.is_empty() {
                let begun = Instant::now();
                if let Err(error) = self.machines.flush() {
                    self.board.engine_failed(&self.machines.failure().unwrap_or_else(|| error.to_string()));
                    return;
                }
                self.board.counters.flush_times.note(begun.elapsed());
            }
            let mut by_loop: BTreeMap<usize, Vec<(GroupId, u64)>> = BTreeMap::new();
            for (group, index) in marks {
                by_loop.entry(group.0 as usize % self.board.loops.len()).or_default().push((group, index));
            }
            for (at, marks) in by_loop {
                self.board.loops[at].first(Input::Flushed(marks));
            }
            if stopping {
                return;
            }
        }
    }
}
