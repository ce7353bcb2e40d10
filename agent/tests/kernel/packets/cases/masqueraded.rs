//! Packets along masqueraded flows. Each direction is translated twice: the frontend's side on the
//! client's device, and the client's side on the backend's.

use std::net::{IpAddr, SocketAddr};

use sluice_common::Reason;
use sluice_common::abi::{flow, frontend, state};
use sluice_common::path::mark;

use super::Table;
use super::masquerade::{LOCAL, OVERLAY, Place, REMOTE, leaves};
use crate::packets::case::{Case, End, Program, case};
use crate::packets::frame::{ACK, FIN, Frame, RST, SYN, TCP, UDP};
use crate::packets::world::{
    BRIDGE, Cast, Connection, EDGE, Flows, NARROW, NARROW_MTU, NET_BACKENDS, NET_CLIENTS,
    NET_NARROW, NET_PODS, NET_UNROUTED, ONE, OWN, TUNNEL, UPLINK, Version, World, mac,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        first_reply(table, &cast);
        both_ways(table, &cast);
        lost(table, &cast);
        elsewhere(table, &cast);
        replies_elsewhere(table, &cast);
        xdp_with_local_backend(table, &cast);
        bridge_ports(table, &cast);
        without_address(table, &cast);
        direct_beside_masqueraded(table, &cast);
        away(table, &cast);
        stack(table, &cast);
        errors(table, &cast);
        errors_elsewhere(table, &cast);
        host(table, &cast);
    }
    for cast in Cast::of(TCP) {
        proof(table, &cast);
        endings(table, &cast);
        lost_altogether(table, &cast);
    }
}

/// Returns a frame that comes in on a device.
pub(super) fn on(ifindex: u32, frame: Frame) -> (Program, Frame) {
    if ifindex == TUNNEL {
        (Program::IngressL3, frame.l3())
    } else {
        (Program::Ingress, frame.at(mac(ifindex)))
    }
}

/// A client's network and device, and the location of its backend.
pub(super) const PAIRS: [(&str, u8, u32, Place); 5] = [
    ("outside to a remote backend", NET_CLIENTS, UPLINK, REMOTE),
    ("outside to a backend behind the overlay", NET_CLIENTS, UPLINK, OVERLAY),
    ("outside to a local backend", NET_CLIENTS, UPLINK, LOCAL),
    ("a pod to a remote backend", NET_PODS, EDGE, REMOTE),
    ("a pod to a local backend", NET_PODS, EDGE, LOCAL),
];

/// A hook at which a packet of a masqueraded flow is seen.
struct Meeting {
    what: &'static str,
    program: Program,
    ifindex: u32,
    frame: Frame,
    becomes: Frame,
    /// Whether the frontend's side is translated, which is where the packet is counted.
    near: bool,
    reply: bool,
}

impl Meeting {
    fn case(&self, name: &str, world: &World) -> Case {
        let case = case(name)
            .world(world)
            .at(self.program, self.ifindex)
            .sends(&self.frame)
            .becomes(&self.becomes);
        match (self.near, self.reply) {
            (false, _) => case,
            (true, false) => case.forward(ONE),
            (true, true) => case.reply(ONE),
        }
    }
}

/// Returns the four places where a packet and its reply are translated.
fn meetings(
    cast: &Cast,
    ifindex: u32,
    place: Place,
    make: impl Fn(SocketAddr, SocketAddr, bool) -> Frame,
) -> [Meeting; 4] {
    let node = place.source(cast).seen_as;
    let (client, frontend, backend) = (cast.client, cast.frontend, cast.backend);
    let (program, question) = on(ifindex, make(client, frontend, false));
    let (leaving, sent) = place.out(make(client, backend, false));
    let (coming, answer) = on(place.device, make(backend, node, true));
    let returned = make(backend, client, true);
    [
        Meeting {
            what: "a packet comes in",
            program,
            ifindex,
            becomes: question.clone().to(backend),
            frame: question,
            near: true,
            reply: false,
        },
        Meeting {
            what: "a packet leaves",
            program: leaving,
            ifindex: place.device,
            becomes: sent.clone().from(node),
            frame: sent,
            near: false,
            reply: false,
        },
        Meeting {
            what: "a reply comes in",
            program: coming,
            ifindex: place.device,
            becomes: answer.clone().to(client),
            frame: answer,
            near: false,
            reply: true,
        },
        Meeting {
            what: "a reply leaves",
            program: Program::Egress,
            ifindex,
            becomes: returned.clone().from(frontend),
            frame: returned,
            near: true,
            reply: true,
        },
    ]
}

