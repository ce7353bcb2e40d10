//! The state directory of a cluster.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{Cni, Overlay, Proxy};

/// There is one cluster per machine: its addresses, cgroup and directory are fixed.
const ROOT: &str = "/var/lib/sluice-cluster";

/// The options that a cluster was brought up with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) nodes: u8,
    pub(crate) cni: Cni,
    pub(crate) proxy: Proxy,
    #[serde(default)]
    pub(crate) overlay: Overlay,
    /// The boot in which it was made. Only files outlive it.
    pub(crate) boot: String,
    /// Whether `up` has completed once.
    pub(crate) is_complete: bool,
}

/// The directory, whether it exists or not.
#[derive(Clone)]
pub(crate) struct State {
    root: PathBuf,
}

impl State {
    pub(crate) fn open() -> Self {
        Self { root: PathBuf::from(ROOT) }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.path("kubeconfig")
    }

    /// Returns the directory with links to the programs of the cluster that a person may want to
    /// call.
    pub(crate) fn programs(&self) -> PathBuf {
        self.path("bin")
    }

    /// Returns the description of the cluster, if there is one.
    pub(crate) fn description(&self) -> Result<Option<Description>> {
        let path = self.path("cluster.json");
        match fs::read(&path) {
            // Without a valid description the cluster is not complete: `up` was killed in the
            // middle.
            Ok(content) => Ok(serde_json::from_slice(&content).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    pub(crate) fn describe(&self, description: &Description) -> Result<()> {
        self.write("cluster.json", &serde_json::to_string_pretty(description)?)
    }

    /// Writes a file of the directory, and makes the directories above it.
    pub(crate) fn write(&self, name: impl AsRef<Path>, content: &str) -> Result<()> {
        let path = self.path(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Returns an identifier of this boot of the machine.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}
