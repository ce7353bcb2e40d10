//! Counts of requests to the API server, under the names that Kubernetes' components have for them.

use kube::Client;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::connection::{self, observed};

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

    /// Returns the same client, whose requests are counted.
    pub(super) fn counting(&self, client: &Client, host: &str) -> Client {
        let (requests, host) = (self.clone(), host.to_owned());
        observed(client, move |answer| requests.note(&host, &answer))
    }

    fn note(&self, host: &str, answer: &connection::Answer) {
        let (host, method) = (host.to_owned(), answer.method.to_string());
        let code =
            answer.status.map_or_else(|| "<error>".to_owned(), |status| status.as_str().to_owned());
        let asked = Asked { host: host.clone(), verb: method.clone() };
        self.durations.get_or_create(&asked).observe(answer.took.as_secs_f64());
        let _ = self.answers.get_or_create(&Answer { code, host, method }).inc();
    }
}
