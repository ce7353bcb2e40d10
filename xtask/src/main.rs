//! The project's own commands: `cargo xtask <command>`.
//!
//! Everything beyond plain `cargo build` lives here: the eBPF object and its compiler, the test
//! tiers and their tools, lint, the demo. Tools that have to be built are kept in a cache outside
//! the source tree ([`sluice_cluster::cache`]). System packages are installed only for root; for
//! everybody else the error names them.

mod agent;
mod artifacts;
mod bench;
mod budget;
mod cluster;
mod demo;
mod ebpf;
mod image;
mod lint;
mod measure;
mod stack;
mod test;
mod toolchain;
mod version;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use sluice_cluster::cache::Cache;
use sluice_cluster::components;
use sluice_cluster::process::Cmd;

use crate::workspace::Workspace;

/// Build, check, test and show Sluice.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version, propagate_version = false)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// The compiler for the eBPF programs.
    #[arg(long, global = true, env = "SLUICE_BPF_TOOLCHAIN", value_enum, default_value_t)]
    toolchain: toolchain::Choice,
}

#[derive(Subcommand)]
enum Command {
    /// Build the eBPF object into target/bpf/sluice.o and measure its programs.
    BuildEbpf,
    /// Build the release binary `sluice` as one static file, eBPF included.
    Build,
    /// Write an image of that binary with its bill of materials; needs no container engine.
    Image(image::Options),
    /// Check formatting, spelling and dependencies, run clippy and rustdoc; warnings are errors.
    Lint,
    /// Run the tests; the last line on stdout is `N passed, N failed`.
    Test(test::Options),
    /// Build (once) the Kubernetes control plane that the api tests talk to.
    ControlPlane,
    /// Run a real Kubernetes in network namespaces of this machine (as root).
    #[command(subcommand)]
    Cluster(sluice_cluster::Command),
    /// Show Sluice at work in network namespaces of this machine (as root).
    Demo(demo::Options),
    /// Write docs/screens.md: every command of `sluice` on a terminal of 80 columns (as root).
    Screens,
    /// Measure, and print ratios (as root).
    #[command(subcommand)]
    Bench(bench::Command),
    #[command(flatten)]
    Internal(sluice_cluster::Internal),
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    match &cli.command {
        Command::BuildEbpf => {
            let toolchain = toolchain::obtain(&Cache::open()?, cli.toolchain)?;
            let object = ebpf::build(&workspace, &toolchain)?;
            measure::report(&workspace, &object)?;
            let next = ebpf::build_next(&workspace, &toolchain)?;
            measure::report_rounds(&workspace, &next)?;
        }
        Command::Build => {
            let toolchain = toolchain::obtain(&Cache::open()?, cli.toolchain)?;
            let _object = ebpf::build(&workspace, &toolchain)?;
            let _binary = agent::build_release(&workspace)?;
        }
        Command::Image(options) => {
            let toolchain = toolchain::obtain(&Cache::open()?, cli.toolchain)?;
            let _object = ebpf::build(&workspace, &toolchain)?;
            image::run(&workspace, options)?;
        }
        Command::Lint => {
            lint::run(&workspace, &toolchain::obtain(&Cache::open()?, cli.toolchain)?)?;
        }
        Command::Test(options) => return Ok(test::run(&workspace, cli.toolchain, options)),
        Command::ControlPlane => {
            let directory = components::control_plane(&Cache::open()?)?;
            println!("{}", directory.display());
        }
        Command::Cluster(command) => return cluster::run(&workspace, cli.toolchain, command),
        Command::Internal(command) => command.run()?,
        Command::Demo(options) => return demo::run(&workspace, cli.toolchain, options),
        Command::Screens => return screens(),
        Command::Bench(command) => return bench::run(&workspace, cli.toolchain, command),
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs the lab test that holds docs/screens.md against the commands, and has it write the page.
fn screens() -> Result<ExitCode> {
    Cmd::new(std::env::current_exe()?)
        .args(["test", "lab", "--", "screens::"])
        .env("SLUICE_SCREENS_WRITE", "1")
        .run()?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
