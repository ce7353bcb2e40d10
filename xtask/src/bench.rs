//! `cargo xtask bench`: builds what a benchmark needs, then runs it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use sluice_cluster::cache::Cache;
use sluice_cluster::packages;
use sluice_cluster::process::Cmd;

use crate::toolchain::{self, Choice};
use crate::workspace::Workspace;
use crate::{agent, artifacts, ebpf};

/// The benchmarks.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Measure the cost of a packet at every hook, in nanoseconds.
    Path(Options),
    /// Measure the connections per second through a node port.
    Connect(Options),
}

/// Options of a benchmark.
#[derive(Args)]
pub(crate) struct Options {
    /// A `sluice` binary of another version, to be measured in the same run.
    #[arg(long, value_name = "BINARY")]
    against: Option<PathBuf>,
    /// Also write the figures to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Builds what is needed and runs the benchmark.
pub(crate) fn run(workspace: &Workspace, choice: Choice, command: &Command) -> Result<ExitCode> {
    let (name, options) = match command {
        Command::Path(options) => ("path", options),
        Command::Connect(options) => ("connect", options),
    };
    if !packages::is_root() {
        eprintln!(
            "a benchmark loads kernel programs and makes network namespaces: run \
             `sudo -E env PATH=\"$PATH\" cargo xtask bench {name}`"
        );
        return Ok(ExitCode::FAILURE);
    }
    let toolchain = toolchain::obtain(&Cache::open()?, choice)?;
    let _object = ebpf::build(workspace, &toolchain)?;
    let driver = ebpf::build_bench(workspace, &toolchain)?;
    packages::ensure_tools(packages::LAB)?;
    let sluice = agent::build_dev(workspace)?;
    let build = ["build", "--package", "sluice-lab", "--package", "sluice-bench", "--bins"];
    let built = artifacts::build(workspace.cargo().args(build))?;
    let find = |name: &str| {
        built
            .iter()
            .filter(|artifact| artifact.target.name == name)
            .find_map(|artifact| artifact.binary().cloned())
            .with_context(|| format!("cannot build the benchmark: cargo built no {name}"))
    };
    Cmd::new(find("sluice-bench")?)
        .arg(name)
        .args(options.against.iter().flat_map(|path| ["--against".into(), path.clone()]))
        .args(options.json.iter().flat_map(|path| ["--json".into(), path.clone()]))
        .env("SLUICE_BIN", sluice)
        .env("SLUICE_LAB_SERVER", find("sluice-lab-server")?)
        .env("SLUICE_BENCH_OBJECT", driver)
        .run()?;
    Ok(ExitCode::SUCCESS)
}
