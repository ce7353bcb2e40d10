//! The maps as one program sees them that runs for one packet: an adapter, as the kernel's is.
//!
//! Before every map operation another CPU may run: a packet that is due at the same node, a write
//! of the agent, an eviction. It runs to its end, nested; the program then goes on with what it had
//! read before.

use std::cell::{Cell, OnceCell};
use std::net::SocketAddr;

use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Flow, Networks,
    OriginKey, Origins, Range, Service, ServiceKey, ServicePort, Settings, Ticks, Tuple, flow,
    state,
};
use sluice_common::engine::open::Refusal;
use sluice_common::engine::record::{FlowMap, FlowTable, InsertError, Partner, Renewal, record};
use sluice_common::engine::search::PortSearch;
use sluice_common::packet::parse::Headers;
use sluice_common::path::{self, Decision, Record, leads_back, leads_to, partner_key, walk_ports};
use sluice_common::tables::Routes;
use sluice_common::{Failure, Reason, Tables};

use crate::fault::Fault;
use crate::maps::{Entry, Lru};
use crate::node::{Node, Side};
use crate::packet::Tag;
use crate::world::World;

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
    /// What the FIB has said.
    pub routes: Option<Routes>,
    /// Source ports that are not to be tried.
    pub ports_to_skip: u32,
    /// What the packet's decision records.
    pub recorded: Record,
    flows: Kept<Flow<F::Address>>,
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
        ifindex: u32,
        tag: Tag,
        asked: SocketAddr,
        depth: u32,
    ) -> Self {
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
            flows: Kept::default(),
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

    fn table<R>(
        &self,
        place: FlowMap,
        use_it: impl FnOnce(&mut Lru<Tuple<F::Address>, Entry<F::Address>>) -> R,
    ) -> R {
        let mut memory = F::memory(self.node).borrow_mut();
        use_it(match place {
            FlowMap::Flows => &mut memory.flows,
            FlowMap::Embryonic => &mut memory.embryonic,
        })
    }

    fn entry(&self, place: FlowMap, key: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        self.race();
        let entry = self.table(place, |table| table.get(key))?;
        Some(self.flows.keep(entry.flow))
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
    fn get(&self, place: FlowMap, key: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        self.entry(place, key)
    }

    fn insert(
        &mut self,
        place: FlowMap,
        key: &Tuple<F::Address>,
        flow: &Flow<F::Address>,
        only_new: bool,
    ) -> Result<(), InsertError> {
        self.race();
        let place = match self.world.fault {
            // What is found in the middle of a connection goes straight there.
            Some(Fault::Unconfined) if self.recorded == Record::Establish => FlowMap::Flows,
            _ => place,
        };
        let (owner, flow) = (self.tag.connection, *flow);
        // The maker's, as long as the flow is the same.
        let is_same = |there: &&Entry<F::Address>| leads_to(&there.flow, &flow);
        let maker = {
            let memory = F::memory(self.node).borrow();
            let proven = memory.flows.peek(key).filter(is_same);
            proven.or(memory.embryonic.peek(key).filter(is_same)).map(|there| there.owner)
        };
        let owner = maker.filter(|_| self.recorded != Record::Open).unwrap_or(owner);
        let gone = self.table(place, |table| {
            if only_new && table.peek(key).is_some() {
                return Err(InsertError::Exists);
            }
            Ok(table.insert(*key, Entry { flow, owner }))
        })?;
        if let Some((key, entry)) = gone {
            self.world.evicted::<F>(self.node, place, &key, &entry, false);
        }
        Ok(())
    }

    fn remove(&mut self, place: FlowMap, key: &Tuple<F::Address>) {
        self.race();
        let _ = self.table(place, |table| table.remove(key));
    }

    fn refresh(
        &mut self,
        place: FlowMap,
        key: &Tuple<F::Address>,
        to: &Flow<F::Address>,
        renewal: Renewal,
    ) -> bool {
        self.race();
        let any = self.world.fault == Some(Fault::RenewsAny);
        let changed = self.table(place, |table| {
            let _ = table.get(key)?;
            table.change(key, |entry| {
                if !any && !leads_to(&entry.flow, to) {
                    return None;
                }
                let before = entry.flow;
                renewal.apply(&mut entry.flow, to);
                // The client's side of a masqueraded flow is that of all its client's connections
                // to
                // the endpoint from one port.
                let frontend: SocketAddr = if before.flags & flow::REPLY != 0 {
                    (F::ip(before.source), before.source_port).into()
                } else {
                    (F::ip(key.destination), key.destination_port).into()
                };
                let is_own = before.flags & flow::SOURCE == 0 && before != entry.flow;
                is_own.then_some((entry.owner, frontend))
            })
        });
        if let Some(Some((owner, frontend))) = changed {
            self.world.check_owner(self.tag, self.asked, owner, frontend);
        }
        changed.is_some()
    }

    fn record_affinity(&mut self, client: &AffinityKey<F::Address>, to: &Affinity) {
        self.race();
        let _ = F::memory(self.node).borrow_mut().affinity.insert(*client, *to);
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
        self.race();
        let affinity = F::memory(self.node).borrow_mut().affinity.get(key)?;
        Some(self.affinity.keep(affinity))
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
            let is_embryonic =
                view.table(FlowMap::Flows, |flows| flows.peek(&decision.key).is_none());
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
        Some(Fault::RenewsAny) | None => {}
    }
}

/// Whether the other direction of an entry is there, proven or not.
pub fn has_partner<F: Side>(node: &Node, key: &Tuple<F::Address>, flow: &Flow<F::Address>) -> bool {
    let memory = F::memory(node).borrow();
    let other = partner_key::<F>(flow, key.protocol);
    let is_partner = |entry: &Entry<F::Address>| leads_back::<F>(&entry.flow, key);
    memory.flows.peek(&other).is_some_and(is_partner)
        || memory.embryonic.peek(&other).is_some_and(is_partner)
}
