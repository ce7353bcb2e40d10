//! The answer to a health check: the same for every method and path.

use std::collections::BTreeMap;
use std::fmt;

use http::header::{CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use http::{Response, StatusCode};
use hyper::body::Bytes;
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use sluice_core::model::HealthCheck;
use sluice_core::model::object::ObjectName;
use tokio::sync::watch;

use super::IsHealthy;

/// The traffic that the load balancer may send here, relative to other nodes.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// kube-proxy's body, with its keys in its order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: Service<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct Service<'a> {
    namespace: &'a str,
    name: &'a str,
}

/// Answers by the state at the time of the request.
#[derive(Clone)]
pub(super) struct Answerer {
    checks: watch::Receiver<BTreeMap<ObjectName, HealthCheck>>,
    is_healthy: IsHealthy,
}

impl fmt::Debug for Answerer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Answerer").finish_non_exhaustive()
    }
}

impl Answerer {
    pub(super) fn new(
        checks: watch::Receiver<BTreeMap<ObjectName, HealthCheck>>,
        is_healthy: IsHealthy,
    ) -> Self {
        Self { checks, is_healthy }
    }

    /// Returns the answer to a Service's health check. A Service that is gone has no endpoints.
    pub(super) fn answer(&self, service: &ObjectName) -> Response<Bytes> {
        let local = self.checks.borrow().get(service).map_or(0, |check| check.local);
        answer(service, local, (self.is_healthy)())
    }
}

fn answer(service: &ObjectName, local: usize, healthy: bool) -> Response<Bytes> {
    let mut response = Response::new(body(service, local, healthy).into());
    if local == 0 || !healthy {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    let headers = response.headers_mut();
    let _ = headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let _ = headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let _ = headers.insert(WEIGHT, HeaderValue::from(local));
    response
}

fn body(service: &ObjectName, local: usize, healthy: bool) -> String {
    let body = Body {
        service: Service { namespace: &service.namespace, name: &service.name },
        local_endpoints: local,
        service_proxy_healthy: healthy,
    };
    let mut text = Vec::new();
    // Serializing strings, a number and a bool into memory cannot fail.
    let _ = body
        .serialize(&mut Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"\t")));
    String::from_utf8(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_is_kube_proxys_byte_by_byte() {
        let service = ObjectName::new("shop", "web");
        let expected = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
        assert_eq!(body(&service, 2, true), expected);
    }

    #[test]
    fn only_a_healthy_proxy_with_local_endpoints_answers_ok() {
        let service = ObjectName::new("shop", "web");
        for (local, healthy, status) in
            [(1, true, 200), (0, true, 503), (1, false, 503), (0, false, 503)]
        {
            let response = answer(&service, local, healthy);
            assert_eq!(response.status(), status, "{local} {healthy}");
            assert_eq!(response.headers().get(WEIGHT), Some(&HeaderValue::from(local)));
        }
    }
}
