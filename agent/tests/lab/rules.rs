//! The effects of Services and flags on the wire: who answers, who is refused, who gets no answer.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::support;
use crate::support::{
    Cluster, DNS, DNS_TARGET, ECHO, ECHO_TARGET, ENOUGH, HTTP, HTTP_TARGET, Pair, Plan, SOON, WEB,
    addresses_of_client, addresses_of_node, addresses_of_pod, all_answer, cluster_ip, external_ip,
    reaches, reasons, route_to, skip, status, take_fresh_ports, unless_unsupported, until,
    until_backends, url,
};
use anyhow::{Context, Result, bail, ensure};
use sluice_lab::{Backend, Cni, Event, Namespace, Node, NodeOptions, Port, Reply, Service};

/// Node ports of [`web`].
const NODE_ECHO: u16 = 30_007;
const NODE_DNS: u16 = 30_053;

/// Returns the service `web` with node ports.
fn web(cluster: &Cluster) -> Service {
    let [cluster4, cluster6] = cluster_ip(WEB);
    let [external4, external6] = external_ip(WEB);
    Service::new("web")
        .cluster_ip(cluster4)
        .cluster_ip(cluster6)
        .load_balancer_ip(external4)
        .load_balancer_ip(external6)
        .port(Port::tcp("http", HTTP, HTTP_TARGET))
        .port(Port::udp("dns", DNS, DNS_TARGET).node_port(NODE_DNS))
        .port(Port::tcp("echo", ECHO, ECHO_TARGET).node_port(NODE_ECHO))
        .backends(&cluster.backends)
}

/// The outcome of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Answered(Reply),
    Refused,
    /// Neither an answer nor a refusal in time, or an error on the way.
    Silence(String),
}

impl Outcome {
    fn of(events: &[Event]) -> Result<Self> {
        for event in events {
            match event {
                Event::Reply(reply) => return Ok(Self::Answered(reply.clone())),
                Event::Lost { reason, .. } | Event::Broken { reason, .. } => {
                    return Ok(if reason.contains("refused") {
                        Self::Refused
                    } else {
                        Self::Silence(reason.clone())
                    });
                }
                Event::Listening { .. }
                | Event::Connected { .. }
                | Event::Load(_)
                | Event::Done { .. } => {}
            }
        }
        bail!("nothing became of a request: {events:?}")
    }

    /// Returns the name of the backend that answered.
    fn name(&self) -> Option<&str> {
        if let Self::Answered(reply) = self { Some(&reply.name) } else { None }
    }

    /// Returns the client's address as the backend that answered saw it.
    fn seen(&self) -> Option<IpAddr> {
        if let Self::Answered(reply) = self { Some(reply.seen.ip()) } else { None }
    }

    fn is_silence(&self) -> bool {
        matches!(self, Self::Silence(_))
    }
}

/// Opens a connection and sends one line on it.
fn tcp(client: &Namespace, address: IpAddr, port: u16) -> Result<Outcome> {
    let to = SocketAddr::new(address, port).to_string();
    Outcome::of(&client.ask([
        "tcp-client",
        "--count=1",
        "--interval-ms=0",
        "--timeout-ms=300",
        "--to",
        &to,
    ])?)
}

/// One datagram.
fn udp(client: &Namespace, address: IpAddr, port: u16) -> Result<Outcome> {
    let to = SocketAddr::new(address, port).to_string();
    Outcome::of(&client.ask(["udp-client", "--count=1", "--timeout-ms=300", "--to", &to])?)
}

/// One datagram of a connected socket.
fn udp_connected(client: &Namespace, address: IpAddr, port: u16) -> Result<Outcome> {
    let to = SocketAddr::new(address, port).to_string();
    Outcome::of(&client.ask([
        "udp-client",
        "--connected",
        "--count=1",
        "--timeout-ms=300",
        "--to",
        &to,
    ])?)
}

/// Checks that exactly these answer at an address, by TCP and by both kinds of UDP.
fn answer(client: &Namespace, address: IpAddr, ports: [u16; 2], names: &[&str]) -> Result<()> {
    let (http, dns) = (SocketAddr::new(address, ports[0]), SocketAddr::new(address, ports[1]));
    let what = |way: &str| format!("{} by {way} at {address}", client.name());
    take_fresh_ports(client)?;
    let by_tcp = client.http_get(&url(address, ports[0], ""), ENOUGH).context(what("TCP"))?;
    all_answer(&what("TCP"), &by_tcp, names, http)?;
    all_answer(&what("UDP"), &client.udp_ask(dns, ENOUGH).context(what("UDP"))?, names, dns)?;
    let connected = client.udp_ask_connected(dns, ENOUGH).context(what("connected UDP"))?;
    all_answer(&what("connected UDP"), &connected, names, dns)
}

