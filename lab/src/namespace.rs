//! A network namespace with a cgroup, on which everything else in the lab is built.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::packets::{Capture, PacketSocket};
use crate::running::Running;
use crate::shared::Shared;
use crate::{netns, xdp};

/// A network namespace of the lab, and the cgroup its processes live in.
///
/// [`Node`](crate::Node), [`Pod`](crate::Pod), [`Client`](crate::Client) and
/// [`Router`](crate::Router) dereference to it.
#[derive(Clone)]
pub struct Namespace {
    pub(crate) shared: Arc<Shared>,
    name: String,
    path: PathBuf,
    cgroup: PathBuf,
}

impl Namespace {
    /// Makes a namespace with `lo` up and without duplicate address detection. `cgroup` is relative
    /// to the lab's.
    pub(crate) fn create(
        shared: &Arc<Shared>,
        name: &str,
        cgroup: &str,
        forwarding: bool,
    ) -> Result<Self> {
        let path = shared.state.join("ns").join(name);
        ensure!(
            !path.exists(),
            "the name {name} is taken in the lab {}: choose another",
            shared.id
        );
        let cgroup = shared.cgroup.join(cgroup);
        crate::cgroup::create(&cgroup)?;
        netns::make(&path)?;
        let this = Self { shared: Arc::clone(shared), name: name.to_owned(), path, cgroup };
        let forward = if forwarding { "1" } else { "0" };
        this.sysctls(&[
            ("net/ipv4/ip_forward", forward),
            ("net/ipv6/conf/all/forwarding", forward),
            ("net/ipv6/conf/default/forwarding", forward),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv6/conf/default/dad_transmits", "0"),
            ("net/ipv6/conf/default/accept_ra", "0"),
            ("net/ipv6/conf/default/router_solicitations", "0"),
            // Unprivileged ping, as on most nodes.
            ("net/ipv4/ping_group_range", "0 2147483647"),
        ])?;
        let _ = this.ip("link set lo up")?;
        Ok(this)
    }

    /// Returns its name; the namespace is the lab's `ns/<name>`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the file of the namespace, for `nsenter --net=<path>` and setns(2).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the cgroup v2 directory of commands that are started here.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Returns a command that runs in this namespace and cgroup, with a process group of its own
    /// and the mounts of this process.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let _ = command.process_group(0);
        let net = File::open(&self.path);
        let procs = OpenOptions::new().write(true).open(self.cgroup.join("cgroup.procs"));
        let enter = move || {
            let (Ok(net), Ok(procs)) = (&net, &procs) else {
                // The namespace or the cgroup is gone: the lab is down.
                return Err(io::ErrorKind::NotFound.into());
            };
            // SAFETY: both descriptors are owned by this closure; write(2) reads one byte of a
            // constant.
            let entered = unsafe {
                libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1) == 1
                    && libc::setns(net.as_raw_fd(), libc::CLONE_NEWNET) == 0
            };
            if entered { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        // SAFETY: between fork and exec the closure only makes two system calls and allocates
        // nothing.
        let _ = unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs a program here and returns its output and exit status.
    pub fn output<S: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Output> {
        let mut command = self.command(program);
        command.args(args).stdin(Stdio::null()).output().with_context(|| self.cannot_run(program))
    }

    /// Runs a program here and returns its standard output.
    ///
    /// # Errors
    /// If it cannot be started or fails; the error then contains its standard error.
    pub fn run<S: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<String> {
        let args: Vec<_> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        let output = self.output(program, &args)?;
        self.checked(
            &format!("{program} {}", args.join(OsStr::new(" ")).to_string_lossy()),
            &output,
        )
    }

    /// Starts a program here, which runs until it ends or the guard is dropped. Its output goes to
    /// the lab's `log/`.
    pub fn spawn<S: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Running> {
        let mut command = self.command(program);
        let _ = command.args(args);
        self.spawn_command(command)
    }

    /// Starts a command made by [`Namespace::command`]; see [`Namespace::spawn`].
    pub fn spawn_command(&self, command: Command) -> Result<Running> {
        Running::start(&self.shared, &self.name, command)
    }

    /// Runs a closure inside the namespace, on a thread of its own.
    ///
    /// Sockets that it makes belong to the namespace, but to *this process's* cgroup: a node's
    /// cgroup programs see only processes that [`Namespace::command`] starts.
    pub fn enter<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T> {
        netns::enter(&self.path, act)
    }

    /// Runs `ip` commands here, one per line, in one process: `"addr add ...\nroute add ..."`.
    pub fn ip(&self, lines: &str) -> Result<String> {
        self.fed("ip", &["-batch", "-"], lines)
    }

    /// Returns the link-layer address of a device, six octets.
    ///
    /// # Errors
    /// If there is no such device, or it has no such address.
    pub fn link_address(&self, device: &str) -> Result<[u8; 6]> {
        let text = self.run("ip", ["-o", "link", "show", "dev", device])?;
        let word = text.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next());
        let octets: Vec<u8> = word
            .with_context(|| text.clone())?
            .split(':')
            .map(|octet| u8::from_str_radix(octet, 16))
            .collect::<Result<_, _>>()
            .with_context(|| text.clone())?;
        octets.try_into().map_err(|_| anyhow!("{text}"))
    }

