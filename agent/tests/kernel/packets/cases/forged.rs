//! Packets whose source does not belong to the device that they came in by: they change nobody's
//! flow. The last cases are addresses that the prefilter takes for the node's, because they share a
//! lane with one of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice_common::abi::{ADDRESS_WORDS, device_flags, flow, listing, state};
use sluice_common::family::lane;
use sluice_common::path::{STREAM_TICKS, mark};
use sluice_common::{Failure, Reason, V4, V6};

use super::Table;
use super::clash::tried;
use super::masquerade::{LOCAL, REMOTE, leaves};
use super::masqueraded::flows_of;
use crate::packets::case::{Case, Program};
use crate::packets::frame::{ACK, FIN, Frame, RST, SEQUENCE, SYN, TCP, UDP};
use crate::packets::ip::Ip;
use crate::packets::world::{
    BRIDGE, Cast, Connection, EDGE, FOREIGN, NET_BACKENDS, NET_CLIENTS, NET_FOREIGN, NET_FORGED,
    NET_OVERLAY, NET_PODS, NET_REMOTE, ONE, UPLINK, World, mac,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        for (who, cast, program, ifindex) in forgers(&cast) {
            along(table, &cast, who, program, ifindex);
            opening(table, &cast, who, program, ifindex);
            to_backend(table, &cast, who, program, ifindex);
        }
        rightful(table, &cast);
        gateways(table, &cast);
        replies(table, &cast);
        sources(table, &cast);
        lanes(table, &cast);
    }
}

/// Returns the forgers: the cast has the forged address as its client.
fn forgers(cast: &Cast) -> Vec<(&'static str, Cast, Program, u32)> {
    let node = cast.client(SocketAddr::new(cast.node, cast.client.port()));
    vec![
        ("a pod, another one's address", cast.client_in(NET_FORGED), Program::Ingress, EDGE),
        ("a pod, the node's address", node, Program::Ingress, EDGE),
        ("somebody outside, a pod's address", cast.client_in(NET_PODS), Program::Ingress, UPLINK),
        ("somebody outside, a pod's address, XDP", cast.client_in(NET_PODS), Program::Xdp, UPLINK),
        (
            "somebody outside, the address of a bridge's pod",
            cast.client_in(NET_BACKENDS),
            Program::Ingress,
            UPLINK,
        ),
        ("somebody outside, the node's address", node, Program::Ingress, UPLINK),
    ]
}

/// Returns packets of a client, each with a name.
fn packets(cast: &Cast, from: SocketAddr, to: SocketAddr) -> Vec<(&'static str, Frame)> {
    match cast.protocol {
        TCP => [
            ("RST", RST),
            ("RST and ACK", RST | ACK),
            ("FIN and ACK", FIN | ACK),
            ("SYN", SYN),
            ("SYN and ACK", SYN | ACK),
            ("ACK", ACK),
        ]
        .map(|(what, flags)| (what, Frame::tcp(from, to, flags, &[])))
        .into(),
        _ => vec![("datagram", Frame::udp(from, to, b"forged"))],
    }
}

/// Packets of a known flow are translated, and leave its entries as they are.
fn along(table: &mut Table, cast: &Cast, who: &str, program: Program, ifindex: u32) {
    let connection = cast.connection();
    let live = connection.state(state::ESTABLISHED);
    let mut worlds = vec![
        ("a live flow", cast.world().flows(live.both())),
        ("a flow that nothing has proven", cast.world().embryonic(connection.age(1).both())),
        ("a flow whose endpoint no longer serves", {
            let world = cast.world().flows(live.age(20).heard(200).both());
            world.backend_flags(ONE, sluice_common::abi::backend::LOCAL)
        }),
    ];
    if cast.protocol == UDP {
        let answered = live.age(STREAM_TICKS + 1);
        worlds.push(("a question that is answered", cast.world().embryonic(answered.both())));
    } else {
        let both = live.state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY);
        worlds.push(("a flow that has ended", cast.world().embryonic(both.both())));
        let guess = connection.state(state::GUESS).heard(SEQUENCE + 77);
        worlds.push(("a guess", cast.world().embryonic(guess.both())));
        worlds.push((
            "a guess that was right",
            cast.world().embryonic(guess.state(state::GUESS | state::MATCHED).both()),
        ));
    }
    for (of, world) in worlds {
        for (what, frame) in packets(cast, cast.client, cast.frontend) {
            let is_plain = match of {
                "a flow whose endpoint no longer serves" => matches!(what, "ACK" | "SYN and ACK"),
                _ => {
                    program == Program::Xdp
                        && !(of == "a live flow" && what.starts_with(['R', 'F']))
                }
            };
            if is_plain {
                // It renews the time, whoever sends it.
                continue;
            }
            let frame = frame.at(mac(ifindex));
            let case = cast
                .case(format!("{what} of {who}, along {of}"))
                .world(&world)
                .at(program, ifindex)
                .sends(&frame);
            // A bare reset shows that the guess was wrong. Here it shows nothing, and nobody has
            // the address that it goes to.
            let is_left = program == Program::Xdp
                || what == "RST" && of == "a guess that was right" && ifindex == EDGE;
            table.add(if is_left {
                case
            } else {
                case.becomes(&frame.clone().to(cast.backend)).forward(ONE)
            });
        }
    }
}

