//! Errors of the agent at the kernel.

use std::io;
use std::path::PathBuf;

/// An error, which says what was tried, on what, why it failed and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The binary carries no BPF object.
    #[error(
        "this binary was built without the BPF object; run `cargo xtask build` and use the binary it makes"
    )]
    NoObject,
    /// The BPF object is unreadable.
    #[error("cannot read the built-in BPF object: {0}; rebuild with `cargo xtask build`")]
    Object(String),
    /// The kernel refused a map or a program.
    #[error("cannot load the BPF object into the kernel: {what}: {cause}{hint}")]
    Load {
        /// The map or program.
        what: String,
        /// The kernel's or the loader's message.
        cause: String,
        /// A hint at what to do next.
        hint: &'static str,
    },
    /// Nothing of Sluice is pinned there.
    #[error(
        "nothing of Sluice is pinned under {path}; is the agent running with this --pin-path? (`sluice agent --pin-path {path}`)"
    )]
    NothingPinned {
        /// The pin path.
        path: PathBuf,
    },
    /// The ring of events already has a reader.
    #[error(
        "another `sluice trace` listens to what is pinned under {path}, and the ring of events has one reader; end it, or wait (a killed one is gone at once)"
    )]
    Listened {
        /// The folder of the maps.
        path: PathBuf,
    },
    /// A file of the BPF file system could not be used.
    #[error("cannot {action} {path}: {cause}{hint}")]
    Pin {
        /// The action that was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
        /// A hint at what to do next.
        hint: &'static str,
    },
    /// A map could not be read or written.
    #[error("cannot {action} map {map}: {cause}{hint}")]
    Map {
        /// The action that was tried.
        action: &'static str,
        /// On what.
        map: String,
        /// The cause.
        cause: io::Error,
        /// A hint at what to do next.
        hint: &'static str,
    },
    /// A program could not be attached.
    #[error("cannot attach {program} to {target}: {cause}{hint}")]
    Attach {
        /// The program.
        program: String,
        /// Device or cgroup.
        target: String,
        /// The cause.
        cause: io::Error,
        /// A hint at what to do next.
        hint: &'static str,
    },
}

/// Returns what to do about a refused system call.
pub(crate) fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (and CAP_SYS_ADMIN where a BPF file system has to be mounted)"
        }
        Some(libc::ENOMEM) => "; the node is short of memory for maps, see --flows-max",
        Some(libc::E2BIG) => "; the map is full",
        Some(libc::EINVAL) => "; the kernel may be too old, Linux 6.1 or newer is needed",
        _ => "",
    }
}

impl Error {
    pub(crate) fn pin(action: &'static str, path: impl Into<PathBuf>, cause: io::Error) -> Self {
        let hint = hint(&cause);
        Self::Pin { action, path: path.into(), cause, hint }
    }

    pub(crate) fn map(action: &'static str, map: impl Into<String>, cause: io::Error) -> Self {
        let hint = hint(&cause);
        Self::Map { action, map: map.into(), cause, hint }
    }

    pub(crate) fn attach(program: &str, target: impl Into<String>, cause: io::Error) -> Self {
        let hint = hint(&cause);
        Self::Attach { program: program.to_owned(), target: target.into(), cause, hint }
    }

    /// Whether the target of an attachment has vanished meanwhile, which is no error of a device.
    pub(crate) fn is_vanished(&self) -> bool {
        matches!(self, Self::Attach { cause, .. } if matches!(cause.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)))
    }
}
