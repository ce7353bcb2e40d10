//! A run: nodes, hosts and network, and the queue of what happens next.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice_common::Reason;
use sluice_common::abi::{Flow, TICK_SHIFT, Ticks, Tuple, flow, masquerade};
use sluice_common::engine::adapter::Action;
use sluice_common::engine::open::FlowEnd;
use sluice_common::engine::record::FlowMap;
use sluice_common::engine::xdp::Fate;
use sluice_common::packet::header::protocol;
use sluice_common::path::{CLOSING_TICKS, Hook, Record, gives_way};
use sluice_common::{V4, V6};
use sluice_core::plan::Sizes;

use crate::act::{Counted, Met, run, run_translated, run_xdp};
use crate::agent::Agent;
use crate::cluster::{self, OUTSIDE, Objects, PODS, Readiness, SERVICES, Target};
use crate::fault::Fault;
use crate::hosts::{Connecting, Host, Outcome, lost};
use crate::maps::Entry;
use crate::node::{EDGES, Node, Side, UPLINK};
use crate::packet::{By, Packet, Segment, Tag, tcp};
use crate::random::mix;
use crate::scenario::{Act, Claim, Event, Flood, LENGTH, SECOND, Scenario, Setting};
use crate::view::has_partner;

/// The start of a run in microseconds since the nodes' boot.
const START: u64 = 100_000 * SECOND;
/// Microseconds of a packet's way within a machine.
const NEAR_US: u64 = 5;
/// Microseconds of a packet's way over the network, without delays.
const FAR_US: u64 = 200;
/// Events that are due so soon may run between two map operations.
const BESIDE_US: u64 = 3_000;
/// Time for connections to end after the last event.
const PATIENCE: u64 = 200 * SECOND;
/// Microseconds between two packets of a flood.
const FLOOD_US: u64 = 400;

/// Time after which agents have carried out a change, whether killed or not.
const CHANGE: u64 = 10 * SECOND;
/// Number of programs beyond which a run does not end.
const PROGRAMS_MAX: u64 = 1_000_000;

/// The place where a packet arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At a device of a node.
    Node(usize, u32),
    /// At a host.
    Host(usize),
}

/// An event in the queue.
#[derive(Clone, Debug)]
pub enum What {
    /// A packet arrives.
    Arrives(Place, Packet),
    /// A process of a node sends a packet.
    Sends(usize, Packet),
    /// An event of the scenario.
    Event(usize),
    /// A client sends its next request.
    GoOn(u32),
    /// An endpoint answers: host, its end of the connection, the answer, whether it closes.
    Answer(usize, Ends, Vec<u8>, bool),
    /// A segment was not acknowledged: host, its end, number of the segment.
    Retry(usize, Ends, u32),
    /// The next packet of a flood.
    Flood(usize, u32),
    /// A node's agent writes, unless more agents were killed meanwhile than this number.
    Write(usize, u32),
    /// A node's next agent starts.
    Start(usize),
    /// Connections that stay open have their last request.
    Close,
    /// All Services are deleted.
    Clear,
}

/// Protocol, local and remote end.
pub type Ends = (u8, SocketAddr, SocketAddr);

#[derive(Debug)]
struct Due {
    at: u64,
    order: u64,
    what: What,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// An invariant that did not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The invariant, in the same words for the same kind.
    pub rule: &'static str,
    /// What was observed.
    pub what: String,
    /// Microseconds from the start.
    pub at: u64,
}

/// The statistics of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Connections that were opened.
    pub opened: u64,
    /// Connections that ended as they should.
    pub completed: u64,
    /// Connections that were never established.
    pub refused: u64,
    /// Connections that were lost where that is allowed.
    pub excused: u64,
    /// Programs that ran.
    pub programs: u64,
    /// Programs that ran between two map operations of another.
    pub nested: u64,
    /// Packets that XDP has translated.
    pub by_xdp: u64,
    /// Packets that bypassed the stack.
    pub around: u64,
    /// Entries that were evicted by an event.
    pub evicted: u64,
    /// Agents that were killed.
    pub killed: u64,
}

/// A run.
pub struct World<'s> {
    /// The setting.
    pub setting: &'s Setting,
    /// The fault whose fix is reverted.
    pub fault: Option<Fault>,
    /// The events.
    pub events: &'s [Event],
    now: Cell<u64>,
    changing_until: Cell<u64>,
    order: Cell<u64>,
    queue: RefCell<BinaryHeap<Reverse<Due>>>,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// The hosts, which have sockets.
    pub hosts: RefCell<Vec<Host>>,
    /// Index of the event -> its connection.
    pub connections: RefCell<BTreeMap<u32, Connecting>>,
    objects: RefCell<Objects>,
    violation: RefCell<Option<Violation>>,
    /// The trace, if it is wanted.
    trace: Option<RefCell<Vec<String>>>,
    /// Statistics.
    pub sums: RefCell<Sums>,
}

