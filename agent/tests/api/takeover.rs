//! From a real kube-proxy to Sluice and back, with thousands of connections that must not notice.
//!
//! ```text
//!     a pod --------------+------+
//!     endpoints a, b, c --| node |eth0 ---- router: clients outside, the API server
//!     the node's own -----+------+
//! ```
//!
//! Nobody but kube-proxy has chains of type nat on the node, so that its rules cannot simply go.
//! All connections ask for something and read the answer, again and again, while kube-proxy serves,
//! the agent takes over, kube-proxy and its rules go, and everything goes back.
//!
//! test-threads: 1

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::control_plane::{ADMIN, AGENT};
use crate::support::objects::Space;
use crate::support::{Cluster, START, cluster, wait_for};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sluice_lab::{
    AgentOptions, AgentProcess, Client, Namespace, Node, NodeOptions, Pod, Running, Serve,
};

/// Number of connections that are held: by the pod through ClusterIPs, by the node itself, and by
/// clients outside through the node port. Half of the first and of the last are IPv6.
const POD: usize = 900;
const HOST: usize = 300;
const UNSEEN: usize = 150;
const OUTSIDE: usize = 800;
/// Number of addresses of clients outside, which a Service with affinity distinguishes.
const CLIENTS: u8 = 24;
const ECHO_TARGET: u16 = 7000;
const DNS_TARGET: u16 = 5353;
/// The time that an answer may take on a busy machine.
const ANSWER: Duration = Duration::from_secs(15);
const STEP: Duration = Duration::from_secs(30);

/// A mode of kube-proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Nftables,
    Iptables,
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }

    /// Returns the node ports of the echo, of its datagrams, and of the Service with affinity. Both
    /// tests use one API server.
    fn node_ports(self) -> [u16; 3] {
        match self {
            Self::Nftables => [30_080, 30_081, 30_082],
            Self::Iptables => [30_180, 30_181, 30_182],
        }
    }
}

/// A connection whose requests are answered by one and the same endpoint.
struct Held {
    writer: TcpStream,
    reader: BufReader<TcpStream>,
    /// The name of the endpoint that sent the greeting.
    endpoint: String,
    /// The client as the endpoint sees it.
    seen_as: SocketAddr,
    /// Source and destination, as the client sees them.
    ends: String,
}

impl Held {
    fn new(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut greeting = String::new();
        let _ = reader.read_line(&mut greeting)?;
        let (endpoint, seen_as) = greeting.trim_end().split_once(' ').context("no greeting")?;
        let (endpoint, seen_as) = (endpoint.to_owned(), seen_as.parse()?);
        let ends = format!("{} to {}", stream.local_addr()?, stream.peer_addr()?);
        Ok(Self { writer: stream, reader, endpoint, seen_as, ends })
    }

    fn send(&mut self, line: &str) -> Result<()> {
        self.writer.write_all(format!("{line}\n").as_bytes()).context("cannot ask")
    }

    fn receive(&mut self, line: &str) -> Result<()> {
        let mut answer = String::new();
        let _ = self.reader.read_line(&mut answer).context("no answer")?;
        let said = answer.split(' ').next().unwrap_or_default();
        ensure!(
            said == self.endpoint && answer.trim_end().ends_with(line),
            "{answer:?}, not {line} of {}",
            self.endpoint
        );
        Ok(())
    }
}

