//! Packets along a flow, from the first to the last.

use sluice_common::Failure;
use sluice_common::abi::{Range, backend, frontend, listing, state};
use sluice_common::path::RENEW_TICKS;

use super::Table;
use crate::packets::case::{Case, Program};
use crate::packets::frame::{ACK, FIN, Frame, RST, SEQUENCE, SYN, TCP, UDP};
use crate::packets::world::{
    BRIDGE, Cast, Connection, EDGE, GENERATION, NET_BACKENDS, NET_CLIENTS, ONE, SPARE, UPLINK,
    address, mac,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        opening(table, &cast);
        established(table, &cast);
        elsewhere(table, &cast);
        strangers(table, &cast);
        other_frames(table, &cast);
        bridged(table, &cast);
        selection(table, &cast);
    }
    for cast in Cast::of(TCP) {
        acknowledging(table, &cast);
        promotion(table, &cast);
        no_promotion(table, &cast);
        refusals(table, &cast);
        draining(table, &cast);
        closing(table, &cast);
        closed(table, &cast);
        doubted(table, &cast);
        reopening(table, &cast);
        reopening_accepted(table, &cast);
        reopening_after_silence(table, &cast);
        reopening_elsewhere(table, &cast);
    }
    for cast in Cast::of(UDP) {
        stream(table, &cast);
        leaving(table, &cast);
    }
}

/// A UDP flow leaves its backend as soon as that no longer serves.
fn leaving(table: &mut Table, cast: &Cast) {
    let question = cast.next(cast.client, cast.frontend);
    let old = spare(cast).state(state::ESTABLISHED);
    let mut reused = cast.world().flows(old.both());
    reused.backends.get_mut(&SPARE).expect("the spare backend").generation = GENERATION + 1;
    for (why, world) in [
        ("was removed", cast.world().backend_flags(SPARE, backend::LOCAL).flows(old.both())),
        ("has a new owner", reused),
    ] {
        table.add(
            cast.case(format!("a flow leaves a backend that {why}, at once"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&question)
                .becomes(&question.clone().to(cast.backend))
                .opens(ONE)
                .flows([])
                .embryonic([cast.connection().both()]),
        );
    }
}

/// A request and its answers stay in `embryonic`, where they displace only their like. A flow that
/// goes on is a stream.
fn stream(table: &mut Table, cast: &Cast) {
    let opened = cast.world().embryonic(cast.connection().both());
    let again = cast.next(cast.client, cast.frontend);
    table.add(
        cast.case("a second question proves nothing")
            .world(&opened)
            .tc_ingress(EDGE)
            .sends(&again)
            .becomes(&again.clone().to(cast.backend))
            .forward(ONE),
    );
    let answered = cast.connection().state(state::ESTABLISHED);
    let question = cast.next(cast.client, cast.frontend);
    let answer = cast.next(cast.backend, cast.client);
    // A tick may pass between filling the maps and the packet.
    for (what, age) in [("at once", 0), ("after a while", 3)] {
        let world = cast.world().embryonic(answered.age(age).both());
        for (who, program, frame, changed) in [
            ("question", Program::Ingress, &question, question.clone().to(cast.backend)),
            ("answer", Program::Egress, &answer, answer.clone().from(cast.frontend)),
        ] {
            let case = cast
                .case(format!("another {who} of an answered flow, {what}"))
                .world(&world)
                .at(program, EDGE)
                .sends(frame)
                .becomes(&changed);
            let case =
                if program == Program::Ingress { case.forward(ONE) } else { case.reply(ONE) };
            table.add(if age < 2 { case } else { case.flows([answered.both()]).embryonic([]) });
        }
    }
}

/// Returns the client's flow to the backend that no slot selects.
fn spare(cast: &Cast) -> Connection {
    Connection { backend: cast.other_backend, id: SPARE, ..cast.connection() }
}

fn opening(table: &mut Table, cast: &Cast) {
    let Cast { client, frontend, backend, .. } = *cast;
    let connection = cast.connection();
    let world = cast.world();
    let first = cast.first(client, frontend);
    table.add(
        cast.case("the first packet opens a flow")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(backend))
            .opens(ONE)
            .embryonic([connection.both()]),
    );
    let far = world.clone().backend_flags(ONE, backend::SERVING);
    table.add(
        cast.case("a backend on another node")
            .world(&far)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(backend))
            .opens(ONE)
            .embryonic([connection.flags(0).both()]),
    );
    let world = world.embryonic(connection.both());
    table.add(
        cast.case("the first packet again")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(backend))
            .forward(ONE),
    );
    let answer = match cast.protocol {
        TCP => Frame::tcp(backend, client, SYN | ACK, &[]),
        _ => Frame::udp(backend, client, b"answer"),
    };
    let case = cast
        .case("the first reply")
        .world(&world)
        .tc_egress(EDGE)
        .sends(&answer)
        .becomes(&answer.clone().from(frontend))
        .reply(ONE);
    table.add(match cast.protocol {
        TCP => case.embryonic([connection.answered().both()]),
        // It is answered; whether there will be more than a request is still to be seen.
        _ => case.embryonic([connection.state(state::ESTABLISHED).both()]),
    });
}

