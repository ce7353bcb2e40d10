//! Keeps the programs where they belong: on every device with a role, and on the cgroup.
//!
//! It runs beside the plan's loop, so that a device is attached within milliseconds however long an
//! update of the maps takes.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use sluice_common::abi::{self, previous::Round};
use tokio::sync::watch;

use crate::node::backoff::Backoff;
use crate::node::dataplane::{Attached, Error, Hooks, RouteMtus, Target};
use crate::node::devices::own::{OwnRoutes, Place, Routable};
use crate::node::devices::watch::Watched;
use crate::node::devices::{Device, OWN, Role, Survey};
use crate::node::publish::publish;
use crate::node::status::{DeviceStatus, SocketPathStatus};

/// Waiting times between tries of what failed.
const RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));

/// The shortest time between two looks at all routes: pods that come and go change them all the
/// time.
const ROUTES_PERIOD: Duration = Duration::from_secs(2);
/// How often all routes are looked at without a word about them: the kernel drops those of a device
/// that goes down, or of an address that goes, in silence.
const ROUTES_RESYNC: Duration = Duration::from_secs(30);
/// The time between two looks at the neighbours that packets to external VIPs wait for.
const NEIGHBOURS_PERIOD: Duration = Duration::from_secs(3);

/// Our own device, as the programs are to know it.
#[derive(Debug)]
pub struct OwnDevice {
    /// Its ifindex; 0: there never was one, and the programs do without.
    pub index: watch::Sender<u32>,
    /// `/proc/sys`, or the node's at another place.
    pub proc_sys: PathBuf,
}

impl OwnDevice {
    /// Makes the device again if somebody has removed it; whether that was so.
    async fn keep(&self, own: &OwnRoutes, survey: &Survey) -> io::Result<bool> {
        let before = *self.index.borrow();
        let is_there = survey.devices.get(&before).is_some_and(|device| device.role == Role::Own);
        if before == 0 || is_there || *survey == Survey::default() {
            return Ok(false);
        }
        // What the survey has not seen so far is found, and not made twice.
        let index = own.prepare(&self.proc_sys).await.map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("our own device {OWN} is gone and cannot be made again, so held fragments and what is too big are dropped: {error}"),
            )
        })?;
        if index != before {
            tracing::warn!(device = OWN, "somebody has removed our own device: it was made again");
            let _ = self.index.send_replace(index);
        }
        Ok(index != before)
    }
}

/// Keeps our own device, the routes of VIPs by it, and what programs are told of other routes'
/// MTUs, until the inputs end; all of it stays then.
///
/// It runs beside the keeper: looking at many routes must not delay a device.
pub async fn route_vips(
    mut own: OwnRoutes,
    device: OwnDevice,
    mut mtus: RouteMtus,
    mut routable: watch::Receiver<Routable>,
    mut watched: watch::Receiver<Watched>,
    told: watch::Sender<Option<String>>,
) {
    let mut retry = RETRY;
    let mut seen = 0;
    let mut place = Place::default();
    let mut looked = tokio::time::Instant::now();
    let mut neighbours_due = looked + NEIGHBOURS_PERIOD;
    loop {
        let now = routable.borrow_and_update().clone();
        let Watched { survey, routes, .. } = watched.borrow_and_update().clone();
        let made = device.keep(&own, &survey).await;
        let before = std::mem::replace(&mut place, Place::of(&survey));
        let due = if routes == seen { ROUTES_RESYNC } else { ROUTES_PERIOD };
        if matches!(made, Ok(true)) || place != before || looked.elapsed() >= due {
            own.routes_changed();
            (seen, looked) = (routes, tokio::time::Instant::now());
        }
        let mut result = Ok(());
        if neighbours_due <= tokio::time::Instant::now() {
            result = own.look_at_neighbours().await;
            neighbours_due = tokio::time::Instant::now() + NEIGHBOURS_PERIOD;
        }
        // Before the first survey the node has no address that a route could name.
        if result.is_ok() && survey != Survey::default() {
            result = own.keep(&now, &place).await;
        }
        let unrouted = |error| format!("cannot keep the routes of VIPs by {OWN}: {error}");
        let mut problem = made.err().map(|error| error.to_string()).or(result.err().map(unrouted));
        if let Some(found) = own.mtus() {
            let untold = |error| format!("cannot tell programs the MTUs of routes: {error}");
            problem = problem.or(mtus.write(found).err().map(untold));
        }
        let failed = problem.is_some();
        let _ = publish(&told, problem);
        let pause = if failed {
            retry.failed()
        } else {
            retry.reset();
            ROUTES_PERIOD.saturating_sub(looked.elapsed())
        };
        let ended = tokio::select! {
            changed = routable.changed() => changed.is_err(),
            changed = watched.changed(), if routes == seen => changed.is_err(),
            () = tokio::time::sleep(pause), if failed || routes != seen => false,
            () = tokio::time::sleep_until(looked + ROUTES_RESYNC) => false,
            () = tokio::time::sleep_until(neighbours_due), if !now.vips.external.is_empty() => false,
        };
        if ended {
            return;
        }
    }
}

/// What the keeper tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// The devices with a role.
    pub devices: Vec<DeviceStatus>,
    /// The socket path.
    pub sockets: SocketPathStatus,
    /// Whether the programs have been attached, and nothing is tried again.
    pub complete: bool,
    /// What failed besides devices and sockets.
    pub problem: Option<String>,
}

/// What the keeper listens to.
#[derive(Debug)]
pub struct Inputs {
    /// The devices.
    pub watched: watch::Receiver<Watched>,
    /// What keeps VIPs from being routed, if anything (see [`route_vips`]).
    pub routing: watch::Receiver<Option<String>>,
    /// Whether the maps hold an image: programs on empty maps would undo what an agent of
    /// another version still does.
    pub filled: watch::Receiver<bool>,
}

