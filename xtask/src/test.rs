//! `cargo xtask test`: four tiers and a choice of Kubernetes' own tests, one sum.
//!
//! | tier   | what                                                  | needs    |
//! |--------|-------------------------------------------------------|----------|
//! | unit   | all unit, integration and doc tests not named below   | nothing  |
//! | kernel | `agent/tests/kernel`, programs by BPF_PROG_TEST_RUN   | root     |
//! | lab    | `agent/tests/lab`, traffic through network namespaces | root     |
//! | api    | `agent/tests/api`, a real API server                  | root, Go |
//!
//! The test binaries are built by one `cargo test --no-run` and then run from here: taken apart
//! into jobs ([`job`]) that run side by side ([`pool`]), of all tiers at once, because kernel tests
//! keep a processor busy and lab tests mostly wait.
//!
//! stdout has a line for each job, before it what its tests printed if one failed, and ends with
//! the line `N passed, N failed` (and `, N skipped` where some were).
//!
//! A tier that this machine cannot run is not started. Run by plain `cargo test`, its tests fail
//! where they cannot run, unless `SLUICE_TEST_SKIP=1` says to skip them.
//!
//! Kubernetes' own tests ([`e2e`]) are no tier, since none of their binaries is built from here: a
//! choice of them is run where all tiers are, the rest takes long and is run by name alone. So are
//! the tests of `deploy/` on a cluster ([`overlays`]). The [`simulation`] is a program of its own,
//! and a job beside the others where all tiers are run.

mod e2e;
mod job;
mod libtest;
mod overlays;
mod pool;
mod prepare;
mod rollout;
mod run;
mod simulation;
mod tier;

use std::collections::BTreeMap;
use std::env;
use std::num::NonZero;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use sluice_cluster::process::Cmd;
use sluice_cluster::ui::seconds;

use crate::artifacts::{self, Artifact};
use crate::measure;
use crate::toolchain::Choice;
use crate::workspace::Workspace;

use self::job::{Binary, Job, Share};
use self::libtest::Counts;
use self::pool::Sum;
use self::prepare::{Prepared, Readiness};
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

    /// How many tests that mostly wait run side by side; two for each processor by default.
    #[arg(long, value_name = "N")]
    jobs: Option<NonZero<usize>>,

    /// How long one test process may take before its process group is killed.
    #[arg(long, default_value_t = 20, value_name = "MINUTES")]
    test_timeout: u64,

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
    /// Run nodes, clients and networks in one thread on the real path, plan and image: fixed seeds,
    /// one of them, or new ones.
    Simulation(simulation::Options),
}

impl Options {
    fn wants(&self, tier: Tier) -> bool {
        self.tiers.is_empty() || self.tiers.contains(&tier)
    }

