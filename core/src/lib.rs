//! Computes the content of the kernel's maps from objects and options, by pure functions over plain
//! data.
//!
//! ```text
//! Change -> Desired -> Image -> [Write]
//!    model     plan       image
//! ```
//!
//! Nothing in this crate depends on Kubernetes' types, the kernel, a clock or a runtime.

#![forbid(unsafe_code)]

pub mod cluster;
pub mod image;
pub mod model;
pub mod plan;
pub mod policy;
