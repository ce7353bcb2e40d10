//! Packets with forged sources, on a node that filters no source: they break nothing more than
//! without Sluice.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use crate::support;
use crate::support::raw::{ACK, FIN, Frame, Mac, RST, SYN, segment, to_node, to_uplink};
use crate::support::{
    Cluster, ECHO, ECHO_TARGET, Plan, SOON, WEB, addresses_of_pod, cluster_ip, external_ip, listed,
    skip, until_backends, word,
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sluice_lab::{Cni, Namespace, NodeOptions, PacketSocket, Pod, Port, RpFilter};

/// A connection to an echo server, and the numbers that its endpoint expects.
struct Conversation {
    what: String,
    stream: TcpStream,
    local: SocketAddr,
    /// A socket that sees what the client receives.
    wire: PacketSocket,
    /// The client's destination.
    to: SocketAddr,
    sequence: u32,
    acknowledgment: u32,
}

impl Conversation {
    fn open(client: &Namespace, what: &str, to: SocketAddr) -> Result<Self> {
        let wire = client.packet_socket("eth0")?;
        let stream = client
            .enter(|| TcpStream::connect_timeout(&to, SOON))?
            .with_context(|| format!("{what}: {to}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.set_nodelay(true)?;
        let local = stream.local_addr()?;
        let what = format!("{what}, {to}");
        let mut this = Self { what, stream, local, wire, to, sequence: 0, acknowledgment: 0 };
        this.goes_on("at first")?;
        Ok(this)
    }

    /// Sends another request, and learns the numbers.
    fn goes_on(&mut self, after: &str) -> Result<()> {
        // Forged packets may have filled its buffer.
        while self.wire.receive(Duration::ZERO, |_| true).is_ok() {}
        self.echoes().with_context(|| format!("{} after {after}", self.what))?;
        // The answer acknowledges the request. At first a greeting precedes it.
        let (from, to) = (self.to, self.local);
        let is_answer = |frame: &[u8]| {
            segment(frame).is_some_and(|found| {
                found.source == from && found.destination == to && found.length > 0
            })
        };
        let mut last = self.wire.receive(SOON, is_answer)?;
        while let Ok(later) = self.wire.receive(Duration::from_millis(1), is_answer) {
            last = later;
        }
        let last = segment(&last).context("a segment")?;
        self.sequence = last.acknowledgment;
        self.acknowledgment = last.sequence.wrapping_add(last.length);
        Ok(())
    }

    fn echoes(&mut self) -> Result<()> {
        self.stream.write_all(b"still\n")?;
        let mut answer = Vec::new();
        while !answer.ends_with(b" still\n") {
            let mut bytes = [0; 256];
            let count = self.stream.read(&mut bytes)?;
            ensure!(count != 0, "it has ended");
            answer.extend(&bytes[..count]);
        }
        Ok(())
    }
}

/// A sender with forged addresses.
struct Forger {
    who: &'static str,
    socket: PacketSocket,
    link: [Mac; 2],
}

impl Forger {
    fn pod(cluster: &Cluster, pod: &Pod) -> Result<Self> {
        let link = to_node(pod, cluster.node())?;
        Ok(Self { who: "a pod", socket: pod.packet_socket("eth0")?, link })
    }

    fn outside(cluster: &Cluster) -> Result<Self> {
        let (node, router) = (cluster.node(), cluster.lab.router());
        let link = to_uplink(node, router)?;
        Ok(Self {
            who: "somebody outside",
            socket: router.packet_socket(node.uplink_peer())?,
            link,
        })
    }

    fn send(
        &self,
        source: SocketAddr,
        destination: SocketAddr,
        flags: Option<u8>,
        numbers: [u32; 2],
    ) -> Result<()> {
        let [sequence, acknowledgment] = numbers;
        let frame = Frame { link: self.link, source, destination, flags, sequence, acknowledgment };
        self.socket.send(&frame.bytes())
    }

    /// Sends segments of a connection's client, to any address, that no endpoint takes for the
    /// client's: some with any number, some with numbers that are near.
    fn attack(&self, victim: &Conversation, to: SocketAddr) -> Result<()> {
        for round in 1..4_u32 {
            let far = [round.wrapping_mul(0x9e37_79b9), round.wrapping_mul(0x85eb_ca6b)];
            for flags in [RST, RST | ACK, FIN | ACK, SYN | ACK, SYN, ACK, SYN | ACK] {
                self.send(victim.local, to, Some(flags), far)?;
            }
            let near = [victim.sequence.wrapping_add(100 + round), victim.acknowledgment];
            for flags in [RST, RST | ACK, SYN, ACK, SYN | ACK] {
                self.send(victim.local, to, Some(flags), near)?;
            }
            // And those of its endpoint.
            let numbers = [victim.acknowledgment.wrapping_add(100_000_000), victim.sequence];
            for flags in [RST, RST | ACK, FIN | ACK] {
                self.send(to, victim.local, Some(flags), numbers)?;
            }
        }
        std::thread::sleep(Duration::from_millis(100));
        Ok(())
    }
}

/// A pod, its endpoint, and forgers.
struct Stage {
    cluster: Cluster,
    forgers: Vec<Forger>,
}

impl Stage {
    /// Builds it without agents.
    fn new(name: &str) -> Result<Self> {
        let node = NodeOptions { rp_filter: RpFilter::Off, ..NodeOptions::default() };
        let cluster = Cluster::without_agents(name, &Plan { near: 2, node, ..Plan::default() })?;
        cluster.manifests.write(&support::service("web", WEB).backends(&cluster.backends[..1]))?;
        let forger = cluster.node().pod("forger")?;
        let forgers = vec![Forger::pod(&cluster, &forger)?, Forger::outside(&cluster)?];
        Ok(Self { cluster, forgers })
    }

    fn endpoint(&self, family: usize, port: u16) -> SocketAddr {
        SocketAddr::new(addresses_of_pod(&self.cluster.backends[0])[family], port)
    }

    /// Returns the states that the maps have for conversations.
    fn states(&self, victims: &[Conversation]) -> Result<Vec<String>> {
        let flows = listed(self.cluster.node(), &["flows"])?;
        let is_victims = |flow: &Value| {
            let ends = [word(flow, "client"), word(flow, "vip")];
            victims
                .iter()
                .any(|victim| [victim.local, victim.to].map(|end| end.to_string()) == ends)
        };
        Ok(flows
            .iter()
            .filter(|flow| is_victims(flow))
            .map(|flow| flow["state"].to_string())
            .collect())
    }

    /// Makes the Service lead to one of its two endpoints alone.
    fn lead_to(&self, backend: usize) -> Result<()> {
        let backends = [&self.cluster.backends[backend]];
        self.cluster.manifests.write(&support::service("web", WEB).backends(backends))?;
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    }
}

/// Forges packets of connections to an endpoint, one after the other. Each connection has to go on.
fn forge(
    stage: &Stage,
    victims: &mut [Conversation],
    others: &[SocketAddr],
    endpoint: SocketAddr,
) -> Result<()> {
    for victim in victims {
        for forger in &stage.forgers {
            for to in others.iter().chain([&victim.to.clone(), &endpoint]) {
                forger.attack(victim, *to)?;
                victim.goes_on(&format!("segments to {to} that {} forged", forger.who))?;
            }
        }
    }
    Ok(())
}

/// Checks that forged packets arrive: a reset with the right number ends a connection, whoever
/// sends it.
fn ends_by_the_right_number(
    stage: &Stage,
    victim: &mut Conversation,
    to: SocketAddr,
) -> Result<()> {
    let [forger, _] = &stage.forgers[..] else { unreachable!("two forgers") };
    let numbers = [victim.sequence, victim.acknowledgment];
    forger.send(victim.local, to, Some(RST), numbers)?;
    std::thread::sleep(Duration::from_millis(100));
    ensure!(victim.echoes().is_err(), "{} goes on after a reset of its own number", victim.what);
    Ok(())
}

#[test]
fn forged_segments_break_what_they_break_without_us() -> Result<()> {
    if skip("forged_segments_break_what_they_break") {
        return Ok(());
    }
    let mut stage = Stage::new("forgers")?;
    for family in 0..2 {
        let endpoint = stage.endpoint(family, ECHO_TARGET);
        let client = stage.cluster.client.clone();
        let mut direct = [Conversation::open(&client, "control", endpoint)?];
        forge(&stage, &mut direct, &[], endpoint)?;
        ends_by_the_right_number(&stage, &mut direct[0], endpoint)?;
    }
    stage.cluster.start_agents(&["--socket-path=off"])?;
    until_backends(stage.cluster.node(), "web", 1)?;
    for family in 0..2 {
        let endpoint = stage.endpoint(family, ECHO_TARGET);
        let vips = [cluster_ip(WEB)[family], external_ip(WEB)[family]]
            .map(|vip| SocketAddr::new(vip, ECHO));
        let client = stage.cluster.client.clone();
        let mut victims = vec![
            Conversation::open(&client, "a direct connection", endpoint)?,
            Conversation::open(&client, "a connection by the ClusterIP", vips[0])?,
            Conversation::open(&client, "a connection by the balancer's address", vips[1])?,
        ];
        // From here on no slot leads to their endpoint, so a lost entry stays lost.
        stage.lead_to(1)?;
        forge(&stage, &mut victims, &vips, endpoint)?;
        let states = stage.states(&victims)?;
        ensure!(
            states.len() == 2 && states.iter().all(|state| state == r#"["established","local"]"#),
            "forged segments have changed {states:?}"
        );
        for victim in &mut victims {
            let to = victim.to;
            ends_by_the_right_number(&stage, victim, to)?;
        }
        stage.lead_to(0)?;
    }
    Ok(())
}

/// A port whose server the test is itself: it says something when it likes.
const NEWS: u16 = 90;
const NEWS_TARGET: u16 = 9_090;

/// A connected UDP socket, and its server: the kernel takes answers from nobody else.
struct Subscription {
    what: String,
    client: UdpSocket,
    /// The client's address as the server sees it.
    peer: SocketAddr,
}

impl Subscription {
    fn open(client: &Namespace, server: &UdpSocket, to: SocketAddr) -> Result<Self> {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        let client = client.enter(|| UdpSocket::bind((any, 0)))??;
        client.connect(to)?;
        client.set_read_timeout(Some(Duration::from_secs(1)))?;
        let _ = client.send(b"subscribe")?;
        let (_, peer) = server.recv_from(&mut [0; 256])?;
        Ok(Self { what: format!("what {to} tells"), client, peer })
    }

    /// Checks that what the server sends of its own accord reaches the client.
    fn goes_on(&self, server: &UdpSocket, after: &str) -> Result<()> {
        let _ = server.send_to(b"news", self.peer)?;
        let mut bytes = [0; 256];
        let count =
            self.client.recv(&mut bytes).with_context(|| format!("{} after {after}", self.what))?;
        ensure!(&bytes[..count] == b"news", "{}: {:?}", self.what, &bytes[..count]);
        Ok(())
    }
}

#[test]
fn forged_datagrams_turn_nobodys_answers() -> Result<()> {
    if skip("forged_datagrams_turn_nobodys_answers") {
        return Ok(());
    }
    let mut stage = Stage::new("datagrams")?;
    let web = support::service("web", WEB).port(Port::udp("news", NEWS, NEWS_TARGET));
    stage.cluster.manifests.write(&web.backends(&stage.cluster.backends[..1]))?;
    stage.cluster.start_agents(&["--socket-path=off"])?;
    until_backends(stage.cluster.node(), "web", 1)?;
    let any = IpAddr::from([0_u16; 8]);
    let server = stage.cluster.backends[0].enter(|| UdpSocket::bind((any, NEWS_TARGET)))??;
    server.set_read_timeout(Some(Duration::from_millis(100)))?;
    for family in 0..2 {
        let endpoint = stage.endpoint(family, NEWS_TARGET);
        let vips = [cluster_ip(WEB)[family], external_ip(WEB)[family]]
            .map(|vip| SocketAddr::new(vip, NEWS));
        for to in [endpoint, vips[0], vips[1]] {
            let subscription = Subscription::open(&stage.cluster.client, &server, to)?;
            subscription.goes_on(&server, "nothing")?;
            for forger in &stage.forgers {
                for vip in vips {
                    for _ in 0..3 {
                        forger.send(subscription.client.local_addr()?, vip, None, [0; 2])?;
                    }
                    // The forged packets arrived.
                    let mut count = 0;
                    while server.recv_from(&mut [0; 256]).is_ok() {
                        count += 1;
                    }
                    ensure!(
                        count == 3,
                        "{count} of 3 datagrams to {vip} that {} forged",
                        forger.who
                    );
                    subscription.goes_on(
                        &server,
                        &format!("datagrams to {vip} that {} forged", forger.who),
                    )?;
                }
            }
        }
    }
    Ok(())
}

/// Moves the bridge's addresses to one end of a veth whose other end becomes a port of the bridge.
fn move_gateway_above(node: &Namespace) -> Result<()> {
    let shown = node.run("ip", ["-o", "addr", "show", "dev", "cni0", "scope", "global"])?;
    let addresses: Vec<&str> =
        shown.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
    ensure!(addresses.len() == 2, "cni0 has no address of each family: {shown}");
    let mac = node.link_address("cni0")?.map(|byte| format!("{byte:02x}")).join(":");
    let moved = addresses.iter().map(|address| {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        format!("addr del {address} dev cni0\naddr add {address} dev gw0{nodad}\n")
    });
    let commands = format!(
        "link set cni0 address 02:00:00:00:77:77\nlink add gw0 type veth peer name gw1\n\
         link set gw1 master cni0 up\nlink set gw0 address {mac} up\n{}",
        moved.collect::<String>()
    );
    // The bridge would also answer for addresses of other devices.
    node.sysctl("net/ipv4/conf/cni0/arp_ignore", "1")?;
    let _ = node.ip(&commands)?;
    node.sysctl("net/ipv6/conf/gw0/forwarding", "1")
}

#[test]
fn pods_are_no_forgers_where_their_gateway_is_above_the_bridge() -> Result<()> {
    if skip("pods_are_no_forgers_where_their_gateway_is_above") {
        return Ok(());
    }
    let node = NodeOptions {
        cni: Cni::Bridge { bridge_nf: false },
        rp_filter: RpFilter::Off,
        ..NodeOptions::default()
    };
    let mut cluster = Cluster::without_agents("above", &Plan { near: 1, node, ..Plan::default() })?;
    move_gateway_above(cluster.node())?;
    cluster.start_agents(&["--socket-path=off"])?;
    until_backends(cluster.node(), "web", 1)?;
    for family in 0..2 {
        let to = SocketAddr::new(cluster_ip(WEB)[family], ECHO);
        let mut held = Conversation::open(&cluster.client, "a pod's connection", to)?;
        held.goes_on("a moment")?;
        let flows = listed(cluster.node(), &["flows"])?;
        let local = held.local.to_string();
        let found: Vec<&Value> =
            flows.iter().filter(|flow| word(flow, "client") == local).collect();
        let [flow] = found[..] else { bail!("{local} has {} flows: {flows:?}", found.len()) };
        ensure!(flow["seen_as"].is_null(), "{local} is seen as another: {flow}");
        let state = flow["state"].to_string();
        ensure!(state.contains("established"), "{local} is taken for a forger: {flow}");
    }
    Ok(())
}
