//! Reply tuples that are taken.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{Tuple, device_flags, flow, listing, state};
use sluice_common::maglev;
use sluice_common::path::{REMAP_TRIES, mark};
use sluice_common::{V4, V6};

use super::Table;
use crate::packets::case::{Case, Program};
use crate::packets::frame::{ACK, Frame, SYN, TCP, UDP};
use crate::packets::ip::Ip;
use crate::packets::world::{
    Cast, Connection, EDGE, ONE, OTHER, OWN_NETNS, UPLINK, World, mac, tuple,
};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        two_frontends(table, &cast);
        taken_over(table, &cast);
        walks(table, &cast);
        direct(table, &cast);
    }
}

/// The source port of a try: the tuple's hash, stepped by the golden ratio, scaled to 1024-29999
/// and 61000-65535.
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

/// The client's end as the backend sees it at a try.
pub(super) fn tried(cast: &Cast, destination: SocketAddr, attempt: u32) -> SocketAddr {
    let port = if cast.client.is_ipv4() {
        port_of_try::<V4>(cast, destination, attempt)
    } else {
        port_of_try::<V6>(cast, destination, attempt)
    };
    SocketAddr::new(cast.client.ip(), port)
}

/// The flow of a packet of this host's own, as another client's would be.
pub(super) fn of_host(cast: &Cast, connection: Connection) -> Connection {
    of_host_at(cast, connection, 1)
}

/// The same, with the port of a try: never the socket's own, which other sockets of this host may
/// have as well.
pub(super) fn of_host_at(cast: &Cast, connection: Connection, attempt: u32) -> Connection {
    let host = cast.client(SocketAddr::new(cast.node, 40_001));
    let seen_as = tried(&host, connection.frontend, attempt);
    Connection { client: host.client, seen_as, flags: flow::HOST | flow::LOCAL, ..connection }
}

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
                Case::new(name, &world, program, ifindex, &first)
                    .becomes(&changed)
                    .opens(OTHER)
                    .embryonic([after]),
            );
        }
    }
    let other = other.state(state::ESTABLISHED);
    let world = cast.world().flows(proven.both()).flows(other.both());
    for (name, id, to, frontend) in [
        ("the first frontend's reply finds back", ONE, cast.client, cast.frontend),
        ("the second frontend's reply finds back", OTHER, seen_as, cast.other_frontend),
    ] {
        let reply = cast.next(cast.backend, to);
        table.add(
            Case::new(format!("{title}: {name}"), &world, Program::Egress, EDGE, &reply)
                .becomes(&reply.clone().from(frontend).to(cast.client))
                .reply(id),
        );
    }
    let next = cast.next(cast.client, cast.other_frontend);
    table.add(
        Case::new(
            format!("{title}: the next packet to the second frontend keeps its port"),
            &world,
            Program::Ingress,
            EDGE,
            &next,
        )
        .becomes(&next.clone().from(seen_as).to(cast.backend))
        .forward(OTHER),
    );
    let blocker = Connection {
        client: tried(cast, cast.other_frontend, 1),
        seen_as: tried(cast, cast.other_frontend, 1),
        ..proven
    };
    let seen_as = tried(cast, cast.other_frontend, 2);
    table.add(
        Case::new(
            format!("{title}: the first other port is taken too"),
            &cast.world().flows(proven.both()).flows(blocker.both()),
            Program::Ingress,
            EDGE,
            &first,
        )
        .becomes(&first.clone().from(seen_as).to(cast.backend))
        .opens(OTHER)
        .embryonic([cast.other_connection().seen_as(seen_as).both()]),
    );
}

