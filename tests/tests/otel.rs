//! Spans of a node and of its client, as a collector of OpenTelemetry's gets them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, KeyValue, any_value::Value},
};
use pontoon_node::{LogFormat, SpanExport, send_logs_and_spans};
use pontoon_tests::{
    cluster::{Cluster, free_address, until},
    process::Program,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// A span as it was received.
#[derive(Debug, Clone)]
struct Seen {
    /// The process that it is of.
    service: String,
    instance: String,
    trace: Vec<u8>,
    id: Vec<u8>,
    parent: Vec<u8>,
    name: String,
    fields: BTreeMap<String, String>,
}

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Seen>>>);

fn text(value: Option<AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

fn fields(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    attributes.into_iter().map(|field| (field.key, text(field.value))).collect()
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_process in request.into_inner().resource_spans {
            let about = fields(of_process.resource.map(|resource| resource.attributes).unwrap_or_default());
            let of = |name: &str| about.get(name).cloned().unwrap_or_default();
            let spans = of_process.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| Seen {
                service: of("service.name"),
                instance: of("service.instance.id"),
                trace: span.trace_id,
                id: span.span_id,
                parent: span.parent_span_id,
                name: span.name,
                fields: fields(span.attributes),
            }));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> (Collector, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (collector, address) = (Collector::default(), listener.local_addr().unwrap());
        let service = TraceServiceServer::new(collector.clone());
        let served =
            Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(served);
        (collector, address)
    }

    async fn wait_for(&self, what: &str, wanted: impl Fn(&Seen) -> bool) -> Seen {
        let look = async || self.0.lock().unwrap().iter().find(|seen| wanted(seen)).cloned();
        until(what, look).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_one_trace_of_client_and_node_and_a_collector_that_is_gone_holds_nothing_up() {
    let (collector, address) = Collector::start().await;
    let endpoint = format!("http://{address}");
    let sent = SpanExport { endpoint: endpoint.clone(), sample: 1.0, instance: "the client".into() };
    let spans = send_logs_and_spans(LogFormat::Text, "error", &sent).unwrap();

    let mut cluster = Cluster::start(PROGRAM, "fjall", 1).await;
    assert!(cluster.terminate(0).await.success());
    let (to, all) = (format!("otel.endpoint={endpoint}"), "otel.sample=1");
    cluster.restart_with(0, &["--set", &to, "--set", all]).await;
    let client = cluster.client().await;
    client.put("name", "k", "v").await.unwrap();

    let write = collector.wait_for("the client's span", |seen| seen.name == "write").await;
    assert_eq!((write.service.as_str(), write.instance.as_str()), ("pontoon", "the client"));
    assert_eq!(write.fields["predicate"], "name");
    let served = collector
        .wait_for("the node's span", |seen| seen.name == "serve_write" && seen.trace == write.trace)
        .await;
    assert_eq!(served.instance, cluster.address(0));
    assert_eq!(["client", "seq"].map(|id| &served.fields[id]), ["client", "seq"].map(|id| &write.fields[id]));
    let below = async |name: &str, above: &Seen| {
        collector
            .wait_for(name, |seen| {
                seen.name == name && (&seen.trace, &seen.parent) == (&write.trace, &above.id)
            })
            .await
    };
    let command = below("command", &served).await;
    below("sync", &command).await;
    below("apply", &command).await;

    // Nobody listens there; and no span of a write is wanted.
    let nowhere = format!("otel.endpoint=http://{}", free_address());
    assert!(cluster.terminate(0).await.success());
    cluster.restart_with(0, &["--set", &nowhere]).await;
    let client = cluster.client().await;
    client.put("name", "k", "w").await.unwrap();
    assert!(cluster.terminate(0).await.success());
    spans.finish().await;
}

#[tokio::test]
async fn what_is_no_collector_is_refused_with_what_is_expected() {
    let started = async |set: &str| {
        let options = ["node", "--dir", "not-made", "--listen", "127.0.0.1:0", "--set", set];
        let (exit, said) = PROGRAM.run(options).await;
        (exit.code(), said)
    };
    let (code, said) = started("otel.endpoint=https://127.0.0.1:4317").await;
    assert!(code == Some(2) && said.contains("http://HOST:PORT is expected"), "{said}");
    let (code, said) = started("otel.sample=7").await;
    assert!(code == Some(2) && said.contains("a number from 0 to 1 is expected"), "{said}");
}
