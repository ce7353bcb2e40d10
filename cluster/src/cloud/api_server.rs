//! The API server as a pod of `kube-system`, as on most clusters: deleting the pod starts the API
//! server again.
//!
//! The pod is nothing but the object. It is bound to no node, since the control plane's host is
//! none, and says itself that it runs.

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

/// By this label Kubernetes' tests find it, to delete it. No scheduler has the name that is asked
/// for.
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

/// How long to leave an API server alone that does not answer.
const PAUSE: Duration = Duration::from_millis(200);

/// Shows the pod, and starts the API server again whenever it has been deleted.
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
                // It fails when the API server goes away, or after an hour: the next look tells.
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

/// As a crash would: without a word to its clients.
fn start_again(state: &State, components: &Components) -> Result<()> {
    if let Some(process) = Process::recorded(state, control_plane::API_SERVER_NAME) {
        process.kill();
    }
    control_plane::ensure_api_server(state, components)
}
