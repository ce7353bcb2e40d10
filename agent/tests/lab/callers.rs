//! Calls that are translated at the socket: those of pods whose packets were seen on their way to
//! the Service, and no others.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::support::{
    Cluster, Counted, DNS, ECHO, HTTP, Plan, SOON, WEB, age, cluster_ip, counted, external_ip,
    flush, replies, service, skip, until_backends, url,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::{Cni, Event, Namespace, NodeOptions, Running, Serve};

/// Number of requests of each kind. The first one's caller is not known yet.
const TRIES: u32 = 4;

/// Returns the backends that answer a client at a VIP, by TCP and by UDP, with a socket for each
/// request.
fn answer(client: &Namespace, number: u8) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for vip in cluster_ip(number) {
        let dns = SocketAddr::new(vip, DNS);
        let asked = client
            .http_get(&url(vip, HTTP, ""), TRIES)
            .and_then(|tcp| Ok([tcp, client.udp_ask(dns, TRIES)?]))
            .with_context(|| format!("{} asks {vip}", client.name()))?;
        names.extend(asked.into_iter().flatten().map(|reply| reply.name));
    }
    Ok(names)
}

fn answered_by(client: &Namespace, number: u8, name: &str, how: &str) -> Result<()> {
    let names = answer(client, number)?;
    ensure!(
        names.iter().eq([name]),
        "{how}: {} was answered by {names:?}, not {name}",
        client.name()
    );
    Ok(())
}

/// Serves TCP and UDP of a Service in a namespace; at its ports, or at those of a redirect.
fn serve(namespace: &Namespace, ports: [u16; 2]) -> Result<[Running; 2]> {
    Ok([namespace.serve(Serve::Http, ports[0])?, namespace.serve(Serve::UdpEcho, ports[1])?])
}

/// Redirects calls to a Service to other ports, of the namespace itself.
fn redirect(namespace: &Namespace, number: u8, chain: &str, ports: [u16; 2]) -> Result<()> {
    let [v4, v6] = cluster_ip(number);
    let [http, dns] = ports;
    let to_own = [format!("ip daddr {v4}"), format!("ip6 daddr {v6}")].map(|to| {
        format!(
            "{to} tcp dport {HTTP} redirect to :{http}; {to} udp dport {DNS} redirect to :{dns}; "
        )
    });
    let rules = to_own.concat();
    namespace.nft(&format!(
        "table inet own {{ chain {chain} {{ type nat hook {chain} priority -100; {rules}}}; }}\n"
    ))
}

/// Gives a namespace a Service's addresses.
fn have(namespace: &Namespace, number: u8) -> Result<()> {
    let [v4, v6] = cluster_ip(number);
    namespace.ip(&format!("addr add {v4}/32 dev lo\naddr add {v6}/128 dev lo nodad")).map(drop)
}

/// Builds a cluster with four Services, all of them with one of its endpoints.
fn four_services(name: &str) -> Result<Cluster> {
    let cluster = Cluster::without_agents(name, &Plan { near: 1, ..Plan::default() })?;
    for (other, number) in [("one", 11), ("two", 12), ("three", 13)] {
        cluster.manifests.write(&service(other, number).backends(&cluster.backends))?;
    }
    Ok(cluster)
}

/// Returns the calls at the socket, and the flows, of a service port.
fn met(cluster: &Cluster, service: &str) -> Result<(u64, u64)> {
    counted(cluster.node(), service).map(|Counted { calls, flows, .. }| (calls, flows))
}

#[test]
fn a_namespace_behind_a_pod_keeps_its_own_services() -> Result<()> {
    if skip("a_namespace_behind_a_pod") {
        return Ok(());
    }
    let mut cluster = four_services("nested")?;
    let nested = cluster.client.nested("nested")?;
    // One Service's addresses are the namespace's own. Those of another are redirected by the pod,
    // as the node of a nested cluster does.
    have(&nested, WEB)?;
    let mut servers = Vec::from(serve(&nested, [HTTP, DNS])?);
    servers.extend(serve(&cluster.client, [1080, 1053])?);
    redirect(&cluster.client, 11, "prerouting", [1080, 1053])?;
    cluster.start_agents(&["--socket-path", "all"])?;
    for round in ["nobody is known", "the pod is known"] {
        answered_by(&nested, WEB, "nested", round)?;
        answered_by(&nested, 11, "client", round)?;
        let before = met(&cluster, "two")?;
        answered_by(&nested, 12, "near-1", round)?;
        let after = met(&cluster, "two")?;
        ensure!(after.0 == before.0 && after.1 > before.1, "{round}: {before:?}, then {after:?}");
        // The pod in front of it is served like any other.
        for number in [WEB, 11, 12] {
            answered_by(&cluster.client, number, "near-1", round)?;
        }
    }
    ensure!(met(&cluster, "two")?.0 > 0, "the pod's calls are not translated at the socket");
    // The control: with the option for all processes, their calls are translated.
    cluster.change_agents(&["--socket-path", "machine"])?;
    let names = answer(&nested, WEB)?;
    ensure!(names.contains("near-1"), "with --socket-path machine: {names:?}");
    Ok(())
}

