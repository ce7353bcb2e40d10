//! A world made of manifests: it needs no kernel, cluster or privileges.
//!
//! Model and plan make the image from the objects. The node around it is assumed: one edge, one
//! uplink with a default route, programs attached to both, and the node's addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use sluice_common::abi::{self, device, device_flags};
use sluice_common::{V4, V6};
use sluice_core::cluster::{Adopted, Cluster};
use sluice_core::image::{Image, Stack};
use sluice_core::model::report::{Flaw, Report, Subject};
use sluice_core::model::{self, Change, Event, Model, ObjectName, SourceId};
use sluice_core::plan::{Plan, Sizes};
use sluice_core::policy::{DetectLocal, Policy};

use super::objects::Objects;
use super::question::{Client, Question, Way};
use super::story::unknown_node;
use super::world::{Around, LOOPBACK, NamedDevice, Routing, World};
use crate::daemon::source::manifests::Folder;

/// The ifindex of the assumed edge.
const EDGE: u32 = 2;
/// The ifindex of the assumed uplink.
const UPLINK: u32 = 3;

/// The options with which the agent of the assumed node is started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A directory of manifests, or one file.
    pub path: PathBuf,
    /// The node's name, as in `nodeName` of endpoints; the default is the only Node.
    pub node: Option<Arc<str>>,
    /// As `sluice agent --proxy-name`.
    pub proxy_name: Option<String>,
    /// The policy for traffic.
    pub policy: Policy,
    /// One of [`abi::socket_path`].
    pub socket_path: u32,
}

impl Options {
    /// Takes the only Node of the manifests if no other is requested.
    fn choose_node(&mut self, changes: &[Change]) -> Result<(), ReadError> {
        let nodes: Vec<Arc<str>> = changes
            .iter()
            .filter_map(|change| {
                if let Change::Node(name, Some(_)) = change { Some(name.clone()) } else { None }
            })
            .collect();
        match (&self.node, &nodes[..]) {
            (None, [only]) => self.node = Some(only.clone()),
            (Some(name), [_, ..])
                if !nodes.contains(name) && self.policy.node_addresses.is_empty() =>
            {
                return Err(ReadError::NoNode(name.clone(), nodes.join(", ")));
            }
            (None | Some(_), _) => {}
        }
        Ok(())
    }
}

/// Manifests, with the model and the plan of them.
#[derive(Clone, Debug)]
pub struct Manifests {
    options: Options,
    cluster: Cluster,
    model: Model,
    plan: Plan,
    /// The number of objects that were read.
    objects: usize,
}

impl Manifests {
    /// Reads manifests and plans the maps.
    ///
    /// # Errors
    ///
    /// Fails if the directory or file cannot be read, or when it has Nodes but not the requested
    /// one, and the policy does not give its addresses. Problems with objects are in the model's
    /// reports.
    pub fn read(mut options: Options) -> Result<Self, ReadError> {
        let changes = Folder::new(options.path.clone()).scan()?;
        options.choose_node(&changes)?;
        Ok(Self::of(options, changes))
    }

    /// Plans the maps of objects that have been read.
    #[must_use]
    pub fn of(options: Options, changes: Vec<Change>) -> Self {
        let settings = model::Settings {
            node: options.node.clone(),
            proxy_name: options.proxy_name.clone().map(Into::into),
            sources: [SourceId::Manifests].into(),
            primary: first_of_each_family(&options.policy.node_addresses),
            external_ips: options.policy.external_ips.clone(),
            leave: options.policy.leave.clone(),
        };
        let cluster = Cluster::new(options.node.as_deref().unwrap_or_default(), Adopted::default());
        let plan = Plan::new(Sizes::default());
        let mut manifests =
            Self { options, cluster, model: Model::new(settings), plan, objects: 0 };
        manifests.feed(changes);
        manifests
    }

