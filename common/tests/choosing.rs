//! The outcome of a socket's call, for processes of this host and for pods.

#[allow(dead_code, reason = "each test uses its part of what packets are made of")]
mod packets {
    pub(crate) mod ip;
}

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use packets::ip::Ip;
use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Flow, Networks,
    OriginKey, Origins, Range, Service, ServiceKey, ServicePort, Settings, Ticks, Tuple, backend,
    detect_local, frontend, listing, masquerade, networks, policy,
};
use sluice_common::packet::header::protocol::{TCP, UDP};
use sluice_common::path::socket::{Choice, choose};
use sluice_common::tables::Routes;
use sluice_common::{Tables, V4, V6};

/// The service port of all frontends.
const ONE: u32 = 1;
/// Its slots for each class: the ids in them are the slots' own numbers.
const STARTS: [u32; 3] = [100, 200, 300];
const SIZE: u16 = 61;
const PORT: u16 = 80;
const NODE_PORT: u16 = 30_080;

/// The content of the maps.
#[derive(Clone)]
struct Maps<F: Ip> {
    listing: BTreeMap<F::Address, u8>,
    services: BTreeMap<ServiceKey<F::Address>, Service>,
    port: ServicePort,
    backends: BTreeMap<u32, Backend<F::Address>>,
    node_ports: BTreeSet<u16>,
    serving: BTreeSet<F::Address>,
    settings: Settings,
}

fn address<F: Ip>(host: u16) -> F::Address {
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host);
    let [a, b] = host.to_be_bytes();
    F::of(Ipv4Addr::new(10, 0, a, b).into()).or_else(|| F::of(v6.into())).unwrap_or_default()
}

/// The VIP.
fn vip<F: Ip>() -> F::Address {
    address::<F>(9)
}

/// An address of the node that serves node ports.
fn node<F: Ip>() -> F::Address {
    address::<F>(7)
}

fn key<F: Ip>(address: F::Address, port: u16) -> ServiceKey<F::Address> {
    ServiceKey { address, port, protocol: TCP, reserved: 0 }
}

impl<F: Ip> Maps<F> {
    /// Adds a frontend of a kind, with other backends for each class.
    fn of(kind: u32) -> Self {
        let ids = STARTS.into_iter().flat_map(|start| start..start + u32::from(SIZE));
        let backend = |id: u32| Backend {
            address: address::<F>(id as u16),
            port: 8080,
            generation: 1,
            service_port: ONE,
            flags: backend::SERVING,
        };
        let at = if kind == frontend::NODE_PORT {
            key::<F>(F::Address::default(), NODE_PORT)
        } else {
            key::<F>(vip::<F>(), PORT)
        };
        Self {
            listing: BTreeMap::from([
                (vip::<F>(), listing::FRONTEND),
                (node::<F>(), listing::NODE | listing::NODE_PORTS),
            ]),
            services: BTreeMap::from([(at, Service { service_port: ONE, kind })]),
            port: ServicePort {
                ranges: STARTS.map(|start| Range::new(start, SIZE).0),
                ..ServicePort::default()
            },
            backends: ids.map(|id| (id, backend(id))).collect(),
            node_ports: BTreeSet::from([NODE_PORT]),
            serving: BTreeSet::from([node::<F>()]),
            settings: Settings {
                masquerade: masquerade::NEEDED,
                detect_local: detect_local::DEVICE,
                ..Settings::default()
            },
        }
    }

    /// Returns the outcome of a socket's call.
    fn call(&self, address: F::Address, port: u16, is_host: bool) -> Outcome {
        let outcome =
            choose::<F, _>(&key::<F>(address, port), 0x1_0000_0007, is_host, || None, self);
        match outcome {
            Choice::Untouched => Outcome::Untouched,
            Choice::Refuse { service_port } => {
                assert_eq!(service_port, ONE);
                Outcome::Refused
            }
            Choice::Backend { id, backend } => {
                assert_eq!(Some(&backend), self.backends.get(&id), "the backend of the id");
                let class = STARTS
                    .iter()
                    .position(|start| (*start..*start + u32::from(SIZE)).contains(&id));
                Outcome::Class(class.expect("a backend of a class"))
            }
        }
    }

