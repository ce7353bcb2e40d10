//! Removes a lab by its id alone, which works for a lab of this process and of one that was killed.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;
use std::{ffi::CString, os::unix::ffi::OsStrExt};

use anyhow::{Context, Result};

use crate::{cgroup, mounts};

/// The directory of everything that the labs of this machine own, with one directory per lab.
pub(crate) const STATE: &str = "/run/sluice-lab";

/// The name of the file that marks a lab which outlives its owner.
pub(crate) const KEEP: &str = "keep";

/// The longest time that killed processes of a lab may keep its cgroup busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// The labs of this process, which a signal has to remove.
static OURS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Removes the labs of dead owners and returns their ids. Kept labs stay.
///
/// # Errors
/// If a part of such a lab cannot be removed; the others are removed all the same.
pub fn sweep() -> Result<Vec<String>> {
    remove_where(|lab| !lab.join(KEEP).exists() && !owner_lives(lab))
}

/// Removes the labs that were kept with `SLUICE_LAB_KEEP=1` or [`Lab::keep`](crate::Lab::keep), or
/// only the one with the given id, and returns their ids.
///
/// # Errors
/// If a part of such a lab cannot be removed; the others are removed all the same.
pub fn remove_kept(id: Option<&str>) -> Result<Vec<String>> {
    remove_where(|lab| {
        lab.join(KEEP).exists() && !owner_lives(lab) && id.is_none_or(|id| lab.ends_with(id))
    })
}

fn remove_where(chosen: impl Fn(&Path) -> bool) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let mut failed = None;
    for entry in fs::read_dir(STATE).into_iter().flatten().flatten() {
        let id = entry.file_name().to_string_lossy().into_owned();
        if owner_pid(&id).is_some() && chosen(&entry.path()) {
            match tear_down(&id) {
                Ok(()) => removed.push(id),
                Err(error) => {
                    failed = Some(error.context(format!("cannot remove what the lab {id} left")));
                }
            }
        }
    }
    removed.sort();
    failed.map_or(Ok(removed), Err)
}

/// Returns the pid in `slab<pid>-<start>-<n>`.
fn owner_pid(id: &str) -> Option<u32> {
    id.strip_prefix("slab")?.split_once('-')?.0.parse().ok()
}

/// Returns when a process started, in clock ticks since boot. With the pid it identifies a process
/// until the next boot.
pub(crate) fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name, in parentheses, may contain anything; field 22 is the 20th after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19).map(str::to_owned)
}

fn owner_lives(lab: &Path) -> bool {
    let started =
        lab.file_name().and_then(|id| owner_pid(&id.to_string_lossy())).and_then(start_time);
    // A lab without an owner is still being made.
    started.is_some_and(|now| {
        fs::read_to_string(lab.join("owner"))
            .map_or(true, |then| then.is_empty() || then.trim() == now)
    })
}

/// Removes a lab: its processes, mounts (namespaces and bpffs), cgroups and directory. A step that
/// fails does not keep the others from being tried.
pub(crate) fn tear_down(id: &str) -> Result<()> {
    let state = Path::new(STATE).join(id);
    let killed = cgroup::root().and_then(|root| cgroup::destroy(&[root.join(id)], PATIENCE));
    let unmounted = mounts::unmount_below(&state);
    let removed = match fs::remove_dir_all(&state) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", state.display()))
        }
        _ => Ok(()),
    };
    killed.and(unmounted).and(removed)
}

pub(crate) fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .with_context(|| format!("the path {} holds a NUL", path.display()))
}

/// Remembers a lab of this process, so that a signal removes it.
pub(crate) fn register(id: &str) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = watch_signals() {
            eprintln!("lab: SIGINT will leave the lab to the next sweep: {error:#}");
        }
    });
    OURS.lock().unwrap_or_else(PoisonError::into_inner).push(id.to_owned());
}

/// Forgets a lab that has been removed or is kept.
pub(crate) fn unregister(id: &str) {
    OURS.lock().unwrap_or_else(PoisonError::into_inner).retain(|ours| ours != id);
}

/// The pipe that the signal handler writes the signal's number to.
static SIGNAL_PIPE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_signal(signal: libc::c_int) {
    let byte = u8::try_from(signal).unwrap_or(0);
    // SAFETY: write(2) is async-signal-safe, the byte lives on this stack, and the pipe is never
    // closed.
    let _ =
        unsafe { libc::write(SIGNAL_PIPE.load(Ordering::Relaxed), (&raw const byte).cast(), 1) };
}

/// On SIGINT, SIGTERM and SIGHUP removes this process's labs, then exits with the status that the
/// signal would have caused.
fn watch_signals() -> Result<()> {
    let mut ends: [RawFd; 2] = [-1; 2];
    // SAFETY: `ends` has room for the two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot make a pipe for signals");
    }
    SIGNAL_PIPE.store(ends[1], Ordering::Relaxed);
    let _ = std::thread::Builder::new().name("lab-signals".into()).spawn(move || {
        let mut byte = 0u8;
        // SAFETY: one byte is read into one byte.
        while unsafe { libc::read(ends[0], (&raw mut byte).cast(), 1) } != 1 {}
        let labs = std::mem::take(&mut *OURS.lock().unwrap_or_else(PoisonError::into_inner));
        for id in labs {
            if let Err(error) = tear_down(&id) {
                eprintln!("lab: {error:#}");
            }
        }
        std::process::exit(128 + i32::from(byte));
    })?;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only writes to a pipe; sigaction's other fields are zero, which is
        // valid.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            if libc::sigaction(signal, &raw const action, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error())
                    .with_context(|| format!("cannot handle signal {signal}"));
            }
        }
    }
    Ok(())
}

/// Returns the directory of a lab.
pub(crate) fn state_of(id: &str) -> PathBuf {
    Path::new(STATE).join(id)
}
