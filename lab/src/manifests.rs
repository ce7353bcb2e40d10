//! A directory of Kubernetes objects for the agent's manifest source, written from short
//! descriptions of services.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::lab::Lab;
use crate::node::Pod;

/// The protocol of a service's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    fn word(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    name: String,
    protocol: Protocol,
    number: u16,
    target: u16,
    on_node: Option<u16>,
}

impl Port {
    /// Returns a port and the port of its backends.
    pub fn new(protocol: Protocol, name: &str, port: u16, target: u16) -> Self {
        Self { name: name.to_owned(), protocol, number: port, target, on_node: None }
    }

    /// Like [`Port::new`], for TCP.
    pub fn tcp(name: &str, port: u16, target: u16) -> Self {
        Self::new(Protocol::Tcp, name, port, target)
    }

    /// Like [`Port::new`], for UDP.
    pub fn udp(name: &str, port: u16, target: u16) -> Self {
        Self::new(Protocol::Udp, name, port, target)
    }

    /// Opens the port on every node too. This makes the service a `NodePort`, unless it is a
    /// `LoadBalancer`.
    #[must_use]
    pub fn node_port(mut self, node_port: u16) -> Self {
        self.on_node = Some(node_port);
        self
    }
}

/// An endpoint, ready by default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    name: String,
    node: String,
    addresses: Vec<IpAddr>,
    ready: bool,
    serving: bool,
    terminating: bool,
    hints: Option<String>,
}

impl Backend {
    /// Returns an endpoint with these addresses, at most one per family.
    pub fn new(name: &str, node: &str, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let addresses = addresses.into_iter().collect();
        Self {
            name: name.to_owned(),
            node: node.to_owned(),
            addresses,
            ready: true,
            serving: true,
            terminating: false,
            hints: None,
        }
    }

    /// Makes it neither ready nor serving, as while its readiness probe fails.
    #[must_use]
    pub fn not_ready(mut self) -> Self {
        (self.ready, self.serving) = (false, false);
        self
    }

    /// Makes it terminating but still serving: not ready for new connections.
    #[must_use]
    pub fn terminating(mut self) -> Self {
        (self.ready, self.serving, self.terminating) = (false, true, true);
        self
    }

    /// Adds a hint for clients in a zone.
    #[must_use]
    pub fn for_zone(mut self, zone: &str) -> Self {
        self.hints = Some(format!("{{forZones: [{{name: {zone}}}]}}"));
        self
    }

    /// Adds a hint for clients on a node, and one for a zone, for proxies that ignore hints for
    /// nodes.
    #[must_use]
    pub fn for_node(mut self, node: &str, zone: &str) -> Self {
        self.hints =
            Some(format!("{{forNodes: [{{name: {node}}}], forZones: [{{name: {zone}}}]}}"));
        self
    }
}

impl From<&Pod> for Backend {
    fn from(pod: &Pod) -> Self {
        Self::new(pod.name(), pod.node().name(), [pod.ipv4().into(), pod.ipv6().into()])
    }
}

/// A service with its endpoints, in the namespace `default` by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    name: String,
    namespace: String,
    created: Option<String>,
    annotations: Vec<(String, String)>,
    cluster_ips: Vec<IpAddr>,
    load_balancer_ips: Vec<IpAddr>,
    external_ips: Vec<IpAddr>,
    ports: Vec<Port>,
    backends: Vec<Backend>,
    spec: Vec<String>,
}

