//! Datagrams in fragments: the later ones go the way of the first, and wait for it.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{Datagram, DatagramPorts, flow, state};
use sluice_common::path::fragment::{DATAGRAM_TICKS, HEARTBEAT_TICKS, HELD_LENGTH_MAX, label};
use sluice_common::path::mark;

use super::Table;
use super::masquerade::{LOCAL, OVERLAY, REMOTE};
use super::masqueraded::on;
use crate::packets::case::{Case, End, Program, case};
use crate::packets::frame::{Frame, SCTP, TCP, UDP};
use crate::packets::world::{
    Cast, Connection, Datagrams, EDGE, EMPTY, NARROW, NET_PODS, ONE, TUNNEL, UPLINK, Version,
    World, mac,
};

const ID: u32 = 0x0102_0304;

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in [Cast::all(), Cast::of(SCTP)].concat() {
        // SCTP's ports cannot change in fragments.
        let cast = if cast.protocol == SCTP {
            let mut cast = cast;
            cast.backend.set_port(cast.frontend.port());
            cast
        } else {
            cast
        };
        forward(table, &cast);
        forward_opens(table, &cast);
        replies(table, &cast);
        early(table, &cast);
        early_without_agent(table, &cast);
        early_of_strangers(table, &cast);
        masqueraded(table, &cast);
        node_ports(table, &cast);
    }
    for cast in Cast::of(UDP) {
        shapes(table, &cast);
        too_long(table, &cast);
        extensions_behind(table, &cast);
        stale(table, &cast);
        unserved(table, &cast);
    }
    for cast in Cast::of(SCTP) {
        remapped(table, &cast);
    }
}

/// Returns a datagram in three fragments.
pub(super) fn parts(frame: &Frame) -> Vec<Frame> {
    let parts = frame.fragments(ID, 24);
    assert!(parts.len() >= 2, "there is more than one");
    parts
}

/// Returns a packet in the middle of a flow that is long enough for fragments.
pub(super) fn long(cast: &Cast, source: SocketAddr, destination: SocketAddr) -> Frame {
    match cast.protocol {
        TCP => Frame::tcp(source, destination, crate::packets::frame::ACK, &[0x5a; 40]),
        SCTP => Frame::sctp(source, destination, (0, 3), &[0x5a; 40]),
        _ => Frame::udp(source, destination, &[0x5a; 50]),
    }
}

/// Returns the entry of a datagram between two ends: its ports, or none.
pub(super) fn told(
    cast: &Cast,
    source: SocketAddr,
    destination: SocketAddr,
    ports: bool,
    seen: u32,
) -> Datagrams {
    // As it lies in memory: IPv4's is in the lower half.
    let id = match cast.version {
        Version::V4 => u32::from((ID as u16).to_be()),
        Version::V6 => ID.to_be(),
    };
    let key = Datagram {
        source: source.ip(),
        destination: destination.ip(),
        id,
        protocol: cast.protocol,
        reserved: [0; 3],
    };
    let ports = if ports { (source.port(), destination.port()) } else { (0, 0) };
    Datagrams::from([(
        key,
        DatagramPorts { source_port: ports.0, destination_port: ports.1, seen },
    )])
}

/// Returns a flow, and a world with it.
fn established(cast: &Cast) -> (Connection, World) {
    let connection = cast.connection().state(state::ESTABLISHED);
    (connection, cast.world().own_device().flows(connection.both()))
}

/// Fragments of a request.
fn forward(table: &mut Table, cast: &Cast) {
    let (connection, world) = established(cast);
    for (program, ifindex) in [(Program::Ingress, EDGE), (Program::Xdp, UPLINK)] {
        let question = long(cast, cast.client, cast.frontend).at(mac(ifindex));
        let (from, to) = (parts(&question), parts(&question.clone().to(cast.backend)));
        let entry = told(cast, cast.client, cast.frontend, true, 0);
        table.add(
            cast.case(format!("a first fragment, {}", program.name()))
                .world(&world)
                .at(program, ifindex)
                .sends(&from[0])
                .becomes(&to[0])
                .forward(ONE)
                .flows([connection.both()])
                .fragments(entry.clone()),
        );
        // The flow's state does not matter, and stays as it is.
        for (what, connection) in [
            ("a", connection),
            ("an old", connection.age(60)),
            (
                "a closing",
                connection.state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY),
            ),
        ] {
            let world = cast.world().own_device().flows(connection.both()).fragments(entry.clone());
            for (index, (from, to)) in from.iter().zip(&to).enumerate().skip(1) {
                table.add(
                    cast.case(format!("fragment {index} of {what} flow, {}", program.name()))
                        .world(&world)
                        .at(program, ifindex)
                        .sends(from)
                        .becomes(to)
                        .forward(ONE),
                );
            }
        }
        let connection = cast.connection();
        let world = cast.world().embryonic(connection.both()).fragments(entry.clone());
        table.add(
            cast.case(format!("a fragment of an unproven flow, {}", program.name()))
                .world(&world)
                .at(program, ifindex)
                .sends(&from[1])
                .becomes(&to[1])
                .forward(ONE),
        );
        // Without its flow a fragment opens nothing.
        let case = cast
            .case(format!("a fragment whose flow is gone, {}", program.name()))
            .world(&cast.world().own_device().fragments(entry))
            .at(program, ifindex)
            .sends(&from[1]);
        table.add(if program == Program::Xdp { case } else { case.reason(Reason::Fragment, 0) });
    }
}

