//! The node agent: wires sources, model, plan and dataplane, and tells how it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use sluice_common::abi::{Settings, phase};
use sluice_core::cluster::{Adopted, Cluster, Programmed};
use sluice_core::model::{self, Event, Model, SourceId};
use sluice_core::policy::{Accelerate, Policy, SocketPath};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::beside::Beside;
use super::keeper::{Inputs, Keeper, Kept, OwnDevice, route_vips};
use super::sync::Sync;
use crate::daemon::monitor::metrics::Metrics;
use crate::daemon::monitor::{self, Monitor, Progress};
use crate::daemon::source::{Pulse, kubernetes, manifests};
use crate::daemon::takeover::wish::{self, Wish};
use crate::daemon::takeover::{self, Takeover};
use crate::node::conntrack::limits::{self, Limits};
use crate::node::dataplane::{Layout, Pins, RouteMtus, Xdp, load};
use crate::node::devices::addresses::stray_problem;
use crate::node::devices::own::{OwnRoutes, Routable};
use crate::node::devices::pattern::Patterns;
use crate::node::devices::watch::{Watched, watch as watch_devices};
use crate::node::devices::{Rules, loopback};
use crate::node::fragments;
use crate::node::publish::{publish, publish_part};
use crate::node::status::{
    self, Invocation, PolicyStatus, SourceStatus, StateDir, Status, unix_seconds,
};
use crate::node::{host, ipsec, ports};

/// How long further changes are gathered before the plan hears of them.
const GATHER: Duration = Duration::from_millis(3);
/// The shortest time between two writings of the status.
const STATUS_PERIOD: Duration = Duration::from_secs(1);
/// How often the configuration is looked at.
const LOOK_PERIOD: Duration = Duration::from_secs(5);
/// How often policies of IPsec are looked for, where packets go around the stack.
const IPSEC_PERIOD: Duration = Duration::from_secs(1);
/// Events that wait between a source and the loop.
const EVENTS: usize = 16_384;

/// How the agent is to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The node's name, as in `nodeName` of endpoints.
    pub node: String,
    /// Where maps and links are pinned.
    pub pin_path: PathBuf,
    /// Where lock and status lie.
    pub state_dir: PathBuf,
    /// The cgroup of the socket path; the root of the cgroup2 mount if not given.
    pub cgroup: Option<PathBuf>,
    /// Roles of devices that a person has named.
    pub patterns: Patterns,
    /// What a person has decided about traffic.
    pub policy: Policy,
    /// Whose calls the socket path translates.
    pub socket_path: SocketPath,
    /// The command line that says all this.
    pub invocation: Invocation,
    /// How uplinks use XDP.
    pub xdp: Xdp,
    /// In which layout the maps are written.
    pub layout: Layout,
    /// A folder of manifests.
    pub manifests: Option<PathBuf>,
    /// The API server, if it is to be asked.
    pub kubernetes: Option<kubernetes::Settings>,
    /// Serve Services with this proxy name, instead of those without one.
    pub proxy_name: Option<String>,
    /// Capacities of maps that differ from the object's.
    pub sizes: BTreeMap<String, u32>,
    /// Where monitoring is answered.
    pub monitor: monitor::Settings,
    /// What the kernel's connection tracking is to be like.
    pub conntrack: Limits,
    /// Where the settings of the kernel are written: `/proc/sys`, or the node's at another place.
    pub proc_sys: PathBuf,
    /// How willing the kernel is to end this process when memory is short.
    pub oom_score_adj: Option<i32>,
    /// Whether to begin by taking over what netfilter serves.
    pub takeover: bool,
    /// When to start anew.
    pub reload: Reload,
}

/// What the options come from, and whether it has changed.
#[derive(Clone)]
pub struct Reload {
    /// Whether to look by itself, and not only on SIGHUP.
    pub follows: bool,
    /// Whether options made now would be others; an error if none could be made.
    pub is_changed: Arc<dyn Fn() -> anyhow::Result<bool> + Send + std::marker::Sync>,
}

impl fmt::Debug for Reload {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Reload").field("follows", &self.follows).finish_non_exhaustive()
    }
}

