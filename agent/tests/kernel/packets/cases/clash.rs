//! Reply tuples that are taken by other flows.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{Tuple, device_flags, flow, listing, state};
use sluice_common::maglev;
use sluice_common::path::{REMAP_TRIES, mark};
use sluice_common::{V4, V6};

use super::Table;
use crate::packets::case::{Program, case};
use crate::packets::frame::{ACK, Frame, SYN, TCP, UDP};
use crate::packets::ip::Ip;
use crate::packets::world::{
    Cast, Connection, EDGE, ONE, OTHER, OWN_NETNS, UPLINK, World, mac, tuple,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        two_frontends(table, &cast);
        two_frontends_go_on(table, &cast);
        two_ports_taken(table, &cast);
        taken_over(table, &cast);
        kept(table, &cast);
        if cast.protocol == TCP {
            waiting_aside(table, &cast);
            idle_for_a_day(table, &cast);
        }
        walks(table, &cast);
        direct_beside_live(table, &cast);
        direct_over_dead(table, &cast);
        direct_goes_on(table, &cast);
        direct_beside_ended(table, &cast);
        direct_elsewhere(table, &cast);
    }
}

/// Returns the source port of an attempt: the tuple's hash, stepped by the golden ratio, scaled to
/// 1024-29999 and 61000-65535.
fn port_of_try<F: Ip>(cast: &Cast, destination: SocketAddr, attempt: u32) -> u16 {
    let tuple = Tuple {
        source: F::of(cast.client.ip()).unwrap_or_default(),
        destination: F::of(destination.ip()).unwrap_or_default(),
        source_port: cast.client.port(),
        destination_port: destination.port(),
        protocol: cast.protocol,
        side: 0,
        reserved: [0; 2],
    };
    let hash = maglev::hash::<F>(&tuple).wrapping_add(attempt.wrapping_mul(0x9e37_79b9));
    let pick = (u64::from(hash) * (28_976 + 4_536)) >> 32;
    if pick < 28_976 { 1_024 + pick as u16 } else { 61_000 + (pick - 28_976) as u16 }
}

/// Returns the client's end as the backend sees it at an attempt.
pub(super) fn tried(cast: &Cast, destination: SocketAddr, attempt: u32) -> SocketAddr {
    let port = if cast.client.is_ipv4() {
        port_of_try::<V4>(cast, destination, attempt)
    } else {
        port_of_try::<V6>(cast, destination, attempt)
    };
    SocketAddr::new(cast.client.ip(), port)
}

/// Returns the flow of this host's own packet, as another client's would be.
pub(super) fn of_host(cast: &Cast, connection: Connection) -> Connection {
    of_host_at(cast, connection, 1)
}

/// Returns the same with the port of an attempt. It never has the socket's own port, which other
/// sockets of this host may have as well.
pub(super) fn of_host_at(cast: &Cast, connection: Connection, attempt: u32) -> Connection {
    let host = cast.client(SocketAddr::new(cast.node, 40_001));
    let seen_as = tried(&host, connection.frontend, attempt);
    Connection { client: host.client, seen_as, flags: flow::HOST | flow::LOCAL, ..connection }
}

/// One client opens to two frontends of one backend.
fn two_frontends(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let one = cast.connection();
    let seen_as = tried(cast, cast.other_frontend, 1);
    let other = cast.other_connection().seen_as(seen_as);
    let first = cast.first(cast.client, cast.other_frontend);
    let changed = first.clone().from(seen_as).to(cast.backend);
    let proven = one.state(state::ESTABLISHED).age(2);
    for (what, world) in [
        ("an unproven flow", cast.world().embryonic(one.both())),
        ("a proven flow", cast.world().flows(proven.both())),
    ] {
        for (program, ifindex) in [(Program::Ingress, EDGE), (Program::Xdp, UPLINK)] {
            let (first, changed) =
                (first.clone().at(mac(ifindex)), changed.clone().at(mac(ifindex)));
            let name = format!(
                "{title}: another frontend of {what}'s backend gets another port, {}",
                program.name()
            );
            let mut after = world.embryonic.clone();
            after.extend(other.both());
            table.add(
                case(name)
                    .world(&world)
                    .at(program, ifindex)
                    .sends(&first)
                    .becomes(&changed)
                    .opens(OTHER)
                    .embryonic([after]),
            );
        }
    }
}

