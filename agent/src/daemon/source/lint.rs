//! What is suspicious about manifests although everything in them is accepted: fields that no type
//! has, and objects that refer to nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use k8s_openapi::api::core::v1::{Endpoints, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sluice_core::model::object::ObjectName;

use super::decode::{HEADLESS_LABEL, PROXY_NAME_LABEL, SERVICE_LABEL};
use super::names::{documents, each, list, word};

/// The prefix of Sluice's own annotations, of which there is none yet.
const ANNOTATIONS: &str = "sluice.dev/";

/// The kind of a suspicion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lint {
    /// The type has no such field, so it has no effect.
    UnknownField,
    /// Sluice has no such annotation.
    UnknownAnnotation,
    /// The slice is of a Service that does not exist.
    NoService,
    /// No endpoint has a port of the name of the Service's, so nothing answers there.
    UnmatchedPort,
    /// The slice has a port that its Service does not have.
    UnusedPort,
    /// The Service has no endpoint that answers.
    NoEndpoints,
}

impl Lint {
    /// Returns the word for programs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::UnknownField => "unknown_field",
            Self::UnknownAnnotation => "unknown_annotation",
            Self::NoService => "no_service",
            Self::UnmatchedPort => "unmatched_port",
            Self::UnusedPort => "unused_port",
            Self::NoEndpoints => "no_endpoints",
        }
    }

    /// Whether what it is about is not served, whatever was meant.
    #[must_use]
    pub fn is_refused(self) -> bool {
        matches!(self, Self::NoService | Self::UnmatchedPort)
    }
}

/// A suspicion.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Suspicion {
    /// The object, as `Kind namespace/name`.
    pub object: String,
    /// The field; empty if it is the whole.
    pub field: String,
    /// The kind.
    pub lint: Lint,
    /// What was found, and what follows from it.
    pub why: String,
}

/// Name and protocol of a port.
type PortName = (String, String);

/// A Service, as far as references to it go.
#[derive(Clone, Debug, Default)]
struct Known {
    ports: Vec<PortName>,
    /// Whether somebody is to serve it here.
    is_served: bool,
}

/// The ports and endpoints of a Service's slices.
#[derive(Clone, Debug, Default)]
struct Behind {
    ports: BTreeSet<PortName>,
    /// Whether an endpoint answers.
    answers: bool,
}

/// Returns what is suspicious about the manifests in a directory or file, for a proxy of this name.
///
/// # Errors
///
/// When they cannot be read.
pub fn lint(path: &Path, proxy_name: Option<&str>) -> io::Result<Vec<Suspicion>> {
    let mut found = Findings { proxy_name, ..Findings::default() };
    for value in documents(path, |kind, _| kind != "Pod" && kind != "Node")? {
        each(&value, None, &mut |kind, object| found.add(kind, object));
    }
    Ok(found.finish())
}

#[derive(Debug, Default)]
struct Findings<'a> {
    proxy_name: Option<&'a str>,
    services: BTreeMap<ObjectName, Known>,
    behind: BTreeMap<ObjectName, Behind>,
    /// Slices, each with its kind, its Service and its ports.
    slices: Vec<(&'static str, ObjectName, ObjectName, Vec<PortName>)>,
    suspicions: Vec<Suspicion>,
}

