//! `cargo xtask cluster shell`: a shell, or one command, inside the cluster.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::addresses::NodeNumber;
use crate::launch::Process;
use crate::namespace::Namespace;
use crate::network::OUTSIDE_CLIENT;
use crate::node;
use crate::node_init;
use crate::process::Cmd;
use crate::state::State;
use crate::{ShellOptions, is_up};

/// Executes the shell or command. Returns only if it cannot.
pub(crate) fn run(options: &ShellOptions) -> Result<()> {
    let state = State::open();
    let Some(description) = is_up(&state)? else {
        bail!("no cluster is up: bring one up with `cargo xtask cluster up`");
    };
    let shell = || vec![std::env::var_os("SHELL").unwrap_or_else(|| OsString::from("/bin/sh"))];
    let line = if options.command.is_empty() { shell() } else { options.command.clone() };
    let error = match &options.node {
        None => {
            if options.command.is_empty() {
                eprintln!("outside the nodes; kubectl is the cluster's; leave with `exit`");
            }
            outside(&state, &line)?
        }
        Some(name) => {
            let number = NodeNumber::all(description.nodes)
                .find(|number| number.name() == *name)
                .with_context(|| {
                format!("no node is called {name}: they are n1 to n{}", description.nodes)
            })?;
            if options.command.is_empty() {
                eprintln!("on the node {name}, in all its namespaces; leave with `exit`");
            }
            on_node(&state, number, &line)?
        }
    };
    Err(error).with_context(|| format!("cannot start {}", line.join(" ".as_ref()).display()))
}

fn outside(state: &State, line: &[OsString]) -> Result<std::io::Error> {
    Namespace::named(state, OUTSIDE_CLIENT).join()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(state.programs()).chain(std::env::split_paths(&path));
    let (program, args) = line.split_first().context("no command")?;
    // A path that splits also joins.
    let path = std::env::join_paths(path).context("PATH cannot be extended")?;
    let mut assignment = OsString::from("PATH=");
    assignment.push(path);
    // `env` finds the program itself by the new PATH, too.
    Ok(Command::new("env")
        .arg(assignment)
        .arg(program)
        .args(args)
        .env("KUBECONFIG", state.kubeconfig())
        .exec())
}

/// Runs a program on a node and returns its standard output.
pub(crate) fn answer(state: &State, node: &str, line: &[&str]) -> Result<String> {
    let number = NodeNumber::all(u8::MAX).find(|number| number.name() == node);
    let number = number.with_context(|| format!("no node is called {node}"))?;
    Cmd::from(enter(state, number)?).args(line).answer()
}

fn on_node(state: &State, number: NodeNumber, line: &[OsString]) -> Result<std::io::Error> {
    Ok(enter(state, number)?.args(line).exec())
}

/// Returns a command that runs the program and arguments added to it on a node.
fn enter(state: &State, number: NodeNumber) -> Result<Command> {
    let name = number.name();
    let Some(init) = Process::recorded(state, &node::init_name(number)).filter(Process::lives)
    else {
        bail!("the node {name} does not run: start it again with `cargo xtask cluster up`");
    };
    let mut command = Command::new("nsenter");
    let _ = command
        .args([
            "--target",
            &init.pid.to_string(),
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--cgroup",
            "--",
        ])
        .args([
            "env",
            &format!("PATH={}", node_init::path()),
            &format!("KUBECONFIG=/run/{}/kubeconfig", node::STATE),
        ]);
    Ok(command)
}
