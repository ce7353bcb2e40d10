//! One service port: find ids and room first, then change the image, so that a draft can end
//! between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sluice_common::abi::{
    self, Backend, Class, NAME_MAX, Name, Range, Service, ServiceKey, ServicePort, backend,
    frontend, policy,
};
use sluice_common::maglev::{self, Turn};

use super::ids::BackendIds;
use super::listing::Why;
use super::shares::grant;
use super::{Held, Plan, Planned, Planning, Which, Work, blocks, endpoint, lack, visible};
use crate::image::{CLASSES, SourceKey, map};
use crate::model::desired::PortKey;
use crate::model::report::{Flaw, Note};
use crate::model::{DesiredBackend, DesiredPort, FrontendKind};

/// The ranges that a service port gets.
struct Tables {
    ranges: [Range; 3],
    /// The ranges that are new or overwritten, with their content.
    fresh: Vec<(Range, Vec<u32>)>,
}

/// The ranges that a service port has before an update.
struct OldTables {
    ranges: [Range; 3],
    /// Whether the ranges are known to hold the tables of the planned backends. Adopted ones are
    /// not.
    verified: bool,
    /// Ranges whose content is known, with the backends that it is a table of.
    known: Vec<(Vec<u32>, Range)>,
    /// A range that the update may overwrite if there is no other room, since none of its classes
    /// keeps it.
    spare: Option<Range>,
}

impl Plan {
    /// Plans a service port that exists or shall.
    pub(super) fn plan_port<F: Planning>(
        &mut self,
        key: &PortKey,
        desired: &DesiredPort,
        work: &mut Work,
        notes: &mut Vec<Note>,
    ) {
        let known = self.ids.get(key).copied();
        let Some(id) = known.or_else(|| self.port_id(&key.service.namespace, work)) else {
            work.lacks |= lack::PORTS;
            notes.push(Note::new(
                Flaw::NoRoom,
                key.field(),
                "no service port is free: it is not served",
            ));
            return;
        };
        let (held, given) = self.hold::<F>(id, key, desired, work, notes);
        let Some(tables) =
            self.tables::<F>(id, &held, known.is_some(), (key, desired), work, notes)
        else {
            notes.push(Note::new(Flaw::NoRoom, key.field(), "no slots are free: it is not served"));
            for held in held.into_values() {
                F::of_plan(self).ids.retire(held.id, None);
            }
            self.port_ids.give(id);
            return;
        };
        let planned = self.planned.entry(id).or_insert_with(|| Planned {
            key: key.clone(),
            frontends: BTreeMap::new(),
            backends: BTreeMap::new(),
            verified: true,
        });
        planned.verified = true;
        let old_first = visible::<F>(planned).next();
        let old = std::mem::replace(&mut planned.backends, held);
        let counts = (old.len() as u32, planned.backends.len() as u32);
        F::of_plan(self).backends.change(&key.service.namespace, counts.0, counts.1);
        if self.ids.insert(key.clone(), id).is_none() {
            self.port_shares.change(&key.service.namespace, 0, 1);
        }

        self.write_name(id, key, desired.number, work);
        self.write_policies::<F>(id, key, desired, work, notes);
        let stale = self.write_backends::<F>(id, &old, &given, desired, work);
        self.write_tables(id, tables, work);
        self.move_users::<F>(id, key, &stale, old_first, work);
        // What does not fit now is told when all that may be planned before it has been.
        self.plan_port_frontends::<F>(id, desired, Which::ClusterIps, work, &mut Vec::new());
    }

    /// Plans the frontends of a service port that is planned.
    pub(super) fn plan_port_frontends<F: Planning>(
        &mut self,
        id: u32,
        desired: &DesiredPort,
        which: Which,
        work: &mut Work,
        notes: &mut Vec<Note>,
    ) {
        let Some(planned) = self.planned.get(&id) else { return };
        let (key, old_first) = (planned.key.clone(), visible::<F>(planned).next());
        if self.write_frontends::<F>(id, desired, which, work, notes) {
            let all = self
                .planned
                .get(&id)
                .into_iter()
                .flat_map(|planned| planned.backends.keys().copied());
            let all = all.collect();
            self.move_users::<F>(id, &key, &all, old_first, work);
        }
    }

