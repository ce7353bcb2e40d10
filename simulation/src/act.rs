//! A program of a node at tc or XDP: lends the engine a packet and the node.

use sluice_common::abi::{Device, Flow, RejectBucket, RejectKey, device};
use sluice_common::engine::act::{self, is_for_others};
use sluice_common::engine::adapter::{
    Action, Adapter, Addressee, Arrival, ForwardQuery, RouteQuery, Target,
};
use sluice_common::engine::count::{Count, Direction};
use sluice_common::engine::open::{Owner, Refusal, Sockets, Steps, sockets};
use sluice_common::engine::search::search;
use sluice_common::engine::tc::{self, TcProgram};
use sluice_common::engine::xdp::{self, Fate, XdpProgram};
use sluice_common::packet::answer::IcmpError;
use sluice_common::packet::bytes::Bytes;
use sluice_common::packet::parse::{self, Headers, Packet as _};
use sluice_common::packet::rewrite::{rewrite, segment};
use sluice_common::path::{self, Decision, Hook, Step, Verdict, policy};
use sluice_common::{Reason, Tables, V4, V6};

use crate::node::{BRIDGE, Node, Side};
use crate::packet::{By, Link, Mac, Packet, Tag};
use crate::random::mix;
use crate::view::{View, spoil};
use crate::world::World;

/// The counter of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// None.
    No,
    /// A backend's, towards it.
    Forward,
    /// A backend's, from it.
    Reply,
    /// A reason's.
    Reason(Reason),
    /// More than one.
    Twice,
}

/// The hook at which a program runs on a packet.
#[derive(Clone, Copy, Debug)]
pub struct Met {
    /// The hook.
    pub hook: Hook,
    /// The device.
    pub ifindex: u32,
    /// The device by which the packet came in, or 0 for the node's own.
    pub came_by: u32,
    /// Number of other programs that this one runs within.
    pub depth: u32,
}

/// Runs the tc program of a device on a packet.
pub fn run(world: &World, node: &Node, met: Met, packet: &mut Packet) -> (Action, Counted) {
    if packet.is_v6() {
        at_work(node, met, packet, |packet| run_family::<V6>(world, node, met, packet, false))
    } else {
        at_work(node, met, packet, |packet| run_family::<V4>(world, node, met, packet, false))
    }
}

/// Runs the tc program of a device on a packet that XDP has translated, and that may go around the
/// stack.
pub fn run_translated(
    world: &World,
    node: &Node,
    met: Met,
    packet: &mut Packet,
) -> (Action, Counted) {
    if packet.is_v6() {
        at_work(node, met, packet, |packet| run_family::<V6>(world, node, met, packet, true))
    } else {
        at_work(node, met, packet, |packet| run_family::<V4>(world, node, met, packet, true))
    }
}

/// Runs the XDP program of a device on a packet. Returns as well whether the packet is marked as
/// translated.
pub fn run_xdp(world: &World, node: &Node, met: Met, packet: &mut Packet) -> (Fate, Counted, bool) {
    if packet.is_v6() {
        at_work(node, met, packet, |packet| run_xdp_family::<V6>(world, node, met, packet))
    } else {
        at_work(node, met, packet, |packet| run_xdp_family::<V4>(world, node, met, packet))
    }
}

/// Length of an Ethernet header, bytes.
const ETHERNET: usize = 14;

/// Runs a program on a frame, and counts it among the node's running programs meanwhile.
fn at_work<R>(
    node: &Node,
    met: Met,
    packet: &mut Packet,
    program: impl FnOnce(&mut Packet) -> R,
) -> R {
    let is_ethernet = node.has_link_header(met.ifindex);
    if is_ethernet {
        let ethertype: u16 = if packet.is_v6() { 0x86dd } else { 0x0800 };
        let Link { destination, source } = packet.link;
        let header = destination.into_iter().chain(source).chain(ethertype.to_be_bytes());
        let _ = packet.bytes.splice(..0, header);
    }
    node.maps.at_work.set(node.maps.at_work.get() + 1);
    let result = program(packet);
    node.maps.at_work.set(node.maps.at_work.get() - 1);
    // A packet that is forwarded or injected may have got a link header, which the helper removes.
    if is_ethernet || packet.bytes.first() == Some(&0) {
        let header: Vec<u8> = packet.bytes.drain(..ETHERNET).collect();
        let mac = |at: usize| std::array::from_fn(|byte| header[at + byte]);
        packet.link = Link { destination: mac(0), source: mac(6) };
    }
    result
}

