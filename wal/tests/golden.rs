//! Golden scripts: what a person would type, and what the log answers. `REWRITE=1` writes the answers anew.

#![expect(clippy::disallowed_methods, reason = "a test looks at files")]

use std::{fmt::Write, fs, path::Path, sync::Arc};

use pontoon_wal::{
    Batch, ConfState, Entry, GroupId, HardState, KeyId, KeySet, Persisted, RecoveryReport, Result,
    SnapshotMeta, Wal, sim::SimFs,
};

#[path = "support/lib.rs"]
mod support;

use support::{HandClock, Told, encrypt, key, open};

/// A log that commands act on.
struct Session {
    fs: SimFs,
    clock: Arc<HandClock>,
    wal: Option<Wal>,
    told: Arc<Told>,
    keys: Option<Arc<KeySet>>,
}

impl Session {
    fn run(&mut self, line: &str, out: &mut String) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [command, args @ ..] = &words[..] else { return };
        let answer = match *command {
            "open" => self.open(),
            "close" => self.wal.take().expect("open").close().map(|()| String::new()),
            "kill" => {
                drop(self.wal.take());
                self.fs.kill();
                Ok(String::new())
            }
            "crash" => {
                drop(self.wal.take());
                self.fs.crash(number(args[0]));
                Ok(String::new())
            }
            "submit" => self.submit(&args.join(" ")),
            "group" => Ok(self.describe(group(args[0]))),
            "entries" => self.entries(group(args[0])),
            "groups" => {
                Ok(format!("{:?}\n", self.wal().groups().iter().map(|g| g.to_string()).collect::<Vec<_>>()))
            }
            "keys" => {
                // Number and every byte of each; the last one is current.
                let keys = args.iter().filter_map(|word| word.split_once(':'));
                let mut keys = keys.map(|(id, byte)| (KeyId(number(id) as u32), key(number(byte) as u32).1));
                self.keys = keys.next().map(|(id, key)| Arc::new(KeySet::new(id, key)));
                keys.for_each(|(id, key)| self.keys.iter().for_each(|set| set.add(id, key.clone())));
                encrypt(self.keys.clone());
                Ok(String::new())
            }
            "add-key" => {
                let (id, key) = key(number(args[0]) as u32);
                self.keys.as_ref().expect("keys come first").add(id, key);
                Ok(String::new())
            }
            "rotate" => self.wal().rotate_key().map(|id| format!("current {id:?}\n")),
            "keys-in-use" => Ok(format!("{:?}\n", self.wal().key_ids_in_use())),
            "collect" => self.wal().gc_once().map(|_| String::new()),
            _ => self.commit(line),
        };
        match answer {
            Ok(text) => out.push_str(&text),
            Err(error) => writeln!(out, "error: {error}").unwrap(),
        }
    }

    fn wal(&self) -> &Wal {
        self.wal.as_ref().expect("open comes first")
    }

    fn open(&mut self) -> Result<String> {
        let (wal, report) = open(&self.fs, &self.clock, 11)?;
        let RecoveryReport { created, frames, records, torn, damaged_groups, .. } = report;
        self.wal = Some(wal);
        Ok(format!(
            "created {created}, {frames} frames, {records} records, torn {}, damaged {damaged_groups:?}\n",
            torn.is_some()
        ))
    }

    /// Changes parted by `;` are one batch.
    fn commit(&mut self, line: &str) -> Result<String> {
        self.wal().commit(batch(line)).map(|_| String::new())
    }

    /// Hands the batch in and writes it, but takes the power before the sync.
    fn submit(&mut self, line: &str) -> Result<String> {
        let door = self.wal().submitter(self.told.clone());
        let room = door.try_reserve_internal(GroupId(1));
        self.fs.fail_nth(pontoon_wal::sim::OpKind::Sync, 0, pontoon_wal::sim::Fault::PowerCut);
        door.submit(batch(line), room, 1)?;
        while self.wal().step() {}
        let acknowledged: Vec<Persisted> = self.told.persisted.lock().unwrap().clone();
        Ok(format!("acknowledged {}\n", acknowledged.len()))
    }

    fn describe(&self, group: GroupId) -> String {
        let Some(view) = self.wal().group(group) else {
            return format!("{group} does not exist, tombstone {:?}\n", self.wal().tombstone(group));
        };
        let HardState { term, vote, commit } = view.hard_state;
        format!(
            "{group} entries {}..={} last term {} truncated {:?} hard state {term}/{vote}/{commit} snapshot {:?} \
             tombstone {:?} meta k {:?}\n",
            view.first_index,
            view.last_index,
            view.last_term,
            view.truncated,
            view.snapshot.map(|snapshot| (snapshot.index, snapshot.term, snapshot.conf_state.voters)),
            view.tombstone,
            self.wal().meta(group, b"k"),
        )
    }

    fn entries(&self, group: GroupId) -> Result<String> {
        let Some(view) = self.wal().group(group) else { return Ok(String::new()) };
        let mut entries = Vec::new();
        self.wal().entries(group, view.first_index..view.last_index + 1, u64::MAX, &mut entries)?;
        let mut out = String::new();
        for Entry { index, term, data, .. } in entries {
            writeln!(out, "{index} term {term} {data:?}").unwrap();
        }
        Ok(out)
    }
}

