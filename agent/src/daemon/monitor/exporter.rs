//! Exports what the maps and the status hold as metrics.
//!
//! Everything is read when a scraper asks, so nothing is counted twice, and nothing costs anything
//! without a scraper. The number of series is bounded: by the Services, by [`BACKENDS_MAX`] for
//! backends, and by the maps for the rest.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Bytes;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use sluice_common::Reason;
use sluice_common::abi::{BackendCounters, SocketCounters};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::metrics::Metrics;
use crate::node::status::{self, Status};
use crate::node::view::{BackendView, PortName, View};

/// The most backends with series of their own. The traffic of the others is in their Services'
/// series.
pub(super) const BACKENDS_MAX: usize = 2_000;

/// The longest time between two readings of the maps.
const PAUSE: Duration = Duration::from_secs(1);

/// A metric's labels.
type Labels = Vec<(&'static str, String)>;
/// Labels and value of each series of a metric.
type Series = Vec<(Labels, u64)>;

/// Reads maps and status for a scrape.
#[derive(Debug)]
pub(super) struct Exporter {
    metrics: Arc<Metrics>,
    pin_path: PathBuf,
    state_dir: PathBuf,
    shared: Shared,
}

impl Exporter {
    pub(super) fn new(metrics: Arc<Metrics>, pin_path: PathBuf, state_dir: PathBuf) -> Self {
        Self { metrics, pin_path, state_dir, shared: Shared::default() }
    }

    /// Returns all metrics in the text format of OpenMetrics.
    pub(super) async fn text(&self) -> Result<Bytes, fmt::Error> {
        self.shared.get(|| tokio::task::block_in_place(|| self.write())).await
    }

    fn write(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, self.metrics.registry())?;
        let mut registry = Registry::with_prefix("sluice");
        registry.register_collector(Box::new(self.read()));
        // The joined text has one end mark.
        let own = text.strip_suffix("# EOF\n").unwrap_or(&text).len();
        text.truncate(own);
        encode(&mut text, &registry)?;
        Ok(text)
    }

    fn read(&self) -> Found {
        let view = View::read(&self.pin_path);
        if let Err(error) = &view {
            tracing::debug!("cannot read the maps for a scrape: {error:#}");
        }
        Found { view: view.ok(), status: status::read(&self.state_dir) }
    }
}

/// The last text, shared by all scrapers that asked while it was made.
///
/// Reading the maps takes memory and time, so there is only one reader at a time. The next one
/// begins after as long as the last one took, [`PAUSE`] at most: constant scraping takes half of
/// one CPU. A text is never older than its request, but for the time that it takes to make one.
#[derive(Debug, Default)]
struct Shared(Arc<Mutex<Option<Last>>>);

/// A text, and when it was made.
#[derive(Debug)]
struct Last {
    text: Bytes,
    made: Instant,
    /// No other text is made before this.
    next: Instant,
}

impl Shared {
    async fn get(
        &self,
        make: impl FnOnce() -> Result<String, fmt::Error>,
    ) -> Result<Bytes, fmt::Error> {
        let asked = Instant::now();
        let mut last = self.0.lock().await;
        if let Some(last) = &*last {
            if asked <= last.made {
                return Ok(last.text.clone());
            }
            tokio::time::sleep_until(last.next).await;
        }
        let started = Instant::now();
        let text = Bytes::from(make()?);
        let made = Instant::now();
        let next = made + started.elapsed().min(PAUSE);
        *last = Some(Last { text: text.clone(), made, next });
        // It has megabytes on a large node, and nobody needs it any more.
        let kept = Arc::clone(&self.0);
        let _forgetting = tokio::spawn(async move {
            tokio::time::sleep_until(next).await;
            let _ = kept.lock().await.take_if(|last| last.next <= next);
        });
        Ok(text)
    }
}

/// What was found at the time of a request.
#[derive(Debug)]
struct Found {
    view: Option<View>,
    status: Option<Status>,
}

/// Writes metrics one by one.
struct Writer<'a, 'e> {
    encoder: &'a mut DescriptorEncoder<'e>,
}

impl Writer<'_, '_> {
    fn counters(&mut self, name: &str, help: &str, series: &Series) -> fmt::Result {
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in series {
            ConstCounter::new(*value).encode(metric.encode_family(&labels.as_slice())?)?;
        }
        Ok(())
    }

