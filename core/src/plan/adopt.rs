//! Adopts maps that an earlier agent filled: recovers the owner of everything in them, so that ids,
//! generations and ranges stay.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sluice_common::abi::{self, Backend, Name, Range, frontend};
use sluice_common::{Family, V4, V6};

use super::arena::Arena;
use super::ids::{BackendIds, PortIds};
use super::listing::{Lingering, Listing, Why};
use super::shares::Shares;
use super::{
    FamilyPlan, Held, Limbo, Plan, Planned, Planning, Sizes, WHOLE, Work, blocks, endpoint,
    visible, whole,
};
use crate::image::{CLASSES, Image, Stack, map};
use crate::model::desired::PortKey;
use crate::model::object::{IpFamily, Protocol};
use crate::model::{Batch, FrontendKind, ObjectName};

/// An id and its backend.
type Entry<F> = (u32, Backend<<F as Family>::Address>);

impl Plan {
    /// Creates a plan for maps that hold `image`.
    ///
    /// Set the node's addresses ([`Plan::set_node_addresses`]) before the first complete update,
    /// since that update removes everything without an owner.
    pub fn adopt(sizes: Sizes, image: Image) -> Self {
        let boundary = sizes.slot_blocks.saturating_sub(sizes.reserve_blocks);
        let mut plan = Self {
            sizes,
            ids: BTreeMap::new(),
            planned: BTreeMap::new(),
            port_ids: PortIds::new(sizes.ports, image.names.keys().copied()),
            port_shares: Shares::default(),
            slot_shares: Shares::default(),
            v4: FamilyPlan::new(backend_ids::<V4>(&image, sizes)),
            v6: FamilyPlan::new(backend_ids::<V6>(&image, sizes)),
            arena: Arena::new(0, boundary),
            reserve: Arena::new(boundary, sizes.slot_blocks),
            listing: Listing::default(),
            lingering_node_ports: Lingering::default(),
            nodes: BTreeMap::new(),
            addresses: BTreeMap::new(),
            holders: BTreeSet::new(),
            waiting: BTreeMap::new(),
            limbo: Limbo::default(),
            strays: None,
            image,
        };
        let mut strays = Vec::new();
        let mut taken = BTreeMap::new();
        for (id, name) in plan.image.names.clone() {
            let key = key(&name).filter(|key| !plan.ids.contains_key(key));
            let ranges =
                plan.image.ports.get(&id).map_or([Range(0); 3], |port| port.ranges.map(Range));
            match key {
                Some(key)
                    if plan.is_sound(id, key.family) && plan.claim_ranges(&ranges, &mut taken) =>
                {
                    let _ = plan.ids.insert(key.clone(), id);
                    plan.port_shares.change(&key.service.namespace, 0, 1);
                    plan.slot_shares.change(
                        &key.service.namespace,
                        0,
                        blocks(&ranges.map(|range| range.0)),
                    );
                    let planned = Planned {
                        key,
                        frontends: BTreeMap::new(),
                        backends: BTreeMap::new(),
                        verified: false,
                    };
                    let _ = plan.planned.insert(id, planned);
                }
                _ => strays.push(id),
            }
        }
        plan.strays = Some(strays);
        plan.adopt_family::<V4>();
        plan.adopt_family::<V6>();
        plan
    }

    /// Whether every slot of a service port holds a serving backend of its own, and no endpoint has
    /// two of them.
    fn is_sound(&self, id: u32, family: IpFamily) -> bool {
        match family {
            IpFamily::V4 => is_sound::<V4>(&self.image, id),
            IpFamily::V6 => is_sound::<V6>(&self.image, id),
        }
    }

    /// Takes the blocks of a service port's ranges. Returns false if another service port has some
    /// of them.
    fn claim_ranges(&mut self, ranges: &[Range; 3], taken: &mut BTreeMap<u32, u32>) -> bool {
        let blocks = |range: &Range| {
            let start = range.start() / abi::SLOTS_PER_BLOCK;
            (start, start + range.size().div_ceil(abi::SLOTS_PER_BLOCK))
        };
        let own: BTreeSet<(u32, u32)> =
            ranges.iter().filter(|range| range.size() != 0).map(blocks).collect();
        let mut last = 0;
        for (start, end) in &own {
            let before = taken.range(..end).next_back();
            if *start < last
                || before.is_some_and(|(_, other)| other > start)
                || *end > self.sizes.slot_blocks
            {
                return false;
            }
            last = *end;
        }
        for (start, end) in own {
            let _ = taken.insert(start, end);
            self.arena.occupy(start, end - start);
            self.reserve.occupy(start, end - start);
        }
        true
    }

