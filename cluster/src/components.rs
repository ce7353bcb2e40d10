//! The programs of a Kubernetes cluster with all their versions, which change only here.
//!
//! Each version is also in the `go.mod` of its module (a test compares them), and the versions of
//! its dependencies are in `go.sum`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::cache::Cache;
use crate::go::{self, Group, Module, Program};
use crate::process::{Cmd, newest_line};
use crate::ui::Step;

/// The release of Kubernetes.
pub const KUBERNETES: &str = "1.36.3";

/// The etcd that this release requires.
const ETCD: &str = "3.6.8";

const CONTAINERD: &str = "2.2.9";

const GINKGO: &str = "2.28.1";

/// The program that installs charts.
const HELM: &str = "4.3.1";

/// The cluster's DNS server.
pub const COREDNS: &str = "1.14.7";

/// The Prometheus whose promtool checks `deploy/prometheus`: that of Debian 12.
const PROMETHEUS: &str = "2.42.0";

const KUBERNETES_MODULE: Module = Module {
    go_mod: include_str!("../go/kubernetes/go.mod"),
    go_sum: include_str!("../go/kubernetes/go.sum"),
    link_flags: "-X k8s.io/component-base/version.gitVersion=v1.36.3 -X k8s.io/component-base/version.gitMajor=1 \
                 -X k8s.io/component-base/version.gitMinor=36",
    tags: "",
};

const CONTAINERD_MODULE: Module = Module {
    go_mod: include_str!("../go/containerd/go.mod"),
    go_sum: include_str!("../go/containerd/go.sum"),
    link_flags: "-X github.com/containerd/containerd/v2/version.Version=v2.2.9",
    tags: "osusergo,netgo,static_build,no_btrfs,no_zfs,no_aufs,no_devmapper",
};

const COREDNS_MODULE: Module = Module {
    go_mod: include_str!("../go/coredns/go.mod"),
    go_sum: include_str!("../go/coredns/go.sum"),
    link_flags: "",
    tags: "",
};

const HELM_MODULE: Module = Module {
    go_mod: include_str!("../go/helm/go.mod"),
    go_sum: include_str!("../go/helm/go.sum"),
    link_flags: "-X helm.sh/helm/v4/internal/version.version=v4.3.1",
    tags: "",
};

const fn program(name: &'static str, package: &'static str, version: &'static str) -> Program {
    Program { name, package, version, is_test: false }
}

/// The servers that the api tests use, and the kube-proxy that they compare with.
const CONTROL_PLANE: Group = Group {
    entry: "control-plane/v1.36.3",
    module: &KUBERNETES_MODULE,
    programs: &[
        program("etcd", "go.etcd.io/etcd/server/v3", ETCD),
        program("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver", KUBERNETES),
        program(
            "kube-controller-manager",
            "k8s.io/kubernetes/cmd/kube-controller-manager",
            KUBERNETES,
        ),
        program("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy", KUBERNETES),
    ],
    files: &[],
    may_be_in_path: true,
};

/// The further programs of a cluster with nodes.
const NODE: Group = Group {
    entry: "node/v1.36.3",
    module: &KUBERNETES_MODULE,
    programs: &[
        program("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler", KUBERNETES),
        program("kubelet", "k8s.io/kubernetes/cmd/kubelet", KUBERNETES),
    ],
    files: &[],
    may_be_in_path: false,
};

/// The command line client, which includes kustomize.
const KUBECTL: Group = Group {
    entry: "kubectl/v1.36.3",
    module: &KUBERNETES_MODULE,
    programs: &[program("kubectl", "k8s.io/kubernetes/cmd/kubectl", KUBERNETES)],
    files: &[],
    may_be_in_path: false,
};

/// The program that renders the chart.
const HELM_GROUP: Group = Group {
    entry: "helm/v4.3.1",
    module: &HELM_MODULE,
    programs: &[program("helm", "helm.sh/helm/v4/cmd/helm", HELM)],
    files: &[],
    may_be_in_path: false,
};