/// A client's acknowledgment number shows whether it has seen the endpoint's answer.
fn acknowledging(table: &mut Table, cast: &Cast) {
    let Cast { client, frontend, backend, .. } = *cast;
    let connection = cast.connection();
    let answer = Frame::tcp(backend, client, SYN | ACK, &[]);
    let answered = connection.answered();
    let world = cast.world().embryonic(answered.both());
    let accepts = Frame::tcp(client, frontend, ACK, &[]).acknowledging(SEQUENCE + 1);
    for (what, frame) in [
        ("acknowledges it", accepts.clone()),
        ("acknowledges it with data", cast.next(client, frontend).acknowledging(SEQUENCE + 1)),
    ] {
        table.add(
            cast.case(format!("a client that {what} proves the flow"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&frame)
                .becomes(&frame.clone().to(backend))
                .forward(ONE)
                .flows([connection.state(state::ESTABLISHED).both()])
                .embryonic([]),
        );
    }
    for (what, frame) in [
        ("another number", accepts.clone().acknowledging(SEQUENCE)),
        (
            "its number in a SYN",
            Frame::tcp(client, frontend, SYN | ACK, &[]).acknowledging(SEQUENCE + 1),
        ),
    ] {
        table.add(
            cast.case(format!("a client that acknowledges {what} proves nothing"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&frame)
                .becomes(&frame.clone().to(backend))
                .forward(ONE),
        );
    }
    let old = connection.answered().heard(7);
    table.add(
        cast.case("another first reply has another number")
            .world(&cast.world().embryonic(old.both()))
            .tc_egress(EDGE)
            .sends(&answer)
            .becomes(&answer.clone().from(frontend))
            .reply(ONE)
            .embryonic([answered.both()]),
    );
}

fn established(table: &mut Table, cast: &Cast) {
    let Cast { client, frontend, backend, .. } = *cast;
    let connection = cast.connection().state(state::ESTABLISHED);
    let question = cast.next(client, frontend);
    let answer = cast.next(backend, client);
    let (to_backend, to_client) = (question.clone().to(backend), answer.clone().from(frontend));
    let (young, old) = (connection.age(5), connection.age(30));
    for (what, world, after) in [
        ("young flow", cast.world().flows(young.both()), young.both()),
        ("flow not renewed for long", cast.world().flows(old.both()), connection.both()),
    ] {
        let case = cast
            .case(format!("a packet of a {what}"))
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&question);
        table.cut(case.becomes(&to_backend).forward(ONE).flows([after.clone()]));
        let case =
            cast.case(format!("a reply of a {what}")).world(&world).tc_egress(EDGE).sends(&answer);
        table.cut(case.becomes(&to_client).reply(ONE).flows([after]));
    }
    table.add(
        cast.case("a packet makes the reply's lost entry again when it renews its own")
            .world(&cast.world().flows(old.forward()))
            .tc_ingress(EDGE)
            .sends(&question)
            .becomes(&to_backend)
            .forward(ONE)
            .flows([connection.both()]),
    );
    table.add(
        cast.case("a reply makes the question's lost entry again when it renews its own")
            .world(&cast.world().flows(old.reply()))
            .tc_egress(EDGE)
            .sends(&answer)
            .becomes(&to_client)
            .reply(ONE)
            .flows([connection.both()]),
    );
}

/// Packets of a flow at hooks where they are left alone.
fn elsewhere(table: &mut Table, cast: &Cast) {
    let Cast { client, frontend, backend, .. } = *cast;
    let world = cast.world().flows(cast.connection().state(state::ESTABLISHED).both());
    let question = cast.next(client, frontend);
    let answer = cast.next(backend, client);
    let mut pass = |what: &str, program, ifindex, frame: &Frame| {
        table.add(cast.case(what).world(&world).at(program, ifindex).sends(frame));
    };
    pass(
        "a translated packet enters the backend's link",
        Program::Egress,
        EDGE,
        &question.clone().to(backend),
    );
    pass("a reply leaves the backend's link", Program::Ingress, EDGE, &answer);
    pass(
        "a translated reply enters the client's link again",
        Program::Ingress,
        EDGE,
        &answer.from(frontend),
    );
}

/// Packets of strangers, and packets to addresses and ports that serve nothing.
fn strangers(table: &mut Table, cast: &Cast) {
    let Cast { client, frontend, backend, .. } = *cast;
    let world = cast.world().flows(cast.connection().state(state::ESTABLISHED).both());
    let mut pass = |what: &str, program, ifindex, frame: &Frame| {
        table.add(cast.case(what).world(&world).at(program, ifindex).sends(frame));
    };
    let mut stranger = backend;
    stranger.set_ip(address(cast.version, NET_CLIENTS, 99));
    pass("a stranger's packet enters", Program::Ingress, EDGE, &cast.first(client, stranger));
    pass("a stranger's packet leaves", Program::Egress, UPLINK, &cast.first(stranger, client));
    let mut closed = frontend;
    closed.set_port(frontend.port() + 1);
    pass(
        "a frontend's address, a port of no service",
        Program::Ingress,
        EDGE,
        &cast.first(client, closed),
    );
    let mut closed = backend;
    closed.set_port(backend.port() + 1);
    pass("a backend's address, another port", Program::Egress, EDGE, &cast.next(closed, client));
    pass(
        "a direct packet to a backend",
        Program::Ingress,
        EDGE,
        &cast.next(client, cast.other_backend),
    );
    let mut listed = world.clone();
    let _ =
        listed.listing.insert(stranger.ip(), listing::FRONTEND | listing::BACKEND | listing::NODE);
    for (program, ifindex) in
        [(Program::Ingress, EDGE), (Program::Ingress, UPLINK), (Program::Egress, UPLINK)]
    {
        let frame = if program == Program::Egress {
            cast.first(stranger, client)
        } else {
            cast.first(client, stranger).at(mac(ifindex))
        };
        table.add(
            cast.case(format!(
                "a stranger whose lane is another's, {} on {ifindex}",
                program.name()
            ))
            .world(&listed)
            .at(program, ifindex)
            .sends(&frame),
        );
    }
}

/// Frames for another host or pod.
fn other_frames(table: &mut Table, cast: &Cast) {
    let Cast { client, frontend, backend, .. } = *cast;
    let first = cast.first(client, frontend);
    let foreign = first.clone().at([2, 9, 9, 9, 9, 9]);
    table.add(
        cast.case("a frame for another host that an uplink hears")
            .world(&cast.world())
            .tc_ingress(UPLINK)
            .sends(&foreign),
    );
    table.add(
        cast.case("a frame for another pod of the bridge that an edge is a port of")
            .world(&cast.world())
            .tc_ingress(EDGE)
            .sends(&foreign)
            .becomes(&foreign.clone().to(backend))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );
}

/// Client and backend are ports of one bridge.
fn bridged(table: &mut Table, cast: &Cast) {
    let Cast { frontend, backend, .. } = *cast;
    // The pods of a port are reached by a route through the bridge.
    let cast = &cast.client_in(NET_BACKENDS);
    let first = cast.first(cast.client, frontend);
    let mut bridged = cast.world();
    bridged.devices.get_mut(&EDGE).expect("the edge").bridge = BRIDGE;
    table.add(
        cast.case("a backend on the client's bridge gets the frame from the bridge")
            .world(&bridged)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(backend).at(crate::packets::world::BACKEND_MAC))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );
    bridged.fill(ONE, &[SPARE]);
    table.add(
        cast.case("a backend that the bridge has no neighbour entry for is routed")
            .world(&bridged)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(cast.other_backend))
            .opens(SPARE)
            .embryonic([spare(cast).both()]),
    );
}

