//! The tasks that follow the node's devices: the watch of devices, the attacher, and the routes of
//! VIPs.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use sluice_core::policy::{Policy, SocketPath};
use tokio::sync::watch;

use crate::daemon::attacher::{Attacher, Attachments, Inputs};
use crate::daemon::audit::Drift;
use crate::daemon::routes::{OwnDevice, route_vips};
use crate::node::dataplane::{Hooks, RouteMtus};
use crate::node::devices::Rules;
use crate::node::devices::own::{OwnRoutes, Routable};
use crate::node::devices::pattern::Patterns;
use crate::node::devices::watch::{Watched, watch as watch_devices};

/// The values that the tasks begin with.
pub(super) struct Start {
    pub(super) patterns: Patterns,
    pub(super) policy: Policy,
    pub(super) node_addresses: Vec<IpAddr>,
    pub(super) routable: Routable,
    pub(super) routes: OwnRoutes,
    /// The ifindex of Sluice's own device.
    pub(super) own_device: u32,
    pub(super) mtus: RouteMtus,
    pub(super) hooks: Hooks,
    pub(super) socket_path: SocketPath,
    pub(super) cgroup: Option<PathBuf>,
    /// Whether the maps hold an image.
    pub(super) filled: bool,
    pub(super) proc_sys: PathBuf,
    pub(super) drift: Drift,
}

/// The loop's ends of the tasks' channels. The tasks end with them.
#[derive(Debug)]
pub(super) struct DeviceTasks {
    pub(super) rules: watch::Sender<Rules>,
    pub(super) routable: watch::Sender<Routable>,
    pub(super) filled: watch::Sender<bool>,
    pub(super) watched: watch::Receiver<Watched>,
    /// The ifindex of Sluice's own device, which changes when somebody removes the device.
    pub(super) own_device: watch::Receiver<u32>,
    pub(super) attachments: watch::Receiver<Attachments>,
}

impl DeviceTasks {
    /// Starts the tasks.
    pub(super) fn start(start: Start) -> Self {
        let (rules, rules_of_task) = watch::channel(Rules {
            patterns: start.patterns,
            policy: start.policy,
            node: start.node_addresses,
        });
        let (watched_of_task, watched) = watch::channel(Watched::default());
        let _devices = tokio::spawn(keep_watching(rules_of_task, watched_of_task));

        let (index, own_device) = watch::channel(start.own_device);
        let (routable, routable_of_task) = watch::channel(start.routable);
        let (routing_of_task, routing) = watch::channel(None);
        let _routes = tokio::spawn(route_vips(
            start.routes,
            OwnDevice { index, proc_sys: start.proc_sys },
            start.mtus,
            routable_of_task,
            watched.clone(),
            routing_of_task,
            start.drift.clone(),
        ));

        let (filled, filled_of_task) = watch::channel(start.filled);
        let (attachments_of_task, attachments) = watch::channel(Attachments::default());
        let attacher =
            Attacher::new(start.hooks, start.socket_path.word(), start.cgroup, start.drift);
        let inputs = Inputs { watched: watched.clone(), routing, filled: filled_of_task };
        let _attacher = tokio::spawn(attacher.run(inputs, attachments_of_task));
        Self { rules, routable, filled, watched, own_device, attachments }
    }

    /// Whether the programs are attached as a survey by the present rules says.
    pub(super) fn are_attached(&self) -> bool {
        let attachments = self.attachments.borrow();
        attachments.complete && attachments.rules == *self.rules.borrow()
    }
}

/// Watches devices, and starts over if netlink fails.
async fn keep_watching(rules: watch::Receiver<Rules>, sender: watch::Sender<Watched>) {
    while !sender.is_closed() {
        if let Err(error) = watch_devices(rules.clone(), sender.clone()).await {
            tracing::warn!("cannot watch devices: {error}; trying again");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}