/// Opens a connection of a namespace, from an address of its own if one is given; port 0 is any.
fn connect(from: &Namespace, source: Option<SocketAddr>, to: SocketAddr) -> Result<Held> {
    let stream = from.enter(|| -> Result<TcpStream> {
        let Some(source) = source else { return Ok(TcpStream::connect_timeout(&to, ANSWER)?) };
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        ensure!(fd >= 0, std::io::Error::last_os_error());
        // SAFETY: the descriptor is fresh and ours.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let call =
            |end: SocketAddr,
             call: unsafe extern "C" fn(i32, *const libc::sockaddr, u32) -> i32| {
                let SocketAddr::V4(end) = end else { bail!("an IPv6 source") };
                let address = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: end.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from(*end.ip()).to_be() },
                    sin_zero: [0; 8],
                };
                let length = size_of::<libc::sockaddr_in>() as u32;
                // SAFETY: the address is live and of the length given.
                let result = unsafe { call(fd.as_raw_fd(), (&raw const address).cast(), length) };
                ensure!(result == 0, std::io::Error::last_os_error());
                Ok(())
            };
        call(source, libc::bind)?;
        call(to, libc::connect)?;
        Ok(TcpStream::from(fd))
    })?;
    let stream = stream.with_context(|| format!("{} cannot connect to {to}", from.name()))?;
    Held::new(stream).with_context(|| format!("{} at {to}", from.name()))
}

/// Does something as a process of a cgroup: its sockets stay in that cgroup.
fn in_cgroup(cgroup: &Path, act: impl FnOnce() -> Result<()>) -> Result<()> {
    let own = std::fs::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup2")?;
    let root = cgroup.ancestors().filter(|path| path.join("cgroup.controllers").exists()).last();
    let home = root.context("no cgroup2 mount")?.join(own);
    enter(cgroup)?;
    // This applies when a test panics as well: with the lab all processes of its cgroups are
    // killed.
    let _back = Back(home);
    act()
}

/// Moves this process into a cgroup.
fn enter(cgroup: &Path) -> Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| cgroup.display().to_string())
}

/// Moves this process back into its own cgroup when dropped.
struct Back(PathBuf);

impl Drop for Back {
    fn drop(&mut self) {
        if let Err(error) = enter(&self.0) {
            eprintln!("{error:#}");
        }
    }
}

/// The parts of a test.
struct Bench {
    mode: Mode,
    cluster: std::sync::Arc<Cluster>,
    node: Node,
    pod: Pod,
    outside: Client,
    /// ClusterIPs of the echo, IPv4 first.
    vips: [IpAddr; 2],
    sticky: IpAddr,
    /// The endpoints' IPv4 addresses and ports, by name.
    endpoints: BTreeMap<String, SocketAddr>,
    kube_proxy: Option<Running>,
    agent: Option<AgentProcess>,
    _servers: Vec<Running>,
}

