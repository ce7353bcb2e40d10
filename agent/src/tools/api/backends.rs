//! Every backend with its share of the slots and its counters.

use schemars::JsonSchema;
use serde::Serialize;

use crate::daemon::source::names::Names;
use crate::node::dataplane::Failures;
use crate::node::view::{BackendView, PortName, View};
use crate::tools::api::kinds;
use crate::tools::units::percent;

/// An endpoint of a service port.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Backend {
    #[serde(flatten)]
    pub(crate) name: PortName,
    /// The address and port.
    #[serde(rename = "backend")]
    pub(crate) address: String,
    /// The pod, as `namespace/name`; null if no source names it.
    pub(crate) pod: Option<String>,
    /// The pod's node; null if no source names it.
    pub(crate) node: Option<String>,
    /// The number of the backend in its family's map.
    pub(crate) id: u32,
    /// Percent of the slots.
    pub(crate) share: f64,
    /// Whether it is on this node.
    pub(crate) local: bool,
    /// `serving`, or `draining`: kept for connections that have not ended.
    pub(crate) state: &'static str,
    /// Packets from clients.
    pub(crate) forward_packets: u64,
    /// Bytes from clients.
    pub(crate) forward_bytes: u64,
    /// Packets to clients.
    pub(crate) reply_packets: u64,
    /// Bytes to clients.
    pub(crate) reply_bytes: u64,
    /// Flows that were opened per packet.
    pub(crate) flows: u64,
    /// Calls that were translated at the socket.
    pub(crate) calls: u64,
    /// TCP resets and SCTP aborts from clients.
    pub(crate) forward_resets: u64,
    /// TCP resets and SCTP aborts to clients.
    pub(crate) reply_resets: u64,
    /// Flows that failed to begin.
    pub(crate) failures: Failures,
    /// Counters of connections that are translated at the socket, from the kernel's own figures.
    pub(crate) sockets: Sockets,
}

kinds! { Backend = "Backend"; }

/// What the socket path counts of connections.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub(crate) struct Sockets {
    /// Connections that were established.
    pub(crate) connections: u64,
    /// Connections that have ended.
    pub(crate) closed: u64,
    /// Connections that were refused or not answered.
    pub(crate) failed: u64,
    /// Those of them that were answered with a reset.
    pub(crate) refused: u64,
    /// Connections that were reset.
    pub(crate) resets: u64,
    /// Payload from clients.
    pub(crate) sent_bytes: u64,
    /// Payload to clients.
    pub(crate) received_bytes: u64,
    /// Segments from clients.
    pub(crate) sent_segments: u64,
    /// Segments to clients.
    pub(crate) received_segments: u64,
    /// Segments from clients that were sent again.
    pub(crate) retransmitted_segments: u64,
    /// The mean of the last round-trip times of ended connections, in microseconds.
    pub(crate) rtt_us: u64,
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

/// Returns the backends of the service ports that a predicate takes, by name and address.
pub(crate) fn backends(
    view: &View,
    names: &Names,
    takes: impl Fn(&PortName) -> bool,
) -> Vec<Backend> {
    let mut rows = Vec::new();
    for backend in view.backends() {
        let Some(name) = view.name(backend.service_port).filter(&takes) else { continue };
        let slots = view.slots(backend.service_port);
        let own = slots.iter().filter(|id| **id == backend.id).count();
        let counted = backend.counters;
        let pod = names.endpoint(&name.namespace, backend.address.ip());
        rows.push(Backend {
            name,
            address: backend.address.to_string(),
            pod: pod.map(|pod| pod.name.to_string()),
            node: pod.and_then(|pod| pod.node.clone()),
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
    rows.sort_by(|a, b| (&a.name, &a.address).cmp(&(&b.name, &b.address)));
    rows
}