/// The first fragment of a flow's first packet.
fn forward_opens(table: &mut Table, cast: &Cast) {
    // The first fragment of a flow's first packet.
    if cast.protocol == UDP {
        let question = long(cast, cast.client, cast.frontend);
        let (from, to) = (parts(&question), parts(&question.clone().to(cast.backend)));
        table.cut(
            cast.case("a first fragment opens a flow")
                .world(&cast.world())
                .tc_ingress(EDGE)
                .sends(&from[0])
                .becomes(&to[0])
                .opens(ONE)
                .embryonic([cast.connection().both()])
                .fragments(told(cast, cast.client, cast.frontend, true, 0)),
        );
    }
}

fn replies(table: &mut Table, cast: &Cast) {
    let (connection, world) = established(cast);
    for (program, ifindex) in [(Program::Egress, EDGE), (Program::EgressL3, TUNNEL)] {
        let mut answer = long(cast, cast.backend, cast.client);
        if ifindex == TUNNEL {
            answer = answer.l3();
        }
        let (from, to) = (parts(&answer), parts(&answer.clone().from(cast.frontend)));
        let entry = told(cast, cast.backend, cast.client, true, 0);
        table.add(
            cast.case(format!("a reply's first fragment, {}", program.name()))
                .world(&world)
                .at(program, ifindex)
                .sends(&from[0])
                .becomes(&to[0])
                .reply(ONE)
                .flows([connection.both()])
                .fragments(entry.clone()),
        );
        let world = world.clone().fragments(entry);
        table.cut(
            cast.case(format!("a reply's other fragment, {}", program.name()))
                .world(&world)
                .at(program, ifindex)
                .sends(&from[1])
                .becomes(&to[1])
                .reply(ONE),
        );
    }
    // A packet that a backend sends without a flow of ours is recorded too, so that its later
    // fragments need not wait.
    let answer = parts(&long(cast, cast.backend, cast.client));
    let world = cast.world().own_device();
    let untouched = told(cast, cast.backend, cast.client, false, 0);
    table.add(
        cast.case("a backend's own first fragment")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&answer[0])
            .fragments(untouched.clone()),
    );
    table.add(
        cast.case("a backend's own other fragment")
            .world(&world.fragments(untouched))
            .tc_egress(UPLINK)
            .sends(&answer[1]),
    );
    // At ingress no entry is looked up.
    for (index, fragment) in answer.iter().enumerate() {
        table.add(
            cast.case(format!("fragment {index} of a reply at ingress"))
                .world(&cast.world().own_device())
                .tc_ingress(EDGE)
                .sends(fragment),
        );
    }
}

/// Returns the frame as it is sent to the agent.
fn labelled(fragment: &Frame, flags: u8, ifindex: u32) -> Vec<u8> {
    let ifindex = ifindex.to_be_bytes();
    [&[2, flags][..], &ifindex, &[0; 6], &[0x88, 0xb5], &fragment.bytes()].concat()
}

fn held(name: String, world: &World, program: Program, ifindex: u32, fragment: &Frame) -> Case {
    let flags = match program {
        Program::Ingress | Program::Xdp => 0,
        Program::Egress => label::EGRESS,
        Program::IngressL3 => label::L3,
        Program::EgressL3 => label::EGRESS | label::L3,
    };
    let mut case = case(name)
        .world(world)
        .at(program, ifindex)
        .sends(fragment)
        .ends(End::Redirect)
        .reason(Reason::FragmentHeld, 0);
    case.expected.frame = labelled(fragment, flags, ifindex);
    case
}

