//! The agents that are compared, each on a node of its own of one lab.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use aya::programs::{ProgramFd, loaded_programs};
use sluice_lab::{
    AgentOptions, AgentProcess, Client, Lab, Node, NodeOptions, Pod, Port, RpFilter, Running,
    Serve, Service,
};

/// An external address whose endpoint is a pod of the same node.
pub(crate) const NEAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
/// An external address whose endpoint is a pod of another node.
pub(crate) const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 81);
/// The port of both.
pub(crate) const PORT: u16 = 80;
/// The node ports of both.
pub(crate) const NODE_PORTS: [u16; 2] = [30080, 30081];
/// The port of the endpoints.
pub(crate) const TARGET: u16 = 8080;

/// A node with an agent, a pod of it and a server there.
pub(crate) struct Subject {
    /// Its name in tables.
    pub(crate) name: String,
    pub(crate) node: Node,
    pub(crate) near: Pod,
    pub(crate) far: Ipv4Addr,
    programs: Vec<u32>,
    _agent: AgentProcess,
    _server: Running,
}

impl Subject {
    /// Returns a program of the agent's, by its name.
    pub(crate) fn program(&self, name: &str) -> Result<ProgramFd> {
        // The kernel keeps fifteen bytes of a name.
        let short = &name[..name.len().min(15)];
        for info in loaded_programs() {
            let Ok(info) = info else { continue };
            if self.programs.contains(&info.id()) && info.name_as_str() == Some(short) {
                return Ok(info.fd()?);
            }
        }
        anyhow::bail!("the agent {} has loaded no program {name}", self.name)
    }
}

/// The lab: a client outside, a node for each agent, and one without an agent for remote endpoints.
pub(crate) struct Bench {
    pub(crate) client: Client,
    pub(crate) subjects: Vec<Subject>,
    _far: (Node, Pod, Running),
    _lab: Lab,
}

fn ids() -> BTreeSet<u32> {
    loaded_programs().filter_map(Result::ok).map(|info| info.id()).collect()
}

impl Bench {
    /// Starts the agent under test and, if there is one, the other.
    pub(crate) fn start(against: Option<&PathBuf>) -> Result<Self> {
        let lab = Lab::new("bench")?;
        let options = NodeOptions { rp_filter: RpFilter::Off, ..NodeOptions::default() };
        let client = lab.client("client")?;
        let elsewhere = lab.node("elsewhere", &options)?;
        let far = elsewhere.pod("far")?;
        let far_server = far.serve(Serve::TcpEcho, TARGET)?;
        let mut subjects = Vec::new();
        let mut programs: Vec<(&str, Option<PathBuf>)> = vec![("this", None)];
        programs.extend(against.map(|path| ("other", Some(path.clone()))));
        for (name, program) in programs {
            let node = lab.node(name, &options)?;
            let near = node.pod(&format!("{name}-pod"))?;
            let server = near.serve(Serve::TcpEcho, TARGET)?;
            let manifests = lab.manifests(name)?;
            for (service, address, node_port, endpoint, cluster) in
                [("near", NEAR, NODE_PORTS[0], &near, 1), ("far", FAR, NODE_PORTS[1], &far, 2)]
            {
                manifests.write(
                    &Service::new(service)
                        .cluster_ip(IpAddr::from([10, 96, 0, cluster]))
                        .load_balancer_ip(address)
                        .port(Port::tcp("http", PORT, TARGET).node_port(node_port))
                        .backends([endpoint]),
                )?;
            }
            let before = ids();
            let mut agent = node.agent(AgentOptions {
                manifests: Some(manifests.directory().to_owned()),
                args: vec!["--xdp=generic".to_owned()],
                program,
                ..AgentOptions::default()
            })?;
            agent
                .wait_ready(Duration::from_secs(30))
                .with_context(|| format!("the agent `{name}`"))?;
            let programs = ids().difference(&before).copied().collect();
            subjects.push(Subject {
                name: name.to_owned(),
                node,
                near,
                far: far.ipv4(),
                programs,
                _agent: agent,
                _server: server,
            });
        }
        Ok(Self { client, subjects, _far: (elsewhere, far, far_server), _lab: lab })
    }
}
