//! `cargo xtask test overlays`: deploys each overlay of Sluice on a new, real cluster
//! ([`crate::cluster`]).
//!
//! Except for `beside-kube-proxy`, Sluice is the first workload of a cluster without a Service
//! proxy, so each run also shows that it needs none. Then pods, processes of the nodes and the
//! outside client call Services of every kind.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use sluice_cluster::packages;
use sluice_cluster::process::Cmd;
use sluice_cluster::ui::Step;
use sluice_cluster::{Cni, Overlay, Proxy, UpOptions};

use crate::cluster;
use crate::toolchain::Choice;
use crate::workspace::Workspace;

use super::libtest::Counts;

const WORKLOAD: &str = include_str!("../../manifests/overlays.yaml");

/// The longest time that a change may take to have its effect.
const PATIENCE: Duration = Duration::from_secs(20);

/// The least capabilities, as the kernel's bits: BPF, PERFMON, NET_RAW, NET_ADMIN.
const LEAST: u64 = 1 << 39 | 1 << 38 | 1 << 13 | 1 << 12;

/// Options of `cargo xtask test overlays`.
#[derive(Args)]
pub(super) struct Options {
    /// Overlays to test [default: all].
    #[arg(value_enum)]
    overlays: Vec<Overlay>,
    /// Number of nodes of a cluster.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=20))]
    nodes: u8,
    /// A binary of Sluice to use instead of a release built from this tree.
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Keep the last cluster.
    #[arg(long)]
    keep: bool,
}

/// Brings up a cluster for each overlay and tests it.
pub(super) fn run(workspace: &Workspace, choice: Choice, options: &Options) -> Result<Counts> {
    ensure!(
        packages::is_root(),
        "a cluster needs root: run `sudo -E env PATH=\"$PATH\" cargo xtask test overlays`"
    );
    ensure!(
        !sluice_cluster::is_complete()?,
        "a cluster is up, and each overlay is to begin with none: take it down first, with `cargo xtask cluster down`"
    );
    let wanted =
        if options.overlays.is_empty() { &Overlay::ALL } else { options.overlays.as_slice() };
    let mut counts = Counts::default();
    for (index, overlay) in wanted.iter().enumerate() {
        println!("\n== overlays: {}", overlay.name());
        let up = UpOptions {
            nodes: options.nodes,
            proxy: Proxy::Sluice,
            cni: Cni::Ptp,
            overlay: *overlay,
            agent: options.agent.clone(),
        };
        match cluster::ensure_up(workspace, choice, &up) {
            Ok(()) => Trial { overlay: *overlay, nodes: options.nodes }.all(&mut counts),
            Err(error) => {
                println!("the cluster comes up ... FAILED: {error:#}");
                counts.failed += 1;
            }
        }
        if !(options.keep && index + 1 == wanted.len()) {
            sluice_cluster::down()?;
        }
    }
    Ok(counts)
}

/// An overlay on a cluster that is up.
struct Trial {
    overlay: Overlay,
    nodes: u8,
}

/// A place that calls come from.
#[derive(Clone, Copy, Debug)]
enum From {
    /// A pod on that node.
    Pod(u8),
    /// A process of that node.
    Host(u8),
    /// The client outside.
    Outside,
}

impl Trial {
    fn all(&self, counts: &mut Counts) {
        let workload = self.workload();
        let is_there = workload.is_ok();
        note(counts, "pods and Services are made", workload);
        if !is_there {
            return;
        }
        note(counts, "the init container has found that Sluice can run", preflight());
        note(
            counts,
            "the agent has the capabilities that it was given, and a root that it cannot write",
            self.capabilities(),
        );
        note(counts, "the settings of its own device are made", self.settings());
        note(
            counts,
            "a Service of both families answers pods, nodes and the outside client",
            self.reach("echo"),
        );
        note(counts, "the API server answers by its Service", self.api_server());
        note(counts, "a datagram in parts is answered", self.fragments());
        note(counts, "a health check port tells where endpoints are", self.health_checks());
        note(counts, "maps and sources agree, and monitoring answers", self.monitoring());
        if self.overlay == Overlay::BesideKubeProxy {
            note(counts, "Sluice serves what is labelled and kube-proxy the rest", self.shares());
        }
        note(
            counts,
            "an agent that comes again adopts what is there, and traffic goes on",
            self.restart(),
        );
    }

