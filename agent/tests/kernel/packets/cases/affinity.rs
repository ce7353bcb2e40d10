//! Session affinity.

use std::net::SocketAddr;

use sluice_common::abi::{Affinity, AffinityKey, Range, backend, flow, frontend, state};
use sluice_common::maglev;
use sluice_common::path::mark;
use sluice_common::{Failure, Reason, V4, V6};

use super::Table;
use super::clash::of_host;
use crate::packets::case::{Case, End, Program, case};
use crate::packets::frame::{ACK, Frame, RST, SYN, TCP};
use crate::packets::ip::Ip;
use crate::packets::world::{
    Affinities, Cast, Connection, EDGE, GENERATION, ONE, OTHER, SELECTED, SPARE, UPLINK, World, mac,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        first(table, &cast);
        entries(table, &cast);
        entries_of_sets(table, &cast);
        rounds(table, &cast);
        recorded_when_proven(table, &cast);
        recorded_by_flows(table, &cast);
        recorded_of_special_clients(table, &cast);
        recovered_by_affinity(table, &cast);
        unrecorded(table, &cast);
    }
}

/// Seconds for which a client is remembered: more than 93 ticks, and less than 94.
const SECONDS: u32 = 100;

/// Returns a world in which half of the slots are another backend's.
fn world(cast: &Cast) -> World {
    let mut world = cast.world();
    let ids: Vec<u32> = (0..61).map(|slot| if slot < 30 { ONE } else { SPARE }).collect();
    world.fill(ONE, &ids);
    world.port(ONE).affinity_seconds = SECONDS;
    world
}

/// Reports whether the client's slot, which follows from its address and round alone, is among the
/// first thirty.
fn is_low(cast: &Cast, round: u16) -> bool {
    fn hash<F: Ip>(cast: &Cast) -> u32 {
        F::hash(&F::of(cast.client.ip()).unwrap_or_default())
    }
    let hash = if cast.client.is_ipv4() { hash::<V4>(cast) } else { hash::<V6>(cast) };
    maglev::scale(maglev::in_round(hash, round), 61) < 30
}

fn to(cast: &Cast, id: u32) -> Connection {
    let backend = if id == ONE { cast.backend } else { cast.other_backend };
    Connection { backend, id, ..cast.connection() }
}

/// Returns the connection to the backend that the client's address selects, and one to another
/// backend.
fn own_and_other(cast: &Cast) -> [Connection; 2] {
    let (own, other) = if is_low(cast, 0) { (ONE, SPARE) } else { (SPARE, ONE) };
    [to(cast, own), to(cast, other)]
}

/// Returns the connection to the backend that the client's address selects in a round.
fn in_round(cast: &Cast, round: u16) -> Connection {
    to(cast, if is_low(cast, round) { ONE } else { SPARE })
}

/// Returns the entry of a client in its first round.
fn been(cast: &Cast, service_port: u32, backend: u32, age: u32) -> Affinities {
    let key = AffinityKey { service_port, client: cast.client.ip() };
    Affinities::from([(key, Affinity { backend, seen: age, generation: GENERATION, round: 0 })])
}

/// Returns the same entries in another round.
fn round(mut entries: Affinities, round: u16) -> Affinities {
    for entry in entries.values_mut() {
        entry.round = round;
    }
    entries
}

fn opens(
    cast: &Cast,
    name: String,
    world: &World,
    program: Program,
    connection: &Connection,
) -> Case {
    let ifindex = if program == Program::Xdp { UPLINK } else { EDGE };
    let first = cast.first(cast.client, cast.frontend).at(mac(ifindex));
    case(name)
        .world(world)
        .at(program, ifindex)
        .sends(&first)
        .becomes(&first.clone().to(connection.backend))
        .opens(connection.id)
        .embryonic([connection.both()])
}

