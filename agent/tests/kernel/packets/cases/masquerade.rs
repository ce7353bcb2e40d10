//! The new flows that are masqueraded, and the address and port that they get.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice_common::Reason;
use sluice_common::abi::{
    Ipv4Address, Ipv6Address, ServiceKey, backend, detect_local, device_flags, flow, frontend,
    masquerade, policy,
};
use sluice_common::path::mark;

use super::Table;
use super::clash::{of_host, tried};
use crate::packets::case::{Case, End, Program, case};
use crate::packets::frame::{Frame, SYN, TCP};
use crate::packets::world::{
    Cast, Connection, EDGE, NARROW, NET_BACKENDS, NET_CLIENTS, NET_FOREIGN, NET_FRONTENDS,
    NET_NARROW, NET_OVERLAY, NET_PODS, NET_REMOTE, NET_UNROUTED, ONE, SELECTED, TUNNEL, UPLINK,
    Version, World, mac, route,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        matrix(table, &cast);
        other_family(table, &cast);
        kinds(table, &cast);
        node_port(table, &cast);
        shapes(table, &cast);
        ways_back(table, &cast);
        no_address(table, &cast);
        limits(table, &cast);
        host(table, &cast);
        host_elsewhere(table, &cast);
        left_by_xdp(table, &cast);
    }
}

/// A location of backends: a network, its device, and the flags of a backend there and of a flow to
/// it.
#[derive(Clone, Copy)]
pub(super) struct Place {
    net: u8,
    pub(super) device: u32,
    backend: u32,
    flow: u8,
}

/// A pod of this node.
pub(super) const LOCAL: Place = Place {
    net: NET_PODS,
    device: EDGE,
    backend: backend::SERVING | backend::LOCAL | SELECTED,
    flow: flow::LOCAL,
};
/// A pod of another node, by the underlay.
pub(super) const REMOTE: Place =
    Place { net: NET_REMOTE, device: UPLINK, backend: backend::SERVING | SELECTED, flow: 0 };
/// A pod of another node, by the overlay.
pub(super) const OVERLAY: Place = Place { net: NET_OVERLAY, device: TUNNEL, ..REMOTE };
/// A pod of another node, behind a small MTU.
pub(super) const BEHIND_NARROW: Place = Place { net: NET_NARROW, device: NARROW, ..REMOTE };

impl Place {
    /// Returns the flags of a backend there.
    pub(super) fn backend_flags(self) -> u32 {
        self.backend
    }

    /// Returns the cast with its backend there, and the maps.
    pub(super) fn set(self, cast: &Cast) -> (Cast, World) {
        let cast = cast.backend_in(self.net);
        let world = cast.world().backend_flags(ONE, self.backend);
        (cast, world)
    }

    /// Returns the client's flow with its source kept.
    pub(super) fn kept(self, cast: &Cast) -> Connection {
        cast.connection().flags(self.flow)
    }

    /// Returns the client's masqueraded flow: its source is kept until it leaves.
    pub(super) fn masqueraded(self, cast: &Cast) -> Connection {
        cast.connection().flags(self.flow | flow::MASQUERADED)
    }

    /// Returns the translation of the source where the packet leaves, with the port of an attempt.
    pub(super) fn source_at(self, cast: &Cast, attempt: u32) -> Connection {
        let port = tried(cast, cast.backend, attempt).port();
        let seen_as = SocketAddr::new(cast.node_on(self.device), port);
        let near = cast.connection().flags(self.flow | flow::SOURCE);
        Connection { frontend: cast.backend, seen_as, ..near }
    }

    /// Returns the translation of the source where the packet leaves.
    pub(super) fn source(self, cast: &Cast) -> Connection {
        self.source_at(cast, 1)
    }

    /// Returns the program at the egress of the backend's device, and a frame there.
    pub(super) fn out(self, frame: Frame) -> (Program, Frame) {
        if self.device == TUNNEL {
            (Program::EgressL3, frame.l3())
        } else {
            (Program::Egress, frame.at([2, 0, 0, 0, 7, 7]))
        }
    }

