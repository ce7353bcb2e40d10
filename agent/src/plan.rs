//! From what Services want to the content of the maps: pure, and in work proportional to what changed.
//!
//! The plan gives out ids and ranges of slots and knows who has them. What an update frees is given away
//! only behind the update's own writes, hence behind the grace that ends them.
//!
//! Room. A range is as large as [`maglev::size`] says. If no gap is large enough, an update of a
//! service port that is already served takes it from the reserve, then a smaller table, at last it
//! overwrites its own range (and has no backends for a moment). A new service port gets a smaller
//! table or is refused. Whoever got less than due is tried again when something becomes free.

mod adopt;
mod arena;
mod draft;
mod ids;
mod listing;
mod port;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sluice_common::abi::{self, NodeAddress, OriginKey, Range, Service, ServiceKey, frontend, node_address};
use sluice_common::{Family, V4, V6, maglev};

use crate::image::{Image, Stack, Write, node_port_bit};
use crate::model::desired::PortKey;
use crate::model::object::{IpFamily, Protocol};
use crate::model::report::{Flaw, Note};
use crate::model::{Batch, Desired, FrontendKind, ObjectName};
use arena::Arena;
use draft::{Draft, Drafted};
use ids::{BackendIds, PortIds};
use listing::{Lingering, Listing, Why};

/// How much the maps hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Service ports, of which id 0 is none.
    pub ports: u32,
    /// Backends of each family, of which id 0 is none.
    pub backends: u32,
    /// Frontends of each family.
    pub services: u32,
    /// Blocks of slots.
    pub slot_blocks: u32,
    /// The last of these blocks, which only updates may use.
    pub reserve_blocks: u32,
    /// Source ranges of each family.
    pub source_ranges: u32,
    /// Addresses of this node, of each family.
    pub node_addresses: u32,
}

impl Default for Sizes {
    /// The sizes of the ABI, with a reserve of one largest range. One in 16 frontends, source ranges and addresses is
    /// left for those that a large update removes only after it has inserted the new ones.
    fn default() -> Self {
        Self {
            ports: abi::PORTS_MAX,
            backends: abi::BACKENDS_MAX,
            services: abi::SERVICES_MAX - abi::SERVICES_MAX / 16,
            slot_blocks: abi::SLOT_BLOCKS_MAX,
            reserve_blocks: maglev::SIZE_MAX.div_ceil(abi::SLOTS_PER_BLOCK),
            source_ranges: abi::SOURCE_RANGES_MAX - abi::SOURCE_RANGES_MAX / 16,
            node_addresses: abi::NODE_ADDRESSES_MAX - abi::NODE_ADDRESSES_MAX / 16,
        }
    }
}

/// Frontends that are inserted before those that go are removed, at most (see [`Sizes::services`]).
const INSERTED_AT_ONCE: u32 = 2_048;
/// Backends that one draft touches, about: it holds all it touches twice.
const TOUCHED_AT_ONCE: u32 = 8_192;
/// Service ports that got less than due and are tried again after one update.
const RETRIED_AT_ONCE: usize = 16;

/// What an update leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// The steps, in order.
    pub writes: Vec<Write>,
    /// For each Service that was looked at, what is wrong with it now.
    pub notes: BTreeMap<ObjectName, Vec<Note>>,
}

/// The maps' intended content, and who owns what in it.
#[derive(Clone, Debug)]
pub struct Plan {
    sizes: Sizes,
    image: Image,
    ids: BTreeMap<PortKey, u32>,
    planned: BTreeMap<u32, Planned>,
    port_ids: PortIds,
    v4: FamilyPlan<V4>,
    v6: FamilyPlan<V6>,
    arena: Arena,
    reserve: Arena,
    listing: Listing,
    lingering_node_ports: Lingering<u16>,
    /// Address of this node -> whether it serves node ports.
    nodes: BTreeMap<IpAddr, bool>,
    /// Service -> its ClusterIPs as such.
    addresses: BTreeMap<ObjectName, BTreeSet<IpAddr>>,
    /// The same the other way round: several Services may claim one.
    holders: BTreeSet<(IpAddr, ObjectName)>,
    waiting: BTreeMap<ObjectName, Desired>,
    limbo: Limbo,
    /// Adopted from maps and not swept so far: service ports that belong to nobody.
    strays: Option<Vec<u32>>,
}

