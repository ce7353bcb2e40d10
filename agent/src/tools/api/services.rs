//! Every service port with its frontends and counters.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Serialize;

use crate::node::dataplane::Failures;
use crate::node::view::{PortName, Sums, View, kind};
use crate::tools::api::kinds;

/// A Service's port in one address family.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Service {
    #[serde(flatten)]
    pub(crate) name: PortName,
    /// The number of the service port in the maps.
    pub(crate) id: u32,
    /// The addresses; `*:PORT` for a node port.
    pub(crate) vips: Vec<String>,
    /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalIP`.
    pub(crate) kinds: Vec<&'static str>,
    /// The number of backends that get new flows of any class.
    pub(crate) backends: usize,
    /// The size of the table that shares flows out.
    pub(crate) slots: usize,
    /// Flows that were opened per packet.
    pub(crate) flows: u64,
    /// Calls that were translated at the socket.
    pub(crate) calls: u64,
    /// Packets along flows.
    pub(crate) packets: u64,
    /// Bytes along flows.
    pub(crate) bytes: u64,
    /// Flows that failed to begin.
    pub(crate) failures: Failures,
    /// TCP connections that were translated at the socket and established.
    pub(crate) connections: u64,
    /// TCP connections that were translated at the socket and failed.
    pub(crate) failed: u64,
    /// The payload of connections that were translated at the socket.
    pub(crate) socket_bytes: u64,
}

kinds! { Service = "Service"; }

/// Returns the service ports that a predicate takes, by name.
pub(crate) fn services(view: &View, takes: impl Fn(&PortName) -> bool) -> Vec<Service> {
    let sums = Sums::by_service_port(&view.backends());
    let vips = view.vips();
    let mut rows = Vec::new();
    for (id, name) in &view.image.names {
        let name = PortName::from(name);
        if !takes(&name) {
            continue;
        }
        let vips = vips.get(id).map_or(&[][..], Vec::as_slice);
        let kinds: BTreeSet<&str> = vips.iter().map(|(_, number)| kind(*number)).collect();
        let slots = view.slots(*id);
        let Sums { packets, sockets, failures } = sums.get(id).copied().unwrap_or_default();
        rows.push(Service {
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
    rows.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    rows
}
