//! Attaches the programs so that they stay attached without the agent, and takes over the
//! attachments of an earlier agent.
//!
//! Links (TCX, XDP, cgroup) are pinned. A new agent opens the pin and replaces the program between
//! two packets. If the kernel has no TCX, or a foreign clsact filter sits at an egress (TCX would
//! run before it), clsact filters are used instead (see [`super::clsact`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sluice_common::abi::Device;
use sluice_common::abi::previous::Round;

use super::audit::MapPins;
use super::bpf::{self, Table};
use super::clsact::{self, Direction};
use super::error::Error;
use super::layouts::Rounds;
use super::pins::Pins;
use super::programs::Programs;
use crate::node::devices::Role;

pub(super) const TCX_INGRESS: u32 = 46;
pub(super) const TCX_EGRESS: u32 = 47;
pub(super) const XDP: u32 = 37;
pub(super) const SOCK_OPS: u32 = 3;

/// The ways to attach XDP, each with the name of its pin and the link's flags.
pub(super) const XDP_MODES: [(How, &str, u32); 2] =
    [(How::XdpNative, "xdp", 1 << 2), (How::XdpGeneric, "xdp_generic", 1 << 1)];

/// The XDP program.
const XDP_PROGRAM: &str = "xdp_uplink";

/// The cgroup programs with their attach types.
pub(super) const CGROUP: [(&str, u32); 9] = [
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
    // It comes last since it only counts: a kernel that refuses it has the others.
    ("connection", SOCK_OPS),
];

/// Programs that earlier agents attached to the cgroup and that are no longer needed.
const CGROUP_BEFORE: [&str; 1] = ["sock_release"];

/// Whether and how XDP is used on uplinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Xdp {
    /// In the driver where it can (not on veth, whose far end may drop what XDP sends), else not at
    /// all.
    #[default]
    On,
    /// Never.
    Off,
    /// In the driver, on every uplink; a driver that cannot is reported.
    Native,
    /// In the stack, where no driver is needed: for tests, it is slower than tc.
    Generic,
}

/// The way in which a program is attached.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, schemars::JsonSchema, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// A TCX link.
    Tcx,
    /// A clsact filter.
    Clsact,
    /// An XDP link in the driver.
    XdpNative,
    /// An XDP link in the stack.
    XdpGeneric,
}

impl How {
    /// Returns the word for people.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
            Self::XdpNative => "xdp native",
            Self::XdpGeneric => "xdp generic",
        }
    }
}

/// A device that programs are to be attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its ifindex.
    pub index: u32,
    /// Its name, for messages.
    pub name: String,
    /// Whether its packets begin with an Ethernet header.
    pub ethernet: bool,
    /// Its role: XDP is attached to uplinks alone.
    pub role: Role,
    /// Whether it is a veth.
    pub veth: bool,
}

impl Target {
    /// Returns the directions that a tc program is attached for, egress last. The loopback device
    /// needs none at ingress, since what comes in by it has left by it.
    fn directions(&self) -> &'static [Direction] {
        match self.role {
            Role::Loopback => &[Direction::Egress],
            Role::Edge | Role::Uplink | Role::Fabric | Role::Own => {
                &[Direction::Ingress, Direction::Egress]
            }
        }
    }
}

/// The result of attaching to a device.
#[derive(Debug, Default)]
pub struct Attached {
    /// The way in which each program is attached.
    pub hooks: Vec<How>,
    /// Failures to attach that should be retried.
    pub errors: Vec<Error>,
    /// Programs that are not attached and need not be.
    pub notes: Vec<String>,
}

