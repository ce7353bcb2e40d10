//! What the sources want against what the maps hold, entry by entry: `sluice diff`.
//!
//! [`Wanted`] is what an agent that starts now would make of the maps: it adopts their ids, so that
//! the same objects give the same entries, and only real differences remain. [`compare`] names
//! them. Both are pure; who reads the sources, the devices and the maps is the command
//! (`cli::diff`).
//!
//! Three things are no difference. A bit of `addresses` or `node_ports` may outlive its frontend,
//! since connections to it drain; what the path itself remembers (flows, affinity, counters) nobody
//! wants; and the network namespace's cookie and our own device in `settings` are facts of the node
//! that the agent alone knows.

mod wanted;
mod words;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use sluice_common::abi::{self, listing};
use sluice_core::cluster::Programmed;
use sluice_core::image::{Dataplane, Image};

use crate::node::dataplane::{Error, Kernel};

pub use wanted::{Inputs, Wanted, wanted};

/// What the maps hold, or shall hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The plan's maps.
    pub image: Image,
    /// What the programs are told; [`None`]: nothing so far.
    pub(crate) told: Option<Programmed>,
    /// ifindex -> device; the map `devices`.
    pub devices: BTreeMap<u32, abi::Device>,
}

impl State {
    /// Reads the maps.
    ///
    /// # Errors
    ///
    /// When one cannot be read.
    pub fn read(kernel: &Kernel) -> Result<Self, ReadError> {
        Ok(Self {
            image: kernel.read()?,
            told: kernel.maps().read_programmed()?,
            devices: kernel.maps().device_entries()?,
        })
    }
}

/// A map could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// One of the plan's.
    #[error(transparent)]
    Image(#[from] sluice_core::image::ReadError),
    /// Another.
    #[error(transparent)]
    Other(#[from] Error),
}

/// How an entry differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// It is wanted and not there.
    Missing,
    /// It is there and nobody wants it.
    Extra,
    /// It is there with another value.
    Different,
}

impl Change {
    /// The sign in the table: what a repair does.
    #[must_use]
    pub fn sign(self) -> &'static str {
        match self {
            Self::Missing => "+",
            Self::Extra => "-",
            Self::Different => "~",
        }
    }
}

/// An entry that differs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// How.
    pub change: Change,
    /// The map.
    pub map: &'static str,
    /// The key, in words.
    pub key: String,
    /// The value that is wanted, in words.
    pub wanted: Option<String>,
    /// The value that is there, in words.
    pub found: Option<String>,
    /// The service port that it belongs to, as `namespace/name:port`.
    pub service: Option<String>,
}

/// Every entry that differs, in the order of the maps.
#[must_use]
pub fn compare(wanted: &State, found: &State) -> Vec<Difference> {
    let mut rows = words::Rows::new(&wanted.image, &found.image);
    rows.family::<sluice_common::V4>();
    rows.family::<sluice_common::V6>();
    rows.shared(&drained(&wanted.image.lanes, &found.image.lanes));
    rows.told(wanted.told.as_ref(), found.told.as_ref());
    rows.devices(&wanted.devices, &found.devices);
    rows.done()
}

/// The lanes that are wanted, with the bits of frontends that are gone where they are still there.
fn drained(wanted: &BTreeMap<u32, u8>, found: &BTreeMap<u32, u8>) -> BTreeMap<u32, u8> {
    let lanes: BTreeSet<u32> = wanted.keys().chain(found.keys()).copied().collect();
    let bits = |lanes: &BTreeMap<u32, u8>, lane| lanes.get(&lane).copied().unwrap_or(0);
    lanes
        .into_iter()
        .map(|lane| (lane, bits(wanted, lane) | bits(found, lane) & listing::FRONTEND))
        .filter(|(_, bits)| *bits != 0)
        .collect()
}

#[cfg(test)]
mod tests;
