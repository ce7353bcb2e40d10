//! Computes the writes that lead from one image to another, make before break.
//!
//! New entries are written while nothing refers to them, then references flip to them, and finally
//! what nothing refers to any more is cleared:
//!
//! ```text
//! listing bits, node addresses, node port bits    (make)
//! backends, names, sources let in, slots, origins
//! policies that restrict who is let in
//! ranges flip to other slots, those of new service ports also to none
//! frontends appear
//! frontends disappear                             (break)
//! ranges flip to empty
//! policies reach their final values
//! backends that left stop serving
//! grace
//! slots, backends, names, sources, node port bits and addresses, listing bits are cleared
//! ```
//!
//! After every step, therefore, each frontend leads to a service port, the slots of each range name
//! backends of that service port, and the addresses of both are listed. Permitted sources are
//! written before the flag that keeps all others out, and that flag stays for as long as there is a
//! frontend that they may not use. Clients keep their source only while their range holds nothing
//! but local backends, since a remote one would answer them past this node.
//!
//! Two images of one plan never give one id or slot two meanings, because the plan reuses nothing
//! before the grace has passed. Two arbitrary images may. In that case the service ports concerned
//! are parked first: they have no backends while the rest is written.

use std::collections::BTreeSet;

use sluice_common::abi::{Backend, Name, Range, ServicePort, frontend, policy};
use sluice_common::{Family, V4, V6};

use super::map::{self, PlanMap, Table};
use super::{CLASSES, EntryWrite, FamilyWrite, Image, Stack, Write};

/// Returns the writes that lead from `a` to `b`: none if they are equal.
///
/// This takes time in proportion to both images. An update of one service therefore diffs images
/// that hold only what it touches.
pub fn diff(a: &Image, b: &Image) -> Vec<Write> {
    let mut writes = Vec::new();
    if let Some(parked) = park(a, b) {
        steps(a, &parked, &mut writes);
        steps(&parked, b, &mut writes);
    } else {
        steps(a, b, &mut writes);
    }
    writes
}

/// Adds the steps between two images in which no id and no slot in use changes its meaning.
fn steps(a: &Image, b: &Image, out: &mut Vec<Write>) {
    make(a, b, out);
    flip_and_break(a, b, out);
    let mut cleared = Vec::new();
    clear(a, b, &mut cleared);
    if !cleared.is_empty() {
        out.push(Write::Grace);
        out.append(&mut cleared);
    }
}

/// Writes new entries, each map before the maps that refer to it.
fn make(a: &Image, b: &Image, out: &mut Vec<Write>) {
    for (lane, bits) in &b.lanes {
        let old = a.lanes.get(lane).copied().unwrap_or(0);
        if bits & !old != 0 {
            out.push(Write::Listing { lane: *lane, bits: bits | old });
        }
    }
    insert::<map::NodeAddresses<V4>>(a, b, out);
    insert::<map::NodeAddresses<V6>>(a, b, out);
    for (word, bits) in &b.node_ports {
        let old = a.node_ports.get(word).copied().unwrap_or(0);
        if bits & !old != 0 {
            out.push(Write::NodePorts { word: *word, bits: bits | old });
        }
    }
    make_backends::<V4>(a, b, out);
    make_backends::<V6>(a, b, out);
    for (id, name) in changed::<map::Names>(a, b) {
        out.push(Write::Name { service_port: *id, name: Box::new(*name) });
    }
    insert::<map::SourceRanges<V4>>(a, b, out);
    insert::<map::SourceRanges<V6>>(a, b, out);
    for (id, port) in &b.ports {
        let old = a.ports.get(id);
        let now = set_apart(old, port);
        if old.map(apart) != Some(now) {
            out.push(Write::Port { service_port: *id, affinity_seconds: now.0, flags: now.1 });
        }
    }
    for (start, backends) in changed::<map::Slots>(a, b) {
        out.push(Write::Slots { start: *start, backends: backends.clone() });
    }
    insert::<map::Origins<V4>>(a, b, out);
    insert::<map::Origins<V6>>(a, b, out);
}

/// Flips references to the new entries and removes those to the old ones.
fn flip_and_break(a: &Image, b: &Image, out: &mut Vec<Write>) {
    for id in b.ports.keys() {
        let fresh = !a.ports.contains_key(id);
        flip(a, b, *id, out, |new| fresh || new.size() != 0);
    }
    make_services::<V4>(a, b, out);
    make_services::<V6>(a, b, out);

    remove::<map::Services<V4>>(a, b, out);
    remove::<map::Services<V6>>(a, b, out);
    for id in a.ports.keys() {
        flip(a, b, *id, out, |new| new.size() == 0);
    }
    for (id, port) in &b.ports {
        let now = apart(port);
        if set_apart(a.ports.get(id), port) != now {
            out.push(Write::Port { service_port: *id, affinity_seconds: now.0, flags: now.1 });
        }
    }
    break_flags::<V4>(a, b, out);
    break_flags::<V6>(a, b, out);
    remove::<map::Origins<V4>>(a, b, out);
    remove::<map::Origins<V6>>(a, b, out);
}

