//! ICMP errors to and from masqueraded clients, and a client that reopens a connection that it has
//! forgotten.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::support;
use crate::support::stack::{
    FAR, MODES, Mode, NEAR, Proxy, Question, Stack, Target, Way, ask_all, none_wrong,
    replace_table, replies,
};
use crate::support::{
    DNS_TARGET, Pair, SOON, addresses_of_pod, external_ip, route_to, skip, take_fresh_ports,
};
use anyhow::{Context, Result};
use sluice_lab::{Event, Namespace, NodeOptions, Overlay, PacketSocket};
use socket2::{Domain, Protocol, Socket, Type};

/// The MTU of the way to the client, and of that to the endpoint.
const NARROW: u32 = 1_300;
const NARROW_AT_THE_ENDPOINT: u32 = 1_400;

/// Returns the content of an ICMP error in a frame: type and code, the receiver, and the quoted
/// packet's source and destination.
fn quoted(frame: &[u8]) -> Option<([u8; 2], IpAddr, SocketAddr, SocketAddr)> {
    let word = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(at..at + 16)?).ok()?));
    let (kind, destination, [source, to], ports) = match word(12)? {
        0x0800 if frame.get(23) == Some(&1) => (34, v4(30)?, [v4(54)?, v4(58)?], 62),
        0x86dd if frame.get(20) == Some(&58) => (54, v6(38)?, [v6(70)?, v6(86)?], 102),
        _ => return None,
    };
    let kind = frame.get(kind..kind + 2)?.try_into().ok()?;
    Some((
        kind,
        destination,
        SocketAddr::new(source, word(ports)?),
        SocketAddr::new(to, word(ports + 2)?),
    ))
}

/// Type and code of "port unreachable".
fn port_unreachable(address: IpAddr) -> [u8; 2] {
    if address.is_ipv4() { [3, 3] } else { [1, 4] }
}

/// Sends a datagram of a connected socket to a frontend whose endpoint does not listen: it is
/// refused.
fn a_closed_port_is_told(client: &Namespace, to: SocketAddr) -> Result<Option<String>> {
    let to = to.to_string();
    let events =
        client.ask(["udp-client", "--connected", "--count=1", "--timeout-ms=1500", "--to", &to])?;
    let is_told = events
        .iter()
        .any(|event| matches!(event, Event::Lost { reason, .. } if reason.contains("refused")));
    Ok((!is_told).then(|| format!("{to}: nobody listens, and the client hears {events:?}")))
}

/// Checks that the endpoint receives the ICMP error of a client that no longer listens, about the
/// packet that the endpoint sent.
fn a_closed_client_is_told(
    stack: &Stack,
    to: SocketAddr,
    endpoint: IpAddr,
    wire: &PacketSocket,
) -> Result<Option<String>> {
    replace_table(
        &stack.outside,
        "closed",
        &format!(
            "chain in {{ type filter hook input priority 0; udp sport {} reject with icmpx port-unreachable\n}}",
            to.port()
        ),
    )?;
    let text = to.to_string();
    let _ = stack.outside.ask(["udp-client", "--count=1", "--timeout-ms=100", "--to", &text])?;
    stack.outside.nft("delete table inet closed")?;
    let is_error =
        |frame: &[u8]| quoted(frame).is_some_and(|(kind, ..)| kind == port_unreachable(endpoint));
    let Ok(frame) = wire.receive(Duration::from_millis(1_500), is_error) else {
        return Ok(Some(format!(
            "{to}: the client rejects an answer, and the endpoint {endpoint} hears nothing"
        )));
    };
    let (_, destination, source, _) = quoted(&frame).context("the frame just seen")?;
    let is_right = destination == endpoint && source == SocketAddr::new(endpoint, DNS_TARGET);
    Ok((!is_right).then(|| format!("{to}: the error to {destination} quotes a packet of {source}")))
}

/// Sends a datagram that is too large for the path behind the node: the client's kernel learns the
/// MTU, and a datagram that fits is answered.
fn a_narrow_way_to_the_endpoint_is_told(
    client: &Namespace,
    to: SocketAddr,
) -> Result<Option<String>> {
    let text = to.to_string();
    // It is not answered, since an answer of that length does not fit either.
    let _ = client.ask([
        "udp-client",
        "--count=1",
        "--size=1450",
        "--timeout-ms=400",
        "--to",
        &text,
    ])?;
    let family = if to.is_ipv4() { "-4" } else { "-6" };
    let route = client.run("ip", [family, "route", "get", &to.ip().to_string()])?;
    if !route.contains(&format!("mtu {NARROW_AT_THE_ENDPOINT}")) {
        return Ok(Some(format!(
            "{to}: the client has not learned how large a packet may be: {route}"
        )));
    }
    let events = client.ask([
        "udp-client",
        "--count=1",
        "--size=1300",
        "--timeout-ms=1500",
        "--to",
        &text,
    ])?;
    Ok(replies(&events).is_empty().then(|| format!("{to}: what fits is not answered: {events:?}")))
}

