//! The preparation of an agent's start: settings of the node, programs, maps and sources.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use sluice_common::abi::Settings;
use sluice_core::cluster::{Adopted, Cluster, Programmed};
use sluice_core::model::{Event, SourceId};
use sluice_core::policy::SocketPath;
use tokio::sync::mpsc;

use super::{Options, Source};
use crate::daemon::audit::Found;
use crate::daemon::source::{Pulse, kubernetes, manifests};
use crate::daemon::takeover::{self, request};
use crate::node::dataplane::{Loaded, Pins, load};
use crate::node::devices::loopback;
use crate::node::devices::own::OwnRoutes;
use crate::node::settings::{Recorder, Restored, dotted};
use crate::node::{fragments, host, ipsec, ports};

/// The settings of the node that the agent has changed.
#[derive(Debug)]
pub(super) struct NodeSettings {
    sysctls: PathBuf,
    recorder: Recorder,
    /// The node ports that were reserved last, if they are known.
    node_ports: Option<BTreeSet<u16>>,
}

impl NodeSettings {
    /// Changes the settings of the node and of this process that the agent needs. Only ports that
    /// cannot be reserved keep it from starting.
    pub(super) fn apply(options: &Options) -> anyhow::Result<Self> {
        let mut this = Self {
            sysctls: options.proc_sys.join(ports::SYSCTLS),
            recorder: Recorder::new(&options.proc_sys, &options.state_dir),
            node_ports: None,
        };
        if let Some(ports) = ports::reserve(&this.sysctls, &this.recorder)? {
            tracing::info!(
                ports,
                "added the ports of masqueraded clients to net.ipv4.ip_local_reserved_ports"
            );
        }
        this.set_loopback();
        if let Err(error) = host::raise_descriptors() {
            tracing::warn!(
                "cannot raise the limit of open files (RLIMIT_NOFILE) to its hard limit: {error}"
            );
        }
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32);
        for failure in options.conntrack.apply(&mut this.recorder, cpus) {
            tracing::warn!("{failure}");
        }
        if let Some(score) = options.oom_score_adj
            && let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string())
        {
            tracing::warn!("cannot set /proc/self/oom_score_adj to {score}: {error}");
        }
        Ok(this)
    }

    /// Turns on the settings of `lo` that answers to the node's own processes need.
    fn set_loopback(&mut self) {
        match loopback::prepare(&mut self.recorder) {
            Ok(changed) if changed.is_empty() => {}
            Ok(changed) => {
                tracing::info!(settings = changed.join(","), "turned on settings of the device lo");
            }
            Err(error) => tracing::warn!(
                "processes of this host get no answers from Services at the node's own addresses, \
                 unless their calls are translated at the socket: {error}; set it yourself: sysctl \
                 -w net.ipv4.conf.lo.accept_local=1 net.ipv4.conf.lo.route_localnet=1"
            ),
        }
    }

    /// Reserves exactly these node ports. A socket of the node with such a port would get answers
    /// that clients' requests belong to.
    pub(super) fn follow(&mut self, node_ports: BTreeSet<u16>) {
        match ports::follow_node_ports(&self.sysctls, &self.recorder, &node_ports) {
            Ok((added, given_back)) => {
                if !added.is_empty() {
                    tracing::info!(
                        ports = added,
                        "added node ports to net.ipv4.ip_local_reserved_ports"
                    );
                }
                if !given_back.is_empty() {
                    tracing::info!(
                        ports = given_back,
                        "removed node ports from net.ipv4.ip_local_reserved_ports"
                    );
                }
            }
            Err(error) => tracing::warn!("{error}"),
        }
        self.node_ports = Some(node_ports);
    }

    /// Sets again what somebody has changed. Returns what was found.
    pub(super) fn audit(&self) -> Vec<Found> {
        let restored = self.recorder.audit().into_iter();
        let mut found: Vec<Found> = restored
            .map(|Restored { name, found, result }| {
                Found::new(dotted(&name), format!("its value is {found:?}"), result)
            })
            .collect();
        found.extend(self.audit_ports());
        found
    }

    fn audit_ports(&self) -> Option<Found> {
        let place = "net.ipv4.ip_local_reserved_ports";
        // Before the Services are known, node ports of the last agent's time stay.
        let node_ports = self.node_ports.as_ref()?;
        let taken_out = match ports::taken_out(&self.sysctls, &self.recorder) {
            Ok(taken_out) => taken_out?,
            Err(error) => return Some(Found::new(place, "it cannot be compared", Err(error))),
        };
        let what = format!("ports {taken_out} were taken out");
        match ports::follow_node_ports(&self.sysctls, &self.recorder, node_ports) {
            // Those that nobody needs any more stay out.
            Ok((added, _)) if added.is_empty() => None,
            Ok(_) => Some(Found::new(place, what, Ok::<(), String>(()))),
            Err(error) => Some(Found::new(place, what, Err(error))),
        }
    }
}

