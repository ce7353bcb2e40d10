//! Carries an image's writes out on the kernel's maps, and reads the image back from them.

use std::collections::BTreeSet;
use std::io;
use std::mem::offset_of;
use std::time::Duration;

use sluice_common::abi::{
    ADDRESS_WORDS, Affinity, AffinityKey, Backend, Range, SLOTS_PER_BLOCK, ServiceKey, ServicePort,
    SourceRange, Tuple,
};
use sluice_common::{Family, V4, V6};
use sluice_core::image::{
    ApplyError, Dataplane, FamilyImage, FamilyWrite, Image, PERMITTED, ReadError, SourceKey, Stack,
    Write,
};

use super::bpf::Array;
use super::error::Error;
use super::maps::{FamilyMaps, Maps, SourceRangeKey};
use super::read::{FlowEntry, flows, previous_flows};

/// The maps that the kernel programs use.
#[derive(Debug)]
pub struct Kernel {
    maps: Maps,
}

/// A client of a service port, and where it has been.
pub(crate) type Visit<F> = (AffinityKey<<F as Family>::Address>, Affinity);

/// Packets that are netfilter's to translate, with bits of [`sluice_common::abi::imported`].
pub(crate) type ImportedEntries<F> = Vec<(Tuple<<F as Family>::Address>, u32)>;

/// A family whose maps are among those that are pinned.
pub(crate) trait KernelStack: Stack {
    /// The family's maps.
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
    /// Carries out a run of steps that one batch can hold, at least one; returns how many.
    fn run<'a>(
        &self,
        writes: impl Iterator<Item = &'a FamilyWrite<F>> + Clone,
    ) -> Result<usize, Error> {
        let Some(first) = writes.clone().next() else { return Ok(0) };
        let backends = || Self::name("backends");
        match first {
            FamilyWrite::ServiceInsert { .. } => {
                let run = run_of(writes, |write| {
                    let FamilyWrite::ServiceInsert { key, service } = write else { return None };
                    Some((*key, *service))
                });
                self.services.insert_many(&run).map_err(Self::failed("write", "services"))?;
                Ok(run.len())
            }
            FamilyWrite::ServiceRemove { .. } => {
                let run = run_of(writes, |write| {
                    let FamilyWrite::ServiceRemove { key } = write else { return None };
                    Some(*key)
                });
                self.services.remove_many(&run).map_err(Self::failed("write", "services"))?;
                Ok(run.len())
            }
            FamilyWrite::OriginInsert { .. } => {
                let run = run_of(writes, |write| {
                    let FamilyWrite::OriginInsert { key, origins } = write else { return None };
                    Some((*key, **origins))
                });
                self.origins.insert_many(&run).map_err(Self::failed("write", "origins"))?;
                Ok(run.len())
            }
            FamilyWrite::OriginRemove { .. } => {
                let run = run_of(writes, |write| {
                    let FamilyWrite::OriginRemove { key } = write else { return None };
                    Some(*key)
                });
                self.origins.remove_many(&run).map_err(Self::failed("write", "origins"))?;
                Ok(run.len())
            }
            FamilyWrite::SourceInsert { .. } => {
                let run = run_of(writes, |write| {
                    let FamilyWrite::SourceInsert { key } = write else { return None };
                    Some((trie_key(key), PERMITTED))
                });
                let inserted = self.source_ranges.insert_many(&run);
                inserted.map_err(Self::failed("write", "source_ranges"))?;
                Ok(run.len())
            }
            FamilyWrite::SourceRemove { .. } => {
                let run = run_of(writes, |write| {
                    let FamilyWrite::SourceRemove { key } = write else { return None };
                    Some(trie_key(key))
                });
                let removed = self.source_ranges.remove_many(&run);
                removed.map_err(Self::failed("write", "source_ranges"))?;
                Ok(run.len())
            }
            FamilyWrite::NodeInsert { address, node } => {
                let inserted = self.node_addresses.insert(address, node);
                inserted.map_err(Self::failed("write", "node_addresses")).map(|()| 1)
            }
            FamilyWrite::NodeRemove { address } => {
                let removed = self.node_addresses.remove(address);
                removed.map_err(Self::failed("write", "node_addresses")).map(|()| 1)
            }
            FamilyWrite::Backend { id, backend } => {
                stored(&backends(), *id, self.backends.set(*id, backend)).map(|()| 1)
            }
            FamilyWrite::BackendFlags { id, flags } => {
                let offset = offset_of!(Backend<F::Address>, flags);
                stored(&backends(), *id, self.backends.set_u32(*id, offset, *flags)).map(|()| 1)
            }
            FamilyWrite::ClearBackend { id } => {
                stored(&backends(), *id, self.backends.set(*id, &Backend::default())).map(|()| 1)
            }
        }
    }

    /// The flows that the maps know.
    pub(crate) fn read_flows(&self) -> Result<Vec<FlowEntry<F::Address>>, Error> {
        let mut found = flows(&self.flows, &self.embryonic)?;
        if let Some([flows, embryonic]) = &self.previous {
            found.extend(previous_flows(flows, false)?);
            found.extend(previous_flows(embryonic, true)?);
        }
        Ok(found)
    }

    /// Where clients of service ports with affinity have been.
    pub(crate) fn read_affinity(&self) -> Result<Vec<Visit<F>>, Error> {
        self.affinity.entries().map_err(Self::failed("read", "affinity"))
    }

    /// The frontends.
    pub(crate) fn read_frontends(&self) -> Result<BTreeSet<ServiceKey<F::Address>>, Error> {
        let entries = self.services.entries().map_err(Self::failed("read", "services"))?;
        Ok(entries.into_iter().map(|(key, _)| key).collect())
    }

    /// The packets that are netfilter's to translate.
    pub(crate) fn read_imported(&self) -> Result<ImportedEntries<F>, Error> {
        self.imported.entries().map_err(Self::failed("read", "imported"))
    }

    /// Adds packets to those that are netfilter's, and takes others away.
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

    /// Takes entries out of the flows, proven or not.
    pub(crate) fn forget(&self, keys: &[Tuple<F::Address>]) -> Result<(), Error> {
        let mut before = self.previous.iter().flatten();
        self.flows
            .remove_many(keys)
            .and_then(|()| self.embryonic.remove_many(keys))
            .and_then(|()| before.try_for_each(|table| table.remove_many(keys)))
            .map_err(Self::failed("write", "flows"))
    }

    /// Adds clients to those of service ports with affinity.
    pub(crate) fn add_affinity(&self, visits: &[Visit<F>]) -> Result<(), Error> {
        self.affinity.insert_many(visits).map_err(Self::failed("write", "affinity"))
    }

    /// Everything that the plan writes.
    fn read_image(&self) -> Result<FamilyImage<F>, Error> {
        let services = self.services.entries().map_err(Self::failed("read", "services"))?;
        let origins = self.origins.entries().map_err(Self::failed("read", "origins"))?;
        let source_ranges =
            self.source_ranges.entries().map_err(Self::failed("read", "source_ranges"))?;
        let node_addresses =
            self.node_addresses.entries().map_err(Self::failed("read", "node_addresses"))?;
        let backends =
            self.backends.filled().filter(|(id, backend)| *id != 0 && backend.generation != 0);
        Ok(FamilyImage {
            services: services.into_iter().collect(),
            backends: backends.collect(),
            origins: origins.into_iter().collect(),
            source_ranges: source_ranges
                .into_iter()
                .map(|(key, value)| (source_key(&key), value))
                .collect(),
            node_addresses: node_addresses.into_iter().collect(),
        })
    }
}

