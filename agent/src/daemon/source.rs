//! The sources of objects. Kubernetes' types are known nowhere else.

pub mod decode;
pub mod kubernetes;
pub mod lint;
mod lists;
pub mod manifests;
pub mod names;
mod yaml;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// The state of a source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// The time at which the source last got an answer from the server or directory of its objects.
    pub answered: Option<SystemTime>,
    /// The error since then and when it began, or [`None`] if there is none.
    pub failure: Option<(String, SystemTime)>,
    /// Whether its first full list is complete.
    pub synced: bool,
}

/// The state of a source, to be read while it runs.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<Mutex<Health>>);

impl Pulse {
    /// Returns the present state.
    pub fn health(&self) -> Health {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records a success. Returns whether there was an error before.
    fn succeeded(&self) -> bool {
        let mut health = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        health.answered = Some(SystemTime::now());
        health.failure.take().is_some()
    }

    /// Records that something was answered although something else still fails.
    fn answered(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).answered = Some(SystemTime::now());
    }

    /// Records an error. The time of the first one stays.
    fn failed(&self, why: String) {
        let mut health = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = health.failure.take().map_or_else(SystemTime::now, |(_, since)| since);
        health.failure = Some((why, since));
    }

    fn synced(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).synced = true;
    }
}
