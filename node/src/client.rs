//! A client of a cluster.
//!
//! It keeps the part of the map that it uses (predicate → group, epoch, leader), asks the leader directly and follows
//! `NotLeader`, `NotHere` and `StaleEpoch`. Each write carries a request id (client, session with the group, number);
//! whatever goes wrong on the way, it is sent again with the *same* id until the deadline, so that it is applied once.
//!
//! ```text
//!  put/get/scan/... ──> place of the predicate ──> leader's channel
//!       ▲                    │ refused, broken           │
//!       └── the same id ─────┴── follow the hint, pause ─┘
//! ```
//!
//! ```no_run
//! # async fn run() -> Result<(), pontoon_node::client::ClientError> {
//! use pontoon_node::client::Client;
//!
//! let client = Client::connect(["127.0.0.1:7400"]).await?;
//! client.put("name", "film/1", "Metropolis").await?;
//! assert_eq!(client.get("name", "film/1").await?.unwrap().value, "Metropolis");
//! # Ok(())
//! # }
//! ```

mod admin;
mod ask;
mod error;
mod log;
mod many;
mod members;
mod mirror;
mod place;
mod session;
mod stream;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use dashmap::DashMap;
use pontoon_proto::v1;
use tokio::time::{Instant, timeout};
use tonic::{Code, transport::Channel};
use tracing::Instrument;

pub use error::ClientError;
pub use log::{Appended, Bounds, Log, Records, Tail};
pub use members::Server;
pub use mirror::{Mirror, MirrorError, Mirrored, mirror};

use crate::{
    api::admin_client::AdminClient,
    channels::Channels,
    route::Routed,
    tls::{Dialer, Tls, TlsFiles},
};
use error::words;
use place::{Missing, Place};
use stream::Streams;

/// How long a call may take, retries included, unless [`Client::with_deadline`] says otherwise.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long the first answer of an address may take.
const GREETING: Duration = Duration::from_secs(3);
/// How many predicates and how many addresses a client remembers.
const PLACES_MOST: usize = 65_536;
const ADDRESSES_MOST: usize = 1_024;

/// A client of a cluster. Cheap to clone; the clones share connections, map and sessions.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
    deadline: Duration,
    reads: Reads,
}

/// How a client reaches its cluster.
///
/// # Examples
/// ```no_run
/// # async fn run() -> Result<(), pontoon_node::client::ClientError> {
/// use pontoon_node::{
///     TlsFiles,
///     client::{Client, ConnectOptions},
/// };
///
/// let tls = TlsFiles { cert: "reader-app.pem".into(), key: "reader-app.key".into(), ca: "ca.pem".into() };
/// let client = Client::connect_with(["db1:7400"], ConnectOptions::default().tls(tls)).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ConnectOptions {
    /// The client's certificates; without them only nodes on this machine are reached. New files are taken up by the
    /// connections that are made after they were seen.
    pub tls: Option<TlsFiles>,
}

impl ConnectOptions {
    /// With these certificates.
    #[must_use]
    pub fn tls(mut self, files: TlsFiles) -> Self {
        self.tls = Some(files);
        self
    }
}

/// How fresh reads are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reads {
    /// Every write that was acknowledged before the read is seen. The leader answers.
    #[default]
    Linearizable,
    /// Every write that was acknowledged more than this before the read is seen. The node that the client was given first
    /// answers from its own replica, a learner's too, or passes the read on if it has none.
    Bounded(Duration),
    /// Whatever the replica there has, however old.
    Local,
}

#[derive(Debug)]
struct Inner {
    id: u128,
    channels: Channels,
    streams: Streams,
    places: DashMap<String, Arc<Place>>,
    /// Where nodes listen: what was given, and what answers named since.
    addresses: Mutex<Vec<String>>,
    turn: AtomicUsize,
}

/// What became of a write.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// The log index at which it was applied. The row carries it.
    pub index: u64,
    /// False if a compare-and-set did not hold: then nothing was changed.
    pub applied: bool,
    /// One per operation, in order.
    pub results: Vec<v1::WriteResult>,
}

/// A row of a predicate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its key.
    pub key: Bytes,
    /// Its value.
    pub value: Bytes,
    /// The index at which it was last modified.
    pub modified: u64,
}

/// What a compare-and-set expects to find.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// No row.
    Absent,
    /// A row with this value.
    Value(Bytes),
    /// A row that was last modified at this index.
    Modified(u64),
}

