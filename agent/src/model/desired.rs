//! What a Service wants of the load balancer, derived from it and its endpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use super::claims::Frontend;
use super::object::{
    Address, Endpoint, IpFamily, ObjectName, PortSpec, Protocol, ServiceSpec, Slice, SliceKind, SlicePart,
};
use super::report::{Flaw, Notebook, Subject};
use super::{Settings, SliceKey};

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

/// Everything a Service wants: nothing, if it is gone or not to be served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Its ports, each with at least one frontend.
    pub ports: BTreeMap<PortKey, DesiredPort>,
}

/// One port of one Service in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredPort {
    /// The port number of every frontend.
    pub number: u16,
    /// The VIPs, and of which kind each is.
    pub frontends: BTreeMap<IpAddr, FrontendKind>,
    /// The endpoints that answer, in order of address and port.
    pub backends: BTreeMap<(IpAddr, u16), DesiredBackend>,
}

/// Where a VIP comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FrontendKind {
    /// The Service's ClusterIP.
    ClusterIp,
    /// An address of the load balancer in front of the cluster.
    LoadBalancer,
}

/// An endpoint that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DesiredBackend {
    /// For each [`sluice_common::abi::Class`], whether new flows are sent here. One that only drains gets none.
    pub selected: [bool; 3],
    /// Runs on this node.
    pub local: bool,
}

/// The longest name that Kubernetes allows, bytes.
const NAME_MAX: usize = 63;

/// The Service's ports in each family with all frontends it claims.
pub(super) fn claimed(
    name: &ObjectName,
    spec: &ServiceSpec,
    settings: &Settings,
    notes: &mut Notebook,
) -> BTreeMap<PortKey, DesiredPort> {
    let subject = Subject::object("Service", name);
    if spec.proxy_name != settings.proxy_name || spec.headless || spec.external_name {
        return BTreeMap::new();
    }
    if !good_name(&name.namespace) || !good_name(&name.name) {
        notes.add(&subject, Flaw::BadName, || {
            ("metadata".into(), "names have 1 to 63 bytes: the Service is not served".into())
        });
        return BTreeMap::new();
    }
    for field in &spec.not_applied {
        notes.add(&subject, Flaw::NotApplied, || (field.field.into(), field.what.into()));
    }
    let vips = vips(spec, &subject, notes);
    let mut all = BTreeMap::new();
    for (protocol, port, number) in ports(spec, &subject, notes) {
        for (family, frontends) in &vips {
            let key = PortKey { service: name.clone(), port: port.clone(), protocol, family: *family };
            let frontends = frontends.clone();
            let _ = all.insert(key, DesiredPort { number, frontends, backends: BTreeMap::new() });
        }
    }
    all
}

fn good_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= NAME_MAX && !name.contains('\0')
}

/// The VIPs of each family in which the Service has a ClusterIP; without one it does not exist there.
fn vips(
    spec: &ServiceSpec,
    subject: &Subject,
    notes: &mut Notebook,
) -> BTreeMap<IpFamily, BTreeMap<IpAddr, FrontendKind>> {
    let mut vips: BTreeMap<IpFamily, BTreeMap<IpAddr, FrontendKind>> = BTreeMap::new();
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
        if vips.contains_key(&family) {
            notes.add(subject, Flaw::WrongFamily, || {
                (field(), format!("{address} is a second {} address: it is not served", family.word()))
            });
            continue;
        }
        let _ = vips.insert(family, [(address, FrontendKind::ClusterIp)].into());
    }
    for (index, address) in spec.ingress.iter().enumerate() {
        let field = || format!("status.loadBalancer.ingress[{index}].ip");
        let Some(address) = vip(address, field, subject, notes) else { continue };
        let family = IpFamily::of(address);
        if let Some(vips) = vips.get_mut(&family) {
            let _ = vips.entry(address).or_insert(FrontendKind::LoadBalancer);
        } else {
            notes.add(subject, Flaw::WrongFamily, || {
                (field(), format!("the Service has no {} ClusterIP: {address} is not served", family.word()))
            });
        }
    }
    vips
}

/// An address that packets can be sent to as a VIP.
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
            notes.add(subject, Flaw::MissingAddress, || (field(), "there is no address: left out".into()));
            None
        }
    }
}

/// Addresses that no packet for somebody else carries.
fn nowhere(address: IpAddr) -> bool {
    address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address == IpAddr::V4(Ipv4Addr::BROADCAST)
}

/// Addresses that the API refuses for endpoints.
fn no_endpoint(address: IpAddr) -> bool {
    nowhere(address)
        || match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        }
}

/// The number of a port that can be served.
fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

/// The Service's ports that can be served.
fn ports(spec: &ServiceSpec, subject: &Subject, notes: &mut Notebook) -> Vec<(Protocol, Arc<str>, u16)> {
    let mut served: Vec<(Protocol, Arc<str>, u16)> = Vec::new();
    for (index, PortSpec { name, number, protocol }) in spec.ports.iter().enumerate() {
        let field = |part: &str| format!("spec.ports[{index}]{part}");
        let Some(protocol) = Protocol::from_word(protocol) else {
            notes.add(subject, Flaw::UnsupportedProtocol, || {
                (field(".protocol"), format!("{protocol} is not balanced: the port is not served"))
            });
            continue;
        };
        let Some(number) = port_number(*number) else {
            notes.add(subject, Flaw::BadPort, || {
                (field(".port"), format!("{number} is no port: it is not served"))
            });
            continue;
        };
        if name.len() > NAME_MAX || name.contains('\0') {
            notes.add(subject, Flaw::BadName, || {
                (field(".name"), "names have at most 63 bytes: the port is not served".into())
            });
            continue;
        }
        let same = |(other, other_name, other_number): &&(Protocol, Arc<str>, u16)| {
            *other == protocol && (other_name == name || *other_number == number)
        };
        if let Some((_, other_name, other_number)) = served.iter().find(same) {
            notes.add(subject, Flaw::DuplicatePort, || {
                let what =
                    format!("{name:?} {number} repeats {other_name:?} {other_number}: it is not served");
                (field(""), what)
            });
            continue;
        }
        served.push((protocol, name.clone(), number));
    }
    served
}