fn sizes() -> Sizes {
    Sizes {
        ports: 256,
        backends: 512,
        services: 512,
        slot_blocks: 256,
        reserve_blocks: 32,
        source_ranges: 64,
        node_addresses: 16,
    }
}

impl<'s> World<'s> {
    /// Prepares a run.
    #[must_use]
    pub fn new(
        scenario: &'s Scenario,
        skipped: &'s BTreeSet<usize>,
        fault: Option<Fault>,
        traces: bool,
    ) -> Self {
        let setting = &scenario.setting;
        let nodes = (0..setting.nodes)
            .map(|index| {
                let pods: Vec<_> =
                    (0..PODS).map(|number| cluster::host(cluster::pod(index, number))).collect();
                let addresses = cluster::node(index);
                let Setting { masquerade, accelerate, capacities, .. } = *setting;
                let blocks = sizes().slot_blocks;
                Node::new(index, addresses, &pods, masquerade, accelerate, blocks, capacities)
            })
            .collect();
        let hosts = (0..cluster::hosts(setting.nodes)).map(Host::new).collect();
        let world = Self {
            setting,
            fault,
            events: &scenario.events,
            now: Cell::new(START),
            changing_until: Cell::new(0),
            order: Cell::new(0),
            queue: RefCell::new(BinaryHeap::new()),
            nodes,
            hosts: RefCell::new(hosts),
            connections: RefCell::new(BTreeMap::new()),
            objects: RefCell::new(Objects::new(setting.nodes)),
            violation: RefCell::new(None),
            trace: traces.then(RefCell::default),
            sums: RefCell::default(),
        };
        for node in &world.nodes {
            world.start(node);
            while Self::write(node, usize::MAX) {}
        }
        for (index, event) in scenario.events.iter().enumerate() {
            if !skipped.contains(&index) {
                world.at(START + event.at, What::Event(index));
            }
        }
        world.at(START + LENGTH + SECOND, What::Close);
        world
    }

    /// Runs to the end, or to the first violation.
    pub fn run(&self) -> Option<Violation> {
        let end = START + LENGTH + PATIENCE;
        while self.violation.borrow().is_none() {
            let Some(Reverse(due)) = self.queue.borrow_mut().pop() else { break };
            if due.at > end {
                break;
            }
            self.now.set(due.at.max(self.now.get()));
            self.happen(due.what, 0);
            if self.sums.borrow().programs > PROGRAMS_MAX {
                self.violate("a run comes to its end", || "too many packets".to_owned());
            }
        }
        if self.violation.borrow().is_none() {
            self.finish();
        }
        self.violation.borrow().clone()
    }

    /// Returns the trace.
    #[must_use]
    pub fn trace(&self) -> Vec<String> {
        self.trace.as_ref().map(|trace| trace.borrow().clone()).unwrap_or_default()
    }

    /// Returns the time in ticks.
    #[must_use]
    pub fn ticks(&self) -> Ticks {
        ((self.now.get() * 1_000) >> TICK_SHIFT) as Ticks
    }

    /// Returns the time in microseconds.
    #[must_use]
    pub fn micros(&self) -> u64 {
        self.now.get()
    }

    /// Returns the time in milliseconds.
    #[must_use]
    pub fn milliseconds(&self) -> u32 {
        (self.now.get() / 1_000) as u32
    }

    /// Adds a line to the trace.
    pub fn tell(&self, line: impl FnOnce() -> String) {
        if let Some(trace) = &self.trace {
            let at = self.now.get() - START;
            let (seconds, micros) = (at / SECOND, at % SECOND);
            trace.borrow_mut().push(format!("{seconds:4}.{micros:06} {}", line()));
        }
    }

    /// Records that an invariant does not hold.
    pub fn violate(&self, rule: &'static str, what: impl FnOnce() -> String) {
        let mut violation = self.violation.borrow_mut();
        if violation.is_none() {
            let what = what();
            self.tell(|| format!("VIOLATION: {rule}: {what}"));
            *violation = Some(Violation { rule, what, at: self.now.get() - START });
        }
    }

    /// Queues an event after this many microseconds.
    pub fn after(&self, micros: u64, what: What) {
        self.at(self.now.get() + micros, what);
    }

    fn at(&self, at: u64, what: What) {
        let order = self.order.get();
        self.order.set(order + 1);
        self.queue.borrow_mut().push(Reverse(Due { at, order, what }));
    }

