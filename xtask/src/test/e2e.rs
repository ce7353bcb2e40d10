//! `cargo xtask test e2e`: Kubernetes' own tests of Services and DNS on a real cluster
//! ([`crate::cluster`]), with the result of the real kube-proxy on the same cluster next to each.
//!
//! `xtask/e2e/kube-proxy.txt` has kube-proxy's results, one spec per line;
//! `--proxy kube-proxy --record` writes it.

mod report;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use sluice_cluster::cache::Cache;
use sluice_cluster::components;
use sluice_cluster::packages;
use sluice_cluster::process::Cmd;
use sluice_cluster::ui::Step;
use sluice_cluster::{Cni, Overlay, Proxy, UpOptions};

use crate::cluster;
use crate::toolchain::Choice;
use crate::workspace::Workspace;

use self::report::{Outcome, Results};
use super::libtest::Counts;

/// The specs about Services, DNS and the network between pods.
const FOCUS: &str = r"\[sig-network\]";

/// The specs that no Service proxy could pass here, for the reasons in `docs/e2e.md`.
const SKIP: &str = r"\[Alpha\]|\[Feature:(Networking-|SCTPConnectivity|Ingress\]|KubeProxy|PerformanceDNS|OffByDefault)|NetworkPolicy|Netpol|Loadbalancing|Forward PTR lookup";

/// The most telling specs for their time, each by a part of its name.
const BRIEF: &[&str] = &[
    "should serve multiport endpoints from pods",
    "should be rejected when no endpoints exist",
    "should allow pods to hairpin back to themselves",
    "should preserve source pod IP for traffic thru service cluster IP",
    "should be able to create a functioning NodePort service",
    "should be able to switch session affinity for NodePort service",
    "should be able to switch session affinity for service with type clusterIP",
    "should be possible to connect to a service via ExternalIP",
    "should support externalTrafficPolicy=Local for type=NodePort",
    "should respect internalTrafficPolicy=Local Pod to Pod",
    "should fallback to local terminating endpoints when there are no ready endpoints with externalTrafficPolicy=Local",
    "should fail health check node port if there are only terminating endpoints",
    "LoadBalancers ExternalTrafficPolicy: Local .* should work (for type=LoadBalancer|from pods)",
    "should be able to switch session affinity for LoadBalancer service with Cluster",
    "should support a Service with multiple (endpoint IPs|ports) specified in multiple EndpointSlices",
    "should be able to preserve UDP traffic when server pod cycles for a (ClusterIP|NodePort) service$",
    "should be able to preserve UDP traffic when initial unready endpoints get ready",
    "IPv6DualStack.* should be able to handle large requests: udp",
    "IPv6DualStack.* should function for client IP based session affinity: http",
    "should route traffic to an endpoint in the same zone when using PreferSameZone",
    "should provide DNS for services",
    "should check kube-proxy urls",
    "should work after restarting kube-proxy",
];

/// Options of `cargo xtask test e2e`.
#[derive(Args)]
pub(super) struct Options {
    /// Specs to run, as a regular expression over their full names.
    #[arg(long, default_value = FOCUS)]
    focus: String,
    /// Specs to leave out, as a regular expression.
    #[arg(long, default_value = SKIP)]
    skip: String,
    /// The proxy that serves the Services.
    #[arg(long, value_enum, default_value_t)]
    proxy: Proxy,
    /// The way pods are connected to their node.
    #[arg(long, value_enum, default_value_t)]
    cni: Cni,
    /// A binary of Sluice to use instead of a release built from this tree.
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Number of nodes [default: 6, since some specs need two in each of three zones, or 3 with
    /// --brief].
    #[arg(long, value_parser = clap::value_parser!(u8).range(2..=20))]
    nodes: Option<u8>,
    /// Number of specs that run in parallel; disruptive ones run alone, after all others.
    #[arg(long, default_value_t = 5)]
    procs: u8,
    /// Run only the specs that `cargo xtask test` runs.
    #[arg(long, conflicts_with_all = ["focus", "skip", "record"])]
    brief: bool,
    /// Keep the cluster afterwards.
    #[arg(long)]
    keep: bool,
    /// Record the results as those to compare with.
    #[arg(long)]
    record: bool,
}

impl Options {
    fn focus(&self) -> String {
        if self.brief {
            format!(r"\[sig-network\].*({})", BRIEF.join("|"))
        } else {
            self.focus.clone()
        }
    }

