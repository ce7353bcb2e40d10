//! `cargo xtask test`: four tiers and a choice of Kubernetes' own tests, one sum.
//!
//! | tier   | what                                                     | needs         |
//! |--------|----------------------------------------------------------|---------------|
//! | unit   | all unit, integration and doc tests not named below      | nothing       |
//! | kernel | `agent/tests/kernel*.rs`, programs by BPF_PROG_TEST_RUN  | root          |
//! | lab    | `agent/tests/lab*.rs`, traffic through network namespaces | root         |
//! | api    | `agent/tests/api*.rs`, a real API server                 | root, Go      |
//!
//! The test binaries are built by one `cargo test --no-run` and then run one
//! after the other from here, because their number of threads, their time
//! limit and what happens to a hung one differ from tier to tier.
//!
//! stdout carries the tests' own output and ends with the line
//! `N passed, N failed` (and `, N skipped` where some were).
//!
//! A tier that this machine cannot run is not started. Run by plain `cargo test`, its tests fail
//! where they cannot run, unless `SLUICE_TEST_SKIP=1` says to skip them.
//!
//! Kubernetes' own tests ([`e2e`]) are no tier, since none of their binaries is built from here: a
//! choice of them is run where all tiers are, the rest takes long and is run by name alone. So are
//! the tests of `deploy/` on a cluster ([`overlays`]).

mod e2e;
mod libtest;
mod overlays;
mod prepare;
mod rollout;
mod run;
mod tier;

use std::env;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use crate::artifacts::{self, Artifact};
use crate::measure;
use crate::toolchain::Choice;
use crate::ui::seconds;
use crate::workspace::Workspace;

use self::libtest::Counts;
use self::prepare::{Prepared, Readiness};
use self::run::{Binary, Limit};
use self::tier::Tier;

/// Options of `cargo xtask test`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Options {
    #[command(subcommand)]
    suite: Option<Suite>,

    /// The tiers to run; all of them if none is named.
    #[arg(value_enum)]
    tiers: Vec<Tier>,

    /// Accept skipped tiers even where CI=true makes them failures.
    #[arg(long)]
    allow_skip: bool,

    /// How long one tier may take before its test process group is killed.
    #[arg(long, default_value_t = 35, value_name = "MINUTES")]
    tier_timeout: u64,

    /// Passed to every test binary: a filter, `--nocapture` and so on.
    #[arg(last = true)]
    filter: Vec<String>,
}

/// Tests that are not ours.
#[derive(Subcommand)]
enum Suite {
    /// Run Kubernetes' own tests against Sluice on a real cluster, beside what the real kube-proxy
    /// gets.
    E2e(e2e::Options),
    /// Bring up a cluster for every way to deploy Sluice, and ask Services of every kind from
    /// everywhere.
    Overlays(overlays::Options),
    /// Update Sluice's DaemonSet on a real cluster under load: no connection may be lost or
    /// refused.
    Rollout(rollout::Options),
}

impl Options {
    fn wants(&self, tier: Tier) -> bool {
        self.tiers.is_empty() || self.tiers.contains(&tier)
    }
}

/// Runs the tiers and prints the sum. An error on the way is a failure in the
/// sum, so that the last line is always there.
pub(crate) fn run(workspace: &Workspace, choice: Choice, options: &Options) -> ExitCode {
    let mut total = Counts::default();
    let ran = match &options.suite {
        Some(Suite::E2e(options)) => {
            e2e::run(workspace, choice, options).map(|counts| total = counts)
        }
        Some(Suite::Overlays(options)) => {
            overlays::run(workspace, choice, options).map(|counts| total = counts)
        }
        Some(Suite::Rollout(options)) => {
            rollout::run(workspace, choice, options).map(|counts| total = counts)
        }
        None => run_tiers(workspace, choice, options, &mut total),
    };
    if let Err(error) = ran {
        eprintln!("error: {error:#}");
        total.failed += 1;
    }
    println!("{total}");
    if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_tiers(
    workspace: &Workspace,
    choice: Choice,
    options: &Options,
    total: &mut Counts,
) -> Result<()> {
    let wanted: Vec<_> = Tier::ALL.into_iter().filter(|tier| options.wants(*tier)).collect();
    let mut prepared = prepare::prepare(workspace, choice, &wanted)?;
    let artifacts = build(workspace, &wanted)?;
    prepared.take_sluice(&artifacts);
    let mut summary = Vec::new();
    for tier in wanted {
        let binaries: Vec<_> = artifacts
            .iter()
            .filter(|artifact| artifact.is_test_binary() && Tier::of(artifact) == tier)
            .map(Binary::new)
            .collect::<Result<_>>()?;
        let started = Instant::now();
        let counts = match prepared.readiness(tier) {
            Readiness::Ready => {
                let mut counts = weigh(workspace, tier, &prepared);
                counts.add(run_tier(workspace, tier, &binaries, &prepared, options)?);
                counts
            }
            Readiness::Skip(_) if binaries.is_empty() => continue,
            Readiness::Skip(reason) => {
                eprintln!("{tier}: skipped: {reason}");
                skip(&binaries, options)
            }
        };
        summary.push(format!("{tier}: {counts} ({})", seconds(started.elapsed())));
        total.add(counts);
    }
    if options.tiers.is_empty() && options.filter.is_empty() {
        let started = Instant::now();
        let counts = run_brief(workspace, choice, &prepared, options).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            Counts { failed: 1, ..Counts::default() }
        });
        summary.push(format!("e2e: {counts} ({})", seconds(started.elapsed())));
        total.add(counts);
    }
    for line in summary {
        eprintln!("{line}");
    }
    Ok(())
}

