//! `sluice validate`: which objects of some manifests would be refused, and why.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use sluice_core::model::report::{Flaw, Level, Report};

use super::policy::PolicyArgs;
use super::table::{Table, render};
use super::{NO_OBJECTS, Output, Usage};
use crate::tools::explain::{Manifests, Options};

/// The words after `sluice validate`.
#[derive(Debug, Args)]
pub(super) struct ValidateArgs {
    /// The folder with the manifests, or one file.
    #[arg(value_name = "DIR")]
    manifests: PathBuf,
    /// The node's name, as in nodeName of endpoints [default: the only Node of the manifests].
    #[arg(long, visible_alias = "node-name", value_name = "NAME", env = "NODE_NAME")]
    node: Option<String>,
    /// As of the agent: serve Services with this label service.kubernetes.io/service-proxy-name.
    #[arg(long, value_name = "NAME")]
    proxy_name: Option<String>,
    #[command(flatten)]
    output: Output,
    // Last: its heading would go on over what follows.
    #[command(flatten)]
    policy: PolicyArgs,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// The object, or the part that the field names, has no effect.
    Refused,
    /// Another Service has what it claims.
    Lost,
    /// Everything has effect, though perhaps not the one that was meant.
    Warning,
}

impl Kind {
    fn of(flaw: Flaw) -> Self {
        // In a cluster these two are ordinary, and pass; a manifest with one is not served as it
        // is.
        let is_idle = matches!(flaw, Flaw::NoClusterIp | Flaw::NoServiceLabel);
        match flaw.level() {
            Level::Notice if !is_idle => Self::Warning,
            Level::Problem if flaw == Flaw::ClaimLost => Self::Lost,
            Level::Problem | Level::Notice => Self::Refused,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Lost => "lost",
            Self::Warning => "warning",
        }
    }
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Row {
    kind: Kind,
    object: String,
    field: String,
    flaw: &'static str,
    why: String,
}

impl From<&Report> for Row {
    fn from(report: &Report) -> Self {
        Self {
            kind: Kind::of(report.note.flaw),
            object: report.subject.to_string(),
            field: report.note.field.clone(),
            flaw: report.note.flaw.word(),
            why: report.note.message.clone(),
        }
    }
}

/// Prints what is wrong, the worst first; the number is the exit code.
///
/// # Errors
///
/// [`Usage`] for flags that contradict each other; else when the manifests cannot be read.
pub(super) fn run(args: ValidateArgs) -> anyhow::Result<(String, u8)> {
    let ValidateArgs { manifests: path, node, proxy_name, output, policy } = args;
    let policy = policy.policy().map_err(|error| Usage(format!("{error:#}")))?;
    let options = Options {
        path: path.clone(),
        node: node.map(Into::into),
        proxy_name,
        policy,
        socket_path: 0,
    };
    let manifests =
        Manifests::read(options).with_context(|| format!("cannot read {}", path.display()))?;
    if manifests.objects() == 0 && manifests.model().reports().iter().next().is_none() {
        bail!("no object in {}: {NO_OBJECTS}", path.display());
    }
    let mut rows: Vec<Row> = manifests.model().reports().iter().map(Row::from).collect();
    rows.sort();
    let code = u8::from(rows.iter().any(|row| row.kind != Kind::Warning));
    let text = render(output.output, &rows, |rows| {
        if rows.is_empty() {
            return format!(
                "Nothing is wrong with the objects, {} of them.\n",
                manifests.objects()
            );
        }
        let mut table = Table::new(&["OBJECT", "FIELD", "KIND", "WHY"]);
        for row in rows {
            table.row([
                row.object.clone(),
                row.field.clone(),
                row.kind.word().to_owned(),
                row.why.clone(),
            ]);
        }
        table.text()
    })?;
    Ok((text, code))
}