/// Fragments that come before the first one wait with the agent.
fn early(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (_, world) = established(cast);
    let question = parts(&long(cast, cast.client, cast.frontend));
    let answer = parts(&long(cast, cast.backend, cast.client));
    for (program, ifindex, fragment) in [
        (Program::Ingress, EDGE, question[1].clone()),
        (Program::Ingress, UPLINK, question[1].clone().at(mac(UPLINK))),
        (Program::IngressL3, TUNNEL, question[1].clone().l3()),
        (Program::Egress, EDGE, answer[1].clone()),
        (Program::EgressL3, TUNNEL, answer[1].clone().l3()),
    ] {
        let name =
            format!("{title}: a fragment that comes first waits, {} of {ifindex}", program.name());
        table.add(held(name, &world, program, ifindex, &fragment));
    }
    let received = question[1].clone().at(mac(UPLINK));
    table.add(
        cast.case("a fragment that comes first is left to tc")
            .world(&world)
            .xdp(UPLINK)
            .sends(&received),
    );
    table.add(
        cast.case("a fragment that comes first, without an own device")
            .world(&cast.world())
            .tc_ingress(EDGE)
            .sends(&question[1])
            .reason(Reason::Fragment, 0),
    );
}

/// An agent that is dead, or has given up, holds no fragments.
fn early_without_agent(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (_, world) = established(cast);
    let question = parts(&long(cast, cast.client, cast.frontend));
    // An agent that is dead holds none: it is not known whose they are.
    for (age, is_kept) in [(HEARTBEAT_TICKS - 1, true), (HEARTBEAT_TICKS + 2, false)] {
        let world = world.clone().said_to_keep_fragments(age);
        let name = format!(
            "{title}: a fragment that comes first, {age} ticks after the agent said that it keeps such"
        );
        table.add(if is_kept {
            held(name, &world, Program::Ingress, EDGE, &question[1])
        } else {
            case(name)
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&question[1])
                .reason(Reason::Fragment, 0)
        });
    }
    // The agent has given up.
    let untouched = world.clone().fragments(told(cast, cast.client, cast.frontend, false, 1));
    table.add(
        cast.case("a fragment that has waited in vain")
            .world(&untouched)
            .tc_ingress(EDGE)
            .sends(&question[1])
            .reason(Reason::Fragment, 0),
    );
}

/// Fragments that concern no Service pass.
fn early_of_strangers(table: &mut Table, cast: &Cast) {
    let (_, world) = established(cast);
    let stranger = parts(&long(cast, cast.client, cast.client));
    for (index, fragment) in stranger.iter().enumerate() {
        for program in [Program::Ingress, Program::Egress] {
            table.add(
                cast.case(format!("a stranger's fragment {index}, {}", program.name()))
                    .world(&world)
                    .at(program, EDGE)
                    .sends(fragment),
            );
        }
    }
}

fn masqueraded(table: &mut Table, cast: &Cast) {
    for (what, place) in [("remote", REMOTE), ("overlay", OVERLAY), ("local", LOCAL)] {
        let (cast, world) = place.set(&cast.client_in(NET_PODS));
        let near = place.masqueraded(&cast).state(state::ESTABLISHED);
        let mut far = place.source(&cast).state(state::ESTABLISHED);
        if cast.protocol == SCTP {
            far.seen_as.set_port(cast.client.port());
        }
        let node = far.seen_as;
        let world =
            world.own_device().flows(near.both()).flows(far.both()).marks(mark::MASQUERADED);
        let (leaving, sent) = place.out(long(&cast, cast.client, cast.backend));
        let (coming, answer) = on(place.device, long(&cast, cast.backend, node));
        let question = long(&cast, cast.client, cast.frontend);
        let returned = long(&cast, cast.backend, cast.client);
        for (which, program, ifindex, ends, frame, becomes, counts) in [
            (
                "a masqueraded packet that comes in",
                Program::Ingress,
                EDGE,
                (cast.client, cast.frontend),
                question.clone(),
                question.to(cast.backend),
                Some(false),
            ),
            (
                "a masqueraded packet that leaves",
                leaving,
                place.device,
                (cast.client, cast.backend),
                sent.clone(),
                sent.from(node),
                None,
            ),
            (
                "a masqueraded reply that comes in",
                coming,
                place.device,
                (cast.backend, node),
                answer.clone(),
                answer.to(cast.client),
                None,
            ),
            (
                "a masqueraded reply that leaves",
                Program::Egress,
                EDGE,
                (cast.backend, cast.client),
                returned.clone(),
                returned.from(cast.frontend),
                Some(true),
            ),
        ] {
            let translated = (frame, becomes, counts);
            masqueraded_part(
                table,
                &cast,
                &world,
                (&format!("{which}, {what}"), program, ifindex),
                ends,
                translated,
            );
        }
    }
}

