//! Ports of the node's own addresses: node ports, those of connections that the host and netfilter
//! open from here, and those of masqueraded clients. None takes another's packets.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use crate::support::stack::{
    ClusterIps, POD_NETWORKS, Proxy, Question, Stack, Target, Way, ask_all, none_wrong,
    replace_table,
};
use crate::support::{
    DNS_TARGET, ECHO_TARGET, Pair, addresses_of_client, addresses_of_node, addresses_of_pod,
    cluster_ip, on_host, skip,
};
use anyhow::Result;
use sluice_lab::{Event, LoadClients, LoadSize, Namespace, NodeOptions, Overlay, Port, Service};

/// Numbers that are node ports, each for TCP and for UDP.
const NODE_PORTS: Range<u16> = 30_000..30_300;
/// The range from which netfilter and the host take source ports: a third of them are node ports.
const TAKEN: [u16; 2] = [30_000, 30_899];
/// Connections, and questions, that leave from such ports, in each family.
const CONNECTIONS: u32 = 300;
const QUESTIONS: u32 = 200;
/// Connections that the host opens from the same range.
const OF_THE_HOST: u32 = 40;

/// The host's, or a client's, own ports.
const RANGE: &str = "net/ipv4/ip_local_port_range";

/// Masqueraded clients of one endpoint that stay, of both families together, and connections of
/// pods to it, of each. Of the 28 976 ports that both are taken from two meet some 25 times.
const HELD: u32 = 800;
const DIRECT: u32 = 1_000;
/// Ports that Sluice shows masqueraded clients with, as nft writes them.
const SHARED: &str = "1024-29999";

/// Has netfilter masquerade what pods send to others than pods, as CNIs do, from random ports of a
/// range.
fn masquerade_pods(stack: &Stack, ports: &str) -> Result<()> {
    let rules: Vec<String> = ["ip", "ip6"]
        .into_iter()
        .zip(POD_NETWORKS)
        .map(|(ip, pods)| {
            format!(
                "{ip} saddr {pods} {ip} daddr != {pods} meta l4proto {{ tcp, udp }} masquerade to :{ports} fully-random"
            )
        })
        .collect();
    let chain = "type nat hook postrouting priority srcnat + 10;";
    replace_table(&stack.node, "cni", &format!("chain leaves {{ {chain}\n{}\n}}", rules.join("\n")))
}

/// Opens many connections one after the other, each with time for a second try where the server's
/// queue was full, and tells what became of those that failed.
fn open_many(client: &Namespace, to: SocketAddr, count: u32) -> Result<Vec<String>> {
    let events = client.ask([
        "many-client",
        "--timeout-ms=1800",
        "--failures=10",
        &format!("--count={count}"),
        &format!("--to={to}"),
    ])?;
    let failed = events.into_iter().filter_map(|event| match event {
        Event::Lost { seq, reason, .. } => {
            Some(format!("{} > {to}, connection {seq}: {reason}", client.name()))
        }
        Event::Listening { .. }
        | Event::Connected { .. }
        | Event::Reply(_)
        | Event::Load(_)
        | Event::Broken { .. }
        | Event::Done { .. } => None,
    });
    Ok(failed.collect())
}

/// Services whose node ports are all of [`NODE_PORTS`].
fn publish_node_ports(stack: &Stack) -> Result<()> {
    let numbers: Vec<u16> = NODE_PORTS.collect();
    for (index, numbers) in numbers.chunks(50).enumerate() {
        let [v4, v6] = cluster_ip(u8::try_from(100 + index)?);
        let mut service = Service::new(&format!("many-{index}")).cluster_ip(v4).cluster_ip(v6);
        for number in numbers {
            service = service
                .port(Port::tcp(&format!("tcp-{number}"), *number, ECHO_TARGET).node_port(*number))
                .port(Port::udp(&format!("udp-{number}"), *number, DNS_TARGET).node_port(*number));
        }
        stack.manifests.write(&service.backends([&stack.near]))?;
    }
    Ok(())
}

/// The same as the rules of another proxy.
fn node_port_rules(stack: &Stack) -> Result<()> {
    let mut rules = String::new();
    let ends = stack.addresses.into_iter().zip(addresses_of_pod(&stack.near));
    for ((node, endpoint), ip) in ends.zip(["ip", "ip6"]) {
        for (protocol, target) in [("tcp", ECHO_TARGET), ("udp", DNS_TARGET)] {
            let to = SocketAddr::new(endpoint, target);
            let ports = format!("{}-{}", NODE_PORTS.start, NODE_PORTS.end - 1);
            let _ = writeln!(rules, "{ip} daddr {node} {protocol} dport {ports} dnat {ip} to {to}");
        }
    }
    let chains = format!(
        "chain comes {{ type nat hook prerouting priority dstnat; {rules}\n}}\n\
         chain begins {{ type nat hook output priority -100; {rules}\n}}"
    );
    replace_table(&stack.node, "many", &chains)
}

