//! Computes the content of the maps from what Services want. It is pure, and its work is
//! proportional to what changed.
//!
//! The plan assigns ids and ranges of slots and knows their owners. What an update frees is reused
//! only after the update's own writes, and hence after the grace that ends them.
//!
//! Room. [`maglev::size`] determines the size of a range. If no gap is large enough, an update of a
//! service port that is already served takes its range from the reserve, then settles for a smaller
//! table, and finally overwrites its own range, in which case it has no backends for a moment. A
//! new service port gets a smaller table or is refused. A Service that got less than its due is
//! tried again when something becomes free.
//!
//! Fairness. A Service keeps what it has. What is free goes to older Services first, to the
//! ClusterIPs of all Services before any other frontend, and to no namespace that holds far more
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

use crate::image::{Image, PERMITTED, SourceKey, Stack, Write, map, node_port_bit};
use crate::model::desired::PortKey;
use crate::model::object::{IpFamily, Protocol};
use crate::model::report::{Flaw, Note};
use crate::model::{Batch, Desired, FrontendKind, ObjectName};
use arena::Arena;
use draft::Draft;
use ids::{BackendIds, PortIds};
use listing::{Lingering, Listing, Why};
use shares::{Shares, grant};

/// The capacity of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Service ports, including the unused id 0.
    pub ports: u32,
    /// Backends of each family, including the unused id 0.
    pub backends: u32,
    /// Frontends of each family.
    pub services: u32,
    /// Blocks of slots.
    pub slot_blocks: u32,
    /// The number of blocks at the end that only updates may use.
    pub reserve_blocks: u32,
    /// Source ranges of each family.
    pub source_ranges: u32,
    /// Addresses of this node, of each family.
    pub node_addresses: u32,
}

impl Default for Sizes {
    /// Returns the sizes of the ABI, with a reserve of one range of the largest size. One in 16
    /// frontends, source ranges and addresses is left free, since a large update inserts new
    /// entries before it removes old ones.
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

/// The most frontends that are inserted before old ones are removed (see [`Sizes::services`]).
const INSERTED_AT_ONCE: u32 = 2_048;
/// About the most backends that one draft touches, since it holds two copies of each.
const TOUCHED_AT_ONCE: u32 = 8_192;
/// The most waiting Services that are tried again together after an update that freed something.
const RETRIED_AT_ONCE: usize = 16;

/// The result of an update.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// The steps, in order.
    pub writes: Vec<Write>,
    /// For each Service that was planned, what is wrong with it now.
    pub notes: BTreeMap<ObjectName, Vec<Note>>,
}

/// The intended content of the maps, and the owner of everything in it.
#[derive(Clone, Debug)]
pub struct Plan {
    sizes: Sizes,
    image: Image,
    ids: BTreeMap<PortKey, u32>,
    planned: BTreeMap<u32, Planned>,
    port_ids: PortIds,
    /// The number of service ports of each namespace.
    port_shares: Shares,
    /// The number of blocks of slots of each namespace.
    slot_shares: Shares,
    v4: FamilyPlan<V4>,
    v6: FamilyPlan<V6>,
    arena: Arena,
    reserve: Arena,
    listing: Listing,
    lingering_node_ports: Lingering<u16>,
    /// Address of this node -> whether it serves node ports.
    nodes: BTreeMap<IpAddr, bool>,
    /// Service -> its ClusterIPs whose other ports are rejected.
    addresses: BTreeMap<ObjectName, BTreeSet<IpAddr>>,
    /// The inverse of `addresses`: several Services may claim one address.
    holders: BTreeSet<(IpAddr, ObjectName)>,
    waiting: BTreeMap<ObjectName, Waiting>,
    limbo: Limbo,
    /// Service ports in adopted maps that have no owner; [`None`] once they are swept.
    strays: Option<Vec<u32>>,
}

/// A planned service port.
#[derive(Clone, Debug)]
struct Planned {
    key: PortKey,
    frontends: BTreeMap<(IpAddr, u16), FrontendKind>,
    backends: BTreeMap<(IpAddr, u16), Held>,
    /// Whether its ranges are known to hold what [`maglev::fill`] computes for its backends.
    verified: bool,
}

/// A backend of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    id: u32,
    selected: [bool; 3],
}

/// A Service that got less than it wants and waits for more.
#[derive(Clone, Debug)]
struct Waiting {
    desired: Desired,
    /// The resources that were short: bits of [`lack`].
    lacks: u32,
}

/// Resources that may be short. The bits of IPv6 are those of IPv4 shifted by [`lack::IPV6`].
mod lack {
    pub(super) const PORTS: u32 = 1 << 0;
    pub(super) const SLOTS: u32 = 1 << 1;
    pub(super) const CLUSTER_IPS: u32 = 1 << 2;
    pub(super) const FRONTENDS: u32 = 1 << 3;
    pub(super) const BACKENDS: u32 = 1 << 4;
    pub(super) const SOURCES: u32 = 1 << 5;
    pub(super) const IPV6: u32 = 8;

