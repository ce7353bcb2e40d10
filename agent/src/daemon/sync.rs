//! Brings events into the maps: model, plan and reconciler, with what is known about each.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sluice_common::abi::frontend;
use sluice_common::{V4, V6};
use sluice_core::image::{
    Dataplane, EntryWrite, FamilyWrite, Image, ReadError, Reconciler, Stack, Write, diff,
};
use sluice_core::model::object::ObjectName;
use sluice_core::model::report::{Flaw, Level, Note, Report, Subject};
use sluice_core::model::{Event, HealthCheck, Model, SourceId};
use sluice_core::plan::{Plan, node_ports_of_bits};
use tokio::time::Instant;

use crate::daemon::audit::{self, Found};
use crate::daemon::endpoint_log::{EndpointLog, Endpoints};
use crate::daemon::failures::FailingServices;
use crate::daemon::health::Failures;
use crate::daemon::kubernetes_events::{self, ObjectEvents};
use crate::daemon::monitor::metrics::Metrics;
use crate::node::backoff::Backoff;
use crate::node::conntrack::UdpFrontends;
use crate::node::dataplane::{Digests, Kernel, Maps};
use crate::node::devices::own::Vips as RoutedVips;
use crate::node::difference::{self, State};
use crate::node::status::{Counts, ReportStatus, SyncStatus, unix_seconds};

/// The pauses between retries of failed writes.
const RETRY: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
/// After so many failures in a row, the maps are read again and only the difference is written.
const RESYNC_AFTER: u32 = 4;

/// How far the audit of the maps is.
#[derive(Debug, Default)]
struct Audit {
    /// The next step.
    step: usize,
    /// What the plan adds up to in each step.
    digests: Digests,
    /// The steps whose maps could not be read, and why.
    unreadable: BTreeMap<usize, String>,
}

/// Applies events to the maps.
#[derive(Debug)]
pub(super) struct MapSync {
    model: Model,
    plan: Plan,
    reconciler: Reconciler<Kernel>,
    node_addresses: Option<BTreeMap<IpAddr, bool>>,
    vips: Vips,
    /// Whether the maps hold an image.
    filled: bool,
    udp_changed: bool,
    /// The image's node ports when they were last taken.
    node_ports: Option<BTreeMap<u32, u64>>,
    failures: u32,
    failing: Option<String>,
    retry: Backoff,
    retry_at: Option<Instant>,
    last: Option<SyncStatus>,
    audit: Audit,
    endpoint_log: EndpointLog,
    /// The reports that have been logged.
    logged: BTreeSet<(Subject, Note)>,
    metrics: Arc<Metrics>,
}

impl MapSync {
    /// Takes over the maps and what they hold.
    pub(super) fn adopt(
        kernel: Kernel,
        model: Model,
        filled: bool,
        metrics: Arc<Metrics>,
    ) -> Result<Self, ReadError> {
        let image = kernel.read()?;
        let vips = Vips::of(&image);
        let sizes = kernel.maps().sizes();
        Ok(Self {
            model,
            plan: Plan::adopt(sizes, image),
            reconciler: Reconciler::new(kernel),
            node_addresses: None,
            vips,
            filled,
            udp_changed: false,
            node_ports: None,
            failures: 0,
            failing: None,
            retry: RETRY,
            retry_at: None,
            last: None,
            audit: Audit::default(),
            endpoint_log: EndpointLog::default(),
            logged: BTreeSet::new(),
            metrics,
        })
    }

    /// Takes in an event. [`Self::run`] acts on it.
    pub(super) fn on_event(&mut self, event: Event) {
        self.metrics.received(&event.change);
        self.model.apply(event, SystemTime::now());
    }

    /// Takes in the node's own addresses, with whether each serves node ports, and the VIPs that
    /// are left alone.
    pub(super) fn set_node(&mut self, addresses: &BTreeMap<IpAddr, bool>, left: &BTreeSet<IpAddr>) {
        self.model.set_left(left.clone());
        if self.node_addresses.as_ref() == Some(addresses) {
            return;
        }
        self.model.set_interfaces(addresses.clone());
        let writes = self.plan.set_node_addresses(addresses.clone());
        self.push(writes);
        self.udp_changed = true;
        self.node_addresses = Some(addresses.clone());
    }

