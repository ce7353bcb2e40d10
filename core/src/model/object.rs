//! The parts of Kubernetes' objects that a load balancer needs, independent of Kubernetes' types.
//!
//! Text that may be invalid stays text here. It is parsed, and reported if it is wrong, in one
//! place: when a Service is derived.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;

/// Namespace and name of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The namespace; empty for objects without one.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// Creates a name from two strings.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(formatter, "{}", self.name)
        } else {
            write!(formatter, "{}/{}", self.namespace, self.name)
        }
    }
}

/// A transport protocol that is balanced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// All protocols, in order.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// Returns the protocol with a name of Kubernetes.
    pub fn from_word(word: &str) -> Option<Self> {
        match word {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" => Some(Self::Sctp),
            _ => None,
        }
    }

    /// Returns the protocol with an IP protocol number.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }

    /// Returns the IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// Kubernetes' word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// Both, in order.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Returns the family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Returns the address that stands for none, or for any.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }

    /// Returns the number of bits of an address.
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// Returns 4 or 6.
    pub fn version(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }

    /// Kubernetes' word.
    pub fn word(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// An address as an object gives it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Address {
    /// An address.
    Valid(IpAddr),
    /// Text that is not an address.
    Invalid(Box<str>),
    /// No address.
    Missing,
}

impl Address {
    /// Parses an address as Kubernetes does: numbers with leading zeros in IPv4 are decimal, and
    /// `::ffff:a.b.c.d` is IPv4.
    pub fn parse(text: &str) -> Self {
        if text.is_empty() {
            return Self::Missing;
        }
        if let Ok(address) = text.parse::<Ipv6Addr>() {
            return Self::Valid(address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4));
        }
        let mut octets = [0; 4];
        let mut parts = text.split('.');
        for octet in &mut octets {
            let Some(part) = parts.next() else { return Self::Invalid(text.into()) };
            let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            match part.trim_start_matches('0') {
                "" if digits => *octet = 0,
                part => match part.parse() {
                    Ok(value) if digits => *octet = value,
                    Ok(_) | Err(_) => return Self::Invalid(text.into()),
                },
            }
        }
        if parts.next().is_some() {
            return Self::Invalid(text.into());
        }
        Self::Valid(IpAddr::V4(Ipv4Addr::from(octets)))
    }
}

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceSpec {
    /// The time of creation in seconds since 1970; [`None`] if unknown, which counts as newest.
    pub created: Option<i64>,
    /// The label `service.kubernetes.io/service-proxy-name`: the proxy that serves it, if not the
    /// default one.
    pub proxy_name: Option<Box<str>>,
    /// Whether it has no virtual address on purpose: by `clusterIP: None` or by label.
    pub headless: bool,
    /// The type's word; absent means `ClusterIP`.
    pub kind: Box<str>,
    /// The ClusterIPs, at most one of each family.
    pub cluster_ips: Vec<Address>,
    /// The names of the ClusterIPs' families, in their order; if empty, the addresses determine
    /// them.
    pub families: Vec<Box<str>>,
    /// The ports.
    pub ports: Vec<PortSpec>,
    /// Addresses whose traffic a cloud or its like sends to every node. Those whose traffic goes
    /// elsewhere are left out already (host names, an `ipMode` other than `VIP`).
    pub ingress: Vec<Address>,
    /// Addresses whose traffic an administrator sends to the nodes.
    pub external_ips: Vec<Address>,
    /// The sources that may use the load balancer's addresses, valid or not; if empty, all may.
    pub source_ranges: Vec<Box<str>>,
    /// The seconds for which a client stays with its endpoint, valid or not; [`None`] without
    /// affinity.
    pub affinity_seconds: Option<i32>,
    /// The traffic policy for clients of the ClusterIPs; empty means `Cluster`.
    pub internal_policy: Box<str>,
    /// The traffic policy for clients of external addresses; empty means `Cluster`.
    pub external_policy: Box<str>,
    /// The port at which load balancers ask whether this node has endpoints; 0 if there is none.
    pub health_check_port: i32,
}

/// A port of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortSpec {
    /// The name; empty for an unnamed port.
    pub name: Arc<str>,
    /// The number, valid or not.
    pub number: i32,
    /// The protocol's word, known or not.
    pub protocol: Box<str>,
    /// The node port, valid or not; 0 if there is none.
    pub node_port: i32,
}

/// Endpoints of a Service: an EndpointSlice, or one subset of an Endpoints object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The Service's name, in the slice's own namespace; [`None`] without the label.
    pub service: Option<Arc<str>>,
    /// The family of its addresses, or [`Err`] with the name of an address type that is not served.
    pub family: Result<Option<IpFamily>, Box<str>>,
    /// Its other labels.
    pub labels: SliceLabels,
    /// The parts, each with its ports: an EndpointSlice has one, an Endpoints object one for each
    /// subset.
    pub parts: Vec<SlicePart>,
    /// The number of its endpoints that have several addresses, of which the first counts.
    pub surplus: usize,
    /// The time at which its last change was caused, according to its controller.
    pub triggered: Option<SystemTime>,
}

/// The labels of a slice that decide who uses it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SliceLabels {
    /// `service.kubernetes.io/service-proxy-name`: the proxy that uses it, if not the default one.
    pub proxy_name: Option<Box<str>>,
    /// Whether it has `service.kubernetes.io/headless`: its Service has no virtual address.
    pub headless: bool,
    /// Whether an Endpoints object has `endpointslice.kubernetes.io/skip-mirror`, and so no effect.
    pub skip_mirror: bool,
    /// The controller that made it.
    pub maker: Maker,
}

/// The controller that made a slice, by the label `endpointslice.kubernetes.io/managed-by`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Maker {
    /// Kubernetes, from the pods that the Service's selector matches.
    Selector,
    /// Kubernetes, from an Endpoints object.
    Mirror,
    /// Anybody else.
    #[default]
    Other,
}

/// Endpoints that share their ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePart {
    /// The ports that each endpoint listens on.
    pub ports: Vec<SlicePort>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// A port of endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name; matches the name of a Service's port.
    pub name: Arc<str>,
    /// The number; [`None`] means every port, which is not served.
    pub number: Option<i32>,
    /// The protocol's word, known or not.
    pub protocol: Box<str>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The address at which it listens.
    pub address: Address,
    /// Whether it accepts new connections.
    pub ready: bool,
    /// Whether it answers, perhaps while it terminates.
    pub serving: bool,
    /// Whether it is terminating.
    pub terminating: bool,
    /// The node it runs on.
    pub node: Option<Arc<str>>,
    /// Zones whose clients should use it.
    pub zones: Box<[Arc<str>]>,
    /// Nodes whose clients should use it.
    pub nodes: Box<[Arc<str>]>,
}

/// A Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeSpec {
    /// Its addresses, internal ones first. The first of each family is the primary one.
    pub addresses: Vec<IpAddr>,
    /// Its zone.
    pub zone: Option<Arc<str>>,
    /// The networks of its pods' addresses.
    pub pod_cidrs: Vec<IpNet>,
    /// Whether it is about to be deleted, by an administrator or the cluster's autoscaler.
    pub leaving: bool,
}

/// A kind of object that holds endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SliceKind {
    /// An EndpointSlice.
    EndpointSlice,
    /// An Endpoints object, which has no effect if its Service has EndpointSlices that mirror it.
    Endpoints,
}

/// A source of objects. If two sources have the same Service, the first one counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceId {
    /// A folder of manifests.
    Manifests,
    /// The API server.
    Kubernetes,
}
