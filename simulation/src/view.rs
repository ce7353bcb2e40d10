//! The maps as one program sees them that runs for one packet: an adapter, as the kernel's is.
//!
//! Before every map operation another CPU may run: a packet that is due at the same node, a write
//! of the agent, an eviction. It runs to its end, nested; the program then goes on with what it had
//! read before.

pub mod layers;

use std::cell::{Cell, OnceCell};
use std::net::SocketAddr;

use sluice_common::abi::previous::{self, Moved, Round};
use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Flow, Networks,
    OriginKey, Origins, Range, Service, ServiceKey, ServicePort, Settings, Ticks, Tuple, state,
};
use sluice_common::engine::layouts::{Both, Store};
use sluice_common::engine::open::Refusal;
use sluice_common::engine::record::{FlowMap, FlowTable, InsertError, Partner, Renewal, record};
use sluice_common::engine::search::PortSearch;
use sluice_common::packet::parse::Headers;
use sluice_common::path::{self, Decision, Record, leads_back, leads_to, partner_key, walk_ports};
use sluice_common::tables::Routes;
use sluice_common::{Failure, Reason, Tables};

use self::layers::{Affinities, BEFORE, Flows, NOW};
use crate::act::Met;
use crate::fault::Fault;
use crate::layouts::Stage;
use crate::maps::Entry;
use crate::node::{Node, Side};
use crate::packet::Tag;
use crate::world::World;

/// A table of flows in both layouts.
type BothFlows<'v, 'w, F> = Both<Flows<'v, 'w, F, NOW>, Flows<'v, 'w, F, BEFORE>, bool>;
/// The table of affinities in both layouts.
type BothAffinities<'v, 'w, F> =
    Both<Affinities<'v, 'w, F, NOW>, Affinities<'v, 'w, F, BEFORE>, bool>;

/// Values that were read out of a map, kept for as long as the program runs: as under RCU, whoever
/// has read an entry may go on reading it when it is gone.
struct Kept<T> {
    values: [OnceCell<T>; 8],
    used: Cell<usize>,
    more: OnceCell<Box<Kept<T>>>,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self {
            values: std::array::from_fn(|_| OnceCell::new()),
            used: Cell::new(0),
            more: OnceCell::new(),
        }
    }
}

impl<T> Kept<T> {
    fn keep(&self, value: T) -> &T {
        let mut room = self;
        while room.used.get() == room.values.len() {
            room = room.more.get_or_init(Box::default);
        }
        let at = room.used.get();
        room.used.set(at + 1);
        room.values[at].get_or_init(|| value)
    }
}

/// The maps of a node, for a packet that is met on a device.
pub struct View<'w, F: Side> {
    world: &'w World<'w>,
    node: &'w Node,
    ifindex: u32,
    tag: Tag,
    /// The packet's destination as it came.
    asked: SocketAddr,
    depth: u32,
    operations: Cell<u64>,
    /// The FIB's answers.
    pub routes: Option<Routes>,
    /// Source ports that are not to be tried.
    pub ports_to_skip: u32,
    /// The record of the packet's decision.
    pub recorded: Record,
    stage: Stage,
    flows: Kept<Flow<F::Address>>,
    previous_flows: Kept<previous::Flow<F::Address>>,
    previous_affinity: Kept<previous::Affinity>,
    services: Kept<Service>,
    ports: Kept<ServicePort>,
    backends: Kept<Backend<F::Address>>,
    affinity: Kept<Affinity>,
    origins: Kept<Origins<F::Address>>,
    datagrams: Kept<DatagramPorts>,
}

impl<'w, F: Side> View<'w, F> {
    /// The maps before anything was asked.
    pub fn new(
        world: &'w World<'w>,
        node: &'w Node,
        met: Met,
        tag: Tag,
        asked: SocketAddr,
    ) -> Self {
        let Met { hook, ifindex, depth, .. } = met;
        let stage = node.layouts.borrow().stage(ifindex, hook);
        Self {
            world,
            node,
            ifindex,
            tag,
            asked,
            depth,
            operations: Cell::new(0),
            routes: None,
            ports_to_skip: 0,
            recorded: Record::Nothing,
            stage,
            flows: Kept::default(),
            previous_flows: Kept::default(),
            previous_affinity: Kept::default(),
            services: Kept::default(),
            ports: Kept::default(),
            backends: Kept::default(),
            affinity: Kept::default(),
            origins: Kept::default(),
            datagrams: Kept::default(),
        }
    }

