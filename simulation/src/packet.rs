//! Packets as bytes, with a tag that the code under test cannot see.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice_common::packet::header::protocol;

use crate::sctp::{self, Chunk};

/// FIN, SYN, RST and ACK.
pub use sluice_common::packet::header::tcp;

/// The sender of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    /// The client of a connection.
    Client,
    /// Its endpoint.
    Server,
    /// A forger who claims to be either.
    Forger,
    /// A node, in the name of another host.
    Node,
}

/// The identity of a packet, which travels with its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag {
    /// Index of the connection, or [`u32::MAX`] for none.
    pub connection: u32,
    /// The sender.
    pub by: By,
    /// Number of packets that the sender had sent before.
    pub number: u32,
    /// Number of the copy, and of the fragment.
    pub copy: u32,
}

impl Tag {
    /// Returns the tag as numbers, for [`mix`](crate::random::mix).
    #[must_use]
    pub fn words(&self) -> [u64; 2] {
        [
            u64::from(self.connection) << 32 | u64::from(self.number),
            u64::from(self.copy) << 8 | self.by as u64,
        ]
    }
}

/// A link-layer address.
pub type Mac = [u8; 6];

/// The Ethernet addresses of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Destination.
    pub destination: Mac,
    /// Source.
    pub source: Mac,
}

/// An IP packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Bytes, from the IP header on.
    pub bytes: Vec<u8>,
    /// The Ethernet addresses, which matter at the ports of a bridge alone.
    pub link: Link,
    /// The packet's identity.
    pub tag: Tag,
}

/// The part of a datagram in a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// The datagram's identification.
    pub id: u16,
    /// Offset of the part in the datagram.
    pub offset: u16,
    /// Whether others follow.
    pub more: bool,
}

/// A TCP segment, a UDP datagram, or an SCTP packet with one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Source.
    pub source: SocketAddr,
    /// Destination.
    pub destination: SocketAddr,
    /// TCP, UDP or SCTP.
    pub protocol: u8,
    /// Flags (TCP).
    pub flags: u8,
    /// Sequence number (TCP).
    pub sequence: u32,
    /// Acknowledgment number (TCP).
    pub acknowledgment: u32,
    /// The chunk (SCTP).
    pub chunk: Chunk,
    /// Payload.
    pub data: Vec<u8>,
}

/// A packet as its receiver reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// Whole.
    Whole(Segment),
    /// A part of a datagram: addresses and the payload of the IP packet.
    Part(IpAddr, IpAddr, Part, Vec<u8>),
    /// Another protocol's.
    Other,
}

const TTL: u8 = 64;

impl Segment {
    /// Creates a TCP segment without data.
    #[must_use]
    pub fn tcp(
        source: SocketAddr,
        destination: SocketAddr,
        flags: u8,
        sequence: u32,
        acknowledgment: u32,
    ) -> Self {
        Self {
            source,
            destination,
            protocol: protocol::TCP,
            flags,
            sequence,
            acknowledgment,
            chunk: Chunk::default(),
            data: Vec::new(),
        }
    }

    /// Creates an SCTP packet.
    #[must_use]
    pub fn sctp(source: SocketAddr, destination: SocketAddr, chunk: Chunk, data: Vec<u8>) -> Self {
        Self { protocol: protocol::SCTP, chunk, ..Self::udp(source, destination, data) }
    }

    /// Creates a UDP datagram.
    #[must_use]
    pub fn udp(source: SocketAddr, destination: SocketAddr, data: Vec<u8>) -> Self {
        Self {
            source,
            destination,
            protocol: protocol::UDP,
            flags: 0,
            sequence: 0,
            acknowledgment: 0,
            chunk: Chunk::default(),
            data,
        }
    }

    /// Reports whether it resets a connection: TCP's RST, SCTP's ABORT.
    #[must_use]
    pub fn is_reset(&self) -> bool {
        match self.protocol {
            protocol::TCP => self.flags & tcp::RST != 0,
            protocol::SCTP => self.chunk.kind == sctp::ABORT,
            _ => false,
        }
    }

    /// Reports whether it opens a connection, or is the answer to such a packet.
    #[must_use]
    pub fn is_of_handshake(&self) -> bool {
        match self.protocol {
            protocol::TCP => self.flags & tcp::SYN != 0,
            protocol::SCTP => matches!(
                self.chunk.kind,
                sctp::INIT | sctp::INIT_ACK | sctp::COOKIE_ECHO | sctp::COOKIE_ACK
            ),
            _ => false,
        }
    }

