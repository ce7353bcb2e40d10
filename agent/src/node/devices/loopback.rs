//! Prepares the loopback device for answers to processes of this host that use a Service at one of
//! the node's own addresses.
//!
//! Such an answer is injected on `lo`, the only device on which the kernel accepts a source address
//! of this host even with strict reverse path filtering. That requires two settings, which affect
//! only `lo`, where nothing arrives from elsewhere. Changes are recorded, so that they can be
//! undone.

use std::io;

use crate::node::settings::{Recorder, Rule, Setting};

/// The folder of the settings below `/proc/sys`.
const SYSCTLS: &str = "net/ipv4/conf/lo";
/// The settings that accept this host's addresses as sources, and loopback addresses (node ports at
/// `localhost`).
const SETTINGS: [&str; 2] = ["accept_local", "route_localnet"];

/// Turns on the settings that are off, and returns their names.
///
/// # Errors
///
/// Fails if a setting or the record cannot be read or written.
pub fn prepare(recorder: &mut Recorder) -> io::Result<Vec<&'static str>> {
    let mut changed = Vec::new();
    for name in SETTINGS {
        let setting =
            Setting { name: format!("{SYSCTLS}/{name}"), value: "1".to_owned(), rule: Rule::On };
        if recorder.apply(setting)?.is_some() {
            changed.push(name);
        }
    }
    Ok(changed)
}

/// Turns off the settings that were turned on, and returns their names.
///
/// # Errors
///
/// Fails if a setting or the record cannot be read, written or removed.
pub fn release(recorder: &Recorder) -> io::Result<Vec<String>> {
    let restored = recorder.restore(SYSCTLS, |_, _| true)?;
    let prefix = format!("{SYSCTLS}/");
    Ok(restored.iter().map(|name| name.trim_start_matches(&*prefix).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_was_off_is_turned_on_and_off_again_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut recorder = Recorder::new(folder.path(), folder.path());
        fs::create_dir_all(folder.path().join(SYSCTLS)).expect("made");
        let values = |values: [&str; 2]| {
            for (name, value) in SETTINGS.iter().zip(values) {
                fs::write(folder.path().join(SYSCTLS).join(name), value).expect("written");
            }
        };
        let now = |recorder: &Recorder| {
            SETTINGS.map(|name| recorder.read(&format!("{SYSCTLS}/{name}")).expect("read"))
        };
        values(["0\n", "1\n"]);
        assert_eq!(prepare(&mut recorder).expect("prepared"), ["accept_local"]);
        assert_eq!(now(&recorder), ["1", "1"]);
        assert!(prepare(&mut recorder).expect("prepared").is_empty(), "once is enough");
        assert_eq!(release(&recorder).expect("released"), ["accept_local"]);
        assert_eq!(now(&recorder), ["0", "1"]);
        assert!(release(&recorder).expect("released").is_empty());
        // A setting that was turned on in two steps.
        values(["0\n", "0\n"]);
        assert_eq!(prepare(&mut recorder).expect("prepared"), SETTINGS);
        values(["0\n", "1\n"]);
        assert_eq!(prepare(&mut recorder).expect("prepared"), ["accept_local"]);
        assert_eq!(release(&recorder).expect("released"), SETTINGS);
        assert_eq!(now(&recorder), ["0", "0"]);
    }
}
