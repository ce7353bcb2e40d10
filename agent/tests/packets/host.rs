//! The host's way: the packet's path over plain maps and bytes, and what the adapters do, told
//! plainly.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Event, Flow, Networks,
    Origin, OriginKey, Origins, PREFIXES, Prefix, Range, RejectBucket, Service, ServiceKey,
    ServicePort, Settings, Ticks, Tuple, device, device_flags, flow, node_address, state,
};
use sluice_common::engine::count::{Along, Count};
use sluice_common::engine::open::{FlowEnd, Owner, Refusal, Sockets, Steps, sockets};
use sluice_common::engine::record::{FlowTable, Partner, Place, Refused, Renewal, record};
use sluice_common::engine::xdp::may_translate;
use sluice_common::engine::{self, limit};
use sluice_common::event::{self, At};
use sluice_common::family::lane;
use sluice_common::packet::answer::{self, QUOTE, Trouble};
use sluice_common::packet::header::TcpHeader;
use sluice_common::packet::parse::{self, Headers, Kind};
use sluice_common::packet::rewrite::{Edit, can_follow, decrement_ttl, rewrite};
use sluice_common::path::fragment::{self, label};
use sluice_common::path::policy::{self, is_foreign, is_within};
use sluice_common::path::{self, Decision, Hook, Step, Verdict, partner_key};
use sluice_common::tables::Routes;
use sluice_common::{Packet, Reason, Tables, V4, V6};

use super::bytes::Bytes;
use super::case::{Case, Counted, End, Outcome, Program};
use super::ip::Ip;
use super::world::{self, Affinities, Datagrams, Exhausted, Flows, OWN_NETNS, World};

/// The time when a packet is met, where a case does not care.
pub(crate) const NOW: Ticks = 100_000;
const PAIR: usize = 12;

/// A key with a family's addresses.
pub(crate) fn service_key<F: Ip>(key: &ServiceKey<IpAddr>) -> Option<ServiceKey<F::Address>> {
    Some(ServiceKey {
        address: F::of(key.address)?,
        port: key.port,
        protocol: key.protocol,
        reserved: 0,
    })
}

/// A backend with a family's address.
pub(crate) fn backend<F: Ip>(backend: &Backend<IpAddr>) -> Option<Backend<F::Address>> {
    let Backend { address, port, generation, service_port, flags } = *backend;
    Some(Backend { address: F::of(address)?, port, generation, service_port, flags })
}

/// Origins with a family's addresses.
pub(crate) fn origins<F: Ip>(
    world: &World,
) -> BTreeMap<OriginKey<F::Address>, Origins<F::Address>> {
    let fill = |ends: &Vec<std::net::SocketAddr>| {
        let mut origins = Origins::default();
        for (origin, end) in origins.frontends.iter_mut().zip(ends) {
            *origin = Origin { address: F::of(end.ip())?, port: end.port(), reserved: 0 };
        }
        Some(origins)
    };
    world
        .origins
        .iter()
        .filter_map(|(key, ends)| Some((service_key::<F>(key)?, fill(ends)?)))
        .collect()
}

/// A tuple with a family's addresses.
pub(crate) fn tuple<F: Ip>(tuple: &Tuple<IpAddr>) -> Option<Tuple<F::Address>> {
    Some(Tuple {
        source: F::of(tuple.source)?,
        destination: F::of(tuple.destination)?,
        source_port: tuple.source_port,
        destination_port: tuple.destination_port,
        protocol: tuple.protocol,
        side: tuple.side,
        reserved: [0; 2],
    })
}

/// The way back of [`tuple`].
fn tuple_told<F: Ip>(tuple: &Tuple<F::Address>) -> Tuple<IpAddr> {
    Tuple {
        source: F::ip(tuple.source),
        destination: F::ip(tuple.destination),
        source_port: tuple.source_port,
        destination_port: tuple.destination_port,
        protocol: tuple.protocol,
        side: tuple.side,
        reserved: tuple.reserved,
    }
}

/// A mask of so many bits, as far as the family has them.
fn mask<F: Ip>(bits: u8) -> F::Address {
    let mask = !u128::MAX.checked_shr(u32::from(bits)).unwrap_or(0);
    let mask = Ipv6Addr::from(mask);
    let [a, b, c, d, ..] = mask.octets();
    F::of(mask.into()).or(F::of(Ipv4Addr::new(a, b, c, d).into())).unwrap_or_default()
}

/// Prefixes of a kind: those of the family, and what stands for none.
fn prefixes<F: Ip>(nets: &[(IpAddr, u8)]) -> [Prefix<F::Address>; PREFIXES] {
    let mut prefixes = [Prefix { network: mask::<F>(128), mask: mask::<F>(0) }; PREFIXES];
    let own = nets.iter().filter_map(|(network, bits)| {
        Some(Prefix { network: F::of(*network)?, mask: mask::<F>(*bits) })
    });
    for (prefix, own) in prefixes.iter_mut().zip(own) {
        *prefix = own;
    }
    prefixes
}

