//! Changes settings of the kernel (sysctls), and records what they were before.
//!
//! The record is one file in the state directory: for each setting its value before the first
//! change and the value that was set, and the ports that were reserved. It is written before a
//! setting is, since what is changed and not recorded would stay for ever. `sluice cleanup` puts
//! back what nobody has changed since, and a running agent's audit sets again what somebody has.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The record's file.
const FILE: &str = "settings.json";
/// The files in which the first release recorded reserved ports, settings of `lo` and those of
/// connection tracking.
const BEFORE: [&str; 3] = ["reserved-ports", "loopback", "conntrack"];

/// Which values of a setting will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// This one.
    Exactly,
    /// This number or a greater one.
    AtLeast,
    /// Any but 0: it is turned on.
    On,
}

/// A setting as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its path below `/proc/sys`.
    pub name: String,
    /// The value to set.
    pub value: String,
    /// The values that will do.
    pub rule: Rule,
}

impl Setting {
    fn is_met(&self, now: &str) -> io::Result<bool> {
        match self.rule {
            Rule::Exactly => Ok(now == self.value),
            Rule::On => Ok(now != "0"),
            Rule::AtLeast => Ok(number(now)? >= number(&self.value)?),
        }
    }
}

/// Returns a setting's name as `sysctl` takes it.
#[must_use]
pub fn dotted(name: &str) -> String {
    name.replace('/', ".")
}

/// Parses a value that is a number.
///
/// # Errors
///
/// Fails if it is none.
pub fn number(text: &str) -> io::Result<u64> {
    text.parse().map_err(|_| io::Error::other(format!("{text:?} is no number")))
}

/// A changed setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Change {
    /// The value before the first change.
    before: String,
    /// The value that was set.
    set: String,
}

/// The content of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    #[serde(default)]
    settings: BTreeMap<String, Change>,
    /// The ports that were added to the reserved ones, as the kernel writes such lists.
    #[serde(default)]
    reserved_ports: Option<String>,
}

/// A setting that was not as it should be.
#[derive(Debug)]
pub struct Restored {
    /// Its path below `/proc/sys`.
    pub name: String,
    /// The value that was found.
    pub found: String,
    /// Whether it could be set again.
    pub result: io::Result<()>,
}

/// Changes settings and records them.
#[derive(Clone, Debug)]
pub struct Recorder {
    proc_sys: PathBuf,
    folder: PathBuf,
    /// The settings that this process has applied.
    applied: BTreeMap<String, Setting>,
}

fn explained(what: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {what} {}: {error}", path.display()))
}

/// Reads a file, if it exists.
fn read_any(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(explained("read", path, &error)),
    }
}

impl Recorder {
    /// Makes a recorder of the settings below `proc_sys`, with its file in a state directory.
    #[must_use]
    pub fn new(proc_sys: &Path, state_dir: &Path) -> Self {
        Self {
            proc_sys: proc_sys.to_owned(),
            folder: state_dir.to_owned(),
            applied: BTreeMap::new(),
        }
    }

