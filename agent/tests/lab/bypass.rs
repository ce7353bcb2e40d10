//! A packet that goes around the stack is treated as the stack would treat it: the path's MTU, the
//! hop limit, VLAN tags. The control is the set of rules that kube-proxy would have.

use std::cell::Cell;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use crate::support;
use crate::support::frame::{Frame, SYN, octets};
use crate::support::stack::{ClusterIps, FAR, NEAR, Proxy, Stack, none_wrong, replies};
use crate::support::{
    DNS, ECHO, Pair, SOON, addresses_of_pod, cluster_ip, skip, take_fresh_ports, until,
};
use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use sluice_lab::{Namespace, NodeOptions, Overlay, PacketSocket, Pod};
use socket2::SockRef;

/// An MTU of the path, below the device's, and one below that.
const NARROW: usize = 1_400;
const NARROWER: usize = 1_300;
const ARGS: &[&str] = &["--socket-path", "off"];

/// Returns the length of the IP packet in a frame, if it goes to an address.
fn length_to(frame: &[u8], to: IpAddr) -> Option<usize> {
    let (ethertype, at) = if to.is_ipv4() { ([8, 0], 30) } else { ([0x86, 0xdd], 38) };
    let to = octets(to);
    let is_right =
        frame.get(12..14) == Some(&ethertype) && frame.get(at..at + to.len()) == Some(&to);
    is_right.then_some(frame.len() - 14)
}

/// Returns the length of the largest packet to an address that has arrived, and their number.
fn largest(wire: &PacketSocket, to: IpAddr) -> (usize, usize) {
    let (largest, count) = (Cell::new(0), Cell::new(0));
    let _ = wire.receive(Duration::from_millis(300), |frame| {
        if let Some(length) = length_to(frame, to) {
            largest.set(largest.get().max(length));
            count.set(count.get() + 1);
        }
        false
    });
    (largest.get(), count.get())
}

/// Sends one line of many segments, and waits for the answer about it.
fn says_much(client: &Namespace, to: SocketAddr) -> Result<()> {
    let stream = client.enter(|| TcpStream::connect_timeout(&to, SOON))?;
    let mut stream = stream.with_context(|| format!("cannot connect to {to}"))?;
    stream.set_read_timeout(Some(SOON))?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let mut greeting = String::new();
    let _ = answers.read_line(&mut greeting)?;
    stream.write_all(&vec![b'x'; 20_000])?;
    stream.write_all(b"\n")?;
    let mut answer = String::new();
    let _ = answers
        .read_line(&mut answer)
        .with_context(|| format!("{to} says nothing to a long line"))?;
    ensure!(!answer.is_empty(), "{to} has closed");
    Ok(())
}

/// Makes the host forget the MTUs that it has learned of paths to the far endpoint and its Service.
fn forget_learned(stack: &Stack) -> Result<()> {
    let vips = cluster_ip(stack.targets[FAR].number).into_iter();
    for (vip, endpoint) in vips.zip(addresses_of_pod(&stack.far)) {
        let family = if vip.is_ipv4() { "-4" } else { "-6" };
        let _ = stack.node.run("ip", [family, "route", "flush", "cache"])?;
        // An MTU is forgotten only when somebody looks it up.
        for address in [vip, endpoint] {
            let _ = stack.node.run("ip", [family, "route", "get", &address.to_string()])?;
        }
    }
    Ok(())
}

/// Waits until the host's own large packets reach the other node in the expected sizes.
fn until_packets_leave(stack: &Stack, is_right: impl Fn(usize) -> bool) -> Result<()> {
    for (vip, endpoint) in
        cluster_ip(stack.targets[FAR].number).into_iter().zip(addresses_of_pod(&stack.far))
    {
        let wire = stack.other.packet_socket("eth0")?;
        let to = SocketAddr::new(vip, DNS).to_string();
        let mut size = 0;
        let asked = until("large packets to the endpoint have the size that the way takes", || {
            forget_learned(stack)?;
            // The first one is lost if the sender has to learn the size.
            let args = ["--connected", "--count=2", "--size=1450", "--timeout-ms=200", "--to", &to];
            let _ = stack.node.ask(["udp-client"].iter().chain(&args))?;
            let (found, _) = largest(&wire, endpoint);
            size = found;
            Ok(is_right(found).then_some(()))
        });
        asked.with_context(|| format!("to {to}: the largest packet had {size} bytes"))?;
    }
    forget_learned(stack)
}

