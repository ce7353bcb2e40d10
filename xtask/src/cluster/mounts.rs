//! The mounts that this process sees.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// One line of `/proc/self/mountinfo`, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) point: PathBuf,
    pub(super) kind: String,
    /// The options of the file system, not those of this mount of it.
    pub(super) options: String,
}

/// All mounts, in the order they were made.
pub(super) fn mounts() -> Result<Vec<Mount>> {
    let text = fs::read_to_string("/proc/self/mountinfo")
        .context("cannot read /proc/self/mountinfo: is /proc mounted?")?;
    Ok(text.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut right = right.split(' ');
    Some(Mount {
        // Spaces in a path are written as \040; a cluster's own paths have none.
        point: left.split(' ').nth(4)?.into(),
        kind: right.next()?.to_owned(),
        options: right.nth(1)?.to_owned(),
    })
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
