//! Source ports of masqueraded clients.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{Affinity, AffinityKey, Tuple, flow, state};
use sluice_common::path::{REMAP_TRIES, mark};

use super::Table;
use super::clash::tried;
use super::masquerade::{LOCAL, OVERLAY, Place, REMOTE, leaves};
use super::unserved::answer;
use crate::packets::case::{End, Program};
use crate::packets::frame::{Frame, TCP, UDP};
use crate::packets::world::{
    Affinities, Cast, Connection, Exhausted, GENERATION, NET_CLIENTS, ONE, UPLINK, World, address,
    mac, tuple,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        choices(table, &cast);
        taken_choices(table, &cast);
        dead(table, &cast);
        held(table, &cast);
        walks(table, &cast);
    }
}

/// Adds the cases that need large maps: every port of a backend is taken.
pub(super) fn add_large(table: &mut Table) {
    for cast in [
        Cast::new(crate::packets::world::Version::V4, TCP),
        Cast::new(crate::packets::world::Version::V6, UDP),
    ] {
        exhausted(table, &cast);
    }
}

/// Returns another client's flow that the backend sees as the same tuple.
fn blocker(cast: &Cast, connection: &Connection) -> Connection {
    Connection {
        client: SocketAddr::new(address(cast.version, NET_CLIENTS, 77), 50_000),
        ..*connection
    }
}

/// Returns the cast as seen where the packet leaves, and the maps with its client's flow.
fn met(place: Place, cast: &Cast) -> (Cast, World) {
    let (cast, world) = place.set(cast);
    let world = place.met(&cast, &world);
    (cast, world)
}

/// The source port of a masqueraded client follows from its tuple.
fn choices(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, place) in [("remote", REMOTE), ("overlay", OVERLAY), ("local", LOCAL)] {
        for port in [1, 1024, 30_000, 65_535] {
            let client = SocketAddr::new(cast.client.ip(), port);
            let (cast, world) = met(place, &cast.client(client));
            let name = format!(
                "{title}: the port of a masqueraded client follows from its tuple, {what}, {port}"
            );
            table.add(leaves(name, &cast, &world, place, &place.source(&cast)));
        }
    }
}

/// Another port is chosen where the first one is taken towards the same backend.
fn taken_choices(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = met(REMOTE, cast);
    let own = REMOTE.source(&cast);
    let taken = blocker(&cast, &own);
    let second = REMOTE.source_at(&cast, 2);
    let mut add = |what: &str, world: &World, source: &Connection| {
        table.add(leaves(format!("{title}: {what}"), &cast, world, REMOTE, source));
    };
    add(
        "a masqueraded client's port is an unproven flow's",
        &world.clone().embryonic(taken.both()),
        &second,
    );
    let proven = taken.state(state::ESTABLISHED);
    add(
        "a masqueraded client's port is a proven flow's",
        &world.clone().flows(proven.both()),
        &second,
    );
    let two = world.clone().flows(proven.both());
    let two = two.flows(blocker(&cast, &second).state(state::ESTABLISHED).both());
    add("a masqueraded client's first two ports are taken", &two, &REMOTE.source_at(&cast, 3));
    let elsewhere =
        Connection { frontend: cast.other_backend, backend: cast.other_backend, ..proven };
    add(
        "a masqueraded client's port is taken towards another backend alone",
        &world.clone().flows(elsewhere.both()),
        &own,
    );
    let host = Connection {
        client: SocketAddr::new(cast.node, 40_001),
        frontend: cast.frontend,
        flags: flow::HOST,
        ..proven
    };
    add(
        "a masqueraded client's port is one of this host's own flows'",
        &world.clone().flows(host.both()).marks(mark::HOST | mark::MASQUERADED),
        &second,
    );
    let own_first = REMOTE.masqueraded(&cast).state(state::ESTABLISHED);
    let (_, plain) = REMOTE.set(&cast);
    add(
        "a masqueraded client whose flow is proven already",
        &plain.flows(own_first.both()).marks(mark::MASQUERADED),
        &own,
    );
}

