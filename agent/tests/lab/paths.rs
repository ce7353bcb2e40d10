//! The socket path and the tc path, each on its own, on a node with routed pods and a strict
//! reverse path filter.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::support;
use crate::support::{
    Cluster, Counted, DNS, ECHO, ENOUGH, HTTP, Plan, SOON, WEB, addresses_of_client,
    addresses_of_node, addresses_of_pod, all_answer, are_nearly, cluster_ip, counted, external_ip,
    number, reaches, replies, service, skip, status, until, until_backends, url, word,
};
use anyhow::{Context, Result, bail, ensure};
use sluice_lab::{Backend, Counter, Event, Namespace, Place, Reply, Side, Way};

/// Checks that every client reaches every backend through every address, and that backends see its
/// own address.
fn everyone_reaches_every_backend(cluster: &Cluster) -> Result<()> {
    let names = cluster.names();
    let pod = addresses_of_pod(&cluster.client);
    let node = addresses_of_node(cluster.node());
    for vips in [cluster_ip(WEB), external_ip(WEB)] {
        reaches(&cluster.client, vips, &names, Some(pod))?;
        reaches(cluster.node(), vips, &names, None)?;
    }
    // If the packet path translates the host's packets, the source is the address of the route to
    // the VIP.
    reaches(cluster.node(), external_ip(WEB), &names, None)?;
    ensure!(node[0].is_ipv4() && node[1].is_ipv6());
    reaches(&cluster.outside, external_ip(WEB), &names, Some(addresses_of_client(&cluster.outside)))
}

#[test]
fn every_client_reaches_every_backend_by_the_socket_path_and_by_the_tc_path() -> Result<()> {
    if skip("every_client_reaches_every_backend") {
        return Ok(());
    }
    let plan = Plan { near: 3, args: vec!["--socket-path", "all"], ..Plan::default() };
    let mut cluster = Cluster::new("paths", &plan)?;
    let (names, each) = (cluster.names().join(" "), u64::from(ENOUGH));
    println!("backends: {names}");
    // The socket path: TCP and unconnected UDP are calls and no packets, connected UDP is packets.
    reaches(cluster.node(), cluster_ip(WEB), &cluster.names(), None)?;
    let http = counted(cluster.node(), "web:http")?;
    ensure!(http == Counted { calls: 2 * each, ..Counted::default() }, "host, TCP: {http:?}");
    // A pod has to be known first: its first call to each address and port is not translated at the
    // socket.
    let known = |cluster: &Cluster| {
        let (http, dns) =
            (counted(cluster.node(), "web:http")?, counted(cluster.node(), "web:dns")?);
        reaches(
            &cluster.client,
            cluster_ip(WEB),
            &cluster.names(),
            Some(addresses_of_pod(&cluster.client)),
        )?;
        let counted = |service| counted(cluster.node(), service);
        Ok::<_, anyhow::Error>((counted("web:http")? - http, counted("web:dns")? - dns))
    };
    let (http, dns) = known(&cluster)?;
    ensure!((http.calls, http.flows) == (2 * each - 2, 2), "unknown pod, TCP: {http:?}");
    ensure!(
        dns.calls == 2 * each - 2 && are_nearly(dns.flows, 2 * ENOUGH + 2),
        "unknown pod, UDP: {dns:?}"
    );
    let (http, dns) = known(&cluster)?;
    ensure!((http.calls, http.flows) == (2 * each, 0), "pod, TCP: {http:?}");
    ensure!(dns.calls == 2 * each && are_nearly(dns.flows, 2 * ENOUGH), "pod, UDP: {dns:?}");
    everyone_reaches_every_backend(&cluster)?;

    // The tc path: no calls, and a flow for each connection.
    cluster.change_agents(&["--socket-path", "off"])?;
    let before = counted(cluster.node(), "web")?;
    reaches(
        &cluster.client,
        cluster_ip(WEB),
        &cluster.names(),
        Some(addresses_of_pod(&cluster.client)),
    )?;
    let after = counted(cluster.node(), "web")? - before;
    ensure!(after.calls == 0 && are_nearly(after.flows, 6 * ENOUGH), "pod: {after:?}");
    ensure!(after.forward > after.flows && after.reply > after.flows, "pod: {after:?}");
    everyone_reaches_every_backend(&cluster)?;
    let after = counted(cluster.node(), "web")? - before;
    ensure!(after.calls == 0, "with --socket-path off: {after:?}");

    // Only the host's calls count.
    cluster.change_agents(&["--socket-path", "host"])?;
    let before = counted(cluster.node(), "web:http")?;
    let _ = cluster.client.http_get(&url(cluster_ip(WEB)[0], HTTP, ""), 5)?;
    let _ = cluster.node().http_get(&url(cluster_ip(WEB)[0], HTTP, ""), 7)?;
    let after = counted(cluster.node(), "web:http")? - before;
    ensure!(after.calls == 7 && after.flows == 5, "with --socket-path host: {after:?}");

    // Everybody's calls count from the first on.
    cluster.change_agents(&["--socket-path", "machine"])?;
    let fresh = cluster.node().pod("fresh")?;
    let before = counted(cluster.node(), "web:http")?;
    let _ = fresh.http_get(&url(cluster_ip(WEB)[0], HTTP, ""), 5)?;
    let after = counted(cluster.node(), "web:http")? - before;
    ensure!(after.calls == 5 && after.flows == 0, "with --socket-path machine: {after:?}");
    Ok(())
}

