//! The node agent: wires sources, model, plan and dataplane, and reports its state.
//!
//! [`run`] prepares the node and starts the tasks around the loop. `Agent::run` is the loop:
//! it waits for one of its inputs, handles it in a method of its own, and then brings everything
//! that depends on it up to date.

mod devices;
mod options;
mod prepare;
mod report;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use sluice_common::abi::{Settings, phase};
use sluice_core::cluster::{Cluster, Programmed};
use sluice_core::model::{self, Event, Model, SourceId};
use sluice_core::policy::Accelerate;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::audit::{self, Drift, Found, Part};
use super::side_tasks::SideTasks;
use super::sync::MapSync;
use crate::daemon::monitor::metrics::Metrics;
use crate::daemon::monitor::{Liveness, Monitor};
use crate::daemon::source::Pulse;
use crate::daemon::source::kubernetes::Server;
use crate::daemon::takeover::request::{self, Request};
use crate::daemon::takeover::{self, Takeover};
use crate::node::dataplane::{Pins, RouteMtus};
use crate::node::devices::own::Routable;
use crate::node::devices::watch::Watched;
use crate::node::difference::{self, State};
use crate::node::ipsec;
use crate::node::publish::{publish, publish_part};
use crate::node::status::{self, PolicyStatus, StateDir, Status, unix_seconds};
use devices::DeviceTasks;
pub use options::{Options, Reload};
use prepare::{NodeSettings, Programs, hold_fragments};

/// The time for which further events are gathered before they are planned together.
const GATHER: Duration = Duration::from_millis(3);
/// The shortest time between two writes of the status.
const STATUS_PERIOD: Duration = Duration::from_secs(1);
/// The interval at which the agent checks whether its configuration has changed.
const RELOAD_PERIOD: Duration = Duration::from_secs(5);
/// The interval at which the agent looks for IPsec policies, if packets may go around the stack.
const IPSEC_PERIOD: Duration = Duration::from_secs(1);
/// The interval at which the next of the maps is compared with what it should hold: 15 of them
/// within 27 s. With 250 000 endpoints they take 72 ms of a core, 0.27 % of it.
const AUDIT_PERIOD: Duration = Duration::from_millis(1_800);
/// The settings of the node are compared at each of so many ticks of the audit.
const SETTINGS_AUDIT: u32 = 5;
/// The number of events that may wait between the sources and the loop.
const EVENTS: usize = 16_384;

/// The reason why the agent has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It received SIGTERM or SIGINT.
    Stopped,
    /// It has to restart with other options.
    ToStartAnew,
    /// The node is released: the caller removes what is pinned, and an agent that restarts waits
    /// for a request to take over.
    Released,
}

/// Runs the agent until it is stopped. Programs and maps stay.
///
/// # Errors
///
/// Fails if another agent runs, or the kernel refuses maps or programs.
pub async fn run(options: Options) -> anyhow::Result<Ended> {
    let state = StateDir::take(&options.state_dir)?;
    let pins = Pins::new(&options.pin_path);
    // Fails before anything on the node has been changed.
    pins.check()?;
    let earlier =
        status::read(&options.state_dir).map(|status| status.policy.primary).unwrap_or_default();
    let status = initial_status(&options, earlier.clone());
    if request::read(&options.state_dir) == Some(Request::Released) {
        return stay_released(&state, status, &options).await;
    }
    // Replaces the last agent's status before anybody takes it for this one's.
    let written = state.write(&status);
    if let Err(error) = &written {
        tracing::warn!("{error}");
    }
    // What can fail without the kernel comes first: a start that fails there leaves no maps.
    let server = prepare::connect(&options).await?;
    let cgroup = prepare::cgroup(&options)?;
    let node_settings = NodeSettings::apply(&options)?;
    let programs = prepare::load_programs(&options, &pins, earlier).await?;
    let is_unwritten = written.is_err();
    let early = Early { state, status, is_unwritten, server, cgroup, node_settings };
    // Kept here, because the loop must go on when a source ends.
    let (events_sender, events) = mpsc::channel(EVENTS);
    let agent = start(options, &pins, early, programs, (&events_sender, events))?;
    let result = agent.run().await;
    drop(events_sender);
    result
}

