//! Derives what a Service wants of the load balancer from the Service and its endpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::claims::{Claims, Frontend};
use super::object::{
    Address, Endpoint, IpFamily, Maker, ObjectName, PortSpec, Protocol, ServiceSpec, Slice,
    SliceKind, SlicePart, SlicePort,
};
use super::policy::{Choice, Member, Place, Policies, categorize};
use super::report::{Flaw, Notebook, Subject};
use super::{Settings, SliceKey};
use crate::policy::{ExternalIps, cidr};

/// Identifies one port of one Service in one family.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortKey {
    /// The Service.
    pub service: ObjectName,
    /// The port's name; empty for an unnamed port.
    pub port: Arc<str>,
    /// The protocol.
    pub protocol: Protocol,
    /// The family of frontends and backends.
    pub family: IpFamily,
}

impl PortKey {
    /// Returns the least key that a Service's port can have.
    pub fn first(service: &ObjectName) -> Self {
        Self {
            service: service.clone(),
            port: "".into(),
            protocol: Protocol::Tcp,
            family: IpFamily::V4,
        }
    }

    /// Returns the field that a report on the port names.
    pub fn field(&self) -> String {
        let name = if self.port.is_empty() { "(unnamed)" } else { &self.port };
        format!("spec.ports {name} {} {}", self.protocol.word(), self.family.word())
    }
}

/// Everything that a Service wants: nothing if it is gone or not served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The time of creation in seconds since 1970; [`None`] if unknown, which counts as newest.
    pub created: Option<i64>,
    /// Its ports, each with at least one frontend.
    pub ports: BTreeMap<PortKey, DesiredPort>,
    /// Its ClusterIPs. Clients that use another port of one are rejected.
    pub addresses: BTreeSet<IpAddr>,
}

/// One port of one Service in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredPort {
    /// The port number in the Service, which all frontends but node ports have.
    pub number: u16,
    /// The addresses and port numbers that clients use, each with its kind.
    pub frontends: BTreeMap<(IpAddr, u16), FrontendKind>,
    /// The endpoints that answer, in order of address and port.
    pub backends: BTreeMap<(IpAddr, u16), DesiredBackend>,
    /// For each [`sluice_common::abi::Class`] without a backend, whether its clients are dropped,
    /// because there are endpoints elsewhere, and not rejected.
    pub drops: [bool; 3],
    /// Its traffic policies.
    pub policies: Policies,
    /// The seconds for which a client stays with its endpoint; 0 without affinity.
    pub affinity_seconds: u32,
    /// The sources that may use the load balancer's addresses; [`None`] if all may.
    pub sources: Option<BTreeSet<IpNet>>,
}

/// The kind of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FrontendKind {
    /// The Service's ClusterIP.
    ClusterIp,
    /// An address of the load balancer in front of the cluster.
    LoadBalancer,
    /// An address whose traffic an administrator sends to the nodes.
    ExternalIp,
    /// A port of every address of this node that serves node ports. Its own address is
    /// unspecified.
    NodePort,
}

/// An endpoint that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DesiredBackend {
    /// For each [`sluice_common::abi::Class`], whether new flows are sent here. A draining endpoint
    /// gets none.
    pub selected: [bool; 3],
    /// Whether it runs on this node.
    pub local: bool,
    /// Whether its address is one of this node's own.
    pub host: bool,
}

/// The health check of a Service with `externalTrafficPolicy: Local`, by which a load balancer
/// finds the nodes with endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The port of the health check.
    pub port: u16,
    /// The number of ready endpoints on this node: distinct addresses of the family that has more,
    /// since an endpoint of a dual-stack Service has one address of each.
    pub local: usize,
}

/// A UDP port of a Service. A flow that the kernel tracks from one of its frontends to anything but
/// one of its endpoints is stale.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UdpPort {
    /// The addresses and port numbers that clients use; a node port has the unspecified address.
    pub frontends: BTreeSet<(IpAddr, u16)>,
    /// The endpoints that answer, whatever the policies are and even while they terminate.
    pub endpoints: BTreeSet<(IpAddr, u16)>,
}

/// The longest name that Kubernetes allows, bytes.
const NAME_MAX: usize = 63;
/// The longest session affinity, seconds.
const AFFINITY_MAX: i32 = 86_400;
/// The session affinity of a Service whose value is out of bounds, seconds.
const AFFINITY_DEFAULT: u32 = 10_800;

