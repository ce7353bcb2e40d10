//! Loads the BPF object into the kernel, attaches its programs, and carries out an image's writes
//! on its maps. Only this module uses aya or makes BPF system calls.
//!
//! Everything is pinned (module `pins`), so packets keep flowing without an agent. A new agent
//! finds the maps and links, reads the image back, and repairs the difference.

mod attempts;
mod audit;
mod bpf;
mod cleanup;
pub mod clsact;
mod datagrams;
mod error;
mod events;
pub mod hooks;
mod kernel;
mod layouts;
mod load;
mod maps;
mod object;
mod pins;
mod programs;
mod read;
mod route_mtus;
pub(crate) mod trial;
mod unanswered;

pub(crate) use attempts::Attempts;
pub use audit::Digests;
pub use cleanup::cleanup;
pub use datagrams::{DatagramKey, Datagrams};
pub use error::Error;
pub(crate) use events::{Events, now_ns};
pub use hooks::{Attached, Hooks, How, Target, Xdp};
pub use kernel::Kernel;
pub(crate) use kernel::KernelStack;
pub(crate) use kernel::Visit;
pub use layouts::Layout;
pub use load::{Loaded, load};
pub use maps::{Access, FamilyMaps, Maps};
pub use object::{Spec, difference};
pub(crate) use pins::is_bpffs;
pub use pins::{Found, Pins, is_kept};
pub use read::{Failures, Fill, FlowEntry};
pub use route_mtus::RouteMtus;
pub(crate) use unanswered::Pending;