    /// Returns a family's bit for a resource.
    pub(super) fn of<F: sluice_common::Family>(bit: u32) -> u32 {
        if F::VERSION == 6 { bit << IPV6 } else { bit }
    }
}

/// An endpoint, the first frontend of a service port that leads to it, and the service port.
type User<A> = (OriginKey<A>, (A, u16), u32);

/// The part of a plan that each family has its own of.
#[derive(Clone, Debug)]
struct FamilyPlan<F: Family> {
    ids: BackendIds<F::Address>,
    /// Each endpoint with every service port that it is a backend of and the least frontend of
    /// that service port. Service ports without a frontend that a reply could show are left out.
    users: BTreeSet<User<F::Address>>,
    /// The number of frontends of each namespace, without the entries that reject other ports.
    frontends: Shares,
    /// The number of backends of each namespace.
    backends: Shares,
    /// The number of source ranges of each namespace.
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

/// A family with its part of a plan.
trait Planning: Stack {
    /// Returns the family's part.
    fn of_plan(plan: &mut Plan) -> &mut FamilyPlan<Self>;
    /// Returns the backend ids that are retired at the end of the draft.
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

/// The ids and ranges that the draft frees, which must not be reused within the draft.
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
    /// Whether something became free.
    freed: bool,
    /// The resources that were short for the Service that is being planned: bits of [`lack`].
    lacks: u32,
}

impl Plan {
    /// Creates a plan for empty maps.
    pub fn new(sizes: Sizes) -> Self {
        Self::adopt(sizes, Image::default())
    }

    /// Returns the endpoints of a Service that are planned now, whichever of its ports they serve.
    pub fn endpoints(&self, service: &ObjectName) -> BTreeSet<(IpAddr, u16)> {
        let keys = self.ids.range(PortKey::first(service)..);
        let own = keys.take_while(|(key, _)| key.service == *service);
        let planned = own.filter_map(|(_, id)| self.planned.get(id));
        planned.flat_map(|planned| planned.backends.keys().copied()).collect()
    }

    /// Returns the intended content of the maps.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Returns the service port with an id.
    pub fn port(&self, id: u32) -> Option<&PortKey> {
        self.planned.get(&id).map(|planned| &planned.key)
    }

    /// Returns the id of a service port.
    pub fn id(&self, key: &PortKey) -> Option<u32> {
        self.ids.get(key).copied()
    }

    /// Plans the Services of a batch.
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
        // Services that are gone make room for the others.
        services.sort_by_key(|(name, desired)| (!desired.ports.is_empty(), rank(name, desired)));
        self.plan_services(&services, &mut work);
        self.flush(&mut work);
        if work.freed {
            while self.retry(&mut work) {}
        }
        work.update
    }

    /// Plans some of the waiting Services again. Returns whether there were any and none of them
    /// still waits: then there may be room for more of them.
    fn retry(&mut self, work: &mut Work) -> bool {
        let again = self.take_waiting();
        let left = self.waiting.len();
        let services: Vec<(&ObjectName, &Desired)> =
            again.iter().map(|(name, waiting)| (name, &waiting.desired)).collect();
        self.plan_services(&services, work);
        self.flush(work);
        !again.is_empty() && self.waiting.len() == left
    }

    /// Takes the oldest waiting Services whose namespaces would now be granted some of what they
    /// wait for.
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

    /// Whether a namespace would now be granted more of a resource that was short.
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

    /// Returns the number of free frontends; a sixteenth of all is reserved for ClusterIPs.
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

