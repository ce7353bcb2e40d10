//! Carries out an image's writes on the kernel's maps, and reads the image back from them.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::offset_of;
use std::time::Duration;

use sluice_common::abi::{
    ADDRESS_WORDS, Affinity, AffinityKey, Backend, Range, SLOTS_PER_BLOCK, ServiceKey, ServicePort,
    SourceRange, Tuple,
};
use sluice_common::{Family, V4, V6};
use sluice_core::image::map::{self, PlanMap};
use sluice_core::image::{
    ApplyError, Dataplane, EntryWrite, FamilyImage, FamilyWrite, Image, ReadError, SourceKey,
    Stack, Write,
};

use super::bpf::{Array, Table};
use super::error::Error;
use super::maps::{FamilyMaps, Maps, SourceRangeKey};
use super::read::{FlowEntry, flows, previous_flows};

/// The maps that the kernel programs use.
#[derive(Debug)]
pub struct Kernel {
    maps: Maps,
}

/// A client of a service port, with the backend that it used last.
pub(crate) type Visit<F> = (AffinityKey<<F as Family>::Address>, Affinity);

/// Packets that netfilter translates, with bits of [`sluice_common::abi::imported`].
pub(crate) type ImportedEntries<F> = Vec<(Tuple<<F as Family>::Address>, u32)>;

/// A family with its pinned maps.
pub(crate) trait KernelStack: Stack {
    /// Returns the family's maps.
    fn maps(maps: &Maps) -> &FamilyMaps<Self>;
}

impl KernelStack for V4 {
    fn maps(maps: &Maps) -> &FamilyMaps<Self> {
        &maps.v4
    }
}

impl KernelStack for V6 {
    fn maps(maps: &Maps) -> &FamilyMaps<Self> {
        &maps.v6
    }
}

impl<F: Stack> FamilyMaps<F> {
    /// Carries out the first steps that one batch can hold, at least one, and returns their number.
    fn run<'a>(
        &self,
        writes: impl Iterator<Item = &'a FamilyWrite<F>> + Clone,
    ) -> Result<usize, Error> {
        let Some(first) = writes.clone().next() else { return Ok(0) };
        let store_backend =
            |id: u32, done: bool| stored(map::Backends::<F>::NAME, id, done).map(|()| 1);
        match first {
            FamilyWrite::Services(_) => run::<map::Services<F>, _>(&self.services, writes),
            FamilyWrite::Origins(_) => run::<map::Origins<F>, _>(&self.origins, writes),
            FamilyWrite::SourceRanges(_) => {
                run::<map::SourceRanges<F>, _>(&self.source_ranges, writes)
            }
            FamilyWrite::NodeAddresses(_) => {
                run::<map::NodeAddresses<F>, _>(&self.node_addresses, writes)
            }
            FamilyWrite::Backend { id, backend } => {
                store_backend(*id, self.backends.set(*id, backend))
            }
            FamilyWrite::BackendFlags { id, flags } => {
                let offset = offset_of!(Backend<F::Address>, flags);
                store_backend(*id, self.backends.set_u32(*id, offset, *flags))
            }
            FamilyWrite::ClearBackend { id } => {
                store_backend(*id, self.backends.set(*id, &Backend::default()))
            }
        }
    }

    /// Reads all flow entries.
    pub(crate) fn read_flows(&self) -> Result<Vec<FlowEntry<F::Address>>, Error> {
        let mut found = flows(&self.flows, &self.embryonic)?;
        if let Some([flows, embryonic]) = &self.previous {
            found.extend(previous_flows(flows, false)?);
            found.extend(previous_flows(embryonic, true)?);
        }
        Ok(found)
    }

    /// Reads the backends that clients of service ports with affinity used last.
    pub(crate) fn read_affinity(&self) -> Result<Vec<Visit<F>>, Error> {
        self.affinity.entries().map_err(Self::failed("read", "affinity"))
    }

    /// Reads the frontends.
    pub(crate) fn read_frontends(&self) -> Result<BTreeSet<ServiceKey<F::Address>>, Error> {
        let entries = self.services.entries().map_err(Self::failed("read", "services"))?;
        Ok(entries.into_iter().map(|(key, _)| key).collect())
    }

    /// Reads the packets that netfilter translates.
    pub(crate) fn read_imported(&self) -> Result<ImportedEntries<F>, Error> {
        self.imported.entries().map_err(Self::failed("read", "imported"))
    }

    /// Adds packets to those that netfilter translates, and removes others.
    pub(crate) fn import(
        &self,
        insert: &[(Tuple<F::Address>, u32)],
        remove: &[Tuple<F::Address>],
    ) -> Result<(), Error> {
        self.imported
            .insert_many(insert)
            .and_then(|()| self.imported.remove_many(remove))
            .map_err(Self::failed("write", "imported"))
    }

    /// Removes flow entries, proven or embryonic.
    pub(crate) fn forget(&self, keys: &[Tuple<F::Address>]) -> Result<(), Error> {
        let mut before = self.previous.iter().flatten();
        self.flows
            .remove_many(keys)
            .and_then(|()| self.embryonic.remove_many(keys))
            .and_then(|()| before.try_for_each(|table| table.remove_many(keys)))
            .map_err(Self::failed("write", "flows"))
    }

    /// Adds clients of service ports with affinity.
    pub(crate) fn add_affinity(&self, visits: &[Visit<F>]) -> Result<(), Error> {
        self.affinity.insert_many(visits).map_err(Self::failed("write", "affinity"))
    }

    /// Reads everything that the plan writes.
    fn read_image(&self) -> Result<FamilyImage<F>, Error> {
        let backends =
            self.backends.filled().filter(|(id, backend)| *id != 0 && backend.generation != 0);
        Ok(FamilyImage {
            services: read::<map::Services<F>, _>(&self.services)?,
            backends: backends.collect(),
            origins: read::<map::Origins<F>, _>(&self.origins)?,
            source_ranges: read::<map::SourceRanges<F>, _>(&self.source_ranges)?,
            node_addresses: read::<map::NodeAddresses<F>, _>(&self.node_addresses)?,
        })
    }
}