/// The context in which Services and endpoints are derived.
pub(super) struct Context<'a> {
    /// The settings of the model.
    pub(super) settings: &'a Settings,
    /// VIPs that something else on this node serves.
    pub(super) left: &'a BTreeSet<IpAddr>,
    /// The addresses of this node.
    pub(super) node_addresses: &'a BTreeSet<IpAddr>,
    /// The primary addresses among them, at most one of each family.
    pub(super) primary: &'a BTreeSet<IpAddr>,
    /// The zone of this node.
    pub(super) zone: Option<&'a str>,
    /// The claims on frontends.
    pub(super) claims: &'a Claims,
    /// The addresses of this node's devices, each with whether node ports are served there.
    pub(super) interfaces: &'a BTreeMap<IpAddr, bool>,
}

impl Context<'_> {
    /// Returns the Service that an endpoint is a frontend of, so that a packet for it would be
    /// translated again.
    fn frontend_of(&self, endpoint: &Frontend) -> Option<&ObjectName> {
        let (address, number, protocol) = *endpoint;
        self.claims.winner(endpoint).or_else(|| {
            let serves_node_ports = self.interfaces.get(&address).copied().unwrap_or(false);
            let node_port = (IpFamily::of(address).unspecified(), number, protocol);
            if serves_node_ports { self.claims.winner(&node_port) } else { None }
        })
    }
}

/// The claims of a Service, before they are settled.
#[derive(Default)]
pub(super) struct Claimed {
    /// Its ports in each family with all frontends it claims.
    pub(super) ports: BTreeMap<PortKey, DesiredPort>,
    /// Its ClusterIPs.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// The port of its health check.
    pub(super) health_port: Option<u16>,
}

/// Returns the claims of a Service.
pub(super) fn claimed(
    name: &ObjectName,
    spec: &ServiceSpec,
    context: &Context<'_>,
    notes: &mut Notebook,
) -> Claimed {
    let subject = Subject::object("Service", name);
    let has_vips = !spec.headless && &*spec.kind != "ExternalName";
    if spec.proxy_name != context.settings.proxy_name || !has_vips {
        return Claimed::default();
    }
    if !good_name(&name.namespace) || !good_name(&name.name) {
        notes.add(&subject, Flaw::BadName, || {
            ("metadata".into(), "names have 1 to 63 bytes: the Service is not served".into())
        });
        return Claimed::default();
    }
    let vips = vips(spec, context, &subject, notes);
    let source_ranges = source_ranges(spec, &subject, notes);
    let affinity_seconds = affinity_seconds(spec, &subject, notes);
    let internal_local =
        is_local(&spec.internal_policy, "spec.internalTrafficPolicy", &subject, notes);
    let external_local =
        is_local(&spec.external_policy, "spec.externalTrafficPolicy", &subject, notes)
            && (matches!(&*spec.kind, "LoadBalancer" | "NodePort")
                || !spec.external_ips.is_empty());
    let health_port = port_number(spec.health_check_port)
        .filter(|_| external_local && &*spec.kind == "LoadBalancer" && !vips.is_empty());

    let mut claimed = Claimed { health_port, ..Claimed::default() };
    let ports = ports(spec, &subject, notes);
    for (family, vips) in vips {
        let sources = permitted(&source_ranges, family, &vips, context);
        if sources.is_none() && !spec.source_ranges.is_empty() {
            note_open_to_all(family, &vips, &subject, notes);
        }
        for ServedPort { protocol, name: port, number, node_port } in &ports {
            let mut frontends: BTreeMap<(IpAddr, u16), FrontendKind> =
                vips.iter().map(|(vip, kind)| ((*vip, *number), *kind)).collect();
            frontends.extend(
                node_port.map(|port| ((family.unspecified(), port), FrontendKind::NodePort)),
            );
            let external = frontends.values().any(|kind| *kind != FrontendKind::ClusterIp);
            let desired = DesiredPort {
                number: *number,
                frontends,
                policies: Policies { internal_local, external_local, external },
                affinity_seconds,
                sources: sources.clone(),
                ..DesiredPort::default()
            };
            let key =
                PortKey { service: name.clone(), port: port.clone(), protocol: *protocol, family };
            let _ = claimed.ports.insert(key, desired);
        }
        let cluster_ips = vips.into_iter().filter(|(_, kind)| *kind == FrontendKind::ClusterIp);
        claimed.addresses.extend(cluster_ips.map(|(vip, _)| vip));
    }
    claimed
}