    /// Plans the node's own addresses, each with whether node ports are served there.
    ///
    /// If there are more addresses than the map holds, those without node ports are left out first.
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
            work.draft.set::<map::NodeAddresses<F>>(&mut self.image, *address, None);
        }
        for (address, node) in wanted {
            if known.get(&address) != Some(&node) {
                work.draft.set::<map::NodeAddresses<F>>(&mut self.image, address, Some(node));
            }
        }
    }

    /// Plans Services: first what all of them need to be served at their ClusterIPs, then the rest.
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
            // If a port found no room, its clients must not be rejected as if it did not exist.
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

    /// Plans a Service's ports, with their ClusterIPs and those other frontends that they have
    /// already.
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

    /// Plans the remaining frontends of a Service's ports.
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

    /// Whether every ClusterIP frontend of a Service in a family is planned.
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

    /// Plans the entries that reject all other ports of a Service's ClusterIPs.
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
                let what = format!(
                    "no frontend is free: {address} does not reject packets to undefined ports"
                );
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

    /// Returns the planned service ports of a Service.
    fn keys_of(&self, name: &ObjectName) -> Vec<PortKey> {
        let keys = self.ids.range(PortKey::first(name)..).map(|(key, _)| key);
        keys.take_while(|key| key.service == *name).cloned().collect()
    }

    /// Ends the draft. What it freed may be reused in the next one, whose writes come later.
    fn flush(&mut self, work: &mut Work) {
        let draft = std::mem::take(&mut work.draft);
        work.update.writes.append(&mut draft.writes());
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

    /// Returns the first block of the reserve.
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

    /// Finds room for a table of the given size. An update may also use the reserve. The table is
    /// smaller if there is no room, or if the namespace has its share.
    ///
    /// `own` is the number of blocks that an update gives back in the end, or [`None`] for a new
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
            // An update always gets the smallest table, however much its namespace holds.
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

    /// Whether a namespace that gives back `back` blocks is granted `blocks` of the `free` ones.
    fn grants_blocks(&self, blocks: u32, free: u32, back: u32, namespace: &str) -> bool {
        grant(self.slot_shares.held(namespace).saturating_sub(back), free, blocks) == blocks
    }

    /// Lists an address for a reason.
    fn list(&mut self, address: IpAddr, why: Why, work: &mut Work) {
        let (lane, bits) = self.listing.add(address, why);
        work.draft.set::<map::Lanes>(&mut self.image, lane, (bits != 0).then_some(bits));
    }

    /// Removes a reason for which an address is listed.
    fn unlist(&mut self, address: IpAddr, why: Why, work: &mut Work) {
        let (lane, bits) = self.listing.remove(address, why);
        work.draft.set::<map::Lanes>(&mut self.image, lane, (bits != 0).then_some(bits));
    }

    /// Unlists the address of a removed frontend once many others have been removed after it.
    fn unlist_later(&mut self, address: IpAddr, work: &mut Work) {
        if let Some((lane, bits)) = self.listing.linger(address) {
            work.draft.set::<map::Lanes>(&mut self.image, lane, (bits != 0).then_some(bits));
        }
    }

    /// Sets the bit of a node port that has a frontend. Clears the bit of one that has none once
    /// many others have been removed after it.
    fn refresh_node_port(&mut self, port: u16, work: &mut Work) {
        let is_set = self.image.is_node_port(port);
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

    fn set_node_port_bit(&mut self, port: u16, is_set: bool, work: &mut Work) {
        let (word, bit) = node_port_bit(port);
        let before = self.image.node_ports.get(&word).copied().unwrap_or(0);
        let bits = if is_set { before | bit } else { before & !bit };
        work.draft.set::<map::NodePorts>(&mut self.image, word, (bits != 0).then_some(bits));
    }

    /// Writes the first few frontends that lead to an endpoint, in order. A node port is not among
    /// them, since it has no address of its own that a reply could show.
    ///
    /// However many service ports share the endpoint, only the first few are examined.
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
            work.draft.set::<map::Origins<F>>(&mut self.image, endpoint, origins);
        }
    }

    /// Sets or removes a frontend, and counts it for its namespace.
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

    /// Permits or removes a source range, and counts it for its namespace.
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
        work.draft.set::<map::SourceRanges<F>>(
            &mut self.image,
            key,
            permitted.then_some(PERMITTED),
        );
    }

    /// Returns the namespace of a service port.
    fn namespace(&self, id: u32) -> Option<Arc<str>> {
        self.planned.get(&id).map(|planned| planned.key.service.namespace.clone())
    }
}

/// Returns the frontends of a service port that a reply may show, in order.
fn visible<F: Stack>(planned: &Planned) -> impl Iterator<Item = (F::Address, u16)> {
    let frontends = planned.frontends.iter().filter(|(_, kind)| **kind != FrontendKind::NodePort);
    frontends.filter_map(|((vip, port), _)| Some((F::address(*vip)?, *port)))
}

/// Returns a key that orders Services by age, oldest first, as claims are settled.
fn rank<'a>(name: &'a ObjectName, desired: &Desired) -> (bool, Option<i64>, &'a ObjectName) {
    (desired.created.is_none(), desired.created, name)
}

/// The frontends of a service port that are planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    /// ClusterIPs, and other frontends that exist already.
    ClusterIps,
    /// All of them.
    All,
}

/// Returns the number of blocks that ranges occupy.
fn blocks(ranges: &[u64; 3]) -> u32 {
    let distinct: BTreeSet<u64> = ranges.iter().copied().collect();
    distinct.into_iter().map(|range| Range(range).size().div_ceil(abi::SLOTS_PER_BLOCK)).sum()
}

/// Returns the key of an endpoint in `origins`.
fn endpoint<F: Stack>(address: F::Address, port: u16, key: &PortKey) -> OriginKey<F::Address> {
    OriginKey { address, port, protocol: key.protocol.number(), reserved: 0 }
}

/// Returns the key of the entry that rejects all other ports of a ClusterIP.
fn whole<F: Stack>(address: F::Address) -> ServiceKey<F::Address> {
    ServiceKey { address, port: 0, protocol: 0, reserved: 0 }
}

/// The value of the entry that rejects all other ports of a ClusterIP.
const WHOLE: Service = Service { service_port: 0, kind: frontend::ADDRESS };

/// Whether a node port has a frontend in a family.
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
