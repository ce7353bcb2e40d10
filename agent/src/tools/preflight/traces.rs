//! Finds traces of other load balancers and redirectors: kube-proxy, eBPF programs at the hooks,
//! service meshes, NodeLocal DNSCache.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::Path;

use futures::TryStreamExt;
use rtnetlink::new_connection;
use rtnetlink::packet_route::link::{LinkAttribute, LinkXdp};
use sluice_core::policy::SocketPath;

use super::{Check, Outcome};
use crate::node::dataplane::Pins;
use crate::node::dataplane::clsact::{self, Direction};
use crate::node::dataplane::trial::{
    at_cgroup, at_device, at_ingress, is_ours, pinned, program_name,
};
use crate::node::devices::{Device, Facts, Survey};
use crate::node::kube_proxy::{self, legacy::legacy_rules};
use crate::node::nft;

/// The prefixes of chains' names by which their owner is known.
const KUBE_PROXY: &str = "KUBE-SERVICES";
const ISTIO: &str = "ISTIO_";

/// The traces that were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Traces {
    /// Whether rules could be listed.
    pub(super) is_listed: bool,
    /// Traces of kube-proxy.
    pub(super) kube_proxy: BTreeSet<String>,
    /// Traces of service meshes.
    pub(super) meshes: BTreeSet<String>,
    /// The programs of others, by device or cgroup.
    pub(super) programs: BTreeMap<String, BTreeSet<String>>,
    /// As `programs`, but only at the tc ingress of devices.
    pub(super) at_ingress: BTreeMap<String, BTreeSet<String>>,
    /// The places where programs of Sluice are attached.
    pub(super) ours: BTreeSet<String>,
    /// Traces of Cilium other than its programs.
    pub(super) cilium: BTreeSet<String>,
    /// The addresses of NodeLocal DNSCache.
    pub(super) node_local_dns: Vec<IpAddr>,
}

/// Returns the ids of XDP programs, by ifindex.
pub(super) async fn xdp() -> io::Result<BTreeMap<u32, u32>> {
    let (connection, handle, _messages) = new_connection()?;
    let _requests = tokio::spawn(connection);
    let mut found = BTreeMap::new();
    let mut links = handle.link().get().execute();
    while let Some(message) = links.try_next().await.map_err(io::Error::other)? {
        for attribute in message.attributes {
            if let LinkAttribute::Xdp(parts) = attribute {
                let id = parts
                    .iter()
                    .find_map(|part| if let LinkXdp::ProgId(id) = part { Some(*id) } else { None });
                found.extend(id.filter(|id| *id != 0).map(|id| (message.header.index, id)));
            }
        }
    }
    Ok(found)
}

/// Collects the traces. Without privileges only those that anybody can see are found.
pub(super) fn look(
    facts: &Facts,
    survey: &Survey,
    cgroup: Option<&Path>,
    pin_path: &Path,
    is_able: bool,
    xdp: &BTreeMap<u32, u32>,
) -> Traces {
    let mut traces = Traces { is_listed: is_able, ..Traces::default() };
    traces.links(facts);
    traces.meshes.extend(chained_plugins(Path::new("/etc/cni/net.d")));
    if let Some(pid) = kube_proxy::running() {
        let _ = traces.kube_proxy.insert(format!("the process {pid}"));
    }
    if Path::new("/sys/fs/bpf/tc/globals").is_dir() || Path::new("/sys/fs/bpf/cilium").is_dir() {
        let _ = traces.cilium.insert("pins under /sys/fs/bpf".to_owned());
    }
    if !is_able {
        return traces;
    }
    rules(&mut traces);
    let pinned = pinned(&Pins::new(pin_path));
    for device in survey.devices.values() {
        traces.programs_at(device, xdp.get(&device.index).copied(), &pinned);
    }
    if let Some(Ok(folder)) = cgroup.map(File::open) {
        traces.sort("cgroup", at_cgroup(&folder), &pinned);
    }
    traces
}

impl Traces {
    /// Adds the devices that others make.
    fn links(&mut self, facts: &Facts) {
        for link in facts.links.values() {
            let (set, word) = match link.name.as_str() {
                "kube-ipvs0" => (&mut self.kube_proxy, "the device"),
                "cilium_host" | "cilium_net" | "cilium_vxlan" => (&mut self.cilium, "the device"),
                "istioin" | "istioout" => (&mut self.meshes, "Istio's device"),
                "nodelocaldns" => {
                    let addresses = facts.addresses.get(&link.index).into_iter().flatten();
                    self.node_local_dns.extend(addresses.map(|found| found.address));
                    continue;
                }
                _ => continue,
            };
            let _ = set.insert(format!("{word} {}", link.name));
        }
    }