/// The selection of a new flow's backend.
fn selection(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.frontend);
    let mut world = cast.world();
    world.fill(SPARE, &[SPARE]);
    let (internal, inside, outside) =
        (world.ports[&ONE].ranges[0], world.ports[&SPARE].ranges[0], Range::default());
    world.port(ONE).ranges = [internal, inside, outside];
    for service in world.services.values_mut().filter(|service| service.service_port == ONE) {
        service.kind = frontend::LOAD_BALANCER;
    }
    table.add(
        cast.case("an external address asked from inside has the inside's backends")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(cast.other_backend))
            .opens(SPARE)
            .embryonic([spare(cast).both()]),
    );
    world.port(ONE).ranges = [Range::default(), Range::default(), internal];
    let first = first.at(mac(UPLINK));
    table.add(
        cast.case("an external address asked from outside has the outside's backends")
            .world(&world)
            .tc_ingress(UPLINK)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );

    // Half of the slots are another backend's.
    let mut world = cast.world();
    let ids: Vec<u32> = (0..61).map(|slot| if slot < 30 { ONE } else { SPARE }).collect();
    world.fill(ONE, &ids);
    for (port, low) in SLOTS[usize::from(cast.protocol != TCP)][usize::from(cast.client.is_ipv6())]
    {
        let mut connection = if low { cast.connection() } else { spare(cast) };
        connection.client.set_port(port);
        connection.seen_as = connection.client;
        let first = cast.first(connection.client, cast.frontend);
        table.add(
            cast.case(format!("port {port} keeps its slot from release to release"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&first)
                .becomes(&first.clone().to(connection.backend))
                .opens(connection.id)
                .embryonic([connection.both()]),
        );
    }
}

