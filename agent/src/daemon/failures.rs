//! Counts flows that their endpoint does not answer, and finds Services that nobody reaches.
//!
//! No packet shows that nothing came, so the agent looks at the flows that are waiting for an
//! answer. Packets pay nothing for that.

mod failing;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use sluice_common::abi::{COUNTER_V6, TICK_SHIFT, Ticks};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use self::failing::{Counted, Watch};
use crate::node::dataplane::{Access, Error, Failures, Maps, Pending, now_ns};
use crate::node::publish::publish;
use crate::node::view::PortName;

pub(crate) use self::failing::Failing;

/// The most service ports that are watched at once. Beyond these, failures are only counted: a
/// client that may reach nothing makes all Services fail, and is to blame alone.
const WATCHED_MAX: usize = 256;
/// The most Services that are reported as failing.
const REPORTED_MAX: usize = 32;
/// How often the flows are looked at.
const PERIOD: Duration = Duration::from_secs(5);
/// A flow is unanswered when its SYN was sent so many ticks ago. A client has then sent a second
/// one after a second and a third one after three.
const UNANSWERED_TICKS: Ticks = 5;

/// The flows that were waiting when they were last looked at, and that need not be counted any
/// more.
#[derive(Debug, Default)]
struct Sweep {
    counted: BTreeSet<Pending>,
    /// Whether they have been looked at before.
    has_begun: bool,
}

impl Sweep {
    /// Returns the number of flows of each backend that turn out to be unanswered, given those that
    /// are waiting now.
    ///
    /// What waits at the first call is not counted: an earlier agent has done so.
    fn look(&mut self, pending: &BTreeMap<Pending, Ticks>, now: Ticks) -> BTreeMap<u32, u64> {
        let mut unanswered = BTreeMap::new();
        self.counted.retain(|flow| pending.contains_key(flow));
        for (flow, seen) in pending {
            if !self.has_begun {
                let _ = self.counted.insert(*flow);
            } else if now.wrapping_sub(*seen).cast_signed() >= UNANSWERED_TICKS.cast_signed()
                && self.counted.insert(*flow)
            {
                *unanswered.entry(flow.backend).or_default() += 1;
            }
        }
        self.has_begun = true;
        unanswered
    }
}

/// The Services of which every recent attempt has failed, by their service ports.
pub(crate) type FailingServices = BTreeMap<PortName, Failing>;

/// The failures of all backends, and the service ports that have new ones.
#[derive(Debug, Default)]
struct Watches {
    failures: BTreeMap<u32, Failures>,
    /// By service port.
    ports: BTreeMap<u32, Watch>,
    /// Whether the failures were read before.
    has_begun: bool,
}

impl Watches {
    /// Reads the failures, and what else is needed of the service ports that have new ones.
    fn look(&mut self, maps: &Maps, now: Instant) -> Result<FailingServices, Error> {
        let failures = maps.failures()?;
        let new = failures.iter().filter(|(backend, failures)| {
            failures.since(&self.failures.get(backend).copied().unwrap_or_default()).all() > 0
        });
        let mut wanted: BTreeMap<u32, u32> = new
            .filter(|_| self.has_begun)
            .filter_map(|(backend, _)| Some((maps.backend_at(*backend)?.0, backend & COUNTER_V6)))
            .collect();
        self.has_begun = true;
        for (port, watch) in &self.ports {
            let family = watch.backends().first().map_or(0, |backend| backend & COUNTER_V6);
            let _ = wanted.entry(*port).or_insert(family);
        }
        for (port, family) in wanted {
            if self.ports.len() >= WATCHED_MAX && !self.ports.contains_key(&port) {
                continue;
            }
            let backends = maps.selected(port).into_iter().map(|id| id | family);
            let attempts = maps.attempts(backends)?;
            let counted = attempts.into_iter().map(|(backend, attempts)| {
                let failures = failures.get(&backend).copied().unwrap_or_default();
                (backend, Counted { attempts, failures })
            });
            let counted: BTreeMap<u32, Counted> = counted.collect();
            let endpoint = |backend| Some(maps.backend_at(backend)?.1);
            match self.ports.get_mut(&port) {
                Some(watch) => watch.add(now, counted, endpoint),
                None => {
                    let _ = self.ports.insert(port, Watch::new(now, counted));
                }
            }
        }
        self.failures = failures;
        self.ports.retain(|_, watch| !watch.is_over(now) && !watch.backends().is_empty());
        let mut services = FailingServices::new();
        for (port, watch) in &self.ports {
            if let (Some(failing), Some(name)) = (&watch.failing, maps.service_port_name(*port)?) {
                let name = PortName::from(&name);
                // A datagram that needs no answer has reached its endpoint all the same.
                if name.protocol == "UDP" || services.len() >= REPORTED_MAX {
                    continue;
                }
                // A Service of both families is reported once.
                let _ = services.entry(name).or_insert(failing.clone());
            }
        }
        Ok(services)
    }
}