fn run_family<F: Side>(
    world: &World,
    node: &Node,
    met: Met,
    packet: &mut Packet,
    is_translated: bool,
) -> (Action, Counted) {
    let tag = packet.tag;
    let Some(mut passage) = Passage::<F>::new(world, node, met, &mut packet.bytes, tag) else {
        return (Action::Next, Counted::No);
    };
    let action =
        if is_translated { tc::run_translated(&mut passage) } else { tc::run(&mut passage) };
    let counted = passage.counted;
    let has_answered = matches!(passage.decision.verdict, Verdict::Reset | Verdict::Unreachable)
        || passage.decision.reason == Reason::TtlExceeded;
    if has_answered && action != Action::Drop {
        packet.tag.by = By::Node;
    }
    (action, counted)
}

fn run_xdp_family<F: Side>(
    world: &World,
    node: &Node,
    met: Met,
    packet: &mut Packet,
) -> (Fate, Counted, bool) {
    let tag = packet.tag;
    let Some(mut passage) = Passage::<F>::new(world, node, met, &mut packet.bytes, tag) else {
        return (Fate::Pass, Counted::No, false);
    };
    let fate = xdp::run(&mut passage);
    (fate, passage.counted, passage.is_marked)
}

/// A packet at a node.
struct InHand<'m> {
    world: &'m World<'m>,
    node: &'m Node,
    met: Met,
    tag: Tag,
    frame: Bytes<&'m mut Vec<u8>>,
}

/// A packet on its way through a program.
struct Passage<'m, F: Side> {
    host: InHand<'m>,
    view: View<'m, F>,
    headers: Headers<F>,
    decision: Decision<F>,
    counted: Counted,
    /// Whether XDP has marked the packet as translated.
    is_marked: bool,
}

impl<'m, F: Side> Adapter<F> for InHand<'m> {
    type Frame = Bytes<&'m mut Vec<u8>>;

    fn frame(&self) -> &Self::Frame {
        &self.frame
    }

    fn frame_mut(&mut self) -> &mut Self::Frame {
        &mut self.frame
    }

    fn hook(&self) -> Hook {
        self.met.hook
    }

    fn link(&self) -> u32 {
        if self.node.has_link_header(self.met.ifindex) { ETHERNET as u32 } else { 0 }
    }

    fn ifindex(&self) -> u32 {
        self.met.ifindex
    }

    fn fwmark(&self) -> u32 {
        0
    }

    fn segment_size(&self) -> u32 {
        0
    }

    fn arrival(&self) -> Arrival {
        let here =
            self.node.devices.get(&self.met.ifindex).filter(|device| device.link_header != 0);
        let destination = self.frame.read::<Mac>(0);
        let is_other = here.is_some_and(|here| destination.is_some_and(|mac| mac != here.mac));
        Arrival { to: if is_other { Addressee::Other } else { Addressee::Host }, tag: None }
    }

    fn device(&self, ifindex: u32) -> Option<&Device> {
        self.node.devices.get(&ifindex)
    }

    fn own_device(&self) -> u32 {
        self.node.settings.own_device
    }

    fn is_own_address(&self, address: &F::Address) -> bool {
        self.node.addresses.contains(&F::ip(*address))
    }

    fn route(&self, _: &F::Address, destination: &F::Address, _: &RouteQuery) -> Target {
        self.node.route(F::ip(*destination)).map_or(Target::None, Target::Device)
    }

