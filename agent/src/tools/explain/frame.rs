//! Builds the bytes of a packet that is never sent.

use std::net::IpAddr;

use sluice_common::abi::{Device, Tuple, device_flags};
use sluice_common::packet::header::{protocol, sctp, tcp};
use sluice_core::image::Stack;

/// The properties of a packet besides its tuple.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shape {
    /// The length with the IP header. The default is a packet without payload.
    pub(super) length: Option<u16>,
    /// The TTL or hop limit. The default is 64.
    pub(super) ttl: Option<u8>,
}

/// Returns the length of the first packet of a connection, or of an empty datagram, with its IP
/// header.
pub(super) fn least_length<F: Stack>(protocol: u8) -> u16 {
    F::HEADER as u16 + transport(protocol, [0; 2], 0).len() as u16
}

/// Returns the transport header of the first packet of a connection, or of a datagram, in a segment
/// of `length` bytes.
fn transport(protocol: u8, [source, destination]: [u16; 2], length: u16) -> Vec<u8> {
    let mut header = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    match protocol {
        protocol::TCP => {
            header.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, tcp::SYN, 255, 255, 0, 0, 0, 0]);
        }
        protocol::UDP => header.extend([length.to_be_bytes(), [0; 2]].concat()),
        // A verification tag, a checksum, and a chunk of twenty bytes.
        _ => {
            header.extend([0; 8]);
            header.extend([sctp::INIT, 0, 0, 20]);
            header.extend([0; 16]);
        }
    }
    header
}

/// Returns the frame of a packet as a device receives it.
pub(super) fn frame<F: Stack>(
    tuple: &Tuple<F::Address>,
    shape: Shape,
    here: Option<&Device>,
) -> Vec<u8> {
    let least = least_length::<F>(tuple.protocol);
    let length = shape.length.unwrap_or(least).max(least);
    let payload = length.saturating_sub(F::HEADER as u16);
    let transport = transport(tuple.protocol, [tuple.source_port, tuple.destination_port], payload);
    let ttl = shape.ttl.unwrap_or(64);
    let mut bytes = Vec::new();
    if here.is_none_or(|here| here.link_header != 0) {
        // Addressed to the bridge, if the device is a port of one.
        let [_, a, b, c] =
            here.map_or(0, |here| here.flags >> device_flags::BRIDGE_MAC_SHIFT).to_be_bytes();
        bytes.extend([0, 0, 0, a, b, c, 0, 0, 0, 0, 0, 0]);
        bytes.extend(F::ETHERTYPE.to_be_bytes());
    }
    let start = bytes.len();
    match (F::ip(tuple.source), F::ip(tuple.destination)) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            // Don't Fragment is set, because the path MTU is to be discovered.
            let [high, low] = length.to_be_bytes();
            bytes.extend([0x45, 0, high, low, 0, 0, 0x40, 0, ttl, tuple.protocol, 0, 0]);
            bytes.extend(source.octets());
            bytes.extend(destination.octets());
        }
        (source, destination) => {
            let [high, low] = payload.to_be_bytes();
            bytes.extend([0x60, 0, 0, 0, high, low, tuple.protocol, ttl]);
            for address in [source, destination] {
                if let IpAddr::V6(address) = address {
                    bytes.extend(address.octets());
                }
            }
        }
    }
    bytes.extend(transport);
    bytes.resize(start + usize::from(length), 0);
    bytes
}
