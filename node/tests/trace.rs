//! Spans, as a subscriber sees them: what follows a write from the client to the sync and the apply, and a move through its phases.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    pin::pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use pontoon_node::{Node, NodeConfig};
use pontoon_proto::v1;
use tokio::{sync::Notify, time::timeout};
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id},
};
use tracing_subscriber::{
    Layer, layer::Context, layer::SubscriberExt, registry::LookupSpan, util::SubscriberInitExt,
};

/// A span that was closed.
#[derive(Debug, Clone)]
struct Seen {
    name: &'static str,
    fields: BTreeMap<&'static str, String>,
    /// The names of those above it, the nearest first, and the fields of the outermost.
    above: Vec<&'static str>,
    outermost: BTreeMap<&'static str, String>,
}

#[derive(Clone, Default)]
struct Spans(Arc<Closed>);

#[derive(Default)]
struct Closed {
    spans: Mutex<Vec<Seen>>,
    /// Told of each span that is closed.
    more: Notify,
}

/// When a wait has failed. Far above what anything here takes.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Default, Clone)]
struct Fields(BTreeMap<&'static str, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}").trim_matches('"').to_owned());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        context.span(id).unwrap().extensions_mut().insert(fields);
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let span = context.span(&id).unwrap();
        let fields_of = |span: &tracing_subscriber::registry::SpanRef<'_, S>| {
            span.extensions().get::<Fields>().cloned().unwrap_or_default().0
        };
        let above: Vec<_> = span.scope().skip(1).collect();
        let seen = Seen {
            name: span.name(),
            fields: fields_of(&span),
            above: above.iter().map(|span| span.name()).collect(),
            outermost: above.last().map(fields_of).unwrap_or_default(),
        };
        self.0.spans.lock().unwrap().push(seen);
        self.0.more.notify_waiters();
    }
}

impl Spans {
    /// Waits until a span is closed that is as wanted.
    async fn wait_for(&self, what: &str, wanted: impl Fn(&Seen) -> bool) -> Seen {
        let found = async {
            loop {
                let mut more = pin!(self.0.more.notified());
                // What is closed from here on is heard, also before anybody waits.
                more.as_mut().enable();
                let found = self.0.spans.lock().unwrap().iter().find(|seen| wanted(seen)).cloned();
                match found {
                    Some(seen) => return seen,
                    None => more.await,
                }
            }
        };
        match timeout(LIMIT, found).await {
            Ok(seen) => seen,
            Err(_) => panic!("no {what} among {:#?}", self.0.spans.lock().unwrap()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_followed_to_the_sync_and_the_apply_and_a_move_through_its_phases() {
    let spans = Spans::default();
    tracing_subscriber::registry()
        .with(tracing_subscriber::EnvFilter::new("pontoon=debug,pontoon_node=debug,pontoon_raftstore=debug"))
        .with(spans.clone())
        .init();
    let scratch = tempfile::tempdir().unwrap();
    let first = Node::start(NodeConfig::new(scratch.path().join("1"), "127.0.0.1:0")).await.unwrap();
    let second = NodeConfig::new(scratch.path().join("2"), "127.0.0.1:0").joining(first.address());
    let second = Node::start(second).await.unwrap();
    let client = first.client().await.unwrap();
    client.create_map("name", 1).await.unwrap();
    client.put("name", "k", "v").await.unwrap();

    let write = spans.wait_for("write of the client", |seen| seen.name == "write").await;
    assert_eq!(write.fields["predicate"], "name");
    let same = |fields: &BTreeMap<&'static str, String>| {
        ["client", "seq"].iter().all(|name| fields.get(name) == write.fields.get(name))
    };
    // The node's part is joined to the client's by the request's id.
    let served = spans.wait_for("serve_write", |seen| seen.name == "serve_write" && same(&seen.fields)).await;
    assert_eq!(served.fields["predicate"], "name");
    for leaf in ["sync", "apply"] {
        let found = spans.wait_for(leaf, |seen| seen.name == leaf && same(&seen.outermost)).await;
        assert_eq!(found.above, ["command", "serve_write"], "{found:?}");
    }

    let at = client.servers("name").await.unwrap().iter().find(|server| server.votes).unwrap().node;
    let other = if at == first.id() { second.id() } else { first.id() };
    let request = v1::MoveStartRequest {
        predicate: "name".to_owned(),
        from_node: at.get(),
        to_node: other.get(),
        ..Default::default()
    };
    let id = client.move_start(request).await.unwrap().r#move.unwrap().id.to_string();
    let whole = spans.wait_for("move", |seen| seen.name == "move" && seen.fields["id"] == id).await;
    assert_eq!(whole.fields["predicate"], "name");
    let phases: Vec<String> = {
        let seen = spans.0.spans.lock().unwrap();
        let phases = seen.iter().filter(|seen| seen.name == "phase" && seen.outermost.get("id") == Some(&id));
        phases.map(|seen| seen.fields["phase"].clone()).collect()
    };
    for phase in ["Planned", "Learner", "Snapshot", "Joint", "Fence"] {
        assert!(phases.iter().any(|seen| seen == phase), "no {phase} among {phases:?}");
    }
    second.shutdown().await.unwrap();
    first.shutdown().await.unwrap();
}
