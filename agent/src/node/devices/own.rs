//! Maintains our own device, with routes for VIPs.
//!
//! If a process of the host sends to a VIP by a path that no socket hook sees (connected UDP, raw
//! and kernel sockets), it needs a route before any device can translate the packet. It must not
//! matter where that route leads: if it led to a device without programs, or to a neighbour that
//! does not answer, no program would ever see the packet. So ClusterIPs are routed by a device of
//! our own, and other VIPs if no other route leads there (the module `wanted` decides). The device
//! is a dummy, or an ifb if the kernel has no dummies: both resolve no neighbours, and drop what
//! they send. The egress program translates and redirects before that.
//!
//! Packets of masqueraded clients that are too big for the route to the backend and may be
//! fragmented also enter the stack here, since no program can fragment them. This device alone
//! accepts the node's own addresses as sources.
//!
//! The listing of routes that all this needs also yields their MTUs (the module `mtus`).

#![expect(clippy::wildcard_enum_match_arm, reason = "netlink has far more attributes than we read")]

mod mtus;
mod wanted;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::link::LinkFlags;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType, RouteVia,
};
use rtnetlink::{Handle, LinkDummy, LinkIfb, LinkUnspec, RouteMessageBuilder, new_connection};

use sluice_common::abi::RouteMtu;

use super::addresses::PerFamily;
use super::route::route_to;
use super::{OWN, Survey};
pub use wanted::Vips;
use wanted::{Hop, Others, wanted};

/// Number of the main routing table.
const MAIN: u32 = 254;
/// The settings of our device: it accepts packets from the node's own addresses.
const OWN_SETTINGS: [(&str, &str); 2] = [("accept_local", "1"), ("rp_filter", "0")];
/// The initial MTU of our device.
const OWN_MTU: u32 = 1500;
/// Errors for routes that we may not add. All but the first occur if IPv6 is disabled.
const NOT_OURS: [i32; 4] = [libc::EEXIST, libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::EACCES];
/// The protocol of our routes, by which people can list them (`ip route show proto 83`).
const PROTOCOL: u8 = 83;

/// The VIPs to be routed, with the networks of ClusterIPs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routable {
    /// The VIPs.
    pub vips: Arc<Vips>,
    /// The known networks of ClusterIPs.
    pub networks: Vec<IpNet>,
}

/// The parts of a survey that affect our routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The node's primary addresses, which processes of the host use towards VIPs.
    pub primary: PerFamily,
    /// The MTU of the device by which such packets leave; 0 if unknown.
    pub mtu: u32,
    /// Devices that drop whatever they send.
    pub dead_ends: BTreeSet<u32>,
}

impl Place {
    /// Takes these parts from a survey.
    #[must_use]
    pub fn of(survey: &Survey) -> Self {
        let has_primary = |entry: &sluice_common::abi::Device| {
            let own = [
                Ipv4Addr::from(entry.masquerade_v4).into(),
                Ipv6Addr::from(entry.masquerade_v6).into(),
            ];
            own.iter().any(|address| survey.primary.contains(*address))
        };
        let uplinks = survey.devices.values().filter(|device| device.role == super::Role::Uplink);
        let mtu =
            uplinks.map(|device| device.entry).filter(has_primary).map(|entry| entry.mtu).min();
        Self {
            primary: survey.primary,
            mtu: mtu.unwrap_or_default(),
            dead_ends: survey.dead_ends.clone(),
        }
    }
}

/// The attributes of our routes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct How {
    source: Option<IpAddr>,
    mtu: Option<u32>,
}

/// Maintains the routes of our own device.
#[derive(Debug)]
pub struct OwnRoutes {
    handle: Handle,
    /// Our routes.
    routed: BTreeMap<IpNet, How>,
    /// Our routes that the last listing did not find any more.
    lost: BTreeMap<IpNet, How>,
    /// Those of them that were still wanted.
    drifted: Vec<IpNet>,
    /// All other routes that concern VIPs.
    others: Others,
    /// The VIPs that [`Self::others`] is about; [`None`] if routes have changed since.
    known: Option<Routable>,
    /// The MTUs of routes, as programs need them.
    mtus: BTreeMap<IpNet, RouteMtu>,
    /// Networks to which there is the same foreign route, or a route in another table.
    elsewhere: BTreeSet<IpNet>,
    /// Neighbours that were unresolved at the last look.
    unanswered: BTreeSet<(u32, IpAddr)>,
}

