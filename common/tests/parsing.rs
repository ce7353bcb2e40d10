//! The parser's findings in a packet: SCTP's chunks, and fragments of datagrams.

#[allow(dead_code, reason = "each test uses its part of what packets are made of")]
mod packets {
    pub(crate) mod frame;
    pub(crate) mod ip;
}

use std::net::{IpAddr, SocketAddr};

use packets::frame::{
    ABORT, ACK, COOKIE_ACK, COOKIE_ECHO, DATA, FIN, Frame, From, INIT, INIT_ACK, RST, SCTP,
    SHUTDOWN, SHUTDOWN_ACK, SHUTDOWN_COMPLETE, SYN, TCP, UDP,
};
use packets::ip::Ip;
use sluice_common::abi::{Datagram, Flow, Tuple};
use sluice_common::packet::bytes::Bytes;
use sluice_common::packet::parse::{Fragment, Headers, Kind, headers};
use sluice_common::packet::rewrite::can_follow;
use sluice_common::path::fragment;
use sluice_common::{V4, V6};

const ID: u32 = 0x1122_3344;

fn ends() -> [[SocketAddr; 2]; 2] {
    [["192.0.2.7:40000", "10.96.0.10:80"], ["[2001:db8::7]:40000", "[fd00::10]:80"]]
        .map(|pair| pair.map(|end| end.parse().expect("an address and a port")))
}

/// A frame's headers, in either family.
#[derive(Debug)]
enum Read {
    V4(Headers<V4>),
    V6(Headers<V6>),
}

/// The headers' fields that the tests compare.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    kind: Kind,
    fragment: Fragment,
    source: IpAddr,
    destination: IpAddr,
    ports: [u16; 2],
    protocol: u8,
    flags: u8,
}

impl Read {
    fn told(&self) -> Told {
        fn told<F: Ip>(headers: &Headers<F>) -> Told {
            let Tuple { source, destination, source_port, destination_port, protocol, .. } =
                headers.tuple;
            Told {
                kind: headers.kind,
                fragment: headers.fragment,
                source: F::ip(source),
                destination: F::ip(destination),
                ports: [source_port, destination_port],
                protocol,
                flags: headers.tcp_flags,
            }
        }
        match self {
            Self::V4(headers) => told(headers),
            Self::V6(headers) => told(headers),
        }
    }

    /// Source, destination, identification and protocol of the datagram.
    fn datagram(&self) -> (IpAddr, IpAddr, u32, u8) {
        fn datagram<F: Ip>(headers: &Headers<F>) -> (IpAddr, IpAddr, u32, u8) {
            let Datagram { source, destination, id, protocol, reserved } = fragment::key(headers);
            assert_eq!(reserved, [0; 3]);
            (F::ip(source), F::ip(destination), id, protocol)
        }
        match self {
            Self::V4(headers) => datagram(headers),
            Self::V6(headers) => datagram(headers),
        }
    }

    /// Whether its datagram can get another destination port, or only another address.
    fn follows(&self, port: bool) -> bool {
        fn follows<F: Ip>(headers: &Headers<F>, port: bool) -> bool {
            let Tuple { source, source_port, destination_port, .. } = headers.tuple;
            let destination_port = if port { !destination_port } else { destination_port };
            can_follow(headers, &Flow { source, source_port, destination_port, ..Flow::default() })
        }
        match self {
            Self::V4(headers) => follows(headers, port),
            Self::V6(headers) => follows(headers, port),
        }
    }
}

fn read(frame: &Frame) -> Read {
    let packet = Bytes { bytes: frame.clone().l3().bytes(), partial: false };
    if frame.source.is_ipv4() {
        Read::V4(headers(&packet, 0).expect("a network header"))
    } else {
        Read::V6(headers(&packet, 0).expect("a network header"))
    }
}

fn kind(frame: &Frame) -> Kind {
    read(frame).told().kind
}

/// A datagram of each protocol.
fn datagrams([client, frontend]: [SocketAddr; 2]) -> [(u8, Frame); 3] {
    let data: Vec<u8> = (0..=255).collect();
    [
        (TCP, Frame::tcp(client, frontend, ACK, &data)),
        (UDP, Frame::udp(client, frontend, &data)),
        (SCTP, Frame::sctp(client, frontend, (DATA, 3), &data)),
    ]
}

