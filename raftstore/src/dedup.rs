//! Exactly once: the replicated table of what each client has been answered.
//!
//! A row is part of the state: it is written in the batch of the data, travels in snapshots, and is computed from the
//! log alone, so that every replica gives the same answer to the same retry.
//!
//! Invariants:
//! - a request that took effect has its answer in the row until the client acknowledges it (`acked_below`) or the
//!   session expires;
//! - the floor only rises; a request without a row is new only if its stamp lies above the floor. So a client that was
//!   forgotten is told so, and never served twice.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use pontoon_proto::v1;
use prost::Message;

use crate::{
    error::{Error, Rejected},
    machine::SystemRow,
    types::{MAX_OPEN_REQUESTS, RequestId},
};

const FORMAT: u32 = 1;

/// How many sessions one entry expires at most, so that a pause is never followed by one long apply.
const EXPIRE_PER_ENTRY: usize = 16;

#[derive(Debug, Default, Clone)]
struct Row {
    acked_below: u64,
    time: u64,
    stamp: u64,
    answers: BTreeMap<u64, (u64, Bytes)>,
}

/// The dedup table of one group.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    rows: BTreeMap<u128, Row>,
    by_time: BTreeSet<(u64, u128)>,
    floor: u64,
    changed: BTreeSet<u128>,
}

/// What the table says of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Apply it, then [`Sessions::record`] the answer.
    New,
    /// It was applied before: index and reply.
    Answered(u64, Bytes),
    /// Refuse it.
    Refused(Rejected),
}

impl Sessions {
    /// Reads the table from the machine's system rows.
    pub(crate) fn load(rows: Vec<(Bytes, Bytes)>, floor: u64) -> Result<Self, Error> {
        let mut sessions = Sessions { floor, ..Default::default() };
        for (key, value) in rows {
            let unknown = |found| Error::UnknownFormat { what: "a dedup row", found, known: FORMAT };
            let client = u128::from_be_bytes(key.as_ref().try_into().map_err(|_| unknown(0))?);
            let row = v1::Session::decode(value).map_err(|_| unknown(0))?;
            if row.format != FORMAT {
                return Err(unknown(row.format));
            }
            sessions.by_time.insert((row.time, client));
            sessions.rows.insert(
                client,
                Row {
                    acked_below: row.acked_below,
                    time: row.time,
                    stamp: row.stamp,
                    answers: row.answers.into_iter().map(|a| (a.seq, (a.index, a.reply))).collect(),
                },
            );
        }
        Ok(sessions)
    }

    /// The replicated floor below which sessions are forgotten.
    pub(crate) fn floor(&self) -> u64 {
        self.floor
    }

    /// Judges a request at the timestamp of its entry.
    pub(crate) fn judge(&mut self, request: &RequestId, timestamp: u64) -> Verdict {
        let Some(row) = self.rows.get_mut(&request.client).filter(|row| row.stamp == request.stamp) else {
            // A client id with another stamp is a session that was opened anew: the old one ends here.
            if request.stamp <= self.floor
                || self.rows.get(&request.client).is_some_and(|row| row.stamp > request.stamp)
            {
                return Verdict::Refused(Rejected::SessionExpired);
            }
            self.forget(request.client);
            let time = timestamp.max(request.stamp);
            let row =
                Row { time, stamp: request.stamp, acked_below: request.acked_below, ..Default::default() };
            self.rows.insert(request.client, row);
            self.by_time.insert((time, request.client));
            self.changed.insert(request.client);
            return Verdict::New;
        };
        if let Some((index, reply)) = row.answers.get(&request.seq) {
            return Verdict::Answered(*index, reply.clone());
        }
        if request.seq < row.acked_below {
            // The client said that it had this answer, or the request was overtaken by that word. It is not applied.
            return Verdict::Refused(Rejected::SessionExpired);
        }
        if request.acked_below > row.acked_below {
            row.acked_below = request.acked_below;
            row.answers = row.answers.split_off(&request.acked_below);
            self.changed.insert(request.client);
        }
        if row.answers.len() >= MAX_OPEN_REQUESTS {
            return Verdict::Refused(Rejected::TooManyOpen);
        }
        let time = timestamp.max(request.stamp).max(row.time);
        self.by_time.remove(&(row.time, request.client));
        row.time = time;
        self.by_time.insert((time, request.client));
        self.changed.insert(request.client);
        Verdict::New
    }

