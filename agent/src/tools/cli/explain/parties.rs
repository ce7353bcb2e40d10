//! Who speaks to whom: names instead of addresses, and clients that cannot be where they are said
//! to be.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, bail};
use sluice_common::abi::frontend;
use sluice_common::{V4, V6};
use sluice_core::image::{Image, Stack};
use sluice_core::model::object::{ObjectName, Protocol};

use super::Usage;
use crate::daemon::source::names::{Names, Pod};
use crate::node::view::{PortName, SERVICE_PREFIXES};
use crate::tools::explain::Client;

/// The source port of a client that is given without one.
const PORT: u16 = 40_000;

/// A client or destination, as the command line has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Party {
    /// An address and a port.
    Address(SocketAddr),
    /// `pod/NAME`, perhaps with its namespace and a port.
    Pod(ObjectName, Option<u16>),
    /// `node/NAME`, perhaps with a port: its own processes.
    Node(String, Option<u16>),
    /// `svc/NAME:PORT`.
    Service(String),
    /// `external`: a client outside of the cluster.
    External,
}

impl fmt::Display for Party {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(formatter, "{address}"),
            Self::Pod(name, _) => write!(formatter, "pod {name}"),
            Self::Node(name, _) => write!(formatter, "node {name}"),
            Self::Service(word) => write!(formatter, "Service {word}"),
            Self::External => write!(formatter, "an external client"),
        }
    }
}

/// What is expected of a client or destination.
const EXPECTED: &str = "expected ADDRESS:PORT ([ADDRESS]:PORT for IPv6), pod/[NAMESPACE/]NAME, \
                        node/NAME, svc/[NAMESPACE/]NAME[:PORT] or external";

impl Party {
    /// Parses a client or destination. Names without a namespace have this one.
    pub(super) fn parse(text: &str, namespace: Option<&str>) -> Result<Self, Usage> {
        if text == "external" {
            return Ok(Self::External);
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            if address.port() == 0 {
                return Err(Usage(format!("{text:?}: port 0 is not valid")));
            }
            return Ok(Self::Address(SocketAddr::new(address.ip().to_canonical(), address.port())));
        }
        let wrong = || Usage(format!("{text:?}: {EXPECTED}"));
        let prefixed = |prefixes: &[&str]| {
            prefixes
                .iter()
                .find_map(|prefix| text.strip_prefix(prefix))
                .filter(|name| !name.is_empty())
        };
        if let Some(word) = prefixed(&["pod/", "pods/", "po/"]) {
            let (name, port) = with_port(word).ok_or_else(wrong)?;
            let (namespace, name) =
                name.split_once('/').unwrap_or((namespace.unwrap_or("default"), name));
            return Ok(Self::Pod(ObjectName::new(namespace, name), port));
        }
        if let Some(word) = prefixed(&["node/", "nodes/", "no/"]) {
            let (name, port) = with_port(word).ok_or_else(wrong)?;
            return Ok(Self::Node(name.to_owned(), port));
        }
        let plain = prefixed(&SERVICE_PREFIXES);
        let word = plain.unwrap_or(text);
        let is_name = |word: &str| {
            word.starts_with(|letter: char| letter.is_ascii_alphabetic())
                && word
                    .chars()
                    .all(|letter| letter.is_ascii_alphanumeric() || "-./:".contains(letter))
        };
        // Without the prefix only the port shows that it is a Service.
        if !is_name(word) || plain.is_none() && word.matches(':').count() != 1 {
            return Err(wrong());
        }
        Ok(Self::Service(match namespace {
            Some(namespace) if !word.contains('/') => format!("{namespace}/{word}"),
            Some(_) | None => word.to_owned(),
        }))
    }

    /// Whether it is a name that the maps do not have.
    pub(super) fn needs_names(&self) -> bool {
        matches!(self, Self::Pod(..) | Self::Node(..))
    }
}

/// Splits a name from the port after it.
fn with_port(word: &str) -> Option<(&str, Option<u16>)> {
    match word.split_once(':') {
        None => Some((word, None)),
        Some((name, port)) => {
            port.parse().ok().filter(|port| *port != 0).map(|port| (name, Some(port)))
        }
    }
}

/// A client and its destination as addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Resolved {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) protocol: Option<Protocol>,
    /// The kind of client, if its name shows it.
    pub(super) from: Option<Client>,
}

/// What names are resolved by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Directory<'a> {
    pub(super) names: &'a Names,
    pub(super) image: &'a Image,
    /// This node's name; empty if it is not known.
    pub(super) node: &'a str,
}

