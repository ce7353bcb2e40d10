//! Pods' own sockets, which speak to an endpoint without a frontend.

use sluice_common::Reason;
use sluice_common::abi::{Device, Tuple, device_flags};

use super::Table;
use super::clash::tried;
use crate::packets::case::{Case, Program};
use crate::packets::frame::{TCP, UDP};
use crate::packets::world::{Cast, EDGE, ONE, OWN_NETNS, UPLINK, World, mac, tuple};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        ports(table, &cast);
    }
}

/// The world in which something is so of the pod's device.
fn with(cast: &Cast, change: impl FnOnce(&mut Device)) -> World {
    let mut world = cast.world();
    change(world.devices.entry(EDGE).or_default());
    world
}

/// What the pod's socket receives that speaks to the backend from the port of a try; 0: the
/// client's own.
fn socket(cast: &Cast, attempt: u32) -> Tuple<std::net::IpAddr> {
    let at = if attempt == 0 { cast.client } else { tried(cast, cast.frontend, attempt) };
    tuple(cast.backend, at, cast.protocol)
}

fn ports(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let changes = u32::from(cast.protocol != UDP);
    let known = with(cast, |edge| edge.netns = OWN_NETNS + 1);
    let hidden = with(cast, |edge| edge.flags |= device_flags::HIDES_SOCKETS);
    let holding = |attempts: &[u32]| {
        let mut world = known.clone();
        world.held.extend(attempts.iter().map(|attempt| socket(cast, *attempt)));
        world
    };
    for (what, world, attempt) in [
        ("whose sockets are elsewhere", known.clone(), 0),
        ("whose socket speaks to the endpoint", holding(&[0]), 1),
        ("whose sockets speak to the endpoint", holding(&[0, 1, 2]), 3),
        ("with a stack of its own", hidden.clone(), changes),
        ("behind nobody knows what", cast.world(), 0),
    ] {
        let own = cast.connection();
        let seen_as = if attempt == 0 { own.seen_as } else { tried(cast, cast.frontend, attempt) };
        let first = cast.first(cast.client, cast.frontend).at(mac(EDGE));
        table.add(
            Case::new(
                format!("{title}: a pod {what} opens a flow"),
                &world,
                Program::Ingress,
                EDGE,
                &first,
            )
            .becomes(&first.clone().from(seen_as).to(cast.backend))
            .opens(ONE)
            .embryonic([own.seen_as(seen_as).both()]),
        );
    }
    // In the middle of a connection the port is the one that it was opened with.
    if cast.protocol == TCP {
        let opened = cast.connection().seen_as(tried(cast, cast.frontend, 1));
        let data = cast.next(cast.client, cast.frontend).at(mac(EDGE));
        let name =
            format!("{title}: both entries of a pod's flow are lost, which has a stack of its own");
        table.add(
            Case::new(name, &hidden, Program::Ingress, EDGE, &data)
                .becomes(&data.clone().from(opened.seen_as).to(cast.backend))
                .reason(Reason::Recovered, ONE)
                .embryonic([opened.both()]),
        );
    }
    // Elsewhere the namespace says nothing.
    let mut world = holding(&[0]);
    world.devices.entry(UPLINK).or_default().netns = OWN_NETNS + 1;
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    table.add(
        Case::new(
            format!("{title}: a client outside opens a flow"),
            &world,
            Program::Ingress,
            UPLINK,
            &first,
        )
        .becomes(&first.clone().to(cast.backend))
        .opens(ONE)
        .embryonic([cast.connection().both()]),
    );
}
