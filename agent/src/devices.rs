//! Which network devices matter, and what each of them is.
//!
//! [`survey`] is a pure function of what netlink tells: links, addresses, default routes. [`watch`]
//! keeps asking, [`own`] keeps routes for VIPs that no other route leads to.

pub mod own;
pub mod pattern;
pub mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sluice_common::abi;

use pattern::Patterns;

/// Name of our own device.
pub const OWN: &str = "sluice0";

/// `ARPHRD_ETHER`.
const ETHERNET: u16 = 1;
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

/// What a device is to us; the numbers are those of [`abi::device`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The host's end of a pod's link.
    Edge,
    /// Carries the node's address or its default route.
    Uplink,
    /// An overlay or tunnel device.
    Fabric,
    /// Our own device.
    Own,
}

impl Role {
    /// The number in the `devices` map.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Edge => abi::device::EDGE,
            Self::Uplink => abi::device::UPLINK,
            Self::Fabric => abi::device::FABRIC,
            Self::Own => abi::device::OWN,
        }
    }

    /// The role of a number in the `devices` map.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Edge, Self::Uplink, Self::Fabric, Self::Own].into_iter().find(|role| role.number() == number)
    }

    /// The word for people.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::Uplink => "uplink",
            Self::Fabric => "fabric",
            Self::Own => "own",
        }
    }
}

/// A link as netlink shows it.
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
    /// Whether its other end is in another network namespace.
    pub peer_elsewhere: bool,
    /// The bridge, bond or VRF that it belongs to; 0: none.
    pub master: u32,
    /// Its link-layer address.
    pub mac: [u8; 6],
    /// Its MTU, bytes.
    pub mtu: u32,
}

/// What netlink tells about this network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// ifindex -> link.
    pub links: BTreeMap<u32, Link>,
    /// ifindex -> its addresses.
    pub addresses: BTreeMap<u32, BTreeSet<IpAddr>>,
    /// The devices that a default route of the main table leaves by.
    pub default_routes: BTreeSet<u32>,
}

/// A device that programs are attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its ifindex.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Its entry in the `devices` map.
    pub entry: abi::Device,
    /// Whether it is a veth.
    pub veth: bool,
}

/// What follows from the facts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// ifindex -> device, those with a role only.
    pub devices: BTreeMap<u32, Device>,
    /// Every address of the node: of all devices but edges, without loopback and link-local ones.
    pub node_addresses: BTreeSet<IpAddr>,
}

/// Finds every device's role, and the node's addresses.
///
/// `before` is the survey before this one: a veth that was the uplink does not become an
/// edge while its default route is away.
#[must_use]
pub fn survey(facts: &Facts, patterns: &Patterns, before: &Survey) -> Survey {
    let mut survey = Survey::default();
    for link in facts.links.values() {
        let was_uplink = before.devices.get(&link.index).is_some_and(|device| device.role == Role::Uplink);
        let role = role(link, facts, patterns, was_uplink);
        if let Some((role, entry)) = role.and_then(|role| Some((role, entry(link, role, facts)?))) {
            let name = link.name.clone();
            let device = Device { index: link.index, name, role, entry, veth: link.kind == "veth" };
            let _ = survey.devices.insert(link.index, device);
        }
        if role != Some(Role::Edge) {
            let addresses = facts.addresses.get(&link.index).into_iter().flatten();
            survey.node_addresses.extend(addresses.copied().filter(is_global));
        }
    }
    survey
}

/// Whether an address is more than loopback or link-local.
fn is_global(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !address.is_loopback() && !address.is_link_local() && !address.is_unspecified()
        }
        IpAddr::V6(address) => {
            !address.is_loopback() && !address.is_unicast_link_local() && !address.is_unspecified()
        }
    }
}

/// The device's entry in the map; [`None`] where we cannot tell where the IP header is.
fn entry(link: &Link, role: Role, facts: &Facts) -> Option<abi::Device> {
    let link_header = match link.layer {
        ETHERNET => 14,
        layer if WITHOUT_HEADER.contains(&layer) => 0,
        _ => return None,
    };
    let bridge = facts.links.get(&link.master).filter(|master| master.kind == "bridge");
    Some(abi::Device {
        role: role.number(),
        bridge: bridge.map_or(0, |bridge| bridge.index),
        mac: link.mac,
        link_header,
        mtu: link.mtu,
        flags: if role == Role::Edge { abi::device_flags::LOCAL_PODS } else { 0 },
        ..abi::Device::default()
    })
}

