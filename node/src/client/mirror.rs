//! Mirrors: a log of one cluster that becomes the copy of a log of another, record by record, at the same offsets.
//!
//! The copy's own end is the position: nothing else is kept. Every append carries the offset that it expects, so
//! whatever happened to an earlier one (a lost answer, a process that was killed, a second mirror at work), a record is
//! there once and at its place. Whoever begins compares the copy's last record with the original's first.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{Mutex, watch},
    task::JoinSet,
    time::sleep,
};

use super::{Client, ClientError, Log, log::Bounds};

/// How much one append carries at most. A single larger record travels alone.
const APPEND_BYTES: usize = 1 << 20;
/// Between two attempts to reach a cluster that does not answer.
const PAUSE: Duration = Duration::from_millis(500);

/// Why a mirror cannot go on. What it has copied stays.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum MirrorError {
    /// The original lost records that the copy does not have yet.
    #[error(
        "{from} begins at offset {lowest}, the mirror {to} is at {position}: the records between were truncated before they \
         were copied; `pontoon log reset {to} --at {lowest}` drops the mirror's records and lets it begin there"
    )]
    Truncated {
        /// The original.
        from: String,
        /// The copy.
        to: String,
        /// The original's lowest offset.
        lowest: u64,
        /// The copy's next offset.
        position: u64,
    },
    /// The copy holds something else than the original.
    #[error(
        "the mirror {to} is no copy of {from}: {reason}; mirror into another log with --to NAME, or drop this one's records \
         with `pontoon log reset {to} --at {lowest}`"
    )]
    Diverged {
        /// The original.
        from: String,
        /// The copy.
        to: String,
        /// What differs.
        reason: String,
        /// The original's lowest offset.
        lowest: u64,
    },
    /// A cluster refuses.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// How far a mirror is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mirrored {
    /// The copy's next offset: every record below it that the original had is there, durable.
    pub next: u64,
    /// How many records this run has appended.
    pub appended: u64,
}

/// Copies `from` to the log `to`, which must exist, and goes on with what is appended. Returns when the copy holds every
/// offset below `until`; with `None`, never. `seen` hears of each step.
///
/// A cluster that does not answer is asked again for ever.
///
/// # Errors
/// [`MirrorError::Truncated`] and [`MirrorError::Diverged`] need somebody's hand; [`MirrorError::Client`] is a refusal.
///
/// # Cancel safety
/// Safe: call it again to go on.
pub async fn mirror(
    from: &Log,
    to: &Log,
    until: Option<u64>,
    mut seen: impl FnMut(Mirrored),
) -> Result<Mirrored, MirrorError> {
    let mut done = Mirrored::default();
    loop {
        done.next = begin(from, to).await?;
        seen(done);
        let mut tail = from.tail(done.next);
        while until.is_none_or(|until| done.next < until) {
            let (first, records) = match tail.next_many().await {
                Ok(found) => found,
                Err(error) if passes(&error) => {
                    sleep(PAUSE).await;
                    continue;
                }
                // Truncated or reset under the tail: the next beginning says which, by name.
                Err(ClientError::NoSuchOffset { .. }) => break,
                Err(error) => return Err(error.into()),
            };
            let left = until.map_or(u64::MAX, |until| until - first);
            let take = records.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match append_all(to, first, &records[..take], &mut done).await {
                Ok(()) => seen(done),
                // Whether it was appended shows at the next beginning: the copy's end is the position.
                Err(error) if passes(&error) => {
                    sleep(PAUSE).await;
                    break;
                }
                Err(ClientError::UnexpectedOffset { .. }) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if until.is_some_and(|until| done.next >= until) {
            return Ok(done);
        }
    }
}

/// Where to go on, after a look at whether the copy is one.
async fn begin(from: &Log, to: &Log) -> Result<u64, MirrorError> {
    let source = patiently(|| from.bounds()).await?;
    let copy = patiently(|| to.bounds()).await?;
    let names = || (from.name().to_owned(), to.name().to_owned());
    let diverged = |reason: String| {
        let (from, to) = names();
        MirrorError::Diverged { from, to, reason, lowest: source.lowest }
    };
    if copy.next == 0 && source.lowest > 0 {
        // Nothing was ever copied: the copy begins where the original does now.
        return match patiently(|| to.reset_from(0, source.lowest)).await {
            Ok(Bounds { next, .. }) => Ok(next),
            Err(ClientError::UnexpectedOffset { next, .. }) if next == source.lowest => Ok(next),
            Err(ClientError::UnexpectedOffset { next, .. }) => {
                Err(diverged(format!("somebody else has just written to it, it goes on at {next}")))
            }
            Err(error) => Err(error.into()),
        };
    }
    if copy.next > source.next {
        let text =
            format!("it has records up to offset {}, the original goes on at {}", copy.next - 1, source.next);
        return Err(diverged(text));
    }
    if copy.next < source.lowest {
        let (from, to) = names();
        return Err(MirrorError::Truncated { from, to, lowest: source.lowest, position: copy.next });
    }
    if !copy.is_empty() && copy.next > source.lowest {
        let last = copy.next - 1;
        let (ours, theirs) = (patiently(|| to.get(last)).await?, patiently(|| from.get(last)).await?);
        // A record that is gone by now was truncated between two looks: the next one decides.
        if let (Some(ours), Some(theirs)) = (ours, theirs)
            && ours != theirs
        {
            return Err(diverged(format!("the records at offset {last} differ")));
        }
    }
    Ok(copy.next)
}

async fn append_all(to: &Log, first: u64, records: &[Bytes], done: &mut Mirrored) -> Result<(), ClientError> {
    let mut at = 0;
    while at < records.len() {
        let mut bytes = 0;
        let fits = records[at..].iter().take_while(|record| {
            bytes += record.len();
            bytes <= APPEND_BYTES
        });
        let end = at + fits.count().max(1);
        let appended = to.append_at(first + at as u64, records[at..end].iter().cloned()).await?;
        done.next = appended.next;
        done.appended += (end - at) as u64;
        at = end;
    }
    Ok(())
}

/// Asks until a cluster answers.
async fn patiently<T, F: Future<Output = Result<T, ClientError>>>(
    ask: impl Fn() -> F,
) -> Result<T, ClientError> {
    loop {
        match ask().await {
            Err(error) if passes(&error) => sleep(PAUSE).await,
            answer => return answer,
        }
    }
}

/// Whether the cluster may answer later. That an append may have been applied is no error here.
fn passes(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::NobodyAnswers { .. }
            | ClientError::NoMetaLeader { .. }
            | ClientError::Late { .. }
            | ClientError::Unknown { .. }
            | ClientError::SessionExpired { .. }
            | ClientError::DiskFull { .. }
    )
}

/// Mirrors into one cluster, each in a task of its own. They end with the last clone of this.
///
/// # Examples
/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use pontoon_node::client::{Client, Mirror};
///
/// let here = Client::connect(["127.0.0.1:7400"]).await?;
/// let there = Client::connect(["127.0.0.1:8400"]).await?;
/// let mirror = Mirror::into(here);
/// mirror.join("events", there.log("events")).await?;
/// // ...
/// mirror.close().await;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Mirror {
    here: Client,
    running: Arc<Mutex<BTreeMap<String, Running>>>,
}

