//! Processes of the host that send to their own node: to node ports, and to balancers' addresses
//! that a device of the node holds.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use crate::support::frame::{Frame, Mac, SYN, octets};
use crate::support::{
    Cluster, DNS, DNS_TARGET, ECHO, ECHO_TARGET, Pair, Plan, SOON, addresses_of_client,
    addresses_of_node, addresses_of_pod, asks_by, cluster_ip, external_ip, skip, until_backends,
};
use anyhow::{Context, Result, bail, ensure};
use sluice_lab::{Backend, Namespace, Node, PacketSocket, Port, Service};

/// The service that every client may use, with endpoints on both nodes.
const PLAIN: [u16; 2] = [30_007, 30_053];
/// The same with affinity.
const STICKY: [u16; 2] = [30_107, 30_153];
/// The same with the node itself as the endpoint.
const HOST: [u16; 2] = [30_207, 30_253];
/// Numbers of the balancer's addresses of the services.
const NUMBERS: [u8; 3] = [41, 42, 43];

/// Returns a service with node ports (TCP, UDP) and the addresses of a number.
fn with_node_ports(name: &str, number: u8, [echo, dns]: [u16; 2]) -> Service {
    let mut service = Service::new(name)
        .port(Port::tcp("echo", ECHO, ECHO_TARGET).node_port(echo))
        .port(Port::udp("dns", DNS, DNS_TARGET).node_port(dns));
    for (cluster, external) in cluster_ip(number).into_iter().zip(external_ip(number)) {
        service = service.cluster_ip(cluster).load_balancer_ip(external);
    }
    service
}

/// The kinds of sockets that send requests, as arguments of the client.
const WAYS: [(&str, &[&str]); 8] = [
    ("TCP", &["tcp-client"]),
    ("TCP from a port of its own", &["tcp-client", "--source-port=45007"]),
    ("TCP by a v6 socket", &["tcp-client", "--mapped"]),
    ("UDP", &["udp-client"]),
    ("UDP from a port of its own", &["udp-client", "--source-port=45053"]),
    ("connected UDP", &["udp-client", "--connected"]),
    ("connected UDP from a port of its own", &["udp-client", "--connected", "--source-port=45153"]),
    ("connected UDP by a v6 socket", &["udp-client", "--connected", "--mapped"]),
];

/// Checks that a process of the host is answered whatever kind of socket it uses. Returns who
/// answered at each of the ports (TCP, UDP).
fn asks(client: &Namespace, address: IpAddr, ports: [u16; 2]) -> Result<[BTreeSet<String>; 2]> {
    asks_by(client, &WAYS, 3, address, ports)
}

/// The kinds of sockets that are bound to an address of the host, without that address.
const FROM_AN_ADDRESS: [(&str, &[&str]); 4] = [
    ("TCP from", &["tcp-client", "--source"]),
    ("UDP from", &["udp-client", "--source"]),
    ("UDP from a port of its own at", &["udp-client", "--source-port=45253", "--source"]),
    ("connected UDP from", &["udp-client", "--connected", "--source"]),
];

/// As [`asks`], by sockets that are bound to an address of the host.
fn asks_from(
    client: &Namespace,
    source: IpAddr,
    to: IpAddr,
    ports: [u16; 2],
) -> Result<[BTreeSet<String>; 2]> {
    let source = source.to_string();
    let args = FROM_AN_ADDRESS.map(|(way, args)| (way, [args, &[&*source]].concat()));
    let ways = args.each_ref().map(|(way, args)| (*way, &args[..]));
    asks_by(client, &ways, 3, to, ports).with_context(|| format!("from {source}"))
}

