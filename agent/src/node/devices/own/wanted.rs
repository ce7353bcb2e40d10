//! Determines the routes of our own device: a pure function of the VIPs and of all foreign routes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

/// The VIPs that processes of this host may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vips {
    /// ClusterIPs. No machine has such an address, so any route to it may be ours.
    pub cluster: BTreeSet<IpAddr>,
    /// Addresses of load balancers and external IPs. A machine may have such an address and serve
    /// ports that no Service has: with k3s' load balancer these are the addresses of the nodes.
    pub external: BTreeSet<IpAddr>,
}

impl Vips {
    /// Whether a network contains a VIP.
    pub(super) fn touch(&self, network: &IpNet) -> bool {
        let range = network.network()..=network.broadcast();
        [&self.cluster, &self.external]
            .iter()
            .any(|vips| vips.range(range.clone()).next().is_some())
    }
}

/// The next hop of a route: a device, and the gateway behind it, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Hop {
    pub(super) device: u32,
    pub(super) gateway: Option<IpAddr>,
}

/// A foreign route.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Other {
    metric: u32,
    /// The next hops; if empty, the route refuses or drops packets.
    hops: Vec<Hop>,
}

/// Networks that are looked up by the addresses in them.
#[derive(Clone, Debug)]
struct Prefixes<T> {
    known: BTreeMap<IpNet, T>,
    /// The lengths of their prefixes.
    lengths: BTreeSet<u8>,
}

impl<T> Default for Prefixes<T> {
    fn default() -> Self {
        Self { known: BTreeMap::new(), lengths: BTreeSet::new() }
    }
}

impl<T> Prefixes<T> {
    fn insert(&mut self, network: IpNet, value: T) {
        let _ = self.lengths.insert(network.prefix_len());
        let _ = self.known.insert(network.trunc(), value);
    }

    /// Returns the longest network that contains an address.
    fn longest(&self, address: IpAddr) -> Option<(&IpNet, &T)> {
        self.lengths.iter().rev().find_map(|length| {
            let network = IpNet::new(address, *length).ok()?.trunc();
            self.known.get_key_value(&network)
        })
    }
}

/// The foreign routes in the main table that lead to VIPs, and the networks that are local to this
/// host.
#[derive(Clone, Debug, Default)]
pub(super) struct Others {
    routes: Prefixes<Other>,
    local: Prefixes<()>,
    /// Devices that drop whatever they send.
    dead_ends: BTreeSet<u32>,
    /// Neighbours that do not answer, by device.
    pub(super) silent: BTreeSet<(u32, IpAddr)>,
}

impl Others {
    /// Creates it without routes, with these devices and neighbours that lead nowhere.
    pub(super) fn new(dead_ends: BTreeSet<u32>, silent: BTreeSet<(u32, IpAddr)>) -> Self {
        Self { dead_ends, silent, ..Self::default() }
    }

    /// Adds a network whose addresses are this host's own.
    pub(super) fn add_local(&mut self, network: IpNet) {
        self.local.insert(network, ());
    }

    /// Adds a route of the main table. Of two routes to one network, the lower metric counts.
    pub(super) fn add(&mut self, to: IpNet, metric: u32, hops: Vec<Hop>) {
        if self.routes.known.get(&to).is_none_or(|known| metric < known.metric) {
            self.routes.insert(to, Other { metric, hops });
        }
    }

    /// Whether an address is this host's own. Local routes precede all others.
    pub(super) fn is_local(&self, address: IpAddr) -> bool {
        self.local.longest(address).is_some()
    }

    /// Returns the route to an address that the kernel would choose without ours.
    fn best(&self, address: IpAddr) -> Option<(&IpNet, &Other)> {
        self.routes.longest(address)
    }

    /// Whether there is a foreign route to an address.
    pub(super) fn has_route(&self, address: IpAddr) -> bool {
        self.best(address).is_some()
    }

    /// Whether packets to an address never leave the host by a route.
    fn leads_nowhere(&self, other: &Other, address: IpAddr) -> bool {
        let is_silent =
            |hop: &Hop| self.silent.contains(&(hop.device, hop.gateway.unwrap_or(address)));
        other.hops.iter().all(|hop| self.dead_ends.contains(&hop.device) || is_silent(hop))
    }

    /// Returns the neighbours that packets to external VIPs wait for.
    pub(super) fn awaited(&self, vips: &Vips) -> BTreeSet<(u32, IpAddr)> {
        let hops = |vip: &IpAddr| {
            let hops = self.best(*vip).map_or(&[][..], |(_, other)| &other.hops);
            hops.iter().map(|hop| (hop.device, hop.gateway.unwrap_or(*vip))).collect::<Vec<_>>()
        };
        vips.external.iter().filter(|vip| !self.is_local(**vip)).flat_map(hops).collect()
    }
}

