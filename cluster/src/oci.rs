//! OCI image layouts (image-layout.md of the OCI image specification), written without a container
//! engine.
//!
//! The same content gives the same bytes: archives have neither times nor owners, and the keys of
//! JSON are sorted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use oci_spec::image::{
    ANNOTATION_REF_NAME, ANNOTATION_TITLE, Arch, Config, Descriptor, Digest,
    ImageConfigurationBuilder, ImageIndexBuilder, ImageManifestBuilder, MediaType,
    OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder,
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

/// The annotation by which containerd knows an image's full name.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// The content of an empty config.
const EMPTY: &[u8] = b"{}";

/// An entry of an archive, by its path without a leading slash.
#[derive(Clone, Debug)]
pub enum Entry {
    /// A copy of a file.
    File(String, PathBuf),
    /// A file with this content.
    Text(String, String),
    /// A symbolic link to this target.
    Link(String, String),
    /// A directory of its own.
    Directory(String),
}

impl Entry {
    fn name(&self) -> &str {
        let (Self::File(name, _)
        | Self::Text(name, _)
        | Self::Link(name, _)
        | Self::Directory(name)) = self;
        name
    }
}

/// A layer whose blob is in place.
#[derive(Clone, Debug)]
pub struct Layer {
    descriptor: Descriptor,
    /// The digest of its archive before it is compressed.
    diff_id: String,
}

/// A layout under construction.
pub struct Layout {
    root: PathBuf,
    manifests: Vec<Descriptor>,
}

impl Layout {
    /// Begins a layout in a directory, which is emptied.
    pub fn create(root: &Path) -> Result<Self> {
        let context = || format!("cannot make {}", root.display());
        if root.exists() {
            fs::remove_dir_all(root).with_context(context)?;
        }
        fs::create_dir_all(root.join("blobs/sha256")).with_context(context)?;
        Ok(Self { root: root.to_owned(), manifests: Vec::new() })
    }

    /// Makes a layer of an archive without compressing it, so that an import only copies it.
    pub fn layer_of_archive(&self, archive: &Path) -> Result<Layer> {
        let reading = || format!("cannot read {}", archive.display());
        let mut source = BufReader::new(File::open(archive).with_context(reading)?);
        let descriptor = self.blob(MediaType::ImageLayer, |sink| {
            io::copy(&mut source, sink).map(drop).with_context(reading)
        })?;
        Ok(Layer { diff_id: descriptor.digest().to_string(), descriptor })
    }

    /// Makes a layer of files.
    pub fn layer(&self, entries: &[Entry]) -> Result<Layer> {
        let descriptor = self.blob(MediaType::ImageLayer, |sink| write_archive(entries, sink))?;
        Ok(Layer { diff_id: descriptor.digest().to_string(), descriptor })
    }

    /// Makes a compressed layer of files.
    pub fn compressed_layer(&self, entries: &[Entry]) -> Result<Layer> {
        let mut diff_id = None;
        let descriptor = self.blob(MediaType::ImageLayerGzip, |sink| {
            let gzip = GzBuilder::new().mtime(0).write(sink, Compression::best());
            let mut archive = Hashing::new(gzip);
            write_archive(entries, &mut archive)?;
            let (digest, _, gzip) = archive.finish();
            let _sink = gzip.finish().context("cannot compress a layer")?;
            diff_id = Some(digest);
            Ok(())
        })?;
        Ok(Layer { descriptor, diff_id: diff_id.context("a layer has no digest")? })
    }

