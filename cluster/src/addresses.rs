//! The addresses of a cluster, which only its own network namespaces know.

/// The API server, and the host that the control plane runs on.
pub(crate) const API_SERVER: &str = "10.10.0.10";
pub(crate) const API_SERVER_IPV6: &str = "fd10::10";
pub(crate) const API_PORT: u16 = 6443;

/// The nodes' default gateway, which leads only to the outside client.
pub(crate) const GATEWAY: &str = "10.10.0.254";
pub(crate) const GATEWAY_IPV6: &str = "fd10::254";

/// The outside client, in a subnet of its own, and its gateway.
pub(crate) const OUTSIDE: &str = "10.30.0.2";
pub(crate) const OUTSIDE_IPV6: &str = "fd30::2";
pub(crate) const OUTSIDE_GATEWAY: &str = "10.30.0.1";
pub(crate) const OUTSIDE_GATEWAY_IPV6: &str = "fd30::1";

/// The addresses of load balancers, and one of each family by its last digits.
pub(crate) const LOAD_BALANCERS: &str = "10.20.0.0/24";
pub(crate) const LOAD_BALANCERS_IPV6: &str = "fd20::/112";

pub(crate) fn load_balancer_ipv4(number: u8) -> [u8; 4] {
    [10, 20, 0, number]
}

pub(crate) fn load_balancer_ipv6(number: u8) -> [u16; 8] {
    [0xfd20, 0, 0, 0, 0, 0, 0, number.into()]
}

/// All pods of the cluster.
pub(crate) const CLUSTER_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/48";

/// The range of all Services, and two of them with fixed addresses.
pub(crate) const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:96::/112";
pub(crate) const KUBERNETES_SERVICE: &str = "10.96.0.1";
pub(crate) const KUBERNETES_SERVICE_IPV6: &str = "fd00:96::1";
pub(crate) const DNS_SERVICE: &str = "10.96.0.10";

/// The zones that nodes are spread over.
const ZONES: u8 = 3;

/// A node, by its number from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeNumber(pub(crate) u8);

impl NodeNumber {
    /// Returns the nodes of a cluster of this size.
    pub(crate) fn all(count: u8) -> impl Iterator<Item = Self> {
        (1..=count).map(Self)
    }

    pub(crate) fn name(self) -> String {
        format!("n{}", self.0)
    }

    pub(crate) fn zone(self) -> String {
        format!("zone-{}", (self.0 - 1) % ZONES + 1)
    }

    pub(crate) fn ipv4(self) -> String {
        format!("10.10.0.{}", 10 + self.0)
    }

    /// The digits are those of the IPv4 address, read as hexadecimal.
    pub(crate) fn ipv6(self) -> String {
        format!("fd10::{}", 10 + self.0)
    }

    pub(crate) fn pods_ipv4(self) -> String {
        format!("10.244.{}.0/24", self.0)
    }

    pub(crate) fn pods_ipv6(self) -> String {
        format!("fd00:10:244:{}::/64", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_spread_over_three_zones() {
        let zones: Vec<_> = NodeNumber::all(4).map(NodeNumber::zone).collect();
        assert_eq!(zones, ["zone-1", "zone-2", "zone-3", "zone-1"]);
        assert_eq!(NodeNumber(1).ipv6(), "fd10::11");
    }
}
