//! This host: its network namespace, its cgroups, and this process's limits.

use std::io;
use std::path::PathBuf;

use anyhow::Context;

/// Returns the cookie of this process's network namespace.
pub(crate) fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind(("127.0.0.1", 0))
        .or_else(|_| std::net::UdpSocket::bind(("0.0.0.0", 0)))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length are live, the length is the value's.
    let result = unsafe {
        libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Returns the mount point of the unified cgroup hierarchy.
pub(crate) fn cgroup2_mount() -> anyhow::Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")
        .context("cannot read /proc/self/mountinfo")?;
    find_cgroup2(&mounts).context("no line of /proc/self/mountinfo has the type cgroup2")
}

fn find_cgroup2(mounts: &str) -> Option<PathBuf> {
    let cgroup2 = mounts.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, path) = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup2 ").then_some((root, path))
    });
    // In a container, the host's tree that is mounted from outside has a root above the container's
    // own (`/..`).
    let outermost =
        cgroup2.rev().max_by_key(|(root, _)| root.split('/').filter(|part| *part == "..").count());
    outermost.map(|(_, path)| PathBuf::from(path))
}

/// Raises this process's limit of descriptors to its hard limit. systemd's soft limit is 1024, for
/// the sake of programs that use `select`; connections, watches and the links of many pods' devices
/// may need more.
pub(crate) fn raise_descriptors() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is live.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    if raised { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_by_its_type() {
        let mounts = "35 24 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      36 24 0:31 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(find_cgroup2("1 2 0:1 / / rw - ext4 /dev/vda rw\n"), None);
        let container = "36 24 0:31 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                         37 24 0:31 /../../.. /host/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(container), Some(PathBuf::from("/host/cgroup")));
    }
}
