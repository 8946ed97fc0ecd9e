//! A network between namespaces that loses, delays, chokes and cuts, one direction at a time.
//!
//! Each namespace has one device, a TUN, and everything that leaves it comes here: a packet is dropped, or put into the device of
//! whom it is for, at once or later. What the nodes run over it is the system's own TCP.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io,
    net::Ipv4Addr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::Rng;

/// The largest packet.
pub(super) const MTU: u16 = 1_400;
/// Bytes that may wait for a choked link; more are lost, as in a router.
const QUEUE_BYTES: f64 = 262_144.0;

/// What one direction between two hosts does to packets.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Link {
    /// Nothing passes.
    pub cut: bool,
    /// Of a thousand packets so many are lost.
    pub loss: u64,
    /// How much later a packet arrives, up to twice as much.
    pub delay: Duration,
    /// Bytes per second; 0: as many as there are.
    pub rate: u64,
}

struct Later {
    at: Instant,
    order: u64,
    to: usize,
    packet: Vec<u8>,
}

impl PartialEq for Later {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Later {}

impl PartialOrd for Later {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Later {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

struct State {
    links: Vec<Vec<Link>>,
    /// When a choked link will have sent what it took.
    busy: Vec<Vec<Instant>>,
    later: BinaryHeap<Reverse<Later>>,
    order: u64,
    rng: Rng,
}

struct Inner {
    devices: Vec<SyncDevice>,
    state: Mutex<State>,
    changed: Condvar,
    passed: AtomicU64,
    dropped: AtomicU64,
}

/// All hosts and what is between them. Host `n` has the address [`Net::address`]`(n)`.
pub struct Net(Arc<Inner>);

fn held(inner: &Inner) -> MutexGuard<'_, State> {
    inner.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Net {
    /// The address of a host.
    pub fn address(host: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 1 + host as u8)
    }

    /// The name of a host's device, which whoever made the host's namespace moves there and sets up.
    pub fn device(host: usize) -> String {
        format!("chaos{host}")
    }

    /// Makes the devices of so many hosts, here, and begins to carry.
    ///
    /// # Errors
    /// If this process may not make devices.
    pub fn new(hosts: usize, seed: u64) -> io::Result<Net> {
        let make = |host| {
            DeviceBuilder::new().name(Net::device(host)).layer(Layer::L3).mtu(MTU).enable(false).build_sync()
        };
        let devices = (0..hosts).map(make).collect::<io::Result<Vec<SyncDevice>>>()?;
        let state = State {
            links: vec![vec![Link::default(); hosts]; hosts],
            busy: vec![vec![Instant::now(); hosts]; hosts],
            later: BinaryHeap::new(),
            order: 0,
            rng: Rng::new(seed),
        };
        let inner = Arc::new(Inner {
            devices,
            state: Mutex::new(state),
            changed: Condvar::new(),
            passed: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        });
        for host in 0..hosts {
            let inner = inner.clone();
            thread::spawn(move || carry(&inner, host));
        }
        let weak = Arc::downgrade(&inner);
        thread::spawn(move || deliver(&weak));
        Ok(Net(inner))
    }

    /// What the links of both directions, or of one, do from now on.
    pub fn set(&self, from: usize, to: usize, link: Link, both: bool) {
        let mut state = held(&self.0);
        state.links[from][to] = link;
        if both {
            state.links[to][from] = link;
        }
    }

    /// Every link is well.
    pub fn heal(&self) {
        held(&self.0).links.iter_mut().flatten().for_each(|link| *link = Link::default());
    }

    /// Packets that arrived, and that did not.
    pub fn packets(&self) -> (u64, u64) {
        (self.0.passed.load(Ordering::Relaxed), self.0.dropped.load(Ordering::Relaxed))
    }
}

/// To which host a packet goes.
fn receiver(packet: &[u8], hosts: usize) -> Option<usize> {
    let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    let is_v4 = packet[0] >> 4 == 4;
    (0..hosts).find(|host| is_v4 && Net::address(*host).octets() == to)
}

fn carry(inner: &Inner, from: usize) {
    let mut buffer = vec![0; 65_536];
    loop {
        // The device ends with the process only.
        let Ok(len) = inner.devices[from].recv(&mut buffer) else { return };
        let packet = &buffer[..len];
        let Some(to) = receiver(packet, inner.devices.len()) else { continue };
        let mut state = held(inner);
        let link = state.links[from][to];
        if link.cut || (link.loss > 0 && state.rng.chance(link.loss)) {
            inner.dropped.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let now = Instant::now();
        let mut at = now;
        if link.rate > 0 {
            let waits = state.busy[from][to].saturating_duration_since(now).as_secs_f64();
            if waits * link.rate as f64 > QUEUE_BYTES {
                inner.dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            at = now + Duration::from_secs_f64(waits + len as f64 / link.rate as f64);
            state.busy[from][to] = at;
        }
        if !link.delay.is_zero() {
            let micros = link.delay.as_micros() as u64;
            at += Duration::from_micros(micros + state.rng.below(micros.max(1)));
        }
        if at == now {
            drop(state);
            give(inner, to, packet);
            continue;
        }
        state.order += 1;
        let order = state.order;
        state.later.push(Reverse(Later { at, order, to, packet: packet.to_vec() }));
        inner.changed.notify_one();
    }
}

/// A namespace whose queue is full, or that is gone, loses it.
fn give(inner: &Inner, to: usize, packet: &[u8]) {
    match inner.devices[to].send(packet) {
        Ok(_) => inner.passed.fetch_add(1, Ordering::Relaxed),
        Err(_) => inner.dropped.fetch_add(1, Ordering::Relaxed),
    };
}

fn deliver(inner: &Weak<Inner>) {
    while let Some(inner) = inner.upgrade() {
        let mut state = held(&inner);
        let now = Instant::now();
        let wait = match state.later.peek() {
            Some(Reverse(next)) if next.at <= now => {
                let Some(Reverse(next)) = state.later.pop() else { continue };
                drop(state);
                give(&inner, next.to, &next.packet);
                continue;
            }
            Some(Reverse(next)) => next.at - now,
            None => Duration::from_millis(200),
        };
        drop(inner.changed.wait_timeout(state, wait));
    }
}
