//! Spans of commands that somebody follows: one for the whole way in here, and below it one until the entry is durable in this log and one
//! while it is applied. Nothing is kept, and nothing is done, while nobody follows any.

use std::collections::VecDeque;

use tracing::{Span, debug_span};

/// The commands of a replica that are followed, in the order of their entries.
#[derive(Default)]
pub(super) struct Traces(VecDeque<Trace>);

struct Trace {
    index: u64,
    whole: Span,
    /// Until the entry is durable here. Dropping a span ends it.
    sync: Option<Span>,
    apply: Option<Span>,
}

impl Traces {
    /// A command has become an entry.
    pub(super) fn proposed(&mut self, index: u64, whole: Span) {
        if whole.is_disabled() {
            return;
        }
        whole.record("index", index);
        let sync = Some(debug_span!(parent: &whole, "sync", index));
        self.0.push_back(Trace { index, whole, sync, apply: None });
    }

    /// Entries up to here are durable in this log.
    pub(super) fn persisted(&mut self, index: u64) {
        for trace in self.0.iter_mut().take_while(|trace| trace.index <= index) {
            trace.sync = None;
        }
    }

    /// Entries up to here are committed and on their way to the machine.
    pub(super) fn handed_on(&mut self, index: u64) {
        for trace in self.0.iter_mut().take_while(|trace| trace.index <= index) {
            let Trace { whole, apply, .. } = trace;
            apply.get_or_insert_with(|| debug_span!(parent: &*whole, "apply"));
        }
    }

    /// Entries up to here are applied.
    pub(super) fn applied(&mut self, index: u64) {
        while self.0.pop_front_if(|trace| trace.index <= index).is_some() {}
    }

    /// What becomes of them is not known here.
    pub(super) fn lost(&mut self) {
        self.0 = VecDeque::new();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
