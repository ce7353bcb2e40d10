//! Simultaneous conversations: of a pod with itself, with an endpoint directly and through its
//! Service, and with a node whose address is not on the device of the default route.

use std::net::SocketAddr;

use crate::support;
use crate::support::stack::{
    ClusterIps, MODES, NEAR, Proxy, Question, Stack, Target, Way, ask_all, none_wrong, replies,
};
use crate::support::{
    ECHO, ECHO_TARGET, Pair, SOON, addresses_of_client, addresses_of_pod, cluster_ip, skip, status,
    take_fresh_ports,
};
use anyhow::{Context, Result, ensure};
use sluice_lab::{Cni, Event, LoadClients, LoadSize, Namespace, NodeOptions, Overlay, RpFilter};

/// Number of connections that stay: to an endpoint directly, and as many through its Service, of
/// both families together.
const HELD: u32 = 1_000;
/// A number of ports so small that the two meet at each. Every round has its own, because the side
/// that closes a connection keeps its port for a minute.
const FEW_PORTS: u16 = 1_000;

#[test]
fn a_pod_reaches_itself_by_a_node_port_before_anybody_was_masqueraded() -> Result<()> {
    if skip("a_pod_reaches_itself_by_a_node_port") {
        return Ok(());
    }
    let (mut control, mut wrong) = (Vec::new(), Vec::new());
    for (name, cni) in
        [("self-routed", Cni::Routed), ("self-bridge", Cni::Bridge { bridge_nf: false })]
    {
        // The first packet of a family and a protocol that is masqueraded is this one.
        for way in [Way::Tcp, Way::Udp] {
            let options = NodeOptions { cni, ..NodeOptions::default() };
            let mut stack = Stack::new(name, Overlay::None, &options)?;
            for (proxy, args) in [
                (Proxy::Netfilter, &[][..]),
                (Proxy::Sluice, &[]),
                (Proxy::Sluice, &["--socket-path=off"]),
            ] {
                stack.serve_by(proxy, args, ClusterIps::Kept)?;
                take_fresh_ports(&stack.near)?;
                let target = &stack.targets[NEAR];
                for family in 0..2 {
                    let to = target.by_node_port(stack.addresses, way, family);
                    let found = ask_all(&[Question::new(&stack.near, way, to, "near")])?;
                    let told = found
                        .into_iter()
                        .map(|found| format!("{name}: {proxy:?} {args:?}: {found}"));
                    if proxy == Proxy::Netfilter {
                        control.extend(told);
                    } else {
                        wrong.extend(told);
                    }
                }
            }
        }
    }
    none_wrong("a pod and itself, control", &control)?;
    none_wrong("a pod and itself", &wrong)
}

/// One port asks several addresses, one after the other: each answers for itself.
fn asks_in_turn(
    client: &Namespace,
    port: u16,
    all: &[SocketAddr],
    name: &str,
) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for to in all {
        let (source, text) = (format!("--source-port={port}"), to.to_string());
        let asked =
            client.ask(["udp-client", "--count=2", "--timeout-ms=1000", &source, "--to", &text])?;
        let answers = replies(&asked);
        if answers.len() != 2 || answers.iter().any(|reply| reply.from != *to || reply.name != name)
        {
            wrong
                .push(format!("{} from port {port} at {to}, of {all:?}: {asked:?}", client.name()));
        }
    }
    Ok(wrong)
}