    /// Returns the number of objects that were read, good and bad.
    #[must_use]
    pub fn objects(&self) -> usize {
        self.objects
    }

    /// Returns what could not be read at all, so that its effect is unknown.
    pub fn unread(&self) -> impl Iterator<Item = &Report> {
        self.model.reports().iter().filter(|report| is_unread(report.note.flaw))
    }

    /// Applies the objects of another directory or file. They replace those that exist already.
    ///
    /// # Errors
    ///
    /// Fails if it, or a part of it, cannot be read, or it is empty.
    pub fn apply(&mut self, path: &Path) -> Result<(), ApplyError> {
        let changes = whole(path)?;
        self.feed(changes);
        Ok(())
    }

    fn feed(&mut self, changes: Vec<Change>) {
        // Nothing depends on the time.
        let now = SystemTime::UNIX_EPOCH;
        self.objects += changes.iter().filter(|change| is_object(change)).count();
        for change in changes.into_iter().chain([Change::Synced]) {
            let event = Event { source: SourceId::Manifests, change };
            let _ = self.cluster.apply(&event);
            self.model.apply(event, now);
        }
        let _ = self.cluster.complete();
        let addresses = self.addresses();
        let primary = first_of_each_family(&addresses);
        let serves = |address: &IpAddr| {
            self.options.policy.node_ports.includes(*address, primary.contains(address))
        };
        let loopback = [IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])];
        let local: BTreeMap<IpAddr, bool> =
            addresses.iter().map(|address| (*address, serves(address))).collect();
        self.model.set_interfaces(local.clone());
        let local = local.into_iter().chain(
            loopback.into_iter().filter(|address| serves(address)).map(|address| (address, true)),
        );
        let _ = self.plan.set_node_addresses(local.collect());
        if let Some(batch) = self.model.take(now) {
            for (service, notes) in self.plan.update(&batch).notes {
                self.model.set_plan_notes(&service, notes, now);
            }
        }
    }

    /// Returns the name of the assumed node, if there is one.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.options.node.as_deref()
    }

    /// Returns the planned maps.
    #[must_use]
    pub fn image(&self) -> &Image {
        self.plan.image()
    }

    /// Returns the model of the objects.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Returns the node's addresses: those of the policy, or else those of the Node object.
    fn addresses(&self) -> Vec<IpAddr> {
        if !self.options.policy.node_addresses.is_empty() {
            return self.options.policy.node_addresses.clone();
        }
        self.cluster.node_addresses()
    }

    /// Returns the world of a question, and its routing.
    #[must_use]
    pub fn world(&self, question: &Question) -> (World, Supposed) {
        let addresses = self.addresses();
        let policy = &self.options.policy;
        let local_pods = match (&policy.detect_local, &question.device) {
            (DetectLocal::BridgeInterface(name), Some(device)) => device == name,
            (DetectLocal::InterfaceNamePrefix(prefix), Some(device)) => device.starts_with(prefix),
            _ => true,
        };
        let primary = first_of_each_family(&addresses);
        let primary = |v4: bool| {
            let known = primary.iter().find(|address| address.is_ipv4() == v4);
            known.copied().unwrap_or(unknown_node(v4))
        };
        let entry = |role, flags| abi::Device {
            role,
            link_header: 14,
            mtu: 1500,
            masquerade_v4: V4::address(primary(true)).unwrap_or_default(),
            masquerade_v6: V6::address(primary(false)).unwrap_or_default(),
            flags,
            ..abi::Device::default()
        };
        let name = |here: bool| question.device.clone().filter(|_| here).unwrap_or_default();
        let met_on = comes_in_by(question);
        let edge = NamedDevice {
            name: name(met_on == EDGE),
            entry: entry(device::EDGE, if local_pods { device_flags::LOCAL_PODS } else { 0 }),
        };
        let uplink = NamedDevice { name: name(met_on == UPLINK), entry: entry(device::UPLINK, 0) };
        let loopback = NamedDevice { name: "lo".to_owned(), entry: entry(device::LOOPBACK, 0) };
        let settings =
            abi::Settings { socket_path: self.options.socket_path, ..abi::Settings::default() };
        // The agent reports networks for which there is no room.
        let (programmed, _) = self.cluster.programmed(policy, settings);
        let image = self.plan.image().clone();
        let mut local = local_backends::<V4>(&image);
        local.extend(local_backends::<V6>(&image));
        if question.from == Client::Pod {
            let _ = local.insert(question.source.ip());
        }
        let world = World {
            v4: around::<V4>(programmed.v4),
            v6: around::<V6>(programmed.v6),
            image,
            settings: programmed.settings,
            devices: BTreeMap::from([(LOOPBACK, loopback), (EDGE, edge), (UPLINK, uplink)]),
            now: 0,
            now_ms: 0,
            rejects: BTreeMap::new(),
            left: policy.leave.clone(),
            objects: Objects::of(self.model.clone()),
        };
        // The operator lists them because a device has them.
        let own = addresses.into_iter().chain(policy.leave.iter().copied()).collect();
        (world, Supposed { own, local })
    }
}

