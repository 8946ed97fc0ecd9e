//! What is wrong with this node, as a code and in words: judged again and again, and told by `/readyz`, by the health service of gRPC,
//! by `/metrics` and by `pontoon status --problems`.
//!
//! A code says which services suffer ([`Code::stops`]): where clients would fare better elsewhere the node is not ready. What only an
//! operator can mend, and what passes by itself, is told without that.

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use pontoon_proto::{GroupId, ReplicaId, v1};
use pontoon_raftstore::{Event, Room};
use tokio::{
    sync::{broadcast::error::RecvError, watch},
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{info, warn};

use crate::{
    clock::unix_ms,
    shared::Shared,
    space::{Disk, Seen},
};

/// How often the node looks at itself.
const LOOK: Duration = Duration::from_millis(250);
/// An election, or a stream that is made again, is no loss of the meta group.
const META_PATIENCE: Duration = Duration::from_secs(2);
/// Clocks that differ by more are in trouble. No decision depends on them, but people who read logs do, and leases on their pace.
const SKEW: Duration = Duration::from_millis(500);
/// For so long a jump of the clock is told.
const JUMP_TOLD: Duration = Duration::from_secs(600);

/// What can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Code {
    Stopping,
    NoMap,
    LogFailed,
    EngineFailed,
    DiskStalled,
    DiskFull,
    DiskLow,
    MetaLost,
    DeadReplicas,
    ClockSkew,
    ClockJumped,
    MixedVersions,
    FinaliseDue,
}

/// A service of the node's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Serves {
    Data,
    Admin,
    Peer,
}

impl Code {
    pub(crate) const ALL: [Code; 13] = [
        Code::Stopping,
        Code::NoMap,
        Code::LogFailed,
        Code::EngineFailed,
        Code::DiskStalled,
        Code::DiskFull,
        Code::DiskLow,
        Code::MetaLost,
        Code::DeadReplicas,
        Code::ClockSkew,
        Code::ClockJumped,
        Code::MixedVersions,
        Code::FinaliseDue,
    ];

    /// The word for programs.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Code::Stopping => "stopping",
            Code::NoMap => "no-map",
            Code::LogFailed => "log-failed",
            Code::EngineFailed => "engine-failed",
            Code::DiskStalled => "disk-stalled",
            Code::DiskFull => "disk-full",
            Code::DiskLow => "disk-low",
            Code::MetaLost => "meta-lost",
            Code::DeadReplicas => "dead-replicas",
            Code::ClockSkew => "clock-skew",
            Code::ClockJumped => "clock-jumped",
            Code::MixedVersions => "mixed-versions",
            Code::FinaliseDue => "finalise-due",
        }
    }

    /// The services that do not do what they should.
    pub(crate) fn stops(self) -> &'static [Serves] {
        match self {
            Code::Stopping | Code::LogFailed | Code::EngineFailed => {
                &[Serves::Data, Serves::Admin, Serves::Peer]
            }
            Code::NoMap => &[Serves::Data, Serves::Admin],
            Code::DiskStalled | Code::DiskFull | Code::DiskLow => &[Serves::Data],
            Code::MetaLost => &[Serves::Admin],
            Code::DeadReplicas
            | Code::ClockSkew
            | Code::ClockJumped
            | Code::MixedVersions
            | Code::FinaliseDue => &[],
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) code: Code,
    /// What it is, and the next step.
    pub(crate) text: String,
    /// Unix time in milliseconds.
    pub(crate) since_ms: u64,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.word(), self.text)
    }
}

impl Problem {
    pub(crate) fn to_wire(&self) -> v1::NodeProblem {
        v1::NodeProblem {
            code: self.code.word().to_owned(),
            text: self.text.clone(),
            since_ms: self.since_ms,
        }
    }
}

/// What was seen last.
#[derive(Debug)]
pub(crate) struct Health {
    problems: watch::Sender<BTreeMap<Code, Problem>>,
}