    /// Brings up to date which frontends lead to endpoints of a service port.
    fn move_users<F: Planning>(
        &mut self,
        id: u32,
        key: &PortKey,
        endpoints: &BTreeSet<(IpAddr, u16)>,
        old_first: Option<(F::Address, u16)>,
        work: &mut Work,
    ) {
        let first = self.planned.get(&id).and_then(|planned| visible::<F>(planned).next());
        for at in endpoints {
            let Some(address) = F::address(at.0) else { continue };
            let endpoint = endpoint::<F>(address, at.1, key);
            let held =
                self.planned.get(&id).is_some_and(|planned| planned.backends.contains_key(at));
            let users = &mut F::of_plan(self).users;
            if let Some(old_first) = old_first {
                let _ = users.remove(&(endpoint, old_first, id));
            }
            if let Some(first) = first.filter(|_| held) {
                let _ = users.insert((endpoint, first, id));
            }
            self.refresh_origins::<F>(endpoint, work);
        }
    }

    /// Removes a service port.
    pub(super) fn remove_port<F: Planning>(&mut self, key: &PortKey, work: &mut Work) {
        let Some(id) = self.ids.remove(key) else { return };
        let nothing = DesiredPort::default();
        let mut notes = Vec::new();
        self.plan_port_frontends::<F>(id, &nothing, Which::All, work, &mut notes);
        let old = self
            .planned
            .get_mut(&id)
            .map(|planned| std::mem::take(&mut planned.backends))
            .unwrap_or_default();
        F::of_plan(self).backends.change(&key.service.namespace, old.len() as u32, 0);
        self.port_shares.change(&key.service.namespace, 1, 0);
        self.write_policies::<F>(id, key, &nothing, work, &mut notes);
        let _ = self.write_backends::<F>(id, &old, &BTreeSet::new(), &nothing, work);
        self.write_tables(id, Tables { ranges: [Range(0); 3], fresh: Vec::new() }, work);
        work.draft.set_port(&mut self.image, id, None);
        work.draft.set::<map::Names>(&mut self.image, id, None);
        let _ = self.planned.remove(&id);
        F::of_plan(self).ids.disown(id, F::Address::default());
        self.limbo.ports.push(id);
    }

    fn port_id(&mut self, namespace: &str, work: &mut Work) -> Option<u32> {
        let held = self.port_shares.held(namespace);
        if grant(held, self.port_ids.free(), 1) == 0 {
            self.flush(work);
        }
        if grant(held, self.port_ids.free(), 1) == 0 { None } else { self.port_ids.take() }
    }

    /// Finds an id for each backend: the one it has, the one it had, or one that is given to it
    /// now. Returns the latter again apart.
    fn hold<F: Planning>(
        &mut self,
        service_port: u32,
        key: &PortKey,
        desired: &DesiredPort,
        work: &mut Work,
        notes: &mut Vec<Note>,
    ) -> (BTreeMap<(IpAddr, u16), Held>, BTreeSet<u32>) {
        let mut held = BTreeMap::new();
        let mut given = BTreeSet::new();
        let mut missing = 0_u32;
        let mut flushed = false;
        let old = self.planned.get(&service_port).map(|planned| &planned.backends);
        let leaving =
            old.map_or(0, |old| old.keys().filter(|at| !desired.backends.contains_key(at)).count());
        let leaving = leaving as u32;
        // Those that leave are as good as free.
        let mut mine =
            F::of_plan(self).backends.held(&key.service.namespace).saturating_sub(leaving);
        let granted = |ids: &BackendIds<F::Address>, mine: u32| {
            ids.free() > 0 && grant(mine, ids.free() + leaving, 1) > 0
        };
        for (at, want) in &desired.backends {
            let Some(address) = F::address(at.0) else { continue };
            let known = self
                .planned
                .get(&service_port)
                .and_then(|planned| planned.backends.get(at))
                .map(|held| held.id);
            let mut id = known;
            if id.is_none() {
                if !flushed && !granted(&F::of_plan(self).ids, mine) {
                    self.flush(work);
                    flushed = true;
                }
                let ids = &mut F::of_plan(self).ids;
                if granted(ids, mine) {
                    mine += 1;
                    id = ids.revive((service_port, address, at.1));
                    if id.is_none() {
                        id = ids.take();
                        given.extend(id);
                    }
                }
            }
            match id {
                Some(id) => {
                    let _ = held.insert(*at, Held { id, selected: want.selected });
                }
                None => missing += 1,
            }
        }
        if missing > 0 {
            work.lacks |= lack::of::<F>(lack::BACKENDS);
            let what =
                format!("no backend id is free for {missing} endpoints: they get no traffic");
            notes.push(Note::new(Flaw::NoRoom, key.field(), what));
        }
        (held, given)
    }

