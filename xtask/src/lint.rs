//! `cargo xtask lint`: one line per step, warnings are errors.

mod columns;
mod tools;
mod wings;

use std::io::{self, IsTerminal};

use anyhow::{Context, Result};
use sluice_cluster::cache::Cache;
use sluice_cluster::process::{Cmd, newest_line};
use sluice_cluster::ui::Step;

use crate::ebpf;
use crate::toolchain::Toolchain;
use crate::workspace::Workspace;

/// Runs all checks and stops at the first that fails.
pub(crate) fn run(workspace: &Workspace, toolchain: &Toolchain) -> Result<()> {
    let cargo = |args: &[&str]| workspace.cargo().args(args);
    step("fmt", cargo(&["fmt", "--all", "--check"]))?;
    columns::check(workspace).context("lint: columns")?;
    wings::check(workspace).context("lint: wings")?;
    let cache = Cache::open()?;
    step(
        "typos",
        Cmd::new(tools::TYPOS.obtain(&cache)?).dir(workspace.root()).arg("--color=never"),
    )?;
    let deny = Cmd::new(tools::DENY.obtain(&cache)?).dir(workspace.root()).arg("--color=never");
    step("deny", deny.args(["check", "bans", "licenses", "sources"]))?;
    step("clippy", cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    // The programs are empty when they are compiled for the host.
    for (name, features) in
        [("kernel programs", ""), ("kernel programs of the next layout", "next-layout")]
    {
        let command = ebpf::clippy(workspace, toolchain, features)?.args(["--", "-D", "warnings"]);
        step(&format!("clippy, {name}"), command)?;
    }
    step("rustdoc", cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"]))
}

fn step(name: &str, command: Cmd) -> Result<()> {
    let step = Step::start(format!("lint: {name}"));
    let color = if io::stderr().is_terminal() { "always" } else { "never" };
    command
        .env("CARGO_TERM_COLOR", color)
        .env("RUSTDOCFLAGS", "-D warnings")
        .run_behind(&step, newest_line)
        .with_context(|| format!("lint: {name}"))?;
    step.done("ok");
    Ok(())
}
