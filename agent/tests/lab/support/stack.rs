//! A node whose own netfilter rules and routes decide about Services' packets, served by Sluice or,
//! as the control, by the rules that kube-proxy would have.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sluice_lab::{
    AgentOptions, AgentProcess, Backend, Client, Event, Lab, Manifests, Namespace, Node,
    NodeOptions, Overlay, Pod, Port, Reply, Running, Serve, Service,
};

use crate::support::{
    DNS, DNS_TARGET, ECHO, ECHO_TARGET, HTTP, HTTP_TARGET, Pair, SOON, addresses_of_client,
    addresses_of_node, addresses_of_pod, cluster_ip, number, route_to, take_fresh_ports, word,
};

/// The wait for an answer that has to come.
const PATIENCE: Duration = Duration::from_secs(3);
/// The wait for an answer that must not come.
const LOST_AFTER: Duration = Duration::from_millis(350);

/// The networks of all pods.
pub(crate) const POD_NETWORKS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

/// The clients of ClusterIPs that a proxy masquerades. Those of node ports always are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClusterIps {
    Kept,
    /// All clients that are no pods.
    Outside,
    All,
}

/// A choice of flags, and kube-proxy's rules for the same choice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    pub(crate) name: &'static str,
    pub(crate) args: &'static [&'static str],
    pub(crate) cluster_ips: ClusterIps,
}

/// Every way to choose the masqueraded clients.
pub(crate) const MODES: [Mode; 5] = [
    Mode { name: "default", args: &[], cluster_ips: ClusterIps::Kept },
    Mode {
        name: "--masquerade=kube-proxy",
        args: &["--masquerade=kube-proxy"],
        cluster_ips: ClusterIps::Kept,
    },
    Mode { name: "--masquerade=all", args: &["--masquerade=all"], cluster_ips: ClusterIps::All },
    Mode {
        name: "--cluster-cidr",
        args: &["--cluster-cidr=10.244.0.0/16,fd00:10:244::/48"],
        cluster_ips: ClusterIps::Outside,
    },
    Mode {
        name: "--masquerade=kube-proxy --cluster-cidr",
        args: &["--masquerade=kube-proxy", "--cluster-cidr=10.244.0.0/16,fd00:10:244::/48"],
        cluster_ips: ClusterIps::Outside,
    },
];

/// The proxy that serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proxy {
    /// The rules that kube-proxy would have, as the control.
    Netfilter,
    Sluice,
}

/// A Service with one endpoint: its addresses are those of the number, its node ports begin with
/// the number's.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) number: u8,
    pub(crate) backend: Backend,
    pub(crate) addresses: Pair,
    /// Whether `externalTrafficPolicy` is `Local`.
    pub(crate) is_local: bool,
}

/// A kind of conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// A connection with some lines.
    Tcp,
    /// Some datagrams from one socket.
    Udp,
    /// A few hundred kilobytes from the endpoint.
    Http,
    /// Datagrams of 8 KB with answers of the same size. The first ones may be lost if they show a
    /// client of IPv6 the MTU of its path.
    Large,
}

impl Way {
    fn port(self) -> u16 {
        match self {
            Self::Tcp => ECHO,
            Self::Udp | Self::Large => DNS,
            Self::Http => HTTP,
        }
    }

    fn target(self) -> u16 {
        match self {
            Self::Tcp => ECHO_TARGET,
            Self::Udp | Self::Large => DNS_TARGET,
            Self::Http => HTTP_TARGET,
        }
    }
}

impl Target {
    pub(crate) fn of_pod(name: &'static str, number: u8, pod: &Pod) -> Self {
        Self {
            name,
            number,
            backend: pod.into(),
            addresses: addresses_of_pod(pod),
            is_local: false,
        }
    }

    /// Returns the node port that leads to a port of the Service.
    pub(crate) fn node_port(&self, port: u16) -> u16 {
        30_000 + u16::from(self.number) * 100 + port
    }

    pub(crate) fn service(&self) -> Service {
        let [cluster4, cluster6] = cluster_ip(self.number);
        let service = Service::new(self.name)
            .cluster_ip(cluster4)
            .cluster_ip(cluster6)
            .port(Port::tcp("echo", ECHO, ECHO_TARGET).node_port(self.node_port(ECHO)))
            .port(Port::tcp("http", HTTP, HTTP_TARGET).node_port(self.node_port(HTTP)))
            .port(Port::udp("dns", DNS, DNS_TARGET).node_port(self.node_port(DNS)))
            .backends([self.backend.clone()]);
        if self.is_local { service.spec("externalTrafficPolicy: Local") } else { service }
    }

