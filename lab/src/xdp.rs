//! A minimal XDP program, loaded without a library, and bpffs mounts.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, anyhow};

use crate::leftovers::c_path;
use crate::namespace::Namespace;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const XDP_PASS: u64 = 2;

/// `r0 = XDP_PASS; exit`, in the kernel's encoding: opcode, registers, offset, immediate.
const PASS: [u64; 2] = [0xb7 | XDP_PASS << 32, 0x95];

/// The head of `union bpf_attr` for `BPF_PROG_LOAD` (Linux 4.14's part of it).
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

/// ... for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// ... for `BPF_OBJ_PIN`.
#[repr(C)]
struct ObjPin {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Mounts a bpffs on an existing directory.
pub(crate) fn mount_bpffs(directory: &Path) -> Result<()> {
    let target = c_path(directory)?;
    // SAFETY: NUL-terminated strings that outlive the call.
    let failed = unsafe {
        libc::mount(
            c"bpf".as_ptr(),
            target.as_ptr(),
            c"bpf".as_ptr(),
            0,
            c"mode=0700".as_ptr().cast(),
        )
    } != 0;
    if failed {
        return Err(io::Error::last_os_error()).with_context(|| {
            format!("cannot mount a bpffs on {}: does the kernel have BPF?", directory.display())
        });
    }
    Ok(())
}

/// Attaches a program that passes every packet, pinned in the lab's bpffs so that it lives as long
/// as the lab.
pub(crate) fn attach_pass(namespace: &Namespace, device: &str) -> Result<()> {
    let place = namespace.shared.state.join("bpf").join(format!(
        "pass-{}-{}",
        namespace.name(),
        device.replace('.', "_")
    ));
    if place.exists() {
        return Ok(());
    }
    let path = c_path(&place)?;
    let name = std::ffi::CString::new(device)?;
    namespace
        .enter(|| {
            // SAFETY: a NUL-terminated string that outlives the call.
            let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
            if index == 0 {
                return Err(anyhow!("there is no such device"));
            }
            let load = ProgLoad {
                prog_type: BPF_PROG_TYPE_XDP,
                insn_cnt: 2,
                insns: PASS.as_ptr() as u64,
                license: c"Dual BSD/GPL".as_ptr() as u64,
                log_level: 0,
                log_size: 0,
                log_buf: 0,
                kern_version: 0,
                prog_flags: 0,
            };
            let program = descriptor(bpf(BPF_PROG_LOAD, &load).context("BPF_PROG_LOAD")?);
            let create = LinkCreate {
                prog_fd: number(&program),
                target_ifindex: index,
                attach_type: BPF_XDP,
                flags: 0,
            };
            let link = descriptor(bpf(BPF_LINK_CREATE, &create).context("BPF_LINK_CREATE")?);
            pin(&link, &path).context("BPF_OBJ_PIN")?;
            Ok(())
        })?
        .with_context(|| {
            format!(
                "cannot attach an XDP program to {device} in the namespace {}",
                namespace.name()
            )
        })
}

/// Pins a program, map or link.
pub(crate) fn pin(object: &OwnedFd, path: &CStr) -> io::Result<()> {
    let pin = ObjPin { pathname: path.as_ptr() as u64, bpf_fd: number(object), file_flags: 0 };
    bpf(BPF_OBJ_PIN, &pin).map(drop)
}

pub(crate) fn number(descriptor: &OwnedFd) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}

pub(crate) fn descriptor(number: i32) -> OwnedFd {
    // SAFETY: bpf(2) has just returned it for a command that makes a descriptor.
    unsafe { OwnedFd::from_raw_fd(number) }
}

pub(crate) fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<i32> {
    // SAFETY: `attr` is a `repr(C)` prefix of `union bpf_attr` of the size that is passed; its
    // pointers are to data that outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    i32::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(io::Error::last_os_error)
}
