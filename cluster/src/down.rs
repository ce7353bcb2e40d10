//! `cargo xtask cluster down`: takes down what is there, by the cgroup, the mounts and the
//! directory alone, so that it does so after a crash too.

use std::fs;
use std::io;

use anyhow::{Context, Result};
use sluice_lab::mounts;

use crate::cache::Cache;
use crate::cgroup;
use crate::state::State;
use crate::ui::Step;

/// Takes the cluster down, and says so.
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

/// Takes down what an interrupted run or an earlier boot left, if there is anything.
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

/// Ends every process, then removes namespaces, groups and files. What is not there is no error.
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
