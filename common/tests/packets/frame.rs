//! Builds frames from their fields. Checksums are computed over the whole segment.

use std::net::{IpAddr, SocketAddr};

/// The sequence number of segments.
pub(crate) const SEQUENCE: u32 = 0x0102_fffe;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SCTP: u8 = 132;

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;

/// SCTP's chunk types.
pub(crate) const DATA: u8 = 0;
pub(crate) const INIT: u8 = 1;
pub(crate) const INIT_ACK: u8 = 2;
pub(crate) const ABORT: u8 = 6;
pub(crate) const SHUTDOWN: u8 = 7;
pub(crate) const SHUTDOWN_ACK: u8 = 8;
pub(crate) const COOKIE_ECHO: u8 = 10;
pub(crate) const COOKIE_ACK: u8 = 11;
pub(crate) const SHUTDOWN_COMPLETE: u8 = 14;

/// A link-layer address.
pub(crate) type Mac = [u8; 6];

/// The content of a transport checksum field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sum {
    /// The checksum.
    Full,
    /// Zero.
    Absent,
    /// The pseudo-header's sum, or zero for SCTP: the device is to complete it.
    Partial,
}

/// The Ethernet header.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) destination: Mac,
    pub(crate) source: Mac,
    /// Tag protocol and tag control, outermost first.
    pub(crate) tags: Vec<(u16, u16)>,
}

/// The payload of the IP header.
#[derive(Clone, Debug)]
pub(crate) enum Payload {
    Tcp {
        ports: [u16; 2],
        sequence: u32,
        acknowledgment: u32,
        flags: u8,
        window: u16,
        data: Vec<u8>,
        sum: Sum,
    },
    Udp {
        ports: [u16; 2],
        data: Vec<u8>,
        sum: Sum,
    },
    Sctp {
        ports: [u16; 2],
        tag: u32,
        chunks: Vec<u8>,
        sum: Sum,
    },
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
        quote: Vec<u8>,
    },
    Other {
        protocol: u8,
        bytes: Vec<u8>,
    },
}

/// The origin of a patch's offset.
#[derive(Clone, Copy, Debug)]
pub(crate) enum From {
    Network,
    Transport,
}

/// A frame, described by its fields.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) link: Option<Link>,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) ttl: u8,
    pub(crate) class: u8,
    pub(crate) id: u16,
    /// IPv4's flags and offset.
    pub(crate) fragment: u16,
    /// IPv4's options.
    pub(crate) options: Vec<u8>,
    /// IPv6's extension headers: number, and bytes of which the first is filled in later.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    pub(crate) payload: Payload,
    /// Bytes after the IP packet.
    pub(crate) padding: Vec<u8>,
    /// Bytes written over the finished frame.
    pub(crate) patches: Vec<(From, usize, Vec<u8>)>,
}

/// Returns the folded sum of bytes as big-endian halves.
fn sum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Computes CRC32c, a bit at a time.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0x82f6_3b78 };
        }
    }
    !crc
}

/// An address's bytes.
pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

impl Frame {
    fn new(source: IpAddr, destination: IpAddr, payload: Payload) -> Self {
        Self {
            link: Some(Link {
                destination: [2, 0, 0, 0, 0, 0xd],
                source: [2, 0, 0, 0, 0, 0x5],
                tags: Vec::new(),
            }),
            source,
            destination,
            ttl: 61,
            class: 0,
            id: 0x1234,
            fragment: 0x4000,
            options: Vec::new(),
            extensions: Vec::new(),
            payload,
            padding: Vec::new(),
            patches: Vec::new(),
        }
    }