    fn of_host(&self) -> Outcome {
        self.call(vip::<F>(), PORT, true)
    }

    fn of_pod(&self) -> Outcome {
        self.call(vip::<F>(), PORT, false)
    }
}

/// The outcome of a call. A backend of a class is represented by that class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Untouched,
    Refused,
    Class(usize),
}

const INTERNAL: Outcome = Outcome::Class(Class::Internal as usize);
const INSIDE: Outcome = Outcome::Class(Class::ExternalInside as usize);
const OUTSIDE: Outcome = Outcome::Class(Class::ExternalOutside as usize);

impl<F: Ip> Tables<F> for Maps<F> {
    fn listing(&self, address: &F::Address) -> u8 {
        self.listing.get(address).copied().unwrap_or_default()
    }
    fn flow(&self, _: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        None
    }
    fn embryonic(&self, _: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        None
    }
    fn imported(&self, _: &Tuple<F::Address>) -> Option<u32> {
        None
    }
    fn datagram(&self, _: &Datagram<F::Address>) -> Option<&DatagramPorts> {
        None
    }
    fn service(&self, key: &ServiceKey<F::Address>) -> Option<&Service> {
        self.services.get(key)
    }
    fn port(&self, service_port: u32) -> Option<&ServicePort> {
        (service_port == ONE).then_some(&self.port)
    }
    fn range(&self, service_port: u32, class: Class) -> Option<Range> {
        Tables::<F>::port(self, service_port).map(|port| Range(port.ranges[class as usize]))
    }
    fn slot(&self, slot: u32) -> Option<u32> {
        Some(slot)
    }
    fn backend(&self, id: u32) -> Option<&Backend<F::Address>> {
        self.backends.get(&id)
    }
    fn affinity(&self, _: &AffinityKey<F::Address>) -> Option<&Affinity> {
        None
    }
    fn in_source_ranges(&self, _: u32, _: &F::Address) -> bool {
        true
    }
    fn is_node_port(&self, port: u16) -> bool {
        self.node_ports.contains(&port)
    }
    fn is_node_address(&self, address: &F::Address) -> bool {
        self.serving.contains(address)
    }
    fn serves_node_ports(&self, address: &F::Address) -> bool {
        self.serving.contains(address)
    }
    fn origins(&self, _: &OriginKey<F::Address>) -> Option<&Origins<F::Address>> {
        None
    }
    fn marks(&self) -> u32 {
        0
    }
    fn settings(&self) -> Option<&Settings> {
        Some(&self.settings)
    }
    fn networks(&self) -> Option<&Networks<F::Address>> {
        None
    }
    fn device(&self, _: u32) -> Option<&Device> {
        None
    }
    fn hook_device(&self) -> Option<&Device> {
        None
    }
    fn ifindex(&self) -> u32 {
        0
    }
    fn routes(&self) -> Option<Routes> {
        None
    }
    fn now(&self) -> Ticks {
        0
    }
}

const KINDS: [u32; 3] = [frontend::CLUSTER_IP, frontend::LOAD_BALANCER, frontend::EXTERNAL_IP];

/// Runs a check for both families.
macro_rules! both {
    ($check:ident) => {{
        $check::<V4>();
        $check::<V6>();
    }};
}

#[test]
fn a_call_gets_a_backend_of_its_class() {
    fn check<F: Ip>() {
        for (kind, outcome) in KINDS.into_iter().zip([INTERNAL, INSIDE, INSIDE]) {
            let maps = Maps::<F>::of(kind);
            assert_eq!((maps.of_host(), maps.of_pod()), (outcome, outcome), "kind {kind}");
        }
    }
    both!(check);
}