/// A service port as it is planned.
#[derive(Clone, Debug)]
struct Planned {
    key: PortKey,
    frontends: BTreeMap<(IpAddr, u16), FrontendKind>,
    backends: BTreeMap<(IpAddr, u16), Held>,
    /// The content of its ranges is known to be what [`maglev::fill`] makes of its backends.
    verified: bool,
}

/// A backend of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    id: u32,
    selected: [bool; 3],
}

/// What is counted per family.
#[derive(Clone, Debug)]
struct FamilyPlan<F: Family> {
    ids: BackendIds<F::Address>,
    /// Endpoint and the service ports that it is a backend of.
    users: BTreeSet<(OriginKey<F::Address>, u32)>,
}

/// The part of a plan that belongs to a family.
trait Planning: Drafted {
    fn of_plan(plan: &mut Plan) -> &mut FamilyPlan<Self>;
    /// The ids that are to be retired when the writes of the draft are out.
    fn leaving(limbo: &mut Limbo) -> &mut Vec<u32>;
}

impl Planning for V4 {
    fn of_plan(plan: &mut Plan) -> &mut FamilyPlan<Self> {
        &mut plan.v4
    }
    fn leaving(limbo: &mut Limbo) -> &mut Vec<u32> {
        &mut limbo.v4
    }
}

impl Planning for V6 {
    fn of_plan(plan: &mut Plan) -> &mut FamilyPlan<Self> {
        &mut plan.v6
    }
    fn leaving(limbo: &mut Limbo) -> &mut Vec<u32> {
        &mut limbo.v6
    }
}

/// What the draft frees, and may not be given away within the draft.
#[derive(Clone, Debug, Default)]
struct Limbo {
    ranges: Vec<Range>,
    ports: Vec<u32>,
    v4: Vec<u32>,
    v6: Vec<u32>,
}

/// An update in the making.
#[derive(Debug, Default)]
struct Work {
    draft: Draft,
    update: Update,
    /// Something became free.
    freed: bool,
}

impl Plan {
    /// A plan for empty maps.
    pub fn new(sizes: Sizes) -> Self {
        Self::adopt(sizes, Image::default())
    }

    /// What the maps shall hold.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The service port of an id.
    pub fn port(&self, id: u32) -> Option<&PortKey> {
        self.planned.get(&id).map(|planned| &planned.key)
    }

    /// The id of a service port.
    pub fn id(&self, key: &PortKey) -> Option<u32> {
        self.ids.get(key).copied()
    }

    /// Plans what some Services want now.
    pub fn update(&mut self, batch: &Batch) -> Update {
        let mut work = Work::default();
        if batch.complete {
            self.sweep(batch, &mut work);
            let known: BTreeSet<ObjectName> = self
                .ids
                .keys()
                .map(|key| &key.service)
                .chain(self.waiting.keys())
                .chain(self.addresses.keys())
                .cloned()
                .collect();
            for gone in known.iter().filter(|name| !batch.services.contains_key(name)) {
                self.plan_service(gone, &Desired::default(), &mut work);
            }
        }
        for (name, desired) in &batch.services {
            self.plan_service(name, desired, &mut work);
        }
        self.flush(&mut work);
        if work.freed {
            let again: Vec<ObjectName> = self.waiting.keys().take(RETRIED_AT_ONCE).cloned().collect();
            for name in again {
                if let Some(desired) = self.waiting.remove(&name) {
                    self.plan_service(&name, &desired, &mut work);
                }
            }
            self.flush(&mut work);
        }
        work.update
    }

