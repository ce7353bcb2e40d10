//! The artifacts of a cargo build, as cargo reports them (`--message-format=json`).

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;
use sluice_cluster::process::Cmd;

/// A target that was built.
#[derive(Debug, Deserialize)]
pub(crate) struct Artifact {
    /// The manifest of its package.
    pub(crate) manifest_path: PathBuf,
    /// The target itself.
    pub(crate) target: Target,
    profile: Profile,
    filenames: Vec<PathBuf>,
    executable: Option<PathBuf>,
}

/// A cargo target.
#[derive(Debug, Deserialize)]
pub(crate) struct Target {
    /// Its name.
    pub(crate) name: String,
    kind: Vec<String>,
    /// Its root source file.
    pub(crate) src_path: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Profile {
    test: bool,
}

impl Artifact {
    /// Whether it belongs to the agent's package.
    pub(crate) fn is_agents(&self) -> bool {
        self.manifest_path.ends_with("agent/Cargo.toml")
    }

    /// Whether it is a libtest binary.
    pub(crate) fn is_test_binary(&self) -> bool {
        self.profile.test && self.executable.is_some()
    }

    /// Whether it is an integration test (`tests/*.rs`).
    pub(crate) fn is_integration_test(&self) -> bool {
        self.is_test_binary() && self.has_kind("test")
    }

    /// Returns the file of a binary that is not a test.
    pub(crate) fn binary(&self) -> Option<&PathBuf> {
        // For BPF cargo reports no executable, only files.
        (self.has_kind("bin") && !self.profile.test)
            .then(|| self.executable.as_ref().or_else(|| self.filenames.first()))
            .flatten()
    }

    /// Returns the file to run.
    pub(crate) fn executable(&self) -> Option<&PathBuf> {
        self.executable.as_ref()
    }

    fn has_kind(&self, kind: &str) -> bool {
        self.target.kind.iter().any(|own| own == kind)
    }
}

/// Runs a cargo build and returns everything that it built or found fresh. Diagnostics and progress
/// go to this terminal.
pub(crate) fn build(cargo: Cmd) -> Result<Vec<Artifact>> {
    let output = cargo.arg("--message-format=json-render-diagnostics").stdout()?;
    parse(&output)
}

/// Builds one binary and returns its file.
pub(crate) fn build_binary(cargo: Cmd) -> Result<PathBuf> {
    build(cargo)?.iter().rev().find_map(Artifact::binary).cloned().context("cargo built no binary")
}

fn parse(messages: &str) -> Result<Vec<Artifact>> {
    #[derive(Deserialize)]
    struct Reason {
        reason: String,
    }
    let mut artifacts = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let context = || format!("cannot read cargo's message: {line}");
        let Reason { reason } = serde_json::from_str(line).with_context(context)?;
        if reason == "compiler-artifact" {
            artifacts.push(serde_json::from_str(line).with_context(context)?);
        }
    }
    Ok(artifacts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn artifacts_are_told_apart_by_kind_and_profile() -> Result<()> {
        let artifact = |kind: &str, test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/p/Cargo.toml","target":{{"kind":["{kind}"],"name":"n","src_path":"/p/n.rs"}},"profile":{{"opt_level":"0","test":{test}}},"filenames":["/p/file"],"executable":{executable}}}"#
            )
        };
        let messages = [
            artifact("lib", false, "null"),
            artifact("bin", false, "\"/p/exe\""),
            artifact("bin", true, "\"/p/unit\""),
            artifact("test", true, "\"/p/integration\""),
            artifact("bin", false, "null"),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ]
        .join("\n");
        let artifacts = parse(&messages)?;
        let binaries: Vec<_> = artifacts.iter().filter_map(Artifact::binary).collect();
        assert_eq!(binaries, [&PathBuf::from("/p/exe"), &PathBuf::from("/p/file")]);
        assert_eq!(artifacts.iter().filter(|a| a.is_test_binary()).count(), 2);
        assert_eq!(artifacts.iter().filter(|a| a.is_integration_test()).count(), 1);
        Ok(())
    }
}
