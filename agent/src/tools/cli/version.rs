//! `sluice version`: what this binary is, and where it runs.

use clap::Args;
use schemars::JsonSchema;
use serde::Serialize;
use sluice_common::abi::LAYOUT;

use super::Outcome;
use super::output::Output;
use crate::REVISION;
use crate::tools::api::kinds;

/// The arguments of `sluice version`.
#[derive(Debug, Args)]
pub(super) struct VersionArgs {
    #[command(flatten)]
    output: Output,
}

/// What this binary is.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Version {
    /// The version.
    #[serde(rename = "version")]
    number: &'static str,
    /// The commit; `unknown` where it was built without a repository.
    commit: &'static str,
    /// When the commit was made, as in RFC 3339; `unknown` without a repository.
    date: &'static str,
    /// The layout of the maps that it writes.
    layout: u32,
    /// What it was built for.
    target: &'static str,
    /// The release of the kernel that it runs on.
    kernel: String,
}

kinds! { Version = "Version"; }

/// Prints the version.
///
/// # Errors
///
/// When it cannot be serialized.
pub(super) fn run(args: &VersionArgs) -> anyhow::Result<Outcome> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let version = Version {
        number: env!("CARGO_PKG_VERSION"),
        commit: REVISION,
        date: env!("SLUICE_DATE"),
        layout: LAYOUT,
        target: env!("SLUICE_TARGET"),
        kernel: kernel.trim().to_owned(),
    };
    let text = args.output.object(&version, |version, _| {
        let Version { number, commit, date, layout, target, kernel } = version;
        format!("sluice {number} ({commit}, {date})\nlayout {layout}, {target}, Linux {kernel}\n")
    })?;
    Ok(text.into())
}
