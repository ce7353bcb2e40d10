//! Deletes stale UDP entries of netfilter's connection tracking.
//!
//! Our own flows are translated before conntrack sees them, so it knows them by their real
//! addresses. An earlier proxy, however, decided once for each flow and stored the decision in an
//! entry, which lives for as long as the client sends, even if the endpoint is long dead. And if a
//! VIP was not served yet, an entry says that it is not translated. Entries towards our frontends
//! that lead to no serving endpoint are therefore deleted, at the start and whenever UDP frontends
//! or endpoints change. TCP and SCTP clients notice by themselves, and their entries drain.
//!
//! There are two differences from kube-proxy:
//! - A node port counts only at this node's addresses. kube-proxy goes by the port alone, and so
//!   cuts flows to the same number on any other host.
//! - An entry that translates nothing but has replies stays: something beneath conntrack translates
//!   both directions, as we do for the host's connected sockets. If the entry were deleted, its
//!   next reply would be unsolicited, and host firewalls drop those.

pub mod limits;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use sluice_core::model::object::IpFamily;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::node::backoff::Backoff;

/// The shortest time between two passes over the table.
const PERIOD: Duration = Duration::from_secs(1);
/// The rest after a pass, in multiples of its duration, so that a large table takes no more than a
/// twentieth of one CPU.
const REST: u32 = 20;
/// The waiting times between retries.
const RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_mins(1));

/// Address and port.
pub type End = (IpAddr, u16);

/// A connection, or flow of datagrams, whose destination netfilter translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Translated {
    /// IP protocol number.
    pub protocol: u8,
    /// The client.
    pub client: End,
    /// The frontend that the client uses.
    pub frontend: End,
    /// The backend that answers.
    pub backend: End,
    /// The client's address and port as the backend sees them.
    pub seen_as: End,
    /// Whether it has ended, as far as conntrack knows.
    pub closing: bool,
    /// The seconds until conntrack forgets it if it stays idle.
    pub left: u32,
}

/// Lists what netfilter translates in the current network namespace for a family; it blocks.
/// Returns false if the table has changed meanwhile, so that entries may be missing.
///
/// # Errors
///
/// Fails if the kernel refuses the listing.
pub fn translated(family: IpFamily, each: impl FnMut(Translated)) -> io::Result<bool> {
    if !table::is_used() {
        return Ok(true);
    }
    table::translated(family, each)
}

/// Deletes entries of a family by the tuples that their clients send.
///
/// # Errors
///
/// Fails if the kernel keeps one.
pub fn forget(family: IpFamily, connections: &[Translated]) -> io::Result<()> {
    table::forget(family, connections)
}

/// Adds entries for connections that pass beneath conntrack, so that netfilter gives none of their
/// source ports to others. The entries expire after this time. Only the backend and the address
/// that it sees are used.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn keep_clear(connections: &[Translated], time: Duration) -> io::Result<()> {
    table::insert(connections, time)
}

/// The UDP frontends of this node. Endpoints *serve* if they answer, whatever policy, topology or
/// termination say, since these concern only new flows. A frontend without any has an empty set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UdpFrontends {
    /// ClusterIP, load balancer's or external address and port -> serving endpoints.
    pub vips: BTreeMap<(IpAddr, u16), BTreeSet<(IpAddr, u16)>>,
    /// Node port -> serving endpoints, of both families.
    pub node_ports: BTreeMap<u16, BTreeSet<(IpAddr, u16)>>,
    /// The node's own addresses, which have its node ports.
    pub node_addresses: BTreeSet<IpAddr>,
}

/// A flow as an entry describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    /// The destination of the client's packets.
    destination: (IpAddr, u16),
    /// The source of replies: the endpoint, or the destination itself if nothing is translated.
    reply_source: (IpAddr, u16),
    /// Whether there was a reply.
    answered: bool,
}

impl UdpFrontends {
    /// Returns the endpoints that serve a destination, or [`None`] if it is not ours.
    fn serving(&self, (address, port): (IpAddr, u16)) -> Option<&BTreeSet<(IpAddr, u16)>> {
        let node_port =
            || self.node_ports.get(&port).filter(|_| self.node_addresses.contains(&address));
        self.vips.get(&(address, port)).or_else(node_port)
    }

