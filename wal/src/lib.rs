//! One durable, segmented log that many groups share.

mod background;
mod batch;
mod cache;
mod codec;
mod create;
mod driver;
mod error;
mod frame;
pub mod fs;
mod index;
mod manifest;
mod options;
mod queue;
mod read;
mod reader;
mod record;
mod recovery;
mod rng;
mod segment;
mod shared;
pub mod sim;
mod space;
mod storage;
mod submit;
mod table;
mod types;
mod wal;
mod writer;

pub use batch::{Batch, MAX_BATCH_BYTES, MAX_META_BYTES, MAX_META_KEY_BYTES, MAX_SNAPSHOT_DATA_BYTES};
pub use error::{Error, Result};
pub use fs::{Fs, RealFs};
pub use options::{Clock, DriverMode, Durability, MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES, Options, SystemClock};
pub use pontoon_proto::GroupId;
pub use queue::{PersistSink, Persisted};
pub use reader::WalReader;
pub use space::Reservation;
pub use storage::{MetaInt, Storage};
pub use submit::Submitter;
pub use types::{
    ConfState, Damage, Entry, GcStats, GroupView, HardState, Lsn, Pinned, SnapshotMeta, Usage, WalEvent,
};
pub use recovery::{DamagedRecord, RecoveryReport, TornTail};
pub use wal::Wal;
