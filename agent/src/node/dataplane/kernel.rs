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
use super::maps::{Maps, TrieKey};
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

/// What is done with a family's maps; the same code for both, over types that are plain data.
pub(crate) trait KernelStack: Stack {
    /// Carries out a run of steps of this family that one batch can hold, at least one; returns how
    /// many.
    fn run<'a>(
        maps: &Maps,
        writes: impl Iterator<Item = &'a FamilyWrite<Self>> + Clone,
    ) -> Result<usize, Error>;
    /// The flows that the family's maps know.
    fn flows(maps: &Maps) -> Result<Vec<FlowEntry<Self::Address>>, Error>;
    /// Where clients of service ports with affinity have been.
    fn affinity(maps: &Maps) -> Result<Vec<Visit<Self>>, Error>;
    /// The family's frontends.
    fn frontends(maps: &Maps) -> Result<BTreeSet<ServiceKey<Self::Address>>, Error>;
    /// The packets that are netfilter's to translate.
    fn imported(maps: &Maps) -> Result<ImportedEntries<Self>, Error>;
    /// Adds packets to those that are netfilter's, and takes others away.
    fn import(
        maps: &Maps,
        insert: &[(Tuple<Self::Address>, u32)],
        remove: &[Tuple<Self::Address>],
    ) -> Result<(), Error>;
    /// Takes entries out of the flows, proven or not.
    fn forget(maps: &Maps, keys: &[Tuple<Self::Address>]) -> Result<(), Error>;
    /// Adds clients to those of service ports with affinity.
    fn add_affinity(maps: &Maps, visits: &[Visit<Self>]) -> Result<(), Error>;
    /// Everything that the family's maps hold.
    fn read(maps: &Maps) -> Result<FamilyImage<Self>, Error>;
}