    /// Returns the maps once the client's packet has come in.
    pub(super) fn met(self, cast: &Cast, world: &World) -> World {
        world.clone().embryonic(self.masqueraded(cast).both()).marks(mark::MASQUERADED)
    }
}

/// Returns the first packet as it comes in on a device.
fn first(cast: &Cast, ifindex: u32) -> (Program, Frame) {
    let first = cast.first(cast.client, cast.frontend);
    if ifindex == TUNNEL {
        (Program::IngressL3, first.l3())
    } else {
        (Program::Ingress, first.at(mac(ifindex)))
    }
}

/// Returns the flow as it is recorded if its client comes in by a device: its flags tell whether
/// the replies leave by another one.
pub(super) fn as_met(
    cast: &Cast,
    world: &World,
    ifindex: u32,
    connection: &Connection,
) -> Connection {
    let key = ServiceKey {
        address: cast.frontend.ip(),
        port: cast.frontend.port(),
        protocol: cast.protocol,
        reserved: 0,
    };
    let inside =
        world.services.get(&key).is_some_and(|service| service.kind == frontend::CLUSTER_IP);
    let back = route(cast.client.ip()).map_or(0, |(ifindex, _)| ifindex);
    let is_away =
        !inside && ifindex != EDGE && back != ifindex && world.devices.contains_key(&back);
    connection.flags(connection.flags | if is_away { flow::AWAY } else { 0 })
}

/// Returns the case of a new flow where it comes in, masqueraded or with its source kept.
pub(super) fn opens(
    name: String,
    cast: &Cast,
    world: &World,
    ifindex: u32,
    connection: &Connection,
) -> Case {
    let (program, first) = first(cast, ifindex);
    let connection = as_met(cast, world, ifindex, connection);
    case(name)
        .world(world)
        .at(program, ifindex)
        .sends(&first)
        .opens(ONE)
        .embryonic([world.embryonic.clone(), connection.both()])
        .becomes(&first.from(connection.seen_as).to(connection.backend))
        .marks(
            world.marks
                | if connection.flags & flow::MASQUERADED == 0 { 0 } else { mark::MASQUERADED },
        )
}

/// Returns the case of a masqueraded client's first packet where it leaves.
pub(super) fn leaves(
    name: String,
    cast: &Cast,
    world: &World,
    place: Place,
    source: &Connection,
) -> Case {
    let (program, first) = place.out(cast.first(cast.client, cast.backend));
    case(name)
        .world(world)
        .at(program, place.device)
        .sends(&first)
        .embryonic([world.embryonic.clone(), source.both()])
        .becomes(&first.from(source.seen_as))
}

/// Adds a client without a way back.
fn refused(name: String, cast: &Cast, world: &World, ifindex: u32) -> Case {
    let (program, first) = first(cast, ifindex);
    case(name).world(world).at(program, ifindex).sends(&first).dropped(Reason::NoRoute, ONE)
}

