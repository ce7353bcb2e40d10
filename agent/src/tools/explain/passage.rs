//! Takes a packet through a program as the kernel does, but records nothing.

use sluice_common::abi::{Device, Flow, RejectBucket, RejectKey, Tuple};
use sluice_common::engine::act;
use sluice_common::engine::adapter::{
    Adapter, Addressee, Arrival, ForwardQuery, RouteQuery, Target,
};
use sluice_common::engine::open::{Refusal, Steps};
use sluice_common::engine::tc::TcProgram;
use sluice_common::packet::answer::IcmpError;
use sluice_common::packet::bytes::Bytes;
use sluice_common::packet::parse::{self, Headers};
use sluice_common::packet::rewrite::rewrite;
use sluice_common::path::{self, Decision, Hook, Step, policy};
use sluice_common::tables::Routes;
use sluice_common::{Reason, Tables};

use super::frame::{Shape, frame};
use super::record::Recorder;
use super::world::{Routing, Seen, Side, World};

/// A packet that is never sent, on the host of the question.
pub(super) struct Host<'w> {
    world: &'w World,
    routing: &'w dyn Routing,
    hook: Hook,
    ifindex: u32,
    packet: Bytes<Vec<u8>>,
    /// The ICMP error that the packet has become, with the MTU in it.
    pub(super) answered: Option<(IcmpError, u32)>,
}

impl<F: Side> Adapter<F> for Host<'_> {
    type Frame = Bytes<Vec<u8>>;

    fn frame(&self) -> &Self::Frame {
        &self.packet
    }

    fn frame_mut(&mut self) -> &mut Self::Frame {
        &mut self.packet
    }

    fn hook(&self) -> Hook {
        self.hook
    }

    fn link(&self) -> u32 {
        let here = self.world.devices.get(&self.ifindex);
        if here.is_none_or(|here| here.entry.link_header != 0) { 14 } else { 0 }
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn fwmark(&self) -> u32 {
        0
    }

    fn segment_size(&self) -> u32 {
        0
    }

    fn arrival(&self) -> Arrival {
        Arrival { to: Addressee::Host, tag: None }
    }

    fn device(&self, ifindex: u32) -> Option<&Device> {
        self.world.devices.get(&ifindex).map(|device| &device.entry)
    }

    fn own_device(&self) -> u32 {
        self.world.settings.own_device
    }

    fn is_own_address(&self, address: &F::Address) -> bool {
        F::of(&self.world.image).node_addresses.contains_key(address)
    }

    fn route(&self, _: &F::Address, destination: &F::Address, way: &RouteQuery) -> Target {
        let destination = F::ip(*destination);
        let Some(device) = self.routing.leaves_by(destination) else { return Target::None };
        match self.routing.mtu(destination) {
            Some(mtu) if way.length > mtu => Target::TooBig(mtu),
            _ => Target::Device(device),
        }
    }

    fn forward(&mut self, packet: &ForwardQuery<F::Address>) -> Option<u32> {
        match Adapter::<F>::route(self, &packet.source, &packet.destination, &packet.way) {
            Target::Device(device) => Some(device),
            Target::TooBig(_) | Target::None => None,
        }
    }

    /// No neighbours are looked up for a question.
    fn neighbour(&self, _: &F::Address, _: &F::Address, _: u32) -> Option<[u8; 6]> {
        None
    }

    /// [`Routing::mtu`] has this already.
    fn route_mtu(&self, _: &F::Address, _: u32) -> u32 {
        0
    }

    fn exceeded_mtu(&self, _: u32, _: i32) -> Option<u32> {
        None
    }

    fn bucket(&self, key: &RejectKey) -> Option<RejectBucket> {
        self.world.rejects.get(&key.address).copied()
    }

    /// Nothing is sent, so no credit is used.
    fn set_bucket(&mut self, _: &RejectKey, _: &RejectBucket) {}

    fn now_ms(&self) -> u32 {
        self.world.now_ms
    }

    fn rewrite(&mut self, headers: &Headers<F>, flow: &Flow<F::Address>) -> bool {
        rewrite(&mut self.packet, headers, flow)
    }

    fn write_error(&mut self, headers: &Headers<F>, error: IcmpError, mtu: u32) -> bool {
        self.answered = Some((error, mtu));
        act::write_error(&mut self.packet, headers, error, mtu)
    }

    fn take_tags_off(&mut self) {}

    fn set_translated(&mut self) {}

    fn set_held(&mut self) {}
}

