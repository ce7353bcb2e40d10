//! The tasks that run next to the agent's loop and follow it: health checks of Services,
//! monitoring, Kubernetes Events, and the kernel's connection tracking.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use sluice_core::model::HealthCheck;
use sluice_core::model::object::ObjectName;
use sluice_core::policy::Policy;
use tokio::sync::watch;

use super::audit::Drift;
use super::failures::{self, Failing, FailingServices};
use super::sync::MapSync;
use crate::daemon::health::{self, Addresses, Failures, Inputs};
use crate::daemon::http::Room;
use crate::daemon::kubernetes_events::{self, ObjectEvents};
use crate::daemon::monitor::{self, Liveness, Monitor};
use crate::daemon::source::kubernetes::Events;
use crate::node::conntrack::{self, UdpFrontends};
use crate::node::devices::Survey;
use crate::node::publish::publish;
use crate::node::status::{ENDPOINTS_FAIL, ReportStatus, unix_seconds};
use crate::node::view::PortName;

/// The loop's ends of the tasks' channels.
#[derive(Debug)]
pub(super) struct SideTasks {
    liveness: Arc<Liveness>,
    checks: watch::Sender<BTreeMap<ObjectName, HealthCheck>>,
    addresses: watch::Sender<Addresses>,
    frontends: watch::Sender<Arc<UdpFrontends>>,
    failures: watch::Receiver<Failures>,
    cleaned: watch::Receiver<conntrack::Progress>,
    unmonitored: watch::Receiver<Vec<String>>,
    /// The Events to write, if they can be written.
    object_events: Option<watch::Sender<Arc<ObjectEvents>>>,
    failing: watch::Receiver<FailingServices>,
}

impl SideTasks {
    /// Starts the tasks. They end when the returned value is dropped. Without a writer there are no
    /// Events.
    pub(super) fn start(
        monitor: Monitor,
        at: monitor::Settings,
        liveness: Arc<Liveness>,
        node: &str,
        events: Option<Events>,
        maps: PathBuf,
    ) -> Self {
        let (checks, checks_of_task) = watch::channel(BTreeMap::new());
        let (addresses, addresses_of_task) = watch::channel(Addresses::Listed([].into()));
        let (frontends, frontends_of_task) = watch::channel(Arc::default());
        let (failures_of_task, failures) = watch::channel(Failures::new());
        let (cleaned_of_task, cleaned) = watch::channel(conntrack::Progress::default());
        let (unmonitored_of_task, unmonitored) = watch::channel(Vec::new());
        let asked = Arc::clone(&liveness);
        let room = Room::default();
        let inputs = Inputs {
            checks: checks_of_task,
            addresses: addresses_of_task,
            is_healthy: Arc::new(move || asked.is_healthy()),
            room: room.clone(),
        };
        let _health = tokio::spawn(health::serve(inputs, failures_of_task));
        let _conntrack = tokio::spawn(conntrack::keep_clean(frontends_of_task, cleaned_of_task));
        let _monitoring =
            tokio::spawn(monitor::serve(Arc::new(monitor), at, room, unmonitored_of_task));
        let (failing_of_task, failing) = watch::channel(FailingServices::new());
        let _failures = tokio::spawn(failures::follow(maps, failing_of_task));
        let object_events = events.map(|events| {
            let (object_events, object_events_of_task) = watch::channel(Arc::default());
            let _announcing = tokio::spawn(kubernetes_events::serve(
                node.to_owned(),
                events,
                object_events_of_task,
            ));
            object_events
        });
        Self {
            liveness,
            checks,
            addresses,
            frontends,
            failures,
            cleaned,
            unmonitored,
            object_events,
            failing,
        }
    }

    /// Publishes the Events about problems with objects, and about drift of this node.
    pub(super) fn publish_object_events(&self, sync: &MapSync, node: &str, drift: &Drift) {
        let Some(sender) = &self.object_events else { return };
        let mut now = sync.object_events(node, &self.failures.borrow(), &self.failing.borrow());
        drift.add_events(node, SystemTime::now(), &mut now);
        let _ = publish(sender, Arc::new(now));
    }

    /// Passes on what the node waits for until it is ready, for `/readyz`.
    pub(super) fn set_waiting_for(&self, waiting_for: &[String]) {
        self.liveness.set_waiting_for(waiting_for);
    }

    /// Passes the loop's state on to the tasks.
    pub(super) fn follow(
        &self,
        sync: &mut MapSync,
        survey: &Survey,
        policy: &Policy,
        leaving: bool,
    ) {
        self.liveness.update(!sync.is_behind(), sync.is_filled(), leaving);
        if !sync.is_settled() {
            return;
        }
        if *self.checks.borrow() != *sync.health_checks() {
            let _ = self.checks.send_replace(sync.health_checks().clone());
        }
        let addresses = if policy.node_ports.includes_all() {
            Addresses::All
        } else {
            let serving = survey.addresses.iter().filter(|(_, serves)| **serves);
            Addresses::Listed(serving.map(|(address, _)| *address).collect())
        };
        let _ = publish(&self.addresses, addresses);
        if let Some(frontends) = sync.take_udp_frontends() {
            let _ = self.frontends.send_replace(Arc::new(frontends));
        }
    }

    /// Waits until the failures of health checks, or the Services that nobody reaches, change.
    pub(super) async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        tokio::select! {
            Ok(()) = self.failures.changed() => Ok(()),
            Ok(()) = self.failing.changed() => Ok(()),
            else => self.failures.changed().await,
        }
    }

    /// Returns the Services that nobody reaches, as rows of the status.
    pub(super) fn failing_services(&self) -> Vec<ReportStatus> {
        let row = |(name, failing): (&PortName, &Failing)| ReportStatus {
            level: "problem".to_owned(),
            flaw: ENDPOINTS_FAIL.to_owned(),
            subject: format!("Service {}/{}", name.namespace, name.service),
            field: format!("port {}", name.port),
            message: failing.message.clone(),
            since: unix_seconds(failing.since),
        };
        self.failing.borrow().iter().map(row).collect()
    }

    /// Returns the problems of the tasks, for people.
    pub(super) fn problems(&self) -> Vec<String> {
        let failures = self.failures.borrow();
        let health =
            failures.iter().map(|(service, failure)| format!("Service {service}: {failure}"));
        let conntrack = self.cleaned.borrow().problem.clone();
        let conntrack = conntrack.map(|problem| {
            format!(
                "cannot delete stale UDP entries of the kernel's connection tracking: {problem}"
            )
        });
        health.chain(conntrack).chain(self.unmonitored.borrow().iter().cloned()).collect()
    }
}
