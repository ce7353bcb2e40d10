//! `sluice diff`: what the sources want against what the maps hold.

#![expect(
    unused_results,
    reason = "clap's derive drops what it gets for an optional group of flags"
)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, Parser as _};
use serde::Serialize;
use sluice_core::image::Dataplane as _;
use sluice_core::model::Event;
use sluice_core::policy::SocketPath;

use super::policy::PolicyArgs;
use super::table::{Table, render};
use super::{AgentArgs, Cli, Command, NO_OBJECTS, Output, Usage, host_name};
use crate::daemon::source::{kubernetes, manifests};
use crate::node::dataplane::{Access, Kernel, Maps, Pins};
use crate::node::devices::pattern::Patterns;
use crate::node::devices::watch::look;
use crate::node::host;
use crate::node::status::{self, StateDir, Status};
use crate::node::view;
use crate::tools::drift::{Difference, Inputs, State, Wanted, compare, wanted};

/// While an agent runs, objects and maps change: only what so many looks show in the same way is
/// drift.
const LOOKS: usize = 3;
/// Time between two looks: longer than an agent takes to notice a change.
const PAUSE: Duration = Duration::from_millis(700);
/// How long the API server may take for all of its lists.
const PATIENCE: Duration = Duration::from_mins(1);

/// The words after `sluice diff`.
#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// Read the objects from the YAML files of a folder [default: from where the agent has them].
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// List the objects from the API server that this file names.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The API server's address, instead of the one configured.
    #[arg(long, value_name = "URL")]
    api: Option<String>,
    /// Serve Services with this label service.kubernetes.io/service-proxy-name [default: as the
    /// agent].
    #[arg(long, value_name = "NAME")]
    proxy_name: Option<String>,
    /// This node's name, as in nodeName of endpoints [default: the agent's, else the host's name].
    #[arg(long, visible_alias = "node", value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,
    /// Write the difference into the maps, in the order that harms no connection. Refuses while an
    /// agent runs: that one alone writes then, and a restart of it compares everything.
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    output: Output,
    /// If one of these is given, all count as given here; if none is, as the agent was started.
    #[command(flatten)]
    policy: Option<PolicyArgs>,
}

/// What `-o json` prints.
#[derive(Clone, Debug, Serialize)]
struct Report {
    in_step: bool,
    agent_alive: bool,
    /// How many writes a repair took; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    repaired_writes: Option<usize>,
    sources: Vec<String>,
    objects: usize,
    differences: Vec<Difference>,
    /// What could not be read: a running agent keeps its last good form.
    unread: Vec<String>,
}

/// Where objects come from, and how they count.
#[derive(Debug)]
struct Asked {
    inputs: Inputs,
    manifests: Option<PathBuf>,
    kubernetes: Option<kubernetes::Settings>,
}

/// Prints what differs; the flag says whether nothing does.
///
/// # Errors
///
/// [`Usage`] for flags that contradict each other; else when sources, devices or maps cannot be
/// read, or a repair fails.
pub(super) async fn run(
    args: DiffArgs,
    pin_path: &Path,
    state_dir: &Path,
) -> anyhow::Result<(String, bool)> {
    let (format, repair) = (args.output.output, args.repair);
    let last = status::read(state_dir);
    let asked = args.asked(last.as_ref())?;
    // The lock is held to the end, so that no agent starts meanwhile.
    let lock = if repair { Some(take_lock(state_dir)?) } else { None };
    let kernel = view::open(pin_path)?;
    let agent_alive = lock.is_none() && status::is_alive(state_dir);
    let mut events = asked.events().await?;
    let (mut wants, mut differences) = asked.look(&kernel, events).await?;
    if agent_alive {
        for _ in 1..LOOKS {
            if differences.is_empty() {
                break;
            }
            tokio::time::sleep(PAUSE).await;
            events = asked.events().await?;
            let before: BTreeSet<Difference> = differences.into_iter().collect();
            (wants, differences) = asked.look(&kernel, events).await?;
            differences.retain(|difference| before.contains(difference));
        }
    }
    let mut repaired_writes = None;
    if repair && !differences.is_empty() {
        ensure_repairable(&wants)?;
        repaired_writes = Some(write(pin_path, &wants, &State::read(&kernel)?)?);
        let events = asked.events().await?;
        (wants, differences) = asked.look(&kernel, events).await?;
    }
    let report = Report {
        in_step: differences.is_empty(),
        agent_alive,
        repaired_writes,
        sources: asked.sources(),
        objects: wants.objects,
        differences,
        unread: wants.unread.iter().map(ToString::to_string).collect(),
    };
    Ok((render(format, &report, text)?, report.in_step))
}

