//! How the cluster version rises, and what it demands of nodes.

use pontoon_proto::v1;
use v1::{MetaRefusal, meta_reply::Body as Answer};

use super::apply::{Outcome, Step, refuse};
use crate::versions::{Feature, Versions};

impl Step<'_> {
    /// Refuses a node that does not speak the cluster's version. Below the version that keeps what nodes speak nobody is asked.
    pub(super) fn must_speak(&self, speaks: Versions, who: &str) -> Result<(), Box<v1::MetaRefused>> {
        match speaks.misses(self.state.cluster_version) {
            Some(reason) if self.state.has(Feature::NodeVersions) => {
                Err(refuse(MetaRefusal::WrongVersion, format!("{who} is refused: {reason}")))
            }
            _ => Ok(()),
        }
    }

    /// What of a node's range is kept in its record.
    pub(super) fn spoken(&self, speaks: Versions) -> v1::Node {
        match self.state.has(Feature::NodeVersions) {
            true => v1::Node {
                oldest_version: speaks.oldest,
                newest_version: speaks.newest,
                ..Default::default()
            },
            false => v1::Node::default(),
        }
    }

    /// Raises the version by one, if every member said under its present boot that it speaks it. The machine has made sure that
    /// this binary does.
    pub(super) fn finalise_version(&mut self, ask: v1::FinaliseVersion) -> Outcome {
        let (now, next) = (self.state.cluster_version, ask.version);
        if next == now {
            return Ok(Answer::Done(true));
        }
        if next != now + 1 {
            let text = format!(
                "the cluster is at version {now}; it goes to {} next, and never back or over one",
                now + 1
            );
            return Err(refuse(MetaRefusal::Invalid, text));
        }
        let members: Vec<v1::Node> = self.state.members().map(|node| v1::Node::clone(node)).collect();
        let mut spoken = Vec::new();
        for node in &members {
            let id = node.id;
            let said = ask.nodes.iter().find(|said| said.node == id && said.boot_token == node.boot_token);
            let Some(said) = said else {
                let text = format!(
                    "n{id} has not said which versions it speaks since it was started last: ask again, or start it; if it is lost \
                     for good, run `pontoon decommission n{id}`"
                );
                return Err(refuse(MetaRefusal::Changed, text));
            };
            let speaks = Versions::said(said.oldest_version, said.newest_version);
            if !speaks.speaks(next) {
                let text = format!(
                    "n{id} speaks {speaks}, not {next}: start it with a newer release, and ask again"
                );
                return Err(refuse(MetaRefusal::WrongVersion, text));
            }
            spoken.push(speaks);
        }
        self.state.cluster_version = next;
        for (node, speaks) in members.into_iter().zip(spoken) {
            let v1::Node { oldest_version, newest_version, .. } = self.spoken(speaks);
            self.put_node(v1::Node { oldest_version, newest_version, ..node });
        }
        self.note(format!("the cluster is at version {next}"));
        Ok(Answer::Done(true))
    }
}
