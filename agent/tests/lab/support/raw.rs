//! Frames that no socket would send, with any source, flags and numbers, of both families.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use sluice_lab::{Namespace, Node, Pod};

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// A link-layer address.
pub(crate) type Mac = [u8; 6];

/// A frame without options or extension headers, TCP or UDP.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    /// Destination and source.
    pub(crate) link: [Mac; 2],
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    /// TCP's flags, or `None` for UDP.
    pub(crate) flags: Option<u8>,
    pub(crate) sequence: u32,
    pub(crate) acknowledgment: u32,
}

fn folded(bytes: &[u8]) -> u16 {
    let mut sum = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or_default());
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

impl Frame {
    /// Returns the frame's bytes, with correct checksums.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let [to, from] = self.link;
        let protocol: u8 = if self.flags.is_some() { 6 } else { 17 };
        let ports = [self.source.port(), self.destination.port()];
        let mut transport = ports.map(u16::to_be_bytes).concat();
        let at = if let Some(flags) = self.flags {
            transport.extend(self.sequence.to_be_bytes());
            transport.extend(self.acknowledgment.to_be_bytes());
            transport.extend([0x50, flags, 0xfa, 0, 0, 0, 0, 0]);
            16
        } else {
            transport.extend([0, 16, 0, 0]);
            transport.extend(b"question");
            6
        };
        let addresses = [octets(self.source.ip()), octets(self.destination.ip())].concat();
        let length = transport.len() as u16;
        let pseudo = [&addresses[..], &[0, protocol], &length.to_be_bytes(), &transport].concat();
        transport[at..at + 2].copy_from_slice(&folded(&pseudo).to_be_bytes());
        let (ethertype, network) = if self.source.is_ipv4() {
            let mut header = vec![0x45, 0];
            header.extend((20 + length).to_be_bytes());
            header.extend([0, 0, 0x40, 0, 60, protocol, 0, 0]);
            header.extend(&addresses);
            let sum = folded(&header).to_be_bytes();
            header[10..12].copy_from_slice(&sum);
            ([8, 0], header)
        } else {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(length.to_be_bytes());
            header.extend([protocol, 60]);
            header.extend(&addresses);
            ([0x86, 0xdd], header)
        };
        [&to[..], &from, &ethertype, &network, &transport].concat()
    }
}

/// The fields of a TCP segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) sequence: u32,
    pub(crate) acknowledgment: u32,
    /// Length of the data in bytes.
    pub(crate) length: u32,
}

/// Parses a frame as a TCP segment, if it is one without IP options.
pub(crate) fn segment(frame: &[u8]) -> Option<Segment> {
    let ip = frame.get(14..)?;
    let (addresses, at, total) = match (frame.get(12..14)?, ip.first()? >> 4) {
        ([8, 0], 4) if *ip.get(9)? == 6 => {
            let address =
                |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
            (
                [address(12)?, address(16)?],
                20,
                u32::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?])),
            )
        }
        ([0x86, 0xdd], 6) if *ip.get(6)? == 6 => {
            let address =
                |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
            let length = u32::from(u16::from_be_bytes([*ip.get(4)?, *ip.get(5)?]));
            ([address(8)?, address(24)?], 40, length + 40)
        }
        _ => return None,
    };
    let tcp = ip.get(at..)?;
    let half = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_be_bytes(tcp.get(at..at + 4)?.try_into().ok()?));
    let header = u32::from(*tcp.get(12)? >> 4) * 4;
    let [source, destination] = addresses;
    Some(Segment {
        source: SocketAddr::new(source, half(0)?),
        destination: SocketAddr::new(destination, half(2)?),
        sequence: word(4)?,
        acknowledgment: word(8)?,
        length: total.saturating_sub(at as u32 + header),
    })
}

/// Returns the link-layer addresses of a frame from a pod to its node, by the pod's `eth0`.
pub(crate) fn to_node(pod: &Pod, node: &Node) -> Result<[Mac; 2]> {
    Ok([node.link_address(pod.host_device())?, pod.link_address("eth0")?])
}

/// Returns the link-layer addresses of a frame from outside to a node, by its uplink.
pub(crate) fn to_uplink(node: &Node, router: &Namespace) -> Result<[Mac; 2]> {
    Ok([node.link_address(node.uplink())?, router.link_address(node.uplink_peer())?])
}