/// Why the agent has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Stopped,
    /// It is to start anew with other options.
    ToStartAnew,
    /// The node is released: what is pinned is to be removed, and an agent that starts anew waits
    /// to be told to take over.
    Released,
}

/// Runs the agent until it is told to stop; programs and maps stay.
///
/// # Errors
///
/// When another agent runs, or the kernel refuses maps or programs.
pub async fn run(options: Options) -> anyhow::Result<Ended> {
    let started = SystemTime::now();
    let state = StateDir::take(&options.state_dir)?;
    let pins = Pins::new(&options.pin_path);
    // Before anything of the node is changed.
    pins.check()?;
    let earlier =
        status::read(&options.state_dir).map(|status| status.policy.primary).unwrap_or_default();
    let status = Status {
        policy: PolicyStatus { primary: earlier.clone(), ..PolicyStatus::default() },
        node: options.node.clone(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started: unix_seconds(started),
        invocation: options.invocation.clone(),
        waiting_for: vec!["the programs to be loaded".to_owned()],
        ..Status::default()
    };
    if wish::read(&options.state_dir) == Some(Wish::Released) {
        return stay_released(&state, status, &options).await;
    }
    // Before anybody takes the last agent's word for this one's.
    let written = state.write(&status);
    if let Err(error) = &written {
        tracing::warn!("{error}");
    }
    let reserved_ports = ReservedPorts {
        sysctls: options.proc_sys.join(ports::SYSCTLS),
        record: status::reserved_ports(&options.state_dir),
    };
    let reserved = ports::reserve(&reserved_ports.sysctls, &reserved_ports.record)?;
    if let Some(ports) = reserved {
        tracing::info!(
            ports,
            "entered ports of masqueraded clients into net.ipv4.ip_local_reserved_ports"
        );
    }
    match loopback::prepare(&options.proc_sys, &status::loopback(&options.state_dir)) {
        Ok(changed) if changed.is_empty() => {}
        Ok(changed) => {
            tracing::info!(settings = changed.join(","), "turned on settings of the device lo");
        }
        Err(error) => tracing::warn!(
            "processes of this host get no answers from Services at the node's own addresses, where their calls are not \
             translated at the socket: {error}; do it yourself: sysctl -w net.ipv4.conf.lo.accept_local=1 \
             net.ipv4.conf.lo.route_localnet=1"
        ),
    }
    set_machine(&options);
    let loaded =
        tokio::task::block_in_place(|| load(&pins, &options.sizes, options.xdp, options.layout))?;
    let own = OwnRoutes::new().context("cannot use netlink")?;
    let told = if loaded.filled { loaded.kernel.maps().read_programmed()? } else { None };
    let settings = Settings {
        phase: takeover::beginning(
            told.map(|told| told.settings.phase),
            options.takeover,
            wish::read(&options.state_dir),
        ),
        host_netns: host::netns_cookie()
            .context("cannot ask for the network namespace's cookie (SO_NETNS_COOKIE, Linux 5.14)")?,
        socket_path: options.socket_path.number(),
        own_device: own.prepare(&options.proc_sys).await.unwrap_or_else(|error| {
            tracing::warn!(
                "without our own device, what is too big for the way to a backend is dropped: {error}"
            );
            0
        }),
        networks: ipsec::bit(options.policy.accelerate),
        ..Settings::default()
    };
    hold_fragments(settings.own_device, &pins.maps());
    let cluster = Cluster::new(&options.node, Adopted { told, node: earlier });
    let (told, _) = cluster.tell(&options.policy, settings);
    loaded.kernel.maps().write_programmed(&told)?;
    let cgroup = match options.socket_path {
        SocketPath::Off => None,
        SocketPath::All | SocketPath::Machine | SocketPath::Host => Some(match &options.cgroup {
            Some(cgroup) => cgroup.clone(),
            None => host::cgroup2_mount()
                .context("cannot find a cgroup2 mount; give --cgroup, or --socket-path off")?,
        }),
    };

    let mtus = RouteMtus::open(&pins.maps())?;
    let takeover = takeover::start(settings.phase, pins.maps(), options.state_dir.clone())?;
    let (events_sender, events) = mpsc::channel(EVENTS);
    let (sources, announcing) = start_sources(&options, &events_sender).await?;
    let model = Model::new(model::Settings {
        node: Some(options.node.as_str().into()),
        proxy_name: options.proxy_name.as_deref().map(Into::into),
        sources: sources.iter().map(|source| source.id).collect(),
        primary: options.policy.node_addresses.iter().copied().collect(),
        external_ips: options.policy.external_ips.clone(),
        leave: BTreeSet::new(),
    });
    let requests = options.kubernetes.as_ref().map(|settings| &settings.requests);
    let metrics = Arc::new(Metrics::new(requests));
    let mut sync = Sync::adopt(loaded.kernel, model, loaded.filled, Arc::clone(&metrics))?;
    let progress = Arc::new(Progress::default());
    let monitor = Monitor::new(
        Arc::clone(&progress),
        metrics,
        options.pin_path.clone(),
        options.state_dir.clone(),
        options.monitor.detail,
    );

    let (survey_sender, watched) = watch::channel(Watched::default());
    // Adopted VIPs keep their routes until the sources say otherwise.
    let routable =
        Routable { vips: sync.take_vips().unwrap_or_default(), networks: told.service_networks() };
    let (routable_sender, routable) = watch::channel(routable);
    let (filled_sender, filled) = watch::channel(loaded.filled);
    let (kept_sender, kept) = watch::channel(Kept::default());
    let (routing_sender, routing) = watch::channel(None);
    let rules = Rules {
        patterns: options.patterns,
        policy: options.policy,
        node: cluster.node_addresses(),
    };
    let (rules_sender, rules) = watch::channel(rules);
    let _devices = tokio::spawn(keep_watching(rules, survey_sender));
    let (own_device_sender, own_device) = watch::channel(settings.own_device);
    let own_device_kept = OwnDevice { index: own_device_sender, proc_sys: options.proc_sys };
    let _routes = tokio::spawn(route_vips(
        own,
        own_device_kept,
        mtus,
        routable,
        watched.clone(),
        routing_sender,
    ));
    let keeper = Keeper::new(loaded.hooks, options.socket_path.word(), cgroup);
    let inputs = Inputs { watched: watched.clone(), routing, filled };
    let _keeper = tokio::spawn(keeper.run(inputs, kept_sender));
    tracing::info!(node = status.node, pins = %options.pin_path.display(), adopted = loaded.filled, "started");
    let agent = Agent {
        state,
        status,
        sources,
        sync,
        cluster,
        settings,
        told: Some(told),
        own_device,
        maps: pins.maps(),
        watched,
        kept,
        events,
        routable: routable_sender,
        rules: rules_sender,
        filled: filled_sender,
        beside: Beside::start(monitor, options.monitor, progress, &options.node, announcing),
        takeover,
        reload: options.reload,
        reserved_ports,
        refused: None,
        unwritten: written.is_err(),
        strays: BTreeSet::new(),
    };
    // The sender stays here: a source that ends must not end the loop.
    let result = agent.run().await;
    drop(events_sender);
    result
}

/// Serves nothing until somebody wants the node to be taken over again.
async fn stay_released(
    state: &StateDir,
    mut status: Status,
    options: &Options,
) -> anyhow::Result<Ended> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    status.waiting_for = vec!["`sluice takeover`: the node is released".to_owned()];
    takeover::RELEASED.clone_into(&mut status.takeover.phase);
    tracing::info!("the node is released: nothing is attached until `sluice takeover` is called");
    loop {
        if let Err(error) = state.write(&status) {
            tracing::warn!("{error}");
        }
        tokio::select! {
            _ = terminate.recv() => return Ok(Ended::Stopped),
            _ = interrupt.recv() => return Ok(Ended::Stopped),
            () = tokio::time::sleep(STATUS_PERIOD) => {}
        }
        if wish::read(&options.state_dir) != Some(Wish::Released) {
            return Ok(Ended::ToStartAnew);
        }
    }
}

