//! Clients of a real cluster who remember what they asked for and what they heard, for [`crate::linear`] to judge.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use pontoon_node::client::{Client, Expect};
use tokio::{sync::watch, task::JoinSet};

use crate::{
    Rng,
    linear::{self, Act, Op, Value, Verdict},
};

/// Operations after which clients leave a key alone, so that its history stays short.
const KEY_OPS: u64 = 120;

/// By predicate and key.
type Keys = BTreeMap<(String, String), Vec<Op>>;

#[derive(Default)]
struct Shared {
    keys: Mutex<Keys>,
    moments: AtomicU64,
    values: AtomicU64,
    answered: AtomicU64,
    unknown: AtomicU64,
}

impl Shared {
    /// A number for an event; of two events the later has the higher one.
    fn moment(&self) -> u64 {
        self.moments.fetch_add(1, Ordering::SeqCst)
    }

    fn change(&self, key: &(String, String), change: impl FnOnce(&mut Vec<Op>)) {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        change(keys.entry(key.clone()).or_default());
    }
}

/// Clients that write, compare and set, and read the same few keys of some predicates.
pub struct Histories {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    clients: JoinSet<()>,
}

/// What was judged.
#[derive(Debug, Clone, Copy, Default)]
pub struct Judged {
    /// Keys.
    pub keys: usize,
    /// Operations that were answered.
    pub answered: u64,
    /// Operations whose outcome nobody knows.
    pub unknown: u64,
}

impl Histories {
    /// Starts so many clients for each predicate, drawn from this seed.
    pub fn start(client: &Client, predicates: &[String], clients: u64, seed: u64) -> Histories {
        Histories::start_from(client, predicates, clients, seed, 0, Duration::ZERO)
    }

    /// The same with keys from this number on: whoever starts again does so far above the keys of before. After each operation a
    /// client rests for up to `rest`.
    pub fn start_from(
        client: &Client,
        predicates: &[String],
        clients: u64,
        seed: u64,
        first_key: u64,
        rest: Duration,
    ) -> Histories {
        let mut histories =
            Histories { shared: Arc::default(), stop: watch::Sender::new(false), clients: JoinSet::new() };
        for (nth, predicate) in predicates.iter().enumerate() {
            let turn = Arc::new(AtomicU64::new(first_key * KEY_OPS));
            for id in 0..clients {
                let rng = Rng::new(seed ^ ((nth as u64) << 32) ^ id);
                let run = run(
                    client.clone(),
                    predicate.clone(),
                    histories.shared.clone(),
                    turn.clone(),
                    histories.stop.subscribe(),
                    rng,
                    rest,
                );
                histories.clients.spawn(run);
            }
        }
        histories
    }

    /// Ends the clients and judges every key.
    ///
    /// # Panics
    /// If a history cannot be explained, with the history.
    pub async fn judge(mut self) -> Judged {
        self.stop.send_replace(true);
        while let Some(ended) = self.clients.join_next().await {
            ended.expect("a client does not panic");
        }
        let keys = std::mem::take(&mut *self.shared.keys.lock().unwrap_or_else(PoisonError::into_inner));
        for ((predicate, key), history) in &keys {
            let verdict = linear::check(history);
            assert_eq!(verdict, Verdict::Linearizable, "the history of {key} of {predicate}: {history:#?}");
        }
        Judged {
            keys: keys.len(),
            answered: self.shared.answered.load(Ordering::Relaxed),
            unknown: self.shared.unknown.load(Ordering::Relaxed),
        }
    }
}

async fn run(
    client: Client,
    predicate: String,
    shared: Arc<Shared>,
    turn: Arc<AtomicU64>,
    stop: watch::Receiver<bool>,
    mut rng: Rng,
    rest: Duration,
) {
    let mut known: (String, Option<Value>) = Default::default();
    while !*stop.borrow() {
        let key = format!("history/{}", turn.fetch_add(1, Ordering::Relaxed) / KEY_OPS);
        if known.0 != key {
            known = (key.clone(), None);
        }
        let place = (predicate.clone(), key.clone());
        let value = shared.values.fetch_add(1, Ordering::Relaxed) as Value + 1;
        let text = |value: Value| Bytes::from(value.to_string());
        let draw = rng.below(10);
        let act = match draw {
            0..4 => Act::Read(0),
            4..7 => Act::Swap(known.1.unwrap_or(0), value),
            _ => Act::Write(value),
        };
        let call = shared.moment();
        let mut at = 0;
        shared.change(&place, |history| {
            at = history.len();
            history.push(Op { call, answer: None, act });
        });
        let outcome: Result<Act, ()> = match act {
            Act::Read(_) => match client.get(&predicate, key.clone()).await {
                Ok(row) => Ok(Act::Read(row.map_or(0, |row| number(&row.value)))),
                Err(_) => Err(()),
            },
            Act::Write(value) => {
                let put = client.put(&predicate, key.clone(), text(value)).await;
                put.map(|_| act).map_err(|_| ())
            }
            Act::Swap(old, new) => {
                let expect = if old == 0 { Expect::Absent } else { Expect::Value(text(old)) };
                match client.cas(&predicate, key.clone(), expect, Some(text(new))).await {
                    Ok(written) if written.applied => Ok(act),
                    Ok(written) => {
                        Ok(Act::Read(written.results.first().map_or(0, |found| number(&found.current))))
                    }
                    Err(_) => Err(()),
                }
            }
        };
        match outcome {
            Ok(act) => {
                let answer = shared.moment();
                shared.change(&place, |history| {
                    (history[at].answer, history[at].act) = (Some(answer), act);
                });
                shared.answered.fetch_add(1, Ordering::Relaxed);
                known.1 = Some(match act {
                    Act::Read(value) | Act::Write(value) | Act::Swap(_, value) => value,
                });
            }
            Err(()) => drop(shared.unknown.fetch_add(1, Ordering::Relaxed)),
        }
        pause(&mut rng, rest).await;
    }
}

/// Rests for a while, at most so long.
pub(crate) async fn pause(rng: &mut Rng, most: Duration) {
    let micros = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
    if micros > 0 {
        tokio::time::sleep(Duration::from_micros(rng.below(micros))).await;
    }
}

/// A value of a row; nothing there is 0.
fn number(value: &[u8]) -> Value {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}
