//! Packets that nobody has answered cost others nothing.
//!
//! alone: idle_connections one_client

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::support;
use crate::support::raw::{ACK, FIN, Frame, RST, SYN, to_node, to_uplink};
use crate::support::{
    Cluster, DNS, ECHO, ECHO_TARGET, Plan, SOON, WEB, addresses_of_client, addresses_of_node,
    external_ip, flush, number, reasons, skip, status, until_backends, word,
};
use anyhow::{Context, Result, bail, ensure};
use sluice_lab::{Node, Port};

/// Runs this thread on one CPU.
fn pin(cpu: usize) {
    // SAFETY: a set on this stack, with its size. A refusal only costs what the flood shows.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        let _ = libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
    }
}

/// A flood from outside, from any address. The router sends it from every CPU, because the kernel's
/// LRU lists are per CPU.
struct Flood<'a> {
    cluster: &'a Cluster,
    frame: Frame,
}

impl<'a> Flood<'a> {
    fn new(cluster: &'a Cluster, family: usize, port: u16) -> Result<Self> {
        let link = to_uplink(cluster.node(), cluster.lab.router())?;
        let destination = SocketAddr::new(external_ip(WEB)[family], port);
        let source = client_of_flood(family, 0);
        let frame =
            Frame { link, source, destination, flags: None, sequence: 1, acknowledgment: 1 };
        Ok(Self { cluster, frame })
    }

    /// Sends frames from this many different clients, with each of the flags in turn.
    fn send(&self, clients: u32, flags: &[Option<u8>]) -> Result<()> {
        let cpus = std::thread::available_parallelism()?.get();
        let started = Instant::now();
        std::thread::scope(|scope| {
            let senders: Vec<_> = (0..cpus)
                .map(|cpu| {
                    scope.spawn(move || {
                        pin(cpu);
                        let node = self.cluster.node();
                        let socket = self.cluster.lab.router().packet_socket(node.uplink_peer())?;
                        for client in (cpu as u32..clients).step_by(cpus) {
                            let family = usize::from(self.frame.destination.is_ipv6());
                            let source = client_of_flood(family, client);
                            for flags in flags {
                                let frame = Frame { source, flags: *flags, ..self.frame };
                                let _ = socket.send(&frame.bytes());
                            }
                        }
                        anyhow::Ok(())
                    })
                })
                .collect();
            senders.into_iter().try_for_each(|sender| sender.join().expect("a sender"))
        })?;
        println!("{clients} clients, {flags:?}: {:.1?}", started.elapsed());
        Ok(())
    }
}

/// One of the clients that a flood comes from.
fn client_of_flood(family: usize, client: u32) -> SocketAddr {
    let (host, port) = (client / 30_000, 1_024 + (client % 30_000) as u16);
    let address: IpAddr = match family {
        0 => Ipv4Addr::from(0xc612_0000 + host).into(),
        _ => Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, host as u16).into(),
    };
    SocketAddr::new(address, port)
}

/// Returns a connection to an echo server that has been used.
fn connected(to: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    echoes(&mut stream)?;
    Ok(stream)
}

fn echoes(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"still\n")?;
    // This follows the server's greeting: "NAME CLIENT still".
    let mut answer = Vec::new();
    while !answer.ends_with(b" still\n") {
        let mut bytes = [0; 256];
        let count = stream.read(&mut bytes)?;
        ensure!(count != 0, "it has ended");
        answer.extend(&bytes[..count]);
    }
    Ok(())
}

fn entries(node: &Node, map: &str) -> Result<u64> {
    let status = status(node)?;
    let maps = status.get("maps").and_then(serde_json::Value::as_array).context("maps")?;
    Ok(number(
        maps.iter().find(|found| word(found, "map") == map).context("no such map")?,
        "entries",
    ))
}

/// Number of connections of a family that have to live.
const IDLE: usize = 1_000;
/// Number of connections of both families together that come and go meanwhile.
const SHORT: usize = 50_000;

