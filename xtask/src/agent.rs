//! Builds the `sluice` binary.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use object::elf;
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use sluice_cluster::process::Cmd;
use sluice_cluster::ui::bytes;

use crate::artifacts;
use crate::version::Rustc;
use crate::workspace::{OBJECT_ENV, Workspace};

/// Builds it for tests and the demo, with the profile that builds fastest: packets meet only the
/// eBPF object, which is always optimised.
pub(crate) fn build_dev(workspace: &Workspace) -> Result<PathBuf> {
    artifacts::build_binary(workspace.cargo().args([
        "build",
        "--package",
        "sluice",
        "--bin",
        "sluice",
    ]))
    .context("cannot build the agent")
}

/// Builds the agent of the layout that tests upgrade to. It shares its dependencies with the agent
/// under test.
pub(crate) fn build_next(workspace: &Workspace) -> Result<PathBuf> {
    let built =
        artifacts::build_binary(workspace.cargo().env(OBJECT_ENV, workspace.next_object()).args([
            "build",
            "--workspace",
            "--bin",
            "sluice",
            "--features",
            "sluice/next-layout",
        ]))
        .context("cannot build the agent of the next layout")?;
    // Cargo will write the agent under test to the same file.
    let next = built.with_file_name("sluice-next");
    let _ = fs::copy(&built, &next).with_context(|| format!("cannot write {}", next.display()))?;
    Ok(next)
}

/// Builds it for use: optimised, as one static file that runs on any distribution and in an empty
/// image.
pub(crate) fn build_release(workspace: &Workspace) -> Result<PathBuf> {
    let rustc = Cmd::new("rustc").dir(workspace.root()).arg("-vV").stdout()?;
    let host = Rustc::parse(&rustc).context("cannot read `rustc -vV`")?.host;
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    let binary = artifacts::build_binary(
        workspace
            .cargo()
            .env("RUSTFLAGS", format!("{flags} -C target-feature=+crt-static").trim())
            .args(["build", "--package", "sluice", "--bin", "sluice", "--release"])
            // With an explicit target the flags apply to the binary only, not to build scripts and
            // macros, which must stay dynamic.
            .args(["--target", &host]),
    )
    .context("cannot build the agent")?;
    let content = fs::read(&binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let _machine = static_architecture(&content)
        .with_context(|| format!("{} cannot be used", binary.display()))?;
    println!("{} {}", binary.display(), bytes(content.len() as u64));
    Ok(binary)
}

/// Whether a binary is static.
pub(crate) fn is_static(binary: &Path) -> Result<bool> {
    let content = fs::read(binary).with_context(|| format!("cannot read {}", binary.display()))?;
    Ok(!has_interpreter(&parse(&content)?))
}

fn parse(binary: &[u8]) -> Result<ElfFile64<'_>> {
    ElfFile64::parse(binary).context("it is no 64-bit ELF file")
}

fn has_interpreter(file: &ElfFile64<'_>) -> bool {
    let endian = file.endian();
    file.elf_program_headers().iter().any(|header| header.p_type(endian) == elf::PT_INTERP)
}

/// Returns Rust's name of the machine that a static binary is for.
///
/// # Errors
/// If it is no ELF binary or needs a dynamic linker.
pub(crate) fn static_architecture(binary: &[u8]) -> Result<&'static str> {
    let file = parse(binary)?;
    let endian = file.endian();
    if file.elf_program_headers().iter().any(|header| header.p_type(endian) == elf::PT_INTERP) {
        bail!(
            "it is not static: it names a dynamic linker; `cargo xtask build` makes a static one"
        );
    }
    match file.elf_header().e_machine(endian) {
        elf::EM_X86_64 => Ok("x86_64"),
        elf::EM_AARCH64 => Ok("aarch64"),
        other => bail!("its machine ({other}) is neither x86_64 nor aarch64"),
    }
}
