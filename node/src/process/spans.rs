//! Spans on their way to a collector that speaks OpenTelemetry's protocol.
//!
//! ```text
//!  span! ──> tracing ──> RequestTracer ──> SDK ──> batches ──OTLP over gRPC──> collector
//!                         trace id of the write's request
//! ```
//!
//! Whoever sends a write and the node that serves it are two processes, and no call between them carries a trace. They agree without it:
//! the id of a write's trace is a hash of the request's id, which both know. A sample is drawn by that id, so it is the same one on
//! both sides.

use std::{borrow::Cow, cell::Cell, fmt, time::Duration};

use opentelemetry::{
    Context, KeyValue, SpanId, TraceId,
    trace::{Link, SpanBuilder, SpanKind, TraceContextExt, Tracer, TracerProvider},
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{
        IdGenerator, RandomIdGenerator, Sampler, SamplingResult, SdkTracer, SdkTracerProvider, ShouldSample,
    },
};
use tracing::{Level, Metadata, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{Layer, filter::FilterFn, registry::LookupSpan};

use super::SpanExport;

/// How long a collector may take for a batch.
const PATIENCE: Duration = Duration::from_secs(5);

/// Must be called within a tokio runtime, which the connection lives in.
pub(super) fn provider(export: &SpanExport) -> Result<SdkTracerProvider, String> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&export.endpoint)
        .with_timeout(PATIENCE)
        .build()
        .map_err(|error| format!("otel.endpoint = {:?}: {error}", export.endpoint))?;
    let about = [
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", export.instance.clone()),
    ];
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_id_generator(RequestIds::default())
        .with_sampler(Sample::new(export.sample))
        .with_resource(Resource::builder().with_service_name("pontoon").with_attributes(about).build())
        .build())
}

/// Takes the spans of writes and moves and what is logged within them, whatever the filter of the log lets pass.
pub(super) fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(
    provider: &SdkTracerProvider,
) -> impl Layer<S> + use<S> {
    let ours = |about: &Metadata<'_>| {
        about.target().starts_with("pontoon") && (about.is_span() || *about.level() <= Level::INFO)
    };
    tracing_opentelemetry::layer()
        .with_tracer(RequestTracer(provider.tracer("pontoon")))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(FilterFn::new(ours).with_max_level_hint(LevelFilter::DEBUG))
}

thread_local! {
    /// Of the span that this thread is about to start, if it is the first of a request.
    static OF_REQUEST: Cell<Option<TraceId>> = const { Cell::new(None) };
}

/// The SDK's tracer, told the trace's id before it starts a span that no other is above.
struct RequestTracer(SdkTracer);

impl Tracer for RequestTracer {
    type Span = <SdkTracer as Tracer>::Span;

    fn build_with_context(&self, builder: SpanBuilder, parent: &Context) -> Self::Span {
        OF_REQUEST.set(builder.attributes.as_deref().and_then(trace_of));
        let span = self.0.build_with_context(builder, parent);
        OF_REQUEST.set(None);
        span
    }
}

/// The request's id, if it is among a span's attributes.
fn request_of(attributes: &[KeyValue]) -> Option<(Cow<'_, str>, Cow<'_, str>)> {
    let value_of = |name| {
        let found = attributes.iter().find(|attribute| attribute.key.as_str() == name)?;
        Some(found.value.as_str())
    };
    Some((value_of("client")?, value_of("seq")?))
}

fn trace_of(attributes: &[KeyValue]) -> Option<TraceId> {
    let (client, seq) = request_of(attributes)?;
    let hash = blake3::hash(format!("{client}/{seq}").as_bytes());
    hash.as_bytes().first_chunk().map(|bytes| TraceId::from_bytes(*bytes))
}

#[derive(Default)]
struct RequestIds(RandomIdGenerator);

impl fmt::Debug for RequestIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RequestIds")
    }
}

impl IdGenerator for RequestIds {
    fn new_trace_id(&self) -> TraceId {
        OF_REQUEST.get().unwrap_or_else(|| self.0.new_trace_id())
    }

    fn new_span_id(&self) -> SpanId {
        self.0.new_span_id()
    }
}

/// A share of the writes, and all of what is rare: moves.
#[derive(Debug, Clone)]
struct Sample {
    of_writes: Sampler,
}

impl Sample {
    fn new(share: f64) -> Sample {
        Sample { of_writes: Sampler::TraceIdRatioBased(share) }
    }
}

impl ShouldSample for Sample {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let above = parent.filter(|parent| parent.span().span_context().is_valid());
        let sampler = match above {
            // As it was decided for the whole trace.
            Some(above) if above.span().span_context().is_sampled() => &Sampler::AlwaysOn,
            Some(_) => &Sampler::AlwaysOff,
            None if request_of(attributes).is_some() => &self.of_writes,
            None => &Sampler::AlwaysOn,
        };
        sampler.should_sample(parent, trace, name, kind, attributes, links)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(client: &'static str, seq: i64) -> [KeyValue; 3] {
        [KeyValue::new("predicate", "name"), KeyValue::new("client", client), KeyValue::new("seq", seq)]
    }

    #[test]
    fn a_trace_is_the_requests_and_no_other_spans() {
        let trace = trace_of(&request("c1", 7));
        assert!(trace.is_some());
        assert_eq!(trace, trace_of(&request("c1", 7)));
        assert_ne!(trace, trace_of(&request("c1", 8)));
        assert_ne!(trace, trace_of(&request("c2", 7)));
        assert_eq!(trace_of(&request("c1", 7)[..2]), None);
    }

    #[test]
    fn a_share_of_the_writes_is_taken_and_every_move() {
        let sample = Sample::new(0.25);
        let taken = |attributes: &[KeyValue], trace| {
            let found = sample.should_sample(None, trace, "span", &SpanKind::Internal, attributes, &[]);
            usize::from(found.decision == opentelemetry_sdk::trace::SamplingDecision::RecordAndSample)
        };
        let writes = (0..1000).map(|seq| {
            let attributes = request("c1", seq);
            taken(&attributes, trace_of(&attributes).unwrap())
        });
        let writes: usize = writes.sum();
        assert!((150..350).contains(&writes), "{writes} of 1000");
        let moves = (1..=1000).map(|id| taken(&[KeyValue::new("id", id)], TraceId::from(id as u128)));
        assert_eq!(moves.sum::<usize>(), 1000);
    }
}