/// Takes the agent's lock, so that there is none.
fn take_lock(state_dir: &Path) -> anyhow::Result<StateDir> {
    if status::is_alive(state_dir) {
        let pid = status::read(state_dir)
            .map_or_else(|| "unknown".to_owned(), |status| status.pid.to_string());
        bail!(
            "--repair: an agent (pid {pid}) runs, and it alone writes the maps; restart it: it compares all of them when it \
             starts, and writes the difference"
        );
    }
    StateDir::take(state_dir).context("--repair needs the lock of the agent")
}

/// Refuses to take for gone what only could not be read.
fn ensure_repairable(wants: &Wanted) -> anyhow::Result<()> {
    if let Some(unread) = wants.unread.first() {
        bail!(
            "--repair: {unread}; what is in it would be removed from the maps: mend it first (`sluice validate` lists all of it)"
        );
    }
    ensure!(
        wants.objects > 0,
        "--repair: the sources have no object at all, so everything would be removed from the maps; `sluice cleanup` does that"
    );
    Ok(())
}

/// Writes what is wanted; returns the number of steps.
fn write(pin_path: &Path, wants: &Wanted, found: &State) -> anyhow::Result<usize> {
    let maps = Maps::open(&Pins::new(pin_path).maps(), Access::Write)?;
    let mut kernel = Kernel::new(maps);
    kernel.apply(&wants.writes).context("the repair is not complete; repeat it")?;
    let mut writes = wants.writes.len();
    if let Some(told) = wants.state.told.filter(|told| found.told != Some(*told)) {
        kernel.maps().write_programmed(&told)?;
        writes += 1;
    }
    Ok(writes)
}

impl Asked {
    /// Every object that the sources have, once.
    async fn events(&self) -> anyhow::Result<Vec<Event>> {
        let mut events = Vec::new();
        if let Some(folder) = &self.manifests {
            let read = manifests::read(folder);
            events.extend(
                read.with_context(|| format!("cannot read the manifests in {}", folder.display()))?,
            );
        }
        if let Some(settings) = &self.kubernetes {
            let client = kubernetes::connect(settings).await.context(
                "cannot reach the API server; give --kubeconfig, or --manifests to compare with files alone",
            )?;
            let list = tokio::time::timeout(PATIENCE, kubernetes::list(client, settings)).await;
            events.extend(list.with_context(|| {
                format!(
                    "the API server did not deliver its lists within {PATIENCE:?}; is it reachable from here?"
                )
            })??);
        }
        Ok(events)
    }

    /// Reads the maps, and compares.
    async fn look(
        &self,
        kernel: &Kernel,
        events: Vec<Event>,
    ) -> anyhow::Result<(Wanted, Vec<Difference>)> {
        let facts = look().await.context("cannot list this node's devices over netlink")?;
        let found = State::read(kernel)?;
        let wants = wanted(&self.inputs, events, &facts, &found, kernel.maps().sizes());
        if wants.objects == 0
            && wants.unread.is_empty()
            && let Some(folder) = self.manifests.as_ref().filter(|_| self.kubernetes.is_none())
        {
            bail!("no object in {}: {NO_OBJECTS}", folder.display());
        }
        let differences = compare(&wants.state, &found);
        Ok((wants, differences))
    }

    /// For people.
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
    /// What is to be compared with what, where not said otherwise as the agent was started.
    fn asked(self, last: Option<&Status>) -> anyhow::Result<Asked> {
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
        let asks_server =
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
        Ok(Asked {
            inputs,
            manifests: agent.manifests,
            kubernetes: asks_server.then_some(kubernetes),
        })
    }
}

