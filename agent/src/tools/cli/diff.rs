//! `sluice diff`: compares what the sources ask for with what the maps hold.

#![expect(
    unused_results,
    reason = "clap's derive drops the result of parsing an optional group of flags"
)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, Parser as _};
use schemars::JsonSchema;
use serde::Serialize;
use sluice_core::image::Dataplane as _;
use sluice_core::model::Event;
use sluice_core::policy::SocketPath;

use super::agent::{AgentArgs, host_name};
use super::output::Output;
use super::policy::PolicyArgs;
use super::table::{Mood, Style, Table, Text, cut, whole};
use super::{Cli, Command, NO_OBJECTS, Outcome, Unknown, Usage, runtime};
use crate::daemon::source::{kubernetes, manifests};
use crate::node::dataplane::{Access, Kernel, Maps, Pins};
use crate::node::devices::pattern::Patterns;
use crate::node::devices::watch::look;
use crate::node::host;
use crate::node::status::{self, StateDir, Status};
use crate::node::view;
use crate::tools::api::kinds;
use crate::tools::diff::{Change, Difference, Inputs, State, Wanted, compare, wanted};

/// The number of comparisons of objects and maps while an agent runs and both change. Only a
/// difference that all comparisons show counts.
const LOOKS: usize = 3;
/// The time between two comparisons: longer than an agent takes to notice a change.
const PAUSE: Duration = Duration::from_millis(700);
/// The time that the API server may take for all of its lists.
const PATIENCE: Duration = Duration::from_mins(1);

/// The arguments of `sluice diff`.
#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// Read the objects from the YAML files of a directory [default: the agent's sources].
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// List the objects from the API server in this kubeconfig file.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The API server's address, instead of the configured one.
    #[arg(long, value_name = "URL")]
    api: Option<String>,
    /// Compare Services whose label service.kubernetes.io/service-proxy-name has this value
    /// [default: as the agent].
    #[arg(long, value_name = "NAME")]
    proxy_name: Option<String>,
    /// This node's name, as in nodeName of endpoints [default: the agent's, else the host's name].
    #[arg(long, visible_alias = "node", value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,
    /// Write the differences to the maps, in an order that breaks no connection. Refuses while an
    /// agent runs, because only the agent may write then. It repairs all differences when it
    /// restarts.
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    output: Output,
    // If one of these flags is given, none of the agent's counts.
    #[command(flatten)]
    policy: Option<PolicyArgs>,
}

/// The difference between sources and maps.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Report {
    /// Whether nothing differs.
    in_step: bool,
    /// Whether an agent runs.
    agent_alive: bool,
    /// The number of writes of a repair; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    repaired_writes: Option<usize>,
    /// Where the objects come from.
    sources: Vec<String>,
    /// The number of objects.
    objects: usize,
    differences: Vec<Difference>,
    /// The objects that could not be read. A running agent keeps their last good form.
    unread: Vec<String>,
}

kinds! { Report = "Diff"; }

/// The sources of objects, and what else decides about the maps.
#[derive(Debug)]
pub(super) struct Scope {
    pub(super) inputs: Inputs,
    manifests: Option<PathBuf>,
    kubernetes: Option<kubernetes::Settings>,
}

/// Prints the differences. The exit code is 0 if there are none.
///
/// # Errors
///
/// [`Usage`] for flags that contradict each other. [`Unknown`] when sources, devices or maps cannot
/// be read, or a repair fails.
pub(super) fn run(args: DiffArgs, pin_path: &Path, state_dir: &Path) -> anyhow::Result<Outcome> {
    runtime()?
        .block_on(diff(args, pin_path, state_dir))
        .map_err(|error| if error.is::<Usage>() { error } else { Unknown(error).into() })
}

async fn diff(args: DiffArgs, pin_path: &Path, state_dir: &Path) -> anyhow::Result<Outcome> {
    let (output, repair) = (args.output.clone(), args.repair);
    let last = status::read(state_dir);
    let scope = args.scope(last.as_ref())?;
    // Held to the end, so that no agent starts in the meantime.
    let lock = if repair { Some(take_lock(state_dir)?) } else { None };
    let kernel = view::open(pin_path)?;
    view::check_namespace(&kernel)?;
    let agent_alive = lock.is_none() && status::is_alive(state_dir);
    let looks = if agent_alive { LOOKS } else { 1 };
    let (mut wants, mut differences) = scope.compare_repeatedly(&kernel, looks).await?;
    let mut repaired_writes = None;
    if repair && !differences.is_empty() {
        ensure_repairable(&wants)?;
        repaired_writes = Some(write(pin_path, &wants, &State::read(&kernel)?)?);
        (wants, differences) = scope.compare(&kernel).await?;
    }
    let report = Report {
        in_step: differences.is_empty(),
        agent_alive,
        repaired_writes,
        sources: scope.sources(),
        objects: wants.objects,
        differences,
        unread: wants.unread.iter().map(ToString::to_string).collect(),
    };
    let text = output.object(&report, text)?;
    Ok(Outcome { text, code: u8::from(!report.in_step) })
}

