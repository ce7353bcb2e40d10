//! Requests of an operator to the running agent. A request is a small file next to the status,
//! written by `sluice takeover` and `sluice release`, and kept until it is fulfilled. It outlives
//! the agent, so that one that restarts continues with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::node::folder;

/// A request. The file's names date from when requests were called wishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "wish")]
pub enum Request {
    /// Serve everything, beginning with what netfilter serves now.
    Takeover,
    /// Remove kube-proxy's rules: it no longer runs.
    Finish,
    /// Get ready for a kube-proxy that is about to start.
    Prepare,
    /// Stay ready for kube-proxy until there is another request.
    Prepared,
    /// Leave new flows to netfilter, and end when the last known one has ended.
    Release {
        /// The time at which it ends in any case, in seconds since 1970.
        deadline: u64,
    },
    /// Serve nothing: the node is released. The agent waits for another request.
    Released,
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("wish.json")
}

/// Returns the request in a state directory.
#[must_use]
pub fn read(state_dir: &Path) -> Option<Request> {
    serde_json::from_slice(&fs::read(path(state_dir)).ok()?).ok()
}

/// Writes a request to a state directory, replacing the last one.
///
/// # Errors
///
/// Fails if the file cannot be written.
pub fn write(state_dir: &Path, request: Request) -> io::Result<()> {
    folder::make(state_dir, folder::READABLE)?;
    let new = state_dir.join("wish.json.new");
    fs::write(&new, serde_json::to_vec(&request)?)?;
    fs::rename(new, path(state_dir))
}

/// Replaces a request in a state directory by another, if it is still there.
///
/// # Errors
///
/// Fails if the file cannot be written.
pub fn replace(state_dir: &Path, old: Request, new: Request) -> io::Result<()> {
    if read(state_dir) == Some(old) { write(state_dir, new) } else { Ok(()) }
}

/// Removes the request, if it is still this one.
///
/// # Errors
///
/// Fails if the file cannot be removed.
pub fn done(state_dir: &Path, request: Request) -> io::Result<()> {
    if read(state_dir) == Some(request) { clear(state_dir) } else { Ok(()) }
}

/// Removes any request.
///
/// # Errors
///
/// Fails if the file cannot be removed.
pub fn clear(state_dir: &Path) -> io::Result<()> {
    match fs::remove_file(path(state_dir)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_stays_until_it_is_done() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(read(folder.path()), None);
        let release = Request::Release { deadline: 7 };
        for request in [
            Request::Takeover,
            Request::Finish,
            Request::Prepare,
            Request::Prepared,
            release,
            Request::Released,
        ] {
            write(folder.path(), request).expect("written");
            assert_eq!(read(folder.path()), Some(request));
        }
        done(folder.path(), Request::Finish).expect("another request");
        assert_eq!(read(folder.path()), Some(Request::Released));
        done(folder.path(), Request::Released).expect("removed");
        assert_eq!(read(folder.path()), None);
        clear(folder.path()).expect("nothing to remove");
    }

    #[test]
    fn what_is_wanted_by_now_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let prepared = || {
            replace(folder.path(), Request::Prepare, Request::Prepared).expect("replaced or left");
        };
        prepared();
        assert_eq!(read(folder.path()), None);
        for (request, then) in
            [(Request::Prepare, Request::Prepared), (Request::Takeover, Request::Takeover)]
        {
            write(folder.path(), request).expect("written");
            prepared();
            assert_eq!(read(folder.path()), Some(then));
        }
    }
}
