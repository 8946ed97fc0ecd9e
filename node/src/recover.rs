//! Lost quorums: plans as people read and keep them (JSON), and who does what about them.
//!
//! None of it needs the meta group, which may be what is lost: the node that is asked asks all others. See
//! [`pontoon_shard::recover`] for which replica goes on, and the decision on lost quorums for what holds and what does not.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::{StreamExt, future::join_all, stream};
use pontoon_proto::{ClusterId, GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{Error, Recovery};
use pontoon_shard::recover::{self, PLAN_FORMAT, Remains};
use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;
use v1::meta_command::Body;

use crate::{clock::unix_ms, replicas::replica_id, shared::Shared};

/// How long a node may take to say what it has.
const LOOK: Duration = Duration::from_secs(5);
/// How long a node that is said to be lost may take to show that it is not.
const LOST: Duration = Duration::from_secs(1);
/// How long a leader may take to notice that it has no quorum.
const STEP_DOWN: Duration = Duration::from_secs(10);
/// How long the meta group may take to be led again.
const ELECTION: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(100);
/// Groups that are recovered at a time.
const AT_ONCE: usize = 64;
/// Versions of the map that are passed over at most: more cannot have been lost while anybody saw them.
const MOST_VERSIONS: u64 = 100_000;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    id: String,
    cluster: String,
    made_ms: u64,
    lost_nodes: Vec<String>,
    groups: Vec<Step>,
    nothing_left: Vec<Gone>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    group: u64,
    predicate: String,
    goes_on: String,
    under_the_id: String,
    last_term: u64,
    last_index: u64,
    commit: u64,
    voters: Vec<String>,
    removed: Vec<String>,
    may_be_lost: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Gone {
    group: u64,
    predicate: String,
    voters: Vec<String>,
}

/// A plan as JSON for a file.
pub fn to_json(plan: &v1::RecoveryPlan) -> serde_json::Value {
    let file = File {
        format: plan.format,
        id: plan.id.clone(),
        cluster: ClusterId::from_slice(&plan.cluster).map(|id| id.to_string()).unwrap_or_default(),
        made_ms: plan.made_ms,
        lost_nodes: plan.lost.iter().map(|id| format!("n{id}")).collect(),
        groups: plan
            .steps
            .iter()
            .map(|step| Step {
                group: step.group,
                predicate: step.predicate.clone(),
                goes_on: name(step.from),
                under_the_id: name(step.to),
                last_term: step.last_term,
                last_index: step.last_index,
                commit: step.commit,
                voters: step.voters.iter().copied().map(name).collect(),
                removed: step.leftovers.iter().copied().map(name).collect(),
                may_be_lost: may_be_lost(step),
            })
            .collect(),
        nothing_left: plan
            .gone
            .iter()
            .map(|gone| Gone {
                group: gone.group,
                predicate: gone.predicate.clone(),
                voters: gone.voters.iter().copied().map(name).collect(),
            })
            .collect(),
    };
    serde_json::to_value(file).unwrap_or_default()
}

/// Reads what [`to_json`] wrote.
///
/// # Errors
/// In words, what does not read and what to do.
pub fn from_json(text: &str) -> Result<v1::RecoveryPlan, String> {
    let file: File = serde_json::from_str(text)
        .map_err(|error| format!("this is no plan of `pontoon recover plan` ({error}): make a new one"))?;
    if file.format != PLAN_FORMAT {
        return Err(format!(
            "the plan has format {}, this version knows {PLAN_FORMAT}: make a new one with this version",
            file.format
        ));
    }
    let cluster: uuid::Uuid =
        file.cluster.parse().map_err(|_| format!("{:?} names no cluster: make a new plan", file.cluster))?;
    let replica = |text: &String| {
        let id: Result<ReplicaId, _> = text.parse();
        id.map(ReplicaId::get).map_err(|error| format!("{text:?} is no replica ({error}): make a new plan"))
    };
    let replicas = |texts: &[String]| texts.iter().map(replica).collect::<Result<Vec<u64>, String>>();
    let node = |text: &String| {
        let id: Result<NodeId, _> = text.parse();
        id.map(NodeId::get).map_err(|error| format!("{text:?} is no node ({error}): make a new plan"))
    };
    let step = |step: &Step| {
        Ok(v1::RecoveryStep {
            group: step.group,
            predicate: step.predicate.clone(),
            from: replica(&step.goes_on)?,
            to: replica(&step.under_the_id)?,
            last_term: step.last_term,
            last_index: step.last_index,
            commit: step.commit,
            voters: replicas(&step.voters)?,
            leftovers: replicas(&step.removed)?,
        })
    };
    let gone = |gone: &Gone| {
        let voters = replicas(&gone.voters)?;
        Ok(v1::LostGroup { group: gone.group, predicate: gone.predicate.clone(), voters })
    };
    let plan = v1::RecoveryPlan {
        format: file.format,
        id: file.id,
        cluster: cluster.as_bytes().to_vec().into(),
        made_ms: file.made_ms,
        lost: file.lost_nodes.iter().map(node).collect::<Result<_, _>>()?,
        steps: file.groups.iter().map(step).collect::<Result<_, String>>()?,
        gone: file.nothing_left.iter().map(gone).collect::<Result<_, String>>()?,
    };
    // The plan that was looked at is the one that is carried out.
    if id_of(&plan) != plan.id {
        return Err("the plan was changed since it was made: make a new one instead".to_owned());
    }
    Ok(plan)
}

/// What a step gives up, in words.
pub fn may_be_lost(step: &v1::RecoveryStep) -> String {
    let (last, term, commit) = (step.last_index, step.last_term, step.commit);
    let lost = format!("whatever was acknowledged after entry {last} of term {term}");
    match commit < last {
        true => format!("{lost}; entries {} to {last} are kept, acknowledged or not", commit + 1),
        false => lost,
    }
}

/// A replica's id as people read it.
pub fn name(id: u64) -> String {
    ReplicaId::new(id).map_or_else(|_| id.to_string(), |replica| replica.to_string())
}

/// A hash of all that a plan says.
fn id_of(plan: &v1::RecoveryPlan) -> String {
    let plain = v1::RecoveryPlan { id: String::new(), ..plan.clone() };
    blake3::hash(&plain.encode_to_vec()).to_hex()[..16].to_owned()
}

impl Shared {
    /// Every replica here, with the end of its log.
    pub(crate) async fn remains(
        self: &Arc<Self>,
        request: v1::RemainsRequest,
    ) -> Result<v1::RemainsReply, Status> {
        let view = self.map.view();
        let groups = self.raft.groups().into_iter().filter_map(|id| self.raft.group(id));
        let replicas = groups.map(|group| v1::Remain {
            last_term: self.raft.last_entry(group.id()).map_or(0, |(term, _)| term),
            replica: Some(self.info(&group)),
        });
        Ok(v1::RemainsReply {
            cluster: self.cluster.as_bytes().to_vec().into(),
            replicas: replicas.collect(),
            map: (view.version() > request.have_version).then(|| view.map().clone()),
        })
    }

    /// What every node has that is not lost, and the latest map of any of them, which this node takes over.
    async fn all_remains(self: &Arc<Self>, lost: &BTreeSet<u64>) -> Result<Remains, Status> {
        let view = self.map.view();
        let named = lost.iter().map(async |&id| {
            let node = NodeId::new(id).map_err(|error| Status::invalid_argument(error.to_string()))?;
            if view.node(node).is_none() {
                return Err(Status::not_found(format!(
                    "there is no node {node}: `pontoon nodes` lists them"
                )));
            }
            if node == self.own || self.at_within(LOST, node, v1::ReportRequest {}).await.is_ok() {
                return Err(Status::failed_precondition(format!(
                    "{node} answers: it is not lost, leave it out"
                )));
            }
            Ok(())
        });
        join_all(named).await.into_iter().collect::<Result<(), Status>>()?;
        // A map that comes with an answer may name more nodes.
        loop {
            let view = self.map.view();
            let others: Vec<NodeId> = view
                .present()
                .filter(|node| !lost.contains(&node.id))
                .filter_map(|node| NodeId::new(node.id).ok())
                .collect();
            let request = v1::RemainsRequest { have_version: view.version() };
            let answers = others.iter().map(async |&node| (node, self.at_within(LOOK, node, request).await));
            let mut remains = Remains::new();
            for (node, answer) in join_all(answers).await {
                let reply = answer.map_err(|status| {
                    let mut all: Vec<String> = lost.iter().map(|id| format!("n{id}")).collect();
                    all.push(node.to_string());
                    Status::failed_precondition(format!(
                        "{node} does not answer ({}): start it, or if it is lost for good, too, say so: --lost {}",
                        status.message(),
                        all.join(",")
                    ))
                })?;
                if let Some(map) = reply.map {
                    self.map.offer(map);
                }
                remains.insert(node.get(), reply.replicas);
            }
            if self.map.view().version() == view.version() {
                return Ok(remains);
            }
        }
    }

    pub(crate) async fn recover_plan(
        self: &Arc<Self>,
        request: v1::RecoverPlanRequest,
    ) -> Result<v1::RecoverPlanReply, Status> {
        let lost: BTreeSet<u64> = request.lost.into_iter().collect();
        if lost.is_empty() {
            return Err(Status::invalid_argument("name the nodes that never come back: --lost NODES"));
        }
        let until = Instant::now() + STEP_DOWN;
        let mut plan = loop {
            let remains = self.all_remains(&lost).await?;
            let plan = recover::plan(self.map.view().map(), &remains, &lost);
            // While somebody still leads, alone, the end of its log is not settled.
            if recover::is_settled(&plan, &remains) || Instant::now() >= until {
                break plan;
            }
            sleep(PAUSE).await;
        };
        plan.cluster = self.cluster.as_bytes().to_vec().into();
        plan.made_ms = unix_ms();
        plan.id = id_of(&plan);
        Ok(v1::RecoverPlanReply { plan: Some(plan) })
    }

    pub(crate) async fn recover_apply(
        self: &Arc<Self>,
        request: v1::RecoverApplyRequest,
    ) -> Result<v1::RecoverApplyReply, Status> {
        let plan = request.plan.unwrap_or_default();
        if plan.format != PLAN_FORMAT || plan.cluster.as_ref() != self.cluster.as_bytes() {
            return Err(Status::invalid_argument(format!(
                "the plan is for another cluster or version; this is {}: make a new plan",
                self.cluster
            )));
        }
        let lost: BTreeSet<u64> = plan.lost.iter().copied().collect();
        let remains = self.all_remains(&lost).await?;
        let obstacles = recover::obstacles(&plan, &remains);
        if !obstacles.is_empty() {
            return Err(Status::failed_precondition(format!(
                "nothing was done: {}; make a new plan",
                obstacles.join("; ")
            )));
        }
        // The map first: it takes the nodes out that are lost, and gives out no id that a recovered replica has. Whoever dies on
        // the way leaves a plan of which some is done, and the rest is done when it is applied again.
        let meta = plan.steps.iter().find(|step| step.group == GroupId::META.0).cloned();
        let record = v1::RecoverRecordRequest {
            plan: Some(plan.clone()),
            least_version: self.map.view().version(),
            hops: 0,
        };
        match meta {
            None => self.at_meta_leader(record).await.map(drop)?,
            Some(step) => self.recover_meta(step, record).await?,
        }
        let steps = plan.steps.into_iter().filter(|step| step.group != GroupId::META.0);
        let done = stream::iter(steps.map(|step| async {
            let name = step.predicate.clone();
            self.recover_one(step).await.err().map(|status| format!("{name}: {}", status.message()))
        }));
        let failures: Vec<Option<String>> = done.buffer_unordered(AT_ONCE).collect().await;
        Ok(v1::RecoverApplyReply { failures: failures.into_iter().flatten().collect() })
    }

    async fn recover_one(self: &Arc<Self>, step: v1::RecoveryStep) -> Result<(), Status> {
        let node = replica_id(step.from)?.node();
        self.at(node, v1::RecoverReplicaRequest { step: Some(step) }).await.map(drop)
    }

    async fn recover_meta(
        self: &Arc<Self>,
        step: v1::RecoveryStep,
        record: v1::RecoverRecordRequest,
    ) -> Result<(), Status> {
        let node = replica_id(step.from)?.node();
        self.recover_one(step).await?;
        let until = Instant::now() + ELECTION;
        // Its node leads as soon as it has opened again.
        let record = v1::RecoverRecordRequest { hops: u32::MAX, ..record };
        loop {
            match self.at(node, record.clone()).await {
                Err(status) if status.code() == tonic::Code::Unavailable && Instant::now() < until => {
                    sleep(PAUSE).await;
                }
                other => return other.map(drop),
            }
        }
    }

    /// Lets a replica here go on alone.
    pub(crate) async fn recover_replica(
        self: &Arc<Self>,
        request: v1::RecoverReplicaRequest,
    ) -> Result<v1::RecoverReplicaReply, Status> {
        let step = request.step.unwrap_or_default();
        let (from, to) = (replica_id(step.from)?, replica_id(step.to)?);
        // Whoever leads without a quorum, or follows one who is gone, notices within an election timeout.
        if let Some(group) = self.raft.group(GroupId(step.group)) {
            let mut status = group.status();
            let noticed = status.wait_for(|status| status.replica == to || status.leader.is_none());
            drop(timeout(STEP_DOWN, noticed).await);
        }
        let recovery = Recovery { from, to, last: (step.last_term, step.last_index) };
        self.raft.recover(GroupId(step.group), recovery).await.map_err(|error| match error {
            Error::Stopped => Status::unavailable(error.to_string()),
            other => Status::failed_precondition(other.to_string()),
        })?;
        Ok(v1::RecoverReplicaReply {})
    }

    /// Writes a recovery into the map. Nodes follow the map with the highest version, and entries may have been lost that some of
    /// them have seen; so the versions of these are passed over first.
    pub(crate) async fn recover_record(
        self: &Arc<Self>,
        request: v1::RecoverRecordRequest,
    ) -> Result<v1::RecoverRecordReply, Status> {
        let ahead = request.least_version.saturating_sub(self.meta_state().version);
        if ahead > MOST_VERSIONS {
            return Err(Status::failed_precondition(format!(
                "a node has seen version {} of the map and the meta group's survivor stands at {}: it is far too old; is \
                 there a later one?",
                request.least_version,
                self.meta_state().version
            )));
        }
        while self.meta_state().version < request.least_version {
            // Changes nothing, and is an entry.
            self.meta_done(Body::SettleDebt(v1::SettleDebt::default())).await?;
        }
        self.meta_done(Body::RecoverCluster(v1::RecoverCluster { plan: request.plan })).await?;
        Ok(v1::RecoverRecordReply {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> v1::RecoveryPlan {
        let id = |node, ordinal| ReplicaId::on(NodeId::new(node).unwrap(), ordinal).get();
        let mut plan = v1::RecoveryPlan {
            format: PLAN_FORMAT,
            cluster: vec![7; 16].into(),
            made_ms: 1_700_000_000_000,
            lost: vec![2, 3],
            steps: vec![v1::RecoveryStep {
                group: 9,
                predicate: "name".into(),
                from: id(1, 1),
                to: id(1, 1_004),
                last_term: 3,
                last_index: 40,
                commit: 38,
                voters: vec![id(1, 1), id(2, 2), id(3, 3)],
                leftovers: vec![id(4, 4)],
            }],
            gone: vec![v1::LostGroup { group: 10, predicate: "gone".into(), voters: vec![id(2, 1)] }],
            ..Default::default()
        };
        plan.id = id_of(&plan);
        plan
    }

    #[test]
    fn a_plan_reads_as_it_was_written() {
        let plan = plan();
        let text = to_json(&plan).to_string();
        assert!(text.contains("n1.1004") && text.contains("after entry 40 of term 3"), "{text}");
        assert_eq!(from_json(&text), Ok(plan));
    }

    #[test]
    fn a_plan_that_somebody_changed_is_refused() {
        let text = to_json(&plan()).to_string();
        for (from, to, reason) in [
            ("n1.1004", "n1.1005", "was changed"),
            ("\"last_index\":40", "\"last_index\":41", "was changed"),
            ("n1.1004", "n1", "is no replica"),
            ("\"n2\",\"n3\"", "\"nx\",\"n3\"", "is no node"),
            ("\"format\":1", "\"format\":2", "format 2"),
            ("\"made_ms\"", "\"made\"", "no plan"),
            ("07070707-", "zz-", "names no cluster"),
        ] {
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text, "{from}");
            let refused = from_json(&changed).unwrap_err();
            assert!(refused.contains(reason) && refused.contains("make a new"), "{from}: {refused}");
        }
    }
}
