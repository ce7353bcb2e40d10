//! `cargo xtask test e2e`: Kubernetes' own tests of Services and DNS against a real cluster ([`crate::cluster`]), and beside each
//! result what the real kube-proxy got on the same cluster.
//!
//! `xtask/e2e/kube-proxy.txt` holds kube-proxy's results, one spec a line; `--proxy kube-proxy --record` makes it.

mod report;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::cache::Cache;
use crate::cluster::{self, Cni, Overlay, Proxy, UpOptions};
use crate::components;
use crate::packages;
use crate::process::Cmd;
use crate::toolchain::Choice;
use crate::ui::Step;
use crate::workspace::Workspace;

use self::report::{Outcome, Results};
use super::libtest::Counts;

/// What a cluster of this kind cannot do, whatever its Service proxy: no cloud, no Internet, alpha features off; and what breaks nodes.
const SKIP: &str = r"\[Disruptive\]|\[Alpha\]|\[Feature:|NetworkPolicy|Netpol|Loadbalancing|Forward PTR lookup|Service endpoints latency";

/// Options of `cargo xtask test e2e`.
#[derive(Args)]
pub(super) struct Options {
    /// Which specs, by a regular expression over their full names.
    #[arg(long, default_value = r"\[sig-network\].*\[Conformance\]")]
    focus: String,
    /// Which of those not.
    #[arg(long, default_value = SKIP)]
    skip: String,
    /// What serves the Services.
    #[arg(long, value_enum, default_value_t)]
    proxy: Proxy,
    /// How pods are connected to their node.
    #[arg(long, value_enum, default_value_t)]
    cni: Cni,
    /// How many nodes the cluster has.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=20))]
    nodes: u8,
    /// How many specs run at once.
    #[arg(long, default_value_t = 4)]
    procs: u8,
    /// Leave the cluster up afterwards.
    #[arg(long)]
    keep: bool,
    /// Keep the results as those to compare with.
    #[arg(long)]
    record: bool,
}

/// Runs the specs and prints those that did not pass, or did not end as with kube-proxy.
pub(super) fn run(workspace: &Workspace, choice: Choice, options: &Options) -> Result<Counts> {
    ensure!(
        !options.record || options.proxy == Proxy::KubeProxy,
        "--record keeps what the real kube-proxy gets: it goes with --proxy kube-proxy alone"
    );
    ensure!(options.proxy != Proxy::None, "--proxy none serves no Service that a spec could ask");
    ensure!(
        packages::is_root(),
        "a cluster needs root: run `sudo -E env PATH=\"$PATH\" cargo xtask test e2e`"
    );
    let programs = components::e2e(&Cache::open()?)?;
    let up = UpOptions {
        nodes: options.nodes,
        proxy: options.proxy,
        cni: options.cni,
        overlay: Overlay::default(),
    };
    let was_up = cluster::is_complete()?;
    cluster::ensure_up(workspace, choice, &up)?;
    let results = specs(workspace, &programs, options);
    if !was_up && !options.keep {
        cluster::down()?;
    }
    let results = results?;
    ensure!(
        !results.is_empty(),
        "no spec ran to its end: see {}, or whether --focus and --skip leave any",
        log(workspace).display()
    );
    let list = workspace.root().join("xtask/e2e/kube-proxy.txt");
    let mut known = Results::read(&list)?;
    if options.record {
        known.update(&results);
        known.write(&list)?;
    }
    print!("{}", results.beside(&known));
    Ok(Counts {
        passed: results.count(Outcome::Passed),
        failed: results.count(Outcome::Failed),
        skipped: results.count(Outcome::Skipped),
    })
}

fn specs(workspace: &Workspace, programs: &Path, options: &Options) -> Result<Results> {
    let directory = workspace.root().join("target/e2e");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let (log, json) = (log(workspace), directory.join("report.json"));
    drop(fs::remove_file(&json));
    let output = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
    let command = Cmd::new(programs.join("ginkgo"))
        .args(["run", "-v", "--no-color", "--timeout=3h", "--json-report=report.json", "--keep-going"])
        .args([&format!("--procs={}", options.procs), &format!("--output-dir={}", directory.display())])
        .args([&format!("--focus={}", options.focus), &format!("--skip={}", options.skip)])
        .arg(programs.join("e2e.test"))
        .args(["--", "--provider=skeleton", "--dns-domain=cluster.local", "--allowed-not-ready-nodes=0"])
        .args(["--disable-log-dump=true", "--dump-logs-on-failure=false"])
        .arg(format!("--num-nodes={}", options.nodes))
        .arg(format!("--kubeconfig={}", cluster::kubeconfig().display()))
        .arg(format!("--kubectl-path={}", cluster::kubectl().display()));
    cluster::outside(|| {
        let step = Step::start_long(format!("Kubernetes' tests, {} at once", options.procs));
        let mut child = command
            .into_inner()
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("cannot copy a descriptor")?)
            .stderr(output)
            .spawn()
            .context("cannot start ginkgo")?;
        while child.try_wait().context("cannot wait for ginkgo")?.is_none() {
            step.note(&format!("{} done", done(&log)));
            sleep(Duration::from_secs(1));
        }
        // Its exit status tells of failed specs, as the report does.
        step.done(format!("{} done", done(&log)));
        Ok(())
    })?;
    Results::of_ginkgo(&json)
        .with_context(|| format!("ginkgo left no report; what it said is in {}", log.display()))
}

/// What ginkgo says goes there.
fn log(workspace: &Workspace) -> PathBuf {
    workspace.root().join("target/e2e/log.txt")
}

/// How many specs have ended: one line each begins with a bullet.
fn done(log: &Path) -> usize {
    File::open(log).map_or(0, |file| {
        BufReader::new(file)
            .lines()
            .map_while(Result::ok)
            .filter(|line| line.starts_with("\u{2022} "))
            .count()
    })
}
