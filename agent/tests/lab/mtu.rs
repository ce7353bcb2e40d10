//! Path MTU discovery through a VIP: the routers' ICMP errors reach the backend, and quote the
//! addresses that it knows.

use std::net::{IpAddr, SocketAddr};

use crate::support::{
    Cluster, DNS, Plan, SOON, WEB, external_ip, reasons, received, skip, transfers,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::Event;

/// Builds a cluster whose packets pass the stack, or go around it where it would only forward them.
fn cluster(name: &str, accelerate: &'static str) -> Result<Cluster> {
    let args = vec!["--socket-path", "off", "--accelerate", accelerate];
    Cluster::new(&format!("{name}-{accelerate}"), &Plan { near: 1, args, ..Plan::default() })
}

#[test]
fn a_client_behind_a_narrow_link_gets_large_answers() -> Result<()> {
    if skip("a_client_behind_a_narrow_link") {
        return Ok(());
    }
    ["off", "on"]
        .into_iter()
        .try_for_each(|accelerate| large_answers(&cluster("narrow", accelerate)?))
}

fn large_answers(cluster: &Cluster) -> Result<()> {
    cluster.outside.narrow_link(1300)?;
    for vip in external_ip(WEB) {
        let before = reasons(cluster.node())?.get("icmp_error").copied().unwrap_or_default();
        transfers(&cluster.outside, vip, 2_000_000)
            .with_context(|| format!("{vip}: the path's MTU is not found"))?;
        let after = reasons(cluster.node())?.get("icmp_error").copied().unwrap_or_default();
        println!("{vip}: {} ICMP errors were translated", after - before);
        ensure!(after > before, "{vip}: no packet was too big");
    }
    // The backend has learned the path's MTU for the client's own address.
    for (family, address) in
        [("-4", IpAddr::from(cluster.outside.ipv4())), ("-6", cluster.outside.ipv6().into())]
    {
        let route =
            cluster.backends[0].run("ip", [family, "route", "get", &address.to_string()])?;
        ensure!(route.contains("mtu 1300"), "{family}: {route}");
    }
    Ok(())
}

#[test]
fn too_big_errors_name_the_addresses_that_each_side_knows() -> Result<()> {
    if skip("what_is_too_big_is_answered") {
        return Ok(());
    }
    ["off", "on"]
        .into_iter()
        .try_for_each(|accelerate| too_big_is_answered(&cluster("too-big", accelerate)?))
}

fn too_big_is_answered(cluster: &Cluster) -> Result<()> {
    // On the way to the backend: its link is narrower than the client's, and the node has to report
    // that.
    let backend = &cluster.backends[0];
    let _ = cluster.node().ip(&format!("link set {} mtu 1400", backend.host_device()))?;
    for vip in external_ip(WEB) {
        let dns = SocketAddr::new(vip, DNS);
        let wire = cluster.outside.packet_socket("eth0")?;
        let to = dns.to_string();
        // Linux forbids fragmentation of what fits the device.
        let asked =
            cluster.outside.ask(["udp-client", "--size=1450", "--timeout-ms=300", "--to", &to])?;
        ensure!(asked.iter().any(|event| matches!(event, Event::Lost { .. })), "{asked:?}");
        let frame = wire
            .receive(SOON, |frame| too_big(frame).is_some())
            .with_context(|| format!("nothing was too big for {vip}"))?;
        let (mtu, source, destination) = too_big(&frame).context("the frame just seen")?;
        let client: IpAddr = if vip.is_ipv4() {
            cluster.outside.ipv4().into()
        } else {
            cluster.outside.ipv6().into()
        };
        ensure!(
            (mtu, source, destination) == (1400, client, dns),
            "the answer quotes {source} > {destination} and says {mtu}"
        );
        // With wrong checksums, the client's kernel would have ignored it.
        let family = if vip.is_ipv4() { "-4" } else { "-6" };
        let route = cluster.outside.run("ip", [family, "route", "get", &vip.to_string()])?;
        ensure!(route.contains("mtu 1400"), "{vip}: {route}");
        // Packets that fit pass, and so does TCP.
        let fits = cluster.outside.ask(["udp-client", "--size=1300", "--to", &to])?;
        ensure!(received(&fits).is_some_and(|bytes| bytes > 1300), "{fits:?}");
        transfers(&cluster.outside, vip, 100_000)?;
    }
    Ok(())
}

/// Returns what an ICMP "packet too big" in a frame reports: the MTU, and the quoted packet's
/// source and destination.
fn too_big(frame: &[u8]) -> Option<(u32, IpAddr, SocketAddr)> {
    let word = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    match word(12)? {
        0x0800 if frame.get(23) == Some(&1) && frame.get(34..36)? == [3, 4] => {
            let address =
                |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?));
            Some((word(40)?.into(), address(54)?, SocketAddr::new(address(58)?, word(64)?)))
        }
        0x86dd if frame.get(20) == Some(&58) && frame.get(54) == Some(&2) => {
            let address =
                |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(at..at + 16)?).ok()?));
            Some((word(60)?.into(), address(70)?, SocketAddr::new(address(86)?, word(104)?)))
        }
        _ => None,
    }
}
