//! Logs when the API server fails, and when it answers again: a line for each, however many watches
//! fail however often in between.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kube::runtime::watcher;

use super::chain;
use crate::daemon::source::decode::Kind;

/// How a watch failed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum How {
    /// Something broke, and no errno says why. It may be made again at once.
    Broken,
    /// The server cannot be reached, or does not answer: an errno says so, or it is not the first
    /// failure of the watch.
    Away,
    /// The server answers with this status.
    Status(u16),
}

impl How {
    fn of(error: &watcher::Error) -> Self {
        if let watcher::Error::WatchError(status)
        | watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) = error
        {
            Self::Status(status.code)
        } else if has_errno(error) {
            Self::Away
        } else {
            Self::Broken
        }
    }
}

/// Whether the server has answered, with a status that says no.
pub(super) fn is_status(error: &watcher::Error) -> bool {
    matches!(How::of(error), How::Status(_))
}

fn has_errno(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|error| error.raw_os_error().is_some()) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The watches that fail now.
#[derive(Debug)]
pub(super) struct Outage {
    /// The server's address.
    server: String,
    failing: BTreeMap<Kind, How>,
    /// When the first of them failed.
    since: Option<Instant>,
    /// The ways of failing that have been logged since then.
    logged: BTreeSet<How>,
}

/// What follows from a failure.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failed {
    /// What failed and why, for people.
    pub(super) text: String,
    /// Whether the watches fail in another way than before.
    pub(super) is_news: bool,
}

impl Outage {
    pub(super) fn new(server: &str) -> Self {
        Self {
            server: server.to_owned(),
            failing: BTreeMap::new(),
            since: None,
            logged: BTreeSet::new(),
        }
    }

    /// Takes in that the watch of a kind has failed.
    pub(super) fn failed(&mut self, kind: Kind, error: &watcher::Error) -> Failed {
        let (failed, is_logged) = self.note(kind, How::of(error), &chain(error), Instant::now());
        let (server, kind, text) = (&self.server, kind.as_str(), &failed.text);
        if is_logged {
            tracing::warn!(server, kind, "{text}; trying again, and its last state still holds");
        } else {
            tracing::debug!(server, kind, "{text}; trying again");
        }
        failed
    }

    /// Takes in a failure. Returns also whether it is to be logged.
    fn note(&mut self, kind: Kind, how: How, cause: &str, now: Instant) -> (Failed, bool) {
        let is_repeated = how == How::Broken && self.failing.contains_key(&kind);
        let how = if is_repeated { How::Away } else { how };
        let ways: BTreeSet<How> = self.failing.values().cloned().collect();
        let is_news = !ways.contains(&how);
        let _ = self.since.get_or_insert(now);
        let _ = self.failing.insert(kind, how.clone());
        let (kind, server) = (kind.as_str(), &self.server);
        let text = format!("watching {kind} at the API server {server} failed: {cause}");
        (Failed { text, is_news }, how != How::Broken && self.logged.insert(how))
    }

    /// Whether a watch fails now.
    pub(super) fn is_failing(&self) -> bool {
        !self.failing.is_empty()
    }

    /// Takes in that a request of a kind has succeeded. Returns whether that ended all failures.
    pub(super) fn succeeded(&mut self, kind: Kind) -> bool {
        let server = self.server.clone();
        match self.end(kind, Instant::now()) {
            End::None => false,
            End::Quiet => true,
            End::Logged(after) => {
                let after = after.as_secs();
                tracing::info!(server, "the API server {server} answers again, after {after} s");
                true
            }
        }
    }

    fn end(&mut self, kind: Kind, now: Instant) -> End {
        if self.failing.remove(&kind).is_none() || !self.failing.is_empty() {
            return End::None;
        }
        let since = self.since.take().unwrap_or(now);
        if std::mem::take(&mut self.logged).is_empty() {
            return End::Quiet;
        }
        End::Logged(now.saturating_duration_since(since))
    }
}

/// The outcome of a success.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Nothing failed, or something still fails.
    None,
    /// The last failure is over, and its beginning was not logged.
    Quiet,
    /// The last failure is over, after this time.
    Logged(Duration),
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFUSED: &str = "tcp connect error: Connection refused (os error 111)";

    #[test]
    fn an_outage_has_one_line_at_its_begin_and_one_at_its_end() {
        let mut outage = Outage::new("https://10.0.0.1:6443/");
        let begun = Instant::now();
        let mut logged = Vec::new();
        let kinds = [Kind::Service, Kind::EndpointSlice, Kind::Node];
        for second in 0..120 {
            for kind in kinds {
                // The watches break first, and then nobody listens.
                let how = if second == 0 { How::Broken } else { How::Away };
                let now = begun + Duration::from_secs(second);
                let (failed, is_logged) = outage.note(kind, how, REFUSED, now);
                if is_logged {
                    logged.push(failed.text);
                }
            }
        }
        let line =
            format!("watching Service at the API server https://10.0.0.1:6443/ failed: {REFUSED}");
        assert_eq!(logged, [line]);
        let end = begun + Duration::from_secs(121);
        let ends = kinds.map(|kind| outage.end(kind, end));
        assert_eq!(ends, [End::None, End::None, End::Logged(Duration::from_secs(121))]);
        assert_eq!(outage.end(Kind::Node, end), End::None, "it is over");
        // The next one has lines of its own.
        assert!(outage.note(Kind::Node, How::Away, REFUSED, end).1);
    }

    #[test]
    fn a_watch_that_is_made_again_at_once_is_no_outage() {
        let mut outage = Outage::new("https://10.0.0.1:6443/");
        let now = Instant::now();
        let (failed, is_logged) = outage.note(Kind::Service, How::Broken, "unexpected EOF", now);
        assert!(failed.is_news && !is_logged);
        assert_eq!(outage.end(Kind::Service, now), End::Quiet);
        // It does not help to make it again.
        assert!(!outage.note(Kind::Service, How::Broken, "unexpected EOF", now).1);
        assert!(outage.note(Kind::Service, How::Broken, "no certificate", now).1);
        assert!(!outage.note(Kind::Service, How::Broken, "no certificate", now).1);
    }

    #[test]
    fn another_way_of_failing_is_logged_too() {
        let mut outage = Outage::new("https://10.0.0.1:6443/");
        let now = Instant::now();
        let mut note = |kind, how| {
            let (failed, is_logged) = outage.note(kind, how, "why", now);
            (failed.is_news, is_logged)
        };
        assert_eq!(note(Kind::Service, How::Away), (true, true));
        assert_eq!(note(Kind::EndpointSlice, How::Away), (false, false));
        assert_eq!(note(Kind::EndpointSlice, How::Status(403)), (true, true));
        assert_eq!(note(Kind::EndpointSlice, How::Status(403)), (false, false));
        assert_eq!(outage.end(Kind::Service, now), End::None, "one still fails");
        assert_ne!(outage.end(Kind::EndpointSlice, now), End::None);
    }
}
