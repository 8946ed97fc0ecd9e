//! The audit logs of all nodes as one.

use std::sync::Arc;

use futures::future::join_all;
use pontoon_proto::{NodeId, v1};
use tonic::Status;

use super::{Audited, ended};
use crate::{caller::Caller, calls::MetaCall, shared::Shared};

const ENTRIES_DEFAULT: u32 = 100;
const ENTRIES_MOST: u32 = 1_000;
const ANSWER: std::time::Duration = std::time::Duration::from_secs(2);

impl Shared {
    /// Answers through the leader of the meta group; who asked, and how it ended, goes into the audit log.
    pub(crate) async fn ordered<C: MetaCall + Audited>(
        self: &Arc<Self>,
        caller: &Caller,
        call: C,
    ) -> Result<C::Reply, Status> {
        let open = self.audit.begin(caller, &call);
        ended(open, self.at_meta_leader(call).await).await
    }

    /// The latest entries of this node, or of all nodes that answer, in the order of their clocks.
    pub(crate) async fn audit(self: &Arc<Self>, request: v1::AuditRequest) -> Result<v1::AuditReply, Status> {
        let limit = match request.limit {
            0 => ENTRIES_DEFAULT,
            limit => limit.min(ENTRIES_MOST),
        };
        let own = request.after.get(&self.own.get()).copied().unwrap_or(0);
        let here = self.audit.latest(own, limit as usize).await?;
        let mut entries: Vec<v1::AuditEntry> = here.into_iter().map(Into::into).collect();
        let mut silent = Vec::new();
        if !request.local {
            let ask = v1::AuditRequest { local: true, passed_on: true, limit, ..request.clone() };
            let view = self.map.view();
            let others =
                view.present().filter_map(|node| NodeId::new(node.id).ok()).filter(|&node| node != self.own);
            let asked = others.map(|node| {
                let ask = ask.clone();
                async move { (node, self.at_within(ANSWER, node, ask).await) }
            });
            for (node, answer) in join_all(asked).await {
                match answer {
                    Ok(reply) => entries.extend(reply.entries),
                    Err(_) => silent.push(node.get()),
                }
            }
        }
        // Cursors stand at what is left out, too.
        let mut seen = request.after;
        for entry in &entries {
            let seen = seen.entry(entry.node).or_default();
            *seen = (*seen).max(entry.seq);
        }
        entries.retain(|entry| request.passed_on || !entry.passed_on);
        entries
            .sort_by(|one, other| (&one.when, one.node, one.seq).cmp(&(&other.when, other.node, other.seq)));
        if !request.local {
            entries.drain(..entries.len().saturating_sub(limit as usize));
        }
        Ok(v1::AuditReply { entries, silent, seen })
    }
}
