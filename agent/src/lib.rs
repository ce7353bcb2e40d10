//! The node agent: turns Kubernetes objects into the content of the kernel's maps.
//!
//! Data crosses each module boundary once, in one direction:
//!
//! ```text
//! object -> Change -> Desired -> Image -> [Write] -> map
//!  source    model     plan (pure)        dataplane
//! ```
//!
//! `model`, `plan` and `image` are a crate of their own, `sluice_core`. The modules here form three
//! wings above it. A wing uses only itself and those to its right, as `cargo xtask lint` checks:
//!
//! ```text
//! tools -> daemon -> node -> core
//! ```

/// The commit that this was built from; `unknown` where there was no repository.
pub(crate) const REVISION: &str = env!("SLUICE_REVISION");

pub mod daemon;
pub mod node;
pub mod tools;
