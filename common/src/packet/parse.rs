//! Finds the headers of a packet.

use crate::abi::Tuple;
use crate::family::{Family, V4, V6};
use crate::packet::header::{
    ExtensionHeader, IcmpHeader, Ipv4Header, Ipv6Header, SctpHeader, TcpHeader, UdpHeader, VlanTag,
    Wire, protocol, sctp, tcp, vlan,
};

/// Read access to a packet.
pub trait Packet {
    /// Length of the packet in bytes, link header included.
    fn length(&self) -> u32;
    /// The value at an offset; `None` beyond the packet's end.
    fn read<T: Wire>(&self, offset: u32) -> Option<T>;
}

/// No header is looked for beyond this offset: keeps offsets bounded for the verifier.
const OFFSET_MAX: u32 = 1024;

/// Extension headers walked at most. RFC 8504 expects hosts to limit the walk; eight is what
/// IPv6 itself defines, each but destination options at most once.
const EXTENSIONS_MAX: u32 = 8;

/// What a packet is, as far as the path cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// TCP, UDP or SCTP, complete as far as the transport header: a whole packet or a datagram's
    /// first fragment.
    Transport,
    /// An ICMP error about such a packet.
    IcmpError,
    /// A fragment behind the first one: it has no ports.
    Fragment,
    /// Ends before its transport header; the addresses are known.
    Truncated,
    /// A length or offset contradicts the packet; the addresses are known.
    Malformed,
    /// Nothing for us.
    Other,
}

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// Its first fragment, which must hold the whole transport header (RFC 1858 and 7112: else it
    /// counts as truncated).
    First,
    /// Another fragment.
    Later,
}

/// Where the headers are and what they say. Offsets are in bytes from the packet's start.
///
/// Aligned so that the kernel clears it by words.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Headers<F: Family> {
    /// The packet's tuple; for an ICMP error that of the quoted packet, turned round.
    pub tuple: Tuple<F::Address>,
    /// What the packet is.
    pub kind: Kind,
    /// TCP flags; for SCTP what its first chunk means in terms of them.
    pub tcp_flags: u8,
    /// Which part of a datagram it is.
    pub fragment: Fragment,
    /// For a fragment: the datagram's identification, as it lies in memory.
    pub datagram: u32,
    /// For a fragment: the protocol as every fragment of the datagram tells it.
    ///
    /// For IPv6 the number of the header behind the fragment header. Where that is one more
    /// extension header, only the first fragment tells the transport protocol, and this is not the
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
    /// Length from the IP header to the packet's end as the IP header tells it.
    pub length: u32,
    /// The transport checksum (of the quoted packet in an ICMP error), as it lies in memory; not
    /// SCTP's.
    pub checksum: u16,
    /// Whether `checksum` was there to read.
    pub has_checksum: bool,
    /// For an ICMP error: offset of the quoted IP header.
    pub quoted_network: u32,
    /// For an ICMP error: offset of the quoted transport header.
    pub quoted_transport: u32,
    /// For an ICMP error: checksum of the quoted IPv4 header, as it lies in memory.
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
    /// fragment of; `quoted` forgives a packet that was cut off and notes nothing.
    fn network<P: Packet>(
        packet: &P,
        offset: u32,
        quoted: bool,
        headers: &mut Headers<Self>,
    ) -> Option<Network<Self>>;
    /// Whether an ICMP message of this type quotes a packet and concerns its sender.
    fn is_error(kind: u8) -> bool;
}

