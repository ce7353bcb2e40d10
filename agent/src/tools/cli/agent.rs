//! `sluice agent`: the agent's flags, and its life from start to restart.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Args, Parser as _};
use sluice_core::policy::SocketPath;

use super::conntrack::ConntrackArgs;
use super::kube_proxy::{Expanded, expand};
use super::monitor::MonitorArgs;
use super::policy::PolicyArgs;
use super::{Cli, Command, Outcome, Places, cleanup, runtime, sizes};
use crate::daemon::agent::{self, Ended, Options, Reload};
use crate::daemon::log::{self, LogFormat};
use crate::daemon::source::kubernetes;
use crate::daemon::takeover::request::{self, Request};
use crate::node::dataplane::{Layout, Xdp};
use crate::node::devices::pattern::Patterns;
use crate::node::kube_proxy::{served_in_iptables_mode, serves_by_ipvs};
use crate::node::status::{self, Invocation};

/// The flags of `sluice agent`.
#[derive(Debug, Args)]
pub(super) struct AgentArgs {
    /// Read Services, EndpointSlices, Endpoints and Nodes from the YAML files of a directory, and
    /// follow changes. The API server is not used then, unless --kubeconfig or --api is given.
    #[arg(long, help_heading = "Sources", value_name = "DIR")]
    pub(super) manifests: Option<PathBuf>,
    /// The kubeconfig file for the API server [default: $KUBECONFIG, ~/.kube/config or the pod's
    /// service account].
    #[arg(long, help_heading = "Sources", value_name = "FILE")]
    pub(super) kubeconfig: Option<PathBuf>,
    /// The API server's address, instead of the configured one. The address of the Service
    /// "kubernetes" does not work until a proxy serves it.
    #[arg(long, help_heading = "Sources", value_name = "URL", env = "SLUICE_API")]
    pub(super) api: Option<String>,
    /// Serve only Services whose label service.kubernetes.io/service-proxy-name has this value,
    /// instead of those without the label.
    #[arg(long, help_heading = "Sources", value_name = "NAME")]
    pub(super) proxy_name: Option<String>,
    /// This node's name, as in nodeName of endpoints [default: the host's name].
    #[arg(long, help_heading = "Sources", value_name = "NAME", env = "NODE_NAME")]
    pub(super) node_name: Option<String>,
    /// Translate the sockets of the processes in this cgroup [default: the root of the cgroup2
    /// mount].
    #[arg(long, help_heading = "Devices and maps", value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Whose connections are translated once, at the socket, instead of packet by packet.
    #[arg(
        long,
        help_heading = "Devices and maps",
        value_enum,
        default_value_t,
        value_name = "SCOPE"
    )]
    pub(super) socket_path: SocketPath,
    /// Whether uplinks use XDP.
    #[arg(
        long,
        help_heading = "Devices and maps",
        value_enum,
        default_value_t,
        value_name = "MODE"
    )]
    xdp: Xdp,
    /// Devices that lead to pods, as patterns with * and ?. Takes precedence over detection. May be
    /// repeated.
    #[arg(long, help_heading = "Devices and maps", value_name = "PATTERN", value_delimiter = ',')]
    pub(super) edge: Vec<String>,
    /// Devices that carry the node's address; see --edge.
    #[arg(long, help_heading = "Devices and maps", value_name = "PATTERN", value_delimiter = ',')]
    pub(super) uplink: Vec<String>,
    /// Overlay and tunnel devices; see --edge.
    #[arg(long, help_heading = "Devices and maps", value_name = "PATTERN", value_delimiter = ',')]
    pub(super) fabric: Vec<String>,
    /// The number of flows that the maps can hold, per address family [default: 32768 per CPU, at
    /// least 131072, within 1/256 of the memory].
    #[arg(long, help_heading = "Devices and maps", value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(64..=i64::from(super::FLOWS_LIMIT)))]
    flows_max: Option<u32>,
    /// The layout of the maps that flows are written in. With `previous`, the version before this
    /// one can take over without losing a flow.
    #[arg(
        long,
        help_heading = "Devices and maps",
        value_enum,
        default_value_t,
        value_name = "LAYOUT"
    )]
    layout: Layout,
    /// Start next to a running kube-proxy: its connections continue, and new ones are served here.
    /// An agent that finds an earlier agent's maps continues from them; see `sluice takeover`.
    #[arg(long, help_heading = "Takeover")]
    takeover: bool,
    /// The format of the log.
    #[arg(
        long,
        help_heading = "Log and process",
        value_enum,
        default_value_t,
        value_name = "FORMAT"
    )]
    log_format: LogFormat,
    /// How readily the kernel kills the agent when memory is short, from -1000 (never) to 1000.
    #[arg(
        long,
        help_heading = "Log and process",
        value_name = "NUMBER",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(i32).range(-1000..=1000)
    )]
    oom_score_adj: Option<i32>,
    /// Log more; give it twice to log everything. The variable SLUICE_LOG takes filters such as
    /// `sluice=debug`. docs/operate.md describes how to change it while the agent runs.
    #[arg(short, long, help_heading = "Log and process", action = clap::ArgAction::Count)]
    verbose: u8,
    // These come last: their headings would apply to what follows.
    #[command(flatten)]
    pub(super) policy: PolicyArgs,
    #[command(flatten)]
    monitor: MonitorArgs,
    #[command(flatten)]
    conntrack: ConntrackArgs,
}