/// Waits until the service is served as its manifest says now: with this many backends in all, and
/// with this last change.
fn until_served(cluster: &Cluster, service: &Service, backends: usize) -> Result<()> {
    cluster.manifests.write(service)?;
    until_backends(cluster.node(), "web", backends)
}

fn own_addresses(node: &Namespace) -> Result<Vec<IpAddr>> {
    let text = node.run("ip", ["-o", "address"])?;
    let words = text.split_whitespace().filter_map(|word| word.split('/').next());
    Ok(words.filter_map(|word| word.parse().ok()).collect())
}

/// Returns how many packets were counted with a reason.
fn count(node: &Node, reason: &str) -> Result<u64> {
    Ok(reasons(node)?.get(reason).copied().unwrap_or_default())
}

/// Further addresses of the node.
const SECOND: [&str; 2] = ["198.51.100.9", "2001:db8:51::9"];

#[test]
fn node_ports_are_served_at_the_addresses_that_are_asked_for() -> Result<()> {
    if skip("node_ports_are_served_at_the_addresses") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("np-where", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let second: Pair = [SECOND[0].parse()?, SECOND[1].parse()?];
    let uplink = node.uplink().to_owned();
    let _ = node.ip(&format!(
        "link set lo up\naddr add {}/24 dev {uplink}\naddr add {}/64 dev {uplink} nodad",
        SECOND[0], SECOND[1]
    ))?;
    for address in second {
        route_to(&cluster.lab, address, &node)?;
    }
    cluster.manifests.write(&web(&cluster))?;
    let primary = addresses_of_node(&node);
    let loopback: Pair = ["127.0.0.1".parse()?, "::1".parse()?];
    let places = [("primary", primary), ("second", second), ("loopback", loopback)];
    // The flag -> where node ports are served: `primary`, `second` and `loopback`, for each family.
    let table: [(&str, [&str; 2]); 7] = [
        ("primary", ["primary"; 2]),
        ("all", ["primary second"; 2]),
        ("localhost", ["loopback"; 2]),
        ("primary,localhost", ["primary loopback"; 2]),
        // Nothing in the list is of the other family, which is served at all addresses.
        ("198.51.100.0/24", ["second", "primary second"]),
        ("198.51.100.0/24,2001:db8:51::/64", ["second"; 2]),
        ("192.0.2.0/24,2001:db8:51::/64,localhost", ["primary loopback", "second loopback"]),
    ];
    for (number, (flag, expected)) in table.into_iter().enumerate() {
        let args = ["--nodeport-addresses", flag];
        if number == 0 {
            // The default.
            cluster.start_agents(&[])?;
        } else {
            cluster.change_agents(&args)?;
        }
        for (place, addresses) in places {
            for (family, address) in addresses.into_iter().enumerate() {
                let expected = expected[family].split(' ').any(|word| word == place);
                let mut clients: Vec<&Namespace> = vec![&node];
                if place != "loopback" {
                    clients.extend([&*cluster.outside, &*cluster.client]);
                }
                for client in clients {
                    for (way, outcome) in [
                        ("TCP", tcp(client, address, NODE_ECHO)?),
                        ("UDP", udp(client, address, NODE_DNS)?),
                    ] {
                        ensure!(
                            (outcome.name() == Some("near-1")) == expected,
                            "{flag}: {} by {way} at {address}: {outcome:?}",
                            client.name()
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn external_ips_are_served_where_they_are_allowed_and_it_is_said() -> Result<()> {
    if skip("external_ips_are_served") {
        return Ok(());
    }
    let mut cluster =
        Cluster::without_agents("ext-ips", &Plan { near: 1, far: 1, ..Plan::default() })?;
    let (one, two) = (external_ip(30), external_ip(31));
    let [cluster4, cluster6] = cluster_ip(30);
    let mut plain = Service::new("plain")
        .cluster_ip(cluster4)
        .cluster_ip(cluster6)
        .port(Port::udp("dns", DNS, DNS_TARGET))
        .port(Port::tcp("http", HTTP, HTTP_TARGET))
        .backends(&cluster.backends);
    for address in one.into_iter().chain(two) {
        plain = plain.external_ip(address);
        route_to(&cluster.lab, address, &cluster.nodes[0])?;
    }
    cluster.manifests.write(&plain)?;
    let some = format!("{}/32,{}/128", one[0], one[1]);
    for (number, (flag, served)) in
        [("on", [true; 2]), (&*some, [true, false]), ("off", [false; 2])].into_iter().enumerate()
    {
        if number == 0 {
            cluster.start_agents(&[])?;
        } else {
            cluster.change_agents(&["--external-ips", flag])?;
        }
        for (addresses, served) in [one, two].into_iter().zip(served) {
            for address in addresses {
                for client in [&*cluster.outside, &*cluster.client, &**cluster.node()] {
                    if served {
                        answer(client, address, [HTTP, DNS], &["near-1", "far-1"])
                            .context(flag.to_owned())?;
                    } else {
                        // A datagram from the port of an earlier one belongs to its flow, which
                        // goes on, so another port is needed.
                        let datagram = match udp(client, address, DNS)? {
                            answered if answered.name().is_some() => udp(client, address, DNS)?,
                            refused => refused,
                        };
                        for outcome in [tcp(client, address, HTTP)?, datagram] {
                            let who = client.name();
                            ensure!(
                                outcome.name().is_none(),
                                "{flag}: {who} at {address}: {outcome:?}"
                            );
                        }
                    }
                }
            }
        }
        let told = status(cluster.node())?
            .pointer("/last/reports")
            .cloned()
            .unwrap_or_default()
            .to_string();
        ensure!(told.contains("external_ip") || told.contains("externalIPs"), "{flag}: {told}");
    }
    Ok(())
}

#[test]
fn an_internal_local_policy_serves_local_backends_alone() -> Result<()> {
    if skip("an_internal_local_policy") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("itp", &Plan { near: 1, far: 1, ..Plan::default() })?;
    let local = |cluster: &Cluster| web(cluster).spec("internalTrafficPolicy: Local");
    cluster.manifests.write(&local(&cluster))?;
    cluster.start_agents(&[])?;
    for mode in ["all", "off"] {
        cluster.change_agents(&["--socket-path", mode])?;
        until_served(&cluster, &local(&cluster), 2)?;
        for client in [&*cluster.client, &**cluster.node()] {
            for (inside, outside) in cluster_ip(WEB).into_iter().zip(external_ip(WEB)) {
                answer(client, inside, [HTTP, DNS], &["near-1"]).context(mode)?;
                answer(client, outside, [HTTP, DNS], &["near-1", "far-1"]).context(mode)?;
            }
        }
        // A backend elsewhere serves, but none here: dropped.
        let far = cluster.backends[1].clone();
        until_served(&cluster, &local(&cluster).backends([&far]), 1)?;
        for client in [&*cluster.client, &**cluster.node()] {
            for (inside, outside) in cluster_ip(WEB).into_iter().zip(external_ip(WEB)) {
                let before = count(cluster.node(), "no_local_backend")?;
                for outcome in [
                    tcp(client, inside, ECHO)?,
                    udp(client, inside, DNS)?,
                    udp_connected(client, inside, DNS)?,
                ] {
                    ensure!(
                        outcome.is_silence(),
                        "{mode}: {} at {inside}: {outcome:?}",
                        client.name()
                    );
                }
                let dropped = count(cluster.node(), "no_local_backend")? - before;
                ensure!(dropped >= 3, "{mode}: {} at {inside}: {dropped} counted", client.name());
                answer(client, outside, [HTTP, DNS], &["far-1"]).context(mode)?;
            }
        }
        // No backend serves: refused.
        until_served(&cluster, &local(&cluster).backends(Vec::<Backend>::new()), 0)?;
        for client in [&*cluster.client, &**cluster.node()] {
            for vip in cluster_ip(WEB) {
                for outcome in [tcp(client, vip, ECHO)?, udp_connected(client, vip, DNS)?] {
                    ensure!(
                        outcome == Outcome::Refused,
                        "{mode}: {} at {vip}: {outcome:?}",
                        client.name()
                    );
                }
            }
        }
    }
    Ok(())
}

/// Returns the object of the first node, in a zone.
fn node_object(node: &Node, zone: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {}, labels: {{topology.kubernetes.io/zone: {zone}}}}}\n\
         spec: {{podCIDRs: [\"{}\", \"{}\"]}}\n",
        node.name(),
        node.pod_range(),
        node.pod_range6()
    )
}

#[test]
fn hints_for_zone_and_node_steer_who_may_reach_all() -> Result<()> {
    if skip("hints_for_zone_and_node") {
        return Ok(());
    }
    let mut cluster =
        Cluster::without_agents("hints", &Plan { near: 1, far: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let [near, far] = [0, 1].map(|number| Backend::from(&cluster.backends[number]));
    let both: &[&str] = &["near-1", "far-1"];
    cluster.manifests.write_text("node.yaml", &node_object(&node, "z1"))?;
    cluster.manifests.write(&web(&cluster))?;
    cluster.start_agents(&[])?;
    // The backends -> those that serve.
    let table = [
        ("the other's zone", [near.clone().for_zone("z2"), far.clone().for_zone("z1")], &both[1..]),
        ("one has no hint", [near.clone(), far.clone().for_zone("z1")], both),
        ("none for our zone", [near.clone().for_zone("z2"), far.clone().for_zone("z2")], both),
        (
            "nodes before zones",
            [near.clone().for_node("n1", "z2"), far.clone().for_node("n2", "z1")],
            &both[..1],
        ),
        (
            "none for our node",
            [near.clone().for_node("n3", "z2"), far.clone().for_node("n2", "z1")],
            &both[1..],
        ),
    ];
    let clients: [(&Namespace, [Pair; 3]); 3] = {
        let node_addresses = addresses_of_node(&node);
        [
            (&cluster.client, [cluster_ip(WEB), external_ip(WEB), node_addresses]),
            (&node, [cluster_ip(WEB), external_ip(WEB), node_addresses]),
            // A ClusterIP is not for a client outside.
            (&cluster.outside, [external_ip(WEB), external_ip(WEB), node_addresses]),
        ]
    };
    for (what, backends, names) in table {
        cluster.manifests.write(&web(&cluster).backends(backends))?;
        until(what, || {
            let shares = Reply::shares(&node.http_get(&url(cluster_ip(WEB)[0], HTTP, ""), ENOUGH)?);
            let found: BTreeSet<&str> = shares.keys().map(String::as_str).collect();
            Ok((found == names.iter().copied().collect()).then_some(()))
        })?;
        for (client, addresses) in clients {
            // A client that takes a known flow's port goes where that flow goes.
            take_fresh_ports(client)?;
            for (place, addresses) in addresses.into_iter().enumerate() {
                for address in addresses {
                    let dns = SocketAddr::new(address, if place == 2 { NODE_DNS } else { DNS });
                    let replies = client.udp_ask(dns, ENOUGH)?;
                    all_answer(&format!("{what}: {} {dns}", client.name()), &replies, names, dns)?;
                }
            }
        }
    }
    // The node moves to another zone.
    let backends = [near.clone().for_zone("z2"), far.clone().for_zone("z1")];
    cluster.manifests.write(&web(&cluster).backends(backends))?;
    cluster.manifests.write_text("node.yaml", &node_object(&node, "z2"))?;
    until("the other zone", || {
        let shares = Reply::shares(&node.http_get(&url(cluster_ip(WEB)[0], HTTP, ""), 20)?);
        Ok((shares.len() == 1 && shares.contains_key("near-1")).then_some(()))
    })?;
    // Clients outside of a Service with the external policy Local: hints do not matter to them.
    let backends = [near.for_zone("z1"), far.for_zone("z2")];
    cluster
        .manifests
        .write(&web(&cluster).spec("externalTrafficPolicy: Local").backends(backends))?;
    for vip in external_ip(WEB) {
        until("the pod's short circuit follows hints", || {
            let dns = SocketAddr::new(vip, DNS);
            let shares = Reply::shares(&cluster.client.udp_ask(dns, 20)?);
            Ok((shares.len() == 1 && shares.contains_key("far-1")).then_some(()))
        })?;
        answer(&cluster.outside, vip, [HTTP, DNS], &["near-1"])?;
    }
    Ok(())
}

/// Returns the status and the weight that a health check reports.
fn health(client: &Namespace, at: SocketAddr) -> Result<(u16, String, String)> {
    let answer = client.enter(|| -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: lb\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    let status = answer.split(' ').nth(1).and_then(|word| word.parse().ok());
    let weight = answer.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("x-load-balancing-endpoint-weight")
            .then(|| value.trim().to_owned())
    });
    Ok((status.context(answer.clone())?, weight.unwrap_or_default(), answer))
}

/// The port of the health check.
const CHECK: u16 = 32_100;

/// Some backends, those that serve inside, those that serve outside, and the answer of the health
/// check.
type Stage<'a> =
    (&'static str, &'a [Backend], &'a [&'static str], &'a [&'static str], (u16, &'static str));

#[test]
fn backends_that_terminate_stand_in_and_the_health_check_does_not_count_them() -> Result<()> {
    if skip("backends_that_terminate_stand_in") {
        return Ok(());
    }
    let cluster =
        Cluster::without_agents("stand-in", &Plan { near: 1, far: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let [near, far] = [0, 1].map(|number| Backend::from(&cluster.backends[number]));
    let local = |backends: &[Backend]| {
        let policy = format!("externalTrafficPolicy: Local\n  healthCheckNodePort: {CHECK}");
        web(&cluster).spec(&policy).backends(backends.to_vec())
    };
    cluster.manifests.write(&local(&[near.clone(), far.clone()]))?;
    let client = addresses_of_client(&cluster.outside);
    let checks = addresses_of_node(&node).map(|address| SocketAddr::new(address, CHECK));
    let tells = |expected: (u16, &str)| -> Result<()> {
        for at in checks {
            until(&format!("the health check at {at} says {expected:?}"), || {
                let (status, weight, _) = health(&cluster.outside, at)?;
                Ok(((status, &*weight) == expected).then_some(()))
            })?;
        }
        Ok(())
    };
    let both: &[&str] = &["near-1", "far-1"];
    let drained = [near.clone().terminating(), far.clone()];
    let last = [near.clone().terminating(), far.clone().not_ready()];
    let elsewhere = [near.clone().not_ready(), far.clone()];
    let nobody = [near.clone().not_ready(), far.clone().not_ready()];
    let table: [Stage<'_>; 5] = [
        ("both are ready", &[near.clone(), far.clone()], both, &both[..1], (200, "1")),
        ("the local one terminates", &drained, &both[1..], &both[..1], (503, "0")),
        ("only the one that terminates is left", &last, &both[..1], &both[..1], (503, "0")),
        ("none is here", &elsewhere, &both[1..], &[], (503, "0")),
        ("none is anywhere", &nobody, &[], &[], (503, "0")),
    ];
    let mut agents = Vec::new();
    for each in &cluster.nodes {
        let options = sluice_lab::AgentOptions {
            manifests: Some(cluster.manifests.directory().to_owned()),
            ..sluice_lab::AgentOptions::default()
        };
        let mut agent = each.agent(options)?;
        agent.wait_ready(3 * SOON)?;
        agents.push(agent);
    }
    for (what, backends, inside, outside, check) in table {
        cluster.manifests.write(&local(backends))?;
        until(what, || {
            let outcome = udp(&cluster.client, cluster_ip(WEB)[0], DNS)?;
            let first = udp(&cluster.outside, external_ip(WEB)[0], DNS)?;
            let is = |outcome: &Outcome, names: &[&str]| match outcome.name() {
                Some(name) => names.contains(&name),
                None => names.is_empty(),
            };
            Ok((is(&outcome, inside) && is(&first, outside)).then_some(()))
        })?;
        tells(check).context(what)?;
        for (family, client) in client.into_iter().enumerate() {
            let (vip, lb, own) = (
                cluster_ip(WEB)[family],
                external_ip(WEB)[family],
                addresses_of_node(&node)[family],
            );
            if !inside.is_empty() {
                for inner in [&*cluster.client, &*node] {
                    answer(inner, vip, [HTTP, DNS], inside).context(what)?;
                    // The short circuit.
                    answer(inner, lb, [HTTP, DNS], inside).context(what)?;
                }
            }
            for (address, ports) in [(lb, [ECHO, DNS]), (own, [NODE_ECHO, NODE_DNS])] {
                let by_tcp = tcp(&cluster.outside, address, ports[0])?;
                let by_udp = udp_connected(&cluster.outside, address, ports[1])?;
                for outcome in [by_tcp, by_udp] {
                    let right = match outside.first() {
                        Some(name) => {
                            outcome.name() == Some(name) && outcome.seen() == Some(client)
                        }
                        None if inside.is_empty() => outcome == Outcome::Refused,
                        None => outcome.is_silence(),
                    };
                    ensure!(right, "{what}: the outside at {address}: {outcome:?}");
                }
            }
        }
    }
    // A Service without the policy has no health check.
    cluster.manifests.write(&web(&cluster))?;
    for at in checks {
        until("the health check goes", || Ok(health(&cluster.outside, at).is_err().then_some(())))?;
    }
    Ok(())
}

/// Sends a pod's request to a load balancer's address of a Service whose policy is Local and that
/// has backends elsewhere only. It is served by the short circuit if the pod is known as a local
/// one, else dropped. Returns whether it was served.
fn short_circuit(cluster: &Cluster) -> Result<bool> {
    let mut served = BTreeSet::new();
    for family in 0..2 {
        let vip = external_ip(WEB)[family];
        for outcome in [tcp(&cluster.client, vip, ECHO)?, udp(&cluster.client, vip, DNS)?] {
            if outcome.name().is_some() {
                // Its source is kept.
                let pod = addresses_of_pod(&cluster.client)[family];
                ensure!(outcome.seen() == Some(pod), "{outcome:?}");
            }
            let _ = served.insert(outcome.name().is_some());
        }
        // The host's own processes take the short circuit in any case, masqueraded.
        let outcome = udp(cluster.node(), vip, DNS)?;
        ensure!(outcome.name() == Some("far-1"), "the host at {vip}: {outcome:?}");
        let outside = udp(&cluster.outside, vip, DNS)?;
        ensure!(outside.is_silence(), "the outside at {vip}: {outside:?}");
    }
    ensure!(served.len() == 1, "not all ways and families alike");
    Ok(served.contains(&true))
}

#[test]
fn a_local_pod_is_known_as_it_is_asked_for() -> Result<()> {
    if skip("a_local_pod_is_known") {
        return Ok(());
    }
    let mut cluster =
        Cluster::without_agents("detect", &Plan { near: 0, far: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    cluster.manifests.write_text("node.yaml", &node_object(&node, "z1"))?;
    cluster.manifests.write(&web(&cluster).spec("externalTrafficPolicy: Local"))?;
    cluster.start_agents(&[])?;
    ensure!(short_circuit(&cluster)?, "by default");
    let cidrs = "--cluster-cidr=10.244.0.0/16,fd00:10:244::/48";
    let others = "--cluster-cidr=10.245.0.0/16,fd00:10:245::/48";
    let table: [(&[&str], bool); 9] = [
        (&["--detect-local=device"], true),
        (&["--detect-local=none"], false),
        (&["--detect-local=node-cidr"], true),
        (&["--detect-local=cluster-cidr", cidrs], true),
        (&["--detect-local=cluster-cidr", others], false),
        (&["--detect-local=interface-name-prefix=lxc"], true),
        (&["--detect-local=interface-name-prefix=veth"], false),
        // Like kube-proxy without a detector.
        (&["--masquerade=kube-proxy"], false),
        (&["--masquerade=kube-proxy", cidrs], true),
    ];
    for (args, expected) in table {
        cluster.change_agents(args)?;
        let found = short_circuit(&cluster).with_context(|| args.join(" "))?;
        ensure!(found == expected, "{args:?}: {found}");
    }
    Ok(())
}

#[test]
fn a_local_pod_is_known_by_its_bridge() -> Result<()> {
    if skip("a_local_pod_is_known_by_its_bridge") {
        return Ok(());
    }
    unless_unsupported(known_by_its_bridge())
}

fn known_by_its_bridge() -> Result<()> {
    let node = NodeOptions { cni: Cni::Bridge { bridge_nf: true }, ..NodeOptions::default() };
    let mut cluster =
        Cluster::without_agents("detect-br", &Plan { node, near: 0, far: 1, ..Plan::default() })?;
    cluster.manifests.write(&web(&cluster).spec("externalTrafficPolicy: Local"))?;
    cluster.start_agents(&["--detect-local=bridge-interface=cni0"])?;
    ensure!(short_circuit(&cluster)?, "by its bridge");
    cluster.change_agents(&["--detect-local=bridge-interface=cni1"])?;
    ensure!(!short_circuit(&cluster)?, "by another bridge");
    Ok(())
}

#[test]
fn clients_of_a_cluster_ip_are_masqueraded_as_it_is_asked_for() -> Result<()> {
    if skip("clients_of_a_cluster_ip_are_masqueraded") {
        return Ok(());
    }
    let mut cluster =
        Cluster::without_agents("masq", &Plan { near: 1, far: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    for vip in cluster_ip(WEB) {
        route_to(&cluster.lab, vip, &node)?;
    }
    cluster.manifests.write(&web(&cluster))?;
    cluster.start_agents(&[])?;
    let own: BTreeSet<IpAddr> = own_addresses(&node)?.into_iter().collect();
    let cidrs = "--cluster-cidr=10.244.0.0/16,fd00:10:244::/48";
    // The flags -> whether a pod is masqueraded, a client outside with a backend here, and one with
    // a backend elsewhere.
    let table: [(&[&str], [bool; 3]); 6] = [
        (&["--socket-path=off"], [false, false, true]),
        (&["--socket-path=off", "--masquerade=kube-proxy", cidrs], [false, true, true]),
        // No local pod is known, and nobody is masqueraded.
        (&["--socket-path=off", "--masquerade=kube-proxy"], [false, false, false]),
        (&["--socket-path=off", "--masquerade=all"], [true, true, true]),
        (&["--socket-path=all", "--masquerade=all"], [true, true, true]),
        (&["--socket-path=all", "--masquerade=kube-proxy", cidrs], [false, true, true]),
    ];
    for (args, [pod, near, far]) in table {
        cluster.change_agents(args)?;
        for (family, vip) in cluster_ip(WEB).into_iter().enumerate() {
            let dns = SocketAddr::new(vip, DNS);
            let client = addresses_of_client(&cluster.outside)[family];
            let of_pod = addresses_of_pod(&cluster.client)[family];
            for (who, kept, masqueraded) in
                [(&*cluster.client, of_pod, [pod, pod]), (&*cluster.outside, client, [near, far])]
            {
                // Without masquerading, the way back of a client outside from a backend elsewhere
                // does not pass this node.
                if who.name() == "outside" && !masqueraded[1] {
                    continue;
                }
                take_fresh_ports(who)?;
                let replies = who
                    .udp_ask(dns, ENOUGH)
                    .with_context(|| format!("{args:?}: {} {dns}", who.name()))?;
                all_answer(
                    &format!("{args:?}: {}", who.name()),
                    &replies,
                    &["near-1", "far-1"],
                    dns,
                )?;
                for reply in replies {
                    let masqueraded = masqueraded[usize::from(reply.name.starts_with("far"))];
                    let seen = reply.seen.ip();
                    ensure!(
                        if masqueraded { own.contains(&seen) } else { seen == kept },
                        "{args:?}: {} saw {} as {seen}",
                        reply.name,
                        who.name()
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_service_address_that_nobody_has_leaves_by_no_uplink() -> Result<()> {
    if skip("a_service_address_that_nobody_has") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("unassigned", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    // A machine beyond the router has the addresses, so that it shows whether packets get there.
    let strays = cluster_ip(99);
    let elsewhere = cluster.lab.client("elsewhere")?;
    let _ = elsewhere.ip("link set lo up")?;
    for (address, via) in
        strays.into_iter().zip([IpAddr::V4(elsewhere.ipv4()), IpAddr::V6(elsewhere.ipv6())])
    {
        let length = if address.is_ipv4() { 32 } else { 128 };
        let _ = elsewhere.ip(&format!("addr add {address}/{length} dev eth0"))?;
        let _ = cluster.lab.router().ip(&format!("route add {address}/{length} via {via}"))?;
    }
    cluster.serve(&elsewhere)?;
    let networks = "--service-cidr=10.96.0.0/16,fd00:10:96::/112";
    let dropped = |cluster: &Cluster| count(cluster.node(), "unassigned_address");
    cluster.start_agents(&[])?;
    for (known, args) in [(false, &[][..]), (true, &[networks][..])] {
        if known {
            cluster.change_agents(args)?;
        }
        for vip in strays {
            for client in [&*cluster.client, &*node] {
                let before = dropped(&cluster)?;
                let outcomes = [tcp(client, vip, ECHO_TARGET)?, udp(client, vip, DNS_TARGET)?];
                let more = dropped(&cluster)? - before;
                for outcome in &outcomes {
                    let right = if known {
                        outcome.is_silence()
                    } else {
                        outcome.name() == Some("elsewhere")
                    };
                    ensure!(right, "{args:?}: {} at {vip}: {outcome:?}", client.name());
                }
                ensure!(
                    if known { more >= 2 } else { more == 0 },
                    "{args:?}: {vip}: {more} dropped"
                );
            }
        }
        reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)?;
    }
    // Another proxy on this node serves the addresses, so that they are not ours.
    let lines = strays
        .map(|vip| format!("addr add {vip}/{} dev other", if vip.is_ipv4() { 32 } else { 128 }));
    let _ = node.ip(&format!("link add other type bridge\n{}", lines.join("\n")))?;
    cluster.serve(&node)?;
    for vip in strays {
        for client in [&*cluster.client, &*node] {
            for outcome in [tcp(client, vip, ECHO_TARGET)?, udp(client, vip, DNS_TARGET)?] {
                ensure!(outcome.name() == Some("n1"), "{} at {vip}: {outcome:?}", client.name());
            }
        }
    }
    Ok(())
}

#[test]
fn a_vip_that_something_on_the_node_serves_is_left_to_it() -> Result<()> {
    if skip("a_vip_that_something_on_the_node_serves") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("nodelocal", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    // Another service, to show that the rest works.
    let pods = cluster.backends.clone();
    cluster.manifests.write(&support::service("other", 20).backends(&pods))?;
    let [v4, v6] = cluster_ip(WEB);
    let add = |device: &str| {
        format!(
            "link add {device} type bridge\naddr add {v4}/32 dev {device}\naddr add {v6}/128 dev {device} nodad"
        )
    };
    cluster.start_agents(&[])?;
    for (device, args) in
        [("nodelocaldns", vec![]), ("mine", vec![format!("--leave-address={v4},{v6}")])]
    {
        for mode in ["--socket-path=all", "--socket-path=off"] {
            let args: Vec<&str> = args.iter().map(String::as_str).chain([mode]).collect();
            cluster.change_agents(&args)?;
            reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)
                .context(device.to_owned())?;
            let _ = node.ip(&add(device))?;
            let mut servers = Vec::new();
            for vip in [v4, v6] {
                for (what, port) in [("udp-echo", DNS), ("http", HTTP)] {
                    let at = format!("--listen={}", SocketAddr::new(vip, port));
                    let mut server = node.tool([what, &at, "--name=cache"])?;
                    let _ = server.wait_event("it listens", SOON, |event| {
                        matches!(event, Event::Listening { .. })
                    })?;
                    servers.push(server);
                }
            }
            for vip in [v4, v6] {
                for client in [&*cluster.client, &*node] {
                    until(
                        &format!("{device}: {} at {vip} finds the cache", client.name()),
                        || Ok((udp(client, vip, DNS)?.name() == Some("cache")).then_some(())),
                    )?;
                    answer(client, vip, [HTTP, DNS], &["cache"])?;
                }
            }
            reaches(&cluster.client, cluster_ip(20), &["near-1"], None)
                .context(device.to_owned())?;
            // The load balancer's addresses of the same Service are still served.
            for address in external_ip(WEB) {
                answer(&cluster.outside, address, [HTTP, DNS], &["near-1"])?;
            }
            // The cache goes, and its Service is served.
            for mut server in servers {
                let _ = server.kill()?;
            }
            let _ = node.ip(&format!("link del {device}"))?;
            for vip in [v4, v6] {
                for client in [&*cluster.client, &*node] {
                    until(
                        &format!("{device}: {} at {vip} finds the service", client.name()),
                        || Ok((udp(client, vip, DNS)?.name() == Some("near-1")).then_some(())),
                    )?;
                    answer(client, vip, [HTTP, DNS], &["near-1"])?;
                }
            }
        }
    }
    Ok(())
}

/// The seconds for which affinity lasts.
const SECONDS: u64 = 3;

#[test]
fn affinity_ends_with_its_time() -> Result<()> {
    if skip("affinity_ends_with_its_time") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("aff-time", &Plan { near: 3, ..Plan::default() })?;
    let sticky = |cluster: &Cluster| {
        let time = format!("sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {SECONDS}}}}}");
        web(cluster).spec("sessionAffinity: ClientIP").spec(&time)
    };
    cluster.manifests.write(&sticky(&cluster))?;
    cluster.start_agents(&[])?;
    let ask = |client: &Namespace, vip| -> Result<String> {
        let outcome = tcp(client, vip, ECHO)?;
        Ok(outcome.name().with_context(|| format!("{outcome:?}"))?.to_owned())
    };
    let clients: [(&Namespace, IpAddr); 3] = [
        (&cluster.client, cluster_ip(WEB)[0]),
        (cluster.node(), cluster_ip(WEB)[1]),
        (&cluster.outside, external_ip(WEB)[0]),
    ];
    let mut waiting = Vec::new();
    for (client, vip) in clients {
        // The backend that the table has for the client goes: the client gets another one, which
        // then is its own.
        let home = ask(client, vip)?;
        let rest: Vec<_> =
            cluster.backends.iter().filter(|pod| pod.name() != home).cloned().collect();
        until_served(&cluster, &sticky(&cluster).backends(&rest), 2)?;
        let mut asked = Instant::now();
        let other = ask(client, vip)?;
        ensure!(other != home, "{home} is gone");
        until_served(&cluster, &sticky(&cluster), 3)?;
        // Each new connection renews it, beyond the time of the first one.
        for pause in [0, SECONDS * 2 / 3, SECONDS * 2 / 3] {
            std::thread::sleep(Duration::from_secs(pause));
            let next = Instant::now();
            let now = ask(client, vip)?;
            if asked.elapsed() >= Duration::from_secs(SECONDS) {
                println!("this machine is too slow to tell that it is renewed");
                break;
            }
            ensure!(now == other, "{} {vip} left {other}", client.name());
            asked = next;
        }
        waiting.push((client, vip, other));
    }
    // Their time passes, and each time they are led on: within a few rounds to another backend.
    for _ in 0..8 {
        std::thread::sleep(Duration::from_secs(SECONDS + 1));
        let mut still = Vec::new();
        for (client, vip, other) in waiting {
            if ask(client, vip)? == other {
                still.push((client, vip, other));
            }
        }
        waiting = still;
        if waiting.is_empty() {
            break;
        }
    }
    if let Some((client, vip, other)) = waiting.first() {
        bail!("{} {vip}: {other} for ever", client.name());
    }
    Ok(())
}