#[test]
fn the_first_chunk_of_an_sctp_packet_tells_its_flags() {
    for [client, frontend] in ends() {
        for (chunk, flags) in [
            ((INIT, 0), SYN),
            ((INIT_ACK, 0), SYN | ACK),
            ((COOKIE_ECHO, 0), ACK),
            ((COOKIE_ACK, 0), ACK),
            ((DATA, 7), ACK),
            ((ABORT, 0), RST | ACK),
            ((ABORT, 1), RST),
            ((SHUTDOWN, 0), ACK),
            ((SHUTDOWN_ACK, 0), FIN | ACK),
            ((SHUTDOWN_COMPLETE, 0), FIN | ACK),
            ((SHUTDOWN_COMPLETE, 1), FIN | ACK),
            ((0x80, 1), ACK),
        ] {
            let expected = Told {
                kind: Kind::Transport,
                fragment: Fragment::Whole,
                source: client.ip(),
                destination: frontend.ip(),
                ports: [40_000, 80],
                protocol: SCTP,
                flags,
            };
            let frame = Frame::sctp(client, frontend, chunk, b"12345");
            assert_eq!(read(&frame).told(), expected, "{chunk:?}");
            assert_eq!(
                read(&frame.chunk((ABORT, 0), b"")).told(),
                expected,
                "{chunk:?} and an ABORT behind it"
            );
        }
    }
}

#[test]
fn sctp_without_a_whole_chunk_header_is_truncated() {
    for [client, frontend] in ends() {
        for length in 0..16 {
            let frame = Frame::other(client.ip(), frontend.ip(), SCTP, &vec![1; length]);
            assert_eq!(kind(&frame), Kind::Truncated, "{length} bytes");
            assert_eq!(kind(&frame.padded(30)), Kind::Truncated, "{length} bytes and padding");
        }
        let shortest = Frame::other(client.ip(), frontend.ip(), SCTP, &[1; 16]);
        assert_eq!(kind(&shortest), Kind::Transport);
    }
}

#[test]
fn every_fragment_tells_its_datagram_and_the_first_one_its_ports() {
    for [client, frontend] in ends() {
        for (protocol, datagram) in datagrams([client, frontend]) {
            let id = if client.is_ipv4() { u32::from((ID as u16).to_be()) } else { ID.to_be() };
            let fragments = datagram.fragments(ID, 80);
            assert_eq!(fragments.len(), 4);
            for (index, frame) in fragments.iter().enumerate() {
                let read = read(frame);
                let first = index == 0;
                let expected = Told {
                    kind: if first { Kind::Transport } else { Kind::Fragment },
                    fragment: if first { Fragment::First } else { Fragment::Later },
                    source: client.ip(),
                    destination: frontend.ip(),
                    ports: if first { [40_000, 80] } else { [0; 2] },
                    protocol,
                    flags: if first && protocol != UDP { ACK } else { 0 },
                };
                assert_eq!(read.told(), expected, "fragment {index}");
                assert_eq!(
                    read.datagram(),
                    (client.ip(), frontend.ip(), id, protocol),
                    "fragment {index}"
                );
                if first {
                    assert!(read.follows(false));
                    assert_eq!(read.follows(true), protocol != SCTP);
                }
            }
        }
    }
}

#[test]
fn a_first_fragment_holds_the_whole_transport_header_or_is_truncated() {
    for [client, frontend] in ends() {
        for (protocol, datagram) in datagrams([client, frontend]) {
            let sizes: &[usize] = if protocol == UDP { &[8, 16, 24] } else { &[16, 24] };
            for &size in &[&[8], sizes].concat() {
                let header = match protocol {
                    TCP => 20,
                    UDP => 8,
                    _ => 16,
                };
                let expected = if size < header { Kind::Truncated } else { Kind::Transport };
                let first = datagram.fragments(ID, size).swap_remove(0);
                assert_eq!(kind(&first), expected, "{size} bytes of protocol {protocol}");
                let padded = first.padded(30);
                assert_eq!(
                    kind(&padded),
                    expected,
                    "{size} bytes of protocol {protocol}, and padding"
                );
            }
        }
        // Options that continue in the next fragment, or an invalid offset.
        let first = Frame::tcp(client, frontend, ACK, &[1; 60]).fragments(ID, 24).swap_remove(0);
        assert_eq!(kind(&first.clone().patch(From::Transport, 12, &[6 << 4])), Kind::Transport);
        assert_eq!(kind(&first.clone().patch(From::Transport, 12, &[7 << 4])), Kind::Truncated);
        assert_eq!(kind(&first.patch(From::Transport, 12, &[4 << 4])), Kind::Malformed);
        let first = Frame::udp(client, frontend, &[1; 60]).fragments(ID, 24).swap_remove(0);
        assert_eq!(kind(&first.patch(From::Transport, 4, &[0, 7])), Kind::Malformed);
    }
}

