//! Opens the engine, and goes on without one that is lost.
//!
//! The log holds what this node promised; the engine holds what was applied, which other members have too. So an engine
//! whose directory is gone, does not open, cannot be trusted after a crash of the operating system, or is of another kind
//! than is wanted, is put aside (`engine.lost-N`, never deleted here; one of another kind `engine.switched-N`, see [`crate::engines`]), and an
//! empty one takes its place: the runtime fetches the states that the log builds upon. That is done only while somebody has them: each group whose log begins above its
//! founding must be held, in a state that can be trusted, by another node that answers. A node that finds nobody refuses to
//! start, with its directory as it was.
//!
//! Crash argument: the directory is renamed, and the new name durable, before the empty engine is made. A crash before
//! leaves the old directory, one after it none, and both are found like this again.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use pontoon_proto::{GroupId, NodeId, v1};
use pontoon_raftstore::INITIAL_POSITION;
use pontoon_shard::{EngineKind, Error, ShardMachines, Versions, engine};
use pontoon_wal::Wal;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::{channels::Channels, directory::Directory, error::NodeError, map::MapCache};

/// How long others are asked whether they hold what was lost here.
const PATIENCE: Duration = Duration::from_secs(20);
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(200);

/// Opens the engine of a node's directory. `others` are asked if its state is lost.
pub(crate) async fn open_engine(
    (kind, versions): (EngineKind, Versions),
    directory: &Directory,
    wal: &Wal,
    own: NodeId,
    others: &MapCache,
    channels: &Channels,
) -> Result<Arc<ShardMachines>, NodeError> {
    let path = directory.engine();
    let (why, name) = match path.exists() {
        false => ("its directory is gone".to_owned(), "lost"),
        true => match try_open(kind, versions, &path).await? {
            Ok(machines) => return Ok(machines),
            Err(error @ Error::OtherEngine { .. }) => (error.to_string(), "switched"),
            Err(error) if is_lost(&error) => (error.to_string(), "lost"),
            Err(error) => return Err(error.into()),
        },
    };
    let lost = lost_groups(wal);
    ensure_held_elsewhere(&lost, own, others, channels, &why).await?;
    if path.exists() {
        let aside = put_aside(&path, name)?;
        match name {
            "switched" => info!(
                %why, aside = %aside.display(), groups = lost.len(),
                "the engine changes; states come from other members; the old one is removed when all are durable"
            ),
            _ => warn!(
                %why, aside = %aside.display(), groups = lost.len(),
                "the engine is put aside; states come from other members; remove that directory when all is well"
            ),
        }
    } else if !lost.is_empty() {
        warn!(%why, groups = lost.len(), "the engine is lost; states come from other members");
    }
    Ok(try_open(kind, versions, &path).await??)
}

/// Opens an engine on a thread of its own: one that panics over its files is one that does not open.
async fn try_open(
    kind: EngineKind,
    versions: Versions,
    path: &Path,
) -> Result<Result<Arc<ShardMachines>, Error>, NodeError> {
    let dir = path.to_owned();
    let opened =
        tokio::task::spawn_blocking(move || ShardMachines::speaking(engine::open(kind, &dir)?, versions))
            .await;
    match opened {
        Ok(opened) => Ok(opened),
        Err(failure) if failure.is_panic() => {
            let source = std::io::Error::other("it panicked over its files");
            let source = Box::new(Error::Io { path: path.to_owned(), source });
            Ok(Err(Error::Unreadable { path: path.to_owned(), kind, source }))
        }
        Err(failure) => Err(NodeError::Serve(failure.to_string())),
    }
}

/// Whether the error says that this engine's state is of no use here, rather than that it cannot be had now.
fn is_lost(error: &Error) -> bool {
    matches!(
        error,
        Error::Unreadable { .. }
            | Error::Untrusted { .. }
            | Error::OtherEngine { .. }
            | Error::Foreign { .. }
            | Error::Damaged { .. }
    )
}

/// Groups whose log begins above what they were founded with: no replay brings their state back.
pub(crate) fn lost_groups(wal: &Wal) -> BTreeSet<GroupId> {
    let groups = wal.groups().into_iter().filter(|group| *group != GroupId::NODE);
    let begins_later = |group: &GroupId| {
        wal.group(*group).is_some_and(|view| view.damaged.is_none() && view.truncated.0 > INITIAL_POSITION.0)
    };
    groups.filter(begins_later).collect()
}

/// Those of the groups whose state no other node has now.
pub(crate) async fn not_held_elsewhere(
    mut missing: BTreeSet<GroupId>,
    own: NodeId,
    others: &MapCache,
    channels: &Channels,
) -> BTreeSet<GroupId> {
    let nodes: Vec<NodeId> = others.view().present().filter_map(|node| NodeId::new(node.id).ok()).collect();
    for address in nodes.into_iter().filter(|node| *node != own).filter_map(|node| others.address(node)) {
        if missing.is_empty() {
            break;
        }
        let request = v1::GroupsRequest { local: true, ..Default::default() };
        let Ok(mut admin) = channels.admin(&address) else { continue };
        let Ok(Ok(reply)) = timeout(ASK_TIMEOUT, admin.groups(request)).await else { continue };
        let held = reply.into_inner().groups.into_iter().flat_map(|group| group.replicas);
        for replica in held.filter(|replica| replica.applied > 0 && replica.dead.is_empty()) {
            missing.remove(&GroupId(replica.group));
        }
    }
    missing
}

async fn ensure_held_elsewhere(
    lost: &BTreeSet<GroupId>,
    own: NodeId,
    others: &MapCache,
    channels: &Channels,
    why: &str,
) -> Result<(), NodeError> {
    let started = Instant::now();
    let mut missing = lost.clone();
    loop {
        missing = not_held_elsewhere(missing, own, others, channels).await;
        if missing.is_empty() {
            return Ok(());
        }
        if started.elapsed() > PATIENCE {
            let groups: Vec<String> = missing.iter().take(5).map(ToString::to_string).collect();
            return Err(NodeError::EngineLost {
                why: why.to_owned(),
                count: missing.len(),
                groups: groups.join(", "),
            });
        }
        sleep(RETRY).await;
    }
}

/// Gives the directory another name, durably.
fn put_aside(path: &Path, name: &str) -> Result<PathBuf, NodeError> {
    let io = |source| NodeError::Io { path: path.to_owned(), source };
    let free = (1u32..).map(|n| path.with_extension(format!("{name}-{n}"))).find(|aside| !aside.exists());
    let aside = free.unwrap_or_else(|| path.with_extension(name));
    fs::rename(path, &aside).map_err(io)?;
    if let Some(parent) = path.parent() {
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(io)?;
    }
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_put_aside_under_a_name_of_its_own() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("engine");
        for n in 1..3 {
            fs::create_dir(&path).unwrap();
            fs::write(path.join("n"), n.to_string()).unwrap();
            assert_eq!(put_aside(&path, "lost").unwrap(), scratch.path().join(format!("engine.lost-{n}")));
        }
        assert_eq!(fs::read_to_string(scratch.path().join("engine.lost-1").join("n")).unwrap(), "1");
        assert!(!path.exists());
    }
}
