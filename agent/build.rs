//! Puts the BPF object where the binary includes it from: the file that `SLUICE_BPF_OBJECT` names,
//! else `target/bpf/sluice.o` of the workspace, else an empty file (which the binary complains
//! about when it runs). Tells the binary the commit and its date too: what `SLUICE_REVISION` and
//! `SLUICE_DATE` say, else git; and what it is built for.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-env-changed=SLUICE_BPF_OBJECT");
    let variable = |name| env::var_os(name).map(PathBuf::from);
    let manifest = variable("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rustc-env=SLUICE_REVISION={}", revision(&manifest));
    println!("cargo::rustc-env=SLUICE_DATE={}", date(&manifest));
    println!("cargo::rustc-env=SLUICE_TARGET={}", env::var("TARGET").unwrap_or_default());
    let object =
        variable("SLUICE_BPF_OBJECT").unwrap_or_else(|| manifest.join("../target/bpf/sluice.o"));
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = match fs::read(&object) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!(
                "cargo::warning=no BPF object at {}: the binary will not load one",
                object.display()
            );
            Vec::new()
        }
        Err(error) => return Err(error),
    };
    fs::write(variable("OUT_DIR").unwrap_or_default().join("sluice.o"), bytes)
}

/// Names the commit. Who commits builds anew: git writes each move of HEAD into its log.
fn revision(folder: &Path) -> String {
    println!("cargo::rerun-if-env-changed=SLUICE_REVISION");
    if let Ok(revision) = env::var("SLUICE_REVISION") {
        return revision;
    }
    if let Some(log) = git(folder, &["rev-parse", "--git-path", "logs/HEAD"]) {
        let log = folder.join(log);
        if log.exists() {
            println!("cargo::rerun-if-changed={}", log.display());
        }
    }
    git(folder, &["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned())
}

/// Says when the commit was made.
fn date(folder: &Path) -> String {
    println!("cargo::rerun-if-env-changed=SLUICE_DATE");
    let given = env::var("SLUICE_DATE").ok();
    let date = given.or_else(|| git(folder, &["log", "-1", "--format=%cI"]));
    date.unwrap_or_else(|| "unknown".to_owned())
}

fn git(folder: &Path, words: &[&str]) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(folder).args(words).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