    /// Returns the record's file.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.folder.join(FILE)
    }

    /// Returns a setting's file.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.proc_sys.join(name)
    }

    /// Reads a setting.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be read.
    pub fn read(&self, name: &str) -> io::Result<String> {
        let path = self.path(name);
        let text = fs::read_to_string(&path).map_err(|error| explained("read", &path, &error))?;
        Ok(text.trim().to_owned())
    }

    fn write(&self, name: &str, value: &str) -> io::Result<()> {
        let path = self.path(name);
        fs::write(&path, value).map_err(|error| explained("write", &path, &error))
    }

    /// Gives a setting a value that will do, and records it. Returns the value before, if it was
    /// changed.
    ///
    /// # Errors
    ///
    /// Fails if the setting or the record cannot be read or written.
    pub fn apply(&mut self, setting: Setting) -> io::Result<Option<String>> {
        let now = self.read(&setting.name)?;
        let changed = if setting.is_met(&now)? {
            None
        } else {
            self.change(&setting, &now)?;
            Some(now)
        };
        let _ = self.applied.insert(setting.name.clone(), setting);
        Ok(changed)
    }

    fn change(&self, Setting { name, value, .. }: &Setting, now: &str) -> io::Result<()> {
        let mut record = self.record()?;
        let before = record.settings.get(name).map_or(now, |change| &change.before).to_owned();
        let _ = record.settings.insert(name.clone(), Change { before, set: value.clone() });
        self.write_record(&record)?;
        self.write(name, value)
    }

    /// Sets again what this process has applied and somebody has changed since. Settings that are
    /// no longer there are left out.
    #[must_use]
    pub fn audit(&self) -> Vec<Restored> {
        let mut all = Vec::new();
        for (name, setting) in &self.applied {
            let (found, result) = match self.read(name) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => (String::new(), Err(error)),
                Ok(now) => match setting.is_met(&now) {
                    Ok(true) => continue,
                    Ok(false) => {
                        let result = self.change(setting, &now);
                        (now, result)
                    }
                    Err(error) => (now, Err(error)),
                },
            };
            all.push(Restored { name: name.clone(), found, result });
        }
        all
    }

    /// Puts back the recorded settings below a folder that nobody has changed since, and returns
    /// their names. `may` is asked for each with the value before.
    ///
    /// # Errors
    ///
    /// Fails if a setting or the record cannot be read, written or removed.
    pub fn restore(
        &self,
        folder: &str,
        may: impl Fn(&str, &str) -> bool,
    ) -> io::Result<Vec<String>> {
        let mut record = self.record()?;
        let mut restored = Vec::new();
        let names: Vec<String> =
            record.settings.keys().filter(|name| is_below(name, folder)).cloned().collect();
        for name in names {
            let Some(Change { before, set }) = record.settings.remove(&name) else { continue };
            let is_ours = match self.read(&name) {
                Ok(now) => now == set,
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                Err(error) => return Err(error),
            };
            if is_ours && may(&name, &before) {
                self.write(&name, &before)?;
                restored.push(name);
            }
        }
        self.write_record(&record)?;
        Ok(restored)
    }

    /// Returns the recorded reserved ports.
    ///
    /// # Errors
    ///
    /// Fails if the record cannot be read.
    pub fn reserved_ports(&self) -> io::Result<Option<String>> {
        Ok(self.record()?.reserved_ports)
    }

    /// Records the reserved ports, or that there are none.
    ///
    /// # Errors
    ///
    /// Fails if the record cannot be read or written.
    pub fn record_reserved_ports(&self, ports: Option<String>) -> io::Result<()> {
        let record = Record { reserved_ports: ports, ..self.record()? };
        self.write_record(&record)
    }

    /// Reads the record, or those of the first release.
    fn record(&self) -> io::Result<Record> {
        let path = self.file();
        match read_any(&path)? {
            Some(text) => serde_json::from_str(&text).or_else(|error| {
                // What was there before is not known any more, and the node is to be served.
                let aside = self.folder.join(format!("{FILE}.invalid"));
                tracing::warn!(
                    "{} is no record of settings: {error}; it is kept as {}, and settings that \
                     were changed before are not put back",
                    path.display(),
                    aside.display()
                );
                fs::rename(&path, &aside).map_err(|error| explained("rename", &path, &error))?;
                Ok(Record::default())
            }),
            None => self.record_before(),
        }
    }

    fn record_before(&self) -> io::Result<Record> {
        let [ports, loopback, conntrack] = BEFORE.map(|file| read_any(&self.folder.join(file)));
        let mut record = Record {
            reserved_ports: ports?.map(|ports| ports.trim().to_owned()),
            ..Record::default()
        };
        for name in loopback?.unwrap_or_default().split_whitespace() {
            let change = Change { before: "0".to_owned(), set: "1".to_owned() };
            let _ = record.settings.insert(format!("net/ipv4/conf/lo/{name}"), change);
        }
        for line in conntrack?.unwrap_or_default().lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [name, before, set] = words[..] {
                let change = Change { before: before.to_owned(), set: set.to_owned() };
                let _ = record.settings.insert(format!("net/netfilter/{name}"), change);
            }
        }
        Ok(record)
    }

    /// Writes the record atomically, or removes it if it is empty. Those of the first release are
    /// removed then, whose content it has.
    fn write_record(&self, record: &Record) -> io::Result<()> {
        let path = self.file();
        let written = if *record == Record::default() {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                Ok(()) | Err(_) => Ok(()),
            }
        } else {
            let new = self.folder.join(format!("{FILE}.new"));
            serde_json::to_string_pretty(record)
                .map_err(io::Error::from)
                .and_then(|text| fs::write(&new, text + "\n"))
                .and_then(|()| fs::rename(&new, &path))
        };
        written.map_err(|error| explained("write", &path, &error))?;
        for file in BEFORE {
            match fs::remove_file(self.folder.join(file)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(explained("remove", &self.folder.join(file), &error));
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }
}

