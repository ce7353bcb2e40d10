//! Floods and forged packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice_common::abi::masquerade;
use sluice_common::packet::header::protocol;

use super::{FLOOD_US, What, World};
use crate::cluster::{self, PODS, Target};
use crate::connection::lost;
use crate::packet::{By, Segment, Tag, tcp};
use crate::random::mix;
use crate::scenario::{Act, Claim, Flood};
use crate::sctp::{self, Chunk};

impl World<'_> {
    pub(super) fn flood(&self, index: usize, number: u32) {
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
        let number_of = match kind {
            Flood::Udp => protocol::UDP,
            Flood::Init => protocol::SCTP,
            Flood::Syn | Flood::Ack | Flood::SynAck => protocol::TCP,
        };
        let end = target.end(*is_v6, number_of);
        let (low, high) = (chance as u32, (chance >> 20) as u32);
        let segment = match kind {
            Flood::Udp => Segment::udp(source, end, vec![0; 16]),
            Flood::Init => Segment::sctp(source, end, Chunk::new(0, sctp::INIT, low), Vec::new()),
            Flood::Syn => Segment::tcp(source, end, tcp::SYN, low, high),
            Flood::SynAck if number.is_multiple_of(2) => {
                Segment::tcp(source, end, tcp::SYN, low, high)
            }
            Flood::Ack | Flood::SynAck => Segment::tcp(source, end, tcp::ACK, low, high),
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

    pub(super) fn forge(
        &self,
        index: usize,
        connection: u32,
        claim: Claim,
        flags: u8,
        from: usize,
        sequence: u32,
    ) {
        let ends = self.connections.borrow().get(&connection).and_then(|connection| {
            let number = connection.connect.protocol;
            if number == protocol::UDP {
                return None;
            }
            let client = connection.client();
            let endpoint = connection
                .server
                .map(|server| Target::Pod(server).end(connection.connect.is_v6, number));
            let (source, destination) = match claim {
                Claim::ClientToFrontend => (client, connection.target),
                Claim::ClientToEndpoint => (client, endpoint?),
                Claim::EndpointToClient => (endpoint?, client),
            };
            Some((number, source, destination, connection.connect.client, connection.is_open))
        });
        let Some((number, source, destination, client, is_open)) = ends else { return };
        if self.is_neighbour(from, source.ip()) {
            return;
        }
        if claim == Claim::ClientToFrontend
            && (flags != tcp::SYN && self.setting.masquerade != masquerade::NEEDED
                || cluster::is_process(client) && cluster::place(from).is_some()
                || !is_open)
            && let Some(connection) = self.connections.borrow_mut().get_mut(&connection)
        {
            connection.lost |= lost::TAKEN;
        }
        if claim == Claim::ClientToFrontend {
            self.take_unseen(number, source, flags == tcp::SYN);
        }
        // An endpoint may reset what it does not know, which looks like the end of the flow.
        if let Some(connection) = self.connections.borrow_mut().get_mut(&connection) {
            connection.lost |= lost::FORGED;
        }
        let segment = if number == protocol::SCTP {
            let chunk = Chunk { tag: sequence, number: !sequence, ..chunk(flags) };
            Segment::sctp(source, destination, chunk, Vec::new())
        } else {
            Segment::tcp(source, destination, flags, sequence, !sequence)
        };
        let tag = Tag { connection: u32::MAX, by: By::Forger, number: index as u32, copy: 0 };
        self.send(from, segment.packet(tag));
    }

    /// Records that a forged packet may take over what its source has at endpoints whose sockets
    /// are not looked up: those behind a bridge, all of SCTP's, handshakes under way, and for what
    /// does not open a connection all others, since the socket there may be the flow's own.
    fn take_unseen(&self, number: u8, source: SocketAddr, opens: bool) {
        let hosts = self.hosts.borrow();
        let mut taken = Vec::new();
        for (host, sockets) in hosts.iter().enumerate() {
            let node = cluster::place(host).map(|(node, _)| node);
            let is_unseen = !opens
                || number == protocol::SCTP
                || node.is_some_and(|node| self.setting.bridged[node]);
            let accepted = sockets.accepted(number, source);
            taken.extend(accepted.filter(|(_, is_open)| is_unseen || !is_open).map(|(it, _)| it));
        }
        let mut connections = self.connections.borrow_mut();
        for number in taken {
            if let Some(connection) = connections.get_mut(&number) {
                connection.lost |= lost::TAKEN;
            }
        }
    }

    /// Reports whether a host and an address are behind the same bridge, where a pod may claim the
    /// others' addresses.
    fn is_neighbour(&self, host: usize, address: IpAddr) -> bool {
        let Some((node, number)) = cluster::place(host) else { return false };
        let node = &self.nodes[node];
        number < PODS && node.neighbour(address).is_some()
    }
}

/// Returns an SCTP chunk that stands for these flags.
fn chunk(flags: u8) -> Chunk {
    let (kind, flags) = match flags {
        tcp::RST => (sctp::ABORT, sctp::T),
        flags if flags & tcp::RST != 0 => (sctp::ABORT, 0),
        tcp::SYN => (sctp::INIT, 0),
        flags if flags & tcp::SYN != 0 => (sctp::INIT_ACK, 0),
        flags if flags & tcp::FIN != 0 => (sctp::SHUTDOWN_ACK, 0),
        _ => (sctp::DATA, 0),
    };
    Chunk { kind, flags, ..Chunk::default() }
}