impl Bench {
    fn new(mode: Mode) -> Result<Option<Self>> {
        let Some(cluster) = cluster() else { return Ok(None) };
        let (name, lab) = (format!("mv{}", &mode.word()[..2]), &cluster.lab);
        let node = lab.node(&name, &NodeOptions::default())?;
        cluster.plane.add_node(&name)?;
        let addresses = json!([{"type": "InternalIP", "address": node.ipv4()}, {"type": "InternalIP", "address": node.ipv6()}]);
        let _ = cluster.plane.request(
            "PATCH",
            &format!("/api/v1/nodes/{name}/status"),
            Some(&json!({"status": {"addresses": addresses}})),
        )?;
        let pod = node.pod(&format!("{name}-client"))?;
        let outside = lab.client(&format!("{name}-out"))?;
        let mut servers = Vec::new();
        let mut endpoints = Vec::new();
        for letter in ["a", "b", "c"] {
            let pod = node.pod(&format!("{name}-{letter}"))?;
            // A thousand clients may connect at once.
            pod.sysctl("net/core/somaxconn", "4096")?;
            servers.push(pod.serve(Serve::TcpEcho, ECHO_TARGET)?);
            servers.push(pod.serve(Serve::UdpEcho, DNS_TARGET)?);
            endpoints.push(pod);
        }
        let [echo_port, dns_port, sticky_port] = mode.node_ports();
        let space = Space::new(&cluster, &format!("moving-{}", mode.word()));
        let dual = |spec: Value| {
            let mut spec = spec;
            spec["ipFamilyPolicy"] = "RequireDualStack".into();
            spec
        };
        space.service(
            "echo",
            &dual(json!({"type": "NodePort", "ports": [
                {"name": "echo", "port": 7, "targetPort": ECHO_TARGET, "nodePort": echo_port},
                {"name": "dns", "protocol": "UDP", "port": 53, "targetPort": DNS_TARGET, "nodePort": dns_port},
            ]})),
        );
        space.service(
            "sticky",
            &dual(json!({"type": "NodePort", "sessionAffinity": "ClientIP", "ports": [
                {"name": "echo", "port": 7, "targetPort": ECHO_TARGET, "nodePort": sticky_port},
            ]})),
        );
        for service in ["echo", "sticky"] {
            for family in ["IPv4", "IPv6"] {
                let all: Vec<Value> = endpoints
                    .iter()
                    .map(|pod| {
                        let address: IpAddr =
                            if family == "IPv4" { pod.ipv4().into() } else { pod.ipv6().into() };
                        json!({"addresses": [address], "nodeName": name, "conditions": {"ready": true}})
                    })
                    .collect();
                space.create(
                    "endpointslices",
                    &json!({
                        "metadata": {"name": format!("{service}-{}", family.to_lowercase()), "labels": {"kubernetes.io/service-name": service}},
                        "addressType": family, "endpoints": all,
                        "ports": [
                            {"name": "echo", "port": ECHO_TARGET},
                            {"name": "dns", "protocol": "UDP", "port": DNS_TARGET},
                        ],
                    }),
                );
            }
        }
        let vips = |service: &str| -> Result<Vec<IpAddr>> {
            let found = cluster.plane.request("GET", &space.path("services", service), None)?;
            let ips = found
                .pointer("/spec/clusterIPs")
                .and_then(Value::as_array)
                .context("no ClusterIPs")?;
            let mut ips: Vec<IpAddr> =
                ips.iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect();
            ips.sort_by_key(IpAddr::is_ipv6);
            Ok(ips)
        };
        let echo = vips("echo")?;
        let [v4, v6] = echo[..] else { bail!("{echo:?}") };
        let mut this = Self {
            mode,
            node,
            pod,
            outside,
            vips: [v4, v6],
            endpoints: endpoints
                .iter()
                .map(|pod| (pod.name().to_owned(), SocketAddr::new(pod.ipv4().into(), ECHO_TARGET)))
                .collect(),
            sticky: *vips("sticky")?.first().context("no ClusterIP")?,
            kube_proxy: None,
            agent: None,
            _servers: servers,
            cluster,
        };
        for number in 0..CLIENTS {
            let _ = this.outside.ip(&format!("addr add {}/24 dev eth0", this.client(number)))?;
        }
        this.start_kube_proxy()?;
        Ok(Some(this))
    }

    /// Returns an address outside at which affinity is tested.
    fn client(&self, number: u8) -> IpAddr {
        let [a, b, c, _] = self.outside.ipv4().octets();
        IpAddr::from([a, b, c, 100 + number])
    }

