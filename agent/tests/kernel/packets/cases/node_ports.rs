//! Node ports: any address of this node that serves them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice_common::Reason;
use sluice_common::abi::{backend, flow, frontend, listing, state};
use sluice_common::path::mark;

use super::Table;
use super::clash::of_host;
use super::fragments::{long, parts, told};
use super::masquerade::as_met;
use crate::packets::case::{End, Program};
use crate::packets::frame::{ACK, Frame, SYN, TCP, UDP};
use crate::packets::world::{
    Cast, Connection, EDGE, EMPTY, LOOPBACK, NARROW, ONE, OTHER, TUNNEL, UPLINK, Version, World,
    mac,
};

/// A node port.
const PORT: u16 = 30_080;

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        let served = cast.frontend(SocketAddr::new(cast.node, PORT));
        opening(table, &served);
        elsewhere(table, &served);
        other_ports(table, &served);
        along(table, &served);
        shared(table, &served);
        to_itself(table, &served);
        answer_to_itself(table, &served);
        its_own_backend(table, &served);
        within(table, &served);
    }
}

/// Returns the key of a node port.
fn wildcard(cast: &Cast) -> SocketAddr {
    let unspecified: IpAddr = match cast.version {
        Version::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Version::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(unspecified, PORT)
}

/// Returns a world in which the service port has a node port, served at the uplink's address alone.
pub(super) fn world(cast: &Cast, service_port: u32) -> World {
    // The node's own address is no frontend.
    let mut world = Cast::new(cast.version, cast.protocol).world();
    world.add_frontend(cast, service_port, wildcard(cast), frontend::NODE_PORT);
    let _ = world.listing.remove(&wildcard(cast).ip());
    let _ = world.node_ports.insert(PORT);
    world.serve_node_ports(cast.node);
    world
}

fn opening(table: &mut Table, cast: &Cast) {
    let world = world(cast, ONE);
    let connection = cast.connection();
    for (who, program, ifindex) in [
        ("a client outside", Program::Ingress, UPLINK),
        ("a client outside, by XDP", Program::Xdp, UPLINK),
        ("a local pod", Program::Ingress, EDGE),
        ("a client behind the overlay", Program::IngressL3, TUNNEL),
    ] {
        let first = cast.first(cast.client, cast.frontend);
        let first = if program == Program::IngressL3 { first.l3() } else { first.at(mac(ifindex)) };
        let case = cast
            .case(format!("a node port, {who}"))
            .world(&world)
            .at(program, ifindex)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([as_met(cast, &world, ifindex, &connection).both()]);
        if who == "a client outside" { table.cut(case) } else { table.add(case) }
    }
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    let none = {
        let mut world = self::world(cast, EMPTY);
        world.serve_node_ports(cast.node);
        world
    };
    let (answer, reason): (fn(&Frame) -> Frame, Reason) = match cast.protocol {
        TCP => (super::reject::reset, Reason::NoBackendReset),
        _ => (super::reject::unreachable, Reason::NoBackendUnreachable),
    };
    table.add(
        cast.case("a node port of a service without backends is rejected")
            .world(&none)
            .tc_ingress(UPLINK)
            .sends(&first)
            .becomes(&answer(&first).turned())
            .ends(End::Redirect)
            .reason(reason, EMPTY),
    );
}

/// A process of this host sends to a node port of this host.
fn to_itself(table: &mut Table, cast: &Cast) {
    let world = world(cast, ONE);
    let connection = of_host(cast, cast.connection());
    let first = cast.first(connection.client, cast.frontend).at(mac(LOOPBACK));
    table.add(
        cast.case("a node port, a process of this host")
            .world(&world)
            .tc_egress(LOOPBACK)
            .sends(&first)
            .routed(&first.clone().from(connection.seen_as).to(cast.backend))
            .opens(ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST),
    );
    table.add(
        cast.case("what leaves by another device is no question to this node")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&first),
    );
    let other = first.clone().to(SocketAddr::new(cast.node, PORT + 1));
    table.add(
        cast.case("a process of this host, another port of the node")
            .world(&world)
            .tc_egress(LOOPBACK)
            .sends(&other),
    );
}

/// The answer is injected by the loopback device.
fn answer_to_itself(table: &mut Table, cast: &Cast) {
    let world = world(cast, ONE);
    let connection = of_host(cast, cast.connection());
    let known = world.clone().embryonic(connection.both()).marks(mark::HOST);
    let reply = match cast.protocol {
        TCP => Frame::tcp(cast.backend, connection.seen_as, SYN | ACK, &[]),
        _ => Frame::udp(cast.backend, connection.seen_as, b"answer"),
    };
    let reply = reply.at(mac(EDGE));
    let case = cast.case("the answer of a node port to a process of this host is handed in by the loopback device").world(&known).tc_ingress(EDGE).sends(&reply)
    .becomes(&reply.clone().from(cast.frontend).to(connection.client).at(mac(LOOPBACK)))
    .ends(End::Redirect)
    .reply(ONE);
    table.add(match cast.protocol {
        TCP => case.embryonic([connection.answered().both()]),
        _ => case.embryonic([connection.state(state::ESTABLISHED).both()]),
    });
}

