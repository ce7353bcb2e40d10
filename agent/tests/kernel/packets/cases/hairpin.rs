//! Clients that are their own backend.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{flow, state};
use sluice_common::path::mark;

use super::Table;
use super::reject::time_exceeded;
use crate::packets::case::End;
use crate::packets::frame::{ACK, Frame, SYN, TCP};
use crate::packets::world::{Cast, Connection, EDGE, NET_OVERLAY, ONE, TUNNEL};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        turned_back(table, &cast);
        turned_back_at_its_end(table, &cast);
        answers_itself(table, &cast);
        quotes_itself(table, &cast);
    }
}

/// Returns the flow of a client that is its own backend, and that sees itself as the frontend.
fn to_itself(cast: &Cast) -> Connection {
    Connection {
        client: SocketAddr::new(cast.backend.ip(), 40_001),
        seen_as: SocketAddr::new(cast.frontend.ip(), 40_001),
        flags: flow::LOCAL | flow::HAIRPIN,
        ..cast.connection()
    }
}

/// The first packet of a client to itself is bounced back to it.
fn turned_back(table: &mut Table, cast: &Cast) {
    let connection = to_itself(cast);
    let Connection { client, seen_as: mirror, .. } = connection;
    let first = cast.first(client, cast.frontend);
    let turned = first.clone().from(mirror).to(cast.backend).ttl(60).turned();
    table.add(
        cast.case("a client that is its own backend is turned back")
            .world(&cast.world())
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&turned)
            .ends(End::Redirect)
            .opens(ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST),
    );
    let bare = cast.backend_in(NET_OVERLAY);
    let of_bare = SocketAddr::new(bare.backend.ip(), client.port());
    table.add(
        cast.case("the same without a link header")
            .world(&bare.world())
            .tc_ingress_l3(TUNNEL)
            .sends(&first.clone().from(of_bare).l3())
            .becomes(&turned.to(bare.backend).l3())
            .ends(End::Redirect)
            .opens(ONE)
            .embryonic([Connection { client: of_bare, backend: bare.backend, ..connection }.both()])
            .marks(mark::HOST),
    );
}

/// The same packet when its TTL ends.
fn turned_back_at_its_end(table: &mut Table, cast: &Cast) {
    let connection = to_itself(cast);
    let client = connection.client;
    let first = cast.first(client, cast.frontend);
    table.add(
        cast.case("the same with a TTL of one")
            .world(&cast.world())
            .tc_ingress(EDGE)
            .sends(&first.clone().ttl(1))
            .becomes(&time_exceeded(&first.clone().ttl(1)).turned())
            .ends(End::Redirect)
            .reason(Reason::TtlExceeded, ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST),
    );
    let mut limited = cast.world();
    let _ = limited.rejects.insert(client.ip(), 100);
    table.add(
        cast.case("the same of a client that had too many answers")
            .world(&limited)
            .tc_ingress(EDGE)
            .sends(&first.clone().ttl(1))
            .dropped(Reason::TtlExceeded, ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST),
    );
}

/// The client's own answers, and packets of its proven flow.
fn answers_itself(table: &mut Table, cast: &Cast) {
    let connection = to_itself(cast);
    let Connection { client, seen_as: mirror, .. } = connection;
    let world = cast.world().embryonic(connection.both());
    let answer = match cast.protocol {
        TCP => Frame::tcp(cast.backend, mirror, SYN | ACK, &[]),
        _ => Frame::udp(cast.backend, mirror, b"odd"),
    };
    let case = cast
        .case("its own answer is turned back to it")
        .world(&world)
        .tc_ingress(EDGE)
        .sends(&answer)
        .becomes(&answer.clone().from(cast.frontend).to(client).ttl(60).turned())
        .ends(End::Redirect)
        .reply(ONE);
    table.add(match cast.protocol {
        TCP => case.embryonic([connection.answered().both()]),
        _ => case.embryonic([connection.state(state::ESTABLISHED).both()]),
    });
    let proven = cast.world().flows(connection.state(state::ESTABLISHED).both());
    let question = cast.next(client, cast.frontend);
    table.add(
        cast.case("a packet of its proven flow")
            .world(&proven)
            .tc_ingress(EDGE)
            .sends(&question)
            .becomes(&question.clone().from(mirror).to(cast.backend).ttl(60).turned())
            .ends(End::Redirect)
            .forward(ONE),
    );
    let entering = question.from(mirror).to(cast.backend);
    table.add(
        cast.case("what was turned back enters the link")
            .world(&proven)
            .tc_egress(EDGE)
            .sends(&entering),
    );
}

/// The client reports that its port is closed, about its own answer.
fn quotes_itself(table: &mut Table, cast: &Cast) {
    let connection = to_itself(cast);
    let Connection { client, seen_as: mirror, .. } = connection;
    let proven = cast.world().flows(connection.state(state::ESTABLISHED).both());
    // The client reports that its port is closed, about its own answer.
    let quoted = Frame::udp(cast.frontend, client, b"quote");
    let quoted = if cast.protocol == TCP {
        Frame::tcp(cast.frontend, client, ACK, b"quote")
    } else {
        quoted
    };
    let kind = if cast.client.is_ipv4() { (3, 3) } else { (1, 4) };
    let error = Frame::icmp(client.ip(), cast.frontend.ip(), kind, 0, &quoted.packet());
    let inner = quoted.from(cast.backend).to(mirror);
    let translated = Frame::icmp(mirror.ip(), cast.backend.ip(), kind, 0, &inner.packet());
    table.add(
        cast.case("an ICMP error from itself to itself")
            .world(&proven)
            .tc_ingress(EDGE)
            .sends(&error)
            .becomes(&translated.ttl(60).turned())
            .ends(End::Redirect)
            .reason(Reason::IcmpError, ONE),
    );
}
