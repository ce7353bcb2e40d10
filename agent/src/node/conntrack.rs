//! Deletes stale UDP entries of netfilter's connection tracking.
//!
//! Our own flows are translated before conntrack sees them: it knows them by real addresses. But a
//! proxy that was there before decided once for each flow and wrote it into an entry, which lives
//! for as long as the client sends, even when the endpoint is long dead; and where nobody served a
//! VIP yet, an entry says that it is not to be translated. So entries towards our frontends that
//! lead to no serving endpoint are deleted: at the start, and when UDP frontends or endpoints
//! change. TCP and SCTP notice by themselves, and drain.
//!
//! Two differences from kube-proxy:
//! - A node port counts only at this node's addresses. kube-proxy looks at the port alone, and so
//!   cuts flows to the same number on any other host.
//! - An entry that translates nothing, and whose replies come, is left alone: somebody beneath
//!   conntrack translates both directions, as we do for the host's connected sockets. Deleted, its
//!   next reply would be a packet that nobody asked for, and host firewalls drop those.

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

/// The shortest time between two looks at the table.
const PERIOD: Duration = Duration::from_secs(1);
/// A look is followed by so many times as long without one: a large table takes no more than a
/// twentieth of one CPU.
const REST: u32 = 20;
/// Waiting times between tries of what failed.
const RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_mins(1));

/// Address and port.
pub type End = (IpAddr, u16);

/// A connection, or flow of datagrams, whose destination netfilter translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Translated {
    /// IP protocol number.
    pub protocol: u8,
    /// Who asks.
    pub client: End,
    /// What the client asks for.
    pub frontend: End,
    /// Who answers.
    pub backend: End,
    /// The client as the backend sees it.
    pub seen_as: End,
    /// Whether it has ended, as far as conntrack knows.
    pub closing: bool,
    /// Seconds until conntrack forgets it, if it stays idle.
    pub left: u32,
}

/// Lists what netfilter translates in the current network namespace, a family's; it blocks. False:
/// the table has changed meanwhile so that some may be missing.
///
/// # Errors
///
/// When the kernel refuses the listing.
pub fn translated(family: IpFamily, each: impl FnMut(Translated)) -> io::Result<bool> {
    if !table::is_used() {
        return Ok(true);
    }
    table::translated(family, each)
}

/// Deletes entries of a family by what their clients send.
///
/// # Errors
///
/// When the kernel keeps one.
pub fn forget(family: IpFamily, connections: &[Translated]) -> io::Result<()> {
    table::forget(family, connections)
}

/// Enters connections that pass beneath conntrack, so that netfilter gives none of their source
/// ports to others; they go after this time. Of each, the backend and the address that it sees
/// count.
///
/// # Errors
///
/// When the kernel refuses.
pub fn keep_clear(connections: &[Translated], time: Duration) -> io::Result<()> {
    table::insert(connections, time)
}

/// What this node serves by UDP. Endpoints *serve* if they answer, whatever policy, topology or
/// termination say: these are about new flows. A frontend without any has an empty set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UdpFrontends {
    /// ClusterIP, load balancer's or external address and port -> endpoints that serve.
    pub vips: BTreeMap<(IpAddr, u16), BTreeSet<(IpAddr, u16)>>,
    /// Node port -> endpoints that serve, of both families.
    pub node_ports: BTreeMap<u16, BTreeSet<(IpAddr, u16)>>,
    /// The node's own addresses: where its node ports are.
    pub node_addresses: BTreeSet<IpAddr>,
}

/// What an entry says about a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    /// Where the client sends to.
    destination: (IpAddr, u16),
    /// Where replies come from: the endpoint, or the destination itself where nothing is
    /// translated.
    reply_source: (IpAddr, u16),
    /// Whether a reply has come.
    answered: bool,
}

impl UdpFrontends {
    /// The endpoints that serve a destination; [`None`] if it is none of ours.
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

    /// Whether an entry of a family can be stale at all.
    fn concerns(&self, family: IpFamily) -> bool {
        let is_its = |address: &IpAddr| IpFamily::of(*address) == family;
        self.vips.keys().any(|(vip, _)| is_its(vip))
            || !self.node_ports.is_empty() && self.node_addresses.iter().any(is_its)
    }

    /// Together with frontends of before that are gone: nobody serves those.
    fn and_gone(&self, before: &Self) -> Self {
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

/// What a look at the table of one family came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// UDP entries that were there.
    pub seen: u64,
    /// Those that were stale and are gone.
    pub deleted: u64,
    /// The kernel stopped the listing halfway; what was listed has been dealt with.
    pub interrupted: bool,
}

/// Deletes the stale entries of a family in the current network namespace; it blocks. Where the
/// kernel or the namespace tracks nothing there is nothing to do: no kernel module is loaded for
/// it.
///
/// # Errors
///
/// When the kernel refuses the listing (without `CAP_NET_ADMIN`) or keeps an entry; all others are
/// gone then.
pub fn clean(frontends: &UdpFrontends, family: IpFamily) -> io::Result<Cleaned> {
    if !frontends.concerns(family) || !table::is_used() {
        return Ok(Cleaned::default());
    }
    table::sweep(family, |flow| frontends.is_stale(flow))
}

/// What the cleaner tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Entries deleted so far, IPv4's and IPv6's.
    pub deleted: [u64; 2],
    /// How long the last look at the tables took.
    pub took: Duration,
    /// What failed and is tried again, for people.
    pub problem: Option<String>,
}

/// Deletes stale entries at the start and whenever `frontends` change, until their sender is gone.
/// They should be sent when the maps hold them: entries that are made meanwhile would be as stale.
pub async fn keep_clean(
    mut frontends: watch::Receiver<Arc<UdpFrontends>>,
    told: watch::Sender<Told>,
) {
    let mut before = Arc::<UdpFrontends>::default();
    let mut retry = RETRY;
    loop {
        let now = frontends.borrow_and_update().clone();
        if now != before {
            let all = now.and_gone(&before);
            let started = Instant::now();
            let cleaned = tokio::task::spawn_blocking(move || {
                IpFamily::ALL.map(|family| clean(&all, family))
            });
            let results = cleaned.await.unwrap_or_else(|panic| {
                IpFamily::ALL.map(|_| Err(io::Error::other(panic.to_string())))
            });
            let failed = results.iter().any(Result::is_err);
            tell(&told, results, started.elapsed());
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

fn tell(told: &watch::Sender<Told>, results: [io::Result<Cleaned>; 2], took: Duration) {
    let mut problems = Vec::new();
    told.send_modify(|told| {
        for ((family, result), deleted) in IpFamily::ALL.iter().zip(results).zip(&mut told.deleted)
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
        told.took = took;
        let problem = (!problems.is_empty()).then(|| {
            format!("cannot delete stale UDP entries of conntrack: {}", problems.join(", "))
        });
        if let Some(problem) =
            problem.as_ref().filter(|problem| told.problem.as_ref() != Some(*problem))
        {
            tracing::warn!("{problem}; trying again");
        }
        told.problem = problem;
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
        let all = UdpFrontends::default().and_gone(&frontends());
        assert!(
            all.vips.keys().eq(frontends().vips.keys())
                && all.vips.values().all(BTreeSet::is_empty)
        );
        assert_eq!(all.node_ports, BTreeMap::from([(30_053, ends(&[]))]));
        assert_eq!(frontends().and_gone(&frontends()), frontends());
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
