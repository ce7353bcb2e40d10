//! Processes of the host that call Services while the host's own routes are useless: VIPs need none
//! of them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::{
    Cluster, DNS, DNS_TARGET, ECHO, ECHO_TARGET, Pair, Plan, SOON, addresses_of_node,
    addresses_of_pod, asks_by, cluster_ip, external_ip, on_host, replies, skip, status, until,
    until_backends,
};
use anyhow::{Context, Result, bail, ensure};
use sluice_lab::{Cni, Namespace, Node, NodeOptions, Port, Service};

/// Numbers of the services: one that all may use, one with affinity, and one of the host network.
const PLAIN: u8 = 10;
const STICKY: u8 = 11;
const HOST: u8 = 12;
/// Networks of all ClusterIPs.
const NETWORKS: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];

/// The destinations of the host's default routes, and whether netfilter's translation, which comes
/// after the first route lookup, still gets a packet to the endpoint.
const ROUTES: [(&str, &[&str; 2], bool); 6] = [
    ("out of a device that drops", &["default dev hole", "default dev hole"], true),
    ("out of a device without programs", &["default dev here", "default dev here"], true),
    (
        "to a gateway that is nobody",
        &["default via 192.0.2.99", "default via 2001:db8:0:2::99 dev eth0"],
        true,
    ),
    ("to everybody on the link", &["default dev eth0", "default dev eth0"], true),
    ("to nowhere", &["unreachable default", "unreachable default"], false),
    ("missing", &["", ""], false),
];

/// The kinds of sockets that send requests.
const WAYS: [(&str, &[&str]); 5] = [
    ("TCP", &["tcp-client"]),
    ("TCP from the node's address", &["tcp-client", "--source-port=45007"]),
    ("UDP", &["udp-client"]),
    ("connected UDP", &["udp-client", "--connected"]),
    ("connected UDP by a v6 socket", &["udp-client", "--connected", "--mapped"]),
];

/// Checks that a Service answers a process of the host whatever kind of socket it uses. Returns who
/// answered at each of the ports (TCP, UDP).
fn asks(client: &Namespace, address: IpAddr, ports: [u16; 2]) -> Result<[BTreeSet<String>; 2]> {
    asks_by(client, &WAYS, 4, address, ports)
}

/// Changes the node's default routes in both families.
fn route_default(node: &Node, routes: [&str; 2]) -> Result<()> {
    for (family, route) in ["-4", "-6"].into_iter().zip(routes) {
        // This includes routes of other kinds and metrics.
        while node.output("ip", [family, "route", "del", "default"])?.status.success() {}
        if !route.is_empty() {
            let _ = node.run("ip", [family, "route", "add"].into_iter().chain(route.split(' ')))?;
        }
    }
    Ok(())
}

/// Returns a service with the addresses of a number, and node ports that begin with it.
fn with_node_ports(name: &str, number: u8) -> Service {
    let [echo, dns] = node_ports(number);
    let mut service = Service::new(name)
        .port(Port::tcp("echo", ECHO, ECHO_TARGET).node_port(echo))
        .port(Port::udp("dns", DNS, DNS_TARGET).node_port(dns));
    for (cluster, external) in cluster_ip(number).into_iter().zip(external_ip(number)) {
        service = service.cluster_ip(cluster).load_balancer_ip(external);
    }
    // An address that a person has listed.
    external_ip(100 + number).into_iter().fold(service, Service::external_ip)
}

fn node_ports(number: u8) -> [u16; 2] {
    let first = 30_000 + u16::from(number) * 100;
    [first + ECHO, first + DNS]
}

/// Writes the first node's object, with its addresses.
fn write_node(cluster: &Cluster, addresses: Pair) -> Result<()> {
    let [v4, v6] = addresses;
    let addresses =
        format!("[{{type: InternalIP, address: '{v4}'}}, {{type: InternalIP, address: '{v6}'}}]");
    let object = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nstatus:\n  addresses: ";
    cluster.manifests.write_text("node.yaml", &format!("{object}{addresses}\n"))
}

