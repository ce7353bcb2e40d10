//! However a packet is rewritten, its checksums equal those computed over all its bytes.

#[allow(dead_code, reason = "each test uses its part of what packets are made of")]
mod packets {
    pub(crate) mod frame;
    pub(crate) mod ip;
}

use std::net::{IpAddr, SocketAddr};

use packets::frame::{ACK, DATA, FIN, Frame, Payload, RST, SCTP, SYN, Sum, TCP, UDP, octets};
use packets::ip::Ip;
use proptest::prelude::*;
use sluice_common::abi::Flow;
use sluice_common::packet::answer::{self, QUOTE, Quoted};
use sluice_common::packet::bytes::Bytes;
use sluice_common::packet::header::TcpHeader;
use sluice_common::packet::parse::{Headers, Kind, headers};
use sluice_common::packet::rewrite::{can_follow, decrement_ttl, rewrite};
use sluice_common::{Packet, V4, V6};

/// Addresses of one family, with so few different bytes that a checksum's carries occur and do not
/// occur.
fn end(v4: bool) -> BoxedStrategy<SocketAddr> {
    let port = prop_oneof![any::<u16>(), Just(0_u16), Just(0xffff)];
    if v4 {
        let byte = prop_oneof![any::<u8>(), Just(0), Just(0xff)];
        (prop::array::uniform4(byte), port)
            .prop_map(|(address, port)| SocketAddr::new(IpAddr::from(address), port))
            .boxed()
    } else {
        let half = prop_oneof![any::<u16>(), Just(0), Just(0xffff)];
        (prop::array::uniform8(half), port)
            .prop_map(|(address, port)| SocketAddr::new(IpAddr::from(address), port))
            .boxed()
    }
}

/// Client and requested address, and both after the translation.
fn ends() -> impl Strategy<Value = [SocketAddr; 4]> {
    any::<bool>().prop_flat_map(|v4| [end(v4), end(v4), end(v4), end(v4)])
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![any::<u8>(), Just(0), Just(0xff)], 0..80)
}

fn segment(tcp: bool, source: SocketAddr, destination: SocketAddr, data: &[u8], sum: Sum) -> Frame {
    let frame = if tcp {
        Frame::tcp(source, destination, ACK, data)
    } else {
        Frame::udp(source, destination, data)
    };
    frame.l3().sum(if tcp && sum == Sum::Absent { Sum::Full } else { sum })
}

fn read<F: Ip>(packet: &Bytes<Vec<u8>>) -> Headers<F> {
    headers(packet, 0).expect("a whole packet")
}

fn flow<F: Ip>(source: SocketAddr, destination: SocketAddr) -> Flow<F::Address> {
    Flow {
        source: F::of(source.ip()).unwrap_or_default(),
        destination: F::of(destination.ip()).unwrap_or_default(),
        source_port: source.port(),
        destination_port: destination.port(),
        ..Flow::default()
    }
}

/// Returns the packet with another tuple.
fn rewritten<F: Ip>(
    packet: &[u8],
    partial: bool,
    kind: Kind,
    source: SocketAddr,
    destination: SocketAddr,
) -> Vec<u8> {
    let mut packet = Bytes { bytes: packet.to_vec(), partial };
    let headers = read::<F>(&packet);
    assert_eq!(headers.kind, kind);
    assert!(rewrite(&mut packet, &headers, &flow::<F>(source, destination)));
    packet.bytes
}

fn rewritten_of(
    frame: &Frame,
    partial: bool,
    kind: Kind,
    source: SocketAddr,
    destination: SocketAddr,
) -> Vec<u8> {
    if frame.source.is_ipv4() {
        rewritten::<V4>(&frame.bytes(), partial, kind, source, destination)
    } else {
        rewritten::<V6>(&frame.bytes(), partial, kind, source, destination)
    }
}

/// Reports whether a fragment's datagram can get another tuple, and checks that a rewrite of the
/// fragment agrees.
fn follows<F: Ip>(fragment: &Frame, source: SocketAddr, destination: SocketAddr) -> bool {
    let mut packet = Bytes { bytes: fragment.bytes(), partial: false };
    let headers = read::<F>(&packet);
    let flow = flow::<F>(source, destination);
    let possible = can_follow(&headers, &flow);
    assert_eq!(rewrite(&mut packet, &headers, &flow), possible);
    possible
}

fn sums() -> impl Strategy<Value = Sum> {
    prop_oneof![Just(Sum::Full), Just(Sum::Absent), Just(Sum::Partial)]
}