#[test]
fn one_port_asks_a_frontend_and_the_endpoint_itself() -> Result<()> {
    if skip("one_port_asks_a_frontend_and_the_endpoint") {
        return Ok(());
    }
    let mut stack = Stack::new("in-turn", Overlay::None, &NodeOptions::default())?;
    for (proxy, modes) in [(Proxy::Netfilter, &MODES[..1]), (Proxy::Sluice, &MODES[..])] {
        let mut wrong = Vec::new();
        for (round, mode) in modes.iter().enumerate() {
            let args: Vec<&str> = mode.args.iter().copied().chain(["--socket-path=off"]).collect();
            stack.serve_by(proxy, &args, mode.cluster_ips)?;
            let mut port =
                20_000 + 1_000 * u16::from(proxy == Proxy::Sluice) + 100 * u16::try_from(round)?;
            for target in &stack.targets {
                for family in 0..2 {
                    let direct = SocketAddr::new(target.addresses[family], support::DNS_TARGET);
                    let by_node_port = target.by_node_port(stack.addresses, Way::Udp, family);
                    let by_cluster_ip = target.by_cluster_ip(Way::Udp, family);
                    for (client, frontend) in [
                        (&*stack.outside, by_node_port),
                        (&*stack.pod, by_node_port),
                        (&*stack.pod, by_cluster_ip),
                    ] {
                        for all in [[frontend, direct], [direct, frontend]] {
                            port += 1;
                            wrong.extend(asks_in_turn(client, port, &all, target.name)?);
                        }
                    }
                }
            }
        }
        none_wrong(&format!("a frontend and its endpoint in turn, {proxy:?}"), &wrong)?;
    }
    Ok(())
}

/// Returns how many ports of a pod's addresses are the source of more than one connection.
fn shared_ports(pod: &Namespace) -> Result<usize> {
    let listed = pod.run("ss", ["-H", "-t", "-n"])?;
    let mut all: Vec<&str> =
        listed.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
    all.sort_unstable();
    let connections = all.len();
    all.dedup();
    Ok(connections - all.len())
}

/// Opens a pod's connections to an endpoint and to its Service, all at once.
fn direct_connections_live(
    stack: &mut Stack,
    proxy: Proxy,
    args: &[&str],
    ports: &mut u16,
) -> Result<Vec<String>> {
    stack.serve_by(proxy, args, ClusterIps::Kept)?;
    let size = LoadSize { held: HELD, rate: 0, seconds: 0 };
    let directly =
        addresses_of_pod(&stack.near).map(|address| SocketAddr::new(address, ECHO_TARGET));
    let by_service =
        cluster_ip(stack.targets[NEAR].number).map(|address| SocketAddr::new(address, ECHO));
    let mut wrong = Vec::new();
    for order in [[directly, by_service], [by_service, directly]] {
        let range = format!("{ports} {}", *ports + FEW_PORTS - 1);
        stack.pod.sysctl("net/ipv4/ip_local_port_range", &range)?;
        *ports += FEW_PORTS;
        let mut loads: Vec<LoadClients> = Vec::new();
        for addresses in order {
            match LoadClients::start(&[(&*stack.pod, addresses.to_vec())], size) {
                Ok(load) => loads.push(load),
                Err(error) => {
                    wrong.push(format!("{addresses:?} after {} others: {error:#}", loads.len()));
                }
            }
        }
        let shared = shared_ports(&stack.pod)?;
        println!("{proxy:?} {args:?}: {shared} ports lead to the endpoint both ways");
        ensure!(
            shared >= HELD as usize * 9 / 10 || !wrong.is_empty(),
            "only {shared} ports lead to the endpoint both ways: this proves nothing"
        );
        for load in &mut loads {
            if let Err(error) = load.unharmed("beside the others") {
                wrong.push(format!("{args:?}, {order:?}: {error:#}"));
            }
        }
    }
    Ok(wrong)
}

#[test]
fn connections_to_a_service_cost_no_direct_connection() -> Result<()> {
    if skip("connections_to_a_service_cost_no_direct_connection") {
        return Ok(());
    }
    let mut stack = Stack::new("beside", Overlay::None, &NodeOptions::default())?;
    let mut ports = 40_000;
    let (mut control, mut wrong) = (Vec::new(), Vec::new());
    for (proxy, args) in [
        (Proxy::Netfilter, &[][..]),
        (Proxy::Sluice, &["--socket-path=off"]),
        (Proxy::Sluice, &["--socket-path=host"]),
    ] {
        let found = direct_connections_live(&mut stack, proxy, args, &mut ports)?;
        if proxy == Proxy::Netfilter { control.extend(found) } else { wrong.extend(found) }
    }
    none_wrong(&format!("{HELD} direct connections beside a Service's, Netfilter"), &control)?;
    none_wrong(&format!("{HELD} direct connections beside a Service's, Sluice"), &wrong)
}

