//! Finds the headers of a packet.

use crate::abi::Tuple;
use crate::family::{Family, V4, V6};
use crate::packet::header::{
    ExtensionHeader, IcmpHeader, Ipv4Header, Ipv6Header, SctpHeader, TcpHeader, UdpHeader, VlanTag,
    Wire, protocol, sctp, tcp, vlan,
};

/// Read access to a packet.
pub trait Packet {
    /// Returns the length of the packet in bytes, link header included.
    fn length(&self) -> u32;
    /// Returns the value at an offset, or `None` beyond the packet's end.
    fn read<T: Wire>(&self, offset: u32) -> Option<T>;
}

/// No header is looked for beyond this offset, which keeps offsets bounded for the verifier.
const OFFSET_MAX: u32 = 1024;

/// Maximum number of extension headers walked. RFC 8504 expects hosts to limit the walk; eight is
/// what IPv6 itself defines, each at most once except for destination options.
const EXTENSIONS_MAX: u32 = 8;

/// The kind of a packet, as far as the path cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// TCP, UDP or SCTP, complete as far as the transport header: a whole packet or a datagram's
    /// first fragment.
    Transport,
    /// An ICMP error about such a packet.
    IcmpError,
    /// A fragment other than the first: it has no ports.
    Fragment,
    /// The packet ends before its transport header; the addresses are known.
    Truncated,
    /// A length or offset contradicts the packet; the addresses are known.
    Malformed,
    /// Anything else, which is never ours.
    Other,
}

/// The part of a datagram that a packet holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Fragment {
    /// The whole datagram.
    Whole,
    /// Its first fragment, which must hold the whole transport header (RFC 1858 and 7112: else it
    /// counts as truncated).
    First,
    /// Another fragment.
    Later,
}

/// Offsets and contents of a packet's headers. Offsets are in bytes from the packet's start.
///
/// Aligned so that the kernel clears it in words.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Headers<F: Family> {
    /// The packet's tuple; for an ICMP error the quoted packet's, reversed.
    pub tuple: Tuple<F::Address>,
    /// The kind of the packet.
    pub kind: Kind,
    /// TCP flags; for SCTP what its first chunk means in terms of them; RST for an ICMP error that
    /// says that the destination cannot be reached.
    pub tcp_flags: u8,
    /// The part of a datagram that it holds.
    pub fragment: Fragment,
    /// For a fragment: the datagram's identification, in memory order.
    pub datagram: u32,
    /// For a fragment: the protocol that every fragment of the datagram shows.
    ///
    /// For IPv6 this is the number of the header after the fragment header. If that is one more
    /// extension header, only the first fragment shows the transport protocol, and this is not the
    /// tuple's.
    pub datagram_protocol: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TCP's sequence number; SCTP's verification tag.
    pub sequence: u32,
    /// TCP's acknowledgment number; SCTP's verification tag, which an ABORT for an unknown
    /// connection reflects.
    pub acknowledgment: u32,
    /// Offset of the IP header.
    pub network: u32,
    /// Offset of the transport or ICMP header.
    pub transport: u32,
    /// Length of the packet from its IP header on, according to that header.
    pub length: u32,
    /// The transport checksum (of the quoted packet in an ICMP error), in memory order; not SCTP's.
    pub checksum: u16,
    /// Whether `checksum` was present.
    pub has_checksum: bool,
    /// For an ICMP error: offset of the quoted IP header.
    pub quoted_network: u32,
    /// For an ICMP error: offset of the quoted transport header.
    pub quoted_transport: u32,
    /// For an ICMP error: checksum of the quoted IPv4 header, in memory order.
    pub quoted_checksum: u16,
    /// For an ICMP error: source and destination of the error itself.
    pub outer: [F::Address; 2],
}

/// The network header of either family, reduced to what the path needs.
#[derive(Clone, Copy)]
pub struct Network<F: Family> {
    source: F::Address,
    destination: F::Address,
    length: u32,
    transport: u32,
    checksum: u16,
    protocol: u8,
    ttl: u8,
    kind: Kind,
}

