//! The cache of tools that had to be built: `$SLUICE_CACHE`, or `$XDG_CACHE_HOME/sluice`, or
//! `~/.cache/sluice`.
//!
//! A directory in it is complete or absent: it is built under another name and a lock, and then
//! renamed, so that neither an interrupted run nor two runs at once leave half a tool.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of the cache.
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Finds the cache by the environment. Creates nothing yet.
    ///
    /// # Errors
    /// If no variable says where it is.
    pub fn open() -> Result<Self> {
        let root = choose_root(
            env::var_os("SLUICE_CACHE"),
            env::var_os("XDG_CACHE_HOME"),
            env::var_os("HOME"),
        )
        .context("no place for the cache: set SLUICE_CACHE, XDG_CACHE_HOME or HOME")?;
        let root = std::path::absolute(root).context("the cache's path is not usable")?;
        Ok(Self { root })
    }

    /// Returns the path of an entry.
    pub fn path(&self, entry: &str) -> PathBuf {
        self.root.join(entry)
    }

    /// Returns the directory of an entry. Unless `is_complete` holds for it already, `build` builds
    /// it in the directory that it is passed.
    ///
    /// # Errors
    /// Those of `build`, or if the directory cannot be put in its place.
    pub fn ensure(
        &self,
        entry: &str,
        is_complete: impl Fn(&Path) -> bool,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let place = self.path(entry);
        if is_complete(&place) {
            return Ok(place);
        }
        let parent = place.parent().context("a cache entry needs a parent")?;
        let name =
            place.file_name().context("a cache entry needs a name")?.to_string_lossy().into_owned();
        fs::create_dir_all(parent)
            .with_context(|| format!("cannot create {}", parent.display()))?;
        let _lock = lock(&parent.join(format!(".{name}.lock")), entry)?;
        // Another run may have finished it while this one waited.
        if is_complete(&place) {
            return Ok(place);
        }
        // We hold the lock, so anything here is from a run that died.
        let partial = parent.join(format!(".{name}.partial"));
        remove_dir_if_exists(&partial)?;
        fs::create_dir(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
        build(&partial)?;
        remove_dir_if_exists(&place)?;
        fs::rename(&partial, &place)
            .with_context(|| format!("cannot put {} in place", place.display()))?;
        Ok(place)
    }
}

impl Cache {
    /// Takes a lock of that name, which is held until the returned file is dropped.
    ///
    /// # Errors
    /// If its file cannot be opened.
    pub fn lock(&self, name: &str) -> Result<File> {
        fs::create_dir_all(&self.root)
            .with_context(|| format!("cannot create {}", self.root.display()))?;
        lock(&self.root.join(format!(".{name}.lock")), name)
    }
}

fn remove_dir_if_exists(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Takes a lock, which is held until the returned file is dropped.
fn lock(path: &Path, entry: &str) -> Result<File> {
    let context = || format!("cannot lock {}", path.display());
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(context)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            eprintln!("{entry}: waiting for another run that is at it");
            file.lock().with_context(context)?;
        }
        Err(TryLockError::Error(error)) => return Err(error).with_context(context),
    }
    Ok(file)
}

/// Applies the rules of XDG base directories: a relative `XDG_CACHE_HOME` is ignored, and an empty
/// variable counts as unset.
fn choose_root(
    own: Option<OsString>,
    xdg: Option<OsString>,
    home: Option<OsString>,
) -> Option<PathBuf> {
    let set = |value: Option<OsString>| value.filter(|value| !value.is_empty()).map(PathBuf::from);
    set(own)
        .or_else(|| set(xdg).filter(|path| path.is_absolute()).map(|path| path.join("sluice")))
        .or_else(|| set(home).map(|path| path.join(".cache/sluice")))
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn root(own: &str, xdg: &str, home: &str) -> Option<PathBuf> {
        choose_root(Some(own.into()), Some(xdg.into()), Some(home.into()))
    }

    #[test]
    fn the_own_variable_wins_then_xdg_then_home() {
        assert_eq!(root("/own", "/xdg", "/home/a"), Some("/own".into()));
        assert_eq!(root("", "/xdg", "/home/a"), Some("/xdg/sluice".into()));
        assert_eq!(root("", "", "/home/a"), Some("/home/a/.cache/sluice".into()));
        assert_eq!(root("", "relative", "/home/a"), Some("/home/a/.cache/sluice".into()));
        assert_eq!(choose_root(None, None, None), None);
    }

    #[test]
    fn an_entry_is_complete_or_absent() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let cache = Cache { root: directory.path().to_owned() };
        let is_complete = |path: &Path| path.join("tool").is_file();
        let failed = cache.ensure("tools/a", is_complete, |path| {
            fs::write(path.join("half"), "")?;
            bail!("interrupted")
        });
        assert!(failed.is_err());
        assert!(!cache.path("tools/a").exists());

        let built = cache.ensure("tools/a", is_complete, |path| {
            assert!(!path.join("half").exists(), "a dead run's leftovers are gone");
            fs::write(path.join("tool"), "")?;
            Ok(())
        })?;
        assert!(built.join("tool").is_file());
        let again = cache.ensure("tools/a", is_complete, |_| bail!("must not build again"))?;
        assert_eq!(again, built);
        Ok(())
    }
}
