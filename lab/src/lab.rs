//! The lab itself, which makes its parts and removes them.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::leftovers::{self, KEEP, sweep};
use crate::node::{Node, NodeOptions, Overlay};
use crate::router::{Client, Router};
use crate::shared::Shared;
use crate::{cgroup, xdp};

/// Nodes, pods, a router and clients that live until this is dropped.
///
/// The handles it returns ([`Node`], [`Pod`](crate::Pod), ...) may outlive it, but what they refer
/// to does not.
pub struct Lab {
    shared: Arc<Shared>,
    router: Router,
    overlay: Overlay,
    nodes: Mutex<Vec<Node>>,
    clients: AtomicU32,
}

/// Reports whether this process may build labs.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

impl Lab {
    /// Makes a lab with only a router, without an overlay. Removes the labs of dead owners first.
    ///
    /// # Errors
    /// If this is not root, if there is no cgroup v2, or if the kernel refuses a step.
    pub fn new(name: &str) -> Result<Self> {
        Self::with_overlay(name, Overlay::None)
    }

    /// Like [`Lab::new`], with an overlay.
    pub fn with_overlay(name: &str, overlay: Overlay) -> Result<Self> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        ensure!(
            is_root(),
            "cannot build the lab {name}: network namespaces need root; run it with sudo"
        );
        if let Err(error) = sweep() {
            eprintln!("lab: {error:#}; going on");
        }
        // An earlier process with this pid may have left files of its agents behind.
        let owner = std::process::id();
        let began = leftovers::start_time(owner).unwrap_or_default();
        let (id, state) = loop {
            let id = format!("slab{owner}-{began}-{}", LABS.fetch_add(1, Ordering::Relaxed));
            let state = leftovers::state_of(&id);
            if !state.exists() {
                break (id, state);
            }
        };
        fs::create_dir_all(state.join("ns"))
            .with_context(|| format!("cannot make {}", state.display()))?;
        leftovers::register(&id);
        let cgroup = cgroup::root()?.join(&id);
        let shared = Arc::new(Shared::new(id, state, cgroup));
        let built = Self::build(name, overlay, &shared);
        if built.is_err() {
            leftovers::tear_down(&shared.id)?;
            leftovers::unregister(&shared.id);
        }
        built
    }

    fn build(name: &str, overlay: Overlay, shared: &Arc<Shared>) -> Result<Self> {
        let state = &shared.state;
        for dir in ["log", "bpf"] {
            fs::create_dir_all(state.join(dir))
                .with_context(|| format!("cannot make {}/{dir}", state.display()))?;
        }
        fs::write(
            state.join("owner"),
            leftovers::start_time(std::process::id()).unwrap_or_default(),
        )?;
        fs::write(state.join("name"), name)?;
        cgroup::create(&shared.cgroup)?;
        xdp::mount_bpffs(&state.join("bpf"))?;
        let lab = Self {
            router: Router::create(shared)?,
            shared: Arc::clone(shared),
            overlay,
            nodes: Mutex::new(Vec::new()),
            clients: AtomicU32::new(0),
        };
        if std::env::var_os("SLUICE_LAB_KEEP").is_some_and(|value| value != "0") {
            lab.keep()?;
        }
        Ok(lab)
    }

    /// Returns the lab's id, `slab<pid>-<start>-<n>`: the name of its directory below
    /// `/run/sluice-lab` and of its cgroup.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// Returns the lab's directory: `ns/<name>` are its namespaces (for `nsenter --net=...`),
    /// `log/` has the output of its processes.
    pub fn state(&self) -> &Path {
        &self.shared.state
    }

    /// Returns the router that connects nodes and clients.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// Adds a node, connected to the router and, by the lab's [`Overlay`], to the other nodes.
    ///
    /// # Errors
    /// If the name is taken or longer than 11 characters, if the kernel refuses a step, or with
    /// [`Unsupported`](crate::Unsupported) if it lacks a feature that the options ask for.
    pub fn node(&self, name: &str, options: &NodeOptions) -> Result<Node> {
        let mut nodes = self.lock_nodes();
        let index = u8::try_from(nodes.len() + 1).ok().filter(|index| *index < 200);
        let Some(index) = index else {
            bail!("cannot add the node {name}: a lab has addresses for 199 nodes")
        };
        let node = Node::create(&self.shared, &self.router, name, index, self.overlay, options)
            .with_context(|| {
                format!("cannot build the node {name} of the lab {}", self.shared.id)
            })?;
        nodes.push(node.clone());
        Node::join(&nodes, self.overlay).with_context(|| {
            format!("cannot connect the node {name} to the others ({:?})", self.overlay)
        })?;
        drop(nodes);
        Ok(node)
    }

    /// Adds a client outside the cluster, behind the router and in a subnet of its own.
    ///
    /// # Errors
    /// If the name is taken or longer than 11 characters, or if the kernel refuses a step.
    pub fn client(&self, name: &str) -> Result<Client> {
        let index = self.clients.fetch_add(1, Ordering::Relaxed) + 1;
        let index = u8::try_from(index).with_context(|| {
            format!("cannot add the client {name}: a lab has addresses for 255")
        })?;
        Client::create(&self.shared, &self.router, name, index).with_context(|| {
            format!("cannot build the client {name} of the lab {}", self.shared.id)
        })
    }

    /// Keeps the lab and its processes when this is dropped, until
    /// [`remove_kept`](crate::remove_kept).
    pub fn keep(&self) -> Result<()> {
        fs::write(self.shared.state.join(KEEP), "").context("cannot mark the lab as kept")?;
        leftovers::unregister(&self.shared.id);
        Ok(())
    }

    fn lock_nodes(&self) -> MutexGuard<'_, Vec<Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.shared.kept() {
            let state = self.shared.state.display();
            eprintln!(
                "lab: {} stays up; enter a namespace with `nsenter --net={state}/ns/<name>`, remove it with `sluice-lab-demo --down`",
                self.shared.id
            );
            return;
        }
        if let Err(error) = leftovers::tear_down(&self.shared.id) {
            eprintln!("lab: {error:#}; the next lab will try again");
        }
        leftovers::unregister(&self.shared.id);
    }
}
