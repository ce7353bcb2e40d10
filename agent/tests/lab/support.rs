//! Shared code of the lab tests: a cluster with an agent on every node, and requests to it.

#[path = "../../../common/tests/packets/frame.rs"]
#[allow(dead_code, reason = "the lab builds a part of what it can")]
pub(crate) mod frame;
#[path = "../random/mod.rs"]
#[allow(dead_code, reason = "each tier uses its part of what chance makes")]
pub(crate) mod random;
pub(crate) mod raw;
pub(crate) mod stack;
pub(crate) mod terminal;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sluice_lab::{
    AgentOptions, AgentProcess, Backend, Client, Event, Lab, LoadClients, LoadSize, Manifests,
    Namespace, Node, NodeOptions, Overlay, Pod, Port, Reply, Running, Serve, Service, Unsupported,
};

/// Ports of the service `web`: HTTP, UDP echo, TCP echo, stream.
pub(crate) const HTTP: u16 = 80;
pub(crate) const DNS: u16 = 53;
pub(crate) const ECHO: u16 = 7;
pub(crate) const STREAM: u16 = 9;
/// The ports of its backends.
pub(crate) const HTTP_TARGET: u16 = 8080;
pub(crate) const DNS_TARGET: u16 = 5353;
pub(crate) const ECHO_TARGET: u16 = 7000;
pub(crate) const STREAM_TARGET: u16 = 9000;

/// Requests that leave none of three backends out, but once in ten million times.
pub(crate) const ENOUGH: u32 = 44;
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// An address of each family.
pub(crate) type Pair = [IpAddr; 2];

/// Cluster addresses, numbered.
pub(crate) fn cluster_ip(number: u8) -> Pair {
    [
        Ipv4Addr::new(10, 96, 0, number).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into()).into(),
    ]
}

/// Load balancer's addresses, numbered.
pub(crate) fn external_ip(number: u8) -> Pair {
    [
        Ipv4Addr::new(203, 0, 113, number).into(),
        Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, number.into()).into(),
    ]
}

/// The first addresses: those of the service `web`.
pub(crate) const WEB: u8 = 10;

/// Reports whether lab tests cannot run here and are to be skipped, and prints the reason.
pub(crate) fn skip(test: &str) -> bool {
    !sluice_lab::is_root() && sluice_lab::skipped(&format!("{test}: network namespaces need root"))
}

/// Ends a test successfully if the kernel lacks what its lab needs. Other errors are passed on.
pub(crate) fn unless_unsupported(built: Result<()>) -> Result<()> {
    match built {
        Err(error) if error.downcast_ref::<Unsupported>().is_some() => {
            println!("skipped: {error:#}");
            Ok(())
        }
        result => result,
    }
}

/// The components of a cluster.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) overlay: Overlay,
    pub(crate) node: NodeOptions,
    /// Backends on the first node, where the clients are.
    pub(crate) near: usize,
    /// Backends on a second node.
    pub(crate) far: usize,
    /// Further arguments of the agents.
    pub(crate) args: Vec<&'static str>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            overlay: Overlay::None,
            node: NodeOptions::default(),
            near: 2,
            far: 0,
            args: Vec::new(),
        }
    }
}

/// One or two nodes with agents, backends of the service `web`, a client pod, and a client outside.
pub(crate) struct Cluster {
    pub(crate) agents: Vec<AgentProcess>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) backends: Vec<Pod>,
    pub(crate) client: Pod,
    pub(crate) outside: Client,
    pub(crate) manifests: Manifests,
    pub(crate) servers: Vec<Running>,
    pub(crate) lab: Lab,
}

impl Cluster {
    /// Builds the cluster and waits until its agents are ready.
    pub(crate) fn new(name: &str, plan: &Plan) -> Result<Self> {
        let started = Instant::now();
        let mut cluster = Self::without_agents(name, plan)?;
        let built = started.elapsed();
        cluster.start_agents(&plan.args)?;
        println!("{name}: lab up after {built:.1?}, agents ready after {:.1?}", started.elapsed());
        Ok(cluster)
    }

