//! Watches a directory of manifests: Sluice without Kubernetes.
//!
//! Every `*.yaml`, `*.yml` and `*.json` directly in the directory counts, except hidden files.
//! Symbolic links are followed, so the directory may be a mounted ConfigMap. If two files have the
//! same object, the first by path counts. What cannot be understood keeps its last good form: all
//! objects of a file that cannot be read, those that a broken document may have held, and an object
//! that cannot be decoded.

mod folder;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use notify::{RecursiveMode, Watcher};
use sluice_core::model::report::{Flaw, Note, Subject};
use sluice_core::model::{Change, Event, SourceId};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

pub use folder::Folder;

use super::Pulse;

/// The time for which the directory must be quiet before it is read: editors and `kubectl` write in
/// several steps.
const QUIET: Duration = Duration::from_millis(100);
/// After this long the directory is read even if it is not quiet.
const PATIENCE: Duration = Duration::from_secs(1);
/// The interval at which the directory is checked without an event: some file systems send none.
const POLL: Duration = Duration::from_secs(10);

/// Reads a directory once.
///
/// # Errors
///
/// Fails if the directory itself cannot be read.
pub fn read(path: &Path) -> std::io::Result<Vec<Event>> {
    let mut folder = Folder::new(path.to_owned());
    let mut changes = folder.scan()?;
    changes.push(Change::Synced);
    Ok(changes.into_iter().map(event).collect())
}

fn event(change: Change) -> Event {
    Event { source: SourceId::Manifests, change }
}

/// Reads a directory and watches it until the receiver is gone.
pub async fn watch(path: PathBuf, sink: mpsc::Sender<Event>, pulse: Pulse) {
    let (waker, mut woken) = mpsc::channel(1);
    let mut folder = Folder::new(path.clone());
    let mut synced = false;
    let mut watched = None;
    loop {
        // A directory that was replaced by another needs a new watch.
        let identity = folder::identity(&path);
        if identity.is_none()
            || watched.as_ref().is_none_or(|(known, _)| Some(known) != identity.as_ref())
        {
            watched = identity.zip(watcher(&path, waker.clone()));
        }
        let (returned, result) = match tokio::task::spawn_blocking(move || {
            let result = folder.scan();
            (folder, result)
        })
        .await
        {
            Ok(done) => done,
            Err(error) => {
                // Only a panic of the scan gets here. A new `Folder` finds everything again.
                tracing::error!(%error, "reading the manifests failed");
                (Folder::new(path.clone()), Ok(Vec::new()))
            }
        };
        folder = returned;
        let mut changes = match result {
            Ok(mut changes) => {
                if pulse.succeeded() {
                    changes.push(Change::Notes(Subject::Source(SourceId::Manifests), Vec::new()));
                }
                if !synced {
                    synced = true;
                    changes.push(Change::Synced);
                    pulse.synced();
                }
                changes
            }
            Err(error) => vec![unreadable(&path, &error, &pulse)],
        };
        for change in changes.drain(..) {
            if sink.send(event(change)).await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = quiet(&mut woken) => {}
            () = sink.closed() => return,
        }
    }
}

/// Records that the directory cannot be read.
fn unreadable(path: &Path, error: &std::io::Error, pulse: &Pulse) -> Change {
    let why = format!(
        "cannot read the directory {}: {error}; its last objects remain in effect",
        path.display()
    );
    pulse.failed(why.clone());
    let note = Note::new(Flaw::Unreadable, "", why);
    Change::Notes(Subject::Source(SourceId::Manifests), vec![note])
}

/// Waits for an event, or until the next check is due, and then for quiet.
async fn quiet(woken: &mut mpsc::Receiver<()>) {
    let _ = timeout_at(Instant::now() + POLL, woken.recv()).await;
    let latest = Instant::now() + PATIENCE;
    while Instant::now() < latest && timeout_at(Instant::now() + QUIET, woken.recv()).await.is_ok()
    {
    }
}

/// Watches the directory, and wakes on every event. Returns [`None`] if that is not possible.
fn watcher(path: &Path, waker: mpsc::Sender<()>) -> Option<notify::RecommendedWatcher> {
    let handler = move |result: notify::Result<notify::Event>| {
        // Reading is an event too, and the scan's own would wake us.
        if !matches!(result.map(|event| event.kind), Ok(notify::EventKind::Access(access)) if !is_write_end(access))
        {
            // A full channel already holds a wakeup.
            let _ = waker.try_send(());
        }
    };
    let watcher = notify::recommended_watcher(handler).and_then(|mut watcher| {
        watcher.watch(path, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    match watcher {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::warn!(%error, folder = %path.display(), "cannot watch the directory; checking it every {POLL:?} instead");
            None
        }
    }
}

fn is_write_end(access: notify::event::AccessKind) -> bool {
    use notify::event::{AccessKind, AccessMode};
    access == AccessKind::Close(AccessMode::Write)
}

/// Whether a file was modified so recently that its age proves nothing: it may have been written
/// twice since.
fn fresh(modified: Option<SystemTime>) -> bool {
    modified
        .is_none_or(|modified| modified.elapsed().map_or(true, |age| age < Duration::from_secs(5)))
}