/// Sends the host's own packets to an endpoint on another node, by a path that is narrower than its
/// first device, and checks that none is too large.
fn none_is_too_large(
    stack: &Stack,
    proxy: Proxy,
    what: &str,
    mtu: usize,
    [answers, told]: [bool; 2],
) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let node = &*stack.node;
    take_fresh_ports(node)?;
    for (vip, endpoint) in
        cluster_ip(stack.targets[FAR].number).into_iter().zip(addresses_of_pod(&stack.far))
    {
        let wire = stack.other.packet_socket("eth0")?;
        let to = SocketAddr::new(vip, DNS).to_string();
        let args = ["--connected", "--count=4", "--size=1450", "--timeout-ms=500", "--to", &to];
        let events = node.ask(["udp-client"].iter().chain(&args))?;
        if answers && replies(&events).is_empty() {
            wrong.push(format!("{proxy:?}, {what}: {to} answers nothing large: {events:?}"));
        }
        let long = says_much(node, SocketAddr::new(vip, ECHO));
        wrong.extend(long.err().map(|error| format!("{proxy:?}, {what}: {error:#}")));
        let (largest, count) = largest(&wire, endpoint);
        if largest > mtu || count == 0 {
            wrong.push(format!(
                "{proxy:?}, {what}: {count} packets to {endpoint}, up to {largest} bytes"
            ));
        }
        let family = if vip.is_ipv4() { "-4" } else { "-6" };
        let route = node.run("ip", [family, "route", "get", &vip.to_string()])?;
        if told && !route.contains(&format!("mtu {mtu}")) {
            wrong.push(format!("{proxy:?}, {what}: the host has not learned the MTU: {route}"));
        }
    }
    Ok(wrong)
}

#[test]
fn the_paths_mtu_counts_for_the_hosts_own_packets() -> Result<()> {
    if skip("the_paths_mtu_counts") {
        return Ok(());
    }
    let mut stack = Stack::new("path-mtu", Overlay::None, &NodeOptions::default())?;
    for feature in ["tso", "gso"] {
        // Segments have the size that they have on a wire.
        stack.node.offload("eth0", feature, false)?;
    }
    let far = addresses_of_pod(&stack.far);
    let gateways: Pair = [stack.other.ipv4().into(), stack.other.ipv6().into()];
    for proxy in [Proxy::Netfilter, Proxy::Sluice] {
        stack.serve_by(proxy, ARGS, ClusterIps::Kept)?;
        let node = stack.node.clone();
        // Routes to the networks of 2^`bits` addresses that the endpoint's are in.
        let route = |verb: &str, bits: u8, mtu: &str| -> Result<()> {
            for (address, gateway) in far.into_iter().zip(gateways) {
                let length = if address.is_ipv4() { 32 } else { 128 } - bits;
                let network = IpNet::new(address, length)?.trunc();
                let _ = node.ip(&format!("route {verb} {network} via {gateway} dev eth0 {mtu}"))?;
            }
            Ok(())
        };
        // The control: without a narrow path large packets do leave.
        route("add", 0, "")?;
        until_packets_leave(&stack, |size| size > NARROW)?;
        // netfilter's fragments leave without an error if the sender does not insist on whole
        // packets.
        let told = proxy == Proxy::Sluice;
        let mut wrong = Vec::new();
        // The agent reports an unlocked MTU to the programs, and each change of it.
        for (lock, mtu) in [("", NARROW), ("", NARROWER), ("lock ", NARROW)] {
            route("replace", 0, &format!("mtu {lock}{mtu}"))?;
            // Packets of the size of the MTU before do not show that this one has arrived.
            until_packets_leave(&stack, |size| size > mtu - (NARROW - NARROWER) && size <= mtu)?;
            let what = format!("the route's MTU ({lock}{mtu})");
            wrong.extend(none_is_too_large(&stack, proxy, &what, mtu, [true, told])?);
        }
        // A route without an MTU within one that has one.
        route("add", 1, &format!("mtu {NARROWER}"))?;
        route("replace", 0, "")?;
        until_packets_leave(&stack, |size| size > NARROW)?;
        // The network's MTU applies as soon as it is the only one, and only while it exists.
        route("del", 0, "")?;
        until_packets_leave(&stack, |size| size > 0 && size <= NARROWER)?;
        route("del", 1, "")?;
        until_packets_leave(&stack, |size| size > NARROW)?;
        // The same with a learned MTU: a link behind the other node is narrower.
        let device = stack.far.host_device();
        let _ = stack.other.ip(&format!("link set {device} mtu {NARROW}"))?;
        for address in far {
            let to = SocketAddr::new(address, support::DNS_TARGET).to_string();
            let _ = node.ask(["udp-client", "--size=1450", "--timeout-ms=300", "--to", &to])?;
            let family = if address.is_ipv4() { "-4" } else { "-6" };
            let route = node.run("ip", [family, "route", "get", &address.to_string()])?;
            ensure!(route.contains(&format!("mtu {NARROW}")), "nothing was learned: {route}");
        }
        // Answers of that size do not fit either.
        wrong.extend(none_is_too_large(&stack, proxy, "a learned MTU", NARROW, [false, told])?);
        let _ = stack.other.ip(&format!("link set {device} mtu 1500"))?;
        // While the routes exist that it was learned for: below other routes nothing removes it.
        forget_learned(&stack)?;
        none_wrong("the path's MTU", &wrong)?;
    }
    Ok(())
}