    fn start_kube_proxy(&mut self) -> Result<()> {
        let programs = std::env::var_os("SLUICE_CONTROL_PLANE").context("no control plane")?;
        let file = self.cluster.lab.state().join(format!("kube-proxy-{}.json", self.mode.word()));
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "mode": self.mode.word(), "hostnameOverride": self.node.name(),
            "clusterCIDR": "10.244.0.0/16,fd00:10:244::/48",
            "clientConnection": {"kubeconfig": self.cluster.plane.kubeconfig(ADMIN)},
            "conntrack": {"maxPerCore": 0, "min": 0},
            "nftables": {"minSyncPeriod": "50ms"}, "iptables": {"minSyncPeriod": "50ms"},
            "metricsBindAddress": "127.0.0.1:10249", "healthzBindAddress": "127.0.0.1:10256",
        });
        std::fs::write(&file, config.to_string())?;
        let kube_proxy = self.node.spawn(
            Path::new(&programs).join("kube-proxy"),
            [format!("--config={}", file.display())],
        )?;
        self.kube_proxy = Some(kube_proxy);
        // Datagrams have to be forgotten within the test. Ended connections are remembered, as
        // anywhere.
        for (name, seconds) in [("udp_timeout", "10"), ("udp_timeout_stream", "12")] {
            self.node.sysctl(&format!("net/netfilter/nf_conntrack_{name}"), seconds)?;
        }
        Ok(())
    }

    /// Waits until everything is served.
    fn until_served(&self) {
        let [echo_port, _, sticky_port] = self.mode.node_ports();
        let ways = [
            (&*self.pod, SocketAddr::new(self.vips[0], 7)),
            (&*self.pod, SocketAddr::new(self.vips[1], 7)),
            (&*self.outside, SocketAddr::new(self.node.ipv4().into(), echo_port)),
            (&*self.outside, SocketAddr::new(self.node.ipv6().into(), echo_port)),
            (&*self.outside, SocketAddr::new(self.node.ipv4().into(), sticky_port)),
        ];
        for (from, to) in ways {
            wait_for(&format!("{to} to be served"), STEP, || {
                let connected =
                    from.enter(|| TcpStream::connect_timeout(&to, Duration::from_millis(300)));
                match connected {
                    Ok(Ok(_)) => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            });
        }
    }

    /// Opens the connections that are held.
    fn open(&self) -> Result<Vec<Held>> {
        let started = Instant::now();
        let mut all = Vec::new();
        let [echo_port, ..] = self.mode.node_ports();
        let node: [IpAddr; 2] = [self.node.ipv4().into(), self.node.ipv6().into()];
        for index in 0..POD {
            all.push(connect(&self.pod, None, SocketAddr::new(self.vips[index % 2], 7))?);
        }
        // Some belong to processes outside of the agent's cgroup: no hook sees their calls, and
        // their packets are translated.
        for _ in 0..UNSEEN {
            all.push(connect(&self.node, None, SocketAddr::new(self.vips[0], 7))?);
        }
        in_cgroup(self.node.cgroup(), || {
            for _ in UNSEEN..HOST {
                all.push(connect(&self.node, None, SocketAddr::new(self.vips[0], 7))?);
            }
            Ok(())
        })?;
        for index in 0..OUTSIDE {
            all.push(connect(&self.outside, None, SocketAddr::new(node[index % 2], echo_port))?);
        }
        println!("{}: {} connections after {:.1?}", self.mode.word(), all.len(), started.elapsed());
        Ok(all)
    }

    /// Returns the endpoint that each client of the Service with affinity gets, by ClusterIP and
    /// node port.
    fn visits(&self) -> Result<BTreeMap<String, String>> {
        let at = SocketAddr::new(self.node.ipv4().into(), self.mode.node_ports()[2]);
        let mut visits = BTreeMap::new();
        for number in 0..CLIENTS {
            let source = self.client(number);
            let one = connect(&self.outside, Some(SocketAddr::new(source, 0)), at)?;
            let _ = visits.insert(source.to_string(), one.endpoint);
        }
        let pod = connect(&self.pod, None, SocketAddr::new(self.sticky, 7))?;
        let _ = visits.insert("pod".to_owned(), pod.endpoint);
        Ok(visits)
    }

    /// Returns the existing tables of nftables.
    fn tables(&self) -> Result<BTreeSet<String>> {
        Ok(self.node.run("nft", ["list", "tables"])?.lines().map(str::to_owned).collect())
    }

    /// Returns what kube-proxy still has in iptables. It also makes a chain of the kubelet's, which
    /// stays.
    fn left_in_iptables(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for command in ["iptables-save", "ip6tables-save"] {
            let rules = self.node.run(command, [""; 0])?;
            let its = rules
                .lines()
                .filter(|line| line.contains("KUBE-") && !line.contains("KUBE-FIREWALL"));
            left.extend(its.map(str::to_owned));
        }
        Ok(left)
    }

    /// Returns the progress of the takeover.
    fn takeover(&self) -> Result<Value> {
        let output = self.node.sluice_output(&["status", "-o", "json"])?;
        let status: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        Ok(status.pointer("/last/takeover").cloned().unwrap_or_default())
    }

    /// Returns the number of packets counted with a reason.
    fn counted(&self, reason: &str) -> Result<u64> {
        let output = self.node.sluice_output(&["status", "-o", "json"])?;
        let status: Value = serde_json::from_slice(&output.stdout)?;
        let rows =
            status.pointer("/reasons").and_then(Value::as_array).cloned().unwrap_or_default();
        let row =
            rows.iter().find(|row| row.pointer("/reason").and_then(Value::as_str) == Some(reason));
        Ok(row.and_then(|row| row.pointer("/packets")?.as_u64()).unwrap_or_default())
    }

    /// Returns the number of flows that Sluice has opened.
    fn flows(&self) -> Result<u64> {
        let list: Value = serde_json::from_str(&self.node.sluice(&["backends", "-o", "json"])?)?;
        let rows = list.pointer("/items").and_then(Value::as_array).into_iter().flatten();
        Ok(rows.filter_map(|row| row.pointer("/flows")?.as_u64()).sum())
    }
}

