//! Sets how many connections the kernel tracks, and for how long, as kube-proxy does when it
//! starts.
//!
//! Otherwise a node would fall back to the kernel's small defaults after a reboot, whatever tracks
//! connections there. What is changed is recorded with the value before, so that `sluice cleanup`
//! puts it back.

use std::collections::BTreeMap;
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
    /// The time for which an idle TCP connection is tracked.
    pub tcp_established: Option<Duration>,
    /// The time for which a TCP connection is tracked that the peer has closed.
    pub tcp_close_wait: Option<Duration>,
    /// The time for which a UDP flow without an answer is tracked.
    pub udp: Option<Duration>,
    /// The time for which a UDP flow with answers is tracked.
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

    /// Writes the settings that differ, below a folder of settings, and records them. Describes
    /// what failed.
    ///
    /// A kernel that tracks no connections has none of these settings, and needs none.
    #[must_use]
    pub fn apply(&self, sysctls: &Path, record: &Path, cpus: u32) -> Vec<String> {
        let mut failures = Vec::new();
        for (name, value, grows) in self.settings(cpus) {
            match set(&sysctls.join(name), value, grows, |before| note(record, name, before, value))
            {
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

/// Restores the recorded settings that nobody has changed since, removes the record, and returns
/// the settings' names.
///
/// The limit of tracked connections stays if more are tracked than the old limit allows: the kernel
/// would refuse new ones.
///
/// # Errors
///
/// Fails if a setting or the record cannot be read, written or removed.
pub fn restore(sysctls: &Path, record: &Path) -> io::Result<Vec<String>> {
    let mut restored = Vec::new();
    for (name, Change { before, value }) in recorded(record)? {
        let path = sysctls.join(&name);
        let is_ours = match number(&path) {
            Ok(now) => now == value,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        let is_too_small = name == "nf_conntrack_max"
            && number(&sysctls.join("nf_conntrack_count")).is_ok_and(|count| count >= before);
        if is_ours && !is_too_small {
            fs::write(&path, before.to_string())?;
            restored.push(name);
        }
    }
    match fs::remove_file(record) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(restored),
    }
}

/// A changed setting: its value before the first change, and the value that was set.
#[derive(Clone, Copy, Debug)]
struct Change {
    before: u64,
    value: u64,
}

/// Reads the record: a line with name, value before and value set for each setting.
fn recorded(record: &Path) -> io::Result<BTreeMap<String, Change>> {
    let text = match fs::read_to_string(record) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        text => text?,
    };
    let change = |line: &str| {
        let mut words = line.split_whitespace();
        let name = words.next()?.to_owned();
        let (before, value) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some((name, Change { before, value }))
    };
    Ok(text.lines().filter_map(change).collect())
}

/// Records a change, before it is made.
fn note(record: &Path, name: &str, before: u64, value: u64) -> io::Result<()> {
    let mut all = recorded(record)?;
    let first = all.get(name).map_or(before, |change| change.before);
    let _ = all.insert(name.to_owned(), Change { before: first, value });
    let lines = all.iter().map(|(name, change)| {
        let Change { before, value } = change;
        format!("{name} {before} {value}\n")
    });
    fs::write(record, lines.collect::<String>())
}

fn number(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    let text = text.trim();
    text.parse().map_err(|_| io::Error::other(format!("{text:?} is no number")))
}

/// Writes a number if the present one differs, or is smaller. Returns the number before, of which
/// `note` is told first.
fn set(
    path: &Path,
    value: u64,
    grows: bool,
    note: impl FnOnce(u64) -> io::Result<()>,
) -> io::Result<Option<u64>> {
    let before = number(path)?;
    if before == value || grows && before > value {
        return Ok(None);
    }
    // What is changed and not recorded would stay for ever.
    note(before)?;
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
        let record = &path.join("record");
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
        assert_eq!(limits.apply(path, record, 1), [""; 0]);
        assert_eq!(read(path, "nf_conntrack_max"), "150");
        assert_eq!(limits.apply(path, record, 4), [""; 0]);
        assert_eq!(read(path, "nf_conntrack_max"), "400");
        assert_eq!(limits.apply(path, record, 2), [""; 0]);
        assert_eq!(read(path, "nf_conntrack_max"), "400", "it is not made smaller");
        assert_eq!(read(path, "nf_conntrack_tcp_timeout_established"), "86400");
        assert_eq!(read(path, "nf_conntrack_udp_timeout"), "30\n", "zero leaves it");
        fs::write(path.join("nf_conntrack_max"), "many").expect("a setting");
        let failures = limits.apply(path, record, 8);
        assert!(
            failures.len() == 1 && failures[0].contains("\"many\" is no number"),
            "{failures:?}"
        );
    }

    #[test]
    fn what_was_changed_is_put_back_unless_somebody_has_changed_it_since() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path();
        let record = &path.join("record");
        let names =
            ["nf_conntrack_max", "nf_conntrack_tcp_timeout_close_wait", "nf_conntrack_udp_timeout"];
        for name in names {
            fs::write(path.join(name), "60\n").expect("a setting");
        }
        let limits = |cpus: u32, seconds: u64| {
            let limits = Limits {
                max_per_core: Some(100),
                tcp_close_wait: Some(Duration::from_secs(seconds)),
                udp: Some(Duration::from_secs(30)),
                ..Limits::default()
            };
            assert_eq!(limits.apply(path, record, cpus), [""; 0]);
        };
        // The second agent changes what the first one has set.
        limits(1, 3600);
        limits(2, 1800);
        fs::write(path.join("nf_conntrack_udp_timeout"), "45\n").expect("a setting");
        let restored = restore(path, record).expect("restored");
        assert_eq!(restored, ["nf_conntrack_max", "nf_conntrack_tcp_timeout_close_wait"]);
        assert_eq!(names.map(|name| read(path, name).trim().to_owned()), ["60", "60", "45"]);
        assert!(restore(path, record).expect("restored").is_empty() && !record.exists());
        // More connections are tracked than there were allowed.
        limits(2, 60);
        fs::write(path.join("nf_conntrack_count"), "61\n").expect("a count");
        assert_eq!(restore(path, record).expect("restored"), ["nf_conntrack_udp_timeout"]);
        assert_eq!(read(path, "nf_conntrack_max"), "200");
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
