//! Test binaries, split into jobs that can run in parallel.

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

    /// Returns the command that `cargo test` would run, in the package's directory.
    fn command(&self) -> Cmd {
        Cmd::new(&self.executable)
            .dir(&self.package)
            .env("CARGO_MANIFEST_DIR", &self.package)
            .env("CARGO_MANIFEST_PATH", &self.manifest)
    }

    /// Lists the tests that a filter selects.
    ///
    /// # Errors
    /// If the binary cannot be run.
    pub(super) fn tests(&self, filter: &[String]) -> Result<Vec<String>> {
        let list = self.command().args(["--list", "--format=terse"]).args(filter).probe()?;
        Ok(parse_list(&list))
    }

    /// Reads the source of one of its modules.
    fn module(&self, name: &str) -> Result<String> {
        read(&self.source.with_file_name(name).with_extension("rs"))
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The part of the machine that a job takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// A third of a processor, for a job that mostly waits.
    Third,
    /// Half a processor.
    Half,
    /// A processor.
    One,
    /// All processors; other jobs run before and after it.
    All,
    /// The whole machine, after all other jobs, which would disturb it.
    Alone,
}

/// One process that runs tests.
pub(super) struct Job {
    /// The name of the tier under which its tests are counted.
    pub(super) tier: &'static str,
    pub(super) name: String,
    pub(super) command: Cmd,
    pub(super) share: Share,
}

/// Splits a binary into jobs. A whole unit binary is one, an api module is one, because its tests
/// share a control plane, and every kernel or lab test is one.
///
/// # Errors
/// If the binary cannot list its tests, or a module's source cannot be read.
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
                let share = if is_alone(&source, &test) { Share::Alone } else { Share::Third };
                let command = of(std::slice::from_ref(&test));
                Ok(job(test, command, share))
            })
            .collect(),
        Tier::Api => tests
            .chunk_by(|one, other| module_of(one) == module_of(other))
            .map(|tests| {
                let module = tests.first().map_or("", |test| module_of(test));
                let source = binary.module(module)?;
                let threads = directive(&source, "test-threads:").unwrap_or("1");
                let command = of(tests).arg(format!("--test-threads={threads}"));
                Ok(job(module.to_owned(), command, Share::Half))
            })
            .collect(),
    }
}

/// Whether an argument asks for the output of passing tests.
pub(super) fn shows_output(argument: &str) -> bool {
    matches!(argument, "--nocapture" | "--no-capture" | "--show-output")
}

/// Whether an argument selects how tests run, rather than which.
fn is_mode(argument: &str) -> bool {
    shows_output(argument) || matches!(argument, "--ignored" | "--include-ignored")
}

fn module_of(test: &str) -> &str {
    test.split_once("::").map_or(test, |(module, _)| module)
}

/// Whether a test must run alone: its module says `alone`, or `alone: WORD ...` with a word of its
/// name.
fn is_alone(source: &str, test: &str) -> bool {
    directive(source, "alone").is_some_and(|words| {
        let words = words.trim_start_matches(':').trim();
        words.is_empty() || words.split_whitespace().any(|word| test.contains(word))
    })
}

/// Returns what follows a word at the beginning of a line of a module's own comment.
fn directive<'a>(source: &'a str, word: &str) -> Option<&'a str> {
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
        assert_eq!(directive(source, "test-threads:"), Some("4"));
        assert_eq!(directive(source, "alone"), None);
        assert_eq!(directive("//! Floods.\n//!\n//! alone\n", "alone"), Some(""));
        assert!(is_alone("//! alone\n", "floods::a") && !is_alone("//! Floods.\n", "floods::a"));
        let some = "//! alone: a_flood many\n";
        assert!(
            is_alone(some, "floods::a_flood_of_syns") && is_alone(some, "floods::many_clients")
        );
        assert!(!is_alone(some, "floods::a_silence"));
    }

    #[test]
    fn a_test_is_of_the_first_module_of_its_path() {
        assert_eq!(module_of("bridge::a_bridge"), "bridge");
        assert_eq!(module_of("a_bridge"), "a_bridge");
    }
}