/// Returns the status of an agent that has just started.
fn initial_status(options: &Options, primary: Vec<std::net::IpAddr>) -> Status {
    Status {
        policy: PolicyStatus { primary, ..PolicyStatus::default() },
        node: options.node.clone(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started: unix_seconds(SystemTime::now()),
        invocation: options.invocation.clone(),
        waiting_for: vec!["the programs to be loaded".to_owned()],
        ..Status::default()
    }
}

/// Serves nothing until the node is to be taken over again.
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
        if request::read(&options.state_dir) != Some(Request::Released) {
            return Ok(Ended::ToStartAnew);
        }
    }
}

/// The state of the agent before its programs are loaded.
struct Early {
    state: StateDir,
    status: Status,
    is_unwritten: bool,
    server: Option<Server>,
    cgroup: Option<PathBuf>,
    node_settings: NodeSettings,
}

/// Starts all tasks around the loop.
fn start(
    options: Options,
    pins: &Pins,
    early: Early,
    programs: Programs,
    (events_sender, events): (&mpsc::Sender<Event>, mpsc::Receiver<Event>),
) -> anyhow::Result<Agent> {
    let Programs { loaded, routes, settings, cluster, programmed } = programs;
    let mtus = RouteMtus::open(&pins.maps())?;
    let takeover = takeover::start(settings.phase, pins.maps(), options.state_dir.clone())?;
    let (sources, event_writer) = prepare::start_sources(&options, early.server, events_sender);
    let requests = options.kubernetes.as_ref().map(|settings| &settings.requests);
    let pulses = sources.iter().map(|source| source.pulse.clone()).collect();
    let (metrics, liveness) = (Arc::new(Metrics::new(requests)), Arc::new(Liveness::new(pulses)));
    let model = model(&options, &sources);
    let mut sync = MapSync::adopt(loaded.kernel, model, loaded.filled, Arc::clone(&metrics))?;
    // Adopted VIPs keep their routes until the sources say otherwise.
    let vips = sync.take_vips().unwrap_or_default();
    let drift = Drift::new(early.state.claim()?, metrics.drift());
    let devices = DeviceTasks::start(devices::Start {
        drift: drift.clone(),
        patterns: options.patterns,
        policy: options.policy,
        node_addresses: cluster.node_addresses(),
        routable: Routable { vips, networks: programmed.service_networks() },
        routes,
        own_device: settings.own_device,
        mtus,
        hooks: loaded.hooks,
        socket_path: options.socket_path,
        cgroup: early.cgroup,
        filled: loaded.filled,
        proc_sys: options.proc_sys,
    });
    let monitor = Monitor::new(
        Arc::clone(&liveness),
        metrics,
        options.pin_path,
        options.state_dir,
        options.monitor.detail,
    );
    tracing::info!(
        node = options.node,
        pins = %pins.root().display(),
        adopted = loaded.filled,
        "started"
    );
    let node = &options.node;
    Ok(Agent {
        side_tasks: SideTasks::start(
            monitor,
            options.monitor,
            liveness,
            node,
            event_writer,
            pins.maps(),
        ),
        maps: pins.maps(),
        programmed: Some(programmed),
        reload: options.reload,
        refused: None,
        is_status_due: true,
        logged_strays: BTreeSet::new(),
        drifted: drift.subscribe(),
        drift,
        audits: 0,
        state: early.state,
        status: early.status,
        is_status_unwritten: early.is_unwritten,
        node_settings: early.node_settings,
        sources,
        sync,
        cluster,
        settings,
        devices,
        events,
        takeover,
    })
}