/// Traffic that runs until it is stopped.
#[derive(Default)]
struct Traffic {
    stop: AtomicBool,
    rounds: AtomicU64,
    opened: AtomicU64,
    answered: AtomicU64,
    wrong: Mutex<Vec<String>>,
}

impl Traffic {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn note(&self, what: &str, result: Result<()>) -> bool {
        if let Err(error) = result {
            self.wrong.lock().expect("no thread panics").push(format!("{what}: {error:#}"));
            return false;
        }
        true
    }

    /// Sends a request on every connection, and reads every answer.
    fn hold(&self, held: &mut [Held]) {
        let mut broken = BTreeSet::new();
        while self.goes_on() {
            let round = self.rounds.load(Ordering::Relaxed);
            for (index, one) in held.iter_mut().enumerate() {
                let line = format!("{round}-{index}");
                if !broken.contains(&index)
                    && !self.note(&format!("connection {index}"), one.send(&line))
                {
                    let _ = broken.insert(index);
                }
            }
            for (index, one) in held.iter_mut().enumerate() {
                let line = format!("{round}-{index}");
                let what = format!("connection {index}, {}", one.ends);
                if !broken.contains(&index) && !self.note(&what, one.receive(&line)) {
                    let _ = broken.insert(index);
                }
            }
            let _ = self.rounds.fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_millis(50));
        }
    }

    /// Repeatedly opens a connection, sends a request, and closes it.
    fn open(&self, from: &Namespace, to: SocketAddr) {
        while self.goes_on() {
            let result = connect(from, None, to).and_then(|mut one| {
                one.send("once")?;
                one.receive("once")
            });
            if self.note(&format!("a new connection of {}", from.name()), result) {
                let _ = self.opened.fetch_add(1, Ordering::Relaxed);
            }
            sleep(Duration::from_millis(10));
        }
    }

    /// Sends requests by UDP: from one connected socket, and from a new socket each time.
    fn ask(&self, from: &Namespace, to: SocketAddr) {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = || -> Result<UdpSocket> {
            let socket = from.enter(|| UdpSocket::bind(any))??;
            socket.set_read_timeout(Some(ANSWER))?;
            from.enter(|| socket.connect(to))??;
            Ok(socket)
        };
        let ask = |socket: &UdpSocket, question: &str| -> Result<()> {
            let _ = socket.send(question.as_bytes())?;
            let mut buffer = [0; 256];
            let length = socket.recv(&mut buffer)?;
            let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
            ensure!(answer.trim_end().ends_with(question), "{answer:?} to {question}");
            Ok(())
        };
        let Ok(kept) = socket() else { panic!("no socket") };
        for number in 0.. {
            if !self.goes_on() {
                return;
            }
            let question = format!("question-{number}");
            let first = self.note(&format!("UDP of {}", from.name()), ask(&kept, &question));
            let fresh = socket().and_then(|fresh| ask(&fresh, &question));
            if first && self.note(&format!("new UDP of {}", from.name()), fresh) {
                let _ = self.answered.fetch_add(1, Ordering::Relaxed);
            }
            sleep(Duration::from_millis(10));
        }
    }

    /// Waits until every connection has been answered this many more times, and nothing has failed.
    fn more_rounds(&self, what: &str, count: u64) -> Result<()> {
        let (from, started) = (self.rounds.load(Ordering::Relaxed), Instant::now());
        while self.rounds.load(Ordering::Relaxed) < from + count {
            self.all_well(what)?;
            ensure!(started.elapsed() < STEP, "{what}: a round takes longer than {STEP:?}");
            sleep(Duration::from_millis(20));
        }
        self.all_well(what)
    }

    fn all_well(&self, what: &str) -> Result<()> {
        let wrong = self.wrong.lock().expect("no thread panics");
        let first: Vec<&String> = wrong.iter().take(5).collect();
        ensure!(wrong.is_empty(), "{what}: {} went wrong: {first:#?}", wrong.len());
        Ok(())
    }
}

