//! Keeps a survey of the devices up to date.
//!
//! Events only indicate that something changed; the state is queried anew each time. A lost event
//! or a full socket buffer therefore causes a delay, never a wrong result.

#![expect(clippy::wildcard_enum_match_arm, reason = "netlink has far more attributes than we read")]

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection,
};
use tokio::sync::watch;

use super::{Facts, Link, LinkAddress, Peer, Role, Rules, Survey, survey};
use crate::node::publish::publish;

/// The time for which further events are gathered before netlink is queried.
const GATHER: Duration = Duration::from_millis(2);
/// The interval at which netlink is queried without an event, in case one was lost.
const RESYNC: Duration = Duration::from_secs(30);
/// Number of the main routing table.
const MAIN: u32 = 254;

/// A survey, with counters of other changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    /// The devices and addresses.
    pub survey: Survey,
    /// The rules by which they were surveyed.
    pub rules: Rules,
    /// The number of changes of routes.
    pub routes: u64,
    /// The number of changes of classifiers, including foreign ones.
    pub classifiers: u64,
}

/// The kinds of events that have arrived.
#[derive(Clone, Copy, Debug, Default)]
struct Changed {
    routes: bool,
    classifiers: bool,
}

impl Changed {
    fn note(&mut self, message: &NetlinkPayload<RouteNetlinkMessage>) {
        if let NetlinkPayload::InnerMessage(message) = message {
            self.routes |= matches!(
                message,
                RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_)
            );
            self.classifiers |= matches!(
                message,
                RouteNetlinkMessage::NewTrafficFilter(_) | RouteNetlinkMessage::DelTrafficFilter(_)
            );
        }
    }
}

/// Watches the devices of the current network namespace until the receivers or the sender of the
/// rules are gone.
///
/// # Errors
///
/// Fails if netlink cannot be used.
pub async fn watch(
    mut rules: watch::Receiver<Rules>,
    sender: watch::Sender<Watched>,
) -> io::Result<()> {
    let (connection, handle, _messages) = new_connection()?;
    let _requests = tokio::spawn(connection);
    let (connection, _, mut events) = new_multicast_connection(&[
        MulticastGroup::Link,
        MulticastGroup::Tc,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ])?;
    let _listening = tokio::spawn(connection);
    let mut default_routes = None;
    let mut changed = Changed::default();
    while !sender.is_closed() {
        if changed.routes || default_routes.is_none() {
            default_routes = Some(ask_default_routes(&handle).await.map_err(io::Error::other)?);
        }
        let mut facts = ask(&handle, default_routes.clone().unwrap_or_default())
            .await
            .map_err(io::Error::other)?;
        // The kernel removes the routes of a device that goes down without sending events.
        let is_up = |device: &u32| facts.links.get(device).is_some_and(|link| link.up);
        if !facts.default_routes.iter().all(is_up) {
            facts.default_routes = ask_default_routes(&handle).await.map_err(io::Error::other)?;
            default_routes = Some(facts.default_routes.clone());
            changed.routes = true;
        }
        let by = rules.borrow_and_update().clone();
        let found = survey(&facts, &by, &sender.borrow().survey);
        changed.routes |= has_own(&found) != has_own(&sender.borrow().survey);
        let Watched { routes, classifiers, .. } = *sender.borrow();
        let _ = publish(
            &sender,
            Watched {
                survey: found,
                rules: by,
                routes: routes + u64::from(changed.routes),
                classifiers: classifiers + u64::from(changed.classifiers),
            },
        );
        changed = Changed::default();
        tokio::select! {
            event = events.next() => match event {
                Some((message, _)) => changed.note(&message.payload),
                None => return Err(io::Error::other("the netlink socket was closed")),
            },
            ruled = rules.changed() => if ruled.is_err() { return Ok(()) },
            () = tokio::time::sleep(RESYNC) => default_routes = None,
        }
        tokio::time::sleep(GATHER).await;
        while let Ok((message, _)) = events.try_recv() {
            changed.note(&message.payload);
        }
    }
    Ok(())
}

/// Queries netlink once about the current network namespace.
///
/// # Errors
///
/// Fails if netlink cannot be used.
pub async fn look() -> io::Result<Facts> {
    let (connection, handle, _messages) = new_connection()?;
    let _requests = tokio::spawn(connection);
    let default_routes = ask_default_routes(&handle).await.map_err(io::Error::other)?;
    ask(&handle, default_routes).await.map_err(io::Error::other)
}

/// Whether our own device exists.
fn has_own(survey: &Survey) -> bool {
    survey.devices.values().any(|device| device.role == Role::Own)
}

async fn ask(handle: &Handle, default_routes: BTreeSet<u32>) -> Result<Facts, rtnetlink::Error> {
    let mut facts = Facts { default_routes, ..Facts::default() };
    let mut links = handle.link().get().execute();
    while let Some(message) = links.try_next().await? {
        let link = link(message);
        let _ = facts.links.insert(link.index, link);
    }
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses.try_next().await? {
        facts.addresses.entry(message.header.index).or_default().extend(address(&message));
    }
    Ok(facts)
}

/// Reads what we need of an address.
fn address(message: &AddressMessage) -> Option<LinkAddress> {
    // On a link with a peer, "local" is ours and "address" the peer's.
    let mut local = None;
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(found) => local = Some(*found),
            AddressAttribute::Address(found) => address = Some(*found),
            _ => {}
        }
    }
    let has = |flags| message.header.flags.intersects(flags);
    Some(LinkAddress {
        address: local.or(address)?,
        prefix: message.header.prefix_len,
        scope: message.header.scope.into(),
        secondary: has(AddressHeaderFlags::Secondary),
        deprecated: has(AddressHeaderFlags::Deprecated),
        unusable: has(AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed),
    })
}

/// Reads what we need of a link.
fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        layer: message.header.link_layer_type.into(),
        up: message.header.flags.contains(LinkFlags::Up),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        ..Link::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(master) => link.master = master,
            LinkAttribute::Link(lower) => link.lower = lower,
            LinkAttribute::LinkNetNsId(id) => {
                // Negative where the kernel has none to give.
                link.peer = Some(u32::try_from(id).map_or(Peer::Unknown, Peer::Known));
            }
            LinkAttribute::Address(address) => link.mac = address.try_into().unwrap_or_default(),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    link
}

async fn ask_default_routes(handle: &Handle) -> Result<BTreeSet<u32>, rtnetlink::Error> {
    let mut devices = BTreeSet::new();
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for question in [v4, v6] {
        let mut routes = handle.route().get(question).execute();
        while let Some(route) = routes.try_next().await? {
            devices.extend(default_route_devices(&route));
        }
    }
    Ok(devices)
}

/// The devices that a route leaves by, if it is a default route of the main table.
fn default_route_devices(route: &RouteMessage) -> Vec<u32> {
    let mut table = u32::from(route.header.table);
    let mut devices = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(device) => devices.push(*device),
            RouteAttribute::MultiPath(hops) => {
                devices.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    let is_default =
        route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast;
    if is_default && table == MAIN { devices } else { Vec::new() }
}