    /// Plans the node's own addresses: for each, whether node ports are served there.
    ///
    /// If there are more than the map holds, those without node ports are left out first.
    pub fn set_node_addresses(&mut self, addresses: BTreeMap<IpAddr, bool>) -> Vec<Write> {
        let mut work = Work::default();
        let old = std::mem::replace(&mut self.nodes, addresses);
        let reasons = |nodes: &BTreeMap<IpAddr, bool>| -> BTreeSet<(IpAddr, bool)> {
            nodes.iter().flat_map(|(address, serves)| [(*address, false), (*address, *serves)]).collect()
        };
        let (before, after) = (reasons(&old), reasons(&self.nodes));
        let why = |node_ports: bool| if node_ports { Why::NodePorts } else { Why::Node };
        for (address, node_ports) in after.difference(&before) {
            self.list(*address, why(*node_ports), &mut work);
        }
        for (address, node_ports) in before.difference(&after) {
            self.unlist(*address, why(*node_ports), &mut work);
        }
        self.plan_nodes::<V4>(&mut work);
        self.plan_nodes::<V6>(&mut work);
        self.flush(&mut work);
        work.update.writes
    }

    fn plan_nodes<F: Planning>(&mut self, work: &mut Work) {
        let mut nodes: Vec<(F::Address, bool)> = self
            .nodes
            .iter()
            .filter_map(|(address, serves)| Some((F::address(*address)?, *serves)))
            .collect();
        nodes.sort_by_key(|(address, serves)| (!serves, *address));
        let flags = |serves: bool| if serves { node_address::NODE_PORTS } else { 0 };
        let wanted: BTreeMap<F::Address, NodeAddress> = nodes
            .into_iter()
            .take(self.sizes.node_addresses as usize)
            .map(|(address, serves)| (address, NodeAddress { flags: flags(serves) }))
            .collect();
        let known = F::of(&self.image).node_addresses.clone();
        for address in known.keys().filter(|address| !wanted.contains_key(address)) {
            work.draft.set_node_address::<F>(&mut self.image, *address, None);
        }
        for (address, node) in wanted {
            if known.get(&address) != Some(&node) {
                work.draft.set_node_address::<F>(&mut self.image, address, Some(node));
            }
        }
    }

    fn plan_service(&mut self, name: &ObjectName, desired: &Desired, work: &mut Work) {
        let _ = self.waiting.remove(name);
        let mut notes = Vec::new();
        for key in self.keys_of(name) {
            if !desired.ports.contains_key(&key) {
                match key.family {
                    IpFamily::V4 => self.remove_port::<V4>(&key, work),
                    IpFamily::V6 => self.remove_port::<V6>(&key, work),
                }
            }
        }
        for (key, port) in &desired.ports {
            match key.family {
                IpFamily::V4 => self.plan_port::<V4>(key, port, work, &mut notes),
                IpFamily::V6 => self.plan_port::<V6>(key, port, work, &mut notes),
            }
        }
        // Where a port found no room, its clients must not be told that there is none.
        let wanted = desired.addresses.iter().filter(|vip| self.is_whole(desired, IpFamily::of(**vip)));
        let wanted = wanted.copied().collect();
        self.plan_addresses(name, &wanted, work, &mut notes);
        if !notes.is_empty() {
            let _ = self.waiting.insert(name.clone(), desired.clone());
        }
        let _ = work.update.notes.insert(name.clone(), notes);
        if work.draft.inserted >= INSERTED_AT_ONCE || work.draft.touched >= TOUCHED_AT_ONCE {
            self.flush(work);
        }
    }

    /// Whether every frontend of a Service in a family is planned.
    fn is_whole(&self, desired: &Desired, family: IpFamily) -> bool {
        desired.ports.iter().filter(|(key, _)| key.family == family).all(|(key, port)| {
            let planned = self.ids.get(key).and_then(|id| self.planned.get(id));
            planned.is_some_and(|planned| planned.frontends.len() == port.frontends.len())
        })
    }

    /// Plans a Service's ClusterIPs as such.
    fn plan_addresses(
        &mut self,
        name: &ObjectName,
        wanted: &BTreeSet<IpAddr>,
        work: &mut Work,
        notes: &mut Vec<Note>,
    ) {
        let old = self.addresses.remove(name).unwrap_or_default();
        for address in old.difference(wanted) {
            let _ = self.holders.remove(&(*address, name.clone()));
            let mut others = self.holders.range((*address, ObjectName::new("", ""))..);
            if others.next().is_none_or(|(other, _)| other != address) {
                match IpFamily::of(*address) {
                    IpFamily::V4 => self.remove_address::<V4>(*address, work),
                    IpFamily::V6 => self.remove_address::<V6>(*address, work),
                }
            }
        }
        let mut held = BTreeSet::new();
        for address in wanted {
            let served = match IpFamily::of(*address) {
                IpFamily::V4 => self.add_address::<V4>(*address, work),
                IpFamily::V6 => self.add_address::<V6>(*address, work),
            };
            if served {
                let _ = self.holders.insert((*address, name.clone()));
                let _ = held.insert(*address);
            } else {
                let what = format!("no frontend is free: {address} does not reject what no port is for");
                notes.push(Note::new(Flaw::NoRoom, "spec.clusterIPs", what));
            }
        }
        if !held.is_empty() {
            let _ = self.addresses.insert(name.clone(), held);
        }
    }

