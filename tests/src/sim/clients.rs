//! Clients: each asks for one thing after the other, retries what got no answer, and remembers when it asked for what.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use pontoon_proto::{GroupId, NodeId, v1};
use pontoon_raftstore::{Answer, Applied, Proposal, ProposeError, ReadLevel, Rejected, RequestId};
use pontoon_shard::{Expect, MapCommand, decode_map_reply, decode_meta_reply, meta_command};

use super::{
    net::Packet,
    work::{ClientAsk, ClientCall},
    world::World,
};
use crate::linear::{Act, Op, Value};

/// Operations after which clients leave a key alone, so that its history stays short.
const KEY_OPS: usize = 160;
/// Registers and lists of a group that are in use at once.
const REGISTERS: u64 = 3;
const LISTS: u64 = 1;
/// What a reader's clock may be slow by.
const DRIFT_PERCENT: u64 = 15;

/// What happened to each key.
#[derive(Default)]
pub(super) struct Histories {
    /// By group and name.
    pub(super) keys: BTreeMap<(GroupId, String), Vec<Op>>,
    /// Values by their number.
    values: BTreeMap<Bytes, Value>,
    next: u64,
}

impl Histories {
    /// The number of a row's value; 0 if there is no row.
    pub(super) fn number(&mut self, value: Option<&Bytes>) -> Value {
        let Some(value) = value else { return 0 };
        let next = self.values.len() as Value + 1;
        *self.values.entry(value.clone()).or_insert(next)
    }

    /// A value that nobody wrote before.
    fn fresh(&mut self) -> String {
        self.next += 1;
        format!("v{}", self.next)
    }
}

enum Ask {
    Put(Bytes),
    /// From one value to another; a list grows that way, too.
    Swap(Option<Bytes>, Bytes),
    Read(ReadLevel),
    Meta(Box<v1::meta_command::Body>),
}

struct Pending {
    key: String,
    ask: Ask,
    /// Where it stands in the key's history.
    op: usize,
    /// The first try's number: answers to earlier ones were for something else.
    since: u64,
    tries: u64,
}

pub(super) struct Client {
    group: GroupId,
    id: u128,
    stamp: Option<u64>,
    seq: u64,
    attempt: u64,
    pending: Option<Pending>,
    wake_at: u64,
    /// What it last saw of the keys.
    known: BTreeMap<String, Option<Bytes>>,
    /// Writes to make although nothing strikes any more.
    owes: u64,
    /// Commands for the meta group; the operator has some, others have none.
    pub(super) orders: Vec<v1::meta_command::Body>,
}

impl Client {
    pub(super) fn new(group: GroupId, id: u128) -> Client {
        Client {
            group,
            id,
            stamp: None,
            seq: 0,
            attempt: 0,
            pending: None,
            wake_at: 0,
            known: BTreeMap::new(),
            owes: 0,
            orders: Vec::new(),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.pending.is_none() && self.orders.is_empty() && self.owes == 0
    }

    pub(super) fn describe(&self) -> String {
        let what = self.pending.as_ref().map_or("orders", |pending| match &pending.ask {
            Ask::Put(_) => "a write",
            Ask::Swap(..) => "a compare-and-set",
            Ask::Read(_) => "a read",
            Ask::Meta(_) => "an order",
        });
        format!("{what} of {}", self.group)
    }
}

impl World {
    pub(super) fn run_clients(&mut self) {
        for nth in 0..self.clients.len() {
            if self.now >= self.clients[nth].wake_at {
                self.run_client(nth);
            }
        }
    }

    fn run_client(&mut self, nth: usize) {
        let is_read = |client: &Client| {
            client.pending.as_ref().is_some_and(|pending| matches!(pending.ask, Ask::Read(_)))
        };
        if is_read(&self.clients[nth]) {
            // It got no answer; the next one may.
            self.clients[nth].pending = None;
        }
        let gives_up =
            |pending: &Pending| pending.tries > 2 && matches!(pending.ask, Ask::Put(_) | Ask::Swap(..));
        if !self.calm && self.clients[nth].pending.as_ref().is_some_and(gives_up) && self.rng.chance(30) {
            self.clients[nth].pending = None;
        }
        if self.clients[nth].pending.is_none() && !self.choose(nth) {
            return;
        }
        self.attempt(nth);
    }

