//! The mounts that this process sees.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// One line of `/proc/self/mountinfo`, reduced to what labs and clusters need.
#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount point.
    pub point: PathBuf,
    /// The type of the file system.
    pub kind: String,
    /// The options of the file system, not those of this mount of it.
    pub options: String,
}

/// Returns all mounts, in the order in which they were made.
///
/// # Errors
/// If `/proc/self/mountinfo` cannot be read.
pub fn mounts() -> Result<Vec<Mount>> {
    let text = fs::read_to_string("/proc/self/mountinfo")
        .context("cannot read /proc/self/mountinfo: is /proc mounted?")?;
    Ok(text.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut right = right.split(' ');
    Some(Mount {
        // Spaces in a path are written as \040. Our own paths have none, so such a mount is never
        // one of ours.
        point: left.split(' ').nth(4)?.into(),
        kind: right.next()?.to_owned(),
        options: right.nth(1)?.to_owned(),
    })
}

/// Unmounts everything below a directory, the newest mount first. A mount that somebody else has
/// just removed is no error.
///
/// # Errors
/// If a mount cannot be removed; the others are tried all the same.
pub fn unmount_below(directory: &Path) -> Result<()> {
    let mut outcome = Ok(());
    for mount in mounts()?.into_iter().rev().filter(|mount| mount.point.starts_with(directory)) {
        match rustix::mount::unmount(&mount.point, UnmountFlags::DETACH) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => {
                outcome =
                    Err(error).with_context(|| format!("cannot unmount {}", mount.point.display()));
            }
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_has_its_options_at_the_end() {
        let line =
            "30 26 0:27 / /sys/fs/cgroup/cpu rw,nosuid shared:9 - cgroup none rw,cpu,cpuacct";
        let expected = Mount {
            point: "/sys/fs/cgroup/cpu".into(),
            kind: "cgroup".into(),
            options: "rw,cpu,cpuacct".into(),
        };
        assert_eq!(parse(line), Some(expected));
    }
}
