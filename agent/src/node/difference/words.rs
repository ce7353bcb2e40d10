//! Puts entries in words, with the service of each.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use sluice_common::abi::{
    self, Backend, Class, Ipv4Address, Ipv6Address, Name, Networks, OriginKey, Origins, Prefix,
    Range, Service, ServiceKey, ServicePort, Settings, backend, frontend, listing, policy,
};
use sluice_common::{Family, V4, V6};
use sluice_core::cluster::Programmed;
use sluice_core::image::map::{self, PlanMap};
use sluice_core::image::{CLASSES, Image, Stack, lane};
use sluice_core::model::object::Protocol;

use super::{Change, Difference};
use crate::node::devices::Role;
use crate::node::view::PortName;

/// The most backends that the words of a range name.
const NAMED_MAX: usize = 4;

/// The differences so far.
pub(super) struct Rows<'a> {
    wanted: &'a Image,
    found: &'a Image,
    differences: Vec<Difference>,
}

/// An entry in words: its value, and its service port.
type Entry = (String, Option<u32>);

impl<'a> Rows<'a> {
    pub(super) fn new(wanted: &'a Image, found: &'a Image) -> Self {
        Self { wanted, found, differences: Vec::new() }
    }

    pub(super) fn done(self) -> Vec<Difference> {
        self.differences
    }

    /// Adds the differences between two maps. `words` puts an entry of an image in words.
    fn map<K: Ord + Copy, V: PartialEq>(
        &mut self,
        map: &'static str,
        wanted: &BTreeMap<K, V>,
        found: &BTreeMap<K, V>,
        key: impl Fn(&K) -> String,
        words: impl Fn(&Image, &K, &V) -> Entry,
    ) {
        let keys: BTreeSet<K> = wanted.keys().chain(found.keys()).copied().collect();
        for at in keys {
            let (new, old) = (wanted.get(&at), found.get(&at));
            let change = match (new, old) {
                (Some(_), None) => Change::Missing,
                (None, Some(_)) => Change::Extra,
                (new, old) if new != old => Change::Different,
                _ => continue,
            };
            let new = new.map(|value| words(self.wanted, &at, value));
            let old = old.map(|value| words(self.found, &at, value));
            let name =
                |entry: Option<&Entry>, image: &Image| image.names.get(&entry?.1?).map(name_words);
            let service =
                name(new.as_ref(), self.wanted).or_else(|| name(old.as_ref(), self.found));
            self.differences.push(Difference {
                change,
                map,
                key: key(&at),
                wanted: new.map(|(words, _)| words),
                found: old.map(|(words, _)| words),
                service,
            });
        }
    }

    /// Adds the differences in one of the plan's maps.
    fn plan_map<M: PlanMap<Key: Copy>>(
        &mut self,
        key: impl Fn(&M::Key) -> String,
        words: impl Fn(&Image, &M::Key, &M::Value) -> Entry,
    ) {
        self.map(M::NAME, M::of(self.wanted), M::of(self.found), key, words);
    }

    /// Adds the differences between a family's maps.
    pub(super) fn family<F: Stack>(&mut self) {
        self.plan_map::<map::Services<F>>(frontend_words::<F>, |_, _, service| {
            (service_words(*service), Some(service.service_port))
        });
        self.plan_map::<map::Backends<F>>(
            |id| format!("id {id}"),
            |_, _, backend| (backend_words::<F>(backend), Some(backend.service_port)),
        );
        self.plan_map::<map::Origins<F>>(endpoint_words::<F>, |image, key, origins| {
            (origins_words::<F>(origins), owner::<F>(image, key, origins))
        });
        self.plan_map::<map::SourceRanges<F>>(
            |key| {
                format!("port id {} from {}/{}", key.service_port, F::ip(key.network), key.length)
            },
            |_, key, _| ("let in".to_owned(), Some(key.service_port)),
        );
        self.plan_map::<map::NodeAddresses<F>>(
            |address| F::ip(*address).to_string(),
            |_, _, node| {
                let serves = node.serves_node_ports();
                (if serves { "node ports" } else { "no node ports" }.to_owned(), None)
            },
        );
    }

    /// Adds the differences between the plan's maps of both families, given the wanted lanes.
    pub(super) fn shared(&mut self, lanes: &BTreeMap<u32, u8>) {
        self.plan_map::<map::Ports>(
            |id| format!("id {id}"),
            |_, id, port| (port_words(port), Some(*id)),
        );
        self.plan_map::<map::Names>(
            |id| format!("id {id}"),
            |_, id, name| (name_words(name), Some(*id)),
        );
        self.slots();
        self.addresses(lanes);
        self.node_ports();
    }

