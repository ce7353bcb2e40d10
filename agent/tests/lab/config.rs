//! The agent reads kube-proxy's configuration file, follows its changes, and ignores it while it is
//! broken.

use std::net::SocketAddr;
use std::path::Path;

use crate::support::{
    Cluster, ECHO, HTTP, Plan, SOON, WEB, all_answer, cluster_ip, skip, status, until_within, url,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_lab::Node;

fn write(file: &Path, text: &str) -> Result<()> {
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    std::fs::write(file, format!("{head}{text}")).with_context(|| file.display().to_string())
}

fn told(node: &Node, pointer: &str) -> Result<Value> {
    Ok(status(node)?.pointer(pointer).cloned().unwrap_or_default())
}

#[test]
fn a_configuration_is_followed_without_losing_a_connection() -> Result<()> {
    if skip("a_configuration_is_followed") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("config", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let file = cluster.lab.state().join("config.yaml");
    let config = file.display().to_string();
    write(
        &file,
        "mode: nftables\nhostnameOverride: n1\nipvs: {scheduler: rr}\nhealthzBindAddress: 127.0.0.1:10300\n",
    )?;
    // The lab's own arguments name the node.
    cluster.start_agents(&["--config", &config])?;
    let log = cluster.agents[0].log();
    ensure!(
        log.contains("ignored kube-proxy settings that have no meaning here: ipvs.scheduler"),
        "{log}"
    );
    ensure!(
        node.run("curl", ["-sS", "http://127.0.0.1:10300/livez"])?.contains("\"healthy\":true")
    );
    ensure!(told(&node, "/last/policy/nodeport_addresses")? == "primary");
    let pid = told(&node, "/agent/pid")?;
    // A connection that stays open all the time.
    let [vip, _] = cluster_ip(WEB);
    let to = SocketAddr::new(vip, ECHO).to_string();
    let mut stream = cluster.client.tool(["tcp-client", "--interval-ms=40", "--to", &to])?;

    write(&file, "mode: iptables\nhostnameOverride: n1\nhealthzBindAddress: 127.0.0.1:10301\n")?;
    // The agent checks every five seconds, and then verifies its programs.
    until_within(4 * SOON, "the agent starts anew", || {
        Ok((told(&node, "/last/policy/nodeport_addresses")? == "all,localhost"
            && told(&node, "/ready")? == Value::Bool(true))
        .then_some(()))
    })?;
    ensure!(told(&node, "/agent/pid")? == pid, "the process is another one");
    ensure!(
        node.run("curl", ["-sS", "http://127.0.0.1:10301/livez"])?.contains("\"healthy\":true")
    );

    // A broken file changes nothing, and is reported.
    write(&file, "mode: kernelspace\n")?;
    let problem = until_within(2 * SOON, "the broken file is told", || {
        let problems = told(&node, "/last/problems")?;
        let texts = problems.as_array().cloned().unwrap_or_default();
        Ok(texts
            .iter()
            .filter_map(Value::as_str)
            .find(|text| text.contains("kernelspace"))
            .map(str::to_owned))
    })?;
    ensure!(problem.contains("expected iptables, ipvs or nftables"), "{problem}");
    ensure!(told(&node, "/ready")? == Value::Bool(true));
    let http = SocketAddr::new(vip, HTTP);
    all_answer(
        "with a broken file",
        &cluster.client.http_get(&url(vip, HTTP, ""), 5)?,
        &["near-1"],
        http,
    )?;
    let before = stream.events().len();
    stream
        .wait_until("it goes on", SOON, |this| (this.events().len() > before + 2).then_some(()))
        .context("the connection broke")?;
    Ok(())
}