/// For each mode and detector: who is masqueraded (m) and who is kept (k), at a ClusterIP, at an
/// external address of policy `Cluster`, and of policy `Local`. The seven letters stand for a pod
/// with a local and with a remote backend, a client outside with a local and with a remote backend,
/// a client outside without a way back with a local backend, and another node's pod with a local
/// and with a remote backend. Who is to be masqueraded (m) without a way back is refused.
const MATRIX: [(&str, u32, &str, u32, [&str; 3]); 9] = [
    (
        "needed",
        masquerade::NEEDED,
        "device",
        detect_local::DEVICE,
        ["kkkmmkm", "kkkmmkm", "kkkkkkk"],
    ),
    (
        "needed",
        masquerade::NEEDED,
        "address",
        detect_local::ADDRESS,
        ["kkmmmkm", "kkkmmkm", "kkkkkkk"],
    ),
    ("needed", masquerade::NEEDED, "none", detect_local::NONE, ["kmkmmkm", "kmkmmkm", "kkkkkkk"]),
    (
        "kube-proxy",
        masquerade::KUBE_PROXY,
        "device",
        detect_local::DEVICE,
        ["kkmmmmm", "mmmmmmm", "kkkkkkk"],
    ),
    (
        "kube-proxy",
        masquerade::KUBE_PROXY,
        "address",
        detect_local::ADDRESS,
        ["kkmmmkk", "mmmmmmm", "kkkkkkk"],
    ),
    (
        "kube-proxy",
        masquerade::KUBE_PROXY,
        "none",
        detect_local::NONE,
        ["kkkkkkk", "mmmmmmm", "kkkkkkk"],
    ),
    ("all", masquerade::ALL, "device", detect_local::DEVICE, ["mmmmmmm", "mmmmmmm", "kkkkkkk"]),
    ("all", masquerade::ALL, "address", detect_local::ADDRESS, ["mmmmmmm", "mmmmmmm", "kkkkkkk"]),
    ("all", masquerade::ALL, "none", detect_local::NONE, ["mmmmmmm", "mmmmmmm", "kkkkkkk"]),
];

const CLIENTS: [(&str, u8, u32, Place); 7] = [
    ("a pod, a local backend", NET_PODS, EDGE, LOCAL),
    ("a pod, a remote backend", NET_PODS, EDGE, REMOTE),
    ("a client outside, a local backend", NET_CLIENTS, UPLINK, LOCAL),
    ("a client outside, a remote backend", NET_CLIENTS, UPLINK, OVERLAY),
    ("a client without a way back, a local backend", NET_UNROUTED, UPLINK, LOCAL),
    ("another node's pod, a local backend", NET_REMOTE, UPLINK, LOCAL),
    ("another node's pod, a remote backend", NET_REMOTE, UPLINK, OVERLAY),
];

const FRONTENDS: [(&str, u32, u32); 3] = [
    ("ClusterIP", frontend::CLUSTER_IP, 0),
    ("external, Cluster", frontend::LOAD_BALANCER, 0),
    ("external, Local", frontend::LOAD_BALANCER, policy::EXTERNAL_LOCAL),
];

fn matrix(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (mode_name, mode, detector_name, detector, rows) in MATRIX {
        for ((frontend_name, kind, flags), letters) in FRONTENDS.into_iter().zip(rows) {
            for ((who, net, ifindex, place), letter) in CLIENTS.into_iter().zip(letters.chars()) {
                let (cast, world) = place.set(&cast.client_in(net));
                let world = world.kind(ONE, kind).modes(mode, detector);
                let mut world = world.pods(vec![cast.prefix(NET_PODS), cast.prefix(NET_REMOTE)]);
                world.port(ONE).flags = flags;
                let name = format!(
                    "{title}: masquerading {mode_name}, local pods by {detector_name}, {frontend_name}, {who}"
                );
                table.add(match letter {
                    'k' => opens(name, &cast, &world, ifindex, &place.kept(&cast)),
                    _ if net == NET_UNROUTED => refused(name, &cast, &world, ifindex),
                    _ => opens(name, &cast, &world, ifindex, &place.masqueraded(&cast)),
                });
            }
            // A backend at an address of the node itself answers through this node alone.
            for (who, net, ifindex) in
                [("a pod", NET_PODS, EDGE), ("a client outside", NET_UNROUTED, UPLINK)]
            {
                let cast =
                    Cast { backend: SocketAddr::new(cast.node, cast.backend.port()), ..*cast };
                let cast = cast.client_in(net);
                let flags_of_node = backend::HOST | LOCAL.backend;
                let mut world = cast
                    .world()
                    .backend_flags(ONE, flags_of_node)
                    .kind(ONE, kind)
                    .modes(mode, detector);
                world.port(ONE).flags = flags;
                let name = format!(
                    "{title}: masquerading {mode_name}, local pods by {detector_name}, {frontend_name}, {who}, this host"
                );
                table.add(opens(name, &cast, &world, ifindex, &LOCAL.kept(&cast)));
            }
        }
    }
}