impl Directory<'_> {
    /// Returns the addresses behind a client and its destination, of one family.
    ///
    /// # Errors
    ///
    /// When a name is not known or names several things, or the client is not on this node.
    pub(super) fn resolve(
        &self,
        source: &Party,
        destination: &Party,
        protocol: Option<Protocol>,
    ) -> anyhow::Result<Resolved> {
        let targets = self.targets(destination, protocol)?;
        let (clients, from) = self.clients(source)?;
        for target in &targets {
            let of_family = |client: &&SocketAddr| client.is_ipv4() == target.address.is_ipv4();
            if let Some(client) = clients.iter().find(of_family) {
                return Ok(Resolved {
                    source: *client,
                    destination: target.address,
                    protocol: target.protocol.or(protocol),
                    from,
                });
            }
        }
        bail!(Usage(format!("{source} and {destination} have no addresses of one family")))
    }

    /// Returns the addresses of a client, and its kind if that is known.
    fn clients(&self, party: &Party) -> anyhow::Result<(Vec<SocketAddr>, Option<Client>)> {
        match party {
            Party::Address(address) => Ok((vec![*address], None)),
            Party::Pod(name, port) => {
                let pod = self.pod(name)?;
                if let Some(node) = pod.node.as_deref().filter(|node| *node != self.node) {
                    bail!(
                        "pod {name} runs on node {node}, whose own maps decide about its packets: \
                         ask there (with --manifests: --node {node})"
                    );
                }
                let from = if pod.is_on_host { Client::Host } else { Client::Pod };
                let port = port.unwrap_or(PORT);
                let addresses = pod.addresses.iter().map(|ip| SocketAddr::new(*ip, port));
                Ok((addresses.collect(), Some(from)))
            }
            Party::Node(name, port) => {
                let node = self.names.node(name);
                let node = node.with_context(|| format!("no source knows a node {name:?}"))?;
                let from = if name == self.node { Client::Host } else { Client::External };
                let port = port.unwrap_or(PORT);
                let addresses = node.addresses.iter().map(|ip| SocketAddr::new(*ip, port));
                Ok((addresses.collect(), Some(from)))
            }
            Party::External => {
                // Documentation's networks: nobody has these addresses.
                let addresses: [IpAddr; 2] = [
                    Ipv4Addr::new(203, 0, 113, 7).into(),
                    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7).into(),
                ];
                let addresses = addresses.map(|address| SocketAddr::new(address, PORT));
                Ok((addresses.to_vec(), Some(Client::External)))
            }
            Party::Service(word) => {
                bail!(Usage(format!("Service {word} is no client: a pod, a node or external is")))
            }
        }
    }

    fn pod(&self, name: &ObjectName) -> anyhow::Result<&Pod> {
        self.names.pod_named(name).with_context(|| {
            if self.names.has_pods() {
                format!("there is no pod {name}")
            } else {
                format!(
                    "no source names a pod {name}: EndpointSlices name only pods that are \
                     endpoints; give --kubeconfig FILE, or --manifests with a dump that has Pods, \
                     or its address"
                )
            }
        })
    }

    /// Returns the addresses of a destination.
    fn targets(&self, party: &Party, protocol: Option<Protocol>) -> anyhow::Result<Vec<Target>> {
        let all = |addresses: Vec<IpAddr>, port: Option<u16>| {
            let port = port.with_context(|| {
                Usage(format!("{party} needs a port as a destination, such as NAME:80"))
            })?;
            let target = |ip| Target { address: SocketAddr::new(ip, port), protocol: None };
            anyhow::Ok(addresses.into_iter().map(target).collect())
        };
        match party {
            Party::Address(address) => Ok(vec![Target { address: *address, protocol: None }]),
            Party::Pod(name, port) => {
                all(self.pod(name)?.addresses.iter().copied().collect(), *port)
            }
            Party::Node(name, port) => {
                let node = self.names.node(name);
                let node = node.with_context(|| format!("no source knows a node {name:?}"))?;
                all(node.addresses.clone(), *port)
            }
            Party::Service(word) => self.service(word, protocol),
            Party::External => bail!(Usage("external is a client, and no destination".to_owned())),
        }
    }

    /// Returns the frontends of a Service's port: ClusterIPs first.
    fn service(&self, word: &str, protocol: Option<Protocol>) -> anyhow::Result<Vec<Target>> {
        let names = self.image.names.iter().map(|(id, name)| (*id, PortName::from(name)));
        let named: Vec<(u32, PortName)> = names
            .filter(|(_, name)| name.is(word))
            .filter(|(_, name)| protocol.is_none_or(|wanted| wanted.word() == name.protocol))
            .collect();
        let mut ports: Vec<String> =
            named.iter().map(|(_, name)| format!("{name} {}", name.protocol)).collect();
        ports.sort();
        ports.dedup();
        match &ports[..] {
            [] => bail!("no Service {word:?} is served here: `sluice services -o name` lists all"),
            [_] => {}
            several => bail!(Usage(format!(
                "{word} may be any of {}: name one (its protocol goes before the client)",
                several.join(", ")
            ))),
        }
        let mut targets = Vec::new();
        for (id, name) in &named {
            let protocol = Protocol::from_word(&name.protocol);
            targets.extend(frontends::<V4>(self.image, *id).map(|(rank, at)| (rank, at, protocol)));
            targets.extend(frontends::<V6>(self.image, *id).map(|(rank, at)| (rank, at, protocol)));
        }
        targets.sort();
        if targets.is_empty() {
            bail!("Service {word} has no address that is served here");
        }
        let target = |(_, address, protocol)| Target { address, protocol };
        Ok(targets.into_iter().map(target).collect())
    }

    /// Refuses a client that cannot be what it is said to be.
    ///
    /// # Errors
    ///
    /// Says whose address it is.
    pub(super) fn check(&self, client: IpAddr, from: Client) -> anyhow::Result<()> {
        let pod = self.names.pod(client).filter(|pod| !pod.is_on_host);
        let away =
            |pod: &Pod| pod.node.clone().filter(|node| !self.node.is_empty() && node != self.node);
        if let Some(pod) = pod {
            match (from, away(pod)) {
                (Client::Pod | Client::Host, Some(node)) => bail!(
                    "{client} is pod {} of node {node}, whose own maps decide about its packets: \
                     ask there (with --manifests: --node {node})",
                    pod.name
                ),
                (Client::Host | Client::External, None) if pod.node.is_some() => bail!(Usage(
                    format!("{client} is pod {} of this node: ask with --from pod", pod.name)
                )),
                _ => return Ok(()),
            }
        }
        let other = |node: &str| !self.node.is_empty() && node != self.node;
        match (from, self.names.node_of(client)) {
            (Client::Pod, Some((node, false))) | (Client::Host, Some((node, _))) if other(node) => {
                bail!(
                    "{client} belongs to node {node}, whose own maps decide about its packets: ask \
                     there (with --manifests: --node {node})"
                )
            }
            (Client::Pod, Some((node, true))) => bail!(Usage(format!(
                "{client} is an address of node {node}, and no pod's: ask with --from {}",
                if other(node) { "external" } else { "host" }
            ))),
            (Client::Pod, _) if self.names.has_pods() => {
                bail!("no pod has the address {client}; `kubectl get pods -A -o wide` lists them")
            }
            _ => Ok(()),
        }
    }

    /// Returns what an address is, if the sources know it.
    pub(super) fn kind_of(&self, client: IpAddr) -> Option<Client> {
        if let Some(pod) = self.names.pod(client).filter(|pod| !pod.is_on_host) {
            let is_here = pod.node.as_deref() == Some(self.node);
            return Some(if is_here { Client::Pod } else { Client::External });
        }
        let (node, is_own) = self.names.node_of(client)?;
        match (node == self.node, is_own) {
            (true, true) => Some(Client::Host),
            (true, false) => Some(Client::Pod),
            (false, _) => Some(Client::External),
        }
    }
}