/// Returns a packet of a masqueraded flow in two fragments, at one of its hooks.
fn masqueraded_part(
    table: &mut Table,
    cast: &Cast,
    world: &World,
    (which, program, ifindex): (&str, Program, u32),
    ends: (SocketAddr, SocketAddr),
    (frame, becomes, counts): (Frame, Frame, Option<bool>),
) {
    let title = cast.title();
    let (from, to) = (parts(&frame), parts(&becomes));
    let entry = told(cast, ends.0, ends.1, true, 0);
    for (index, before) in [(0, world.clone()), (1, world.clone().fragments(entry.clone()))] {
        let case = cast
            .case(format!("fragment {index} of {which}"))
            .world(&before)
            .at(program, ifindex)
            .sends(&from[index])
            .becomes(&to[index])
            .fragments(entry.clone());
        table.add(match counts {
            None => case,
            Some(false) => case.forward(ONE),
            Some(true) => case.reply(ONE),
        });
    }
    let name = format!("{title}: a later fragment that comes first waits, {which}");
    table.add(held(name, world, program, ifindex, &from[1]));
    if counts.is_none() {
        table.add(
            cast.case(format!("while nobody was masqueraded, a fragment of {which}"))
                .world(&world.clone().marks(0))
                .at(program, ifindex)
                .sends(&from[1]),
        );
    }
}

fn node_ports(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let mut world = cast.world().own_device();
    world.serve_node_ports(cast.node);
    let node = |port| SocketAddr::new(cast.node, port);
    let other = parts(&long(cast, cast.client, node(30_000)).at(mac(UPLINK)));
    // Only the first fragment shows whether its destination is a node port.
    let name = format!("{title}: a fragment to the node that comes first waits");
    table.add(held(name, &world, Program::Ingress, UPLINK, &other[1]));
    let untouched = told(cast, cast.client, node(0), false, 0);
    table.add(
        cast.case("a first fragment to the node itself")
            .world(&world)
            .tc_ingress(UPLINK)
            .sends(&other[0])
            .fragments(untouched.clone()),
    );
    table.add(
        cast.case("another fragment to the node itself")
            .world(&world.fragments(untouched))
            .tc_ingress(UPLINK)
            .sends(&other[1]),
    );
}

/// Datagrams of other shapes.
fn shapes(table: &mut Table, cast: &Cast) {
    let (connection, world) = established(cast);
    let entry = told(cast, cast.client, cast.frontend, true, 0);
    let question = long(cast, cast.client, cast.frontend);
    let shaped: Vec<(&str, Frame)> = match cast.version {
        Version::V4 => vec![("options", question.clone().options(&[1; 8]))],
        Version::V6 => {
            vec![("hop-by-hop options", question.clone().extension(0, &[0, 0, 1, 4, 0, 0, 0, 0]))]
        }
    };
    let tagged = [("a VLAN tag in band", question.clone().tag(0x8100, 0x2064))];
    for (what, frame) in shaped.into_iter().chain(tagged) {
        let (from, to) = (parts(&frame), parts(&frame.clone().to(cast.backend)));
        table.add(
            cast.case(format!("a first fragment with {what}"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&from[0])
                .becomes(&to[0])
                .forward(ONE)
                .flows([connection.both()])
                .fragments(entry.clone()),
        );
        let world = world.clone().fragments(entry.clone());
        table.add(
            cast.case(format!("another fragment with {what}"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&from[1])
                .becomes(&to[1])
                .forward(ONE),
        );
    }
}

/// A fragment that is too long for Sluice's own device.
fn too_long(table: &mut Table, cast: &Cast) {
    let (_, world) = established(cast);
    // It is too long for Sluice's own device.
    let large = Frame::udp(cast.client, cast.frontend, &[0x5a; 4_000]).fragments(ID, 1_600);
    assert!(large[1].length() > HELD_LENGTH_MAX, "longer than can be held");
    table.add(
        cast.case("a fragment that comes first and is too long to wait")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&large[1])
            .reason(Reason::Fragment, 0),
    );
}

/// IPv6 extension headers behind the fragment header.
fn extensions_behind(table: &mut Table, cast: &Cast) {
    let (_, world) = established(cast);
    let question = long(cast, cast.client, cast.frontend);
    if cast.version == Version::V6 {
        // Extension headers behind the fragment header: the later fragments do not show that it is
        // UDP.
        let options = [&[17, 0, 1, 4, 0, 0, 0, 0][..], &question.payload_bytes()].concat();
        let first = question.part(ID, 0, true, 60, &options[..24]);
        let mut untouched = told(cast, cast.client, cast.frontend, false, 0);
        let (mut key, ports) = untouched.pop_first().expect("one");
        key.protocol = 60;
        let untouched = Datagrams::from([(key, ports)]);
        table.add(
            cast.case("a first fragment with extension headers behind the fragment header")
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&first)
                .reason(Reason::Fragment, 0)
                .fragments(untouched),
        );
        let other = question.part(ID, 24, false, 60, &options[24..]);
        table.add(
            cast.case("another fragment with extension headers behind the fragment header")
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&other)
                .reason(Reason::Fragment, 0),
        );
    }
}