/// The ranges of the cluster with a family's addresses.
pub(crate) fn networks<F: Ip>(world: &World) -> Networks<F::Address> {
    Networks { pods: prefixes::<F>(&world.pods), services: prefixes::<F>(&world.service_nets) }
}

/// Clients with a family's addresses, and times instead of ages.
pub(crate) fn affinities<F: Ip>(
    world: &World,
    now: Ticks,
) -> BTreeMap<AffinityKey<F::Address>, Affinity> {
    let convert = |(key, entry): (&AffinityKey<IpAddr>, &Affinity)| {
        let key = AffinityKey { service_port: key.service_port, client: F::of(key.client)? };
        Some((key, Affinity { seen: now.wrapping_sub(entry.seen), ..*entry }))
    };
    world.affinity.iter().filter_map(convert).collect()
}

/// The way back of [`affinities`].
pub(crate) fn affinities_told<F: Ip>(
    entries: impl IntoIterator<Item = (AffinityKey<F::Address>, Affinity)>,
    now: Ticks,
) -> Affinities {
    let convert = |(key, entry): (AffinityKey<F::Address>, Affinity)| {
        let key = AffinityKey { service_port: key.service_port, client: F::ip(key.client) };
        (key, Affinity { seen: now.wrapping_sub(entry.seen), ..entry })
    };
    entries.into_iter().map(convert).collect()
}

/// Searches in vain with a family's addresses, and times instead of ages.
pub(crate) fn exhausted<F: Ip>(world: &World, now: Ticks) -> BTreeMap<Tuple<F::Address>, Ticks> {
    world
        .exhausted
        .iter()
        .filter_map(|(key, age)| Some((tuple::<F>(key)?, now.wrapping_sub(*age))))
        .collect()
}

/// The way back of [`exhausted`].
pub(crate) fn exhausted_told<F: Ip>(
    entries: impl IntoIterator<Item = (Tuple<F::Address>, Ticks)>,
    now: Ticks,
) -> Exhausted {
    entries.into_iter().map(|(key, tick)| (tuple_told::<F>(&key), now.wrapping_sub(tick))).collect()
}

/// Netfilter's packets with a family's addresses.
pub(crate) fn imported<F: Ip>(world: &World) -> BTreeMap<Tuple<F::Address>, u32> {
    world.imported.iter().filter_map(|(key, bits)| Some((tuple::<F>(key)?, *bits))).collect()
}

/// Datagrams with a family's addresses, and times instead of ages.
pub(crate) fn datagrams<F: Ip>(
    world: &World,
    now: Ticks,
) -> BTreeMap<Datagram<F::Address>, DatagramPorts> {
    let convert = |(key, told): (&Datagram<IpAddr>, &DatagramPorts)| {
        let &Datagram { id, protocol, reserved, .. } = key;
        let (source, destination) = (F::of(key.source)?, F::of(key.destination)?);
        let key = Datagram { source, destination, id, protocol, reserved };
        Some((key, DatagramPorts { seen: now.wrapping_sub(told.seen), ..*told }))
    };
    world.fragments.iter().filter_map(convert).collect()
}

/// The way back of [`datagrams`].
pub(crate) fn datagrams_told<F: Ip>(
    entries: impl IntoIterator<Item = (Datagram<F::Address>, DatagramPorts)>,
    now: Ticks,
) -> Datagrams {
    let convert = |(key, told): (Datagram<F::Address>, DatagramPorts)| {
        let Datagram { id, protocol, reserved, .. } = key;
        let (source, destination) = (F::ip(key.source), F::ip(key.destination));
        let key = Datagram { source, destination, id, protocol, reserved };
        (key, DatagramPorts { seen: now.wrapping_sub(told.seen), ..told })
    };
    entries.into_iter().map(convert).collect()
}

/// Entries with a family's addresses, and times instead of ages.
pub(crate) fn entries<F: Ip>(
    flows: &Flows,
    now: Ticks,
) -> BTreeMap<Tuple<F::Address>, Flow<F::Address>> {
    let convert = |key: &Tuple<IpAddr>, entry: &Flow<IpAddr>| {
        let key = tuple::<F>(key)?;
        let &Flow {
            source_port,
            destination_port,
            backend,
            service_port,
            seen,
            replied,
            generation,
            state,
            flags,
            ..
        } = entry;
        let flow = Flow {
            source: F::of(entry.source)?,
            destination: F::of(entry.destination)?,
            source_port,
            destination_port,
            backend,
            service_port,
            seen: now.wrapping_sub(seen),
            replied: match replied {
                _ if state & (state::GUESS | state::ANSWERED) != 0 => replied,
                world::UNSAID if state & state::ESTABLISHED == 0 => 0,
                world::UNSAID => now.wrapping_sub(seen),
                age => now.wrapping_sub(age),
            },
            generation,
            state,
            flags,
        };
        Some((key, flow))
    };
    flows.iter().filter_map(|(key, entry)| convert(key, entry)).collect()
}