/// A port that its flow no longer reserves, and one that was the client's own before.
fn dead(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = met(REMOTE, cast);
    let own = REMOTE.source(&cast);
    let ended = match cast.protocol {
        TCP => blocker(&cast, &own).state(state::ESTABLISHED | state::FIN_FORWARD).age(113),
        _ => blocker(&cast, &own).state(state::ESTABLISHED).age(200),
    };
    let name = format!("{title}: a masqueraded client's port was that of a flow that is dead");
    table.add(leaves(name, &cast, &world.clone().flows(ended.both()), REMOTE, &own).flows([]));
    let lost = own.age(3).reply();
    let name = format!("{title}: a masqueraded client's lost entry leads to the same port again");
    table.add(leaves(name, &cast, &world.embryonic(lost), REMOTE, &own));
}

/// Returns the tuple that a socket of this host receives on if it speaks to the backend from a
/// port.
fn socket(connection: &Connection) -> Tuple<std::net::IpAddr> {
    tuple(connection.backend, connection.seen_as, connection.protocol)
}

/// Ports that sockets of this host hold.
fn held(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, place) in [("remote", REMOTE), ("overlay", OVERLAY), ("local", LOCAL)] {
        let (cast, mut world) = met(place, cast);
        let _ = world.held.insert(socket(&place.source(&cast)));
        let second = place.source_at(&cast, 2);
        let name =
            format!("{title}: a socket of this host speaks to the backend from the port, {what}");
        table.add(leaves(name, &cast, &world, place, &second));
    }
    let (cast, plain) = met(REMOTE, cast);
    let mut world = plain.clone();
    for attempt in 1..4 {
        let _ = world.held.insert(socket(&REMOTE.source_at(&cast, attempt)));
    }
    let name =
        format!("{title}: sockets of this host speak to the backend from the first three ports");
    table.add(leaves(name, &cast, &world, REMOTE, &REMOTE.source_at(&cast, 4)));
    let _ = world.held.insert(socket(&REMOTE.source_at(&cast, 4)));
    let (program, first) = REMOTE.out(cast.first(cast.client, cast.backend));
    table.add(
        cast.case("sockets of this host speak to the backend from the first four ports")
            .world(&world)
            .at(program, UPLINK)
            .sends(&first)
            .dropped(Reason::PortsExhausted, ONE),
    );
    let mut world = plain.clone();
    let own = REMOTE.source(&cast);
    let elsewhere = SocketAddr::new(own.backend.ip(), own.backend.port() + 1);
    let _ = world.held.insert(tuple(elsewhere, own.seen_as, own.protocol));
    let name = format!(
        "{title}: a socket of this host speaks to another port of the backend from the port"
    );
    table.add(leaves(name, &cast, &world, REMOTE, &own));
    let mut world = plain.clone();
    let _ = world.listeners.insert((own.protocol, own.seen_as));
    let name = format!("{title}: a socket of this host listens on the port");
    table.add(leaves(name, &cast, &world, REMOTE, &own));

    // For a known flow no socket is looked up.
    let mut world = plain.embryonic(own.both());
    let _ = world.held.insert(socket(&own));
    let name = format!(
        "{title}: a socket of this host speaks to the backend from the port of a known flow"
    );
    table.add(leaves(name, &cast, &world, REMOTE, &own));
}

/// Returns a world in which every port that is tried is taken.
fn tried_in_vain(cast: &Cast, world: &World) -> World {
    let mut world = world.clone();
    for attempt in 1..=REMAP_TRIES {
        world = world.embryonic(blocker(cast, &REMOTE.source_at(cast, attempt)).reply());
    }
    world
}

/// Returns the entry of a client's search that found no port.
fn in_vain(cast: &Cast, place: Place, age: u32) -> Exhausted {
    let mut shown = place.source(cast);
    shown.seen_as.set_port(0);
    Exhausted::from([(socket(&shown), age)])
}

/// Returns a packet where it leaves, and the answer to its client.
fn answered(cast: &Cast) -> (Program, Frame, Frame) {
    let (program, first) = REMOTE.out(cast.first(cast.client, cast.backend));
    let answer = answer(cast, &first).at(mac(UPLINK));
    (program, first, answer)
}

