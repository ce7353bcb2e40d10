//! Changes under traffic: backends leave, the agent is killed and comes back, manifests are edited.
//! Nothing breaks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use crate::support::{
    Cluster, DNS, ECHO, ENOUGH, HTTP, Plan, SOON, WEB, all_answer, cluster_ip, external_ip, listed,
    number, reaches, skip, until, until_backends, url, word,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::{Event, Namespace, Node, Reply, Running};

/// Long-lived connections from everywhere, by both paths and families.
struct Connections(Vec<Running>);

impl Connections {
    fn open(cluster: &Cluster, each: usize) -> Result<Self> {
        let mut open = Vec::new();
        let clients: [(&Namespace, [_; 2]); 3] = [
            (&cluster.client, cluster_ip(WEB)),
            (cluster.node(), cluster_ip(WEB)),
            (&cluster.outside, external_ip(WEB)),
        ];
        for (client, vips) in clients {
            for vip in vips {
                let to = SocketAddr::new(vip, ECHO).to_string();
                for _ in 0..each {
                    open.push(client.tool(["tcp-client", "--interval-ms=40", "--to", &to])?);
                }
            }
        }
        for client in &mut open {
            let _ = client
                .wait_event("it is answered", SOON, |event| matches!(event, Event::Reply(_)))?;
        }
        Ok(Self(open))
    }

    /// Checks that all go on, each with the backend that it has had.
    fn live(&mut self, when: &str) -> Result<()> {
        for client in &mut self.0 {
            client.goes_on(2, SOON).with_context(|| format!("a connection broke {when}"))?;
            let shares = Reply::shares(&client.replies());
            ensure!(shares.len() == 1, "a connection {when}: {shares:?}");
        }
        Ok(())
    }

    fn names(&self) -> BTreeSet<String> {
        self.0.iter().filter_map(|client| client.replies().pop()).map(|reply| reply.name).collect()
    }
}

/// Short requests, one after the other, that go on until they are ended.
struct Traffic(Vec<Running>);

impl Traffic {
    fn start(cluster: &Cluster) -> Result<Self> {
        let mut running = Vec::new();
        let (inside, outside) = (cluster_ip(WEB), external_ip(WEB));
        for (client, vip) in [
            (&*cluster.client, inside[0]),
            (&**cluster.node(), inside[1]),
            (&*cluster.outside, outside[0]),
        ] {
            running.push(client.tool([
                "http-client",
                "--count=1000000",
                "--interval-ms=8",
                "--url",
                &url(vip, HTTP, ""),
            ])?);
            let to = SocketAddr::new(vip, DNS).to_string();
            running.push(client.tool([
                "udp-client",
                "--new-socket",
                "--connected",
                "--count=1000000",
                "--interval-ms=8",
                "--to",
                &to,
            ])?);
        }
        for client in &mut running {
            let _ = client
                .wait_event("it is answered", SOON, |event| matches!(event, Event::Reply(_)))?;
        }
        Ok(Self(running))
    }

    /// Checks that every request so far was answered, and that there were some since the last time.
    fn unharmed(&mut self, when: &str) -> Result<()> {
        for client in &mut self.0 {
            client.goes_on(2, SOON).with_context(|| format!("requests ended {when}"))?;
            let lost: Vec<_> = client
                .events()
                .into_iter()
                .filter(|event| matches!(event, Event::Lost { .. }))
                .collect();
            ensure!(lost.is_empty(), "lost {when}: {lost:?}");
        }
        Ok(())
    }

    fn count(&self) -> usize {
        self.0.iter().map(|client| client.replies().len()).sum()
    }
}

/// Returns the ids in the maps: of service ports by family, of backends.
fn ids(node: &Node) -> Result<BTreeMap<String, u64>> {
    let mut ids = BTreeMap::new();
    for row in listed(node, &["services"])? {
        let vip = row
            .get("vips")
            .and_then(|vips| vips.get(0))
            .map(ToString::to_string)
            .unwrap_or_default();
        let _ = ids.insert(format!("{} {vip}", word(&row, "service")), number(&row, "id"));
    }
    for row in listed(node, &["backends"])? {
        let what = format!(
            "{} {} {}",
            word(&row, "service"),
            word(&row, "port_name"),
            word(&row, "backend")
        );
        let _ = ids.insert(what, number(&row, "id"));
    }
    ensure!(ids.len() > 10, "{ids:?}");
    Ok(ids)
}

/// Backends of a service port by state.
fn states(node: &Node, service: &str) -> Result<BTreeMap<String, usize>> {
    let mut states = BTreeMap::new();
    for row in listed(node, &["backends", service])? {
        *states.entry(word(&row, "state").to_owned()).or_insert(0) += 1;
    }
    Ok(states)
}

