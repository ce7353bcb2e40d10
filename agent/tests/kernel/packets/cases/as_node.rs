//! Packets that leave with an address of this node, and packets that come back to it: this host's
//! own traffic and netfilter's, next to that of masqueraded clients.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{flow, frontend, imported, listing, phase, state};
use sluice_common::path::{UDP_IDLE_TICKS, mark};

use super::Table;
use super::clash::tried;
use super::masquerade::{LOCAL, OVERLAY, Place, REMOTE, leaves};
use super::masqueraded::on;
use super::takeover::at;
use crate::packets::case::{Case, Program};
use crate::packets::frame::{ACK, FIN, Frame, RST, SCTP, SYN, TCP, UDP};
use crate::packets::world::{Cast, Connection, EDGE, NARROW, ONE, UPLINK, World, mac};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in [Cast::all(), Cast::of(SCTP)].concat() {
        noted(table, &cast);
        clashes(table, &cast);
        own_address(table, &cast);
    }
    for cast in Cast::of(UDP) {
        idle(table, &cast);
        from_node_port(table, &cast);
        answers_to_node_port(table, &cast);
        other_ports_than_node_ports(table, &cast);
        fragments_of_node_port(table, &cast);
    }
}

/// Returns the entry of the node's own packet, whose port stays as it is or is replaced.
fn noted_as(cast: &Cast, own: SocketAddr, seen_as: SocketAddr) -> Connection {
    Connection {
        client: own,
        frontend: cast.backend,
        seen_as,
        id: 0,
        generation: 0,
        service_port: 0,
        flags: flow::SOURCE | flow::DIRECT,
        ..cast.connection()
    }
}

/// Returns the frame that answers one that opens a flow from the backend's side.
fn answer(cast: &Cast, to: SocketAddr) -> Frame {
    match cast.protocol {
        TCP => Frame::tcp(cast.backend, to, SYN | ACK, &[]),
        _ => cast.next(cast.backend, to),
    }
}

/// Ports that this host or netfilter uses are not given to clients.
fn noted(table: &mut Table, cast: &Cast) {
    for (where_to, place) in [("remote", REMOTE), ("overlay", OVERLAY), ("local", LOCAL)] {
        noted_at(table, cast, where_to, place);
        not_noted(table, cast, where_to, place);
        answers_to_noted(table, cast, where_to, place);
    }
}

/// Packets that leave from a port of the range for clients are recorded.
fn noted_at(table: &mut Table, cast: &Cast, where_to: &str, place: Place) {
    let (cast, world) = place.set(cast);
    let world = world.marks(mark::MASQUERADED);
    let node = |port| SocketAddr::new(cast.node_on(place.device), port);
    for port in [1_024, 29_999, 61_000, 65_535] {
        for (what, frame) in [
            ("opens", cast.first(node(port), cast.backend)),
            ("goes on", cast.next(node(port), cast.backend)),
        ] {
            let own = noted_as(&cast, node(port), node(port));
            let (program, frame) = place.out(frame);
            table.add(
                cast.case(format!("this node's own port {port} {what}, {where_to}"))
                    .world(&world)
                    .at(program, place.device)
                    .sends(&frame)
                    .embryonic([own.both()]),
            );
        }
    }
}

/// Packets that leave from other ports, or by another device, are not recorded.
fn not_noted(table: &mut Table, cast: &Cast, where_to: &str, place: Place) {
    let (cast, world) = place.set(cast);
    let world = world.marks(mark::MASQUERADED);
    let node = |port| SocketAddr::new(cast.node_on(place.device), port);
    let mut pass = |what: &str, world: &World, source, destination| {
        let (program, frame) = place.out(cast.first(source, destination));
        table.add(
            cast.case(format!("{what}, {where_to}"))
                .world(world)
                .at(program, place.device)
                .sends(&frame),
        );
    };
    for port in [1, 1_023, 30_000, 60_999] {
        pass(&format!("a port that no client is given, {port}"), &world, node(port), cast.backend);
    }
    let unmarked = world.clone().marks(0);
    pass("this node's own port while nobody was masqueraded", &unmarked, node(5_000), cast.backend);
    let mut stranger = cast.backend;
    stranger.set_ip(cast.router);
    pass("this node's own port to one that is no backend", &world, node(5_000), stranger);
    pass("a client that keeps its source", &world, cast.client, cast.backend);
}

