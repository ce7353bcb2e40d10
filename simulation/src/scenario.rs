//! The events of a run: a list that follows from the seed and is made before the run starts.
//!
//! Events refer to each other only by their numbers in the list. Each may be left out (those that
//! refer to it then do nothing), so that a failing list can be shortened.

use std::collections::BTreeMap;

use sluice_common::abi::masquerade;
use sluice_common::packet::header::protocol;

use crate::cluster::{self, NODES, Readiness, SERVERS, SERVICES, Target};
use crate::maps::Capacities;
use crate::packet::tcp;
use crate::random::Random;

/// Microseconds of a second.
pub const SECOND: u64 = 1_000_000;
/// The time span of the events.
pub const LENGTH: u64 = 300 * SECOND;
/// The first port of clients.
const PORTS: u16 = 40_000;

/// The setting of a run, which never changes.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The seed of all randomness.
    pub seed: u64,
    /// Number of nodes.
    pub nodes: usize,
    /// One of [`masquerade`].
    pub masquerade: u32,
    /// Capacities of the flow tables.
    pub capacities: Capacities,
    /// Packets of a thousand that the network loses on each hop.
    pub loss: u64,
    /// Packets of a thousand that it duplicates.
    pub doubled: u64,
    /// Packets of a thousand that it delays, so that others overtake them.
    pub delayed: u64,
    /// Map operations of 64 before which another CPU runs.
    pub races: u64,
    /// Whether uplinks run XDP before tc.
    pub xdp: bool,
    /// Whether each node's pods are behind a bridge.
    pub bridged: [bool; NODES],
    /// Whether the previous version runs at first, whose maps have another layout.
    pub layouts: bool,
    /// Whether packets that the stack would only forward bypass it (`--accelerate on`).
    pub accelerate: bool,
}

/// A request and its answer.
#[derive(Clone, Copy, Debug)]
pub struct Exchange {
    /// Microseconds that the client waits before it.
    pub pause: u64,
    /// Microseconds that the endpoint waits before it answers.
    pub thinks: u64,
}

/// The end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// The client closes it.
    Client,
    /// The endpoint closes it.
    Server,
    /// The client resets it.
    Abort,
    /// It stays open to the end of the run, and then has one more request.
    Late,
}

/// A TCP or SCTP connection, or a UDP client's questions from one socket.
#[derive(Clone, Debug)]
pub struct Connect {
    /// The client's host.
    pub client: usize,
    /// Its port.
    pub port: u16,
    /// Whether it uses IPv6.
    pub is_v6: bool,
    /// TCP, UDP or SCTP.
    pub protocol: u8,
    /// The target.
    pub target: Target,
    /// Requests and answers.
    pub exchanges: Vec<Exchange>,
    /// The end (TCP, SCTP).
    pub close: Close,
    /// Whether its datagrams are sent in fragments (UDP, IPv4).
    pub fragmented: bool,
}

/// The packets of a flood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    /// SYNs.
    Syn,
    /// INITs.
    Init,
    /// ACKs without a connection.
    Ack,
    /// A SYN and an ACK from each source.
    SynAck,
    /// Datagrams.
    Udp,
}

/// Source and destination that a forger claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The client, to its target.
    ClientToFrontend,
    /// The client, to the endpoint itself.
    ClientToEndpoint,
    /// The endpoint, to the client.
    EndpointToClient,
}

/// An event's action.
#[derive(Clone, Debug)]
pub enum Act {
    /// A client connects.
    Connect(Connect),
    /// Entries of a connection are evicted: one, or all.
    Evict {
        /// Number of the connection's event.
        connection: usize,
        /// The choice among its entries.
        choice: u64,
        /// Whether all are.
        all: bool,
    },
    /// An endpoint changes.
    Endpoint(usize, Readiness),
    /// A Service is created or deleted.
    Service(usize, bool),
    /// A node's agent is killed; the next one starts a while later.
    Kill {
        /// The node.
        node: usize,
        /// Microseconds until the next one starts.
        pause: u64,
    },
    /// This version's agent replaces the previous one's.
    Upgrade(usize),
    /// This version's agent hands over to the previous one's.
    Downgrade(usize),
    /// An endpoint's pod dies, and a new one gets its address.
    Die(usize),
    /// A host outside sends many packets from random sources.
    Flood {
        /// The packets.
        kind: Flood,
        /// The target.
        target: Target,
        /// Whether they are IPv6.
        is_v6: bool,
        /// Number of packets.
        packets: u32,
    },
    /// A forger sends a packet in the name of a connection's party.
    Forge {
        /// Number of the connection's event.
        connection: usize,
        /// The claimed source and destination.
        claim: Claim,
        /// The packet's flags: TCP's, or those that an SCTP chunk stands for.
        flags: u8,
        /// Index of the host that sends it.
        from: usize,
        /// The sequence number; the acknowledgment number is its complement.
        sequence: u32,
    },
}