fn walks(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = met(REMOTE, cast);
    let world = tried_in_vain(&cast, &world);
    let begins = REMOTE.source_at(&cast, 0);
    let name =
        format!("{title}: every port tried for a masqueraded client is taken, a walk finds one");
    table.add(leaves(name, &cast, &world, REMOTE, &begins));
    let name = format!("{title}: a search that was in vain some ticks ago is tried again");
    let old = World { exhausted: in_vain(&cast, REMOTE, 5), ..world.clone() };
    table.add(leaves(name, &cast, &old, REMOTE, &begins));
    let name = format!("{title}: a search that was in vain for another address is no reason");
    let other = World { exhausted: in_vain(&cast, OVERLAY, 0), ..world.clone() };
    table.add(leaves(name, &cast, &other, REMOTE, &begins));
    let mut now = World { exhausted: in_vain(&cast, REMOTE, 0), ..world };
    let (program, first, answer) = answered(&cast);
    table.add(
        cast.case("a search that was just in vain is not tried again")
            .world(&now)
            .at(program, UPLINK)
            .sends(&first)
            .becomes(&answer)
            .ends(End::Redirect)
            .reason(Reason::PortsExhausted, ONE),
    );
    now.port(ONE).affinity_seconds = 100;
    now.exhausted.clear();
    let name = format!("{title}: affinity is the client's own, and no matter of its source");
    table.add(leaves(name, &cast, &now, REMOTE, &begins));
    let (_, mut plain) = REMOTE.set(&cast);
    plain.port(ONE).affinity_seconds = 100;
    let key = AffinityKey { service_port: ONE, client: cast.client.ip() };
    let to = Affinity { backend: ONE, seen: 0, generation: GENERATION, round: 0 };
    let near = REMOTE.masqueraded(&cast);
    let answered = near.state(state::ESTABLISHED);
    let answer = cast.next(cast.backend, cast.client);
    let waiting = plain.clone().embryonic(near.both()).marks(mark::MASQUERADED);
    let case = cast
        .case("a masqueraded client is remembered by its own address")
        .world(&waiting)
        .tc_egress(UPLINK)
        .sends(&answer)
        .becomes(&answer.clone().from(cast.frontend))
        .reply(ONE)
        .affinity(Affinities::from([(key, to)]));
    table.add(match cast.protocol {
        TCP => case.embryonic([]).flows([answered.both()]),
        _ => case.embryonic([answered.both()]),
    });
}

/// Returns every port for clients, in the order of the walk.
fn ports() -> impl Iterator<Item = u16> {
    (1_024..=29_999).chain(61_000..=65_535)
}

fn exhausted(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, mut world) = met(REMOTE, cast);
    let taken = |port| {
        let mut shown = REMOTE.source(&cast);
        shown.seen_as.set_port(port);
        blocker(&cast, &shown).reply()
    };
    world.embryonic.extend(ports().flat_map(taken));
    assert_eq!(world.embryonic.len(), 2 + 33_512, "every port there is");
    let (program, first, answer) = answered(&cast);
    table.add(
        cast.case("no port is left for a masqueraded client")
            .world(&world)
            .at(program, UPLINK)
            .sends(&first)
            .becomes(&answer)
            .ends(End::Redirect)
            .reason(Reason::PortsExhausted, ONE)
            .exhausted(in_vain(&cast, REMOTE, 0)),
    );
    // The last port of the walk is the one before its first.
    let begins = tried(&cast, cast.backend, 0).port();
    let all: Vec<u16> = ports().collect();
    let at = all.iter().position(|port| *port == begins).expect("a port that clients are given");
    let last = all[(at + all.len() - 1) % all.len()];
    let mut free = REMOTE.source(&cast);
    free.seen_as.set_port(last);
    let key = taken(last).into_keys().next().expect("an entry");
    let _ = world.embryonic.remove(&key);
    let name = format!("{title}: the last port of the walk is left for a masqueraded client");
    table.add(leaves(name, &cast, &world, REMOTE, &free));
}