    fn add_address<F: Planning>(&mut self, address: IpAddr, work: &mut Work) -> bool {
        let Some(key) = F::address(address).map(whole::<F>) else { return false };
        let services = &F::of(&self.image).services;
        if services.contains_key(&key) {
            return true;
        }
        if services.len() as u32 >= self.sizes.services {
            return false;
        }
        work.draft.set_service::<F>(&mut self.image, key, Some(WHOLE));
        self.list(address, Why::Frontend, work);
        true
    }

    fn remove_address<F: Planning>(&mut self, address: IpAddr, work: &mut Work) {
        let Some(key) = F::address(address).map(whole::<F>) else { return };
        work.draft.set_service::<F>(&mut self.image, key, None);
        work.freed = true;
        self.unlist_later(address, work);
    }

    /// The service ports of a Service that are planned.
    fn keys_of(&self, name: &ObjectName) -> Vec<PortKey> {
        let keys = self.ids.range(PortKey::first(name)..).map(|(key, _)| key);
        keys.take_while(|key| key.service == *name).cloned().collect()
    }

    /// Ends the draft: what it freed may be given away in the next, whose writes come later.
    fn flush(&mut self, work: &mut Work) {
        let draft = std::mem::take(&mut work.draft);
        work.update.writes.append(&mut draft.writes(&self.image));
        let Limbo { ranges, ports, v4, v6 } = std::mem::take(&mut self.limbo);
        work.freed |= !(ranges.is_empty() && ports.is_empty() && v4.is_empty() && v6.is_empty());
        for range in ranges {
            self.release(range);
        }
        for id in ports {
            self.port_ids.give(id);
        }
        self.retire::<V4>(v4);
        self.retire::<V6>(v6);
    }

    fn retire<F: Planning>(&mut self, leaving: Vec<u32>) {
        for id in leaving {
            let backend = F::of(&self.image).backends.get(&id).copied();
            let owner = backend
                .filter(|backend| self.planned.contains_key(&backend.service_port))
                .map(|backend| (backend.service_port, backend.address, backend.port));
            F::of_plan(self).ids.retire(id, owner);
        }
    }

    /// The first block of the reserve.
    fn boundary(&self) -> u32 {
        self.sizes.slot_blocks.saturating_sub(self.sizes.reserve_blocks)
    }

    fn release(&mut self, range: Range) {
        let start = range.start() / abi::SLOTS_PER_BLOCK;
        let end = start + range.size().div_ceil(abi::SLOTS_PER_BLOCK);
        let boundary = self.boundary();
        if start < boundary.min(end) {
            self.arena.give(start, end.min(boundary) - start);
        }
        if end > boundary {
            self.reserve.give(start.max(boundary), end - start.max(boundary));
        }
    }

    /// Finds room for a table of a wished size: for an update, also in the reserve; at need a smaller one.
    fn find_room(&mut self, size: u32, update: bool, work: &mut Work) -> Option<Range> {
        let mut flushed = false;
        let mut size = size;
        while size != 0 {
            let blocks = size.div_ceil(abi::SLOTS_PER_BLOCK);
            let mut start = self.arena.take(blocks);
            if start.is_none() && !flushed {
                self.flush(work);
                flushed = true;
                start = self.arena.take(blocks);
            }
            if start.is_none() && update {
                start = self.reserve.take(blocks);
            }
            if let Some(start) = start {
                return Some(Range::new(start * abi::SLOTS_PER_BLOCK, size as u16));
            }
            size = maglev::smaller(size);
        }
        None
    }

