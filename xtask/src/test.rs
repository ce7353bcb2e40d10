//! `cargo xtask test`: four tiers, the simulation and a selection of Kubernetes' own tests, summed
//! up in one line.
//!
//! | tier   | what                                                  | needs    |
//! |--------|-------------------------------------------------------|----------|
//! | unit   | all unit, integration and doc tests not named below   | nothing  |
//! | kernel | `agent/tests/kernel`, programs by BPF_PROG_TEST_RUN   | root     |
//! | lab    | `agent/tests/lab`, traffic through network namespaces | root     |
//! | api    | `agent/tests/api`, a real API server                  | root, Go |
//!
//! One `cargo test --no-run` builds the test binaries. They are split into jobs ([`job`]), and the
//! jobs of all tiers run in parallel ([`pool`]), because kernel tests keep a processor busy while
//! lab tests mostly wait.
//!
//! stdout gets one line per job, preceded by the output of its tests if one failed, and ends with
//! the line `N passed, N failed` (and `, N skipped` if any were).
//!
//! A tier that this machine cannot run is not started. Under plain `cargo test` its tests fail
//! instead, unless `SLUICE_TEST_SKIP=1` is set.
//!
//! Kubernetes' own tests ([`e2e`]) are not a tier, since none of their binaries is built here. A
//! selection runs whenever all tiers do; the whole suite takes long and runs only by name, as do
//! the tests of `deploy/` on a cluster ([`overlays`]). The [`simulation`] is a program of its own,
//! and one more job when all tiers run.

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

    /// Tiers to run [default: all].
    #[arg(value_enum)]
    tiers: Vec<Tier>,

    /// Accept skipped tiers even if CI=true makes them failures.
    #[arg(long)]
    allow_skip: bool,

    /// Number of lab tests that run in parallel [default: three per processor].
    #[arg(long, value_name = "N")]
    jobs: Option<NonZero<usize>>,

    /// Time after which the process group of a test is killed.
    #[arg(long, default_value_t = 20, value_name = "MINUTES")]
    test_timeout: u64,

    /// Arguments for every test binary: a filter, `--nocapture` and so on.
    #[arg(last = true)]
    filter: Vec<String>,
}

/// Test suites that are not tiers.
#[derive(Subcommand)]
enum Suite {
    /// Run Kubernetes' own tests against Sluice on a real cluster, and compare the results with
    /// kube-proxy's.
    E2e(e2e::Options),
    /// Bring up a cluster for each overlay of `deploy/`, and call Services of every kind from
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
            room: 2 * self.jobs.map_or(3 * processors, NonZero::get),
            allowed: Duration::from_mins(self.test_timeout),
            verbose: self.filter.iter().any(|argument| job::shows_output(argument)),
        }
    }
}

/// Runs the tiers and prints the sum. An error on the way counts as a failure, so that the last
/// line is always printed.
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
    let mut sums = Sums::new();
    let mut jobs = collect_jobs(workspace, &wanted, &artifacts, &prepared, options, &mut sums)?;
    // Without times of an earlier run, start with the last tiers, whose jobs take longest.
    jobs.reverse();
    for (tier, sum) in pool::run(jobs, &options.settings())? {
        let all = sums.entry(tier).or_default();
        all.counts.add(sum.counts);
        all.took += sum.took;
        all.busy += sum.busy;
    }
    for sum in sums.values() {
        total.add(sum.counts);
    }
    if total.all() == 0 {
        bail!("no test of these tiers matches: {}", options.filter.join(" "));
    }
    for (tier, sum) in sums {
        let (took, busy) = (seconds(sum.took), seconds(sum.busy));
        eprintln!("{tier}: {} ({took} of tests, {busy} of a processor)", sum.counts);
    }
    Ok(())
}

/// The results by the tier's name.
type Sums = BTreeMap<&'static str, Sum>;