/// Logs each failing Service once, when it begins to fail and when it does no more.
fn log(before: &FailingServices, now: &FailingServices) {
    for (name, failing) in now.iter().filter(|(name, _)| !before.contains_key(*name)) {
        tracing::warn!("Service {}: {}", name, failing.message);
    }
    for name in before.keys().filter(|name| !now.contains_key(*name)) {
        tracing::info!("no longer: Service {}: no attempt has reached an endpoint", name);
    }
}

/// Counts unanswered flows in the maps of a folder, and reports the Services that fail, until
/// nobody wants to know.
pub(super) async fn follow(folder: PathBuf, report: watch::Sender<FailingServices>) {
    let maps = match Maps::open(&folder, Access::Read) {
        Ok(maps) => maps,
        Err(error) => {
            tracing::warn!("{error}; flows without an answer are not counted");
            return;
        }
    };
    let (mut sweep, mut watches) = (Sweep::default(), Watches::default());
    let mut is_failing = false;
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = report.closed() => return,
        }
        let result = tokio::task::block_in_place(|| {
            let pending = maps.pending_flows()?;
            maps.count_unanswered(&sweep.look(&pending, (now_ns() >> TICK_SHIFT) as Ticks))?;
            watches.look(&maps, Instant::now())
        });
        match result {
            Ok(services) => {
                is_failing = false;
                log(&report.borrow(), &services);
                let _ = publish(&report, services);
            }
            Err(error) if !is_failing => {
                tracing::warn!("{error}; flows without an answer are not counted");
                is_failing = true;
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn flow(port: u16, backend: u32) -> Pending {
        Pending {
            client: SocketAddr::from(([10, 0, 0, 1], port)),
            frontend: SocketAddr::from(([10, 96, 0, 1], 80)),
            backend,
            generation: 1,
        }
    }

    #[test]
    fn a_flow_is_unanswered_once_when_its_client_has_waited() {
        let mut sweep = Sweep::default();
        let none = BTreeMap::new();
        assert_eq!(sweep.look(&BTreeMap::new(), 100), none);
        let pending = BTreeMap::from([(flow(1, 7), 100), (flow(2, 7), 103), (flow(3, 9), 100)]);
        assert_eq!(sweep.look(&pending, 104), none, "they have waited too short");
        assert_eq!(sweep.look(&pending, 105), BTreeMap::from([(7, 1), (9, 1)]));
        assert_eq!(sweep.look(&pending, 110), BTreeMap::from([(7, 1)]));
        // A SYN that is sent again renews the entry.
        let renewed = BTreeMap::from([(flow(1, 7), 115)]);
        assert_eq!(sweep.look(&renewed, 115), none);
        assert_eq!(sweep.look(&renewed, 120), none);
        // Another endpoint is another try.
        let moved = BTreeMap::from([(flow(1, 8), 116)]);
        assert_eq!(sweep.look(&moved, 125), BTreeMap::from([(8, 1)]));
    }

    #[test]
    fn a_flow_that_is_answered_and_waits_again_is_counted_again() {
        let mut sweep = Sweep::default();
        let (none, pending) = (BTreeMap::new(), BTreeMap::from([(flow(1, 7), 100)]));
        assert_eq!(sweep.look(&BTreeMap::new(), 90), none);
        assert_eq!(sweep.look(&pending, 106), BTreeMap::from([(7, 1)]));
        assert_eq!(sweep.look(&BTreeMap::new(), 111), none);
        let pending = BTreeMap::from([(flow(1, 7), 110)]);
        assert_eq!(sweep.look(&pending, 116), BTreeMap::from([(7, 1)]));
    }

    #[test]
    fn what_waits_when_an_agent_starts_was_its_predecessors() {
        let mut sweep = Sweep::default();
        let pending = BTreeMap::from([(flow(1, 7), 100)]);
        assert_eq!(sweep.look(&pending, 200), BTreeMap::new());
        assert_eq!(sweep.look(&pending, 205), BTreeMap::new());
    }

    #[test]
    fn a_tick_of_another_cpu_may_be_ahead() {
        let mut sweep = Sweep::default();
        assert_eq!(sweep.look(&BTreeMap::new(), 0), BTreeMap::new());
        let pending = BTreeMap::from([(flow(1, 7), 1), (flow(2, 7), u32::MAX - 4)]);
        assert_eq!(sweep.look(&pending, 0), BTreeMap::from([(7, 1)]));
    }
}