    fn happen(&self, what: What, depth: u32) {
        match what {
            What::Arrives(Place::Node(node, device), packet) => {
                self.arrive(&self.nodes[node], device, packet, depth);
            }
            What::Arrives(Place::Host(host), packet) => self.receive(host, &packet),
            What::Sends(node, packet) => {
                let node = &self.nodes[node];
                let (_, destination) = packet.addresses();
                if let Some(out) = node.route(destination) {
                    self.leave(node, out, 0, packet, depth, 0);
                }
            }
            What::Event(index) => self.event(index),
            What::GoOn(connection) => self.go_on(connection),
            What::Answer(host, ends, data, closes) => self.answer(host, ends, data, closes),
            What::Retry(host, ends, number) => self.retry(host, ends, number),
            What::Flood(index, number) => self.flood(index, number),
            What::Write(index, killed) => {
                let node = &self.nodes[index];
                if node.killed.get() == killed && Self::write(node, 1) {
                    let after = mix(&[self.setting.seed, self.order.get()]) % 1_000;
                    self.after(after, What::Write(index, killed));
                }
            }
            What::Start(index) => {
                let node = &self.nodes[index];
                if node.agent.borrow().is_none() {
                    self.start(node);
                    self.after(0, What::Write(index, node.killed.get()));
                }
            }
            What::Close => self.close_all(),
            What::Clear => self.clear(),
        }
    }

    /// Runs the node's next event to its end, as another CPU would, if the seed says so.
    pub fn race(&self, node: &Node, tag: Tag, operation: u64, depth: u32) {
        let races = self.setting.races;
        let [connection, number] = tag.words();
        if races == 0
            || depth >= 2
            || self.violation.borrow().is_some()
            || mix(&[self.setting.seed, connection, number, operation]) % 64 >= races
        {
            return;
        }
        let is_beside = |due: &Due| {
            due.at <= self.now.get() + BESIDE_US
                && match &due.what {
                    What::Arrives(Place::Node(at, _), _)
                    | What::Sends(at, _)
                    | What::Write(at, _) => *at == node.index,
                    What::Event(index) => matches!(self.events[*index].act, Act::Evict { .. }),
                    What::Arrives(Place::Host(_), _)
                    | What::GoOn(_)
                    | What::Answer(..)
                    | What::Retry(..)
                    | What::Flood(..)
                    | What::Start(_)
                    | What::Close
                    | What::Clear => false,
                }
        };
        let mut queue = self.queue.borrow_mut();
        let next = match queue.peek() {
            Some(Reverse(due)) if is_beside(due) => queue.pop(),
            Some(_) | None => None,
        };
        drop(queue);
        if let Some(Reverse(due)) = next {
            self.sums.borrow_mut().nested += 1;
            self.happen(due.what, depth + 1);
        }
    }

    // --- nodes ------------------------------------------------------------------------------

    /// Receives a packet on a device.
    fn arrive(&self, node: &Node, device: u32, mut packet: Packet, depth: u32) {
        let met = Met { hook: Hook::Ingress, ifindex: device, came_by: device, depth };
        let is_translated = self.setting.xdp && device == UPLINK && {
            let met = Met { hook: Hook::Xdp, ..met };
            match self.xdp(node, met, &mut packet) {
                Some(is_translated) => is_translated,
                None => return,
            }
        };
        let action = match is_translated {
            false => self.program(node, met, &mut packet, run),
            // tc leaves alone what XDP has translated.
            true if !self.setting.accelerate => Action::Next,
            true => self.program(node, met, &mut packet, run_translated),
        };
        match action {
            Action::Drop => {}
            Action::Send(out) | Action::Forward(out) => {
                self.leave(node, out, 0, packet, depth, 0);
            }
            Action::ForwardTo(out) => self.leave(node, out, device, packet, depth, 0),
            Action::Next => self.stack(node, device, packet, depth),
            Action::Receive(by) => self.stack(node, by, packet, depth),
        }
    }

    /// Does what the node's stack does: delivers packets for the node, and forwards all others.
    fn stack(&self, node: &Node, device: u32, mut packet: Packet, depth: u32) {
        let (_, destination) = packet.addresses();
        if let Some(out) = node.route(destination) {
            if packet.forward() {
                self.leave(node, out, device, packet, depth, 0);
            }
            return;
        }
        let Some(crate::packet::Read::Whole(segment)) = packet.contents() else { return };
        let host = cluster::processes(node.index);
        if self.hosts.borrow()[host].knows(&segment) {
            self.after(0, What::Arrives(Place::Host(host), packet));
            return;
        }
        // Nobody listens there.
        if segment.protocol != protocol::TCP {
            return;
        }
        let Some(reset) = crate::tcp::Connection::unknown(&segment) else { return };
        let packet = reset.packet(Tag { by: By::Node, ..packet.tag });
        self.tell(|| format!("node{} knows no such connection: {packet}", node.index));
        if let Some(out) = node.route(reset.destination.ip()) {
            self.leave(node, out, 0, packet, depth, 0);
        }
    }

