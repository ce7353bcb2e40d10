//! The backends that each class of clients reaches, and the clients that are dropped.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice_common::Reason;
use sluice_common::abi::{Range, detect_local, device_flags, frontend, masquerade};
use sluice_common::path::mark;

use super::Table;
use super::clash::of_host;
use super::masquerade::as_met;
use crate::packets::case::{End, Program};
use crate::packets::frame::{Frame, RST, TCP};
use crate::packets::world::{
    Cast, Connection, EDGE, NET_PODS, NET_REMOTE, ONE, SPARE, TUNNEL, UPLINK, Version, World,
    address, mac,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        sets(table, &cast);
        drops(table, &cast);
        detectors(table, &cast);
        detector_without_ranges(table, &cast);
    }
}

/// A third backend of the service port [`ONE`].
const THIRD: u32 = 8;
/// A node port.
const PORT: u16 = 30_080;

const KINDS: [(&str, u32); 4] = [
    ("a ClusterIP", frontend::CLUSTER_IP),
    ("a load balancer's address", frontend::LOAD_BALANCER),
    ("an external IP", frontend::EXTERNAL_IP),
    ("a node port", frontend::NODE_PORT),
];

/// Returns the cast and the maps for a kind of frontend, without ranges.
fn of_kind(cast: &Cast, kind: u32) -> (Cast, World) {
    let mut cast = *cast;
    let mut world = cast.world().kind(ONE, kind);
    if kind == frontend::NODE_PORT {
        let unspecified: IpAddr = match cast.version {
            Version::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Version::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        world.services.retain(|_, service| service.service_port != ONE);
        world.add_frontend(&cast, ONE, SocketAddr::new(unspecified, PORT), kind);
        let _ = world.node_ports.insert(PORT);
        world.serve_node_ports(cast.node);
        cast = cast.frontend(SocketAddr::new(cast.node, PORT));
    }
    (cast, world)
}

/// Adds a backend for each class: internal, external from inside, external from outside.
fn three(cast: &Cast, world: &mut World) -> [Connection; 3] {
    let third = SocketAddr::new(address(cast.version, NET_PODS, 33), cast.backend.port());
    world.add_backend(cast, THIRD, ONE, third);
    let ranges = [ONE, SPARE, THIRD].map(|id| {
        world.fill(id, &[id]);
        world.ports[&id].ranges[0]
    });
    world.port(ONE).ranges = ranges;
    let one = cast.connection();
    [
        one,
        Connection { id: SPARE, backend: cast.other_backend, ..one },
        Connection { id: THIRD, backend: third, ..one },
    ]
}

/// Each client's name, hook and device, and its class at an external address.
const PLACES: [(&str, Program, u32, usize); 4] = [
    ("a local pod", Program::Ingress, EDGE, 1),
    ("a client outside", Program::Ingress, UPLINK, 2),
    ("a client outside, by XDP", Program::Xdp, UPLINK, 2),
    ("a client behind the overlay", Program::IngressL3, TUNNEL, 2),
];

fn sets(table: &mut Table, cast: &Cast) {
    for (what, kind) in KINDS {
        let (cast, mut world) = of_kind(cast, kind);
        let backends = three(&cast, &mut world);
        for (who, program, ifindex, class) in PLACES {
            let class = if kind == frontend::CLUSTER_IP { 0 } else { class };
            let connection = as_met(&cast, &world, ifindex, &backends[class]);
            let first = cast.first(cast.client, cast.frontend);
            let first =
                if program == Program::IngressL3 { first.l3() } else { first.at(mac(ifindex)) };
            table.add(
                cast.case(format!("three sets, {what} has class {class} for {who}"))
                    .world(&world)
                    .at(program, ifindex)
                    .sends(&first)
                    .becomes(&first.clone().to(connection.backend))
                    .opens(connection.id)
                    .embryonic([connection.both()]),
            );
        }
        if kind == frontend::NODE_PORT {
            continue;
        }
        let class = usize::from(kind != frontend::CLUSTER_IP);
        let connection = of_host(&cast, backends[class]);
        let first = cast.first(connection.client, cast.frontend);
        table.add(
            cast.case(format!("three sets, {what} has class {class} for this host"))
                .world(&world)
                .tc_egress(UPLINK)
                .sends(&first)
                .becomes(&first.clone().from(connection.seen_as).to(connection.backend))
                .ends(End::Redirect)
                .opens(connection.id)
                .embryonic([connection.both()])
                .marks(mark::HOST),
        );
    }
}

/// A class without backends drops instead of rejecting if other classes have some.
fn drops(table: &mut Table, cast: &Cast) {
    for (what, kind) in KINDS {
        let (cast, plain) = of_kind(cast, kind);
        for place in PLACES {
            drops_at(table, &cast, &plain, (what, kind), place);
        }
        if kind == frontend::NODE_PORT {
            continue;
        }
        let mut world = plain.clone();
        world.port(ONE).ranges[usize::from(kind != frontend::CLUSTER_IP)] = Range::DROP;
        let first = cast.first(SocketAddr::new(cast.node, 40_001), cast.frontend);
        table.add(
            cast.case(format!("{what} without local backends drops this host's packet"))
                .world(&world)
                .tc_egress(UPLINK)
                .sends(&first)
                .dropped(Reason::NoLocalBackend, ONE),
        );
    }
}

/// Requests to one kind of frontend, at one hook.
fn drops_at(
    table: &mut Table,
    cast: &Cast,
    plain: &World,
    (what, kind): (&str, u32),
    (who, program, ifindex, outer): (&str, Program, u32, usize),
) {
    let class = if kind == frontend::CLUSTER_IP { 0 } else { outer };
    let frame = |frame: Frame| {
        if program == Program::IngressL3 { frame.l3() } else { frame.at(mac(ifindex)) }
    };
    let mut world = plain.clone();
    world.port(ONE).ranges[class] = Range::DROP;
    let first = frame(cast.first(cast.client, cast.frontend));
    let drops = cast.case(format!("{what} without local backends drops {who}"));
    let case = drops.world(&world).at(program, ifindex).sends(&first);
    // XDP leaves the packet to tc.
    let is_left = program == Program::Xdp;
    table.add(if is_left { case } else { case.dropped(Reason::NoLocalBackend, ONE) });
    let mut others = plain.clone();
    others.port(ONE).ranges = [Range::DROP; 3];
    others.port(ONE).ranges[class] = plain.ports[&ONE].ranges[class];
    table.add(
        cast.case(format!("{what} serves {who} where only others are dropped"))
            .world(&others)
            .at(program, ifindex)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([as_met(cast, &others, ifindex, &cast.connection()).both()]),
    );
    if cast.protocol == TCP && program == Program::Ingress {
        let reset = frame(Frame::tcp(cast.client, cast.frontend, RST, &[]));
        let drops = cast.case(format!("{what} without local backends drops a reset of {who}"));
        let case = drops.world(&world).at(program, ifindex).sends(&reset);
        // At an address of the node the packet may belong to a connection of the stack.
        let at_node = kind == frontend::NODE_PORT;
        table.add(if at_node { case } else { case.dropped(Reason::NoLocalBackend, ONE) });
    }
}

/// The ways to recognise a client as a local pod.
fn detectors(table: &mut Table, cast: &Cast) {
    let (pod, far) = (cast.client_in(NET_PODS), cast.client_in(NET_REMOTE));
    for (what, cast, ifindex, detector, flags, class) in [
        ("by device, a pod's link", cast, EDGE, detect_local::DEVICE, device_flags::LOCAL_PODS, 1),
        ("by device, a link that is no pod's", &pod, EDGE, detect_local::DEVICE, 0, 2),
        ("by device, a pod's address on the uplink", &far, UPLINK, detect_local::DEVICE, 0, 2),
        (
            "by some devices, a pod's link",
            cast,
            EDGE,
            detect_local::SOME_DEVICES,
            device_flags::LOCAL_PODS,
            1,
        ),
        (
            "by some devices, a link that is none of them",
            &pod,
            EDGE,
            detect_local::SOME_DEVICES,
            0,
            2,
        ),
        ("by address, a pod's", &pod, EDGE, detect_local::ADDRESS, 0, 1),
        ("by address, a pod's address on the uplink", &far, UPLINK, detect_local::ADDRESS, 0, 1),
        (
            "by address, a stranger's",
            cast,
            EDGE,
            detect_local::ADDRESS,
            device_flags::LOCAL_PODS,
            2,
        ),
        (
            "not at all, a pod's address and link",
            &pod,
            EDGE,
            detect_local::NONE,
            device_flags::LOCAL_PODS,
            2,
        ),
    ] {
        let world =
            cast.world().kind(ONE, frontend::LOAD_BALANCER).modes(masquerade::NEEDED, detector);
        let mut world =
            world.pods(vec![cast.prefix(90), cast.prefix(NET_PODS), cast.prefix(NET_REMOTE)]);
        let backends = three(cast, &mut world);
        world.devices.get_mut(&ifindex).expect("the device").flags = flags;
        let connection = as_met(cast, &world, ifindex, &backends[class]);
        let first = cast.first(cast.client, cast.frontend).at(mac(ifindex));
        table.add(
            cast.case(format!("local pods are known {what}: class {class}"))
                .world(&world)
                .tc_ingress(ifindex)
                .sends(&first)
                .becomes(&first.clone().to(connection.backend))
                .opens(connection.id)
                .embryonic([connection.both()]),
        );
    }
}

/// Pods are to be recognised by address, but no range is known.
fn detector_without_ranges(table: &mut Table, cast: &Cast) {
    let mut world = cast.world().kind(ONE, frontend::LOAD_BALANCER);
    let backends = three(cast, &mut world);
    world.settings.detect_local = detect_local::ADDRESS;
    let first = cast.first(cast.client, cast.frontend);
    table.add(
        cast.case("local pods are known by address, and no range is")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(backends[2].backend))
            .opens(THIRD)
            .embryonic([backends[2].both()]),
    );
}
