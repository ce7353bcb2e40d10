//! The maps' keys and values, declared once for kernel and agent.
//!
//! Addresses are bytes in wire order; ports are numbers in host order, so that a plain
//! `bpftool map dump` shows `80` and not `20480`. No struct has padding (the sum of its fields'
//! sizes is compared with its own at compile time), and its size is asserted next to it, since a
//! changed size is a changed layout: raise [`LAYOUT`] with it if the map's entries outlive an
//! upgrade. A map that the agent fills is made anew if it differs.

/// Declares map keys and values: C layout, no padding, known size. A struct of both families has
/// its IPv4 size first, then its IPv6 size.
macro_rules! abi {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* pub $field:ident : $ty:ty),* $(,)? } size $size:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(C)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty),* }
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$ty>())* == $size);
        // SAFETY: plain integers without padding: any bytes are a value.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    };
    ($(#[$meta:meta])* pub struct $name:ident<A> { $($(#[$fmeta:meta])* pub $field:ident : $ty:ty),* $(,)? } sizes $v4:literal, $v6:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(C)]
        pub struct $name<A: Copy> { $($(#[$fmeta])* pub $field: $ty),* }
        const _: () = {
            type A = $crate::abi::Ipv4Address;
            assert!(size_of::<$name<A>>() == $v4 && 0 $(+ size_of::<$ty>())* == $v4);
        };
        const _: () = {
            type A = $crate::abi::Ipv6Address;
            assert!(size_of::<$name<A>>() == $v6 && 0 $(+ size_of::<$ty>())* == $v6);
        };
        // SAFETY: plain integers without padding, for either family's addresses, and there are no
        // others: any bytes are a value.
        #[cfg(feature = "user")]
        unsafe impl<A: $crate::abi::Address> aya::Pod for $name<A> {}
    };
}

mod counter;
mod device_entry;
mod event;
mod flags;
mod flow_entry;
mod limits;
#[cfg(feature = "next-layout")]
mod next;
pub mod previous;
mod service;
mod setting;
mod socket;
mod tables;
mod tuple;

pub use counter::*;
pub use device_entry::*;
pub use event::*;
pub use flow_entry::*;
pub use limits::*;
#[cfg(feature = "next-layout")]
pub use next::{Affinity, Flow};
pub use service::*;
pub use setting::*;
pub use socket::*;
#[cfg(not(feature = "next-layout"))]
pub use tables::{Affinity, Flow};
pub use tuple::*;

/// Version of everything in this module and below; part of the pin path.
///
/// Maps of another version are never reused unchanged. [`previous`] says what becomes of those of
/// the version before.
pub const LAYOUT: u32 = 3 + cfg!(feature = "next-layout") as u32;
