//! Answers the HTTP requests of monitoring, as kube-proxy does.
//!
//! | address | path | |
//! |---|---|---|
//! | `--healthz-bind-address` | `/healthz` | 200, or 503 if the maps hold no image or are behind the sources for too long, if all sources have failed for an hour, or if the node is leaving |
//! | | `/livez` | 200, or 503 if the maps are behind the sources for too long |
//! | | `/readyz` | 200 if `sluice status` says that the node is ready, else 503, with the first reason |
//! | `--metrics-bind-address` | `/metrics` | see [`metrics`] |
//! | | `/proxyMode` | `sluice` |
//! | | `/healthz` | `ok` as long as the process answers |
//! | | `/debug/flags/v` | PUT by a process of this node: how much is logged from now on |

mod exporter;
mod form;
pub mod metrics;
mod process;
mod traffic;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::ready;
use http::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Bytes;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::daemon::http::{Handler, Listener, Room};
use crate::daemon::source::{Health, Pulse};
use crate::node::backoff::Backoff;
use crate::node::publish::publish;
use exporter::Exporter;
use form::Form;
use metrics::Metrics;

/// A change that has been waiting for this long makes the proxy unhealthy: two sync periods of
/// kube-proxy.
const OVERDUE: Duration = Duration::from_mins(1);
/// Sources that all have failed for this long make the proxy unhealthy: it can no longer know where
/// traffic should go.
const DEAF: Duration = Duration::from_hours(1);
/// The longest answer to `/readyz`, bytes.
const REASON_MAX: usize = 200;
/// The pauses between attempts to listen.
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

pub use traffic::Detail;

/// The addresses at which monitoring is answered, and its detail. An empty list means nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `/healthz` and `/livez`.
    pub healthz: Vec<SocketAddr>,
    /// `/metrics` and `/proxyMode`.
    pub metrics: Vec<SocketAddr>,
    /// The objects that have series of their own.
    pub detail: Detail,
}

/// Whether the proxy keeps up. The agent's loop updates it, and health checks read it.
#[derive(Debug)]
pub(crate) struct Liveness {
    state: Mutex<State>,
    sources: Vec<Pulse>,
}

#[derive(Clone, Debug)]
struct State {
    /// Since when the maps have been behind the sources, if they are.
    behind: Option<Instant>,
    /// The time at which the maps were last in step with the sources.
    updated: SystemTime,
    /// Whether the maps hold an image. Without one, nothing is served.
    serves: bool,
    /// Whether the node is about to be deleted.
    leaving: bool,
    /// Why the node is not ready: nothing if it is.
    waiting_for: Vec<String>,
}

/// Whether all sources have failed, and answered nothing at all, for so long that nothing which has
/// changed since is known.
fn are_deaf(sources: &[Health], now: SystemTime) -> bool {
    let is_long_ago = |at: SystemTime| now.duration_since(at).is_ok_and(|lasted| lasted >= DEAF);
    let has_failed = |source: &Health| {
        source.failure.as_ref().is_some_and(|(_, since)| is_long_ago(*since))
            && source.answered.is_none_or(is_long_ago)
    };
    !sources.is_empty() && sources.iter().all(has_failed)
}

impl State {
    fn is_healthy(&self) -> bool {
        self.behind.is_none_or(|since| since.elapsed() < OVERDUE)
    }
}

impl Liveness {
    /// Creates the state of a proxy with these sources that has just started.
    pub(crate) fn new(sources: Vec<Pulse>) -> Self {
        let state = Mutex::new(State {
            behind: None,
            updated: SystemTime::now(),
            serves: false,
            leaving: false,
            waiting_for: vec!["the agent to start".to_owned()],
        });
        Self { state, sources }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> State {
        self.lock().clone()
    }

    fn is_deaf(&self) -> bool {
        let sources: Vec<Health> = self.sources.iter().map(Pulse::health).collect();
        are_deaf(&sources, SystemTime::now())
    }

    /// Records what the node waits for until it is ready: nothing if it is.
    pub(crate) fn set_waiting_for(&self, waiting_for: &[String]) {
        self.lock().waiting_for = waiting_for.to_vec();
    }

    /// Records whether no write waits, whether the maps hold an image, and whether the node is
    /// about to be deleted.
    ///
    /// A source that is away leaves nothing waiting: what it said last is served, and to restart
    /// the agent would not bring it back.
    pub(crate) fn update(&self, is_in_step: bool, serves: bool, leaving: bool) {
        let mut state = self.lock();
        state.serves = serves;
        if is_in_step {
            (state.behind, state.updated) = (None, SystemTime::now());
        } else {
            state.behind = Some(state.behind.unwrap_or_else(Instant::now));
        }
        state.leaving = leaving;
    }

    /// Whether the proxy works.
    pub(crate) fn is_healthy(&self) -> bool {
        self.state().is_healthy()
    }
}

/// kube-proxy's body.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: BTreeMap<&'static str, Family>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Family {
    last_updated: String,
    healthy: bool,
}

