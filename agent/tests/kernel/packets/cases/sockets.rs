//! Pods' own sockets, which talk to an endpoint without a frontend.

use sluice_common::Reason;
use sluice_common::abi::{Device, Tuple, device_flags, frontend};

use super::Table;
use super::clash::tried;
use super::masquerade::LOCAL;
use crate::packets::case::case;
use crate::packets::frame::{TCP, UDP};
use crate::packets::world::{Cast, EDGE, ONE, OWN_NETNS, UPLINK, World, mac, tuple};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        ports(table, &cast);
        ports_outside(table, &cast);
        endpoint(table, &cast);
    }
}

/// Returns a world with a change of the pod's device.
fn with(cast: &Cast, change: impl FnOnce(&mut Device)) -> World {
    let mut world = cast.world();
    change(world.devices.entry(EDGE).or_default());
    world
}

/// Returns the tuple that the pod's socket receives on if it speaks to the backend from the port of
/// an attempt, or from the client's own port if that is 0.
fn socket(cast: &Cast, attempt: u32) -> Tuple<std::net::IpAddr> {
    let at = if attempt == 0 { cast.client } else { tried(cast, cast.frontend, attempt) };
    tuple(cast.backend, at, cast.protocol)
}

/// A pod's flows do not take the ports of its own sockets.
fn ports(table: &mut Table, cast: &Cast) {
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
            cast.case(format!("a pod {what} opens a flow"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&first)
                .becomes(&first.clone().from(seen_as).to(cast.backend))
                .opens(ONE)
                .embryonic([own.seen_as(seen_as).both()]),
        );
    }
    // In the middle of a connection the port is the one that the connection was opened with.
    if cast.protocol == TCP {
        let opened = cast.connection().seen_as(tried(cast, cast.frontend, 1));
        let data = cast.next(cast.client, cast.frontend).at(mac(EDGE));
        table.add(
            cast.case("both entries of a pod's flow are lost, which has a stack of its own")
                .world(&hidden)
                .tc_ingress(EDGE)
                .sends(&data)
                .becomes(&data.clone().from(opened.seen_as).to(cast.backend))
                .reason(Reason::Recovered, ONE)
                .embryonic([opened.both()]),
        );
    }
}

/// At other devices the namespace does not count.
fn ports_outside(table: &mut Table, cast: &Cast) {
    let known = with(cast, |edge| edge.netns = OWN_NETNS + 1);
    let holding = |attempts: &[u32]| {
        let mut world = known.clone();
        world.held.extend(attempts.iter().map(|attempt| socket(cast, *attempt)));
        world
    };
    // At other devices the namespace does not count.
    let mut world = holding(&[0]);
    world.devices.entry(UPLINK).or_default().netns = OWN_NETNS + 1;
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    table.add(
        cast.case("a client outside opens a flow")
            .world(&world)
            .tc_ingress(UPLINK)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );
}

/// A client that is no pod of this node, whose direct connections only the endpoint knows.
fn endpoint(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    let (cast, world) = LOCAL.set(cast);
    let world = world.kind(ONE, frontend::LOAD_BALANCER);
    let mut knows = world.clone();
    knows.devices.entry(EDGE).or_default().netns = OWN_NETNS + 1;
    let first = cast.first(cast.client, cast.frontend).at(mac(UPLINK));
    for (what, world, held, attempt) in [
        ("speaks to", &knows, 1, 1),
        ("speaks to from several ports", &knows, 3, 3),
        ("speaks to, which nobody can ask,", &world, 1, 0),
        ("does not know", &knows, 0, 0),
    ] {
        let mut world = world.clone();
        // The other end of the same tuple is nobody's here.
        world.held.extend([tuple(cast.backend, cast.client, cast.protocol)]);
        world.held.extend((0..held).map(|attempt| socket(&cast, attempt).reversed()));
        let own = LOCAL.kept(&cast);
        // A server may have connected its UDP socket to the client, so that it is the flow's own.
        let attempt = if cast.protocol == TCP { attempt } else { 0 };
        let seen_as = if attempt == 0 { own.seen_as } else { tried(&cast, cast.frontend, attempt) };
        let opened = own.seen_as(seen_as);
        let name = format!("{title}: a client outside that an endpoint {what} opens a flow");
        table.add(
            case(name.clone())
                .world(&world)
                .tc_ingress(UPLINK)
                .sends(&first)
                .becomes(&first.clone().from(seen_as).to(cast.backend))
                .opens(ONE)
                .embryonic([opened.both()]),
        );
        let case = case(format!("{name} by XDP")).world(&world).xdp(UPLINK).sends(&first);
        // XDP leaves to tc a packet that gets another port.
        table.add(if attempt == 0 {
            case.becomes(&first.clone().to(cast.backend)).opens(ONE).embryonic([own.both()])
        } else {
            case
        });
    }
    // In the middle of a connection the endpoint's socket is the flow's own.
    if cast.protocol == TCP {
        let mut world = knows.clone();
        world.held.extend([socket(&cast, 0).reversed()]);
        let data = cast.next(cast.client, cast.frontend).at(mac(UPLINK));
        table.add(
            cast.case("both entries of a flow from outside are lost")
                .world(&world)
                .tc_ingress(UPLINK)
                .sends(&data)
                .becomes(&data.clone().to(cast.backend))
                .reason(Reason::Recovered, ONE)
                .embryonic([LOCAL.kept(&cast).both()]),
        );
    }
}
