//! This host as the client: its sockets' untranslated packets are seen where their route leaves.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{backend, flow, state};
use sluice_common::path::mark;

use super::Table;
use super::clash::{of_host, of_host_at};
use crate::packets::case::{Case, End, Program};
use crate::packets::frame::{ACK, Frame, SYN, TCP};
use crate::packets::world::{
    Cast, Connection, NARROW_MTU, NET_NARROW, NET_REMOTE, NET_SHORT, NET_UNROUTED, ONE, OWN,
    TUNNEL, UPLINK, World, address, mac, tuple,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        question(table, &cast);
        answer(table, &cast);
        answer_elsewhere(table, &cast);
        own(table, &cast);
    }
}

fn connection(cast: &Cast) -> Connection {
    of_host(cast, cast.connection())
}

/// Returns a world in which the backend has another address.
pub(crate) fn moved(cast: &Cast, net: u8) -> (World, SocketAddr) {
    let mut world = cast.world();
    let at = SocketAddr::new(address(cast.version, net, 3), cast.backend.port());
    world.add_backend(cast, ONE, ONE, at);
    (world, at)
}

fn question(table: &mut Table, cast: &Cast) {
    let connection = connection(cast);
    let first = cast.first(connection.client, cast.frontend);
    for (program, frame) in
        [(Program::Egress, first.clone()), (Program::EgressL3, first.clone().l3())]
    {
        // A test run takes the ethertype of a packet without a link header from its source address.
        let ifindex = if program == Program::Egress { UPLINK } else { TUNNEL };
        table.add(
            cast.case(format!("the host's own packet goes where the FIB says, {}", program.name()))
                .world(&cast.world())
                .at(program, ifindex)
                .sends(&frame)
                .routed(&frame.clone().from(connection.seen_as).to(cast.backend))
                .opens(ONE)
                .embryonic([connection.both()])
                .marks(mark::HOST),
        );
    }
    // A direct connection of another socket to the same backend.
    let mut world = cast.world();
    let _ = world.held.insert(tuple(cast.backend, connection.seen_as, cast.protocol));
    let second = of_host_at(cast, cast.connection(), 2);
    table.add(
        cast.case(
            "a socket of this host speaks to the backend from the port of the host's own packet",
        )
        .world(&world)
        .tc_egress(UPLINK)
        .sends(&first)
        .routed(&first.clone().from(second.seen_as).to(cast.backend))
        .opens(ONE)
        .embryonic([second.both()])
        .marks(mark::HOST),
    );
    let (world, at) = moved(cast, NET_UNROUTED);
    let unrouted = Connection { backend: at, ..connection };
    table.add(
        cast.case("the host's own packet to a backend without a route")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&first)
            .dropped(Reason::NoRoute, ONE)
            .embryonic([unrouted.both()])
            .marks(mark::HOST),
    );
    for (what, net) in [("the device's", NET_NARROW), ("the route's", NET_SHORT)] {
        sizes(table, cast, connection, what, net);
    }
}

/// Packets that just fit an MTU, and others that do not.
fn sizes(table: &mut Table, cast: &Cast, connection: Connection, what: &str, net: u8) {
    let (world, at) = moved(cast, net);
    let narrow = Connection { backend: at, ..connection };
    let fits = NARROW_MTU as usize
        - if cast.client.is_ipv4() { 20 } else { 40 }
        - if cast.protocol == TCP { 20 } else { 8 };
    let sized = |bytes: usize| match cast.protocol {
        TCP => Frame::tcp(connection.client, cast.frontend, SYN, &vec![0xab; bytes]),
        _ => Frame::udp(connection.client, cast.frontend, &vec![0xab; bytes]),
    };
    let frame = sized(fits);
    table.add(
        cast.case(format!("the host's own packet just fits {what} MTU"))
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&frame)
            .becomes(&frame.clone().from(narrow.seen_as).to(at))
            .ends(End::Redirect)
            .opens(ONE)
            .embryonic([narrow.both()])
            .marks(mark::HOST),
    );
    let mut frame = sized(fits + 1);
    let kind = if cast.client.is_ipv4() { (3, 4) } else { (2, 0) };
    let answer = super::reject::error(&frame, kind, NARROW_MTU).at(mac(UPLINK));
    table.add(
        cast.case(format!("the host's own packet is one byte too big for {what} MTU"))
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&frame)
            .becomes(&answer)
            .ends(End::Redirect)
            .reason(Reason::TooBig, ONE)
            .embryonic([narrow.both()])
            .marks(mark::HOST),
    );
    if cast.client.is_ipv4() {
        frame.fragment = 0;
        table.add(
            cast.case(format!("the same where it may be fragmented, {what} MTU"))
                .world(&world)
                .tc_egress(UPLINK)
                .sends(&frame)
                .dropped(Reason::TooBig, ONE)
                .embryonic([narrow.both()])
                .marks(mark::HOST),
        );
    }
}

