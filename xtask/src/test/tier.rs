//! The tiers, and which test binary belongs to which.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::artifacts::Artifact;
use crate::packages::{self, Tool};
use crate::workspace::Workspace;

/// A group of tests with the same needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// Tests that need nothing but the compiler.
    Unit,
    /// Kernel programs run one by one with BPF_PROG_TEST_RUN.
    Kernel,
    /// Traffic through nodes, pods and clients in network namespaces.
    Lab,
    /// The agent against a real API server.
    Api,
}

impl Tier {
    /// All of them, cheapest first.
    pub(crate) const ALL: [Self; 4] = [Self::Unit, Self::Kernel, Self::Lab, Self::Api];

    /// The name, which is also the prefix of its files in `agent/tests`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Kernel => "kernel",
            Self::Lab => "lab",
            Self::Api => "api",
        }
    }

    /// The system tools its tests call.
    pub(crate) fn tools(self) -> &'static [Tool] {
        match self {
            Self::Unit => &[],
            Self::Kernel => packages::KERNEL,
            Self::Lab => packages::LAB,
            Self::Api => packages::API,
        }
    }

    /// The tier of a test binary: by its name if it is an integration test of
    /// the agent, else unit.
    pub(crate) fn of(artifact: &Artifact) -> Self {
        if artifact.is_integration_test() && artifact.is_agents() {
            Self::of_name(&artifact.target.name)
        } else {
            Self::Unit
        }
    }

    fn of_name(name: &str) -> Self {
        [Self::Kernel, Self::Lab, Self::Api]
            .into_iter()
            .find(|tier| name.starts_with(tier.name()))
            .unwrap_or(Self::Unit)
    }

    /// How many tests of a binary run at once: as its source says in a line
    /// `//! test-threads: N`, else one where tests share the machine.
    pub(crate) fn threads(self, source: &Path) -> Result<Option<u32>> {
        let text = fs::read_to_string(source)
            .with_context(|| format!("cannot read {}", source.display()))?;
        Ok(own_threads(&text).or(match self {
            Self::Unit => None,
            Self::Kernel => Some(2),
            Self::Lab | Self::Api => Some(1),
        }))
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn own_threads(source: &str) -> Option<u32> {
    source
        .lines()
        .take_while(|line| line.starts_with("//!") || line.is_empty())
        .find_map(|line| line.strip_prefix("//! test-threads:")?.trim().parse().ok())
}

/// Whether the agent has tests of one of these tiers.
pub(crate) fn has_tests(workspace: &Workspace, tiers: &[Tier]) -> Result<bool> {
    let directory = workspace.root().join("agent/tests");
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot list {}", directory.display()));
        }
    };
    for entry in entries {
        let path = entry?.path();
        let is_test = path.extension().is_some_and(|extension| extension == "rs")
            || path.join("main.rs").is_file();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if is_test && tiers.contains(&Tier::of_name(&name)) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_test_file_decides_its_tier() {
        assert_eq!(Tier::of_name("kernel_path"), Tier::Kernel);
        assert_eq!(Tier::of_name("lab_bridge"), Tier::Lab);
        assert_eq!(Tier::of_name("api"), Tier::Api);
        assert_eq!(Tier::of_name("scenarios"), Tier::Unit);
    }

    #[test]
    fn a_source_may_say_its_own_number_of_threads() {
        assert_eq!(own_threads("//! Traffic.\n//!\n//! test-threads: 4\n\nuse a;\n"), Some(4));
        assert_eq!(own_threads("//! Traffic.\nuse a;\n//! test-threads: 4\n"), None);
    }
}
