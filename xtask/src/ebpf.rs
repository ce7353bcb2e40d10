//! Builds the eBPF object: compiles it, strips it and puts it in its place.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use object::build::elf::{Builder, SectionData};
use object::elf::SHT_STRTAB;
use sluice_cluster::process::Cmd;
use sluice_cluster::ui::bytes;

use crate::artifacts;
use crate::toolchain::Toolchain;
use crate::workspace::Workspace;

/// The linker generates BTF from debug information.
const RUSTFLAGS: &str = "-C debuginfo=2 -C link-arg=--btf";

/// Builds the object and returns its path. The file is replaced only if its content changes, so
/// that the agent that embeds it is not built again.
pub(crate) fn build(workspace: &Workspace, toolchain: &Toolchain) -> Result<PathBuf> {
    eprintln!("eBPF object: {toolchain}");
    build_as(workspace, toolchain, "sluice-bpf", &[], workspace.object())
}

/// Builds the object of the layout that tests upgrade to, whose previous layout is the current one.
pub(crate) fn build_next(workspace: &Workspace, toolchain: &Toolchain) -> Result<PathBuf> {
    eprintln!("eBPF object of the next layout: {toolchain}");
    build_as(
        workspace,
        toolchain,
        "sluice-bpf",
        &["--features", "next-layout"],
        workspace.next_object(),
    )
}

/// Builds the object with which the benchmark runs the programs.
pub(crate) fn build_bench(workspace: &Workspace, toolchain: &Toolchain) -> Result<PathBuf> {
    eprintln!("eBPF object of the benchmark: {toolchain}");
    build_as(workspace, toolchain, "sluice-bench-bpf", &[], workspace.bench_object())
}

/// Returns `cargo clippy` for every program that is built for the BPF target.
///
/// # Errors
/// If there is no clippy for the toolchain's compiler.
pub(crate) fn clippy(workspace: &Workspace, toolchain: &Toolchain, features: &str) -> Result<Cmd> {
    Ok(toolchain
        .cargo_clippy(workspace)?
        .args(["--package", "sluice-ebpf", "--bins", "--profile", "bpf", "--features", features])
        .args(["--target", "bpfel-unknown-none", "--target-dir"])
        .arg(workspace.bpf_target_dir()))
}

fn build_as(
    workspace: &Workspace,
    toolchain: &Toolchain,
    binary: &str,
    features: &[&str],
    object: PathBuf,
) -> Result<PathBuf> {
    let linked = artifacts::build_binary(
        toolchain
            .cargo_build(workspace)
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS", RUSTFLAGS)
            .args(["--package", "sluice-ebpf", "--bin", binary, "--profile", "bpf"])
            .args(features)
            .args(["--target", "bpfel-unknown-none", "--target-dir"])
            .arg(workspace.bpf_target_dir()),
    )
    .context("cannot build the eBPF object")?;
    let unstripped =
        fs::read(&linked).with_context(|| format!("cannot read {}", linked.display()))?;
    let stripped =
        strip(&unstripped).with_context(|| format!("cannot strip {}", linked.display()))?;
    if fs::read(&object).ok().as_deref() != Some(&stripped) {
        replace(&object, &stripped)?;
    }
    println!(
        "{} {} ({} before its debug sections were removed)",
        object.display(),
        bytes(stripped.len() as u64),
        bytes(unstripped.len() as u64)
    );
    Ok(object)
}

/// Writes a file atomically.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let new = path.with_extension(format!("o.{}", std::process::id()));
    fs::write(&new, content).with_context(|| format!("cannot write {}", new.display()))?;
    fs::rename(&new, path).with_context(|| format!("cannot put {} in place", path.display()))
}

/// Removes the DWARF sections, which nobody loads, and keeps BTF, which gives maps and programs
/// their types.
fn strip(object: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Builder::read(object)?;
    for section in &mut elf.sections {
        let name = section.name.as_slice();
        section.delete = [&b".debug_"[..], b".rel.debug_", b".llvm_addrsig"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
    }
    elf.delete_orphans();
    // LLVM writes one string table for sections and symbols, the builder two.
    if !elf.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = elf.sections.add();
        names.name = b".shstrtab"[..].into();
        names.sh_type = SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    ensure!(elf.sections.iter().any(|section| section.name.as_slice() == b".BTF"), "it has no BTF");
    let mut stripped = Vec::new();
    elf.write(&mut stripped)?;
    Ok(stripped)
}