/// Builds two nodes with a service of each kind. The first one also has devices that lead nowhere.
fn cluster(name: &str) -> Result<Cluster> {
    // On a bridge: the routed pods' gateway answers for what the node has a route to.
    let node = NodeOptions { cni: Cni::Bridge { bridge_nf: false }, ..NodeOptions::default() };
    let mut cluster =
        Cluster::without_agents(name, &Plan { node, near: 1, far: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let hole = |kind: &str| node.ip(&format!("link add hole type {kind}"));
    // An ifb drops what it is to send as well; not every kernel has dummies.
    let _ = hole("dummy").or_else(|_| hole("ifb"))?;
    let _ = node.ip("link set lo up\nlink set hole up\n\
         link add here type veth peer name there\nlink set here up\nlink set there up")?;
    cluster.serve(&node)?;
    write_node(&cluster, addresses_of_node(&node))?;
    cluster.manifests.remove(&cluster.web())?;
    cluster.manifests.write(&with_node_ports("plain", PLAIN).backends(&cluster.backends))?;
    let sticky = with_node_ports("sticky", STICKY).spec("sessionAffinity: ClientIP");
    cluster.manifests.write(&sticky.backends(&cluster.backends))?;
    cluster.manifests.write(&with_node_ports("host", HOST).backends([on_host(&node)]))?;
    Ok(cluster)
}

/// Returns the routes of our own device.
fn own_routes(node: &Node, family: &str) -> Result<Vec<String>> {
    let output =
        node.output("ip", [family, "-o", "route", "show", "dev", "sluice0", "proto", "83"])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().map(|line| line.split(' ').next().unwrap_or_default().to_owned()).collect())
}

/// Translates what the host sends to a ClusterIP, as kube-proxy's rules do: the control.
fn translate_by_netfilter(cluster: &Cluster) -> Result<()> {
    let mut rules = String::new();
    for (number, endpoint) in [(PLAIN, 0), (STICKY, 1)] {
        let endpoints = addresses_of_pod(&cluster.backends[endpoint]);
        for ((ip, vip), endpoint) in
            ["ip", "ip6"].into_iter().zip(cluster_ip(number)).zip(endpoints)
        {
            for (protocol, port, target) in [("tcp", ECHO, ECHO_TARGET), ("udp", DNS, DNS_TARGET)] {
                let to = SocketAddr::new(endpoint, target);
                writeln!(rules, "{ip} daddr {vip} {protocol} dport {port} dnat {ip} to {to}")?;
            }
        }
    }
    let nat = "type nat hook";
    cluster.node().nft(&format!(
        "table inet control {{\n chain out {{ {nat} output priority -100; {rules} }}\n\
         chain post {{ {nat} postrouting priority 100; ct status dnat masquerade; }}\n}}\n"
    ))
}

#[test]
fn a_process_of_the_host_needs_no_good_route_to_a_service() -> Result<()> {
    if skip("a_process_of_the_host_needs_no_good_route") {
        return Ok(());
    }
    let mut cluster = cluster("routes")?;
    let node = cluster.node().clone();
    // The controls: without a proxy nobody is answered; with netfilter, everybody is where there is
    // a route.
    for (what, routes, is_route) in ROUTES {
        route_default(&node, *routes)?;
        for [plain, sticky] in [cluster_ip(PLAIN), cluster_ip(STICKY)] {
            for vip in [plain, sticky] {
                let lost = node.udp_ask_connected(SocketAddr::new(vip, DNS), 1);
                ensure!(
                    lost.is_err(),
                    "default routes {what}: {vip} answers without a proxy: {lost:?}"
                );
            }
        }
        translate_by_netfilter(&cluster)?;
        for number in [PLAIN, STICKY] {
            for vip in cluster_ip(number) {
                let answered = node.udp_ask_connected(SocketAddr::new(vip, DNS), 1);
                ensure!(
                    answered.is_ok() == is_route,
                    "default routes {what}: {vip} by netfilter: {answered:?}"
                );
            }
        }
        node.nft("delete table inet control")?;
    }
    let mut is_first = true;
    for (mode, network) in [("off", false), ("all", true), ("off", true)] {
        let networks = NETWORKS.join(",");
        let mut args = vec!["--socket-path", mode];
        args.extend(network.then_some(["--service-cidr", &networks]).into_iter().flatten());
        if std::mem::take(&mut is_first) {
            cluster.start_agents(&args)?;
            until_backends(&node, "host", 1)?;
        } else {
            cluster.change_agents(&args)?;
        }
        for (what, routes, _) in ROUTES {
            route_default(&node, *routes)?;
            let context = || format!("{args:?}, default routes {what}");
            answered_by_every_frontend(&node).with_context(context)?;
        }
        for (family, network_route) in ["-4", "-6"].into_iter().zip(NETWORKS) {
            until("the routes of ClusterIPs are the wanted ones", || {
                let routes = own_routes(&node, family)?;
                let is_right =
                    if network { routes.iter().any(|route| route == network_route) } else { true };
                let alone = cluster_ip(PLAIN)
                    .iter()
                    .any(|vip| routes.iter().any(|to| *to == vip.to_string()));
                Ok((is_right && alone != network).then_some(()))
            })?;
        }
    }
    Ok(())
}

/// Checks that every kind of frontend answers processes of the host.
fn answered_by_every_frontend(node: &Node) -> Result<()> {
    for number in [PLAIN, STICKY, HOST] {
        for (index, address) in cluster_ip(number).into_iter().enumerate() {
            let is_right = |names: &[BTreeSet<String>; 2]| {
                let mut all = names.iter().flatten();
                match number {
                    PLAIN => all.all(|name| ["near-1", "far-1"].contains(&name.as_str())),
                    STICKY => names.iter().all(|names| names.len() == 1),
                    _ => all.all(|name| name == "n1"),
                }
            };
            // Immediately, and whatever the routes were before.
            let names = asks(node, address, [ECHO, DNS]).context("ClusterIP")?;
            ensure!(is_right(&names), "{address}: {names:?}");
            let own = addresses_of_node(node)[index];
            let names = asks(node, own, node_ports(number)).context("node port")?;
            ensure!(is_right(&names), "{own}, service {number}: {names:?}");
            // A machine may have these addresses, so they follow the routes, a little later.
            for external in [external_ip(number)[index], external_ip(100 + number)[index]] {
                let names = eventually(|| asks(node, external, [ECHO, DNS])).context("external")?;
                ensure!(is_right(&names), "{external}: {names:?}");
            }
        }
    }
    Ok(())
}

/// Repeats an attempt until it succeeds, for a while.
fn eventually<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + 2 * SOON;
    loop {
        match attempt() {
            Err(error) if Instant::now() > deadline => bail!("{error:#}, again and again"),
            Err(_) => sleep(Duration::from_millis(500)),
            done => return done,
        }
    }
}

