//! Checks and makes folders that only root may change: the pin path and the state directory.
//!
//! A user who may rename or replace their content decides what the next agent adopts, what
//! `sluice cleanup` removes and which file root writes to. A BPF file system that was mounted
//! without options lets all users make folders (mode 1777), so another user may have been first.
//! A folder that is not root's alone is refused with the command that fixes it. It is not fixed
//! automatically, since an administrator should see what was left there.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

/// The bits of a mode by which users other than the owner may write.
const WRITABLE: u32 = 0o022;
/// In a folder with this bit only the owner of an entry, or of the folder, may rename or remove it.
const STICKY: u32 = 0o1000;

/// The mode of folders that only root has to read.
pub(crate) const CLOSED: u32 = 0o700;
/// The mode of folders that all users may read.
pub(crate) const READABLE: u32 = 0o755;

/// The reason for which a folder is refused.
#[derive(Debug, thiserror::Error)]
#[error(
    "{used} is not safe: {at} {what}, so somebody other than root could replace what lies there; look at it (`ls -lR {at}`), then run `{mend}`"
)]
pub(crate) struct Unsafe {
    used: String,
    at: String,
    what: String,
    mend: String,
}

/// The relation of a path to the checked folder.
#[derive(Clone, Copy, PartialEq, Eq)]
enum As {
    /// A folder above it, where other users may make entries if they cannot change ours.
    Above,
    /// The folder itself.
    Folder,
    /// Its content.
    Below,
}

/// Whether a user is root, or runs this process without being root.
fn is_trusted(uid: u32) -> bool {
    // SAFETY: it only returns a number.
    uid == 0 || uid == unsafe { libc::geteuid() }
}

/// Checks one path.
fn look(used: &Path, at: &Path, role: As) -> io::Result<()> {
    let found = fs::symlink_metadata(at)?;
    let shown = at.display();
    let (what, mend) = if !is_trusted(found.uid()) {
        let mend = match role {
            As::Above => format!("chown -h root:root {shown}"),
            As::Folder | As::Below => {
                format!("chown -hR root:root {shown} && chmod -R go-w {shown}")
            }
        };
        (format!("belongs to the user {}", found.uid()), mend)
    } else if found.is_symlink() {
        if role == As::Above {
            // The link is root's own. Its target is checked as well.
            return Ok(());
        }
        ("is a symbolic link".to_owned(), format!("rm {shown}"))
    } else if role == As::Folder && !found.is_dir() {
        ("is no folder".to_owned(), format!("rm {shown}"))
    } else if found.mode() & WRITABLE != 0 && !(role == As::Above && found.mode() & STICKY != 0) {
        (format!("has the mode {:04o}", found.mode() & 0o7777), format!("chmod go-w {shown}"))
    } else {
        return Ok(());
    };
    let refused = Unsafe { used: used.display().to_string(), at: shown.to_string(), what, mend };
    Err(io::Error::new(io::ErrorKind::PermissionDenied, refused))
}

/// Checks that only root may change an existing folder and the path to it. One that does not exist
/// is safe.
///
/// # Errors
///
/// Returns an [`Unsafe`] if other users may.
pub(crate) fn check(folder: &Path) -> io::Result<()> {
    let folder = std::path::absolute(folder)?;
    let result =
        check_way(&folder, &folder).and_then(|()| check_way(&folder, &fs::canonicalize(&folder)?));
    unless_out_of_reach(result)
}

/// Checks every folder from the root down, as the path is written or with symbolic links resolved.
fn check_way(used: &Path, folder: &Path) -> io::Result<()> {
    let ancestors: Vec<&Path> = folder.ancestors().skip(1).collect();
    ancestors.into_iter().rev().try_for_each(|above| look(used, above, As::Above))?;
    look(used, folder, As::Folder)
}

/// Checks everything that lies in a folder, folders in it included.
///
/// # Errors
///
/// As [`check`].
pub(crate) fn check_below(used: &Path, folder: &Path) -> io::Result<()> {
    let walk = || {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            unless_out_of_reach(look(used, &path, As::Below))?;
            if fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir()) {
                check_below(used, &path)?;
            }
        }
        Ok(())
    };
    unless_out_of_reach(walk())
}