#[test]
fn an_atomic_fragment_is_whole_whatever_its_reserved_byte_says() {
    let [_, [client, frontend]] = ends();
    for reserved in [0, 1, 0xff] {
        let frame =
            Frame::udp(client, frontend, b"data").extension(44, &[0, reserved, 0, 0, 1, 2, 3, 4]);
        let told = read(&frame).told();
        assert_eq!(
            (told.kind, told.fragment, told.ports),
            (Kind::Transport, Fragment::Whole, [40_000, 80])
        );
    }
}

#[test]
fn behind_more_extension_headers_only_the_first_fragment_tells_the_protocol() {
    let [_, [client, frontend]] = ends();
    let data = Frame::udp(client, frontend, &[7; 80]);
    let options = [0, 0, 1, 4, 0, 0, 0, 0];
    let whole = data.packet();
    let chained = [&[UDP][..], &options[1..], &whole[40..]].concat();
    let (head, tail) = chained.split_at(48);
    let before = data.clone().extension(0, &options);
    for frame in [data, before] {
        let first = read(&frame.part(ID, 0, true, 60, head));
        let later = read(&frame.part(ID, 48, false, 60, tail));
        let told = first.told();
        assert_eq!(
            (told.kind, told.fragment, told.protocol),
            (Kind::Transport, Fragment::First, UDP)
        );
        assert_eq!(told.ports, [40_000, 80]);
        assert_eq!((later.told().kind, later.told().protocol), (Kind::Fragment, 60));
        assert_eq!(first.datagram(), (client.ip(), frontend.ip(), ID.to_be(), 60));
        assert_eq!(first.datagram(), later.datagram());
        assert!(!first.follows(false));
    }
}

#[test]
fn an_error_is_read_when_it_quotes_ports() {
    for [client, frontend] in ends() {
        let (network, error) = if client.is_ipv4() { (20, (3, 4)) } else { (40, (2, 0)) };
        let about = |quote: &[u8]| Frame::icmp(frontend.ip(), client.ip(), error, 1_280, quote);
        for (protocol, datagram) in datagrams([client, frontend]) {
            let packet = datagram.packet();
            let expected = Told {
                kind: Kind::IcmpError,
                fragment: Fragment::Whole,
                source: frontend.ip(),
                destination: client.ip(),
                ports: [80, 40_000],
                protocol,
                flags: 0,
            };
            assert_eq!(read(&about(&packet[..network + 8])).told(), expected);
            assert_eq!(read(&about(&packet)).told(), expected);
            assert_eq!(kind(&about(&packet[..network + 7])), Kind::Other);
            let fragments = datagram.fragments(ID, 88);
            assert_eq!(read(&about(&fragments[0].packet())).told(), expected);
            assert_eq!(kind(&about(&fragments[1].packet())), Kind::Other);
            // An error that is itself fragmented.
            let read = read(&about(&packet).fragments(ID, 88)[0]);
            assert_eq!(read.told(), Told { fragment: Fragment::First, ..expected });
            assert!(!read.follows(false));
        }
    }
}

#[test]
fn only_these_types_are_errors_about_a_packet() {
    for [client, frontend] in ends() {
        let quote = Frame::udp(client, frontend, b"data").packet();
        let errors: Vec<u8> = (0..=u8::MAX)
            .filter(|&error| {
                let frame = Frame::icmp(frontend.ip(), client.ip(), (error, 0), 0, &quote);
                kind(&frame) == Kind::IcmpError
            })
            .collect();
        let expected: &[u8] = if client.is_ipv4() { &[3, 4, 11, 12] } else { &[1, 2, 3, 4] };
        assert_eq!(errors, expected);
    }
}

#[test]
fn a_fragment_that_ends_early_is_none() {
    for [client, frontend] in ends() {
        let fragments = Frame::udp(client, frontend, &[7; 200]).fragments(ID, 88);
        for (frame, whole) in
            fragments.iter().zip([Kind::Transport, Kind::Fragment, Kind::Fragment])
        {
            let bytes = frame.packet();
            assert_eq!(kind(frame), whole);
            for length in 0..bytes.len() {
                let packet = Bytes { bytes: bytes[..length].to_vec(), partial: false };
                let kind = if client.is_ipv4() {
                    headers::<V4, _>(&packet, 0).map(|headers| headers.kind)
                } else {
                    headers::<V6, _>(&packet, 0).map(|headers| headers.kind)
                };
                assert!(kind.is_none() || kind == Some(Kind::Truncated), "{length}");
            }
        }
    }
}