/// Carries out the first writes to a table that one batch can hold, and returns their number.
///
/// `K` is the kernel's form of the key.
fn run<'a, T, K>(
    table: &Table<K, T::Value>,
    writes: impl Iterator<Item = &'a FamilyWrite<T::Family>> + Clone,
) -> Result<usize, Error>
where
    T: map::Table<Key: Into<K> + 'a, Value: aya::Pod, Written: 'a>,
    K: aya::Pod,
{
    let writes = writes.map_while(T::written);
    let inserted: Vec<(K, T::Value)> = writes
        .clone()
        .map_while(|write| {
            let EntryWrite::Insert { key, value } = write else { return None };
            Some(((*key).into(), *value.borrow()))
        })
        .collect();
    let removed: Vec<K> = writes
        .map_while(|write| {
            let EntryWrite::Remove { key } = write else { return None };
            Some((*key).into())
        })
        .collect();
    // The first write is an insertion or a removal, so one of the two is empty.
    table
        .insert_many(&inserted)
        .and_then(|()| table.remove_many(&removed))
        .map_err(|cause| Error::map("write", T::NAME, cause))?;
    Ok(inserted.len() + removed.len())
}

/// Reads a table.
fn read<M, K>(table: &Table<K, M::Value>) -> Result<BTreeMap<M::Key, M::Value>, Error>
where
    M: PlanMap<Key: From<K>, Value: aya::Pod>,
    K: aya::Pod,
{
    let entries = table.entries().map_err(|cause| Error::map("read", M::NAME, cause))?;
    Ok(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
}

/// The bits of a trie's key that hold the service port, which are part of every prefix.
const PORT_BITS: u32 = u32::BITS;

impl<A: Copy> From<SourceKey<A>> for SourceRangeKey<A> {
    fn from(key: SourceKey<A>) -> Self {
        let range =
            SourceRange { service_port: key.service_port.to_be_bytes(), address: key.network };
        Self { length: PORT_BITS + u32::from(key.length), range }
    }
}

impl<A: Copy> From<SourceRangeKey<A>> for SourceKey<A> {
    fn from(key: SourceRangeKey<A>) -> Self {
        Self {
            service_port: u32::from_be_bytes(key.range.service_port),
            length: u8::try_from(key.length.saturating_sub(PORT_BITS)).unwrap_or(u8::MAX),
            network: key.range.address,
        }
    }
}

/// Returns an error for a store that was refused because its index lies outside the array.
fn stored(map: &str, index: u32, done: bool) -> Result<(), Error> {
    if done {
        return Ok(());
    }
    let cause = io::Error::new(io::ErrorKind::InvalidInput, format!("it has no element {index}"));
    Err(Error::map("write", map, cause))
}

impl Kernel {
    /// Creates a dataplane of these maps.
    #[must_use]
    pub fn new(maps: Maps) -> Self {
        Self { maps }
    }

    /// Returns the maps.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Carries out at least the first step, and returns the number of steps.
    fn step(&self, writes: &[Write]) -> Result<usize, Error> {
        let Some(first) = writes.first() else { return Ok(0) };
        let maps = &self.maps;
        match first {
            Write::V4(_) => {
                maps.v4.run(writes.iter().map_while(|write| {
                    if let Write::V4(write) = write { Some(write) } else { None }
                }))
            }
            Write::V6(_) => {
                maps.v6.run(writes.iter().map_while(|write| {
                    if let Write::V6(write) = write { Some(write) } else { None }
                }))
            }
            Write::Name { .. } => {
                let names = writes.iter().map_while(|write| {
                    let Write::Name { service_port, name } = write else { return None };
                    Some((*service_port, **name))
                });
                let run: Vec<_> = names.collect();
                maps.names
                    .insert_many(&run)
                    .map_err(|error| Error::map("write", "names", error))?;
                Ok(run.len())
            }
            Write::ClearName { service_port } => maps
                .names
                .remove(service_port)
                .map_err(|error| Error::map("write", "names", error))
                .map(|()| 1),
            Write::Slots { start, backends } => self.store_slots(*start, backends).map(|()| 1),
            Write::NodePorts { word, bits } => {
                stored("node_ports", *word, maps.node_ports.set_u64(*word, 0, *bits)).map(|()| 1)
            }
            Write::Listing { lane, bits } => self.store_lane(*lane, *bits).map(|()| 1),
            Write::Port { service_port, affinity_seconds, flags } => {
                let ports = &maps.ports;
                // These are aligned words of their own; the ranges next to them stay as they are.
                let done =
                    ports.set_u32(
                        *service_port,
                        offset_of!(ServicePort, affinity_seconds),
                        *affinity_seconds,
                    ) && ports.set_u32(*service_port, offset_of!(ServicePort, flags), *flags);
                stored("ports", *service_port, done).map(|()| 1)
            }
            Write::Range { service_port, class, range } => {
                let offset = offset_of!(ServicePort, ranges) + 8 * *class as usize;
                stored("ports", *service_port, maps.ports.set_u64(*service_port, offset, range.0))
                    .map(|()| 1)
            }
            Write::ClearPort { service_port } => {
                let done = (0..3).all(|class| {
                    maps.ports.set_u64(
                        *service_port,
                        offset_of!(ServicePort, ranges) + 8 * class,
                        0,
                    )
                }) && maps.ports.set(*service_port, &ServicePort::default());
                stored("ports", *service_port, done).map(|()| 1)
            }
            Write::ClearSlots { .. } => Ok(1),
            Write::Grace => {
                grace();
                Ok(1)
            }
        }
    }

    /// Stores ids from slot `start` on. Ranges begin at blocks; a store may begin anywhere.
    fn store_slots(&self, start: u32, backends: &[u32]) -> Result<(), Error> {
        let slots = &self.maps.slots;
        for (slot, id) in (start..).zip(backends) {
            let (block, place) = (slot / SLOTS_PER_BLOCK, slot % SLOTS_PER_BLOCK);
            stored("slots", block, slots.set_u32(block, place as usize * 4, *id))?;
        }
        Ok(())
    }

    /// Sets one four-bit lane and keeps the word's other lanes, which only this thread writes.
    fn store_lane(&self, lane: u32, bits: u8) -> Result<(), Error> {
        let (word, shift) = (lane / 16, lane % 16 * 4);
        let old = self.maps.addresses.get(word).unwrap_or_default();
        let new = old & !(0xf_u64 << shift) | u64::from(bits & 0xf) << shift;
        stored("addresses", word, self.maps.addresses.set_u64(word, 0, new))
    }

    fn read_image(&self) -> Result<Image, Error> {
        let names =
            self.maps.names.entries().map_err(|error| Error::map("read", "names", error))?;
        let (v4, v6) = (self.maps.v4.read_image()?, self.maps.v6.read_image()?);
        let mut image = Image { v4, v6, ..Image::default() };
        for (service_port, name) in names {
            let port = self.maps.ports.get(service_port).unwrap_or_default();
            for range in port.ranges.map(Range).into_iter().filter(|range| range.size() > 0) {
                let _ = image
                    .slots
                    .entry(range.start())
                    .or_insert_with(|| read_slots(&self.maps, range));
            }
            let _ = image.ports.insert(service_port, port);
            let _ = image.names.insert(service_port, name);
        }
        let node_ports = (0..self.maps.node_ports.len())
            .filter_map(|word| Some((word, self.maps.node_ports.get(word)?)));
        image.node_ports.extend(node_ports.filter(|(_, bits)| *bits != 0));
        for word in 0..ADDRESS_WORDS {
            let bits = self.maps.addresses.get(word).unwrap_or_default();
            if bits != 0 {
                let lanes =
                    (0..16_u32).map(|lane| (word * 16 + lane, (bits >> (lane * 4) & 0xf) as u8));
                image.lanes.extend(lanes.filter(|(_, bits)| *bits != 0));
            }
        }
        Ok(image)
    }
}

/// Reads the backend id in each slot of a range; 0 for a slot outside the map.
fn read_slots(maps: &Maps, range: Range) -> Vec<u32> {
    (range.start()..range.start().saturating_add(range.size()))
        .map(|slot| read_slot(&maps.slots, slot))
        .collect()
}

fn read_slot(slots: &Array<sluice_common::abi::SlotBlock>, slot: u32) -> u32 {
    slots.get_u32(slot / SLOTS_PER_BLOCK, (slot % SLOTS_PER_BLOCK) as usize * 4).unwrap_or_default()
}

/// Waits until every program that is running now has ended.
///
/// BPF programs run with preemption or migration disabled in an RCU read-side section, and the
/// barrier waits for all of them. Kernels with `nohz_full` CPUs refuse it; a second is then longer
/// than any program runs.
fn grace() {
    const GLOBAL: libc::c_long = 1;
    // SAFETY: no pointers.
    if unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } != 0 {
        std::thread::sleep(Duration::from_secs(1));
    }
}

impl Dataplane for Kernel {
    fn apply(&mut self, writes: &[Write]) -> Result<(), ApplyError> {
        let mut done = 0;
        while let Some(rest) = writes.get(done..).filter(|rest| !rest.is_empty()) {
            done += self.step(rest).map_err(|cause| ApplyError {
                done,
                what: rest.first().map(what).unwrap_or_default(),
                cause: Box::new(cause),
            })?;
        }
        Ok(())
    }

    fn read(&self) -> Result<Image, ReadError> {
        self.read_image().map_err(|cause| {
            let map =
                if let Error::Map { map, .. } = &cause { map.clone() } else { "(any)".to_owned() };
            ReadError { map, cause: Box::new(cause) }
        })
    }
}

/// Describes a step: in full, unless it is long.
fn what(write: &Write) -> String {
    if let Write::Slots { start, backends } = write {
        format!("{} slots from {start}", backends.len())
    } else if let Write::Name { service_port, .. } = write {
        format!("name of service port {service_port}")
    } else {
        format!("{write:?}")
    }
}
