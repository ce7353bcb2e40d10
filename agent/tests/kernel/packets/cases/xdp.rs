//! The frames that XDP handles, and those that it leaves to tc unmodified.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{backend, flow, state};
use sluice_common::path::mark;

use super::Table;
use crate::packets::frame::{ACK, Frame, RST, Sum, TCP};
use crate::packets::world::{Cast, Connection, EDGE, NARROW, ONE, UPLINK, World, mac};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        taken(table, &cast);
        left(table, &cast);
        left_frames(table, &cast);
        left_clients(table, &cast);
        left_ethertype(table, &cast);
    }
}

fn taken(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    table.cut(
        cast.case("XDP opens a flow to a backend on this node")
            .world(&cast.world())
            .xdp(UPLINK)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([connection.both()]),
    );
    let next = cast.next(cast.client, cast.frontend).at(mac(UPLINK));
    let translated = next.clone().to(cast.backend);
    let proven = connection.state(state::ESTABLISHED);
    for (what, age) in [("a young", 4), ("an old", 40)] {
        let after = if age < 9 { proven.age(age) } else { proven };
        let world = cast.world().flows(proven.age(age).both());
        table.add(
            cast.case(format!("XDP takes a packet of {what} flow"))
                .world(&world)
                .xdp(UPLINK)
                .sends(&next)
                .becomes(&translated)
                .forward(ONE)
                .flows([after.both()]),
        );
    }
    if cast.protocol == TCP {
        table.add(
            cast.case("XDP takes a client's second packet")
                .world(&cast.world().embryonic(connection.both()))
                .xdp(UPLINK)
                .sends(&next)
                .becomes(&translated)
                .forward(ONE),
        );
        table.add(
            cast.case("XDP makes lost entries again")
                .world(&cast.world())
                .xdp(UPLINK)
                .sends(&next)
                .becomes(&translated)
                .reason(Reason::Recovered, ONE)
                .embryonic([connection.both()]),
        );
    }
}

/// Packets that XDP leaves to tc: backends elsewhere, and checksums.
fn left(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    let mut leave = |what: &str, world: &World, ifindex, frame: &Frame| {
        table.add(cast.case(format!("XDP leaves {what}")).world(world).xdp(ifindex).sends(frame));
    };
    let far = cast.world().backend_flags(ONE, backend::SERVING);
    leave("a packet for a backend on another node", &far, UPLINK, &first);
    leave(
        "a packet whose checksum is left to the device",
        &cast.world(),
        UPLINK,
        &first.clone().sum(Sum::Partial),
    );
    let proven = cast.world().flows(connection.state(state::ESTABLISHED).age(40).both());
    let next = cast.next(cast.client, cast.frontend).at(mac(UPLINK));
    leave(
        "a known flow's packet whose checksum is left to the device",
        &proven,
        UPLINK,
        &next.sum(Sum::Partial),
    );
}

/// Frames for others, and frames of unknown devices.
fn left_frames(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    let mut leave = |what: &str, world: &World, ifindex, frame: &Frame| {
        table.add(cast.case(format!("XDP leaves {what}")).world(world).xdp(ifindex).sends(frame));
    };
    leave("a frame for another host", &cast.world(), UPLINK, &first.clone().at([2, 9, 9, 9, 9, 9]));
    leave(
        "a frame for another device of this host",
        &cast.world(),
        UPLINK,
        &first.clone().at(mac(EDGE)),
    );
    leave("a frame to everybody", &cast.world(), UPLINK, &first.clone().at([0xff; 6]));
    let mut unknown = cast.world();
    let _ = unknown.devices.remove(&NARROW);
    leave(
        "a frame of a device that is not known",
        &unknown,
        NARROW,
        &first.clone().at(mac(NARROW)),
    );
}

/// Clients that are their own backend, this host, resets and strangers.
fn left_clients(table: &mut Table, cast: &Cast) {
    let mut leave = |what: &str, world: &World, ifindex, frame: &Frame| {
        table.add(cast.case(format!("XDP leaves {what}")).world(world).xdp(ifindex).sends(frame));
    };
    let itself = SocketAddr::new(cast.backend.ip(), 40_001);
    let hairpin = cast.first(itself, cast.frontend).at(mac(UPLINK));
    leave("a client that is its own backend", &cast.world(), UPLINK, &hairpin);
    let client = SocketAddr::new(cast.node, 40_001);
    let host = Connection {
        client,
        seen_as: client,
        flags: flow::HOST | flow::LOCAL,
        ..cast.connection()
    };
    let world = cast.world().flows(host.state(state::ESTABLISHED).both()).marks(mark::HOST);
    leave("a reply to this host", &world, UPLINK, &cast.next(cast.backend, client).at(mac(UPLINK)));
    if cast.protocol == TCP {
        let reset = Frame::tcp(cast.client, cast.backend, RST, &[]).at(mac(UPLINK));
        leave("a reset that shows a lost reply entry", &cast.world(), UPLINK, &reset);
        let reset = Frame::tcp(cast.client, cast.backend, RST | ACK, &[]).at(mac(UPLINK));
        leave("a reset that shows nothing", &cast.world(), UPLINK, &reset);
    }
    let mut stranger = cast.frontend;
    stranger.set_ip(cast.router);
    leave("a stranger", &cast.world(), UPLINK, &cast.first(cast.client, stranger).at(mac(UPLINK)));
}

/// A frame of another ethertype.
fn left_ethertype(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    let arp = [&mac(UPLINK)[..], &[2, 0, 0, 0, 0, 5], &[0x08, 0x06], &[0; 46]].concat();
    let mut case = cast
        .case("XDP leaves a frame of another ethertype")
        .world(&cast.world())
        .xdp(UPLINK)
        .sends(&first);
    case.input.clone_from(&arp);
    case.expected.frame = arp;
    table.add(case);
}