#[test]
fn one_socket_stays_with_one_backend_and_sockets_spread() {
    fn check<F: Ip>() {
        let maps = Maps::<F>::of(frontend::CLUSTER_IP);
        let choose = |cookie| match choose::<F, _>(
            &key::<F>(vip::<F>(), PORT),
            cookie,
            true,
            || None,
            &maps,
        ) {
            Choice::Backend { id, .. } => id,
            Choice::Untouched | Choice::Refuse { .. } => 0,
        };
        let ids: Vec<u32> = (0..1000).map(choose).collect();
        assert_eq!(ids, (0..1000).map(choose).collect::<Vec<u32>>());
        assert_eq!(
            ids.iter().collect::<BTreeSet<_>>().len(),
            usize::from(SIZE),
            "every slot has its sockets"
        );
        assert_ne!(choose(7), choose(7 << 32), "both halves of a cookie count");
    }
    both!(check);
}

#[test]
fn a_socket_stays_with_its_backend_while_that_one_serves() {
    fn check<F: Ip>() {
        let mut maps = Maps::<F>::of(frontend::CLUSTER_IP);
        let choose = |maps: &Maps<F>, kept| match choose::<F, _>(
            &key::<F>(vip::<F>(), PORT),
            7,
            true,
            || kept,
            maps,
        ) {
            Choice::Backend { id, .. } => id,
            Choice::Untouched | Choice::Refuse { .. } => 0,
        };
        let first = choose(&maps, None);
        let (&other, backend) =
            maps.backends.iter().find(|(id, _)| **id != first).expect("another backend");
        let generation = backend.generation;
        assert_eq!(choose(&maps, Some((other, generation))), other, "whatever the slot says");
        assert_eq!(choose(&maps, Some((other, generation + 1))), first, "the id has another owner");
        let backend = maps.backends.get_mut(&other).expect("there");
        backend.service_port += 1;
        assert_eq!(choose(&maps, Some((other, generation))), first, "another service port's");
        let backend = maps.backends.get_mut(&other).expect("there");
        backend.service_port -= 1;
        backend.flags &= !backend::SERVING;
        assert_eq!(choose(&maps, Some((other, generation))), first, "it serves no more");
    }
    both!(check);
}

#[test]
fn a_call_elsewhere_is_untouched() {
    fn check<F: Ip>() {
        let maps = Maps::<F>::of(frontend::CLUSTER_IP);
        let mut stranger = maps.clone();
        let _ = stranger.listing.insert(address::<F>(8), listing::FRONTEND | listing::NODE_PORTS);
        for is_host in [true, false] {
            assert_eq!(
                maps.call(vip::<F>(), PORT + 1, is_host),
                Outcome::Untouched,
                "another port"
            );
            assert_eq!(
                maps.call(address::<F>(8), PORT, is_host),
                Outcome::Untouched,
                "another address"
            );
            assert_eq!(
                stranger.call(address::<F>(8), PORT, is_host),
                Outcome::Untouched,
                "a shared lane"
            );
            assert_eq!(
                stranger.call(address::<F>(8), NODE_PORT, is_host),
                Outcome::Untouched,
                "a shared lane"
            );
        }
        let datagram = ServiceKey { protocol: UDP, ..key::<F>(vip::<F>(), PORT) };
        assert_eq!(
            choose::<F, _>(&datagram, 1, true, || None, &maps),
            Choice::Untouched,
            "another protocol"
        );
        let mut unlisted = maps.clone();
        unlisted.listing.clear();
        assert_eq!(unlisted.of_host(), Outcome::Untouched, "a clear bit is certain");
    }
    both!(check);
}

/// The slot follows from the socket, but affinity from the client.
#[test]
fn a_call_with_affinity_is_left_to_packets() {
    fn check<F: Ip>() {
        for kind in KINDS {
            let mut maps = Maps::<F>::of(kind);
            maps.port.affinity_seconds = 1;
            assert_eq!(
                (maps.of_host(), maps.of_pod()),
                (Outcome::Untouched, Outcome::Untouched),
                "kind {kind}"
            );
        }
    }
    both!(check);
}

