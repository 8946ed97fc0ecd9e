//! Which requests are administrative actions, and what each is about.

use pontoon_proto::v1;

/// An administrative action.
pub(crate) trait Audited {
    /// The name of its method.
    const WHAT: &'static str;

    /// What it is about; `None` if it changes nothing.
    fn facts(&self) -> Option<Vec<(&'static str, String)>>;

    /// Whether a node has passed it on.
    fn passed_on(&self) -> bool;
}

macro_rules! audited {
    ($($request:ident is $what:literal, $asks:ident => $facts:expr;)*) => {$(
        impl Audited for v1::$request {
            const WHAT: &'static str = $what;

            fn facts(&self) -> Option<Vec<(&'static str, String)>> {
                let $asks = self;
                $facts
            }

            fn passed_on(&self) -> bool {
                self.hops > 0
            }
        }
    )*};
}

audited! {
    CreatePredicateRequest is "CreatePredicate", asks => Some(vec![
        ("predicate", asks.predicate.clone()),
        ("kind", words(asks.kind().as_str_name(), "SHARD_KIND_")),
        ("replicas", asks.replicas.to_string()),
    ]);
    DropPredicateRequest is "DropPredicate", asks => Some(vec![("predicate", asks.predicate.clone())]);
    ReplacePredicateRequest is "ReplacePredicate", asks => Some(vec![
        ("predicate", asks.predicate.clone()),
        ("old_group", asks.old_group.to_string()),
        ("new_group", asks.new_group.to_string()),
    ]);
    MoveStartRequest is "MoveStart", asks => (!asks.dry_run).then(|| vec![
        ("predicate", asks.predicate.clone()),
        ("kind", words(asks.kind().as_str_name(), "MOVE_KIND_")),
        ("from", asks.from_node.to_string()),
        ("to", asks.to_node.to_string()),
        ("reason", asks.reason.clone()),
    ]);
    MoveCancelRequest is "MoveCancel", asks => Some(vec![("move", asks.id.to_string())]);
    DecommissionRequest is "Decommission", asks => Some(vec![("node", asks.node.to_string())]);
    SetRulesRequest is "SetRules", asks => (!asks.check_only).then(|| vec![
        ("expect_revision", asks.expect_revision.to_string()),
        ("force", asks.force.to_string()),
        ("rules", format!("{:?}", asks.rules)),
    ]);
    DrainRequest is "Drain", asks => (asks.action() != v1::DrainAction::Look).then(|| vec![
        ("node", asks.node.to_string()),
        ("action", words(asks.action().as_str_name(), "DRAIN_ACTION_")),
    ]);
    RebalanceApplyRequest is "RebalanceApply", asks => Some(vec![("plan", asks.id.clone())]);
    UpgradeFinaliseRequest is "UpgradeFinalise", asks => Some(vec![("version", asks.version.to_string())]);
    RecoverRecordRequest is "RecoverRecord", asks => Some(plan(asks.plan.as_ref()));
    JoinRequest is "Join", asks => Some(vec![
        ("address", asks.address.clone()),
        ("id", asks.wanted.to_string()),
        ("replace", asks.replace.to_string()),
    ]);
    BackupNoteRequest is "BackupNote", asks => Some(vec![
        ("action", asks.action.clone()),
        ("backup", asks.id.clone()),
        ("predicates", asks.predicates.to_string()),
        ("bytes", asks.bytes.to_string()),
    ]);
    ResetLogRequest is "ResetLog", asks => Some(vec![("log", asks.log.clone()), ("at", asks.at.to_string())]);
}

impl Audited for v1::RecoverApplyRequest {
    const WHAT: &'static str = "RecoverApply";

    fn facts(&self) -> Option<Vec<(&'static str, String)>> {
        Some(plan(self.plan.as_ref()))
    }

    fn passed_on(&self) -> bool {
        false
    }
}

impl Audited for v1::BackupOpen {
    const WHAT: &'static str = "Backup";

    fn facts(&self) -> Option<Vec<(&'static str, String)>> {
        Some(vec![("predicate", self.predicate.clone()), ("group", self.group.to_string())])
    }

    fn passed_on(&self) -> bool {
        false
    }
}

impl Audited for v1::EngineRequest {
    const WHAT: &'static str = "Engine";

    fn facts(&self) -> Option<Vec<(&'static str, String)>> {
        (!self.wish.is_empty()).then(|| vec![("wish", self.wish.clone())])
    }

    fn passed_on(&self) -> bool {
        false
    }
}

impl Audited for v1::ProfileRequest {
    const WHAT: &'static str = "Profile";

    fn facts(&self) -> Option<Vec<(&'static str, String)>> {
        let kind = words(self.kind().as_str_name(), "PROFILE_KIND_");
        Some(vec![("kind", kind), ("seconds", self.seconds.to_string())])
    }

    fn passed_on(&self) -> bool {
        false
    }
}

fn plan(plan: Option<&v1::RecoveryPlan>) -> Vec<(&'static str, String)> {
    let Some(plan) = plan else { return Vec::new() };
    let lost: Vec<_> = plan.lost.iter().map(|node| format!("n{node}")).collect();
    vec![("plan", plan.id.clone()), ("lost", lost.join(",")), ("groups", plan.steps.len().to_string())]
}

/// `MOVE_KIND_REPLACE` as people write it.
fn words(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}