    /// Builds the cluster without agents.
    pub(crate) fn without_agents(name: &str, plan: &Plan) -> Result<Self> {
        let lab = Lab::with_overlay(name, plan.overlay)?;
        let mut nodes = vec![lab.node("n1", &plan.node)?];
        if plan.far > 0 {
            nodes.push(lab.node("n2", &plan.node)?);
        }
        let client = nodes[0].pod("client")?;
        let outside = lab.client("outside")?;
        for address in external_ip(WEB) {
            route_to(&lab, address, &nodes[0])?;
        }
        let mut cluster = Self {
            agents: Vec::new(),
            nodes,
            backends: Vec::new(),
            client,
            outside,
            manifests: lab.manifests("cluster")?,
            servers: Vec::new(),
            lab,
        };
        for (node, count) in [plan.near, plan.far].into_iter().enumerate() {
            let word = ["near", "far"][node];
            for number in 1..=count {
                let pod = cluster.nodes[node].pod(&format!("{word}-{number}"))?;
                cluster.serve(&pod)?;
                cluster.backends.push(pod);
            }
        }
        cluster.manifests.write(&cluster.web())?;
        Ok(cluster)
    }

    /// Starts an agent on every node and waits until they are ready.
    pub(crate) fn start_agents(&mut self, args: &[&str]) -> Result<()> {
        for node in &self.nodes {
            let options = AgentOptions {
                manifests: Some(self.manifests.directory().to_owned()),
                args: args.iter().map(|arg| (*arg).to_owned()).collect(),
                ..AgentOptions::default()
            };
            self.agents.push(node.agent(options)?);
        }
        // The verifier takes more than a second of each agent's start, and other tests start theirs
        // at the same time.
        self.agents.iter_mut().try_for_each(|agent| agent.wait_ready(6 * SOON))
    }

    /// Ends the agents and starts others with other arguments.
    pub(crate) fn change_agents(&mut self, args: &[&str]) -> Result<()> {
        for mut agent in self.agents.drain(..) {
            agent.stop()?;
        }
        self.start_agents(args)
    }

    /// Starts every server of the service `web` in a namespace.
    pub(crate) fn serve(&mut self, namespace: &Namespace) -> Result<()> {
        for (what, port) in [
            (Serve::Http, HTTP_TARGET),
            (Serve::UdpEcho, DNS_TARGET),
            (Serve::TcpEcho, ECHO_TARGET),
            (Serve::Stream, STREAM_TARGET),
        ] {
            self.servers.push(namespace.serve(what, port)?);
        }
        Ok(())
    }

    /// Returns the service `web` with all its backends.
    pub(crate) fn web(&self) -> Service {
        service("web", WEB).backends(&self.backends)
    }

    /// Returns the node that clients are on.
    pub(crate) fn node(&self) -> &Node {
        &self.nodes[0]
    }

    /// Returns the names of all backends.
    pub(crate) fn names(&self) -> Vec<&str> {
        self.backends.iter().map(|pod| pod.name()).collect()
    }

    /// Returns the agent of the node that clients are on.
    pub(crate) fn agent(&mut self) -> &mut AgentProcess {
        &mut self.agents[0]
    }
}

/// Builds a cluster under load: from a pod and from outside packet by packet, from the host by its
/// sockets' calls.
pub(crate) fn under_load(
    name: &str,
    plan: &Plan,
    size: LoadSize,
) -> Result<(Cluster, LoadClients)> {
    let mut plan = plan.clone();
    plan.args.push("--socket-path=host");
    let cluster = Cluster::new(name, &plan)?;
    let load = load_of(&cluster, size)?;
    Ok((cluster, load))
}

/// Starts a load on a cluster's service `web`, by both families.
pub(crate) fn load_of(cluster: &Cluster, size: LoadSize) -> Result<LoadClients> {
    let echo = |vips: Pair| vips.map(|vip| SocketAddr::new(vip, ECHO)).to_vec();
    let places: [(&Namespace, _); 3] = [
        (&cluster.client, echo(cluster_ip(WEB))),
        (cluster.node(), echo(cluster_ip(WEB))),
        (&cluster.outside, echo(external_ip(WEB))),
    ];
    LoadClients::start(&places, size)
}

/// Routes an outside address to a node.
pub(crate) fn route_to(lab: &Lab, address: IpAddr, node: &Node) -> Result<()> {
    let length = if address.is_ipv4() { 32 } else { 128 };
    lab.router().route(&format!("{address}/{length}"), &[node])
}

