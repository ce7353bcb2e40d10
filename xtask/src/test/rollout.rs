//! `cargo xtask test rollout`: a rolling update of Sluice's DaemonSet on a real cluster
//! ([`crate::cluster`]) under load: pods of every node and an outside client hold connections to a
//! Service, and open new ones all the time.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};
use sluice_cluster::packages;
use sluice_cluster::process::Cmd;
use sluice_cluster::ui::Step;
use sluice_cluster::{Cni, Overlay, Proxy, UpOptions};

use crate::artifacts;
use crate::cluster;
use crate::toolchain::Choice;
use crate::workspace::Workspace;

use super::libtest::Counts;

const NAMESPACE: &str = "rollout";
const PORT: u16 = 7000;
/// The path of the load's program in pods.
const PROGRAM: &str = "/load/sluice-lab-server";
/// The longest time that connections may take to open, and answers to arrive.
const PATIENCE: Duration = Duration::from_mins(2);

/// Options of `cargo xtask test rollout`.
#[derive(Args)]
pub(super) struct Options {
    /// Number of connections that stay open.
    #[arg(long, default_value_t = 2000)]
    held: u32,
    /// New connections per second.
    #[arg(long, default_value_t = 500)]
    rate: u32,
    /// The way pods are connected to their node.
    #[arg(long, value_enum, default_value_t)]
    cni: Cni,
    /// Number of nodes of the cluster.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=20))]
    nodes: u8,
    /// Keep the cluster afterwards.
    #[arg(long)]
    keep: bool,
}

/// Updates the DaemonSet, and prints the results of the load.
pub(super) fn run(workspace: &Workspace, choice: Choice, options: &Options) -> Result<Counts> {
    ensure!(
        packages::is_root(),
        "a cluster needs root: run `sudo -E env PATH=\"$PATH\" cargo xtask test rollout`"
    );
    let program = artifacts::build_binary(workspace.cargo().args([
        "build",
        "--package",
        "sluice-lab",
        "--bin",
        "sluice-lab-server",
    ]))
    .context("cannot build the load's program")?;
    let directory = workspace.root().join("target/rollout");
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let was_up = sluice_cluster::is_complete()?;
    cluster::ensure_up(
        workspace,
        choice,
        &UpOptions {
            nodes: options.nodes,
            proxy: Proxy::Sluice,
            cni: options.cni,
            overlay: Overlay::default(),
            agent: None,
        },
    )?;
    let in_nodes = sluice_cluster::give_nodes(&program)?;
    let result = Rollout { program, in_nodes, directory, share: Share::of(options) }.run();
    let _ = kubectl(&["delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=false"]);
    if !was_up && !options.keep {
        sluice_cluster::down()?;
    }
    result.map(|()| Counts { passed: 1, ..Counts::default() })
}

/// The share of the load of each place: the pod of every node, and the outside client.
#[derive(Clone, Copy)]
struct Share {
    places: u32,
    held: u32,
    rate: u32,
}

impl Share {
    fn of(options: &Options) -> Self {
        let places = u32::from(options.nodes) + 1;
        Self { places, held: options.held.div_ceil(places), rate: options.rate.div_ceil(places) }
    }
}

struct Rollout {
    program: PathBuf,
    /// Its path on nodes.
    in_nodes: PathBuf,
    directory: PathBuf,
    share: Share,
}

