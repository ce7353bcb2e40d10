//! Exports what the maps and the status hold as metrics.
//!
//! Everything is read when a scraper asks, so nothing is counted twice, and nothing costs anything
//! without a scraper. Counters of Services and backends that are zero have no series: most are.

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
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::form::{Form, to_text};
use super::metrics::Metrics;
use super::process::ProcessCollector;
use super::traffic::{Detail, Traffic};
use crate::node::status::{self, Status};
use crate::node::view::View;

/// The longest time between two readings of the maps.
const PAUSE: Duration = Duration::from_secs(1);

/// A metric's labels.
pub(super) type Labels = Vec<(&'static str, String)>;
/// Labels and value of each series of a metric.
pub(super) type Series = Vec<(Labels, u64)>;

/// Reads maps and status for a scrape.
#[derive(Debug)]
pub(super) struct Exporter {
    metrics: Arc<Metrics>,
    pin_path: PathBuf,
    state_dir: PathBuf,
    detail: Detail,
    shared: Shared,
}

impl Exporter {
    pub(super) fn new(
        metrics: Arc<Metrics>,
        pin_path: PathBuf,
        state_dir: PathBuf,
        detail: Detail,
    ) -> Self {
        Self { metrics, pin_path, state_dir, detail, shared: Shared::default() }
    }

    /// Returns all metrics in a text form.
    pub(super) async fn text(&self, form: Form) -> Result<Bytes, fmt::Error> {
        let make = || {
            let open = self.write()?;
            let text = to_text(&open).into();
            Ok(Texts { open: open.into(), text })
        };
        let texts = self.shared.get(|| tokio::task::block_in_place(make)).await?;
        Ok(match form {
            Form::Open => texts.open,
            Form::Text => texts.text,
        })
    }

    fn write(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, self.metrics.registry())?;
        let mut registry = Registry::with_prefix("sluice");
        registry.register_collector(Box::new(self.read()));
        let mut process = Registry::default();
        process.register_collector(Box::new(ProcessCollector));
        for registry in [process, registry] {
            // The joined text has one end mark.
            let own = text.strip_suffix("# EOF\n").unwrap_or(&text).len();
            text.truncate(own);
            encode(&mut text, &registry)?;
        }
        Ok(text)
    }

    fn read(&self) -> Found {
        let view = View::read(&self.pin_path);
        if let Err(error) = &view {
            tracing::debug!("cannot read the maps for a scrape: {error:#}");
        }
        Found { view: view.ok(), status: status::read(&self.state_dir), detail: self.detail }
    }
}

/// The last text, shared by all scrapers that asked while it was made.
///
/// Reading the maps takes memory and time, so there is only one reader at a time. The next one
/// begins after as long as the last one took, [`PAUSE`] at most: constant scraping takes half of
/// one CPU. A text is never older than its request, but for the time that it takes to make one.
#[derive(Debug, Default)]
struct Shared(Arc<Mutex<Option<Last>>>);

/// The metrics in both forms.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Texts {
    open: Bytes,
    text: Bytes,
}

/// The last texts, and when they were made.
#[derive(Debug)]
struct Last {
    texts: Texts,
    made: Instant,
    /// No other text is made before this.
    next: Instant,
}

impl Shared {
    async fn get(
        &self,
        make: impl FnOnce() -> Result<Texts, fmt::Error>,
    ) -> Result<Texts, fmt::Error> {
        let asked = Instant::now();
        let mut last = self.0.lock().await;
        if let Some(last) = &*last {
            if asked <= last.made {
                return Ok(last.texts.clone());
            }
            tokio::time::sleep_until(last.next).await;
        }
        let started = Instant::now();
        let texts = make()?;
        let made = Instant::now();
        let next = made + started.elapsed().min(PAUSE);
        *last = Some(Last { texts: texts.clone(), made, next });
        // It has megabytes on a large node, and nobody needs it any more.
        let kept = Arc::clone(&self.0);
        let _forgetting = tokio::spawn(async move {
            tokio::time::sleep_until(next).await;
            let _ = kept.lock().await.take_if(|last| last.next <= next);
        });
        Ok(texts)
    }
}

/// The findings at the time of a request.
#[derive(Debug)]
struct Found {
    view: Option<View>,
    status: Option<Status>,
    detail: Detail,
}

/// Writes metrics one by one.
pub(super) struct Writer<'a, 'e> {
    encoder: &'a mut DescriptorEncoder<'e>,
}

impl Writer<'_, '_> {
    pub(super) fn counters(&mut self, name: &str, help: &str, series: &Series) -> fmt::Result {
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in series {
            ConstCounter::new(*value).encode(metric.encode_family(&labels.as_slice())?)?;
        }
        Ok(())
    }

    /// Writes histograms of which only sum and count are known.
    pub(super) fn one_bucket(
        &mut self,
        name: &str,
        help: &str,
        all: &[(Labels, f64, u64)],
    ) -> fmt::Result {
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, sum, count) in all {
            metric.encode_family(&labels.as_slice())?.encode_histogram::<Labels>(
                *sum,
                *count,
                &[(f64::MAX, *count)],
                None,
            )?;
        }
        Ok(())
    }

    pub(super) fn gauges(&mut self, name: &str, help: &str, series: &Series) -> fmt::Result {
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in series {
            ConstGauge::new(*value).encode(metric.encode_family(&labels.as_slice())?)?;
        }
        Ok(())
    }
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
        if counters.packets != 0 {
            *packets.entry(labels).or_default() += counters.packets;
        }
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
        "The agent's version and the commit that it was built from",
        &vec![one(
            vec![("version", status.version.clone()), ("revision", crate::REVISION.to_owned())],
            true,
        )],
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
            Traffic::of(view, self.detail).write(writer)?;
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

    fn texts(word: &'static str) -> Texts {
        Texts { open: Bytes::from(word), text: Bytes::from(word) }
    }

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
                    Ok(texts("text"))
                };
                shared.get(|| tokio::task::block_in_place(make)).await
            })
        });
        for answer in futures::future::join_all(all.collect::<Vec<_>>()).await {
            assert_eq!(answer.expect("no panic"), Ok(texts("text")));
        }
        assert_eq!(read.load(Ordering::SeqCst), 1, "one reads for all");
        // Later requests get a text of that time, and an unneeded text is not kept.
        assert_eq!(shared.get(|| Ok(texts("later"))).await, Ok(texts("later")));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(shared.0.lock().await.is_none());
    }
}