    /// Sends a packet out by a device.
    fn leave(
        &self,
        node: &Node,
        device: u32,
        came_by: u32,
        mut packet: Packet,
        depth: u32,
        turns: u32,
    ) {
        let met = Met { hook: Hook::Egress, ifindex: device, came_by, depth };
        match self.program(node, met, &mut packet, run) {
            Action::Drop => {}
            Action::Send(out) | Action::Forward(out) | Action::ForwardTo(out) if turns < 4 => {
                self.leave(node, out, came_by, packet, depth, turns + 1);
            }
            Action::Receive(by) if turns < 4 => self.stack(node, by, packet, depth),
            Action::Send(_) | Action::Forward(_) | Action::ForwardTo(_) | Action::Receive(_) => {
                self.violate("no packet goes round in a node", || packet.to_string());
            }
            Action::Next if device == UPLINK => self.network(Some(node.index), packet),
            Action::Next => {
                let host = cluster::pod(node.index, (device - EDGES) as usize);
                self.transmit(Place::Host(host), NEAR_US, packet);
            }
        }
    }

    /// Runs the XDP program of an uplink. Returns whether it has translated the packet, or [`None`]
    /// if it has dropped it.
    fn xdp(&self, node: &Node, met: Met, packet: &mut Packet) -> Option<bool> {
        let mut is_marked = false;
        let before = packet.clone();
        let action = self.program(node, met, packet, |world, node, met, packet| {
            let (fate, counted, marked) = run_xdp(world, node, met, packet);
            is_marked = marked;
            (if fate == Fate::Drop { Action::Drop } else { Action::Next }, counted)
        });
        if action == Action::Drop || !is_marked && packet.bytes != before.bytes {
            self.violate("XDP finishes a packet or leaves it alone", || {
                format!("node{}: {before} became {packet}, {action:?}", node.index)
            });
        }
        self.sums.borrow_mut().by_xdp += u64::from(is_marked);
        (action != Action::Drop).then_some(is_marked)
    }

    fn program(
        &self,
        node: &Node,
        met: Met,
        packet: &mut Packet,
        runs: impl FnOnce(&Self, &Node, Met, &mut Packet) -> (Action, Counted),
    ) -> Action {
        self.sums.borrow_mut().programs += 1;
        let before = packet.clone();
        let (end, counted) = runs(self, node, met, packet);
        self.sums.borrow_mut().around += u64::from(matches!(end, Action::ForwardTo(_)));
        self.tell(|| {
            let side = match met.hook {
                Hook::Xdp => "XDP",
                Hook::Ingress => "in",
                Hook::Egress => "out",
            };
            let device = match met.ifindex {
                UPLINK => "uplink".to_owned(),
                edge => format!("pod{}", edge.wrapping_sub(EDGES)),
            };
            let what =
                if packet.bytes == before.bytes { String::new() } else { format!(" => {packet}") };
            format!("node{} {device} {side}: {before}{what} [{counted:?}, {end:?}]", node.index)
        });
        let is_answer = packet.tag.by == By::Node && before.tag.by != By::Node;
        let is_refused = end == Action::Drop || is_answer;
        node.observed.borrow_mut().add(&before, packet, is_refused, self.nodes.len());
        self.check_count(&before, packet, end, counted);
        end
    }

    /// Checks that a packet is counted as what was done with it.
    fn check_count(&self, before: &Packet, after: &Packet, end: Action, counted: Counted) {
        let rule = "a packet is counted as what becomes of it";
        let is_answer = after.tag.by == By::Node && before.tag.by != By::Node;
        let by_reason = matches!(counted, Counted::Reason(reason) if reason != Reason::Stranger);
        if (end == Action::Drop || is_answer) && !by_reason {
            self.violate(rule, || format!("{counted:?}: {before} is {end:?}"));
            return;
        }
        let (Some(crate::packet::Read::Whole(was)), Some(crate::packet::Read::Whole(is))) =
            (before.contents(), after.contents())
        else {
            return;
        };
        if end == Action::Drop || is_answer {
            return;
        }
        let nodes = self.nodes.len();
        let to_backend = was.destination != is.destination
            && cluster::is_frontend(was.destination, nodes)
            && !cluster::is_frontend(is.destination, nodes);
        let to_client = was.source != is.source
            && cluster::is_frontend(is.source, nodes)
            && !cluster::is_frontend(was.source, nodes);
        let is_right = match counted {
            Counted::Twice => false,
            Counted::Forward => was.destination != is.destination,
            Counted::Reply => was.source != is.source,
            Counted::Reason(_) => true,
            Counted::No => !to_backend && !to_client,
        };
        if !is_right {
            self.violate(rule, || format!("{counted:?}: {before} became {after}"));
        }
    }

