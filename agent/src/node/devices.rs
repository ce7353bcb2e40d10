//! Finds the network devices that matter, and their roles.
//!
//! [`survey`] is a pure function of what netlink reports (links, addresses, default routes) and of
//! [`Rules`]. [`watch`] keeps it up to date, and [`own`] maintains routes for VIPs.

pub mod addresses;
pub mod loopback;
pub mod own;
pub mod pattern;
mod route;
pub mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sluice_common::abi;
use sluice_core::policy::{DetectLocal, Policy};

use addresses::{PerFamily, is_global};
use pattern::Patterns;

/// Name of our own device.
pub const OWN: &str = "sluice0";

/// `ARPHRD_ETHER`, and `ARPHRD_LOOPBACK`, whose packets have an Ethernet header of zeros.
const ETHERNET: [u16; 2] = [1, 772];
/// `ARPHRD_PPP`, `ARPHRD_RAWIP`, `ARPHRD_TUNNEL`, `ARPHRD_TUNNEL6`, `ARPHRD_SIT`, `ARPHRD_IPGRE`,
/// `ARPHRD_IP6GRE`, `ARPHRD_NONE`: packets begin with the IP header.
const WITHOUT_HEADER: [u16; 8] = [512, 519, 768, 769, 776, 778, 823, 0xfffe];
/// Kinds of overlay and tunnel devices.
const FABRIC: [&str; 16] = [
    "vxlan",
    "geneve",
    "wireguard",
    "ipip",
    "sit",
    "gre",
    "gretap",
    "ip6tnl",
    "ip6gre",
    "ip6gretap",
    "erspan",
    "ip6erspan",
    "vti",
    "vti6",
    "xfrm",
    "bareudp",
];
/// Kinds whose devices come in pairs, one end in each namespace.
const PAIRS: [&str; 2] = ["veth", "netkit"];

/// Kinds whose devices drop whatever they send.
const DEAD_ENDS: [&str; 3] = ["dummy", "ifb", "nlmon"];

/// The role of a device for Sluice; the numbers are those of [`abi::device`].
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, schemars::JsonSchema, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The host's end of a pod's link.
    Edge,
    /// A device with the node's address or its default route.
    Uplink,
    /// An overlay or tunnel device.
    Fabric,
    /// Our own device.
    Own,
    /// The loopback device, which carries packets from the host to the node's own addresses.
    Loopback,
}

impl Role {
    /// Returns the number in the `devices` map.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Edge => abi::device::EDGE,
            Self::Uplink => abi::device::UPLINK,
            Self::Fabric => abi::device::FABRIC,
            Self::Own => abi::device::OWN,
            Self::Loopback => abi::device::LOOPBACK,
        }
    }

    /// Returns the role with a number in the `devices` map.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Edge, Self::Uplink, Self::Fabric, Self::Own, Self::Loopback]
            .into_iter()
            .find(|role| role.number() == number)
    }

    /// Returns the word for people.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::Uplink => "uplink",
            Self::Fabric => "fabric",
            Self::Own => "own",
            Self::Loopback => "loopback",
        }
    }
}

/// A link as netlink reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its ifindex.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// `veth`, `vxlan`, ...; empty for hardware.
    pub kind: String,
    /// `ARPHRD_*`.
    pub layer: u16,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it is the loopback device.
    pub loopback: bool,
    /// The network namespace of its other end, or of the device below it, if that is in another
    /// one.
    pub peer: Option<Peer>,
    /// The bridge, bond or VRF that it belongs to; 0 if none.
    pub master: u32,
    /// The device that it is stacked on, or its other end if that is in this network namespace;
    /// 0 if none.
    pub lower: u32,
    /// Its link-layer address.
    pub mac: [u8; 6],
    /// Its MTU, bytes.
    pub mtu: u32,
}

/// The network namespace of a link's other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// One with this id in the present one.
    Known(u32),
    /// One that has no id in the present one.
    Unknown,
}

