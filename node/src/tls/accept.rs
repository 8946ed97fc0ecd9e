//! The door: takes connections in, as many as there may be, and learns who calls before anything is read for them.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Duration, Instant, Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::Stream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::{Subject, Tls};
use crate::{
    caller::Caller,
    limits::{HANDSHAKE, RESERVED_PART, SILENCE},
    roles::Role,
    turned_away::{TurnedAway, Why},
};

/// Connections that have been let in and wait for the server.
const AHEAD: usize = 64;
/// After the system had no room for another connection.
const PAUSE: Duration = Duration::from_millis(50);

/// The connections that were let in. The port is free when this is dropped.
pub(crate) struct Incoming {
    door: Arc<Door>,
    listener: TcpListener,
    admitted: mpsc::Receiver<Connection>,
    /// For those who are on their way in.
    sender: mpsc::Sender<Connection>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Connection>>> {
        let this = &mut *self;
        loop {
            if let Poll::Ready(Some(connection)) = this.admitted.poll_recv(cx) {
                return Poll::Ready(Some(Ok(connection)));
            }
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
            match ready!(this.listener.poll_accept(cx)) {
                Ok((stream, address)) => this.door.clone().receive(stream, address, this.sender.clone()),
                // One connection's trouble, or too many open files: neither is the end of the node.
                Err(error) => {
                    warn!(%error, "a connection could not be accepted");
                    this.pause = Some(Box::pin(sleep(PAUSE)));
                }
            }
        }
    }
}

/// Who is let in.
pub(crate) struct Door {
    tls: Option<Arc<Tls>>,
    turned_away: Arc<TurnedAway>,
    /// For everybody.
    places: Arc<Semaphore>,
    /// For nodes and operators, once the others are taken.
    reserved: Arc<Semaphore>,
    /// For those who have not said yet who they are.
    anteroom: Arc<Semaphore>,
}

impl Door {
    /// A door for at most so many connections.
    pub(crate) fn new(tls: Option<Arc<Tls>>, turned_away: Arc<TurnedAway>, connections: usize) -> Arc<Door> {
        // Without TLS all are alike.
        let reserved = if tls.is_some() { connections / RESERVED_PART } else { 0 };
        Arc::new(Door {
            tls,
            turned_away,
            places: Arc::new(Semaphore::new(connections - reserved)),
            reserved: Arc::new(Semaphore::new(reserved)),
            anteroom: Arc::new(Semaphore::new(connections)),
        })
    }

    /// Lets connections in until the stream is dropped.
    pub(crate) fn open(self: Arc<Self>, listener: TcpListener) -> Incoming {
        let (sender, admitted) = mpsc::channel(AHEAD);
        Incoming { door: self, listener, admitted, sender, pause: None }
    }

    /// Learns who calls, beside all others who wait for that.
    fn receive(self: Arc<Self>, stream: TcpStream, address: SocketAddr, to: mpsc::Sender<Connection>) {
        let Ok(waits) = self.anteroom.clone().try_acquire_owned() else {
            return self.turned_away.note(Why::Crowded);
        };
        tokio::spawn(async move {
            let connection = self.admit(stream, address).await;
            drop(waits);
            if let Some(connection) = connection {
                // The server may be gone.
                drop(to.send(connection).await);
            }
        });
    }

    /// `None`: turned away, and counted.
    async fn admit(&self, stream: TcpStream, address: SocketAddr) -> Option<Connection> {
        let away = |why: Why, reason: &dyn std::fmt::Display| {
            self.turned_away.note(why);
            debug!(%address, %reason, "a connection was turned away");
        };
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%address, %error, "a connection went at once");
            return None;
        }
        let (wire, caller) = match &self.tls {
            None => (Wire::Plain(stream), Caller::new(None, Some(address))),
            Some(tls) => {
                let credentials = tls.now();
                let shaken =
                    timeout(HANDSHAKE, TlsAcceptor::from(credentials.server.clone()).accept(stream)).await;
                let stream = match shaken {
                    Ok(Ok(stream)) => stream,
                    Ok(Err(error)) => {
                        away(Why::Handshake, &error);
                        return None;
                    }
                    Err(_) => {
                        away(Why::Handshake, &"the handshake took too long");
                        return None;
                    }
                };
                let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
                let subject = shown
                    .ok_or_else(|| "there is no certificate".to_owned())
                    .and_then(|shown| Subject::of_certificate(shown))
                    .and_then(|found| match found.cluster == credentials.subject.cluster {
                        true => Ok(found),
                        false => Err(format!("{found} is of another cluster than {}", credentials.subject)),
                    });
                match subject {
                    Ok(subject) => (Wire::Tls(Box::new(stream)), Caller::new(Some(subject), Some(address))),
                    Err(reason) => {
                        away(Why::Stranger, &reason);
                        return None;
                    }
                }
            }
        };
        let Some(place) = self.place(&caller) else {
            away(Why::Crowded, &"there are as many connections as there may be (--max-connections)");
            return None;
        };
        let turned_away = self.turned_away.clone();
        let silence = Silence { last: Instant::now(), spoke: false, alarm: Box::pin(sleep(HANDSHAKE)) };
        Some(Connection { wire, caller, silence, turned_away, _place: place })
    }

    fn place(&self, caller: &Caller) -> Option<OwnedSemaphorePermit> {
        let place = self.places.clone().try_acquire_owned().ok();
        match caller.role() {
            Some(Role::Node | Role::Operator) => {
                place.or_else(|| self.reserved.clone().try_acquire_owned().ok())
            }
            _ => place,
        }
    }
}

/// A connection that was let in; it gives its place back when it is dropped.
pub(crate) struct Connection {
    wire: Wire,
    caller: Caller,
    silence: Silence,
    turned_away: Arc<TurnedAway>,
    _place: OwnedSemaphorePermit,
}

enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// When something came last. The alarm is set again only when it rings, so that reading costs nothing more.
struct Silence {
    last: Instant,
    spoke: bool,
    alarm: Pin<Box<Sleep>>,
}

impl Silence {
    fn heard(&mut self) {
        self.last = Instant::now();
        self.spoke = true;
    }

    /// Ready when nothing came for too long.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.alarm.as_mut().poll(cx));
            let due = self.last + if self.spoke { SILENCE } else { HANDSHAKE };
            if due <= Instant::now() {
                return Poll::Ready(());
            }
            self.alarm.as_mut().reset(due);
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let read = match &mut this.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Wire::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        };
        if read.is_ready() {
            this.silence.heard();
            return read;
        }
        ready!(this.silence.poll_over(cx));
        this.turned_away.note(Why::Silent);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "nothing came for too long")))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Wire::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Wire::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Wire::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Wire::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.wire {
            Wire::Plain(stream) => stream.is_write_vectored(),
            Wire::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    /// Whether a connection is closed that heard something so long ago, at a moment when its alarm rings.
    async fn over(ago: Duration, spoke: bool) -> bool {
        let last = Instant::now().checked_sub(ago).expect("the machine runs for longer");
        let mut silence = Silence { last, spoke, alarm: Box::pin(sleep(Duration::ZERO)) };
        silence.alarm.as_mut().await;
        poll_fn(|cx| Poll::Ready(silence.poll_over(cx).is_ready())).await
    }

    #[tokio::test]
    async fn silence_is_over_sooner_before_the_first_words() {
        assert!(over(HANDSHAKE, false).await);
        assert!(!over(HANDSHAKE / 2, false).await, "the first words may still come");
        assert!(!over(HANDSHAKE, true).await, "who has spoken may be silent for longer");
        assert!(over(SILENCE, true).await);
    }
}