    /// Whether a socket of a pod has the tuple of a new flow, at one of its ends.
    pub fn holds_socket(
        &self,
        node: &Node,
        ifindex: u32,
        number: u8,
        end: FlowEnd,
        client: SocketAddr,
        backend: SocketAddr,
    ) -> bool {
        let Some(pod) = ifindex.checked_sub(EDGES) else { return false };
        let host = cluster::pod(node.index, pod as usize);
        let hosts = self.hosts.borrow();
        hosts.get(host).is_some_and(|host| host.holds(number, end, client, backend))
    }

    /// Whether a socket of a process of a node has the tuple of a new flow.
    pub fn holds_own_socket(
        &self,
        node: &Node,
        number: u8,
        end: FlowEnd,
        client: SocketAddr,
        backend: SocketAddr,
    ) -> bool {
        let host = cluster::processes(node.index);
        self.hosts.borrow()[host].holds(number, end, client, backend)
    }

    // --- the network ------------------------------------------------------------------------

    /// Sends a host's packet.
    pub fn send(&self, host: usize, packet: Packet) {
        match cluster::place(host) {
            Some((node, PODS)) => self.after(NEAR_US, What::Sends(node, packet)),
            Some((node, pod)) => {
                self.transmit(Place::Node(node, EDGES + pod as u32), NEAR_US, packet);
            }
            None => self.network(None, packet),
        }
    }

    /// Carries a packet across the network between nodes and hosts outside.
    fn network(&self, from: Option<usize>, packet: Packet) {
        let (source, destination) = packet.addresses();
        let to_node = (0..self.nodes.len()).find(|node| {
            cluster::node(*node).contains(&destination)
                || self.nodes[*node].pods.contains_key(&destination)
        });
        if let Some(node) = to_node {
            self.transmit(Place::Node(node, UPLINK), FAR_US, packet);
            return;
        }
        if let Some(host) = (0..OUTSIDE).find(|host| cluster::host(*host).contains(&destination)) {
            self.transmit(Place::Host(host), FAR_US, packet);
            return;
        }
        if from.is_none() && cluster::is_vip(destination) {
            // Whichever of the nodes routers have chosen for these two.
            let node = cluster::chosen(source, destination, self.nodes.len());
            self.transmit(Place::Node(node, UPLINK), FAR_US, packet);
        }
    }

    /// Carries a packet over one hop, where it may be lost, duplicated or delayed.
    fn transmit(&self, to: Place, micros: u64, packet: Packet) {
        let Setting { seed, loss, doubled, delayed, .. } = *self.setting;
        let [connection, number] = packet.tag.words();
        let place = match to {
            Place::Node(node, device) => (node as u64) << 16 | u64::from(device),
            Place::Host(host) => 1 << 32 | host as u64,
        };
        let (_, destination) = packet.addresses();
        let fate = mix(&[seed, connection, number, place, cluster::number(destination)]);
        let (one, two, three) = (fate & 0xffff, fate >> 16 & 0xffff, fate >> 32 & 0xffff);
        if one % 1_000 < loss {
            self.tell(|| format!("lost: {packet}"));
            return;
        }
        let late = if two % 1_000 < delayed { fate >> 48 } else { 0 };
        if three % 1_000 < doubled {
            let mut copy = packet.clone();
            copy.tag.copy += 1;
            self.tell(|| format!("doubled: {packet}"));
            self.after(micros + (fate >> 50), What::Arrives(to, copy));
        }
        self.after(micros + late, What::Arrives(to, packet));
    }

    // --- agents -----------------------------------------------------------------------------

    fn start(&self, node: &Node) {
        self.tell(|| format!("node{}: an agent starts", node.index));
        let objects = self.objects.borrow().all();
        let name = cluster::node_name(node.index);
        let agent = Agent::start(&node.maps, &name, node.addresses, sizes(), objects);
        *node.agent.borrow_mut() = Some(agent);
    }

    /// Lets an agent write; returns whether some writes are left.
    fn write(node: &Node, writes: usize) -> bool {
        node.agent.borrow_mut().as_mut().is_some_and(|agent| agent.write(writes))
    }

    fn hear(&self, changes: &[sluice_core::model::event::Change]) {
        for node in &self.nodes {
            if let Some(agent) = node.agent.borrow_mut().as_mut() {
                agent.hear(changes.to_vec());
            }
            self.after(1_000, What::Write(node.index, node.killed.get()));
        }
    }

    // --- events -----------------------------------------------------------------------------

