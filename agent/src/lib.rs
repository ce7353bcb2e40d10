//! The node agent's library: from Kubernetes objects to the content of the kernel's maps.
//!
//! Data crosses each module boundary once, in one direction:
//!
//! ```text
//! object -> Change -> Desired -> Image -> [Write] -> map
//!  source    model     plan (pure)        dataplane
//! ```
//!
//! Only [`source`] knows Kubernetes types; `model`, `plan` and [`image`] are plain data
//! and pure functions.

pub mod agent;
pub mod announce;
pub mod cli;
pub mod conntrack;
pub mod dataplane;
pub mod devices;
pub mod drift;
pub mod explain;
mod folder;
pub mod fragments;
pub mod health;
mod http;
pub mod image;
mod log;
pub mod model;
pub mod monitor;
pub mod plan;
pub mod policy;
pub mod preflight;
pub mod source;
pub mod takeover;
mod top;
mod trace;
mod units;
mod view;