    /// Adds the programs at a device, given the id of its XDP program.
    fn programs_at(&mut self, device: &Device, xdp: Option<u32>, pinned: &BTreeSet<String>) {
        let mut names = at_device(device.index);
        let mut behind = at_ingress(device.index);
        for direction in [Direction::Ingress, Direction::Egress] {
            let filters = clsact::filters(device.index, direction).unwrap_or_default();
            let ours = filters.iter().any(clsact::Filter::is_ours);
            names.extend(ours.then(|| "tc_ingress_l2".to_owned()));
            let others = filters.into_iter().filter(|filter| !filter.is_ours());
            let others =
                others.map(|filter| if filter.name.is_empty() { filter.kind } else { filter.name });
            let others: Vec<String> = others.collect();
            if direction == Direction::Ingress {
                behind.extend(others.clone());
            }
            names.extend(others);
        }
        names.extend(xdp.map(program_name));
        self.sort(&device.name, names, pinned);
        behind.retain(|name| !is_ours(name) && !pinned.contains(name));
        if !behind.is_empty() {
            let _ = self.at_ingress.insert(device.name.clone(), behind.into_iter().collect());
        }
    }

    /// Adds programs at a place, those of Sluice and of others separately.
    fn sort(&mut self, place: &str, names: Vec<String>, pinned: &BTreeSet<String>) {
        for name in names {
            if is_ours(&name) || pinned.contains(&name) {
                let _ = self.ours.insert(place.to_owned());
            } else {
                let _ = self.programs.entry(place.to_owned()).or_default().insert(name);
            }
        }
    }
}

/// Adds rules of netfilter and IPVS.
fn rules(traces: &mut Traces) {
    let Traces { kube_proxy, meshes, .. } = traces;
    // A kernel that cannot list them has none.
    if nft::tables().unwrap_or_default().iter().any(|table| table.name == "kube-proxy") {
        let _ = kube_proxy.insert("the nftables table kube-proxy".to_owned());
    }
    for chain in nft::chains().unwrap_or_default() {
        if chain.name == KUBE_PROXY {
            let _ = kube_proxy.insert("the iptables chain KUBE-SERVICES".to_owned());
        } else if chain.name.starts_with(ISTIO) {
            let _ = meshes.insert(format!("Istio's iptables chain {}", chain.name));
        }
    }
    // Legacy iptables, whose tables nft does not show. Listing a table creates it, so only existing
    // ones are listed.
    let legacy = fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
    if legacy.lines().any(|table| table == "nat") {
        let rules = legacy_rules().unwrap_or_default();
        let has = |word: &str| rules.windows(word.len()).any(|window| window == word.as_bytes());
        if has(KUBE_PROXY) {
            let _ = kube_proxy.insert("the legacy iptables chain KUBE-SERVICES".to_owned());
        }
        if has(ISTIO) {
            let _ = meshes.insert("Istio's legacy iptables chains".to_owned());
        }
    }
    let count = kube_proxy::ipvs_services();
    if count != 0 {
        let _ = kube_proxy.insert(format!("{count} services of IPVS"));
    }
}

/// Returns the meshes whose CNI plugins are in the node's configuration.
fn chained_plugins(folder: &Path) -> BTreeSet<String> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
    let mut found = BTreeSet::new();
    for text in texts {
        for (plugin, mesh) in [("istio-cni", "Istio"), ("linkerd-cni", "Linkerd")] {
            if text.contains(&format!("\"{plugin}\"")) {
                let _ =
                    found.insert(format!("{mesh}'s CNI plugin {plugin} in {}", folder.display()));
            }
        }
    }
    found
}

