//! Logs: records that are appended and get offsets that follow each other.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use pontoon_proto::v1;
use tokio::time::Instant;

use super::{Client, ClientError, check_name, place::Missing};

/// How long a tail leaves one read waiting. Shorter than a sending counts as lost.
const WAIT: Duration = Duration::from_secs(2);

/// Which offsets a log has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The first record's offset; `next` if there are no records.
    pub lowest: u64,
    /// The offset of the record that is appended next: one above the highest.
    pub next: u64,
    /// Counts the log's resets, from 1: within an era an offset names one record for ever.
    pub era: u64,
}

impl Bounds {
    /// Whether there are no records.
    pub fn is_empty(&self) -> bool {
        self.lowest == self.next
    }

    fn of(wire: Option<v1::LogBounds>) -> Self {
        let v1::LogBounds { lowest, next, era } = wire.unwrap_or_default();
        Bounds { lowest, next, era }
    }
}

/// What became of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// The offset of the first record.
    pub first: u64,
    /// One above the offset of the last.
    pub next: u64,
}

/// Some records of a log, as of one point in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Records {
    /// The offset of the first of them.
    pub first: u64,
    /// In the order of their offsets.
    pub records: Vec<Bytes>,
    /// Which offsets the log has.
    pub bounds: Bounds,
}

impl Records {
    /// The offset after the last of them: where to read on.
    pub fn next(&self) -> u64 {
        self.first + self.records.len() as u64
    }
}

/// A replicated log of a cluster, made by [`Client::create_log`].
///
/// # Examples
/// ```no_run
/// # async fn run() -> Result<(), pontoon_node::client::ClientError> {
/// use pontoon_node::client::Client;
///
/// let client = Client::connect(["127.0.0.1:7400"]).await?;
/// let log = client.create_log("events", 0).await?;
/// log.append(["one", "two"]).await?;
/// let mut tail = log.tail(0);
/// let (offset, record) = tail.next().await?;
/// println!("{offset}: {record:?}");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Log {
    client: Client,
    name: String,
}

impl Client {
    /// A log by its name. Nothing is asked yet.
    pub fn log(&self, name: impl Into<String>) -> Log {
        Log { client: self.clone(), name: name.into() }
    }

    /// Makes a log with so many replicas (0: three), if there is none of that name; on return it is served.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the name is not one or belongs to a predicate of another kind.
    pub async fn create_log(&self, name: impl Into<String>, replicas: u32) -> Result<Log, ClientError> {
        let log = self.log(name);
        let kind = v1::ShardKind::Log.into();
        let request =
            v1::CreatePredicateRequest { predicate: log.name.clone(), replicas, kind, ..Default::default() };
        self.create_predicate(request).await?;
        Ok(log)
    }
}

impl Log {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Through whom it is reached.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Appends records, all of them or none, at offsets that follow each other. At most 16,384 records and 3 MiB
    /// together, a record at most 1 MiB.
    ///
    /// On return they are durable on a quorum and seen by every later read. Calls one after the other keep their order;
    /// calls at the same time are appended in any.
    ///
    /// # Errors
    /// [`ClientError::NoSuchLog`], [`ClientError::TooLarge`], [`ClientError::WrongKind`]; after [`ClientError::Unknown`] and
    /// [`ClientError::SessionExpired`] the records may or may not have been appended.
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the append.
    pub async fn append<R: Into<Bytes>>(
        &self,
        records: impl IntoIterator<Item = R>,
    ) -> Result<Appended, ClientError> {
        self.append_if(None, records.into_iter().map(Into::into).collect()).await
    }

    /// The same, only if the first record gets the offset `expected`.
    ///
    /// # Errors
    /// [`ClientError::UnexpectedOffset`] if it would get another one; as [`Log::append`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the append.
    pub async fn append_at<R: Into<Bytes>>(
        &self,
        expected: u64,
        records: impl IntoIterator<Item = R>,
    ) -> Result<Appended, ClientError> {
        self.append_if(Some(expected), records.into_iter().map(Into::into).collect()).await
    }