/// Returns the entries of both flows.
pub(super) fn flows_of(one: &Connection, other: &Connection) -> Flows {
    let mut flows = one.both();
    flows.extend(other.both());
    flows
}

fn first_reply(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, net, ifindex, place) in PAIRS {
        let (cast, world) = place.set(&cast.client_in(net));
        let (near, far) = (place.masqueraded(&cast), place.source(&cast));
        let make = |from, to, reply| match (cast.protocol, reply) {
            (TCP, true) => Frame::tcp(from, to, SYN | ACK, &[]),
            (TCP, false) => Frame::tcp(from, to, SYN, &[]),
            _ => Frame::udp(from, to, b"answer"),
        };
        let world = world.embryonic(flows_of(&near, &far)).marks(mark::MASQUERADED);
        for meeting in meetings(&cast, ifindex, place, make) {
            let name =
                format!("{title}: first packets of a masqueraded flow, {}, {what}", meeting.what);
            let case = meeting.case(&name, &world);
            let (own, other) = if meeting.near { (near, far) } else { (far, near) };
            table.add(match (cast.protocol, meeting.reply) {
                (UDP, true) => case.embryonic([own.state(state::ESTABLISHED).both(), other.both()]),
                (TCP, true) => case.embryonic([own.answered().both(), other.both()]),
                _ => case,
            });
            // Without a mark nothing is looked up.
            if !meeting.near {
                let unmarked = world.clone().marks(0);
                table.add(
                    cast.case(format!("nobody was ever masqueraded, {}, {what}", meeting.what))
                        .world(&unmarked)
                        .at(meeting.program, meeting.ifindex)
                        .sends(&meeting.frame),
                );
            }
        }
    }
}

fn both_ways(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, net, ifindex, place) in PAIRS {
        let (cast, world) = place.set(&cast.client_in(net));
        let near = place.masqueraded(&cast).state(state::ESTABLISHED);
        let far = place.source(&cast).state(state::ESTABLISHED);
        for (age_name, age) in [("young", 5), ("old", 30)] {
            let world = world
                .clone()
                .flows(flows_of(&near.age(age), &far.age(age)))
                .marks(mark::MASQUERADED);
            let cut = age == 30 && what == PAIRS[1].0;
            for meeting in meetings(&cast, ifindex, place, |from, to, _| cast.next(from, to)) {
                let name = format!(
                    "{title}: along a {age_name} masqueraded flow, {}, {what}",
                    meeting.what
                );
                let (own, other) = if meeting.near { (near, far) } else { (far, near) };
                let own = if age == 5 { own.age(5) } else { own };
                let case = meeting.case(&name, &world).flows([flows_of(&own, &other.age(age))]);
                if cut { table.cut(case) } else { table.add(case) }
            }
        }
    }
}

