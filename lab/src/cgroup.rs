//! cgroups of labs and clusters: where cgroup v2 is mounted, and how a group ends with everything
//! below it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::mounts::mounts;

/// Returns where cgroup v2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` next to v1.
///
/// # Errors
/// If it is mounted nowhere.
pub fn root() -> Result<PathBuf> {
    mounts()?
        .into_iter()
        .find(|mount| mount.kind == "cgroup2")
        .map(|mount| mount.point)
        .context("no cgroup2 in /proc/self/mountinfo: the lab needs one; try `mount -t cgroup2 none /sys/fs/cgroup/unified`")
}

/// Makes a group, and those above it.
///
/// # Errors
/// If the kernel refuses.
pub fn create(group: &Path) -> Result<()> {
    fs::create_dir_all(group).with_context(|| {
        format!(
            "cannot make the cgroup {}: is its file system mounted read-only, or not root?",
            group.display()
        )
    })
}

/// Kills every process in the groups and below them, then removes the groups. A group that does
/// not exist is no error, nor is one that somebody else is removing too.
///
/// # Errors
/// If a group is still busy after `patience`.
pub fn destroy(groups: &[PathBuf], patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        for group in groups.iter().filter(|group| group.exists()) {
            if fs::write(group.join("cgroup.kill"), "1").is_err() {
                // cgroup v1, or Linux before 5.14, or the group has just gone.
                for_each_below(group, &mut kill_members);
            }
        }
        // A dying process keeps its group busy for a moment.
        let Some(error) = groups.iter().find_map(|group| remove(group).err()) else {
            return Ok(());
        };
        if Instant::now() > deadline {
            bail!("{error}; its processes outlived SIGKILL for {} s", patience.as_secs());
        }
        sleep(Duration::from_millis(2));
    }
}

fn for_each_below(group: &Path, act: &mut dyn FnMut(&Path)) {
    act(group);
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            for_each_below(&entry.path(), act);
        }
    }
}

fn kill_members(group: &Path) {
    let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    for pid in members.lines().filter_map(|line| line.parse().ok()).filter_map(Pid::from_raw) {
        // A process that has just ended needs no killing.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Removes a group and those below it.
fn remove(group: &Path) -> io::Result<()> {
    let explained = |error: io::Error| {
        let text = format!("cannot remove the cgroup {}: {error}", group.display());
        io::Error::new(error.kind(), text)
    };
    let unless_gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(explained),
    };
    let entries = match fs::read_dir(group) {
        Ok(entries) => entries,
        Err(error) => return unless_gone(Err(error)),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path())?;
        }
    }
    unless_gone(fs::remove_dir(group))
}