/// Notes the addresses of a load balancer that no source range of their family restricts.
fn note_open_to_all(
    family: IpFamily,
    vips: &BTreeMap<IpAddr, FrontendKind>,
    subject: &Subject,
    notes: &mut Notebook,
) {
    for (vip, _) in vips.iter().filter(|(_, kind)| **kind == FrontendKind::LoadBalancer) {
        notes.add(subject, Flaw::OpenToAll, || {
            let what = format!(
                "none is a range of {} addresses: everybody may reach {vip}",
                family.word()
            );
            ("spec.loadBalancerSourceRanges".into(), what)
        });
    }
}

/// Whether a traffic policy says `Local`.
fn is_local(word: &str, field: &str, subject: &Subject, notes: &mut Notebook) -> bool {
    if !matches!(word, "" | "Cluster" | "Local") {
        notes.add(subject, Flaw::BadValue, || {
            (field.into(), format!("{word:?} is neither Cluster nor Local: treated as Cluster"))
        });
    }
    word == "Local"
}

fn affinity_seconds(spec: &ServiceSpec, subject: &Subject, notes: &mut Notebook) -> u32 {
    let Some(seconds) = spec.affinity_seconds else { return 0 };
    u32::try_from(seconds).ok().filter(|_| (1..=AFFINITY_MAX).contains(&seconds)).unwrap_or_else(
        || {
            notes.add(subject, Flaw::BadValue, || {
                let what =
                    format!("{seconds} is not in 1 to {AFFINITY_MAX}: {AFFINITY_DEFAULT} is used");
                ("spec.sessionAffinityConfig.clientIP.timeoutSeconds".into(), what)
            });
            AFFINITY_DEFAULT
        },
    )
}

/// Returns the source ranges of the Service.
fn source_ranges(spec: &ServiceSpec, subject: &Subject, notes: &mut Notebook) -> Vec<IpNet> {
    let mut ranges = Vec::new();
    for (index, text) in spec.source_ranges.iter().enumerate() {
        match cidr(text) {
            Ok(range) => ranges.push(range),
            Err(_) => notes.add(subject, Flaw::BadAddress, || {
                let field = format!("spec.loadBalancerSourceRanges[{index}]");
                (field, format!("{text:?} is no range of addresses: left out"))
            }),
        }
    }
    ranges
}

/// Returns the sources that may use a family's load balancer addresses, or [`None`] if all may:
/// without such addresses, or without ranges of the family.
///
/// A range that contains this node permits those addresses too, since a node that holds one as its
/// own sends from it.
fn permitted(
    ranges: &[IpNet],
    family: IpFamily,
    vips: &BTreeMap<IpAddr, FrontendKind>,
    context: &Context<'_>,
) -> Option<BTreeSet<IpNet>> {
    let balanced: Vec<IpAddr> = vips
        .iter()
        .filter(|(_, kind)| **kind == FrontendKind::LoadBalancer)
        .map(|(vip, _)| *vip)
        .collect();
    let mut permitted: BTreeSet<IpNet> =
        ranges.iter().filter(|range| IpFamily::of(range.network()) == family).copied().collect();
    if balanced.is_empty() || permitted.is_empty() {
        return None;
    }
    let node = |range: &IpNet| context.primary.iter().any(|address| range.contains(address));
    if permitted.iter().any(node) {
        permitted.extend(balanced.into_iter().map(IpNet::from));
    }
    Some(permitted)
}

fn good_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= NAME_MAX && !name.contains('\0')
}

/// The VIPs of a Service in each family.
type Vips = BTreeMap<IpFamily, BTreeMap<IpAddr, FrontendKind>>;

