//! The options of an agent, as the command line makes them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use sluice_core::policy::{Policy, SocketPath};

use crate::daemon::monitor;
use crate::daemon::source::kubernetes;
use crate::node::conntrack::limits::Limits;
use crate::node::dataplane::{Layout, Xdp};
use crate::node::devices::pattern::Patterns;
use crate::node::status::Invocation;

/// The options of an agent.
#[derive(Clone, Debug)]
pub struct Options {
    /// The node's name, as in `nodeName` of endpoints.
    pub node: String,
    /// The directory where maps and links are pinned.
    pub pin_path: PathBuf,
    /// The directory of the lock and the status.
    pub state_dir: PathBuf,
    /// The cgroup of the socket path, or [`None`] for the root of the cgroup2 mount.
    pub cgroup: Option<PathBuf>,
    /// The roles that the operator has given to devices.
    pub patterns: Patterns,
    /// The policy for traffic.
    pub policy: Policy,
    /// The processes whose calls the socket path translates.
    pub socket_path: SocketPath,
    /// The command line that these options come from.
    pub invocation: Invocation,
    /// The XDP mode of uplinks.
    pub xdp: Xdp,
    /// The layout in which the maps are written.
    pub layout: Layout,
    /// A directory of manifests.
    pub manifests: Option<PathBuf>,
    /// The connection to the API server, if it is a source.
    pub kubernetes: Option<kubernetes::Settings>,
    /// Serve only Services with this proxy name, instead of those without one.
    pub proxy_name: Option<String>,
    /// Capacities of maps that differ from those in the object.
    pub sizes: BTreeMap<String, u32>,
    /// The addresses where monitoring requests are answered.
    pub monitor: monitor::Settings,
    /// Settings for the kernel's connection tracking.
    pub conntrack: Limits,
    /// The directory of the kernel's settings: `/proc/sys`, or the node's, mounted elsewhere.
    pub proc_sys: PathBuf,
    /// The value for `/proc/self/oom_score_adj`.
    pub oom_score_adj: Option<i32>,
    /// Whether to take over from netfilter at the start.
    pub takeover: bool,
    /// The means of detecting changed options.
    pub reload: Reload,
}

/// The means by which the agent detects that its options have changed.
#[derive(Clone)]
pub struct Reload {
    /// Whether to check periodically, and not only on SIGHUP.
    pub follows: bool,
    /// Reports whether the options would be different if they were made now. Fails if none could be
    /// made.
    pub is_changed: Arc<dyn Fn() -> anyhow::Result<bool> + Send + Sync>,
}

impl fmt::Debug for Reload {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Reload").field("follows", &self.follows).finish_non_exhaustive()
    }
}