#[test]
fn connections_to_a_node_port_cost_a_client_outside_no_direct_connection() -> Result<()> {
    if skip("connections_to_a_node_port_cost_a_client_outside") {
        return Ok(());
    }
    let mut stack = Stack::new("outer", Overlay::None, &NodeOptions::default())?;
    let target = stack.targets[NEAR].clone();
    let directly = target.addresses.map(|address| SocketAddr::new(address, ECHO_TARGET));
    let by_port = [0, 1].map(|family| target.by_node_port(stack.addresses, Way::Tcp, family));
    let size = LoadSize { held: HELD / 2, rate: 0, seconds: 0 };
    let (mut control, mut wrong) = (Vec::new(), Vec::new());
    let mut ports = 33_000;
    for (proxy, args) in [
        (Proxy::Netfilter, &[][..]),
        (Proxy::Sluice, &[]),
        (Proxy::Sluice, &["--masquerade=kube-proxy"]),
        (Proxy::Sluice, &["--xdp=generic"]),
    ] {
        stack.serve_by(proxy, args, ClusterIps::Kept)?;
        let found = if proxy == Proxy::Netfilter { &mut control } else { &mut wrong };
        for order in [[directly, by_port], [by_port, directly]] {
            let range = format!("{ports} {}", ports + FEW_PORTS / 2 - 1);
            stack.outside.sysctl("net/ipv4/ip_local_port_range", &range)?;
            ports += FEW_PORTS / 2;
            let mut loads: Vec<LoadClients> = Vec::new();
            for addresses in order {
                match LoadClients::start(&[(&*stack.outside, addresses.to_vec())], size) {
                    Ok(load) => loads.push(load),
                    Err(error) => {
                        found
                            .push(format!("{addresses:?} after {} others: {error:#}", loads.len()));
                    }
                }
            }
            let shared = shared_ports(&stack.outside)?;
            println!("{proxy:?} {args:?}: {shared} ports lead to the endpoint both ways");
            ensure!(
                shared >= HELD as usize * 9 / 20 || !found.is_empty(),
                "only {shared} ports lead to the endpoint both ways: this proves nothing"
            );
            for load in &mut loads {
                if let Err(error) = load.unharmed("beside the others") {
                    found.push(format!("{args:?}, {order:?}: {error:#}"));
                }
            }
        }
    }
    none_wrong("direct connections beside a node port's, Netfilter", &control)?;
    none_wrong("direct connections beside a node port's, Sluice", &wrong)
}

/// Connects from one port to an endpoint, and while that goes on to a frontend of it: what is
/// wrong.
fn two_from_one_port(
    client: &Namespace,
    endpoint: SocketAddr,
    frontend: SocketAddr,
    what: &str,
) -> Result<Vec<String>> {
    let to = endpoint.to_string();
    let mut wrong = Vec::new();
    let mut held =
        client.tool(["tcp-client", "--interval-ms=20", "--timeout-ms=2000", "--to", &to])?;
    let _ = held.wait_event("it is answered", SOON, |event| matches!(event, Event::Reply(_)))?;
    let to = frontend.to_string();
    let asked = client.ask([
        "tcp-client",
        "--count=3",
        "--interval-ms=20",
        "--timeout-ms=2000",
        "--to",
        &to,
    ])?;
    let answers = replies(&asked);
    if answers.len() != 3 {
        wrong.push(format!("{what}: {endpoint}, then {frontend}: {asked:?}"));
    }
    if let Err(error) = held.goes_on(8, SOON) {
        wrong.push(format!("{what}: {endpoint} held, then {frontend}: {error:#}"));
    }
    Ok(wrong)
}

