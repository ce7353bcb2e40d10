//! The images of a cluster's pods, made of our own builds and Debian packages, under the names that
//! Kubernetes and its tests use.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::Tree;
use crate::cache::Cache;
use crate::components::{COREDNS, Components, KUBERNETES};
use crate::image::{self, Image, Layer};
use crate::oci::{self, Entry};
use crate::process::{Cmd, newest_line};
use crate::ui::Step;

/// Has to change with everything below that changes the images, except versions of components.
const RECIPE: u32 = 4;

/// The packages in the images for tests.
const PACKAGES: &str = "ca-certificates,curl,netcat-openbsd,iproute2,bind9-dnsutils,iperf,iputils-ping,procps,wget,conntrack,\
                        iptables,nftables,busybox-static";

/// The name of Sluice's image without a tag, as in `deploy/base`. No registry on the Internet can
/// have it.
pub const SLUICE: &str = "localhost/sluice";

/// The image of every sandbox, as this containerd is configured.
pub(crate) const PAUSE: &str = "registry.k8s.io/pause:3.10.2";

const PAUSE_SOURCE: &str = include_str!("../pause.rs");

/// Returns the archive with the images of every cluster, and makes it if it is missing.
pub(crate) fn obtain(cache: &Cache, components: &Components) -> Result<PathBuf> {
    let directory = cache.ensure(
        &format!("images/v{KUBERNETES}-coredns-{COREDNS}-{RECIPE}"),
        |directory| directory.join("images.tar").is_file(),
        |directory| {
            let step = Step::start_long("images for pods");
            let root = directory.join("root.tar");
            file_system(&step, &root)?;
            let pause = directory.join("pause");
            build_pause(directory, &pause)?;
            step.note("writing the archive");
            let scratch = directory.join("making");
            fs::create_dir(&scratch)?;
            image::write(
                &images(components, &root, &pause),
                &scratch,
                &directory.join("images.tar"),
            )
            .context("cannot write the images' archive")?;
            fs::remove_dir_all(&scratch)?;
            fs::remove_file(&root)?;
            step.done("made");
            Ok(())
        },
    )?;
    Ok(directory.join("images.tar"))
}

/// Makes the file system of a small Debian.
fn file_system(step: &Step, archive: &Path) -> Result<()> {
    let without = ["doc", "man", "locale", "info", "zoneinfo"];
    Cmd::new("mmdebstrap")
        // Containers have a /dev of their own.
        .args(["--variant=minbase", "--skip=output/dev", &format!("--include={PACKAGES}")])
        .args(without.map(|name| format!("--dpkgopt=path-exclude=/usr/share/{name}/*")))
        .arg(suite())
        .arg(archive)
        .run_behind(step, newest_line)
        .context("cannot make a Debian file system for the pods' images: are Debian's packages within reach?")
}

/// Returns the release of Debian whose packages are used: this machine's own if it runs Debian,
/// since its mirrors are known to work.
fn suite() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field =
        |name: &str| release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    match (field("ID"), field("VERSION_CODENAME")) {
        (Some("debian"), Some(name)) => name.to_owned(),
        _ => "stable".to_owned(),
    }
}

fn build_pause(directory: &Path, file: &Path) -> Result<()> {
    let source = directory.join("pause.rs");
    fs::write(&source, PAUSE_SOURCE)?;
    Cmd::new("rustc")
        .args(["--edition=2024", "-Copt-level=s", "-Cpanic=abort", "-Cstrip=symbols"])
        .args(["-Ctarget-feature=+crt-static", "-o"])
        .args([file, &source])
        .run()
        .context("cannot build the program of the pods' sandboxes")
}

