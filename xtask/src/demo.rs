//! `cargo xtask demo`: builds what the lab's demo needs, then runs it.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use sluice_cluster::cache::Cache;
use sluice_cluster::packages;
use sluice_cluster::process::Cmd;

use crate::toolchain::{self, Choice};
use crate::workspace::{OBJECT_ENV, Workspace};
use crate::{agent, artifacts, ebpf};

/// Options of `cargo xtask demo`.
#[derive(Args)]
pub(crate) struct Options {
    /// Keep the demo's network namespaces, to look around.
    #[arg(long)]
    keep: bool,
}

/// Builds what is needed and runs the lab's demo.
pub(crate) fn run(workspace: &Workspace, choice: Choice, options: &Options) -> Result<ExitCode> {
    if !packages::is_root() {
        eprintln!(
            "the demo loads kernel programs and makes network namespaces: run `sudo -E env PATH=\"$PATH\" cargo xtask demo`"
        );
        return Ok(ExitCode::FAILURE);
    }
    let toolchain = toolchain::obtain(&Cache::open()?, choice)?;
    let object = ebpf::build(workspace, &toolchain)?;
    packages::ensure_tools(packages::LAB)?;
    let sluice = agent::build_dev(workspace)?;
    // Both programs: the demo starts the other one as servers and clients.
    let demo =
        artifacts::build(workspace.cargo().args(["build", "--package", "sluice-lab", "--bins"]))?
            .iter()
            .filter(|artifact| artifact.target.name == "sluice-lab-demo")
            .find_map(|artifact| artifact.binary().cloned())
            .context("cannot build the demo: cargo built no sluice-lab-demo")?;
    Cmd::new(demo)
        .args(options.keep.then_some("--keep"))
        .env("SLUICE_BIN", sluice)
        .env(OBJECT_ENV, object)
        .run()?;
    Ok(ExitCode::SUCCESS)
}
