//! Keeps the programs attached to every device with a role, and to the cgroup.
//!
//! It runs next to the agent's loop, so that a device gets its programs within milliseconds however
//! long an update of the maps takes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use sluice_common::abi::{self, previous::Round};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::daemon::audit::{Drift, Found, Part};
use crate::node::backoff::Backoff;
use crate::node::dataplane::{Attached, Error, Hooks, Target};
use crate::node::devices::watch::Watched;
use crate::node::devices::{Device, Rules, Survey};
use crate::node::publish::publish;
use crate::node::status::{DeviceStatus, SocketPathStatus};

/// The time between two audits of pins and programs. One costs a few microseconds for each.
const AUDIT_PERIOD: Duration = Duration::from_secs(10);
/// The pauses between retries.
const RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));

/// The attached programs, as the attacher reports them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attachments {
    /// The rules by which the devices were surveyed.
    pub rules: Rules,
    /// The devices with a role.
    pub devices: Vec<DeviceStatus>,
    /// The socket path.
    pub sockets: SocketPathStatus,
    /// Whether all programs are attached, and nothing is to be retried.
    pub complete: bool,
    /// A failure that concerns neither devices nor sockets.
    pub problem: Option<String>,
}

/// The inputs of the attacher.
#[derive(Debug)]
pub struct Inputs {
    /// The devices.
    pub watched: watch::Receiver<Watched>,
    /// The reason why VIPs are not routed, if they are not (see `routes::route_vips`).
    pub routing: watch::Receiver<Option<String>>,
    /// Whether the maps hold an image. Programs with empty maps would undo what an agent of another
    /// version still does.
    pub filled: watch::Receiver<bool>,
}

/// Keeps the programs attached.
#[derive(Debug)]
pub struct Attacher {
    hooks: Hooks,
    mode: String,
    cgroup: Option<PathBuf>,
    cgroup_attached: bool,
    devices: BTreeMap<u32, AttachedDevice>,
    committed: bool,
    classifiers: u64,
    surveyed: bool,
    drift: Drift,
}

/// A device with its programs.
#[derive(Debug)]
struct AttachedDevice {
    device: Device,
    attached: Attached,
    round: Round,
}

impl Attacher {
    /// Makes an attacher. Without a cgroup, no socket program is attached.
    #[must_use]
    pub(crate) fn new(hooks: Hooks, mode: &str, cgroup: Option<PathBuf>, drift: Drift) -> Self {
        Self {
            hooks,
            mode: mode.to_owned(),
            cgroup,
            cgroup_attached: false,
            devices: BTreeMap::new(),
            committed: false,
            classifiers: 0,
            surveyed: false,
            drift,
        }
    }

