//! A real Kubernetes on this machine, in network namespaces.
//!
//! etcd, API server, controller manager and scheduler run in one namespace; a node is a namespace
//! with a kubelet, a containerd and real pods in namespaces of their own (`network.rs` draws it).
//! A process does what a cloud would (`cloud.rs`). Nothing of it touches the namespace that it is
//! started from.
//!
//! Everything a cluster owns is below one directory (`state.rs`) and one cgroup (`cgroup.rs`), by
//! which [`down()`] finds it. Its programs are built from Go modules into a cache ([`components`],
//! [`cache`]). [`process`], [`packages`] and [`ui`] are what any command of `cargo xtask` starts
//! processes, installs packages and shows progress with.
//!
//! A cluster's processes are this program itself at first: `cluster-launch`, `cluster-cloud` and
//! `cluster-node` of [`Internal`].

mod addresses;
pub mod cache;
mod cgroup;
mod cloud;
pub mod components;
mod control_plane;
mod down;
mod go;
mod image;
mod images;
mod kubectl;
mod launch;
mod namespace;
mod network;
mod node;
mod node_config;
mod node_init;
pub mod oci;
pub mod packages;
mod pki;
pub mod process;
mod shell;
mod state;
mod status;
pub mod ui;
mod up;
pub mod version;
mod workloads;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fmt, fs};

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::namespace::Namespace;
use crate::state::{Description, State};

pub use crate::images::SLUICE as IMAGE;

/// The tree of sources that Sluice's binary, image and manifests come from.
pub struct Tree<'a> {
    /// The directory with `deploy/`.
    pub root: &'a Path,
    /// Builds the release binary and returns its file.
    pub build: &'a (dyn Fn() -> Result<PathBuf> + Sync),
    /// Writes the image of that binary.
    pub write_image: &'a WriteImage<'a>,
}

/// Writes the image of a binary under a full name into a directory and returns its archive, or
/// `None` if the binary is not static.
pub type WriteImage<'a> = dyn Fn(&Path, &str, &Path) -> Result<Option<PathBuf>> + Sync + 'a;

/// The commands by which a cluster starts its own processes.
#[derive(Subcommand)]
pub enum Internal {
    /// Become a process of a cluster.
    #[command(hide = true)]
    ClusterLaunch(launch::Options),
    /// Become the cloud of a cluster.
    #[command(hide = true)]
    ClusterCloud,
    /// Become the first process of a node.
    #[command(hide = true)]
    ClusterNode {
        /// The file that describes the node.
        spec: PathBuf,
    },
}

impl Internal {
    /// Becomes that process. Returns only if it cannot.
    ///
    /// # Errors
    /// If a step on the way fails.
    pub fn run(&self) -> Result<()> {
        match self {
            Self::ClusterLaunch(options) => launch::become_program(options),
            Self::ClusterCloud => cloud::run(),
            Self::ClusterNode { spec } => node_init::run(spec),
        }
    }
}

/// The commands of `cargo xtask cluster`.
#[derive(Subcommand)]
pub enum Command {
    /// Bring a cluster up, or restart the processes of it that have ended.
    Up(UpOptions),
    /// Remove it without a trace; works after a crash too.
    Down,
    /// Show its processes, nodes and pods; exit code 0 when everything runs.
    Status,
    /// Open a shell, or run a command, where kubectl works.
    Shell(ShellOptions),
}

/// Options of `cargo xtask cluster up`.
#[derive(Args)]
pub struct UpOptions {
    /// Number of nodes, of some 400 MiB of memory each.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=20))]
    pub nodes: u8,
    /// The proxy that serves the Services.
    #[arg(long, value_enum, default_value_t)]
    pub proxy: Proxy,
    /// The way pods are connected to their node.
    #[arg(long, value_enum, default_value_t)]
    pub cni: Cni,
    /// The folder of deploy/overlays that deploys Sluice. With beside-kube-proxy there is a
    /// kube-proxy too.
    #[arg(long, value_enum, default_value_t)]
    pub overlay: Overlay,
    /// A binary of Sluice to use instead of a release built from this tree.
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,
}