    /// Finds something to do.
    fn choose(&mut self, nth: usize) -> bool {
        let group = self.clients[nth].group;
        if group == GroupId::META {
            let since = self.clients[nth].attempt + 1;
            let client = &mut self.clients[nth];
            if client.orders.is_empty() {
                return false;
            }
            let ask = Ask::Meta(Box::new(client.orders.remove(0)));
            client.seq += 1;
            client.pending = Some(Pending { key: String::new(), ask, op: 0, since, tries: 0 });
            return true;
        }
        if self.calm {
            let client = &mut self.clients[nth];
            if client.owes == 0 {
                client.wake_at = self.now + 20;
                return false;
            }
            client.owes -= 1;
            let value = self.fresh();
            self.begin(nth, "k0.last".to_owned(), Ask::Put(value));
            return true;
        }
        let draw = self.rng.below(REGISTERS + LISTS);
        let (kind, draw) = if draw < REGISTERS { ("k", draw) } else { ("list", draw - REGISTERS) };
        let mut turn = 0;
        let mut key = format!("{kind}{draw}");
        while self.histories.keys.get(&(group, key.clone())).is_some_and(|ops| ops.len() >= KEY_OPS) {
            turn += 1;
            key = format!("{kind}{draw}.{turn}");
        }
        let known = self.clients[nth].known.get(&key).cloned().flatten();
        let ask = match self.rng.below(10) {
            0..4 => {
                let level = match self.rng.below(6) {
                    0..3 => ReadLevel::Linearizable,
                    3 => ReadLevel::Follower { max_lag: Duration::ZERO },
                    4 => ReadLevel::Follower { max_lag: Duration::from_millis(200) },
                    _ => ReadLevel::Local,
                };
                Ask::Read(level)
            }
            _ if kind == "list" => {
                let item = self.histories.fresh();
                let new = known
                    .as_ref()
                    .map_or_else(|| item.clone(), |list| format!("{};{item}", String::from_utf8_lossy(list)));
                Ask::Swap(known, new.into())
            }
            4..7 => Ask::Swap(known, self.fresh()),
            _ => Ask::Put(self.fresh()),
        };
        self.begin(nth, key, ask);
        true
    }

    fn fresh(&mut self) -> Bytes {
        self.histories.fresh().into()
    }

    fn begin(&mut self, nth: usize, key: String, ask: Ask) {
        let (group, since) = (self.clients[nth].group, self.clients[nth].attempt + 1);
        let moment = self.moment();
        let (call, act) = match &ask {
            Ask::Put(value) => (moment, Act::Write(self.histories.number(Some(value)))),
            Ask::Swap(old, new) => {
                let old = self.histories.number(old.as_ref());
                (moment, Act::Swap(old, self.histories.number(Some(new))))
            }
            Ask::Read(level) => (self.may_see(*level, moment), Act::Read(0)),
            Ask::Meta(_) => unreachable!("orders are for the meta group"),
        };
        let history = self.histories.keys.entry((group, key.clone())).or_default();
        history.push(Op { call, answer: None, act });
        let op = history.len() - 1;
        let client = &mut self.clients[nth];
        if !matches!(ask, Ask::Read(_)) {
            client.seq += 1;
        }
        client.pending = Some(Pending { key, ask, op, since, tries: 0 });
    }

    /// Lets a client of each group write once more.
    pub(super) fn demand_writes(&mut self) {
        for client in &mut self.clients {
            client.owes += u64::from(client.group != GroupId::META && client.id & 1 == 0);
        }
    }

    pub(super) fn clients_are_done(&self) -> Result<(), String> {
        match self.clients.iter().find(|client| client.group != GroupId::META && !client.is_done()) {
            Some(client) => Err(format!("{} is not answered", client.describe())),
            None => Ok(()),
        }
    }

    /// Whether the operator waits for an answer.
    pub(super) fn has_orders(&self) -> bool {
        self.clients.iter().any(|client| client.group == GroupId::META && !client.is_done())
    }

    /// From when on a read that is called now must see what was acknowledged.
    fn may_see(&self, level: ReadLevel, moment: u64) -> u64 {
        match level {
            ReadLevel::Linearizable => moment,
            ReadLevel::Follower { max_lag } if max_lag.is_zero() => moment,
            ReadLevel::Follower { max_lag } => {
                let lag = max_lag.as_millis() as u64 * (100 + DRIFT_PERCENT) / 100;
                self.now.saturating_sub(lag) << 20
            }
            ReadLevel::Local => 0,
        }
    }

    /// Asks somebody who may know.
    fn attempt(&mut self, nth: usize) {
        let group = self.clients[nth].group;
        let level = match &self.clients[nth].pending {
            Some(Pending { ask: Ask::Read(level), .. }) => *level,
            _ => ReadLevel::Linearizable,
        };
        let able = match level {
            ReadLevel::Linearizable => self.leaders(group),
            _ => {
                let holds = |id: NodeId| self.seen.contains_key(&(group, id));
                (0..self.nodes.len()).filter(|i| holds(self.nodes[*i].id)).collect()
            }
        };
        if able.is_empty() {
            self.clients[nth].wake_at = self.now + 15;
            return;
        }
        let i = able[self.rng.below(able.len() as u64) as usize];
        let patience = 60 + self.rng.below(200);
        let (now, to, wall_ms) = (self.now, self.nodes[i].id, self.nodes[i].wall_ms(self.now));
        let client = &mut self.clients[nth];
        client.wake_at = now + patience;
        client.attempt += 1;
        let attempt = client.attempt;
        let Some(pending) = &mut client.pending else { return };
        pending.tries += 1;
        let request = client.stamp.map(|stamp| RequestId {
            client: client.id,
            stamp,
            seq: client.seq,
            acked_below: client.seq,
        });
        let payload = match &pending.ask {
            Ask::Put(value) => MapCommand::new().put(pending.key.clone(), value.clone()).encode(),
            Ask::Swap(old, new) => {
                let expect = old.clone().map_or(Expect::Absent, Expect::Value);
                MapCommand::new().cas(pending.key.clone(), expect, Some(new.clone())).encode()
            }
            Ask::Meta(body) => Ok(meta_command(wall_ms, (**body).clone())),
            Ask::Read(_) => Ok(Bytes::new()),
        };
        let payload = payload.expect("commands are small");
        let what = match (&pending.ask, request) {
            (Ask::Read(level), _) => ClientAsk::Read(*level),
            (_, None) => ClientAsk::Stamp,
            (ask, request) => {
                let urgent = matches!(ask, Ask::Meta(_));
                ClientAsk::Propose(Box::new(Proposal { payload, request, epoch: 1, urgent }))
            }
        };
        let call = ClientCall { client: nth, group, attempt, what };
        self.send(None, to, group, Packet::Client(call));
    }