/// Packets of an unknown tuple. One that opens a flow gets a port from which the owner has no
/// connection; one in the middle of a connection recovers nothing.
fn opening(table: &mut Table, cast: &Cast, who: &str, program: Program, ifindex: u32) {
    let world = cast.world();
    for (what, frame) in packets(cast, cast.client, cast.frontend) {
        let frame = frame.at(mac(ifindex));
        let case = cast
            .case(format!("{what} of {who}, nothing is known of it"))
            .world(&world)
            .at(program, ifindex)
            .sends(&frame);
        let has_way_back = ifindex == EDGE || who.contains("a pod's address");
        table.add(if program == Program::Xdp {
            case
        } else if !has_way_back {
            case.dropped(Reason::NoRoute, ONE)
        } else if matches!(what, "SYN" | "datagram") {
            let seen_as = tried(cast, cast.frontend, 1);
            case.becomes(&frame.clone().from(seen_as).to(cast.backend))
                .opens(ONE)
                .embryonic([cast.connection().seen_as(seen_as).both()])
        } else {
            case.becomes(&frame.clone().to(cast.backend)).reason(Reason::Recovered, ONE)
        });
    }
}

/// Packets to the endpoint's own address, next to a flow to it, are treated as without Sluice.
fn to_backend(table: &mut Table, cast: &Cast, who: &str, program: Program, ifindex: u32) {
    let live = cast.connection().state(state::ESTABLISHED);
    for (beside, world) in [
        ("a live flow", cast.world().flows(live.both())),
        ("a flow whose reply entry is lost", cast.world().flows(live.forward())),
        ("nothing", cast.world()),
    ] {
        for (what, frame) in packets(cast, cast.client, cast.backend) {
            let frame = frame.at(mac(ifindex));
            table.add(
                cast.case(format!("{what} of {who} to an endpoint, beside {beside}"))
                    .world(&world)
                    .at(program, ifindex)
                    .sends(&frame),
            );
        }
    }
}

/// The same packets from a rightful sender: by the pod's own device, and by another uplink than the
/// one that leads back.
fn rightful(table: &mut Table, cast: &Cast) {
    if cast.protocol == UDP {
        return;
    }
    for (who, net, ifindex) in [
        ("a pod", NET_CLIENTS, EDGE),
        ("somebody outside", NET_CLIENTS, UPLINK),
        ("somebody outside who is reached by the overlay", NET_OVERLAY, UPLINK),
    ] {
        let cast = cast.client_in(net);
        let live = cast.connection().state(state::ESTABLISHED);
        let world = cast.world().flows(live.both());
        for (what, flags, said) in
            [("RST", RST, state::RESET_FORWARD), ("FIN", FIN | ACK, state::FIN_FORWARD)]
        {
            for program in [Program::Ingress, Program::Xdp] {
                if program == Program::Xdp && ifindex == EDGE {
                    continue;
                }
                let frame = Frame::tcp(cast.client, cast.frontend, flags, &[]).at(mac(ifindex));
                let after = live.state(state::ESTABLISHED | said);
                table.add(
                    cast.case(format!("{what} of {who} itself, {}", program.name()))
                        .world(&world)
                        .at(program, ifindex)
                        .sends(&frame)
                        .becomes(&frame.clone().to(cast.backend))
                        .forward(ONE)
                        .flows([after.both()]),
                );
            }
        }
    }
}