/// An entry of `devices` that differed: its ifindex, what was found, and whether it was corrected.
pub type RestoredEntry = (u32, &'static str, Result<(), Error>);

/// The attached programs.
#[derive(Debug)]
pub struct Hooks {
    programs: Programs,
    rounds: Rounds,
    devices: Table<u32, Device>,
    pins: Pins,
    map_pins: MapPins,
    xdp: Xdp,
    /// Whether the kernel has TCX; unknown before the first try.
    tcx: Option<bool>,
}

impl Hooks {
    /// Creates the hooks of loaded programs, of which none is attached yet.
    #[must_use]
    pub(super) fn new(
        programs: Programs,
        rounds: Rounds,
        devices: Table<u32, Device>,
        (pins, map_pins): (Pins, MapPins),
        xdp: Xdp,
    ) -> Self {
        Self { programs, rounds, devices, pins, map_pins, xdp, tcx: None }
    }

    /// Returns the programs' round of a change of layout. Programs that were attached in another
    /// round have to be attached again.
    #[must_use]
    pub fn round(&self) -> Round {
        self.rounds.round()
    }

    /// Begins the next round, once every device and the cgroup have the programs of this one.
    /// Returns whether there are other programs to attach.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses them; those of this round stay.
    pub fn next_round(&mut self) -> Result<bool, Error> {
        let Some(programs) = self.rounds.next()? else { return Ok(false) };
        self.programs = programs;
        Ok(true)
    }

    /// Attaches the programs to a device, or replaces those of an earlier agent.
    pub fn attach(&mut self, target: &Target) -> Attached {
        let mut attached = Attached::default();
        for direction in target.directions() {
            match self.attach_tc(target, *direction) {
                Ok(how) => attached.hooks.push(how),
                Err(error) if error.is_vanished() => return Attached::default(),
                Err(error) => attached.errors.push(error),
            }
        }
        match self.attach_xdp(target) {
            Ok(Some(how)) => attached.hooks.push(how),
            Ok(None) => {}
            Err(error) if error.is_vanished() => return Attached::default(),
            Err(error) if self.xdp == Xdp::On => attached.notes.push(format!("no XDP: {error}")),
            Err(error) => attached.errors.push(error),
        }
        attached
    }

    /// Detaches everything from a device that no longer has a role or is gone.
    ///
    /// # Errors
    ///
    /// Fails if the BPF file system refuses.
    pub fn detach(&self, device: u32) -> Result<(), Error> {
        for hook in ["ingress", "egress", "xdp", "xdp_generic"] {
            self.unpin(&device_pin(device, hook))?;
        }
        // This fails if the device is gone, and its filters with it.
        let _ = clsact::clean(device);
        Ok(())
    }

    /// Moves a program behind a foreign filter that now sits at an egress, where TCX would run
    /// before it. To be called after filters have changed.
    pub fn recheck(&mut self, target: &Target, attached: &mut Attached) {
        let behind = |filters: Vec<clsact::Filter>| filters.iter().any(|filter| !filter.is_ours());
        let egress = target.directions().len() - 1;
        let Some(how) = attached.hooks.get_mut(egress).filter(|how| **how == How::Tcx) else {
            return;
        };
        if !clsact::filters(target.index, Direction::Egress).is_ok_and(behind) {
            return;
        }
        match self.attach_tc(target, Direction::Egress) {
            Ok(new) => *how = new,
            Err(error) if error.is_vanished() => {}
            Err(error) => attached.errors.push(error),
        }
    }

    /// Writes a device's entry.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be written.
    pub fn set_device(&self, device: u32, entry: &Device) -> Result<(), Error> {
        self.devices.insert(&device, entry).map_err(|cause| Error::map("write", "devices", cause))
    }

    /// Removes a device's entry.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be written.
    pub fn remove_device(&self, device: u32) -> Result<(), Error> {
        self.devices.remove(&device).map_err(|cause| Error::map("write", "devices", cause))
    }

    /// Removes the pins and entries of devices that are not in `live`.
    ///
    /// # Errors
    ///
    /// Fails if the BPF file system refuses.
    pub fn clean_stale(&self, live: &BTreeSet<u32>) -> Result<(), Error> {
        let folder = self.pins.links();
        let entries = fs::read_dir(&folder).map_err(|cause| Error::pin("list", &folder, cause))?;
        let pinned: BTreeSet<u32> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let (device, _) = name.to_str()?.strip_prefix("dev")?.split_once('_')?;
                device.parse().ok()
            })
            .collect();
        for device in pinned.difference(live) {
            self.detach(*device)?;
        }
        let entries =
            self.devices.entries().map_err(|cause| Error::map("read", "devices", cause))?;
        for (device, _) in entries.iter().filter(|(device, _)| !live.contains(device)) {
            self.remove_device(*device)?;
        }
        Ok(())
    }

    /// Pins the maps again whose pins are gone or another map's. To be called after
    /// [`Self::commit`]. Returns for each its name, what was found, and whether that worked.
    pub fn restore_map_pins(&self) -> Vec<(String, &'static str, Result<(), Error>)> {
        self.map_pins.restore(&self.pins)
    }

    /// Makes `devices` hold these entries and no others. Returns for each ifindex that differed
    /// what was found, and whether it was corrected.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn restore_devices(
        &self,
        wanted: &BTreeMap<u32, Device>,
    ) -> Result<Vec<RestoredEntry>, Error> {
        let found = self.devices.entries().map_err(|cause| Error::map("read", "devices", cause))?;
        let found: BTreeMap<u32, Device> = found.into_iter().collect();
        let mut restored = Vec::new();
        for (index, entry) in wanted {
            let what = match found.get(index) {
                Some(found) if found == entry => continue,
                Some(_) => "the entry has another value",
                None => "the entry is missing",
            };
            restored.push((*index, what, self.set_device(*index, entry)));
        }
        for index in found.keys().filter(|index| !wanted.contains_key(index)) {
            restored.push((*index, "there is an entry too many", self.remove_device(*index)));
        }
        Ok(restored)
    }

    /// Returns what is wrong with the programs of a device, as hook and description: nothing if all
    /// are as they were attached.
    #[must_use]
    pub fn examine(&self, target: &Target, attached: &Attached) -> Vec<(String, String)> {
        let header = if target.ethernet { "l2" } else { "l3" };
        let mut wrong = Vec::new();
        let mut hooks = attached.hooks.iter();
        for (direction, how) in target.directions().iter().zip(hooks.by_ref()) {
            let name = format!("tc_{}_{header}", direction.word());
            let found = if *how == How::Clsact {
                self.examine_filter(&name, target.index, *direction)
            } else {
                let pin = device_pin(target.index, direction.word());
                self.examine_link(&name, &pin, u64::from(target.index))
            };
            wrong.extend(found.map(|what| (direction.word().to_owned(), what)));
        }
        for how in hooks {
            let Some((_, hook, _)) = XDP_MODES.iter().find(|(mode, _, _)| mode == how) else {
                continue;
            };
            let pin = device_pin(target.index, hook);
            let found = self.examine_link(XDP_PROGRAM, &pin, u64::from(target.index));
            wrong.extend(found.map(|what| ("xdp".to_owned(), what)));
        }
        wrong
    }

    /// Returns what is wrong with the programs of the socket path, as hook and description.
    #[must_use]
    pub fn examine_cgroup(&self, cgroup: &Path) -> Vec<(String, String)> {
        // Without its cgroup there is nothing to attach to; the next attachment reports that.
        let id = fs::metadata(cgroup).map_or(0, |found| found.ino());
        let examine = |(name, _): &(&str, u32)| {
            let found = self.examine_link(name, &format!("cgroup_{name}"), id)?;
            Some(((*name).to_owned(), found))
        };
        CGROUP.iter().filter_map(examine).collect()
    }

    /// Returns what is wrong with a pinned link.
    fn examine_link(&self, program: &str, pin: &str, target: u64) -> Option<String> {
        let found = bpf::object_get(&self.pins.links().join(pin))
            .and_then(|link| bpf::link_info(link.as_fd()));
        match found {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Some("the pin of its link is gone, and the link with it".to_owned())
            }
            Err(error) => Some(format!("its link cannot be inspected: {error}")),
            Ok(info) if !info.leads_to(target) => Some("its link is detached".to_owned()),
            Ok(info) => self.other_program(program, info.program),
        }
    }

    /// Returns what is wrong with a clsact filter.
    fn examine_filter(&self, program: &str, device: u32, direction: Direction) -> Option<String> {
        let filters = match clsact::filters(device, direction) {
            Ok(filters) => filters,
            Err(error) => return Some(format!("its filters cannot be listed: {error}")),
        };
        match filters.iter().find(|filter| filter.is_ours()) {
            None => Some("its clsact filter is gone".to_owned()),
            Some(filter) => self.other_program(program, filter.program),
        }
    }

    /// Describes the program with an id, unless it is the program of this name.
    fn other_program(&self, name: &str, found: u32) -> Option<String> {
        let own = self.programs.fd(name).and_then(|fd| {
            bpf::program_id(fd).map_err(|cause| Error::attach(name, "its hook", cause))
        });
        match own {
            Ok(own) if own == found => None,
            Ok(own) => Some(format!("program {found} runs instead of {own}")),
            Err(error) => Some(error.to_string()),
        }
    }

    fn attach_tc(&mut self, target: &Target, direction: Direction) -> Result<How, Error> {
        let header = if target.ethernet { "l2" } else { "l3" };
        let name = format!("tc_{}_{header}", direction.word());
        self.programs.need(&name)?;
        let program = self.programs.fd(&name)?;
        let pin = device_pin(target.index, direction.word());
        let failed = |cause| Error::attach(&name, &target.name, cause);
        let filters = clsact::filters(target.index, direction).map_err(failed)?;
        let behind =
            direction == Direction::Egress && filters.iter().any(|filter| !filter.is_ours());
        if !behind {
            let (attach_type, place) = match direction {
                Direction::Ingress => (TCX_INGRESS, bpf::BEFORE),
                Direction::Egress => (TCX_EGRESS, bpf::AFTER),
            };
            if self.adopt(&pin, u64::from(target.index), program)?.is_some() {
                return Ok(How::Tcx);
            }
            if self.tcx != Some(false) {
                match bpf::link_create(program, target.index, attach_type, place) {
                    Ok(link) => {
                        self.tcx = Some(true);
                        self.pin(&link, &pin)?;
                        let _ = clsact::detach(target.index, direction).map_err(failed)?;
                        return Ok(How::Tcx);
                    }
                    Err(error) if self.tcx.is_none() && lacks_tcx(&error) => self.tcx = Some(false),
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        clsact::attach(self.programs.fd(&name)?, &name, target.index, direction).map_err(failed)?;
        self.unpin(&pin)?;
        Ok(How::Clsact)
    }

    fn attach_xdp(&mut self, target: &Target) -> Result<Option<How>, Error> {
        let how = match self.xdp {
            Xdp::Off => None,
            Xdp::On if target.veth => None,
            Xdp::On | Xdp::Native => Some(How::XdpNative),
            Xdp::Generic => Some(How::XdpGeneric),
        };
        // XDP does not support devices without a link header.
        let how = how.filter(|_| target.role == Role::Uplink && target.ethernet);
        // The mode of a link cannot change, so another mode needs a new link.
        for (_, hook, _) in XDP_MODES.iter().filter(|(mode, _, _)| Some(*mode) != how) {
            self.unpin(&device_pin(target.index, hook))?;
        }
        let Some((how, hook, flags)) = XDP_MODES.iter().find(|(mode, _, _)| Some(*mode) == how)
        else {
            return Ok(None);
        };
        self.programs.need(XDP_PROGRAM)?;
        let program = self.programs.fd(XDP_PROGRAM)?;
        let pin = device_pin(target.index, hook);
        if self.adopt(&pin, u64::from(target.index), program)?.is_none() {
            let link = bpf::link_create(program, target.index, XDP, *flags)
                .map_err(|cause| Error::attach(XDP_PROGRAM, &target.name, cause))?;
            self.pin(&link, &pin)?;
        }
        Ok(Some(*how))
    }

    /// Attaches the socket path's programs to a cgroup.
    ///
    /// # Errors
    ///
    /// Fails if the path is not a cgroup, or the kernel refuses a program.
    pub fn attach_cgroup(&self, cgroup: &Path) -> Result<(), Error> {
        let failed = |cause| Error::pin("open the cgroup", cgroup, cause);
        let folder = fs::File::open(cgroup).map_err(failed)?;
        // Links identify a cgroup by its id, which is its inode number.
        let id = folder.metadata().map_err(failed)?.ino();
        for (name, attach_type) in CGROUP {
            let program = self.programs.fd(name)?;
            let pin = format!("cgroup_{name}");
            if self.adopt(&pin, id, program)?.is_none() {
                let target = folder.as_raw_fd().cast_unsigned();
                let link = bpf::link_create(program, target, attach_type, 0)
                    .map_err(|cause| Error::attach(name, cgroup.display().to_string(), cause))?;
                self.pin(&link, &pin)?;
            }
        }
        CGROUP_BEFORE.iter().try_for_each(|name| self.unpin(&format!("cgroup_{name}")))
    }

    /// Detaches the socket path's programs.
    ///
    /// # Errors
    ///
    /// Fails if the BPF file system refuses.
    pub fn detach_cgroup(&self) -> Result<(), Error> {
        let names = CGROUP.iter().map(|(name, _)| name).chain(&CGROUP_BEFORE);
        names.into_iter().try_for_each(|name| self.unpin(&format!("cgroup_{name}")))
    }

    /// Removes old maps and pins, once every device and the cgroup have the new programs.
    ///
    /// # Errors
    ///
    /// Fails if the BPF file system refuses.
    pub fn commit(&self) -> Result<(), Error> {
        self.rounds.commit()
    }

    /// Replaces the program of a pinned link that still leads to `target`, and removes a link that
    /// leads elsewhere.
    fn adopt(
        &self,
        pin: &str,
        target: u64,
        program: BorrowedFd<'_>,
    ) -> Result<Option<OwnedFd>, Error> {
        let own = self.pins.links();
        let folders = [own.clone()]
            .into_iter()
            .chain(self.pins.other_layouts().into_iter().map(|f| f.join("links")));
        for path in folders.map(|folder| folder.join(pin)) {
            let link = match bpf::object_get(&path) {
                Ok(link) => link,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(cause) => return Err(Error::pin("open the pinned link", path, cause)),
            };
            let info = bpf::link_info(link.as_fd())
                .map_err(|cause| Error::pin("inspect the pinned link", &path, cause))?;
            if info.leads_to(target) && bpf::link_update(link.as_fd(), program).is_ok() {
                let own = own.join(pin);
                if path != own {
                    fs::rename(&path, &own)
                        .map_err(|cause| Error::pin("move the pinned link", &path, cause))?;
                }
                return Ok(Some(link));
            }
            fs::remove_file(&path)
                .map_err(|cause| Error::pin("remove the stale link", &path, cause))?;
        }
        Ok(None)
    }

    fn pin(&self, link: &OwnedFd, pin: &str) -> Result<(), Error> {
        self.pins.make_links()?;
        let path = self.pins.links().join(pin);
        bpf::object_pin(link.as_fd(), &path)
            .map_err(|cause| Error::pin("pin the link", path, cause))
    }

    fn unpin(&self, pin: &str) -> Result<(), Error> {
        let path: PathBuf = self.pins.links().join(pin);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::pin("remove the link", path, error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

fn device_pin(device: u32, hook: &str) -> String {
    format!("dev{device}_{hook}")
}

/// Whether the first refusal of a TCX link means that the kernel has none.
pub(super) fn lacks_tcx(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
}
