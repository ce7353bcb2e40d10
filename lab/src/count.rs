//! A program that counts the IPv4 packets of one address at a device's hook and passes them on, to
//! show what other programs see there.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result, anyhow};

use crate::leftovers::c_path;
use crate::namespace::Namespace;
use crate::xdp::{bpf, descriptor, number, pin};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_F_BEFORE: u32 = 1 << 3;
const BPF_F_AFTER: u32 = 1 << 4;

/// The direction of packets through a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the device into the stack.
    Ingress,
    /// From the stack to the device.
    Egress,
}

/// The address of a packet that is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// The place among the programs that TCX already has at a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before all others.
    First,
    /// Behind all others.
    Last,
}

/// A counting program. It lives as long as this guard if it is attached, and as long as its file if
/// it is pinned.
#[derive(Debug)]
pub struct Counter {
    map: OwnedFd,
    program: OwnedFd,
    link: Option<OwnedFd>,
}

/// The head of `union bpf_attr` for `BPF_MAP_CREATE`.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// ... for `BPF_MAP_LOOKUP_ELEM`.
#[repr(C)]
struct MapLookup {
    map_fd: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// ... for `BPF_PROG_LOAD`.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// ... for `BPF_LINK_CREATE` with TCX.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    reserved: u32,
    expected_revision: u64,
}

/// Returns an instruction in the kernel's encoding.
const fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> u64 {
    code as u64
        | (registers as u64) << 8
        | (offset.cast_unsigned() as u64) << 16
        | (immediate.cast_unsigned() as u64) << 32
}

impl Counter {
    /// Loads the program for packets of one address, behind an Ethernet header.
    pub fn load(side: Side, address: Ipv4Addr) -> Result<Self> {
        let create =
            MapCreate { map_type: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size: 8, max_entries: 1 };
        let map =
            descriptor(bpf(BPF_MAP_CREATE, &create).context("cannot make a map (BPF_MAP_CREATE)")?);
        let at = match side {
            Side::Source => 14 + 12,
            Side::Destination => 14 + 16,
        };
        let map_number = number(&map).cast_signed();
        let wanted = i32::from_ne_bytes(address.octets());
        let program = [
            // skb_load_bytes(r1, at, fp - 8, 4)
            instruction(0xb7, 0x02, 0, at),
            instruction(0xbf, 0xa3, 0, 0),
            instruction(0x07, 0x03, 0, -8),
            instruction(0xb7, 0x04, 0, 4),
            instruction(0x85, 0x00, 0, 26),
            instruction(0x55, 0x00, 6, 0),
            // if (u32)[fp - 8] == wanted: map's value += 1
            instruction(0x61, 0xa1, -8, 0),
            instruction(0x56, 0x01, 4, wanted),
            instruction(0x18, 0x21, 0, map_number),
            0,
            instruction(0xb7, 0x02, 0, 1),
            instruction(0xdb, 0x21, 0, 0),
            // return -1: the next program decides
            instruction(0xb7, 0x00, 0, -1),
            instruction(0x95, 0x00, 0, 0),
        ];
        let load = ProgLoad {
            prog_type: BPF_PROG_TYPE_SCHED_CLS,
            insn_cnt: u32::try_from(program.len())?,
            insns: program.as_ptr() as u64,
            license: c"Dual BSD/GPL".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log_buf: 0,
            kern_version: 0,
            prog_flags: 0,
        };
        let program = descriptor(
            bpf(BPF_PROG_LOAD, &load).context("cannot load a counting program (BPF_PROG_LOAD)")?,
        );
        Ok(Self { map, program, link: None })
    }

    /// Returns the number of packets so far.
    pub fn packets(&self) -> Result<u64> {
        let (key, mut value) = (0u32, 0u64);
        let lookup = MapLookup {
            map_fd: number(&self.map),
            reserved: 0,
            key: (&raw const key) as u64,
            value: (&raw mut value) as u64,
            flags: 0,
        };
        let _ = bpf(BPF_MAP_LOOKUP_ELEM, &lookup).context("cannot read a counter")?;
        Ok(value)
    }

    /// Pins the program on a bpffs, for `tc filter ... bpf object-pinned <path>`.
    pub fn pin(&self, path: &Path) -> Result<()> {
        pin(&self.program, &c_path(path)?)
            .with_context(|| format!("cannot pin a program at {}", path.display()))
    }
}

impl Namespace {
    /// Counts the IPv4 packets of one address at a device's hook.
    ///
    /// # Errors
    /// If there is no such device, or the kernel has no TCX (Linux 6.6).
    pub fn count_packets(
        &self,
        device: &str,
        (way, place): (Way, Place),
        (side, address): (Side, Ipv4Addr),
    ) -> Result<Counter> {
        let mut counter = Counter::load(side, address)?;
        let name = std::ffi::CString::new(device)?;
        let link = self
            .enter(|| {
                // SAFETY: a NUL-terminated string that outlives the call.
                let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
                if index == 0 {
                    return Err(anyhow!("there is no such device"));
                }
                let create = LinkCreate {
                    prog_fd: number(&counter.program),
                    target_ifindex: index,
                    attach_type: match way {
                        Way::Ingress => 46,
                        Way::Egress => 47,
                    },
                    flags: match place {
                        Place::First => BPF_F_BEFORE,
                        Place::Last => BPF_F_AFTER,
                    },
                    relative_fd: 0,
                    reserved: 0,
                    expected_revision: 0,
                };
                let link: io::Result<i32> = bpf(BPF_LINK_CREATE, &create);
                Ok(descriptor(link.context("BPF_LINK_CREATE")?))
            })?
            .with_context(|| {
                format!("cannot count packets of {device} in the namespace {}", self.name())
            })?;
        counter.link = Some(link);
        Ok(counter)
    }
}
