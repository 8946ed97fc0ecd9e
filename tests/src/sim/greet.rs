//! Who believes whom to be himself: greetings between nodes, and the meta group's word for a node, as `pontoon node` does it.

use pontoon_proto::{GroupId, NodeId, v1};
use pontoon_raftstore::{Applied, Proposal, ProposeError};
use pontoon_shard::{decode_meta_reply, meta_command};
use v1::meta_command::Body;

use super::{
    net::Packet,
    work::{Call, Reply, Wait},
    world::World,
};

/// Between two tries of a node to be vouched for.
const ANNOUNCE_MS: u64 = 120;

impl World {
    /// Every pair that can talk both ways greets each other, once for each boot of either.
    pub(super) fn meet(&mut self) {
        for i in 0..self.nodes.len() {
            for j in (0..self.nodes.len()).filter(|j| *j != i) {
                let (one, other) = (&self.nodes[i], &self.nodes[j]);
                let (from, to, boots) = (one.id, other.id, other.boots);
                let knows = |running: &super::node::Running| running.accepted_by.get(&to) == Some(&boots);
                if !one.is_up()
                    || !other.is_up()
                    || one.running.as_ref().is_none_or(knows)
                    || self.net.is_cut(from, to)
                    || self.net.is_cut(to, from)
                    // Its token could not be made durable.
                    || other.stalled_until != 0
                {
                    continue;
                }
                self.greet(i, j);
            }
        }
        for i in 0..self.nodes.len() {
            self.announce(i);
        }
    }

    fn greet(&mut self, i: usize, j: usize) {
        let hello = self.nodes[i].running.as_ref().and_then(|running| running.stepped.hello());
        let Some(hello) = hello else { return };
        let (to, boots) = (self.nodes[j].id, self.nodes[j].boots);
        let Some(judge) = &mut self.nodes[j].running else { return };
        let verdict = judge.stepped.check_hello(&hello);
        if !verdict.refused.is_empty() {
            if verdict.copied {
                self.refused(i, &format!("{to} refuses"), verdict.refused);
            }
            return;
        }
        if let Some(running) = &mut self.nodes[i].running {
            running.accepted_by.insert(to, boots);
            running.stepped.accepted_by(to);
        }
    }

    /// A node is taken for a copy or an old image. In a run in which nobody made one that is wrong.
    fn refused(&mut self, i: usize, who: &str, reason: String) {
        let node = &self.nodes[i];
        // Rot may have taken its history.
        if !node.forged && !node.rotten {
            self.fail(&format!("{who} {}, which is itself: {reason}", node.id));
        }
        let id = node.id;
        self.say(format!("{who} {id}: {reason}"));
        self.refusals.push((id, reason));
    }

    /// Asks the meta group's leader to vouch for a node.
    fn announce(&mut self, i: usize) {
        let (now, id, is_up) = (self.now, self.nodes[i].id, self.nodes[i].is_up());
        let Some(running) = self.nodes[i].running.as_mut().filter(|running| is_up && !running.vouched) else {
            return;
        };
        if now < running.announce_at {
            return;
        }
        let Some(hello) = running.stepped.hello() else { return };
        running.announce_at = now + ANNOUNCE_MS;
        let leaders = self.leaders(GroupId::META);
        if leaders.is_empty() {
            return;
        }
        let to = self.nodes[leaders[self.rng.below(leaders.len() as u64) as usize]].id;
        self.next_call += 1;
        let call = Packet::Call(self.next_call, Call::Announce(hello));
        self.send(Some(id), to, GroupId::META, call);
    }

    /// A node that leads the meta group is asked to vouch for another.
    pub(super) fn serve_announce(&mut self, i: usize, from: NodeId, call: u64, hello: v1::Hello) {
        let (id, boots, wall_ms) = (self.nodes[i].id, self.nodes[i].boots, self.nodes[i].wall_ms(self.now));
        let Some(running) = &mut self.nodes[i].running else { return };
        let token = hello.boot_history.last().copied().unwrap_or_default();
        if let Some(reason) = running.stepped.twin(from, token, &hello.address) {
            let reply = Packet::Reply(call, Reply::Vouched(token, Err(reason)));
            return self.send(Some(id), from, GroupId::META, reply);
        }
        let body = Body::SetNodeAddress(v1::SetNodeAddress {
            node: hello.node,
            address: hello.address,
            boot_token: token,
            boot_history: hello.boot_history,
            ..Default::default()
        });
        let payload = meta_command(wall_ms, body);
        let proposal = Proposal { payload, request: None, epoch: 1, urgent: true };
        let asked = running.stepped.propose(GroupId::META, proposal);
        self.waits.insert((id, boots, asked), Wait::Announce { from, id: call, token });
    }

    /// What became of the command by which the meta group vouches.
    pub(super) fn announced(
        &mut self,
        i: usize,
        (from, call, token): (NodeId, u64, u64),
        result: Result<Applied, ProposeError>,
    ) {
        let id = self.nodes[i].id;
        let answer = result.ok().and_then(|applied| decode_meta_reply(&applied.reply).ok());
        let verdict = match answer {
            Some(Ok(_)) => Ok(()),
            Some(Err(refused)) if refused.reason() == v1::MetaRefusal::OtherDisk => Err(refused.text),
            // It asks again.
            _ => return,
        };
        self.send(Some(id), from, GroupId::META, Packet::Reply(call, Reply::Vouched(token, verdict)));
    }

    /// The meta group's word has arrived.
    pub(super) fn hear_vouched(&mut self, i: usize, token: u64, verdict: Result<(), String>) {
        let Some(running) = &mut self.nodes[i].running else { return };
        if running.wal.incarnation() != token {
            return;
        }
        match verdict {
            Ok(()) => {
                running.vouched = true;
                running.stepped.vouched();
            }
            Err(reason) => self.refused(i, "the meta group does not vouch for", reason),
        }
    }
}
