//! Source ports of masqueraded clients.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{Affinity, AffinityKey, Tuple, state};
use sluice_common::path::{REMAP_TRIES, mark};

use super::Table;
use super::clash::tried;
use super::masquerade::{LOCAL, OVERLAY, Place, REMOTE, opens};
use super::unserved::answer;
use crate::packets::case::{Case, Program};
use crate::packets::frame::{TCP, UDP};
use crate::packets::world::{
    Affinities, Cast, Connection, Exhausted, GENERATION, NET_CLIENTS, NET_FOREIGN, ONE, UPLINK, World,
    address, mac, tuple,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        choices(table, &cast);
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

/// Another client's flow that is shown as the same tuple.
fn blocker(cast: &Cast, connection: &Connection) -> Connection {
    Connection { client: SocketAddr::new(address(cast.version, NET_CLIENTS, 77), 50_000), ..*connection }
}

fn choices(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, place, net) in
        [("remote", REMOTE, NET_CLIENTS), ("overlay", OVERLAY, NET_CLIENTS), ("local", LOCAL, NET_FOREIGN)]
    {
        for port in [1, 1024, 30_000, 65_535] {
            let client = SocketAddr::new(cast.client_in(net).client.ip(), port);
            let (cast, world) = place.set(&cast.client(client));
            let name =
                format!("{title}: the port of a masqueraded client follows from its tuple, {what}, {port}");
            table.add(opens(name, &cast, &world, UPLINK, &place.masqueraded(&cast)));
        }
    }
    let (cast, world) = REMOTE.set(cast);
    let taken = blocker(&cast, &REMOTE.masqueraded(&cast));
    let second = REMOTE.masqueraded_at(&cast, 2);
    let name = format!("{title}: a masqueraded client's port is an unproven flow's");
    table.add(opens(name, &cast, &world.clone().embryonic(taken.both()), UPLINK, &second));
    let name = format!("{title}: a masqueraded client's port is a proven flow's");
    let proven = taken.state(state::ESTABLISHED);
    table.add(opens(name, &cast, &world.clone().flows(proven.both()), UPLINK, &second));
    let mut two = world.clone().flows(proven.both());
    two = two.flows(blocker(&cast, &second).state(state::ESTABLISHED).both());
    let name = format!("{title}: a masqueraded client's first two ports are taken");
    table.add(opens(name, &cast, &two, UPLINK, &REMOTE.masqueraded_at(&cast, 3)));
    let elsewhere = Connection { backend: cast.other_backend, ..proven };
    let name = format!("{title}: a masqueraded client's port is taken towards another backend alone");
    table.add(opens(name, &cast, &world.flows(elsewhere.both()), UPLINK, &REMOTE.masqueraded(&cast)));
}

/// A port whose flow no longer keeps it, and one that was the client's own before.
fn dead(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = REMOTE.set(cast);
    let own = REMOTE.masqueraded(&cast);
    let ended = match cast.protocol {
        TCP => blocker(&cast, &own).state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY).age(70),
        _ => blocker(&cast, &own).state(state::ESTABLISHED).age(200),
    };
    let name = format!("{title}: a masqueraded client's port was that of a flow that is dead");
    table.add(opens(name, &cast, &world.clone().flows(ended.both()), UPLINK, &own).flows([]));
    let lost = own.age(3).reply();
    let name = format!("{title}: a masqueraded client's lost entry leads to the same port again");
    table.add(opens(name, &cast, &world.embryonic(lost), UPLINK, &own));
}

/// What a socket of this host receives that speaks to the backend from a port.
fn socket(connection: &Connection) -> Tuple<std::net::IpAddr> {
    tuple(connection.backend, connection.seen_as, connection.protocol)
}

/// Ports that sockets of this host hold.
fn held(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, place) in [("remote", REMOTE), ("overlay", OVERLAY)] {
        let (cast, mut world) = place.set(cast);
        let _ = world.held.insert(socket(&place.masqueraded(&cast)));
        let second = place.masqueraded_at(&cast, 2);
        let name = format!("{title}: a socket of this host speaks to the backend from the port, {what}");
        table.add(opens(name, &cast, &world, UPLINK, &second));
    }
    let (cast, plain) = REMOTE.set(cast);
    let mut world = plain.clone();
    for attempt in 1..4 {
        let _ = world.held.insert(socket(&REMOTE.masqueraded_at(&cast, attempt)));
    }
    let name = format!("{title}: sockets of this host speak to the backend from the first three ports");
    table.add(opens(name, &cast, &world, UPLINK, &REMOTE.masqueraded_at(&cast, 4)));
    let _ = world.held.insert(socket(&REMOTE.masqueraded_at(&cast, 4)));
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    table.add(
        Case::new(
            format!("{title}: sockets of this host speak to the backend from the first four ports"),
            &world,
            Program::Ingress,
            UPLINK,
            &first,
        )
        .dropped(Reason::PortsExhausted, ONE),
    );
    let mut world = plain.clone();
    let own = REMOTE.masqueraded(&cast);
    let elsewhere = SocketAddr::new(own.backend.ip(), own.backend.port() + 1);
    let _ = world.held.insert(tuple(elsewhere, own.seen_as, own.protocol));
    let name = format!("{title}: a socket of this host speaks to another port of the backend from the port");
    table.add(opens(name, &cast, &world, UPLINK, &own));
    let mut world = plain.clone();
    let _ = world.listeners.insert((own.protocol, own.seen_as));
    let name = format!("{title}: a socket of this host listens on the port");
    table.add(opens(name, &cast, &world, UPLINK, &own));

    // A flow that is known is not looked for among the sockets.
    let mut world = plain.embryonic(own.both());
    let _ = world.held.insert(socket(&own));
    table.add(
        opens(
            format!("{title}: a socket of this host speaks to the backend from the port of a known flow"),
            &cast,
            &world,
            UPLINK,
            &own,
        )
        .forward(ONE)
        .marks(0),
    );
}

