//! The first process of a node: it makes the node's view of the machine, starts containerd and
//! kubelet in it, restarts them when they end, and reaps orphans.
//!
//! The node sees the machine's files, but nothing that it writes reaches them: directories that
//! containerd, kubelet and CNI plugins write to are covered by directories of the cluster's state,
//! and those that they might write to by empty ones.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{WaitOptions, wait};

use crate::addresses::{GATEWAY, NodeNumber};
use crate::node::{self, CNI_PLUGINS, CONTAINERD, PROGRAMS, STATE, Spec};
use crate::{cgroup, node_config};

/// The machine-wide sysctls that a kubelet sets, with its values. It finds them already set in
/// files of the node, and leaves the real ones alone.
const SYSCTLS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Runs the node for ever.
pub(crate) fn run(spec: &Path) -> Result<()> {
    let content = fs::read(spec).with_context(|| format!("cannot read {}", spec.display()))?;
    let spec: Spec = serde_json::from_slice(&content)
        .with_context(|| format!("cannot parse {}", spec.display()))?;
    let number = NodeNumber(spec.number);
    record(&spec)?;
    rustix::system::sethostname(number.name().as_bytes()).context("cannot set the host name")?;
    files(&spec)?;
    processes_and_devices(&spec)?;
    change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)?;
    node_config::write(&spec)?;
    supervise(number)
}

/// Returns the state directory as the node sees it.
fn state(path: impl AsRef<Path>) -> PathBuf {
    Path::new("/run").join(STATE).join(path)
}

/// Records this process by its id on the machine, which `/proc` shows until the node has its own.
fn record(spec: &Spec) -> Result<()> {
    let pid = fs::read_link("/proc/self").context("cannot read /proc/self: is /proc mounted?")?;
    let pid = pid.to_string_lossy().parse().context("/proc/self names no process")?;
    let process =
        super::launch::Process::of(pid).context("/proc/self tells nothing of this process")?;
    let (root, _) = spec.directories.first().context("the node is told no state directory")?;
    let file = root.join("run").join(format!("{}.json", node::init_name(NodeNumber(spec.number))));
    fs::write(&file, serde_json::to_string(&process)?)
        .with_context(|| format!("cannot write {}", file.display()))
}