/// Returns the model of what these sources say.
fn model(options: &Options, sources: &[Source]) -> Model {
    Model::new(model::Settings {
        node: Some(options.node.as_str().into()),
        proxy_name: options.proxy_name.as_deref().map(Into::into),
        sources: sources.iter().map(|source| source.id).collect(),
        primary: options.policy.node_addresses.iter().copied().collect(),
        external_ips: options.policy.external_ips.clone(),
        leave: BTreeSet::new(),
    })
}

/// A running source of objects.
#[derive(Debug)]
struct Source {
    id: SourceId,
    /// The directory or address, for people.
    from: String,
    pulse: Pulse,
}

/// The signals that the agent handles.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot handle SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot handle SIGINT")?,
            hangup: signal(SignalKind::hangup()).context("cannot handle SIGHUP")?,
        })
    }
}

/// Returns a timer that does not catch up on ticks that it has missed.
fn every(period: Duration) -> Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// The action of the loop after it has handled an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Bring the maps and the tasks up to date.
    Update,
    /// Wait for the next input: nothing has changed.
    Wait,
    /// End.
    End(Ended),
}

/// The loop's state, and its ends of the channels.
#[derive(Debug)]
struct Agent {
    state: StateDir,
    status: Status,
    /// Whether the last status could not be written.
    is_status_unwritten: bool,
    node_settings: NodeSettings,
    sources: Vec<Source>,
    sync: MapSync,
    cluster: Cluster,
    /// The settings that are programmed. Only the phase, the index of Sluice's own device and
    /// whether there is IPsec change.
    settings: Settings,
    /// The settings and networks in the maps, or [`None`] if the last write failed.
    programmed: Option<Programmed>,
    /// The directory where the maps are pinned.
    maps: PathBuf,
    devices: DeviceTasks,
    events: mpsc::Receiver<Event>,
    side_tasks: SideTasks,
    takeover: Takeover,
    drift: Drift,
    /// The number of ticks of the audit.
    audits: u32,
    /// Wakes the loop when the audit has found something.
    drifted: watch::Receiver<()>,
    reload: Reload,
    /// The reason why changed options cannot be used.
    refused: Option<String>,
    /// Whether the status is to be written at the next tick.
    is_status_due: bool,
    /// The problems of the node's addresses that have been logged.
    logged_strays: BTreeSet<String>,
}

impl Agent {
    async fn run(mut self) -> anyhow::Result<Ended> {
        let mut signals = Signals::new()?;
        let (mut reload_tick, mut status_tick) = (every(RELOAD_PERIOD), every(STATUS_PERIOD));
        let (mut ipsec_tick, mut audit_tick) = (every(IPSEC_PERIOD), every(AUDIT_PERIOD));
        let accelerate = self.devices.rules.borrow().policy.accelerate;
        loop {
            let retry = self.sync.retry_at();
            let retry_at = retry.unwrap_or_else(Instant::now);
            let next = tokio::select! {
                _ = signals.terminate.recv() => Next::End(Ended::Stopped),
                _ = signals.interrupt.recv() => Next::End(Ended::Stopped),
                _ = signals.hangup.recv() => self.on_hangup(),
                _ = ipsec_tick.tick(), if accelerate == Accelerate::On => self.on_ipsec_tick(),
                _ = reload_tick.tick(), if self.reload.follows => self.on_reload_tick(),
                Some(event) = self.events.recv() => self.on_events(event).await,
                Ok(()) = self.devices.watched.changed() => self.on_survey(),
                Ok(()) = self.side_tasks.changed() => Next::Update,
                Ok(()) = self.takeover.progress.changed() => self.on_takeover_progress(),
                Ok(()) = self.devices.own_device.changed() => self.on_own_device(),
                Ok(()) = self.devices.attachments.changed() => self.on_attachments(),
                Ok(()) = self.drifted.changed() => Next::Update,
                _ = audit_tick.tick() => self.on_audit_tick(),
                () = tokio::time::sleep_until(retry_at), if retry.is_some() => Next::Update,
                _ = status_tick.tick(), if self.is_status_due => self.on_status_tick(),
            };
            match next {
                Next::Update => self.update(),
                Next::Wait => {}
                Next::End(ended) => {
                    self.stop(ended);
                    return Ok(ended);
                }
            }
        }
    }