/// Packets and replies of both flows.
fn two_frontends_go_on(table: &mut Table, cast: &Cast) {
    let one = cast.connection();
    let seen_as = tried(cast, cast.other_frontend, 1);
    let other = cast.other_connection().seen_as(seen_as);
    let proven = one.state(state::ESTABLISHED).age(2);
    let other = other.state(state::ESTABLISHED);
    let world = cast.world().flows(proven.both()).flows(other.both());
    for (name, id, to, frontend) in [
        ("the first frontend's reply finds back", ONE, cast.client, cast.frontend),
        ("the second frontend's reply finds back", OTHER, seen_as, cast.other_frontend),
    ] {
        let reply = cast.next(cast.backend, to);
        table.add(
            cast.case(name)
                .world(&world)
                .tc_egress(EDGE)
                .sends(&reply)
                .becomes(&reply.clone().from(frontend).to(cast.client))
                .reply(id),
        );
    }
    let next = cast.next(cast.client, cast.other_frontend);
    table.add(
        cast.case("the next packet to the second frontend keeps its port")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&next)
            .becomes(&next.clone().from(seen_as).to(cast.backend))
            .forward(OTHER),
    );
}

/// The first other port is taken as well.
fn two_ports_taken(table: &mut Table, cast: &Cast) {
    let one = cast.connection();
    let first = cast.first(cast.client, cast.other_frontend);
    let proven = one.state(state::ESTABLISHED).age(2);
    let blocker = Connection {
        client: tried(cast, cast.other_frontend, 1),
        seen_as: tried(cast, cast.other_frontend, 1),
        ..proven
    };
    let seen_as = tried(cast, cast.other_frontend, 2);
    table.add(
        cast.case("the first other port is taken too")
            .world(&cast.world().flows(proven.both()).flows(blocker.both()))
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().from(seen_as).to(cast.backend))
            .opens(OTHER)
            .embryonic([cast.other_connection().seen_as(seen_as).both()]),
    );
}

/// A flow that no longer reserves its reply tuple.
fn taken_over(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.other_frontend);
    let one = cast.connection().state(state::ESTABLISHED);
    let free = match cast.protocol {
        TCP => one.state(state::ESTABLISHED | state::FIN_FORWARD).age(113),
        _ => one.age(200),
    };
    table.add(
        cast.case("a dead flow's reply tuple is taken over")
            .world(&cast.world().flows(free.both()))
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(OTHER)
            .flows([])
            .embryonic([cast.other_connection().both()]),
    );
}

/// Flows that reserve their reply tuple.
fn kept(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.other_frontend);
    let one = cast.connection().state(state::ESTABLISHED);
    let half = one.state(state::ESTABLISHED | state::FIN_FORWARD);
    let seen_as = tried(cast, cast.other_frontend, 1);
    let kept = match cast.protocol {
        TCP => vec![("half closed a while ago", half.age(111)), ("idle", one.age(250))],
        _ => vec![("quiet", one.age(150))],
    };
    for (what, old) in kept {
        table.add(
            cast.case(format!("the reply tuple of a flow that is {what} is not"))
                .world(&cast.world().flows(old.both()))
                .tc_ingress(EDGE)
                .sends(&first)
                .becomes(&first.clone().from(seen_as).to(cast.backend))
                .opens(OTHER)
                .embryonic([cast.other_connection().seen_as(seen_as).both()]),
        );
    }
}

/// The time for which a TCP flow that was not proven, or has ended, reserves its reply tuple.
fn waiting_aside(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.other_frontend);
    let seen_as = tried(cast, cast.other_frontend, 1);
    let new = cast.connection();
    let ended = new.state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY);
    for (what, old, gives_way) in [
        ("ended a minute ago", ended.age(57), true),
        ("ended of late", ended.age(55), false),
        ("nobody answers", new.age(29), true),
        ("nobody answers so far", new.age(27), false),
        ("the backend refused", new.state(state::RESET_REPLY), true),
        ("the client gave up", new.state(state::RESET_FORWARD), false),
    ] {
        let own = cast.other_connection();
        let own = if gives_way { own } else { own.seen_as(seen_as) };
        let case = cast
            .case(format!("the reply tuple of a flow that waits aside, {what}"))
            .world(&cast.world().embryonic(old.both()))
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().from(own.seen_as).to(cast.backend))
            .opens(OTHER);
        table.add(if gives_way {
            case.embryonic([own.both()])
        } else {
            case.embryonic([old.both(), own.both()])
        });
    }
}

/// A TCP flow that has been idle for a day.
fn idle_for_a_day(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.other_frontend);
    let day = cast.connection().state(state::ESTABLISHED).age(80_468);
    table.add(
        cast.case("the reply tuple of a flow that was idle for a day is taken over")
            .world(&cast.world().flows(day.both()))
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(OTHER)
            .flows([])
            .embryonic([cast.other_connection().both()]),
    );
}

