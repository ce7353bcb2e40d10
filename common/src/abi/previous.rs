//! The layout before this one: its types, and what becomes of them.
//!
//! A program that packets meet on one device may be of another version than the one on the next
//! device, as long as an upgrade replaces them. So a change of layout takes rounds ([`Round`]): in
//! each, every program is replaced before the next one begins, and the programs of two rounds that
//! follow each other understand what the other one writes.
//!
//! To change what a flow, or a client's affinity, is: move what `tables.rs` holds here, write the
//! new types there, raise [`LAYOUT`](super::LAYOUT), fill in the three items below, and build
//! `ebpf` with its feature `both-layouts`. The features `next-layout` do all that with a layout of
//! their own: it has no other use than to be upgraded to in tests.

pub use super::tables::{Affinity, Flow};

/// The version before [`LAYOUT`](super::LAYOUT); [`None`]: it cannot be upgraded from without
/// losing flows.
pub const LAYOUT: Option<u32> = if cfg!(feature = "next-layout") { Some(3) } else { None };

/// The maps that differ from that version's. All others are used on as they are.
pub const CHANGED: &[&str] = if cfg!(feature = "next-layout") { &MOVED } else { &[] };

/// The maps whose entries can be moved from one layout to another.
pub const MOVED: [&str; 6] =
    ["flows_v4", "flows_v6", "embryonic_v4", "embryonic_v6", "affinity_v4", "affinity_v6"];

/// What stands before a map's name where an object holds it in the previous layout.
pub const PREFIX: &str = "old_";

/// The constant of the object that holds a [`Round`].
pub const ROUND: &str = "round";

/// Which layouts a program reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Round {
    /// This one alone.
    Settled = 0,
    /// Reads both, writes the previous one: beside programs that know no other.
    WritesPrevious = 1,
    /// Reads both, writes this one: beside programs that are to know no other.
    WritesCurrent = 2,
}

/// A value that has another form in the previous layout.
pub trait Moved: Copy {
    /// The other form.
    type Before: Copy;
    /// This value as the previous version knows it.
    fn before(&self) -> Self::Before;
    /// A value of the previous version.
    fn after(before: &Self::Before) -> Self;
}

#[cfg(not(feature = "next-layout"))]
impl<A: Copy> Moved for super::Flow<A> {
    type Before = Self;
    #[inline(always)]
    fn before(&self) -> Self {
        *self
    }
    #[inline(always)]
    fn after(before: &Self) -> Self {
        *before
    }
}

#[cfg(not(feature = "next-layout"))]
impl Moved for super::Affinity {
    type Before = Self;
    #[inline(always)]
    fn before(&self) -> Self {
        *self
    }
    #[inline(always)]
    fn after(before: &Self) -> Self {
        *before
    }
}