/// The loaded programs and maps, with what has been written to them.
pub(super) struct Programs {
    pub(super) loaded: Loaded,
    pub(super) routes: OwnRoutes,
    pub(super) settings: Settings,
    pub(super) cluster: Cluster,
    pub(super) programmed: Programmed,
}

/// Loads the programs, adopts the maps, and programs the settings. `node` holds the primary
/// addresses that the last agent found.
pub(super) async fn load_programs(
    options: &Options,
    pins: &Pins,
    node: Vec<IpAddr>,
) -> anyhow::Result<Programs> {
    let loaded =
        tokio::task::block_in_place(|| load(pins, &options.sizes, options.xdp, options.layout))?;
    let routes = OwnRoutes::new().context("cannot use netlink")?;
    let earlier = if loaded.filled { loaded.kernel.maps().read_programmed()? } else { None };
    let settings = Settings {
        phase: takeover::initial_phase(
            earlier.map(|programmed| programmed.settings.phase),
            options.takeover,
            request::read(&options.state_dir),
        ),
        host_netns: host::netns_cookie()
            .context("cannot read the network namespace's cookie (SO_NETNS_COOKIE, Linux 5.14)")?,
        socket_path: options.socket_path.number(),
        own_device: routes.prepare(&options.proc_sys).await.unwrap_or_else(|error| {
            tracing::warn!(
                "packets that are too big for the path to a backend are dropped, since Sluice's \
                 own device cannot be made: {error}"
            );
            0
        }),
        networks: ipsec::bit(options.policy.accelerate),
        ..Settings::default()
    };
    hold_fragments(settings.own_device, &pins.maps());
    let cluster = Cluster::new(&options.node, Adopted { programmed: earlier, node });
    let (programmed, _) = cluster.programmed(&options.policy, settings);
    loaded.kernel.maps().write_programmed(&programmed)?;
    Ok(Programs { loaded, routes, settings, cluster, programmed })
}

/// Returns the cgroup of the socket path, or [`None`] if the socket path is off.
pub(super) fn cgroup(options: &Options) -> anyhow::Result<Option<PathBuf>> {
    match (options.socket_path, &options.cgroup) {
        (SocketPath::Off, _) => Ok(None),
        (SocketPath::All | SocketPath::Machine | SocketPath::Host, Some(cgroup)) => {
            ensure!(cgroup.is_dir(), "--cgroup {}: there is no such cgroup", cgroup.display());
            Ok(Some(cgroup.clone()))
        }
        (SocketPath::All | SocketPath::Machine | SocketPath::Host, None) => host::cgroup2_mount()
            .map(Some)
            .context("cannot find a cgroup2 mount; give --cgroup, or --socket-path off"),
    }
}

/// Starts to hold fragments that arrive before their datagram's first one. They are held by
/// Sluice's own device; its index is 0 where there is none.
pub(super) fn hold_fragments(own_device: u32, maps: &Path) {
    if own_device != 0
        && let Err(error) = fragments::start(own_device, maps)
    {
        tracing::warn!(
            "fragments that arrive before their datagram's first one are lost: {error:#}"
        );
    }
}

/// Prepares a client of the API server, if that is a source. The server need not be reachable.
pub(super) async fn connect(options: &Options) -> anyhow::Result<Option<kubernetes::Server>> {
    let Some(settings) = &options.kubernetes else { return Ok(None) };
    kubernetes::server(settings).await.map(Some).context(
        "cannot reach the API server; give --kubeconfig, or --manifests to work from files alone",
    )
}

/// Starts the sources. If the API server is one of them, Events can be written there.
pub(super) fn start_sources(
    options: &Options,
    server: Option<kubernetes::Server>,
    events: &mpsc::Sender<Event>,
) -> (Vec<Source>, Option<kubernetes::Events>) {
    let mut sources = Vec::new();
    let mut writer = None;
    if let Some(folder) = &options.manifests {
        let pulse = Pulse::default();
        let _watching =
            tokio::spawn(manifests::watch(folder.clone(), events.clone(), pulse.clone()));
        sources.push(Source { id: SourceId::Manifests, from: folder.display().to_string(), pulse });
    }
    if let (Some(settings), Some(server)) = (&options.kubernetes, server) {
        let pulse = Pulse::default();
        writer = Some(kubernetes::Events::new(server.client.clone(), &options.node));
        let from = server.address.clone();
        let _watching = tokio::spawn(kubernetes::watch(
            server,
            settings.clone(),
            events.clone(),
            pulse.clone(),
        ));
        sources.push(Source { id: SourceId::Kubernetes, from, pulse });
    }
    (sources, writer)
}