    /// Plans what has changed, and writes it to the maps.
    pub(super) fn run(&mut self) {
        let begun = Instant::now();
        // The node's addresses must be known first: they decide which backends are local.
        let batch =
            if self.node_addresses.is_some() { self.model.take(SystemTime::now()) } else { None };
        let mut before: Vec<(ObjectName, Endpoints)> = Vec::new();
        if let Some(batch) = &batch {
            self.udp_changed = true;
            // The first full lists are one line as a whole.
            let changed = batch.services.keys().filter(|_| !batch.complete);
            before.extend(changed.map(|name| (name.clone(), self.plan.endpoints(name))));
            let update = self.plan.update(batch);
            for (service, notes) in update.notes {
                self.model.set_plan_notes(&service, notes, SystemTime::now());
            }
            self.push(update.writes);
        }
        let writes = self.reconciler.due();
        let waiting = self.retry_at.is_some_and(|at| at > Instant::now());
        if writes > 0 && !waiting {
            self.write(writes, begun);
        }
        for (service, before) in before {
            self.endpoint_log.changed(service, before, begun.elapsed());
        }
        if batch.is_some_and(|batch| batch.complete) && self.failing.is_none() {
            tracing::info!(
                writes,
                took_ms = begun.elapsed().as_millis(),
                "the maps are in step with the sources"
            );
        }
        self.filled |= self.model.awaited().is_empty()
            && self.node_addresses.is_some()
            && self.reconciler.due() == 0;
        if self.is_settled() {
            self.metrics.settled();
        }
    }

    fn write(&mut self, writes: usize, begun: Instant) {
        match self.reconciler.run() {
            Ok(()) => {
                if self.failing.take().is_some() {
                    tracing::info!("the maps can be written again");
                }
                self.failures = 0;
                self.retry.reset();
                self.retry_at = None;
                let took = begun.elapsed();
                self.metrics.wrote(took);
                let took_us = took.as_micros() as u64;
                tracing::debug!(writes, took_us, "the maps are in step");
                self.last =
                    Some(SyncStatus { at: unix_seconds(SystemTime::now()), took_us, writes });
            }
            Err(error) => {
                let text =
                    format!("cannot write the maps, which keep their last good state: {error}");
                if self.failing.as_ref() != Some(&text) {
                    tracing::warn!("{text}; trying again");
                }
                self.metrics.failed();
                self.failing = Some(text);
                self.failures += 1;
                self.retry_at = Some(Instant::now() + self.retry.failed());
                if self.failures.is_multiple_of(RESYNC_AFTER)
                    && let Err(error) = self.reconciler.resync(self.plan.image())
                {
                    tracing::warn!("{error}");
                }
            }
        }
    }

    /// Compares the next of the plan's maps with the plan, and repairs all of them if it differs.
    /// Returns what was found. Does nothing while writes wait: the maps are not as planned then.
    pub(super) fn audit(&mut self) -> Option<Vec<Found>> {
        if !self.filled || self.reconciler.due() != 0 {
            return None;
        }
        let step = self.audit.step;
        self.audit.step = (step + 1) % Kernel::AUDIT_STEPS;
        let mut found = Vec::new();
        match self.reconciler.dataplane.holds(step, self.plan.image(), &mut self.audit.digests) {
            Ok(is_held) => {
                let _ = self.audit.unreadable.remove(&step);
                if !is_held {
                    found = self.repair();
                }
            }
            Err(error) => drop(self.audit.unreadable.insert(step, error.to_string())),
        }
        let unreadable = self.audit.unreadable.iter();
        found.extend(unreadable.map(|(step, error)| {
            Found::new(format!("of audit step {step}"), "it cannot be compared", Err(error))
        }));
        Some(found)
    }

