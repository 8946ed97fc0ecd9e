//! The gRPC services of the package `pontoon.v1`, generated from `proto/schema`. The messages are `pontoon_proto::v1`.

#![allow(missing_docs, reason = "generated; the schema files hold the documentation")]

include!(concat!(env!("OUT_DIR"), "/pontoon.v1.rs"));

/// The descriptors of every service and message, as reflection serves them.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pontoon.descriptors.bin"));
