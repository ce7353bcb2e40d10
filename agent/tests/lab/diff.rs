//! `sluice diff`: a difference made by hand is shown and repaired.

use std::process::Output;

use crate::support;
use crate::support::{
    Cluster, Plan, WEB, cluster_ip, flush, follows_the_schema, number, pinned, reaches, service,
    skip, status, unless_unsupported, until, until_backends, word,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_lab::{Cni, Node, NodeOptions, Overlay};

/// Runs `sluice diff`. Returns its exit code, its JSON if it printed any, and its output on
/// standard error.
fn diff(node: &Node, args: &[&str]) -> Result<(i32, Value, String)> {
    let args: Vec<&str> = ["diff", "-o", "json"].iter().chain(args).copied().collect();
    let Output { status, stdout, stderr } = node.sluice_output(&args)?;
    let said = String::from_utf8_lossy(&stderr).into_owned();
    let report: Value = serde_json::from_slice(&stdout).unwrap_or_default();
    if !report.is_null() {
        follows_the_schema(&report)?;
    }
    Ok((status.code().context("it was killed")?, report, said))
}

fn rows(report: &Value) -> Vec<Value> {
    report.get("differences").and_then(Value::as_array).cloned().unwrap_or_default()
}

/// Returns the change and map of every row.
fn changes(report: &Value) -> Vec<(String, String)> {
    rows(report)
        .iter()
        .map(|row| (word(row, "change").to_owned(), word(row, "map").to_owned()))
        .collect()
}

fn table(node: &Node, args: &[&str]) -> Result<()> {
    let args: Vec<&str> = ["diff"].iter().chain(args).copied().collect();
    println!(
        "$ sluice {}\n{}",
        args.join(" "),
        String::from_utf8_lossy(&node.sluice_output(&args)?.stdout)
    );
    Ok(())
}

/// In another network namespace devices and addresses are different: nothing is compared or removed
/// there.
fn elsewhere(cluster: &Cluster, node: &Node) -> Result<()> {
    let server = format!("{}:80", cluster_ip(WEB)[0]);
    let explain = ["explain", "tcp", "10.0.0.1:4001", &server, "--from", "host"];
    for (words, code) in
        [(&["diff"][..], 2), (&["diff", "--repair"], 2), (&["cleanup"], 1), (&explain, 1)]
    {
        let command = node.sluice_command(words)?;
        let program = command.get_program().to_str().context("a path")?;
        let output = cluster.client.output(program, command.get_args())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(code) && said.contains("another network namespace"),
            "{words:?}: {} {said}",
            output.status
        );
    }
    ensure!(node.pin_path().exists(), "the pins were removed");
    Ok(())
}

#[test]
fn a_difference_is_shown_and_repaired() -> Result<()> {
    if skip("a_difference") {
        return Ok(());
    }
    let plan = Plan { args: vec!["--masquerade", "all"], far: 1, ..Plan::default() };
    let mut cluster = Cluster::new("diff", &plan)?;
    let node = cluster.node().clone();
    // With the agent's own options, without a flag.
    let (code, report, said) = diff(&node, &[])?;
    ensure!(code == 0 && rows(&report).is_empty(), "beside an agent: {code} {report} {said}");
    ensure!(report.get("agent_alive") == Some(&Value::Bool(true)), "{report}");
    table(&node, &[])?;
    let (code, report, said) = diff(&node, &["--masquerade", "needed"])?;
    ensure!(
        code == 1 && changes(&report) == [("different".to_owned(), "settings".to_owned())],
        "{report} {said}"
    );

    // Two maps are emptied by hand while the agent is stopped.
    let pid = status(&node)?.pointer("/agent/pid").context("no pid")?.to_string();
    let _ = node.run("kill", ["-STOP", &pid])?;
    let deleted = flush(&node, "services_v4")?;
    let origins = flush(&node, "origins_v4")?;
    let (code, report, said) = diff(&node, &[])?;
    ensure!(code == 1, "{code} {report} {said}");
    let missing = |map: &str| {
        let row = ("missing".to_owned(), map.to_owned());
        changes(&report).iter().filter(|found| **found == row).count()
    };
    ensure!((missing("services_v4"), missing("origins_v4")) == (deleted, origins), "{report}");
    ensure!(rows(&report).len() == deleted + origins, "{report}");
    ensure!(
        rows(&report).iter().any(|row| {
            word(row, "key") == format!("{}:80 TCP", cluster_ip(WEB)[0])
                && word(row, "service") == "default/web:http"
                && row.get("found") == Some(&Value::Null)
        }),
        "{report}"
    );
    table(&node, &[])?;

    let (code, report, said) = diff(&node, &["--repair"])?;
    ensure!(code == 2 && report.is_null(), "a repair beside an agent: {code} {report}");
    ensure!(said.contains("restart it") && said.contains("pid"), "{said}");
    cluster.agent().kill9()?;
    elsewhere(&cluster, &node)?;
    table(&node, &["--repair"])?;
    reaches(&cluster.client, cluster_ip(WEB), &cluster.names(), None)?;
    let (code, report, said) = diff(&node, &[])?;
    ensure!(code == 0, "after the repair: {code} {report} {said}");
    let (code, report, _) = diff(&node, &["--repair"])?;
    ensure!(code == 0 && report.get("repaired_writes").is_none(), "nothing to repair: {report}");

    // Without an agent, a service comes and a backend goes.
    cluster.manifests.write(&service("fresh", 20).backends(&cluster.backends))?;
    cluster.manifests.write(&cluster.web().backends(&cluster.backends[..2]))?;
    table(&node, &[])?;
    let (code, report, said) = diff(&node, &[])?;
    let all = changes(&report);
    for (change, map) in [
        ("missing", "services_v4"),
        ("missing", "names"),
        ("different", "backends_v6"),
        ("extra", "slots"),
    ] {
        ensure!(
            all.contains(&(change.to_owned(), map.to_owned())),
            "{change} {map}: {code} {report} {said}"
        );
    }
    let (code, report, said) = diff(&node, &["--repair"])?;
    ensure!(code == 0 && number(&report, "repaired_writes") > 10, "{code} {report} {said}");
    reaches(&cluster.client, cluster_ip(20), &cluster.names(), None)?;
    let near: Vec<&str> = cluster.names()[..2].to_vec();
    reaches(&cluster.client, cluster_ip(WEB), &near, None)?;

    // The next agent finds nothing to do, and is in step.
    let mut agents = std::mem::take(&mut cluster.agents);
    agents[0].restart()?;
    agents[0].wait_ready(support::SOON)?;
    until_backends(&node, "fresh", 3)?;
    let (code, report, said) = diff(&node, &[])?;
    ensure!(code == 0, "beside the next agent: {code} {report} {said}");
    drop(agents);
    Ok(())
}

