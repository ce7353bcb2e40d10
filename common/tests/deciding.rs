//! The path copes with any packet and any tables, and never hands out a reply tuple that is taken.

#[allow(dead_code, reason = "each test uses its part of what packets are made of")]
mod packets {
    pub(crate) mod frame;
    pub(crate) mod ip;
}

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use packets::frame::{ACK, Frame, INIT, RST, SYN};
use packets::ip::Ip;
use proptest::prelude::*;
use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Flow, Ipv4Address,
    Ipv6Address, Networks, OriginKey, Origins, Prefix, Range, RejectBucket, Service, ServiceKey,
    ServicePort, Settings, Ticks, Tuple, backend, flow, frontend, listing,
};
use sluice_common::engine::limit::{REJECT_BURST_MS, REJECT_COST_MS, take_token};
use sluice_common::engine::record::{FlowMap, FlowTable, InsertError, Partner, Renewal, record};
use sluice_common::packet::bytes::Bytes;
use sluice_common::packet::parse::{Kind, headers, untag};
use sluice_common::packet::rewrite::{can_follow, rewrite};
use sluice_common::path::{Hook, Record, Step, Verdict, decide, leads_to, partner, partner_key};
use sluice_common::tables::Routes;
use sluice_common::{Failure, Reason, Tables, V4, V6};

const NOW: Ticks = 10_000;

/// Tables with arbitrary answers.
#[derive(Clone, Debug)]
struct Whim<F: Ip> {
    listing: [u8; 4],
    flow: Option<Flow<F::Address>>,
    embryonic: Option<Flow<F::Address>>,
    datagram: Option<DatagramPorts>,
    service: Option<Service>,
    port: Option<ServicePort>,
    backend: Option<Backend<F::Address>>,
    affinity: Option<Affinity>,
    origins: Option<Origins<F::Address>>,
    settings: Option<Settings>,
    networks: Option<Networks<F::Address>>,
    device: Option<Device>,
    here: Option<Device>,
    routes: Option<Routes>,
    marks: u32,
    ports_to_skip: u32,
    imported: Option<u32>,
    yes: [bool; 5],
}

impl<F: Ip> Tables<F> for Whim<F> {
    fn listing(&self, address: &F::Address) -> u8 {
        self.listing[F::hash(address) as usize % 4]
    }
    fn flow(&self, _: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        self.flow.as_ref()
    }
    fn embryonic(&self, _: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        self.embryonic.as_ref()
    }
    fn imported(&self, _: &Tuple<F::Address>) -> Option<u32> {
        self.imported
    }
    fn datagram(&self, _: &Datagram<F::Address>) -> Option<&DatagramPorts> {
        self.datagram.as_ref()
    }
    fn service(&self, _: &ServiceKey<F::Address>) -> Option<&Service> {
        self.service.as_ref()
    }
    fn port(&self, _: u32) -> Option<&ServicePort> {
        self.port.as_ref()
    }
    fn range(&self, _: u32, class: Class) -> Option<Range> {
        self.port.map(|port| Range(port.ranges[class as usize]))
    }
    fn slot(&self, slot: u32) -> Option<u32> {
        (!slot.is_multiple_of(5)).then_some(slot)
    }
    fn backend(&self, _: u32) -> Option<&Backend<F::Address>> {
        self.backend.as_ref()
    }
    fn affinity(&self, _: &AffinityKey<F::Address>) -> Option<&Affinity> {
        self.affinity.as_ref()
    }
    fn in_source_ranges(&self, _: u32, _: &F::Address) -> bool {
        self.yes[0]
    }
    fn is_node_port(&self, _: u16) -> bool {
        self.yes[1]
    }
    fn is_node_address(&self, _: &F::Address) -> bool {
        self.yes[4]
    }
    fn serves_node_ports(&self, _: &F::Address) -> bool {
        self.yes[2]
    }
    fn origins(&self, _: &OriginKey<F::Address>) -> Option<&Origins<F::Address>> {
        self.origins.as_ref()
    }
    fn marks(&self) -> u32 {
        self.marks
    }
    fn settings(&self) -> Option<&Settings> {
        self.settings.as_ref()
    }
    fn networks(&self) -> Option<&Networks<F::Address>> {
        self.networks.as_ref()
    }
    fn device(&self, _: u32) -> Option<&Device> {
        self.device.as_ref()
    }
    fn hook_device(&self) -> Option<&Device> {
        self.here.as_ref()
    }
    fn ifindex(&self) -> u32 {
        2
    }
    fn routes(&self) -> Option<Routes> {
        self.routes
    }
    fn ports_to_skip(&self) -> u32 {
        self.ports_to_skip
    }
    fn translated_at_socket(&self) -> bool {
        self.yes[3]
    }
    fn now(&self) -> Ticks {
        NOW
    }
}

