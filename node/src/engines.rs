//! Changing a node's engine in place: a wish that the next start meets, and the end of the old directory.
//!
//! A wish lies in the node's directory, durable before its operator hears that it is there. It never keeps a node from starting:
//! if nobody holds what the old engine held ([`crate::reopen`]), the node starts with the old one and says why. What the
//! command line or the configuration says of the engine goes above it.
//!
//! The old directory stays until everything that was in it is durable in the new engine: each replica's durable mark has come to
//! where the log begins, so that engine and log together are whole without it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::Machines;
use pontoon_shard::EngineKind;
use tokio::time::sleep;
use tonic::Status;
use tracing::{info, warn};

use crate::{
    config::NodeConfig, directory::Marker, error::NodeError, node::blocking, reopen, shared::Shared,
};

const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How this node came to its engine.
#[derive(Debug, Default)]
pub(crate) struct EngineStory {
    /// What the command line or the configuration says.
    pub(crate) told: Option<EngineKind>,
    /// Why a wish was not met at this start.
    pub(crate) problem: Option<String>,
}

/// The engine to start with, and the one to fall back to if that is a wish that cannot be met.
pub(crate) fn choose_engine(
    config: &NodeConfig,
    marker: Option<&Marker>,
    wish: Option<EngineKind>,
) -> Result<(EngineKind, EngineKind), NodeError> {
    let Some(marker) = marker else {
        let engine = config.engine.unwrap_or(EngineKind::Fjall);
        return Ok((engine, engine));
    };
    let found: EngineKind =
        marker.engine.parse().map_err(|_| NodeError::UnknownEngine { name: marker.engine.clone() })?;
    Ok(match (config.engine, wish) {
        // The other kind takes its state from the other members; see [`crate::reopen`].
        (Some(told), _) => (told, told),
        (None, wish) => (wish.unwrap_or(found), found),
    })
}

impl Shared {
    /// Answers [`v1::EngineRequest`].
    pub(crate) async fn engine(
        self: &Arc<Self>,
        request: v1::EngineRequest,
    ) -> Result<v1::EngineReply, Status> {
        let directory = self.directory.clone();
        let failed = |error: NodeError| Status::internal(error.to_string());
        if !request.wish.is_empty() {
            let kind = match request.wish.parse() {
                Ok(kind @ (EngineKind::Fjall | EngineKind::Sled)) => kind,
                _ => {
                    let words = format!("the engine {} is not known; use fjall or sled", request.wish);
                    return Err(Status::invalid_argument(words));
                }
            };
            let wish = (kind != self.engine).then_some(kind);
            if wish.is_some() {
                self.may_change(kind).await?;
            }
            let directory = directory.clone();
            blocking(move || directory.write_wish(wish)).await.map_err(failed)?;
        }
        let (wish, aside) =
            blocking(move || Ok::<_, NodeError>((directory.read_wish(), directory.switched()?)))
                .await
                .map_err(failed)?;
        let wish = wish.filter(|wish| *wish != self.engine);
        Ok(v1::EngineReply {
            node: self.own.get(),
            engine: self.engine.to_string(),
            wish: wish.map(|wish| wish.to_string()).unwrap_or_default(),
            told: self.story.told.map(|told| told.to_string()).unwrap_or_default(),
            aside: aside.iter().map(|path| path.display().to_string()).collect(),
            problem: self.story.problem.clone().unwrap_or_default(),
        })
    }

    async fn may_change(&self, kind: EngineKind) -> Result<(), Status> {
        if let Some(told) = self.story.told.filter(|told| *told != kind) {
            return Err(Status::failed_precondition(format!(
                "{0} is started with the engine {told} by its command line or configuration, which goes above a wish: say {kind} \
                 there, or nothing, and start {0} again",
                self.own
            )));
        }
        if !self.directory.switched().map_err(|error| Status::internal(error.to_string()))?.is_empty() {
            return Err(Status::failed_precondition(format!(
                "{} still takes its states over from its last change; wait until `pontoon engine status` shows nothing aside",
                self.own
            )));
        }
        let lost = reopen::lost_groups(&self.wal);
        let missing = reopen::not_held_elsewhere(lost, self.own, &self.map, &self.channels).await;
        let Some(first) = missing.first() else { return Ok(()) };
        Err(Status::failed_precondition(format!(
            "{} alone holds {} groups, {first} among them: with another engine it could not take their states from anybody. Start \
             the other nodes, or let the groups get more replicas (`pontoon groups --problem`)",
            self.own,
            missing.len()
        )))
    }

    /// Where a replica's log begins above what its engine holds durably, the old engine could still be needed.
    fn needs_old_engine(&self) -> bool {
        let groups = self.wal.groups().into_iter().filter(|group| *group != GroupId::NODE);
        groups.into_iter().any(|id| {
            let Some(view) = self.wal.group(id) else { return false };
            if view.damaged.is_some() {
                return true;
            }
            match self.raft.group(id) {
                Some(group) => {
                    group.look(|status| status.dead.is_some() || status.durable < view.truncated.0)
                }
                None => false,
            }
        })
    }
}

/// Removes what was put aside for another engine once it is not needed any more. Ends then, or with the node.
pub(crate) async fn forget_old_engine(shared: Arc<Shared>) {
    let aside = match shared.directory.switched() {
        Ok(aside) if aside.is_empty() => return,
        Ok(aside) => aside,
        Err(error) => return warn!(%error, "whether an old engine is left cannot be told"),
    };
    let mut stop = shared.stop.subscribe();
    while shared.needs_old_engine() {
        tokio::select! {
            () = sleep(LOOK_EVERY) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
    let machines = shared.machines.clone();
    let removed = blocking(move || {
        machines.flush().map_err(|error| NodeError::Serve(error.to_string()))?;
        remove(&aside).map(|()| aside)
    });
    match removed.await {
        Ok(aside) => info!(directories = aside.len(), engine = %shared.engine, "the old engine is removed"),
        Err(error) => warn!(%error, "the old engine is not removed; remove engine.switched-* by hand"),
    }
}

fn remove(aside: &[PathBuf]) -> Result<(), NodeError> {
    aside.iter().try_for_each(|path| {
        std::fs::remove_dir_all(path).map_err(|source| NodeError::Io { path: path.clone(), source })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::State;

    #[test]
    fn a_directory_keeps_its_engine_unless_another_is_asked_for() {
        use EngineKind::{Fjall, Sled};
        let marker = Marker::new(State::Member, "sled".to_owned());
        let mut config = NodeConfig::new("d", "127.0.0.1:0");
        let chosen = |config: &NodeConfig, marker, wish| choose_engine(config, marker, wish).unwrap();
        assert_eq!(chosen(&config, Some(&marker), None), (Sled, Sled));
        assert_eq!(chosen(&config, Some(&marker), Some(Fjall)), (Fjall, Sled), "to fall back to");
        assert_eq!(chosen(&config, None, None), (Fjall, Fjall));
        config.engine = Some(Sled);
        assert_eq!(chosen(&config, Some(&marker), Some(Fjall)), (Sled, Sled), "above any wish");
    }
}