    /// Returns the target of a kind of request by the ClusterIP.
    pub(crate) fn by_cluster_ip(&self, way: Way, family: usize) -> SocketAddr {
        SocketAddr::new(cluster_ip(self.number)[family], way.port())
    }

    /// Returns the target of a kind of request by the node port of a node with these addresses.
    pub(crate) fn by_node_port(&self, node: Pair, way: Way, family: usize) -> SocketAddr {
        SocketAddr::new(node[family], self.node_port(way.port()))
    }

    /// Returns what kube-proxy's nat chain would have for the Service.
    fn rules(&self, node: Pair, cluster_ips: ClusterIps) -> String {
        const MARK: &str = "meta mark set mark or 0x4000";
        let mut text = String::new();
        for (family, ip) in ["ip", "ip6"].into_iter().enumerate() {
            for (way, protocol) in [(Way::Tcp, "tcp"), (Way::Http, "tcp"), (Way::Udp, "udp")] {
                let to = SocketAddr::new(self.addresses[family], way.target());
                let at = |to: SocketAddr| {
                    format!("{ip} daddr {} {protocol} dport {}", to.ip(), to.port())
                };
                let (inside, outside) =
                    (at(self.by_cluster_ip(way, family)), at(self.by_node_port(node, way, family)));
                let mut rule = |rule: String| text += &(rule + "\n");
                match cluster_ips {
                    ClusterIps::Kept => {}
                    ClusterIps::Outside => {
                        rule(format!("{inside} {ip} saddr != {} {MARK}", POD_NETWORKS[family]));
                    }
                    ClusterIps::All => rule(format!("{inside} {MARK}")),
                }
                rule(format!("{inside} dnat {ip} to {to}"));
                if !self.is_local {
                    rule(format!("{outside} {MARK}"));
                }
                rule(format!("{outside} dnat {ip} to {to}"));
            }
        }
        text
    }
}

/// A request, and whether it has to be answered.
pub(crate) struct Question<'a> {
    pub(crate) client: &'a Namespace,
    pub(crate) way: Way,
    pub(crate) to: SocketAddr,
    /// The endpoint's name.
    pub(crate) name: &'a str,
    pub(crate) is_answered: bool,
    /// The address at which the endpoint sees the client, if that matters.
    pub(crate) seen: Option<IpAddr>,
}

impl<'a> Question<'a> {
    /// Creates a request that has to be answered.
    pub(crate) fn new(client: &'a Namespace, way: Way, to: SocketAddr, name: &'a str) -> Self {
        Self { client, way, to, name, is_answered: true, seen: None }
    }
}

/// A node with two pods, of which one serves, an endpoint on another node, and a client outside.
pub(crate) struct Stack {
    agent: Option<AgentProcess>,
    pub(crate) node: Node,
    /// The addresses at which the node serves node ports.
    pub(crate) addresses: Pair,
    pub(crate) other: Node,
    pub(crate) pod: Pod,
    pub(crate) outside: Client,
    pub(crate) targets: Vec<Target>,
    pub(crate) near: Pod,
    pub(crate) far: Pod,
    pub(crate) manifests: Manifests,
    pub(crate) servers: Vec<Running>,
    pub(crate) lab: Lab,
}

/// The first targets of a [`Stack`]: on the node, and on the other one.
pub(crate) const NEAR: usize = 0;
pub(crate) const FAR: usize = 1;

impl Stack {
    /// Builds it with two targets: `near` on the node, and `far` on the other one.
    pub(crate) fn new(name: &str, overlay: Overlay, options: &NodeOptions) -> Result<Self> {
        let lab = Lab::with_overlay(name, overlay)?;
        let node = lab.node("n1", options)?;
        let other = lab.node("n2", &NodeOptions { nft: None, ..options.clone() })?;
        let (pod, near, far) = (node.pod("pod")?, node.pod("near")?, other.pod("far")?);
        let outside = lab.client("outside")?;
        let targets = vec![Target::of_pod("near", 10, &near), Target::of_pod("far", 20, &far)];
        let manifests = lab.manifests("cluster")?;
        let mut this = Self {
            agent: None,
            addresses: addresses_of_node(&node),
            node,
            other,
            pod,
            outside,
            targets,
            near,
            far,
            manifests,
            servers: Vec::new(),
            lab,
        };
        for pod in [this.near.clone(), this.far.clone()] {
            this.serve(&pod)?;
        }
        for target in this.targets.clone() {
            this.publish(&target)?;
        }
        Ok(this)
    }