/// Does something while all connections and other traffic go on, and checks that nothing breaks.
fn with_traffic(
    bench: &mut Bench,
    held: &mut [Held],
    act: impl FnOnce(&mut Bench, &Traffic) -> Result<()>,
) -> Result<()> {
    let traffic = Traffic::default();
    let (pod, host, outside) = (bench.pod.clone(), bench.node.clone(), bench.outside.clone());
    let [v4, v6] = bench.vips;
    let [echo_port, dns_port, _] = bench.mode.node_ports();
    let node_port = |port| SocketAddr::new(bench.node.ipv4().into(), port);
    let (echo, dns) = (node_port(echo_port), node_port(dns_port));
    // As a process of the node: the calls of new connections pass the hooks of its cgroup.
    let act =
        |bench: &mut Bench, traffic: &Traffic| in_cgroup(host.cgroup(), || act(bench, traffic));
    let result = std::thread::scope(|scope| {
        let _ = scope.spawn(|| traffic.hold(held));
        let _ = scope.spawn(|| traffic.open(&pod, SocketAddr::new(v4, 7)));
        let _ = scope.spawn(|| traffic.open(&outside, echo));
        let _ = scope.spawn(|| traffic.open(&host, SocketAddr::new(v4, 7)));
        let _ = scope.spawn(|| traffic.ask(&pod, SocketAddr::new(v6, 53)));
        let _ = scope.spawn(|| traffic.ask(&outside, dns));
        let result = act(bench, &traffic);
        traffic.stop.store(true, Ordering::Relaxed);
        result
    });
    result?;
    traffic.all_well("at the end")?;
    println!(
        "{}: {} rounds, {} new connections, {} pairs of datagrams answered",
        bench.mode.word(),
        traffic.rounds.load(Ordering::Relaxed),
        traffic.opened.load(Ordering::Relaxed),
        traffic.answered.load(Ordering::Relaxed)
    );
    Ok(())
}

fn number(value: &Value, field: &str) -> u64 {
    value.get(field).and_then(Value::as_u64).unwrap_or_default()
}