/// An action at a time.
#[derive(Clone, Debug)]
pub struct Event {
    /// Microseconds from the start.
    pub at: u64,
    /// The action.
    pub act: Act,
}

/// The setting and events of a run.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The setting.
    pub setting: Setting,
    /// The events, unordered.
    pub events: Vec<Event>,
}

impl Scenario {
    /// Creates the scenario of a seed.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(&[seed, 1]);
        let nodes = 2 + random.below(2) as usize;
        let calm = random.chance(250);
        // From a stream of their own, so that the events of a seed do not depend on them.
        let mut ways = Random::new(&[seed, 2]);
        let setting = Setting {
            seed,
            nodes,
            masquerade: random.pick(&[
                masquerade::NEEDED,
                masquerade::NEEDED,
                masquerade::KUBE_PROXY,
                masquerade::ALL,
            ]),
            capacities: Capacities { flows: 400, embryonic: 256 },
            loss: if calm { 0 } else { random.below(40) },
            doubled: if calm { 0 } else { random.below(40) },
            delayed: if calm { 0 } else { random.below(100) },
            races: random.pick(&[0, 1, 4, 16]),
            xdp: ways.chance(500),
            accelerate: ways.chance(400),
            layouts: ways.chance(300),
            bridged: std::array::from_fn(|_| ways.chance(400)),
        };
        let (bridged, ports, events) = (setting.bridged, BTreeMap::new(), Vec::new());
        let mut generator = Generator { random, nodes, bridged, ports, events };
        generator.generate();
        let mut events = generator.events;
        if setting.layouts {
            events.extend(upgrades(&mut Random::new(&[seed, 3]), nodes));
        }
        Self { setting, events }
    }
}

/// Returns the changes of the maps' layout: an upgrade of each node and, for some, the way back,
/// which may begin before the upgrade is over, and another upgrade.
fn upgrades(random: &mut Random, nodes: usize) -> Vec<Event> {
    let mut events = Vec::new();
    for node in 0..nodes {
        let mut at = random.below(LENGTH / 3);
        events.push(Event { at, act: Act::Upgrade(node) });
        if random.chance(500) {
            at += random.below(60 * SECOND);
            events.push(Event { at, act: Act::Downgrade(node) });
            if random.chance(500) {
                at += random.below(60 * SECOND);
                events.push(Event { at, act: Act::Upgrade(node) });
            }
        }
        if random.chance(300) {
            let (at, pause) = (at + random.below(10 * SECOND), random.below(3 * SECOND));
            events.push(Event { at, act: Act::Kill { node, pause } });
        }
    }
    events
}

struct Generator {
    random: Random,
    nodes: usize,
    bridged: [bool; NODES],
    /// Number of connections of each client to each target.
    ports: BTreeMap<(usize, Target, bool, u8), u16>,
    events: Vec<Event>,
}

impl Generator {
    fn generate(&mut self) {
        // Connections that stay, and that the others must not disturb.
        for _ in 0..20 {
            let at = self.random.below(LENGTH / 10);
            let exchanges = vec![self.exchange(SECOND)];
            self.connect(at, protocol::TCP, exchanges, Close::Late, None);
        }
        for _ in 0..260 {
            let at = self.random.below(LENGTH);
            let count = self.random.between(1, 5);
            let exchanges = (0..count).map(|_| self.exchange(2 * SECOND)).collect();
            let close = self.random.pick(&[
                Close::Client,
                Close::Client,
                Close::Client,
                Close::Server,
                Close::Server,
                Close::Server,
                Close::Client,
                Close::Abort,
            ]);
            self.connect(at, protocol::TCP, exchanges, close, None);
        }
        for _ in 0..30 {
            // Pauses of minutes.
            let at = self.random.below(LENGTH / 2);
            let exchanges = (0..3).map(|_| self.exchange(60 * SECOND)).collect();
            self.connect(at, protocol::TCP, exchanges, Close::Client, None);
        }
        for _ in 0..60 {
            let at = self.random.below(LENGTH);
            let count = self.random.between(1, 4);
            let pause = if self.random.chance(100) { 5 * SECOND } else { SECOND / 2 };
            let exchanges = (0..count).map(|_| self.exchange(pause)).collect();
            self.connect(at, protocol::UDP, exchanges, Close::Client, None);
        }
        for _ in 0..60 {
            let at = self.random.below(LENGTH);
            let close = self.random.pick(&[
                Close::Client,
                Close::Client,
                Close::Server,
                Close::Server,
                Close::Abort,
                Close::Late,
            ]);
            // What stays is there well before the end, and has one request until then.
            let is_late = close == Close::Late;
            let at = if is_late { at / 2 } else { at };
            let count = if is_late { 1 } else { self.random.between(1, 4) };
            let exchanges = (0..count).map(|_| self.exchange(2 * SECOND)).collect();
            self.connect(at, protocol::SCTP, exchanges, close, None);
        }
        self.race();
        self.disturb();
        self.attack();
    }