macro_rules! kernel_stack {
    ($family:ident, $field:ident, $suffix:literal) => {
        impl KernelStack for $family {
            fn run<'a>(
                maps: &Maps,
                mut writes: impl Iterator<Item = &'a FamilyWrite<Self>> + Clone,
            ) -> Result<usize, Error> {
                let maps = &maps.$field;
                let services = concat!("services_", $suffix);
                let origins = concat!("origins_", $suffix);
                let backends = concat!("backends_", $suffix);
                let sources = concat!("source_ranges_", $suffix);
                let nodes = concat!("node_addresses_", $suffix);
                let run = writes.clone();
                let Some(first) = writes.next() else { return Ok(0) };
                match first {
                    FamilyWrite::ServiceInsert { .. } => {
                        let run: Vec<_> = run
                            .map_while(|write| {
                                let FamilyWrite::ServiceInsert { key, service } = write else {
                                    return None;
                                };
                                Some((*key, *service))
                            })
                            .collect();
                        maps.services
                            .insert_many(&run)
                            .map_err(|e| Error::map("write", services, e))?;
                        Ok(run.len())
                    }
                    FamilyWrite::ServiceRemove { .. } => {
                        let run: Vec<_> = run
                            .map_while(|write| {
                                let FamilyWrite::ServiceRemove { key } = write else { return None };
                                Some(*key)
                            })
                            .collect();
                        maps.services
                            .remove_many(&run)
                            .map_err(|e| Error::map("write", services, e))?;
                        Ok(run.len())
                    }
                    FamilyWrite::OriginInsert { .. } => {
                        let run: Vec<_> = run
                            .map_while(|write| {
                                let FamilyWrite::OriginInsert { key, origins } = write else {
                                    return None;
                                };
                                Some((*key, **origins))
                            })
                            .collect();
                        maps.origins
                            .insert_many(&run)
                            .map_err(|e| Error::map("write", origins, e))?;
                        Ok(run.len())
                    }
                    FamilyWrite::OriginRemove { .. } => {
                        let run: Vec<_> = run
                            .map_while(|write| {
                                let FamilyWrite::OriginRemove { key } = write else { return None };
                                Some(*key)
                            })
                            .collect();
                        maps.origins
                            .remove_many(&run)
                            .map_err(|e| Error::map("write", origins, e))?;
                        Ok(run.len())
                    }
                    FamilyWrite::SourceInsert { .. } => {
                        let run: Vec<_> = run
                            .map_while(|write| {
                                let FamilyWrite::SourceInsert { key } = write else { return None };
                                Some((trie_key(key), PERMITTED))
                            })
                            .collect();
                        maps.source_ranges
                            .insert_many(&run)
                            .map_err(|e| Error::map("write", sources, e))?;
                        Ok(run.len())
                    }
                    FamilyWrite::SourceRemove { .. } => {
                        let run: Vec<_> = run
                            .map_while(|write| {
                                let FamilyWrite::SourceRemove { key } = write else { return None };
                                Some(trie_key(key))
                            })
                            .collect();
                        maps.source_ranges
                            .remove_many(&run)
                            .map_err(|e| Error::map("write", sources, e))?;
                        Ok(run.len())
                    }
                    FamilyWrite::NodeInsert { address, node } => maps
                        .node_addresses
                        .insert(address, node)
                        .map_err(|e| Error::map("write", nodes, e))
                        .map(|()| 1),
                    FamilyWrite::NodeRemove { address } => maps
                        .node_addresses
                        .remove(address)
                        .map_err(|e| Error::map("write", nodes, e))
                        .map(|()| 1),
                    FamilyWrite::Backend { id, backend } => {
                        stored(backends, *id, maps.backends.set(*id, backend)).map(|()| 1)
                    }
                    FamilyWrite::BackendFlags { id, flags } => {
                        let offset = offset_of!(Backend<<$family as Family>::Address>, flags);
                        stored(backends, *id, maps.backends.set_u32(*id, offset, *flags))
                            .map(|()| 1)
                    }
                    FamilyWrite::ClearBackend { id } => {
                        stored(backends, *id, maps.backends.set(*id, &Backend::default()))
                            .map(|()| 1)
                    }
                }
            }

            fn flows(maps: &Maps) -> Result<Vec<FlowEntry<Self::Address>>, Error> {
                let maps = &maps.$field;
                let mut found = flows(&maps.flows, &maps.embryonic)?;
                if let Some([flows, embryonic]) = &maps.previous {
                    found.extend(previous_flows(flows, false)?);
                    found.extend(previous_flows(embryonic, true)?);
                }
                Ok(found)
            }

            fn affinity(maps: &Maps) -> Result<Vec<Visit<Self>>, Error> {
                let entries = maps.$field.affinity.entries();
                entries.map_err(|e| Error::map("read", concat!("affinity_", $suffix), e))
            }

            fn frontends(maps: &Maps) -> Result<BTreeSet<ServiceKey<Self::Address>>, Error> {
                let entries = maps.$field.services.entries();
                let entries =
                    entries.map_err(|e| Error::map("read", concat!("services_", $suffix), e))?;
                Ok(entries.into_iter().map(|(key, _)| key).collect())
            }

            fn imported(maps: &Maps) -> Result<ImportedEntries<Self>, Error> {
                let entries = maps.$field.imported.entries();
                entries.map_err(|e| Error::map("read", concat!("imported_", $suffix), e))
            }

            fn import(
                maps: &Maps,
                insert: &[(Tuple<Self::Address>, u32)],
                remove: &[Tuple<Self::Address>],
            ) -> Result<(), Error> {
                let map = &maps.$field.imported;
                map.insert_many(insert)
                    .and_then(|()| map.remove_many(remove))
                    .map_err(|e| Error::map("write", concat!("imported_", $suffix), e))
            }

            fn forget(maps: &Maps, keys: &[Tuple<Self::Address>]) -> Result<(), Error> {
                let maps = &maps.$field;
                let removed =
                    maps.flows.remove_many(keys).and_then(|()| maps.embryonic.remove_many(keys));
                let before = maps.previous.iter().flatten();
                removed
                    .and_then(|()| before.map(|table| table.remove_many(keys)).collect())
                    .map_err(|e| Error::map("write", concat!("flows_", $suffix), e))
            }

            fn add_affinity(maps: &Maps, visits: &[Visit<Self>]) -> Result<(), Error> {
                let added = maps.$field.affinity.insert_many(visits);
                added.map_err(|e| Error::map("write", concat!("affinity_", $suffix), e))
            }

            fn read(maps: &Maps) -> Result<FamilyImage<Self>, Error> {
                let maps = &maps.$field;
                let services = maps
                    .services
                    .entries()
                    .map_err(|e| Error::map("read", concat!("services_", $suffix), e))?;
                let origins = maps
                    .origins
                    .entries()
                    .map_err(|e| Error::map("read", concat!("origins_", $suffix), e))?;
                let source_ranges = maps
                    .source_ranges
                    .entries()
                    .map_err(|e| Error::map("read", concat!("source_ranges_", $suffix), e))?;
                let node_addresses = maps
                    .node_addresses
                    .entries()
                    .map_err(|e| Error::map("read", concat!("node_addresses_", $suffix), e))?;
                let backends = (1..maps.backends.len())
                    .filter_map(|id| Some((id, maps.backends.get(id)?)))
                    .filter(|(_, backend)| backend.generation != 0);
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
    };
}

kernel_stack!(V4, v4, "v4");
kernel_stack!(V6, v6, "v6");

/// The bits of a trie's key that are the service port's: a service port shares no range with
/// another.
const PORT_BITS: u32 = u32::BITS;

fn trie_key<A: Copy>(key: &SourceKey<A>) -> TrieKey<SourceRange<A>> {
    let data = SourceRange { service_port: key.service_port.to_be_bytes(), address: key.network };
    TrieKey { length: PORT_BITS + u32::from(key.length), data }
}

fn source_key<A: Copy>(key: &TrieKey<SourceRange<A>>) -> SourceKey<A> {
    SourceKey {
        service_port: u32::from_be_bytes(key.data.service_port),
        length: u8::try_from(key.length.saturating_sub(PORT_BITS)).unwrap_or(u8::MAX),
        network: key.data.address,
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
            Write::V4(_) => V4::run(
                maps,
                writes.iter().map_while(|write| {
                    if let Write::V4(write) = write { Some(write) } else { None }
                }),
            ),
            Write::V6(_) => V6::run(
                maps,
                writes.iter().map_while(|write| {
                    if let Write::V6(write) = write { Some(write) } else { None }
                }),
            ),
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
        let mut image =
            Image { v4: V4::read(&self.maps)?, v6: V6::read(&self.maps)?, ..Image::default() };
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