fn address<F: Ip>(host: u8) -> F::Address {
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(host));
    F::of(Ipv4Addr::new(10, 0, 0, host).into()).or_else(|| F::of(v6.into())).unwrap_or_default()
}

fn any_flow<F: Ip>() -> impl Strategy<Value = Flow<F::Address>> {
    (any::<[u8; 2]>(), any::<[u16; 2]>(), any::<[u32; 3]>(), any::<u16>(), any::<[u8; 2]>())
        .prop_map(
            |(
                [source, destination],
                [source_port, destination_port],
                [backend, seen, replied],
                generation,
                [state, flags],
            )| Flow {
                source: address::<F>(source),
                destination: address::<F>(destination),
                source_port,
                destination_port,
                backend,
                service_port: 1,
                seen,
                replied,
                generation,
                state,
                flags,
            },
        )
}

fn device() -> impl Strategy<Value = Device> {
    (0_u32..6, 0_u32..3, any::<[u8; 4]>(), any::<[u32; 2]>()).prop_map(
        |(role, bridge, octets, [flags, netns])| Device {
            role,
            bridge,
            mac: [2, 0, 0, 0, 0, octets[0]],
            link_header: if octets[1] < 128 { 14 } else { 0 },
            mtu: 1280 + u32::from(octets[2]),
            masquerade_v4: Ipv4Address { octets: [10, 0, 0, octets[3]] },
            masquerade_v6: Ipv6Address { octets: [octets[3]; 16] },
            flags,
            netns,
        },
    )
}

fn networks<F: Ip>() -> impl Strategy<Value = Networks<F::Address>> {
    let prefix = || {
        (any::<u8>(), any::<bool>()).prop_map(|(host, one)| Prefix {
            network: address::<F>(host),
            mask: if one { address::<F>(0xff) } else { F::Address::default() },
        })
    };
    let prefixes = || prop::array::uniform4(prefix());
    (prefixes(), prefixes()).prop_map(|(pods, services)| Networks { pods, services })
}

