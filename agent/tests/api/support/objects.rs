//! The objects that tests create in the API server, each test in a namespace of its own.

use std::sync::Arc;

use serde_json::{Value, json};

use super::Cluster;

/// A Kubernetes namespace.
pub(crate) struct Space {
    cluster: Arc<Cluster>,
    name: String,
}

/// A pod as a kubelet might report it.
#[derive(Clone, Copy)]
pub(crate) struct Pod<'a> {
    pub(crate) name: &'a str,
    /// Its node.
    pub(crate) node: &'a str,
    /// Its addresses.
    pub(crate) ips: &'a [&'a str],
    /// The value of its label `app`.
    pub(crate) app: &'a str,
    /// The number of its port `web`.
    pub(crate) port: u16,
}

/// Returns the path of objects of a kind.
fn kind_path(namespace: &str, kind: &str) -> String {
    let group = if kind == "endpointslices" { "apis/discovery.k8s.io/v1" } else { "api/v1" };
    format!("/{group}/namespaces/{namespace}/{kind}")
}

impl Space {
    /// Creates a namespace.
    pub(crate) fn new(cluster: &Arc<Cluster>, name: &str) -> Self {
        let this = Self { cluster: Arc::clone(cluster), name: name.to_owned() };
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        this.ask("POST", "/api/v1/namespaces", Some(&namespace));
        this
    }

    #[track_caller]
    fn ask(&self, method: &str, path: &str, body: Option<&Value>) {
        let answer = self.cluster.plane.request(method, path, body);
        if let Err(error) = answer {
            panic!("{method} {path}: {error:#}\n{body:?}");
        }
    }

    /// Returns the path of an object, or of all of a kind if the name is empty.
    pub(crate) fn path(&self, kind: &str, name: &str) -> String {
        let path = kind_path(&self.name, kind);
        if name.is_empty() { path } else { format!("{path}/{name}") }
    }

    /// Creates an object of a kind (`services`, `endpointslices`, ...).
    #[track_caller]
    pub(crate) fn create(&self, kind: &str, object: &Value) {
        self.ask("POST", &self.path(kind, ""), Some(object));
    }

    /// Changes fields of an object by a merge patch.
    #[track_caller]
    pub(crate) fn edit(&self, kind: &str, name: &str, patch: &Value) {
        self.ask("PATCH", &self.path(kind, name), Some(patch));
    }

    /// Deletes an object.
    #[track_caller]
    pub(crate) fn delete(&self, kind: &str, name: &str) {
        self.ask("DELETE", &self.path(kind, name), None);
    }

    /// Deletes the namespace; the real controller then deletes everything in it.
    #[track_caller]
    pub(crate) fn delete_all(&self) {
        self.ask("DELETE", &format!("/api/v1/namespaces/{}", self.name), None);
    }

    /// Creates a Service from a spec.
    #[track_caller]
    pub(crate) fn service(&self, name: &str, spec: &Value) {
        self.create("services", &json!({"metadata": {"name": name}, "spec": spec}));
    }

    /// Creates a Service with one port, 80, for which only the test creates slices.
    #[track_caller]
    pub(crate) fn bare_service(&self, name: &str, vip: &str) {
        self.service(name, &json!({"clusterIP": vip, "ports": [{"port": 80, "targetPort": 8080}]}));
    }

    /// Creates a slice of an unnamed port with ready endpoints.
    #[track_caller]
    pub(crate) fn slice(&self, name: &str, service: &str, port: u16, addresses: &[&str]) {
        let endpoints: Vec<Value> =
            addresses.iter().map(|address| json!({"addresses": [address]})).collect();
        self.create(
            "endpointslices",
            &json!({
                "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
                "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "", "port": port}],
            }),
        );
    }

    /// Creates a pod that runs and is not ready yet.
    #[track_caller]
    pub(crate) fn pod(&self, pod: &Pod) {
        self.create(
            "pods",
            &json!({
                "metadata": {"name": pod.name, "labels": {"app": pod.app}},
                "spec": {
                    "nodeName": pod.node,
                    "containers": [{
                        "name": "main", "image": "none",
                        "ports": [{"name": "web", "containerPort": pod.port}],
                    }],
                },
            }),
        );
        let ips: Vec<Value> = pod.ips.iter().map(|ip| json!({"ip": ip})).collect();
        let status = json!({"phase": "Running", "podIP": pod.ips.first(), "podIPs": ips});
        self.edit("pods", &format!("{}/status", pod.name), &json!({"status": status}));
    }

    /// Sets whether a pod is ready.
    #[track_caller]
    pub(crate) fn set_ready(&self, pod: &str, ready: bool) {
        let condition = json!({"type": "Ready", "status": if ready { "True" } else { "False" }});
        self.edit(
            "pods",
            &format!("{pod}/status"),
            &json!({"status": {"conditions": [condition]}}),
        );
    }

    /// Creates a pod that is ready.
    #[track_caller]
    pub(crate) fn ready_pod(&self, pod: &Pod) {
        self.pod(pod);
        self.set_ready(pod.name, true);
    }

    /// Reports, as a kubelet does, that the processes of a deleted pod have ended.
    #[track_caller]
    pub(crate) fn end_pod(&self, pod: &str) {
        let now = json!({"gracePeriodSeconds": 0});
        self.ask("DELETE", &self.path("pods", pod), Some(&now));
    }
}