/// Returns the ClusterIPs of a Service.
fn cluster_ips(spec: &ServiceSpec, subject: &Subject, notes: &mut Notebook) -> Vips {
    let mut vips = Vips::new();
    if spec.cluster_ips.is_empty() {
        notes.add(subject, Flaw::NoClusterIp, || {
            (
                "spec.clusterIP".into(),
                "is missing, and nothing here assigns one: the Service is not served".into(),
            )
        });
    }
    for (index, address) in spec.cluster_ips.iter().enumerate() {
        let field = || format!("spec.clusterIPs[{index}]");
        let Some(address) = vip(address, field, subject, notes) else { continue };
        let family = IpFamily::of(address);
        let declared = spec.families.get(index).is_some_and(|word| **word == *family.word());
        if !spec.families.is_empty() && !declared {
            notes.add(subject, Flaw::WrongFamily, || {
                (
                    field(),
                    format!("{address} is not of the family in spec.ipFamilies: it is not served"),
                )
            });
            continue;
        }
        if vips.contains_key(&family) {
            notes.add(subject, Flaw::WrongFamily, || {
                (
                    field(),
                    format!("{address} is a second {} address: it is not served", family.word()),
                )
            });
            continue;
        }
        let _ = vips.insert(family, [(address, FrontendKind::ClusterIp)].into());
    }
    vips
}

/// Returns the VIPs of each family in which the Service has a ClusterIP. It does not exist in a
/// family without one.
fn vips(
    spec: &ServiceSpec,
    context: &Context<'_>,
    subject: &Subject,
    notes: &mut Notebook,
) -> Vips {
    let mut vips = cluster_ips(spec, subject, notes);
    // The load balancer's come first: an address that is of both kinds keeps its source ranges.
    for (index, address) in spec.ingress.iter().enumerate() {
        let field = || format!("status.loadBalancer.ingress[{index}].ip");
        let _ = add_vip(&mut vips, address, FrontendKind::LoadBalancer, field, subject, notes);
    }
    for (index, address) in spec.external_ips.iter().enumerate() {
        let field = || format!("spec.externalIPs[{index}]");
        let allowed = allowed(address, context);
        if allowed == Some(false) {
            notes.add(subject, Flaw::ExternalIpRefused, || {
                (field(), "this agent is set to refuse the address: it is not served".into())
            });
        } else if add_vip(&mut vips, address, FrontendKind::ExternalIp, field, subject, notes)
            && allowed.is_none()
        {
            notes.add(subject, Flaw::ExternalIp, || {
                (
                    field(),
                    "is served: anyone who may write Services can claim any address in this way"
                        .into(),
                )
            });
        }
    }
    for vips in vips.values_mut() {
        vips.retain(|vip, _| {
            let leave = context.settings.leave.contains(vip) || context.left.contains(vip);
            if leave {
                notes.add(subject, Flaw::LeftAlone, || {
                    (
                        String::new(),
                        format!("{vip} is left alone: something else on this node serves it"),
                    )
                });
            }
            !leave
        });
    }
    vips
}

/// Adds an external address to those of its family. Returns whether it is new there.
fn add_vip(
    vips: &mut Vips,
    address: &Address,
    kind: FrontendKind,
    field: impl Fn() -> String,
    subject: &Subject,
    notes: &mut Notebook,
) -> bool {
    let Some(address) = vip(address, &field, subject, notes) else { return false };
    let family = IpFamily::of(address);
    let Some(vips) = vips.get_mut(&family) else {
        notes.add(subject, Flaw::WrongFamily, || {
            (
                field(),
                format!("the Service has no {} ClusterIP: {address} is not served", family.word()),
            )
        });
        return false;
    };
    let new = !vips.contains_key(&address);
    let _ = vips.entry(address).or_insert(kind);
    new
}

/// Whether the settings permit an address as external IP; [`None`] if they do not restrict it.
fn allowed(address: &Address, context: &Context<'_>) -> Option<bool> {
    let served = &context.settings.external_ips;
    let Address::Valid(address) = address else { return None };
    (*served != ExternalIps::On).then(|| served.includes(*address))
}

/// Returns an address if it can be a VIP.
fn vip(
    address: &Address,
    field: impl Fn() -> String,
    subject: &Subject,
    notes: &mut Notebook,
) -> Option<IpAddr> {
    let address = valid(address, &field, subject, notes)?;
    if nowhere(address) {
        notes.add(subject, Flaw::ForbiddenAddress, || {
            (field(), format!("{address} cannot be a VIP: it is not served"))
        });
        return None;
    }
    Some(address)
}

