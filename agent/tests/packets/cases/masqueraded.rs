//! Packets along masqueraded flows: both ways are translated at ingress and routed.

use std::net::IpAddr;

use sluice_common::Reason;
use sluice_common::abi::{flow, state};
use sluice_common::path::mark;

use super::Table;
use super::masquerade::{BEHIND_NARROW, LOCAL, OVERLAY, Place, REMOTE};
use crate::packets::case::{Case, End, Program};
use crate::packets::frame::{ACK, FIN, Frame, RST, SYN, TCP, UDP};
use crate::packets::world::{
    Cast, Connection, EDGE, NARROW_MTU, NET_CLIENTS, NET_FOREIGN, NET_NARROW, NET_PODS, NET_UNROUTED, ONE,
    OWN, TUNNEL, UPLINK, Version, World, mac,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        first_reply(table, &cast);
        both_ways(table, &cast);
        elsewhere(table, &cast);
        limits(table, &cast);
        errors(table, &cast);
        host(table, &cast);
    }
    for cast in Cast::of(TCP) {
        states(table, &cast);
    }
}

/// A frame as it is met on a device.
fn on(ifindex: u32, frame: Frame) -> (Program, Frame) {
    if ifindex == TUNNEL {
        (Program::IngressBare, frame.bare())
    } else {
        (Program::Ingress, frame.at(mac(ifindex)))
    }
}

/// A client, where it comes in, and where its backend is.
const PAIRS: [(&str, u8, u32, Place); 5] = [
    ("outside to a remote backend", NET_CLIENTS, UPLINK, REMOTE),
    ("outside to a backend behind the overlay", NET_CLIENTS, UPLINK, OVERLAY),
    ("a pod to a remote backend", NET_PODS, EDGE, REMOTE),
    ("without a way back to a local backend", NET_FOREIGN, UPLINK, LOCAL),
    ("a pod to a local backend", NET_PODS, EDGE, LOCAL),
];

fn first_reply(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, net, _, place) in PAIRS {
        let (cast, world) = place.set(&cast.client_in(net));
        let connection = place.masqueraded(&cast);
        let answer = match cast.protocol {
            TCP => Frame::tcp(cast.backend, connection.seen_as, SYN | ACK, &[]),
            _ => Frame::udp(cast.backend, connection.seen_as, b"answer"),
        };
        let (program, answer) = on(place.device, answer);
        let world = world.embryonic(connection.both()).marks(mark::MASQUERADED);
        let case = Case::new(
            format!("{title}: the first reply of a masqueraded flow, {what}"),
            &world,
            program,
            place.device,
            &answer,
        )
        .routed(&answer.clone().from(cast.frontend).to(cast.client).ttl(60))
        .reply(ONE);
        table.add(match cast.protocol {
            UDP => case.flows([connection.state(state::ESTABLISHED).both()]).embryonic([]),
            _ => case,
        });
        // Without a mark nobody looks.
        let unmarked = world.marks(0);
        let name = format!("{title}: nobody was ever masqueraded, {what}");
        table.add(Case::new(name, &unmarked, program, place.device, &answer));
    }
}

fn both_ways(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, net, ifindex, place) in PAIRS {
        let (cast, world) = place.set(&cast.client_in(net));
        let connection = place.masqueraded(&cast).state(state::ESTABLISHED);
        for (age_name, age) in [("young", 5), ("old", 30)] {
            let after = if age == 5 { connection.age(5) } else { connection };
            let world = world.clone().flows(connection.age(age).both()).marks(mark::MASQUERADED);
            let cut = age == 30 && what == PAIRS[1].0;
            let mut add = |case| if cut { table.cut(case) } else { table.add(case) };
            let (program, question) = on(ifindex, cast.next(cast.client, cast.frontend));
            add(Case::new(
                format!("{title}: a packet of a {age_name} masqueraded flow, {what}"),
                &world,
                program,
                ifindex,
                &question,
            )
            .routed(&question.clone().from(connection.seen_as).to(cast.backend).ttl(60))
            .forward(ONE)
            .flows([after.both()]));
            let (program, answer) = on(place.device, cast.next(cast.backend, connection.seen_as));
            add(Case::new(
                format!("{title}: a reply of a {age_name} masqueraded flow, {what}"),
                &world,
                program,
                place.device,
                &answer,
            )
            .routed(&answer.clone().from(cast.frontend).to(cast.client).ttl(60))
            .reply(ONE)
            .flows([after.both()]));
        }
    }
    let (cast, world) = REMOTE.set(cast);
    let connection = REMOTE.masqueraded(&cast).state(state::ESTABLISHED);
    let world = world.marks(mark::MASQUERADED);
    let reply = cast.next(cast.backend, connection.seen_as).at(mac(UPLINK));
    table.add(
        Case::new(
            format!(
                "{title}: a reply makes a masqueraded question's lost entry again when it renews its own"
            ),
            &world.clone().flows(connection.age(30).reply()),
            Program::Ingress,
            UPLINK,
            &reply,
        )
        .routed(&reply.clone().from(cast.frontend).to(cast.client).ttl(60))
        .reply(ONE)
        .flows([connection.both()]),
    );
    table.add(Case::new(
        format!("{title}: a reply to an address of this node that no flow is for"),
        &world,
        Program::Ingress,
        UPLINK,
        &reply,
    ));
}

