//! A network namespace of a cluster, held by a file.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::Cmd;

use super::state::State;

/// The file system that a file is of while it holds a namespace (`NSFS_MAGIC` in linux/magic.h).
const NSFS: i64 = 0x6e73_6673;

/// The file below the state directory holds the namespace by a mount.
#[derive(Clone, Debug)]
pub(super) struct Namespace {
    file: PathBuf,
}

impl Namespace {
    /// The namespace of that name, whether it exists or not.
    pub(super) fn named(state: &State, name: &str) -> Self {
        Self { file: state.path("ns").join(name) }
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    pub(super) fn exists(&self) -> bool {
        rustix::fs::statfs(&self.file).is_ok_and(|found| found.f_type == NSFS)
    }

    /// Makes it, empty but for `lo`, forwarding packets and sending none of its own accord.
    pub(super) fn create(&self) -> Result<()> {
        let parent = self.file.parent().context("a namespace's file has a parent")?;
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        drop(
            File::create(&self.file)
                .with_context(|| format!("cannot make {}", self.file.display()))?,
        );
        Cmd::new("unshare")
            .arg(format!("--net={}", self.file.display()))
            .arg("true")
            .run()
            .with_context(|| {
                format!("cannot make the network namespace {}: is this root?", self.file.display())
            })?;
        self.sysctls(&[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
        ])?;
        self.ip("link set lo up")
    }

    /// Moves this process into it.
    pub(super) fn join(&self) -> Result<()> {
        let file = File::open(&self.file).with_context(|| {
            format!("cannot open the network namespace {}", self.file.display())
        })?;
        move_into_link_name_space(rustix::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("cannot enter the network namespace {}", self.file.display()))
    }

    /// Runs a closure on a thread inside it. Processes that the closure starts are inside too.
    pub(super) fn enter<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.join()?;
                act()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `ip` commands inside, one a line.
    pub(super) fn ip(&self, lines: &str) -> Result<()> {
        self.enter(|| {
            let mut child = Command::new("ip")
                .args(["-batch", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .context("cannot run ip: is iproute2 installed?")?;
            // An ip that ended early tells why below.
            drop(child.stdin.take().map(|mut stdin| stdin.write_all(lines.as_bytes())));
            let output = child.wait_with_output().context("cannot wait for ip")?;
            if !output.status.success() {
                bail!(
                    "`ip -batch -` with `{}` in {}: {}",
                    lines.trim(),
                    self.file.display(),
                    String::from_utf8_lossy(&output.stderr).trim()
                );
            }
            Ok(())
        })
    }

    /// Sets sysctls inside, named by their paths.
    pub(super) fn sysctls(&self, all: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (key, value) in all {
                fs::write(Path::new("/proc/sys").join(key), value).with_context(|| {
                    format!("cannot set the sysctl {key} to {value} in {}", self.file.display())
                })?;
            }
            Ok(())
        })
    }
}