/// Which rows a scan returns, and how many at a time.
#[derive(Debug, Clone, Default)]
pub struct Range {
    /// Only keys that begin so. If it is not empty, `low` and `high` do not count.
    pub prefix: Bytes,
    /// The first key.
    pub low: Bytes,
    /// The first key that is too high; empty: no end.
    pub high: Bytes,
    /// Rows per page, at most 10,000; 0: 1,000.
    pub limit: u32,
    /// Where the last page ended, empty for the first one.
    pub continuation: Bytes,
}

impl Range {
    /// The keys that begin with `prefix`.
    pub fn prefix(prefix: impl Into<Bytes>) -> Self {
        Range { prefix: prefix.into(), ..Range::default() }
    }
}

/// One page of a scan.
#[derive(Debug, Clone)]
pub struct Page {
    /// In ascending order of keys.
    pub rows: Vec<Row>,
    /// Goes into the next page's [`Range`]; empty at the end.
    pub continuation: Bytes,
    /// The index that the page stands at.
    pub index: u64,
}

impl Client {
    /// Connects to the first of the addresses (HOST:PORT) that answers. The others are tried when it is lost.
    ///
    /// # Errors
    /// [`ClientError::NobodyAnswers`] if none does.
    ///
    /// # Cancel safety
    /// Nothing has happened if this is dropped.
    pub async fn connect<A: Into<String>>(
        addresses: impl IntoIterator<Item = A>,
    ) -> Result<Client, ClientError> {
        Client::connect_with(addresses, ConnectOptions::default()).await
    }

    /// The same by TLS.
    ///
    /// # Errors
    /// [`ClientError::Tls`] if the certificates cannot be used, else as [`Client::connect`].
    ///
    /// # Cancel safety
    /// Nothing has happened if this is dropped.
    pub async fn connect_with<A: Into<String>>(
        addresses: impl IntoIterator<Item = A>,
        options: ConnectOptions,
    ) -> Result<Client, ClientError> {
        let tls = match options.tls {
            Some(files) => Some(
                tokio::task::spawn_blocking(move || Tls::open(files))
                    .await
                    .map_err(|error| ClientError::Tls { reason: error.to_string() })?
                    .map_err(|error| ClientError::Tls { reason: error.to_string() })?,
            ),
            None => None,
        };
        Client::through(addresses, Dialer::new(tls)).await
    }

    pub(crate) async fn through<A: Into<String>>(
        addresses: impl IntoIterator<Item = A>,
        dialer: Dialer,
    ) -> Result<Client, ClientError> {
        let addresses: Vec<String> = addresses.into_iter().map(Into::into).collect();
        let inner = Inner {
            id: uuid::Uuid::new_v4().as_u128(),
            channels: Channels::new(dialer),
            streams: Streams::default(),
            places: DashMap::new(),
            addresses: Mutex::new(addresses.clone()),
            turn: AtomicUsize::new(0),
        };
        let client = Client { inner: Arc::new(inner), deadline: DEADLINE, reads: Reads::default() };
        let mut reason = "no address was given".to_owned();
        for address in &addresses {
            match timeout(GREETING, client.greet(address)).await {
                Ok(Ok(())) => return Ok(client),
                // It answers, and so would the others: this caller may not ask.
                Ok(Err(refused @ ClientError::Refused { .. })) => return Err(refused),
                Ok(Err(ClientError::NobodyAnswers { reason: said, .. })) => reason = said,
                Ok(Err(error)) => reason = error.to_string(),
                Err(_) => reason = format!("no answer within {} s", GREETING.as_secs()),
            }
        }
        Err(ClientError::NobodyAnswers { address: addresses.join(", "), reason })
    }

    async fn greet(&self, address: &str) -> Result<(), ClientError> {
        let mut admin = self.admin_at(address)?;
        let status = admin.status(v1::StatusRequest {}).await.map_err(|status| match status.code() {
            Code::PermissionDenied => ClientError::of(&status),
            _ => ClientError::NobodyAnswers { address: address.to_owned(), reason: words(&status) },
        })?;
        for node in status.into_inner().nodes.into_iter().filter_map(|view| view.node) {
            self.learn(&node.address);
        }
        Ok(())
    }

