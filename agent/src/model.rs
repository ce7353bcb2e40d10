//! What exists, joined: Services with their endpoints, as plain data.
//!
//! Sources deliver [`Event`]s; the model keeps the objects, notes which Services they concern,
//! and derives what those Services want ([`Desired`]). Nothing is derived until every
//! source has delivered its first full list, since half a world would take backends
//! from services that have them.

pub mod claims;
pub mod desired;
pub mod object;
pub mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use claims::{Claims, Frontend};
use desired::{Context, PortKey};
pub use desired::{Desired, DesiredBackend, DesiredPort, FrontendKind};
pub use object::{Change, Event, ObjectName, SourceId};
use object::{NodeSpec, ServiceSpec, Slice, SliceKind};
use report::{Author, Flaw, Note, Notebook, Report, Reports, Subject};

/// How the agent was started.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The node's name, as in `nodeName` of endpoints.
    pub node: Option<Arc<str>>,
    /// Serve Services with this label `service.kubernetes.io/service-proxy-name`, instead of those without.
    pub proxy_name: Option<Box<str>>,
    /// The sources that must deliver their first full list.
    pub sources: BTreeSet<SourceId>,
}

/// Identifies an object with endpoints.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SliceKey {
    /// Who delivered it.
    pub source: SourceId,
    /// Its kind.
    pub kind: SliceKind,
    /// Its name.
    pub name: ObjectName,
}

impl SliceKey {
    /// What reports about it name.
    pub fn subject(&self) -> Subject {
        let kind = match self.kind {
            SliceKind::EndpointSlice => "EndpointSlice",
            SliceKind::Endpoints => "Endpoints",
        };
        Subject::object(kind, &self.name)
    }
}

/// What some Services want now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// These are all Services: one that is missing is gone.
    pub complete: bool,
    /// Service -> what it wants.
    pub services: BTreeMap<ObjectName, Desired>,
}

/// What exists.
#[derive(Clone, Debug)]
pub struct Model {
    settings: Settings,
    services: BTreeMap<ObjectName, BTreeMap<SourceId, ServiceSpec>>,
    slices: BTreeMap<ObjectName, BTreeMap<SliceKey, Slice>>,
    /// To which Service a slice belongs: its label may change.
    owners: BTreeMap<SliceKey, ObjectName>,
    nodes: BTreeMap<SourceId, NodeSpec>,
    interfaces: BTreeSet<IpAddr>,
    node_addresses: BTreeSet<IpAddr>,
    claims: Claims,
    awaited: BTreeSet<SourceId>,
    begun: bool,
    dirty: BTreeSet<ObjectName>,
    reports: Reports,
    fresh: Vec<Report>,
}

impl Model {
    /// An empty model.
    pub fn new(settings: Settings) -> Self {
        Self {
            awaited: settings.sources.clone(),
            settings,
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            owners: BTreeMap::new(),
            nodes: BTreeMap::new(),
            interfaces: BTreeSet::new(),
            node_addresses: BTreeSet::new(),
            claims: Claims::default(),
            begun: false,
            dirty: BTreeSet::new(),
            reports: Reports::default(),
            fresh: Vec::new(),
        }
    }