    /// Reads the maps, and writes what differs from the plan.
    fn repair(&mut self) -> Vec<Found> {
        let image = match self.reconciler.dataplane.read() {
            Ok(image) => image,
            Err(error) => return vec![Found::new("(all)", "they cannot be read", Err(error))],
        };
        let wanted = self.plan.image();
        let writes = diff(&image, wanted);
        let differences = difference::compare(
            &State { image: wanted.clone(), ..State::default() },
            &State { image, ..State::default() },
        );
        if writes.is_empty() {
            return Vec::new();
        }
        let count = writes.len();
        // These writes change no VIP of the plan.
        self.reconciler.push(writes);
        self.write(count, Instant::now());
        let found = audit::maps(&differences, self.failing.as_deref());
        if found.is_empty() {
            // A bit that outlives its frontend is no difference to people.
            let repair = self.failing.clone().map_or(Ok(()), Err);
            return vec![Found::new("addresses", "bits of removed frontends differ", repair)];
        }
        found
    }

    fn push(&mut self, writes: Vec<Write>) {
        for write in &writes {
            self.vips.follow(write);
        }
        self.audit.digests.forget();
        self.reconciler.push(writes);
    }

    /// Returns the maps.
    pub(super) fn maps(&self) -> &Maps {
        self.reconciler.dataplane.maps()
    }

    /// Returns when failed writes are to be retried.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Returns the VIPs, if they have changed since the last call.
    pub(super) fn take_vips(&mut self) -> Option<Arc<RoutedVips>> {
        std::mem::take(&mut self.vips.changed).then(|| Arc::new(self.vips.routed()))
    }

    /// Whether the maps hold an image, so that programs may use them.
    pub(super) fn is_filled(&self) -> bool {
        self.filled
    }

    /// Whether writes wait to be made. A source that says nothing leaves nothing waiting.
    pub(super) fn is_behind(&self) -> bool {
        self.reconciler.due() != 0
    }

    /// Whether the maps hold what the sources say.
    pub(super) fn is_settled(&self) -> bool {
        // Before the node's addresses are known, what the sources say is not planned.
        self.model.awaited().is_empty()
            && self.node_addresses.is_some()
            && self.filled
            && self.reconciler.due() == 0
    }

    /// Returns the sources whose first full list is missing.
    pub(super) fn awaited(&self) -> BTreeSet<SourceId> {
        self.model.awaited().clone()
    }

    /// Returns the health checks of Services.
    pub(super) fn health_checks(&self) -> &BTreeMap<ObjectName, HealthCheck> {
        self.model.health_checks()
    }

    /// Returns where the kernel's connection tracking may send UDP flows, if Services or the node
    /// have changed since the last call.
    pub(super) fn take_udp_frontends(&mut self) -> Option<UdpFrontends> {
        std::mem::take(&mut self.udp_changed).then(|| self.udp_frontends())
    }

    fn udp_frontends(&self) -> UdpFrontends {
        let mut found = UdpFrontends {
            node_addresses: self
                .node_addresses
                .iter()
                .flatten()
                .map(|(address, _)| *address)
                .collect(),
            ..UdpFrontends::default()
        };
        for port in self.model.udp_ports().values() {
            for (vip, number) in &port.frontends {
                let serving = if vip.is_unspecified() {
                    found.node_ports.entry(*number).or_default()
                } else {
                    found.vips.entry((*vip, *number)).or_default()
                };
                serving.extend(&port.endpoints);
            }
        }
        found
    }

    /// Returns all node ports, if they have changed since the last call.
    pub(super) fn take_node_ports(&mut self) -> Option<BTreeSet<u16>> {
        let words = &self.plan.image().node_ports;
        if self.node_ports.as_ref() == Some(words) {
            return None;
        }
        self.node_ports = Some(words.clone());
        Some(node_ports_of_bits(words).collect())
    }

    /// Returns how much the maps should hold.
    pub(super) fn counts(&self) -> Counts {
        let image = self.plan.image();
        Counts {
            frontends: frontends::<V4>(image) + frontends::<V6>(image),
            service_ports: image.names.len(),
            backends: serving::<V4>(image) + serving::<V6>(image),
        }
    }

