//! One node: its disks, its clock, and the process that runs on them or does not.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use pontoon_proto::{ClusterId, GroupId, NodeId};
use pontoon_raftstore::{Config, Identity, Stepped};
use pontoon_shard::{
    ShardMachines,
    engine::{MemoryDisk, MemoryEngine},
};
use pontoon_wal::{Clock, DriverMode, Options, RecoveryReport, Wal, sim::SimFs};

use super::{
    driver::Driver,
    machines::{Book, Watched},
    net::{Packet, Sender},
};
use crate::Rng;

/// Between two ticks of raft's clock, in milliseconds of a clock that goes right.
pub(super) const TICK_MS: u64 = 20;

/// Where a node's log lies on its disk.
pub(super) const LOG: &str = "/wal";

/// The cluster that all nodes belong to.
pub(super) const CLUSTER: [u8; 16] = [7; 16];

/// The clock that logs are given: the simulation's.
pub(super) struct SimClock(pub(super) AtomicU64);

impl Clock for SimClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// A process.
pub(super) struct Running {
    pub(super) stepped: Stepped,
    pub(super) wal: Wal,
    pub(super) machines: Arc<ShardMachines>,
    /// Whether it leads the meta group, and then drives.
    pub(super) driver: Option<Driver>,
    /// The highest term of a driver that gave orders.
    pub(super) driver_term: u64,
    /// The meta group has accepted the boot token.
    pub(super) vouched: bool,
    /// When it asks the meta group again.
    pub(super) announce_at: u64,
    /// Who has accepted it, under which boot of theirs.
    pub(super) accepted_by: BTreeMap<NodeId, u64>,
}

/// A node. What is in `running` goes with the process; the rest stays.
pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) address: String,
    pub(super) fs: SimFs,
    pub(super) disk: MemoryDisk,
    pub(super) running: Option<Running>,
    pub(super) boots: u64,
    /// When its process starts again.
    pub(super) down_until: u64,
    /// Its disks are lost: it never comes back.
    pub(super) gone: bool,
    /// Its process stands still until then; 0: it does not.
    pub(super) paused_until: u64,
    /// Somebody took its engine away.
    pub(super) engine_taken: bool,
    /// Until then its engine flushes at almost every moment.
    pub(super) flushes_until: u64,
    /// What arrived meanwhile.
    pub(super) inbox: Vec<(Sender, Packet)>,
    /// Its disk completes nothing until then; 0: it does.
    pub(super) stalled_until: u64,
    /// Its disk is full until then; 0: it is not.
    pub(super) full_until: u64,
    /// Its state machines stand still.
    pub(super) frozen: bool,
    /// Something may go wrong with its log: a fault is set.
    pub(super) may_fail: bool,
    /// Bits of its log were flipped: replicas here may die at any time.
    pub(super) rotten: bool,
    /// It runs from a disk that is not its own, or not its newest.
    pub(super) forged: bool,
    /// What its wall clock shows too much.
    pub(super) wall_ahead_ms: i64,
    /// What its tick really takes: its clock is a little fast or slow.
    pub(super) tick_every: u64,
    pub(super) next_tick: u64,
    /// What was durable in each group's log when power was cut.
    pub(super) promised: BTreeMap<GroupId, u64>,
}

impl Node {
    pub(super) fn new(id: NodeId, address: String, rng: &mut Rng) -> Node {
        Node {
            id,
            address,
            fs: SimFs::new(),
            disk: MemoryDisk::new(),
            running: None,
            boots: 0,
            down_until: 0,
            gone: false,
            paused_until: 0,
            engine_taken: false,
            flushes_until: 0,
            inbox: Vec::new(),
            stalled_until: 0,
            full_until: 0,
            frozen: false,
            may_fail: false,
            rotten: false,
            forged: false,
            wall_ahead_ms: rng.below(4_000) as i64 - 2_000,
            tick_every: TICK_MS - 1 + rng.below(3),
            next_tick: 0,
            promised: BTreeMap::new(),
        }
    }