fn whim<F: Ip>() -> impl Strategy<Value = Whim<F>> {
    let service =
        (any::<u32>(), 0_u32..8).prop_map(|(service_port, kind)| Service { service_port, kind });
    let port = (prop::array::uniform3(any::<u64>()), any::<u32>(), 0_u32..4).prop_map(
        |(ranges, affinity_seconds, flags)| ServicePort { ranges, affinity_seconds, flags },
    );
    let backend = (any::<u8>(), any::<u16>(), any::<u16>(), 0_u32..8).prop_map(
        |(host, port, generation, flags)| Backend {
            address: address::<F>(host),
            port,
            generation,
            service_port: 1,
            flags,
        },
    );
    let affinity = (any::<[u32; 2]>(), any::<[u16; 2]>()).prop_map(
        |([backend, seen], [generation, round])| Affinity { backend, seen, generation, round },
    );
    let origins = prop::collection::vec((any::<u8>(), 0_u16..3), 4).prop_map(|ends| {
        let mut origins = Origins::default();
        for (origin, (host, port)) in origins.frontends.iter_mut().zip(ends) {
            (origin.address, origin.port) = (address::<F>(host), port);
        }
        origins
    });
    let datagram =
        (any::<[u16; 2]>(), 0_u32..20).prop_map(|([source_port, destination_port], age)| {
            DatagramPorts { source_port, destination_port, seen: NOW - age }
        });
    let settings = (0_u32..4, 0_u32..5, any::<u32>(), 0_u32..3, 0_u32..16).prop_map(
        |(masquerade, detect_local, networks, own_device, phase)| Settings {
            masquerade,
            detect_local,
            networks,
            own_device,
            phase,
            ..Settings::default()
        },
    );
    let routes = any::<[u8; 2]>().prop_map(|[backend, client]| Routes {
        to_backend: u32::from(backend % 3),
        to_client: u32::from(client % 3),
    });
    let flows = (prop::option::of(any_flow::<F>()), prop::option::of(any_flow::<F>()));
    let objects = (
        prop::option::of(service),
        prop::option::of(port),
        prop::option::of(backend),
        prop::option::of(affinity),
        prop::option::of(origins),
        prop::option::of(datagram),
    );
    let node = (
        prop::option::of(settings),
        prop::option::of(networks::<F>()),
        prop::option::of(device()),
        prop::option::of(device()),
        prop::option::of(routes),
    );
    let numbers = (0_u32..8, 0_u32..12, prop::option::of(0_u32..2));
    (prop::array::uniform4(0_u8..16), flows, objects, node, numbers, any::<[bool; 5]>()).prop_map(
        |(listing, (flow, embryonic), objects, node, (marks, ports_to_skip, imported), yes)| {
            let (service, port, backend, affinity, origins, datagram) = objects;
            let (settings, networks, device, here, routes) = node;
            Whim {
                listing,
                flow,
                embryonic,
                datagram,
                service,
                port,
                backend,
                affinity,
                origins,
                settings,
                networks,
                device,
                here,
                routes,
                marks,
                ports_to_skip,
                imported,
                yes,
            }
        },
    )
}

fn hook() -> impl Strategy<Value = Hook> {
    prop_oneof![Just(Hook::Ingress), Just(Hook::Egress), Just(Hook::Xdp)]
}

/// Any bytes, or a good frame with some bytes changed, cut anywhere.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let changed = (
        any::<bool>(),
        0_u8..7,
        prop::collection::vec((0_usize..90, any::<u8>()), 0..4),
        0_usize..130,
    )
        .prop_map(|(v4, shape, changes, length)| {
            let end = |host, port| {
                let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host);
                let address =
                    if v4 { IpAddr::from(Ipv4Addr::new(10, 0, 0, host as u8)) } else { v6.into() };
                SocketAddr::new(address, port)
            };
            let (client, server) = (end(1, 40_000), end(2, 80));
            let frame = match shape {
                0 => Frame::tcp(client, server, SYN, b"data"),
                1 => Frame::tcp(client, server, RST, b""),
                2 => Frame::udp(client, server, b"data"),
                3 => Frame::sctp(client, server, (INIT, 0), b"data"),
                4 => Frame::udp(client, server, &[1; 40]).fragments(7, 24).remove(0),
                5 => Frame::udp(client, server, &[1; 40]).fragments(7, 24).remove(1),
                _ => {
                    let quote = Frame::udp(server, client, b"data").packet();
                    Frame::icmp(
                        client.ip(),
                        server.ip(),
                        if v4 { (3, 3) } else { (1, 4) },
                        0,
                        &quote,
                    )
                }
            };
            let mut bytes = frame.bytes();
            for (at, byte) in changes {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            bytes.truncate(length);
            bytes
        });
    prop_oneof![prop::collection::vec(any::<u8>(), 0..150), changed.clone(), changed]
}

