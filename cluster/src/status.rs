//! `cargo xtask cluster status`: processes, nodes, pods.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::addresses::NodeNumber;
use crate::kubectl::Kubectl;
use crate::launch::{self, Process};
use crate::state::State;
use crate::{control_plane, is_up};

/// Prints the tables. Fails if there is no cluster or a part of it does not run.
pub(crate) fn run() -> Result<ExitCode> {
    let state = State::open();
    let Some(description) = is_up(&state)? else {
        print("no cluster is up; bring one up with `cargo xtask cluster up`\n")?;
        return Ok(ExitCode::FAILURE);
    };
    let mut text = format!(
        "{} nodes, --cni {}, --proxy {}; kubeconfig {}\n\n",
        description.nodes,
        description.cni,
        description.proxy,
        state.kubeconfig().display()
    );
    let processes = processes(&state, description.nodes, &mut text)?;
    let objects = objects(&Kubectl::new(&state), &mut text);
    let all_run = description.is_complete && processes && objects;
    if !all_run {
        text.push_str(
            "\nSomething of it does not run: `cargo xtask cluster up` with the same options starts it again.\n",
        );
    }
    print(&text)?;
    Ok(if all_run { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints the processes, and returns whether all of them run.
fn processes(state: &State, nodes: u8, text: &mut String) -> Result<bool> {
    let mut all_run = true;
    writeln!(text, "{:<24}  {:>8}  {:<8}  LOG", "PROCESS", "PID", "STATE")?;
    let names = control_plane::NAMES.map(str::to_owned).into_iter();
    for name in names.chain(NodeNumber::all(nodes).map(NodeNumber::name)) {
        let process = Process::recorded(state, &name);
        let runs = process.as_ref().is_some_and(Process::lives);
        all_run &= runs;
        writeln!(
            text,
            "{name:<24}  {:>8}  {:<8}  {}",
            process.map_or_else(String::new, |process| process.pid.to_string()),
            if runs { "running" } else { "ended" },
            launch::log(state, &name).display()
        )?;
    }
    Ok(all_run)
}

/// Prints the objects, and returns whether the API server answers.
fn objects(kubectl: &Kubectl, text: &mut String) -> bool {
    let questions = [
        ["get", "nodes", "--output=wide", "--label-columns=topology.kubernetes.io/zone"],
        ["get", "pods", "--all-namespaces", "--output=wide"],
    ];
    questions.into_iter().all(|args| {
        let answer = kubectl.ask(args);
        let table = answer
            .as_ref()
            .map_or_else(|error| format!("{error:#}"), |table| table.trim_end().to_owned());
        text.push('\n');
        text.push_str(&table);
        text.push('\n');
        answer.is_ok()
    })
}

fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        // A reader like `head` has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.context("cannot write to standard output"),
    }
}
