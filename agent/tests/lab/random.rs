//! The answers of `sluice explain` for random manifests, compared with what the programs on a live
//! node do with random packets, and what its cgroup hooks do with calls.
//!
//! Per packet the verdict, the backend, and whether the client's address is kept must be equal; a
//! call's backend must be one of the candidates. A seed is printed; `SLUICE_RANDOM_SEED` sets it,
//! and `SLUICE_RANDOM_ROUNDS` how many sets of manifests there are (default: 8), of 250 packets and
//! 60 calls each.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::support;
use crate::support::random::frame::{self, Seen};
use crate::support::random::scene::{self, CLUSTER_CIDRS, Ground, SERVICE_CIDRS, Scene};
use crate::support::random::{Dice, number_from};
use crate::support::{Cluster, Plan, addresses_of_node, listed, skip, until, word};
use anyhow::{Context, Result, bail, ensure};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, loaded_programs};
use serde_json::Value;
use sluice::tools::explain::{
    Answer, Client, Manifests, Options, Question, Source, Verdict, Way, explain,
};
use sluice_common::abi::socket_path;
use sluice_core::model::object::Protocol;
use sluice_core::policy::{DetectLocal, Masquerade, Policy};
use sluice_lab::{Namespace, Node, PacketSocket};

/// Number of packets and calls of a round, and of the packets that are passed to the command as
/// well.
const PACKETS: usize = 250;
const CALLS: usize = 25;
const DATAGRAMS: usize = 10;
const COMMANDS: usize = 4;
/// Number of rejects that a client gets immediately. Later ones may be dropped, as the kernel's
/// are.
const REJECTS: u32 = 5;
/// Bytes that a packet may grow to.
const FRAME_MAX: usize = 4096;
/// Bytes of `struct __sk_buff`, and the offsets of its `ingress_ifindex` and `ifindex`.
const SKB: (usize, usize, usize) = (192, 36, 40);

/// An agent's flags, as text and as the test understands them.
struct Setting {
    args: Vec<&'static str>,
    policy: Policy,
}

fn settings() -> Result<[Setting; 4]> {
    let networks = |text: &str| text.split(',').map(str::parse).collect::<Result<Vec<_>, _>>();
    Ok([
        Setting { args: Vec::new(), policy: Policy::default() },
        Setting {
            args: vec!["--masquerade", "kube-proxy", "--cluster-cidr", CLUSTER_CIDRS],
            policy: Policy {
                masquerade: Masquerade::KubeProxy,
                detect_local: DetectLocal::ClusterCidr,
                cluster_cidrs: networks(CLUSTER_CIDRS)?,
                ..Policy::default()
            },
        },
        // No local pods of IPv6 are known.
        Setting {
            args: vec!["--cluster-cidr", "10.244.0.0/16"],
            policy: Policy {
                detect_local: DetectLocal::ClusterCidr,
                cluster_cidrs: networks("10.244.0.0/16")?,
                ..Policy::default()
            },
        },
        Setting {
            args: vec!["--masquerade", "all", "--service-cidr", SERVICE_CIDRS],
            policy: Policy {
                masquerade: Masquerade::All,
                // As without a cluster's CIDR if masquerading is kube-proxy's.
                detect_local: DetectLocal::None,
                service_cidrs: networks(SERVICE_CIDRS)?,
                ..Policy::default()
            },
        },
    ])
}

/// A device that programs are attached to.
struct Device {
    index: u32,
    mac: [u8; 6],
}

impl Device {
    fn new(node: &Node, name: &str) -> Result<Self> {
        let links: Value =
            serde_json::from_str(&node.run("ip", ["-j", "link", "show", "dev", name])?)?;
        let link = links.get(0).context("a device")?;
        let mut mac = [0; 6];
        for (byte, text) in mac.iter_mut().zip(word(link, "address").split(':')) {
            *byte = u8::from_str_radix(text, 16)?;
        }
        Ok(Self { index: support::number(link, "ifindex").try_into()?, mac })
    }
}

