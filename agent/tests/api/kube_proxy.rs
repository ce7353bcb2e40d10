//! The real kube-proxy's treatment of packets, in its nftables mode, compared with what `sluice
//! explain` answers for the same objects.
//!
//! ```text
//!     clients: pods ----- kpods  +------+  kout ----- clients: outside; whatever nobody translates
//!                                | node |
//!     endpoints --------- kends  +------+  eth0 ----- router: the API server
//! ```
//!
//! Behind the first three is one namespace that sends the first packets of random clients, and sees
//! what becomes of them. Per packet the verdict and whether the client's address is kept must be
//! equal, the endpoint must be one of the candidates, and a client that a Service has affinity for
//! must meet the same one again. Of a question that is asked many times, each candidate must be
//! met. `docs/kube-proxy.md` lists what differs on purpose.
//!
//! A seed is printed; `SLUICE_RANDOM_SEED` sets it, and `SLUICE_RANDOM_ROUNDS` how many sets of
//! objects there are.
//!
//! test-threads: 1

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::support::control_plane::ADMIN;
use crate::support::objects::Space;
use crate::support::random::frame::{self, build};
use crate::support::random::scene::{CLUSTER_CIDRS, Ground, SERVICE_CIDRS, Scene};
use crate::support::random::{Dice, number_from};
use crate::support::{Cluster, cluster, wait_for};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sluice::tools::explain::{
    Answer, Client, Manifests, Options, Question, Source, Verdict, explain,
};
use sluice_common::abi::socket_path;
use sluice_core::model::object::Protocol;
use sluice_core::policy::{DetectLocal, Masquerade, Policy};
use sluice_lab::{Lab, Node, NodeOptions, PacketSocket, RpFilter, Running};

/// The name of the node.
const NAME: &str = "kp";
/// Number of sets of objects.
const ROUNDS: u64 = 2;
/// Number of a round's packets that are sent twice, and of those that are sent often.
const TWICE: usize = 400;
const OFTEN: usize = 12;
const TIMES: u16 = 60;
/// Number of frames that are sent before the answers are read: a socket's buffer holds more.
const BURST: usize = 32;
/// The silence after which no more packets are expected.
const QUIET: Duration = Duration::from_millis(300);
/// The time that kube-proxy may take for a set of objects.
const SYNC: Duration = Duration::from_secs(30);
/// The links between node and world: the node's device, and the networks that are routed to it.
const LINKS: [(&str, &[&str]); 3] = [
    ("kpods", &["10.244.1.128/25", "fd00:af4:100::a:80/121"]),
    (
        "kends",
        &["10.244.1.64/26", "10.244.2.64/26", "fd00:af4:100::a:40/122", "fd00:af4:200::a:40/122"],
    ),
    (
        "kout",
        &[
            "10.244.2.128/25",
            "fd00:af4:200::a:80/121",
            "198.51.100.0/24",
            "fd00:c633:6400::/48",
            "203.0.113.0/24",
            "fd00:cb00:7100::/48",
            "198.18.0.0/24",
            "fd00:c612:0::/48",
            "10.96.0.0/24",
            "fd00:a60:0::/48",
        ],
    ),
];

/// The fate of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Lost,
    Rejected,
    /// The owner of this address and port gets it, and sees the client's address or another one.
    Arrived {
        at: SocketAddr,
        kept: bool,
    },
}

/// The node with its three links, and the world behind them.
struct Field {
    node: Node,
    sockets: Vec<PacketSocket>,
    macs: Vec<[u8; 6]>,
    next: u32,
}

