//! The agent that runs on every node: it wires sources, model, plan and dataplane, and tells how it
//! is.

pub mod agent;
pub mod announce;
mod beside;
pub mod health;
mod http;
pub mod keeper;
pub(crate) mod log;
pub mod monitor;
pub mod source;
mod sync;
pub mod takeover;
