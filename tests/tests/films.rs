//! Real data: films loaded into three processes by a loader that is killed on the way, then `name` moved to a fourth
//! under writes with its source killed, then every triple compared.

use std::{collections::BTreeSet, path::Path};

use pontoon_proto::v1::MovePhase;
use pontoon_tests::{
    cluster::{Cluster, within},
    films::{FILMS, films, triples_of},
    process::{Process, Program},
    traffic::{Traffic, read_all},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

#[tokio::test(flavor = "multi_thread")]
async fn every_film_survives_a_killed_loader_and_a_move_whose_source_is_killed() {
    if !Path::new(FILMS).exists() {
        println!("{FILMS} is not there: nothing to load, nothing shown");
        return;
    }
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let scratch = PROGRAM.scratch();
    let (state, log) = (scratch.path().join("progress"), scratch.path().join("log"));
    let mut load = vec!["--addr".to_owned(), cluster.address(1).to_owned(), "load".to_owned()];
    load.extend([FILMS.to_owned(), "--state".to_owned(), state.display().to_string()]);

    let mut loader = Process::start(PROGRAM, "the loader", &log, &load);
    let some = async {
        while !state.exists() && loader.exit().is_none() {
            tokio::task::yield_now().await;
        }
    };
    within("the loader to note its progress", some).await;
    loader.kill().await;
    let (exit, said) = PROGRAM.run(&load).await;
    assert!(exit.success(), "{said}");
    assert!(!state.exists(), "a finished load leaves no progress behind");

    let client = cluster.client().await;
    cluster.voters("name", 3).await;
    let target = cluster.add().await;
    let mut traffic = Traffic::start(&client, "name", 2);
    traffic.acknowledged(5).await;
    let source = cluster.leader("name").await;
    let id = cluster.start_move("name", source, target).await;
    let seen = cluster.phase(id, MovePhase::Snapshot).await;
    cluster.kill(source).await;
    println!("the source was killed in {seen:?}");
    traffic.acknowledged(20).await;
    cluster.restart(source).await;
    assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);
    traffic.acknowledged(20).await;
    let written = traffic.stop().await;

    let expected = films();
    assert_eq!(expected.values().map(BTreeSet::len).sum::<usize>(), 200_000);
    for (predicate, triples) in &expected {
        let (found, others) = triples_of(read_all(&client, predicate).await);
        let missing = triples.difference(&found).take(3).collect::<Vec<_>>();
        let strange = found.difference(triples).take(3).collect::<Vec<_>>();
        assert!(missing.is_empty() && strange.is_empty(), "{predicate}: lost {missing:?}, new {strange:?}");
        match predicate.as_str() {
            "name" => assert!(others == written, "name: the acknowledged writes are not what is there"),
            _ => assert!(others.is_empty(), "{predicate}: nobody wrote {others:?}"),
        }
    }
    let holders = cluster.voters("name", 3).await;
    assert!(holders.contains(&target) && !holders.contains(&source), "{holders:?}");
}