impl Findings<'_> {
    fn add(&mut self, kind: &str, value: &Value) {
        let Some(name) = word(value, "/metadata/name") else { return };
        let namespace = word(value, "/metadata/namespace").unwrap_or("default");
        let name = ObjectName::new(namespace, name);
        match kind {
            "Service" => {
                self.fields::<Service>("Service", &name, value);
                self.annotations(&name, value);
                let _ = self.services.insert(name, self.service(value));
            }
            "EndpointSlice" => {
                if word(value, "/apiVersion") != Some("discovery.k8s.io/v1beta1") {
                    self.fields::<EndpointSlice>("EndpointSlice", &name, value);
                }
                let label = label(value, SERVICE_LABEL);
                let Some(service) = label.filter(|label| !label.is_empty()) else { return };
                let service = ObjectName::new(namespace, service);
                let ports: Vec<PortName> = list(value, "/ports").map(port_name).collect();
                let answers = list(value, "/endpoints").any(answers);
                self.behind(service.clone(), &ports, answers);
                self.slices.push(("EndpointSlice", name, service, ports));
            }
            "Endpoints" => {
                self.fields::<Endpoints>("Endpoints", &name, value);
                for subset in list(value, "/subsets") {
                    let ports: Vec<PortName> = list(subset, "/ports").map(port_name).collect();
                    let answers = list(subset, "/addresses").next().is_some();
                    self.behind(name.clone(), &ports, answers);
                }
                self.slices.push(("Endpoints", name.clone(), name, Vec::new()));
            }
            _ => {}
        }
    }

    fn service(&self, value: &Value) -> Known {
        let is_ours = label(value, PROXY_NAME_LABEL) == self.proxy_name;
        let is_headless = word(value, "/spec/clusterIP") == Some("None")
            || label(value, HEADLESS_LABEL).is_some()
            || word(value, "/spec/type") == Some("ExternalName");
        Known {
            ports: list(value, "/spec/ports").map(port_name).collect(),
            // One without an address is reported for that.
            is_served: is_ours && !is_headless && word(value, "/spec/clusterIP").is_some(),
        }
    }

    fn behind(&mut self, service: ObjectName, ports: &[PortName], answers: bool) {
        let behind = self.behind.entry(service).or_default();
        behind.answers |= answers;
        if answers {
            behind.ports.extend(ports.iter().cloned());
        }
    }

    fn suspect(&mut self, lint: Lint, kind: &str, name: &ObjectName, field: &str, why: String) {
        let object = format!("{kind} {name}");
        self.suspicions.push(Suspicion { object, field: field.to_owned(), lint, why });
    }

    /// Notes fields that a type does not have. Values of a wrong type are reported elsewhere.
    fn fields<T: DeserializeOwned>(&mut self, kind: &str, name: &ObjectName, value: &Value) {
        let mut unknown = Vec::new();
        let read: Result<T, _> =
            serde_ignored::deserialize(value, |path| unknown.push(field(&path.to_string())));
        if read.is_err() {
            return;
        }
        for field in unknown {
            let why = format!("is no field of a {kind}, so it has no effect");
            self.suspect(Lint::UnknownField, kind, name, &field, why);
        }
    }

    fn annotations(&mut self, name: &ObjectName, value: &Value) {
        let all = value.pointer("/metadata/annotations").and_then(Value::as_object);
        let ours = all.into_iter().flat_map(serde_json::Map::keys);
        for key in ours.filter(|key| key.starts_with(ANNOTATIONS)) {
            let field = format!("metadata.annotations[{key}]");
            let why = format!("Sluice has no annotation {key}, so it has no effect");
            self.suspect(Lint::UnknownAnnotation, "Service", name, &field, why);
        }
    }

    fn finish(mut self) -> Vec<Suspicion> {
        for (kind, name, service, ports) in std::mem::take(&mut self.slices) {
            let Some(known) = self.services.get(&service) else {
                let why = format!("there is no Service {service}: its endpoints have no effect");
                self.suspect(Lint::NoService, kind, &name, "", why);
                continue;
            };
            let unused: Vec<PortName> =
                ports.into_iter().filter(|port| !known.ports.contains(port)).collect();
            for port in unused {
                let why = format!("Service {service} has no port {}: unused", shown(&port));
                self.suspect(Lint::UnusedPort, kind, &name, "ports", why);
            }
        }
        for (name, known) in std::mem::take(&mut self.services) {
            if known.is_served {
                self.served(&name, &known);
            }
        }
        self.suspicions.sort();
        self.suspicions
    }

    /// Notes what keeps a Service from being served.
    fn served(&mut self, name: &ObjectName, known: &Known) {
        let behind = self.behind.get(name).cloned().unwrap_or_default();
        if known.ports.is_empty() {
            let why = "has no port: the Service is not served".to_owned();
            self.suspect(Lint::UnmatchedPort, "Service", name, "spec.ports", why);
        }
        if !behind.answers {
            let why = "no endpoint answers: its clients are refused".to_owned();
            self.suspect(Lint::NoEndpoints, "Service", name, "", why);
            return;
        }
        for (index, port) in known.ports.iter().enumerate() {
            if !behind.ports.contains(port) {
                let have: Vec<String> = behind.ports.iter().map(shown).collect();
                let why = format!(
                    "no endpoint has a port {} (they have {}): its clients are refused",
                    shown(port),
                    have.join(", ")
                );
                let field = format!("spec.ports[{index}].name");
                self.suspect(Lint::UnmatchedPort, "Service", name, &field, why);
            }
        }
    }
}