#[test]
fn what_a_pod_keeps_to_itself_stays_there() -> Result<()> {
    if skip("what_a_pod_keeps_to_itself") {
        return Ok(());
    }
    let mut cluster = four_services("own")?;
    let pod = cluster.client.clone();
    have(&pod, 11)?;
    let mut servers = Vec::from(serve(&pod, [HTTP, DNS])?);
    servers.extend(serve(&pod, [1080, 1053])?);
    // As in a mesh, whose proxy takes a pod's calls.
    redirect(&pod, 12, "output", [1080, 1053])?;
    cluster.start_agents(&["--socket-path", "all"])?;
    for round in ["nobody is known", "the pod is known"] {
        answered_by(&pod, 11, "client", round)?;
        answered_by(&pod, 12, "client", round)?;
        answered_by(&pod, WEB, "near-1", round)?;
    }
    ensure!(met(&cluster, "web")?.0 > 0, "the pod's other calls are not translated at the socket");
    cluster.change_agents(&["--socket-path", "machine"])?;
    for number in [11, 12] {
        let names = answer(&pod, number)?;
        ensure!(names.contains("near-1"), "with --socket-path machine: {names:?}");
    }
    Ok(())
}

/// Returns the peer that a TCP client sees.
fn peer(client: &Namespace, to: SocketAddr) -> Result<Option<SocketAddr>> {
    let events = client.ask(["tcp-client", "--count=1", "--to", &to.to_string()])?;
    let peer = events.iter().find_map(|event| {
        if let Event::Connected { peer, .. } = event { Some(*peer) } else { None }
    });
    let _ = replies(events)?;
    Ok(peer)
}