/// Returns a service like `web` with the addresses of a number, without backends.
pub(crate) fn service(name: &str, number: u8) -> Service {
    let [cluster4, cluster6] = cluster_ip(number);
    let [external4, external6] = external_ip(number);
    Service::new(name)
        .cluster_ip(cluster4)
        .cluster_ip(cluster6)
        .load_balancer_ip(external4)
        .load_balancer_ip(external6)
        .port(Port::tcp("http", HTTP, HTTP_TARGET))
        .port(Port::udp("dns", DNS, DNS_TARGET))
        .port(Port::tcp("echo", ECHO, ECHO_TARGET))
        .port(Port::tcp("stream", STREAM, STREAM_TARGET))
}

/// Returns a process of a node as a backend: on the host network.
pub(crate) fn on_host(node: &Node) -> Backend {
    Backend::new(node.name(), node.name(), [node.ipv4().into(), node.ipv6().into()])
}

pub(crate) fn url(address: IpAddr, port: u16, path: &str) -> String {
    format!("http://{}/{path}", SocketAddr::new(address, port))
}

/// Checks that the answers came from exactly these backends, all of them, and with this source
/// address.
pub(crate) fn all_answer(
    what: &str,
    replies: &[Reply],
    names: &[&str],
    from: SocketAddr,
) -> Result<()> {
    let shares = Reply::shares(replies);
    let answered: BTreeSet<&str> = shares.keys().map(String::as_str).collect();
    ensure!(
        answered == names.iter().copied().collect(),
        "{what}: answers of {shares:?}, expected of {names:?}"
    );
    if let Some(reply) = replies.iter().find(|reply| reply.from != from) {
        bail!("{what}: an answer as from {}, not {from}: {reply:?}", reply.from);
    }
    Ok(())
}

/// Lets a namespace take its next ports from a range that it has not used lately, so that none
/// belongs to a flow of an earlier round in the maps. Other tests cover ports that clash. All lie
/// below those of masqueraded clients: the next agent would reserve what it finds of these.
pub(crate) fn take_fresh_ports(client: &Namespace) -> Result<()> {
    // The range is per namespace: one that others have used is as good as any.
    static ROUNDS: Mutex<BTreeMap<PathBuf, u16>> = Mutex::new(BTreeMap::new());
    let round = {
        let mut rounds = ROUNDS.lock().unwrap_or_else(PoisonError::into_inner);
        let round = rounds.entry(client.path().to_owned()).or_default();
        *round += 1;
        *round - 1
    };
    let first = 32_768 + round % 28 * 1_000;
    client.sysctl("net/ipv4/ip_local_port_range", &format!("{first} {}", first + 999))
}

/// Checks that a client reaches all backends by TCP, UDP and connected UDP at the addresses of both
/// families. The backends see it with the address `own` of the family, if one is given.
pub(crate) fn reaches(
    client: &Namespace,
    vips: Pair,
    names: &[&str],
    own: Option<Pair>,
) -> Result<()> {
    for (index, vip) in vips.into_iter().enumerate() {
        take_fresh_ports(client)?;
        let (http, dns) = (SocketAddr::new(vip, HTTP), SocketAddr::new(vip, DNS));
        let who = client.name();
        for way in ["TCP", "UDP", "connected UDP"] {
            let to = if way == "TCP" { http } else { dns };
            let what = format!("{who} {way} {to}");
            let replies = match way {
                "TCP" => client.http_get(&url(vip, HTTP, ""), ENOUGH),
                "UDP" => client.udp_ask(dns, ENOUGH),
                _ => client.udp_ask_connected(dns, ENOUGH),
            };
            let replies = replies.with_context(|| what.clone())?;
            all_answer(&what, &replies, names, to)?;
            if let Some(own) = own
                && let Some(reply) = replies.iter().find(|reply| reply.seen.ip() != own[index])
            {
                bail!("{what}: the backend saw {}, not {}", reply.seen, own[index]);
            }
        }
    }
    Ok(())
}

pub(crate) fn addresses_of_pod(pod: &Pod) -> Pair {
    [pod.ipv4().into(), pod.ipv6().into()]
}

pub(crate) fn addresses_of_node(node: &Node) -> Pair {
    [node.ipv4().into(), node.ipv6().into()]
}

