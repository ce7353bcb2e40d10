//! The time to wait before a failed operation is retried.
//!
//! Its users wait for other events at the same time, or return later. They need the waiting times
//! one after another, and not a loop around an operation.

use std::time::Duration;

/// Waiting times after failures: doubled from the first to the last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    last: Duration,
    next: Duration,
}

impl Backoff {
    /// Creates a backoff from the first waiting time to the last.
    pub(crate) const fn new(first: Duration, last: Duration) -> Self {
        Self { first, last, next: first }
    }

    /// Returns the time to wait after one more failure.
    pub(crate) fn failed(&mut self) -> Duration {
        let wait = self.next;
        self.next = wait.saturating_mul(2).min(self.last);
        wait
    }

    /// Starts with the first time again.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_last_and_begin_anew() {
        let seconds = Duration::from_secs;
        let mut backoff = Backoff::new(seconds(2), seconds(7));
        assert_eq!([(); 4].map(|()| backoff.failed()), [2, 4, 7, 7].map(seconds));
        backoff.reset();
        assert_eq!(backoff.failed(), seconds(2));
    }
}
