//! Where a predicate is served, as far as this client knows, and its session with the group there.

use std::sync::{Arc, Mutex};

use pontoon_proto::v1;
use tokio::time::{Instant, timeout_at};

use super::{
    Client, ClientError, UNPOISONED,
    session::{Session, Ticket},
};

#[derive(Debug)]
pub(super) struct Place {
    pub(super) predicate: String,
    known: Mutex<Known>,
    /// Held while a session is opened, so that of many writers one asks.
    opening: tokio::sync::Mutex<()>,
}

/// Guesses, all of them: a wrong one is answered with a better one.
#[derive(Debug, Default)]
struct Known {
    group: u64,
    epoch: u64,
    leader: Option<String>,
    session: Option<Arc<Session>>,
}

/// What to do about a predicate that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    Make,
    Refuse,
}

impl Place {
    pub(super) fn new(predicate: &str) -> Self {
        Place {
            predicate: predicate.to_owned(),
            known: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
        }
    }

    /// 0 while it is not known: then it is not checked.
    pub(super) fn epoch(&self) -> u64 {
        self.known.lock().expect(UNPOISONED).epoch
    }

    pub(super) fn leader(&self) -> Option<String> {
        self.known.lock().expect(UNPOISONED).leader.clone()
    }

    pub(super) fn set_leader(&self, address: &str) {
        let mut known = self.known.lock().expect(UNPOISONED);
        if known.leader.as_deref() != Some(address) {
            known.leader = Some(address.to_owned());
        }
    }

    /// Forgets the leader if it is still believed to be there.
    pub(super) fn not_led_at(&self, address: &str) {
        let mut known = self.known.lock().expect(UNPOISONED);
        if known.leader.as_deref() == Some(address) {
            known.leader = None;
        }
    }

    /// Takes a descriptor over. A predicate that was dropped and made again has another group: a session with the old
    /// one means nothing there.
    pub(super) fn learn(&self, shard: &v1::Shard) {
        let mut known = self.known.lock().expect(UNPOISONED);
        if known.group != shard.group {
            *known = Known { group: shard.group, epoch: shard.epoch, ..Known::default() };
        } else if shard.epoch > known.epoch {
            known.epoch = shard.epoch;
        }
    }

    /// The next write opens a new session.
    pub(super) fn end_session(&self, ticket: &Ticket) {
        let mut known = self.known.lock().expect(UNPOISONED);
        if known.session.as_ref().is_some_and(|session| Arc::ptr_eq(session, &ticket.session)) {
            known.session = None;
        }
    }

    fn session(&self) -> Option<Arc<Session>> {
        self.known.lock().expect(UNPOISONED).session.clone()
    }
}

impl Client {
    /// The session with the predicate's group, opened if there is none.
    pub(super) async fn session(
        &self,
        place: &Arc<Place>,
        missing: Missing,
        until: Instant,
    ) -> Result<Arc<Session>, ClientError> {
        if let Some(session) = place.session() {
            return Ok(session);
        }
        let _turn = place.opening.lock().await;
        if let Some(session) = place.session() {
            return Ok(session);
        }
        let request = || v1::OpenSessionRequest {
            predicate: place.predicate.clone(),
            client_high: (self.inner.id >> 64) as u64,
            client_low: self.inner.id as u64,
            direct: true,
            hops: 0,
            must_exist: missing == Missing::Refuse,
        };
        let reply = self.ask(place, until, request).await?;
        let session = Arc::new(Session::new(self.inner.id, reply.stamp));
        let mut known = place.known.lock().expect(UNPOISONED);
        known.group = reply.group;
        known.epoch = reply.epoch;
        known.session = Some(session.clone());
        Ok(session)
    }

    /// A number for one write, as soon as the session's window has one.
    pub(super) async fn ticket(
        &self,
        place: &Arc<Place>,
        missing: Missing,
        until: Instant,
    ) -> Result<Ticket, ClientError> {
        let session = self.session(place, missing, until).await?;
        loop {
            // Made before the look, so that a number which closes between the two is not missed.
            let closed = session.closed.notified();
            if let Some(ticket) = session.take() {
                return Ok(ticket);
            }
            if timeout_at(until, closed).await.is_err() {
                return Err(ClientError::Late {
                    predicate: place.predicate.clone(),
                    seconds: self.deadline.as_secs_f64(),
                    reason: "too many writes are open".to_owned(),
                });
            }
        }
    }
}
