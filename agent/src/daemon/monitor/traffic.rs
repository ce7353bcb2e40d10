//! Traffic of the node, of Services and of backends, as series.
//!
//! Connections that were translated at connect() are counted by their sockets (`path="socket"`),
//! all else packet by packet (`path="packet"`). One metric has both, and nothing is in both.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;

use super::exporter::{Labels, Series, Writer};
use crate::node::view::{BackendView, PortName, Sums, View};

/// Backends that have series of their own; the traffic of the others is in their Services' series.
const BACKENDS_MAX: usize = 2_000;

/// The finest thing that has series of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Detail {
    /// The node's sums.
    Node,
    /// Each port of a Service as well.
    #[default]
    Service,
    /// Each backend as well.
    Backend,
}

/// The path that counted.
const PACKET: &str = "packet";
const SOCKET: &str = "socket";
/// From clients, and to them.
const FORWARD: Option<&str> = Some("forward");
const REPLY: Option<&str> = Some("reply");

/// A value with the labels `path` and `direction`.
type Part = (&'static str, Option<&'static str>, u64);

/// A metric: its name after the prefix, its help and its values.
struct Metric {
    name: &'static str,
    help: &'static str,
    parts: fn(&Sums) -> Vec<Part>,
}

const METRICS: [Metric; 8] = [
    Metric {
        name: "opened",
        help: "Flows opened (packet), and TCP connections established (socket)",
        parts: |sums| {
            vec![(PACKET, None, sums.packets.flows), (SOCKET, None, sums.sockets.connections)]
        },
    },
    Metric {
        name: "closed",
        help: "TCP connections that have ended (socket)",
        parts: |sums| vec![(SOCKET, None, sums.sockets.closed)],
    },
    Metric {
        name: "failed",
        help: "Flows that were refused, not answered or unreachable (packet), and TCP connections \
               that were refused or not answered (socket)",
        parts: |sums| {
            vec![(PACKET, None, sums.failures.flows()), (SOCKET, None, sums.sockets.failed)]
        },
    },
    Metric {
        name: "resets",
        help: "Resets along flows by their direction (packet), and connections that ended without \
               both sides' FIN (socket)",
        parts: |sums| {
            vec![
                (PACKET, FORWARD, sums.packets.forward_resets),
                (PACKET, REPLY, sums.packets.reply_resets),
                (SOCKET, None, sums.sockets.resets),
            ]
        },
    },
    Metric {
        name: "calls",
        help: "Calls that were translated: connects of TCP, datagrams of UDP (socket)",
        parts: |sums| vec![(SOCKET, None, sums.packets.calls)],
    },
    Metric {
        name: "packets",
        help: "Packets along flows (packet), and TCP segments of connections (socket)",
        parts: |sums| {
            vec![
                (PACKET, FORWARD, sums.packets.forward_packets),
                (PACKET, REPLY, sums.packets.reply_packets),
                (SOCKET, FORWARD, sums.sockets.sent_segments),
                (SOCKET, REPLY, sums.sockets.received_segments),
            ]
        },
    },
    Metric {
        name: "bytes",
        help: "Bytes of those packets from the IP header on (packet), and payload of connections \
               (socket)",
        parts: |sums| {
            vec![
                (PACKET, FORWARD, sums.packets.forward_bytes),
                (PACKET, REPLY, sums.packets.reply_bytes),
                (SOCKET, FORWARD, sums.sockets.sent_bytes),
                (SOCKET, REPLY, sums.sockets.received_bytes),
            ]
        },
    },
    Metric {
        name: "retransmitted_packets",
        help: "Segments from clients that were sent again (socket)",
        parts: |sums| vec![(SOCKET, FORWARD, sums.sockets.retransmitted_segments)],
    },
];

/// Help of the round-trip times.
const RTT: &str = "Smoothed round-trip times of connections when they ended (socket). The kernel \
                   programs keep sum and count, so there is one bucket";

