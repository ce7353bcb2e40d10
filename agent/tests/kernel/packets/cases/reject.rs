//! Services without backends: the answers, and the cases without one.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice_common::Reason;

use super::Table;
use crate::packets::case::{End, case};
use crate::packets::frame::{ACK, FIN, Frame, PSH, Payload, RST, SYN, Sum, TCP, UDP, octets};
use crate::packets::world::{Cast, EDGE, EMPTY, TUNNEL, UPLINK, Version, World, mac};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::of(TCP) {
        resets(table, &cast);
    }
    for cast in Cast::of(UDP) {
        unreachables(table, &cast);
        unreachable_partial(table, &cast);
        unreachable_limited(table, &cast);
    }
    for cast in Cast::all() {
        unanswered(table, &cast);
        broadcast(table, &cast);
        places(table, &cast);
    }
}

/// Returns the reset that answers a segment.
pub(super) fn reset(segment: &Frame) -> Frame {
    let Payload::Tcp { ports, sequence, acknowledgment, flags, data, .. } = &segment.payload else {
        panic!("a TCP segment");
    };
    let mut answer = segment.clone();
    (answer.source, answer.destination) = (segment.destination, segment.source);
    (answer.options, answer.extensions, answer.padding) = (Vec::new(), Vec::new(), Vec::new());
    (answer.ttl, answer.class, answer.id, answer.fragment) = (64, 0, 0, 0x4000);
    let counted = data.len() as u32 + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    let (sequence, acknowledgment, flags) = if flags & ACK == 0 {
        (0, sequence.wrapping_add(counted), RST | ACK)
    } else {
        (*acknowledgment, 0, RST)
    };
    let ports = [ports[1], ports[0]];
    answer.payload = Payload::Tcp {
        ports,
        sequence,
        acknowledgment,
        flags,
        window: 0,
        data: Vec::new(),
        sum: Sum::Full,
    };
    answer
}

/// Returns the ICMP error that answers a packet: at most 96 bytes of it are quoted, in whole words.
pub(super) fn error(packet: &Frame, kind: (u8, u8), rest: u32) -> Frame {
    let bytes = packet.packet();
    let quote = bytes.len().min(96) & !3;
    let mut answer = Frame::icmp(packet.destination, packet.source, kind, rest, &bytes[..quote]);
    answer.link.clone_from(&packet.link);
    (answer.ttl, answer.id) = (64, 0);
    if packet.source.is_ipv4() {
        answer.class = 0xc0;
    }
    answer
}

pub(super) fn unreachable(packet: &Frame) -> Frame {
    error(packet, if packet.source.is_ipv4() { (3, 3) } else { (1, 4) }, 0)
}

pub(super) fn time_exceeded(packet: &Frame) -> Frame {
    error(packet, if packet.source.is_ipv4() { (11, 0) } else { (3, 0) }, 0)
}

fn answered(
    table: &mut Table,
    name: String,
    world: &World,
    frame: &Frame,
    answer: &Frame,
    reason: Reason,
) {
    table.add(
        case(name)
            .world(world)
            .tc_ingress(EDGE)
            .sends(frame)
            .becomes(&answer.clone().turned())
            .ends(End::Redirect)
            .reason(reason, EMPTY),
    );
}