const CONTAINERD_GROUP: Group = Group {
    entry: "containerd/v2.2.9",
    module: &CONTAINERD_MODULE,
    programs: &[
        program("containerd", "github.com/containerd/containerd/v2/cmd/containerd", CONTAINERD),
        program(
            "containerd-shim-runc-v2",
            "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
            CONTAINERD,
        ),
        program("ctr", "github.com/containerd/containerd/v2/cmd/ctr", CONTAINERD),
    ],
    files: &[],
    may_be_in_path: false,
};

const COREDNS_GROUP: Group = Group {
    entry: "coredns/v1.14.7",
    module: &COREDNS_MODULE,
    programs: &[program("coredns", "github.com/coredns/coredns", COREDNS)],
    files: &[],
    may_be_in_path: false,
};

/// Kubernetes' own servers and clients for tests.
const TEST_IMAGES: Group = Group {
    entry: "test-images/v1.36.3",
    module: &KUBERNETES_MODULE,
    programs: &[
        program("agnhost", "k8s.io/kubernetes/test/images/agnhost", KUBERNETES),
        program(
            "regression-issue-74839",
            "k8s.io/kubernetes/test/images/regression-issue-74839",
            KUBERNETES,
        ),
    ],
    // The certificate of `agnhost porter`.
    files: &[
        ("k8s.io/kubernetes", "test/images/agnhost/porter/localhost.crt"),
        ("k8s.io/kubernetes", "test/images/agnhost/porter/localhost.key"),
    ],
    may_be_in_path: false,
};

/// Kubernetes' own tests.
const E2E: Group = Group {
    entry: "e2e/v1.36.3",
    module: &KUBERNETES_MODULE,
    programs: &[
        program("ginkgo", "github.com/onsi/ginkgo/v2/ginkgo", GINKGO),
        Program {
            name: "e2e.test",
            package: "k8s.io/kubernetes/test/e2e",
            version: KUBERNETES,
            is_test: true,
        },
    ],
    files: &[],
    may_be_in_path: false,
};

/// The directories of the programs of a cluster.
pub struct Components {
    /// etcd, kube-apiserver, kube-controller-manager, kube-proxy.
    pub control_plane: PathBuf,
    /// kubelet, kube-scheduler.
    pub node: PathBuf,
    /// kubectl.
    pub kubectl: PathBuf,
    /// containerd, its shim for runc, ctr.
    pub containerd: PathBuf,
    /// coredns.
    pub coredns: PathBuf,
    /// agnhost and the other programs that Kubernetes' tests run in pods.
    pub test_images: PathBuf,
}

/// Returns the programs of a cluster, and builds those that are missing.
///
/// # Errors
/// If one has to be built and there is no suitable Go, or the build fails.
pub fn cluster(cache: &Cache) -> Result<Components> {
    Ok(Components {
        control_plane: control_plane(cache)?,
        node: go::obtain(cache, &NODE)?,
        kubectl: kubectl(cache)?,
        containerd: go::obtain(cache, &CONTAINERD_GROUP)?,
        coredns: go::obtain(cache, &COREDNS_GROUP)?,
        test_images: go::obtain(cache, &TEST_IMAGES)?,
    })
}

/// Returns the directory of the programs of the api tests: etcd, kube-apiserver,
/// kube-controller-manager and kube-proxy.
///
/// # Errors
/// Those of [`cluster`].
pub fn control_plane(cache: &Cache) -> Result<PathBuf> {
    go::obtain(cache, &CONTROL_PLANE)
}

/// Returns the directory of kubectl.
///
/// # Errors
/// Those of [`cluster`].
pub fn kubectl(cache: &Cache) -> Result<PathBuf> {
    go::obtain(cache, &KUBECTL)
}

/// Returns the directory of Helm.
///
/// # Errors
/// Those of [`cluster`].
pub fn helm(cache: &Cache) -> Result<PathBuf> {
    go::obtain(cache, &HELM_GROUP)
}