/// Reports whether a frame holds "time exceeded" about a packet to an address.
fn is_time_exceeded(frame: &[u8], to: IpAddr) -> bool {
    let (kind, at) = if to.is_ipv4() { (34, 58) } else { (54, 86) };
    let (protocol, number) = if to.is_ipv4() { (frame.get(23), 1) } else { (frame.get(20), 58) };
    let expected: [u8; 2] = if to.is_ipv4() { [11, 0] } else { [3, 0] };
    let to = octets(to);
    protocol == Some(&number)
        && frame.get(kind..kind + 2) == Some(&expected)
        && frame.get(at..at + to.len()) == Some(&to)
}

/// Sends one datagram with a hop limit.
fn send_with_hops(client: &Namespace, to: SocketAddr, hops: u32) -> Result<()> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = client.enter(|| UdpSocket::bind(SocketAddr::new(any, 0)))??;
    if to.is_ipv4() {
        socket.set_ttl(hops)?;
    } else {
        SockRef::from(&socket).set_unicast_hops_v6(hops)?;
    }
    let _ = socket.send_to(b"hops", to)?;
    Ok(())
}

#[test]
fn a_hop_limit_that_runs_out_is_answered() -> Result<()> {
    if skip("a_hop_limit_that_runs_out") {
        return Ok(());
    }
    let mut stack = Stack::new("hop-limit", Overlay::None, &NodeOptions::default())?;
    // The kernel's own limit is six in a row to one host, and one a second.
    stack.node.sysctl("net/ipv4/icmp_ratelimit", "0")?;
    stack.node.sysctl("net/ipv6/icmp/ratelimit", "0")?;
    for proxy in [Proxy::Netfilter, Proxy::Sluice] {
        stack.serve_by(proxy, ARGS, ClusterIps::Kept)?;
        let mut wrong = Vec::new();
        // A pod's packets to itself go around the stack, those to others through it.
        let ways: [(&Pod, usize); 3] = [(&stack.near, NEAR), (&stack.pod, NEAR), (&stack.pod, FAR)];
        for (client, target) in ways {
            for family in 0..2 {
                let target = &stack.targets[target];
                let way = support::stack::Way::Udp;
                let vip = target.by_cluster_ip(way, family);
                let port = target.by_node_port(stack.addresses, way, family);
                for to in [vip, port] {
                    take_fresh_ports(client)?;
                    let wire = client.packet_socket("eth0")?;
                    let told = || {
                        wire.receive(Duration::from_millis(700), |frame| {
                            is_time_exceeded(frame, to.ip())
                        })
                    };
                    send_with_hops(client, to, 1)?;
                    let who = client.name();
                    if told().is_err() {
                        wrong.push(format!(
                            "{proxy:?}: {who} hears nothing of a packet to {to} with one hop"
                        ));
                    }
                    let answered = client.udp_ask(to, 1);
                    wrong.extend(
                        answered.err().map(|error| format!("{proxy:?}: {who} to {to}: {error:#}")),
                    );
                }
            }
        }
        none_wrong("hop limits", &wrong)?;
    }
    Ok(())
}

