//! Random Services with their endpoints, as manifests, and random questions about them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice::tools::explain::{Client, Question};
use sluice_core::model::object::Protocol;

use super::Dice;

/// Number of Services in a scene.
const SERVICES: u16 = 24;
/// The most endpoints of a node in a scene.
const ENDPOINTS: u16 = 24;
/// Number of client hosts in each of their networks.
const CLIENTS: u16 = 120;

/// The node under test and another one, as the lab builds them.
pub(crate) struct Ground {
    pub(crate) name: String,
    pub(crate) own: [IpAddr; 2],
    pub(crate) other: [IpAddr; 2],
}

/// Returns an address of a family, from the host part.
fn address(v4: bool, network: [u16; 2], host: u16) -> IpAddr {
    let [low, high] = network;
    if v4 {
        let [a, b] = low.to_be_bytes();
        let [c, _] = high.to_be_bytes();
        Ipv4Addr::new(a, b, c, host as u8).into()
    } else {
        Ipv6Addr::new(0xfd00, low, high, 0, 0, 0, 0xa, host).into()
    }
}

const fn network(a: u8, b: u8, c: u8) -> [u16; 2] {
    [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, 0])]
}

const CLUSTER_IPS: [u16; 2] = network(10, 96, 0);
const LOAD_BALANCERS: [u16; 2] = network(203, 0, 113);
const EXTERNAL_IPS: [u16; 2] = network(198, 18, 0);
const OUTSIDE: [u16; 2] = network(198, 51, 100);
/// Pods of our node and of the other one: endpoints from 64 on, clients from 128 on.
const PODS: [[u16; 2]; 2] = [network(10, 244, 1), network(10, 244, 2)];
const FIRST_ENDPOINT: u16 = 64;
const FIRST_CLIENT: u16 = 128;

/// Returns the networks of a node's pods, its endpoints and its clients.
pub(crate) fn pods(ours: bool) -> [String; 3] {
    let pods = PODS[usize::from(!ours)];
    let [endpoints, clients] =
        [FIRST_ENDPOINT, FIRST_CLIENT].map(|first| address(true, pods, first));
    [format!("{endpoints}/26"), format!("{clients}/25"), format!("{}/112", address(false, pods, 0))]
}

/// The networks of pods and of ClusterIPs.
pub(crate) const CLUSTER_CIDRS: &str = "10.244.0.0/16,fd00:af4::/32";
pub(crate) const SERVICE_CIDRS: &str = "10.96.0.0/24,fd00:a60:0::/48";

/// Objects, and the destinations of questions about them.
pub(crate) struct Scene {
    pub(crate) text: String,
    frontends: Vec<(Protocol, SocketAddr)>,
    endpoints: BTreeSet<IpAddr>,
    affine: bool,
}

/// A port of a Service: its name in slices, protocol, number, and number on nodes.
struct Port {
    name: String,
    protocol: Protocol,
    number: u16,
    on_nodes: u16,
}

