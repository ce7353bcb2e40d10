//! Finds kube-proxy on this node: its rules in netfilter, its services in IPVS, its process.

pub(crate) mod legacy;
pub(crate) mod rules;

use std::fs;

/// The name of its process.
const PROCESS: &str = "kube-proxy";

/// Returns the number of IPVS services in this network namespace.
pub(crate) fn ipvs_services() -> usize {
    let servers = fs::read_to_string("/proc/net/ip_vs").unwrap_or_default();
    let is_server =
        |line: &&str| ["TCP ", "UDP ", "SCTP"].iter().any(|protocol| line.starts_with(protocol));
    servers.lines().filter(is_server).count()
}

/// Describes the rules of kube-proxy by which it would serve after a release, or returns [`None`]
/// if there are none.
///
/// # Errors
///
/// Fails if the kernel refuses a listing.
pub(crate) fn served_by() -> anyhow::Result<Option<String>> {
    let found = rules::listed()?;
    Ok(if found.balances() { found.words() } else { None })
}

/// Whether kube-proxy has rules of its iptables mode here.
///
/// # Errors
///
/// Fails if the kernel refuses a listing.
pub(crate) fn served_in_iptables_mode() -> anyhow::Result<bool> {
    Ok(rules::listed()?.is_iptables())
}

/// Whether this network namespace has IPVS services.
pub(crate) fn serves_by_ipvs() -> bool {
    ipvs_services() != 0
}

/// Returns the id of a visible process of kube-proxy in this network namespace.
pub(crate) fn running() -> Option<String> {
    process(PROCESS)
}

/// Returns the id of a process with this name in this network namespace, if it is visible.
fn process(name: &str) -> Option<String> {
    let namespace = |id: &str| fs::read_link(format!("/proc/{id}/ns/net")).ok();
    let own = namespace("self");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut ids = processes.filter_map(|entry| entry.file_name().into_string().ok());
    ids.find(|id| {
        id.bytes().all(|byte| byte.is_ascii_digit())
            && fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|comm| comm.trim() == name)
            && namespace(id) == own
    })
}
