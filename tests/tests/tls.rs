//! Real processes with certificates: three nodes, clients of each role, a certificate that is renewed, and who is written down.

use std::{fs, net::TcpListener, path::Path};

use pontoon_tests::{
    cluster::until,
    process::{Process, Program},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound").to_string()
}

/// The flags that show a certificate.
fn shows(certs: &Path, name: &str) -> Vec<String> {
    let file = |name: &str| certs.join(name).display().to_string();
    [
        "--tls-cert",
        &file(&format!("{name}.pem")),
        "--tls-key",
        &file(&format!("{name}.key")),
        "--tls-ca",
        &file("ca.pem"),
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Runs a command; what it said.
async fn says(arguments: &[&str], flags: &[String], code: i32, words: &[&str]) -> String {
    let arguments: Vec<String> =
        arguments.iter().map(|&word| word.to_owned()).chain(flags.iter().cloned()).collect();
    let (exit, said) = PROGRAM.run(&arguments).await;
    assert_eq!(exit.code(), Some(code), "{arguments:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{arguments:?} does not say {word:?}: {said}");
    }
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_by_tls_with_roles_an_audit_and_a_certificate_that_is_renewed() {
    let scratch = PROGRAM.scratch();
    let certs = scratch.path().join("certs");
    let dir = certs.display().to_string();
    says(
        &["certs", "init", "--dir", &dir, "--cluster", "test"],
        &[],
        0,
        &["the authority of the cluster test is"],
    )
    .await;
    says(&["certs", "init", "--dir", &dir], &[], 2, &["is not overwritten"]).await;
    says(&["certs", "node", "--dir", &dir, "--id", "1"], &[], 2, &["a node needs --host"]).await;
    for id in ["1", "2", "3"] {
        let issue = ["certs", "node", "--dir", &dir, "--id", id, "--host", "127.0.0.1"];
        says(&issue, &[], 0, &[&format!("speaks for pontoon://test/node/{id}")]).await;
    }
    for (role, name) in [("operator", "ann"), ("writer", "app"), ("reader", "bob"), ("metrics", "prom")] {
        says(&["certs", "client", "--dir", &dir, "--role", role, "--name", name], &[], 0, &["next: "]).await;
    }
    says(
        &["certs", "client", "--dir", &dir, "--role", "node", "--name", "x"],
        &[],
        2,
        &["pontoon certs node"],
    )
    .await;
    says(&["certs", "show", &format!("{dir}/node-2.pem")], &[], 0, &["node", "127.0.0.1", " days left"])
        .await;
    use std::os::unix::fs::PermissionsExt;
    for key in ["ca.key", "node-1.key", "operator-ann.key"] {
        assert_eq!(fs::metadata(certs.join(key)).unwrap().permissions().mode() & 0o777, 0o600, "{key}");
    }

    let (mut nodes, mut addresses) = (Vec::<Process>::new(), Vec::<String>::new());
    for id in 1..=3 {
        let address = free_address();
        let data = scratch.path().join(format!("n{id}")).display().to_string();
        let mut arguments =
            ["node", "--end-with-parent", "--dir", &data, "--listen", &address].map(str::to_owned).to_vec();
        arguments.extend(shows(&certs, &format!("node-{id}")));
        if let Some(first) = addresses.first() {
            arguments.extend(["--join".to_owned(), first.clone()]);
        }
        let log = scratch.path().join(format!("n{id}.log"));
        let mut node = Process::start(PROGRAM, &format!("node {id}"), &log, &arguments);
        node.prints("serves on").await;
        nodes.push(node);
        addresses.push(address);
    }
    let addr = addresses.join(",");
    let [ann, app, bob, prom] =
        ["operator-ann", "writer-app", "reader-bob", "metrics-prom"].map(|name| shows(&certs, name));

    says(&["put", "name", "k", "v", "--addr", &addr], &app, 0, &[]).await;
    says(&["get", "name", "k", "--addr", &addr], &bob, 0, &["v"]).await;
    says(&["put", "name", "k", "w", "--addr", &addr], &bob, 2, &["needs the role writer", "reader bob"])
        .await;
    says(
        &["predicate", "drop", "name", "--addr", &addr],
        &app,
        2,
        &["needs the role operator", "writer app"],
    )
    .await;
    says(&["status", "--addr", &addr], &prom, 2, &["needs the role reader", "metrics prom"]).await;
    says(&["status", "--addr", &addr], &[], 1, &["nobody answers", "speaks TLS", "--tls-cert"]).await;
    says(&["predicate", "create", "other", "--addr", &addr], &ann, 0, &[]).await;
    says(&["predicate", "drop", "other", "--addr", &addr], &ann, 0, &[]).await;
    says(&["predicate", "drop", "other", "--addr", &addr], &ann, 2, &[]).await;

    let audit =
        says(&["audit", "--addr", &addr], &ann, 0, &["operator ann", "DropPredicate", "predicate=other"])
            .await;
    let of = |what: &str, end: &str| audit.lines().any(|line| line.contains(what) && line.contains(end));
    assert!(of("DropPredicate", "done") && of("DropPredicate", "refused: "), "{audit}");
    assert!(of("DropPredicate", "denied: ") && of("Join", "done"), "{audit}");
    says(&["audit", "--addr", &addr], &bob, 2, &["needs the role operator"]).await;
    let bundle = scratch.path().join("b.tar.gz").display().to_string();
    says(&["debug", "bundle", &bundle, "--addr", &addr], &ann, 0, &["n1, n2, n3 told"]).await;
    let profile = ["debug", "profile", "--node", "n3", "--seconds", "1", "--addr", &addr];
    says(&profile, &ann, 0, &["n3 over", "raft-0"]).await;
    says(&profile, &bob, 2, &["needs the role operator"]).await;

    // A bad file first, which changes nothing; then the certificate is renewed under the running node.
    let cert = certs.join("node-2.pem");
    let good = fs::read(&cert).unwrap();
    fs::write(&cert, "no certificate").unwrap();
    let heard = |word: &'static str, times: usize| {
        let node = &nodes[1];
        async move { until(word, || async { (node.said().matches(word).count() == times).then_some(()) }).await }
    };
    heard("the old ones stay in force", 1).await;
    says(&["get", "name", "k", "--addr", &addresses[1]], &bob, 0, &["v"]).await;
    fs::write(&cert, good).unwrap();
    heard("new certificates are in force", 1).await;
    let renew = ["certs", "node", "--dir", &dir, "--id", "2", "--renew"];
    says(&renew, &[], 0, &["a running node within seconds"]).await;
    heard("new certificates are in force", 2).await;
    says(&["get", "name", "k", "--addr", &addresses[1]], &bob, 0, &["v"]).await;

    // The others take it for itself still, also in new connections.
    assert!(nodes[0].terminate().await.success());
    let data = scratch.path().join("n1").display().to_string();
    let mut again =
        ["node", "--end-with-parent", "--dir", &data, "--listen", &addresses[0]].map(str::to_owned).to_vec();
    again.extend(shows(&certs, "node-1"));
    nodes[0] = Process::start(PROGRAM, "node 1", &scratch.path().join("n1.log"), &again);
    nodes[0].prints("serves on").await;
    says(&["put", "name", "k", "x", "--addr", &addr], &app, 0, &[]).await;
    says(&["audit", "--dir", &data], &[], 0, &["Join"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_speaks_tls_to_a_node_without_is_told() {
    let scratch = PROGRAM.scratch();
    let certs = scratch.path().join("certs");
    let dir = certs.display().to_string();
    says(&["certs", "init", "--dir", &dir, "--cluster", "test"], &[], 0, &[]).await;
    says(&["certs", "client", "--dir", &dir, "--role", "operator", "--name", "ann"], &[], 0, &[]).await;
    let (address, data) = (free_address(), scratch.path().join("n1").display().to_string());
    let arguments =
        ["node", "--end-with-parent", "--dir", &data, "--listen", &address].map(str::to_owned).to_vec();
    let mut node = Process::start(PROGRAM, "node", &scratch.path().join("n1.log"), &arguments);
    node.prints("serves on").await;
    let words = ["nobody answers", "no TLS with", "if that node runs without TLS, leave --tls-cert"];
    says(&["status", "--addr", &address], &shows(&certs, "operator-ann"), 1, &words).await;
    says(&["status", "--addr", &address], &[], 0, &[]).await;
}