/// Lost entries are made again by packets of the other direction, and by those of their own.
fn lost(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, net, ifindex, place) in PAIRS {
        let (cast, world) = place.set(&cast.client_in(net));
        let near = place.masqueraded(&cast).state(state::ESTABLISHED);
        let far = place.source(&cast).state(state::ESTABLISHED);
        let world = world.marks(mark::MASQUERADED);
        for meeting in meetings(&cast, ifindex, place, |from, to, _| cast.next(from, to)) {
            let own = if meeting.near { near } else { far };
            let half = if meeting.reply { own.age(30).reply() } else { own.age(30).forward() };
            let other = if meeting.near { far } else { near };
            let world = world.clone().flows(other.both());
            let name = format!(
                "{title}: the other way's lost entry is made again, {}, {what}",
                meeting.what
            );
            table.add(
                meeting.case(&name, &world.clone().flows(half)).flows([flows_of(&own, &other)]),
            );
            if !meeting.near && meeting.reply {
                table.add(
                    cast.case(format!(
                        "a reply to this node that no entry is for, {}, {what}",
                        meeting.what
                    ))
                    .world(&world)
                    .at(meeting.program, meeting.ifindex)
                    .sends(&meeting.frame),
                );
            }
        }
        // The port follows from the tuple: the backend sees the same client again.
        let known = world.flows(near.both());
        let (program, frame) = place.out(cast.next(cast.client, cast.backend));
        table.add(
            cast.case(format!("a client's source in the middle of a flow that is known, {what}"))
                .world(&known)
                .at(program, place.device)
                .sends(&frame)
                .becomes(&frame.clone().from(far.seen_as))
                .embryonic([far.state(0).both()]),
        );
    }
}

/// Packets of a masqueraded flow at hooks where they are left alone.
fn elsewhere(table: &mut Table, cast: &Cast) {
    let (cast, world) = REMOTE.set(cast);
    let near = REMOTE.masqueraded(&cast).state(state::ESTABLISHED);
    let far = REMOTE.source(&cast).state(state::ESTABLISHED);
    let world = world.flows(flows_of(&near, &far)).marks(mark::MASQUERADED);
    let mut pass = |what: &str, program, ifindex, frame: &Frame| {
        let frame = frame.clone().at(mac(ifindex));
        table.add(cast.case(what).world(&world).at(program, ifindex).sends(&frame));
    };
    // A datagram from there would belong to somebody else, and get another port: the programs leave
    // alone what they have translated.
    if cast.protocol == TCP {
        pass(
            "a masqueraded packet has left for its backend and is met once more",
            Program::Egress,
            EDGE,
            &cast.next(far.seen_as, cast.backend),
        );
    }
    pass(
        "a reply has left for its masqueraded client and is met once more",
        Program::Egress,
        EDGE,
        &cast.next(cast.frontend, cast.client),
    );
}

/// Replies, and other packets, at hooks where they are left alone.
fn replies_elsewhere(table: &mut Table, cast: &Cast) {
    let (cast, world) = REMOTE.set(cast);
    let near = REMOTE.masqueraded(&cast).state(state::ESTABLISHED);
    let far = REMOTE.source(&cast).state(state::ESTABLISHED);
    let world = world.flows(flows_of(&near, &far)).marks(mark::MASQUERADED);
    let answer = cast.next(cast.backend, far.seen_as).at(mac(UPLINK));
    let mut pass = |what: &str, program, ifindex, frame: &Frame| {
        let frame = frame.clone().at(mac(ifindex));
        table.add(cast.case(what).world(&world).at(program, ifindex).sends(&frame));
    };
    pass(
        "a reply to a masqueraded client as the node, seen at an egress",
        Program::Egress,
        EDGE,
        &answer,
    );
    pass(
        "a reply to a masqueraded client, translated, seen at an ingress",
        Program::Ingress,
        UPLINK,
        &cast.next(cast.backend, cast.client),
    );
    if cast.protocol != UDP {
        pass(
            "a client's packet to the backend beside its masqueraded flow comes in",
            Program::Ingress,
            UPLINK,
            &cast.next(cast.client, cast.backend),
        );
    }
    pass("XDP leaves a reply of a masqueraded flow", Program::Xdp, UPLINK, &answer);
    pass(
        "XDP leaves a packet of a masqueraded flow to a remote backend",
        Program::Xdp,
        UPLINK,
        &cast.next(cast.client, cast.frontend),
    );
    let mut other = far.seen_as;
    other.set_port(other.port() ^ 1);
    pass(
        "a backend's packet to another port of the node",
        Program::Ingress,
        UPLINK,
        &cast.next(cast.backend, other),
    );
}