/// Formats a time as in RFC 3339.
fn time(time: SystemTime) -> String {
    // Out of range only if the clock is wrong by centuries.
    jiff::Timestamp::try_from(time).map(|time| time.to_string()).unwrap_or_default()
}

/// The state that answers are made from.
#[derive(Debug)]
pub(crate) struct Monitor {
    liveness: Arc<Liveness>,
    metrics: Arc<Metrics>,
    exporter: Exporter,
}

impl Monitor {
    /// Makes a monitor of the maps below a pin path and the status in a state directory.
    pub(crate) fn new(
        liveness: Arc<Liveness>,
        metrics: Arc<Metrics>,
        pin_path: PathBuf,
        state_dir: PathBuf,
        detail: Detail,
    ) -> Self {
        let exporter = Exporter::new(Arc::clone(&metrics), pin_path, state_dir, detail);
        Self { liveness, metrics, exporter }
    }

    fn health(&self, node_counts: bool) -> Response<Bytes> {
        let state = self.liveness.state();
        let is_of_use = state.serves && !self.liveness.is_deaf();
        let healthy = state.is_healthy() && (is_of_use || !node_counts);
        let well = healthy && !(node_counts && state.leaving);
        let now = time(SystemTime::now());
        // As with kube-proxy, this is the present time as long as all is well.
        let last_updated = if well { now.clone() } else { time(state.updated) };
        let family = || Family { last_updated: time(state.updated), healthy };
        let body = Body {
            last_updated,
            current_time: now,
            node_eligible: node_counts.then_some(!state.leaving),
            healthy,
            status: [("IPv4", family()), ("IPv6", family())].into(),
        };
        let status = if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        self.metrics.health_answer(node_counts, status.as_u16());
        // Serializing strings and bools into memory cannot fail.
        let body = serde_json::to_string(&body).unwrap_or_default();
        response(status, "application/json", body)
    }

    /// Answers whether the node is ready, with the first reason for which it is not.
    /// Only processes of this node get the reason, which may name files and addresses.
    fn readiness(&self, is_local: bool) -> Response<Bytes> {
        let waiting_for = self.liveness.state().waiting_for;
        let text = |status, body: String| response(status, "text/plain; charset=utf-8", body);
        let Some(first) = waiting_for.first() else { return text(StatusCode::OK, "ok\n".into()) };
        if !is_local {
            let body = "not ready: see `sluice status`\n".to_owned();
            return text(StatusCode::SERVICE_UNAVAILABLE, body);
        }
        let end = first.floor_char_boundary(REASON_MAX);
        let cut = if end < first.len() { "..." } else { "" };
        let more = match waiting_for.len() - 1 {
            0 => String::new(),
            more => format!(" (and for {more} more: see `sluice status`)"),
        };
        let first = first.get(..end).unwrap_or_default();
        text(StatusCode::SERVICE_UNAVAILABLE, format!("waits for {first}{cut}{more}\n"))
    }