    fn adopt_family<F: Planning>(&mut self) {
        let mut live: BTreeMap<u32, Vec<Entry<F>>> = BTreeMap::new();
        let backends = F::of(&self.image).backends.clone();
        for (id, backend) in &backends {
            let _ = self.listing.add(F::ip(backend.address), Why::Backend);
            let owned = self
                .planned
                .get(&backend.service_port)
                .is_some_and(|planned| planned.key.family.version() == F::VERSION);
            if owned && backend.is_serving() {
                live.entry(backend.service_port).or_default().push((*id, *backend));
            } else {
                let owner = owned.then_some((backend.service_port, backend.address, backend.port));
                F::of_plan(self).ids.retire(*id, owner);
            }
        }
        for (id, backends) in live {
            let selected = CLASSES.map(|class| -> BTreeSet<u32> {
                let range = self.image.range(id, class).unwrap_or_default();
                self.image.backends_in(range).iter().copied().collect()
            });
            for (backend_id, backend) in backends {
                let held = Held {
                    id: backend_id,
                    selected: [0, 1, 2].map(|class| selected[class].contains(&backend_id)),
                };
                let at = (F::ip(backend.address), backend.port);
                let Some(planned) = self.planned.get_mut(&id) else { continue };
                let twin = planned.backends.get(&at).copied();
                let in_use = twin.is_some_and(|twin| twin.selected.contains(&true));
                if !in_use {
                    let _ = planned.backends.insert(at, held);
                }
                if let Some(twin) = twin {
                    let spare = if in_use { backend_id } else { twin.id };
                    F::of_plan(self).ids.retire(spare, None);
                }
            }
        }
        for (key, service) in F::of(&self.image).services.clone() {
            let vip = F::ip(key.address);
            if !vip.is_unspecified() {
                let _ = self.listing.add(vip, Why::Frontend);
            }
            if let Some(namespace) = self.namespace(service.service_port) {
                F::of_plan(self).frontends.change(&namespace, 0, 1);
            }
            if let Some(planned) = self.planned.get_mut(&service.service_port)
                && let Some(kind) = kind(service.kind)
                && (kind == FrontendKind::NodePort) == vip.is_unspecified()
                && (planned.key.protocol.number(), planned.key.family.version())
                    == (key.protocol, F::VERSION)
            {
                let _ = planned.frontends.insert((vip, key.port), kind);
            }
        }
        for key in F::of(&self.image).source_ranges.keys().copied().collect::<Vec<_>>() {
            if let Some(namespace) = self.namespace(key.service_port) {
                F::of_plan(self).sources.change(&namespace, 0, 1);
            }
        }
        let mut users = BTreeSet::new();
        let mut backends = Shares::default();
        for (id, planned) in &self.planned {
            if planned.key.family.version() != F::VERSION {
                continue;
            }
            backends.change(&planned.key.service.namespace, 0, planned.backends.len() as u32);
            let Some(first) = visible::<F>(planned).next() else { continue };
            for (address, port) in planned.backends.keys() {
                let Some(address) = F::address(*address) else { continue };
                let _ = users.insert((endpoint::<F>(address, *port, &planned.key), first, *id));
            }
        }
        F::of_plan(self).users = users;
        F::of_plan(self).backends = backends;
    }

    /// Removes whatever was adopted without an owner, given all that Services want.
    pub(super) fn sweep(&mut self, batch: &Batch, work: &mut Work) {
        let Some(strays) = self.strays.take() else { return };
        for id in &strays {
            work.draft.set_port(&mut self.image, *id, None);
            work.draft.set::<map::Names>(&mut self.image, *id, None);
            self.limbo.ports.push(*id);
        }
        let used: BTreeSet<u32> = self.image.used_ranges().map(Range::start).collect();
        let unused: Vec<u32> =
            self.image.slots.keys().filter(|start| !used.contains(start)).copied().collect();
        for start in unused {
            work.draft.set::<map::Slots>(&mut self.image, start, None);
        }
        let addresses: BTreeSet<IpAddr> =
            batch.services.values().flat_map(|desired| &desired.addresses).copied().collect();
        self.sweep_family::<V4>(&addresses, work);
        self.sweep_family::<V6>(&addresses, work);
        let mut node_ports: BTreeSet<u16> = node_ports::<V4>(&self.image).collect();
        node_ports.extend(node_ports_of_bits(&self.image.node_ports));
        node_ports.extend(self::node_ports::<V6>(&self.image));
        for port in node_ports {
            self.refresh_node_port(port, work);
        }
        for (lane, bits) in &self.image.lanes {
            self.listing.adopt(*lane, *bits);
        }
        let lanes: BTreeSet<u32> =
            self.image.lanes.keys().copied().chain(self.listing.lanes()).collect();
        for lane in lanes {
            let bits = self.listing.bits(lane);
            if self.image.lanes.get(&lane).copied().unwrap_or(0) != bits {
                work.draft.set::<map::Lanes>(&mut self.image, lane, (bits != 0).then_some(bits));
            }
        }
        self.flush(work);
    }

