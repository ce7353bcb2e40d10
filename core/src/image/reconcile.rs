//! Carries out writes and repeats those that failed.

use super::{ApplyError, Dataplane, Image, ReadError, Write, diff};

/// A dataplane with the writes that are still due.
///
/// The order of writes matters, so all that follow a failed one wait for it. The maps keep their
/// last good state until it succeeds. [`Self::resync`] replaces one that never does.
#[derive(Debug)]
pub struct Reconciler<D> {
    /// The maps.
    pub dataplane: D,
    due: Vec<Write>,
}

impl<D: Dataplane> Reconciler<D> {
    /// Creates a reconciler with nothing due.
    pub fn new(dataplane: D) -> Self {
        Self { dataplane, due: Vec::new() }
    }

    /// Appends writes to those that are due.
    pub fn push(&mut self, mut writes: Vec<Write>) {
        self.due.append(&mut writes);
    }

    /// Returns the number of writes that are due.
    pub fn due(&self) -> usize {
        self.due.len()
    }

    /// Carries out the writes that are due, after which the maps are as planned.
    ///
    /// # Errors
    ///
    /// Returns the first failure. Writes that were not carried out stay due.
    pub fn run(&mut self) -> Result<(), ApplyError> {
        let result = self.dataplane.apply(&self.due);
        let done = match &result {
            Ok(()) => self.due.len(),
            Err(error) => error.done.min(self.due.len()),
        };
        let _ = self.due.drain(..done);
        result
    }

    /// Replaces the writes that are due by those that lead from the maps' present content to
    /// `image`.
    ///
    /// # Errors
    ///
    /// Fails if the maps cannot be read; nothing changes then.
    pub fn resync(&mut self, image: &Image) -> Result<(), ReadError> {
        self.due = diff(&self.dataplane.read()?, image);
        Ok(())
    }
}