fn label<'v>(value: &'v Value, key: &str) -> Option<&'v str> {
    value.pointer("/metadata/labels")?.get(key)?.as_str()
}

fn port_name(port: &Value) -> PortName {
    let name = word(port, "/name").unwrap_or_default();
    (name.to_owned(), word(port, "/protocol").unwrap_or("TCP").to_owned())
}

fn shown((name, protocol): &PortName) -> String {
    let name = if name.is_empty() { "(unnamed)" } else { name };
    format!("{name} {protocol}")
}

/// Whether an endpoint answers, perhaps while it terminates.
fn answers(endpoint: &Value) -> bool {
    let condition = |path| endpoint.pointer(path).and_then(Value::as_bool);
    let is_ready = condition("/conditions/ready").unwrap_or(true);
    is_ready || condition("/conditions/serving").unwrap_or(is_ready)
}

/// Returns a path as Kubernetes writes it: `spec.ports[0].prot`.
fn field(path: &str) -> String {
    let mut field = String::new();
    for part in path.split('.').filter(|part| *part != "?") {
        if part.bytes().all(|byte| byte.is_ascii_digit()) {
            field = format!("{field}[{part}]");
        } else if field.is_empty() {
            part.clone_into(&mut field);
        } else {
            field = format!("{field}.{part}");
        }
    }
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOP: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {sluice.dev/affinity: x, other.dev/a: b}}
spec: {clusterIP: 10.96.0.10, affinity: ClientIP, ports: [{name: wbe, port: 80, prot: TCP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.1.1], hints: {forNodes: [{name: a}]}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: gone-1, namespace: shop, labels: {kubernetes.io/service-name: gone}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.244.1.2]}]
---
{apiVersion: v1, kind: Service, metadata: {name: idle, namespace: shop},
 spec: {clusterIP: 10.96.0.11, port: 80, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: peers, namespace: shop},
 spec: {clusterIP: None, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: good, namespace: shop},
 spec: {clusterIP: 10.96.0.12, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Endpoints, metadata: {name: good, namespace: shop},
 subsets: [{addresses: [{ip: 10.244.1.3}], ports: [{port: 8080}]}]}
";

    #[test]
    fn what_refers_to_nothing_is_suspicious_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("shop.yaml"), SHOP).expect("written");
        let found = lint(folder.path(), None).expect("read");
        let found: BTreeSet<(&str, &str, &str)> = found
            .iter()
            .map(|one| (one.lint.word(), one.object.as_str(), one.field.as_str()))
            .collect();
        assert_eq!(
            found,
            [
                ("unknown_field", "Service shop/web", "spec.affinity"),
                ("unknown_field", "Service shop/web", "spec.ports[0].prot"),
                ("unknown_field", "Service shop/idle", "spec.port"),
                (
                    "unknown_annotation",
                    "Service shop/web",
                    "metadata.annotations[sluice.dev/affinity]"
                ),
                ("unmatched_port", "Service shop/web", "spec.ports[0].name"),
                ("unused_port", "EndpointSlice shop/web-1", "ports"),
                ("no_service", "EndpointSlice shop/gone-1", ""),
                ("no_endpoints", "Service shop/idle", ""),
            ]
            .into()
        );
    }
}
