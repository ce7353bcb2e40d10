//! Prepares the loopback device for answers to processes of this host that use a Service at one of
//! the node's own addresses.
//!
//! Such an answer is injected on `lo`, the only device on which the kernel accepts a source address
//! of this host even with strict reverse path filtering. That requires two settings, which affect
//! only `lo`, where nothing arrives from elsewhere. Changes are recorded, so that they can be
//! undone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The folder of the settings below `/proc/sys`.
const SYSCTLS: &str = "net/ipv4/conf/lo";
/// The settings that accept this host's addresses as sources, and loopback addresses (node ports at
/// `localhost`).
const SETTINGS: [&str; 2] = ["accept_local", "route_localnet"];

fn setting(proc_sys: &Path, name: &str) -> PathBuf {
    proc_sys.join(SYSCTLS).join(name)
}

fn explained(what: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {what} {}: {error}", path.display()))
}

fn read(path: &Path) -> io::Result<String> {
    fs::read_to_string(path).map_err(|error| explained("read", path, &error))
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text).map_err(|error| explained("write", path, &error))
}

fn recorded(record: &Path) -> io::Result<Vec<String>> {
    match fs::read_to_string(record) {
        Ok(text) => Ok(text.split_whitespace().map(str::to_owned).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(explained("read", record, &error)),
    }
}

/// Turns on the settings that are off, records them, and returns their names.
///
/// # Errors
///
/// Fails if a setting or the record cannot be read or written.
pub fn prepare(proc_sys: &Path, record: &Path) -> io::Result<Vec<&'static str>> {
    let mut off = Vec::new();
    for name in SETTINGS {
        if read(&setting(proc_sys, name))?.trim() == "0" {
            off.push(name);
        }
    }
    if off.is_empty() {
        return Ok(off);
    }
    let mut ours = recorded(record)?;
    ours.extend(off.iter().map(|name| (*name).to_owned()));
    ours.sort_unstable();
    ours.dedup();
    // The record comes first, since what is changed and not recorded would stay for ever.
    write(record, &(ours.join(" ") + "\n"))?;
    for name in &off {
        write(&setting(proc_sys, name), "1")?;
    }
    Ok(off)
}

/// Turns off the settings that were turned on, and returns their names.
///
/// # Errors
///
/// Fails if a setting or the record cannot be read, written or removed.
pub fn release(proc_sys: &Path, record: &Path) -> io::Result<Vec<&'static str>> {
    let ours = recorded(record)?;
    let ours: Vec<&str> =
        SETTINGS.into_iter().filter(|name| ours.iter().any(|ours| ours == name)).collect();
    for name in &ours {
        write(&setting(proc_sys, name), "0")?;
    }
    match fs::remove_file(record) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(explained("remove", record, &error))
        }
        Ok(()) | Err(_) => Ok(ours),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_off_is_turned_on_and_off_again_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let (proc_sys, record) = (folder.path().join("sys"), folder.path().join("record"));
        fs::create_dir_all(proc_sys.join(SYSCTLS)).expect("made");
        let values = |values: [&str; 2]| {
            for (name, value) in SETTINGS.iter().zip(values) {
                fs::write(setting(&proc_sys, name), value).expect("written");
            }
        };
        let now = || {
            SETTINGS.map(|name| read(&setting(&proc_sys, name)).expect("read").trim().to_owned())
        };
        values(["0\n", "1\n"]);
        assert_eq!(prepare(&proc_sys, &record).expect("prepared"), ["accept_local"]);
        assert_eq!(now(), ["1", "1"]);
        assert!(prepare(&proc_sys, &record).expect("prepared").is_empty(), "once is enough");
        assert_eq!(release(&proc_sys, &record).expect("released"), ["accept_local"]);
        assert_eq!(now(), ["0", "1"]);
        assert!(release(&proc_sys, &record).expect("released").is_empty());
        // A setting that was turned on in two steps.
        values(["0\n", "0\n"]);
        assert_eq!(prepare(&proc_sys, &record).expect("prepared"), SETTINGS);
        values(["0\n", "1\n"]);
        assert_eq!(prepare(&proc_sys, &record).expect("prepared"), ["accept_local"]);
        assert_eq!(release(&proc_sys, &record).expect("released"), SETTINGS);
        assert_eq!(now(), ["0", "0"]);
    }

    #[test]
    fn a_setting_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let error =
            prepare(folder.path(), &folder.path().join("record")).expect_err("no such setting");
        assert!(error.to_string().contains("net/ipv4/conf/lo/accept_local"), "{error}");
    }
}
