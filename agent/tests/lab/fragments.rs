//! Datagrams in fragments through a VIP, in order and out of order, and SCTP.

use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support;
use crate::support::frame::{Frame, INIT, INIT_ACK, Mac, SCTP, crc32c, octets};
use crate::support::{
    Cluster, DNS, DNS_TARGET, Pair, Plan, SOON, WEB, addresses_of_node, addresses_of_pod,
    cluster_ip, external_ip, reasons, replies, service, skip,
};
use anyhow::{Context, Result, bail, ensure};
use sluice_lab::{DROP_INVALID, Namespace, Pod, Port, Protocol, Reply, Serve};

/// Client and server ports of the raw packets.
const CLIENT_PORT: u16 = 20_123;
const SCTP_PORT: u16 = 3_868;
const SCTP_TARGET: u16 = 9_868;

#[test]
fn large_datagrams_go_both_ways() -> Result<()> {
    if skip("large_datagrams") {
        return Ok(());
    }
    let plan = Plan { near: 1, far: 1, args: vec!["--socket-path", "off"], ..Plan::default() };
    let cluster = Cluster::new("large", &plan)?;
    // A pod keeps its source, a client outside is masqueraded towards the far backend, and the
    // node's own packets are translated at egress.
    let clients: [(&Namespace, Pair); 3] = [
        (&cluster.client, cluster_ip(WEB)),
        (&cluster.outside, external_ip(WEB)),
        (cluster.node(), cluster_ip(WEB)),
    ];
    for (client, vips) in clients {
        for vip in vips {
            let to = SocketAddr::new(vip, DNS);
            let events = client.ask([
                "udp-client",
                "--size=8000",
                "--count=40",
                "--new-socket",
                "--to",
                &to.to_string(),
            ])?;
            let replies = replies(events).with_context(|| format!("{} > {to}", client.name()))?;
            let shares = Reply::shares(&replies);
            println!("{} > {to}: {shares:?}", client.name());
            ensure!(replies.len() == 40 && shares.len() == 2, "{shares:?}");
        }
    }
    let reasons = reasons(cluster.node())?;
    ensure!(!reasons.contains_key("fragment"), "{reasons:?}");
    println!("held: {:?}", reasons.get("fragment_held"));
    Ok(())
}

/// Returns the link-layer address that a pod sends to.
fn gateway(pod: &Pod) -> Result<Mac> {
    pod.node().link_address(pod.host_device())
}

/// Reports whether a frame's IP source is this address; false for other families.
fn from(frame: &[u8], source: IpAddr) -> bool {
    let (ethertype, at) = if source.is_ipv4() { ([8, 0], 26) } else { ([0x86, 0xdd], 22) };
    let source = octets(source);
    frame.get(12..14) == Some(&ethertype) && frame.get(at..at + source.len()) == Some(&source)
}

/// Returns a fragment's offset in bytes, or `None` for a whole packet.
fn offset(frame: &[u8]) -> Option<u16> {
    let word = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    match frame.get(12..14)? {
        [8, 0] => word(20).filter(|field| field & 0x3fff != 0).map(|field| (field & 0x1fff) * 8),
        _ => (*frame.get(20)? == 44).then(|| word(56)).flatten().map(|field| field & 0xfff8),
    }
}

