//! One call until it is answered: where to send it, what a refusal means, when to try again.

use std::{sync::Arc, time::Duration};

use pontoon_proto::v1::{self, Refusal, refusal::Kind};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Status, transport::Channel};

use super::{
    Client, ClientError, Reads, UNPOISONED,
    error::{passes, words},
    place::Place,
};
use crate::{api::data_client::DataClient, route::Routed};

/// How long one sending may take before it counts as lost. Longer than a node makes a predicate in.
const SENDING: Duration = Duration::from_secs(4);
const PAUSE_FIRST: Duration = Duration::from_millis(5);
const PAUSE_MOST: Duration = Duration::from_millis(160);
/// How long a leader without room is asked again: within this time leadership has moved to a node with room, if any has.
const ROOM_PATIENCE: Duration = Duration::from_secs(3);
const ROOM_PAUSE: Duration = Duration::from_millis(100);
/// How many hints are followed at once, without a pause between them.
const HINTS_AT_ONCE: u32 = 2;

/// One call's way: what was heard so far, and how long to wait before the next sending.
#[derive(Debug)]
pub(super) struct Trip {
    begun: Instant,
    until: Instant,
    pause: Duration,
    hints: u32,
    /// Whether the call writes: only then does it matter that a sending may have taken effect.
    writes: bool,
    /// Whether a sending may have taken effect although no answer came.
    pub(super) unsure: bool,
    heard: String,
    /// Since when only lack of room was heard.
    full_since: Option<Instant>,
    /// Of a call that any replica may answer: which of the client's addresses is next.
    near: Option<usize>,
}

/// What to do after a sending that brought no answer.
#[derive(Debug)]
pub(super) enum Next {
    /// Somebody else was named: ask there.
    Hint,
    /// The same again, not before so long.
    Again(Duration),
    /// No use.
    Fail(ClientError),
}

impl Trip {
    pub(super) fn new(until: Instant, writes: bool) -> Self {
        Trip {
            begun: Instant::now(),
            until,
            pause: PAUSE_FIRST,
            hints: 0,
            writes,
            unsure: false,
            heard: "nothing was heard".to_owned(),
            full_since: None,
            near: None,
        }
    }

    /// When the present sending counts as lost.
    pub(super) fn sending_ends(&self) -> Instant {
        self.until.min(Instant::now() + SENDING)
    }

    /// How long to wait before the next sending.
    ///
    /// # Errors
    /// There is none: the call has failed, or its time is up.
    pub(super) fn wait_for(&mut self, next: Next, place: &Place) -> Result<Duration, ClientError> {
        let pause = match next {
            Next::Fail(error) => return Err(error),
            Next::Hint if self.hints < HINTS_AT_ONCE => {
                self.hints += 1;
                Duration::ZERO
            }
            Next::Hint => self.longer(Duration::ZERO),
            Next::Again(least) => self.longer(least),
        };
        if Instant::now() + pause < self.until {
            return Ok(pause);
        }
        let (predicate, reason) = (place.predicate.clone(), self.heard.clone());
        Err(match self.unsure && self.writes {
            true => ClientError::Unknown { predicate, reason },
            false => ClientError::Late { predicate, seconds: self.begun.elapsed().as_secs_f64(), reason },
        })
    }

    fn longer(&mut self, least: Duration) -> Duration {
        self.hints = 0;
        let pause = self.pause.max(least);
        self.pause = (self.pause * 2).min(PAUSE_MOST);
        pause
    }
}

impl Client {
    /// Asks whoever leads the predicate's group until there is an answer or the time is up.
    pub(super) async fn ask<R: Routed>(
        &self,
        place: &Arc<Place>,
        until: Instant,
        request: impl Fn() -> R,
    ) -> Result<R::Reply, ClientError> {
        self.ask_on(place, Trip::new(until, false), request).await
    }

    /// The same for a call that reads: one that need not see the latest goes to the client's own node.
    pub(super) async fn ask_read<R: Routed>(
        &self,
        place: &Arc<Place>,
        until: Instant,
        request: impl Fn() -> R,
    ) -> Result<R::Reply, ClientError> {
        let mut trip = Trip::new(until, false);
        trip.near = (self.reads != Reads::Linearizable).then_some(0);
        self.ask_on(place, trip, request).await
    }

    /// The same for a call that writes: at its end what is not known is said.
    pub(super) async fn ask_write<R: Routed>(
        &self,
        place: &Arc<Place>,
        until: Instant,
        request: impl Fn() -> R,
    ) -> Result<R::Reply, ClientError> {
        self.ask_on(place, Trip::new(until, true), request).await
    }

    async fn ask_on<R: Routed>(
        &self,
        place: &Arc<Place>,
        mut trip: Trip,
        request: impl Fn() -> R,
    ) -> Result<R::Reply, ClientError> {
        loop {
            let address = match trip.near {
                Some(turn) => self.near(turn),
                None => self.aim(place),
            };
            let next = match self.inner.channels.data(&address) {
                Err(status) => {
                    Next::Fail(ClientError::Address { address, reason: status.message().to_owned() })
                }
                Ok(client) => {
                    match timeout_at(trip.sending_ends(), self.send(&address, client, request())).await {
                        Ok(Ok(reply)) => match R::refusal(&reply) {
                            None => {
                                if trip.near.is_none() {
                                    place.set_leader(&address);
                                }
                                return Ok(reply);
                            }
                            Some(refusal) => self.refused(&mut trip, place, &address, refusal),
                        },
                        Ok(Err(status)) => self.broken(&mut trip, place, &address, Some(&status)),
                        Err(_) => self.broken(&mut trip, place, &address, None),
                    }
                }
            };
            let pause = trip.wait_for(next, place)?;
            if !pause.is_zero() {
                sleep(pause).await;
            }
        }
    }