/// A family whose network header can be read.
pub trait Parse: Family<Address: Wire> {
    /// Reads the network header at an offset, and notes in `headers` which datagram it is a
    /// fragment of. With `quoted` a packet may be cut off, and nothing is noted.
    fn network<P: Packet>(
        packet: &P,
        offset: u32,
        quoted: bool,
        headers: &mut Headers<Self>,
    ) -> Option<Network<Self>>;
    /// Reports whether an ICMP message of this type quotes a packet and concerns its sender. A
    /// redirect is none: the gateway that it names is on the link where it was sent.
    fn is_error(kind: u8) -> bool;
    /// Reports whether an ICMP error of this type and code says that the network, host or port of
    /// the quoted packet's destination cannot be reached.
    fn is_unreachable(kind: u8, code: u8) -> bool;
}

/// Finds the network header after up to two VLAN tags.
///
/// `ethertype` (host order) is that of the header at `offset`.
#[inline(always)]
pub fn untag<P: Packet>(packet: &P, ethertype: u16, offset: u32) -> Option<(u16, u32)> {
    let (mut ethertype, mut offset) = (ethertype, offset);
    for _ in 0..2 {
        if ethertype != vlan::C_TAG && ethertype != vlan::S_TAG {
            break;
        }
        let tag: VlanTag = packet.read(offset)?;
        ethertype = u16::from_be(tag.ethertype);
        offset = offset.wrapping_add(4);
    }
    Some((ethertype, offset))
}

impl Parse for V4 {
    #[inline(always)]
    fn network<P: Packet>(
        packet: &P,
        offset: u32,
        quoted: bool,
        headers: &mut Headers<Self>,
    ) -> Option<Network<Self>> {
        let header: Ipv4Header = packet.read(offset)?;
        let header_length = u32::from(header.version_ihl & 15).wrapping_mul(4);
        let available = packet.length().wrapping_sub(offset);
        let mut length = u32::from(u16::from_be(header.total_length));
        let mut kind = Kind::Transport;
        // The flag for more fragments, and the offset.
        let more_offset = u16::from_be(header.fragment) & 0x3fff;
        if length == 0 && available > 0xffff {
            // A segment larger than the field can express (BIG TCP).
            length = available;
        }
        if more_offset != 0 && !quoted {
            headers.part(more_offset == 0x2000, u32::from(header.id), header.protocol);
        }
        if header.version_ihl >> 4 != 4 || header_length < 20 || length < header_length {
            kind = Kind::Malformed;
        } else if length > available && !quoted {
            kind = Kind::Truncated;
        } else if more_offset & 0x1fff != 0 {
            kind = Kind::Fragment;
        } else {
            length = length.min(available);
        }
        Some(Network {
            source: header.source,
            destination: header.destination,
            length,
            transport: offset.wrapping_add(header_length),
            checksum: header.checksum,
            protocol: header.protocol,
            ttl: header.ttl,
            kind,
        })
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable (with fragmentation needed), source quench, time exceeded,
        // parameter problem. Source quench is obsolete (RFC 6633), but netfilter translates it too.
        matches!(kind, 3 | 4 | 11 | 12)
    }

    #[inline(always)]
    fn is_unreachable(kind: u8, code: u8) -> bool {
        // Fragmentation needed asks for smaller packets.
        kind == 3 && code != 4
    }
}

