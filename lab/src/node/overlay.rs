//! Connections between pods of different nodes.

use std::sync::PoisonError;

use anyhow::Result;

use crate::router::ip_feature;
use crate::serve;

use super::Node;

/// The way of packets between pods of different nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overlay {
    /// Plain routes on the segment the nodes share; the router knows the pods' ranges too.
    #[default]
    None,
    /// A `vxlan0` device on every node, as flannel makes it: static neighbours, MTU 1450. The
    /// router knows no pods.
    Vxlan,
    /// A headerless (`ARPHRD_NONE`) `tun0` on every node, whose packets a process relays over UDP;
    /// MTU 1450. The router knows no pods.
    Tun,
}

/// The port of the relays of [`Overlay::Tun`].
const RELAY_PORT: u16 = 8473;

impl Node {
    /// Connects the last node with those before it.
    pub(crate) fn join(nodes: &[Self], overlay: Overlay) -> Result<()> {
        let Some((new, others)) = nodes.split_last() else {
            return Ok(());
        };
        match overlay {
            Overlay::None => new.join_routed(others),
            Overlay::Vxlan => new.join_vxlan(others),
            Overlay::Tun => Self::join_tun(nodes),
        }
    }

    fn join_routed(&self, others: &[Self]) -> Result<()> {
        let route_to = |node: &Self| {
            format!(
                "route replace {} via {}\nroute replace {} via {}\n",
                node.pod_range(),
                node.ipv4(),
                node.pod_range6(),
                node.ipv6()
            )
        };
        let _ = self.inner.router.ip(&route_to(self))?;
        for other in others {
            let _ = self.ip(&route_to(other))?;
            let _ = other.ip(&route_to(self))?;
        }
        Ok(())
    }

    fn vxlan_mac(&self) -> String {
        format!("02:5a:00:00:00:{:02x}", self.inner.index)
    }

    fn join_vxlan(&self, others: &[Self]) -> Result<()> {
        let device = format!(
            "link add vxlan0 address {} mtu 1450 type vxlan id 1 dstport 8472 local {} dev {} nolearning",
            self.vxlan_mac(),
            self.ipv4(),
            self.uplink()
        );
        ip_feature(self, "VXLAN", &device)?;
        let _ = self.ip(&format!(
            "link set vxlan0 up\naddr add {}/32 dev vxlan0\naddr add {}/128 dev vxlan0 nodad",
            self.pod_ipv4(0),
            self.pod_ipv6(0)
        ))?;
        for other in others {
            self.reach_by_vxlan(other)?;
            other.reach_by_vxlan(self)?;
        }
        Ok(())
    }

    fn reach_by_vxlan(&self, other: &Self) -> Result<()> {
        let (via, via6, mac) = (other.pod_ipv4(0), other.pod_ipv6(0), other.vxlan_mac());
        let _ = self.ip(&format!(
            "neigh replace {via} lladdr {mac} dev vxlan0 nud permanent\nneigh replace {via6} lladdr {mac} dev vxlan0 nud permanent\n\
             route replace {} via {via} dev vxlan0 onlink\nroute replace {} via {via6} dev vxlan0 onlink",
            other.pod_range(),
            other.pod_range6()
        ))?;
        self.run(
            "bridge",
            ["fdb", "append", &mac, "dev", "vxlan0", "dst", &other.ipv4().to_string()],
        )
        .map(drop)
    }

    /// Restarts every relay, because a relay gets its peers as arguments.
    fn join_tun(nodes: &[Self]) -> Result<()> {
        let tool = serve::tool_path()?;
        if let Some((new, others)) = nodes.split_last() {
            ip_feature(new, "a tun device", "tuntap add mode tun name tun0")?;
            let _ = new.ip(&format!(
                "link set tun0 mtu 1450 up\naddr add {}/32 dev tun0\naddr add {}/128 dev tun0 nodad",
                new.pod_ipv4(0),
                new.pod_ipv6(0)
            ))?;
            for (from, to) in others.iter().flat_map(|other| [(other, new), (new, other)]) {
                let _ = from.ip(&format!(
                    "route replace {} dev tun0\nroute replace {} dev tun0",
                    to.pod_range(),
                    to.pod_range6()
                ))?;
            }
        }
        for node in nodes {
            let mut relay = node.inner.relay.lock().unwrap_or_else(PoisonError::into_inner);
            // Only one process can open the tun device.
            if let Some(mut old) = relay.take() {
                let _ = old.kill()?;
            }
            let mut args = vec![
                "relay".to_owned(),
                "--tun=tun0".into(),
                format!("--bind={}:{RELAY_PORT}", node.ipv4()),
            ];
            let peers = nodes.iter().filter(|other| other.inner.index != node.inner.index);
            args.extend(
                peers.map(|peer| {
                    format!("--peer={}={}:{RELAY_PORT}", peer.inner.index, peer.ipv4())
                }),
            );
            let running = serve::until_listening(node.spawn(&tool, args)?)?;
            *relay = Some(running);
        }
        Ok(())
    }
}