fn anything<F: Ip>(
    packet: &Bytes<Vec<u8>>,
    offset: u32,
    hook: Hook,
    tables: &Whim<F>,
) -> Result<(), TestCaseError> {
    let Some(headers) = headers::<F, _>(packet, offset) else { return Ok(()) };
    let decision = decide(hook, &headers, tables);
    if decision.step != Step::Done {
        prop_assert!(
            decision.step == Step::LookUpRoutes && tables.routes.is_none(),
            "{:?}",
            decision.step
        );
        return Ok(());
    }
    if decision.verdict == Verdict::Pass {
        prop_assert_eq!(decision.record, Record::Nothing);
        return Ok(());
    }
    if decision.is_answer() {
        // It goes around the stack unchanged, and is translated where it leaves.
        prop_assert_eq!((hook, decision.record), (Hook::Ingress, Record::Nothing));
        return Ok(());
    }
    if decision.reason == Reason::UnassignedAddress {
        prop_assert_eq!((decision.verdict, decision.record), (Verdict::Drop, Record::Nothing));
        return Ok(());
    }
    prop_assert!(
        matches!(headers.kind, Kind::Transport | Kind::IcmpError | Kind::Fragment),
        "{:?} is not translated",
        headers.kind
    );
    // Changes at the client's side are counted at the backend's.
    let counted = decision.flow.flags & flow::SOURCE == 0;
    prop_assert!(decision.reason != Reason::Stranger || !counted);
    if headers.kind == Kind::IcmpError {
        prop_assert!(decision.reason == Reason::IcmpError || !counted);
        prop_assert_eq!(decision.record, Record::Nothing);
    }
    prop_assert_eq!(decision.reason == Reason::FragmentHeld, decision.verdict == Verdict::Hold);
    if headers.kind == Kind::Fragment {
        prop_assert_eq!(decision.record, Record::Nothing);
    }
    if decision.verdict == Verdict::Hold || !can_follow(&headers, &decision.flow) {
        return Ok(());
    }
    let mut edited = packet.clone();
    prop_assert!(rewrite(&mut edited, &headers, &decision.flow), "what was read can be written");
    prop_assert_eq!(edited.bytes.len(), packet.bytes.len());
    prop_assert_eq!(&edited.bytes[..offset as usize], &packet.bytes[..offset as usize]);
    Ok(())
}

/// Maps for flows alone: every frontend leads to one of a few endpoints.
struct Few {
    services: BTreeMap<ServiceKey<Ipv4Address>, Service>,
    backends: Vec<Backend<Ipv4Address>>,
    port: ServicePort,
    settings: Settings,
    flows: Entries,
    embryonic: Entries,
}

type Entries = BTreeMap<Tuple<Ipv4Address>, Flow<Ipv4Address>>;

impl Few {
    fn table(&mut self, place: FlowMap) -> &mut Entries {
        match place {
            FlowMap::Flows => &mut self.flows,
            FlowMap::Embryonic => &mut self.embryonic,
        }
    }
}

impl FlowTable<V4> for Few {
    fn get(&self, place: FlowMap, key: &Tuple<Ipv4Address>) -> Option<&Flow<Ipv4Address>> {
        match place {
            FlowMap::Flows => self.flows.get(key),
            FlowMap::Embryonic => self.embryonic.get(key),
        }
    }

    fn insert(
        &mut self,
        place: FlowMap,
        key: &Tuple<Ipv4Address>,
        flow: &Flow<Ipv4Address>,
        only_new: bool,
    ) -> Result<(), InsertError> {
        let table = self.table(place);
        if only_new && table.contains_key(key) {
            return Err(InsertError::Exists);
        }
        let _ = table.insert(*key, *flow);
        Ok(())
    }

    fn remove(&mut self, place: FlowMap, key: &Tuple<Ipv4Address>) {
        let _ = self.table(place).remove(key);
    }

    fn refresh(
        &mut self,
        place: FlowMap,
        key: &Tuple<Ipv4Address>,
        to: &Flow<Ipv4Address>,
        renewal: Renewal,
    ) -> bool {
        let Some(entry) = self.table(place).get_mut(key) else { return false };
        if leads_to(entry, to) {
            renewal.apply(entry, to);
        }
        true
    }

    fn record_affinity(&mut self, _: &AffinityKey<Ipv4Address>, _: &Affinity) {}

    fn set_marks(&mut self, _: u32) {}

    fn count_failure(&mut self, _: u32, _: Failure) {}
}

