//! Checks the width of comments and documents, since rustfmt breaks only code.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// The width that rustfmt gives code.
const COLUMNS: usize = 100;
/// The folders of sources and documents.
const FOLDERS: [&str; 11] = [
    "common",
    "core",
    "ebpf",
    "agent",
    "lab",
    "cluster",
    "simulation",
    "bench",
    "xtask",
    "docs",
    "deploy",
];

/// Finds lines of comments and documents that are too wide.
///
/// # Errors
/// If there are any, or a file cannot be read.
pub(super) fn check(workspace: &Workspace) -> Result<()> {
    let mut files = Vec::new();
    for folder in FOLDERS {
        collect(&workspace.root().join(folder), &mut files)?;
    }
    for entry in fs::read_dir(workspace.root())? {
        files.push(entry?.path());
    }
    let mut wide = Vec::new();
    for file in files.iter().filter(|file| is_checked(file)) {
        let text =
            fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let is_paper = file.extension().is_some_and(|extension| extension == "md");
        let name = file.strip_prefix(workspace.root()).unwrap_or(file).display();
        wide.extend(
            wide_lines(&text, is_paper).into_iter().map(|number| format!("{name}:{number}")),
        );
    }
    ensure!(
        wide.is_empty(),
        "lines of more than {COLUMNS} columns; break them: {}",
        wide.join(", ")
    );
    Ok(())
}

fn is_checked(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "rs" || extension == "md")
}

/// Adds every file of a folder and of the folders in it.
pub(super) fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?
    {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Returns the numbers of the lines that are too wide, from 1. Rows of tables, drawings and
/// quotations may have any width.
fn wide_lines(text: &str, is_paper: bool) -> Vec<usize> {
    let mut is_quoted = false;
    let mut wide = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let prose = if is_paper { Some(line) } else { comment(line) };
        let Some(prose) = prose else { continue };
        if prose.trim_start().starts_with("```") {
            is_quoted = !is_quoted;
        }
        let is_kept = is_quoted
            || prose.starts_with("    ")
            || prose.trim_start().starts_with(['|', '[', '!', '>']);
        if !is_kept && line.chars().count() > COLUMNS {
            wide.push(index + 1);
        }
    }
    wide
}

/// Returns the text of a line that consists of a comment.
fn comment(line: &str) -> Option<&str> {
    let behind = line.trim_start().strip_prefix("//")?;
    let behind = behind.strip_prefix(['/', '!']).unwrap_or(behind);
    Some(behind.strip_prefix(' ').unwrap_or(behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_is_told_from_tables_pictures_and_code() {
        let long = "word ".repeat(30);
        let kept = ["| ", "    ", "[1]: ", "```\n", ""].map(|start| format!("{start}{long}"));
        let [table, picture, link, quoted, prose] = &kept;
        for (what, text, is_paper, expected) in [
            ("a table", table.clone(), true, vec![]),
            ("a picture", picture.clone(), true, vec![]),
            ("a link", link.clone(), true, vec![]),
            ("what is quoted", quoted.clone(), true, vec![]),
            ("prose", format!("short\n{prose}"), true, vec![2]),
            ("a comment", format!("    /// {prose}"), false, vec![1]),
            ("a comment's table", format!("//! {table}"), false, vec![]),
            ("code", prose.clone(), false, vec![]),
        ] {
            assert_eq!(wide_lines(&text, is_paper), expected, "{what}");
        }
    }
}
