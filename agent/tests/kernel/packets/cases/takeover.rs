//! Packets that are left to netfilter during a takeover or a release.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{frontend, imported, listing, networks, phase, state};
use sluice_common::path::mark;

use super::Table;
use super::masquerade::{REMOTE, leaves};
use crate::packets::case::{Case, Program, case};
use crate::packets::frame::{FIN, Frame, RST, SCTP, SYN, TCP, UDP};
use crate::packets::world::{
    Cast, Connection, EDGE, EMPTY, NET_CLIENTS, ONE, UPLINK, World, address, mac, tuple,
};

/// The hooks and devices by which packets come in.
const PLACES: [(&str, Program, u32); 3] = [
    ("edge", Program::Ingress, EDGE),
    ("uplink", Program::Ingress, UPLINK),
    ("XDP", Program::Xdp, UPLINK),
];

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    let casts = [Cast::all(), Cast::of(SCTP)].concat();
    for cast in &casts {
        passive(table, cast);
        passive_undefined_port(table, cast);
        passive_known(table, cast);
        import(table, cast);
        imports(table, cast);
        imports_of_others(table, cast);
        imports_at_node_port(table, cast);
        ports(table, cast);
    }
    for cast in Cast::of(TCP) {
        resets(table, &cast);
    }
    strays(table);
}

/// Returns a world in a phase, with netfilter's packets.
pub(super) fn at(
    mut world: World,
    now: u32,
    packets: &[(SocketAddr, SocketAddr, u8, u32)],
) -> World {
    world.settings.phase = now | if packets.is_empty() { 0 } else { phase::IMPORTED };
    for (source, destination, protocol, bits) in packets {
        let _ = world.imported.insert(tuple(*source, *destination, *protocol), *bits);
    }
    world
}

/// Expects the packet to be left alone; XDP leaves the counting to tc.
fn left(
    name: String,
    world: &World,
    place: (Program, u32),
    frame: &Frame,
    why: Reason,
    port: u32,
) -> Case {
    let case = case(name).world(world).at(place.0, place.1).sends(frame);
    if place.0 == Program::Xdp { case } else { case.reason(why, port) }
}

/// While netfilter serves, packets that open a connection are left to it.
fn passive(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let Cast { client, frontend, empty, .. } = *cast;
    let world = at(cast.world(), phase::PASSIVE, &[]);
    for (where_, program, ifindex) in PLACES {
        for (what, frame) in
            [("opens", cast.first(client, frontend)), ("goes on", cast.next(client, frontend))]
        {
            let name = format!("{title}: passive, a client {what} by {where_}");
            let frame = frame.at(mac(ifindex));
            table.add(left(name, &world, (program, ifindex), &frame, Reason::NotTaken, ONE));
        }
        let name = format!("{title}: passive, nobody is refused by {where_}");
        let first = cast.first(client, empty).at(mac(ifindex));
        table.add(left(name, &world, (program, ifindex), &first, Reason::NotTaken, EMPTY));
    }
    let first = cast.first(client, frontend);
    table.add(
        cast.case("passive, the host's own socket opens")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&first)
            .reason(Reason::NotTaken, ONE),
    );
}

/// While netfilter serves, an undefined port is left to it.
fn passive_undefined_port(table: &mut Table, cast: &Cast) {
    let Cast { client, frontend, .. } = *cast;
    let world = at(cast.world(), phase::PASSIVE, &[]);
    let mut whole = world.clone();
    whole.add_frontend(cast, 0, SocketAddr::new(frontend.ip(), 0), frontend::ADDRESS);
    let keys: Vec<_> =
        whole.services.iter().filter(|(_, found)| found.kind == frontend::ADDRESS).collect();
    let mut key = *keys[0].0;
    let service = *keys[0].1;
    let _ = whole.services.remove(&key);
    key.protocol = 0;
    let _ = whole.services.insert(key, service);
    let other = cast.first(client, SocketAddr::new(frontend.ip(), 4444));
    table.add(
        cast.case("passive, an undefined port")
            .world(&whole)
            .tc_ingress(EDGE)
            .sends(&other)
            .reason(Reason::NotTaken, 0),
    );
}

/// While netfilter serves, Sluice's own flows go on.
fn passive_known(table: &mut Table, cast: &Cast) {
    let Cast { client, frontend, backend, .. } = *cast;
    let world = at(cast.world(), phase::PASSIVE, &[]);
    // Sluice's own flows go on.
    let connection = cast.connection().state(state::ESTABLISHED);
    let mine = world.clone().flows(connection.both());
    let next = cast.next(client, frontend);
    table.add(
        cast.case("passive, a known flow is served")
            .world(&mine)
            .tc_ingress(EDGE)
            .sends(&next)
            .becomes(&next.clone().to(backend))
            .forward(ONE),
    );
    let reply = cast.next(backend, client);
    table.add(
        cast.case("passive, a known flow's reply is served")
            .world(&mine)
            .tc_egress(EDGE)
            .sends(&reply)
            .becomes(&reply.clone().from(frontend))
            .reply(ONE),
    );
    if cast.protocol == UDP {
        return;
    }
    let ended = connection.state(state::ESTABLISHED | state::RESET_REPLY);
    let first = cast.first(client, frontend);
    table.add(
        cast.case("passive, a tuple that was ours stays ours")
            .world(&world.flows(ended.both()))
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(backend))
            .opens(ONE)
            .flows([])
            .embryonic([cast.connection().both()]),
    );
}