impl Default for Health {
    fn default() -> Self {
        let health = Health { problems: watch::Sender::default() };
        health.set(vec![(Code::NoMap, NO_MAP.to_owned())]);
        health
    }
}

const NO_MAP: &str = "no map of the cluster yet; if it stays so, start the other nodes";

impl Health {
    /// Everything that is wrong, the worst first.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        self.problems.borrow().values().cloned().collect()
    }

    pub(crate) fn serves(&self, service: Serves) -> bool {
        !self.problems.borrow().keys().any(|code| code.stops().contains(&service))
    }

    /// Wakes whenever something was judged.
    pub(crate) fn subscribe(&self) -> watch::Receiver<BTreeMap<Code, Problem>> {
        self.problems.subscribe()
    }

    /// Takes over what is wrong now, and says what is new and what has passed.
    fn set(&self, now: Vec<(Code, String)>) -> (Vec<Problem>, Vec<Code>) {
        let mut problems = self.problems.borrow().clone();
        let passed: Vec<Code> =
            problems.keys().copied().filter(|code| now.iter().all(|(other, _)| other != code)).collect();
        passed.iter().for_each(|code| drop(problems.remove(code)));
        let mut new = Vec::new();
        for (code, text) in now {
            let since_ms = problems.get(&code).map_or_else(unix_ms, |problem| problem.since_ms);
            let problem = Problem { code, text, since_ms };
            if problems.insert(code, problem.clone()).is_none() {
                new.push(problem);
            }
        }
        self.problems.send_if_modified(|seen| std::mem::replace(seen, problems.clone()) != problems);
        (new, passed)
    }
}

/// What a look at the node finds.
#[derive(Debug, Default)]
struct Signs {
    has_map: bool,
    log_failed: Option<String>,
    engine_failed: Option<String>,
    /// For how long the log has owed a sync, once that is long.
    stalled: Option<Duration>,
    room: Room,
    disk: Disk,
    /// Voters of the meta group, and those that this node reaches.
    meta: Option<(usize, usize)>,
    dead: usize,
    skew_ms: i64,
    jumped_ms: Option<i64>,
    /// What an upgrade has waited for too long, nodes (true) or an operator, where the meta group is led here.
    upgrade: Option<(bool, String)>,
}

fn judge(signs: &Signs) -> Vec<(Code, String)> {
    let mut found = Vec::new();
    let mut add = |code, text: String| found.push((code, text));
    if !signs.has_map {
        add(Code::NoMap, NO_MAP.to_owned());
    }
    if let Some(reason) = &signs.log_failed {
        add(Code::LogFailed, format!("{reason}; start the node again on a healthy disk"));
    }
    if let Some(reason) = &signs.engine_failed {
        add(Code::EngineFailed, format!("{reason}; start the node again once the cause is gone"));
    }
    if let Some(owed) = signs.stalled {
        add(
            Code::DiskStalled,
            format!(
                "the log has waited for {:.1} s for its disk; leaderships are passed on. Look at the disk; if it does not come back, \
                 stop the node: what it acknowledged is safe on the others",
                owed.as_secs_f64()
            ),
        );
    }
    let free = signs.disk.free >> 20;
    match signs.room {
        Room::Ample => {}
        Room::Low => add(
            Code::DiskLow,
            format!("{free} MiB are free: no writes are taken; free space there, or move predicates away"),
        ),
        Room::Critical => add(
            Code::DiskFull,
            format!(
                "{free} MiB are free: nothing is taken any more; free space there, or move predicates away"
            ),
        ),
    }
    if let Some((voters, reached)) = signs.meta {
        add(
            Code::MetaLost,
            format!(
                "the meta group has no leader that is heard here ({reached} of its {voters} voters are reached): predicates that have a \
                 quorum are served, nothing is made, moved or repaired; start the nodes that hold it, or see `pontoon recover plan`"
            ),
        );
    }
    if signs.dead > 0 {
        add(
            Code::DeadReplicas,
            format!(
                "{} replicas here have stopped for good; `pontoon groups --problem` names them",
                signs.dead
            ),
        );
    }
    if signs.skew_ms.unsigned_abs() > SKEW.as_millis() as u64 {
        let (far, way) =
            (signs.skew_ms.unsigned_abs(), if signs.skew_ms > 0 { "ahead of" } else { "behind" });
        add(
            Code::ClockSkew,
            format!(
                "the clock of another node is {far} ms {way} the one here; look at the time service of both"
            ),
        );
    }
    if let Some(jump) = signs.jumped_ms {
        let way = if jump > 0 { "forwards" } else { "back" };
        add(
            Code::ClockJumped,
            format!(
                "the clock went {} ms {way} at once, or the machine stood still; look at its time service, and use no leader leases \
                 where that happens",
                jump.unsigned_abs()
            ),
        );
    }
    if let Some((nodes, text)) = &signs.upgrade {
        add(if *nodes { Code::MixedVersions } else { Code::FinaliseDue }, text.clone());
    }
    found
}