    /// Finds a range for each class, the same one for classes with the same backends. Returns
    /// [`None`] if there is no room for a service port that is new.
    fn tables<F: Planning>(
        &mut self,
        id: u32,
        held: &BTreeMap<(IpAddr, u16), Held>,
        update: bool,
        (key, desired): (&PortKey, &DesiredPort),
        work: &mut Work,
        notes: &mut Vec<Note>,
    ) -> Option<Tables> {
        let wanted = CLASSES.map(|class| selected(held, class as usize));
        let mut old = self.old_tables(id, &wanted);
        let back = update.then(|| blocks(&old.ranges.map(|range| range.0)));
        let empty = desired.drops.map(|drops| if drops { Range::DROP } else { Range(0) });
        let mut tables = Tables { ranges: empty, fresh: Vec::new() };
        for (class, ids) in wanted.into_iter().enumerate() {
            if ids.is_empty() {
                continue;
            }
            let size = maglev::size(ids.len() as u32);
            let same = old.known.iter().find(|(other, _)| *other == ids).map(|(_, range)| *range);
            if let Some(range) =
                same.filter(|range| range.size() == size || tables.ranges.contains(range))
            {
                tables.ranges[class] = range;
                continue;
            }
            let adopted = old.ranges[class];
            if !old.verified
                && adopted.size() == size
                && !tables.fresh.iter().any(|(fresh, _)| fresh.start() == adopted.start())
                && self.image.slots.get(&adopted.start()) == Some(&table::<F>(held, class, size))
            {
                tables.ranges[class] = adopted;
                old.known.push((ids, adopted));
                continue;
            }
            let namespace = &key.service.namespace;
            let Some(range) = self.find_range(size, same, back, namespace, &mut old.spare, work)
            else {
                if update {
                    let what = "no slots are free: it has no backends for now";
                    notes.push(Note::new(Flaw::NoRoom, key.field(), what));
                    continue;
                }
                for (range, _) in tables.fresh {
                    self.release(range);
                }
                return None;
            };
            note_size(ids.len(), size, range, key, notes);
            if Some(range) != same {
                tables.fresh.push((range, table::<F>(held, class, range.size())));
            }
            tables.ranges[class] = range;
            old.known.retain(|(other, _)| *other != ids);
            old.known.push((ids, range));
        }
        Some(tables)
    }

    /// Returns the ranges that a service port has, given the backends that it shall have.
    fn old_tables(&self, id: u32, wanted: &[Vec<u32>; 3]) -> OldTables {
        let planned = self.planned.get(&id);
        let ranges = self.image.ports.get(&id).map_or([Range(0); 3], |port| port.ranges.map(Range));
        let verified = planned.is_none_or(|planned| planned.verified);
        let mut known = Vec::new();
        if let Some(planned) = planned.filter(|planned| planned.verified) {
            let of_class = |class: Class| selected(&planned.backends, class as usize);
            let all = CLASSES.map(of_class).into_iter().zip(ranges);
            known.extend(all.filter(|(_, range)| range.size() != 0));
        }
        let stays =
            |range: &Range| known.iter().any(|(ids, old)| old == range && wanted.contains(ids));
        let spare = ranges.into_iter().find(|range| range.size() != 0 && !stays(range));
        OldTables { ranges, verified, known, spare }
    }

    /// Finds a range for a table of the given size.
    ///
    /// `same` is a range of another size with the right content: it stays if there is no larger
    /// one. If there is no room at all, `spare` is overwritten.
    fn find_range(
        &mut self,
        size: u32,
        same: Option<Range>,
        back: Option<u32>,
        namespace: &str,
        spare: &mut Option<Range>,
        work: &mut Work,
    ) -> Option<Range> {
        match (self.find_room(size, back, namespace, work), same) {
            (Some(range), Some(same)) if range.size() <= same.size() => {
                self.release(range);
                Some(same)
            }
            (Some(range), _) => Some(range),
            (None, Some(same)) => Some(same),
            (None, None) => spare.take().map(|spare| {
                let mut size = size;
                while size > spare.size() {
                    size = maglev::smaller(size);
                }
                Range::new(spare.start(), size as u16)
            }),
        }
    }

