//! How much room the node's disks have, and what is done about it.
//!
//! An engine that meets the end of its disk stops until the next start. So a reserve is kept free: below it this node
//! takes no writes any more ([`Room::Low`]), and below half of it nothing from other leaders either. What is in flight
//! then, compactions and the log's segments live on the reserve.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use pontoon_proto::v1;
use pontoon_raftstore::Room;
use tokio::{sync::watch, time::sleep};
use tracing::{info, warn};

use crate::{error::NodeError, shared::Shared};

/// How often the disks are looked at while there is plenty, and while there is not: what can be written meanwhile must fit
/// in the reserve.
const LOOK: Duration = Duration::from_millis(250);
const LOOK_CLOSELY: Duration = Duration::from_millis(20);
/// This many reserves are plenty.
const PLENTY: u64 = 8;
/// The reserve, unless the operator chose one or the disk is smaller than ten of them.
const RESERVE_BYTES: u64 = 512 << 20;
/// Without so much even opening the engine may fail half way.
const START_BYTES: u64 = 16 << 20;

/// What a file system has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Disk {
    pub(crate) free: u64,
    pub(crate) total: u64,
}

impl Disk {
    fn of(path: &Path) -> Result<Disk, NodeError> {
        let stat = rustix::fs::statvfs(path)
            .map_err(|error| NodeError::Io { path: path.to_owned(), source: error.into() })?;
        Ok(Disk { free: stat.f_bavail * stat.f_frsize, total: stat.f_blocks * stat.f_frsize })
    }

    /// Whether lack of room explains a failure, whatever reserve the operator chose.
    pub(crate) fn is_nearly_full(self) -> bool {
        judge(self, None, Room::Ample) != Room::Ample
    }
}

/// What was seen last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Seen {
    /// The disk with the least room.
    pub(crate) disk: Disk,
    pub(crate) room: Room,
}

/// The disks under a node.
pub(crate) struct Space {
    dirs: Vec<PathBuf>,
    reserve: Option<u64>,
    seen: watch::Sender<Seen>,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space").field("dirs", &self.dirs).field("seen", &*self.seen.borrow()).finish()
    }
}

impl Space {
    /// Watches the disks that hold these directories, all of which exist.
    ///
    /// # Errors
    /// [`NodeError::DiskFull`] if there is not even room to start.
    pub(crate) fn new(dirs: Vec<PathBuf>, reserve: Option<u64>) -> Result<Space, NodeError> {
        let space = Space { dirs, reserve, seen: watch::Sender::default() };
        for path in &space.dirs {
            let Disk { free, .. } = Disk::of(path)?;
            if free < START_BYTES {
                return Err(NodeError::DiskFull { path: path.clone(), free, needed: START_BYTES });
            }
        }
        space.look()?;
        Ok(space)
    }

    pub(crate) fn seen(&self) -> Seen {
        *self.seen.borrow()
    }

    fn reserve_of(&self, disk: Disk) -> u64 {
        self.reserve.unwrap_or_else(|| default_reserve(disk))
    }

    /// Looks at the disks; the new state of the worst one.
    fn look(&self) -> Result<Seen, NodeError> {
        let before = self.seen().room;
        let mut worst = Seen { disk: Disk { free: u64::MAX, total: u64::MAX }, room: Room::Ample };
        for path in &self.dirs {
            let disk = Disk::of(path)?;
            let room = judge(disk, self.reserve, before);
            if (room, worst.disk.free) > (worst.room, disk.free) {
                worst = Seen { disk, room };
            }
        }
        self.seen.send_replace(worst);
        Ok(worst)
    }
}

fn default_reserve(disk: Disk) -> u64 {
    RESERVE_BYTES.min(disk.total / 10)
}

