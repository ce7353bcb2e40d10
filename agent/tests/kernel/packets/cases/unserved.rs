//! Ports that a ClusterIP does not define, and Service addresses that no Service has.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{Service, ServiceKey, frontend, listing, networks, state};

use super::Table;
use super::reject::{reset, unreachable};
use crate::packets::case::{End, Program};
use crate::packets::frame::{ACK, FIN, Frame, RST, SYN, TCP, UDP};
use crate::packets::world::{
    Cast, EDGE, NET_CLIENTS, NET_FRONTENDS, NET_REMOTE, ONE, OWN, TUNNEL, UPLINK, Version, World,
    address, mac,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        undefined(table, &cast);
        undefined_elsewhere(table, &cast);
        defined(table, &cast);
        unassigned(table, &cast);
        unassigned_elsewhere(table, &cast);
        unassigned_strangers(table, &cast);
        unassigned_listed(table, &cast);
    }
    for cast in Cast::of(TCP) {
        segments(table, &cast);
    }
    for cast in Cast::of(UDP) {
        let mut world = with_address(&cast);
        let _ = world.rejects.insert(cast.client.ip(), 100);
        let frame = cast.first(cast.client, closed(&cast));
        table.add(
            cast.case("an undefined port, a client that had too many answers")
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&frame)
                .dropped(Reason::RejectLimited, 0),
        );
    }
}

/// Returns a world in which the frontend's address is known to be a ClusterIP.
fn with_address(cast: &Cast) -> World {
    let mut world = cast.world();
    let key = ServiceKey { address: cast.frontend.ip(), port: 0, protocol: 0, reserved: 0 };
    let _ = world.services.insert(key, Service { service_port: 0, kind: frontend::ADDRESS });
    world
}

/// Returns a port that the frontend's Service does not define.
fn closed(cast: &Cast) -> SocketAddr {
    SocketAddr::new(cast.frontend.ip(), cast.frontend.port() + 1)
}

pub(super) fn answer(cast: &Cast, frame: &Frame) -> Frame {
    if cast.protocol == TCP { reset(frame) } else { unreachable(frame) }
}

/// A port of a ClusterIP that its Service does not define.
fn undefined(table: &mut Table, cast: &Cast) {
    let world = with_address(cast);
    let first = cast.first(cast.client, closed(cast));
    for (program, ifindex) in [(Program::Ingress, EDGE), (Program::Ingress, UPLINK)] {
        let first = first.clone().at(mac(ifindex));
        table.cut(
            cast.case(format!("an undefined port of a ClusterIP is rejected, on device {ifindex}"))
                .world(&world)
                .at(program, ifindex)
                .sends(&first)
                .becomes(&answer(cast, &first).turned())
                .ends(End::Redirect)
                .reason(Reason::UndefinedPort, 0),
        );
    }
    let bare = first.clone().l3();
    table.add(
        cast.case("an undefined port of a ClusterIP is rejected without a link header")
            .world(&world)
            .tc_ingress_l3(TUNNEL)
            .sends(&bare)
            .becomes(&answer(cast, &bare))
            .ends(End::Redirect)
            .reason(Reason::UndefinedPort, 0),
    );
    table.add(
        cast.case("XDP leaves an undefined port to tc")
            .world(&world)
            .xdp(UPLINK)
            .sends(&first.clone().at(mac(UPLINK))),
    );
}

/// The same for this host, and for a port of another protocol.
fn undefined_elsewhere(table: &mut Table, cast: &Cast) {
    let world = with_address(cast);
    let own = cast.first(SocketAddr::new(cast.node, 40_001), closed(cast));
    table.add(
        cast.case("an undefined port is rejected to this host")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&own)
            .becomes(&answer(cast, &own).at(mac(UPLINK)))
            .ends(End::Redirect)
            .reason(Reason::UndefinedPort, 0),
    );
    let mut other = cast.frontend;
    other.set_port(cast.frontend.port());
    let foreign = Cast { protocol: if cast.protocol == TCP { UDP } else { TCP }, ..*cast };
    let first = foreign.first(cast.client, other);
    table.add(
        cast.case("a ClusterIP's port of the other protocol is undefined")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&answer(&foreign, &first).turned())
            .ends(End::Redirect)
            .reason(Reason::UndefinedPort, 0),
    );
}