/// Opens and ends connections, from several threads.
fn come_and_go(to: SocketAddr, count: usize) -> Result<()> {
    const THREADS: usize = 4;
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(|| (0..count / THREADS).try_for_each(|_| connected(to).map(drop))))
            .collect();
        clients.into_iter().try_for_each(|client| client.join().expect("a client"))
    })
}

#[test]
fn idle_connections_to_a_draining_endpoint_live_through_floods() -> Result<()> {
    if skip("idle_connections_to_a_draining_endpoint") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("floods", &Plan { near: 2, ..Plan::default() })?;
    let web = support::service("web", WEB);
    cluster.manifests.write(&web.clone().backends(&cluster.backends[..1]))?;
    cluster.start_agents(&["--socket-path=off"])?;
    let node = cluster.node().clone();
    until_backends(&node, "web", 1)?;
    let to = external_ip(WEB).map(|address| SocketAddr::new(address, ECHO));
    let open = |to| {
        cluster
            .outside
            .enter(move || (0..IDLE).map(|_| connected(to)).collect::<Result<Vec<_>>>())?
    };
    let mut idle = [open(to[0])?, open(to[1])?];
    // From here on nothing selects their endpoint, so a lost entry stays lost.
    cluster.manifests.write(&web.backends(&cluster.backends[1..]))?;
    std::thread::sleep(Duration::from_secs(1));
    let open = |to| cluster.outside.enter(move || connected(to))?;
    let mut fresh = [open(to[0])?, open(to[1])?];

    let recovered =
        || -> Result<u64> { Ok(reasons(&node)?.get("recovered").copied().unwrap_or_default()) };
    for family in 0..2 {
        let flood = Flood::new(&cluster, family, ECHO)?;
        let before = recovered()?;
        flood.send(400_000, &[Some(ACK)])?;
        let recovered = recovered()? - before;
        ensure!(recovered > 300_000, "the flood did not get here: {recovered}");
        flood.send(400_000, &[Some(SYN), Some(ACK)])?;
        flood.send(100_000, &[Some(ACK), Some(FIN | ACK)])?;
        Flood::new(&cluster, family, DNS)?.send(200_000, &[None, None])?;
    }
    let started = Instant::now();
    for to in to {
        cluster.outside.enter(move || come_and_go(to, SHORT / 2))??;
    }
    println!("{SHORT} short connections: {:.1?}", started.elapsed());
    for version in ["v4", "v6"] {
        let flows = entries(&node, &format!("flows_{version}"))?;
        let embryonic = entries(&node, &format!("embryonic_{version}"))?;
        println!("flows_{version} {flows}, embryonic_{version} {embryonic}");
        ensure!(
            flows < 3 * IDLE as u64,
            "{flows} entries are kept for packets that nobody answered"
        );
        ensure!(embryonic > 10_000, "{embryonic}: where did the floods go?");
    }

    for (family, (idle, fresh)) in idle.iter_mut().zip(&mut fresh).enumerate() {
        echoes(fresh)?;
        let half = IDLE / 2;
        let lost = idle[..half].iter_mut().filter_map(|stream| echoes(stream).err()).count();
        ensure!(lost == 0, "{lost} of {half} idle connections are lost, family {family}");
        // The control: each of them lived by its entry alone.
        let version = ["v4", "v6"][family];
        let _ = flush(&node, &format!("flows_{version}"))?;
        let lost = idle[half..].iter_mut().filter_map(|stream| echoes(stream).err()).count();
        ensure!(
            lost == IDLE - half,
            "only {lost} of {} are lost without entries, family {family}",
            IDLE - half
        );
    }
    Ok(())
}

/// Number of idle connections of each family by a node port. Others come and go in the same table.
const BY_NODE_PORT: usize = 14;
const FINISHED: usize = 4_000;
/// A table for flows of two entries each.
const FEW_FLOWS: &str = "--flows-max=1024";
const NODE_ECHO: u16 = 30_007;
const NODE_SILENT: u16 = 30_070;
const SILENT_TARGET: u16 = 7_070;

