//! What packets that nobody has answered cost others: nothing.
//!
//! test-threads: 1

mod lab_support;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab_support::{
    Cluster, DNS, ECHO, ECHO_TARGET, Plan, SOON, WEB, external_ip, number, reasons, skip, status,
    until_backends, word,
};
use sluice_lab::{Namespace, Node};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// A frame of IPv4 without options, TCP or UDP.
#[derive(Clone, Copy)]
struct Frame {
    link: [[u8; 6]; 2],
    source: (Ipv4Addr, u16),
    destination: (Ipv4Addr, u16),
    /// TCP's flags; UDP without.
    flags: Option<u8>,
    sequence: u32,
    acknowledgment: u32,
}

fn folded(bytes: &[u8], mut sum: u32) -> u16 {
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or_default());
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

impl Frame {
    fn bytes(&self) -> Vec<u8> {
        let [to, from] = self.link;
        let protocol: u8 = if self.flags.is_some() { 6 } else { 17 };
        let mut transport = [self.source.1.to_be_bytes(), self.destination.1.to_be_bytes()].concat();
        let at = if let Some(flags) = self.flags {
            transport.extend(self.sequence.to_be_bytes());
            transport.extend(self.acknowledgment.to_be_bytes());
            transport.extend([0x50, flags, 0xfa, 0, 0, 0, 0, 0]);
            16
        } else {
            transport.extend([0, 16, 0, 0]);
            transport.extend(b"question");
            6
        };
        let addresses = [self.source.0.octets(), self.destination.0.octets()].concat();
        let length = transport.len() as u16;
        let pseudo = [&addresses[..], &[0, protocol], &length.to_be_bytes(), &transport].concat();
        transport[at..at + 2].copy_from_slice(&folded(&pseudo, 0).to_be_bytes());
        let mut network = vec![0x45, 0];
        network.extend((20 + length).to_be_bytes());
        network.extend([0, 0, 0x40, 0, 60, protocol, 0, 0]);
        network.extend(addresses);
        let sum = folded(&network, 0).to_be_bytes();
        network[10..12].copy_from_slice(&sum);
        [&to[..], &from, &[8, 0], &network, &transport].concat()
    }
}

/// The link-layer address of a device.
fn mac(namespace: &Namespace, device: &str) -> Result<[u8; 6]> {
    let text = namespace.run("ip", ["link", "show", "dev", device])?;
    let address =
        text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).context("no address")?;
    let octets: Vec<u8> =
        address.split(':').map(|octet| u8::from_str_radix(octet, 16)).collect::<Result<_, _>>()?;
    octets.try_into().ok().context("six octets")
}

fn v4(address: IpAddr) -> Result<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(address) => bail!("{address} is no IPv4 address"),
    }
}

/// Runs this thread on one CPU.
fn pin(cpu: usize) {
    // SAFETY: a set on this stack, with its size. A refusal only costs what the flood shows.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        let _ = libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
    }
}

/// What comes to a node from outside, from whatever address: sent by the router, from every CPU, since the kernel's LRU lists are
/// per CPU.
struct Flood<'a> {
    cluster: &'a Cluster,
    frame: Frame,
}

impl<'a> Flood<'a> {
    fn new(cluster: &'a Cluster, port: u16) -> Result<Self> {
        let node = cluster.node();
        let link = [mac(node, node.uplink())?, mac(cluster.lab.router(), node.uplink_peer())?];
        let destination = (v4(external_ip(WEB)[0])?, port);
        let source = (Ipv4Addr::new(198, 18, 0, 1), 1);
        let frame = Frame { link, source, destination, flags: None, sequence: 1, acknowledgment: 1 };
        Ok(Self { cluster, frame })
    }

    /// Sends frames from so many different clients, with each of the flags in turn.
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
                            let address = Ipv4Addr::from(0xc612_0000 + client / 30_000);
                            let source = (address, 1_024 + (client % 30_000) as u16);
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

/// A connection to an echo server that has been used.
fn connected(to: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    echoes(&mut stream)?;
    Ok(stream)
}

fn echoes(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"still\n")?;
    // Behind the server's greeting: "NAME CLIENT still".
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
    Ok(number(maps.iter().find(|found| word(found, "map") == map).context("no such map")?, "entries"))
}

/// Connections that are to live.
const IDLE: usize = 1_000;
/// Connections that come and go meanwhile, few enough for a machine of two CPUs.
const SHORT: usize = 10_000;

