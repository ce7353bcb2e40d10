//! The cloud of a cluster: it gives Services of the type LoadBalancer addresses and routes
//! ([`load_balancers`]), and restarts the API server ([`api_server`]).
//!
//! It is one process on the bridge, which is the nodes' gateway.

mod api_server;
mod load_balancers;

use std::thread;

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::components;
use crate::kubectl::Kubectl;
use crate::launch;
use crate::network::{BRIDGE, CONTROL_PLANE};
use crate::process::Cmd;
use crate::state::State;

/// The name of its process.
pub(crate) const NAME: &str = "cloud";

/// Starts it, unless it runs.
pub(crate) fn ensure(state: &State) -> Result<()> {
    let program = std::env::current_exe().context("cannot tell which program this is")?;
    let command = Cmd::new(program).arg("cluster-cloud");
    let _is_new = launch::ensure(state, NAME, BRIDGE, CONTROL_PLANE, command)?;
    Ok(())
}

/// Runs the cloud for ever. Returns only if it cannot begin.
pub(crate) fn run() -> Result<()> {
    let state = State::open();
    let components = components::cluster(&Cache::open()?)?;
    let description = state.description()?.context("no cluster is described")?;
    let kubectl = Kubectl::new(&state);
    let _keeper = {
        let (state, kubectl) = (state.clone(), kubectl.clone());
        thread::spawn(move || api_server::keep(&state, &components, &kubectl))
    };
    load_balancers::serve(&state, &kubectl, description.nodes)
}
