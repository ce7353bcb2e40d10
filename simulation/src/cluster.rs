//! The cluster: hosts, pods, Services, their addresses, and the Kubernetes objects.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use sluice_common::packet::header::protocol;
use sluice_core::model::event::Change;
use sluice_core::model::object::{
    Address, Endpoint, IpFamily, Maker, ObjectName, PortSpec, ServiceSpec, Slice, SliceKind,
    SliceLabels, SlicePart, SlicePort,
};

use crate::packet::Mac;
use crate::random::mix;

/// Hosts outside of the cluster.
pub const OUTSIDE: usize = 3;
/// Pods per node that are endpoints.
pub const SERVERS: usize = 2;
/// Pods per node.
pub const PODS: usize = 3;
/// Hosts per node: its pods, then the processes in the node's own network.
const SEATS: usize = PODS + 1;
/// Services.
pub const SERVICES: usize = 4;
/// Services with a load balancer's address. The maps hold four frontends per endpoint, so no
/// endpoint has more: the first pod of each node is an endpoint of the first two Services, the
/// second pod of the others.
pub const BALANCED: [usize; 2] = [0, 3];
/// Services with an external IP.
pub const EXTERNAL: [usize; 2] = [1, 2];
/// The Service whose clients stay with their endpoint.
const STICKY: usize = 2;
/// The Service whose external clients reach local endpoints alone.
const LOCAL: usize = 3;
/// The most nodes that a run has.
pub const NODES: usize = 3;

/// The protocols of every Service, by name and number.
const PROTOCOLS: [(&str, u8); 3] =
    [("TCP", protocol::TCP), ("UDP", protocol::UDP), ("SCTP", protocol::SCTP)];

/// The target of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// A Service's ClusterIP.
    ClusterIp(usize),
    /// A Service's node port at a node.
    NodePort(usize, usize),
    /// A Service's load balancer.
    LoadBalancer(usize),
    /// A Service's external IP.
    ExternalIp(usize),
    /// An endpoint itself, by its host's index.
    Pod(usize),
}

/// The state of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It accepts connections.
    Ready,
    /// It is terminating, and still answers.
    Terminating,
    /// No object mentions it.
    Gone,
}

/// Addresses of both families.
type Both = [IpAddr; 2];

fn both(v4: [u8; 4], v6: [u16; 8]) -> Both {
    [Ipv4Addr::from(v4).into(), Ipv6Addr::from(v6).into()]
}

/// Returns the addresses of a node.
#[must_use]
pub fn node(index: usize) -> Both {
    both([10, 0, 0, index as u8 + 1], [0xfd00, 1, 0, 0, 0, 0, 0, index as u16 + 1])
}

/// Returns the addresses of a node's bridge, if its pods are behind one.
#[must_use]
pub fn gateway(node: usize) -> Both {
    both([10, 244, node as u8, 1], [0xfd00, 0x244, node as u16, 0, 0, 0, 0, 1])
}

/// Returns the link-layer address of a node's bridge.
#[must_use]
pub fn bridge_mac(node: usize) -> Mac {
    [2, 0, 0, node as u8, 1, 0]
}

/// Returns the link-layer address of the bridge's port that leads to a pod.
#[must_use]
pub fn port_mac(node: usize, number: usize) -> Mac {
    [2, 0, 0, node as u8, 2, number as u8]
}

/// Returns a pod's link-layer address.
#[must_use]
pub fn pod_mac(node: usize, number: usize) -> Mac {
    [2, 0, 0, node as u8, 3, number as u8]
}

/// Returns the port at which endpoints serve a protocol.
#[must_use]
pub fn port(number: u8) -> u16 {
    match number {
        protocol::TCP => 8_080,
        protocol::SCTP => 2_905,
        _ => 5_353,
    }
}

/// Returns the port at which Services serve a protocol.
fn service_port(number: u8) -> u16 {
    match number {
        protocol::TCP => 80,
        protocol::SCTP => 3_868,
        _ => 53,
    }
}

/// Returns a node's name.
#[must_use]
pub fn node_name(index: usize) -> String {
    format!("node{index}")
}

/// Returns the number of hosts.
#[must_use]
pub fn hosts(nodes: usize) -> usize {
    OUTSIDE + nodes * SEATS
}