#[test]
fn a_call_to_a_load_balancer_with_source_ranges_is_left_to_packets() {
    fn check<F: Ip>() {
        for (kind, outcome) in KINDS.into_iter().zip([INTERNAL, Outcome::Untouched, INSIDE]) {
            let mut maps = Maps::<F>::of(kind);
            maps.port.flags = policy::SOURCE_RANGES;
            assert_eq!((maps.of_host(), maps.of_pod()), (outcome, outcome), "kind {kind}");
            // Even if the packet would be rejected in the end.
            maps.port.ranges = [0; 3];
            let outcome = if outcome == Outcome::Untouched { outcome } else { Outcome::Refused };
            assert_eq!(
                (maps.of_host(), maps.of_pod()),
                (outcome, outcome),
                "kind {kind} without backends"
            );
        }
    }
    both!(check);
}

/// A host process gets the address that the route to the backend prescribes in any case; a pod
/// would be shown as itself.
#[test]
fn a_pods_call_is_left_to_packets_where_it_is_masqueraded() {
    fn check<F: Ip>() {
        for (mode, pod) in [
            (masquerade::NEEDED, [INTERNAL, INSIDE, INSIDE]),
            (masquerade::KUBE_PROXY, [INTERNAL, Outcome::Untouched, Outcome::Untouched]),
            (masquerade::ALL, [Outcome::Untouched; 3]),
        ] {
            for ((kind, pod), host) in KINDS.into_iter().zip(pod).zip([INTERNAL, INSIDE, INSIDE]) {
                let mut maps = Maps::<F>::of(kind);
                maps.settings.masquerade = mode;
                assert_eq!(
                    (maps.of_host(), maps.of_pod()),
                    (host, pod),
                    "mode {mode}, kind {kind}"
                );
            }
        }
    }
    both!(check);
}

/// Without a detector, local pods are clients outside to the packet path; the socket path has to
/// agree.
#[test]
fn a_pod_is_outside_where_nothing_tells_local_pods() {
    fn check<F: Ip>() {
        for ((kind, host), pod) in
            KINDS.into_iter().zip([INTERNAL, INSIDE, INSIDE]).zip([INTERNAL, OUTSIDE, OUTSIDE])
        {
            let mut maps = Maps::<F>::of(kind);
            maps.settings.detect_local = detect_local::NONE;
            assert_eq!((maps.of_host(), maps.of_pod()), (host, pod), "kind {kind}");
        }
    }
    both!(check);
}

/// With the external policy Local, a pod may reach other backends than a client outside; at the
/// socket neither its address nor its device is known.
#[test]
fn a_pods_call_is_left_to_packets_where_only_they_tell_whether_it_is_local() {
    fn check<F: Ip>() {
        for (detector, pod) in [
            (detect_local::NONE, OUTSIDE),
            (detect_local::DEVICE, INSIDE),
            (detect_local::ADDRESS, Outcome::Untouched),
            (detect_local::SOME_DEVICES, Outcome::Untouched),
        ] {
            for ((kind, host), pod) in
                KINDS.into_iter().zip([INTERNAL, INSIDE, INSIDE]).zip([INTERNAL, pod, pod])
            {
                let mut maps = Maps::<F>::of(kind);
                maps.settings.detect_local = detector;
                maps.settings.networks = networks::PODS_V4 | networks::PODS_V6;
                maps.port.flags = policy::EXTERNAL_LOCAL;
                assert_eq!(
                    (maps.of_host(), maps.of_pod()),
                    (host, pod),
                    "detector {detector}, kind {kind}"
                );
                // All clients of an external address may reach the same backends.
                maps.port.flags = 0;
                let pod = if kind == frontend::CLUSTER_IP || detector == detect_local::NONE {
                    pod
                } else {
                    INSIDE
                };
                assert_eq!(maps.of_pod(), pod, "detector {detector}, kind {kind}, policy Cluster");
            }
        }
    }
    both!(check);
}

