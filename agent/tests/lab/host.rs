//! Sockets whose packets are translated one by one: connected UDP of pods and of the host.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};

use crate::support::{
    Cluster, DNS, ECHO, ECHO_TARGET, ENOUGH, Plan, SOON, WEB, all_answer, cluster_ip, counted,
    external_ip, listed, on_host, reaches, replies, service, skip, status, take_fresh_ports, until,
    until_backends, word,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::{Backend, Cni, DROP_INVALID, Event, Namespace, NodeOptions, Pod, Running};
use tokio::net::TcpSocket;
use tokio::time::timeout;

#[test]
fn connected_udp_of_pod_and_host_reaches_backends_of_every_kind() -> Result<()> {
    if skip("connected_udp_of_pod_and_host") {
        return Ok(());
    }
    let mut cluster =
        Cluster::without_agents("kinds", &Plan { near: 1, far: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    cluster.serve(&node)?;
    let all: Vec<Backend> =
        cluster.backends.iter().map(Backend::from).chain([on_host(&node)]).collect();
    cluster.manifests.write(&cluster.web().backends(all))?;
    cluster.start_agents(&["--socket-path", "off"])?;
    let names = ["near-1", "far-1", "n1"];
    for mode in ["off", "all"] {
        cluster.change_agents(&["--socket-path", mode])?;
        for client in [&*cluster.client, &*node] {
            for vip in cluster_ip(WEB) {
                let dns = SocketAddr::new(vip, DNS);
                let before = counted(&node, "web:dns")?;
                // A port of a known flow would follow that flow, which is not counted again.
                take_fresh_ports(client)?;
                let answers = client.udp_ask_connected(dns, ENOUGH)?;
                all_answer(&format!("{mode}: {} {dns}", client.name()), &answers, &names, dns)?;
                let more = counted(&node, "web:dns")? - before;
                let ports: BTreeSet<u16> = answers.iter().map(|reply| reply.seen.port()).collect();
                ensure!(
                    more.calls == 0 && more.flows == ports.len() as u64,
                    "{mode}: {} {dns}: {more:?} from {} ports",
                    client.name(),
                    ports.len()
                );
                ensure!(
                    (more.forward, more.reply) == (u64::from(ENOUGH), u64::from(ENOUGH)),
                    "{more:?}"
                );
            }
            // Other clients reach them as well.
            reaches(client, cluster_ip(WEB), &names, None).context(mode)?;
        }
    }
    Ok(())
}

#[test]
fn a_host_without_a_default_route_reaches_services_by_the_own_device() -> Result<()> {
    if skip("a_host_without_a_default_route") {
        return Ok(());
    }
    // On a bridge: the routed pods' gateway answers for what the node has a route to.
    let node = NodeOptions { cni: Cni::Bridge { bridge_nf: false }, ..NodeOptions::default() };
    let plan = Plan { node, near: 1, far: 1, ..Plan::default() };
    let mut cluster = Cluster::without_agents("no-default", &plan)?;
    let node = cluster.node().clone();
    let _ = node.ip("route del default")?;
    let _ = node.run("ip", ["-6", "route", "del", "default"])?;
    let lost = node.udp_ask_connected(SocketAddr::new(cluster_ip(WEB)[0], DNS), 1);
    ensure!(lost.is_err(), "a route leads to VIPs: {lost:?}");
    for mode in ["off", "all"] {
        let args = ["--socket-path", mode, "--uplink", "eth0"];
        if mode == "off" {
            cluster.start_agents(&args)?;
        } else {
            cluster.change_agents(&args)?;
        }
        until("the own device is attached", || {
            let status = status(&node)?;
            let devices =
                status.get("devices").and_then(|all| all.as_array()).cloned().unwrap_or_default();
            let own = devices.iter().find(|one| word(one, "name") == "sluice0");
            Ok(own
                .filter(|own| word(own, "role") == "own" && own.to_string().contains("tcx"))
                .map(drop))
        })?;
        reaches(&node, cluster_ip(WEB), &["near-1", "far-1"], None).context(mode)?;
        reaches(&cluster.client, cluster_ip(WEB), &["near-1", "far-1"], None).context(mode)?;
    }
    // A service that is deleted takes its route along.
    let routes = || node.run("ip", ["-o", "route", "show", "dev", "sluice0"]);
    let vip = cluster_ip(WEB)[0].to_string();
    ensure!(routes()?.contains(&vip), "{}", routes()?);
    cluster.manifests.remove(&cluster.web())?;
    until("the VIP's route goes", || Ok((!routes()?.contains(&vip)).then_some(())))
}

/// Starts a connected UDP socket that sends fifty requests a second.
fn asking(client: &Namespace, vip: IpAddr) -> Result<Running> {
    let to = SocketAddr::new(vip, DNS).to_string();
    client.tool([
        "udp-client",
        "--connected",
        "--count=400",
        "--interval-ms=20",
        "--timeout-ms=400",
        "--to",
        &to,
    ])
}

#[test]
fn connected_udp_leaves_a_removed_backend_at_once() -> Result<()> {
    if skip("connected_udp_leaves_a_removed_backend") {
        return Ok(());
    }
    let mut cluster = Cluster::new("leave", &Plan { near: 3, ..Plan::default() })?;
    let node = cluster.node().clone();
    for mode in ["all", "off"] {
        cluster.change_agents(&["--socket-path", mode])?;
        cluster.manifests.write(&cluster.web())?;
        until_backends(&node, "web", 3)?;
        let mut open = Vec::new();
        for client in [&*cluster.client, &*node] {
            for vip in cluster_ip(WEB) {
                open.push(asking(client, vip)?);
            }
        }
        let mut chosen = BTreeSet::new();
        for client in &mut open {
            let _ = client
                .wait_event("it is answered", SOON, |event| matches!(event, Event::Reply(_)))?;
            chosen.extend(client.replies().last().map(|reply| reply.name.clone()));
        }
        // All backends that were chosen go, or all but one if these are all.
        let mut staying: Vec<_> =
            cluster.backends.iter().filter(|pod| !chosen.contains(pod.name())).collect();
        if staying.is_empty() {
            staying.push(&cluster.backends[0]);
        }
        let names: Vec<&str> = staying.iter().map(|pod| pod.name()).collect();
        cluster.manifests.write(&cluster.web().backends(staying.iter().copied()))?;
        until_backends(&node, "web", names.len())?;
        for client in &mut open {
            let last = client.replies().len();
            client.goes_on(5, SOON)?;
            let all = replies(client.events()).context("a request was lost")?;
            // The request under way at the change may have been answered just before.
            let late: Vec<_> = all.iter().skip(last + 1).map(|reply| reply.name.as_str()).collect();
            ensure!(
                late.iter().all(|name| names.contains(name)),
                "{mode}: {late:?}, only {names:?} are left"
            );
        }
    }
    Ok(())
}

#[test]
fn a_service_of_the_host_network_of_another_node_is_reached() -> Result<()> {
    if skip("a_service_of_the_host_network_of_another_node") {
        return Ok(());
    }
    let mut cluster =
        Cluster::without_agents("other-host", &Plan { near: 0, far: 1, ..Plan::default() })?;
    let (node, other) = (cluster.node().clone(), cluster.nodes[1].clone());
    cluster.serve(&other)?;
    cluster.manifests.write(&service("there", 20).backends([on_host(&other)]))?;
    cluster.start_agents(&["--socket-path", "off"])?;
    for client in [&*cluster.client, &*node] {
        reaches(client, cluster_ip(20), &["n2"], None)?;
    }
    Ok(())
}

/// Opens a connection of this host from a port that others may use as well, and waits for its
/// greeting. Returns the port.
fn greeted(node: &Namespace, from: u16, to: SocketAddr) -> Result<(TcpStream, u16)> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stream = node.enter(|| {
        runtime.block_on(async {
            let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            socket.set_reuseaddr(true)?;
            socket.bind(SocketAddr::new(any, from))?;
            timeout(SOON, socket.connect(to)).await??.into_std()
        })
    })?;
    let stream = stream.with_context(|| format!("from port {from} to {to}"))?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(SOON))?;
    let mut greeting = String::new();
    let _ = BufReader::new(&stream).read_line(&mut greeting).with_context(|| format!("{to}"))?;
    ensure!(!greeting.is_empty(), "{to} says nothing");
    let port = stream.local_addr()?.port();
    Ok((stream, port))
}

#[test]
fn two_connections_of_the_host_from_one_port_reach_one_backend() -> Result<()> {
    if skip("two_connections_of_the_host_from_one_port") {
        return Ok(());
    }
    let cluster = Cluster::new("one-port", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node();
    let pod: &Pod = cluster.backends.first().context("a backend")?;
    let addresses: [IpAddr; 2] = [pod.ipv4().into(), pod.ipv6().into()];
    for (vip, address) in cluster_ip(WEB).into_iter().zip(addresses) {
        let (service, direct) = (SocketAddr::new(vip, ECHO), SocketAddr::new(address, ECHO_TARGET));
        // No hook sees these calls, so what goes to the Service is translated per packet.
        let (first, port) = greeted(node, 0, service)?;
        let (second, _) =
            greeted(node, port, direct).context("direct, beside the translated one")?;
        drop(first);
        let (third, port) = greeted(node, 0, direct)?;
        let (fourth, _) =
            greeted(node, port, service).context("translated, beside the direct one")?;
        drop([second, third, fourth]);
    }
    Ok(())
}

/// Requests without an answer.
fn lost(client: &Running) -> Vec<String> {
    let events = client.events().into_iter();
    events
        .filter_map(
            |event| if let Event::Lost { reason, .. } = event { Some(reason) } else { None },
        )
        .collect()
}

#[test]
fn a_connected_socket_older_than_the_service_is_served_once_there_are_backends() -> Result<()> {
    if skip("a_connected_socket_older_than_the_service") {
        return Ok(());
    }
    // Conntrack on the node remembers where the socket's first requests went.
    let node = NodeOptions { nft: Some(DROP_INVALID.to_owned()), ..NodeOptions::default() };
    let mut cluster = Cluster::without_agents("older", &Plan { node, near: 2, ..Plan::default() })?;
    let node = cluster.node().clone();
    cluster.manifests.remove(&cluster.web())?;
    // This makes an answer possible.
    cluster.manifests.write(&service("first", 20).backends(&cluster.backends.clone()))?;
    cluster.start_agents(&[])?;
    for mode in ["all", "off"] {
        cluster.change_agents(&["--socket-path", mode])?;
        let mut open = Vec::new();
        for (client, vips) in [
            (&*cluster.client, cluster_ip(WEB)),
            (&*node, cluster_ip(WEB)),
            (&*cluster.outside, external_ip(WEB)),
        ] {
            for vip in vips {
                let to = SocketAddr::new(vip, DNS).to_string();
                let args = [
                    "--connected",
                    "--count=2000",
                    "--interval-ms=20",
                    "--timeout-ms=100",
                    "--to",
                    &to,
                ];
                open.push(client.tool(["udp-client"].into_iter().chain(args))?);
            }
        }
        let count = |client: &Running, refused: bool| {
            lost(client).iter().filter(|reason| !refused || reason.contains("refused")).count()
        };
        // No Service, then one without backends, then with some, none again, and so on.
        for client in &mut open {
            client.wait_until("it asks in vain", SOON, |this| {
                (count(this, false) > 2).then_some(())
            })?;
        }
        for round in ["first", "again"] {
            cluster.manifests.write(&cluster.web().backends(Vec::<Backend>::new()))?;
            until_backends(&node, "web", 0)?;
            let before: Vec<usize> = open.iter().map(|client| count(client, true)).collect();
            for (client, before) in open.iter_mut().zip(before) {
                client
                    .wait_until("it is refused", SOON, |this| {
                        (count(this, true) > before).then_some(())
                    })
                    .with_context(|| format!("{mode}, {round}"))?;
                ensure!(round != "first" || client.replies().is_empty(), "{:?}", client.events());
            }
            cluster.manifests.write(&cluster.web())?;
            until_backends(&node, "web", 2)?;
            for client in &mut open {
                client.goes_on(3, SOON).with_context(|| format!("{mode}, {round}"))?;
                // From then on nothing is lost.
                let lost_until_now = count(client, false);
                client.goes_on(5, SOON)?;
                ensure!(
                    count(client, false) == lost_until_now,
                    "{mode}, {round}: {:?}",
                    lost(client).last()
                );
            }
        }
        for mut client in open {
            let _ = client.kill()?;
        }
        cluster.manifests.remove(&cluster.web())?;
        until("the service goes", || {
            Ok((!listed(&node, &["services"])?.iter().any(|row| word(row, "service") == "web"))
                .then_some(()))
        })?;
    }
    Ok(())
}