/// Prefixes of one family say nothing about clients of the other family: there no local pods are
/// known.
fn other_family(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (network, bits) = match cast.version {
        Version::V4 => (Ipv6Addr::UNSPECIFIED.into(), 0),
        Version::V6 => (Ipv4Addr::UNSPECIFIED.into(), 0),
    };
    for (mode_name, mode, _, detector, rows) in MATRIX {
        if detector != detect_local::NONE {
            continue;
        }
        for ((frontend_name, kind, flags), letters) in FRONTENDS.into_iter().zip(rows) {
            for ((who, net, ifindex, place), letter) in CLIENTS.into_iter().zip(letters.chars()) {
                let (cast, world) = place.set(&cast.client_in(net));
                let world = world.kind(ONE, kind).modes(mode, detect_local::ADDRESS);
                let mut world = world.pods(vec![(network, bits)]);
                world.port(ONE).flags = flags;
                let name = format!(
                    "{title}: masquerading {mode_name}, local pods by the other family's addresses, {frontend_name}, {who}"
                );
                table.add(match letter {
                    'k' => opens(name, &cast, &world, ifindex, &place.kept(&cast)),
                    _ if net == NET_UNROUTED => refused(name, &cast, &world, ifindex),
                    _ => opens(name, &cast, &world, ifindex, &place.masqueraded(&cast)),
                });
            }
        }
    }
}

/// Kinds of frontends and devices beyond the matrix.
fn kinds(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, kind) in
        [("an external IP", frontend::EXTERNAL_IP), ("a load balancer", frontend::LOAD_BALANCER)]
    {
        for (where_to, place) in
            [("the underlay", REMOTE), ("the overlay", OVERLAY), ("a small MTU", BEHIND_NARROW)]
        {
            for (by, ifindex) in [("the uplink", UPLINK), ("the overlay", TUNNEL)] {
                let (cast, world) = place.set(cast);
                let world = world.kind(ONE, kind);
                let name = format!(
                    "{title}: {what}, met on {by}, a backend behind {where_to} is masqueraded to"
                );
                table.add(opens(name, &cast, &world, ifindex, &place.masqueraded(&cast)));
            }
            let (cast, world) = place.set(cast);
            let name =
                format!("{title}: {what}, its masqueraded client's packet leaves by {where_to}");
            let world = place.met(&cast, &world.kind(ONE, kind));
            table.add(leaves(name, &cast, &world, place, &place.source(&cast)));
        }
    }
}

/// A node port with a backend on another node.
fn node_port(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let node_port = cast.frontend(SocketAddr::new(cast.node, 30_080));
    let (node_port, mut world) = REMOTE.set(&node_port);
    let unspecified = if cast.node.is_ipv4() { [0; 4].into() } else { IpAddr::from([0_u16; 8]) };
    world.services.retain(|_, service| service.service_port != ONE);
    world.add_frontend(&node_port, ONE, SocketAddr::new(unspecified, 30_080), frontend::NODE_PORT);
    let _ = world.node_ports.insert(30_080);
    world.serve_node_ports(cast.node);
    let name = format!("{title}: a node port with a backend on another node is masqueraded to");
    table.add(opens(name, &node_port, &world, UPLINK, &REMOTE.masqueraded(&node_port)));
}

