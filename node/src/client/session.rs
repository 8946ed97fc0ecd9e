//! A session with a group: the stamp that its leader gave, and the numbers of the requests that are open.
//!
//! Invariants:
//! - a number is used for one request, whatever becomes of it;
//! - `acked_below` never passes the lowest open number, so that no request is overtaken by its own client;
//! - at most [`WINDOW`] numbers lie between the lowest open and the next one, fewer than a group keeps answers for: the
//!   lowest one can always be applied, however long it takes.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use pontoon_proto::v1;
use tokio::sync::Notify;

use super::UNPOISONED;

/// How far the numbers of a session run ahead of the lowest open one. A group keeps 1,024 answers.
const WINDOW: u64 = 1_000;

#[derive(Debug)]
pub(super) struct Session {
    client: u128,
    stamp: u64,
    numbers: Mutex<Numbers>,
    /// Tells who waits for a number that one has closed.
    pub(super) closed: Notify,
}

#[derive(Debug)]
struct Numbers {
    next: u64,
    open: BTreeSet<u64>,
}

/// One request's number, open until this is dropped.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) session: Arc<Session>,
    seq: u64,
}

impl Session {
    pub(super) fn new(client: u128, stamp: u64) -> Self {
        let numbers = Mutex::new(Numbers { next: 1, open: BTreeSet::new() });
        Session { client, stamp, numbers, closed: Notify::new() }
    }

    /// The next number, or `None` while the window is full.
    pub(super) fn take(self: &Arc<Self>) -> Option<Ticket> {
        let mut numbers = self.numbers.lock().expect(UNPOISONED);
        let seq = numbers.next;
        if numbers.open.first().is_some_and(|lowest| seq - lowest >= WINDOW) {
            return None;
        }
        numbers.next += 1;
        numbers.open.insert(seq);
        Some(Ticket { session: self.clone(), seq })
    }
}

impl Ticket {
    /// The request's id, with what was acknowledged by now.
    pub(super) fn id(&self) -> v1::RequestId {
        let acked_below =
            self.session.numbers.lock().expect(UNPOISONED).open.first().copied().unwrap_or(self.seq);
        v1::RequestId {
            client_high: (self.session.client >> 64) as u64,
            client_low: self.session.client as u64,
            stamp: self.session.stamp,
            seq: self.seq,
            acked_below,
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.session.numbers.lock().expect(UNPOISONED).open.remove(&self.seq);
        self.session.closed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_acknowledged_never_passes_an_open_request() {
        let session = Arc::new(Session::new(7 << 64 | 9, 5));
        let (first, second) = (session.take().unwrap(), session.take().unwrap());
        assert_eq!((first.id().seq, second.id().seq), (1, 2));
        assert_eq!((first.id().client_high, first.id().client_low, first.id().stamp), (7, 9, 5));
        drop(second);
        let third = session.take().unwrap();
        assert_eq!(third.id().acked_below, 1);
        drop(first);
        assert_eq!(third.id().acked_below, 3);
    }

    #[test]
    fn the_window_is_closed_by_the_lowest_open_request() {
        let session = Arc::new(Session::new(1, 1));
        let lowest = session.take().unwrap();
        for _ in 1..WINDOW {
            drop(session.take().unwrap());
        }
        assert!(session.take().is_none());
        drop(lowest);
        assert!(session.take().is_some());
    }
}
