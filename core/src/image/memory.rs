//! Dataplanes in memory: one that always works, and one that fails at random.

use std::collections::{BTreeMap, BTreeSet};

use sluice_common::abi::Range;

use super::{ApplyError, Dataplane, Image, ReadError, Write};

/// Maps in memory, as an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The content of the maps.
    pub image: Image,
}

impl Dataplane for Memory {
    fn apply(&mut self, writes: &[Write]) -> Result<(), ApplyError> {
        for write in writes {
            self.image.apply(write);
        }
        Ok(())
    }

    fn read(&self) -> Result<Image, ReadError> {
        let mut image = self.image.clone();
        image.ports = image
            .names
            .keys()
            .map(|id| (*id, self.image.ports.get(id).copied().unwrap_or_default()))
            .collect::<BTreeMap<_, _>>();
        let used: BTreeSet<u32> = image.used_ranges().map(Range::start).collect();
        image.slots.retain(|start, _| used.contains(start));
        Ok(image)
    }
}

/// A dataplane that fails some writes, chosen by a seed alone.
#[derive(Clone, Debug)]
pub struct Faulty<D> {
    /// The dataplane that carries out the other writes.
    pub inner: D,
    /// The number of 256 writes that fail, on average.
    pub failures: u8,
    random: u64,
}

impl<D> Faulty<D> {
    /// Wraps `inner` so that about `failures` of 256 writes to it fail.
    pub fn new(inner: D, failures: u8, seed: u64) -> Self {
        Self { inner, failures, random: seed | 1 }
    }

    /// Returns the next byte of a xorshift64 generator.
    fn next_byte(&mut self) -> u8 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 32) as u8
    }
}

/// The failure that [`Faulty`] reports.
#[derive(Debug, thiserror::Error)]
#[error("a seeded fault")]
struct Fault;

impl<D: Dataplane> Dataplane for Faulty<D> {
    fn apply(&mut self, writes: &[Write]) -> Result<(), ApplyError> {
        for (done, write) in writes.iter().enumerate() {
            if self.next_byte() < self.failures {
                return Err(ApplyError {
                    done,
                    what: format!("{write:?}"),
                    cause: Box::new(Fault),
                });
            }
            self.inner
                .apply(std::slice::from_ref(write))
                .map_err(|error| ApplyError { done, ..error })?;
        }
        Ok(())
    }

    fn read(&self) -> Result<Image, ReadError> {
        self.inner.read()
    }
}
