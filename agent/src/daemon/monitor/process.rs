//! What this process uses, under the names that every Prometheus client has for it.

use std::fmt;

use procfs::WithCurrentSystemInfo as _;
use procfs::process::{LimitValue, Process};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// Reads `/proc/self` when it is asked. What cannot be read has no series.
#[derive(Debug)]
pub(super) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Ok(process) = Process::myself() else { return Ok(()) };
        let mut gauge = |name: &str, help: &str, value: f64| {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(metric)
        };
        if let Ok(stat) = process.stat() {
            gauge(
                "process_resident_memory_bytes",
                "Resident memory; the maps are not in it",
                stat.rss_bytes().get() as f64,
            )?;
            gauge("process_virtual_memory_bytes", "Virtual memory", stat.vsize as f64)?;
            if let Ok(boot) = procfs::boot_time_secs() {
                let since_boot = stat.starttime as f64 / procfs::ticks_per_second() as f64;
                gauge(
                    "process_start_time_seconds",
                    "When the process started, since 1970",
                    boot as f64 + since_boot,
                )?;
            }
            let ticks = (stat.utime + stat.stime) as f64;
            let metric = encoder.encode_descriptor(
                "process_cpu_seconds",
                "CPU time of the process, user and system",
                None,
                MetricType::Counter,
            )?;
            ConstCounter::new(ticks / procfs::ticks_per_second() as f64).encode(metric)?;
        }
        let mut gauge = |name: &str, help: &str, value: f64| {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(metric)
        };
        if let Ok(count) = process.fd_count() {
            gauge("process_open_fds", "Open file descriptors", count as f64)?;
        }
        if let Ok(limits) = process.limits() {
            let most = match limits.max_open_files.soft_limit {
                LimitValue::Unlimited => f64::INFINITY,
                LimitValue::Value(most) => most as f64,
            };
            gauge("process_max_fds", "How many may be open", most)?;
        }
        Ok(())
    }
}