/// Packets that are not rejected.
fn defined(table: &mut Table, cast: &Cast) {
    let world = with_address(cast);
    let first = cast.first(cast.client, cast.frontend);
    table.add(
        cast.case("a defined port of a known ClusterIP")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );
    let mut external = cast.other_frontend;
    external.set_port(external.port() + 1);
    let mut pass = |what: &str, world: &World, frame: &Frame| {
        table.add(cast.case(what).world(world).tc_ingress(EDGE).sends(frame));
    };
    pass(
        "an undefined port of an external address",
        &world.clone().kind(crate::packets::world::OTHER, frontend::LOAD_BALANCER),
        &cast.first(cast.client, external),
    );
    let stranger = SocketAddr::new(cast.router, closed(cast).port());
    let mut listed = world.clone();
    let _ = listed.listing.insert(stranger.ip(), listing::FRONTEND);
    pass("a stranger in a ClusterIP's lane", &listed, &cast.first(cast.client, stranger));
    let kind = if cast.version == Version::V4 { (8, 0) } else { (128, 0) };
    pass(
        "an echo request to a ClusterIP",
        &world,
        &Frame::icmp(cast.client.ip(), cast.frontend.ip(), kind, 0x0001_0001, b"ping"),
    );
    let kind = if cast.version == Version::V4 { (3, 3) } else { (1, 4) };
    let quoted = cast.next(closed(cast), cast.client);
    pass(
        "an error about a packet of an undefined port",
        &world,
        &Frame::icmp(cast.client.ip(), cast.frontend.ip(), kind, 0, &quoted.packet()),
    );
    let gone = cast.frontend(closed(cast)).connection().state(state::ESTABLISHED);
    let next = cast.next(cast.client, closed(cast));
    table.add(
        cast.case("a flow goes on when its port is no longer defined")
            .world(&world.flows(gone.both()))
            .tc_ingress(EDGE)
            .sends(&next)
            .becomes(&next.clone().to(cast.backend))
            .forward(ONE),
    );
}

