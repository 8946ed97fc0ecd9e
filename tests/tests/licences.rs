//! `dist/THIRD-PARTY.md` lists what is in the binary that is not ours. `REWRITE=1` makes it anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
    path::Path,
};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};

/// The list is that of the platform that is shipped.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// Everything that `pontoon-node` is built with, itself included; not what only tests need.
fn built_with(metadata: &Metadata) -> BTreeSet<PackageId> {
    let nodes = &metadata.resolve.as_ref().expect("dependencies are resolved").nodes;
    let by_id: BTreeMap<&PackageId, _> = nodes.iter().map(|node| (&node.id, node)).collect();
    let root = metadata.packages.iter().find(|package| package.name == "pontoon-node").expect("it is ours");
    let mut found = BTreeSet::new();
    let mut open = vec![root.id.clone()];
    while let Some(id) = open.pop() {
        if !found.insert(id.clone()) {
            continue;
        }
        let needed = by_id[&id].deps.iter().filter(|dependency| {
            dependency.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development)
        });
        open.extend(needed.map(|dependency| dependency.pkg.clone()));
    }
    found
}

fn list() -> String {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let options = ["--locked".to_owned(), "--filter-platform".to_owned(), PLATFORM.to_owned()];
    let metadata = MetadataCommand::new().manifest_path(manifest).other_options(options).exec();
    let metadata = metadata.expect("cargo describes the workspace");
    let built = built_with(&metadata);
    let foreign = metadata
        .packages
        .iter()
        .filter(|package| built.contains(&package.id) && !metadata.workspace_members.contains(&package.id));
    let mut rows = Vec::new();
    let mut licences: BTreeMap<String, usize> = BTreeMap::new();
    for package in foreign {
        let licence = package.license.clone().unwrap_or_else(|| "see its source".to_owned());
        let source = package.repository.clone().unwrap_or_default();
        rows.push(format!("| {} | {} | {licence} | {source} |", package.name, package.version));
        *licences.entry(licence).or_default() += 1;
    }
    rows.sort_unstable();
    let mut text = format!(
        "# Third-party software\n\nThe crates that `pontoon` is built with, its feature `otel` included (on {PLATFORM}, with build scripts), each under its own licence, whose text is in its\n\
         source. Pontoon itself is under the licence in `LICENSE`. Made by `REWRITE=1 cargo test -p pontoon-tests --test licences`.\n\n\
         | licence | crates |\n|---|---|\n"
    );
    for (licence, count) in licences {
        let _ = writeln!(text, "| {licence} | {count} |");
    }
    text.push_str("\n| crate | version | licence | source |\n|---|---|---|---|\n");
    for row in rows {
        let _ = writeln!(text, "{row}");
    }
    text
}

#[test]
fn the_list_of_third_party_software_is_not_stale() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/THIRD-PARTY.md");
    let list = list();
    if std::env::var_os("REWRITE").is_some() {
        fs::write(&path, &list).expect("the list can be written");
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == list,
        "dist/THIRD-PARTY.md is stale: REWRITE=1 cargo test -p pontoon-tests --test licences"
    );
    assert!(!list.contains("see its source"), "a crate does not name its licence: {list}");
}
