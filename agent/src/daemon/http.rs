//! Plain HTTP/1.1 listeners with bounded connections: their ports are open to everybody who reaches
//! the node.

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

/// Connections that wait to be accepted, which takes microseconds: a burst, where nobody else is to
/// wait for a retransmission. The kernel takes `net.core.somaxconn` if that is less.
const BACKLOG: i32 = 1_024;
/// How long a request's header may take to come, the time between requests included.
const HEADER: Duration = Duration::from_secs(5);
/// How long a connection is kept for further requests: nobody holds one for good.
const AGE: Duration = Duration::from_mins(1);
/// How long an answer under way may take once its listener is closed or its connection old.
const LAST_ANSWER: Duration = Duration::from_secs(5);
/// The largest header of a request, and the buffer for it, bytes.
const HEADER_MAX: usize = 8 * 1024;
/// The largest body that is read, bytes, and how long it may take to come.
const BODY_MAX: usize = 1024;
const BODY: Duration = Duration::from_secs(5);
/// How long to wait when no connection can be accepted (descriptors or memory are short): until
/// what is closed then is gone.
const ACCEPT_AGAIN: Duration = Duration::from_millis(10);

/// Why nobody listens at an address.
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

/// Answers a request. Its body is read where it is PUT, and is text; the address of who asks is
/// among its extensions. An answer's body may be shared between those who get the same.
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
    /// Listens; requests are answered from now on, as many connections at once as the room takes.
    pub(crate) fn open(at: SocketAddr, handler: Handler, room: Room) -> Result<Self, Error> {
        let listener = bind(at).map_err(|cause| Error::new(at, cause))?;
        let accepting = tokio::spawn(accept(listener, at, handler, room));
        Ok(Self { accepting })
    }

    /// Frees the port before it returns; answers under way are finished.
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
        // IPv4 has a listener of its own.
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn accept(listener: TcpListener, at: SocketAddr, handler: Handler, room: Room) {
    // Goes with this task: its end is what tells the connections that the listener is closed.
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
            // One that was reset before it was accepted is nobody's loss.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::debug!(%at, "cannot accept a connection: {error}; closing another one, trying again");
                room.close_one();
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// A request with its body, as far as that is read; else the status to refuse it with.
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
        // What clients do wrong concerns them alone.
        _ = connection.as_mut() => return,
        _ = closed.changed() => {}
        () = tokio::time::sleep(AGE) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(LAST_ANSWER, connection).await;
}
