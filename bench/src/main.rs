//! Sluice's benchmarks. `cargo xtask bench` builds what they need and runs them.
//!
//! Everything is measured in network namespaces of a lab, and everything that is compared is
//! measured in one run, by turns: absolute times of two runs say nothing on a machine that others
//! use.

mod agents;
mod connect;
mod driver;
mod frames;
mod path;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Measure Sluice.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure the cost of a packet at every hook, in nanoseconds
    Path(Options),
    /// Measure how many connections a second a node port takes
    Connect(Options),
}

/// The subjects that are measured in addition to `$SLUICE_BIN`.
#[derive(Args)]
struct Options {
    /// Another `sluice`, of another version, to be measured in the same run.
    #[arg(long, value_name = "BINARY")]
    against: Option<PathBuf>,
    /// Write the figures to this file as well, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Path(options) => path::run(&options),
        Command::Connect(options) => connect::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
