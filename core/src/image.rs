//! The exact intended content of the maps, as ordered plain data.
//!
//! [`diff()`] turns two images into [`Write`]s that lead from the one to the other, make
//! before break; a [`Dataplane`] carries them out. Nothing here knows Kubernetes or aya.
//!
//! Conventions that the maps do not show by themselves:
//!
//! - Id 0 is no service port and no backend.
//! - A service port exists if and only if `names` has its id: a service port without
//!   backends is all zero in `ports`.
//! - A range of slots exists if and only if a service port refers to it; what lies in
//!   the other slots has no meaning.
//! - A backend that left its service stays, its flags cleared, until its id is given
//!   away with the next generation: connections that drain still find it, and the
//!   generation outlives the agent.

mod diff;
mod memory;
mod reconcile;

use std::collections::BTreeMap;
use std::net::IpAddr;

use sluice_common::abi::{
    Backend, Class, Ipv4Address, Ipv6Address, Name, NodeAddress, OriginKey, Origins, Range,
    Service, ServiceKey, ServicePort,
};
use sluice_common::{Family, V4, V6};

pub use diff::diff;
pub use memory::{Faulty, Memory};
pub use reconcile::Reconciler;

/// Every client class, in the order of [`ServicePort::ranges`].
pub const CLASSES: [Class; 3] = [Class::Internal, Class::ExternalInside, Class::ExternalOutside];

/// What all maps of the plan hold. Equal images are equal maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// The IPv4 maps.
    pub v4: FamilyImage<V4>,
    /// The IPv6 maps.
    pub v6: FamilyImage<V6>,
    /// Service-port id -> its ranges, affinity and policies; the map `ports`. Has the keys of
    /// `names`.
    pub ports: BTreeMap<u32, ServicePort>,
    /// Service-port id -> whose it is; the map `names`.
    pub names: BTreeMap<u32, Name>,
    /// First slot of a range -> the backend id in each of its slots; the map `slots`.
    ///
    /// Ranges begin at multiples of [`sluice_common::abi::SLOTS_PER_BLOCK`], so no two share a
    /// block.
    pub slots: BTreeMap<u32, Vec<u32>>,
    /// Lane -> bits of [`sluice_common::abi::listing`], none of them zero; the map `addresses`.
    ///
    /// A lane may belong to several addresses: its bits are those of all of them.
    pub lanes: BTreeMap<u32, u8>,
    /// Word -> a bit for each port number that a node port has, none of the words zero; the map
    /// `node_ports`.
    pub node_ports: BTreeMap<u32, u64>,
}

/// Where the bit of a port number is: word and bit.
pub fn node_port_bit(port: u16) -> (u32, u64) {
    (u32::from(port / 64), 1 << (port % 64))
}

/// A range of sources that a service port lets in; a key of the map `source_ranges`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceKey<A> {
    /// The service port.
    pub service_port: u32,
    /// How many bits the sources share.
    pub length: u8,
    /// The first of them.
    pub network: A,
}

/// What every key of the map `source_ranges` leads to.
pub const PERMITTED: u32 = 1;

/// The maps of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyImage<F: Family> {
    /// Frontend -> service port; the map `services`.
    pub services: BTreeMap<ServiceKey<F::Address>, Service>,
    /// Backend id -> endpoint; the map `backends`.
    pub backends: BTreeMap<u32, Backend<F::Address>>,
    /// Endpoint -> frontends that lead to it; the map `origins`.
    pub origins: BTreeMap<OriginKey<F::Address>, Origins<F::Address>>,
    /// Sources that a service port lets in -> [`PERMITTED`]; the map `source_ranges`.
    pub source_ranges: BTreeMap<SourceKey<F::Address>, u32>,
    /// Address of this node -> what is done there; the map `node_addresses`.
    pub node_addresses: BTreeMap<F::Address, NodeAddress>,
}

impl<F: Family> Default for FamilyImage<F> {
    fn default() -> Self {
        Self {
            services: BTreeMap::new(),
            backends: BTreeMap::new(),
            origins: BTreeMap::new(),
            source_ranges: BTreeMap::new(),
            node_addresses: BTreeMap::new(),
        }
    }
}