fn what_leaves_from_node_ports_is_answered(stack: &mut Stack, proxy: Proxy) -> Result<Vec<String>> {
    if proxy == Proxy::Sluice {
        stack.node.nft("delete table inet many")?;
        // What has ended keeps its ports for two minutes there.
        let _ = stack.node.run("conntrack", ["-F"])?;
    }
    stack.serve_by(proxy, &[], ClusterIps::Kept)?;
    for client in [&*stack.pod, &*stack.outside] {
        client.sysctl(RANGE, "32768 60999")?;
    }
    // They are served.
    let mut questions = Vec::new();
    for (family, node) in stack.addresses.into_iter().enumerate() {
        for (way, number) in [(Way::Tcp, NODE_PORTS.start), (Way::Udp, NODE_PORTS.end - 1)] {
            questions.push(Question {
                seen: Some(addresses_of_client(&stack.outside)[family]),
                ..Question::new(&stack.outside, way, SocketAddr::new(node, number), "near")
            });
        }
    }
    let mut wrong = ask_all(&questions)?;
    for server in addresses_of_client(&stack.outside) {
        let (echo, dns) =
            (SocketAddr::new(server, ECHO_TARGET), SocketAddr::new(server, DNS_TARGET));
        wrong.extend(open_many(&stack.pod, echo, CONNECTIONS)?);
        if let Err(error) = stack.pod.udp_ask(dns, QUESTIONS) {
            wrong.push(format!("{error:#}"));
        }
        // Processes of the host: by the number of a node port that they bind to, and by chance.
        for (kind, to) in [("tcp-client", echo), ("udp-client", dns)] {
            let (to, port) =
                (format!("--to={to}"), format!("--source-port={}", NODE_PORTS.start + 5));
            let events = stack.node.ask([kind, "--count=2", "--timeout-ms=1000", &to, &port])?;
            if !matches!(events.last(), Some(Event::Done { received: 2, .. })) {
                wrong.push(format!("the host's {kind} {to} {port}: {events:?}"));
            }
        }
        stack.node.sysctl(RANGE, &TAKEN.map(|port| port.to_string()).join(" "))?;
        wrong.extend(open_many(&stack.node, echo, OF_THE_HOST)?);
        stack.node.sysctl(RANGE, "32768 60999")?;
    }
    Ok(wrong)
}

#[test]
fn connections_that_leave_from_a_node_ports_number_are_left_alone() -> Result<()> {
    if skip("connections_that_leave_from_a_node_ports_number") {
        return Ok(());
    }
    let mut stack = Stack::new("leaving", Overlay::None, &NodeOptions::default())?;
    let outside = stack.outside.clone();
    stack.serve(&outside)?;
    publish_node_ports(&stack)?;
    masquerade_pods(&stack, &TAKEN.map(|port| port.to_string()).join("-"))?;
    node_port_rules(&stack)?;
    for proxy in [Proxy::Netfilter, Proxy::Sluice] {
        let wrong = what_leaves_from_node_ports_is_answered(&mut stack, proxy)?;
        none_wrong(&format!("{CONNECTIONS} connections from node ports, {proxy:?}"), &wrong)?;
    }
    Ok(())
}

/// Clients outside that are masqueraded, and pods that netfilter masquerades, all to one endpoint.
fn one_endpoint_is_shared(stack: &mut Stack, proxy: Proxy, endpoint: Pair) -> Result<Vec<String>> {
    stack.serve_by(proxy, &[], ClusterIps::Kept)?;
    for client in [&*stack.pod, &*stack.outside] {
        client.sysctl(RANGE, "32768 60999")?;
    }
    let target = &stack.targets[0];
    let frontends = [0, 1].map(|family| target.by_node_port(stack.addresses, Way::Tcp, family));
    let size = LoadSize { held: HELD, rate: 0, seconds: 0 };
    let mut held = LoadClients::start(&[(&*stack.outside, frontends.to_vec())], size)?;
    let mut wrong = Vec::new();
    let mut direct = Vec::new();
    // Netfilter chooses beside ours.
    for to in endpoint.map(|address| SocketAddr::new(address, ECHO_TARGET)) {
        let mut client = stack.pod.tool([
            "many-client",
            "--timeout-ms=1800",
            "--failures=10",
            "--hold-ms=60000",
            &format!("--count={DIRECT}"),
            &format!("--to={to}"),
        ])?;
        let done = |event: &Event| matches!(event, Event::Done { .. });
        let _ = client.wait_event("all are open", Duration::from_mins(1), done)?;
        let failed =
            client.events().into_iter().filter(|event| matches!(event, Event::Lost { .. }));
        wrong.extend(failed.map(|event| format!("a pod at {to}: {event:?}")));
        direct.push(client);
    }
    // Ours are chosen beside netfilter's.
    for to in frontends {
        wrong.extend(open_many(&stack.outside, to, DIRECT)?);
    }
    for to in endpoint.map(|address: IpAddr| SocketAddr::new(address, DNS_TARGET)) {
        if let Err(error) = stack.pod.udp_ask(to, 200) {
            wrong.push(format!("{error:#}"));
        }
    }
    if let Err(error) = held.unharmed("beside connections of pods") {
        wrong.push(format!("{error:#}"));
    }
    for mut client in direct {
        let _ = client.kill()?;
    }
    Ok(wrong)
}

#[test]
fn masqueraded_clients_and_connections_that_netfilter_masquerades_do_not_meet() -> Result<()> {
    if skip("masqueraded_clients_and_connections_that_netfilter_masquerades") {
        return Ok(());
    }
    let mut stack = Stack::new("shared", Overlay::None, &NodeOptions::default())?;
    let other = stack.other.clone();
    stack.serve(&other)?;
    let endpoint = addresses_of_node(&other);
    let backend = on_host(&other);
    stack.targets =
        vec![Target { name: "n2", number: 25, backend, addresses: endpoint, is_local: false }];
    stack.publish(&stack.targets[0])?;
    masquerade_pods(&stack, SHARED)?;
    for proxy in [Proxy::Netfilter, Proxy::Sluice] {
        let wrong = one_endpoint_is_shared(&mut stack, proxy, endpoint)?;
        none_wrong(
            &format!("{HELD} masqueraded clients beside {DIRECT} connections, {proxy:?}"),
            &wrong,
        )?;
    }
    Ok(())
}
