//! Takes a packet from its headers to an [`Action`](adapter::Action).
//!
//! The path decides; the engine opens and records flows, carries decisions out and counts. It works
//! over abilities that an adapter lends: the kernel's programs, the host tests, the simulation and
//! `sluice explain`.

pub mod act;
pub mod adapter;
pub mod count;
pub mod layouts;
pub mod limit;
pub mod open;
pub mod record;
pub mod search;
pub mod tc;
pub mod xdp;