impl Service {
    /// Returns a service without addresses, ports or backends.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), namespace: "default".to_owned(), ..Self::default() }
    }

    /// Sets its namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// Sets its `creationTimestamp`, as `2026-01-31T12:00:00Z`.
    #[must_use]
    pub fn created(mut self, timestamp: &str) -> Self {
        self.created = Some(timestamp.to_owned());
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Adds a cluster address.
    #[must_use]
    pub fn cluster_ip(mut self, ip: impl Into<IpAddr>) -> Self {
        self.cluster_ips.push(ip.into());
        self
    }

    /// Adds an address of a load balancer, which makes the service a `LoadBalancer`.
    #[must_use]
    pub fn load_balancer_ip(mut self, ip: impl Into<IpAddr>) -> Self {
        self.load_balancer_ips.push(ip.into());
        self
    }

    /// Adds an external address.
    #[must_use]
    pub fn external_ip(mut self, ip: impl Into<IpAddr>) -> Self {
        self.external_ips.push(ip.into());
        self
    }

    /// Adds a port.
    #[must_use]
    pub fn port(mut self, port: Port) -> Self {
        self.ports.push(port);
        self
    }

    /// Replaces its backends by pods (`&pods`) or [`Backend`]s.
    #[must_use]
    pub fn backends(mut self, backends: impl IntoIterator<Item = impl Into<Backend>>) -> Self {
        self.backends = backends.into_iter().map(Into::into).collect();
        self
    }

    /// Adds a line of YAML to its `spec`: `externalTrafficPolicy: Local`.
    #[must_use]
    pub fn spec(mut self, line: &str) -> Self {
        self.spec.push(line.to_owned());
        self
    }

    fn file_name(&self) -> String {
        format!("{}-{}.yaml", self.namespace, self.name)
    }

    /// Returns the Service and one EndpointSlice per family of its addresses, as YAML documents.
    pub fn to_yaml(&self) -> String {
        let mut text = self.service_yaml();
        let of_family = |ipv6: bool| {
            let mut vips =
                self.cluster_ips.iter().chain(&self.load_balancer_ips).chain(&self.external_ips);
            vips.any(|ip| ip.is_ipv6() == ipv6)
        };
        for ipv6 in [false, true] {
            // A service that has only node ports takes the families of its backends.
            if of_family(ipv6) || !of_family(!ipv6) {
                text += "---\n";
                text += &self.slice_yaml(ipv6);
            }
        }
        text
    }

    fn service_yaml(&self) -> String {
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {}\n  namespace: {}\n",
            self.name, self.namespace
        );
        if let Some(created) = &self.created {
            line(&mut text, &format!("  creationTimestamp: \"{created}\""));
        }
        if !self.annotations.is_empty() {
            line(&mut text, "  annotations:");
        }
        for (key, value) in &self.annotations {
            line(&mut text, &format!("    {key}: {value:?}"));
        }
        let kind = if !self.load_balancer_ips.is_empty() {
            "LoadBalancer"
        } else if self.ports.iter().any(|port| port.on_node.is_some()) {
            "NodePort"
        } else {
            "ClusterIP"
        };
        line(&mut text, &format!("spec:\n  type: {kind}"));
        if let Some(first) = self.cluster_ips.first() {
            let families: Vec<&str> = self
                .cluster_ips
                .iter()
                .map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" })
                .collect();
            line(
                &mut text,
                &format!(
                    "  clusterIP: \"{first}\"\n  clusterIPs: {}\n  ipFamilies: [{}]",
                    list(&self.cluster_ips),
                    families.join(", ")
                ),
            );
        }
        if !self.external_ips.is_empty() {
            line(&mut text, &format!("  externalIPs: {}", list(&self.external_ips)));
        }
        for extra in &self.spec {
            line(&mut text, &format!("  {extra}"));
        }
        self.add_ports(&mut text);
        if !self.load_balancer_ips.is_empty() {
            line(&mut text, "status:\n  loadBalancer:\n    ingress:");
        }
        for ip in &self.load_balancer_ips {
            line(&mut text, &format!("    - ip: \"{ip}\""));
        }
        text
    }

    fn add_ports(&self, text: &mut String) {
        line(text, "  ports:");
        for port in &self.ports {
            let node_port =
                port.on_node.map(|port| format!(", nodePort: {port}")).unwrap_or_default();
            let (name, protocol) = (&port.name, port.protocol.word());
            line(
                text,
                &format!(
                    "  - {{name: {name}, protocol: {protocol}, port: {}, targetPort: {}{node_port}}}",
                    port.number, port.target
                ),
            );
        }
    }

    fn slice_yaml(&self, ipv6: bool) -> String {
        let family = if ipv6 { "IPv6" } else { "IPv4" };
        let mut text = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {}-{}\n  namespace: {}\n  \
             labels:\n    kubernetes.io/service-name: {}\naddressType: {family}\nports:\n",
            self.name,
            family.to_lowercase(),
            self.namespace,
            self.name
        );
        for port in &self.ports {
            line(
                &mut text,
                &format!(
                    "- {{name: {}, protocol: {}, port: {}}}",
                    port.name,
                    port.protocol.word(),
                    port.target
                ),
            );
        }
        let endpoints = self.backends.iter().filter_map(|backend| {
            let address = backend.addresses.iter().find(|address| address.is_ipv6() == ipv6)?;
            Some((backend, address))
        });
        text += "endpoints:";
        let before = text.len();
        for (Backend { name, node, ready, serving, terminating, hints, .. }, address) in endpoints {
            let _ = write!(
                text,
                "\n- addresses: [\"{address}\"]\n  nodeName: {node}\n  targetRef: {{kind: Pod, name: {name}, namespace: {}}}\n  \
                 conditions: {{ready: {ready}, serving: {serving}, terminating: {terminating}}}",
                self.namespace
            );
            if let Some(hints) = hints {
                let _ = write!(text, "\n  hints: {hints}");
            }
        }
        text += if text.len() == before { " []\n" } else { "\n" };
        text
    }
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