    /// One sending: with whatever else is asked of that node, if the call can travel so.
    async fn send<R: Routed>(
        &self,
        address: &str,
        client: DataClient<Channel>,
        request: R,
    ) -> Result<R::Reply, Status> {
        if !self.inner.streams.may_go(address) {
            return request.remote(client).await;
        }
        match request.into_call() {
            Ok(call) => {
                let reply = self.inner.streams.call(address, client, call).await?;
                R::of_reply(reply).ok_or_else(|| Status::internal("the answer to another call"))
            }
            Err(request) => request.remote(client).await,
        }
    }

    /// Where the predicate's leader is believed to be, or anybody.
    pub(super) fn aim(&self, place: &Place) -> String {
        place.leader().unwrap_or_else(|| self.any_address())
    }

    /// The addresses in the order in which they were given or learnt.
    fn near(&self, turn: usize) -> String {
        let addresses = self.inner.addresses.lock().expect(UNPOISONED);
        addresses[turn % addresses.len()].clone()
    }

    /// A sending that ended without the node's word.
    pub(super) fn broken(
        &self,
        trip: &mut Trip,
        place: &Place,
        address: &str,
        status: Option<&Status>,
    ) -> Next {
        place.not_led_at(address);
        trip.near = trip.near.map(|turn| turn + 1);
        match status {
            Some(status) if !passes(status) => return Next::Fail(ClientError::of(status)),
            Some(status) => trip.heard = format!("{address}: {}", words(status)),
            None => trip.heard = format!("{address} did not answer"),
        }
        trip.unsure = true;
        Next::Again(Duration::ZERO)
    }

    /// What a refusal means. What can be learnt from it is learnt.
    pub(super) fn refused(&self, trip: &mut Trip, place: &Place, address: &str, refusal: &Refusal) -> Next {
        let predicate = || place.predicate.clone();
        match refusal.kind.as_ref() {
            Some(Kind::NotLeader(not)) => self.hinted(trip, place, address, &not.address, "does not lead"),
            Some(Kind::NotHere(not)) => {
                if let Some(shard) = &not.descriptor {
                    place.learn(shard);
                }
                self.hinted(trip, place, address, &not.address, "has no replica")
            }
            Some(Kind::StaleEpoch(stale)) => {
                if let Some(shard) = &stale.descriptor {
                    place.learn(shard);
                }
                trip.heard = format!("{address}: the epoch {} is not {}", stale.asked, stale.current);
                Next::Hint
            }
            Some(Kind::Busy(busy)) => {
                trip.heard = format!("{address} is busy");
                Next::Again(Duration::from_millis(busy.retry_after_ms))
            }
            Some(Kind::DiskFull(full)) => {
                trip.heard = format!("the disk of node {} is nearly full", full.node);
                place.not_led_at(address);
                match trip.full_since.get_or_insert_with(Instant::now).elapsed() < ROOM_PATIENCE {
                    true => Next::Again(ROOM_PAUSE),
                    false if trip.unsure && trip.writes => Next::Fail(ClientError::Unknown {
                        predicate: predicate(),
                        reason: trip.heard.clone(),
                    }),
                    false => Next::Fail(ClientError::DiskFull { predicate: predicate(), node: full.node }),
                }
            }
            Some(Kind::TooManyOpen(_)) => {
                trip.heard = "too many writes are open".to_owned();
                Next::Again(Duration::ZERO)
            }
            Some(Kind::Ambiguous(ambiguous)) => {
                trip.unsure = true;
                trip.heard = format!("{address}: {}", ambiguous.reason);
                Next::Again(Duration::ZERO)
            }
            Some(Kind::SessionExpired(_)) => {
                Next::Fail(ClientError::SessionExpired { sent_before: trip.unsure })
            }
            Some(Kind::TooLarge(large)) => Next::Fail(ClientError::TooLarge {
                what: large.what.clone(),
                size: large.size,
                limit: large.limit,
            }),
            Some(Kind::NoSuchPredicate(_)) => {
                Next::Fail(ClientError::NoSuchPredicate { predicate: predicate() })
            }
            Some(Kind::WrongKind(wrong)) => {
                Next::Fail(ClientError::WrongKind { kind: wrong.kind, reason: wrong.reason.clone() })
            }
            Some(Kind::Offset(gone)) => Next::Fail(ClientError::NoSuchOffset {
                log: predicate(),
                offset: gone.offset,
                lowest: gone.lowest,
                next: gone.next,
                era: gone.era,
            }),
            Some(Kind::Invalid(v1::RefusedInvalid { reason }) | Kind::Late(v1::RefusedLate { reason })) => {
                Next::Fail(ClientError::Refused { reason: reason.clone() })
            }
            None => Next::Fail(ClientError::Refused {
                reason: format!(
                    "{address} refuses for a reason that this version does not know; update the client"
                ),
            }),
        }
    }

    fn hinted(&self, trip: &mut Trip, place: &Place, asked: &str, hint: &str, what: &str) -> Next {
        trip.heard = format!("{asked} {what}");
        place.not_led_at(asked);
        if hint.is_empty() || hint == asked {
            return Next::Again(Duration::ZERO);
        }
        self.learn(hint);
        place.set_leader(hint);
        Next::Hint
    }
}
