//! The one port: gRPC services, health, reflection, and plain HTTP.

use std::sync::Arc;

use axum::middleware::{from_fn, from_fn_with_state};
use tonic::{server::NamedService, service::Routes, transport::Server};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    api::{FILE_DESCRIPTOR_SET, admin_server::AdminServer, data_server::DataServer, peer_server::PeerServer},
    console, gate,
    health::Serves,
    limits::{
        ADMIN_REQUEST_BYTES, CONNECTION_WINDOW_BYTES, HEADERS_BYTES, MESSAGE_LIMIT_BYTES, PEER_FRAME_BYTES,
        PING_EVERY, PING_PATIENCE, RESETS_PENDING_MOST, STREAM_WINDOW_BYTES, STREAMS_MOST,
    },
    service::{admin::AdminService, data::DataService, http, peer::PeerService},
    shared::Shared,
    tls::Incoming,
};

/// Keeps the health service told, per service; the one without a name is what clients ask. Ends with the node.
async fn tell_health(shared: Arc<Shared>, health: HealthReporter) {
    let (mut problems, mut stop) = (shared.health.subscribe(), shared.stop.subscribe());
    loop {
        problems.mark_unchanged();
        let status = |service| match shared.health.serves(service) {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        };
        health.set_service_status("", status(Serves::Data)).await;
        health.set_service_status(<DataServer<DataService>>::NAME, status(Serves::Data)).await;
        health.set_service_status(<AdminServer<AdminService>>::NAME, status(Serves::Admin)).await;
        health.set_service_status(<PeerServer<PeerService>>::NAME, status(Serves::Peer)).await;
        tokio::select! {
            changed = problems.changed() => if changed.is_err() { return },
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Serves the connections that come until the node stops. With `tls` they have shown who they are.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    incoming: Incoming,
    tls: bool,
) -> Result<(), tonic::transport::Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    tokio::spawn(tell_health(shared.clone(), health));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptors were compiled with this crate");
    let data = DataServer::new(DataService { shared: shared.clone() })
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES);
    let admin = AdminServer::new(AdminService { shared: shared.clone() })
        .max_decoding_message_size(ADMIN_REQUEST_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES);
    let peer = PeerServer::new(PeerService { shared: shared.clone() })
        .max_decoding_message_size(PEER_FRAME_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES);

    let gate = gate::Gate { turned_away: shared.turned_away.clone(), audit: shared.audit.clone() };
    let mut router = Routes::new(data)
        .add_service(admin)
        .add_service(peer)
        .add_service(health_service)
        .add_service(reflection)
        .into_axum_router()
        .merge(http::routes(shared.clone()))
        .merge(console::routes(shared.clone()))
        .layer(from_fn_with_state(gate, gate::allowed_only));
    if !tls {
        router = router.layer(from_fn(http::local_only));
    }
    let mut stop = shared.stop.subscribe();
    drop(shared);
    Server::builder()
        .accept_http1(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_MOST)
        .http2_max_pending_accept_reset_streams(Some(RESETS_PENDING_MOST))
        .http2_max_header_list_size(HEADERS_BYTES)
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_PATIENCE))
        .add_routes(Routes::from(router))
        .serve_with_incoming_shutdown(incoming, async move {
            drop(stop.wait_for(|stop| *stop).await);
        })
        .await
}