fn valid(
    address: &Address,
    field: impl Fn() -> String,
    subject: &Subject,
    notes: &mut Notebook,
) -> Option<IpAddr> {
    match address {
        Address::Valid(address) => Some(*address),
        Address::Invalid(text) => {
            notes.add(subject, Flaw::BadAddress, || {
                (field(), format!("{text:?} is not an IP address: left out"))
            });
            None
        }
        Address::Missing => {
            notes.add(subject, Flaw::MissingAddress, || {
                (field(), "there is no address: left out".into())
            });
            None
        }
    }
}

/// Whether an address can be neither a VIP nor an endpoint.
fn nowhere(address: IpAddr) -> bool {
    address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address == IpAddr::V4(Ipv4Addr::BROADCAST)
}

/// Whether the API refuses an address for endpoints.
fn no_endpoint(address: IpAddr) -> bool {
    nowhere(address)
        || match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        }
}

/// Returns the number of a port, if it is valid.
fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

/// A port of a Service that can be served.
struct ServedPort {
    protocol: Protocol,
    name: Arc<str>,
    number: u16,
    node_port: Option<u16>,
}

/// Returns the Service's ports that can be served.
fn ports(spec: &ServiceSpec, subject: &Subject, notes: &mut Notebook) -> Vec<ServedPort> {
    let mut served: Vec<ServedPort> = Vec::new();
    for (index, PortSpec { name, number, protocol, node_port }) in spec.ports.iter().enumerate() {
        let field = |part: &str| format!("spec.ports[{index}]{part}");
        let Some(protocol) = Protocol::from_word(protocol) else {
            notes.add(subject, Flaw::UnsupportedProtocol, || {
                (field(".protocol"), format!("{protocol} is not supported: the port is not served"))
            });
            continue;
        };
        let Some(number) = port_number(*number) else {
            notes.add(subject, Flaw::BadPort, || {
                (field(".port"), format!("{number} is not a valid port: it is not served"))
            });
            continue;
        };
        if name.len() > NAME_MAX || name.contains('\0') {
            notes.add(subject, Flaw::BadName, || {
                (field(".name"), "names have at most 63 bytes: the port is not served".into())
            });
            continue;
        }
        let same = |other: &&ServedPort| {
            other.protocol == protocol && (other.name == *name || other.number == number)
        };
        if let Some(other) = served.iter().find(same) {
            notes.add(subject, Flaw::DuplicatePort, || {
                let what = format!(
                    "{name:?} {number} repeats {:?} {}: it is not served",
                    other.name, other.number
                );
                (field(""), what)
            });
            continue;
        }
        let others = served.iter().filter(|other| other.protocol == protocol);
        let node_port = served_node_port(*node_port, others, |flaw, what| {
            notes.add(subject, flaw, || (field(".nodePort"), what));
        });
        served.push(ServedPort { protocol, name: name.clone(), number, node_port });
    }
    served
}

/// Returns the number of a node port, unless it cannot be served or another port of the protocol
/// has it.
fn served_node_port<'a>(
    node_port: i32,
    mut others: impl Iterator<Item = &'a ServedPort>,
    note: impl FnOnce(Flaw, String),
) -> Option<u16> {
    if node_port == 0 {
        return None;
    }
    let Some(number) = port_number(node_port) else {
        note(Flaw::BadPort, format!("{node_port} is not a valid port: it is not served"));
        return None;
    };
    if others.any(|other| other.node_port == Some(number)) {
        let what = format!("{node_port} is that of another port: it is not served here");
        note(Flaw::DuplicatePort, what);
        return None;
    }
    Some(number)
}

/// An endpoint that can be a backend, judged by its object and its address.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    member: Member<'a>,
    local: bool,
    host: bool,
}

/// The result of joining a Service with its slices.
#[derive(Default)]
pub(super) struct Joined {
    /// For each family, the addresses of ready endpoints on this node.
    pub(super) ready_here: BTreeMap<IpFamily, BTreeSet<IpAddr>>,
    /// The endpoints of its ports, including those that are left out because they are frontends.
    pub(super) endpoints: BTreeSet<Frontend>,
}