/// Returns the folded sum of big-endian halves: all ones over anything that contains its own
/// checksum.
fn folded(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Reports whether an IP packet's checksums are right.
fn holds(packet: &[u8]) -> bool {
    let v4 = packet[0] >> 4 == 4;
    let (header, addresses, protocol) =
        if v4 { (20, &packet[12..20], packet[9]) } else { (40, &packet[8..40], packet[6]) };
    let segment = &packet[header..];
    let length = (segment.len() as u32).to_be_bytes();
    let pseudo =
        if protocol == 1 { Vec::new() } else { [addresses, &[0, protocol], &length].concat() };
    (!v4 || folded(&packet[..header]) == 0xffff) && folded(&[&pseudo, segment].concat()) == 0xffff
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn a_rewritten_segment_is_the_segment_that_its_new_sender_would_have_made(
        tcp in any::<bool>(),
        [client, frontend, source, destination] in ends(),
        data in data(),
        sum in sums(),
    ) {
        let frame = segment(tcp, client, frontend, &data, sum);
        let expected = frame.clone().from(source).to(destination);
        let actual = rewritten_of(&frame, sum == Sum::Partial, Kind::Transport, source, destination);
        prop_assert_eq!(actual, expected.bytes());
    }

    #[test]
    fn rewriting_there_and_back_changes_nothing(
        tcp in any::<bool>(),
        [client, frontend, source, destination] in ends(),
        data in data(),
        sum in sums(),
    ) {
        let frame = segment(tcp, client, frontend, &data, sum);
        let there = frame.clone().from(source).to(destination);
        let back = rewritten_of(&there, sum == Sum::Partial, Kind::Transport, client, frontend);
        prop_assert_eq!(back, frame.bytes());
    }

    #[test]
    fn a_rewritten_icmp_error_holds_outside_and_inside(
        tcp in any::<bool>(),
        [client, frontend, seen_as, backend] in ends(),
        router in end(true),
        data in data(),
        absent in any::<bool>(),
        cut in 0_usize..60,
        rest in any::<u32>(),
    ) {
        // About a packet to the backend: the error's tuple is that of a reply.
        let sum = if absent { Sum::Absent } else { Sum::Full };
        let quoted = segment(tcp, seen_as, backend, &data, sum);
        let header = if client.is_ipv4() { 20 } else { 40 };
        let bytes = quoted.packet();
        let quote = bytes.len().min(header + 8 + cut);
        // Half a checksum cannot be updated.
        prop_assume!(!(tcp && quote == header + 17));
        let kind = if client.is_ipv4() { (3, 4) } else { (2, 0) };
        let router = if client.is_ipv4() { router.ip() } else { IpAddr::from([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]) };
        let error = |from, to: SocketAddr, quoted: &Frame| Frame::icmp(from, to.ip(), kind, rest, &quoted.packet()[..quote]).l3();
        for from in [router, backend.ip()] {
            let shown = if from == backend.ip() { frontend.ip() } else { from };
            let expected = error(shown, client, &quoted.clone().from(client).to(frontend));
            let actual = rewritten_of(&error(from, seen_as, &quoted), false, Kind::IcmpError, frontend, client);
            prop_assert_eq!(actual, expected.bytes());
        }
    }

    #[test]
    fn a_rewritten_sctp_packet_is_the_one_that_its_new_sender_would_have_made(
        [client, frontend, source, destination] in ends(),
        data in prop::collection::vec(any::<u8>(), 0..9_000),
        sum in prop_oneof![3 => Just(Sum::Full), 1 => Just(Sum::Absent)],
        padding in 0_usize..40,
    ) {
        let frame = Frame::sctp(client, frontend, (DATA, 3), &data).l3().sum(sum).padded(padding);
        let there = frame.clone().from(source).to(destination);
        let actual = rewritten_of(&frame, false, Kind::Transport, source, destination);
        prop_assert_eq!(&actual, &there.bytes());
        let back = rewritten_of(&there, false, Kind::Transport, client, frontend);
        prop_assert_eq!(back, frame.bytes());
    }

    #[test]
    fn a_rewritten_icmp_error_about_sctp_holds_and_keeps_the_quoted_checksum(
        [client, frontend, seen_as, backend] in ends(),
        data in data(),
        cut in 0_usize..60,
        rest in any::<u32>(),
    ) {
        let quoted = Frame::sctp(seen_as, backend, (DATA, 3), &data);
        let header = if client.is_ipv4() { 20 } else { 40 };
        let whole = quoted.packet();
        let quote = whole.len().min(header + 8 + cut);
        let mut shown = quoted.from(client).to(frontend).packet();
        shown[header + 8..header + 12].copy_from_slice(&whole[header + 8..header + 12]);
        let kind = if client.is_ipv4() { (3, 4) } else { (2, 0) };
        let error = |from: SocketAddr, to: SocketAddr, packet: &[u8]| Frame::icmp(from.ip(), to.ip(), kind, rest, &packet[..quote]).l3();
        let expected = error(frontend, client, &shown);
        let actual = rewritten_of(&error(backend, seen_as, &whole), false, Kind::IcmpError, frontend, client);
        prop_assert_eq!(actual, expected.bytes());
    }

    #[test]
    fn rewritten_fragments_are_fragments_of_the_rewritten_datagram(
        protocol in prop_oneof![Just(TCP), Just(UDP), Just(SCTP)],
        [client, frontend, source, destination] in ends(),
        data in prop::collection::vec(any::<u8>(), 40..400),
        size in 3_usize..20,
        id in any::<u32>(),
        order in any::<prop::sample::Index>(),
    ) {
        // SCTP's ports stay.
        let keep = |new: SocketAddr, old: SocketAddr| if protocol == SCTP { SocketAddr::new(new.ip(), old.port()) } else { new };
        let (source, destination) = (keep(source, client), keep(destination, frontend));
        let datagram = match protocol {
            TCP => Frame::tcp(client, frontend, ACK, &data),
            UDP => Frame::udp(client, frontend, &data),
            _ => Frame::sctp(client, frontend, (DATA, 3), &data),
        }
        .l3();
        let expected = datagram.clone().from(source).to(destination).fragments(id, size * 8);
        let mut pairs: Vec<_> = datagram.fragments(id, size * 8).into_iter().zip(expected).enumerate().collect();
        let middle = order.index(pairs.len());
        pairs.rotate_left(middle);
        for (index, (fragment, expected)) in pairs {
            let kind = if index == 0 { Kind::Transport } else { Kind::Fragment };
            let actual = rewritten_of(&fragment, false, kind, source, destination);
            prop_assert_eq!(actual, expected.bytes());
        }
    }

    #[test]
    fn an_sctp_fragment_cannot_get_other_ports(
        [client, frontend, ..] in ends(),
        data in prop::collection::vec(any::<u8>(), 40..400),
        ports in any::<[u16; 2]>(),
    ) {
        let first = Frame::sctp(client, frontend, (DATA, 3), &data).l3().fragments(7, 32).swap_remove(0);
        let [source, destination] = [SocketAddr::new(client.ip(), ports[0]), SocketAddr::new(frontend.ip(), ports[1])];
        let possible = if client.is_ipv4() {
            follows::<V4>(&first, source, destination)
        } else {
            follows::<V6>(&first, source, destination)
        };
        prop_assert_eq!(possible, [source, destination] == [client, frontend]);
    }

    #[test]
    fn a_hop_keeps_the_header_checksum(tcp in any::<bool>(), [client, frontend, ..] in ends(), ttl in any::<u8>()) {
        let frame = segment(tcp, client, frontend, b"data", Sum::Full).ttl(ttl);
        let mut packet = Bytes { bytes: frame.bytes(), partial: false };
        let done = if client.is_ipv4() {
            let headers = read::<V4>(&packet);
            decrement_ttl(&mut packet, &headers)
        } else {
            let headers = read::<V6>(&packet);
            decrement_ttl(&mut packet, &headers)
        };
        prop_assert_eq!(done, ttl > 1);
        let left = if done { frame.ttl(ttl.saturating_sub(1)) } else { frame };
        prop_assert_eq!(packet.bytes, left.bytes());
    }

    #[test]
    fn an_answer_holds(
        tcp in any::<bool>(),
        [client, frontend, ..] in ends(),
        data in data(),
        flags in prop_oneof![Just(SYN), Just(ACK), Just(FIN | ACK), Just(SYN | FIN), Just(RST)],
        mtu in prop_oneof![Just(0_u32), any::<u32>()],
    ) {
        let mut frame = segment(tcp, client, frontend, &data, Sum::Full);
        if let Payload::Tcp { flags: field, .. } = &mut frame.payload {
            *field = flags;
        }
        let packet = Bytes { bytes: frame.bytes(), partial: false };
        if client.is_ipv4() {
            answers::<V4>(&packet, tcp, mtu)?;
        } else {
            answers::<V6>(&packet, tcp, mtu)?;
        }
    }
}

fn answers<F: Ip>(packet: &Bytes<Vec<u8>>, tcp: bool, mtu: u32) -> Result<(), TestCaseError> {
    let headers = read::<F>(packet);
    // By chance the field looks as if it were left to the device: then so is the answer's.
    prop_assume!(!answer::is_partial(&headers));
    let write = |header: F::Network, rest: Vec<u8>| {
        let mut bytes = Bytes { bytes: vec![0; F::HEADER as usize], partial: false };
        assert!(sluice_common::packet::rewrite::Edit::store(&mut bytes, 0, header));
        [bytes.bytes, rest].concat()
    };
    if tcp {
        let segment: TcpHeader = packet.read(headers.transport).expect("a whole header");
        let (network, reset) = answer::reset(&headers, &segment);
        let mut bytes = Bytes { bytes: vec![0; 20], partial: false };
        assert!(sluice_common::packet::rewrite::Edit::store(&mut bytes, 0, reset));
        prop_assert!(holds(&write(network, bytes.bytes)));
    }
    let quote = headers.length.min(QUOTE) & !3;
    let quoted = &packet.bytes[..quote as usize];
    let sum = quoted.chunks(2).map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]]))).sum();
    let kind = if mtu == 0 { F::PORT_UNREACHABLE } else { F::TOO_BIG };
    let (network, icmp) = answer::error(&headers, kind, mtu, Quoted { length: quote, sum });
    let mut bytes = Bytes { bytes: vec![0; 8], partial: false };
    assert!(sluice_common::packet::rewrite::Edit::store(&mut bytes, 0, icmp));
    prop_assert!(holds(&write(network, [&bytes.bytes, quoted].concat())));
    prop_assert_eq!(
        octets(F::ip(headers.tuple.source)).len(),
        if F::VERSION == 4 { 4 } else { 16 }
    );
    Ok(())
}