/// Takes the agent's lock, so that no agent runs.
fn take_lock(state_dir: &Path) -> anyhow::Result<StateDir> {
    if status::is_alive(state_dir) {
        let pid = status::read(state_dir)
            .map_or_else(|| "unknown".to_owned(), |status| status.pid.to_string());
        bail!(
            "--repair: an agent (pid {pid}) runs, and only it may write the maps; restart it: it \
             compares everything when it starts, and writes the differences"
        );
    }
    StateDir::take(state_dir).context("--repair needs the lock of the agent")
}

/// Refuses a repair that would remove objects which could not be read.
fn ensure_repairable(wants: &Wanted) -> anyhow::Result<()> {
    if let Some(unread) = wants.unread.first() {
        bail!(
            "--repair: {unread}; its objects would be removed from the maps: fix it first \
             (`sluice validate` lists all problems)"
        );
    }
    ensure!(
        wants.objects > 0,
        "--repair: the sources have no objects, so everything would be removed from the maps; use \
         `sluice cleanup` for that"
    );
    Ok(())
}

/// Writes the differences. Returns the number of writes.
fn write(pin_path: &Path, wants: &Wanted, found: &State) -> anyhow::Result<usize> {
    let maps = Maps::open(&Pins::new(pin_path).maps(), Access::Write)?;
    let mut kernel = Kernel::new(maps);
    kernel.apply(&wants.writes).context("the repair is incomplete; repeat it")?;
    let mut writes = wants.writes.len();
    let programmed = wants.state.programmed;
    if let Some(programmed) = programmed.filter(|wanted| found.programmed != Some(*wanted)) {
        kernel.maps().write_programmed(&programmed)?;
        writes += 1;
    }
    Ok(writes)
}

impl Scope {
    /// Returns every object of the sources, once.
    pub(super) async fn events(&self) -> anyhow::Result<Vec<Event>> {
        let mut events = Vec::new();
        if let Some(folder) = &self.manifests {
            let read = manifests::read(folder);
            events.extend(
                read.with_context(|| format!("cannot read the manifests in {}", folder.display()))?,
            );
        }
        if let Some(settings) = &self.kubernetes {
            let client = kubernetes::connect(settings).await.context(
                "cannot reach the API server; give --kubeconfig, or --manifests to compare with files only",
            )?;
            let list = tokio::time::timeout(PATIENCE, kubernetes::list(client, settings)).await;
            events.extend(list.with_context(|| {
                format!(
                    "the API server did not deliver its lists within {PATIENCE:?}; check that it \
                     can be reached from this node"
                )
            })??);
        }
        Ok(events)
    }

    /// Compares up to so many times, and returns the differences that all comparisons show.
    async fn compare_repeatedly(
        &self,
        kernel: &Kernel,
        looks: usize,
    ) -> anyhow::Result<(Wanted, Vec<Difference>)> {
        let (mut wants, mut differences) = self.compare(kernel).await?;
        for _ in 1..looks {
            if differences.is_empty() {
                break;
            }
            tokio::time::sleep(PAUSE).await;
            let before: BTreeSet<Difference> = differences.into_iter().collect();
            (wants, differences) = self.compare(kernel).await?;
            differences.retain(|difference| before.contains(difference));
        }
        Ok((wants, differences))
    }

    /// Reads the sources and the maps, and compares them.
    async fn compare(&self, kernel: &Kernel) -> anyhow::Result<(Wanted, Vec<Difference>)> {
        let events = self.events().await?;
        let facts = look().await.context("cannot list this node's devices over netlink")?;
        let found = State::read(kernel)?;
        let wants = wanted(&self.inputs, events, &facts, &found, kernel.maps().sizes());
        if wants.objects == 0
            && wants.unread.is_empty()
            && let Some(folder) = self.manifests.as_ref().filter(|_| self.kubernetes.is_none())
        {
            bail!("found no object in {}: {NO_OBJECTS}", folder.display());
        }
        let differences = compare(&wants.state, &found);
        Ok((wants, differences))
    }

