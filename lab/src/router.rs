//! The world outside the nodes: the router that connects them to it, and clients.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use crate::namespace::Namespace;
use crate::node::Node;
use crate::shared::Shared;
use crate::skip::Unsupported;

/// The nodes' gateway on the segment they share.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// ... in IPv6.
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 2, 0, 0, 0, 1);
/// The bridge of the router that nodes are plugged into.
pub(crate) const LAN: &str = "lan0";

/// The router: a bridge `lan0` for the nodes and a link `to-<name>` for each client, with
/// forwarding between them.
#[derive(Clone)]
pub struct Router {
    namespace: Namespace,
}

impl Router {
    pub(crate) fn create(shared: &Arc<Shared>) -> Result<Self> {
        let namespace = Namespace::create(shared, "router", "router", true)?;
        let _ = namespace.ip(&format!(
            "link add {LAN} type bridge\nlink set {LAN} up\naddr add {GATEWAY}/24 dev {LAN}\naddr add {GATEWAY6}/64 dev {LAN} nodad"
        ))?;
        // The router's bridge acts as a plain switch.
        bridge_netfilter(&namespace, false)?;
        Ok(Self { namespace })
    }

    /// Routes a prefix (`203.0.113.10/32`) to a node, or to several in turns by flow.
    pub fn route(&self, prefix: &str, nodes: &[&Node]) -> Result<()> {
        ensure!(!nodes.is_empty(), "cannot route {prefix} to no node");
        let hops = nodes.iter().map(|node| {
            let via = if prefix.contains(':') {
                node.ipv6().to_string()
            } else {
                node.ipv4().to_string()
            };
            if nodes.len() == 1 { format!("via {via}") } else { format!("nexthop via {via}") }
        });
        self.ip(&format!("route replace {prefix} {}", hops.collect::<Vec<_>>().join(" "))).map(drop)
    }

    /// Removes a route.
    pub fn unroute(&self, prefix: &str) -> Result<()> {
        self.ip(&format!("route del {prefix}")).map(drop)
    }
}

impl Deref for Router {
    type Target = Namespace;
    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

/// Sets whether packets that cross a bridge of the namespace also traverse its netfilter rules.
pub(crate) fn bridge_netfilter(namespace: &Namespace, on: bool) -> Result<()> {
    for key in ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"] {
        if namespace.has_sysctl(key)? {
            namespace.sysctl(key, if on { "1" } else { "0" })?;
        } else if on {
            let (what, why) = (
                "netfilter on bridges".into(),
                format!("there is no sysctl {key}: load br_netfilter"),
            );
            return Err(Unsupported { what, why }.into());
        }
    }
    Ok(())
}

/// A host outside the cluster, with `eth0` in a subnet of its own behind the router.
#[derive(Clone)]
pub struct Client {
    namespace: Namespace,
    router: Router,
    link: String,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
}

impl Client {
    pub(crate) fn create(
        shared: &Arc<Shared>,
        router: &Router,
        name: &str,
        index: u8,
    ) -> Result<Self> {
        let namespace = Namespace::create(shared, name, &format!("outside-{name}"), false)?;
        let link = link_name(name)?;
        let net = Ipv6Addr::new(0x2001, 0xdb8, 0xc, index.into(), 0, 0, 0, 0x10);
        let (ipv4, ipv6) = (Ipv4Addr::new(198, 18, index, 10), net);
        let (gateway, gateway6) = (
            Ipv4Addr::new(198, 18, index, 1),
            Ipv6Addr::new(0x2001, 0xdb8, 0xc, index.into(), 0, 0, 0, 1),
        );
        let peer = namespace.path().display();
        let _ = router.ip(&format!(
            "link add {link} type veth peer name eth0 netns {peer}\nlink set {link} up\n\
             addr add {gateway}/24 dev {link}\naddr add {gateway6}/64 dev {link} nodad"
        ))?;
        let _ = namespace.ip(&format!(
            "link set eth0 up\naddr add {ipv4}/24 dev eth0\naddr add {ipv6}/64 dev eth0 nodad\n\
             route add default via {gateway}\nroute add default via {gateway6}"
        ))?;
        Ok(Self { namespace, router: router.clone(), link, ipv4, ipv6 })
    }

    /// Returns the client's address.
    pub fn ipv4(&self) -> Ipv4Addr {
        self.ipv4
    }

    /// Returns the client's IPv6 address.
    pub fn ipv6(&self) -> Ipv6Addr {
        self.ipv6
    }

    /// Lowers the MTU of the router's side of the client's link: the router answers longer packets
    /// with "packet too big". The client's own device keeps its MTU, so that its TCP announces
    /// segments that do not fit.
    pub fn narrow_link(&self, mtu: u32) -> Result<()> {
        // The MTU of a veth's end limits what is sent through it, not what arrives.
        self.router.ip(&format!("link set {} mtu {mtu}", self.link)).map(drop)
    }
}

impl Deref for Client {
    type Target = Namespace;
    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

/// Returns the name of the router's device towards a node or client.
pub(crate) fn link_name(name: &str) -> Result<String> {
    let fits = !name.is_empty()
        && name.len() <= 11
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    ensure!(
        fits,
        "the name `{name}` does not fit into a device's name: use 1 to 11 letters, digits and dashes"
    );
    Ok(format!("to-{name}"))
}

/// Runs one `ip` command that needs a kernel feature.
pub(crate) fn ip_feature(namespace: &Namespace, what: &str, line: &str) -> Result<()> {
    match namespace.ip(line) {
        Ok(_) => Ok(()),
        Err(error) => {
            let why = format!("{error:#}");
            // iproute2 6 names the device type; older ones print the kernel's EOPNOTSUPP.
            if why.contains("Unknown device type") || why.contains("not supported") {
                return Err(Unsupported { what: what.to_owned(), why }.into());
            }
            Err(error).context(format!("cannot set up {what}"))
        }
    }
}
