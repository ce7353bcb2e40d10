//! Backends on another node: over plain routes, VXLAN, and a tunnel whose packets have no link
//! header.

use std::net::SocketAddr;

use crate::support::{
    Cluster, DNS, ENOUGH, HTTP, Plan, WEB, addresses_of_client, addresses_of_pod, all_answer,
    cluster_ip, counted, external_ip, reaches, route_to, service, skip, transfers,
    unless_unsupported, url,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::{Cni, DROP_INVALID, NodeOptions, Overlay};

fn backends_of_another_node_are_reached(name: &str, overlay: Overlay, cni: Cni) -> Result<()> {
    let node = NodeOptions { cni, nft: Some(DROP_INVALID.to_owned()), ..NodeOptions::default() };
    let plan = Plan { overlay, node, near: 1, far: 2, args: Vec::new() };
    let mut cluster = Cluster::without_agents(name, &plan)?;
    let local = service("local", 20).backends([&cluster.backends[0].clone()]);
    cluster.manifests.write(&local)?;
    for address in external_ip(20) {
        route_to(&cluster.lab, address, &cluster.nodes[0].clone())?;
    }
    cluster.start_agents(&["--socket-path", "off"])?;
    let names: Vec<String> = cluster.names().into_iter().map(str::to_owned).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let pod = addresses_of_pod(&cluster.client);
    for mode in ["off", "all"] {
        cluster.change_agents(&["--socket-path", mode])?;
        let before = counted(cluster.node(), "web")?;
        // A pod of either node reaches pods of its own and of the other node.
        reaches(&cluster.client, cluster_ip(WEB), &names, Some(pod)).context(mode)?;
        let far = cluster.backends[1].clone();
        reaches(&far, cluster_ip(20), &["near-1"], Some(addresses_of_pod(&far))).context(mode)?;
        for vip in cluster_ip(WEB) {
            transfers(&cluster.client, vip, 3_000_000).context(mode)?;
        }
        reaches(
            &cluster.outside,
            external_ip(20),
            &["near-1"],
            Some(addresses_of_client(&cluster.outside)),
        )
        .context(mode)?;
        let more = counted(cluster.node(), "web")? - before;
        ensure!((more.calls > 0) == (mode == "all"), "{mode}: {more:?}");
    }
    // The host's calls are translated at the socket, so its source is the overlay's address.
    for vip in cluster_ip(WEB) {
        let http = SocketAddr::new(vip, HTTP);
        let replies = cluster.node().http_get(&url(vip, HTTP, ""), ENOUGH)?;
        all_answer("host, TCP", &replies, &names, http)?;
        let dns = SocketAddr::new(vip, DNS);
        all_answer("host, UDP", &cluster.node().udp_ask(dns, ENOUGH)?, &names, dns)?;
        transfers(cluster.node(), vip, 3_000_000)?;
    }
    if overlay == Overlay::None {
        reaches(cluster.node(), cluster_ip(WEB), &names, None)?;
    }
    Ok(())
}

#[test]
fn backends_of_another_node_are_reached_by_plain_routes() -> Result<()> {
    if skip("backends_by_plain_routes") {
        return Ok(());
    }
    backends_of_another_node_are_reached("routes", Overlay::None, Cni::Routed)
}

#[test]
fn backends_of_another_node_are_reached_over_vxlan() -> Result<()> {
    if skip("backends_over_vxlan") {
        return Ok(());
    }
    let bridge = Cni::Bridge { bridge_nf: true };
    unless_unsupported(backends_of_another_node_are_reached("vxlan", Overlay::Vxlan, bridge))
}

#[test]
fn backends_of_another_node_are_reached_over_a_tunnel_without_link_headers() -> Result<()> {
    if skip("backends_over_a_tunnel") {
        return Ok(());
    }
    unless_unsupported(backends_of_another_node_are_reached("tun", Overlay::Tun, Cni::Routed))
}