impl Field {
    fn new(lab: &Lab) -> Result<Self> {
        let node =
            lab.node(NAME, &NodeOptions { rp_filter: RpFilter::Off, ..NodeOptions::default() })?;
        let world = lab.client("world")?;
        let mut macs = Vec::new();
        for (index, (device, routes)) in (1_u8..).zip(LINKS) {
            let peer = world.path().display().to_string();
            let (near, far) = ([2, 0, 0, 0, 1, index], format!("02:00:00:00:02:{index:02x}"));
            let mac = near.map(|byte| format!("{byte:02x}")).join(":");
            let mut lines = format!(
                "link add {device} address {mac} type veth peer name {device} address {far} netns {peer}\n\
                 link set {device} up\n\
                 neigh add 169.254.9.{index} lladdr {far} dev {device} nud permanent\n\
                 neigh add fe80::9:{index} lladdr {far} dev {device} nud permanent\n"
            );
            for route in routes {
                let via = if route.contains(':') {
                    format!("fe80::9:{index}")
                } else {
                    format!("169.254.9.{index}")
                };
                writeln!(lines, "route add {route} via {via} dev {device} onlink")?;
            }
            let _ = node.ip(&lines)?;
            let _ = world.ip(&format!("link set {device} arp off up"))?;
            macs.push(near);
        }
        // Every reject is answered, without a limit.
        node.sysctl("net/ipv4/icmp_ratelimit", "0")?;
        node.sysctl("net/ipv6/icmp/ratelimit", "0")?;
        node.sysctl("net/ipv4/icmp_msgs_per_sec", "1000000")?;
        node.sysctl("net/ipv4/icmp_msgs_burst", "100000")?;
        let sockets =
            LINKS.iter().map(|(device, _)| world.packet_socket(device)).collect::<Result<_>>()?;
        Ok(Self { node, sockets, macs, next: 1 })
    }

    /// Sends the packets of all questions, and returns the fate of each.
    fn ask(&mut self, questions: &[Question]) -> Result<Vec<Fate>> {
        let first = self.next;
        let mut fates = Fates {
            first,
            questions,
            found: vec![None; questions.len()],
            clients: BTreeMap::new(),
        };
        for (index, question) in questions.iter().enumerate() {
            let _ = fates.clients.insert((question.protocol.number(), question.source), index);
        }
        let mut processes = Vec::new();
        for (index, question) in questions.iter().enumerate() {
            let mark = self.next;
            self.next += 1;
            match question.from {
                Client::Host => processes.push((index, self.call(question, mark)?)),
                Client::Pod | Client::External => {
                    let link = if question.from == Client::Pod { 0 } else { 2 };
                    self.sockets[link].send(&build(question, self.macs[link], mark))?;
                }
            }
            if index % BURST == BURST - 1 {
                self.read(Duration::ZERO, &mut fates);
            }
        }
        self.read(QUIET, &mut fates);
        for (index, socket) in processes {
            let refused = matches!(socket.recv(&mut [0]), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused);
            if refused {
                fates.found[index] = Some(Fate::Rejected);
            }
        }
        Ok(fates.found.into_iter().map(|fate| fate.unwrap_or(Fate::Lost)).collect())
    }

    /// A process of the node sends a datagram.
    fn call(&self, question: &Question, mark: u32) -> Result<UdpSocket> {
        self.node.enter(|| {
            let socket = UdpSocket::bind(question.source)?;
            socket.set_nonblocking(true)?;
            socket.connect(question.destination)?;
            match socket.send(&mark.to_be_bytes()) {
                // A rule has dropped it.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(socket),
                // It was refused immediately.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(socket),
                sent => Ok(sent.map(|_| socket)?),
            }
        })?
    }

    fn read(&self, quiet: Duration, fates: &mut Fates) {
        for socket in &self.sockets {
            while let Ok(frame) = socket.receive(quiet, |_| true) {
                fates.note(&frame);
            }
        }
    }

    /// Returns the fate of a question's packet.
    fn fate(&mut self, question: &Question) -> Result<Fate> {
        let fates = self.ask(std::slice::from_ref(question))?;
        fates.first().copied().context("no fate")
    }
}

/// The fates of the packets that were sent, filled in as they arrive.
struct Fates<'q> {
    first: u32,
    questions: &'q [Question],
    found: Vec<Option<Fate>>,
    /// Protocol and client -> question.
    clients: BTreeMap<(u8, SocketAddr), usize>,
}