    fn workload(&self) -> Result<()> {
        let step = Step::start("pods");
        let directory =
            std::env::temp_dir().join(format!("sluice-overlays-{}", std::process::id()));
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let file = directory.join("workload.yaml");
        let label = if self.overlay == Overlay::BesideKubeProxy {
            "labels: {service.kubernetes.io/service-proxy-name: sluice}"
        } else {
            "labels: {}"
        };
        std::fs::write(&file, WORKLOAD.replace("${labels}", label))?;
        let applied = kubectl(&["apply", "--server-side", "-f", &file.display().to_string()]);
        drop(std::fs::remove_dir_all(&directory));
        let _output = applied?;
        for set in ["ds/echo", "ds/client", "ds/host-client"] {
            let _output = kubectl(&["rollout", "status", set, "--timeout=120s"])?;
        }
        step.done("ready");
        Ok(())
    }

    fn capabilities(&self) -> Result<()> {
        for node in 1..=self.nodes {
            let node = format!("n{node}");
            let pid = sluice_cluster::on_node(&node, &["pgrep", "--exact", "--oldest", "sluice"])?;
            let status =
                sluice_cluster::on_node(&node, &["cat", &format!("/proc/{}/status", pid.trim())])?;
            let field = |name: &str| {
                status
                    .lines()
                    .find_map(|line| line.strip_prefix(name))
                    .map(str::trim)
                    .context("no such field")
            };
            let bits = |name: &str| Ok::<_, anyhow::Error>(u64::from_str_radix(field(name)?, 16)?);
            let is_least = self.overlay == Overlay::LeastCapabilities;
            for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
                let held = bits(set)?;
                ensure!((held == LEAST) == is_least, "{node}: {set} {held:x}");
            }
            // Whether a set-user-id program could add privileges, and how system calls are filtered
            // (2: by a list).
            let expected = if is_least { ("1", "2") } else { ("0", "0") };
            let found = (field("NoNewPrivs:")?, field("Seccomp:")?);
            ensure!(found == expected, "{node}: NoNewPrivs and Seccomp are {found:?}");
            let root = sluice_cluster::on_node(
                &node,
                &["grep", " / / ", &format!("/proc/{}/mountinfo", pid.trim())],
            );
            let root = root.unwrap_or_default();
            ensure!(root.contains(" / / ro"), "{node}: the root is {root}");
        }
        Ok(())
    }

    fn settings(&self) -> Result<()> {
        for pod in pods("kube-system", "app.kubernetes.io/name=sluice")? {
            let log = kubectl(&["-n", "kube-system", "logs", &pod, "-c", "agent"])?;
            for lack in ["own device cannot be made", "fragments that arrive before"] {
                ensure!(!log.contains(lack), "{pod} says\n{log}");
            }
        }
        for node in 1..=self.nodes {
            let folder = "/proc/sys/net/ipv4/conf/sluice0";
            let files = ["accept_local", "rp_filter"].map(|name| format!("{folder}/{name}"));
            let found =
                sluice_cluster::on_node(&format!("n{node}"), &["cat", &files[0], &files[1]])?;
            ensure!(found.split_whitespace().eq(["1", "0"]), "n{node}: {found}");
        }
        Ok(())
    }

    /// Calls a Service of type NodePort from everywhere, until every pod behind it has answered.
    fn reach(&self, service: &str) -> Result<()> {
        let vips = field(service, "{.spec.clusterIPs[*]}")?;
        let vips: Vec<_> = vips.split_whitespace().map(str::to_owned).collect();
        ensure!(vips.len() == 2, "{service} has {vips:?}");
        let port = field(service, "{.spec.ports[0].nodePort}")?;
        let mut targets: Vec<(String, String)> =
            vips.iter().map(|vip| (vip.clone(), "80".to_owned())).collect();
        for node in 1..=self.nodes {
            let addresses = kubectl(&[
                "get",
                "node",
                &format!("n{node}"),
                "-o",
                "jsonpath={.status.addresses[?(@.type==\"InternalIP\")].address}",
            ])?;
            targets.extend(
                addresses.split_whitespace().map(|address| (address.to_owned(), port.clone())),
            );
        }
        for node in 1..=self.nodes {
            for from in [From::Pod(node), From::Host(node)] {
                for (address, port) in &targets {
                    self.every_pod_answers(from, address, port)?;
                }
                // nc connects its socket, which is translated packet by packet; before that,
                // kube-proxy's rules drop what a process of the node sends to a ClusterIP that is
                // not its own.
                let is_dropped = self.overlay == Overlay::BesideKubeProxy
                    && service == "echo"
                    && matches!(from, From::Host(_));
                for vip in vips.iter().filter(|_| !is_dropped) {
                    udp(from, vip, "81", "echo here")?;
                }
            }
        }
        for (address, port) in targets.iter().skip(vips.len()) {
            self.every_pod_answers(From::Outside, address, port)?;
        }
        Ok(())
    }

    fn every_pod_answers(&self, from: From, address: &str, port: &str) -> Result<()> {
        let url = format!("http://{}/hostname", authority(address, port));
        // One curl with many URLs uses one connection, so there are enough curls for each of a few
        // pods to be among the answers.
        let script = format!("for i in $(seq 24); do curl -gsS -m 5 {url} || exit 1; echo; done");
        let answers =
            from.run(&["sh", "-c", &script]).with_context(|| format!("{from:?} asks {url}"))?;
        let mut names: Vec<_> =
            answers.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        ensure!(names.len() == 24, "{from:?} got {answers:?} of {url}");
        names.sort_unstable();
        names.dedup();
        ensure!(
            names.len() == usize::from(self.nodes),
            "{from:?} got answers of {names:?} alone, of {url}"
        );
        Ok(())
    }

    fn api_server(&self) -> Result<()> {
        for node in 1..=self.nodes {
            for from in [From::Pod(node), From::Host(node)] {
                let answer =
                    from.run(&["curl", "-gsSk", "-m", "5", "https://10.96.0.1/version"])?;
                ensure!(answer.contains("gitVersion"), "{from:?} got {answer}");
            }
        }
        Ok(())
    }

    fn fragments(&self) -> Result<()> {
        let vips = field("echo", "{.spec.clusterIPs[*]}")?;
        // More than a device sends at once, and less than the server reads.
        let request = format!("echo {}", "a".repeat(1_900));
        for node in 1..=self.nodes {
            for vip in vips.split_whitespace() {
                udp(From::Pod(node), vip, "81", &request)?;
            }
        }
        Ok(())
    }

    fn health_checks(&self) -> Result<()> {
        let port = field("balanced", "{.spec.healthCheckNodePort}")?;
        for node in 1..=self.nodes {
            let url = format!("http://10.10.0.{}:{port}/", 10 + u16::from(node));
            let answer = patiently(|| From::Outside.run(&["curl", "-sS", "-m", "5", &url]))?;
            ensure!(
                answer.contains("\"localEndpoints\": 1") || answer.contains("\"localEndpoints\":1"),
                "{url}: {answer}"
            );
        }
        Ok(())
    }

    fn monitoring(&self) -> Result<()> {
        let ports = if self.overlay == Overlay::BesideKubeProxy {
            ["10356", "10349"]
        } else {
            ["10256", "10249"]
        };
        for pod in pods("kube-system", "app.kubernetes.io/name=sluice")? {
            // Both commands answer by their exit code. A change that is not complete yet counts as
            // a difference for a moment.
            for command in ["status", "diff"] {
                let line =
                    ["-n", "kube-system", "exec", &pod, "-c", "agent", "--", "sluice", command];
                let _answer = patiently(|| kubectl(&line))?;
            }
        }
        for node in 1..=self.nodes {
            let node = From::Host(node);
            let live = node.run(&[
                "curl",
                "-fsS",
                "-m",
                "5",
                &format!("http://127.0.0.1:{}/livez", ports[0]),
            ]);
            let _answer = live.with_context(|| format!("{node:?}"))?;
            let metrics = node.run(&[
                "curl",
                "-fsS",
                "-m",
                "5",
                &format!("http://127.0.0.1:{}/metrics", ports[1]),
            ])?;
            ensure!(metrics.lines().any(|line| line == "sluice_ready{} 1"), "{node:?}: {metrics}");
            if self.overlay == Overlay::DualStack {
                let _answer =
                    node.run(&["curl", "-gfsS", "-m", "5", "http://[::1]:10249/metrics"])?;
            }
        }
        Ok(())
    }

    fn shares(&self) -> Result<()> {
        let (own, other) =
            (field("echo", "{.spec.clusterIP}")?, field("other", "{.spec.clusterIP}")?);
        self.reach("other")?;
        for pod in pods("kube-system", "app.kubernetes.io/name=sluice")? {
            let services = kubectl(&[
                "-n",
                "kube-system",
                "exec",
                &pod,
                "-c",
                "agent",
                "--",
                "sluice",
                "services",
            ])?;
            ensure!(
                services.contains(&own) && !services.contains(&other),
                "{pod} serves\n{services}"
            );
        }
        for node in 1..=self.nodes {
            let rules = sluice_cluster::on_node(
                &format!("n{node}"),
                &["nft", "list", "table", "ip", "kube-proxy"],
            )?;
            ensure!(
                rules.contains(&other) && !rules.contains(&own),
                "n{node}: kube-proxy serves\n{rules}"
            );
        }
        Ok(())
    }

    fn restart(&self) -> Result<()> {
        let agents = || pods("kube-system", "app.kubernetes.io/name=sluice");
        let before = agents()?;
        let _output = kubectl(&["-n", "kube-system", "rollout", "restart", "ds/sluice"])?;
        let vip = field("echo", "{.spec.clusterIP}")?;
        let url = format!("http://{vip}/hostname");
        let deadline = Instant::now() + Duration::from_mins(2);
        loop {
            for node in 1..=self.nodes {
                let _answer = From::Pod(node).run(&["curl", "-sS", "-m", "5", &url])?;
            }
            let done = ["-n", "kube-system", "rollout", "status", "ds/sluice", "--timeout=1s"];
            if kubectl(&done).is_ok() {
                break;
            }
            ensure!(Instant::now() < deadline, "the new agents are not ready after two minutes");
        }
        let after = agents()?;
        ensure!(
            after.iter().all(|pod| !before.contains(pod)),
            "{before:?} are there still: {after:?}"
        );
        for pod in after {
            let log = kubectl(&["-n", "kube-system", "logs", &pod, "-c", "agent"])?;
            ensure!(log.contains("adopted=true"), "{pod} has not adopted what it found:\n{log}");
        }
        self.reach("echo")
    }
}

