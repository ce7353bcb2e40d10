//! Flows that are opened and never begin: refused, or answered by an ICMP error.

use sluice_common::abi::state;
use sluice_common::{Failure, Reason};

use super::Table;
use crate::packets::frame::{ACK, Frame, RST, TCP};
use crate::packets::world::{Cast, Connection, EDGE, NET_FORGED, NET_PODS, ONE, UPLINK, Version};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::of(TCP) {
        refused(table, &cast);
    }
    for cast in Cast::all() {
        unreachable(table, &cast);
        other_errors(table, &cast);
        counted_already(table, &cast);
        forged(table, &cast);
    }
}

/// A reset of the endpoint is a failure only before its first answer.
fn refused(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let reset = Frame::tcp(cast.backend, cast.client, RST | ACK, &[]);
    let aborted = connection.state(state::RESET_FORWARD);
    let after = connection.state(state::RESET_FORWARD | state::RESET_REPLY);
    table.add(
        cast.case("the backend refuses a client that has given up")
            .world(&cast.world().embryonic(aborted.both()))
            .tc_egress(EDGE)
            .sends(&reset)
            .becomes(&reset.clone().from(cast.frontend))
            .reply(ONE)
            .failed(ONE, Failure::Refused)
            .embryonic([after.both()]),
    );
    let refused = connection.state(state::RESET_REPLY);
    for (what, before, after) in [
        ("has refused before", refused, refused),
        ("has refused long before", refused.age(20), refused),
        (
            "has accepted",
            connection.answered(),
            connection.answered().state(state::ANSWERED | state::RESET_REPLY),
        ),
    ] {
        table.add(
            cast.case(format!("a reset of a backend that {what} is no failure"))
                .world(&cast.world().embryonic(before.both()))
                .tc_egress(EDGE)
                .sends(&reset)
                .becomes(&reset.clone().from(cast.frontend))
                .reply(ONE)
                .embryonic([after.both()]),
        );
    }
}

/// An error of this type and code about a client's packet, as it arrives and as the client sees it.
fn error(cast: &Cast, (kind, code): (u8, u8), is_of_backend: bool) -> [Frame; 2] {
    let from = if is_of_backend { cast.backend.ip() } else { cast.router };
    let shown = if is_of_backend { cast.frontend.ip() } else { cast.router };
    let sent = cast.first(cast.client, cast.backend);
    let seen = cast.first(cast.client, cast.frontend);
    [
        Frame::icmp(from, cast.client.ip(), (kind, code), 0, &sent.packet()),
        Frame::icmp(shown, cast.client.ip(), (kind, code), 0, &seen.packet()),
    ]
}

/// Errors that say that the endpoint cannot be reached.
fn unreachable(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let kinds: &[(u8, u8)] = match cast.version {
        Version::V4 => &[(3, 0), (3, 1), (3, 2), (3, 3), (3, 13)],
        Version::V6 => &[(1, 0), (1, 1), (1, 3), (1, 4), (1, 6)],
    };
    for (kind, code) in kinds {
        for is_of_backend in [true, false] {
            let [error, seen] = error(cast, (*kind, *code), is_of_backend);
            let who = if is_of_backend { "the backend" } else { "a router" };
            table.add(
                cast.case(format!("{who} says unreachable, code {code}, before any answer"))
                    .world(&cast.world().embryonic(connection.both()))
                    .tc_egress(EDGE)
                    .sends(&error)
                    .becomes(&seen)
                    .reason(Reason::IcmpError, ONE)
                    .failed(ONE, Failure::Unreachable)
                    .embryonic([connection.heard(0).both()]),
            );
        }
    }
}

/// Errors that say something else.
fn other_errors(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let kinds: &[(u8, u8)] = match cast.version {
        Version::V4 => &[(3, 4), (4, 0), (11, 0), (12, 0)],
        Version::V6 => &[(2, 0), (3, 0), (4, 0)],
    };
    for (kind, code) in kinds {
        let [error, seen] = error(cast, (*kind, *code), false);
        table.add(
            cast.case(format!("an error of type {kind}, code {code}, is no failure"))
                .world(&cast.world().embryonic(connection.both()))
                .tc_egress(EDGE)
                .sends(&error)
                .becomes(&seen)
                .reason(Reason::IcmpError, ONE),
        );
    }
}

/// An error about a flow that has begun, or whose failure is counted, or that no SYN has opened.
fn counted_already(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let kind = if cast.version == Version::V4 { (3, 3) } else { (1, 4) };
    let [error, seen] = error(cast, kind, true);
    let mut add = |what: &str, before: Connection| {
        table.add(
            cast.case(format!("unreachable is no failure of a flow that {what}"))
                .world(&cast.world().embryonic(before.both()))
                .tc_egress(EDGE)
                .sends(&error)
                .becomes(&seen)
                .reason(Reason::IcmpError, ONE),
        );
    };
    add("has failed", connection.heard(3));
    add("was answered", connection.state(state::ESTABLISHED).heard(3));
    if cast.protocol == TCP {
        add("was accepted", connection.answered());
        add("was refused", connection.state(state::RESET_REPLY).heard(3));
    }
}

/// What somebody else says in the endpoint's name is translated and not counted.
fn forged(table: &mut Table, cast: &Cast) {
    for (net, ifindex) in [(NET_PODS, UPLINK), (NET_FORGED, EDGE)] {
        let cast = cast.backend_in(net);
        let kind = if cast.version == Version::V4 { (3, 3) } else { (1, 4) };
        let [error, seen] = error(&cast, kind, true);
        table.add(
            cast.case(format!("unreachable in the name of an endpoint, by device {ifindex}"))
                .world(&cast.world().embryonic(cast.connection().both()))
                .tc_egress(EDGE)
                .sends(&error)
                .came_by(ifindex)
                .becomes(&seen)
                .reason(Reason::IcmpError, ONE),
        );
    }
}
