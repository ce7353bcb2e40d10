//! The pinned maps with their types: what the agent writes and everyone may read.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use sluice_common::abi::{
    Affinity, AffinityKey, Backend, BackendCounters, CallerKey, Device, Flow, Ipv4Address,
    Ipv6Address, Name, Networks, NodeAddress, OriginKey, Origins, ReasonCounters, ReasonKey,
    RejectBucket, RejectKey, RouteMtu, Service, ServiceKey, ServicePort, Settings, SlotBlock,
    SocketCounters, SourceRange, Tuple, previous,
};
use sluice_common::{Family, V4, V6};

use super::bpf::{self, Array, Table};
use super::error::Error;
use super::pins::previous_beside;

/// A key of a trie as bpf(2) takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub(crate) struct TrieKey<D> {
    /// How many bits of the data count.
    pub(crate) length: u32,
    /// What is looked for.
    pub(crate) data: D,
}

macro_rules! trie_keys {
    ($($data:ty),*) => {
        $(
            const _: () = assert!(size_of::<TrieKey<$data>>() == 4 + size_of::<$data>());
            // SAFETY: plain integers without padding (asserted above): any bytes are a value.
            unsafe impl aya::Pod for TrieKey<$data> {}
        )*
    };
}

trie_keys!(SourceRange<Ipv4Address>, SourceRange<Ipv6Address>, Ipv4Address, Ipv6Address);

/// Whether the mappings may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For the agent.
    Write,
    /// For those who only look.
    Read,
}

/// Flows as the previous layout has them.
pub(crate) type PreviousTable<A> = Table<Tuple<A>, previous::Flow<A>>;

/// The maps of one family.
#[derive(Debug)]
pub struct FamilyMaps<F: Family> {
    pub(crate) services: Table<ServiceKey<F::Address>, Service>,
    pub(crate) backends: Array<Backend<F::Address>>,
    pub(crate) origins: Table<OriginKey<F::Address>, Origins<F::Address>>,
    pub(crate) flows: Table<Tuple<F::Address>, Flow<F::Address>>,
    pub(crate) embryonic: Table<Tuple<F::Address>, Flow<F::Address>>,
    pub(crate) affinity: Table<AffinityKey<F::Address>, Affinity>,
    pub(crate) source_ranges: Table<TrieKey<SourceRange<F::Address>>, u32>,
    pub(crate) node_addresses: Table<F::Address, NodeAddress>,
    pub(crate) networks: Table<u32, Networks<F::Address>>,
    pub(crate) imported: Table<Tuple<F::Address>, u32>,
    pub(crate) route_mtus: Table<TrieKey<F::Address>, RouteMtu>,
    /// `flows` and `embryonic` in the previous layout, while it is in use.
    pub(crate) previous: Option<[PreviousTable<F::Address>; 2]>,
}

/// Every map that is pinned in one folder.
#[derive(Debug)]
pub struct Maps {
    pub(crate) v4: FamilyMaps<V4>,
    pub(crate) v6: FamilyMaps<V6>,
    pub(crate) settings: Table<u32, Settings>,
    pub(crate) ports: Array<ServicePort>,
    pub(crate) slots: Array<SlotBlock>,
    pub(crate) addresses: Array<u64>,
    pub(crate) node_ports: Array<u64>,
    pub(crate) devices: Table<u32, Device>,
    pub(crate) names: Table<u32, Name>,
    pub(crate) backend_counts: Table<u32, BackendCounters>,
    pub(crate) reason_counts: Table<ReasonKey, ReasonCounters>,
    pub(crate) socket_counts: Table<u32, SocketCounters>,
    pub(crate) rejects: Table<RejectKey, RejectBucket>,
    pub(crate) callers: Table<CallerKey, u32>,
}

fn open(folder: &Path, name: &str) -> Result<std::os::fd::OwnedFd, Error> {
    let path = folder.join(name);
    bpf::object_get(&path).map_err(|cause| Error::pin("open the pinned map", path, cause))
}

pub(super) fn table<K: aya::Pod, V: aya::Pod>(
    folder: &Path,
    name: &str,
) -> Result<Table<K, V>, Error> {
    Table::new(open(folder, name)?).map_err(|cause| Error::map("use the pinned", name, cause))
}

fn array<T: aya::Pod>(folder: &Path, name: &str, access: Access) -> Result<Array<T>, Error> {
    let fd = open(folder, name)?;
    Array::new(fd.as_fd(), access == Access::Write)
        .map_err(|cause| Error::map("use the pinned", name, cause))
}

/// The parts of opening and reading that need the family's types to be plain data.
macro_rules! family {
    ($family:ty, $open:ident, $suffix:literal) => {
        fn $open(folder: &Path, access: Access) -> Result<FamilyMaps<$family>, Error> {
            Ok(FamilyMaps {
                services: table(folder, concat!("services_", $suffix))?,
                backends: array(folder, concat!("backends_", $suffix), access)?,
                origins: table(folder, concat!("origins_", $suffix))?,
                flows: table(folder, concat!("flows_", $suffix))?,
                embryonic: table(folder, concat!("embryonic_", $suffix))?,
                affinity: table(folder, concat!("affinity_", $suffix))?,
                source_ranges: table(folder, concat!("source_ranges_", $suffix))?,
                node_addresses: table(folder, concat!("node_addresses_", $suffix))?,
                networks: table(folder, concat!("networks_", $suffix))?,
                imported: table(folder, concat!("imported_", $suffix))?,
                route_mtus: table(folder, concat!("route_mtus_", $suffix))?,
                previous: previous_beside(folder).and_then(|before| {
                    let tables = [concat!("flows_", $suffix), concat!("embryonic_", $suffix)];
                    let [flows, embryonic] = tables.map(|name| table(&before, name).ok());
                    Some([flows?, embryonic?])
                }),
            })
        }
    };
}

family!(V4, open_v4, "v4");
family!(V6, open_v6, "v6");

impl Maps {
    /// Opens the maps pinned in a folder.
    ///
    /// # Errors
    ///
    /// When one is missing or has another layout.
    pub fn open(folder: &Path, access: Access) -> Result<Self, Error> {
        Ok(Self {
            v4: open_v4(folder, access)?,
            v6: open_v6(folder, access)?,
            settings: table(folder, "settings")?,
            ports: array(folder, "ports", access)?,
            slots: array(folder, "slots", access)?,
            addresses: array(folder, "addresses", access)?,
            node_ports: array(folder, "node_ports", access)?,
            devices: table(folder, "devices")?,
            names: table(folder, "names")?,
            backend_counts: table(folder, "backend_counts")?,
            reason_counts: table(folder, "reason_counts")?,
            socket_counts: table(folder, "socket_counts")?,
            rejects: table(folder, "rejects")?,
            callers: table(folder, "callers")?,
        })
    }

    /// Copies what the packets' path remembers (not what the plan writes, not counters)
    /// into maps of other sizes; entries that find no room are lost.
    pub(crate) fn copy_memory_to(&self, other: &Self) -> io::Result<()> {
        copy(&self.v4.flows, &other.v4.flows)?;
        copy(&self.v6.flows, &other.v6.flows)?;
        copy(&self.v4.imported, &other.v4.imported)?;
        copy(&self.v6.imported, &other.v6.imported)?;
        copy(&self.v4.affinity, &other.v4.affinity)?;
        copy(&self.v6.affinity, &other.v6.affinity)
    }
}

fn copy<K: aya::Pod, V: aya::Pod>(from: &Table<K, V>, to: &Table<K, V>) -> io::Result<()> {
    if from.id() == to.id() { Ok(()) } else { to.insert_many(&from.entries()?) }
}
