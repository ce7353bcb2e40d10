//! Tries the hooks in isolation: on a veth in an unnamed network namespace, on a cgroup made for
//! it, and on a BPF file system in an unnamed mount namespace.
//!
//! The namespaces belong to one thread and end with it in any case. The cgroup is a directory,
//! which is removed again; signals wait until then. One that is left after a SIGKILL is removed by
//! the next run, which sees by a lock that it is unused.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use rtnetlink::{LinkDummy, LinkIfb, LinkVeth, new_connection};

use crate::node::dataplane::clsact::Direction;
use crate::node::dataplane::trial::{Trial, lacks_tcx};
use crate::node::dataplane::{How, is_bpffs};

/// The prefix of the cgroups' names.
const CGROUP: &str = "sluice-preflight-";
/// The veth's ends; the other device is made in place of Sluice's own.
const VETH: [&str; 2] = ["sluice-try0", "sluice-try1"];
const DUMMY: &str = "sluice-try2";

/// The result of each attempt.
#[derive(Debug, Default)]
pub(super) struct Tried {
    /// The reason why nothing could be tried. Then the rest is empty.
    pub(super) ground: Option<String>,
    /// The results with a TCX link, by classifier.
    pub(super) tcx: BTreeMap<String, io::Result<()>>,
    /// Whether the kernel has no TCX.
    pub(super) lacks_tcx: bool,
    /// The results with a clsact filter, by classifier.
    pub(super) clsact: BTreeMap<String, io::Result<()>>,
    /// The results of XDP in the driver and in the stack, on a veth.
    pub(super) xdp: BTreeMap<How, io::Result<()>>,
    /// The kind of Sluice's own device in this kernel.
    pub(super) own_device: Option<Result<&'static str, String>>,
    /// The results of attaching the socket programs to the cgroup.
    pub(super) cgroup: Option<Result<BTreeMap<&'static str, io::Result<()>>, String>>,
    /// Whether pins can be made in a BPF file system.
    pub(super) pins: Option<Result<String, String>>,
}

/// Tries every hook. The process must have no other thread, so that its signals can wait.
pub(super) fn attempt(trial: &Trial, cgroup: Option<&Path>, pin_path: &Path) -> Tried {
    let waiting = Signals::hold();
    let tried = std::thread::scope(|scope| {
        let thread = scope.spawn(|| apart(trial, cgroup, pin_path));
        thread.join().unwrap_or_else(|_| Tried {
            ground: Some("the thread that tries the hooks panicked".to_owned()),
            ..Tried::default()
        })
    });
    drop(waiting);
    tried
}

/// Enters new namespaces, and tries there.
fn apart(trial: &Trial, cgroup: Option<&Path>, pin_path: &Path) -> Tried {
    let mut tried = Tried::default();
    // SAFETY: the call takes no pointers, and concerns only this thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) } != 0 {
        let error = io::Error::last_os_error();
        tried.ground = Some(format!("cannot create namespaces to try hooks in: {error}"));
        return tried;
    }
    // From here on no mount affects the node.
    if let Err(error) = mount(None, Path::new("/"), None, libc::MS_REC | libc::MS_PRIVATE) {
        tried.ground = Some(format!("cannot make mounts private: {error}"));
        return tried;
    }
    match devices() {
        Ok((veth, own_device)) => {
            tried.own_device = Some(own_device);
            try_device(trial, veth, &mut tried);
        }
        Err(error) => tried.ground = Some(format!("cannot create a veth to try hooks on: {error}")),
    }
    tried.cgroup = cgroup.map(|cgroup| try_cgroup(trial, cgroup));
    tried.pins = Some(try_pins(trial, pin_path));
    tried
}

/// Makes the devices in this thread's namespace. Returns the veth's ifindex, and the kind of the
/// other device.
fn devices() -> io::Result<(u32, Result<&'static str, String>)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _messages) = new_connection()?;
        let _requests = tokio::spawn(connection);
        let veth = LinkVeth::new(VETH[0], VETH[1]).up().build();
        handle.link().add(veth).execute().await.map_err(io::Error::other)?;
        let mut found = handle.link().get().match_name(VETH[0].to_owned()).execute();
        let link = found.try_next().await.map_err(io::Error::other)?;
        let index = link.ok_or_else(|| io::Error::other("the veth vanished"))?.header.index;
        let own = match handle.link().add(LinkDummy::new(DUMMY).build()).execute().await {
            Ok(()) => Ok("dummy"),
            Err(_) => match handle.link().add(LinkIfb::new(DUMMY).build()).execute().await {
                Ok(()) => Ok("ifb"),
                Err(error) => Err(error.to_string()),
            },
        };
        Ok((index, own))
    })
}

