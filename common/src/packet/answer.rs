//! Answers to packets for services without backends: TCP reset and ICMP errors.
//!
//! # Checksums of an answer
//!
//! The answer is written over the packet that it answers, so it inherits the kernel's view of that
//! packet's checksum. If that is partial (see [`crate::packet::checksum`]), the device will later
//! sum from the old transport header on and store the complement in the old field. A reset keeps
//! TCP's field, so it gets the pseudo-header's sum alone, as any partial segment does. An ICMP
//! error in a UDP packet's place has its *unused* field there (bytes 6 and 7). With `S` the sum of
//! all other words and `Y` what we leave in the field, the device stores `~(S + Y)`, and the
//! message sums up to `S + ~(S + Y) = ~Y`. ICMP wants all ones: `Y = 0`, which an unused field is
//! anyway. ICMPv6 wants the complement of its pseudo-header's sum `P`: `Y = P`.

use crate::abi::Tuple;
use crate::family::{Family, V4, V6};
use crate::packet::checksum::{fold16, pseudo_header, sum_words};
use crate::packet::header::{IcmpHeader, Ipv4Header, Ipv6Header, TcpHeader, Wire, protocol, tcp};
use crate::packet::parse::{Headers, Parse};

/// Maximum number of bytes that an ICMP error quotes of the offending packet: its IP header with
/// some options or extensions, and eight bytes of transport header or more.
pub const QUOTE: u32 = 96;

/// A family whose network header can be written.
pub trait Answer: Parse {
    /// The network header.
    type Network: Wire;
    /// Returns a header for `length` bytes of payload.
    fn header(source: F0<Self>, destination: F0<Self>, protocol: u8, length: u16) -> Self::Network;
    /// ICMP type and code of "port unreachable".
    const PORT_UNREACHABLE: (u8, u8);
    /// ICMP type and code of "packet too big".
    const TOO_BIG: (u8, u8);
    /// ICMP type and code of "time exceeded in transit".
    const TIME_EXCEEDED: (u8, u8);
}

type F0<F> = <F as Family>::Address;

/// A kind of ICMP error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum IcmpError {
    /// Nobody serves the port.
    PortUnreachable,
    /// The packet is larger than the path takes.
    TooBig,
    /// The TTL or hop limit has run out.
    TimeExceeded,
}

impl IcmpError {
    /// Returns the error with a number, as `as` gives it.
    #[inline(always)]
    #[must_use]
    pub fn from_number(number: u32) -> Self {
        match number {
            0 => Self::PortUnreachable,
            1 => Self::TooBig,
            _ => Self::TimeExceeded,
        }
    }

    /// Returns ICMP type and code in a family.
    #[inline(always)]
    pub fn code<F: Answer>(self) -> (u8, u8) {
        match self {
            Self::PortUnreachable => F::PORT_UNREACHABLE,
            Self::TooBig => F::TOO_BIG,
            Self::TimeExceeded => F::TIME_EXCEEDED,
        }
    }
}

/// TTL and hop limit of packets that we originate.
const TTL: u8 = 64;

impl Answer for V4 {
    type Network = Ipv4Header;
    const PORT_UNREACHABLE: (u8, u8) = (3, 3);
    const TOO_BIG: (u8, u8) = (3, 4);
    const TIME_EXCEEDED: (u8, u8) = (11, 0);

    #[inline(always)]
    fn header(source: F0<V4>, destination: F0<V4>, protocol: u8, length: u16) -> Ipv4Header {
        let mut header = Ipv4Header {
            version_ihl: 0x45,
            // ICMP errors have the precedence of routing information (RFC 1812, 4.3.2.5).
            tos: if protocol == V4::ICMP { 0xc0 } else { 0 },
            total_length: length.wrapping_add(20).to_be(),
            id: 0,
            fragment: 0x4000_u16.to_be(),
            ttl: TTL,
            protocol,
            checksum: 0,
            source,
            destination,
        };
        let [s, ..] = V4::words(&source);
        let [d, ..] = V4::words(&destination);
        let words = [
            u32::from_ne_bytes([header.version_ihl, header.tos, 0, 0]),
            u32::from(header.total_length),
            u32::from(header.fragment),
            u32::from_ne_bytes([header.ttl, header.protocol, 0, 0]),
            s,
            d,
        ];
        header.checksum = !fold16(sum_words(&words));
        header
    }
}

impl Answer for V6 {
    type Network = Ipv6Header;
    const PORT_UNREACHABLE: (u8, u8) = (1, 4);
    const TOO_BIG: (u8, u8) = (2, 0);
    const TIME_EXCEEDED: (u8, u8) = (3, 0);

    #[inline(always)]
    fn header(source: F0<V6>, destination: F0<V6>, protocol: u8, length: u16) -> Ipv6Header {
        Ipv6Header {
            version_class_flow: 0x6000_0000_u32.to_be(),
            payload_length: length.to_be(),
            next_header: protocol,
            hop_limit: TTL,
            source,
            destination,
        }
    }
}

