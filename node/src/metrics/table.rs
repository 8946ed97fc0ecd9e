//! All metrics, each with its name, what it counts, and the labels that it has.

use std::fmt::Write;

/// How a metric behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Only rises while the process lives.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Times by buckets, in seconds.
    Histogram,
}

impl Kind {
    pub(super) fn word(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Debug)]
pub(super) struct Metric {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) labels: &'static [&'static str],
    pub(super) help: &'static str,
}

macro_rules! metrics {
    ($($section:literal { $($id:ident = $kind:ident $name:literal [$($label:literal),*] $help:literal;)* })*) => {
        $($(pub(super) const $id: Metric =
            Metric { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help };)*)*

        const SECTIONS: &[(&str, &[Metric])] = &[$(($section, &[$($id),*])),*];
    };
}

metrics! {
    "The node" {
        INFO = Gauge "pontoon_info" ["node", "version", "engine"] "Always 1; who this is.";
        UPTIME = Gauge "pontoon_uptime_seconds" [] "Since the node started.";
        READY = Gauge "pontoon_ready" [] "1 if the node serves clients as it should, as /readyz says.";
        PROBLEM = Gauge "pontoon_problem" ["code"] "1 while the node has this problem; `pontoon status --problems` says what to do.";
        DISK_FREE = Gauge "pontoon_disk_free_bytes" [] "Free bytes of the disk that has the least room.";
        DISK_TOTAL = Gauge "pontoon_disk_total_bytes" [] "All bytes of that disk.";
        DISK_ROOM = Gauge "pontoon_disk_room" [] "0 enough room, 1 less than the reserve (no writes are taken), 2 less than half of it.";
        CLOCK_SKEW = Gauge "pontoon_clock_skew_seconds" [] "How far the clock of another node is from the one here, of the node that is farthest; above 0 if it is ahead.";
        MAP_VERSION = Gauge "pontoon_map_version" [] "The version of the cluster's map that this node has.";
        META_LEADER = Gauge "pontoon_meta_leader" [] "1 if this node leads the meta group.";
        CLUSTER_VERSION = Gauge "pontoon_cluster_version" [] "What is turned on in the cluster, as this node has heard.";
        NEWEST_VERSION = Gauge "pontoon_newest_version" [] "The newest cluster version that this node speaks.";
    }
    "The port" {
        TURNED_AWAY = Counter "pontoon_turned_away_total" ["why"] "What was refused at the node's port before it was a call of anybody's, or that its caller may not ask.";
        CERTIFICATE_EXPIRES = Gauge "pontoon_certificate_expires_seconds" [] "Until when the node's certificate is valid, in seconds since 1970; 0 without TLS.";
        AUDIT_WRITTEN = Gauge "pontoon_audit_written" [] "1 while the audit log can be written.";
    }
    "Clients" {
        CALLS = Counter "pontoon_calls_total" ["call", "ended"] "Calls that this node answered, also those that it passed on: done, refused without effect, or failed.";
        WRITES = Histogram "pontoon_write_seconds" [] "From a write's arrival at its leader, here, to its answer.";
        READS = Histogram "pontoon_read_seconds" [] "From a read's arrival at the replica that answers it, here, to its answer.";
        GROUP_WRITES = Gauge "pontoon_group_writes_per_second" ["group", "predicate"] "Writes that this node answers for the busiest groups (metrics.top_groups).";
        GROUP_READS = Gauge "pontoon_group_reads_per_second" ["group", "predicate"] "Reads that this node answers for those groups.";
    }
    "The log" {
        WAL_BATCHES = Counter "pontoon_wal_batches_total" [] "Batches that became durable.";
        WAL_RECORDS = Counter "pontoon_wal_records_total" [] "Their records.";
        WAL_BATCH_BYTES = Counter "pontoon_wal_batch_bytes_total" [] "Their bytes, as they were encoded.";
        WAL_FRAMES = Counter "pontoon_wal_frames_total" [] "Frames that became durable.";
        WAL_FRAME_BYTES = Counter "pontoon_wal_frame_bytes_total" [] "Their bytes on disk.";
        WAL_SYNC = Histogram "pontoon_wal_sync_seconds" [] "From the beginning of a frame's write until it and all before it are durable.";
        WAL_QUEUED = Gauge "pontoon_wal_queued_batches" [] "Batches that wait for a frame.";
        WAL_QUEUED_BYTES = Gauge "pontoon_wal_queued_bytes" [] "Their bytes.";
        WAL_UNDER_WAY = Gauge "pontoon_wal_frames_under_way" [] "Frames on their way to the disk.";
        WAL_STALLS = Counter "pontoon_wal_stalls_total" [] "Times that a write was under way for 100 ms, and then for a second.";
        WAL_ROTATIONS = Counter "pontoon_wal_rotations_total" [] "Changes to another segment.";
        WAL_WAITED = Counter "pontoon_wal_rotations_waited_total" [] "Times that no segment was ready.";
        WAL_CHECKPOINTS = Counter "pontoon_wal_checkpoints_total" [] "Checkpoints that became durable.";
        WAL_CACHE = Counter "pontoon_wal_cache_total" ["found"] "Records of entries that a reader found in memory, or had to read.";
        WAL_READ_BYTES = Counter "pontoon_wal_read_bytes_total" [] "Bytes that were read from disk for readers.";
        WAL_SEGMENTS = Gauge "pontoon_wal_segments" ["state"] "Segments that hold records, those of them that were relocated, those that are ready, and those that wait to be used again.";
        WAL_DISK = Gauge "pontoon_wal_disk_bytes" [] "Bytes of all segment files.";
        WAL_LIVE = Gauge "pontoon_wal_live_bytes" [] "Bytes of entries that can be read.";
        WAL_PINNED = Gauge "pontoon_wal_pinned_bytes" [] "Bytes of segments that their live entries keep from being used again, and that are not those entries.";
        WAL_GROUPS = Gauge "pontoon_wal_groups" [] "Groups that the log holds.";
    }
    "The runtime" {
        RAFT_TURNS = Counter "pontoon_raft_turns_total" [] "Turns of the loops.";
        RAFT_INPUTS = Counter "pontoon_raft_inputs_total" [] "What the loops took in.";
        RAFT_PROPOSALS = Counter "pontoon_raft_proposals_total" [] "Commands that were proposed here.";
        RAFT_BUSY = Counter "pontoon_raft_busy_total" [] "Commands that were refused before they reached a loop, since too much waited.";
        RAFT_DROPPED = Counter "pontoon_raft_messages_dropped_total" [] "Messages of peers that were dropped, since too much waited; peers repeat them.";
        RAFT_REFUSED = Counter "pontoon_raft_messages_refused_total" [] "Messages of peers that made no sense.";
        RAFT_LEADERS = Counter "pontoon_raft_leader_changes_total" [] "Times that a replica here learned of a new leader.";
        RAFT_APPLIED = Counter "pontoon_raft_applied_entries_total" [] "Entries that were applied.";
        RAFT_APPLY = Histogram "pontoon_raft_apply_seconds" [] "How long it took to apply what was ready of a group at a time.";
        RAFT_QUEUED = Gauge "pontoon_raft_queued_inputs" [] "Inputs that wait in front of the loops.";
        RAFT_QUEUED_BYTES = Gauge "pontoon_raft_queued_peer_bytes" [] "Bytes of entries and chunks among them.";
        RAFT_QUEUED_APPLIES = Gauge "pontoon_raft_queued_applies" [] "Pieces of work that wait to be applied.";
        RAFT_UNAPPLIED = Gauge "pontoon_raft_unapplied_bytes" [] "Bytes that are committed and not applied.";
        RAFT_OWED = Gauge "pontoon_raft_sync_owed_seconds" [] "For how long the log has owed a sync.";
        SNAPSHOTS = Counter "pontoon_snapshots_installed_total" [] "States that were received and installed.";
        SNAPSHOT_BYTES = Counter "pontoon_snapshot_bytes_total" [] "Bytes that were received for them.";
    }
    "Groups" {
        GROUPS = Gauge "pontoon_groups" [] "Groups of the cluster, in this node's map.";
        UNDER_REPLICATED = Gauge "pontoon_groups_under_replicated" [] "Those of them with fewer voters than wanted.";
        REPLICAS = Gauge "pontoon_replicas" ["role"] "Replicas here by what they are: leader, follower, learner, candidate, dead.";
        SLEEPING = Gauge "pontoon_replicas_sleeping" [] "Those in whose groups nothing happens.";
        AWAKE = Gauge "pontoon_replicas_awake" [] "Those for which time goes on.";
        UNOPENED = Gauge "pontoon_replicas_unopened" [] "Those that were not opened since the start.";
        LEADERLESS = Gauge "pontoon_replicas_without_leader" [] "Those that know of no leader.";
        RECEIVING = Gauge "pontoon_replicas_receiving" [] "Those that receive a state.";
        LAG = Gauge "pontoon_replica_lag_entries" [] "Entries that are committed and not applied, of all replicas here.";
        LAG_MOST = Gauge "pontoon_replica_lag_entries_max" [] "The same of the replica that has most.";
    }
    "Moves" {
        MOVES = Gauge "pontoon_moves_running" [] "Moves under way in the cluster, in this node's map.";
        MOVES_STUCK = Gauge "pontoon_moves_stuck" [] "Those that wait for somebody's hand.";
        MOVES_ENDED = Counter "pontoon_moves_ended_total" ["how"] "Moves that this node drove to their end: done or aborted.";
        MOVE_PHASE = Histogram "pontoon_move_phase_seconds" ["phase"] "How long a move was in a phase, of the phases that ended while this node drove it.";
    }
    "Backups" {
        BACKUPS = Gauge "pontoon_backups_running" [] "Predicates that are read for a backup here now.";
        BACKUP_BYTES = Counter "pontoon_backup_bytes_total" [] "Bytes of rows that were handed out for backups and exports.";
        BACKUP_DONE = Gauge "pontoon_backup_last_success_seconds" [] "When a backup of all predicates was last told to this node to be done, in seconds since 1970; 0: not since its start.";
    }
    "The engine" {
        ENGINE_ROWS = Gauge "pontoon_engine_rows_bytes" [] "About how many bytes the rows take.";
        ENGINE_DISK = Gauge "pontoon_engine_disk_bytes" [] "Bytes of the engine's files.";
        ENGINE_JOURNAL = Gauge "pontoon_engine_journal_bytes" [] "Bytes of its journals among them.";
        ENGINE_BUFFERED = Gauge "pontoon_engine_buffered_bytes" [] "Bytes that are in memory alone but for the journal.";
        ENGINE_COMPACTING = Gauge "pontoon_engine_compactions_active" [] "Files that are being merged.";
        ENGINE_COMPACTIONS = Counter "pontoon_engine_compactions_total" [] "Such merges.";
        ENGINE_FLUSH = Histogram "pontoon_engine_flush_seconds" [] "How long it took to make applied state durable.";
    }
    "The transport" {
        PEER_CONNECTED = Gauge "pontoon_peer_connected" ["peer", "class"] "1 if the stream to that node stands. Streams for entries and snapshots are made when they are needed.";
        PEER_QUEUED = Gauge "pontoon_peer_queued_bytes" ["peer", "class"] "Bytes that wait for the stream.";
        PEER_SENT = Counter "pontoon_peer_sent_bytes_total" ["peer", "class"] "Bytes that were handed to the stream.";
        PEER_DROPPED = Counter "pontoon_peer_dropped_total" ["peer", "class"] "Batches of messages that were dropped, since the queue was full; Raft repeats them.";
    }
    "The process" {
        PROCESS_CPU_SECONDS = Counter "process_cpu_seconds_total" [] "Time of all cores that the process took.";
        PROCESS_RESIDENT_BYTES = Gauge "process_resident_memory_bytes" [] "Memory that it has.";
        PROCESS_VIRTUAL_BYTES = Gauge "process_virtual_memory_bytes" [] "Addresses that it has.";
        PROCESS_THREADS = Gauge "process_threads" [] "Its threads.";
        PROCESS_OPEN_FDS = Gauge "process_open_fds" [] "Files and sockets that it has open.";
        PROCESS_MAX_FDS = Gauge "process_max_fds" [] "How many it may have open.";
        PROCESS_START_SECONDS = Gauge "process_start_time_seconds" [] "When it started, in seconds since 1970.";
    }
}

