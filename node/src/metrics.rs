//! `/metrics`: what the floors count, in the text format of Prometheus.
//!
//! ```text
//!  wal::Metrics ──┐
//!  raftstore::Stats, Roles ──┤
//!  shard::EngineStats ──┼──> one page, made when it is asked for
//!  what the node counts ──┘
//! ```
//!
//! There is one table of all metrics (`metrics/table.rs`): the page, the reference page and the tests of rules and dashboards are made from it.
//! The number of lines does not grow with the groups: they are counted together, and only the busiest have lines of their own.

mod collect;
mod page;
mod process;
mod table;

pub use table::reference;

use crate::shared::Shared;
use page::Page;

/// What `/metrics` says that its text is.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The page. Looks at every replica here once; costs a few milliseconds with ten thousand.
pub(crate) fn page(shared: &Shared) -> String {
    let mut page = Page::default();
    collect::node(&mut page, shared);
    collect::port(&mut page, shared);
    collect::clients(&mut page, shared);
    collect::log(&mut page, shared);
    collect::runtime(&mut page, shared);
    collect::groups(&mut page, shared);
    collect::moves(&mut page, shared);
    collect::backups(&mut page, shared);
    collect::engine(&mut page, shared);
    collect::transport(&mut page, shared);
    process::process(&mut page);
    page.text()
}
