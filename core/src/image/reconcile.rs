//! Carries writes out, and again those that failed.

use super::{ApplyError, Dataplane, Image, ReadError, Write, diff};

/// A dataplane with the writes that are still due.
///
/// Writes are steps of one order, so what follows a failed one waits for it: the maps keep
/// their last good state until it succeeds. One that never does is overcome by [`Self::resync`].
#[derive(Debug)]
pub struct Reconciler<D> {
    /// The maps.
    pub dataplane: D,
    due: Vec<Write>,
}

impl<D: Dataplane> Reconciler<D> {
    /// A reconciler with nothing due.
    pub fn new(dataplane: D) -> Self {
        Self { dataplane, due: Vec::new() }
    }

    /// Adds writes behind those that are due.
    pub fn push(&mut self, mut writes: Vec<Write>) {
        self.due.append(&mut writes);
    }

    /// How many writes are due.
    pub fn due(&self) -> usize {
        self.due.len()
    }

    /// Carries out what is due. When it succeeds the maps are as the plan has them.
    ///
    /// # Errors
    ///
    /// The first failure. What was not carried out stays due.
    pub fn run(&mut self) -> Result<(), ApplyError> {
        let result = self.dataplane.apply(&self.due);
        let done = match &result {
            Ok(()) => self.due.len(),
            Err(error) => error.done.min(self.due.len()),
        };
        let _ = self.due.drain(..done);
        result
    }

    /// Replaces what is due by what leads from the maps' present content to `image`.
    ///
    /// # Errors
    ///
    /// When the maps cannot be read; then nothing has changed.
    pub fn resync(&mut self, image: &Image) -> Result<(), ReadError> {
        self.due = diff(&self.dataplane.read()?, image);
        Ok(())
    }
}