/// Options of `cargo xtask cluster shell`.
#[derive(Args)]
pub struct ShellOptions {
    /// On this node (n1, ...), instead of outside.
    #[arg(long)]
    node: Option<String>,
    /// A command, instead of a shell.
    #[arg(last = true)]
    command: Vec<OsString>,
}

/// The proxy that serves the Services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Proxy {
    /// Sluice, built from this tree and run from `deploy/`.
    #[default]
    Sluice,
    /// The real kube-proxy, with nftables.
    KubeProxy,
    /// None: no Service answers.
    None,
}

/// The folders of `deploy/overlays`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Overlay {
    /// One privileged container per node.
    #[default]
    Privileged,
    /// No privileged container.
    LeastCapabilities,
    /// Only for labelled Services, next to kube-proxy.
    BesideKubeProxy,
    /// With metrics on both loopbacks.
    DualStack,
}

impl Overlay {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::Privileged, Self::LeastCapabilities, Self::DualStack, Self::BesideKubeProxy];

    /// Returns the name of the folder.
    pub fn name(self) -> &'static str {
        match self {
            Self::Privileged => "privileged",
            Self::LeastCapabilities => "least-capabilities",
            Self::BesideKubeProxy => "beside-kube-proxy",
            Self::DualStack => "dual-stack",
        }
    }
}

/// The way pods are connected to their node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Cni {
    /// A routed veth pair per pod.
    #[default]
    Ptp,
    /// A bridge per node.
    Bridge,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sluice => "sluice",
            Self::KubeProxy => "kube-proxy",
            Self::None => "none",
        })
    }
}

impl fmt::Display for Cni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ptp => "ptp",
            Self::Bridge => "bridge",
        })
    }
}

/// Runs a command of `cargo xtask cluster`.
///
/// # Errors
/// If a step of it fails.
pub fn run(tree: &Tree<'_>, command: &Command) -> Result<ExitCode> {
    if !packages::is_root() {
        eprintln!(
            "a cluster is made of network namespaces, mounts and cgroups: run `sudo -E env PATH=\"$PATH\" cargo xtask cluster ...`"
        );
        return Ok(ExitCode::FAILURE);
    }
    match command {
        Command::Up(options) => up::run(tree, options)?,
        Command::Down => down::run()?,
        Command::Status => return status::run(),
        Command::Shell(options) => shell::run(options)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a whole cluster is up.
pub fn is_complete() -> Result<bool> {
    Ok(is_up(&State::open())?.is_some_and(|description| description.is_complete))
}

/// Brings a cluster up for tests, or repairs the one that is.
pub fn ensure_up(tree: &Tree<'_>, options: &UpOptions) -> Result<()> {
    up::run(tree, options)
}

/// Takes the cluster down.
pub fn down() -> Result<()> {
    down::run()
}

/// Runs a closure in the namespace of the outside client, where processes that it starts run too.
pub fn outside<T: Send>(act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    Namespace::named(&State::open(), network::OUTSIDE_CLIENT).enter(act)
}

/// Returns the path of the administrator's kubeconfig.
pub fn kubeconfig() -> PathBuf {
    State::open().kubeconfig()
}

/// Returns the path of a kubectl of the cluster's version.
pub fn kubectl() -> PathBuf {
    State::open().programs().join("kubectl")
}

/// Copies a file to where all nodes see it, until the cluster is removed, and returns its path
/// there.
pub fn give_nodes(file: &Path) -> Result<PathBuf> {
    let name = file.file_name().with_context(|| format!("{} is no file", file.display()))?;
    let copy = State::open().path(name);
    let _ = fs::copy(file, &copy)
        .with_context(|| format!("cannot copy {} to {}", file.display(), copy.display()))?;
    Ok(Path::new("/run").join(node::STATE).join(name))
}

/// Runs a program in all namespaces of a node (n1, ...) and returns what it prints.
pub fn on_node(name: &str, line: &[&str]) -> Result<String> {
    shell::answer(&State::open(), name, line)
}

/// Returns the cluster that was brought up since this boot, complete or not.
fn is_up(state: &State) -> Result<Option<Description>> {
    Ok(state.description()?.filter(|description| description.boot == state::boot_id()))
}