/// Checks that a pod's first call to a Service is translated per packet, and the next ones at the
/// socket.
fn first_and_later_calls(cluster: &Cluster, what: &str) -> Result<()> {
    let node = cluster.node();
    let _ = flush(node, "callers")?;
    for vips in [cluster_ip(WEB), external_ip(WEB)] {
        for (vip, port, name) in
            vips.into_iter().flat_map(|vip| [(vip, ECHO, "web:echo"), (vip, DNS, "web:dns")])
        {
            let to = SocketAddr::new(vip, port);
            for calls in [0, 1, 1] {
                let before = counted(node, name)?;
                let from = if port == ECHO {
                    peer(&cluster.client, to)?
                } else {
                    cluster.client.udp_ask(to, 1)?.first().map(|reply| reply.from)
                };
                let more = counted(node, name)? - before;
                ensure!(from == Some(to), "{what}: {to} answers as {from:?}");
                ensure!((more.calls, more.flows) == (calls, 1 - calls), "{what}: {to}: {more:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_pods_second_call_to_a_service_is_translated_at_the_socket() -> Result<()> {
    if skip("a_pods_second_call") {
        return Ok(());
    }
    for cni in [Cni::Routed, Cni::Bridge { bridge_nf: false }] {
        let node = NodeOptions { cni, ..NodeOptions::default() };
        let cluster = Cluster::new("second", &Plan { node, ..Plan::default() })?;
        let edge = cluster.client.host_device();
        // With GRO the device polls, which is another path from the pod's end to this one.
        for gro in [false, true] {
            cluster.node().offload(edge, "gro", gro)?;
            first_and_later_calls(&cluster, &format!("{cni:?}, gro {gro}"))?;
        }
    }
    Ok(())
}

/// Starts a socket that repeats its request, and waits for its first answer.
fn asking(client: &Namespace, to: SocketAddr) -> Result<Running> {
    let to = to.to_string();
    let mut client =
        client.tool(["udp-client", "--count=3000", "--interval-ms=20", "--to", &to])?;
    client.wait_until("it is answered", SOON, |this| (!this.replies().is_empty()).then_some(()))?;
    Ok(client)
}

#[test]
fn an_unconnected_socket_keeps_its_way_when_its_pod_gets_known_or_forgotten() -> Result<()> {
    if skip("an_unconnected_socket_keeps_its_way") {
        return Ok(());
    }
    let mut cluster = Cluster::new("way", &Plan { near: 5, ..Plan::default() })?;
    let node = cluster.node().clone();
    until_backends(&node, "web", 5)?;
    let vips = cluster_ip(WEB).map(|vip| SocketAddr::new(vip, DNS));
    let (mut first, mut later) = (Vec::new(), Vec::new());
    for number in 0..12 {
        let vip = vips[number % 2];
        let _ = flush(&node, "callers")?;
        let before = met(&cluster, "web:dns")?;
        first.push(asking(&cluster.client, vip)?);
        ensure!(met(&cluster, "web:dns")?.1 > before.1, "the first socket opened no flow");
        // Sockets that are open already must not be counted among later ones.
        later.push(asking(&cluster.client, vip)?);
    }
    let _ = flush(&node, "callers")?;
    let more =
        |clients: &mut [Running]| clients.iter_mut().try_for_each(|client| client.goes_on(8, SOON));
    for _ in 0..2 {
        more(&mut first)?;
        more(&mut later)?;
        // Another socket makes the pod known once more.
        let _ = cluster.client.udp_ask(vips[0], 2)?;
        let _ = cluster.client.udp_ask(vips[1], 2)?;
    }
    for (clients, what) in [(&first, "packet by packet"), (&later, "at the socket")] {
        for client in clients {
            let names: BTreeSet<String> =
                client.replies().into_iter().map(|reply| reply.name).collect();
            ensure!(names.len() == 1, "one socket that began {what} was answered by {names:?}");
        }
    }
    // None of the first ones is translated at the socket, all of the later ones are.
    later.clear();
    let before = met(&cluster, "web:dns")?.0;
    more(&mut first)?;
    ensure!(
        met(&cluster, "web:dns")?.0 == before,
        "a socket that began packet by packet calls at the socket"
    );
    cluster.agent().stop()
}

/// Leaves a pod one port to connect from.
fn one_port(pod: &Namespace, port: u16) -> Result<()> {
    pod.sysctl("net/ipv4/ip_local_port_range", &format!("{port} {port}"))
}

#[test]
fn a_first_call_disturbs_no_connection_that_was_made_at_the_socket() -> Result<()> {
    if skip("a_first_call_disturbs_no_connection") {
        return Ok(());
    }
    let cluster = Cluster::new("beside", &Plan { near: 1, ..Plan::default() })?;
    until_backends(cluster.node(), "web", 1)?;
    let (node, pod) = (cluster.node(), &cluster.client);
    for family in 0..2 {
        let known = SocketAddr::new(cluster_ip(WEB)[family], ECHO);
        let unknown = SocketAddr::new(external_ip(WEB)[family], ECHO);
        let _ = flush(node, "callers")?;
        let _ = peer(pod, known)?;
        // All connections are from one port to one endpoint, each by a frontend of its own.
        one_port(pod, [45_000, 46_000][family])?;
        let before = met(&cluster, "web:echo")?;
        let to = known.to_string();
        let mut held =
            pod.tool(["tcp-client", "--interval-ms=20", "--timeout-ms=2000", "--to", &to])?;
        let _ =
            held.wait_event("it is answered", SOON, |event| matches!(event, Event::Reply(_)))?;
        ensure!(
            met(&cluster, "web:echo")?.0 == before.0 + 1,
            "{known} is not called at the socket"
        );
        let from = peer(pod, unknown)?;
        ensure!(from == Some(unknown), "{unknown} answers as {from:?}");
        held.goes_on(8, SOON).with_context(|| format!("{known}, then {unknown}"))?;
        pod.sysctl("net/ipv4/ip_local_port_range", "32768 60999")?;
    }
    Ok(())
}

#[test]
fn a_frontend_that_a_pod_begins_to_keep_to_itself_gets_its_own() -> Result<()> {
    if skip("a_frontend_that_a_pod_begins_to_keep") {
        return Ok(());
    }
    let cluster = Cluster::new("begins", &Plan { near: 1, ..Plan::default() })?;
    until_backends(cluster.node(), "web", 1)?;
    let pod = &cluster.client;
    let _servers = serve(pod, [1080, 1053])?;
    for how in ["nobody is known", "the pod is known"] {
        answered_by(pod, WEB, "near-1", how)?;
    }
    redirect(pod, WEB, "output", [1080, 1053])?;
    // The control: a caller that was seen shortly before counts.
    let names = answer(pod, WEB)?;
    ensure!(names.contains("near-1"), "{names:?}");
    let _ = age(cluster.node(), "callers")?;
    for how in ["what was met is long ago", "nothing has been met since"] {
        answered_by(pod, WEB, "client", how)?;
    }
    pod.nft("delete table inet own")?;
    answered_by(pod, WEB, "near-1", "the pod's rules are gone")
}
