//! The agent under test: `sluice agent` as a process of a node.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::node::Node;
use crate::running::Running;

/// Options of an agent.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// The directory of manifests that it watches.
    pub manifests: Option<PathBuf>,
    /// The kubeconfig by which it reaches an API server.
    pub kubeconfig: Option<PathBuf>,
    /// Further arguments of `sluice agent`.
    pub args: Vec<String>,
    /// A program to run instead of the `sluice` under test: an older or newer one.
    pub program: Option<PathBuf>,
    /// The name that it has for the node, if not the node's own.
    pub node_name: Option<String>,
    /// Further environment variables.
    pub environment: Vec<(String, String)>,
}

/// An agent of a node. Dropping this kills it with SIGKILL, which leaves its programs and maps in
/// the kernel until the lab ends.
pub struct AgentProcess {
    node: Node,
    options: AgentOptions,
    running: Running,
}

/// Finds the `sluice` binary: `$SLUICE_BIN`, or in the directory of this program or, for a test,
/// the one above.
fn sluice_path() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SLUICE_BIN") {
        return Ok(path.into());
    }
    let this = std::env::current_exe().context("cannot tell where this program is")?;
    let found = this
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join("sluice"))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!(
            "there is no `sluice` near {}: build it, and set SLUICE_BIN to where it is",
            this.display()
        )
    })
}

impl Node {
    /// Starts `sluice agent` in the node's namespace and its cgroup `host`, pinning below
    /// [`Node::pin_path`], attached to the node's whole cgroup. It may not be ready yet when this
    /// returns: see [`AgentProcess::wait_ready`].
    ///
    /// # Errors
    /// If the binary is not found (`SLUICE_BIN`) or cannot be started.
    pub fn agent(&self, options: AgentOptions) -> Result<AgentProcess> {
        let running = start(self, &options)?;
        Ok(AgentProcess { node: self.clone(), options, running })
    }

    /// Returns the directory in which the node's agent pins its maps and links.
    pub fn pin_path(&self) -> PathBuf {
        self.bpffs().join("sluice")
    }

    /// Runs a subcommand of `sluice` on the node with the node's `--pin-path`, and returns its
    /// standard output.
    ///
    /// # Errors
    /// If it cannot be started or fails; the error then holds its standard error.
    pub fn sluice(&self, args: &[&str]) -> Result<String> {
        let output = self.sluice_output(args)?;
        if !output.status.success() {
            bail!(
                "`sluice {}` failed on the node {} ({}): {}",
                args.join(" "),
                self.name(),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Returns the command for a subcommand of `sluice` on the node with the node's `--pin-path`.
    ///
    /// # Errors
    /// If the binary is not found.
    pub fn sluice_command(&self, args: &[&str]) -> Result<Command> {
        let program = self.program().clone();
        let mut command = self.command(program.map_or_else(sluice_path, Ok)?);
        // Tests read whole cells.
        let _ = command.args(args).arg("--pin-path").arg(self.pin_path()).env("COLUMNS", "500");
        Ok(command)
    }

    /// Like [`Node::sluice`], but returns the output whatever the exit status.
    pub fn sluice_output(&self, args: &[&str]) -> Result<Output> {
        self.sluice_command(args)?.output().with_context(|| {
            format!("cannot run `sluice {}` on the node {}", args.join(" "), self.name())
        })
    }
}

fn start(node: &Node, options: &AgentOptions) -> Result<Running> {
    node.program().clone_from(&options.program);
    let program = options.program.clone().map_or_else(sluice_path, Ok)?;
    let mut command = node.command(program);
    let _ = command
        .envs(options.environment.iter().cloned())
        .arg("agent")
        .arg("--node-name")
        .arg(options.node_name.as_deref().unwrap_or(node.name()))
        .arg("--pin-path")
        .arg(node.pin_path())
        .arg("--cgroup")
        .arg(node.cgroup_root());
    if let Some(manifests) = &options.manifests {
        let _ = command.arg("--manifests").arg(manifests);
    }
    if let Some(kubeconfig) = &options.kubeconfig {
        let _ = command.arg("--kubeconfig").arg(kubeconfig);
    }
    let _ = command.args(&options.args);
    node.spawn_command(command)
        .with_context(|| format!("cannot start the agent of the node {}", node.name()))
}

impl AgentProcess {
    /// Waits until `sluice status -o json` succeeds and says `"ready": true`.
    ///
    /// # Errors
    /// If it does not in time, or if the agent ends; the error holds the end of its log.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<()> {
        let node = self.node.clone();
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.running.poll()? {
                bail!(
                    "the agent of {} ended ({status}) before it was ready; its log ends:\n{}",
                    node.name(),
                    self.log_tail()
                );
            }
            let answer = node.sluice_output(&["status", "-o", "json"])?;
            let status: serde_json::Value =
                serde_json::from_slice(&answer.stdout).unwrap_or_default();
            if answer.status.success()
                && status.get("ready") == Some(&serde_json::Value::Bool(true))
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "the agent of {} was not ready after {timeout:?}; `sluice status` said ({}): {}{}\nits log ends:\n{}",
                    node.name(),
                    answer.status,
                    String::from_utf8_lossy(&answer.stdout).trim(),
                    String::from_utf8_lossy(&answer.stderr).trim(),
                    self.log_tail()
                );
            }
            // Each question starts a process. More of them would slow down the agent's start.
            sleep(Duration::from_millis(100));
        }
    }

    /// Returns the options that the next start uses.
    pub fn options(&mut self) -> &mut AgentOptions {
        &mut self.options
    }

    /// Returns the agent's process.
    pub fn process(&mut self) -> &mut Running {
        &mut self.running
    }

    /// Returns everything that it has logged since its last start.
    pub fn log(&self) -> String {
        self.running.stderr() + &self.running.stdout()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n")
    }

    /// Kills it with SIGKILL, as a node under memory pressure would.
    pub fn kill9(&mut self) -> Result<()> {
        self.running.kill().map(drop)
    }

    /// Sends it SIGTERM, as a kubelet does, and waits for its end.
    ///
    /// # Errors
    /// If it has to be killed, or ends with an error.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.running.stop()?;
        if !status.success() {
            bail!(
                "the agent of {} did not end cleanly on SIGTERM ({status}); its log ends:\n{}",
                self.node.name(),
                self.log_tail()
            );
        }
        Ok(())
    }

    /// Stops it if it still runs, and starts it with the same options.
    pub fn restart(&mut self) -> Result<()> {
        if self.running.poll()?.is_none() {
            self.stop()?;
        }
        self.running = start(&self.node, &self.options)?;
        Ok(())
    }
}
