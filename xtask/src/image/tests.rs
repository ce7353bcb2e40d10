//! An image of a real static program, read back as a registry's client would.

use std::io::Read as _;

use flate2::read::GzDecoder;
use oci_spec::image::{
    Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, OciLayout,
};
use serde_json::Value;

use super::*;

/// A program without anything but itself.
fn program(directory: &Path, is_static: bool) -> Result<PathBuf> {
    let (source, file) =
        (directory.join("program.rs"), directory.join(format!("program-{is_static}")));
    fs::write(&source, "fn main() {}\n")?;
    let feature = format!("-Ctarget-feature={}crt-static", if is_static { '+' } else { '-' });
    Cmd::new("rustc")
        .args(["--edition=2024", "-Cstrip=symbols", &feature, "-o"])
        .args([&file, &source])
        .run()?;
    Ok(file)
}

/// A layout, as it is on disk.
struct Opened {
    root: PathBuf,
    index: ImageIndex,
}

impl Opened {
    fn at(root: &Path) -> Result<Self> {
        assert_eq!(OciLayout::from_file(root.join("oci-layout"))?.image_layout_version(), "1.0.0");
        Ok(Self { root: root.to_owned(), index: ImageIndex::from_file(root.join("index.json"))? })
    }

    /// A blob; its digest and size are what is said of it.
    fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let file = self.root.join("blobs/sha256").join(descriptor.digest().digest());
        let content = fs::read(&file)?;
        assert_eq!(content.len() as u64, descriptor.size());
        assert_eq!(oci::digest(&file)?, descriptor.digest().digest());
        Ok(content)
    }

    fn manifest(&self, descriptor: &Descriptor) -> Result<ImageManifest> {
        Ok(ImageManifest::from_reader(self.blob(descriptor)?.as_slice())?)
    }
}

fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Option<&'a str> {
    descriptor.annotations().as_ref()?.get(key).map(String::as_str)
}

fn unpack(archive: &Path, to: &Path) -> Result<()> {
    tar::Archive::new(fs::File::open(archive)?).unpack(to)?;
    Ok(())
}

#[test]
fn an_image_is_one_static_file_with_labels_and_a_bill_of_materials() -> Result<()> {
    let workspace = Workspace::find()?;
    let directory = tempfile::tempdir()?;
    let binary = program(directory.path(), true)?;
    let output = directory.path().join("image");
    let name = "registry.example:5000/sluice:1.2";
    let written = write(&workspace, &binary, name, &output)?;

    let layout = Opened::at(&output.join("layout"))?;
    let [image, referrer] = layout.index.manifests().as_slice() else {
        panic!("two manifests are wanted: {:?}", layout.index)
    };
    assert_eq!(image.digest().to_string(), written.digest);
    assert_eq!(annotation(image, "io.containerd.image.name"), Some(name));
    assert_eq!(annotation(image, "org.opencontainers.image.ref.name"), Some("1.2"));
    let here = oci::architecture(std::env::consts::ARCH).context("an unknown machine")?;
    assert_eq!(
        image.platform().as_ref().map(|platform| platform.architecture().clone()),
        Some(here.clone())
    );

    let manifest = layout.manifest(image)?;
    let config = ImageConfiguration::from_reader(layout.blob(manifest.config())?.as_slice())?;
    assert_eq!(config.architecture(), &here);
    let run = config.config().as_ref().context("no config")?;
    assert_eq!(run.entrypoint().as_deref(), Some(["/usr/local/bin/sluice".to_owned()].as_slice()));
    assert_eq!(run.cmd().as_deref(), Some(["agent".to_owned()].as_slice()));
    assert_eq!(config.version(), Some(env!("CARGO_PKG_VERSION")));
    let labels = config.labels_of_config().context("no labels")?;
    assert_eq!(manifest.annotations().as_ref(), Some(labels));
    assert_eq!(
        labels.get("org.opencontainers.image.licenses").map(String::as_str),
        Some("Apache-2.0")
    );

    let [layer] = manifest.layers().as_slice() else { panic!("one layer is wanted: {manifest}") };
    assert_eq!(layer.media_type(), &MediaType::ImageLayerGzip);
    let mut archive = Vec::new();
    let _bytes = GzDecoder::new(layout.blob(layer)?.as_slice()).read_to_end(&mut archive)?;
    let plain = directory.path().join("layer.tar");
    fs::write(&plain, &archive)?;
    assert_eq!(config.rootfs().diff_ids().as_slice(), [format!("sha256:{}", oci::digest(&plain)?)]);
    let mut files = Vec::new();
    for entry in tar::Archive::new(archive.as_slice()).entries()? {
        let mut entry = entry?;
        assert_eq!(
            (entry.header().uid()?, entry.header().gid()?, entry.header().mtime()?),
            (0, 0, 0)
        );
        if entry.header().entry_type().is_file() {
            let mut content = Vec::new();
            let _bytes = entry.read_to_end(&mut content)?;
            assert_eq!(content, fs::read(&binary)?);
            assert_eq!(agent::static_architecture(&content)?, std::env::consts::ARCH);
            files.push((entry.path()?.to_string_lossy().into_owned(), entry.header().mode()?));
        }
    }
    assert_eq!(files, [("usr/local/bin/sluice".to_owned(), 0o755)]);

    // The bill of materials, by the way that a registry's client finds it: from the subject.
    let artifact = layout.manifest(referrer)?;
    assert_eq!(artifact.subject().as_ref().map(Descriptor::digest), Some(image.digest()));
    assert_eq!(
        artifact.artifact_type().as_ref().map(ToString::to_string).as_deref(),
        Some(sbom::MEDIA_TYPE)
    );
    assert_eq!(artifact.artifact_type(), referrer.artifact_type());
    assert_eq!(layout.blob(artifact.config())?, b"{}");
    let document = layout.blob(artifact.layers().first().context("no document")?)?;
    assert_eq!(document, fs::read(output.join(SBOM))?);
    let document: Value = serde_json::from_slice(&document)?;
    assert_eq!(
        (&document["bomFormat"], &document["specVersion"]),
        (&"CycloneDX".into(), &"1.6".into())
    );
    assert_eq!(document["metadata"]["component"]["hashes"][0]["content"], oci::digest(&binary)?);
    let components = document["components"].as_array().context("no components")?;
    let parts = |name: &str| -> Vec<&str> {
        let found = components.iter().filter(|component| component["name"] == name);
        found
            .flat_map(|component| component["properties"].as_array().into_iter().flatten())
            .filter_map(|property| property["value"].as_str())
            .collect()
    };
    assert_eq!(parts("aya"), ["agent"]);
    assert_eq!(parts("aya-ebpf"), ["kernel programs"]);
    assert_eq!(parts("sluice-common"), ["agent", "kernel programs"]);
    assert!(components.iter().any(|component| component["name"] == "rust-std"));
    // What only builds, tests or installs it is not in it.
    for other in ["clap_derive", "proptest", "oci-spec", "xtask"] {
        assert!(parts(other).is_empty(), "{other}");
    }
    Ok(())
}

