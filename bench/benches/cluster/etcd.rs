//! Three members of etcd, and closed-loop clients of its gRPC interface.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use tokio::runtime::Runtime;
use tonic::{
    Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use crate::{
    Case, Cluster, Figures, Load, Outcome,
    process::{Member, cpu_of, free_port},
};

/// The part of etcd's interface that is used; field numbers are etcd's.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PutRequest {
        #[prost(bytes = "bytes", tag = "1")]
        pub(super) key: bytes::Bytes,
        #[prost(bytes = "bytes", tag = "2")]
        pub(super) value: bytes::Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct RangeRequest {
        #[prost(bytes = "bytes", tag = "1")]
        pub(super) key: bytes::Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Empty {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Header {
        #[prost(uint64, tag = "2")]
        pub(super) member_id: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct StatusResponse {
        #[prost(message, optional, tag = "1")]
        pub(super) header: Option<Header>,
        #[prost(uint64, tag = "4")]
        pub(super) leader: u64,
    }
}

/// Connections that the clients share, all to the leader.
const CONNECTIONS: u32 = 16;
const START: Duration = Duration::from_secs(20);

pub(crate) fn is_there() -> bool {
    Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

pub(crate) struct Etcd {
    runtime: Runtime,
    members: Vec<Member>,
    addresses: Vec<String>,
    leader: usize,
}

async fn call<Q, A>(channel: &Channel, path: &'static str, request: Q) -> Result<A, Status>
where
    Q: prost::Message + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec: ProstCodec<Q, A> = ProstCodec::default();
    grpc.unary(Request::new(request), PathAndQuery::from_static(path), codec).await.map(|r| r.into_inner())
}

async fn put(channel: &Channel, key: String, value: bytes::Bytes) -> Result<(), Status> {
    let request = wire::PutRequest { key: key.into(), value };
    call::<_, wire::Empty>(channel, "/etcdserverpb.KV/Put", request).await.map(drop)
}

async fn read(channel: &Channel, key: String) -> Result<(), Status> {
    let request = wire::RangeRequest { key: key.into() };
    call::<_, wire::Empty>(channel, "/etcdserverpb.KV/Range", request).await.map(drop)
}

fn key(client: u32, at: u64) -> String {
    format!("{client:05}/{:05}", at & 0xffff)
}

impl Etcd {
    pub(crate) fn start(dir: &Path) -> Outcome<Etcd> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let ports: Vec<(u16, u16)> =
            (0..3).map(|_| Ok((free_port()?, free_port()?))).collect::<Outcome<_>>()?;
        let peers: Vec<String> = ports
            .iter()
            .enumerate()
            .map(|(at, (_, peer))| format!("m{at}=http://127.0.0.1:{peer}"))
            .collect();
        let mut members = Vec::new();
        for (at, (client, peer)) in ports.iter().enumerate() {
            let log = std::fs::File::create(dir.join(format!("etcd{at}.log")))?;
            let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
            let mut command = Command::new("etcd");
            command.arg("--name").arg(format!("m{at}")).arg("--data-dir").arg(dir.join(format!("etcd{at}")));
            for (flag, value) in [
                ("--listen-client-urls", client.as_str()),
                ("--advertise-client-urls", client.as_str()),
                ("--listen-peer-urls", peer.as_str()),
                ("--initial-advertise-peer-urls", peer.as_str()),
                ("--initial-cluster", peers.join(",").as_str()),
                ("--log-level", "error"),
            ] {
                command.arg(flag).arg(value);
            }
            members.push(Member::spawn(command.stdout(Stdio::null()).stderr(log))?);
        }
        let addresses = ports.iter().map(|(client, _)| format!("http://127.0.0.1:{client}")).collect();
        let mut cluster = Etcd { runtime, members, addresses, leader: 0 };
        let begun = Instant::now();
        cluster.leader = loop {
            if let Some(leader) = cluster.find_leader() {
                break leader;
            }
            if begun.elapsed() > START {
                return Err("etcd elects no leader".into());
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        Ok(cluster)
    }

    fn find_leader(&self) -> Option<usize> {
        self.runtime.block_on(async {
            for (at, address) in self.addresses.iter().enumerate() {
                let Ok(channel) = Endpoint::from_shared(address.clone()).ok()?.connect().await else {
                    continue;
                };
                let path = "/etcdserverpb.Maintenance/Status";
                let status: Result<wire::StatusResponse, _> = call(&channel, path, wire::Empty {}).await;
                let Ok(status) = status else { continue };
                if status.leader != 0 && status.header.is_some_and(|header| header.member_id == status.leader)
                {
                    return Some(at);
                }
            }
            None
        })
    }

    /// Connections to these members, made on first use and again when they break.
    fn channels(&self, members: &[usize], count: u32) -> Outcome<Vec<Channel>> {
        let _inside = self.runtime.enter();
        let address = |at: u32| self.addresses[members[at as usize % members.len()]].clone();
        (0..count).map(|at| Ok(Endpoint::from_shared(address(at))?.connect_lazy())).collect()
    }
}

/// What the clients saw together.
struct Seen {
    latencies: Histogram<u64>,
    failed: u64,
}

/// One client's part: runs until it is told to stop.
async fn client(case: Case, number: u32, channels: Vec<Channel>, stop: Arc<AtomicBool>) -> Outcome<Seen> {
    let mut seen = Seen { latencies: Histogram::new_with_bounds(1, 3_600_000_000, 3)?, failed: 0 };
    let value = bytes::Bytes::from(vec![b'v'; case.value_bytes as usize]);
    let mut at = 0;
    let mut channel = number as usize % channels.len();
    while !stop.load(Ordering::Relaxed) {
        at += 1;
        let begun = Instant::now();
        if case.load == Load::Failover {
            // Until it is written: at another member after a failure, and after half a second without an answer.
            loop {
                let attempt = put(&channels[channel], key(number, at), value.clone());
                match tokio::time::timeout(Duration::from_millis(500), attempt).await {
                    Ok(Ok(())) => break,
                    _ => channel = (channel + 1) % channels.len(),
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        } else {
            let done = match case.load {
                Load::Read => read(&channels[channel], key(number, at)).await,
                _ => put(&channels[channel], key(number, at), value.clone()).await,
            };
            seen.failed += u64::from(done.is_err());
        }
        seen.latencies.saturating_record(begun.elapsed().as_micros() as u64);
    }
    Ok(seen)
}

impl Cluster for Etcd {
    fn name(&self) -> &'static str {
        "etcd"
    }

    fn run(&mut self, case: &Case, time: Duration) -> Outcome<Option<Figures>> {
        if matches!(case.load, Load::Batch(_)) {
            // It has no call for independent writes.
            return Ok(None);
        }
        let members: Vec<usize> = match case.load {
            Load::Failover => (0..3).collect(),
            _ => vec![self.leader],
        };
        let channels = self.channels(&members, CONNECTIONS.min(case.clients).max(members.len() as u32))?;
        // A first second warms up and writes what is read.
        self.drive(&Case { load: Load::Put, ..*case }, &channels, Duration::from_secs(1), false)?;
        let before = cpu_of(&self.members)?;
        let begun = Instant::now();
        let seen = self.drive(case, &channels, time, case.load == Load::Failover)?;
        let seconds = begun.elapsed().as_secs_f64();
        if seen.failed > 0 {
            return Err(format!("{} operations failed", seen.failed).into());
        }
        let operations = seen.latencies.len() as f64;
        let cpu = match case.load {
            Load::Failover => 0.0,
            _ => (cpu_of(&self.members)? - before).as_secs_f64() * 1000.0 / operations,
        };
        let ms = |quantile| seen.latencies.value_at_quantile(quantile) as f64 / 1000.0;
        Ok(Some(Figures {
            per_s: operations / seconds,
            p50_ms: ms(0.5),
            p99_ms: ms(0.99),
            p999_ms: ms(0.999),
            max_ms: seen.latencies.max() as f64 / 1000.0,
            cpu_ms_per_op: cpu,
        }))
    }
}

impl Etcd {
    fn drive(&mut self, case: &Case, channels: &[Channel], time: Duration, kill: bool) -> Outcome<Seen> {
        let stop = Arc::new(AtomicBool::new(false));
        let clients: Vec<_> = (0..case.clients)
            .map(|number| self.runtime.spawn(client(*case, number, channels.to_vec(), stop.clone())))
            .collect();
        if kill {
            std::thread::sleep(time / 3);
            self.members.remove(self.leader).kill()?;
            std::thread::sleep(time * 2 / 3);
        } else {
            std::thread::sleep(time);
        }
        stop.store(true, Ordering::Relaxed);
        let mut all = Seen { latencies: Histogram::new_with_bounds(1, 3_600_000_000, 3)?, failed: 0 };
        for client in clients {
            let seen = self.runtime.block_on(client)??;
            all.latencies.add(&seen.latencies)?;
            all.failed += seen.failed;
        }
        Ok(all)
    }
}