/// Without an entry, the client's address alone selects the backend.
fn first(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for host in [7, 8, 9, 10] {
        let client = crate::packets::world::address(cast.version, 1, host);
        for port in [1024, 40_000, 65_535] {
            let cast = cast.client(SocketAddr::new(client, port));
            let [own, _] = own_and_other(&cast);
            for program in [Program::Ingress, Program::Xdp] {
                let name = format!(
                    "{title}: affinity leads client {host} by its address alone, port {port}, {}",
                    program.name()
                );
                table.add(opens(&cast, name, &world(&cast), program, &own));
            }
        }
    }
}

/// The entries of the affinity table that are followed.
fn entries(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let [own, other] = own_and_other(cast);
    let mut case = |what: &str, world: &World, connection: &Connection| {
        for program in [Program::Ingress, Program::Xdp] {
            let name = format!("{title}: affinity, {what}, {}", program.name());
            table.add(opens(cast, name, world, program, connection));
        }
    };
    let with = |affinity: Affinities| World { affinity, ..world(cast) };
    case("the entry is followed", &with(been(cast, ONE, other.id, 0)), &other);
    case(
        "an entry that is about to expire is followed",
        &with(been(cast, ONE, other.id, 92)),
        &other,
    );
    let mut old = been(cast, ONE, other.id, 1);
    for entry in old.values_mut() {
        entry.generation -= 1;
    }
    case("an entry of an earlier owner of the backend's id", &with(old), &own);
    let flags = backend::SERVING | backend::LOCAL;
    for (what, flags) in [
        ("an entry of a backend that left the client's set", flags | SELECTED ^ backend::SELECTED),
        ("an entry of a backend that left every set", flags),
    ] {
        case(what, &with(been(cast, ONE, other.id, 1)).backend_flags(other.id, flags), &own);
    }
    let drained =
        with(been(cast, ONE, other.id, 1)).backend_flags(other.id, backend::LOCAL | SELECTED);
    case("an entry of a backend that is in the set for want of a serving one", &drained, &other);
    case("an entry of another service port's backend", &with(been(cast, ONE, OTHER, 1)), &own);
    case("an entry of no backend", &with(been(cast, ONE, 4000, 1)), &own);
}

/// Entries of other service ports, and of backends in other sets.
fn entries_of_sets(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let [own, other] = own_and_other(cast);
    let with = |affinity: Affinities| World { affinity, ..world(cast) };
    let flags = backend::SERVING | backend::LOCAL;
    let world = with(been(cast, OTHER, OTHER, 5));
    let name = format!("{title}: affinity, an entry for another service port");
    table.add(opens(cast, name, &world, Program::Ingress, &own));
    for (what, bit, connection) in [
        ("is in", backend::SELECTED << 2, &other),
        ("is only in others than", SELECTED ^ backend::SELECTED << 2, &own),
    ] {
        let world = with(been(cast, ONE, other.id, 1))
            .kind(ONE, frontend::LOAD_BALANCER)
            .backend_flags(other.id, flags | bit);
        let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
        table.add(
            cast.case(format!("affinity, the backend {what} the outside's set"))
                .world(&world)
                .tc_ingress(UPLINK)
                .sends(&first)
                .becomes(&first.clone().to(connection.backend))
                .opens(connection.id)
                .embryonic([connection.both()]),
        );
    }
}