/// Opens a program that is attached to a device of a node.
fn program(node: &Node, device: &Device, direction: &str) -> Result<SchedClassifier> {
    let link = pinned_link(node, &format!("dev{}_{direction}", device.index))?;
    let id = FdLink::from(PinnedLink::from_pin(link)?).info()?.program_id();
    let info = loaded_programs()
        .flatten()
        .find(|program| program.id() == id)
        .context("the link's program")?;
    Ok(SchedClassifier::from_program_info(info, "tc".into())?)
}

fn pinned_link(node: &Node, name: &str) -> Result<PathBuf> {
    let pins = node.pin_path();
    let layouts = std::fs::read_dir(&pins).with_context(|| pins.display().to_string())?;
    let mut links = layouts.flatten().map(|layout| layout.path().join("links").join(name));
    links
        .find(|path| path.exists())
        .with_context(|| format!("no link {name} below {}", pins.display()))
}

/// The programs that packets pass, as the present agent has attached them.
struct Programs {
    edge: SchedClassifier,
    ingress: SchedClassifier,
    egress: SchedClassifier,
}

struct Hooks {
    edge: Device,
    uplink: Device,
}

impl Hooks {
    fn programs(&self, node: &Node) -> Result<Programs> {
        Ok(Programs {
            edge: program(node, &self.edge, "ingress")?,
            ingress: program(node, &self.uplink, "ingress")?,
            egress: program(node, &self.uplink, "egress")?,
        })
    }

    /// Sends a packet's first frame through the programs that it would pass.
    fn run(&self, programs: &Programs, question: &Question, routed: bool) -> Result<Seen> {
        let (edge, uplink) = (&self.edge, &self.uplink);
        let (program, came) = match question.from {
            Client::Pod => (&programs.edge, edge),
            Client::External => (&programs.ingress, uplink),
            Client::Host => {
                let question_frame = frame::build(question, uplink.mac, 1);
                let (action, frame) = run(&programs.egress, &question_frame, uplink, 0)?;
                return frame::seen(question, action, &frame);
            }
        };
        let (action, frame) = run(program, &frame::build(question, came.mac, 1), came, 0)?;
        let first = frame::seen(question, action, &frame)?;
        let is_left = first == Seen::Pass && routed;
        // A masqueraded client's source changes where its packet leaves.
        if !is_left && !matches!(first, Seen::Forward { kept: true, .. }) {
            return Ok(first);
        }
        let (action, frame) = run(&programs.egress, &frame, uplink, came.index)?;
        frame::seen(question, action, &frame)
    }
}

/// Runs a program on a packet that leaves or comes in by a device.
fn run(
    program: &SchedClassifier,
    input: &[u8],
    device: &Device,
    came_by: u32,
) -> Result<(i32, Vec<u8>)> {
    let (length, ingress_at, at) = SKB;
    let mut context = vec![0; length];
    context[at..at + 4].copy_from_slice(&device.index.to_ne_bytes());
    context[ingress_at..ingress_at + 4].copy_from_slice(&came_by.to_ne_bytes());
    let mut output = vec![0; FRAME_MAX];
    let options = TestRunOptions {
        data_in: Some(input),
        data_out: Some(&mut output),
        ctx_in: Some(&context),
        ..TestRunOptions::default()
    };
    let result = program.test_run(options).context("the kernel refuses to run the program")?;
    output.truncate(result.data_size_out as usize);
    Ok((result.return_value.cast_signed(), output))
}

/// Converts an answer to what a packet would show.
fn told(answer: &Answer) -> Result<Seen> {
    Ok(match answer.verdict {
        Verdict::Pass => Seen::Pass,
        Verdict::Drop => Seen::Drop,
        Verdict::Reject => Seen::Reject,
        Verdict::Forward => Seen::Forward {
            backend: answer.backend.context("a packet that is forwarded has a backend")?,
            kept: answer.source == Some(Source::Kept),
        },
    })
}

/// The outcome of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Made {
    Refused,
    /// It went there.
    To(SocketAddr),
    /// It ended before it could be observed.
    Over,
}

/// Moves this process into the cgroup of a namespace, so that its sockets pass the hooks of a node.
/// It moves back when dropped.
struct Visit {
    home: PathBuf,
}