    fn on_hangup(&mut self) -> Next {
        if self.is_outdated() {
            return Next::End(Ended::ToStartAnew);
        }
        tracing::info!("SIGHUP: the configuration has not changed");
        Next::Update
    }

    fn on_reload_tick(&mut self) -> Next {
        if self.is_outdated() { Next::End(Ended::ToStartAnew) } else { Next::Update }
    }

    fn on_ipsec_tick(&mut self) -> Next {
        let bit = ipsec::bit(Accelerate::On);
        if self.settings.networks == bit {
            return Next::Wait;
        }
        self.settings.networks = bit;
        self.follow_cluster();
        Next::Update
    }

    /// Takes in an event, and those that follow it closely.
    async fn on_events(&mut self, first: Event) -> Next {
        let mut concerns_cluster = self.on_event(first);
        tokio::time::sleep(GATHER).await;
        while let Ok(event) = self.events.try_recv() {
            concerns_cluster |= self.on_event(event);
        }
        if concerns_cluster {
            self.follow_cluster();
        }
        Next::Update
    }

    /// Takes in an event. Returns whether it concerned the node or the cluster's networks.
    fn on_event(&mut self, event: Event) -> bool {
        let concerns_cluster = self.cluster.apply(&event);
        self.sync.on_event(event);
        concerns_cluster
    }

    fn on_survey(&mut self) -> Next {
        let watched = self.devices.watched.borrow_and_update();
        if *watched == Watched::default() {
            return Next::Update;
        }
        let survey = &watched.survey;
        self.sync.set_node(&survey.addresses, &survey.leave);
        Next::Update
    }

    fn on_takeover_progress(&mut self) -> Next {
        let progress = self.takeover.progress.borrow_and_update().clone();
        self.settings.phase = progress.phase;
        self.follow_cluster();
        if progress.released { Next::End(Ended::Released) } else { Next::Update }
    }

    fn on_own_device(&mut self) -> Next {
        self.settings.own_device = *self.devices.own_device.borrow_and_update();
        self.follow_cluster();
        hold_fragments(self.settings.own_device, &self.maps);
        Next::Update
    }

    fn on_attachments(&mut self) -> Next {
        let _ = self.devices.attachments.borrow_and_update();
        // What is attached follows from a survey that the loop may not have seen.
        self.on_survey()
    }

    /// Compares the next part of the maps with what they should hold, and repairs it.
    fn on_audit_tick(&mut self) -> Next {
        if !self.drift.may_repair() {
            return if self.status.ready { Next::Update } else { Next::Wait };
        }
        self.audits += 1;
        // A proxy that the node is handed to, or taken from, sets its own.
        let is_alone = self.settings.phase & phase::MASK == phase::SERVE;
        if is_alone && self.audits.is_multiple_of(SETTINGS_AUDIT) {
            let found = tokio::task::block_in_place(|| self.node_settings.audit());
            self.drift.report(Part::Settings, found);
        }
        let found = tokio::task::block_in_place(|| {
            let mut found = self.sync.audit()?;
            found.extend(self.audit_programmed());
            Some(found)
        });
        if let Some(found) = found {
            // Wakes the loop if anything was found.
            self.drift.report(Part::Maps, found);
        }
        Next::Wait
    }

