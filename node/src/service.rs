//! The services on the node's port.

pub(crate) mod admin;
mod backup;
mod calls;
mod common;
pub(crate) mod data;
pub(crate) mod http;
mod log;
pub(crate) mod peer;
