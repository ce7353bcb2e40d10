//! The node's own addresses: those that masquerade clients, those that serve node ports, and those
//! that are left to other software.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sluice_core::policy::Policy;

use super::{Facts, LinkAddress, OWN, Role, Rules};

/// The device on which kube-proxy's ipvs mode has every VIP; it may outlive kube-proxy.
const IPVS: &str = "kube-ipvs0";
/// The device on which NodeLocal DNSCache has the VIPs that it serves.
const NODE_LOCAL_DNS: &str = "nodelocaldns";
/// `RT_SCOPE_HOST`: invisible to other hosts.
const SCOPE_HOST: u8 = 254;

/// At most one address of each family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerFamily {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl PerFamily {
    /// Returns the first address of each family.
    #[must_use]
    pub fn first(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        addresses.into_iter().fold(Self::default(), |found, address| match address {
            IpAddr::V4(address) => Self { v4: found.v4.or(Some(address)), ..found },
            IpAddr::V6(address) => Self { v6: found.v6.or(Some(address)), ..found },
        })
    }

    /// Returns these addresses, and for a family without one that of `others`.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self { v4: self.v4.or(others.v4), v6: self.v6.or(others.v6) }
    }

    /// Returns the addresses.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }

    /// Whether an address is one of them.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.iter().any(|found| found == address)
    }
}

/// Whether an address is more than loopback or link-local.
pub(super) fn is_global(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !address.is_loopback() && !address.is_link_local() && !address.is_unspecified()
        }
        IpAddr::V6(address) => {
            !address.is_loopback() && !address.is_unicast_link_local() && !address.is_unspecified()
        }
    }
}

/// Returns the addresses that masquerade clients of backends behind a device with these addresses.
///
/// Addresses that the node is known by are preferred, then those that the kernel itself would
/// choose (not deprecated, of wide scope, primary), and among these such with a network, since an
/// address without one is often a VIP that moves. The remaining choice follows the kernel's order,
/// or for IPv6 the numerical one, since there the kernel lists the newest first.
#[must_use]
pub fn masquerade(addresses: &[LinkAddress], known: &[IpAddr]) -> PerFamily {
    let usable = |found: &&LinkAddress| {
        is_global(&found.address) && !found.unusable && found.scope < SCOPE_HOST
    };
    let mut candidates: Vec<&LinkAddress> = addresses.iter().filter(usable).collect();
    candidates.sort_by_key(|found| {
        let alone = found.prefix == if found.address.is_ipv4() { 32 } else { 128 };
        let number = match found.address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address),
        };
        let known =
            known.iter().position(|address| *address == found.address).unwrap_or(usize::MAX);
        (known, found.deprecated, found.scope, found.secondary, alone, number)
    });
    PerFamily::first(candidates.into_iter().map(|found| found.address))
}

/// Returns the node's primary address of each family: that of the flags, or else the first of the
/// Node object's that a device has, or else that of the device with the default route, of another
/// uplink, or of the loopback device.
#[must_use]
pub fn primary(facts: &Facts, roles: &BTreeMap<u32, Role>, rules: &Rules) -> PerFamily {
    let local = addresses_of_the_node(facts, roles);
    let told = rules.policy.node_addresses.iter().copied();
    let of_object = rules.node.iter().copied().filter(|address| local.contains(address));
    let uplinks = roles.iter().filter(|(_, role)| **role == Role::Uplink).map(|(index, _)| index);
    let loopback = facts.links.values().filter(|link| link.loopback).map(|link| &link.index);
    let devices = facts.default_routes.iter().chain(uplinks).chain(loopback);
    devices
        .filter_map(|device| facts.addresses.get(device))
        .map(|addresses| masquerade(addresses, &rules.node))
        .fold(PerFamily::first(told.chain(of_object)), PerFamily::or)
}

