//! What a person wants of the running agent: a small file beside its status, written by
//! `sluice takeover` and `sluice release`, and kept until it is done. It outlives the agent, so
//! that one that is started again goes on with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::node::folder;

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "wish")]
pub enum Wish {
    /// To serve everything, beginning with what netfilter serves now.
    Takeover,
    /// To remove kube-proxy's rules: it does not run any more.
    Finish,
    /// To be ready for a kube-proxy that is about to start.
    Prepare,
    /// To stay so, until something else is wanted.
    Prepared,
    /// To leave new flows to netfilter, and to go when the last known one has ended.
    Release {
        /// When to go in any case, in seconds since 1970.
        deadline: u64,
    },
    /// Nothing more: a release is done. The agent serves nothing until it is told to.
    Released,
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("wish.json")
}

/// The wish in a state directory.
#[must_use]
pub fn read(state_dir: &Path) -> Option<Wish> {
    serde_json::from_slice(&fs::read(path(state_dir)).ok()?).ok()
}

/// Leaves a wish in a state directory, in place of the last one.
///
/// # Errors
///
/// When the file cannot be written.
pub fn write(state_dir: &Path, wish: Wish) -> io::Result<()> {
    folder::make(state_dir, folder::READABLE)?;
    let new = state_dir.join("wish.json.new");
    fs::write(&new, serde_json::to_vec(&wish)?)?;
    fs::rename(new, path(state_dir))
}

/// Leaves a wish in a state directory in place of another, if that is still there.
///
/// # Errors
///
/// When the file cannot be written.
pub fn replace(state_dir: &Path, old: Wish, new: Wish) -> io::Result<()> {
    if read(state_dir) == Some(old) { write(state_dir, new) } else { Ok(()) }
}

/// Removes the wish, if it is still this one.
///
/// # Errors
///
/// When the file cannot be removed.
pub fn done(state_dir: &Path, wish: Wish) -> io::Result<()> {
    if read(state_dir) == Some(wish) { clear(state_dir) } else { Ok(()) }
}

/// Removes the wish, whatever it is.
///
/// # Errors
///
/// When the file cannot be removed.
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
    fn a_wish_stays_until_it_is_done() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(read(folder.path()), None);
        let release = Wish::Release { deadline: 7 };
        for wish in
            [Wish::Takeover, Wish::Finish, Wish::Prepare, Wish::Prepared, release, Wish::Released]
        {
            write(folder.path(), wish).expect("written");
            assert_eq!(read(folder.path()), Some(wish));
        }
        done(folder.path(), Wish::Finish).expect("another wish");
        assert_eq!(read(folder.path()), Some(Wish::Released));
        done(folder.path(), Wish::Released).expect("removed");
        assert_eq!(read(folder.path()), None);
        clear(folder.path()).expect("nothing to remove");
    }

    #[test]
    fn what_is_wanted_by_now_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let prepared =
            || replace(folder.path(), Wish::Prepare, Wish::Prepared).expect("replaced or left");
        prepared();
        assert_eq!(read(folder.path()), None);
        for (wish, then) in [(Wish::Prepare, Wish::Prepared), (Wish::Takeover, Wish::Takeover)] {
            write(folder.path(), wish).expect("written");
            prepared();
            assert_eq!(read(folder.path()), Some(then));
        }
    }
}
