//! Loads and verifies the programs, with pinned maps.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use sluice_common::abi::previous::{self, Round};

use super::error::{Error, hint};
use super::object::Spec;

/// Programs for devices that many nodes do not have. Verifying one takes a fifth of a second and,
/// for that time, tens of megabytes.
const ON_DEMAND: [&str; 3] = ["tc_ingress_l3", "tc_egress_l3", "xdp_uplink"];

/// The verified programs.
#[derive(Debug)]
pub(super) struct Programs {
    ebpf: Ebpf,
}

impl Programs {
    /// Has a program verified, unless it already is.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses it.
    pub(super) fn need(&mut self, name: &str) -> Result<(), Error> {
        self.ebpf.program_mut(name).map_or(Ok(()), |program| verify(name, program))
    }

    /// Returns the descriptor of a verified program.
    pub(super) fn fd(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        let missing = || Error::Load {
            what: format!("program {name}"),
            cause: "the object has none of this name".to_owned(),
            hint: "; rebuild with `cargo xtask build`",
        };
        let program = self.ebpf.program(name).ok_or_else(missing)?;
        program.fd().map(AsFd::as_fd).map_err(|_| missing())
    }
}

/// Loads programs whose maps are pinned.
#[derive(Debug)]
pub(super) struct Loader {
    object: &'static [u8],
    pub(super) folder: PathBuf,
    specs: BTreeMap<String, Spec>,
    sizes: BTreeMap<String, u32>,
}

impl Loader {
    /// Creates a loader for maps of these specifications and sizes, pinned in a folder.
    pub(super) fn new(
        object: &'static [u8],
        folder: PathBuf,
        specs: BTreeMap<String, Spec>,
        sizes: BTreeMap<String, u32>,
    ) -> Self {
        Self { object, folder, specs, sizes }
    }

    /// Returns the specifications of this layout's maps.
    pub(super) fn specs(&self) -> &BTreeMap<String, Spec> {
        &self.specs
    }

    /// Returns the folder in which the maps are pinned.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Loads every program that all nodes need, with the maps of the previous layout from the
    /// folder `before`.
    ///
    /// # Errors
    ///
    /// Fails if a map or a program is refused; nothing is attached yet.
    pub(super) fn programs(&self, round: Round, before: Option<&Path>) -> Result<Programs, Error> {
        let mut pins: BTreeMap<String, PathBuf> =
            self.specs.keys().map(|name| (name.clone(), self.folder.join(name))).collect();
        if let Some(before) = before {
            pins.extend(previous::CHANGED.iter().map(|name| (old_name(name), before.join(name))));
        }
        let mut sizes = self.sizes.clone();
        if before.is_some() {
            let same =
                self.sizes.iter().filter(|(name, _)| previous::CHANGED.contains(&name.as_str()));
            sizes.extend(same.map(|(name, size)| (old_name(name), *size)));
        }
        let mut ebpf = load_object(self.object, &pins, &sizes, round)?;
        for (name, program) in ebpf.programs_mut().filter(|(name, _)| !ON_DEMAND.contains(name)) {
            verify(name, program)?;
        }
        Ok(Programs { ebpf })
    }
}

/// Loads the object's maps, and pins those in `pins`.
pub(super) fn load_object(
    object: &[u8],
    pins: &BTreeMap<String, PathBuf>,
    sizes: &BTreeMap<String, u32>,
    round: Round,
) -> Result<Ebpf, Error> {
    let mut loader = EbpfLoader::new();
    let number = round as u32;
    if previous::LAYOUT.is_some() {
        let _ = loader.override_global(previous::ROUND, &number, true);
    }
    for (map, path) in pins {
        let _ = loader.map_pin_path(map, path);
    }
    // No program uses these maps in this round, but the object contains them.
    let idle: Vec<String> = previous::CHANGED
        .iter()
        .map(|map| old_name(map))
        .filter(|map| !pins.contains_key(map))
        .collect();
    for map in &idle {
        let _ = loader.map_max_entries(map, 1);
    }
    for (map, size) in sizes {
        let _ = loader.map_max_entries(map, *size);
    }
    loader.load(object).map_err(|error| Error::Load {
        what: "maps".to_owned(),
        hint: os_error(&error).map_or("", |error| hint(&error)),
        cause: chain(&error),
    })
}

/// The number of attempts to load a program whose verification is interrupted by a signal, as in
/// libbpf.
const VERIFY_TRIES: u32 = 5;

pub(super) fn verify(name: &str, program: &mut Program) -> Result<(), Error> {
    let is_interrupted = |result: &Result<(), ProgramError>| {
        let error = result.as_ref().err().and_then(|error| os_error(error));
        error.is_some_and(|error| error.raw_os_error() == Some(libc::EAGAIN))
    };
    let mut tries = 1;
    let result = loop {
        let Some(result) = load(program) else {
            tracing::warn!(
                program = name,
                "the object has a program of a kind that this agent does not know"
            );
            return Ok(());
        };
        if tries == VERIFY_TRIES || !is_interrupted(&result) {
            break result;
        }
        tries += 1;
    };
    match result {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(Error::Load {
            what: format!("program {name}"),
            hint: match os_error(&error).and_then(|error| error.raw_os_error()) {
                Some(libc::EPERM) => hint(&std::io::Error::from_raw_os_error(libc::EPERM)),
                Some(libc::EAGAIN) => {
                    "; signals have interrupted its verification each time: try again"
                }
                _ => {
                    "; the verifier of this kernel refuses the program: please report it, with `uname -r`"
                }
            },
            cause: tail(&chain(&error)),
        }),
    }
}

/// Loads a program. Returns [`None`] if it is of an unknown kind.
fn load(program: &mut Program) -> Option<Result<(), ProgramError>> {
    Some(if let Program::SchedClassifier(program) = program {
        program.load()
    } else if let Program::Xdp(program) = program {
        program.load()
    } else if let Program::CgroupSockAddr(program) = program {
        program.load()
    } else if let Program::CgroupSock(program) = program {
        program.load()
    } else if let Program::SockOps(program) = program {
        program.load()
    } else {
        return None;
    })
}

/// Lifts the limit of locked memory, against which kernels before 5.11 count maps. On later ones it
/// has no effect.
pub(super) fn lift_memlock() {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the struct is live. A refusal shows itself when a map is made.
    let _ = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
}

/// Formats an error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn os_error(error: &(dyn std::error::Error + 'static)) -> Option<std::io::Error> {
    let mut source = Some(error);
    while let Some(error) = source {
        if let Some(code) =
            error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error)
        {
            return Some(std::io::Error::from_raw_os_error(code));
        }
        source = error.source();
    }
    None
}

/// Returns the last lines of a verifier's log, which contain the reason.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n")
}

/// Returns the object's name for a map of the previous layout.
pub(super) fn old_name(map: &str) -> String {
    format!("{}{map}", previous::PREFIX)
}