fn role(link: &Link, facts: &Facts, patterns: &Patterns, was_uplink: bool) -> Option<Role> {
    if link.loopback {
        return None;
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
    let addressed = facts.addresses.get(&link.index).is_some_and(|addresses| addresses.iter().any(is_global));
    let tunnel = FABRIC.contains(&link.kind.as_str()) || link.kind == "tun" && link.layer != ETHERNET;
    if tunnel {
        // The kernel makes a fallback device for some kinds, down until somebody uses it.
        return link.up.then_some(Role::Fabric);
    }
    if PAIRS.contains(&link.kind.as_str()) {
        return match (addressed && (routed || was_uplink), link.peer_elsewhere || bridged) {
            (true, _) => Some(Role::Uplink),
            (false, true) => Some(Role::Edge),
            (false, false) => None,
        };
    }
    match link.kind.as_str() {
        "tun" if bridged => Some(Role::Edge),
        // Ports carry frames for the bridge, which is the uplink if anything is.
        _ if bridged => None,
        "dummy" | "ifb" | "vrf" | "nlmon" => None,
        "bridge" => {
            let has_outside_port = facts.links.values().any(|port| {
                port.master == link.index && !PAIRS.contains(&port.kind.as_str()) && port.kind != "tun"
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
            layer: ETHERNET,
            up: true,
            mtu: 1500,
            ..Link::default()
        }
    }

    fn facts(links: impl IntoIterator<Item = Link>) -> Facts {
        Facts { links: links.into_iter().map(|link| (link.index, link)).collect(), ..Facts::default() }
    }

    fn with_address(mut facts: Facts, index: u32, address: &str) -> Facts {
        facts.addresses.entry(index).or_default().extend(address.parse::<IpAddr>());
        facts
    }

    fn with_default_route(mut facts: Facts, index: u32) -> Facts {
        let _ = facts.default_routes.insert(index);
        facts
    }

    fn roles(facts: &Facts) -> Vec<(String, Role)> {
        let survey = survey(facts, &Patterns::default(), &Survey::default());
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
        let veth = Link { peer_elsewhere: true, ..link(2, "veth0", "veth") };
        let facts = with_address(facts([veth]), 2, "10.1.0.1");
        assert_eq!(role_of(&facts, "veth0"), Some(Role::Edge));
        assert_eq!(survey(&facts, &Patterns::default(), &Survey::default()).node_addresses, BTreeSet::new());
    }

    #[test]
    fn a_veth_with_address_and_default_route_is_an_uplink() {
        let veth = Link { peer_elsewhere: true, ..link(2, "veth0", "veth") };
        let facts = with_default_route(with_address(facts([veth]), 2, "192.0.2.1"), 2);
        assert_eq!(role_of(&facts, "veth0"), Some(Role::Uplink));
    }

    #[test]
    fn a_veth_stays_the_uplink_while_its_default_route_is_away() {
        let veth = Link { peer_elsewhere: true, ..link(2, "veth0", "veth") };
        let mut facts = with_default_route(with_address(facts([veth]), 2, "192.0.2.1"), 2);
        let before = survey(&facts, &Patterns::default(), &Survey::default());
        facts.default_routes.clear();
        assert_eq!(survey(&facts, &Patterns::default(), &before), before);
        facts.addresses.clear();
        let after = survey(&facts, &Patterns::default(), &before);
        assert_eq!(after.devices.get(&2).map(|device| device.role), Some(Role::Edge));
    }

    #[test]
    fn a_veth_pair_of_one_namespace_is_nothing() {
        assert_eq!(roles(&facts([link(2, "a", "veth"), link(3, "b", "veth")])), []);
    }

    #[test]
    fn a_bridge_of_pods_is_not_attached_but_its_ports_are() {
        let port = Link { peer_elsewhere: true, master: 2, ..link(3, "veth0", "veth") };
        let facts = with_address(facts([link(2, "cni0", "bridge"), port]), 2, "10.1.0.1");
        assert_eq!(roles(&facts), [("veth0".to_owned(), Role::Edge)]);
        let survey = survey(&facts, &Patterns::default(), &Survey::default());
        assert_eq!(survey.devices.get(&3).map(|device| device.entry.bridge), Some(2));
    }

    #[test]
    fn a_bridge_that_carries_the_nodes_address_is_the_uplink_instead_of_its_ports() {
        let outside = Link { master: 2, ..link(3, "eth0", "") };
        let pod = Link { peer_elsewhere: true, master: 2, ..link(4, "veth0", "veth") };
        let tap = Link { master: 2, ..link(5, "tap0", "tun") };
        let facts = with_address(facts([link(2, "br0", "bridge"), outside, pod, tap]), 2, "192.0.2.1");
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
        let survey =
            survey(&facts([vxlan, wireguard, fallback, tun]), &Patterns::default(), &Survey::default());
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
        let facts =
            with_default_route(with_address(facts([link(2, "bond0", "bond"), member]), 2, "192.0.2.1"), 2);
        assert_eq!(roles(&facts), [("bond0".to_owned(), Role::Uplink)]);
    }

    #[test]
    fn patterns_decide_before_anything_else() {
        let patterns = Patterns::new(&["eth1".to_owned()], &[], &["eth2*".to_owned()]);
        let facts = facts([link(2, "eth1", ""), link(3, "eth20", ""), link(4, "eth3", "")]);
        let survey = survey(&facts, &patterns, &Survey::default());
        let roles: Vec<_> = survey.devices.values().map(|device| device.role).collect();
        assert_eq!(roles, [Role::Edge, Role::Fabric]);
    }

    #[test]
    fn loopback_is_never_attached_but_its_global_addresses_are_the_nodes() {
        let lo = Link { loopback: true, layer: 772, ..link(1, "lo", "") };
        let facts = with_address(with_address(facts([lo]), 1, "127.0.0.1"), 1, "192.0.2.9");
        let survey = survey(&facts, &Patterns::default(), &Survey::default());
        assert!(survey.devices.is_empty());
        assert_eq!(
            survey.node_addresses.into_iter().collect::<Vec<_>>(),
            ["192.0.2.9".parse::<IpAddr>().expect("an address")]
        );
    }

    #[test]
    fn a_device_with_an_unknown_link_header_is_not_attached() {
        let infiniband = Link { layer: 32, ..link(2, "ib0", "ipoib") };
        assert_eq!(roles(&with_address(facts([infiniband]), 2, "192.0.2.1")), []);
    }
}
