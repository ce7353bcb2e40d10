//! Runs a case on the host: the engine over plain maps and bytes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Event, Flow, Networks,
    OriginKey, Origins, PREFIXES, Range, RejectBucket, RejectKey, Service, ServiceKey, ServicePort,
    Settings, Ticks, Tuple, device, flow, node_address,
};
use sluice_common::engine::act;
use sluice_common::engine::adapter::{
    Action, Adapter, Addressee, Arrival, ForwardQuery, RouteQuery, Target,
};
use sluice_common::engine::count::{Count, Direction};
use sluice_common::engine::open::{FlowEnd, Owner, Refusal, Sockets, Steps, sockets};
use sluice_common::engine::record::{FlowMap, FlowTable, InsertError, Partner, Renewal, record};
use sluice_common::engine::search::{PortSearch, search};
use sluice_common::engine::xdp::{Fate, XdpProgram};
use sluice_common::engine::{self, tc::TcProgram};
use sluice_common::event::{self, At};
use sluice_common::family::lane;
use sluice_common::packet::answer::IcmpError;
use sluice_common::packet::bytes::Bytes;
use sluice_common::packet::parse::{self, Headers};
use sluice_common::packet::rewrite::{can_follow, rewrite, segment};
use sluice_common::path::fragment;
use sluice_common::path::policy::{self, is_foreign, is_within};
use sluice_common::path::{self, Decision, Hook, Step, partner_key, walk_ports};
use sluice_common::tables::Routes;
use sluice_common::{Failure, Packet, Reason, Tables, V4, V6};

use super::case::{Case, Counted, End, Outcome, Program};
use super::convert::{
    affinities, affinities_told, backend, datagrams, datagrams_told, entries, exhausted,
    exhausted_told, imported, networks, origins, prefixes, service_key, told, tuple_told,
};
use super::ip::Ip;
use super::world::{self, OWN_NETNS, World};

/// The time at which a packet arrives, for cases in which it does not matter.
pub(crate) const NOW: Ticks = 100_000;
/// Bytes of the two addresses of a link header.
const PAIR: usize = 12;
/// The time that counts for the limit of ICMP errors.
const NOW_MS: u32 = 5_000;

/// The maps of one family, without a bound.
struct Memory<F: Ip> {
    world: World,
    now: Ticks,
    ifindex: u32,
    ports: BTreeMap<u32, ServicePort>,
    networks: Networks<F::Address>,
    affinity: BTreeMap<AffinityKey<F::Address>, Affinity>,
    exhausted: BTreeMap<Tuple<F::Address>, Ticks>,
    /// The FIB's answers, or `None` before they are requested.
    routes: Option<Routes>,
    ports_to_skip: u32,
    lanes: BTreeMap<(u32, u32), u8>,
    services: BTreeMap<ServiceKey<F::Address>, Service>,
    backends: BTreeMap<u32, Backend<F::Address>>,
    origins: BTreeMap<OriginKey<F::Address>, Origins<F::Address>>,
    flows: BTreeMap<Tuple<F::Address>, Flow<F::Address>>,
    embryonic: BTreeMap<Tuple<F::Address>, Flow<F::Address>>,
    fragments: BTreeMap<Datagram<F::Address>, DatagramPorts>,
    imported: BTreeMap<Tuple<F::Address>, u32>,
    marks: u32,
    failed: Vec<(u32, Failure)>,
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
            ports_to_skip: 0,
            lanes,
            services,
            backends,
            origins: origins::<F>(world),
            flows: entries::<F>(&world.flows, now),
            embryonic: entries::<F>(&world.embryonic, now),
            fragments: datagrams::<F>(world, now),
            imported: imported::<F>(world),
            marks: world.marks,
            failed: Vec::new(),
            world: world.clone(),
        }
    }

    fn table(&mut self, place: FlowMap) -> &mut BTreeMap<Tuple<F::Address>, Flow<F::Address>> {
        match place {
            FlowMap::Flows => &mut self.flows,
            FlowMap::Embryonic => &mut self.embryonic,
        }
    }
}