    /// Keeps the programs attached until the inputs end. The programs stay attached after that.
    pub async fn run(mut self, mut inputs: Inputs, report: watch::Sender<Attachments>) {
        if inputs.filled.wait_for(|filled| *filled).await.is_err() {
            return;
        }
        let mut retry = RETRY;
        let mut audit = tokio::time::interval(AUDIT_PERIOD);
        audit.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let watched = inputs.watched.borrow_and_update().clone();
            let mut attachments = tokio::task::block_in_place(|| self.pass(&watched));
            if let Some(problem) = inputs.routing.borrow_and_update().clone() {
                attachments.complete = false;
                attachments.problem = Some(problem);
            }
            let complete = attachments.complete;
            log_problems(&report.borrow(), &attachments);
            let _ = publish(&report, attachments);
            if complete {
                retry.reset();
            }
            let wait = if complete { Duration::ZERO } else { retry.failed() };
            let ended = tokio::select! {
                changed = inputs.watched.changed() => changed.is_err(),
                changed = inputs.routing.changed() => changed.is_err(),
                () = tokio::time::sleep(wait), if !complete => false,
                _ = audit.tick() => {
                    tokio::task::block_in_place(|| self.audit());
                    false
                }
            };
            if ended {
                return;
            }
        }
    }

    /// Examines pins, programs and the map `devices`, and repairs what differs.
    fn audit(&mut self) {
        // Until everything is attached, and from one layout to another, much differs rightly.
        if !self.committed || !self.drift.may_repair() {
            return;
        }
        let restored = self.hooks.restore_map_pins();
        let pins = restored.into_iter().map(|(map, what, repair)| Found::new(map, what, repair));
        self.drift.report(Part::Pins, pins.collect());
        self.drift.report(Part::Devices, self.audit_entries());
        // What fails is retried, and not examined meanwhile.
        let is_whole = (self.cgroup.is_none() || self.cgroup_attached)
            && self.devices.values().all(|attached| attached.attached.errors.is_empty());
        let mut hooks = self.audit_devices();
        hooks.extend(self.audit_cgroup());
        if is_whole {
            self.drift.report(Part::Hooks, hooks);
        } else {
            self.drift.add(Part::Hooks, hooks);
        }
    }

    fn audit_entries(&self) -> Vec<Found> {
        let wanted =
            self.devices.iter().map(|(index, attached)| (*index, attached.device.entry)).collect();
        let restored = match self.hooks.restore_devices(&wanted) {
            Ok(restored) => restored,
            Err(error) => return vec![Found::new("devices", "it cannot be compared", Err(error))],
        };
        let found = |(index, what, repair): (u32, &str, Result<(), Error>)| {
            let name = self.devices.get(&index).map_or("unknown", |known| &known.device.name);
            Found::new("devices", format!("ifindex {index} ({name}): {what}"), repair)
        };
        restored.into_iter().map(found).collect()
    }

    fn audit_devices(&mut self) -> Vec<Found> {
        let mut found = Vec::new();
        for AttachedDevice { device, attached, .. } in self.devices.values_mut() {
            // What failed is retried, and reported by the status.
            if !attached.errors.is_empty() {
                continue;
            }
            let target = target(device);
            let wrong = self.hooks.examine(&target, attached);
            if wrong.is_empty() {
                continue;
            }
            *attached = self.hooks.attach(&target);
            // The device is gone, and the survey does not know it yet.
            if attached.hooks.is_empty() && attached.errors.is_empty() {
                continue;
            }
            let failure = attached.errors.first().map(ToString::to_string);
            found.extend(wrong.into_iter().map(|(hook, what)| Found {
                place: format!("{} {hook}", device.name),
                what,
                failure: failure.clone(),
            }));
        }
        found
    }

    fn audit_cgroup(&mut self) -> Vec<Found> {
        let Some(cgroup) = self.cgroup.as_ref().filter(|_| self.cgroup_attached) else {
            return Vec::new();
        };
        let wrong = self.hooks.examine_cgroup(cgroup);
        if wrong.is_empty() {
            return Vec::new();
        }
        let failure = self.hooks.attach_cgroup(cgroup).err().map(|error| error.to_string());
        self.cgroup_attached = failure.is_none();
        let found = |(hook, what): (String, String)| Found {
            place: format!("{} {hook}", cgroup.display()),
            what,
            failure: failure.clone(),
        };
        wrong.into_iter().map(found).collect()
    }

    /// Attaches what is missing, and detaches devices that are gone.
    fn pass(&mut self, watched: &Watched) -> Attachments {
        let mut problem = None;
        if *watched != Watched::default() {
            problem = self.follow(&watched.survey).err().map(|error| error.to_string());
            self.surveyed = true;
        }
        if watched.classifiers != self.classifiers {
            self.classifiers = watched.classifiers;
            for attached in self.devices.values_mut() {
                self.hooks.recheck(&target(&attached.device), &mut attached.attached);
            }
        }
        let sockets = self.pass_cgroup();
        let failed = self.devices.values().any(|attached| !attached.attached.errors.is_empty());
        let mut complete = self.surveyed && problem.is_none() && !failed && self.cgroup_attached;
        if complete && !self.committed {
            match self.finish_round() {
                Ok(true) => {
                    // Begin the next round immediately: each lasts as long as its slowest device.
                    self.cgroup_attached = false;
                    return self.pass(watched);
                }
                Ok(false) => self.committed = true,
                Err(error) => {
                    complete = false;
                    problem = Some(error.to_string());
                }
            }
        }
        Attachments {
            rules: watched.rules.clone(),
            devices: self.devices.values().map(status).collect(),
            sockets,
            complete,
            problem,
        }
    }

    /// Attaches the socket programs to the cgroup, or detaches those of an earlier agent.
    fn pass_cgroup(&mut self) -> SocketPathStatus {
        let mut sockets = SocketPathStatus {
            mode: self.mode.clone(),
            cgroup: self.cgroup.clone(),
            problem: None,
        };
        if !self.cgroup_attached {
            let result = match &self.cgroup {
                Some(cgroup) => self.hooks.attach_cgroup(cgroup),
                None => self.hooks.detach_cgroup(),
            };
            self.cgroup_attached = result.is_ok();
            sockets.problem = result.err().map(|error| error.to_string());
        }
        sockets
    }

    /// Ends a round of a change of layout. Returns whether another one follows.
    fn finish_round(&mut self) -> Result<bool, Error> {
        let more = self.hooks.next_round()?;
        if !more {
            self.hooks.commit()?;
        }
        Ok(more)
    }

    /// Attaches and detaches devices as a survey says.
    fn follow(&mut self, survey: &Survey) -> Result<(), Error> {
        self.detach_gone(survey)?;
        if !self.surveyed {
            self.hooks.clean_stale(&survey.devices.keys().copied().collect())?;
        }
        // The programs look up the entries of all devices from their first packet on.
        for device in survey.devices.values() {
            let is_known = self
                .devices
                .get(&device.index)
                .is_some_and(|before| before.device.entry == device.entry);
            if !(is_known && self.is_attached(device)) {
                self.hooks.set_device(device.index, &device.entry)?;
            }
        }
        for device in survey.devices.values() {
            self.attach(device);
        }
        Ok(())
    }

    /// Detaches the devices that are not in a survey.
    fn detach_gone(&mut self, survey: &Survey) -> Result<(), Error> {
        let gone: Vec<u32> = self
            .devices
            .keys()
            .filter(|index| !survey.devices.contains_key(index))
            .copied()
            .collect();
        for index in gone {
            self.hooks.detach(index)?;
            self.hooks.remove_device(index)?;
            if let Some(AttachedDevice { device, .. }) = self.devices.remove(&index) {
                tracing::info!(device = device.name, role = device.role.word(), "detached");
            }
        }
        Ok(())
    }

    /// Attaches the programs to a device that does not have them.
    fn attach(&mut self, device: &Device) {
        if self.is_attached(device) {
            if let Some(attached) = self.devices.get_mut(&device.index) {
                attached.device = device.clone();
            }
            return;
        }
        let before = self.devices.get(&device.index);
        let attached = self.hooks.attach(&target(device));
        if before.is_none_or(|before| before.device.role != device.role) {
            let hooks: Vec<&str> = attached.hooks.iter().map(|how| how.word()).collect();
            tracing::info!(
                device = device.name,
                role = device.role.word(),
                hooks = hooks.join(","),
                "attached"
            );
        }
        let _ = self.devices.insert(
            device.index,
            AttachedDevice { device: device.clone(), attached, round: self.hooks.round() },
        );
    }

    /// Whether a device has all programs of the present round.
    fn is_attached(&self, device: &Device) -> bool {
        self.devices.get(&device.index).is_some_and(|attached| {
            attached.attached.errors.is_empty()
                && link(&attached.device) == link(device)
                && attached.round == self.hooks.round()
        })
    }
}

