//! `cargo xtask image`: the static binary on an empty base, as an OCI layout and as an archive,
//! with its bill of materials.
//!
//! ```text
//! <output>/layout/          the image, and an artifact that refers to it: the bill of materials
//! <output>/sluice.tar       the image alone, for `ctr images import`, `docker load`,
//!                           `podman load` and `skopeo copy oci-archive:`
//! <output>/sluice.cdx.json  the bill of materials
//! ```
//!
//! The archive has only the image, because engines ask which image is meant if there is more.

mod sbom;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use oci_spec::image::{
    ANNOTATION_DESCRIPTION, ANNOTATION_LICENSES, ANNOTATION_REVISION, ANNOTATION_TITLE,
    ANNOTATION_VERSION, Config, ConfigBuilder,
};
use sluice_cluster::IMAGE;
use sluice_cluster::oci::{self, Entry, Layout};
use sluice_cluster::process::Cmd;
use sluice_cluster::ui::bytes;

use crate::agent;
use crate::workspace::Workspace;

/// The path of the binary in the image.
const PROGRAM: &str = "usr/local/bin/sluice";

/// The file name of the bill of materials.
const SBOM: &str = "sluice.cdx.json";

/// Options of `cargo xtask image`.
#[derive(Args)]
pub(crate) struct Options {
    /// The image's full name [default: localhost/sluice with the version as its tag].
    #[arg(short, long, value_parser = full_name)]
    name: Option<String>,
    /// The directory to write to [default: target/image].
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// The image that was written.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) archive: PathBuf,
    /// The image's digest, as a registry would show it.
    digest: String,
}

/// Builds the binary and writes its image.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let binary = agent::build_release(workspace)?;
    let name =
        options.name.clone().unwrap_or_else(|| format!("{IMAGE}:{}", env!("CARGO_PKG_VERSION")));
    let output = options.output.clone().unwrap_or_else(|| workspace.root().join("target/image"));
    let written = write(workspace, &binary, &name, &output)?;
    let size = fs::metadata(&written.archive).map(|metadata| metadata.len()).unwrap_or_default();
    println!("{name}@{}", written.digest);
    println!("{} {}", written.archive.display(), bytes(size));
    println!("{} with the bill of materials as a referrer", output.join("layout").display());
    println!("{}", output.join(SBOM).display());
    Ok(())
}

/// Writes the image of a binary into a directory.
///
/// # Errors
/// If the binary does not run on an empty base, or the tree's packages cannot be listed.
pub(crate) fn write(
    workspace: &Workspace,
    binary: &Path,
    name: &str,
    output: &Path,
) -> Result<Written> {
    let content = fs::read(binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let machine = agent::static_architecture(&content)
        .with_context(|| format!("{} cannot be in an image", binary.display()))?;
    let architecture = oci::architecture(machine).context("no name for the binary's machine")?;
    let sbom = sbom::of(workspace, &oci::digest(binary)?)?;
    fs::create_dir_all(output).with_context(|| format!("cannot make {}", output.display()))?;

    let root = output.join("layout");
    let entries = [Entry::File(PROGRAM.to_owned(), binary.to_owned())];
    let labels = labels(workspace);
    // First the image for the archive, then also what refers to it.
    let mut layout = Layout::create(&root)?;
    let layer = layout.compressed_layer(&entries)?;
    let names = [name.to_owned()];
    let image = layout.image(&names, architecture, &[layer], config(&labels)?, &labels)?;
    layout.finish()?;
    let archive = output.join("sluice.tar");
    oci::archive(&root, &archive)?;
    layout.attach(&image, sbom::MEDIA_TYPE, SBOM, &sbom)?;
    layout.finish()?;
    let file = output.join(SBOM);
    fs::write(&file, &sbom).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(Written { archive, digest: image.digest().to_string() })
}

/// Returns the configuration. The user is root, since programs and devices need capabilities that
/// container runtimes give to nobody else; the image contains nothing else that root could use.
fn config(labels: &BTreeMap<String, String>) -> Result<Config> {
    let config = ConfigBuilder::default()
        .user("0:0")
        .env(["PATH=/usr/local/bin".to_owned()])
        .entrypoint([format!("/{PROGRAM}")])
        .cmd(["agent".to_owned()])
        .working_dir("/")
        .labels(labels.clone().into_iter().collect::<HashMap<_, _>>())
        .build()?;
    Ok(config)
}

fn labels(workspace: &Workspace) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from(
        [
            (ANNOTATION_TITLE, "sluice"),
            (
                ANNOTATION_DESCRIPTION,
                "A Service load balancer in the kernel, for Kubernetes nodes under any CNI",
            ),
            (ANNOTATION_VERSION, env!("CARGO_PKG_VERSION")),
            // The embedded kernel programs may be used under GPL-2.0 as well.
            (ANNOTATION_LICENSES, "Apache-2.0"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned())),
    );
    if let Some(revision) = revision(workspace) {
        let _none = labels.insert(ANNOTATION_REVISION.to_owned(), revision);
    }
    labels
}

/// Returns the commit, if the tree has no changes.
fn revision(workspace: &Workspace) -> Option<String> {
    let git = |args: &[&str]| Cmd::new("git").dir(workspace.root()).args(args).probe().ok();
    let is_clean = git(&["status", "--porcelain"])?.trim().is_empty();
    let commit = git(&["rev-parse", "HEAD"])?.trim().to_owned();
    is_clean.then_some(commit)
}

/// Checks that a name has a tag: images without one cannot be distinguished once imported.
fn full_name(text: &str) -> Result<String> {
    let last = text.rsplit('/').next().unwrap_or(text);
    let tagged =
        last.split_once(':').is_some_and(|(name, tag)| !name.is_empty() && !tag.is_empty());
    ensure!(tagged, "the name needs a tag, as in {IMAGE}:{}", env!("CARGO_PKG_VERSION"));
    ensure!(
        text.contains('/'),
        "the name needs a registry or localhost, as in {IMAGE}:{}",
        env!("CARGO_PKG_VERSION")
    );
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests;