impl Fates<'_> {
    /// Records a frame that came out of the node: a packet, recognised by its mark, or an answer to
    /// its client.
    fn note(&mut self, frame: &[u8]) {
        if let Some((protocol, client)) = frame::refused(frame) {
            if let Some(index) = self.clients.get(&(protocol, client)) {
                self.found[*index] = Some(Fate::Rejected);
            }
            return;
        }
        let Some((protocol, source, at, _)) = frame::tuple(frame) else { return };
        let index = frame::mark(frame)
            .and_then(|mark| mark.checked_sub(self.first))
            .map(|index| index as usize);
        let Some((index, question)) =
            index.and_then(|index| Some((index, self.questions.get(index)?)))
        else {
            return;
        };
        // The world's own frames are received as well.
        let is_own = frame.get(..5).is_some_and(|mac| mac == [2, 0, 0, 0, 1]);
        if question.protocol.number() == protocol && !is_own {
            self.found[index] =
                Some(Fate::Arrived { at, kept: source.ip() == question.source.ip() });
        }
    }
}

/// Returns the real kube-proxy, for the node.
fn start_kube_proxy(cluster: &Cluster, node: &Node, programs: &Path) -> Result<Running> {
    let file = cluster.lab.state().join("kube-proxy.json");
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "mode": "nftables", "hostnameOverride": NAME, "clusterCIDR": CLUSTER_CIDRS,
        "clientConnection": {"kubeconfig": cluster.plane.kubeconfig(ADMIN)},
        "conntrack": {"maxPerCore": 0, "min": 0},
        "nftables": {"minSyncPeriod": "50ms"},
        "metricsBindAddress": "127.0.0.1:10249", "healthzBindAddress": "127.0.0.1:10256",
    });
    std::fs::write(&file, config.to_string())?;
    node.spawn(programs.join("kube-proxy"), [format!("--config={}", file.display())])
}

/// Creates the objects of a scene in the API server, and prints those that it refuses.
fn put(space: &Space, cluster: &Cluster, scene: &Scene) -> Result<usize> {
    let objects: Vec<Value> =
        serde_saphyr::from_multiple(&scene.text).context("the manifests are YAML")?;
    let mut refused = 0;
    let mut taken = BTreeSet::new();
    for mut object in objects {
        let kind = object.pointer("/kind").and_then(Value::as_str).unwrap_or_default().to_owned();
        let name =
            object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            let _ = metadata.remove("namespace");
        }
        match kind.as_str() {
            "Service" => {
                adapt(&mut object, &mut taken);
                if let Err(error) =
                    cluster.plane.request("POST", &space.path("services", ""), Some(&object))
                {
                    println!("{name} is refused: {}", error.root_cause());
                    refused += 1;
                    continue;
                }
                if let Some(status) = object.get("status") {
                    space.edit("services", &format!("{name}/status"), &json!({"status": status}));
                }
            }
            "EndpointSlice" => space.create("endpointslices", &object),
            "Node" => {}
            _ => bail!("a {kind} in a scene"),
        }
    }
    Ok(refused)
}

/// Changes a Service so that the API server accepts it, and that it claims no address of another
/// one: which of two gets an address is chance with kube-proxy.
fn adapt(service: &mut Value, taken: &mut BTreeSet<(String, String)>) {
    let text = |value: Option<&Value>| value.map(ToString::to_string).unwrap_or_default();
    let Some(spec) = service.get_mut("spec").and_then(Value::as_object_mut) else { return };
    if spec.get("clusterIPs").and_then(Value::as_array).is_some_and(|ips| ips.len() == 2) {
        let _ = spec.insert("ipFamilyPolicy".into(), "RequireDualStack".into());
    }
    if spec.get("type").is_none_or(|kind| kind == "ClusterIP") && !spec.contains_key("externalIPs")
    {
        let _ = spec.remove("externalTrafficPolicy");
    }
    let ports: Vec<String> = spec
        .get("ports")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|port| text(port.get("protocol")) + &text(port.get("port")))
        .collect();
    let mut is_free = |address: Option<&Value>| {
        let keys: Vec<_> = ports.iter().map(|port| (text(address), port.clone())).collect();
        let free = keys.iter().all(|key| !taken.contains(key));
        if free {
            taken.extend(keys);
        }
        free
    };
    if let Some(Value::Array(external)) = spec.get_mut("externalIPs") {
        external.retain(|address| is_free(Some(address)));
    }
    if let Some(Value::Array(ingress)) = service.pointer_mut("/status/loadBalancer/ingress") {
        ingress.retain(|entry| is_free(entry.get("ip")));
    }
}