    fn exchange(&mut self, longest: u64) -> Exchange {
        let thinks = if self.random.chance(200) { self.random.below(longest) } else { 1_000 };
        Exchange { pause: self.random.below(longest), thinks }
    }

    fn host(&mut self) -> usize {
        self.random.below(cluster::hosts(self.nodes) as u64) as usize
    }

    fn server(&mut self) -> usize {
        let (node, number) =
            (self.random.below(self.nodes as u64), self.random.below(SERVERS as u64));
        cluster::pod(node as usize, number as usize)
    }

    fn target(&mut self) -> Target {
        let service = self.random.below(SERVICES as u64) as usize;
        match self.random.below(9) {
            0..3 => Target::ClusterIp(service),
            3..5 => Target::NodePort(service, self.random.below(self.nodes as u64) as usize),
            5..7 => Target::LoadBalancer(self.random.pick(&cluster::BALANCED)),
            7 => Target::ExternalIp(self.random.pick(&cluster::EXTERNAL)),
            _ => Target::Pod(self.server()),
        }
    }

    /// Adds a connection. With `of`, it is of this client and family, unless the client already has
    /// one to the target.
    fn connect(
        &mut self,
        at: u64,
        protocol: u8,
        exchanges: Vec<Exchange>,
        close: Close,
        of: Option<(usize, bool)>,
    ) {
        let is_v6 = of.map_or_else(|| self.random.chance(400), |(_, is_v6)| is_v6);
        let client = of.map_or_else(|| self.host(), |(client, _)| client);
        let target = self.target();
        // An endpoint whose handshake is under way knows of no direct connection so far.
        let is_direct = matches!(target, Target::Pod(_));
        if target == Target::Pod(client) || is_direct && of.is_some() {
            return;
        }
        // Requests of a process to its own node use the loopback device, which is not simulated.
        if let Target::NodePort(_, node) = target
            && client == cluster::processes(node)
        {
            return;
        }
        let next = self.ports.entry((client, target, is_v6, protocol)).or_default();
        let number = *next;
        *next += 1;
        if of.is_some() && number != 0 {
            return;
        }
        let port = PORTS + 100 * self.translator(client, target, is_v6, protocol) + number;
        let fragmented = protocol == sluice_common::packet::header::protocol::UDP
            && !is_v6
            && self.random.chance(300);
        let connect =
            Connect { client, port, is_v6, protocol, target, exchanges, close, fragmented };
        self.events.push(Event { at, act: Act::Connect(connect) });
    }

    /// Returns a number for the translator of a client's packets to a target.
    ///
    /// A client uses one port for several connections only where one node translates them all, or
    /// can see the others: two nodes know nothing of each other, and would show both connections to
    /// an endpoint at one tuple (docs/compatibility.md).
    fn translator(&self, client: usize, target: Target, is_v6: bool, number: u8) -> u16 {
        let own = cluster::place(client).map(|(node, _)| node);
        // No lookup shows SCTP's sockets, so a pod's own flows cannot avoid them.
        let is_unseen = number != protocol::TCP;
        let (node, group) = match (target, own) {
            (Target::NodePort(_, node), _) => (node, 0),
            // A pod that is its own backend at a node port sees itself as the node's address with
            // its own port. A process with this port would lose its direct connection to the pod
            // (docs/compatibility.md).
            (Target::Pod(_), Some(own)) if cluster::is_process(client) => (own, 3),
            (Target::Pod(_), Some(own)) => (own, usize::from(is_unseen)),
            (Target::Pod(server), None) => {
                // An endpoint behind a bridge is not looked up (docs/compatibility.md).
                let at = cluster::place(server).map_or(0, |(node, _)| node);
                (at, usize::from(is_unseen || self.bridged[at]))
            }
            (_, Some(own)) => (own, 0),
            (Target::ClusterIp(_), None) => (cluster::way(client, target, is_v6, self.nodes), 2),
            (_, None) => (cluster::way(client, target, is_v6, self.nodes), 0),
        };
        (4 * group + node) as u16
    }