/// Masqueraded packets of other shapes.
fn shapes(table: &mut Table, cast: &Cast) {
    let (cast, world) = REMOTE.set(cast);
    let connection = REMOTE.masqueraded(&cast);
    let (program, first) = first(&cast, UPLINK);
    let shaped = match cast.client {
        SocketAddr::V4(_) => first.options(&[1; 8]),
        SocketAddr::V6(_) => first.extension(60, &[0, 0, 1, 4, 0, 0, 0, 0]),
    };
    for (what, frame) in [
        ("with options or extensions", shaped.clone()),
        ("with a VLAN tag", shaped.clone().tag(0x8100, 5)),
        ("with padding", shaped.padded(6)),
    ] {
        let case = cast
            .case(format!("a masqueraded packet {what}"))
            .world(&world)
            .at(program, UPLINK)
            .sends(&frame)
            .becomes(&frame.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([connection.both()])
            .marks(mark::MASQUERADED);
        table.cut_padded(case, frame.padding.len());
        let met = REMOTE.met(&cast, &world);
        let source = REMOTE.source(&cast);
        let frame = frame.to(cast.backend);
        let case = cast
            .case(format!("a masqueraded packet {what} leaves"))
            .world(&met)
            .tc_egress(UPLINK)
            .sends(&frame)
            .becomes(&frame.clone().from(source.seen_as))
            .embryonic([connection.both(), source.both()]);
        table.cut_padded(case, frame.padding.len());
    }
    table.add(
        cast.case("a frame for another host is not masqueraded")
            .world(&world)
            .at(program, UPLINK)
            .sends(&frame_for_another(&cast)),
    );
}

fn frame_for_another(cast: &Cast) -> Frame {
    cast.first(cast.client, cast.frontend).at([2, 9, 9, 9, 9, 9])
}

/// The ways back that count: those of a local backend, and a route to the client by a device with
/// programs.
fn ways_back(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, net, kept) in [
        ("by the uplink", NET_CLIENTS, true),
        ("by the overlay", NET_OVERLAY, true),
        ("by a small MTU", NET_NARROW, true),
        ("by a pod's link", NET_PODS, true),
        ("by a device without our programs", NET_FOREIGN, false),
        ("by no device at all", NET_UNROUTED, false),
    ] {
        let (cast, world) = LOCAL.set(&cast.client_in(net));
        for (frontend_name, kind) in
            [("a ClusterIP", frontend::CLUSTER_IP), ("an external IP", frontend::EXTERNAL_IP)]
        {
            let name = format!("{title}: {frontend_name}, the client outside is reached {what}");
            let world = world.clone().kind(ONE, kind);
            let connection = LOCAL.kept(&cast);
            table.add(if net == NET_PODS {
                // Only a pod's own link leads to its address. What comes by the uplink is somebody
                // else's, and gets another port.
                let seen_as = tried(&cast, cast.frontend, 1);
                opens(name, &cast, &world, UPLINK, &connection.seen_as(seen_as))
            } else if kept {
                opens(name, &cast, &world, UPLINK, &connection)
            } else {
                refused(name, &cast, &world, UPLINK)
            });
        }
    }
    // A link without local pods: its clients are treated like those outside.
    let (cast, mut world) = REMOTE.set(cast);
    world.devices.get_mut(&EDGE).expect("the edge").flags &= !device_flags::LOCAL_PODS;
    let name = format!("{title}: a client at a link that is no local pod's, a remote backend");
    table.add(opens(name, &cast, &world, EDGE, &REMOTE.masqueraded(&cast)));
}

/// No device with programs leads to the backend, or the device has no address.
fn no_address(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let remote = |net| Place { net, ..REMOTE };
    let mut drop = |what: &str, cast: &Cast, world: &World, ifindex| {
        let (program, first) = first(cast, ifindex);
        table.add(
            cast.case(format!("no address to masquerade with, {what}"))
                .world(world)
                .at(program, ifindex)
                .sends(&first)
                .dropped(Reason::NoRoute, ONE),
        );
        let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
        table.add(
            cast.case(format!("XDP leaves it to tc, {what}"))
                .world(world)
                .xdp(UPLINK)
                .sends(&first),
        );
    };
    for (what, net) in [
        ("a device without our programs", NET_BACKENDS),
        ("no route to the backend", NET_UNROUTED),
        ("our own device", NET_FRONTENDS),
    ] {
        let (mut cast, _) = remote(net).set(cast);
        cast.backend.set_ip(crate::packets::world::address(cast.version, net, 200));
        let world = cast.world().backend_flags(ONE, REMOTE.backend);
        drop(what, &cast, &world, UPLINK);
    }
    let (cast, mut world) = REMOTE.set(cast);
    let device = world.devices.get_mut(&UPLINK).expect("the uplink");
    (device.masquerade_v4, device.masquerade_v6) = (Ipv4Address::default(), Ipv6Address::default());
    drop("the device has none", &cast, &world, UPLINK);
    let (_, mut other) = REMOTE.set(&cast);
    let device = other.devices.get_mut(&UPLINK).expect("the uplink");
    if cast.client.is_ipv4() {
        device.masquerade_v4 = Ipv4Address::default();
        device.masquerade_v6.octets[0] = 0xfd;
    } else {
        device.masquerade_v6 = Ipv6Address::default();
        device.masquerade_v4.octets = [10, 0, 0, 1];
    }
    drop("the device has one of the other family", &cast, &other, UPLINK);
    let pod = cast.client_in(NET_PODS);
    let name = format!("{title}: no address to masquerade with, and none is needed for a pod");
    table.add(opens(name, &pod, &world, EDGE, &REMOTE.kept(&pod)));
}

