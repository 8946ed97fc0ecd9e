//! The audit log: who changed what in the cluster by way of this node, from where, when, and how it ended.
//!
//! ```text
//!  gate ── denied ──┐
//!  AdminService ── begin … end ──> Trail ── one JSON line, synced ──> DIR/audit.log, .1, … .8
//! ```
//!
//! - A line is durable before the caller hears how its action ended. An action whose caller does not wait is written, too.
//! - Each node writes what came to it. What another node passed on is marked so: the node that was asked first has the name of
//!   who asked.
//! - A log that cannot be written stops nobody: it is a problem that `pontoon status` and `pontoon nodes` show until a line is
//!   written again.

mod ask;
mod facts;
mod file;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use pontoon_proto::{NodeId, v1};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tonic::{Code, Status};
use tracing::error;

pub(crate) use facts::Audited;
pub use file::{AuditError, read};

use crate::{caller::Caller, clock::unix_ms};

/// The same denial is written once in so long: whoever is denied a thousand times a second must not push older lines out.
const DENIED_EVERY: Duration = Duration::from_secs(60);
const DENIED_KINDS_MOST: usize = 1_024;
/// A fact or a reason longer than this is cut.
const WORDS_MOST: usize = 1_024;

/// One line of the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AuditEntry {
    /// The number of the line in the log of its node, from 1, without gaps.
    pub seq: u64,
    /// When the action ended, RFC 3339, by the node's clock.
    pub when: String,
    /// The node that was asked.
    pub node: u64,
    /// Role and name of who asked, `n3` for a node, `local` without TLS.
    pub who: String,
    /// Where they called from.
    pub from: String,
    /// The action: the name of its method.
    pub what: String,
    /// What it was about.
    #[serde(default)]
    pub facts: BTreeMap<String, String>,
    /// `done`, `refused`, `failed`, `denied`, or `unknown` if the caller did not wait for the end.
    pub result: String,
    /// Why it did not end well; empty if it did.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Whether a node passed the action on for somebody: the node that was asked first has the name.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub passed_on: bool,
}

/// The audit log of a node.
#[derive(Debug, Clone)]
pub(crate) struct Audit {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: NodeId,
    dir: PathBuf,
    trail: Mutex<file::Trail>,
    problem: Mutex<Option<String>>,
    denied: Mutex<HashMap<(String, String), Instant>>,
}

impl Audit {
    /// Opens the log in a data directory; that it cannot be written is told by [`Audit::problem`]. Blocks.
    pub(crate) fn open(dir: PathBuf, node: NodeId) -> Audit {
        let (trail, problem) = file::Trail::open(&dir);
        let inner = Inner {
            node,
            dir,
            trail: Mutex::new(trail),
            problem: Mutex::default(),
            denied: Mutex::default(),
        };
        inner.tell(problem);
        Audit { inner: Arc::new(inner) }
    }

    /// Why the log cannot be written, with the next step; `None` if it can.
    pub(crate) fn problem(&self) -> Option<String> {
        self.inner.problem.lock().expect(UNPOISONED).clone()
    }

    /// An action begins. `None` if it changes nothing.
    pub(crate) fn begin<R: Audited>(&self, caller: &Caller, request: &R) -> Option<Open> {
        let facts = request.facts()?;
        let facts = facts.into_iter().map(|(name, fact)| (name.to_owned(), cut(fact))).collect();
        let passed_on =
            request.passed_on() && caller.role().is_none_or(|role| role == crate::roles::Role::Node);
        let entry = self.inner.entry(caller, R::WHAT, facts, passed_on);
        Some(Open { inner: self.inner.clone(), entry: Some(entry) })
    }

    /// A call was not allowed. Does not wait for the disk.
    pub(crate) fn denied(&self, caller: &Caller, path: &str, status: &Status) {
        let what = path.rsplit('/').next().unwrap_or(path).to_owned();
        {
            let mut denied = self.inner.denied.lock().expect(UNPOISONED);
            if denied.len() >= DENIED_KINDS_MOST {
                denied.retain(|_, at| at.elapsed() < DENIED_EVERY);
            }
            let kind = (caller.to_string(), cut(path.to_owned()));
            let lately = denied.get(&kind).is_some_and(|at| at.elapsed() < DENIED_EVERY);
            if lately || denied.len() >= DENIED_KINDS_MOST {
                return;
            }
            denied.insert(kind, Instant::now());
        }
        let mut entry = self.inner.entry(caller, &cut(what), BTreeMap::new(), false);
        entry.result = "denied".to_owned();
        entry.reason = cut(status.message().to_owned());
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || inner.append(entry));
    }

    /// The latest lines above `after`, at most `limit`, the oldest first.
    pub(crate) async fn latest(&self, after: u64, limit: usize) -> Result<Vec<AuditEntry>, Status> {
        let dir = self.inner.dir.clone();
        tokio::task::spawn_blocking(move || read(&dir, after, limit))
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| Status::internal(error.to_string()))
    }
}