/// XDP's part of a masqueraded flow to a local backend.
fn xdp_with_local_backend(table: &mut Table, cast: &Cast) {
    let (cast, _) = REMOTE.set(cast);
    let (local, world) = LOCAL.set(&cast);
    let near = LOCAL.masqueraded(&local).state(state::ESTABLISHED);
    let far = LOCAL.source(&local).state(state::ESTABLISHED);
    let world = world.flows(flows_of(&near, &far)).marks(mark::MASQUERADED);
    let next = local.next(local.client, local.frontend).at(mac(UPLINK));
    table.add(
        cast.case("XDP takes a packet of a masqueraded flow to a local backend")
            .world(&world)
            .xdp(UPLINK)
            .sends(&next)
            .becomes(&next.clone().to(local.backend))
            .forward(ONE),
    );
    // An answer of a local backend comes in by no uplink, and XDP finishes what it can.
    let answer = local.next(local.backend, far.seen_as).at(mac(UPLINK));
    table.add(
        cast.case("XDP takes a reply of a local backend to a masqueraded client")
            .world(&world)
            .xdp(UPLINK)
            .sends(&answer)
            .becomes(&answer.clone().to(local.client)),
    );
}

/// Client and backend are ports of one bridge: a packet that keeps its source is bridged, a
/// masqueraded one is routed.
fn bridge_ports(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    // Both are ports of one bridge: a packet that keeps its source is bridged, a masqueraded one is
    // routed.
    let pod = cast.client_in(NET_PODS);
    let bridged = pod.backend_in(NET_BACKENDS);
    for (what, all) in [("masqueraded", true), ("with its own source", false)] {
        let mut world = bridged.world().backend_flags(ONE, LOCAL.backend_flags());
        if all {
            world.settings.masquerade = sluice_common::abi::masquerade::ALL;
        }
        world.devices.get_mut(&EDGE).expect("the edge").bridge = BRIDGE;
        let first = bridged.first(bridged.client, bridged.frontend);
        let becomes = first.clone().to(bridged.backend);
        let case = cast
            .case(format!("a bridge's port, a pod {what}"))
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .opens(ONE);
        table.add(if all {
            case.becomes(&becomes)
                .embryonic([LOCAL.masqueraded(&bridged).both()])
                .marks(mark::MASQUERADED)
        } else {
            case.becomes(&becomes.at(crate::packets::world::BACKEND_MAC))
                .embryonic([LOCAL.kept(&bridged).both()])
        });
        if all {
            let met = LOCAL.met(&bridged, &world);
            let name = format!("{title}: a masqueraded pod's packet leaves by a bridge's port");
            table.add(leaves(name, &bridged, &met, LOCAL, &LOCAL.source(&bridged)));
        }
    }
}

/// The backend's device has no address to masquerade with.
fn without_address(table: &mut Table, cast: &Cast) {
    for place in [REMOTE, LOCAL] {
        let (cast, world) = place.set(cast);
        let mut world = place.met(&cast, &world);
        let device = world.devices.get_mut(&place.device).expect("the backend's device");
        (device.masquerade_v4, device.masquerade_v6) = Default::default();
        let (program, frame) = place.out(cast.first(cast.client, cast.backend));
        table.add(
            cast.case(format!("no address to masquerade with on device {}", place.device))
                .world(&world)
                .at(program, place.device)
                .sends(&frame)
                .dropped(Reason::NoRoute, ONE),
        );
    }
}

/// A direct connection from the port of a masqueraded client.
fn direct_beside_masqueraded(table: &mut Table, cast: &Cast) {
    // A direct connection from the same client port: the reply tuple of the masqueraded flow is
    // taken.
    let (local, world) = LOCAL.set(&cast.client_in(NET_PODS));
    let near = LOCAL.masqueraded(&local).state(state::ESTABLISHED);
    let far = LOCAL.source(&local).state(state::ESTABLISHED);
    let world = world.flows(flows_of(&near, &far)).marks(mark::MASQUERADED);
    let first = local.first(local.client, local.backend);
    let seen_as = super::clash::tried(&local, local.backend, 1);
    let direct = Connection {
        frontend: local.backend,
        seen_as,
        id: 0,
        generation: 0,
        service_port: 0,
        flags: flow::DIRECT,
        ..local.connection()
    };
    table.add(
        cast.case("a direct connection beside a masqueraded flow gets another port")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().from(seen_as))
            .reason(Reason::DirectRemapped, 0)
            .embryonic([direct.both()])
            .marks(mark::DIRECT | mark::MASQUERADED),
    );
    // Since it has its own port, it does not count as a masqueraded client's where it leaves.
    let both = world.embryonic(direct.both()).marks(mark::DIRECT | mark::MASQUERADED);
    let sent = local.first(seen_as, local.backend);
    table.add(
        cast.case("a direct connection beside a masqueraded flow leaves with its source")
            .world(&both)
            .tc_egress(EDGE)
            .sends(&sent),
    );
}

