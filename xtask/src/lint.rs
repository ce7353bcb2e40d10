//! `cargo xtask lint`: one line per step, warnings are errors.

use std::io::{self, IsTerminal};

use anyhow::{Context, Result};

use crate::process::newest_line;
use crate::ui::Step;
use crate::workspace::Workspace;

/// Runs all checks and stops at the first that fails.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    step(workspace, "fmt", &["fmt", "--all", "--check"])?;
    step(workspace, "clippy", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    step(workspace, "rustdoc", &["doc", "--workspace", "--no-deps", "--document-private-items"])
}

fn step(workspace: &Workspace, name: &str, args: &[&str]) -> Result<()> {
    let step = Step::start(format!("lint: {name}"));
    let color = if io::stderr().is_terminal() { "always" } else { "never" };
    workspace
        .cargo()
        .args(args)
        .env("CARGO_TERM_COLOR", color)
        .env("RUSTDOCFLAGS", "-D warnings")
        .run_behind(&step, newest_line)
        .with_context(|| format!("lint: {name}"))?;
    step.done("ok");
    Ok(())
}
