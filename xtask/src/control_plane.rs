//! A real Kubernetes control plane for the api tests: etcd, kube-apiserver and
//! kube-controller-manager, and kube-proxy to compare with, taken from `PATH` where their version is right and
//! otherwise built once from their Go modules into the cache.
//!
//! `k8s.io/kubernetes` cannot be installed with `go install`, because its
//! go.mod replaces its own staging modules by folders. `go/kubernetes/go.mod`
//! is a module of ours that requires it and replaces each of them by the
//! published module of the same release.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::process::{Cmd, find_program};
use crate::ui::Step;
use crate::version;

/// The release, as `go/kubernetes/go.mod` requires it.
const KUBERNETES: &str = "1.36.3";

/// The etcd that this release of Kubernetes requires.
const ETCD: &str = "3.6.8";

/// The oldest Go that builds it.
const GO: (u32, u32) = (1, 26);

const GO_MOD: &str = include_str!("../go/kubernetes/go.mod");
const GO_SUM: &str = include_str!("../go/kubernetes/go.sum");

struct Server {
    name: &'static str,
    package: &'static str,
    version: &'static str,
}

const SERVERS: [Server; 4] = [
    Server { name: "etcd", package: "go.etcd.io/etcd/server/v3", version: ETCD },
    Server { name: "kube-apiserver", package: "k8s.io/kubernetes/cmd/kube-apiserver", version: KUBERNETES },
    Server {
        name: "kube-controller-manager",
        package: "k8s.io/kubernetes/cmd/kube-controller-manager",
        version: KUBERNETES,
    },
    Server { name: "kube-proxy", package: "k8s.io/kubernetes/cmd/kube-proxy", version: KUBERNETES },
];

/// Returns the directory with the programs.
///
/// # Errors
/// When one has to be built and there is no Go that can, or the build fails.
pub(crate) fn obtain(cache: &Cache) -> Result<PathBuf> {
    cache.ensure(
        &format!("control-plane/v{KUBERNETES}"),
        |directory| SERVERS.iter().all(|server| directory.join(server.name).exists()),
        |directory| {
            let sources = directory.join("src");
            fs::create_dir(&sources)?;
            fs::write(sources.join("go.mod"), GO_MOD)?;
            fs::write(sources.join("go.sum"), GO_SUM)?;
            for server in &SERVERS {
                let file = directory.join(server.name);
                if let Some(present) = in_path(server) {
                    eprintln!("{} {}: {}", server.name, server.version, present.display());
                    symlink(&present, &file)?;
                } else {
                    require_go(&sources)?;
                    build(server, &sources, &file)?;
                }
            }
            Ok(())
        },
    )
}

fn in_path(server: &Server) -> Option<PathBuf> {
    let program = find_program(server.name)?;
    let output = Cmd::new(&program).arg("--version").probe().ok()?;
    (version::server(&output) == Some(server.version)).then_some(program)
}

/// Asks in the module's directory, where a Go that is older than go.mod says
/// fetches the right one by itself if it is allowed to.
fn require_go(sources: &Path) -> Result<()> {
    let (major, minor) = GO;
    let how =
        format!("install Go {major}.{minor} or newer (https://go.dev/doc/install) and put it into PATH");
    let output = Cmd::new("go")
        .dir(sources)
        .env("GOWORK", "off")
        .arg("version")
        .probe()
        .with_context(|| format!("no Go to build the control plane with; {how}"))?;
    if version::go(&output).is_none_or(|found| found < GO) {
        bail!("{} is too old to build the control plane; {how}", output.trim());
    }
    Ok(())
}

fn build(server: &Server, sources: &Path, file: &Path) -> Result<()> {
    let step = Step::start_long(format!("{} {}: go build", server.name, server.version));
    let version = "k8s.io/component-base/version";
    let (major, minor) = version::major_minor(KUBERNETES).context("the release is no version")?;
    let flags = format!(
        "-s -w -X {version}.gitVersion=v{KUBERNETES} -X {version}.gitMajor={major} -X {version}.gitMinor={minor}"
    );
    let packages = Cell::new(0_u32);
    Cmd::new("go")
        .dir(sources)
        .env("CGO_ENABLED", "0")
        .env("GOWORK", "off")
        .args(["build", "-mod=mod", "-trimpath", "-v", "-ldflags", &flags, "-o"])
        .args([file.as_os_str(), server.package.as_ref()])
        // With -v go prints each package as it compiles it.
        .run_behind(&step, |package| {
            packages.set(packages.get() + 1);
            Some(format!("{} packages, {package}", packages.get()))
        })
        .with_context(|| format!("cannot build {}", server.name))?;
    step.done("built");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_requires_the_versions_that_are_named_here() {
        assert!(GO_MOD.contains(&format!("require k8s.io/kubernetes v{KUBERNETES}\n")));
        assert!(GO_MOD.contains(&format!("go.etcd.io/etcd/server/v3 v{ETCD} ")));
        let (major, minor) = GO;
        assert!(GO_MOD.contains(&format!("go {major}.{minor}.")));
        for server in SERVERS {
            assert!(GO_MOD.contains(&format!("\t{}\n", server.package)), "{}", server.name);
        }
    }
}
