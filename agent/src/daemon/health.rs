//! Answers health checks of Services: a load balancer in front of the cluster asks them at
//! `healthCheckNodePort`.
//!
//! There is one plain HTTP listener per (Service, address). The module `answer` has their answers.
//! Unlike with kube-proxy, a Service has listeners in both families even if it is single-stack, and
//! an address that cannot be listened on does not affect the others.

mod answer;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::ready;
use sluice_core::model::HealthCheck;
use sluice_core::model::object::ObjectName;
use tokio::sync::watch;

use crate::daemon::http::{Listener, Room};
use crate::node::backoff::Backoff;
use crate::node::publish::publish;
use answer::Answerer;

/// The pauses between retries.
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// The addresses where health checks are answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// Every address of the node, by one listener per family.
    All,
    /// These addresses of the node, by one listener each. IPv6 link-local ones are left out: they
    /// are meaningless without a device.
    Listed(BTreeSet<IpAddr>),
}

impl Addresses {
    fn to_listen_on(&self) -> BTreeSet<IpAddr> {
        match self {
            Self::All => BTreeSet::from([Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]),
            Self::Listed(all) => all
                .iter()
                .filter(|address| !matches!(address, IpAddr::V6(address) if address.is_unicast_link_local()))
                .copied()
                .collect(),
        }
    }
}

/// Reports whether the proxy works. It is called for every request, so it may depend on the time.
pub type IsHealthy = Arc<dyn Fn() -> bool + Send + Sync>;

/// The inputs of the servers.
pub struct Inputs {
    /// The Services with a health check.
    pub checks: watch::Receiver<BTreeMap<ObjectName, HealthCheck>>,
    /// The addresses at which health checks are answered.
    pub addresses: watch::Receiver<Addresses>,
    /// Whether the proxy works.
    pub is_healthy: IsHealthy,
    /// The room for connections.
    pub(crate) room: Room,
}

/// The reason why a Service's health check is not answered everywhere. The load balancer may
/// consider the node dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The port of the health check.
    pub port: u16,
    /// The errors, for people; at least one.
    pub causes: Vec<String>,
}

impl Failure {
    /// The reason of the Event about a failure (type Warning, regarding the Service).
    pub const EVENT_REASON: &str = "FailedToStartServiceHealthcheck";
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "its healthCheckNodePort {} is not answered everywhere: {}",
            self.port,
            self.causes.join("; ")
        )
    }
}

/// The Services whose health checks are not answered everywhere. They are retried.
pub type Failures = BTreeMap<ObjectName, Failure>;

fn fail(failures: &mut Failures, service: &ObjectName, port: u16, cause: String) {
    let failure = failures.entry(service.clone()).or_insert(Failure { port, causes: Vec::new() });
    failure.causes.push(cause);
}

/// Returns the listeners that should exist. If two Services want the same port, the first by name
/// gets it.
fn plan(
    checks: &BTreeMap<ObjectName, HealthCheck>,
    addresses: &BTreeSet<IpAddr>,
) -> (BTreeMap<SocketAddr, ObjectName>, Failures) {
    let mut owners: BTreeMap<u16, &ObjectName> = BTreeMap::new();
    let mut failures = Failures::new();
    for (service, check) in checks.iter().filter(|(_, check)| check.port != 0) {
        let owner = owners.entry(check.port).or_insert(service);
        if *owner != service {
            let cause =
                format!("the Service {owner} has the same healthCheckNodePort: change one of them");
            fail(&mut failures, service, check.port, cause);
        }
    }
    let listeners = owners.into_iter().flat_map(|(port, service)| {
        addresses.iter().map(move |address| (SocketAddr::new(*address, port), service.clone()))
    });
    (listeners.collect(), failures)
}

/// Answers health checks until the inputs' senders are gone. `report` always holds the failures.
pub async fn serve(mut inputs: Inputs, report: watch::Sender<Failures>) {
    let answerer = Answerer::new(inputs.checks.clone(), inputs.is_healthy);
    let mut open: BTreeMap<SocketAddr, (ObjectName, Listener)> = BTreeMap::new();
    let mut retry = RETRY;
    loop {
        let addresses = inputs.addresses.borrow_and_update().to_listen_on();
        let (wanted, mut failures) = plan(&inputs.checks.borrow_and_update(), &addresses);
        // Close all old listeners before any new one opens: ports may change hands.
        let goes = |at: &SocketAddr, (service, _): &mut (ObjectName, Listener)| {
            wanted.get(at) != Some(service)
        };
        for (_, (_, listener)) in open.extract_if(.., goes) {
            listener.close().await;
        }
        let mut again = false;
        for (at, service) in &wanted {
            if open.contains_key(at) {
                continue;
            }
            let (answerer, asked) = (answerer.clone(), service.clone());
            let handler = Arc::new(move |_| ready(answerer.answer(&asked)).boxed());
            match Listener::open(*at, handler, inputs.room.clone()) {
                Ok(listener) => {
                    tracing::debug!(%service, %at, "answers health checks");
                    let _ = open.insert(*at, (service.clone(), listener));
                }
                Err(error) if error.is_no_such_family() && at.ip().is_unspecified() => {}
                Err(error) => {
                    again = true;
                    fail(&mut failures, service, at.port(), error.to_string());
                }
            }
        }
        log(&report.borrow(), &failures);
        let _ = publish(&report, failures);
        let wait = if again { retry.failed() } else { Duration::ZERO };
        let changed = tokio::select! {
            changed = inputs.checks.changed() => Some(changed.is_ok()),
            changed = inputs.addresses.changed() => Some(changed.is_ok()),
            () = tokio::time::sleep(wait), if again => None,
        };
        match changed {
            Some(false) => break,
            Some(true) => retry.reset(),
            None => {}
        }
    }
    for (_, listener) in open.into_values() {
        listener.close().await;
    }
}

/// Logs each failure once, when it appears and when it is gone.
fn log(before: &Failures, now: &Failures) {
    for (service, failure) in
        now.iter().filter(|(service, failure)| before.get(*service) != Some(*failure))
    {
        tracing::warn!("Service {service}: {failure}; trying again");
    }
    for service in before.keys().filter(|service| !now.contains_key(*service)) {
        tracing::info!(
            "no longer: Service {service}: its healthCheckNodePort is not answered everywhere"
        );
    }
}

#[cfg(test)]
mod tests;