/// Returns the sum of the pseudo-header of an answer from `source` to `destination`.
#[inline(always)]
fn pseudo<F: Family>(source: &F0<F>, destination: &F0<F>, protocol: u8, length: u32) -> u64 {
    pseudo_header(&F::words(source), &F::words(destination), protocol, length)
}

/// Reports whether a transport checksum is partial: it equals the folded sum of the pseudo-header.
///
/// By chance, one full checksum in 65 536 does too.
#[inline(always)]
pub fn is_partial<F: Family>(headers: &Headers<F>) -> bool {
    let Tuple { source, destination, protocol, .. } = &headers.tuple;
    let length = headers.length.wrapping_sub(headers.transport.wrapping_sub(headers.network));
    headers.has_checksum
        && headers.checksum == fold16(pseudo::<F>(source, destination, *protocol, length))
}

/// Returns a segment's length in sequence space: its data, and one each for SYN and FIN.
#[inline(always)]
fn sequence_length<F: Answer>(headers: &Headers<F>, segment: &TcpHeader) -> u32 {
    let before_data = headers
        .transport
        .wrapping_sub(headers.network)
        .wrapping_add(u32::from(segment.offset >> 4).wrapping_mul(4));
    headers
        .length
        .wrapping_sub(before_data)
        .wrapping_add(u32::from(segment.flags & tcp::SYN != 0))
        .wrapping_add(u32::from(segment.flags & tcp::FIN != 0))
}

/// Returns the reset that answers a TCP segment (RFC 9293, 3.10.7.1).
#[inline(always)]
pub fn reset<F: Answer>(headers: &Headers<F>, segment: &TcpHeader) -> (F::Network, TcpHeader) {
    let to = headers.tuple.reversed();
    let mut header = TcpHeader {
        source: to.source_port.to_be(),
        destination: to.destination_port.to_be(),
        sequence: [0; 2],
        acknowledgment: [0; 2],
        offset: 5 << 4,
        flags: tcp::RST,
        window: 0,
        checksum: 0,
        urgent: 0,
    };
    if segment.flags & tcp::ACK != 0 {
        header.sequence = segment.acknowledgment;
    } else {
        let [high, low] = segment.sequence;
        let sequence = u32::from(u16::from_be(high)) << 16 | u32::from(u16::from_be(low));
        let acknowledgment = sequence.wrapping_add(sequence_length(headers, segment));
        header.flags = tcp::RST | tcp::ACK;
        header.acknowledgment =
            [((acknowledgment >> 16) as u16).to_be(), (acknowledgment as u16).to_be()];
    }
    let sum = pseudo::<F>(&to.source, &to.destination, protocol::TCP, 20);
    header.checksum = if is_partial(headers) {
        fold16(sum)
    } else {
        let [a, b] = header.sequence;
        let [c, d] = header.acknowledgment;
        let halves = u64::from(header.source)
            .wrapping_add(u64::from(header.destination))
            .wrapping_add(u64::from(a))
            .wrapping_add(u64::from(b))
            .wrapping_add(u64::from(c))
            .wrapping_add(u64::from(d))
            .wrapping_add(u64::from(u16::from_ne_bytes([header.offset, header.flags])));
        !fold16(sum.wrapping_add(halves))
    };
    (F::header(to.source, to.destination, protocol::TCP, 20), header)
}

/// The part of a packet that an ICMP error quotes.
#[derive(Clone, Copy, Debug)]
pub struct Quoted {
    /// Its length in bytes.
    pub length: u32,
    /// The one's complement sum of its bytes, in memory order.
    pub sum: u64,
}

/// Returns the ICMP error that answers a packet: network and ICMP header, to be followed by the
/// quote.
#[inline(always)]
pub fn error<F: Answer>(
    headers: &Headers<F>,
    (kind, code): (u8, u8),
    mtu: u32,
    quote: Quoted,
) -> (F::Network, IcmpHeader) {
    let to = headers.tuple.reversed();
    let length = quote.length.wrapping_add(8);
    let mut rest = mtu.to_be();
    let mut sum = quote
        .sum
        .wrapping_add(u64::from(u16::from_ne_bytes([kind, code])))
        .wrapping_add(u64::from(rest));
    if F::VERSION == 6 {
        let pseudo = pseudo::<F>(&to.source, &to.destination, F::ICMP, length);
        sum = sum.wrapping_add(pseudo);
        if mtu == 0 && is_partial(headers) {
            let [a, b] = fold16(pseudo).to_ne_bytes();
            rest = u32::from_ne_bytes([0, 0, a, b]);
            sum = sum.wrapping_add(u64::from(rest));
        }
    }
    let header = IcmpHeader { kind, code, checksum: !fold16(sum), rest };
    (F::header(to.source, to.destination, F::ICMP, length as u16), header)
}