/// Runs the agent until it is stopped, and restarts it in its own place when its configuration has
/// changed or the node is released.
///
/// # Errors
///
/// Fails if the flags cannot be used, or the agent fails.
pub(super) fn run(args: AgentArgs, places: &Places, expanded: Expanded) -> anyhow::Result<Outcome> {
    log::start(args.verbose, args.log_format);
    if !expanded.meaningless.is_empty() {
        tracing::warn!(
            "ignored kube-proxy settings that have no meaning here: {}",
            expanded.meaningless.join(", ")
        );
    }
    let invocation = Invocation::here(&expanded.words);
    let follows = expanded.config.is_some();
    let reload = Reload { follows, is_changed: Arc::new(move || is_changed(&expanded)) };
    let options = Options { invocation, ..args.options(places.clone(), reload)? };
    let Places { pin_path, state_dir, proc_sys } = places;
    if request::read(state_dir) == Some(Request::Released) && !status::is_alive(state_dir) {
        // The last agent may have been killed before it had removed everything.
        let _ = runtime()?.block_on(cleanup::remove(pin_path, state_dir, proc_sys))?;
    }
    // The runtime, and with it whatever holds programs, ends before the next line.
    let ended = runtime()?.block_on(agent::run(options))?;
    if ended == Ended::Released {
        for done in runtime()?.block_on(cleanup::remove(pin_path, state_dir, proc_sys))? {
            tracing::info!("{done}");
        }
    }
    if ended == Ended::Stopped { Ok(Outcome::default()) } else { Err(restart()) }
}

/// Reports whether the agent would have other options if it restarted now.
///
/// # Errors
///
/// Fails if it could not start.
fn is_changed(before: &Expanded) -> anyhow::Result<bool> {
    let now = expand(std::env::args_os().collect())?;
    if now.words == before.words {
        return Ok(false);
    }
    let Command::Agent(args) = Cli::try_parse_from(&now.words)?.command else {
        bail!("the command line is no longer the agent's")
    };
    args.policy.policy().map(|_| true)
}

/// Replaces this process by a new one of the same program.
fn restart() -> anyhow::Error {
    let mut words = std::env::args_os();
    let name = words.next().unwrap_or_default();
    let mut command = std::process::Command::new("/proc/self/exe");
    anyhow::Error::from(command.arg0(name).args(words).exec()).context("cannot restart")
}

