//! Devices that come and go while the agent runs.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::support::{
    Cluster, HTTP, Plan, WEB, addresses_of_pod, all_answer, cluster_ip, reaches, skip, status,
    until, until_backends, url, word,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::{Cni, Node, NodeOptions};

/// Returns the devices that `sluice status` lists, with their hooks.
fn devices(node: &Node) -> Result<Vec<(String, String)>> {
    let status = status(node)?;
    let all = status.get("devices").and_then(|all| all.as_array()).cloned().unwrap_or_default();
    let hooks =
        |one: &serde_json::Value| one.get("hooks").map(ToString::to_string).unwrap_or_default();
    Ok(all.iter().map(|one| (word(one, "name").to_owned(), hooks(one))).collect())
}

fn a_pod_that_comes_later_is_served(name: &str, cni: Cni) -> Result<()> {
    let node = NodeOptions { cni, ..NodeOptions::default() };
    let plan = Plan { near: 1, node, args: vec!["--socket-path", "off"], ..Plan::default() };
    let mut cluster = Cluster::new(name, &plan)?;
    let (node, vip) = (cluster.node().clone(), cluster_ip(WEB)[0]);
    let to = SocketAddr::new(vip, HTTP).to_string();
    let mut slowest = Duration::ZERO;
    for number in 1..=3 {
        let pod = node.pod(&format!("late-{number}"))?;
        let made = Instant::now();
        // Its requests would leave by the uplink untranslated and be lost.
        until("a late pod is served", || {
            let url = format!("http://{to}/");
            Ok(pod
                .ask(["http-client", "--timeout-ms=30", "--url", &url])?
                .iter()
                .any(|event| matches!(event, sluice_lab::Event::Reply(_)))
                .then_some(()))
        })?;
        slowest = slowest.max(made.elapsed());
        reaches(&pod, cluster_ip(WEB), &["near-1"], Some(addresses_of_pod(&pod)))?;
        // It can be a backend as well.
        if number == 3 {
            cluster.serve(&pod)?;
            cluster.manifests.write(&cluster.web().backends([&cluster.backends[0], &pod]))?;
            until_backends(&node, "web", 2)?;
            reaches(&cluster.client, cluster_ip(WEB), &["near-1", "late-3"], None)?;
            reaches(&pod, cluster_ip(WEB), &["near-1", "late-3"], None)?;
        }
    }
    let log = cluster.agent().log();
    for line in log.lines().filter(|line| line.contains("attached")) {
        println!("{line}");
    }
    println!("{name}: served {slowest:.0?} after it was made, at the slowest");
    ensure!(slowest < Duration::from_secs(2), "a late pod was served after {slowest:?}");
    Ok(())
}

#[test]
fn a_routed_pod_that_comes_later_is_served_within_a_second() -> Result<()> {
    if skip("a_routed_pod_that_comes_later") {
        return Ok(());
    }
    a_pod_that_comes_later_is_served("late", Cni::Routed)
}

#[test]
fn a_bridged_pod_that_comes_later_is_served_within_a_second() -> Result<()> {
    if skip("a_bridged_pod_that_comes_later") {
        return Ok(());
    }
    a_pod_that_comes_later_is_served("late-bridge", Cni::Bridge { bridge_nf: false })
}

#[test]
fn a_pod_that_goes_leaves_nothing_behind() -> Result<()> {
    if skip("a_pod_that_goes") {
        return Ok(());
    }
    let mut cluster = Cluster::new(
        "gone",
        &Plan { near: 2, args: vec!["--socket-path", "off"], ..Plan::default() },
    )?;
    let node = cluster.node().clone();
    let going = cluster.backends.pop().context("a backend")?;
    let device = going.host_device().to_owned();
    let index = node.run("cat", [&format!("/sys/class/net/{device}/ifindex")]);
    // sysfs shows the namespace in which it was mounted, so `ip` is used.
    let index = match index {
        Ok(index) if !index.trim().is_empty() => index,
        Ok(_) | Err(_) => node
            .run("ip", ["-o", "link", "show", &device])?
            .split(':')
            .next()
            .unwrap_or_default()
            .to_owned(),
    };
    let pins = || -> Result<String> { node.run("find", [node.pin_path().display().to_string()]) };
    let own = format!("dev{}_", index.trim());
    ensure!(
        devices(&node)?.iter().any(|(name, hooks)| *name == device && hooks.contains("tcx")),
        "{:?}",
        devices(&node)?
    );
    ensure!(pins()?.contains(&own), "no pins of {own}: {}", pins()?);
    cluster.manifests.write(&cluster.web())?;
    until_backends(&node, "web", 1)?;
    going.remove()?;
    until("its device is gone from the status", || {
        Ok((!devices(&node)?.iter().any(|(name, _)| *name == device)).then_some(()))
    })?;
    ensure!(!pins()?.contains(&own), "pins are left: {}", pins()?);
    let http = SocketAddr::new(cluster_ip(WEB)[0], HTTP);
    let replies = cluster.client.http_get(&url(http.ip(), HTTP, ""), 20)?;
    all_answer("after a pod went", &replies, &["near-1"], http)
}