    /// Starts the servers of a target in a namespace.
    pub(crate) fn serve(&mut self, namespace: &Namespace) -> Result<()> {
        for (what, port) in [
            (Serve::TcpEcho, ECHO_TARGET),
            (Serve::UdpEcho, DNS_TARGET),
            (Serve::Http, HTTP_TARGET),
        ] {
            self.servers.push(namespace.serve(what, port)?);
        }
        Ok(())
    }

    /// Writes a target's Service, and routes its ClusterIP from outside to the node.
    pub(crate) fn publish(&self, target: &Target) -> Result<()> {
        for address in cluster_ip(target.number) {
            route_to(&self.lab, address, &self.node)?;
        }
        self.manifests.write(&target.service())
    }

    /// Makes a proxy serve with the flags of a mode. The control comes before the first agent,
    /// whose programs stay.
    pub(crate) fn serve_by(
        &mut self,
        proxy: Proxy,
        args: &[&str],
        cluster_ips: ClusterIps,
    ) -> Result<()> {
        match proxy {
            Proxy::Netfilter => {
                ensure!(
                    self.agent.is_none(),
                    "a control after an agent shows the agent's programs too"
                );
                self.node.nft(&kube_proxy(self.addresses, &self.targets, cluster_ips))?;
            }
            Proxy::Sluice => {
                self.without_netfilter()?;
                if let Some(mut agent) = self.agent.take() {
                    agent.stop()?;
                }
                let options = AgentOptions {
                    manifests: Some(self.manifests.directory().to_owned()),
                    args: args.iter().map(|arg| (*arg).to_owned()).collect(),
                    ..AgentOptions::default()
                };
                self.agent.insert(self.node.agent(options)?).wait_ready(3 * SOON)?;
            }
        }
        self.fresh_ports()
    }

    /// Removes the control's rules.
    pub(crate) fn without_netfilter(&self) -> Result<()> {
        self.node.nft("table inet kube-proxy\ndelete table inet kube-proxy\n")
    }

    /// Lets the clients take ports that no earlier conversation has used.
    pub(crate) fn fresh_ports(&self) -> Result<()> {
        take_fresh_ports(&self.pod)?;
        take_fresh_ports(&self.outside)
    }

    /// Returns the addresses of the two clients: the pod, and the one outside.
    pub(crate) fn clients(&self) -> [(&Namespace, Pair); 2] {
        [
            (&self.pod, addresses_of_pod(&self.pod)),
            (&self.outside, addresses_of_client(&self.outside)),
        ]
    }

    /// Returns the questions of both clients at both frontends of the targets, in both families. A
    /// client outside reaches a far endpoint by a ClusterIP only where it is masqueraded: the way
    /// back leaves the node out otherwise.
    pub(crate) fn questions(&self, ways: &[Way], cluster_ips: ClusterIps) -> Vec<Question<'_>> {
        let mut questions = Vec::new();
        for target in &self.targets {
            for (client, _) in self.clients() {
                for family in 0..2 {
                    for way in ways.iter().copied() {
                        let mut ask = |to| {
                            questions.push(Question::new(client, way, to, target.name));
                        };
                        ask(target.by_node_port(self.addresses, way, family));
                        let returns = target.name != "far"
                            || client.name() != "outside"
                            || cluster_ips != ClusterIps::Kept;
                        if returns {
                            ask(target.by_cluster_ip(way, family));
                        }
                    }
                }
            }
        }
        questions
    }
}

/// Returns the nat rules that kube-proxy would have for some targets.
pub(crate) fn kube_proxy(node: Pair, targets: &[Target], cluster_ips: ClusterIps) -> String {
    let mut services = String::new();
    let mut hairpins = String::new();
    for target in targets {
        services += &target.rules(node, cluster_ips);
        let [v4, v6] = target.addresses;
        let _ = write!(
            hairpins,
            "ip saddr {v4} ip daddr {v4} masquerade\nip6 saddr {v6} ip6 daddr {v6} masquerade\n"
        );
    }
    format!(
        "table inet kube-proxy\ndelete table inet kube-proxy\n\
         table inet kube-proxy {{
            chain services {{
                {services}
            }}
            chain prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
            chain output {{ type nat hook output priority -100; jump services; }}
            chain postrouting {{
                type nat hook postrouting priority srcnat;
                meta mark & 0x4000 == 0x4000 meta mark set mark and 0xffffbfff masquerade
                {hairpins}
            }}
        }}\n"
    )
}

