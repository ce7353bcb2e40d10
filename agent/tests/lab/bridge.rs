//! Pods on a bridge, with and without netfilter on it, each with a rule that drops what conntrack
//! calls invalid.

use std::net::{IpAddr, SocketAddr};

use crate::support::{
    Cluster, DNS, HTTP, Plan, SOON, WEB, addresses_of_client, addresses_of_pod, all_answer,
    cluster_ip, counted, external_ip, reaches, skip, transfers, unless_unsupported, url,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::{Cni, DROP_INVALID, NodeOptions};

/// Returns the number of packets that the rule has dropped.
fn dropped(cluster: &Cluster) -> Result<u64> {
    let rules = cluster.node().run("nft", ["list", "ruleset"])?;
    let packets =
        rules.split("invalid counter packets ").nth(1).and_then(|rest| rest.split(' ').next());
    packets.and_then(|word| word.parse().ok()).with_context(|| format!("no counter in {rules}"))
}

fn a_bridge_carries_services(name: &str, bridge_nf: bool) -> Result<()> {
    let node = NodeOptions {
        cni: Cni::Bridge { bridge_nf },
        nft: Some(DROP_INVALID.to_owned()),
        ..NodeOptions::default()
    };
    let plan = Plan { node, args: vec!["--socket-path", "off"], ..Plan::default() };
    let mut cluster = Cluster::new(name, &plan)?;
    let names: Vec<String> = cluster.names().into_iter().map(str::to_owned).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let pod = addresses_of_pod(&cluster.client);
    reaches(&cluster.client, cluster_ip(WEB), &names, Some(pod))?;
    reaches(cluster.node(), cluster_ip(WEB), &names, None)?;
    reaches(
        &cluster.outside,
        external_ip(WEB),
        &names,
        Some(addresses_of_client(&cluster.outside)),
    )?;
    for family in 0..2 {
        transfers(&cluster.client, cluster_ip(WEB)[family], 3_000_000)?;
        transfers(cluster.node(), cluster_ip(WEB)[family], 3_000_000)?;
        transfers(&cluster.outside, external_ip(WEB)[family], 3_000_000)?;
        let http = SocketAddr::new(cluster_ip(WEB)[family], HTTP);
        let short = cluster.client.http_get(&url(http.ip(), HTTP, ""), 300)?;
        all_answer("300 short requests", &short, &names, http)?;
    }
    println!("{name}: the rule dropped {} packets", dropped(&cluster)?);
    traffic_stays_on_the_bridge(&cluster)?;
    ensure!(counted(cluster.node(), "web")?.calls == 0);

    cluster.change_agents(&["--socket-path", "all"])?;
    reaches(&cluster.client, cluster_ip(WEB), &names, Some(pod))?;
    reaches(cluster.node(), cluster_ip(WEB), &names, None)?;
    transfers(&cluster.client, cluster_ip(WEB)[0], 3_000_000)?;
    ensure!(counted(cluster.node(), "web")?.calls > 0);
    Ok(())
}

/// Client and backend are ports of one bridge: a packet that arrives has crossed no router.
fn traffic_stays_on_the_bridge(cluster: &Cluster) -> Result<()> {
    let captures = cluster
        .backends
        .iter()
        .map(|pod| pod.tcpdump("eth0", "ip and dst port 5353"))
        .collect::<Result<Vec<_>>>()?;
    let vip: IpAddr = cluster_ip(WEB)[0];
    let _ = cluster.client.udp_ask(SocketAddr::new(vip, DNS), 20)?;
    for mut capture in captures {
        let _ = capture.wait_for("ttl", SOON)?;
        let text = capture.finish()?;
        ensure!(text.contains("ttl 64") && !text.contains("ttl 63"), "not bridged: {text}");
    }
    Ok(())
}

#[test]
fn a_bridge_without_netfilter_carries_services() -> Result<()> {
    if skip("a_bridge_without_netfilter") {
        return Ok(());
    }
    unless_unsupported(a_bridge_carries_services("bridge", false))
}

#[test]
fn a_bridge_with_netfilter_carries_services() -> Result<()> {
    if skip("a_bridge_with_netfilter") {
        return Ok(());
    }
    unless_unsupported(a_bridge_carries_services("bridge-nf", true))
}
