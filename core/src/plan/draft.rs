//! An update in the making: what it touched, as it was before.
//!
//! The update's writes are the difference of two images that hold only what was touched,
//! so that they cost nothing for the rest of the cluster.

use std::collections::BTreeMap;

use sluice_common::abi::{
    Backend, Name, NodeAddress, OriginKey, Origins, Service, ServiceKey, ServicePort,
};
use sluice_common::{Family, V4, V6};

use crate::image::{FamilyImage, Image, PERMITTED, SourceKey, Stack, Write, diff};

/// The keys of one map that were touched, with what they led to before.
type Old<K, V> = BTreeMap<K, Option<V>>;

/// What an update touched.
#[derive(Debug, Default)]
pub(super) struct Draft {
    v4: FamilyDraft<V4>,
    v6: FamilyDraft<V6>,
    ports: Old<u32, ServicePort>,
    names: Old<u32, Name>,
    slots: Old<u32, Vec<u32>>,
    lanes: Old<u32, u8>,
    node_ports: Old<u32, u64>,
    /// Frontends that the update inserts.
    pub(super) inserted: u32,
    /// Backends that the update writes.
    pub(super) touched: u32,
}

#[derive(Debug)]
pub(super) struct FamilyDraft<F: Family> {
    services: Old<ServiceKey<F::Address>, Service>,
    backends: Old<u32, Backend<F::Address>>,
    origins: Old<OriginKey<F::Address>, Origins<F::Address>>,
    source_ranges: Old<SourceKey<F::Address>, u32>,
    node_addresses: Old<F::Address, NodeAddress>,
}

impl<F: Family> Default for FamilyDraft<F> {
    fn default() -> Self {
        Self {
            services: Old::new(),
            backends: Old::new(),
            origins: Old::new(),
            source_ranges: Old::new(),
            node_addresses: Old::new(),
        }
    }
}

/// A family's part of a draft.
pub(super) trait Drafted: Stack {
    /// The part.
    fn of_draft(draft: &mut Draft) -> &mut FamilyDraft<Self>;
}

impl Drafted for V4 {
    fn of_draft(draft: &mut Draft) -> &mut FamilyDraft<Self> {
        &mut draft.v4
    }
}

impl Drafted for V6 {
    fn of_draft(draft: &mut Draft) -> &mut FamilyDraft<Self> {
        &mut draft.v6
    }
}

/// Sets or removes a value and remembers what was there first.
fn set<K: Ord + Clone, V>(
    live: &mut BTreeMap<K, V>,
    old: &mut Old<K, V>,
    key: K,
    value: Option<V>,
) {
    let before = match value {
        Some(value) => live.insert(key.clone(), value),
        None => live.remove(&key),
    };
    let _ = old.entry(key).or_insert(before);
}

fn before<K: Ord + Clone, V: Clone>(old: &Old<K, V>) -> BTreeMap<K, V> {
    old.iter().filter_map(|(key, value)| Some((key.clone(), value.clone()?))).collect()
}

fn after<K: Ord + Clone, V: Clone>(old: &Old<K, V>, live: &BTreeMap<K, V>) -> BTreeMap<K, V> {
    old.keys().filter_map(|key| Some((key.clone(), live.get(key)?.clone()))).collect()
}

impl Draft {
    pub(super) fn set_port(&mut self, image: &mut Image, id: u32, port: Option<ServicePort>) {
        set(&mut image.ports, &mut self.ports, id, port);
        // The name tells the family of the service port's slots.
        let _ = self.names.entry(id).or_insert_with(|| image.names.get(&id).copied());
    }

    pub(super) fn set_name(&mut self, image: &mut Image, id: u32, name: Option<Name>) {
        set(&mut image.names, &mut self.names, id, name);
    }

    pub(super) fn set_slots(&mut self, image: &mut Image, start: u32, backends: Option<Vec<u32>>) {
        set(&mut image.slots, &mut self.slots, start, backends);
    }

    pub(super) fn set_lane(&mut self, image: &mut Image, lane: u32, bits: u8) {
        set(&mut image.lanes, &mut self.lanes, lane, (bits != 0).then_some(bits));
    }

    pub(super) fn set_node_ports(&mut self, image: &mut Image, word: u32, bits: u64) {
        set(&mut image.node_ports, &mut self.node_ports, word, (bits != 0).then_some(bits));
    }

    pub(super) fn set_source<F: Drafted>(
        &mut self,
        image: &mut Image,
        key: SourceKey<F::Address>,
        permitted: bool,
    ) {
        let value = permitted.then_some(PERMITTED);
        set(&mut F::of_mut(image).source_ranges, &mut F::of_draft(self).source_ranges, key, value);
    }

    pub(super) fn set_node_address<F: Drafted>(
        &mut self,
        image: &mut Image,
        address: F::Address,
        node: Option<NodeAddress>,
    ) {
        set(
            &mut F::of_mut(image).node_addresses,
            &mut F::of_draft(self).node_addresses,
            address,
            node,
        );
    }

    pub(super) fn set_service<F: Drafted>(
        &mut self,
        image: &mut Image,
        key: ServiceKey<F::Address>,
        service: Option<Service>,
    ) {
        self.inserted += u32::from(service.is_some());
        set(&mut F::of_mut(image).services, &mut F::of_draft(self).services, key, service);
    }

    pub(super) fn set_backend<F: Drafted>(
        &mut self,
        image: &mut Image,
        id: u32,
        backend: Backend<F::Address>,
    ) {
        self.touched += 1;
        set(&mut F::of_mut(image).backends, &mut F::of_draft(self).backends, id, Some(backend));
    }

    pub(super) fn set_origins<F: Drafted>(
        &mut self,
        image: &mut Image,
        key: OriginKey<F::Address>,
        origins: Option<Origins<F::Address>>,
    ) {
        set(&mut F::of_mut(image).origins, &mut F::of_draft(self).origins, key, origins);
    }

    /// The writes that carry the update out.
    pub(super) fn writes(&self, image: &Image) -> Vec<Write> {
        let old = Image {
            v4: self.v4.before(),
            v6: self.v6.before(),
            ports: before(&self.ports),
            names: before(&self.names),
            slots: before(&self.slots),
            lanes: before(&self.lanes),
            node_ports: before(&self.node_ports),
        };
        let new = Image {
            v4: self.v4.after(&image.v4),
            v6: self.v6.after(&image.v6),
            ports: after(&self.ports, &image.ports),
            names: after(&self.names, &image.names),
            slots: after(&self.slots, &image.slots),
            lanes: after(&self.lanes, &image.lanes),
            node_ports: after(&self.node_ports, &image.node_ports),
        };
        diff(&old, &new)
    }
}

impl<F: Family> FamilyDraft<F> {
    fn before(&self) -> FamilyImage<F> {
        FamilyImage {
            services: before(&self.services),
            backends: before(&self.backends),
            origins: before(&self.origins),
            source_ranges: before(&self.source_ranges),
            node_addresses: before(&self.node_addresses),
        }
    }

    fn after(&self, image: &FamilyImage<F>) -> FamilyImage<F> {
        FamilyImage {
            services: after(&self.services, &image.services),
            backends: after(&self.backends, &image.backends),
            origins: after(&self.origins, &image.origins),
            source_ranges: after(&self.source_ranges, &image.source_ranges),
            node_addresses: after(&self.node_addresses, &image.node_addresses),
        }
    }
}
