//! From what the floors tell to the lines of the page.

use std::sync::atomic::Ordering;

use pontoon_proto::v1::MovePhase;
use pontoon_raftstore::Class;

use super::{page::Page, table::*};
use crate::{
    health::Code,
    shared::Shared,
    space::Seen,
    stats::{Asked, Ended},
};

pub(super) fn node(page: &mut Page, shared: &Shared) {
    let (own, engine) = (shared.own.get().to_string(), shared.engine.to_string());
    let labels = [("node", own.as_str()), ("version", env!("CARGO_PKG_VERSION")), ("engine", &engine)];
    page.put_with(&INFO, &labels, 1);
    page.put(&UPTIME, shared.started.elapsed().as_secs_f64());
    let problems = shared.health.problems();
    page.put(&READY, u8::from(shared.not_ready().is_none()));
    for code in Code::ALL {
        let has = problems.iter().any(|problem| problem.code == code);
        page.put_with(&PROBLEM, &[("code", code.word())], u8::from(has));
    }
    let Seen { disk, room } = shared.space.seen();
    page.put(&DISK_FREE, disk.free);
    page.put(&DISK_TOTAL, disk.total);
    page.put(&DISK_ROOM, room as u8);
    page.put(&CLOCK_SKEW, shared.raft.stats().clock_skew_ms as f64 / 1_000.0);
    page.put(&MAP_VERSION, shared.map.view().version());
    page.put(&META_LEADER, u8::from(shared.meta_term().is_some()));
    page.put(&CLUSTER_VERSION, shared.map.view().cluster_version());
    page.put(&NEWEST_VERSION, shared.versions.newest);
}

pub(super) fn port(page: &mut Page, shared: &Shared) {
    for (why, count) in shared.turned_away.counts() {
        page.put_with(&TURNED_AWAY, &[("why", &why)], count);
    }
    page.put(&CERTIFICATE_EXPIRES, shared.tls.as_ref().map_or(0, |tls| tls.now().expires));
    page.put(&AUDIT_WRITTEN, u8::from(shared.audit.problem().is_none()));
}

pub(super) fn clients(page: &mut Page, shared: &Shared) {
    for asked in Asked::ALL {
        for ended in Ended::ALL {
            let labels = [("call", asked.word()), ("ended", ended.word())];
            page.put_with(&CALLS, &labels, shared.counted.calls(asked, ended));
        }
    }
    page.times(&WRITES, &[], &shared.counted.writes.copy());
    page.times(&READS, &[], &shared.counted.reads.copy());
    let view = shared.map.view();
    let busiest: Vec<_> = shared
        .meter
        .busiest(shared.top_groups)
        .into_iter()
        .map(|(group, writes, reads)| {
            let predicate = view.shard(group).map(|shard| shard.predicate.clone()).unwrap_or_default();
            (group.0.to_string(), predicate, writes, reads)
        })
        .collect();
    for (group, predicate, writes, _) in &busiest {
        page.put_with(&GROUP_WRITES, &[("group", group), ("predicate", predicate)], writes);
    }
    for (group, predicate, _, reads) in &busiest {
        page.put_with(&GROUP_READS, &[("group", group), ("predicate", predicate)], reads);
    }
}

pub(super) fn log(page: &mut Page, shared: &Shared) {
    let log = shared.wal.metrics();
    page.put(&WAL_BATCHES, log.batches);
    page.put(&WAL_RECORDS, log.records);
    page.put(&WAL_BATCH_BYTES, log.batch_bytes);
    page.put(&WAL_FRAMES, log.frames);
    page.put(&WAL_FRAME_BYTES, log.frame_bytes);
    page.times(&WAL_SYNC, &[], &log.frame_latency);
    page.put(&WAL_QUEUED, log.queued_batches);
    page.put(&WAL_QUEUED_BYTES, log.queued_bytes);
    page.put(&WAL_UNDER_WAY, log.frames_under_way);
    page.put(&WAL_STALLS, log.stalls);
    page.put(&WAL_ROTATIONS, log.rotations);
    page.put(&WAL_WAITED, log.rotations_waited);
    page.put(&WAL_CHECKPOINTS, log.checkpoints);
    page.put_with(&WAL_CACHE, &[("found", "yes")], log.cache_hits);
    page.put_with(&WAL_CACHE, &[("found", "no")], log.cache_misses);
    page.put(&WAL_READ_BYTES, log.read_bytes);
    let usage = log.usage;
    let states = [
        ("written", usage.segments),
        ("relocated", usage.cold_segments),
        ("ready", usage.prepared),
        ("free", usage.free),
    ];
    for (state, count) in states {
        page.put_with(&WAL_SEGMENTS, &[("state", state)], count);
    }
    page.put(&WAL_DISK, usage.disk_bytes);
    page.put(&WAL_LIVE, usage.live_bytes);
    page.put(&WAL_PINNED, log.pinned_bytes);
    page.put(&WAL_GROUPS, usage.groups);
}

