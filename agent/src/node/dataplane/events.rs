//! Receives the programs' events.
//!
//! A ring has one reader, so one process receives at a time. It holds a lock on the folder of the
//! maps, which the kernel releases however the process ends. The programs stop sending by
//! themselves soon after.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::maps::{Map, MapData, RingBuf};
use sluice_common::abi::{Event, Listening};

use super::bpf::{self, Table};
use super::error::Error;
use super::maps::table;
use super::pins::Pins;

/// The time for which the programs send events after a request that is not renewed.
const LEASE: Duration = Duration::from_secs(3);

/// The reader of the ring of events.
pub(crate) struct Events {
    ring: RingBuf<MapData>,
    listening: Table<u32, Listening>,
    lost: Table<u32, u64>,
    folder: PathBuf,
    _lock: File,
}

impl Events {
    /// Becomes the reader of the ring, and discards what an earlier one has left in it. The
    /// programs send nothing before [`Self::listen`].
    ///
    /// # Errors
    ///
    /// Fails if there is another reader, or a map cannot be used.
    pub(crate) fn open(pins: &Pins) -> Result<Self, Error> {
        let folder = pins.maps();
        let lock = lock(&folder)?;
        let path = folder.join("events");
        let opened = |cause| Error::pin("open the pinned map", &path, cause);
        let map = MapData::from_pin(&path).map_err(|error| opened(io::Error::other(error)))?;
        let mut ring = RingBuf::try_from(Map::RingBuf(map))
            .map_err(|error| opened(io::Error::other(error)))?;
        let (listening, lost) = (table(&folder, "listening")?, table(&folder, "events_lost")?);
        while ring.next().is_some() {}
        Ok(Self { ring, listening, lost, folder, _lock: lock })
    }

    /// Requests the events that match a filter, for the next three seconds.
    ///
    /// # Errors
    ///
    /// Fails if the maps were replaced or removed meanwhile, or cannot be written.
    pub(crate) fn listen(&self, sieve: &Listening) -> Result<(), Error> {
        let path = self.folder.join("listening");
        let fd: OwnedFd = bpf::object_get(&path)
            .map_err(|cause| Error::pin("open the pinned map", &path, cause))?;
        let now =
            bpf::map_info(fd.as_fd()).map_err(|cause| Error::map("inspect", "listening", cause))?;
        if now.id != self.listening.id() {
            let cause = io::Error::other("an agent has replaced it: start `sluice trace` again");
            return Err(Error::map("go on with the", "listening", cause));
        }
        let until_ns = now_ns().saturating_add(LEASE.as_nanos() as u64);
        let sieve = Listening { until_ns, ..*sieve };
        self.listening.insert(&0, &sieve).map_err(|cause| Error::map("write", "listening", cause))
    }

    /// Takes the next event, if there is one.
    pub(crate) fn next(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            if item.len() == size_of::<Event>() {
                // SAFETY: as many bytes as an event has, and any bytes are one.
                return Some(unsafe { item.as_ptr().cast::<Event>().read_unaligned() });
            }
        }
    }

    /// Returns the number of events that were lost for lack of room since the maps were made.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub(crate) fn lost(&self) -> Result<u64, Error> {
        let counts =
            self.lost.get_all(&0).map_err(|cause| Error::map("read", "events_lost", cause))?;
        Ok(counts.unwrap_or_default().into_iter().fold(0, u64::wrapping_add))
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Events").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // If this fails, the request expires by itself.
        let _ = self.listening.insert(&0, &Listening::default());
    }
}

fn lock(folder: &Path) -> Result<File, Error> {
    let failed = |cause| Error::pin("lock", folder, cause);
    let file = File::open(folder).map_err(failed)?;
    // SAFETY: the descriptor is open.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(file);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EWOULDBLOCK) {
        return Err(Error::Listened { path: folder.to_owned() });
    }
    Err(failed(error))
}

/// Returns the nanoseconds since boot, by the programs' clock.
pub(crate) fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the struct is live; this clock always exists.
    let _ = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec
        .cast_unsigned()
        .wrapping_mul(1_000_000_000)
        .wrapping_add(time.tv_nsec.cast_unsigned())
}
