//! The services on the node's port.

pub(crate) mod admin;
pub(crate) mod data;
pub(crate) mod http;
pub(crate) mod peer;