/// Fills in the backends of a Service's ports from its slices.
pub(super) fn join(
    service: &ObjectName,
    ports: &mut BTreeMap<PortKey, DesiredPort>,
    slices: &BTreeMap<SliceKey, Slice>,
    context: &Context<'_>,
    notes: &mut Notebook,
) -> Joined {
    let mirrored = slices
        .iter()
        .any(|(key, slice)| key.kind == SliceKind::EndpointSlice && slice.family.is_ok());
    let selected = slices.values().any(|slice| slice.labels.maker == Maker::Selector);
    let mut join =
        Join { service, ports, context, candidates: BTreeMap::new(), endpoints: BTreeSet::new() };
    for (key, slice) in slices {
        let Ok(family) = slice.family else { continue };
        if mirrored && key.kind == SliceKind::Endpoints {
            continue;
        }
        let subject = key.subject();
        if selected && slice.labels.maker == Maker::Mirror {
            note_stale_mirror(slice, &subject, notes);
        }
        for part in &slice.parts {
            join.add_part(part, family, &subject, notes);
        }
    }
    let Join { candidates, endpoints, .. } = join;
    let mut joined = Joined { endpoints, ..Joined::default() };
    for (key, candidates) in candidates {
        let ready = candidates
            .iter()
            .filter(|(_, candidate)| candidate.member.local && candidate.member.ready);
        joined
            .ready_here
            .entry(key.family)
            .or_default()
            .extend(ready.map(|((address, _), _)| *address));
        if let Some(port) = ports.get_mut(&key) {
            choose(&key, port, &candidates, context, notes);
        }
    }
    joined
}

/// Notes that a slice mirrors an Endpoints object although slices of the Service's selector exist.
fn note_stale_mirror(slice: &Slice, subject: &Subject, notes: &mut Notebook) {
    if slice.parts.iter().any(|part| !part.endpoints.is_empty()) {
        notes.add(subject, Flaw::StaleMirror, || {
            let what = "it mirrors an Endpoints object, beside slices that the Service's selector makes: \
                        its endpoints are used too, though nobody may keep them up to date";
            ("metadata.labels[endpointslice.kubernetes.io/managed-by]".into(), what.into())
        });
    }
}

/// The candidates for a Service's ports that its slices name, while they are collected.
struct Join<'a, 's> {
    service: &'a ObjectName,
    ports: &'a BTreeMap<PortKey, DesiredPort>,
    context: &'a Context<'a>,
    candidates: BTreeMap<PortKey, BTreeMap<(IpAddr, u16), Candidate<'s>>>,
    /// All endpoints of the ports, including those that are left out.
    endpoints: BTreeSet<Frontend>,
}

impl<'s> Join<'_, 's> {
    /// Adds the endpoints of a part of a slice to those ports of the Service that the part names.
    fn add_part(
        &mut self,
        part: &'s SlicePart,
        family: Option<IpFamily>,
        subject: &Subject,
        notes: &mut Notebook,
    ) {
        let endpoints = endpoints(part, family, subject, self.context, notes);
        for (index, port) in part.ports.iter().enumerate() {
            let Some((protocol, number)) = slice_port(index, port, subject, notes) else {
                continue;
            };
            let is_named = |key: &&PortKey| key.protocol == protocol && key.port == port.name;
            for key in self.ports.keys().filter(is_named) {
                let candidates = self.candidates.entry(key.clone()).or_default();
                let of_family =
                    endpoints.iter().filter(|(address, _)| IpFamily::of(*address) == key.family);
                for (address, candidate) in of_family {
                    let endpoint = (*address, number, protocol);
                    let _ = self.endpoints.insert(endpoint);
                    if let Some(other) = self.context.frontend_of(&endpoint) {
                        notes.add(subject, Flaw::Loop, || {
                            ("endpoints".into(), in_circles(&endpoint, other, self.service))
                        });
                        continue;
                    }
                    let known = candidates.entry((*address, number)).or_insert(*candidate);
                    // If an address is used again, the live pod replaces the terminating one.
                    if !candidate.member.terminating {
                        *known = *candidate;
                    }
                }
            }
        }
    }
}

/// Returns the protocol and number of a slice's port, if it can be served.
fn slice_port(
    index: usize,
    port: &SlicePort,
    subject: &Subject,
    notes: &mut Notebook,
) -> Option<(Protocol, u16)> {
    let field = |part: &str| format!("ports[{index}]{part}");
    let Some(protocol) = Protocol::from_word(&port.protocol) else {
        notes.add(subject, Flaw::UnsupportedProtocol, || {
            let what = format!("{} is not supported: the port is left out", port.protocol);
            (field(".protocol"), what)
        });
        return None;
    };
    let number = port.number.and_then(port_number);
    if number.is_none() {
        notes.add(subject, Flaw::BadPort, || {
            let what = match port.number {
                Some(number) => format!("{number} is not a valid port: left out"),
                None => "a slice for every port is not served: left out".into(),
            };
            (field(".port"), what)
        });
    }
    Some((protocol, number?))
}

