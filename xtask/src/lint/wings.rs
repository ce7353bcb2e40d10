//! Which way the agent's wings use each other: `tools -> daemon -> node -> core`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::columns::collect;
use crate::workspace::Workspace;

/// The wings, from the one that uses none to the one that uses all.
const WINGS: [&str; 4] = ["core", "node", "daemon", "tools"];
/// Crates that the first wing does without.
const OUTSIDE: [&str; 6] = ["aya", "k8s_openapi", "kube", "libc", "rtnetlink", "tokio"];

/// Finds imports that run upward.
///
/// # Errors
/// When there are any, or a file cannot be read.
pub(super) fn check(workspace: &Workspace) -> Result<()> {
    let root = workspace.root().join("agent/src");
    let mut files = Vec::new();
    collect(&root, &mut files)?;
    let mut found = Vec::new();
    for file in files {
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let path = file.strip_prefix(&root).unwrap_or(&file);
        found.extend(
            upward(path, &text)
                .into_iter()
                .map(|(line, name)| format!("agent/src/{}:{line} uses {name}", path.display())),
        );
    }
    found.sort();
    ensure!(
        found.is_empty(),
        "imports against `tools -> daemon -> node -> core`; move what is used into the wing of its \
         user, or below: {}",
        found.join(", ")
    );
    Ok(())
}

/// The lines of a file that use what its wing must not know, from 1, with its name.
fn upward<'t>(path: &Path, text: &'t str) -> Vec<(usize, &'t str)> {
    let module = path.with_extension("");
    let depth = module.components().count();
    let first = module.components().next().map(|part| part.as_os_str().to_string_lossy());
    let Some(own) = WINGS.iter().position(|wing| first.as_deref() == Some(*wing)) else {
        return Vec::new();
    };
    let is_refused = |name: &str| {
        WINGS.iter().skip(own + 1).any(|wing| *wing == name)
            // A list of wings hides which.
            || name.is_empty()
    };
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for path in code.split(|at: char| !(at.is_alphanumeric() || "_:".contains(at))) {
            let mut parts = path.split("::").peekable();
            let mut climbed = 0;
            while parts.next_if_eq(&"super").is_some() {
                climbed += 1;
            }
            let is_absolute = climbed >= depth || parts.next_if_eq(&"crate").is_some();
            let Some(name) = parts.next() else { continue };
            let is_outside = own == 0 && parts.next().is_some() && OUTSIDE.contains(&name);
            if (is_absolute && is_refused(name)) || (climbed == 0 && is_outside) {
                found.push((index + 1, path));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_upward_is_found_however_it_is_written() {
        for (path, line, is_found) in [
            ("core/model.rs", "use crate::node::view::View;", true),
            ("core/model.rs", "use crate::core::image::Image;", false),
            ("core/model/desired.rs", "let x = crate::daemon::sync::now();", true),
            ("core/model/desired.rs", "use super::super::super::tools;", true),
            ("core/model/desired.rs", "use super::node;", false),
            ("core/model.rs", "use tokio::sync::watch;", true),
            ("core/model.rs", "fn f(cell: &aya::Pod) {}", true),
            ("core/model.rs", "// tokio::sync", false),
            ("node/view.rs", "use tokio::sync::watch;", false),
            ("node.rs", "pub use crate::tools::cli;", true),
            ("node/view.rs", "use crate::{core, node};", true),
            ("node/view.rs", "pub(crate) fn f() {}", false),
            ("daemon/agent.rs", "use crate::tools::cli;", true),
            ("daemon/agent.rs", "use crate::node::view;", false),
            ("tools/cli.rs", "use crate::daemon::agent;", false),
            ("lib.rs", "use crate::tools::cli;", false),
        ] {
            let lines: Vec<usize> =
                upward(Path::new(path), line).iter().map(|(at, _)| *at).collect();
            assert_eq!(lines, if is_found { vec![1] } else { vec![] }, "{path}: {line}");
        }
    }
}
