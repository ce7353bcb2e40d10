//! The facts of a lab that all of its parts know.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::leftovers::KEEP;

/// The lab that a namespace or process belongs to.
pub(crate) struct Shared {
    pub(crate) id: String,
    pub(crate) state: PathBuf,
    pub(crate) cgroup: PathBuf,
    /// Numbers log files and other names that must differ.
    next: AtomicU32,
}

impl Shared {
    pub(crate) fn new(id: String, state: PathBuf, cgroup: PathBuf) -> Self {
        Self { id, state, cgroup, next: AtomicU32::new(0) }
    }

    pub(crate) fn number(&self) -> u32 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn kept(&self) -> bool {
        self.state.join(KEEP).exists()
    }
}