    /// Returns the sources' names for people.
    fn sources(&self) -> Vec<String> {
        let folder =
            self.manifests.as_ref().map(|folder| format!("manifests {}", folder.display()));
        let server = self.kubernetes.as_ref().map(|settings| {
            let file = settings.kubeconfig.as_ref().map(|path| path.display().to_string());
            let from = settings
                .api
                .clone()
                .or(file)
                .unwrap_or_else(|| "(configured by the environment)".to_owned());
            format!("kubernetes {from}")
        });
        folder.into_iter().chain(server).collect()
    }
}

impl DiffArgs {
    /// Returns what to compare. What these arguments leave open is as the agent was started.
    fn scope(self, last: Option<&Status>) -> anyhow::Result<Scope> {
        let mut agent = of_agent(last)?;
        if self.manifests.is_some() || self.kubeconfig.is_some() || self.api.is_some() {
            (agent.manifests, agent.kubeconfig, agent.api) =
                (self.manifests, self.kubeconfig, self.api);
        }
        let policy = self.policy.unwrap_or(agent.policy);
        let policy = policy.policy().map_err(|error| Usage(format!("{error:#}")))?;
        let node =
            self.node_name.or_else(|| last.map(|status| status.node.clone())).or(agent.node_name);
        let node = match node.filter(|name| !name.is_empty()) {
            Some(name) => name,
            None => host_name()?,
        };
        let proxy_name = self.proxy_name.or(agent.proxy_name);
        let uses_server =
            agent.manifests.is_none() || agent.kubeconfig.is_some() || agent.api.is_some();
        let kubernetes = kubernetes::Settings {
            kubeconfig: agent.kubeconfig,
            api: agent.api,
            node: Some(node.clone()),
            proxy_name: proxy_name.clone(),
            service_cidrs: policy.service_cidrs.is_empty() && proxy_name.is_none(),
            requests: kubernetes::Requests::default(),
        };
        let inputs = Inputs {
            node: node.as_str().into(),
            proxy_name,
            policy,
            patterns: Patterns::new(&agent.edge, &agent.uplink, &agent.fabric),
            socket_path: SocketPath::number(agent.socket_path),
            host_netns: host::netns_cookie().unwrap_or_default(),
        };
        Ok(Scope {
            inputs,
            manifests: agent.manifests,
            kubernetes: uses_server.then_some(kubernetes),
        })
    }
}

/// Returns the sources and settings of the last agent on this node.
///
/// # Errors
///
/// When its flags are not understood.
pub(super) fn scope_of_agent(last: &Status) -> anyhow::Result<Scope> {
    let args = DiffArgs {
        manifests: None,
        kubeconfig: None,
        api: None,
        proxy_name: None,
        node_name: None,
        repair: false,
        output: Output::default(),
        policy: None,
    };
    args.scope(Some(last))
}

/// Returns the flags of the last agent on this node, or the defaults if it has recorded none.
pub(super) fn of_agent(last: Option<&Status>) -> anyhow::Result<AgentArgs> {
    let invocation = last.map(|status| &status.invocation);
    let words = invocation.map_or(&[][..], |invocation| invocation.arguments.as_slice());
    let default = ["agent".to_owned()];
    let words = if words.is_empty() { &default[..] } else { words };
    let program = std::iter::once("sluice".to_owned());
    let cli = Cli::try_parse_from(program.chain(words.iter().cloned()));
    let cli = cli.map_err(|error| {
        Usage(format!(
            "this version does not understand the last agent's flags ({}): use the `sluice` of that agent's version",
            error.render().to_string().lines().next().unwrap_or_default()
        ))
    })?;
    let Command::Agent(mut args) = cli.command else {
        return Err(Usage(format!(
            "the status has no flags of an agent: sluice {}",
            words.join(" ")
        ))
        .into());
    };
    // Relative paths start at the agent's directory.
    let directory = invocation.map_or(Path::new(""), |invocation| &invocation.directory);
    for path in [&mut args.manifests, &mut args.kubeconfig].into_iter().flatten() {
        *path = directory.join(&*path);
    }
    Ok(*args)
}

/// Returns how bad a difference is: packets miss what is missing.
fn mood(change: Change) -> Mood {
    match change {
        Change::Missing | Change::Different => Mood::Bad,
        Change::Extra => Mood::Warning,
    }
}