/// The page `docs/metrics.md`.
pub fn reference() -> String {
    let mut text = String::from(
        "# Metrics\n\n\
         <!-- Made from the code: REWRITE=1 cargo test -p pontoon-node --test pages -->\n\n\
         Every node serves `/metrics` on its port, in the text format of Prometheus. How many lines there are does not depend on the number\n\
         of groups: these are counted together, and only the busiest (`metrics.top_groups`, ten) have lines of their own. A scrape looks at\n\
         each replica once. `dist/prometheus/alerts.yml` has rules, `dist/grafana/pontoon.json` a dashboard.\n\n\
         Histograms have buckets from 64 µs to 34 s, each bound twice the one before.\n",
    );
    for (section, metrics) in SECTIONS {
        let _ = write!(text, "\n## {section}\n\n| metric | kind | labels | |\n|---|---|---|---|\n");
        for Metric { name, kind, labels, help } in *metrics {
            let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
            let _ = writeln!(text, "| `{name}` | {} | {} | {help} |", kind.word(), labels.join(", "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_their_kind_and_unit() {
        let mut names = std::collections::BTreeSet::new();
        for metric in SECTIONS.iter().flat_map(|(_, metrics)| *metrics) {
            let Metric { name, kind, help, .. } = metric;
            assert!(names.insert(*name), "{name} is there twice");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            assert!(*kind != Kind::Histogram || name.ends_with("_seconds"), "{name}");
            assert!(name.starts_with("pontoon_") || name.starts_with("process_"), "{name}");
            assert!(help.ends_with('.'), "{name}: {help}");
        }
    }
}