    fn write_name(&mut self, id: u32, key: &PortKey, number: u16, work: &mut Work) {
        let name = name(key, number);
        if self.image.names.get(&id) != Some(&name) {
            work.draft.set::<map::Names>(&mut self.image, id, Some(name));
        }
        if !self.image.ports.contains_key(&id) {
            work.draft.set_port(&mut self.image, id, Some(ServicePort::default()));
        }
    }

    /// Writes affinity, flags, and who is let in.
    fn write_policies<F: Planning>(
        &mut self,
        id: u32,
        key: &PortKey,
        desired: &DesiredPort,
        work: &mut Work,
        notes: &mut Vec<Note>,
    ) {
        let known: BTreeSet<SourceKey<F::Address>> = self.image.source_ranges::<F>(id).collect();
        let wanted: BTreeSet<SourceKey<F::Address>> = desired
            .sources
            .iter()
            .flatten()
            .filter_map(|range| {
                let network = F::address(range.network())?;
                Some(SourceKey { service_port: id, length: range.prefix_len(), network })
            })
            .collect();
        for key in known.difference(&wanted) {
            self.set_source::<F>(*key, false, work);
            work.freed = true;
        }
        let new: Vec<SourceKey<F::Address>> = wanted.difference(&known).copied().collect();
        let held = F::of_plan(self).sources.held(&key.service.namespace);
        let granted = grant(held, self.free_sources::<F>(), new.len() as u32) as usize;
        let missing = new.len() - granted;
        // Without all of its ranges nobody begins to be served: their clients would be dropped, and
        // not know why.
        let is_served = missing == 0 || known.intersection(&wanted).next().is_some();
        if is_served {
            for key in new.into_iter().take(granted) {
                self.set_source::<F>(key, true, work);
            }
        }
        if missing > 0 {
            work.lacks |= lack::of::<F>(lack::SOURCES);
            let what = if is_served {
                format!("no room for {missing} of its source ranges: clients there are dropped")
            } else {
                format!(
                    "no room for its {} source ranges: its load balancer's addresses are not served",
                    wanted.len()
                )
            };
            notes.push(Note::new(Flaw::NoRoom, key.field(), what));
        }
        let policies = desired.policies;
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(policies.external_local && policies.external, policy::EXTERNAL_LOCAL)
            | flag(desired.sources.is_some() && is_served, policy::SOURCE_RANGES);
        let port = self.image.ports.get(&id).copied().unwrap_or_default();
        let new = ServicePort { affinity_seconds: desired.affinity_seconds, flags, ..port };
        if new != port {
            work.draft.set_port(&mut self.image, id, Some(new));
        }
    }

    /// Writes the backends that came or changed and retires those that left. Returns who came or
    /// left.
    fn write_backends<F: Planning>(
        &mut self,
        id: u32,
        old: &BTreeMap<(IpAddr, u16), Held>,
        given: &BTreeSet<u32>,
        desired: &DesiredPort,
        work: &mut Work,
    ) -> BTreeSet<(IpAddr, u16)> {
        let mut changed = BTreeSet::new();
        let held =
            self.planned.get(&id).map(|planned| planned.backends.clone()).unwrap_or_default();
        for (at, Held { id: backend_id, .. }) in &held {
            let Some(address) = F::address(at.0) else { continue };
            let flags = flags(desired.backends.get(at));
            let before = F::of(&self.image).backends.get(backend_id).copied();
            let generation = match before {
                Some(before) if given.contains(backend_id) => {
                    before.generation.wrapping_add(1).max(1)
                }
                Some(before) => before.generation,
                None => 1,
            };
            let backend = Backend { address, port: at.1, generation, service_port: id, flags };
            if before != Some(backend) {
                work.draft.set_backend::<F>(&mut self.image, *backend_id, backend);
                if before.map(|before| before.address) != Some(address) {
                    self.list(at.0, Why::Backend, work);
                    if let Some(before) = before {
                        self.unlist(F::ip(before.address), Why::Backend, work);
                    }
                }
            }
            if !old.contains_key(at) {
                let _ = changed.insert(*at);
            }
        }
        for (at, left) in old {
            if held.contains_key(at) {
                continue;
            }
            if let Some(backend) = F::of(&self.image).backends.get(&left.id).copied() {
                work.draft.set_backend::<F>(
                    &mut self.image,
                    left.id,
                    Backend { flags: 0, ..backend },
                );
            }
            F::leaving(&mut self.limbo).push(left.id);
            let _ = changed.insert(*at);
        }
        changed
    }