/// Returns the networks to which our device has a route.
///
/// They cover every ClusterIP, so that the host's other routes do not matter: by the network of
/// Services that contains it, unless there is a longer foreign route. They include an external VIP
/// only while no foreign route leads there.
pub(super) fn wanted(vips: &Vips, networks: &[IpNet], others: &Others) -> BTreeSet<IpNet> {
    let mut wanted = BTreeSet::new();
    for vip in vips.cluster.iter().filter(|vip| !others.is_local(**vip)) {
        let length = others.best(*vip).map_or(0, |(to, _)| to.prefix_len());
        let network =
            networks.iter().find(|network| network.contains(vip) && network.prefix_len() > length);
        let _ = wanted.insert(network.copied().unwrap_or_else(|| IpNet::from(*vip)));
    }
    for vip in vips.external.iter().filter(|vip| !others.is_local(**vip)) {
        if others.best(*vip).is_none_or(|(_, other)| others.leads_nowhere(other, *vip)) {
            let _ = wanted.insert(IpNet::from(*vip));
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("a network")
    }

    fn vips(cluster: &[&str], external: &[&str]) -> Vips {
        let set = |texts: &[&str]| texts.iter().map(|text| ip(text)).collect();
        Vips { cluster: set(cluster), external: set(external) }
    }

    /// Routes as `network metric device gateway`; without a device what they take is dropped.
    fn others(routes: &[&str]) -> Others {
        let mut others = Others { dead_ends: BTreeSet::from([9]), ..Others::default() };
        for route in routes {
            let words: Vec<&str> = route.split(' ').collect();
            let hop = words.get(2).map(|device| Hop {
                device: device.parse().expect("a device"),
                gateway: words.get(3).map(|gateway| ip(gateway)),
            });
            others.add(
                net(words[0]),
                words[1].parse().expect("a metric"),
                hop.into_iter().collect(),
            );
        }
        others
    }

    fn shown(vips: &Vips, networks: &[&str], others: &Others) -> Vec<String> {
        let networks: Vec<IpNet> = networks.iter().map(|text| net(text)).collect();
        wanted(vips, &networks, others).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_cluster_ip_is_routed_by_us_whatever_other_routes_there_are() {
        let vips = vips(&["10.96.0.1", "10.96.0.10", "10.200.0.1", "fd00::1"], &[]);
        let networks = ["10.96.0.0/12", "fd00::/108"];
        let tables: [&[&str]; 3] = [
            &[],
            &["0.0.0.0/0 0 2 192.0.2.1", "::/0 1024 9", "10.0.0.0/8 0"],
            &["10.96.0.0/11 0 2 192.0.2.1"],
        ];
        for routes in tables {
            let found = shown(&vips, &networks, &others(routes));
            assert_eq!(found, ["10.96.0.0/12", "10.200.0.1/32", "fd00::/108"], "{routes:?}");
        }
    }

    #[test]
    fn a_closer_route_of_somebody_else_is_met_by_one_that_is_closer_still() {
        let vips = vips(&["10.96.0.1", "10.96.7.1"], &[]);
        let networks = ["10.96.0.0/12"];
        // The same network: theirs stays, and is not asked.
        assert_eq!(
            shown(&vips, &networks, &others(&["10.96.0.0/12 0"])),
            ["10.96.0.1/32", "10.96.7.1/32"]
        );
        let part = others(&["10.96.7.0/24 20 2 192.0.2.1"]);
        assert_eq!(shown(&vips, &networks, &part), ["10.96.0.0/12", "10.96.7.1/32"]);
    }

    #[test]
    fn what_this_host_has_itself_is_left_to_it() {
        let vips = vips(&["10.96.0.1"], &["198.51.100.1"]);
        let mut others = Others::default();
        others.add_local(net("10.96.0.1/32"));
        others.add_local(net("198.51.100.1/32"));
        assert_eq!(shown(&vips, &["10.96.0.0/12"], &others), [""; 0]);
    }

    #[test]
    fn an_external_vip_is_routed_by_us_only_while_nothing_else_leads_there() {
        let vips = vips(&[], &["198.51.100.1"]);
        let ours = ["198.51.100.1/32"];
        let table: [(&[&str], bool); 7] = [
            (&[], true),
            (&["0.0.0.0/0 0 2 192.0.2.1"], false),
            (&["0.0.0.0/0 0 9"], true),
            (&["0.0.0.0/0 0 9", "198.51.100.0/24 0 2"], false),
            (&["0.0.0.0/0 0 2 192.0.2.1", "198.51.100.0/24 0"], true),
            (&["0.0.0.0/0 5 9", "0.0.0.0/0 1 2 192.0.2.1"], false),
            (&["10.0.0.0/8 0 2"], true),
        ];
        for (routes, is_ours) in table {
            let expected = if is_ours { &ours[..] } else { &[] };
            assert_eq!(shown(&vips, &["198.51.100.0/24"], &others(routes)), expected, "{routes:?}");
        }
    }

    #[test]
    fn an_external_vip_whose_next_hop_is_nobody_is_routed_by_us() {
        let vips = vips(&[], &["198.51.100.1", "192.0.2.77"]);
        let mut others = others(&["0.0.0.0/0 0 2 192.0.2.1", "192.0.2.0/24 0 2"]);
        assert_eq!(shown(&vips, &[], &others), [""; 0]);
        others.silent = BTreeSet::from([(2, ip("192.0.2.1"))]);
        assert_eq!(shown(&vips, &[], &others), ["198.51.100.1/32"]);
        others.silent = BTreeSet::from([(2, ip("192.0.2.77")), (3, ip("192.0.2.1"))]);
        assert_eq!(shown(&vips, &[], &others), ["192.0.2.77/32"]);
        let awaited = [(2, ip("192.0.2.1")), (2, ip("192.0.2.77"))];
        assert_eq!(others.awaited(&vips), BTreeSet::from(awaited));
    }

    #[test]
    fn one_good_hop_of_several_is_enough() {
        let vips = vips(&[], &["198.51.100.1"]);
        let hop = |device| Hop { device, gateway: None };
        let mut others = others(&[]);
        others.add(net("0.0.0.0/0"), 0, vec![hop(9), hop(2)]);
        assert_eq!(shown(&vips, &[], &others), [""; 0]);
    }
}