/// A port whose server is the test itself, which sends something when it likes.
struct Held {
    client: TcpStream,
    server: TcpStream,
}

impl Held {
    fn open(cluster: &Cluster, listener: &TcpListener, to: SocketAddr) -> Result<Self> {
        let client = cluster.outside.enter(|| TcpStream::connect_timeout(&to, SOON))??;
        client.set_read_timeout(Some(Duration::from_secs(1)))?;
        let (server, from) = listener.accept()?;
        let source = addresses_of_client(&cluster.outside)[usize::from(to.is_ipv6())];
        ensure!(from.ip().to_canonical() == source, "the server sees {from} instead of {source}");
        let mut this = Self { client, server };
        this.server_speaks()?;
        Ok(this)
    }

    fn server_speaks(&mut self) -> Result<()> {
        self.server.write_all(b"news\n")?;
        self.client.read_exact(&mut [0; 5])?;
        Ok(())
    }
}

#[test]
fn idle_connections_by_a_node_port_live_beside_finished_ones() -> Result<()> {
    if skip("idle_connections_by_a_node_port") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("finished", &Plan { near: 1, ..Plan::default() })?;
    let web = support::service("web", WEB)
        .port(Port::tcp("node-echo", 17, ECHO_TARGET).node_port(NODE_ECHO))
        .port(Port::tcp("silent", 70, SILENT_TARGET).node_port(NODE_SILENT))
        .spec("externalTrafficPolicy: Local")
        .backends(&cluster.backends);
    cluster.manifests.write(&web)?;
    cluster.start_agents(&["--socket-path=off", FEW_FLOWS])?;
    let node = cluster.node().clone();
    until_backends(&node, "web", 1)?;
    let any = IpAddr::from([0_u16; 8]);
    let listener = cluster.backends[0].enter(|| TcpListener::bind((any, SILENT_TARGET)))??;
    for (family, address) in addresses_of_node(&node).into_iter().enumerate() {
        let silent = SocketAddr::new(address, NODE_SILENT);
        let mut held = (0..BY_NODE_PORT)
            .map(|_| Held::open(&cluster, &listener, silent))
            .collect::<Result<Vec<_>>>()?;
        let to = SocketAddr::new(address, NODE_ECHO);
        cluster.outside.enter(move || come_and_go(to, FINISHED))??;
        let (some, others) = held.split_at_mut(BY_NODE_PORT - 2);
        let lost: Vec<_> = some.iter_mut().filter_map(|held| held.server_speaks().err()).collect();
        ensure!(
            lost.is_empty(),
            "{} of {} are lost, family {family}: {lost:?}",
            lost.len(),
            some.len()
        );
        // The control: a node port's flow whose entries are lost is reset.
        let _ = flush(&node, ["flows_v4", "flows_v6"][family])?;
        let lost = others.iter_mut().filter_map(|held| held.server_speaks().err()).count();
        ensure!(
            lost == others.len(),
            "only {lost} of {} are lost without entries, family {family}",
            others.len()
        );
    }
    Ok(())
}

#[test]
fn one_client_cannot_use_up_the_ports_of_an_endpoint() -> Result<()> {
    if skip("one_client_cannot_use_up_the_ports") {
        return Ok(());
    }
    let cluster = Cluster::new(
        "used-up",
        &Plan { near: 0, far: 1, args: vec!["--socket-path=off"], ..Plan::default() },
    )?;
    // The endpoint's machine drops packets that belong to no connection, so nobody answers.
    cluster.backends[0]
        .nft("table ip guard { chain in { type filter hook input priority 0; tcp flags & syn == 0 ct state new,invalid drop; }; }")?;
    let to = SocketAddr::new(external_ip(WEB)[0], ECHO);
    let open = || connected(to).map(drop);
    cluster.outside.enter(open)??;
    let flood = Flood::new(&cluster, 0, ECHO)?;
    for flags in [&[Some(ACK)][..], &[Some(SYN), Some(ACK)]] {
        flood.send(90_000, flags)?;
        for round in 0..20 {
            cluster
                .outside
                .enter(open)?
                .with_context(|| format!("client {round} after {flags:?}"))?;
        }
    }
    let found = reasons(cluster.node())?;
    ensure!(!found.contains_key("ports_exhausted"), "{found:?}");
    Ok(())
}