fn import(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let Cast { client, frontend, backend, .. } = *cast;
    let world = at(cast.world(), phase::IMPORT, &[]);
    for (where_, program, ifindex) in PLACES {
        let name = format!("{title}: import, the middle of a connection by {where_}");
        let next = cast.next(client, frontend).at(mac(ifindex));
        table.add(left(name, &world, (program, ifindex), &next, Reason::NotTaken, ONE));
        let first = cast.first(client, frontend).at(mac(ifindex));
        let name = format!("{title}: import, a client opens by {where_}");
        if cast.protocol == UDP {
            table.add(left(name, &world, (program, ifindex), &first, Reason::NotTaken, ONE));
        } else if cast.protocol == TCP || program != Program::Xdp {
            table.add(
                case(name)
                    .world(&world)
                    .at(program, ifindex)
                    .sends(&first)
                    .becomes(&first.clone().to(backend))
                    .opens(ONE)
                    .embryonic([cast.connection().both()]),
            );
        }
    }
}

/// Netfilter's connections after everything else has become Sluice's.
fn imports(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let Cast { client, frontend, backend, protocol, .. } = *cast;
    let (first, next) = (cast.first(client, frontend), cast.next(client, frontend));
    for now in [phase::SERVE, phase::IMPORT, phase::PASSIVE] {
        let world = at(cast.world(), now, &[(client, frontend, protocol, 0)]);
        for (where_, program, ifindex) in PLACES {
            for (what, frame) in [("once more", &first), ("goes on", &next)] {
                let name =
                    format!("{title}: netfilter's connection, {what} by {where_}, phase {now}");
                let frame = frame.clone().at(mac(ifindex));
                table.add(left(
                    name,
                    &world,
                    (program, ifindex),
                    &frame,
                    Reason::NetfilterFlow,
                    ONE,
                ));
            }
        }
    }
    let ended = at(cast.world(), phase::SERVE, &[(client, frontend, protocol, imported::CLOSING)]);
    table.add(
        cast.case("netfilter's connection that has ended")
            .world(&ended)
            .tc_ingress(EDGE)
            .sends(&next)
            .reason(Reason::NetfilterFlow, ONE),
    );
    if protocol != UDP {
        table.add(
            cast.case("a new connection from the port of one of netfilter's that has ended")
                .world(&ended)
                .tc_ingress(EDGE)
                .sends(&first)
                .becomes(&first.clone().to(backend))
                .opens(ONE)
                .embryonic([cast.connection().both()]),
        );
    }
}

/// Connections next to those of netfilter.
fn imports_of_others(table: &mut Table, cast: &Cast) {
    let Cast { client, frontend, backend, protocol, .. } = *cast;
    let (first, _) = (cast.first(client, frontend), cast.next(client, frontend));
    let other = SocketAddr::new(client.ip(), client.port() + 1);
    let world = at(cast.world(), phase::SERVE, &[(other, frontend, protocol, 0)]);
    table.add(
        cast.case("another connection than netfilter's")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(backend))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );
    let mut unasked = world;
    unasked.settings.phase = phase::SERVE;
    let _ = unasked.imported.insert(tuple(client, frontend, protocol), 0);
    table.add(
        cast.case("netfilter's connections are not asked for where there are none")
            .world(&unasked)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(backend))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );
}

/// The answer to a client that the endpoint sees as the node, at the number of a node port.
fn imports_at_node_port(table: &mut Table, cast: &Cast) {
    let Cast { backend, protocol, .. } = *cast;
    // The answer to a client that the endpoint sees as the node, at a port that is also the number
    // of a node port.
    let mut world = cast.world();
    let node = SocketAddr::new(cast.node_on(UPLINK), 30_080);
    world.serve_node_ports(node.ip());
    world.add_frontend(
        cast,
        ONE,
        SocketAddr::new(unspecified(cast), node.port()),
        frontend::NODE_PORT,
    );
    let _ = world.listing.remove(&unspecified(cast));
    let _ = world.node_ports.insert(node.port());
    let world = at(world, phase::SERVE, &[(backend, node, protocol, 0)]);
    // A packet that opens a connection might be a client's, and is looked up. At an address of the
    // node no other packet counts as a client's.
    for (what, reply) in
        [("opens", cast.first(backend, node)), ("goes on", cast.next(backend, node))]
    {
        let case = cast
            .case(format!("what netfilter expects at a node port's number {what}"))
            .world(&world)
            .tc_ingress(UPLINK)
            .sends(&reply);
        let asked = what == "opens" || cast.protocol == UDP;
        table.add(if asked { case.reason(Reason::NetfilterFlow, ONE) } else { case });
    }
}