    /// Returns the reports for the status.
    pub(super) fn reports(&self) -> Vec<ReportStatus> {
        let status = |report: &sluice_core::model::report::Report| ReportStatus {
            level: match report.note.flaw.level() {
                Level::Problem => "problem",
                Level::Notice => "notice",
            }
            .to_owned(),
            flaw: report.note.flaw.word().to_owned(),
            subject: report.subject.to_string(),
            field: report.note.field.clone(),
            message: report.note.message.clone(),
            since: unix_seconds(report.since),
        };
        self.model.reports().iter().map(status).collect()
    }

    /// Returns how many objects were refused something because a map is full.
    pub(super) fn refused_for_room(&self) -> usize {
        let refused = self.model.reports().iter().filter(|report| report.note.flaw == Flaw::NoRoom);
        refused.map(|report| &report.subject).collect::<BTreeSet<_>>().len()
    }

    /// Returns the Kubernetes Events to write, including those about failed health checks and about
    /// Services that nobody reaches.
    pub(super) fn object_events(
        &self,
        node: &str,
        failures: &Failures,
        failing: &FailingServices,
    ) -> ObjectEvents {
        kubernetes_events::gather(node, self.model.reports().iter(), failures, failing)
    }

    /// Logs the Services whose endpoints have changed since the last call.
    pub(super) fn log_endpoints(&mut self) {
        let plan = &self.plan;
        self.endpoint_log.flush(|service| plan.endpoints(service));
    }

    /// Logs each report once, when it appears and when it is gone. A source logs itself when it
    /// fails.
    pub(super) fn log_reports(&mut self) {
        let is_logged = |report: &Report| report.note.flaw != Flaw::Unreachable;
        for report in self.model.take_fresh_reports().into_iter().filter(is_logged) {
            let key = (report.subject, report.note);
            if self.logged.insert(key.clone()) {
                log_report(&key, true);
            }
        }
        let present: BTreeSet<(&Subject, &Note)> =
            self.model.reports().iter().map(|report| (&report.subject, &report.note)).collect();
        self.logged.retain(|key| {
            let stays = present.contains(&(&key.0, &key.1));
            if !stays {
                log_report(key, false);
            }
            stays
        });
    }

    /// Returns the last change of the maps.
    pub(super) fn last(&self) -> Option<SyncStatus> {
        self.last
    }

    /// Returns why writes fail, if they do.
    pub(super) fn failing(&self) -> Option<String> {
        self.failing.clone()
    }
}

/// Logs that a report has appeared, or that it is gone. A notice does not affect traffic, so it is
/// only in `sluice status` and in verbose logs.
fn log_report((subject, Note { field, flaw, message }): &(Subject, Note), appears: bool) {
    let (object, flaw, level) = (subject, flaw.word(), flaw.level());
    match (level, appears) {
        (Level::Notice, true) => tracing::debug!(%object, flaw, field, "{message}"),
        (Level::Notice, false) => tracing::debug!(%object, flaw, field, "no longer: {message}"),
        (Level::Problem, true) => tracing::warn!(%object, flaw, field, "{message}"),
        (Level::Problem, false) => tracing::info!(%object, flaw, field, "no longer: {message}"),
    }
}

fn frontends<F: Stack>(image: &Image) -> usize {
    F::of(image).services.values().filter(|service| service.kind != frontend::ADDRESS).count()
}

fn serving<F: Stack>(image: &Image) -> usize {
    F::of(image).backends.values().filter(|found| found.is_serving()).count()
}

/// All VIPs with their frontends. They follow the writes, so the work is proportional to the
/// change.
#[derive(Debug, Default)]
struct Vips {
    uses: BTreeMap<IpAddr, Uses>,
    changed: bool,
}

/// The frontends of a VIP.
#[derive(Debug, Default)]
struct Uses {
    count: usize,
    /// Whether the VIP is, or was, a ClusterIP.
    is_cluster_ip: bool,
}

