//! The traffic policy of a node: whose source is masqueraded, which clients are local pods, where
//! node ports are served.
//!
//! It is plain data, independent of flags (`cli::policy` parses them), and tests build it too.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use sluice_common::abi;

/// The whole traffic policy. The default is that of an agent without flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The clients whose source is replaced by the node's.
    pub masquerade: Masquerade,
    /// The way to detect that a client is a local pod.
    pub detect_local: DetectLocal,
    /// The networks of the cluster's pods; at most [`abi::PREFIXES`] a family.
    pub cluster_cidrs: Vec<IpNet>,
    /// The networks of Services, if configured; at most [`abi::PREFIXES`] a family.
    pub service_cidrs: Vec<IpNet>,
    /// The node's addresses at which node ports are served.
    pub node_ports: NodePorts,
    /// The node's own addresses, if configured; the first of a family is its primary one.
    pub node_addresses: Vec<IpAddr>,
    /// The `spec.externalIPs` that are served.
    pub external_ips: ExternalIps,
    /// Addresses that are left to other software with a device on this node.
    pub leave: BTreeSet<IpAddr>,
    /// Whether packets that the stack would only forward go around it.
    pub accelerate: Accelerate,
}

/// Whether packets of Services go around the stack where it would only forward them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Accelerate {
    /// They do not: the stack and its rules see every packet.
    #[default]
    Off,
    /// They do.
    On,
}

impl Accelerate {
    /// The word of the flag.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
        }
    }
}

/// Whose calls the socket path translates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SocketPath {
    /// Those of host processes, and of pods if a packet of theirs was met on its way to the Service
    /// within the last minute.
    #[default]
    All,
    /// Those of every process of the machine, from the first on, nested clusters and meshes
    /// included.
    Machine,
    /// Those of processes in the host's network namespace.
    Host,
    /// None: every packet is translated at a device.
    Off,
}

impl SocketPath {
    /// The word of the flag.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Machine => "machine",
            Self::Host => "host",
            Self::Off => "off",
        }
    }

    /// The number in the settings.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::All => abi::socket_path::ALL,
            Self::Machine => abi::socket_path::MACHINE,
            Self::Host => abi::socket_path::HOST,
            Self::Off => abi::socket_path::OFF,
        }
    }
}

/// Whose source is replaced by the node's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Masquerade {
    /// Clients whose replies would not find back here otherwise.
    #[default]
    Needed,
    /// As kube-proxy: clients of external addresses (but with externalTrafficPolicy: Local), and
    /// clients of ClusterIPs that are no local pods.
    KubeProxy,
    /// As kube-proxy with --masquerade-all: all clients of ClusterIPs too.
    All,
}

impl Masquerade {
    /// The word of the flag.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Needed => "needed",
            Self::KubeProxy => "kube-proxy",
            Self::All => "all",
        }
    }

    /// The number in the settings.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Needed => abi::masquerade::NEEDED,
            Self::KubeProxy => abi::masquerade::KUBE_PROXY,
            Self::All => abi::masquerade::ALL,
        }
    }
}

/// The way to detect that a client is a pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DetectLocal {
    /// It comes in by an edge.
    #[default]
    Device,
    /// Its address is in the cluster's CIDRs.
    ClusterCidr,
    /// Its address is in the pod CIDRs of our Node.
    NodeCidr,
    /// It comes in by this bridge or one of its ports.
    BridgeInterface(String),
    /// It comes in by a device whose name begins so.
    InterfaceNamePrefix(String),
    /// It is not.
    None,
}

impl DetectLocal {
    /// The number in the settings.
    #[must_use]
    pub fn number(&self) -> u32 {
        match self {
            Self::Device => abi::detect_local::DEVICE,
            Self::BridgeInterface(_) | Self::InterfaceNamePrefix(_) => {
                abi::detect_local::SOME_DEVICES
            }
            Self::ClusterCidr | Self::NodeCidr => abi::detect_local::ADDRESS,
            Self::None => abi::detect_local::NONE,
        }
    }
}

impl fmt::Display for DetectLocal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device => write!(formatter, "device"),
            Self::ClusterCidr => write!(formatter, "cluster-cidr"),
            Self::NodeCidr => write!(formatter, "node-cidr"),
            Self::BridgeInterface(name) => write!(formatter, "bridge-interface={name}"),
            Self::InterfaceNamePrefix(prefix) => {
                write!(formatter, "interface-name-prefix={prefix}")
            }
            Self::None => write!(formatter, "none"),
        }
    }
}

/// Longest name of a device, bytes (`IFNAMSIZ` less its end).
const DEVICE_NAME_MAX: usize = 15;