    fn forward(&mut self, packet: &ForwardQuery<F::Address>) -> Option<u32> {
        self.node.route(F::ip(packet.destination))
    }

    fn neighbour(&self, _: &F::Address, destination: &F::Address, ifindex: u32) -> Option<Mac> {
        // Neighbours are forgotten from time to time.
        let [connection, number] = self.tag.words();
        let chance = mix(&[self.world.setting.seed, connection, number, 8]);
        let found = self.node.neighbour(F::ip(*destination));
        found.filter(|_| !chance.is_multiple_of(8) && ifindex == BRIDGE)
    }

    fn route_mtu(&self, _: &F::Address, _: u32) -> u32 {
        0
    }

    fn exceeded_mtu(&self, _: u32, _: i32) -> Option<u32> {
        None
    }

    fn bucket(&self, key: &RejectKey) -> Option<RejectBucket> {
        self.node.rejects.borrow().get(key).copied()
    }

    fn set_bucket(&mut self, key: &RejectKey, bucket: &RejectBucket) {
        let _ = self.node.rejects.borrow_mut().insert(*key, *bucket);
    }

    fn now_ms(&self) -> u32 {
        self.world.milliseconds()
    }

    fn rewrite(&mut self, headers: &Headers<F>, flow: &Flow<F::Address>) -> bool {
        rewrite(&mut self.frame, headers, flow)
    }

    fn write_error(&mut self, headers: &Headers<F>, error: IcmpError, mtu: u32) -> bool {
        act::write_error(&mut self.frame, headers, error, mtu)
    }

    fn take_tags_off(&mut self) {}

    fn set_translated(&mut self) {}

    fn set_held(&mut self) {}
}

impl<F: Side> Steps<F> for Passage<'_, F> {
    fn decision(&self) -> &Decision<F> {
        &self.decision
    }

    fn set_step(&mut self, step: Step) {
        self.decision.step = step;
    }

    fn open(&mut self) {
        path::open_into(self.host.met.hook, &self.headers, &self.view, &mut self.decision);
    }

    fn look_up_routes(&mut self) {
        self.view.ask(&self.decision.flow);
    }

    fn search(&mut self) {
        search(&mut self.decision, &mut self.view);
    }

    fn is_taken_by_socket(&mut self) -> bool {
        let found = sockets(self.host.met.hook, &self.decision, &self.view);
        let Some(Sockets { of, end }) = found else { return false };
        let flow = &self.decision.flow;
        let client = (F::ip(flow.source), flow.source_port).into();
        let backend = (F::ip(flow.destination), flow.destination_port).into();
        let (number, InHand { world, node, .. }) = (self.decision.key.protocol, &self.host);
        match of {
            // A pod's id is that of its device (see `Node::new`), less the one that is added.
            Owner::Netns(netns) => {
                world.holds_socket(node, netns + 1, number, end, client, backend)
            }
            Owner::Host => world.holds_own_socket(node, number, end, client, backend),
        }
    }

    fn skip_one_port(&mut self) {
        self.view.ports_to_skip += 1;
    }

    fn record(&mut self) -> Refusal {
        self.view.record(&mut self.decision)
    }
}

impl<'m, F: Side> Passage<'m, F> {
    /// Reads a packet's headers; returns [`None`] if the programs do not know them.
    fn new(
        world: &'m World<'m>,
        node: &'m Node,
        met: Met,
        bytes: &'m mut Vec<u8>,
        tag: Tag,
    ) -> Option<Self> {
        let frame = Bytes { bytes, partial: false };
        let link = if node.has_link_header(met.ifindex) { ETHERNET as u32 } else { 0 };
        let headers = parse::headers::<F, _>(&frame, link)?;
        let asked = (F::ip(headers.tuple.destination), headers.tuple.destination_port).into();
        let view = View::<F>::new(world, node, met, tag, asked);
        let decision = Decision::pass(&headers.tuple);
        let host = InHand { world, node, met, tag, frame };
        Some(Self { host, view, headers, decision, counted: Counted::No, is_marked: false })
    }

