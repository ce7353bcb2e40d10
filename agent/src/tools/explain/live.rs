//! A world made of the maps and routes of this node. Everything is only read, so an explanation
//! leaves no trace.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMetric, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder, new_connection};
use sluice_common::abi::{Networks, TICK_SHIFT, device};
use sluice_common::{V4, V6};
use sluice_core::image::Dataplane;
use tokio::runtime::Runtime;

use super::objects::Objects;
use super::question::{Client, Question};
use super::world::{Around, NamedDevice, Routing, World};
use crate::node::dataplane::{Error, Kernel, KernelStack, Maps};

/// The kernel's routing, over netlink.
#[derive(Debug)]
pub struct Live {
    runtime: Runtime,
    handle: Handle,
    /// All devices, by ifindex.
    links: BTreeMap<u32, Link>,
    /// The routes found so far, so that all parts of an answer agree.
    routes: RefCell<BTreeMap<IpAddr, Option<Route>>>,
}

/// The route to an address.
#[derive(Clone, Copy, Debug)]
struct Route {
    local: bool,
    device: u32,
    /// The route's own MTU, or the path MTU that was learned.
    mtu: Option<u32>,
}

/// A device.
#[derive(Clone, Debug)]
struct Link {
    name: String,
    mtu: Option<u32>,
}

impl Live {
    /// Opens netlink and lists the devices.
    ///
    /// # Errors
    ///
    /// Fails if netlink cannot be used.
    pub fn new() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (handle, links) = runtime.block_on(async {
            let (connection, handle, _messages) = new_connection()?;
            let _requests = tokio::spawn(connection);
            let links = links(&handle).await.map_err(std::io::Error::other)?;
            std::io::Result::Ok((handle, links))
        })?;
        Ok(Self { runtime, handle, links, routes: RefCell::default() })
    }

    /// Returns the world of the maps.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read.
    pub fn world(
        &self,
        kernel: &Kernel,
        now_ns: u64,
        left: BTreeSet<IpAddr>,
    ) -> anyhow::Result<World> {
        let maps = kernel.maps();
        let devices = maps.device_entries()?.into_iter().map(|(index, entry)| {
            let name = self
                .links
                .get(&index)
                .map_or_else(|| format!("ifindex {index}"), |link| link.name.clone());
            (index, NamedDevice { name, entry })
        });
        let (v4, v6) = maps.read_networks()?;
        Ok(World {
            image: kernel.read()?,
            settings: maps.read_settings()?,
            v4: around::<V4>(maps, v4)?,
            v6: around::<V6>(maps, v6)?,
            devices: devices.collect(),
            now: (now_ns >> TICK_SHIFT) as u32,
            now_ms: (now_ns / 1_000_000) as u32,
            rejects: maps.rejects()?,
            left,
            objects: Objects::default(),
        })
    }

    fn route(&self, destination: IpAddr) -> Option<Route> {
        if let Some(known) = self.routes.borrow().get(&destination) {
            return *known;
        }
        let found = self.runtime.block_on(route(&self.handle, destination));
        let _ = self.routes.borrow_mut().insert(destination, found);
        found
    }
}

fn around<F: KernelStack>(maps: &Maps, networks: Networks<F::Address>) -> Result<Around<F>, Error> {
    let mut around = Around {
        networks,
        flows: BTreeMap::new(),
        embryonic: BTreeMap::new(),
        affinity: F::maps(maps).read_affinity()?.into_iter().collect(),
        imported: F::maps(maps).read_imported()?.into_iter().collect(),
    };
    for entry in F::maps(maps).read_flows()? {
        let map = if entry.embryonic { &mut around.embryonic } else { &mut around.flows };
        let _ = map.insert(entry.tuple, entry.flow);
    }
    Ok(around)
}

async fn links(handle: &Handle) -> Result<BTreeMap<u32, Link>, rtnetlink::Error> {
    let mut found = BTreeMap::new();
    let mut links = handle.link().get().execute();
    while let Some(message) = links.try_next().await? {
        let mut link = Link { name: String::new(), mtu: None };
        for attribute in message.attributes {
            if let LinkAttribute::IfName(name) = attribute {
                link.name = name;
            } else if let LinkAttribute::Mtu(mtu) = attribute {
                link.mtu = Some(mtu);
            }
        }
        let _ = found.insert(message.header.index, link);
    }
    Ok(found)
}

/// Looks up a route, as `ip route get` does.
async fn route(handle: &Handle, destination: IpAddr) -> Option<Route> {
    let length = if destination.is_ipv4() { 32 } else { 128 };
    let question =
        RouteMessageBuilder::<IpAddr>::new().destination_prefix(destination, length).ok()?.build();
    let answer = handle.route().get(question).execute().try_next().await.ok().flatten()?;
    if !matches!(answer.header.kind, RouteType::Unicast | RouteType::Local) {
        return None;
    }
    let device = answer.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::Oif(device) = attribute { Some(*device) } else { None }
    });
    let metrics = answer.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::Metrics(metrics) = attribute { Some(metrics) } else { None }
    });
    let mtu = metrics
        .into_iter()
        .flatten()
        .find_map(|metric| if let RouteMetric::Mtu(mtu) = metric { Some(*mtu) } else { None });
    Some(Route { local: answer.header.kind == RouteType::Local, device: device?, mtu })
}

impl Routing for Live {
    fn leaves_by(&self, destination: IpAddr) -> Option<u32> {
        self.route(destination).filter(|route| !route.local).map(|route| route.device)
    }

    fn mtu(&self, destination: IpAddr) -> Option<u32> {
        let route = self.route(destination)?;
        let of_device = self.links.get(&route.device).and_then(|link| link.mtu);
        route.mtu.or(of_device)
    }

    fn is_local(&self, address: IpAddr) -> bool {
        self.route(address).is_some_and(|route| route.local)
    }

    fn comes_in_by(
        &self,
        question: &Question,
        devices: &BTreeMap<u32, NamedDevice>,
    ) -> Option<u32> {
        let device = self.leaves_by(question.source.ip())?;
        if devices.contains_key(&device) {
            return Some(device);
        }
        // A bridge of pods has no programs itself. Its ports have them, and any port will do.
        let port = devices
            .iter()
            .find(|(_, found)| found.entry.bridge == device && found.entry.role == device::EDGE);
        port.filter(|_| question.from == Client::Pod).map(|(index, _)| *index)
    }

    fn supposes(&self) -> &'static str {
        ""
    }
}
