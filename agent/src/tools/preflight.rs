//! Checks whether this node can run Sluice, and what Sluice will use: `sluice preflight`.
//!
//! Everything that can be tried is tried. Every program is loaded, but not pinned. Every hook is
//! attached to a veth in an unnamed network namespace, and to a cgroup made for it. All of it ends
//! with the process; only the cgroup, an empty directory, outlives a SIGKILL, and the next run
//! removes it. Nothing is attached to devices of the node, because native XDP resets some links.
//!
//! Collecting facts ([`look`]) and judging them are separate: each check is a function of the
//! facts.

mod around;
mod devices;
mod early;
mod hooks;
mod scratch;
mod system;
pub(crate) mod traces;

use std::path::{Path, PathBuf};

use serde::Serialize;
use sluice_core::policy::Accelerate;
use sluice_core::policy::SocketPath;

use crate::node::dataplane::is_bpffs;
use crate::node::dataplane::trial::Trial;
use crate::node::devices::pattern::Patterns;
use crate::node::devices::watch;
use crate::node::devices::{Rules, Survey, survey};
use crate::node::{host, ports};
use around::Skipped;

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Everything is fine.
    Yes,
    /// Sluice cannot run.
    No,
    /// Sluice can run, but there is something to know.
    Warn,
    /// The check does not apply, or could not be made.
    Skip,
}

impl Outcome {
    /// Returns the word in the table.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::No => "no",
            Self::Warn => "warn",
            Self::Skip => "skip",
        }
    }
}

/// A check and its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Check {
    /// The check's name, which never changes.
    pub check: &'static str,
    /// The device, program or hook, if there are several.
    pub subject: Option<String>,
    /// The result.
    pub result: Outcome,
    /// The thing that is used, or the reason why not, for people.
    pub what: String,
    /// The next step, if there is one.
    pub next: Option<String>,
}

impl Check {
    fn new(check: &'static str, result: Outcome, what: impl Into<String>) -> Self {
        Self { check, subject: None, result, what: what.into(), next: None }
    }

    fn of(self, subject: impl Into<String>) -> Self {
        Self { subject: Some(subject.into()), ..self }
    }

    fn next(self, next: impl Into<String>) -> Self {
        Self { next: Some(next.into()), ..self }
    }

    /// Returns the names of the check and its subject.
    #[must_use]
    pub fn name(&self) -> String {
        self.subject
            .as_ref()
            .map_or_else(|| self.check.to_owned(), |subject| format!("{} {subject}", self.check))
    }
}

/// The result of all checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Sluice can run here.
    Yes,
    /// Sluice cannot run here.
    No,
    /// Too little could be tried.
    Unknown,
}

/// The result of all checks, in detail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Report {
    /// Whether Sluice can run here.
    pub can_run: Verdict,
    /// The version of this binary, whose programs were tried.
    pub version: &'static str,
    /// The kernel's release.
    pub kernel: String,
    /// The checks, in order.
    pub checks: Vec<Check>,
}

impl Report {
    fn new(kernel: String, checks: Vec<Check>) -> Self {
        let has = |wanted: fn(&Check) -> bool| checks.iter().any(wanted);
        let can_run = if has(|check| check.result == Outcome::No && check.check != PRIVILEGES) {
            Verdict::No
        } else if has(|check| {
            check.check == PRIVILEGES && check.result == Outcome::No
                || TRIED.contains(&check.check)
                    && check.subject.is_none()
                    && check.result == Outcome::Skip
        }) {
            Verdict::Unknown
        } else {
            Verdict::Yes
        };
        Self { can_run, version: env!("CARGO_PKG_VERSION"), kernel, checks }
    }
}

/// The checks that are skipped as a whole if nothing can be tried.
const TRIED: [&str; 2] = ["programs", "hook"];
/// The check that has to succeed before anything can be tried.
const PRIVILEGES: &str = "privileges";

/// The options with which the agent is to be started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory where maps and links will be pinned.
    pub pin_path: PathBuf,
    /// The directory where kernel settings will be written.
    pub proc_sys: PathBuf,
    /// The cgroup of the socket path, or [`None`] for the root of the cgroup2 mount.
    pub cgroup: Option<PathBuf>,
    /// The processes whose calls the socket path will translate.
    pub socket_path: SocketPath,
    /// The roles that the operator has given to devices.
    pub patterns: Patterns,
    /// Whether packets will go around the stack.
    pub accelerate: Accelerate,
}

