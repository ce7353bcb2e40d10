//! Where objects come from. Nothing outside knows Kubernetes' types.

pub mod decode;
pub mod kubernetes;
mod lists;
pub mod manifests;
mod yaml;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// How a source is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// When it last heard from where its objects come from.
    pub heard: Option<SystemTime>,
    /// What went wrong since, and when; [`None`] while all is well.
    pub failure: Option<(String, SystemTime)>,
    /// Its first full list is complete.
    pub synced: bool,
}

/// A source's health, to be read while it runs.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<Mutex<Health>>);

impl Pulse {
    /// The present state.
    pub fn health(&self) -> Health {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes a success, and returns whether something was wrong before.
    fn heard(&self) -> bool {
        let mut health = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        health.heard = Some(SystemTime::now());
        health.failure.take().is_some()
    }

    /// Notes a failure; the time of the first stays.
    fn failed(&self, why: String) {
        let mut health = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = health.failure.take().map_or_else(SystemTime::now, |(_, since)| since);
        health.failure = Some((why, since));
    }

    fn synced(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).synced = true;
    }
}