/// Replies to this host are injected where their route leaves.
fn answer(table: &mut Table, cast: &Cast) {
    let cast = &cast.backend_in(NET_REMOTE);
    let connection = connection(cast);
    let world = cast.world().embryonic(connection.both()).marks(mark::HOST);
    let frame = match cast.protocol {
        TCP => Frame::tcp(cast.backend, connection.seen_as, SYN | ACK, &[]),
        _ => Frame::udp(cast.backend, connection.seen_as, b"answer"),
    };
    let proven = |case: Case| match cast.protocol {
        TCP => case.reply(ONE).embryonic([connection.answered().both()]),
        _ => case.reply(ONE).embryonic([connection.state(state::ESTABLISHED).both()]),
    };
    let received = frame.clone().at(mac(UPLINK));
    let translated = received.clone().from(cast.frontend).to(connection.client);
    table.add(proven(
        cast.case("a reply to this host is handed in where its route leaves")
            .world(&world)
            .tc_ingress(UPLINK)
            .sends(&received)
            .becomes(&translated.clone().at(mac(OWN)))
            .ends(End::Redirect),
    ));
    let mut framed = translated.clone().at(mac(OWN));
    framed.link.as_mut().expect("a link header").source = mac(OWN);
    table.add(proven(
        cast.case("a reply to this host from a device without a link header gets one")
            .world(&world)
            .tc_ingress_l3(TUNNEL)
            .sends(&frame.clone().l3())
            .becomes(&framed)
            .ends(End::Redirect),
    ));
    let received = frame.clone().at(mac(OWN));
    table.add(proven(
        cast.case("a reply to this host comes where its route leaves")
            .world(&world)
            .tc_ingress(OWN)
            .sends(&received)
            .becomes(&received.clone().from(cast.frontend).to(connection.client)),
    ));
}

/// Replies that are left alone.
fn answer_elsewhere(table: &mut Table, cast: &Cast) {
    let cast = &cast.backend_in(NET_REMOTE);
    let connection = connection(cast);
    let frame = match cast.protocol {
        TCP => Frame::tcp(cast.backend, connection.seen_as, SYN | ACK, &[]),
        _ => Frame::udp(cast.backend, connection.seen_as, b"answer"),
    };
    let received = frame.at(mac(UPLINK));
    let never = cast.world().embryonic(connection.both());
    table.add(
        cast.case("nothing was ever translated for this host")
            .world(&never)
            .tc_ingress(UPLINK)
            .sends(&received),
    );
    let proven = cast.world().flows(connection.state(state::ESTABLISHED).both()).marks(mark::HOST);
    table.add(
        cast.case("a reply to this host seen at an egress")
            .world(&proven)
            .tc_egress(UPLINK)
            .sends(&received),
    );
}

/// A backend that is this host itself.
fn own(table: &mut Table, cast: &Cast) {
    let at = SocketAddr::new(cast.node, cast.backend.port());
    let mut world = cast.world();
    world.add_backend(cast, ONE, ONE, at);
    let world = world.backend_flags(ONE, backend::SERVING | backend::LOCAL | backend::HOST);
    let mirror = SocketAddr::new(cast.frontend.ip(), 40_001);
    let connection = Connection {
        backend: at,
        seen_as: mirror,
        flags: flow::HOST | flow::LOCAL | flow::HAIRPIN,
        ..connection(cast)
    };
    let first = cast.first(connection.client, cast.frontend);
    table.add(
        cast.case("this host is its own backend: handed in where the packet leaves")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&first)
            .becomes(&first.clone().from(mirror).to(at).at(mac(UPLINK)))
            .ends(End::Redirect)
            .opens(ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST),
    );
    let proven = connection.state(state::ESTABLISHED);
    let world = world.flows(proven.both()).marks(mark::HOST);
    let answer = cast.next(at, mirror);
    table.add(
        cast.case("this host's answer to itself is handed in too")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&answer)
            .becomes(&answer.clone().from(cast.frontend).to(connection.client).at(mac(UPLINK)))
            .ends(End::Redirect)
            .reply(ONE),
    );
}