/// Collects all facts and tries everything. The process must have no other thread.
///
/// # Errors
///
/// Fails if not even the devices can be listed.
pub fn look(options: &Options) -> anyhow::Result<Report> {
    let kernel = system::release();
    let mut checks = system::kernel(&kernel);
    let capabilities = system::capabilities();
    let privileges = system::privileges(capabilities);
    let is_able = privileges.result != Outcome::No;
    checks.push(privileges);

    let facts = ask(watch::look())?;
    let rules = Rules { patterns: options.patterns.clone(), ..Rules::default() };
    let survey = survey(&facts, &rules, &Survey::default());
    let wanted = (options.socket_path != SocketPath::Off)
        .then(|| options.cgroup.clone().map_or_else(host::cgroup2_mount, Ok));
    checks.extend(system::mounts(&options.pin_path, wanted.as_ref()));
    let cgroup = wanted.and_then(Result::ok);
    checks.extend(system::limits());
    let apart = system::may_go_apart(capabilities);
    checks.extend(attempts(options, is_able, apart, cgroup.as_deref()));
    checks.extend(devices::checks(&facts, &survey, &devices::ask(&survey)));
    checks.push(system::rp_filter(Path::new("/proc/sys/net/ipv4/conf")));
    checks.push(system::ports(&options.proc_sys.join(ports::SYSCTLS)));
    checks.push(system::settings(&options.proc_sys.join(ports::SYSCTLS)));
    let traces = traces::look(
        &facts,
        &survey,
        cgroup.as_deref(),
        &options.pin_path,
        is_able,
        &ask(traces::xdp())?,
    );
    checks.extend(traces::checks(&traces, options.socket_path));
    let frontends = early::Frontends::read(&options.pin_path);
    let rulesets = is_able.then(early::read);
    checks.push(early::check(rulesets.as_ref(), &frontends));
    let skipped = rulesets.as_ref().map(|read| {
        let of =
            |rulesets: &Vec<_>| Skipped::new(rulesets, around::legacy(), traces.at_ingress.clone());
        read.as_ref().map(of)
    });
    checks.push(around::check(
        options.accelerate,
        skipped.as_ref().map(|read| read.as_ref().map_err(|error| *error)),
    ));
    Ok(Report::new(kernel, checks))
}

/// Loads the programs and tries the hooks.
fn attempts(options: &Options, is_able: bool, apart: bool, cgroup: Option<&Path>) -> Vec<Check> {
    if !is_able {
        let skipped = |check| Check::new(check, Outcome::Skip, "not tried: needs root");
        return ["programs", "hook", "pins"].map(skipped).to_vec();
    }
    match Trial::load() {
        Ok(trial) => {
            let mut checks = hooks::programs(trial.programs(), Trial::map_bytes());
            if apart {
                checks.extend(hooks::checks(&scratch::attempt(&trial, cgroup, &options.pin_path)));
            } else {
                checks.extend(hooks::untried(is_bpffs(&options.pin_path)));
            }
            checks
        }
        Err(error) => vec![
            Check::new("programs", Outcome::No, error.to_string())
                .next("fix what the message names; `dmesg` may have details"),
        ],
    }
}

/// Runs a netlink request without another thread.
fn ask<T, E: Into<anyhow::Error>>(
    question: impl Future<Output = Result<T, E>>,
) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime
        .block_on(question)
        .map_err(|error| error.into().context("cannot list this node's devices over netlink"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(checks: &[(&'static str, Outcome)]) -> Verdict {
        let checks = checks.iter().map(|(check, result)| Check::new(check, *result, "")).collect();
        Report::new(String::new(), checks).can_run
    }

    #[test]
    fn without_namespaces_to_try_hooks_in_sluice_can_run_if_it_has_a_place_for_pins() {
        let verdict = |is_bpffs| {
            let mut checks = vec![Check::new(PRIVILEGES, Outcome::Yes, "")];
            checks.extend(hooks::untried(is_bpffs));
            Report::new(String::new(), checks).can_run
        };
        assert_eq!(verdict(true), Verdict::Yes);
        assert_eq!(verdict(false), Verdict::No);
    }

    #[test]
    fn one_no_is_enough_and_without_privileges_the_result_is_unknown() {
        use Outcome::{No, Skip, Warn, Yes};
        assert_eq!(verdict(&[(PRIVILEGES, Yes), ("mtu", Warn), ("xdp", Skip)]), Verdict::Yes);
        assert_eq!(verdict(&[(PRIVILEGES, Yes), ("programs", No)]), Verdict::No);
        assert_eq!(verdict(&[(PRIVILEGES, No), ("programs", Skip)]), Verdict::Unknown);
        assert_eq!(verdict(&[(PRIVILEGES, No), ("kernel", No)]), Verdict::No);
    }
}
