//! The flags of the traffic policy, for `sluice agent` and for the commands that decide as it does.

use std::net::IpAddr;

use anyhow::{anyhow, bail};
use clap::Args;
use ipnet::IpNet;
use sluice_common::abi::PREFIXES;
use sluice_core::policy::{
    Accelerate, DetectLocal, ExternalIp, ExternalIps, Masquerade, NodePortAddresses, NodePorts,
    Policy, cidr,
};

/// The flags of the traffic policy.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Policy")]
pub(super) struct PolicyArgs {
    /// The networks of the cluster's pods, at most four per address family.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = cidr)]
    cluster_cidr: Vec<IpNet>,
    /// The networks of Services' addresses, at most four per address family. Packets that leave the
    /// node for an address in them that no Service has are dropped [default: the API server's
    /// ServiceCIDR objects].
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = cidr)]
    service_cidr: Vec<IpNet>,
    /// Which clients' source addresses are replaced by the node's.
    #[arg(long, value_enum, default_value_t, value_name = "CLIENTS")]
    masquerade: Masquerade,
    /// How to detect clients that are pods of this node: device (packets arrive on an edge),
    /// cluster-cidr or node-cidr (by source address), bridge-interface=NAME or
    /// interface-name-prefix=PREFIX (by the device that packets arrive on), or none. auto means
    /// cluster-cidr if --cluster-cidr is given, else device, or none unless --masquerade is needed.
    #[arg(long, value_name = "METHOD", default_value = "auto", value_parser = Detection::parse)]
    detect_local: Detection,
    /// Serve node ports at these addresses of the node: CIDRs, primary, localhost or all. A family
    /// that no element concerns is served at all of its addresses.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "primary")]
    nodeport_addresses: Vec<NodePortAddresses>,
    /// The node's own addresses, with the primary one of each family first [default: those of the
    /// Node object, else those of the device with the default route].
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', value_parser = address)]
    node_addresses: Vec<IpAddr>,
    /// Serve the externalIPs of Services: on (all), off (none), or those within CIDRs.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "on")]
    external_ips: Vec<ExternalIp>,
    /// Leave these Service addresses to a process of this node, if one of its devices has them.
    /// Those of NodeLocal DNSCache are always left alone.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', value_parser = address)]
    leave_address: Vec<IpAddr>,
    /// Whether to forward packets of Services' flows at tc ingress, around netfilter.
    ///
    /// This concerns packets that the stack would only forward from one device to another, in both
    /// directions, for local and remote endpoints. They are sent on by the routing tables. No rule
    /// in PREROUTING, FORWARD or POSTROUTING and no connection tracking sees them. TTL, MTU, marks,
    /// VRFs and egress programs apply as before, and anything more than forwarding is left to the
    /// stack. `sluice preflight --accelerate on` names the rules that are bypassed.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    accelerate: Accelerate,
}

/// A requested detection, or [`None`] for the one that fits the other flags.
#[derive(Clone, Debug)]
struct Detection(Option<DetectLocal>);

impl Detection {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self(None)) } else { text.parse().map(|detect| Self(Some(detect))) }
    }
}

fn address(text: &str) -> Result<IpAddr, String> {
    let address = text.trim().parse::<IpAddr>().map_err(|_| "not an IP address".to_owned())?;
    let address = address.to_canonical();
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
        return Err("a device cannot have this address".to_owned());
    }
    Ok(address)
}

impl PolicyArgs {
    /// Whether no address for node ports is given.
    pub(super) fn leaves_node_ports_open(&self) -> bool {
        self.nodeport_addresses.is_empty()
    }

    /// Returns the policy.
    ///
    /// # Errors
    ///
    /// Fails if flags contradict each other, or have more networks than the maps can hold.
    pub(super) fn policy(self) -> anyhow::Result<Policy> {
        let cluster_cidrs = networks("--cluster-cidr", self.cluster_cidr)?;
        let service_cidrs = networks("--service-cidr", self.service_cidr)?;
        let detect_local = match self.detect_local.0 {
            Some(DetectLocal::ClusterCidr) if cluster_cidrs.is_empty() => {
                bail!("--detect-local cluster-cidr needs --cluster-cidr")
            }
            Some(detect) => detect,
            None => match self.masquerade {
                _ if !cluster_cidrs.is_empty() => DetectLocal::ClusterCidr,
                Masquerade::Needed => DetectLocal::Device,
                Masquerade::KubeProxy | Masquerade::All => DetectLocal::None,
            },
        };
        let external_ips = ExternalIps::new(&self.external_ips)
            .map_err(|error| anyhow!("--external-ips: {error}"))?;
        Ok(Policy {
            masquerade: self.masquerade,
            detect_local,
            cluster_cidrs,
            service_cidrs,
            node_ports: NodePorts::new(self.nodeport_addresses),
            node_addresses: self.node_addresses,
            external_ips,
            leave: self.leave_address.into_iter().collect(),
            accelerate: self.accelerate,
        })
    }
}