/// An outside client that ends when this is dropped.
struct Outside {
    child: Child,
    log: PathBuf,
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Rollout {
    fn run(&self) -> Result<()> {
        let step = Step::start("servers and clients");
        let _ = kubectl(&["create", "namespace", NAMESPACE])?;
        self.apply(
            "echo",
            &json!({"apiVersion": "v1", "kind": "List", "items": [service(), self.servers()]}),
        )?;
        let _ = kubectl(&["-n", NAMESPACE, "rollout", "status", "ds/echo", "--timeout=2m"])?;
        let service = get(&["-n", NAMESPACE, "service", "echo"])?;
        let inside: Vec<String> = strings(&service["spec"]["clusterIPs"])
            .iter()
            .map(|ip| format!("--to={}", at(ip, u64::from(PORT))))
            .collect();
        self.apply("load", &self.daemon_set("load", &self.client(&inside)))?;
        let node_port = service["spec"]["ports"][0]["nodePort"].as_u64().context("no node port")?;
        let outside = self.outside(node_port)?;
        let all = u64::from(self.share.held * self.share.places);
        let before = until(|| sum(&outside), |sum| sum.held == all && sum.answered > all)?;
        step.done(format!(
            "{} connections are open, {} were opened for one request",
            before.held, before.opened
        ));

        let step = Step::start("rolling update of ds/sluice");
        let begun = Instant::now();
        let _ = kubectl(&["-n", "kube-system", "rollout", "restart", "ds/sluice"])?;
        let _ = kubectl(&["-n", "kube-system", "rollout", "status", "ds/sluice", "--timeout=10m"])?;
        let took = begun.elapsed();
        let at_end = sum(&outside)?;
        let after = until(
            || sum(&outside),
            |sum| sum.opened >= at_end.tried && sum.answered > at_end.answered + all,
        )?;
        step.done(format!(
            "{took:.1?}, {} new connections meanwhile",
            at_end.opened - before.opened
        ));
        println!("{after:#?}");
        ensure!(after.failed == 0 && after.held == all, "the update did harm: {after:?}");
        Ok(())
    }

    fn servers(&self) -> Value {
        let listen = format!("--listen=[::]:{PORT}");
        self.daemon_set("echo", &["tcp-echo".to_owned(), listen, "--name=$(NODE)".to_owned()])
    }

    fn client(&self, to: &[String]) -> Vec<String> {
        let Share { held, rate, .. } = self.share;
        let mut args = vec![
            "load-client".to_owned(),
            format!("--hold={held}"),
            format!("--rate={rate}"),
            "--report-ms=500".to_owned(),
        ];
        args.extend(to.iter().cloned());
        args
    }

    /// Returns the DaemonSet that runs the load's program on every node.
    fn daemon_set(&self, name: &str, args: &[String]) -> Value {
        json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "selector": {"matchLabels": {"app": name}},
                "template": {
                    "metadata": {"labels": {"app": name}},
                    "spec": {
                        "terminationGracePeriodSeconds": 1,
                        "containers": [{
                            "name": name, "image": "debian:local", "imagePullPolicy": "IfNotPresent",
                            "command": [PROGRAM], "args": args,
                            "env": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
                            "volumeMounts": [{"name": "load", "mountPath": PROGRAM, "readOnly": true}],
                        }],
                        "volumes": [{"name": "load", "hostPath": {"path": self.in_nodes, "type": "File"}}],
                    },
                },
            },
        })
    }

    fn apply(&self, name: &str, objects: &Value) -> Result<()> {
        let path = self.directory.join(format!("{name}.json"));
        fs::write(&path, objects.to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
        kubectl(&["apply", "-f", &path.display().to_string()]).map(drop)
    }

    /// Starts a client that calls the node port of every node.
    fn outside(&self, node_port: u64) -> Result<Outside> {
        let nodes = get(&["nodes"])?;
        let addresses = nodes["items"].as_array().into_iter().flatten().flat_map(|node| {
            let all = node["status"]["addresses"].as_array().cloned().unwrap_or_default();
            all.into_iter().filter(|address| address["type"] == "InternalIP")
        });
        let to: Vec<String> = addresses
            .filter_map(|address| {
                Some(format!("--to={}", at(address["address"].as_str()?, node_port)))
            })
            .collect();
        ensure!(!to.is_empty(), "no node has an address");
        let log = self.directory.join("outside.log");
        let output =
            File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let command = Cmd::new(&self.program).args(self.client(&to));
        let child = sluice_cluster::outside(|| {
            let errors = output.try_clone().context("cannot copy a descriptor")?;
            command
                .into_inner()
                .stdin(Stdio::null())
                .stdout(output)
                .stderr(errors)
                .spawn()
                .context("cannot start the client outside")
        })?;
        Ok(Outside { child, log })
    }
}

/// Returns the results of the load at all places so far. A failure anywhere ends the run.
fn sum(outside: &Outside) -> Result<Sum> {
    let pods = get(&["-n", NAMESPACE, "pods", "-l", "app=load"])?;
    let mut all = Sum::default();
    let names: Vec<&str> = pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|pod| pod["metadata"]["name"].as_str())
        .collect();
    for name in names {
        all.add(&kubectl(&["-n", NAMESPACE, "logs", name, "--tail=2"]).unwrap_or_default())?;
    }
    all.add(&fs::read_to_string(&outside.log).context("no word from outside")?)?;
    Ok(all)
}

fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "echo", "namespace": NAMESPACE},
        "spec": {
            "type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "selector": {"app": "echo"},
            "ports": [{"port": PORT, "targetPort": PORT}],
        },
    })
}

/// The results of the load.
#[derive(Debug, Default)]
struct Sum {
    held: u64,
    answered: u64,
    tried: u64,
    opened: u64,
    failed: u64,
    /// Answers that took a retransmission.
    slow: u64,
    worst_ms: u64,
    told: Vec<String>,
}

impl Sum {
    /// Adds the last report in the output of a client.
    fn add(&mut self, output: &str) -> Result<()> {
        let Some(last) = output.lines().rev().find_map(|line| {
            serde_json::from_str::<Value>(line).ok().filter(|event| event["event"] == "load")
        }) else {
            return Ok(());
        };
        let number = |field: &str| last[field].as_u64().unwrap_or_default();
        self.held += number("held");
        self.answered += number("answered");
        self.tried += number("tried");
        self.opened += number("opened");
        self.failed +=
            ["refused", "reset", "lost", "wrong", "other"].map(number).iter().sum::<u64>();
        self.slow += number("slow");
        self.worst_ms = self.worst_ms.max(number("worst_ms"));
        self.told.extend(strings(&last["told"]));
        ensure!(self.failed == 0, "connections have failed: {self:#?}");
        Ok(())
    }
}

fn strings(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Formats an address and port as a client accepts them.
fn at(ip: &str, port: u64) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

fn until(ask: impl Fn() -> Result<Sum>, is_so: impl Fn(&Sum) -> bool) -> Result<Sum> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let sum = ask()?;
        if is_so(&sum) {
            return Ok(sum);
        }
        ensure!(Instant::now() < deadline, "waited {PATIENCE:?} in vain: {sum:#?}");
        sleep(Duration::from_secs(1));
    }
}

fn kubectl(args: &[&str]) -> Result<String> {
    let (program, kubeconfig): (&Path, &Path) =
        (&sluice_cluster::kubectl(), &sluice_cluster::kubeconfig());
    let command = Cmd::new(program).arg("--kubeconfig").arg(kubeconfig).args(args);
    sluice_cluster::outside(move || command.answer())
}

fn get(what: &[&str]) -> Result<Value> {
    let args: Vec<&str> = ["get", "-o", "json"].into_iter().chain(what.iter().copied()).collect();
    serde_json::from_str(&kubectl(&args)?).with_context(|| format!("kubectl {}", args.join(" ")))
}