/// Returns the directory of Prometheus and promtool: Debian's package, unpacked but not installed,
/// since its installation starts a server.
///
/// # Errors
/// If there is no apt, or the package cannot be downloaded.
pub fn prometheus(cache: &Cache) -> Result<PathBuf> {
    let place = cache.ensure(
        &format!("prometheus/debian-{PROMETHEUS}"),
        |place| ["prometheus", "promtool"].iter().all(|program| place.join("usr/bin").join(program).is_file()),
        |place| {
            let step = Step::start_long("prometheus: Debian's package");
            Cmd::new("apt-get").args(["download", "--quiet", "prometheus"]).dir(place).run_behind(&step, newest_line)?;
            let package = fs::read_dir(place)?
                .flatten()
                .map(|entry| entry.path())
                .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
                .context("apt-get has downloaded no package")?;
            Cmd::new("dpkg").arg("--extract").arg(&package).arg(place).run()?;
            let version = Cmd::new("dpkg").arg("--field").arg(&package).arg("Version").stdout()?;
            ensure!(
                is_of(version.trim(), PROMETHEUS),
                "Debian's prometheus is {}, the rules were tested with {PROMETHEUS}: change the version in cluster/src/components.rs",
                version.trim()
            );
            fs::remove_file(&package)?;
            step.done("unpacked");
            Ok(())
        },
    )?;
    Ok(place.join("usr/bin"))
}

/// Reports whether a Debian version belongs to an upstream release.
fn is_of(version: &str, release: &str) -> bool {
    version
        .strip_prefix(release)
        .is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit() || next == '.'))
}

/// Returns the directory of Kubernetes' own tests, `e2e.test`, and of `ginkgo`, which runs them in
/// parallel.
///
/// # Errors
/// Those of [`cluster`].
pub fn e2e(cache: &Cache) -> Result<PathBuf> {
    go::obtain(cache, &E2E)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_here_is_the_one_its_module_requires() {
        for (module, name, version) in [
            (&KUBERNETES_MODULE, "k8s.io/kubernetes", KUBERNETES),
            (&KUBERNETES_MODULE, "go.etcd.io/etcd/server/v3", ETCD),
            (&KUBERNETES_MODULE, "github.com/onsi/ginkgo/v2", GINKGO),
            (&CONTAINERD_MODULE, "github.com/containerd/containerd/v2", CONTAINERD),
            (&COREDNS_MODULE, "github.com/coredns/coredns", COREDNS),
            (&HELM_MODULE, "helm.sh/helm/v4", HELM),
        ] {
            assert!(
                module.go_mod.lines().any(|line| {
                    let line = line.trim_start_matches("require").trim();
                    line == format!("{name} v{version}")
                        || line.starts_with(&format!("{name} v{version} "))
                }),
                "{name} {version}"
            );
        }
    }

    #[test]
    fn a_package_is_of_its_upstream_release() {
        assert!(is_of("2.42.0+ds-5+deb12u1", "2.42.0") && is_of("2.42.0", "2.42.0"));
        assert!(
            !is_of("2.42.01", "2.42.0")
                && !is_of("2.42.0.1", "2.42.0")
                && !is_of("2.53.3", "2.42.0")
        );
    }

    #[test]
    fn entries_and_link_flags_name_the_same_versions() {
        for group in [&CONTROL_PLANE, &NODE, &KUBECTL, &TEST_IMAGES, &E2E] {
            assert!(group.entry.ends_with(&format!("/v{KUBERNETES}")), "{}", group.entry);
        }
        assert!(KUBERNETES_MODULE.link_flags.contains(&format!("gitVersion=v{KUBERNETES} ")));
        assert!(CONTAINERD_MODULE.link_flags.ends_with(&format!("=v{CONTAINERD}")));
        assert!(CONTAINERD_GROUP.entry.ends_with(&format!("/v{CONTAINERD}")));
        assert!(COREDNS_GROUP.entry.ends_with(&format!("/v{COREDNS}")));
        assert!(HELM_GROUP.entry.ends_with(&format!("/v{HELM}")));
        assert!(HELM_MODULE.link_flags.ends_with(&format!("=v{HELM}")));
    }

    #[test]
    fn the_modules_list_every_program_as_a_tool() {
        for group in [
            &CONTROL_PLANE,
            &NODE,
            &KUBECTL,
            &HELM_GROUP,
            &CONTAINERD_GROUP,
            &COREDNS_GROUP,
            &TEST_IMAGES,
            &E2E,
        ] {
            for program in group.programs.iter().filter(|program| !program.is_test) {
                let listed = group
                    .module
                    .go_mod
                    .lines()
                    .any(|line| line.trim_start_matches("tool").trim() == program.package);
                assert!(listed, "{}", program.name);
            }
        }
    }
}