fn word<'v>(value: &'v Value, field: &str) -> &'v str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// Moves from kube-proxy to Sluice: the agent comes, kube-proxy goes, its rules go, the last
/// connection goes.
///
/// Returns as whom one of its connections was seen, and by which endpoint: conntrack has not
/// forgotten it.
fn move_in(bench: &mut Bench) -> Result<(SocketAddr, SocketAddr)> {
    let visits = bench.visits()?;
    ensure!(visits.values().collect::<BTreeSet<_>>().len() > 1, "no spread: {visits:?}");
    let mut held = bench.open()?;
    let count = held.len() as u64;
    let last = held.iter().rfind(|one| one.seen_as.is_ipv4()).context("no connection")?;
    let ended = (last.seen_as, *bench.endpoints.get(&last.endpoint).context("no such endpoint")?);
    ensure!(ended.0.ip() == IpAddr::from(bench.node.ipv4()), "{} is not masqueraded", last.ends);
    with_traffic(bench, &mut held, |bench, traffic| {
        traffic.more_rounds("kube-proxy serves", 5)?;
        let started = Instant::now();
        let args = ["--takeover", "--nodeport-addresses", "primary", "--flows-max", "65536"];
        let mut agent = bench.node.agent(AgentOptions {
            kubeconfig: Some(bench.cluster.plane.kubeconfig(AGENT)),
            args: args.map(str::to_owned).into(),
            ..AgentOptions::default()
        })?;
        agent.wait_ready(START)?;
        println!(
            "{}: serving {:.1?} after the agent's start",
            bench.mode.word(),
            started.elapsed()
        );
        bench.agent = Some(agent);
        let told = bench.takeover()?;
        ensure!(
            word(&told, "phase") == "serving" && number(&told, "connections") >= count,
            "{told}"
        );
        traffic.more_rounds("both stand", 5)?;
        let before = bench.flows()?;
        traffic.more_rounds("new flows are ours", 5)?;
        ensure!(bench.flows()? > before, "Sluice opens no flows");
        ensure!(bench.counted("netfilter_flow")? > count, "netfilter's flows do not pass");
        let now = bench.visits()?;
        ensure!(now == visits, "affinity was lost: {visits:?}, now {now:?}");
        let refused = bench.node.sluice_output(&["takeover", "--finish"])?;
        ensure!(!refused.status.success(), "kube-proxy runs");
        // kube-proxy goes, its rules stay.
        let _ = bench.kube_proxy.take().context("no kube-proxy")?.stop()?;
        traffic.more_rounds("kube-proxy is gone", 3)?;
        // The command returns when the rules are gone, and reports what still lives.
        let said = bench.node.sluice(&["takeover", "--finish"])?;
        ensure!(said.contains("serving; netfilter still has"), "{said}");
        // With the flag to wait for that, it reports that it has not ended.
        let output = bench.node.sluice_output(&["takeover", "--finish", "--wait", "3s"])?;
        ensure!(
            output.status.code() == Some(1),
            "it is not done: {}",
            String::from_utf8_lossy(&output.stdout)
        );
        wait_for("kube-proxy's rules to go", STEP, || {
            let tables = bench.tables().map_err(|error| format!("{error:#}"))?;
            let left = bench.left_in_iptables().map_err(|error| format!("{error:#}"))?;
            let are_gone = !tables.iter().any(|table| table.ends_with("kube-proxy"))
                && left.iter().all(|line| line.contains("KUBE-FORWARD"));
            if are_gone { Ok(()) } else { Err(format!("{tables:?}, {left:#?}")) }
        });
        let tables = bench.tables()?;
        ensure!(tables.contains("table inet sluice-takeover"), "{tables:?}");
        traffic.more_rounds("kube-proxy's rules are gone", 10)?;
        let told = bench.takeover()?;
        ensure!(
            number(&told, "connections") >= count && told.get("holding") == Some(&true.into()),
            "{told}"
        );
        Ok(())
    })?;
    drop(held);
    let output = bench.node.sluice_output(&["takeover", "--finish", "--wait", "40s"])?;
    ensure!(
        output.status.success(),
        "the takeover ends with the last connection: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let tables = bench.tables()?;
    ensure!(!tables.iter().any(|table| table.contains("sluice")), "{tables:?}");
    let left = bench.left_in_iptables()?;
    ensure!(left.is_empty(), "{left:#?}");
    bench.until_served();
    Ok(ended)
}

/// Moves from Sluice to kube-proxy: kube-proxy comes, Sluice serves known flows until the last has
/// ended, and goes.
///
/// The host opens a connection from the source port of one that netfilter has translated and that
/// has `ended`.
fn move_out(bench: &mut Bench, ended: (SocketAddr, SocketAddr)) -> Result<()> {
    let refused = bench.node.sluice_output(&["release"])?;
    ensure!(!refused.status.success(), "nobody would serve");
    let [echo_port, ..] = bench.mode.node_ports();
    let mut held = bench.open()?;
    held.push(connect(&bench.node, Some(ended.0), ended.1)?);
    with_traffic(bench, &mut held, |bench, traffic| {
        traffic.more_rounds("Sluice serves", 3)?;
        let output = bench.node.sluice_output(&["release", "--prepare"])?;
        ensure!(output.status.success(), "prepared: {}", String::from_utf8_lossy(&output.stderr));
        traffic.more_rounds("connections are tracked", 2)?;
        bench.start_kube_proxy()?;
        wait_for("kube-proxy's rules", STEP, || {
            // The last thing that it programs is an endpoint of the Service that was created last.
            let rules = match bench.mode {
                Mode::Nftables => bench.node.run("nft", ["list", "table", "ip6", "kube-proxy"]),
                Mode::Iptables => bench.node.run("ip6tables-save", [""; 0]),
            };
            let rules = rules.map_err(|error| format!("{error:#}"))?;
            if rules.contains(&echo_port.to_string()) { Ok(()) } else { Err(rules) }
        });
        let output = bench.node.sluice_output(&["release", "--timeout", "2m", "--no-wait"])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        wait_for("the drain to begin", STEP, || {
            let told = bench.takeover().map_err(|error| format!("{error:#}"))?;
            if word(&told, "phase") == "draining" { Ok(()) } else { Err(told.to_string()) }
        });
        let (flows, left) = (bench.flows()?, bench.counted("not_taken")?);
        traffic.more_rounds("draining", 10)?;
        ensure!(bench.flows()? == flows, "Sluice opens flows while it drains");
        ensure!(bench.counted("not_taken")? > left, "nothing is left to kube-proxy");
        Ok(())
    })?;
    drop(held);
    let output = bench.node.sluice_output(&["release", "--timeout", "50s"])?;
    ensure!(
        output.status.success(),
        "released: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    wait_for("the agent to have removed everything", STEP, || {
        if bench.node.pin_path().exists() { Err("pins are left".to_owned()) } else { Ok(()) }
    });
    let devices = bench.node.run("ip", ["link"])?;
    ensure!(!devices.contains("sluice0"), "{devices}");
    bench.until_served();
    // An agent that is started again stays away until it is requested.
    let agent = bench.agent.as_mut().context("no agent")?;
    agent.restart()?;
    sleep(Duration::from_secs(1));
    ensure!(!bench.node.pin_path().exists(), "a released node is taken over again by nobody");
    let mut held = bench.open()?;
    with_traffic(bench, &mut held, |bench, traffic| {
        let output = bench.node.sluice_output(&["takeover", "--wait", "30s"])?;
        ensure!(
            output.status.success(),
            "taken over again: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        traffic.more_rounds("taken over again", 5)?;
        ensure!(bench.flows()? > 0, "Sluice opens no flows");
        Ok(())
    })
}

fn there_and_back(mode: Mode) -> Result<()> {
    let Some(mut bench) = Bench::new(mode)? else { return Ok(()) };
    bench.until_served();
    let started = Instant::now();
    let result = move_in(&mut bench).and_then(|ended| {
        println!("{}: moved in within {:.1?}", mode.word(), started.elapsed());
        move_out(&mut bench, ended)
    });
    println!("{}: {:.1?} in all", mode.word(), started.elapsed());
    if let (Err(_), Some(agent)) = (&result, &bench.agent) {
        println!("the agent's log:\n{}", agent.log());
    }
    if let Some(kube_proxy) = bench.kube_proxy.take() {
        drop(kube_proxy);
    }
    result
}

#[test]
fn connections_live_through_both_moves_beside_nftables() -> Result<()> {
    there_and_back(Mode::Nftables)
}

#[test]
fn connections_live_through_both_moves_beside_iptables() -> Result<()> {
    there_and_back(Mode::Iptables)
}