/// This host is its own backend: client and server share an address.
fn its_own_backend(table: &mut Table, cast: &Cast) {
    let world = world(cast, ONE);
    let connection = of_host(cast, cast.connection());
    let first = cast.first(connection.client, cast.frontend).at(mac(LOOPBACK));
    // This host is its own backend: client and server share an address, and the port is one that no
    // socket has.
    let at = SocketAddr::new(cast.node, cast.backend.port());
    let mut world = world;
    world.add_backend(cast, ONE, ONE, at);
    let world = world.backend_flags(ONE, backend::SERVING | backend::LOCAL | backend::HOST);
    let flags = flow::HOST | flow::LOCAL | flow::HAIRPIN;
    let connection = Connection { backend: at, flags, ..connection };
    table.add(
        cast.case("a node port of a server on this host, a process of this host")
            .world(&world)
            .tc_egress(LOOPBACK)
            .sends(&first)
            .becomes(&first.clone().from(connection.seen_as).to(at))
            .ends(End::Redirect)
            .opens(ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST),
    );
}

/// Loopback addresses serve only processes of this host, and link-local addresses only their link.
fn within(table: &mut Table, cast: &Cast) {
    let (loopback, of_link): (IpAddr, Option<IpAddr>) = match cast.version {
        Version::V4 => (Ipv4Addr::LOCALHOST.into(), None),
        Version::V6 => {
            (Ipv6Addr::LOCALHOST.into(), Some(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).into()))
        }
    };
    let mut world = world(cast, ONE);
    world.serve_node_ports(loopback);
    for (who, client, ifindex) in
        [("a neighbour", cast.client, UPLINK), ("a pod", cast.client, EDGE)]
    {
        for program in [Program::Ingress, Program::Xdp] {
            let first = cast.first(client, SocketAddr::new(loopback, PORT)).at(mac(ifindex));
            table.add(
                cast.case(format!("a loopback address is not served to {who}, {}", program.name()))
                    .world(&world)
                    .at(program, ifindex)
                    .sends(&first),
            );
        }
    }
    // The client's own address is a loopback address too, so the backend sees the node's.
    let asked =
        cast.frontend(SocketAddr::new(loopback, PORT)).client(SocketAddr::new(loopback, 40_001));
    let mut connection = of_host(cast, asked.connection());
    let shown = super::clash::tried(&asked, asked.frontend, 1);
    connection.client = asked.client;
    connection.seen_as = SocketAddr::new(cast.node, shown.port());
    connection.flags |= flow::MASQUERADED;
    let first = asked.first(asked.client, asked.frontend).at(mac(LOOPBACK));
    table.add(
        cast.case("a loopback address, a process of this host")
            .world(&world)
            .tc_egress(LOOPBACK)
            .sends(&first)
            .routed(&first.clone().from(connection.seen_as).to(cast.backend))
            .opens(ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST | mark::MASQUERADED),
    );
    if let Some(of_link) = of_link {
        world.serve_node_ports(of_link);
        let first = cast.first(cast.client, SocketAddr::new(of_link, PORT)).at(mac(EDGE));
        table.add(
            cast.case("an address of another link is not served to a pod")
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&first),
        );
    }
}

/// Addresses that serve no node ports.
fn elsewhere(table: &mut Table, cast: &Cast) {
    let plain = world(cast, ONE);
    let mut pass = |what: &str, world: &World, program, ifindex, destination| {
        for program in
            if program == Program::Ingress { vec![program, Program::Xdp] } else { vec![program] }
        {
            let first = cast.first(cast.client, destination).at(mac(ifindex));
            table.add(
                cast.case(format!("{what}, {}", program.name()))
                    .world(world)
                    .at(program, ifindex)
                    .sends(&first),
            );
        }
    };
    let at = |address| SocketAddr::new(address, PORT);
    pass(
        "an address of the node that serves no node ports",
        &plain,
        Program::Ingress,
        UPLINK,
        at(cast.node_on(NARROW)),
    );
    pass(
        "an address that is not the node's, a node port's number",
        &plain,
        Program::Ingress,
        UPLINK,
        at(cast.router),
    );
    let mut listed = plain.clone();
    let _ = listed.listing.insert(cast.router, listing::NODE_PORTS | listing::NODE);
    pass(
        "a stranger in the lane of a node's address",
        &listed,
        Program::Ingress,
        UPLINK,
        at(cast.router),
    );
    let _ = listed.listing.insert(cast.node_on(NARROW), listing::NODE_PORTS | listing::NODE);
    pass(
        "an address without node ports in the lane of one that has them",
        &listed,
        Program::Ingress,
        UPLINK,
        at(cast.node_on(NARROW)),
    );
    let _ = listed.listing.insert(cast.router, 15);
    pass("a stranger in a lane with every bit", &listed, Program::Ingress, UPLINK, at(cast.router));
}