fn text(report: &Report, style: Style) -> String {
    let mut text = String::new();
    if !report.differences.is_empty() {
        let mut table = Table::new(&[
            whole(""),
            whole("MAP"),
            cut("KEY"),
            cut("WANTED"),
            cut("FOUND"),
            cut("SERVICE"),
        ]);
        for row in &report.differences {
            table.row([
                Text::new(row.change.sign(), Some(mood(row.change))),
                row.map.into(),
                row.key.clone().into(),
                row.wanted.clone().unwrap_or_default().into(),
                row.found.clone().unwrap_or_default().into(),
                row.service.clone().unwrap_or_default().into(),
            ]);
        }
        text = table.text(style) + "\n";
    }
    let mut line = |words: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{words}");
    };
    if let Some(writes) = report.repaired_writes {
        line(format_args!("Repaired with {writes} writes."));
    }
    let (sources, objects) = (report.sources.join(" and "), report.objects);
    match report.differences.len() {
        0 => line(format_args!("The maps are in step with {sources} ({objects} objects).")),
        count => {
            line(format_args!("{count} entries differ from {sources} ({objects} objects)."));
        }
    }
    for unread in &report.unread {
        line(format_args!("Not read: {unread}; entries that an agent keeps for it show as extra."));
    }
    match (report.in_step, report.agent_alive, report.repaired_writes) {
        (true, _, _) => {}
        (false, true, _) => line(format_args!(
            "An agent runs: it repairs what somebody has changed within half a minute. Restart it if the differences stay \
             (`sluice status` shows what may prevent a repair)."
        )),
        (false, false, None) => {
            line(format_args!(
                "`sluice diff --repair` writes the differences; so does an agent when it starts."
            ));
        }
        (false, false, Some(_)) => {
            line(format_args!(
                "Start an agent for the rest: only an agent attaches programs to devices."
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::status::Invocation;
    use sluice_core::policy::Masquerade;

    fn args(line: &str) -> DiffArgs {
        let cli = Cli::parse_from(["sluice", "diff"].into_iter().chain(line.split_whitespace()));
        let Command::Diff(args) = cli.command else { panic!("another command") };
        *args
    }

    fn status(line: &str) -> Status {
        Status {
            node: "a".to_owned(),
            invocation: Invocation {
                arguments: line.split_whitespace().map(str::to_owned).collect(),
                directory: "/srv".into(),
            },
            ..Status::default()
        }
    }

    #[test]
    fn without_flags_everything_is_as_the_agent_was_started() {
        let last = status(
            "agent --manifests services --masquerade all --socket-path host --edge cali* --pin-path /p",
        );
        let scope = args("").scope(Some(&last)).expect("good flags");
        assert_eq!(scope.manifests, Some("/srv/services".into()));
        assert!(scope.kubernetes.is_none());
        assert_eq!(scope.inputs.node.as_ref(), "a");
        assert_eq!(scope.inputs.policy.masquerade, Masquerade::All);
        assert_eq!(scope.inputs.socket_path, SocketPath::Host.number());
        assert_eq!(scope.inputs.patterns, Patterns::new(&["cali*".to_owned()], &[], &[]));
    }

    #[test]
    fn flags_of_the_command_take_precedence() {
        let last = status("agent --manifests services --masquerade all --nodeport-addresses all");
        let scope = args("--kubeconfig k --node b").scope(Some(&last)).expect("good flags");
        assert_eq!((scope.manifests, scope.inputs.node.as_ref()), (None, "b"));
        assert_eq!(scope.kubernetes.and_then(|settings| settings.kubeconfig), Some("k".into()));
        assert_eq!(scope.inputs.policy.masquerade, Masquerade::All);
        let scope = args("--masquerade needed").scope(Some(&last)).expect("good flags");
        assert_eq!(
            scope.inputs.policy,
            sluice_core::policy::Policy::default(),
            "one policy flag: all are as here"
        );
        assert_eq!(scope.manifests, Some("/srv/services".into()));
    }

    #[test]
    fn an_agent_that_recorded_no_flags_had_none() {
        let scope = args("--manifests x").scope(Some(&Status::default())).expect("good flags");
        assert_eq!(scope.inputs.policy, sluice_core::policy::Policy::default());
        let error =
            args("").scope(Some(&status("agent --colour red"))).expect_err("an unknown flag");
        assert!(error.is::<Usage>() && error.to_string().contains("--colour"), "{error}");
    }
}
