//! ICMP errors about translated packets.

use std::net::{IpAddr, SocketAddr};

use sluice_common::Reason;
use sluice_common::abi::state;

use super::Table;
use crate::packets::case::Program;
use crate::packets::frame::{Frame, Payload, Sum, TCP, UDP};
use crate::packets::world::{Cast, EDGE, ONE, TUNNEL, UPLINK, Version, World, mac};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        kinds(table, &cast);
        error_shapes(table, &cast);
        quotes(table, &cast);
        not_ours(table, &cast);
        remapped(table, &cast);
    }
}

fn world(cast: &Cast) -> World {
    cast.world().flows(cast.connection().state(state::ESTABLISHED).both())
}

/// Returns name, type and code, and the word behind the checksum.
fn errors(version: Version) -> Vec<(&'static str, (u8, u8), u32)> {
    match version {
        Version::V4 => vec![
            ("port unreachable", (3, 3), 0),
            ("fragmentation needed", (3, 4), 1280),
            ("source quench", (4, 0), 0),
            ("time exceeded", (11, 0), 0),
            ("parameter problem", (12, 0), 0x0400_0000),
        ],
        Version::V6 => vec![
            ("port unreachable", (1, 4), 0),
            ("packet too big", (2, 0), 1280),
            ("time exceeded", (3, 0), 0),
            ("parameter problem", (4, 0), 6),
        ],
    }
}

/// Returns an error on its way to the client, about a packet as the backend sees it, and the error
/// that the client must see.
fn about_question(
    cast: &Cast,
    from: IpAddr,
    (kind, rest): ((u8, u8), u32),
    quoted: &Frame,
    bytes: usize,
) -> [Frame; 2] {
    let shown = if from == cast.backend.ip() { cast.frontend.ip() } else { from };
    let seen = quoted.clone().to(cast.frontend);
    let cut = |frame: &Frame| frame.packet()[..bytes].to_vec();
    [
        Frame::icmp(from, cast.client.ip(), kind, rest, &cut(quoted)),
        Frame::icmp(shown, cast.client.ip(), kind, rest, &cut(&seen)),
    ]
}

/// Returns an error on its way to the frontend, about a reply as the client sees it, and the error
/// that the backend must see.
fn about_reply(
    cast: &Cast,
    from: IpAddr,
    (kind, rest): ((u8, u8), u32),
    quoted: &Frame,
    bytes: usize,
) -> [Frame; 2] {
    let sent = quoted.clone().from(cast.backend);
    let cut = |frame: &Frame| frame.packet()[..bytes].to_vec();
    [
        Frame::icmp(from, cast.frontend.ip(), kind, rest, &cut(quoted)),
        Frame::icmp(from, cast.backend.ip(), kind, rest, &cut(&sent)),
    ]
}

fn add_pair(
    table: &mut Table,
    cast: &Cast,
    name: &str,
    [error, becomes]: [Frame; 2],
    program: Program,
    ifindex: u32,
) {
    let case = cast
        .case(name)
        .world(&world(cast))
        .at(program, ifindex)
        .sends(&error)
        .becomes(&becomes)
        .reason(Reason::IcmpError, ONE);
    table.add(case);
}

/// Kinds of errors, about requests and about replies.
fn kinds(table: &mut Table, cast: &Cast) {
    let question = cast.next(cast.client, cast.backend);
    let reply = cast.next(cast.frontend, cast.client);
    for (what, kind, rest) in errors(cast.version) {
        for (who, from) in [("a router", cast.router), ("the backend", cast.backend.ip())] {
            let pair =
                about_question(cast, from, (kind, rest), &question, question.length() as usize);
            add_pair(
                table,
                cast,
                &format!("{what} from {who} about a packet to the backend"),
                pair,
                Program::Egress,
                EDGE,
            );
        }
        for (who, from) in [("a router", cast.router), ("the client", cast.client.ip())] {
            let pair = about_reply(cast, from, (kind, rest), &reply, reply.length() as usize);
            let pair = pair.map(|frame| frame.at(mac(UPLINK)));
            add_pair(
                table,
                cast,
                &format!("{what} from {who} about a reply"),
                pair,
                Program::Ingress,
                UPLINK,
            );
        }
        let [error, _] =
            about_reply(cast, cast.router, (kind, rest), &reply, reply.length() as usize);
        table.add(
            cast.case(format!("{what} is left to tc"))
                .world(&world(cast))
                .xdp(UPLINK)
                .sends(&error.at(mac(UPLINK))),
        );
    }
}

/// Errors of every length, without a link header, and with a VLAN tag.
fn error_shapes(table: &mut Table, cast: &Cast) {
    let question = cast.next(cast.client, cast.backend);
    let reply = cast.next(cast.frontend, cast.client);
    let (_, kind, rest) = errors(cast.version)[1];
    let pair = about_question(
        cast,
        cast.backend.ip(),
        (kind, rest),
        &question,
        question.length() as usize,
    );
    let [error, becomes] = pair.clone();
    table.cut(
        cast.case("an error with every length")
            .world(&world(cast))
            .tc_egress(EDGE)
            .sends(&error)
            .becomes(&becomes)
            .reason(Reason::IcmpError, ONE),
    );
    let name = "an error about a packet to the backend, without a link header";
    add_pair(table, cast, name, pair.map(Frame::l3), Program::EgressL3, TUNNEL);
    let pair = about_reply(cast, cast.client.ip(), (kind, rest), &reply, reply.length() as usize);
    add_pair(
        table,
        cast,
        "an error about a reply, without a link header",
        pair.clone().map(Frame::l3),
        Program::IngressL3,
        TUNNEL,
    );
    let tagged = pair.map(|frame| frame.tag(0x8100, 7).at(mac(UPLINK)));
    add_pair(
        table,
        cast,
        "an error about a reply, with a VLAN tag",
        tagged.clone(),
        Program::Ingress,
        UPLINK,
    );
    let [error, _] = tagged;
    table.add(cast.case("an error is left to tc").world(&world(cast)).xdp(UPLINK).sends(&error));
}