#[test]
fn idle_connections_to_a_draining_endpoint_live_through_floods() -> Result<()> {
    if skip("idle_connections_to_a_draining_endpoint") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("floods", &Plan { near: 2, ..Plan::default() })?;
    let web = lab_support::service("web", WEB);
    cluster.manifests.write(&web.clone().backends(&cluster.backends[..1]))?;
    cluster.start_agents(&["--socket-path=off"])?;
    let node = cluster.node().clone();
    until_backends(&node, "web", 1)?;
    let to = SocketAddr::new(external_ip(WEB)[0], ECHO);
    let open = || (0..IDLE).map(|_| connected(to)).collect::<Result<Vec<_>>>();
    let mut idle = cluster.outside.enter(open)??;
    // From here on nothing selects their endpoint: an entry that is lost is lost for good.
    cluster.manifests.write(&web.backends(&cluster.backends[1..]))?;
    std::thread::sleep(Duration::from_secs(1));
    let mut fresh = cluster.outside.enter(|| connected(to))??;

    let flood = Flood::new(&cluster, ECHO)?;
    let before = reasons(&node)?.get("recovered").copied().unwrap_or_default();
    flood.send(400_000, &[Some(ACK)])?;
    let recovered = reasons(&node)?.get("recovered").copied().unwrap_or_default() - before;
    ensure!(recovered > 300_000, "the flood did not get here: {recovered}");
    flood.send(400_000, &[Some(SYN), Some(ACK)])?;
    flood.send(400_000, &[Some(ACK), Some(FIN | ACK)])?;
    Flood::new(&cluster, DNS)?.send(200_000, &[None, None])?;
    let short = || -> Result<()> {
        for _ in 0..SHORT {
            drop(connected(to)?);
        }
        Ok(())
    };
    let started = Instant::now();
    cluster.outside.enter(short)??;
    println!("{SHORT} short connections: {:.1?}", started.elapsed());
    let (flows, embryonic) = (entries(&node, "flows_v4")?, entries(&node, "embryonic_v4")?);
    println!("flows_v4 {flows}, embryonic_v4 {embryonic}");
    ensure!(flows < 3 * IDLE as u64, "{flows} entries are kept for packets that nobody answered");
    ensure!(embryonic > 10_000, "{embryonic}: where did the floods go?");

    echoes(&mut fresh)?;
    let lost = idle.iter_mut().filter_map(|stream| echoes(stream).err()).count();
    ensure!(lost == 0, "{lost} of {IDLE} idle connections are lost");
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
    // The endpoint's machine drops what belongs to no connection: nobody answers.
    cluster.backends[0]
        .nft("table ip guard { chain in { type filter hook input priority 0; tcp flags & syn == 0 ct state new,invalid drop; }; }")?;
    let to = SocketAddr::new(external_ip(WEB)[0], ECHO);
    let open = || connected(to).map(drop);
    cluster.outside.enter(open)??;
    let flood = Flood::new(&cluster, ECHO)?;
    for flags in [&[Some(ACK)][..], &[Some(SYN), Some(ACK)]] {
        flood.send(90_000, flags)?;
        for round in 0..20 {
            cluster.outside.enter(open)?.with_context(|| format!("client {round} after {flags:?}"))?;
        }
    }
    let found = reasons(cluster.node())?;
    ensure!(!found.contains_key("ports_exhausted"), "{found:?}");
    Ok(())
}

/// connect() from a given port, which may have been another connection's just before.
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
    // Its end is a reset: nothing of it waits in this host.
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
        let _ = option(libc::SOL_SOCKET, libc::SO_SNDTIMEO, (&raw const wait).cast(), size_of_val(&wait));
        let _ = option(libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size_of_val(&linger));
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
    let web = lab_support::service("web", WEB);
    cluster.manifests.write(&web.clone().backends(&cluster.backends[..1]))?;
    cluster.start_agents(&["--socket-path=off"])?;
    until_backends(cluster.node(), "web", 1)?;
    let to = SocketAddr::new(external_ip(WEB)[0], ECHO);
    let try_once = |timeout| {
        let mut stream = connect_from(5_555, to, timeout)?;
        echoes(&mut stream)
    };
    cluster.outside.enter(|| try_once(SOON))??;
    // The control: while the endpoint lives, the same port opens again at once, though the reset that ended it was not answered.
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
    let web = lab_support::service("web", WEB);
    cluster.manifests.write(&web.clone().backends(&cluster.backends[..1]))?;
    cluster.start_agents(&["--socket-path=host"])?;
    until_backends(cluster.node(), "web", 1)?;
    let to = SocketAddr::new(external_ip(WEB)[0], ECHO);
    let mut through = cluster.outside.enter(|| connected(to))??;
    // Past the frontends: what a client of the endpoint's own address has.
    let endpoint = SocketAddr::new(cluster.backends[0].ipv4().into(), ECHO_TARGET);
    let mut direct = cluster.client.enter(|| connected(endpoint))??;
    cluster.manifests.write(&web.backends(&cluster.backends[1..]))?;
    std::thread::sleep(Duration::from_secs(1));

    let flood = Flood::new(&cluster, ECHO)?;
    let socket = cluster.lab.router().packet_socket(cluster.node().uplink_peer())?;
    let SocketAddr::V4(local) = through.local_addr()? else { bail!("no IPv4 address") };
    let forge = |flags: u8, round: u32| -> Result<()> {
        let frame = Frame {
            source: (*local.ip(), local.port()),
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

    let SocketAddr::V4(local) = direct.local_addr()? else { bail!("no IPv4 address") };
    let link = [[0x02, 0xff, 0xff, 0xff, 0xff, 0xff], mac(&cluster.client, "eth0")?];
    let gateway = cluster.client.run("ip", ["neigh", "show", "dev", "eth0"])?;
    let gateway = gateway.split_whitespace().skip_while(|word| *word != "lladdr").nth(1).map(str::to_owned);
    let to = match gateway {
        Some(text) => {
            let octets: Vec<u8> =
                text.split(':').map(|octet| u8::from_str_radix(octet, 16)).collect::<Result<_, _>>()?;
            octets.try_into().ok().context("six octets")?
        }
        None => link[0],
    };
    let socket = cluster.client.packet_socket("eth0")?;
    let reset = Frame {
        link: [to, link[1]],
        source: (*local.ip(), local.port()),
        destination: (cluster.backends[0].ipv4(), ECHO_TARGET),
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