/// Tables without a bound.
impl<F: Ip> FlowTable<F> for Memory<F> {
    fn get(&self, place: FlowMap, key: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        match place {
            FlowMap::Flows => self.flows.get(key),
            FlowMap::Embryonic => self.embryonic.get(key),
        }
    }

    fn insert(
        &mut self,
        place: FlowMap,
        key: &Tuple<F::Address>,
        flow: &Flow<F::Address>,
        only_new: bool,
    ) -> Result<(), InsertError> {
        let table = self.table(place);
        if only_new && table.contains_key(key) {
            return Err(InsertError::Exists);
        }
        let _ = table.insert(*key, *flow);
        Ok(())
    }

    fn remove(&mut self, place: FlowMap, key: &Tuple<F::Address>) {
        let _ = self.table(place).remove(key);
    }

    fn refresh(
        &mut self,
        place: FlowMap,
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

    fn record_affinity(&mut self, client: &AffinityKey<F::Address>, to: &Affinity) {
        let _ = self.affinity.insert(*client, *to);
    }

    fn set_marks(&mut self, bits: u32) {
        self.marks |= bits;
    }

    fn count_failure(&mut self, backend: u32, failure: Failure) {
        self.failed.push((backend, failure));
    }
}

impl<F: Ip> PortSearch<F> for Memory<F> {
    fn now(&self) -> Ticks {
        self.now
    }

    fn failed_at(&self, key: &Tuple<F::Address>) -> Option<Ticks> {
        self.exhausted.get(key).copied()
    }

    fn set_failed(&mut self, key: &Tuple<F::Address>, at: Ticks) {
        let _ = self.exhausted.insert(*key, at);
    }

    fn walk(&mut self, decision: &Decision<F>) -> Option<u16> {
        walk_ports(self, decision)
    }
}

/// A packet in memory, and the host of the case.
struct Host<'c> {
    case: &'c Case,
    packet: Bytes<Vec<u8>>,
}

impl<F: Ip> Adapter<F> for Host<'_> {
    type Frame = Bytes<Vec<u8>>;

    fn frame(&self) -> &Self::Frame {
        &self.packet
    }

    fn frame_mut(&mut self) -> &mut Self::Frame {
        &mut self.packet
    }

    fn hook(&self) -> Hook {
        match self.case.program {
            Program::Ingress | Program::IngressL3 => Hook::Ingress,
            Program::Egress | Program::EgressL3 => Hook::Egress,
            Program::Xdp => Hook::Xdp,
        }
    }

    fn link(&self) -> u32 {
        self.case.program.link()
    }

    fn ifindex(&self) -> u32 {
        self.case.ifindex
    }

    fn fwmark(&self) -> u32 {
        0
    }

    fn segment_size(&self) -> u32 {
        0
    }

    fn arrival(&self) -> Arrival {
        let to = match self.packet.bytes.first() {
            Some(first) if first & 1 != 0 => Addressee::Many,
            _ if self.packet.bytes.starts_with(&world::mac(self.case.ifindex)) => Addressee::Host,
            _ => Addressee::Other,
        };
        Arrival { to, tag: None }
    }

    fn device(&self, ifindex: u32) -> Option<&Device> {
        self.case.world.devices.get(&ifindex)
    }

    fn own_device(&self) -> u32 {
        self.case.world.settings.own_device
    }

    fn is_own_address(&self, address: &F::Address) -> bool {
        self.case.world.node_addresses.contains_key(&F::ip(*address))
    }

    fn route(&self, _: &F::Address, destination: &F::Address, way: &RouteQuery) -> Target {
        match world::route(F::ip(*destination)) {
            Some((_, mtu)) if way.length > mtu => Target::TooBig(mtu),
            Some((ifindex, _)) => Target::Device(ifindex),
            None => Target::None,
        }
    }

    fn forward(&mut self, packet: &ForwardQuery<F::Address>) -> Option<u32> {
        let (ifindex, mtu) = world::route(F::ip(packet.destination))?;
        (packet.way.length <= mtu).then_some(ifindex)
    }

    fn neighbour(&self, _: &F::Address, to: &F::Address, ifindex: u32) -> Option<[u8; 6]> {
        (ifindex == world::BRIDGE && world::bridge_knows(F::ip(*to))).then_some(world::BACKEND_MAC)
    }

    /// The routes' MTUs are in the targets already.
    fn route_mtu(&self, _: &F::Address, _: u32) -> u32 {
        0
    }

    /// As with [`Adapter::route_mtu`].
    fn exceeded_mtu(&self, _: u32, _: i32) -> Option<u32> {
        None
    }

    fn bucket(&self, key: &RejectKey) -> Option<RejectBucket> {
        let rejects = &self.case.world.rejects;
        let (_, credit_ms) =
            rejects.iter().find(|(client, _)| world::reject_key(**client) == *key)?;
        Some(RejectBucket { refilled_ms: NOW_MS, credit_ms: *credit_ms })
    }

    /// A case has one packet, so nothing is kept.
    fn set_bucket(&mut self, _: &RejectKey, _: &RejectBucket) {}

    fn now_ms(&self) -> u32 {
        NOW_MS
    }

    fn rewrite(&mut self, headers: &Headers<F>, flow: &Flow<F::Address>) -> bool {
        let is_rewritten = rewrite(&mut self.packet, headers, flow);
        assert!(is_rewritten || !can_follow(headers, flow), "a frame in memory can be rewritten");
        is_rewritten
    }

    fn write_error(&mut self, headers: &Headers<F>, error: IcmpError, mtu: u32) -> bool {
        act::write_error(&mut self.packet, headers, error, mtu)
    }

    /// Packets in memory have no tags outside of the frame.
    fn take_tags_off(&mut self) {}

    /// No other program sees a case's packet.
    fn set_translated(&mut self) {}

    fn set_held(&mut self) {}
}

