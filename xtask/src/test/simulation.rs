//! Builds and runs the simulation of `simulation/`.

use anyhow::{Context, Result};
use clap::Args;
use sluice_cluster::process::Cmd;

use crate::artifacts;
use crate::workspace::Workspace;

use super::libtest::Counts;

/// Options of `cargo xtask test simulation`.
#[derive(Args)]
pub(crate) struct Options {
    /// Arguments for the simulation: `--seed N`, `--minutes M`, `--help`.
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// Builds the simulation and runs it.
pub(super) fn run(workspace: &Workspace, options: &Options) -> Result<Counts> {
    // Of the whole workspace, as the tests are: alone it would get other features for its
    // dependencies and be built again.
    let cargo = workspace.cargo().args(["build", "--workspace", "--bin", "sluice-simulation"]);
    let program = artifacts::build_binary(cargo).context("cannot build the simulation")?;
    let has_passed = Cmd::new(program).args(&options.arguments).run().is_ok();
    let (passed, failed) = (u64::from(has_passed), u64::from(!has_passed));
    Ok(Counts { passed, failed, ..Counts::default() })
}
