//! Pods: a namespace with one `eth0`, plugged into its node.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Deref;

use anyhow::{Context, Result};
use rustix::mount::UnmountFlags;

use super::{Cni, Node};
use crate::cgroup;
use crate::leftovers::PATIENCE;
use crate::namespace::Namespace;

/// A pod of a node. Commands run in its namespace and in the cgroup `<node>/pod-<name>`; cheap to
/// clone.
#[derive(Clone)]
pub struct Pod {
    namespace: Namespace,
    node: Node,
    host_device: String,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
}

impl Pod {
    pub(super) fn create(node: &Node, name: &str, host: u8) -> Result<Self> {
        let namespace =
            Namespace::create(&node.shared, name, &format!("{}/pod-{name}", node.name()), false)?;
        let (ipv4, ipv6, mtu) = (node.pod_ipv4(host), node.pod_ipv6(host), node.inner.mtu);
        let (gateway, gateway6) = (node.pod_ipv4(1), node.pod_ipv6(1));
        let peer = namespace.path().display();
        let host_device = match node.inner.cni {
            Cni::Routed => format!("lxc{host}"),
            Cni::Bridge { .. } => format!("veth{host}"),
        };
        let _ = node.ip(&format!(
            "link add {host_device} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {peer}"
        ))?;
        if node.inner.cni == Cni::Routed {
            node.sysctls(&[
                (&format!("net/ipv4/conf/{host_device}/proxy_arp"), "1"),
                // Otherwise proxy ARP answers only after up to 0.8 s.
                (&format!("net/ipv4/neigh/{host_device}/proxy_delay"), "0"),
            ])?;
            let _ = node.ip(&format!(
                "link set {host_device} up\naddr add fe80::1/64 dev {host_device} nodad\n\
                 route add {ipv4} dev {host_device} scope link\nroute add {ipv6} dev {host_device}"
            ))?;
            let _ = namespace.ip(&format!(
                "link set eth0 up\naddr add {ipv4}/32 dev eth0\naddr add {ipv6}/128 dev eth0 nodad\n\
                 route add 169.254.1.1 dev eth0 scope link\nroute add default via 169.254.1.1 dev eth0\nroute add default via fe80::1 dev eth0"
            ))?;
        } else {
            let _ = node.ip(&format!("link set {host_device} master cni0 up"))?;
            let _ = namespace.ip(&format!(
                "link set eth0 up\naddr add {ipv4}/24 dev eth0\naddr add {ipv6}/64 dev eth0 nodad\n\
                 route add default via {gateway}\nroute add default via {gateway6}"
            ))?;
        }
        Ok(Self { namespace, node: node.clone(), host_device, ipv4, ipv6 })
    }

    /// Returns the pod's address.
    pub fn ipv4(&self) -> Ipv4Addr {
        self.ipv4
    }

    /// Returns the pod's IPv6 address.
    pub fn ipv6(&self) -> Ipv6Addr {
        self.ipv6
    }

    /// Returns the pod's node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Returns the node's end of the pod's veth.
    pub fn host_device(&self) -> &str {
        &self.host_device
    }

    /// Makes a namespace behind the pod, as a container engine in the pod would. The pod routes it
    /// and masquerades it with its own address; its cgroup is in the pod's. A pod has at most one.
    pub fn nested(&self, name: &str) -> Result<Namespace> {
        let cgroup = format!("{}/pod-{}/{name}", self.node.name(), self.name());
        let nested = Namespace::create(&self.shared, name, &cgroup, false)?;
        self.sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
        let peer = nested.path().display();
        let _ = self.ip(&format!(
            "link add nested type veth peer name eth0 netns {peer}\nlink set nested up\n\
             addr add 172.30.0.1/24 dev nested\naddr add fd00:30::1/64 dev nested nodad"
        ))?;
        let _ = nested.ip(
            "link set eth0 up\naddr add 172.30.0.2/24 dev eth0\naddr add fd00:30::2/64 dev eth0 nodad\n\
             route add default via 172.30.0.1\nroute add default via fd00:30::1",
        )?;
        self.nft(
            "table inet nested { chain post { type nat hook postrouting priority srcnat; \
             oifname eth0 masquerade; }; }\n",
        )?;
        Ok(nested)
    }

    /// Ends the pod as a kubelet would: kills its processes, then removes its device and its
    /// namespace.
    pub fn remove(self) -> Result<()> {
        cgroup::destroy(&[self.namespace.cgroup().to_owned()], PATIENCE)?;
        let _ = self.node.ip(&format!("link del {}", self.host_device))?;
        let path = self.namespace.path();
        rustix::mount::unmount(path, UnmountFlags::DETACH)
            .with_context(|| format!("cannot unmount {}", path.display()))?;
        std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
    }
}

impl Deref for Pod {
    type Target = Namespace;
    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}
