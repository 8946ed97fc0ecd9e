//! One durable, segmented log that many groups share.
//!
//! - A [`Batch`] is atomic across its groups, through any crash. [`Wal::commit`] returns when it is durable; a
//!   [`Submitter`] does not wait and tells its [`PersistSink`], in order. One write and one sync make everything durable
//!   that was handed in meanwhile.
//! - Readers see a batch as soon as it is submitted. Bounds, terms, hard states and metadata never cost I/O.
//! - What was acknowledged is never dropped in silence: [`RecoveryReport`] names what a damaged disk lost, the groups that
//!   it hits answer [`Error::Damaged`], the others go on. Only an unacknowledged tail is cut.
//! - After a failed write or sync nothing is acknowledged any more.
//!
//! ```text
//!  Submitter ──> queue ──> writer ──> segments <── background: prepares, checkpoints, frees
//!      │  order, index        frames      │
//!      └─────> index <────────────────────┴── readers: memory, cache, pread
//! ```
//!
//! With [`Options::keys`], what it writes is encrypted.
//!
//! The format, the fault model and the argument for each crash are in `docs/wal-format.md`. The crate knows neither Raft
//! nor async runtimes; clock, randomness and disk are passed in ([`Options`]), and the simulated disk is part of it
//! ([`sim`]). An example is at [`Wal`].

mod background;
mod batch;
mod cache;
mod checkpoint;
mod codec;
mod compress;
mod create;
mod crypt;
mod driver;
mod error;
mod fetch;
mod footer;
mod frame;
pub mod fs;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod fuzzing;
mod index;
mod keys;
mod manifest;
mod metrics;
mod options;
mod outline;
mod pool;
mod queue;
mod read;
mod reader;
mod record;
mod recovery;
mod relocate;
mod rng;
#[doc(hidden)]
pub mod rules;
mod scrub;
mod segment;
mod shared;
pub mod sim;
mod slab;
mod space;
mod storage;
mod submit;
mod table;
pub mod tools;
mod types;
mod wal;
mod writer;

pub use batch::{Batch, MAX_BATCH_BYTES, MAX_META_BYTES, MAX_META_KEY_BYTES, MAX_SNAPSHOT_DATA_BYTES};
pub use compress::Compression;
pub use error::{Error, KeyFault, Result};
pub use fs::{Fs, RealFs};
pub use keys::{DataKey, KEY_BYTES, KeyError, KeyFile, KeyFileError, KeyId, KeyProvider, KeySet};
pub use metrics::{Histogram, Metrics, Times};
pub use options::{
    Clock, DriverMode, Durability, MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES, Options, SystemClock,
};
pub use pontoon_proto::GroupId;
pub use queue::{PersistSink, Persisted};
pub use read::Page;
pub use reader::WalReader;
pub use recovery::{DamageWhy, DamagedRecord, RecoveryReport, TornTail, TornWhy};
pub use scrub::ScrubReport;
pub use space::Reservation;
pub use storage::{MetaInt, Storage};
pub use submit::Submitter;
pub use types::{
    ConfState, Damage, Entry, GcStats, GroupView, HardState, Lsn, Pinned, SnapshotMeta, Usage, WalEvent,
};
pub use wal::Wal;