    pub(super) fn client_hears(&mut self, i: usize, nth: usize, attempt: u64, answer: Answer) {
        let moment = self.moment();
        let pause = match self.is_quiet(self.clients[nth].group) {
            true => 250 + self.rng.below(1_500),
            false => 5 + self.rng.below(80),
        };
        let wake_at = self.now + pause;
        let client = &mut self.clients[nth];
        let (group, is_last) = (client.group, client.attempt == attempt);
        let Some(pending) = client.pending.take_if(|pending| pending.since <= attempt) else { return };
        match answer {
            Answer::Index(Ok(stamp)) if !matches!(pending.ask, Ask::Read(_)) => {
                if client.stamp.is_none() {
                    client.stamp = Some(stamp);
                    client.wake_at = self.now;
                }
                client.pending = Some(pending);
            }
            Answer::Index(Ok(_)) if is_last => {
                client.wake_at = wake_at;
                let reader =
                    self.nodes[i].running.as_ref().and_then(|running| running.machines.reader(group));
                // A replica that is gone meanwhile tells nothing.
                let Some(Ok(row)) = reader.map(|reader| reader.get(pending.key.as_bytes())) else { return };
                let value = row.map(|row| row.value);
                let number = self.histories.number(value.as_ref());
                self.clients[nth].known.insert(pending.key.clone(), value);
                self.record(group, &pending, moment, Act::Read(number));
            }
            Answer::Proposed(Ok(applied)) => {
                client.wake_at = wake_at;
                self.applied(nth, group, &pending, moment, &applied);
            }
            Answer::Proposed(Err(ProposeError::Rejected(Rejected::SessionExpired))) => {
                // A retry whose first try's answer was let go of, or one that came too late: nobody knows.
                client.stamp = None;
                client.wake_at = wake_at;
            }
            _ => {
                if is_last {
                    client.wake_at = self.now + 8;
                }
                client.pending = Some(pending);
            }
        }
    }

    /// Whether little is asked of a group, so that it sleeps now and then. Where there are many groups most are.
    fn is_quiet(&self, group: GroupId) -> bool {
        let busy = if self.plan.groups >= 16 { 1 } else { 3 };
        group != GroupId::META && group.0 % 4 >= busy
    }

    fn applied(&mut self, nth: usize, group: GroupId, pending: &Pending, moment: u64, applied: &Applied) {
        if let Ask::Meta(body) = &pending.ask {
            let reply = decode_meta_reply(&applied.reply);
            let reply =
                reply.unwrap_or_else(|error| self.fail(&format!("an answer of the meta group: {error}")));
            return self.operator_hears((**body).clone(), reply);
        }
        let reply = decode_map_reply(&applied.reply);
        let reply = reply.unwrap_or_else(|error| self.fail(&format!("an answer of a map: {error}")));
        if !reply.refused.is_empty() {
            self.fail(&format!("a map refused a command: {}", reply.refused));
        }
        let (now_there, act) = match (&pending.ask, reply.failed) {
            (Ask::Put(value), None) => (Some(value.clone()), Act::Write(self.histories.number(Some(value)))),
            (Ask::Swap(old, new), None) => {
                let old = self.histories.number(old.as_ref());
                (Some(new.clone()), Act::Swap(old, self.histories.number(Some(new))))
            }
            (_, Some(failed)) => {
                let found = failed.exists.then_some(failed.value);
                let act = Act::Read(self.histories.number(found.as_ref()));
                (found, act)
            }
            _ => unreachable!("reads are not proposed"),
        };
        self.clients[nth].known.insert(pending.key.clone(), now_there);
        self.record(group, pending, moment, act);
    }

    fn record(&mut self, group: GroupId, pending: &Pending, moment: u64, act: Act) {
        self.tally.operations += 1;
        self.timeline.note(moment ^ group.0 << 48);
        if let Some(op) =
            self.histories.keys.get_mut(&(group, pending.key.clone())).and_then(|ops| ops.get_mut(pending.op))
        {
            (op.answer, op.act) = (Some(moment), act);
        }
    }
}