impl Visit {
    fn to(place: &Namespace) -> Result<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let mount =
            mounts.lines().find(|line| line.contains(" - cgroup2 ")).context("no cgroup2")?;
        let mount = mount.split(' ').nth(4).context("a mount point")?;
        let groups = std::fs::read_to_string("/proc/self/cgroup")?;
        let home =
            groups.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup")?;
        let visit = Self { home: Path::new(mount).join(home) };
        std::fs::write(place.cgroup().join("cgroup.procs"), "0")?;
        Ok(visit)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(self.home.join("cgroup.procs"), "0") {
            println!("cannot go back to {}: {error}", self.home.display());
        }
    }
}

/// Calls connect() and returns the socket's real peer, which getpeername() does not show.
fn connect(to: SocketAddr) -> Result<Made> {
    use socket2::{Domain, Socket, Type};
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(Made::Refused),
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
            return Err(error).with_context(|| format!("connect() to {to}"));
        }
        Ok(()) | Err(_) => {}
    }
    let Some(own) = socket.local_addr()?.as_socket() else { bail!("a socket without an address") };
    let (table, v4) = if to.is_ipv4() { ("tcp", true) } else { ("tcp6", false) };
    let table = std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
    for line in table.lines().skip(1) {
        let mut words = line.split_whitespace().skip(1);
        let local = words.next().and_then(|text| in_table(text, v4)).context("a local address")?;
        let remote =
            words.next().and_then(|text| in_table(text, v4)).context("a remote address")?;
        if local.port() == own.port() && remote.port() != 0 {
            return Ok(Made::To(remote));
        }
    }
    Ok(Made::Over)
}

/// Parses an address of the kernel's tables of sockets: words in this machine's order.
fn in_table(text: &str, v4: bool) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        Some(u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes())
    };
    let address: IpAddr = if v4 {
        Ipv4Addr::from(word(0)?).into()
    } else {
        let octets: [u8; 16] = [word(0)?, word(1)?, word(2)?, word(3)?].concat().try_into().ok()?;
        Ipv6Addr::from(octets).into()
    };
    Some(SocketAddr::new(address, port))
}

/// Calls sendmsg() on a socket that is not connected, and returns the datagram's destination.
fn send(to: SocketAddr, wire: &PacketSocket) -> Result<Made> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    let _ = socket.send_to(b"random", to).with_context(|| format!("sendmsg() to {to}"))?;
    let own = socket.local_addr()?.port();
    let is_ours = |frame: &[u8]| {
        frame::tuple(frame).is_some_and(|(protocol, source, to, _)| {
            protocol == Protocol::Udp.number()
                && source.port() == own
                && to.is_ipv4() == any.is_ipv4()
        })
    };
    let frame = wire
        .receive(Duration::from_secs(2), is_ours)
        .with_context(|| format!("a datagram to {to}"))?;
    let (_, _, to, _) = frame::tuple(&frame).context("a frame that cannot be read")?;
    Ok(Made::To(to))
}

/// Reports whether a call went where it was told to go.
fn fits(answer: &Answer, question: &Question, made: Made, ground: &Ground) -> bool {
    let is_call = answer.reason.starts_with("socket_");
    match made {
        Made::Refused => is_call && answer.verdict == Verdict::Reject,
        Made::To(to) if is_call => answer.candidates.iter().any(|candidate| {
            (candidate.address, candidate.port) == (to.ip(), to.port()) && candidate.share > 0.0
        }),
        Made::To(to) => to == question.destination,
        // Nobody listens on the nodes themselves, which refuse immediately.
        Made::Over if is_call => answer.candidates.iter().any(|candidate| {
            ground.own.contains(&candidate.address) || ground.other.contains(&candidate.address)
        }),
        Made::Over => true,
    }
}

/// Runs the command. Returns its exit code and answer.
fn command(node: &Node, words: &str) -> Result<(i32, Value)> {
    let words: Vec<&str> =
        ["explain"].into_iter().chain(words.split_whitespace()).chain(["-o", "json"]).collect();
    let output = node.sluice_output(&words)?;
    let answer = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{words:?}: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok((output.status.code().unwrap_or(-1), answer))
}

