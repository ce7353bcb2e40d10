//! Starts a node, imports its images and allows it to join.
//!
//! A node is a network namespace and a group with a process in them that has namespaces of its own
//! for mounts, processes, host name, IPC and cgroups. That process is the node's first
//! ([`crate::node_init`]): when it ends, everything on the node does.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::Cni;
use crate::addresses::NodeNumber;
use crate::cgroup::{self, Hierarchy};
use crate::components::Components;
use crate::launch::{self, Process};
use crate::process::Cmd;
use crate::state::State;

/// The description of a node for its first process.
#[derive(Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) number: u8,
    pub(crate) cni: Cni,
    pub(crate) hierarchies: Vec<Hierarchy>,
    /// Directories of this machine, with their names in the node's `/run`.
    pub(crate) directories: Vec<(PathBuf, String)>,
}

/// The names of these directories.
pub(crate) const STATE: &str = "cluster";
pub(crate) const PROGRAMS: &str = "cluster-node";
pub(crate) const CONTAINERD: &str = "cluster-containerd";
pub(crate) const CNI_PLUGINS: &str = "cluster-cni";

/// Returns the directory of a node below the state directory.
pub(crate) fn directory(number: NodeNumber) -> PathBuf {
    Path::new("nodes").join(number.name())
}

/// Returns the name of a node's first process.
pub(crate) fn init_name(number: NodeNumber) -> String {
    format!("{}-init", number.name())
}

/// Starts a node, unless it runs.
pub(crate) fn ensure(
    state: &State,
    components: &Components,
    cni_plugins: &Path,
    cni: Cni,
    number: NodeNumber,
) -> Result<()> {
    let name = number.name();
    if Process::recorded(state, &name).is_some_and(|process| process.lives()) {
        return Ok(());
    }
    // Removes the remains of a node that was killed.
    cgroup::destroy(Some(&name))?;
    cgroup::create(state, &name)?;
    let directories = [
        (state.root(), STATE),
        (components.node.as_path(), PROGRAMS),
        (components.containerd.as_path(), CONTAINERD),
        (cni_plugins, CNI_PLUGINS),
    ];
    let spec = Spec {
        number: number.0,
        cni,
        hierarchies: cgroup::hierarchies()?,
        directories: directories.map(|(path, name)| (path.to_owned(), name.to_owned())).into(),
    };
    let file = directory(number).join("spec.json");
    state.write(&file, &serde_json::to_string_pretty(&spec)?)?;
    let command = Cmd::new("unshare")
        .args(["--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup"])
        .args(["--kill-child=SIGKILL", "--propagation", "private"])
        .arg(std::env::current_exe().context("cannot tell which program this is")?)
        .arg("cluster-node")
        .arg(state.path(&file));
    let _is_new = launch::ensure(state, &name, &name, &name, command)?;
    Ok(())
}

/// Imports the images of an archive on a node, once for each `key`, which identifies the content.
pub(crate) fn import(
    state: &State,
    components: &Components,
    number: NodeNumber,
    archive: &Path,
    key: &str,
) -> Result<()> {
    let mark = directory(number).join("imported").join(key);
    if state.path(&mark).exists() {
        return Ok(());
    }
    let socket = wait_for_containerd(state, number)?;
    let _output = Cmd::new(components.containerd.join("ctr"))
        .arg("--address")
        .arg(&socket)
        .args(["--namespace", "k8s.io", "images", "import"])
        .arg(archive)
        .answer()
        .with_context(|| {
            let log = launch::log(state, &format!("{}-containerd", number.name()));
            format!("cannot bring the images to {}; {}", number.name(), launch::last_words(&log))
        })?;
    state.write(mark, "")
}

fn wait_for_containerd(state: &State, number: NodeNumber) -> Result<PathBuf> {
    let name = number.name();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let Some(process) = Process::recorded(state, &name).filter(Process::lives) else {
            bail!("the node {name} has ended; {}", launch::last_words(&launch::log(state, &name)));
        };
        let init = Process::recorded(state, &init_name(number)).filter(Process::lives);
        let socket = init.map(|init| {
            PathBuf::from(format!("/proc/{}/root/run/containerd/containerd.sock", init.pid))
        });
        if let Some(socket) = socket.filter(|socket| UnixStream::connect(socket).is_ok()) {
            return Ok(socket);
        }
        if Instant::now() > deadline {
            let log = launch::log(state, &format!("{name}-containerd"));
            bail!(
                "containerd on {name} (process {}) did not answer for 30 s; {}",
                process.pid,
                launch::last_words(&log)
            );
        }
        sleep(Duration::from_millis(50));
    }
}

/// Returns the file whose existence allows the kubelet of a node to start.
pub(crate) fn may_join(number: NodeNumber) -> PathBuf {
    directory(number).join("may-join")
}