fn resets(table: &mut Table, cast: &Cast) {
    let segment = |flags, data: &[u8]| Frame::tcp(cast.client, cast.empty, flags, data);
    let extended = match cast.version {
        Version::V4 => segment(SYN, &[]).options(&[1; 8]),
        Version::V6 => segment(SYN, &[]).extension(0, &[0, 0, 1, 4, 0, 0, 0, 0]),
    };
    for (what, frame) in [
        ("a SYN", segment(SYN, &[])),
        ("a SYN with data", segment(SYN, b"early data")),
        ("an acknowledgment", segment(ACK, &[])),
        ("data", segment(ACK | PSH, b"data!")),
        ("a FIN", segment(FIN | ACK, &[])),
        ("a FIN without acknowledgment", segment(FIN, b"x")),
        ("a SYN behind options or extensions", extended),
        ("a SYN with padding", segment(SYN, &[]).padded(6)),
        ("a SYN with a VLAN tag", segment(SYN, &[]).tag(0x8100, 5)),
        ("a SYN with two VLAN tags", segment(SYN, &[]).tag(0x88a8, 6).tag(0x8100, 5)),
    ] {
        let name = format!("{}: {what} to a service without backends is reset", cast.title());
        answered(table, name, &cast.world(), &frame, &reset(&frame), Reason::NoBackendReset);
    }
    let partial = segment(SYN, &[]).sum(Sum::Partial);
    let name = format!(
        "{}: the reset of a segment whose checksum is left to the device is left to it too",
        cast.title()
    );
    let answer = reset(&partial).sum(Sum::Partial);
    answered(table, name, &cast.world(), &partial, &answer, Reason::NoBackendReset);
    for (what, flags) in [("a RST", RST), ("a RST|ACK", RST | ACK)] {
        let case = cast
            .case(format!("{what} is never answered"))
            .world(&cast.world())
            .tc_ingress(EDGE)
            .sends(&segment(flags, &[]));
        table.add(case.dropped(Reason::NoBackendDropped, EMPTY));
    }
}

/// Datagrams to a service without backends are answered with ICMP port unreachable.
fn unreachables(table: &mut Table, cast: &Cast) {
    let datagram = |data: &[u8]| Frame::udp(cast.client, cast.empty, data);
    let extended = match cast.version {
        Version::V4 => datagram(b"question").options(&[1; 8]),
        Version::V6 => datagram(b"question").extension(60, &[0, 0, 1, 4, 0, 0, 0, 0]),
    };
    for (what, frame) in [
        ("a datagram", datagram(b"question")),
        ("an empty datagram", datagram(b"")),
        ("a datagram of odd length", datagram(b"odd")),
        ("a long datagram", datagram(&[0x5a; 999])),
        ("a datagram without checksum", datagram(b"question").sum(Sum::Absent)),
        ("a datagram behind options or extensions", extended),
        ("a datagram with padding", datagram(b"").padded(18)),
        ("a datagram with a VLAN tag", datagram(b"question").tag(0x8100, 5)),
    ] {
        let name = format!(
            "{}: {what} to a service without backends is answered with unreachable",
            cast.title()
        );
        answered(
            table,
            name,
            &cast.world(),
            &frame,
            &unreachable(&frame),
            Reason::NoBackendUnreachable,
        );
    }
}

/// The answer to a datagram whose checksum is left to the device.
fn unreachable_partial(table: &mut Table, cast: &Cast) {
    let datagram = |data: &[u8]| Frame::udp(cast.client, cast.empty, data);
    // What the device will do to the answer: the complement of the sum of everything else goes into
    // the second half of `rest`.
    let partial = datagram(b"question").sum(Sum::Partial);
    let mut answer = unreachable(&partial);
    if let Payload::Icmp { rest, quote, .. } = &mut answer.payload
        && cast.version == Version::V6
    {
        let length = (quote.len() + 8) as u32;
        let words = [
            octets(partial.source),
            octets(partial.destination),
            length.to_be_bytes().to_vec(),
            vec![0, 58],
        ]
        .concat();
        let mut sum: u32 =
            words.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        rest[2..].copy_from_slice(&(sum as u16).to_be_bytes());
    }
    let name =
        format!("{}: the answer to a datagram whose checksum is left to the device", cast.title());
    answered(table, name, &cast.world(), &partial, &answer, Reason::NoBackendUnreachable);
}