    /// Lists or unlists an address.
    fn list(&mut self, address: IpAddr, why: Why, work: &mut Work) {
        let (lane, bits) = self.listing.add(address, why);
        work.draft.set_lane(&mut self.image, lane, bits);
    }

    fn unlist(&mut self, address: IpAddr, why: Why, work: &mut Work) {
        let (lane, bits) = self.listing.remove(address, why);
        work.draft.set_lane(&mut self.image, lane, bits);
    }

    /// Unlists a frontend's address when many others have gone after it.
    fn unlist_later(&mut self, address: IpAddr, work: &mut Work) {
        if let Some((lane, bits)) = self.listing.linger(address) {
            work.draft.set_lane(&mut self.image, lane, bits);
        }
    }

    /// Sets the bit of a port number after a frontend with it came; after it went, clears it when many others have
    /// gone after it.
    fn refresh_node_port(&mut self, port: u16, work: &mut Work) {
        let is_set = self.has_node_port_bit(port);
        if has_node_port::<V4>(&self.image, port) || has_node_port::<V6>(&self.image, port) {
            self.lingering_node_ports.forget(&port);
            if !is_set {
                self.set_node_port_bit(port, true, work);
            }
        } else if is_set
            && !self.lingering_node_ports.has(&port)
            && let Some(oldest) = self.lingering_node_ports.add(port)
        {
            self.set_node_port_bit(oldest, false, work);
        }
    }

    fn has_node_port_bit(&self, port: u16) -> bool {
        let (word, bit) = node_port_bit(port);
        self.image.node_ports.get(&word).is_some_and(|bits| bits & bit != 0)
    }

    fn set_node_port_bit(&mut self, port: u16, is_set: bool, work: &mut Work) {
        let (word, bit) = node_port_bit(port);
        let before = self.image.node_ports.get(&word).copied().unwrap_or(0);
        let bits = if is_set { before | bit } else { before & !bit };
        work.draft.set_node_ports(&mut self.image, word, bits);
    }

    /// Writes which frontends lead to an endpoint: the first few, in order. A node port is none of them: it has no
    /// address of its own that a reply could show.
    fn refresh_origins<F: Planning>(&mut self, endpoint: OriginKey<F::Address>, work: &mut Work) {
        let users: Vec<u32> =
            F::of_plan(self).users.range((endpoint, 0)..=(endpoint, u32::MAX)).map(|(_, id)| *id).collect();
        let frontends: BTreeSet<(F::Address, u16)> = users
            .iter()
            .filter_map(|id| self.planned.get(id))
            .flat_map(|planned| &planned.frontends)
            .filter(|(_, kind)| **kind != FrontendKind::NodePort)
            .filter_map(|((vip, port), _)| Some((F::address(*vip)?, *port)))
            .collect();
        let mut origins = abi::Origins::default();
        for (origin, (address, port)) in origins.frontends.iter_mut().zip(&frontends) {
            *origin = abi::Origin { address: *address, port: *port, reserved: 0 };
        }
        let origins = (!frontends.is_empty()).then_some(origins);
        if F::of(&self.image).origins.get(&endpoint) != origins.as_ref() {
            work.draft.set_origins::<F>(&mut self.image, endpoint, origins);
        }
    }
}

/// The key of an endpoint in `origins`.
fn endpoint<F: Stack>(address: F::Address, port: u16, key: &PortKey) -> OriginKey<F::Address> {
    OriginKey { address, port, protocol: key.protocol.number(), reserved: 0 }
}

/// The key of a ClusterIP as such.
fn whole<F: Stack>(address: F::Address) -> ServiceKey<F::Address> {
    ServiceKey { address, port: 0, protocol: 0, reserved: 0 }
}

/// Where a ClusterIP as such leads.
const WHOLE: Service = Service { service_port: 0, kind: frontend::ADDRESS };

/// Whether a family has a frontend for a node port.
fn has_node_port<F: Stack>(image: &Image, port: u16) -> bool {
    let services = &F::of(image).services;
    Protocol::ALL.into_iter().any(|protocol| {
        let address = F::Address::default();
        services.contains_key(&ServiceKey { address, port, protocol: protocol.number(), reserved: 0 })
    })
}
