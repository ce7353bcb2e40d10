//! The outcome of each spec, as ginkgo reports it and as a list records it.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// The outcome of a spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Passed,
    Failed,
    /// It found that it cannot run here.
    Skipped,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Passed, Self::Failed, Self::Skipped];

    fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The outcome of a spec, with the reason if it did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Spec {
    outcome: Outcome,
    reason: String,
}

/// The outcomes of specs by their full names.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Results(BTreeMap<String, Spec>);

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Vec<SpecReport>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SpecReport {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    message: String,
}

impl Results {
    /// Reads ginkgo's `--json-report`.
    pub(super) fn of_ginkgo(file: &Path) -> Result<Self> {
        let content = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let suites: Vec<Suite> = serde_json::from_slice(&content)
            .with_context(|| format!("cannot parse {}", file.display()))?;
        Ok(Self(suites.into_iter().flat_map(|suite| suite.spec_reports).filter_map(spec).collect()))
    }

    /// Reads a list, which is empty if the file does not exist.
    pub(super) fn read(file: &Path) -> Result<Self> {
        match fs::read_to_string(file) {
            Ok(text) => Ok(Self::parse(&text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
        }
    }

    fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let (outcome, name) = line.split_once(' ')?;
            let outcome = Outcome::ALL.into_iter().find(|known| known.name() == outcome)?;
            Some((name.to_owned(), Spec { outcome, reason: String::new() }))
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// Writes the list.
    pub(super) fn write(&self, file: &Path) -> Result<()> {
        let mut text = "# What Kubernetes' own tests say of the real kube-proxy: `cargo xtask test e2e --proxy kube-proxy --record`.\n".to_owned();
        for (name, spec) in &self.0 {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{} {name}", spec.outcome);
        }
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    /// Takes over the outcomes of other results, and keeps those of specs that they lack.
    pub(super) fn update(&mut self, others: &Self) {
        self.0.extend(others.0.iter().map(|(name, spec)| (name.clone(), spec.clone())));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn count(&self, outcome: Outcome) -> u64 {
        self.0.values().map(|spec| u64::from(spec.outcome == outcome)).sum()
    }

    /// Returns a line for every spec that did not pass, or passed where kube-proxy does not, and
    /// one with kube-proxy's sum over the same specs.
    pub(super) fn beside(&self, known: &Self) -> String {
        let mut text = String::new();
        let mut theirs = Self::default();
        for (name, spec) in &self.0 {
            let other = known.0.get(name);
            if let Some(other) = other {
                let _none = theirs.0.insert(name.clone(), other.clone());
            }
            let same = other.is_none_or(|other| other.outcome == spec.outcome);
            if spec.outcome == Outcome::Passed && same {
                continue;
            }
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "{:<7}  kube-proxy {:<7}  {name}{}{}",
                spec.outcome,
                other.map_or("unknown", |other| other.outcome.name()),
                if spec.reason.is_empty() { "" } else { "\n         " },
                spec.reason
            );
        }
        let [passed, failed, skipped] = Outcome::ALL.map(|outcome| theirs.count(outcome));
        let _ = writeln!(
            text,
            "kube-proxy, of the same {} specs: {passed} passed, {failed} failed, {skipped} skipped, {} unknown",
            self.0.len(),
            self.0.len() - theirs.0.len()
        );
        text
    }
}

fn spec(report: SpecReport) -> Option<(String, Spec)> {
    let reason = report.failure.map(|failure| failure.message).unwrap_or_default();
    let reason = reason
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .take(200)
        .collect::<String>();
    let outcome = match report.state.as_str() {
        "passed" => Outcome::Passed,
        // Not selected by focus and skip.
        "skipped" | "pending" if reason.is_empty() => return None,
        "skipped" => Outcome::Skipped,
        _ => Outcome::Failed,
    };
    // The steps before and after all specs are reported only if they fail.
    if report.leaf_node_type != "It" && outcome != Outcome::Failed {
        return None;
    }
    let mut name = report.container_hierarchy_texts.unwrap_or_default();
    name.push(if report.leaf_node_text.is_empty() {
        report.leaf_node_type
    } else {
        report.leaf_node_text
    });
    Some((name.join(" "), Spec { outcome, reason }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(lines: &str) -> Results {
        Results::parse(lines)
    }

    #[test]
    fn ginkgo_tells_what_was_chosen_and_how_it_ended() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("report.json");
        let report = |kind: &str, text: &str, state: &str, failure: &str| {
            format!(
                r#"{{"ContainerHierarchyTexts":["[sig]","Services"],"LeafNodeType":"{kind}","LeafNodeText":"{text}","State":"{state}"{failure}}}"#
            )
        };
        let reports = [
            report("It", "a", "passed", ""),
            report("It", "b", "timedout", r#","Failure":{"Message":"too\n late"}"#),
            report("It", "c", "skipped", ""),
            report("It", "d", "skipped", r#","Failure":{"Message":"no SCTP"}"#),
            report("BeforeSuite", "", "passed", ""),
        ];
        fs::write(&file, format!(r#"[{{"SpecReports":[{}]}}]"#, reports.join(",")))?;
        let found = Results::of_ginkgo(&file)?;
        let counts = Outcome::ALL.map(|outcome| found.count(outcome));
        assert_eq!(counts, [1, 1, 1]);
        assert!(
            found.beside(&Results::default()).contains("[sig] Services b\n         too late\n")
        );
        Ok(())
    }

    #[test]
    fn only_what_differs_or_did_not_pass_is_told() {
        let theirs = results("# a comment\npassed a\nfailed b\npassed c\n");
        let ours = results("passed a\npassed b\nfailed c\npassed d\n");
        let text = ours.beside(&theirs);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "passed   kube-proxy failed   b",
                "failed   kube-proxy passed   c",
                "kube-proxy, of the same 4 specs: 2 passed, 1 failed, 0 skipped, 1 unknown",
            ]
        );
    }
}
