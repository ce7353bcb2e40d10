//! Starts the processes of a cluster, which outlive this one, and finds them again.
//!
//! A process has to be in its cgroup and namespace before its program starts. So this program is
//! started first, moves there and executes the other ([`become_program`]).

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::namespace::Namespace;
use crate::process::Cmd;
use crate::state::State;

/// The options of [`become_program`].
#[derive(Args)]
pub struct Options {
    /// The network namespace's name.
    #[arg(long)]
    namespace: String,
    /// The group below the cluster's cgroup.
    #[arg(long)]
    group: String,
    /// The program and its arguments.
    #[arg(last = true)]
    command: Vec<OsString>,
}

/// A process, identified by its id and the time at which it started.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    started: String,
}

impl Process {
    /// Returns the process with that id, if there is one.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, started: start_time(pid)? })
    }

    pub(crate) fn lives(&self) -> bool {
        start_time(self.pid).as_ref() == Some(&self.started)
    }

    /// Kills it and waits until it is gone.
    pub(crate) fn kill(&self) {
        while self.lives() {
            if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
                // A process that has just ended needs no killing.
                let _ = kill_process(pid, Signal::KILL);
            }
            sleep(Duration::from_millis(5));
        }
    }

    /// Returns the process that was started under that name.
    pub(crate) fn recorded(state: &State, name: &str) -> Option<Self> {
        serde_json::from_slice(&fs::read(record(state, name)).ok()?).ok()
    }
}

/// Returns when a process started, in clock ticks since boot.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name, in parentheses, may contain anything; the state is the first field after
    // it, and field 22 the 20th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let is_zombie = fields.next()? == "Z";
    fields.nth(18).filter(|_| !is_zombie).map(str::to_owned)
}

fn record(state: &State, name: &str) -> PathBuf {
    state.path("run").join(format!("{name}.json"))
}

/// Returns the file with the output of the process of that name.
pub(crate) fn log(state: &State, name: &str) -> PathBuf {
    state.path("log").join(format!("{name}.log"))
}

/// Returns the end of the output of a process, for an error message.
pub(crate) fn last_words(log: &Path) -> String {
    let text =
        fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let end = lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n  ");
    format!("the end of {}:\n  {end}", log.display())
}

/// Starts a process in a namespace and group, unless the process of that name is alive. Returns
/// whether it started one.
pub(crate) fn ensure(
    state: &State,
    name: &str,
    namespace: &str,
    group: &str,
    command: Cmd,
) -> Result<bool> {
    if Process::recorded(state, name).is_some_and(|process| process.lives()) {
        return Ok(false);
    }
    let log = log(state, name);
    state.write(Path::new("log").join(format!("{name}.log")), "")?;
    let output = File::options()
        .append(true)
        .open(&log)
        .with_context(|| format!("cannot open {}", log.display()))?;
    let command = command.into_inner();
    // Not by its path: the cloud starts processes as long as the cluster lives, even if the file
    // has been replaced.
    let child = Command::new("/proc/self/exe")
        .args(["cluster-launch", "--namespace", namespace, "--group", group, "--"])
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("cannot copy a descriptor")?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    // It has not been waited for, so it exists, if only as a zombie.
    let process = Process::of(child.id())
        .with_context(|| format!("{name} ended at once; {}", last_words(&log)))?;
    state
        .write(Path::new("run").join(format!("{name}.json")), &serde_json::to_string(&process)?)?;
    Ok(true)
}

/// Moves to the namespace and group and executes the program. Returns only if it cannot.
pub(crate) fn become_program(options: &Options) -> Result<()> {
    cgroup::join(&options.group)?;
    Namespace::named(&State::open(), &options.namespace).join()?;
    let _session = rustix::process::setsid().context("cannot leave the terminal")?;
    let (program, args) = options.command.split_first().context("no program to start")?;
    let error = Command::new(program).args(args).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