/// Finds the network header behind up to two VLAN tags.
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
        // More fragments, and the offset.
        let more_offset = u16::from_be(header.fragment) & 0x3fff;
        if length == 0 && available > 0xffff {
            // A segment larger than the field can say (BIG TCP).
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
        // Destination unreachable (with fragmentation needed), time exceeded, parameter problem.
        matches!(kind, 3 | 11 | 12)
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
        let mut next = header.next_header;
        let mut transport = offset.wrapping_add(40);
        if kind == Kind::Transport {
            for _ in 0..EXTENSIONS_MAX {
                // Hop-by-hop options, routing, fragment, destination options. (Behind an
                // authentication header addresses and ports must not change: not ours.)
                if !matches!(next, 0 | 43 | 44 | 60) {
                    break;
                }
                let Some(extension) = packet.read::<ExtensionHeader>(transport) else {
                    kind = Kind::Truncated;
                    break;
                };
                if next == 43 && extension.segments_left != 0 {
                    // Not at its destination: the address in the header is a way-point.
                    kind = Kind::Other;
                    break;
                }
                let mut words = u32::from(extension.length).wrapping_add(1);
                let mut is_later = false;
                if next == 44 {
                    // The byte is reserved here.
                    words = 1;
                    // An atomic fragment (RFC 6946) has neither offset nor more fragments.
                    let offset_more =
                        u16::from_be_bytes([extension.kind, extension.segments_left]) & 0xfff9;
                    if offset_more != 0 {
                        is_later = offset_more != 1;
                        if !quoted {
                            let Some(id) = packet.read::<u32>(transport.wrapping_add(4)) else {
                                kind = Kind::Truncated;
                                break;
                            };
                            headers.part(!is_later, id, extension.next_header);
                        }
                    }
                }
                next = extension.next_header;
                // The black box and a mask above any sum give the verifier one range after each
                // header, not a new one: it need not go on from here as often as there are headers.
                transport =
                    core::hint::black_box(transport.wrapping_add(words.wrapping_mul(8)) & 0xfff);
                if is_later {
                    kind = Kind::Fragment;
                    break;
                }
                if transport > OFFSET_MAX {
                    kind = Kind::Malformed;
                    break;
                }
            }
        }
        Some(Network {
            source: header.source,
            destination: header.destination,
            length,
            transport,
            checksum: 0,
            protocol: next,
            ttl: header.hop_limit,
            kind,
        })
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable, packet too big, time exceeded, parameter problem.
        matches!(kind, 1..=4)
    }
}

impl<F: Family> Default for Headers<F> {
    /// Headers of nothing.
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
    /// Notes which part of which datagram the packet is.
    #[inline(always)]
    fn part(&mut self, is_first: bool, datagram: u32, protocol: u8) {
        self.fragment = if is_first { Fragment::First } else { Fragment::Later };
        self.datagram = datagram;
        self.datagram_protocol = protocol;
    }
}

/// Reads a packet whose network header is at `offset`.
///
/// `None` when not even the network header is there.
#[inline(always)]
pub fn headers<F: Parse, P: Packet>(packet: &P, offset: u32) -> Option<Headers<F>> {
    let mut headers = Headers::default();
    headers_into(packet, offset, &mut headers).then_some(headers)
}

/// As [`headers`], into headers of nothing: the kernel's stack has no room for copies.
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
    // What the IP header leaves for the transport header; never below zero where the walk went past
    // the end.
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

/// A number of four bytes that is aligned to two.
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
    // In a first fragment it is the whole datagram's.
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

/// An SCTP packet in TCP's flags, by its first chunk (RFC 9260 section 3.2): the path has one set
/// of states for both.
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
/// An ABORT behind another chunk is not seen: the flow's entries end by their age.
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

/// An ICMP error quotes a packet, or a first fragment: either has the ports.
///
/// Of SCTP's checksum nothing is kept: it cannot be brought up to date where the quoted packet was
/// cut off, and nobody reads it there. Whoever gets the error compares the verification tag (RFC
/// 9260 section 10), which the eight bytes that are always quoted hold and which no translation
/// changes.
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
    // RFC 792: at least eight bytes of the transport header are quoted; the ports are in the first
    // four.
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
    headers.quoted_network = offset;
    headers.quoted_transport = quoted.transport;
    headers.quoted_checksum = quoted.checksum;
}
