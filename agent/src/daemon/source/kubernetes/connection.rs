//! Connections to the API server that notice when nobody is there any more.
//!
//! A watch may be silent for minutes, and an idle TCP connection whose other end vanished without a
//! word (a load balancer that failed over, a firewall that forgot) looks just the same. The kernel
//! asks in the silence. It answers for a server that has hung, too: that only shows when the
//! watch's time is up.

use std::time::Duration;

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

/// After so much silence the kernel asks whether the other side is still there.
const SILENCE: Duration = Duration::from_secs(15);
/// How often it asks before it gives up, and how long it waits each time.
const PROBES: u32 = 3;
const PROBE: Duration = Duration::from_secs(5);
/// What was sent and is not confirmed for so long ends the connection.
const UNCONFIRMED: Duration = Duration::from_secs(30);

/// Makes a client as kube does, but for the options of its sockets.
pub(super) fn client(config: Config) -> Result<Client, kube::Error> {
    if config.proxy_url.is_some() {
        // Refused there, with the reason.
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

/// The same client, which tells of each request that succeeds.
pub(super) fn telling(client: &Client, kind: Kind, heard: mpsc::UnboundedSender<Kind>) -> Client {
    let namespace = client.default_namespace().to_owned();
    let client = client.clone();
    let service = tower::service_fn(move |request| {
        let (client, heard) = (client.clone(), heard.clone());
        async move {
            let response = client.send(request).await?;
            if response.status().is_success() {
                // Nobody listens any more when the source ends.
                let _ = heard.send(kind);
            }
            Ok::<_, kube::Error>(response)
        }
    });
    Client::new(service, namespace)
}
