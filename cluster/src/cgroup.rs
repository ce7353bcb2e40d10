//! The cgroup of a cluster, `sluice-cluster`, in every hierarchy of the machine, with one group
//! below it for the control plane and one per node.
//!
//! Every process of a cluster is in a group below it, and is found by that, whoever started it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sluice_lab::cgroup;
use sluice_lab::mounts::{Mount, mounts};

use crate::state::State;

const NAME: &str = "sluice-cluster";

/// A cgroup file system: cgroup2 or a hierarchy of v1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hierarchy {
    pub(crate) root: PathBuf,
    pub(crate) is_v2: bool,
    /// The options to mount it again with: its controllers, or its name.
    pub(crate) options: String,
}

impl Hierarchy {
    fn of(mount: Mount) -> Option<Self> {
        let is_v2 = match mount.kind.as_str() {
            "cgroup" => false,
            "cgroup2" => true,
            _ => return None,
        };
        let about_this_mount = |option: &&str| {
            matches!(*option, "rw" | "ro" | "xattr" | "clone_children" | "cpuset_v2_mode")
                || option.starts_with("release_agent=")
        };
        let mut options: Vec<_> =
            mount.options.split(',').filter(|option| !about_this_mount(option)).collect();
        if options.first().is_some_and(|option| option.starts_with("name=")) {
            options.insert(0, "none");
        }
        let options = if is_v2 { String::new() } else { options.join(",") };
        Some(Self { root: mount.point, is_v2, options })
    }

    fn has(&self, controller: &str) -> bool {
        self.options.split(',').any(|own| own == controller)
    }

    fn ours(&self) -> PathBuf {
        self.root.join(NAME)
    }
}

/// Returns all hierarchies, each once.
pub(crate) fn hierarchies() -> Result<Vec<Hierarchy>> {
    let mut all: Vec<Hierarchy> = Vec::new();
    for hierarchy in mounts()?.into_iter().filter_map(Hierarchy::of) {
        // A container engine or a lab may have mounted one twice.
        if !all
            .iter()
            .any(|known| (known.is_v2, &known.options) == (hierarchy.is_v2, &hierarchy.options))
        {
            all.push(hierarchy);
        }
    }
    if !all.iter().any(|hierarchy| hierarchy.is_v2) {
        bail!(
            "no cgroup2 in /proc/self/mountinfo, which Sluice's socket programs need; try `mount -t cgroup2 none /sys/fs/cgroup/unified`"
        );
    }
    Ok(all)
}

/// Makes a group below the cluster's group in every hierarchy.
pub(crate) fn create(state: &State, group: &str) -> Result<()> {
    let all = hierarchies()?;
    for hierarchy in &all {
        let (ours, group) = (hierarchy.ours(), hierarchy.ours().join(group));
        cgroup::create(&group)?;
        if hierarchy.is_v2 && all.len() == 1 {
            let given = delegate(&hierarchy.root);
            if !given.is_empty() {
                state.write(GIVEN, &given.join(" "))?;
            }
            let _given = delegate(&ours);
        } else if hierarchy.has("cpuset") {
            // A group without CPUs accepts no process.
            for (parent, child) in [(&hierarchy.root, &ours), (&ours, &group)] {
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    let content = fs::read_to_string(parent.join(file))
                        .with_context(|| format!("cannot read {file} of {}", parent.display()))?;
                    fs::write(child.join(file), content.trim())
                        .with_context(|| format!("cannot write {file} of {}", child.display()))?;
                }
            }
        }
    }
    Ok(())
}

/// The file in the state directory that lists the controllers which the machine's root group
/// delegates only for the cluster's sake.
const GIVEN: &str = "controllers";

/// Delegates the controllers of a group of cgroup2 to the groups below it, and returns those that
/// it had not delegated before. The kubelet will complain about one that cannot be delegated.
pub(crate) fn delegate(group: &Path) -> Vec<String> {
    let words = |file: &str| -> Vec<String> {
        let text = fs::read_to_string(group.join(file)).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    };
    let had = words("cgroup.subtree_control");
    let give = |controller: &String| {
        !had.contains(controller)
            && fs::write(group.join("cgroup.subtree_control"), format!("+{controller}")).is_ok()
    };
    words("cgroup.controllers").into_iter().filter(give).collect()
}

/// Undoes the delegation that [`create`] made in the root group. The cluster's groups must be gone.
pub(crate) fn take_back(state: &State) -> Result<()> {
    let given = fs::read_to_string(state.path(GIVEN)).unwrap_or_default();
    for hierarchy in hierarchies()?.iter().filter(|hierarchy| hierarchy.is_v2) {
        for controller in given.split_whitespace() {
            // Others may need it by now.
            drop(fs::write(
                hierarchy.root.join("cgroup.subtree_control"),
                format!("-{controller}"),
            ));
        }
    }
    Ok(())
}

/// Moves this process into a group made by [`create`].
pub(crate) fn join(group: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let procs = hierarchy.ours().join(group).join("cgroup.procs");
        fs::write(&procs, "0").with_context(|| format!("cannot write {}", procs.display()))?;
    }
    Ok(())
}

/// Kills every process of a group, or of the whole cluster for `None`, and removes the group from
/// every hierarchy.
pub(crate) fn destroy(group: Option<&str>) -> Result<()> {
    let groups: Vec<PathBuf> = hierarchies()?
        .iter()
        .map(|hierarchy| {
            group.map_or_else(|| hierarchy.ours(), |group| hierarchy.ours().join(group))
        })
        .collect();
    cgroup::destroy(&groups, Duration::from_secs(20))
}

/// Whether the cluster has a group anywhere.
pub(crate) fn is_there() -> Result<bool> {
    Ok(hierarchies()?.iter().any(|hierarchy| hierarchy.ours().exists()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hierarchy(kind: &str, options: &str) -> Option<Hierarchy> {
        Hierarchy::of(Mount { point: "/c".into(), kind: kind.into(), options: options.into() })
    }

    #[test]
    fn a_hierarchy_is_mounted_again_by_its_controllers_or_its_name() {
        let options = |kind, given| hierarchy(kind, given).map(|hierarchy| hierarchy.options);
        assert_eq!(options("cgroup", "rw,cpu,cpuacct").as_deref(), Some("cpu,cpuacct"));
        assert_eq!(
            options("cgroup", "rw,xattr,name=systemd").as_deref(),
            Some("none,name=systemd")
        );
        assert_eq!(options("cgroup2", "rw,nsdelegate").as_deref(), Some(""));
        assert_eq!(hierarchy("tmpfs", "rw"), None);
    }
}