/// An address of a link as netlink reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkAddress {
    /// The address.
    pub address: IpAddr,
    /// The length of its network's prefix, bits.
    pub prefix: u8,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// Whether it is secondary to another address of its network, or (IPv6) temporary.
    pub secondary: bool,
    /// Whether it is not to be used for new connections.
    pub deprecated: bool,
    /// Whether another host may have it: duplicate detection has not succeeded.
    pub unusable: bool,
}

/// The facts about this network namespace that netlink reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// ifindex -> link.
    pub links: BTreeMap<u32, Link>,
    /// ifindex -> its addresses, in the kernel's order.
    pub addresses: BTreeMap<u32, Vec<LinkAddress>>,
    /// The devices that a default route of the main table leaves by.
    pub default_routes: BTreeSet<u32>,
}

/// The rules for this node that follow from flags and the Node object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The roles of devices that flags name.
    pub patterns: Patterns,
    /// The traffic policy of the flags.
    pub policy: Policy,
    /// The Node object's addresses, internal ones first.
    pub node: Vec<IpAddr>,
}

/// A device that programs are attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its ifindex.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// Its entry in the `devices` map.
    pub entry: abi::Device,
    /// Whether it is a veth.
    pub veth: bool,
}

/// The conclusions from facts and rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// ifindex -> device; only devices with a role.
    pub devices: BTreeMap<u32, Device>,
    /// Every address that is local to the node -> whether node ports are served there.
    pub addresses: BTreeMap<IpAddr, bool>,
    /// The node's primary addresses.
    pub primary: PerFamily,
    /// Addresses that are left to other software with a device on this node.
    pub leave: BTreeSet<IpAddr>,
    /// Devices without programs that drop whatever they send.
    pub dead_ends: BTreeSet<u32>,
    /// The node's known addresses that no uplink has (see [`addresses::strays`]).
    pub strays: BTreeMap<IpAddr, Option<(String, Option<Role>)>>,
}

/// Determines every device's role, and the use of each of the node's addresses.
///
/// `before` is the previous survey: a veth that was the uplink does not become an edge while its
/// default route is missing.
#[must_use]
pub fn survey(facts: &Facts, rules: &Rules, before: &Survey) -> Survey {
    // A veth carries the node's traffic, not a pod's, if it has an address that the node is known
    // by.
    let was_uplink =
        |index| before.devices.get(&index).is_some_and(|device| device.role == Role::Uplink);
    let is_known = |address: &LinkAddress| {
        rules.node.contains(&address.address)
            || rules.policy.node_addresses.contains(&address.address)
    };
    let is_nodes = |index| {
        was_uplink(index) || facts.addresses.get(&index).is_some_and(|all| all.iter().any(is_known))
    };
    let role = |link: &Link| role(link, facts, &rules.patterns, is_nodes(link.index));
    let roles: BTreeMap<u32, Role> =
        facts.links.values().filter_map(|link| Some((link.index, role(link)?))).collect();
    let primary = addresses::primary(facts, &roles, rules);
    let leave = addresses::left_alone(facts, &rules.policy);
    let device = |link: &Link| {
        let role = *roles.get(&link.index)?;
        let entry = entry(link, role, facts, rules, &primary)?;
        Some(Device {
            index: link.index,
            name: link.name.clone(),
            role,
            entry,
            veth: link.kind == "veth",
        })
    };
    Survey {
        devices: facts
            .links
            .values()
            .filter_map(device)
            .map(|device| (device.index, device))
            .collect(),
        addresses: addresses::local(facts, &roles, &rules.policy, &primary, &leave),
        primary,
        leave,
        strays: addresses::strays(facts, &roles, rules),
        dead_ends: facts
            .links
            .values()
            .filter(|link| {
                DEAD_ENDS.contains(&link.kind.as_str()) && !roles.contains_key(&link.index)
            })
            .map(|link| link.index)
            .collect(),
    }
}