    /// Starts the process on what the disks hold.
    ///
    /// # Errors
    /// The log's, if it cannot be opened.
    pub(super) fn boot(
        &mut self,
        now: u64,
        clock: Arc<SimClock>,
        book: &Book,
        (seed, leader_lease): (u64, bool),
    ) -> Result<RecoveryReport, pontoon_wal::Error> {
        self.boots += 1;
        self.fs.hold(false);
        self.fs.set_capacity(None);
        (self.stalled_until, self.full_until, self.paused_until) = (0, 0, 0);
        self.may_fail = false;
        self.inbox.clear();
        let mut options = Options::new(LOG);
        options.fs = Arc::new(self.fs.clone());
        options.segment_bytes = 256 << 10;
        options.seed = seed;
        options.clock = clock;
        options.driver = DriverMode::Manual;
        // Half of the nodes find nothing in memory that was written.
        let cold = self.id.get().is_multiple_of(2);
        self.fs.set_cold(cold);
        if cold {
            options.cache_bytes = 0;
        }
        let (wal, report) = Wal::open(options)?;
        let config = Config {
            tick: Duration::from_millis(TICK_MS),
            chunk_bytes: 256,
            chunk_window: 2,
            max_retained_entries: 200,
            sleep_after_ticks: 10,
            leader_lease,
            vouching_group: Some(GroupId::META),
            seed,
            ..Default::default()
        };
        let engine = Arc::new(MemoryEngine::open(&self.disk));
        let machines = ShardMachines::new(engine).expect("the simulated engine opens");
        let watched = Watched { machines: machines.clone(), book: book.clone() };
        let mut stepped =
            Stepped::open(config, self.id, wal.clone(), Arc::new(watched)).expect("the configuration holds");
        stepped.set_wall_ms(self.wall_ms(now));
        stepped.set_clock(self.clock(now));
        let cluster = ClusterId::from_slice(&CLUSTER).expect("16 bytes");
        let me = Identity::establish(&wal, cluster, self.id, &self.address);
        me.and_then(|me| stepped.introduce(me)).map_err(|error| match error {
            pontoon_raftstore::Error::Wal(error) => error,
            other => panic!("{} does not know itself: {other}", self.id),
        })?;
        self.next_tick = now + self.tick_every;
        self.running = Some(Running {
            stepped,
            wal,
            machines,
            driver: None,
            driver_term: 0,
            vouched: false,
            announce_at: 0,
            accepted_by: BTreeMap::new(),
        });
        Ok(report)
    }

    /// What its wall clock shows.
    pub(super) fn wall_ms(&self, now: u64) -> u64 {
        (1_000_000 + now).saturating_add_signed(self.wall_ahead_ms)
    }

    /// What its other clock shows, which never goes back and is as fast as its ticks.
    pub(super) fn clock(&self, now: u64) -> Duration {
        Duration::from_micros(now * 1_000 * TICK_MS / self.tick_every)
    }

    /// Ends the process. With a power cut, what was not synced survives as chance has it; else all that was written stays
    /// in the log's files, and the engine keeps what it took.
    pub(super) fn end(&mut self, power_cut: bool, groups: &[GroupId], rng: &mut Rng) {
        let Some(running) = self.running.take() else { return };
        // A term is announced only when it is durable, an index acknowledged only then: what others may have heard of must
        // be there afterwards.
        let persisted = |group: &GroupId| {
            let status = running.stepped.status(*group)?;
            status.dead.is_none().then_some((*group, status.persisted))
        };
        self.promised = groups.iter().filter_map(persisted).collect();
        drop(running.stepped);
        if power_cut {
            self.fs.crash(rng.draw());
            let kept = rng.below(self.disk.unflushed() as u64 + 1) as usize;
            self.disk.power_cut_keeping(kept);
        } else {
            self.fs.kill();
            self.disk.power_cut_keeping(self.disk.unflushed());
        }
        drop(running.wal);
        self.inbox.clear();
    }

    pub(super) fn is_up(&self) -> bool {
        self.running.is_some() && self.paused_until == 0
    }
}
