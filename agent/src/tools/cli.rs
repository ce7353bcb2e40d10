//! The command line.

mod agent;
mod backends;
mod cleanup;
mod conntrack;
mod diff;
mod examples;
mod explain;
mod flows;
mod jsonpath;
mod kube_proxy;
mod monitor;
mod names;
mod output;
mod pause;
mod plan;
mod policy;
mod preflight;
mod services;
mod shell;
mod sizes;
mod status;
mod table;
mod takeover;
mod top;
mod trace;
mod validate;
mod version;

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::node::dataplane::Pins;
use crate::node::status::{PIN_PATH, check as check_state_dir, state_dir};
use crate::tools::api::Schemas;
use agent::AgentArgs;
use diff::DiffArgs;
use explain::ExplainArgs;
use kube_proxy::{Expanded, expand};
use names::NamesArgs;
use output::{ListArgs, Output};
use plan::PlanArgs;
use preflight::PreflightArgs;
use takeover::{ReleaseArgs, TakeoverArgs};
use top::TopArgs;
use trace::TraceArgs;
use validate::ValidateArgs;
use version::VersionArgs;

/// The heading of flags that every command takes.
const GLOBAL: &str = "Global options";

/// Sluice, an in-kernel Service load balancer for Kubernetes nodes under any CNI.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, max_term_width = 100)]
pub struct Cli {
    /// The directory where maps and links are pinned. Each agent has its own.
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "DIR", env = "SLUICE_PIN_PATH", default_value = PIN_PATH)]
    pin_path: PathBuf,
    /// The directory of the agent's lock and status.json [default: /run/sluice, or a directory in
    /// it if --pin-path is given].
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "DIR", env = "SLUICE_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Where kernel settings are written. An unprivileged container has a read-only /proc/sys, and
    /// can be given the node's, mounted elsewhere.
    #[arg(
        long,
        global = true,
        help_heading = GLOBAL,
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
    /// The agent keeps the maps in step with Services and EndpointSlices, and the programs attached
    /// to devices and the cgroup. When it ends, the pinned programs and maps continue to serve;
    /// `sluice cleanup` removes them.
    ///
    /// kube-proxy's flags and its configuration (--config FILE, a KubeProxyConfiguration) are
    /// accepted. One warning names the settings that have no meaning here. Flags take precedence
    /// over the file. The agent restarts in place when the file changes, and on SIGHUP.
    #[command(after_help = examples::AGENT)]
    Agent(Box<AgentArgs>),
    /// Show the state of this node.
    ///
    /// The exit code is 0 if the node is ready, else 1.
    #[command(after_help = examples::STATUS)]
    Status {
        #[command(flatten)]
        output: Output,
    },
    /// List services with their counters.
    #[command(visible_alias = "svc", after_help = examples::SERVICES)]
    Services {
        /// List only this service: name, namespace/name or either with :port.
        service: Option<String>,
        #[command(flatten)]
        list: ListArgs,
        #[command(flatten)]
        names: NamesArgs,
    },
    /// List backends with their share of new flows and their counters.
    #[command(after_help = examples::BACKENDS)]
    Backends {
        /// List only backends of this service: name, namespace/name or either with :port.
        service: Option<String>,
        #[command(flatten)]
        list: ListArgs,
        #[command(flatten)]
        names: NamesArgs,
    },
    /// List the flows in the maps, the most recently used first.
    #[command(after_help = examples::FLOWS)]
    Flows {
        /// List only flows to this service: name, namespace/name or either with :port.
        service: Option<String>,
        /// As SERVICE.
        #[arg(long = "service", value_name = "SERVICE", conflicts_with = "service", hide = true)]
        of: Option<String>,
        /// List at most this many flows.
        #[arg(long, value_name = "NUMBER")]
        limit: Option<usize>,
        #[command(flatten)]
        list: ListArgs,
        #[command(flatten)]
        names: NamesArgs,
    },
    /// Show live rates: services, the backends of one, and drops by reason.
    ///
    /// With --once, or if the output is not a terminal, prints one table and exits.
    #[command(after_help = examples::TOP)]
    Top(TopArgs),
    /// Print events live: flows that open and close, translated calls, and packets that are
    /// dropped, rejected or counted by another reason.
    ///
    /// Packets of established flows cause no events, and nothing costs anything while nobody
    /// listens. Only one process can listen at a time.
    #[command(after_help = examples::TRACE)]
    Trace(TraceArgs),
    /// Explain what would happen to a packet on this node, step by step, and which backend it would
    /// get.
    ///
    /// The answer comes from the maps and routes of this node, which are only read. With
    /// --manifests it comes from a directory of manifests, and needs neither root nor a cluster.
    /// The exit code is 0 if the packet is forwarded or passed, 3 if it is rejected, 4 if it is
    /// dropped, and 1 if there is no answer.
    #[command(after_help = examples::EXPLAIN)]
    Explain(Box<ExplainArgs>),
    /// Check manifests for objects that would be refused, or that lose an address to another.
    ///
    /// The exit code is 0 if there are none, else 1.
    #[command(after_help = examples::VALIDATE)]
    Validate(Box<ValidateArgs>),
    /// Show what would change for clients if manifests were applied, and who loses service.
    ///
    /// Plans before and after, and compares each frontend's answers. Nothing is changed. The exit
    /// code is 0 if no answer changes, 2 if one does, 3 if somebody loses service, and 1 if
    /// something cannot be read.
    #[command(after_help = examples::PLAN)]
    Plan(Box<PlanArgs>),
    /// Check whether this node can run Sluice, and what Sluice would use.
    ///
    /// Loads every program, and tries every hook on devices and a cgroup made for the test. Nothing
    /// is left behind. The exit code is 0 if Sluice can run, and 1 if it cannot, or if too little
    /// could be tried because the caller is not root.
    #[command(after_help = examples::PREFLIGHT)]
    Preflight(Box<PreflightArgs>),
    /// Compare what the sources ask for with what the maps hold, entry by entry.
    ///
    /// The exit code is 0 if the maps are in step, 1 if they are not, and 2 if the comparison
    /// failed.
    #[command(after_help = examples::DIFF)]
    Diff(Box<DiffArgs>),
    /// Take over from kube-proxy, and show the progress.
    ///
    /// `sluice agent --takeover` takes over when it starts. This command waits until the agent
    /// serves. It takes back a node that is released or being released, and with --finish has
    /// kube-proxy's rules removed. The exit code is 0 when that is done, and 1 if it takes longer
    /// than --wait.
    #[command(after_help = examples::TAKEOVER)]
    Takeover(TakeoverArgs),
    /// Hand this node back to kube-proxy: known flows are served to their end, and new ones are
    /// left to it.
    ///
    /// When the last flow has ended, or at the timeout, the agent removes everything and waits for
    /// `sluice takeover`. The exit code is 0 when the node is released, else 1.
    #[command(after_help = examples::RELEASE)]
    Release(ReleaseArgs),
    /// Remove everything from this node: programs, maps, filters, the device sluice0 and its
    /// routes, reserved ports.
    ///
    /// Ends all connections through services. Works without an agent, and refuses while one runs.
    #[command(after_help = examples::CLEANUP)]
    Cleanup {
        /// Clean up even if an agent is running.
        #[arg(long)]
        force: bool,
    },
    /// Show what this binary is: version, commit, layout of the maps.
    #[command(after_help = examples::VERSION)]
    Version(VersionArgs),
    /// Print a script that completes commands and flags in a shell.
    #[command(after_help = examples::COMPLETION)]
    Completion {
        /// The shell: bash, zsh or fish.
        #[arg(value_name = "SHELL", value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write a man page for each command into a directory.
    #[command(hide = true)]
    Man {
        /// The directory; it is made if it does not exist.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Wait for SIGTERM or SIGINT, and do nothing else: for a pod that stays Running.
    #[command(hide = true)]
    Pause,
}

/// Where an agent keeps its pins and its state, and where the kernel's settings are.
#[derive(Clone, Debug)]
struct Places {
    pin_path: PathBuf,
    state_dir: PathBuf,
    proc_sys: PathBuf,
}

/// The result of a command: what it prints, and its exit code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Outcome {
    text: String,
    code: u8,
}