/// Returns the global addresses of all devices that belong to the node itself.
fn addresses_of_the_node(facts: &Facts, roles: &BTreeMap<u32, Role>) -> BTreeSet<IpAddr> {
    let own = facts.addresses.iter().filter(|(index, _)| {
        roles.get(index) != Some(&Role::Edge) && !holds_vips_only(facts, **index)
    });
    own.flat_map(|(_, addresses)| addresses).map(|found| found.address).filter(is_global).collect()
}

/// Whether a device only has VIPs, so that the kernel treats them as local.
fn holds_vips_only(facts: &Facts, device: u32) -> bool {
    facts.links.get(&device).is_some_and(|link| [IPVS, OWN].contains(&link.name.as_str()))
}

/// Returns every address that is local to the node, with whether node ports are served there.
///
/// Loopback and link-local addresses are included only if node ports are served there, and those of
/// an edge's link never, since each pod has such a link.
#[must_use]
pub fn local(
    facts: &Facts,
    roles: &BTreeMap<u32, Role>,
    policy: &Policy,
    primary: &PerFamily,
    left_alone: &BTreeSet<IpAddr>,
) -> BTreeMap<IpAddr, bool> {
    let of_devices = facts.addresses.iter().filter(|(index, _)| !holds_vips_only(facts, **index));
    let of_devices = of_devices.flat_map(|(index, addresses)| {
        let edge = roles.get(index) == Some(&Role::Edge);
        addresses.iter().map(move |found| (found.address, edge))
    });
    let told = policy.node_addresses.iter().map(|address| (*address, false));
    of_devices
        .chain(told)
        .filter_map(|(address, edge)| {
            let serves = policy.node_ports.includes(address, primary.contains(address))
                && !left_alone.contains(&address);
            (is_global(&address) || serves && !edge).then_some((address, serves))
        })
        .collect()
}

/// Returns the addresses that are left to other software with a device on this node: those of
/// NodeLocal DNSCache, and those that flags list.
#[must_use]
pub fn left_alone(facts: &Facts, policy: &Policy) -> BTreeSet<IpAddr> {
    let mut left = BTreeSet::new();
    for (index, addresses) in &facts.addresses {
        let dns = facts.links.get(index).is_some_and(|link| link.name == NODE_LOCAL_DNS);
        if !holds_vips_only(facts, *index) {
            let addresses = addresses.iter().map(|found| found.address);
            left.extend(addresses.filter(|address| dns || policy.leave.contains(address)));
        }
    }
    left
}

/// Returns the node's known addresses that no uplink has, each with the device that has it and its
/// role, or [`None`] if no device of this node has it.
///
/// Addresses of the loopback device or a dummy are reachable by every uplink, and those of a fabric
/// by that. An address that no device has is left out if an uplink has another one of its family,
/// since a cloud then translates it.
#[must_use]
pub fn strays(
    facts: &Facts,
    roles: &BTreeMap<u32, Role>,
    rules: &Rules,
) -> BTreeMap<IpAddr, Option<(String, Option<Role>)>> {
    let holder = |address: IpAddr| {
        let all = facts.addresses.iter();
        let mut with = all.filter(|(_, found)| found.iter().any(|found| found.address == address));
        with.find_map(|(index, _)| facts.links.get(index))
    };
    let is_found = |link: &super::Link| {
        let role = roles.get(&link.index);
        let is_of_all = link.loopback || super::DEAD_ENDS.contains(&link.kind.as_str());
        matches!(role, Some(Role::Uplink | Role::Fabric)) || role != Some(&Role::Edge) && is_of_all
    };
    let known: BTreeSet<IpAddr> =
        rules.policy.node_addresses.iter().chain(&rules.node).copied().collect();
    let has_family = |family_of: IpAddr| {
        let mut of_family = known.iter().filter(|address| address.is_ipv4() == family_of.is_ipv4());
        of_family.any(|address| holder(*address).is_some())
    };
    known
        .iter()
        .filter_map(|address| match holder(*address) {
            Some(link) if is_found(link) => None,
            Some(link) => {
                Some((*address, Some((link.name.clone(), roles.get(&link.index).copied()))))
            }
            None if has_family(*address) => None,
            None => Some((*address, None)),
        })
        .collect()
}

