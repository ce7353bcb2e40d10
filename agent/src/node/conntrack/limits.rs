//! Sets how many connections the kernel tracks, and for how long, as kube-proxy does when it
//! starts.
//!
//! Otherwise a node would fall back to the kernel's small defaults after a reboot, whatever tracks
//! connections there. What is changed is recorded with the value before, so that `sluice cleanup`
//! puts it back.

use std::io;
use std::time::Duration;

use crate::node::settings::{Recorder, Rule, Setting, number};

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

/// A limit: its name, its value, and whether it may only grow.
type Limit = (&'static str, u64, bool);

impl Limits {
    fn settings(&self, cpus: u32) -> Vec<Limit> {
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

    /// Writes the settings that differ, and records them. Describes what failed.
    ///
    /// A kernel that tracks no connections has none of these settings, and needs none.
    #[must_use]
    pub fn apply(&self, recorder: &mut Recorder, cpus: u32) -> Vec<String> {
        let mut failures = Vec::new();
        for (name, value, grows) in self.settings(cpus) {
            let setting = Setting {
                name: format!("{SYSCTLS}/{name}"),
                value: value.to_string(),
                rule: if grows { Rule::AtLeast } else { Rule::Exactly },
            };
            match recorder.apply(setting) {
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

/// Restores the recorded settings that nobody has changed since, and returns their names.
///
/// The limit of tracked connections stays if more are tracked than the old limit allows: the kernel
/// would refuse new ones.
///
/// # Errors
///
/// Fails if a setting or the record cannot be read, written or removed.
pub fn restore(recorder: &Recorder) -> io::Result<Vec<String>> {
    let count = recorder.read(&format!("{SYSCTLS}/nf_conntrack_count"));
    let count = count.and_then(|count| number(&count)).unwrap_or_default();
    let is_roomy = |name: &str, before: &str| {
        !name.ends_with("/nf_conntrack_max") || number(before).is_ok_and(|before| count < before)
    };
    recorder.restore(SYSCTLS, is_roomy)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// A folder with settings of these names and this value.
    fn folder(names: &[&str], value: &str) -> (tempfile::TempDir, Recorder) {
        let folder = tempfile::tempdir().expect("a folder");
        let sysctls = folder.path().join(SYSCTLS);
        fs::create_dir_all(&sysctls).expect("a folder");
        for name in names {
            fs::write(sysctls.join(name), value).expect("a setting");
        }
        let recorder = Recorder::new(folder.path(), folder.path());
        (folder, recorder)
    }

    fn read(folder: &Path, name: &str) -> String {
        fs::read_to_string(folder.join(name)).expect("a setting")
    }

    #[test]
    fn what_is_said_is_set_and_the_table_only_grows() {
        let names = [
            "nf_conntrack_max",
            "nf_conntrack_tcp_timeout_established",
            "nf_conntrack_udp_timeout",
        ];
        let (folder, mut recorder) = folder(&names, "30\n");
        let path = &folder.path().join(SYSCTLS);
        let limits = Limits {
            max_per_core: Some(100),
            min: Some(150),
            tcp_established: Some(Duration::from_hours(24)),
            tcp_close_wait: Some(Duration::from_hours(1)),
            udp: Some(Duration::ZERO),
            ..Limits::default()
        };
        // Not all of them are there.
        assert_eq!(limits.apply(&mut recorder, 1), [""; 0]);
        assert_eq!(read(path, "nf_conntrack_max"), "150");
        assert_eq!(limits.apply(&mut recorder, 4), [""; 0]);
        assert_eq!(read(path, "nf_conntrack_max"), "400");
        assert_eq!(limits.apply(&mut recorder, 2), [""; 0]);
        assert_eq!(read(path, "nf_conntrack_max"), "400", "it is not made smaller");
        assert_eq!(read(path, "nf_conntrack_tcp_timeout_established"), "86400");
        assert_eq!(read(path, "nf_conntrack_udp_timeout"), "30\n", "zero leaves it");
        fs::write(path.join("nf_conntrack_max"), "many").expect("a setting");
        let failures = limits.apply(&mut recorder, 8);
        assert!(
            failures.len() == 1 && failures[0].contains("\"many\" is no number"),
            "{failures:?}"
        );
    }

    #[test]
    fn what_was_changed_is_put_back_unless_somebody_has_changed_it_since() {
        let names =
            ["nf_conntrack_max", "nf_conntrack_tcp_timeout_close_wait", "nf_conntrack_udp_timeout"];
        let (folder, recorder) = folder(&names, "60\n");
        let path = &folder.path().join(SYSCTLS);
        let limits = |cpus: u32, seconds: u64| {
            let limits = Limits {
                max_per_core: Some(100),
                tcp_close_wait: Some(Duration::from_secs(seconds)),
                udp: Some(Duration::from_secs(30)),
                ..Limits::default()
            };
            assert_eq!(limits.apply(&mut recorder.clone(), cpus), [""; 0]);
        };
        // The second agent changes what the first one has set.
        limits(1, 3600);
        limits(2, 1800);
        fs::write(path.join("nf_conntrack_udp_timeout"), "45\n").expect("a setting");
        let restored = restore(&recorder).expect("restored");
        let full = |name: &str| format!("{SYSCTLS}/{name}");
        assert_eq!(restored, ["nf_conntrack_max", "nf_conntrack_tcp_timeout_close_wait"].map(full));
        assert_eq!(names.map(|name| read(path, name).trim().to_owned()), ["60", "60", "45"]);
        assert!(restore(&recorder).expect("restored").is_empty() && !recorder.file().exists());
        // More connections are tracked than there were allowed.
        limits(2, 60);
        fs::write(path.join("nf_conntrack_count"), "61\n").expect("a count");
        assert_eq!(restore(&recorder).expect("restored"), [full("nf_conntrack_udp_timeout")]);
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