    fn event(&self, index: usize) {
        let event = &self.events[index];
        if !matches!(event.act, Act::Connect(_)) {
            self.tell(|| format!("event {index}: {:?}", event.act));
        }
        match &event.act {
            Act::Connect(connect) => self.connect(index as u32, connect),
            Act::Evict { connection, choice, all } => {
                self.evict::<V4>(*connection as u32, *choice, *all);
                self.evict::<V6>(*connection as u32, *choice, *all);
            }
            Act::Endpoint(host, readiness) => {
                let changes: Vec<_> = {
                    let mut objects = self.objects.borrow_mut();
                    objects.endpoints[*host] = *readiness;
                    (0..SERVICES).flat_map(|service| objects.slices(service)).collect()
                };
                self.disturbed(|target| target.service().is_some());
                self.hear(&changes);
            }
            Act::Service(service, is_there) => {
                let change = {
                    let mut objects = self.objects.borrow_mut();
                    objects.services[*service] = *is_there;
                    objects.service(*service)
                };
                self.disturbed(|target| target.service() == Some(*service));
                self.hear(&[change]);
            }
            Act::Kill { node, pause } => {
                let node = &self.nodes[*node];
                let _ = node.agent.borrow_mut().take();
                node.killed.set(node.killed.get() + 1);
                self.sums.borrow_mut().killed += 1;
                self.after(*pause, What::Start(node.index));
            }
            Act::Die(host) => self.die(*host),
            Act::Flood { .. } => self.flood(index, 0),
            Act::Forge { connection, claim, flags, from, sequence } => {
                self.forge(index, *connection as u32, *claim, *flags, *from, *sequence);
            }
        }
    }

    /// Whether agents may still be at work on a change.
    #[must_use]
    pub fn is_changing(&self) -> bool {
        self.now.get() < self.changing_until.get()
    }

    /// Records for connections that their target has changed meanwhile.
    fn disturbed(&self, concerns: impl Fn(Target) -> bool) {
        self.changing_until.set(self.now.get() + CHANGE);
        for connection in self.connections.borrow_mut().values_mut() {
            if concerns(connection.connect.target) {
                connection.lost |= lost::DISTURBED;
            }
        }
    }

    fn evict<F: Side>(&self, connection: u32, choice: u64, all: bool) {
        let mut found = Vec::new();
        for node in &self.nodes {
            let memory = F::memory(node).borrow();
            for (table, entries) in
                [(FlowMap::Flows, &memory.flows), (FlowMap::Embryonic, &memory.embryonic)]
            {
                let own = entries.iter().filter(|(_, entry)| entry.owner == connection);
                found.extend(own.map(|(key, entry)| (node, table, *key, *entry)));
            }
        }
        if found.is_empty() {
            return;
        }
        let one = choice as usize % found.len();
        for (index, (node, table, key, entry)) in found.into_iter().enumerate() {
            if all || index == one {
                let mut memory = F::memory(node).borrow_mut();
                let _ = match table {
                    FlowMap::Flows => memory.flows.remove(&key),
                    FlowMap::Embryonic => memory.embryonic.remove(&key),
                };
                drop(memory);
                self.sums.borrow_mut().evicted += 1;
                self.evicted::<F>(node, table, &key, &entry, true);
            }
        }
    }

    /// Records what an eviction may cost a connection.
    pub fn evicted<F: Side>(
        &self,
        node: &Node,
        table: FlowMap,
        key: &Tuple<F::Address>,
        entry: &Entry<F::Address>,
        by_event: bool,
    ) {
        let mut connections = self.connections.borrow_mut();
        let Some(connection) = connections.get_mut(&entry.owner) else { return };
        let is_both = !has_partner::<F>(node, key, &entry.flow);
        connection.lost |= match (by_event, table) {
            (true, _) if is_both => lost::ONE | lost::BOTH,
            (true, _) => lost::ONE,
            (false, FlowMap::Embryonic) => lost::UNPROVEN,
            (false, FlowMap::Flows) => lost::PUSHED_OUT,
        };
        let is_outside = cluster::place(connection.connect.client).is_none();
        let is_node_port = matches!(connection.connect.target, Target::NodePort(..));
        if by_event && (is_node_port || is_beyond_recovery(&entry.flow, key, is_outside)) {
            connection.lost |= lost::UNRECOVERED;
        }
        self.tell(|| {
            let end = |address, port| SocketAddr::new(F::ip(address), port);
            let whole = if is_both { ", and its partner is gone" } else { "" };
            let how = if by_event { "an event" } else { "lack of room" };
            format!(
                "node{}: {table:?} loses {} > {} of #{} by {how}{whole}",
                node.index,
                end(key.source, key.source_port),
                end(key.destination, key.destination_port),
                entry.owner
            )
        });
    }

