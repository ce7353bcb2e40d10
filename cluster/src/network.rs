//! The network of a cluster: a bridge with the nodes and the control plane's host, and an outside
//! client behind it.
//!
//! ```text
//!     outside 10.30.0.2 ── bridge 10.10.0.254 ──┬── control-plane 10.10.0.10
//!                                               ├── n1 10.10.0.11 ── pods 10.244.1.0/24
//!                                               └── n2 10.10.0.12 ── pods 10.244.2.0/24
//! ```
//!
//! Each of them is a namespace, and so is the bridge. No link leads to the namespace that this is
//! started from, and addresses that nobody here has are unreachable.

use std::fmt::Write as _;

use anyhow::Result;

use crate::addresses::{
    API_SERVER, API_SERVER_IPV6, GATEWAY, GATEWAY_IPV6, NodeNumber, OUTSIDE, OUTSIDE_GATEWAY,
    OUTSIDE_GATEWAY_IPV6, OUTSIDE_IPV6,
};
use crate::namespace::Namespace;
use crate::state::State;

/// The namespaces that every cluster has in addition to those of its nodes.
pub(crate) const BRIDGE: &str = "bridge";
pub(crate) const CONTROL_PLANE: &str = "control-plane";
pub(crate) const OUTSIDE_CLIENT: &str = "outside";

/// Makes the parts of it that are missing.
pub(crate) fn ensure(state: &State, nodes: u8) -> Result<()> {
    let bridge = Namespace::named(state, BRIDGE);
    if !bridge.exists() {
        make_bridge(&bridge)?;
    }
    let hosts = std::iter::once((
        CONTROL_PLANE.to_owned(),
        API_SERVER.to_owned(),
        API_SERVER_IPV6.to_owned(),
    ))
    .chain(NodeNumber::all(nodes).map(|node| (node.name(), node.ipv4(), node.ipv6())));
    for (name, ipv4, ipv6) in hosts {
        let namespace = Namespace::named(state, &name);
        if !namespace.exists() {
            make_host(&bridge, &namespace, &name, &ipv4, &ipv6, nodes)?;
        }
    }
    let outside = Namespace::named(state, OUTSIDE_CLIENT);
    if !outside.exists() {
        make_outside(&bridge, &outside)?;
        bridge.ip(&routes_to_pods(nodes, |_| true))?;
    }
    Ok(())
}

fn make_bridge(bridge: &Namespace) -> Result<()> {
    bridge.create()?;
    bridge.ip(&format!(
        "link add br0 type bridge\n\
         link set br0 up\n\
         addr add {GATEWAY}/24 dev br0\n\
         addr add {GATEWAY_IPV6}/64 dev br0 nodad\n\
         route add unreachable default\n\
         route add unreachable ::/0\n"
    ))?;
    bridge.sysctls(&[
        ("net/ipv4/conf/br0/send_redirects", "0"),
        // Load balancers, which are routes here, spread connections over nodes.
        ("net/ipv4/fib_multipath_hash_policy", "1"),
        ("net/ipv6/fib_multipath_hash_policy", "1"),
    ])
}

fn make_host(
    bridge: &Namespace,
    host: &Namespace,
    name: &str,
    ipv4: &str,
    ipv6: &str,
    nodes: u8,
) -> Result<()> {
    host.create()?;
    let link = if name == CONTROL_PLANE { "v-cp".to_owned() } else { format!("v-{name}") };
    bridge.ip(&format!(
        "link add {link} type veth peer name eth0 netns {}\nlink set {link} master br0 up\n",
        host.file().display()
    ))?;
    host.ip(&format!(
        "link set eth0 up\n\
         addr add {ipv4}/24 dev eth0\n\
         addr add {ipv6}/64 dev eth0 nodad\n\
         route add default via {GATEWAY}\n\
         route add ::/0 via {GATEWAY_IPV6}\n\
         {}",
        routes_to_pods(nodes, |node| node.name() != name)
    ))
}

fn make_outside(bridge: &Namespace, outside: &Namespace) -> Result<()> {
    outside.create()?;
    bridge.ip(&format!(
        "link add v-outside type veth peer name eth0 netns {}\n\
         link set v-outside up\n\
         addr add {OUTSIDE_GATEWAY}/24 dev v-outside\n\
         addr add {OUTSIDE_GATEWAY_IPV6}/64 dev v-outside nodad\n",
        outside.file().display()
    ))?;
    outside.ip(&format!(
        "link set eth0 up\n\
         addr add {OUTSIDE}/24 dev eth0\n\
         addr add {OUTSIDE_IPV6}/64 dev eth0 nodad\n\
         route add default via {OUTSIDE_GATEWAY}\n\
         route add ::/0 via {OUTSIDE_GATEWAY_IPV6}\n"
    ))
}

/// Adds the routes to the pods of nodes that a CNI with routes of its own, or a cloud's router,
/// would add.
fn routes_to_pods(nodes: u8, wanted: impl Fn(NodeNumber) -> bool) -> String {
    let mut lines = String::new();
    for node in NodeNumber::all(nodes).filter(|node| wanted(*node)) {
        // Writing to a String cannot fail.
        let _ = writeln!(lines, "route add {} via {}", node.pods_ipv4(), node.ipv4());
        let _ = writeln!(lines, "route add {} via {}", node.pods_ipv6(), node.ipv6());
    }
    lines
}