impl FromStr for DetectLocal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let device = |name: &str| match name.len() {
            0 => Err(format!("{text:?} names no device")),
            1..=DEVICE_NAME_MAX => Ok(name.to_owned()),
            _ => Err(format!("a device's name has at most {DEVICE_NAME_MAX} bytes")),
        };
        match text.split_once('=') {
            None => match text {
                "device" => Ok(Self::Device),
                "cluster-cidr" => Ok(Self::ClusterCidr),
                "node-cidr" => Ok(Self::NodeCidr),
                "none" => Ok(Self::None),
                "bridge-interface" | "interface-name-prefix" => {
                    Err(format!("give a device: {text}=cni0"))
                }
                _ => Err(DETECT_LOCAL_WORDS.to_owned()),
            },
            Some(("bridge-interface", name)) => device(name).map(Self::BridgeInterface),
            Some(("interface-name-prefix", prefix)) => {
                device(prefix).map(Self::InterfaceNamePrefix)
            }
            Some(_) => Err(DETECT_LOCAL_WORDS.to_owned()),
        }
    }
}

/// The values of the flag, for errors.
const DETECT_LOCAL_WORDS: &str = "say auto, device, cluster-cidr, node-cidr, bridge-interface=NAME, interface-name-prefix=PREFIX or none";

/// The node's addresses at which node ports are served, as configured.
///
/// A family without elements gets all addresses, even if the other has elements, and a zero CIDR
/// stands for all addresses. Both are kube-proxy's rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePorts(Vec<NodePortAddresses>);

/// An element of [`NodePorts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The node's primary address of each family.
    Primary,
    /// The loopback addresses.
    Localhost,
    /// All, but loopback addresses.
    All,
    /// Those in a network.
    Within(IpNet),
}

impl FromStr for NodePortAddresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "primary" => Ok(Self::Primary),
            "localhost" => Ok(Self::Localhost),
            "all" => Ok(Self::All),
            "" => Err("an empty element; say primary, localhost, all or a CIDR".to_owned()),
            text => cidr(text)
                .map(Self::Within)
                .map_err(|error| format!("{error}, nor primary, localhost or all")),
        }
    }
}

impl fmt::Display for NodePortAddresses {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Primary => write!(formatter, "primary"),
            Self::Localhost => write!(formatter, "localhost"),
            Self::All => write!(formatter, "all"),
            Self::Within(network) => write!(formatter, "{network}"),
        }
    }
}

impl Default for NodePorts {
    fn default() -> Self {
        Self(vec![NodePortAddresses::Primary])
    }
}

impl fmt::Display for NodePorts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        write!(formatter, "{}", words.join(","))
    }
}

impl NodePorts {
    /// Creates the list from its elements.
    #[must_use]
    pub fn new(elements: Vec<NodePortAddresses>) -> Self {
        Self(elements)
    }

    /// Whether node ports are served at an address of the node. `primary` says whether it is a
    /// primary one.
    #[must_use]
    pub fn includes(&self, address: IpAddr, primary: bool) -> bool {
        let asked_for_loopback = self.0.contains(&NodePortAddresses::Localhost);
        if address.is_loopback() && (asked_for_loopback || address.is_ipv6()) {
            return asked_for_loopback;
        }
        if self.is_all(address) {
            return !address.is_loopback();
        }
        self.0.iter().any(|element| match element {
            NodePortAddresses::Primary => primary && !address.is_loopback(),
            NodePortAddresses::Localhost | NodePortAddresses::All => false,
            NodePortAddresses::Within(network) => network.contains(&address),
        })
    }

    /// Whether node ports are served at all addresses of both families but loopback ones.
    #[must_use]
    pub fn includes_all(&self) -> bool {
        self.is_all(Ipv4Addr::UNSPECIFIED.into()) && self.is_all(Ipv6Addr::UNSPECIFIED.into())
    }

    /// Whether the list includes all addresses of an address's family.
    fn is_all(&self, address: IpAddr) -> bool {
        let mut concerned = false;
        for element in &self.0 {
            match element {
                NodePortAddresses::All => return true,
                NodePortAddresses::Within(network) => {
                    let same_family = network.network().is_ipv4() == address.is_ipv4();
                    if same_family && network.prefix_len() == 0 {
                        return true;
                    }
                    concerned |= same_family;
                }
                NodePortAddresses::Primary | NodePortAddresses::Localhost => concerned = true,
            }
        }
        !concerned
    }
}

/// The `spec.externalIPs` that are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ExternalIps {
    /// All. A user who may write Services can then claim any address.
    #[default]
    On,
    /// None.
    Off,
    /// Those in these networks.
    Within(Vec<IpNet>),
}

impl ExternalIps {
    /// Whether an address is served.
    #[must_use]
    pub fn includes(&self, address: IpAddr) -> bool {
        match self {
            Self::On => true,
            Self::Off => false,
            Self::Within(networks) => networks.iter().any(|network| network.contains(&address)),
        }
    }
}

/// An element of `--external-ips`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExternalIp {
    /// All are served.
    On,
    /// None is served.
    Off,
    /// Those in a network are served.
    Within(IpNet),
}

impl FromStr for ExternalIp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            text => cidr(text).map(Self::Within).map_err(|error| format!("{error}, nor on or off")),
        }
    }
}