#[test]
fn fragments_that_come_first_wait_for_the_first_one() -> Result<()> {
    if skip("fragments_that_come_first") {
        return Ok(());
    }
    let plan = Plan { near: 1, args: vec!["--socket-path", "off"], ..Plan::default() };
    let cluster = Cluster::new("early", &plan)?;
    let backend = &cluster.backends[0];
    let (wire, back) = (cluster.client.packet_socket("eth0")?, backend.packet_socket("eth0")?);
    let held = || {
        Ok::<_, anyhow::Error>(reasons(cluster.node())?.get("fragment_held").copied().unwrap_or(0))
    };
    for (round, conntrack) in [(0, false), (1, true)] {
        if conntrack {
            // With connection tracking the stack reassembles datagrams, and fragments them again.
            cluster.node().nft(DROP_INVALID)?;
        }
        let ends = addresses_of_pod(&cluster.client).into_iter().zip(addresses_of_pod(backend));
        for (vip, (client, endpoint)) in cluster_ip(WEB).into_iter().zip(ends) {
            let what = format!("{vip}, connection tracking {conntrack}");
            let client = SocketAddr::new(client, CLIENT_PORT);
            let before = held()?;
            let data = [b"7 ".to_vec(), vec![b'x'; 3_000]].concat();
            let question =
                Frame::udp(client, SocketAddr::new(vip, DNS), &data).at(gateway(&cluster.client)?);
            let start = Instant::now();
            for fragment in question.fragments(77 + round, 1_024).iter().rev() {
                wire.send(&fragment.bytes())?;
            }
            let _ = wire
                .receive(SOON, |frame| from(frame, vip) && offset(frame) == Some(0))
                .with_context(|| format!("{what}: no answer"))?;
            let took = start.elapsed();
            let asked = held()?;
            ensure!(asked >= before + 2, "{what}: {before} fragments were held, then {asked}");
            // The rest of this answer.
            let _ =
                wire.receive(SOON, |frame| from(frame, vip) && offset(frame).unwrap_or(0) > 1_400)?;

            let data = vec![b'y'; 3_000];
            let answer = Frame::udp(SocketAddr::new(endpoint, DNS_TARGET), client, &data)
                .at(gateway(backend)?);
            let start = Instant::now();
            for fragment in answer.fragments(99 + round, 1_024).iter().rev() {
                back.send(&fragment.bytes())?;
            }
            // Connection tracking fragments them differently. If the last part is there, all are.
            let mut missing = if conntrack { 1 } else { 3 };
            while missing > 0 {
                let wanted = |frame: &[u8]| {
                    let is_last = offset(frame).is_some_and(|offset| offset > 1_400);
                    from(frame, vip) && frame.ends_with(b"yyyy") && (!conntrack || is_last)
                };
                let _ = wire.receive(SOON, wanted).with_context(|| {
                    format!("{what}: {missing} parts of an answer in wrong order are missing")
                })?;
                missing -= 1;
            }
            let answered = held()?;
            println!("{what}: a question took {took:?}, an answer {:?}", start.elapsed());
            // The egress gets the fragments in order from connection tracking.
            ensure!(
                conntrack || answered >= asked + 2,
                "{what}: {asked} were held, then {answered}"
            );
        }
    }
    // A datagram whose first fragment never comes goes on after a while, untranslated.
    let vip = cluster_ip(WEB)[0];
    let client = SocketAddr::new(addresses_of_pod(&cluster.client)[0], CLIENT_PORT);
    let lonely =
        Frame::udp(client, SocketAddr::new(vip, DNS), &[b'z'; 3_000]).at(gateway(&cluster.client)?);
    wire.send(&lonely.fragments(101, 1_024)[1].bytes())?;
    support::until("the lonely fragment goes on", || {
        Ok(reasons(cluster.node())?.contains_key("fragment").then_some(()))
    })
}

/// Ports and checksum of an SCTP packet in a frame without options.
fn sctp(frame: &[u8]) -> Option<([u16; 2], bool)> {
    let (protocol, at) = match frame.get(12..14)? {
        [8, 0] => (frame.get(23)?, 34),
        _ => (frame.get(20)?, 54),
    };
    if *protocol != SCTP {
        return None;
    }
    let mut packet = frame.get(at..)?.to_vec();
    let port = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    let sum = u32::from_le_bytes(packet.get(8..12)?.try_into().ok()?);
    packet.get_mut(8..12)?.fill(0);
    Some(([port(at)?, port(at + 2)?], crc32c(&packet) == sum))
}