/// The way back of [`entries`].
pub(crate) fn told<F: Ip>(
    entries: impl IntoIterator<Item = (Tuple<F::Address>, Flow<F::Address>)>,
    now: Ticks,
) -> Flows {
    let convert = |(key, entry): (Tuple<F::Address>, Flow<F::Address>)| {
        let key = tuple_told::<F>(&key);
        let Flow {
            source_port,
            destination_port,
            backend,
            service_port,
            seen,
            replied,
            generation,
            state,
            flags,
            ..
        } = entry;
        let flow = Flow {
            source: F::ip(entry.source),
            destination: F::ip(entry.destination),
            source_port,
            destination_port,
            backend,
            service_port,
            seen: now.wrapping_sub(seen),
            replied: match replied {
                _ if state & (state::GUESS | state::ANSWERED) != 0 => replied,
                // The endpoint of a proven flow was heard, at whatever tick.
                0 if state & state::ESTABLISHED == 0 => world::UNSAID,
                tick => now.wrapping_sub(tick),
            },
            generation,
            state,
            flags,
        };
        (key, flow)
    };
    entries.into_iter().map(convert).collect()
}

/// The maps of one family.
struct Memory<F: Ip> {
    world: World,
    now: Ticks,
    ifindex: u32,
    ports: BTreeMap<u32, ServicePort>,
    networks: Networks<F::Address>,
    affinity: BTreeMap<AffinityKey<F::Address>, Affinity>,
    exhausted: BTreeMap<Tuple<F::Address>, Ticks>,
    /// What the FIB has said; nothing until it is asked.
    routes: Option<Routes>,
    passed_over: u32,
    lanes: BTreeMap<(u32, u32), u8>,
    services: BTreeMap<ServiceKey<F::Address>, Service>,
    backends: BTreeMap<u32, Backend<F::Address>>,
    origins: BTreeMap<OriginKey<F::Address>, Origins<F::Address>>,
    flows: BTreeMap<Tuple<F::Address>, Flow<F::Address>>,
    embryonic: BTreeMap<Tuple<F::Address>, Flow<F::Address>>,
    fragments: BTreeMap<Datagram<F::Address>, DatagramPorts>,
    imported: BTreeMap<Tuple<F::Address>, u32>,
    marks: u32,
}

impl<F: Ip> Memory<F> {
    fn new(world: &World, ifindex: u32, now: Ticks) -> Self {
        let mut lanes: BTreeMap<(u32, u32), u8> = BTreeMap::new();
        for (address, bits) in &world.listing {
            if let Some(address) = F::of(*address) {
                *lanes.entry(lane::<F>(&address)).or_default() |= bits;
            }
        }
        let services = world
            .services
            .iter()
            .filter_map(|(key, service)| Some((service_key::<F>(key)?, *service)))
            .collect();
        let backends = world
            .backends
            .iter()
            .filter_map(|(id, found)| Some((*id, backend::<F>(found)?)))
            .collect();
        Self {
            now,
            ifindex,
            ports: world.ports.iter().map(|(id, port)| (*id, port.told())).collect(),
            networks: networks::<F>(world),
            affinity: affinities::<F>(world, now),
            exhausted: exhausted::<F>(world, now),
            routes: None,
            passed_over: 0,
            lanes,
            services,
            backends,
            origins: origins::<F>(world),
            flows: entries::<F>(&world.flows, now),
            embryonic: entries::<F>(&world.embryonic, now),
            fragments: datagrams::<F>(world, now),
            imported: imported::<F>(world),
            marks: world.marks,
            world: world.clone(),
        }
    }

    /// Notes what a first fragment tells.
    fn note(&mut self, headers: &Headers<F>, decision: &Decision<F>) {
        if decision.datagram {
            let _ = self
                .fragments
                .insert(fragment::key(headers), fragment::told(headers, decision, self.now));
        }
    }

    fn table(&mut self, place: Place) -> &mut BTreeMap<Tuple<F::Address>, Flow<F::Address>> {
        match place {
            Place::Flows => &mut self.flows,
            Place::Embryonic => &mut self.embryonic,
        }
    }
}

/// Tables without a bound.
impl<F: Ip> FlowTable<F> for Memory<F> {
    fn get(&self, place: Place, key: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        match place {
            Place::Flows => self.flows.get(key),
            Place::Embryonic => self.embryonic.get(key),
        }
    }

    fn insert(
        &mut self,
        place: Place,
        key: &Tuple<F::Address>,
        flow: &Flow<F::Address>,
        only_new: bool,
    ) -> Result<(), Refused> {
        let table = self.table(place);
        if only_new && table.contains_key(key) {
            return Err(Refused::Exists);
        }
        let _ = table.insert(*key, *flow);
        Ok(())
    }

    fn remove(&mut self, place: Place, key: &Tuple<F::Address>) {
        let _ = self.table(place).remove(key);
    }