/// What a disk's room means. Once there is little, a quarter more than the border is needed to leave it, so that the
/// state does not flutter.
fn judge(disk: Disk, reserve: Option<u64>, before: Room) -> Room {
    let reserve = reserve.unwrap_or_else(|| default_reserve(disk));
    let border = |bytes: u64, inside: bool| if inside { bytes.saturating_add(bytes / 4) } else { bytes };
    if disk.free < border(reserve / 2, before == Room::Critical) {
        Room::Critical
    } else if disk.free < border(reserve, before != Room::Ample) {
        Room::Low
    } else {
        Room::Ample
    }
}

pub(crate) fn room_to_wire(room: Room) -> v1::NodeRoom {
    match room {
        Room::Ample => v1::NodeRoom::Ample,
        Room::Low => v1::NodeRoom::Low,
        Room::Critical => v1::NodeRoom::Critical,
    }
}

/// Keeps the runtime told. Ends with the node.
pub(crate) async fn watch_space(shared: Arc<Shared>) {
    let mut told = Room::Ample;
    let mut pause = Duration::ZERO;
    loop {
        sleep(pause).await;
        pause = LOOK;
        let of = shared.clone();
        // A disk that hangs must not hold up the network.
        let Ok(looked) = tokio::task::spawn_blocking(move || of.space.look()).await else { return };
        let seen = match looked {
            Ok(seen) => seen,
            Err(error) => {
                warn!(%error, "the disk does not say how much room it has");
                continue;
            }
        };
        if seen.disk.free / PLENTY < shared.space.reserve_of(seen.disk) {
            pause = LOOK_CLOSELY;
        }
        // What is received may take everything above the reserve.
        shared.raft.set_free(seen.disk.free.saturating_sub(shared.space.reserve_of(seen.disk)));
        if seen.room == told {
            continue;
        }
        let free_bytes = seen.disk.free;
        match seen.room {
            Room::Ample => info!(free_bytes, "there is room on the disk again; writes are taken"),
            Room::Low => warn!(
                free_bytes,
                "the disk is nearly full: this node takes no writes; free space, or move predicates away"
            ),
            Room::Critical => warn!(
                free_bytes,
                "the disk is almost full: this node takes nothing any more; free space, or move predicates away"
            ),
        }
        told = seen.room;
        // What is in flight may still take a segment from the reserve, but not the last of it.
        shared.wal.hold_growth(told == Room::Critical);
        shared.raft.set_room(told);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_room_is_noticed_at_once_and_left_with_a_margin() {
        let disk = |free| Disk { free, total: 1 << 40 };
        let reserve = Some(1000);
        assert_eq!(judge(disk(1000), reserve, Room::Ample), Room::Ample);
        assert_eq!(judge(disk(999), reserve, Room::Ample), Room::Low);
        assert_eq!(judge(disk(1200), reserve, Room::Low), Room::Low);
        assert_eq!(judge(disk(1250), reserve, Room::Low), Room::Ample);
        assert_eq!(judge(disk(499), reserve, Room::Low), Room::Critical);
        assert_eq!(judge(disk(600), reserve, Room::Critical), Room::Critical);
        assert_eq!(judge(disk(625), reserve, Room::Critical), Room::Low);
        assert_eq!(judge(disk(0), Some(0), Room::Ample), Room::Ample);
        assert_eq!(judge(disk(0), Some(u64::MAX), Room::Ample), Room::Critical);
    }

    #[test]
    fn a_small_disk_keeps_a_tenth() {
        let disk = |free| Disk { free, total: 100 << 20 };
        assert_eq!(judge(disk(11 << 20), None, Room::Ample), Room::Ample);
        assert_eq!(judge(disk(9 << 20), None, Room::Ample), Room::Low);
    }

    #[test]
    fn the_worst_disk_decides() {
        let here = std::env::temp_dir();
        let space = Space::new(vec![here.clone(), here], Some(u64::MAX)).unwrap();
        assert_eq!(space.seen().room, Room::Critical);
        assert!(space.seen().disk.free < u64::MAX);
    }
}
