//! Tries what the kernel accepts, and leaves nothing behind. Programs are loaded but not pinned,
//! and only descriptors hold the hooks, so that everything ends with the process, however it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use aya::Ebpf;
use aya::programs::Program;
use sluice_common::abi::previous::Round;

use super::clsact::{self, Direction};
use super::error::Error;
use super::hooks::{self, How};
use super::pins::Pins;
use super::{bpf, object, programs};

/// The object, loaded without a pin.
#[derive(Debug)]
pub(crate) struct Trial {
    ebpf: Ebpf,
    programs: BTreeMap<String, Result<Option<u32>, Error>>,
}

impl Trial {
    /// Loads the built-in object's maps and every program that the verifier accepts.
    ///
    /// # Errors
    ///
    /// Fails if the maps are refused.
    pub(crate) fn load() -> Result<Self, Error> {
        let object = object::bytes()?;
        programs::lift_memlock();
        let mut ebpf =
            programs::load_object(object, &BTreeMap::new(), &BTreeMap::new(), Round::Settled)?;
        let mut programs = BTreeMap::new();
        for (name, program) in ebpf.programs_mut() {
            let result = programs::verify(name, program).map(|()| instructions(program));
            let _ = programs.insert(name.to_owned(), result);
        }
        Ok(Self { ebpf, programs })
    }

    /// Returns for each program the number of verified instructions, if the kernel reports it, or
    /// the reason for which it was refused.
    pub(crate) fn programs(&self) -> &BTreeMap<String, Result<Option<u32>, Error>> {
        &self.programs
    }

    /// Returns the bytes of this process's maps, by the kernel's count.
    pub(crate) fn map_bytes() -> u64 {
        let entries = fs::read_dir("/proc/self/fdinfo").into_iter().flatten().flatten();
        let texts = entries.filter_map(|entry| fs::read_to_string(entry.path()).ok());
        let maps = texts.filter(|text| text.contains("map_type:"));
        maps.filter_map(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("memlock:"))?;
            line.trim().parse::<u64>().ok()
        })
        .sum()
    }

    fn fd(&self, name: &str) -> io::Result<BorrowedFd<'_>> {
        let missing =
            || io::Error::new(io::ErrorKind::NotFound, format!("the program {name} is not loaded"));
        let program = self.ebpf.program(name).ok_or_else(missing)?;
        program.fd().map(AsFd::as_fd).map_err(|_| missing())
    }

    /// Attaches a classifier by a TCX link, for as long as the descriptor is open.
    pub(crate) fn tcx(
        &self,
        device: u32,
        direction: Direction,
        header: &str,
    ) -> io::Result<OwnedFd> {
        let (attach_type, place) = match direction {
            Direction::Ingress => (hooks::TCX_INGRESS, bpf::BEFORE),
            Direction::Egress => (hooks::TCX_EGRESS, bpf::AFTER),
        };
        bpf::link_create(self.fd(&classifier(direction, header))?, device, attach_type, place)
    }

    /// Attaches a classifier by a clsact filter, which belongs to the device.
    pub(crate) fn clsact(&self, device: u32, direction: Direction, header: &str) -> io::Result<()> {
        let name = classifier(direction, header);
        clsact::attach(self.fd(&name)?, &name, device, direction)
    }

    /// Attaches XDP, for as long as the descriptor is open.
    pub(crate) fn xdp(&self, device: u32, how: How) -> io::Result<OwnedFd> {
        let flags = hooks::XDP_MODES
            .iter()
            .find(|(mode, _, _)| *mode == how)
            .map_or(0, |(_, _, flags)| *flags);
        bpf::link_create(self.fd("xdp_uplink")?, device, hooks::XDP, flags)
    }

    /// Attaches every socket program to a cgroup, one after the other.
    pub(crate) fn cgroup(&self, cgroup: &File) -> BTreeMap<&'static str, io::Result<()>> {
        let attach = |(name, attach_type)| {
            let program = self.fd(name)?;
            bpf::link_create(program, cgroup.as_raw_fd().cast_unsigned(), attach_type, 0).map(drop)
        };
        hooks::CGROUP
            .into_iter()
            .map(|(name, attach_type)| (name, attach((name, attach_type))))
            .collect()
    }

    /// Pins a program and removes the pin, to see whether a BPF file system accepts pins.
    pub(crate) fn pin(&self, path: &Path) -> io::Result<()> {
        let program = self.programs.iter().find(|(_, result)| result.is_ok());
        let name = program.map_or("(any)", |(name, _)| name);
        bpf::object_pin(self.fd(name)?, path)?;
        fs::remove_file(path)
    }
}

