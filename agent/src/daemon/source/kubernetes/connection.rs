//! Connections to the API server that notice when the other end is gone.
//!
//! A watch may be silent for minutes. An idle TCP connection whose other end vanished silently (a
//! load balancer that failed over, a firewall that lost its state) looks just the same. So the
//! kernel sends probes in the silence. The kernel of a server that hangs answers them too; that
//! only shows when the watch's time is up.

use std::time::{Duration, Instant};

use http::{Method, Request, Response, StatusCode};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::retry::RetryPolicy;
use kube::client::{Body, ClientBuilder, ConfigExt as _};
use kube::{Client, Config};
use tokio::sync::mpsc;
use tower::retry::RetryLayer;
use tower::{BoxError, ServiceBuilder};

use crate::daemon::source::decode::Kind;

/// The silence after which the kernel sends probes.
const SILENCE: Duration = Duration::from_secs(15);
/// The number of probes before the kernel gives up. It waits [`PROBE`] for each.
const PROBES: u32 = 3;
const PROBE: Duration = Duration::from_secs(5);
/// Data that is not acknowledged for this long ends the connection.
const UNCONFIRMED: Duration = Duration::from_secs(30);

/// Makes a client like kube's, except for the options of its sockets.
pub(super) fn client(config: Config) -> Result<Client, kube::Error> {
    if config.proxy_url.is_some() {
        // kube refuses this, and gives the reason.
        return Client::try_from(config);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_keepalive(Some(SILENCE));
    tcp.set_keepalive_interval(Some(PROBE));
    tcp.set_keepalive_retries(Some(PROBES));
    tcp.set_tcp_user_timeout(Some(UNCONFIRMED));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    connector.set_reset_reader_on_write(config.reset_reader_on_write);
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .build::<_, Body>(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.default_retry.then(|| RetryLayer::new(RetryPolicy::server_retry())))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}

/// An answer to a request: its method, the status if there is one, and how long that took.
pub(super) struct Answer {
    pub(super) method: Method,
    pub(super) status: Option<StatusCode>,
    pub(super) took: Duration,
}

/// Returns the same client, passing each answer to a function.
pub(super) fn observed(
    client: &Client,
    observe: impl Fn(Answer) + Clone + Send + 'static,
) -> Client {
    let namespace = client.default_namespace().to_owned();
    let client = client.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let (client, observe) = (client.clone(), observe.clone());
        async move {
            let (method, begun) = (request.method().clone(), Instant::now());
            let result = client.send(request).await;
            let status = result.as_ref().ok().map(Response::status);
            observe(Answer { method, status, took: begun.elapsed() });
            result
        }
    });
    Client::new(service, namespace)
}

/// Returns the same client, reporting each request that succeeds.
pub(super) fn reporting(
    client: &Client,
    kind: Kind,
    succeeded: mpsc::UnboundedSender<Kind>,
) -> Client {
    observed(client, move |answer| {
        if answer.status.is_some_and(|status| status.is_success()) {
            // The receiver is gone when the source ends.
            let _ = succeeded.send(kind);
        }
    })
}