#[test]
fn node_ports_are_for_processes_of_this_host() {
    fn check<F: Ip>() {
        let maps = Maps::<F>::of(frontend::NODE_PORT);
        assert_eq!(maps.call(node::<F>(), NODE_PORT, true), INSIDE);
        assert_eq!(maps.call(node::<F>(), NODE_PORT, false), Outcome::Untouched, "a pod's");
        assert_eq!(maps.call(node::<F>(), NODE_PORT + 1, true), Outcome::Untouched, "another port");
        assert_eq!(
            maps.call(vip::<F>(), NODE_PORT, true),
            Outcome::Untouched,
            "an address that serves none"
        );
        let mut lane = maps.clone();
        let _ = lane.listing.insert(address::<F>(8), listing::NODE_PORTS);
        assert_eq!(
            lane.call(address::<F>(8), NODE_PORT, true),
            Outcome::Untouched,
            "a shared lane"
        );
        let mut unset = maps.clone();
        unset.node_ports.clear();
        assert_eq!(
            unset.call(node::<F>(), NODE_PORT, true),
            Outcome::Untouched,
            "no service has the number"
        );
        let mut shared = maps.clone();
        let _ = shared.listing.insert(node::<F>(), 15);
        let own = Service { service_port: ONE, kind: frontend::CLUSTER_IP };
        let _ = shared.services.insert(key::<F>(node::<F>(), NODE_PORT), own);
        assert_eq!(
            shared.call(node::<F>(), NODE_PORT, true),
            INTERNAL,
            "an address's own frontend comes first"
        );
        assert_eq!(shared.call(node::<F>(), NODE_PORT, false), INTERNAL, "for pods too");
        let datagram = ServiceKey { protocol: UDP, ..key::<F>(node::<F>(), NODE_PORT) };
        assert_eq!(
            choose::<F, _>(&datagram, 1, true, || None, &maps),
            Choice::Untouched,
            "another protocol"
        );
    }
    both!(check);
}

#[test]
fn a_call_is_refused_only_where_its_packet_would_be_rejected() {
    fn check<F: Ip>() {
        for (kind, class) in KINDS.into_iter().zip([0, 1, 1]) {
            let mut maps = Maps::<F>::of(kind);
            maps.port.ranges[class] = 0;
            assert_eq!(
                (maps.of_host(), maps.of_pod()),
                (Outcome::Refused, Outcome::Refused),
                "kind {kind}"
            );
            maps.port.ranges[class] = Range::DROP.0;
            let outcome = (maps.of_host(), maps.of_pod());
            assert_eq!(
                outcome,
                (Outcome::Untouched, Outcome::Untouched),
                "dropped without an answer, kind {kind}"
            );
            let mut others = Maps::<F>::of(kind);
            others.port.ranges = [Range::DROP.0; 3];
            others.port.ranges[class] = Range::new(STARTS[class], SIZE).0;
            let outcome = Outcome::Class(class);
            assert_eq!(
                (others.of_host(), others.of_pod()),
                (outcome, outcome),
                "only others, kind {kind}"
            );
        }
        let mut maps = Maps::<F>::of(frontend::CLUSTER_IP);
        maps.backends.clear();
        assert_eq!(maps.of_host(), Outcome::Refused, "a slot without a backend");
    }
    both!(check);
}

/// A ClusterIP's other ports are left to the packet path to reject.
#[test]
fn a_call_to_an_undefined_port_is_left_to_packets() {
    fn check<F: Ip>() {
        let mut maps = Maps::<F>::of(frontend::CLUSTER_IP);
        let as_such = ServiceKey { address: vip::<F>(), port: 0, protocol: 0, reserved: 0 };
        let address = Service { service_port: 0, kind: frontend::ADDRESS };
        let _ = maps.services.insert(as_such, address);
        assert_eq!(maps.call(vip::<F>(), PORT + 1, true), Outcome::Untouched);
        assert_eq!(
            maps.call(vip::<F>(), 0, true),
            Outcome::Untouched,
            "the port of the address's own key"
        );
        assert_eq!(maps.of_host(), INTERNAL);
    }
    both!(check);
}