/// Returns the ports of the TCP segment or datagram in a frame without options.
fn ports(frame: &[u8]) -> Option<[u16; 2]> {
    let at = match frame.get(12..14)? {
        [8, 0] => 34,
        [0x86, 0xdd] => 54,
        _ => return None,
    };
    let word = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    Some([word(at)?, word(at + 2)?])
}

/// Reports whether the segment in a frame without options opens the other direction.
fn is_syn_ack(frame: &[u8]) -> bool {
    let at = if frame.get(12) == Some(&8) { 47 } else { 67 };
    frame.get(at).is_some_and(|flags| flags & 0x3f == 0x12)
}

#[test]
fn a_pods_frame_in_a_vlan_reaches_nobody() -> Result<()> {
    if skip("a_pods_frame_in_a_vlan") {
        return Ok(());
    }
    let mut stack = Stack::new("pod-vlan", Overlay::None, &NodeOptions::default())?;
    let mut port = 20_000;
    for proxy in [Proxy::Netfilter, Proxy::Sluice] {
        stack.serve_by(proxy, ARGS, ClusterIps::Kept)?;
        let mut wrong = Vec::new();
        // All possible receivers: the endpoints, and the network behind the node.
        let others = [
            stack.near.packet_socket("eth0")?,
            stack.far.packet_socket("eth0")?,
            stack.lab.router().packet_socket(stack.node.uplink_peer())?,
        ];
        let ways: [(&Pod, usize); 3] = [(&stack.near, NEAR), (&stack.pod, NEAR), (&stack.pod, FAR)];
        for (client, target) in ways {
            let wire = client.packet_socket("eth0")?;
            let (node, itself) =
                (stack.node.link_address(client.host_device())?, client.link_address("eth0")?);
            for (family, own) in addresses_of_pod(client).into_iter().enumerate() {
                let target = &stack.targets[target];
                let way = support::stack::Way::Tcp;
                let vip = target.by_cluster_ip(way, family);
                let node_port = target.by_node_port(stack.addresses, way, family);
                // Without a tag, or with a priority tag, a frame is in no VLAN.
                for (tag, is_taken) in [(None, true), (Some(0x6000), true), (Some(100), false)] {
                    for to in [vip, node_port] {
                        port += 1;
                        let frame = Frame::tcp(SocketAddr::new(own, port), to, SYN, &[]);
                        let frame = frame.at(itself).turned().at(node);
                        let frame = tag.map_or(frame.clone(), |tag| frame.tag(0x8100, tag));
                        wire.send(&frame.bytes())?;
                        let what = format!("{proxy:?}: {} to {to}, tag {tag:?}", client.name());
                        let patience = Duration::from_millis(if is_taken { 1_000 } else { 200 });
                        let is_answer = |frame: &[u8]| {
                            ports(frame) == Some([to.port(), port]) && is_syn_ack(frame)
                        };
                        let is_answered = wire.receive(patience, is_answer).is_ok();
                        let is_seen = others.iter().any(|other| {
                            let is_ours =
                                |frame: &[u8]| ports(frame).is_some_and(|[from, _]| from == port);
                            !is_taken && other.receive(Duration::from_millis(20), is_ours).is_ok()
                        });
                        if is_answered != is_taken || is_seen {
                            wrong.push(format!(
                                "{what}: answered {is_answered}, seen by others {is_seen}"
                            ));
                        }
                    }
                }
            }
        }
        none_wrong("frames with VLAN tags", &wrong)?;
    }
    Ok(())
}
