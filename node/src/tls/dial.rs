//! Connections to nodes: made with the certificates that are in force at the time, and checked for who answers.

use std::{io, net::IpAddr, sync::Arc};

use hyper_util::rt::TokioIo;
use pontoon_proto::NodeId;
use rustls::pki_types::{DnsName, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint, Uri};

use super::{Subject, Tls};
use crate::{channels::endpoint, roles::Role};

/// How this process reaches nodes: by TLS or, on its own machine, without.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dialer {
    tls: Option<Arc<Tls>>,
}

impl Dialer {
    pub(crate) fn new(tls: Option<Arc<Tls>>) -> Self {
        Dialer { tls }
    }

    /// A connection that is made at its first use, and again after it broke.
    ///
    /// # Errors
    /// If the address is not HOST:PORT.
    pub(crate) fn lazily(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        let endpoint = endpoint(address)?;
        Ok(match &self.tls {
            None => endpoint.connect_lazy(),
            Some(tls) => endpoint.connect_with_connector_lazy(connector(tls.clone(), None)),
        })
    }

    /// A connection to this node and no other.
    ///
    /// # Errors
    /// If nobody answers, or somebody else does.
    ///
    /// # Cancel safety
    /// Nothing has happened if this is dropped.
    pub(crate) async fn to_node(
        &self,
        address: &str,
        node: NodeId,
    ) -> Result<Channel, tonic::transport::Error> {
        let endpoint: Endpoint = endpoint(address)?;
        match &self.tls {
            None => endpoint.connect().await,
            Some(tls) => endpoint.connect_with_connector(connector(tls.clone(), Some(node))).await,
        }
    }
}

fn connector(
    tls: Arc<Tls>,
    node: Option<NodeId>,
) -> impl tower::Service<Uri, Response = TokioIo<TlsStream<TcpStream>>, Error = io::Error, Future: Send>
+ Send
+ 'static {
    tower::service_fn(move |uri: Uri| {
        let tls = tls.clone();
        async move { connect(&tls, &uri, node).await.map(TokioIo::new) }
    })
}

async fn connect(tls: &Arc<Tls>, uri: &Uri, node: Option<NodeId>) -> io::Result<TlsStream<TcpStream>> {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(0);
    let name = match host.parse::<IpAddr>() {
        Ok(address) => ServerName::from(address),
        Err(_) => DnsName::try_from(host.to_owned())
            .map(ServerName::DnsName)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{host} is no host name")))?,
    };
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;

    let reader = tls.clone();
    let credentials = tokio::task::spawn_blocking(move || {
        reader.refresh();
        reader.now()
    })
    .await?;
    let stream =
        TlsConnector::from(credentials.client.clone()).connect(name, stream).await.map_err(|error| {
            io::Error::new(error.kind(), format!("no TLS with {host}:{port}: {error}{}", hint(&error)))
        })?;
    let answers = subject_of(&stream).and_then(|found| match node {
        _ if found.cluster != credentials.subject.cluster => {
            Err(format!("{found} is of another cluster than {}", credentials.subject))
        }
        _ if found.role != Role::Node => Err(format!("{found} is no node")),
        Some(node) if found.node() != Some(node) => Err(format!("{found} is not {node}")),
        _ => Ok(()),
    });
    match answers {
        Ok(()) => Ok(stream),
        Err(reason) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the certificate that {host}:{port} shows is not accepted: {reason}"),
        )),
    }
}

/// What to do if a node was found that runs without TLS: it answers a handshake in the clear, or not at all.
fn hint(error: &io::Error) -> &'static str {
    let reason = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    let clear = matches!(reason, Some(rustls::Error::InvalidMessage(_)));
    match clear || error.kind() == io::ErrorKind::UnexpectedEof {
        true => {
            "; if that node runs without TLS, leave --tls-cert, --tls-key and --tls-ca away (PONTOON_TLS_CERT … too)"
        }
        false => "",
    }
}

fn subject_of(stream: &TlsStream<TcpStream>) -> Result<Subject, String> {
    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    Subject::of_certificate(shown.ok_or("there is none")?)
}
