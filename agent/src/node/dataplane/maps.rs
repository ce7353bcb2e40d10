//! The pinned maps with their types. The agent writes them, and all commands may read them.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use sluice_common::abi::{
    Address, Affinity, AffinityKey, Backend, BackendCounters, CallerKey, Device, FailureKey, Flow,
    Ipv4Address, Ipv6Address, Name, Networks, NodeAddress, OriginKey, Origins, ReasonCounters,
    ReasonKey, RejectBucket, RejectKey, RouteMtu, Service, ServiceKey, ServicePort, Settings,
    SlotBlock, SocketCounters, SourceRange, Tuple, previous,
};
use sluice_common::{Family, V4, V6};

use super::bpf::{self, Array, Table};
use super::error::Error;
use super::pins::previous_beside;

/// The key of a trie as bpf(2) expects it: a network that a route leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub(crate) struct RouteKey<A> {
    /// The prefix length in bits.
    pub(crate) length: u32,
    /// The network.
    pub(crate) network: A,
}

/// The key of a trie as bpf(2) expects it: a network whose clients a service port admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct SourceRangeKey<A: Copy> {
    /// The prefix length of `range` in bits.
    pub(crate) length: u32,
    /// The service port and the network.
    pub(crate) range: SourceRange<A>,
}

const _: () = {
    type Short = SourceRange<Ipv4Address>;
    type Long = SourceRange<Ipv6Address>;
    assert!(size_of::<RouteKey<Ipv4Address>>() == 4 + size_of::<Ipv4Address>());
    assert!(size_of::<RouteKey<Ipv6Address>>() == 4 + size_of::<Ipv6Address>());
    assert!(size_of::<SourceRangeKey<Ipv4Address>>() == 4 + size_of::<Short>());
    assert!(size_of::<SourceRangeKey<Ipv6Address>>() == 4 + size_of::<Long>());
};
// SAFETY: plain integers without padding (asserted above): any bytes are a value.
unsafe impl<A: Address> aya::Pod for RouteKey<A> {}
// SAFETY: as above.
unsafe impl<A: Address> aya::Pod for SourceRangeKey<A> {}

/// The way in which the maps are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To be written, by the agent.
    Write,
    /// To be read only.
    Read,
}

/// A table of flows in the previous layout.
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
    pub(crate) source_ranges: Table<SourceRangeKey<F::Address>, u32>,
    pub(crate) node_addresses: Table<F::Address, NodeAddress>,
    pub(crate) networks: Table<u32, Networks<F::Address>>,
    pub(crate) imported: Table<Tuple<F::Address>, u32>,
    pub(crate) route_mtus: Table<RouteKey<F::Address>, RouteMtu>,
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
    pub(crate) failure_counts: Table<FailureKey, u64>,
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

impl<F: Family> FamilyMaps<F> {
    /// Returns the full name of one of the family's maps.
    pub(crate) fn name(map: &str) -> String {
        format!("{map}_v{}", F::VERSION)
    }

    /// Wraps an error of one of the family's maps.
    pub(crate) fn failed(action: &'static str, map: &str) -> impl FnOnce(io::Error) -> Error {
        let name = Self::name(map);
        move |cause| Error::map(action, name, cause)
    }

    fn open(folder: &Path, access: Access) -> Result<Self, Error> {
        let before = previous_beside(folder).and_then(|before| {
            let [flows, embryonic] =
                ["flows", "embryonic"].map(|map| table(&before, &Self::name(map)).ok());
            Some([flows?, embryonic?])
        });
        Ok(Self {
            services: table(folder, &Self::name("services"))?,
            backends: array(folder, &Self::name("backends"), access)?,
            origins: table(folder, &Self::name("origins"))?,
            flows: table(folder, &Self::name("flows"))?,
            embryonic: table(folder, &Self::name("embryonic"))?,
            affinity: table(folder, &Self::name("affinity"))?,
            source_ranges: table(folder, &Self::name("source_ranges"))?,
            node_addresses: table(folder, &Self::name("node_addresses"))?,
            networks: table(folder, &Self::name("networks"))?,
            imported: table(folder, &Self::name("imported"))?,
            route_mtus: table(folder, &Self::name("route_mtus"))?,
            previous: before,
        })
    }
}

impl Maps {
    /// Opens the maps pinned in a folder.
    ///
    /// # Errors
    ///
    /// Fails if one is missing or has another layout.
    pub fn open(folder: &Path, access: Access) -> Result<Self, Error> {
        Ok(Self {
            v4: FamilyMaps::open(folder, access)?,
            v6: FamilyMaps::open(folder, access)?,
            settings: table(folder, "settings")?,
            ports: array(folder, "ports", access)?,
            slots: array(folder, "slots", access)?,
            addresses: array(folder, "addresses", access)?,
            node_ports: array(folder, "node_ports", access)?,
            devices: table(folder, "devices")?,
            names: table(folder, "names")?,
            backend_counts: table(folder, "backend_counts")?,
            failure_counts: table(folder, "failure_counts")?,
            reason_counts: table(folder, "reason_counts")?,
            socket_counts: table(folder, "socket_counts")?,
            rejects: table(folder, "rejects")?,
            callers: table(folder, "callers")?,
        })
    }

    /// Copies what the packet path stores, but neither the plan's maps nor counters, to maps of
    /// other sizes. Entries that find no room are lost.
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