impl From<String> for Outcome {
    fn from(text: String) -> Self {
        Self { text, code: 0 }
    }
}

/// What manifests have to contain.
const NO_OBJECTS: &str = "expected a Service, EndpointSlice, Endpoints or Node in a *.yaml, *.yml or *.json file \
                          directly in the directory, not below it";

/// An error in the command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// An error of a command for which the exit code 1 is an answer.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
struct Unknown(anyhow::Error);

/// The largest `--flows-max`.
const FLOWS_LIMIT: u32 = 16_777_216;

/// Runs the command of this process. An error in the command line ends the process with code 2.
#[must_use]
pub fn main() -> ExitCode {
    let run = || {
        let expanded = expand(std::env::args_os().collect())?;
        Cli::parse_from(&expanded.words).run(expanded)
    };
    match run() {
        Ok(code) => code,
        Err(error) if error.is::<Usage>() => {
            eprintln!("{} {error:#}\n\nFor more information, try '--help'.", alarm());
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("{} {error:#}", alarm());
            if error.is::<Unknown>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Returns the word before an error: red on a terminal, as clap's is.
fn alarm() -> &'static str {
    let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if std::io::stderr().is_terminal() && !is_plain {
        "\u{1b}[1;31merror:\u{1b}[0m"
    } else {
        "error:"
    }
}

impl Cli {
    fn run(self, expanded: Expanded) -> anyhow::Result<ExitCode> {
        let pin_path = std::path::absolute(&self.pin_path).context("--pin-path")?;
        let state_dir = self.state_dir.unwrap_or_else(|| state_dir(&pin_path));
        let places = Places { pin_path, state_dir, proc_sys: self.proc_sys };
        if self.command.uses_this_node() {
            self.command.check(&places)?;
        }
        let outcome = self.command.run(&places, expanded)?;
        let _ = print(&outcome.text)?;
        Ok(ExitCode::from(outcome.code))
    }
}

impl Command {
    /// Whether the command uses what is pinned on this node, or the agent's state.
    fn uses_this_node(&self) -> bool {
        match self {
            Self::Validate(_)
            | Self::Preflight(_)
            | Self::Version(_)
            | Self::Completion { .. }
            | Self::Man { .. }
            | Self::Pause => false,
            Self::Explain(args) => !args.uses_manifests(),
            Self::Plan(args) => !args.uses_manifests(),
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

    /// Fails if anybody but root may change what is pinned, or the agent's state.
    fn check(&self, places: &Places) -> anyhow::Result<()> {
        let checked = check_state_dir(&places.state_dir)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(Pins::new(&places.pin_path).check()?));
        let is_diff = matches!(self, Self::Diff(_));
        checked.map_err(|error| if is_diff { Unknown(error).into() } else { error })
    }

    fn run(self, places: &Places, expanded: Expanded) -> anyhow::Result<Outcome> {
        let Places { pin_path, state_dir, proc_sys } = places;
        match self {
            Self::Agent(args) => agent::run(*args, places, expanded),
            Self::Status { output } => status::run(places, &output),
            Self::Services { service, list, names } => {
                services::run(places, service.as_deref(), &names, &list)
            }
            Self::Backends { service, list, names } => {
                backends::run(places, service.as_deref(), &names, &list)
            }
            Self::Flows { service, of, limit, list, names } => {
                flows::run(places, service.or(of).as_deref(), limit, &names, &list)
            }
            Self::Top(args) => top::run(&args, pin_path),
            Self::Trace(args) => trace::run(args, pin_path),
            Self::Explain(args) => explain::run(*args, places),
            Self::Validate(args) => validate::run(*args),
            Self::Plan(args) => plan::run(*args, places),
            Self::Preflight(args) => preflight::run(*args, pin_path, proc_sys),
            Self::Diff(args) => diff::run(*args, pin_path, state_dir),
            Self::Takeover(args) => takeover::take_over(&args, state_dir),
            Self::Release(args) => takeover::release(&args, state_dir),
            Self::Cleanup { force } => cleanup::run(places, force),
            Self::Version(args) => version::run(&args),
            Self::Completion { shell } => Ok(shell::completion(shell)),
            Self::Man { directory } => shell::man(&directory),
            Self::Pause => pause::run(),
        }
    }
}

/// Prints a text. Returns whether anybody reads on: a reader that has closed the pipe (`| head`) is
/// not an error.
fn print(text: &str) -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot print"),
    }
}

/// Collects the schemas of what only the commands know.
pub(crate) fn answers(schemas: &mut Schemas) {
    schemas.object::<status::Overview>();
    schemas.object::<diff::Report>();
    schemas.object::<crate::tools::preflight::Report>();
    schemas.object::<crate::tools::explain::Answer>();
    schemas.object::<explain::Change>();
    schemas.object::<plan::Plan>();
    schemas.object::<version::Version>();
    schemas.list::<validate::Finding>();
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")
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
    fn every_command_has_examples_that_parse_and_help_that_fits() {
        let mut cli = Cli::command();
        cli.build();
        for command in cli.get_subcommands_mut().filter(|command| !command.is_hide_set()) {
            let name = command.get_name().to_owned();
            let help = command.render_long_help().to_string();
            let widest = help.lines().map(|line| line.chars().count()).max().unwrap_or_default();
            assert!(widest <= 100, "{name}: {widest} columns");
            if name == "help" {
                continue;
            }
            let (_, examples) = help.split_once("Examples:").expect(&name);
            let lines = examples.lines().filter_map(|line| line.trim().strip_prefix("sluice "));
            let mut count = 0;
            for line in lines {
                count += 1;
                let line = line.split(" > ").next().unwrap_or_default().replace('\'', "");
                let words = ["sluice"].into_iter().chain(line.split_whitespace());
                let parsed = Cli::try_parse_from(words);
                assert!(parsed.is_ok(), "{name}: {line}: {:?}", parsed.err());
            }
            assert!(count > 0, "{name} has no example");
        }
    }

    #[test]
    fn completions_and_man_pages_know_every_command() {
        let folder = tempfile::tempdir().expect("a folder");
        let _ = shell::man(folder.path()).expect("written");
        for command in Cli::command().get_subcommands().filter(|found| !found.is_hide_set()) {
            let name = command.get_name();
            for shell in [clap_complete::Shell::Bash, clap_complete::Shell::Zsh] {
                assert!(shell::completion(shell).text.contains(name), "{shell}: {name}");
            }
            let page = folder.path().join(format!("sluice-{name}.1"));
            assert!(page.exists(), "no page {}", page.display());
        }
    }
}
