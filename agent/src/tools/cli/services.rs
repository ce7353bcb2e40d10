//! `sluice services`: every service port with its VIPs and counters.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use super::Outcome;
use super::table::{Format, Table, bytes, failures, render};
use crate::node::dataplane::Failures;
use crate::node::view::{PortName, Sums, View, kind};

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
    /// Packets and bytes along flows.
    packets: u64,
    bytes: u64,
    /// Flows that failed to begin.
    failures: Failures,
    /// TCP connections translated at the socket: those established and those that failed, and
    /// their payload.
    connections: u64,
    failed: u64,
    socket_bytes: u64,
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
    Ok(render(format, &rows, |rows| table(rows, format == Format::Wide).text())?.into())
}

/// Returns the service ports of one namespace, or of all.
fn rows(view: &View, namespace: Option<&str>) -> Vec<Row> {
    let sums = Sums::by_service_port(&view.backends());
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
        let Sums { packets, sockets, failures } = sums.get(id).copied().unwrap_or_default();
        rows.push(Row {
            name,
            id: *id,
            vips: vips.iter().map(|(vip, _)| vip.clone()).collect(),
            kinds: kinds.into_iter().collect(),
            backends: view.selected(*id).len(),
            slots: slots.len(),
            flows: packets.flows,
            calls: packets.calls,
            packets: packets.forward_packets + packets.reply_packets,
            bytes: packets.forward_bytes + packets.reply_bytes,
            failures,
            connections: sockets.connections,
            failed: sockets.failed,
            socket_bytes: sockets.sent_bytes + sockets.received_bytes,
        });
    }
    rows
}

fn table(rows: &[Row], is_wide: bool) -> Table {
    let mut headers =
        vec!["NAMESPACE", "NAME", "PORT", "VIPS", "BACKENDS", "OPENED", "FAILED", "BYTES"];
    if is_wide {
        headers.extend(["PROTO", "KIND", "ID", "SLOTS", "FLOWS", "CALLS", "PACKETS"]);
    }
    let mut table = Table::new(&headers);
    for row in rows {
        let vips = match &row.vips[..] {
            [first, more @ ..] if !is_wide && !more.is_empty() => {
                format!("{first},+{}", more.len())
            }
            all => all.join(","),
        };
        let failed = row.failures.flows() + row.failed;
        let mut cells = vec![
            row.name.namespace.clone(),
            row.name.service.clone(),
            row.name.port.to_string(),
            vips,
            row.backends.to_string(),
            (row.flows + row.connections).to_string(),
            failures(failed, row.flows + row.connections + row.failed),
            bytes(row.bytes + row.socket_bytes),
        ];
        if is_wide {
            cells.extend([
                row.name.protocol.clone(),
                row.kinds.join(","),
                row.id.to_string(),
                row.slots.to_string(),
                row.flows.to_string(),
                row.calls.to_string(),
                row.packets.to_string(),
            ]);
        }
        table.row(cells);
    }
    table
}