    async fn append_if(
        &self,
        expect_offset: Option<u64>,
        records: Vec<Bytes>,
    ) -> Result<Appended, ClientError> {
        check_name(&self.name)?;
        let (place, count) = (self.client.place(&self.name), records.len() as u64);
        let request = |id| v1::AppendLogRequest {
            log: self.name.clone(),
            epoch: place.epoch(),
            request: Some(id),
            records: records.clone(),
            expect_offset,
            direct: true,
            hops: 0,
        };
        let reply = self.named(self.client.write_once(&place, Missing::Refuse, request).await)?;
        match (reply.applied, expect_offset) {
            (true, _) => Ok(Appended { first: reply.offset, next: reply.offset + count }),
            (false, expected) => Err(ClientError::UnexpectedOffset {
                log: self.name.clone(),
                expected: expected.unwrap_or(0),
                next: Bounds::of(reply.bounds).next,
            }),
        }
    }

    /// Which offsets it has. As fresh as [`Client::with_reads`] says, like all reads.
    ///
    /// # Errors
    /// [`ClientError::NoSuchLog`], [`ClientError::WrongKind`] among others.
    pub async fn bounds(&self) -> Result<Bounds, ClientError> {
        let request = v1::ReadLogRequest { bounds_only: true, ..Default::default() };
        Ok(self.ask(request).await?.bounds)
    }