    /// Returns the length in sequence space.
    #[must_use]
    pub fn length(&self) -> u32 {
        self.data.len() as u32
            + u32::from(self.flags & tcp::SYN != 0)
            + u32::from(self.flags & tcp::FIN != 0)
    }

    /// Returns the transport header and data, with the checksum.
    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source.port().to_be_bytes());
        bytes.extend(self.destination.port().to_be_bytes());
        if self.protocol == protocol::SCTP {
            self.chunk.write(&self.data, &mut bytes);
            return bytes;
        }
        if self.protocol == protocol::TCP {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend(self.acknowledgment.to_be_bytes());
            bytes.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        } else {
            bytes.extend((self.data.len() as u16 + 8).to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes.extend(&self.data);
        let sum = !transport_sum(self.source.ip(), self.destination.ip(), self.protocol, &bytes);
        let at = checksum_at(self.protocol);
        let sum = if self.protocol == protocol::UDP && sum == 0 { 0xffff } else { sum };
        bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Returns the packet.
    #[must_use]
    pub fn packet(&self, tag: Tag) -> Packet {
        let transport = self.transport();
        let bytes =
            network(self.source.ip(), self.destination.ip(), self.protocol, None, &transport);
        Packet { bytes, tag, link: Link::default() }
    }

    /// Returns the packet in two fragments (IPv4), cut after `cut` bytes of its payload (a multiple
    /// of eight).
    #[must_use]
    pub fn fragments(&self, tag: Tag, id: u16, cut: usize) -> [Packet; 2] {
        let transport = self.transport();
        let (first, second) = transport.split_at(cut);
        let part = |offset: usize, more, bytes: &[u8], copy| Packet {
            bytes: network(
                self.source.ip(),
                self.destination.ip(),
                self.protocol,
                Some(Part { id, offset: offset as u16, more }),
                bytes,
            ),
            tag: Tag { copy, ..tag },
            link: Link::default(),
        };
        [part(0, true, first, 0), part(cut, false, second, 1 << 8)]
    }

    /// Reads TCP, UDP or SCTP; returns [`None`] if the checksum or a length is wrong.
    #[must_use]
    pub fn read(source: IpAddr, destination: IpAddr, number: u8, bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let half = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        if number == protocol::SCTP {
            let (chunk, data) = Chunk::read(bytes)?;
            let (source, destination) = ((source, half(0)?).into(), (destination, half(2)?).into());
            return Some(Self::sctp(source, destination, chunk, data));
        }
        if transport_sum(source, destination, number, bytes) != 0xffff {
            return None;
        }
        let is_tcp = number == protocol::TCP;
        Some(Self {
            source: (source, half(0)?).into(),
            destination: (destination, half(2)?).into(),
            protocol: number,
            flags: if is_tcp { *bytes.get(13)? } else { 0 },
            sequence: if is_tcp { word(4)? } else { 0 },
            acknowledgment: if is_tcp { word(8)? } else { 0 },
            chunk: Chunk::default(),
            data: bytes.get(if is_tcp { 20 } else { 8 }..)?.to_vec(),
        })
    }
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, destination, flags, sequence, acknowledgment, .. } = self;
        write!(f, "{source} > {destination}")?;
        if self.protocol == protocol::UDP {
            return write!(f, " UDP {}", self.data.len());
        }
        if self.protocol == protocol::SCTP {
            return write!(f, " {} {}", self.chunk, self.data.len());
        }
        write!(f, " ")?;
        for (bit, letter) in [(tcp::SYN, 'S'), (tcp::FIN, 'F'), (tcp::RST, 'R'), (tcp::ACK, '.')] {
            if flags & bit != 0 {
                write!(f, "{letter}")?;
            }
        }
        write!(f, " {sequence:08x} {acknowledgment:08x} {}", self.data.len())
    }
}

fn checksum_at(number: u8) -> usize {
    if number == protocol::TCP { 16 } else { 6 }
}

/// Returns the one's complement sum of bytes.
fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)))
        .sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn transport_sum(source: IpAddr, destination: IpAddr, number: u8, bytes: &[u8]) -> u16 {
    let pseudo = sum(&octets(source)) + sum(&octets(destination));
    fold(pseudo + u64::from(number) + bytes.len() as u64 + sum(bytes))
}