/// One step of an update. Steps are carried out in order, each is complete when it returns,
/// and each may be repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Store backend ids from slot `start` on. No service port refers to the range yet.
    Slots {
        /// The first slot.
        start: u32,
        /// The id of each slot.
        backends: Vec<u32>,
    },
    /// Set a lane of `addresses` to exactly these bits; zero clears it.
    Listing {
        /// The lane (see [`sluice_common::family::lane`]): bits `4 * (lane % 16)` of word
        /// `lane / 16`.
        lane: u32,
        /// The new bits.
        bits: u8,
    },
    /// Set a word of `node_ports`; zero clears it.
    NodePorts {
        /// The word.
        word: u32,
        /// Its new bits.
        bits: u64,
    },
    /// Say whose a service port is.
    Name {
        /// Its id.
        service_port: u32,
        /// Whose it is. Boxed, since it is five times as large as any other step, and a first full
        /// update has a million of them.
        name: Box<Name>,
    },
    /// Set what a service port holds besides its ranges; a new one begins with empty ranges.
    Port {
        /// Its id.
        service_port: u32,
        /// Session affinity in seconds.
        affinity_seconds: u32,
        /// Flags.
        flags: u32,
    },
    /// Flip one class of a service port to another range: one atomic store.
    Range {
        /// Its id.
        service_port: u32,
        /// For which clients.
        class: Class,
        /// The new range.
        range: Range,
    },
    /// A step of one of the IPv4 maps.
    V4(FamilyWrite<V4>),
    /// A step of one of the IPv6 maps.
    V6(FamilyWrite<V6>),
    /// Wait until no program still runs that began before (`membarrier`): what was
    /// unlinked before is given away or overwritten after.
    Grace,
    /// Forget a range that no service port refers to. Nothing has to be stored.
    ClearSlots {
        /// The first slot.
        start: u32,
        /// The number of slots.
        size: u32,
    },
    /// Zero a service port.
    ClearPort {
        /// Its id.
        service_port: u32,
    },
    /// Remove the name of a service port, after which its id is free.
    ClearName {
        /// Its id.
        service_port: u32,
    },
}

/// One step in the maps of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FamilyWrite<F: Family> {
    /// Store a backend that no slot refers to.
    Backend {
        /// Its id.
        id: u32,
        /// The backend.
        backend: Backend<F::Address>,
    },
    /// Change a backend's flags: one atomic store.
    BackendFlags {
        /// Its id.
        id: u32,
        /// Bits of [`sluice_common::abi::backend`].
        flags: u32,
    },
    /// Zero a backend that no slot refers to.
    ClearBackend {
        /// Its id.
        id: u32,
    },
    /// Insert a frontend (the key does not exist).
    ServiceInsert {
        /// The frontend.
        key: ServiceKey<F::Address>,
        /// Where it leads.
        service: Service,
    },
    /// Remove a frontend.
    ServiceRemove {
        /// The frontend.
        key: ServiceKey<F::Address>,
    },
    /// Insert or replace the frontends of an endpoint.
    OriginInsert {
        /// The endpoint.
        key: OriginKey<F::Address>,
        /// The frontends; boxed, as they are larger than any other step but a name.
        origins: Box<Origins<F::Address>>,
    },
    /// Remove the frontends of an endpoint.
    OriginRemove {
        /// The endpoint.
        key: OriginKey<F::Address>,
    },
    /// Let sources use a service port.
    SourceInsert {
        /// The sources.
        key: SourceKey<F::Address>,
    },
    /// Let sources use a service port no longer.
    SourceRemove {
        /// The sources.
        key: SourceKey<F::Address>,
    },
    /// Insert or replace an address of this node.
    NodeInsert {
        /// The address.
        address: F::Address,
        /// What is done there.
        node: NodeAddress,
    },
    /// Remove an address that is no longer this node's.
    NodeRemove {
        /// The address.
        address: F::Address,
    },
}

/// Finds the part of an [`Image`] that belongs to a family, so that code over both is written once.
pub trait Stack: Family {
    /// The family's maps.
    fn of(image: &Image) -> &FamilyImage<Self>;
    /// The family's maps.
    fn of_mut(image: &mut Image) -> &mut FamilyImage<Self>;
    /// Wraps a step.
    fn write(write: FamilyWrite<Self>) -> Write;
    /// The family's form of an address; [`None`] if it is of the other.
    fn address(address: IpAddr) -> Option<Self::Address>;
    /// The common form of an address.
    fn ip(address: Self::Address) -> IpAddr;
}

impl Stack for V4 {
    fn of(image: &Image) -> &FamilyImage<Self> {
        &image.v4
    }
    fn of_mut(image: &mut Image) -> &mut FamilyImage<Self> {
        &mut image.v4
    }
    fn write(write: FamilyWrite<Self>) -> Write {
        Write::V4(write)
    }
    fn address(address: IpAddr) -> Option<Ipv4Address> {
        match address {
            IpAddr::V4(address) => Some(address.into()),
            IpAddr::V6(_) => None,
        }
    }
    fn ip(address: Ipv4Address) -> IpAddr {
        IpAddr::V4(address.into())
    }
}

