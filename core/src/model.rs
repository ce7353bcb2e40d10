//! The objects of all sources, joined: Services with their endpoints, as plain data.
//!
//! Sources deliver [`Event`]s. The model keeps the objects, marks the Services that they concern,
//! and derives what those Services want ([`Desired`]). It derives nothing until every source has
//! delivered its first full list, since an incomplete one would take backends from Services that
//! have them.

pub mod claims;
pub mod desired;
mod endpoints;
pub mod event;
pub mod object;
pub mod policy;
pub mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use crate::policy::ExternalIps;
use claims::{Changed, Claims, Frontend};
use desired::{Claimed, Context, Joined, PortKey};
pub use desired::{Desired, DesiredBackend, DesiredPort, FrontendKind, HealthCheck, UdpPort};
use endpoints::Endpoints;
pub use event::{Change, Event};
use object::{Address, Endpoint, IpFamily, NodeSpec, Protocol, ServiceSpec, Slice, SliceKind};
pub use object::{ObjectName, SourceId};
use report::{Author, Flaw, Note, Notebook, Report, Reports, Subject};

/// The settings of the model.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The node's name, as in `nodeName` of endpoints.
    pub node: Option<Arc<str>>,
    /// The label `service.kubernetes.io/service-proxy-name` of the Services to serve, instead of
    /// those without it.
    pub proxy_name: Option<Box<str>>,
    /// The sources that must deliver their first full list.
    pub sources: BTreeSet<SourceId>,
    /// The node's primary addresses; if empty, those of its Node object.
    pub primary: BTreeSet<IpAddr>,
    /// The external IPs that are served.
    pub external_ips: ExternalIps,
    /// VIPs that something else on this node serves, and that get no frontend.
    pub leave: BTreeSet<IpAddr>,
}

/// Identifies an object with endpoints.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SliceKey {
    /// The source that delivered it.
    pub source: SourceId,
    /// Its kind.
    pub kind: SliceKind,
    /// Its name.
    pub name: ObjectName,
}

impl SliceKey {
    /// Returns the subject of reports about it.
    pub fn subject(&self) -> Subject {
        let kind = match self.kind {
            SliceKind::EndpointSlice => "EndpointSlice",
            SliceKind::Endpoints => "Endpoints",
        };
        Subject::object(kind, &self.name)
    }
}

/// The desired state of some or all Services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Whether these are all Services, so that one that is missing is gone.
    pub complete: bool,
    /// Service -> what it wants.
    pub services: BTreeMap<ObjectName, Desired>,
}

/// The objects of all sources, and what was derived from them.
#[derive(Clone, Debug)]
pub struct Model {
    settings: Settings,
    services: BTreeMap<ObjectName, BTreeMap<SourceId, ServiceSpec>>,
    slices: BTreeMap<ObjectName, BTreeMap<SliceKey, Slice>>,
    /// The Service that each slice belongs to; its label may change.
    owners: BTreeMap<SliceKey, ObjectName>,
    nodes: BTreeMap<SourceId, NodeSpec>,
    /// The addresses of the node's own devices, and whether node ports are served there.
    interfaces: BTreeMap<IpAddr, bool>,
    node_addresses: BTreeSet<IpAddr>,
    primary: BTreeSet<IpAddr>,
    zone: Option<Arc<str>>,
    left: BTreeSet<IpAddr>,
    claims: Claims,
    endpoints: Endpoints,
    health_checks: BTreeMap<ObjectName, HealthCheck>,
    health_ports: HealthPorts,
    udp_ports: BTreeMap<PortKey, UdpPort>,
    awaited: BTreeSet<SourceId>,
    begun: bool,
    dirty: BTreeSet<ObjectName>,
    reports: Reports,
    fresh: Vec<Report>,
}

impl Model {
    /// Creates an empty model.
    pub fn new(settings: Settings) -> Self {
        Self {
            awaited: settings.sources.clone(),
            primary: settings.primary.clone(),
            settings,
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            owners: BTreeMap::new(),
            nodes: BTreeMap::new(),
            interfaces: BTreeMap::new(),
            node_addresses: BTreeSet::new(),
            zone: None,
            left: BTreeSet::new(),
            claims: Claims::default(),
            endpoints: Endpoints::default(),
            health_checks: BTreeMap::new(),
            health_ports: HealthPorts::default(),
            udp_ports: BTreeMap::new(),
            begun: false,
            dirty: BTreeSet::new(),
            reports: Reports::default(),
            fresh: Vec::new(),
        }
    }

