//! Test binaries, taken apart into what can run side by side.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sluice_cluster::process::Cmd;

use crate::artifacts::Artifact;

use super::libtest::parse_list;
use super::tier::Tier;

/// A built test binary.
pub(super) struct Binary {
    name: String,
    executable: PathBuf,
    source: PathBuf,
    package: PathBuf,
    manifest: PathBuf,
}

impl Binary {
    pub(super) fn new(artifact: &Artifact) -> Result<Self> {
        Ok(Self {
            name: artifact.target.name.clone(),
            executable: artifact.executable().context("a test binary has a file")?.clone(),
            source: artifact.target.src_path.clone(),
            package: artifact
                .manifest_path
                .parent()
                .context("a manifest has a directory")?
                .to_owned(),
            manifest: artifact.manifest_path.clone(),
        })
    }

    /// The command as `cargo test` would run it: in the package's directory.
    fn command(&self) -> Cmd {
        Cmd::new(&self.executable)
            .dir(&self.package)
            .env("CARGO_MANIFEST_DIR", &self.package)
            .env("CARGO_MANIFEST_PATH", &self.manifest)
    }

    /// The tests that it would run.
    ///
    /// # Errors
    /// When it cannot be run.
    pub(super) fn tests(&self, filter: &[String]) -> Result<Vec<String>> {
        let list = self.command().args(["--list", "--format=terse"]).args(filter).probe()?;
        Ok(parse_list(&list))
    }

    /// The source of one of its modules.
    fn module(&self, name: &str) -> Result<String> {
        read(&self.source.with_file_name(name).with_extension("rs"))
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// How much of the machine a job takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// It mostly waits: half a processor.
    Half,
    /// A processor.
    One,
    /// All that there are; others may run before and after it.
    All,
    /// The whole machine, after all others: what runs beside it would disturb it.
    Alone,
}

/// One process that runs tests.
pub(super) struct Job {
    /// The tier's name, under which it is counted.
    pub(super) tier: &'static str,
    pub(super) name: String,
    pub(super) command: Cmd,
    pub(super) share: Share,
}

/// Takes a binary apart: a unit binary is one job, an api module is one, because its tests share a
/// control plane, and so is every kernel and lab test.
///
/// # Errors
/// When the binary cannot be asked for its tests, or a module's source cannot be read.
pub(super) fn jobs(tier: Tier, binary: &Binary, filter: &[String]) -> Result<Vec<Job>> {
    let job = |name: String, command: Cmd, share| Job { tier: tier.name(), name, command, share };
    let tests = binary.tests(filter)?;
    let whole = || job(binary.name.clone(), binary.command().args(filter), Share::All);
    let of = |tests: &[String]| {
        binary.command().arg("--exact").args(tests).args(filter.iter().filter(|arg| is_mode(arg)))
    };
    match tier {
        _ if tests.is_empty() => Ok(Vec::new()),
        Tier::Unit => Ok(vec![whole()]),
        Tier::Kernel => Ok(tests
            .into_iter()
            .map(|test| {
                let command = of(std::slice::from_ref(&test));
                job(test, command, Share::One)
            })
            .collect()),
        Tier::Lab => tests
            .into_iter()
            .map(|test| {
                let source = binary.module(module_of(&test))?;
                let share =
                    if says(&source, "alone").is_some() { Share::Alone } else { Share::Half };
                let command = of(std::slice::from_ref(&test));
                Ok(job(test, command, share))
            })
            .collect(),
        Tier::Api => tests
            .chunk_by(|one, other| module_of(one) == module_of(other))
            .map(|tests| {
                let module = tests.first().map_or("", |test| module_of(test));
                let source = binary.module(module)?;
                let threads = says(&source, "test-threads:").unwrap_or("1");
                let command = of(tests).arg(format!("--test-threads={threads}"));
                Ok(job(module.to_owned(), command, Share::One))
            })
            .collect(),
    }
}

/// Whether an argument asks for what passing tests print.
pub(super) fn shows_output(argument: &str) -> bool {
    matches!(argument, "--nocapture" | "--no-capture" | "--show-output")
}

/// Whether an argument says how tests run, not which.
fn is_mode(argument: &str) -> bool {
    shows_output(argument) || matches!(argument, "--ignored" | "--include-ignored")
}

fn module_of(test: &str) -> &str {
    test.split_once("::").map_or(test, |(module, _)| module)
}

/// The rest of a line of a module's own comment that begins with a word.
fn says<'a>(source: &'a str, word: &str) -> Option<&'a str> {
    source
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .find_map(|line| line.trim().strip_prefix(word))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_says_how_its_tests_run() {
        let source = "//! Traffic.\n//!\n//! test-threads: 4\n\nuse a;\n//! alone\n";
        assert_eq!(says(source, "test-threads:"), Some("4"));
        assert_eq!(says(source, "alone"), None);
        assert_eq!(says("//! Floods.\n//!\n//! alone\n", "alone"), Some(""));
    }

    #[test]
    fn a_test_is_of_the_first_module_of_its_path() {
        assert_eq!(module_of("bridge::a_bridge"), "bridge");
        assert_eq!(module_of("a_bridge"), "a_bridge");
    }
}
