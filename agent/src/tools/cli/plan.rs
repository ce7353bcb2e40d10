//! `sluice plan`: what would change for clients if manifests were applied.

use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use schemars::JsonSchema;
use serde::Serialize;
use sluice_core::model::report::{Level, Report};
use sluice_core::policy::Policy;

use super::diff::{Scope, scope_of_agent};
use super::output::Output;
use super::policy::PolicyArgs;
use super::table::{Mood, Style, Table, Text, cut, prose, whole};
use super::{NO_OBJECTS, Outcome, Places, Usage, runtime};
use crate::node::status;
use crate::tools::api::kinds;
use crate::tools::explain::{Manifests, Options};
use crate::tools::plan::{Change, How, compare};

/// The exit code if the answers of frontends change.
const CHANGES: u8 = 2;
/// The exit code if somebody loses service.
const LOSES: u8 = 3;

/// The arguments of `sluice plan`.
#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    /// The manifests to apply: files or directories. Objects replace those of the same name.
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The objects as they are, from a directory of manifests or one file [default: from the
    /// sources of this node's agent].
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// The node's name, as in nodeName of endpoints [default: this node, or the only Node in the
    /// manifests].
    #[arg(long, visible_alias = "node-name", value_name = "NAME", env = "NODE_NAME")]
    node: Option<String>,
    /// With --manifests, plan for an agent with this --proxy-name.
    #[arg(long, value_name = "NAME")]
    proxy_name: Option<String>,
    #[command(flatten)]
    output: Output,
    // Comes last: its heading would apply to what follows.
    #[command(flatten)]
    policy: PolicyArgs,
}

impl PlanArgs {
    /// Whether the objects come from manifests, and from nothing on this node.
    pub(super) fn uses_manifests(&self) -> bool {
        self.manifests.is_some()
    }
}

/// What would change.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Plan {
    /// Whether somebody who is served today would not be any more.
    loses: bool,
    /// The frontends whose answers change, those that lose first.
    changes: Vec<Change>,
    /// What would be wrong with objects and is not today.
    problems: Vec<Problem>,
}

/// What would be wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
struct Problem {
    /// The object, as `Kind namespace/name`.
    object: String,
    /// The field; empty if it is the whole.
    field: String,
    /// What is wrong, as one word.
    flaw: &'static str,
    /// What was found, and what follows from it.
    why: String,
}

kinds! { Plan = "Plan"; }

/// Prints what would change. The exit code is 0 if nothing does, 2 if something does, and 3 if
/// somebody loses service.
///
/// # Errors
///
/// [`Usage`] for flags that contradict each other. Also when something cannot be read.
pub(super) fn run(args: PlanArgs, places: &Places) -> anyhow::Result<Outcome> {
    let (files, output) = (args.files.clone(), args.output.clone());
    let mut manifests =
        if args.uses_manifests() { of_manifests(args)? } else { live(args, places)? };
    let before = (manifests.image().clone(), problems(&manifests));
    for file in &files {
        manifests.apply(file).with_context(|| format!("--filename {}", file.display()))?;
    }
    let changes = compare(&before.0, manifests.image());
    let mut problems = problems(&manifests);
    problems.retain(|problem| !before.1.contains(problem));
    let plan = Plan { loses: changes.iter().any(|change| change.loses), changes, problems };
    let code = match (plan.loses, plan.changes.is_empty()) {
        (true, _) => LOSES,
        (false, false) => CHANGES,
        (false, true) => 0,
    };
    let text = output.object(&plan, text)?;
    Ok(Outcome { text, code })
}

fn of_manifests(args: PlanArgs) -> anyhow::Result<Manifests> {
    let path = args.manifests.unwrap_or_default();
    let policy = args.policy.policy().map_err(|error| Usage(format!("{error:#}")))?;
    let options = Options {
        path: path.clone(),
        node: args.node.map(Into::into),
        proxy_name: args.proxy_name,
        policy,
        socket_path: 0,
    };
    let manifests =
        Manifests::read(options).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(manifests.objects() > 0, "found no object in {}: {NO_OBJECTS}", path.display());
    Ok(manifests)
}

/// Reads the objects as the agent of this node does.
fn live(args: PlanArgs, places: &Places) -> anyhow::Result<Manifests> {
    let policy = args.policy.policy().map_err(|error| Usage(format!("{error:#}")))?;
    if policy != Policy::default() || args.proxy_name.is_some() {
        bail!(Usage(
            "policy flags and --proxy-name need --manifests; without it, those of the agent count"
                .to_owned()
        ));
    }
    let last = status::read(&places.state_dir).with_context(|| {
        format!(
            "no agent has recorded its sources in {}: give --manifests DIR",
            places.state_dir.display()
        )
    })?;
    let scope = scope_of_agent(&last)?;
    let events = runtime()?.block_on(scope.events())?;
    let Scope { inputs, .. } = scope;
    let mut policy = inputs.policy;
    if policy.node_addresses.is_empty() {
        policy.node_addresses = last.policy.primary;
    }
    let node = args.node.map_or(inputs.node, Into::into);
    let options = Options {
        path: PathBuf::new(),
        node: Some(node),
        proxy_name: inputs.proxy_name,
        policy,
        socket_path: inputs.socket_path,
    };
    let changes = events.into_iter().map(|event| event.change).collect();
    Ok(Manifests::of(options, changes))
}

/// Returns what is wrong with objects.
fn problems(manifests: &Manifests) -> Vec<Problem> {
    let is_problem = |report: &&Report| report.note.flaw.level() == Level::Problem;
    let reports = manifests.model().reports().iter().filter(is_problem);
    let mut problems: Vec<Problem> = reports
        .map(|report| Problem {
            object: report.subject.to_string(),
            field: report.note.field.clone(),
            flaw: report.note.flaw.word(),
            why: report.note.message.clone(),
        })
        .collect();
    problems.sort();
    problems
}

fn text(plan: &Plan, style: Style) -> String {
    if plan.changes.is_empty() && plan.problems.is_empty() {
        return "No frontend changes.\n".to_owned();
    }
    let mut table = Table::new(&[whole(""), cut("FRONTEND"), cut("SERVICE"), prose("CHANGE")]);
    for change in &plan.changes {
        let (sign, mood) = match (change.loses, change.how) {
            (true, _) => ("!", Mood::Bad),
            (false, How::Added) => ("+", Mood::Good),
            (false, How::Removed) => ("-", Mood::Warning),
            (false, How::Changed) => ("~", Mood::Warning),
        };
        table.row([
            Text::new(sign, Some(mood)),
            format!("{} {}", change.frontend, change.protocol).into(),
            change.service.as_str().into(),
            change.what.join("; ").into(),
        ]);
    }
    let mut text = if plan.changes.is_empty() { String::new() } else { table.text(style) + "\n" };
    if !plan.problems.is_empty() {
        let mut table = Table::new(&[cut("OBJECT"), cut("FIELD"), prose("WOULD BE WRONG")]);
        for problem in &plan.problems {
            table.row([&problem.object, &problem.field, &problem.why].map(String::as_str));
        }
        text += &(table.text(style) + "\n");
    }
    let count = plan.changes.len();
    let losing = plan.changes.iter().filter(|change| change.loses).count();
    let frontends = if count == 1 { "frontend changes" } else { "frontends change" };
    let lose = if losing == 1 { "loses" } else { "lose" };
    text + &match losing {
        0 => format!("{count} {frontends}, and nobody loses service.\n"),
        _ => format!("{count} {frontends}; clients of {losing} {lose} service.\n"),
    }
}
