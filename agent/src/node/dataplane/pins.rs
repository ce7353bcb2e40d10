//! Manages the pins under the pin path, and replaces maps of another form.
//!
//! ```text
//! <pin path>/v<LAYOUT>/maps/<map>       maps that the attached programs use
//! <pin path>/v<LAYOUT>/maps_new/<map>   maps that are filled while the programs use the others
//! <pin path>/v<LAYOUT>/links/<link>     links that keep the programs attached without an agent
//! ```
//!
//! During a change of layout there is also `v<the previous LAYOUT>/maps`, which the previous
//! version made or will take over. Most of its maps are the same as this layout's, pinned twice.
//!
//! Names contain no dots, which the BPF file system reserves.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use sluice_common::abi::{LAYOUT, previous};
use sluice_core::image::map;

use super::bpf;
use super::error::Error;
use super::object::{Spec, difference};
use crate::node::folder;

/// Type of the BPF file system in `statfs`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// Maps whose content lasts for one packet. One program decides about a packet, so programs of two
/// layouts need not share them.
const SCRATCH: [&str; 3] = ["scratch_v4", "scratch_v6", "event_scratch"];

/// The folders under a pin path.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

/// The maps under the pin path when the agent starts.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// No maps of ours.
    Nothing,
    /// Maps that fit the object.
    Fitting,
    /// Maps that do not fit: each map that differs, with a description of how.
    Differing(BTreeMap<String, String>),
}

/// Whether a pinned map can still be used, given those that differ.
#[must_use]
pub fn is_kept(map: &str, differing: &BTreeMap<String, String>) -> bool {
    // The plan's maps make sense only together.
    let planned = |name: &str| map::NAMES.contains(&name);
    if planned(map) {
        !differing.keys().any(|name| planned(name))
    } else {
        !differing.contains_key(map)
    }
}