/// How good a claim an object has to say how an endpoint is doing: the greatest counts. A pod that lives
/// beats one that terminates, since addresses are used again.
type Rank = (bool, bool, bool, bool);

/// An endpoint before it is known whether anybody is ready.
#[derive(Clone, Copy)]
struct Candidate {
    rank: Rank,
    state: State,
    local: bool,
}

/// What an endpoint's conditions amount to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Takes new flows.
    Ready,
    /// Terminates, but still answers.
    Draining,
    /// Answers what it knows.
    Serving,
    /// Answers nobody.
    Gone,
}

/// What the endpoints of a Service are judged by.
pub(super) struct Context<'a> {
    /// How the agent was started.
    pub(super) settings: &'a Settings,
    /// The addresses of this node.
    pub(super) node_addresses: &'a BTreeSet<IpAddr>,
}

/// Fills in the backends of a Service's ports from its slices.
pub(super) fn join(
    ports: &mut BTreeMap<PortKey, DesiredPort>,
    slices: &BTreeMap<SliceKey, Slice>,
    context: &Context<'_>,
    notes: &mut Notebook,
) {
    let loops: BTreeSet<Frontend> = ports
        .iter()
        .flat_map(|(key, port)| port.frontends.keys().map(|vip| (*vip, port.number, key.protocol)))
        .collect();
    let mirrored =
        slices.iter().any(|(key, slice)| key.kind == SliceKind::EndpointSlice && slice.family.is_ok());
    let mut candidates: BTreeMap<PortKey, BTreeMap<(IpAddr, u16), Candidate>> = BTreeMap::new();
    for (slice_key, slice) in slices {
        let Ok(family) = slice.family else { continue };
        if mirrored && slice_key.kind == SliceKind::Endpoints {
            continue;
        }
        let subject = slice_key.subject();
        for part in &slice.parts {
            let endpoints = endpoints(part, family, &subject, context, notes);
            for (index, port) in part.ports.iter().enumerate() {
                let field = |part: &str| format!("ports[{index}]{part}");
                let Some(protocol) = Protocol::from_word(&port.protocol) else {
                    notes.add(&subject, Flaw::UnsupportedProtocol, || {
                        (
                            field(".protocol"),
                            format!("{} is not balanced: the port is left out", port.protocol),
                        )
                    });
                    continue;
                };
                let Some(number) = port.number.and_then(port_number) else {
                    notes.add(&subject, Flaw::BadPort, || {
                        let what = match port.number {
                            Some(number) => format!("{number} is no port: left out"),
                            None => "a slice for every port is not served: left out".into(),
                        };
                        (field(".port"), what)
                    });
                    continue;
                };
                for (key, _) in
                    ports.iter().filter(|(key, _)| key.protocol == protocol && key.port == port.name)
                {
                    let candidates = candidates.entry(key.clone()).or_default();
                    for (address, candidate) in &endpoints {
                        if IpFamily::of(*address) != key.family {
                            continue;
                        }
                        if loops.contains(&(*address, number, protocol)) {
                            notes.add(&subject, Flaw::Loop, || {
                                let what =
                                    format!("{address}:{number} is a frontend of its own Service: left out");
                                ("endpoints".into(), what)
                            });
                            continue;
                        }
                        let known = candidates.entry((*address, number)).or_insert(*candidate);
                        if candidate.rank > known.rank {
                            *known = *candidate;
                        }
                    }
                }
            }
        }
    }
    for (key, candidates) in candidates {
        if let Some(port) = ports.get_mut(&key) {
            port.backends = select(&candidates);
        }
    }
}

/// The endpoints of a slice that can be backends.
fn endpoints(
    part: &SlicePart,
    family: Option<IpFamily>,
    subject: &Subject,
    context: &Context<'_>,
    notes: &mut Notebook,
) -> Vec<(IpAddr, Candidate)> {
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

fn candidate(endpoint: &Endpoint, address: IpAddr, context: &Context<'_>) -> Candidate {
    let Endpoint { ready, serving, terminating, .. } = *endpoint;
    let local = match (&endpoint.node, &context.settings.node) {
        (Some(theirs), Some(ours)) => theirs == ours,
        _ => false,
    } || context.node_addresses.contains(&address);
    Candidate {
        rank: (!terminating, ready, serving, local),
        state: match (ready, serving, terminating) {
            (true, ..) => State::Ready,
            (false, true, true) => State::Draining,
            (false, true, false) => State::Serving,
            (false, false, _) => State::Gone,
        },
        local,
    }
}

/// Who gets new flows: the ready ones, else those that terminate but still answer.
fn select(candidates: &BTreeMap<(IpAddr, u16), Candidate>) -> BTreeMap<(IpAddr, u16), DesiredBackend> {
    let any_ready = candidates.values().any(|candidate| candidate.state == State::Ready);
    let chosen = if any_ready { State::Ready } else { State::Draining };
    candidates
        .iter()
        .filter(|(_, candidate)| candidate.state != State::Gone)
        .map(|(endpoint, candidate)| {
            let selected = candidate.state == chosen;
            (*endpoint, DesiredBackend { selected: [selected; 3], local: candidate.local })
        })
        .collect()
}
