//! Compares two contents of the maps entry by entry, and puts the differences in words.
//!
//! `sluice diff` compares what an agent that starts now would make of the maps with what they hold;
//! the agent's audit compares its own plan with them. Both get here what they report.

mod words;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use sluice_common::abi::{self, listing};
use sluice_core::cluster::Programmed;
use sluice_core::image::{Dataplane, Image};

use crate::node::dataplane::{Error, Kernel};

/// The content of the maps, real or wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The plan's maps.
    pub image: Image,
    /// The settings and networks of the programs, if they have been written.
    pub(crate) programmed: Option<Programmed>,
    /// The map `devices`, by ifindex.
    pub devices: BTreeMap<u32, abi::Device>,
}

impl State {
    /// Reads the maps.
    ///
    /// # Errors
    ///
    /// Fails if one cannot be read.
    pub fn read(kernel: &Kernel) -> Result<Self, ReadError> {
        Ok(Self {
            image: kernel.read()?,
            programmed: kernel.maps().read_programmed()?,
            devices: kernel.maps().device_entries()?,
        })
    }
}

/// A map could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// One of the plan's maps.
    #[error(transparent)]
    Image(#[from] sluice_core::image::ReadError),
    /// Another map.
    #[error(transparent)]
    Other(#[from] Error),
}

/// The way an entry differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// The entry is wanted but does not exist.
    Missing,
    /// The entry exists but is not wanted.
    Extra,
    /// The entry has another value.
    Different,
}

impl Change {
    /// Returns the sign in the table: what a repair does.
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
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, schemars::JsonSchema)]
pub struct Difference {
    /// The way it differs.
    pub change: Change,
    /// The map.
    pub map: &'static str,
    /// The key, in words.
    pub key: String,
    /// The wanted value, in words.
    pub wanted: Option<String>,
    /// The value in the map, in words.
    pub found: Option<String>,
    /// The service port that it belongs to, as `namespace/name:port`.
    pub service: Option<String>,
}

/// Returns every entry that differs, in the order of the maps.
#[must_use]
pub fn compare(wanted: &State, found: &State) -> Vec<Difference> {
    let mut rows = words::Rows::new(&wanted.image, &found.image);
    rows.family::<sluice_common::V4>();
    rows.family::<sluice_common::V6>();
    rows.shared(&drained(&wanted.image.lanes, &found.image.lanes));
    rows.programmed(wanted.programmed.as_ref(), found.programmed.as_ref());
    rows.devices(&wanted.devices, &found.devices);
    rows.done()
}

/// Returns the wanted lanes, with the bits of removed frontends that are still set.
fn drained(wanted: &BTreeMap<u32, u8>, found: &BTreeMap<u32, u8>) -> BTreeMap<u32, u8> {
    let lanes: BTreeSet<u32> = wanted.keys().chain(found.keys()).copied().collect();
    let bits = |lanes: &BTreeMap<u32, u8>, lane| lanes.get(&lane).copied().unwrap_or(0);
    lanes
        .into_iter()
        .map(|lane| (lane, bits(wanted, lane) | bits(found, lane) & listing::FRONTEND))
        .filter(|(_, bits)| *bits != 0)
        .collect()
}