fn segments(table: &mut Table, cast: &Cast) {
    let world = with_address(cast);
    for (what, flags, data) in [
        ("an acknowledgment", ACK, &b""[..]),
        ("data", ACK, b"data!"),
        ("a FIN", FIN | ACK, b""),
        ("a SYN with data", SYN, b"x"),
    ] {
        let frame = Frame::tcp(cast.client, closed(cast), flags, data);
        table.add(
            cast.case(format!("{what} to an undefined port is reset"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&frame)
                .becomes(&reset(&frame).turned())
                .ends(End::Redirect)
                .reason(Reason::UndefinedPort, 0),
        );
    }
    for (what, flags) in [("a RST", RST), ("a RST|ACK", RST | ACK)] {
        let frame = Frame::tcp(cast.client, closed(cast), flags, &[]);
        table.add(
            cast.case(format!("{what} to an undefined port is never answered"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&frame)
                .dropped(Reason::NoBackendDropped, 0),
        );
    }
}

/// Returns a world that knows the Service networks, and an end in them that no Service has.
fn with_networks(cast: &Cast) -> (World, SocketAddr) {
    let mut world = cast.world();
    world.settings.networks =
        if cast.version == Version::V4 { networks::SERVICES_V4 } else { networks::SERVICES_V6 };
    world.service_nets = vec![cast.prefix(91), cast.prefix(NET_FRONTENDS)];
    let none = SocketAddr::new(address(cast.version, NET_FRONTENDS, 99), cast.frontend.port());
    (world, none)
}

/// Packets that leave for an address of the Service networks that no Service has.
fn unassigned(table: &mut Table, cast: &Cast) {
    let (world, none) = with_networks(cast);
    let own = SocketAddr::new(cast.node, 40_001);
    for (who, client) in [("this host", own), ("a pod", cast.client)] {
        let first = cast.first(client, none);
        table.add(
            cast.case(format!(
                "an address that no Service has leaves by our own device, from {who}"
            ))
            .world(&world)
            .tc_egress(OWN)
            .sends(&first.clone().at(mac(OWN)))
            .dropped(Reason::UnassignedAddress, 0),
        );
        table.add(
            cast.case(format!("an address that no Service has leaves by an uplink, from {who}"))
                .world(&world)
                .tc_egress(UPLINK)
                .sends(&first)
                .dropped(Reason::UnassignedAddress, 0),
        );
        table.add(
            cast.case(format!("an address that no Service has leaves by the overlay, from {who}"))
                .world(&world)
                .tc_egress_l3(TUNNEL)
                .sends(&first.l3())
                .dropped(Reason::UnassignedAddress, 0),
        );
    }
    let fragment = match cast.version {
        Version::V4 => Frame { fragment: 0x0010, ..cast.next(own, none) },
        Version::V6 => cast.next(own, none).extension(44, &[0, 0, 0, 0x80, 0, 0, 0, 7]),
    };
    table.add(
        cast.case("a fragment leaves for an address that no Service has")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&fragment)
            .dropped(Reason::UnassignedAddress, 0),
    );
}

/// The same packets where they are not dropped: at other hooks, or without known networks.
fn unassigned_elsewhere(table: &mut Table, cast: &Cast) {
    let (world, none) = with_networks(cast);
    let mut pass = |what: &str, world: &World, program, ifindex, frame: &Frame| {
        let frame = frame.clone().at(mac(ifindex));
        table.add(cast.case(what).world(world).at(program, ifindex).sends(&frame));
    };
    let first = cast.first(cast.client, none);
    pass(
        "an address that no Service has leaves by a pod's link",
        &world,
        Program::Egress,
        EDGE,
        &first,
    );
    pass("an address that no Service has comes from a pod", &world, Program::Ingress, EDGE, &first);
    pass(
        "an address that no Service has comes from outside",
        &world,
        Program::Ingress,
        UPLINK,
        &first,
    );
    pass(
        "an address that no Service has comes from outside, by XDP",
        &world,
        Program::Xdp,
        UPLINK,
        &first,
    );
    let mut silent = world.clone();
    silent.settings.networks ^= networks::SERVICES_V4 | networks::SERVICES_V6;
    pass("no Service addresses of this family are known", &silent, Program::Egress, UPLINK, &first);
}

/// Addresses outside of the Service networks, errors, and devices that are not known.
fn unassigned_strangers(table: &mut Table, cast: &Cast) {
    let (world, none) = with_networks(cast);
    let own = SocketAddr::new(cast.node, 40_001);
    let mut pass = |what: &str, world: &World, program, ifindex, frame: &Frame| {
        let frame = frame.clone().at(mac(ifindex));
        table.add(cast.case(what).world(world).at(program, ifindex).sends(&frame));
    };
    let first = cast.first(cast.client, none);
    let stranger = SocketAddr::new(address(cast.version, NET_REMOTE, 99), 80);
    pass(
        "an address outside of the Service networks",
        &world,
        Program::Egress,
        UPLINK,
        &cast.first(own, stranger),
    );
    let kind = if cast.version == Version::V4 { (3, 3) } else { (1, 4) };
    let error = Frame::icmp(own.ip(), none.ip(), kind, 0, &cast.next(none, own).packet());
    pass("an error towards an unassigned address", &world, Program::Egress, UPLINK, &error);
    let mut unlisted = world.clone();
    let _ = unlisted.devices.remove(&UPLINK);
    pass(
        "an unassigned address at a device that is not known",
        &unlisted,
        Program::Egress,
        UPLINK,
        &first,
    );
}

/// A listed address is looked up first, and dropped all the same.
fn unassigned_listed(table: &mut Table, cast: &Cast) {
    let (world, none) = with_networks(cast);
    let first = cast.first(cast.client, none);
    // A listed address is looked up first, and dropped all the same if nothing is found.
    let mut listed = world.clone();
    let _ = listed.listing.insert(none.ip(), listing::FRONTEND);
    let reply = cast.next(cast.backend, none);
    for (what, world, frame) in [
        ("an unassigned address in a frontend's lane", &listed, &first),
        ("a backend's packet to an unassigned address", &world, &reply),
    ] {
        let frame = frame.clone().at(mac(UPLINK));
        table.add(
            cast.case(what)
                .world(world)
                .tc_egress(UPLINK)
                .sends(&frame)
                .dropped(Reason::UnassignedAddress, 0),
        );
    }
    let connection = cast.connection().state(state::ESTABLISHED);
    let reply = cast.next(cast.backend, cast.client);
    table.add(
        cast.case("Service networks are known, and a reply leaves")
            .world(&world.clone().flows(connection.both()))
            .tc_egress(UPLINK)
            .sends(&reply)
            .becomes(&reply.clone().from(cast.frontend))
            .reply(ONE),
    );
    let mut within = world;
    within.service_nets = vec![cast.prefix(NET_CLIENTS)];
    let reply = cast.next(cast.frontend, cast.client);
    table.add(
        cast.case("a packet that leaves for a client within the Service networks")
            .world(&within)
            .tc_egress(UPLINK)
            .sends(&reply)
            .dropped(Reason::UnassignedAddress, 0),
    );
}
