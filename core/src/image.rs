//! The exact intended content of the maps, as ordered plain data.
//!
//! [`diff()`] returns the [`Write`]s that turn one image into another, make before break; a
//! [`Dataplane`] carries them out. Nothing in this module depends on Kubernetes or aya.
//!
//! The maps follow conventions that their types do not show:
//!
//! - Id 0 stands for no service port and no backend.
//! - A service port exists if and only if `names` has its id, since a service port without
//!   backends is all zero in `ports`.
//! - A range of slots exists if and only if a service port refers to it. The content of all other
//!   slots is meaningless.
//! - A backend that has left its service keeps its entry, with its flags cleared, until its id is
//!   reused with the next generation. Draining connections still find it, and the generation
//!   survives a restart of the agent.

mod diff;
mod lookup;
pub mod map;
mod memory;
mod reconcile;

use std::net::IpAddr;

use sluice_common::abi::{Class, Ipv4Address, Ipv6Address, Name, Range};
use sluice_common::{Family, V4, V6};

pub use diff::diff;
pub use lookup::{lane, node_port_bit};
pub use map::{EntryWrite, FamilyImage, FamilyWrite, Image};
pub use memory::{Faulty, Memory};
pub use reconcile::Reconciler;

/// Every client class, in the order of `ServicePort::ranges`.
pub const CLASSES: [Class; 3] = [Class::Internal, Class::ExternalInside, Class::ExternalOutside];

/// A network whose addresses may use a service port; a key of the map `source_ranges`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceKey<A> {
    /// The service port.
    pub service_port: u32,
    /// The prefix length in bits.
    pub length: u8,
    /// The first address.
    pub network: A,
}

/// The value of every entry of the map `source_ranges`.
pub const PERMITTED: u32 = 1;

/// One step of an update.
///
/// Steps are carried out in order. Each is complete when it returns, and each is idempotent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Stores backend ids from slot `start` on. No service port refers to the range yet.
    Slots {
        /// The first slot.
        start: u32,
        /// The backend id of each slot.
        backends: Vec<u32>,
    },
    /// Sets a lane of `addresses` to exactly these bits; zero clears it.
    Listing {
        /// The lane (see [`sluice_common::family::lane`]): bits `4 * (lane % 16)` of word
        /// `lane / 16`.
        lane: u32,
        /// The new bits.
        bits: u8,
    },
    /// Sets a word of `node_ports`; zero clears it.
    NodePorts {
        /// The word.
        word: u32,
        /// Its new bits.
        bits: u64,
    },
    /// Names the owner of a service port.
    Name {
        /// The service port's id.
        service_port: u32,
        /// The owner. Boxed, since it is five times as large as any other step, and a first full
        /// update has a million steps.
        name: Box<Name>,
    },
    /// Sets everything in a service port but its ranges; a new service port starts with empty
    /// ranges.
    Port {
        /// The service port's id.
        service_port: u32,
        /// Session affinity in seconds.
        affinity_seconds: u32,
        /// Bits of [`sluice_common::abi::policy`].
        flags: u32,
    },
    /// Flips one class of a service port to another range, in one atomic store.
    Range {
        /// The service port's id.
        service_port: u32,
        /// The class of clients.
        class: Class,
        /// The new range.
        range: Range,
    },
    /// A step of one of the IPv4 maps.
    V4(FamilyWrite<V4>),
    /// A step of one of the IPv6 maps.
    V6(FamilyWrite<V6>),
    /// Waits until every program that is running now has ended (`membarrier`). What was unlinked
    /// before may be reused or overwritten afterwards.
    Grace,
    /// Forgets a range that no service port refers to. The kernel's maps do not change.
    ClearSlots {
        /// The first slot.
        start: u32,
        /// The number of slots.
        size: u32,
    },
    /// Zeroes a service port.
    ClearPort {
        /// The service port's id.
        service_port: u32,
    },
    /// Removes the name of a service port, after which its id is free.
    ClearName {
        /// The service port's id.
        service_port: u32,
    },
}

/// A family with its part of an [`Image`], so that code for both families is written once.
pub trait Stack: Family {
    /// Returns the family's maps.
    fn of(image: &Image) -> &FamilyImage<Self>;
    /// Returns the family's maps, to be changed.
    fn of_mut(image: &mut Image) -> &mut FamilyImage<Self>;
    /// Wraps a step in the family's maps.
    fn write(write: FamilyWrite<Self>) -> Write;
    /// Converts an address to the family's type, or returns [`None`] if it is of the other family.
    fn address(address: IpAddr) -> Option<Self::Address>;
    /// Converts an address of the family to the common type.
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

/// Maps that writes are carried out on: the kernel's, or those in memory.
pub trait Dataplane {
    /// Carries out the writes in order, up to the first that fails.
    ///
    /// # Errors
    ///
    /// Returns the first failure, with the number of writes that were carried out before it. The
    /// write that failed may be half done; repeating it is safe.
    fn apply(&mut self, writes: &[Write]) -> Result<(), ApplyError>;

    /// Reads the present content of the maps.
    ///
    /// Ranges of slots are found through the service ports that refer to them, service ports
    /// through `names`, and backends by a generation other than zero.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read.
    fn read(&self) -> Result<Image, ReadError>;
}

/// A write that failed.
#[derive(Debug, thiserror::Error)]
#[error("write {done} failed ({what}): {cause}")]
pub struct ApplyError {
    /// The number of writes that were carried out before it.
    pub done: usize,
    /// A description of the step that failed.
    pub what: String,
    /// The cause.
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

/// A map that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read map {map}: {cause}")]
pub struct ReadError {
    /// The name of the map.
    pub map: String,
    /// The cause.
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

impl Image {
    /// Applies a write to the image, as a dataplane applies it to the maps.
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