/// Checks the files that lie directly in a folder.
///
/// # Errors
///
/// As [`check`].
pub(crate) fn check_files(folder: &Path) -> io::Result<()> {
    let walk = || {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                unless_out_of_reach(look(folder, &entry.path(), As::Below))?;
            }
        }
        Ok(())
    };
    unless_out_of_reach(walk())
}

/// Ignores paths that do not exist, which cannot be unsafe, and those that this user may not read,
/// and so does not use either.
fn unless_out_of_reach(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| {
        let is_ours =
            error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<Unsafe>);
        let is_out_of_reach =
            matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied);
        if is_out_of_reach && !is_ours { Ok(()) } else { Err(error) }
    })
}

/// Makes a folder with this mode, or checks that only root may change the existing one.
///
/// # Errors
///
/// Fails if it cannot be made, or with an [`Unsafe`] if other users may change it.
pub(crate) fn make(folder: &Path, mode: u32) -> io::Result<()> {
    if let Some(above) = folder.parent() {
        DirBuilder::new().recursive(true).mode(READABLE).create(above)?;
    }
    match DirBuilder::new().mode(mode).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // It does not matter who made it: once it has passed the check, only root can change it.
    check(folder)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("our own");
    }

    /// The command that is told.
    fn told(result: io::Result<()>) -> Option<String> {
        let error = result.err()?;
        let refused =
            error.get_ref().and_then(|inner| inner.downcast_ref::<Unsafe>()).expect("an Unsafe");
        Some(refused.mend.clone())
    }

    #[test]
    fn a_folder_is_made_closed_and_accepted() {
        let above = tempfile::tempdir().expect("a folder");
        // As a BPF file system's root may be.
        chmod(above.path(), 0o1777);
        let folder = above.path().join("a");
        make(&folder, CLOSED).expect("made");
        assert_eq!(fs::metadata(&folder).expect("there").mode() & 0o7777, CLOSED);
        make(&folder, CLOSED).expect("there already");
        check(&above.path().join("nothing")).expect("what is not there is safe");
    }

    #[test]
    fn what_others_may_write_to_is_refused() {
        let above = tempfile::tempdir().expect("a folder");
        let folder = above.path().join("a");
        make(&folder, CLOSED).expect("made");
        for mode in [0o720, 0o702, 0o1777] {
            chmod(&folder, mode);
            assert_eq!(
                told(check(&folder)),
                Some(format!("chmod go-w {}", folder.display())),
                "{mode:o}"
            );
        }
        chmod(&folder, CLOSED);
        chmod(above.path(), 0o777);
        assert_eq!(
            told(make(&folder, CLOSED)),
            Some(format!("chmod go-w {}", above.path().display()))
        );
    }

    #[test]
    fn links_and_what_lies_in_a_folder_are_looked_at() {
        let above = tempfile::tempdir().expect("a folder");
        let (folder, link) = (above.path().join("a"), above.path().join("link"));
        make(&folder, CLOSED).expect("made");
        symlink(&folder, &link).expect("ours");
        assert_eq!(told(make(&link, CLOSED)), Some(format!("rm {}", link.display())));
        // A link on the way is fine, if where it leads is.
        let by_link = link.join("b");
        make(&by_link, CLOSED).expect("made");
        chmod(&folder, 0o722);
        assert_eq!(told(check(&by_link)), Some(format!("chmod go-w {}", folder.display())));
        chmod(&folder, CLOSED);
        fs::write(folder.join("file"), "").expect("ours");
        check_below(&folder, &folder).expect("root's alone");
        symlink("/etc/passwd", folder.join("b/status.json")).expect("ours");
        let mend = Some(format!("rm {}", folder.join("b/status.json").display()));
        assert_eq!(told(check_below(&folder, &folder)), mend);
        check_files(&folder).expect("folders in it are not looked into");
        assert_eq!(
            told(check_files(&by_link)),
            Some(format!("rm {}", by_link.join("status.json").display()))
        );
    }
}