    /// Checks that a client's packet changes no entry of another connection.
    pub fn check_owner(&self, tag: Tag, asked: SocketAddr, owner: u32, frontend: SocketAddr) {
        if tag.by != By::Client || owner == tag.connection || owner == u32::MAX {
            return;
        }
        let connections = self.connections.borrow();
        // A reset of what came in another's name goes there.
        let is_own =
            |number, end| connections.get(number).is_some_and(|own: &Connecting| own.target == end);
        // And an entry that a reset has led to may be of any frontend.
        let is_right = is_own(&tag.connection, asked) && is_own(&owner, frontend);
        if !is_right || connections.get(&owner).is_some_and(|owner| owner.lost & lost::FORGED != 0)
        {
            return;
        }
        let is_same = |one: &Connecting, other: &Connecting| {
            (one.connect.client, one.connect.port, one.target)
                == (other.connect.client, other.connect.port, other.target)
        };
        if let (Some(one), Some(other)) =
            (connections.get(&tag.connection), connections.get(&owner))
            && !is_same(one, other)
        {
            self.violate("a client's packet changes no other connection's entry", || {
                format!("a packet of #{} changes an entry of #{owner}", tag.connection)
            });
        }
    }

    fn flood(&self, index: usize, number: u32) {
        let Act::Flood { kind, target, is_v6, packets } = &self.events[index].act else { return };
        if number >= *packets {
            return;
        }
        let is_pair = *kind == Flood::SynAck;
        let who = if is_pair { number / 2 } else { number };
        let chance = mix(&[self.setting.seed, index as u64, u64::from(who), 7]);
        let source: IpAddr = if *is_v6 {
            Ipv6Addr::from(0x2001_0db8_00ff_0000_0000_0000_0000_0000 | u128::from(chance as u32))
                .into()
        } else {
            Ipv4Addr::from(0xc612_0000 | chance as u32 & 0x1_ffff).into()
        };
        let source = SocketAddr::new(source, 1_024 + (chance >> 40) as u16 % 60_000);
        let number_of = if *kind == Flood::Udp { protocol::UDP } else { protocol::TCP };
        let end = target.end(*is_v6, number_of);
        let flags = match kind {
            Flood::Syn => tcp::SYN,
            Flood::SynAck if number.is_multiple_of(2) => tcp::SYN,
            Flood::Ack | Flood::SynAck | Flood::Udp => tcp::ACK,
        };
        let segment = if *kind == Flood::Udp {
            Segment::udp(source, end, vec![0; 16])
        } else {
            Segment::tcp(source, end, flags, chance as u32, (chance >> 20) as u32)
        };
        let tag = Tag {
            connection: u32::MAX,
            by: By::Forger,
            number: (index as u32) << 16 | number,
            copy: 0,
        };
        self.network(None, segment.packet(tag));
        self.after(FLOOD_US, What::Flood(index, number + 1));
    }

    fn forge(
        &self,
        index: usize,
        connection: u32,
        claim: Claim,
        flags: u8,
        from: usize,
        sequence: u32,
    ) {
        let ends = self.connections.borrow().get(&connection).and_then(|connection| {
            if connection.connect.protocol != protocol::TCP {
                return None;
            }
            let client = connection.client();
            let endpoint = connection
                .server
                .map(|server| Target::Pod(server).end(connection.connect.is_v6, protocol::TCP));
            Some(match claim {
                Claim::ClientToFrontend => (client, connection.target),
                Claim::ClientToEndpoint => (client, endpoint?),
                Claim::EndpointToClient => (endpoint?, client),
            })
        });
        let Some((source, destination)) = ends else { return };
        if claim == Claim::ClientToFrontend
            && flags != tcp::SYN
            && self.setting.masquerade != masquerade::NEEDED
            && let Some(connection) = self.connections.borrow_mut().get_mut(&connection)
        {
            connection.lost |= lost::TAKEN;
        }
        // An endpoint may reset what it does not know, which looks like the end of the flow.
        if let Some(connection) = self.connections.borrow_mut().get_mut(&connection) {
            connection.lost |= lost::FORGED;
        }
        let segment = Segment::tcp(source, destination, flags, sequence, !sequence);
        let tag = Tag { connection: u32::MAX, by: By::Forger, number: index as u32, copy: 0 };
        self.send(from, segment.packet(tag));
    }

    // --- the end ----------------------------------------------------------------------------

    fn close_all(&self) {
        self.tell(|| "what stayed open comes to its end".to_owned());
        let late: Vec<u32> = self
            .connections
            .borrow_mut()
            .iter_mut()
            .filter(|(_, connection)| connection.stays)
            .map(|(index, connection)| {
                connection.stays = false;
                *index
            })
            .collect();
        for index in late {
            self.after(u64::from(index) * 1_000, What::GoOn(index));
        }
        for node in &self.nodes {
            self.after(0, What::Start(node.index));
        }
        self.after(PATIENCE - 20 * SECOND, What::Clear);
    }

