//! Rates between two samples of the counters, for `sluice top`.

pub(crate) mod screen;

use std::collections::BTreeMap;
use std::time::Instant;

use sluice_common::Reason;

use crate::node::view::{BackendView, PortName, View};

/// The counters of a service port or backend, for both directions together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Packets of flows, segments of connections translated at the socket, and datagrams sent
    /// there.
    pub(crate) packets: u64,
    /// Bytes of flows with their IP headers; at the socket, of payload.
    pub(crate) bytes: u64,
    /// Flows that were opened, and connections that were established at the socket.
    pub(crate) connections: u64,
    /// Flows and connections that failed to begin.
    pub(crate) failed: u64,
    pub(crate) resets: u64,
}

impl Totals {
    fn of(backend: &BackendView, is_tcp: bool) -> Self {
        let (packets, sockets) = (&backend.counters, &backend.sockets);
        // A TCP connect is not a packet, but a datagram is.
        let datagrams = if is_tcp { 0 } else { packets.calls };
        Self {
            packets: packets.forward_packets
                + packets.reply_packets
                + sockets.sent_segments
                + sockets.received_segments
                + datagrams,
            bytes: packets.forward_bytes
                + packets.reply_bytes
                + sockets.sent_bytes
                + sockets.received_bytes,
            connections: packets.flows + sockets.connections,
            failed: backend.failures.flows() + sockets.failed,
            resets: packets.forward_resets + packets.reply_resets + sockets.resets,
        }
    }

    fn add(&mut self, more: Self) {
        self.packets += more.packets;
        self.bytes += more.bytes;
        self.connections += more.connections;
        self.failed += more.failed;
        self.resets += more.resets;
    }
}

/// [`Totals`] per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Rates {
    pub(crate) packets: f64,
    pub(crate) bytes: f64,
    pub(crate) connections: f64,
    pub(crate) failed: f64,
    pub(crate) resets: f64,
}

#[expect(clippy::cast_precision_loss, reason = "figures for people have few digits")]
fn rate(before: u64, after: u64, seconds: f64) -> f64 {
    // Counters that were made anew count as unchanged.
    after.saturating_sub(before) as f64 / seconds.max(0.001)
}

impl Rates {
    fn between(before: Totals, after: Totals, seconds: f64) -> Self {
        Self {
            packets: rate(before.packets, after.packets, seconds),
            bytes: rate(before.bytes, after.bytes, seconds),
            connections: rate(before.connections, after.connections, seconds),
            failed: rate(before.failed, after.failed, seconds),
            resets: rate(before.resets, after.resets, seconds),
        }
    }
}

/// A service port of one family.
pub(crate) type Service = (PortName, u8);
/// A reason, and the service that it concerns, if any.
pub(crate) type Cause = (&'static str, Option<(String, String)>);

/// The counters at one time.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    at: Instant,
    services: BTreeMap<Service, Totals>,
    backends: BTreeMap<(Service, String), (Totals, bool)>,
    causes: BTreeMap<Cause, u64>,
}

impl Sample {
    /// Reads the counters.
    pub(crate) fn of(view: &View, at: Instant) -> anyhow::Result<Self> {
        let service = |id: u32| {
            let name = view.image.names.get(&id)?;
            Some((PortName::from(name), name.family))
        };
        let mut services: BTreeMap<Service, Totals> = view
            .image
            .names
            .keys()
            .filter_map(|id| Some((service(*id)?, Totals::default())))
            .collect();
        let mut backends = BTreeMap::new();
        for backend in view.backends() {
            let Some(service) = service(backend.service_port) else { continue };
            let totals = Totals::of(&backend, service.0.protocol == "TCP");
            services.entry(service.clone()).or_default().add(totals);
            let _ =
                backends.insert((service, backend.address.to_string()), (totals, backend.serving));
        }
        let mut causes = BTreeMap::new();
        for (key, counters) in view.kernel.maps().reason_counters()? {
            let Some(reason) = Reason::from_number(key.reason) else { continue };
            let of = service(key.service_port).map(|(name, _)| (name.namespace, name.service));
            *causes.entry((reason.as_str(), of)).or_default() += counters.packets;
        }
        Ok(Self { at, services, backends, causes })
    }
}

