//! The command line.

mod backends;
mod cleanup;
mod conntrack;
mod diff;
mod explain;
mod flows;
mod kube_proxy;
mod monitor;
mod policy;
mod preflight;
mod services;
mod sizes;
mod status;
mod table;
mod takeover;
mod top;
mod trace;
mod validate;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use sluice_core::policy::SocketPath;

use crate::daemon::agent::{self, Ended, Options, Reload};
use crate::daemon::log::{self, LogFormat};
use crate::daemon::source::kubernetes;
use crate::daemon::takeover::wish::{self, Wish};
use crate::node::dataplane::{Layout, Pins, Xdp};
use crate::node::devices::pattern::Patterns;
use crate::node::kube_proxy::{served_in_iptables_mode, serves_by_ipvs};
use crate::node::status::{Invocation, PIN_PATH, check as check_state_dir, state_dir};
use conntrack::ConntrackArgs;
use diff::DiffArgs;
use explain::ExplainArgs;
use kube_proxy::{Expanded, expand};
use monitor::MonitorArgs;
use policy::PolicyArgs;
use preflight::PreflightArgs;
use table::Format;
use takeover::{ReleaseArgs, TakeoverArgs};
use top::TopArgs;
use trace::TraceArgs;
use validate::ValidateArgs;

/// Sluice: a Service load balancer in the kernel, for Kubernetes nodes under any CNI.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, max_term_width = 100)]
pub struct Cli {
    /// Where maps and links are pinned; each agent has a path of its own.
    #[arg(long, global = true, value_name = "DIR", env = "SLUICE_PIN_PATH", default_value = PIN_PATH)]
    pin_path: PathBuf,
    /// Where the agent's lock and status.json lie [default: /run/sluice, or a folder in it for
    /// another --pin-path].
    #[arg(long, global = true, value_name = "DIR", env = "SLUICE_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Where settings of the kernel are written: a container that is not privileged sees its own
    /// /proc/sys read-only, and can be given the node's at another place.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "SLUICE_PROC_SYS",
        default_value = "/proc/sys"
    )]
    proc_sys: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node agent.
    ///
    /// It keeps the maps in step with Services and EndpointSlices, and the programs on devices and
    /// the cgroup. When it ends, packets flow on by what is pinned; `sluice cleanup` removes that.
    ///
    /// kube-proxy's flags and its configuration (--config FILE, a KubeProxyConfiguration) are taken
    /// as well: what has no meaning here is named in one warning, and a flag counts more than the
    /// file. When the file changes, and on SIGHUP, the agent starts anew in its own place.
    Agent(Box<AgentArgs>),
    /// Tell how this node is; the exit code is 0 if it is ready, else 1.
    Status {
        #[command(flatten)]
        output: Output,
    },
    /// List services, with what was counted.
    #[command(visible_alias = "svc")]
    Services {
        /// Only those of this namespace.
        #[arg(short, long, value_name = "NAMESPACE")]
        namespace: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// List backends, with their share of new flows and what was counted.
    Backends {
        /// Only those of this service: name, namespace/name or either with :port.
        service: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// List the flows that the maps know, those used last first.
    Flows {
        /// Only those to this service: name, namespace/name or either with :port.
        #[arg(long, value_name = "SERVICE")]
        service: Option<String>,
        /// At most so many.
        #[arg(long, value_name = "NUMBER")]
        limit: Option<usize>,
        #[command(flatten)]
        output: Output,
    },
    /// Show services by rate, the backends of one, and drops by reason, live.
    ///
    /// Where the output is no terminal, or with --once: one table, and an end.
    Top(TopArgs),
    /// Tell, while it runs, of flows that open and close, of calls that are translated, and of
    /// packets that are dropped, rejected or counted by another reason.
    ///
    /// Packets of established flows are not told, and nothing costs anything while nobody listens.
    /// One process can listen at a time.
    Trace(TraceArgs),
    /// Tell what a packet of a tuple would meet on this node, step by step, and which backend it
    /// would get.
    ///
    /// By the maps and routes of this node, read only; or by a folder of manifests, without root,
    /// kernel or cluster. The exit code is 0 for a packet that is forwarded or passed, 3 for one
    /// that is rejected, 4 for one that is dropped, 1 if there is no answer.
    Explain(Box<ExplainArgs>),
    /// Check manifests: report every object that would be refused, or lose an address to another.
    ///
    /// The exit code is 0 if none is, else 1.
    Validate(Box<ValidateArgs>),
    /// Tell whether this node can run Sluice, and what it would use.
    ///
    /// Every program is loaded, every hook tried on devices and a cgroup that are made for it;
    /// nothing stays. The exit code is 0 if Sluice can run, 1 if it cannot or too little could be
    /// tried (as somebody else than root).
    Preflight(Box<PreflightArgs>),
    /// Compare what the sources want with what the maps hold, entry by entry.
    ///
    /// The exit code is 0 if the maps are in step, 1 if they are not, 2 if it cannot be told.
    Diff(Box<DiffArgs>),
    /// Tell how far the takeover from kube-proxy is, and bring it about.
    ///
    /// `sluice agent --takeover` takes over when it starts. This waits until it serves, takes a
    /// node back that was released or is being released, and with --finish has kube-proxy's rules
    /// removed. The exit code is 0 when that is done, 1 if it is not in time.
    Takeover(TakeoverArgs),
    /// Hand this node back to kube-proxy: known flows are served to their end, new ones are left to
    /// it.
    ///
    /// When the last flow has ended, or at the timeout, the agent removes every trace and waits for
    /// `sluice takeover`. The exit code is 0 when the node is released, else 1.
    Release(ReleaseArgs),
    /// Remove every trace from this node: programs, maps, filters, the device sluice0 and its
    /// routes, reserved ports.
    ///
    /// Connections through services end with it. Works without an agent; refuses while one runs.
    Cleanup {
        /// Even if an agent is running.
        #[arg(long)]
        force: bool,
        /// Stay afterwards, until SIGTERM or SIGINT: for a pod that is Running when its node is
        /// clean.
        #[arg(long)]
        stay: bool,
    },
}

#[derive(Debug, Args)]
struct Output {
    /// The form of the output.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

#[derive(Debug, Args)]
struct AgentArgs {
    /// Read Services, EndpointSlices, Endpoints and Nodes from the YAML files of a folder, and
    /// follow changes; without --kubeconfig or --api, the API server is not asked then.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// How to reach the API server [default: $KUBECONFIG, ~/.kube/config or the pod's service
    /// account].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The API server's address, instead of the one configured: the Service "kubernetes" works only
    /// once somebody balances it.
    #[arg(long, value_name = "URL", env = "SLUICE_API")]
    api: Option<String>,
    /// Serve Services with this label service.kubernetes.io/service-proxy-name, instead of those
    /// without.
    #[arg(long, value_name = "NAME")]
    proxy_name: Option<String>,
    /// This node's name, as in nodeName of endpoints [default: the host's name].
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,
    /// The cgroup whose processes' sockets are translated [default: the root of the cgroup2 mount].
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Whose connections are translated at the socket, once, instead of packet by packet.
    #[arg(long, value_enum, default_value_t, value_name = "WHOSE")]
    socket_path: SocketPath,
    /// Whether uplinks use XDP.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    xdp: Xdp,
    /// Devices that lead to pods, as patterns with * and ?; goes before what is detected. May be
    /// repeated.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    edge: Vec<String>,
    /// Devices that carry the node's address; see --edge.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    uplink: Vec<String>,
    /// Overlay and tunnel devices; see --edge.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    fabric: Vec<String>,
    /// Flows that are remembered, per family; two entries each [default: 32768 a CPU, at least
    /// 131072, within 1/256 of the memory].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(64..=i64::from(FLOWS_LIMIT)))]
    flows_max: Option<u32>,
    /// In which layout of the maps flows are written: `previous` lets the version before take over
    /// without losing one.
    #[arg(long, value_enum, default_value_t, value_name = "LAYOUT")]
    layout: Layout,
    /// Begin beside a kube-proxy that runs: its connections go on, new ones are served here. An
    /// agent that starts with what another one has left serves on; see `sluice takeover`.
    #[arg(long)]
    takeover: bool,
    /// The log's form.
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    log_format: LogFormat,
    /// How willing the kernel is to end the agent when memory is short: -1000 (never) to 1000.
    #[arg(
        long,
        value_name = "NUMBER",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(i32).range(-1000..=1000)
    )]
    oom_score_adj: Option<i32>,
    /// Log more; twice: everything. The variable SLUICE_LOG has filters as `sluice=debug`. Changed
    /// while it runs: docs/operate.md.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    // Last: their headings would go on over what follows.
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    monitor: MonitorArgs,
    #[command(flatten)]
    conntrack: ConntrackArgs,
}

