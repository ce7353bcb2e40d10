//! Keeps the ports of masqueraded clients and of Services' node ports apart from those that the
//! kernel gives to the node's own sockets.
//!
//! Both use the node's address. Ports of `ip_local_port_range` that are also ours are added to
//! `ip_local_reserved_ports`, which the kernel skips when it chooses a port. A process that binds a
//! port by number still gets it. The added ports are recorded, so that exactly these can be removed
//! again.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use sluice_common::path::PORT_RANGES;

use crate::node::settings::Recorder;

/// The folder of the settings for IPv4 below `/proc/sys`; these two apply to IPv6 as well.
pub const SYSCTLS: &str = "net/ipv4";
/// The range from which the kernel chooses ports.
const RANGE: &str = "ip_local_port_range";
/// The ports that it skips.
const RESERVED: &str = "ip_local_reserved_ports";
/// The least number of ports that must be left to the node's own sockets.
const LEFT_MIN: usize = 1_024;
/// The longest list of reserved ports, bytes: every second one of 65 536, with commas.
const LIST_MAX: usize = 1 << 18;

type Ports = BTreeSet<u16>;

/// Returns the ports of masqueraded clients.
fn masquerade() -> impl Iterator<Item = RangeInclusive<u16>> {
    PORT_RANGES.into_iter().map(|(first, last)| first..=last)
}

