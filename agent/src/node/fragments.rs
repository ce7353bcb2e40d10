//! Keeps fragments that came before their datagram's first one, until that one has been seen.
//!
//! The programs send such a fragment out of our own device, behind a label (see
//! [`sluice_common::path::fragment`]). A socket of this module listens there; when the first
//! fragment has told its ports, the fragment goes back to where it was met, by the own device
//! again, and takes the first one's way. One whose first fragment does not come within `WAIT` goes
//! on untouched, as the rest of its datagram then does.
//!
//! Room is shared among devices, and among the sources behind each (see the module `waiting`). What
//! finds none goes on untouched at once, as do all that come early while no agent runs: the
//! programs hold fragments only as long as this module says, every `ATTEND`, that it keeps them.

mod frame;
mod socket;
mod waiting;

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use sluice_common::abi::{TICK_SHIFT, Ticks};

use crate::node::dataplane::Datagrams;
use socket::Socket;
use waiting::{Kept, Waiting};

/// How long a fragment waits for its datagram's first one.
const WAIT: Duration = Duration::from_millis(500);
/// How often waiting fragments are asked for.
const LOOK: Duration = Duration::from_millis(2);
/// How often the programs are told that somebody keeps fragments.
const ATTEND: Duration = Duration::from_secs(1);
/// Frames taken in between two looks: a flood costs no more than this.
const BURST: usize = 256;

/// Keeps fragments in a thread of its own, as long as the process and the device live.
///
/// # Errors
///
/// When socket, maps or thread cannot be had.
pub fn start(own_device: u32, maps: &Path) -> anyhow::Result<()> {
    let socket = Socket::open(own_device).context("cannot listen on our own device")?;
    let datagrams = Datagrams::open(maps)?;
    datagrams.attend(ticks())?;
    let keeper =
        Keeper { socket, datagrams, waiting: Waiting::default(), attended: Instant::now() };
    let _thread =
        thread::Builder::new().name("fragments".to_owned()).spawn(move || keeper.run())?;
    Ok(())
}

/// Socket, maps and what waits.
#[derive(Debug)]
struct Keeper {
    socket: Socket,
    datagrams: Datagrams,
    waiting: Waiting,
    /// When the programs were last told.
    attended: Instant,
}

impl Keeper {
    fn run(mut self) {
        let mut failing = false;
        loop {
            let result = self.step();
            match result {
                Ok(()) => failing = false,
                Err(_) if self.socket.is_device_gone() => {
                    tracing::debug!(
                        "our own device is gone, and with it the fragments that waited"
                    );
                    return;
                }
                Err(error) => {
                    if !failing {
                        tracing::warn!(
                            "cannot keep fragments that come before their first one: {error:#}"
                        );
                    }
                    failing = true;
                    thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }

    /// Waits for fragments, or for the time to look again; takes in those, and sends on whose time
    /// has come.
    fn step(&mut self) -> anyhow::Result<()> {
        if self.attended.elapsed() >= ATTEND {
            self.datagrams.attend(ticks())?;
            self.attended = Instant::now();
        }
        let mut crowded = Vec::new();
        if self.socket.wait(if self.waiting.is_empty() { ATTEND } else { LOOK })? {
            for _ in 0..BURST {
                let Some(labelled) = self.socket.receive()? else { break };
                if let Some(frame) = frame::read(labelled) {
                    crowded.extend(self.waiting.take_in(Kept { frame, since: Instant::now() }));
                }
            }
            // Whatever has come was not told a moment ago.
            thread::sleep(LOOK);
        }
        let now = ticks();
        let mut first_error = None;
        let mut note = |error: anyhow::Error| {
            let _ = first_error.get_or_insert(error);
        };
        for kept in self.waiting.take_told(|key| self.datagrams.is_told(key, now).unwrap_or(false))
        {
            self.socket.send(&kept.frame).unwrap_or_else(|error| note(error.into()));
        }
        let late = Instant::now()
            .checked_sub(WAIT)
            .map(|late| self.waiting.take_older(late))
            .unwrap_or_default();
        for kept in crowded.into_iter().chain(late) {
            let result = self.datagrams.give_up(&kept.frame.key, now).map_err(anyhow::Error::from);
            result.and_then(|()| Ok(self.socket.send(&kept.frame)?)).unwrap_or_else(&mut note);
        }
        first_error.map_or(Ok(()), Err)
    }
}

/// The time as the programs have it.
pub(crate) fn ticks() -> Ticks {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the struct is live.
    let _ = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    let ns = time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned();
    (ns >> TICK_SHIFT) as Ticks
}

/// The last call's failure, unless there was just nothing to do.
fn outcome(result: isize) -> io::Result<Option<usize>> {
    if let Ok(length) = usize::try_from(result) {
        return Ok(Some(length));
    }
    let error = io::Error::last_os_error();
    let is_idle = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
    if is_idle { Ok(None) } else { Err(error) }
}