/// Pods of a bridge whose gateway is on a device above it.
fn gateways(table: &mut Table, cast: &Cast) {
    for (what, net, flags, keeps) in [
        ("by a device above the bridge", NET_FOREIGN, device_flags::GATEWAY_ABOVE, true),
        ("by a device that is not above the bridge", NET_FOREIGN, 0, false),
        ("by the uplink", NET_FORGED, device_flags::GATEWAY_ABOVE, false),
    ] {
        let cast = cast.client_in(net).backend_in(NET_PODS);
        let mut world = cast.world();
        let edge = world.devices.entry(EDGE).or_default();
        edge.bridge = BRIDGE;
        edge.flags |= flags;
        let first = cast.first(cast.client, cast.frontend).at(mac(EDGE));
        let seen_as = if keeps { cast.client } else { tried(&cast, cast.frontend, 1) };
        table.add(
            cast.case(format!("a pod of a bridge whose way back is {what}"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&first)
                .becomes(&first.clone().from(seen_as).to(cast.backend))
                .opens(ONE)
                .embryonic([cast.connection().seen_as(seen_as).both()]),
        );
    }
}

/// An endpoint's answers on their way out, which came in by its own device and by another one.
fn replies(table: &mut Table, cast: &Cast) {
    for (whose, net, ifindex, is_own) in [
        ("by its device", NET_PODS, EDGE, true),
        ("by its bridge", NET_BACKENDS, BRIDGE, true),
        ("by the uplink", NET_PODS, UPLINK, false),
        ("by a pod's device", NET_FORGED, EDGE, false),
        ("by a device without our programs", NET_PODS, FOREIGN, false),
        ("by another bridge", NET_REMOTE, BRIDGE, false),
    ] {
        let cast = cast.backend_in(net);
        let fresh = cast.connection().age(1);
        let live = fresh.state(state::ESTABLISHED);
        for (what, frame) in packets(&cast, cast.backend, cast.client) {
            if what == "SYN" {
                continue;
            }
            for (of, before, world) in [
                ("a flow that nothing has proven", fresh, cast.world().embryonic(fresh.both())),
                ("a live flow", live, cast.world().flows(live.both())),
            ] {
                let case = cast
                    .case(format!("{what} of an endpoint {whose}, along {of}"))
                    .world(&world)
                    .tc_egress(EDGE)
                    .sends(&frame)
                    .came_by(ifindex)
                    .becomes(&frame.clone().from(cast.frontend))
                    .reply(ONE);
                table.add(if is_own { leaves_behind(case, &before, what, of) } else { case });
            }
        }
    }
}

/// Adds the flow's new state if the packet is the endpoint's own; nobody else's changes it.
fn leaves_behind(case: Case, before: &Connection, what: &str, of: &str) -> Case {
    let seen = before.age(0);
    let proven = seen.state(state::ESTABLISHED);
    let closing = proven.state(state::ESTABLISHED | state::FIN_REPLY);
    match (what, of) {
        ("RST" | "RST and ACK", "a live flow") => {
            case.flows([]).embryonic([proven.state(state::ESTABLISHED | state::RESET_REPLY).both()])
        }
        ("RST" | "RST and ACK", _) => case
            .embryonic([seen.state(state::RESET_REPLY).both()])
            .failed(seen.id, Failure::Refused),
        ("FIN and ACK", "a live flow") => case.flows([closing.both()]),
        ("FIN and ACK", _) => case.embryonic([]).flows([closing.both()]),
        ("SYN and ACK", "a flow that nothing has proven") => {
            case.embryonic([seen.answered().both()])
        }
        ("ACK", "a flow that nothing has proven") => case.embryonic([]).flows([proven.both()]),
        ("datagram", "a flow that nothing has proven") => case.embryonic([proven.both()]),
        _ => case,
    }
}

/// The client's side of a masqueraded flow, at both of its hooks.
fn sources(table: &mut Table, cast: &Cast) {
    let far = cast.backend_in(NET_FORGED);
    let source = REMOTE.source(&far).state(state::ESTABLISHED);
    let world = far.world().flows(source.both()).marks(mark::MASQUERADED);
    for (what, frame) in packets(&far, far.backend, source.seen_as) {
        let case = cast
            .case(format!("{what} of an endpoint to a masqueraded client, by a pod's device"))
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&frame);
        table.add(case.becomes(&frame.clone().to(far.client)));
    }
    let far = cast.backend_in(NET_REMOTE).client_in(NET_FORGED);
    let source = REMOTE.source(&far).state(state::ESTABLISHED);
    let near = REMOTE.masqueraded(&far).state(state::ESTABLISHED);
    let world = far.world().flows(flows_of(&near, &source)).marks(mark::MASQUERADED);
    for (what, frame) in packets(&far, far.client, far.backend) {
        let (program, frame) = REMOTE.out(frame);
        let case = cast
            .case(format!("{what} of a masqueraded client that came in by a pod's device"))
            .world(&world)
            .at(program, UPLINK)
            .sends(&frame)
            .came_by(EDGE);
        table.add(case.becomes(&frame.clone().from(source.seen_as)));
    }
}