/// Connects from a given port, which another connection may just have had.
fn connect_from(port: u16, to: SocketAddr, timeout: Duration) -> Result<TcpStream> {
    let SocketAddr::V4(to) = to else { bail!("{to} is no IPv4 address") };
    let address = |ip: Ipv4Addr, port: u16| libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
        sin_zero: [0; 8],
    };
    let (own, other) = (address(Ipv4Addr::UNSPECIFIED, port), address(*to.ip(), to.port()));
    let length = size_of_val(&own) as u32;
    let wait = libc::timeval { tv_sec: timeout.as_secs().cast_signed(), tv_usec: 0 };
    // It ends with a reset, so nothing of it waits in this host.
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let on: libc::c_int = 1;
    // SAFETY: plain structures on this stack with their sizes; the descriptor is new.
    let stream = unsafe {
        let raw = libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        ensure!(raw >= 0, "socket: {}", std::io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(raw);
        let option = |level, name, value: *const libc::c_void, size: usize| {
            libc::setsockopt(socket.as_raw_fd(), level, name, value, size as u32)
        };
        let _ = option(libc::SOL_SOCKET, libc::SO_REUSEADDR, (&raw const on).cast(), 4);
        let _ = option(
            libc::SOL_SOCKET,
            libc::SO_SNDTIMEO,
            (&raw const wait).cast(),
            size_of_val(&wait),
        );
        let _ = option(
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of_val(&linger),
        );
        for (what, result) in [
            ("bind", libc::bind(raw, (&raw const own).cast(), length)),
            ("connect", libc::connect(raw, (&raw const other).cast(), length)),
        ] {
            ensure!(result == 0, "{what}: {}", std::io::Error::last_os_error());
        }
        TcpStream::from(socket)
    };
    stream.set_read_timeout(Some(SOON))?;
    Ok(stream)
}

#[test]
fn a_client_whose_endpoint_died_silently_gets_another_one_from_the_same_port() -> Result<()> {
    if skip("a_client_whose_endpoint_died_silently") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("silent", &Plan { near: 2, ..Plan::default() })?;
    let web = support::service("web", WEB);
    cluster.manifests.write(&web.clone().backends(&cluster.backends[..1]))?;
    cluster.start_agents(&["--socket-path=off"])?;
    until_backends(cluster.node(), "web", 1)?;
    let to = SocketAddr::new(external_ip(WEB)[0], ECHO);
    let try_once = |timeout| {
        let mut stream = connect_from(5_555, to, timeout)?;
        echoes(&mut stream)
    };
    cluster.outside.enter(|| try_once(SOON))??;
    // The control: while the endpoint lives, the same port opens a connection again immediately,
    // although the reset that ended the last one was not answered.
    cluster.outside.enter(|| try_once(Duration::from_secs(2)))??;
    let _ = cluster.backends[0].ip("link set eth0 down")?;
    cluster.manifests.write(&web.backends(&cluster.backends[1..]))?;
    let died = Instant::now();
    let mut refused = 0;
    while cluster.outside.enter(|| try_once(Duration::from_secs(2)))?.is_err() {
        refused += 1;
        ensure!(died.elapsed() < Duration::from_mins(1), "no other endpoint within a minute");
    }
    println!("another endpoint after {:.1?} and {refused} tries", died.elapsed());
    Ok(())
}

