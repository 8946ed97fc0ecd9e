//! Who may call what: one table for every method and every page on the node's port. What is not in it nobody may call.

use std::{fmt, str::FromStr};

/// What the holder of a certificate may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Is a node: what nodes ask of each other, and what they pass on for others.
    Node,
    /// Runs the cluster: everything but what nodes ask of each other.
    Operator,
    /// Reads and writes rows and logs, and makes the predicates that it writes to.
    Writer,
    /// Reads rows and logs.
    Reader,
    /// Watches: health and metrics, no data.
    Metrics,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 5] = [Role::Node, Role::Operator, Role::Writer, Role::Reader, Role::Metrics];

    /// Its name in certificates and commands.
    pub fn name(self) -> &'static str {
        match self {
            Role::Node => "node",
            Role::Operator => "operator",
            Role::Writer => "writer",
            Role::Reader => "reader",
            Role::Metrics => "metrics",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Role::ALL.into_iter().find(|role| role.name() == text);
        known.ok_or_else(|| format!("no role is called {text}; choose operator, writer, reader or metrics"))
    }
}

use Role::{Metrics, Node, Operator, Reader, Writer};

const NODES: &[Role] = &[Node];
const OPERATORS: &[Role] = &[Operator];
/// Orders to the cluster, which any node passes on to the leader of the meta group.
const ORDERS: &[Role] = &[Node, Operator];
const WRITERS: &[Role] = &[Node, Operator, Writer];
const READERS: &[Role] = &[Node, Operator, Writer, Reader];
const ALL: &[Role] = &Role::ALL;

/// Every method and page, and who may call it. A path that ends with `*` stands for all that begin so.
///
/// `Calls` carries reads and writes, and `Route` may make a predicate: what a reader may not do there is refused by
/// [`crate::caller::Caller::must_write`].
pub(crate) const RULES: &[(&str, &[Role])] = &[
    ("/pontoon.v1.Data/OpenSession", WRITERS),
    ("/pontoon.v1.Data/Write", WRITERS),
    ("/pontoon.v1.Data/WriteMany", WRITERS),
    ("/pontoon.v1.Data/AppendLog", WRITERS),
    ("/pontoon.v1.Data/TruncateLog", WRITERS),
    ("/pontoon.v1.Data/ResetLog", WRITERS),
    ("/pontoon.v1.Data/Get", READERS),
    ("/pontoon.v1.Data/Scan", READERS),
    ("/pontoon.v1.Data/Calls", READERS),
    ("/pontoon.v1.Data/Route", READERS),
    ("/pontoon.v1.Data/ReadLog", READERS),
    ("/pontoon.v1.Data/TailLog", READERS),
    ("/pontoon.v1.Admin/Status", READERS),
    ("/pontoon.v1.Admin/Nodes", READERS),
    ("/pontoon.v1.Admin/Predicates", READERS),
    ("/pontoon.v1.Admin/FindPredicate", READERS),
    ("/pontoon.v1.Admin/CreatePredicate", WRITERS),
    ("/pontoon.v1.Admin/Groups", ORDERS),
    ("/pontoon.v1.Admin/DropPredicate", ORDERS),
    ("/pontoon.v1.Admin/ReplacePredicate", ORDERS),
    ("/pontoon.v1.Admin/MoveStart", ORDERS),
    ("/pontoon.v1.Admin/MoveList", ORDERS),
    ("/pontoon.v1.Admin/MoveWatch", ORDERS),
    ("/pontoon.v1.Admin/MoveCancel", ORDERS),
    ("/pontoon.v1.Admin/Decommission", ORDERS),
    ("/pontoon.v1.Admin/Events", ORDERS),
    ("/pontoon.v1.Admin/Rules", ORDERS),
    ("/pontoon.v1.Admin/SetRules", ORDERS),
    ("/pontoon.v1.Admin/Drain", ORDERS),
    ("/pontoon.v1.Admin/RebalancePlan", ORDERS),
    ("/pontoon.v1.Admin/RebalanceApply", ORDERS),
    ("/pontoon.v1.Admin/ExplainPlacement", ORDERS),
    ("/pontoon.v1.Admin/RecoverPlan", OPERATORS),
    ("/pontoon.v1.Admin/RecoverApply", OPERATORS),
    ("/pontoon.v1.Admin/Audit", ORDERS),
    ("/pontoon.v1.Admin/Heat", ORDERS),
    ("/pontoon.v1.Admin/UpgradeStatus", READERS),
    ("/pontoon.v1.Admin/UpgradeFinalise", ORDERS),
    ("/pontoon.v1.Admin/Inspect", ORDERS),
    ("/pontoon.v1.Admin/InspectGroup", ORDERS),
    ("/pontoon.v1.Admin/Profile", OPERATORS),
    ("/pontoon.v1.Admin/Backup", OPERATORS),
    ("/pontoon.v1.Admin/BackupNote", ORDERS),
    ("/pontoon.v1.Admin/Engine", OPERATORS),
    ("/pontoon.v1.Admin/Join", NODES),
    ("/pontoon.v1.Admin/Announce", NODES),
    ("/pontoon.v1.Admin/Report", NODES),
    ("/pontoon.v1.Admin/Usage", NODES),
    ("/pontoon.v1.Admin/Casualties", NODES),
    ("/pontoon.v1.Admin/MetaMap", NODES),
    ("/pontoon.v1.Admin/EnsureReplica", NODES),
    ("/pontoon.v1.Admin/FenceReplica", NODES),
    ("/pontoon.v1.Admin/ReplicaStatus", NODES),
    ("/pontoon.v1.Admin/ChangeMembers", NODES),
    ("/pontoon.v1.Admin/TransferLeader", NODES),
    ("/pontoon.v1.Admin/VerifyGroup", NODES),
    ("/pontoon.v1.Admin/OtherSource", NODES),
    ("/pontoon.v1.Admin/ConfirmMembers", NODES),
    ("/pontoon.v1.Admin/Remains", NODES),
    ("/pontoon.v1.Admin/RecoverReplica", NODES),
    ("/pontoon.v1.Admin/RecoverRecord", NODES),
    ("/pontoon.v1.Peer/Stream", NODES),
    ("/grpc.health.v1.Health/Check", ALL),
    ("/grpc.health.v1.Health/Watch", ALL),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", OPERATORS),
    ("/healthz", ALL),
    ("/readyz", ALL),
    ("/metrics", &[Operator, Metrics]),
    ("/", READERS),
    ("/console/*", READERS),
    ("/api/now", READERS),
    ("/api/live", READERS),
    ("/api/matrix", READERS),
    ("/api/predicate", READERS),
    ("/api/heat", READERS),
    ("/api/events", READERS),
    ("/api/moves", READERS),
    ("/api/move/start", OPERATORS),
    ("/api/move/cancel", OPERATORS),
    ("/api/drain", OPERATORS),
    ("/api/rebalance/plan", OPERATORS),
    ("/api/rebalance/apply", OPERATORS),
];