/// Where an agent finds what is its own, and the kernel's settings.
struct Places {
    pin_path: PathBuf,
    state_dir: PathBuf,
    proc_sys: PathBuf,
}

/// What people may do about manifests without objects.
const NO_OBJECTS: &str = "a Service, EndpointSlice, Endpoints or Node in a *.yaml, *.yml or *.json directly in the \
                          folder (not in one below) is wanted";

/// A command line that says something impossible.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// An error of a command whose code 1 is an answer.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
struct Unknown(anyhow::Error);

/// Runs a command; a wrong command line ends the process with code 2.
#[must_use]
pub fn main() -> ExitCode {
    let run = || {
        let expanded = expand(std::env::args_os().collect())?;
        Cli::parse_from(&expanded.words).run(expanded)
    };
    match run() {
        Ok(code) => code,
        Err(error) if error.is::<Usage>() => {
            eprintln!("error: {error:#}\n\nFor more information, try '--help'.");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            if error.is::<Unknown>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Whether the agent would run otherwise if it started anew.
///
/// # Errors
///
/// When it could not.
fn is_changed(before: &Expanded) -> anyhow::Result<bool> {
    let now = expand(std::env::args_os().collect())?;
    if now.words == before.words {
        return Ok(false);
    }
    let Command::Agent(args) = Cli::try_parse_from(&now.words)?.command else {
        bail!("the command line is the agent's no more")
    };
    args.policy.policy().map(|_| true)
}

/// Puts this program anew into its own place.
fn start_anew() -> anyhow::Error {
    let mut words = std::env::args_os();
    let name = words.next().unwrap_or_default();
    let mut command = std::process::Command::new("/proc/self/exe");
    anyhow::Error::from(command.arg0(name).args(words).exec()).context("cannot start anew")
}

impl Command {
    /// Whether it uses what is pinned on this node, or the agent's state.
    fn concerns_this_node(&self) -> bool {
        match self {
            Self::Validate(_) | Self::Preflight(_) => false,
            Self::Explain(args) => !args.is_of_manifests(),
            Self::Agent(_)
            | Self::Status { .. }
            | Self::Services { .. }
            | Self::Backends { .. }
            | Self::Flows { .. }
            | Self::Top(_)
            | Self::Trace(_)
            | Self::Diff(_)
            | Self::Takeover(_)
            | Self::Release(_)
            | Self::Cleanup { .. } => true,
        }
    }
}

impl Cli {
    fn run(self, expanded: Expanded) -> anyhow::Result<ExitCode> {
        let pin_path = std::path::absolute(&self.pin_path).context("--pin-path")?;
        let state_dir = self.state_dir.unwrap_or_else(|| state_dir(&pin_path));
        let mut code = 0;
        if self.command.concerns_this_node() {
            let checked = check_state_dir(&state_dir)
                .map_err(anyhow::Error::from)
                .and_then(|()| Ok(Pins::new(&pin_path).check()?));
            let is_diff = matches!(self.command, Command::Diff(_));
            checked.map_err(|error| if is_diff { Unknown(error).into() } else { error })?;
        }
        let text = match self.command {
            Command::Agent(args) => {
                log::start(args.verbose, args.log_format);
                if !expanded.meaningless.is_empty() {
                    tracing::warn!(
                        "settings of kube-proxy's that have no meaning here are left out: {}",
                        expanded.meaningless.join(", ")
                    );
                }
                let invocation = Invocation::here(&expanded.words);
                let follows = expanded.config.is_some();
                let reload =
                    Reload { follows, is_changed: Arc::new(move || is_changed(&expanded)) };
                let options =
                    args.options(Places { pin_path, state_dir, proc_sys: self.proc_sys }, reload)?;
                let options = Options { invocation, ..options };
                let (pin_path, state_dir) = (options.pin_path.clone(), options.state_dir.clone());
                let proc_sys = options.proc_sys.clone();
                if wish::read(&state_dir) == Some(Wish::Released)
                    && !crate::node::status::is_alive(&state_dir)
                {
                    // The last agent may have been killed before it had removed everything.
                    let _ =
                        runtime()?.block_on(cleanup::remove(&pin_path, &state_dir, &proc_sys))?;
                }
                // The runtime, and with it whatever holds programs, goes before the next line.
                let ended = runtime()?.block_on(agent::run(options))?;
                if ended == Ended::Released {
                    for done in
                        runtime()?.block_on(cleanup::remove(&pin_path, &state_dir, &proc_sys))?
                    {
                        tracing::info!("{done}");
                    }
                }
                if ended != Ended::Stopped {
                    return Err(start_anew());
                }
                String::new()
            }
            Command::Status { output } => {
                let (text, is_ready) = status::run(&pin_path, &state_dir, output.output)?;
                code = u8::from(!is_ready);
                text
            }
            Command::Services { namespace, output } => {
                services::run(&pin_path, namespace.as_deref(), output.output)?
            }
            Command::Backends { service, output } => {
                backends::run(&pin_path, service.as_deref(), output.output)?
            }
            Command::Flows { service, limit, output } => {
                flows::run(&pin_path, service.as_deref(), limit, output.output)?
            }
            Command::Top(args) => top::run(&args, &pin_path)?,
            Command::Trace(args) => {
                runtime()?.block_on(trace::run(args, &pin_path))?;
                String::new()
            }
            Command::Explain(args) => {
                let (text, verdict) = explain::run(*args, &pin_path, &state_dir)?;
                code = verdict;
                text
            }
            Command::Validate(args) => {
                let (text, wrong) = validate::run(*args)?;
                code = wrong;
                text
            }
            Command::Preflight(args) => {
                let (text, can_run) = preflight::run(*args, &pin_path, self.proc_sys)?;
                code = u8::from(!can_run);
                text
            }
            Command::Diff(args) => {
                let (text, is_in_step) =
                    runtime()?.block_on(diff::run(*args, &pin_path, &state_dir)).map_err(
                        |error| if error.is::<Usage>() { error } else { Unknown(error).into() },
                    )?;
                code = u8::from(!is_in_step);
                text
            }
            Command::Takeover(args) => {
                let (text, is_missing) = takeover::take_over(&args, &state_dir)?;
                code = is_missing;
                text
            }
            Command::Release(args) => {
                let (text, is_missing) = takeover::release(&args, &state_dir)?;
                code = is_missing;
                text
            }
            Command::Cleanup { force, stay } => {
                let runtime = runtime()?;
                let text =
                    runtime.block_on(cleanup::run(&pin_path, &state_dir, &self.proc_sys, force))?;
                if stay {
                    print(&text)?;
                    runtime.block_on(cleanup::stay())?;
                    return Ok(ExitCode::SUCCESS);
                }
                text
            }
        };
        print(&text)?;
        Ok(ExitCode::from(code))
    }
}

/// Prints; a reader that has gone (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot print")
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")
}

/// The largest `--flows-max`.
const FLOWS_LIMIT: u32 = 16_777_216;

impl AgentArgs {
    fn options(self, places: Places, reload: Reload) -> anyhow::Result<Options> {
        if let Some(folder) = &self.manifests
            && !folder.is_dir()
        {
            bail!("--manifests {}: there is no such folder", folder.display());
        }
        let node = match self.node_name {
            Some(name) if name.is_empty() => {
                bail!("--node-name is empty; leave it out to use the host's name")
            }
            Some(name) => name,
            None => host_name()?,
        };
        let mut sizes = BTreeMap::new();
        let flows = self.flows_max.unwrap_or_else(sizes::flows);
        if flows != sizes::FLOWS_MIN {
            sizes.extend(
                ["flows_v4", "flows_v6"].map(|map| (map.to_owned(), flows.saturating_mul(2))),
            );
        }
        let asked = self.manifests.is_none() || self.kubeconfig.is_some() || self.api.is_some();
        if self.takeover && serves_by_ipvs() {
            bail!(
                "kube-proxy balances by IPVS here, whose connections cannot be taken over: drain the node, stop kube-proxy, run `kube-proxy --cleanup`, and start without --takeover"
            );
        }
        if self.takeover && self.policy.leaves_node_ports_open() && served_in_iptables_mode()? {
            bail!(
                "kube-proxy serves node ports at all addresses of this node, as its iptables mode does; Sluice would serve them at the primary ones alone. Say which it should be: --nodeport-addresses all, or --nodeport-addresses primary"
            );
        }
        let policy = self.policy.policy()?;
        let kubernetes = kubernetes::Settings {
            kubeconfig: self.kubeconfig,
            api: self.api,
            node: Some(node.clone()),
            proxy_name: self.proxy_name.clone(),
            // Beside another proxy, most addresses in them are that one's.
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
            kubernetes: asked.then_some(kubernetes),
            proxy_name: self.proxy_name,
            manifests: self.manifests,
            sizes,
            monitor: self.monitor.settings(),
            conntrack: self.conntrack.limits(),
            oom_score_adj: self.oom_score_adj,
            takeover: self.takeover,
            reload,
        })
    }
}

/// The host's name, as the kernel has it.
fn host_name() -> anyhow::Result<String> {
    let path = Path::new("/proc/sys/kernel/hostname");
    let name =
        std::fs::read_to_string(path).context("cannot read the host's name; give --node-name")?;
    Ok(name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn manifests_alone_leave_the_api_server_out() {
        let cli = Cli::parse_from([
            "sluice",
            "agent",
            "--manifests",
            "/",
            "--node-name",
            "a",
            "--edge",
            "cali*,veth?",
        ]);
        let Command::Agent(args) = cli.command else { panic!("another command") };
        let reload = Reload { follows: false, is_changed: Arc::new(|| Ok(false)) };
        let places =
            Places { pin_path: "/p".into(), state_dir: "/s".into(), proc_sys: "/proc/sys".into() };
        let options = args.options(places, reload).expect("good options");
        assert!(options.kubernetes.is_none());
        assert_eq!(options.patterns.role("cali0"), Some(crate::node::devices::Role::Edge));
    }

    #[test]
    fn beside_another_proxy_addresses_of_no_service_are_that_ones() {
        let wants_networks = |more: &[&str]| {
            let words = ["sluice", "agent", "--kubeconfig", "/k", "--node-name", "a"];
            let cli = Cli::parse_from(words.iter().chain(more));
            let Command::Agent(args) = cli.command else { panic!("another command") };
            let reload = Reload { follows: false, is_changed: Arc::new(|| Ok(false)) };
            let places = Places {
                pin_path: "/p".into(),
                state_dir: "/s".into(),
                proc_sys: "/proc/sys".into(),
            };
            let options = args.options(places, reload).expect("good options");
            options.kubernetes.expect("the API server is asked").service_cidrs
        };
        assert!(wants_networks(&[]));
        assert!(!wants_networks(&["--proxy-name", "sluice"]));
        assert!(!wants_networks(&["--service-cidr", "10.96.0.0/16"]));
    }
}
