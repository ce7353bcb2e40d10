//! Lost entries and their recovery.

use sluice_common::Reason;
use sluice_common::abi::{frontend, state};

use super::Table;
use crate::packets::case::{Case, Program};
use crate::packets::frame::{ACK, Frame, RST, SEQUENCE, SYN, TCP};
use crate::packets::world::{Cast, Connection, EDGE, ONE, OTHER, SPARE, UPLINK, World, mac};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::of(TCP) {
        forward(table, &cast);
        reply(table, &cast);
        reply_alone(table, &cast);
        guesses_and_backend(table, &cast);
        guesses_and_client(table, &cast);
        guesses_and_resets(table, &cast);
        last_guesses(table, &cast);
        not_ours(table, &cast);
    }
}

fn forward(table: &mut Table, cast: &Cast) {
    let connection = cast.connection().state(state::ESTABLISHED);
    let data = cast.next(cast.client, cast.frontend);
    for (what, world, proven) in [
        ("forward entry", cast.world().flows(connection.age(5).reply()), true),
        (
            "forward entry and an idle reply entry",
            cast.world().flows(connection.age(250).reply()),
            true,
        ),
        ("both entries", cast.world(), false),
    ] {
        let case = cast
            .case(format!("{what} lost, in the middle of a connection"))
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&data)
            .becomes(&data.clone().to(cast.backend))
            .reason(Reason::Recovered, ONE);
        // Half of a proven flow is proof. An entry that anybody may have forged is not.
        table.add(if proven {
            case.flows([connection.both()])
        } else {
            case.embryonic([connection.state(0).both()])
        });
    }
    let reset = Frame::tcp(cast.client, cast.frontend, RST, &[]);
    table.add(
        cast.case("both entries lost, the client resets")
            .world(&cast.world())
            .tc_ingress(EDGE)
            .sends(&reset)
            .becomes(&reset.clone().to(cast.backend))
            .reason(Reason::Recovered, ONE),
    );
}

/// Returns a world in which one frontend is known to lead to the backend.
fn one_origin(cast: &Cast) -> World {
    let mut world = cast.world();
    for frontends in world.origins.values_mut() {
        frontends.truncate(1);
    }
    world
}

/// A client's reset shows that both entries are lost.
fn reply(table: &mut Table, cast: &Cast) {
    let connection = cast.connection().state(state::ESTABLISHED);
    let other = cast.other_connection().state(state::ESTABLISHED);
    let reset = Frame::tcp(cast.client, cast.backend, RST, &[]);
    let mut external = cast.world();
    external.add_frontend(cast, OTHER, cast.other_frontend, frontend::LOAD_BALANCER);
    for (what, ifindex, world) in [
        ("one of a pod", EDGE, cast.world()),
        ("one from outside, the service has an external address", UPLINK, external),
    ] {
        let (service_port, guess) =
            if ifindex == EDGE { (ONE, connection) } else { (OTHER, other) };
        table.add(
            cast.case(format!("both entries lost, the client's slot tells, {what}"))
                .world(&world)
                .tc_ingress(ifindex)
                .sends(&reset.clone().at(mac(ifindex)))
                .dropped(Reason::ReplyRecovered, service_port)
                .embryonic([guess.state(state::GUESS).heard(SEQUENCE).both()]),
        );
    }
    table.add(
        cast.case("both entries lost, a client outside would have to have used a ClusterIP")
            .world(&cast.world())
            .tc_ingress(UPLINK)
            .sends(&reset.clone().at(mac(UPLINK))),
    );
}