/// Where packets of a masqueraded flow are none of our business.
fn elsewhere(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = REMOTE.set(cast);
    let connection = REMOTE.masqueraded(&cast).state(state::ESTABLISHED);
    let world = world.flows(connection.both()).marks(mark::MASQUERADED);
    let question = cast.next(cast.client, cast.frontend).at(mac(UPLINK));
    let answer = cast.next(cast.backend, connection.seen_as).at(mac(UPLINK));
    let mut pass = |what: &str, program, ifindex, frame: &Frame| {
        let frame = frame.clone().at(mac(ifindex));
        table.add(Case::new(format!("{title}: {what}"), &world, program, ifindex, &frame));
    };
    pass(
        "a masqueraded packet leaves for its backend",
        Program::Egress,
        UPLINK,
        &question.clone().from(connection.seen_as).to(cast.backend),
    );
    pass(
        "a reply leaves for its masqueraded client",
        Program::Egress,
        UPLINK,
        &answer.clone().from(cast.frontend).to(cast.client),
    );
    pass("a masqueraded flow's reply seen at an egress", Program::Egress, EDGE, &answer);
    pass("XDP leaves a packet of a masqueraded flow", Program::Xdp, UPLINK, &question);
    pass("XDP leaves a reply of a masqueraded flow", Program::Xdp, UPLINK, &answer);
    let mut other = connection.seen_as;
    other.set_port(other.port() ^ 1);
    pass(
        "a backend's packet to another port of the node",
        Program::Ingress,
        UPLINK,
        &cast.next(cast.backend, other),
    );
}

fn limits(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (remote, world) = REMOTE.set(cast);
    let connection = REMOTE.masqueraded(&remote).state(state::ESTABLISHED);
    let world = world.flows(connection.both()).marks(mark::MASQUERADED);
    for (what, frame, translated) in [
        (
            "packet",
            remote.next(remote.client, remote.frontend),
            remote.next(connection.seen_as, remote.backend),
        ),
        (
            "reply",
            remote.next(remote.backend, connection.seen_as),
            remote.next(remote.frontend, remote.client),
        ),
    ] {
        let frame = frame.at(mac(UPLINK));
        for ttl in [0, 1] {
            let name = format!("{title}: a masqueraded flow's {what} with a TTL of {ttl}");
            table.add(Case::new(name, &world, Program::Ingress, UPLINK, &frame.clone().ttl(ttl)).refused(
                &super::reject::time_exceeded(&frame.clone().ttl(ttl)),
                Reason::TtlExceeded,
                ONE,
            ));
        }
        let name = format!("{title}: a masqueraded flow's {what} with a TTL of 2");
        let case = Case::new(name, &world, Program::Ingress, UPLINK, &frame.ttl(2))
            .becomes(&translated.at(mac(UPLINK)).ttl(1))
            .ends(End::Redirect);
        table.add(if what == "reply" { case.reply(ONE) } else { case.forward(ONE) });
    }
    too_big(table, cast);

    let (gone, world) = REMOTE.set(&cast.client_in(NET_UNROUTED));
    let connection = REMOTE.masqueraded(&gone).state(state::ESTABLISHED);
    let world = world.flows(connection.both()).marks(mark::MASQUERADED);
    let reply = gone.next(gone.backend, connection.seen_as).at(mac(UPLINK));
    table.add(
        Case::new(
            format!("{title}: a reply to a masqueraded client that no route leads to any more"),
            &world,
            Program::Ingress,
            UPLINK,
            &reply,
        )
        .dropped(Reason::NoRoute, ONE),
    );
}