    /// Writes the sums of round-trip times.
    fn seconds(&mut self, name: &str, help: &str, all: &[(Labels, Sums)]) -> fmt::Result {
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, counted) in all {
            let seconds = Duration::from_micros(counted.sockets.rtt_us).as_secs_f64();
            ConstCounter::new(seconds).encode(metric.encode_family(&labels.as_slice())?)?;
        }
        Ok(())
    }

    fn gauges(&mut self, name: &str, help: &str, series: &Series) -> fmt::Result {
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in series {
            ConstGauge::new(*value).encode(metric.encode_family(&labels.as_slice())?)?;
        }
        Ok(())
    }
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

/// A count of traffic.
enum Count {
    /// From clients, and to them.
    Both(u64, u64),
    One(u64),
}

/// The counters of a backend, or of all backends of a service.
#[derive(Clone, Copy, Default)]
struct Sums {
    /// Counters per packet, and the calls.
    packets: BackendCounters,
    /// Counters of connections that are translated at the socket.
    sockets: SocketCounters,
}

/// A counter of traffic: name, help and value.
type Traffic = (&'static str, &'static str, fn(&Sums) -> Count);

/// The help of the sum of round-trip times.
const RTT: &str = "Sum of the smoothed round-trip times that ended connections had at last (of those translated at the socket); \
                   per close";

const TRAFFIC: [Traffic; 13] = [
    (
        "packets",
        "Packets along flows; per packet, so without what is translated at the socket",
        |sums| Count::Both(sums.packets.forward_packets, sums.packets.reply_packets),
    ),
    ("bytes", "Bytes of those packets, IP header included", |sums| {
        Count::Both(sums.packets.forward_bytes, sums.packets.reply_bytes)
    }),
    ("resets", "Resets along flows (TCP's RST, SCTP's ABORT); per packet", |sums| {
        Count::Both(sums.packets.forward_resets, sums.packets.reply_resets)
    }),
    ("flows", "Flows that were opened, per packet", |sums| Count::One(sums.packets.flows)),
    (
        "socket_calls",
        "Calls of sockets that were translated: connections of TCP, datagrams of UDP; per call",
        |sums| Count::One(sums.packets.calls),
    ),
    (
        "socket_connections",
        "TCP connections translated at the socket that were established; per connection",
        |sums| Count::One(sums.sockets.connections),
    ),
    ("socket_connections_closed", "Those of them that have ended; per close", |sums| {
        Count::One(sums.sockets.closed)
    }),
    (
        "socket_connections_failed",
        "TCP connections translated at the socket that were refused or got no answer; per connect",
        |sums| Count::One(sums.sockets.failed),
    ),
    (
        "socket_resets",
        "TCP connections translated at the socket that ended without both sides' FIN: reset, or nobody answered; per close",
        |sums| Count::One(sums.sockets.resets),
    ),
    (
        "socket_bytes",
        "Payload of TCP connections translated at the socket; per close, and every few seconds of a connection that sends",
        |sums| Count::Both(sums.sockets.sent_bytes, sums.sockets.received_bytes),
    ),
    ("socket_segments", "TCP segments of those connections; told when their bytes are", |sums| {
        Count::Both(sums.sockets.sent_segments, sums.sockets.received_segments)
    }),
    (
        "socket_retransmitted_segments",
        "Those of their segments from clients that were sent again; told when their bytes are",
        |sums| Count::One(sums.sockets.retransmitted_segments),
    ),
    ("socket_rtt_samples", "Connections whose round-trip time is in the sum; per close", |sums| {
        Count::One(sums.sockets.rtt_count)
    }),
];

fn series(all: &[(Labels, Sums)], (_, _, count): &Traffic) -> Series {
    let with = |labels: &Labels, direction: &str| {
        [labels.clone(), vec![("direction", direction.to_owned())]].concat()
    };
    let mut series = Series::new();
    for (labels, counted) in all {
        match count(counted) {
            Count::Both(forward, reply) => {
                series.extend([(with(labels, "forward"), forward), (with(labels, "reply"), reply)]);
            }
            Count::One(value) => series.push((labels.clone(), value)),
        }
    }
    series
}