/// Returns the addresses of a host: those outside come first, then those of each node.
#[must_use]
pub fn host(index: usize) -> Both {
    let Some(pod) = index.checked_sub(OUTSIDE) else {
        let number = index as u8 + 1;
        return both([192, 0, 2, number], [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(number)]);
    };
    let (at, number) = (pod / SEATS, pod % SEATS);
    if number == PODS {
        return node(at);
    }
    let (node, number) = (at as u8, number as u8 + 10);
    let (v6_node, v6_number) = (u16::from(node), u16::from(number));
    both([10, 244, node, number], [0xfd00, 0x244, v6_node, 0, 0, 0, 0, v6_number])
}

/// Returns the node of a host and which of its pods it is ([`PODS`] for its processes), or [`None`]
/// if the host is outside.
#[must_use]
pub fn place(host: usize) -> Option<(usize, usize)> {
    host.checked_sub(OUTSIDE).map(|pod| (pod / SEATS, pod % SEATS))
}

/// Returns the host of a node's pod.
#[must_use]
pub fn pod(node: usize, number: usize) -> usize {
    OUTSIDE + node * SEATS + number
}

/// Returns the host that stands for the processes in a node's own network.
#[must_use]
pub fn processes(node: usize) -> usize {
    pod(node, PODS)
}

/// Reports whether a host stands for the processes of a node.
#[must_use]
pub fn is_process(host: usize) -> bool {
    place(host).is_some_and(|(_, number)| number == PODS)
}

/// Reports whether a host is an endpoint.
#[must_use]
pub fn is_server(host: usize) -> bool {
    place(host).is_some_and(|(_, number)| number < SERVERS)
}

fn cluster_ip(service: usize) -> Both {
    let number = service as u8 + 1;
    both([10, 96, 0, number], [0xfd00, 0x96, 0, 0, 0, 0, 0, u16::from(number)])
}

fn balancer(service: usize) -> Both {
    let number = service as u8 + 1;
    both([203, 0, 113, number], [0x2001, 0xdb8, 0xb, 0, 0, 0, 0, u16::from(number)])
}

fn external_ip(service: usize) -> Both {
    let number = service as u8 + 1;
    both([198, 51, 100, number], [0x2001, 0xdb8, 0xe, 0, 0, 0, 0, u16::from(number)])
}

fn node_port(service: usize) -> u16 {
    30_000 + service as u16
}

/// Reports whether an address is a Service's and no node's own.
#[must_use]
pub fn is_vip(address: IpAddr) -> bool {
    (0..SERVICES).any(|service| {
        [cluster_ip(service), balancer(service), external_ip(service)]
            .iter()
            .any(|both| both.contains(&address))
    })
}

/// Returns the node that the routers send packets from one address to a Service's address to.
#[must_use]
pub fn chosen(source: IpAddr, destination: IpAddr, nodes: usize) -> usize {
    (mix(&[number(source), number(destination)]) % nodes as u64) as usize
}

/// Returns the node by which a client outside reaches a Service's address.
#[must_use]
pub fn way(client: usize, target: Target, is_v6: bool, nodes: usize) -> usize {
    let end = target.end(is_v6, protocol::TCP);
    chosen(host(client)[usize::from(is_v6)], end.ip(), nodes)
}

/// Returns an address as a number, for [`mix`].
#[must_use]
pub fn number(address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(address) => u64::from(address.to_bits()),
        IpAddr::V6(address) => mix(&[address.to_bits() as u64, (address.to_bits() >> 64) as u64]),
    }
}

/// Reports whether packets to an address and port are for a Service.
#[must_use]
pub fn is_frontend(end: SocketAddr, nodes: usize) -> bool {
    is_vip(end.ip())
        || (0..nodes).any(|index| node(index).contains(&end.ip()))
            && (0..SERVICES).any(|service| node_port(service) == end.port())
}

impl Target {
    /// Returns the address and port.
    #[must_use]
    pub fn end(self, is_v6: bool, number: u8) -> SocketAddr {
        let at_service = service_port(number);
        let (both, port) = match self {
            Self::ClusterIp(service) => (cluster_ip(service), at_service),
            Self::NodePort(service, at) => (node(at), node_port(service)),
            Self::LoadBalancer(service) => (balancer(service), at_service),
            Self::ExternalIp(service) => (external_ip(service), at_service),
            Self::Pod(at) => (host(at), port(number)),
        };
        (both[usize::from(is_v6)], port).into()
    }

    /// Returns the Service, or [`None`] for an endpoint.
    #[must_use]
    pub fn service(self) -> Option<usize> {
        match self {
            Self::ClusterIp(service)
            | Self::NodePort(service, _)
            | Self::LoadBalancer(service)
            | Self::ExternalIp(service) => Some(service),
            Self::Pod(_) => None,
        }
    }
}