    /// Adds clients that ask several frontends from one port at the same time.
    fn race(&mut self) {
        for _ in 0..12 {
            let at = self.random.below(LENGTH);
            let (client, is_v6) = (self.host(), self.random.chance(400));
            let protocol =
                self.random.pick(&[protocol::TCP, protocol::TCP, protocol::SCTP, protocol::UDP]);
            for _ in 0..4 {
                let exchanges = vec![self.exchange(SECOND)];
                let of = Some((client, is_v6));
                self.connect(at, protocol, exchanges, Close::Client, of);
            }
        }
    }

    fn connections(&self) -> Vec<(usize, u64)> {
        let is_connect = |event: &Event| matches!(event.act, Act::Connect(_));
        let found = self.events.iter().enumerate().filter(|(_, event)| is_connect(event));
        found.map(|(index, event)| (index, event.at)).collect()
    }

    fn disturb(&mut self) {
        let connections = self.connections();
        for _ in 0..60 {
            let (connection, begins) = self.random.pick(&connections);
            let longest = self.random.pick(&[3, 90]) * SECOND;
            let at = begins + self.random.below(longest);
            let act =
                Act::Evict { connection, choice: self.random.draw(), all: self.random.chance(100) };
            self.events.push(Event { at, act });
        }
        for _ in 0..10 {
            let (at, server) = (self.random.below(LENGTH), self.server());
            let how = self.random.pick(&[Readiness::Terminating, Readiness::Gone]);
            self.events.push(Event { at, act: Act::Endpoint(server, how) });
            let at = at + self.random.below(60 * SECOND);
            self.events.push(Event { at, act: Act::Endpoint(server, Readiness::Ready) });
        }
        for _ in 0..2 {
            let (at, service) = (self.random.below(LENGTH), self.random.below(SERVICES as u64));
            let service = service as usize;
            self.events.push(Event { at, act: Act::Service(service, false) });
            let at = at + self.random.below(20 * SECOND);
            self.events.push(Event { at, act: Act::Service(service, true) });
        }
        for _ in 0..6 {
            // Right after a change, between two of its writes.
            let changes: Vec<u64> = self
                .events
                .iter()
                .filter(|event| matches!(event.act, Act::Endpoint(..) | Act::Service(..)))
                .map(|event| event.at)
                .collect();
            let at = self.random.pick(&changes) + self.random.below(SECOND / 50);
            let node = self.random.below(self.nodes as u64) as usize;
            let pause = self.random.below(5 * SECOND);
            self.events.push(Event { at, act: Act::Kill { node, pause } });
        }
        if self.random.chance(300) {
            let (at, server) = (self.random.below(LENGTH), self.server());
            self.events.push(Event { at, act: Act::Die(server) });
        }
    }

    fn attack(&mut self) {
        let connections = self.connections();
        for _ in 0..self.random.below(3) {
            let kind =
                self.random.pick(&[Flood::Syn, Flood::Ack, Flood::SynAck, Flood::Udp, Flood::Init]);
            let target = Some(self.target()).filter(|target| target.service().is_some());
            let target = target.unwrap_or(Target::LoadBalancer(0));
            let at = self.random.below(LENGTH);
            let packets = self.random.between(400, 1_500) as u32;
            let is_v6 = self.random.chance(400);
            self.events.push(Event { at, act: Act::Flood { kind, target, is_v6, packets } });
        }
        for _ in 0..60 {
            let (connection, begins) = self.random.pick(&connections);
            let flags = self.random.pick(&[
                tcp::RST,
                tcp::RST,
                tcp::RST | tcp::ACK,
                tcp::SYN,
                tcp::ACK,
                tcp::SYN | tcp::ACK,
                tcp::FIN | tcp::ACK,
            ]);
            let claim = self.random.pick(&[
                Claim::ClientToFrontend,
                Claim::ClientToEndpoint,
                Claim::ClientToEndpoint,
                Claim::EndpointToClient,
            ]);
            // A node's own processes are trusted: they may use any source.
            let from = if self.random.chance(600) { 0 } else { self.host() };
            let from = if cluster::is_process(from) { 0 } else { from };
            let at = begins + self.random.below(10 * SECOND);
            let sequence = self.random.draw() as u32;
            self.events
                .push(Event { at, act: Act::Forge { connection, claim, flags, from, sequence } });
        }
    }
}
