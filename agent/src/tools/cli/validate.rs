//! `sluice validate`: the objects in manifests that would be refused, and why.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use schemars::JsonSchema;
use serde::Serialize;
use sluice_core::model::report::{Flaw, Level, Report};

use super::output::Output;
use super::policy::PolicyArgs;
use super::table::{Mood, Table, Text, cut, prose, whole};
use super::{NO_OBJECTS, Outcome, Usage};
use crate::daemon::source::lint::{Suspicion, lint};
use crate::tools::api::kinds;
use crate::tools::explain::{Manifests, Options};

/// The arguments of `sluice validate`.
#[derive(Debug, Args)]
pub(super) struct ValidateArgs {
    /// A directory of manifests, or one file.
    #[arg(value_name = "DIR")]
    manifests: PathBuf,
    /// The node's name, as in nodeName of endpoints [default: the only Node in the manifests].
    #[arg(long, visible_alias = "node-name", value_name = "NAME", env = "NODE_NAME")]
    node: Option<String>,
    /// Check for an agent with this --proxy-name: it serves Services whose label
    /// service.kubernetes.io/service-proxy-name has this value.
    #[arg(long, value_name = "NAME")]
    proxy_name: Option<String>,
    #[command(flatten)]
    output: Output,
    // Comes last: its heading would apply to what follows.
    #[command(flatten)]
    policy: PolicyArgs,
}

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// The object, or the part in the field, has no effect.
    Refused,
    /// Another Service has the address that the object claims.
    Lost,
    /// The object is served, though perhaps not as intended: with a default, without a field that
    /// does not exist, or by nobody yet.
    Warning,
}

impl Kind {
    fn of(flaw: Flaw) -> Self {
        // Another value counts, with which the object is served.
        if flaw == Flaw::BadValue {
            return Self::Warning;
        }
        // In a cluster these two are common and temporary. A manifest with one is not served as it
        // stands.
        let is_idle = matches!(flaw, Flaw::NoClusterIp | Flaw::NoServiceLabel);
        match flaw.level() {
            Level::Notice if !is_idle => Self::Warning,
            Level::Problem if flaw == Flaw::ClaimLost => Self::Lost,
            Level::Problem | Level::Notice => Self::Refused,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Lost => "lost",
            Self::Warning => "warning",
        }
    }
}

/// A finding.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
pub(super) struct Finding {
    /// How bad it is.
    kind: Kind,
    /// The object, as `Kind namespace/name`, or the document in a file.
    object: String,
    /// The field; empty if it is the whole.
    field: String,
    /// What is wrong, as one word.
    flaw: &'static str,
    /// What was found, and what follows from it.
    why: String,
}

kinds! { Finding = "Finding"; }

impl From<Suspicion> for Finding {
    fn from(suspicion: Suspicion) -> Self {
        let Suspicion { object, field, lint, why } = suspicion;
        let kind = if lint.is_refused() { Kind::Refused } else { Kind::Warning };
        Self { kind, object, field, flaw: lint.word(), why }
    }
}

impl From<&Report> for Finding {
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

/// Prints what is wrong, the worst first. The exit code is 1 if an object is refused or loses an
/// address.
///
/// # Errors
///
/// [`Usage`] for flags that contradict each other. Also when the manifests cannot be read.
pub(super) fn run(args: ValidateArgs) -> anyhow::Result<Outcome> {
    let ValidateArgs { manifests: path, node, proxy_name, output, policy } = args;
    let policy = policy.policy().map_err(|error| Usage(format!("{error:#}")))?;
    let options = Options {
        path: path.clone(),
        node: node.map(Into::into),
        proxy_name: proxy_name.clone(),
        policy,
        socket_path: 0,
    };
    let unreadable = || format!("cannot read {}", path.display());
    let manifests = Manifests::read(options).with_context(unreadable)?;
    if manifests.objects() == 0 && manifests.model().reports().iter().next().is_none() {
        bail!("found no object in {}: {NO_OBJECTS}", path.display());
    }
    let mut rows: Vec<Finding> = manifests.model().reports().iter().map(Finding::from).collect();
    let suspicions = lint(&path, proxy_name.as_deref()).with_context(unreadable)?;
    rows.extend(suspicions.into_iter().map(Finding::from));
    rows.sort();
    let code = u8::from(rows.iter().any(|row| row.kind != Kind::Warning));
    let text = output.items(&rows, |rows, style| {
        if rows.is_empty() {
            return format!("No problems found in {} objects.\n", manifests.objects());
        }
        table(rows).text(style)
    })?;
    Ok(Outcome { text, code })
}

fn table(rows: &[Finding]) -> Table {
    let mut table = Table::new(&[whole("KIND"), cut("OBJECT"), cut("FIELD"), prose("WHY")]);
    for row in rows {
        let mood = match row.kind {
            Kind::Refused | Kind::Lost => Mood::Bad,
            Kind::Warning => Mood::Warning,
        };
        table.row([
            Text::new(row.kind.as_str(), Some(mood)),
            row.object.as_str().into(),
            row.field.as_str().into(),
            row.why.as_str().into(),
        ]);
    }
    table
}
