//! The pods of a fresh cluster: the Service proxy and the DNS server.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::addresses::{API_PORT, API_SERVER, CLUSTER_CIDRS, DNS_SERVICE};
use crate::components::{COREDNS, KUBERNETES};
use crate::images::SLUICE;
use crate::kubectl::Kubectl;
use crate::state::State;
use crate::{Overlay, Tree};

const COREDNS_MANIFEST: &str = include_str!("../manifests/coredns.yaml");
const KUBE_PROXY_MANIFEST: &str = include_str!("../manifests/kube-proxy.yaml");

/// The longest time that pods may take to become ready.
const PATIENCE: &str = "--timeout=120s";

/// Applies CoreDNS.
pub(crate) fn apply_dns(state: &State, kubectl: &Kubectl) -> Result<()> {
    let image = format!("registry.k8s.io/coredns/coredns:v{COREDNS}");
    apply(
        state,
        kubectl,
        "coredns.yaml",
        COREDNS_MANIFEST,
        &[("image", &image), ("address", DNS_SERVICE)],
    )
}

/// Applies kube-proxy.
pub(crate) fn apply_kube_proxy(state: &State, kubectl: &Kubectl) -> Result<()> {
    let values = [
        ("image", format!("registry.k8s.io/kube-proxy:v{KUBERNETES}")),
        ("cluster-cidrs", CLUSTER_CIDRS.to_owned()),
        ("api-server", API_SERVER.to_owned()),
        ("api-port", API_PORT.to_string()),
    ];
    let values = values.each_ref().map(|(name, value)| (*name, value.as_str()));
    apply(state, kubectl, "kube-proxy.yaml", KUBE_PROXY_MANIFEST, &values)
}

/// Applies an overlay of `deploy/`, with the values that differ between clusters as
/// `deploy/example` sets them.
pub(crate) fn apply_sluice(
    tree: &Tree<'_>,
    state: &State,
    kubectl: &Kubectl,
    overlay: Overlay,
    tag: &str,
) -> Result<()> {
    let own = state.path("sluice/deploy");
    if own.exists() {
        fs::remove_dir_all(&own).with_context(|| format!("cannot remove {}", own.display()))?;
    }
    for folder in ["base", "components", "overlays"] {
        copy(&tree.root.join("deploy").join(folder), &own.join(folder))?;
    }
    let overlay = overlay.name();
    let kustomization = format!(
        "apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: kube-system
resources: [deploy/overlays/{overlay}]
images:
  - {{name: {SLUICE}, newTag: \"{tag}\"}}
patches:
  - patch: |
      apiVersion: apps/v1
      kind: DaemonSet
      metadata: {{name: sluice, namespace: kube-system}}
      spec:
        template:
          metadata:
            # Kubernetes' tests find by it what serves the Services, to restart it.
            labels: {{k8s-app: kube-proxy}}
          spec:
            containers:
              - name: agent
                env:
                  - {{name: KUBERNETES_SERVICE_HOST, value: \"{API_SERVER}\"}}
                  - {{name: KUBERNETES_SERVICE_PORT, value: \"{API_PORT}\"}}
"
    );
    state.write("sluice/kustomization.yaml", &kustomization)?;
    kubectl.apply("-k", &state.path("sluice"))
}

/// Copies a folder recursively.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let context = || format!("cannot copy {} to {}", from.display(), to.display());
    fs::create_dir_all(to).with_context(context)?;
    for entry in fs::read_dir(from).with_context(context)? {
        let entry = entry?;
        let place = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &place)?;
        } else {
            let _bytes = fs::copy(entry.path(), place).with_context(context)?;
        }
    }
    Ok(())
}

/// Waits until all pods of a workload of `kube-system` (`ds/sluice`) are ready and of the newest
/// template.
pub(crate) fn wait(kubectl: &Kubectl, workload: &str) -> Result<()> {
    let waited = kubectl.run(["--namespace=kube-system", "rollout", "status", workload, PATIENCE]);
    waited.map(drop).with_context(|| {
        let pods = kubectl.ask(["get", "pods", "--namespace=kube-system", "--output=wide"]);
        format!(
            "{workload} did not become ready; look with `cargo xtask cluster shell -- kubectl -n kube-system logs {workload}`. The pods are\n{}",
            pods.unwrap_or_default()
        )
    })
}

fn apply(
    state: &State,
    kubectl: &Kubectl,
    name: &str,
    manifest: &str,
    values: &[(&str, &str)],
) -> Result<()> {
    let file = Path::new("manifests").join(name);
    state.write(&file, &fill(manifest, values))?;
    kubectl.apply("--filename", &state.path(&file))
}

/// Replaces each `${name}` by its value.
fn fill(manifest: &str, values: &[(&str, &str)]) -> String {
    values.iter().fold(manifest.to_owned(), |text, (name, value)| {
        text.replace(&format!("${{{name}}}"), value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_go_into_their_places_and_nowhere_else() {
        assert_eq!(
            fill("image: ${image} $(NODE) ${other}", &[("image", "a:1")]),
            "image: a:1 $(NODE) ${other}"
        );
    }
}
