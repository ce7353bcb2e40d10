//! The compiler and linker for the eBPF object.
//!
//! Stable rustc has no core library for `bpfel-unknown-none`. Two compilers have one: Debian's
//! `rustc-web`, for which the library is a package, and a rustup nightly with `rust-src`, which
//! builds it (`-Z build-std`). Both produce the same instructions here. Whichever is installed is
//! used, preferably Debian's, because it needs nothing from the network.
//!
//! bpf-linker reads the compiler's bitcode, so its LLVM must have the same major version. It is
//! built once and kept in the cache.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use sluice_cluster::cache::Cache;
use sluice_cluster::packages;
use sluice_cluster::process::{Cmd, find_program, newest_line, programs};
use sluice_cluster::ui::Step;

use crate::version::Rustc;
use crate::workspace::Workspace;

const LINKER_VERSION: &str = "0.13.0";

/// The LLVM versions that this bpf-linker can be built with.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// The LLVM of the `rustc-web` that apt would install.
const DEBIAN_LLVM: u32 = 22;

/// Variables that rustup and cargo set for children. They are meant for the compiler that built
/// this program, not for another one.
const INHERITED: &[&str] = &[
    "RUSTUP_TOOLCHAIN",
    "RUSTC",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
    "LD_LIBRARY_PATH",
];

/// The choice of a compiler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Choice {
    /// One that is installed, else Debian's by apt-get (as root).
    #[default]
    Auto,
    /// The rustup toolchain `nightly`; it needs the component rust-src.
    Nightly,
    /// A rustc outside rustup that has a core library for BPF.
    System,
}

/// A compiler that can build for BPF.
#[derive(Debug)]
enum Compiler {
    System { rustc: PathBuf, version: Rustc },
    Nightly { version: Rustc },
}

impl Compiler {
    fn llvm_major(&self) -> u32 {
        match self {
            Self::System { version, .. } | Self::Nightly { version } => version.llvm_major,
        }
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System { rustc, version } => write!(f, "{} {}", rustc.display(), version.release),
            Self::Nightly { version } => write!(f, "rustup nightly {}", version.release),
        }
    }
}

/// A compiler with its linker, ready to use.
#[derive(Debug)]
pub(crate) struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
}

impl Toolchain {
    /// Returns `cargo build` for the BPF target, without package and profile.
    pub(crate) fn cargo_build(&self, workspace: &Workspace) -> Cmd {
        match &self.compiler {
            // A plain `cargo` is rustup's proxy, or the only one installed.
            Compiler::System { rustc, .. } => {
                self.clean(workspace, workspace.cargo(), Some(rustc)).arg("build")
            }
            Compiler::Nightly { .. } => self.clean(workspace, Cmd::new("rustup"), None).args([
                "run",
                "nightly",
                "cargo",
                "build",
                "-Z",
                "build-std=core",
            ]),
        }
    }

    /// Returns `cargo clippy` for the BPF target, without package and profile. Clippy reads
    /// metadata of its own compiler only, so it comes with that compiler; Debian's is installed if
    /// missing.
    ///
    /// # Errors
    /// Says what to install if it is missing and this is not root.
    pub(crate) fn cargo_clippy(&self, workspace: &Workspace) -> Result<Cmd> {
        match &self.compiler {
            Compiler::System { rustc, .. } => {
                let clippy = rustc.with_file_name("cargo-clippy");
                if !clippy.exists() {
                    packages::install(&[packages::BPF_CLIPPY])
                        .with_context(|| format!("no clippy beside {}", rustc.display()))?;
                }
                Ok(self.clean(workspace, Cmd::new(clippy), Some(rustc)).arg("clippy"))
            }
            Compiler::Nightly { .. } => Ok(self.clean(workspace, Cmd::new("rustup"), None).args([
                "run",
                "nightly",
                "cargo",
                "clippy",
                "-Z",
                "build-std=core",
            ])),
        }
    }

    fn clean(&self, workspace: &Workspace, command: Cmd, rustc: Option<&PathBuf>) -> Cmd {
        let command = command
            .without_env(INHERITED)
            .dir(workspace.root())
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &self.linker);
        match rustc {
            // aya-ebpf uses inline assembly, which is unstable for BPF.
            Some(rustc) => command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1"),
            None => command,
        }
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, bpf-linker {LINKER_VERSION} with LLVM {}",
            self.compiler,
            self.compiler.llvm_major()
        )
    }
}

/// Finds a compiler and its linker, and installs what is missing if it can.
///
/// # Errors
/// Says what to install if nothing was found and this is not root.
pub(crate) fn obtain(cache: &Cache, choice: Choice) -> Result<Toolchain> {
    let mut found = candidates(choice);
    // Prefer one that needs no package.
    found.sort_by_key(|compiler| missing_llvm(cache, compiler.llvm_major()).is_some());
    let compiler = match found.into_iter().next() {
        Some(compiler) => compiler,
        None => install_compiler(choice)?,
    };
    let linker = obtain_linker(cache, compiler.llvm_major())?;
    Ok(Toolchain { compiler, linker })
}

fn candidates(choice: Choice) -> Vec<Compiler> {
    let (system, nightly) = match choice {
        Choice::Auto => (find_system(), find_nightly()),
        Choice::System => (find_system(), None),
        Choice::Nightly => (None, find_nightly()),
    };
    system.into_iter().chain(nightly).collect()
}

