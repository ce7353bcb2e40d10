//! `cargo xtask cluster down`: removes a cluster by its cgroup, mounts and directory alone, which
//! works after a crash too.

use std::fs;
use std::io;

use anyhow::{Context, Result};
use sluice_lab::mounts;

use crate::cache::Cache;
use crate::cgroup;
use crate::state::State;
use crate::ui::Step;

/// Removes the cluster, and prints that it did.
pub(crate) fn run() -> Result<()> {
    let state = State::open();
    let _lock = Cache::open()?.lock("cluster")?;
    if !is_anything_there(&state)? {
        eprintln!("no cluster is up");
        return Ok(());
    }
    let step = Step::start("cluster");
    tear_down(&state)?;
    step.done("down");
    Ok(())
}

/// Removes what an interrupted run or an earlier boot left behind.
pub(crate) fn remove_remains(state: &State) -> Result<()> {
    if is_anything_there(state)? {
        let step = Step::start("what is left of an earlier cluster");
        tear_down(state)?;
        step.done("removed");
    }
    Ok(())
}

fn is_anything_there(state: &State) -> Result<bool> {
    Ok(state.root().exists() || cgroup::is_there()?)
}

/// Ends every process, then removes namespaces, groups and files, as far as they exist.
fn tear_down(state: &State) -> Result<()> {
    cgroup::destroy(None)?;
    cgroup::take_back(state)?;
    mounts::unmount_below(state.root())?;
    match fs::remove_dir_all(state.root()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", state.root().display()))
        }
        _ => Ok(()),
    }
}
