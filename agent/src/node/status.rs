//! What the agent tells about itself: `status.json` in the state directory, and the lock beside it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::node::dataplane::How;
use crate::node::devices::Role;
use crate::node::folder;

/// The pin path when none is given.
pub const PIN_PATH: &str = "/sys/fs/bpf/sluice";
/// Where state directories lie; itself the directory of the standard pin path.
const STATE: &str = "/run/sluice";

/// The state directory that belongs to a pin path when none is given: agents of several lab nodes
/// on one machine have a pin path each, so their directories differ.
#[must_use]
pub fn state_dir(pin_path: &Path) -> PathBuf {
    if pin_path == Path::new(PIN_PATH) {
        return PathBuf::from(STATE);
    }
    // FNV-1a: agents and readers of every release must find the same directory.
    let hash =
        pin_path.as_os_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    Path::new(STATE).join(format!("{hash:016x}"))
}

/// The record of reserved ports in a state directory (see [`super::ports`]).
#[must_use]
pub fn reserved_ports(path: &Path) -> PathBuf {
    path.join("reserved-ports")
}

/// The record of the loopback device's settings in a state directory (see
/// [`crate::node::devices::loopback`]).
#[must_use]
pub fn loopback(path: &Path) -> PathBuf {
    path.join("loopback")
}