pub(crate) fn addresses_of_client(client: &Client) -> Pair {
    [client.ipv4().into(), client.ipv6().into()]
}

/// Checks that a transfer of this many bytes arrives whole.
pub(crate) fn transfers(client: &Namespace, vip: IpAddr, bytes: u64) -> Result<()> {
    let what = format!("{} reads {bytes} bytes from {vip}", client.name());
    let events = client
        .ask(["http-client", "--url", &url(vip, HTTP, &format!("bytes/{bytes}"))])
        .with_context(|| what.clone())?;
    ensure!(received(&events) == Some(bytes), "{what}: {events:?}");
    Ok(())
}

/// Returns the number of bytes that a client reports at its end.
pub(crate) fn received(events: &[Event]) -> Option<u64> {
    events.iter().find_map(|event| match event {
        Event::Done { bytes, .. } => Some(*bytes),
        Event::Listening { .. }
        | Event::Connected { .. }
        | Event::Reply(_)
        | Event::Load(_)
        | Event::Lost { .. }
        | Event::Broken { .. } => None,
    })
}

/// Returns the answers among events; none may be lost.
pub(crate) fn replies(events: Vec<Event>) -> Result<Vec<Reply>> {
    let mut replies = Vec::new();
    for event in events {
        match event {
            Event::Reply(reply) => replies.push(reply),
            Event::Lost { .. } | Event::Broken { .. } => bail!("{event:?}"),
            Event::Listening { .. }
            | Event::Connected { .. }
            | Event::Load(_)
            | Event::Done { .. } => {}
        }
    }
    Ok(replies)
}

/// Returns the output of `sluice status -o json`, whether or not the agent is ready.
pub(crate) fn status(node: &Node) -> Result<Value> {
    let output = node.sluice_output(&["status", "-o", "json"])?;
    let status = serde_json::from_slice(&output.stdout).with_context(|| {
        format!("`sluice status` said {}", String::from_utf8_lossy(&output.stderr))
    })?;
    follows_the_schema(&status)?;
    Ok(status)
}

/// Fails if an answer is not as docs/schema.json says.
pub(crate) fn follows_the_schema(answer: &Value) -> Result<()> {
    sluice_lab::schema::check(&sluice::tools::api::schema(), answer).map_err(anyhow::Error::msg)
}

/// Returns the list that a subcommand prints with `-o json`.
pub(crate) fn listed(node: &Node, args: &[&str]) -> Result<Vec<Value>> {
    let args: Vec<&str> = args.iter().copied().chain(["-o", "json"]).collect();
    let context = || format!("sluice {}", args.join(" "));
    let mut list: Value = serde_json::from_str(&node.sluice(&args)?).with_context(context)?;
    follows_the_schema(&list).with_context(context)?;
    let items = list.get_mut("items").and_then(Value::as_array_mut).map(std::mem::take);
    items.with_context(context)
}

/// Returns a word of a JSON object.
pub(crate) fn word<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// Returns a number of a JSON object.
pub(crate) fn number(value: &Value, field: &str) -> u64 {
    value.get(field).and_then(Value::as_u64).unwrap_or_default()
}

/// The counters of a service, summed over its backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) flows: u64,
    pub(crate) calls: u64,
    pub(crate) forward: u64,
    pub(crate) reply: u64,
}

pub(crate) fn counted(node: &Node, service: &str) -> Result<Counted> {
    let mut sum = Counted::default();
    for backend in listed(node, &["backends", service])? {
        sum.flows += number(&backend, "flows");
        sum.calls += number(&backend, "calls");
        sum.forward += number(&backend, "forward_packets");
        sum.reply += number(&backend, "reply_packets");
    }
    Ok(sum)
}

/// Reports whether so many flows were counted: a few clients take a port again that a flow is known
/// of.
pub(crate) fn are_nearly(flows: u64, count: u32) -> bool {
    flows <= u64::from(count) && flows + 5 + u64::from(count) / 20 >= u64::from(count)
}

impl std::ops::Sub for Counted {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self {
            flows: self.flows - other.flows,
            calls: self.calls - other.calls,
            forward: self.forward - other.forward,
            reply: self.reply - other.reply,
        }
    }
}