/// Returns a question as arguments of the command.
fn words(question: &Question) -> String {
    let Question { protocol, source, destination, from, .. } = question;
    let from = match from {
        Client::Pod => "pod",
        Client::Host => "host",
        Client::External => "external",
    };
    format!("{} {source} {destination} --from {from}", protocol.word())
}

/// The number of comparisons, and the differences that were found.
#[derive(Default)]
struct Tally {
    verdicts: BTreeMap<&'static str, u32>,
    packets: u32,
    /// Client -> number of its packets that were to be rejected.
    rejects: BTreeMap<IpAddr, u32>,
    limited: u32,
    /// Number of packets of clients that went where their client had been by another frontend.
    returned: u32,
    calls: u32,
    commands: u32,
    wrong: Vec<String>,
}

struct Round<'a> {
    cluster: &'a Cluster,
    ground: &'a Ground,
    hooks: &'a Hooks,
    setting: &'a Setting,
    manifests: Manifests,
    scene: Scene,
    wire: &'a PacketSocket,
}

impl Round<'_> {
    fn ask(&self, question: &Question) -> Result<Answer> {
        let (world, routing) = self.manifests.world(question);
        Ok(explain(question, &world, &routing)?)
    }

    /// Reports whether a packet that nobody translates leaves by the uplink.
    fn is_routed(&self, question: &Question) -> bool {
        use sluice::tools::explain::Routing;
        let (_, routing) = self.manifests.world(question);
        let to = question.destination.ip();
        !routing.is_local(to) && !self.scene.is_near(to)
    }

    /// Sends random packets. `used` has the clients that may have flows.
    fn packets(
        &self,
        dice: &mut Dice,
        used: &mut BTreeSet<(u8, SocketAddr)>,
        tally: &mut Tally,
    ) -> Result<()> {
        let mut asked = Vec::new();
        let mut last: Option<Question> = None;
        while asked.len() < PACKETS {
            let repeats = self.scene.is_affine() && dice.one_in(6);
            let question = match last.take().filter(|_| repeats) {
                // The same client comes again, from another port.
                Some(mut question) => {
                    question.source.set_port(question.source.port().wrapping_add(1).max(1024));
                    question
                }
                None => match self.scene.question(dice, self.ground) {
                    Some(question) => question,
                    None => continue,
                },
            };
            // A tuple that is used again would follow its flow.
            if !used.insert((question.protocol.number(), question.source)) {
                continue;
            }
            last = Some(question.clone());
            let answer = self.ask(&question)?;
            let routed = self.is_routed(&question);
            asked.push((question, answer, routed));
        }
        for (question, answer, _) in asked.iter().take(COMMANDS) {
            self.commands(question, answer, tally)?;
        }
        let node = self.cluster.node();
        let programs = self.hooks.programs(node)?;
        let found: Vec<Result<Seen>> = node.enter(|| {
            asked
                .iter()
                .map(|(question, _, routed)| self.hooks.run(&programs, question, *routed))
                .collect()
        })?;
        // The last backend of a client at a service port, by any frontend.
        let mut visits = BTreeMap::new();
        for ((question, answer, _), found) in asked.iter().zip(found) {
            let found = found.with_context(|| words(question))?;
            tally.packets += 1;
            *tally.verdicts.entry(answer.reason).or_default() += 1;
            if answer.verdict == Verdict::Reject {
                let count = tally.rejects.entry(question.source.ip()).or_default();
                *count += 1;
                if *count > REJECTS && found == Seen::Drop {
                    tally.limited += 1;
                    continue;
                }
            }
            let mut told = told(answer)?;
            // A process of the host has the address of its route already, so the wire does not show
            // it.
            if let (Client::Host, Seen::Forward { kept, .. }, Seen::Forward { kept: seen, .. }) =
                (question.from, &mut told, found)
            {
                *kept = seen;
            }
            let visit = (&answer.service, &answer.port, question.source.ip());
            if let (Some(_), Seen::Forward { backend, .. }) = (answer.affinity, found) {
                // Manifests do not show a visit by a frontend for other clients, with other
                // backends.
                let is_known = visits.insert(visit, backend) == Some(backend);
                let is_candidate = answer
                    .candidates
                    .iter()
                    .any(|one| (one.address, one.port) == (backend.address, backend.port));
                if is_known && is_candidate && told != found {
                    tally.returned += 1;
                    continue;
                }
            }
            if told != found {
                let answer = serde_json::to_string(answer)?;
                tally
                    .wrong
                    .push(format!("{}: {found:?} instead of {told:?}: {answer}", words(question)));
            }
        }
        Ok(())
    }

    /// Checks that the command gives the same answer, from the live maps and from the manifests.
    fn commands(&self, question: &Question, answer: &Answer, tally: &mut Tally) -> Result<()> {
        let node = self.cluster.node();
        let folder = self.cluster.manifests.directory().display();
        let by_manifests = format!(
            "{} --manifests {folder} --node {} {}",
            words(question),
            self.ground.name,
            self.setting.args.join(" ")
        );
        // Parsed from text, as the command's output is: parsing may round a share.
        let answer: Value = serde_json::from_str(&serde_json::to_string(answer)?)?;
        let facts = |answer: &Value| {
            let fields = [
                "verdict",
                "reason",
                "service",
                "port",
                "frontend",
                "backend",
                "candidates",
                "source",
                "affinity",
            ];
            let own = |answer: &Value| fields.map(|field| answer.get(field).cloned());
            (own(answer), answer.get("socket").map(own))
        };
        for asked in [by_manifests, words(question)] {
            let (code, found) = command(node, &asked)?;
            tally.commands += 1;
            let expected = match word(&answer, "verdict") {
                "reject" => 3,
                "drop" => 4,
                _ => 0,
            };
            if code != expected || facts(&found) != facts(&answer) {
                tally.wrong.push(format!("{asked}: {code} {found} instead of {expected} {answer}"));
            }
        }
        Ok(())
    }

    fn calls(&self, dice: &mut Dice, tally: &mut Tally) -> Result<()> {
        let client = &self.cluster.client;
        let places: [(&Namespace, Client, usize, Protocol); 3] = [
            (client, Client::Pod, CALLS, Protocol::Tcp),
            (self.cluster.node(), Client::Host, CALLS, Protocol::Tcp),
            (client, Client::Pod, DATAGRAMS, Protocol::Udp),
        ];
        for (place, from, count, protocol) in places {
            let mut asked = Vec::new();
            while asked.len() < count {
                let (found, destination) = self.scene.destination(dice, self.ground);
                if found != protocol {
                    continue;
                }
                let own: IpAddr = match (from, destination.is_ipv4()) {
                    (Client::Pod, true) => client.ipv4().into(),
                    (Client::Pod, false) => client.ipv6().into(),
                    (_, v4) => self.ground.own[usize::from(!v4)],
                };
                let source = SocketAddr::new(own, 40_000);
                let way = Some(Way::Socket);
                let question = Question {
                    protocol,
                    source,
                    destination,
                    from,
                    way,
                    device: None,
                    length: None,
                    ttl: None,
                };
                let answer = self.ask(&question)?;
                asked.push((question, answer));
            }
            let visit = Visit::to(place)?;
            let made: Vec<Result<Made>> = place.enter(|| {
                let call = |(question, _): &(Question, Answer)| match protocol {
                    Protocol::Tcp => connect(question.destination),
                    Protocol::Udp | Protocol::Sctp => send(question.destination, self.wire),
                };
                asked.iter().map(call).collect()
            })?;
            drop(visit);
            for ((question, answer), made) in asked.iter().zip(made) {
                let made = made?;
                tally.calls += 1;
                *tally.verdicts.entry(answer.reason).or_default() +=
                    u32::from(answer.reason.starts_with("socket_"));
                if !fits(answer, question, made, self.ground) {
                    let answer = serde_json::to_string(answer)?;
                    tally
                        .wrong
                        .push(format!("{} --path socket: {made:?}: {answer}", words(question)));
                }
            }
        }
        Ok(())
    }
}