/// A time as seconds since 1970.
#[must_use]
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The content of `status.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// The agent's process id.
    pub pid: u32,
    /// The agent's version.
    pub version: String,
    /// When the agent started, in seconds since 1970.
    pub started: u64,
    /// How it was started, for those who are to decide as it does.
    #[serde(default)]
    pub invocation: Invocation,
    /// Whether the maps and hooks are as they should be.
    pub ready: bool,
    /// Why it is not ready, for people; empty when it is.
    pub waiting_for: Vec<String>,
    /// Where objects come from.
    pub sources: Vec<SourceStatus>,
    /// What the maps were told to hold.
    pub counts: Counts,
    /// The devices with a role.
    pub devices: Vec<DeviceStatus>,
    /// The socket path.
    pub socket_path: SocketPathStatus,
    /// What was decided about traffic, and which addresses that means.
    #[serde(default)]
    pub policy: PolicyStatus,
    /// How far a takeover or release is.
    #[serde(default)]
    pub takeover: TakeoverStatus,
    /// What is wrong with objects.
    pub reports: Vec<ReportStatus>,
    /// The last change of the maps.
    pub last_sync: Option<SyncStatus>,
    /// Writes that failed and are tried again, for people.
    pub failing: Option<String>,
    /// What else fails and is tried again.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// A takeover from kube-proxy, or the way back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeoverStatus {
    /// `serving`, `passive`, `importing`, `draining` or `released`.
    pub phase: String,
    /// What the next step waits for; [`None`]: there is none, or nothing is waited for.
    pub waiting_for: Option<String>,
    /// TCP and SCTP connections that netfilter goes on to translate.
    pub connections: u64,
    /// Flows of datagrams that it does.
    pub datagram_flows: u64,
    /// While draining: flows of ours that are under way.
    pub flows: Option<u64>,
    /// kube-proxy's rules that are there, when they were last looked for.
    pub kube_proxy: Option<String>,
    /// Whether our own table holds netfilter's connections.
    pub holding: bool,
    /// What fails and is tried again.
    pub problem: Option<String>,
}

/// A command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invocation {
    /// Its words, from the subcommand on; what was taken from kube-proxy's is brought into ours.
    pub arguments: Vec<String>,
    /// What relative paths in it are relative to.
    pub directory: PathBuf,
}

impl Invocation {
    /// These words, from the subcommand on, given in this process's directory.
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// `manifests` or `kubernetes`.
    pub name: String,
    /// Folder or address.
    pub from: String,
    /// Whether its first full list has come.
    pub synced: bool,
    /// When it was last heard, in seconds since 1970.
    pub heard: Option<u64>,
    /// What is wrong with it; [`None`] when it is well.
    pub problem: Option<String>,
}

/// How much the maps hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Frontends (VIP, port and protocol).
    pub frontends: usize,
    /// Service ports.
    pub service_ports: usize,
    /// Backends that serve.
    pub backends: usize,
}

/// A device with a role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its ifindex.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// What is attached, and how.
    pub hooks: Vec<How>,
    /// What failed and is tried again.
    pub problem: Option<String>,
    /// What is not attached and need not be.
    pub notes: Vec<String>,
}

/// The socket path's programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketPathStatus {
    /// `all`, `host` or `off`.
    pub mode: String,
    /// The cgroup that they are attached to.
    pub cgroup: Option<PathBuf>,
    /// What failed and is tried again.
    pub problem: Option<String>,
}

/// What was decided about traffic, and which addresses that means.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyStatus {
    /// `needed`, `kube-proxy` or `all`.
    pub masquerade: String,
    /// How a client is known to be a local pod, as the flag has it.
    pub detect_local: String,
    /// Where node ports are served, as the flag has it.
    pub nodeport_addresses: String,
    /// The node's addresses that this means.
    pub serving: Vec<IpAddr>,
    /// The node's primary addresses, as which clients are shown where a device has none of its own.
    pub primary: Vec<IpAddr>,
    /// Addresses that are left to whoever has them on a device.
    pub left_alone: Vec<IpAddr>,
    /// `off`, `on`, or `on` and why packets do not go around the stack all the same.
    #[serde(default)]
    pub accelerate: String,
    /// The node's addresses that no uplink has.
    #[serde(default)]
    pub strays: Vec<IpAddr>,
}

/// Something wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportStatus {
    /// `problem` or `notice`.
    pub level: String,
    /// What is wrong, as a word.
    pub flaw: String,
    /// The object.
    pub subject: String,
    /// The field's path; empty if it is the whole.
    pub field: String,
    /// For people.
    pub message: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
}

/// A change of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncStatus {
    /// When it ended, in seconds since 1970.
    pub at: u64,
    /// How long it took, microseconds.
    pub took_us: u64,
    /// How many writes it had.
    pub writes: usize,
}

/// The state directory of a running agent; there is one agent a directory.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Held as long as the agent lives: the kernel lets it go with the process.
    lock: File,
}

impl StateDir {
    /// Makes the directory and takes its lock.
    ///
    /// # Errors
    ///
    /// When another agent holds it, somebody other than root may change it, or it cannot be made.
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

    /// Writes the status for readers to find: all of it or nothing. One that cannot be written is
    /// none: what an agent said long ago would be taken for what is so now.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write(&self, status: &Status) -> io::Result<()> {
        let written = self.replace(status);
        // Whatever was there is not any more.
        let _ = try_lock(&self.lock, SPEAKS)?;
        written
    }

    fn replace(&self, status: &Status) -> io::Result<()> {
        let (new, path) = (self.path.join("status.json.new"), self.path.join("status.json"));
        let write = || {
            // Somebody may have cleaned up /run below a running agent.
            folder::make(&self.path, folder::READABLE)?;
            let mut file = File::create(&new)?;
            file.write_all(serde_json::to_string_pretty(status)?.as_bytes())?;
            file.write_all(b"\n")?;
            fs::rename(&new, &path)
        };
        let Err(_) = write() else { return Ok(()) };
        // On a full disk there may be room for one of the two.
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

/// Checks that nobody but root may change a state directory, if there is one.
///
/// # Errors
///
/// When somebody else may; the error holds the command that mends it.
pub fn check(path: &Path) -> io::Result<()> {
    folder::check(path).and_then(|()| folder::check_files(path)).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot use the state directory {}: {error}", path.display()),
        )
    })
}

/// The byte of the lock file that an agent holds as long as it lives.
const LIVES: i64 = 0;
/// The byte that it holds when no status but its own is in the directory.
const SPEAKS: i64 = 1;

/// A write lock on a byte. It belongs to the open file and not to the process, and who only asks
/// about it takes nothing: a reader never keeps an agent from starting.
fn byte(at: i64) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

/// Takes an exclusive lock unless somebody else has it.
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

/// Whether an agent holds a state directory.
#[must_use]
pub fn is_alive(path: &Path) -> bool {
    is_locked(path, LIVES)
}

/// The status of the agent that lives; [`None`] when there is none, or it has just started and the
/// last one's is still there.
#[must_use]
pub fn of_living(path: &Path) -> Option<Status> {
    // Asked first: what is read then is this agent's, or a later one's.
    is_locked(path, SPEAKS).then(|| read(path)).flatten()
}

/// The last status in a state directory, of an agent alive or not.
#[must_use]
pub fn read(path: &Path) -> Option<Status> {
    serde_json::from_slice(&fs::read(path.join("status.json")).ok()?).ok()
}

/// Removes a state directory that no agent uses.
///
/// # Errors
///
/// When a file cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    for file in ["status.json", "status.json.new", "wish.json", "wish.json.new", "lock"] {
        match fs::remove_file(path.join(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    match fs::remove_dir(path) {
        // The standard directory holds those of other pin paths, and may be a mount, in a pod in a
        // read-only root.
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
