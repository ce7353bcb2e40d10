//! This process's use of resources, under the names that every Prometheus client has for it.

use std::fmt;
use std::time::Duration;

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
        if let Ok(stat) = process.stat() {
            gauge(
                &mut encoder,
                "process_resident_memory_bytes",
                "Resident memory; the maps are not in it",
                stat.rss_bytes().get(),
            )?;
            gauge(&mut encoder, "process_virtual_memory_bytes", "Virtual memory", stat.vsize)?;
            let ticks_per_second = procfs::ticks_per_second();
            if let Ok(boot) = procfs::boot_time_secs() {
                gauge(
                    &mut encoder,
                    "process_start_time_seconds",
                    "When the process started, since 1970",
                    boot + stat.starttime / ticks_per_second,
                )?;
            }
            let metric = encoder.encode_descriptor(
                "process_cpu_seconds",
                "CPU time of the process, user and system",
                None,
                MetricType::Counter,
            )?;
            let milliseconds = (stat.utime + stat.stime) * 1_000 / ticks_per_second;
            let used = Duration::from_millis(milliseconds);
            ConstCounter::new(used.as_secs_f64()).encode(metric)?;
        }
        if let Ok(count) = process.fd_count() {
            gauge(&mut encoder, "process_open_fds", "Open file descriptors", count as u64)?;
        }
        if let Ok(limits) = process.limits()
            && let LimitValue::Value(most) = limits.max_open_files.soft_limit
        {
            gauge(&mut encoder, "process_max_fds", "How many may be open", most)?;
        }
        Ok(())
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(value).encode(metric)
}
