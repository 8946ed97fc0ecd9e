//! Connections to other nodes for calls, one per address, made on first use and kept.

use std::time::Duration;

use dashmap::DashMap;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::{
    api::{admin_client::AdminClient, data_client::DataClient},
    limits::{CONNECTION_WINDOW_BYTES, HEADERS_BYTES, MESSAGE_LIMIT_BYTES, STREAM_WINDOW_BYTES},
    tls::Dialer,
};

/// How every connection to a node is made.
///
/// # Errors
/// If the address is not HOST:PORT.
pub(crate) fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(Duration::from_secs(2))
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_header_list_size(HEADERS_BYTES)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5)))
}

/// The connections by address. A broken one repairs itself at its next use.
#[derive(Debug, Default)]
pub(crate) struct Channels {
    dialer: Dialer,
    open: DashMap<String, Channel>,
}

impl Channels {
    pub(crate) fn new(dialer: Dialer) -> Self {
        Channels { dialer, open: DashMap::new() }
    }

    /// How connections are made.
    pub(crate) fn dialer(&self) -> Dialer {
        self.dialer.clone()
    }

    /// # Errors
    /// `INVALID_ARGUMENT` if the address is not HOST:PORT.
    pub(crate) fn to(&self, address: &str) -> Result<Channel, Status> {
        if let Some(channel) = self.open.get(address) {
            return Ok(channel.clone());
        }
        let channel = self
            .dialer
            .lazily(address)
            .map_err(|error| Status::invalid_argument(format!("{address} is not HOST:PORT: {error}")))?;
        Ok(self.open.entry(address.to_owned()).or_insert(channel).clone())
    }

    pub(crate) fn admin(&self, address: &str) -> Result<AdminClient<Channel>, Status> {
        Ok(AdminClient::new(self.to(address)?)
            .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
            .max_encoding_message_size(MESSAGE_LIMIT_BYTES))
    }

    pub(crate) fn data(&self, address: &str) -> Result<DataClient<Channel>, Status> {
        Ok(DataClient::new(self.to(address)?)
            .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
            .max_encoding_message_size(MESSAGE_LIMIT_BYTES))
    }
}