fn connections_survive(name: &str, mode: &'static str) -> Result<()> {
    let plan = Plan { near: 3, args: vec!["--socket-path", mode], ..Plan::default() };
    let mut cluster = Cluster::new(name, &plan)?;
    let node = cluster.node().clone();
    // Eight from each of six places, so that every backend has some, except once in ten million
    // times.
    let mut connections = Connections::open(&cluster, 8)?;
    ensure!(
        connections.names().len() == 3,
        "not every backend has a connection: {:?}",
        connections.names()
    );
    let mut traffic = Traffic::start(&cluster)?;

    let two = cluster.backends[..2].to_vec();
    cluster.manifests.write(&cluster.web().backends(&two))?;
    until_backends(&node, "web", 2)?;
    let http = SocketAddr::new(cluster_ip(WEB)[0], HTTP);
    for client in [&*cluster.client, &*node] {
        let replies = client.http_get(&url(http.ip(), HTTP, ""), ENOUGH)?;
        all_answer("without near-3", &replies, &["near-1", "near-2"], http)?;
    }
    connections.live("when its backend left")?;
    traffic.unharmed("when a backend left")?;
    println!("{mode}: after a backend left: {:?}", states(&node, "web:echo")?);

    let before = ids(&node)?;
    cluster.agent().kill9()?;
    connections.live("without an agent")?;
    traffic.unharmed("without an agent")?;
    reaches(&cluster.client, cluster_ip(WEB), &["near-1", "near-2"], None)?;
    cluster.agent().restart()?;
    cluster.agent().wait_ready(3 * SOON)?;
    connections.live("when the agent came back")?;
    traffic.unharmed("when the agent came back")?;
    let after = ids(&node)?;
    ensure!(before == after, "ids were {before:?}, are {after:?}");

    // The manifest is edited while the agent is away, and while it runs.
    cluster.agent().stop()?;
    cluster.manifests.write(&cluster.web())?;
    traffic.unharmed("when the agent was stopped")?;
    cluster.agent().restart()?;
    cluster.agent().wait_ready(3 * SOON)?;
    until_backends(&node, "web", 3)?;
    reaches(&cluster.client, cluster_ip(WEB), &["near-1", "near-2", "near-3"], None)?;
    for _ in 0..5 {
        cluster.manifests.write(&cluster.web().backends(&cluster.backends[1..]))?;
        until_backends(&node, "web", 2)?;
        cluster.manifests.write(&cluster.web())?;
        until_backends(&node, "web", 3)?;
    }
    connections.live("when its manifest was edited")?;
    traffic.unharmed("when a manifest was edited")?;
    println!("{mode}: {} requests were answered, none lost", traffic.count());
    Ok(())
}

#[test]
fn by_the_socket_path_nothing_breaks_when_backends_agent_and_manifests_change() -> Result<()> {
    if skip("by_the_socket_path_nothing_breaks") {
        return Ok(());
    }
    connections_survive("changes-socket", "all")
}

#[test]
fn by_the_tc_path_nothing_breaks_when_backends_agent_and_manifests_change() -> Result<()> {
    if skip("by_the_tc_path_nothing_breaks") {
        return Ok(());
    }
    connections_survive("changes-tc", "off")
}

#[test]
fn shares_follow_the_backends() -> Result<()> {
    if skip("shares_follow_the_backends") {
        return Ok(());
    }
    let cluster = Cluster::new("shares", &Plan { near: 3, ..Plan::default() })?;
    let node = cluster.node().clone();
    let vip = cluster_ip(WEB)[0];
    for (count, fair) in [(3, 200), (2, 300), (1, 600), (3, 200)] {
        cluster.manifests.write(&cluster.web().backends(&cluster.backends[..count]))?;
        until_backends(&node, "web", count)?;
        let shares = Reply::shares(&cluster.client.http_get(&url(vip, HTTP, ""), 600)?);
        println!("{count} backends: {shares:?}");
        // Maglev's table is even within a few per cent; chance adds four standard deviations.
        let even = shares.values().all(|share| share.abs_diff(fair) <= 60);
        ensure!(shares.len() == count && even, "{count} backends: {shares:?}");
    }
    // After a service is deleted, nobody answers.
    cluster.manifests.remove(&cluster.web())?;
    until("the service goes", || Ok(listed(&node, &["services"])?.is_empty().then_some(())))?;
    let events = cluster.client.ask([
        "tcp-client",
        "--count=1",
        "--timeout-ms=300",
        "--to",
        &SocketAddr::new(vip, ECHO).to_string(),
    ])?;
    ensure!(events.iter().any(|event| matches!(event, Event::Broken { .. })), "{events:?}");
    Ok(())
}