/// Writes everything that both decide by as manifests.
fn dump(cluster: &Cluster, file: &Path) -> Result<()> {
    let mut items = Vec::new();
    for (path, version, kind) in [
        ("/api/v1/services", "v1", "Service"),
        ("/apis/discovery.k8s.io/v1/endpointslices", "discovery.k8s.io/v1", "EndpointSlice"),
        ("/api/v1/nodes", "v1", "Node"),
    ] {
        let mut list = cluster.plane.request("GET", path, None)?;
        let Some(Value::Array(found)) = list.get_mut("items").map(Value::take) else {
            bail!("{path}: {list}")
        };
        for mut item in found {
            item["apiVersion"] = version.into();
            item["kind"] = kind.into();
            items.push(item);
        }
    }
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    std::fs::write(file, list.to_string()).with_context(|| file.display().to_string())
}

fn policy() -> Result<Policy> {
    let networks = |text: &str| text.split(',').map(str::parse).collect::<Result<Vec<_>, _>>();
    Ok(Policy {
        masquerade: Masquerade::KubeProxy,
        detect_local: DetectLocal::ClusterCidr,
        cluster_cidrs: networks(CLUSTER_CIDRS)?,
        service_cidrs: networks(SERVICE_CIDRS)?,
        ..Policy::default()
    })
}

/// Reports whether both have decided alike.
fn agree(question: &Question, answer: &Answer, fate: Fate, ground: &Ground, scene: &Scene) -> bool {
    let to_own = |address: IpAddr| ground.own.contains(&address);
    match (answer.verdict, fate) {
        (Verdict::Drop, Fate::Lost) | (Verdict::Reject, Fate::Rejected) => true,
        // Nobody listens on the node itself, which refuses.
        (Verdict::Pass, Fate::Rejected) => to_own(question.destination.ip()),
        (Verdict::Forward, Fate::Rejected) => {
            // An endpoint that is a frontend of some Service as well is left out, but not by
            // kube-proxy.
            let is_left_out = |port| {
                ground
                    .own
                    .iter()
                    .any(|own| scene.is_frontend(question.protocol, SocketAddr::new(*own, port)))
            };
            answer.candidates.iter().any(|candidate| {
                candidate.share > 0.0 && (to_own(candidate.address) || is_left_out(candidate.port))
            })
        }
        (Verdict::Pass, Fate::Arrived { at, .. }) => at == question.destination,
        (Verdict::Forward, Fate::Arrived { at, kept }) => {
            let is_candidate = answer
                .candidates
                .iter()
                .any(|one| one.share > 0.0 && (one.address, one.port) == (at.ip(), at.port()));
            // A process of the host has the address of its route in any case. Whether others keep
            // theirs also depends on the endpoint if that is the node or the client itself.
            let client = question.source.ip();
            let ours = answer.backend.map(|backend| backend.address);
            let is_like =
                at.ip() != client && ours.is_some_and(|ours| ours != client && !to_own(ours));
            let is_comparable = question.from != Client::Host && (is_like || ours == Some(at.ip()));
            is_candidate && (!is_comparable || kept == (answer.source == Some(Source::Kept)))
        }
        _ => false,
    }
}

struct Tally {
    asked: usize,
    covered: usize,
    verdicts: BTreeMap<&'static str, usize>,
    wrong: Vec<String>,
}