/// The world in which every port that is tried is taken.
fn tried_in_vain(cast: &Cast, world: &World) -> World {
    let mut world = world.clone();
    for attempt in 1..=REMAP_TRIES {
        world = world.embryonic(blocker(cast, &REMOTE.masqueraded_at(cast, attempt)).reply());
    }
    world
}

/// The search of a client that was in vain.
fn in_vain(cast: &Cast, place: Place, age: u32) -> Exhausted {
    let mut shown = place.masqueraded(cast);
    shown.seen_as.set_port(0);
    Exhausted::from([(socket(&shown), age)])
}

fn walks(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = REMOTE.set(cast);
    let world = tried_in_vain(&cast, &world);
    let begins = REMOTE.masqueraded_at(&cast, 0);
    let name = format!("{title}: every port tried for a masqueraded client is taken, a walk finds one");
    table.add(opens(name, &cast, &world, UPLINK, &begins));
    let name = format!("{title}: a search that was in vain some ticks ago is tried again");
    let old = World { exhausted: in_vain(&cast, REMOTE, 5), ..world.clone() };
    table.add(opens(name, &cast, &old, UPLINK, &begins));
    let name = format!("{title}: a search that was in vain for another address is no reason");
    let other = World { exhausted: in_vain(&cast, OVERLAY, 0), ..world.clone() };
    table.add(opens(name, &cast, &other, UPLINK, &begins));
    let mut now = World { exhausted: in_vain(&cast, REMOTE, 0), ..world };
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    let name = format!("{title}: a search that was just in vain is not tried again");
    table.add(Case::new(name, &now, Program::Ingress, UPLINK, &first).refused(
        &answer(&cast, &first),
        Reason::PortsExhausted,
        ONE,
    ));
    now.port(ONE).affinity_seconds = 100;
    let name = format!("{title}: a client without a port is not remembered");
    table.add(Case::new(name, &now, Program::Ingress, UPLINK, &first).refused(
        &answer(&cast, &first),
        Reason::PortsExhausted,
        ONE,
    ));
    let key = AffinityKey { service_port: ONE, client: cast.client.ip() };
    let to = Affinity { backend: ONE, seen: 0, generation: GENERATION, round: 0 };
    now.exhausted.clear();
    let name = format!("{title}: affinity is the client's own, not that of the address it is shown as");
    table.add(opens(name, &cast, &now, UPLINK, &begins).affinity(Affinities::from([(key, to)])));
    let name = format!("{title}: XDP leaves a masqueraded client's walk to tc");
    table.add(Case::new(name, &now, Program::Xdp, UPLINK, &first));
}

/// Every port that clients are given, in the walk's order.
fn ports() -> impl Iterator<Item = u16> {
    (1_024..=29_999).chain(61_000..=65_535)
}

fn exhausted(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, mut world) = REMOTE.set(cast);
    let taken = |port| {
        let mut shown = REMOTE.masqueraded(&cast);
        shown.seen_as.set_port(port);
        blocker(&cast, &shown).reply()
    };
    world.embryonic = ports().flat_map(taken).collect();
    assert_eq!(world.embryonic.len(), 33_512, "every port there is");
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    table.add(
        Case::new(
            format!("{title}: no port is left for a masqueraded client"),
            &world,
            Program::Ingress,
            UPLINK,
            &first,
        )
        .refused(&answer(&cast, &first), Reason::PortsExhausted, ONE)
        .exhausted(in_vain(&cast, REMOTE, 0)),
    );
    // The last port of the walk is the one before its first.
    let begins = tried(&cast, cast.frontend, 0).port();
    let all: Vec<u16> = ports().collect();
    let at = all.iter().position(|port| *port == begins).expect("a port that clients are given");
    let last = all[(at + all.len() - 1) % all.len()];
    let mut free = REMOTE.masqueraded(&cast);
    free.seen_as.set_port(last);
    let key = taken(last).into_keys().next().expect("an entry");
    let _ = world.embryonic.remove(&key);
    let name = format!("{title}: the last port of the walk is left for a masqueraded client");
    table.add(opens(name, &cast, &world, UPLINK, &free).marks(mark::MASQUERADED));
}
