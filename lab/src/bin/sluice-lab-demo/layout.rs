//! The cluster that the demo runs on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use sluice_lab::{Client, Lab, Manifests, Node, NodeOptions, Pod, Port, Running, Serve, Service};

/// Ports of the service.
pub(crate) const HTTP: u16 = 80;
pub(crate) const DNS: u16 = 53;
pub(crate) const ECHO: u16 = 7;

/// Returns the service's addresses inside the cluster, v4 and v6.
pub(crate) fn cluster_ips() -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 96, 0, 10).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10).into(),
    ]
}

/// Returns the service's addresses for the outside.
pub(crate) fn load_balancer_ips() -> [IpAddr; 2] {
    [
        Ipv4Addr::new(203, 0, 113, 10).into(),
        Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 0x10).into(),
    ]
}

/// The layout: one node, a client pod, three backend pods, a client outside.
pub(crate) struct Layout {
    pub(crate) node: Node,
    pub(crate) manifests: Manifests,
    client_pod: Pod,
    outside: Client,
    backends: [Pod; 3],
    _servers: Vec<Running>,
}

impl Layout {
    pub(crate) fn build(lab: &Lab) -> Result<Self> {
        let node = lab.node("n1", &NodeOptions::default())?;
        let backends = [node.pod("web-1")?, node.pod("web-2")?, node.pod("web-3")?];
        let (client_pod, outside) = (node.pod("client")?, lab.client("outside")?);
        let mut servers = Vec::new();
        for pod in &backends {
            servers.push(pod.serve(Serve::Http, 8080)?);
            servers.push(pod.serve(Serve::UdpEcho, 5353)?);
            servers.push(pod.serve(Serve::TcpEcho, 7000)?);
        }
        for ip in load_balancer_ips() {
            lab.router()
                .route(&format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }), &[&node])?;
        }
        let layout = Self {
            manifests: lab.manifests("demo")?,
            node,
            client_pod,
            outside,
            backends,
            _servers: servers,
        };
        layout.write_service(true)?;
        Ok(layout)
    }

    /// Writes the service with all its backends, or without the leaving one.
    pub(crate) fn write_service(&self, all: bool) -> Result<()> {
        let [cluster4, cluster6] = cluster_ips();
        let [outside4, outside6] = load_balancer_ips();
        let service = Service::new("web")
            .cluster_ip(cluster4)
            .cluster_ip(cluster6)
            .load_balancer_ip(outside4)
            .load_balancer_ip(outside6)
            .port(Port::tcp("http", HTTP, 8080))
            .port(Port::udp("dns", DNS, 5353))
            .port(Port::tcp("echo", ECHO, 7000))
            .backends(self.backends.iter().take(if all { 3 } else { 2 }));
        self.manifests.write(&service)
    }

    pub(crate) fn client_pod(&self) -> &Pod {
        &self.client_pod
    }

    pub(crate) fn outside(&self) -> &Client {
        &self.outside
    }

    /// Returns the backend that is removed.
    pub(crate) fn leaving(&self) -> &Pod {
        &self.backends[2]
    }

    pub(crate) fn backend_names(&self) -> Vec<&str> {
        self.backends.iter().map(|pod| pod.name()).collect()
    }

    pub(crate) fn staying_names(&self) -> Vec<&str> {
        self.backend_names().into_iter().take(2).collect()
    }

    /// Returns a drawing of the lab.
    pub(crate) fn picture(&self) -> String {
        let [cluster4, cluster6] = cluster_ips();
        let [outside4, outside6] = load_balancer_ips();
        let [one, two, three] = &self.backends;
        let (host, pods) = (self.node.ipv4(), [&self.client_pod, one, two, three]);
        let row = |texts: [String; 4]| {
            texts.map(|text| format!("{text:^15}")).join("").trim_end().to_owned()
        };
        format!(
            "
      outside {outside:<21} service default/web   80/TCP 53/UDP 7/TCP
         |                              {cluster4:<14} {cluster6}
       router                           {outside4:<14} {outside6}
         | {lan}
    +----+-- eth0 ---- node n1 {host} {rule}
    |   sluice: cgroup, tc and XDP programs                           |
    |{devices:<65}|
    +{ports}+
     {lines}
     {names}
     {ips}

",
            outside = self.outside.ipv4(),
            lan = "192.0.2.0/24",
            rule = "-".repeat(38 - host.to_string().len()) + "+",
            devices = row(pods.map(|pod| pod.host_device().to_owned())),
            ports = ["-------+-------"; 4].join("") + "-----",
            lines = row(["|"; 4].map(str::to_owned)),
            names = row(pods.map(|pod| pod.name().to_owned())),
            ips = row(pods.map(|pod| pod.ipv4().to_string())),
        )
    }
}
