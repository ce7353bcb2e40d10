//! A client that is its own backend: a pod through its VIP, a process of the host on the host
//! network.

use std::net::SocketAddr;

use crate::support;
use crate::support::{
    Cluster, DNS, ECHO, HTTP, Pair, Plan, WEB, addresses_of_pod, all_answer, are_nearly,
    cluster_ip, counted, on_host, reaches, replies, route_to, service, skip, transfers,
    unless_unsupported, url,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::{Cni, DROP_INVALID, Namespace, NodeOptions};

/// Sends TCP with data in both directions, and UDP.
fn speaks_with_itself(
    client: &Namespace,
    vips: Pair,
    name: &str,
    seen: Option<Pair>,
) -> Result<()> {
    for (family, vip) in vips.into_iter().enumerate() {
        let seen = seen.map(|seen| seen[family]);
        let echo = SocketAddr::new(vip, ECHO);
        let http = client.http_get(&url(vip, HTTP, ""), 20)?;
        all_answer("HTTP", &http, &[name], SocketAddr::new(vip, HTTP))?;
        let talk = client.ask([
            "tcp-client",
            "--count=40",
            "--interval-ms=2",
            "--to",
            &echo.to_string(),
        ])?;
        let talk = replies(talk)?;
        ensure!(talk.len() == 40, "{echo}: {talk:?}");
        transfers(client, vip, 1_000_000)?;
        let dns = SocketAddr::new(vip, DNS);
        let plain = client.udp_ask(dns, 20)?;
        all_answer("UDP", &plain, &[name], dns)?;
        let connected = client.udp_ask_connected(dns, 20)?;
        all_answer("connected UDP", &connected, &[name], dns)?;
        if let Some(seen) = seen {
            let mut all = http.iter().chain(&talk).chain(&plain).chain(&connected);
            ensure!(
                all.all(|reply| reply.seen.ip() == seen),
                "seen as others than {seen}: {http:?}"
            );
        }
    }
    Ok(())
}

fn a_pod_reaches_itself(name: &str, cni: Cni, nft: Option<&str>) -> Result<()> {
    let node = NodeOptions { cni, nft: nft.map(str::to_owned), ..NodeOptions::default() };
    let mut cluster = Cluster::without_agents(name, &Plan { node, near: 1, ..Plan::default() })?;
    let client = cluster.client.clone();
    cluster.serve(&client)?;
    cluster.manifests.write(&service("own", 20).backends([&client]))?;
    cluster
        .manifests
        .write(&service("both", 21).backends([&client, &cluster.backends[0].clone()]))?;
    cluster.start_agents(&["--socket-path", "off"])?;
    // It sees its own requests come from the VIP.
    speaks_with_itself(&client, cluster_ip(20), "client", Some(cluster_ip(20)))
        .context("--socket-path off")?;
    reaches(&client, cluster_ip(21), &["client", "near-1"], None)?;
    let counted = counted(cluster.node(), "own")?;
    ensure!(counted.calls == 0 && are_nearly(counted.flows, 2 * 62), "{counted:?}");
    // Others see its own address.
    let pod = cluster.backends[0].clone();
    reaches(&pod, cluster_ip(20), &["client"], Some(addresses_of_pod(&pod)))?;
    cluster.change_agents(&["--socket-path", "all"])?;
    speaks_with_itself(&client, cluster_ip(20), "client", None).context("--socket-path all")?;
    reaches(&client, cluster_ip(21), &["client", "near-1"], None)
}

#[test]
fn a_routed_pod_reaches_itself_through_its_vip() -> Result<()> {
    if skip("a_routed_pod_reaches_itself") {
        return Ok(());
    }
    a_pod_reaches_itself("hairpin", Cni::Routed, None)
}

#[test]
fn a_bridged_pod_reaches_itself_through_its_vip() -> Result<()> {
    if skip("a_bridged_pod_reaches_itself") {
        return Ok(());
    }
    let built =
        a_pod_reaches_itself("hairpin-bridge", Cni::Bridge { bridge_nf: true }, Some(DROP_INVALID));
    unless_unsupported(built)
}

#[test]
fn a_process_of_the_host_network_is_reached_by_its_own_host_and_by_all() -> Result<()> {
    if skip("a_process_of_the_host_network") {
        return Ok(());
    }
    let mut cluster =
        Cluster::without_agents("host-network", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    cluster.serve(&node)?;
    cluster.manifests.write(&service("onhost", 20).backends([on_host(&node)]))?;
    cluster
        .manifests
        .write(&cluster.web().backends([on_host(&node), (&cluster.backends[0]).into()]))?;
    for address in support::external_ip(20) {
        route_to(&cluster.lab, address, &node)?;
    }
    cluster.start_agents(&["--socket-path", "off"])?;
    for mode in ["off", "all"] {
        cluster.change_agents(&["--socket-path", mode])?;
        speaks_with_itself(&node, cluster_ip(20), "n1", None).context(mode)?;
        reaches(&node, cluster_ip(WEB), &["n1", "near-1"], None).context(mode)?;
        reaches(&cluster.client, cluster_ip(20), &["n1"], Some(addresses_of_pod(&cluster.client)))
            .context(mode)?;
        reaches(&cluster.outside, support::external_ip(20), &["n1"], None).context(mode)?;
    }
    Ok(())
}
