//! The `sluice` binary.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use object::elf;
use object::read::elf::{ElfFile64, ProgramHeader};

use crate::artifacts;
use crate::process::Cmd;
use crate::ui::bytes;
use crate::version::Rustc;
use crate::workspace::{OBJECT_ENV, Workspace};

/// Builds it for tests and the demo. What packets meet is the eBPF object,
/// which is optimised in any case, so the profile that is quick to build does.
pub(crate) fn build_dev(workspace: &Workspace) -> Result<PathBuf> {
    artifacts::build_binary(workspace.cargo().args(["build", "--package", "sluice", "--bin", "sluice"]))
        .context("cannot build the agent")
}

/// Builds the agent of the layout that tests upgrade to, beside the one under test, whose dependencies it shares.
pub(crate) fn build_next(workspace: &Workspace) -> Result<PathBuf> {
    let built = artifacts::build_binary(workspace.cargo().env(OBJECT_ENV, workspace.next_object()).args([
        "build",
        "--workspace",
        "--bin",
        "sluice",
        "--features",
        "sluice/next-layout",
    ]))
    .context("cannot build the agent of the next layout")?;
    // Cargo puts the agent under test in its place.
    let next = built.with_file_name("sluice-next");
    let _ = fs::copy(&built, &next).with_context(|| format!("cannot write {}", next.display()))?;
    Ok(next)
}

/// Builds it for use: optimised, and one static file that runs on any
/// distribution and in an empty image.
pub(crate) fn build_release(workspace: &Workspace) -> Result<PathBuf> {
    let rustc = Cmd::new("rustc").dir(workspace.root()).arg("-vV").stdout()?;
    let host = Rustc::parse(&rustc).context("cannot read `rustc -vV`")?.host;
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    let binary = artifacts::build_binary(
        workspace
            .cargo()
            .env("RUSTFLAGS", format!("{flags} -C target-feature=+crt-static").trim())
            .args(["build", "--package", "sluice", "--bin", "sluice", "--release"])
            // With a target named, the flags are for the binary alone and not
            // for the build scripts and macros, which must stay dynamic.
            .args(["--target", &host]),
    )
    .context("cannot build the agent")?;
    let content = fs::read(&binary).with_context(|| format!("cannot read {}", binary.display()))?;
    if has_interpreter(&content)? {
        bail!("{} is not static: it names a dynamic linker", binary.display());
    }
    println!("{} {}", binary.display(), bytes(content.len() as u64));
    Ok(binary)
}

fn has_interpreter(binary: &[u8]) -> Result<bool> {
    let file = ElfFile64::<object::Endianness>::parse(binary).context("the binary is no 64-bit ELF file")?;
    let endian = file.endian();
    Ok(file.elf_program_headers().iter().any(|header| header.p_type(endian) == elf::PT_INTERP))
}
