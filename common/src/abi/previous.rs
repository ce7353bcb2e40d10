//! The layout before this one: its types, and how maps move from it.
//!
//! While an upgrade replaces programs, those on one device may be of another version than those on
//! the next. A change of layout therefore takes rounds ([`Round`]): in each, every program is
//! replaced before the next round begins, and the programs of two successive rounds understand what
//! the others write.
//!
//! To change the value of a flow or of a client's affinity: move what `tables.rs` contains here,
//! write the new types there, raise [`LAYOUT`](super::LAYOUT), fill in the three items below, and
//! build `ebpf` with its feature `both-layouts`. The features `next-layout` do all that with a
//! layout of their own, whose only use is to be upgraded to in tests.

pub use super::tables::{Affinity, Flow};

/// The version before [`LAYOUT`](super::LAYOUT), or [`None`] if it cannot be upgraded from without
/// losing flows.
pub const LAYOUT: Option<u32> = if cfg!(feature = "next-layout") { Some(3) } else { None };

/// The maps that differ from that version's. All others are used unchanged.
pub const CHANGED: &[&str] = if cfg!(feature = "next-layout") { &MOVED } else { &[] };

/// The maps whose entries can be moved from one layout to another.
pub const MOVED: [&str; 6] =
    ["flows_v4", "flows_v6", "embryonic_v4", "embryonic_v6", "affinity_v4", "affinity_v6"];

/// Prefix of a map's name in an object that has it in the previous layout.
pub const PREFIX: &str = "old_";

/// Name of the object's constant that holds a [`Round`].
pub const ROUND: &str = "round";

/// The layouts that a program reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Round {
    /// This one alone.
    Settled = 0,
    /// Reads both and writes the previous one: other programs know no other.
    WritesPrevious = 1,
    /// Reads both and writes this one: other programs will soon know no other.
    WritesCurrent = 2,
}

/// The step that follows once all programs are of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The programs of another round replace those of this one.
    Load(Round),
    /// Entries move to this layout; then settled programs replace the others.
    MoveUp,
    /// Entries move to the previous layout, whose version can then take over.
    MoveDown,
    /// The change is complete.
    Done,
}

impl Round {
    /// Returns the step that follows this round on the way to this layout, or to the previous one.
    #[must_use]
    pub const fn step(self, to_previous: bool) -> Step {
        match (self, to_previous) {
            (Self::WritesPrevious, false) => Step::Load(Self::WritesCurrent),
            (Self::WritesCurrent, false) => Step::MoveUp,
            (Self::WritesCurrent, true) => Step::Load(Self::WritesPrevious),
            (Self::WritesPrevious, true) => Step::MoveDown,
            (Self::Settled, _) => Step::Done,
        }
    }
}

/// A value that has another form in the previous layout.
pub trait Moved: Copy {
    /// The other form.
    type Before: Copy;
    /// Returns this value as the previous version knows it.
    fn before(&self) -> Self::Before;
    /// Returns a value of the previous version in this one's form.
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