/// Larger than the next device's MTU, either way.
fn too_big(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let kind = if cast.version == Version::V4 { (3, 4) } else { (2, 0) };
    let data = [0xab; 1300];
    for (what, cast, place) in
        [("packet", *cast, BEHIND_NARROW), ("reply", cast.client_in(NET_NARROW), REMOTE)]
    {
        let (cast, world) = place.set(&cast);
        let connection = place.masqueraded(&cast).state(state::ESTABLISHED);
        let world = world.flows(connection.both()).marks(mark::MASQUERADED);
        let (from, to) =
            if what == "packet" { (cast.client, cast.frontend) } else { (cast.backend, connection.seen_as) };
        let frame = match cast.protocol {
            TCP => Frame::tcp(from, to, ACK, &data),
            _ => Frame::udp(from, to, &data),
        };
        let mut frame = frame.at(mac(UPLINK));
        let answer = super::reject::error(&frame, kind, NARROW_MTU).turned();
        table.add(
            Case::new(
                format!("{title}: a masqueraded flow's {what} that is too big is answered to its sender"),
                &world,
                Program::Ingress,
                UPLINK,
                &frame,
            )
            .becomes(&answer)
            .ends(End::Redirect)
            .reason(Reason::TooBig, ONE),
        );
        if cast.version == Version::V4 {
            frame.fragment = 0;
            table.add(
                Case::new(
                    format!("{title}: a masqueraded flow's {what} that is too big and may be fragmented"),
                    &world,
                    Program::Ingress,
                    UPLINK,
                    &frame,
                )
                .dropped(Reason::TooBig, ONE),
            );
        }
        // An error is never answered with another (RFC 1122, 3.2.2; RFC 4443, 2.4).
        let quoted = if what == "packet" {
            Frame::udp(cast.frontend, cast.client, &data)
        } else {
            Frame::udp(connection.seen_as, cast.backend, &data)
        };
        let quoted = match cast.protocol {
            TCP if what == "packet" => Frame::tcp(cast.frontend, cast.client, ACK, &data),
            TCP => Frame::tcp(connection.seen_as, cast.backend, ACK, &data),
            _ => quoted,
        };
        let unreachable = if cast.version == Version::V4 { (3, 3) } else { (1, 4) };
        let error = Frame::icmp(from.ip(), to.ip(), unreachable, 0, &quoted.packet()).at(mac(UPLINK));
        table.add(
            Case::new(
                format!("{title}: a too big error on the way of a masqueraded flow's {what} is dropped"),
                &world,
                Program::Ingress,
                UPLINK,
                &error,
            )
            .dropped(Reason::TooBig, ONE),
        );
    }
}