    fn refresh(
        &mut self,
        place: Place,
        key: &Tuple<F::Address>,
        to: &Flow<F::Address>,
        renewal: Renewal,
    ) -> bool {
        let Some(entry) = self.table(place).get_mut(key) else { return false };
        if path::leads_to(entry, to) {
            renewal.apply(entry, to);
        }
        true
    }

    fn remember(&mut self, client: &AffinityKey<F::Address>, to: &Affinity) {
        let _ = self.affinity.insert(*client, *to);
    }

    fn set_marks(&mut self, bits: u32) {
        self.marks |= bits;
    }
}

/// What the adapters do for a flow's first packet.
impl<F: Ip> Memory<F> {
    /// Where packets to both ends would leave.
    fn ask(&mut self, flow: &Flow<F::Address>) {
        let device = |end| world::route(F::ip(end)).map_or(0, |(ifindex, _)| ifindex);
        self.routes =
            Some(Routes { to_backend: device(flow.destination), to_client: device(flow.source) });
    }

    /// Asks whether the packet's source belongs to the device that it came in by, where the
    /// decision depends on it.
    fn is_foreign(&self, case: &Case, headers: &Headers<F>, decision: &Decision<F>) -> bool {
        let source = &headers.tuple.source;
        let egress = matches!(case.program, Program::Egress | Program::EgressBare);
        let from = if egress { case.came_by } else { case.ifindex };
        let destination = F::ip(headers.tuple.destination);
        let bridge = self.world.devices.get(&from).map_or(0, |device| device.bridge);
        let as_from = if bridge == 0 { from } else { bridge };
        let route = |as_it_came: bool| {
            world::route_back(destination, F::ip(*source), as_it_came.then_some(as_from))
        };
        decision.asks_source && is_foreign(egress, source, from, self, route)
    }

    /// Walks all source ports, but for a tuple for which that was in vain within this tick.
    fn search(&mut self, decision: &mut Decision<F>) {
        let mut key = partner_key::<F>(&decision.flow, decision.key.protocol);
        key.destination_port = 0;
        if self.exhausted.get(&key) == Some(&self.now) {
            path::finish_search(None, decision);
            return;
        }
        path::search(self, decision);
        if decision.reason == Reason::PortsExhausted {
            let _ = self.exhausted.insert(key, self.now);
        }
    }

    /// Whether the flow may have the port of a socket that nobody can look up. The kernel gives a
    /// packet that it only tests a socket.
    fn hides_sockets(&self, decision: &Decision<F>) -> bool {
        decision.flow.flags & flow::DIRECT == 0
            && self
                .here()
                .is_some_and(|here| policy::hides_sockets(here, decision.key.protocol, true))
    }
}

/// The steps of opening a flow.
struct Opening<'m, F: Ip> {
    memory: &'m mut Memory<F>,
    hook: Hook,
    headers: &'m Headers<F>,
    decision: &'m mut Decision<F>,
}

impl<F: Ip> Steps for Opening<'_, F> {
    fn step(&self) -> Step {
        self.decision.step
    }

    fn set_step(&mut self, step: Step) {
        self.decision.step = step;
    }

    fn open(&mut self) {
        path::open_into(self.hook, self.headers, self.memory, self.decision);
    }

    fn ask_routes(&mut self) {
        self.memory.ask(&self.decision.flow);
    }

    fn search(&mut self) {
        self.memory.search(self.decision);
    }

    fn is_held(&mut self) -> bool {
        let memory = &*self.memory;
        let Some(Sockets { of, end }) = sockets(self.hook, self.decision, memory) else {
            return false;
        };
        let sees_sockets = match of {
            Owner::Host => true,
            Owner::Netns(netns) => netns == OWN_NETNS,
        };
        let to_client = partner_key::<F>(&self.decision.flow, self.decision.key.protocol);
        let tuple = match end {
            FlowEnd::Client => to_client,
            FlowEnd::Backend => to_client.reversed(),
        };
        sees_sockets && memory.world.held.contains(&tuple_told::<F>(&tuple))
    }

    fn pass_over_one(&mut self) {
        self.memory.passed_over += 1;
    }

    fn record(&mut self) -> Refusal {
        Refusal::of(record(self.decision, &mut Partner::default(), self.memory))
    }
}

impl<F: Ip> Tables<F> for Memory<F> {
    fn listing(&self, address: &F::Address) -> u8 {
        self.lanes.get(&lane::<F>(address)).copied().unwrap_or_default()
    }

    fn flow(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        self.flows.get(tuple)
    }

    fn embryonic(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        self.embryonic.get(tuple)
    }

    fn imported(&self, tuple: &Tuple<F::Address>) -> Option<u32> {
        self.imported.get(tuple).copied()
    }

    fn datagram(&self, key: &Datagram<F::Address>) -> Option<&DatagramPorts> {
        self.fragments.get(key)
    }