/// Answers to the node's own port, ICMP errors, and a client that has this port.
fn answers_to_noted(table: &mut Table, cast: &Cast, where_to: &str, place: Place) {
    let title = cast.title();
    let (cast, world) = place.set(cast);
    let world = world.marks(mark::MASQUERADED);
    let node = |port| SocketAddr::new(cast.node_on(place.device), port);
    let own = noted_as(&cast, node(5_000), node(5_000));
    let world = world.embryonic(own.both());
    let (program, back) = on(place.device, answer(&cast, own.client));
    let case = cast
        .case(format!("the answer to this node's own port, {where_to}"))
        .world(&world)
        .at(program, place.device)
        .sends(&back);
    table.add(match cast.protocol {
        UDP => case.embryonic([own.state(state::ESTABLISHED).both()]),
        SCTP => case.flows([own.state(state::ESTABLISHED).both()]).embryonic([]),
        _ => case.embryonic([own.answered().both()]),
    });
    let kind = if cast.client.is_ipv4() { (3, 3) } else { (1, 4) };
    let quoted = cast.next(own.client, cast.backend);
    let error = Frame::icmp(cast.backend.ip(), own.client.ip(), kind, 0, &quoted.packet());
    let (program, error) = on(place.device, error);
    table.add(
        cast.case(format!("an error about a packet from this node's own port, {where_to}"))
            .world(&world)
            .at(program, place.device)
            .sends(&error),
    );
    // No client has its tuple.
    let source = place.source(&cast);
    let taken = noted_as(&cast, source.seen_as, source.seen_as).state(state::ESTABLISHED);
    let world = place.met(&cast, &world.embryonic([].into())).flows(taken.both());
    let name = format!("{title}: a masqueraded client's port is this node's own, {where_to}");
    table.add(leaves(name, &cast, &world, place, &place.source_at(&cast, 2)));
}

/// The node's own tuple is that of a masqueraded client.
fn clashes(table: &mut Table, cast: &Cast) {
    for (where_to, place) in [("remote", REMOTE), ("overlay", OVERLAY), ("local", LOCAL)] {
        clashes_at(table, cast, where_to, place);
        clashes_go_on(table, cast, where_to, place);
        met_once_more(table, cast, where_to, place);
    }
}

/// Returns the cast and the maps with a masqueraded client's flow, and the entry of the node's own
/// packet from the port that this client has.
fn clashing(cast: &Cast, place: Place) -> (Cast, World, Connection) {
    let (cast, world) = place.set(cast);
    let near = place.masqueraded(&cast).state(state::ESTABLISHED);
    let far = place.source(&cast).state(state::ESTABLISHED);
    let world = world.flows(near.both()).flows(far.both()).marks(mark::MASQUERADED);
    let node = far.seen_as;
    let port = tried(&cast.client(node), cast.backend, 1).port();
    let own = noted_as(&cast, node, SocketAddr::new(node.ip(), port));
    (cast, world, own)
}

/// The node's own packets from a client's port.
fn clashes_at(table: &mut Table, cast: &Cast, where_to: &str, place: Place) {
    let (cast, world, own) = clashing(cast, place);
    let node = own.client;
    for (what, frame) in
        [("opens", cast.first(node, cast.backend)), ("goes on", cast.next(node, cast.backend))]
    {
        let (program, frame) = place.out(frame);
        let case = cast
            .case(format!("this node's own packet from a client's port {what}, {where_to}"))
            .world(&world)
            .at(program, place.device)
            .sends(&frame);
        table.add(if what == "opens" || cast.protocol == UDP {
            case.becomes(&frame.clone().from(own.seen_as)).embryonic([own.both()])
        } else {
            case
        });
    }
}

/// The node's own packets get another port, and the replies of both find their way back.
fn clashes_go_on(table: &mut Table, cast: &Cast, where_to: &str, place: Place) {
    let (cast, world, own) = clashing(cast, place);
    let node = own.client;
    let proven = own.state(state::ESTABLISHED);
    let known = world.clone().flows(proven.both());
    let (program, next) = place.out(cast.next(node, cast.backend));
    table.add(
        cast.case(format!("this node's own packet goes on from another port, {where_to}"))
            .world(&known)
            .at(program, place.device)
            .sends(&next)
            .becomes(&next.clone().from(own.seen_as)),
    );
    let (program, back) = on(place.device, cast.next(cast.backend, own.seen_as));
    table.add(
        cast.case(format!("the answer to another port finds this node's own, {where_to}"))
            .world(&known)
            .at(program, place.device)
            .sends(&back)
            .becomes(&back.clone().to(node)),
    );
    let (program, back) = on(place.device, cast.next(cast.backend, node));
    table.add(
        cast.case(format!("the answer to the client's port is still its own, {where_to}"))
            .world(&known)
            .at(program, place.device)
            .sends(&back)
            .becomes(&back.clone().to(cast.client)),
    );
}

