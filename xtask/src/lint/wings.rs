//! Checks the direction in which the agent's wings use each other: `tools -> daemon -> node`, and
//! all of them the core.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::columns::collect;
use crate::workspace::Workspace;

/// The wings, from the one that uses no other to the one that uses all others.
const WINGS: [&str; 3] = ["node", "daemon", "tools"];
/// Crates that only one module may use.
const WALLED: [(&str, &str); 4] = [
    ("aya", "node/dataplane"),
    ("aya_obj", "node/dataplane"),
    ("k8s_openapi", "daemon/source"),
    ("kube", "daemon/source"),
];
/// Crates that the core must not use.
const OUTSIDE_OF_CORE: [&str; 6] = ["aya", "k8s-openapi", "kube", "libc", "rtnetlink", "tokio"];

/// Finds imports that point upward, through a wall, or out of the core.
///
/// # Errors
/// If there are any, or a file cannot be read.
pub(super) fn check(workspace: &Workspace) -> Result<()> {
    let root = workspace.root().join("agent/src");
    let mut files = Vec::new();
    collect(&root, &mut files)?;
    let mut found = Vec::new();
    for file in files {
        let path = file.strip_prefix(&root).unwrap_or(&file);
        found.extend(
            refused(path, &read(&file)?)
                .into_iter()
                .map(|(line, name)| format!("agent/src/{}:{line} uses {name}", path.display())),
        );
    }
    let manifest = read(&workspace.root().join("core/Cargo.toml"))?;
    found.extend(
        outside(&manifest)
            .into_iter()
            .map(|(line, name)| format!("core/Cargo.toml:{line} depends on {name}")),
    );
    found.sort();
    ensure!(
        found.is_empty(),
        "imports against `tools -> daemon -> node -> core`, or of a crate by a module that must \
         not know it: {}",
        found.join(", ")
    );
    Ok(())
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

/// Returns the lines of a file, from 1, that use what its module must not know, with the name.
fn refused<'t>(path: &Path, text: &'t str) -> Vec<(usize, &'t str)> {
    let module = path.with_extension("");
    let depth = module.components().count();
    let own = WINGS.iter().position(|wing| module.starts_with(wing));
    let is_above = |name: &str| {
        // A list (`crate::{..}`) hides which wings it names.
        own.is_some_and(|own| {
            name.is_empty() || WINGS.iter().skip(own + 1).any(|wing| *wing == name)
        })
    };
    let is_walled = |name: &str| {
        WALLED.iter().any(|(walled, user)| *walled == name && !module.starts_with(user))
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
            let (Some(name), is_path) = (parts.next(), parts.next().is_some()) else { continue };
            if if is_absolute { is_above(name) } else { climbed == 0 && is_path && is_walled(name) }
            {
                found.push((index + 1, path));
            }
        }
    }
    found
}

/// Returns the lines of the core's manifest, from 1, that name a crate which it must not use.
fn outside(manifest: &str) -> Vec<(usize, &str)> {
    let name = |line: &'_ str| line.find(|at: char| " .=".contains(at)).unwrap_or(line.len());
    let names = manifest.lines().map(|line| line.get(..name(line)).unwrap_or_default());
    (1..).zip(names).filter(|(_, name)| OUTSIDE_OF_CORE.contains(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_upward_or_through_a_wall_is_found_however_it_is_written() {
        for (path, line, is_found) in [
            ("node/view.rs", "use crate::daemon::agent;", true),
            ("node/view.rs", "use crate::node::ports;", false),
            ("node/view.rs", "use sluice_core::image::Image;", false),
            ("node/view.rs", "use crate::{daemon, node};", true),
            ("node/view.rs", "pub(crate) fn f() {}", false),
            ("node/view.rs", "// crate::daemon", false),
            ("node/devices/own.rs", "let x = crate::tools::top::now();", true),
            ("node/devices/own.rs", "use super::super::super::tools;", true),
            ("node/devices/own.rs", "use super::daemon;", false),
            ("node.rs", "pub use crate::tools::cli;", true),
            ("daemon/agent.rs", "use crate::tools::cli;", true),
            ("daemon/agent.rs", "use crate::node::view;", false),
            ("tools/cli.rs", "use crate::daemon::agent;", false),
            ("lib.rs", "pub mod tools;", false),
            ("node/view.rs", "fn f<P: aya::Pod>() {}", true),
            ("node/dataplane/maps.rs", "fn f<P: aya::Pod>() {}", false),
            ("node/dataplane/maps.rs", "use kube::Client;", true),
            ("daemon/source/kubernetes.rs", "use kube::Client;", false),
            ("tools/cli/kube_proxy.rs", "use super::kube::x;", false),
        ] {
            let lines: Vec<usize> =
                refused(Path::new(path), line).iter().map(|(at, _)| *at).collect();
            assert_eq!(lines, if is_found { vec![1] } else { vec![] }, "{path}: {line}");
        }
    }

    #[test]
    fn the_core_names_no_crate_of_the_outside() {
        for (manifest, found) in [
            ("clap.workspace = true\n# kube\n", vec![]),
            (
                "[dependencies]\ntokio = \"1\"\naya.workspace = true\nkubernetes = \"1\"",
                vec![(2, "tokio"), (3, "aya")],
            ),
        ] {
            assert_eq!(outside(manifest), found, "{manifest}");
        }
    }
}