/// A case's packet in a program.
struct Run<'c, F: Ip> {
    host: Host<'c>,
    memory: Memory<F>,
    headers: Headers<F>,
    decision: Decision<F>,
    /// The counter of the packet and the events about it.
    counted: Option<Counted>,
    event: Option<Event>,
}

impl<F: Ip> Run<'_, F> {
    fn hook(&self) -> Hook {
        Adapter::<F>::hook(&self.host)
    }

    fn begin_open(&mut self, ports: u32) {
        self.memory.routes = None;
        self.memory.ports_to_skip = ports;
    }

    fn decide(&mut self) {
        self.decision = Decision::pass(&self.headers.tuple);
        path::decide_into(self.hook(), &self.headers, &self.memory, &mut self.decision);
    }

    /// Records the ports of a first fragment.
    fn note(&mut self) {
        let said = fragment::ports(&self.headers, &self.decision, self.memory.now);
        let _ = self.memory.fragments.insert(fragment::key(&self.headers), said);
    }

    fn has_foreign_source(&self) -> bool {
        let Case { came_by, ifindex, .. } = *self.host.case;
        let (source, destination) =
            (&self.headers.tuple.source, F::ip(self.headers.tuple.destination));
        let from = if self.hook().is_egress() { came_by } else { ifindex };
        let bridge = self.memory.device(from).map_or(0, |device| device.bridge);
        let as_from = if bridge == 0 { from } else { bridge };
        let route = |as_it_came: bool| {
            world::route_back(destination, F::ip(*source), as_it_came.then_some(as_from))
        };
        is_foreign(self.hook(), source, from, &self.memory, route)
    }

    fn count(&mut self, is_dropped: bool) {
        let (headers, decision) = (&self.headers, &self.decision);
        self.counted = count(decision, headers.length);
        self.event = event::kind(decision, headers).map(|kind| {
            let mut event = Event {
                kind: kind as u8,
                at: At::from(self.hook()) as u8,
                ifindex: self.host.case.ifindex,
                ..Event::default()
            };
            event::packet(&mut event, headers, decision, event::fate(decision.verdict, is_dropped));
            event
        });
    }
}