/// Packets counted by reason on a node.
pub(crate) fn reasons(node: &Node) -> Result<BTreeMap<String, u64>> {
    let status = status(node)?;
    let all = status.get("reasons").and_then(Value::as_array).cloned().unwrap_or_default();
    Ok(all.iter().map(|row| (word(row, "reason").to_owned(), number(row, "packets"))).collect())
}

/// Returns the path at which a map of a node's agent is pinned.
pub(crate) fn pinned(node: &Node, map: &str) -> Result<PathBuf> {
    let pins = node.pin_path();
    let layouts = std::fs::read_dir(&pins).with_context(|| pins.display().to_string())?;
    layouts
        .flatten()
        .map(|layout| layout.path().join("maps").join(map))
        .find(|path| path.exists())
        .with_context(|| format!("{map} is not pinned below {}", pins.display()))
}

/// Deletes every entry of a map, and returns their number.
pub(crate) fn flush(node: &Node, map: &str) -> Result<usize> {
    change(node, map, "delete", &[])
}

/// Makes every entry of a map whose values are times as old as the machine, and returns their
/// number.
pub(crate) fn age(node: &Node, map: &str) -> Result<usize> {
    change(node, map, "update", &["value", "0", "0", "0", "0"])
}

fn change(node: &Node, map: &str, how: &str, value: &[&str]) -> Result<usize> {
    let path = pinned(node, map)?.display().to_string();
    let dump = node.run("bpftool", ["-j", "map", "dump", "pinned", &path])?;
    let entries: Vec<Value> = serde_json::from_str(&dump).with_context(|| dump.clone())?;
    for entry in &entries {
        let key = entry.get("key").and_then(Value::as_array).context("an entry without a key")?;
        let mut args = vec!["map", how, "pinned", &path, "key"];
        args.extend(key.iter().filter_map(Value::as_str).chain(value.iter().copied()));
        // Another process may have been quicker.
        let _ = node.output("bpftool", args)?;
    }
    Ok(entries.len())
}

/// Repeats a request until there is an answer.
///
/// # Errors
/// If there is none within [`SOON`], or asking fails.
pub(crate) fn until<T>(what: &str, ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    until_within(SOON, what, ask)
}

/// As [`until`], for at most so long.
pub(crate) fn until_within<T>(
    time: Duration,
    what: &str,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + time;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        ensure!(Instant::now() < deadline, "waited {time:?} in vain: {what}");
        // Most requests start processes, which slow other tests down.
        sleep(Duration::from_millis(50));
    }
}

/// Waits until a service has this many serving backends in each of its ports and families.
pub(crate) fn until_backends(node: &Node, service: &str, count: usize) -> Result<()> {
    until(&format!("{service} with {count} backends on {}", node.name()), || {
        let rows = listed(node, &["services"])?;
        let mut own = rows.iter().filter(|row| word(row, "service") == service).peekable();
        Ok((own.peek().is_some() && own.all(|row| number(row, "backends") == count as u64))
            .then_some(()))
    })
}

/// Checks that a client is answered whatever kind of socket it uses, `count` times by each of the
/// ways, which are a name and the client's arguments. Returns who answered at each of the ports
/// (TCP, UDP).
pub(crate) fn asks_by(
    client: &Namespace,
    ways: &[(&str, &[&str])],
    count: usize,
    address: IpAddr,
    ports: [u16; 2],
) -> Result<[BTreeSet<String>; 2]> {
    let mut names = [BTreeSet::new(), BTreeSet::new()];
    let count_arg = format!("--count={count}");
    for (way, args) in ways {
        let protocol = usize::from(args[0] != "tcp-client");
        let to = SocketAddr::new(address, ports[protocol]);
        let told = to.to_string();
        let more = [&*count_arg, "--interval-ms=0", "--timeout-ms=1000", "--to", &told];
        let events =
            client.ask(args.iter().chain(&more)).with_context(|| format!("{way} to {to}"))?;
        let replies = replies(events).with_context(|| format!("{way} to {to}"))?;
        ensure!(replies.len() == count, "{way} to {to}: {replies:?}");
        for reply in replies {
            ensure!(reply.from == to, "{way} to {to}: an answer as from {}", reply.from);
            let _ = names[protocol].insert(reply.name);
        }
    }
    Ok(names)
}
