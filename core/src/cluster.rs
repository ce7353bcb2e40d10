//! Derives the programs' settings and networks from what the sources say about this node and the
//! cluster.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use sluice_common::abi::{self, Ipv4Address, Ipv6Address, Networks, PREFIXES, Prefix, Settings};

use crate::model::object::NodeSpec;
use crate::model::{Change, Event, SourceId};
use crate::policy::{Accelerate, DetectLocal, Policy};

/// Our Node and the ServiceCIDRs, by source. If two sources have the same object, the first counts.
#[derive(Clone, Debug)]
pub struct Cluster {
    name: Arc<str>,
    nodes: BTreeMap<SourceId, NodeSpec>,
    service_cidrs: BTreeMap<(Arc<str>, SourceId), Vec<IpNet>>,
    /// The state that an earlier agent left in the maps, until the sources have delivered
    /// everything.
    adopted: Option<Box<Adopted>>,
}

/// The state that an earlier agent left in the maps. It applies until the sources have delivered
/// everything, however long the API server is unreachable.
#[derive(Clone, Debug, Default)]
pub struct Adopted {
    /// The settings and networks that it wrote, if it did.
    pub programmed: Option<Programmed>,
    /// The node's primary addresses.
    pub node: Vec<IpAddr>,
}

/// The settings and networks that every program reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Programmed {
    /// The settings.
    pub settings: Settings,
    /// The networks of IPv4.
    pub v4: Networks<Ipv4Address>,
    /// The networks of IPv6.
    pub v6: Networks<Ipv6Address>,
}

impl Programmed {
    /// Returns the networks of Services' addresses.
    pub fn service_networks(&self) -> Vec<IpNet> {
        let v4 = self.v4.services.iter().filter(|prefix| **prefix != prefix_v4(None)).filter_map(
            |prefix| {
                let (network, mask) = (prefix.network.octets, prefix.mask.octets);
                IpNet::with_netmask(IpAddr::from(network), IpAddr::from(mask)).ok()
            },
        );
        let v6 = self.v6.services.iter().filter(|prefix| **prefix != prefix_v6(None)).filter_map(
            |prefix| {
                let (network, mask) = (prefix.network.octets, prefix.mask.octets);
                IpNet::with_netmask(IpAddr::from(network), IpAddr::from(mask)).ok()
            },
        );
        v4.chain(v6).collect()
    }
}

impl Cluster {
    /// Creates a cluster of which only what an earlier agent has left is known, and the node's
    /// name.
    pub fn new(name: &str, adopted: Adopted) -> Self {
        let adopted = Some(Box::new(adopted));
        Self { name: name.into(), nodes: BTreeMap::new(), service_cidrs: BTreeMap::new(), adopted }
    }

    /// Notes that every source has delivered its first full list, so that what is missing does not
    /// exist. Returns whether that is new.
    pub fn complete(&mut self) -> bool {
        self.adopted.take().is_some()
    }

    /// Applies an event, and returns whether it changed the node or networks.
    pub fn apply(&mut self, event: &Event) -> bool {
        match &event.change {
            Change::Node(name, spec) if *name == self.name => {
                let before = match spec {
                    Some(spec) => self.nodes.insert(event.source, spec.clone()),
                    None => self.nodes.remove(&event.source),
                };
                before != *spec
            }
            Change::ServiceCidr(name, networks) => {
                let key = (name.clone(), event.source);
                let before = match networks {
                    Some(networks) => self.service_cidrs.insert(key, networks.clone()),
                    None => self.service_cidrs.remove(&key),
                };
                before != *networks
            }
            Change::Node(..)
            | Change::Service(..)
            | Change::Slice(..)
            | Change::Notes(..)
            | Change::Synced => false,
        }
    }

    /// Returns our Node.
    fn node(&self) -> Option<&NodeSpec> {
        self.nodes.values().next()
    }

    /// Returns our Node's addresses, internal ones first.
    pub fn node_addresses(&self) -> Vec<IpAddr> {
        let adopted = || self.adopted.as_ref().map(|adopted| adopted.node.clone());
        self.node().map(|node| node.addresses.clone()).or_else(adopted).unwrap_or_default()
    }

    /// Whether our Node is about to be deleted.
    pub fn is_leaving(&self) -> bool {
        self.node().is_some_and(|node| node.leaving)
    }

    /// Returns the networks of Services' addresses.
    fn service_networks(&self, policy: &Policy) -> Vec<IpNet> {
        if !policy.service_cidrs.is_empty() {
            return policy.service_cidrs.clone();
        }
        let mut networks = Vec::new();
        let mut seen: Option<&Arc<str>> = None;
        for ((name, _), found) in &self.service_cidrs {
            if seen != Some(name) {
                networks.extend(found);
            }
            seen = Some(name);
        }
        IpNet::aggregate(&networks)
    }