/// Notices when the wall clock does not go on as time does.
struct Wall {
    wall: SystemTime,
    steady: Instant,
    jump: Option<(Instant, i64)>,
}

impl Wall {
    fn new() -> Wall {
        Wall { wall: SystemTime::now(), steady: Instant::now(), jump: None }
    }

    fn look(&mut self) -> Option<i64> {
        self.at(SystemTime::now(), Instant::now())
    }

    fn at(&mut self, wall: SystemTime, steady: Instant) -> Option<i64> {
        let went = match wall.duration_since(self.wall) {
            Ok(forwards) => forwards.as_millis() as i64,
            Err(back) => -(back.duration().as_millis() as i64),
        };
        let jump = went - steady.duration_since(self.steady).as_millis() as i64;
        (self.wall, self.steady) = (wall, steady);
        if jump.unsigned_abs() > SKEW.as_millis() as u64 {
            self.jump = Some((steady, jump));
        }
        self.jump.take_if(|(since, _)| steady.duration_since(*since) > JUMP_TOLD);
        self.jump.map(|(_, jump)| jump)
    }
}

/// Judges again and again, and logs what comes and what passes. Ends with the node.
pub(crate) async fn watch_health(shared: Arc<Shared>) {
    let mut events = shared.raft.events();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stop = shared.stop.subscribe();
    let (mut log_failed, mut engine_failed) = (None, None);
    let (mut wall, mut meta_gone) = (Wall::new(), None);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            event = events.recv() => match event {
                Ok(Event::LogFailed { reason }) => log_failed = Some(reason),
                Ok(Event::EngineFailed { reason }) => engine_failed = Some(reason),
                Ok(_) | Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return,
            },
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let Seen { disk, room } = shared.space.seen();
        let raft = shared.raft.stats();
        let meta = shared.meta_seen();
        let gone = meta.map(|_| *meta_gone.get_or_insert_with(Instant::now));
        meta_gone = gone;
        let signs = Signs {
            has_map: shared.map.view().version() > 0,
            log_failed: log_failed.clone(),
            engine_failed: engine_failed.clone(),
            stalled: raft.stalled.then_some(raft.owed),
            room,
            disk,
            meta: meta.filter(|_| gone.is_some_and(|gone| gone.elapsed() >= META_PATIENCE)),
            dead: shared.raft.dead().len(),
            skew_ms: raft.clock_skew_ms,
            jumped_ms: wall.look(),
            upgrade: shared.upgrade.late(Instant::now()),
        };
        let (new, passed) = shared.health.set(judge(&signs));
        for Problem { code, text, .. } in new {
            warn!(code = code.word(), "{text}");
        }
        // Every start is without a map at first, which is not said.
        for code in passed.into_iter().filter(|code| *code != Code::NoMap) {
            info!(code = code.word(), "this problem has passed");
        }
    }
}