    /// Lets another CPU have its turn.
    fn race(&self) {
        let operation = self.operations.get();
        self.operations.set(operation + 1);
        self.world.race(self.node, self.tag, operation, self.depth);
    }

    /// Returns a table of flows in one layout.
    fn layer<const LAYER: usize>(&self, map: FlowMap) -> Flows<'_, 'w, F, LAYER> {
        Flows { view: self, map }
    }

    /// Returns a table of flows in both layouts, for a program that reads both.
    fn both(&self, map: FlowMap, round: Round) -> BothFlows<'_, 'w, F> {
        let written = round == Round::WritesCurrent;
        Both { now: self.layer(map), before: self.layer(map), written }
    }

    /// Returns the table of affinities in both layouts.
    fn both_affinities(&self, round: Round) -> BothAffinities<'_, 'w, F> {
        let written = round == Round::WritesCurrent;
        Both { now: Affinities { view: self }, before: Affinities { view: self }, written }
    }

    fn entry(&self, map: FlowMap, key: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        match self.stage {
            Stage::Round(Round::Settled) => {
                let flow = self.layer::<NOW>(map).read(key)?;
                Some(self.flows.keep(flow))
            }
            Stage::Previous => {
                let flow = self.layer::<BEFORE>(map).read(key)?;
                Some(self.flows.keep(Flow::after(&flow.before())))
            }
            Stage::Round(round) => {
                let mut flow = Flow::default();
                let is_found = self.both(map, round).find(key, &mut flow);
                is_found.then(|| self.flows.keep(flow))
            }
        }
    }

    /// Asks where packets to both ends of a flow leave.
    pub fn ask(&mut self, flow: &Flow<F::Address>) {
        let device = |end| self.node.route(F::ip(end)).unwrap_or(0);
        self.routes =
            Some(Routes { to_backend: device(flow.destination), to_client: device(flow.source) });
    }

    /// Notes what a first fragment tells.
    pub fn note(&self, headers: &Headers<F>, decision: &Decision<F>) {
        if decision.is_first_fragment {
            let told = path::fragment::ports(headers, decision, self.world.ticks());
            let key = path::fragment::key(headers);
            let _ = F::memory(self.node).borrow_mut().fragments.insert(key, told);
        }
    }

    /// Records a decision's flow.
    pub fn record(&mut self, decision: &mut Decision<F>) -> Refusal {
        self.recorded = decision.record;
        Refusal::of(record(decision, &mut Partner::default(), self))
    }
}

impl<F: Side> PortSearch<F> for View<'_, F> {
    fn now(&self) -> Ticks {
        self.world.ticks()
    }

    fn failed_at(&self, key: &Tuple<F::Address>) -> Option<Ticks> {
        F::memory(self.node).borrow().exhausted.get(key).copied()
    }

    fn set_failed(&mut self, key: &Tuple<F::Address>, at: Ticks) {
        let _ = F::memory(self.node).borrow_mut().exhausted.insert(*key, at);
    }

    fn walk(&mut self, decision: &Decision<F>) -> Option<u16> {
        walk_ports(self, decision)
    }
}