/// Traffic of one level.
struct Level {
    prefix: &'static str,
    all: Vec<(Labels, Sums)>,
    /// Whether values of zero are series too.
    has_zeros: bool,
}

/// Traffic at every level that was asked for.
pub(super) struct Traffic {
    levels: Vec<Level>,
    left_out: usize,
}

impl Traffic {
    pub(super) fn of(view: &View, detail: Detail) -> Self {
        let backends = view.backends();
        let mut node = Sums::default();
        for backend in &backends {
            node.add(backend);
        }
        let mut levels =
            vec![Level { prefix: "node", all: vec![(Labels::new(), node)], has_zeros: true }];
        if detail >= Detail::Service {
            let all = services(view, &backends);
            levels.push(Level { prefix: "service", all, has_zeros: false });
        }
        let mut left_out = 0;
        if detail >= Detail::Backend {
            // The same ones from one scrape to the next.
            let serving = || backends.iter().filter(|backend| backend.serving);
            let all: Vec<(Labels, Sums)> =
                serving().filter_map(|it| of_backend(view, it)).take(BACKENDS_MAX).collect();
            left_out = serving().count() - all.len();
            levels.push(Level { prefix: "backend", all, has_zeros: false });
        }
        Self { levels, left_out }
    }

    pub(super) fn write(&self, writer: &mut Writer<'_, '_>) -> fmt::Result {
        for Level { prefix, all, has_zeros } in &self.levels {
            for metric in &METRICS {
                let mut series = series(all, metric);
                series.retain(|(_, value)| *has_zeros || *value != 0);
                writer.counters(&format!("{prefix}_{}", metric.name), metric.help, &series)?;
            }
            let round_trips: Vec<(Labels, f64, u64)> = all
                .iter()
                .filter(|(_, sums)| *has_zeros || sums.sockets.rtt_count != 0)
                .map(|(labels, sums)| {
                    let seconds = Duration::from_micros(sums.sockets.rtt_us).as_secs_f64();
                    (with(labels, SOCKET, None), seconds, sums.sockets.rtt_count)
                })
                .collect();
            writer.one_bucket(&format!("{prefix}_rtt_seconds"), RTT, &round_trips)?;
        }
        writer.gauges(
            "backends_left_out",
            "Backends that are counted and have no series of their own, though they are asked for",
            &vec![(Labels::new(), self.left_out as u64)],
        )
    }
}

fn services(view: &View, backends: &[BackendView]) -> Vec<(Labels, Sums)> {
    let named = |(id, sums)| Some((labels_of(&view.name(id)?, family(view, id)), sums));
    Sums::by_service_port(backends).into_iter().filter_map(named).collect()
}

fn of_backend(view: &View, backend: &BackendView) -> Option<(Labels, Sums)> {
    let id = backend.service_port;
    let mut labels = labels_of(&view.name(id)?, family(view, id));
    labels.push(("backend", backend.address.to_string()));
    let mut sums = Sums::default();
    sums.add(backend);
    Some((labels, sums))
}

fn family(view: &View, service_port: u32) -> u8 {
    view.image.names.get(&service_port).map_or(0, |name| name.family)
}

fn labels_of(name: &PortName, family: u8) -> Labels {
    let port = if name.label.is_empty() { name.port.to_string() } else { name.label.clone() };
    vec![
        ("namespace", name.namespace.clone()),
        ("service", name.service.clone()),
        ("port", port),
        ("protocol", name.protocol.clone()),
        ("family", if family == 6 { "IPv6" } else { "IPv4" }.to_owned()),
    ]
}

fn with(labels: &Labels, path: &str, direction: Option<&str>) -> Labels {
    let mut labels = labels.clone();
    labels.push(("path", path.to_owned()));
    labels.extend(direction.map(|direction| ("direction", direction.to_owned())));
    labels
}

fn series(all: &[(Labels, Sums)], metric: &Metric) -> Series {
    let mut series = Series::new();
    for (labels, sums) in all {
        for (path, direction, value) in (metric.parts)(sums) {
            series.push((with(labels, path, direction), value));
        }
    }
    series
}