/// Sets what lies outside of the programs, as far as it was asked for. Nothing of it keeps the
/// agent from its work.
fn set_machine(options: &Options) {
    if let Err(error) = host::raise_descriptors() {
        tracing::warn!(
            "the bound of open files (RLIMIT_NOFILE) cannot be raised to its hard limit: {error}"
        );
    }
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32);
    for failure in options.conntrack.apply(&options.proc_sys.join(limits::SYSCTLS), cpus) {
        tracing::warn!("{failure}");
    }
    if let Some(score) = options.oom_score_adj
        && let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string())
    {
        tracing::warn!("/proc/self/oom_score_adj cannot be set to {score}: {error}");
    }
}

/// Watches devices, again and again if netlink fails.
async fn keep_watching(rules: watch::Receiver<Rules>, sender: watch::Sender<Watched>) {
    while !sender.is_closed() {
        if let Err(error) = watch_devices(rules.clone(), sender.clone()).await {
            tracing::warn!("cannot watch devices: {error}; trying again");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Keeps fragments that come too early, by our own device; where that is 0 there is none.
fn hold_fragments(own_device: u32, maps: &Path) {
    if own_device != 0
        && let Err(error) = fragments::start(own_device, maps)
    {
        tracing::warn!("fragments that come before their datagram's first one are lost: {error:#}");
    }
}

/// A source of objects that runs.
#[derive(Debug)]
struct Source {
    id: SourceId,
    /// Folder or address, for people.
    from: String,
    pulse: Pulse,
}

/// Starts the sources that were asked for. With the API server as one, Events can be written there.
async fn start_sources(
    options: &Options,
    events: &mpsc::Sender<Event>,
) -> anyhow::Result<(Vec<Source>, Option<kubernetes::Events>)> {
    let mut sources = Vec::new();
    let mut announcing = None;
    if let Some(folder) = &options.manifests {
        let pulse = Pulse::default();
        let _watching =
            tokio::spawn(manifests::watch(folder.clone(), events.clone(), pulse.clone()));
        sources.push(Source { id: SourceId::Manifests, from: folder.display().to_string(), pulse });
    }
    if let Some(settings) = &options.kubernetes {
        let pulse = Pulse::default();
        let client = kubernetes::connect(settings).await.context(
            "cannot reach the API server; give --kubeconfig, or --manifests to work from files alone",
        )?;
        announcing = Some(kubernetes::Events::new(client.clone(), &options.node));
        let _watching = tokio::spawn(kubernetes::watch(
            client,
            settings.clone(),
            events.clone(),
            pulse.clone(),
        ));
        let kubeconfig = settings.kubeconfig.as_ref().map(|path| path.display().to_string());
        let from = settings
            .api
            .clone()
            .or(kubeconfig)
            .unwrap_or_else(|| "(configured by the environment)".to_owned());
        sources.push(Source { id: SourceId::Kubernetes, from, pulse });
    }
    Ok((sources, announcing))
}

/// Where ports are kept from the node's own sockets.
#[derive(Debug)]
struct ReservedPorts {
    sysctls: PathBuf,
    record: PathBuf,
}

impl ReservedPorts {
    /// Keeps node ports from the node's own sockets, whose answers would meet clients' questions.
    fn follow(&self, node_ports: &BTreeSet<u16>) {
        match ports::follow_node_ports(&self.sysctls, &self.record, node_ports) {
            Ok((added, given_back)) => {
                if !added.is_empty() {
                    tracing::info!(
                        ports = added,
                        "entered node ports into net.ipv4.ip_local_reserved_ports"
                    );
                }
                if !given_back.is_empty() {
                    tracing::info!(
                        ports = given_back,
                        "took node ports out of net.ipv4.ip_local_reserved_ports"
                    );
                }
            }
            Err(error) => tracing::warn!("{error}"),
        }
    }
}

/// The running agent's parts.
#[derive(Debug)]
struct Agent {
    state: StateDir,
    status: Status,
    sources: Vec<Source>,
    sync: Sync,
    cluster: Cluster,
    /// What is told to the programs; only the phase, our own device and whether there is IPsec
    /// change.
    settings: Settings,
    /// What the programs were told last; [`None`]: it could not be written.
    told: Option<Programmed>,
    /// Our own device's ifindex, which changes when somebody removes the device.
    own_device: watch::Receiver<u32>,
    /// Where the maps are pinned.
    maps: PathBuf,
    watched: watch::Receiver<Watched>,
    kept: watch::Receiver<Kept>,
    events: mpsc::Receiver<Event>,
    routable: watch::Sender<Routable>,
    rules: watch::Sender<Rules>,
    filled: watch::Sender<bool>,
    beside: Beside,
    takeover: Takeover,
    reload: Reload,
    reserved_ports: ReservedPorts,
    /// Why changed options cannot be used.
    refused: Option<String>,
    /// Whether the last status could not be written.
    unwritten: bool,
    /// What was last told of the node's addresses.
    strays: BTreeSet<String>,
}

impl Agent {
    async fn run(mut self) -> anyhow::Result<Ended> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        let mut hangup = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;
        let mut look_due = tokio::time::interval(LOOK_PERIOD);
        look_due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut status_due = tokio::time::interval(STATUS_PERIOD);
        status_due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ipsec_due = tokio::time::interval(IPSEC_PERIOD);
        ipsec_due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let accelerate = self.rules.borrow().policy.accelerate;
        let mut dirty = true;
        let ended = loop {
            let retry = self.sync.retry_at();
            tokio::select! {
                _ = terminate.recv() => break Ended::Stopped,
                _ = interrupt.recv() => break Ended::Stopped,
                _ = hangup.recv() => {
                    if self.is_outdated() {
                        break Ended::ToStartAnew;
                    }
                    tracing::info!("SIGHUP: nothing has changed that could be taken over");
                }
                _ = ipsec_due.tick(), if accelerate == Accelerate::On => {
                    let bit = ipsec::bit(accelerate);
                    if self.settings.networks == bit {
                        continue;
                    }
                    self.settings.networks = bit;
                    self.follow_cluster();
                }
                _ = look_due.tick(), if self.reload.follows => {
                    if self.is_outdated() {
                        break Ended::ToStartAnew;
                    }
                }
                Some(event) = self.events.recv() => {
                    let mut concerns_cluster = self.hear(event);
                    tokio::time::sleep(GATHER).await;
                    while let Ok(event) = self.events.try_recv() {
                        concerns_cluster |= self.hear(event);
                    }
                    if concerns_cluster {
                        self.follow_cluster();
                    }
                }
                Ok(()) = self.watched.changed() => {
                    let survey = &self.watched.borrow_and_update().survey;
                    self.sync.set_node(&survey.addresses, &survey.leave);
                }
                Ok(()) = self.beside.changed() => {}
                Ok(()) = self.takeover.told.changed() => {
                    let told = self.takeover.told.borrow_and_update().clone();
                    self.settings.phase = told.phase;
                    self.follow_cluster();
                    if told.released {
                        break Ended::Released;
                    }
                }
                Ok(()) = self.own_device.changed() => {
                    self.settings.own_device = *self.own_device.borrow_and_update();
                    self.follow_cluster();
                    hold_fragments(self.settings.own_device, &self.maps);
                }
                Ok(()) = self.kept.changed() => { let _ = self.kept.borrow_and_update(); }
                () = tokio::time::sleep_until(retry.unwrap_or_else(tokio::time::Instant::now)), if retry.is_some() => {}
                _ = status_due.tick(), if dirty => {
                    if self.told.is_none() {
                        self.follow_cluster();
                    }
                    self.sync.log_reports();
                    self.beside.announce(&self.sync, &self.status.node);
                    self.tell();
                    dirty = self.told.is_none() || self.unwritten;
                    continue;
                }
            }
            dirty = true;
            tokio::task::block_in_place(|| self.sync.run());
            if self.sync.awaited().is_empty() && self.cluster.complete() {
                self.follow_cluster();
            }
            if let Some(vips) = self.sync.take_vips() {
                self.routable.send_modify(|routable| routable.vips = vips);
            }
            if let Some(node_ports) = self.sync.take_node_ports() {
                self.reserved_ports.follow(&node_ports);
            }
            self.beside.follow(
                &mut self.sync,
                &self.watched.borrow().survey,
                &self.rules.borrow().policy,
                self.cluster.is_leaving(),
            );
            let is_attached = self.is_attached();
            let _ = publish(&self.takeover.ready, is_attached);
            let _ = publish(&self.filled, self.sync.is_filled());
            if self.is_ready() != self.status.ready {
                self.tell();
            }
        };
        let why = match ended {
            Ended::Stopped => "the agent was stopped",
            Ended::ToStartAnew => "the agent to start with its new configuration",
            Ended::Released => "the node was released",
        };
        let stays = if ended == Ended::Released {
            "everything goes"
        } else {
            "programs and maps stay, packets flow on"
        };
        tracing::info!("stopping, {why}; {stays}");
        self.status.ready = false;
        self.status.takeover = self.takeover.told.borrow().status.clone();
        self.status.waiting_for = vec![why.to_owned()];
        self.write_status();
        Ok(ended)
    }

    /// Whether the agent should start anew: its options have changed, and can be used.
    fn is_outdated(&mut self) -> bool {
        let (changed, refused) = match tokio::task::block_in_place(|| (self.reload.is_changed)()) {
            Ok(changed) => (changed, None),
            Err(error) => (
                false,
                Some(format!("the configuration has changed and cannot be used: {error:#}")),
            ),
        };
        if let Some(refused) = &refused
            && self.refused.as_ref() != Some(refused)
        {
            tracing::warn!("{refused}; the agent goes on with the last one");
        }
        self.refused = refused;
        changed
    }

    /// Takes in an event; returns whether it concerned node or networks.
    fn hear(&mut self, event: Event) -> bool {
        let concerns_cluster = self.cluster.hear(&event);
        self.sync.hear(event);
        concerns_cluster
    }

    /// Acts on what the sources now say about node and networks.
    fn follow_cluster(&mut self) {
        let node = self.cluster.node_addresses();
        let policy = self.rules.borrow().policy.clone();
        let _ = publish_part(&self.rules, |rules| &mut rules.node, node);
        let (told, surplus) = self.cluster.tell(&policy, self.settings);
        if self.told == Some(told) {
            let _ = self.takeover.written.send_replace(told.settings.phase);
            return;
        }
        if !surplus.is_empty() {
            let networks: Vec<String> = surplus.iter().map(ToString::to_string).collect();
            tracing::warn!(
                networks = networks.join(","),
                "more networks than the programs can compare: left out"
            );
        }
        self.told = match self.sync.maps().write_programmed(&told) {
            Ok(()) => {
                let _ = self.takeover.written.send_replace(told.settings.phase);
                let networks = told.service_networks();
                let _ = publish_part(&self.routable, |all| &mut all.networks, networks);
                Some(told)
            }
            Err(error) => {
                tracing::warn!("the programs were not told of a change: {error}; trying again");
                None
            }
        };
    }

    /// Whether this node serves all that the sources ask of it. What was refused for room counts,
    /// so that a rollout stops at the first node that cannot hold the cluster; health checks go on
    /// to be answered (`Progress`), since all else is served.
    fn is_ready(&self) -> bool {
        self.is_attached()
            && self.settings.phase & phase::MASK == phase::SERVE
            && self.sync.refused_for_room() == 0
    }

    /// Whether the maps hold what the sources say, and the programs are where they belong.
    fn is_attached(&self) -> bool {
        self.sync.is_settled() && self.kept.borrow().complete && self.told.is_some()
    }

    /// What was decided; before the first survey, what the earlier agent found.
    fn policy_status(&self) -> PolicyStatus {
        let watched = self.watched.borrow();
        if *watched == Watched::default() {
            return self.status.policy.clone();
        }
        let survey = &watched.survey;
        let policy = &self.rules.borrow().policy;
        PolicyStatus {
            masquerade: policy.masquerade.word().to_owned(),
            detect_local: policy.detect_local.to_string(),
            nodeport_addresses: policy.node_ports.to_string(),
            serving: survey
                .addresses
                .iter()
                .filter(|(_, serves)| **serves)
                .map(|(address, _)| *address)
                .collect(),
            primary: survey.primary.iter().collect(),
            left_alone: survey.leave.iter().copied().collect(),
            accelerate: if policy.accelerate == Accelerate::On && self.settings.has_ipsec() {
                "on, but nothing goes around the stack while this node has policies of IPsec"
                    .to_owned()
            } else {
                policy.accelerate.word().to_owned()
            },
            strays: survey.strays.keys().copied().collect(),
        }
    }

    /// Writes the status.
    fn tell(&mut self) {
        let kept = self.kept.borrow().clone();
        let ready = self.is_ready();
        if ready && !self.status.ready {
            tracing::info!(devices = kept.devices.len(), "ready");
        }
        let awaited = self.sync.awaited();
        let policy = self.policy_status();
        let takeover = self.takeover.told.borrow().status.clone();
        let phase = self.settings.phase & phase::MASK;
        let refused = self.sync.refused_for_room();
        let strays = self.strays();
        let status = &mut self.status;
        status.policy = policy;
        status.ready = ready;
        status.waiting_for = awaited
            .iter()
            .map(|id| format!("the first full list of {}", source_name(*id)))
            .collect();
        if !kept.complete {
            let problems = kept.devices.iter().filter_map(|device| device.problem.clone());
            let all: Vec<String> =
                problems.chain(kept.sockets.problem.clone()).chain(kept.problem.clone()).collect();
            let waiting =
                if all.is_empty() { vec!["the programs to be attached".to_owned()] } else { all };
            status.waiting_for.extend(waiting);
        }
        if self.told.is_none() {
            status.waiting_for.push("the programs to be told the cluster's networks".to_owned());
        }
        if phase != phase::SERVE {
            status.waiting_for.push(format!("a takeover or release, which is {}", takeover.phase));
        }
        if refused > 0 {
            status.waiting_for.push(format!(
                "room in the maps: {refused} objects are not served in full (no_room in the list of problems says what of them)"
            ));
        }
        status.takeover = takeover;
        status.sources = self.sources.iter().map(Source::status).collect();
        status.counts = self.sync.counts();
        status.devices = kept.devices;
        status.socket_path = kept.sockets;
        status.reports = self.sync.reports();
        status.last_sync = self.sync.last();
        status.failing = self.sync.failing();
        status.problems = self
            .refused
            .iter()
            .chain(&status.takeover.problem)
            .cloned()
            .chain(strays)
            .chain(self.beside.problems())
            .collect();
        status.waiting_for.extend(status.failing.clone());
        self.write_status();
    }

    /// The node's addresses that no uplink has, for people; each is logged when it appears.
    fn strays(&mut self) -> Vec<String> {
        let found: BTreeSet<String> = self
            .watched
            .borrow()
            .survey
            .strays
            .iter()
            .map(|(address, device)| stray_problem(*address, device.as_ref()))
            .collect();
        for problem in found.difference(&self.strays) {
            tracing::warn!("{problem}");
        }
        for problem in self.strays.difference(&found) {
            tracing::info!("no longer: {problem}");
        }
        self.strays.clone_from(&found);
        found.into_iter().collect()
    }

    /// A status that cannot be written keeps nobody from anything else; it is told once.
    fn write_status(&mut self) {
        let result = self.state.write(&self.status);
        match &result {
            Err(error) if !self.unwritten => tracing::warn!("{error}"),
            Ok(()) if self.unwritten => tracing::info!("the status can be written again"),
            Ok(()) | Err(_) => {}
        }
        self.unwritten = result.is_err();
    }
}

impl Source {
    fn status(&self) -> SourceStatus {
        let health = self.pulse.health();
        SourceStatus {
            name: source_name(self.id).to_owned(),
            from: self.from.clone(),
            synced: health.synced,
            heard: health.heard.map(unix_seconds),
            problem: health.failure.map(|(why, _)| why),
        }
    }
}

/// A source's word.
fn source_name(id: SourceId) -> &'static str {
    match id {
        SourceId::Manifests => "manifests",
        SourceId::Kubernetes => "kubernetes",
    }
}