/// Keeps the programs attached.
#[derive(Debug)]
pub struct Keeper {
    hooks: Hooks,
    mode: String,
    cgroup: Option<PathBuf>,
    cgroup_attached: bool,
    devices: BTreeMap<u32, KeptDevice>,
    committed: bool,
    classifiers: u64,
    surveyed: bool,
}

/// A device as it was attached.
#[derive(Debug)]
struct KeptDevice {
    device: Device,
    attached: Attached,
    round: Round,
}

impl Keeper {
    /// Takes the hooks. Without a cgroup, no socket program is attached.
    #[must_use]
    pub fn new(hooks: Hooks, mode: &str, cgroup: Option<PathBuf>) -> Self {
        Self {
            hooks,
            mode: mode.to_owned(),
            cgroup,
            cgroup_attached: false,
            devices: BTreeMap::new(),
            committed: false,
            classifiers: 0,
            surveyed: false,
        }
    }

    /// Keeps the programs attached until the inputs end; they stay attached then.
    pub async fn run(mut self, mut inputs: Inputs, told: watch::Sender<Kept>) {
        if inputs.filled.wait_for(|filled| *filled).await.is_err() {
            return;
        }
        let mut retry = RETRY;
        loop {
            let watched = inputs.watched.borrow_and_update().clone();
            let mut kept = tokio::task::block_in_place(|| self.pass(&watched));
            if let Some(problem) = inputs.routing.borrow_and_update().clone() {
                kept.complete = false;
                kept.problem = Some(problem);
            }
            let complete = kept.complete;
            log_problems(&told.borrow(), &kept);
            let _ = publish(&told, kept);
            if complete {
                retry.reset();
            }
            let wait = if complete { Duration::ZERO } else { retry.failed() };
            let ended = tokio::select! {
                changed = inputs.watched.changed() => changed.is_err(),
                changed = inputs.routing.changed() => changed.is_err(),
                () = tokio::time::sleep(wait), if !complete => false,
            };
            if ended {
                return;
            }
        }
    }

    /// Attaches what is missing, detaches what has gone.
    fn pass(&mut self, watched: &Watched) -> Kept {
        let mut problem = None;
        if *watched != Watched::default() {
            problem = self.follow(&watched.survey).err().map(|error| error.to_string());
            self.surveyed = true;
        }
        if watched.classifiers != self.classifiers {
            self.classifiers = watched.classifiers;
            for kept in self.devices.values_mut() {
                self.hooks.recheck(&target(&kept.device), &mut kept.attached);
            }
        }
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
        let failed = self.devices.values().any(|kept| !kept.attached.errors.is_empty());
        let mut complete = self.surveyed && problem.is_none() && !failed && self.cgroup_attached;
        if complete && !self.committed {
            match self
                .hooks
                .next_round()
                .and_then(|more| if more { Ok(true) } else { self.hooks.commit().map(|()| false) })
            {
                Ok(true) => {
                    // At once: a round lasts as long as its slowest device.
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
        Kept { devices: self.devices.values().map(status).collect(), sockets, complete, problem }
    }

    fn follow(&mut self, survey: &Survey) -> Result<(), Error> {
        let gone: Vec<u32> = self
            .devices
            .keys()
            .filter(|index| !survey.devices.contains_key(index))
            .copied()
            .collect();
        for index in gone {
            self.hooks.detach(index)?;
            self.hooks.forget_device(index)?;
            if let Some(kept) = self.devices.remove(&index) {
                tracing::info!(
                    device = kept.device.name,
                    role = kept.device.role.word(),
                    "detached"
                );
            }
        }
        if !self.surveyed {
            self.hooks.clean_stale(&survey.devices.keys().copied().collect())?;
        }
        // The programs ask for the entries of all devices from their first packet on.
        for device in survey.devices.values() {
            let told = self
                .devices
                .get(&device.index)
                .is_some_and(|before| before.device.entry == device.entry);
            if !(told && self.is_attached(device)) {
                self.hooks.tell_device(device.index, &device.entry)?;
            }
        }
        for device in survey.devices.values() {
            if self.is_attached(device) {
                if let Some(kept) = self.devices.get_mut(&device.index) {
                    kept.device = device.clone();
                }
                continue;
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
                KeptDevice { device: device.clone(), attached, round: self.hooks.round() },
            );
        }
        Ok(())
    }

    /// Whether a device has all of its programs, those of the present round.
    fn is_attached(&self, device: &Device) -> bool {
        self.devices.get(&device.index).is_some_and(|kept| {
            kept.attached.errors.is_empty()
                && link(&kept.device) == link(device)
                && kept.round == self.hooks.round()
        })
    }
}

/// What of an entry decides about hooks: the rest is only told to the programs.
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

fn status(kept: &KeptDevice) -> DeviceStatus {
    let KeptDevice { device, attached, .. } = kept;
    DeviceStatus {
        index: device.index,
        name: device.name.clone(),
        role: device.role,
        hooks: attached.hooks.clone(),
        problem: attached.errors.first().map(ToString::to_string),
        notes: attached.notes.clone(),
    }
}

/// Logs each problem when it appears, once.
fn log_problems(before: &Kept, now: &Kept) {
    let problems = |kept: &Kept| -> BTreeSet<String> {
        let devices =
            kept.devices.iter().flat_map(|device| device.problem.iter().chain(&device.notes));
        devices.chain(&kept.sockets.problem).chain(&kept.problem).cloned().collect()
    };
    let (before, now) = (problems(before), problems(now));
    for problem in now.difference(&before) {
        tracing::warn!("{problem}");
    }
    for problem in before.difference(&now) {
        tracing::info!("no longer: {problem}");
    }
}