    fn service(&self, key: &ServiceKey<F::Address>) -> Option<&Service> {
        self.services.get(key)
    }

    fn range(&self, service_port: u32, class: Class) -> Option<Range> {
        Some(
            self.world
                .ports
                .get(&service_port)
                .map_or(Range::default(), |port| port.ranges[class as usize]),
        )
    }

    fn slot(&self, slot: u32) -> Option<u32> {
        Some(self.world.slots.get(&slot).copied().unwrap_or_default())
    }

    fn backend(&self, id: u32) -> Option<&Backend<F::Address>> {
        self.backends.get(&id)
    }

    fn origins(&self, key: &OriginKey<F::Address>) -> Option<&Origins<F::Address>> {
        self.origins.get(key)
    }

    fn marks(&self) -> u32 {
        self.marks
    }

    fn port(&self, service_port: u32) -> Option<&ServicePort> {
        self.ports.get(&service_port)
    }

    fn affinity(&self, key: &AffinityKey<F::Address>) -> Option<&Affinity> {
        self.affinity.get(key)
    }

    fn in_source_ranges(&self, service_port: u32, address: &F::Address) -> bool {
        let own =
            |(id, net, bits): &(u32, IpAddr, u8)| (*id == service_port).then_some((*net, *bits));
        let ranges: Vec<(IpAddr, u8)> = self.world.source_ranges.iter().filter_map(own).collect();
        ranges.chunks(PREFIXES).any(|ranges| is_within::<F>(&prefixes::<F>(ranges), address))
    }

    fn is_node_port(&self, port: u16) -> bool {
        self.world.node_ports.contains(&port)
    }

    fn is_node_address(&self, address: &F::Address) -> bool {
        self.world.node_addresses.contains_key(&F::ip(*address))
    }

    fn serves_node_ports(&self, address: &F::Address) -> bool {
        let flags = self.world.node_addresses.get(&F::ip(*address));
        flags.is_some_and(|flags| flags & node_address::NODE_PORTS != 0)
    }

    fn settings(&self) -> Option<&Settings> {
        Some(&self.world.settings)
    }

    fn networks(&self) -> Option<&Networks<F::Address>> {
        Some(&self.networks)
    }

    fn device(&self, ifindex: u32) -> Option<&Device> {
        self.world.devices.get(&ifindex)
    }