/// A packet on its way through a program.
pub(super) struct Passage<'w, F: Side> {
    pub(super) host: Host<'w>,
    pub(super) headers: Headers<F>,
    pub(super) tables: Recorder<'w, F, Seen<'w>>,
    pub(super) decision: Decision<F>,
}

impl<'w, F: Side> Passage<'w, F> {
    /// Makes a passage of a packet that arrives at a hook.
    pub(super) fn new(
        seen: &'w Seen<'w>,
        routing: &'w dyn Routing,
        hook: Hook,
        tuple: &Tuple<F::Address>,
        shape: Shape,
    ) -> Self {
        let &Seen { world, ifindex } = seen;
        let here = world.devices.get(&ifindex).map(|device| &device.entry);
        let packet = Bytes { bytes: frame::<F>(tuple, shape, here), partial: false };
        let host = Host { world, routing, hook, ifindex, packet, answered: None };
        let mut headers = Headers::default();
        let _ = parse::headers_into(&host.packet, Adapter::<F>::link(&host), &mut headers);
        // Including its side.
        headers.tuple = *tuple;
        let tables = Recorder::new(seen, *tuple);
        Self { host, headers, tables, decision: Decision::pass(tuple) }
    }

    /// Returns where packets to both ends of the flow leave.
    fn routes(&self) -> Routes {
        let leaves_by = |address| self.host.routing.leaves_by(F::ip(address)).unwrap_or(0);
        let Flow { source, destination, .. } = self.decision.flow;
        Routes { to_backend: leaves_by(destination), to_client: leaves_by(source) }
    }
}

impl<F: Side> Steps<F> for Passage<'_, F> {
    fn decision(&self) -> &Decision<F> {
        &self.decision
    }

    fn set_step(&mut self, step: Step) {
        self.decision.step = step;
    }

    fn open(&mut self) {
        path::open_into(self.host.hook, &self.headers, &self.tables, &mut self.decision);
    }

    fn look_up_routes(&mut self) {
        self.tables.routes = Some(self.routes());
    }

    fn search(&mut self) {
        path::search(&self.tables, &mut self.decision);
    }

    /// No sockets are looked up for a question.
    fn is_taken_by_socket(&mut self) -> bool {
        false
    }

    fn skip_one_port(&mut self) {
        self.tables.ports_to_skip += 1;
    }

    fn record(&mut self) -> Refusal {
        Refusal::NONE
    }
}

impl<'w, F: Side> TcProgram<F> for Passage<'w, F> {
    type Adapter = Host<'w>;

    fn decide(&mut self) {
        path::decide_into(self.host.hook, &self.headers, &self.tables, &mut self.decision);
    }

    fn pass(&mut self) {
        self.decision = Decision::pass(&self.headers.tuple);
    }

    fn restrict_foreign(&mut self) {
        path::restrict_foreign(self.host.hook, &self.headers, &self.tables, &mut self.decision);
    }

    /// The packet is not a fragment.
    fn note(&mut self) {}

    fn is_for_others(&self) -> bool {
        false
    }

    /// The question says where the client is.
    fn has_foreign_source(&self) -> bool {
        false
    }

    /// The packet of a question comes from a socket of its namespace, if it has one.
    fn has_hidden_socket(&mut self) -> bool {
        let Decision { flow, key, .. } = &self.decision;
        let hides = |here| policy::hides_sockets(here, key.protocol, true);
        !flow.is_direct() && self.tables.hook_device().is_some_and(hides)
    }

    fn begin(&mut self, ports_to_skip: u32) {
        self.tables.routes = None;
        self.tables.ports_to_skip = ports_to_skip;
    }

    fn parts(&mut self) -> (&mut Host<'w>, &Headers<F>, &Decision<F>) {
        (&mut self.host, &self.headers, &self.decision)
    }

    fn set_reason(&mut self, reason: Reason) {
        self.decision.reason = reason;
    }

    /// A question is not counted.
    fn count(&mut self, _: bool) {}
}
