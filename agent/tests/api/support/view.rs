//! The content of a node's maps, as `sluice services` and `sluice backends` print it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sluice_lab::Node;

use super::wait_for;

/// The time that a change may take to reach the maps. Controllers gather changes and back off; our
/// own share is small.
pub(crate) const IN_TIME: Duration = Duration::from_secs(20);

/// Frontend (`10.96.1.1:80`) -> the backends that take new flows.
pub(crate) type Programmed = BTreeMap<String, BTreeSet<String>>;

#[derive(Deserialize)]
struct ServiceRow {
    namespace: String,
    service: String,
    port: u16,
    protocol: String,
    /// Addresses, and `*:PORT` for a node port.
    vips: Vec<String>,
}

#[derive(Deserialize)]
struct BackendRow {
    namespace: String,
    service: String,
    port: u16,
    protocol: String,
    backend: SocketAddr,
    share: f64,
}

/// Returns what is programmed for one namespace except for node ports, or an error if nothing can
/// be read.
pub(crate) fn programmed(node: &Node, namespace: &str) -> Result<Programmed, String> {
    let services: Vec<ServiceRow> = rows(node, &["services", "-o", "json", "-n", namespace])?;
    let backends: Vec<BackendRow> = rows(node, &["backends", "-o", "json"])?;
    let mut all = Programmed::new();
    for service in services {
        for vip in service.vips.iter().filter(|vip| !vip.starts_with('*')) {
            let vip: IpAddr = vip.parse().map_err(|error| format!("{vip}: {error}"))?;
            // A service port has an id in each family, so names alone are ambiguous.
            let own = backends
                .iter()
                .filter(|row| {
                    (&row.namespace, &row.service, row.port, &row.protocol)
                        == (&service.namespace, &service.service, service.port, &service.protocol)
                })
                .filter(|row| row.share > 0.0 && row.backend.is_ipv6() == vip.is_ipv6());
            let frontend = SocketAddr::new(vip, service.port).to_string();
            let _ = all.insert(frontend, own.map(|row| row.backend.to_string()).collect());
        }
    }
    Ok(all)
}

fn rows<T: DeserializeOwned>(node: &Node, args: &[&str]) -> Result<Vec<T>, String> {
    #[derive(Deserialize)]
    struct List<T> {
        items: Vec<T>,
    }
    let text = node.sluice(args).map_err(|error| format!("{error:#}"))?;
    let list: List<T> =
        serde_json::from_str(&text).map_err(|error| format!("{error} in {text}"))?;
    Ok(list.items)
}

/// Waits until exactly this is programmed for a namespace.
#[track_caller]
pub(crate) fn expect(node: &Node, namespace: &str, wanted: &[(&str, &[&str])]) {
    let wanted: Programmed = wanted
        .iter()
        .map(|(vip, backends)| {
            ((*vip).to_owned(), backends.iter().map(|&backend| backend.to_owned()).collect())
        })
        .collect();
    wait_for(&format!("{wanted:?} on {}", node.name()), IN_TIME, || {
        let found = programmed(node, namespace)?;
        if found == wanted { Ok(()) } else { Err(format!("{found:?}")) }
    });
}

/// Returns the output of `sluice status`.
#[track_caller]
pub(crate) fn status(node: &Node) -> Value {
    wait_for("a status", Duration::from_secs(10), || {
        let output =
            node.sluice_output(&["status", "-o", "json"]).map_err(|error| format!("{error:#}"))?;
        serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
    })
}

/// Returns the agent's own description of its problem with the API server, or [`None`] if it has
/// none.
#[track_caller]
pub(crate) fn problem(node: &Node) -> Option<String> {
    status(node).pointer("/last/sources/0/problem").and_then(Value::as_str).map(ToOwned::to_owned)
}

/// Waits until the agent reports a problem with the API server, or none.
#[track_caller]
pub(crate) fn expect_problem(node: &Node, wanted: bool, timeout: Duration) {
    wait_for(&format!("a problem: {wanted}"), timeout, || {
        let found = problem(node);
        if found.is_some() == wanted { Ok(()) } else { Err(format!("{found:?}")) }
    });
}
