//! Container images as one OCI archive, without a container engine and without a registry.
//!
//! The archive is a layout (image-layout.md of the OCI image specification) of uncompressed layers, so that importing it is copying it.
//! A layer that several images have is stored once.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::process::Cmd;

/// One image to write.
pub(super) struct Image {
    /// Its full names, tags included.
    pub(super) names: Vec<String>,
    pub(super) layers: Vec<Layer>,
    pub(super) entrypoint: Vec<&'static str>,
    pub(super) command: Vec<&'static str>,
}

/// One layer of an image.
#[derive(Clone)]
pub(super) enum Layer {
    /// A tar archive as it is.
    Archive(PathBuf),
    /// Files and directories by themselves.
    Files(Vec<Entry>),
}

/// Something in a layer, by its path without a leading slash.
#[derive(Clone)]
pub(super) enum Entry {
    File(Cow<'static, str>, PathBuf),
    Text(&'static str, &'static str),
    Link(&'static str, &'static str),
    Directory(&'static str),
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Writes images into one archive; `directory` is for what is made on the way and has to be empty.
pub(super) fn write(images: &[Image], directory: &Path, archive: &Path) -> Result<()> {
    let layout = Layout { blobs: directory.join("layout/blobs/sha256"), scratch: directory.join("scratch") };
    fs::create_dir_all(&layout.blobs)?;
    let mut manifests = Vec::new();
    let mut archives = BTreeMap::new();
    for image in images {
        manifests.extend(layout.image(image, &mut archives)?);
    }
    let root = directory.join("layout");
    fs::write(root.join("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}).to_string())?;
    fs::write(
        root.join("index.json"),
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).to_string(),
    )?;
    tar(&root, archive)
}

struct Layout {
    blobs: PathBuf,
    scratch: PathBuf,
}

impl Layout {
    /// Writes an image's blobs and returns what the index says of it, once a name.
    fn image(&self, image: &Image, archives: &mut BTreeMap<PathBuf, Value>) -> Result<Vec<Value>> {
        let mut layers = Vec::new();
        for layer in &image.layers {
            layers.push(match layer {
                Layer::Archive(path) => {
                    if let Some(known) = archives.get(path) {
                        Value::clone(known)
                    } else {
                        let copy = self.scratch.with_extension("tar");
                        fs::hard_link(path, &copy).or_else(|_| fs::copy(path, &copy).map(drop))?;
                        let descriptor = self.blob(LAYER, &copy)?;
                        let _none = archives.insert(path.clone(), descriptor.clone());
                        descriptor
                    }
                }
                Layer::Files(entries) => self.files(entries)?,
            });
        }
        let digests: Vec<_> = layers.iter().map(|layer| &layer["digest"]).collect();
        let platform = json!({"architecture": architecture()?, "os": "linux"});
        let config = json!({
            "architecture": platform["architecture"],
            "os": platform["os"],
            "config": {
                "Entrypoint": image.entrypoint,
                "Cmd": image.command,
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": digests},
        });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.text(CONFIG, &config)?,
            "layers": layers,
        });
        let manifest = self.text(MANIFEST, &manifest)?;
        Ok(image
            .names
            .iter()
            .map(|name| {
                let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
                json!({
                    "mediaType": MANIFEST,
                    "digest": manifest["digest"],
                    "size": manifest["size"],
                    "platform": platform,
                    "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag},
                })
            })
            .collect())
    }

    /// Makes a layer of files.
    fn files(&self, entries: &[Entry]) -> Result<Value> {
        if self.scratch.exists() {
            fs::remove_dir_all(&self.scratch)?;
        }
        fs::create_dir_all(&self.scratch)?;
        for entry in entries {
            let name = match entry {
                Entry::File(name, _) => name,
                Entry::Text(name, _) | Entry::Link(name, _) | Entry::Directory(name) => *name,
            };
            let path = self.scratch.join(name);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            match entry {
                Entry::File(_, from) => fs::copy(from, &path)
                    .map(drop)
                    .with_context(|| format!("cannot copy {} into an image", from.display()))?,
                Entry::Text(_, text) => fs::write(&path, text)?,
                Entry::Link(_, target) => symlink(target, &path)?,
                Entry::Directory(_) => fs::create_dir_all(&path)?,
            }
        }
        let archive = self.scratch.with_extension("tar");
        tar(&self.scratch, &archive)?;
        self.blob(LAYER, &archive)
    }

    fn text(&self, kind: &str, value: &Value) -> Result<Value> {
        let file = self.scratch.with_extension("json");
        fs::write(&file, value.to_string())?;
        self.blob(kind, &file)
    }

    /// Moves a file to its place by its digest and returns its descriptor.
    fn blob(&self, kind: &str, file: &Path) -> Result<Value> {
        let digest = digest(file)?;
        let size = fs::metadata(file)?.len();
        fs::rename(file, self.blobs.join(&digest))?;
        Ok(json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": size}))
    }
}

/// The SHA-256 of a file, in hexadecimal.
pub(super) fn digest(file: &Path) -> Result<String> {
    let output = Cmd::new("sha256sum").arg(file).stdout()?;
    // A backslash in front says that the name is escaped.
    let digest = output.split_whitespace().next().unwrap_or_default().trim_start_matches('\\');
    Ok(digest.to_owned())
}

/// The same files give the same archive, byte for byte.
fn tar(directory: &Path, archive: &Path) -> Result<()> {
    Cmd::new("tar")
        .args(["--create", "--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"])
        .arg("--file")
        .arg(archive)
        .arg("--directory")
        .arg(directory)
        .arg(".")
        .run()
}

/// Go's name of the machine this is built for.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("no images for {other}: only x86_64 and aarch64 are known here"),
    }
}