    async fn metrics(&self, request: &Request<String>) -> Response<Bytes> {
        let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
        let form = Form::wanted(accept);
        match self.exporter.text(form).await {
            Ok(text) => response(StatusCode::OK, form.content_type(), text),
            Err(error) => {
                response(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n"))
            }
        }
    }

    /// Returns the handler for the health port.
    fn healthz_handler(self: &Arc<Self>) -> Handler {
        let this = Arc::clone(self);
        let read = handler(move |path| match path {
            "/healthz" => Some(this.health(true)),
            "/livez" => Some(this.health(false)),
            _ => None,
        });
        let this = Arc::clone(self);
        Arc::new(move |request| {
            let is_readiness = request.uri().path() == "/readyz" && is_read(&request);
            let answer =
                if is_readiness { this.readiness(is_local(&request)) } else { read(&request) };
            ready(answer).boxed()
        })
    }

    /// Returns the handler for the metrics port.
    fn metrics_handler(self: &Arc<Self>) -> Handler {
        let this = Arc::clone(self);
        let read = handler(move |path| match path {
            "/proxyMode" => {
                Some(response(StatusCode::OK, "text/plain; charset=utf-8", "sluice".to_owned()))
            }
            "/healthz" => {
                Some(response(StatusCode::OK, "text/plain; charset=utf-8", "ok".to_owned()))
            }
            _ => None,
        });
        Arc::new(move |request| {
            let (this, read) = (Arc::clone(&this), Arc::clone(&read));
            async move {
                match request.uri().path() {
                    "/metrics" if is_read(&request) => this.metrics(&request).await,
                    "/debug/flags/v" => verbosity(&request),
                    _ => read(&request),
                }
            }
            .boxed()
        })
    }
}

/// Whether a request comes from a process of this node, over a loopback address.
fn is_local(request: &Request<String>) -> bool {
    let peer = request.extensions().get::<SocketAddr>();
    peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback())
}