fn remove_folder(path: &Path) -> io::Result<()> {
    // There are only folders and pins here, two levels deep.
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_folder(&entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(path)
}

fn pin_again(from: &Path, to: &Path) -> Result<(), Error> {
    let fd = match bpf::object_get(from) {
        Ok(fd) => fd,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(Error::pin("open the pinned map", from, cause)),
    };
    bpf::object_pin(fd.as_fd(), to).map_err(|cause| Error::pin("pin", to, cause))
}

fn create(path: &Path) -> Result<(), Error> {
    let created = fs::DirBuilder::new().recursive(true).mode(folder::CLOSED).create(path);
    created.map_err(|cause| Error::pin("create", path, cause))
}

impl Pins {
    /// Names the folders under a pin path, without touching them.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Returns the pin path.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn version(&self) -> PathBuf {
        self.root.join(format!("v{LAYOUT}"))
    }

    /// Returns the folder of this layout's maps.
    #[must_use]
    pub fn maps(&self) -> PathBuf {
        self.version().join("maps")
    }

    /// Returns the folder of this layout's maps that no program uses yet.
    #[must_use]
    pub fn maps_new(&self) -> PathBuf {
        self.version().join("maps_new")
    }

    /// Returns the folder of the links of this layout's programs.
    #[must_use]
    pub fn links(&self) -> PathBuf {
        self.version().join("links")
    }

    /// Returns the folders of other layouts.
    #[must_use]
    pub fn other_layouts(&self) -> Vec<PathBuf> {
        let own = self.version();
        let Ok(entries) = fs::read_dir(&self.root) else { return Vec::new() };
        let mut folders: Vec<PathBuf> = entries
            .flatten()
            .filter(|entry| {
                let name = entry.file_name();
                let number = name.to_str().and_then(|name| name.strip_prefix('v'));
                number.is_some_and(|number| {
                    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
                })
            })
            .map(|entry| entry.path())
            .filter(|path| *path != own)
            .collect();
        folders.sort();
        folders
    }

    /// Checks that only root may change what is pinned.
    ///
    /// # Errors
    ///
    /// Fails if other users may; the error contains the command that fixes it.
    pub fn check(&self) -> Result<(), Error> {
        let ours = self.other_layouts().into_iter().chain([self.version()]);
        let below = |folder: PathBuf| {
            folder::check(&folder).and_then(|()| folder::check_below(&self.root, &folder))
        };
        let checked = folder::check(&self.root).and_then(|()| ours.into_iter().try_for_each(below));
        checked.map_err(|cause| Error::Pin {
            action: "use",
            path: self.root.clone(),
            cause,
            hint: "",
        })
    }

    /// Makes sure that the pin path is a folder of a BPF file system that only root may change.
    /// Mounts a BPF file system if there is none.
    ///
    /// # Errors
    ///
    /// Fails if there is no BPF file system and none can be mounted, or if other users may change
    /// the folder.
    pub fn prepare(&self) -> Result<(), Error> {
        self.check()?;
        if !is_bpffs(&self.root) {
            let standard = Path::new("/sys/fs/bpf");
            let target = if self.root.starts_with(standard) { standard } else { &self.root };
            if target != standard {
                create(target)?;
            }
            mount_bpffs(target)?;
        }
        // Other users may be allowed to make folders in the file system's root.
        folder::make(&self.root, folder::CLOSED).map_err(|cause| Error::Pin {
            action: "use",
            path: self.root.clone(),
            cause,
            hint: "",
        })?;
        self.check()?;
        create(&self.links())?;
        self.settle().map_err(|cause| Error::pin("tidy up", self.version(), cause))
    }

    /// Makes the folders of maps and links again, if somebody has removed them or unmounted their
    /// file system. To be called between changes of layout only.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::prepare`] does.
    pub(super) fn make_folders(&self) -> Result<(), Error> {
        if self.maps().is_dir() && self.links().is_dir() {
            return Ok(());
        }
        self.prepare()?;
        create(&self.maps())
    }

    /// Makes the folder of links again, if somebody has removed it.
    ///
    /// # Errors
    ///
    /// Fails if the BPF file system refuses.
    pub(super) fn make_links(&self) -> Result<(), Error> {
        if self.links().is_dir() { Ok(()) } else { create(&self.links()) }
    }

    fn previous(&self) -> Option<PathBuf> {
        previous::LAYOUT.map(|layout| self.root.join(format!("v{layout}")))
    }

    /// Returns the folder of the previous layout's maps, if some are in use.
    pub(super) fn previous_maps(&self) -> Option<PathBuf> {
        self.previous().map(|folder| folder.join("maps")).filter(|folder| folder.exists())
    }

    /// Returns the folder in which maps for the previous version are prepared.
    pub(super) fn previous_maps_new(&self) -> Option<PathBuf> {
        self.previous().map(|folder| folder.join("maps_new")).filter(|folder| folder.exists())
    }

    /// Shares the maps of the previous layout that are unchanged in this one. Returns false if
    /// there are none, or if some do not fit this version, which then starts with maps of its own.
    ///
    /// # Errors
    ///
    /// Fails if a pin cannot be opened or made.
    pub(super) fn share_previous(
        &self,
        specs: &BTreeMap<String, Spec>,
        old: &BTreeMap<String, Spec>,
    ) -> Result<bool, Error> {
        let Some(from) = self.previous_maps() else { return Ok(false) };
        let to = self.maps();
        let info = |path: &Path| -> Result<Option<bpf::MapInfo>, Error> {
            match bpf::object_get(path).and_then(|fd| bpf::map_info(fd.as_fd())) {
                Ok(info) => Ok(Some(info)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(cause) => Err(Error::pin("inspect the pinned map", path, cause)),
            }
        };
        let mut shared = Vec::new();
        for (name, spec) in specs.iter().filter(|(name, _)| !SCRATCH.contains(&name.as_str())) {
            let Some(found) = info(&from.join(name))? else { continue };
            let own = info(&to.join(name))?;
            let id = found.id;
            let misfit = if previous::CHANGED.contains(&name.as_str()) {
                let wanted =
                    old.get(name).map(|wanted| Spec { max_entries: found.max_entries, ..*wanted });
                wanted.map_or(Some("it is unknown".to_owned()), |wanted| {
                    difference(&wanted, &found.into())
                })
            } else if own.as_ref().is_some_and(|own| own.id != id) {
                Some("another one has taken its place".to_owned())
            } else {
                shared.extend(own.is_none().then_some(name));
                difference(spec, &found.into())
            };
            if let Some(misfit) = misfit {
                tracing::warn!(
                    map = name,
                    misfit,
                    "a map of the previous layout does not fit: its flows are not taken over"
                );
                return Ok(false);
            }
        }
        create(&to)?;
        for name in shared {
            pin_again(&from.join(name), &to.join(name))?;
        }
        Ok(true)
    }

    /// Makes an empty folder for maps of the previous layout.
    ///
    /// # Errors
    ///
    /// Fails if the BPF file system refuses.
    pub(super) fn prepare_previous(&self) -> Result<(), Error> {
        let Some(folder) = self.previous().map(|folder| folder.join("maps_new")) else {
            return Ok(());
        };
        remove_folder(&folder).map_err(|cause| Error::pin("remove", &folder, cause))?;
        create(&folder)
    }

    /// Adds the maps that both layouts share, and moves the folder to where the previous version
    /// expects it.
    ///
    /// # Errors
    ///
    /// Fails if the BPF file system refuses; calling again is safe.
    pub(super) fn offer_previous(&self, specs: &BTreeMap<String, Spec>) -> Result<(), Error> {
        let Some(new) = self.previous_maps_new() else { return Ok(()) };
        let from = self.maps();
        let is_shared = |name: &str| !previous::CHANGED.contains(&name) && !SCRATCH.contains(&name);
        for name in specs.keys().filter(|name| is_shared(name)) {
            if !new.join(name).exists() {
                pin_again(&from.join(name), &new.join(name))?;
            }
        }
        let place = new.with_file_name("maps");
        fs::rename(&new, &place).map_err(|cause| Error::pin("rename", &new, cause))
    }

    /// Takes the maps of the previous layout out of use.
    ///
    /// # Errors
    ///
    /// Fails if the BPF file system refuses.
    pub(super) fn retire_previous(&self) -> Result<(), Error> {
        let Some(maps) = self.previous_maps() else { return Ok(()) };
        let retired = maps.with_file_name("maps_old");
        remove_folder(&retired)
            .and_then(|()| fs::rename(&maps, &retired))
            .map_err(|cause| Error::pin("rename", &maps, cause))
    }

    /// Completes or undoes what a killed agent left unfinished.
    fn settle(&self) -> io::Result<()> {
        let (maps, new, old) = (self.maps(), self.maps_new(), self.version().join("maps_old"));
        if !maps.exists() && new.exists() {
            fs::rename(&new, &maps)?;
        }
        remove_folder(&new)?;
        remove_folder(&old)
    }

    /// Compares the pinned maps with the object's.
    ///
    /// # Errors
    ///
    /// Fails if a pin cannot be opened.
    pub fn compare(&self, specs: &BTreeMap<String, Spec>) -> Result<Found, Error> {
        let folder = self.maps();
        if !folder.exists() {
            return Ok(Found::Nothing);
        }
        let mut differing = BTreeMap::new();
        for (name, spec) in specs {
            let path = folder.join(name);
            let info = match bpf::object_get(&path) {
                Ok(fd) => bpf::map_info(fd.as_fd()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => Err(error),
            };
            let pinned =
                info.map_err(|cause| Error::pin("inspect the pinned map", &path, cause))?.into();
            if let Some(text) = difference(spec, &pinned) {
                let _ = differing.insert(name.clone(), text);
            }
        }
        Ok(if differing.is_empty() { Found::Fitting } else { Found::Differing(differing) })
    }

    /// Makes the folder of new maps and pins there the maps that are kept; the others are made
    /// later.
    ///
    /// # Errors
    ///
    /// Fails if the folder or a pin cannot be made.
    pub fn stage(
        &self,
        specs: &BTreeMap<String, Spec>,
        differing: &BTreeMap<String, String>,
    ) -> Result<PathBuf, Error> {
        let (from, to) = (self.maps(), self.maps_new());
        create(&to)?;
        for name in specs.keys().filter(|name| is_kept(name, differing)) {
            pin_again(&from.join(name), &to.join(name))?;
        }
        Ok(to)
    }

    /// Pins new maps that are missing among the old ones there too, so that all of them can be
    /// opened. An earlier version may have had fewer maps.
    ///
    /// # Errors
    ///
    /// Fails if a pin cannot be made.
    pub(super) fn complete_old(&self, specs: &BTreeMap<String, Spec>) -> Result<(), Error> {
        let (old, new) = (self.maps(), self.maps_new());
        for name in specs.keys().filter(|name| !old.join(name).exists()) {
            pin_again(&new.join(name), &old.join(name))?;
        }
        Ok(())
    }

    /// Replaces the old maps by the new ones, if there are any, and removes other layouts, except
    /// the previous one if it shall stay. To be called once every program uses the new maps.
    ///
    /// # Errors
    ///
    /// Fails if the BPF file system refuses; calling again is safe.
    pub fn commit(&self, with_previous: bool) -> Result<(), Error> {
        let (maps, new, old) = (self.maps(), self.maps_new(), self.version().join("maps_old"));
        let swap = || -> io::Result<()> {
            if new.exists() {
                fs::rename(&maps, &old)?;
                fs::rename(&new, &maps)?;
            }
            remove_folder(&old)
        };
        swap().map_err(|cause| Error::pin("replace", &maps, cause))?;
        let kept = self.previous().filter(|_| with_previous);
        for folder in
            self.other_layouts().into_iter().filter(|folder| Some(folder) != kept.as_ref())
        {
            remove_folder(&folder).map_err(|cause| Error::pin("remove", &folder, cause))?;
        }
        Ok(())
    }

    /// Removes every pin and folder of all layouts, and returns whether there were any.
    ///
    /// # Errors
    ///
    /// Fails if the BPF file system refuses.
    pub fn remove(&self) -> Result<bool, Error> {
        let mut folders = self.other_layouts();
        folders.extend(Some(self.version()).filter(|folder| folder.exists()));
        for folder in &folders {
            remove_folder(folder).map_err(|cause| Error::pin("remove", folder, cause))?;
        }
        let found = !folders.is_empty();
        match fs::remove_dir(&self.root) {
            // It is a mount point or has foreign pins, and is not ours to remove.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::EBUSY | libc::ENOTEMPTY | libc::EPERM | libc::EINVAL)
                ) =>
            {
                Ok(found)
            }
            result => {
                result.map(|()| found).map_err(|cause| Error::pin("remove", &self.root, cause))
            }
        }
    }
}

/// Whether a path, or the nearest folder above it that exists, lies in a BPF file system.
pub(crate) fn is_bpffs(path: &Path) -> bool {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let Ok(path) = CString::new(existing.as_os_str().as_bytes()) else { return false };
    // SAFETY: zero is a value of every field.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with a zero and `stat` is live.
    let result = unsafe { libc::statfs(path.as_ptr(), &raw mut stat) };
    result == 0 && u64::try_from(stat.f_type).is_ok_and(|kind| kind == BPF_FS_MAGIC)
}

fn mount_bpffs(target: &Path) -> Result<(), Error> {
    let path = CString::new(target.as_os_str().as_bytes())
        .map_err(|error| Error::pin("mount a BPF file system at", target, error.into()))?;
    // By the kernel's default all users could make folders in it.
    let options = c"mode=0700";
    // SAFETY: every string ends with a zero and outlives the call.
    let result = unsafe {
        libc::mount(c"bpf".as_ptr(), path.as_ptr(), c"bpf".as_ptr(), 0, options.as_ptr().cast())
    };
    if result == 0 {
        tracing::info!(path = %target.display(), "mounted a BPF file system");
        return Ok(());
    }
    Err(Error::Pin {
        action: "mount a BPF file system at",
        path: target.to_owned(),
        cause: io::Error::last_os_error(),
        hint: "; mount it yourself (`mount -t bpf bpf /sys/fs/bpf`; in a pod: a hostPath volume), or give another --pin-path",
    })
}

/// Returns the folder of the previous layout's maps next to a folder of this layout's, if they are
/// in use.
pub(super) fn previous_beside(folder: &Path) -> Option<PathBuf> {
    let root = folder.parent()?.parent()?;
    Pins::new(root).previous_maps()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn differing(names: &[&str]) -> BTreeMap<String, String> {
        names.iter().map(|name| ((*name).to_owned(), String::new())).collect()
    }

    #[test]
    fn maps_of_the_plan_are_replaced_together() {
        let differing = differing(&["slots"]);
        assert!(!is_kept("ports", &differing));
        assert!(!is_kept("names", &differing));
        assert!(is_kept("flows_v4", &differing));
    }

    #[test]
    fn a_layout_changes_only_what_can_be_moved() {
        // To move a map of the plan one would have to read the image in the previous layout, since
        // sources may be unreachable for long.
        assert!(previous::CHANGED.iter().all(|map| previous::MOVED.contains(map)));
        assert!(previous::LAYOUT.is_none_or(|layout| layout < LAYOUT));
        assert!(map::NAMES.iter().all(|name| !previous::MOVED.contains(name)));
    }

    #[test]
    fn other_maps_are_replaced_alone() {
        let differing = differing(&["flows_v4"]);
        assert!(is_kept("ports", &differing));
        assert!(is_kept("flows_v6", &differing));
        assert!(!is_kept("flows_v4", &differing));
    }
}
