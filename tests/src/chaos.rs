//! Real processes in a world that can be hurt: five nodes, each in a network namespace and a time namespace of its own, on a
//! disk of its own. See the program `chaos`.
//!
//! - [`disk`] and [`mount`]: a file system that stalls, is full, and loses all that was not synced when power is cut;
//! - [`net`]: a network that cuts, loses, delays and chokes each direction of each link;
//! - [`hosts`]: the namespaces, and nodes in them;
//! - [`work`]: clients whose histories are judged, appenders to logs, and moves without end.

pub mod disk;
pub mod hosts;
pub mod mount;
pub mod net;
pub mod work;