    /// The same client with another limit for each call, retries included.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Client {
        Client { deadline, ..self.clone() }
    }

    /// The same client with other reads: `get`, `scan` and those of logs.
    #[must_use]
    pub fn with_reads(&self, reads: Reads) -> Client {
        Client { reads, ..self.clone() }
    }

    /// Whether reads are refused by whoever does not lead, with a hint.
    fn direct(&self) -> bool {
        self.reads == Reads::Linearizable
    }

    fn freshness(&self) -> Option<v1::Freshness> {
        let level = match self.reads {
            Reads::Linearizable => return None,
            Reads::Bounded(lag) => {
                v1::freshness::Level::MaxLagMs(u64::try_from(lag.as_millis()).unwrap_or(u64::MAX))
            }
            Reads::Local => v1::freshness::Level::Local(true),
        };
        Some(v1::Freshness { level: Some(level) })
    }

    /// Sets the value of a key. The predicate is made if it does not exist.
    ///
    /// On return the write is durable on a quorum and seen by every later read.
    ///
    /// # Errors
    /// [`ClientError::Unknown`] and [`ClientError::SessionExpired`]: the write may or may not have been applied; all
    /// others: it was not.
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the write.
    pub async fn put(
        &self,
        predicate: &str,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<Written, ClientError> {
        self.write(predicate, vec![put(key, value)]).await
    }

    /// Deletes a key, which need not exist. As [`Client::put`] otherwise.
    ///
    /// # Errors
    /// As [`Client::put`].
    pub async fn delete(&self, predicate: &str, key: impl Into<Bytes>) -> Result<Written, ClientError> {
        self.write(predicate, vec![delete(key)]).await
    }

    /// Sets (or with `None` deletes) the value of a key if it is as expected. [`Written::applied`] says whether it was;
    /// if not, the result holds the row as it is.
    ///
    /// # Errors
    /// As [`Client::put`].
    pub async fn cas(
        &self,
        predicate: &str,
        key: impl Into<Bytes>,
        expect: Expect,
        value: Option<Bytes>,
    ) -> Result<Written, ClientError> {
        self.write(predicate, vec![cas(key, expect, value)]).await
    }

    /// Applies one atomic batch to one predicate.
    ///
    /// # Errors
    /// As [`Client::put`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the write.
    pub async fn write(&self, predicate: &str, ops: Vec<v1::WriteOp>) -> Result<Written, ClientError> {
        check_name(predicate)?;
        let place = self.place(predicate);
        let request = |id| v1::WriteRequest {
            predicate: predicate.to_owned(),
            epoch: place.epoch(),
            request: Some(id),
            ops: ops.clone(),
            direct: true,
            hops: 0,
        };
        self.write_once(&place, Missing::Make, request).await.map(written)
    }

    /// Sends a request under one id until it is answered.
    async fn write_once<R: Routed>(
        &self,
        place: &Arc<Place>,
        missing: Missing,
        request: impl Fn(v1::RequestId) -> R,
    ) -> Result<R::Reply, ClientError> {
        let until = Instant::now() + self.deadline;
        loop {
            let ticket = self.ticket(place, missing, until).await?;
            let id = ticket.id();
            // Nodes name the same client and number in their spans.
            let span = tracing::debug_span!(
                "write",
                predicate = place.predicate,
                client = client_word(&id),
                seq = id.seq
            );
            match self.ask_write(place, until, || request(ticket.id())).instrument(span).await {
                // Refused at its first and only sending: it was not applied, and never will be under that id.
                Err(ClientError::SessionExpired { sent_before: false }) => place.end_session(&ticket),
                Err(error) => {
                    if matches!(error, ClientError::SessionExpired { .. }) {
                        place.end_session(&ticket);
                    }
                    return Err(error);
                }
                Ok(reply) => return Ok(reply),
            }
        }
    }

    /// Reads one key, as fresh as [`Client::with_reads`] says. `None`: it has no row.
    ///
    /// # Errors
    /// [`ClientError::NoSuchPredicate`] among others.
    pub async fn get(&self, predicate: &str, key: impl Into<Bytes>) -> Result<Option<Row>, ClientError> {
        check_name(predicate)?;
        let (key, place) = (key.into(), self.place(predicate));
        let request = || v1::GetRequest {
            predicate: predicate.to_owned(),
            epoch: place.epoch(),
            key: key.clone(),
            direct: self.direct(),
            hops: 0,
            freshness: self.freshness(),
        };
        let reply = self.ask_read(&place, Instant::now() + self.deadline, request).await?;
        Ok(reply.found.then_some(Row { key, value: reply.value, modified: reply.modified }))
    }

    /// Reads one page of rows, as fresh as [`Client::with_reads`] says, as of one index.
    ///
    /// # Errors
    /// [`ClientError::NoSuchPredicate`] among others.
    pub async fn scan(&self, predicate: &str, range: &Range) -> Result<Page, ClientError> {
        check_name(predicate)?;
        let place = self.place(predicate);
        let request = || v1::ScanRequest {
            predicate: predicate.to_owned(),
            epoch: place.epoch(),
            prefix: range.prefix.clone(),
            low: range.low.clone(),
            high: range.high.clone(),
            limit: range.limit,
            limit_bytes: 0,
            continuation: range.continuation.clone(),
            direct: self.direct(),
            hops: 0,
            freshness: self.freshness(),
        };
        let reply = self.ask_read(&place, Instant::now() + self.deadline, request).await?;
        let row = |row: v1::ScanRow| Row { key: row.key, value: row.value, modified: row.modified };
        Ok(Page {
            rows: reply.rows.into_iter().map(row).collect(),
            continuation: reply.continuation,
            index: reply.index,
        })
    }

    /// The first address that is known: how errors name the cluster.
    pub fn address(&self) -> String {
        self.inner.addresses.lock().expect(UNPOISONED).first().cloned().unwrap_or_default()
    }

    pub(crate) fn admin_at(&self, address: &str) -> Result<AdminClient<Channel>, ClientError> {
        self.inner.channels.admin(address).map_err(|status| ClientError::of(&status))
    }

    fn learn(&self, address: &str) {
        let mut addresses = self.inner.addresses.lock().expect(UNPOISONED);
        if !address.is_empty()
            && addresses.len() < ADDRESSES_MOST
            && !addresses.iter().any(|known| known == address)
        {
            addresses.push(address.to_owned());
        }
    }

    /// Another address each time.
    fn any_address(&self) -> String {
        let addresses = self.inner.addresses.lock().expect(UNPOISONED);
        let turn = self.inner.turn.fetch_add(1, Ordering::Relaxed);
        addresses[turn % addresses.len()].clone()
    }

    fn place(&self, predicate: &str) -> Arc<Place> {
        if let Some(place) = self.inner.places.get(predicate) {
            return place.clone();
        }
        if self.inner.places.len() >= PLACES_MOST {
            // Nobody else holds these, so none of their requests is open: forgetting them costs a lookup.
            self.inner.places.retain(|_, place| Arc::strong_count(place) > 1);
        }
        self.inner
            .places
            .entry(predicate.to_owned())
            .or_insert_with(|| Arc::new(Place::new(predicate)))
            .clone()
    }
}

