//! A run: nodes, hosts and network, and the queue of what happens next.

mod attack;
mod checks;
mod events;
mod layouts;
mod network;
mod nodes;

pub use self::layouts::Moving;

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::SocketAddr;

use sluice_common::abi::{TICK_SHIFT, Ticks};
use sluice_core::plan::Sizes;

use crate::cluster::{self, Objects};
use crate::connection::Connecting;
use crate::fault::Fault;
use crate::hosts::Host;
use crate::node::Node;
use crate::packet::{Packet, Tag};
use crate::random::mix;
use crate::scenario::{Act, Event, LENGTH, SECOND, Scenario, Setting};

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
    /// A node's agent replaces a program, unless more agents were killed meanwhile.
    Program(usize, u32, usize),
    /// A node's agent moves an entry of a table, unless more agents were killed meanwhile.
    Move(usize, u32, u32, Option<Moving>),
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
    /// The observation.
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
    /// Those of them that were SCTP's.
    pub associations: u64,
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
    /// Frames that went from one port of a bridge to another.
    pub bridged: u64,
    /// Entries that were evicted by an event.
    pub evicted: u64,
    /// Agents that were killed.
    pub killed: u64,
    /// Entries that were moved to another layout.
    pub moved: u64,
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
            .map(|index| Node::new(index, sizes().slot_blocks, setting))
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
            What::Program(index, killed, program) => {
                let node = &self.nodes[index];
                if node.killed.get() == killed {
                    self.replace_program(node, program);
                }
            }
            What::Move(index, killed, table, moving) => {
                let node = &self.nodes[index];
                if node.killed.get() == killed {
                    self.move_next(node, table, moving, depth);
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
                    | What::Write(at, _)
                    | What::Program(at, ..)
                    | What::Move(at, ..) => *at == node.index,
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
}
