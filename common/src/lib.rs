//! Everything that the kernel programs and the agent share: the maps' ABI, header views, checksums,
//! Maglev and the packet's path.
//!
//! The crate depends on neither aya nor std. The path ([`path`]) is written once, generic over the
//! address family and over two small traits: [`Packet`] reads header fields by value, and
//! [`Tables`] answers the path's questions about the maps. It runs in the kernel, in host tests, in
//! the simulation and in `sluice explain`.

#![cfg_attr(not(test), no_std)]
#![allow(
    clippy::inline_always,
    reason = "the verifier follows values only through inlined code: what a program calls is part of it"
)]
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

#[cfg(not(target_arch = "bpf"))]
extern crate alloc;

pub mod abi;
pub mod bench;
pub mod engine;
pub mod event;
pub mod failure;
pub mod family;
pub mod maglev;
pub mod packet;
pub mod path;
pub mod reason;
pub mod tables;

pub use failure::Failure;
pub use family::{Family, V4, V6};
pub use packet::parse::Packet;
pub use reason::Reason;
pub use tables::Tables;
