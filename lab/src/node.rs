//! Nodes: an uplink to the router, pods plugged in as a CNI does it, a cgroup, a bpffs.

mod overlay;
mod pod;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

use crate::namespace::Namespace;
use crate::router::{GATEWAY, GATEWAY6, LAN, Router, bridge_netfilter, ip_feature, link_name};
use crate::running::Running;
use crate::shared::Shared;
use crate::xdp;

pub use overlay::Overlay;
pub use pod::Pod;

/// The way a node plugs its pods in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cni {
    /// Like Calico and ptp: a veth `lxc<n>` and a host route for each pod, the gateway 169.254.1.1
    /// by proxy ARP and fe80::1.
    Routed,
    /// Like the bridge plugin and flannel: `cni0` with the gateway's address, all pods of the node
    /// on one segment.
    Bridge {
        /// Whether bridged packets traverse iptables and nftables (`net.bridge.bridge-nf-call-*`),
        /// as kube-proxy requires.
        bridge_nf: bool,
    },
}

/// Reverse path filtering of every device of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RpFilter {
    /// None.
    Off,
    /// Strict: the source has to be reachable through the device that the packet came in by.
    Strict,
    /// Loose: the source has to be reachable through any device.
    Loose,
}

/// An nftables ruleset for [`NodeOptions::nft`] that drops forwarded packets which conntrack calls
/// invalid. It takes effect when conntrack sees only one direction of a flow, or different
/// addresses in each direction.
pub const DROP_INVALID: &str = "table inet lab {\n  chain forward {\n    type filter hook forward priority filter; policy accept;\n    ct state invalid counter drop\n  }\n}\n";

/// Options of a node. The default has routed pods, a strict reverse path filter, no rules and an
/// untagged uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeOptions {
    /// The way pods are plugged in.
    pub cni: Cni,
    /// Reverse path filtering.
    pub rp_filter: RpFilter,
    /// An nftables ruleset to load; see [`DROP_INVALID`].
    pub nft: Option<String>,
    /// The uplink's VLAN; the address is then on `eth0.<id>`.
    pub vlan: Option<u16>,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self { cni: Cni::Routed, rp_filter: RpFilter::Strict, nft: None, vlan: None }
    }
}

/// A node of the cluster. Commands run in its host namespace and in the cgroup `<node>/host`; cheap
/// to clone.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    namespace: Namespace,
    router: Router,
    index: u8,
    cni: Cni,
    uplink: String,
    /// The router's device at the other end of `eth0`.
    uplink_peer: String,
    mtu: u32,
    next_pod: AtomicU8,
    relay: Mutex<Option<Running>>,
    /// The `sluice` binary of its last agent, if it is not the one under test.
    program: Mutex<Option<PathBuf>>,
}

/// Makes the settings of a node's namespace that its options name.
fn set_up(namespace: &Namespace, options: &NodeOptions) -> Result<()> {
    let rp_filter = match options.rp_filter {
        RpFilter::Off => "0",
        RpFilter::Strict => "1",
        RpFilter::Loose => "2",
    };
    namespace.sysctls(&[
        ("net/ipv4/conf/all/rp_filter", rp_filter),
        ("net/ipv4/conf/default/rp_filter", rp_filter),
    ])?;
    bridge_netfilter(namespace, matches!(options.cni, Cni::Bridge { bridge_nf: true }))
}

/// Connects a node to the router's network, in a VLAN if one is given. Returns the name of the
/// node's device.
fn add_uplink(
    namespace: &Namespace,
    router: &Router,
    peer: &str,
    name: &str,
    vlan: Option<u16>,
) -> Result<String> {
    let path = namespace.path().display();
    let _ = router.ip(&format!(
        "link add {peer} type veth peer name eth0 netns {path}\nlink set {peer} up"
    ))?;
    let _ = namespace.ip("link set eth0 up")?;
    let (uplink, port) = match vlan {
        None => ("eth0".to_owned(), peer.to_owned()),
        Some(id) => {
            let (uplink, port) = (format!("eth0.{id}"), format!("v-{name}"));
            ip_feature(
                namespace,
                "a VLAN device",
                &format!("link add link eth0 name {uplink} type vlan id {id}"),
            )?;
            let _ = router.ip(&format!(
                "link add link {peer} name {port} type vlan id {id}\nlink set {port} up"
            ))?;
            (uplink, port)
        }
    };
    let _ = router.ip(&format!("link set {port} master {LAN}"))?;
    Ok(uplink)
}

impl Node {
    pub(crate) fn create(
        shared: &Arc<Shared>,
        router: &Router,
        name: &str,
        index: u8,
        overlay: Overlay,
        options: &NodeOptions,
    ) -> Result<Self> {
        let uplink_peer = link_name(name)?;
        let namespace = Namespace::create(shared, name, &format!("{name}/host"), true)?;
        set_up(&namespace, options)?;
        let uplink = add_uplink(&namespace, router, &uplink_peer, name, options.vlan)?;
        let inner = Inner {
            namespace,
            router: router.clone(),
            index,
            cni: options.cni,
            uplink,
            uplink_peer,
            mtu: if overlay == Overlay::None { 1500 } else { 1450 },
            next_pod: AtomicU8::new(10),
            relay: Mutex::new(None),
            program: Mutex::new(None),
        };
        let this = Self { inner: Arc::new(inner) };
        this.add_addresses()?;
        if let Some(ruleset) = &options.nft {
            this.nft(ruleset)?;
        }
        let bpffs = this.bpffs();
        std::fs::create_dir_all(&bpffs)
            .with_context(|| format!("cannot make {}", bpffs.display()))?;
        xdp::mount_bpffs(&bpffs)?;
        Ok(this)
    }