/// Returns the output of the init containers.
fn preflight() -> Result<()> {
    for pod in pods("kube-system", "app.kubernetes.io/name=sluice")? {
        let log = kubectl(&["-n", "kube-system", "logs", &pod, "-c", "preflight"])?;
        ensure!(log.trim_end().ends_with("Sluice can run on this node."), "{pod} says\n{log}");
        ensure!(
            log.lines()
                .any(|line| line.starts_with("program tc_ingress_l2 ") && line.contains("loads")),
            "{pod} has tried no programs:\n{log}"
        );
    }
    Ok(())
}

impl From {
    fn run(self, line: &[&str]) -> Result<String> {
        match self {
            Self::Outside => sluice_cluster::outside(|| {
                Cmd::new(line.first().context("no program")?)
                    .args(line.get(1..).unwrap_or_default())
                    .answer()
            }),
            Self::Pod(node) => exec("client", node, line),
            Self::Host(node) => exec("host-client", node, line),
        }
    }
}

fn exec(app: &str, node: u8, line: &[&str]) -> Result<String> {
    let name = kubectl(&[
        "get",
        "pods",
        "-l",
        &format!("app={app}"),
        "--field-selector",
        &format!("spec.nodeName=n{node}"),
        "-o",
        "name",
    ])?;
    kubectl(&[&["exec", name.trim(), "--"], line].concat())
}