/// The route back to the client leaves by another device than the client came in by.
fn away(table: &mut Table, cast: &Cast) {
    for (what, place, flags) in
        [("masqueraded", REMOTE, flow::MASQUERADED), ("with its own source", LOCAL, flow::LOCAL)]
    {
        away_from(table, cast, what, place, flags);
        away_as_the_stack(table, cast, what, place, flags);
    }
}

/// Replies of a flow that leave by another device than its client's packets came by.
fn away_from(table: &mut Table, cast: &Cast, what: &str, place: Place, flags: u8) {
    let (cast, world) = place.set(cast);
    let near = cast.connection().state(state::ESTABLISHED).flags(flags);
    let world = world.kind(ONE, frontend::EXTERNAL_IP).marks(mark::MASQUERADED);
    let reply = cast.next(cast.backend, cast.client);
    let becomes = reply.clone().from(cast.frontend);
    let case = |name: &str, world: &World| {
        cast.case(format!("{name}, {what}")).world(world).tc_egress(UPLINK).sends(&reply).reply(ONE)
    };
    let away = near.flags(flags | flow::AWAY);
    table.add(
        case("a reply that leaves by another device is routed", &world.clone().flows(away.both()))
            .routed(&becomes),
    );
    table.add(
        case(
            "a reply that leaves by its client's device is not",
            &world.clone().flows(near.both()),
        )
        .becomes(&becomes),
    );
    let next = cast.next(cast.client, cast.frontend).l3();
    table.add(
        cast.case(format!("a packet of a flow whose replies leave by another device, {what}"))
            .world(&world.clone().flows(away.both()))
            .tc_ingress_l3(TUNNEL)
            .sends(&next)
            .becomes(&next.clone().to(cast.backend))
            .forward(ONE),
    );
}

/// The same where the stack would refuse them.
fn away_as_the_stack(table: &mut Table, cast: &Cast, what: &str, place: Place, flags: u8) {
    let (cast, world) = place.set(cast);
    let world = world.kind(ONE, frontend::EXTERNAL_IP).marks(mark::MASQUERADED);
    // Packets that we forward are treated as the stack would treat them.
    let gone = cast.client_in(NET_UNROUTED);
    let connection = gone.connection().state(state::ESTABLISHED).flags(flags | flow::AWAY);
    table.add(
        cast.case(format!("a reply that is to be routed and that no route leads to, {what}"))
            .world(&world.clone().flows(connection.both()))
            .tc_egress(UPLINK)
            .sends(&gone.next(gone.backend, gone.client))
            .dropped(Reason::NoRoute, ONE),
    );
    let narrow = cast.client_in(NET_NARROW);
    let connection = narrow.connection().state(state::ESTABLISHED).flags(flags | flow::AWAY);
    let frame = match cast.protocol {
        TCP => Frame::tcp(narrow.backend, narrow.client, ACK, &[0xab; 1300]),
        _ => Frame::udp(narrow.backend, narrow.client, &[0xab; 1300]),
    };
    let kind = if cast.version == Version::V4 { (3, 4) } else { (2, 0) };
    let answer = super::reject::error(&frame, kind, NARROW_MTU).at(mac(UPLINK));
    table.add(
        cast.case(format!("a reply that is to be routed and is too big, {what}"))
            .world(&world.flows(connection.both()))
            .tc_egress(UPLINK)
            .sends(&frame)
            .becomes(&answer)
            .ends(End::Redirect)
            .reason(Reason::TooBig, ONE),
    );
}