fn traffic(view: &View, writer: &mut Writer<'_, '_>) -> fmt::Result {
    let backends = view.backends();
    let mut sums: BTreeMap<u32, Sums> =
        view.image.names.keys().map(|id| (*id, Sums::default())).collect();
    for backend in &backends {
        if let Some(sum) = sums.get_mut(&backend.service_port) {
            sum.packets.add(&backend.counters);
            sum.sockets.add(&backend.sockets);
        }
    }
    let family = |id: &u32| view.image.names.get(id).map_or(0, |name| name.family);
    let services: Vec<(Labels, Sums)> = sums
        .iter()
        .filter_map(|(id, sum)| Some((labels_of(&view.name(*id)?, family(id)), *sum)))
        .collect();
    let of_backend = |backend: &BackendView| {
        let mut labels =
            labels_of(&view.name(backend.service_port)?, family(&backend.service_port));
        labels.push(("backend", backend.address.to_string()));
        Some((labels, Sums { packets: backend.counters, sockets: backend.sockets }))
    };
    // Those with series of their own are the same from one scrape to the next.
    let own: Vec<(Labels, Sums)> = backends
        .iter()
        .filter(|backend| backend.serving)
        .filter_map(of_backend)
        .take(BACKENDS_MAX)
        .collect();
    let left = backends.iter().filter(|backend| backend.serving).count() - own.len();
    for metric in &TRAFFIC {
        let (name, help, _) = metric;
        writer.counters(&format!("service_{name}"), help, &series(&services, metric))?;
        writer.counters(&format!("backend_{name}"), help, &series(&own, metric))?;
    }
    writer.seconds("service_socket_rtt_seconds", RTT, &services)?;
    writer.seconds("backend_socket_rtt_seconds", RTT, &own)?;
    writer.gauges(
        "backends_left_out",
        "Backends without series of their own",
        &vec![(Vec::new(), left as u64)],
    )
}

fn reasons(view: &View, writer: &mut Writer<'_, '_>) -> fmt::Result {
    let Ok(counted) = view.kernel.maps().reason_counters() else { return Ok(()) };
    // A Service's ports share one series.
    let mut packets: BTreeMap<Labels, u64> = BTreeMap::new();
    for (key, counters) in counted {
        let Some(reason) = Reason::from_number(key.reason) else { continue };
        let name = view.name(key.service_port);
        let (namespace, service) =
            name.map_or_else(Default::default, |name| (name.namespace, name.service));
        let labels = vec![
            ("reason", reason.as_str().to_owned()),
            ("namespace", namespace),
            ("service", service),
        ];
        *packets.entry(labels).or_default() += counters.packets;
    }
    writer.counters(
        "packets_by_reason",
        "Packets that did not simply follow a flow, and refused calls, by reason",
        &packets.into_iter().collect(),
    )
}

fn maps(view: &View, writer: &mut Writer<'_, '_>) -> fmt::Result {
    let Ok(fill) = view.kernel.maps().fill(&view.image) else { return Ok(()) };
    let of = |value: fn(&crate::node::dataplane::Fill) -> u64| -> Series {
        fill.iter().map(|fill| (vec![("map", fill.map.to_owned())], value(fill))).collect()
    };
    writer.gauges("map_entries", "Entries of a map", &of(|fill| fill.entries))?;
    writer.gauges("map_capacity", "Entries that a map has room for", &of(|fill| fill.max))
}

fn node(status: &Status, writer: &mut Writer<'_, '_>) -> fmt::Result {
    let one = |labels: Labels, value: bool| (labels, u64::from(value));
    writer.gauges(
        "build_info",
        "The agent's version",
        &vec![one(vec![("version", status.version.clone())], true)],
    )?;
    writer.gauges(
        "start_time_seconds",
        "When the agent started, since 1970",
        &vec![(Vec::new(), status.started)],
    )?;
    writer.gauges("ready", "Whether the node is ready", &vec![one(Vec::new(), status.ready)])?;
    devices(status, writer)?;
    writer.gauges(
        "node_addresses_astray",
        "Addresses of the Node that no uplink has",
        &vec![(Vec::new(), status.policy.strays.len() as u64)],
    )?;
    sources(status, writer)?;
    flaws(status, writer)
}