/// A client outside learns the MTU of the route to an endpoint on another node, locked or not.
fn a_routes_mtu_is_told(
    stack: &Stack,
    flush: &dyn Fn(&Stack) -> Result<()>,
) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let gateways: Pair = [stack.other.ipv4().into(), stack.other.ipv6().into()];
    let ways = addresses_of_pod(&stack.far).into_iter().zip(gateways).enumerate();
    for (family, (endpoint, gateway)) in ways {
        let route =
            format!("{endpoint}/{} via {gateway}", if endpoint.is_ipv4() { 32 } else { 128 });
        for lock in ["", "lock "] {
            flush(stack)?;
            let mtu = NARROW_AT_THE_ENDPOINT;
            let _ = stack.node.ip(&format!("route add {route} dev eth0 mtu {lock}{mtu}"))?;
            let dns = stack.targets[FAR].by_node_port(stack.addresses, Way::Udp, family);
            take_fresh_ports(&stack.outside)?;
            let told = a_narrow_way_to_the_endpoint_is_told(&stack.outside, dns)?;
            wrong.extend(told.map(|found| format!("the route's MTU ({lock}{mtu}): {found}")));
            let _ = stack.node.ip(&format!("route del {route} dev eth0"))?;
        }
    }
    Ok(wrong)
}

fn errors_go_both_ways(
    stack: &mut Stack,
    closed: &[Target; 2],
    proxy: Proxy,
    mode: &Mode,
) -> Result<Vec<String>> {
    stack.serve_by(proxy, mode.args, mode.cluster_ips)?;
    let what = format!("{proxy:?} {}", mode.name);
    let mut wrong = Vec::new();
    let flush = |stack: &Stack| -> Result<()> {
        // Removes the MTUs that earlier rounds have learned.
        for namespace in [&*stack.outside, &stack.near, &stack.far] {
            for family in ["-4", "-6"] {
                let _ = namespace.run("ip", [family, "route", "flush", "cache"])?;
            }
        }
        Ok(())
    };
    let ends = [NEAR, FAR]
        .map(|index| (stack.targets[index].clone(), [&stack.near, &stack.far][index].clone()));
    for (target, pod) in &ends {
        let wire = pod.packet_socket("eth0")?;
        for (family, endpoint) in addresses_of_pod(pod).into_iter().enumerate() {
            let dns = target.by_node_port(stack.addresses, Way::Udp, family);
            let of_nobody = &closed[usize::from(target.name == "far")];
            let nobody = of_nobody.by_node_port(stack.addresses, Way::Udp, family);
            take_fresh_ports(&stack.outside)?;
            wrong.extend(a_closed_port_is_told(&stack.outside, nobody)?);
            wrong.extend(a_closed_client_is_told(stack, dns, endpoint, &wire)?);
        }
    }
    // The client's link is narrower than its device says: the endpoint has to learn it.
    flush(stack)?;
    stack.outside.narrow_link(NARROW)?;
    let mut questions = Vec::new();
    for (target, _) in &ends {
        for family in 0..2 {
            let to = target.by_node_port(stack.addresses, Way::Http, family);
            questions.push(Question::new(&stack.outside, Way::Http, to, target.name));
        }
    }
    wrong.extend(ask_all(&questions)?);
    stack.outside.narrow_link(1_500)?;
    // The endpoints' links are: the client has to learn it.
    flush(stack)?;
    for (_, pod) in &ends {
        let _ = pod
            .node()
            .ip(&format!("link set {} mtu {NARROW_AT_THE_ENDPOINT}", pod.host_device()))?;
    }
    for (target, _) in &ends {
        for family in 0..2 {
            flush(stack)?;
            let dns = target.by_node_port(stack.addresses, Way::Udp, family);
            wrong.extend(a_narrow_way_to_the_endpoint_is_told(&stack.outside, dns)?);
        }
    }
    for (_, pod) in &ends {
        let _ = pod.node().ip(&format!("link set {} mtu {}", pod.host_device(), 1_500))?;
    }
    wrong.extend(a_routes_mtu_is_told(stack, &flush)?);
    flush(stack)?;
    Ok(wrong.into_iter().map(|found| format!("{what}: {found}")).collect())
}