#[test]
fn sctp_keeps_its_checksum() -> Result<()> {
    if skip("sctp_keeps_its_checksum") {
        return Ok(());
    }
    let plan = Plan { near: 1, args: vec!["--socket-path", "off"], ..Plan::default() };
    let cluster = Cluster::new("sctp", &plan)?;
    let backend = &cluster.backends[0];
    let port = Port::new(Protocol::Sctp, "diameter", SCTP_PORT, SCTP_TARGET);
    cluster.manifests.write(&service("sctp", 20).port(port.clone()).backends(&cluster.backends))?;
    cluster.manifests.write(&service("none", 21).port(port))?;
    support::until_backends(cluster.node(), "sctp", 1)?;
    let (wire, back) = (cluster.client.packet_socket("eth0")?, backend.packet_socket("eth0")?);
    let ends = addresses_of_pod(&cluster.client).into_iter().zip(addresses_of_pod(backend));
    for ((vip, none), (client, endpoint)) in
        cluster_ip(20).into_iter().zip(cluster_ip(21)).zip(ends)
    {
        let (client, endpoint) =
            (SocketAddr::new(client, CLIENT_PORT), SocketAddr::new(endpoint, SCTP_TARGET));
        let frontend = SocketAddr::new(vip, SCTP_PORT);
        // The kernels here have no SCTP: the test plays both ends.
        let init =
            Frame::sctp(client, frontend, (INIT, 0), &[0x1a; 16]).at(gateway(&cluster.client)?);
        wire.send(&init.bytes())?;
        let met = back.receive(SOON, |frame| from(frame, client.ip()) && sctp(frame).is_some())?;
        // The sockets of a client that sends frames itself cannot be looked up: it gets a port that
        // no kernel picks.
        let Some(([port, SCTP_TARGET], true)) = sctp(&met) else { bail!("{vip}: {met:02x?}") };
        ensure!(port != CLIENT_PORT, "{vip}: {met:02x?}");
        let seen_as = SocketAddr::new(client.ip(), port);
        let ack = Frame::sctp(endpoint, seen_as, (INIT_ACK, 0), &[0x1b; 31]).at(gateway(backend)?);
        back.send(&ack.bytes())?;
        let met = wire.receive(SOON, |frame| from(frame, vip) && sctp(frame).is_some())?;
        ensure!(sctp(&met) == Some(([SCTP_PORT, CLIENT_PORT], true)), "{vip}: {met:02x?}");
        // Without a backend, the client gets an ICMP error.
        let init = Frame::sctp(client, SocketAddr::new(none, SCTP_PORT), (INIT, 0), &[0x1a; 16]);
        wire.send(&init.at(gateway(&cluster.client)?).bytes())?;
        let (protocol, kind): (usize, &[u8]) =
            if none.is_ipv4() { (23, &[3, 3]) } else { (20, &[1, 4]) };
        let at = if none.is_ipv4() { 34 } else { 54 };
        let number = if none.is_ipv4() { 1 } else { 58 };
        let _ = wire
            .receive(SOON, |frame| {
                from(frame, none)
                    && frame.get(protocol) == Some(&number)
                    && frame.get(at..at + 2) == Some(kind)
            })
            .with_context(|| format!("{none}: no answer"))?;
    }
    Ok(())
}

/// At an address of the node a fragment may be anybody's: an overlay's outer packet, or a host
/// process's request.
#[test]
fn fragments_for_a_process_of_the_node_need_no_agent() -> Result<()> {
    const PORT: u16 = 4_789;
    if skip("fragments_for_a_process") {
        return Ok(());
    }
    let mut cluster = Cluster::new("nobodys", &Plan { near: 1, ..Plan::default() })?;
    let _server = cluster.node().serve_as(Serve::UdpEcho, PORT, "host")?;
    let wire = cluster.client.packet_socket("eth0")?;
    let held = |cluster: &Cluster| -> Result<u64> {
        Ok(reasons(cluster.node())?.get("fragment_held").copied().unwrap_or(0))
    };
    for (round, is_alive) in [(0, true), (1, false)] {
        if !is_alive {
            cluster.agents[0].kill9()?;
            // Not after the programs have ceased to believe that the agent holds fragments.
            sleep(Duration::from_secs(6));
        }
        let before = held(&cluster)?;
        let clients = addresses_of_pod(&cluster.client);
        for (client, node) in clients.into_iter().zip(addresses_of_node(cluster.node())) {
            for try_number in 0..10 {
                let client = SocketAddr::new(client, CLIENT_PORT + try_number);
                let question = Frame::udp(client, SocketAddr::new(node, PORT), &[b'x'; 2_000])
                    .at(gateway(&cluster.client)?);
                let id = 1_000 + 100 * round + u32::from(try_number);
                for fragment in question.fragments(id, 1_024).iter().rev() {
                    wire.send(&fragment.bytes())?;
                }
                let _ = wire
                    .receive(SOON, |frame| from(frame, node) && offset(frame) == Some(0))
                    .with_context(|| {
                    format!("{client} > {node}: no answer, agent alive: {is_alive}")
                })?;
            }
        }
        let held = held(&cluster)? - before;
        println!("agent alive: {is_alive}, {held} fragments were held");
        ensure!((held >= 20) == is_alive, "agent alive: {is_alive}, {held} fragments were held");
    }
    Ok(())
}