/// Sends all requests at once, and returns what differed from the expectation.
pub(crate) fn ask_all(questions: &[Question<'_>]) -> Result<Vec<String>> {
    let mut clients = Vec::new();
    for question in questions {
        let patience = if question.is_answered { PATIENCE } else { LOST_AFTER };
        let timeout = format!("--timeout-ms={}", patience.as_millis());
        let to = format!("--to={}", question.to);
        let url = format!("--url=http://{}/bytes/300000", question.to);
        let args: &[&str] = match question.way {
            Way::Tcp => &["tcp-client", "--count=4", "--interval-ms=0", &timeout, &to],
            Way::Udp if question.is_answered => &["udp-client", "--count=2", &timeout, &to],
            Way::Udp => &["udp-client", "--count=1", &timeout, &to],
            Way::Http => &["http-client", "--count=1", &timeout, &url],
            Way::Large => &["udp-client", "--count=3", "--size=8000", &timeout, &to],
        };
        clients.push(question.client.tool(args)?);
    }
    let mut wrong = Vec::new();
    for (question, mut client) in questions.iter().zip(clients) {
        // Each of several datagrams may take its time.
        let _ = client.wait(5 * PATIENCE)?;
        let events = client.events();
        let lost = events.iter().find_map(|event| match event {
            Event::Lost { reason, .. } | Event::Broken { reason, .. } => Some(reason.clone()),
            Event::Listening { .. }
            | Event::Connected { .. }
            | Event::Reply(_)
            | Event::Load(_)
            | Event::Done { .. } => None,
        });
        let what = format!(
            "{} by {:?} at {} ({})",
            question.client.name(),
            question.way,
            question.to,
            question.name
        );
        let may_lose = question.way == Way::Large && !replies(&events).is_empty();
        match (question.is_answered, lost) {
            (true, Some(reason)) if !may_lose => wrong.push(format!("{what}: {reason}")),
            (false, None) => wrong.push(format!("{what}: answered, though it should be lost")),
            (false, Some(reason)) if reason.contains("refused") => {
                wrong.push(format!("{what}: {reason}"));
            }
            _ => {}
        }
        for reply in replies(&events) {
            if reply.from != question.to || reply.name != question.name {
                wrong.push(format!("{what}: answered by {} as from {}", reply.name, reply.from));
            }
            if question.seen.is_some_and(|seen| seen != reply.seen.ip()) {
                wrong.push(format!("{what}: the endpoint saw {}", reply.seen));
            }
        }
        ensure!(!events.is_empty(), "{what}: the client failed: {}", client.stderr());
    }
    Ok(wrong)
}

/// Returns the answers among events.
pub(crate) fn replies(events: &[Event]) -> Vec<&Reply> {
    events
        .iter()
        .filter_map(|event| if let Event::Reply(reply) = event { Some(reply) } else { None })
        .collect()
}

/// Loads a table in place of the one of that name.
pub(crate) fn replace_table(node: &Namespace, name: &str, content: &str) -> Result<()> {
    node.nft(&format!(
        "table inet {name}\ndelete table inet {name}\ntable inet {name} {{\n{content}\n}}\n"
    ))
}

/// Returns the packets of a table's named counters.
pub(crate) fn counters(node: &Namespace, table: &str) -> Result<BTreeMap<String, u64>> {
    let text = node.run("nft", ["-j", "list", "counters", "table", "inet", table])?;
    let listed: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let rows = listed.get("nftables").and_then(Value::as_array).cloned().unwrap_or_default();
    let counters = rows.iter().filter_map(|row| row.get("counter"));
    Ok(counters.map(|row| (word(row, "name").to_owned(), number(row, "packets"))).collect())
}

/// Fails with everything that went wrong, or with nothing.
pub(crate) fn none_wrong(what: &str, wrong: &[String]) -> Result<()> {
    const TOLD: usize = 60;
    if wrong.is_empty() {
        println!("{what}: as it has to be");
        return Ok(());
    }
    let told = wrong.get(..TOLD).unwrap_or(wrong).join("\n  ");
    bail!(
        "{what}: {} wrong:\n  {told}{}",
        wrong.len(),
        if wrong.len() > TOLD { "\n  ..." } else { "" }
    )
}