#[test]
fn explain_is_right_about_random_manifests() -> Result<()> {
    if skip("what_is_told_of_random_manifests") {
        return Ok(());
    }
    let clock = || {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.subsec_nanos())
    };
    let seed = number_from("SLUICE_RANDOM_SEED")?.unwrap_or_else(|| u64::from(clock()));
    let rounds = u32::try_from(number_from("SLUICE_RANDOM_ROUNDS")?.unwrap_or(8))?;
    println!("SLUICE_RANDOM_SEED={seed} SLUICE_RANDOM_ROUNDS={rounds}");
    let settings = settings()?;
    let mut cluster =
        Cluster::without_agents("random", &Plan { near: 0, far: 1, ..Plan::default() })?;
    std::fs::remove_dir_all(cluster.manifests.directory())?;
    std::fs::create_dir(cluster.manifests.directory())?;
    let [near, far] = [&cluster.nodes[0], &cluster.nodes[1]].map(addresses_of_node);
    let ground = Ground { name: cluster.node().name().to_owned(), own: near, other: far };
    let edge = cluster.client.host_device();
    let [endpoints, clients, both6] = scene::pods(true);
    let _ = cluster.node().ip(&format!(
        "route add {endpoints} dev {edge}\nroute add {clients} dev {edge}\nroute add {both6} dev {edge}"
    ))?;
    // Calls to pods that do not exist end in silence, not in an ICMP error.
    for prefix in scene::pods(false) {
        let _ = cluster.nodes[1].ip(&format!("route add blackhole {prefix}"))?;
    }
    let wire = cluster.node().packet_socket(edge)?;
    let hooks = Hooks {
        edge: Device::new(cluster.node(), edge)?,
        uplink: Device::new(cluster.node(), cluster.node().uplink())?,
    };
    // One agent is enough.
    cluster.nodes.truncate(1);

    let mut dice = Dice::new(seed);
    let mut tally = Tally::default();
    let mut used = BTreeSet::new();
    // Each setting has its share of the rounds.
    let number_of = |round: u32| (round * settings.len() as u32 / rounds) as usize;
    for round in 0..rounds {
        let setting = &settings[number_of(round)];
        let scene = Scene::new(&mut dice, &ground, round);
        cluster.manifests.write_text("scene.yaml", &scene.text)?;
        if round == 0 || number_of(round - 1) != number_of(round) {
            // The first call of an unknown pod would be translated per packet.
            let args: Vec<&str> =
                setting.args.iter().copied().chain(["--socket-path=machine"]).collect();
            cluster.change_agents(&args)?;
        }
        until("the scene in the maps", || {
            let rows = listed(cluster.node(), &["services"])?;
            let end = format!("end-{round}");
            Ok(rows.iter().any(|row| word(row, "service") == end).then_some(()))
        })?;
        // Written after it, so that it is loaded last.
        std::thread::sleep(Duration::from_millis(100));
        let options = Options {
            path: cluster.manifests.directory().to_owned(),
            node: Some(ground.name.as_str().into()),
            proxy_name: None,
            policy: setting.policy.clone(),
            socket_path: socket_path::MACHINE,
        };
        let manifests = Manifests::read(options)?;
        let text = scene.text.clone();
        let this = Round {
            cluster: &cluster,
            ground: &ground,
            hooks: &hooks,
            setting,
            manifests,
            scene,
            wire: &wire,
        };
        this.packets(&mut dice, &mut used, &mut tally)?;
        this.calls(&mut dice, &mut tally)?;
        if !tally.wrong.is_empty() {
            let kept = std::env::temp_dir().join(format!("sluice-random-{seed}-{round}.yaml"));
            std::fs::write(&kept, text)?;
            let shown: Vec<&str> = tally.wrong.iter().take(10).map(String::as_str).collect();
            bail!(
                "{} of {} differ in round {round} with {:?}; the manifests are in {}:\n{}",
                tally.wrong.len(),
                tally.packets + tally.calls + tally.commands,
                setting.args,
                kept.display(),
                shown.join("\n")
            );
        }
    }
    println!(
        "{} packets ({} rejects limited, {} by an earlier visit), {} calls, {} commands: {:?}",
        tally.packets, tally.limited, tally.returned, tally.calls, tally.commands, tally.verdicts
    );
    ensure!(rounds < 12 || tally.verdicts.len() > 6, "too little was tried: {:?}", tally.verdicts);
    Ok(())
}
