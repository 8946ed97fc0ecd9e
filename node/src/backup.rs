//! Backups of predicates: taken from a running cluster, verified without one, restored into any.
//!
//! ```text
//!  replica ── point in time ──> chunks ──> DIR/chunks/ab/<hash>   only what is not there yet
//!                                └──────── DIR/backups/<id>.json  the manifest, last: with it the backup exists
//!
//!  manifest ──> chunks, each checked by its hash ──> ordinary writes ──> another group, by any engine
//! ```
//!
//! - A predicate is as it was at one index of its group, which is one command; of two predicates each has its own.
//! - What is kept belongs to users: keys and values, records and offsets. Sessions, row indexes and node ids are a cluster's own
//!   (`docs/decisions/0028-backups.md`).
//! - A chunk's name is the hash of its rows, so what has not changed is stored once, and a killed backup's chunks are found by the
//!   next one. `docs/backup-format.md` is the book of the format.
//! - A restore goes through consensus like any client, and reads everything back before it says that it is done.

mod archive;
mod chunk;
mod cut;
mod directory;
mod error;
mod feed;
mod manifest;
mod place;
mod progress;
mod restore;
mod restoring;
mod take;
mod verify;

pub(crate) use cut::{Cut, Cutter, Whole, rows_of};
pub(crate) use feed::{Broken, Feed, Item, holders};
pub(crate) use take::{addresses, wanted};

pub use directory::{Kept, PruneReport};
pub use error::BackupError;
pub use manifest::{ChunkRef, Manifest, Offsets, PredicateBackup};
pub use place::{Listed, list, prune};
pub use restore::{RestoreOptions, RestoreReport, Restored, restore};
pub use take::{BackupOptions, BackupReport, Step, take};
pub use verify::{Compared, Damage, VerifyOptions, VerifyReport, compare, verify};