#[test]
fn an_unknown_difference_has_an_exit_code_of_its_own() -> Result<()> {
    if skip("what_cannot_be_told") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("diff-codes", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let folder = cluster.manifests.directory().display().to_string();
    let (code, _, said) = diff(&node, &["--manifests", &folder])?;
    ensure!(code == 2 && said.contains("nothing of Sluice is pinned"), "{code} {said}");
    cluster.start_agents(&[])?;
    for (args, expected) in [
        (vec!["--masquerade", "some"], "possible values"),
        (vec!["--detect-local", "cluster-cidr"], "needs --cluster-cidr"),
        (vec!["--manifests", "/nowhere"], "/nowhere"),
        (vec!["--kubeconfig", "/nowhere"], "/nowhere"),
    ] {
        let (code, _, said) = diff(&node, &args)?;
        ensure!(code == 2 && said.contains(expected), "{args:?}: {code} {said}");
        println!("{args:?}: {said}");
    }
    // Objects that cannot be read are not taken for deleted.
    cluster.agent().stop()?;
    cluster.manifests.write_text("default-web.yaml", "kind: Service\n\tmetadata: [\n")?;
    let (code, report, said) = diff(&node, &[])?;
    ensure!(
        code == 1 && report.get("unread").is_some_and(|unread| unread != &Value::Array(Vec::new())),
        "{report} {said}"
    );
    let (code, _, said) = diff(&node, &["--repair"])?;
    ensure!(code == 2 && said.contains("fix it first"), "{code} {said}");
    println!("{said}");
    reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)?;
    // A single slot that was overwritten by hand.
    cluster.manifests.write(&cluster.web())?;
    let slots = pinned(&node, "slots")?.display().to_string();
    let zeros = vec!["0"; 64].join(" ");
    let mut update = vec!["map", "update", "pinned", &slots, "key", "0", "0", "0", "0", "value"];
    update.extend(zeros.split(' '));
    let _ = node.run("bpftool", update)?;
    let (code, report, said) = diff(&node, &[])?;
    ensure!(code == 1, "{report} {said}");
    table(&node, &["--repair"])?;
    until("the maps are in step", || Ok((diff(&node, &[])?.0 == 0).then_some(())))?;
    reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)
}

#[test]
fn nothing_differs_next_to_an_agent_that_has_seen_many_changes() -> Result<()> {
    if skip("beside_an_agent") {
        return Ok(());
    }
    unless_unsupported(much_seen())
}

fn much_seen() -> Result<()> {
    let options = NodeOptions { cni: Cni::Bridge { bridge_nf: false }, ..NodeOptions::default() };
    let plan = Plan {
        overlay: Overlay::Vxlan,
        node: options,
        far: 1,
        args: vec![
            "--nodeport-addresses",
            "all",
            "--cluster-cidr",
            "10.244.0.0/16",
            "--socket-path",
            "host",
        ],
        ..Plan::default()
    };
    let mut cluster = Cluster::new("diff-much", &plan)?;
    let node = cluster.node().clone();
    // Services come and go, and so do backends, node ports and pods. Entries that are kept for
    // connections are no difference.
    for number in 20..24_u8 {
        let name = format!("extra-{number}");
        let extra = service(&name, number).backends(&cluster.backends);
        cluster.manifests.write(&extra)?;
        until_backends(&node, &name, cluster.backends.len())?;
        if number % 2 == 0 {
            cluster.manifests.remove(&extra)?;
        }
    }
    let pod = node.pod("late")?;
    cluster.serve(&pod)?;
    cluster.manifests.write(&cluster.web().backends([&cluster.backends[0], &pod]))?;
    until_backends(&node, "web", 2)?;
    let in_step = || {
        until("nothing differs", || {
            let (code, report, said) = diff(&node, &[])?;
            if code != 0 {
                println!("{report} {said}");
            }
            Ok((code == 0).then_some(()))
        })
    };
    in_step()?;
    // The same after an agent that adopted all of it, and without any agent.
    cluster.agent().kill9()?;
    in_step()?;
    cluster.agent().restart()?;
    cluster.agent().wait_ready(3 * support::SOON)?;
    in_step()
}