/// Returns a cluster whose node holds the balancer's addresses, as keepalived would have it, with a
/// service of each kind.
fn cluster(name: &str) -> Result<Cluster> {
    let mut cluster = Cluster::without_agents(name, &Plan { near: 1, far: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let _ = node.ip("link set lo up")?;
    for [v4, v6] in NUMBERS.map(external_ip) {
        // Deprecated addresses: otherwise the kernel would use them as the source of other packets.
        let _ = node.ip(&format!(
            "addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad preferred_lft 0"
        ))?;
    }
    cluster.serve(&node)?;
    let [v4, v6] = addresses_of_node(&node);
    let addresses =
        format!("[{{type: InternalIP, address: '{v4}'}}, {{type: InternalIP, address: '{v6}'}}]");
    let object = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nstatus:\n  addresses: ";
    cluster.manifests.write_text("node.yaml", &format!("{object}{addresses}\n"))?;
    // The node is in the ranges by its own address, and so by the one that it holds.
    let ranges = "loadBalancerSourceRanges: [192.0.2.0/24, '2001:db8:0:2::/64']";
    cluster.manifests.write(
        &with_node_ports("plain", NUMBERS[0], PLAIN).spec(ranges).backends(&cluster.backends),
    )?;
    let sticky = with_node_ports("sticky", NUMBERS[1], STICKY).spec("sessionAffinity: ClientIP");
    cluster.manifests.write(&sticky.backends(&cluster.backends))?;
    let itself = Backend::new("n1", "n1", addresses_of_node(&node));
    cluster.manifests.write(&with_node_ports("host", NUMBERS[2], HOST).backends([itself]))?;
    Ok(cluster)
}

#[test]
fn a_process_of_the_host_is_answered_at_its_own_nodes_addresses() -> Result<()> {
    if skip("a_process_of_the_host_is_answered") {
        return Ok(());
    }
    let mut cluster = cluster("own")?;
    let node = cluster.node().clone();
    let loopback: Pair = ["127.0.0.1".parse()?, "::1".parse()?];
    let are_pods = |names: &[BTreeSet<String>; 2]| {
        names.iter().flatten().all(|name| ["near-1", "far-1"].contains(&name.as_str()))
    };
    let are =
        |names: &[BTreeSet<String>; 2], one: &str| names.iter().flatten().all(|name| name == one);
    for (round, mode) in ["off", "host", "all"].into_iter().enumerate() {
        let args = ["--socket-path", mode, "--nodeport-addresses", "primary,localhost"];
        if round == 0 {
            cluster.start_agents(&args)?;
            until_backends(&node, "host", 1)?;
        } else {
            cluster.change_agents(&args)?;
        }
        for places in [addresses_of_node(&node), loopback] {
            for address in places {
                let what = || format!("--socket-path {mode}: {address}");
                let answered = asks(&node, address, PLAIN).with_context(what)?;
                ensure!(are_pods(&answered), "{}: {answered:?}", what());
                let answered = asks(&node, address, STICKY).with_context(what)?;
                ensure!(
                    answered.iter().all(|names| names.len() == 1),
                    "{}: affinity to {answered:?}",
                    what()
                );
                let answered = asks(&node, address, HOST).with_context(what)?;
                ensure!(are(&answered, "n1"), "{}: {answered:?}", what());
            }
        }
        for (address, own) in loopback.into_iter().zip(addresses_of_node(&node)) {
            for (source, to) in [(address, address), (own, own), (address, own)] {
                let what = || format!("--socket-path {mode}: {to}");
                let answered = asks_from(&node, source, to, PLAIN).with_context(what)?;
                ensure!(are_pods(&answered), "{} from {source}: {answered:?}", what());
            }
        }
        for (number, expected) in NUMBERS.into_iter().zip([None, None, Some("n1")]) {
            for address in external_ip(number) {
                let what = || format!("--socket-path {mode}: {address}");
                let answered = asks(&node, address, [ECHO, DNS]).with_context(what)?;
                let expected =
                    expected.map_or_else(|| are_pods(&answered), |name| are(&answered, name));
                ensure!(expected, "{}: {answered:?}", what());
            }
        }
        // Packets that concern no Service pass.
        for address in addresses_of_node(&node) {
            let to = SocketAddr::new(address, DNS_TARGET);
            let direct = node.udp_ask_connected(to, 3).with_context(|| format!("{mode}: {to}"))?;
            ensure!(
                direct.iter().all(|reply| reply.name == "n1" && reply.from == to),
                "{direct:?}"
            );
        }
    }
    // A clean end restores the settings.
    for mut agent in cluster.agents.drain(..) {
        agent.stop()?;
    }
    let _ = node.sluice(&["cleanup"])?;
    for setting in ["accept_local", "route_localnet"] {
        let path = format!("/proc/sys/net/ipv4/conf/lo/{setting}");
        let value = node.run("cat", [&path])?;
        ensure!(value.trim() == "0", "{setting} is {value}");
    }
    Ok(())
}

/// Reports whether a frame is an IP packet from an address.
fn is_from(frame: &[u8], source: IpAddr) -> bool {
    let (ethertype, at) = if source.is_ipv4() { ([8, 0], 26) } else { ([0x86, 0xdd], 22) };
    let source = octets(source);
    frame.get(12..14) == Some(&ethertype) && frame.get(at..at + source.len()) == Some(&source)
}

/// Opens connections by raw frames to a loopback address and then to one that serves. Returns which
/// is answered first.
fn first_answer(
    wire: &PacketSocket,
    to: Mac,
    client: IpAddr,
    [loopback, primary]: [IpAddr; 2],
    port: u16,
) -> Result<IpAddr> {
    for (destination, source_port) in [(loopback, port), (primary, port + 1)] {
        let ends = (SocketAddr::new(client, source_port), SocketAddr::new(destination, PLAIN[0]));
        wire.send(&Frame::tcp(ends.0, ends.1, SYN, &[]).at(to).bytes())?;
    }
    let answer = wire.receive(SOON, |frame| is_from(frame, loopback) || is_from(frame, primary))?;
    Ok(if is_from(&answer, loopback) { loopback } else { primary })
}

#[test]
fn a_loopback_address_is_served_to_processes_of_the_host_alone() -> Result<()> {
    if skip("a_loopback_address_is_served") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("loopback", &Plan { near: 1, ..Plan::default() })?;
    let node: Node = cluster.node().clone();
    let _ = node.ip("link set lo up")?;
    cluster
        .manifests
        .write(&with_node_ports("plain", NUMBERS[0], PLAIN).backends(&cluster.backends))?;
    let loopback: Pair = ["127.0.0.1".parse()?, "::1".parse()?];
    let neighbour = cluster.lab.router().packet_socket(node.uplink_peer())?;
    let pod = cluster.client.packet_socket("eth0")?;
    let wires = [
        (
            "a neighbour",
            &neighbour,
            node.link_address("eth0")?,
            addresses_of_client(&cluster.outside),
        ),
        (
            "a pod",
            &pod,
            node.link_address(cluster.client.host_device())?,
            addresses_of_pod(&cluster.client),
        ),
    ];
    for (round, mode) in ["off", "all"].into_iter().enumerate() {
        let args = ["--socket-path", mode, "--nodeport-addresses", "primary,localhost"];
        if round == 0 {
            cluster.start_agents(&args)?;
        } else {
            cluster.change_agents(&args)?;
        }
        for (index, (inside, primary)) in
            loopback.into_iter().zip(addresses_of_node(&node)).enumerate()
        {
            // The control: the address is served.
            let answered =
                asks(&node, inside, PLAIN).with_context(|| format!("{mode}: {inside}"))?;
            ensure!(answered.iter().flatten().all(|name| name == "near-1"), "{mode}: {answered:?}");
            for (who, wire, to, clients) in &wires {
                let port = 20_000 + 10 * u16::try_from(round)?;
                let from = first_answer(wire, *to, clients[index], [inside, primary], port)
                    .with_context(|| format!("{mode}: {who} at {primary}"))?;
                if from != primary {
                    bail!("{mode}: {who} is answered by {from}");
                }
            }
        }
    }
    Ok(())
}