    /// Loads nftables rules here.
    pub fn nft(&self, ruleset: &str) -> Result<()> {
        self.fed("nft", &["-f", "-"], ruleset).map(drop)
    }

    /// Runs a program here with the given standard input.
    pub(crate) fn fed(&self, program: &str, args: &[&str], input: &str) -> Result<String> {
        let mut command = self.command(program);
        let mut child = command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| self.cannot_run(program))?;
        // The output below explains why a program ended early.
        let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output().with_context(|| self.cannot_run(program))?;
        self.checked(
            &format!("{program} {}` with the input `{}", args.join(" "), input.trim()),
            &output,
        )
    }

    fn cannot_run(&self, program: &str) -> String {
        format!(
            "cannot run {program} in the namespace {}: is it installed, and the lab {} still up?",
            self.name, self.shared.id
        )
    }

    fn checked(&self, what: &str, output: &Output) -> Result<String> {
        if !output.status.success() {
            bail!(
                "`{what}` failed in the namespace {} ({}): {}",
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets a sysctl of the namespace, named by its path: `net/ipv4/conf/eth0/rp_filter`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.sysctls(&[(key, value)])
    }

    pub(crate) fn sysctls(&self, all: &[(&str, &str)]) -> Result<()> {
        netns::set_sysctls(&self.path, all)
    }

    /// Whether this kernel has the sysctl in this namespace.
    pub(crate) fn has_sysctl(&self, key: &str) -> Result<bool> {
        self.enter(|| Path::new("/proc/sys").join(key).exists())
    }

    /// Turns an offload of a device on or off with `ethtool -K`. With `"tx"` off the packets that
    /// XDP sees on the far end of a veth carry full checksums.
    pub fn offload(&self, device: &str, feature: &str, on: bool) -> Result<()> {
        self.run("ethtool", ["-K", device, feature, if on { "on" } else { "off" }]).map(drop)
    }

    /// Attaches a program that passes every packet to a device, until the lab ends. XDP_TX and
    /// redirects into a veth need one on its far end.
    pub fn xdp_pass(&self, device: &str) -> Result<()> {
        xdp::attach_pass(self, device)
    }

    /// Starts `tcpdump -n` on a device (`"any"` for all), and returns once it listens.
    pub fn tcpdump(&self, device: &str, filter: &str) -> Result<Capture> {
        Capture::start(self, device, filter)
    }

    /// Opens a socket for whole frames on a device (IP packets on one without an Ethernet header).
    pub fn packet_socket(&self, device: &str) -> Result<PacketSocket> {
        PacketSocket::open(self, device)
    }

    /// Pings an address once.
    ///
    /// # Errors
    /// If no reply arrives within two seconds.
    pub fn ping(&self, address: impl Into<IpAddr>) -> Result<()> {
        self.run("ping", ["-n", "-c", "1", "-W", "2", &address.into().to_string()]).map(drop)
    }
}
