//! A Pontoon node: the process, its services and its client.

pub mod api;