#[test]
fn errors_reach_masqueraded_clients_and_their_endpoints() -> Result<()> {
    if skip("errors_reach_masqueraded_clients") {
        return Ok(());
    }
    let mut stack = Stack::new("errors", Overlay::None, &NodeOptions::default())?;
    // The same endpoints, and next to them pods on which nobody listens.
    let (near, far) = (stack.node.pod("near-closed")?, stack.other.pod("far-closed")?);
    let closed = [Target::of_pod("near-closed", 12, &near), Target::of_pod("far-closed", 22, &far)];
    for target in &closed {
        stack.publish(target)?;
        stack.targets.push(target.clone());
    }
    for proxy in [Proxy::Netfilter, Proxy::Sluice] {
        let mut wrong = Vec::new();
        // The modes masquerade nobody, the clients of far endpoints, or all.
        let modes = if proxy == Proxy::Netfilter {
            vec![&MODES[0]]
        } else {
            vec![&MODES[0], &MODES[4], &MODES[2]]
        };
        for mode in modes {
            wrong.extend(errors_go_both_ways(&mut stack, &closed, proxy, mode)?);
        }
        none_wrong(&format!("errors, {proxy:?}"), &wrong)?;
    }
    Ok(())
}

/// Opens a connection from a port and forgets it without sending anything, as a machine does that
/// loses its power.
fn open_and_forget(client: &Namespace, port: u16, to: SocketAddr) -> Result<()> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
    client.enter(|| -> Result<()> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(any, port).into())?;
        socket.connect_timeout(&to.into(), SOON)?;
        socket.set_read_timeout(Some(SOON))?;
        // Both ends have sent, so nothing about it is a guess.
        for line in [b"1\n", b"2\n"] {
            let _ = socket.send(line)?;
            let _ = socket.recv(&mut [std::mem::MaybeUninit::uninit(); 256])?;
        }
        // It ends with a reset, which the rule below drops.
        socket.set_linger(Some(Duration::ZERO))?;
        drop(socket);
        Ok(())
    })?
}

fn a_forgotten_connection_is_opened_again(
    stack: &mut Stack,
    proxy: Proxy,
    args: &[&str],
) -> Result<Vec<String>> {
    stack.serve_by(proxy, args, MODES[0].cluster_ips)?;
    let mut wrong = Vec::new();
    for family in 0..2 {
        let vip = external_ip(stack.targets[NEAR].number)[family];
        let by_node_port = stack.targets[NEAR].by_node_port(stack.addresses, Way::Tcp, family);
        for (port, to) in [(41_000, by_node_port), (41_001, SocketAddr::new(vip, support::ECHO))] {
            let forgets = "chain out { type filter hook output priority 0; tcp flags & (rst | fin) != 0 drop; }";
            replace_table(&stack.outside, "forgets", forgets)?;
            open_and_forget(&stack.outside, port, to).with_context(|| format!("{args:?}: {to}"))?;
            stack.outside.nft("delete table inet forgets")?;
            let (source, text) = (format!("--source-port={port}"), to.to_string());
            let asked = stack.outside.ask([
                "tcp-client",
                "--count=2",
                "--timeout-ms=6000",
                &source,
                "--to",
                &text,
            ])?;
            let answers = replies(&asked);
            let is_right = answers.len() == 2
                && answers.iter().all(|reply| reply.name == "near" && reply.from == to);
            if !is_right {
                wrong.push(format!("{proxy:?} {args:?}: {to} from the same port again: {asked:?}"));
            }
        }
    }
    Ok(wrong)
}

#[test]
fn a_client_opens_a_connection_again_that_it_has_forgotten() -> Result<()> {
    if skip("a_client_opens_a_connection_again") {
        return Ok(());
    }
    let mut stack = Stack::new("forgotten", Overlay::None, &NodeOptions::default())?;
    // Packets that XDP may finish have whole checksums.
    stack.outside.offload("eth0", "tx", false)?;
    stack.node.uplink_peer_full_checksums()?;
    let number = stack.targets[NEAR].number;
    let [external4, external6]: Pair = external_ip(number);
    for address in external_ip(number) {
        route_to(&stack.lab, address, &stack.node)?;
    }
    let service =
        stack.targets[NEAR].service().load_balancer_ip(external4).load_balancer_ip(external6);
    stack.manifests.write(&service)?;
    let near =
        addresses_of_pod(&stack.near).map(|address| SocketAddr::new(address, support::ECHO_TARGET));
    replace_table(
        &stack.node,
        "balancer",
        &format!(
            "chain comes {{ type nat hook prerouting priority dstnat;
                ip daddr {external4} tcp dport 7 dnat ip to {}
                ip6 daddr {external6} tcp dport 7 dnat ip6 to {}
            }}",
            near[0], near[1]
        ),
    )?;
    none_wrong(
        "forgotten, control",
        &a_forgotten_connection_is_opened_again(&mut stack, Proxy::Netfilter, &[])?,
    )?;
    stack.node.nft("delete table inet balancer")?;
    let mut wrong = Vec::new();
    for args in [&["--xdp=off"][..], &["--xdp=generic"]] {
        wrong.extend(a_forgotten_connection_is_opened_again(&mut stack, Proxy::Sluice, args)?);
    }
    none_wrong("forgotten", &wrong)
}
