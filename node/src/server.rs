//! The one port: gRPC services, health, reflection, and plain HTTP.

use std::sync::Arc;

use tokio::net::TcpListener;
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};

use crate::{
    api::{FILE_DESCRIPTOR_SET, admin_server::AdminServer, data_server::DataServer, peer_server::PeerServer},
    channels::{CONNECTION_WINDOW_BYTES, MESSAGE_LIMIT_BYTES, STREAM_WINDOW_BYTES},
    service::{admin::AdminService, data::DataService, http, peer::PeerService},
    shared::Shared,
};

/// Serves until the node stops.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener) -> Result<(), tonic::transport::Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<DataServer<DataService>>().await;
    health.set_serving::<AdminServer<AdminService>>().await;
    health.set_serving::<PeerServer<PeerService>>().await;
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