/// Builds the route to a network by our device. To remove it, the kernel needs the same protocol
/// and scope.
fn own_route(network: IpNet, device: u32, how: How) -> RouteMessage {
    let scope = if network.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    // The length fits the family: this cannot be refused.
    let route = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(network.network(), network.prefix_len())
        .unwrap_or_default()
        .output_interface(device)
        .protocol(RouteProtocol::from(PROTOCOL))
        .scope(scope);
    let mut route = match how.source.map(|source| route.clone().pref_source(source)) {
        Some(Ok(route)) => route,
        Some(Err(_)) | None => route,
    }
    .build();
    route
        .attributes
        .extend(how.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    route
}

impl OwnRoutes {
    /// Opens netlink.
    ///
    /// # Errors
    ///
    /// Fails if netlink cannot be used.
    pub fn new() -> io::Result<Self> {
        let (connection, handle, _messages) = new_connection()?;
        let _requests = tokio::spawn(connection);
        Ok(Self {
            handle,
            routed: BTreeMap::new(),
            lost: BTreeMap::new(),
            drifted: Vec::new(),
            others: Others::default(),
            known: None,
            mtus: BTreeMap::new(),
            elsewhere: BTreeSet::new(),
            unanswered: BTreeSet::new(),
        })
    }

    /// Returns our own device's ifindex, if it exists.
    async fn device(&self) -> Option<u32> {
        let mut links = self.handle.link().get().match_name(OWN).execute();
        links.try_next().await.ok().flatten().map(|link| link.header.index)
    }

    /// Notes that routes have changed, so that the next call of [`Self::keep`] lists all of them.
    pub fn routes_changed(&mut self) {
        self.known = None;
    }

    /// Returns the MTUs of routes of the main table, as programs need them, or [`None`] if routes
    /// have changed since the last listing.
    #[must_use]
    pub fn mtus(&self) -> Option<&BTreeMap<IpNet, RouteMtu>> {
        self.known.as_ref().map(|_| &self.mtus)
    }

    /// Lists all routes, including those that an earlier agent has left.
    async fn look(&mut self, routable: &Routable, place: &Place) -> Result<(), rtnetlink::Error> {
        let device = self.device().await;
        let mut others =
            Others::new(place.dead_ends.clone(), std::mem::take(&mut self.others.silent));
        let mut mtus = mtus::Routes::default();
        let before = std::mem::take(&mut self.routed);
        self.elsewhere.clear();
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        for question in [v4, v6] {
            let is_ipv4 =
                question.header.address_family == rtnetlink::packet_route::AddressFamily::Inet;
            let mut routes = self.handle.route().get(question).execute();
            while let Some(route) = routes.try_next().await? {
                let Some(found) = Found::read(&route, is_ipv4) else { continue };
                let hops = &found.hops;
                if found.is_marked
                    && device.is_some_and(|own| hops.iter().any(|hop| hop.device == own))
                {
                    let _ = self.routed.insert(found.to, found.how);
                    continue;
                }
                if let Some((to, route)) = found.mtu(&route) {
                    mtus.add(to, found.metric, route);
                }
                if route.header.kind == RouteType::Local {
                    let is_primary =
                        place.primary.iter().any(|primary| found.to.contains(&primary));
                    if is_primary || routable.vips.touch(&found.to) {
                        others.add_local(found.to);
                    }
                } else if found.table == MAIN && routable.vips.touch(&found.to) {
                    let leads = route.header.kind == RouteType::Unicast;
                    others.add(found.to, found.metric, if leads { found.hops } else { Vec::new() });
                }
            }
        }
        self.lost = before;
        self.lost.retain(|network, how| self.routed.get(network) != Some(how));
        self.others = others;
        self.mtus = mtus.for_programs();
        self.known = Some(routable.clone());
        Ok(())
    }

    /// Gives our own device exactly the routes that VIPs need.
    ///
    /// # Errors
    ///
    /// Fails if netlink refuses the device or a route; calling again continues.
    pub async fn keep(&mut self, routable: &Routable, place: &Place) -> io::Result<()> {
        if self.known.as_ref() != Some(routable) {
            self.look(routable, place).await.map_err(io::Error::other)?;
        }
        let wanted = wanted(&routable.vips, &routable.networks, &self.others);
        let missing: Vec<(IpNet, How)> = wanted
            .iter()
            .filter(|network| !self.elsewhere.contains(network))
            .map(|network| (*network, self.how(*network, place)))
            .filter(|(network, how)| self.routed.get(network) != Some(how))
            .collect();
        let gone: Vec<IpNet> =
            self.routed.keys().filter(|network| !wanted.contains(network)).copied().collect();
        let lost = std::mem::take(&mut self.lost);
        if missing.is_empty() && gone.is_empty() {
            return Ok(());
        }
        let is_lost = |(network, how): &&(IpNet, How)| lost.get(network) == Some(how);
        self.drifted = missing.iter().filter(is_lost).map(|(network, _)| *network).collect();
        let device = self.create().await?;
        // New routes come first, so that no VIP is without a route meanwhile.
        for (network, how) in missing {
            self.add(network, device, how).await?;
        }
        // What somebody else has routed meanwhile is theirs.
        self.drifted.retain(|network| self.routed.contains_key(network));
        for network in gone {
            let how = self.routed.remove(&network).unwrap_or_default();
            // It is no error if the route is already gone.
            let _ = self.handle.route().del(own_route(network, device, how)).execute().await;
        }
        Ok(())
    }

    /// Returns the attributes of a route to a network, with the node's address as the source if
    /// there is one.
    fn how(&self, network: IpNet, place: &Place) -> How {
        let is_ipv4 = network.addr().is_ipv4();
        let mut sources = place.primary.iter().filter(|source| source.is_ipv4() == is_ipv4);
        How {
            source: sources.next().filter(|source| self.others.is_local(*source)),
            mtu: (place.mtu != 0 && place.mtu != OWN_MTU).then_some(place.mtu),
        }
    }

    /// Adds or changes one of our routes, unless there is a foreign one.
    async fn add(&mut self, network: IpNet, device: u32, how: How) -> io::Result<()> {
        let is_ours = self.routed.contains_key(&network);
        let vip = network.addr();
        // A route in another table may lead to another machine with the VIP.
        if !is_ours
            && self.known.as_ref().is_some_and(|known| !known.vips.cluster.contains(&vip))
            && network == IpNet::from(vip)
            && !self.others.has_route(vip)
            && route_to(&self.handle, vip).await.is_some_and(|leaves_by| leaves_by != device)
        {
            let _ = self.elsewhere.insert(network);
            return Ok(());
        }
        let request = self.handle.route().add(own_route(network, device, how));
        let request = if is_ours { request.replace() } else { request };
        match request.execute().await {
            Ok(()) => {
                let _ = self.routed.insert(network, how);
                Ok(())
            }
            // There is the same foreign route, or this host does not use the family.
            Err(rtnetlink::Error::NetlinkError(error)) if NOT_OURS.contains(&-error.raw_code()) => {
                tracing::debug!("no route to {network} by {OWN}: {error}");
                let _ = self.elsewhere.insert(network);
                Ok(())
            }
            Err(error) => Err(io::Error::other(format!("{network}: {error}"))),
        }
    }

    /// Checks the neighbours that packets to external VIPs wait for, and probes the silent ones,
    /// which nothing else does while our route is there.
    ///
    /// # Errors
    ///
    /// Fails if netlink refuses.
    pub async fn probe_neighbours(&mut self) -> io::Result<()> {
        let Some(known) = &self.known else { return Ok(()) };
        let awaited = self.others.awaited(&known.vips);
        let (mut silent, mut unanswered) = (BTreeSet::new(), BTreeSet::new());
        if !awaited.is_empty() {
            let mut neighbours = self.handle.neighbours().get().execute();
            while let Some(message) = neighbours.try_next().await.map_err(io::Error::other)? {
                let address = message.attributes.iter().find_map(|attribute| match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                        Some(IpAddr::V4(*address))
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                        Some(IpAddr::V6(*address))
                    }
                    _ => None,
                });
                let Some(address) = address else { continue };
                let neighbour = (message.header.ifindex, address);
                let is_silent = match message.header.state {
                    NeighbourState::Failed => true,
                    // A neighbour that answers does so within milliseconds. A silent one is probed
                    // repeatedly.
                    NeighbourState::Incomplete => {
                        let _ = unanswered.insert(neighbour);
                        self.others.silent.contains(&neighbour)
                            || self.unanswered.contains(&neighbour)
                    }
                    _ => false,
                };
                if is_silent && awaited.contains(&neighbour) {
                    let _ = silent.insert(neighbour);
                }
            }
        }
        for (device, address) in &silent {
            let ask = self.handle.neighbours().add(*device, *address).flags(NeighbourFlags::Use);
            let ask = ask.state(NeighbourState::None).replace();
            if let Err(error) = ask.execute().await {
                tracing::debug!("cannot ask for the neighbour {address}: {error}");
            }
        }
        self.others.silent = silent;
        self.unanswered = unanswered;
        Ok(())
    }

    /// Returns the networks whose routes the last call of [`Self::keep`] found gone although they
    /// were wanted, whether it could add them or not.
    pub fn take_lost(&mut self) -> Vec<IpNet> {
        std::mem::take(&mut self.drifted)
    }

    /// Sets our own device up, and its settings, where they have changed. Returns what was found,
    /// each with the outcome of the repair, or [`None`] if the device is gone.
    pub async fn repair_device(&self, proc_sys: &Path) -> Option<Vec<(String, io::Result<()>)>> {
        let mut links = self.handle.link().get().match_name(OWN).execute();
        let link = links.try_next().await.ok().flatten()?;
        let mut found = Vec::new();
        if !link.header.flags.contains(LinkFlags::Up) {
            let up = LinkUnspec::new_with_index(link.header.index).up().build();
            let repair = self.handle.link().set(up).execute().await.map_err(io::Error::other);
            found.push(("the device is down".to_owned(), repair));
        }
        for (setting, value) in OWN_SETTINGS {
            let path = own_setting(proc_sys, setting);
            let now = std::fs::read_to_string(&path).unwrap_or_default();
            if now.trim() != value {
                let what = format!("its {setting} is {:?} instead of {value}", now.trim());
                found.push((what, set_own(proc_sys, setting, value)));
            }
        }
        Some(found)
    }

    /// Makes our own device, lets it accept packets from the node's own addresses, and returns its
    /// ifindex.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the device or the setting.
    pub async fn prepare(&self, proc_sys: &Path) -> io::Result<u32> {
        let device = self.create().await?;
        for (setting, value) in OWN_SETTINGS {
            set_own(proc_sys, setting, value)?;
        }
        Ok(device)
    }

    /// Makes our own device, sets it up, and returns its ifindex.
    async fn create(&self) -> io::Result<u32> {
        if self.device().await.is_none() {
            let dummy = LinkDummy::new(OWN).up().build();
            if self.handle.link().add(dummy).execute().await.is_err() {
                let ifb = LinkIfb::new(OWN).up().build();
                self.handle.link().add(ifb).execute().await.map_err(|error| {
                    io::Error::other(format!(
                        "cannot make the device {OWN} (tried the kinds dummy and ifb): {error}"
                    ))
                })?;
            }
            tracing::info!(device = OWN, "made our own device");
        }
        let device = self.device().await.ok_or_else(|| io::Error::other("the device vanished"))?;
        let up = LinkUnspec::new_with_index(device).up().build();
        self.handle.link().set(up).execute().await.map_err(io::Error::other)?;
        Ok(device)
    }

    /// Removes our own device and its routes, and returns whether it existed.
    ///
    /// # Errors
    ///
    /// Fails if netlink refuses.
    pub async fn remove(&self) -> io::Result<bool> {
        let Some(device) = self.device().await else { return Ok(false) };
        self.handle.link().del(device).execute().await.map_err(io::Error::other)?;
        Ok(true)
    }
}