/// The flags of the agent that ran here last; the defaults, if none has left word of them.
fn of_agent(last: Option<&Status>) -> anyhow::Result<AgentArgs> {
    let invocation = last.map(|status| &status.invocation);
    let words = invocation.map_or(&[][..], |invocation| invocation.arguments.as_slice());
    let default = ["agent".to_owned()];
    let words = if words.is_empty() { &default[..] } else { words };
    let program = std::iter::once("sluice".to_owned());
    let cli = Cli::try_parse_from(program.chain(words.iter().cloned()));
    let cli = cli.map_err(|error| {
        Usage(format!(
            "the flags that the last agent was started with make no sense to this version ({}): use the `sluice` of its version",
            error.render().to_string().lines().next().unwrap_or_default()
        ))
    })?;
    let Command::Agent(mut args) = cli.command else {
        return Err(Usage(format!(
            "the status names no agent's flags: sluice {}",
            words.join(" ")
        ))
        .into());
    };
    // Relative paths are the agent's.
    let directory = invocation.map_or(Path::new(""), |invocation| &invocation.directory);
    for path in [&mut args.manifests, &mut args.kubeconfig].into_iter().flatten() {
        *path = directory.join(&*path);
    }
    Ok(*args)
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    if !report.differences.is_empty() {
        let mut table = Table::new(&["", "MAP", "KEY", "WANTED", "FOUND", "SERVICE"]);
        for row in &report.differences {
            table.row([
                row.change.sign().to_owned(),
                row.map.to_owned(),
                row.key.clone(),
                row.wanted.clone().unwrap_or_default(),
                row.found.clone().unwrap_or_default(),
                row.service.clone().unwrap_or_default(),
            ]);
        }
        text = table.text() + "\n";
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
            line(format_args!(
                "{count} entries differ from what {sources} ({objects} objects) ask for."
            ));
        }
    }
    for unread in &report.unread {
        line(format_args!("Not read: {unread}; what an agent keeps of it shows as extra."));
    }
    match (report.in_step, report.agent_alive, report.repaired_writes) {
        (true, _, _) => {}
        (false, true, _) => line(format_args!(
            "An agent runs: restart it, and it writes the difference (`sluice status` shows what may keep it from that)."
        )),
        (false, false, None) => {
            line(format_args!(
                "`sluice diff --repair` writes the difference; an agent that starts does, too."
            ));
        }
        (false, false, Some(_)) => {
            line(format_args!(
                "What is left an agent has to mend: it attaches programs to devices, too."
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
        let asked = args("").asked(Some(&last)).expect("good flags");
        assert_eq!(asked.manifests, Some("/srv/services".into()));
        assert!(asked.kubernetes.is_none());
        assert_eq!(asked.inputs.node.as_ref(), "a");
        assert_eq!(asked.inputs.policy.masquerade, Masquerade::All);
        assert_eq!(asked.inputs.socket_path, SocketPath::Host.number());
        assert_eq!(asked.inputs.patterns, Patterns::new(&["cali*".to_owned()], &[], &[]));
    }

    #[test]
    fn flags_of_the_command_go_before() {
        let last = status("agent --manifests services --masquerade all --nodeport-addresses all");
        let asked = args("--kubeconfig k --node b").asked(Some(&last)).expect("good flags");
        assert_eq!((asked.manifests, asked.inputs.node.as_ref()), (None, "b"));
        assert_eq!(asked.kubernetes.and_then(|settings| settings.kubeconfig), Some("k".into()));
        assert_eq!(asked.inputs.policy.masquerade, Masquerade::All);
        let asked = args("--masquerade needed").asked(Some(&last)).expect("good flags");
        assert_eq!(
            asked.inputs.policy,
            sluice_core::policy::Policy::default(),
            "one policy flag: all are as here"
        );
        assert_eq!(asked.manifests, Some("/srv/services".into()));
    }

    #[test]
    fn an_agent_that_left_no_word_had_no_flags() {
        let asked = args("--manifests x").asked(Some(&Status::default())).expect("good flags");
        assert_eq!(asked.inputs.policy, sluice_core::policy::Policy::default());
        let error =
            args("").asked(Some(&status("agent --colour red"))).expect_err("an unknown flag");
        assert!(error.is::<Usage>() && error.to_string().contains("--colour"), "{error}");
    }
}
