//! The API server as a pod of `kube-system`, as on most clusters: deleting the pod restarts the API
//! server.
//!
//! The pod is only an object. It is bound to no node, since the control plane's host is none, and
//! its status is written here.

use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;

use crate::components::Components;
use crate::control_plane;
use crate::kubectl::Kubectl;
use crate::launch::Process;
use crate::state::State;

const NAMESPACE: &str = "--namespace=kube-system";
const POD: &str = "pod/kube-apiserver";

/// The pod. Kubernetes' tests find it by its label, to delete it. No scheduler has the name in it.
const MANIFEST: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: kube-apiserver
  namespace: kube-system
  labels: {component: kube-apiserver}
spec:
  schedulerName: control-plane
  automountServiceAccountToken: false
  tolerations: [{operator: Exists}]
  containers:
    - name: kube-apiserver
      image: kube-apiserver
";

const STATUS: &str =
    r#"{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}"#;

/// The pause after an API server did not answer.
const PAUSE: Duration = Duration::from_millis(200);

/// Keeps the pod, and restarts the API server whenever the pod has been deleted.
pub(crate) fn keep(state: &State, components: &Components, kubectl: &Kubectl) -> ! {
    let mut is_shown = false;
    loop {
        let outcome = match exists(kubectl) {
            Ok(false) if is_shown => {
                is_shown = false;
                eprintln!("the API server's pod was deleted: starting the API server again");
                start_again(state, components)
            }
            Ok(_) if !is_shown => show(state, kubectl).map(|()| is_shown = true),
            Ok(_) => {
                // Fails when the API server goes away, or after an hour: the next round finds out.
                drop(kubectl.run(["wait", "--for=delete", POD, NAMESPACE, "--timeout=1h"]));
                Ok(())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            eprintln!("{error:#}");
            sleep(PAUSE);
        }
    }
}

fn exists(kubectl: &Kubectl) -> Result<bool> {
    let found = kubectl.ask(["get", POD, NAMESPACE, "--ignore-not-found", "--output=name"])?;
    Ok(!found.trim().is_empty())
}

fn show(state: &State, kubectl: &Kubectl) -> Result<()> {
    let file = "manifests/kube-apiserver.yaml";
    state.write(file, MANIFEST)?;
    kubectl.apply("--filename", &state.path(file))?;
    let patched = kubectl.ask([
        "patch",
        POD,
        NAMESPACE,
        "--subresource=status",
        "--type=merge",
        "--patch",
        STATUS,
    ]);
    patched.map(drop)
}

/// Restarts it as a crash would, without closing the connections of its clients.
fn start_again(state: &State, components: &Components) -> Result<()> {
    if let Some(process) = Process::recorded(state, control_plane::API_SERVER_NAME) {
        process.kill();
    }
    control_plane::ensure_api_server(state, components)
}