/// An error that keeps the ports from being kept apart.
#[derive(Debug, thiserror::Error)]
pub enum PortsError {
    /// A setting cannot be read.
    #[error("cannot read {path}: {cause}")]
    Read {
        /// The setting.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// Nearly all ports of the node's own sockets are those of masqueraded clients.
    #[error(
        "net.ipv4.ip_local_port_range ({range}) leaves {left} ports to the node's own sockets, since {} are those of \
         masqueraded clients; widen it, for example: sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\"",
        masquerade_text()
    )]
    Narrow {
        /// The range.
        range: String,
        /// The number of ports that are left.
        left: usize,
    },
    /// With the node ports hardly a port would be left to the node's own sockets.
    #[error(
        "{count} node ports are in net.ipv4.ip_local_port_range ({range}) and are not reserved, since that would leave {left} \
         ports to the node's own sockets; narrow the range to where no node ports are, for example: \
         sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\""
    )]
    NodePorts {
        /// Their number.
        count: usize,
        /// The range.
        range: String,
        /// The number of ports that would be left.
        left: usize,
    },
    /// A setting cannot be written.
    #[error(
        "ports {ports} are in net.ipv4.ip_local_port_range and those of masqueraded clients or node ports as well; they cannot be \
         entered into {path}: {cause}; do it yourself (sysctl -w net.ipv4.ip_local_reserved_ports={wanted}), or narrow \
         the range, for example: sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\""
    )]
    Reserve {
        /// The ports of both.
        ports: String,
        /// The setting.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
        /// The value that it should have.
        wanted: String,
    },
    /// The record of added ports cannot be read or written.
    #[error("cannot {action} {path}, the record of changed settings: {cause}")]
    Record {
        /// The action that was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// The added ports cannot be removed again.
    #[error("cannot take ports {ports} out of {path}: {cause}")]
    Release {
        /// The ports.
        ports: String,
        /// The setting.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
}

/// Ports that need to be reserved.
#[derive(Debug)]
struct Missing {
    /// Our ports in the kernel's range that are not reserved yet.
    missing: Ports,
    /// All ports that shall be reserved.
    wanted: Ports,
}

impl Missing {
    /// Reads the settings. Returns [`None`] if nothing needs to be reserved.
    fn read(sysctls: &Path) -> Result<Option<Self>, PortsError> {
        let range = read(&sysctls.join(RANGE), range)?;
        let reserved = read(&sysctls.join(RESERVED), list)?;
        let missing: Ports = overlap(&range).difference(&reserved).copied().collect();
        if missing.is_empty() {
            return Ok(None);
        }
        let wanted: Ports = reserved.union(&missing).copied().collect();
        let left = range.difference(&wanted).count();
        if left < LEFT_MIN {
            return Err(PortsError::Narrow { range: text(&range), left });
        }
        Ok(Some(Self { missing, wanted }))
    }
}

/// Describes what [`reserve`] would reserve.
///
/// # Errors
///
/// Fails if a setting cannot be read, or hardly a port would be left to the node's own sockets.
pub fn look(sysctls: &Path) -> Result<Option<String>, PortsError> {
    Ok(Missing::read(sysctls)?.map(|missing| text(&missing.missing)))
}

/// Reserves the necessary ports, and records them. Describes the ports that were not reserved
/// before.
///
/// # Errors
///
/// Fails if the ports cannot be kept apart, so that masqueraded clients would clash with the node's
/// own connections.
pub fn reserve(sysctls: &Path, recorder: &Recorder) -> Result<Option<String>, PortsError> {
    let reserved_path = sysctls.join(RESERVED);
    let Some(Missing { missing, wanted }) = Missing::read(sysctls)? else { return Ok(None) };
    let before = recorded(recorder)?.unwrap_or_default();
    let ours: Ports = before.union(&missing).copied().collect();
    // The record comes first, since ports that are added and not recorded would stay for ever.
    record(recorder, &ours)?;
    fs::write(&reserved_path, text(&wanted)).map_err(|cause| PortsError::Reserve {
        ports: text(&missing),
        path: reserved_path,
        cause,
        wanted: text(&wanted),
    })?;
    Ok(Some(text(&missing)))
}

/// Reserves those of these node ports that the kernel may give to a socket, and releases others
/// that were reserved before. Describes what was added and what was released.
///
/// # Errors
///
/// Fails if a setting or the record cannot be used, or hardly a port would be left to the node's
/// own sockets.
pub fn follow_node_ports(
    sysctls: &Path,
    recorder: &Recorder,
    node_ports: &BTreeSet<u16>,
) -> Result<(String, String), PortsError> {
    let path = sysctls.join(RESERVED);
    let range = read(&sysctls.join(RANGE), range)?;
    let reserved = read(&path, list)?;
    let before = recorded(recorder)?.unwrap_or_default();
    let needed: Ports =
        overlap(&range).into_iter().chain(node_ports.intersection(&range).copied()).collect();
    let added: Ports = needed.difference(&reserved).copied().collect();
    let given_back: Ports =
        before.intersection(&reserved).filter(|port| !needed.contains(port)).copied().collect();
    if added.is_empty() && given_back.is_empty() {
        return Ok((String::new(), String::new()));
    }
    let wanted: Ports =
        reserved.union(&added).filter(|port| !given_back.contains(port)).copied().collect();
    let left = range.difference(&wanted).count();
    if left < LEFT_MIN && !added.is_empty() {
        let count = node_ports.intersection(&range).count();
        return Err(PortsError::NodePorts { count, range: text(&range), left });
    }
    let ours: Ports = before.union(&added).copied().collect();
    // Added ports are recorded first, and released ones are dropped from the record last, since
    // ports that are reserved and not recorded would stay for ever.
    record(recorder, &ours)?;
    fs::write(&path, text(&wanted) + "\n").map_err(|cause| PortsError::Reserve {
        ports: text(&added),
        path,
        cause,
        wanted: text(&wanted),
    })?;
    record(recorder, &ours.difference(&given_back).copied().collect())?;
    Ok((text(&added), text(&given_back)))
}

/// Removes the ports that were added, and describes them.
///
/// # Errors
///
/// Fails if the record or the setting cannot be used.
pub fn release(sysctls: &Path, recorder: &Recorder) -> Result<Option<String>, PortsError> {
    let Some(ours) = recorded(recorder)? else { return Ok(None) };
    let path = sysctls.join(RESERVED);
    let reserved = read(&path, list)?;
    let released: Ports = reserved.intersection(&ours).copied().collect();
    if !released.is_empty() {
        let wanted: Ports = reserved.difference(&ours).copied().collect();
        // An empty list is written as an empty line, since the kernel ignores an empty write.
        fs::write(&path, text(&wanted) + "\n").map_err(|cause| PortsError::Release {
            ports: text(&released),
            path,
            cause,
        })?;
    }
    record(recorder, &Ports::new())?;
    Ok(Some(text(&released)).filter(|ports| !ports.is_empty()))
}

/// Describes the ports that were added and that somebody has taken out of the setting.
///
/// # Errors
///
/// Fails if the record or the setting cannot be read.
pub fn taken_out(sysctls: &Path, recorder: &Recorder) -> Result<Option<String>, PortsError> {
    let Some(ours) = recorded(recorder)? else { return Ok(None) };
    let reserved = read(&sysctls.join(RESERVED), list)?;
    let gone: Ports = ours.difference(&reserved).copied().collect();
    Ok((!gone.is_empty()).then(|| text(&gone)))
}

/// Reads the added ports from the record, if there are any.
fn recorded(recorder: &Recorder) -> Result<Option<Ports>, PortsError> {
    let ports = recorder.reserved_ports().map_err(|cause| PortsError::Record {
        action: "read",
        path: recorder.file(),
        cause,
    })?;
    // Nothing is removed because of an invalid record.
    Ok(ports.map(|ports| list(&ports).unwrap_or_default()))
}

/// Records the added ports.
fn record(recorder: &Recorder, ports: &Ports) -> Result<(), PortsError> {
    let words = (!ports.is_empty()).then(|| text(ports));
    recorder.record_reserved_ports(words).map_err(|cause| PortsError::Record {
        action: "write",
        path: recorder.file(),
        cause,
    })
}

/// Reads a setting in one call, since the kernel does not return the rest of a long list to a
/// second one.
fn read(path: &Path, parse: impl Fn(&str) -> Option<Ports>) -> Result<Ports, PortsError> {
    let failed = |cause| PortsError::Read { path: path.to_owned(), cause };
    let mut buffer = vec![0; LIST_MAX];
    let length = File::open(path).and_then(|mut file| file.read(&mut buffer)).map_err(failed)?;
    buffer.truncate(length);
    let text = String::from_utf8_lossy(&buffer);
    parse(&text)
        .ok_or_else(|| failed(io::Error::other(format!("{:?} means no ports", text.trim()))))
}

/// Parses `32768 60999`, with white space of any kind.
fn range(text: &str) -> Option<Ports> {
    let mut numbers = text.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(first)), Some(Ok(last)), None) = (numbers.next(), numbers.next(), numbers.next())
    else {
        return None;
    };
    Some((first..=last).collect())
}

