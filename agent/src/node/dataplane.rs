//! The kernel side: loads the BPF object, attaches its programs, and carries an image's writes out
//! on its maps. The only module that knows aya or makes BPF system calls.
//!
//! Everything is pinned (module `pins`), so packets flow on when the agent is gone, and a new agent
//! finds maps and links, reads the image back, and repairs the difference.

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
pub use read::{Fill, FlowEntry};
pub use route_mtus::RouteMtus;