fn own_setting(proc_sys: &Path, setting: &str) -> PathBuf {
    proc_sys.join("net/ipv4/conf").join(OWN).join(setting)
}

fn set_own(proc_sys: &Path, setting: &str, value: &str) -> io::Result<()> {
    let path = own_setting(proc_sys, setting);
    std::fs::write(&path, value).map_err(|error| {
        io::Error::new(error.kind(), format!("cannot set {}: {error}", path.display()))
    })
}

/// A route as netlink reports it.
struct Found {
    to: IpNet,
    table: u32,
    metric: u32,
    hops: Vec<Hop>,
    /// Whether it has our protocol.
    is_marked: bool,
    how: How,
}

impl Found {
    /// Parses the needed parts of a route. Returns [`None`] for what the kernel has learned of a
    /// path, which it lists too.
    fn read(route: &RouteMessage, is_ipv4: bool) -> Option<Self> {
        if route.header.flags.contains(RouteFlags::Cloned) {
            return None;
        }
        let RouteHeader { destination_prefix_length: length, protocol, .. } = route.header;
        let unspecified: IpAddr =
            if is_ipv4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let mut found = Self {
            to: IpNet::new(unspecified, length).ok()?,
            table: route.header.table.into(),
            metric: 0,
            hops: Vec::new(),
            is_marked: protocol == RouteProtocol::from(PROTOCOL),
            how: How::default(),
        };
        let mut device = None;
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(to) => {
                    found.to = IpNet::new(address(to)?, length).ok()?;
                }
                RouteAttribute::Table(table) => found.table = *table,
                RouteAttribute::Priority(metric) => found.metric = *metric,
                RouteAttribute::PrefSource(source) => found.how.source = address(source),
                RouteAttribute::Metrics(metrics) => {
                    found.how.mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                }
                RouteAttribute::Oif(index) => device = Some(*index),
                RouteAttribute::MultiPath(hops) => {
                    let hops = hops.iter();
                    found.hops.extend(hops.map(|hop| Hop {
                        device: hop.interface_index,
                        gateway: gateway(&hop.attributes),
                    }));
                }
                _ => {}
            }
        }
        found.hops.extend(device.map(|device| Hop { device, gateway: gateway(&route.attributes) }));
        Some(found)
    }

    /// Returns its MTU, if it is a route of the main table for packets of any class.
    fn mtu(&self, route: &RouteMessage) -> Option<(IpNet, RouteMtu)> {
        let RouteHeader { tos, kind, .. } = route.header;
        if self.table != MAIN || kind != RouteType::Unicast || tos != 0 {
            return None;
        }
        let device = match &*self.hops {
            [hop] => hop.device,
            _ => 0,
        };
        Some((self.to, RouteMtu { device, mtu: self.how.mtu.unwrap_or_default() }))
    }
}

/// Returns the gateway in a route's attributes.
fn gateway(attributes: &[RouteAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(gateway) => address(gateway),
        RouteAttribute::Via(RouteVia::Inet6(gateway)) => Some(IpAddr::V6(*gateway)),
        RouteAttribute::Via(RouteVia::Inet(gateway)) => Some(IpAddr::V4(*gateway)),
        _ => None,
    })
}

fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::devices::route::host_route;

    #[test]
    fn what_was_learned_of_a_path_is_no_route() {
        let vip = IpAddr::from([198, 51, 100, 1]);
        let mut route = host_route(vip).output_interface(2).build();
        let found = Found::read(&route, true).map(|found| (found.to, found.hops.len()));
        assert_eq!(found, Some((vip.into(), 1)));
        route.header.flags |= RouteFlags::Cloned;
        assert!(Found::read(&route, true).is_none());
    }
}