impl Tables<V4> for Few {
    fn listing(&self, address: &Ipv4Address) -> u8 {
        match address.octets[2] {
            1 => listing::FRONTEND,
            2 => listing::BACKEND,
            _ => 0,
        }
    }
    fn flow(&self, tuple: &Tuple<Ipv4Address>) -> Option<&Flow<Ipv4Address>> {
        self.flows.get(tuple)
    }
    fn embryonic(&self, tuple: &Tuple<Ipv4Address>) -> Option<&Flow<Ipv4Address>> {
        self.embryonic.get(tuple)
    }
    fn imported(&self, _: &Tuple<Ipv4Address>) -> Option<u32> {
        None
    }
    fn datagram(&self, _: &Datagram<Ipv4Address>) -> Option<&DatagramPorts> {
        None
    }
    fn service(&self, key: &ServiceKey<Ipv4Address>) -> Option<&Service> {
        self.services.get(key)
    }
    fn port(&self, _: u32) -> Option<&ServicePort> {
        Some(&self.port)
    }
    fn range(&self, service_port: u32, _: Class) -> Option<Range> {
        Some(Range::new(service_port, 1))
    }
    fn slot(&self, slot: u32) -> Option<u32> {
        Some(slot)
    }
    fn backend(&self, id: u32) -> Option<&Backend<Ipv4Address>> {
        self.backends.get(id as usize % self.backends.len())
    }
    fn origins(&self, _: &OriginKey<Ipv4Address>) -> Option<&Origins<Ipv4Address>> {
        None
    }
    fn affinity(&self, _: &AffinityKey<Ipv4Address>) -> Option<&Affinity> {
        None
    }
    fn in_source_ranges(&self, _: u32, _: &Ipv4Address) -> bool {
        false
    }
    fn is_node_port(&self, _: u16) -> bool {
        false
    }
    fn is_node_address(&self, _: &Ipv4Address) -> bool {
        false
    }
    fn serves_node_ports(&self, _: &Ipv4Address) -> bool {
        false
    }
    fn marks(&self) -> u32 {
        3
    }
    fn settings(&self) -> Option<&Settings> {
        Some(&self.settings)
    }
    fn networks(&self) -> Option<&Networks<Ipv4Address>> {
        None
    }
    fn device(&self, _: u32) -> Option<&Device> {
        None
    }
    fn hook_device(&self) -> Option<&Device> {
        None
    }
    fn ifindex(&self) -> u32 {
        2
    }
    fn routes(&self) -> Option<Routes> {
        Some(Routes::default())
    }
    fn translated_at_socket(&self) -> bool {
        true
    }
    fn now(&self) -> Ticks {
        NOW
    }
}

