//! Finds the Services of which every recent attempt has failed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::node::dataplane::{Attempts, Failures};

/// The time over which attempts are compared.
const WINDOW: Duration = Duration::from_secs(30);
/// Attempts are not judged before they were watched for this long: those that succeed may take a
/// moment longer than those that fail.
const SPAN_MIN: Duration = Duration::from_secs(15);
/// The fewest attempts that are judged.
const ATTEMPTS_MIN: u64 = 5;
/// A Service that nobody tries to reach for this long fails no more.
const QUIET: Duration = Duration::from_mins(5);
/// The most endpoints that a message names.
const NAMED_MAX: usize = 3;

/// What was counted of one backend by some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) attempts: Attempts,
    pub(super) failures: Failures,
}

/// A service port of which every recent attempt has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failing {
    /// When that was found out.
    pub(crate) since: SystemTime,
    /// How many attempts failed then, at which endpoints and how, for people.
    pub(crate) message: String,
}

/// What is known of a service port that has failures.
#[derive(Debug)]
pub(super) struct Watch {
    /// The counters of each backend, oldest first.
    samples: VecDeque<(Instant, BTreeMap<u32, Counted>)>,
    failed_at: Instant,
    pub(super) failing: Option<Failing>,
}

/// What became of attempts between two times.
#[derive(Debug, Default)]
struct Change {
    succeeded: u64,
    failures: BTreeMap<u32, Failures>,
}

impl Change {
    /// Returns what was added for backends that both samples know.
    fn between(before: &BTreeMap<u32, Counted>, after: &BTreeMap<u32, Counted>) -> Self {
        let mut change = Self::default();
        for (backend, now) in after {
            let Some(old) = before.get(backend) else { continue };
            let since = |now: u64, old: u64| now.saturating_sub(old);
            change.succeeded += since(now.attempts.answers, old.attempts.answers)
                + since(now.attempts.connections, old.attempts.connections);
            let failures = now.failures.since(&old.failures);
            if failures.all() > 0 {
                let _ = change.failures.insert(*backend, failures);
            }
        }
        change
    }

    fn failed(&self) -> u64 {
        self.failures.values().map(Failures::all).sum()
    }
}

impl Watch {
    /// Begins with the first failure.
    pub(super) fn new(now: Instant, counted: BTreeMap<u32, Counted>) -> Self {
        Self { samples: [(now, counted)].into(), failed_at: now, failing: None }
    }

    /// Adds the counters of now, and judges. `endpoint` returns the endpoint of a backend.
    pub(super) fn add(
        &mut self,
        now: Instant,
        counted: BTreeMap<u32, Counted>,
        endpoint: impl Fn(u32) -> Option<SocketAddr>,
    ) {
        let last = self.samples.back().map(|(_, last)| Change::between(last, &counted));
        let last = last.unwrap_or_default();
        if last.failed() > 0 {
            self.failed_at = now;
        }
        self.samples.push_back((now, counted));
        while self.samples.get(1).is_some_and(|(at, _)| *at + WINDOW <= now) {
            let _ = self.samples.pop_front();
        }
        if last.succeeded > 0 || self.failed_at + QUIET <= now {
            self.failing = None;
        }
        if self.failing.is_none()
            && let (Some((from, before)), Some((_, after))) =
                (self.samples.front(), self.samples.back())
        {
            let change = Change::between(before, after);
            let span = now.saturating_duration_since(*from);
            if span >= SPAN_MIN && change.succeeded == 0 && change.failed() >= ATTEMPTS_MIN {
                let message = message(&change, span, endpoint);
                self.failing = Some(Failing { since: SystemTime::now(), message });
            }
        }
    }

    /// Reports whether nothing has failed for so long that there is nothing to watch.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.failing.is_none() && self.failed_at + WINDOW <= now
    }

    /// Returns the backends that it has counters of.
    pub(super) fn backends(&self) -> BTreeSet<u32> {
        self.samples.back().map(|(_, last)| last.keys().copied().collect()).unwrap_or_default()
    }
}