/// Clears entries that nothing refers to any more, each map after the maps that referred to it.
fn clear(a: &Image, b: &Image, out: &mut Vec<Write>) {
    for (start, backends) in gone::<map::Slots>(a, b) {
        out.push(Write::ClearSlots { start: *start, size: backends.len() as u32 });
    }
    clear_backends::<V4>(a, b, out);
    clear_backends::<V6>(a, b, out);
    for (id, _) in gone::<map::Ports>(a, b) {
        out.push(Write::ClearPort { service_port: *id });
    }
    for (id, _) in gone::<map::Names>(a, b) {
        out.push(Write::ClearName { service_port: *id });
    }
    remove::<map::SourceRanges<V4>>(a, b, out);
    remove::<map::SourceRanges<V6>>(a, b, out);
    for (word, old) in &a.node_ports {
        let bits = b.node_ports.get(word).copied().unwrap_or(0);
        if old & !bits != 0 {
            out.push(Write::NodePorts { word: *word, bits });
        }
    }
    remove::<map::NodeAddresses<V4>>(a, b, out);
    remove::<map::NodeAddresses<V6>>(a, b, out);
    for (lane, old) in &a.lanes {
        let bits = b.lanes.get(lane).copied().unwrap_or(0);
        if old & !bits != 0 {
            out.push(Write::Listing { lane: *lane, bits });
        }
    }
}

/// Returns the entries of `b` that `a` lacks or has with another value.
fn changed<'i, M: PlanMap<Key: 'i, Value: 'i>>(
    a: &'i Image,
    b: &'i Image,
) -> impl Iterator<Item = (&'i M::Key, &'i M::Value)> {
    let old = M::of(a);
    M::of(b).iter().filter(|(key, value)| old.get(key) != Some(value))
}

/// Returns the entries of `a` whose keys `b` lacks.
fn gone<'i, M: PlanMap<Key: 'i, Value: 'i>>(
    a: &'i Image,
    b: &'i Image,
) -> impl Iterator<Item = (&'i M::Key, &'i M::Value)> {
    let new = M::of(b);
    M::of(a).iter().filter(|(key, _)| !new.contains_key(key))
}

/// Inserts the entries of a table that are new or have another value.
fn insert<T: Table>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    for (key, value) in changed::<T>(a, b) {
        out.push(T::write(EntryWrite::Insert { key: *key, value: value.clone().into() }));
    }
}

/// Removes the entries of a table that `b` lacks.
fn remove<T: Table>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    for (key, _) in gone::<T>(a, b) {
        out.push(T::write(EntryWrite::Remove { key: *key }));
    }
}

/// Returns what a service port holds besides its ranges: affinity and flags.
fn apart(port: &ServicePort) -> (u32, u32) {
    (port.affinity_seconds, port.flags)
}

/// Returns affinity and flags for the time in which ranges and frontends change.
///
/// Sources are restricted if they are before or after the change, and clients keep their source
/// only if they do both before and after. Nothing uses a new service port yet, so it gets its final
/// values at once.
fn set_apart(old: Option<&ServicePort>, new: &ServicePort) -> (u32, u32) {
    let Some(old) = old else { return apart(new) };
    let flags = (old.flags | new.flags) & policy::SOURCE_RANGES
        | old.flags & new.flags & policy::EXTERNAL_LOCAL
        | new.flags & !(policy::SOURCE_RANGES | policy::EXTERNAL_LOCAL);
    (new.affinity_seconds, flags)
}

/// Flips the ranges of a service port that change and whose new value `wanted` accepts.
fn flip(a: &Image, b: &Image, id: u32, out: &mut Vec<Write>, wanted: impl Fn(Range) -> bool) {
    for class in CLASSES {
        let range = |image: &Image| {
            Range(image.ports.get(&id).map_or(0, |port| port.ranges[class as usize]))
        };
        let (old, new) = (range(a), range(b));
        if old != new && wanted(new) {
            out.push(Write::Range { service_port: id, class, range: new });
        }
    }
}

/// Returns what identifies a backend: everything but its flags.
fn identity<A: Copy>(backend: &Backend<A>) -> (A, u16, u16, u32) {
    (backend.address, backend.port, backend.generation, backend.service_port)
}

fn make_backends<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let old = &F::of(a).backends;
    for (id, new) in &F::of(b).backends {
        match old.get(id) {
            Some(old) if identity(old) == identity(new) => {
                if old.flags != new.flags && new.is_serving() {
                    out.push(F::write(FamilyWrite::BackendFlags { id: *id, flags: new.flags }));
                }
            }
            _ => out.push(F::write(FamilyWrite::Backend { id: *id, backend: *new })),
        }
    }
}

