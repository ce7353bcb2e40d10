//! Finds the headers of a packet.

use crate::abi::Tuple;
use crate::family::{Family, V4, V6};
use crate::header::{
    ExtensionHeader, IcmpHeader, Ipv4Header, Ipv6Header, TcpHeader, UdpHeader, VlanTag, Wire, protocol, vlan,
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
    /// TCP or UDP, complete as far as the transport header.
    Transport,
    /// An ICMP error about a TCP or UDP packet.
    IcmpError,
    /// A fragment, the first one included.
    Fragment,
    /// Ends before its transport header; the addresses are known.
    Truncated,
    /// A length or offset contradicts the packet; the addresses are known.
    Malformed,
    /// Nothing for us.
    Other,
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
    /// TCP flags.
    pub tcp_flags: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Offset of the IP header.
    pub network: u32,
    /// Offset of the transport or ICMP header.
    pub transport: u32,
    /// Length from the IP header to the packet's end as the IP header tells it.
    pub length: u32,
    /// The transport checksum (of the quoted packet in an ICMP error), as it lies in memory.
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
    /// Reads the network header at an offset; `quoted` forgives a packet that was cut off.
    fn network<P: Packet>(packet: &P, offset: u32, quoted: bool) -> Option<Network<Self>>;
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
    fn network<P: Packet>(packet: &P, offset: u32, quoted: bool) -> Option<Network<Self>> {
        let header: Ipv4Header = packet.read(offset)?;
        let header_length = u32::from(header.version_ihl & 15).wrapping_mul(4);
        let available = packet.length().wrapping_sub(offset);
        let mut length = u32::from(u16::from_be(header.total_length));
        let mut kind = Kind::Transport;
        if length == 0 && available > 0xffff {
            // A segment larger than the field can say (BIG TCP).
            length = available;
        }
        if header.version_ihl >> 4 != 4 || header_length < 20 || length < header_length {
            kind = Kind::Malformed;
        } else if u16::from_be(header.fragment) & 0x3fff != 0 {
            kind = Kind::Fragment;
        } else if length > available {
            if quoted {
                length = available;
            } else {
                kind = Kind::Truncated;
            }
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
    fn network<P: Packet>(packet: &P, offset: u32, quoted: bool) -> Option<Network<Self>> {
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
                // Hop-by-hop options, routing, fragment, destination options. (Behind an authentication
                // header addresses and ports must not change: not ours.)
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
                let offset_more = u16::from_be_bytes([extension.kind, extension.segments_left]);
                if next == 44 && offset_more & 0xfff9 != 0 {
                    kind = Kind::Fragment;
                    break;
                }
                next = extension.next_header;
                // A fragment header has a zero here and eight bytes: one step serves all four.
                transport =
                    transport.wrapping_add(u32::from(extension.length).wrapping_add(1).wrapping_mul(8));
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
                reserved: [0; 3],
            },
            kind: Kind::Other,
            tcp_flags: 0,
            ttl: 0,
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
pub fn headers_into<F: Parse, P: Packet>(packet: &P, offset: u32, headers: &mut Headers<F>) -> bool {
    if offset > OFFSET_MAX {
        return false;
    }
    let Some(network) = F::network(packet, offset, false) else { return false };
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
    // What the IP header leaves for the transport header; never below zero where the walk went past the end.
    let end = offset.wrapping_add(network.length);
    if network.transport > end {
        headers.kind = Kind::Malformed;
        return true;
    }
    let payload = end.wrapping_sub(network.transport);
    if network.protocol == protocol::TCP {
        tcp(packet, headers, payload);
    } else if network.protocol == protocol::UDP {
        udp(packet, headers, payload);
    } else if network.protocol == F::ICMP {
        icmp(packet, headers, payload);
    } else {
        headers.kind = Kind::Other;
    }
    true
}

#[inline(always)]
fn tcp<F: Parse, P: Packet>(packet: &P, headers: &mut Headers<F>, payload: u32) {
    let (Some(header), true) = (packet.read::<TcpHeader>(headers.transport), payload >= 20) else {
        headers.kind = Kind::Truncated;
        return;
    };
    let header_length = u32::from(header.offset >> 4).wrapping_mul(4);
    if header_length < 20 || header_length > payload {
        headers.kind = Kind::Malformed;
    }
    headers.tuple.source_port = u16::from_be(header.source);
    headers.tuple.destination_port = u16::from_be(header.destination);
    headers.tcp_flags = header.flags;
    headers.checksum = header.checksum;
    headers.has_checksum = true;
}

#[inline(always)]
fn udp<F: Parse, P: Packet>(packet: &P, headers: &mut Headers<F>, payload: u32) {
    let (Some(header), true) = (packet.read::<UdpHeader>(headers.transport), payload >= 8) else {
        headers.kind = Kind::Truncated;
        return;
    };
    let length = u32::from(u16::from_be(header.length));
    if length < 8 || length > payload {
        headers.kind = Kind::Malformed;
    }
    headers.tuple.source_port = u16::from_be(header.source);
    headers.tuple.destination_port = u16::from_be(header.destination);
    headers.checksum = header.checksum;
    headers.has_checksum = true;
}

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
    let Some(quoted) = F::network(packet, offset, true) else { return };
    if quoted.kind != Kind::Transport || quoted.transport > OFFSET_MAX {
        return;
    }
    let is_udp = quoted.protocol == protocol::UDP;
    if quoted.protocol != protocol::TCP && !is_udp {
        return;
    }
    // RFC 792: at least eight bytes of the transport header are quoted; the ports are in the first four.
    let Some(ports) = packet.read::<[u16; 4]>(quoted.transport) else { return };
    let [source_port, destination_port, _, udp_checksum] = ports;
    if is_udp {
        headers.checksum = udp_checksum;
        headers.has_checksum = true;
    } else if let Some(checksum) = packet.read::<u16>(quoted.transport.wrapping_add(16)) {
        headers.checksum = checksum;
        headers.has_checksum = true;
    }
    headers.tuple = Tuple {
        source: quoted.destination,
        destination: quoted.source,
        source_port: u16::from_be(destination_port),
        destination_port: u16::from_be(source_port),
        protocol: quoted.protocol,
        reserved: [0; 3],
    };
    headers.kind = Kind::IcmpError;
    headers.quoted_network = offset;
    headers.quoted_transport = quoted.transport;
    headers.quoted_checksum = quoted.checksum;
}