/// Returns another address of the same lane.
fn of_one_lane(address: IpAddr) -> IpAddr {
    fn search<F: Ip>(address: IpAddr, of: impl Fn(u32) -> IpAddr) -> IpAddr {
        let lane_of = |address| F::of(address).map(|address| lane::<F>(&address));
        let wanted = lane_of(address);
        (0..16 * 16 * ADDRESS_WORDS)
            .map(of)
            .find(|other| lane_of(*other) == wanted)
            .expect("one of so many")
    }
    match address {
        IpAddr::V4(_) => {
            search::<V4>(address, |number| Ipv4Addr::from(0x0a00_0000 | number).into())
        }
        IpAddr::V6(_) => search::<V6>(address, |number| {
            Ipv6Addr::from(0xfd00 << 112 | u128::from(number)).into()
        }),
    }
}

/// Adds an address of the node that shares its lane with another address.
fn beside_node(world: &World, address: IpAddr) -> World {
    let (mut world, node) = (world.clone(), of_one_lane(address));
    let _ = world.node_addresses.insert(node, 0);
    *world.listing.entry(node).or_default() |= listing::NODE;
    world
}

/// Addresses that look like the node's.
fn lanes(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let data = cast.next(cast.client, cast.frontend);
    if cast.protocol == TCP {
        let world = beside_node(&cast.world(), cast.frontend.ip());
        table.add(
            cast.case("both entries lost, at a frontend of an address of the node's lane")
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&data)
                .becomes(&data.clone().to(cast.backend))
                .reason(Reason::Recovered, ONE)
                .embryonic([cast.connection().both()]),
        );
    }
    for (what, place) in [("another node's", REMOTE), ("this node's", LOCAL)] {
        let (cast, world) = place.set(cast);
        let world = beside_node(&place.met(&cast, &world), cast.backend.ip());
        let name = format!(
            "{title}: a masqueraded client leaves for an endpoint of the node's lane, {what}"
        );
        table.add(leaves(name, &cast, &world, place, &place.source(&cast)));
    }
    let (cast, world) = REMOTE.set(cast);
    let client = SocketAddr::new(cast.client.ip(), 2_000);
    let world = beside_node(&world.marks(mark::MASQUERADED), client.ip());
    let (program, first) = REMOTE.out(cast.first(client, cast.backend));
    table.add(
        cast.case("a direct client of the node's lane leaves from a port of ours")
            .world(&world)
            .at(program, UPLINK)
            .sends(&first),
    );
    let own: Connection = cast.connection().flags(flow::SOURCE | flow::DIRECT);
    let node = SocketAddr::new(cast.node, 2_000);
    let noted = Connection {
        client: node,
        frontend: cast.backend,
        seen_as: node,
        id: 0,
        generation: 0,
        service_port: 0,
        ..own
    };
    let (program, first) = REMOTE.out(cast.first(node, cast.backend));
    table.add(
        cast.case("the node itself leaves from a port of ours")
            .world(&world)
            .at(program, UPLINK)
            .sends(&first)
            .embryonic([noted.both()]),
    );
}