/// Returns an IP packet with this payload.
fn network(
    source: IpAddr,
    destination: IpAddr,
    number: u8,
    part: Option<Part>,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    if source.is_ipv4() {
        let length = payload.len() as u16 + 20;
        let field =
            part.map_or(0x4000, |part| part.offset / 8 + if part.more { 0x2000 } else { 0 });
        bytes.extend([0x45, 0]);
        bytes.extend(length.to_be_bytes());
        bytes.extend(part.map_or(0, |part| part.id).to_be_bytes());
        bytes.extend(field.to_be_bytes());
        bytes.extend([TTL, number, 0, 0]);
        bytes.extend(octets(source));
        bytes.extend(octets(destination));
        let sum = !fold(sum(&bytes));
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        bytes.extend([0x60, 0, 0, 0]);
        bytes.extend((payload.len() as u16).to_be_bytes());
        bytes.extend([number, TTL]);
        bytes.extend(octets(source));
        bytes.extend(octets(destination));
    }
    bytes.extend(payload);
    bytes
}

impl Packet {
    /// Reports whether it is IPv6.
    #[must_use]
    pub fn is_v6(&self) -> bool {
        self.bytes.first().is_some_and(|first| first >> 4 == 6)
    }

    /// Returns source and destination.
    #[must_use]
    pub fn addresses(&self) -> (IpAddr, IpAddr) {
        if self.is_v6() {
            let address = |at: usize| {
                let octets: [u8; 16] =
                    self.bytes.get(at..at + 16).and_then(|b| b.try_into().ok()).unwrap_or_default();
                IpAddr::V6(Ipv6Addr::from(octets))
            };
            (address(8), address(24))
        } else {
            let address = |at: usize| {
                let octets: [u8; 4] =
                    self.bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).unwrap_or_default();
                IpAddr::V4(Ipv4Addr::from(octets))
            };
            (address(12), address(16))
        }
    }

    /// Reports whether it is a node's answer to another packet, in the name of that one's
    /// destination.
    #[must_use]
    pub fn is_answer_to(&self, other: &Self) -> bool {
        let (from, _) = other.addresses();
        let (_, to) = self.addresses();
        self.tag.by == By::Node && to == from && self.bytes != other.bytes
    }

    /// Decrements the TTL; returns false if it has run out.
    #[must_use]
    pub fn forward(&mut self) -> bool {
        let at = if self.is_v6() { 7 } else { 8 };
        if self.bytes[at] <= 1 {
            return false;
        }
        self.bytes[at] -= 1;
        if !self.is_v6() {
            self.bytes[10..12].copy_from_slice(&[0, 0]);
            let sum = !fold(sum(&self.bytes[..20]));
            self.bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        true
    }

    /// Reads the packet as its receiver does; returns [`None`] if a checksum or length is wrong.
    #[must_use]
    pub fn contents(&self) -> Option<Read> {
        let (source, destination) = self.addresses();
        let (number, payload, part) = if self.is_v6() {
            (*self.bytes.get(6)?, self.bytes.get(40..)?, None)
        } else {
            if fold(sum(self.bytes.get(..20)?)) != 0xffff {
                return None;
            }
            let field = u16::from_be_bytes([self.bytes[6], self.bytes[7]]);
            let id = u16::from_be_bytes([self.bytes[4], self.bytes[5]]);
            let (offset, more) = ((field & 0x1fff) * 8, field & 0x2000 != 0);
            let part = (offset != 0 || more).then_some(Part { id, offset, more });
            (self.bytes[9], self.bytes.get(20..)?, part)
        };
        if let Some(part) = part {
            return Some(Read::Part(source, destination, part, payload.to_vec()));
        }
        if !matches!(number, protocol::TCP | protocol::UDP | protocol::SCTP) {
            return Some(Read::Other);
        }
        Segment::read(source, destination, number, payload).map(Read::Whole)
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (source, destination) = self.addresses();
        match self.contents() {
            Some(Read::Whole(segment)) => write!(f, "{segment}"),
            Some(Read::Part(_, _, part, bytes)) => {
                let Part { id, offset, .. } = part;
                write!(f, "{source} > {destination} part {id}@{offset}+{}", bytes.len())
            }
            Some(Read::Other) => write!(f, "{source} > {destination} ICMP"),
            None => write!(f, "{source} > {destination} broken"),
        }?;
        if self.tag.connection == u32::MAX {
            return write!(f, " ({:?})", self.tag.by);
        }
        write!(f, " (#{} {:?})", self.tag.connection, self.tag.by)
    }
}