    fn decide(&mut self) {
        path::decide_into(self.host.met.hook, &self.headers, &self.view, &mut self.decision);
        spoil(self.host.world.fault, &self.headers, &mut self.decision, &self.view);
    }

    fn note(&mut self) {
        self.view.note(&self.headers, &self.decision);
    }

    fn has_foreign_source(&self) -> bool {
        let met = self.host.met;
        let from = if met.hook.is_egress() { met.came_by } else { met.ifindex };
        let source = &self.headers.tuple.source;
        let route = |_| self.host.node.route(F::ip(*source)).unwrap_or(0);
        policy::is_foreign(met.hook, source, from, &self.view, route)
    }

    fn begin(&mut self, ports_to_skip: u32) {
        (self.view.ports_to_skip, self.view.routes) = (ports_to_skip, None);
    }

    fn count(&mut self) {
        let count = Count::of(&self.decision);
        self.host.node.counters.borrow_mut().add(count, &self.headers);
        self.counted = match count {
            _ if self.counted != Counted::No => Counted::Twice,
            Count::Nowhere => Counted::No,
            Count::Backend { direction: Direction::Forward { .. }, .. } => Counted::Forward,
            Count::Backend { direction: Direction::Reply, .. } => Counted::Reply,
            Count::Reason { reason, .. } => Counted::Reason(reason),
        };
    }
}

impl<'m, F: Side> TcProgram<F> for Passage<'m, F> {
    type Adapter = InHand<'m>;

    fn decide(&mut self) {
        self.decide();
    }

    fn pass(&mut self) {
        self.decision = Decision::pass(&self.headers.tuple);
    }

    fn restrict_foreign(&mut self) {
        path::restrict_foreign(self.host.met.hook, &self.headers, &self.view, &mut self.decision);
    }

    fn note(&mut self) {
        self.note();
    }

    fn is_for_others(&self) -> bool {
        let here = Adapter::<F>::device(&self.host, self.host.met.ifindex);
        let is_edge = here.is_some_and(|here| here.role == device::EDGE);
        is_for_others(Adapter::<F>::arrival(&self.host), is_edge)
    }

    fn has_foreign_source(&self) -> bool {
        self.has_foreign_source()
    }

    fn has_hidden_socket(&mut self) -> bool {
        let here = Tables::<F>::hook_device(&self.view);
        // Every packet comes straight from a socket.
        !self.decision.flow.is_direct()
            && here
                .is_some_and(|here| policy::hides_sockets(here, self.decision.key.protocol, true))
    }

    fn begin(&mut self, ports_to_skip: u32) {
        self.begin(ports_to_skip);
    }

    fn parts(&mut self) -> (&mut InHand<'m>, &Headers<F>, &Decision<F>) {
        (&mut self.host, &self.headers, &self.decision)
    }

    fn set_reason(&mut self, reason: Reason) {
        self.decision.reason = reason;
    }

    fn count(&mut self, _: bool) {
        self.count();
    }
}

impl<F: Side> XdpProgram<F> for Passage<'_, F> {
    fn decide(&mut self) {
        self.decide();
    }

    fn has_foreign_source(&self) -> bool {
        self.has_foreign_source()
    }

    fn begin(&mut self) {
        self.begin(0);
    }

    fn headers(&self) -> &Headers<F> {
        &self.headers
    }

    /// No frame reaches a device that it is not for.
    fn is_addressed_here(&self) -> bool {
        true
    }

    fn mark_translated(&mut self) -> bool {
        self.is_marked = true;
        true
    }

    fn unmark_translated(&mut self) {
        self.is_marked = false;
    }

    fn note(&mut self) {
        self.note();
    }

    fn translate(&mut self) -> bool {
        segment(&mut self.host.frame, &self.headers, &self.decision.flow)
    }

    fn set_reason(&mut self, reason: Reason) {
        self.decision.reason = reason;
    }

    fn count(&mut self, _: bool) {
        self.count();
    }
}