/// Returns the text for people.
fn message(
    change: &Change,
    span: Duration,
    endpoint: impl Fn(u32) -> Option<SocketAddr>,
) -> String {
    let mut text = format!(
        "none of {} attempts through this node in {} s has reached an endpoint: ",
        change.failed(),
        span.as_secs()
    );
    let named: Vec<String> = change
        .failures
        .iter()
        .filter_map(|(backend, failures)| Some((endpoint(*backend)?, failures.words())))
        .take(NAMED_MAX)
        .map(|(endpoint, words)| format!("{endpoint} ({words})"))
        .collect();
    text.push_str(&named.join(", "));
    let more = change.failures.len().saturating_sub(named.len());
    if more > 0 {
        // Writing to a string cannot fail.
        let _ = write!(text, " and {more} more");
    }
    text + "; compare targetPort with the port that the endpoints listen on, and the policies of \
            client and endpoints"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(answers: u64, refused: u64) -> BTreeMap<u32, Counted> {
        let failures = Failures { refused, ..Failures::default() };
        BTreeMap::from([(7, Counted { attempts: Attempts { answers, connections: 0 }, failures })])
    }

    #[expect(clippy::unnecessary_wraps, reason = "the watch asks for an endpoint that may be gone")]
    fn endpoint(_: u32) -> Option<SocketAddr> {
        Some(SocketAddr::from(([10, 0, 0, 7], 8088)))
    }

    /// Returns a watch after samples of answers and refusals, five seconds apart, and the time of
    /// the last one.
    fn watched(samples: &[(u64, u64)]) -> (Watch, Instant) {
        let start = Instant::now();
        let mut at = start;
        let [(answers, refused), more @ ..] = samples else { panic!("there is a first sample") };
        let mut watch = Watch::new(at, counted(*answers, *refused));
        for (answers, refused) in more {
            at += Duration::from_secs(5);
            watch.add(at, counted(*answers, *refused), endpoint);
        }
        (watch, at)
    }

    #[test]
    fn a_service_fails_when_all_of_some_attempts_fail_for_a_while() {
        assert!(watched(&[(9, 1), (9, 20), (9, 40)]).0.failing.is_none(), "too short");
        assert!(watched(&[(9, 1), (9, 2), (9, 3), (9, 5)]).0.failing.is_none(), "too few");
        assert!(watched(&[(9, 1), (9, 9), (10, 20), (10, 30)]).0.failing.is_none(), "one answer");
        let (watch, _) = watched(&[(9, 1), (9, 3), (9, 5), (9, 6)]);
        assert_eq!(
            watch.failing.map(|failing| failing.message).unwrap_or_default(),
            "none of 5 attempts through this node in 15 s has reached an endpoint: 10.0.0.7:8088 (5 refused); \
             compare targetPort with the port that the endpoints listen on, and the policies of \
             client and endpoints"
        );
    }

    #[test]
    fn it_lasts_with_its_first_text_until_an_attempt_succeeds_or_nobody_tries() {
        let (mut watch, mut at) = watched(&[(9, 1), (9, 3), (9, 5), (9, 6)]);
        let first = watch.failing.clone().expect("it fails");
        for failed in [8, 10, 10, 10, 12] {
            at += Duration::from_secs(20);
            watch.add(at, counted(9, failed), endpoint);
            assert_eq!(watch.failing.as_ref(), Some(&first));
            assert!(!watch.is_over(at));
        }
        watch.add(at + Duration::from_secs(5), counted(10, 12), endpoint);
        assert_eq!(watch.failing, None, "one was answered");
        let (mut watch, at) = watched(&[(9, 1), (9, 3), (9, 5), (9, 6)]);
        watch.add(at + QUIET, counted(9, 6), endpoint);
        assert_eq!(watch.failing, None, "nobody tries");
        assert!(watch.is_over(at + QUIET));
    }

    #[test]
    fn the_counters_of_an_endpoint_that_was_added_are_older_than_the_watch() {
        let start = Instant::now();
        let mut watch = Watch::new(start, counted(9, 1));
        let mut both = counted(9, 9);
        let other =
            Counted { attempts: Attempts { answers: 50, connections: 4 }, ..Counted::default() };
        let _ = both.insert(8, other);
        watch.add(start + Duration::from_secs(20), both, endpoint);
        assert!(watch.failing.is_some());
    }
}