impl AgentArgs {
    fn options(self, places: Places, reload: Reload) -> anyhow::Result<Options> {
        if let Some(folder) = &self.manifests
            && !folder.is_dir()
        {
            bail!("--manifests {}: there is no such directory", folder.display());
        }
        self.check_takeover()?;
        let node = node_name(self.node_name)?;
        let uses_server =
            self.manifests.is_none() || self.kubeconfig.is_some() || self.api.is_some();
        let policy = self.policy.policy()?;
        let kubernetes = kubernetes::Settings {
            kubeconfig: self.kubeconfig,
            api: self.api,
            node: Some(node.clone()),
            proxy_name: self.proxy_name.clone(),
            // Next to another proxy, that one serves most addresses in these networks.
            service_cidrs: policy.service_cidrs.is_empty() && self.proxy_name.is_none(),
            requests: kubernetes::Requests::default(),
        };
        Ok(Options {
            node,
            pin_path: places.pin_path,
            state_dir: places.state_dir,
            proc_sys: places.proc_sys,
            cgroup: self.cgroup,
            patterns: Patterns::new(&self.edge, &self.uplink, &self.fabric),
            policy,
            socket_path: self.socket_path,
            invocation: Invocation::default(),
            xdp: self.xdp,
            layout: self.layout,
            kubernetes: uses_server.then_some(kubernetes),
            proxy_name: self.proxy_name,
            manifests: self.manifests,
            sizes: sizes_of(self.flows_max),
            monitor: self.monitor.settings(),
            conntrack: self.conntrack.limits(),
            oom_score_adj: self.oom_score_adj,
            takeover: self.takeover,
            reload,
        })
    }

    /// Refuses to take over from a kube-proxy whose connections or node ports would be lost.
    fn check_takeover(&self) -> anyhow::Result<()> {
        if self.takeover && serves_by_ipvs() {
            bail!(
                "kube-proxy uses IPVS here, whose connections cannot be taken over: drain the \
                 node, stop kube-proxy, run `kube-proxy --cleanup`, and start without --takeover"
            );
        }
        if self.takeover && self.policy.leaves_node_ports_open() && served_in_iptables_mode()? {
            bail!(
                "kube-proxy serves node ports at all addresses of this node, as its iptables mode \
                 does; Sluice would serve them only at the primary ones. Choose one: \
                 --nodeport-addresses all, or --nodeport-addresses primary"
            );
        }
        Ok(())
    }
}

/// Returns the capacities of maps that differ from those in the object.
fn sizes_of(flows_max: Option<u32>) -> BTreeMap<String, u32> {
    let flows = flows_max.unwrap_or_else(sizes::flows);
    if flows == sizes::FLOWS_MIN {
        return BTreeMap::new();
    }
    // Two entries for each flow.
    ["flows_v4", "flows_v6"].map(|map| (map.to_owned(), flows.saturating_mul(2))).into()
}

/// Returns the given node name, or else the host's.
fn node_name(given: Option<String>) -> anyhow::Result<String> {
    match given {
        Some(name) if name.is_empty() => {
            bail!("--node-name is empty; leave it out to use the host's name")
        }
        Some(name) => Ok(name),
        None => host_name(),
    }
}

/// Returns the host's name, as the kernel has it.
pub(super) fn host_name() -> anyhow::Result<String> {
    let path = Path::new("/proc/sys/kernel/hostname");
    let name =
        std::fs::read_to_string(path).context("cannot read the host's name; give --node-name")?;
    Ok(name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &[&str]) -> Options {
        let cli = Cli::parse_from(["sluice", "agent"].iter().chain(words));
        let Command::Agent(args) = cli.command else { panic!("another command") };
        let reload = Reload { follows: false, is_changed: Arc::new(|| Ok(false)) };
        let places =
            Places { pin_path: "/p".into(), state_dir: "/s".into(), proc_sys: "/proc/sys".into() };
        args.options(places, reload).expect("good options")
    }

    #[test]
    fn manifests_alone_leave_the_api_server_out() {
        let options = options(&["--manifests", "/", "--node-name", "a", "--edge", "cali*,veth?"]);
        assert!(options.kubernetes.is_none());
        assert_eq!(options.patterns.role("cali0"), Some(crate::node::devices::Role::Edge));
    }

    #[test]
    fn addresses_of_no_service_belong_to_another_proxy_if_there_is_one() {
        let wants_networks = |more: &[&str]| {
            let words = [&["--kubeconfig", "/k", "--node-name", "a"][..], more].concat();
            options(&words).kubernetes.expect("the API server is a source").service_cidrs
        };
        assert!(wants_networks(&[]));
        assert!(!wants_networks(&["--proxy-name", "sluice"]));
        assert!(!wants_networks(&["--service-cidr", "10.96.0.0/16"]));
    }
}