/// Client ports, and whether their slot is below 30 of 61, for TCP and UDP, IPv4 and IPv6.
const SLOTS: [[[(u16, bool); 3]; 2]; 2] = [
    [
        [(1024, false), (40_000, true), (65_535, false)],
        [(1024, true), (40_000, true), (65_535, true)],
    ],
    [
        [(1024, false), (40_000, true), (65_535, false)],
        [(1024, true), (40_000, true), (65_535, false)],
    ],
];

/// The endpoint's packets prove a flow.
fn promotion(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let world = cast.world().embryonic(connection.both());
    for (what, flags, data) in [("acknowledgment", ACK, &b""[..]), ("data", ACK, b"GET /")] {
        let frame = Frame::tcp(cast.client, cast.frontend, flags, data);
        table.add(
            cast.case(format!("the client's second packet, {what}, proves nothing"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&frame)
                .becomes(&frame.clone().to(cast.backend))
                .forward(ONE),
        );
        let frame = Frame::tcp(cast.backend, cast.client, flags, data);
        table.add(
            cast.case(format!("the backend's second packet, {what}, proves the flow"))
                .world(&world)
                .tc_egress(EDGE)
                .sends(&frame)
                .becomes(&frame.clone().from(cast.frontend))
                .reply(ONE)
                .flows([connection.state(state::ESTABLISHED).heard(0).both()])
                .embryonic([]),
        );
    }
}

/// Packets that prove nothing, and entries of other flows.
fn no_promotion(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let world = cast.world().embryonic(connection.both());
    let ended = connection.state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY);
    let frame = Frame::tcp(cast.backend, cast.client, ACK, &[]);
    table.add(
        cast.case("the last packets of a flow that has ended do not bring it back")
            .world(&cast.world().embryonic(ended.age(1).both()))
            .tc_egress(EDGE)
            .sends(&frame)
            .becomes(&frame.clone().from(cast.frontend))
            .reply(ONE),
    );
    let elsewhere = spare(cast).state(state::ESTABLISHED).age(3);
    table.add(
        cast.case("a flow is not proven over another one's entry")
            .world(&world.clone().flows(elsewhere.forward()))
            .tc_egress(EDGE)
            .sends(&frame)
            .becomes(&frame.clone().from(cast.frontend))
            .reply(ONE),
    );
    let old = connection.state(state::ESTABLISHED).age(30);
    let elsewhere = elsewhere.age(30);
    table.add(
        cast.case("a reply renews no entry of another flow")
            .world(&cast.world().flows(old.reply()).flows(elsewhere.forward()))
            .tc_egress(EDGE)
            .sends(&frame)
            .becomes(&frame.clone().from(cast.frontend))
            .reply(ONE)
            .flows([old.age(0).reply(), elsewhere.forward()]),
    );
}

