//! A whole cluster in one thread, from one seed.
//!
//! ```text
//!  operator ──┐                                    ┌── Ledger: what each replica applied, compared at each index
//!  clients  ──┼─> Net ─> Node: Stepped, Wal, ShardMachines ─> checks ─> histories ─> linear
//!  driver   ──┘            SimFs, MemoryDisk, clock of its own
//! ```
//!
//! What runs is what ships: the runtime's core, appliers and snapshot server ([`pontoon_raftstore::Stepped`]), the log, the
//! state machines of the meta group and of maps over the in-memory engine, the mover and the planner. What is made up is the
//! world around them: network, disks, clocks, clients, the operator, and the calls that carry the mover's decisions.
//!
//! A run founds a cluster, lets faults strike while clients work and replicas move (the safety phase), then heals a
//! majority, then everything, and demands progress and order within a bound (the liveness phase). Checked all the time: at
//! most one leader per term, committed entries never change, logs that agree on an entry agree on all before it, replicas
//! that applied the same index applied the same commands with the same answers and hold the same configuration, no replica
//! dies that nobody hurt, a voter has the state, a member is never fenced. Checked at the end: the history of each key is
//! linearizable, appended values are there once and in order, replicas hold equal rows, nobody holds what it should not.
//!
//! The faults stay within what a cluster must survive: a disk is lost or damaged for good only while every group can spare
//! that replica, and what is damaged is replaced under a new id before the next.

mod checks;
mod clients;
mod coverage;
mod driver;
mod faults;
mod greet;
mod machines;
#[cfg(feature = "testing")]
mod mistake;
mod net;
mod node;
mod operator;
mod placing;
mod plan;
mod run;
mod scenario;
mod steps;
mod timeline;
mod work;
mod world;

pub use coverage::{Coverage, Kind};
#[cfg(feature = "testing")]
pub use mistake::{Making, Mistake};
pub use plan::{Faults, Plan};
pub use run::{Failure, Report, run};
pub use scenario::{Captured, OldDisks, OldLog, Scenario};
pub use steps::Persisted;
