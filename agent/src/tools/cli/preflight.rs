//! `sluice preflight`: whether this node can run Sluice, before it is installed.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use sluice_core::policy::Accelerate;
use sluice_core::policy::SocketPath;

use super::Output;
use super::table::{Table, render};
use crate::node::devices::pattern::Patterns;
use crate::tools::preflight::{Options, Outcome, Report, Verdict, look};

/// The words after `sluice preflight`.
#[derive(Debug, Args)]
pub(super) struct PreflightArgs {
    /// As of the agent: the cgroup whose processes' sockets are translated [default: the root of
    /// the cgroup2 mount].
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// As of the agent: whose connections are translated at the socket; with off, no cgroup is
    /// needed.
    #[arg(long, value_enum, default_value_t, value_name = "WHOSE")]
    socket_path: SocketPath,
    /// As of the agent: devices that lead to pods.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    edge: Vec<String>,
    /// As of the agent: devices that carry the node's address.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    uplink: Vec<String>,
    /// As of the agent: overlay and tunnel devices.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    fabric: Vec<String>,
    /// As of the agent: whether packets of Services go around the stack; then what stops them in a
    /// FORWARD chain is warned of.
    #[arg(long, value_enum, default_value_t, value_name = "WHETHER")]
    accelerate: Accelerate,
    #[command(flatten)]
    output: Output,
}

/// Prints what was found; the flag says whether Sluice can run.
///
/// # Errors
///
/// When not even the devices can be listed.
pub(super) fn run(
    args: PreflightArgs,
    pin_path: &Path,
    proc_sys: PathBuf,
) -> anyhow::Result<(String, bool)> {
    let report = look(&Options {
        pin_path: pin_path.to_owned(),
        proc_sys,
        cgroup: args.cgroup,
        socket_path: args.socket_path,
        patterns: Patterns::new(&args.edge, &args.uplink, &args.fabric),
        accelerate: args.accelerate,
    })?;
    Ok((render(args.output.output, &report, text)?, report.can_run == Verdict::Yes))
}

/// The line of a message that says most: a verifier's ends with figures, before which its reason
/// stands.
fn reason(what: &str) -> &str {
    const FIGURES: [&str; 3] = ["verification time ", "stack depth ", "processed "];
    let is_figure = |line: &&str| FIGURES.iter().any(|begin| line.starts_with(begin));
    what.lines().rev().find(|line| !is_figure(line)).unwrap_or(what)
}

fn text(report: &Report) -> String {
    let mut table = Table::new(&["CHECK", "RESULT", "WHAT IS USED, OR WHY NOT"]);
    for check in &report.checks {
        let what = reason(&check.what).to_owned();
        table.row([check.name(), check.result.word().to_owned(), what]);
    }
    let mut text = table.text() + "\n";
    for check in &report.checks {
        let many_lines = check.what.lines().count() > 1;
        if many_lines {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}:\n{}\n", check.name(), check.what);
        }
    }
    for check in
        report.checks.iter().filter(|check| matches!(check.result, Outcome::No | Outcome::Warn))
    {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_verifiers_log_the_reason_is_shown() {
        let log = "cannot load: combined stack size of 4 calls is 544. Too large\nverification time 12 usec\n\
                   stack depth 0+112\nprocessed 186062 insns (limit 1000000)";
        assert_eq!(reason(log), "cannot load: combined stack size of 4 calls is 544. Too large");
        assert_eq!(reason("attaches"), "attaches");
    }
}