fn classifier(direction: Direction, header: &str) -> String {
    format!("tc_{}_{header}", direction.word())
}

fn instructions(program: &Program) -> Option<u32> {
    let info = if let Program::SchedClassifier(program) = program {
        program.info()
    } else if let Program::Xdp(program) = program {
        program.info()
    } else if let Program::CgroupSockAddr(program) = program {
        program.info()
    } else if let Program::CgroupSock(program) = program {
        program.info()
    } else if let Program::SockOps(program) = program {
        program.info()
    } else {
        return None;
    };
    info.ok()?.verified_instruction_count()
}

/// Whether a refused TCX link means that the kernel has none.
pub(crate) fn lacks_tcx(error: &io::Error) -> bool {
    hooks::lacks_tcx(error)
}

/// Returns the names of the programs at the TCX hooks of a device.
pub(crate) fn at_device(device: u32) -> Vec<String> {
    names(
        [hooks::TCX_INGRESS, hooks::TCX_EGRESS].map(|attach_type| bpf::query(device, attach_type)),
    )
}

/// Returns the names of the programs at a device's ingress.
pub(crate) fn at_ingress(device: u32) -> Vec<String> {
    names([bpf::query(device, hooks::TCX_INGRESS)])
}

/// Returns the names of the programs at those hooks of a cgroup that we use and that can change a
/// call.
pub(crate) fn at_cgroup(cgroup: &File) -> Vec<String> {
    let target = cgroup.as_raw_fd().cast_unsigned();
    let changing =
        hooks::CGROUP.into_iter().filter(|(_, attach_type)| *attach_type != hooks::SOCK_OPS);
    names(changing.map(|(_, attach_type)| bpf::query(target, attach_type)))
}

/// Returns the names of programs, without those of hooks that cannot be queried.
fn names(asked: impl IntoIterator<Item = io::Result<Vec<u32>>>) -> Vec<String> {
    asked.into_iter().flatten().flatten().map(program_name).collect()
}

/// Returns the name of a loaded program, or its id: without CAP_SYS_ADMIN the kernel reports only
/// ids.
pub(crate) fn program_name(id: u32) -> String {
    bpf::program_name(id).ok().filter(|name| !name.is_empty()).unwrap_or_else(|| by_id(id))
}

fn by_id(id: u32) -> String {
    format!("id {id}")
}

/// Returns what [`program_name`] returns for the programs of our pinned links if only their ids are
/// known.
pub(crate) fn pinned(pins: &Pins) -> BTreeSet<String> {
    let links = fs::read_dir(pins.links()).into_iter().flatten().flatten();
    let programs = links.filter_map(|link| {
        let link = bpf::object_get(&link.path()).ok()?;
        Some(by_id(bpf::link_info(link.as_fd()).ok()?.program))
    });
    programs.collect()
}

/// Whether a program of this name may be ours. The kernel truncates names to fifteen characters.
pub(crate) fn is_ours(name: &str) -> bool {
    const OTHERS: [&str; 5] =
        ["tc_ingress_l2", "tc_ingress_l3", "tc_egress_l2", "tc_egress_l3", "xdp_uplink"];
    OTHERS.contains(&name) || hooks::CGROUP.iter().any(|(ours, _)| *ours == name)
}