/// Flows that no longer keep their reply tuple, and some that do.
fn taken_over(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let first = cast.first(cast.client, cast.other_frontend);
    let one = cast.connection().state(state::ESTABLISHED);
    let (free, kept) = match cast.protocol {
        TCP => {
            let half = one.state(state::ESTABLISHED | state::FIN_FORWARD);
            (
                half.age(113),
                vec![("half closed a while ago", half.age(111)), ("idle", one.age(250))],
            )
        }
        _ => (one.age(200), vec![("quiet", one.age(150))]),
    };
    table.add(
        Case::new(
            format!("{title}: a dead flow's reply tuple is taken over"),
            &cast.world().flows(free.both()),
            Program::Ingress,
            EDGE,
            &first,
        )
        .becomes(&first.clone().to(cast.backend))
        .opens(OTHER)
        .flows([])
        .embryonic([cast.other_connection().both()]),
    );
    let seen_as = tried(cast, cast.other_frontend, 1);
    if cast.protocol == TCP {
        let new = cast.connection();
        let ended = one.state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY);
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
            let name = format!("{title}: the reply tuple of a flow that waits aside, {what}");
            let case = Case::new(
                name,
                &cast.world().embryonic(old.both()),
                Program::Ingress,
                EDGE,
                &first,
            )
            .becomes(&first.clone().from(own.seen_as).to(cast.backend))
            .opens(OTHER);
            table.add(if gives_way {
                case.embryonic([own.both()])
            } else {
                case.embryonic([old.both(), own.both()])
            });
        }
        let day = one.age(80_468);
        let name =
            format!("{title}: the reply tuple of a flow that was idle for a day is taken over");
        table.add(
            Case::new(name, &cast.world().flows(day.both()), Program::Ingress, EDGE, &first)
                .becomes(&first.clone().to(cast.backend))
                .opens(OTHER)
                .flows([])
                .embryonic([cast.other_connection().both()]),
        );
    }
    for (what, old) in kept {
        table.add(
            Case::new(
                format!("{title}: the reply tuple of a flow that is {what} is not"),
                &cast.world().flows(old.both()),
                Program::Ingress,
                EDGE,
                &first,
            )
            .becomes(&first.clone().from(seen_as).to(cast.backend))
            .opens(OTHER)
            .embryonic([cast.other_connection().seen_as(seen_as).both()]),
        );
    }
}

/// All ports that are tried before a walk over every port there is, and the walk's own first port
/// on demand.
fn walks(table: &mut Table, cast: &Cast) {
    let title = cast.title();
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
        let name = format!("{title}: every port that is tried is taken, {what}");
        table.add(
            Case::new(name, &world, Program::Ingress, EDGE, &first)
                .becomes(&first.clone().from(seen_as).to(cast.backend))
                .opens(OTHER)
                .embryonic([cast.other_connection().seen_as(seen_as).both()]),
        );
    }
    let name = format!("{title}: every port that is tried is taken, XDP leaves the walk to tc");
    table.add(Case::new(name, &world, Program::Xdp, UPLINK, &first.at(mac(UPLINK))));
}

