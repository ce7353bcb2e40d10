//! The source tree, and cargo as every step calls it.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sluice_cluster::process::Cmd;

/// The environment variable by which the agent's build script finds the eBPF object.
pub(crate) const OBJECT_ENV: &str = "SLUICE_BPF_OBJECT";

/// The source tree.
pub(crate) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// Finds the tree by the manifest that cargo names at run time, so that a binary in a target
    /// directory shared between checkouts works on the checkout that it is called in.
    pub(crate) fn find() -> Result<Self> {
        let manifest_dir = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root =
            manifest_dir.parent().context("xtask's manifest has no parent directory")?.to_owned();
        Ok(Self { root })
    }

    /// Returns the directory of the workspace's Cargo.toml.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the target directory of eBPF builds, which is separate so that they never wait for a
    /// host build.
    pub(crate) fn bpf_target_dir(&self) -> PathBuf {
        self.root.join("target/bpf")
    }

    /// Returns the path of the finished eBPF object.
    pub(crate) fn object(&self) -> PathBuf {
        self.bpf_target_dir().join("sluice.o")
    }

    /// Returns the path of the eBPF object of the layout that tests upgrade to.
    pub(crate) fn next_object(&self) -> PathBuf {
        self.bpf_target_dir().join("sluice-next.o")
    }

    /// Returns the path of the eBPF object of the benchmark.
    pub(crate) fn bench_object(&self) -> PathBuf {
        self.bpf_target_dir().join("sluice-bench.o")
    }

    /// Returns cargo for the host, in the workspace's root, with the eBPF object for the agent to
    /// embed if it has been built.
    pub(crate) fn cargo(&self) -> Cmd {
        let program = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let command = Cmd::new(program).dir(&self.root).without_env(set_by_cargo_run());
        let object = self.object();
        if object.is_file() { command.env(OBJECT_ENV, object) } else { command }
    }
}

/// Returns the variables by which `cargo run` describes the xtask package. To build scripts they
/// would look like a change of their environment, and half the tree would be built again.
fn set_by_cargo_run() -> Vec<OsString> {
    env::vars_os()
        .map(|(name, _)| name)
        .filter(|name| {
            name.to_str().is_some_and(|name| {
                name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
            })
        })
        .collect()
}