/// Changes the log's verbosity, as in Kubernetes' components: a `PUT` with a number.
fn verbosity(request: &Request<String>) -> Response<Bytes> {
    let text = |status, body: String| response(status, "text/plain; charset=utf-8", body);
    if !is_local(request) {
        return text(
            StatusCode::FORBIDDEN,
            "only processes of this node may do this, over a loopback address\n".to_owned(),
        );
    }
    if request.method() != Method::PUT {
        let mut refused =
            text(StatusCode::METHOD_NOT_ALLOWED, "PUT a number: 0, 1 or more\n".to_owned());
        let _ = refused.headers_mut().insert(ALLOW, HeaderValue::from_static("PUT"));
        return refused;
    }
    let word = request.body().trim();
    let Ok(number) = word.parse::<u8>() else {
        return text(
            StatusCode::BAD_REQUEST,
            format!("expected a number (0, 1 or more), not {word:?}\n"),
        );
    };
    match crate::daemon::log::set(number) {
        Ok(()) => {
            tracing::info!("the log's verbosity is now {number}");
            text(StatusCode::OK, format!("successfully set the verbosity to {number}\n"))
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn response(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    let _ = headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    let _ = headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn is_read(request: &Request<String>) -> bool {
    matches!(*request.method(), Method::GET | Method::HEAD)
}

/// Returns a handler that answers reads by their path.
fn handler(
    answer: impl Fn(&str) -> Option<Response<Bytes>> + Send + Sync,
) -> Arc<impl Fn(&Request<String>) -> Response<Bytes> + Send + Sync> {
    Arc::new(move |request: &Request<String>| {
        if !is_read(request) {
            let mut refused = response(StatusCode::METHOD_NOT_ALLOWED, "text/plain", String::new());
            let _ = refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return refused;
        }
        answer(request.uri().path()).unwrap_or_else(|| {
            response(StatusCode::NOT_FOUND, "text/plain", "not found\n".to_owned())
        })
    })
}

/// Answers until the receiver of `report` is gone. `report` always holds the addresses that cannot
/// be listened on, with the reasons. They are retried.
pub(crate) async fn serve(
    monitor: Arc<Monitor>,
    settings: Settings,
    room: Room,
    report: watch::Sender<Vec<String>>,
) {
    let healthz = settings.healthz.into_iter().map(|at| (at, monitor.healthz_handler()));
    let mut closed: Vec<_> = healthz
        .chain(settings.metrics.into_iter().map(|at| (at, monitor.metrics_handler())))
        .collect();
    let mut open = Vec::new();
    let mut retry = RETRY;
    loop {
        let mut problems = Vec::new();
        closed.retain(|(at, handler)| {
            match Listener::open(*at, Arc::clone(handler), room.clone()) {
                Ok(listener) => {
                    tracing::debug!(%at, "answers monitoring");
                    open.push(listener);
                    false
                }
                Err(error) if error.is_no_such_family() => false,
                Err(error) => {
                    problems.push(format!("monitoring is not answered: {error}"));
                    true
                }
            }
        });
        for problem in problems.iter().filter(|problem| !report.borrow().contains(problem)) {
            tracing::warn!("{problem}; trying again");
        }
        let _ = publish(&report, problems);
        if closed.is_empty() {
            break;
        }
        tokio::time::sleep(retry.failed()).await;
    }
    // The listeners live as long as the receiver.
    report.closed().await;
    for listener in open {
        listener.close().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_common::Reason;

    fn monitor() -> (Arc<Liveness>, Monitor) {
        let liveness = Arc::new(Liveness::new(Vec::new()));
        let monitor = Monitor::new(
            Arc::clone(&liveness),
            Arc::new(Metrics::new(None)),
            PathBuf::from("/nowhere"),
            PathBuf::from("/nowhere"),
            Detail::default(),
        );
        (liveness, monitor)
    }

    #[test]
    fn readiness_is_one_short_line_with_the_first_reason() {
        let (liveness, monitor) = monitor();
        let answer = || {
            let answer = monitor.readiness(true);
            (answer.status(), String::from_utf8_lossy(answer.body()).into_owned())
        };
        let says = |text: &str| (StatusCode::SERVICE_UNAVAILABLE, text.to_owned());
        assert_eq!(answer(), says("waits for the agent to start\n"));
        liveness.set_waiting_for(&["the first full list of kubernetes".to_owned()]);
        assert_eq!(answer(), says("waits for the first full list of kubernetes\n"));
        liveness.set_waiting_for(&["ä".repeat(REASON_MAX), "b".to_owned(), "c".to_owned()]);
        let (_, text) = answer();
        assert!(text.ends_with("ä... (and for 2 more: see `sluice status`)\n"), "{text}");
        assert!(text.len() < REASON_MAX + 60 && text.lines().count() == 1, "{text}");
        let elsewhere = monitor.readiness(false);
        assert_eq!(elsewhere.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(elsewhere.body().starts_with(b"not ready: see"), "no reason for others");
        liveness.set_waiting_for(&[]);
        assert_eq!(answer(), (StatusCode::OK, "ok\n".to_owned()));
    }

    #[test]
    fn sources_are_deaf_when_all_of_them_have_failed_for_an_hour() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_hours(24);
        let failed = |lasted| Health {
            failure: Some(("refused".to_owned(), now - lasted)),
            ..Health::default()
        };
        let (well, minutes, hour) =
            (Health::default(), failed(Duration::from_mins(59)), failed(Duration::from_hours(1)));
        assert!(!are_deaf(&[], now), "there is none");
        let alone = |source: &Health| are_deaf(std::slice::from_ref(source), now);
        assert_eq!([&well, &minutes, &hour].map(alone), [false, false, true]);
        assert!(!are_deaf(&[hour.clone(), well], now), "one is enough");
        assert!(!are_deaf(&[hour.clone(), minutes], now));
        assert!(are_deaf(&[hour.clone(), hour.clone()], now));
        // Only one kind of objects has failed for so long.
        let answers = Health { answered: Some(now - Duration::from_mins(1)), ..hour };
        assert!(!alone(&answers));
    }

    #[test]
    fn a_node_is_alive_while_its_sources_are_away_and_serves_once_it_has_an_image() {
        let (liveness, monitor) = monitor();
        let answers = || [true, false].map(|node_counts| monitor.health(node_counts).status());
        assert_eq!(answers(), [StatusCode::SERVICE_UNAVAILABLE, StatusCode::OK], "at the start");
        liveness.update(true, false, false);
        assert_eq!(
            answers(),
            [StatusCode::SERVICE_UNAVAILABLE, StatusCode::OK],
            "no source so far"
        );
        liveness.update(true, true, false);
        assert_eq!(answers(), [StatusCode::OK; 2], "it serves");
        liveness.update(true, true, true);
        assert_eq!(answers(), [StatusCode::SERVICE_UNAVAILABLE, StatusCode::OK], "it leaves");
    }

    #[test]
    fn every_reason_is_a_row_in_the_docs() {
        let docs = include_str!("../../../docs/operate.md");
        for reason in Reason::ALL {
            assert!(docs.contains(&format!("`{}`", reason.as_str())), "{}", reason.as_str());
        }
    }
}