    /// Returns a TCP segment with flags.
    pub(crate) fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8, data: &[u8]) -> Self {
        let payload = Payload::Tcp {
            ports: [source.port(), destination.port()],
            sequence: SEQUENCE,
            acknowledgment: if flags & ACK == 0 { 0 } else { 0x7172_7374 },
            flags,
            window: 0xfa00,
            data: data.to_vec(),
            sum: Sum::Full,
        };
        Self::new(source.ip(), destination.ip(), payload)
    }

    /// Sets another acknowledgment number.
    pub(crate) fn acknowledging(mut self, number: u32) -> Self {
        if let Payload::Tcp { acknowledgment, .. } = &mut self.payload {
            *acknowledgment = number;
        }
        self
    }

    /// Returns a UDP datagram.
    pub(crate) fn udp(source: SocketAddr, destination: SocketAddr, data: &[u8]) -> Self {
        let ports = [source.port(), destination.port()];
        Self::new(
            source.ip(),
            destination.ip(),
            Payload::Udp { ports, data: data.to_vec(), sum: Sum::Full },
        )
    }

    /// Returns an SCTP packet with a chunk of a type and flags.
    pub(crate) fn sctp(
        source: SocketAddr,
        destination: SocketAddr,
        chunk: (u8, u8),
        data: &[u8],
    ) -> Self {
        let ports = [source.port(), destination.port()];
        let tag = if chunk.0 == INIT { 0 } else { 0x5152_5354 };
        Self::new(
            source.ip(),
            destination.ip(),
            Payload::Sctp { ports, tag, chunks: Vec::new(), sum: Sum::Full },
        )
        .chunk(chunk, data)
    }

    /// Adds one more SCTP chunk, padded to words.
    pub(crate) fn chunk(mut self, (kind, flags): (u8, u8), data: &[u8]) -> Self {
        if let Payload::Sctp { chunks, .. } = &mut self.payload {
            chunks.extend([kind, flags]);
            chunks.extend((4 + data.len() as u16).to_be_bytes());
            chunks.extend(data);
            chunks.resize(chunks.len().next_multiple_of(4), 0);
        }
        self
    }

    /// Returns an ICMP message that quotes bytes.
    pub(crate) fn icmp(
        source: IpAddr,
        destination: IpAddr,
        (kind, code): (u8, u8),
        rest: u32,
        quote: &[u8],
    ) -> Self {
        let payload = Payload::Icmp { kind, code, rest: rest.to_be_bytes(), quote: quote.to_vec() };
        Self::new(source, destination, payload)
    }

    /// Returns a packet of another protocol.
    pub(crate) fn other(source: IpAddr, destination: IpAddr, protocol: u8, bytes: &[u8]) -> Self {
        Self::new(source, destination, Payload::Other { protocol, bytes: bytes.to_vec() })
    }

    /// Sets another source address and port.
    pub(crate) fn from(mut self, end: SocketAddr) -> Self {
        self.source = end.ip();
        if let Some(ports) = self.ports() {
            ports[0] = end.port();
        }
        self
    }

    /// Sets another destination address and port.
    pub(crate) fn to(mut self, end: SocketAddr) -> Self {
        self.destination = end.ip();
        if let Some(ports) = self.ports() {
            ports[1] = end.port();
        }
        self
    }

    fn ports(&mut self) -> Option<&mut [u16; 2]> {
        match &mut self.payload {
            Payload::Tcp { ports, .. }
            | Payload::Udp { ports, .. }
            | Payload::Sctp { ports, .. } => Some(ports),
            Payload::Icmp { .. } | Payload::Other { .. } => None,
        }
    }

    /// Returns the datagram in fragments of `size` bytes, the last one shorter. IPv4's have the
    /// lower half of the identification.
    ///
    /// IPv6's extension headers so far are repeated in each fragment.
    pub(crate) fn fragments(&self, id: u32, size: usize) -> Vec<Self> {
        assert!(size.is_multiple_of(8), "fragments count in eight bytes");
        assert!(self.patches.is_empty() && self.padding.is_empty(), "patch the fragments");
        let segment = self.segment();
        let protocol = self.protocol();
        let fragment = |(index, bytes): (usize, &[u8])| {
            let start = index * size;
            let more = start + bytes.len() < segment.len();
            self.part(id, start, more, protocol, bytes)
        };
        segment.chunks(size).enumerate().map(fragment).collect()
    }

    /// Returns a fragment with these bytes after its own header, and the addresses of this frame.
    pub(crate) fn part(
        &self,
        id: u32,
        start: usize,
        more: bool,
        protocol: u8,
        bytes: &[u8],
    ) -> Self {
        assert!(start.is_multiple_of(8), "offsets count in eight bytes");
        let payload = Payload::Other { protocol, bytes: bytes.to_vec() };
        let frame = Self { payload, ..self.clone() };
        if self.source.is_ipv4() {
            return Self {
                id: id as u16,
                fragment: (start / 8) as u16 | u16::from(more) << 13,
                ..frame
            };
        }
        let offset = (start as u16 | u16::from(more)).to_be_bytes();
        frame.extension(44, &[&[0, 0], &offset[..], &id.to_be_bytes()].concat())
    }

    /// Sets another checksum field.
    pub(crate) fn sum(mut self, new: Sum) -> Self {
        if let Payload::Tcp { sum, .. } | Payload::Udp { sum, .. } | Payload::Sctp { sum, .. } =
            &mut self.payload
        {
            *sum = new;
        }
        self
    }

    /// Sets another TTL or hop limit.
    pub(crate) fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// Removes the link header.
    pub(crate) fn l3(mut self) -> Self {
        self.link = None;
        self
    }

    /// Adds a VLAN tag inside those it has.
    pub(crate) fn tag(mut self, protocol: u16, control: u16) -> Self {
        self.link.as_mut().expect("a link header").tags.push((protocol, control));
        self
    }

    /// Addresses the frame to another device.
    pub(crate) fn at(mut self, destination: Mac) -> Self {
        self.link.as_mut().expect("a link header").destination = destination;
        self
    }

    /// Exchanges the Ethernet addresses.
    pub(crate) fn turned(mut self) -> Self {
        if let Some(link) = &mut self.link {
            std::mem::swap(&mut link.source, &mut link.destination);
        }
        self
    }

    /// Adds IPv4 options.
    pub(crate) fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// Adds an IPv6 extension header after those it has; its first byte is filled in.
    pub(crate) fn extension(mut self, number: u8, bytes: &[u8]) -> Self {
        self.extensions.push((number, bytes.to_vec()));
        self
    }

    /// Writes bytes over the finished frame.
    pub(crate) fn patch(mut self, from: From, offset: usize, bytes: &[u8]) -> Self {
        self.patches.push((from, offset, bytes.to_vec()));
        self
    }

    /// Adds bytes after the packet.
    pub(crate) fn padded(mut self, bytes: usize) -> Self {
        self.padding = vec![0xee; bytes];
        self
    }

    /// Returns the IP packet's length according to its header.
    pub(crate) fn length(&self) -> u32 {
        (self.network_header() + self.segment().len()) as u32
    }

    /// Returns the offset of the IP header.
    pub(crate) fn network(&self) -> usize {
        self.link.as_ref().map_or(0, |link| 14 + 4 * link.tags.len())
    }

    fn network_header(&self) -> usize {
        match self.source {
            IpAddr::V4(_) => 20 + self.options.len(),
            IpAddr::V6(_) => {
                40 + self.extensions.iter().map(|(_, bytes)| bytes.len()).sum::<usize>()
            }
        }
    }

    fn protocol(&self) -> u8 {
        match &self.payload {
            Payload::Tcp { .. } => TCP,
            Payload::Udp { .. } => UDP,
            Payload::Sctp { .. } => SCTP,
            Payload::Icmp { .. } if self.source.is_ipv4() => 1,
            Payload::Icmp { .. } => 58,
            Payload::Other { protocol, .. } => *protocol,
        }
    }

    fn pseudo(&self, protocol: u8, length: usize) -> Vec<u8> {
        [
            octets(self.source),
            octets(self.destination),
            vec![0, protocol],
            (length as u32).to_be_bytes().to_vec(),
        ]
        .concat()
    }

    fn segment(&self) -> Vec<u8> {
        let (mut bytes, at, kind) = match &self.payload {
            Payload::Tcp { ports, sequence, acknowledgment, flags, window, data, sum } => {
                let mut bytes = [ports[0].to_be_bytes(), ports[1].to_be_bytes()].concat();
                bytes.extend(sequence.to_be_bytes());
                bytes.extend(acknowledgment.to_be_bytes());
                bytes.extend([5 << 4, *flags]);
                bytes.extend(window.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend(data);
                (bytes, 16, *sum)
            }
            Payload::Udp { ports, data, sum } => {
                let length = 8 + data.len() as u16;
                let mut bytes =
                    [ports[0].to_be_bytes(), ports[1].to_be_bytes(), length.to_be_bytes(), [0; 2]]
                        .concat();
                bytes.extend(data);
                (bytes, 6, *sum)
            }
            Payload::Sctp { ports, tag, chunks, sum } => {
                let mut bytes = [ports[0].to_be_bytes(), ports[1].to_be_bytes()].concat();
                bytes.extend(tag.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend(chunks);
                if *sum == Sum::Full {
                    let checksum = crc32c(&bytes).to_le_bytes();
                    bytes[8..12].copy_from_slice(&checksum);
                }
                return bytes;
            }
            Payload::Icmp { kind, code, rest, quote } => {
                let mut bytes = vec![*kind, *code, 0, 0];
                bytes.extend(rest);
                bytes.extend(quote);
                (bytes, 2, Sum::Full)
            }
            Payload::Other { bytes, .. } => return bytes.clone(),
        };
        let protocol = self.protocol();
        // ICMP alone has no pseudo-header.
        let pseudo = if protocol == 1 { Vec::new() } else { self.pseudo(protocol, bytes.len()) };
        let field = match kind {
            Sum::Absent => 0,
            Sum::Partial => sum(&[&pseudo]),
            Sum::Full => match !sum(&[&pseudo, &bytes]) {
                0 if protocol == UDP => 0xffff,
                sum => sum,
            },
        };
        bytes[at..at + 2].copy_from_slice(&field.to_be_bytes());
        bytes
    }

    /// Returns what follows the IP header and its extensions.
    pub(crate) fn payload_bytes(&self) -> Vec<u8> {
        self.segment()
    }

    /// Returns the IP packet alone.
    pub(crate) fn packet(&self) -> Vec<u8> {
        let segment = self.segment();
        let mut bytes = Vec::new();
        match self.source {
            IpAddr::V4(_) => {
                assert!(self.options.len().is_multiple_of(4), "options fill words");
                bytes.extend([0x40 | (5 + self.options.len() / 4) as u8, self.class]);
                bytes.extend((self.length() as u16).to_be_bytes());
                bytes.extend(self.id.to_be_bytes());
                bytes.extend(self.fragment.to_be_bytes());
                bytes.extend([self.ttl, self.protocol(), 0, 0]);
                bytes.extend(octets(self.source));
                bytes.extend(octets(self.destination));
                bytes.extend(&self.options);
                let checksum = !sum(&[&bytes]);
                bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
            }
            IpAddr::V6(_) => {
                let mut next: Vec<u8> = self.extensions.iter().map(|(number, _)| *number).collect();
                next.push(self.protocol());
                bytes.extend([0x60 | self.class >> 4, self.class << 4, 0, 0]);
                bytes.extend((self.length() as u16 - 40).to_be_bytes());
                bytes.extend([next[0], self.ttl]);
                bytes.extend(octets(self.source));
                bytes.extend(octets(self.destination));
                for ((_, extension), next) in self.extensions.iter().zip(&next[1..]) {
                    bytes.push(*next);
                    bytes.extend(&extension[1..]);
                }
            }
        }
        bytes.extend(segment);
        for (from, offset, patch) in &self.patches {
            let at = offset + if matches!(from, From::Network) { 0 } else { self.network_header() };
            bytes[at..at + patch.len()].copy_from_slice(patch);
        }
        bytes
    }

    /// Returns the frame's bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let ethertype: u16 = if self.source.is_ipv4() { 0x0800 } else { 0x86dd };
        if let Some(link) = &self.link {
            bytes.extend(link.destination);
            bytes.extend(link.source);
            for (protocol, control) in &link.tags {
                bytes.extend(protocol.to_be_bytes());
                bytes.extend(control.to_be_bytes());
            }
            bytes.extend(ethertype.to_be_bytes());
        }
        bytes.extend(self.packet());
        bytes.extend(&self.padding);
        bytes
    }
}