/// An address of a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    address: SocketAddr,
    protocol: Option<Protocol>,
}

/// Returns the frontends of a service port with an address of their own, by rank.
fn frontends<F: Stack>(image: &Image, id: u32) -> impl Iterator<Item = (u32, SocketAddr)> {
    let all = F::of(image).services.iter().filter(move |(_, found)| found.service_port == id);
    let all = all.filter(|(key, found)| found.kind != frontend::NODE_PORT && key.port != 0);
    all.map(|(key, found)| (found.kind, SocketAddr::new(F::ip(key.address), key.port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_and_destinations_are_addresses_or_names() {
        let parse = |text: &str| Party::parse(text, None);
        let at = |text: &str| Party::Address(text.parse().expect("an address"));
        assert_eq!(parse("10.0.0.1:80"), Ok(at("10.0.0.1:80")));
        assert_eq!(parse("[::ffff:10.0.0.1]:80"), Ok(at("10.0.0.1:80")));
        assert_eq!(parse("[2001:db8::1]:80"), Ok(at("[2001:db8::1]:80")));
        assert_eq!(parse("pod/a"), Ok(Party::Pod(ObjectName::new("default", "a"), None)));
        assert_eq!(parse("pod/shop/a:7"), Ok(Party::Pod(ObjectName::new("shop", "a"), Some(7))));
        assert_eq!(
            Party::parse("pod/a", Some("shop")),
            Ok(Party::Pod(ObjectName::new("shop", "a"), None))
        );
        assert_eq!(parse("node/n1:30080"), Ok(Party::Node("n1".to_owned(), Some(30_080))));
        assert_eq!(parse("svc/web"), Ok(Party::Service("web".to_owned())));
        assert_eq!(parse("shop/web:http"), Ok(Party::Service("shop/web:http".to_owned())));
        assert_eq!(
            Party::parse("svc/web:80", Some("shop")),
            Ok(Party::Service("shop/web:80".to_owned()))
        );
        assert_eq!(parse("external"), Ok(Party::External));
        for text in [
            "10.0.0.1",
            "2001:db8::1:80",
            "web",
            "10.0.0.1:0",
            "10.0.0.1:65536",
            "",
            "pod/",
            "pod/a:x",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }
}
