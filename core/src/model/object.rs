//! Kubernetes' objects as far as a load balancer needs them, free of Kubernetes' types.
//!
//! Text that may be wrong stays text here: what it means, and what is reported about it, is decided
//! in one place, when a service is derived.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The namespace; empty for objects without one.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// From two strings.
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
    /// All, in order.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The protocol of Kubernetes' word for it.
    pub fn from_word(word: &str) -> Option<Self> {
        match word {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" => Some(Self::Sctp),
            _ => None,
        }
    }

    /// The protocol of an IP protocol number.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }

    /// The IP protocol number.
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

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The address that stands for none, or for any.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }

    /// The bits of an address.
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// 4 or 6.
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
    /// Text that is none.
    Invalid(Box<str>),
    /// Nothing.
    Missing,
}

impl Address {
    /// Reads an address as Kubernetes does: leading zeros in IPv4 are decimal, and
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
    /// Seconds since 1970; [`None`]: unknown, counts as newest.
    pub created: Option<i64>,
    /// The label `service.kubernetes.io/service-proxy-name`: who shall serve it, if not everybody's
    /// proxy.
    pub proxy_name: Option<Box<str>>,
    /// Has no virtual address on purpose: `clusterIP: None`, or the label that says so.
    pub headless: bool,
    /// The type's word; absent means `ClusterIP`.
    pub kind: Box<str>,
    /// The ClusterIPs, at most one of each family.
    pub cluster_ips: Vec<Address>,
    /// The words of the families that the ClusterIPs are of, in their order; none: the addresses
    /// tell.
    pub families: Vec<Box<str>>,
    /// The ports.
    pub ports: Vec<PortSpec>,
    /// Addresses that a cloud or its like sends to every node, those already left out
    /// whose traffic really goes elsewhere (host names, an `ipMode` other than `VIP`).
    pub ingress: Vec<Address>,
    /// Addresses that a person sends to the nodes.
    pub external_ips: Vec<Address>,
    /// The sources that may use the load balancer's addresses, valid or not; none: all may.
    pub source_ranges: Vec<Box<str>>,
    /// How long a client stays with its endpoint, seconds, valid or not; [`None`]: not at all.
    pub affinity_seconds: Option<i32>,
    /// The word of the policy for clients of the ClusterIPs; absent means `Cluster`.
    pub internal_policy: Box<str>,
    /// The word of the policy for clients of external addresses; absent means `Cluster`.
    pub external_policy: Box<str>,
    /// Where load balancers ask whether this node has endpoints; 0: nowhere.
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
    /// The node port, valid or not; 0: none.
    pub node_port: i32,
}

/// Endpoints of a Service: an EndpointSlice, or one subset of an Endpoints object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The Service's name, in the slice's own namespace; [`None`] if no label tells.
    pub service: Option<Arc<str>>,
    /// Which addresses it holds; [`Err`] with the word for those that are not served.
    pub family: Result<Option<IpFamily>, Box<str>>,
    /// What its labels say besides.
    pub labels: SliceLabels,
    /// The parts, each with its ports: an EndpointSlice has one, an Endpoints object one for each
    /// subset.
    pub parts: Vec<SlicePart>,
    /// How many of its endpoints have several addresses, of which the first counts.
    pub surplus: usize,
    /// When its last change was caused, as its controller has noted.
    pub triggered: Option<SystemTime>,
}

/// What the labels of a slice say about whose it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SliceLabels {
    /// `service.kubernetes.io/service-proxy-name`: who shall use it, if not everybody's proxy.
    pub proxy_name: Option<Box<str>>,
    /// `service.kubernetes.io/headless`: its Service has no virtual address.
    pub headless: bool,
    /// `endpointslice.kubernetes.io/skip-mirror` of an Endpoints object: it has no effect.
    pub skip_mirror: bool,
    /// Who made it.
    pub maker: Maker,
}

/// Who made a slice, by the label `endpointslice.kubernetes.io/managed-by`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Maker {
    /// Kubernetes, from the pods that its Service's selector finds.
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
    /// Where it listens.
    pub address: Address,
    /// Takes new connections.
    pub ready: bool,
    /// Answers, perhaps while it terminates.
    pub serving: bool,
    /// Is on its way out.
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
    /// Its addresses, those inside the cluster first: of each family the first is the primary one.
    pub addresses: Vec<IpAddr>,
    /// Its zone.
    pub zone: Option<Arc<str>>,
    /// Where its pods have their addresses.
    pub pod_cidrs: Vec<IpNet>,
    /// About to be deleted, by itself or by the cluster's autoscaler.
    pub leaving: bool,
}

/// Which kind of object holds endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SliceKind {
    /// An EndpointSlice.
    EndpointSlice,
    /// An Endpoints object. Without effect where its Service has EndpointSlices, which mirror it.
    Endpoints,
}

/// Who delivers objects. Of two sources with one Service, the first counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceId {
    /// A folder of manifests.
    Manifests,
    /// The API server.
    Kubernetes,
}