/// The objects of the API server.
#[derive(Clone, Debug)]
pub struct Objects {
    nodes: usize,
    /// Whether each Service exists.
    pub services: [bool; SERVICES],
    /// The state of each host as an endpoint.
    pub endpoints: Vec<Readiness>,
}

impl Objects {
    /// Creates all Services and endpoints.
    #[must_use]
    pub fn new(nodes: usize) -> Self {
        Self { nodes, services: [true; SERVICES], endpoints: vec![Readiness::Ready; hosts(nodes)] }
    }

    /// Reports whether a Service exists and all its endpoints are ready.
    #[must_use]
    pub fn is_whole(&self, service: usize) -> bool {
        let mut endpoints = (0..self.nodes).map(|node| pod(node, service / 2));
        self.services[service]
            && endpoints.all(|endpoint| self.endpoints[endpoint] == Readiness::Ready)
    }

    /// Returns all objects, as a source first reports them.
    #[must_use]
    pub fn all(&self) -> Vec<Change> {
        let services = (0..SERVICES).filter(|service| self.services[*service]);
        services
            .flat_map(|service| [self.service(service)].into_iter().chain(self.slices(service)))
            .collect()
    }

    /// Returns the change of a Service that was created or deleted.
    #[must_use]
    pub fn service(&self, service: usize) -> Change {
        let spec = self.services[service].then(|| spec(service));
        Change::Service(name(service), spec)
    }

    /// Returns the changes of a Service's slices.
    #[must_use]
    pub fn slices(&self, service: usize) -> Vec<Change> {
        IpFamily::ALL.into_iter().map(|family| self.slice(service, family)).collect()
    }

    fn slice(&self, service: usize, family: IpFamily) -> Change {
        let number = usize::from(family == IpFamily::V6);
        let endpoints = (0..self.nodes)
            .map(|node| pod(node, service / 2))
            .filter(|server| self.endpoints[*server] != Readiness::Gone)
            .map(|server| {
                let is_ready = self.endpoints[server] == Readiness::Ready;
                Endpoint {
                    address: Address::Valid(host(server)[number]),
                    ready: is_ready,
                    serving: true,
                    terminating: !is_ready,
                    node: place(server).map(|(node, _)| Arc::from(node_name(node))),
                    zones: Box::default(),
                    nodes: Box::default(),
                }
            })
            .collect();
        let part = |(name, protocol): (&str, u8)| SlicePort {
            name: name.to_lowercase().into(),
            number: Some(i32::from(port(protocol))),
            protocol: name.into(),
        };
        let slice = Slice {
            service: Some(Arc::from(format!("s{service}"))),
            family: Ok(Some(family)),
            labels: SliceLabels { maker: Maker::Selector, ..SliceLabels::default() },
            parts: vec![SlicePart { ports: PROTOCOLS.into_iter().map(part).collect(), endpoints }],
            surplus: 0,
            triggered: None,
        };
        let object = ObjectName::new("default", &format!("s{service}-{number}"));
        Change::Slice(SliceKind::EndpointSlice, object, Some(slice))
    }
}

fn name(service: usize) -> ObjectName {
    ObjectName::new("default", &format!("s{service}"))
}

fn spec(service: usize) -> ServiceSpec {
    let valid = |both: Both| both.map(Address::Valid).to_vec();
    let part = |(name, protocol): (&str, u8)| PortSpec {
        name: name.to_lowercase().into(),
        number: i32::from(service_port(protocol)),
        protocol: name.into(),
        node_port: i32::from(node_port(service)),
    };
    let is_balanced = BALANCED.contains(&service);
    ServiceSpec {
        created: i64::try_from(service).ok(),
        kind: "LoadBalancer".into(),
        cluster_ips: valid(cluster_ip(service)),
        families: vec!["IPv4".into(), "IPv6".into()],
        ports: PROTOCOLS.into_iter().map(part).collect(),
        ingress: if is_balanced { valid(balancer(service)) } else { Vec::new() },
        external_ips: if is_balanced { Vec::new() } else { valid(external_ip(service)) },
        affinity_seconds: (service == STICKY).then_some(60),
        internal_policy: "Cluster".into(),
        external_policy: if service == LOCAL { "Local" } else { "Cluster" }.into(),
        ..ServiceSpec::default()
    }
}