    /// Writes the tables and flips to them.
    fn write_tables(&mut self, id: u32, tables: Tables, work: &mut Work) {
        let port = self.image.ports.get(&id).copied().unwrap_or_default();
        let fresh: BTreeSet<u32> = tables.fresh.iter().map(|(range, _)| range.start()).collect();
        for old in port.ranges.map(Range).into_iter().collect::<BTreeSet<_>>() {
            if old.size() != 0 && !tables.ranges.contains(&old) {
                if !fresh.contains(&old.start()) {
                    work.draft.set::<map::Slots>(&mut self.image, old.start(), None);
                    self.limbo.ranges.push(old);
                } else if let Some(kept) =
                    tables.ranges.iter().find(|range| range.start() == old.start())
                {
                    // Overwritten by a smaller one: its tail is free.
                    let blocks = |range: Range| range.size().div_ceil(abi::SLOTS_PER_BLOCK);
                    let tail = (blocks(old) - blocks(*kept)) * abi::SLOTS_PER_BLOCK;
                    if tail != 0 {
                        let start = old.start() + blocks(*kept) * abi::SLOTS_PER_BLOCK;
                        self.limbo.ranges.push(Range::new(start, tail as u16));
                    }
                }
            }
        }
        for (range, backends) in tables.fresh {
            work.draft.set::<map::Slots>(&mut self.image, range.start(), Some(backends));
        }
        let ranges = tables.ranges.map(|range| range.0);
        if let Some(namespace) = self.namespace(id) {
            self.slot_shares.change(&namespace, blocks(&port.ranges), blocks(&ranges));
        }
        if port.ranges != ranges {
            work.draft.set_port(&mut self.image, id, Some(ServicePort { ranges, ..port }));
        }
    }

    /// Inserts new frontends and removes old ones. Returns whether there were any.
    fn write_frontends<F: Planning>(
        &mut self,
        id: u32,
        desired: &DesiredPort,
        which: Which,
        work: &mut Work,
        notes: &mut Vec<Note>,
    ) -> bool {
        let Some(planned) = self.planned.get(&id) else { return false };
        let (old, port_key) = (planned.frontends.clone(), planned.key.clone());
        let key = |address: F::Address, port: u16| ServiceKey {
            address,
            port,
            protocol: port_key.protocol.number(),
            reserved: 0,
        };
        let flags = self.image.ports.get(&id).map_or(0, |port| port.flags);
        let balanced = desired.sources.is_none() || flags & policy::SOURCE_RANGES != 0;
        let services = &F::of(&self.image).services;
        let wanted: BTreeMap<(IpAddr, u16), FrontendKind> = desired
            .frontends
            .iter()
            .filter(|(_, kind)| balanced || **kind != FrontendKind::LoadBalancer)
            .filter(|(at, kind)| {
                let is_there = || {
                    F::address(at.0)
                        .is_some_and(|address| services.contains_key(&key(address, at.1)))
                };
                which == Which::All || **kind == FrontendKind::ClusterIp || is_there()
            })
            .map(|(at, kind)| (*at, *kind))
            .collect();
        if old == wanted {
            return false;
        }
        for (vip, port) in old.keys().filter(|at| !wanted.contains_key(at)) {
            if let Some(address) = F::address(*vip) {
                self.remove_frontend::<F>(id, key(address, *port), work);
            }
        }
        let mut served = BTreeMap::new();
        for ((vip, port), kind) in wanted {
            let Some(address) = F::address(vip) else { continue };
            let service = Service { service_port: id, kind: kind_number(kind) };
            if self.insert_frontend::<F>(key(address, port), service, &port_key, work) {
                let _ = served.insert((vip, port), kind);
            } else {
                let what = format!("no frontend is free: {vip}:{port} is not served");
                notes.push(Note::new(Flaw::NoRoom, port_key.field(), what));
            }
        }
        if let Some(planned) = self.planned.get_mut(&id) {
            planned.frontends = served;
        }
        true
    }