/// Returns the networks without duplicates, or fails if the maps cannot hold them.
fn networks(flag: &str, given: Vec<IpNet>) -> anyhow::Result<Vec<IpNet>> {
    let mut networks: Vec<IpNet> = Vec::new();
    for network in given {
        if !networks.contains(&network) {
            networks.push(network);
        }
    }
    let v4 = networks.iter().filter(|network| network.network().is_ipv4()).count();
    for (family, count) in [("IPv4", v4), ("IPv6", networks.len() - v4)] {
        if count > PREFIXES {
            bail!(
                "{flag}: {count} {family} networks are given, but at most {PREFIXES} are allowed; merge some of them"
            );
        }
    }
    Ok(networks)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        policy: PolicyArgs,
    }

    fn parse(line: &str) -> Result<Policy, String> {
        let words =
            std::iter::once("sluice").chain(line.split(' ').filter(|word| !word.is_empty()));
        let flags = Flags::try_parse_from(words).map_err(|error| error.to_string())?;
        flags.policy.policy().map_err(|error| error.to_string())
    }

    #[test]
    fn without_flags_the_policy_is_the_default() {
        assert_eq!(parse(""), Ok(Policy::default()));
    }

    #[test]
    fn local_pods_are_detected_by_what_the_other_flags_suggest() {
        for (line, expected) in [
            ("", DetectLocal::Device),
            ("--masquerade kube-proxy", DetectLocal::None),
            ("--masquerade all", DetectLocal::None),
            ("--cluster-cidr 10.0.0.0/8", DetectLocal::ClusterCidr),
            ("--masquerade kube-proxy --cluster-cidr fd00::/8", DetectLocal::ClusterCidr),
            ("--cluster-cidr 10.0.0.0/8 --detect-local device", DetectLocal::Device),
            ("--masquerade kube-proxy --detect-local node-cidr", DetectLocal::NodeCidr),
            (
                "--detect-local bridge-interface=cni0",
                DetectLocal::BridgeInterface("cni0".to_owned()),
            ),
            (
                "--detect-local interface-name-prefix=cali",
                DetectLocal::InterfaceNamePrefix("cali".to_owned()),
            ),
        ] {
            assert_eq!(parse(line).map(|policy| policy.detect_local), Ok(expected), "{line}");
        }
    }

    #[test]
    fn every_flag_reaches_the_policy() {
        let line = "--cluster-cidr 10.244.1.0/16,fd01::/48 --cluster-cidr 10.244.0.0/16 --service-cidr 10.96.0.0/12 \
                    --masquerade all --nodeport-addresses primary,10.0.0.0/8 --node-addresses 192.0.2.1,2001:db8::1 \
                    --external-ips 203.0.113.0/24 --leave-address 10.96.0.10,::ffff:10.96.0.11 \
                    --accelerate on";
        let cidrs = |texts: &[&str]| {
            texts.iter().map(|text| cidr(text).expect("a CIDR")).collect::<Vec<_>>()
        };
        let addresses =
            |texts: &[&str]| texts.iter().map(|text| text.parse().expect("an address")).collect();
        let expected = Policy {
            masquerade: Masquerade::All,
            detect_local: DetectLocal::ClusterCidr,
            cluster_cidrs: cidrs(&["10.244.0.0/16", "fd01::/48"]),
            service_cidrs: cidrs(&["10.96.0.0/12"]),
            node_ports: NodePorts::new(vec![
                NodePortAddresses::Primary,
                NodePortAddresses::Within(cidr("10.0.0.0/8").expect("a CIDR")),
            ]),
            node_addresses: addresses(&["192.0.2.1", "2001:db8::1"]),
            external_ips: ExternalIps::Within(cidrs(&["203.0.113.0/24"])),
            leave: addresses(&["10.96.0.10", "10.96.0.11"]).into_iter().collect(),
            accelerate: Accelerate::On,
        };
        assert_eq!(parse(line), Ok(expected));
    }

    #[test]
    fn a_wrong_flag_is_named_with_what_is_wrong() {
        for (line, flag, why) in [
            ("--cluster-cidr 10.0.0.0", "--cluster-cidr", "not a CIDR"),
            ("--service-cidr 10.0.0.0/8,", "--service-cidr", "not a CIDR"),
            ("--service-cidr 10.0.0.0/33", "--service-cidr", "not a CIDR"),
            (
                "--cluster-cidr 10.0.0.0/16,10.1.0.0/16,10.2.0.0/16,10.3.0.0/16,10.4.0.0/16,fd00::/8",
                "--cluster-cidr",
                "5 IPv4 networks are given, but at most 4",
            ),
            ("--masquerade some", "--masquerade", "possible values: needed, kube-proxy, all"),
            ("--detect-local cluster-cidr", "--detect-local", "needs --cluster-cidr"),
            ("--detect-local bridges", "--detect-local", "say auto"),
            ("--nodeport-addresses primary,", "--nodeport-addresses", "empty element"),
            ("--nodeport-addresses eth0", "--nodeport-addresses", "nor primary, localhost or all"),
            ("--node-addresses node-1", "--node-addresses", "not an IP address"),
            ("--node-addresses 127.0.0.1", "--node-addresses", "a device cannot have this address"),
            ("--external-ips off,10.0.0.0/8", "--external-ips", "stand alone"),
            ("--leave-address 10.96.0.0/16", "--leave-address", "not an IP address"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.contains(flag) && error.contains(why), "{line}: {error}");
        }
    }

    #[test]
    fn four_networks_of_each_family_are_possible() {
        let line = "--service-cidr 10.0.0.0/16,10.1.0.0/16,10.2.0.0/16,10.3.0.0/16,fd00::/64,fd01::/64,fd02::/64,fd03::/64";
        assert_eq!(parse(line).map(|policy| policy.service_cidrs.len()), Ok(8));
    }
}
