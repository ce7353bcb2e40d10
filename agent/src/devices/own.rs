//! Our own device, with routes for the VIPs that no other route leads to.
//!
//! A process of the host that sends to a VIP by a path that no socket hook sees (connected UDP, raw
//! and kernel sockets) needs a route before any device can translate the packet. The device is a
//! dummy, or an ifb where the kernel has no dummies: neither asks for neighbours, both drop what they are
//! to send. Its egress program translates and redirects before that.
//!
//! It is also where packets of masqueraded clients enter the stack that are too big for the way to the
//! backend and may be fragmented, which no program can do: it alone accepts the node's own addresses as sources.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use futures::TryStreamExt;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope};
use rtnetlink::{Handle, LinkDummy, LinkIfb, LinkUnspec, RouteMessageBuilder, new_connection};

use super::OWN;
use super::watch::route_to;

/// Marks our routes, for people who list them (`ip route show proto 83`).
const PROTOCOL: u8 = 83;

/// Keeps the routes of the own device.
#[derive(Debug)]
pub struct OwnRoutes {
    handle: Handle,
    /// VIPs that have a route by our device.
    routed: BTreeSet<IpAddr>,
    /// VIPs that had another route when last asked.
    elsewhere: BTreeSet<IpAddr>,
}

/// A route, or a question for one, to a single address.
pub(super) fn host_route(address: IpAddr) -> RouteMessageBuilder<IpAddr> {
    let length = if address.is_ipv4() { 32 } else { 128 };
    // The length fits the family: this cannot be refused.
    RouteMessageBuilder::<IpAddr>::new().destination_prefix(address, length).unwrap_or_default()
}

/// The route of a VIP by our device. To remove it the kernel wants protocol and scope as they were given.
fn own_route(vip: IpAddr, device: u32) -> RouteMessage {
    let scope = if vip.is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    host_route(vip).output_interface(device).protocol(RouteProtocol::from(PROTOCOL)).scope(scope).build()
}

impl OwnRoutes {
    /// Opens netlink and finds what an earlier agent has left.
    ///
    /// # Errors
    ///
    /// When netlink cannot be used.
    pub async fn new() -> io::Result<Self> {
        let (connection, handle, _messages) = new_connection()?;
        let _requests = tokio::spawn(connection);
        let mut routes = Self { handle, routed: BTreeSet::new(), elsewhere: BTreeSet::new() };
        routes.routes_changed().await?;
        Ok(routes)
    }

    /// The own device's ifindex, if it exists.
    async fn device(&self) -> Option<u32> {
        let mut links = self.handle.link().get().match_name(OWN).execute();
        links.try_next().await.ok().flatten().map(|link| link.header.index)
    }

    async fn list(&self, device: u32) -> Result<BTreeSet<IpAddr>, rtnetlink::Error> {
        let mut found = BTreeSet::new();
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        for question in [v4, v6] {
            let mut routes = self.handle.route().get(question).execute();
            while let Some(route) = routes.try_next().await? {
                found.extend(destination(&route, device));
            }
        }
        Ok(found)
    }

    /// Looks again at which routes there are: some have changed.
    ///
    /// # Errors
    ///
    /// When netlink refuses.
    pub async fn routes_changed(&mut self) -> io::Result<()> {
        self.elsewhere.clear();
        self.routed = match self.device().await {
            Some(device) => self.list(device).await.map_err(io::Error::other)?,
            None => BTreeSet::new(),
        };
        Ok(())
    }

    /// Makes the routes of the own device those that `vips` need; asks only about VIPs
    /// that have come since the last time, or all after [`Self::routes_changed`].
    ///
    /// # Errors
    ///
    /// When netlink refuses the device or a route; calling again goes on.
    pub async fn keep(&mut self, vips: &BTreeSet<IpAddr>) -> io::Result<()> {
        let gone: Vec<IpAddr> = self.routed.difference(vips).copied().collect();
        self.elsewhere.retain(|vip| vips.contains(vip));
        let mut device = if self.routed.is_empty() { None } else { self.device().await };
        for vip in gone {
            if let Some(device) = device {
                // A route that is gone already is no error.
                let _ = self.handle.route().del(own_route(vip, device)).execute().await;
            }
            let _ = self.routed.remove(&vip);
        }
        let unknown = vips.iter().filter(|vip| !self.elsewhere.contains(vip) && !self.routed.contains(vip));
        for vip in unknown.copied().collect::<Vec<_>>() {
            match route_to(&self.handle, vip).await {
                Some(leaves_by) if Some(leaves_by) == device => {
                    let _ = self.routed.insert(vip);
                }
                Some(_) => {
                    let _ = self.elsewhere.insert(vip);
                }
                None => {
                    let own = match device {
                        Some(own) => own,
                        None => self.create().await?,
                    };
                    device = Some(own);
                    let route = self.handle.route().add(own_route(vip, own)).replace();
                    route.execute().await.map_err(io::Error::other)?;
                    let _ = self.routed.insert(vip);
                }
            }
        }
        Ok(())
    }

    /// Makes the own device, and has it accept packets from the node's own addresses; its ifindex.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the device or the setting.
    pub async fn prepare(&self, proc_sys: &Path) -> io::Result<u32> {
        let device = self.create().await?;
        for (setting, value) in [("accept_local", "1"), ("rp_filter", "0")] {
            let path = proc_sys.join("net/ipv4/conf").join(OWN).join(setting);
            std::fs::write(&path, value).map_err(|error| {
                io::Error::new(error.kind(), format!("cannot set {}: {error}", path.display()))
            })?;
        }
        Ok(device)
    }

    /// The own device, made and up.
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

    /// Removes the own device and its routes; returns whether it was there.
    ///
    /// # Errors
    ///
    /// When netlink refuses.
    pub async fn remove(&self) -> io::Result<bool> {
        let Some(device) = self.device().await else { return Ok(false) };
        self.handle.link().del(device).execute().await.map_err(io::Error::other)?;
        Ok(true)
    }
}

/// The destination of a route by a device that carries our mark.
fn destination(route: &RouteMessage, device: u32) -> Option<IpAddr> {
    let by_device = route.attributes.contains(&RouteAttribute::Oif(device));
    if !by_device || route.header.protocol != RouteProtocol::from(PROTOCOL) {
        return None;
    }
    route.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::Destination(RouteAddress::Inet(address)) = attribute {
            Some(IpAddr::V4(*address))
        } else if let RouteAttribute::Destination(RouteAddress::Inet6(address)) = attribute {
            Some(IpAddr::V6(*address))
        } else {
            None
        }
    })
}