/// Resets in place of a proof.
fn refusals(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let world = cast.world().embryonic(connection.both());
    let frame = Frame::tcp(cast.client, cast.frontend, RST | ACK, &[]);
    table.add(
        cast.case("a reset instead of a second packet proves nothing")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&frame)
            .becomes(&frame.clone().to(cast.backend))
            .forward(ONE)
            .embryonic([connection.state(state::RESET_FORWARD).both()]),
    );
    let frame = Frame::tcp(cast.backend, cast.client, RST | ACK, &[]);
    table.add(
        cast.case("the backend refuses")
            .world(&world)
            .tc_egress(EDGE)
            .sends(&frame)
            .becomes(&frame.clone().from(cast.frontend))
            .reply(ONE)
            .failed(ONE, Failure::Refused)
            .embryonic([connection.state(state::RESET_REPLY).both()]),
    );
}

/// A flow drains from a removed backend.
fn draining(table: &mut Table, cast: &Cast) {
    let old = spare(cast).state(state::ESTABLISHED);
    let world = cast.world().backend_flags(SPARE, backend::LOCAL).flows(old.both());
    let frame = cast.next(cast.client, cast.frontend);
    table.add(
        cast.case("a flow drains from a removed backend")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&frame)
            .becomes(&frame.clone().to(cast.other_backend))
            .forward(SPARE),
    );
}

/// FIN and RST of either side.
fn closing(table: &mut Table, cast: &Cast) {
    let connection = cast.connection().state(state::ESTABLISHED);
    let world = cast.world().flows(connection.both());
    for (what, flags, forward, reply) in [
        ("FIN", FIN | ACK, state::FIN_FORWARD, state::FIN_REPLY),
        ("RST", RST, state::RESET_FORWARD, state::RESET_REPLY),
        ("RST|ACK", RST | ACK, state::RESET_FORWARD, state::RESET_REPLY),
    ] {
        let frame = Frame::tcp(cast.client, cast.frontend, flags, &[]);
        table.add(
            cast.case(format!("the client's {what}"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&frame)
                .becomes(&frame.clone().to(cast.backend))
                .forward(ONE)
                .flows([connection.state(state::ESTABLISHED | forward).both()]),
        );
        let frame = Frame::tcp(cast.backend, cast.client, flags, &[]);
        let after = connection.state(state::ESTABLISHED | reply).both();
        let case = cast
            .case(format!("the backend's {what}"))
            .world(&world)
            .tc_egress(EDGE)
            .sends(&frame)
            .becomes(&frame.clone().from(cast.frontend))
            .reply(ONE);
        table.add(if flags & RST == 0 {
            case.flows([after])
        } else {
            case.flows([]).embryonic([after])
        });
    }
}

/// A flow that both sides have closed, and one that is half closed.
fn closed(table: &mut Table, cast: &Cast) {
    let connection = cast.connection().state(state::ESTABLISHED);
    let fin = Frame::tcp(cast.backend, cast.client, FIN | ACK, &[]);
    let half = connection.state(state::ESTABLISHED | state::FIN_FORWARD);
    let both = connection.state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY);
    table.add(
        cast.case("a flow that both sides have closed makes room")
            .world(&cast.world().flows(half.both()))
            .tc_egress(EDGE)
            .sends(&fin)
            .becomes(&fin.clone().from(cast.frontend))
            .reply(ONE)
            .flows([])
            .embryonic([both.both()]),
    );
}