fn joined(found: &BTreeSet<String>) -> String {
    found.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// Returns the checks of the traces.
pub(super) fn checks(traces: &Traces, socket_path: SocketPath) -> Vec<Check> {
    let mut checks = vec![kube_proxy(traces), meshes(traces, socket_path)];
    checks.extend(programs(traces));
    checks.push(if traces.node_local_dns.is_empty() {
        Check::new("node-local-dns", Outcome::Skip, "no device nodelocaldns")
    } else {
        let addresses: Vec<String> =
            traces.node_local_dns.iter().map(ToString::to_string).collect();
        Check::new(
            "node-local-dns",
            Outcome::Yes,
            format!("its addresses are left alone: {}", addresses.join(", ")),
        )
    });
    checks.push(if traces.ours.is_empty() {
        Check::new("sluice", Outcome::Skip, "no program of Sluice is attached yet")
    } else {
        Check::new(
            "sluice",
            Outcome::Yes,
            format!("already attached, and adopted by the next agent: {}", joined(&traces.ours)),
        )
    });
    checks
}

fn kube_proxy(traces: &Traces) -> Check {
    if !traces.kube_proxy.is_empty() {
        return Check::new("kube-proxy", Outcome::Warn, format!("{}: Sluice translates before it", joined(&traces.kube_proxy)))
            .next("start the agent with --takeover, so that the connections of kube-proxy continue; then stop kube-proxy and run `sluice takeover --finish`");
    }
    if traces.is_listed {
        Check::new("kube-proxy", Outcome::Yes, "no trace of it")
    } else {
        Check::new("kube-proxy", Outcome::Skip, "only root can list rules")
    }
}

fn meshes(traces: &Traces, socket_path: SocketPath) -> Check {
    if !traces.meshes.is_empty() {
        let found = joined(&traces.meshes);
        if socket_path == SocketPath::Machine {
            let what =
                format!("{found}: a sidecar proxy would see backends where it expects Services");
            return Check::new("service-mesh", Outcome::Warn, what).next(
                "start the agent without --socket-path machine, so that traffic of sidecar proxies is left to them",
            );
        }
        return Check::new(
            "service-mesh",
            Outcome::Yes,
            format!("{found}: traffic of sidecar proxies is left to them"),
        );
    }
    if traces.is_listed {
        Check::new(
            "service-mesh",
            Outcome::Yes,
            "no trace on the node (sidecars without a CNI plugin leave none)",
        )
    } else {
        Check::new("service-mesh", Outcome::Skip, "only root can list rules")
    }
}

fn programs(traces: &Traces) -> Vec<Check> {
    let is_cilium = |name: &String| name.starts_with("cil_") || name.starts_with("__send");
    let mut cilium = traces.cilium.clone();
    let mut others = Vec::new();
    for (place, names) in &traces.programs {
        let theirs: BTreeSet<String> =
            names.iter().filter(|name| !is_cilium(name)).cloned().collect();
        if theirs.len() < names.len() {
            let _ = cilium.insert(format!("programs on {place}"));
        }
        if !theirs.is_empty() {
            others.push((place, theirs));
        }
    }
    let mut checks = Vec::new();
    if !cilium.is_empty() {
        checks.push(
            Check::new("cilium", Outcome::Warn, joined(&cilium))
                .next("only one of them may balance Services: run Cilium with kubeProxyReplacement=false, or do not install Sluice"),
        );
    }
    for (place, names) in others {
        let at_socket = place == "cgroup";
        checks.push(if at_socket {
            Check::new(
                "foreign-ebpf",
                Outcome::Warn,
                format!(
                    "{} at socket hooks, which see calls before or after Sluice",
                    joined(&names)
                ),
            )
            .of(place)
            .next("check that they do not translate Services")
        } else {
            Check::new(
                "foreign-ebpf",
                Outcome::Yes,
                format!(
                    "{}, which stay; Sluice is first at ingress and last at egress",
                    joined(&names)
                ),
            )
            .of(place)
        });
    }
    if checks.is_empty() {
        checks.push(if traces.is_listed {
            Check::new(
                "foreign-ebpf",
                Outcome::Yes,
                "no programs of others on Sluice's devices and cgroup",
            )
        } else {
            Check::new("foreign-ebpf", Outcome::Skip, "only root can list programs")
        });
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(traces: &Traces, check: &str) -> Vec<Outcome> {
        checks(traces, SocketPath::Machine)
            .iter()
            .filter(|found| found.check == check)
            .map(|found| found.result)
            .collect()
    }

    fn set(words: &[&str]) -> BTreeSet<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn a_clean_node_has_no_trace_of_anybody() {
        let traces = Traces { is_listed: true, ..Traces::default() };
        assert!(
            checks(&traces, SocketPath::Machine)
                .iter()
                .all(|check| matches!(check.result, Outcome::Yes | Outcome::Skip))
        );
        let blind = Traces::default();
        assert_eq!(outcome(&blind, "kube-proxy"), [Outcome::Skip]);
        assert_eq!(outcome(&blind, "foreign-ebpf"), [Outcome::Skip]);
    }

    #[test]
    fn whoever_else_balances_is_warned_of_with_what_to_do() {
        let traces = Traces {
            is_listed: true,
            kube_proxy: set(&["the device kube-ipvs0"]),
            meshes: set(&["Istio's iptables chain ISTIO_POSTRT"]),
            programs: [
                ("eth0".to_owned(), set(&["cil_from_netdev"])),
                ("lxc1".to_owned(), set(&["meter"])),
                ("cgroup".to_owned(), set(&["other_connect4"])),
            ]
            .into(),
            ..Traces::default()
        };
        for check in ["kube-proxy", "service-mesh", "cilium"] {
            assert_eq!(outcome(&traces, check), [Outcome::Warn], "{check}");
        }
        assert_eq!(outcome(&traces, "foreign-ebpf"), [Outcome::Warn, Outcome::Yes]);
        let beside_a_mesh = checks(&traces, SocketPath::All);
        assert!(
            beside_a_mesh
                .iter()
                .any(|check| check.check == "service-mesh" && check.result == Outcome::Yes)
        );
        assert!(
            checks(&traces, SocketPath::Machine)
                .iter()
                .all(|check| check.result != Outcome::Warn || check.next.is_some())
        );
    }

    #[test]
    fn plugins_of_meshes_are_found_in_a_nodes_configuration() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(
            folder.path().join("10-x.conflist"),
            r#"{"plugins": [{"type": "ptp"}, {"type": "istio-cni"}]}"#,
        )
        .expect("written");
        let found = chained_plugins(folder.path());
        assert!(
            found.len() == 1 && found.iter().all(|word| word.starts_with("Istio's CNI plugin")),
            "{found:?}"
        );
    }
}