    /// Adds an image under its full names, and returns its manifest's descriptor.
    ///
    /// # Errors
    /// If a blob cannot be written.
    pub fn image(
        &mut self,
        names: &[String],
        architecture: Arch,
        layers: &[Layer],
        config: Config,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Descriptor> {
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.clone()).collect();
        let config = ImageConfigurationBuilder::default()
            .architecture(architecture.clone())
            .os(Os::Linux)
            .config(config)
            .rootfs(RootFsBuilder::default().typ("layers").diff_ids(diff_ids).build()?)
            .build()?;
        let mut manifest = ImageManifestBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageManifest)
            .config(self.json(MediaType::ImageConfig, &config)?)
            .layers(layers.iter().map(|layer| layer.descriptor.clone()).collect::<Vec<_>>());
        if !annotations.is_empty() {
            manifest =
                manifest.annotations(annotations.clone().into_iter().collect::<HashMap<_, _>>());
        }
        let mut descriptor = self.json(MediaType::ImageManifest, &manifest.build()?)?;
        let plain = descriptor.clone();
        let platform =
            PlatformBuilder::default().architecture(architecture).os(Os::Linux).build()?;
        let _set = descriptor.set_platform(Some(platform));
        for name in names {
            let mut named = descriptor.clone();
            let annotations = [(CONTAINERD_NAME, name.as_str()), (ANNOTATION_REF_NAME, tag(name))];
            let annotations = annotations.map(|(key, value)| (key.to_owned(), value.to_owned()));
            let _set = named.set_annotations(Some(annotations.into()));
            self.manifests.push(named);
        }
        Ok(plain)
    }

    /// Adds a document that refers to an image: an artifact manifest whose subject the image is.
    pub fn attach(
        &mut self,
        subject: &Descriptor,
        media_type: &str,
        file_name: &str,
        document: &[u8],
    ) -> Result<()> {
        let kind = MediaType::Other(media_type.to_owned());
        let mut layer = self.bytes(kind.clone(), document)?;
        let _set = layer
            .set_annotations(Some([(ANNOTATION_TITLE.to_owned(), file_name.to_owned())].into()));
        let manifest = ImageManifestBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageManifest)
            .artifact_type(kind.clone())
            .config(self.bytes(MediaType::EmptyJSON, EMPTY)?)
            .layers(vec![layer])
            .subject(subject.clone())
            .build()?;
        let mut descriptor = self.json(MediaType::ImageManifest, &manifest)?;
        let _set = descriptor.set_artifact_type(Some(kind));
        self.manifests.push(descriptor);
        Ok(())
    }

    /// Writes the files that make the directory a layout of everything added so far.
    pub fn finish(&self) -> Result<()> {
        let index = ImageIndexBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageIndex)
            .manifests(self.manifests.clone())
            .build()?;
        let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;
        for (name, content) in [("index.json", sorted(&index)?), ("oci-layout", sorted(&layout)?)] {
            let path = self.root.join(name);
            fs::write(&path, content)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    fn json(&self, kind: MediaType, value: &impl Serialize) -> Result<Descriptor> {
        self.bytes(kind, sorted(value)?.as_bytes())
    }

    fn bytes(&self, kind: MediaType, content: &[u8]) -> Result<Descriptor> {
        self.blob(kind, |sink| sink.write_all(content).context("cannot write a blob"))
    }

    /// Writes a blob and moves it to its place by its digest.
    fn blob(
        &self,
        kind: MediaType,
        write: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<Descriptor> {
        let blobs = self.root.join("blobs/sha256");
        let partial = blobs.join(".partial");
        let context = || format!("cannot write {}", partial.display());
        let file = File::create(&partial).with_context(context)?;
        let mut sink = Hashing::new(BufWriter::new(file));
        write(&mut sink)?;
        let (digest, size, mut file) = sink.finish();
        file.flush().with_context(context)?;
        let digest: Digest = digest.parse().context("a digest of ours is none")?;
        fs::rename(&partial, blobs.join(digest.digest())).with_context(context)?;
        Ok(Descriptor::new(kind, size, digest))
    }
}

/// Puts a layout into one archive.
pub fn archive(layout: &Path, archive: &Path) -> Result<()> {
    let mut entries = Vec::new();
    for name in ["oci-layout", "index.json"] {
        entries.push(Entry::File(name.to_owned(), layout.join(name)));
    }
    for blob in fs::read_dir(layout.join("blobs/sha256")).context("cannot read a layout's blobs")? {
        let blob = blob?;
        let name = format!("blobs/sha256/{}", blob.file_name().to_string_lossy());
        entries.push(Entry::File(name, blob.path()));
    }
    let context = || format!("cannot write {}", archive.display());
    let mut file = BufWriter::new(File::create(archive).with_context(context)?);
    write_archive(&entries, &mut file)?;
    file.flush().with_context(context)
}

/// Returns the SHA-256 of a file, in hexadecimal.
pub fn digest(file: &Path) -> Result<String> {
    let reading = || format!("cannot read {}", file.display());
    let mut sink = Hashing::new(io::sink());
    let _bytes =
        io::copy(&mut File::open(file).with_context(reading)?, &mut sink).with_context(reading)?;
    let (digest, _, _) = sink.finish();
    Ok(digest.trim_start_matches("sha256:").to_owned())
}

/// Returns the tag of an image's full name, in which a colon may also precede a registry's port.
pub fn tag(name: &str) -> &str {
    let last = name.rsplit('/').next().unwrap_or(name);
    last.split_once(':').map_or("latest", |(_, tag)| tag)
}

/// Returns Go's name of an architecture, by Rust's.
pub fn architecture(rust: &str) -> Option<Arch> {
    match rust {
        "x86_64" => Some(Arch::Amd64),
        "aarch64" => Some(Arch::ARM64),
        _ => None,
    }
}

/// Returns JSON with sorted keys, since the maps of oci-spec have no order.
fn sorted(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_value(value)?.to_string())
}

