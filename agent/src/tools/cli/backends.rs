//! `sluice backends`: every backend with its share of the slots and its counters.

use std::path::Path;

use anyhow::bail;
use serde::Serialize;

use super::Outcome;
use super::table::{Format, Table, bytes, failures, percent, render};
use crate::node::dataplane::Failures;
use crate::node::view::{BackendView, PortName, View};

/// A backend.
#[derive(Clone, Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    name: PortName,
    backend: String,
    id: u32,
    /// Percent of the slots.
    share: f64,
    local: bool,
    /// `serving`, or `draining`: kept for connections that have not ended.
    state: &'static str,
    forward_packets: u64,
    forward_bytes: u64,
    reply_packets: u64,
    reply_bytes: u64,
    flows: u64,
    calls: u64,
    /// TCP resets and SCTP aborts from clients, and to them.
    forward_resets: u64,
    reply_resets: u64,
    /// Flows that failed to begin.
    failures: Failures,
    /// Counters of connections that are translated at the socket, from the kernel's own figures.
    sockets: Sockets,
}

/// What the socket path counts of connections.
#[derive(Clone, Copy, Debug, Serialize)]
struct Sockets {
    connections: u64,
    closed: u64,
    failed: u64,
    /// Those of `failed` that were answered with a reset.
    refused: u64,
    resets: u64,
    sent_bytes: u64,
    received_bytes: u64,
    sent_segments: u64,
    received_segments: u64,
    retransmitted_segments: u64,
    /// The mean of the last round-trip times of ended connections, in microseconds.
    rtt_us: u64,
}

impl From<&BackendView> for Sockets {
    fn from(backend: &BackendView) -> Self {
        let counted = backend.sockets;
        Self {
            connections: counted.connections,
            closed: counted.closed,
            failed: counted.failed,
            refused: backend.failures.socket_refused,
            resets: counted.resets,
            sent_bytes: counted.sent_bytes,
            received_bytes: counted.received_bytes,
            sent_segments: counted.sent_segments,
            received_segments: counted.received_segments,
            retransmitted_segments: counted.retransmitted_segments,
            rtt_us: counted.rtt_us.checked_div(counted.rtt_count).unwrap_or_default(),
        }
    }
}

/// Prints the backends of one service, or of all.
///
/// # Errors
///
/// When the maps cannot be read, or no service has the name.
pub(super) fn run(
    pin_path: &Path,
    service: Option<&str>,
    format: Format,
) -> anyhow::Result<Outcome> {
    let view = View::read(pin_path)?;
    if let Some(word) = service
        && !view.image.names.values().any(|name| PortName::from(name).is(word))
    {
        bail!(
            "no service {word:?} in the maps; `sluice services` lists them (name, namespace/name, name:port)"
        );
    }
    let mut rows = rows(&view, service);
    rows.sort_by(|a, b| (&a.name, &a.backend).cmp(&(&b.name, &b.backend)));
    Ok(render(format, &rows, |rows| table(rows, format == Format::Wide).text())?.into())
}

/// Returns the backends of one service, or of all.
fn rows(view: &View, service: Option<&str>) -> Vec<Row> {
    let mut rows = Vec::new();
    for backend in view.backends() {
        let Some(name) = view.name(backend.service_port) else { continue };
        if service.is_some_and(|word| !name.is(word)) {
            continue;
        }
        let slots = view.slots(backend.service_port);
        let own = slots.iter().filter(|id| **id == backend.id).count();
        let counted = backend.counters;
        rows.push(Row {
            name,
            backend: backend.address.to_string(),
            id: backend.id,
            share: percent(own as u64, slots.len() as u64),
            local: backend.local,
            state: if backend.serving { "serving" } else { "draining" },
            forward_packets: counted.forward_packets,
            forward_bytes: counted.forward_bytes,
            reply_packets: counted.reply_packets,
            reply_bytes: counted.reply_bytes,
            flows: counted.flows,
            calls: counted.calls,
            forward_resets: counted.forward_resets,
            reply_resets: counted.reply_resets,
            failures: backend.failures,
            sockets: (&backend).into(),
        });
    }
    rows
}

fn table(rows: &[Row], is_wide: bool) -> Table {
    let mut headers =
        vec!["SERVICE", "BACKEND", "STATE", "SHARE", "OPENED", "FAILED", "RESETS", "IN", "OUT"];
    if is_wide {
        headers.extend(["PROTO", "ID", "LOCAL", "OPEN", "FLOWS", "CALLS", "PACKETS", "SEGMENTS"]);
    }
    let mut table = Table::new(&headers);
    for row in rows {
        let (name, sockets) = (&row.name, &row.sockets);
        let failed = row.failures.flows() + sockets.failed;
        let mut cells = vec![
            format!("{}/{}:{}", name.namespace, name.service, name.port),
            row.backend.clone(),
            row.state.to_owned(),
            format!("{:.0}%", row.share),
            (row.flows + sockets.connections).to_string(),
            failures(failed, row.flows + sockets.connections + sockets.failed),
            (row.forward_resets + row.reply_resets + sockets.resets).to_string(),
            bytes(row.forward_bytes + sockets.sent_bytes),
            bytes(row.reply_bytes + sockets.received_bytes),
        ];
        if is_wide {
            cells.extend([
                name.protocol.clone(),
                row.id.to_string(),
                if row.local { "yes" } else { "no" }.to_owned(),
                sockets.connections.saturating_sub(sockets.closed).to_string(),
                row.flows.to_string(),
                row.calls.to_string(),
                (row.forward_packets + row.reply_packets).to_string(),
                (sockets.sent_segments + sockets.received_segments).to_string(),
            ]);
        }
        table.row(cells);
    }
    table
}
