//! `cargo xtask cluster`, and clusters for tests: [`sluice_cluster`] with Sluice from this tree.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use sluice_cluster::cache::Cache;
use sluice_cluster::{Command, Tree, UpOptions};

use crate::toolchain::{self, Choice};
use crate::workspace::Workspace;
use crate::{agent, ebpf, image};

/// Runs a command of `cargo xtask cluster`.
pub(crate) fn run(workspace: &Workspace, choice: Choice, command: &Command) -> Result<ExitCode> {
    with_tree(workspace, choice, |tree| sluice_cluster::run(tree, command))
}

/// Brings a cluster up for tests, or repairs the one that is up.
pub(crate) fn ensure_up(workspace: &Workspace, choice: Choice, options: &UpOptions) -> Result<()> {
    with_tree(workspace, choice, |tree| sluice_cluster::ensure_up(tree, options))
}

fn with_tree<T>(workspace: &Workspace, choice: Choice, act: impl FnOnce(&Tree<'_>) -> T) -> T {
    act(&Tree {
        root: workspace.root(),
        build: &|| {
            let toolchain = toolchain::obtain(&Cache::open()?, choice)?;
            let _object = ebpf::build(workspace, &toolchain)?;
            agent::build_release(workspace)
        },
        write_image: &|binary: &Path, name, directory| {
            if !agent::is_static(binary)? {
                return Ok(None);
            }
            image::write(workspace, binary, name, directory).map(|written| Some(written.archive))
        },
    })
}