/// Resets that had no effect: the backend goes on.
fn doubted(table: &mut Table, cast: &Cast) {
    let connection = cast.connection().state(state::ESTABLISHED);
    let doubted = connection.state(state::ESTABLISHED | state::RESET_FORWARD);
    let data = cast.next(cast.backend, cast.client);
    table.add(
        cast.case("the client's RST was none, the backend goes on")
            .world(&cast.world().flows(doubted.both()))
            .tc_egress(EDGE)
            .sends(&data)
            .becomes(&data.clone().from(cast.frontend))
            .reply(ONE)
            .flows([connection.both()]),
    );
    let doubted = connection.state(state::ESTABLISHED | state::RESET_REPLY);
    table.add(
        cast.case("a RST in the backend's name was none, the backend goes on")
            .world(&cast.world().embryonic(doubted.both()))
            .tc_egress(EDGE)
            .sends(&data)
            .becomes(&data.clone().from(cast.frontend))
            .reply(ONE)
            .flows([connection.both()])
            .embryonic([]),
    );
    let half = connection.state(state::ESTABLISHED | state::FIN_FORWARD);
    let frame = cast.next(cast.backend, cast.client);
    table.add(
        cast.case("a half-closed flow goes on")
            .world(&cast.world().flows(half.both()))
            .tc_egress(EDGE)
            .sends(&frame)
            .becomes(&frame.clone().from(cast.frontend))
            .reply(ONE),
    );
}

/// A client that opens a new connection from the port of an old one.
fn reopening(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let syn = cast.first(cast.client, cast.frontend);
    let to_backend = syn.clone().to(cast.backend);
    for (what, bits) in [
        ("closed", state::FIN_FORWARD | state::FIN_REPLY),
        ("reset by the backend", state::RESET_REPLY),
        ("closed by the backend and reset by the client", state::FIN_REPLY | state::RESET_FORWARD),
    ] {
        let old = connection.state(state::ESTABLISHED | bits).age(3);
        for (place, world) in [
            ("", cast.world().flows(old.both())),
            (", long demoted", cast.world().embryonic(old.both())),
        ] {
            table.add(
                cast.case(format!("a SYN never reuses a flow {what}{place}"))
                    .world(&world)
                    .tc_ingress(EDGE)
                    .sends(&syn)
                    .becomes(&to_backend)
                    .opens(ONE)
                    .flows([])
                    .embryonic([connection.both()]),
            );
        }
    }
    // What only the client says may be forged, and so may the SYN.
    for (what, bits) in
        [("a FIN", state::FIN_FORWARD), ("a RST", state::RESET_FORWARD), ("nothing", 0)]
    {
        let old = spare(cast).state(state::ESTABLISHED | bits).age(3);
        for (served, world) in [
            ("serves", cast.world()),
            ("drains", cast.world().backend_flags(SPARE, backend::LOCAL)),
        ] {
            let case = cast
                .case(format!(
                    "a SYN after {what} of the client is the backend's to answer, it {served}"
                ))
                .world(&world.flows(old.both()))
                .tc_ingress(EDGE)
                .sends(&syn)
                .becomes(&syn.clone().to(cast.other_backend))
                .forward(SPARE);
            let waits = old.age(0).state(state::ESTABLISHED);
            table.add(if bits == state::RESET_FORWARD { case.flows([waits.both()]) } else { case });
        }
    }
}