/// TTL and MTU are left to the stack, which the packet passes between the two translations.
fn limits(table: &mut Table, cast: &Cast) {
    let (remote, world) = REMOTE.set(cast);
    let (program, packet) = first(&remote, UPLINK);
    for ttl in [0, 1, 255] {
        let packet = packet.clone().ttl(ttl);
        let case = cast
            .case(format!("a masqueraded packet with a TTL of {ttl}"))
            .world(&world)
            .at(program, UPLINK)
            .sends(&packet)
            .becomes(&packet.clone().to(remote.backend))
            .opens(ONE)
            .embryonic([REMOTE.masqueraded(&remote).both()])
            .marks(mark::MASQUERADED);
        table.add(case);
    }
    let (narrow, world) = BEHIND_NARROW.set(cast);
    let frame = match cast.protocol {
        TCP => Frame::tcp(narrow.client, narrow.frontend, SYN, &[0xab; 1400]),
        _ => Frame::udp(narrow.client, narrow.frontend, &[0xab; 1400]),
    };
    let frame = frame.at(mac(UPLINK));
    table.add(
        cast.case("a masqueraded packet that is larger than the next MTU")
            .world(&world)
            .tc_ingress(UPLINK)
            .sends(&frame)
            .becomes(&frame.clone().to(narrow.backend))
            .opens(ONE)
            .embryonic([BEHIND_NARROW.masqueraded(&narrow).both()])
            .marks(mark::MASQUERADED),
    );
}

/// Returns this host's flow with its source kept.
fn kept_of_host(place: Place, cast: &Cast) -> Connection {
    of_host(cast, place.kept(cast)).flags(place.flow | flow::HOST)
}

/// Returns this host's masqueraded flow, with the port of an attempt.
fn masqueraded_of_host(place: Place, cast: &Cast, attempt: u32) -> Connection {
    let port = tried(cast, cast.frontend, attempt).port();
    cast.connection()
        .flags(place.flow | flow::HOST | flow::MASQUERADED)
        .seen_as(SocketAddr::new(cast.node_on(place.device), port))
}

/// Returns the case of this host's first packet, which opens a flow where its route leaves.
fn opens_of_host(name: String, cast: &Cast, world: &World, connection: &Connection) -> Case {
    let first = cast.first(cast.client, cast.frontend);
    let marks = if connection.flags & flow::MASQUERADED == 0 { 0 } else { mark::MASQUERADED };
    case(name)
        .world(world)
        .tc_egress(UPLINK)
        .sends(&first)
        .becomes(&first.clone().from(connection.seen_as).to(connection.backend))
        .ends(End::Redirect)
        .opens(ONE)
        .embryonic([world.embryonic.clone(), connection.both()])
        .marks(mark::HOST | marks)
}

