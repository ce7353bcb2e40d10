//! What follows from objects and options: plain data and pure functions, from changes of objects to
//! the content of the kernel's maps.
//!
//! ```text
//! Change -> Desired -> Image -> [Write]
//!    model     plan       image
//! ```
//!
//! Nothing here knows Kubernetes' types, the kernel, a clock or a runtime.

#![forbid(unsafe_code)]

pub mod cluster;
pub mod image;
pub mod model;
pub mod plan;
pub mod policy;