/// TTL, MTU and routes are left to the stack, which each packet passes between the two
/// translations.
fn stack(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = REMOTE.set(&cast.client_in(NET_UNROUTED));
    let near = REMOTE.masqueraded(&cast).state(state::ESTABLISHED);
    let far = REMOTE.source(&cast).state(state::ESTABLISHED);
    let world = world.flows(flows_of(&near, &far)).marks(mark::MASQUERADED);
    let large = |from, to, _| match cast.protocol {
        TCP => Frame::tcp(from, to, ACK, &[0xab; 1400]).ttl(1),
        _ => Frame::udp(from, to, &[0xab; 1400]).ttl(1),
    };
    for meeting in meetings(&cast, NARROW, REMOTE, large) {
        let name = format!("{title}: what only the stack may refuse, {}", meeting.what);
        table.add(meeting.case(&name, &world));
    }
}

/// ICMP errors about packets of masqueraded flows.
fn errors(table: &mut Table, cast: &Cast) {
    let kinds = match cast.version {
        Version::V4 => [("port unreachable", (3, 3), 0), ("fragmentation needed", (3, 4), 1280)],
        Version::V6 => [("port unreachable", (1, 4), 0), ("packet too big", (2, 0), 1280)],
    };
    for (pair, net, ifindex, place) in PAIRS {
        errors_of(table, cast, kinds, (pair, net, ifindex, place));
    }
}

/// Errors about the packets of a pair.
fn errors_of(
    table: &mut Table,
    cast: &Cast,
    kinds: [(&str, (u8, u8), u32); 2],
    (pair, net, ifindex, place): (&str, u8, u32, Place),
) {
    let (cast, world) = place.set(&cast.client_in(net));
    let near = place.masqueraded(&cast).state(state::ESTABLISHED);
    let far = place.source(&cast).state(state::ESTABLISHED);
    let world = world.flows(flows_of(&near, &far)).marks(mark::MASQUERADED);
    let (client, frontend, backend, node) = (cast.client, cast.frontend, cast.backend, far.seen_as);
    for (what, kind, rest) in kinds {
        let error = |from: IpAddr, to: SocketAddr, quoted: Frame| {
            Frame::icmp(from, to.ip(), kind, rest, &quoted.packet())
        };
        let mut add = |who: &str, near: bool, program, ifindex, (is, becomes), cut| {
            let case = cast
                .case(format!("{what} from {who}, masqueraded {pair}"))
                .world(&world)
                .at(program, ifindex)
                .sends(&is)
                .becomes(&becomes);
            let case = if near { case.reason(Reason::IcmpError, ONE) } else { case };
            if cut { table.cut(case) } else { table.add(case) }
        };
        for (who, from, seen) in
            [("the backend", backend.ip(), frontend.ip()), ("a router", cast.router, cast.router)]
        {
            let cut = from == cast.router && pair == PAIRS[1].0;
            let sent = error(from, node, cast.next(node, backend));
            let between = error(from, client, cast.next(client, backend));
            let shown = error(seen, client, cast.next(client, frontend));
            let (program, sent) = on(place.device, sent);
            let becomes = on(place.device, between.clone()).1;
            let name = format!("{who} about a packet comes in");
            add(&name, false, program, place.device, (sent, becomes), cut);
            let name = format!("{who} about a packet leaves");
            add(&name, true, Program::Egress, ifindex, (between, shown), cut);
        }
        for (who, from, seen) in
            [("the client", client.ip(), node.ip()), ("a router", cast.router, cast.router)]
        {
            let cut = from == cast.router && pair == PAIRS[1].0;
            let sent = error(from, frontend, cast.next(frontend, client));
            let between = error(from, backend, cast.next(backend, client));
            let shown = error(seen, backend, cast.next(backend, node));
            let (program, sent) = on(ifindex, sent);
            let becomes = on(ifindex, between.clone()).1;
            let name = format!("{who} about a reply comes in");
            add(&name, true, program, ifindex, (sent, becomes), cut);
            let (program, between) = place.out(between);
            let becomes = place.out(shown).1;
            let name = format!("{who} about a reply leaves");
            add(&name, false, program, place.device, (between, becomes), cut);
        }
    }
}