pub(super) fn runtime(page: &mut Page, shared: &Shared) {
    let raft = shared.raft.stats();
    page.put(&RAFT_TURNS, raft.turns);
    page.put(&RAFT_INPUTS, raft.inputs);
    page.put(&RAFT_PROPOSALS, raft.proposals);
    page.put(&RAFT_BUSY, raft.refused_at_the_door);
    page.put(&RAFT_DROPPED, raft.messages_dropped);
    page.put(&RAFT_REFUSED, raft.messages_refused);
    page.put(&RAFT_LEADERS, raft.leader_changes);
    page.put(&RAFT_APPLIED, raft.applied_entries);
    page.times(&RAFT_APPLY, &[], &raft.apply_times);
    page.put(&RAFT_QUEUED, raft.queued_inputs);
    page.put(&RAFT_QUEUED_BYTES, raft.queued_peer_bytes);
    page.put(&RAFT_QUEUED_APPLIES, raft.queued_applies);
    page.put(&RAFT_UNAPPLIED, raft.unapplied_bytes);
    page.put(&RAFT_OWED, raft.owed.as_secs_f64());
    page.put(&SNAPSHOTS, raft.snapshots_installed);
    page.put(&SNAPSHOT_BYTES, raft.snapshot_bytes);
}

pub(super) fn groups(page: &mut Page, shared: &Shared) {
    let (view, roles, raft) = (shared.map.view(), shared.raft.roles(), shared.raft.stats());
    page.put(&GROUPS, view.map().shards.len());
    let under = view.map().shards.iter().filter(|shard| view.under_replicated(shard)).count();
    page.put(&UNDER_REPLICATED, under);
    let by_role = [
        ("leader", roles.leaders),
        ("follower", roles.followers),
        ("learner", roles.learners),
        ("candidate", roles.candidates),
        ("dead", roles.dead),
    ];
    for (role, count) in by_role {
        page.put_with(&REPLICAS, &[("role", role)], count);
    }
    page.put(&SLEEPING, roles.sleeping);
    page.put(&AWAKE, raft.awake);
    page.put(&UNOPENED, raft.unopened);
    page.put(&LEADERLESS, roles.without_leader);
    page.put(&RECEIVING, roles.receiving);
    page.put(&LAG, roles.lag_entries);
    page.put(&LAG_MOST, roles.lag_entries_most);
}

pub(super) fn moves(page: &mut Page, shared: &Shared) {
    let view = shared.map.view();
    page.put(&MOVES, view.map().moves.len());
    page.put(&MOVES_STUCK, view.map().moves.iter().filter(|mv| mv.stuck).count());
    let (done, aborted) = shared.counted.moves();
    page.put_with(&MOVES_ENDED, &[("how", "done")], done);
    page.put_with(&MOVES_ENDED, &[("how", "aborted")], aborted);
    for (phase, times) in shared.counted.phases() {
        page.times(&MOVE_PHASE, &[("phase", &phase_word(phase))], &times);
    }
}

fn phase_word(phase: MovePhase) -> String {
    phase.as_str_name().trim_start_matches("MOVE_PHASE_").to_lowercase().replace('_', "-")
}

pub(super) fn backups(page: &mut Page, shared: &Shared) {
    page.put(&BACKUPS, shared.backups.active());
    page.put(&BACKUP_BYTES, shared.backups.given_bytes.load(Ordering::Relaxed));
    page.put(&BACKUP_DONE, shared.backups.last_done.load(Ordering::Relaxed));
}

pub(super) fn engine(page: &mut Page, shared: &Shared) {
    let groups = shared.raft.groups();
    page.put(&ENGINE_ROWS, groups.iter().map(|&group| shared.machines.usage(group)).sum::<u64>());
    let engine = shared.machines.shards().engine_stats();
    page.put(&ENGINE_DISK, engine.disk_bytes);
    page.put(&ENGINE_JOURNAL, engine.journal_bytes);
    page.put(&ENGINE_BUFFERED, engine.buffered_bytes);
    page.put(&ENGINE_COMPACTING, engine.compactions_active);
    page.put(&ENGINE_COMPACTIONS, engine.compactions);
    page.times(&ENGINE_FLUSH, &[], &shared.raft.stats().flush_times);
}

pub(super) fn transport(page: &mut Page, shared: &Shared) {
    let links = shared.transport.links();
    let mut each = |metric, value: fn(&crate::transport::LinkView) -> u64| {
        for link in &links {
            let peer = link.peer.get().to_string();
            page.put_with(metric, &[("peer", &peer), ("class", class_word(link.class))], value(link));
        }
    };
    each(&PEER_CONNECTED, |link| u64::from(link.connected));
    each(&PEER_QUEUED, |link| link.queued_bytes as u64);
    each(&PEER_SENT, |link| link.sent_bytes);
    each(&PEER_DROPPED, |link| link.dropped);
}

fn class_word(class: Class) -> &'static str {
    match class {
        Class::Control => "control",
        Class::Append => "append",
        Class::Snapshot => "snapshot",
    }
}