/// Returns the device's entry in the map, or [`None`] if the position of the IP header is unknown.
fn entry(
    link: &Link,
    role: Role,
    facts: &Facts,
    rules: &Rules,
    primary: &PerFamily,
) -> Option<abi::Device> {
    let link_header = match link.layer {
        layer if ETHERNET.contains(&layer) => 14,
        layer if WITHOUT_HEADER.contains(&layer) => 0,
        _ => return None,
    };
    let bridge = facts.links.get(&link.master).filter(|master| master.kind == "bridge");
    let is_switched = link.master != 0
        && !facts
            .links
            .get(&link.master)
            .is_some_and(|master| ["bridge", "vrf"].contains(&&*master.kind));
    let is_pair = PAIRS.contains(&link.kind.as_str());
    let local_pods = has_local_pods(link, role, bridge, &rules.policy.detect_local);
    let has_gateway_above = bridge.is_some_and(|bridge| has_gateway_above(bridge, facts));
    let (netns, hides_sockets) = match link.peer {
        _ if role != Role::Edge => (0, false),
        Some(Peer::Known(id)) if is_pair => (id.saturating_add(1), false),
        _ => (0, true),
    };
    let own = facts.addresses.get(&link.index).map_or(&[][..], Vec::as_slice);
    let known: Vec<IpAddr> =
        rules.policy.node_addresses.iter().chain(&rules.node).copied().collect();
    // A bridge's port has no address of its own; the bridge's address is used.
    let of_bridge = bridge.and_then(|bridge| facts.addresses.get(&bridge.index));
    let of_bridge = of_bridge.map_or(&[][..], Vec::as_slice);
    let masquerade = addresses::masquerade(own, &known)
        .or(addresses::masquerade(of_bridge, &known))
        .or(*primary);
    Some(abi::Device {
        role: role.number(),
        bridge: bridge.map_or(0, |bridge| bridge.index),
        mac: link.mac,
        link_header,
        mtu: link.mtu,
        masquerade_v4: masquerade.v4.map(Into::into).unwrap_or_default(),
        masquerade_v6: masquerade.v6.map(Into::into).unwrap_or_default(),
        flags: if local_pods { abi::device_flags::LOCAL_PODS } else { 0 }
            | if link.kind == "bridge" { abi::device_flags::BRIDGE } else { 0 }
            | if is_switched { abi::device_flags::SWITCHED } else { 0 }
            | if hides_sockets { abi::device_flags::HIDES_SOCKETS } else { 0 }
            | if has_gateway_above { abi::device_flags::GATEWAY_ABOVE } else { 0 }
            | bridge.map_or(0, |bridge| {
                abi::device_flags::bridge_mac(bridge.mac) << abi::device_flags::BRIDGE_MAC_SHIFT
            }),
        netns,
    })
}

/// Whether packets that come in by a device are those of local pods.
fn has_local_pods(link: &Link, role: Role, bridge: Option<&Link>, detect: &DetectLocal) -> bool {
    match detect {
        DetectLocal::BridgeInterface(name) => {
            link.name == *name || bridge.is_some_and(|bridge| bridge.name == *name)
        }
        DetectLocal::InterfaceNamePrefix(prefix) => link.name.starts_with(prefix),
        DetectLocal::Device
        | DetectLocal::ClusterCidr
        | DetectLocal::NodeCidr
        | DetectLocal::None => role == Role::Edge,
    }
}

/// Whether a bridge's gateway may be above it, at the end of a veth whose other end is a port.
fn has_gateway_above(bridge: &Link, facts: &Facts) -> bool {
    let is_port = |index| facts.links.get(index).is_some_and(|port| port.master == bridge.index);
    facts.links.values().any(|link| {
        PAIRS.contains(&link.kind.as_str())
            && link.peer.is_none()
            && is_port(&link.lower)
            && facts
                .addresses
                .get(&link.index)
                .is_some_and(|found| found.iter().any(|found| is_global(&found.address)))
    })
}

