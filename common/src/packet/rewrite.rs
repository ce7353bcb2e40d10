//! Turns a packet of one tuple into a packet of another, checksums included.

use crate::abi::{Flow, Tuple};
use crate::family::{Family, V4};
use crate::packet::checksum::Delta;
use crate::packet::header::{Wire, protocol};
use crate::packet::parse::{Fragment, Headers, Kind, Packet, Parse};

/// Write access to a packet. Every method returns whether it succeeded; after a failure the packet
/// is in an undefined state and must be dropped.
pub trait Edit {
    /// Stores a value at an offset.
    fn store<T: Wire>(&mut self, offset: u32, value: T) -> bool;
    /// As [`Edit::store`], for a change that no checksum within the packet makes up for: the sum
    /// over the whole packet that a device has given the kernel has to be updated.
    fn store_unbalanced<T: Wire>(&mut self, offset: u32, value: T) -> bool;
    /// Updates the IPv4 header checksum at an offset.
    fn network_checksum(&mut self, offset: u32, delta: Delta) -> bool;
    /// Updates a transport or ICMP checksum at an offset. `addresses` is the change of the
    /// pseudo-header, `data` the change of the segment; partial checksums cover only the former.
    fn transport_checksum(
        &mut self,
        offset: u32,
        addresses: Delta,
        data: Delta,
        kind: Checksum,
    ) -> bool;
    /// Updates SCTP's checksum at an offset, in a packet of `length` bytes from the SCTP header on.
    /// `change` is what was added (XOR) to its ports, in memory order. See
    /// [`crate::packet::crc32c::updated`].
    fn sctp_checksum(&mut self, offset: u32, change: u32, length: u32) -> bool;
}

/// Changes of a packet's length, and copies of its parts.
pub trait Resize: Packet + Edit {
    /// Room for the packet that an ICMP error quotes.
    type Quote;

    /// Makes room before the packet.
    fn grow_head(&mut self, bytes: u32) -> bool;
    /// Sets the packet's length, link header included.
    fn set_length(&mut self, bytes: u32) -> bool;
    /// Returns room for a quote.
    fn room_for_quote() -> Self::Quote;
    /// Copies bytes of the packet, at most [`QUOTE`](crate::packet::answer::QUOTE), and returns
    /// their one's complement sum in memory order.
    fn quote(&self, offset: u32, length: u32, into: &mut Self::Quote) -> Option<u64>;
    /// Stores `length` bytes of the copy.
    fn store_quote(&mut self, offset: u32, length: u32, quote: &Self::Quote) -> bool;
}

/// The rules by which a transport checksum is updated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// TCP and ICMP: always present.
    Plain,
    /// UDP: zero means none.
    Udp,
}

/// Returns the offset of the checksum in TCP's or UDP's header.
#[inline(always)]
pub fn checksum_offset(protocol: u8) -> u32 {
    if protocol == protocol::UDP { 6 } else { 16 }
}

/// Offset of the checksum in an IPv4 header.
const NETWORK_CHECKSUM: u32 = 10;
/// Offset of the checksum in SCTP's header.
const SCTP_CHECKSUM: u32 = 8;

/// Returns the change from two addresses to two others.
#[inline(always)]
fn addresses_delta<F: Family>(old: &[F::Address; 2], new: &[F::Address; 2]) -> Delta {
    let mut delta = Delta::ZERO;
    for (old, new) in old.iter().zip(new) {
        if old == new {
            continue;
        }
        // IPv4 has one word; the other three are zero in both and add nothing.
        let words = if F::VERSION == V4::VERSION { 1 } else { 4 };
        for (old, new) in F::words(old).iter().zip(&F::words(new)).take(words) {
            delta = delta.word(*old, *new);
        }
    }
    delta
}

/// Returns the change from two ports (host order) to two others.
#[inline(always)]
fn ports_delta(old: [u16; 2], new: [u16; 2]) -> Delta {
    let ([a, b], [c, d]) = (old, new);
    let mut delta = Delta::ZERO;
    if a != c {
        delta = delta.half(a.to_be(), c.to_be());
    }
    if b != d {
        delta = delta.half(b.to_be(), d.to_be());
    }
    delta
}