    /// Applies an event of a source.
    pub fn apply(&mut self, event: Event, now: SystemTime) {
        let Event { source, change } = event;
        match change {
            Change::Service(name, spec) => self.set_service(source, name, spec),
            Change::Slice(kind, name, slice) => {
                self.set_slice(SliceKey { source, kind, name }, slice, now);
            }
            Change::Node(name, spec) => {
                if self.settings.node.as_ref() == Some(&name) {
                    let _ = match spec {
                        Some(spec) => self.nodes.insert(source, spec),
                        None => self.nodes.remove(&source),
                    };
                    self.refresh_node();
                }
            }
            // What Services want does not depend on their networks.
            Change::ServiceCidr(..) => {}
            Change::Notes(subject, notes) => {
                let notes = notes.into_iter().map(|note| (subject.clone(), note)).collect();
                self.report(Author::Source(source, subject), notes, now);
            }
            Change::Synced => {
                let _ = self.awaited.remove(&source);
            }
        }
    }

    /// Sets the addresses of the node's own devices, each with whether node ports are served there.
    pub fn set_interfaces(&mut self, addresses: BTreeMap<IpAddr, bool>) {
        let serving = |addresses: &BTreeMap<IpAddr, bool>| -> BTreeSet<IpAddr> {
            addresses.iter().filter(|(_, serves)| **serves).map(|(address, _)| *address).collect()
        };
        let (before, after) = (serving(&self.interfaces), serving(&addresses));
        let changed = before.symmetric_difference(&after).copied().collect();
        self.interfaces = addresses;
        // An endpoint there may now be a node port, or no longer be one.
        self.mark_endpoints(&changed, false);
        self.refresh_node();
    }

    /// Marks the Services with an endpoint at one of these addresses, and with `hinted` also those
    /// with an endpoint that has hints for zones.
    fn mark_endpoints(&mut self, addresses: &BTreeSet<IpAddr>, hinted: bool) {
        if addresses.is_empty() && !hinted {
            return;
        }
        let concerned = |endpoint: &Endpoint| {
            hinted && !endpoint.zones.is_empty()
                || matches!(&endpoint.address, Address::Valid(address) if addresses.contains(address))
        };
        for (service, slices) in &self.slices {
            let mut parts = slices.values().flat_map(|slice| &slice.parts);
            if parts.any(|part| part.endpoints.iter().any(concerned)) {
                let _ = self.dirty.insert(service.clone());
            }
        }
    }

    /// Sets the VIPs that something else on this node serves, in addition to those of the settings.
    pub fn set_left(&mut self, vips: BTreeSet<IpAddr>) {
        let changed: BTreeSet<IpAddr> = self.left.symmetric_difference(&vips).copied().collect();
        if changed.is_empty() {
            return;
        }
        let concerned = |spec: &ServiceSpec| {
            [&spec.cluster_ips, &spec.ingress, &spec.external_ips].into_iter().flatten().any(
                |address| matches!(address, Address::Valid(address) if changed.contains(address)),
            )
        };
        let services = self.services.iter().filter(|(_, specs)| specs.values().any(concerned));
        self.dirty.extend(services.map(|(name, _)| name.clone()));
        self.left = vips;
    }

    /// Returns what the Services want that have changed since the last call; the first call returns
    /// all Services. Returns [`None`] if nothing has changed, or if not every source has delivered
    /// its first full list.
    pub fn take(&mut self, now: SystemTime) -> Option<Batch> {
        if !self.awaited.is_empty() || (self.begun && self.dirty.is_empty()) {
            return None;
        }
        let complete = !self.begun;
        self.begun = true;
        let changed = std::mem::take(&mut self.dirty);
        let mut affected = BTreeSet::new();
        for name in &changed {
            let (created, frontends, health_port) = self.claims_of(name);
            for port in self.health_ports.set(name, health_port) {
                affected.extend(self.node_port_owners(port).cloned());
            }
            let Changed { services, frontends } = self.claims.set(name, created, frontends);
            affected.extend(services);
            for frontend in frontends {
                affected.extend(self.leading_to(frontend));
                if frontend.0.is_unspecified() && frontend.2 == Protocol::Tcp {
                    affected.extend(self.health_ports.services(frontend.1).cloned());
                }
            }
        }
        affected.extend(changed);
        let services = affected
            .into_iter()
            .map(|name| {
                let desired = self.derive(&name, now);
                (name, desired)
            })
            .collect();
        Some(Batch { complete, services })
    }