impl Parse for V6 {
    #[inline(always)]
    fn network<P: Packet>(
        packet: &P,
        offset: u32,
        quoted: bool,
        headers: &mut Headers<Self>,
    ) -> Option<Network<Self>> {
        let header: Ipv6Header = packet.read(offset)?;
        let available = packet.length().wrapping_sub(offset);
        let payload = u32::from(u16::from_be(header.payload_length));
        let mut length = payload.wrapping_add(40);
        let mut kind = Kind::Transport;
        if payload == 0 && available > 0xffff {
            length = available;
        }
        if u32::from_be(header.version_class_flow) >> 28 != 6 {
            kind = Kind::Malformed;
        } else if length > available {
            if quoted {
                length = available;
            } else {
                kind = Kind::Truncated;
            }
        }
        let mut chain =
            Chain { next: header.next_header, transport: offset.wrapping_add(40), kind };
        if kind == Kind::Transport {
            chain.follow(packet, quoted, headers);
        }
        Some(Network {
            source: header.source,
            destination: header.destination,
            length,
            transport: chain.transport,
            checksum: 0,
            protocol: chain.next,
            ttl: header.hop_limit,
            kind: chain.kind,
        })
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable, packet too big, time exceeded, parameter problem.
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn is_unreachable(kind: u8, _: u8) -> bool {
        kind == 1
    }
}

/// The chain of an IPv6 packet's extension headers, as far as it has been followed.
struct Chain {
    /// The protocol number of the next header.
    next: u8,
    /// The position of the next header.
    transport: u32,
    /// The kind of the packet.
    kind: Kind,
}

impl Chain {
    /// Follows the chain to the transport header.
    #[inline(always)]
    fn follow<P: Packet>(&mut self, packet: &P, quoted: bool, headers: &mut Headers<V6>) {
        for _ in 0..EXTENSIONS_MAX {
            // Hop-by-hop options, routing, fragment, destination options. (After an authentication
            // header addresses and ports must not change: not ours.)
            if !matches!(self.next, 0 | 43 | 44 | 60) {
                break;
            }
            let Some(extension) = packet.read::<ExtensionHeader>(self.transport) else {
                self.kind = Kind::Truncated;
                break;
            };
            if self.next == 43 && extension.segments_left != 0 {
                // It is not at its destination: the address in the header is a way-point.
                self.kind = Kind::Other;
                break;
            }
            let mut words = u32::from(extension.length).wrapping_add(1);
            let mut is_later = false;
            if self.next == 44 {
                // The byte is reserved in this header.
                words = 1;
                // An atomic fragment (RFC 6946) has neither offset nor more fragments.
                let offset_more =
                    u16::from_be_bytes([extension.kind, extension.segments_left]) & 0xfff9;
                if offset_more != 0 {
                    is_later = offset_more != 1;
                    if !quoted {
                        let Some(id) = packet.read::<u32>(self.transport.wrapping_add(4)) else {
                            self.kind = Kind::Truncated;
                            break;
                        };
                        headers.part(!is_later, id, extension.next_header);
                    }
                }
            }
            self.next = extension.next_header;
            // The black box, and a mask larger than any sum, give the verifier the same range after
            // each header, not a new one: it need not go on from here once for each header.
            self.transport =
                core::hint::black_box(self.transport.wrapping_add(words.wrapping_mul(8)) & 0xfff);
            if is_later {
                self.kind = Kind::Fragment;
                break;
            }
            if self.transport > OFFSET_MAX {
                self.kind = Kind::Malformed;
                break;
            }
        }
    }
}

impl<F: Family> Default for Headers<F> {
    /// Returns headers of no packet.
    #[inline(always)]
    fn default() -> Self {
        Self {
            tuple: Tuple {
                source: F::Address::default(),
                destination: F::Address::default(),
                source_port: 0,
                destination_port: 0,
                protocol: 0,
                side: 0,
                reserved: [0; 2],
            },
            kind: Kind::Other,
            tcp_flags: 0,
            fragment: Fragment::Whole,
            datagram: 0,
            datagram_protocol: 0,
            ttl: 0,
            sequence: 0,
            acknowledgment: 0,
            network: 0,
            transport: 0,
            length: 0,
            checksum: 0,
            has_checksum: false,
            quoted_network: 0,
            quoted_transport: 0,
            quoted_checksum: 0,
            outer: [F::Address::default(), F::Address::default()],
        }
    }
}

impl<F: Family> Headers<F> {
    /// Notes the packet's datagram, and its part of it.
    #[inline(always)]
    fn part(&mut self, is_first: bool, datagram: u32, protocol: u8) {
        self.fragment = if is_first { Fragment::First } else { Fragment::Later };
        self.datagram = datagram;
        self.datagram_protocol = protocol;
    }
}

/// Reads a packet whose network header is at `offset`.
///
/// Returns `None` if even the network header is missing.
#[inline(always)]
pub fn headers<F: Parse, P: Packet>(packet: &P, offset: u32) -> Option<Headers<F>> {
    let mut headers = Headers::default();
    headers_into(packet, offset, &mut headers).then_some(headers)
}

/// As [`headers`], into headers of no packet: the kernel's stack has no room for copies.
#[inline(always)]
pub fn headers_into<F: Parse, P: Packet>(
    packet: &P,
    offset: u32,
    headers: &mut Headers<F>,
) -> bool {
    if offset > OFFSET_MAX {
        return false;
    }
    let Some(network) = F::network(packet, offset, false, headers) else { return false };
    headers.tuple.source = network.source;
    headers.tuple.destination = network.destination;
    headers.tuple.protocol = network.protocol;
    headers.kind = network.kind;
    headers.ttl = network.ttl;
    headers.network = offset;
    headers.transport = network.transport;
    headers.length = network.length;
    headers.outer = [network.source, network.destination];
    if network.kind != Kind::Transport || network.transport > OFFSET_MAX {
        return true;
    }
    // The length that the IP header leaves for the transport header; never below zero where the
    // walk went past the end.
    let end = offset.wrapping_add(network.length);
    if network.transport > end {
        headers.kind = Kind::Malformed;
        return true;
    }
    let payload = end.wrapping_sub(network.transport);
    if network.protocol == protocol::TCP {
        tcp_header(packet, headers, payload);
    } else if network.protocol == protocol::UDP {
        udp_header(packet, headers, payload);
    } else if network.protocol == protocol::SCTP {
        sctp_header(packet, headers, payload);
    } else if network.protocol == F::ICMP {
        icmp(packet, headers, payload);
    } else {
        headers.kind = Kind::Other;
    }
    true
}

#[inline(always)]
fn tcp_header<F: Parse, P: Packet>(packet: &P, headers: &mut Headers<F>, payload: u32) {
    let (Some(header), true) = (packet.read::<TcpHeader>(headers.transport), payload >= 20) else {
        headers.kind = Kind::Truncated;
        return;
    };
    let header_length = u32::from(header.offset >> 4).wrapping_mul(4);
    if header_length < 20 {
        headers.kind = Kind::Malformed;
    } else if header_length > payload {
        // In a fragment of this size the rest may be in the next one.
        let first = headers.fragment == Fragment::First;
        headers.kind = if first { Kind::Truncated } else { Kind::Malformed };
    }
    headers.tuple.source_port = u16::from_be(header.source);
    headers.tuple.destination_port = u16::from_be(header.destination);
    headers.tcp_flags = header.flags;
    headers.sequence = word(header.sequence);
    headers.acknowledgment = word(header.acknowledgment);
    headers.checksum = header.checksum;
    headers.has_checksum = true;
}

/// Reads a number of four bytes that is aligned to two.
#[inline(always)]
fn word([high, low]: [u16; 2]) -> u32 {
    u32::from(u16::from_be(high)) << 16 | u32::from(u16::from_be(low))
}

#[inline(always)]
fn udp_header<F: Parse, P: Packet>(packet: &P, headers: &mut Headers<F>, payload: u32) {
    let (Some(header), true) = (packet.read::<UdpHeader>(headers.transport), payload >= 8) else {
        headers.kind = Kind::Truncated;
        return;
    };
    let length = u32::from(u16::from_be(header.length));
    // In a first fragment it is the whole datagram's length.
    if length < 8 || length > payload && headers.fragment == Fragment::Whole {
        headers.kind = Kind::Malformed;
    }
    headers.tuple.source_port = u16::from_be(header.source);
    headers.tuple.destination_port = u16::from_be(header.destination);
    headers.checksum = header.checksum;
    headers.has_checksum = true;
}

#[inline(always)]
fn sctp_header<F: Parse, P: Packet>(packet: &P, headers: &mut Headers<F>, payload: u32) {
    let (Some(header), true) = (packet.read::<SctpHeader>(headers.transport), payload >= 16) else {
        headers.kind = Kind::Truncated;
        return;
    };
    headers.tuple.source_port = u16::from_be(header.source);
    headers.tuple.destination_port = u16::from_be(header.destination);
    headers.tcp_flags = sctp_flags(header.chunk, header.chunk_flags);
    headers.sequence = word(header.tag);
    headers.acknowledgment = headers.sequence;
}

/// Expresses an SCTP packet's first chunk in TCP's flags (RFC 9260 section 3.2), so that the path
/// has one set of states for both protocols.
///
/// | first chunk | flags | |
/// |---|---|---|
/// | INIT | SYN | always alone in its packet |
/// | INIT ACK | SYN, ACK | always alone |
/// | ABORT | RST, ACK | of a connection that its sender knows |
/// | ABORT with T | RST | its sender knows no such connection (section 8.4), as with TCP's reset without acknowledgment |
/// | SHUTDOWN ACK | FIN, ACK | neither side has data under way |
/// | SHUTDOWN COMPLETE | FIN, ACK | the other side's end |
/// | any other | ACK | SHUTDOWN too: its receiver may have data to send again |
///
/// An ABORT after another chunk is not seen: the flow's entries then expire.
#[inline(always)]
fn sctp_flags(chunk: u8, flags: u8) -> u8 {
    match chunk {
        sctp::INIT => tcp::SYN,
        sctp::INIT_ACK => tcp::SYN | tcp::ACK,
        sctp::ABORT if flags & sctp::T != 0 => tcp::RST,
        sctp::ABORT => tcp::RST | tcp::ACK,
        sctp::SHUTDOWN_ACK | sctp::SHUTDOWN_COMPLETE => tcp::FIN | tcp::ACK,
        _ => tcp::ACK,
    }
}

/// Reads an ICMP error, which quotes a packet or a first fragment: both have the ports.
///
/// SCTP's checksum is not kept: it cannot be updated if the quoted packet was cut off, and nobody
/// reads it there. The receiver of the error compares the verification tag (RFC 9260 section 10),
/// which is in the eight bytes that are always quoted and which no translation changes.
#[inline(always)]
fn icmp<F: Parse, P: Packet>(packet: &P, headers: &mut Headers<F>, payload: u32) {
    headers.kind = Kind::Other;
    if payload < 8 {
        return;
    }
    let Some(header) = packet.read::<IcmpHeader>(headers.transport) else { return };
    if !F::is_error(header.kind) {
        return;
    }
    let offset = headers.transport.wrapping_add(8);
    let Some(quoted) = F::network(packet, offset, true, headers) else { return };
    if quoted.kind != Kind::Transport || quoted.transport > OFFSET_MAX {
        return;
    }
    if !matches!(quoted.protocol, protocol::TCP | protocol::UDP | protocol::SCTP) {
        return;
    }
    // RFC 792: at least eight bytes of the transport header are quoted; the first four are the
    // ports.
    let Some(ports) = packet.read::<[u16; 4]>(quoted.transport) else { return };
    let [source_port, destination_port, _, udp_checksum] = ports;
    if quoted.protocol == protocol::UDP {
        headers.checksum = udp_checksum;
        headers.has_checksum = true;
    } else if quoted.protocol == protocol::TCP
        && let Some(checksum) = packet.read::<u16>(quoted.transport.wrapping_add(16))
    {
        headers.checksum = checksum;
        headers.has_checksum = true;
    }
    headers.tuple = Tuple {
        source: quoted.destination,
        destination: quoted.source,
        source_port: u16::from_be(destination_port),
        destination_port: u16::from_be(source_port),
        protocol: quoted.protocol,
        side: 0,
        reserved: [0; 2],
    };
    headers.kind = Kind::IcmpError;
    headers.tcp_flags = if F::is_unreachable(header.kind, header.code) { tcp::RST } else { 0 };
    headers.quoted_network = offset;
    headers.quoted_transport = quoted.transport;
    headers.quoted_checksum = quoted.checksum;
}