/// Checks a v6 socket that sends v4, with each kind of call.
fn mapped_sockets_reach(client: &Namespace, vip: IpAddr, names: &[&str]) -> Result<()> {
    let (http, dns, echo) =
        (SocketAddr::new(vip, HTTP), SocketAddr::new(vip, DNS), SocketAddr::new(vip, ECHO));
    let count = format!("--count={ENOUGH}");
    let who = client.name();
    let asked = client.ask(["http-client", "--mapped", &count, "--url", &url(vip, HTTP, "")])?;
    all_answer(&format!("{who}: connect"), &replies(asked)?, names, http)?;
    for more in [&["--new-socket"][..], &["--new-socket", "--connected"], &["--source-port=4444"]] {
        let to = dns.to_string();
        let args =
            ["udp-client", "--mapped", &count, "--to", &to].into_iter().chain(more.iter().copied());
        let answers = replies(client.ask(args)?).with_context(|| format!("{who}: UDP {more:?}"))?;
        if more.len() == 1 && more[0].starts_with("--source") {
            ensure!(answers.iter().all(|reply| reply.from == dns), "{who}: {answers:?}");
        } else {
            all_answer(&format!("{who}: UDP {more:?}"), &answers, names, dns)?;
        }
    }
    let events = client.ask([
        "tcp-client",
        "--mapped",
        "--count=3",
        "--interval-ms=0",
        "--to",
        &echo.to_string(),
    ])?;
    let peer = events.iter().find_map(peer_of);
    ensure!(peer == Some(echo), "{who}: getpeername() says {peer:?}: {events:?}");
    ensure!(replies(events)?.len() == 3);
    Ok(())
}

fn peer_of(event: &Event) -> Option<SocketAddr> {
    if let Event::Connected { peer, .. } = event { Some(*peer) } else { None }
}

#[test]
fn a_v6_socket_that_speaks_v4_is_served_as_a_v4_socket() -> Result<()> {
    if skip("a_v6_socket_that_speaks_v4") {
        return Ok(());
    }
    let mut cluster = Cluster::new("mapped", &Plan::default())?;
    for mode in ["all", "off"] {
        cluster.change_agents(&["--socket-path", mode])?;
        let before = counted(cluster.node(), "web")?;
        mapped_sockets_reach(&cluster.client, cluster_ip(WEB)[0], &cluster.names())
            .context(mode)?;
        mapped_sockets_reach(cluster.node(), cluster_ip(WEB)[0], &cluster.names()).context(mode)?;
        let after = counted(cluster.node(), "web")? - before;
        ensure!((after.calls > 0) == (mode == "all"), "{mode}: {after:?}");
    }
    Ok(())
}

#[test]
fn getpeername_shows_the_vip() -> Result<()> {
    if skip("getpeername_shows_the_vip") {
        return Ok(());
    }
    let mut cluster = Cluster::new("peername", &Plan::default())?;
    for mode in ["all", "off"] {
        cluster.change_agents(&["--socket-path", mode])?;
        for client in [&*cluster.client, &**cluster.node()] {
            for vip in cluster_ip(WEB) {
                for (kind, port) in [("tcp-client", ECHO), ("udp-client", DNS)] {
                    let to = SocketAddr::new(vip, port);
                    let text = to.to_string();
                    let mut args = vec![kind, "--count=2", "--to", &text];
                    if kind == "udp-client" {
                        args.push("--connected");
                    }
                    let events = client.ask(args)?;
                    let peer = events.iter().find_map(peer_of);
                    ensure!(peer == Some(to), "{mode} {kind} {to}: {peer:?}");
                    ensure!(replies(events)?.len() == 2);
                }
            }
        }
    }
    Ok(())
}