/// A client's reset shows that the reply's entry is lost.
fn reply_alone(table: &mut Table, cast: &Cast) {
    let reset = Frame::tcp(cast.client, cast.backend, RST, &[]);
    let connection = cast.connection().state(state::ESTABLISHED);
    let other = cast.other_connection().state(state::ESTABLISHED);
    for (what, world, service_port, after) in [
        (
            "the forward entry tells",
            cast.world().flows(connection.age(5).forward()),
            ONE,
            connection.both(),
        ),
        (
            "another frontend's forward entry tells",
            cast.world().flows(other.age(5).forward()),
            OTHER,
            other.both(),
        ),
    ] {
        for (program, ifindex) in [(Program::Ingress, EDGE), (Program::Ingress, UPLINK)] {
            let reset = reset.clone().at(mac(ifindex));
            table.add(
                cast.case(format!("reply entry lost, {what}, on device {ifindex}"))
                    .world(&world)
                    .at(program, ifindex)
                    .sends(&reset)
                    .dropped(Reason::ReplyRecovered, service_port)
                    .flows([after.clone()]),
            );
        }
    }
}

/// Returns a guess that the connection is the one that the client's reset was about.
fn guessed(connection: Connection) -> Connection {
    connection.state(state::GUESS).heard(SEQUENCE)
}

/// Returns a guess that the backend has confirmed.
fn matched(connection: Connection) -> Connection {
    connection.state(state::GUESS | state::MATCHED).heard(SEQUENCE)
}

/// Begins the case of a client's packet after a guess.
fn after_guess(cast: &Cast, what: &str, world: &World, frame: &Frame) -> Case {
    cast.case(format!("a guess, and {what}")).world(world).tc_ingress(EDGE).sends(frame)
}

/// A guess, and the backend's next packet.
fn guesses_and_backend(table: &mut Table, cast: &Cast) {
    let (guess, _) = (cast.connection(), cast.other_connection());
    let reply = |what: &str, world: &World, frame: &Frame| {
        cast.case(format!("a guess, and {what}")).world(world).tc_egress(EDGE).sends(frame)
    };
    let world = cast.world().embryonic(guessed(guess).both());
    // A packet of the connection that the reset was about, and one of another connection.
    let segment = cast.next(cast.backend, cast.client);
    let answered = segment.clone().acknowledging(SEQUENCE);
    table.add(
        reply("the backend sends what was reset once more", &world, &answered)
            .becomes(&answered.clone().from(cast.frontend))
            .reply(ONE)
            .embryonic([matched(guess).both()]),
    );
    table.add(reply("the backend acknowledges something else", &world, &segment));
    let bare = Frame::tcp(cast.backend, cast.client, RST, &[]).acknowledging(SEQUENCE);
    table.add(reply("the backend resets without an acknowledgment", &world, &bare));
}

/// A guess, and the client's next packet.
fn guesses_and_client(table: &mut Table, cast: &Cast) {
    let (guess, other) = (cast.connection(), cast.other_connection());
    let world = cast.world().embryonic(guessed(guess).both());
    let data = cast.next(cast.client, cast.frontend);
    table.add(
        after_guess(cast, "the client goes on before the backend", &world, &data)
            .becomes(&data.clone().to(cast.backend))
            .reason(Reason::Recovered, ONE)
            .embryonic([guess.both()]),
    );
    table.add(
        after_guess(
            cast,
            "the client goes on",
            &cast.world().embryonic(matched(guess).both()),
            &data,
        )
        .becomes(&data.clone().to(cast.backend))
        .forward(ONE)
        .embryonic([guess.both()]),
    );
    // Its port is the connection's in any case: the backend would not know the connection with
    // another one.
    table.add(
        after_guess(
            cast,
            "the client goes on at another frontend",
            &cast.world().embryonic(matched(other).both()),
            &data,
        )
        .becomes(&data.clone().to(cast.backend))
        .reason(Reason::Recovered, ONE)
        .embryonic([guess.both()]),
    );
}

