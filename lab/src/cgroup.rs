//! The cgroup v2 tree of a lab: where it is mounted, and how everything below one group ends.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// One line of `/proc/self/mountinfo`, as far as the lab reads it.
pub(crate) struct Mount {
    pub(crate) point: PathBuf,
    pub(crate) kind: String,
}

/// The mounts this process sees, in the order they were made.
pub(crate) fn mounts() -> Result<Vec<Mount>> {
    let text = fs::read_to_string("/proc/self/mountinfo")
        .context("cannot read /proc/self/mountinfo: is /proc mounted?")?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            // Spaces in a path are written as \040; the lab's own paths have none, so such a mount
            // is never one of ours.
            Some(Mount {
                point: left.split(' ').nth(4)?.into(),
                kind: right.split(' ').next()?.into(),
            })
        })
        .collect())
}

/// Where the cgroup v2 hierarchy is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside
/// v1.
pub(crate) fn root() -> Result<PathBuf> {
    mounts()?
        .into_iter()
        .find(|mount| mount.kind == "cgroup2")
        .map(|mount| mount.point)
        .context("no cgroup2 in /proc/self/mountinfo: the lab needs one; try `mount -t cgroup2 none /sys/fs/cgroup/unified`")
}

/// Makes a group, and those above it.
pub(crate) fn create(group: &Path) -> Result<()> {
    fs::create_dir_all(group).with_context(|| {
        format!(
            "cannot make the cgroup {}: is cgroup2 mounted read-only, or not root?",
            group.display()
        )
    })
}

/// Kills every process in the group and below, then removes the groups. A group that is not there
/// is no error, nor is one that somebody else is removing too.
pub(crate) fn destroy(group: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while group.exists() {
        if fs::write(group.join("cgroup.kill"), "1").is_err() {
            // Before Linux 5.14, or the group has just gone.
            for_each_below(group, &mut |below| kill_members(below));
        }
        // A dying process keeps its group busy for a moment.
        if let Err(error) = remove(group) {
            if Instant::now() > deadline {
                bail!(
                    "cannot remove the cgroup {}: {error}; its processes outlived SIGKILL for 5 s",
                    group.display()
                );
            }
            sleep(Duration::from_millis(2));
        }
    }
    Ok(())
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
    for pid in members.lines().filter_map(|line| line.parse().ok()) {
        // SAFETY: kill(2) takes plain numbers; the process is a member of a cgroup that only the
        // lab fills.
        let _ = unsafe { libc::kill(pid, libc::SIGKILL) };
    }
}

fn remove(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
