//! With `--accelerate on`, packets that the stack would only forward go around it.

use std::net::{IpAddr, SocketAddr};

use sluice_common::Reason;
use sluice_common::abi::{device_flags, flow, networks, state};
use sluice_common::path::mark;

use super::Table;
use super::fragments::{long, parts, told};
use crate::packets::case::{Case, Counted, End, Program};
use crate::packets::frame::{Frame, SCTP, UDP};
use crate::packets::world::{
    self, BRIDGE, Cast, Connection, EDGE, NARROW, NARROW_MTU, NET_CLIENTS, NET_FOREIGN, NET_NARROW,
    NET_OVERLAY, NET_SHORT, NET_UNROUTED, ONE, TUNNEL, UPLINK, Version, World, mac,
};

/// One case in so many runs once more, of those that acceleration does not change.
const SAMPLE: usize = 7;

/// Adds the cases: existing ones with acceleration, and others.
pub(super) fn add(table: &mut Table) {
    let others: Vec<Case> = table.cases.iter().filter(|case| !case.partial).cloned().collect();
    let mut around = 0;
    for (index, case) in others.iter().enumerate() {
        if is_translated(case) {
            let case = accelerated(case);
            around += usize::from(case.expected.end == End::Redirect);
            table.add(case);
        } else if index % SAMPLE == 0 && !comes_from_backend(case) {
            table.add(on(case.clone()));
        }
    }
    assert!(around > 300, "{around} go around the stack");
    for cast in [Cast::all(), Cast::of(SCTP)].concat() {
        answers(table, &cast);
        ways_around(table, &cast);
        shapes_left_to_the_stack(table, &cast);
        questions_left_to_the_stack(table, &cast);
        fragments(table, &cast);
        bridged(table, &cast);
    }
    for cast in Cast::of(UDP) {
        errors(table, &cast);
    }
}

/// Returns the case with acceleration.
fn on(mut case: Case) -> Case {
    case.name = format!("{}, accelerated", case.name);
    case.world.settings.networks |= networks::ACCELERATE;
    case
}

/// Reports whether a case's packet is translated at ingress and goes on by the stack.
fn is_translated(case: &Case) -> bool {
    let direct = |counted: &Counted| {
        matches!(counted, Counted::Reason { reason: Reason::DirectRemapped, .. })
    };
    matches!(case.program, Program::Ingress | Program::IngressL3)
        && case.expected.end == End::Next
        && case.expected.frame != case.input
        && !case.expected.counted.iter().flatten().any(direct)
}

/// Reports whether its packet comes in from a backend, so that it may be an answer.
fn comes_from_backend(case: &Case) -> bool {
    matches!(case.program, Program::Ingress | Program::IngressL3)
        && ip_of(case, &case.input).is_none_or(|ip| {
            case.world
                .listing
                .get(&ip.source)
                .is_some_and(|bits| bits & sluice_common::abi::listing::BACKEND != 0)
        })
}

/// The fields of an IP packet that the stack looks at when it forwards.
struct Ip {
    start: usize,
    source: IpAddr,
    destination: IpAddr,
    length: usize,
    ttl: u8,
    has_options: bool,
}

fn ip_of(case: &Case, frame: &[u8]) -> Option<Ip> {
    let start = if case.program == Program::IngressL3 { 0 } else { 14 };
    let packet = frame.get(start..)?;
    let is_ip = |ethertype: [u8; 2]| start == 0 || frame[12..14] == ethertype;
    let address = |at: usize, size: usize| match size {
        4 => IpAddr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).expect("four bytes")),
        _ => IpAddr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).expect("sixteen bytes")),
    };
    match packet.first()? >> 4 {
        4 if is_ip([8, 0]) && packet.len() >= 20 => Some(Ip {
            start,
            source: address(12, 4),
            destination: address(16, 4),
            length: usize::from(u16::from_be_bytes([packet[2], packet[3]])),
            ttl: packet[8],
            has_options: packet[0] != 0x45,
        }),
        6 if is_ip([0x86, 0xdd]) && packet.len() >= 40 => Some(Ip {
            start,
            source: address(8, 16),
            destination: address(24, 16),
            length: 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])),
            ttl: packet[7],
            has_options: packet[6] == 0,
        }),
        _ => None,
    }
}