/// A packet of this host, translated where it was sent, passes a hook once more.
fn met_once_more(table: &mut Table, cast: &Cast, where_to: &str, place: Place) {
    let (cast, _) = place.set(cast);
    let near = place.masqueraded(&cast).state(state::ESTABLISHED);
    let far = place.source(&cast).state(state::ESTABLISHED);
    let node = far.seen_as;
    // A packet of this host, translated where it was sent, passes a hook once more.
    let host = SocketAddr::new(cast.node, 40_001);
    let sent = Connection { client: host, seen_as: node, flags: flow::HOST, ..near };
    let (_, world) = place.set(&cast);
    let world = world.flows(sent.both()).marks(mark::HOST | mark::MASQUERADED);
    for (what, frame) in
        [("opens", cast.first(node, cast.backend)), ("goes on", cast.next(node, cast.backend))]
    {
        let (program, frame) = place.out(frame);
        table.add(
            cast.case(format!(
                "this host's translated packet is met once more, {what}, {where_to}"
            ))
            .world(&world)
            .at(program, place.device)
            .sends(&frame),
        );
    }
}

/// An idle flow no longer reserves its tuple.
fn idle(table: &mut Table, cast: &Cast) {
    let (cast, world) = REMOTE.set(cast);
    let world = world.marks(mark::MASQUERADED);
    let node = SocketAddr::new(cast.node_on(UPLINK), 5_000);
    let own = noted_as(&cast, node, node).state(state::ESTABLISHED);
    for (what, age) in [("a while", UDP_IDLE_TICKS - 2), ("long", UDP_IDLE_TICKS + 2)] {
        let world = world.clone().flows(own.age(age).both());
        let (program, frame) = REMOTE.out(cast.next(node, cast.backend));
        let case = cast
            .case(format!("this node's own port was idle for {what}, a packet leaves"))
            .world(&world)
            .at(program, UPLINK)
            .sends(&frame);
        table.add(if age < UDP_IDLE_TICKS {
            case.flows([own.both()])
        } else {
            case.flows([]).embryonic([own.state(0).both()])
        });
        let (program, frame) = on(UPLINK, cast.next(cast.backend, node));
        let case = cast
            .case(format!("this node's own port was idle for {what}, a packet comes in"))
            .world(&world)
            .at(program, UPLINK)
            .sends(&frame);
        table.add(if age < UDP_IDLE_TICKS { case.flows([own.both()]) } else { case });
    }
}

/// A node port.
const PORT: u16 = 30_080;

/// A name server outside, which the node sends requests to from the number of a node port.
struct NameServer {
    /// The cast with the node port as its frontend.
    served: Cast,
    world: World,
    /// The entry of the node's request.
    own: Connection,
}

impl NameServer {
    /// Returns the name server at the client's address.
    fn of(cast: &Cast) -> Self {
        let node = SocketAddr::new(cast.node, PORT);
        let served = cast.frontend(node);
        let world = super::node_ports::world(&served, ONE);
        let server = Cast { backend: cast.client, ..served };
        Self { served, world, own: noted_as(&server, node, node) }
    }
}

/// The node sends a request to a name server outside from the number of a node port.
fn from_node_port(table: &mut Table, cast: &Cast) {
    let NameServer { served, world, own } = NameServer::of(cast);
    let (node, peer) = (own.client, cast.client);
    let question = cast.first(node, peer);
    let case = |what: &str, world: &World, program, frame: &Frame| {
        cast.case(what).world(world).at(program, UPLINK).sends(frame)
    };
    table.cut(
        case("a question leaves from a node port's number", &world, Program::Egress, &question)
            .embryonic([own.both()]),
    );
    // Next to netfilter's node ports it is an answer, and its client may go on sending requests.
    for phase in [phase::PASSIVE, phase::IMPORT, phase::SERVE | phase::IMPORTED] {
        let mut beside = world.clone();
        beside.settings.phase = phase;
        let what =
            format!("an answer of netfilter's leaves from a node port's number, phase {phase}");
        table.add(case(&what, &beside, Program::Egress, &question));
    }
    let answered = served.connection().state(state::ESTABLISHED);
    let name = "a reply of a node port's, translated where the route from its endpoint leads, leaves by another device";
    let beside = world.clone().flows(answered.both());
    table.add(case(name, &beside, Program::Egress, &cast.next(node, served.client)));
}