/// Ports and protocols without a node port, and the egress.
fn other_ports(table: &mut Table, cast: &Cast) {
    let plain = world(cast, ONE);
    let mut pass = |what: &str, world: &World, program, ifindex, destination| {
        for program in
            if program == Program::Ingress { vec![program, Program::Xdp] } else { vec![program] }
        {
            let first = cast.first(cast.client, destination).at(mac(ifindex));
            table.add(
                cast.case(format!("{what}, {}", program.name()))
                    .world(world)
                    .at(program, ifindex)
                    .sends(&first),
            );
        }
    };
    for (what, port) in [("next to", PORT + 1), ("64 above", PORT + 64), ("before", PORT - 1)] {
        let other = SocketAddr::new(cast.node, port);
        pass(&format!("a port {what} a node port"), &plain, Program::Ingress, UPLINK, other);
    }
    let other = Cast { protocol: if cast.protocol == TCP { UDP } else { TCP }, ..*cast };
    pass(
        "a node port of the other protocol",
        &self::world(&other, ONE),
        Program::Ingress,
        UPLINK,
        cast.frontend,
    );
    let mut unset = plain.clone();
    unset.node_ports.clear();
    pass("no service has the port number", &unset, Program::Ingress, UPLINK, cast.frontend);
    pass("a node port is none at an egress", &plain, Program::Egress, UPLINK, cast.frontend);
}

fn along(table: &mut Table, cast: &Cast) {
    let connection = cast.connection().state(state::ESTABLISHED);
    let world = world(cast, ONE).flows(connection.both());
    let next = cast.next(cast.client, cast.frontend).at(mac(UPLINK));
    for program in [Program::Ingress, Program::Xdp] {
        table.add(
            cast.case(format!("a packet along a flow of a node port, {}", program.name()))
                .world(&world)
                .at(program, UPLINK)
                .sends(&next)
                .becomes(&next.clone().to(cast.backend))
                .forward(ONE),
        );
    }
    let reply = cast.next(cast.backend, cast.client);
    table.add(
        cast.case("a reply comes from the node port")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&reply)
            .becomes(&reply.clone().from(cast.frontend))
            .reply(ONE),
    );
    let question = long(cast, cast.client, cast.frontend).at(mac(UPLINK));
    for (index, fragment) in parts(&question).iter().enumerate() {
        let translated = parts(&question.clone().to(cast.backend)).swap_remove(index);
        let entry = told(cast, cast.client, cast.frontend, true, 0);
        let before =
            if index == 0 { world.clone() } else { world.clone().fragments(entry.clone()) };
        table.add(
            cast.case(format!("fragment {index} to a node port"))
                .world(&before)
                .tc_ingress(UPLINK)
                .sends(fragment)
                .becomes(&translated)
                .forward(ONE)
                .fragments(entry),
        );
    }
}

/// An address that belongs to both a frontend and the node.
fn shared(table: &mut Table, cast: &Cast) {
    let mut world = world(cast, ONE);
    world.add_frontend(cast, OTHER, cast.frontend, frontend::EXTERNAL_IP);
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    let other =
        crate::packets::world::Connection { id: OTHER, service_port: OTHER, ..cast.connection() };
    for program in [Program::Ingress, Program::Xdp] {
        table.add(
            cast.case(format!(
                "an address's own frontend comes before a node port, {}",
                program.name()
            ))
            .world(&world)
            .at(program, UPLINK)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(OTHER)
            .embryonic([other.both()]),
        );
    }
    let mut beside = self::world(cast, ONE);
    let mut own = cast.frontend;
    own.set_port(443);
    beside.add_frontend(cast, OTHER, own, frontend::EXTERNAL_IP);
    table.add(
        cast.case("a node port at an address that has a frontend of another port")
            .world(&beside)
            .tc_ingress(UPLINK)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );
    let mut not_served = beside.clone();
    not_served.node_addresses.clear();
    table.add(
        cast.case("no node port at a frontend's address that serves none")
            .world(&not_served)
            .tc_ingress(UPLINK)
            .sends(&first),
    );
    // The frontend's address is served where this host sends to it; its node port is not.
    let own = cast.first(SocketAddr::new(cast.node_on(NARROW), 40_001), cast.frontend);
    table.add(
        cast.case("no node port at egress, at a frontend's address either")
            .world(&beside)
            .tc_egress(UPLINK)
            .sends(&own),
    );
}
