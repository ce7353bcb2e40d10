//! Logs the Services whose endpoints have changed: one line for each, at most once a second.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use sluice_core::model::object::ObjectName;
use tracing::field::{DisplayValue, display};

/// The endpoints of a Service, by address and port.
pub(super) type Endpoints = BTreeSet<(IpAddr, u16)>;

/// The most endpoints that a line names of those that came, and of those that went.
const NAMED_MAX: usize = 4;
/// The most Services that have a line of their own each time.
const LINES_MAX: usize = 20;

/// A Service that has changed since its last line.
#[derive(Debug)]
struct Changed {
    before: Endpoints,
    took: Duration,
}

/// The Services that have changed since their last line.
#[derive(Debug, Default)]
pub(super) struct EndpointLog {
    changed: BTreeMap<ObjectName, Changed>,
}

/// A line of the log.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    service: String,
    endpoints: String,
    added: String,
    removed: String,
    took_ms: u128,
}

impl EndpointLog {
    /// Takes in what a Service's endpoints were before a change, and how long it took to plan and
    /// write it.
    pub(super) fn changed(&mut self, service: ObjectName, before: Endpoints, took: Duration) {
        let changed = self.changed.entry(service).or_insert(Changed { before, took });
        changed.took = changed.took.max(took);
    }

    /// Logs the Services that have other endpoints than before. `now` returns those of a Service.
    pub(super) fn flush(&mut self, now: impl Fn(&ObjectName) -> Endpoints) {
        let lines = self.take(now);
        let more = lines.len().saturating_sub(LINES_MAX);
        for Line { service, endpoints, added, removed, took_ms } in
            lines.into_iter().take(LINES_MAX)
        {
            tracing::info!(
                %service,
                %endpoints,
                added = shown(&added),
                removed = shown(&removed),
                took = %format_args!("{took_ms}ms"),
                "endpoints changed"
            );
        }
        if more > 0 {
            tracing::info!(services = more, "endpoints of more Services changed");
        }
    }

    fn take(&mut self, now: impl Fn(&ObjectName) -> Endpoints) -> Vec<Line> {
        let mut lines = Vec::new();
        for (service, Changed { before, took }) in std::mem::take(&mut self.changed) {
            let after = now(&service);
            if after == before {
                continue;
            }
            lines.push(Line {
                service: service.to_string(),
                endpoints: format!("{}->{}", before.len(), after.len()),
                added: named(after.difference(&before)),
                removed: named(before.difference(&after)),
                took_ms: took.as_millis(),
            });
        }
        lines
    }
}

/// Leaves out a field that says nothing.
fn shown(text: &str) -> Option<DisplayValue<&str>> {
    (!text.is_empty()).then(|| display(text))
}

/// Names endpoints: all of a few, and the first of many.
fn named<'a>(endpoints: impl Iterator<Item = &'a (IpAddr, u16)>) -> String {
    let all: Vec<String> = endpoints.map(|one| SocketAddr::from(*one).to_string()).collect();
    let more = all.len().saturating_sub(NAMED_MAX);
    let first = all.get(..NAMED_MAX.min(all.len())).unwrap_or_default().join(",");
    if more == 0 { first } else { format!("{first} and {more} more") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(last: std::ops::RangeInclusive<u8>) -> Endpoints {
        last.map(|last| (IpAddr::from([10, 244, 1, last]), 9000)).collect()
    }

    #[test]
    fn a_service_has_one_line_for_all_its_changes_of_a_second() {
        let mut log = EndpointLog::default();
        let cart = ObjectName::new("shop", "cart");
        // It loses one, then gains another; the second change took longer.
        log.changed(cart.clone(), endpoints(2..=3), Duration::from_millis(1));
        log.changed(cart.clone(), endpoints(2..=2), Duration::from_millis(3));
        // It came and went.
        log.changed(ObjectName::new("shop", "web"), endpoints(1..=2), Duration::ZERO);
        let now =
            |name: &ObjectName| if *name == cart { endpoints(2..=2) } else { endpoints(1..=2) };
        let line = Line {
            service: "shop/cart".to_owned(),
            endpoints: "2->1".to_owned(),
            added: String::new(),
            removed: "10.244.1.3:9000".to_owned(),
            took_ms: 3,
        };
        assert_eq!(log.take(now), [line]);
        assert!(log.take(now).is_empty());
    }

    #[test]
    fn many_endpoints_are_counted() {
        let all = endpoints(1..=9);
        assert_eq!(
            named(all.iter()),
            "10.244.1.1:9000,10.244.1.2:9000,10.244.1.3:9000,10.244.1.4:9000 and 5 more"
        );
        assert_eq!(named([].iter()), "");
    }
}