/// Answers of that name server, for as long as the question is remembered.
fn answers_to_node_port(table: &mut Table, cast: &Cast) {
    let NameServer { served, world, own } = NameServer::of(cast);
    let (node, peer) = (own.client, cast.client);
    let case = |what: &str, world: &World, program, frame: &Frame| {
        cast.case(what).world(world).at(program, UPLINK).sends(frame)
    };
    let reply = cast.next(peer, node).at(mac(UPLINK));
    for (what, age) in [("is left alone", 0), ("is left alone after a while", UDP_IDLE_TICKS - 2)] {
        let young = world.clone().embryonic(own.age(age).both());
        table.add(
            case(
                &format!("the answer to a node port's number {what}"),
                &young,
                Program::Ingress,
                &reply,
            )
            .embryonic([own.state(state::ESTABLISHED).both()]),
        );
        let name = format!("XDP leaves the answer to a node port's number that {what}");
        table.add(case(&name, &young, Program::Xdp, &reply));
    }
    let old = own.state(state::ESTABLISHED).age(UDP_IDLE_TICKS + 2);
    let opened = served.connection();
    for program in [Program::Ingress, Program::Xdp] {
        let name =
            format!("nothing was asked from a node port's number for long, {}", program.name());
        table.add(
            case(&name, &world.clone().flows(old.both()), program, &reply)
                .becomes(&reply.clone().to(served.backend))
                .opens(ONE)
                .flows([])
                .embryonic([opened.both()]),
        );
    }
    // It is not ours while netfilter serves, either.
    let unanswered = own.age(UDP_IDLE_TICKS + 2);
    for (what, before) in [
        ("answered", world.clone().flows(old.both())),
        ("not answered", world.clone().embryonic(unanswered.both())),
    ] {
        let name = format!("nothing was asked from a node port's number for long, passive, {what}");
        let passive = at(before, phase::PASSIVE, &[]);
        table.add(case(&name, &passive, Program::Ingress, &reply).reason(Reason::NotTaken, ONE));
    }
}

/// Addresses, ports and protocols without a node port are left alone.
fn other_ports_than_node_ports(table: &mut Table, cast: &Cast) {
    let node = SocketAddr::new(cast.node, PORT);
    let served = cast.frontend(node);
    let world = super::node_ports::world(&served, ONE);
    let peer = cast.client;
    let case = |what: &str, world: &World, program, frame: &Frame| {
        cast.case(what).world(world).at(program, UPLINK).sends(frame)
    };
    let other = cast.first(SocketAddr::new(cast.node_on(NARROW), PORT), peer);
    table.add(case(
        "a question leaves from a node port's number, of an address without node ports",
        &world,
        Program::Egress,
        &other,
    ));
    let other = cast.first(SocketAddr::new(cast.node, PORT + 1), peer);
    table.add(case(
        "a question leaves from a port next to a node port",
        &world,
        Program::Egress,
        &other,
    ));
    let tcp = Frame::tcp(node, peer, SYN, &[]);
    table.add(case("a connection leaves from a node port's number", &world, Program::Egress, &tcp));
}

/// The same request and answer in fragments.
fn fragments_of_node_port(table: &mut Table, cast: &Cast) {
    let NameServer { world, own, .. } = NameServer::of(cast);
    let (node, peer) = (own.client, cast.client);
    let case = |what: &str, world: &World, program, frame: &Frame| {
        cast.case(what).world(world).at(program, UPLINK).sends(frame)
    };
    let fragments = super::fragments::parts(&super::fragments::long(cast, node, peer));
    let told = super::fragments::told(cast, node, peer, true, 0);
    table.add(
        case(
            "a first fragment leaves from a node port's number",
            &world,
            Program::Egress,
            &fragments[0],
        )
        .embryonic([own.both()])
        .fragments(told),
    );
    let answers =
        super::fragments::parts(&super::fragments::long(cast, peer, node).at(mac(UPLINK)));
    let told = super::fragments::told(cast, peer, node, true, 0);
    let proven = own.state(state::ESTABLISHED);
    let known = world.flows(proven.both());
    table.add(
        case(
            "a first fragment answers a node port's number",
            &known,
            Program::Ingress,
            &answers[0],
        )
        .fragments(told.clone()),
    );
    let known = known.fragments(told);
    table.add(case(
        "a later fragment answers a node port's number",
        &known,
        Program::Ingress,
        &answers[1],
    ));
}