fn number(word: &str) -> u64 {
    word.parse().unwrap_or_else(|_| panic!("{word} is not a number"))
}

fn group(word: &str) -> GroupId {
    GroupId(number(word.trim_start_matches('g')))
}

fn batch(line: &str) -> Batch {
    let mut batch = Batch::new();
    for part in line.split(';') {
        let words: Vec<&str> = part.split_whitespace().collect();
        match words[..] {
            ["append", g, low, high, term] => {
                let entries: Vec<Entry> = (number(low)..=number(high))
                    .map(|index| Entry {
                        index,
                        term: number(term),
                        kind: 0,
                        data: format!("{g}/{index}@{term}").into(),
                    })
                    .collect();
                batch.append(group(g), &entries);
            }
            ["hard-state", g, term, vote, commit] => {
                let state = HardState { term: number(term), vote: number(vote), commit: number(commit) };
                batch.hard_state(group(g), state);
            }
            ["truncate", g, index, term] => {
                batch.truncate_prefix(group(g), number(index), number(term));
            }
            ["reset", g, index, term] => {
                batch.reset_to(group(g), number(index), number(term));
            }
            ["snapshot", g, index, term] => {
                let conf_state = ConfState { voters: vec![1, 2, 3], ..ConfState::default() };
                let meta =
                    SnapshotMeta { index: number(index), term: number(term), conf_state, data: "s".into() };
                batch.snapshot(group(g), &meta);
            }
            ["meta", g, key, value] => {
                batch.put_meta(group(g), key.as_bytes(), value.as_bytes());
            }
            ["destroy", g, min_replica] => {
                batch.destroy(group(g), number(min_replica));
            }
            _ => panic!("no such command: {part}"),
        }
    }
    batch
}

/// Runs a script; the text with the answers that the log gave.
fn play(text: &str) -> String {
    let mut session = Session {
        fs: SimFs::new(),
        clock: Arc::new(HandClock::default()),
        wal: None,
        told: Arc::new(Told::default()),
        keys: None,
    };
    encrypt(None);
    let mut out = String::new();
    let (mut answer, mut in_answer) = (String::new(), false);
    for line in text.lines() {
        if in_answer {
            if line.is_empty() {
                in_answer = false;
                out.push('\n');
            }
            continue;
        }
        out.push_str(line);
        out.push('\n');
        if line == "---" {
            out.push_str(&std::mem::take(&mut answer));
            in_answer = true;
        } else if !line.starts_with('#') {
            session.run(line, &mut answer);
        }
    }
    out
}

#[test]
fn scripts_give_the_answers_that_they_state() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let mut paths: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 4);
    for path in paths {
        let expected = fs::read_to_string(&path).unwrap();
        let actual = play(&expected);
        if std::env::var_os("REWRITE").is_some() {
            fs::write(&path, actual).unwrap();
        } else {
            assert_eq!(actual, expected, "{}", path.display());
        }
    }
}
