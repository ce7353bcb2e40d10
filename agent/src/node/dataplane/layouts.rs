//! Changes the layout in rounds (see [`previous`]): chooses the programs of each round, and moves
//! maps between two rounds.
//!
//! ```text
//! upgrade:    (those of the previous version) -> write the previous -> write this one -> settled
//! downgrade:  settled -> write this one -> write the previous, and stay so for the previous
//!             version to take over
//! ```
//!
//! Each round replaces all programs. Entries are moved when nothing writes to their old place any
//! more.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use sluice_common::abi::previous::{self, Moved, Round, Step};
use sluice_common::abi::{Affinity, AffinityKey, Flow, Ipv4Address, Ipv6Address, LAYOUT, Tuple};
use sluice_common::engine::layouts::{SharedStore, move_entry};

use super::bpf::Table;
use super::error::Error;
use super::maps;
use super::object::Spec;
use super::pins::Pins;
use super::programs::{Loader, Programs};

/// The layout in which an agent writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Layout {
    /// That of this version.
    #[default]
    Current,
    /// That of the version before, for it to take over.
    Previous,
}

/// The progress of a change of layout.
#[derive(Debug)]
pub(super) struct Rounds {
    loader: Loader,
    pins: Pins,
    target: Layout,
    round: Round,
    /// Whether the change is complete.
    is_done: bool,
}

impl Rounds {
    /// Begins in the round that the pins show; see [`Self::programs`] for its programs.
    ///
    /// # Errors
    ///
    /// Fails if the previous layout is asked for and there is none, or the BPF file system refuses.
    pub(super) fn begin(
        loader: Loader,
        pins: &Pins,
        target: Layout,
        old: &BTreeMap<String, Spec>,
    ) -> Result<Self, Error> {
        let round = match target {
            Layout::Previous if previous::LAYOUT.is_none() => {
                return Err(Error::Load {
                    what: "the maps of the previous layout".to_owned(),
                    cause: format!("this version has layout {LAYOUT} and can write no other"),
                    hint: "; leave out --layout. An older version takes over without the flows, whose connections are found again as far as their clients send",
                });
            }
            _ if pins.share_previous(loader.specs(), old)? => Round::WritesPrevious,
            Layout::Current => Round::Settled,
            Layout::Previous => {
                pins.prepare_previous()?;
                Round::WritesCurrent
            }
        };
        Ok(Self { loader, pins: pins.clone(), target, round, is_done: round == Round::Settled })
    }

    /// Returns the programs' round.
    pub(super) fn round(&self) -> Round {
        self.round
    }

    /// Returns the loader.
    pub(super) fn loader(&self) -> &Loader {
        &self.loader
    }

    /// Returns the loader, to be changed before its first use.
    pub(super) fn loader_mut(&mut self) -> &mut Loader {
        &mut self.loader
    }

    /// Loads the programs of the round.
    pub(super) fn programs(&self) -> Result<Programs, Error> {
        let before = match (self.target, self.round) {
            (_, Round::Settled) => None,
            (Layout::Previous, Round::WritesCurrent) => self.pins.previous_maps_new(),
            _ => self.pins.previous_maps(),
        };
        let programs = self.loader.programs(self.round, before.as_deref())?;
        if self.round != Round::Settled {
            tracing::info!(
                round = ?self.round,
                from = previous::LAYOUT,
                to = LAYOUT,
                "programs that read two layouts are loaded"
            );
        }
        Ok(programs)
    }

    /// Begins the next round, if there is one, once all programs are of the present round.
    ///
    /// # Errors
    ///
    /// Fails if maps or programs are refused; the present round stays, and calling again is safe.
    pub(super) fn next(&mut self) -> Result<Option<Programs>, Error> {
        if self.is_done {
            return Ok(None);
        }
        let next = match self.round.step(self.target == Layout::Previous) {
            Step::Load(round) => {
                if round == Round::WritesPrevious {
                    self.pins.offer_previous(self.loader.specs())?;
                }
                Some(round)
            }
            Step::MoveUp => {
                let moved = self.move_entries(true)?;
                tracing::info!(
                    moved,
                    from = previous::LAYOUT,
                    to = LAYOUT,
                    "entries were moved to this layout"
                );
                Some(Round::Settled)
            }
            Step::MoveDown => {
                let moved = self.move_entries(false)?;
                tracing::info!(
                    moved,
                    to = previous::LAYOUT,
                    "entries were moved; the previous version can take over"
                );
                None
            }
            Step::Done => None,
        };
        let Some(next) = next else {
            self.is_done = true;
            return Ok(None);
        };
        let round = std::mem::replace(&mut self.round, next);
        let programs = self.programs().inspect_err(|_| self.round = round)?;
        if next == Round::Settled {
            // Settled programs do not use it, so that nothing may find it in use.
            self.pins.retire_previous()?;
            self.is_done = true;
        }
        Ok(Some(programs))
    }

    /// Replaces the old maps by the new ones, and removes layouts that are no longer needed.
    pub(super) fn commit(&self) -> Result<(), Error> {
        self.pins.commit(self.target == Layout::Previous)
    }

    fn move_entries(&self, up: bool) -> Result<usize, Error> {
        let Some(before) = self.pins.previous_maps() else { return Ok(0) };
        let now = self.loader.folder();
        let mut moved = 0;
        for map in ["flows_v4", "embryonic_v4"] {
            moved += move_map::<Tuple<Ipv4Address>, Flow<Ipv4Address>>(&before, now, map, up)?;
        }
        for map in ["flows_v6", "embryonic_v6"] {
            moved += move_map::<Tuple<Ipv6Address>, Flow<Ipv6Address>>(&before, now, map, up)?;
        }
        moved += move_map::<AffinityKey<Ipv4Address>, Affinity>(&before, now, "affinity_v4", up)?;
        moved += move_map::<AffinityKey<Ipv6Address>, Affinity>(&before, now, "affinity_v6", up)?;
        Ok(moved)
    }
}

fn move_map<K, V>(before: &Path, now: &Path, map: &str, up: bool) -> Result<usize, Error>
where
    K: aya::Pod,
    V: aya::Pod + Moved + PartialEq,
    V::Before: aya::Pod + PartialEq,
{
    let before: Table<K, V::Before> = maps::table(before, map)?;
    let now: Table<K, V> = maps::table(now, map)?;
    let moved =
        if up { move_all(&before, &now, V::after) } else { move_all(&now, &before, V::before) };
    moved.map_err(|cause| Error::map("move the entries of", map, cause))
}

/// Moves all entries while programs use both tables.
fn move_all<K: aya::Pod, A: aya::Pod, B: aya::Pod + PartialEq>(
    from: &Table<K, A>,
    to: &Table<K, B>,
    convert: impl Fn(&A) -> B,
) -> io::Result<usize> {
    let mut moved = 0;
    if from.id() == to.id() {
        return Ok(moved);
    }
    for (key, _) in from.entries()? {
        moved += usize::from(move_entry(from, to, &key, &convert)?);
    }
    Ok(moved)
}

impl<K: aya::Pod, V: aya::Pod> SharedStore<K, V> for Table<K, V> {
    type Error = io::Error;

    fn get(&self, key: &K) -> io::Result<Option<V>> {
        self.get(key)
    }

    fn insert_new(&self, key: &K, value: &V) -> io::Result<bool> {
        self.insert_new(key, value)
    }

    fn take(&self, key: &K) -> io::Result<bool> {
        self.take(key)
    }
}