    fn settings(&self) -> pool::Settings {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        pool::Settings {
            room: self.jobs.map_or(2 * processors, NonZero::get),
            allowed: Duration::from_mins(self.test_timeout),
            verbose: self.filter.iter().any(|argument| job::shows_output(argument)),
        }
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
        Some(Suite::Simulation(options)) => {
            simulation::run(workspace, options).map(|counts| total = counts)
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
    let mut sums: BTreeMap<&str, Sum> = BTreeMap::new();
    let mut jobs = Vec::new();
    for tier in wanted {
        let binaries: Vec<_> = artifacts
            .iter()
            .filter(|artifact| artifact.is_test_binary() && Tier::of(artifact) == tier)
            .map(Binary::new)
            .collect::<Result<_>>()?;
        match prepared.readiness(tier) {
            Readiness::Ready => {
                let started = Instant::now();
                let counts = weigh(workspace, tier, &prepared);
                let _new = sums.insert(tier.name(), Sum { counts, took: started.elapsed() });
                jobs.extend(jobs_of(workspace, tier, &binaries, &prepared, options)?);
            }
            Readiness::Skip(reason) => {
                eprintln!("{tier}: skipped: {reason}");
                let counts = skip(&binaries, options);
                let _new = sums.insert(tier.name(), Sum { counts, took: Duration::ZERO });
            }
        }
    }
    if options.tiers.is_empty() && options.filter.is_empty() {
        jobs.push(simulated()?);
        match prepare::e2e() {
            Readiness::Ready => jobs.push(brief(&prepared)?),
            Readiness::Skip(reason) => {
                eprintln!("e2e: skipped: {reason}");
                let counts = skip(&[], options);
                let _new = sums.insert("e2e", Sum { counts, took: Duration::ZERO });
            }
        }
    }
    // Where nothing is known of how long they take, the last tiers have the longest.
    jobs.reverse();
    for (tier, sum) in pool::run(jobs, &options.settings())? {
        let all = sums.entry(tier).or_default();
        all.counts.add(sum.counts);
        all.took += sum.took;
    }
    let summary: Vec<_> = sums
        .iter()
        .map(|(tier, sum)| format!("{tier}: {} ({} of tests)", sum.counts, seconds(sum.took)))
        .collect();
    for sum in sums.values() {
        total.add(sum.counts);
    }
    if total.all() == 0 {
        bail!("no test of these tiers has such a name: {}", options.filter.join(" "));
    }
    for line in summary {
        eprintln!("{line}");
    }
    Ok(())
}

/// Builds the test binaries of the wanted tiers.
fn build(workspace: &Workspace, wanted: &[Tier]) -> Result<Vec<Artifact>> {
    let is_all = wanted.contains(&Tier::Unit);
    let only =
        wanted.iter().filter(|_| !is_all).flat_map(|tier| ["--test".to_owned(), tier.to_string()]);
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

fn jobs_of(
    workspace: &Workspace,
    tier: Tier,
    binaries: &[Binary],
    prepared: &Prepared,
    options: &Options,
) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    for binary in binaries {
        jobs.extend(job::jobs(tier, binary, &options.filter)?.into_iter().map(|job| {
            let command = job.command.envs(prepared.environment(tier));
            Job { command, ..job }
        }));
    }
    if tier == Tier::Unit {
        let command = workspace
            .cargo()
            .args(["test", "--workspace", "--doc", "--quiet", "--"])
            .args(&options.filter);
        jobs.push(Job {
            tier: tier.name(),
            name: "documentation".to_owned(),
            command,
            share: Share::All,
        });
    }
    Ok(jobs)
}

/// The simulation, of fixed seeds.
fn simulated() -> Result<Job> {
    let xtask = env::current_exe().context("cannot tell where this program is")?;
    Ok(Job {
        tier: "simulation",
        name: "fixed seeds".to_owned(),
        command: Cmd::new(xtask).args(["test", "simulation"]),
        share: Share::One,
    })
}

/// Those of Kubernetes' own tests that tell most, with the agent that the other tests have.
fn brief(prepared: &Prepared) -> Result<Job> {
    let xtask = env::current_exe().context("cannot tell where this program is")?;
    let agent = prepared.sluice().into_iter().flat_map(|sluice| [Path::new("--agent"), sluice]);
    Ok(Job {
        tier: "e2e",
        name: "Kubernetes' own tests".to_owned(),
        command: Cmd::new(xtask).args(["test", "e2e", "--brief"]).args(agent),
        share: Share::One,
    })
}

/// Counts what a skipped tier would have run.
fn skip(binaries: &[Binary], options: &Options) -> Counts {
    let in_ci = env::var("CI").is_ok_and(|ci| !matches!(ci.as_str(), "" | "0" | "false"));
    Counts {
        skipped: binaries
            .iter()
            .map(|binary| binary.tests(&options.filter).map_or(0, |tests| tests.len() as u64))
            .sum(),
        // A machine that is there to run the tests and cannot is broken.
        failed: u64::from(in_ci && !options.allow_skip),
        ..Counts::default()
    }
}
