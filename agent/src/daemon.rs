//! The agent that runs on every node: it wires sources, model, plan and dataplane, and reports its
//! state.

pub mod agent;
pub mod attacher;
pub(crate) mod audit;
mod endpoint_log;
mod failures;
pub mod health;
mod http;
pub mod kubernetes_events;
pub(crate) mod log;
pub mod monitor;
mod routes;
mod side_tasks;
pub mod source;
mod sync;
pub mod takeover;