    fn here(&self) -> Option<&Device> {
        self.world.devices.get(&self.ifindex)
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn routes(&self) -> Option<Routes> {
        self.routes
    }

    fn passed_over(&self) -> u32 {
        self.passed_over
    }

    fn now(&self) -> Ticks {
        self.now
    }
}

/// Runs a case on the host.
pub(crate) fn run(case: &Case) -> Outcome {
    run_at(case, NOW)
}

/// Runs a case on the host at some time.
pub(crate) fn run_at(case: &Case, now: Ticks) -> Outcome {
    let link =
        if matches!(case.program, Program::IngressBare | Program::EgressBare) { 0 } else { 14 };
    let packet = Bytes { bytes: case.input.clone(), partial: case.partial };
    // A bare packet's ethertype lies outside of it.
    let ethertype = match (link, packet.bytes.first().map(|first| first >> 4)) {
        (0, Some(4)) => Some(0x0800),
        (0, Some(6)) => Some(0x86dd),
        (0, _) => None,
        _ => packet.read::<u16>(PAIR as u32).map(u16::from_be),
    };
    match ethertype.and_then(|ethertype| parse::untag(&packet, ethertype, link)) {
        Some((0x0800, offset)) => run_family::<V4>(case, packet, offset, now),
        Some((0x86dd, offset)) => run_family::<V6>(case, packet, offset, now),
        _ => untouched(case),
    }
}

/// What comes of a packet that is not looked at.
fn untouched(case: &Case) -> Outcome {
    Outcome {
        end: if case.program == Program::Xdp { End::XdpPass } else { End::Next },
        frame: case.input.clone(),
        counted: Some(Vec::new()),
        events: Some(Vec::new()),
        flows: case.world.flows.clone(),
        embryonic: case.world.embryonic.clone(),
        affinity: case.world.affinity.clone(),
        exhausted: case.world.exhausted.clone(),
        fragments: case.world.fragments.clone(),
        marks: case.world.marks,
    }
}

fn run_family<F: Ip>(case: &Case, mut packet: Bytes, offset: u32, now: Ticks) -> Outcome {
    let hook = match case.program {
        Program::Ingress | Program::IngressBare => Hook::Ingress,
        Program::Egress | Program::EgressBare => Hook::Egress,
        Program::Xdp => Hook::Xdp,
    };
    let mut memory = Memory::<F>::new(&case.world, case.ifindex, now);
    let (end, (counted, told_of)) = match parse::headers::<F, _>(&packet, offset) {
        None => (if hook == Hook::Xdp { End::XdpPass } else { End::Next }, NOTHING),
        Some(headers) => {
            let mut decision = Decision::pass(&headers.tuple);
            path::decide_into(hook, &headers, &memory, &mut decision);
            if hook == Hook::Xdp {
                xdp(case, &mut packet, &headers, decision, &mut memory)
            } else {
                tc(case, &mut packet, &headers, decision, &mut memory)
            }
        }
    };
    Outcome {
        end,
        frame: packet.bytes,
        counted: Some(counted.into_iter().collect()),
        events: Some(told_of.into_iter().collect()),
        flows: told::<F>(memory.flows, now),
        embryonic: told::<F>(memory.embryonic, now),
        affinity: affinities_told::<F>(memory.affinity, now),
        exhausted: exhausted_told::<F>(memory.exhausted, now),
        fragments: said(case).chain(datagrams_told::<F>(memory.fragments, now)).collect(),
        marks: memory.marks,
    }
}

/// What the agent says of itself in both families' maps of datagrams.
fn said(case: &Case) -> impl Iterator<Item = (Datagram<IpAddr>, DatagramPorts)> {
    case.world
        .fragments
        .iter()
        .filter(|(key, _)| key.protocol == 0)
        .map(|(key, told)| (*key, *told))
}

/// How a packet was counted, and what was told of it.
type Noted = (Option<Counted>, Option<Event>);
const NOTHING: Noted = (None, None);

fn noted<F: Ip>(
    case: &Case,
    hook: Hook,
    headers: &Headers<F>,
    decision: &Decision<F>,
    dropped: bool,
) -> Noted {
    let told = event::kind(decision, headers).map(|kind| {
        let mut event = Event {
            kind: kind as u8,
            at: At::from(hook) as u8,
            ifindex: case.ifindex,
            ..Event::default()
        };
        event::packet(&mut event, headers, decision, event::fate(decision.verdict, dropped));
        event
    });
    (count(decision, headers.length), told)
}

fn count<F: Ip>(decision: &Decision<F>, bytes: u32) -> Option<Counted> {
    match Count::of(decision) {
        Count::Nowhere => None,
        Count::Backend { id: backend, along: Along::Forward { opens } } => {
            Some(Counted::Forward { backend, bytes, opened: opens })
        }
        Count::Backend { id: backend, along: Along::Reply } => {
            Some(Counted::Reply { backend, bytes })
        }
        Count::Reason { reason, service_port } => {
            Some(Counted::Reason { reason, service_port, bytes })
        }
    }
}

fn xdp<F: Ip>(
    case: &Case,
    packet: &mut Bytes,
    headers: &Headers<F>,
    mut decision: Decision<F>,
    memory: &mut Memory<F>,
) -> (End, Noted) {
    if memory.is_foreign(case, headers, &decision) {
        return (End::XdpPass, NOTHING);
    }
    if decision.step != Step::Done {
        memory.passed_over = 0;
        engine::open::decide(&mut Opening {
            memory,
            hook: Hook::Xdp,
            headers,
            decision: &mut decision,
        });
    }
    let ours = case
        .world
        .devices
        .get(&case.ifindex)
        .is_some_and(|device| packet.bytes.starts_with(&device.mac));
    if !may_translate(headers, &decision, memory)
        || !ours
        || record(&mut decision, &mut Partner::default(), memory).is_err()
    {
        return (End::XdpPass, NOTHING);
    }
    memory.note(headers, &decision);
    if rewrite(packet, headers, &decision.flow) {
        (End::XdpPass, noted(case, Hook::Xdp, headers, &decision, false))
    } else {
        (End::XdpDrop, NOTHING)
    }
}

fn tc<F: Ip>(
    case: &Case,
    packet: &mut Bytes,
    headers: &Headers<F>,
    mut decision: Decision<F>,
    memory: &mut Memory<F>,
) -> (End, Noted) {
    let ingress = matches!(case.program, Program::Ingress | Program::IngressBare);
    let link = matches!(case.program, Program::Ingress | Program::Egress);
    let hook = if ingress { Hook::Ingress } else { Hook::Egress };
    let is_done = decision.step == Step::Done;
    if decision.verdict == Verdict::Pass && is_done {
        memory.note(headers, &decision);
        return (End::Next, noted(case, hook, headers, &decision, false));
    }
    let inside =
        case.world.devices.get(&case.ifindex).is_some_and(|device| device.role == device::EDGE);
    if ingress && link && packet.bytes.first().is_some_and(|first| first & 1 != 0) {
        return (End::Next, NOTHING);
    }
    if ingress && link && !inside && !packet.bytes.starts_with(&world::mac(case.ifindex)) {
        return (End::Next, NOTHING);
    }
    if memory.is_foreign(case, headers, &decision) {
        path::disown(hook, headers, memory, &mut decision);
    }
    let refusal = if decision.step == Step::Done {
        Refusal::of(record(&mut decision, &mut Partner::default(), memory))
    } else {
        memory.passed_over = u32::from(hook == Hook::Ingress && memory.hides_sockets(&decision));
        engine::open::open(&mut Opening { memory, hook, headers, decision: &mut decision })
    };
    memory.note(headers, &decision);
    let end = apply(case, packet, headers, &mut decision, refusal);
    (end, noted(case, hook, headers, &decision, end == End::Drop))
}

/// Applies a decision; leaves in it the reason why the packet was dropped after all.
fn apply<F: Ip>(
    case: &Case,
    packet: &mut Bytes,
    headers: &Headers<F>,
    decision: &mut Decision<F>,
    refusal: Refusal,
) -> End {
    let ingress = matches!(case.program, Program::Ingress | Program::IngressBare);
    let link = matches!(case.program, Program::Ingress | Program::Egress);
    let (source, destination) = (F::ip(headers.tuple.source), F::ip(decision.flow.destination));
    let answerable = match source {
        IpAddr::V4(address) => address.octets()[0] != 0 && address.octets()[0] < 224,
        IpAddr::V6(address) => !address.is_unspecified() && !address.is_multicast(),
    };
    match decision.verdict {
        Verdict::Pass => return End::Next,
        Verdict::Drop => return End::Drop,
        Verdict::Hold => {
            let flags = u8::from(!ingress) * label::EGRESS + u8::from(!link) * label::BARE;
            let [a, b, c, d] = case.ifindex.to_be_bytes();
            let _ = packet.bytes.splice(..0, [2, flags, a, b, c, d, 0, 0, 0, 0, 0, 0, 0x88, 0xb5]);
            return End::Redirect;
        }
        Verdict::Reset | Verdict::Unreachable if !answerable => {
            decision.reason = Reason::NoBackendDropped;
            return End::Drop;
        }
        Verdict::Reset => {
            let Some(segment) = packet.read::<TcpHeader>(headers.transport) else {
                return End::Drop;
            };
            let (network, reset) = answer::reset(headers, &segment);
            packet.bytes.resize((headers.network + F::HEADER + 20) as usize, 0);
            assert!(
                packet.store(headers.network, network)
                    && packet.store(headers.network + F::HEADER, reset)
            );
            return send_answer(case, packet, link, ingress);
        }
        Verdict::Unreachable => {
            if !may_answer(case, source) {
                decision.reason = Reason::RejectLimited;
                return End::Drop;
            }
            error(packet, headers, Trouble::PortUnreachable, 0);
            return send_answer(case, packet, link, ingress);
        }
        Verdict::Translate
        | Verdict::Around
        | Verdict::TurnBack
        | Verdict::HandIn
        | Verdict::Route => {}
    }
    if let Some(reason) = refusal.reason() {
        decision.reason = reason;
        return End::Drop;
    }
    // The device that packets which are to be fragmented enter the stack by.
    let mut fragments = 0;
    if decision.verdict == Verdict::Route {
        let Some((_, mtu)) = world::route(destination) else {
            decision.reason = Reason::NoRoute;
            return End::Drop;
        };
        if headers.length > mtu {
            let is_error = headers.kind == Kind::IcmpError;
            let forbids = F::VERSION == 6 || packet.bytes[headers.network as usize + 6] & 0x40 != 0;
            if !is_error && !forbids {
                fragments = case.world.settings.own_device;
            }
            if fragments == 0 {
                decision.reason = Reason::TooBig;
                if is_error || !forbids {
                    return End::Drop;
                }
                error(packet, headers, Trouble::TooBig, mtu);
                return send_answer(case, packet, link, ingress);
            }
        }
    }
    let bypasses = decision.verdict == Verdict::TurnBack
        || decision.verdict == Verdict::Route && ingress && fragments == 0;
    if bypasses && !decrement_ttl(packet, headers) {
        decision.reason = Reason::TtlExceeded;
        if headers.kind != Kind::Transport || !answerable || !may_answer(case, source) {
            return End::Drop;
        }
        error(packet, headers, Trouble::TimeExceeded, 0);
        return send_answer(case, packet, link, ingress);
    }
    let is_answer = decision.is_answer();
    if !is_answer && !rewrite(packet, headers, &decision.flow) {
        assert!(!can_follow(headers, &decision.flow), "a frame in memory can be rewritten");
        decision.reason = Reason::RewriteFailed;
        return End::Drop;
    }
    if decision.verdict == Verdict::Around {
        if goes_around(case, packet, headers, destination, link) {
            assert!(decrement_ttl(packet, headers), "its TTL is more than one");
            return sent_on::<F>(packet, link);
        }
        if is_answer {
            return End::Next;
        }
    }
    match decision.verdict {
        Verdict::Translate | Verdict::Around => {
            let bridge = case.world.devices.get(&case.ifindex).map_or(0, |device| device.bridge);
            let forward = decision.flow.flags & (flow::REPLY | flow::MASQUERADED) == 0;
            if ingress
                && link
                && bridge == world::BRIDGE
                && forward
                && world::bridge_knows(destination)
            {
                packet.bytes[..6].copy_from_slice(&world::BACKEND_MAC);
            }
            End::Next
        }
        Verdict::TurnBack => turn_back(packet, link),
        Verdict::HandIn => {
            let (from, to) = (F::ip(decision.flow.source), F::ip(decision.flow.destination));
            let named = world::route(from).filter(|_| ingress);
            let target = if ingress && (from == to || case.world.node_addresses.contains_key(&from))
            {
                world::LOOPBACK
            } else {
                named.map_or(case.ifindex, |(ifindex, _)| ifindex)
            };
            if ingress && target == case.ifindex {
                return End::Next;
            }
            hand_in(case, packet, link, target, F::ETHERTYPE)
        }
        Verdict::Route if fragments != 0 => hand_in(case, packet, link, fragments, F::ETHERTYPE),
        Verdict::Route => sent_on::<F>(packet, link),
        Verdict::Pass | Verdict::Drop | Verdict::Reset | Verdict::Unreachable | Verdict::Hold => {
            End::Redirect
        }
    }
}

/// Sent where the FIB says.
fn sent_on<F: Ip>(packet: &mut Bytes, link: bool) -> End {
    if !link {
        let header = [&[0; 12][..], &F::ETHERTYPE.to_be_bytes()[..]].concat();
        let _ = packet.bytes.splice(..0, header);
    }
    End::Redirect
}

/// Whether the stack would do no more with a packet than forward it.
fn goes_around<F: Ip>(
    case: &Case,
    packet: &Bytes,
    headers: &Headers<F>,
    destination: IpAddr,
    link: bool,
) -> bool {
    let Some(here) = case.world.devices.get(&case.ifindex) else { return false };
    let of_bridge =
        || packet.bytes[3..6] == (here.flags >> device_flags::BRIDGE_MAC_SHIFT).to_be_bytes()[1..];
    let is_addressed = !link
        || if here.bridge == 0 {
            packet.bytes.starts_with(&world::mac(case.ifindex))
        } else {
            of_bridge()
        };
    let network = headers.network as usize;
    let has_options = match F::VERSION {
        4 => packet.bytes[network] != 0x45,
        _ => packet.bytes[network + 6] == 0,
    };
    let route =
        world::route(destination).filter(|(target, _)| here.bridge == 0 || *target != here.bridge);
    is_addressed
        && here.flags & device_flags::SWITCHED == 0
        && network == if link { PAIR + 2 } else { 0 }
        && headers.ttl > 1
        && !has_options
        && route.is_some_and(|(_, mtu)| headers.length <= mtu)
}

fn hand_in(case: &Case, packet: &mut Bytes, link: bool, target: u32, ethertype: u16) -> End {
    let Some(device) = case.world.devices.get(&target) else { return End::Drop };
    if device.link_header != 0 && link {
        packet.bytes[..6].copy_from_slice(&device.mac);
    } else if device.link_header != 0 {
        let header = [&device.mac[..], &device.mac[..], &ethertype.to_be_bytes()[..]].concat();
        let _ = packet.bytes.splice(..0, header);
    }
    End::Redirect
}

fn turn_back(packet: &mut Bytes, link: bool) -> End {
    if link {
        packet.bytes[..PAIR].rotate_left(6);
    }
    End::Redirect
}

fn send_answer(case: &Case, packet: &mut Bytes, link: bool, ingress: bool) -> End {
    if ingress {
        return turn_back(packet, link);
    }
    if link {
        let Some(device) = case.world.devices.get(&case.ifindex) else { return End::Drop };
        packet.bytes[..6].copy_from_slice(&device.mac);
    }
    End::Redirect
}

/// Whether client and device have credit for one more ICMP error.
fn may_answer(case: &Case, client: IpAddr) -> bool {
    const NOW_MS: u32 = 5_000;
    let bucket = |address: IpAddr| {
        let credit_ms = *case.world.rejects.get(&address)?;
        Some(RejectBucket { refilled_ms: NOW_MS, credit_ms })
    };
    limit::take_token(bucket(client), NOW_MS).1
        && limit::take_device_token(bucket(world::rejects_of(case.ifindex)), NOW_MS).1
}

/// Writes an ICMP error over the packet.
fn error<F: Ip>(packet: &mut Bytes, headers: &Headers<F>, trouble: Trouble, mtu: u32) {
    let kind = trouble.code::<F>();
    let start = headers.network as usize;
    let length = (headers.length.min(QUOTE) & !3) as usize;
    let quote = packet.bytes[start..start + length].to_vec();
    let sum = quote.chunks(2).map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]]))).sum();
    let (network, icmp) = answer::error(headers, kind, mtu, length as u32, sum);
    packet.bytes.resize(start + F::HEADER as usize + 8 + length, 0);
    packet.bytes[start + F::HEADER as usize + 8..].copy_from_slice(&quote);
    assert!(
        packet.store(headers.network, network) && packet.store(headers.network + F::HEADER, icmp)
    );
}