/// ICMP errors about packets of both directions.
fn errors(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let kinds = match cast.version {
        Version::V4 => [("port unreachable", (3, 3), 0), ("fragmentation needed", (3, 4), 1280)],
        Version::V6 => [("port unreachable", (1, 4), 0), ("packet too big", (2, 0), 1280)],
    };
    for (pair, net, ifindex, place) in PAIRS {
        let (cast, world) = place.set(&cast.client_in(net));
        let connection = place.masqueraded(&cast).state(state::ESTABLISHED);
        let world = world.flows(connection.both()).marks(mark::MASQUERADED);
        let node = connection.seen_as.ip();
        for (what, kind, rest) in kinds {
            let mut add = |who: &str, ifindex, error: Frame, becomes: Frame, cut: bool| {
                let (program, error) = on(ifindex, error);
                let becomes = on(ifindex, becomes.ttl(60)).1;
                let case = Case::new(
                    format!("{title}: {what} from {who}, masqueraded {pair}"),
                    &world,
                    program,
                    ifindex,
                    &error,
                )
                .routed(&becomes)
                .reason(Reason::IcmpError, ONE);
                if cut { table.cut(case) } else { table.add(case) }
            };
            let question = cast.next(connection.seen_as, cast.backend);
            let shown = cast.next(cast.client, cast.frontend);
            for (who, from, seen) in [
                ("the backend about a packet", cast.backend.ip(), cast.frontend.ip()),
                ("a router about a packet to the backend", cast.router, cast.router),
            ] {
                let error = Frame::icmp(from, node, kind, rest, &question.packet());
                let becomes = Frame::icmp(seen, cast.client.ip(), kind, rest, &shown.packet());
                add(who, place.device, error, becomes, from == cast.router && pair == PAIRS[1].0);
            }
            let reply = cast.next(cast.frontend, cast.client);
            let shown = cast.next(cast.backend, connection.seen_as);
            for (who, from, seen) in [
                ("the client about a reply", cast.client.ip(), node),
                ("a router about a reply to the client", cast.router, cast.router),
            ] {
                let error = Frame::icmp(from, cast.frontend.ip(), kind, rest, &reply.packet());
                let becomes = Frame::icmp(seen, cast.backend.ip(), kind, rest, &shown.packet());
                add(who, ifindex, error, becomes, from == cast.router && pair == PAIRS[1].0);
            }
        }
    }
    let (cast, world) = REMOTE.set(cast);
    let connection = REMOTE.masqueraded(&cast).state(state::ESTABLISHED);
    let (_, kind, rest) = kinds[0];
    let node = connection.seen_as.ip();
    let question = cast.next(connection.seen_as, cast.backend);
    let error = Frame::icmp(cast.router, node, kind, rest, &question.packet()).at(mac(UPLINK));
    let flows = world.clone().flows(connection.both()).marks(mark::MASQUERADED);
    let mut pass = |what: &str, world: &World, program, error: &Frame| {
        table.add(Case::new(format!("{title}: {what}"), world, program, UPLINK, error));
    };
    pass(
        "an error about a packet that this node itself sent",
        &world.clone().marks(mark::MASQUERADED),
        Program::Ingress,
        &error,
    );
    pass("XDP leaves an error about a masqueraded packet", &flows, Program::Xdp, &error);
    table.add(
        Case::new(
            format!("{title}: an error about a masqueraded packet with a TTL of 1"),
            &flows,
            Program::Ingress,
            UPLINK,
            &error.ttl(1),
        )
        .dropped(Reason::TtlExceeded, ONE),
    );
    let unproven = REMOTE.masqueraded(&cast);
    let error = Frame::icmp(cast.backend.ip(), node, kind, rest, &question.packet()).at(mac(UPLINK));
    let shown = cast.next(cast.client, cast.frontend);
    let becomes = Frame::icmp(cast.frontend.ip(), cast.client.ip(), kind, rest, &shown.packet());
    table.add(
        Case::new(
            format!("{title}: an error about the first packet of a masqueraded flow"),
            &world.embryonic(unproven.both()).marks(mark::MASQUERADED),
            Program::Ingress,
            UPLINK,
            &error,
        )
        .routed(&becomes.at(mac(UPLINK)).ttl(60))
        .reason(Reason::IcmpError, ONE),
    );
}

/// This host's flows under another of its addresses: replies are handed in.
fn host(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let own = cast.client(std::net::SocketAddr::new(cast.node, 40_001));
    let (cast, world) = OVERLAY.set(&own);
    let seen_as = std::net::SocketAddr::new(cast.node_on(TUNNEL), 40_001);
    let connection = Connection { seen_as, flags: flow::HOST | flow::MASQUERADED, ..cast.connection() }
        .state(state::ESTABLISHED);
    let world = world.flows(connection.both()).marks(mark::HOST | mark::MASQUERADED);
    let next = cast.next(cast.client, cast.frontend);
    table.add(
        Case::new(
            format!("{title}: this host's packet along a flow with another of its addresses"),
            &world,
            Program::Egress,
            UPLINK,
            &next,
        )
        .becomes(&next.clone().from(seen_as).to(cast.backend))
        .ends(End::Redirect)
        .forward(ONE),
    );
    let reply = cast.next(cast.backend, seen_as).bare();
    let translated = cast.next(cast.frontend, cast.client).at(mac(OWN));
    let mut framed = translated.clone();
    framed.link.as_mut().expect("a link header").source = mac(OWN);
    table.add(
        Case::new(
            format!("{title}: a reply to another address of this host is handed in"),
            &world,
            Program::IngressBare,
            TUNNEL,
            &reply,
        )
        .becomes(&framed)
        .ends(End::Redirect)
        .reply(ONE),
    );
    let kind = if cast.version == Version::V4 { (3, 3) } else { (1, 4) };
    let quoted = cast.next(seen_as, cast.backend);
    let error = Frame::icmp(cast.backend.ip(), seen_as.ip(), kind, 0, &quoted.packet()).at(mac(UPLINK));
    let becomes = Frame::icmp(cast.frontend.ip(), cast.client.ip(), kind, 0, &next.packet()).at(mac(OWN));
    table.add(
        Case::new(
            format!("{title}: an error to another address of this host is handed in"),
            &world,
            Program::Ingress,
            UPLINK,
            &error,
        )
        .becomes(&becomes)
        .ends(End::Redirect)
        .reason(Reason::IcmpError, ONE),
    );
}

