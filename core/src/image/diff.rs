//! From one image to another, make before break.
//!
//! What is new is written where nothing refers to it, then referred to, then what
//! nothing refers to any more is cleared:
//!
//! ```text
//! listing bits, node addresses, node port bits    (make)
//! backends, names, sources let in, slots, origins
//! policies that restrict who is let in
//! ranges flip to other slots, those of new service ports also to none
//! frontends appear
//! frontends disappear                             (break)
//! ranges flip to empty
//! policies are as they shall be
//! backends that left stop serving
//! grace
//! slots, backends, names, sources, node port bits and addresses, listing bits are cleared
//! ```
//!
//! So after every step each frontend leads to a service port, each range's slots name backends of
//! that service port, and each of their addresses is listed. Sources are let in before those that
//! are not are kept out, and kept out for as long as there is a frontend that they may not use.
//! Clients keep their source only while their range holds nothing but local backends, since others
//! would answer them past this node.
//!
//! Two images of one plan never give one id or slot two meanings, since the plan waits for the
//! grace before it gives away what was in use. Two arbitrary images may. Then the service ports
//! concerned are parked first: they have no backends for the time it takes to write the rest.

use std::collections::BTreeSet;

use sluice_common::abi::{Backend, Name, Range, ServicePort, backend, frontend, policy};
use sluice_common::{Family, V4, V6};

use super::{CLASSES, FamilyWrite, Image, Stack, Write};

/// The steps that lead from `a` to `b`: none if they are equal.
///
/// Costs time in proportion to both images. An update of one service diffs images that hold only
/// what it touches.
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

/// The steps between two images in which ids and slots in use mean the same.
fn steps(a: &Image, b: &Image, out: &mut Vec<Write>) {
    for (lane, bits) in &b.lanes {
        let old = a.lanes.get(lane).copied().unwrap_or(0);
        if bits & !old != 0 {
            out.push(Write::Listing { lane: *lane, bits: bits | old });
        }
    }
    make_nodes::<V4>(a, b, out);
    make_nodes::<V6>(a, b, out);
    for (word, bits) in &b.node_ports {
        let old = a.node_ports.get(word).copied().unwrap_or(0);
        if bits & !old != 0 {
            out.push(Write::NodePorts { word: *word, bits: bits | old });
        }
    }
    make_backends::<V4>(a, b, out);
    make_backends::<V6>(a, b, out);
    for (id, name) in &b.names {
        if a.names.get(id) != Some(name) {
            out.push(Write::Name { service_port: *id, name: Box::new(*name) });
        }
    }
    make_sources::<V4>(a, b, out);
    make_sources::<V6>(a, b, out);
    for (id, port) in &b.ports {
        let old = a.ports.get(id);
        let now = set_apart(old, port);
        if old.map(apart) != Some(now) {
            out.push(Write::Port { service_port: *id, affinity_seconds: now.0, flags: now.1 });
        }
    }
    for (start, backends) in &b.slots {
        if a.slots.get(start) != Some(backends) {
            out.push(Write::Slots { start: *start, backends: backends.clone() });
        }
    }
    make_origins::<V4>(a, b, out);
    make_origins::<V6>(a, b, out);
    for id in b.ports.keys() {
        let fresh = !a.ports.contains_key(id);
        flip(a, b, *id, out, |new| fresh || new.size() != 0);
    }
    make_services::<V4>(a, b, out);
    make_services::<V6>(a, b, out);

    break_services::<V4>(a, b, out);
    break_services::<V6>(a, b, out);
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
    break_origins::<V4>(a, b, out);
    break_origins::<V6>(a, b, out);

    let mut cleared = Vec::new();
    for (start, backends) in &a.slots {
        if !b.slots.contains_key(start) {
            cleared.push(Write::ClearSlots { start: *start, size: backends.len() as u32 });
        }
    }
    clear_backends::<V4>(a, b, &mut cleared);
    clear_backends::<V6>(a, b, &mut cleared);
    for id in a.ports.keys().filter(|id| !b.ports.contains_key(id)) {
        cleared.push(Write::ClearPort { service_port: *id });
    }
    for id in a.names.keys().filter(|id| !b.names.contains_key(id)) {
        cleared.push(Write::ClearName { service_port: *id });
    }
    clear_sources::<V4>(a, b, &mut cleared);
    clear_sources::<V6>(a, b, &mut cleared);
    for (word, old) in &a.node_ports {
        let bits = b.node_ports.get(word).copied().unwrap_or(0);
        if old & !bits != 0 {
            cleared.push(Write::NodePorts { word: *word, bits });
        }
    }
    clear_nodes::<V4>(a, b, &mut cleared);
    clear_nodes::<V6>(a, b, &mut cleared);
    for (lane, old) in &a.lanes {
        let bits = b.lanes.get(lane).copied().unwrap_or(0);
        if old & !bits != 0 {
            cleared.push(Write::Listing { lane: *lane, bits });
        }
    }
    if !cleared.is_empty() {
        out.push(Write::Grace);
        out.append(&mut cleared);
    }
}

/// What a service port holds besides its ranges: affinity and flags.
fn apart(port: &ServicePort) -> (u32, u32) {
    (port.affinity_seconds, port.flags)
}