impl Inner {
    fn entry(
        &self,
        caller: &Caller,
        what: &str,
        facts: BTreeMap<String, String>,
        passed_on: bool,
    ) -> AuditEntry {
        AuditEntry {
            seq: 0,
            when: String::new(),
            node: self.node.get(),
            who: caller.to_string(),
            from: caller.address.map_or_else(|| "-".to_owned(), |address| address.to_string()),
            what: what.to_owned(),
            facts,
            result: "unknown".to_owned(),
            reason: String::new(),
            passed_on,
        }
    }

    fn append(&self, mut entry: AuditEntry) {
        let now = time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms()) * 1_000_000);
        entry.when = now
            .ok()
            .and_then(|now| now.format(&time::format_description::well_known::Rfc3339).ok())
            .unwrap_or_default();
        let done = self.trail.lock().expect(UNPOISONED).append(entry);
        self.tell(done.err());
    }

    fn tell(&self, failed: Option<AuditError>) {
        let mut problem = self.problem.lock().expect(UNPOISONED);
        *problem = failed.map(|failed| {
            let text = failed.to_string();
            if problem.as_ref() != Some(&text) {
                error!(problem = text, "the audit log is not written");
            }
            text
        });
    }
}

/// An action under way. It is written at its end, or when it is dropped because nobody waits for that.
#[derive(Debug)]
pub(crate) struct Open {
    inner: Arc<Inner>,
    entry: Option<AuditEntry>,
}

impl Open {
    /// Writes how it ended. The line is durable on return.
    pub(crate) async fn end<T>(mut self, result: &Result<T, Status>) {
        let Some(mut entry) = self.entry.take() else { return };
        entry.result = match result {
            Ok(_) => "done",
            Err(status) if refused(status.code()) => "refused",
            Err(_) => "failed",
        }
        .to_owned();
        entry.reason =
            result.as_ref().err().map(|status| cut(status.message().to_owned())).unwrap_or_default();
        let (inner, (told, written)) = (self.inner.clone(), oneshot::channel::<()>());
        tokio::task::spawn_blocking(move || {
            inner.append(entry);
            drop(told);
        });
        // Nothing is sent: the end of the channel is the word.
        drop(written.await);
    }
}

/// Passes a result on once it is written how the action ended.
pub(crate) async fn ended<T>(open: Option<Open>, result: Result<T, Status>) -> Result<T, Status> {
    if let Some(open) = open {
        open.end(&result).await;
    }
    result
}

impl Drop for Open {
    fn drop(&mut self) {
        let Some(entry) = self.entry.take() else { return };
        let inner = self.inner.clone();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || inner.append(entry))),
            Err(_) => inner.append(entry),
        }
    }
}

fn refused(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::ResourceExhausted
    )
}

fn cut(mut words: String) -> String {
    if words.len() > WORDS_MOST {
        let end = (0..=WORDS_MOST).rev().find(|&end| words.is_char_boundary(end)).unwrap_or(0);
        words.truncate(end);
        words.push('…');
    }
    words
}

impl From<AuditEntry> for v1::AuditEntry {
    fn from(entry: AuditEntry) -> Self {
        v1::AuditEntry {
            seq: entry.seq,
            when: entry.when,
            node: entry.node,
            who: entry.who,
            from: entry.from,
            what: entry.what,
            facts: entry.facts.into_iter().collect(),
            result: entry.result,
            reason: entry.reason,
            passed_on: entry.passed_on,
        }
    }
}

impl From<v1::AuditEntry> for AuditEntry {
    fn from(entry: v1::AuditEntry) -> Self {
        AuditEntry {
            seq: entry.seq,
            when: entry.when,
            node: entry.node,
            who: entry.who,
            from: entry.from,
            what: entry.what,
            facts: entry.facts.into_iter().collect(),
            result: entry.result,
            reason: entry.reason,
            passed_on: entry.passed_on,
        }
    }
}

const UNPOISONED: &str = "the lock's holders do not panic";
