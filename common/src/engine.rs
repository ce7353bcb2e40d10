//! What becomes of a packet: from its headers to an [`Action`](adapter::Action).
//!
//! The path decides, and what is here does the rest: it opens and records flows, acts and counts.
//! Adapters lend abilities: the kernel's programs, the tests and `sluice explain`.

pub mod act;
pub mod adapter;
pub mod count;
pub mod limit;
pub mod open;
pub mod record;
pub mod search;
pub mod tc;
pub mod xdp;
