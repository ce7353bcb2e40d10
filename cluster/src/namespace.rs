//! A network namespace of a cluster, held by a file.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use sluice_lab::netns;

use crate::state::State;

/// The file below the state directory holds the namespace by a mount.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    file: PathBuf,
}

impl Namespace {
    /// The namespace of that name, whether it exists or not.
    pub(crate) fn named(state: &State, name: &str) -> Self {
        Self { file: state.path("ns").join(name) }
    }

    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    pub(crate) fn exists(&self) -> bool {
        netns::exists(&self.file)
    }

    /// Makes it, empty but for `lo`, forwarding packets and sending none of its own accord.
    pub(crate) fn create(&self) -> Result<()> {
        let parent = self.file.parent().context("a namespace's file has a parent")?;
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        netns::make(&self.file)?;
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
    pub(crate) fn join(&self) -> Result<()> {
        netns::join(&self.file)
    }

    /// Runs a closure on a thread inside it. Processes that the closure starts are inside too.
    pub(crate) fn enter<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        netns::enter(&self.file, act)?
    }

    /// Runs `ip` commands inside, one a line.
    pub(crate) fn ip(&self, lines: &str) -> Result<()> {
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
    pub(crate) fn sysctls(&self, all: &[(&str, &str)]) -> Result<()> {
        netns::set_sysctls(&self.file, all)
    }
}
