//! `sluice cleanup`: leaves the node as if there had never been an agent.

use std::path::Path;

use anyhow::{Context, bail};

use super::{Outcome, Places, runtime};
use crate::node::conntrack::limits;
use crate::node::dataplane::{Pins, cleanup};
use crate::node::devices::own::OwnRoutes;
use crate::node::devices::{OWN, loopback};
use crate::node::kube_proxy::rules::{self, HOLDING};
use crate::node::settings::{Recorder, dotted};
use crate::node::status::{self, StateDir};
use crate::node::{ports, view};

/// Removes everything, and prints what was removed. No agent can start in the meantime.
///
/// # Errors
///
/// Fails if an agent is alive and `force` is not given, or the kernel refuses.
pub(super) fn run(places: &Places, force: bool) -> anyhow::Result<Outcome> {
    let Places { pin_path, state_dir, proc_sys } = places;
    if status::is_alive(state_dir) && !force {
        let pid = status::read(state_dir)
            .map_or_else(|| "unknown".to_owned(), |status| status.pid.to_string());
        bail!(
            "an agent (pid {pid}) is running with {}: stop it first, or give --force (the agent \
             then keeps running without effect)",
            pin_path.display()
        );
    }
    // Where nothing is pinned, or by another version, nothing says whose namespace it was.
    if !force && let Ok(kernel) = view::open(pin_path) {
        view::check_namespace(&kernel)?;
    }
    let lock = (!force).then(|| StateDir::take(state_dir)).transpose();
    let lock = lock.context("cleanup needs the agent's lock, so that none starts meanwhile")?;
    if force {
        status::revoke(state_dir)
            .with_context(|| format!("cannot remove the lock in {}", state_dir.display()))?;
    }
    let mut done = runtime()?.block_on(remove(pin_path, state_dir, proc_sys))?;
    // Not where a node is released: kube-proxy has found its settings as it wants them.
    let restored = limits::restore(&Recorder::new(proc_sys, state_dir))
        .context("cannot restore the settings of connection tracking")?;
    if !restored.is_empty() {
        let names: Vec<String> = restored.iter().map(|name| dotted(name)).collect();
        done.push(format!("restored {}", names.join(", ")));
    }
    status::remove(state_dir).with_context(|| format!("cannot remove {}", state_dir.display()))?;
    drop(lock);
    if done.is_empty() {
        done.push(format!("found nothing of Sluice under {} or on any device", pin_path.display()));
    }
    Ok((done.join("\n") + "\n").into())
}

/// Removes everything in the kernel. Returns what was done, as lines for people.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub(super) async fn remove(
    pin_path: &Path,
    state_dir: &Path,
    proc_sys: &Path,
) -> anyhow::Result<Vec<String>> {
    let mut done = cleanup(&Pins::new(pin_path))?;
    let own = OwnRoutes::new().context("cannot use netlink")?;
    if own.remove().await.with_context(|| format!("cannot remove the device {OWN}"))? {
        done.push(format!("removed the device {OWN} and its routes"));
    }
    let recorder = Recorder::new(proc_sys, state_dir);
    let released = ports::release(&proc_sys.join(ports::SYSCTLS), &recorder)?;
    done.extend(
        released
            .map(|ports| format!("removed ports {ports} from net.ipv4.ip_local_reserved_ports")),
    );
    let turned_off = loopback::release(&recorder)?;
    if !turned_off.is_empty() {
        done.push(format!("turned off {} of the device lo", turned_off.join(" and ")));
    }
    if rules::let_go().context("cannot remove the nftables table of a takeover")? {
        done.push(format!("removed the nftables table {HOLDING}"));
    }
    Ok(done)
}