fn list(ips: &[IpAddr]) -> String {
    format!("[{}]", ips.iter().map(|ip| format!("\"{ip}\"")).collect::<Vec<_>>().join(", "))
}

/// A directory of manifests. Files change as a whole: they are written to another directory and
/// then renamed.
#[derive(Clone, Debug)]
pub struct Manifests {
    directory: PathBuf,
    beside: PathBuf,
}

impl Manifests {
    /// Makes the directory, unless it exists. It uses `<directory>.tmp` too.
    pub fn new(directory: &Path) -> Result<Self> {
        let beside = directory.with_added_extension("tmp");
        for directory in [directory, &beside] {
            fs::create_dir_all(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        Ok(Self { directory: directory.to_owned(), beside })
    }

    /// Returns the directory, for the agent's `--manifests`.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes a service and its endpoints, and replaces those of the same name.
    pub fn write(&self, service: &Service) -> Result<()> {
        self.write_text(&service.file_name(), &service.to_yaml())
    }

    /// Removes a service and its endpoints.
    pub fn remove(&self, service: &Service) -> Result<()> {
        let path = self.directory.join(service.file_name());
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// Writes any file, atomically.
    pub fn write_text(&self, name: &str, text: &str) -> Result<()> {
        let (from, to) = (self.beside.join(name), self.directory.join(name));
        fs::write(&from, text).with_context(|| format!("cannot write {}", from.display()))?;
        fs::rename(&from, &to)
            .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
    }
}

impl Lab {
    /// Makes a directory of manifests that is removed with the lab.
    pub fn manifests(&self, name: &str) -> Result<Manifests> {
        Manifests::new(&self.state().join(format!("manifests-{name}")))
    }
}

#[cfg(test)]
mod tests {
    use super::{Backend, Port, Service};

    #[test]
    fn a_service_reads_like_one_from_a_cluster() {
        let one = Backend::new(
            "a",
            "n1",
            ["10.244.1.10".parse().expect("v4"), "fd00:10:244:1::10".parse().expect("v6")],
        );
        let two = Backend::new("b", "n2", ["10.244.2.10".parse().expect("v4")]).terminating();
        let service = Service::new("web")
            .cluster_ip([10, 96, 0, 10])
            .load_balancer_ip([203, 0, 113, 10])
            .port(Port::tcp("http", 80, 8080).node_port(30_080))
            .spec("externalTrafficPolicy: Local")
            .backends([one, two]);
        let expected = r#"apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: default
spec:
  type: LoadBalancer
  clusterIP: "10.96.0.10"
  clusterIPs: ["10.96.0.10"]
  ipFamilies: [IPv4]
  externalTrafficPolicy: Local
  ports:
  - {name: http, protocol: TCP, port: 80, targetPort: 8080, nodePort: 30080}
status:
  loadBalancer:
    ingress:
    - ip: "203.0.113.10"
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-ipv4
  namespace: default
  labels:
    kubernetes.io/service-name: web
addressType: IPv4
ports:
- {name: http, protocol: TCP, port: 8080}
endpoints:
- addresses: ["10.244.1.10"]
  nodeName: n1
  targetRef: {kind: Pod, name: a, namespace: default}
  conditions: {ready: true, serving: true, terminating: false}
- addresses: ["10.244.2.10"]
  nodeName: n2
  targetRef: {kind: Pod, name: b, namespace: default}
  conditions: {ready: false, serving: true, terminating: true}
"#;
        assert_eq!(service.to_yaml(), expected);
        assert!(service.backends(Vec::<Backend>::new()).to_yaml().ends_with("endpoints: []\n"));
    }
}
