//! Connections whose flow entries are lost.

use std::net::{IpAddr, SocketAddr};
use std::process::Output;
use std::time::Duration;

use crate::support;
use crate::support::{
    Cluster, DNS, Plan, SOON, WEB, cluster_ip, external_ip, flush, pinned, reasons, skip, until,
};
use anyhow::{Context, Result, bail, ensure};
use sluice_lab::{Event, Node, Running};

/// A port whose backends send a line every two milliseconds. Its client sends only acknowledgments.
const SLOW: u16 = 10;
const SLOW_TARGET: u16 = 9001;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Returns the key of a tuple in the map of its family, as bpftool wants it.
fn key(protocol: u8, source: SocketAddr, destination: SocketAddr) -> Vec<String> {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut bytes = [octets(source.ip()), octets(destination.ip())].concat();
    bytes.extend(source.port().to_ne_bytes());
    bytes.extend(destination.port().to_ne_bytes());
    bytes.extend([protocol, 0, 0, 0]);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs a command on the flow entry of a tuple.
fn entry(
    node: &Node,
    verb: &str,
    protocol: u8,
    source: SocketAddr,
    destination: SocketAddr,
) -> Result<Output> {
    let path = pinned(node, if source.is_ipv4() { "flows_v4" } else { "flows_v6" })?;
    let mut args =
        vec!["map".to_owned(), verb.to_owned(), "pinned".to_owned(), path.display().to_string()];
    args.extend(["key".to_owned(), "hex".to_owned()]);
    args.extend(key(protocol, source, destination));
    node.output("bpftool", args)
}

fn exists(node: &Node, protocol: u8, source: SocketAddr, destination: SocketAddr) -> Result<bool> {
    Ok(entry(node, "lookup", protocol, source, destination)?.status.success())
}

fn delete(node: &Node, protocol: u8, source: SocketAddr, destination: SocketAddr) -> Result<()> {
    let output = entry(node, "delete", protocol, source, destination)?;
    ensure!(
        output.status.success(),
        "cannot delete {source} > {destination}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A client that only reads a stream, and the tuples of its flow.
struct Reader {
    client: Running,
    local: SocketAddr,
    vip: SocketAddr,
    backend: SocketAddr,
}

impl Reader {
    fn start(cluster: &Cluster, outside: bool, vip: IpAddr) -> Result<Self> {
        let vip = SocketAddr::new(vip, SLOW);
        let args = ["stream-client", "--seconds=600", "--to", &vip.to_string()];
        let mut client =
            if outside { cluster.outside.tool(args)? } else { cluster.client.tool(args)? };
        let connected = client.wait_event("it is connected", SOON, |event| {
            matches!(event, Event::Connected { .. })
        })?;
        let Event::Connected { local, .. } = connected else { bail!("{connected:?}") };
        let reply =
            client.wait_event("its first line", SOON, |event| matches!(event, Event::Reply(_)))?;
        let Event::Reply(reply) = reply else { bail!("{reply:?}") };
        let pod =
            cluster.backends.iter().find(|pod| pod.name() == reply.name).context("a stranger")?;
        let address: IpAddr = if local.is_ipv4() { pod.ipv4().into() } else { pod.ipv6().into() };
        Ok(Self { client, local, vip, backend: SocketAddr::new(address, SLOW_TARGET) })
    }

    /// Deletes the entries, and waits until both are there again.
    fn survives(&mut self, node: &Node, forward: bool, reply: bool) -> Result<()> {
        let what =
            format!("{self:?} without its forward entry ({forward}), its reply entry ({reply})");
        until("both entries", || self.has_both(node)).context(what.clone())?;
        if forward {
            delete(node, TCP, self.local, self.vip).context(what.clone())?;
        }
        if reply {
            delete(node, TCP, self.backend, self.local).context(what.clone())?;
        }
        until("both entries again", || self.has_both(node)).context(what.clone())?;
        // It still reads: it would have ended with an error.
        std::thread::sleep(Duration::from_millis(100));
        ensure!(self.client.poll()?.is_none(), "{what}: {:?}", self.client.events());
        Ok(())
    }

    fn has_both(&self, node: &Node) -> Result<Option<()>> {
        let both = exists(node, TCP, self.local, self.vip)?
            && exists(node, TCP, self.backend, self.local)?;
        Ok(both.then_some(()))
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} > {} ({})", self.local, self.vip, self.backend)
    }
}

#[test]
fn a_stream_survives_the_loss_of_either_flow_entry_and_of_both() -> Result<()> {
    if skip("a_stream_survives_the_loss") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("lost", &Plan { near: 2, ..Plan::default() })?;
    for pod in cluster.backends.clone() {
        let at = format!("--listen=[::]:{SLOW_TARGET}");
        let name = format!("--name={}", pod.name());
        cluster.servers.push(pod.tool(["stream", "--interval-ms=2", &at, &name])?);
    }
    let slow = sluice_lab::Port::tcp("slow", SLOW, SLOW_TARGET);
    cluster.manifests.write(&cluster.web().port(slow))?;
    cluster.start_agents(&["--socket-path", "off"])?;
    let node = cluster.node().clone();
    let mut readers = Vec::new();
    for family in 0..2 {
        readers.push(Reader::start(&cluster, false, cluster_ip(WEB)[family])?);
        readers.push(Reader::start(&cluster, true, external_ip(WEB)[family])?);
    }
    for (forward, reply) in [(true, false), (false, true), (true, true)] {
        let before = reasons(&node)?;
        for reader in &mut readers {
            reader.survives(&node, forward, reply)?;
        }
        let after = reasons(&node)?;
        println!("lost forward {forward}, reply {reply}: {before:?}, then {after:?}");
        let more = |reason: &str| {
            after.get(reason).copied().unwrap_or_default()
                - before.get(reason).copied().unwrap_or_default()
        };
        let recovered = more("recovered") + more("reply_recovered");
        ensure!(recovered >= readers.len() as u64, "{recovered} packets made flows again");
    }
    Ok(())
}

#[test]
fn udp_goes_on_at_once_without_its_entries_and_soon_without_its_reply_entry() -> Result<()> {
    if skip("udp_goes_on_at_once") {
        return Ok(());
    }
    let cluster = Cluster::new("lost-udp", &Plan { near: 2, ..Plan::default() })?;
    let node = cluster.node().clone();
    let mut clients = Vec::new();
    for vip in cluster_ip(WEB) {
        let to = SocketAddr::new(vip, DNS).to_string();
        // The pause is long enough to delete between two requests.
        let args =
            ["--connected", "--count=100", "--interval-ms=400", "--timeout-ms=300", "--to", &to];
        clients.push(cluster.client.tool(["udp-client"].into_iter().chain(args))?);
    }
    let lost = |client: &Running| {
        client.events().iter().filter(|event| matches!(event, Event::Lost { .. })).count()
    };
    for client in &mut clients {
        let _ = client.wait_event(
            "an answer when it is more than a question",
            SOON,
            |event| matches!(event, Event::Reply(reply) if reply.seq == 8),
        )?;
    }
    for map in ["flows_v4", "flows_v6"] {
        ensure!(flush(&node, map)? == 2, "not one flow in {map}");
    }
    for client in &mut clients {
        let last = client.events().len();
        client.wait_until("it goes on", SOON, |this| {
            (this.events().len() > last + 2).then_some(())
        })?;
        ensure!(lost(client) == 0, "{:?}", client.events());
    }
    // The reply entry alone: the forward one makes it again when it is renewed, within eleven
    // seconds.
    for (client, vip) in clients.iter_mut().zip(cluster_ip(WEB)) {
        let events = client.events();
        let local = events.iter().find_map(|event| {
            if let Event::Connected { local, .. } = event { Some(*local) } else { None }
        });
        let name = events.iter().rev().find_map(|event| {
            if let Event::Reply(reply) = event { Some(&reply.name) } else { None }
        });
        let pod = cluster
            .backends
            .iter()
            .find(|pod| Some(&pod.name().to_owned()) == name)
            .context("a backend")?;
        let address: IpAddr = if vip.is_ipv4() { pod.ipv4().into() } else { pod.ipv6().into() };
        let backend = SocketAddr::new(address, support::DNS_TARGET);
        let local = local.context("a client")?;
        // It is a stream again, with an entry to delete, once it has gone on for two seconds.
        until("the flow is a proven one again", || {
            Ok(exists(&node, UDP, backend, local)?.then_some(()))
        })?;
        delete(&node, UDP, backend, local)?;
    }
    for client in &mut clients {
        let seen = client.events().len();
        let more = |this: &Running| {
            this.events().into_iter().skip(seen).any(|event| matches!(event, Event::Reply(_)))
        };
        client.wait_until("it is answered again", 2 * SOON, |this| {
            (lost(this) > 0 && more(this)).then_some(())
        })?;
        println!("{} requests went without an answer", lost(client));
    }
    Ok(())
}
