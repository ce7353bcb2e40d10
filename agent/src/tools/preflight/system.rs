//! Checks the kernel, mounts, privileges and settings.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Check, Outcome, PRIVILEGES};
use crate::node::dataplane::{Pins, is_bpffs};
use crate::node::host;
use crate::node::ports;

/// The oldest kernel that the tests run on.
const TESTED: (u32, u32) = (6, 1);
/// The oldest kernel with cookies of network namespaces, by which host and pods are distinguished.
const NEEDED: (u32, u32) = (5, 14);
/// The capabilities without which nothing works, with their numbers.
const NEEDED_CAPABILITIES: [(&str, u32); 3] =
    [("CAP_NET_ADMIN", 12), ("CAP_PERFMON", 38), ("CAP_BPF", 39)];
/// The capability for the socket that holds fragments.
const NET_RAW: u32 = 13;
/// The capability for namespaces and mounts. It includes CAP_BPF and CAP_PERFMON.
const SYS_ADMIN: u32 = 21;
/// Parts of the kernel that are needed. They are only looked up in its configuration, since root
/// tries them.
const PARTS: [&str; 7] = [
    "CONFIG_BPF_SYSCALL",
    "CONFIG_BPF_JIT",
    "CONFIG_CGROUP_BPF",
    "CONFIG_DEBUG_INFO_BTF",
    "CONFIG_NET_CLS_BPF",
    "CONFIG_NET_SCH_INGRESS",
    "CONFIG_DUMMY",
];