/// At an address of the node itself, only a packet that opens a flow counts as a client's.
fn own_address(table: &mut Table, cast: &Cast) {
    let node_port = cast.frontend(SocketAddr::new(cast.node, PORT));
    let mut held = cast.world().kind(ONE, frontend::EXTERNAL_IP);
    *held.listing.entry(cast.frontend.ip()).or_default() |= listing::NODE;
    let _ = held.node_addresses.insert(cast.frontend.ip(), 0);
    for (where_to, cast, world) in [
        ("a node port", node_port, super::node_ports::world(&node_port, ONE)),
        ("a frontend that a device holds", *cast, held),
    ] {
        for (program, ifindex) in
            [(Program::Ingress, UPLINK), (Program::Ingress, EDGE), (Program::Xdp, UPLINK)]
        {
            let met = (where_to, program, ifindex);
            unknown_at_node(table, &cast, &world, met);
            opens_at_node(table, &cast, &world, met);
            let next = cast.next(cast.client, cast.frontend).at(mac(ifindex));
            let proven = cast.connection().state(state::ESTABLISHED);
            let by = format!("{}, device {ifindex}", program.name());
            table.add(
                cast.case(format!("a known flow goes on at {where_to}, {by}"))
                    .world(&world.clone().flows(proven.both()))
                    .at(program, ifindex)
                    .sends(&next)
                    .becomes(&next.clone().to(cast.backend))
                    .forward(ONE),
            );
        }
    }
}

/// Packets that neither open a flow nor belong to a known one are left alone.
fn unknown_at_node(
    table: &mut Table,
    cast: &Cast,
    world: &World,
    (where_to, program, ifindex): (&str, Program, u32),
) {
    let by = format!("{}, device {ifindex}", program.name());
    let tcp = |flags| Frame::tcp(cast.client, cast.frontend, flags, &[]);
    let others = match cast.protocol {
        TCP => vec![
            ("SYN and ACK", tcp(SYN | ACK)),
            ("ACK", tcp(ACK)),
            ("FIN", tcp(FIN | ACK)),
            ("RST", tcp(RST)),
            ("no flag", tcp(0)),
        ],
        SCTP => vec![("data", cast.next(cast.client, cast.frontend))],
        _ => Vec::new(),
    };
    let passive = at(world.clone(), phase::PASSIVE, &[]);
    for (what, frame) in others {
        let frame = frame.at(mac(ifindex));
        let what = format!("{what} to {where_to} that nothing is known of");
        for (name, world) in
            [(format!("{what}, {by}"), world), (format!("{what}, passive, {by}"), &passive)]
        {
            table.add(cast.case(name).world(world).at(program, ifindex).sends(&frame));
        }
    }
}

/// Packets that open a flow: they are ours, or netfilter's while it serves.
fn opens_at_node(
    table: &mut Table,
    cast: &Cast,
    world: &World,
    (where_to, program, ifindex): (&str, Program, u32),
) {
    let by = format!("{}, device {ifindex}", program.name());
    let first = cast.first(cast.client, cast.frontend).at(mac(ifindex));
    let sent = |what: &str, world: &World| {
        let name = format!("what opens at {where_to}{what}, {by}");
        cast.case(name).world(world).at(program, ifindex).sends(&first)
    };
    let taken = |case: Case| {
        let case = case.becomes(&first.clone().to(cast.backend)).opens(ONE);
        case.embryonic([cast.connection().both()])
    };
    let left = |case: Case, reason| {
        if program == Program::Xdp { case } else { case.reason(reason, ONE) }
    };
    table.add(taken(sent("", world)));
    let passive = sent(", passive", &at(world.clone(), phase::PASSIVE, &[]));
    table.add(left(passive, Reason::NotTaken));
    let import = at(world.clone(), phase::IMPORT, &[]);
    let import = sent(" while connections are imported", &import);
    table.add(match cast.protocol {
        UDP => left(import, Reason::NotTaken),
        _ => taken(import),
    });
    for bits in [0, imported::CLOSING] {
        let packets = [(cast.client, cast.frontend, cast.protocol, bits)];
        let known = at(world.clone(), phase::SERVE, &packets);
        let known = sent(&format!(" was netfilter's, bits {bits}"), &known);
        table.add(if bits == 0 || cast.protocol == UDP {
            left(known, Reason::NetfilterFlow)
        } else {
            taken(known)
        });
    }
}
