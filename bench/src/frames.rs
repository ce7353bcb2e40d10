//! The packets that are sent through the programs.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use etherparse::{PacketBuilder, TcpOptionElement};

/// A TCP segment's flags.
#[derive(Clone, Copy)]
pub(crate) enum Segment {
    Syn,
    SynAck,
    Ack,
}

/// An end of a connection.
pub(crate) type End = (Ipv4Addr, u16);

/// Returns a frame for a device, long enough for the driver.
pub(crate) fn frame(
    to: [u8; 6],
    source: End,
    destination: End,
    segment: Segment,
) -> Result<Vec<u8>> {
    let packet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 9], to)
        .ipv4(source.0.octets(), destination.0.octets(), 64)
        .tcp(source.1, destination.1, 1000, 65_000);
    let packet = match segment {
        Segment::Syn => packet.syn().options(&[TcpOptionElement::MaximumSegmentSize(1460)])?,
        Segment::SynAck => {
            packet.syn().ack(1001).options(&[TcpOptionElement::MaximumSegmentSize(1460)])?
        }
        Segment::Ack => packet.ack(1001),
    };
    let payload = [0x5c; 64];
    let mut bytes = Vec::with_capacity(packet.size(payload.len()));
    packet.write(&mut bytes, &payload)?;
    Ok(bytes)
}

/// Returns source and destination of the segment in a frame.
pub(crate) fn ends(frame: &[u8]) -> Result<(End, End)> {
    let packet =
        etherparse::SlicedPacket::from_ethernet(frame).context("a program made no packet")?;
    let (Some(etherparse::NetSlice::Ipv4(ip)), Some(etherparse::TransportSlice::Tcp(tcp))) =
        (packet.net, packet.transport)
    else {
        anyhow::bail!("a program made no TCP segment")
    };
    let header = ip.header();
    ensure!(!ip.payload().fragmented, "a program made a fragment");
    Ok((
        (header.source_addr(), tcp.source_port()),
        (header.destination_addr(), tcp.destination_port()),
    ))
}