/// All ports that are tried before a walk over every port there is, and the first port of the walk
/// if it is requested.
fn walks(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.other_frontend);
    let mut world = cast.world().flows(cast.connection().state(state::ESTABLISHED).both());
    let block = |world: World, seen_as| {
        let blocker = Connection { client: seen_as, seen_as, ..cast.connection() };
        world.flows(blocker.state(state::ESTABLISHED).both())
    };
    for attempt in 1..REMAP_TRIES {
        world = block(world, tried(cast, cast.other_frontend, attempt));
    }
    let begins = tried(cast, cast.other_frontend, 0);
    let mut next = begins;
    next.set_port(begins.port() + 1);
    for (what, world, seen_as) in [
        ("a walk begins where the tuple's hash says", world.clone(), begins),
        ("a walk goes on to the next port", block(world.clone(), begins), next),
    ] {
        table.add(
            cast.case(format!("every port that is tried is taken, {what}"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&first)
                .becomes(&first.clone().from(seen_as).to(cast.backend))
                .opens(OTHER)
                .embryonic([cast.other_connection().seen_as(seen_as).both()]),
        );
    }
    table.add(
        cast.case("every port that is tried is taken, XDP leaves the walk to tc")
            .world(&world)
            .xdp(UPLINK)
            .sends(&first.at(mac(UPLINK))),
    );
}

/// Returns the entries of a direct connection that the backend sees at another port.
fn direct(cast: &Cast, seen_as: SocketAddr) -> Connection {
    Connection {
        frontend: cast.backend,
        seen_as,
        id: 0,
        generation: 0,
        service_port: 0,
        flags: flow::DIRECT,
        ..cast.connection()
    }
}

/// Direct connections whose tuple belongs to a live flow, or was given to another client.
fn direct_beside_live(table: &mut Table, cast: &Cast) {
    let live = cast.connection().state(state::ESTABLISHED);
    let first = cast.first(cast.client, cast.backend);
    let seen_as = tried(cast, cast.backend, 1);
    let direct = direct(cast, seen_as);
    let world = cast.world().flows(live.both());
    table.add(
        cast.case("a direct connection whose tuple is a live flow's gets another port")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().from(seen_as))
            .reason(Reason::DirectRemapped, 0)
            .embryonic([direct.both()])
            .marks(mark::DIRECT),
    );
    let given = Connection {
        client: SocketAddr::new(cast.client.ip(), cast.client.port() + 1),
        seen_as: cast.client,
        ..direct
    };
    table.add(
        cast.case("a direct connection whose port was given to another one gets another port")
            .world(&cast.world().flows(given.state(state::ESTABLISHED).both()).marks(mark::DIRECT))
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().from(seen_as))
            .reason(Reason::DirectRemapped, 0)
            .embryonic([direct.both()]),
    );
}

/// Direct connections whose tuple belongs to a dead flow. They get the tuple, as their own socket
/// holds it.
fn direct_over_dead(table: &mut Table, cast: &Cast) {
    let live = cast.connection().state(state::ESTABLISHED);
    let first = cast.first(cast.client, cast.backend);
    let seen_as = tried(cast, cast.backend, 1);
    let direct = direct(cast, seen_as);
    // The socket that holds the tuple is its own, and an earlier connection's leftover entry does
    // not translate it.
    let mut world = cast.world().flows(live.age(250).state(state::ESTABLISHED).both());
    if cast.protocol == TCP {
        let ended = live.age(57).state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY);
        world = cast.world().embryonic(ended.both());
    }
    world.devices.entry(EDGE).or_default().netns = OWN_NETNS + 1;
    let _ = world.held.insert(tuple(cast.backend, cast.client, cast.protocol));
    let own = Connection { seen_as: cast.client, ..direct };
    table.add(
        cast.case("a direct connection takes the tuple of a dead flow, which its socket has")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first)
            .reason(Reason::DirectRemapped, 0)
            .flows([])
            .embryonic([own.both()])
            .marks(mark::DIRECT),
    );
    if cast.protocol == TCP {
        let ended = direct.state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY).age(3);
        let world = cast.world().embryonic(ended.both()).marks(mark::DIRECT);
        table.add(
            cast.case("a direct connection whose tuple was remapped before, beside nothing")
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&first)
                .becomes(&first)
                .reason(Reason::DirectRemapped, 0)
                .embryonic([own.both()]),
        );
    }
}

