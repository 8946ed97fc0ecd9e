//! raft-engine behind the same door.

use std::{
    path::Path,
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread::JoinHandle,
};

use raft::eraftpb::{Entry, HardState};
use raft_engine::{Config, Engine as RaftEngine, LogBatch, MessageExt, ReadableSize};

use crate::{
    engine::Engine,
    work::{Item, Outcome},
};

/// The key of a group's hard state.
const HARD_STATE: &[u8] = b"h";

#[derive(Clone)]
struct Message;

impl MessageExt for Message {
    type Entry = Entry;

    fn index(entry: &Entry) -> u64 {
        entry.index
    }
}

type Job = (LogBatch, SyncSender<Result<(), String>>);

pub(crate) struct Peer {
    engine: std::sync::Arc<RaftEngine>,
    sync: bool,
    merger: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    /// `tuned`: files are filled ahead and recycled, no compression. `merged`: one thread writes for all.
    pub(crate) fn open(dir: &Path, tuned: bool, merged: bool, sync: bool, file_bytes: u64) -> Outcome<Peer> {
        let mut config = Config { dir: dir.join("raft-engine").display().to_string(), ..Config::default() };
        if file_bytes > 0 {
            config.target_file_size = ReadableSize(file_bytes);
        }
        if tuned {
            config.batch_compression_threshold = ReadableSize(0);
            config.enable_log_recycle = true;
            config.prefill_for_recycle = true;
            config.purge_threshold = ReadableSize::mb(512);
            config.prefill_limit = Some(ReadableSize::gb(1));
        }
        let engine = std::sync::Arc::new(RaftEngine::open(config)?);
        let mut peer = Peer { engine, sync, merger: None, thread: None };
        if merged {
            let (sender, jobs) = channel();
            let engine = peer.engine.clone();
            peer.merger = Some(sender);
            peer.thread = Some(std::thread::spawn(move || merge(&engine, &jobs, sync)));
        }
        Ok(peer)
    }
}

/// Takes whatever waits, writes it as one batch, answers each.
fn merge(engine: &RaftEngine, jobs: &Receiver<Job>, sync: bool) {
    let mut carried = None;
    while let Some((mut batch, done)) = carried.take().or_else(|| jobs.recv().ok()) {
        let mut waiting = vec![done];
        while let Ok((mut more, done)) = jobs.try_recv() {
            // A batch that does not fit any more opens the next write.
            if batch.merge(&mut more).is_err() {
                carried = Some((more, done));
                break;
            }
            waiting.push(done);
        }
        let result = engine.write(&mut batch, sync).map(drop).map_err(|error| error.to_string());
        for done in waiting {
            // Whoever does not wait any more has ended.
            let _ = done.send(result.clone());
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.merger = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

impl Engine for Peer {
    fn write(&self, items: &[Item]) -> Outcome<()> {
        let mut batch = LogBatch::with_capacity(items.len() * 2);
        for (group, index, value) in items {
            let mut entry = Entry::new();
            entry.set_index(*index);
            entry.set_term(1);
            entry.set_data(value.clone());
            batch.add_entries::<Message>(*group, &[entry])?;
            let mut state = HardState::new();
            state.set_term(1);
            state.set_vote(1);
            state.set_commit(*index);
            batch.put_message(*group, HARD_STATE.to_vec(), &state)?;
        }
        match &self.merger {
            None => {
                self.engine.write(&mut batch, self.sync)?;
            }
            Some(merger) => {
                let (done, answer) = sync_channel(1);
                merger.send((batch, done))?;
                answer.recv()??;
            }
        }
        Ok(())
    }

    fn truncate(&self, lasts: &[(u64, u64)]) -> Outcome<()> {
        for (group, last) in lasts {
            self.engine.compact_to(*group, *last);
        }
        Ok(())
    }

    fn collect(&self) -> Outcome<()> {
        self.engine.purge_expired_files()?;
        Ok(())
    }

    fn read(&self, group: u64, low: u64, high: u64) -> Outcome<usize> {
        let mut entries: Vec<Entry> = Vec::new();
        Ok(self.engine.fetch_entries_to::<Message>(group, low, high, None, &mut entries)?)
    }
}
