//! Sets how many connections the kernel tracks, and for how long, as kube-proxy does when it
//! starts.
//!
//! Otherwise a node would fall back to the kernel's small defaults after a reboot, whatever tracks
//! connections there.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

/// The folder of these settings below `/proc/sys`.
pub const SYSCTLS: &str = "net/netfilter";

/// The wanted settings. Those that are [`None`] stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The number of connections for each CPU; 0 leaves the limit as it is.
    pub max_per_core: Option<u32>,
    /// The least number of connections, if the limit is set at all.
    pub min: Option<u32>,
    /// Whether segments outside the window count as valid.
    pub tcp_be_liberal: bool,
    /// How long an idle TCP connection is tracked.
    pub tcp_established: Option<Duration>,
    /// How long a TCP connection is tracked that the peer has closed.
    pub tcp_close_wait: Option<Duration>,
    /// How long a UDP flow without an answer is tracked.
    pub udp: Option<Duration>,
    /// How long a UDP flow with answers is tracked.
    pub udp_stream: Option<Duration>,
}

/// A setting: its name, its value, and whether it may only grow.
type Setting = (&'static str, u64, bool);

impl Limits {
    fn settings(&self, cpus: u32) -> Vec<Setting> {
        let per_core = self.max_per_core.unwrap_or_default();
        let max = per_core.saturating_mul(cpus).max(self.min.unwrap_or_default());
        let seconds = |name, time: Option<Duration>| {
            time.filter(|time| !time.is_zero()).map(|time| (name, time.as_secs().max(1), false))
        };
        (per_core > 0)
            .then_some(("nf_conntrack_max", u64::from(max), true))
            .into_iter()
            .chain(self.tcp_be_liberal.then_some(("nf_conntrack_tcp_be_liberal", 1, false)))
            .chain(seconds("nf_conntrack_tcp_timeout_established", self.tcp_established))
            .chain(seconds("nf_conntrack_tcp_timeout_close_wait", self.tcp_close_wait))
            .chain(seconds("nf_conntrack_udp_timeout", self.udp))
            .chain(seconds("nf_conntrack_udp_timeout_stream", self.udp_stream))
            .collect()
    }

    /// Writes the settings that differ, below a folder of settings. Describes what failed.
    ///
    /// A kernel that tracks no connections has none of these settings, and needs none.
    #[must_use]
    pub fn apply(&self, sysctls: &Path, cpus: u32) -> Vec<String> {
        let mut failures = Vec::new();
        for (name, value, grows) in self.settings(cpus) {
            match set(&sysctls.join(name), value, grows) {
                Ok(Some(before)) => {
                    tracing::info!(name, before, value, "set a limit of connection tracking");
                }
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    tracing::debug!(
                        name,
                        "this kernel does not have the setting: it tracks no connections"
                    );
                }
                Err(error) => {
                    failures
                        .push(format!("net.netfilter.{name} cannot be set to {value}: {error}"));
                }
            }
        }
        failures
    }
}

/// Writes a number if the present one differs, or is smaller. Returns the number before.
fn set(path: &Path, value: u64, grows: bool) -> io::Result<Option<u64>> {
    let before = fs::read_to_string(path)?;
    let before: u64 = before
        .trim()
        .parse()
        .map_err(|_| io::Error::other(format!("{:?} is no number", before.trim())))?;
    if before == value || grows && before > value {
        return Ok(None);
    }
    fs::write(path, value.to_string())?;
    Ok(Some(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(folder: &Path, name: &str) -> String {
        fs::read_to_string(folder.join(name)).expect("a setting")
    }

    #[test]
    fn what_is_said_is_set_and_the_table_only_grows() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path();
        for name in
            ["nf_conntrack_max", "nf_conntrack_tcp_timeout_established", "nf_conntrack_udp_timeout"]
        {
            fs::write(path.join(name), "30\n").expect("a setting");
        }
        let limits = Limits {
            max_per_core: Some(100),
            min: Some(150),
            tcp_established: Some(Duration::from_hours(24)),
            tcp_close_wait: Some(Duration::from_hours(1)),
            udp: Some(Duration::ZERO),
            ..Limits::default()
        };
        // Not all of them are there.
        assert_eq!(limits.apply(path, 1), [""; 0]);
        assert_eq!(read(path, "nf_conntrack_max"), "150");
        assert_eq!(limits.apply(path, 4), [""; 0]);
        assert_eq!(read(path, "nf_conntrack_max"), "400");
        assert_eq!(limits.apply(path, 2), [""; 0]);
        assert_eq!(read(path, "nf_conntrack_max"), "400", "it is not made smaller");
        assert_eq!(read(path, "nf_conntrack_tcp_timeout_established"), "86400");
        assert_eq!(read(path, "nf_conntrack_udp_timeout"), "30\n", "zero leaves it");
        fs::write(path.join("nf_conntrack_max"), "many").expect("a setting");
        let failures = limits.apply(path, 8);
        assert!(
            failures.len() == 1 && failures[0].contains("\"many\" is no number"),
            "{failures:?}"
        );
    }

    #[test]
    fn no_number_for_each_cpu_leaves_the_table_as_it_is() {
        assert_eq!(
            Limits { max_per_core: Some(0), min: Some(9), ..Limits::default() }.settings(4),
            []
        );
        assert_eq!(Limits { min: Some(9), ..Limits::default() }.settings(4), []);
    }
}
