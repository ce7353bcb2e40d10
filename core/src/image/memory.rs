//! Dataplanes in memory: one that works, and one that fails by a seed.

use std::collections::{BTreeMap, BTreeSet};

use sluice_common::abi::Range;

use super::{ApplyError, Dataplane, Image, ReadError, Write};

/// Maps in memory: the intended content is the content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// What the maps hold.
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
        let used: BTreeSet<u32> = image
            .ports
            .values()
            .flat_map(|port| port.ranges.map(Range))
            .filter(|range| range.size() != 0)
            .map(Range::start)
            .collect();
        image.slots.retain(|start, _| used.contains(start));
        Ok(image)
    }
}

/// A dataplane that fails some writes; which ones follows from the seed alone.
#[derive(Clone, Debug)]
pub struct Faulty<D> {
    /// What carries out the writes that do not fail.
    pub inner: D,
    /// Of 256 writes, about this many fail.
    pub failures: u8,
    random: u64,
}

impl<D> Faulty<D> {
    /// Lets about `failures` of 256 writes to `inner` fail.
    pub fn new(inner: D, failures: u8, seed: u64) -> Self {
        Self { inner, failures, random: seed | 1 }
    }

    /// xorshift64: enough to choose failures by.
    fn next_byte(&mut self) -> u8 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 32) as u8
    }
}

/// The failure that [`Faulty`] invents.
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