    /// Compares the settings and networks of the programs, and repairs them.
    fn audit_programmed(&mut self) -> Vec<Found> {
        let Some(wanted) = self.programmed else { return Vec::new() };
        let maps = self.sync.maps();
        let now = match maps.read_programmed() {
            Ok(now) if now == Some(wanted) => return Vec::new(),
            Ok(now) => now,
            Err(error) => return vec![Found::new("settings", "it cannot be read", Err(error))],
        };
        let failure = maps.write_programmed(&wanted).err().map(|error| error.to_string());
        let state = |programmed| State { programmed, ..State::default() };
        let differences = difference::compare(&state(Some(wanted)), &state(now));
        audit::maps(&differences, failure.as_deref())
    }

    fn on_status_tick(&mut self) -> Next {
        if self.programmed.is_none() {
            self.follow_cluster();
        }
        self.sync.log_reports();
        self.sync.log_endpoints();
        self.side_tasks.publish_object_events(&self.sync, &self.status.node, &self.drift);
        self.report_status();
        self.is_status_due = self.programmed.is_none() || self.is_status_unwritten;
        Next::Wait
    }

    /// Brings the maps in step with the model, and passes on what follows from it.
    fn update(&mut self) {
        self.is_status_due = true;
        tokio::task::block_in_place(|| self.sync.run());
        if self.sync.awaited().is_empty() && self.cluster.complete() {
            self.follow_cluster();
        }
        if let Some(vips) = self.sync.take_vips() {
            self.devices.routable.send_modify(|routable| routable.vips = vips);
        }
        if let Some(node_ports) = self.sync.take_node_ports() {
            self.node_settings.follow(node_ports);
        }
        self.side_tasks.follow(
            &mut self.sync,
            &self.devices.watched.borrow().survey,
            &self.devices.rules.borrow().policy,
            self.cluster.is_leaving(),
        );
        let _ = publish(&self.takeover.ready, self.is_attached());
        let _ = publish(&self.devices.filled, self.sync.is_filled());
        if self.is_ready() != self.status.ready {
            self.report_status();
        }
    }

    /// Whether the agent has to restart: its options have changed, and the new ones can be used.
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
            tracing::warn!("{refused}; the agent keeps the last one");
        }
        self.refused = refused;
        changed
    }

    /// Programs what the sources now say about the node and the cluster's networks.
    fn follow_cluster(&mut self) {
        let node = self.cluster.node_addresses();
        let policy = self.devices.rules.borrow().policy.clone();
        let _ = publish_part(&self.devices.rules, |rules| &mut rules.node, node);
        let (programmed, surplus) = self.cluster.programmed(&policy, self.settings);
        if self.programmed == Some(programmed) {
            let _ = self.takeover.written.send_replace(programmed.settings.phase);
            return;
        }
        if !surplus.is_empty() {
            let networks: Vec<String> = surplus.iter().map(ToString::to_string).collect();
            tracing::warn!(
                networks = networks.join(","),
                "left out networks: the programs can compare no more of them"
            );
        }
        self.programmed = match self.sync.maps().write_programmed(&programmed) {
            Ok(()) => {
                let _ = self.takeover.written.send_replace(programmed.settings.phase);
                let networks = programmed.service_networks();
                let _ = publish_part(&self.devices.routable, |all| &mut all.networks, networks);
                Some(programmed)
            }
            Err(error) => {
                tracing::warn!("cannot write the programs' settings: {error}; trying again");
                None
            }
        };
    }

    /// Logs the end and writes the last status.
    fn stop(&mut self, ended: Ended) {
        let why = match ended {
            Ended::Stopped => "the agent was stopped",
            Ended::ToStartAnew => "the agent restarts with its new configuration",
            Ended::Released => "the node was released",
        };
        let then = if ended == Ended::Released {
            "programs and maps are removed"
        } else {
            "programs and maps stay, and packets flow on"
        };
        tracing::info!("stopping: {why}; {then}");
        self.status.ready = false;
        self.status.takeover = self.takeover.progress.borrow().status.clone();
        self.status.waiting_for = vec![why.to_owned()];
        self.write_status();
    }
}