/// A client that comes back too late goes on to the next round. One that opened no new flow stays
/// in its round.
fn rounds(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let with = |affinity: Affinities| World { affinity, ..world(cast) };
    for (before, age) in [(0, 94), (1, 94), (2, 5000), (7, 94), (u16::MAX, 94)] {
        let after = before.wrapping_add(1);
        let connection = in_round(cast, after);
        for id in [ONE, SPARE] {
            for program in [Program::Ingress, Program::Xdp] {
                let name = format!(
                    "{title}: affinity, an entry of round {before} for backend {id} is {age} ticks old, {}",
                    program.name()
                );
                let world = with(round(been(cast, ONE, id, age), before));
                table.add(opens(cast, name, &world, program, &connection));
            }
        }
    }
    for (before, id) in [(3, ONE), (3, SPARE)] {
        let connection = to(cast, id);
        let entry = |age| round(been(cast, ONE, id, age), before);
        let name =
            format!("{title}: affinity, a client in time stays in its round, at backend {id}");
        let world = with(entry(92));
        table.add(opens(cast, name, &world, Program::Ingress, &connection));
    }
    let gone = round(been(cast, ONE, 4000, 1), 5);
    let connection = in_round(cast, 5);
    let name =
        format!("{title}: affinity, a client in time whose backend is gone stays in its round");
    table.add(opens(cast, name, &with(gone), Program::Ingress, &connection));
    if cast.protocol == TCP {
        let data = Frame::tcp(cast.client, cast.frontend, ACK, b"data");
        let [_, other] = own_and_other(cast);
        table.add(
            cast.case("affinity leads a connection whose entries were lost after it ran out")
                .world(&with(been(cast, ONE, other.id, 500)))
                .tc_ingress(EDGE)
                .sends(&data)
                .becomes(&data.clone().to(other.backend))
                .reason(Reason::Recovered, ONE)
                .embryonic([other.both()]),
        );
    }
}

/// An entry is written when the endpoint has answered, not before.
fn recorded_when_proven(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let [own, other] = own_and_other(cast);
    let with = |affinity: Affinities| World { affinity, ..world(cast) };
    let name = format!("{title}: affinity, a new flow alone refreshes no entry");
    table.add(opens(cast, name, &with(been(cast, ONE, other.id, 50)), Program::Ingress, &other));
    // The endpoint has answered with a datagram, or with a segment of a connection that it knows.
    let answer = cast.next(other.backend, cast.client);
    let after = other.state(state::ESTABLISHED);
    for (what, before, now) in [
        ("a new client's", Affinities::new(), been(cast, ONE, other.id, 0)),
        ("a client's that comes back in time", round(been(cast, ONE, own.id, 92), 3), {
            round(been(cast, ONE, other.id, 0), 3)
        }),
        ("a client's that comes back late", round(been(cast, ONE, own.id, 94), 3), {
            round(been(cast, ONE, other.id, 0), 4)
        }),
    ] {
        let world = with(before).embryonic(other.both());
        let case = cast
            .case(format!("affinity, {what} first answer is recorded"))
            .world(&world)
            .tc_egress(EDGE)
            .sends(&answer)
            .becomes(&answer.clone().from(cast.frontend))
            .reply(other.id)
            .affinity(now);
        table.add(match cast.protocol {
            TCP => case.flows([after.both()]).embryonic([]),
            _ => case.embryonic([after.both()]),
        });
    }
    if cast.protocol == TCP {
        for (what, flags, after) in [
            ("accepts", SYN | ACK, other.answered()),
            ("refuses", RST | ACK, other.state(state::RESET_REPLY)),
        ] {
            let frame = Frame::tcp(other.backend, cast.client, flags, &[]);
            let world = with(Affinities::new()).embryonic(other.both());
            let case = cast
                .case(format!("affinity, a backend that {what} proves nothing"))
                .world(&world)
                .tc_egress(EDGE)
                .sends(&frame)
                .becomes(&frame.clone().from(cast.frontend))
                .reply(other.id)
                .embryonic([after.both()]);
            table.add(if what == "refuses" {
                case.failed(other.id, Failure::Refused)
            } else {
                case
            });
        }
    }
}