    /// Deletes all Services, so that all they had must return.
    fn clear(&self) {
        self.check_connections();
        let changes: Vec<_> = {
            let mut objects = self.objects.borrow_mut();
            objects.services = [false; SERVICES];
            objects.endpoints.fill(Readiness::Gone);
            (0..SERVICES)
                .flat_map(|service| {
                    [objects.service(service)].into_iter().chain(objects.slices(service))
                })
                .collect()
        };
        self.hear(&changes);
    }

    fn finish(&self) {
        for node in &self.nodes {
            let mut agent = node.agent.borrow_mut();
            let Some(agent) = agent.as_mut() else {
                self.violate("a node has an agent at the end", || format!("node{}", node.index));
                continue;
            };
            while agent.write(usize::MAX) {}
            if let Some(writes) = agent.differs() {
                self.violate("the maps are as the plan has them", || writes);
            }
            let image = &node.maps.maps.borrow().image;
            let rest = [
                ("frontends", image.v4.services.len() + image.v6.services.len()),
                ("service ports", image.names.len()),
                ("ranges of slots", agent.image().slots.len()),
                ("origins", image.v4.origins.len() + image.v6.origins.len()),
            ];
            for (what, count) in rest {
                if count != 0 {
                    self.violate("what Services had returns", || {
                        format!("node{} has {count} {what}", node.index)
                    });
                }
            }
            self.check_tables::<V4>(node);
            self.check_tables::<V6>(node);
            self.check_sums(node);
        }
        self.check_flows();
    }

    /// Checks that the counters of a node add up to what the wire shows of its programs.
    fn check_sums(&self, node: &Node) {
        let (counters, observed) = (node.counters.borrow(), node.observed.borrow());
        for ((what, counted), seen) in counters.sums().into_iter().zip(observed.sums()) {
            if counted != seen {
                self.violate("the counters add up", || {
                    format!("node{}, {what}: {counted:?} counted, {seen:?} seen", node.index)
                });
            }
        }
    }

    /// Checks that every connection to a Service was counted as a new flow.
    fn check_flows(&self) {
        let connections = self.connections.borrow();
        let is_served = |connection: &&Connecting| {
            connection.is_open
                && connection.connect.protocol == protocol::TCP
                && connection.connect.target.service().is_some()
        };
        let open = connections.values().filter(is_served).count() as u64;
        let flows: u64 = self.nodes.iter().map(|node| node.counters.borrow().flows()).sum();
        if flows < open {
            self.violate("the counters add up", || {
                format!("{flows} flows counted, {open} connections were open")
            });
        }
    }

    /// Checks that an ended connection's entries are embryonic, and return its source port.
    fn check_tables<F: Side>(&self, node: &Node) {
        let connections = self.connections.borrow();
        let memory = F::memory(node).borrow();
        let tables = [(FlowMap::Flows, &memory.flows), (FlowMap::Embryonic, &memory.embryonic)];
        for (table, key, entry) in tables.iter().flat_map(|(table, entries)| {
            entries.iter().map(move |(key, entry)| (*table, key, entry))
        }) {
            let Some(connection) = connections.get(&entry.owner) else { continue };
            let has_ended = connection.connect.protocol == protocol::TCP
                && connection.outcome == Some(Outcome::Completed)
                && connection.lost & !lost::DISTURBED == 0
                && !connections.values().any(|other| connection.shares_port(other));
            let now = self.ticks();
            let embryonic = table == FlowMap::Embryonic;
            let holds = !gives_way(&entry.flow, embryonic, protocol::TCP, Record::Open, now);
            let idle = now.wrapping_sub(entry.flow.seen);
            if has_ended && idle > CLOSING_TICKS && (!embryonic || holds) {
                self.violate("what has ended stands aside", || {
                    format!("node{}: {table:?} has {key:?} of #{}", node.index, entry.owner)
                });
            }
        }
    }
}

/// Whether a lost entry goes unnoticed although its partner is there (docs/recovery.md lists the
/// cases):
///
/// - A hairpin flow's reply goes to a frontend's address, and is taken for a client's.
/// - Where a client has another port at the endpoint, its reset comes from that port.
/// - A reply of the client's side of a masqueraded flow goes to an address of the node, whose stack
///   resets what it does not know.
/// - The reset of a masqueraded client outside goes to the endpoint's node.
fn is_beyond_recovery<A: Copy>(entry: &Flow<A>, key: &Tuple<A>, is_outside: bool) -> bool {
    entry.flags & flow::DIRECT != 0
        || entry.flags & flow::REPLY != 0
            && (entry.flags & (flow::HAIRPIN | flow::SOURCE) != 0
                || entry.flags & flow::MASQUERADED != 0 && is_outside
                || entry.destination_port != key.destination_port)
}