fn try_device(trial: &Trial, veth: u32, tried: &mut Tried) {
    for direction in [Direction::Ingress, Direction::Egress] {
        for header in ["l2", "l3"] {
            let name = format!("{} {header}", direction.word());
            let link = trial.tcx(veth, direction, header);
            tried.lacks_tcx |= link.as_ref().is_err_and(lacks_tcx);
            let _ = tried.tcx.insert(name.clone(), link.map(drop));
            let _ = tried.clsact.insert(name, trial.clsact(veth, direction, header));
        }
    }
    for how in [How::XdpGeneric, How::XdpNative] {
        let _ = tried.xdp.insert(how, trial.xdp(veth, how).map(drop));
    }
}

/// Attaches the socket programs to a cgroup made for it, below the one that the agent will use.
fn try_cgroup(
    trial: &Trial,
    parent: &Path,
) -> Result<BTreeMap<&'static str, io::Result<()>>, String> {
    sweep(parent);
    let path = parent.join(format!("{CGROUP}{}", std::process::id()));
    if let Err(error) = fs::create_dir(&path) {
        if error.raw_os_error() != Some(libc::EROFS) {
            return Err(format!("cannot make the cgroup {}: {error}", path.display()));
        }
        // The cgroup is read-only for this container, but need not be in this thread's mount
        // namespace. The mount point is this directory or one above it.
        let remount = |path| mount(None, path, None, libc::MS_REMOUNT | libc::MS_BIND);
        if !parent.ancestors().any(|path| remount(path).is_ok()) {
            return Err(format!("{} is mounted read-only: not tried", parent.display()));
        }
        sweep(parent);
        fs::create_dir(&path)
            .map_err(|error| format!("cannot make the cgroup {}: {error}", path.display()))?;
    }
    let folder = File::open(&path);
    let attached = folder.as_ref().map(|folder| {
        let _ = lock(folder);
        trial.cgroup(folder)
    });
    let attached =
        attached.map_err(|error| format!("cannot open the cgroup {}: {error}", path.display()));
    drop(folder);
    fs::remove_dir(&path)
        .map_err(|error| format!("cannot remove the cgroup {}: {error}", path.display()))?;
    attached
}

/// Removes the cgroups that killed runs have left.
fn sweep(parent: &Path) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let left = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(CGROUP));
    for path in left.map(|entry| entry.path()) {
        if File::open(&path).is_ok_and(|folder| lock(&folder)) {
            // Another run may have removed it.
            let _ = fs::remove_dir(&path);
        }
    }
}

/// Locks a file. Returns whether nobody else had it locked. The lock lasts as long as the file is
/// open.
fn lock(file: &File) -> bool {
    // SAFETY: the descriptor is open.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// Pins a program in a BPF file system of this thread.
fn try_pins(trial: &Trial, pin_path: &Path) -> Result<String, String> {
    // A private mount is used in any case, so nothing is put where others look.
    let standard = Path::new("/sys/fs/bpf");
    let target = if standard.is_dir() { standard.to_owned() } else { PathBuf::from("/sys") };
    mount(Some("bpf"), &target, Some("bpf"), 0).map_err(|error| {
        format!(
            "cannot mount a BPF file system (tried at {} in a private namespace): {error}",
            target.display()
        )
    })?;
    let pin = target.join("sluice_preflight");
    trial
        .pin(&pin)
        .map_err(|error| format!("cannot pin a program to a BPF file system: {error}"))?;
    Ok(if is_bpffs(pin_path) {
        "a BPF file system accepts pins (tried in a private one)".to_owned()
    } else {
        "a BPF file system can be mounted and accepts pins (tried in a private namespace)"
            .to_owned()
    })
}

/// Mounts in this thread's mount namespace.
fn mount(
    source: Option<&str>,
    target: &Path,
    kind: Option<&str>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let text = |text: &[u8]| CString::new(text).map_err(io::Error::other);
    let source = source.map(|source| text(source.as_bytes())).transpose()?;
    let target = text(target.as_os_str().as_bytes())?;
    let kind = kind.map(|kind| text(kind.as_bytes())).transpose()?;
    let pointer =
        |text: &Option<CString>| text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr());
    // SAFETY: every string ends with a zero byte and outlives the call. Null is allowed for source,
    // kind and data.
    let result = unsafe {
        libc::mount(pointer(&source), target.as_ptr(), pointer(&kind), flags, std::ptr::null())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Blocks the signals that would end the process, as long as it lives.
struct Signals(libc::sigset_t);

impl Signals {
    fn hold() -> Self {
        // SAFETY: zeros are a valid set, which is filled before it is used. Both sets are live.
        unsafe {
            let mut held: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            let _ = libc::sigemptyset(&raw mut held);
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                let _ = libc::sigaddset(&raw mut held, signal);
            }
            let _ = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const held, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the set was filled by `hold`.
        let _ = unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
        };
    }
}
