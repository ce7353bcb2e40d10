//! What follows from objects and options: plain data and pure functions. Nothing here knows
//! Kubernetes' types, the kernel, time or a runtime.

pub mod cluster;
pub mod image;
pub mod model;
pub mod plan;
pub mod policy;