fn unspecified(cast: &Cast) -> std::net::IpAddr {
    if cast.client.is_ipv4() {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    }
}

/// Source ports of netfilter's connections to the backend.
fn ports(table: &mut Table, cast: &Cast) {
    if cast.protocol == SCTP {
        // Where a port would change, the first chunk's checksum has to be known in full: SCTP has
        // cases of its own.
        return;
    }
    let title = cast.title();
    let (cast, world) = REMOTE.set(cast);
    let world = REMOTE.met(&cast, &world);
    let own = REMOTE.source(&cast);
    for bits in [0, imported::CLOSING] {
        let taken =
            at(world.clone(), phase::SERVE, &[(own.backend, own.seen_as, cast.protocol, bits)]);
        let name = format!("{title}: a masqueraded client's port is netfilter's, bits {bits}");
        table.add(leaves(name, &cast, &taken, REMOTE, &REMOTE.source_at(&cast, 2)));
    }
    let elsewhere = at(world, phase::SERVE, &[(cast.other_backend, own.seen_as, cast.protocol, 0)]);
    let name = format!(
        "{title}: a masqueraded client's port is netfilter's towards another backend alone"
    );
    table.add(leaves(name, &cast, &elsewhere, REMOTE, &own));
}

/// A client's reset about an unknown connection, which shows that a reply's entry is lost, where
/// that is proven.
fn resets(table: &mut Table, cast: &Cast) {
    let reset = Frame::tcp(cast.client, cast.backend, RST, &[]);
    let connection = cast.connection().state(state::ESTABLISHED);
    for now in [phase::IMPORT, phase::PASSIVE] {
        let world = at(cast.world(), now, &[]);
        table.add(
            cast.case(format!("no guess in phase {now}"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&reset),
        );
        let known = world.flows(connection.age(5).forward());
        table.add(
            cast.case(format!("a forward entry is proof in phase {now}"))
                .world(&known)
                .tc_ingress(EDGE)
                .sends(&reset)
                .dropped(Reason::ReplyRecovered, ONE)
                .flows([connection.both()]),
        );
    }
    let both = [
        (cast.client, cast.frontend, TCP, 0),
        (cast.client, cast.other_frontend, TCP, imported::CLOSING),
    ];
    let world = at(cast.world(), phase::SERVE, &both);
    table.add(
        cast.case("no guess for a connection of netfilter's")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&reset),
    );
    let world = at(cast.world(), phase::SERVE, &both[..1]);
    let guessed = Connection { frontend: cast.other_frontend, ..cast.other_connection() };
    table.add(
        cast.case("a guess beside connections of netfilter's")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&reset)
            .dropped(Reason::ReplyRecovered, guessed.service_port)
            .embryonic([guessed.state(state::GUESS).heard(0x0102_fffe).both()]),
    );
    let fin = Frame::tcp(cast.client, cast.frontend, FIN, &[]);
    table.add(
        cast.case("netfilter's connection ends")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&fin)
            .reason(Reason::NetfilterFlow, ONE),
    );
}

/// Addresses that no Service has are for others to drop until everything is Sluice's.
fn strays(table: &mut Table) {
    for cast in Cast::of(TCP) {
        let to = SocketAddr::new(address(cast.version, 97, 9), 80);
        let from = SocketAddr::new(address(cast.version, NET_CLIENTS, 9), 40_000);
        let mut world = cast.world();
        world.service_nets = vec![cast.prefix(97)];
        world.settings.networks |=
            if to.is_ipv4() { networks::SERVICES_V4 } else { networks::SERVICES_V6 };
        let packet = Frame::tcp(from, to, SYN, &[]);
        for now in [phase::IMPORT, phase::PASSIVE] {
            let world = at(world.clone(), now, &[]);
            table.add(
                cast.case(format!("an unassigned address in phase {now}"))
                    .world(&world)
                    .tc_egress(UPLINK)
                    .sends(&packet),
            );
        }
        let world = at(world, phase::SERVE, &[(from, to, UDP, 0)]).marks(mark::DIRECT);
        debug_assert!(
            !world.listing.contains_key(&to.ip())
                || world.listing[&to.ip()] & listing::FRONTEND == 0
        );
        table.add(
            cast.case("an unassigned address, with netfilter's connections")
                .world(&world)
                .tc_egress(UPLINK)
                .sends(&packet)
                .dropped(Reason::UnassignedAddress, 0),
        );
    }
}