/// Manifests cannot be used for a node.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// They cannot be read.
    #[error(transparent)]
    Unreadable(#[from] io::Error),
    /// There are Nodes, but not the requested one.
    #[error("its Nodes are {1}: there is no {0}; name one of them, or give --node-addresses too")]
    NoNode(Arc<str>, String),
}

/// Manifests cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// They cannot be read.
    #[error("cannot read it: {0}")]
    Unreadable(#[from] io::Error),
    /// A part of them cannot be read, so the answer would be for other manifests.
    #[error("{0}: {1}")]
    Broken(Subject, String),
    /// They are empty.
    #[error("there is no object in it")]
    Empty,
    /// The maps do not hold enough of a Service to change it.
    #[error(
        "{0} is there without {1}: the maps do not hold objects, so give the Service and all of its EndpointSlices, \
         or ask by --manifests"
    )]
    Half(ObjectName, &'static str),
}

impl World {
    /// Applies manifests to the maps. They replace whole Services, with all their endpoints.
    ///
    /// # Errors
    ///
    /// Fails if they cannot be read, or have only a part of a Service.
    pub fn apply(&mut self, path: &Path, sizes: Sizes, node: &str) -> Result<(), ApplyError> {
        let changes = whole(path)?;
        let (mut services, mut owners) = (BTreeSet::new(), BTreeSet::new());
        for change in &changes {
            if let Change::Service(name, Some(_)) = change {
                let _ = services.insert(name.clone());
            }
            if let Change::Slice(_, name, Some(slice)) = change
                && let Some(owner) = &slice.service
            {
                let _ = owners
                    .insert(ObjectName { namespace: name.namespace.clone(), name: owner.clone() });
            }
        }
        if let Some(name) = services.symmetric_difference(&owners).next() {
            let missing =
                if services.contains(name) { "its EndpointSlices" } else { "the Service itself" };
            return Err(ApplyError::Half(name.clone(), missing));
        }
        let mut nodes = nodes_of::<V4>(&self.image);
        nodes.extend(nodes_of::<V6>(&self.image));
        let settings = model::Settings {
            node: Some(node.into()).filter(|_| !node.is_empty()),
            leave: self.left.clone(),
            sources: [SourceId::Manifests].into(),
            ..model::Settings::default()
        };
        let now = SystemTime::UNIX_EPOCH;
        let mut model = Model::new(settings);
        model.set_interfaces(nodes.clone());
        for change in changes.into_iter().chain([Change::Synced]) {
            model.apply(Event { source: SourceId::Manifests, change }, now);
        }
        let mut plan = Plan::adopt(sizes, std::mem::take(&mut self.image));
        let _ = plan.set_node_addresses(nodes);
        if let Some(mut batch) = model.take(now) {
            // The maps' other Services stay.
            batch.complete = false;
            let _ = plan.update(&batch);
        }
        self.image = plan.image().clone();
        self.objects = Objects::of(model);
        Ok(())
    }
}

