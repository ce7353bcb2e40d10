//! Tries the hooks where nobody else is: on a veth in a network namespace without a name, on a
//! cgroup of its own, and on a BPF file system in a mount namespace without a name.
//!
//! The namespaces belong to one thread and end with it, whatever ends it. The cgroup is a folder:
//! it is removed again, signals wait meanwhile, and one that a SIGKILL left is removed by the next
//! run, which knows by a lock that nobody uses it.

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

/// What the names of the cgroups begin with.
const CGROUP: &str = "sluice-preflight-";
/// The veth's ends, and the other device.
const VETH: [&str; 2] = ["sluice-try0", "sluice-try1"];
const DUMMY: &str = "sluice-try2";

/// What became of each try.
#[derive(Debug, Default)]
pub(super) struct Tried {
    /// Why there is no ground to try on: then the rest is empty.
    pub(super) ground: Option<String>,
    /// Classifier -> by a TCX link.
    pub(super) tcx: BTreeMap<String, io::Result<()>>,
    /// Whether the kernel has no TCX at all.
    pub(super) lacks_tcx: bool,
    /// Classifier -> by a clsact filter.
    pub(super) clsact: BTreeMap<String, io::Result<()>>,
    /// XDP in the driver and in the stack, on a veth.
    pub(super) xdp: BTreeMap<How, io::Result<()>>,
    /// The kind of our own device, as the kernel has it.
    pub(super) own_device: Option<Result<&'static str, String>>,
    /// Socket program -> whether it was attached to the cgroup.
    pub(super) cgroup: Option<Result<BTreeMap<&'static str, io::Result<()>>, String>>,
    /// Whether a BPF file system takes pins.
    pub(super) pins: Option<Result<String, String>>,
}

/// Tries every hook. The caller has no other thread, so that its signals can wait.
pub(super) fn attempt(trial: &Trial, cgroup: Option<&Path>, pin_path: &Path) -> Tried {
    let waiting = Signals::hold();
    let tried = std::thread::scope(|scope| {
        let thread = scope.spawn(|| apart(trial, cgroup, pin_path));
        thread.join().unwrap_or_else(|_| Tried {
            ground: Some("the thread that tries the hooks has panicked".to_owned()),
            ..Tried::default()
        })
    });
    drop(waiting);
    tried
}

/// Goes to namespaces of its own, and tries.
fn apart(trial: &Trial, cgroup: Option<&Path>, pin_path: &Path) -> Tried {
    let mut tried = Tried::default();
    // SAFETY: no pointers; it concerns this thread alone.
    if unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) } != 0 {
        let error = io::Error::last_os_error();
        tried.ground = Some(format!("cannot make namespaces to try hooks in: {error}"));
        return tried;
    }
    // From here on no mount reaches the node.
    if let Err(error) = mount(None, Path::new("/"), None, libc::MS_REC | libc::MS_PRIVATE) {
        tried.ground = Some(format!("cannot keep mounts to a namespace of its own: {error}"));
        return tried;
    }
    match devices() {
        Ok((veth, own_device)) => {
            tried.own_device = Some(own_device);
            try_device(trial, veth, &mut tried);
        }
        Err(error) => tried.ground = Some(format!("cannot make a veth to try hooks on: {error}")),
    }
    tried.cgroup = cgroup.map(|cgroup| try_cgroup(trial, cgroup));
    tried.pins = Some(try_pins(trial, pin_path));
    tried
}

/// Makes the devices in this thread's namespace: the veth's ifindex, and the kind of the other one.
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

/// Attaches the socket programs to a cgroup that is made for it, below the one that the agent will
/// use.
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
        // Read-only for this container: in this thread's mount namespace it need not be. The mount
        // is here or above.
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
        .map_err(|error| format!("cannot remove the cgroup {} again: {error}", path.display()))?;
    attached
}

/// Removes what earlier runs that were killed have left.
fn sweep(parent: &Path) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let left = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(CGROUP));
    for path in left.map(|entry| entry.path()) {
        if File::open(&path).is_ok_and(|folder| lock(&folder)) {
            // Another run may have been quicker.
            let _ = fs::remove_dir(&path);
        }
    }
}

/// Whether nobody else had the lock of a file; it is ours then, as long as the file is open.
fn lock(file: &File) -> bool {
    // SAFETY: the descriptor is open.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// Pins a program on a BPF file system of this thread's own.
fn try_pins(trial: &Trial, pin_path: &Path) -> Result<String, String> {
    // A mount of its own serves in any case: nothing is put where others look.
    let standard = Path::new("/sys/fs/bpf");
    let target = if standard.is_dir() { standard.to_owned() } else { PathBuf::from("/sys") };
    mount(Some("bpf"), &target, Some("bpf"), 0).map_err(|error| {
        format!(
            "cannot mount a BPF file system (tried at {}, unseen by others): {error}",
            target.display()
        )
    })?;
    let pin = target.join("sluice_preflight");
    trial
        .pin(&pin)
        .map_err(|error| format!("cannot pin a program to a BPF file system: {error}"))?;
    Ok(if is_bpffs(pin_path) {
        "a BPF file system takes them (tried on one that nobody sees)".to_owned()
    } else {
        "a BPF file system can be mounted and takes them (tried where nobody sees it)".to_owned()
    })
}

/// Mounts, for this thread's mount namespace.
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
    // SAFETY: every string ends with a zero and outlives the call; null is allowed for source, kind
    // and data.
    let result = unsafe {
        libc::mount(pointer(&source), target.as_ptr(), pointer(&kind), flags, std::ptr::null())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Signals that would end the process wait as long as this lives.
struct Signals(libc::sigset_t);

impl Signals {
    fn hold() -> Self {
        // SAFETY: zero is a value of a set, which is filled before it is used; both sets are live.
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