/// ICMP errors about this node's own packets, at XDP, and with a TTL that ends.
fn errors_elsewhere(table: &mut Table, cast: &Cast) {
    let kinds = match cast.version {
        Version::V4 => [("port unreachable", (3, 3), 0), ("fragmentation needed", (3, 4), 1280)],
        Version::V6 => [("port unreachable", (1, 4), 0), ("packet too big", (2, 0), 1280)],
    };
    let (cast, world) = REMOTE.set(cast);
    let near = REMOTE.masqueraded(&cast);
    let far = REMOTE.source(&cast);
    let (_, kind, rest) = kinds[0];
    let node = far.seen_as;
    let question = cast.next(node, cast.backend);
    let error = Frame::icmp(cast.router, node.ip(), kind, rest, &question.packet()).at(mac(UPLINK));
    let known = world.clone().embryonic(flows_of(&near, &far)).marks(mark::MASQUERADED);
    table.add(
        cast.case("an error about a packet that this node itself sent")
            .world(&world.marks(mark::MASQUERADED))
            .tc_ingress(UPLINK)
            .sends(&error),
    );
    table.add(
        cast.case("XDP leaves an error about a masqueraded packet")
            .world(&known)
            .xdp(UPLINK)
            .sends(&error),
    );
    let error = error.ttl(1);
    let becomes = cast.next(cast.client, cast.backend);
    let becomes = Frame::icmp(cast.router, cast.client.ip(), kind, rest, &becomes.packet());
    table.add(
        cast.case("an error about the first packet of a masqueraded flow, with a TTL of 1")
            .world(&known)
            .tc_ingress(UPLINK)
            .sends(&error)
            .becomes(&becomes.at(mac(UPLINK)).ttl(1)),
    );
}

/// This host's flows with another of its addresses: replies are injected.
fn host(table: &mut Table, cast: &Cast) {
    let own = cast.client(std::net::SocketAddr::new(cast.node, 40_001));
    let (cast, world) = OVERLAY.set(&own);
    let seen_as = std::net::SocketAddr::new(cast.node_on(TUNNEL), 40_001);
    let connection =
        Connection { seen_as, flags: flow::HOST | flow::MASQUERADED, ..cast.connection() }
            .state(state::ESTABLISHED);
    let world = world.flows(connection.both()).marks(mark::HOST | mark::MASQUERADED);
    let next = cast.next(cast.client, cast.frontend);
    table.add(
        cast.case("this host's packet along a flow with another of its addresses")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&next)
            .becomes(&next.clone().from(seen_as).to(cast.backend))
            .ends(End::Redirect)
            .forward(ONE),
    );
    let reply = cast.next(cast.backend, seen_as).l3();
    let translated = cast.next(cast.frontend, cast.client).at(mac(OWN));
    let mut framed = translated.clone();
    framed.link.as_mut().expect("a link header").source = mac(OWN);
    table.add(
        cast.case("a reply to another address of this host is handed in")
            .world(&world)
            .tc_ingress_l3(TUNNEL)
            .sends(&reply)
            .becomes(&framed)
            .ends(End::Redirect)
            .reply(ONE),
    );
    let kind = if cast.version == Version::V4 { (3, 3) } else { (1, 4) };
    let quoted = cast.next(seen_as, cast.backend);
    let error =
        Frame::icmp(cast.backend.ip(), seen_as.ip(), kind, 0, &quoted.packet()).at(mac(UPLINK));
    let becomes =
        Frame::icmp(cast.frontend.ip(), cast.client.ip(), kind, 0, &next.packet()).at(mac(OWN));
    table.add(
        cast.case("an error to another address of this host is handed in")
            .world(&world)
            .tc_ingress(UPLINK)
            .sends(&error)
            .becomes(&becomes)
            .ends(End::Redirect)
            .reason(Reason::IcmpError, ONE),
    );
}

