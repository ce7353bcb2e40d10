//! An update in the making: two images that hold only what it touches, before and after.
//!
//! Their difference is what the update writes, so that it costs nothing for the rest of the
//! cluster.

use sluice_common::abi::{Backend, Service, ServiceKey, ServicePort};

use crate::image::map::{self, PlanMap};
use crate::image::{Image, Stack, Write, diff};

/// The entries that an update touches.
#[derive(Debug, Default)]
pub(super) struct Draft {
    /// The entries before the update. Those that it has inserted are missing.
    before: Image,
    /// The entries as they are now. Those that it has removed are missing.
    after: Image,
    /// Frontends that the update inserts.
    pub(super) inserted: u32,
    /// Backends that the update writes.
    pub(super) touched: u32,
}

impl Draft {
    /// Sets or removes an entry of the image, and notes the change.
    pub(super) fn set<M: PlanMap>(
        &mut self,
        image: &mut Image,
        key: M::Key,
        value: Option<M::Value>,
    ) {
        self.touch::<M>(image, &key);
        if let Some(value) = value {
            let _ = M::of_mut(&mut self.after).insert(key.clone(), value.clone());
            let _ = M::of_mut(image).insert(key, value);
        } else {
            let _ = M::of_mut(&mut self.after).remove(&key);
            let _ = M::of_mut(image).remove(&key);
        }
    }

    /// Takes an entry of the image into the draft, unless it is there.
    ///
    /// An entry that the update has inserted and removed again is in neither image, and may be
    /// taken again: it still is in neither.
    fn touch<M: PlanMap>(&mut self, image: &Image, key: &M::Key) {
        if M::of(&self.before).contains_key(key) || M::of(&self.after).contains_key(key) {
            return;
        }
        if let Some(value) = M::of(image).get(key) {
            let _ = M::of_mut(&mut self.before).insert(key.clone(), value.clone());
            let _ = M::of_mut(&mut self.after).insert(key.clone(), value.clone());
        }
    }

    pub(super) fn set_port(&mut self, image: &mut Image, id: u32, port: Option<ServicePort>) {
        self.set::<map::Ports>(image, id, port);
        // The name tells the family of the service port's slots.
        self.touch::<map::Names>(image, &id);
    }

    pub(super) fn set_service<F: Stack>(
        &mut self,
        image: &mut Image,
        key: ServiceKey<F::Address>,
        service: Option<Service>,
    ) {
        self.inserted += u32::from(service.is_some());
        self.set::<map::Services<F>>(image, key, service);
    }

    pub(super) fn set_backend<F: Stack>(
        &mut self,
        image: &mut Image,
        id: u32,
        backend: Backend<F::Address>,
    ) {
        self.touched += 1;
        self.set::<map::Backends<F>>(image, id, Some(backend));
    }

    /// Returns the writes that carry the update out.
    pub(super) fn writes(&self) -> Vec<Write> {
        diff(&self.before, &self.after)
    }
}
