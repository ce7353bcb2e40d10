//! The metrics of the agent's own work, named as kube-proxy's.
//!
//! The exporter reads what the maps count when it is asked.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use sluice_core::model::Change;
use sluice_core::model::object::{ObjectName, SliceKind};

use crate::daemon::audit::Counted;
use crate::daemon::source::kubernetes::Requests;

type Seconds = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: u16,
}

/// The agent's own metrics.
pub struct Metrics {
    registry: Registry,
    started: SystemTime,
    sync: Histogram,
    last_sync: Seconds,
    last_queued: Seconds,
    programming: Histogram,
    service_changes: Counter,
    service_pending: Gauge,
    endpoint_changes: Counter,
    endpoint_pending: Gauge,
    failures: Counter,
    drift: Counted,
    healthz: Family<Code, Counter>,
    livez: Family<Code, Counter>,
    /// The time at which the last change of each slice was caused, and the causes of changes that
    /// are not in the maps yet.
    triggers: Mutex<Triggers>,
}

#[derive(Debug, Default)]
struct Triggers {
    seen: BTreeMap<(SliceKind, ObjectName), SystemTime>,
    waiting: Vec<SystemTime>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// Returns kube-proxy's buckets: 1 ms to 16 s.
fn latency() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// Returns kube-proxy's buckets: half a second, each second of a minute, and so on to five minutes.
fn programming() -> Histogram {
    let seconds = (1..60).map(f64::from);
    let fives = (0..12).map(|step| 60.0 + 5.0 * f64::from(step));
    let halves = (0..7).map(|step| 120.0 + 30.0 * f64::from(step));
    Histogram::new([0.25, 0.5].into_iter().chain(seconds).chain(fives).chain(halves))
}

/// Registers metrics.
struct Registrar<'a>(&'a mut Registry);

impl Registrar<'_> {
    fn add<M: prometheus_client::registry::Metric + Clone>(
        &mut self,
        name: &str,
        help: &str,
        metric: M,
    ) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }
}

impl Metrics {
    /// Registers the metrics, and the counts of requests to the API server if there is one.
    #[must_use]
    pub fn new(requests: Option<&Requests>) -> Self {
        let mut registry = Registry::default();
        if let Some(requests) = requests {
            requests.register(&mut registry);
        }
        let failures = Registrar(&mut registry).add(
            "sluice_sync_failures",
            "Writes to the maps that failed and were retried",
            Counter::default(),
        );
        let drift = Registrar(&mut registry).add(
            "sluice_drift",
            "What the audit found to be not as the agent had made it, repaired or not",
            Counted::default(),
        );
        let mut of = Registrar(registry.sub_registry_with_prefix("kubeproxy"));
        Self {
            started: SystemTime::now(),
            sync: of.add(
                "sync_proxy_rules_duration_seconds",
                "How long it took to write a change to the maps",
                latency(),
            ),
            last_sync: of.add(
                "sync_proxy_rules_last_timestamp_seconds",
                "When the maps last came into step with the sources",
                Seconds::default(),
            ),
            last_queued: of.add(
                "sync_proxy_rules_last_queued_timestamp_seconds",
                "When a change was last received",
                Seconds::default(),
            ),
            programming: of.add(
                "network_programming_duration_seconds",
                "From the cause of a change of endpoints (the slice's annotation endpoints.kubernetes.io/last-change-trigger-time) until it is in the maps",
                programming(),
            ),
            service_changes: of.add(
                "sync_proxy_rules_service_changes",
                "Changes of Services that were received",
                Counter::default(),
            ),
            service_pending: of.add(
                "sync_proxy_rules_service_changes_pending",
                "Changes of Services that are not in the maps yet",
                Gauge::default(),
            ),
            endpoint_changes: of.add(
                "sync_proxy_rules_endpoint_changes",
                "Changes of endpoints that were received",
                Counter::default(),
            ),
            endpoint_pending: of.add(
                "sync_proxy_rules_endpoint_changes_pending",
                "Changes of endpoints that are not in the maps yet",
                Gauge::default(),
            ),
            healthz: of.add("proxy_healthz", "Answers of /healthz by status", Family::default()),
            livez: of.add("proxy_livez", "Answers of /livez by status", Family::default()),
            failures,
            drift,
            triggers: Mutex::default(),
            registry,
        }
    }

    /// Returns the counter of what the audit finds.
    pub(crate) fn drift(&self) -> Counted {
        self.drift.clone()
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    fn triggers(&self) -> std::sync::MutexGuard<'_, Triggers> {
        self.triggers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a change that was received.
    pub(crate) fn received(&self, change: &Change) {
        match change {
            Change::Service(..) => {
                let _ = self.service_changes.inc();
                let _ = self.service_pending.inc();
            }
            Change::Slice(kind, name, slice) => {
                let _ = self.endpoint_changes.inc();
                let _ = self.endpoint_pending.inc();
                let mut triggers = self.triggers();
                match slice.as_ref().map(|slice| slice.triggered) {
                    // A change that was caused before the start did not wait for this agent.
                    Some(Some(cause)) if cause >= self.started => {
                        if triggers.seen.insert((*kind, name.clone()), cause) != Some(cause) {
                            triggers.waiting.push(cause);
                        }
                    }
                    Some(_) => {}
                    None => drop(triggers.seen.remove(&(*kind, name.clone()))),
                }
            }
            Change::Node(..) | Change::ServiceCidr(..) | Change::Notes(..) | Change::Synced => {
                return;
            }
        }
        let _ = self.last_queued.set(now());
    }

    /// Records a write to the maps.
    pub(crate) fn wrote(&self, took: Duration) {
        self.sync.observe(took.as_secs_f64());
    }

    /// Counts a failed write to the maps.
    pub(crate) fn failed(&self) {
        let _ = self.failures.inc();
    }

    /// Records that the maps hold what the sources say.
    pub(crate) fn settled(&self) {
        let waiting = std::mem::take(&mut self.triggers().waiting);
        if self.service_pending.get() == 0 && self.endpoint_pending.get() == 0 && waiting.is_empty()
        {
            return;
        }
        let _ = (self.service_pending.set(0), self.endpoint_pending.set(0));
        let _ = self.last_sync.set(now());
        for cause in waiting {
            // A clock that is behind that of the cause makes no time negative.
            self.programming.observe(cause.elapsed().unwrap_or_default().as_secs_f64());
        }
    }

    /// Counts an answer to a health check.
    pub(super) fn health_answer(&self, node_counts: bool, code: u16) {
        let family = if node_counts { &self.healthz } else { &self.livez };
        let _ = family.get_or_create(&Code { code }).inc();
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64()
}