/// Returns the jobs of the wanted tiers. What is known before any job has run, the budgets and the
/// tiers that have to be skipped, is added to the results.
fn collect_jobs(
    workspace: &Workspace,
    wanted: &[Tier],
    artifacts: &[Artifact],
    prepared: &Prepared,
    options: &Options,
    sums: &mut Sums,
) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    for tier in wanted.iter().copied() {
        let binaries: Vec<_> = artifacts
            .iter()
            .filter(|artifact| artifact.is_test_binary() && Tier::of(artifact) == tier)
            .map(Binary::new)
            .collect::<Result<_>>()?;
        match prepared.readiness(tier) {
            Readiness::Ready => {
                let started = Instant::now();
                let counts = check_budget(workspace, tier, prepared);
                let _new = sums
                    .insert(tier.name(), Sum { counts, took: started.elapsed(), ..Sum::default() });
                jobs.extend(jobs_of(workspace, tier, &binaries, prepared, options)?);
            }
            Readiness::Skip(reason) => {
                eprintln!("{tier}: skipped: {reason}");
                let counts = count_skipped(&binaries, options);
                let _new = sums.insert(tier.name(), Sum { counts, ..Sum::default() });
            }
        }
    }
    if options.tiers.is_empty() && options.filter.is_empty() {
        jobs.push(simulation_job()?);
        match prepare::e2e() {
            Readiness::Ready => jobs.push(brief_e2e_job(prepared)?),
            Readiness::Skip(reason) => {
                eprintln!("e2e: skipped: {reason}");
                let counts = count_skipped(&[], options);
                let _new = sums.insert("e2e", Sum { counts, ..Sum::default() });
            }
        }
    }
    Ok(jobs)
}

/// Builds the test binaries of the wanted tiers.
fn build(workspace: &Workspace, wanted: &[Tier]) -> Result<Vec<Artifact>> {
    let is_all = wanted.contains(&Tier::Unit);
    let only =
        wanted.iter().filter(|_| !is_all).flat_map(|tier| ["--test".to_owned(), tier.to_string()]);
    // Always the whole workspace: for fewer packages cargo would choose other features of their
    // dependencies and build those again.
    let cargo = workspace.cargo().args(["test", "--no-run", "--workspace"]).args(only);
    artifacts::build(cargo).context("cannot build the tests")
}

/// Compares the eBPF programs with their budget, as the first test of the kernel tier.
fn check_budget(workspace: &Workspace, tier: Tier, prepared: &Prepared) -> Counts {
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

/// Returns the job that simulates fixed seeds.
fn simulation_job() -> Result<Job> {
    let xtask = env::current_exe().context("cannot find this program's own file")?;
    Ok(Job {
        tier: "simulation",
        name: "fixed seeds".to_owned(),
        command: Cmd::new(xtask).args(["test", "simulation"]),
        share: Share::One,
    })
}

/// Returns the job that runs the most telling of Kubernetes' own tests, with the agent that the
/// other tests use.
fn brief_e2e_job(prepared: &Prepared) -> Result<Job> {
    let xtask = env::current_exe().context("cannot find this program's own file")?;
    let agent = prepared.sluice().into_iter().flat_map(|sluice| [Path::new("--agent"), sluice]);
    Ok(Job {
        tier: "e2e",
        name: "Kubernetes' own tests".to_owned(),
        command: Cmd::new(xtask).args(["test", "e2e", "--brief"]).args(agent),
        share: Share::One,
    })
}

/// Counts the tests of a skipped tier.
fn count_skipped(binaries: &[Binary], options: &Options) -> Counts {
    let in_ci = env::var("CI").is_ok_and(|ci| !matches!(ci.as_str(), "" | "0" | "false"));
    Counts {
        skipped: binaries
            .iter()
            .map(|binary| binary.tests(&options.filter).map_or(0, |tests| tests.len() as u64))
            .sum(),
        // A CI machine that cannot run a tier is broken.
        failed: u64::from(in_ci && !options.allow_skip),
        ..Counts::default()
    }
}