fn direct(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let live = cast.connection().state(state::ESTABLISHED);
    let first = cast.first(cast.client, cast.backend);
    let seen_as = tried(cast, cast.backend, 1);
    let direct = Connection {
        frontend: cast.backend,
        seen_as,
        id: 0,
        generation: 0,
        service_port: 0,
        flags: flow::DIRECT,
        ..cast.connection()
    };
    let world = cast.world().flows(live.both());
    table.add(
        Case::new(
            format!("{title}: a direct connection whose tuple is a live flow's gets another port"),
            &world,
            Program::Ingress,
            EDGE,
            &first,
        )
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
        Case::new(
            format!(
                "{title}: a direct connection whose port was given to another one gets another port"
            ),
            &cast.world().flows(given.state(state::ESTABLISHED).both()).marks(mark::DIRECT),
            Program::Ingress,
            EDGE,
            &first,
        )
        .becomes(&first.clone().from(seen_as))
        .reason(Reason::DirectRemapped, 0)
        .embryonic([direct.both()]),
    );
    // Its own socket is no other's, and what an earlier connection left does not translate it.
    let mut world = cast.world().flows(live.age(250).state(state::ESTABLISHED).both());
    if cast.protocol == TCP {
        let ended = live.age(57).state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY);
        world = cast.world().embryonic(ended.both());
    }
    world.devices.entry(EDGE).or_default().netns = OWN_NETNS + 1;
    let _ = world.held.insert(tuple(cast.backend, cast.client, cast.protocol));
    let own = Connection { seen_as: cast.client, ..direct };
    let name = format!(
        "{title}: a direct connection takes the tuple of a dead flow, which its socket has"
    );
    table.add(
        Case::new(name, &world, Program::Ingress, EDGE, &first)
            .becomes(&first)
            .reason(Reason::DirectRemapped, 0)
            .flows([])
            .embryonic([own.both()])
            .marks(mark::DIRECT),
    );
    if cast.protocol == TCP {
        let ended = direct.state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY).age(3);
        let world = cast.world().embryonic(ended.both()).marks(mark::DIRECT);
        let name =
            format!("{title}: a direct connection whose tuple was remapped before, beside nothing");
        table.add(
            Case::new(name, &world, Program::Ingress, EDGE, &first)
                .becomes(&first)
                .reason(Reason::DirectRemapped, 0)
                .embryonic([own.both()]),
        );
    }
    let marked = |world: World| world.marks(mark::DIRECT);
    let world = marked(cast.world().flows(live.both()).embryonic(direct.both()));
    let answer = match cast.protocol {
        TCP => Frame::tcp(cast.backend, seen_as, SYN | ACK, &[]),
        _ => Frame::udp(cast.backend, seen_as, b"answer"),
    };
    let proven = direct.state(state::ESTABLISHED);
    let case = Case::new(
        format!("{title}: the reply of a direct connection finds back"),
        &world,
        Program::Egress,
        EDGE,
        &answer,
    )
    .becomes(&answer.clone().to(cast.client))
    .reason(Reason::DirectRemapped, 0);
    table.add(match cast.protocol {
        UDP => case.embryonic([proven.both()]),
        _ => case.embryonic([direct.answered().both()]),
    });
    let next = cast.next(cast.client, cast.backend);
    let case = Case::new(
        format!("{title}: the next packet of a direct connection keeps its port"),
        &world,
        Program::Ingress,
        EDGE,
        &next,
    )
    .becomes(&next.clone().from(seen_as))
    .reason(Reason::DirectRemapped, 0);
    table.add(case);

    // What a client that is an endpoint itself says to the frontend leaves with the tuple that its
    // direct connection came in with.
    for marks in [mark::DIRECT, mark::DIRECT | mark::MASQUERADED] {
        let mut world = world.clone().marks(marks);
        *world.listing.entry(cast.client.ip()).or_default() |= listing::BACKEND;
        for (what, frame) in [("the first", &first), ("another", &next)] {
            table.add(Case::new(
                format!(
                    "{title}: {what} packet of an endpoint to a frontend, which has a direct \
                     connection from the same port, marks {marks}"
                ),
                &world,
                Program::Egress,
                EDGE,
                frame,
            ));
        }
    }

    // The entries of a flow that has ended translate what the backend sends to its tuple as long as
    // they are there.
    let (ended, own) = match cast.protocol {
        TCP => (live.state(state::ESTABLISHED | state::RESET_FORWARD), direct),
        _ => (live.age(200), Connection { seen_as: cast.client, ..direct }),
    };
    let case = Case::new(
        format!("{title}: a direct connection beside a flow that has ended"),
        &cast.world().flows(ended.both()),
        Program::Ingress,
        EDGE,
        &first,
    )
    .becomes(&first.clone().from(own.seen_as))
    .reason(Reason::DirectRemapped, 0)
    .embryonic([own.both()])
    .marks(mark::DIRECT);
    table.add(if cast.protocol == UDP { case.flows([]) } else { case });

    if cast.protocol == TCP {
        let old = live.state(state::ESTABLISHED | state::RESET_FORWARD).age(113);
        let own = Connection { seen_as: cast.client, ..direct };
        table.add(
            Case::new(
                format!(
                    "{title}: a direct connection takes the tuple of a flow that ended long ago"
                ),
                &cast.world().flows(old.both()),
                Program::Ingress,
                EDGE,
                &first,
            )
            .reason(Reason::DirectRemapped, 0)
            .flows([])
            .embryonic([own.both()])
            .marks(mark::DIRECT),
        );
    }

    let young = cast.connection();
    table.add(
        Case::new(
            format!("{title}: a direct connection beside an unproven flow gets another port"),
            &cast.world().embryonic(young.both()),
            Program::Ingress,
            EDGE,
            &first,
        )
        .becomes(&first.clone().from(seen_as))
        .reason(Reason::DirectRemapped, 0)
        .embryonic([young.both(), direct.both()])
        .marks(mark::DIRECT),
    );
    let outside = first.clone().at(mac(UPLINK));
    table.add(
        Case::new(
            format!(
                "{title}: a direct connection from outside whose tuple is a live flow's gets another port"
            ),
            &cast.world().flows(live.both()),
            Program::Ingress,
            UPLINK,
            &outside,
        )
        .becomes(&outside.clone().from(seen_as))
        .reason(Reason::DirectRemapped, 0)
        .embryonic([direct.both()])
        .marks(mark::DIRECT),
    );

    let mut pass = |what: &str, world: World, ifindex, frame: Frame| {
        table.add(Case::new(
            format!("{title}: {what}"),
            &world,
            Program::Ingress,
            ifindex,
            &frame.at(mac(ifindex)),
        ));
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
