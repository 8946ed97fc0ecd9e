//! One predicate takes the place of another.
//!
//! Both records change in one command, so whoever reads the map, at whatever time and after whatever crash, finds one of two:
//!
//! 1. Before it: the name has the old group, with all that it had.
//! 2. After it: the name has the new group, and the old one is being dropped under the name that the new one had. Its driver goes on
//!    with that after any crash, as with every drop.
//!
//! A replica that serves knows its group and not its name, so nothing has to happen on it. The new group's id is above the old one's:
//! that is how a router tells which of two groups has a name now ([`crate::Routing`]).

use pontoon_proto::v1;
use v1::{MetaRefusal, meta_reply::Body as Answer};

use super::apply::{Outcome, Step, refuse};
use crate::versions::Feature;

impl Step<'_> {
    pub(super) fn replace_shard(&mut self, ask: &v1::ReplaceShard) -> Outcome {
        if !self.state.has(Feature::ReplacedShards) {
            let text = "the cluster's version does not have this yet: run `pontoon upgrade finalise`";
            return Err(refuse(MetaRefusal::WrongVersion, text));
        }
        let name = &ask.predicate;
        let mut new = self.shard_of(ask.new_group)?;
        if new.predicate == *name {
            // The caller asks again: it did not hear the first answer.
            return Ok(Answer::Shard(new));
        }
        let mut old = self.shard_of(ask.old_group)?;
        if old.predicate != *name {
            let text = format!("{name} is another predicate by now: look at `pontoon predicates`");
            return Err(refuse(MetaRefusal::Changed, text));
        }
        if [&old, &new].iter().any(|shard| shard.kind() == v1::ShardKind::Meta) || new.group < old.group {
            let text =
                format!("g{} cannot take the place of g{}: a later predicate does", new.group, old.group);
            return Err(refuse(MetaRefusal::Invalid, text));
        }
        for shard in [&old, &new] {
            if let Some(mv) = self.state.running_move(shard.group) {
                let text =
                    format!("move {} of {} is running: cancel it or wait for it", mv.id, shard.predicate);
                return Err(refuse(MetaRefusal::Busy, text));
            }
            if shard.state() != v1::ShardState::Live {
                let text =
                    format!("{} is being made or dropped: look at `pontoon predicates`", shard.predicate);
                return Err(refuse(MetaRefusal::Changed, text));
            }
        }
        std::mem::swap(&mut old.predicate, &mut new.predicate);
        old.set_state(v1::ShardState::Dropping);
        old.epoch += 1;
        let (old, new) = (self.put_shard(old), self.put_shard(new));
        self.note(format!("predicate {name} is g{} now, g{} is being dropped", new.group, old.group));
        Ok(Answer::Shard(new))
    }
}
