//! From what Services want to the content of the maps: pure, and in work proportional to what
//! changed.
//!
//! The plan gives out ids and ranges of slots and knows who has them. What an update frees is given
//! away only behind the update's own writes, hence behind the grace that ends them.
//!
//! Room. A range is as large as [`maglev::size`] says. If no gap is large enough, an update of a
//! service port that is already served takes it from the reserve, then a smaller table, at last it
//! overwrites its own range (and has no backends for a moment). A new service port gets a smaller
//! table or is refused. Whoever got less than due is tried again when something becomes free.
//!
//! Fairness. What a Service has it keeps. What is free goes to the older Services first, to the
//! ClusterIPs of all of them before any other frontend, and to no namespace that holds far more
//! than what would be left (`shares.rs`).

mod adopt;
pub use adopt::node_ports_of_bits;
mod arena;
mod draft;
mod ids;
mod listing;
mod port;
mod shares;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use sluice_common::abi::{
    self, NodeAddress, OriginKey, Range, Service, ServiceKey, frontend, node_address,
};
use sluice_common::{Family, V4, V6, maglev};

use crate::image::{Image, SourceKey, Stack, Write, node_port_bit};
use crate::model::desired::PortKey;
use crate::model::object::{IpFamily, Protocol};
use crate::model::report::{Flaw, Note};
use crate::model::{Batch, Desired, FrontendKind, ObjectName};
use arena::Arena;
use draft::{Draft, Drafted};
use ids::{BackendIds, PortIds};
use listing::{Lingering, Listing, Why};
use shares::{Shares, grant};

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
    /// The sizes of the ABI, with a reserve of one largest range. One in 16 frontends, source
    /// ranges and addresses is left for those that a large update removes only after it has
    /// inserted the new ones.
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
/// Services that got less than they want and are tried again together, after an update that freed
/// something.
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
    /// Service ports of each namespace.
    port_shares: Shares,
    /// Blocks of slots of each namespace.
    slot_shares: Shares,
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
    waiting: BTreeMap<ObjectName, Waiting>,
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

/// A Service that got less than it wants.
#[derive(Clone, Debug)]
struct Waiting {
    desired: Desired,
    /// What there was too little of: bits of [`lack`].
    lacks: u32,
}

/// What there may be too little of. Bits of IPv6 are those of IPv4 shifted by [`lack::IPV6`].
mod lack {
    pub(super) const PORTS: u32 = 1 << 0;
    pub(super) const SLOTS: u32 = 1 << 1;
    pub(super) const CLUSTER_IPS: u32 = 1 << 2;
    pub(super) const FRONTENDS: u32 = 1 << 3;
    pub(super) const BACKENDS: u32 = 1 << 4;
    pub(super) const SOURCES: u32 = 1 << 5;
    pub(super) const IPV6: u32 = 8;

    /// A bit for a family.
    pub(super) fn of<F: sluice_common::Family>(bit: u32) -> u32 {
        if F::VERSION == 6 { bit << IPV6 } else { bit }
    }
}

/// The first of its frontends that leads to an endpoint, the endpoint, and the service port.
type User<A> = (OriginKey<A>, (A, u16), u32);

/// What is counted per family.
#[derive(Clone, Debug)]
struct FamilyPlan<F: Family> {
    ids: BackendIds<F::Address>,
    /// Endpoint, with the least frontend of each service port that it is a backend of, and the
    /// service port. Those without a frontend that a reply could show are left out.
    users: BTreeSet<User<F::Address>>,
    /// Frontends of each namespace, without its ClusterIPs as such.
    frontends: Shares,
    /// Backends of each namespace.
    backends: Shares,
    /// Source ranges of each namespace.
    sources: Shares,
}