/// Sends one datagram and waits for the answer.
fn udp(from: From, address: &str, port: &str, request: &str) -> Result<()> {
    let wanted = request.strip_prefix("echo ").unwrap_or(request);
    let script = format!("printf %s '{request}' | nc -u -w 2 {address} {port}");
    let answer = from
        .run(&["sh", "-c", &script])
        .with_context(|| format!("{from:?} asks {address}:{port} by UDP"))?;
    if answer.trim() != wanted {
        bail!(
            "{from:?} asked {address}:{port} by UDP and got {} bytes: {:.60}",
            answer.len(),
            answer
        );
    }
    Ok(())
}

fn authority(address: &str, port: &str) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

fn field(service: &str, path: &str) -> Result<String> {
    kubectl(&["get", "service", service, "-o", &format!("jsonpath={path}")])
}

fn pods(namespace: &str, label: &str) -> Result<Vec<String>> {
    let names = kubectl(&["-n", namespace, "get", "pods", "-l", label, "-o", "name"])?;
    let names: Vec<_> = names.split_whitespace().map(str::to_owned).collect();
    ensure!(!names.is_empty(), "no pods with {label}");
    Ok(names)
}

/// Runs kubectl in the namespace of the outside client.
fn kubectl(args: &[&str]) -> Result<String> {
    let (program, kubeconfig): (PathBuf, PathBuf) =
        (sluice_cluster::kubectl(), sluice_cluster::kubeconfig());
    sluice_cluster::outside(move || {
        Cmd::new(program).arg("--kubeconfig").arg(kubeconfig).args(args).answer()
    })
}

/// Repeats a question for some time until it has an answer.
fn patiently(mut ask: impl FnMut() -> Result<String>) -> Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(500)),
            result => return result,
        }
    }
}

fn note(counts: &mut Counts, what: &str, result: Result<()>) {
    match result {
        Ok(()) => {
            println!("{what} ... ok");
            counts.passed += 1;
        }
        Err(error) => {
            println!("{what} ... FAILED: {error:#}");
            counts.failed += 1;
        }
    }
}
