//! Compares what the sources ask for with what the maps hold, entry by entry: `sluice diff`.
//!
//! [`Wanted`] is what an agent that starts now would make of the maps. It adopts their ids, so that
//! the same objects give the same entries, and only real differences remain. [`compare`] lists
//! them. Both are pure; the command (`cli::diff`) reads sources, devices and maps.
//!
//! Three differences are expected and not reported: a bit of `addresses` or `node_ports` that
//! outlives its frontend while connections drain; state owned by the packet path (flows, affinity,
//! counters); and, in `settings`, the cookie of the network namespace and Sluice's own device,
//! which only the agent knows.

mod wanted;

pub use crate::node::difference::{Change, Difference, ReadError, State, compare};
pub use wanted::{Inputs, Wanted, wanted};

#[cfg(test)]
mod tests;