    /// Returns the Services that have a TCP node port with this number.
    fn node_port_owners(&self, port: u16) -> impl Iterator<Item = &ObjectName> {
        let owner = move |family: IpFamily| {
            self.claims.winner(&(family.unspecified(), port, Protocol::Tcp))
        };
        IpFamily::ALL.into_iter().filter_map(owner)
    }

    /// Returns the Services with an endpoint that is this frontend.
    fn leading_to(&self, (vip, number, protocol): Frontend) -> BTreeSet<ObjectName> {
        if !vip.is_unspecified() {
            return self.endpoints.users((vip, number, protocol)).cloned().collect();
        }
        let serving =
            self.interfaces.iter().filter(|(_, serves)| **serves).map(|(address, _)| *address);
        serving
            .filter(|address| IpFamily::of(*address) == IpFamily::of(vip))
            .flat_map(|address| self.endpoints.users((address, number, protocol)))
            .cloned()
            .collect()
    }

    /// Returns the sources whose first full list is still missing.
    pub fn awaited(&self) -> &BTreeSet<SourceId> {
        &self.awaited
    }

    /// Returns everything that is wrong now.
    pub fn reports(&self) -> &Reports {
        &self.reports
    }

    /// Returns the reports that are new since the last call, for the log.
    pub fn take_fresh_reports(&mut self) -> Vec<Report> {
        std::mem::take(&mut self.fresh)
    }

    /// Replaces the plan's notes about a Service.
    pub fn set_plan_notes(&mut self, service: &ObjectName, notes: Vec<Note>, now: SystemTime) {
        let subject = Subject::object("Service", service);
        let notes = notes.into_iter().map(|note| (subject.clone(), note)).collect();
        self.report(Author::Plan(service.clone()), notes, now);
    }

    /// Returns the Services whose health load balancers check at this node, as far as
    /// [`Self::take`] has derived them.
    pub fn health_checks(&self) -> &BTreeMap<ObjectName, HealthCheck> {
        &self.health_checks
    }

    /// Returns the UDP ports of the Services that [`Self::take`] has derived.
    pub fn udp_ports(&self) -> &BTreeMap<PortKey, UdpPort> {
        &self.udp_ports
    }

    /// Returns this node's Node object.
    pub fn node(&self) -> Option<&NodeSpec> {
        self.nodes.values().next()
    }

    /// Returns the node's primary addresses, at most one of each family.
    pub fn primary_addresses(&self) -> &BTreeSet<IpAddr> {
        &self.primary
    }

    /// Returns a Service as its source delivered it.
    pub fn service(&self, name: &ObjectName) -> Option<&ServiceSpec> {
        self.services.get(name)?.values().next()
    }

    /// Returns the objects with a Service's endpoints.
    pub fn slices(&self, service: &ObjectName) -> impl Iterator<Item = (&SliceKey, &Slice)> {
        self.slices.get(service).into_iter().flatten()
    }

    fn set_service(&mut self, source: SourceId, name: ObjectName, spec: Option<ServiceSpec>) {
        let specs = self.services.entry(name.clone()).or_default();
        let _ = match spec {
            Some(spec) if specs.get(&source) == Some(&spec) => return,
            Some(spec) => specs.insert(source, spec),
            None => specs.remove(&source),
        };
        if specs.is_empty() {
            let _ = self.services.remove(&name);
        }
        let _ = self.dirty.insert(name);
    }

    fn set_slice(&mut self, key: SliceKey, slice: Option<Slice>, now: SystemTime) {
        // A watch selects by these labels at the API server; here they apply to every source.
        let slice = slice.filter(|Slice { labels, .. }| {
            labels.proxy_name == self.settings.proxy_name && !labels.headless && !labels.skip_mirror
        });
        let owner = slice
            .as_ref()
            .and_then(|slice| slice.service.clone())
            .map(|name| ObjectName { namespace: key.name.namespace.clone(), name });
        let notes = slice.as_ref().map(slice_notes).unwrap_or_default();
        let notes = notes.into_iter().map(|note| (key.subject(), note)).collect();
        self.report(Author::Slice(key.clone()), notes, now);
        let before = self.owners.get(&key).cloned();
        if before != owner
            && let Some(before) = before
        {
            if let Some(slices) = self.slices.get_mut(&before) {
                let _ = slices.remove(&key);
                if slices.is_empty() {
                    let _ = self.slices.remove(&before);
                }
            }
            let _ = self.owners.remove(&key);
            let _ = self.dirty.insert(before);
        }
        if let (Some(owner), Some(slice)) = (owner, slice) {
            let slices = self.slices.entry(owner.clone()).or_default();
            if slices.get(&key) != Some(&slice) {
                let _ = slices.insert(key.clone(), slice);
                let _ = self.owners.insert(key, owner.clone());
                let _ = self.dirty.insert(owner);
            }
        }
    }