/// Answers are limited per client.
fn unreachable_limited(table: &mut Table, cast: &Cast) {
    let datagram = |data: &[u8]| Frame::udp(cast.client, cast.empty, data);
    let frame = datagram(b"question");
    let mut limited = cast.world();
    let _ = limited.rejects.insert(cast.client.ip(), 100);
    table.add(
        cast.case("a client that had too many answers gets none")
            .world(&limited)
            .tc_ingress(EDGE)
            .sends(&frame)
            .dropped(Reason::RejectLimited, EMPTY),
    );
    let _ = limited.rejects.insert(cast.client.ip(), 1_500);
    let name = format!("{}: a client that has credit left", cast.title());
    answered(table, name, &limited, &frame, &unreachable(&frame), Reason::NoBackendUnreachable);
}

/// Sources that must not be answered.
fn unanswered(table: &mut Table, cast: &Cast) {
    let sources: Vec<(&str, std::net::IpAddr)> = match cast.version {
        Version::V4 => vec![
            ("multicast", Ipv4Addr::new(224, 0, 0, 1).into()),
            ("broadcast", Ipv4Addr::BROADCAST.into()),
            ("unspecified", Ipv4Addr::UNSPECIFIED.into()),
        ],
        Version::V6 => vec![
            ("multicast", Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).into()),
            ("unspecified", Ipv6Addr::UNSPECIFIED.into()),
        ],
    };
    for (what, source) in sources {
        let frame = cast.first(SocketAddr::new(source, 40_001), cast.empty);
        let case = cast
            .case(format!("the {what} source is not answered"))
            .world(&cast.world())
            .tc_ingress(EDGE)
            .sends(&frame);
        table.add(case.dropped(Reason::NoBackendDropped, EMPTY));
    }
}

/// Frames to many hosts are left alone, neither answered nor translated, because the stack routes
/// none of them.
fn broadcast(table: &mut Table, cast: &Cast) {
    for (what, link) in [("broadcast", [0xff; 6]), ("multicast", [1, 0, 0x5e, 0, 0, 1])] {
        for (to, frontend) in
            [("a service without backends", cast.empty), ("a service", cast.frontend)]
        {
            for ifindex in [EDGE, UPLINK] {
                let frame = cast.first(cast.client, frontend).at(link);
                table.add(
                    cast.case(format!("a {what} frame to {to} on d{ifindex}"))
                        .world(&cast.world())
                        .tc_ingress(ifindex)
                        .sends(&frame),
                );
            }
        }
    }
}

/// The device by which an answer is sent.
fn places(table: &mut Table, cast: &Cast) {
    let (answer, reason): (fn(&Frame) -> Frame, Reason) = match cast.protocol {
        TCP => (reset, Reason::NoBackendReset),
        _ => (unreachable, Reason::NoBackendUnreachable),
    };
    let frame = cast.first(SocketAddr::new(cast.node, 40_001), cast.empty);
    table.add(
        cast.case("an answer to this host is handed in")
            .world(&cast.world())
            .tc_egress(UPLINK)
            .sends(&frame)
            .becomes(&answer(&frame).at(mac(UPLINK)))
            .ends(End::Redirect)
            .reason(reason, EMPTY),
    );
    table.add(
        cast.case("an answer to this host without a link header is handed in")
            .world(&cast.world())
            .tc_egress_l3(TUNNEL)
            .sends(&frame.clone().l3())
            .becomes(&answer(&frame).l3())
            .ends(End::Redirect)
            .reason(reason, EMPTY),
    );
    let frame = cast.first(cast.client, cast.empty);
    table.add(
        cast.case("an answer without a link header is turned back")
            .world(&cast.world())
            .tc_ingress_l3(TUNNEL)
            .sends(&frame.clone().l3())
            .becomes(&answer(&frame).l3())
            .ends(End::Redirect)
            .reason(reason, EMPTY),
    );
    let received = frame.at(mac(UPLINK));
    table.add(
        cast.case("an answer is left to tc").world(&cast.world()).xdp(UPLINK).sends(&received),
    );
}