/// The same while ranges and frontends change: sources are kept out that are to be before or after,
/// and clients keep their source if they do before and after. Nobody uses a service port that is
/// new.
fn set_apart(old: Option<&ServicePort>, new: &ServicePort) -> (u32, u32) {
    let Some(old) = old else { return apart(new) };
    let flags = (old.flags | new.flags) & policy::SOURCE_RANGES
        | old.flags & new.flags & policy::EXTERNAL_LOCAL
        | new.flags & !(policy::SOURCE_RANGES | policy::EXTERNAL_LOCAL);
    (new.affinity_seconds, flags)
}

/// Flips those ranges of a service port that change and whose new value is wanted now.
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

/// What makes a backend the same backend: everything but its flags.
fn identity<A: Copy>(backend: &Backend<A>) -> (A, u16, u16, u32) {
    (backend.address, backend.port, backend.generation, backend.service_port)
}

fn make_backends<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let old = &F::of(a).backends;
    for (id, new) in &F::of(b).backends {
        match old.get(id) {
            Some(old) if identity(old) == identity(new) => {
                if old.flags != new.flags && new.flags & backend::SERVING != 0 {
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
            Some(new) if identity(old) != identity(new) || new.flags & backend::SERVING != 0 => {
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
    let new = &F::of(b).backends;
    for id in F::of(a).backends.keys().filter(|id| !new.contains_key(id)) {
        out.push(F::write(FamilyWrite::ClearBackend { id: *id }));
    }
}

fn make_origins<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let old = &F::of(a).origins;
    for (key, origins) in &F::of(b).origins {
        if old.get(key) != Some(origins) {
            out.push(F::write(FamilyWrite::OriginInsert {
                key: *key,
                origins: Box::new(*origins),
            }));
        }
    }
}

fn break_origins<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let new = &F::of(b).origins;
    for key in F::of(a).origins.keys().filter(|key| !new.contains_key(key)) {
        out.push(F::write(FamilyWrite::OriginRemove { key: *key }));
    }
}

fn make_sources<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let old = &F::of(a).source_ranges;
    for (key, value) in &F::of(b).source_ranges {
        if old.get(key) != Some(value) {
            out.push(F::write(FamilyWrite::SourceInsert { key: *key }));
        }
    }
}

fn clear_sources<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let new = &F::of(b).source_ranges;
    for key in F::of(a).source_ranges.keys().filter(|key| !new.contains_key(key)) {
        out.push(F::write(FamilyWrite::SourceRemove { key: *key }));
    }
}

fn make_nodes<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let old = &F::of(a).node_addresses;
    for (address, node) in &F::of(b).node_addresses {
        if old.get(address) != Some(node) {
            out.push(F::write(FamilyWrite::NodeInsert { address: *address, node: *node }));
        }
    }
}

fn clear_nodes<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let new = &F::of(b).node_addresses;
    for address in F::of(a).node_addresses.keys().filter(|address| !new.contains_key(address)) {
        out.push(F::write(FamilyWrite::NodeRemove { address: *address }));
    }
}

/// A frontend's value never changes while its key lives, so one that changes hands is removed
/// first. That the rest of an address is rejected comes last: until then its ports are not all
/// there.
fn make_services<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let old = &F::of(a).services;
    let (whole, ports): (Vec<_>, Vec<_>) =
        F::of(b).services.iter().partition(|(_, service)| service.kind == frontend::ADDRESS);
    for (key, service) in ports.into_iter().chain(whole) {
        let before = old.get(key);
        if before != Some(service) {
            if before.is_some() {
                out.push(F::write(FamilyWrite::ServiceRemove { key: *key }));
            }
            out.push(F::write(FamilyWrite::ServiceInsert { key: *key, service: *service }));
        }
    }
}

fn break_services<F: Stack>(a: &Image, b: &Image, out: &mut Vec<Write>) {
    let new = &F::of(b).services;
    for key in F::of(a).services.keys().filter(|key| !new.contains_key(key)) {
        out.push(F::write(FamilyWrite::ServiceRemove { key: *key }));
    }
}

/// Whether two names are of the same service port: the number may change, the rest is its identity.
pub(crate) fn same_owner(a: &Name, b: &Name) -> bool {
    let number = b.number;
    Name { number, ..*a } == *b
}

/// The image between `a` and `b`, in which service ports that stand in the way have no backends,
/// and no frontends where their id changes hands; [`None`] if nothing stands in the way.
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
    let used: BTreeSet<u32> = image
        .ports
        .values()
        .flat_map(|port| port.ranges.map(Range))
        .filter(|range| range.size() != 0)
        .map(Range::start)
        .collect();
    image.slots.retain(|start, _| used.contains(start));
    Some(image)
}

/// Ids that are one backend in `a` and another in `b`.
fn changed_backends<F: Stack>(a: &Image, b: &Image) -> BTreeSet<u32> {
    let new = &F::of(b).backends;
    F::of(a)
        .backends
        .iter()
        .filter(|(id, old)| new.get(id).is_some_and(|new| identity(*old) != identity(new)))
        .map(|(id, _)| *id)
        .collect()
}

/// Ranges of `a` in slots that `b` fills with something else.
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