fn few() -> Few {
    let at = |net, host| Ipv4Address { octets: [10, 0, net, host] };
    let mut services = BTreeMap::new();
    for (service_port, host) in (1..).zip(0..6) {
        for protocol in [6, 17] {
            let key = ServiceKey { address: at(1, host), port: 80, protocol, reserved: 0 };
            let _ = services.insert(key, Service { service_port, kind: frontend::CLUSTER_IP });
        }
    }
    let backends = (0..2)
        .map(|host| Backend {
            address: at(2, host),
            port: 8080,
            generation: 1,
            service_port: 1,
            flags: backend::SERVING | backend::LOCAL,
        })
        .collect();
    Few {
        services,
        backends,
        port: ServicePort::default(),
        settings: Settings::default(),
        flows: BTreeMap::new(),
        embryonic: BTreeMap::new(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn any_bytes_meet_a_decision(
        bytes in bytes(),
        hook in hook(),
        v4 in whim::<V4>(),
        v6 in whim::<V6>(),
        ethertype in prop_oneof![Just(None), any::<u16>().prop_map(Some)],
    ) {
        let packet = Bytes { bytes, partial: false };
        let own = packet.bytes.get(12..14).map_or(0, |pair| u16::from_be_bytes([pair[0], pair[1]]));
        let Some((_, offset)) = untag(&packet, ethertype.unwrap_or(own), 14) else { return Ok(()) };
        anything::<V4>(&packet, offset, hook, &v4)?;
        anything::<V6>(&packet, offset, hook, &v6)?;
        anything::<V4>(&packet, 0, hook, &v4)?;
        anything::<V6>(&packet, 0, hook, &v6)?;
    }

    #[test]
    fn a_partners_partner_is_the_entry_itself(key in any_flow::<V6>(), flow in any_flow::<V6>()) {
        let mut key = partner_key::<V6>(&key, 6);
        key.side = u8::from(flow.flags & (flow::SOURCE | flow::REPLY) == flow::SOURCE);
        let (other_key, other) = (partner_key::<V6>(&flow, 6), partner::<V6>(&key, &flow));
        prop_assert_eq!(partner_key::<V6>(&other, 6), key);
        prop_assert_eq!(partner::<V6>(&other_key, &other), flow);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn a_reply_tuple_is_never_handed_out_twice(
        packets in prop::collection::vec((any::<bool>(), 0_u8..2, 0_u8..2, 1_u8..3, 0_u8..6, any::<bool>()), 1..120),
    ) {
        let mut tables = few();
        for (tcp, client, port, net, host, second) in packets {
            let client = SocketAddr::new(IpAddr::from([10, 0, 0, client]), 40_000 + u16::from(port));
            // To a frontend, or directly to an endpoint.
            let server = match net {
                1 => SocketAddr::new(IpAddr::from([10, 0, 1, host]), 80),
                _ => SocketAddr::new(IpAddr::from([10, 0, 2, host % 2]), 8080),
            };
            let frame = match (tcp, second) {
                (true, true) => Frame::tcp(client, server, ACK, b""),
                (true, false) => Frame::tcp(client, server, SYN, b""),
                _ => Frame::udp(client, server, b"data"),
            };
            let packet = Bytes { bytes: frame.l3().bytes(), partial: false };
            let headers = headers::<V4, _>(&packet, 0).expect("a whole packet");
            let mut decision = decide(Hook::Ingress, &headers, &tables);
            let protocol = decision.key.protocol;
            let key = partner_key::<V4>(&decision.flow, protocol);
            if matches!(decision.record, Record::Open | Record::Establish) {
                for map in [&tables.flows, &tables.embryonic] {
                    if let Some(there) = map.get(&key) {
                        prop_assert_eq!(partner_key::<V4>(there, protocol), decision.key, "the tuple of another flow");
                    }
                }
            }
            prop_assert_eq!(record(&mut decision, &mut Partner::default(), &mut tables), Ok(()));
            // Each entry has its partner, so each flow has a reply tuple of its own.
            let all: BTreeSet<_> = tables.flows.iter().chain(&tables.embryonic).collect();
            for (key, flow) in all {
                let back = partner_key::<V4>(flow, key.protocol);
                let partner = tables.flows.get(&back).or_else(|| tables.embryonic.get(&back));
                prop_assert_eq!(partner.map(|partner| partner_key::<V4>(partner, key.protocol)), Some(*key));
            }
        }
    }

    #[test]
    fn answers_come_in_a_burst_and_then_one_a_second(
        start in prop_oneof![Just(0), u32::MAX - 20_000..=u32::MAX, any::<u32>()],
        steps in prop::collection::vec(0_u32..400, 1..200),
    ) {
        let (mut bucket, mut now, mut sent) = (None, start, 0_u32);
        for step in steps {
            now = now.wrapping_add(step);
            let (next, allowed) = take_token(bucket, now);
            bucket = Some(next);
            sent += u32::from(allowed);
            prop_assert!(next.credit_ms <= REJECT_BURST_MS);
            prop_assert!(sent * REJECT_COST_MS <= REJECT_BURST_MS + now.wrapping_sub(start));
        }
    }
}

#[test]
fn a_client_that_waited_has_its_whole_burst_again() {
    let (bucket, allowed) =
        take_token(Some(RejectBucket { refilled_ms: u32::MAX - 10, credit_ms: 0 }), 60_000);
    assert!(allowed, "time goes on where the clock wraps");
    assert_eq!(bucket.credit_ms, REJECT_BURST_MS - REJECT_COST_MS);
}
