//! Agents and the real kube-proxy against a real API server. The tests need root, and the variables
//! that `cargo xtask test api` sets.
//!
//! The tests of a module share a control plane, those of two modules do not: `cargo xtask test api`
//! runs each module in a process of its own.

mod deploy;
mod diff;
mod events;
mod kube_proxy;
mod objects;
mod outages;
mod support;
mod takeover;