#[test]
fn routes_of_vips_respect_those_of_others() -> Result<()> {
    if skip("routes_of_vips_respect_those_of_others") {
        return Ok(());
    }
    let mut cluster = cluster("routes-of-others")?;
    let node = cluster.node().clone();
    // Routes of others: to the whole network, to a part of it, to one address.
    let _ = node.ip(&format!(
        "route add blackhole {}\nroute add 10.96.0.8/29 via 192.0.2.99 proto bird\n\
         route add 10.96.0.{STICKY}/32 via 192.0.2.1 proto bird",
        NETWORKS[0]
    ))?;
    let theirs = || node.run("ip", ["-4", "-o", "route", "show", "root", "10.96.0.0/16"]);
    let before: Vec<String> = theirs()?.lines().map(str::to_owned).collect();
    let networks = NETWORKS.join(",");
    cluster.start_agents(&["--socket-path", "off", "--service-cidr", &networks])?;
    until_backends(&node, "host", 1)?;
    let (v4, v6) = (addresses_of_node(&node)[0], addresses_of_node(&node)[1]);
    for number in [PLAIN, STICKY, HOST] {
        for (vip, own) in cluster_ip(number).into_iter().zip([v4, v6]) {
            let _ = asks(&node, vip, [ECHO, DNS])?;
            let family = if vip.is_ipv4() { "-4" } else { "-6" };
            let route = node.run("ip", [family, "route", "get", &vip.to_string()])?;
            // A route to a VIP alone that leads somewhere is as good as ours.
            let is_theirs = vip == cluster_ip(STICKY)[0];
            ensure!(
                route.contains("dev sluice0") != is_theirs && route.contains(&format!("src {own}")),
                "{vip}: {route}"
            );
        }
    }
    // None of their routes was replaced, and none is made for an external VIP that already has a
    // route.
    let after = theirs()?;
    for route in &before {
        ensure!(after.lines().any(|line| line == route), "{route} is gone:\n{after}");
    }
    for external in external_ip(PLAIN) {
        let family = if external.is_ipv4() { "-4" } else { "-6" };
        let routes = own_routes(&node, family)?;
        ensure!(!routes.contains(&external.to_string()), "{routes:?}");
    }
    // A removed route of ours is made again, and so is one whose source address leaves the node.
    let vip = cluster_ip(PLAIN)[1];
    let _ = node.run("ip", ["-6", "route", "flush", "dev", "sluice0", "proto", "83"])?;
    until("the route is made again", || {
        Ok(own_routes(&node, "-6")?.iter().any(|route| route == NETWORKS[1]).then_some(()))
    })?;
    let _ = asks(&node, vip, [ECHO, DNS])?;
    // The default routes go: an external VIP gets our route until another route leads there.
    route_default(&node, ["", ""])?;
    for external in external_ip(PLAIN) {
        let family = if external.is_ipv4() { "-4" } else { "-6" };
        let is_ours =
            || -> Result<bool> { Ok(own_routes(&node, family)?.contains(&external.to_string())) };
        until("the external VIP has a route of ours", || Ok(is_ours()?.then_some(())))?;
        let _ = asks(&node, external, [ECHO, DNS])?;
        let gateway = if external.is_ipv4() { "192.0.2.1" } else { "2001:db8:0:2::1" };
        let _ = node.run("ip", [family, "route", "add", "default", "via", gateway])?;
        until("the external VIP's route of ours goes", || Ok((!is_ours()?).then_some(())))?;
        let _ = asks(&node, external, [ECHO, DNS])?;
    }
    // No route of ours is left.
    for mut agent in cluster.agents.drain(..) {
        agent.stop()?;
    }
    ensure!(!own_routes(&node, "-4")?.is_empty(), "a stopped agent leaves its routes");
    let _ = node.sluice(&["cleanup"])?;
    let after: Vec<String> = theirs()?.lines().map(str::to_owned).collect();
    ensure!(after == before, "{after:?}, not {before:?}");
    Ok(())
}

