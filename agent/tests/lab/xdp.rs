//! XDP on the uplink, with full checksums as from a wire, and with the partial ones of veths, which
//! are left to tc.

use std::net::{IpAddr, SocketAddr};

use crate::support::{
    Cluster, DNS, ENOUGH, HTTP, Plan, WEB, addresses_of_client, all_answer, are_nearly, counted,
    external_ip, reaches, skip, status, transfers, url, word,
};
use anyhow::{Context, Result, bail, ensure};
use sluice_lab::{Counter, Place, Side, Way};

/// Returns a cluster whose uplink has XDP in the driver.
fn cluster(name: &str, full_checksums: bool) -> Result<Cluster> {
    let mut cluster = Cluster::without_agents(name, &Plan { near: 2, ..Plan::default() })?;
    cluster.node().uplink_peer_xdp_pass()?;
    if full_checksums {
        cluster.node().uplink_peer_full_checksums()?;
    }
    cluster.start_agents(&["--socket-path", "off", "--xdp", "native"])?;
    let status = status(cluster.node())?;
    let devices = status.get("devices").and_then(|all| all.as_array()).context("no devices")?;
    let uplink = devices.iter().find(|one| word(one, "role") == "uplink").context("no uplink")?;
    let hooks = uplink.get("hooks").map(ToString::to_string).unwrap_or_default();
    ensure!(word(uplink, "name") == "eth0" && hooks.contains("xdp-native"), "{uplink}");
    Ok(cluster)
}

/// Counts the packets that come in by the uplink before any program at tc: those for the VIP, and
/// those for the backends.
struct Witness {
    vip: Counter,
    backends: Vec<Counter>,
}

impl Witness {
    fn new(cluster: &Cluster) -> Result<Self> {
        let (node, at) = (cluster.node(), (Way::Ingress, Place::First));
        let IpAddr::V4(vip) = external_ip(WEB)[0] else { bail!("no v4 address") };
        let count = |address| node.count_packets(node.uplink(), at, (Side::Destination, address));
        Ok(Self {
            vip: count(vip)?,
            backends: cluster
                .backends
                .iter()
                .map(|pod| count(pod.ipv4()))
                .collect::<Result<_>>()?,
        })
    }

    /// Returns the number of packets that reached tc untranslated, and translated.
    fn seen(&self) -> Result<(u64, u64)> {
        let translated: Vec<u64> =
            self.backends.iter().map(Counter::packets).collect::<Result<_>>()?;
        Ok((self.vip.packets()?, translated.iter().sum()))
    }
}

#[test]
fn xdp_translates_what_comes_from_outside_with_full_checksums() -> Result<()> {
    if skip("xdp_translates_what_comes_from_outside") {
        return Ok(());
    }
    let cluster = cluster("xdp", true)?;
    let witness = Witness::new(&cluster)?;
    let (node, names) = (cluster.node(), cluster.names());
    for vip in external_ip(WEB) {
        let before = (counted(node, "web")?, witness.seen()?);
        let http = cluster.outside.http_get(&url(vip, HTTP, ""), ENOUGH)?;
        all_answer("TCP", &http, &names, SocketAddr::new(vip, HTTP))?;
        let dns = SocketAddr::new(vip, DNS);
        all_answer("UDP", &cluster.outside.udp_ask(dns, ENOUGH)?, &names, dns)?;
        let more = counted(node, "web")? - before.0;
        let (untranslated, translated) = witness.seen()?;
        println!("{vip}: {more:?}; at tc {untranslated} untranslated, {translated} translated");
        ensure!(are_nearly(more.flows, 2 * ENOUGH), "{more:?}");
        if vip.is_ipv4() {
            ensure!(untranslated == before.1.0, "{untranslated} packets came to tc untranslated");
            ensure!(translated - before.1.1 == more.forward, "{more:?}, but {translated} at tc");
        }
    }
    let own = addresses_of_client(&cluster.outside);
    reaches(&cluster.outside, external_ip(WEB), &names, Some(own))?;
    for vip in external_ip(WEB) {
        transfers(&cluster.outside, vip, 3_000_000)?;
    }
    Ok(())
}

#[test]
fn xdp_leaves_partial_checksums_to_tc() -> Result<()> {
    if skip("xdp_leaves_partial_checksums") {
        return Ok(());
    }
    let cluster = cluster("xdp-partial", false)?;
    let witness = Witness::new(&cluster)?;
    let (names, own) = (cluster.names(), addresses_of_client(&cluster.outside));
    reaches(&cluster.outside, external_ip(WEB), &names, Some(own))?;
    for vip in external_ip(WEB) {
        transfers(&cluster.outside, vip, 3_000_000)?;
    }
    let (untranslated, translated) = witness.seen()?;
    println!("at tc {untranslated} untranslated, {translated} translated");
    ensure!(untranslated > 5 * u64::from(ENOUGH), "{untranslated} packets came to tc untranslated");
    // A reset has no offload, so its checksum is full. Every segment with data has a partial one.
    ensure!(
        translated < untranslated / 20,
        "XDP translated {translated} of {untranslated} packets"
    );
    Ok(())
}