fn is_below(name: &str, folder: &str) -> bool {
    name.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with settings, and one with the record.
    struct Node(tempfile::TempDir);

    impl Node {
        fn new(settings: &[(&str, &str)]) -> Self {
            let node = Self(tempfile::tempdir().expect("a folder"));
            fs::create_dir_all(node.0.path().join("state")).expect("a folder");
            for (name, value) in settings {
                node.write(name, value);
            }
            node
        }

        fn recorder(&self) -> Recorder {
            Recorder::new(&self.0.path().join("sys"), &self.0.path().join("state"))
        }

        fn write(&self, name: &str, value: &str) {
            let path = self.0.path().join("sys").join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, format!("{value}\n")).expect("written");
        }

        fn record_before(&self, file: &str, text: &str) {
            fs::write(self.0.path().join("state").join(file), text).expect("written");
        }
    }

    fn setting(name: &str, value: &str, rule: Rule) -> Setting {
        Setting { name: name.to_owned(), value: value.to_owned(), rule }
    }

    #[test]
    fn what_was_changed_is_put_back_unless_somebody_has_changed_it_since() {
        let node = Node::new(&[("a/x", "60"), ("a/y", "60"), ("b/z", "0")]);
        let mut first = node.recorder();
        let changed = first.apply(setting("a/x", "100", Rule::AtLeast)).expect("set");
        assert_eq!(changed.as_deref(), Some("60"));
        assert_eq!(first.apply(setting("a/y", "60", Rule::Exactly)).expect("set"), None);
        assert!(first.apply(setting("b/z", "1", Rule::On)).expect("set").is_some());
        // The next agent changes what the first has set; the value before stays the first one's.
        let mut second = node.recorder();
        assert!(second.apply(setting("a/x", "200", Rule::AtLeast)).expect("set").is_some());
        assert!(second.apply(setting("a/y", "70", Rule::Exactly)).expect("set").is_some());
        node.write("a/y", "80");
        assert_eq!(second.restore("a", |_, _| true).expect("restored"), ["a/x"]);
        assert_eq!(["a/x", "a/y"].map(|name| second.read(name).expect("read")), ["60", "80"]);
        assert!(second.file().exists(), "b/z is not put back yet");
        assert_eq!(second.restore("b", |_, _| true).expect("restored"), ["b/z"]);
        assert!(!second.file().exists());
        assert!(second.restore("b", |_, _| true).expect("restored").is_empty());
    }

    #[test]
    fn the_audit_sets_again_what_somebody_has_changed() {
        let node = Node::new(&[("a/x", "60"), ("a/y", "0"), ("a/z", "5")]);
        let mut recorder = node.recorder();
        for wanted in [
            setting("a/x", "100", Rule::AtLeast),
            setting("a/y", "1", Rule::On),
            setting("a/z", "5", Rule::Exactly),
        ] {
            let _ = recorder.apply(wanted).expect("set");
        }
        assert!(recorder.audit().is_empty());
        for (name, value) in [("a/x", "300"), ("a/y", "0"), ("a/z", "6")] {
            node.write(name, value);
        }
        let found: Vec<_> = recorder
            .audit()
            .into_iter()
            .map(|one| (one.name, one.found, one.result.is_ok()))
            .collect();
        let expected = [("a/y", "0"), ("a/z", "6")];
        assert_eq!(found, expected.map(|(name, value)| (name.to_owned(), value.to_owned(), true)));
        assert!(recorder.audit().is_empty(), "all are as they should be");
        // What another process has applied is its own affair.
        node.write("a/y", "0");
        assert!(node.recorder().audit().is_empty());
    }

    #[test]
    fn records_of_the_first_release_are_read_and_replaced() {
        let node = Node::new(&[
            ("net/ipv4/conf/lo/accept_local", "1"),
            ("net/netfilter/nf_conntrack_max", "400"),
        ]);
        node.record_before("reserved-ports", "1024-29999,61000-65535\n");
        node.record_before("loopback", "accept_local\n");
        node.record_before("conntrack", "nf_conntrack_max 100 400\n");
        let recorder = node.recorder();
        let ports = recorder.reserved_ports().expect("read");
        assert_eq!(ports.as_deref(), Some("1024-29999,61000-65535"));
        let lo = recorder.restore("net/ipv4/conf/lo", |_, _| true).expect("restored");
        assert_eq!(lo, ["net/ipv4/conf/lo/accept_local"]);
        let left: Vec<_> = fs::read_dir(node.0.path().join("state"))
            .expect("a folder")
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(left, [FILE], "one record has replaced them");
        let limits = recorder.restore("net/netfilter", |_, _| true).expect("restored");
        assert_eq!(limits, ["net/netfilter/nf_conntrack_max"]);
        assert_eq!(recorder.read("net/netfilter/nf_conntrack_max").expect("read"), "100");
        assert_eq!(recorder.reserved_ports().expect("read"), ports);
        recorder.record_reserved_ports(None).expect("written");
        assert!(!recorder.file().exists());
    }

    #[test]
    fn a_setting_that_is_not_there_is_named() {
        let mut recorder = Node::new(&[]).recorder();
        let error = recorder.apply(setting("net/x", "1", Rule::On)).expect_err("no such setting");
        assert!(error.to_string().contains("net/x"), "{error}");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