    /// Takes in what a source has learnt.
    pub fn apply(&mut self, event: Event, now: SystemTime) {
        let Event { source, change } = event;
        match change {
            Change::Service(name, spec) => self.set_service(source, name, spec),
            Change::Slice(kind, name, slice) => self.set_slice(SliceKey { source, kind, name }, slice, now),
            Change::Node(name, spec) => {
                if self.settings.node.as_ref() == Some(&name) {
                    let _ = match spec {
                        Some(spec) => self.nodes.insert(source, spec),
                        None => self.nodes.remove(&source),
                    };
                    self.refresh_node_addresses();
                }
            }
            // What Services want does not depend on it.
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

    /// Says which addresses the node's own devices have.
    pub fn set_interfaces(&mut self, addresses: BTreeSet<IpAddr>) {
        self.interfaces = addresses;
        self.refresh_node_addresses();
    }

    /// What the Services want that changed since the last call: the first time, all of them.
    /// [`None`] if nothing changed, or not every source has delivered its first full list.
    pub fn take(&mut self, now: SystemTime) -> Option<Batch> {
        if !self.awaited.is_empty() || (self.begun && self.dirty.is_empty()) {
            return None;
        }
        let complete = !self.begun;
        self.begun = true;
        let changed = std::mem::take(&mut self.dirty);
        let mut affected = BTreeSet::new();
        for name in &changed {
            let (created, frontends) = self.claims_of(name);
            affected.extend(self.claims.set(name, created, frontends));
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

    /// The sources whose first full list is still missing.
    pub fn awaited(&self) -> &BTreeSet<SourceId> {
        &self.awaited
    }

    /// All that is wrong now.
    pub fn reports(&self) -> &Reports {
        &self.reports
    }

    /// The reports that were not there at the last call: for the log.
    pub fn take_fresh_reports(&mut self) -> Vec<Report> {
        std::mem::take(&mut self.fresh)
    }

    /// Replaces what the plan says about a Service.
    pub fn set_plan_notes(&mut self, service: &ObjectName, notes: Vec<Note>, now: SystemTime) {
        let subject = Subject::object("Service", service);
        let notes = notes.into_iter().map(|note| (subject.clone(), note)).collect();
        self.report(Author::Plan(service.clone()), notes, now);
    }

    /// A Service as its source gave it.
    pub fn service(&self, name: &ObjectName) -> Option<&ServiceSpec> {
        self.services.get(name)?.values().next()
    }

    /// The objects with a Service's endpoints.
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
        let owner = slice
            .as_ref()
            .and_then(|slice| slice.service.clone())
            .map(|name| ObjectName { namespace: key.name.namespace.clone(), name });
        let mut notes = Vec::new();
        if let Some(slice) = &slice {
            if owner.is_none() {
                let what = "no label names its Service: left out";
                notes.push((
                    key.subject(),
                    Note::new(Flaw::NoServiceLabel, "metadata.labels[kubernetes.io/service-name]", what),
                ));
            }
            if let Err(word) = &slice.family {
                let what = format!("{word} addresses are not served: the slice is left out");
                notes.push((key.subject(), Note::new(Flaw::UnsupportedAddressType, "addressType", what)));
            }
        }
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

    /// Brings the node's addresses up to date, and marks the Services with endpoints there.
    fn refresh_node_addresses(&mut self) {
        let addresses: BTreeSet<IpAddr> = self
            .nodes
            .values()
            .flat_map(|node| node.addresses.iter().copied())
            .chain(self.interfaces.iter().copied())
            .collect();
        let changed: BTreeSet<IpAddr> =
            self.node_addresses.symmetric_difference(&addresses).copied().collect();
        if changed.is_empty() {
            return;
        }
        for (service, slices) in &self.slices {
            let concerned = slices
                .values()
                .flat_map(|slice| &slice.parts)
                .flat_map(|part| &part.endpoints)
                .any(|endpoint| matches!(&endpoint.address, object::Address::Valid(address) if changed.contains(address)));
            if concerned {
                let _ = self.dirty.insert(service.clone());
            }
        }
        self.node_addresses = addresses;
    }

    fn claims_of(&self, name: &ObjectName) -> (Option<i64>, BTreeSet<Frontend>) {
        let Some(spec) = self.service(name) else { return (None, BTreeSet::new()) };
        let ports = desired::claimed(name, spec, &self.settings, &mut Notebook::default());
        let frontends = ports.iter().flat_map(|(key, port)| frontends(key, port)).collect();
        (spec.created, frontends)
    }

    /// What a Service wants, and what is wrong with it.
    fn derive(&mut self, name: &ObjectName, now: SystemTime) -> Desired {
        let mut notes = Notebook::default();
        if self.services.get(name).is_some_and(|specs| specs.len() > 1) {
            notes.add(&Subject::object("Service", name), Flaw::DuplicateObject, || {
                (String::new(), "manifests and the API server both have it: the manifest counts".into())
            });
        }
        let mut ports = match self.service(name) {
            Some(spec) => desired::claimed(name, spec, &self.settings, &mut notes),
            None => BTreeMap::new(),
        };
        self.arbitrate(name, &mut ports, &mut notes);
        if let (false, Some(slices)) = (ports.is_empty(), self.slices.get(name)) {
            let context = Context { settings: &self.settings, node_addresses: &self.node_addresses };
            desired::join(&mut ports, slices, &context, &mut notes);
        }
        self.report(Author::Service(name.clone()), notes.finish(), now);
        Desired { ports }
    }

    /// Takes away the frontends that an older Service has.
    fn arbitrate(&self, name: &ObjectName, ports: &mut BTreeMap<PortKey, DesiredPort>, notes: &mut Notebook) {
        let subject = Subject::object("Service", name);
        for (key, port) in &mut *ports {
            for frontend in frontends(key, port).collect::<Vec<_>>() {
                let (address, number, protocol) = frontend;
                let what =
                    || format!("{} {}", std::net::SocketAddr::from((address, number)), protocol.word());
                match self.claims.winner(&frontend) {
                    Some(winner) if winner != name => {
                        notes.add(&subject, Flaw::ClaimLost, || {
                            (what(), format!("Service {winner} has it, being older or else first by name: not served here"))
                        });
                        let _ = port.frontends.remove(&address);
                    }
                    _ => {
                        for loser in self.claims.losers(&frontend) {
                            notes.add(&subject, Flaw::ClaimContested, || {
                                (what(), format!("Service {loser} claims it too, in vain"))
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

/// The frontends of a port.
fn frontends(key: &PortKey, port: &DesiredPort) -> impl Iterator<Item = Frontend> {
    port.frontends.keys().map(|vip| (*vip, port.number, key.protocol))
}
