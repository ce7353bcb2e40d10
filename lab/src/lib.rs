//! A lab: nodes, pods, overlay links, a router and outside clients made of network namespaces, with
//! real servers in them.
//!
//! The demo, the integration tests and the benches run the agent inside it. Nothing of the lab ever
//! touches the namespace it is started from: both ends of every link are created inside the lab's
//! own namespaces. It needs root, cgroup v2 (mounted anywhere) and iproute2; some features need the
//! program that they name (`tcpdump`, `ethtool`, `nft`, `nginx`).
//!
//! ```text
//!                     outside: client a 198.18.1.10      client b 198.18.2.10
//!                                   |                           |
//!                     router  ------+---------------------------+-----
//!                       lan0 192.0.2.1, 2001:db8:0:2::1 (bridge)
//!                         |                         |
//!                  node 1 eth0 192.0.2.11    node 2 eth0 192.0.2.12     (overlay between them on request)
//!                    |         |               |         |
//!                  pod 10.244.1.10 ...       pod 10.244.2.10 ...        fd00:10:244:<node>::<same>
//! ```
//!
//! The path of everything a lab owns contains its id, `slab<owner pid>-<its start>-<n>`:
//! namespaces, bpffs mounts and logs are below `/run/sluice-lab/<id>`, processes below the cgroup
//! `<cgroup root>/<id>`. Dropping the [`Lab`] takes it down, after a panic too, and so do SIGINT
//! and SIGTERM. [`sweep`], which every [`Lab::new`] runs, removes the labs of owners that were
//! killed. With `SLUICE_LAB_KEEP=1` a lab stays up, with all its processes, until [`remove_kept`].
//!
//! ```no_run
//! use sluice_lab::{Lab, NodeOptions, Serve};
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::new("hello")?;
//! let node = lab.node("n1", &NodeOptions::default())?;
//! let (web, asker) = (node.pod("web")?, node.pod("asker")?);
//! let _server = web.serve(Serve::Http, 8080)?;
//! let replies = asker.http_get(&format!("http://[{}]:8080/", web.ipv6()), 10)?;
//! assert!(replies.iter().all(|reply| reply.name == "web"));
//! # Ok(()) }
//! ```

mod agent;
pub mod cgroup;
mod count;
mod event;
mod lab;
mod leftovers;
mod load;
mod manifests;
pub mod mounts;
mod namespace;
pub mod netns;
mod node;
mod packets;
mod router;
mod running;
pub mod schema;
mod serve;
mod shared;
mod skip;
mod xdp;

pub use agent::{AgentOptions, AgentProcess};
pub use count::{Counter, Place, Side, Way};
pub use event::{Event, Load, Reply};
pub use lab::{Lab, is_root};
pub use leftovers::{remove_kept, sweep};
pub use load::{LoadClients, LoadSize, again_and_again};
pub use manifests::{Backend, Manifests, Port, Protocol, Service};
pub use namespace::Namespace;
pub use node::{Cni, DROP_INVALID, Node, NodeOptions, Overlay, Pod, RpFilter};
pub use packets::{Capture, PacketSocket};
pub use router::{Client, Router};
pub use running::Running;
pub use serve::{Serve, tool_path};
pub use skip::{Unsupported, skipped};