/// Packets of this host get the address that the route to the backend prescribes.
fn host(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let own = cast.client(SocketAddr::new(cast.node, 40_001));
    for (mode_name, mode) in [
        ("needed", masquerade::NEEDED),
        ("kube-proxy", masquerade::KUBE_PROXY),
        ("all", masquerade::ALL),
    ] {
        for (kind_name, kind) in
            [("a ClusterIP", frontend::CLUSTER_IP), ("an external IP", frontend::EXTERNAL_IP)]
        {
            for (what, place, changes) in [
                ("a local backend", LOCAL, false),
                ("a backend behind the device that its source is of", REMOTE, false),
                ("a backend behind another device", OVERLAY, true),
            ] {
                let (cast, world) = place.set(&own);
                let world = world.kind(ONE, kind).modes(mode, detect_local::DEVICE);
                let connection = if changes {
                    masqueraded_of_host(place, &cast, 1)
                } else {
                    kept_of_host(place, &cast)
                };
                let name = format!(
                    "{title}: this host asks {kind_name}, masquerading {mode_name}, {what}"
                );
                table.add(opens_of_host(name, &cast, &world, &connection));
            }
        }
    }
}

/// A device without programs, and a port that is taken.
fn host_elsewhere(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let own = cast.client(SocketAddr::new(cast.node, 40_001));
    let foreign = Place { net: NET_FOREIGN, ..REMOTE };
    let (cast_far, world) = foreign.set(&own);
    let name = format!("{title}: this host, a backend behind a device without our programs");
    table.add(opens_of_host(name, &cast_far, &world, &kept_of_host(foreign, &cast_far)));
    let (overlay, world) = OVERLAY.set(&own);
    let taken = masqueraded_of_host(OVERLAY, &overlay, 1);
    // Another client's flow that the backend sees as the same tuple.
    let blocker = Connection { client: cast.client, ..taken };
    let moved = masqueraded_of_host(OVERLAY, &overlay, 2);
    let name = format!("{title}: this host, its port is taken at the other device's address");
    table.add(opens_of_host(name, &overlay, &world.embryonic(blocker.both()), &moved));
}

/// A flow to a backend on this node, which XDP can finish.
fn left_by_xdp(table: &mut Table, cast: &Cast) {
    for (what, net, place) in [
        ("a remote backend by the underlay", NET_CLIENTS, REMOTE),
        ("a remote backend by the overlay", NET_CLIENTS, OVERLAY),
        ("a local backend, a client without a way back", NET_FOREIGN, LOCAL),
    ] {
        let (cast, world) = place.set(&cast.client_in(net));
        let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
        table.add(
            cast.case(format!("XDP leaves a packet to be masqueraded to tc, {what}"))
                .world(&world)
                .xdp(UPLINK)
                .sends(&first),
        );
    }
    let (local, world) = LOCAL.set(cast);
    let world = world.modes(masquerade::ALL, detect_local::DEVICE);
    let first = local.first(local.client, local.frontend).at(mac(UPLINK));
    table.add(
        cast.case("XDP opens a masqueraded flow to a local backend")
            .world(&world)
            .xdp(UPLINK)
            .sends(&first)
            .becomes(&first.clone().to(local.backend))
            .opens(ONE)
            .embryonic([LOCAL.masqueraded(&local).both()])
            .marks(mark::MASQUERADED),
    );
    for (what, kind, flags) in [
        ("a ClusterIP", frontend::CLUSTER_IP, 0),
        ("an external IP", frontend::EXTERNAL_IP, 0),
        ("a load balancer of policy Local", frontend::LOAD_BALANCER, policy::EXTERNAL_LOCAL),
    ] {
        let (cast, world) = LOCAL.set(cast);
        let mut world = world.kind(ONE, kind);
        world.port(ONE).flags = flags;
        let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
        table.add(
            cast.case(format!("XDP opens a flow of {what} from outside with a way back"))
                .world(&world)
                .xdp(UPLINK)
                .sends(&first)
                .becomes(&first.clone().to(cast.backend))
                .opens(ONE)
                .embryonic([LOCAL.kept(&cast).both()]),
        );
    }
}