/// A set of objects, and many questions about it.
struct Round<'a> {
    ground: &'a Ground,
    field: &'a mut Field,
    scene: Scene,
    manifests: Manifests,
    used: &'a mut BTreeSet<(u8, SocketAddr)>,
}

impl Round<'_> {
    fn answer(&self, question: &Question) -> Result<Answer> {
        let (world, routing) = self.manifests.world(question);
        Ok(explain(question, &world, &routing)?)
    }

    /// Returns a question that was not used before.
    fn question(&mut self, dice: &mut Dice) -> Question {
        loop {
            let Some(question) = self.scene.question(dice, self.ground) else { continue };
            let is_call = question.from == Client::Host;
            if (!is_call || question.protocol == Protocol::Udp)
                && self.used.insert((question.protocol.number(), question.source))
            {
                return question;
            }
        }
    }

    /// Returns the same question from another port.
    fn again(&mut self, question: &Question) -> Question {
        let mut question = question.clone();
        loop {
            question.source.set_port(question.source.port().wrapping_add(1).max(1024));
            if self.used.insert((question.protocol.number(), question.source)) {
                return question;
            }
        }
    }

    fn twice(&mut self, dice: &mut Dice, tally: &mut Tally) -> Result<()> {
        let mut questions = Vec::new();
        for _ in 0..TWICE {
            let question = self.question(dice);
            questions.push(self.again(&question));
            questions.push(question);
        }
        let fates = self.field.ask(&questions)?;
        for (pair, fates) in questions.chunks(2).zip(fates.chunks(2)) {
            let ([question, _], [fate, other]) = (pair, fates) else { bail!("a question alone") };
            let answer = self.answer(question)?;
            tally.asked += 2;
            *tally.verdicts.entry(answer.reason).or_default() += 1;
            for fate in [fate, other] {
                if !agree(question, &answer, *fate, self.ground, &self.scene) {
                    tally.wrong.push(format!(
                        "{question:?}: {fate:?}, {}",
                        serde_json::to_string(&answer)?
                    ));
                }
            }
            if answer.verdict == Verdict::Forward && answer.affinity.is_some() && fate != other {
                tally
                    .wrong
                    .push(format!("{question:?}: {fate:?}, then {other:?} in spite of affinity"));
            }
        }
        Ok(())
    }

    /// Sends so many packets that each candidate must receive one.
    fn often(&mut self, dice: &mut Dice, tally: &mut Tally) -> Result<()> {
        for _ in 0..OFTEN {
            let question = self.question(dice);
            let answer = self.answer(&question)?;
            if answer.affinity.is_some() || answer.candidates.is_empty() {
                continue;
            }
            let mut all = Vec::new();
            for _ in 0..TIMES {
                let next = self.again(all.last().unwrap_or(&question));
                all.push(next);
            }
            let fates = self.field.ask(&all)?;
            tally.covered += 1;
            for candidate in answer.candidates.iter().filter(|one| one.share > 0.0) {
                let at = SocketAddr::new(candidate.address, candidate.port);
                let is_met = fates
                    .iter()
                    .any(|fate| matches!(fate, Fate::Arrived { at: there, .. } if *there == at))
                    || self.ground.own.contains(&at.ip()) && fates.contains(&Fate::Rejected);
                if !is_met {
                    tally.wrong.push(format!(
                        "{question:?} never meets {at}: {}",
                        serde_json::to_string(&answer)?
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Waits until kube-proxy has everything that was created before this Service.
fn until_synced(space: &Space, field: &mut Field, round: u32) {
    let (name, port) = (format!("synced-{round}"), 2_000 + round as u16);
    space.service(
        &name,
        &json!({"clusterIP": "10.96.0.251", "ports": [{"port": 1, "protocol": "UDP"}]}),
    );
    let mut slice = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4", "endpoints": [{"addresses": ["10.244.1.64"]}],
        "ports": [{"name": "", "protocol": "UDP"}],
    });
    slice["ports"][0]["port"] = port.into();
    space.create("endpointslices", &slice);
    let mut question = Question {
        protocol: Protocol::Udp,
        source: SocketAddr::new(IpAddr::from([198, 51, 100, 255]), 1_024 + round as u16 * 1_000),
        destination: SocketAddr::new(IpAddr::from([10, 96, 0, 251]), 1),
        from: Client::External,
        way: None,
        device: None,
        length: None,
        ttl: None,
    };
    wait_for("kube-proxy's rules", SYNC, || {
        // An answer belongs to one connection; the next one is another.
        question.source.set_port(question.source.port() + 1);
        match field.fate(&question) {
            Ok(Fate::Arrived { at, .. }) if at.port() == port => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn kube_proxy_decides_as_explain_says() -> Result<()> {
    let Some(cluster) = cluster() else { return Ok(()) };
    let programs = std::env::var_os("SLUICE_CONTROL_PLANE").context("no control plane")?;
    let seed = match number_from("SLUICE_RANDOM_SEED")? {
        Some(seed) => seed,
        None => std::time::UNIX_EPOCH.elapsed()?.as_nanos() as u64,
    };
    println!("SLUICE_RANDOM_SEED={seed}");
    let mut dice = Dice::new(seed);
    let mut field = Field::new(&cluster.lab)?;
    let (v4, v6) = (field.node.ipv4(), field.node.ipv6());
    let ground = Ground {
        name: NAME.into(),
        own: [v4.into(), v6.into()],
        other: [IpAddr::from([198, 51, 100, 254]), "fd00:c633:6400::a:fe".parse()?],
    };
    cluster.plane.add_node(NAME)?;
    let addresses =
        json!([{"type": "InternalIP", "address": v4}, {"type": "InternalIP", "address": v6}]);
    let node = format!("/api/v1/nodes/{NAME}");
    let _ = cluster.plane.request(
        "PATCH",
        &node,
        Some(&json!({"metadata": {"labels": {"topology.kubernetes.io/zone": "z1"}}})),
    )?;
    let _ = cluster.plane.request(
        "PATCH",
        &format!("{node}/status"),
        Some(&json!({"status": {"addresses": addresses}})),
    )?;
    let mut kube_proxy = start_kube_proxy(&cluster, &field.node, Path::new(&programs))?;
    let mut tally = Tally { asked: 0, covered: 0, verdicts: BTreeMap::new(), wrong: Vec::new() };
    let mut used = BTreeSet::new();
    for round in 0..number_from("SLUICE_RANDOM_ROUNDS")?.unwrap_or(ROUNDS) as u32 {
        let space = Arc::new(Space::new(&cluster, &format!("random-{round}")));
        let scene = Scene::new(&mut dice, &ground, round);
        let refused = put(&space, &cluster, &scene)?;
        ensure!(refused < 8, "{refused} Services are refused");
        until_synced(&space, &mut field, round);
        let file = cluster.lab.state().join("dump.yaml");
        dump(&cluster, &file)?;
        let manifests = Manifests::read(Options {
            path: file,
            node: Some(NAME.into()),
            proxy_name: None,
            policy: policy()?,
            socket_path: socket_path::OFF,
        })?;
        let mut this =
            Round { ground: &ground, field: &mut field, scene, manifests, used: &mut used };
        this.twice(&mut dice, &mut tally)?;
        this.often(&mut dice, &mut tally)?;
        // Everything in it is deleted.
        for kind in ["services", "endpointslices"] {
            let _ = cluster.plane.request("DELETE", &space.path(kind, ""), None)?;
        }
    }
    println!(
        "{} packets, {} questions asked often, by reason: {:?}",
        tally.asked, tally.covered, tally.verdicts
    );
    let _ = kube_proxy.stop()?;
    for wrong in tally.wrong.iter().take(12) {
        println!("{wrong}");
    }
    ensure!(tally.wrong.is_empty(), "{} of {} differ; seed {seed}", tally.wrong.len(), tally.asked);
    Ok(())
}