/// Rewrites the packet that `headers` describes so that its tuple becomes the flow's.
///
/// In an ICMP error the quoted packet is rewritten (its tuple is the flow's reversed), and so are
/// the error's own addresses if they are ends of the connection; a router on the way keeps its
/// address.
#[inline(always)]
pub fn rewrite<F: Parse, E: Edit>(
    edit: &mut E,
    headers: &Headers<F>,
    flow: &Flow<F::Address>,
) -> bool {
    if headers.kind == Kind::IcmpError {
        error(edit, headers, flow)
    } else {
        segment(edit, headers, flow)
    }
}

/// Reports whether every part of the packet's datagram can be rewritten to the flow. The exceptions
/// are three kinds of fragments:
///
/// - SCTP whose ports change: the effect on the checksum depends on the length of the whole
///   datagram, which the first fragment does not show. SCTP divides its messages itself and
///   discovers the path's MTU, so these are rare.
/// - IPv6 with extension headers after the fragment header: the other fragments do not show the
///   transport protocol.
/// - ICMP errors: the other fragments do not show which flow it is about. Errors are short, so
///   these are rarer still.
#[inline(always)]
pub fn can_follow<F: Family>(headers: &Headers<F>, flow: &Flow<F::Address>) -> bool {
    let tuple = &headers.tuple;
    let keeps_ports =
        tuple.source_port == flow.source_port && tuple.destination_port == flow.destination_port;
    headers.fragment == Fragment::Whole
        || headers.datagram_protocol == tuple.protocol
            && (tuple.protocol != protocol::SCTP || keeps_ports)
}

/// As [`rewrite`], for a TCP, UDP or SCTP packet or a fragment.
///
/// A first fragment's checksum is the whole datagram's and changes like a whole packet's. Of a
/// later fragment only the addresses are rewritten. Returns false if not even the first fragment
/// [can follow](can_follow).
#[inline(always)]
pub fn segment<F: Parse, E: Edit>(
    edit: &mut E,
    headers: &Headers<F>,
    flow: &Flow<F::Address>,
) -> bool {
    let tuple = &headers.tuple;
    let (old, new) = ([tuple.source, tuple.destination], [flow.source, flow.destination]);
    let old_ports = [tuple.source_port, tuple.destination_port];
    let new_ports = [flow.source_port, flow.destination_port];
    let addresses = addresses_delta::<F>(&old, &new);
    let is_later = headers.fragment == Fragment::Later;
    // Whether a checksum in this packet makes up for changed ports, and for changed addresses
    // beyond IPv4's own checksum.
    let is_balanced = !is_later && tuple.protocol != protocol::SCTP;
    if is_balanced {
        let ports = ports_delta(old_ports, new_ports);
        let kind = if tuple.protocol == protocol::UDP { Checksum::Udp } else { Checksum::Plain };
        let checksum = headers.transport.wrapping_add(checksum_offset(tuple.protocol));
        // The checksum comes first: for UDP, whether there is one is read from the packet.
        if !edit.transport_checksum(checksum, addresses, ports, kind) {
            return false;
        }
    }
    if old != new {
        let place = headers.network.wrapping_add(F::SOURCE);
        if F::VERSION == V4::VERSION {
            let checksum = headers.network.wrapping_add(NETWORK_CHECKSUM);
            if !edit.network_checksum(checksum, addresses) || !edit.store(place, new) {
                return false;
            }
        } else if is_balanced {
            if !edit.store(place, new) {
                return false;
            }
        } else if !edit.store_unbalanced(place, new) {
            return false;
        }
    }
    if is_later || old_ports == new_ports {
        return true;
    }
    let ports = new_ports.map(u16::to_be);
    if is_balanced {
        edit.store(headers.transport, ports)
    } else {
        sctp_checksum(edit, headers, old_ports, new_ports)
            && edit.store_unbalanced(headers.transport, ports)
    }
}