/// Who may call a path; `None` if nobody may, since it is not in the table.
pub(crate) fn allowed(path: &str) -> Option<&'static [Role]> {
    let fits = |rule: &str| match rule.strip_suffix('*') {
        Some(start) => path.starts_with(start),
        None => path == rule,
    };
    RULES.iter().find(|(rule, _)| fits(rule)).map(|&(_, roles)| roles)
}

/// Roles in words, the one that gives least first: the one to ask for.
pub(crate) fn words(roles: &[Role]) -> String {
    let names: Vec<_> = roles.iter().rev().map(|role| role.name()).collect();
    match names.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => names.concat(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;

    /// The methods that the port serves, by what reflection says of them.
    fn served() -> BTreeSet<String> {
        let sets = [
            crate::api::FILE_DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        ];
        let mut served = BTreeSet::new();
        for file in sets.iter().flat_map(|set| FileDescriptorSet::decode(*set).unwrap().file) {
            for service in &file.service {
                for method in &service.method {
                    served.insert(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
                }
            }
        }
        served
    }

    #[test]
    fn every_method_that_is_served_is_in_the_table_and_no_other() {
        let methods = RULES.iter().map(|&(path, _)| path.to_owned());
        let listed: BTreeSet<String> = methods.filter(|path| path.contains(".v1")).collect();
        assert_eq!(listed, served());
        let paths: BTreeSet<_> = RULES.iter().map(|(path, _)| path).collect();
        assert_eq!(paths.len(), RULES.len(), "a path is listed twice");
    }

    #[test]
    fn what_is_not_listed_nobody_may_call() {
        assert_eq!(allowed("/pontoon.v1.Data/Get"), Some(READERS));
        for strange in [
            "/console",
            "",
            "/api/",
            "/pontoon.v1.Data/Get/",
            "/pontoon.v1.Data/",
            "/healthz/x",
            "/pontoon.v1.Admin/join",
        ] {
            assert_eq!(allowed(strange), None, "{strange}");
        }
    }

    #[test]
    fn the_role_that_gives_least_is_named_first() {
        assert_eq!(words(WRITERS), "writer, operator or node");
        assert_eq!(words(NODES), "node");
        assert_eq!("reader".parse::<Role>(), Ok(Reader));
        assert!("root".parse::<Role>().is_err());
    }
}
