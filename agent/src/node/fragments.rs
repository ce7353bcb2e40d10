//! Holds fragments that arrive before their datagram's first one, until that one was seen.
//!
//! The programs send such a fragment out of our own device, behind a label (see
//! [`sluice_common::path::fragment`]), where a socket of this module receives it. Once the first
//! fragment has revealed the ports, the held one returns through the own device to where it came
//! from, and follows the first one. If the first fragment does not arrive within `WAIT`, the held
//! one passes untouched, and so does the rest of its datagram.
//!
//! Room is shared among devices, and among the sources behind each (see the module `waiting`). A
//! fragment without room passes untouched immediately, as do all early ones while no agent runs:
//! the programs send fragments only while this module requests them, every `ATTEND`.

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

/// The time for which a fragment waits for its datagram's first one.
const WAIT: Duration = Duration::from_millis(500);
/// The interval at which waiting fragments are checked.
const LOOK: Duration = Duration::from_millis(2);
/// The interval at which fragments are requested from the programs.
const ATTEND: Duration = Duration::from_secs(1);
/// The most frames that are received between two checks, which bounds the cost of a flood.
const BURST: usize = 256;

/// Holds fragments in a thread of its own, for as long as the process and the device exist.
///
/// # Errors
///
/// Fails if the socket, the maps or the thread cannot be made.
pub fn start(own_device: u32, maps: &Path) -> anyhow::Result<()> {
    let socket = Socket::open(own_device).context("cannot listen on our own device")?;
    let datagrams = Datagrams::open(maps)?;
    datagrams.request(ticks())?;
    let keeper =
        Keeper { socket, datagrams, waiting: Waiting::default(), attended: Instant::now() };
    let _thread =
        thread::Builder::new().name("fragments".to_owned()).spawn(move || keeper.run())?;
    Ok(())
}

/// The socket, the maps and the waiting fragments.
#[derive(Debug)]
struct Keeper {
    socket: Socket,
    datagrams: Datagrams,
    waiting: Waiting,
    /// The time at which fragments were last requested.
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

    /// Waits for fragments or the time of the next check. Receives new fragments, and sends those
    /// whose time has come.
    fn step(&mut self) -> anyhow::Result<()> {
        if self.attended.elapsed() >= ATTEND {
            self.datagrams.request(ticks())?;
            self.attended = Instant::now();
        }
        let mut crowded = Vec::new();
        if self.socket.wait(if self.waiting.is_empty() { ATTEND } else { LOOK })? {
            for _ in 0..BURST {
                let Some(labelled) = self.socket.receive()? else { break };
                if let Some(frame) = frame::read(labelled) {
                    crowded.extend(self.waiting.hold(Kept { frame, since: Instant::now() }));
                }
            }
            // The first fragments of these were unknown a moment ago.
            thread::sleep(LOOK);
        }
        let now = ticks();
        let mut first_error = None;
        let mut note = |error: anyhow::Error| {
            let _ = first_error.get_or_insert(error);
        };
        for kept in
            self.waiting.take_known(|key| self.datagrams.is_known(key, now).unwrap_or(false))
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

/// Returns the time by the programs' clock.
pub(crate) fn ticks() -> Ticks {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the struct is live.
    let _ = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    let ns = time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned();
    (ns >> TICK_SHIFT) as Ticks
}

/// Returns the last call's failure, unless it would only have blocked.
fn outcome(result: isize) -> io::Result<Option<usize>> {
    if let Ok(length) = usize::try_from(result) {
        return Ok(Some(length));
    }
    let error = io::Error::last_os_error();
    let is_idle = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
    if is_idle { Ok(None) } else { Err(error) }
}
