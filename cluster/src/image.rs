//! The images of a cluster's pods in one archive, uncompressed, in which each layer is stored once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oci_spec::image::ConfigBuilder;

use crate::oci::{self, Entry, Layout};

/// An image to write.
pub(crate) struct Image {
    /// Its full names, tags included.
    pub(crate) names: Vec<String>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) entrypoint: Vec<&'static str>,
    pub(crate) command: Vec<&'static str>,
}

/// A layer of an image.
#[derive(Clone)]
pub(crate) enum Layer {
    /// A tar archive as it is.
    Archive(PathBuf),
    /// Single files and directories.
    Files(Vec<Entry>),
}

/// Writes images into one archive. `directory` is for intermediate files.
pub(crate) fn write(images: &[Image], directory: &Path, archive: &Path) -> Result<()> {
    let here = std::env::consts::ARCH;
    let architecture = oci::architecture(here)
        .with_context(|| format!("no images for {here}: only x86_64 and aarch64 are known here"))?;
    let root = directory.join("layout");
    let mut layout = Layout::create(&root)?;
    let mut archives = BTreeMap::new();
    for image in images {
        let mut layers = Vec::new();
        for layer in &image.layers {
            layers.push(match layer {
                Layer::Files(entries) => layout.layer(entries)?,
                Layer::Archive(path) => {
                    if let Some(known) = archives.get(path) {
                        oci::Layer::clone(known)
                    } else {
                        let made = layout.layer_of_archive(path)?;
                        let _none = archives.insert(path, made.clone());
                        made
                    }
                }
            });
        }
        let words =
            |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let config = ConfigBuilder::default()
            .entrypoint(words(&image.entrypoint))
            .cmd(words(&image.command))
            .env(words(&["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]))
            .working_dir("/")
            .build()?;
        let _manifest =
            layout.image(&image.names, architecture.clone(), &layers, config, &BTreeMap::new())?;
    }
    layout.finish()?;
    oci::archive(&root, archive)
}