/// Describes an endpoint that is a frontend of a Service.
fn in_circles(endpoint: &Frontend, of: &ObjectName, service: &ObjectName) -> String {
    let (address, number, protocol) = endpoint;
    let at = SocketAddr::new(*address, *number);
    let whose = if of == service { "its own Service".to_owned() } else { format!("Service {of}") };
    format!("{at} {} is a frontend of {whose}: left out", protocol.word())
}

/// Returns the endpoints of a part of a slice that can be backends.
fn endpoints<'a>(
    part: &'a SlicePart,
    family: Option<IpFamily>,
    subject: &Subject,
    context: &Context<'_>,
    notes: &mut Notebook,
) -> Vec<(IpAddr, Candidate<'a>)> {
    let mut usable = Vec::with_capacity(part.endpoints.len());
    for (index, endpoint) in part.endpoints.iter().enumerate() {
        let field = || format!("endpoints[{index}]");
        let Some(address) = valid(&endpoint.address, field, subject, notes) else { continue };
        if family.is_some_and(|family| family != IpFamily::of(address)) {
            notes.add(subject, Flaw::WrongFamily, || {
                (field(), format!("{address} is not of the slice's address type: left out"))
            });
            continue;
        }
        if no_endpoint(address) {
            notes.add(subject, Flaw::ForbiddenAddress, || {
                (field(), format!("{address} cannot be an endpoint: left out"))
            });
            continue;
        }
        usable.push((address, candidate(endpoint, address, context)));
    }
    usable
}

fn candidate<'a>(endpoint: &'a Endpoint, address: IpAddr, context: &Context<'_>) -> Candidate<'a> {
    let Endpoint { ready, serving, terminating, node, zones, nodes, .. } = endpoint;
    let named = node.is_some() && *node == context.settings.node;
    let host = context.node_addresses.contains(&address);
    Candidate {
        member: Member {
            ready: *ready,
            serving: *serving,
            terminating: *terminating,
            // As in kube-proxy, policies go by the object alone, not by the address.
            local: named,
            zones,
            nodes,
        },
        local: named || host,
        host,
    }
}

/// Fills in a port's backends, and which of them each class of clients may reach.
fn choose(
    key: &PortKey,
    port: &mut DesiredPort,
    candidates: &BTreeMap<(IpAddr, u16), Candidate<'_>>,
    context: &Context<'_>,
    notes: &mut Notebook,
) {
    let members: Vec<Member<'_>> = candidates.values().map(|candidate| candidate.member).collect();
    let place = Place { node: context.settings.node.as_deref(), zone: context.zone };
    let choices = categorize(&members, port.policies, place).choices(port.policies);
    port.drops = choices.each_ref().map(|choice| choice.drops);
    let selected = |index: usize| {
        choices
            .each_ref()
            .map(|Choice { members, .. }| members.get(index).copied().unwrap_or_default())
    };
    port.backends = candidates
        .iter()
        .enumerate()
        .filter(|(_, (_, candidate))| candidate.member.ready || candidate.member.serving)
        .map(|(index, (at, Candidate { local, host, .. }))| {
            (*at, DesiredBackend { selected: selected(index), local: *local, host: *host })
        })
        .collect();
    let subject = Subject::object("Service", &key.service);
    let [internal, _, outside] = port.drops;
    let kept_away = [
        (
            internal && port.policies.internal_local,
            "internalTrafficPolicy",
            "clients of the ClusterIP",
        ),
        (outside && port.policies.external, "externalTrafficPolicy", "clients from outside"),
    ];
    for (_, policy, clients) in kept_away.into_iter().filter(|(kept_away, ..)| *kept_away) {
        notes.add(&subject, Flaw::NoLocalEndpoint, || {
            let what =
                format!("{policy} is Local and no endpoint is on this node: {clients} are dropped");
            (key.field(), what)
        });
    }
}