/// Returns how soon a TCP client learns that nobody serves, and checks that it learns it by a
/// reset.
fn refused(client: &Namespace, to: SocketAddr) -> Result<Duration> {
    let started = Instant::now();
    let events = client.ask(["tcp-client", "--count=1", "--to", &to.to_string()])?;
    let took = started.elapsed();
    match events.first() {
        Some(Event::Broken { reason, .. }) if reason.contains("Connection refused") => Ok(took),
        _ => bail!("{} to {to}: {events:?}", client.name()),
    }
}

/// Checks that a connected UDP client soon learns that nobody serves.
fn unreachable(client: &Namespace, to: SocketAddr) -> Result<()> {
    let events = client.ask(["udp-client", "--connected", "--count=1", "--to", &to.to_string()])?;
    let lost = events.iter().find_map(|event| match event {
        Event::Lost { reason, at_ms, .. } => Some((reason.clone(), *at_ms)),
        Event::Listening { .. }
        | Event::Connected { .. }
        | Event::Reply(_)
        | Event::Broken { .. }
        | Event::Load(_)
        | Event::Done { .. } => None,
    });
    match lost {
        Some((reason, at_ms)) if reason.contains("Connection refused") && at_ms < 500 => Ok(()),
        _ => bail!("{} to {to}: {events:?}", client.name()),
    }
}

#[test]
fn a_service_without_backends_refuses_at_once() -> Result<()> {
    if skip("a_service_without_backends") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("refusals", &Plan::default())?;
    cluster.manifests.write(&service("empty", 20).backends(Vec::<Backend>::new()))?;
    for address in external_ip(20) {
        support::route_to(&cluster.lab, address, cluster.node())?;
    }
    cluster.start_agents(&["--socket-path", "all"])?;
    for mode in ["all", "machine", "off"] {
        cluster.change_agents(&["--socket-path", mode])?;
        let before = support::reasons(cluster.node())?;
        for client in [&*cluster.client, &**cluster.node()] {
            for vip in cluster_ip(20) {
                let took = refused(client, SocketAddr::new(vip, HTTP))?;
                ensure!(
                    took < Duration::from_millis(500),
                    "{mode}: {} was refused after {took:?}",
                    client.name()
                );
                unreachable(client, SocketAddr::new(vip, DNS)).context(mode)?;
            }
        }
        for vip in external_ip(20) {
            let took = refused(&cluster.outside, SocketAddr::new(vip, HTTP))?;
            ensure!(
                took < Duration::from_millis(500),
                "{mode}: the outside was refused after {took:?}"
            );
            unreachable(&cluster.outside, SocketAddr::new(vip, DNS)).context(mode)?;
        }
        let after = support::reasons(cluster.node())?;
        let more = |reason: &str| {
            after.get(reason).copied().unwrap_or_default()
                - before.get(reason).copied().unwrap_or_default()
        };
        // A refused call makes no pod known.
        let (calls, resets) = match mode {
            "all" => (2, 4),
            "machine" => (4, 2),
            _ => (0, 6),
        };
        ensure!(
            more("socket_refused") == calls && more("no_backend_reset") == resets,
            "{mode}: {before:?}, then {after:?}"
        );
        ensure!(more("no_backend_unreachable") == 6, "{mode}: {before:?}, then {after:?}");
    }
    // Backends come, and it is a service like any other.
    let pods = cluster.backends.clone();
    cluster.manifests.write(&service("empty", 20).backends(&pods))?;
    until_backends(cluster.node(), "empty", 2)?;
    reaches(&cluster.client, cluster_ip(20), &cluster.names(), None)
}

