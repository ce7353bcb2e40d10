//! Network namespaces that are held by a file: made, entered and configured.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, anyhow};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// The file system of a file that holds a namespace (`NSFS_MAGIC` in linux/magic.h).
const NSFS: i64 = 0x6e73_6673;

/// Makes a network namespace and mounts it over a new file, which keeps it.
///
/// # Errors
/// If the file cannot be made, or the kernel refuses: this needs root.
pub fn make(file: &Path) -> Result<()> {
    drop(File::create(file).with_context(|| format!("cannot make {}", file.display()))?);
    let made = thread::scope(|scope| {
        let thread = scope.spawn(|| -> io::Result<()> {
            // SAFETY: no memory is unshared, and the new namespace is this thread's alone, which
            // ends here.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            rustix::mount::mount_bind("/proc/thread-self/ns/net", file)?;
            Ok(())
        });
        thread.join().map_err(|_| anyhow!("the thread that makes it panicked"))
    })?;
    made.with_context(|| {
        format!("cannot make the network namespace {}: is this root?", file.display())
    })
}

/// Reports whether a file holds a namespace.
pub fn exists(file: &Path) -> bool {
    rustix::fs::statfs(file).is_ok_and(|found| found.f_type == NSFS)
}

/// Moves this thread into a namespace.
///
/// # Errors
/// If the file holds none.
pub fn join(file: &Path) -> Result<()> {
    let namespace = File::open(file).with_context(|| {
        format!("cannot open the network namespace {}: has it been removed?", file.display())
    })?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter the network namespace {}", file.display()))
}

/// Runs a closure inside a namespace, on a thread of its own. Processes that it starts are inside
/// too.
///
/// # Errors
/// If the namespace cannot be entered.
pub fn enter<T: Send>(file: &Path, act: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            join(file)?;
            Ok(act())
        });
        // A failed assertion in the closure fails the test that called.
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Sets sysctls inside a namespace, named by their paths: `net/ipv4/conf/eth0/rp_filter`.
///
/// # Errors
/// If one cannot be set.
pub fn set_sysctls(file: &Path, all: &[(&str, &str)]) -> Result<()> {
    enter(file, || {
        for (key, value) in all {
            fs::write(Path::new("/proc/sys").join(key), value).with_context(|| {
                format!(
                    "cannot set the sysctl {key} to {value} in the network namespace {}",
                    file.display()
                )
            })?;
        }
        Ok(())
    })?
}