/// Updates an SCTP packet's checksum; returns false for a fragment.
#[inline(always)]
fn sctp_checksum<F: Parse, E: Edit>(
    edit: &mut E,
    headers: &Headers<F>,
    old: [u16; 2],
    new: [u16; 2],
) -> bool {
    if headers.fragment != Fragment::Whole {
        return false;
    }
    let length = headers.length.wrapping_sub(headers.transport.wrapping_sub(headers.network));
    let change = ports_word(old) ^ ports_word(new);
    edit.sctp_checksum(headers.transport.wrapping_add(SCTP_CHECKSUM), change, length)
}

/// Returns two ports (host order) as one word in memory order.
#[inline(always)]
fn ports_word([source, destination]: [u16; 2]) -> u32 {
    (u32::from(source) << 16 | u32::from(destination)).to_be()
}

#[inline(always)]
fn error<F: Parse, E: Edit>(edit: &mut E, headers: &Headers<F>, flow: &Flow<F::Address>) -> bool {
    let tuple = &headers.tuple;
    // The quoted packet went the other way.
    let quoted: Tuple<F::Address> = tuple.reversed();
    let new_addresses = [flow.destination, flow.source];
    let new_ports = [flow.destination_port, flow.source_port];
    let addresses = addresses_delta::<F>(&[quoted.source, quoted.destination], &new_addresses);
    let ports = ports_delta([quoted.source_port, quoted.destination_port], new_ports);
    let mut data = addresses.and(ports);

    if F::VERSION == V4::VERSION && !addresses.is_zero() {
        let new = addresses.apply(headers.quoted_checksum);
        data = data.half(headers.quoted_checksum, new);
        if !edit.store(headers.quoted_network.wrapping_add(NETWORK_CHECKSUM), new) {
            return false;
        }
    }
    if headers.has_checksum {
        let delta = addresses.and(ports);
        let new = if tuple.protocol == protocol::UDP {
            delta.apply_udp(headers.checksum)
        } else {
            delta.apply(headers.checksum)
        };
        data = data.half(headers.checksum, new);
        let offset = headers.quoted_transport.wrapping_add(checksum_offset(tuple.protocol));
        if !edit.store(offset, new) {
            return false;
        }
    }
    if !edit.store(headers.quoted_network.wrapping_add(F::SOURCE), new_addresses) {
        return false;
    }
    let [source, destination] = new_ports;
    if !edit.store(headers.quoted_transport, [source.to_be(), destination.to_be()]) {
        return false;
    }

    let [outer_source, _] = headers.outer;
    let outer =
        [if outer_source == tuple.source { flow.source } else { outer_source }, flow.destination];
    let outer_delta = addresses_delta::<F>(&headers.outer, &outer);
    if F::VERSION == V4::VERSION
        && !edit.network_checksum(headers.network.wrapping_add(NETWORK_CHECKSUM), outer_delta)
    {
        return false;
    }
    if !edit.store(headers.network.wrapping_add(F::SOURCE), outer) {
        return false;
    }
    // ICMPv6 has a pseudo-header, ICMP has none.
    let pseudo = if F::VERSION == V4::VERSION { Delta::ZERO } else { outer_delta };
    edit.transport_checksum(headers.transport.wrapping_add(2), pseudo, data, Checksum::Plain)
}

/// Decrements the TTL or hop limit. Returns false if it must not, because it would reach zero, or
/// if the edit failed.
#[inline(always)]
pub fn decrement_ttl<F: Parse, E: Edit>(edit: &mut E, headers: &Headers<F>) -> bool {
    if headers.ttl <= 1 {
        return false;
    }
    let ttl = headers.ttl.wrapping_sub(1);
    if F::VERSION == V4::VERSION {
        let delta =
            Delta::ZERO.half(u16::from_ne_bytes([headers.ttl, 0]), u16::from_ne_bytes([ttl, 0]));
        edit.network_checksum(headers.network.wrapping_add(NETWORK_CHECKSUM), delta)
            && edit.store(headers.network.wrapping_add(8), [ttl])
    } else {
        edit.store(headers.network.wrapping_add(7), [ttl])
    }
}