/// Parses `8080,9148-9150`.
fn list(text: &str) -> Option<Ports> {
    let mut ports = Ports::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        ports.extend(first.parse::<u16>().ok()?..=last.parse().ok()?);
    }
    Some(ports)
}

/// Formats ports as [`list`] parses them.
fn text(ports: &Ports) -> String {
    let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
    for port in ports {
        match ranges.last_mut() {
            Some(range) if range.end().checked_add(1) == Some(*port) => {
                *range = *range.start()..=*port;
            }
            Some(_) | None => ranges.push(*port..=*port),
        }
    }
    let word = |range: &RangeInclusive<u16>| match (range.start(), range.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    };
    ranges.iter().map(word).collect::<Vec<_>>().join(",")
}

/// Returns those of these ports that masqueraded clients get.
fn overlap(ports: &Ports) -> Ports {
    ports.iter().copied().filter(|port| masquerade().any(|range| range.contains(port))).collect()
}

fn masquerade_text() -> String {
    text(&masquerade().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of settings with a record beside them.
    struct Node(tempfile::TempDir);

    impl Node {
        fn new(range: &str, reserved: &str) -> Self {
            let node = Self(tempfile::tempdir().expect("a folder"));
            fs::write(node.0.path().join(RANGE), format!("{range}\n")).expect("written");
            fs::write(node.0.path().join(RESERVED), format!("{reserved}\n")).expect("written");
            node
        }

        fn reserve(&self) -> Result<Option<String>, PortsError> {
            reserve(self.0.path(), &self.recorder())
        }

        fn release(&self) -> Option<String> {
            release(self.0.path(), &self.recorder()).expect("released")
        }

        fn recorder(&self) -> Recorder {
            Recorder::new(self.0.path(), self.0.path())
        }

        fn reserved(&self) -> String {
            fs::read_to_string(self.0.path().join(RESERVED)).expect("read").trim().to_owned()
        }
    }

    #[test]
    fn lists_of_ports_are_read_and_written() {
        for (given, written) in [
            ("", ""),
            ("\n", ""),
            ("8080\n", "8080"),
            ("8080,9148-9150", "8080,9148-9150"),
            ("9150,9149,9148,1-2,2-3", "1-3,9148-9150"),
            ("65534-65535", "65534-65535"),
        ] {
            assert_eq!(
                list(given).map(|ports| text(&ports)).as_deref(),
                Some(written),
                "{given:?}"
            );
        }
        for bad in ["a", "1-", "70000", "1;2"] {
            assert_eq!(list(bad), None, "{bad:?}");
        }
        assert_eq!(
            range("32768\t60999\n").map(|ports| text(&ports)).as_deref(),
            Some("32768-60999")
        );
        for bad in ["", "1", "1 2 3", "a b"] {
            assert_eq!(range(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_the_kernel_may_choose_and_clients_get_is_reserved() {
        // The range, what is reserved before -> what is added, what is reserved then.
        for (range, before, added, after) in [
            ("32768\t60999", "", None, ""),
            ("32768\t60999", "8080", None, "8080"),
            ("32768\t61000", "", Some("61000"), "61000"),
            (
                "15000\t65000",
                "8080,16000",
                Some("15000-15999,16001-29999,61000-65000"),
                "8080,15000-29999,61000-65000",
            ),
            ("1024\t65535", "", Some("1024-29999,61000-65535"), "1024-29999,61000-65535"),
            ("1024\t65535", "1024-29999,61000-65535", None, "1024-29999,61000-65535"),
        ] {
            let node = Node::new(range, before);
            assert_eq!(node.reserve().expect("reserved").as_deref(), added, "{range:?} {before:?}");
            assert_eq!(node.reserved(), after, "{range:?} {before:?}");
            assert_eq!(node.reserve().expect("reserved"), None, "once is enough");
            assert_eq!(node.release().as_deref(), added);
            assert_eq!(node.reserved(), before);
            assert_eq!(node.release(), None);
        }
    }

    #[test]
    fn node_ports_that_the_kernel_may_choose_are_reserved_and_given_back() {
        let node = Node::new("30000\t60999", "31000");
        let follow = |ports: &[u16]| {
            follow_node_ports(node.0.path(), &node.recorder(), &ports.iter().copied().collect())
                .map_err(|error| error.to_string())
        };
        let told = |added: &str, given_back: &str| Ok((added.to_owned(), given_back.to_owned()));
        assert_eq!(follow(&[8080]), told("", ""));
        assert_eq!(follow(&[30_080, 30_081, 31_000, 8080]), told("30080-30081", ""));
        assert_eq!(node.reserved(), "30080-30081,31000");
        // Somebody takes one out.
        let taken_out = || taken_out(node.0.path(), &node.recorder()).expect("read");
        assert_eq!(taken_out(), None);
        fs::write(node.0.path().join(RESERVED), "30080,31000\n").expect("written");
        assert_eq!(taken_out().as_deref(), Some("30081"));
        assert_eq!(follow(&[30_080, 30_081, 31_000, 8080]), told("30081", ""));
        assert_eq!((taken_out(), node.reserved()), (None, "30080-30081,31000".to_owned()));
        assert_eq!(follow(&[30_081, 30_090]), told("30090", "30080"));
        assert_eq!(node.reserved(), "30081,30090,31000");
        let all: Vec<u16> = (30_000..=60_900).collect();
        assert!(
            follow(&all).is_err_and(|error| error.contains("30901 node ports")),
            "too few are left"
        );
        assert_eq!(node.reserved(), "30081,30090,31000");
        assert_eq!(node.release().as_deref(), Some("30081,30090"));
        assert_eq!(node.reserved(), "31000");
    }

    #[test]
    fn only_what_an_agent_added_is_taken_out_again() {
        let node = Node::new("20000\t60999", "20000-20009");
        assert_eq!(node.reserve().expect("reserved").as_deref(), Some("20010-29999"));
        // Somebody widens the range, adds a port and takes one away; another agent starts.
        fs::write(node.0.path().join(RANGE), "19990\t60999\n").expect("written");
        fs::write(node.0.path().join(RESERVED), "80,20000-29998\n").expect("written");
        assert_eq!(node.reserve().expect("reserved").as_deref(), Some("19990-19999,29999"));
        assert_eq!(node.reserved(), "80,19990-29999");
        assert_eq!(node.release().as_deref(), Some("19990-19999,20010-29999"));
        assert_eq!(node.reserved(), "80,20000-20009");
    }

    #[test]
    fn a_range_without_room_is_refused() {
        let node = Node::new("10000\t29999", "");
        let error = node.reserve().expect_err("no room").to_string();
        assert!(
            error.contains("(10000-29999) leaves 0 ports")
                && error.contains("1024-29999,61000-65535"),
            "{error}"
        );
        assert_eq!(node.reserved(), "");
        assert_eq!(node.release(), None);
    }

    #[test]
    fn a_setting_that_cannot_be_written_is_refused_with_what_to_do() {
        let node = Node::new("1024\t65535", "8080");
        let path = node.0.path().join(RESERVED);
        fs::remove_file(&path).expect("removed");
        fs::create_dir(&path).expect("a folder in its place");
        assert!(matches!(node.reserve(), Err(PortsError::Read { .. })));
        let error = PortsError::Reserve {
            ports: "61000".to_owned(),
            path: "/proc/sys/x".into(),
            cause: io::Error::from_raw_os_error(libc::EROFS),
            wanted: "8080,61000".to_owned(),
        };
        assert!(
            error.to_string().contains("sysctl -w net.ipv4.ip_local_reserved_ports=8080,61000")
        );
    }
}