impl ExternalIps {
    /// Creates it from the elements of the flag; without any, all are served.
    ///
    /// # Errors
    ///
    /// Fails if `on` or `off` is combined with something else.
    pub fn new(elements: &[ExternalIp]) -> Result<Self, String> {
        match elements {
            [] | [ExternalIp::On] => Ok(Self::On),
            [ExternalIp::Off] => Ok(Self::Off),
            _ => elements
                .iter()
                .map(|element| match element {
                    ExternalIp::Within(network) => Ok(*network),
                    ExternalIp::On | ExternalIp::Off => Err("on and off stand alone".to_owned()),
                })
                .collect::<Result<_, _>>()
                .map(Self::Within),
        }
    }
}

/// Parses a CIDR, and clears the bits behind the prefix.
///
/// # Errors
///
/// Fails if the text is not a CIDR.
pub fn cidr(text: &str) -> Result<IpNet, String> {
    let network = text.trim().parse::<IpNet>();
    network
        .map(|network| network.trunc())
        .map_err(|_| "not a CIDR such as 10.0.0.0/8 or fd00::/8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node_ports(text: &str) -> NodePorts {
        let elements = text.split(',').map(|element| element.parse().expect("an element"));
        NodePorts::new(elements.collect())
    }

    #[test]
    fn node_ports_are_served_where_the_list_says() {
        const LOCAL: [&str; 6] =
            ["127.0.0.1", "::1", "192.0.2.1", "10.0.0.1", "2001:db8::1", "fd00::1"];
        const PRIMARY: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
        // The list -> the addresses of LOCAL that serve.
        let table: [(&str, &[&str]); 14] = [
            ("primary", &PRIMARY),
            ("all", &LOCAL[2..]),
            ("localhost", &LOCAL[..2]),
            ("primary,localhost", &["127.0.0.1", "::1", "192.0.2.1", "2001:db8::1"]),
            ("all,localhost", &LOCAL),
            // The other family has no element: all of it.
            ("10.0.0.0/8", &["10.0.0.1", "2001:db8::1", "fd00::1"]),
            ("fd00::/8", &["192.0.2.1", "10.0.0.1", "fd00::1"]),
            ("10.0.0.0/8,fd00::/8", &["10.0.0.1", "fd00::1"]),
            ("primary,10.0.0.0/8", &["192.0.2.1", "10.0.0.1", "2001:db8::1"]),
            // A zero CIDR is all addresses of its family, whatever else is listed.
            ("0.0.0.0/0,127.0.0.0/8,fd00::/8", &["192.0.2.1", "10.0.0.1", "fd00::1"]),
            ("::/0", &["192.0.2.1", "10.0.0.1", "2001:db8::1", "fd00::1"]),
            ("127.0.0.0/8,fd00::/8", &["127.0.0.1", "fd00::1"]),
            ("127.0.0.1/32,::1/128", &["127.0.0.1"]),
            ("198.51.100.0/24,2001:db8:1::/48", &[]),
        ];
        for (list, expected) in table {
            let includes = |address: &&str| {
                node_ports(list)
                    .includes(address.parse().expect("an address"), PRIMARY.contains(address))
            };
            let found: Vec<&str> = LOCAL.into_iter().filter(includes).collect();
            assert_eq!(found, expected, "{list}");
        }
    }

    #[test]
    fn local_detection_is_written_as_it_is_read() {
        for text in [
            "device",
            "cluster-cidr",
            "node-cidr",
            "bridge-interface=cni0",
            "interface-name-prefix=cali",
            "none",
        ] {
            assert_eq!(
                text.parse::<DetectLocal>().map(|detect| detect.to_string()),
                Ok(text.to_owned())
            );
        }
        for (text, why) in [
            ("devices", "say auto"),
            ("bridge=cni0", "say auto"),
            ("bridge-interface", "give a device: bridge-interface=cni0"),
            ("bridge-interface=", "names no device"),
            ("interface-name-prefix=0123456789abcdef", "at most 15"),
        ] {
            let error = text.parse::<DetectLocal>().expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_cidr_may_have_host_bits_but_must_be_one() {
        assert_eq!(
            cidr("10.1.2.3/8").map(|network| network.to_string()),
            Ok("10.0.0.0/8".to_owned())
        );
        assert_eq!(
            cidr(" fd00::1/8 ").map(|network| network.to_string()),
            Ok("fd00::/8".to_owned())
        );
        for text in ["", "10.0.0.0", "10.0.0.0/33", "10.0.0/8", "fd00::/129", "a/8"] {
            assert!(cidr(text).is_err(), "{text}");
        }
    }

    #[test]
    fn external_ips_are_all_none_or_within_networks() {
        let parse = |text: &str| {
            let elements =
                text.split(',').map(str::parse).collect::<Result<Vec<ExternalIp>, _>>()?;
            ExternalIps::new(&elements)
        };
        let address = IpAddr::from([192, 0, 2, 1]);
        for (text, expected) in
            [("on", true), ("off", false), ("192.0.2.0/24", true), ("10.0.0.0/8,fd00::/8", false)]
        {
            assert_eq!(parse(text).map(|ips| ips.includes(address)), Ok(expected), "{text}");
        }
        assert_eq!(parse("on,10.0.0.0/8"), Err("on and off stand alone".to_owned()));
        assert!(parse("yes").is_err_and(|error| error.contains("nor on or off")));
    }
}