/// Returns the case with acceleration: its packet goes around the stack with one hop less, if the
/// stack would only forward it.
fn accelerated(case: &Case) -> Case {
    let mut case = on(case.clone());
    let Some(ip) = ip_of(&case, &case.expected.frame) else { return case };
    let is_bare = case.program == Program::IngressL3;
    let is_for_us = is_bare || case.input.starts_with(&mac(case.ifindex));
    let is_port = case.world.devices.get(&case.ifindex).is_some_and(|device| device.bridge != 0);
    let fits = world::route(ip.destination).is_some_and(|(_, mtu)| ip.length <= mtu as usize);
    if !is_for_us || is_port || !fits || ip.has_options || ip.ttl <= 1 {
        return case;
    }
    let frame = &mut case.expected.frame;
    if ip.source.is_ipv4() {
        frame[ip.start + 8] -= 1;
        // RFC 1141: the upper byte of a word is decremented, so that of its sum is incremented.
        let sum =
            u32::from(u16::from_be_bytes([frame[ip.start + 10], frame[ip.start + 11]])) + 0x0100;
        let sum = (sum & 0xffff) as u16 + (sum >> 16) as u16;
        frame[ip.start + 10..ip.start + 12].copy_from_slice(&sum.to_be_bytes());
    } else {
        frame[ip.start + 7] -= 1;
    }
    if is_bare {
        let ethertype: [u8; 2] = if ip.source.is_ipv4() { [8, 0] } else { [0x86, 0xdd] };
        let _ = frame.splice(..0, [&[0; 12][..], &ethertype].concat());
    }
    case.expected.end = End::Redirect;
    case
}

/// Returns a world with a flow.
fn knows(cast: &Cast, connection: &Connection) -> World {
    let mut world = cast.world().flows(connection.state(state::ESTABLISHED).both());
    world.settings.networks |= networks::ACCELERATE;
    world
}

/// Expects the frame with one hop less, if it is redirected.
fn one_hop_on(case: Case, frame: &Frame) -> Case {
    let ttl = frame.ttl - 1;
    case.routed(&frame.clone().ttl(ttl))
}

/// Packets of an endpoint, which are translated where they leave.
fn answers(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let world = knows(cast, &connection);
    let answer = cast.next(cast.backend, cast.client);
    for (program, ifindex, frame) in [
        (Program::Ingress, EDGE, answer.clone().at(mac(EDGE))),
        (Program::Ingress, UPLINK, answer.clone().at(mac(UPLINK))),
        (Program::IngressL3, TUNNEL, answer.clone().l3()),
    ] {
        let case = |what: &str, world: &World, frame: &Frame| {
            cast.case(format!("{what}, device {ifindex}"))
                .world(world)
                .at(program, ifindex)
                .sends(frame)
        };
        table.add(one_hop_on(case("an answer goes around the stack", &world, &frame), &frame));
        let mut off = world.clone();
        off.settings.networks = 0;
        table.add(case("an answer passes the stack", &off, &frame));
        let embryonic = World { flows: [].into(), ..world.clone() }.embryonic(connection.both());
        let name = "the first answer goes around the stack";
        table.add(one_hop_on(case(name, &embryonic, &frame), &frame));
        let masqueraded = connection.flags(flow::LOCAL | flow::MASQUERADED);
        let name = "an answer to a masqueraded client, translated back where it came in, goes on";
        let marked = knows(cast, &masqueraded).marks(mark::MASQUERADED);
        table.add(one_hop_on(case(name, &marked, &frame), &frame));
        let away = knows(cast, &connection.flags(flow::LOCAL | flow::AWAY));
        let name = "an answer that leaves by another device than its client came in by";
        table.add(one_hop_on(case(name, &away, &frame), &frame));
        for (what, flags) in [
            ("is a direct connection's", flow::DIRECT),
            ("is this host's", flow::HOST | flow::HAIRPIN),
        ] {
            let world = knows(cast, &connection.flags(flags));
            table.add(case(&format!("an answer that {what}"), &world, &frame));
        }
        let last = frame.clone().ttl(1);
        table.add(case("an answer whose TTL ends here", &world, &last));
        let stranger = World { flows: [].into(), ..world.clone() };
        table.add(case("a backend's packet to somebody else", &stranger, &frame));
    }
}

