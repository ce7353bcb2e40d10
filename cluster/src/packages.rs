//! The system packages that the test tiers, the demo and the eBPF build need, by their Debian
//! names.
//!
//! For root, one `apt-get install` installs what is missing; everybody else gets an error with the
//! command to run.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};

use crate::process::{Cmd, find_program, newest_line};
use crate::ui::Step;

/// A command and the package that has it.
pub struct Tool {
    command: &'static str,
    package: &'static str,
}

const fn tool(command: &'static str, package: &'static str) -> Tool {
    Tool { command, package }
}

/// The clippy of the compiler in [`BPF_RUSTC`].
pub const BPF_CLIPPY: &str = "rust-web-clippy";

/// Tools for running single programs by `BPF_PROG_TEST_RUN`.
pub const KERNEL: &[Tool] =
    &[tool("ip", "iproute2"), tool("bpftool", "bpftool"), tool("ethtool", "ethtool")];

/// Tools for nodes, pods and clients in network namespaces.
pub const LAB: &[Tool] = &[
    tool("ip", "iproute2"),
    tool("bpftool", "bpftool"),
    tool("ethtool", "ethtool"),
    tool("nft", "nftables"),
    tool("iptables", "iptables"),
    tool("conntrack", "conntrack"),
    tool("sysctl", "procps"),
    tool("nsenter", "util-linux"),
    tool("ping", "iputils-ping"),
    tool("tcpdump", "tcpdump"),
    tool("curl", "curl"),
    tool("socat", "socat"),
    tool("dig", "bind9-dnsutils"),
    tool("iperf3", "iperf3"),
    tool("nginx", "nginx"),
    tool("faketime", "faketime"),
];

/// Tools for an agent with a real API server, and with a real kube-proxy in both of its modes.
pub const API: &[Tool] = &[
    tool("ip", "iproute2"),
    tool("curl", "curl"),
    tool("openssl", "openssl"),
    tool("nft", "nftables"),
    tool("iptables", "iptables"),
];

/// Tools for a cluster: those that its nodes run, and those that make its parts.
pub const CLUSTER: &[Tool] = &[
    tool("ip", "iproute2"),
    tool("nsenter", "util-linux"),
    tool("unshare", "util-linux"),
    tool("openssl", "openssl"),
    tool("runc", "runc"),
    tool("iptables", "iptables"),
    tool("nft", "nftables"),
    tool("conntrack", "conntrack"),
    tool("mmdebstrap", "mmdebstrap"),
    tool("curl", "curl"),
];

/// The Debian compiler with a core library for BPF.
pub const BPF_RUSTC: &[&str] = &["rustc-web", "libstd-rust-web-dev-bpf"];

/// Reports whether this process may do everything a node agent does.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Installs the packages of tools that are missing.
///
/// # Errors
/// If something is missing and cannot be installed; the message has the command to run.
pub fn ensure_tools<'a>(tools: impl IntoIterator<Item = &'a Tool>) -> Result<()> {
    let missing: BTreeSet<_> = tools
        .into_iter()
        .filter(|tool| find_program(tool.command).is_none())
        .map(|tool| tool.package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing.into_iter().collect::<Vec<_>>())
}

/// Reports whether all of these tools are installed.
pub fn has_tools(tools: &[Tool]) -> bool {
    tools.iter().all(|tool| find_program(tool.command).is_some())
}

/// Reports whether [`install`] can work at all here.
pub fn can_install() -> bool {
    is_root() && find_program("apt-get").is_some()
}

/// Installs packages with one `apt-get install`.
///
/// # Errors
/// If this is not root or there is no apt-get, or if it fails.
pub fn install(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    if !can_install() {
        bail!(
            "missing packages (by their Debian names): {names}; install them, on Debian with: sudo apt-get install {names}"
        );
    }
    let step = Step::start_long(format!("apt-get install {names}"));
    apt("update").run_behind(&step, newest_line)?;
    apt("install")
        // Never remove an installed package: Debian's compiler, for example, would replace Debian's
        // rustup.
        .args(["--yes", "--no-remove", "--no-install-recommends"])
        .args(packages)
        .run_behind(&step, newest_line)
        .with_context(|| format!("cannot install {names}"))?;
    step.done("installed");
    Ok(())
}

fn apt(verb: &str) -> Cmd {
    Cmd::new("apt-get")
        .args(["-o", "DPkg::Lock::Timeout=300", verb])
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Without systemd, this keeps servers among the packages (nginx) from being started: the
        // lab starts its own.
        .env("RUNLEVEL", "1")
}