impl Shared {
    /// The voters of the meta group and how many of them are reached, if it seems to have lost its leader or its quorum.
    fn meta_seen(&self) -> Option<(usize, usize)> {
        let view = self.map.view();
        let shard = view.shard(GroupId::META)?;
        let voters = shard.voters.iter().filter_map(|&id| ReplicaId::new(id).ok()).map(ReplicaId::node);
        let (voters, reached) = voters.fold((0, 0), |(voters, reached), node| {
            (voters + 1, reached + usize::from(self.transport.reaches(node)))
        });
        let leaderless =
            self.raft.group(GroupId::META).is_some_and(|group| group.look(|status| status.leader.is_none()));
        (leaderless || reached * 2 <= voters).then_some((voters, reached))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(signs: &Signs) -> Vec<Code> {
        judge(signs).into_iter().map(|(code, _)| code).collect()
    }

    #[test]
    fn a_well_node_has_no_problem_and_each_sign_has_its_code() {
        let well = || Signs { has_map: true, ..Signs::default() };
        assert!(codes(&well()).is_empty());
        for (signs, code) in [
            (Signs::default(), Code::NoMap),
            (Signs { stalled: Some(Duration::from_secs(1)), ..well() }, Code::DiskStalled),
            (Signs { room: Room::Low, ..well() }, Code::DiskLow),
            (Signs { room: Room::Critical, ..well() }, Code::DiskFull),
            (Signs { meta: Some((3, 1)), ..well() }, Code::MetaLost),
            (Signs { dead: 2, ..well() }, Code::DeadReplicas),
            (Signs { skew_ms: -501, ..well() }, Code::ClockSkew),
            (Signs { jumped_ms: Some(-9_000), ..well() }, Code::ClockJumped),
            (Signs { upgrade: Some((true, String::new())), ..well() }, Code::MixedVersions),
            (Signs { upgrade: Some((false, String::new())), ..well() }, Code::FinaliseDue),
            (Signs { log_failed: Some("torn".to_owned()), ..well() }, Code::LogFailed),
            (Signs { engine_failed: Some("gone".to_owned()), ..well() }, Code::EngineFailed),
        ] {
            assert_eq!(codes(&signs), [code]);
        }
        assert!(codes(&Signs { skew_ms: 500, ..well() }).is_empty());
    }

    #[test]
    fn a_problem_keeps_its_time_and_services_follow_it() {
        let health = Health::default();
        assert!(!health.serves(Serves::Data) && health.serves(Serves::Peer));
        let (new, passed) = health.set(vec![(Code::MetaLost, "one".to_owned())]);
        assert_eq!((new.len(), passed), (1, vec![Code::NoMap]));
        assert!(health.serves(Serves::Data) && !health.serves(Serves::Admin));
        let since = health.problems()[0].since_ms;
        let (new, passed) = health.set(vec![(Code::MetaLost, "two".to_owned())]);
        assert!(new.is_empty() && passed.is_empty());
        let problem = &health.problems()[0];
        assert_eq!((problem.since_ms, problem.text.as_str()), (since, "two"));
    }

    #[test]
    fn a_clock_that_jumps_is_noticed_for_a_while() {
        let mut wall = Wall::new();
        let (first, begun) = (wall.wall, wall.steady);
        let second = |n: u64| Duration::from_secs(n);
        assert_eq!(wall.at(first + second(1), begun + second(1)), None);
        assert_eq!(wall.at(first + second(31), begun + second(2)), Some(29_000));
        assert_eq!(wall.at(first + second(32), begun + second(3)), Some(29_000));
        assert_eq!(wall.at(first + second(22), begun + second(4)), Some(-11_000));
        assert_eq!(wall.at(first + second(722), begun + second(704)), None, "told for ten minutes");
    }
}
