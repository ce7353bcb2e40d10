//! The agent's status: `status.json` in the state directory, and the lock next to it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::node::dataplane::How;
use crate::node::devices::Role;
use crate::node::folder;

/// The pin path when none is given.
pub const PIN_PATH: &str = "/sys/fs/bpf/sluice";
/// The parent of all state directories, and itself the one of the standard pin path.
const STATE: &str = "/run/sluice";

/// Returns the default state directory of a pin path. Agents of several lab nodes on one machine
/// have different pin paths, and therefore different directories.
#[must_use]
pub fn state_dir(pin_path: &Path) -> PathBuf {
    if pin_path == Path::new(PIN_PATH) {
        return PathBuf::from(STATE);
    }
    // The hash is FNV-1a, since all releases must find the same directory.
    let hash =
        pin_path.as_os_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    Path::new(STATE).join(format!("{hash:016x}"))
}

/// Converts a time to seconds since 1970.
#[must_use]
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The content of `status.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize)]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// The agent's process id.
    pub pid: u32,
    /// The agent's version.
    pub version: String,
    /// The time at which the agent started, in seconds since 1970.
    pub started: u64,
    /// Its command line, for commands that have to decide as it does.
    #[serde(default)]
    pub invocation: Invocation,
    /// Whether the maps and hooks are as they should be.
    pub ready: bool,
    /// The reasons why it is not ready, as text; empty if it is.
    pub waiting_for: Vec<String>,
    /// The sources of objects.
    pub sources: Vec<SourceStatus>,
    /// The planned content of the maps, in numbers.
    pub counts: Counts,
    /// The devices with a role.
    pub devices: Vec<DeviceStatus>,
    /// The socket path.
    pub socket_path: SocketPathStatus,
    /// The decisions about traffic, and the addresses that follow from them.
    #[serde(default)]
    pub policy: PolicyStatus,
    /// The progress of a takeover or release.
    #[serde(default)]
    pub takeover: TakeoverStatus,
    /// The problems with objects.
    pub reports: Vec<ReportStatus>,
    /// The last change of the maps.
    pub last_sync: Option<SyncStatus>,
    /// The reason why writes fail and are retried, as text.
    pub failing: Option<String>,
    /// Other failures that are retried.
    #[serde(default)]
    pub problems: Vec<String>,
    /// What was not as the agent had made it, the latest first.
    #[serde(default)]
    pub drift: Vec<DriftStatus>,
}

/// A place that was not as the agent had made it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize)]
pub struct DriftStatus {
    /// `map`, `pin`, `hook`, `device`, `route` or `setting`.
    pub what: String,
    /// Which one.
    pub place: String,
    /// What was found there last, as text.
    pub found: String,
    /// How often, since the agent started.
    pub times: u64,
    /// When it was last found, in seconds since 1970.
    pub at: u64,
    /// Why it is not repaired; [`None`] if it is.
    pub problem: Option<String>,
}

/// A takeover from kube-proxy, or a release back to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize)]
pub struct TakeoverStatus {
    /// `serving`, `passive`, `importing`, `draining` or `released`.
    pub phase: String,
    /// The condition that the next step waits for; [`None`] if there is no next step or it waits
    /// for nothing.
    pub waiting_for: Option<String>,
    /// The number of TCP and SCTP connections that netfilter still translates.
    pub connections: u64,
    /// The number of flows of datagrams that netfilter still translates.
    pub datagram_flows: u64,
    /// The number of our flows that are still in use, while draining.
    pub flows: Option<u64>,
    /// kube-proxy's rules that were found by the last look.
    pub kube_proxy: Option<String>,
    /// Whether our own table holds netfilter's connections.
    pub holding: bool,
    /// The failure that is retried.
    pub problem: Option<String>,
}

/// A command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize)]
pub struct Invocation {
    /// Its words, from the subcommand on. Flags of kube-proxy are translated to ours.
    pub arguments: Vec<String>,
    /// The directory that relative paths in it are relative to.
    pub directory: PathBuf,
}

impl Invocation {
    /// Creates a command line of these words, from the subcommand on, in this process's directory.
    #[must_use]
    pub fn here(words: &[OsString]) -> Self {
        let subcommand = words.iter().skip_while(|word| *word != "agent");
        Self {
            arguments: subcommand.map(|word| word.to_string_lossy().into_owned()).collect(),
            directory: std::env::current_dir().unwrap_or_default(),
        }
    }
}

/// A source of objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize)]
pub struct SourceStatus {
    /// `manifests` or `kubernetes`.
    pub name: String,
    /// Folder or address.
    pub from: String,
    /// Whether it has delivered its first full list.
    pub synced: bool,
    /// The time at which it last delivered something, in seconds since 1970.
    pub heard: Option<u64>,
    /// Its problem; [`None`] if it has none.
    pub problem: Option<String>,
}

/// The content of the maps, in numbers.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize,
)]
pub struct Counts {
    /// Frontends (VIP, port and protocol).
    pub frontends: usize,
    /// Service ports.
    pub service_ports: usize,
    /// Serving backends.
    pub backends: usize,
}

/// A device with a role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize)]
pub struct DeviceStatus {
    /// Its ifindex.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// The way in which each program is attached.
    pub hooks: Vec<How>,
    /// The failure that is retried.
    pub problem: Option<String>,
    /// Programs that are not attached and need not be.
    pub notes: Vec<String>,
}

/// The socket path's programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize)]
pub struct SocketPathStatus {
    /// `all`, `host` or `off`.
    pub mode: String,
    /// The cgroup that they are attached to.
    pub cgroup: Option<PathBuf>,
    /// The failure that is retried.
    pub problem: Option<String>,
}

/// The decisions about traffic, and the addresses that follow from them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize)]
pub struct PolicyStatus {
    /// `needed`, `kube-proxy` or `all`.
    pub masquerade: String,
    /// The way to detect that a client is a local pod, as in the flag.
    pub detect_local: String,
    /// The addresses that serve node ports, as in the flag.
    pub nodeport_addresses: String,
    /// The node's addresses at which node ports are served.
    pub serving: Vec<IpAddr>,
    /// The node's primary addresses, which masquerade clients behind devices without an address.
    pub primary: Vec<IpAddr>,
    /// Addresses that are left to whoever has them on a device.
    pub left_alone: Vec<IpAddr>,
    /// `off`, `on`, or `on` with the reason for which packets still go through the stack.
    #[serde(default)]
    pub accelerate: String,
    /// The node's addresses that no uplink has.
    #[serde(default)]
    pub strays: Vec<IpAddr>,
}

/// The word for a Service of which every recent attempt has failed. That is no flaw of an object.
pub const ENDPOINTS_FAIL: &str = "endpoints_fail";

/// Something wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize)]
pub struct ReportStatus {
    /// `problem` or `notice`.
    pub level: String,
    /// The problem, as a word: a flaw's, or `endpoints_fail`.
    pub flaw: String,
    /// The object.
    pub subject: String,
    /// The field's path; empty if it is the whole.
    pub field: String,
    /// The finding and its consequence, as text.
    pub message: String,
    /// The time at which it was first noticed, in seconds since 1970.
    pub since: u64,
}

/// A change of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema, Deserialize)]
pub struct SyncStatus {
    /// The time at which it ended, in seconds since 1970.
    pub at: u64,
    /// Its duration in microseconds.
    pub took_us: u64,
    /// The number of writes.
    pub writes: usize,
}

/// The state directory of a running agent. Each directory has one agent.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Held for as long as the agent lives; the kernel releases it with the process.
    lock: File,
}

impl StateDir {
    /// Makes the directory and takes its lock.
    ///
    /// # Errors
    ///
    /// Fails if another agent holds it, if other users than root may change it, or if it cannot be
    /// made.
    pub fn take(path: &Path) -> io::Result<Self> {
        let context = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("cannot use the state directory {}: {error}", path.display()),
            )
        };
        folder::make(path, folder::READABLE)
            .and_then(|()| folder::check_files(path))
            .map_err(context)?;
        let lock_path = path.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(lock_path)
            .map_err(context)?;
        if !try_lock(&lock, LIVES).map_err(context)? {
            let pid =
                read(path).map_or_else(|| "unknown".to_owned(), |status| status.pid.to_string());
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!(
                    "another agent (pid {pid}) uses {}: stop it, or give this one its own --pin-path and --state-dir",
                    path.display()
                ),
            ));
        }
        Ok(Self { path: path.to_owned(), lock })
    }

    /// Returns the claim to the node that this directory's lock makes.
    ///
    /// # Errors
    ///
    /// Fails if the lock file cannot be inspected.
    pub fn claim(&self) -> io::Result<Claim> {
        let lock = self.lock.metadata()?;
        Ok(Claim { file: Some((self.path.join("lock"), lock.dev(), lock.ino())) })
    }

    /// Writes the status atomically. If that fails, the old status is removed, since readers would
    /// take it for the present one.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be written.
    pub fn write(&self, status: &Status) -> io::Result<()> {
        let written = self.replace(status);
        // The status of an earlier agent has been replaced or removed.
        let _ = try_lock(&self.lock, SPEAKS)?;
        written
    }

    fn replace(&self, status: &Status) -> io::Result<()> {
        let (new, path) = (self.path.join("status.json.new"), self.path.join("status.json"));
        let write = || {
            // Something may have cleaned up /run under a running agent.
            folder::make(&self.path, folder::READABLE)?;
            let mut file = File::create(&new)?;
            file.write_all(serde_json::to_string_pretty(status)?.as_bytes())?;
            file.write_all(b"\n")?;
            fs::rename(&new, &path)
        };
        let Err(_) = write() else { return Ok(()) };
        // A full disk may have room for only one of the two files.
        let _ = fs::remove_file(&new);
        let _ = fs::remove_file(&path);
        write().map_err(|error| {
            let _ = fs::remove_file(&new);
            let why = format!(
                "cannot write the status to {}, so `sluice status` knows nothing of this agent: {error}; make room, or give another --state-dir",
                path.display()
            );
            io::Error::new(error.kind(), why)
        })
    }
}

/// A running agent's claim to the node: its lock, which `sluice cleanup --force` removes under it,
/// and which another agent may have after that.
#[derive(Clone, Debug, Default)]
pub struct Claim {
    /// The lock file with its device and inode. Without one, the claim always holds.
    file: Option<(PathBuf, u64, u64)>,
}

impl Claim {
    /// Whether the lock file is still the one that was locked.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.file.as_ref().is_none_or(|(path, device, inode)| {
            fs::metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (*device, *inode))
        })
    }

    /// Describes what follows if it is no longer held.
    #[must_use]
    pub fn lost(&self) -> String {
        let path = self.file.as_ref().map(|(path, _, _)| path.display().to_string());
        format!(
            "this agent's restart: its lock {} was removed, by `sluice cleanup --force` or by \
             something that tidies up, so it repairs nothing any more",
            path.unwrap_or_default()
        )
    }
}

/// Checks that only root may change a state directory, if there is one.
///
/// # Errors
///
/// Fails if other users may; the error contains the command that fixes it.
pub fn check(path: &Path) -> io::Result<()> {
    folder::check(path).and_then(|()| folder::check_files(path)).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot use the state directory {}: {error}", path.display()),
        )
    })
}

/// More than the repair of a node's programs, pins and routes takes.
const REPAIR_MAX: Duration = Duration::from_millis(500);
/// The byte of the lock file that an agent locks for as long as it lives.
const LIVES: i64 = 0;
/// The byte that it locks once the directory contains no status but its own.
const SPEAKS: i64 = 1;

/// Returns a write lock on a byte. It belongs to the open file, not to the process, and querying it
/// takes no lock, so that a reader never keeps an agent from starting.
fn byte(at: i64) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

/// Takes an exclusive lock, unless another process has it.
fn try_lock(file: &File, at: i64) -> io::Result<bool> {
    let wanted = byte(at);
    // SAFETY: the descriptor is open, the struct is live.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

fn is_locked(path: &Path, at: i64) -> bool {
    let Ok(file) = File::open(path.join("lock")) else { return false };
    let mut held = byte(at);
    // SAFETY: the descriptor is open, the struct is live and writable.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut held) };
    asked == 0 && held.l_type != libc::F_UNLCK as i16
}

/// Whether an agent holds the lock of a state directory.
#[must_use]
pub fn is_alive(path: &Path) -> bool {
    is_locked(path, LIVES)
}

/// Returns the status of the running agent. Returns [`None`] if there is none, or if it has just
/// started and the status is still that of an earlier one.
#[must_use]
pub fn of_living(path: &Path) -> Option<Status> {
    // The lock is queried first, so that the status is of this agent or a later one.
    is_locked(path, SPEAKS).then(|| read(path)).flatten()
}

/// Returns the last status in a state directory, whether its agent is running or not.
#[must_use]
pub fn read(path: &Path) -> Option<Status> {
    serde_json::from_slice(&fs::read(path.join("status.json")).ok()?).ok()
}

/// Removes the lock of a state directory, so that an agent that runs all the same repairs nothing
/// of what is removed next. Waits until a repair that it is at has ended.
///
/// # Errors
///
/// Fails if the lock cannot be removed.
pub fn revoke(path: &Path) -> io::Result<()> {
    let is_alive = is_alive(path);
    match fs::remove_file(path.join("lock")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => {
            if is_alive {
                std::thread::sleep(REPAIR_MAX);
            }
            Ok(())
        }
    }
}

/// Removes a state directory that no agent uses.
///
/// # Errors
///
/// Fails if a file cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    for file in ["status.json", "status.json.new", "wish.json", "wish.json.new", "lock"] {
        match fs::remove_file(path.join(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    match fs::remove_dir(path) {
        // The standard directory contains those of other pin paths. It may also be a mount, or, in
        // a pod, lie in a read-only root.
        Err(error)
            if !matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENOTEMPTY | libc::EBUSY | libc::EROFS)
            ) =>
        {
            Err(error)
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pin_paths_have_state_directories_of_their_own() {
        let standard = state_dir(Path::new(PIN_PATH));
        let (a, b) = (state_dir(Path::new("/run/a")), state_dir(Path::new("/run/b")));
        assert_eq!(standard, Path::new("/run/sluice"));
        assert!(a != b && a != standard);
        assert!(a.starts_with(standard));
    }

    #[test]
    fn who_asks_for_the_agent_never_keeps_it_from_starting() {
        let path = std::env::temp_dir().join(format!("sluice-state-{}", std::process::id()));
        drop(StateDir::take(&path).expect("nobody else"));
        assert!(!is_alive(&path), "nobody holds it");
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| (0..20_000).filter(|_| is_alive(&path)).count());
            while !asking.is_finished() {
                drop(StateDir::take(&path).expect("only askers are about"));
            }
        });
        let held = StateDir::take(&path).expect("nobody else");
        assert!(is_alive(&path) && of_living(&path).is_none(), "it has said nothing so far");
        held.write(&Status { ready: true, ..Status::default() }).expect("written");
        assert!(of_living(&path).is_some_and(|status| status.ready));
        assert!(
            StateDir::take(&path).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
        );
        drop(held);
        assert!(!is_alive(&path) && of_living(&path).is_none());
        let next = StateDir::take(&path).expect("nobody else");
        assert!(read(&path).is_some_and(|status| status.ready), "the last one's word");
        assert!(is_alive(&path) && of_living(&path).is_none(), "it is not the next one's");
        drop(next);
        remove(&path).expect("removable");
    }
}