#[derive(Debug)]
struct Running {
    /// One task, which ends with this.
    task: JoinSet<()>,
    state: watch::Receiver<Result<Mirrored, MirrorError>>,
}

impl Mirror {
    /// Mirrors into logs of this client's cluster. Nothing is copied yet.
    pub fn into(here: Client) -> Self {
        Mirror { here, running: Arc::default() }
    }

    /// Begins to copy a log of another cluster to the log `to` here, which is made if it does not exist, and keeps at it until
    /// [`Mirror::leave`] or [`Mirror::close`]. The watch tells how far it is, or why it cannot go on; its sender goes
    /// with the task. A second call for the same `to` takes the place of the first.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if `to` is the name of something else.
    pub async fn join(
        &self,
        to: &str,
        from: Log,
    ) -> Result<watch::Receiver<Result<Mirrored, MirrorError>>, ClientError> {
        let to = self.here.create_log(to, 0).await?;
        self.leave(to.name()).await;
        let (sender, state) = watch::channel(Ok(Mirrored::default()));
        let name = to.name().to_owned();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let end = mirror(&from, &to, None, |done| {
                drop(sender.send_replace(Ok(done)));
            });
            if let Err(error) = end.await {
                tracing::warn!(log = to.name(), %error, "a mirror cannot go on");
                drop(sender.send_replace(Err(error)));
            }
        });
        let running = Running { task, state: state.clone() };
        self.running.lock().await.insert(name, running);
        Ok(state)
    }

    /// Ends a mirror and returns how far it came; `None` if there was none. The copy stays as it is.
    pub async fn leave(&self, to: &str) -> Option<Result<Mirrored, MirrorError>> {
        let running = self.running.lock().await.remove(to)?;
        Some(running.end().await)
    }

    /// Ends all mirrors.
    pub async fn close(self) {
        let running = std::mem::take(&mut *self.running.lock().await);
        for mirror in running.into_values() {
            drop(mirror.end().await);
        }
    }
}

impl Running {
    async fn end(mut self) -> Result<Mirrored, MirrorError> {
        self.task.shutdown().await;
        self.state.borrow().clone()
    }
}
