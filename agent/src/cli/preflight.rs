//! `sluice preflight`: whether this node can run Sluice, before it is installed.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;

use super::Output;
use super::table::{Table, render};
use crate::devices::pattern::Patterns;
use crate::preflight::{Options, Outcome, Report, Verdict, look};

/// The words after `sluice preflight`.
#[derive(Debug, Args)]
pub(super) struct PreflightArgs {
    /// As of the agent: the cgroup whose processes' sockets are translated [default: the root of the cgroup2 mount].
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// As of the agent: devices that lead to pods.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    edge: Vec<String>,
    /// As of the agent: devices that carry the node's address.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    uplink: Vec<String>,
    /// As of the agent: overlay and tunnel devices.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    fabric: Vec<String>,
    #[command(flatten)]
    output: Output,
}

/// Prints what was found; the flag says whether Sluice can run.
///
/// # Errors
///
/// When not even the devices can be listed.
pub(super) fn run(args: PreflightArgs, pin_path: &Path) -> anyhow::Result<(String, bool)> {
    let report = look(&Options {
        pin_path: pin_path.to_owned(),
        cgroup: args.cgroup,
        patterns: Patterns::new(&args.edge, &args.uplink, &args.fabric),
    })?;
    Ok((render(args.output.output, &report, text)?, report.can_run == Verdict::Yes))
}

fn text(report: &Report) -> String {
    let mut table = Table::new(&["CHECK", "RESULT", "WHAT IS USED, OR WHY NOT"]);
    for check in &report.checks {
        // A message of several lines, as a verifier's, would break the table.
        let what = check.what.lines().next_back().unwrap_or_default();
        table.row([check.name(), check.result.word().to_owned(), what.to_owned()]);
    }
    let mut text = table.text() + "\n";
    for check in &report.checks {
        let many_lines = check.what.lines().count() > 1;
        if many_lines {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}:\n{}\n", check.name(), check.what);
        }
    }
    for check in report.checks.iter().filter(|check| matches!(check.result, Outcome::No | Outcome::Warn)) {
        if let Some(next) = &check.next {
            let _ = writeln!(text, "{} ({}): {next}", check.name(), check.result.word());
        }
    }
    text += match report.can_run {
        Verdict::Yes => "Sluice can run on this node.\n",
        Verdict::No => "Sluice cannot run on this node as it is: see every \"no\" above.\n",
        Verdict::Unknown => {
            "Whether Sluice can run here is not known: programs and hooks are tried by root only.\n"
        }
    };
    text
}