#[test]
fn a_flow_takes_no_port_of_a_connection_that_nobody_can_look_up() -> Result<()> {
    if skip("a_flow_takes_no_port_of_a_connection") {
        return Ok(());
    }
    let mut stack = Stack::new("hidden", Overlay::None, &NodeOptions::default())?;
    // It has the pod's address to those outside; its connections are none of the pod's sockets.
    let behind = stack.pod.nested("behind")?;
    let target = stack.targets[NEAR].clone();
    let (mut control, mut wrong) = (Vec::new(), Vec::new());
    let mut port = 41_000;
    for (proxy, args) in [
        (Proxy::Netfilter, &[][..]),
        (Proxy::Sluice, &["--socket-path=off"]),
        (Proxy::Sluice, &["--socket-path=host"]),
        (Proxy::Sluice, &["--socket-path=all"]),
    ] {
        stack.serve_by(proxy, args, ClusterIps::Kept)?;
        for client in [&*stack.pod, &behind] {
            for family in 0..2 {
                port += 1;
                client.sysctl("net/ipv4/ip_local_port_range", &format!("{port} {port}"))?;
                let endpoint = SocketAddr::new(target.addresses[family], ECHO_TARGET);
                let frontend = SocketAddr::new(cluster_ip(target.number)[family], ECHO);
                let what = format!("{proxy:?} {args:?}: {}", client.name());
                let found = two_from_one_port(client, endpoint, frontend, &what)?;
                if proxy == Proxy::Netfilter { control.extend(found) } else { wrong.extend(found) }
            }
        }
    }
    none_wrong("an endpoint, then its Service, control", &control)?;
    none_wrong("an endpoint, then its Service", &wrong)
}

/// A second device, which carries the Node's address; the default route is by the first one.
const NODE_ADDRESSES: [&str; 2] = ["192.0.3.11", "2001:db8:0:3::11"];
const GATEWAYS: [&str; 2] = ["192.0.3.1", "2001:db8:0:3::1"];

fn add_device_with_the_node_address(stack: &Stack) -> Result<Pair> {
    let ([own4, own6], [gateway4, gateway6]) = (NODE_ADDRESSES, GATEWAYS);
    let client = addresses_of_client(&stack.outside);
    let _ = stack.lab.router().ip(&format!(
        "link add to-eth1 type veth peer name eth1 netns {}\nlink set to-eth1 up\n\
         addr add {gateway4}/24 dev to-eth1\naddr add {gateway6}/64 dev to-eth1 nodad",
        stack.node.path().display()
    ))?;
    let _ = stack.node.ip(&format!(
        "link set eth1 up\naddr add {own4}/24 dev eth1\naddr add {own6}/64 dev eth1 nodad\n\
         route add {}/32 via {gateway4} dev eth1\nroute add {}/128 via {gateway6} dev eth1",
        client[0], client[1]
    ))?;
    let object = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {}}}\nstatus: {{addresses: [\
         {{type: InternalIP, address: \"{own4}\"}}, {{type: InternalIP, address: \"{own6}\"}}]}}\n",
        stack.node.name()
    );
    stack.manifests.write_text("node.yaml", &object)?;
    Ok([own4.parse()?, own6.parse()?])
}

#[test]
fn node_ports_are_served_where_the_node_address_is_not_on_the_default_routes_device() -> Result<()>
{
    if skip("node_ports_are_served_where_the_node_address") {
        return Ok(());
    }
    let options = NodeOptions { rp_filter: RpFilter::Loose, ..NodeOptions::default() };
    let mut stack = Stack::new("nested", Overlay::None, &options)?;
    stack.addresses = add_device_with_the_node_address(&stack)?;
    let far: Vec<Target> = stack.targets.clone();
    for proxy in [Proxy::Netfilter, Proxy::Sluice] {
        stack.serve_by(proxy, &[], ClusterIps::Kept)?;
        let mut questions = Vec::new();
        for target in &far {
            for family in 0..2 {
                for way in [Way::Tcp, Way::Udp, Way::Http] {
                    let to = target.by_node_port(stack.addresses, way, family);
                    questions.push(Question::new(&stack.outside, way, to, target.name));
                    questions.push(Question::new(&stack.pod, way, to, target.name));
                }
            }
        }
        let mut wrong = ask_all(&questions)?;
        if proxy == Proxy::Sluice {
            let status = status(&stack.node)?;
            let devices =
                status.get("devices").and_then(|all| all.as_array()).context("no devices")?;
            let role = devices.iter().find(|device| support::word(device, "name") == "eth1");
            if role.is_none_or(|device| support::word(device, "role") != "uplink") {
                wrong.push(format!("eth1 is no uplink: {role:?}"));
            }
        }
        none_wrong(&format!("the node's address on a device of its own, {proxy:?}"), &wrong)?;
    }
    Ok(())
}