impl Stack for V6 {
    fn of(image: &Image) -> &FamilyImage<Self> {
        &image.v6
    }
    fn of_mut(image: &mut Image) -> &mut FamilyImage<Self> {
        &mut image.v6
    }
    fn write(write: FamilyWrite<Self>) -> Write {
        Write::V6(write)
    }
    fn address(address: IpAddr) -> Option<Ipv6Address> {
        match address {
            IpAddr::V6(address) => Some(address.into()),
            IpAddr::V4(_) => None,
        }
    }
    fn ip(address: Ipv6Address) -> IpAddr {
        IpAddr::V6(address.into())
    }
}

/// What carries writes out: the kernel's maps, or memory.
pub trait Dataplane {
    /// Carries the writes out, in order, up to the first that fails.
    ///
    /// # Errors
    ///
    /// The first failure, with the number of writes that were carried out before it. The
    /// failed one may be half done; repeating it is safe.
    fn apply(&mut self, writes: &[Write]) -> Result<(), ApplyError>;

    /// What the maps hold now.
    ///
    /// Ranges of slots are found through the service ports that refer to them, service ports
    /// through `names`, backends by a generation other than zero.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    fn read(&self) -> Result<Image, ReadError>;
}

/// A write that failed.
#[derive(Debug, thiserror::Error)]
#[error("write {done} failed ({what}): {cause}")]
pub struct ApplyError {
    /// How many writes were carried out before it.
    pub done: usize,
    /// The step that failed, for people.
    pub what: String,
    /// Why.
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

/// A map that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read map {map}: {cause}")]
pub struct ReadError {
    /// The map.
    pub map: String,
    /// Why.
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

impl Image {
    /// Does to the image what a write does to the maps.
    pub fn apply(&mut self, write: &Write) {
        match write {
            Write::Slots { start, backends } => {
                let _ = self.slots.insert(*start, backends.clone());
            }
            Write::Listing { lane, bits } => {
                let _ = match bits {
                    0 => self.lanes.remove(lane),
                    _ => self.lanes.insert(*lane, *bits),
                };
            }
            Write::NodePorts { word, bits } => {
                let _ = match bits {
                    0 => self.node_ports.remove(word),
                    _ => self.node_ports.insert(*word, *bits),
                };
            }
            Write::Name { service_port, name } => {
                let _ = self.names.insert(*service_port, **name);
            }
            Write::Port { service_port, affinity_seconds, flags } => {
                let port = self.ports.entry(*service_port).or_default();
                port.affinity_seconds = *affinity_seconds;
                port.flags = *flags;
            }
            Write::Range { service_port, class, range } => {
                let port = self.ports.entry(*service_port).or_default();
                port.ranges[*class as usize] = range.0;
            }
            Write::V4(write) => self.v4.apply(write),
            Write::V6(write) => self.v6.apply(write),
            Write::Grace => {}
            Write::ClearSlots { start, .. } => {
                let _ = self.slots.remove(start);
            }
            Write::ClearPort { service_port } => {
                let _ = self.ports.remove(service_port);
            }
            Write::ClearName { service_port } => {
                let _ = self.names.remove(service_port);
            }
        }
    }
}

impl<F: Family> FamilyImage<F> {
    fn apply(&mut self, write: &FamilyWrite<F>) {
        match write {
            FamilyWrite::Backend { id, backend } => {
                let _ = self.backends.insert(*id, *backend);
            }
            FamilyWrite::BackendFlags { id, flags } => {
                if let Some(backend) = self.backends.get_mut(id) {
                    backend.flags = *flags;
                }
            }
            FamilyWrite::ClearBackend { id } => {
                let _ = self.backends.remove(id);
            }
            FamilyWrite::ServiceInsert { key, service } => {
                let _ = self.services.insert(*key, *service);
            }
            FamilyWrite::ServiceRemove { key } => {
                let _ = self.services.remove(key);
            }
            FamilyWrite::OriginInsert { key, origins } => {
                let _ = self.origins.insert(*key, **origins);
            }
            FamilyWrite::OriginRemove { key } => {
                let _ = self.origins.remove(key);
            }
            FamilyWrite::SourceInsert { key } => {
                let _ = self.source_ranges.insert(*key, PERMITTED);
            }
            FamilyWrite::SourceRemove { key } => {
                let _ = self.source_ranges.remove(key);
            }
            FamilyWrite::NodeInsert { address, node } => {
                let _ = self.node_addresses.insert(*address, *node);
            }
            FamilyWrite::NodeRemove { address } => {
                let _ = self.node_addresses.remove(address);
            }
        }
    }
}
