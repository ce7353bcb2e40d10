//! `sluice services`: every service port with its VIPs and counters.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;

use super::Outcome;
use super::table::{Format, Table, bytes, render};
use crate::node::view::{PortName, View, kind};

/// A service port in one family.
#[derive(Clone, Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    name: PortName,
    id: u32,
    vips: Vec<String>,
    kinds: Vec<&'static str>,
    /// The number of backends that get new flows of any class.
    backends: usize,
    slots: usize,
    flows: u64,
    calls: u64,
    packets: u64,
    bytes: u64,
}

/// Prints the services.
///
/// # Errors
///
/// When the maps cannot be read.
pub(super) fn run(
    pin_path: &Path,
    namespace: Option<&str>,
    format: Format,
) -> anyhow::Result<Outcome> {
    let view = View::read(pin_path)?;
    let mut rows = rows(&view, namespace);
    rows.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    Ok(render(format, &rows, |rows| table(rows).text())?.into())
}

/// Returns the service ports of one namespace, or of all.
fn rows(view: &View, namespace: Option<&str>) -> Vec<Row> {
    let mut sums: BTreeMap<u32, [u64; 4]> = BTreeMap::new();
    for backend in view.backends() {
        let counted = backend.counters;
        let [flows, calls, packets, bytes] = sums.entry(backend.service_port).or_default();
        *flows += counted.flows;
        *calls += counted.calls;
        *packets += counted.forward_packets + counted.reply_packets;
        *bytes += counted.forward_bytes + counted.reply_bytes;
    }
    let vips = view.vips();
    let mut rows = Vec::new();
    for (id, name) in &view.image.names {
        let name = PortName::from(name);
        if namespace.is_some_and(|namespace| namespace != name.namespace) {
            continue;
        }
        let vips = vips.get(id).map_or(&[][..], Vec::as_slice);
        let kinds: BTreeSet<&str> = vips.iter().map(|(_, number)| kind(*number)).collect();
        let slots = view.slots(*id);
        let [flows, calls, packets, bytes] = sums.get(id).copied().unwrap_or_default();
        rows.push(Row {
            name,
            id: *id,
            vips: vips.iter().map(|(vip, _)| vip.clone()).collect(),
            kinds: kinds.into_iter().collect(),
            backends: view.selected(*id).len(),
            slots: slots.len(),
            flows,
            calls,
            packets,
            bytes,
        });
    }
    rows
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&[
        "NAMESPACE",
        "NAME",
        "PORT",
        "PROTO",
        "VIPS",
        "KIND",
        "BACKENDS",
        "SLOTS",
        "FLOWS",
        "CALLS",
        "PACKETS",
        "BYTES",
    ]);
    for row in rows {
        table.row([
            row.name.namespace.clone(),
            row.name.service.clone(),
            row.name.port.to_string(),
            row.name.protocol.clone(),
            row.vips.join(","),
            row.kinds.join(","),
            row.backends.to_string(),
            row.slots.to_string(),
            row.flows.to_string(),
            row.calls.to_string(),
            row.packets.to_string(),
            bytes(row.bytes),
        ]);
    }
    table
}