/// The difference between two samples.
#[derive(Clone, Debug, Default)]
pub(crate) struct Change {
    pub(crate) services: Vec<(Service, Rates)>,
    pub(crate) backends: BTreeMap<Service, Vec<(String, Rates, bool)>>,
    /// Reason, service, total since the maps were made, and rate.
    pub(crate) causes: Vec<(Cause, u64, f64)>,
}

impl Change {
    /// Returns the change from one sample to a later one. What the later one lacks is left out.
    pub(crate) fn between(before: &Sample, after: &Sample) -> Self {
        let seconds = after.at.saturating_duration_since(before.at).as_secs_f64();
        let mut change = Self::default();
        for (service, totals) in &after.services {
            let old = before.services.get(service).copied().unwrap_or_default();
            change.services.push((service.clone(), Rates::between(old, *totals, seconds)));
        }
        for ((service, address), (totals, serving)) in &after.backends {
            let old = before.backends.get(&(service.clone(), address.clone())).map(|old| old.0);
            let rates = Rates::between(old.unwrap_or_default(), *totals, seconds);
            change.backends.entry(service.clone()).or_default().push((
                address.clone(),
                rates,
                *serving,
            ));
        }
        for (cause, count) in &after.causes {
            let old = before.causes.get(cause).copied().unwrap_or_default();
            change.causes.push((cause.clone(), *count, rate(old, *count, seconds)));
        }
        change.causes.sort_by(|a, b| b.2.total_cmp(&a.2).then_with(|| b.1.cmp(&a.1)));
        change
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;

    pub(crate) fn service(name: &str) -> Service {
        let name = PortName {
            namespace: "shop".to_owned(),
            service: name.to_owned(),
            label: String::new(),
            port: 80,
            protocol: "TCP".to_owned(),
        };
        (name, 4)
    }

    fn totals(number: u64) -> Totals {
        let (bytes, connections) = (number * 100, number / 10);
        Totals { packets: number, bytes, connections, failed: number / 20, resets: 0 }
    }

    /// Returns a sample with multiples of what `web` counts in two seconds.
    pub(crate) fn sample(at: Instant, times: u64) -> Sample {
        Sample {
            at: at + Duration::from_secs(2) * times as u32,
            services: [
                (service("web"), totals(200 * times)),
                (service("mail"), totals(20 * times)),
            ]
            .into(),
            backends: [
                ((service("web"), "10.0.0.1:80".to_owned()), (totals(150 * times), true)),
                ((service("web"), "10.0.0.2:80".to_owned()), (totals(50 * times), false)),
            ]
            .into(),
            causes: [(
                ("no_backend_reset", Some(("shop".to_owned(), "gone".to_owned()))),
                7 + 4 * times,
            )]
            .into(),
        }
    }

    #[test]
    fn rates_are_what_was_added_in_a_second() {
        let at = Instant::now();
        let change = Change::between(&sample(at, 1), &sample(at, 2));
        let web = change
            .services
            .iter()
            .find(|(found, _)| *found == service("web"))
            .map(|(_, rates)| *rates);
        assert_eq!(
            web,
            Some(Rates {
                packets: 100.0,
                bytes: 10_000.0,
                connections: 10.0,
                failed: 5.0,
                resets: 0.0
            })
        );
        assert_eq!(change.backends[&service("web")].len(), 2);
        let (_, count, rate) = change.causes[0].clone();
        assert_eq!((count, rate), (15, 2.0));
    }

    #[test]
    fn counters_that_begin_anew_are_no_negative_rate() {
        let at = Instant::now();
        let (before, mut after) = (sample(at, 5), sample(at, 1));
        after.at = before.at + Duration::from_secs(1);
        let change = Change::between(&before, &after);
        assert!(change.services.iter().all(|(_, rates)| rates.packets.eq(&0.0)));
    }

    #[test]
    fn a_service_that_has_gone_is_left_out_and_a_new_one_starts_at_nothing() {
        let at = Instant::now();
        let (mut before, mut after) = (sample(at, 1), sample(at, 2));
        let _ = before.services.remove(&service("web"));
        let _ = after.services.remove(&service("mail"));
        let change = Change::between(&before, &after);
        assert_eq!(change.services.len(), 1);
        assert!(change.services[0].1.packets.eq(&200.0));
    }
}