/// The second packets of a masqueraded flow.
fn proof(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = REMOTE.set(cast);
    let (near, far) = (REMOTE.masqueraded(&cast), REMOTE.source(&cast));
    let world = world.marks(mark::MASQUERADED);
    let young = world.clone().embryonic(flows_of(&near, &far));
    for meeting in meetings(&cast, UPLINK, REMOTE, |from, to, _| Frame::tcp(from, to, ACK, &[])) {
        let name = format!("{title}: the second packet of a masqueraded flow, {}", meeting.what);
        let case = meeting.case(&name, &young);
        let (own, other) = if meeting.near { (near, far) } else { (far, near) };
        // The endpoint's packet proves it, on the side where it is seen.
        table.add(if meeting.reply {
            case.flows([own.state(state::ESTABLISHED).both()]).embryonic([other.both()])
        } else {
            case
        });
    }
}

/// FIN and RST along a masqueraded flow.
fn endings(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = REMOTE.set(cast);
    let (near, far) = (REMOTE.masqueraded(&cast), REMOTE.source(&cast));
    let world = world.marks(mark::MASQUERADED);
    let (near, far) = (near.state(state::ESTABLISHED), far.state(state::ESTABLISHED));
    let proven = world.clone().flows(flows_of(&near, &far));
    for (what, flags, forward, reply) in [
        ("FIN", FIN | ACK, state::FIN_FORWARD, state::FIN_REPLY),
        ("RST", RST | ACK, state::RESET_FORWARD, state::RESET_REPLY),
    ] {
        for meeting in
            meetings(&cast, UPLINK, REMOTE, |from, to, _| Frame::tcp(from, to, flags, &[]))
        {
            let name = format!("{title}: a {what} of a masqueraded flow, {}", meeting.what);
            let (own, other) = if meeting.near { (near, far) } else { (far, near) };
            let own = own.state(state::ESTABLISHED | if meeting.reply { reply } else { forward });
            let case = meeting.case(&name, &proven);
            table.add(if meeting.reply && flags & RST != 0 {
                case.flows([other.both()]).embryonic([own.both()])
            } else {
                case.flows([flows_of(&own, &other)])
            });
        }
    }
}

/// All entries were lost, and the packets do not show what they were.
fn lost_altogether(table: &mut Table, cast: &Cast) {
    let (cast, world) = REMOTE.set(cast);
    let (near, far) = (REMOTE.masqueraded(&cast), REMOTE.source(&cast));
    let world = world.marks(mark::MASQUERADED);
    let (near, far) = (near.state(state::ESTABLISHED), far.state(state::ESTABLISHED));
    let proven = world.clone().flows(flows_of(&near, &far));
    let (_, lost) = REMOTE.set(&cast);
    let lost = lost.modes(
        sluice_common::abi::masquerade::KUBE_PROXY,
        sluice_common::abi::detect_local::DEVICE,
    );
    let data = cast.next(cast.client, cast.frontend).at(mac(UPLINK));
    table.add(
        cast.case("a masqueraded connection whose entries were all lost")
            .world(&lost)
            .tc_ingress(UPLINK)
            .sends(&data)
            .becomes(&data.clone().to(cast.backend))
            .reason(Reason::Recovered, ONE)
            .embryonic([near.state(0).both()])
            .marks(mark::MASQUERADED),
    );
    let stray: IpAddr = cast.node_on(UPLINK);
    let reset = Frame::tcp(SocketAddr::new(stray, 40_001), cast.backend, RST, &[]).at(mac(UPLINK));
    table.add(
        cast.case("a bare reset from this node's own address shows no lost entry")
            .world(&lost)
            .tc_ingress(UPLINK)
            .sends(&reset),
    );
    let direct = Frame::tcp(far.seen_as, cast.backend, SYN, &[]).at(mac(UPLINK));
    table.add(
        cast.case("a masqueraded client's source as the node is no direct connection's to remap")
            .world(&proven)
            .tc_ingress(UPLINK)
            .sends(&direct),
    );
}
