//! Who may know whom: the edges of the house, from `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// The crates of the workspace, and those of ours that each may use. Only `tests` may use everything.
const HOUSE: [(&str, &[&str]); 6] = [
    ("pontoon-proto", &[]),
    ("pontoon-wal", &["pontoon-proto"]),
    ("pontoon-raftstore", &["pontoon-proto", "pontoon-wal"]),
    ("pontoon-shard", &["pontoon-proto", "pontoon-raftstore"]),
    ("pontoon-node", &["pontoon-proto", "pontoon-wal", "pontoon-raftstore", "pontoon-shard"]),
    (
        "pontoon-tests",
        &["pontoon-proto", "pontoon-wal", "pontoon-raftstore", "pontoon-shard", "pontoon-node"],
    ),
];

/// What a floor never knows, by the names of crates.io. A floor above may bring it in.
const NEVER: [(&str, &[&str]); 4] = [
    ("pontoon-proto", &["raft", "tokio", "tonic", "fjall", "sled"]),
    ("pontoon-wal", &["raft", "tokio", "tonic", "futures", "async-trait", "fjall", "sled"]),
    ("pontoon-raftstore", &["tonic", "axum", "fjall", "sled"]),
    ("pontoon-shard", &["tonic", "axum"]),
];

/// What each member of the workspace uses directly, in the product and in build scripts; tests may use more.
fn edges() -> BTreeMap<String, BTreeSet<String>> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let metadata = MetadataCommand::new()
        .manifest_path(manifest)
        .no_deps()
        .exec()
        .expect("cargo describes the workspace that it builds");
    metadata
        .workspace_packages()
        .into_iter()
        .map(|package| {
            let used = package.dependencies.iter().filter(|used| used.kind != DependencyKind::Development);
            (package.name.to_string(), used.map(|used| used.name.clone()).collect())
        })
        .collect()
}

#[test]
fn every_crate_of_the_workspace_has_its_floor() {
    let floors: BTreeSet<&str> = HOUSE.iter().map(|(name, _)| *name).collect();
    for name in edges().keys() {
        assert!(
            floors.contains(name.as_str()),
            "{name} has no place in the house: give it one in the design"
        );
    }
}

#[test]
fn no_floor_knows_what_is_above_it() {
    let edges = edges();
    for (name, may) in HOUSE {
        let ours = edges[name].iter().filter(|used| used.starts_with("pontoon-"));
        for used in ours {
            assert!(may.contains(&used.as_str()), "{name} uses {used}, which is not below it");
        }
    }
}

#[test]
fn no_floor_uses_what_is_not_its_job() {
    let edges = edges();
    for (name, never) in NEVER {
        for used in &edges[name] {
            assert!(!never.contains(&used.as_str()), "{name} uses {used}, which is another floor's job");
        }
    }
}