    fn sweep_family<F: Planning>(&mut self, addresses: &BTreeSet<IpAddr>, work: &mut Work) {
        for (key, service) in F::of(&self.image).services.clone() {
            let vip = F::ip(key.address);
            let ours = self.planned.get(&service.service_port).is_some_and(|planned| {
                planned.frontends.get(&(vip, key.port)).copied() == kind(service.kind)
                    && planned.key.protocol.number() == key.protocol
            });
            let whole =
                addresses.contains(&vip) && key == whole::<F>(key.address) && service == WHOLE;
            if !ours && !whole {
                self.set_frontend::<F>(key, None, work);
                if !vip.is_unspecified() {
                    self.unlist(vip, Why::Frontend, work);
                }
            }
        }
        let sources: Vec<_> = F::of(&self.image).source_ranges.keys().copied().collect();
        for key in sources {
            if !self.planned.contains_key(&key.service_port) {
                self.set_source::<F>(key, false, work);
            }
        }
        let mut stale: BTreeSet<_> = F::of(&self.image).origins.keys().copied().collect();
        stale.extend(F::of_plan(self).users.iter().map(|(endpoint, ..)| *endpoint));
        for endpoint in stale {
            self.refresh_origins::<F>(endpoint, work);
        }
        for (id, backend) in F::of(&self.image).backends.clone() {
            let held = self
                .planned
                .get(&backend.service_port)
                .and_then(|planned| planned.backends.get(&(F::ip(backend.address), backend.port)))
                .is_some_and(|held| held.id == id);
            if !held && backend.flags != 0 {
                work.draft.set_backend::<F>(&mut self.image, id, Backend { flags: 0, ..backend });
            }
        }
    }
}

fn is_sound<F: Stack>(image: &Image, id: u32) -> bool {
    let backends = &F::of(image).backends;
    let ids: BTreeSet<u32> =
        image.ranges(id).flat_map(|range| image.backends_in(range)).copied().collect();
    let endpoints: BTreeSet<(F::Address, u16)> = ids
        .iter()
        .filter_map(|backend| backends.get(backend))
        .filter(|backend| backend.service_port == id && backend.is_serving())
        .map(|backend| (backend.address, backend.port))
        .collect();
    endpoints.len() == ids.len()
}

/// Returns the backend ids of a family: unused ids below the greatest one are free.
fn backend_ids<F: Stack>(image: &Image, sizes: Sizes) -> BackendIds<F::Address> {
    let backends = &F::of(image).backends;
    let next = backends.last_key_value().map_or(1, |(id, _)| id + 1);
    let mut ids = BackendIds::new(sizes.backends, next);
    for id in (1..next).filter(|id| !backends.contains_key(id)) {
        ids.retire(id, None);
    }
    ids
}

/// Returns the service port that a name in the maps stands for.
fn key(name: &Name) -> Option<PortKey> {
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        String::from_utf8(bytes.get(..end)?.to_vec()).ok()
    };
    Some(PortKey {
        service: ObjectName::new(&text(&name.namespace)?, &text(&name.service)?),
        port: text(&name.port)?.into(),
        protocol: Protocol::from_number(name.protocol)?,
        family: IpFamily::ALL.into_iter().find(|family| family.version() == name.family)?,
    })
}

fn kind(number: u32) -> Option<FrontendKind> {
    match number {
        frontend::CLUSTER_IP => Some(FrontendKind::ClusterIp),
        frontend::LOAD_BALANCER => Some(FrontendKind::LoadBalancer),
        frontend::EXTERNAL_IP => Some(FrontendKind::ExternalIp),
        frontend::NODE_PORT => Some(FrontendKind::NodePort),
        _ => None,
    }
}

/// Returns the port numbers of a family's node ports.
fn node_ports<F: Stack>(image: &Image) -> impl Iterator<Item = u16> {
    let keys = F::of(image).services.keys();
    keys.take_while(|key| F::ip(key.address).is_unspecified()).map(|key| key.port)
}

/// Returns the port numbers whose bits are set.
pub fn node_ports_of_bits(words: &BTreeMap<u32, u64>) -> impl Iterator<Item = u16> {
    words.iter().flat_map(|(word, bits)| {
        (0..64)
            .filter(move |bit| bits >> bit & 1 != 0)
            .filter_map(move |bit| u16::try_from(word * 64 + bit).ok())
    })
}