/// A guess that the client contradicts by a reset.
fn guesses_and_resets(table: &mut Table, cast: &Cast) {
    let (guess, other) = (cast.connection(), cast.other_connection());
    let world = cast.world().embryonic(guessed(guess).both());
    let reset = Frame::tcp(cast.client, cast.frontend, RST, &[]);
    table.add(
        after_guess(
            cast,
            "the client resets: the next frontend is tried",
            &cast.world().embryonic(matched(guess).both()),
            &reset,
        )
        .dropped(Reason::ReplyRecovered, OTHER)
        .embryonic([guessed(other).both()]),
    );
    table.add(
        after_guess(cast, "a reset, though the client has heard nothing", &world, &reset)
            .becomes(&reset.clone().to(cast.backend))
            .reason(Reason::Recovered, ONE),
    );
    let proof = other.state(state::ESTABLISHED);
    table.add(
        after_guess(
            cast,
            "the client resets: another frontend's forward entry tells",
            &cast.world().embryonic(matched(guess).both()).flows(proof.age(5).forward()),
            &reset,
        )
        .dropped(Reason::ReplyRecovered, OTHER)
        .flows([proof.both()])
        .embryonic([]),
    );
}

/// Resets after the last guess, and after a guess has become certain.
fn last_guesses(table: &mut Table, cast: &Cast) {
    let (guess, other) = (cast.connection(), cast.other_connection());
    let reset = Frame::tcp(cast.client, cast.other_frontend, RST, &[]);
    table.add(
        after_guess(
            cast,
            "the client resets the last one",
            &cast.world().embryonic(matched(other).both()),
            &reset,
        )
        .becomes(&reset.clone().to(cast.backend))
        .forward(OTHER)
        .embryonic([other
            .state(state::GUESS | state::MATCHED | state::RESET_FORWARD)
            .heard(SEQUENCE)
            .both()]),
    );
    let reset = Frame::tcp(cast.client, cast.frontend, RST, &[]);
    let certain = guess.state(state::ESTABLISHED);
    table.add(
        after_guess(
            cast,
            "the client resets what has become certain",
            &cast.world().flows(certain.both()),
            &reset,
        )
        .becomes(&reset.clone().to(cast.backend))
        .forward(ONE)
        .flows([certain.state(state::ESTABLISHED | state::RESET_FORWARD).both()]),
    );
}

fn not_ours(table: &mut Table, cast: &Cast) {
    let connection = cast.connection().state(state::ESTABLISHED);
    let mut pass = |what: &str, world: &World, frame: &Frame| {
        table.add(cast.case(what).world(world).tc_ingress(EDGE).sends(frame));
    };
    let reset = Frame::tcp(cast.client, cast.backend, RST, &[]);
    let acknowledging = Frame::tcp(cast.client, cast.backend, RST | ACK, &[]);
    pass(
        "a reset with acknowledgment is the client's own will",
        &cast.world().flows(connection.forward()),
        &acknowledging,
    );
    let elsewhere = Connection { backend: cast.other_backend, id: SPARE, ..connection };
    pass(
        "a reset, and the frontend's flow leads elsewhere",
        &one_origin(cast).flows(elsewhere.forward()),
        &reset,
    );
    let closed = connection.state(state::ESTABLISHED | state::RESET_FORWARD);
    pass(
        "a reset, and the frontend's flow is closing",
        &one_origin(cast).flows(closed.forward()),
        &reset,
    );
    // Its replies are translated, however long it has been idle, so their entry is not lost.
    let live = cast.other_connection().state(state::ESTABLISHED).age(5);
    pass(
        "a reset, and a live flow has the tuple, of a frontend that is not known to lead there",
        &one_origin(cast).flows(live.both()),
        &reset,
    );
    let guess = cast.connection().state(state::GUESS).heard(SEQUENCE);
    pass(
        "a guess, and a direct connection opens: the guess translates nothing of it",
        &cast.world().embryonic(guess.both()),
        &Frame::tcp(cast.client, cast.backend, SYN, &[]),
    );
    let mut moved = one_origin(cast);
    moved.fill(ONE, &[SPARE]);
    pass("a reset, and the client's slot leads elsewhere", &moved, &reset);
    let mut none = cast.world();
    none.origins.clear();
    pass("a reset to a backend that no frontend is known to lead to", &none, &reset);
    pass("a reset to an endpoint's other port", &cast.world(), &{
        let mut other = cast.backend;
        other.set_port(22);
        reset.clone().to(other)
    });
}