/// Whether a change is an object, and not a note about one.
fn is_object(change: &Change) -> bool {
    match change {
        Change::Service(..) | Change::Slice(..) | Change::Node(..) | Change::ServiceCidr(..) => {
            true
        }
        Change::Notes(..) | Change::Synced => false,
    }
}

/// Whether a flaw hides what an object says, or that it exists.
fn is_unread(flaw: Flaw) -> bool {
    matches!(flaw, Flaw::BrokenDocument | Flaw::Unreadable | Flaw::Undecodable)
}

/// Returns the objects of a directory or file, or fails if one cannot be read.
fn whole(path: &Path) -> Result<Vec<Change>, ApplyError> {
    let changes = Folder::new(path.to_owned()).scan()?;
    for change in &changes {
        if let Change::Notes(subject, notes) = change
            && let Some(note) = notes.iter().find(|note| is_unread(note.flaw))
        {
            return Err(ApplyError::Broken(subject.clone(), note.message.clone()));
        }
    }
    if changes.iter().any(is_object) { Ok(changes) } else { Err(ApplyError::Empty) }
}

/// Returns the node's addresses in the maps, with whether node ports are served there.
fn nodes_of<F: Stack>(image: &Image) -> BTreeMap<IpAddr, bool> {
    let nodes = F::of(image).node_addresses.iter();
    nodes.map(|(address, node)| (F::ip(*address), node.serves_node_ports())).collect()
}

/// Returns the first address of each family.
fn first_of_each_family(addresses: &[IpAddr]) -> BTreeSet<IpAddr> {
    let first = |v4: bool| addresses.iter().find(move |address| address.is_ipv4() == v4).copied();
    first(true).into_iter().chain(first(false)).collect()
}

fn around<F: Stack>(networks: abi::Networks<F::Address>) -> Around<F> {
    Around {
        networks,
        flows: BTreeMap::new(),
        embryonic: BTreeMap::new(),
        affinity: BTreeMap::new(),
        imported: BTreeMap::new(),
    }
}

/// Returns the addresses of backends on this node.
fn local_backends<F: Stack>(image: &Image) -> BTreeSet<IpAddr> {
    let backends = F::of(image).backends.values();
    backends.filter(|found| found.is_local()).map(|found| F::ip(found.address)).collect()
}

/// Returns the device that packets of a question arrive on.
fn comes_in_by(question: &Question) -> u32 {
    match (question.way, question.from) {
        (Some(Way::Edge), _) | (Some(Way::Socket) | None, Client::Pod) => EDGE,
        (Some(Way::Uplink), _) | (Some(Way::Socket) | None, Client::External | Client::Host) => {
            UPLINK
        }
    }
}

/// The routes of the assumed node: its pods are behind the edge, everything else is behind the
/// uplink.
#[derive(Clone, Debug)]
pub struct Supposed {
    /// The node's own addresses.
    own: BTreeSet<IpAddr>,
    /// The addresses of pods on it.
    local: BTreeSet<IpAddr>,
}

impl Routing for Supposed {
    fn leaves_by(&self, destination: IpAddr) -> Option<u32> {
        if self.is_local(destination) {
            None
        } else if self.local.contains(&destination) {
            Some(EDGE)
        } else {
            Some(UPLINK)
        }
    }

    fn mtu(&self, _: IpAddr) -> Option<u32> {
        None
    }

    fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.own.contains(&address)
    }

    fn comes_in_by(&self, question: &Question, _: &BTreeMap<u32, NamedDevice>) -> Option<u32> {
        Some(comes_in_by(question))
    }

    fn supposes(&self) -> &'static str {
        "assumed"
    }
}