/// What the first steps have in common that one batch can hold.
fn run_of<'a, W: 'a, T>(
    writes: impl Iterator<Item = &'a W>,
    part: impl Fn(&'a W) -> Option<T>,
) -> Vec<T> {
    writes.map_while(part).collect()
}

/// The bits of a trie's key that are the service port's: a service port shares no range with
/// another.
const PORT_BITS: u32 = u32::BITS;

fn trie_key<A: Copy>(key: &SourceKey<A>) -> SourceRangeKey<A> {
    let range = SourceRange { service_port: key.service_port.to_be_bytes(), address: key.network };
    SourceRangeKey { length: PORT_BITS + u32::from(key.length), range }
}

fn source_key<A: Copy>(key: &SourceRangeKey<A>) -> SourceKey<A> {
    SourceKey {
        service_port: u32::from_be_bytes(key.range.service_port),
        length: u8::try_from(key.length.saturating_sub(PORT_BITS)).unwrap_or(u8::MAX),
        network: key.range.address,
    }
}

/// Turns a refused store into an error: the index lies outside the array.
fn stored(map: &str, index: u32, done: bool) -> Result<(), Error> {
    if done {
        return Ok(());
    }
    let cause = io::Error::new(io::ErrorKind::InvalidInput, format!("it has no element {index}"));
    Err(Error::map("write", map, cause))
}

impl Kernel {
    /// Takes the maps.
    #[must_use]
    pub fn new(maps: Maps) -> Self {
        Self { maps }
    }

    /// The maps.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Carries out at least the first step; returns how many.
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
                // Aligned words of their own: the ranges beside them stay as they are.
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

    /// Stores ids from slot `start` on. Ranges begin at blocks, but a store may begin anywhere.
    fn store_slots(&self, start: u32, backends: &[u32]) -> Result<(), Error> {
        let slots = &self.maps.slots;
        for (slot, id) in (start..).zip(backends) {
            let (block, place) = (slot / SLOTS_PER_BLOCK, slot % SLOTS_PER_BLOCK);
            stored("slots", block, slots.set_u32(block, place as usize * 4, *id))?;
        }
        Ok(())
    }

    /// Sets one four-bit lane; the word's other lanes keep their bits (only this thread writes).
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

/// The backend id in each slot of a range; 0 for a slot outside the map.
fn read_slots(maps: &Maps, range: Range) -> Vec<u32> {
    (range.start()..range.start().saturating_add(range.size()))
        .map(|slot| read_slot(&maps.slots, slot))
        .collect()
}

fn read_slot(slots: &Array<sluice_common::abi::SlotBlock>, slot: u32) -> u32 {
    slots.get_u32(slot / SLOTS_PER_BLOCK, (slot % SLOTS_PER_BLOCK) as usize * 4).unwrap_or_default()
}

/// Waits until every program that began before has ended.
///
/// BPF programs run with preemption or migration off inside an RCU read section; the barrier waits
/// for all of them. Kernels with `nohz_full` CPUs refuse it: there a second is longer than any
/// packet.
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

/// A step in a few words: all of it, but for the long ones.
fn what(write: &Write) -> String {
    if let Write::Slots { start, backends } = write {
        format!("{} slots from {start}", backends.len())
    } else if let Write::Name { service_port, .. } = write {
        format!("name of service port {service_port}")
    } else {
        format!("{write:?}")
    }
}