    /// Returns the networks of pods' addresses that decide which clients are local.
    fn pod_networks(&self, policy: &Policy) -> Vec<IpNet> {
        match policy.detect_local {
            DetectLocal::NodeCidr => {
                self.node().map(|node| node.pod_cidrs.clone()).unwrap_or_default()
            }
            DetectLocal::ClusterCidr
            | DetectLocal::Device
            | DetectLocal::BridgeInterface(_)
            | DetectLocal::InterfaceNamePrefix(_)
            | DetectLocal::None => policy.cluster_cidrs.clone(),
        }
    }

    /// Returns the settings and networks of the programs, and the networks for which there is no
    /// room. `settings` are those that do not depend on the cluster.
    pub fn programmed(&self, policy: &Policy, settings: Settings) -> (Programmed, Vec<IpNet>) {
        let mut surplus = Vec::new();
        let pods = self.pod_networks(policy);
        let (pods_v4, pods_v6) = prefixes(&pods, &mut surplus);
        let services = self.service_networks(policy);
        let (services_v4, services_v6) = prefixes(&services, &mut surplus);
        let mut programmed = Programmed {
            settings: Settings {
                masquerade: policy.masquerade.number(),
                detect_local: policy.detect_local.number(),
                networks: families(&services, SERVICES)
                    | families(&pods, PODS)
                    | accelerated(policy.accelerate, settings.networks),
                ..settings
            },
            v4: Networks { pods: pods_v4, services: services_v4 },
            v6: Networks { pods: pods_v6, services: services_v6 },
        };
        if let Some(adopted) = self.adopted.as_ref().and_then(|adopted| adopted.programmed.as_ref())
        {
            if policy.detect_local == DetectLocal::NodeCidr && self.node().is_none() {
                (programmed.v4.pods, programmed.v6.pods) = (adopted.v4.pods, adopted.v6.pods);
                programmed.settings.networks |= adopted.settings.networks & (PODS[0] | PODS[1]);
            }
            if services.is_empty() {
                programmed.v4.services = adopted.v4.services;
                programmed.v6.services = adopted.v6.services;
                let bits = SERVICES[0] | SERVICES[1];
                programmed.settings.networks |= adopted.settings.networks & bits;
            }
        }
        (programmed, surplus)
    }
}

/// The bits for Services' networks of IPv4 and of IPv6.
const SERVICES: [u32; 2] = [abi::networks::SERVICES_V4, abi::networks::SERVICES_V6];
const PODS: [u32; 2] = [abi::networks::PODS_V4, abi::networks::PODS_V6];

/// Returns the bits that say whether packets go around the stack, given the present ones.
fn accelerated(accelerate: Accelerate, bits: u32) -> u32 {
    match (accelerate, bits & abi::networks::IPSEC) {
        (Accelerate::Off, _) => 0,
        (Accelerate::On, 0) => abi::networks::ACCELERATE,
        (Accelerate::On, ipsec) => ipsec,
    }
}

/// Returns the bits of the families that have networks.
fn families(networks: &[IpNet], [v4, v6]: [u32; 2]) -> u32 {
    networks
        .iter()
        .fold(0, |bits, network| bits | if network.network().is_ipv4() { v4 } else { v6 })
}

/// Converts networks to prefixes for the programs. Networks without room are added to `surplus`.
fn prefixes(
    networks: &[IpNet],
    surplus: &mut Vec<IpNet>,
) -> ([Prefix<Ipv4Address>; PREFIXES], [Prefix<Ipv6Address>; PREFIXES]) {
    let mut v4 = [prefix_v4(None); PREFIXES];
    let mut v6 = [prefix_v6(None); PREFIXES];
    let (mut free_v4, mut free_v6) = (v4.iter_mut(), v6.iter_mut());
    for network in networks {
        let done = match network {
            IpNet::V4(network) => free_v4.next().map(|free| *free = prefix_v4(Some(*network))),
            IpNet::V6(network) => free_v6.next().map(|free| *free = prefix_v6(Some(*network))),
        };
        if done.is_none() {
            surplus.push(*network);
        }
    }
    (v4, v6)
}

/// Converts a network to a prefix; [`None`] becomes a prefix that no address matches.
fn prefix_v4(network: Option<Ipv4Net>) -> Prefix<Ipv4Address> {
    match network {
        Some(network) => {
            Prefix { network: network.network().into(), mask: network.netmask().into() }
        }
        None => Prefix { network: Ipv4Address { octets: [0xff; 4] }, mask: Ipv4Address::default() },
    }
}