#[test]
fn the_archive_has_the_image_alone_and_the_same_input_gives_the_same_bytes() -> Result<()> {
    let workspace = Workspace::find()?;
    let directory = tempfile::tempdir()?;
    let binary = program(directory.path(), true)?;
    let [first, second] = ["first", "second"].map(|name| directory.path().join(name));
    let written = write(&workspace, &binary, "localhost/sluice:1", &first)?;
    let again = write(&workspace, &binary, "localhost/sluice:1", &second)?;
    assert_eq!(written.digest, again.digest);
    for file in ["sluice.tar", SBOM, "layout/index.json"] {
        assert_eq!(fs::read(first.join(file))?, fs::read(second.join(file))?, "{file}");
    }
    let unpacked = directory.path().join("unpacked");
    unpack(&written.archive, &unpacked)?;
    let archive = Opened::at(&unpacked)?;
    let [image] = archive.index.manifests().as_slice() else {
        panic!("one manifest: {:?}", archive.index)
    };
    assert_eq!(image.digest().to_string(), written.digest);
    let manifest = archive.manifest(image)?;
    let blobs = [image, manifest.config(), manifest.layers().first().context("no layer")?];
    for blob in blobs {
        let _content = archive.blob(blob)?;
    }
    assert_eq!(fs::read_dir(unpacked.join("blobs/sha256"))?.count(), blobs.len());
    Ok(())
}

#[test]
fn what_an_empty_base_cannot_run_is_refused() -> Result<()> {
    let workspace = Workspace::find()?;
    let directory = tempfile::tempdir()?;
    let refused = |binary: &Path| -> Result<String> {
        let written =
            write(&workspace, binary, "localhost/sluice:1", &directory.path().join("image"));
        Ok(format!("{:#}", written.err().context("it was written")?))
    };
    let dynamic = refused(&program(directory.path(), false)?)?;
    assert!(dynamic.contains("it is not static"), "{dynamic}");
    let text = directory.path().join("text");
    fs::write(&text, "#!/bin/sh\n")?;
    let text = refused(&text)?;
    assert!(text.contains("it is no 64-bit ELF file"), "{text}");
    Ok(())
}

#[test]
fn a_name_without_a_tag_or_a_place_is_refused() {
    for name in ["sluice:1", "localhost/sluice", "localhost:5000/sluice", "localhost/sluice:"] {
        assert!(full_name(name).is_err(), "{name}");
    }
    assert!(full_name("localhost:5000/sluice:1").is_ok());
}