    fn is_stale(&self, flow: &Flow) -> bool {
        let is_translated_beneath = flow.answered && flow.reply_source == flow.destination;
        !is_translated_beneath
            && self
                .serving(flow.destination)
                .is_some_and(|serving| !serving.contains(&flow.reply_source))
    }

    /// Whether any entry of a family can be stale.
    fn concerns(&self, family: IpFamily) -> bool {
        let is_its = |address: &IpAddr| IpFamily::of(*address) == family;
        self.vips.keys().any(|(vip, _)| is_its(vip))
            || !self.node_ports.is_empty() && self.node_addresses.iter().any(is_its)
    }

    /// Adds the frontends of `before` that are gone, which have no endpoints now.
    fn with_removed(&self, before: &Self) -> Self {
        let mut all = self.clone();
        for vip in before.vips.keys() {
            let _ = all.vips.entry(*vip).or_default();
        }
        for port in before.node_ports.keys() {
            let _ = all.node_ports.entry(*port).or_default();
        }
        all
    }
}

/// The result of a pass over the table of one family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// The number of UDP entries.
    pub seen: u64,
    /// The number of stale entries that were deleted.
    pub deleted: u64,
    /// Whether the kernel stopped the listing halfway. What was listed has been processed.
    pub interrupted: bool,
}

/// Deletes the stale entries of a family in the current network namespace; it blocks. It does
/// nothing if the kernel or the namespace tracks nothing, and loads no kernel module.
///
/// # Errors
///
/// Fails if the kernel refuses the listing (without `CAP_NET_ADMIN`) or keeps an entry; all other
/// stale entries are deleted then.
pub fn clean(frontends: &UdpFrontends, family: IpFamily) -> io::Result<Cleaned> {
    if !frontends.concerns(family) || !table::is_used() {
        return Ok(Cleaned::default());
    }
    table::sweep(family, |flow| frontends.is_stale(flow))
}

/// The progress of the cleaner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The number of entries deleted so far, of IPv4 and of IPv6.
    pub deleted: [u64; 2],
    /// The duration of the last pass.
    pub took: Duration,
    /// The failure that is retried, as text.
    pub problem: Option<String>,
}

/// Deletes stale entries at the start and whenever `frontends` change, until their sender is gone.
/// Frontends should be sent once the maps hold them, since entries that are made before are stale
/// too.
pub async fn keep_clean(
    mut frontends: watch::Receiver<Arc<UdpFrontends>>,
    progress: watch::Sender<Progress>,
) {
    let mut before = Arc::<UdpFrontends>::default();
    let mut retry = RETRY;
    loop {
        let now = frontends.borrow_and_update().clone();
        if now != before {
            let all = now.with_removed(&before);
            let started = Instant::now();
            let cleaned = tokio::task::spawn_blocking(move || {
                IpFamily::ALL.map(|family| clean(&all, family))
            });
            let results = cleaned.await.unwrap_or_else(|panic| {
                IpFamily::ALL.map(|_| Err(io::Error::other(panic.to_string())))
            });
            let failed = results.iter().any(Result::is_err);
            report(&progress, results, started.elapsed());
            if failed {
                tokio::time::sleep(retry.failed()).await;
                continue;
            }
            before = now;
            retry.reset();
            tokio::time::sleep(PERIOD.max(started.elapsed() * REST)).await;
        }
        if frontends.changed().await.is_err() {
            return;
        }
    }
}