    /// Gives the uplink its addresses and default routes, and makes the bridge of pods where the
    /// CNI has one.
    fn add_addresses(&self) -> Result<()> {
        let uplink = self.uplink();
        let _ = self.ip(&format!(
            "link set {uplink} up\naddr add {}/24 dev {uplink}\naddr add {}/64 dev {uplink} nodad\n\
             route add default via {GATEWAY}\nroute add default via {GATEWAY6}",
            self.ipv4(),
            self.ipv6()
        ))?;
        if self.inner.cni != Cni::Routed {
            let (gateway, gateway6) = (self.pod_ipv4(1), self.pod_ipv6(1));
            let mtu = self.inner.mtu;
            // With an address of its own the bridge does not change it with its ports.
            let mac = format!("02:c0:00:00:00:{:02x}", self.inner.index);
            let _ = self.ip(&format!(
                "link add cni0 address {mac} mtu {mtu} type bridge\nlink set cni0 up\n\
                 addr add {gateway}/24 dev cni0\naddr add {gateway6}/64 dev cni0 nodad"
            ))?;
        }
        Ok(())
    }

    /// Returns the node's own address, on its uplink.
    pub fn ipv4(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, 10 + self.inner.index)
    }

    /// Returns the node's own IPv6 address.
    pub fn ipv6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0, 2, 0, 0, 0, alike(10 + self.inner.index))
    }

    /// Returns the range of the node's pods, `10.244.<n>.0/24`.
    pub fn pod_range(&self) -> String {
        format!("{}/24", self.pod_ipv4(0))
    }

    /// Returns the IPv6 range of the node's pods, `fd00:10:244:<n>::/64`.
    pub fn pod_range6(&self) -> String {
        format!("{}/64", self.pod_ipv6(0))
    }

    fn pod_ipv4(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.inner.index, host)
    }

    fn pod_ipv6(&self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x10, 0x244, alike(self.inner.index), 0, 0, 0, alike(host))
    }

    /// Returns the device that has the node's address: `eth0`, or `eth0.<id>` with a VLAN.
    pub fn uplink(&self) -> &str {
        &self.inner.uplink
    }

    /// Returns the router's device at the other end of `eth0`, for captures in the [`Router`]'s
    /// namespace.
    pub fn uplink_peer(&self) -> &str {
        &self.inner.uplink_peer
    }

    /// Returns the cgroup of the whole node: its host processes and its pods.
    pub fn cgroup_root(&self) -> &Path {
        let host = self.inner.namespace.cgroup();
        host.parent().unwrap_or(host)
    }

    /// Returns the node's own bpffs, where its agent pins.
    pub fn bpffs(&self) -> PathBuf {
        self.state_directory().join("bpf")
    }

    pub(crate) fn program(&self) -> MutexGuard<'_, Option<PathBuf>> {
        self.inner.program.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a directory for files of the node, removed with the lab.
    pub fn state_directory(&self) -> PathBuf {
        self.inner.namespace.shared.state.join(self.name())
    }

    /// Adds a pod, plugged in as the node's [`Cni`] does it.
    ///
    /// # Errors
    /// If the name is taken in the lab, or if the kernel refuses a step.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let host = self.inner.next_pod.fetch_add(1, Ordering::Relaxed);
        Pod::create(self, name, host)
            .with_context(|| format!("cannot build the pod {name} on the node {}", self.name()))
    }

    /// Enables `XDP_TX` on the node's uplink: attaches a program that passes every packet to the
    /// router's end of the veth. Without one the veth drops what `XDP_TX` sends.
    pub fn uplink_peer_xdp_pass(&self) -> Result<()> {
        self.inner.router.xdp_pass(self.uplink_peer())
    }

    /// Gives packets that come in by the uplink full checksums, as from a wire. Over veths
    /// checksums stay partial from the first sender on, until a device without the offload has to
    /// finish them. Here that device is the router's end.
    pub fn uplink_peer_full_checksums(&self) -> Result<()> {
        self.inner.router.offload(self.uplink_peer(), "tx", false)
    }
}

impl Deref for Node {
    type Target = Namespace;
    fn deref(&self) -> &Namespace {
        &self.inner.namespace
    }
}

/// Returns the number that reads in hexadecimal as `number` does in decimal, so that the two
/// addresses of a pod look alike.
fn alike(number: u8) -> u16 {
    let number = u16::from(number);
    number / 100 * 0x100 + number / 10 % 10 * 0x10 + number % 10
}

#[cfg(test)]
mod tests {
    use super::alike;

    #[test]
    fn the_addresses_of_a_pod_look_alike() {
        for number in 0..=u8::MAX {
            assert_eq!(format!("{:x}", alike(number)), number.to_string());
        }
    }
}