impl Scene {
    /// Creates a scene. The Service `end-<round>` shows that all of it was read.
    pub(crate) fn new(dice: &mut Dice, ground: &Ground, round: u32) -> Self {
        let [v4, v6] = ground.own;
        let mut scene = Self {
            text: format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: {}, labels: {{topology.kubernetes.io/zone: z1}}}}\n\
                 status: {{addresses: [{{type: InternalIP, address: {v4}}}, {{type: InternalIP, address: \"{v6}\"}}]}}\n",
                ground.name
            ),
            frontends: Vec::new(),
            endpoints: BTreeSet::new(),
            affine: false,
        };
        for index in 0..SERVICES {
            scene.service(dice, ground, index);
        }
        let end = address(true, CLUSTER_IPS, 250);
        scene.document(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: end-{round}, namespace: random}}\n\
             spec: {{clusterIP: {end}, ports: [{{port: 1}}]}}\n"
        ));
        // The Services differ from those of the last scene, so that a client's affinity to one of
        // those does not count.
        scene.text = scene.text.replace("namespace: random", &format!("namespace: random-{round}"));
        scene
    }

    fn document(&mut self, text: &str) {
        self.text.push_str("---\n");
        self.text.push_str(text);
    }

    fn service(&mut self, dice: &mut Dice, ground: &Ground, index: u16) {
        let families: &[bool] = dice.pick(&[&[true][..], &[false], &[true, false], &[false, true]]);
        let kind = dice.pick(&["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"]);
        let ports = Self::ports(dice, index);
        let quoted = |ips: &[IpAddr]| {
            let ips: Vec<String> = ips.iter().map(|ip| format!("\"{ip}\"")).collect();
            ips.join(", ")
        };
        let each = |network, host| -> Vec<IpAddr> {
            families.iter().map(|v4| address(*v4, network, host)).collect()
        };
        let mut vips = each(CLUSTER_IPS, index + 10);
        let words: Vec<&str> =
            families.iter().map(|v4| if *v4 { "IPv4" } else { "IPv6" }).collect();
        let mut spec = format!(
            "  type: {kind}\n  clusterIP: \"{}\"\n  clusterIPs: [{}]\n  ipFamilies: [{}]\n",
            vips[0],
            quoted(&vips),
            words.join(", ")
        );
        for (field, times) in [("internalTrafficPolicy", 4), ("externalTrafficPolicy", 2)] {
            if dice.one_in(times) {
                let _ = writeln!(spec, "  {field}: Local");
            }
        }
        if dice.one_in(5) {
            self.affine = true;
            spec.push_str("  sessionAffinity: ClientIP\n");
            if dice.one_in(2) {
                spec.push_str("  sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}\n");
            }
        }
        if dice.one_in(3) {
            // Some are claimed by several Services.
            let host = if dice.one_in(4) { 250 } else { index + 10 };
            let mut external = each(EXTERNAL_IPS, host);
            if dice.one_in(6) {
                external.push(ground.own[usize::from(!families[0])]);
            }
            let _ = writeln!(spec, "  externalIPs: [{}]", quoted(&external));
            vips.extend(external);
        }
        let mut status = String::new();
        if kind == "LoadBalancer" {
            let host = if dice.one_in(4) { 250 } else { index + 10 };
            let balancers = each(LOAD_BALANCERS, host);
            let mode = if dice.one_in(8) { ", ipMode: Proxy" } else { "" };
            let entries: Vec<String> =
                balancers.iter().map(|ip| format!("{{ip: \"{ip}\"{mode}}}")).collect();
            status = format!("status: {{loadBalancer: {{ingress: [{}]}}}}\n", entries.join(", "));
            vips.extend(balancers);
            if dice.one_in(3) {
                let ranges = dice.pick(&[
                    "\"198.51.100.0/25\", \"fd00:c633:6400::/48\"",
                    "\"10.244.0.0/16\", \"fd00:af4::/32\"",
                    "\"192.0.2.0/24\", \"2001:db8::/32\"",
                ]);
                let _ = writeln!(spec, "  loadBalancerSourceRanges: [{ranges}]");
            }
        }
        spec.push_str("  ports:\n");
        for port in &ports {
            let name =
                if port.name.is_empty() { String::new() } else { format!("name: {}, ", port.name) };
            let node_port = if kind == "ClusterIP" {
                String::new()
            } else {
                format!(", nodePort: {}", port.on_nodes)
            };
            let (protocol, number) = (port.protocol.word(), port.number);
            let _ = writeln!(spec, "  - {{{name}protocol: {protocol}, port: {number}{node_port}}}");
            self.frontends
                .extend(vips.iter().map(|vip| (port.protocol, SocketAddr::new(*vip, number))));
            for v4 in families {
                let own = ground.own[usize::from(!v4)];
                if kind != "ClusterIP" {
                    self.frontends.push((port.protocol, SocketAddr::new(own, port.on_nodes)));
                }
            }
        }
        let created = match dice.roll(3) {
            0 => String::new(),
            day => format!(", creationTimestamp: \"2026-01-0{day}T00:00:00Z\""),
        };
        self.document(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s{index}, namespace: random{created}}}\nspec:\n{spec}{status}"
        ));
        let hints = dice.roll(6);
        for v4 in families {
            for number in 0..=dice.roll(2) {
                self.slice(dice, ground, (index, number), *v4, &ports, hints);
            }
        }
    }

    fn ports(dice: &mut Dice, index: u16) -> Vec<Port> {
        let count = 1 + dice.roll(3);
        let mut numbers = BTreeSet::new();
        let mut ports = Vec::new();
        for at in 0..count {
            let protocol = dice.pick(&[Protocol::Tcp, Protocol::Udp]);
            let number = dice.pick(&[53, 80, 443, 8080]);
            if !numbers.insert((protocol.number(), number)) {
                continue;
            }
            let name = if count == 1 && dice.one_in(2) { String::new() } else { format!("p{at}") };
            // Some are claimed by several Services.
            let on_nodes = if dice.one_in(10) { 31_999 } else { 30_000 + index * 4 + at };
            ports.push(Port { name, protocol, number, on_nodes });
        }
        ports
    }

    fn slice(
        &mut self,
        dice: &mut Dice,
        ground: &Ground,
        (index, number): (u16, u16),
        v4: bool,
        ports: &[Port],
        hints: u16,
    ) {
        let family = if v4 { "IPv4" } else { "IPv6" };
        let mut text = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: s{index}-{}-{number}, namespace: random, labels: {{kubernetes.io/service-name: s{index}}}}}\n\
             addressType: {family}\nports:\n",
            family.to_lowercase()
        );
        for (at, port) in ports.iter().enumerate() {
            let target = match dice.roll(12) {
                0 => String::new(),
                1 | 2 => format!(", port: {}", 9090 + at),
                _ => format!(", port: {}", 8080 + at),
            };
            let (name, protocol) = (&port.name, port.protocol.word());
            let _ = writeln!(text, "- {{name: \"{name}\", protocol: {protocol}{target}}}");
        }
        let count = dice.roll(6);
        text.push_str(if count == 0 { "endpoints: []\n" } else { "endpoints:\n" });
        for _ in 0..count {
            let ours = dice.one_in(2);
            let node = if ours { ground.name.as_str() } else { "n2" };
            let ip = if dice.one_in(16) {
                // On the host network.
                let node = if ours { ground.own } else { ground.other };
                node[usize::from(!v4)]
            } else {
                address(v4, PODS[usize::from(!ours)], FIRST_ENDPOINT + dice.roll(ENDPOINTS))
            };
            let _ = self.endpoints.insert(ip);
            let node = if dice.one_in(20) { String::new() } else { format!(", nodeName: {node}") };
            let conditions = match dice.roll(20) {
                0..13 => ", conditions: {ready: true, serving: true, terminating: false}",
                13..16 => ", conditions: {ready: false, serving: true, terminating: true}",
                16 | 17 => ", conditions: {ready: false, serving: false, terminating: false}",
                18 => ", conditions: {ready: false, serving: false, terminating: true}",
                _ => "",
            };
            let hint = match hints {
                0 if !dice.one_in(10) => {
                    format!(", hints: {{forZones: [{{name: {}}}]}}", dice.pick(&["z1", "z2"]))
                }
                1 if !dice.one_in(10) => {
                    format!(", hints: {{forNodes: [{{name: {}}}]}}", dice.pick(&["n1", "n2"]))
                }
                _ => String::new(),
            };
            let _ = writeln!(text, "- {{addresses: [\"{ip}\"]{node}{conditions}{hint}}}");
        }
        self.document(&text);
    }

    /// Returns a random destination: mostly a frontend, sometimes an address or port next to one.
    pub(crate) fn destination(&self, dice: &mut Dice, ground: &Ground) -> (Protocol, SocketAddr) {
        let (protocol, at) = dice.pick(&self.frontends);
        let v4 = at.is_ipv4();
        match dice.roll(24) {
            0 => (protocol, SocketAddr::new(at.ip(), at.port() + 1)),
            1 => (dice.pick(&[Protocol::Tcp, Protocol::Udp]), at),
            2 => {
                let network = dice.pick(&[CLUSTER_IPS, LOAD_BALANCERS, EXTERNAL_IPS]);
                (protocol, SocketAddr::new(address(v4, network, dice.roll(255)), at.port()))
            }
            3 => (protocol, SocketAddr::new(ground.other[usize::from(!v4)], at.port())),
            4 => {
                let endpoints: Vec<IpAddr> =
                    self.endpoints.iter().filter(|ip| ip.is_ipv4() == v4).copied().collect();
                if endpoints.is_empty() {
                    return (protocol, at);
                }
                (protocol, SocketAddr::new(dice.pick(&endpoints), 8080))
            }
            _ => (protocol, at),
        }
    }

    /// Reports whether an address is on our node's side of the uplink.
    pub(crate) fn is_near(&self, ip: IpAddr) -> bool {
        let prefix = match ip {
            IpAddr::V4(ip) => ip.octets()[..3] == [10, 244, 1],
            IpAddr::V6(ip) => ip.segments()[..3] == [0xfd00, 0xaf4, 0x100],
        };
        prefix && self.endpoints.contains(&ip)
    }

    /// Reports whether some Service keeps its clients with one backend.
    pub(crate) fn is_affine(&self) -> bool {
        self.affine
    }

    /// Reports whether an endpoint there is left out: it is a frontend of some Service.
    pub(crate) fn is_frontend(&self, protocol: Protocol, at: SocketAddr) -> bool {
        self.frontends.contains(&(protocol, at))
    }

    /// Returns a packet's tuple, or [`None`] if such a client sends none.
    pub(crate) fn question(&self, dice: &mut Dice, ground: &Ground) -> Option<Question> {
        let (protocol, destination) = self.destination(dice, ground);
        let v4 = destination.is_ipv4();
        let own = ground.own[usize::from(!v4)];
        let from = dice.pick(&[
            Client::Pod,
            Client::Pod,
            Client::External,
            Client::External,
            Client::Host,
        ]);
        let host = FIRST_CLIENT + dice.roll(CLIENTS);
        let source = match from {
            Client::Host if destination.ip() == own => return None,
            Client::Host => own,
            // A pod that may be its own backend.
            Client::Pod if dice.one_in(8) => {
                address(v4, PODS[0], FIRST_ENDPOINT + dice.roll(ENDPOINTS))
            }
            Client::Pod => address(v4, PODS[0], host),
            // A pod of the other node.
            Client::External if dice.one_in(4) => address(v4, PODS[1], host),
            Client::External => address(v4, OUTSIDE, dice.roll(255)),
        };
        let port = 1024 + dice.roll(u16::MAX - 1024);
        let source = SocketAddr::new(source, port);
        Some(Question {
            protocol,
            source,
            destination,
            from,
            way: None,
            device: None,
            length: None,
            ttl: None,
        })
    }
}
