//! Frames: the first packet of a connection, or a datagram; and the fate of one in a program.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use sluice::tools::explain::{Endpoint, Question};
use sluice_core::model::object::Protocol;

const ETHERNET: usize = 14;
/// A return value of tc programs.
const NEXT: i32 = -1;
const DROP: i32 = 2;
const REDIRECT: i32 = 7;

/// The observed effect of a program on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// It goes on unchanged.
    Pass,
    Drop,
    /// It became a reset or an ICMP error.
    Reject,
    /// It goes to a backend, which sees the client's address or another one.
    Forward {
        backend: Endpoint,
        kept: bool,
    },
}

/// Returns the frame of a question, to a device with this hardware address. The mark, which no
/// translation changes, is the sequence number or the payload.
pub(crate) fn build(question: &Question, mac: [u8; 6], mark: u32) -> Vec<u8> {
    let (source, destination) = (question.source, question.destination);
    let tcp = question.protocol == Protocol::Tcp;
    let ports = [source.port(), destination.port()].map(u16::to_be_bytes).concat();
    let mut segment = ports;
    let checksum_at = if tcp {
        segment.extend(mark.to_be_bytes());
        // No acknowledgment, five words of header, SYN, a window, no urgent data.
        segment.extend([0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
        16
    } else {
        // Its length, and no checksum so far.
        segment.extend([0, 12, 0, 0]);
        segment.extend(mark.to_be_bytes());
        6
    };
    let addresses = [octets(source.ip()), octets(destination.ip())].concat();
    let number = question.protocol.number();
    let pseudo =
        [&addresses[..], &[0, number], &(segment.len() as u16).to_be_bytes(), &segment].concat();
    let sum = match checksum(&pseudo) {
        0 => 0xffff,
        sum => sum,
    };
    segment[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());

    let mut header = Vec::new();
    let ethertype: u16 = if source.is_ipv4() {
        header.extend([0x45, 0]);
        header.extend((20 + segment.len() as u16).to_be_bytes());
        // Neither identification nor fragments; 64 hops.
        header.extend([0, 0, 0x40, 0, 64, number, 0, 0]);
        header.extend(&addresses);
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        0x0800
    } else {
        header.extend([0x60, 0, 0, 0]);
        header.extend((segment.len() as u16).to_be_bytes());
        header.extend([number, 64]);
        header.extend(&addresses);
        0x86dd
    };
    let sender = [2, 0, 0, 0, 0, 1];
    [&mac[..], &sender, &ethertype.to_be_bytes(), &header, &segment].concat()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

/// Returns a frame's protocol, source and destination, and for TCP whether it is a reset.
pub(crate) fn tuple(frame: &[u8]) -> Option<(u8, SocketAddr, SocketAddr, bool)> {
    let packet = frame.get(ETHERNET..)?;
    let (protocol, source, destination, segment) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let address =
                |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
            (*packet.get(9)?, address(12)?, address(16)?, packet.get(20..)?)
        }
        [0x86, 0xdd] => {
            let address = |at: usize| {
                Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?))
            };
            (*packet.get(6)?, address(8)?, address(24)?, packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*segment.get(at)?, *segment.get(at + 1)?]));
    let reset = protocol == 6 && segment.get(13).is_some_and(|flags| flags & 0x04 != 0);
    Some((
        protocol,
        SocketAddr::new(source, port(0)?),
        SocketAddr::new(destination, port(2)?),
        reset,
    ))
}

/// Returns the mark of a frame that [`build`] made, wherever it is seen.
pub(crate) fn mark(frame: &[u8]) -> Option<u32> {
    let (protocol, ..) = tuple(frame)?;
    let segment = frame.get(ETHERNET + if frame.get(12)? == &0x08 { 20 } else { 40 }..)?;
    let at = if protocol == 6 { 4 } else { 8 };
    Some(u32::from_be_bytes(segment.get(at..at + 4)?.try_into().ok()?))
}

/// Returns protocol and client of the packet that a frame answers with a reset or an ICMP error.
pub(crate) fn refused(frame: &[u8]) -> Option<(u8, SocketAddr)> {
    let (protocol, _, destination, reset) = tuple(frame)?;
    if reset {
        return Some((protocol, destination));
    }
    let v4 = frame.get(12)? == &0x08;
    let icmp = ETHERNET + if v4 { 20 } else { 40 };
    if protocol != if v4 { 1 } else { 58 }
        || !matches!((v4, frame.get(icmp)?), (true, 3) | (false, 1))
    {
        return None;
    }
    // The quoted packet, behind the link header of the error itself.
    let quoted = [frame.get(..ETHERNET)?, frame.get(icmp + 8..)?].concat();
    let (protocol, client, ..) = tuple(&quoted)?;
    Some((protocol, client))
}

/// Returns the fate of a question's packet.
pub(crate) fn seen(question: &Question, action: i32, frame: &[u8]) -> Result<Seen> {
    if action == DROP {
        return Ok(Seen::Drop);
    }
    ensure!(action == NEXT || action == REDIRECT, "the program answers {action}");
    let (protocol, source, destination, reset) =
        tuple(frame).context("a frame that cannot be read")?;
    if reset || protocol != question.protocol.number() {
        return Ok(Seen::Reject);
    }
    if (source, destination) == (question.source, question.destination) {
        ensure!(action == NEXT, "a packet is sent elsewhere as it was");
        return Ok(Seen::Pass);
    }
    if destination == question.destination {
        bail!("a packet to {destination} comes from {source} instead of {}", question.source);
    }
    let backend = Endpoint { address: destination.ip(), port: destination.port() };
    Ok(Seen::Forward { backend, kept: source.ip() == question.source.ip() })
}