/// A backend accepts a client that has reset and connects again from the same port.
fn reopening_accepted(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let doubted = connection.state(state::ESTABLISHED | state::RESET_FORWARD | state::FIN_FORWARD);
    let answer = Frame::tcp(cast.backend, cast.client, SYN | ACK, &[]);
    table.add(
        cast.case("a backend accepts a client that has reset, from the same port")
            .world(&cast.world().flows(doubted.both()))
            .tc_egress(EDGE)
            .sends(&answer)
            .becomes(&answer.clone().from(cast.frontend))
            .reply(ONE)
            .flows([connection.state(state::ESTABLISHED).both()]),
    );
}

/// A SYN to a flow whose backend no longer serves leaves it once the backend has been silent.
fn reopening_after_silence(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let syn = cast.first(cast.client, cast.frontend);
    let to_backend = syn.clone().to(cast.backend);
    for (what, age, heard, leaves) in [
        ("silent for long", 3, 30, true),
        ("heard of late", 3, 20, false),
        ("silent as its client was", 25, 34, false),
    ] {
        let old = spare(cast).state(state::ESTABLISHED).age(age).heard(heard);
        let gone = cast.world().backend_flags(SPARE, backend::LOCAL).flows(old.both());
        let case = cast
            .case(format!("a SYN of a flow whose backend was removed and is {what}"))
            .world(&gone)
            .tc_ingress(EDGE)
            .sends(&syn);
        let stays = |case: Case| {
            let seen = if age > RENEW_TICKS { 0 } else { age };
            case.becomes(&syn.clone().to(cast.other_backend))
                .forward(SPARE)
                .flows([old.age(seen).both()])
        };
        table.add(if leaves {
            case.becomes(&to_backend).opens(ONE).flows([]).embryonic([connection.both()])
        } else {
            stays(case)
        });
        table.add(stays(
            cast.case(format!("a SYN of a flow whose backend serves and is {what}"))
                .world(&cast.world().flows(old.both()))
                .tc_ingress(EDGE)
                .sends(&syn),
        ));
    }
    for (who, program, heard, after) in
        [("client", Program::Ingress, 30, 30), ("backend", Program::Egress, 30, 0)]
    {
        let old = connection.state(state::ESTABLISHED).age(30).heard(heard);
        let frame = if program == Program::Ingress {
            cast.next(cast.client, cast.frontend)
        } else {
            cast.next(cast.backend, cast.client)
        };
        let case = cast
            .case(format!("a packet of the {who} tells when the backend was heard"))
            .world(&cast.world().flows(old.both()))
            .at(program, EDGE)
            .sends(&frame)
            .flows([old.age(0).heard(after).both()]);
        table.add(if program == Program::Ingress {
            case.becomes(&frame.clone().to(cast.backend)).forward(ONE)
        } else {
            case.becomes(&frame.clone().from(cast.frontend)).reply(ONE)
        });
    }
}

/// A SYN whose old flow led to another backend, and one within a live flow.
fn reopening_elsewhere(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let syn = cast.first(cast.client, cast.frontend);
    let to_backend = syn.clone().to(cast.backend);
    let old = spare(cast).state(state::ESTABLISHED | state::FIN_REPLY | state::FIN_FORWARD).age(3);
    table.add(
        cast.case("a SYN leaves nothing of a closed flow to another backend")
            .world(&cast.world().flows(old.both()))
            .tc_ingress(EDGE)
            .sends(&syn)
            .becomes(&to_backend)
            .opens(ONE)
            .flows([])
            .embryonic([connection.both()]),
    );
    let tried = spare(cast);
    table.add(
        cast.case("a SYN that was not answered leaves a removed backend")
            .world(&cast.world().backend_flags(SPARE, backend::LOCAL).embryonic(tried.both()))
            .tc_ingress(EDGE)
            .sends(&syn)
            .becomes(&to_backend)
            .opens(ONE)
            .embryonic([connection.both()]),
    );
    let live = connection.state(state::ESTABLISHED);
    table.add(
        cast.case("a SYN within a live flow is the backend's to answer")
            .world(&cast.world().flows(live.both()))
            .tc_ingress(EDGE)
            .sends(&syn)
            .becomes(&to_backend)
            .forward(ONE),
    );
}