impl<F: Side> FlowTable<F> for View<'_, F> {
    fn get(&self, map: FlowMap, key: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        self.entry(map, key)
    }

    fn insert(
        &mut self,
        map: FlowMap,
        key: &Tuple<F::Address>,
        flow: &Flow<F::Address>,
        only_new: bool,
    ) -> Result<(), InsertError> {
        let map = match self.world.fault {
            // What is found in the middle of a connection goes straight there.
            Some(Fault::Unconfined) if self.recorded == Record::Establish => FlowMap::Flows,
            _ => map,
        };
        match self.stage {
            Stage::Round(Round::Settled) => self.layer::<NOW>(map).insert(key, flow, only_new),
            Stage::Previous => self.layer::<BEFORE>(map).insert(key, &flow.before(), only_new),
            Stage::Round(round) => {
                let mut before = flow.before();
                self.both(map, round).put(key, flow, &mut before, only_new)
            }
        }
    }

    fn remove(&mut self, map: FlowMap, key: &Tuple<F::Address>) {
        match self.stage {
            Stage::Round(Round::Settled) => self.layer::<NOW>(map).remove(key),
            Stage::Previous => self.layer::<BEFORE>(map).remove(key),
            Stage::Round(round) => self.both(map, round).take(key),
        }
    }

    fn refresh(
        &mut self,
        map: FlowMap,
        key: &Tuple<F::Address>,
        to: &Flow<F::Address>,
        renewal: Renewal,
    ) -> bool {
        let any = self.world.fault == Some(Fault::RenewsAny);
        let renew = |entry: &mut Flow<F::Address>| {
            if any || leads_to(entry, to) {
                renewal.apply(entry, to);
            }
        };
        match self.stage {
            Stage::Round(Round::Settled) => self.layer::<NOW>(map).update(key, renew),
            Stage::Previous => self.layer::<BEFORE>(map).update(key, |entry| {
                let mut after = Flow::after(entry);
                renew(&mut after);
                *entry = after.before();
            }),
            Stage::Round(round) => self.both(map, round).renew(key, to, renewal),
        }
    }

    fn record_affinity(&mut self, client: &AffinityKey<F::Address>, to: &Affinity) {
        let _ = match self.stage {
            Stage::Round(Round::Settled) => {
                Affinities::<'_, '_, F, NOW> { view: self }.insert(client, to, false)
            }
            Stage::Previous => {
                Affinities::<'_, '_, F, BEFORE> { view: self }.insert(client, &to.before(), false)
            }
            Stage::Round(round) => {
                self.both_affinities(round).put(client, to, &mut to.before(), false)
            }
        };
    }

    fn set_marks(&mut self, bits: u32) {
        self.node.marks.set(self.node.marks.get() | bits);
    }

    /// Nothing depends on it.
    fn count_failure(&mut self, _: u32, _: Failure) {}
}

