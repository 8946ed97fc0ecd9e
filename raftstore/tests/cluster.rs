//! Three nodes in one process, over real logs and threads: the runtime as an embedder sees it.

#[path = "common/machine.rs"]
mod machine;
#[path = "common/network.rs"]
mod network;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use machine::TestMachines;
use network::{Link, Network};
use pontoon_proto::{ClusterId, GroupId, NodeId, ReplicaId, v1::ConfState};
use pontoon_raftstore::{
    Config, Error, Event, Group, GroupSpec, Identity, MemberChange, MultiRaft, Proposal, ProposeError,
    ReadLevel, Rejected, RequestId, Role, Verified,
};
use pontoon_wal::{Options, Wal};

const GROUP: GroupId = GroupId(7);
/// What a group's log keeps for members that are away.
const RETAINED_BYTES: u64 = 128 << 10;

struct Node {
    id: NodeId,
    dir: tempfile::TempDir,
    machines: TestMachines,
    running: Option<(MultiRaft, Wal)>,
}

struct Cluster {
    network: Arc<Network>,
    nodes: Vec<Node>,
}

fn replica(node: u64, ordinal: u32) -> ReplicaId {
    ReplicaId::on(NodeId::new(node).unwrap(), ordinal)
}

fn founders(ids: &[u64]) -> ConfState {
    ConfState { voters: ids.iter().map(|id| replica(*id, 1).get()).collect(), ..Default::default() }
}

impl Node {
    fn start(&mut self, network: &Arc<Network>) {
        let mut options = Options::new(self.dir.path().join("wal"));
        options.segment_bytes = 1 << 20;
        let (wal, _) = Wal::open(options).unwrap();
        let cluster = ClusterId::from_slice(&[3; 16]).unwrap();
        let identity = match Identity::load(&wal).unwrap() {
            Some(identity) => identity,
            None => Identity::establish(&wal, cluster, self.id, "in-process").unwrap(),
        };
        let config = Config {
            tick: Duration::from_millis(10),
            flush_interval: Duration::from_millis(20),
            chunk_bytes: 256,
            max_retained_bytes: RETAINED_BYTES,
            ..Default::default()
        };
        let link = Arc::new(Link { network: network.clone(), node: self.id });
        let runtime =
            MultiRaft::open(config, wal.clone(), identity, Arc::new(self.machines.clone()), link).unwrap();
        network.join(&runtime);
        self.running = Some((runtime, wal));
    }

    fn stop(&mut self, network: &Network) {
        if let Some((runtime, wal)) = self.running.take() {
            network.leave(self.id);
            runtime.shutdown();
            drop(runtime);
            wal.close().unwrap();
        }
    }

    fn runtime(&self) -> &MultiRaft {
        &self.running.as_ref().unwrap().0
    }
}

impl Cluster {
    fn new(size: u64) -> Cluster {
        let network = Arc::new(Network::default());
        let nodes = (1..=size)
            .map(|id| {
                let mut node = Node {
                    id: NodeId::new(id).unwrap(),
                    dir: tempfile::tempdir().unwrap(),
                    machines: TestMachines::default(),
                    running: None,
                };
                node.start(&network);
                node
            })
            .collect();
        Cluster { network, nodes }
    }

    fn node(&self, id: u64) -> &Node {
        &self.nodes[id as usize - 1]
    }

    fn group(&self, id: u64) -> Group {
        self.node(id).runtime().group(GROUP).unwrap()
    }

    fn stop(&mut self, id: u64) {
        let network = self.network.clone();
        tokio::task::block_in_place(|| self.nodes[id as usize - 1].stop(&network));
    }

    fn start(&mut self, id: u64) {
        let network = self.network.clone();
        tokio::task::block_in_place(|| self.nodes[id as usize - 1].start(&network));
    }

    async fn create(&self, members: &[u64]) {
        for id in members {
            let spec = GroupSpec {
                group: GROUP,
                replica: replica(*id, 1),
                descriptor: Bytes::from_static(b"test"),
                epoch: 1,
                initial: Some(founders(members)),
            };
            self.node(*id).runtime().create_group(spec).await.unwrap();
        }
    }