impl<F: Ip> Steps<F> for Run<'_, F> {
    fn decision(&self) -> &Decision<F> {
        &self.decision
    }

    fn set_step(&mut self, step: Step) {
        self.decision.step = step;
    }

    fn open(&mut self) {
        path::open_into(self.hook(), &self.headers, &self.memory, &mut self.decision);
    }

    fn look_up_routes(&mut self) {
        let device = |end| world::route(F::ip(end)).map_or(0, |(ifindex, _)| ifindex);
        let Flow { source, destination, .. } = self.decision.flow;
        self.memory.routes =
            Some(Routes { to_backend: device(destination), to_client: device(source) });
    }

    fn search(&mut self) {
        search(&mut self.decision, &mut self.memory);
    }

    fn is_taken_by_socket(&mut self) -> bool {
        let Some(Sockets { of, end }) = sockets(self.hook(), &self.decision, &self.memory) else {
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
        sees_sockets && self.memory.world.held.contains(&tuple_told::<F>(&tuple))
    }

    fn skip_one_port(&mut self) {
        self.memory.ports_to_skip += 1;
    }

    fn record(&mut self) -> Refusal {
        Refusal::of(record(&mut self.decision, &mut Partner::default(), &mut self.memory))
    }
}

impl<'c, F: Ip> TcProgram<F> for Run<'c, F> {
    type Adapter = Host<'c>;

    fn decide(&mut self) {
        self.decide();
    }

    fn pass(&mut self) {
        self.decision = Decision::pass(&self.headers.tuple);
    }

    fn restrict_foreign(&mut self) {
        path::restrict_foreign(self.hook(), &self.headers, &self.memory, &mut self.decision);
    }

    fn note(&mut self) {
        self.note();
    }

    fn is_for_others(&self) -> bool {
        let is_edge = self.memory.hook_device().is_some_and(|here| here.role == device::EDGE);
        act::is_for_others(Adapter::<F>::arrival(&self.host), is_edge)
    }

    fn has_foreign_source(&self) -> bool {
        self.has_foreign_source()
    }

    /// The kernel gives a packet of a test run a socket.
    fn has_hidden_socket(&mut self) -> bool {
        let Decision { flow, key, .. } = &self.decision;
        let hides = |here| policy::hides_sockets(here, key.protocol, true);
        flow.flags & flow::DIRECT == 0 && self.memory.hook_device().is_some_and(hides)
    }

    fn begin(&mut self, ports_to_skip: u32) {
        self.begin_open(ports_to_skip);
    }

    fn parts(&mut self) -> (&mut Host<'c>, &Headers<F>, &Decision<F>) {
        (&mut self.host, &self.headers, &self.decision)
    }

    fn set_reason(&mut self, reason: Reason) {
        self.decision.reason = reason;
    }

    fn count(&mut self, is_dropped: bool) {
        self.count(is_dropped);
    }
}