/// Explains what follows from an address of the node that no uplink has, and what to do.
#[must_use]
pub fn stray_problem(address: IpAddr, device: Option<&(String, Option<Role>)>) -> String {
    match device {
        None => format!(
            "no device has the node's address {address}: node ports are not served there; correct the Node object's \
             addresses, or name others by --node-addresses"
        ),
        Some((name, Some(role))) => format!(
            "the device {name} has the node's address {address} and the role {}: node ports are not served to what comes by \
             it; name it by --uplink {name}",
            role.word()
        ),
        Some((name, None)) => format!(
            "the device {name} has the node's address {address}, and no program is attached to it: clients that come by it \
             find no Service; name it by --uplink {name}, or the device that carries its packets"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::devices::Link;
    use sluice_core::policy::{NodePortAddresses, NodePorts};

    /// `10.0.0.1/24` with words: `secondary`, `deprecated`, `unusable`, `link`, `host`.
    fn address(text: &str) -> LinkAddress {
        let mut words = text.split(' ');
        let (address, prefix) =
            words.next().and_then(|word| word.split_once('/')).expect("an address");
        let words: Vec<&str> = words.collect();
        let scope = if words.contains(&"link") { 253 } else { 0 };
        LinkAddress {
            address: address.parse().expect("an address"),
            prefix: prefix.parse().expect("a length"),
            scope: if words.contains(&"host") { SCOPE_HOST } else { scope },
            secondary: words.contains(&"secondary"),
            deprecated: words.contains(&"deprecated"),
            unusable: words.contains(&"unusable"),
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| ip(text)).collect()
    }

    fn words(found: PerFamily) -> (String, String) {
        let word = |address: Option<String>| address.unwrap_or_default();
        (
            word(found.v4.map(|address| address.to_string())),
            word(found.v6.map(|address| address.to_string())),
        )
    }

    #[test]
    fn clients_are_shown_as_the_best_address_of_a_device() {
        // What the device has, what the node is known by -> IPv4, IPv6.
        let table: [(&[&str], &[&str], &str, &str); 9] = [
            (&[], &[], "", ""),
            (
                &["127.0.0.1/8 host", "169.254.1.1/16", "::1/128 host", "fe80::1/64 link"],
                &[],
                "",
                "",
            ),
            (&["10.0.0.2/24", "10.0.0.1/24 secondary", "10.1.0.1/24"], &[], "10.0.0.2", ""),
            (&["10.0.0.1/24 deprecated", "10.1.0.1/24"], &[], "10.1.0.1", ""),
            (&["10.0.0.1/24 link", "10.1.0.1/24"], &[], "10.1.0.1", ""),
            // A VIP that keepalived put there before the device got its own.
            (&["10.0.0.9/32", "10.0.0.1/24"], &[], "10.0.0.1", ""),
            (&["10.244.1.0/32"], &[], "10.244.1.0", ""),
            (
                &[
                    "2001:db8::9/64",
                    "2001:db8::2/64",
                    "2001:db8::1/64 secondary",
                    "2001:db8::/64 unusable",
                ],
                &[],
                "",
                "2001:db8::2",
            ),
            (
                &[
                    "10.0.0.1/24",
                    "10.0.0.2/24 secondary",
                    "2001:db8::1/64",
                    "2001:db8::2/128 deprecated",
                ],
                &["192.0.2.1", "2001:db8::2", "10.0.0.2"],
                "10.0.0.2",
                "2001:db8::2",
            ),
        ];
        for (addresses, known, v4, v6) in table {
            let addresses: Vec<LinkAddress> = addresses.iter().map(|text| address(text)).collect();
            let found = masquerade(&addresses, &ips(known));
            assert_eq!(words(found), (v4.to_owned(), v6.to_owned()), "{addresses:?}");
        }
    }

    /// A node: loopback, two uplinks of which the second has the default route, a pod's link, a
    /// bridge of pods.
    fn node() -> (Facts, BTreeMap<u32, Role>) {
        let devices: [(u32, &str, Option<Role>, &[&str]); 5] = [
            (1, "lo", None, &["127.0.0.1/8 host", "::1/128 host", "198.51.100.1/32"]),
            (2, "eth0", Some(Role::Uplink), &["10.0.0.1/24", "fd00::1/64", "fe80::1/64 link"]),
            (3, "eth1", Some(Role::Uplink), &["192.0.2.1/24", "192.0.2.2/24 secondary"]),
            (4, "veth0", Some(Role::Edge), &["10.244.1.1/32", "fe80::2/64 link"]),
            (5, "cni0", None, &["10.244.2.1/24"]),
        ];
        let mut facts = Facts { default_routes: BTreeSet::from([3]), ..Facts::default() };
        let mut roles = BTreeMap::new();
        for (index, name, role, addresses) in devices {
            add(&mut facts, index, name, addresses);
            roles.extend(role.map(|role| (index, role)));
        }
        (facts, roles)
    }

    fn add(facts: &mut Facts, index: u32, name: &str, addresses: &[&str]) {
        let link = Link { index, name: name.to_owned(), loopback: name == "lo", ..Link::default() };
        let _ = facts.links.insert(index, link);
        let _ = facts.addresses.insert(index, addresses.iter().map(|text| address(text)).collect());
    }

    #[test]
    fn the_primary_address_is_as_told_else_the_nodes_else_that_of_the_default_route() {
        let (facts, roles) = node();
        // --node-addresses, the Node object's -> IPv4, IPv6.
        let table: [(&[&str], &[&str], &str, &str); 6] = [
            (&[], &[], "192.0.2.1", "fd00::1"),
            (&[], &["10.0.0.1"], "10.0.0.1", "fd00::1"),
            (&[], &["192.0.2.2"], "192.0.2.2", "fd00::1"),
            // No device has it (a cloud translates it), or only a pod's link.
            (&[], &["203.0.113.7", "10.244.1.1"], "192.0.2.1", "fd00::1"),
            (&[], &["198.51.100.1"], "198.51.100.1", "fd00::1"),
            (&["203.0.113.7"], &["10.0.0.1"], "203.0.113.7", "fd00::1"),
        ];
        for (told, object, v4, v6) in table {
            let policy = Policy { node_addresses: ips(told), ..Policy::default() };
            let rules = Rules { policy, node: ips(object), ..Rules::default() };
            let found = primary(&facts, &roles, &rules);
            assert_eq!(words(found), (v4.to_owned(), v6.to_owned()), "{told:?} {object:?}");
        }
    }

    #[test]
    fn without_any_uplink_the_loopback_device_has_the_primary_address() {
        let (mut facts, _) = node();
        facts.default_routes.clear();
        let found = primary(&facts, &BTreeMap::new(), &Rules::default());
        assert_eq!(words(found), ("198.51.100.1".to_owned(), String::new()));
    }

    #[test]
    fn every_local_address_is_listed_with_whether_node_ports_are_served() {
        let (mut facts, roles) = node();
        add(&mut facts, 6, "kube-ipvs0", &["10.96.0.1/32"]);
        add(&mut facts, 7, "nodelocaldns", &["10.96.0.10/32", "169.254.20.10/32"]);
        let global = [
            "10.0.0.1",
            "10.96.0.10",
            "10.244.1.1",
            "10.244.2.1",
            "192.0.2.1",
            "192.0.2.2",
            "198.51.100.1",
            "fd00::1",
        ];
        let table: [(&str, &[&str], &[&str]); 4] = [
            ("primary", &[], &["192.0.2.1", "fd00::1"]),
            (
                "all",
                &["fe80::1"],
                &[
                    "10.0.0.1",
                    "10.244.1.1",
                    "10.244.2.1",
                    "192.0.2.1",
                    "192.0.2.2",
                    "198.51.100.1",
                    "fd00::1",
                    "fe80::1",
                ],
            ),
            ("localhost", &["127.0.0.1", "::1"], &["127.0.0.1", "::1"]),
            (
                "10.0.0.0/8,fe80::/10",
                &["fe80::1"],
                &["10.0.0.1", "10.244.1.1", "10.244.2.1", "fe80::1"],
            ),
        ];
        for (list, more, serving) in table {
            let elements =
                list.split(',').map(|text| text.parse::<NodePortAddresses>().expect("an element"));
            let policy =
                Policy { node_ports: NodePorts::new(elements.collect()), ..Policy::default() };
            let left = left_alone(&facts, &policy);
            let found = local(
                &facts,
                &roles,
                &policy,
                &PerFamily::first(ips(&["192.0.2.1", "fd00::1"])),
                &left,
            );
            let expected: BTreeMap<IpAddr, bool> = global
                .iter()
                .chain(more)
                .map(|address| (ip(address), serving.contains(address)))
                .collect();
            assert_eq!(found, expected, "{list}");
        }
    }

    #[test]
    fn an_address_that_no_device_has_is_local_if_a_person_says_so() {
        let (facts, roles) = node();
        let policy = Policy { node_addresses: ips(&["203.0.113.7"]), ..Policy::default() };
        let rules = Rules { policy, ..Rules::default() };
        let first = primary(&facts, &roles, &rules);
        let found = local(&facts, &roles, &rules.policy, &first, &BTreeSet::new());
        assert_eq!(found.get(&ip("203.0.113.7")), Some(&true));
        assert_eq!(found.get(&ip("192.0.2.1")), Some(&false));
    }

    #[test]
    fn a_node_address_that_no_uplink_has_is_astray() {
        let (mut facts, roles) = node();
        add(&mut facts, 6, "ib0", &["192.0.2.6/24"]);
        add(&mut facts, 7, "dummy0", &["192.0.2.7/32"]);
        if let Some(link) = facts.links.get_mut(&7) {
            link.kind = "dummy".to_owned();
        }
        // Addresses of the Node object -> those that are astray, with their devices.
        let table = [
            ("", ""),
            ("10.0.0.1 192.0.2.1 fd00::1 198.51.100.1 192.0.2.7", ""),
            ("10.244.1.1", "10.244.1.1 on veth0"),
            ("10.0.0.1 192.0.2.6", "192.0.2.6 on ib0"),
            // A cloud translates it.
            ("10.0.0.1 203.0.113.7", ""),
            ("203.0.113.7 fd00::1", "203.0.113.7 on none"),
        ];
        for (object, expected) in table {
            let rules = Rules {
                node: ips(&object.split_whitespace().collect::<Vec<_>>()),
                ..Rules::default()
            };
            let found: Vec<String> = strays(&facts, &roles, &rules)
                .into_iter()
                .map(|(address, device)| {
                    format!("{address} on {}", device.map_or("none".to_owned(), |(name, _)| name))
                })
                .collect();
            assert_eq!(found.join(","), expected, "{object}");
        }
    }

    #[test]
    fn addresses_of_node_local_dns_and_listed_ones_are_left_alone_where_a_device_has_them() {
        let (mut facts, _) = node();
        let policy = Policy {
            leave: ips(&["10.96.0.10", "10.96.0.11", "192.0.2.2"]).into_iter().collect(),
            ..Policy::default()
        };
        let left = |facts: &Facts, policy: &Policy| {
            left_alone(facts, policy).into_iter().collect::<Vec<_>>()
        };
        assert_eq!(left(&facts, &policy), ips(&["192.0.2.2"]));
        add(&mut facts, 6, "kube-ipvs0", &["10.96.0.10/32"]);
        add(&mut facts, 7, "sluice0", &["10.96.0.11/32"]);
        assert_eq!(left(&facts, &policy), ips(&["192.0.2.2"]));
        add(&mut facts, 8, "nodelocaldns", &["10.96.0.10/32", "169.254.20.10/32"]);
        assert_eq!(left(&facts, &Policy::default()), ips(&["10.96.0.10", "169.254.20.10"]));
    }
}