/// TCP's states are followed as elsewhere.
fn states(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = REMOTE.set(cast);
    let connection = REMOTE.masqueraded(&cast);
    let world = world.marks(mark::MASQUERADED);
    let at = mac(UPLINK);
    let ack = Frame::tcp(cast.client, cast.frontend, ACK, &[]).at(at);
    table.add(
        Case::new(
            format!("{title}: a masqueraded client's second packet proves the flow"),
            &world.clone().embryonic(connection.both()),
            Program::Ingress,
            UPLINK,
            &ack,
        )
        .routed(&ack.clone().from(connection.seen_as).to(cast.backend).ttl(60))
        .forward(ONE)
        .flows([connection.state(state::ESTABLISHED).both()])
        .embryonic([]),
    );
    let proven = connection.state(state::ESTABLISHED);
    let world = world.flows(proven.both());
    for (what, flags, forward, reply) in [
        ("FIN", FIN | ACK, state::FIN_FORWARD, state::FIN_REPLY),
        ("RST", RST | ACK, state::RESET, state::RESET),
    ] {
        let frame = Frame::tcp(cast.client, cast.frontend, flags, &[]).at(at);
        table.add(
            Case::new(
                format!("{title}: a masqueraded client's {what}"),
                &world,
                Program::Ingress,
                UPLINK,
                &frame,
            )
            .routed(&frame.clone().from(connection.seen_as).to(cast.backend).ttl(60))
            .forward(ONE)
            .flows([proven.state(state::ESTABLISHED | forward).both()]),
        );
        let frame = Frame::tcp(cast.backend, connection.seen_as, flags, &[]).at(at);
        table.add(
            Case::new(
                format!("{title}: a backend's {what} to a masqueraded client"),
                &world,
                Program::Ingress,
                UPLINK,
                &frame,
            )
            .routed(&frame.clone().from(cast.frontend).to(cast.client).ttl(60))
            .reply(ONE)
            .flows([proven.state(state::ESTABLISHED | reply).both()]),
        );
    }
    // Both entries lost: the port follows from the tuple, so that the backend sees the same client again.
    let (_, lost) = REMOTE.set(&cast);
    let data = cast.next(cast.client, cast.frontend).at(at);
    table.add(
        Case::new(
            format!("{title}: a masqueraded connection whose entries were lost has its port again"),
            &lost,
            Program::Ingress,
            UPLINK,
            &data,
        )
        .routed(&data.clone().from(connection.seen_as).to(cast.backend).ttl(60))
        .reason(Reason::Recovered, ONE)
        .flows([proven.both()])
        .marks(mark::MASQUERADED),
    );
    let stray: IpAddr = cast.node_on(UPLINK);
    let reset = Frame::tcp(std::net::SocketAddr::new(stray, 40_001), cast.backend, RST, &[]).at(at);
    table.add(Case::new(
        format!("{title}: a bare reset from this node's own address shows no lost entry"),
        &lost,
        Program::Ingress,
        UPLINK,
        &reset,
    ));
    let direct = Frame::tcp(connection.seen_as, cast.backend, SYN, &[]).at(at);
    table.add(Case::new(
        format!("{title}: a masqueraded flow's tuple is no direct connection's to remap"),
        &lost.flows(proven.both()).marks(mark::MASQUERADED),
        Program::Ingress,
        UPLINK,
        &direct,
    ));
}