fn files(spec: &Spec) -> Result<()> {
    let number = NodeNumber(spec.number);
    // The future /run is made in a place that nothing needs, so that the machine's directories may
    // be anywhere below those that are covered next.
    let staging = Path::new("/mnt");
    mount("tmpfs", staging, "tmpfs", "mode=755")?;
    for (directory, name) in &spec.directories {
        let place = staging.join(name);
        fs::create_dir(&place).with_context(|| format!("cannot make {}", place.display()))?;
        bind(directory, &place)?;
    }
    let own = staging.join(STATE).join(node::directory(number));
    for name in ["etc/upper", "etc/work", "lib", "log"] {
        let path = own.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    let overlay =
        format!("lowerdir=/etc,upperdir={0}/etc/upper,workdir={0}/etc/work", own.display());
    mount("overlay", "/etc", "overlay", &overlay)?;
    bind(&own.join("lib"), Path::new("/var/lib"))?;
    bind(&own.join("log"), Path::new("/var/log"))?;
    for (path, options) in [("/opt", "mode=755"), ("/tmp", "mode=1777")] {
        mount("tmpfs", path, "tmpfs", options)?;
    }
    rustix::mount::mount_move(staging, "/run").context("cannot move /mnt to /run")?;
    for path in ["/run/lock", "/run/netns", "/run/containerd", "/var/lib/kubelet"] {
        fs::create_dir_all(path).with_context(|| format!("cannot make {path}"))?;
    }
    let name = number.name();
    for (file, content) in [
        ("hosts", format!("127.0.0.1 localhost\n::1 localhost\n{} {name}\n", number.ipv4())),
        // Nobody answers there: the cluster has no Internet.
        ("resolv.conf", format!("nameserver {GATEWAY}\n")),
        ("machine-id", format!("{:032x}\n", 0x51_u32 << 8 | u32::from(number.0))),
        ("hostname", format!("{name}\n")),
    ] {
        let path = Path::new("/etc").join(file);
        // The file may be a link.
        drop(fs::remove_file(&path));
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn processes_and_devices(spec: &Spec) -> Result<()> {
    mount("proc", "/proc", "proc", "")?;
    for (key, value) in SYSCTLS {
        let file = Path::new("/run/sysctl").join(key.replace('/', "_"));
        fs::create_dir_all("/run/sysctl").context("cannot make /run/sysctl")?;
        fs::write(&file, format!("{value}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
        bind(&file, &Path::new("/proc/sys").join(key))?;
    }
    rustix::mount::unmount("/sys", UnmountFlags::DETACH).context("cannot unmount /sys")?;
    mount("sysfs", "/sys", "sysfs", "")?;
    if Path::new("/sys/fs/bpf").is_dir() {
        mount("bpf", "/sys/fs/bpf", "bpf", "")?;
    }
    let cgroups = Path::new("/sys/fs/cgroup");
    // The machine's layout, in which each hierarchy begins at the node's own group.
    if spec.hierarchies.iter().any(|hierarchy| hierarchy.root != cgroups) {
        mount("tmpfs", cgroups, "tmpfs", "mode=755")?;
    }
    for hierarchy in &spec.hierarchies {
        fs::create_dir_all(&hierarchy.root)
            .with_context(|| format!("cannot make {}", hierarchy.root.display()))?;
        mount(
            "cgroup",
            &hierarchy.root,
            if hierarchy.is_v2 { "cgroup2" } else { "cgroup" },
            &hierarchy.options,
        )?;
    }
    if spec.hierarchies.iter().any(|hierarchy| hierarchy.root == cgroups) {
        // In cgroup2 a group with processes cannot delegate controllers to groups below it.
        fs::create_dir_all(cgroups.join("init"))
            .context("cannot make the group of the node's own processes")?;
        fs::write(cgroups.join("init/cgroup.procs"), "0")
            .context("cannot enter the node's own group")?;
        let _given = cgroup::delegate(cgroups);
    }
    Ok(())
}

fn mount(source: &str, target: impl AsRef<Path>, kind: &str, options: &str) -> Result<()> {
    let target = target.as_ref();
    let data = CString::new(options).context("a mount's options hold a NUL")?;
    rustix::mount::mount(source, target, kind, MountFlags::empty(), Some(data.as_c_str()))
        .with_context(|| format!("cannot mount {kind} at {} with `{options}`", target.display()))
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    rustix::mount::mount_bind(source.as_os_str().as_bytes(), target.as_os_str().as_bytes())
        .with_context(|| format!("cannot bind {} to {}", source.display(), target.display()))
}

fn change(path: &str, flags: MountPropagationFlags) -> Result<()> {
    rustix::mount::mount_change(path, flags)
        .with_context(|| format!("cannot change the mount {path}"))
}

/// Starts containerd at once and kubelet when it may join. Returns only if one cannot be started.
fn supervise(number: NodeNumber) -> Result<()> {
    let mut running = BTreeMap::new();
    let _none = running.insert(start(number, Program::Containerd)?, Program::Containerd);
    // A kubelet without containerd gives up.
    let socket = Path::new("/run/containerd/containerd.sock");
    while !(socket.exists() && state(node::may_join(number)).exists()) {
        sleep(Duration::from_millis(50));
    }
    let _none = running.insert(start(number, Program::Kubelet)?, Program::Kubelet);
    loop {
        let ended = match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) => {
                running.remove(&pid.as_raw_pid()).map(|program| (program, status))
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => None,
            Err(error) => return Err(error).context("cannot wait for the node's processes"),
        };
        if let Some((program, status)) = ended {
            eprintln!("{} ended ({status:?}); starting it again", program.name());
            sleep(Duration::from_secs(1));
            let _none = running.insert(start(number, program)?, program);
        }
    }
}

/// The programs that a node's first process starts.
#[derive(Clone, Copy)]
enum Program {
    Containerd,
    Kubelet,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Kubelet => "kubelet",
        }
    }

    fn line(self, number: NodeNumber) -> Vec<String> {
        match self {
            Self::Containerd => node_config::containerd_command(),
            Self::Kubelet => node_config::kubelet_command(number),
        }
    }
}

/// Starts a program of the node and returns its id.
fn start(number: NodeNumber, what: Program) -> Result<i32> {
    let line = what.line(number);
    let log = state("log").join(format!("{}-{}.log", number.name(), what.name()));
    let output = File::options()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("cannot open {}", log.display()))?;
    let (program, args) = line.split_first().context("an empty command")?;
    let child = Command::new(program)
        .args(args)
        .env_clear()
        .env("PATH", path())
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("cannot copy a descriptor")?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    i32::try_from(child.id()).context("a process id beyond the kernel's range")
}

/// Returns the PATH of a node.
pub(crate) fn path() -> String {
    format!(
        "/run/{CONTAINERD}:/run/{PROGRAMS}:/run/{CNI_PLUGINS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    )
}
