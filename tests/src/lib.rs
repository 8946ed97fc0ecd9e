//! Whole clusters under test: simulated ones and real ones.
//!
//! [`sim`] is a cluster in one thread, from one seed: what ships, in a world that is made up. [`linear`] judges what its
//! clients saw. A failed check prints the seed, and the seed replays the run.
//!
//! [`balance`] tells how long it takes until nodes are evenly used, in virtual time.
//!
//! [`cluster`] is one of real processes, killed for real, and [`traffic`] and [`history`] the writers and readers that know what must
//! be true of it. [`chaos`] hurts the network, the disks and the clocks of such a cluster, and [`browser`] is a headless one that looks at
//! its console.

pub mod balance;
pub mod browser;
pub mod chaos;
pub mod cluster;
pub mod films;
pub mod history;
pub mod http;
pub mod linear;
pub mod process;
mod rng;
pub mod sim;
pub mod traffic;

pub use rng::Rng;