/// Returns the running kernel's release.
pub(super) fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// Returns the checks of the kernel itself.
pub(super) fn kernel(release: &str) -> Vec<Check> {
    let configs = [format!("/boot/config-{release}"), format!("/lib/modules/{release}/config")];
    let config = configs.iter().find_map(|path| Some((path, fs::read_to_string(path).ok()?)));
    vec![
        version(release),
        btf(Path::new("/sys/kernel/btf/vmlinux").exists()),
        match config {
            Some((path, text)) => configuration(path, &text),
            None => Check::new(
                "config",
                Outcome::Skip,
                format!("no {}; features are tried instead", configs.join(", no ")),
            ),
        },
        jit(&fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").unwrap_or_default()),
        match host::netns_cookie() {
            Ok(_) => Check::new(
                "netns-cookie",
                Outcome::Yes,
                "distinguishes host and pods at the socket",
            ),
            Err(error) => {
                Check::new("netns-cookie", Outcome::No, format!("SO_NETNS_COOKIE: {error}"))
                    .next("upgrade to Linux 5.14 or newer")
            }
        },
    ]
}

fn version(release: &str) -> Check {
    let mut numbers = release.split(|at: char| !at.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Check::new(
            "kernel",
            Outcome::Skip,
            format!("cannot parse the release {release:?}"),
        );
    };
    let found = (major, minor);
    if found >= TESTED {
        Check::new("kernel", Outcome::Yes, format!("Linux {release}"))
    } else if found >= NEEDED {
        Check::new(
            "kernel",
            Outcome::Warn,
            format!("Linux {release} is older than the tested versions"),
        )
        .next("use Linux 6.1 or newer; or rely on the checks below")
    } else {
        Check::new("kernel", Outcome::No, format!("Linux {release} is too old"))
            .next("upgrade to Linux 6.1 or newer")
    }
}

fn btf(is_there: bool) -> Check {
    if is_there {
        Check::new("btf", Outcome::Yes, "/sys/kernel/btf/vmlinux")
    } else {
        Check::new(
            "btf",
            Outcome::Warn,
            "no /sys/kernel/btf/vmlinux: Sluice does not need it, but other tools do",
        )
    }
}

/// Checks which parts a kernel's configuration lacks.
fn configuration(path: &str, text: &str) -> Check {
    let has = |part: &str| {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .any(|(name, value)| name == part && value != "n")
    };
    let lacking: Vec<&str> = PARTS.into_iter().filter(|part| !has(part)).collect();
    if lacking.is_empty() {
        Check::new("config", Outcome::Yes, format!("{path} has everything needed"))
    } else {
        Check::new("config", Outcome::Warn, format!("{path} lacks {}", lacking.join(", ")))
            .next("rely on the checks below")
    }
}

fn jit(setting: &str) -> Check {
    match setting.trim() {
        "0" => Check::new(
            "jit",
            Outcome::Warn,
            "net.core.bpf_jit_enable is 0: programs are interpreted, which is many times slower",
        )
        .next("sysctl -w net.core.bpf_jit_enable=1"),
        "" => Check::new("jit", Outcome::Skip, "cannot read net.core.bpf_jit_enable"),
        _ => Check::new("jit", Outcome::Yes, "programs are compiled"),
    }
}

/// Returns the effective capabilities as the kernel's bits, if they are known.
pub(super) fn capabilities() -> Option<u64> {
    effective(&fs::read_to_string("/proc/self/status").unwrap_or_default())
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn has(bits: u64, number: u32) -> bool {
    bits >> number & 1 == 1
}

/// Whether the process may create namespaces to try things in.
pub(super) fn may_go_apart(bits: Option<u64>) -> bool {
    bits.is_some_and(|bits| has(bits, SYS_ADMIN))
}

/// Checks the capabilities.
pub(super) fn privileges(bits: Option<u64>) -> Check {
    const NEXT: &str =
        "run it as root; in a pod: securityContext.privileged: true, or these capabilities";
    let Some(bits) = bits else {
        return Check::new(PRIVILEGES, Outcome::No, "/proc/self/status shows no capabilities")
            .next("run it as root");
    };
    let (held, lacking): (Vec<_>, Vec<_>) =
        NEEDED_CAPABILITIES.into_iter().partition(|(_, number)| has(bits, *number));
    let names = |capabilities: &[(&str, u32)]| -> String {
        capabilities.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    };
    if !lacking.is_empty() {
        return Check::new(
            PRIVILEGES,
            Outcome::No,
            format!("this process lacks {}", names(&lacking)),
        )
        .next(NEXT);
    }
    if !has(bits, NET_RAW) {
        let what = format!(
            "{}; without CAP_NET_RAW, fragments that arrive before their datagram's first one are lost",
            names(&held)
        );
        return Check::new(PRIVILEGES, Outcome::Warn, what).next("add CAP_NET_RAW");
    }
    let more = if has(bits, SYS_ADMIN) { ", CAP_SYS_ADMIN" } else { "" };
    Check::new(PRIVILEGES, Outcome::Yes, format!("{}, CAP_NET_RAW{more}", names(&held)))
}

/// Checks whether kernel settings can be written, as those of Sluice's own device must be.
pub(super) fn settings(folder: &Path) -> Check {
    if !folder.exists() {
        return Check::new(
            "settings",
            Outcome::Warn,
            format!("{} does not exist", folder.display()),
        )
        .next("give --proc-sys the node's /proc/sys");
    }
    if is_read_only(folder) {
        let what = format!(
            "{} is mounted read-only: without the settings of Sluice's own device, packets that are too big for the path to a backend are dropped, \
             and neither reserved ports nor connection tracking limits can be set",
            folder.display()
        );
        return Check::new("settings", Outcome::Warn, what).next(
            "mount the node's /proc/sys/net read-write elsewhere, and give its place as --proc-sys",
        );
    }
    Check::new("settings", Outcome::Yes, format!("{} is writable", folder.display()))
}

/// Checks the BPF file system of the pin path, and the cgroup of the socket path.
pub(super) fn mounts(pin_path: &Path, cgroup: Option<&anyhow::Result<PathBuf>>) -> Vec<Check> {
    let bpffs = if let Err(error) = Pins::new(pin_path).check() {
        Check::new("bpffs", Outcome::No, error.to_string())
            .next("run that command, or give another --pin-path")
    } else if is_bpffs(pin_path) && is_read_only(pin_path) {
        Check::new(
            "bpffs",
            Outcome::No,
            format!("{} is in a BPF file system that is mounted read-only", pin_path.display()),
        )
        .next(
            "mount it read-write (in a pod: without readOnly in the volume), or give another --pin-path",
        )
    } else if is_bpffs(pin_path) {
        Check::new("bpffs", Outcome::Yes, format!("{} is in a BPF file system", pin_path.display()))
    } else {
        Check::new(
            "bpffs",
            Outcome::Yes,
            format!(
                "{} is not in a BPF file system: the agent mounts one (the check `pins` tries that)",
                pin_path.display()
            ),
        )
    };
    let cgroup = match cgroup {
        None => Check::new("cgroup2", Outcome::Skip, "not needed with --socket-path off"),
        Some(Ok(path)) if path.join("cgroup.procs").exists() || path.join("cgroup.controllers").exists() => {
            Check::new("cgroup2", Outcome::Yes, path.display().to_string())
        }
        Some(Ok(path)) => Check::new("cgroup2", Outcome::No, format!("{} is not a cgroup2 directory", path.display()))
            .next("give another --cgroup, or start the agent with --socket-path off"),
        Some(Err(error)) => Check::new("cgroup2", Outcome::No, format!("{error:#}"))
            .next("mount it (mount -t cgroup2 none /sys/fs/cgroup/unified), or start the agent with --socket-path off"),
    };
    vec![bpffs, cgroup]
}

/// Whether a path, or its nearest existing parent, is on a read-only mount.
fn is_read_only(path: &Path) -> bool {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let Ok(path) = CString::new(existing.as_os_str().as_bytes()) else { return false };
    // SAFETY: zero is a value of every field.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with a zero and `stat` is live.
    let result = unsafe { libc::statvfs(path.as_ptr(), &raw mut stat) };
    result == 0 && stat.f_flag & libc::ST_RDONLY != 0
}

/// Checks the memory for the maps, and its limit.
pub(super) fn limits() -> Vec<Check> {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let group = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    vec![memory(&meminfo), memlock(&group)]
}

/// The memory of the maps at their default sizes in MiB, with some room for entries made later.
const MAPS_MIB: u64 = 300;

fn memory(meminfo: &str) -> Check {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    match kib.map(|kib| kib / 1_024) {
        Some(mib) if mib >= MAPS_MIB => Check::new(
            "memory",
            Outcome::Yes,
            format!("{mib} MiB are available; maps take up to {MAPS_MIB} MiB"),
        ),
        Some(mib) => Check::new(
            "memory",
            Outcome::Warn,
            format!("{mib} MiB are available; maps take up to {MAPS_MIB} MiB"),
        )
        .next("free memory, or start the agent with a smaller --flows-max"),
        None => {
            Check::new("memory", Outcome::Skip, "/proc/meminfo does not show the available memory")
        }
    }
}

fn memlock(limits: &str) -> Check {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let soft = line.and_then(|line| line.split_whitespace().next()).unwrap_or("unknown");
    let what = format!("{soft}; maps do not count since Linux 5.11");
    Check::new("memlock", Outcome::Yes, what)
}

/// Lists the reverse path filters of all devices.
pub(super) fn rp_filter(folder: &Path) -> Check {
    let mut modes: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    let mut entries: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let mode =
            match fs::read_to_string(entry.path().join("rp_filter")).unwrap_or_default().trim() {
                "0" => "off",
                "1" => "strict",
                "2" => "loose",
                _ => continue,
            };
        modes.entry(mode).or_default().push(entry.file_name().to_string_lossy().into_owned());
    }
    if modes.is_empty() {
        return Check::new(
            "rp-filter",
            Outcome::Skip,
            format!("{} has no readable filters", folder.display()),
        );
    }
    let words: Vec<String> = modes
        .iter()
        .map(|(mode, devices)| match devices.len() {
            0..=4 => format!("{mode}: {}", devices.join(", ")),
            count => format!("{mode}: {} and {} more", devices[..3].join(", "), count - 3),
        })
        .collect();
    Check::new("rp-filter", Outcome::Yes, format!("{}; every mode works", words.join("; ")))
}

/// Checks that the ports of masqueraded clients do not overlap those of the node's own sockets.
pub(super) fn ports(sysctls: &Path) -> Check {
    let path = sysctls.join("ip_local_reserved_ports");
    match ports::look(sysctls) {
        Ok(None) => Check::new(
            "ports",
            Outcome::Yes,
            "the kernel does not give out the ports of masqueraded clients",
        ),
        Ok(Some(missing)) => Check::new(
            "ports",
            Outcome::Yes,
            format!(
                "the agent adds {missing} to {}, since ip_local_port_range overlaps them",
                path.display()
            ),
        ),
        Err(error @ ports::PortsError::Read { .. }) => {
            Check::new("ports", Outcome::Skip, error.to_string())
        }
        Err(error) => Check::new("ports", Outcome::No, error.to_string())
            .next("sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_tested_or_new_enough_or_too_old() {
        for (release, expected) in [
            ("6.1.0-55-cloud-amd64", Outcome::Yes),
            ("6.18.44", Outcome::Yes),
            ("10.0.0", Outcome::Yes),
            ("5.15.0-100-generic", Outcome::Warn),
            ("5.10.0", Outcome::No),
            ("4.19", Outcome::No),
            ("", Outcome::Skip),
        ] {
            assert_eq!(version(release).result, expected, "{release}");
        }
    }

    #[test]
    fn capabilities_that_are_missing_are_named() {
        let judge = |status: &str| privileges(effective(status));
        let root = judge("Name:\tx\nCapEff:\t000001ffffffffff\n");
        assert_eq!(root.result, Outcome::Yes, "{root:?}");
        assert!(may_go_apart(effective("CapEff:\t000001ffffffffff\n")));
        // Those of an unprivileged container.
        let nobody = judge("CapEff:\t00000000a80425fb\n");
        assert_eq!(nobody.result, Outcome::No);
        assert_eq!(nobody.what, "this process lacks CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF");
        assert!(nobody.next.is_some());
        // The least, and one less.
        let least = "CapEff:\t000000c000003000\n";
        assert_eq!(judge(least).result, Outcome::Yes);
        assert!(!may_go_apart(effective(least)));
        assert_eq!(judge("CapEff:\t000000c000001000\n").result, Outcome::Warn);
        assert_eq!(judge("CapEff:\t0000008000003000\n").what, "this process lacks CAP_PERFMON");
        assert_eq!(judge("").result, Outcome::No);
    }

    #[test]
    fn a_configuration_without_a_part_is_told() {
        let all = PARTS.map(|part| format!("{part}=y\n")).concat();
        assert_eq!(configuration("c", &all).result, Outcome::Yes);
        let some = all.replace("CONFIG_CGROUP_BPF=y", "# CONFIG_CGROUP_BPF is not set");
        assert_eq!(configuration("c", &some).what, "c lacks CONFIG_CGROUP_BPF");
    }

    #[test]
    fn memory_is_compared_with_what_maps_take() {
        assert_eq!(memory("MemTotal: 1 kB\nMemAvailable:    8000000 kB\n").result, Outcome::Yes);
        assert_eq!(memory("MemAvailable: 100000 kB\n").result, Outcome::Warn);
        assert_eq!(memory("").result, Outcome::Skip);
    }

    #[test]
    fn filters_are_listed_by_their_mode() {
        let folder = tempfile::tempdir().expect("a folder");
        for (device, mode) in [("all", "1"), ("eth0", "1"), ("cni0", "2"), ("lo", "0")] {
            std::fs::create_dir(folder.path().join(device)).expect("made");
            std::fs::write(folder.path().join(device).join("rp_filter"), format!("{mode}\n"))
                .expect("written");
        }
        let found = rp_filter(folder.path());
        assert_eq!(found.what, "loose: cni0; off: lo; strict: all, eth0; every mode will do");
    }

    #[test]
    fn a_range_of_ports_is_fine_reserved_or_too_narrow() {
        for (range, result, word) in [
            ("32768\t60999\n", Outcome::Yes, "not the kernel's"),
            ("1024\t65535\n", Outcome::Yes, "enters 1024-29999,61000-65535"),
            ("10000\t29999\n", Outcome::No, "leaves 0 ports"),
        ] {
            let folder = tempfile::tempdir().expect("a folder");
            std::fs::write(folder.path().join("ip_local_port_range"), range).expect("written");
            std::fs::write(folder.path().join("ip_local_reserved_ports"), "\n").expect("written");
            let found = ports(folder.path());
            assert!(found.result == result && found.what.contains(word), "{found:?}");
        }
    }
}