    /// Updates what is known about the node, and marks the Services that it concerns.
    fn refresh_node(&mut self) {
        let node = self.nodes.values().next();
        let zone = node.and_then(|node| node.zone.clone());
        let mut primary = self.settings.primary.clone();
        if primary.is_empty() {
            let of_node = node.map_or(&[][..], |node| &node.addresses);
            let first = |family| of_node.iter().find(|address| IpFamily::of(**address) == family);
            primary.extend(IpFamily::ALL.into_iter().filter_map(first));
        }
        let addresses: BTreeSet<IpAddr> = self
            .nodes
            .values()
            .flat_map(|node| node.addresses.iter().copied())
            .chain(self.interfaces.keys().copied())
            .collect();

        let moved = zone != self.zone;
        let changed: BTreeSet<IpAddr> =
            self.node_addresses.symmetric_difference(&addresses).copied().collect();
        self.mark_endpoints(&changed, moved);
        if primary != self.primary {
            // Source ranges that contain the node also admit a VIP that the node holds.
            let restricts = |spec: &ServiceSpec| !spec.source_ranges.is_empty();
            let services = self.services.iter().filter(|(_, specs)| specs.values().any(restricts));
            self.dirty.extend(services.map(|(name, _)| name.clone()));
        }
        self.zone = zone;
        self.primary = primary;
        self.node_addresses = addresses;
    }

