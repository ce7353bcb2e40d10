//! etcd, API server, controller manager and scheduler: processes in one namespace, as if on one
//! host.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::addresses::{API_PORT, API_SERVER, SERVICE_CIDRS};
use crate::cloud;
use crate::components::Components;
use crate::kubectl::Kubectl;
use crate::launch::{self, Process};
use crate::network::CONTROL_PLANE;
use crate::process::Cmd;
use crate::state::State;

/// The names of its processes, in the order in which they start.
pub(crate) const NAMES: [&str; 5] =
    ["etcd", API_SERVER_NAME, "kube-controller-manager", "kube-scheduler", cloud::NAME];
pub(crate) const API_SERVER_NAME: &str = "kube-apiserver";

/// Starts etcd and the API server, unless they run.
pub(crate) fn ensure_api_server(state: &State, components: &Components) -> Result<()> {
    let pki = |name: &str| state.path("pki").join(name);
    let etcd = Cmd::new(components.control_plane.join("etcd"))
        .arg("--data-dir")
        .arg(state.path("etcd"))
        // Its content need not survive a crash of the machine.
        .args(["--unsafe-no-fsync", "--log-level", "warn", "--quota-backend-bytes", "4294967296"])
        .args(["--listen-client-urls", "http://127.0.0.1:2379"])
        .args(["--advertise-client-urls", "http://127.0.0.1:2379"])
        .args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
    let _is_new = launch::ensure(state, "etcd", CONTROL_PLANE, CONTROL_PLANE, etcd)?;

    let api_server = [
        ("--tls-cert-file", pki("apiserver.crt")),
        ("--tls-private-key-file", pki("apiserver.key")),
        ("--client-ca-file", pki("ca.crt")),
        ("--token-auth-file", pki("tokens.csv")),
        ("--service-account-key-file", pki("service-accounts.key")),
        ("--service-account-signing-key-file", pki("service-accounts.key")),
        ("--kubelet-client-certificate", pki("kubelet-client.crt")),
        ("--kubelet-client-key", pki("kubelet-client.key")),
        ("--cert-dir", pki("")),
    ]
    .into_iter()
    .fold(Cmd::new(components.control_plane.join("kube-apiserver")), |command, (flag, file)| {
        command.arg(flag).arg(file)
    })
    .args(["--etcd-servers", "http://127.0.0.1:2379", "--bind-address", "::", "--allow-privileged"])
    .args(["--secure-port", &API_PORT.to_string(), "--advertise-address", API_SERVER])
    .args(["--service-account-issuer", "https://kubernetes.default.svc.cluster.local"])
    .args(["--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction"])
    .args(["--kubelet-preferred-address-types", "InternalIP"])
    .args(["--service-cluster-ip-range", SERVICE_CIDRS]);
    let _is_new = launch::ensure(state, API_SERVER_NAME, CONTROL_PLANE, CONTROL_PLANE, api_server)?;
    Ok(())
}

/// Starts controller manager, scheduler and cloud, unless they run. The first two give up if no API
/// server answers.
pub(crate) fn ensure_controllers(state: &State, components: &Components) -> Result<()> {
    let pki = |name: &str| state.path("pki").join(name);
    let controllers =
        client(state, Cmd::new(components.control_plane.join("kube-controller-manager")))
            .arg("--service-account-private-key-file")
            .arg(pki("service-accounts.key"))
            .arg("--root-ca-file")
            .arg(pki("ca.crt"))
            .arg("--cluster-signing-cert-file")
            .arg(pki("ca.crt"))
            .arg("--cluster-signing-key-file")
            .arg(pki("ca.key"))
            // By default it makes a directory of the machine.
            .arg("--flex-volume-plugin-dir")
            .arg(state.path("volume-plugins"))
            // The ranges of the nodes are those of their CNI configuration.
            .args(["--use-service-account-credentials", "--allocate-node-cidrs=false"])
            .args(["--kube-api-qps", "200", "--kube-api-burst", "400"]);
    let _is_new = launch::ensure(
        state,
        "kube-controller-manager",
        CONTROL_PLANE,
        CONTROL_PLANE,
        controllers,
    )?;

    let scheduler = client(state, Cmd::new(components.node.join("kube-scheduler")));
    let _is_new = launch::ensure(state, "kube-scheduler", CONTROL_PLANE, CONTROL_PLANE, scheduler)?;
    cloud::ensure(state)
}

/// Returns the arguments that all clients of the API server have in common.
fn client(state: &State, command: Cmd) -> Cmd {
    ["--kubeconfig", "--authentication-kubeconfig", "--authorization-kubeconfig"]
        .into_iter()
        .fold(command, |command, flag| command.arg(flag).arg(state.kubeconfig()))
        .arg("--leader-elect=false")
}

/// Waits until the API server reports that it is ready.
pub(crate) fn wait_api_server(state: &State, kubectl: &Kubectl) -> Result<()> {
    let deadline = Instant::now() + Duration::from_mins(1);
    while kubectl.ask(["get", "--raw", "/readyz"]).is_err() {
        check(state, &["etcd", API_SERVER_NAME])?;
        if Instant::now() > deadline {
            let log = launch::log(state, API_SERVER_NAME);
            bail!("the API server was not ready after a minute; {}", launch::last_words(&log));
        }
        sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Fails if one of these processes does not run.
pub(crate) fn check(state: &State, names: &[&str]) -> Result<()> {
    for name in names {
        if Process::recorded(state, name).is_none_or(|process| !process.lives()) {
            bail!("{name} has ended; {}", launch::last_words(&launch::log(state, name)));
        }
    }
    Ok(())
}