fn images(components: &Components, root: &Path, pause: &Path) -> Vec<Image> {
    let debian = || Layer::Archive(root.to_owned());
    let test_image = |name: &str| components.test_images.join(name);
    let coredns =
        || Layer::Files(vec![Entry::File("coredns".into(), components.coredns.join("coredns"))]);
    // Some tests run a DNS server from it.
    let agnhost = || {
        Layer::Files(vec![
            Entry::File("agnhost".into(), test_image("agnhost")),
            Entry::Link("agnhost-2".into(), "agnhost".into()),
            Entry::File("localhost.crt".into(), test_image("localhost.crt")),
            Entry::File("localhost.key".into(), test_image("localhost.key")),
            // GNU's wget tries twenty times, the wget of the original images once.
            Entry::Text("etc/wgetrc".into(), "tries = 1\n".into()),
            Entry::Directory("uploads".into()),
        ])
    };
    let of_tests = |name: &str| format!("registry.k8s.io/e2e-test-images/{name}");
    let image = |names: Vec<String>, layers, entrypoint, command| Image {
        names,
        layers,
        entrypoint,
        command,
    };
    vec![
        image(
            vec![PAUSE.to_owned(), "registry.k8s.io/pause:3.10".to_owned()],
            vec![Layer::Files(vec![Entry::File("pause".into(), pause.to_owned())])],
            vec!["/pause"],
            vec![],
        ),
        image(
            // The short name is for people.
            vec![
                of_tests("agnhost:2.63.0"),
                of_tests("agnhost:2.55"),
                "docker.io/library/agnhost:2".to_owned(),
            ],
            vec![debian(), coredns(), agnhost()],
            vec!["/agnhost"],
            vec!["pause"],
        ),
        image(
            vec![of_tests("nginx:1.15-4"), of_tests("nginx:1.27-0")],
            vec![debian(), coredns(), agnhost()],
            vec!["/agnhost"],
            vec!["test-webserver"],
        ),
        image(
            vec![of_tests("busybox:1.37.0-1"), "docker.io/library/debian:local".to_owned()],
            vec![debian()],
            vec![],
            vec!["sh"],
        ),
        image(
            vec![
                of_tests("glibc-dns-testing:2.0.0"),
                "registry.k8s.io/build-image/distroless-iptables:v0.9.6".to_owned(),
            ],
            vec![debian()],
            vec![],
            vec!["sleep", "infinity"],
        ),
        image(
            vec![of_tests("regression-issue-74839:1.4")],
            vec![
                debian(),
                Layer::Files(vec![Entry::File(
                    "regression-issue-74839".into(),
                    test_image("regression-issue-74839"),
                )]),
            ],
            vec!["/regression-issue-74839"],
            vec![],
        ),
        image(
            vec![format!("registry.k8s.io/kube-proxy:v{KUBERNETES}")],
            vec![
                debian(),
                Layer::Files(vec![Entry::File(
                    "usr/local/bin/kube-proxy".into(),
                    components.control_plane.join("kube-proxy"),
                )]),
            ],
            vec!["/usr/local/bin/kube-proxy"],
            vec![],
        ),
        image(
            vec![format!("registry.k8s.io/coredns/coredns:v{COREDNS}")],
            vec![coredns()],
            vec!["/coredns"],
            vec![],
        ),
    ]
}

/// The image of Sluice.
pub(crate) struct Own {
    pub(crate) archive: PathBuf,
    /// The tag, which changes with the content.
    pub(crate) tag: String,
}

/// Writes the image of Sluice into a directory: that of `cargo xtask image`, or, for a binary that
/// is not static, one with the libraries that it needs.
pub(crate) fn sluice(tree: &Tree<'_>, binary: &Path, directory: &Path) -> Result<Own> {
    let tag = oci::digest(binary)?.chars().take(12).collect::<String>();
    let name = format!("{SLUICE}:{tag}");
    let written =
        (tree.write_image)(binary, &name, directory).context("cannot make the image of Sluice")?;
    let archive = match written {
        Some(archive) => archive,
        None => dynamic(binary, name, directory)
            .with_context(|| format!("cannot make an image of {}", binary.display()))?,
    };
    Ok(Own { archive, tag })
}

fn dynamic(binary: &Path, name: String, directory: &Path) -> Result<PathBuf> {
    let scratch = directory.join("making");
    fs::create_dir_all(&scratch)?;
    let stripped = scratch.join("sluice");
    Cmd::new("strip").args(["--strip-debug", "-o"]).args([&stripped, binary]).run()?;
    let libraries = Cmd::new("ldd").arg(binary).answer()?;
    let mut entries = vec![Entry::File("usr/local/bin/sluice".into(), stripped)];
    for library in libraries_of(&libraries) {
        entries
            .push(Entry::File(library.trim_start_matches('/').to_owned(), PathBuf::from(library)));
    }
    let image = Image {
        names: vec![name],
        layers: vec![Layer::Files(entries)],
        entrypoint: vec!["/usr/local/bin/sluice"],
        command: vec!["agent"],
    };
    let archive = directory.join("sluice.tar");
    image::write(&[image], &scratch, &archive)?;
    fs::remove_dir_all(&scratch)?;
    Ok(archive)
}

/// Returns the paths in the output of ldd: `libc.so.6 => /lib/libc.so.6 (0x7f00)` or
/// `/lib64/ld-linux.so.2 (0x7f00)`.
fn libraries_of(ldd: &str) -> impl Iterator<Item = &str> {
    ldd.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_needs_its_libraries_and_what_loads_them() {
        let told = "\tlinux-vdso.so.1 (0x7f1)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f2)\n\t/lib64/ld.so.2 (0x7f3)\n";
        assert_eq!(libraries_of(told).collect::<Vec<_>>(), ["/lib/libc.so.6", "/lib64/ld.so.2"]);
    }
}
