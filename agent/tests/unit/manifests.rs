//! The watched folder, with a real file system.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use sluice::daemon::source::Pulse;
use sluice::daemon::source::manifests;
use sluice_core::model::{Change, Event, ObjectName};
use tokio::sync::mpsc;
use tokio::time::timeout;

fn service(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {address}, ports: [{{port: 80}}]}}\n"
    )
}

/// A watched folder and its changes.
struct Watch {
    events: mpsc::Receiver<Event>,
    pulse: Pulse,
}

impl Watch {
    fn new(path: &Path) -> Self {
        let (sink, events) = mpsc::channel(64);
        let pulse = Pulse::default();
        drop(tokio::spawn(manifests::watch(path.to_owned(), sink, pulse.clone())));
        Self { events, pulse }
    }

    /// Returns the next change, which must come well before the folder is polled.
    async fn next(&mut self) -> Change {
        let next = timeout(Duration::from_secs(5), self.events.recv()).await;
        next.expect("a change in time").expect("the source lives").change
    }

    /// Expects a Service to appear or change, or to go.
    async fn expect(&mut self, name: &str, exists: bool) {
        let change = self.next().await;
        let Change::Service(found, spec) = &change else {
            panic!("{change:?} instead of Service {name}")
        };
        assert_eq!((found, spec.is_some()), (&ObjectName::new("default", name), exists));
    }

    async fn nothing(&mut self) {
        let next = timeout(Duration::from_millis(600), self.events.recv()).await;
        assert!(next.is_err(), "{next:?}");
    }
}

#[tokio::test]
async fn files_that_come_change_and_go_are_noticed_however_they_are_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let folder = directory.path();
    fs::write(folder.join("a.yaml"), service("a", "10.0.0.1")).expect("written");
    let mut watch = Watch::new(folder);
    watch.expect("a", true).await;
    assert_eq!(watch.next().await, Change::Synced);

    // In place.
    fs::write(folder.join("a.yaml"), service("a", "10.0.0.2")).expect("written");
    watch.expect("a", true).await;
    // Writing the same content is no change.
    fs::write(folder.join("a.yaml"), service("a", "10.0.0.2")).expect("written");
    watch.nothing().await;
    // As editors do: another file takes the place.
    fs::write(folder.join(".a.yaml.swp"), service("a", "10.0.0.3")).expect("written");
    fs::rename(folder.join(".a.yaml.swp"), folder.join("a.yaml")).expect("renamed");
    watch.expect("a", true).await;
    // Half written, then complete.
    fs::write(folder.join("b.yaml"), &service("b", "10.0.0.4")[..60]).expect("written");
    assert!(matches!(watch.next().await, Change::Notes(_, notes) if notes.len() == 1));
    fs::write(folder.join("b.yaml"), service("b", "10.0.0.4")).expect("written");
    watch.expect("b", true).await;
    assert!(matches!(watch.next().await, Change::Notes(_, notes) if notes.is_empty()));
    fs::remove_file(folder.join("a.yaml")).expect("removed");
    watch.expect("a", false).await;
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_when_its_data_is_swapped() {
    let directory = tempfile::tempdir().expect("a directory");
    let folder = directory.path();
    for (version, address) in [("..1", "10.0.0.1"), ("..2", "10.0.0.2")] {
        fs::create_dir(folder.join(version)).expect("made");
        fs::write(folder.join(version).join("a.yaml"), service("a", address)).expect("written");
    }
    symlink("..1", folder.join("..data")).expect("linked");
    symlink("..data/a.yaml", folder.join("a.yaml")).expect("linked");
    let mut watch = Watch::new(folder);
    watch.expect("a", true).await;
    assert_eq!(watch.next().await, Change::Synced);
    symlink("..2", folder.join("..data_tmp")).expect("linked");
    fs::rename(folder.join("..data_tmp"), folder.join("..data")).expect("swapped");
    watch.expect("a", true).await;
}

#[tokio::test]
async fn a_folder_that_is_missing_is_reported_and_takes_nothing_away() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut watch = Watch::new(&directory.path().join("missing"));
    assert!(matches!(watch.next().await, Change::Notes(_, notes) if notes.len() == 1));
    let health = watch.pulse.health();
    assert!(health.failure.is_some() && !health.synced);
}

#[test]
fn a_folder_can_be_read_once() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("a.yaml"), service("a", "10.0.0.1")).expect("written");
    let events = manifests::read(directory.path()).expect("read");
    assert_eq!(events.len(), 2);
    assert_eq!(events.last().map(|event| &event.change), Some(&Change::Synced));
}