    /// Removes a frontend of a service port, unless another Service has it by now.
    fn remove_frontend<F: Planning>(
        &mut self,
        id: u32,
        key: ServiceKey<F::Address>,
        work: &mut Work,
    ) {
        let service = F::of(&self.image).services.get(&key);
        if service.is_none_or(|service| service.service_port != id) {
            return;
        }
        self.set_frontend::<F>(key, None, work);
        work.freed = true;
        let vip = F::ip(key.address);
        if vip.is_unspecified() {
            self.refresh_node_port(key.port, work);
        } else {
            self.unlist_later(vip, work);
        }
    }

    /// Inserts a frontend, or changes where it leads. Returns false if it is new and there is no
    /// room for it.
    fn insert_frontend<F: Planning>(
        &mut self,
        key: ServiceKey<F::Address>,
        service: Service,
        port: &PortKey,
        work: &mut Work,
    ) -> bool {
        let before = F::of(&self.image).services.get(&key).copied();
        let is_cluster_ip = service.kind == frontend::CLUSTER_IP;
        if before.is_none() {
            let held = F::of_plan(self).frontends.held(&port.service.namespace);
            if grant(held, self.free_frontends::<F>(is_cluster_ip), 1) == 0 {
                let bit = if is_cluster_ip { lack::CLUSTER_IPS } else { lack::FRONTENDS };
                work.lacks |= lack::of::<F>(bit);
                return false;
            }
        }
        if before != Some(service) {
            self.set_frontend::<F>(key, Some(service), work);
        }
        let vip = F::ip(key.address);
        if vip.is_unspecified() {
            self.refresh_node_port(key.port, work);
        } else if before.is_none() {
            self.list(vip, Why::Frontend, work);
        }
        true
    }
}

/// Notes that a range has fewer slots than backends, or fewer than its table should have.
fn note_size(backends: usize, size: u32, range: Range, key: &PortKey, notes: &mut Vec<Note>) {
    if backends as u32 > maglev::SIZE_MAX {
        let what =
            format!("{backends} endpoints share {} slots: some get no traffic", maglev::SIZE_MAX);
        notes.push(Note::new(Flaw::TooManyEndpoints, key.field(), what));
    }
    if range.size() < size {
        let what = format!("{} slots instead of {size}: shares are less even", range.size());
        notes.push(Note::new(Flaw::SmallTable, key.field(), what));
    }
}

/// The ids that a class selects, in order of address and port.
fn selected(held: &BTreeMap<(IpAddr, u16), Held>, class: usize) -> Vec<u32> {
    held.values().filter(|held| held.selected[class]).map(|held| held.id).collect()
}

/// The Maglev table of the backends that a class selects.
fn table<F: Planning>(held: &BTreeMap<(IpAddr, u16), Held>, class: usize, size: u32) -> Vec<u32> {
    let mut turns: Vec<Turn> = held
        .iter()
        .filter(|(_, held)| held.selected[class])
        .filter_map(|((address, port), held)| {
            Some(Turn::new::<F>(&F::address(*address)?, *port, held.id))
        })
        .collect();
    let mut slots = vec![0; size as usize];
    maglev::fill(&mut turns, &mut slots);
    slots
}

fn flags(want: Option<&DesiredBackend>) -> u32 {
    let Some(want) = want else { return 0 };
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    let selected =
        CLASSES.map(|class| flag(want.selected[class as usize], backend::SELECTED << class as u32));
    backend::SERVING
        | flag(want.local, backend::LOCAL)
        | flag(want.host, backend::HOST)
        | selected.into_iter().fold(0, |all, one| all | one)
}

fn kind_number(kind: FrontendKind) -> u32 {
    match kind {
        FrontendKind::ClusterIp => frontend::CLUSTER_IP,
        FrontendKind::LoadBalancer => frontend::LOAD_BALANCER,
        FrontendKind::ExternalIp => frontend::EXTERNAL_IP,
        FrontendKind::NodePort => frontend::NODE_PORT,
    }
}

/// The name of a service port in the maps.
fn name(key: &PortKey, number: u16) -> Name {
    let text = |text: &str| {
        let mut bytes = [0; NAME_MAX];
        for (byte, letter) in bytes.iter_mut().zip(text.bytes()) {
            *byte = letter;
        }
        bytes
    };
    Name {
        namespace: text(&key.service.namespace),
        service: text(&key.service.name),
        port: text(&key.port),
        number,
        protocol: key.protocol.number(),
        family: key.family.version(),
    }
}