    fn slots(&mut self) {
        self.plan_map::<map::Slots>(
            |start| format!("from slot {start}"),
            |image, start, slots| {
                let owner = image
                    .ports
                    .keys()
                    .find(|id| image.ranges(**id).any(|range| range.start() == *start))
                    .copied();
                (slots_words(image, owner, slots), owner)
            },
        );
    }

    fn addresses(&mut self, lanes: &BTreeMap<u32, u8>) {
        let (new, old) = (self.wanted, self.found);
        let listed = if *lanes == old.lanes { BTreeMap::new() } else { listed(new, old) };
        let lane_key = |lane: &u32| {
            let known =
                listed.get(lane).into_iter().flatten().map(ToString::to_string).collect::<Vec<_>>();
            if known.is_empty() {
                format!("lane {lane}")
            } else {
                format!("lane {lane} ({})", known.join(", "))
            }
        };
        self.map(map::Lanes::NAME, lanes, &old.lanes, lane_key, |_, _, bits| {
            (listing_words(*bits), None)
        });
    }

    fn node_ports(&mut self) {
        let (new, old) = (self.wanted, self.found);
        let bits = |words: &BTreeMap<u32, u64>| -> BTreeMap<u32, bool> {
            let ports = words.iter().flat_map(|(word, bits)| {
                (0..64_u32)
                    .filter(move |bit| bits >> bit & 1 != 0)
                    .map(move |bit| (word * 64 + bit, true))
            });
            ports.collect()
        };
        self.map(
            map::NodePorts::NAME,
            &bits(&new.node_ports),
            &bits(&old.node_ports),
            ToString::to_string,
            |_, _, _| ("has frontends".to_owned(), None),
        );
    }

    /// Adds the differences between the settings and networks.
    pub(super) fn programmed(&mut self, wanted: Option<&Programmed>, found: Option<&Programmed>) {
        fn one<T>(value: Option<T>) -> BTreeMap<u32, T> {
            value.map(|value| (0, value)).into_iter().collect()
        }
        let part = |all: Option<&Programmed>| all.map(|all| all.settings);
        let only = |_: &u32| "the only one".to_owned();
        self.map("settings", &one(part(wanted)), &one(part(found)), only, |_, _, settings| {
            (settings_words(settings), None)
        });
        let part = |all: Option<&Programmed>| all.map(|all| all.v4);
        self.map("networks_v4", &one(part(wanted)), &one(part(found)), only, |_, _, networks| {
            (networks_words::<V4>(networks), None)
        });
        let part = |all: Option<&Programmed>| all.map(|all| all.v6);
        self.map("networks_v6", &one(part(wanted)), &one(part(found)), only, |_, _, networks| {
            (networks_words::<V6>(networks), None)
        });
    }

    /// Adds the differences between `devices`.
    pub(super) fn devices(
        &mut self,
        wanted: &BTreeMap<u32, abi::Device>,
        found: &BTreeMap<u32, abi::Device>,
    ) {
        self.map(
            "devices",
            wanted,
            found,
            |index| format!("ifindex {index}"),
            |_, _, device| (device_words(device), None),
        );
    }
}

/// Returns `namespace/name:port`, with the port's name or its number.
fn name_words(name: &Name) -> String {
    PortName::from(name).to_string()
}

fn protocol_word(number: u8) -> String {
    Protocol::from_number(number)
        .map_or_else(|| number.to_string(), |protocol| protocol.word().to_owned())
}

fn socket<F: Stack>(address: F::Address, port: u16) -> SocketAddr {
    (F::ip(address), port).into()
}

fn frontend_words<F: Stack>(key: &ServiceKey<F::Address>) -> String {
    let ServiceKey { address, port, protocol, .. } = *key;
    let protocol = protocol_word(protocol);
    match F::ip(address) {
        address if address.is_unspecified() => format!("*:{port} {protocol}"),
        address if port == 0 => format!("{address} (all ports)"),
        _ => format!("{} {protocol}", socket::<F>(address, port)),
    }
}

fn endpoint_words<F: Stack>(key: &OriginKey<F::Address>) -> String {
    format!("{} {}", socket::<F>(key.address, key.port), protocol_word(key.protocol))
}

fn service_words(service: Service) -> String {
    let kind = match service.kind {
        frontend::CLUSTER_IP => "ClusterIP",
        frontend::LOAD_BALANCER => "LoadBalancer",
        frontend::EXTERNAL_IP => "ExternalIP",
        frontend::NODE_PORT => "NodePort",
        frontend::ADDRESS => return "ClusterIP, other ports rejected".to_owned(),
        _ => "?",
    };
    format!("{kind} of port id {}", service.service_port)
}