/// Writes entries sorted by name, each folder before its content, owned by root and without times.
fn write_archive(entries: &[Entry], sink: &mut dyn Write) -> Result<()> {
    let mut sorted: Vec<_> = entries.iter().collect();
    sorted.sort_by(|a, b| a.name().cmp(b.name()));
    let mut archive = tar::Builder::new(sink);
    let mut folders = BTreeSet::new();
    for entry in sorted {
        let mut above: Vec<_> = Path::new(entry.name()).ancestors().skip(1).collect();
        let _archive = above.pop();
        for folder in above.into_iter().rev() {
            put_folder(&mut archive, &mut folders, folder)?;
        }
        let name = entry.name();
        let context = || format!("cannot put {name} into an archive");
        match entry {
            Entry::Directory(_) => put_folder(&mut archive, &mut folders, Path::new(name))?,
            Entry::File(_, from) => {
                let reading = || format!("cannot read {}", from.display());
                let file = File::open(from).with_context(reading)?;
                let metadata = file.metadata().with_context(reading)?;
                let mode = rustix::fs::Mode::from_bits_truncate(rustix::fs::fstat(&file)?.st_mode);
                let mode = if mode.contains(rustix::fs::Mode::XUSR) { 0o755 } else { 0o644 };
                let mut header = header(tar::EntryType::Regular, metadata.len(), mode);
                archive.append_data(&mut header, name, file).with_context(context)?;
            }
            Entry::Text(_, text) => {
                let mut header = header(tar::EntryType::Regular, text.len() as u64, 0o644);
                archive.append_data(&mut header, name, text.as_bytes()).with_context(context)?;
            }
            Entry::Link(_, target) => {
                let mut header = header(tar::EntryType::Symlink, 0, 0o777);
                archive.append_link(&mut header, name, target).with_context(context)?;
            }
        }
    }
    let _sink = archive.into_inner().context("cannot end an archive")?;
    Ok(())
}

fn put_folder(
    archive: &mut tar::Builder<&mut dyn Write>,
    known: &mut BTreeSet<PathBuf>,
    folder: &Path,
) -> Result<()> {
    if known.insert(folder.to_owned()) {
        let mut header = header(tar::EntryType::Directory, 0, 0o755);
        archive
            .append_data(&mut header, folder.join(""), io::empty())
            .with_context(|| format!("cannot put {} into an archive", folder.display()))?;
    }
    Ok(())
}

fn header(kind: tar::EntryType, size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// A writer that counts and digests what it passes on.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), size: 0 }
    }

    /// Returns the digest as OCI writes it, the size, and the inner writer.
    fn finish(self) -> (String, u64, W) {
        let digest = self.hash.finalize().iter().fold("sha256:".to_owned(), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        });
        (digest, self.size, self.inner)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, content: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(content)?;
        self.hash.update(content.get(..count).unwrap_or_default());
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_no_port_of_a_registry() {
        assert_eq!(tag("localhost/sluice:0.1.0"), "0.1.0");
        assert_eq!(tag("registry.example:5000/sluice"), "latest");
        assert_eq!(tag("registry.example:5000/sluice:1"), "1");
    }

    #[test]
    fn an_archive_has_each_folder_once_and_before_its_files() -> Result<()> {
        let text = |name: &str| Entry::Text(name.to_owned(), "x".to_owned());
        let entries = [
            text("usr/bin/b"),
            text("usr/bin/a"),
            Entry::Directory("usr".into()),
            Entry::Link("a".into(), "usr/bin/a".into()),
        ];
        let mut content = Vec::new();
        write_archive(&entries, &mut content)?;
        let mut archive = tar::Archive::new(content.as_slice());
        let names: Vec<_> = archive
            .entries()?
            .map(|entry| Ok(entry?.path()?.to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        assert_eq!(names, ["a", "usr/", "usr/bin/", "usr/bin/a", "usr/bin/b"]);
        Ok(())
    }

    #[test]
    fn a_digest_is_that_of_the_content() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("empty");
        fs::write(&file, "")?;
        assert_eq!(
            digest(&file)?,
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        Ok(())
    }
}