/// Answers go around the stack if their route leads to a device with programs and has room.
fn ways_around(table: &mut Table, cast: &Cast) {
    let node = cast.node;
    for (what, client, is_forwarded) in [
        ("no route", world::address(cast.version, NET_UNROUTED, 7), false),
        ("an address of the node", node, false),
        ("a device without our programs", world::address(cast.version, NET_FOREIGN, 7), true),
        ("a device without a link header", world::address(cast.version, NET_OVERLAY, 7), true),
    ] {
        let cast = cast.client(SocketAddr::new(client, cast.client.port()));
        let world = knows(&cast, &cast.connection());
        let answer = cast.next(cast.backend, cast.client).at(mac(EDGE));
        let case =
            cast.case(format!("an answer to {what}")).world(&world).tc_ingress(EDGE).sends(&answer);
        table.add(if is_forwarded { one_hop_on(case, &answer) } else { case });
    }
    for (what, net, size, is_forwarded) in [
        ("fits the device", NET_NARROW, NARROW_MTU, true),
        ("does not fit the device", NET_NARROW, NARROW_MTU + 8, false),
        ("fits the route", NET_SHORT, NARROW_MTU, true),
        ("does not fit the route", NET_SHORT, NARROW_MTU + 8, false),
    ] {
        let cast = cast.client_in(net);
        let world = knows(&cast, &cast.connection());
        let answer = sized(&cast, size).at(mac(EDGE));
        let case =
            cast.case(format!("an answer {what}")).world(&world).tc_ingress(EDGE).sends(&answer);
        table.add(if is_forwarded { one_hop_on(case, &answer) } else { case });
    }
}

/// Frames that only the stack can forward.
fn shapes_left_to_the_stack(table: &mut Table, cast: &Cast) {
    let world = knows(cast, &cast.connection());
    let answer = cast.next(cast.backend, cast.client).at(mac(EDGE));
    let optional = match cast.version {
        Version::V4 => answer.clone().options(&[0x94, 4, 0, 0]),
        Version::V6 => answer.clone().extension(0, &[0, 0, 1, 4, 0, 0, 0, 0]),
    };
    table.add(cast.case("an answer with options").world(&world).tc_ingress(EDGE).sends(&optional));
    let tagged = answer.clone().tag(0x8100, 5);
    table.add(cast.case("an answer with a tag").world(&world).tc_ingress(EDGE).sends(&tagged));
    let other = cast.next(cast.backend, cast.client).at([2, 0, 0, 0, 9, 9]);
    table.add(
        cast.case("an answer in a frame for somebody else")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&other),
    );
    let mut switched = world.clone();
    switched.devices.get_mut(&EDGE).expect("an edge").flags |= device_flags::SWITCHED;
    table.add(
        cast.case("an answer by a port of a switch")
            .world(&switched)
            .tc_ingress(EDGE)
            .sends(&answer),
    );
}

/// Requests by a switch's port, and at hooks other than the ingress.
fn questions_left_to_the_stack(table: &mut Table, cast: &Cast) {
    let world = knows(cast, &cast.connection());
    let mut switched = world.clone();
    switched.devices.get_mut(&EDGE).expect("an edge").flags |= device_flags::SWITCHED;
    let first = cast.first(cast.client, cast.frontend).at(mac(EDGE));
    let mut switched = cast.world();
    switched.settings.networks |= networks::ACCELERATE;
    switched.devices.get_mut(&EDGE).expect("an edge").flags |= device_flags::SWITCHED;
    table.add(
        cast.case("a question by a port of a switch")
            .world(&switched)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );
    for (program, ifindex) in [(Program::Egress, UPLINK), (Program::Xdp, UPLINK)] {
        let answer = cast.next(cast.backend, cast.client).at(mac(UPLINK));
        let case = cast
            .case(format!("an answer, {}", program.name()))
            .world(&world)
            .at(program, ifindex)
            .sends(&answer);
        table.add(if program == Program::Egress {
            case.becomes(&answer.clone().from(cast.frontend)).reply(ONE)
        } else {
            case
        });
    }
}