/// The effect of a known flow's packets on its client's entry.
fn recorded_by_flows(table: &mut Table, cast: &Cast) {
    let [own, _] = own_and_other(cast);
    let with = |affinity: Affinities| World { affinity, ..world(cast) };
    let connection = own.state(state::ESTABLISHED);
    let flows = with(been(cast, ONE, own.id, 50)).flows(connection.age(30).both());
    for program in [Program::Ingress, Program::Xdp] {
        let ifindex = if program == Program::Xdp { UPLINK } else { EDGE };
        let next = cast.next(cast.client, cast.frontend).at(mac(ifindex));
        table.add(
            cast.case(format!("affinity, a later packet refreshes no entry, {}", program.name()))
                .world(&flows)
                .at(program, ifindex)
                .sends(&next)
                .becomes(&next.clone().to(own.backend))
                .forward(own.id)
                .flows([connection.both()]),
        );
    }
    let reply = cast.next(own.backend, cast.client);
    table.add(
        cast.case("affinity, a reply refreshes no entry")
            .world(&flows)
            .tc_egress(EDGE)
            .sends(&reply)
            .becomes(&reply.clone().from(cast.frontend))
            .reply(own.id)
            .flows([connection.both()]),
    );
    let lost = world(cast).flows(connection.both());
    let next = cast.next(cast.client, cast.frontend);
    table.add(
        cast.case("affinity, a flow goes on without an entry and makes none")
            .world(&lost)
            .tc_ingress(EDGE)
            .sends(&next)
            .becomes(&next.clone().to(own.backend))
            .forward(own.id),
    );
}

/// Clients that are their own backend, and this host as the client.
fn recorded_of_special_clients(table: &mut Table, cast: &Cast) {
    let [_, _] = own_and_other(cast);
    let itself = cast.client(SocketAddr::new(cast.backend.ip(), 40_001));
    let mirror = SocketAddr::new(cast.frontend.ip(), 40_001);
    let hairpin =
        Connection { seen_as: mirror, flags: flow::LOCAL | flow::HAIRPIN, ..to(&itself, ONE) };
    let first = itself.first(itself.client, itself.frontend);
    let mut world_of_one = world(&itself);
    world_of_one.affinity = been(&itself, ONE, ONE, 7);
    table.add(
        cast.case("affinity of a client that is its own backend")
            .world(&world_of_one)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().from(mirror).to(cast.backend).ttl(60).turned())
            .ends(End::Redirect)
            .opens(ONE)
            .embryonic([hairpin.both()])
            .marks(mark::HOST),
    );
    let host = cast.client(SocketAddr::new(cast.node, 40_001));
    let [own, _] = own_and_other(&host);
    let own = of_host(&host, own);
    let first = host.first(host.client, host.frontend);
    table.add(
        cast.case("affinity of this host")
            .world(&world(&host))
            .tc_egress(UPLINK)
            .sends(&first)
            .becomes(&first.clone().from(own.seen_as).to(own.backend))
            .ends(End::Redirect)
            .opens(own.id)
            .embryonic([own.both()])
            .marks(mark::HOST),
    );
}

/// A connection whose entries were lost.
fn recovered_by_affinity(table: &mut Table, cast: &Cast) {
    let [_, other] = own_and_other(cast);
    let with = |affinity: Affinities| World { affinity, ..world(cast) };
    if cast.protocol == TCP {
        let data = Frame::tcp(cast.client, cast.frontend, ACK, b"data");
        table.add(
            cast.case("affinity leads a connection whose entries were lost")
                .world(&with(been(cast, ONE, other.id, 20)))
                .tc_ingress(EDGE)
                .sends(&data)
                .becomes(&data.clone().to(other.backend))
                .reason(Reason::Recovered, ONE)
                .embryonic([other.both()]),
        );
    }
}

/// Cases in which no entry is written.
fn unrecorded(table: &mut Table, cast: &Cast) {
    let mut none = world(cast);
    none.port(ONE).ranges = [Range::DROP; 3];
    let first = cast.first(cast.client, cast.frontend);
    table.add(
        cast.case("affinity, a client that is dropped is not remembered")
            .world(&none)
            .tc_ingress(EDGE)
            .sends(&first)
            .dropped(Reason::NoLocalBackend, ONE),
    );
    let mut without = world(cast);
    without.port(ONE).affinity_seconds = 0;
    without.affinity = been(cast, ONE, SPARE, 1);
    without.fill(ONE, &[ONE]);
    table.add(
        cast.case("an entry of a service port that has no affinity any more")
            .world(&without)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );
}