#[test]
fn forged_segments_of_any_sequence_number_break_no_connection() -> Result<()> {
    if skip("forged_segments_of_any_sequence_number") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("forged", &Plan { near: 2, ..Plan::default() })?;
    let web = support::service("web", WEB);
    cluster.manifests.write(&web.clone().backends(&cluster.backends[..1]))?;
    cluster.start_agents(&["--socket-path=host"])?;
    until_backends(cluster.node(), "web", 1)?;
    let to = SocketAddr::new(external_ip(WEB)[0], ECHO);
    let mut through = cluster.outside.enter(|| connected(to))??;
    // Also packets that do not pass a frontend: those of a client of the endpoint's own address.
    let endpoint = SocketAddr::new(cluster.backends[0].ipv4().into(), ECHO_TARGET);
    let mut direct = cluster.client.enter(|| connected(endpoint))??;
    cluster.manifests.write(&web.backends(&cluster.backends[1..]))?;
    std::thread::sleep(Duration::from_secs(1));

    let flood = Flood::new(&cluster, 0, ECHO)?;
    let socket = cluster.lab.router().packet_socket(cluster.node().uplink_peer())?;
    let local = through.local_addr()?;
    let forge = |flags: u8, round: u32| -> Result<()> {
        let frame = Frame {
            source: local,
            flags: Some(flags),
            sequence: round.wrapping_mul(0x9e37_79b9),
            acknowledgment: round,
            ..flood.frame
        };
        socket.send(&frame.bytes())
    };
    for round in 1..5 {
        for flags in [RST, RST | ACK, FIN | ACK, SYN, ACK, SYN] {
            forge(flags, round)?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    echoes(&mut through).context("a connection by a frontend, after forged segments")?;
    for round in 5..10 {
        forge(RST, round)?;
        forge(SYN, round)?;
        echoes(&mut through).context("a connection by a frontend, between forged segments")?;
    }

    let local = direct.local_addr()?;
    let socket = cluster.client.packet_socket("eth0")?;
    let reset = Frame {
        link: to_node(&cluster.client, cluster.node())?,
        source: local,
        destination: endpoint,
        flags: Some(RST),
        sequence: 1,
        acknowledgment: 0,
    };
    for _ in 0..3 {
        socket.send(&reset.bytes())?;
        std::thread::sleep(Duration::from_millis(20));
        echoes(&mut direct).context("a direct connection after a forged reset")?;
    }
    Ok(())
}

/// Longer than an endpoint may be silent before a client that reconnects leaves it.
const LONG_SILENCE: Duration = Duration::from_secs(34);

#[test]
fn a_forged_syn_that_breaks_a_long_silence_cuts_no_connection() -> Result<()> {
    if skip("a_forged_syn_that_breaks_a_long_silence") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("silence", &Plan { near: 2, ..Plan::default() })?;
    let web = support::service("web", WEB);
    cluster.manifests.write(&web.clone().backends(&cluster.backends[..1]))?;
    cluster.start_agents(&["--socket-path=host"])?;
    until_backends(cluster.node(), "web", 1)?;
    let to = SocketAddr::new(external_ip(WEB)[0], ECHO);
    let mut held = Vec::new();
    for flags in [&[SYN][..], &[RST, SYN], &[SYN, SYN]] {
        held.push((flags, cluster.outside.enter(|| connected(to))??));
    }
    // Their endpoint drains from now on.
    cluster.manifests.write(&web.backends(&cluster.backends[1..]))?;
    std::thread::sleep(LONG_SILENCE);
    let flood = Flood::new(&cluster, 0, ECHO)?;
    let socket = cluster.lab.router().packet_socket(cluster.node().uplink_peer())?;
    for (all, mut stream) in held {
        let source = stream.local_addr()?;
        for flags in all {
            let frame = Frame {
                source,
                flags: Some(*flags),
                sequence: 0x9e37_79b9,
                acknowledgment: 0,
                ..flood.frame
            };
            socket.send(&frame.bytes())?;
            std::thread::sleep(Duration::from_millis(20));
        }
        echoes(&mut stream).with_context(|| format!("a silent connection after forged {all:?}"))?;
    }
    Ok(())
}