/// Returns an answer of this length in bytes.
fn sized(cast: &Cast, length: u32) -> Frame {
    let of = |data: &[u8]| match cast.protocol {
        UDP => Frame::udp(cast.backend, cast.client, data),
        SCTP => Frame::sctp(cast.backend, cast.client, (0, 3), data),
        _ => Frame::tcp(cast.backend, cast.client, crate::packets::frame::ACK, data),
    };
    let header = of(&[0; 4]).length() - 4;
    let frame = of(&vec![0x5a; (length - header) as usize]);
    assert_eq!(frame.length(), length, "a frame of this length");
    frame
}

/// Each part of a datagram goes the way of the first one.
fn fragments(table: &mut Table, cast: &Cast) {
    let mut cast = *cast;
    if cast.protocol == SCTP {
        // SCTP's ports cannot change in fragments.
        cast.backend.set_port(cast.frontend.port());
    }
    let world = knows(&cast, &cast.connection());
    let parts = parts(&long(&cast, cast.backend, cast.client).at(mac(EDGE)));
    let told = told(&cast, cast.backend, cast.client, true, 0);
    let case = |what: &str, world: &World, frame: &Frame| {
        cast.case(what).world(world).tc_ingress(EDGE).sends(frame)
    };
    table.add(
        one_hop_on(
            case("an answer's first fragment goes around the stack", &world, &parts[0]),
            &parts[0],
        )
        .fragments(told.clone()),
    );
    let known = world.clone().fragments(told);
    table.add(one_hop_on(
        case("an answer's later fragment goes around the stack", &known, &parts[1]),
        &parts[1],
    ));
    table.add(case("an answer's later fragment that nothing is known of", &world, &parts[1]));
}

/// A bridge forwards between its ports; packets for the bridge itself are routed.
fn bridged(table: &mut Table, cast: &Cast) {
    let mut world = knows(cast, &cast.connection());
    let edge = world.devices.get_mut(&EDGE).expect("an edge");
    edge.bridge = BRIDGE;
    edge.flags |= BRIDGE << device_flags::BRIDGE_MAC_SHIFT;
    let answer = cast.next(cast.backend, cast.client);
    let case = |what: &str, world: &World, frame: &Frame| {
        cast.case(format!("an answer by a bridge's port, {what}"))
            .world(world)
            .tc_ingress(EDGE)
            .sends(frame)
    };
    let routed = answer.clone().at(mac(BRIDGE));
    table.add(one_hop_on(case("routed", &world, &routed), &routed));
    table.add(case("bridged", &world, &answer.clone().at(mac(EDGE))));
    // Its client is behind the same bridge.
    let cast = cast.client(SocketAddr::new(cast.other_backend.ip(), cast.client.port()));
    let world = world.flows(cast.connection().state(state::ESTABLISHED).both());
    let frame = cast.next(cast.backend, cast.client).at(mac(BRIDGE));
    table.add(case("back to the bridge", &world, &frame));
}

/// ICMP errors of an endpoint.
fn errors(table: &mut Table, cast: &Cast) {
    let world = knows(cast, &cast.connection());
    let kind = if cast.version == Version::V4 { (3, 3) } else { (1, 4) };
    let quoted = cast.next(cast.client, cast.backend).packet();
    for (who, from) in [
        ("the endpoint", cast.backend.ip()),
        ("a router", world::address(cast.version, NET_CLIENTS, 9)),
    ] {
        let error = Frame::icmp(from, cast.client.ip(), kind, 0, &quoted).at(mac(NARROW));
        let case = cast
            .case(format!("{who} tells the client of an error"))
            .world(&world)
            .tc_ingress(NARROW)
            .sends(&error);
        // Whether a router's error is about an answer is not known before it leaves.
        table.add(one_hop_on(case, &error));
    }
}