#[test]
fn programs_behind_ours_see_every_translated_packet() -> Result<()> {
    if skip("programs_behind_ours") {
        return Ok(());
    }
    let mut cluster = Cluster::new(
        "chain",
        &Plan { near: 1, args: vec!["--socket-path", "off"], ..Plan::default() },
    )?;
    let IpAddr::V4(vip) = cluster_ip(WEB)[0] else { bail!("no v4 address") };
    let IpAddr::V4(outside_vip) = external_ip(WEB)[0] else { bail!("no v4 address") };
    let backend = cluster.backends[0].ipv4();
    let node = cluster.node().clone();
    let (edge, uplink) = (cluster.client.host_device().to_owned(), node.uplink().to_owned());
    for (device, vip, client) in
        [(edge, vip, &*cluster.client), (uplink, outside_vip, &*cluster.outside)]
    {
        // At ingress, packets for the VIP go on to the backend. At egress, packets from the backend
        // go on as from the VIP.
        let counters = [
            node.count_packets(&device, (Way::Ingress, Place::Last), (Side::Destination, backend))?,
            node.count_packets(&device, (Way::Egress, Place::Last), (Side::Source, vip))?,
            node.count_packets(&device, (Way::Ingress, Place::Last), (Side::Destination, vip))?,
            node.count_packets(&device, (Way::Egress, Place::Last), (Side::Source, backend))?,
        ];
        let before = counted(&node, "web")?;
        let asked = client.http_get(&url(vip.into(), HTTP, ""), 10)?;
        ensure!(asked.iter().all(|reply| reply.name == "near-1"), "{asked:?}");
        let more = counted(&node, "web")? - before;
        let seen: Vec<u64> = counters.iter().map(Counter::packets).collect::<Result<_>>()?;
        println!("{device}: {more:?}, behind us {seen:?}");
        ensure!(more.forward >= 40 && more.reply >= 40, "{device}: {more:?}");
        ensure!(
            seen == [more.forward, more.reply, 0, 0],
            "{device}: {more:?}, but behind us {seen:?}"
        );
    }
    // Other packets go on unchanged.
    let stranger = cluster.backends[0].host_device().to_owned();
    let counter =
        node.count_packets(&stranger, (Way::Egress, Place::Last), (Side::Destination, backend))?;
    cluster.client.ping(backend)?;
    ensure!(counter.packets()? >= 1, "a ping did not get past us");
    drop(counter);
    let _ = cluster.agent();
    Ok(())
}

#[test]
fn a_filter_of_somebody_else_at_an_egress_sees_real_addresses() -> Result<()> {
    if skip("a_filter_of_somebody_else") {
        return Ok(());
    }
    let cluster = Cluster::new(
        "clsact",
        &Plan { near: 1, args: vec!["--socket-path", "off"], ..Plan::default() },
    )?;
    let (node, backend) = (cluster.node().clone(), cluster.backends[0].ipv4());
    let device = cluster.client.host_device().to_owned();
    let hooks = |wanted: &'static str| {
        let (node, device) = (node.clone(), device.clone());
        until(&format!("{device} with {wanted}"), move || {
            let status = status(&node)?;
            let devices =
                status.get("devices").and_then(|all| all.as_array()).cloned().unwrap_or_default();
            let own = devices.iter().find(|one| word(one, "name") == device);
            Ok(own
                .and_then(|own| own.get("hooks"))
                .map(ToString::to_string)
                .filter(|all| all.contains(wanted)))
        })
    };
    ensure!(!hooks("tcx")?.contains("clsact"));
    let counter = Counter::load(Side::Source, backend)?;
    let pin = node.bpffs().join("foreign");
    counter.pin(&pin)?;
    let _ = node.run("tc", ["qdisc", "replace", "dev", &device, "clsact"])?;
    let pin = pin.display().to_string();
    let _ = node.run(
        "tc",
        [
            "filter",
            "add",
            "dev",
            &device,
            "egress",
            "pref",
            "7",
            "bpf",
            "da",
            "object-pinned",
            &pin,
        ],
    )?;
    let _ = hooks("clsact")?;
    let before = counter.packets()?;
    let counted_before = counted(&node, "web")?;
    let vip = cluster_ip(WEB)[0];
    let asked = cluster.client.http_get(&url(vip, HTTP, ""), 10)?;
    ensure!(asked.iter().all(|reply| reply.from == SocketAddr::new(vip, HTTP)), "{asked:?}");
    let more = counted(&node, "web")? - counted_before;
    let seen = counter.packets()? - before;
    ensure!(more.reply >= 40 && seen == more.reply, "{more:?}, but the filter saw {seen}");
    Ok(())
}

