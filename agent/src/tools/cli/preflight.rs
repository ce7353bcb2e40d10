//! `sluice preflight`: checks whether this node can run Sluice, before it is installed.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use sluice_core::policy::{Accelerate, SocketPath};

use super::Outcome;
use super::output::Output;
use super::table::{Mood, Style, Table, Text, prose, whole};
use crate::node::devices::pattern::Patterns;
use crate::tools::api::kinds;
use crate::tools::preflight::{self, Options, Report, Verdict, look};

kinds! { Report = "Preflight"; }

/// The arguments of `sluice preflight`.
#[derive(Debug, Args)]
pub(super) struct PreflightArgs {
    /// Check for an agent with this --cgroup: it translates the sockets of the processes in it
    /// [default: the root of the cgroup2 mount].
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Check for an agent with this --socket-path. With off, no cgroup is needed.
    #[arg(long, value_enum, default_value_t, value_name = "SCOPE")]
    socket_path: SocketPath,
    /// Devices that lead to pods, as for the agent.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    edge: Vec<String>,
    /// Devices that carry the node's address, as for the agent.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    uplink: Vec<String>,
    /// Overlay and tunnel devices, as for the agent.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    fabric: Vec<String>,
    /// Check for an agent with this --accelerate. With on, warns of rules in FORWARD chains that
    /// packets of Services would bypass.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    accelerate: Accelerate,
    #[command(flatten)]
    output: Output,
}

/// Prints the findings. The exit code is 0 if Sluice can run.
///
/// # Errors
///
/// Fails if not even the devices can be listed.
pub(super) fn run(
    args: PreflightArgs,
    pin_path: &Path,
    proc_sys: &Path,
) -> anyhow::Result<Outcome> {
    let report = look(&Options {
        pin_path: pin_path.to_owned(),
        proc_sys: proc_sys.to_owned(),
        cgroup: args.cgroup,
        socket_path: args.socket_path,
        patterns: Patterns::new(&args.edge, &args.uplink, &args.fabric),
        accelerate: args.accelerate,
    })?;
    let text = args.output.object(&report, text)?;
    Ok(Outcome { text, code: u8::from(report.can_run != Verdict::Yes) })
}

/// Returns the most telling line of a message. A verifier's message ends with figures, and its
/// reason comes right before them.
fn reason(what: &str) -> &str {
    const FIGURES: [&str; 3] = ["verification time ", "stack depth ", "processed "];
    let is_figure = |line: &&str| FIGURES.iter().any(|begin| line.starts_with(begin));
    what.lines().rev().find(|line| !is_figure(line)).unwrap_or(what)
}

fn text(report: &Report, style: Style) -> String {
    let mut table = Table::new(&[whole("CHECK"), whole("RESULT"), prose("DETAILS")]);
    for check in &report.checks {
        let what = reason(&check.what).to_owned();
        let mood = match check.result {
            preflight::Outcome::Yes => Some(Mood::Good),
            preflight::Outcome::Warn => Some(Mood::Warning),
            preflight::Outcome::No => Some(Mood::Bad),
            preflight::Outcome::Skip => None,
        };
        let result = Text::new(check.result.as_str(), mood);
        table.row([Text::from(check.name()), result, what.into()]);
    }
    let mut text = table.text(style) + "\n";
    for check in &report.checks {
        let many_lines = check.what.lines().count() > 1;
        if many_lines {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}:\n{}\n", check.name(), check.what);
        }
    }
    let is_bad = |result| matches!(result, preflight::Outcome::No | preflight::Outcome::Warn);
    for check in report.checks.iter().filter(|check| is_bad(check.result)) {
        if let Some(next) = &check.next {
            let _ = writeln!(text, "{} ({}): {next}", check.name(), check.result.as_str());
        }
    }
    text += match report.can_run {
        Verdict::Yes => "Sluice can run on this node.\n",
        Verdict::No => "Sluice cannot run on this node as it is: see each \"no\" above.\n",
        Verdict::Unknown => {
            "Whether Sluice can run here is unknown: only root can try programs and hooks.\n"
        }
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_verifiers_log_the_reason_is_shown() {
        let log = "cannot load: combined stack size of 4 calls is 544. Too large\nverification time 12 usec\n\
                   stack depth 0+112\nprocessed 186062 insns (limit 1000000)";
        assert_eq!(reason(log), "cannot load: combined stack size of 4 calls is 544. Too large");
        assert_eq!(reason("attached"), "attached");
    }
}
