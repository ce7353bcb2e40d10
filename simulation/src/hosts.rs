//! Clients and endpoints: what they send, and what they must receive.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use sluice_common::engine::open::FlowEnd;
use sluice_common::packet::header::protocol;

use crate::cluster;
use crate::connection::{Connecting, Outcome, lost};
use crate::packet::{By, Packet, Part, Read, Segment, Tag, tcp};
use crate::random::mix;
use crate::scenario::{Close, Connect};
use crate::sctp::{self, Association};
use crate::socket::{End, unknown};
use crate::tcp::{Connection, Happened, State};
use crate::world::{Ends, What, World};

#[derive(Debug)]
struct Socket {
    end: End,
    /// Index of the connection.
    number: u32,
    is_client: bool,
}

/// Source, destination and identification of a datagram in fragments.
type Datagram = (IpAddr, IpAddr, u16);

/// A machine or pod with a stack of its own.
#[derive(Debug)]
pub struct Host {
    addresses: [IpAddr; 2],
    sockets: BTreeMap<Ends, Socket>,
    /// Questions' sockets: the end -> index of the connection.
    asking: BTreeMap<Ends, u32>,
    parts: BTreeMap<Datagram, Vec<(Part, Vec<u8>)>>,
}

impl Host {
    /// A host without sockets.
    #[must_use]
    pub fn new(index: usize) -> Self {
        Self {
            addresses: cluster::host(index),
            sockets: BTreeMap::new(),
            asking: BTreeMap::new(),
            parts: BTreeMap::new(),
        }
    }

    /// Reports whether one of its sockets is for a packet.
    #[must_use]
    pub fn knows(&self, segment: &Segment) -> bool {
        let ends = (segment.protocol, segment.destination, segment.source);
        self.sockets.contains_key(&ends) || self.asking.contains_key(&ends)
    }

    /// Returns the connections that it has accepted from an address and port, and whether each is
    /// open.
    pub fn accepted(&self, number: u8, from: SocketAddr) -> impl Iterator<Item = (u32, bool)> {
        let sockets = self.sockets.iter().filter(move |((protocol, _, remote), socket)| {
            *protocol == number && *remote == from && !socket.is_client
        });
        sockets.map(|(_, socket)| (socket.number, socket.end.state() != State::Answered))
    }

    /// Reports whether one of its sockets keeps the tuple of a new flow from it.
    #[must_use]
    pub fn holds(&self, number: u8, end: FlowEnd, client: SocketAddr, backend: SocketAddr) -> bool {
        let ends = match end {
            FlowEnd::Client => (number, client, backend),
            FlowEnd::Backend => (number, backend, client),
        };
        // The kernel has no lookup for SCTP's sockets.
        if number == protocol::SCTP {
            return false;
        }
        // Linux' numbers: TCP_ESTABLISHED, TCP_SYN_SENT, TCP_TIME_WAIT, TCP_NEW_SYN_RECV.
        let state = self.sockets.get(&ends).and_then(|socket| match socket.end.state() {
            State::Open => Some(1),
            State::Opening => Some(2),
            State::TimeWait => Some(6),
            State::Answered => Some(12),
            State::Closed => None,
        });
        state.is_some_and(|state| end.is_taken_in(protocol::TCP, state))
            || end == FlowEnd::Client && self.asking.contains_key(&ends)
    }
}

/// Reports whether a segment opens a connection.
fn is_opening(flags: u8) -> bool {
    flags & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::SYN
}

/// Returns a message: its connection, exchange, time to think, and whether to close.
fn message(number: u32, exchange: usize, thinks: u64, closes: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(number.to_be_bytes());
    bytes.extend((exchange as u32).to_be_bytes());
    bytes.extend(thinks.to_be_bytes());
    bytes.push(u8::from(closes));
    bytes
}

fn said(bytes: &[u8]) -> Option<(u32, usize, u64, bool)> {
    let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let thinks = u64::from_be_bytes(bytes.get(8..16)?.try_into().ok()?);
    Some((word(0)?, word(4)? as usize, thinks, *bytes.get(16)? != 0))
}