/// Returns the part of a device's entry that decides about its hooks. The programs read the rest
/// from the map.
fn link(device: &Device) -> abi::Device {
    abi::Device {
        masquerade_v4: abi::Ipv4Address::default(),
        masquerade_v6: abi::Ipv6Address::default(),
        flags: 0,
        netns: 0,
        ..device.entry
    }
}

fn target(device: &Device) -> Target {
    Target {
        index: device.index,
        name: device.name.clone(),
        ethernet: device.entry.link_header != 0,
        role: device.role,
        veth: device.veth,
    }
}

fn status(device: &AttachedDevice) -> DeviceStatus {
    let AttachedDevice { device, attached, .. } = device;
    DeviceStatus {
        index: device.index,
        name: device.name.clone(),
        role: device.role,
        hooks: attached.hooks.clone(),
        problem: attached.errors.first().map(ToString::to_string),
        notes: attached.notes.clone(),
    }
}

/// Logs each problem once, when it appears, and when it is gone.
fn log_problems(before: &Attachments, now: &Attachments) {
    let problems = |all: &Attachments| -> BTreeSet<String> {
        let devices =
            all.devices.iter().flat_map(|device| device.problem.iter().chain(&device.notes));
        devices.chain(&all.sockets.problem).chain(&all.problem).cloned().collect()
    };
    let (before, now) = (problems(before), problems(now));
    for problem in now.difference(&before) {
        tracing::warn!("{problem}");
    }
    for problem in before.difference(&now) {
        tracing::info!("no longer: {problem}");
    }
}