fn install_compiler(choice: Choice) -> Result<Compiler> {
    const NIGHTLY: &str = "rustup toolchain install nightly --component rust-src";
    if choice == Choice::Nightly {
        bail!("no usable rustup nightly with rust-src; install it with: {NIGHTLY}");
    }
    // The linker will need LLVM: one apt-get for both.
    let llvm = llvm_package(DEBIAN_LLVM);
    let packages: Vec<_> = packages::BPF_RUSTC.iter().copied().chain([llvm.as_str()]).collect();
    packages::install(&packages).with_context(|| {
        format!("no compiler for the eBPF programs; rustup's nightly would do as well: {NIGHTLY}")
    })?;
    find_system().context(
        "the packages are installed, but no rustc on this system has a core library for BPF",
    )
}

fn is_usable(version: &Rustc) -> bool {
    version.is_at_least(env!("CARGO_PKG_RUST_VERSION")) && LINKER_LLVM.contains(&version.llvm_major)
}

fn find_system() -> Option<Compiler> {
    programs("rustc").find_map(|rustc| {
        let ask = |args: &[&str]| Cmd::new(&rustc).without_env(INHERITED).args(args).probe().ok();
        let sysroot = ask(&["--print", "sysroot"])?;
        if !Path::new(sysroot.trim()).join("lib/rustlib/bpfel-unknown-none").is_dir() {
            return None;
        }
        let version = Rustc::parse(&ask(&["-vV"])?).filter(is_usable)?;
        Some(Compiler::System { rustc, version })
    })
}

fn find_nightly() -> Option<Compiler> {
    let ask = |args: &[&str]| {
        Cmd::new("rustup")
            .without_env(INHERITED)
            // A question must not install a toolchain.
            .env("RUSTUP_AUTO_INSTALL", "0")
            .args(["run", "nightly", "rustc"])
            .args(args)
            .probe()
            .ok()
    };
    let sysroot = ask(&["--print", "sysroot"])?;
    let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/Cargo.lock");
    if !library.is_file() {
        return None;
    }
    let version = Rustc::parse(&ask(&["-vV"])?).filter(is_usable)?;
    Some(Compiler::Nightly { version })
}

fn llvm_package(major: u32) -> String {
    format!("llvm-{major}-dev")
}

fn linker_entry(llvm_major: u32) -> String {
    format!("tools/bpf-linker-{LINKER_VERSION}-llvm-{llvm_major}")
}

/// Whether the linker runs: its file may exist while the LLVM that it was linked with does not.
fn linker_works(directory: &Path) -> bool {
    Cmd::new(linker_in(directory))
        .arg("--version")
        .probe()
        .is_ok_and(|output| output.trim() == format!("bpf-linker {LINKER_VERSION}"))
}

fn linker_in(directory: &Path) -> PathBuf {
    directory.join("bin/bpf-linker")
}

/// Returns the package that the linker needs before it can be built, if any.
fn missing_llvm(cache: &Cache, major: u32) -> Option<String> {
    let has_linker = linker_works(&cache.path(&linker_entry(major)));
    (!has_linker && llvm_prefix(major).is_none()).then(|| llvm_package(major))
}

/// Returns the prefix of an LLVM of that version with its development files.
fn llvm_prefix(major: u32) -> Option<PathBuf> {
    let of = |config: PathBuf| {
        let version = Cmd::new(&config).arg("--version").probe().ok()?;
        if version.split('.').next()?.trim().parse() != Ok(major) {
            return None;
        }
        let prefix = PathBuf::from(Cmd::new(&config).arg("--prefix").probe().ok()?.trim());
        prefix.join("lib/libLLVM.so").exists().then_some(prefix)
    };
    std::env::var_os("LLVM_PREFIX")
        .map(|prefix| PathBuf::from(prefix).join("bin/llvm-config"))
        .into_iter()
        .chain(find_program(&format!("llvm-config-{major}")))
        .chain(find_program("llvm-config"))
        .chain([PathBuf::from(format!("/usr/lib/llvm-{major}/bin/llvm-config"))])
        .find_map(of)
}

fn obtain_linker(cache: &Cache, llvm_major: u32) -> Result<PathBuf> {
    if let Some(package) = missing_llvm(cache, llvm_major) {
        packages::install(&[package.as_str()]).with_context(|| {
            format!("bpf-linker needs the development files of LLVM {llvm_major}")
        })?;
    }
    let directory = cache.ensure(&linker_entry(llvm_major), linker_works, |directory| {
        let prefix = llvm_prefix(llvm_major).with_context(|| {
            format!("no LLVM {llvm_major} with its development files on this system")
        })?;
        build_linker(directory, llvm_major, &prefix)
    })?;
    Ok(linker_in(&directory))
}

fn build_linker(directory: &Path, llvm_major: u32, llvm_prefix: &Path) -> Result<()> {
    let step = Step::start_long(format!(
        "bpf-linker {LINKER_VERSION} for LLVM {llvm_major}: cargo install"
    ));
    let build = directory.join("build");
    Cmd::new("cargo")
        .without_env(INHERITED)
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm_major}")])
        .arg("--root")
        .arg(directory)
        .arg("--target-dir")
        .arg(&build)
        .env("LLVM_PREFIX", llvm_prefix)
        .run_behind(&step, newest_line)
        .context("cannot build bpf-linker")?;
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))?;
    step.done("installed");
    Ok(())
}
