//! A change of the maps' layout on a node: the layout that each of its programs knows, and the
//! progress of its agent. See `sluice_common::abi::previous`.

use std::collections::BTreeMap;

use sluice_common::abi::previous::Round;
use sluice_common::path::Hook;

/// The layouts that a program knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It is the previous version's, and knows that version's layout alone.
    Previous,
    /// It is of a round of this version.
    Round(Round),
}

/// The version of a node's agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// The previous one.
    Previous,
    /// This one, which writes its own layout in the end.
    Current,
    /// This one with `--layout previous`.
    Returning,
}

/// The layouts of a node's maps.
#[derive(Clone, Debug)]
pub struct Layouts {
    /// The version of the agent.
    pub version: Version,
    /// The agent's round.
    pub round: Round,
    /// Whether maps of the previous layout are where the agent that starts next finds them.
    pub has_previous: bool,
    programs: Vec<(u32, Hook)>,
    stages: BTreeMap<(u32, u8), Stage>,
}

/// Returns a hook as part of a key.
fn place(hook: Hook) -> u8 {
    match hook {
        Hook::Xdp => 0,
        Hook::Ingress => 1,
        Hook::Egress => 2,
    }
}

impl Layouts {
    /// Returns the layouts of a node with programs of this version on these devices, or of the
    /// previous one.
    #[must_use]
    pub fn new(devices: impl Iterator<Item = u32>, version: Version) -> Self {
        let hooks = [Hook::Xdp, Hook::Ingress, Hook::Egress];
        let programs: Vec<_> =
            devices.flat_map(|device| hooks.map(|hook| (device, hook))).collect();
        let mut layouts = Self {
            version,
            round: Round::Settled,
            has_previous: version == Version::Previous,
            programs,
            stages: BTreeMap::new(),
        };
        for program in 0..layouts.programs.len() {
            let _ = layouts.replace(program);
        }
        layouts
    }

    /// Returns the layouts that the program of a device's hook knows.
    #[must_use]
    pub fn stage(&self, ifindex: u32, hook: Hook) -> Stage {
        let stage = self.stages.get(&(ifindex, place(hook)));
        stage.copied().unwrap_or(Stage::Round(Round::Settled))
    }

    /// Replaces a program by one of the agent's round. Returns whether others are left.
    pub fn replace(&mut self, program: usize) -> bool {
        let stage = match self.version {
            Version::Previous => Stage::Previous,
            Version::Current | Version::Returning => Stage::Round(self.round),
        };
        if let Some((ifindex, hook)) = self.programs.get(program) {
            let _ = self.stages.insert((*ifindex, place(*hook)), stage);
        }
        program + 1 < self.programs.len()
    }

    /// Begins the rounds of an agent that starts.
    pub fn begin(&mut self) {
        self.round = match self.version {
            _ if self.has_previous => Round::WritesPrevious,
            Version::Returning => Round::WritesCurrent,
            Version::Previous | Version::Current => Round::Settled,
        };
    }
}