    async fn create_learner(&self, id: u64, ordinal: u32) -> Result<Group, Error> {
        let spec = GroupSpec {
            group: GROUP,
            replica: replica(id, ordinal),
            descriptor: Bytes::from_static(b"test"),
            epoch: 0,
            initial: None,
        };
        self.node(id).runtime().create_group(spec).await
    }

    /// The running node that leads, once one does.
    async fn leader(&self) -> Group {
        loop {
            for node in self.nodes.iter().filter(|node| node.running.is_some()) {
                let Some(group) = node.runtime().group(GROUP) else { continue };
                if group.status().borrow().role == Role::Leader
                    && group.read_barrier(ReadLevel::Linearizable).await.is_ok()
                {
                    return group;
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Proposes until it is applied, with one request id.
    async fn write(&self, text: &str, request: Option<RequestId>) -> Bytes {
        loop {
            let proposal = Proposal {
                payload: Bytes::copy_from_slice(text.as_bytes()),
                request,
                epoch: 0,
                urgent: false,
            };
            match self.leader().await.propose(proposal).await {
                Ok(applied) => return applied.reply,
                Err(ProposeError::Rejected(Rejected::NotLeader { .. } | Rejected::Busy { .. }))
                | Err(ProposeError::Ambiguous(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    async fn applied_everywhere(&self, ids: &[u64], index: u64) {
        for id in ids {
            let mut status = self.group(*id).status();
            status.wait_for(|status| status.applied >= index).await.unwrap();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            node.stop(&self.network);
        }
    }
}

/// Every test has a bound: an event that never comes is a failure, not a hang.
fn run<T>(test: impl Future<Output = T>) -> T {
    let filter = tracing_subscriber::EnvFilter::from_env("PONTOON_LOG");
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(30), test).await.expect("the test hangs")
    })
}

#[test]
fn a_write_reaches_three_replicas_and_a_retry_is_applied_once() {
    run(async {
        let cluster = Cluster::new(3);
        cluster.create(&[1, 2, 3]).await;
        let stamp = cluster.leader().await.session_stamp().await.unwrap();
        let request = RequestId { client: 9, stamp, seq: 1, acked_below: 0 };
        assert_eq!(cluster.write("k=a", Some(request)).await, "a");
        assert_eq!(cluster.write("k=a", Some(request)).await, "a", "the retry gets the first answer");
        let next = RequestId { seq: 2, acked_below: 2, ..request };
        assert_eq!(cluster.write("k=b", Some(next)).await, "ab");
        let index = cluster.leader().await.read_barrier(ReadLevel::Linearizable).await.unwrap();
        cluster.applied_everywhere(&[1, 2, 3], index).await;
        for id in 1..=3 {
            assert_eq!(cluster.node(id).machines.row(GROUP, "k").as_deref(), Some("ab"));
        }
    });
}

#[test]
fn followers_refuse_with_a_hint_and_wrong_epochs_are_rejected_at_apply() {
    run(async {
        let cluster = Cluster::new(3);
        cluster.create(&[1, 2, 3]).await;
        let leader = cluster.leader().await;
        let follower = (1..=3).map(|id| cluster.group(id)).find(|g| g.replica() != leader.replica()).unwrap();
        follower.wait_for_leader().await.unwrap();
        let refused = follower.read_barrier(ReadLevel::Linearizable).await.unwrap_err();
        assert_eq!(refused, Rejected::NotLeader { group: GROUP, leader: Some(leader.replica()) });
        let stale = Proposal { payload: Bytes::from_static(b"k=x"), request: None, epoch: 9, urgent: false };
        let error = leader.propose(stale).await.unwrap_err();
        assert_eq!(
            error,
            ProposeError::Rejected(Rejected::StaleEpoch { group: GROUP, asked: 9, current: 1 })
        );
        let large =
            Proposal { payload: Bytes::from(vec![b'x'; 4 << 20]), request: None, epoch: 0, urgent: false };
        assert!(matches!(
            leader.propose(large).await.unwrap_err(),
            ProposeError::Rejected(Rejected::TooLarge { .. })
        ));
    });
}

#[test]
fn writes_go_on_when_the_leader_stops_and_it_catches_up_when_it_returns() {
    run(async {
        let mut cluster = Cluster::new(3);
        cluster.create(&[1, 2, 3]).await;
        cluster.write("k=a", None).await;
        let old = cluster.leader().await.replica().node().get();
        cluster.stop(old);
        cluster.write("k=b", None).await;
        cluster.start(old);
        assert_eq!(cluster.write("k=c", None).await, "abc");
        let index = cluster.leader().await.read_barrier(ReadLevel::Linearizable).await.unwrap();
        cluster.applied_everywhere(&[1, 2, 3], index).await;
        assert_eq!(cluster.node(old).machines.row(GROUP, "k").as_deref(), Some("abc"));
    });
}

#[test]
fn everything_survives_a_restart_of_all_nodes() {
    run(async {
        let mut cluster = Cluster::new(3);
        cluster.create(&[1, 2, 3]).await;
        let stamp = cluster.leader().await.session_stamp().await.unwrap();
        let request = RequestId { client: 1, stamp, seq: 1, acked_below: 0 };
        cluster.write("k=a", Some(request)).await;
        for id in 1..=3 {
            cluster.stop(id);
        }
        for id in 1..=3 {
            cluster.start(id);
        }
        assert_eq!(cluster.write("k=a", Some(request)).await, "a", "the dedup table survived");
        assert_eq!(cluster.write("k=b", None).await, "ab");
    });
}

#[test]
fn a_lost_engine_that_nobody_can_replace_is_told_and_promises_nothing() {
    run(async {
        let mut cluster = Cluster::new(1);
        cluster.create(&[1]).await;
        for i in 0..600 {
            cluster.write(&format!("k{i}=v"), None).await;
        }
        let mut status = cluster.group(1).status();
        status.wait_for(|status| status.first_index > 6).await.unwrap();
        cluster.stop(1);
        cluster.nodes[0].machines.groups.lock().unwrap().clear();
        cluster.start(1);
        let status = cluster.group(1).status().borrow().clone();
        assert_eq!((status.role, status.leader, status.applied), (Role::Follower, None, 0));
        assert!(status.pull_blocked.unwrap().contains("restore the engine's directory"));
        let refused = cluster.group(1).read_barrier(ReadLevel::Local).await;
        assert!(matches!(refused, Err(Rejected::NotLeader { .. })));
    });
}

#[test]
fn a_replica_whose_engine_is_lost_takes_its_state_from_another_and_votes_again() {
    run(async {
        let mut cluster = Cluster::new(3);
        cluster.create(&[1, 2, 3]).await;
        for i in 0..600 {
            cluster.write(&format!("k{i}=v"), None).await;
        }
        let lost = cluster.leader().await.replica().node().get();
        let mut status = cluster.group(lost).status();
        status.wait_for(|status| status.first_index > 6).await.unwrap();
        cluster.stop(lost);
        cluster.node(lost).machines.groups.lock().unwrap().clear();
        cluster.write("k=between", None).await;
        cluster.start(lost);
        let index = cluster.leader().await.read_barrier(ReadLevel::Linearizable).await.unwrap();
        cluster.applied_everywhere(&[1, 2, 3], index).await;
        assert_eq!(cluster.node(lost).machines.row(GROUP, "k599").as_deref(), Some("v"));
        assert_eq!(cluster.node(lost).machines.row(GROUP, "k").as_deref(), Some("between"));
        // Without its vote the two that are left could not go on.
        let leader = cluster.leader().await.replica().node().get();
        cluster.stop(leader);
        assert_eq!(cluster.write("k=!", None).await, "between!");
    });
}

#[test]
fn replicas_tell_the_hash_of_one_state_and_forget_it_with_a_restart() {
    run(async {
        let mut cluster = Cluster::new(3);
        cluster.create(&[1, 2, 3]).await;
        cluster.write("k=a", None).await;
        let index = cluster.leader().await.verify().await.unwrap();
        cluster.write("k=b", None).await;
        let mut hashes = Vec::new();
        for id in 1..=3 {
            let mut status = cluster.group(id).status();
            let known =
                |verified: Option<Verified>| verified.is_some_and(|v| v.index == index && v.hash.is_some());
            let status = status.wait_for(|status| known(status.verified)).await.unwrap();
            hashes.push(status.verified.unwrap().hash);
        }
        assert!(hashes[0] == hashes[1] && hashes[1] == hashes[2]);
        cluster.stop(2);
        cluster.start(2);
        let status = cluster.group(2).status();
        assert_eq!(status.borrow().verified, None, "unknown: another question is to be asked");
        cluster.applied_everywhere(&[2], index).await;
        let again = cluster.leader().await.verify().await.unwrap();
        let mut status = cluster.group(2).status();
        let status = status.wait_for(|s| s.verified.is_some_and(|v| v.index == again && v.hash.is_some()));
        let now = status.await.unwrap().verified.unwrap().hash;
        assert_ne!(now, hashes[0], "another state");
    });
}

#[test]
fn a_learner_takes_a_snapshot_is_swapped_in_and_the_old_replica_is_fenced() {
    run(async {
        let cluster = Cluster::new(4);
        cluster.create(&[1, 2, 3]).await;
        for i in 0..500 {
            cluster.write(&format!("row-{i}=value"), None).await;
        }
        let target = replica(4, 2);
        let learner = cluster.create_learner(4, 2).await.unwrap();
        cluster.leader().await.add_learner(target).await.unwrap();
        cluster.write("k=a", None).await;
        let index = cluster.leader().await.read_barrier(ReadLevel::Linearizable).await.unwrap();
        learner.status().wait_for(|status| status.applied >= index).await.unwrap();
        assert_eq!(learner.status().borrow().role, Role::Learner);

        // Node 1 leaves; leadership first.
        let source = replica(1, 1);
        loop {
            let leader = cluster.leader().await;
            if leader.replica() == source {
                leader.transfer_leader(replica(2, 1)).await.unwrap();
                let mut status = leader.status();
                let _ = status.wait_for(|status| status.role != Role::Leader).await;
                continue;
            }
            let change = MemberChange::EnterJoint { promote: vec![target], demote: vec![source] };
            match leader.change(change).await {
                Ok(()) => break,
                Err(Rejected::Membership { .. } | Rejected::NotLeader { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        // Whoever leads leaves the joint configuration by itself.
        learner
            .status()
            .wait_for(|status| !status.is_joint() && status.conf_state.voters.contains(&target.get()))
            .await
            .unwrap();
        loop {
            match cluster.leader().await.remove(source).await {
                Ok(()) => break,
                Err(Rejected::Membership { .. } | Rejected::NotLeader { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        let runtime = cluster.node(1).runtime();
        runtime.destroy_replica(GROUP, source).await.unwrap();
        runtime.destroy_replica(GROUP, source).await.unwrap();
        assert!(runtime.group(GROUP).is_none());
        assert!(cluster.node(1).machines.groups.lock().unwrap().is_empty());
        let back = cluster.create_learner(1, 1).await;
        assert!(matches!(back, Err(Error::Tombstoned { .. })), "a removed id never returns");

        assert_eq!(cluster.write("k=b", None).await, "ab");
        let index = cluster.leader().await.read_barrier(ReadLevel::Linearizable).await.unwrap();
        cluster.applied_everywhere(&[2, 3, 4], index).await;
        assert_eq!(cluster.node(4).machines.row(GROUP, "row-499").as_deref(), Some("value"));
        assert_eq!(cluster.node(4).machines.row(GROUP, "k").as_deref(), Some("ab"));
    });
}

#[test]
fn a_single_voter_hands_over_inside_the_joint_configuration() {
    run(async {
        let cluster = Cluster::new(2);
        cluster.create(&[1]).await;
        cluster.write("k=a", None).await;
        let (source, target) = (replica(1, 1), replica(2, 2));
        let learner = cluster.create_learner(2, 2).await.unwrap();
        let leader = cluster.leader().await;
        leader.add_learner(target).await.unwrap();
        let index = leader.read_barrier(ReadLevel::Linearizable).await.unwrap();
        learner.status().wait_for(|status| status.applied >= index).await.unwrap();
        while leader
            .change(MemberChange::EnterJoint { promote: vec![target], demote: vec![source] })
            .await
            .is_err()
        {}
        learner.status().wait_for(|status| status.role == Role::Leader && !status.is_joint()).await.unwrap();
        assert_eq!(learner.status().borrow().conf_state.voters, [target.get()]);
        assert_eq!(cluster.write("k=b", None).await, "ab");
    });
}

#[test]
fn a_member_that_was_cut_off_catches_up_from_the_log_that_was_kept_for_it() {
    run(async {
        let cluster = Cluster::new(3);
        cluster.create(&[1, 2, 3]).await;
        cluster.write("k=a", None).await;
        let behind = (1..=3).find(|id| cluster.group(*id).status().borrow().role != Role::Leader).unwrap();
        cluster.network.cut(NodeId::new(behind).unwrap(), true);
        for i in 0..300 {
            cluster.write(&format!("row-{i}=v"), None).await;
        }
        cluster.network.cut(NodeId::new(behind).unwrap(), false);
        let index = cluster.leader().await.read_barrier(ReadLevel::Linearizable).await.unwrap();
        cluster.applied_everywhere(&[1, 2, 3], index).await;
        assert_eq!(cluster.node(behind).machines.row(GROUP, "row-299").as_deref(), Some("v"));
    });
}

#[test]
fn a_member_that_is_away_for_too_long_pins_no_more_log_than_it_may() {
    run(async {
        let cluster = Cluster::new(3);
        cluster.create(&[1, 2, 3]).await;
        cluster.write("k=a", None).await;
        let behind = (1..=3).find(|id| cluster.group(*id).status().borrow().role != Role::Leader).unwrap();
        let stands_at = cluster.group(behind).status().borrow().last_index;
        cluster.network.cut(NodeId::new(behind).unwrap(), true);
        let value = "v".repeat(1000);
        let mut written = 0;
        // The leader's log begins after what the absent member would need.
        while cluster.leader().await.status().borrow().first_index <= stands_at + 1 {
            cluster.write(&format!("row-{written}={value}"), None).await;
            written += 1;
        }
        assert!(written as u64 * 1000 > RETAINED_BYTES / 2, "{written} rows are worth keeping");
        let mut events = cluster.node(behind).runtime().events();
        cluster.network.cut(NodeId::new(behind).unwrap(), false);
        while !matches!(events.recv().await.unwrap(), Event::SnapshotInstalled { .. }) {}
        let index = cluster.leader().await.read_barrier(ReadLevel::Linearizable).await.unwrap();
        cluster.applied_everywhere(&[1, 2, 3], index).await;
        let last = format!("row-{}", written - 1);
        assert_eq!(cluster.node(behind).machines.row(GROUP, &last), Some(value));
    });
}

#[test]
fn a_panicking_machine_stops_its_replica_and_no_other_group() {
    run(async {
        let cluster = Cluster::new(1);
        cluster.create(&[1]).await;
        let other = GroupId(8);
        let spec = GroupSpec {
            group: other,
            replica: replica(1, 1),
            descriptor: Bytes::new(),
            epoch: 1,
            initial: Some(founders(&[1])),
        };
        let healthy = cluster.node(1).runtime().create_group(spec).await.unwrap();
        let poison =
            Proposal { payload: Bytes::from_static(b"panic"), request: None, epoch: 0, urgent: false };
        let error = cluster.leader().await.propose(poison).await.unwrap_err();
        assert!(matches!(error, ProposeError::Ambiguous(_)), "{error}");
        cluster.group(1).status().wait_for(|status| status.role == Role::Dead).await.unwrap();
        healthy.wait_for_leader().await.unwrap();
        healthy.read_barrier(ReadLevel::Linearizable).await.unwrap();
        let fine = Proposal { payload: Bytes::from_static(b"k=v"), request: None, epoch: 0, urgent: false };
        assert_eq!(healthy.propose(fine).await.unwrap().reply, "v");
    });
}