/// No code panics while it holds one of the client's locks.
const UNPOISONED: &str = "the lock's holders do not panic";

/// The operation that sets a key's value.
pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> v1::WriteOp {
    let put = v1::WritePut { key: key.into(), value: value.into() };
    v1::WriteOp { op: Some(v1::write_op::Op::Put(put)) }
}

/// The operation that deletes a key.
pub fn delete(key: impl Into<Bytes>) -> v1::WriteOp {
    v1::WriteOp { op: Some(v1::write_op::Op::Delete(v1::WriteDelete { key: key.into() })) }
}

/// The operation that sets (or deletes) a key's value if the row is as expected.
pub fn cas(key: impl Into<Bytes>, expect: Expect, value: Option<Bytes>) -> v1::WriteOp {
    use v1::write_cas::Expect as Wire;
    let expect = Some(match expect {
        Expect::Absent => Wire::Absent(true),
        Expect::Value(value) => Wire::Value(value),
        Expect::Modified(index) => Wire::Index(index),
    });
    let cas = v1::WriteCas { key: key.into(), expect, new_value: value };
    v1::WriteOp { op: Some(v1::write_op::Op::Cas(cas)) }
}

/// Names that begin with @ are the cluster's own groups, whose state is not made of rows.
/// A client as spans name it.
pub(crate) fn client_word(id: &v1::RequestId) -> String {
    format!("{:016x}{:016x}", id.client_high, id.client_low)
}

fn check_name(predicate: &str) -> Result<(), ClientError> {
    if !predicate.starts_with('@') {
        return Ok(());
    }
    let reason =
        format!("{predicate} belongs to the cluster itself; choose a name that does not begin with @");
    Err(ClientError::Refused { reason })
}

fn written(reply: v1::WriteReply) -> Written {
    Written { index: reply.index, applied: reply.applied, results: reply.results }
}
