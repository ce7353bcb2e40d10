//! `sluice pause`: waits, as the container does that keeps a pod Running.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::{Outcome, runtime};

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
///
/// Fails if the kernel refuses the signal handlers.
pub(super) fn run() -> anyhow::Result<Outcome> {
    runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(Outcome::default())
    })
}
