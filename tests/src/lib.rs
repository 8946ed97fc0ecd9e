//! The simulator: a whole cluster in one thread, from one seed.
//!
//! [`World`] runs the runtime's own core, appliers and snapshot server over the real log on a simulated disk, with a
//! network that delays, loses and partitions and with power cuts at any moment. [`machine`] is the state that it
//! replicates, with the durability of an engine: what was not flushed is lost. A failed check prints the seed, and the
//! seed replays the run.

pub mod machine;
mod net;
mod rng;
mod world;

pub use rng::Rng;
pub use world::{Faults, World};