/// A fragment is matched to the right datagram.
fn stale(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (_, world) = established(cast);
    let question = parts(&long(cast, cast.client, cast.frontend));
    let entry = |seen| told(cast, cast.client, cast.frontend, true, seen);
    let with = |entry: Datagrams| world.clone().fragments(entry);
    let translated = parts(&long(cast, cast.client, cast.frontend).to(cast.backend));
    table.add(
        cast.case("a fragment of a datagram that has long been under way")
            .world(&with(entry(DATAGRAM_TICKS - 1)))
            .tc_ingress(EDGE)
            .sends(&question[1])
            .becomes(&translated[1])
            .forward(ONE),
    );
    let name = format!("{title}: a fragment of another datagram with the same identification");
    table.add(held(name, &with(entry(DATAGRAM_TICKS + 2)), Program::Ingress, EDGE, &question[1]));
    let other = long(cast, cast.client, cast.frontend).fragments(ID + 1, 24);
    let name = format!("{title}: a fragment with another identification");
    table.add(held(name, &with(entry(0)), Program::Ingress, EDGE, &other[1]));
    let elsewhere = parts(&long(cast, cast.client, cast.other_frontend));
    let name = format!("{title}: a fragment to another address with the same identification");
    table.add(held(name, &with(entry(0)), Program::Ingress, EDGE, &elsewhere[1]));
    // A datagram of a connection whose reply entry is a hairpin's or a direct connection's goes its
    // own way.
    let direct = cast.connection().state(state::ESTABLISHED).flags(flow::LOCAL).age(3);
    let world = cast.world().flows(direct.forward()).fragments(entry(0));
    table.add(
        cast.case("a fragment whose reply's entry is lost makes none")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&question[1])
            .becomes(&translated[1])
            .forward(ONE),
    );
}

/// Fragments to a service without backends.
fn unserved(table: &mut Table, cast: &Cast) {
    let world = cast.world().own_device();
    let question = parts(&long(cast, cast.client, cast.empty));
    let untouched = told(cast, cast.client, cast.empty, false, 0);
    table.add(
        cast.case("a first fragment to a service without backends")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&question[0])
            .becomes(&super::reject::unreachable(&question[0]).turned())
            .ends(End::Redirect)
            .reason(Reason::NoBackendUnreachable, EMPTY)
            .fragments(untouched.clone()),
    );
    table.add(
        cast.case("another fragment to a service without backends is not answered")
            .world(&world.fragments(untouched))
            .tc_ingress(EDGE)
            .sends(&question[1])
            .reason(Reason::Fragment, 0),
    );
}

/// SCTP whose port changes cannot be translated in fragments.
fn remapped(table: &mut Table, cast: &Cast) {
    let (connection, world) = established(cast);
    let question = parts(&long(cast, cast.client, cast.frontend));
    let mut case = cast
        .case("a first fragment whose port would change")
        .world(&world)
        .tc_ingress(EDGE)
        .sends(&question[0])
        .dropped(Reason::RewriteFailed, ONE)
        .flows([connection.both()])
        .fragments(told(cast, cast.client, cast.frontend, false, 0));
    // The addresses are written before the failure shows.
    case.expected.frame = question[0].clone().to(cast.backend).bytes();
    table.add(case);
    let received = question[0].clone().at(mac(NARROW));
    table.add(
        cast.case("a first fragment whose port would change is left to tc")
            .world(&world)
            .xdp(NARROW)
            .sends(&received),
    );
}