/// Builds the test binaries of the wanted tiers.
fn build(workspace: &Workspace, wanted: &[Tier]) -> Result<Vec<Artifact>> {
    let is_all = wanted.contains(&Tier::Unit);
    if !is_all && !tier::has_tests(workspace, wanted)? {
        return Ok(Vec::new());
    }
    let only = wanted
        .iter()
        .filter(|_| !is_all)
        .flat_map(|tier| ["--test".to_owned(), format!("{tier}*")]);
    // Always the whole workspace: with fewer packages cargo would choose other
    // features for their dependencies and build those again.
    let cargo = workspace.cargo().args(["test", "--no-run", "--workspace"]).args(only);
    artifacts::build(cargo).context("cannot build the tests")
}

/// The budget of the eBPF programs, as the first test of the kernel tier.
fn weigh(workspace: &Workspace, tier: Tier, prepared: &Prepared) -> Counts {
    let mut counts = Counts::default();
    if let (Tier::Kernel, Some(object)) = (tier, prepared.object()) {
        println!("\n== {tier}: verifier");
        let rounds = prepared.next_object().map(|object| measure::report_rounds(workspace, object));
        for result in [Some(measure::report(workspace, object)), rounds].into_iter().flatten() {
            match result {
                Ok(()) => counts.passed += 1,
                Err(error) => {
                    eprintln!("error: {error:#}");
                    counts.failed += 1;
                }
            }
        }
    }
    counts
}

fn run_tier(
    workspace: &Workspace,
    tier: Tier,
    binaries: &[Binary],
    prepared: &Prepared,
    options: &Options,
) -> Result<Counts> {
    let limit = Limit::new(tier, Duration::from_mins(options.tier_timeout));
    let mut counts = Counts::default();
    for binary in binaries {
        let threads = tier.threads(binary.source())?;
        let command = binary
            .command()
            .args(threads.map(|threads| format!("--test-threads={threads}")))
            .args(&options.filter)
            .envs(prepared.environment(tier));
        counts.add(run::run(binary.name(), command, &limit)?);
    }
    if tier == Tier::Unit {
        let command = workspace
            .cargo()
            .args(["test", "--workspace", "--doc", "--quiet", "--"])
            .args(&options.filter);
        counts.add(run::run("documentation", command, &limit)?);
    }
    Ok(counts)
}

/// Those of Kubernetes' own tests that tell most, with the agent that the other tests have.
fn run_brief(
    workspace: &Workspace,
    choice: Choice,
    prepared: &Prepared,
    options: &Options,
) -> Result<Counts> {
    match prepare::e2e() {
        Readiness::Ready => {
            println!("\n== e2e: Kubernetes' own tests");
            e2e::run(workspace, choice, &e2e::Options::brief(prepared.sluice().map(Path::to_owned)))
        }
        Readiness::Skip(reason) => {
            eprintln!("e2e: skipped: {reason}");
            Ok(skip(&[], options))
        }
    }
}

/// Counts what a skipped tier would have run.
fn skip(binaries: &[Binary], options: &Options) -> Counts {
    let in_ci = env::var("CI").is_ok_and(|ci| !matches!(ci.as_str(), "" | "0" | "false"));
    Counts {
        skipped: binaries.iter().map(|binary| binary.list(&options.filter)).sum(),
        // A machine that is there to run the tests and cannot is broken.
        failed: u64::from(in_ci && !options.allow_skip),
        ..Counts::default()
    }
}