#[test]
fn one_client_port_reaches_one_backend_by_two_vips() -> Result<()> {
    if skip("one_client_port") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("clash", &Plan { near: 1, ..Plan::default() })?;
    let pods = cluster.backends.clone();
    cluster.manifests.write(&service("second", 20).backends(&pods))?;
    cluster.start_agents(&[])?;
    for mode in ["all", "off"] {
        cluster.change_agents(&["--socket-path", mode])?;
        for family in 0..2 {
            let port = format!("--source-port={}", 41_000 + family);
            let to = |number| SocketAddr::new(cluster_ip(number)[family], ECHO).to_string();
            let direct = SocketAddr::new(
                addresses_of_pod(&cluster.backends[0])[family],
                support::ECHO_TARGET,
            );
            let targets = [to(WEB), to(20), direct.to_string()];
            let mut open = Vec::new();
            for target in &targets {
                let args = ["tcp-client", &port, "--interval-ms=20", "--to", target];
                let mut client = cluster.client.tool(args)?;
                let _ = client
                    .wait_event("it is answered", SOON, |event| matches!(event, Event::Reply(_)))
                    .with_context(|| {
                        format!("{mode}: from one port to {target}, with {} before", open.len())
                    })?;
                open.push(client);
            }
            // All of them go on at the same time.
            for (client, target) in open.iter_mut().zip(&targets) {
                let last = client.events().len();
                client
                    .wait_until("it goes on", SOON, |this| {
                        (this.events().len() > last + 5).then_some(())
                    })
                    .with_context(|| format!("{mode}: {target}"))?;
                let answers: Vec<Reply> = client.replies();
                ensure!(
                    answers
                        .iter()
                        .all(|reply| reply.name == "near-1" && reply.from.to_string() == *target),
                    "{answers:?}"
                );
            }
        }
        // The same for UDP, where each of two sockets gets its own answers.
        for vip in cluster_ip(WEB) {
            let other = cluster_ip(20)[usize::from(vip.is_ipv6())];
            let ask = |vip: IpAddr| {
                let to = SocketAddr::new(vip, DNS).to_string();
                cluster.client.tool([
                    "udp-client",
                    "--connected",
                    "--source-port=42000",
                    "--count=20",
                    "--interval-ms=10",
                    "--to",
                    &to,
                ])
            };
            let mut pair = [ask(vip)?, ask(other)?];
            for (client, vip) in pair.iter_mut().zip([vip, other]) {
                let _ = client.wait(SOON)?;
                let answers = replies(client.events())?;
                ensure!(
                    answers.len() == 20 && answers.iter().all(|reply| reply.from.ip() == vip),
                    "{mode}: {answers:?}"
                );
            }
        }
    }
    let flows = support::listed(cluster.node(), &["flows"])?;
    ensure!(!flows.is_empty() && flows.iter().all(|flow| number(flow, "idle_seconds") < 600));
    Ok(())
}

/// Uses a client port through a VIP, and then to the backend's own address.
fn speaks_through_the_vip_then_directly(cluster: &Cluster, client: &Namespace) -> Result<()> {
    for (family, vip) in cluster_ip(WEB).into_iter().enumerate() {
        let backend = addresses_of_pod(&cluster.backends[0])[family];
        for (kind, more, port, target) in [
            ("tcp-client", "--interval-ms=0", ECHO, support::ECHO_TARGET),
            ("udp-client", "--connected", DNS, support::DNS_TARGET),
        ] {
            // The connection through the VIP has ended, but its entries are still in the maps.
            for to in [SocketAddr::new(vip, port), SocketAddr::new(backend, target)] {
                let text = to.to_string();
                let source = format!("--source-port={}", 43_000 + family);
                let args = [kind, more, "--count=3", &source, "--to", &text];
                let answers = replies(client.ask(args)?).with_context(|| format!("{kind} {to}"))?;
                all_answer(&format!("{kind} {to}"), &answers, &["near-1"], to)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_pods_port_that_has_used_a_vip_connects_to_its_backend_directly() -> Result<()> {
    if skip("a_pods_port_that_has_used_a_vip") {
        return Ok(());
    }
    let plan = Plan { near: 1, args: vec!["--socket-path", "off"], ..Plan::default() };
    let cluster = Cluster::new("direct", &plan)?;
    speaks_through_the_vip_then_directly(&cluster, &cluster.client)
}