impl<F: Ip> XdpProgram<F> for Run<'_, F> {
    fn decide(&mut self) {
        self.decide();
    }

    fn has_foreign_source(&self) -> bool {
        self.has_foreign_source()
    }

    fn begin(&mut self) {
        self.begin_open(0);
    }

    fn headers(&self) -> &Headers<F> {
        &self.headers
    }

    fn is_addressed_here(&self) -> bool {
        let here = self.memory.hook_device();
        here.is_some_and(|device| self.host.packet.bytes.starts_with(&device.mac))
    }

    /// The kernel's harness counts the mark as part of the frame that it precedes.
    fn mark_translated(&mut self) -> bool {
        true
    }

    fn unmark_translated(&mut self) {}

    fn note(&mut self) {
        self.note();
    }

    fn translate(&mut self) -> bool {
        segment(&mut self.host.packet, &self.headers, &self.decision.flow)
    }

    fn set_reason(&mut self, reason: Reason) {
        self.decision.reason = reason;
    }

    fn count(&mut self, is_dropped: bool) {
        self.count(is_dropped);
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

    fn hook_device(&self) -> Option<&Device> {
        self.world.devices.get(&self.ifindex)
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn routes(&self) -> Option<Routes> {
        self.routes
    }

    fn ports_to_skip(&self) -> u32 {
        self.ports_to_skip
    }

    fn now(&self) -> Ticks {
        self.now
    }
}

/// Runs a case on the host.
pub(crate) fn run(case: &Case) -> Outcome {
    run_at(case, NOW)
}

/// Runs a case on the host at a time of the clock.
pub(crate) fn run_at(case: &Case, now: Ticks) -> Outcome {
    let link = case.program.link();
    let packet = Bytes { bytes: case.input.clone(), partial: case.partial };
    // The ethertype of a packet without a link header is not part of it.
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

/// Returns the outcome of a packet that is not examined.
fn untouched(case: &Case) -> Outcome {
    Outcome {
        end: if case.program == Program::Xdp { End::XdpPass } else { End::Next },
        frame: case.input.clone(),
        counted: Some(Vec::new()),
        failed: Vec::new(),
        events: Some(Vec::new()),
        flows: case.world.flows.clone(),
        embryonic: case.world.embryonic.clone(),
        affinity: case.world.affinity.clone(),
        exhausted: case.world.exhausted.clone(),
        fragments: case.world.fragments.clone(),
        marks: case.world.marks,
    }
}

fn run_family<F: Ip>(case: &Case, packet: Bytes<Vec<u8>>, offset: u32, now: Ticks) -> Outcome {
    let Some(headers) = parse::headers::<F, _>(&packet, offset) else { return untouched(case) };
    let mut run = Run {
        host: Host { case, packet },
        memory: Memory::<F>::new(&case.world, case.ifindex, now),
        decision: Decision::pass(&headers.tuple),
        headers,
        counted: None,
        event: None,
    };
    let end = match case.program {
        Program::Xdp => match engine::xdp::run(&mut run) {
            Fate::Pass => End::XdpPass,
            Fate::Drop => End::XdpDrop,
        },
        Program::Ingress | Program::IngressL3 | Program::Egress | Program::EgressL3 => {
            match engine::tc::run(&mut run) {
                Action::Next => End::Next,
                Action::Drop => End::Drop,
                Action::Send(_)
                | Action::Receive(_)
                | Action::Forward(_)
                | Action::ForwardTo(_) => End::Redirect,
            }
        }
    };
    let memory = run.memory;
    Outcome {
        end,
        frame: run.host.packet.bytes,
        counted: Some(run.counted.into_iter().collect()),
        failed: memory.failed,
        events: Some(run.event.into_iter().collect()),
        flows: told::<F>(memory.flows, now),
        embryonic: told::<F>(memory.embryonic, now),
        affinity: affinities_told::<F>(memory.affinity, now),
        exhausted: exhausted_told::<F>(memory.exhausted, now),
        fragments: said(case).chain(datagrams_told::<F>(memory.fragments, now)).collect(),
        marks: memory.marks,
    }
}

/// Returns the agent's own entries in both families' maps of datagrams.
fn said(case: &Case) -> impl Iterator<Item = (Datagram<IpAddr>, DatagramPorts)> {
    case.world
        .fragments
        .iter()
        .filter(|(key, _)| key.protocol == 0)
        .map(|(key, told)| (*key, *told))
}

fn count<F: Ip>(decision: &Decision<F>, bytes: u32) -> Option<Counted> {
    match Count::of(decision) {
        Count::Nowhere => None,
        Count::Backend { id: backend, direction: Direction::Forward { opens } } => {
            Some(Counted::Forward { backend, bytes, opened: opens })
        }
        Count::Backend { id: backend, direction: Direction::Reply } => {
            Some(Counted::Reply { backend, bytes })
        }
        Count::Reason { reason, service_port } => {
            Some(Counted::Reason { reason, service_port, bytes })
        }
    }
}