fn role(link: &Link, facts: &Facts, patterns: &Patterns, is_nodes: bool) -> Option<Role> {
    if link.loopback {
        return Some(Role::Loopback);
    }
    if link.name == OWN && ["dummy", "ifb"].contains(&link.kind.as_str()) {
        return Some(Role::Own);
    }
    if let Some(role) = patterns.role(&link.name) {
        return Some(role);
    }
    let master = facts.links.get(&link.master);
    let bridged = master.is_some_and(|master| master.kind == "bridge");
    let routed = facts.default_routes.contains(&link.index);
    let addresses = facts.addresses.get(&link.index);
    let addressed =
        addresses.is_some_and(|addresses| addresses.iter().any(|found| is_global(&found.address)));
    let tunnel = FABRIC.contains(&link.kind.as_str())
        || link.kind == "tun" && !ETHERNET.contains(&link.layer);
    if tunnel {
        // The kernel makes a fallback device for some kinds, which is down until it is used.
        return link.up.then_some(Role::Fabric);
    }
    if PAIRS.contains(&link.kind.as_str()) {
        // A pair with both ends in this namespace leads to no pod, whether a bridge's port or not.
        return match (addressed && (routed || is_nodes), link.peer.is_some()) {
            (true, _) => Some(Role::Uplink),
            (false, true) => Some(Role::Edge),
            (false, false) => None,
        };
    }
    match link.kind.as_str() {
        "tun" if bridged => Some(Role::Edge),
        // Ports carry frames for the bridge, which is the uplink instead.
        _ if bridged => None,
        "dummy" | "ifb" | "vrf" | "nlmon" => None,
        "bridge" => {
            let has_outside_port = facts.links.values().any(|port| {
                port.master == link.index
                    && !PAIRS.contains(&port.kind.as_str())
                    && port.kind != "tun"
            });
            (routed || addressed && has_outside_port).then_some(Role::Uplink)
        }
        _ => (routed || addressed).then_some(Role::Uplink),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: kind.to_owned(),
            layer: 1,
            up: true,
            mtu: 1500,
            ..Link::default()
        }
    }

    fn facts(links: impl IntoIterator<Item = Link>) -> Facts {
        Facts {
            links: links.into_iter().map(|link| (link.index, link)).collect(),
            ..Facts::default()
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn with_address(mut facts: Facts, index: u32, address: &str) -> Facts {
        let prefix = if ip(address).is_ipv4() { 24 } else { 64 };
        facts.addresses.entry(index).or_default().push(LinkAddress {
            address: ip(address),
            prefix,
            scope: 0,
            secondary: false,
            deprecated: false,
            unusable: false,
        });
        facts
    }

    fn with_default_route(mut facts: Facts, index: u32) -> Facts {
        let _ = facts.default_routes.insert(index);
        facts
    }

    fn roles(facts: &Facts) -> Vec<(String, Role)> {
        let survey = survey(facts, &Rules::default(), &Survey::default());
        survey.devices.into_values().map(|device| (device.name, device.role)).collect()
    }

    fn role_of(facts: &Facts, name: &str) -> Option<Role> {
        roles(facts).into_iter().find(|(found, _)| found == name).map(|(_, role)| role)
    }

    #[test]
    fn hardware_with_an_address_is_an_uplink() {
        let facts = with_address(facts([link(2, "eth0", ""), link(3, "eth1", "")]), 2, "192.0.2.1");
        assert_eq!(roles(&facts), [("eth0".to_owned(), Role::Uplink)]);
    }

    #[test]
    fn a_link_local_address_makes_no_uplink() {
        let facts = with_address(facts([link(2, "eth0", "")]), 2, "fe80::1");
        assert_eq!(roles(&facts), []);
    }

    #[test]
    fn a_veth_to_another_namespace_is_an_edge_even_with_an_address() {
        let veth = Link { peer: Some(Peer::Known(0)), ..link(2, "veth0", "veth") };
        let facts = with_address(facts([veth]), 2, "10.1.0.1");
        assert_eq!(role_of(&facts, "veth0"), Some(Role::Edge));
        let survey = survey(&facts, &Rules::default(), &Survey::default());
        assert_eq!(survey.addresses, BTreeMap::from([(ip("10.1.0.1"), false)]));
    }

    #[test]
    fn a_veth_with_address_and_default_route_is_an_uplink() {
        let veth = Link { peer: Some(Peer::Known(0)), ..link(2, "veth0", "veth") };
        let facts = with_default_route(with_address(facts([veth]), 2, "192.0.2.1"), 2);
        assert_eq!(role_of(&facts, "veth0"), Some(Role::Uplink));
    }

    #[test]
    fn a_veth_with_an_address_that_the_node_is_known_by_is_an_uplink_without_a_default_route() {
        let veth = Link { peer: Some(Peer::Known(0)), ..link(2, "eth1", "veth") };
        let facts = with_address(facts([veth]), 2, "192.0.2.1");
        let rules = Rules { node: vec![ip("192.0.2.1")], ..Rules::default() };
        let role = |rules: &Rules| {
            survey(&facts, rules, &Survey::default()).devices.get(&2).map(|device| device.role)
        };
        assert_eq!(role(&rules), Some(Role::Uplink));
        assert_eq!(role(&Rules::default()), Some(Role::Edge));
    }

    #[test]
    fn a_veth_stays_the_uplink_while_its_default_route_is_away() {
        let veth = Link { peer: Some(Peer::Known(0)), ..link(2, "veth0", "veth") };
        let mut facts = with_default_route(with_address(facts([veth]), 2, "192.0.2.1"), 2);
        let before = survey(&facts, &Rules::default(), &Survey::default());
        facts.default_routes.clear();
        assert_eq!(survey(&facts, &Rules::default(), &before), before);
        facts.addresses.clear();
        let after = survey(&facts, &Rules::default(), &before);
        assert_eq!(after.devices.get(&2).map(|device| device.role), Some(Role::Edge));
    }

    #[test]
    fn a_veth_pair_of_one_namespace_is_nothing() {
        assert_eq!(roles(&facts([link(2, "a", "veth"), link(3, "b", "veth")])), []);
    }

    #[test]
    fn a_port_of_a_bond_or_a_switch_is_known_as_one_and_a_bridges_knows_its_address() {
        let flags = |kind: &str| {
            let master = Link { mac: [2, 0, 0, 0xa, 0xb, 0xc], ..link(2, "m0", kind) };
            let port = Link { peer: Some(Peer::Known(0)), master: 2, ..link(3, "veth0", "veth") };
            let survey = survey(&facts([master, port]), &Rules::default(), &Survey::default());
            survey.devices.get(&3).map(|device| device.entry.flags & !abi::device_flags::LOCAL_PODS)
        };
        assert_eq!(flags("bridge"), Some(0x0a_0b_0c << abi::device_flags::BRIDGE_MAC_SHIFT));
        assert_eq!(flags("vrf"), Some(0));
        assert_eq!(flags("openvswitch"), Some(abi::device_flags::SWITCHED));
    }

    #[test]
    fn a_pods_device_tells_where_the_sockets_behind_it_are() {
        let sockets = |peer, kind: &str| {
            let port = Link { peer, master: 2, ..link(3, "port0", kind) };
            let survey = survey(
                &facts([link(2, "br0", "bridge"), port]),
                &Rules::default(),
                &Survey::default(),
            );
            let entry = survey.devices.get(&3).map(|device| device.entry);
            entry.map(|entry| (entry.netns, entry.hides_sockets()))
        };
        assert_eq!(sockets(Some(Peer::Known(0)), "veth"), Some((1, false)));
        assert_eq!(sockets(Some(Peer::Known(6)), "netkit"), Some((7, false)));
        assert_eq!(sockets(Some(Peer::Unknown), "veth"), Some((0, true)));
        assert_eq!(sockets(None, "veth"), None, "both ends are here");
        assert_eq!(sockets(None, "tun"), Some((0, true)));
    }

    #[test]
    fn a_gateway_above_a_bridge_is_known() {
        let is_above = |above: Link, address: &str| {
            let port = Link { peer: Some(Peer::Known(0)), master: 2, ..link(3, "veth0", "veth") };
            let end = Link { master: 2, lower: 5, ..link(4, "gw1", "veth") };
            let facts =
                with_address(facts([link(2, "br0", "bridge"), port, end, above]), 5, address);
            let survey = survey(&facts, &Rules::default(), &Survey::default());
            let entry = survey.devices.get(&3).map(|device| device.entry);
            entry.is_some_and(|entry| entry.has_gateway_above())
        };
        let veth = Link { lower: 4, ..link(5, "gw0", "veth") };
        assert!(is_above(veth.clone(), "10.1.0.1"), "a veth");
        assert!(!is_above(veth.clone(), "fe80::1"), "an address of the link alone");
        assert!(
            !is_above(Link { peer: Some(Peer::Known(4)), ..veth }, "10.1.0.1"),
            "an id of another namespace"
        );
        assert!(!is_above(link(5, "eth0", ""), "10.1.0.1"), "a device of its own");
    }

    #[test]
    fn a_bridge_of_pods_is_not_attached_but_its_ports_are() {
        let port = Link { peer: Some(Peer::Known(0)), master: 2, ..link(3, "veth0", "veth") };
        let facts = with_address(facts([link(2, "cni0", "bridge"), port]), 2, "10.1.0.1");
        assert_eq!(roles(&facts), [("veth0".to_owned(), Role::Edge)]);
        let survey = survey(&facts, &Rules::default(), &Survey::default());
        assert_eq!(survey.devices.get(&3).map(|device| device.entry.bridge), Some(2));
    }

    #[test]
    fn a_bridge_that_carries_the_nodes_address_is_the_uplink_instead_of_its_ports() {
        let outside = Link { master: 2, ..link(3, "eth0", "") };
        let pod = Link { peer: Some(Peer::Known(0)), master: 2, ..link(4, "veth0", "veth") };
        let tap = Link { master: 2, ..link(5, "tap0", "tun") };
        let facts =
            with_address(facts([link(2, "br0", "bridge"), outside, pod, tap]), 2, "192.0.2.1");
        assert_eq!(role_of(&facts, "br0"), Some(Role::Uplink));
        assert_eq!(role_of(&facts, "eth0"), None);
        assert_eq!(role_of(&facts, "veth0"), Some(Role::Edge));
        assert_eq!(role_of(&facts, "tap0"), Some(Role::Edge));
    }

    #[test]
    fn tunnels_are_fabric_when_they_are_up() {
        let vxlan = link(2, "flannel.1", "vxlan");
        let wireguard = Link { layer: 0xfffe, ..link(3, "wg0", "wireguard") };
        let fallback = Link { layer: 768, up: false, ..link(4, "tunl0", "ipip") };
        let tun = Link { layer: 0xfffe, ..link(5, "tun0", "tun") };
        let survey = survey(
            &facts([vxlan, wireguard, fallback, tun]),
            &Rules::default(),
            &Survey::default(),
        );
        let headers: Vec<_> = survey
            .devices
            .values()
            .map(|device| (device.index, device.role, device.entry.link_header))
            .collect();
        assert_eq!(headers, [(2, Role::Fabric, 14), (3, Role::Fabric, 0), (5, Role::Fabric, 0)]);
    }

    #[test]
    fn members_of_a_bond_are_left_to_the_bond() {
        let member = Link { master: 2, ..link(3, "eth0", "") };
        let facts = with_default_route(
            with_address(facts([link(2, "bond0", "bond"), member]), 2, "192.0.2.1"),
            2,
        );
        assert_eq!(roles(&facts), [("bond0".to_owned(), Role::Uplink)]);
    }

    #[test]
    fn patterns_decide_before_anything_else() {
        let patterns = Patterns::new(&["eth1".to_owned()], &[], &["eth2*".to_owned()]);
        let facts = facts([link(2, "eth1", ""), link(3, "eth20", ""), link(4, "eth3", "")]);
        let rules = Rules { patterns, ..Rules::default() };
        let survey = survey(&facts, &rules, &Survey::default());
        let roles: Vec<_> = survey.devices.values().map(|device| device.role).collect();
        assert_eq!(roles, [Role::Edge, Role::Fabric]);
    }

    #[test]
    fn the_loopback_device_carries_what_the_host_sends_to_itself_and_its_global_addresses_are_the_nodes()
     {
        let lo = Link { loopback: true, layer: 772, ..link(1, "lo", "") };
        let facts = with_address(with_address(facts([lo]), 1, "127.0.0.1"), 1, "192.0.2.9");
        let survey = survey(&facts, &Rules::default(), &Survey::default());
        let roles: Vec<Role> = survey.devices.values().map(|device| device.role).collect();
        assert_eq!(roles, [Role::Loopback]);
        assert_eq!(
            survey.addresses,
            BTreeMap::from([(ip("192.0.2.9"), true)]),
            "it is the primary one, too"
        );
    }

    #[test]
    fn a_device_with_an_unknown_link_header_is_not_attached() {
        let infiniband = Link { layer: 32, ..link(2, "ib0", "ipoib") };
        assert_eq!(roles(&with_address(facts([infiniband]), 2, "192.0.2.1")), []);
    }

    /// A node with an uplink, an overlay, a bridge of pods with a port, and a routed pod.
    fn node() -> Facts {
        let port = Link { peer: Some(Peer::Known(0)), master: 4, ..link(5, "veth0", "veth") };
        let routed = Link { peer: Some(Peer::Known(0)), ..link(6, "cali0", "veth") };
        let links = [
            link(2, "eth0", ""),
            link(3, "flannel.1", "vxlan"),
            link(4, "cni0", "bridge"),
            port,
            routed,
            link(7, OWN, "dummy"),
        ];
        let facts = with_address(with_address(facts(links), 2, "192.0.2.1"), 2, "2001:db8::1");
        with_default_route(with_address(with_address(facts, 3, "10.244.1.0"), 4, "10.244.1.1"), 2)
    }

    #[test]
    fn clients_are_shown_as_the_devices_own_address_else_as_the_nodes() {
        let rules = Rules { node: vec![ip("192.0.2.1")], ..Rules::default() };
        let survey = survey(&node(), &rules, &Survey::default());
        let shown: Vec<(&str, String, String)> = survey
            .devices
            .values()
            .map(|device| {
                let v4 = std::net::Ipv4Addr::from(device.entry.masquerade_v4);
                let v6 = std::net::Ipv6Addr::from(device.entry.masquerade_v6);
                (device.name.as_str(), v4.to_string(), v6.to_string())
            })
            .collect();
        let v6 = "2001:db8::1";
        let expected = [
            ("eth0", "192.0.2.1"),
            ("flannel.1", "10.244.1.0"),
            // A port of cni0.
            ("veth0", "10.244.1.1"),
            ("cali0", "192.0.2.1"),
            (OWN, "192.0.2.1"),
        ];
        assert_eq!(shown, expected.map(|(name, v4)| (name, v4.to_owned(), v6.to_owned())));
    }

    #[test]
    fn a_family_without_an_address_is_masqueraded_by_none() {
        let facts = with_address(facts([link(2, "eth0", "")]), 2, "192.0.2.1");
        let survey = survey(&facts, &Rules::default(), &Survey::default());
        let entry = survey.devices.get(&2).map(|device| device.entry.masquerade_v6);
        assert_eq!(entry, Some(abi::Ipv6Address::default()));
    }

    #[test]
    fn local_pods_are_behind_edges_a_bridge_or_devices_of_a_name() {
        let table: [(DetectLocal, &[&str]); 4] = [
            (DetectLocal::Device, &["veth0", "cali0"]),
            (DetectLocal::BridgeInterface("cni0".to_owned()), &["veth0"]),
            (DetectLocal::InterfaceNamePrefix("cali".to_owned()), &["cali0"]),
            (DetectLocal::BridgeInterface("eth0".to_owned()), &["eth0"]),
        ];
        for (detect_local, expected) in table {
            let policy = Policy { detect_local: detect_local.clone(), ..Policy::default() };
            let rules = Rules { policy, ..Rules::default() };
            let survey = survey(&node(), &rules, &Survey::default());
            let flagged = survey.devices.values().filter(|device| device.entry.has_local_pods());
            let names: Vec<&str> = flagged.map(|device| device.name.as_str()).collect();
            assert_eq!(names, expected, "{detect_local}");
        }
    }
}