    /// Keeps the answer of a request that was judged new.
    pub(crate) fn record(&mut self, request: &RequestId, index: u64, reply: Bytes) {
        if let Some(row) = self.rows.get_mut(&request.client) {
            row.answers.insert(request.seq, (index, reply));
            self.changed.insert(request.client);
        }
    }

    /// Forgets sessions that were last used at or before `horizon`, the oldest first and a bounded number.
    pub(crate) fn expire(&mut self, horizon: u64) {
        for _ in 0..EXPIRE_PER_ENTRY {
            let Some(&(time, client)) = self.by_time.first() else { break };
            if time > horizon {
                break;
            }
            self.forget(client);
            self.changed.insert(client);
            self.floor = self.floor.max(time);
        }
    }

    fn forget(&mut self, client: u128) {
        if let Some(row) = self.rows.remove(&client) {
            self.by_time.remove(&(row.time, client));
        }
    }

    /// The rows that changed since the last call, for the batch of the data.
    pub(crate) fn take_changes(&mut self) -> Vec<SystemRow> {
        let changed = std::mem::take(&mut self.changed);
        changed
            .into_iter()
            .map(|client| SystemRow {
                key: Bytes::copy_from_slice(&client.to_be_bytes()),
                value: self.rows.get(&client).map(|row| {
                    v1::Session {
                        format: FORMAT,
                        acked_below: row.acked_below,
                        time: row.time,
                        stamp: row.stamp,
                        answers: row
                            .answers
                            .iter()
                            .map(|(seq, (index, reply))| v1::Answer {
                                seq: *seq,
                                index: *index,
                                reply: reply.clone(),
                            })
                            .collect(),
                    }
                    .encode_to_vec()
                    .into()
                }),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(seq: u64, acked_below: u64) -> RequestId {
        RequestId { client: 42, stamp: 100, seq, acked_below }
    }

    fn reload(sessions: &mut Sessions) -> Sessions {
        let rows =
            sessions.take_changes().into_iter().filter_map(|row| Some((row.key, row.value?))).collect();
        Sessions::load(rows, sessions.floor()).unwrap()
    }

    #[test]
    fn a_retry_gets_the_first_answer_also_after_a_reload() {
        let mut sessions = Sessions::default();
        assert_eq!(sessions.judge(&request(1, 0), 101), Verdict::New);
        sessions.record(&request(1, 0), 9, Bytes::from_static(b"ok"));
        let mut sessions = reload(&mut sessions);
        assert_eq!(sessions.judge(&request(1, 0), 102), Verdict::Answered(9, Bytes::from_static(b"ok")));
    }

    #[test]
    fn acknowledged_answers_are_dropped_and_never_applied_again() {
        let mut sessions = Sessions::default();
        for seq in 1..=3 {
            assert_eq!(sessions.judge(&request(seq, 0), 101), Verdict::New);
            sessions.record(&request(seq, 0), seq, Bytes::new());
        }
        assert_eq!(sessions.judge(&request(4, 3), 101), Verdict::New);
        assert_eq!(sessions.judge(&request(2, 3), 101), Verdict::Refused(Rejected::SessionExpired));
        assert_eq!(sessions.judge(&request(3, 3), 101), Verdict::Answered(3, Bytes::new()));
    }

    #[test]
    fn an_expired_session_is_refused_and_a_new_stamp_starts_over() {
        let mut sessions = Sessions::default();
        assert_eq!(sessions.judge(&request(1, 0), 101), Verdict::New);
        sessions.record(&request(1, 0), 5, Bytes::new());
        sessions.expire(200);
        assert_eq!(sessions.floor(), 101);
        assert_eq!(sessions.judge(&request(1, 0), 300), Verdict::Refused(Rejected::SessionExpired));
        let fresh = RequestId { client: 42, stamp: 301, seq: 1, acked_below: 0 };
        assert_eq!(sessions.judge(&fresh, 301), Verdict::New);
    }

    #[test]
    fn open_requests_are_bounded() {
        let mut sessions = Sessions::default();
        for seq in 0..MAX_OPEN_REQUESTS as u64 {
            assert_eq!(sessions.judge(&request(seq, 0), 101), Verdict::New);
            sessions.record(&request(seq, 0), seq + 1, Bytes::new());
        }
        assert_eq!(sessions.judge(&request(5000, 0), 101), Verdict::Refused(Rejected::TooManyOpen));
        assert_eq!(sessions.judge(&request(5000, 10), 101), Verdict::New);
    }
}
