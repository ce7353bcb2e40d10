//! Sources that may use a load balancer's addresses.

use std::net::{IpAddr, SocketAddr};

use sluice_common::Reason;
use sluice_common::abi::{Range, frontend, policy};
use sluice_common::path::mark;

use super::Table;
use super::clash::of_host;
use crate::packets::case::{End, Program};
use crate::packets::world::{
    Cast, EDGE, NET_NODE, NET_REMOTE, ONE, OTHER, UPLINK, World, address, mac,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        kinds(table, &cast);
        prefixes(table, &cast);
        verdicts(table, &cast);
        host(table, &cast);
    }
}

/// Returns a world with a load balancer's address whose service port allows these prefixes.
fn world(cast: &Cast, allowed: &[(IpAddr, u8)]) -> World {
    let mut world = cast.world().kind(ONE, frontend::LOAD_BALANCER);
    world.port(ONE).flags = policy::SOURCE_RANGES;
    world.source_ranges = allowed.iter().map(|(net, bits)| (ONE, *net, *bits)).collect();
    world
}

/// Adds a packet at the uplink for tc, one for XDP, and one of a pod; each is served or dropped.
fn judged(table: &mut Table, cast: &Cast, what: &str, world: &World, served: bool) {
    for (program, ifindex) in
        [(Program::Ingress, UPLINK), (Program::Xdp, UPLINK), (Program::Ingress, EDGE)]
    {
        let first = cast.first(cast.client, cast.frontend).at(mac(ifindex));
        let case = cast
            .case(format!("{what}, {} on {ifindex}", program.name()))
            .world(world)
            .at(program, ifindex)
            .sends(&first);
        table.add(if served {
            case.becomes(&first.clone().to(cast.backend))
                .opens(ONE)
                .embryonic([cast.connection().both()])
        } else if program == Program::Xdp {
            case
        } else {
            case.dropped(Reason::SourceRange, ONE)
        });
    }
}

fn kinds(table: &mut Table, cast: &Cast) {
    let elsewhere = [cast.prefix(NET_REMOTE)];
    for (what, kind, served) in [
        ("a load balancer's address", frontend::LOAD_BALANCER, false),
        ("an external IP", frontend::EXTERNAL_IP, true),
        ("a ClusterIP", frontend::CLUSTER_IP, true),
    ] {
        let world = world(cast, &elsewhere).kind(ONE, kind);
        let what = format!("source ranges without the client, {what} of the service port");
        judged(table, cast, &what, &world, served);
    }
    let at = SocketAddr::new(cast.node, 30_080);
    let mut world = world(cast, &elsewhere);
    let unspecified = if cast.node.is_ipv4() { [0; 4].into() } else { IpAddr::from([0_u16; 8]) };
    world.add_frontend(cast, ONE, SocketAddr::new(unspecified, 30_080), frontend::NODE_PORT);
    let _ = world.node_ports.insert(30_080);
    world.serve_node_ports(cast.node);
    let what = "source ranges without the client, a node port of the service port";
    judged(table, &cast.frontend(at), what, &world, true);
}

fn prefixes(table: &mut Table, cast: &Cast) {
    let client = cast.client.ip();
    let whole = if client.is_ipv4() { 32 } else { 128 };
    let next = address(cast.version, crate::packets::world::NET_CLIENTS, 8);
    let (net, bits) = cast.prefix(crate::packets::world::NET_CLIENTS);
    let everybody = if client.is_ipv4() { [0; 4].into() } else { IpAddr::from([0_u16; 8]) };
    for (what, allowed, served) in [
        ("the client's net", vec![(net, bits)], true),
        ("the client alone", vec![(client, whole)], true),
        ("the client's neighbour alone", vec![(next, whole)], false),
        ("everybody", vec![(everybody, 0)], true),
        (
            "a wide range around a narrow one that the client is not in",
            vec![(net, bits), (next, whole)],
            true,
        ),
        ("nobody of this family", vec![], false),
        ("another net and the client", vec![cast.prefix(NET_REMOTE), (client, whole)], true),
    ] {
        judged(table, cast, &format!("source ranges hold {what}"), &world(cast, &allowed), served);
    }
    let mut others = world(cast, &[]);
    let _ = others.source_ranges.insert((OTHER, net, bits));
    let _ = others.source_ranges.insert((ONE << 8, net, bits));
    judged(table, cast, "another service port's source ranges hold the client", &others, false);
    let mut off = world(cast, &[cast.prefix(NET_REMOTE)]);
    off.port(ONE).flags = 0;
    judged(table, cast, "source ranges that do not count", &off, true);
}

/// The order of the verdicts.
fn verdicts(table: &mut Table, cast: &Cast) {
    let elsewhere = [cast.prefix(NET_REMOTE)];
    for (what, range) in
        [("reject", Range::default()), ("drop for want of a local backend", Range::DROP)]
    {
        let mut world = world(cast, &elsewhere);
        world.port(ONE).ranges = [range; 3];
        judged(table, cast, &format!("source ranges come before a {what}"), &world, false);
    }
    let connection = cast.connection().state(sluice_common::abi::state::ESTABLISHED);
    let world = world(cast, &elsewhere).flows(connection.both());
    let next = cast.next(cast.client, cast.frontend).at(mac(UPLINK));
    table.add(
        cast.case("a flow goes on when its client leaves the source ranges")
            .world(&world)
            .tc_ingress(UPLINK)
            .sends(&next)
            .becomes(&next.clone().to(cast.backend))
            .forward(ONE),
    );
}

/// This host is a client like any other.
fn host(table: &mut Table, cast: &Cast) {
    let client = SocketAddr::new(cast.node, 40_001);
    let first = cast.first(client, cast.frontend);
    table.add(
        cast.case("this host is not in the source ranges")
            .world(&world(cast, &[cast.prefix(NET_REMOTE)]))
            .tc_egress(UPLINK)
            .sends(&first)
            .dropped(Reason::SourceRange, ONE),
    );
    let connection = of_host(cast, cast.connection());
    table.add(
        cast.case("this host is in the source ranges")
            .world(&world(cast, &[cast.prefix(NET_NODE)]))
            .tc_egress(UPLINK)
            .sends(&first)
            .becomes(&first.clone().from(connection.seen_as).to(cast.backend))
            .ends(End::Redirect)
            .opens(ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST),
    );
}