/// Converts a network to a prefix, as [`prefix_v4`] does.
fn prefix_v6(network: Option<Ipv6Net>) -> Prefix<Ipv6Address> {
    match network {
        Some(network) => {
            Prefix { network: network.network().into(), mask: network.netmask().into() }
        }
        None => {
            Prefix { network: Ipv6Address { octets: [0xff; 16] }, mask: Ipv6Address::default() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_accelerated_unless_asked_for_nor_beside_ipsec() {
        const IPSEC: u32 = abi::networks::IPSEC;
        const ACCELERATE: u32 = abi::networks::ACCELERATE;
        for (accelerate, before, bits) in [
            (Accelerate::Off, 0, 0),
            (Accelerate::Off, IPSEC | ACCELERATE, 0),
            (Accelerate::On, 0, ACCELERATE),
            (Accelerate::On, ACCELERATE, ACCELERATE),
            (Accelerate::On, IPSEC, IPSEC),
        ] {
            assert_eq!(accelerated(accelerate, before), bits, "{accelerate:?}, {before}");
        }
    }
    use crate::policy::{Masquerade, cidr};

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| cidr(text).expect("a CIDR")).collect()
    }

    fn service_cidr(source: SourceId, name: &str, networks: &[&str]) -> Event {
        Event { source, change: Change::ServiceCidr(name.into(), Some(nets(networks))) }
    }

    fn node(name: &str, pods: &[&str]) -> Event {
        let spec = NodeSpec { pod_cidrs: nets(pods), ..NodeSpec::default() };
        Event { source: SourceId::Kubernetes, change: Change::Node(name.into(), Some(spec)) }
    }

    /// Prefixes as CIDRs again, in both families, without those that match nothing.
    fn shown(v4: &[Prefix<Ipv4Address>], v6: &[Prefix<Ipv6Address>]) -> Vec<String> {
        let v4 = v4.iter().filter(|prefix| **prefix != prefix_v4(None)).map(|prefix| {
            let length = u32::from_be_bytes(prefix.mask.octets).count_ones();
            format!("{}/{length}", std::net::Ipv4Addr::from(prefix.network))
        });
        let v6 = v6.iter().filter(|prefix| **prefix != prefix_v6(None)).map(|prefix| {
            let length = u128::from_be_bytes(prefix.mask.octets).count_ones();
            format!("{}/{length}", std::net::Ipv6Addr::from(prefix.network))
        });
        v4.chain(v6).collect()
    }

    fn matches(prefix: Prefix<Ipv4Address>, address: [u8; 4]) -> bool {
        let masked = u32::from_be_bytes(address) & u32::from_be_bytes(prefix.mask.octets);
        masked == u32::from_be_bytes(prefix.network.octets)
    }

    #[test]
    fn an_unused_prefix_matches_nothing_and_a_zero_one_everything() {
        for address in [[0; 4], [10, 0, 0, 1], [255; 4]] {
            assert!(!matches(prefix_v4(None), address));
            let all = nets(&["0.0.0.0/0"]);
            assert!(matches(prefixes(&all, &mut Vec::new()).0[0], address));
        }
    }

    #[test]
    fn what_a_person_decided_reaches_the_programs() {
        let policy = Policy {
            masquerade: Masquerade::KubeProxy,
            detect_local: DetectLocal::ClusterCidr,
            cluster_cidrs: nets(&["10.244.0.0/16", "fd01::/48"]),
            service_cidrs: nets(&["10.96.0.0/12"]),
            ..Policy::default()
        };
        let given = Settings { host_netns: 7, socket_path: 2, ..Settings::default() };
        let (told, surplus) = Cluster::new("a", Adopted::default()).programmed(&policy, given);
        let expected = Settings {
            masquerade: abi::masquerade::KUBE_PROXY,
            detect_local: abi::detect_local::ADDRESS,
            networks: abi::networks::SERVICES_V4 | abi::networks::PODS_V4 | abi::networks::PODS_V6,
            ..given
        };
        assert_eq!(told.settings, expected);
        assert_eq!(shown(&told.v4.pods, &told.v6.pods), ["10.244.0.0/16", "fd01::/48"]);
        assert_eq!(shown(&told.v4.services, &told.v6.services), ["10.96.0.0/12"]);
        assert_eq!(surplus, []);
    }

    #[test]
    fn the_nodes_pod_networks_come_with_the_node_and_change_with_it() {
        let policy = Policy { detect_local: DetectLocal::NodeCidr, ..Policy::default() };
        let mut cluster = Cluster::new("a", Adopted::default());
        let pods = |cluster: &Cluster| {
            let (told, _) = cluster.programmed(&policy, Settings::default());
            shown(&told.v4.pods, &told.v6.pods)
        };
        assert_eq!(pods(&cluster), [""; 0]);
        assert!(!cluster.apply(&node("b", &["10.244.2.0/24"])), "another node");
        assert!(cluster.apply(&node("a", &["10.244.1.0/24"])));
        assert!(!cluster.apply(&node("a", &["10.244.1.0/24"])), "nothing new");
        assert_eq!(pods(&cluster), ["10.244.1.0/24"]);
        assert!(cluster.apply(&node("a", &["10.244.3.0/24", "fd01::/64"])));
        assert_eq!(pods(&cluster), ["10.244.3.0/24", "fd01::/64"]);
    }

    #[test]
    fn what_an_earlier_agent_told_holds_until_the_sources_are_heard() {
        let policy = Policy { detect_local: DetectLocal::NodeCidr, ..Policy::default() };
        let told =
            |cluster: &Cluster, policy: &Policy| cluster.programmed(policy, Settings::default()).0;
        let mut earlier = Cluster::new("a", Adopted::default());
        assert!(earlier.apply(&node("a", &["10.244.1.0/24"])));
        assert!(earlier.apply(&service_cidr(SourceId::Kubernetes, "x", &["10.96.0.0/12"])));
        let adopted = told(&earlier, &policy);
        let nothing = told(&Cluster::new("a", Adopted::default()), &policy);

        let primary = vec![IpAddr::from([192, 0, 2, 1])];
        let left = Adopted { programmed: Some(adopted), node: primary.clone() };
        let mut cluster = Cluster::new("a", left.clone());
        assert_eq!((told(&cluster, &policy), cluster.node_addresses()), (adopted, primary));
        assert!(cluster.apply(&node("a", &["10.244.2.0/24"])));
        assert_eq!(cluster.node_addresses(), [] as [IpAddr; 0]);
        let shown_pods = |told: Programmed| shown(&told.v4.pods, &told.v6.pods);
        assert_eq!(shown_pods(told(&cluster, &policy)), ["10.244.2.0/24"]);
        assert_eq!(told(&cluster, &policy).v4.services, adopted.v4.services);
        // A flag needs no source.
        let flags = Policy { service_cidrs: nets(&["10.0.0.0/24"]), ..Policy::default() };
        assert_eq!(shown(&told(&cluster, &flags).v4.services, &[]), ["10.0.0.0/24"]);
        assert_eq!(shown_pods(told(&cluster, &flags)), [""; 0]);
        assert!(cluster.complete() && !cluster.complete());
        assert_eq!(told(&cluster, &policy).v4.services, nothing.v4.services);
        assert_eq!(told(&cluster, &policy).settings.networks, abi::networks::PODS_V4);

        let mut nobody = Cluster::new("a", left);
        assert!(nobody.complete());
        assert_eq!((told(&nobody, &policy), nobody.node_addresses()), (nothing, Vec::new()));
    }

    #[test]
    fn networks_of_services_are_the_flags_else_those_of_the_objects_joined() {
        let mut cluster = Cluster::new("a", Adopted::default());
        let services = |cluster: &Cluster, policy: &Policy| {
            let (told, surplus) = cluster.programmed(policy, Settings::default());
            (shown(&told.v4.services, &told.v6.services), told.settings.networks, surplus.len())
        };
        let texts =
            |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let both = abi::networks::SERVICES_V4 | abi::networks::SERVICES_V6;
        assert_eq!(services(&cluster, &Policy::default()), (texts(&[]), 0, 0));
        assert!(cluster.apply(&service_cidr(
            SourceId::Kubernetes,
            "x",
            &["10.96.0.0/13", "fd00::/112"]
        )));
        assert!(cluster.apply(&service_cidr(
            SourceId::Kubernetes,
            "y",
            &["10.104.0.0/13", "10.96.1.0/24"]
        )));
        let joined = (texts(&["10.96.0.0/12", "fd00::/112"]), both, 0);
        assert_eq!(services(&cluster, &Policy::default()), joined);
        assert!(cluster.apply(&service_cidr(SourceId::Manifests, "x", &["10.96.0.0/13"])));
        assert_eq!(
            services(&cluster, &Policy::default()).0,
            ["10.96.0.0/12"],
            "the manifest counts"
        );
        let gone =
            Event { source: SourceId::Manifests, change: Change::ServiceCidr("x".into(), None) };
        assert!(cluster.apply(&gone));
        let flag = Policy { service_cidrs: nets(&["fd00::/108"]), ..Policy::default() };
        assert_eq!(
            services(&cluster, &flag),
            (texts(&["fd00::/108"]), abi::networks::SERVICES_V6, 0)
        );
        let many: Vec<String> = (0..6).map(|index| format!("10.{}.0.0/16", index * 2)).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(cluster.apply(&service_cidr(SourceId::Kubernetes, "y", &many)));
        assert_eq!(services(&cluster, &Policy::default()).2, 3, "four find room, with that of x");
    }
}
