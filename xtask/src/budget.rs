//! The number of instructions that the verifier may process per program (`ebpf/budget.toml`).

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::workspace::Workspace;

/// Limits in verified instructions.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Budget {
    default: u32,
    /// The default of objects that read two layouts of the maps.
    both_layouts: u32,
    stack: u32,
    #[serde(default)]
    programs: BTreeMap<String, u32>,
}

impl Budget {
    /// Reads the workspace's budget.
    pub(crate) fn read(workspace: &Workspace) -> Result<Self> {
        let path = workspace.root().join("ebpf/budget.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("cannot parse {}", path.display()))
    }

    /// Reads the budget of an object that reads two layouts.
    pub(crate) fn of_both_layouts(self) -> Self {
        Self { default: self.both_layouts, ..self }
    }

    /// Returns the limit of one program.
    pub(crate) fn of(&self, program: &str) -> u32 {
        self.programs.get(program).copied().unwrap_or(self.default)
    }

    /// Returns the limit of every program's stack, in bytes.
    pub(crate) fn stack(&self) -> u32 {
        self.stack
    }

    /// Returns the programs that have a limit of their own but do not exist.
    pub(crate) fn unknown(&self, mut exists: impl FnMut(&str) -> bool) -> Vec<&str> {
        self.programs.keys().map(String::as_str).filter(|name| !exists(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_has_its_own_limit_or_the_default() -> Result<()> {
        let budget: Budget = toml::from_str(
            "default = 10\nboth_layouts = 15\nstack = 512\n[programs]\nsluice_xdp = 20\n",
        )?;
        assert_eq!(budget.of("sluice_xdp"), 20);
        assert_eq!(budget.of("sluice_tc"), 10);
        assert_eq!(budget.unknown(|name| name == "sluice_tc"), ["sluice_xdp"]);
        let both = budget.of_both_layouts();
        assert_eq!((both.of("sluice_xdp"), both.of("sluice_tc")), (20, 15));
        assert!(toml::from_str::<Budget>("defualt = 10\nboth_layouts = 15\nstack = 512").is_err());
        Ok(())
    }
}