/// Quotes of all lengths: those that are too short are passed, longer ones are translated.
fn quotes(table: &mut Table, cast: &Cast) {
    let (_, kind, rest) = errors(cast.version)[0];
    let question = cast.next(cast.client, cast.backend);
    let network = if cast.version == Version::V4 { 20 } else { 40 };
    for bytes in 0..=question.length() as usize {
        let [error, mut becomes] =
            about_question(cast, cast.router, (kind, rest), &question, bytes);
        // Half a checksum cannot be read, so that byte stays.
        if cast.protocol == TCP
            && bytes == network + 17
            && let (Payload::Icmp { quote, .. }, Payload::Icmp { quote: old, .. }) =
                (&mut becomes.payload, &error.payload)
        {
            quote[bytes - 1] = old[bytes - 1];
        }
        let case = cast
            .case(format!("an error that quotes {bytes} bytes"))
            .world(&world(cast))
            .tc_egress(EDGE)
            .sends(&error);
        table.add(if bytes < network + 8 {
            case
        } else {
            case.becomes(&becomes).reason(Reason::IcmpError, ONE)
        });
    }
    if cast.protocol == UDP {
        let silent = question.sum(Sum::Absent);
        let pair =
            about_question(cast, cast.router, (kind, rest), &silent, silent.length() as usize);
        add_pair(
            table,
            cast,
            "an error that quotes a datagram without checksum",
            pair,
            Program::Egress,
            EDGE,
        );
        let silent = cast.next(cast.frontend, cast.client).sum(Sum::Absent);
        let pair = about_reply(cast, cast.client.ip(), (kind, rest), &silent, network + 8);
        let pair = pair.map(|frame| frame.at(mac(UPLINK)));
        add_pair(
            table,
            cast,
            "an error that quotes a reply without checksum",
            pair,
            Program::Ingress,
            UPLINK,
        );
    }
}

fn not_ours(table: &mut Table, cast: &Cast) {
    let question = cast.next(cast.client, cast.backend);
    let reply = cast.next(cast.frontend, cast.client);
    let (_, kind, rest) = errors(cast.version)[0];
    let all = |frame: &Frame| frame.length() as usize;
    let [direct, _] = about_question(cast, cast.router, (kind, rest), &question, all(&question));
    let mut pass = |what: &str, world: &World, program, frame: &Frame| {
        table.add(cast.case(what).world(world).at(program, EDGE).sends(frame));
    };
    pass("an error about a direct packet", &cast.world(), Program::Egress, &direct);
    let [unknown, _] = about_reply(cast, cast.client.ip(), (kind, rest), &reply, all(&reply));
    pass("an error about a reply of no flow", &cast.world(), Program::Ingress, &unknown);
    let [entering, _] = about_question(cast, cast.router, (kind, rest), &question, all(&question));
    pass(
        "an error about a question enters where the backend is",
        &world(cast),
        Program::Ingress,
        &entering,
    );
    let redirect = if cast.version == Version::V4 { (5, 1) } else { (137, 0) };
    let [redirect, _] = about_reply(cast, cast.router, (redirect, 0), &reply, all(&reply));
    pass("a redirect", &world(cast), Program::Ingress, &redirect);
    let mut later = reply.clone();
    if cast.version == Version::V4 {
        later.fragment = 0x0010;
    } else {
        later = later.extension(44, &[0, 0, 0, 0x80, 0, 0, 0, 7]);
    }
    let [later, _] = about_reply(cast, cast.client.ip(), (kind, rest), &later, all(&later));
    pass("an error about a later fragment", &world(cast), Program::Ingress, &later);
    let nested = Frame::icmp(cast.frontend.ip(), cast.client.ip(), kind, 0, b"quote of a quote");
    let [nested, _] = about_reply(cast, cast.client.ip(), (kind, rest), &nested, all(&nested));
    pass("an error about an error", &world(cast), Program::Ingress, &nested);
}

/// The client's port was changed, and the error quotes the changed one.
fn remapped(table: &mut Table, cast: &Cast) {
    let seen_as = SocketAddr::new(cast.client.ip(), 1024);
    let connection = cast.other_connection().state(state::ESTABLISHED).seen_as(seen_as);
    let (_, kind, rest) = errors(cast.version)[0];
    let question = cast.next(seen_as, cast.backend);
    let shown = cast.next(cast.client, cast.other_frontend);
    let error = Frame::icmp(cast.router, cast.client.ip(), kind, rest, &question.packet());
    let becomes = Frame::icmp(cast.router, cast.client.ip(), kind, rest, &shown.packet());
    let id = connection.id;
    table.add(
        cast.case("an error about a packet whose source port was changed")
            .world(&cast.world().flows(connection.both()))
            .tc_egress(EDGE)
            .sends(&error)
            .becomes(&becomes)
            .reason(Reason::IcmpError, id),
    );
}
