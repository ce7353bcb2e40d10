//! The tiers, and the assignment of test binaries to them.

use std::fmt;

use clap::ValueEnum;
use sluice_cluster::packages::{self, Tool};

use crate::artifacts::Artifact;

/// A group of tests with the same requirements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Tier {
    /// Tests that need nothing but the compiler.
    Unit,
    /// Kernel programs, run one by one with BPF_PROG_TEST_RUN.
    Kernel,
    /// Traffic through nodes, pods and clients in network namespaces.
    Lab,
    /// The agent against a real API server.
    Api,
}

impl Tier {
    /// All of them, cheapest first.
    pub(crate) const ALL: [Self; 4] = [Self::Unit, Self::Kernel, Self::Lab, Self::Api];

    /// Returns the name, which is also that of its directory in `agent/tests`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Kernel => "kernel",
            Self::Lab => "lab",
            Self::Api => "api",
        }
    }

    /// Returns the system tools that its tests call.
    pub(crate) fn tools(self) -> &'static [Tool] {
        match self {
            Self::Unit => &[],
            Self::Kernel => packages::KERNEL,
            Self::Lab => packages::LAB,
            Self::Api => packages::API,
        }
    }

    /// Returns the tier of a test binary: by its name if it is an integration test of the agent,
    /// otherwise unit.
    pub(crate) fn of(artifact: &Artifact) -> Self {
        let name = &artifact.target.name;
        Self::ALL
            .into_iter()
            .find(|tier| {
                artifact.is_integration_test() && artifact.is_agents() && name == tier.name()
            })
            .unwrap_or(Self::Unit)
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