impl World<'_> {
    fn tag(&self, number: u32, by: By) -> Tag {
        let mut connections = self.connections.borrow_mut();
        let sent = connections.get_mut(&number).map(|connection| {
            let sent = &mut connection.sent[usize::from(by == By::Server)];
            *sent += 1;
            *sent
        });
        Tag { connection: number, by, number: sent.unwrap_or(0), copy: 0 }
    }

    fn send_all(&self, host: usize, number: u32, by: By, out: Vec<Segment>) {
        for segment in out {
            let packet = segment.packet(self.tag(number, by));
            self.tell(|| format!("host{host} sends {packet}"));
            self.send(host, packet);
        }
    }

    /// Opens a client's connection, or its UDP socket.
    pub fn connect(&self, number: u32, connect: &Connect) {
        let target = connect.target.end(connect.is_v6, connect.protocol);
        let connecting = Connecting {
            connect: connect.clone(),
            target,
            server: None,
            is_served: self.is_served(connect.target),
            is_open: false,
            outcome: None,
            done: 0,
            lost: if self.is_changing() { lost::DISTURBED } else { 0 },
            stays: false,
            is_last: false,
            is_peer_closed: false,
            sent: [0; 2],
        };
        let (local, host) = (connecting.client(), connect.client);
        self.tell(|| {
            let Connect { target: what, close, .. } = connect;
            format!("#{number}: host{host} asks {what:?}: {local} > {target}, {close:?}")
        });
        let _ = self.connections.borrow_mut().insert(number, connecting);
        self.sums.borrow_mut().opened += 1;
        let ends = (connect.protocol, local, target);
        if connect.protocol == protocol::UDP {
            let _ = self.hosts.borrow_mut()[host].asking.insert(ends, number);
            self.after(0, What::GoOn(number));
            return;
        }
        let mut out = Vec::new();
        let first = mix(&[self.setting.seed, u64::from(number), 2]) as u32;
        let end = if connect.protocol == protocol::SCTP {
            End::Sctp(Association::open(local, target, first, &mut out))
        } else {
            End::Tcp(Connection::open(local, target, first, &mut out))
        };
        let socket = Socket { end, number, is_client: true };
        let _ = self.hosts.borrow_mut()[host].sockets.insert(ends, socket);
        self.send_all(host, number, By::Client, out);
        self.expect(host, ends);
    }

    /// Sets the timer of what is under way.
    fn expect(&self, host: usize, ends: Ends) {
        let hosts = self.hosts.borrow();
        if let Some(socket) = hosts[host].sockets.get(&ends)
            && socket.end.is_waiting()
        {
            let what = What::Retry(host, ends, socket.end.sent());
            self.after(socket.end.patience(), what);
        }
    }

    /// Retransmits a segment that was not acknowledged in time.
    pub fn retry(&self, host: usize, ends: Ends, sent: u32) {
        let mut out = Vec::new();
        let mut hosts = self.hosts.borrow_mut();
        let Some(socket) = hosts[host].sockets.get_mut(&ends) else { return };
        if socket.end.sent() != sent || !socket.end.is_waiting() {
            return;
        }
        let happened = socket.end.retry(&mut out);
        let (number, is_client) = (socket.number, socket.is_client);
        drop(hosts);
        self.send_all(host, number, if is_client { By::Client } else { By::Server }, out);
        match happened {
            Some(happened) => self.happened(host, ends, number, is_client, happened),
            None => self.expect(host, ends),
        }
    }

    /// Sends a client's next request.
    pub fn go_on(&self, number: u32) {
        let next = {
            let mut connections = self.connections.borrow_mut();
            let Some(connection) = connections.get_mut(&number) else { return };
            if connection.outcome.is_some() {
                return;
            }
            let exchanges = &connection.connect.exchanges;
            let is_late = connection.connect.close == Close::Late;
            let Some(exchange) = exchanges.get(connection.done).copied().or_else(|| {
                // What stays has one more at the end.
                is_late.then(|| exchanges.first().copied()).flatten()
            }) else {
                return;
            };
            let is_extra = connection.done >= exchanges.len();
            connection.is_last |= is_extra;
            let is_last = connection.done + 1 == exchanges.len();
            let closes = is_last && connection.connect.close == Close::Server;
            let ends = (connection.connect.protocol, connection.client(), connection.target);
            let data = message(number, connection.done, exchange.thinks, closes);
            (connection.connect.client, ends, data, connection.connect.fragmented)
        };
        let (host, ends, data, fragmented) = next;
        if ends.0 == protocol::UDP {
            self.ask(number, host, ends, data, fragmented);
            return;
        }
        let mut out = Vec::new();
        let mut hosts = self.hosts.borrow_mut();
        let Some(socket) = hosts[host].sockets.get_mut(&ends) else { return };
        socket.end.send(data, &mut out);
        drop(hosts);
        self.send_all(host, number, By::Client, out);
        self.expect(host, ends);
    }

    /// Sends a client's UDP question, and queues the next one whether or not it is answered.
    fn ask(&self, number: u32, host: usize, ends: Ends, mut data: Vec<u8>, fragmented: bool) {
        let (_, local, target) = ends;
        let pause = {
            let mut connections = self.connections.borrow_mut();
            let Some(connection) = connections.get_mut(&number) else { return };
            connection.done += 1;
            connection.connect.exchanges.get(connection.done).map(|next| next.pause)
        };
        let tag = self.tag(number, By::Client);
        if fragmented {
            data.resize(64, 0);
            let id = mix(&[self.setting.seed, u64::from(number), u64::from(tag.number)]) as u16;
            for packet in Segment::udp(local, target, data).fragments(tag, id, 32) {
                self.tell(|| format!("host{host} sends {packet}"));
                self.send(host, packet);
            }
        } else {
            let packet = Segment::udp(local, target, data).packet(tag);
            self.tell(|| format!("host{host} sends {packet}"));
            self.send(host, packet);
        }
        if let Some(pause) = pause {
            self.after(pause, What::GoOn(number));
        }
    }

    /// Receives a packet at a host.
    pub fn receive(&self, host: usize, packet: &Packet) {
        self.tell(|| format!("host{host} gets {packet}"));
        let (source, destination) = packet.addresses();
        self.check_link(host, packet);
        if !self.hosts.borrow()[host].addresses.contains(&destination) {
            if packet.tag.connection == u32::MAX {
                // A forger's own, or the answer to it.
                return;
            }
            self.violate("a packet reaches whom it is for", || format!("host{host}: {packet}"));
            return;
        }
        match packet.contents() {
            None => self.violate("checksums are right", || packet.to_string()),
            Some(Read::Other) => {}
            Some(Read::Part(_, _, part, bytes)) => {
                let whole = self.assemble(host, (source, destination, part.id), part, bytes);
                let Some(bytes) = whole else { return };
                match Segment::read(source, destination, protocol::UDP, &bytes) {
                    Some(segment) => self.datagram(host, &segment, packet.tag),
                    // Parts of two datagrams, or ports and addresses that do not fit.
                    None => self.tell(|| "parts that do not fit".to_owned()),
                }
            }
            Some(Read::Whole(segment)) if segment.protocol == protocol::UDP => {
                self.datagram(host, &segment, packet.tag);
            }
            Some(Read::Whole(segment)) => self.segment(host, &segment, packet.tag),
        }
    }

    fn assemble(
        &self,
        host: usize,
        datagram: Datagram,
        part: Part,
        bytes: Vec<u8>,
    ) -> Option<Vec<u8>> {
        let mut hosts = self.hosts.borrow_mut();
        let parts = hosts[host].parts.entry(datagram).or_default();
        parts.retain(|(there, _)| there.offset != part.offset);
        parts.push((part, bytes));
        parts.sort();
        let is_whole = parts.iter().any(|(part, _)| !part.more)
            && parts.iter().map(|(_, bytes)| bytes.len()).sum::<usize>()
                == parts.last().map_or(0, |(part, bytes)| usize::from(part.offset) + bytes.len());
        let whole =
            is_whole.then(|| parts.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect());
        if is_whole {
            let _ = hosts[host].parts.remove(&datagram);
        }
        whole
    }

    /// Receives a datagram: a question to an endpoint, or the answer to one.
    fn datagram(&self, host: usize, segment: &Segment, tag: Tag) {
        if segment.destination.port() == cluster::port(protocol::UDP) && cluster::is_server(host) {
            if let Some((number, exchange, thinks, _)) = said(&segment.data)
                && tag.by == By::Client
            {
                if let Some(connection) = self.connections.borrow_mut().get_mut(&number) {
                    connection.server = Some(host);
                }
                let ends = (protocol::UDP, segment.destination, segment.source);
                self.after(
                    thinks,
                    What::Answer(host, ends, message(number, exchange, 0, false), false),
                );
            }
            return;
        }
        let Some((number, ..)) = said(&segment.data) else { return };
        if tag.by != By::Server {
            return;
        }
        let connections = self.connections.borrow();
        let Some(connection) = connections.get(&number) else { return };
        if connection.client() != segment.destination && !connection.may_lose_entries() {
            self.violate("nobody gets another connection's bytes", || {
                format!("an answer to #{number} reaches {}", segment.destination)
            });
        } else if connection.target != segment.source && !connection.may_lose_entries() {
            self.violate("an answer comes from whom was asked", || {
                format!("#{number} asked {}, and {} answers", connection.target, segment.source)
            });
        }
    }

    fn segment(&self, host: usize, segment: &Segment, tag: Tag) {
        let ends = (segment.protocol, segment.destination, segment.source);
        self.check_source(segment, tag);
        let is_server = cluster::is_server(host)
            && segment.destination.port() == cluster::port(segment.protocol);
        if is_server && segment.protocol == protocol::SCTP && self.associate(host, segment, tag) {
            return;
        }
        let mut out = Vec::new();
        let mut hosts = self.hosts.borrow_mut();
        let socket = hosts[host].sockets.get(&ends);
        let is_known = socket.is_some_and(|socket| {
            socket.end.state() != State::Closed
                && (socket.end.state() != State::TimeWait || !is_opening(segment.flags))
        });
        if !is_known {
            if !is_server || !is_opening(segment.flags) {
                drop(hosts);
                let by = if is_server { By::Server } else { By::Client };
                self.send_all(host, tag.connection, by, unknown(segment).into_iter().collect());
                return;
            }
            let words = [self.setting.seed, u64::from(tag.connection), 3, u64::from(tag.number)];
            let connection = Connection::accept(segment, mix(&words) as u32, &mut out);
            drop(hosts);
            self.accept(host, ends, End::Tcp(connection), tag);
            self.send_all(host, tag.connection, By::Server, out);
            self.expect(host, ends);
            return;
        }
        let Some(socket) = hosts[host].sockets.get_mut(&ends) else { return };
        let happened = socket.end.receive(segment, self.micros(), &mut out);
        let (number, is_client) = (socket.number, socket.is_client);
        drop(hosts);
        if let Some(Happened::Data(data)) =
            happened.iter().find(|happened| matches!(happened, Happened::Data(_)))
            && said(data).is_none_or(|(whose, ..)| whose != number)
        {
            self.violate("nobody gets another connection's bytes", || {
                format!("#{number} accepts bytes of #{}", tag.connection)
            });
        }
        self.send_all(host, number, if is_client { By::Client } else { By::Server }, out);
        self.expect(host, ends);
        for happened in happened {
            self.happened(host, ends, number, is_client, happened);
        }
    }

    /// Answers what opens an association with an endpoint: an INIT, of which nothing is kept, or
    /// the cookie of one. Returns false for all other packets.
    fn associate(&self, host: usize, segment: &Segment, tag: Tag) -> bool {
        let ends = (segment.protocol, segment.destination, segment.source);
        let mut out = Vec::new();
        match segment.chunk.kind {
            sctp::INIT => {
                let (port, client) = (segment.source.port(), segment.chunk.number);
                let source = cluster::number(segment.source.ip());
                let words =
                    [self.setting.seed, host as u64, source, u64::from(port), u64::from(client)];
                out.push(sctp::answer(segment, host, mix(&words) as u32));
            }
            sctp::COOKIE_ECHO => {
                let mut hosts = self.hosts.borrow_mut();
                let known = hosts[host].sockets.get_mut(&ends);
                let known = known.and_then(|socket| match &mut socket.end {
                    End::Sctp(association) => Some(association),
                    End::Tcp(_) => None,
                });
                let accepted = Association::accept(segment, host, known, &mut out);
                drop(hosts);
                if let Some(association) = accepted {
                    self.accept(host, ends, End::Sctp(association), tag);
                }
            }
            _ => return false,
        }
        self.send_all(host, tag.connection, By::Server, out);
        true
    }

    /// Gives an endpoint a socket for a client's connection.
    fn accept(&self, host: usize, ends: Ends, end: End, tag: Tag) {
        let socket = Socket { end, number: tag.connection, is_client: false };
        let _ = self.hosts.borrow_mut()[host].sockets.insert(ends, socket);
        if let Some(connection) = self.connections.borrow_mut().get_mut(&tag.connection)
            && tag.by == By::Client
        {
            connection.server = Some(host);
        }
    }

    /// Checks that an endpoint's answer comes from the client's target.
    fn check_source(&self, segment: &Segment, tag: Tag) {
        if tag.by != By::Server {
            return;
        }
        let connections = self.connections.borrow();
        let Some(connection) = connections.get(&tag.connection) else { return };
        if connection.outcome.is_some()
            || connection.client() != segment.destination
            || connection.target == segment.source
            || connection.may_lose_entries()
            // What is made again for that one may be what this one has.
            || connections.values().any(|other| connection.is_troubled_by(other))
            // Its SYN was sent again, to another endpoint; the first one goes on accepting it.
            || (!connection.is_open || segment.is_of_handshake())
                && connection.lost & lost::DISTURBED != 0
        {
            return;
        }
        self.violate("an answer comes from whom was asked", || {
            let (number, target) = (tag.connection, connection.target);
            format!("#{number} asked {target}, and {} answers", segment.source)
        });
    }

    /// Something has happened to one end of a connection.
    fn happened(&self, host: usize, ends: Ends, number: u32, is_client: bool, happened: Happened) {
        self.tell(|| {
            let side = if is_client { "client" } else { "endpoint" };
            let what = match &happened {
                Happened::Data(data) => format!("Data({:?})", said(data)),
                Happened::Opened
                | Happened::PeerClosed
                | Happened::Closed
                | Happened::Reset
                | Happened::GivenUp => format!("{happened:?}"),
            };
            format!("#{number} {side}: {what}")
        });
        if is_client {
            self.client_hears(host, ends, number, &happened);
            return;
        }
        match happened {
            Happened::Data(data) => {
                if let Some((_, exchange, thinks, closes)) = said(&data) {
                    let answer = message(number, exchange, 0, false);
                    self.after(thinks, What::Answer(host, ends, answer, closes));
                }
            }
            Happened::PeerClosed => {
                self.act_on(host, ends, End::close);
            }
            Happened::Opened | Happened::Closed | Happened::Reset | Happened::GivenUp => {}
        }
    }

    fn act_on(&self, host: usize, ends: Ends, act: impl FnOnce(&mut End, &mut Vec<Segment>)) {
        let mut out = Vec::new();
        let mut hosts = self.hosts.borrow_mut();
        let Some(socket) = hosts[host].sockets.get_mut(&ends) else { return };
        act(&mut socket.end, &mut out);
        let (number, is_client) = (socket.number, socket.is_client);
        drop(hosts);
        self.send_all(host, number, if is_client { By::Client } else { By::Server }, out);
        self.expect(host, ends);
    }

    /// An endpoint answers.
    pub fn answer(&self, host: usize, ends: Ends, data: Vec<u8>, closes: bool) {
        let (number, local, remote) = ends;
        if number == protocol::UDP {
            let Some((whose, ..)) = said(&data) else { return };
            let packet = Segment::udp(local, remote, data).packet(self.tag(whose, By::Server));
            self.tell(|| format!("host{host} sends {packet}"));
            self.send(host, packet);
            return;
        }
        self.act_on(host, ends, |end, out| {
            end.send(data, out);
            if closes {
                end.close(out);
            }
        });
    }

    fn client_hears(&self, host: usize, ends: Ends, number: u32, happened: &Happened) {
        let mut connections = self.connections.borrow_mut();
        let Some(connection) = connections.get_mut(&number) else { return };
        match happened {
            Happened::Opened => {
                connection.is_open = true;
                let pause = connection.connect.exchanges.first().map_or(0, |next| next.pause);
                drop(connections);
                self.after(pause, What::GoOn(number));
            }
            Happened::Data(_) => {
                connection.done += 1;
                let close = connection.connect.close;
                let next = connection.connect.exchanges.get(connection.done).map(|next| next.pause);
                if close == Close::Late && !connection.is_last {
                    connection.stays = true;
                }
                let is_last = connection.is_last;
                drop(connections);
                match (next, close) {
                    (Some(pause), _) => self.after(pause, What::GoOn(number)),
                    (None, Close::Client) => self.act_on(host, ends, End::close),
                    (None, Close::Late) if is_last => self.act_on(host, ends, End::close),
                    (None, Close::Abort) => {
                        self.act_on(host, ends, End::abort);
                        self.end(number, Outcome::Aborted);
                    }
                    (None, Close::Server | Close::Late) => {}
                }
            }
            Happened::PeerClosed => {
                connection.is_peer_closed = true;
                drop(connections);
                self.act_on(host, ends, End::close);
            }
            Happened::Closed => {
                drop(connections);
                self.end(number, Outcome::Completed);
            }
            Happened::Reset => {
                drop(connections);
                self.end(number, Outcome::Reset);
            }
            Happened::GivenUp => {
                drop(connections);
                self.end(number, Outcome::GivenUp);
            }
        }
    }

    /// Records a connection's outcome.
    fn end(&self, number: u32, outcome: Outcome) {
        let mut connections = self.connections.borrow_mut();
        let Some(connection) = connections.get_mut(&number) else { return };
        if connection.outcome.is_some() {
            return;
        }
        connection.outcome = Some(outcome);
        let Some(connection) = connections.get(&number) else { return };
        let shares_port = connections.values().any(|other| connection.shares_port(other));
        let is_troubled = connections.values().any(|other| connection.is_troubled_by(other));
        let (is_open, may_be_lost) =
            (connection.is_open, is_troubled || connection.may_be_lost(shares_port));
        let expected = connection.connect.exchanges.len();
        let has_all = connection.done >= expected;
        let number_of = connection.connect.protocol;
        let mut sums = self.sums.borrow_mut();
        match outcome {
            Outcome::Completed if has_all => {
                sums.completed += 1;
                sums.associations += u64::from(number_of == protocol::SCTP);
            }
            Outcome::Aborted => sums.completed += 1,
            // Both have closed it. A late SYN reopens it at the endpoint, which then resets a
            // retransmitted FIN: as without Sluice.
            Outcome::Reset if has_all && connection.is_peer_closed => sums.completed += 1,
            Outcome::Completed | Outcome::Reset | Outcome::GivenUp if may_be_lost => {
                sums.excused += 1;
            }
            Outcome::Completed | Outcome::Reset | Outcome::GivenUp if is_open => {
                drop(sums);
                let (done, bits) = (connection.done, connection.lost);
                drop(connections);
                self.violate("an open connection lives as long as its endpoint", || {
                    format!(
                        "#{number}: {outcome:?} after {done} of {expected} exchanges ({bits:#x})"
                    )
                });
            }
            Outcome::Completed | Outcome::Reset | Outcome::GivenUp
                if connection.lost == 0 && connection.is_served =>
            {
                drop(sums);
                let what = connection.connect.target;
                drop(connections);
                self.violate("a connection to what is served is established", || {
                    format!("#{number} to {what:?}: {outcome:?}")
                });
            }
            Outcome::Completed | Outcome::Reset | Outcome::GivenUp => sums.refused += 1,
        }
    }

    /// Checks that no open connection still waits for an answer.
    pub fn check_connections(&self) {
        let hung: Vec<u32> = self
            .connections
            .borrow()
            .iter()
            .filter(|(_, connection)| {
                connection.connect.protocol != protocol::UDP && connection.outcome.is_none()
            })
            .map(|(number, _)| *number)
            .collect();
        for number in hung {
            self.tell(|| format!("#{number} has not ended"));
            self.end(number, Outcome::GivenUp);
        }
    }

    /// Lets a pod die with its sockets; another one gets its address.
    pub fn die(&self, host: usize) {
        let sockets = std::mem::take(&mut self.hosts.borrow_mut()[host].sockets);
        let mut connections = self.connections.borrow_mut();
        for socket in sockets.values() {
            if let Some(connection) = connections.get_mut(&socket.number) {
                connection.lost |= lost::DEAD;
                if socket.is_client {
                    connection.outcome = Some(Outcome::Aborted);
                }
            }
        }
    }
}