    /// Returns the time after which a run that hangs is ended.
    fn timeout(&self) -> &'static str {
        if self.brief { "--timeout=10m" } else { "--timeout=3h" }
    }

    fn nodes(&self) -> u8 {
        self.nodes.unwrap_or(if self.brief { 3 } else { 6 })
    }
}

/// Runs the specs and prints those that did not pass, or whose outcome differs from kube-proxy's.
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
        nodes: options.nodes(),
        proxy: options.proxy,
        cni: options.cni,
        overlay: Overlay::default(),
        agent: options.agent.clone(),
    };
    let was_up = sluice_cluster::is_complete()?;
    cluster::ensure_up(workspace, choice, &up)?;
    let results = specs(workspace, &programs, options);
    if !was_up && !options.keep {
        sluice_cluster::down()?;
    }
    let results = results?;
    ensure!(
        !results.is_empty(),
        "no spec ran to its end: see {}, or whether --focus and --skip leave any",
        directory(workspace).display()
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

/// The specs of one call of ginkgo.
enum Pass {
    Together,
    Alone,
}

impl Pass {
    /// Returns the name of its log and its report.
    fn name(&self) -> &'static str {
        match self {
            Self::Together => "together",
            Self::Alone => "alone",
        }
    }

    /// Returns the filter for the labels of specs.
    fn filter(&self) -> &'static str {
        match self {
            Self::Together => "!Disruptive",
            Self::Alone => "Disruptive",
        }
    }

    fn procs(&self, options: &Options) -> u8 {
        match self {
            Self::Together => options.procs,
            Self::Alone => 1,
        }
    }
}

fn specs(workspace: &Workspace, programs: &Path, options: &Options) -> Result<Results> {
    let mut results = Results::default();
    for pass in [Pass::Together, Pass::Alone] {
        results.update(&run_pass(workspace, programs, options, &pass)?);
    }
    Ok(results)
}

fn run_pass(
    workspace: &Workspace,
    programs: &Path,
    options: &Options,
    pass: &Pass,
) -> Result<Results> {
    let directory = directory(workspace);
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let log = directory.join(format!("{}.log", pass.name()));
    let report = format!("{}.json", pass.name());
    let json = directory.join(&report);
    drop(fs::remove_file(&json));
    let output = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
    let procs = pass.procs(options);
    let command = Cmd::new(programs.join("ginkgo"))
        .args(["run", "-v", "--no-color", "--keep-going", options.timeout()])
        .args([&format!("--procs={procs}"), &format!("--output-dir={}", directory.display())])
        .args([&format!("--json-report={report}"), &format!("--label-filter={}", pass.filter())])
        .args([&format!("--focus={}", options.focus()), &format!("--skip={}", options.skip)])
        .arg(programs.join("e2e.test"))
        .args([
            "--",
            "--provider=skeleton",
            "--dns-domain=cluster.local",
            "--allowed-not-ready-nodes=0",
        ])
        .args(["--disable-log-dump=true", "--dump-logs-on-failure=false"])
        .arg(format!("--num-nodes={}", options.nodes()))
        .arg(format!("--kubeconfig={}", sluice_cluster::kubeconfig().display()))
        .arg(format!("--kubectl-path={}", sluice_cluster::kubectl().display()));
    sluice_cluster::outside(|| {
        let step = Step::start_long(format!("Kubernetes' tests, {procs} at once"));
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
        // Its exit status only says that specs failed, as the report does.
        step.done(format!("{} done", done(&log)));
        Ok(())
    })?;
    Results::of_ginkgo(&json)
        .with_context(|| format!("ginkgo wrote no report; its output is in {}", log.display()))
}

/// Returns the directory of ginkgo's logs and reports.
fn directory(workspace: &Workspace) -> PathBuf {
    workspace.root().join("target/e2e")
}

/// Returns the number of specs that have ended: for each, one line begins with a bullet.
fn done(log: &Path) -> usize {
    File::open(log).map_or(0, |file| {
        BufReader::new(file)
            .lines()
            .map_while(Result::ok)
            .filter(|line| line.starts_with("\u{2022} "))
            .count()
    })
}
