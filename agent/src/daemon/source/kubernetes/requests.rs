//! Counts of requests to the API server, under the names that Kubernetes' components have for them.

use std::time::{Duration, Instant};

use kube::Client;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    code: String,
    host: String,
    method: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Asked {
    host: String,
    verb: String,
}

/// Requests by answer, and how long the answers took to begin. Clones share their counts.
#[derive(Clone, Debug)]
pub struct Requests {
    answers: Family<Answer, Counter>,
    durations: Family<Asked, Histogram>,
}

impl Default for Requests {
    fn default() -> Self {
        // 5 ms to 20 s: a watch's answer begins at once, whenever it ends.
        let histogram = || Histogram::new(exponential_buckets(0.005, 2.0, 13));
        Self { answers: Family::default(), durations: Family::new_with_constructor(histogram) }
    }
}

impl Requests {
    /// Registers the metrics.
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "rest_client_requests",
            "Requests to the API server by status; <error>: none came",
            self.answers.clone(),
        );
        registry.register(
            "rest_client_request_duration_seconds",
            "How long the API server's answers took to begin",
            self.durations.clone(),
        );
    }

    fn note(&self, host: &str, method: &http::Method, code: &str, took: Duration) {
        let (host, method) = (host.to_owned(), method.to_string());
        let asked = Asked { host: host.clone(), verb: method.clone() };
        self.durations.get_or_create(&asked).observe(took.as_secs_f64());
        let _ = self.answers.get_or_create(&Answer { code: code.to_owned(), host, method }).inc();
    }

    /// Returns the same client, whose requests are counted.
    pub(super) fn counting(&self, client: &Client, host: &str) -> Client {
        let namespace = client.default_namespace().to_owned();
        let (client, requests, host) = (client.clone(), self.clone(), host.to_owned());
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let (client, requests, host) = (client.clone(), requests.clone(), host.clone());
            async move {
                let (method, begun) = (request.method().clone(), Instant::now());
                let result = client.send(request).await;
                let code = match &result {
                    Ok(response) => response.status().as_str().to_owned(),
                    Err(_) => "<error>".to_owned(),
                };
                requests.note(&host, &method, &code, begun.elapsed());
                result
            }
        });
        Client::new(service, namespace)
    }
}