fn break_flags<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let new = &F::of(b).backends;
    for (id, old) in &F::of(a).backends {
        let flags = match new.get(id) {
            Some(new) if identity(old) != identity(new) || new.is_serving() => {
                continue;
            }
            Some(new) => new.flags,
            None => 0,
        };
        if flags != old.flags {
            out.push(F::write(FamilyWrite::BackendFlags { id: *id, flags }));
        }
    }
}

fn clear_backends<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    for (id, _) in gone::<map::Backends<F>>(a, b) {
        out.push(F::write(FamilyWrite::ClearBackend { id: *id }));
    }
}

/// Inserts frontends that are new or lead elsewhere.
///
/// The value of a frontend never changes while its key exists, so one that changes hands is removed
/// first. The entries that reject all other ports of an address come last, since the frontends of
/// its ports have to exist before.
fn make_services<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let (whole, ports): (Vec<_>, Vec<_>) = changed::<map::Services<F>>(a, b)
        .partition(|(_, service)| service.kind == frontend::ADDRESS);
    for (key, service) in ports.into_iter().chain(whole) {
        if F::of(a).services.contains_key(key) {
            out.push(map::Services::<F>::write(EntryWrite::Remove { key: *key }));
        }
        let insert = EntryWrite::Insert { key: *key, value: *service };
        out.push(map::Services::<F>::write(insert));
    }
}

/// Whether two names belong to the same service port: its number may change, the rest identifies
/// it.
pub(crate) fn same_owner(a: &Name, b: &Name) -> bool {
    let number = b.number;
    Name { number, ..*a } == *b
}

/// Returns an image between `a` and `b` in which every service port that is in the way has no
/// backends, and also no frontends if its id changes hands. Returns [`None`] if none is in the way.
fn park(a: &Image, b: &Image) -> Option<Image> {
    let evicted: BTreeSet<u32> = a
        .names
        .iter()
        .filter(|(id, name)| b.names.get(id).is_some_and(|new| !same_owner(name, new)))
        .map(|(id, _)| *id)
        .collect();
    let mut busy = overwritten_ranges(a, b);
    let v4 = changed_backends::<V4>(a, b);
    let v6 = changed_backends::<V6>(a, b);

    let mut parked = evicted.clone();
    for (id, port) in &a.ports {
        let changed = match a.names.get(id) {
            Some(name) if name.family == V6::VERSION => &v6,
            _ => &v4,
        };
        for range in port.ranges.map(Range) {
            let Some(backends) = a.slots.get(&range.start()).filter(|_| range.size() != 0) else {
                continue;
            };
            if !busy.contains(&range.start())
                && !changed.is_empty()
                && backends.iter().any(|backend| changed.contains(backend))
            {
                let _ = busy.insert(range.start());
            }
            if busy.contains(&range.start()) {
                let _ = parked.insert(*id);
            }
        }
    }
    if parked.is_empty() {
        return None;
    }

    let mut image = a.clone();
    for id in &parked {
        if let Some(port) = image.ports.get_mut(id) {
            port.ranges = [0; 3];
        }
    }
    for id in &evicted {
        let _ = image.ports.remove(id);
        let _ = image.names.remove(id);
    }
    image.v4.services.retain(|_, service| !evicted.contains(&service.service_port));
    image.v6.services.retain(|_, service| !evicted.contains(&service.service_port));
    image.v4.source_ranges.retain(|key, _| !evicted.contains(&key.service_port));
    image.v6.source_ranges.retain(|key, _| !evicted.contains(&key.service_port));
    let used: BTreeSet<u32> = image.used_ranges().map(Range::start).collect();
    image.slots.retain(|start, _| used.contains(start));
    Some(image)
}

/// Returns the ids that stand for one backend in `a` and for another in `b`.
fn changed_backends<F: Stack>(a: &Image, b: &Image) -> BTreeSet<u32> {
    let new = &F::of(b).backends;
    F::of(a)
        .backends
        .iter()
        .filter(|(id, old)| new.get(id).is_some_and(|new| identity(*old) != identity(new)))
        .map(|(id, _)| *id)
        .collect()
}

/// Returns the ranges of `a` whose slots `b` fills with something else.
fn overwritten_ranges(a: &Image, b: &Image) -> BTreeSet<u32> {
    let mut overwritten = BTreeSet::new();
    for (start, backends) in &b.slots {
        if a.slots.get(start) == Some(backends) {
            continue;
        }
        let end = start.saturating_add(backends.len() as u32);
        for (other, old) in a.slots.range(..end).rev() {
            if other.saturating_add(old.len() as u32) <= *start {
                break;
            }
            let _ = overwritten.insert(*other);
        }
    }
    overwritten
}
