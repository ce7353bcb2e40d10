//! `sluice completion` and `sluice man`: what shells and `man` show, made from the command line's
//! definition.

use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, Outcome};

/// Prints the completions for a shell.
pub(super) fn completion(shell: Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "sluice", &mut script);
    String::from_utf8_lossy(&script).into_owned().into()
}

/// Writes a man page for each command into a directory.
///
/// # Errors
///
/// When it cannot be written.
pub(super) fn man(directory: &Path) -> anyhow::Result<Outcome> {
    let failed = || format!("cannot write man pages to {}", directory.display());
    std::fs::create_dir_all(directory).with_context(failed)?;
    clap_mangen::generate_to(Cli::command(), directory).with_context(failed)?;
    Ok(Outcome::default())
}
