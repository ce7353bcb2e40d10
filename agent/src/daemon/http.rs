//! Plain HTTP/1.1 listeners with a bounded number of connections: their ports are open to everybody
//! who can reach the node.

mod room;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use room::Answering;
pub(crate) use room::Room;

/// The connections that may wait to be accepted, which takes microseconds. The number allows for
/// bursts, so that nobody has to wait for a retransmission. The kernel uses `net.core.somaxconn` if
/// that is less.
const BACKLOG: i32 = 1_024;
/// The time that a request's header may take to arrive, including the time between requests.
const HEADER: Duration = Duration::from_secs(5);
/// The time for which a connection is kept for further requests, so that nobody holds one for good.
const AGE: Duration = Duration::from_mins(1);
/// The time that an answer may take once its listener is closed or its connection is too old.
const LAST_ANSWER: Duration = Duration::from_secs(5);
/// The largest header of a request, and the size of its buffer, in bytes.
const HEADER_MAX: usize = 8 * 1024;
/// The largest body that is read, in bytes, and how long it may take to arrive.
const BODY_MAX: usize = 1024;
const BODY: Duration = Duration::from_secs(5);
/// The pause after a connection could not be accepted because descriptors or memory are short. It
/// lets the connection go that was closed then.
const ACCEPT_AGAIN: Duration = Duration::from_millis(10);

/// An address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {at}: {cause}{hint}")]
pub(crate) struct Error {
    at: SocketAddr,
    cause: io::Error,
    hint: &'static str,
}

impl Error {
    fn new(at: SocketAddr, cause: io::Error) -> Self {
        let hint = match cause.raw_os_error() {
            Some(libc::EADDRINUSE) => " (find who has it with `ss -ltnp`)",
            Some(libc::EADDRNOTAVAIL) => {
                " (the address is not, or not yet, on a device of this node)"
            }
            Some(libc::EACCES) => {
                " (ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE)"
            }
            _ => "",
        };
        Self { at, cause, hint }
    }

    /// Whether this kernel has no sockets of the address's family.
    pub(crate) fn is_no_such_family(&self) -> bool {
        self.cause.raw_os_error() == Some(libc::EAFNOSUPPORT)
    }
}

/// Answers a request. Only the body of a PUT is read, as text. The peer's address is among the
/// request's extensions. An answer's body may be shared between several requests.
pub(crate) type Handler =
    Arc<dyn Fn(Request<String>) -> BoxFuture<'static, Response<Bytes>> + Send + Sync>;

/// A listener that answers requests until it is dropped.
pub(crate) struct Listener {
    accepting: JoinHandle<()>,
}

impl fmt::Debug for Listener {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Listener").finish_non_exhaustive()
    }
}

impl Listener {
    /// Starts to listen. Serves as many connections at once as the room allows.
    pub(crate) fn open(at: SocketAddr, handler: Handler, room: Room) -> Result<Self, Error> {
        let listener = bind(at).map_err(|cause| Error::new(at, cause))?;
        let accepting = tokio::spawn(accept(listener, at, handler, room));
        Ok(Self { accepting })
    }

    /// Stops listening. The port is free when it returns, and answers under way are finished.
    pub(crate) async fn close(mut self) {
        self.accepting.abort();
        let _ = (&mut self.accepting).await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn bind(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
    // Connections of an earlier listener may linger in TIME_WAIT.
    socket.set_reuse_address(true)?;
    if at.is_ipv6() {
        // IPv4 has its own listener.
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn accept(listener: TcpListener, at: SocketAddr, handler: Handler, room: Room) {
    // Dropped with this task, which lets the connections know that the listener is closed.
    let (_open, closed) = watch::channel(());
    loop {
        let accepted = listener.accept().await.and_then(|(stream, peer)| {
            let local = stream.local_addr()?;
            Ok((stream, peer, local))
        });
        match accepted {
            Ok((stream, peer, local)) => {
                let (handler, closed) = (Arc::clone(&handler), closed.clone());
                room.hold(peer, local, |answering| {
                    converse(stream, peer, handler, answering, closed)
                });
            }
            // A connection that was reset before it was accepted is no loss.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::debug!(%at, "cannot accept a connection: {error}; closing another one, trying again");
                room.close_one();
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// Returns a request with its body if it is read, or else the status to refuse it with.
async fn whole(
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Result<Request<String>, StatusCode> {
    let (mut parts, body) = request.into_parts();
    let _ = parts.extensions.insert(peer);
    if parts.method != Method::PUT {
        return Ok(Request::from_parts(parts, String::new()));
    }
    let body = tokio::time::timeout(BODY, Limited::new(body, BODY_MAX).collect())
        .await
        .map_err(|_| StatusCode::REQUEST_TIMEOUT)?
        .map_err(|_| StatusCode::PAYLOAD_TOO_LARGE)?;
    let text = String::from_utf8(body.to_bytes().into()).map_err(|_| StatusCode::BAD_REQUEST)?;
    Ok(Request::from_parts(parts, text))
}

async fn converse(
    stream: TcpStream,
    peer: SocketAddr,
    handler: Handler,
    answering: Answering,
    mut closed: watch::Receiver<()>,
) {
    let answer = service_fn(async |request| {
        Ok::<_, Infallible>(match whole(request, peer).await {
            Ok(request) => {
                answering.set(true);
                let answer = handler(request).await;
                answering.set(false);
                answer.map(Full::new)
            }
            Err(status) => {
                let mut refused = Response::new(Full::default());
                *refused.status_mut() = status;
                refused
            }
        })
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER)
            .max_buf_size(HEADER_MAX)
            .serve_connection(TokioIo::new(stream), answer)
    );
    tokio::select! {
        // Errors that clients make concern only them.
        _ = connection.as_mut() => return,
        _ = closed.changed() => {}
        () = tokio::time::sleep(AGE) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(LAST_ANSWER, connection).await;
}