impl Vips {
    fn of(image: &Image) -> Self {
        let mut vips = Self { changed: true, ..Self::default() };
        image
            .v4
            .services
            .iter()
            .for_each(|(key, service)| vips.add(V4::ip(key.address), service.kind));
        image
            .v6
            .services
            .iter()
            .for_each(|(key, service)| vips.add(V6::ip(key.address), service.kind));
        vips
    }

    fn follow(&mut self, write: &Write) {
        if let Write::V4(write) = write {
            self.follow_family::<V4>(write);
        } else if let Write::V6(write) = write {
            self.follow_family::<V6>(write);
        }
    }

    fn follow_family<F: Stack>(&mut self, write: &FamilyWrite<F>) {
        if let FamilyWrite::Services(EntryWrite::Insert { key, value }) = write {
            self.add(F::ip(key.address), value.kind);
        } else if let FamilyWrite::Services(EntryWrite::Remove { key }) = write {
            self.remove(F::ip(key.address));
        }
    }

    /// Returns the VIPs by the kind of route that they need.
    fn routed(&self) -> RoutedVips {
        let mut routed = RoutedVips::default();
        for (vip, uses) in &self.uses {
            let of_kind =
                if uses.is_cluster_ip { &mut routed.cluster } else { &mut routed.external };
            let _ = of_kind.insert(*vip);
        }
        routed
    }

    fn add(&mut self, vip: IpAddr, kind: u32) {
        // A node port has no VIP.
        if vip.is_unspecified() {
            return;
        }
        let uses = self.uses.entry(vip).or_default();
        uses.count += 1;
        let is_cluster_ip =
            uses.is_cluster_ip || [frontend::CLUSTER_IP, frontend::ADDRESS].contains(&kind);
        self.changed |= uses.count == 1 || uses.is_cluster_ip != is_cluster_ip;
        uses.is_cluster_ip = is_cluster_ip;
    }

    fn remove(&mut self, vip: IpAddr) {
        if let Some(uses) = self.uses.get_mut(&vip) {
            uses.count -= 1;
            if uses.count == 0 {
                let _ = self.uses.remove(&vip);
                self.changed = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use sluice_common::abi::{Service, ServiceKey};

    use super::*;

    fn key(port: u16) -> ServiceKey<sluice_common::abi::Ipv4Address> {
        let address = std::net::Ipv4Addr::new(10, 96, 0, 1).into();
        ServiceKey { address, port, protocol: 6, reserved: 0 }
    }

    fn insert(port: u16, kind: u32) -> Write {
        let value = Service { service_port: 1, kind };
        Write::V4(FamilyWrite::Services(EntryWrite::Insert { key: key(port), value }))
    }

    fn remove(port: u16) -> Write {
        Write::V4(FamilyWrite::Services(EntryWrite::Remove { key: key(port) }))
    }

    #[test]
    fn a_vip_with_a_cluster_ips_frontend_is_a_cluster_ip() {
        let mut vips = Vips::default();
        let follow = |vips: &mut Vips, port, kind| {
            vips.follow(&insert(port, kind));
            let RoutedVips { cluster, external } = vips.routed();
            (cluster.len(), external.len(), std::mem::take(&mut vips.changed))
        };
        assert_eq!(follow(&mut vips, 80, frontend::EXTERNAL_IP), (0, 1, true));
        assert_eq!(follow(&mut vips, 443, frontend::LOAD_BALANCER), (0, 1, false));
        assert_eq!(follow(&mut vips, 53, frontend::CLUSTER_IP), (1, 0, true));
    }

    #[test]
    fn a_vip_goes_with_its_last_frontend() {
        let mut vips = Vips::default();
        for port in [80, 443] {
            vips.follow(&insert(port, 1));
        }
        assert_eq!((vips.uses.len(), std::mem::take(&mut vips.changed)), (1, true));
        vips.follow(&remove(80));
        assert!(!vips.changed);
        vips.follow(&remove(443));
        assert!(vips.changed && vips.uses.is_empty());
    }
}
