//! The data that is kept with a socket whose calls are translated: the destination that it asked
//! for, and the source of its answers.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::support;
use crate::support::{
    Cluster, DNS, Plan, SOON, WEB, cluster_ip, replies, service, skip, until_backends,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::{Event, Running, Serve};

/// Number of sockets that one pod makes: more than any of our maps has room for.
const MANY: u32 = 150_000;

#[test]
fn a_pod_with_many_sockets_pushes_out_nobody_elses_answers() -> Result<()> {
    if skip("a_pod_with_many_sockets") {
        return Ok(());
    }
    let plan = Plan { near: 0, args: vec!["--socket-path", "all"], ..Plan::default() };
    let mut cluster = Cluster::without_agents("many", &plan)?;
    let node = cluster.node().clone();
    let (server, greedy) = (node.pod("server")?, node.pod("greedy")?);
    cluster.manifests.write(&service("slow", 20).backends([&server]))?;
    cluster.manifests.write(&service("other", 21).backends([&greedy]))?;
    let mut echo = server.serve(Serve::UdpEcho, support::DNS_TARGET)?;
    cluster.start_agents(&plan.args)?;
    until_backends(&node, "other", 1)?;
    for (vip, flooded) in cluster_ip(20).into_iter().zip(cluster_ip(21)) {
        let to = SocketAddr::new(vip, DNS);
        // The server answers after the others have sent their requests.
        echo.signal(libc::SIGSTOP)?;
        let told = to.to_string();
        let mut waiting =
            cluster.client.tool(["udp-client", "--timeout-ms=60000", "--to", &told])?;
        let asked = format!("question to {to}");
        support::until(&asked, || {
            let queue = server.run("ss", ["-H", "-u", "-n", "-a", "sport", "=", ":5353"])?;
            let received = queue.split_whitespace().nth(1).is_some_and(|bytes| bytes != "0");
            Ok(received.then_some(()))
        })?;
        let flood = SocketAddr::new(flooded, DNS).to_string();
        let done = greedy.ask(["udp-flood", &format!("--count={MANY}"), "--to", &flood])?;
        ensure!(
            matches!(done[..], [Event::Done { sent, .. }] if sent == u64::from(MANY)),
            "{done:?}"
        );
        echo.signal(libc::SIGCONT)?;
        let _ = waiting.wait(2 * SOON).with_context(|| asked.clone())?;
        let answers = replies(waiting.events()).context(asked)?;
        let from: Vec<SocketAddr> = answers.iter().map(|reply| reply.from).collect();
        ensure!(from == [to], "answers as from {from:?}, not {to}");
    }
    Ok(())
}

#[test]
fn an_unconnected_socket_stays_with_its_endpoint_while_that_one_serves() -> Result<()> {
    if skip("an_unconnected_socket_stays") {
        return Ok(());
    }
    let plan = Plan { near: 5, args: vec!["--socket-path", "all"], ..Plan::default() };
    let cluster = Cluster::new("stays", &plan)?;
    let node = cluster.node().clone();
    let web = |count: usize| {
        cluster.manifests.write(&cluster.web().backends(&cluster.backends[..count]))?;
        until_backends(&node, "web", count)
    };
    web(3)?;
    let mut clients = Vec::new();
    for number in 0..16 {
        let vip = cluster_ip(WEB)[number % 2];
        let to = SocketAddr::new(vip, DNS).to_string();
        let client = if number % 4 < 2 { &*cluster.client } else { &**cluster.node() };
        clients.push(client.tool([
            "udp-client",
            "--count=3000",
            "--interval-ms=20",
            "--to",
            &to,
        ])?);
    }
    let more =
        |clients: &mut [Running]| clients.iter_mut().try_for_each(|client| client.goes_on(4, SOON));
    more(&mut clients)?;
    // Other endpoints come, and go again.
    for count in [5, 3, 4, 3] {
        web(count)?;
        more(&mut clients)?;
    }
    let mut chosen = BTreeSet::new();
    for client in &clients {
        let names: BTreeSet<String> =
            client.replies().into_iter().map(|reply| reply.name).collect();
        ensure!(names.len() == 1, "one socket was answered by {names:?}");
        chosen.extend(names);
    }
    ensure!(chosen.len() > 1, "all sockets were answered by {chosen:?}");
    // The control: sockets whose endpoint goes are answered by another one.
    web(1)?;
    for client in &mut clients {
        client.wait_until("the first endpoint answers", SOON, |this| {
            this.replies().last().is_some_and(|reply| reply.name == "near-1").then_some(())
        })?;
    }
    Ok(())
}

#[test]
fn one_socket_asks_a_frontend_and_the_endpoint_itself() -> Result<()> {
    if skip("one_socket_asks_a_frontend_and_the_endpoint") {
        return Ok(());
    }
    let cluster = Cluster::new("itself", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node();
    until_backends(node, "web", 1)?;
    let endpoint = support::addresses_of_pod(&cluster.backends[0]);
    let frontends = cluster_ip(WEB).map(|vip| SocketAddr::new(vip, DNS));
    let all =
        frontends.into_iter().zip(endpoint.map(|ip| SocketAddr::new(ip, support::DNS_TARGET)));
    for (frontend, endpoint) in all {
        for client in [&*cluster.client, &**node] {
            // A pod's calls are translated at the socket from the second one on.
            let _ = client.udp_ask(frontend, 2)?;
            for (to, beside) in [(frontend, endpoint), (endpoint, frontend)] {
                let (told, beside_told) = (to.to_string(), beside.to_string());
                let before = support::counted(node, "web:dns")?.calls;
                let asked = client.ask([
                    "udp-client",
                    "--count=6",
                    "--to",
                    &told,
                    "--beside",
                    &beside_told,
                ])?;
                let from: Vec<SocketAddr> =
                    replies(asked)?.iter().map(|reply| reply.from).collect();
                ensure!(
                    from == [to, beside, to, beside, to, beside],
                    "{}: {from:?}",
                    client.name()
                );
                let calls = support::counted(node, "web:dns")?.calls - before;
                ensure!(calls == 3, "{}: {calls} calls at the socket", client.name());
            }
        }
    }
    Ok(())
}