/// A remapped direct connection in both directions, until an endpoint itself is the client.
fn direct_goes_on(table: &mut Table, cast: &Cast) {
    let live = cast.connection().state(state::ESTABLISHED);
    let first = cast.first(cast.client, cast.backend);
    let seen_as = tried(cast, cast.backend, 1);
    let direct = direct(cast, seen_as);
    let marked = |world: World| world.marks(mark::DIRECT);
    let world = marked(cast.world().flows(live.both()).embryonic(direct.both()));
    let answer = match cast.protocol {
        TCP => Frame::tcp(cast.backend, seen_as, SYN | ACK, &[]),
        _ => Frame::udp(cast.backend, seen_as, b"answer"),
    };
    let proven = direct.state(state::ESTABLISHED);
    let case = cast
        .case("the reply of a direct connection finds back")
        .world(&world)
        .tc_egress(EDGE)
        .sends(&answer)
        .becomes(&answer.clone().to(cast.client))
        .reason(Reason::DirectRemapped, 0);
    table.add(match cast.protocol {
        UDP => case.embryonic([proven.both()]),
        _ => case.embryonic([direct.answered().both()]),
    });
    let next = cast.next(cast.client, cast.backend);
    let case = cast
        .case("the next packet of a direct connection keeps its port")
        .world(&world)
        .tc_ingress(EDGE)
        .sends(&next)
        .becomes(&next.clone().from(seen_as))
        .reason(Reason::DirectRemapped, 0);
    table.add(case);
    // A client that is an endpoint itself sends to the frontend: the packet leaves with the tuple
    // of its direct connection.
    for marks in [mark::DIRECT, mark::DIRECT | mark::MASQUERADED] {
        let mut world = world.clone().marks(marks);
        *world.listing.entry(cast.client.ip()).or_default() |= listing::BACKEND;
        for (what, frame) in [("the first", &first), ("another", &next)] {
            table.add(
                cast.case(format!(
                    "{what} packet of an endpoint to a frontend, which has a direct \
                     connection from the same port, marks {marks}"
                ))
                .world(&world)
                .tc_egress(EDGE)
                .sends(frame),
            );
        }
    }
}

/// Direct connections next to flows that have ended or that nothing has proven.
fn direct_beside_ended(table: &mut Table, cast: &Cast) {
    let live = cast.connection().state(state::ESTABLISHED);
    let first = cast.first(cast.client, cast.backend);
    let seen_as = tried(cast, cast.backend, 1);
    let direct = direct(cast, seen_as);
    // As long as they exist, the entries of an ended flow translate what the backend sends to its
    // tuple.
    let (ended, own) = match cast.protocol {
        TCP => (live.state(state::ESTABLISHED | state::RESET_FORWARD), direct),
        _ => (live.age(200), Connection { seen_as: cast.client, ..direct }),
    };
    let case = cast
        .case("a direct connection beside a flow that has ended")
        .world(&cast.world().flows(ended.both()))
        .tc_ingress(EDGE)
        .sends(&first)
        .becomes(&first.clone().from(own.seen_as))
        .reason(Reason::DirectRemapped, 0)
        .embryonic([own.both()])
        .marks(mark::DIRECT);
    table.add(if cast.protocol == UDP { case.flows([]) } else { case });
    if cast.protocol == TCP {
        let old = live.state(state::ESTABLISHED | state::RESET_FORWARD).age(113);
        let own = Connection { seen_as: cast.client, ..direct };
        table.add(
            cast.case("a direct connection takes the tuple of a flow that ended long ago")
                .world(&cast.world().flows(old.both()))
                .tc_ingress(EDGE)
                .sends(&first)
                .reason(Reason::DirectRemapped, 0)
                .flows([])
                .embryonic([own.both()])
                .marks(mark::DIRECT),
        );
    }
    let young = cast.connection();
    table.add(
        cast.case("a direct connection beside an unproven flow gets another port")
            .world(&cast.world().embryonic(young.both()))
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().from(seen_as))
            .reason(Reason::DirectRemapped, 0)
            .embryonic([young.both(), direct.both()])
            .marks(mark::DIRECT),
    );
}

/// Direct connections from outside, through a bridge, and in the middle of a connection.
fn direct_elsewhere(table: &mut Table, cast: &Cast) {
    let live = cast.connection().state(state::ESTABLISHED);
    let first = cast.first(cast.client, cast.backend);
    let seen_as = tried(cast, cast.backend, 1);
    let direct = direct(cast, seen_as);
    let next = cast.next(cast.client, cast.backend);
    let outside = first.clone().at(mac(UPLINK));
    table.add(
        cast.case(
            "a direct connection from outside whose tuple is a live flow's gets another port",
        )
        .world(&cast.world().flows(live.both()))
        .tc_ingress(UPLINK)
        .sends(&outside)
        .becomes(&outside.clone().from(seen_as))
        .reason(Reason::DirectRemapped, 0)
        .embryonic([direct.both()])
        .marks(mark::DIRECT),
    );
    let mut pass = |what: &str, world: World, ifindex, frame: Frame| {
        table.add(cast.case(what).world(&world).tc_ingress(ifindex).sends(&frame.at(mac(ifindex))));
    };
    let mut bridge = cast.world().flows(live.both());
    bridge.devices.get_mut(&UPLINK).expect("the uplink").flags |= device_flags::BRIDGE;
    pass("a bridge's own program meets what a port's has translated", bridge, UPLINK, first);
    if cast.protocol != UDP {
        pass(
            "a segment in the middle of a direct connection",
            cast.world().flows(live.both()),
            EDGE,
            next,
        );
    }
}
