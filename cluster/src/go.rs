//! Programs from Go modules, built once into the cache.
//!
//! `go install` cannot pin the dependencies of a program, and refuses `k8s.io/kubernetes`
//! altogether, because its go.mod replaces its own staging modules by folders. So each group of
//! programs has a module of ours (`cluster/go/`) that requires it and pins all dependencies.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::process::{Cmd, find_program};
use crate::ui::Step;
use crate::version;

/// A module of `cluster/go/`.
pub(crate) struct Module {
    pub(crate) go_mod: &'static str,
    pub(crate) go_sum: &'static str,
    /// For go's `-ldflags`: the variables that hold a version.
    pub(crate) link_flags: &'static str,
    /// For go's `-tags`.
    pub(crate) tags: &'static str,
}

/// One program of a module.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
    pub(crate) version: &'static str,
    /// Whether it is the package's tests.
    pub(crate) is_test: bool,
}

/// Programs that are built together, into one entry of the cache.
pub(crate) struct Group {
    pub(crate) entry: &'static str,
    pub(crate) module: &'static Module,
    pub(crate) programs: &'static [Program],
    /// Files that the programs need, copied from a module: (module, path in it).
    pub(crate) files: &'static [(&'static str, &'static str)],
    /// Whether a program in `PATH` may be used if it reports the right version.
    pub(crate) may_be_in_path: bool,
}

/// Returns the directory of the group's programs, and builds them if they are missing.
///
/// # Errors
/// If one has to be built and there is no suitable Go, or the build fails.
pub(crate) fn obtain(cache: &Cache, group: &Group) -> Result<PathBuf> {
    cache.ensure(
        group.entry,
        |directory| {
            let files = group.files.iter().map(|(_, path)| base_name(path));
            group
                .programs
                .iter()
                .map(|program| program.name)
                .chain(files)
                .all(|name| directory.join(name).exists())
        },
        |directory| {
            let sources = directory.join("src");
            fs::create_dir(&sources)?;
            fs::write(sources.join("go.mod"), group.module.go_mod)?;
            fs::write(sources.join("go.sum"), group.module.go_sum)?;
            for program in group.programs {
                let file = directory.join(program.name);
                match in_path(program).filter(|_| group.may_be_in_path) {
                    Some(present) => {
                        eprintln!("{} {}: {}", program.name, program.version, present.display());
                        symlink(&present, &file)?;
                    }
                    None => build(group.module, program, &sources, &file)?,
                }
            }
            for (module, path) in group.files {
                let from = module_directory(&sources, module)?.join(path);
                let _bytes = fs::copy(&from, directory.join(base_name(path)))
                    .with_context(|| format!("cannot copy {}", from.display()))?;
            }
            Ok(())
        },
    )
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn in_path(program: &Program) -> Option<PathBuf> {
    let file = find_program(program.name)?;
    let output = Cmd::new(&file).arg("--version").probe().ok()?;
    (version::server(&output) == Some(program.version)).then_some(file)
}

fn go(sources: &Path) -> Cmd {
    Cmd::new("go").dir(sources).env("GOWORK", "off").env("CGO_ENABLED", "0")
}

fn module_directory(sources: &Path, module: &str) -> Result<PathBuf> {
    let directory =
        go(sources).args(["list", "-mod=mod", "-m", "-f", "{{.Dir}}", module]).stdout()?;
    Ok(PathBuf::from(directory.trim()))
}

/// Returns the version of Go that a module needs: the `go 1.26.0` of its go.mod.
fn needed(module: &Module) -> Result<(u32, u32)> {
    module
        .go_mod
        .lines()
        .find_map(|line| line.strip_prefix("go ").and_then(version::major_minor))
        .context("the go.mod names no version of Go")
}

/// Checks the version of Go in the module's directory, where an older Go downloads the right one by
/// itself if it may.
fn require_go(module: &Module, program: &Program, sources: &Path) -> Result<()> {
    let needed = needed(module)?;
    let how = format!(
        "install Go {}.{} or newer (https://go.dev/doc/install) and put it into PATH",
        needed.0, needed.1
    );
    let output = go(sources)
        .arg("version")
        .probe()
        .with_context(|| format!("no Go to build {} with; {how}", program.name))?;
    if version::go(&output).is_none_or(|found| found < needed) {
        bail!("{} is too old to build {}; {how}", output.trim(), program.name);
    }
    Ok(())
}

fn build(module: &Module, program: &Program, sources: &Path, file: &Path) -> Result<()> {
    require_go(module, program, sources)?;
    let verb = if program.is_test { "go test -c" } else { "go build" };
    let step = Step::start_long(format!("{} {}: {verb}", program.name, program.version));
    let packages = Cell::new(0_u32);
    let command =
        if program.is_test { go(sources).args(["test", "-c"]) } else { go(sources).arg("build") };
    command
        .args(["-mod=mod", "-trimpath", "-v", "-tags", module.tags])
        .args(["-ldflags", &format!("-s -w {}", module.link_flags), "-o"])
        .args([file.as_os_str(), program.package.as_ref()])
        // With -v go prints each package as it compiles it.
        .run_behind(&step, |package| {
            packages.set(packages.get() + 1);
            Some(format!("{} packages, {package}", packages.get()))
        })
        .with_context(|| format!("cannot build {}", program.name))?;
    step.done("built");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_go_of_a_module_is_what_its_go_mod_says() {
        let module = |go_mod| Module { go_mod, go_sum: "", link_flags: "", tags: "" };
        assert_eq!(needed(&module("module m\n\ngo 1.26.8\n")).ok(), Some((1, 26)));
        assert!(needed(&module("module m\n")).is_err());
    }
}