#[test]
fn an_external_vip_whose_machine_is_away_is_served_until_it_is_back() -> Result<()> {
    if skip("an_external_vip_whose_machine_is_away") {
        return Ok(());
    }
    let mut cluster = cluster("routes-to-machines")?;
    let node = cluster.node().clone();
    // On the node's own link: a balancer's address that this node announces and that no machine
    // holds.
    let announced: Pair = ["192.0.2.200".parse()?, "2001:db8:0:2::200".parse()?];
    let service = with_node_ports("announced", 13).backends(&cluster.backends);
    let service = announced.into_iter().fold(service, Service::load_balancer_ip);
    cluster.manifests.write(&service)?;
    cluster.start_agents(&["--socket-path", "off"])?;
    until_backends(&node, "announced", 2)?;
    for vip in announced {
        let _ = eventually(|| asks(&node, vip, [ECHO, DNS]))?;
    }
    // A machine gets the address, and is reached at ports that no Service has.
    let other = cluster.nodes[1].clone();
    cluster.serve(&other)?;
    let [v4, v6] = announced;
    let _ = other.ip(&format!("addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad"))?;
    for vip in announced {
        let direct = SocketAddr::new(vip, ECHO_TARGET).to_string();
        let replies = eventually(|| {
            replies(node.ask(["tcp-client", "--count=1", "--timeout-ms=1000", "--to", &direct])?)
        })?;
        ensure!(replies.iter().all(|reply| reply.name == "n2"), "{replies:?}");
        let _ = asks(&node, vip, [ECHO, DNS])?;
    }
    Ok(())
}

#[test]
fn a_node_address_that_no_uplink_has_is_reported() -> Result<()> {
    if skip("a_node_address_that_no_uplink_has") {
        return Ok(());
    }
    let mut cluster = cluster("strays")?;
    let node = cluster.node().clone();
    cluster.start_agents(&["--socket-path", "off"])?;
    let problems = || -> Result<Vec<String>> {
        let status = status(&node)?;
        let last = status.get("last").context("the agent has not told anything")?;
        let all = last.get("problems").and_then(|all| all.as_array()).cloned().unwrap_or_default();
        Ok(all.iter().map(|one| one.as_str().unwrap_or_default().to_owned()).collect())
    };
    // The control: an uplink has the addresses.
    ensure!(problems()?.is_empty(), "{:?}", problems()?);
    // The address is on a bridge of its own, through which nobody outside comes.
    let on_bridge: Pair = ["192.0.9.1".parse()?, "2001:db8:0:9::1".parse()?];
    let _ = node.ip("link add br9 type bridge\nlink set br9 up\naddr add 192.0.9.1/24 dev br9")?;
    let _ = node.ip("addr add 2001:db8:0:9::1/64 dev br9 nodad")?;
    let nowhere: Pair = ["203.0.113.99".parse()?, "2001:db8:f::99".parse()?];
    for (addresses, why) in [
        (on_bridge, "the device br9 has the node's address"),
        (nowhere, "no device has the node's address"),
    ] {
        write_node(&cluster, addresses)?;
        for address in addresses {
            let problem = format!("{why} {address}");
            until(&format!("`{problem}` is told"), || {
                Ok(problems()?.iter().any(|told| told.starts_with(&problem)).then_some(()))
            })?;
        }
        // Everything else is served.
        let _ = node.sluice(&["status"]).context("the node is not ready")?;
    }
    write_node(&cluster, addresses_of_node(&node))?;
    until("nothing is told any longer", || Ok(problems()?.is_empty().then_some(())))?;
    let log = cluster.agent().log();
    ensure!(log.contains("no longer: no device has the node's address"), "{log}");
    Ok(())
}
