//! Addresses, tuples and times, of which the other keys and values are made.

use core::fmt::Debug;
use core::hash::Hash;

/// An IPv4 address in wire order. Aligned so that the kernel reads it as one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct Ipv4Address {
    /// The four bytes, most significant first.
    pub octets: [u8; 4],
}

/// An IPv6 address in wire order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct Ipv6Address {
    /// The sixteen bytes, most significant first.
    pub octets: [u8; 16],
}

// SAFETY: bytes: any are a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Ipv4Address {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Ipv6Address {}

mod sealed {
    /// Keeps [`Address`](super::Address) to the two families.
    #[cfg(not(feature = "user"))]
    pub trait Sealed {}
    /// Keeps [`Address`](super::Address) to the two families; the agent may read and write it.
    #[cfg(feature = "user")]
    pub trait Sealed: aya::Pod {}
    impl Sealed for super::Ipv4Address {}
    impl Sealed for super::Ipv6Address {}
}

/// An address of either family: [`Ipv4Address`] or [`Ipv6Address`].
pub trait Address:
    sealed::Sealed + Copy + Debug + Default + Eq + Ord + Hash + Send + Sync + 'static
{
}

impl Address for Ipv4Address {}
impl Address for Ipv6Address {}

abi! {
    /// A packet's five-tuple as it stands on the wire; the key of `flows` and `embryonic`.
    ///
    /// For an ICMP error it is the quoted packet's tuple, reversed.
    pub struct Tuple<A> {
        /// Source address.
        pub source: A,
        /// Destination address.
        pub destination: A,
        /// Source port, host order.
        pub source_port: u16,
        /// Destination port, host order.
        pub destination_port: u16,
        /// IP protocol number: 6 (TCP), 17 (UDP) or 132 (SCTP).
        pub protocol: u8,
        /// One of [`side`].
        pub side: u8,
        /// Zero.
        pub reserved: [u8; 2],
    } sizes 16, 40
}

impl<A: Copy> Tuple<A> {
    /// Returns the tuple of a packet that answers this one.
    #[inline(always)]
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
            side: self.side,
            reserved: [0; 2],
        }
    }
}

/// Values of [`Tuple::side`]: the side of the stack at which a packet of the tuple is translated,
/// where it could be either.
pub mod side {
    /// Everywhere else.
    pub const NEAR: u8 = 0;
    /// At the egress of the device that leads to the backend, where the client's source changes:
    /// the same tuple may come in as well, from a client that speaks to the backend directly.
    pub const FAR: u8 = 1;
}

/// Time since boot in units of 2^30 ns (1.07 s): a shift instead of a division on the hot path.
pub type Ticks = u32;

/// Nanoseconds in one tick, as a power of two.
pub const TICK_SHIFT: u32 = 30;