    /// Reads one record; `None` if the log does not have the offset.
    ///
    /// # Errors
    /// As [`Log::bounds`].
    pub async fn get(&self, offset: u64) -> Result<Option<Bytes>, ClientError> {
        match self.read(offset, offset.checked_add(1), 1).await {
            Ok(records) => Ok(records.records.into_iter().next()),
            Err(ClientError::NoSuchOffset { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads records with offsets in [from, to), at most `limit` of them (0: 1,000) and about 1 MiB: one page. None come at
    /// the log's end.
    ///
    /// # Errors
    /// [`ClientError::NoSuchOffset`] if `from` was truncated or lies beyond the end; as [`Log::bounds`].
    pub async fn read(&self, from: u64, to: Option<u64>, limit: u32) -> Result<Records, ClientError> {
        let request = v1::ReadLogRequest { from: Some(from), to, limit, ..Default::default() };
        self.ask(request).await
    }

    /// Reads the whole log in order, offsets and records, from its lowest offset to where it ends at the call.
    ///
    /// # Errors
    /// As [`Log::bounds`]; in the stream as [`Tail::next`], if records are truncated before they are read.
    pub async fn records(
        &self,
    ) -> Result<impl Stream<Item = Result<(u64, Bytes), ClientError>> + Send + use<>, ClientError> {
        let bounds = self.bounds().await?;
        let count = usize::try_from(bounds.next - bounds.lowest).unwrap_or(usize::MAX);
        let mut tail = self.tail(bounds.lowest);
        tail.era = bounds.era;
        Ok(tail.into_stream().take(count))
    }

    /// Follows the log from an offset on, for ever, through changes of leader and moves: each record comes once, in order.
    pub fn tail(&self, from: u64) -> Tail {
        Tail { log: self.clone(), from, era: 0, page: VecDeque::new() }
    }

    /// Drops every record below an offset and gives what is left. Repeatable.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the log does not reach so far; as [`Log::append`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the truncation.
    pub async fn truncate(&self, below: u64) -> Result<Bounds, ClientError> {
        check_name(&self.name)?;
        let place = self.client.place(&self.name);
        let request = |id| v1::TruncateLogRequest {
            log: self.name.clone(),
            epoch: place.epoch(),
            request: Some(id),
            below,
            direct: true,
            hops: 0,
        };
        let reply = self.named(self.client.write_once(&place, Missing::Refuse, request).await)?;
        Ok(Bounds::of(reply.bounds))
    }

    /// Drops every record and begins anew at an offset, in a new era: tails that follow the log end.
    ///
    /// # Errors
    /// As [`Log::append`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the reset.
    pub async fn reset(&self, at: u64) -> Result<Bounds, ClientError> {
        self.reset_if(at, None).await
    }

    /// The same, only if the log's next offset is `expected`.
    ///
    /// # Errors
    /// [`ClientError::UnexpectedOffset`] if it is not; as [`Log::append`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the reset.
    pub async fn reset_from(&self, expected: u64, at: u64) -> Result<Bounds, ClientError> {
        self.reset_if(at, Some(expected)).await
    }

    async fn reset_if(&self, at: u64, expect_next: Option<u64>) -> Result<Bounds, ClientError> {
        check_name(&self.name)?;
        let place = self.client.place(&self.name);
        let request = |id| v1::ResetLogRequest {
            log: self.name.clone(),
            epoch: place.epoch(),
            request: Some(id),
            at,
            expect_next,
            direct: true,
            hops: 0,
        };
        let reply = self.named(self.client.write_once(&place, Missing::Refuse, request).await)?;
        let bounds = Bounds::of(reply.bounds);
        match (reply.applied, expect_next) {
            (false, Some(expected)) => {
                Err(ClientError::UnexpectedOffset { log: self.name.clone(), expected, next: bounds.next })
            }
            _ => Ok(bounds),
        }
    }

    /// Drops the log with all its records, for ever.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if there is none, or the name is another kind's.
    pub async fn drop_log(&self) -> Result<(), ClientError> {
        let kind = Some(v1::ShardKind::Log.into());
        let request = v1::DropPredicateRequest { predicate: self.name.clone(), hops: 0, kind };
        self.client.drop_predicate(request).await.map(drop)
    }

    async fn ask(&self, request: v1::ReadLogRequest) -> Result<Records, ClientError> {
        check_name(&self.name)?;
        let place = self.client.place(&self.name);
        let request = || v1::ReadLogRequest {
            log: self.name.clone(),
            epoch: place.epoch(),
            direct: self.client.direct(),
            hops: 0,
            freshness: self.client.freshness(),
            ..request.clone()
        };
        let reply =
            self.named(self.client.ask_read(&place, Instant::now() + self.client.deadline, request).await)?;
        Ok(Records { first: reply.first, records: reply.records, bounds: Bounds::of(reply.bounds) })
    }

    fn named<T>(&self, result: Result<T, ClientError>) -> Result<T, ClientError> {
        result.map_err(|error| match error {
            ClientError::NoSuchPredicate { predicate } => ClientError::NoSuchLog { log: predicate },
            error => error,
        })
    }
}

/// A log that is followed. Made by [`Log::tail`].
///
/// Its position is the offset of the next record, kept here alone: whoever stores it can go on after any crash.
#[derive(Debug)]
pub struct Tail {
    log: Log,
    from: u64,
    /// The era of the records so far; 0 before the first answer.
    era: u64,
    page: VecDeque<Bytes>,
}

impl Tail {
    /// The offset of the next record.
    pub fn position(&self) -> u64 {
        self.from
    }

    /// Waits for the next record, however long that takes.
    ///
    /// # Errors
    /// [`ClientError::NoSuchOffset`] if the record was truncated, or the log was reset; [`ClientError::Late`] if nobody serves
    /// the log for as long as the client's deadline: call again to go on.
    ///
    /// # Cancel safety
    /// Safe: a record is taken only when it is returned.
    pub async fn next(&mut self) -> Result<(u64, Bytes), ClientError> {
        self.fill().await?;
        let record = self.page.pop_front().expect("a filled page has a record");
        self.from += 1;
        Ok((self.from - 1, record))
    }

    /// Waits for the next records and takes all that are at hand, at least one.
    ///
    /// # Errors
    /// As [`Tail::next`].
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn next_many(&mut self) -> Result<(u64, Vec<Bytes>), ClientError> {
        self.fill().await?;
        let (first, records) = (self.from, Vec::from(std::mem::take(&mut self.page)));
        self.from += records.len() as u64;
        Ok((first, records))
    }

    /// As a stream of offsets and records. It ends after an error.
    pub fn into_stream(self) -> impl Stream<Item = Result<(u64, Bytes), ClientError>> + Send {
        futures::stream::unfold(Some(self), |tail| async {
            let mut tail = tail?;
            let next = tail.next().await;
            let rest = next.is_ok().then_some(tail);
            Some((next, rest))
        })
    }

    async fn fill(&mut self) -> Result<(), ClientError> {
        while self.page.is_empty() {
            let request = v1::ReadLogRequest {
                from: Some(self.from),
                era: self.era,
                wait_ms: WAIT.as_millis() as u32,
                ..Default::default()
            };
            let page = self.log.ask(request).await?;
            self.era = page.bounds.era;
            self.page = page.records.into();
        }
        Ok(())
    }
}