impl<F: Side> Tables<F> for View<'_, F> {
    fn listing(&self, address: &F::Address) -> u8 {
        self.node.maps.maps.borrow().image.listing::<F>(address)
    }

    fn flow(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        self.entry(FlowMap::Flows, tuple)
    }

    fn embryonic(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        self.entry(FlowMap::Embryonic, tuple)
    }

    fn imported(&self, _: &Tuple<F::Address>) -> Option<u32> {
        None
    }

    fn datagram(&self, key: &Datagram<F::Address>) -> Option<&DatagramPorts> {
        let told = F::memory(self.node).borrow_mut().fragments.get(key)?;
        Some(self.datagrams.keep(told))
    }

    fn service(&self, key: &ServiceKey<F::Address>) -> Option<&Service> {
        self.race();
        let service = F::of(&self.node.maps.maps.borrow().image).services.get(key).copied()?;
        Some(self.services.keep(service))
    }

    fn port(&self, service_port: u32) -> Option<&ServicePort> {
        self.race();
        let port = self.node.maps.maps.borrow().image.ports.get(&service_port).copied();
        Some(self.ports.keep(port.unwrap_or_default()))
    }

    fn range(&self, service_port: u32, class: Class) -> Option<Range> {
        self.race();
        let maps = self.node.maps.maps.borrow();
        Some(maps.image.range(service_port, class).unwrap_or_default())
    }

    fn slot(&self, slot: u32) -> Option<u32> {
        self.race();
        self.node.maps.maps.borrow().slots.get(slot as usize).copied()
    }

    fn backend(&self, id: u32) -> Option<&Backend<F::Address>> {
        self.race();
        let backend = F::of(&self.node.maps.maps.borrow().image).backends.get(&id).copied();
        Some(self.backends.keep(backend.unwrap_or_default()))
    }

    fn affinity(&self, key: &AffinityKey<F::Address>) -> Option<&Affinity> {
        match self.stage {
            Stage::Round(Round::Settled) => {
                let affinity = Affinities::<'_, '_, F, NOW> { view: self }.get(key).copied()?;
                Some(self.affinity.keep(affinity))
            }
            Stage::Previous => {
                let table = Affinities::<'_, '_, F, BEFORE> { view: self };
                let affinity = Affinity::after(table.get(key)?);
                Some(self.affinity.keep(affinity))
            }
            Stage::Round(round) => {
                let mut affinity = Affinity::default();
                let is_found = self.both_affinities(round).find(key, &mut affinity);
                is_found.then(|| self.affinity.keep(affinity))
            }
        }
    }

    fn in_source_ranges(&self, service_port: u32, address: &F::Address) -> bool {
        let maps = self.node.maps.maps.borrow();
        maps.image.in_source_ranges::<F>(service_port, address)
    }

    fn is_node_port(&self, port: u16) -> bool {
        self.node.maps.maps.borrow().image.is_node_port(port)
    }

    fn is_node_address(&self, address: &F::Address) -> bool {
        self.node.maps.maps.borrow().image.is_node_address::<F>(address)
    }

    fn serves_node_ports(&self, address: &F::Address) -> bool {
        self.node.maps.maps.borrow().image.serves_node_ports::<F>(address)
    }

    fn origins(&self, key: &OriginKey<F::Address>) -> Option<&Origins<F::Address>> {
        self.race();
        let origins = F::of(&self.node.maps.maps.borrow().image).origins.get(key).copied()?;
        Some(self.origins.keep(origins))
    }

    fn marks(&self) -> u32 {
        self.node.marks.get()
    }

    fn settings(&self) -> Option<&Settings> {
        Some(&self.node.settings)
    }

    fn networks(&self) -> Option<&Networks<F::Address>> {
        Some(F::networks())
    }

    fn device(&self, ifindex: u32) -> Option<&Device> {
        self.node.devices.get(&ifindex)
    }

    fn hook_device(&self) -> Option<&Device> {
        self.node.devices.get(&self.ifindex)
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
        self.world.ticks()
    }
}

/// Takes the mending of a fault out of a decision.
pub fn spoil<F: Side>(
    fault: Option<Fault>,
    headers: &Headers<F>,
    decision: &mut Decision<F>,
    view: &View<'_, F>,
) {
    match fault {
        // The client's second packet is proof.
        Some(Fault::Unconfined) => {
            let is_embryonic = !F::memory(view.node).borrow().tables().any(|(_, map, table)| {
                map == FlowMap::Flows && table.peek(&decision.key).is_some()
            });
            if matches!(decision.record, Record::Nothing | Record::RenewEmbryonic)
                && decision.facts.had_entry()
                && decision.reason == Reason::Forward
                && is_embryonic
                && headers.tcp_flags & sluice_common::packet::header::tcp::ACK != 0
            {
                decision.record = Record::Promote;
            }
        }
        // What the slot says is taken for true.
        Some(Fault::Believes) => {
            if decision.flow.state & state::GUESS != 0 {
                decision.flow.state &= !state::GUESS;
                decision.flow.state |= state::ESTABLISHED;
            }
        }
        Some(Fault::KeepsEnded) => {
            if decision.record == Record::Demote {
                decision.record = Record::Renew;
            }
        }
        Some(Fault::RenewsAny | Fault::LeavesPrevious) | None => {}
    }
}

/// Reports whether the other direction of an entry is there, proven or not.
pub fn has_partner<F: Side>(node: &Node, key: &Tuple<F::Address>, flow: &Flow<F::Address>) -> bool {
    let memory = F::memory(node).borrow();
    let other = partner_key::<F>(flow, key.protocol);
    let is_partner = |entry: &Entry<F::Address>| leads_back::<F>(&entry.flow, key);
    memory.tables().any(|(_, _, table)| table.peek(&other).is_some_and(is_partner))
}