impl<F: Family> FamilyPlan<F> {
    fn new(ids: BackendIds<F::Address>) -> Self {
        Self {
            ids,
            users: BTreeSet::new(),
            frontends: Shares::default(),
            backends: Shares::default(),
            sources: Shares::default(),
        }
    }
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
    /// What there was too little of for the Service that is being planned: bits of [`lack`].
    lacks: u32,
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
            let nothing = Desired::default();
            let gone = known.iter().filter(|name| !batch.services.contains_key(name));
            self.plan_services(&gone.map(|name| (name, &nothing)).collect::<Vec<_>>(), &mut work);
        }
        let mut services: Vec<(&ObjectName, &Desired)> = batch.services.iter().collect();
        // Those that go make room for the others.
        services.sort_by_key(|(name, desired)| (!desired.ports.is_empty(), rank(name, desired)));
        self.plan_services(&services, &mut work);
        self.flush(&mut work);
        if work.freed {
            while self.retry(&mut work) {}
        }
        work.update
    }

    /// Tries some Services again that got less than they want. Returns whether there were any, and
    /// all got it: then there may be room for more of them.
    fn retry(&mut self, work: &mut Work) -> bool {
        let again = self.take_waiting();
        let left = self.waiting.len();
        let services: Vec<(&ObjectName, &Desired)> =
            again.iter().map(|(name, waiting)| (name, &waiting.desired)).collect();
        self.plan_services(&services, work);
        self.flush(work);
        !again.is_empty() && self.waiting.len() == left
    }

    /// Takes the oldest of the Services that wait for something of which their namespace would get
    /// some now.
    fn take_waiting(&mut self) -> Vec<(ObjectName, Waiting)> {
        let mut names: Vec<&ObjectName> = self
            .waiting
            .iter()
            .filter(|(name, waiting)| self.grants_any(&name.namespace, waiting.lacks))
            .map(|(name, _)| name)
            .collect();
        names.sort_by_key(|name| {
            self.waiting.get(*name).map(|waiting| rank(name, &waiting.desired))
        });
        let names: Vec<ObjectName> = names.into_iter().take(RETRIED_AT_ONCE).cloned().collect();
        names.into_iter().filter_map(|name| self.waiting.remove_entry(&name)).collect()
    }

    /// Whether a namespace would get more of something that there was too little of.
    fn grants_any(&self, namespace: &str, lacks: u32) -> bool {
        lacks & lack::PORTS != 0
            && grant(self.port_shares.held(namespace), self.port_ids.free(), 1) > 0
            || lacks & lack::SLOTS != 0
                && grant(self.slot_shares.held(namespace), self.arena.free(), 1) > 0
            || self.grants_any_of::<V4>(&self.v4, namespace, lacks)
            || self.grants_any_of::<V6>(&self.v6, namespace, lacks >> lack::IPV6)
    }

    fn grants_any_of<F: Planning>(
        &self,
        plan: &FamilyPlan<F>,
        namespace: &str,
        lacks: u32,
    ) -> bool {
        let frontends = plan.frontends.held(namespace);
        let sources = self.free_sources::<F>();
        lacks & lack::CLUSTER_IPS != 0 && grant(frontends, self.free_frontends::<F>(true), 1) > 0
            || lacks & lack::FRONTENDS != 0
                && grant(frontends, self.free_frontends::<F>(false), 1) > 0
            || lacks & lack::BACKENDS != 0
                && grant(plan.backends.held(namespace), plan.ids.free(), 1) > 0
            || lacks & lack::SOURCES != 0 && grant(plan.sources.held(namespace), sources, 1) > 0
    }

    /// How many frontends are free: a sixteenth of all is for ClusterIPs alone.
    fn free_frontends<F: Planning>(&self, cluster_ip: bool) -> u32 {
        let kept = if cluster_ip { 0 } else { self.sizes.services / 16 };
        self.sizes
            .services
            .saturating_sub(kept)
            .saturating_sub(F::of(&self.image).services.len() as u32)
    }

    fn free_sources<F: Planning>(&self) -> u32 {
        self.sizes.source_ranges.saturating_sub(F::of(&self.image).source_ranges.len() as u32)
    }

    /// Plans the node's own addresses: for each, whether node ports are served there.
    ///
    /// If there are more than the map holds, those without node ports are left out first.
    pub fn set_node_addresses(&mut self, addresses: BTreeMap<IpAddr, bool>) -> Vec<Write> {
        let mut work = Work::default();
        let old = std::mem::replace(&mut self.nodes, addresses);
        let reasons = |nodes: &BTreeMap<IpAddr, bool>| -> BTreeSet<(IpAddr, bool)> {
            nodes
                .iter()
                .flat_map(|(address, serves)| [(*address, false), (*address, *serves)])
                .collect()
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

    /// Plans Services, in this order: first what all of them need to be served at their ClusterIPs,
    /// then the rest.
    fn plan_services(&mut self, services: &[(&ObjectName, &Desired)], work: &mut Work) {
        let mut found: Vec<(Vec<Note>, u32)> = Vec::with_capacity(services.len());
        for (name, desired) in services {
            let _ = self.waiting.remove(*name);
            let mut notes = Vec::new();
            work.lacks = 0;
            self.plan_ports(name, desired, work, &mut notes);
            found.push((notes, work.lacks));
            self.flush_if_large(work);
        }
        for ((name, desired), (mut notes, lacks)) in services.iter().zip(found) {
            work.lacks = lacks;
            self.plan_frontends(desired, work, &mut notes);
            // Where a port found no room, its clients must not be told that there is none.
            let wanted =
                desired.addresses.iter().filter(|vip| self.is_whole(desired, IpFamily::of(**vip)));
            let wanted = wanted.copied().collect();
            self.plan_addresses(name, &wanted, work, &mut notes);
            if !notes.is_empty() {
                let waiting = Waiting { desired: (*desired).clone(), lacks: work.lacks };
                let _ = self.waiting.insert((*name).clone(), waiting);
            }
            let _ = work.update.notes.insert((*name).clone(), notes);
            self.flush_if_large(work);
        }
    }

    /// Plans a Service's ports, with their ClusterIPs and those of their other frontends that they
    /// have.
    fn plan_ports(
        &mut self,
        name: &ObjectName,
        desired: &Desired,
        work: &mut Work,
        notes: &mut Vec<Note>,
    ) {
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
                IpFamily::V4 => self.plan_port::<V4>(key, port, work, notes),
                IpFamily::V6 => self.plan_port::<V6>(key, port, work, notes),
            }
        }
    }

    /// Plans the frontends that a Service's ports still lack.
    fn plan_frontends(&mut self, desired: &Desired, work: &mut Work, notes: &mut Vec<Note>) {
        for (key, port) in &desired.ports {
            let Some(id) = self.ids.get(key).copied() else { continue };
            match key.family {
                IpFamily::V4 => self.plan_port_frontends::<V4>(id, port, Which::All, work, notes),
                IpFamily::V6 => self.plan_port_frontends::<V6>(id, port, Which::All, work, notes),
            }
        }
    }

    fn flush_if_large(&mut self, work: &mut Work) {
        if work.draft.inserted >= INSERTED_AT_ONCE || work.draft.touched >= TOUCHED_AT_ONCE {
            self.flush(work);
        }
    }

    /// Whether every ClusterIP of a Service's ports in a family is planned.
    fn is_whole(&self, desired: &Desired, family: IpFamily) -> bool {
        desired.ports.iter().filter(|(key, _)| key.family == family).all(|(key, port)| {
            let planned = self.ids.get(key).and_then(|id| self.planned.get(id));
            let mut cluster_ips =
                port.frontends.iter().filter(|(_, kind)| **kind == FrontendKind::ClusterIp);
            planned.is_some_and(|planned| {
                cluster_ips.all(|(at, _)| planned.frontends.contains_key(at))
            })
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
                IpFamily::V4 => self.add_address::<V4>(name, *address, work),
                IpFamily::V6 => self.add_address::<V6>(name, *address, work),
            };
            if served {
                let _ = self.holders.insert((*address, name.clone()));
                let _ = held.insert(*address);
            } else {
                let what =
                    format!("no frontend is free: {address} does not reject what no port is for");
                notes.push(Note::new(Flaw::NoRoom, "spec.clusterIPs", what));
            }
        }
        if !held.is_empty() {
            let _ = self.addresses.insert(name.clone(), held);
        }
    }

    fn add_address<F: Planning>(
        &mut self,
        name: &ObjectName,
        address: IpAddr,
        work: &mut Work,
    ) -> bool {
        let Some(key) = F::address(address).map(whole::<F>) else { return false };
        if F::of(&self.image).services.contains_key(&key) {
            return true;
        }
        let held = F::of_plan(self).frontends.held(&name.namespace);
        if grant(held, self.free_frontends::<F>(true), 1) == 0 {
            work.lacks |= lack::of::<F>(lack::CLUSTER_IPS);
            return false;
        }
        self.set_frontend::<F>(key, Some(WHOLE), work);
        self.list(address, Why::Frontend, work);
        true
    }

    fn remove_address<F: Planning>(&mut self, address: IpAddr, work: &mut Work) {
        let Some(key) = F::address(address).map(whole::<F>) else { return };
        self.set_frontend::<F>(key, None, work);
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

    /// Finds room for a table of a wished size: for an update, also in the reserve; at need, and
    /// where a namespace has its share, a smaller one.
    ///
    /// `own` is how many blocks an update has that it gives back in the end; [`None`] for a new
    /// service port.
    fn find_room(
        &mut self,
        size: u32,
        own: Option<u32>,
        namespace: &str,
        work: &mut Work,
    ) -> Option<Range> {
        let mut flushed = false;
        let back = own.unwrap_or(0);
        let mut size = size;
        while size != 0 {
            let blocks = size.div_ceil(abi::SLOTS_PER_BLOCK);
            let mut start = self.take_blocks(blocks, back, namespace);
            if start.is_none() && !flushed {
                self.flush(work);
                flushed = true;
                start = self.take_blocks(blocks, back, namespace);
            }
            let smaller = maglev::smaller(size);
            // However much its namespace has, an update gets the least.
            let free = self.arena.free() + self.reserve.free() + back;
            let granted = smaller == 0 || self.grants_blocks(blocks, free, back, namespace);
            if start.is_none() && own.is_some() && granted {
                start = self.arena.take(blocks).or_else(|| self.reserve.take(blocks));
            }
            if let Some(start) = start {
                return Some(Range::new(start * abi::SLOTS_PER_BLOCK, size as u16));
            }
            work.lacks |= lack::SLOTS;
            size = smaller;
        }
        None
    }

    fn take_blocks(&mut self, blocks: u32, back: u32, namespace: &str) -> Option<u32> {
        if self.grants_blocks(blocks, self.arena.free() + back, back, namespace) {
            self.arena.take(blocks)
        } else {
            None
        }
    }

    /// Whether a namespace that gives some blocks back gets others, while so many are as good as
    /// free.
    fn grants_blocks(&self, blocks: u32, free: u32, back: u32, namespace: &str) -> bool {
        grant(self.slot_shares.held(namespace).saturating_sub(back), free, blocks) == blocks
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

    /// Sets the bit of a port number after a frontend with it came; after it went, clears it when
    /// many others have gone after it.
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

    /// Writes which frontends lead to an endpoint: the first few, in order. A node port is none of
    /// them: it has no address of its own that a reply could show.
    ///
    /// However many service ports share the endpoint, only the first few are looked at.
    fn refresh_origins<F: Planning>(&mut self, endpoint: OriginKey<F::Address>, work: &mut Work) {
        let mut origins = abi::Origins::default();
        let wanted = origins.frontends.len();
        let mut frontends: BTreeSet<(F::Address, u16)> = BTreeSet::new();
        let first = (endpoint, (F::Address::default(), 0), 0);
        let users =
            F::of_plan(self).users.range(first..).take_while(|(other, ..)| *other == endpoint);
        let users: Vec<User<F::Address>> = users.take(wanted).copied().collect();
        for (_, _, id) in users {
            let planned = self.planned.get(&id);
            frontends.extend(planned.into_iter().flat_map(visible::<F>).take(wanted));
        }
        for (origin, (address, port)) in origins.frontends.iter_mut().zip(&frontends) {
            *origin = abi::Origin { address: *address, port: *port, reserved: 0 };
        }
        let origins = (!frontends.is_empty()).then_some(origins);
        if F::of(&self.image).origins.get(&endpoint) != origins.as_ref() {
            work.draft.set_origins::<F>(&mut self.image, endpoint, origins);
        }
    }

    /// Sets or removes a frontend.
    fn set_frontend<F: Planning>(
        &mut self,
        key: ServiceKey<F::Address>,
        service: Option<Service>,
        work: &mut Work,
    ) {
        let before = F::of(&self.image).services.get(&key).copied();
        for (service, counts) in [(before, (1, 0)), (service, (0, 1))] {
            if let Some(namespace) =
                service.and_then(|service| self.namespace(service.service_port))
            {
                F::of_plan(self).frontends.change(&namespace, counts.0, counts.1);
            }
        }
        work.draft.set_service::<F>(&mut self.image, key, service);
    }

    /// Lets a source in, or no longer.
    fn set_source<F: Planning>(
        &mut self,
        key: SourceKey<F::Address>,
        permitted: bool,
        work: &mut Work,
    ) {
        let before = F::of(&self.image).source_ranges.contains_key(&key);
        if let Some(namespace) = self.namespace(key.service_port) {
            F::of_plan(self).sources.change(&namespace, before.into(), permitted.into());
        }
        work.draft.set_source::<F>(&mut self.image, key, permitted);
    }

    /// The namespace of a service port.
    fn namespace(&self, id: u32) -> Option<Arc<str>> {
        self.planned.get(&id).map(|planned| planned.key.service.namespace.clone())
    }
}

/// The frontends of a service port that a reply may show, in order.
fn visible<F: Stack>(planned: &Planned) -> impl Iterator<Item = (F::Address, u16)> {
    let frontends = planned.frontends.iter().filter(|(_, kind)| **kind != FrontendKind::NodePort);
    frontends.filter_map(|((vip, port), _)| Some((F::address(*vip)?, *port)))
}

/// How old a Service is, for comparison: the first of all is served first, as arbitration has it.
fn rank<'a>(name: &'a ObjectName, desired: &Desired) -> (bool, Option<i64>, &'a ObjectName) {
    (desired.created.is_none(), desired.created, name)
}

/// Which frontends of a service port are planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    /// ClusterIPs, and those of the others that take no more room.
    ClusterIps,
    /// All.
    All,
}

/// How many blocks some ranges take.
fn blocks(ranges: &[u64; 3]) -> u32 {
    let distinct: BTreeSet<u64> = ranges.iter().copied().collect();
    distinct.into_iter().map(|range| Range(range).size().div_ceil(abi::SLOTS_PER_BLOCK)).sum()
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
        services.contains_key(&ServiceKey {
            address,
            port,
            protocol: protocol.number(),
            reserved: 0,
        })
    })
}
