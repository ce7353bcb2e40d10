//! Tens of thousands of connections at once.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use sluice_lab::Event;

use crate::load::more_descriptors;
use crate::socket::{any, connect, ms_since, plain, report};

/// Number of connections that the kernel keeps for a server that does not accept them, as far as
/// `net.core.somaxconn` allows.
const BACKLOG: libc::c_int = 65_535;

#[derive(Args)]
pub(crate) struct Opening {
    /// Whom to connect to.
    #[arg(long)]
    to: SocketAddr,
    /// Number of connections.
    #[arg(long)]
    count: u64,
    /// Milliseconds that each may take.
    #[arg(long, default_value_t = 3000)]
    timeout_ms: u64,
    /// Give up after so many that failed.
    #[arg(long, default_value_t = 1)]
    failures: u64,
    /// Milliseconds to keep them open afterwards.
    #[arg(long, default_value_t = 0)]
    hold_ms: u64,
}

/// Lets the kernel establish connections, and accepts none: each would cost a descriptor.
pub(crate) fn hold(address: SocketAddr) -> Result<()> {
    let listener =
        TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    // SAFETY: the descriptor is live; listening again only changes the backlog.
    if unsafe { libc::listen(listener.as_raw_fd(), BACKLOG) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot make room for connections");
    }
    report(&Event::Listening { address: listener.local_addr()? });
    loop {
        thread::park();
    }
}

pub(crate) fn open(opening: &Opening) -> Result<bool> {
    more_descriptors()?;
    let start = Instant::now();
    let mut open = Vec::new();
    let (mut sent, mut failed) = (0, 0);
    while sent < opening.count && failed < opening.failures {
        match connect(opening.to, any(opening.to), Duration::from_millis(opening.timeout_ms)) {
            Ok(stream) => {
                if open.is_empty() {
                    let (local, peer) = (plain(stream.local_addr()?), plain(stream.peer_addr()?));
                    report(&Event::Connected { local, peer });
                }
                open.push(stream);
            }
            Err(error) => {
                failed += 1;
                report(&Event::Lost {
                    seq: sent,
                    reason: format!("{error:#}"),
                    at_ms: ms_since(start),
                });
            }
        }
        sent += 1;
    }
    let received = open.len() as u64;
    report(&Event::Done { sent, received, bytes: 0, elapsed_ms: ms_since(start) });
    thread::sleep(Duration::from_millis(opening.hold_ms));
    Ok(failed == 0)
}