fn devices(status: &Status, writer: &mut Writer<'_, '_>) -> fmt::Result {
    let mut hooks: BTreeMap<Labels, u64> = BTreeMap::new();
    let mut failing = Series::new();
    for device in &status.devices {
        let labels = vec![("device", device.name.clone()), ("role", device.role.word().to_owned())];
        for hook in &device.hooks {
            *hooks
                .entry([labels.clone(), vec![("hook", hook.word().to_owned())]].concat())
                .or_default() += 1;
        }
        failing.push((labels, u64::from(device.problem.is_some())));
    }
    writer.gauges(
        "device_hooks",
        "Hooks of a device with programs of Sluice",
        &hooks.into_iter().collect(),
    )?;
    writer.gauges(
        "device_failing",
        "Whether something could not be attached to a device, and is retried",
        &failing,
    )
}

fn sources(status: &Status, writer: &mut Writer<'_, '_>) -> fmt::Result {
    let sources = |value: fn(&status::SourceStatus) -> u64| -> Series {
        status
            .sources
            .iter()
            .map(|source| (vec![("source", source.name.clone())], value(source)))
            .collect()
    };
    writer.gauges(
        "source_synced",
        "Whether a source's first full list has arrived",
        &sources(|source| u64::from(source.synced)),
    )?;
    writer.gauges(
        "source_failing",
        "Whether a source cannot be reached",
        &sources(|source| u64::from(source.problem.is_some())),
    )?;
    writer.gauges(
        "source_last_heard_timestamp_seconds",
        "When a source last answered, since 1970",
        &sources(|source| source.heard.unwrap_or_default()),
    )
}

fn flaws(status: &Status, writer: &mut Writer<'_, '_>) -> fmt::Result {
    let mut flaws: BTreeMap<Labels, u64> = BTreeMap::new();
    for report in &status.reports {
        let labels = vec![("flaw", report.flaw.clone()), ("level", report.level.clone())];
        *flaws.entry(labels).or_default() += 1;
    }
    writer.gauges(
        "object_flaws",
        "Objects, or fields of them, that are not served as they are (listed by sluice status)",
        &flaws.into_iter().collect(),
    )
}

impl Collector for Found {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let writer = &mut Writer { encoder: &mut encoder };
        let readable = vec![(Vec::new(), u64::from(self.view.is_some()))];
        writer.gauges(
            "maps_readable",
            "Whether the maps could be read for this scrape",
            &readable,
        )?;
        if let Some(view) = &self.view {
            traffic(view, writer)?;
            reasons(view, writer)?;
            maps(view, writer)?;
        }
        self.status.as_ref().map_or(Ok(()), |status| node(status, writer))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn who_asks_while_the_maps_are_read_shares_the_answer() {
        let shared = Arc::new(Shared::default());
        let [asked, reading, read] = [(); 3].map(|()| Arc::new(AtomicUsize::new(0)));
        let all = (0..64).map(|_| {
            let [asked, reading, read] = [&asked, &reading, &read].map(Arc::clone);
            let shared = Arc::clone(&shared);
            tokio::spawn(async move {
                let _ = asked.fetch_add(1, Ordering::SeqCst);
                let make = || {
                    assert_eq!(reading.fetch_add(1, Ordering::SeqCst), 0, "two read at once");
                    // Until everybody has asked, and long enough to be worth sharing.
                    while asked.load(Ordering::SeqCst) < 64 {
                        std::thread::yield_now();
                    }
                    std::thread::sleep(Duration::from_millis(200));
                    let _ = (
                        reading.fetch_sub(1, Ordering::SeqCst),
                        read.fetch_add(1, Ordering::SeqCst),
                    );
                    Ok("text".to_owned())
                };
                shared.get(|| tokio::task::block_in_place(make)).await
            })
        });
        for answer in futures::future::join_all(all.collect::<Vec<_>>()).await {
            assert_eq!(answer.expect("no panic"), Ok(Bytes::from("text")));
        }
        assert_eq!(read.load(Ordering::SeqCst), 1, "one reads for all");
        // Later requests get a text of that time, and an unneeded text is not kept.
        assert_eq!(shared.get(|| Ok("later".to_owned())).await, Ok(Bytes::from("later")));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(shared.0.lock().await.is_none());
    }
}