    fn context(&self) -> Context<'_> {
        Context {
            settings: &self.settings,
            left: &self.left,
            node_addresses: &self.node_addresses,
            primary: &self.primary,
            zone: self.zone.as_deref(),
            claims: &self.claims,
            interfaces: &self.interfaces,
        }
    }

    /// Returns when a Service was created, the frontends that it claims, and its health check port.
    fn claims_of(&self, name: &ObjectName) -> (Option<i64>, BTreeSet<Frontend>, Option<u16>) {
        let Some(spec) = self.service(name) else { return (None, BTreeSet::new(), None) };
        let claimed = desired::claimed(name, spec, &self.context(), &mut Notebook::default());
        let frontends = claimed.ports.iter().flat_map(|(key, port)| frontends(key, port)).collect();
        (spec.created, frontends, claimed.health_port.filter(|_| !claimed.ports.is_empty()))
    }

    /// Derives what a Service wants, and reports what is wrong with it.
    fn derive(&mut self, name: &ObjectName, now: SystemTime) -> Desired {
        let mut notes = Notebook::default();
        if self.services.get(name).is_some_and(|specs| specs.len() > 1) {
            notes.add(&Subject::object("Service", name), Flaw::DuplicateObject, || {
                (
                    String::new(),
                    "manifests and the API server both have it: the manifest takes precedence"
                        .into(),
                )
            });
        }
        let Claimed { mut ports, addresses, health_port } = match self.service(name) {
            Some(spec) => desired::claimed(name, spec, &self.context(), &mut notes),
            None => Claimed::default(),
        };
        let health_port = health_port.filter(|_| !ports.is_empty());
        self.arbitrate(name, &mut ports, &mut notes);
        self.note_health_ports(name, health_port, &ports, &mut notes);
        let Joined { ready_here, endpoints } = match self.slices.get(name) {
            Some(slices) if !ports.is_empty() => {
                desired::join(name, &mut ports, slices, &self.context(), &mut notes)
            }
            Some(_) | None => Joined::default(),
        };
        self.endpoints.set(name, &endpoints);
        let local = ready_here.values().map(BTreeSet::len).max().unwrap_or(0);
        let _ = match health_port {
            Some(port) => self.health_checks.insert(name.clone(), HealthCheck { port, local }),
            None => self.health_checks.remove(name),
        };
        self.note_udp_ports(name, &ports);
        self.report(Author::Service(name.clone()), notes.finish(), now);
        let created = self.service(name).and_then(|spec| spec.created);
        Desired { created, ports, addresses }
    }

    /// Stores a Service's UDP ports.
    fn note_udp_ports(&mut self, name: &ObjectName, ports: &BTreeMap<PortKey, DesiredPort>) {
        let known = self.udp_ports.range(PortKey::first(name)..);
        let gone: Vec<PortKey> =
            known.map(|(key, _)| key).take_while(|key| key.service == *name).cloned().collect();
        for key in gone {
            let _ = self.udp_ports.remove(&key);
        }
        for (key, port) in ports.iter().filter(|(key, _)| key.protocol == Protocol::Udp) {
            let udp_port = UdpPort {
                frontends: port.frontends.keys().copied().collect(),
                endpoints: port.backends.keys().copied().collect(),
            };
            let _ = self.udp_ports.insert(key.clone(), udp_port);
        }
    }

    /// Notes a health check port that is also a node port, since packets to it never reach the
    /// health check server.
    fn note_health_ports(
        &self,
        name: &ObjectName,
        health_port: Option<u16>,
        ports: &BTreeMap<PortKey, DesiredPort>,
        notes: &mut Notebook,
    ) {
        let subject = Subject::object("Service", name);
        if let Some(port) = health_port
            && let Some(owner) = self.node_port_owners(port).next()
        {
            notes.add(&subject, Flaw::HealthCheckShadowed, || {
                let what = format!(
                    "{port} is a node port of Service {owner}: health checks of load balancers there are not answered"
                );
                ("spec.healthCheckNodePort".into(), what)
            });
        }
        for (key, port) in ports.iter().filter(|(key, _)| key.protocol == Protocol::Tcp) {
            for (_, number) in port.frontends.keys().filter(|(vip, _)| vip.is_unspecified()) {
                for other in self.health_ports.services(*number) {
                    notes.add(&subject, Flaw::ShadowsHealthCheck, || {
                        let what = format!(
                            "node port {number} is the healthCheckNodePort of Service {other}: health checks of its load balancer are not answered there"
                        );
                        (key.field(), what)
                    });
                }
            }
        }
    }

    /// Removes the frontends that an older Service has.
    fn arbitrate(
        &self,
        name: &ObjectName,
        ports: &mut BTreeMap<PortKey, DesiredPort>,
        notes: &mut Notebook,
    ) {
        let subject = Subject::object("Service", name);
        for (key, port) in &mut *ports {
            for frontend in frontends(key, port).collect::<Vec<_>>() {
                let (address, number, protocol) = frontend;
                let what = || {
                    if address.is_unspecified() {
                        return format!(
                            "node port {number} {} {}",
                            protocol.word(),
                            key.family.word()
                        );
                    }
                    format!("{} {}", std::net::SocketAddr::from((address, number)), protocol.word())
                };
                match self.claims.winner(&frontend) {
                    Some(winner) if winner != name => {
                        notes.add(&subject, Flaw::ClaimLost, || {
                            (what(), format!("Service {winner} has it, because it is older or, at the same age, first by name: not served here"))
                        });
                        let _ = port.frontends.remove(&(address, number));
                    }
                    _ => {
                        for loser in self.claims.losers(&frontend) {
                            notes.add(&subject, Flaw::ClaimContested, || {
                                (
                                    what(),
                                    format!("Service {loser} claims it too and does not get it"),
                                )
                            });
                        }
                    }
                }
            }
        }
        ports.retain(|_, port| !port.frontends.is_empty());
    }

    fn report(&mut self, author: Author, notes: Vec<(Subject, Note)>, now: SystemTime) {
        self.fresh.extend(self.reports.set(author, notes, now));
    }
}

/// Returns what is wrong with a slice by itself.
fn slice_notes(slice: &Slice) -> Vec<Note> {
    let mut notes = Vec::new();
    if slice.service.is_none() {
        let field = "metadata.labels[kubernetes.io/service-name]";
        let what = "no label names its Service: left out";
        notes.push(Note::new(Flaw::NoServiceLabel, field, what));
    }
    if slice.surplus > 0 {
        let what = match slice.surplus {
            1 => "an endpoint has several addresses: only its first one is used".to_owned(),
            count => format!(
                "{count} endpoints have several addresses: only the first one of each is used"
            ),
        };
        notes.push(Note::new(Flaw::SurplusAddresses, "endpoints", what));
    }
    if let Err(word) = &slice.family {
        let what = format!("{word} addresses are not served: the slice is left out");
        notes.push(Note::new(Flaw::UnsupportedAddressType, "addressType", what));
    }
    notes
}

/// The ports at which Services want their health checks.
#[derive(Clone, Debug, Default)]
struct HealthPorts {
    services: BTreeMap<u16, BTreeSet<ObjectName>>,
    ports: BTreeMap<ObjectName, u16>,
}