fn report(progress: &watch::Sender<Progress>, results: [io::Result<Cleaned>; 2], took: Duration) {
    let mut problems = Vec::new();
    progress.send_modify(|progress| {
        for ((family, result), deleted) in
            IpFamily::ALL.iter().zip(results).zip(&mut progress.deleted)
        {
            match result {
                Ok(cleaned) => {
                    *deleted += cleaned.deleted;
                    if cleaned.deleted > 0 {
                        tracing::info!(
                            family = family.word(),
                            deleted = cleaned.deleted,
                            seen = cleaned.seen,
                            "deleted stale UDP entries of conntrack"
                        );
                    }
                }
                Err(error) => problems.push(format!("{}: {error}", family.word())),
            }
        }
        progress.took = took;
        let problem = (!problems.is_empty()).then(|| {
            format!("cannot delete stale UDP entries of conntrack: {}", problems.join(", "))
        });
        if let Some(problem) =
            problem.as_ref().filter(|problem| progress.problem.as_ref() != Some(*problem))
        {
            tracing::warn!("{problem}; trying again");
        }
        progress.problem = problem;
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(text: &str) -> (IpAddr, u16) {
        let end: std::net::SocketAddr = text.parse().expect("address and port");
        (end.ip(), end.port())
    }

    fn ends(texts: &[&str]) -> BTreeSet<(IpAddr, u16)> {
        texts.iter().map(|text| end(text)).collect()
    }

    fn frontends() -> UdpFrontends {
        UdpFrontends {
            vips: BTreeMap::from([
                (end("10.96.0.10:53"), ends(&["10.244.1.10:5353", "10.244.2.10:5353"])),
                (end("10.96.0.11:53"), ends(&[])),
                (end("[fd00:96::10]:53"), ends(&["[fd00:244::10]:5353"])),
            ]),
            node_ports: BTreeMap::from([(
                30_053,
                ends(&["10.244.1.10:5353", "[fd00:244::10]:5353"]),
            )]),
            node_addresses: BTreeSet::from(["192.0.2.11".parse().expect("an address")]),
        }
    }

    #[test]
    fn entries_are_stale_when_they_lead_to_nobody_who_serves() {
        let cases = [
            ("a serving endpoint", "10.96.0.10:53", "10.244.1.10:5353", true, false),
            ("one that has sent nothing yet", "10.96.0.10:53", "10.244.1.10:5353", false, false),
            ("an endpoint that is gone", "10.96.0.10:53", "10.244.9.9:5353", true, true),
            ("another port of an endpoint", "10.96.0.10:53", "10.244.1.10:53", true, true),
            ("nobody translated it", "10.96.0.10:53", "10.96.0.10:53", false, true),
            ("translated beneath conntrack", "10.96.0.10:53", "10.96.0.10:53", true, false),
            ("nobody serves", "10.96.0.11:53", "10.244.1.10:5353", true, true),
            ("another port of a VIP", "10.96.0.10:54", "10.244.9.9:5353", true, false),
            ("IPv6, serving", "[fd00:96::10]:53", "[fd00:244::10]:5353", true, false),
            ("IPv6, gone", "[fd00:96::10]:53", "[fd00:244::99]:5353", true, true),
            ("a node port, serving", "192.0.2.11:30053", "10.244.1.10:5353", true, false),
            ("a node port, gone", "192.0.2.11:30053", "10.244.9.9:5353", true, true),
            ("another node's node port", "192.0.2.12:30053", "10.244.9.9:5353", true, false),
            (
                "the same port of a host outside",
                "198.51.100.1:30053",
                "198.51.100.1:30053",
                false,
                false,
            ),
            ("no port of ours at the node", "192.0.2.11:514", "192.0.2.11:514", false, false),
        ];
        for (what, destination, reply_source, answered, stale) in cases {
            let flow =
                Flow { destination: end(destination), reply_source: end(reply_source), answered };
            assert_eq!(frontends().is_stale(&flow), stale, "{what}: {flow:?}");
        }
    }

    #[test]
    fn frontends_that_go_leave_nobody_who_serves() {
        let all = UdpFrontends::default().with_removed(&frontends());
        assert!(
            all.vips.keys().eq(frontends().vips.keys())
                && all.vips.values().all(BTreeSet::is_empty)
        );
        assert_eq!(all.node_ports, BTreeMap::from([(30_053, ends(&[]))]));
        assert_eq!(frontends().with_removed(&frontends()), frontends());
    }

    #[test]
    fn a_family_without_frontends_is_not_looked_at() {
        let mut frontends = frontends();
        assert!(IpFamily::ALL.iter().all(|family| frontends.concerns(*family)));
        frontends.vips.clear();
        assert!(frontends.concerns(IpFamily::V4) && !frontends.concerns(IpFamily::V6));
        frontends.node_ports.clear();
        assert!(!frontends.concerns(IpFamily::V4));
    }
}
