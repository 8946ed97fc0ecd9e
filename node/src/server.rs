//! The one port: gRPC services, health, reflection, and plain HTTP.

use std::sync::Arc;

use tokio::net::TcpListener;
use tonic::{
    server::NamedService,
    service::Routes,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    api::{FILE_DESCRIPTOR_SET, admin_server::AdminServer, data_server::DataServer, peer_server::PeerServer},
    channels::{CONNECTION_WINDOW_BYTES, MESSAGE_LIMIT_BYTES, STREAM_WINDOW_BYTES},
    health::Serves,
    service::{admin::AdminService, data::DataService, http, peer::PeerService},
    shared::Shared,
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

/// Serves until the node stops.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener) -> Result<(), tonic::transport::Error> {
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
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES);
    let peer = PeerServer::new(PeerService { shared: shared.clone() })
        .max_decoding_message_size(2 * MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES);

    let router = Routes::new(data)
        .add_service(admin)
        .add_service(peer)
        .add_service(health_service)
        .add_service(reflection)
        .into_axum_router()
        .merge(http::routes(shared.clone()))
        .layer(axum::middleware::from_fn(http::local_only));
    let mut stop = shared.stop.subscribe();
    drop(shared);
    Server::builder()
        .accept_http1(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .add_routes(Routes::from(router))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async move {
            drop(stop.wait_for(|stop| *stop).await);
        })
        .await
}
