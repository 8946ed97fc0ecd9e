//! Whole clusters under test: simulated ones and real ones.
//!
//! The simulator is a cluster in one thread, from one seed. [`World`] runs the runtime's own core, appliers and
//! snapshot server over the real log on a simulated disk, with a network that delays, loses and partitions and with
//! power cuts at any moment. [`machine`] is the state that it replicates, with the durability of an engine: what was
//! not flushed is lost. A failed check prints the seed, and the seed replays the run.
//!
//! [`cluster`] is one of real processes, killed for real, and [`traffic`] the writers and readers that know what must
//! be true of it.

pub mod cluster;
pub mod machine;
mod net;
pub mod process;
mod rng;
pub mod traffic;
mod world;

pub use rng::Rng;
pub use world::{Faults, World};