fn backend_words<F: Stack>(found: &Backend<F::Address>) -> String {
    let mut words =
        format!("{} generation {}", socket::<F>(found.address, found.port), found.generation);
    let has = |bit| found.flags & bit != 0;
    let class = |class: Class| backend::SELECTED << class as u32;
    let flags = [
        (!has(backend::SERVING), "removed"),
        (has(backend::SERVING), "serving"),
        (has(backend::LOCAL), "local"),
        (has(backend::HOST), "host"),
    ];
    for (_, word) in flags.iter().filter(|(set, _)| *set) {
        // Writing to a string cannot fail.
        let _ = write!(words, ", {word}");
    }
    let classes: Vec<&str> = [
        (Class::Internal, "cluster"),
        (Class::ExternalInside, "external inside"),
        (Class::ExternalOutside, "external outside"),
    ]
    .into_iter()
    .filter_map(|(found, word)| has(class(found)).then_some(word))
    .collect();
    match classes.len() {
        0 => {}
        3 => words.push_str(", for all clients"),
        _ => {
            let _ = write!(words, ", for clients of {}", classes.join(" and "));
        }
    }
    words
}

fn origins_words<F: Stack>(origins: &Origins<F::Address>) -> String {
    let used = origins.frontends.iter().filter(|origin| origin.port != 0);
    used.map(|origin| socket::<F>(origin.address, origin.port).to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

/// Returns the service port of the first frontend of an endpoint.
fn owner<F: Stack>(
    image: &Image,
    key: &OriginKey<F::Address>,
    origins: &Origins<F::Address>,
) -> Option<u32> {
    let first = origins.frontends.first()?;
    let key = ServiceKey {
        address: first.address,
        port: first.port,
        protocol: key.protocol,
        reserved: 0,
    };
    F::of(image).services.get(&key).map(|service| service.service_port)
}

fn port_words(port: &ServicePort) -> String {
    let range = |class: Class| {
        let range = Range(port.ranges[class as usize]);
        match range.size() {
            0 if range.drops() => "drop".to_owned(),
            0 => "none".to_owned(),
            size => format!("{}+{size}", range.start()),
        }
    };
    let ranges = CLASSES.map(range);
    let mut words = if ranges.iter().all(|range| *range == ranges[0]) {
        format!("slots {}", ranges[0])
    } else {
        format!("slots {} / {} / {}", ranges[0], ranges[1], ranges[2])
    };
    if port.affinity_seconds != 0 {
        let _ = write!(words, ", affinity {} s", port.affinity_seconds);
    }
    for (bit, word) in
        [(policy::EXTERNAL_LOCAL, "external Local"), (policy::SOURCE_RANGES, "source ranges")]
    {
        if port.flags & bit != 0 {
            let _ = write!(words, ", {word}");
        }
    }
    words
}

/// Describes how many slots each backend has.
fn slots_words(image: &Image, owner: Option<u32>, slots: &[u32]) -> String {
    let is_v6 =
        owner.and_then(|id| image.names.get(&id)).is_some_and(|name| name.family == V6::VERSION);
    let mut shares: BTreeMap<u32, usize> = BTreeMap::new();
    for id in slots {
        *shares.entry(*id).or_default() += 1;
    }
    let word = |(id, count): (&u32, &usize)| {
        let known =
            if is_v6 { backend_socket::<V6>(image, *id) } else { backend_socket::<V4>(image, *id) };
        format!("{count} {}", known.unwrap_or_else(|| format!("of no backend (id {id})")))
    };
    let named: Vec<String> = shares.iter().take(NAMED_MAX).map(word).collect();
    let more = shares.len().saturating_sub(NAMED_MAX);
    let more = if more == 0 { String::new() } else { format!(", {more} more backends") };
    // Two ranges with the same shares may have them in another order.
    format!("{} slots: {}{more}; order {:08x}", slots.len(), named.join(", "), order(slots))
}

/// Returns the FNV-1a hash, which distinguishes orders.
fn order(slots: &[u32]) -> u32 {
    slots
        .iter()
        .flat_map(|id| id.to_le_bytes())
        .fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

fn backend_socket<F: Stack>(image: &Image, id: u32) -> Option<String> {
    F::of(image).backends.get(&id).map(|found| socket::<F>(found.address, found.port).to_string())
}

fn listing_words(bits: u8) -> String {
    let words = [
        (listing::FRONTEND, "frontend"),
        (listing::BACKEND, "backend"),
        (listing::NODE, "node"),
        (listing::NODE_PORTS, "node ports"),
    ];
    words
        .iter()
        .filter(|(bit, _)| bits & bit != 0)
        .map(|(_, word)| *word)
        .collect::<Vec<_>>()
        .join(", ")
}

/// Returns the addresses of both images in each lane.
fn listed(wanted: &Image, found: &Image) -> BTreeMap<u32, BTreeSet<IpAddr>> {
    fn add<F: Stack>(image: &Image, lanes: &mut BTreeMap<u32, BTreeSet<IpAddr>>) {
        let maps = F::of(image);
        let frontends = maps.services.keys().map(|key| key.address);
        let backends = maps.backends.values().map(|found| found.address);
        let nodes = maps.node_addresses.keys().copied();
        for address in frontends.chain(backends).chain(nodes) {
            let ip = F::ip(address);
            if !ip.is_unspecified() {
                let _ = lanes.entry(lane::<F>(&address)).or_default().insert(ip);
            }
        }
    }
    let mut lanes = BTreeMap::new();
    for image in [wanted, found] {
        add::<V4>(image, &mut lanes);
        add::<V6>(image, &mut lanes);
    }
    lanes
}

fn settings_words(settings: &Settings) -> String {
    let socket_path = match settings.socket_path {
        abi::socket_path::OFF => "off",
        abi::socket_path::HOST => "host",
        abi::socket_path::ALL => "all",
        abi::socket_path::MACHINE => "machine",
        _ => "?",
    };
    let masquerade = match settings.masquerade {
        abi::masquerade::NEEDED => "needed",
        abi::masquerade::KUBE_PROXY => "kube-proxy",
        abi::masquerade::ALL => "all",
        _ => "?",
    };
    let local = match settings.detect_local {
        abi::detect_local::NONE => "none",
        abi::detect_local::DEVICE => "by device",
        abi::detect_local::ADDRESS => "by address",
        abi::detect_local::SOME_DEVICES => "by device, not every one",
        _ => "?",
    };
    let phase = match settings.phase & abi::phase::MASK {
        abi::phase::SERVE => "serving",
        abi::phase::IMPORT => "importing",
        abi::phase::PASSIVE => "passive",
        _ => "?",
    };
    let with = match settings.phase & (abi::phase::IMPORTED | abi::phase::IMPORTED_UDP) {
        0 => "",
        abi::phase::IMPORTED => " beside netfilter's connections",
        _ => " beside netfilter's connections and datagrams",
    };
    format!(
        "{phase}{with}, socket path {socket_path}, masquerade {masquerade}, local pods {local}, networks {:#x}",
        settings.networks
    )
}

fn networks_words<F: Stack + Shown>(networks: &Networks<F::Address>) -> String {
    let words = |prefixes: &[Prefix<F::Address>]| {
        let shown: Vec<String> = prefixes.iter().filter_map(F::prefix).collect();
        if shown.is_empty() { "none".to_owned() } else { shown.join(",") }
    };
    format!("pods {}, services {}", words(&networks.pods), words(&networks.services))
}

/// A family whose prefixes can be printed.
trait Shown: Family {
    /// Returns a prefix as a CIDR, or [`None`] if it is unused.
    fn prefix(prefix: &Prefix<Self::Address>) -> Option<String>;
}

impl Shown for V4 {
    fn prefix(prefix: &Prefix<Ipv4Address>) -> Option<String> {
        let length = u32::from_be_bytes(prefix.mask.octets).count_ones();
        let used = length != 0 || prefix.network == Ipv4Address::default();
        used.then(|| format!("{}/{length}", V4::ip(prefix.network)))
    }
}

impl Shown for V6 {
    fn prefix(prefix: &Prefix<Ipv6Address>) -> Option<String> {
        let length = u128::from_be_bytes(prefix.mask.octets).count_ones();
        let used = length != 0 || prefix.network == Ipv6Address::default();
        used.then(|| format!("{}/{length}", V6::ip(prefix.network)))
    }
}

fn device_words(device: &abi::Device) -> String {
    let role = Role::from_number(device.role).map_or("?", Role::word);
    let mut words = format!("{role}, MTU {}", device.mtu);
    for (shown, what) in
        [(V4::ip(device.masquerade_v4), "shows clients as"), (V6::ip(device.masquerade_v6), "and")]
    {
        if !shown.is_unspecified() {
            let _ = write!(words, ", {what} {shown}");
        }
    }
    if device.bridge != 0 {
        let _ = write!(words, ", port of ifindex {}", device.bridge);
    }
    if device.has_local_pods() {
        words.push_str(", local pods");
    }
    if let Some(netns) = device.netns.checked_sub(1) {
        let _ = write!(words, ", sockets of network namespace {netns}");
    }
    let mac = device.mac.map(|byte| format!("{byte:02x}")).join(":");
    let _ = write!(words, ", {mac}");
    words
}
