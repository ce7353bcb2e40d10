//! A real control plane and nodes with agents, for the tests that need an API server.
//!
//! ```text
//!     node n  --- router --- outside client `api` 198.18.1.10: etcd, kube-apiserver, kube-controller-manager
//!       |
//!     pods
//! ```
//!
//! The tests of a file share one lab with one control plane. Each has a Kubernetes namespace, a
//! range of virtual addresses and nodes of its own, so that none sees what another leaves.

pub(crate) mod control_plane;
pub(crate) mod line;
pub(crate) mod objects;
#[path = "../random/mod.rs"]
#[allow(dead_code, reason = "each tier uses its part of what chance makes")]
pub(crate) mod random;
pub(crate) mod view;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use sluice_lab::{AgentOptions, AgentProcess, Lab, Node, NodeOptions};

use control_plane::ControlPlane;

/// The time that an agent may take from its start until it is ready.
pub(crate) const START: Duration = Duration::from_secs(20);

/// A lab with a control plane in it.
pub(crate) struct Cluster {
    pub(crate) plane: ControlPlane,
    pub(crate) lab: Lab,
}

static SHARED: Mutex<Option<Arc<Cluster>>> = Mutex::new(None);

/// Returns the cluster that this file's tests share, or [`None`] if it cannot be built. Prints the
/// reason.
pub(crate) fn cluster() -> Option<Arc<Cluster>> {
    let Some(programs) = std::env::var_os("SLUICE_CONTROL_PLANE").map(PathBuf::from) else {
        eprintln!(
            "skipped: SLUICE_CONTROL_PLANE names no folder with a control plane; `cargo xtask test api` sets it"
        );
        return None;
    };
    if !sluice_lab::is_root() {
        eprintln!("skipped: network namespaces need root");
        return None;
    }
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if shared.is_none() {
        // Statics are not dropped when a process ends.
        // SAFETY: the function lives as long as the program.
        let refused = unsafe { libc::atexit(take_down) };
        assert_eq!(refused, 0, "the control plane could not be taken down at the end");
        let lab = Lab::new("api").expect("a lab");
        let plane = ControlPlane::start(&lab, programs).expect("a control plane");
        *shared = Some(Arc::new(Cluster { plane, lab }));
    }
    shared.clone()
}

extern "C" fn take_down() {
    drop(SHARED.lock().unwrap_or_else(PoisonError::into_inner).take());
}

impl Cluster {
    /// Returns a node of the lab and its object, without an agent.
    pub(crate) fn node(&self, name: &str) -> Node {
        self.plane.add_node(name).expect("a Node object");
        self.lab.node(name, &NodeOptions::default()).expect("a node")
    }

    /// Starts an agent that connects to the API server as `user`.
    pub(crate) fn start_agent(&self, node: &Node, user: &str, args: &[&str]) -> AgentProcess {
        let mut all: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        if !all.iter().any(|arg| arg.starts_with("--flows-max")) {
            all.push("--flows-max=1024".to_owned());
        }
        let options = AgentOptions {
            kubeconfig: Some(self.plane.kubeconfig(user)),
            args: all,
            ..AgentOptions::default()
        };
        node.agent(options).expect("an agent")
    }

    /// Starts an agent with the rights it needs, and waits until it is ready.
    pub(crate) fn agent(&self, node: &Node) -> AgentProcess {
        let mut agent = self.start_agent(node, control_plane::AGENT, &[]);
        agent.wait_ready(START).expect("the agent gets ready");
        agent
    }
}

/// Repeats a request until there is an answer, or fails with the last error.
#[track_caller]
pub(crate) fn wait_for<T>(
    what: &str,
    timeout: Duration,
    mut ask: impl FnMut() -> Result<T, String>,
) -> T {
    let deadline = Instant::now() + timeout;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(last) if Instant::now() > deadline => {
                panic!("waited {timeout:?} in vain for {what}: {last}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(25)),
        }
    }
}