impl HealthPorts {
    /// Replaces a Service's port. Returns the ports that it has now or had before, if they differ.
    fn set(&mut self, service: &ObjectName, port: Option<u16>) -> Vec<u16> {
        let before = self.ports.remove(service);
        if let Some(port) = port {
            let _ = self.ports.insert(service.clone(), port);
        }
        if before == port {
            return Vec::new();
        }
        if let Some(before) = before
            && let Some(services) = self.services.get_mut(&before)
        {
            let _ = services.remove(service);
            if services.is_empty() {
                let _ = self.services.remove(&before);
            }
        }
        if let Some(port) = port {
            let _ = self.services.entry(port).or_default().insert(service.clone());
        }
        before.into_iter().chain(port).collect()
    }

    /// Returns the Services that want a port.
    fn services(&self, port: u16) -> impl Iterator<Item = &ObjectName> {
        self.services.get(&port).into_iter().flatten()
    }
}

/// Returns the frontends of a port.
fn frontends(key: &PortKey, port: &DesiredPort) -> impl Iterator<Item = Frontend> {
    port.frontends.keys().map(|(vip, number)| (*vip, *number, key.protocol))
}

#[cfg(test)]
mod tests {
    use super::object::{PortSpec, SlicePart, SlicePort};
    use super::*;

    const DNS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 10));

    fn feed(model: &mut Model, change: Change) {
        model.apply(Event { source: SourceId::Kubernetes, change }, SystemTime::UNIX_EPOCH);
    }

    /// Returns a model with a UDP Service that has a node port and one terminating endpoint.
    fn dns() -> (Model, ObjectName) {
        let mut model =
            Model::new(Settings { sources: [SourceId::Kubernetes].into(), ..Settings::default() });
        let name = ObjectName::new("kube-system", "kube-dns");
        let port = PortSpec {
            number: 53,
            protocol: "UDP".into(),
            node_port: 30_053,
            ..PortSpec::default()
        };
        let spec = ServiceSpec {
            cluster_ips: vec![Address::Valid(DNS)],
            ports: vec![port],
            ..ServiceSpec::default()
        };
        feed(&mut model, Change::Service(name.clone(), Some(spec)));
        let endpoint = Endpoint {
            address: Address::Valid(IpAddr::from([10, 1, 0, 1])),
            ready: false,
            serving: true,
            terminating: true,
            node: None,
            zones: Box::default(),
            nodes: Box::default(),
        };
        let port = SlicePort { name: "".into(), number: Some(5353), protocol: "UDP".into() };
        let slice = Slice {
            service: Some(name.name.clone()),
            family: Ok(Some(IpFamily::V4)),
            labels: object::SliceLabels::default(),
            parts: vec![SlicePart { ports: vec![port], endpoints: vec![endpoint] }],
            surplus: 0,
            triggered: None,
        };
        feed(&mut model, Change::Slice(SliceKind::EndpointSlice, name.clone(), Some(slice)));
        feed(&mut model, Change::Synced);
        let _ = model.take(SystemTime::UNIX_EPOCH).expect("a first batch");
        (model, name)
    }

    #[test]
    fn udp_ports_tell_frontends_and_endpoints_until_the_service_goes() {
        let (mut model, name) = dns();
        let node_port = (IpFamily::V4.unspecified(), 30_053);
        let expected = UdpPort {
            frontends: [(DNS, 53), node_port].into(),
            endpoints: [(IpAddr::from([10, 1, 0, 1]), 5353)].into(),
        };
        assert_eq!(model.udp_ports().values().collect::<Vec<_>>(), [&expected]);
        feed(&mut model, Change::Service(name, None));
        let _ = model.take(SystemTime::UNIX_EPOCH).expect("a second batch");
        assert!(model.udp_ports().is_empty());
    }

    #[test]
    fn a_vip_that_is_left_alone_returns_when_nothing_else_serves_it() {
        let (mut model, name) = dns();
        let mut frontends = |left: &[IpAddr]| {
            model.set_left(left.iter().copied().collect());
            let batch = model.take(SystemTime::UNIX_EPOCH)?;
            let desired = batch.services.get(&name)?;
            Some(
                desired.ports.values().map(|port| port.frontends.len()).sum::<usize>()
                    + desired.addresses.len(),
            )
        };
        assert_eq!(frontends(&[DNS]), Some(1));
        assert_eq!(frontends(&[DNS, IpAddr::from([10, 96, 0, 99])]), None);
        assert_eq!(frontends(&[]), Some(3));
    }
}
