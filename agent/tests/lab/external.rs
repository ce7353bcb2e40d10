//! Clients outside, at node ports, load balancers' and external addresses, with backends on this
//! node and on another one.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use crate::support;
use crate::support::{
    Cluster, DNS, DNS_TARGET, ECHO, ECHO_TARGET, ENOUGH, HTTP, HTTP_TARGET, Pair, Plan, SOON,
    STREAM, STREAM_TARGET, WEB, addresses_of_client, addresses_of_node, addresses_of_pod,
    all_answer, cluster_ip, external_ip, reasons, received, replies, skip, transfers,
    unless_unsupported, until, url,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::{
    Cni, DROP_INVALID, Event, Namespace, NodeOptions, Overlay, Port, Reply, Running, Service,
};

/// Node ports of [`web`].
const NODE_HTTP: u16 = 30_080;
const NODE_DNS: u16 = 30_053;
/// A further port with a node port.
const MORE: u16 = 70;
const NODE_MORE: u16 = 30_070;

/// Returns the service `web` with node ports.
fn web(cluster: &Cluster) -> Service {
    let [cluster4, cluster6] = cluster_ip(WEB);
    let [external4, external6] = external_ip(WEB);
    Service::new("web")
        .cluster_ip(cluster4)
        .cluster_ip(cluster6)
        .load_balancer_ip(external4)
        .load_balancer_ip(external6)
        .port(Port::tcp("http", HTTP, HTTP_TARGET).node_port(NODE_HTTP))
        .port(Port::udp("dns", DNS, DNS_TARGET).node_port(NODE_DNS))
        .port(Port::tcp("echo", ECHO, ECHO_TARGET))
        .port(Port::tcp("stream", STREAM, STREAM_TARGET))
        .backends(&cluster.backends)
}

/// Returns what a client gets in each way at an address: by TCP, UDP and connected UDP.
fn by_all_ways(
    client: &Namespace,
    address: IpAddr,
    http: u16,
    dns: u16,
) -> Result<Vec<(String, Vec<Reply>)>> {
    let dns = SocketAddr::new(address, dns);
    let what = |way: &str| format!("{} by {way} to {address}", client.name());
    let ways = [
        (what("TCP"), client.http_get(&url(address, http, ""), ENOUGH)),
        (what("UDP"), client.udp_ask(dns, ENOUGH)),
        (what("connected UDP"), client.udp_ask_connected(dns, ENOUGH)),
    ];
    ways.into_iter().map(|(what, replies)| Ok((what.clone(), replies.context(what)?))).collect()
}

/// Checks that a client reaches all backends at an address. Those whose names begin with `near` see
/// it as `near`, the others as one of `far`.
fn sees(
    client: &Namespace,
    address: IpAddr,
    ports: [u16; 2],
    names: &[&str],
    near: IpAddr,
    far: &[IpAddr],
) -> Result<()> {
    for (what, replies) in by_all_ways(client, address, ports[0], ports[1])? {
        let port = if what.contains("UDP") { ports[1] } else { ports[0] };
        all_answer(&what, &replies, names, SocketAddr::new(address, port))?;
        for reply in &replies {
            let seen = reply.seen.ip();
            let right =
                if reply.name.starts_with("near") { seen == near } else { far.contains(&seen) };
            ensure!(right, "{what}: {} saw {seen}, expected {near} or {far:?}", reply.name);
        }
    }
    Ok(())
}

/// Returns every address of a node, as its own `ip` lists them.
fn all_addresses(node: &Namespace) -> Result<Vec<IpAddr>> {
    let text = node.run("ip", ["-o", "address"])?;
    let words = text.split_whitespace().filter_map(|word| word.split('/').next());
    Ok(words.filter_map(|word| word.parse().ok()).collect())
}

fn clients_outside_reach_both_nodes(name: &str, overlay: Overlay, cni: Cni) -> Result<()> {
    let node = NodeOptions { cni, nft: Some(DROP_INVALID.to_owned()), ..NodeOptions::default() };
    let plan = Plan { overlay, node, near: 1, far: 2, args: Vec::new() };
    let mut cluster = Cluster::without_agents(name, &plan)?;
    cluster.manifests.write(&web(&cluster))?;
    cluster.start_agents(&[])?;
    let names: Vec<String> = cluster.names().into_iter().map(str::to_owned).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let client = addresses_of_client(&cluster.outside);
    let own = all_addresses(cluster.node())?;
    for (family, vip) in external_ip(WEB).into_iter().enumerate() {
        sees(&cluster.outside, vip, [HTTP, DNS], &names, client[family], &own)?;
        let address = addresses_of_node(cluster.node())[family];
        sees(&cluster.outside, address, [NODE_HTTP, NODE_DNS], &names, client[family], &own)?;
        transfers(&cluster.outside, vip, 3_000_000)?;
        // A pod keeps its own address in every case.
        let pod = addresses_of_pod(&cluster.client)[family];
        sees(&cluster.client, address, [NODE_HTTP, NODE_DNS], &names, pod, &[pod])?;
        sees(&cluster.client, vip, [HTTP, DNS], &names, pod, &[pod])?;
        // The host's own sockets.
        let http = SocketAddr::new(address, NODE_HTTP);
        all_answer(
            "host",
            &cluster.node().http_get(&url(address, NODE_HTTP, ""), ENOUGH)?,
            &names,
            http,
        )?;
    }
    Ok(())
}

#[test]
fn clients_outside_reach_backends_of_both_nodes_by_plain_routes() -> Result<()> {
    if skip("clients_outside_by_plain_routes") {
        return Ok(());
    }
    clients_outside_reach_both_nodes("out-routes", Overlay::None, Cni::Routed)
}

#[test]
fn clients_outside_reach_backends_of_both_nodes_over_vxlan() -> Result<()> {
    if skip("clients_outside_over_vxlan") {
        return Ok(());
    }
    let bridge = Cni::Bridge { bridge_nf: true };
    unless_unsupported(clients_outside_reach_both_nodes("out-vxlan", Overlay::Vxlan, bridge))
}

#[test]
fn clients_outside_reach_backends_of_both_nodes_over_a_tunnel() -> Result<()> {
    if skip("clients_outside_over_a_tunnel") {
        return Ok(());
    }
    unless_unsupported(clients_outside_reach_both_nodes("out-tun", Overlay::Tun, Cni::Routed))
}

#[test]
fn as_kube_proxy_clients_of_external_addresses_are_masqueraded() -> Result<()> {
    if skip("as_kube_proxy") {
        return Ok(());
    }
    let plan = Plan { near: 1, far: 1, ..Plan::default() };
    let mut cluster = Cluster::without_agents("as-kp", &plan)?;
    cluster.manifests.write(&web(&cluster))?;
    cluster.start_agents(&["--masquerade", "kube-proxy"])?;
    let own = all_addresses(cluster.node())?;
    for vip in external_ip(WEB) {
        for client in [&*cluster.outside, &*cluster.client] {
            for (what, replies) in by_all_ways(client, vip, HTTP, DNS)? {
                let port = if what.contains("UDP") { DNS } else { HTTP };
                all_answer(&what, &replies, &["near-1", "far-1"], SocketAddr::new(vip, port))?;
                let stranger = replies.iter().find(|reply| !own.contains(&reply.seen.ip()));
                ensure!(stranger.is_none(), "{what}: {stranger:?}");
            }
        }
    }
    Ok(())
}

/// Returns both nodes' addresses of a family, where node ports are.
fn node_ports_of(cluster: &Cluster, family: usize) -> [IpAddr; 2] {
    [addresses_of_node(&cluster.nodes[0])[family], addresses_of_node(&cluster.nodes[1])[family]]
}

#[test]
fn a_local_policy_serves_local_backends_alone_and_keeps_the_source() -> Result<()> {
    if skip("a_local_policy") {
        return Ok(());
    }
    let plan = Plan { near: 1, far: 1, ..Plan::default() };
    let mut cluster = Cluster::without_agents("etp", &plan)?;
    cluster.manifests.write(&web(&cluster).spec("externalTrafficPolicy: Local"))?;
    cluster.start_agents(&[])?;
    let client = addresses_of_client(&cluster.outside);
    for (family, client) in client.into_iter().enumerate() {
        for (address, name) in node_ports_of(&cluster, family).into_iter().zip(["near-1", "far-1"])
        {
            for (what, replies) in by_all_ways(&cluster.outside, address, NODE_HTTP, NODE_DNS)? {
                let port = if what.contains("UDP") { NODE_DNS } else { NODE_HTTP };
                all_answer(&what, &replies, &[name], SocketAddr::new(address, port))?;
                ensure!(
                    replies.iter().all(|reply| reply.seen.ip() == client),
                    "{what}: {replies:?}"
                );
            }
        }
        // A pod reaches all backends by the short circuit.
        let vip = external_ip(WEB)[family];
        for (what, replies) in by_all_ways(&cluster.client, vip, HTTP, DNS)? {
            let port = if what.contains("UDP") { DNS } else { HTTP };
            all_answer(&what, &replies, &["near-1", "far-1"], SocketAddr::new(vip, port))?;
        }
    }
    // No local backend is left: packets are dropped, not rejected.
    let far = cluster.backends[1].clone();
    cluster
        .manifests
        .write(&web(&cluster).spec("externalTrafficPolicy: Local").backends([&far]))?;
    support::until_backends(cluster.node(), "web", 1)?;
    let dropped = |cluster: &Cluster| -> Result<u64> {
        Ok(reasons(cluster.node())?.get("no_local_backend").copied().unwrap_or_default())
    };
    let before = dropped(&cluster)?;
    for family in 0..2 {
        let to = SocketAddr::new(addresses_of_node(cluster.node())[family], NODE_HTTP).to_string();
        let events =
            cluster.outside.ask(["tcp-client", "--count=1", "--timeout-ms=300", "--to", &to])?;
        let Some(Event::Broken { reason, .. }) = events.first() else {
            anyhow::bail!("{events:?}")
        };
        ensure!(!reason.contains("refused"), "{reason}");
    }
    ensure!(dropped(&cluster)? > before, "nothing was dropped for its policy");
    Ok(())
}

#[test]
fn only_sources_in_range_reach_a_load_balancer() -> Result<()> {
    if skip("only_sources_in_range") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("ranges", &Plan { near: 1, ..Plan::default() })?;
    let [client4, client6] = addresses_of_client(&cluster.outside);
    let ranges = |v4: &str, v6: &str| format!("loadBalancerSourceRanges: [\"{v4}\", \"{v6}\"]");
    let allowed = ranges(&format!(" {client4}/24"), &format!("{client6}/64 "));
    cluster.manifests.write(&web(&cluster).spec(&allowed))?;
    cluster.start_agents(&[])?;
    let near = ["near-1"];
    for family in 0..2 {
        let vip = external_ip(WEB)[family];
        let client = addresses_of_client(&cluster.outside)[family];
        sees(&cluster.outside, vip, [HTTP, DNS], &near, client, &[])?;
    }
    cluster.manifests.write(&web(&cluster).spec(&ranges("192.0.2.0/24", "2001:db8:dead::/48")))?;
    for family in 0..2 {
        let client = addresses_of_client(&cluster.outside)[family];
        let vip = external_ip(WEB)[family];
        let to = SocketAddr::new(vip, DNS).to_string();
        until("the ranges are in force", || {
            let events = cluster.outside.ask([
                "udp-client",
                "--count=1",
                "--timeout-ms=200",
                "--to",
                &to,
            ])?;
            Ok(events.iter().any(|event| matches!(event, Event::Lost { .. })).then_some(()))
        })?;
        // Pods are no exception. The ranges do not apply to node ports and ClusterIPs.
        let lost =
            cluster.client.ask(["udp-client", "--count=1", "--timeout-ms=200", "--to", &to])?;
        ensure!(lost.iter().any(|event| matches!(event, Event::Lost { .. })), "{lost:?}");
        let address = addresses_of_node(cluster.node())[family];
        sees(&cluster.outside, address, [NODE_HTTP, NODE_DNS], &near, client, &[])?;
        let pod = addresses_of_pod(&cluster.client)[family];
        sees(&cluster.client, cluster_ip(WEB)[family], [HTTP, DNS], &near, pod, &[])?;
    }
    ensure!(reasons(cluster.node())?.get("source_range").is_some_and(|dropped| *dropped >= 4));
    Ok(())
}

#[test]
fn a_client_with_affinity_stays_with_its_backend() -> Result<()> {
    if skip("a_client_with_affinity") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("affinity", &Plan { near: 3, ..Plan::default() })?;
    let sticky = |cluster: &Cluster| web(cluster).spec("sessionAffinity: ClientIP");
    cluster.manifests.write(&sticky(&cluster))?;
    cluster.start_agents(&[])?;
    let ask = |client: &Namespace, vip: IpAddr| -> Result<String> {
        let replies = client.http_get(&url(vip, HTTP, ""), 20)?;
        let shares = Reply::shares(&replies);
        ensure!(shares.len() == 1 && replies.len() == 20, "{} {vip}: {shares:?}", client.name());
        Ok(shares.into_keys().next().unwrap_or_default())
    };
    let pairs: [(&Namespace, Pair); 4] = [
        (&cluster.outside, external_ip(WEB)),
        (&cluster.client, cluster_ip(WEB)),
        (&cluster.client, external_ip(WEB)),
        (cluster.node(), cluster_ip(WEB)),
    ];
    let mut chosen = Vec::new();
    for (client, vips) in pairs {
        for vip in vips {
            chosen.push(ask(client, vip)?);
        }
    }
    // It does not matter which of its addresses was used: affinity belongs to the service port.
    ensure!(chosen[2] == chosen[4] && chosen[3] == chosen[5], "{chosen:?}");
    // The client's backend that leaves is replaced, the others stay: the entries outlive the
    // tables.
    let left = chosen[0].clone();
    let rest: Vec<_> = cluster.backends.iter().filter(|pod| pod.name() != left).cloned().collect();
    cluster.manifests.write(&sticky(&cluster).backends(&rest))?;
    support::until_backends(cluster.node(), "web", 2)?;
    let mut after = Vec::new();
    for (client, vips) in pairs {
        for vip in vips {
            after.push(ask(client, vip)?);
        }
    }
    for (before, now) in chosen.iter().zip(&after) {
        ensure!(*now != left && (*before == left || before == now), "{chosen:?}, then {after:?}");
    }
    Ok(())
}

#[test]
fn a_port_that_a_cluster_ip_does_not_have_is_refused_at_once() -> Result<()> {
    if skip("a_port_that_a_cluster_ip_does_not_have") {
        return Ok(());
    }
    let cluster = Cluster::new("undefined", &Plan { near: 1, ..Plan::default() })?;
    for vip in cluster_ip(WEB) {
        let to = SocketAddr::new(vip, 4444).to_string();
        for client in [&*cluster.client, &**cluster.node()] {
            let events = client.ask(["tcp-client", "--count=1", "--to", &to])?;
            let Some(Event::Broken { reason, at_ms, .. }) = events.first() else {
                anyhow::bail!("{events:?}")
            };
            ensure!(
                reason.contains("refused") && *at_ms < 500,
                "{}: {reason} after {at_ms} ms",
                client.name()
            );
        }
        let events = cluster.client.ask(["udp-client", "--connected", "--count=1", "--to", &to])?;
        let Some(Event::Lost { reason, .. }) =
            events.iter().find(|event| matches!(event, Event::Lost { .. }))
        else {
            anyhow::bail!("{events:?}")
        };
        ensure!(reason.contains("refused"), "{reason}");
    }
    Ok(())
}

/// A connection that repeats its request.
struct Talk {
    what: String,
    client: Running,
}

impl Talk {
    fn start(client: &Namespace, to: SocketAddr) -> Result<Self> {
        let what = format!("{} at {to}", client.name());
        let mut client =
            client.tool(["tcp-client", "--interval-ms=20", "--to", &to.to_string()])?;
        let _ = client
            .wait_event("it is answered", SOON, |event| matches!(event, Event::Reply(_)))
            .with_context(|| what.clone())?;
        Ok(Self { what, client })
    }

    /// Checks that it is answered some more times, by the same backend as before.
    fn goes_on(&mut self, when: &str) -> Result<String> {
        let what = format!("{}, {when}", self.what);
        self.client.goes_on(3, SOON).with_context(|| what.clone())?;
        let mut shares = Reply::shares(&self.client.replies());
        ensure!(shares.len() == 1, "{what}: {shares:?}");
        Ok(shares.pop_first().map(|(name, _)| name).unwrap_or_default())
    }
}

#[test]
fn established_connections_survive_the_removal_of_their_service() -> Result<()> {
    if skip("established_connections_survive") {
        return Ok(());
    }
    let node = NodeOptions { nft: Some(DROP_INVALID.to_owned()), ..NodeOptions::default() };
    let plan = Plan { node, near: 1, far: 1, ..Plan::default() };
    let mut cluster = Cluster::without_agents("outlive", &plan)?;
    let with_echo = |cluster: &Cluster| {
        web(cluster).port(Port::tcp("more", MORE, ECHO_TARGET).node_port(NODE_MORE))
    };
    cluster.manifests.write(&with_echo(&cluster))?;
    // Another Service with a node port.
    let other = Service::new("other")
        .cluster_ip(cluster_ip(20)[0])
        .port(Port::tcp("http", HTTP, HTTP_TARGET).node_port(NODE_HTTP + 1))
        .backends(&cluster.backends);
    cluster.manifests.write(&other)?;
    cluster.start_agents(&["--socket-path", "off"])?;
    let mut open = Vec::new();
    let mut names = BTreeSet::new();
    for family in 0..2 {
        let node = SocketAddr::new(addresses_of_node(cluster.node())[family], NODE_MORE);
        let external = SocketAddr::new(external_ip(WEB)[family], MORE);
        let inside = SocketAddr::new(cluster_ip(WEB)[family], MORE);
        // There are thirty-two, so that both backends have some.
        for _ in 0..4 {
            for (client, to) in [
                (&*cluster.outside, node),
                (&*cluster.outside, external),
                (&*cluster.client, node),
                (&*cluster.client, inside),
            ] {
                open.push(Talk::start(client, to)?);
            }
        }
    }
    for talk in &mut open {
        let _ = names.insert(talk.goes_on("at first")?);
    }
    ensure!(names.len() == 2, "{names:?}");
    cluster.manifests.remove(&web(&cluster))?;
    until("the service goes", || {
        let rows = support::listed(cluster.node(), &["services"])?;
        Ok(rows.iter().all(|row| support::word(row, "service") == "other").then_some(()))
    })?;
    for talk in &mut open {
        let _ = talk.goes_on("without its Service")?;
    }
    // New connections find no backend, and the other Service is not affected.
    for family in 0..2 {
        let to = SocketAddr::new(addresses_of_node(cluster.node())[family], NODE_MORE).to_string();
        let events =
            cluster.outside.ask(["tcp-client", "--count=1", "--timeout-ms=300", "--to", &to])?;
        ensure!(matches!(events.first(), Some(Event::Broken { .. })), "{events:?}");
    }
    let address = addresses_of_node(cluster.node())[0];
    let http = SocketAddr::new(address, NODE_HTTP + 1);
    let replies = cluster.outside.http_get(&url(address, http.port(), ""), ENOUGH)?;
    all_answer("the other", &replies, &["near-1", "far-1"], http)?;
    // Another agent takes over.
    for agent in &mut cluster.agents {
        agent.restart()?;
        agent.wait_ready(3 * SOON)?;
    }
    for talk in &mut open {
        let _ = talk.goes_on("with another agent")?;
    }
    // The Service comes back.
    cluster.manifests.write(&with_echo(&cluster))?;
    support::until_backends(cluster.node(), "web", 2)?;
    for talk in &mut open {
        let _ = talk.goes_on("with its Service back")?;
    }
    let more = SocketAddr::new(address, NODE_MORE).to_string();
    let events =
        cluster.outside.ask(["tcp-client", "--count=1", "--interval-ms=0", "--to", &more])?;
    ensure!(events.iter().any(|event| matches!(event, Event::Reply(_))), "{events:?}");
    Ok(())
}

/// The client has an MTU of 1500, the overlay one of 1450.
#[test]
fn packets_that_are_too_big_for_the_overlay_arrive() -> Result<()> {
    if skip("what_is_too_big_for_the_overlay") {
        return Ok(());
    }
    unless_unsupported(too_big_for_the_overlay())
}

fn too_big_for_the_overlay() -> Result<()> {
    let plan = Plan { overlay: Overlay::Vxlan, near: 0, far: 1, ..Plan::default() };
    let cluster = Cluster::new("fat", &plan)?;
    for vip in external_ip(WEB) {
        transfers(&cluster.outside, vip, 3_000_000)?;
        let to = SocketAddr::new(vip, DNS).to_string();
        // Linux forbids fragmentation of what fits its device: the client learns the smaller MTU,
        // and sends smaller packets the next time.
        let asked = cluster.outside.ask([
            "udp-client",
            "--connected",
            "--size=1440",
            "--count=3",
            "--timeout-ms=300",
            "--to",
            &to,
        ])?;
        ensure!(asked.iter().any(|event| matches!(event, Event::Reply(_))), "{vip}: {asked:?}");
        let family = if vip.is_ipv4() { "-4" } else { "-6" };
        let route = cluster.outside.run("ip", [family, "route", "get", &vip.to_string()])?;
        ensure!(route.contains("mtu 1450"), "{vip}: {route}");
        // Eight kilobytes, in fragments in both directions.
        let asked = cluster.outside.ask([
            "udp-client",
            "--size=8000",
            "--count=5",
            "--timeout-ms=1000",
            "--to",
            &to,
        ])?;
        ensure!(received(&asked).is_some_and(|bytes| bytes > 40_000), "{vip}: {asked:?}");
        let answers = replies(asked)?;
        ensure!(answers.len() == 5, "{vip}: {answers:?}");
    }
    Ok(())
}

#[test]
fn thirty_thousand_connections_of_outside_to_one_backend_of_another_node() -> Result<()> {
    if skip("thirty_thousand_connections") {
        return Ok(());
    }
    let plan = Plan { near: 0, far: 1, ..Plan::default() };
    let mut cluster = Cluster::without_agents("many", &plan)?;
    let pod = cluster.backends[0].clone();
    pod.sysctl("net/core/somaxconn", "65535")?;
    let at = format!("--listen=[::]:{STREAM_TARGET_MANY}");
    cluster.servers.push(pod.tool(["hold", &at, "--name=far-1"])?);
    let many = Port::tcp("many", 1_000, STREAM_TARGET_MANY);
    cluster.manifests.write(&web(&cluster).port(many))?;
    cluster.start_agents(&[])?;
    cluster.outside.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    let to = SocketAddr::new(external_ip(WEB)[0], 1_000).to_string();
    let mut opened = 0;
    let mut refused = None;
    let mut clients = Vec::new();
    // A process may have 20 000 descriptors at most.
    for _ in 0..2 {
        let mut client = cluster.outside.tool([
            "many-client",
            "--count=18000",
            "--hold-ms=60000",
            "--to",
            &to,
        ])?;
        let done = client
            .wait_event("all are open", 9 * SOON, |event| matches!(event, Event::Done { .. }))?;
        let Event::Done { received, elapsed_ms, .. } = done else { anyhow::bail!("{done:?}") };
        println!("{received} connections in {elapsed_ms} ms");
        opened += received;
        refused = client.events().into_iter().find_map(|event| {
            if let Event::Lost { reason, .. } = event { Some(reason) } else { None }
        });
        clients.push(client);
    }
    ensure!(opened > 30_000, "{opened}: {refused:?}");
    // One more connection than there are ports is refused immediately and counted.
    ensure!(refused.as_ref().is_some_and(|reason| reason.contains("refused")), "{refused:?}");
    ensure!(reasons(cluster.node())?.get("ports_exhausted").is_some_and(|count| *count > 0));
    // Other backends and services are not affected.
    let http = SocketAddr::new(external_ip(WEB)[0], HTTP);
    all_answer(
        "others",
        &cluster.outside.http_get(&url(http.ip(), HTTP, ""), 20)?,
        &["far-1"],
        http,
    )?;
    for mut client in clients {
        client.signal(libc::SIGKILL)?;
        let _ = client.wait(SOON)?;
    }
    Ok(())
}

/// A port whose server only holds connections.
const STREAM_TARGET_MANY: u16 = 9_100;
