//! The names behind addresses, for people: pods, nodes, and the labels of Services.
//!
//! Pods are read where the reader may read them. Elsewhere the `targetRef` of EndpointSlices names
//! those that are endpoints, which the agent's own rights suffice for. Nothing here decides about a
//! packet.

mod selector;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams};
use kube::{Api, Client};
use serde_json::Value;
use sluice_core::model::object::{Address, ObjectName};

use super::manifests::Folder;
use super::yaml::{json, yaml};

pub use selector::Selector;

/// How long one list of the API server may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Objects per page of a list.
const PAGE: u32 = 500;

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace and name.
    pub name: ObjectName,
    /// The node that it runs on.
    pub node: Option<String>,
    /// Its addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether it has the network of its node.
    pub is_on_host: bool,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its addresses, internal ones first.
    pub addresses: Vec<IpAddr>,
    /// The networks of its pods.
    pub pod_cidrs: Vec<IpNet>,
}

/// The names that the sources know.
#[derive(Clone, Debug, Default)]
pub struct Names {
    pods: BTreeMap<ObjectName, Pod>,
    by_address: BTreeMap<IpAddr, BTreeSet<ObjectName>>,
    nodes: BTreeMap<String, Node>,
    labels: BTreeMap<ObjectName, BTreeMap<String, String>>,
    /// Whether Pods were read, and not only what slices say of them.
    has_pods: bool,
}

/// Whether names are read from an object of this kind.
fn is_named(kind: &str, version: &str) -> bool {
    kind.ends_with("List")
        || matches!(
            (kind, version),
            ("Pod" | "Node" | "Service", "v1") | ("EndpointSlice", "discovery.k8s.io/v1")
        )
}

impl Names {
    /// Reads the objects of a directory or file. What cannot be parsed has no names.
    ///
    /// # Errors
    ///
    /// When the directory or a file cannot be read.
    pub fn of_manifests(path: &Path) -> io::Result<Self> {
        let mut names = Self::default();
        for value in documents(path, is_named)? {
            each(&value, None, &mut |kind, object| names.add(kind, object));
        }
        Ok(names)
    }

    /// Lists Services, EndpointSlices and Nodes, and Pods if wanted, of one namespace or of all.
    /// What may not be read stays unknown.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached.
    pub async fn of_server(
        client: Client,
        namespace: Option<&str>,
        pods: bool,
    ) -> Result<Self, String> {
        let mut names = Self::default();
        let kinds = [
            ("", "v1", "Pod"),
            ("", "v1", "Service"),
            ("discovery.k8s.io", "v1", "EndpointSlice"),
            ("", "v1", "Node"),
        ];
        for (group, version, kind) in kinds.into_iter().filter(|(.., kind)| pods || *kind != "Pod")
        {
            let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
            let api: Api<DynamicObject> = match namespace.filter(|_| kind != "Node") {
                Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
                None => Api::all_with(client.clone(), &resource),
            };
            let mut page = ListParams::default().limit(PAGE);
            loop {
                let list = match tokio::time::timeout(PATIENCE, api.list(&page)).await {
                    Ok(Ok(list)) => list,
                    Ok(Err(kube::Error::Api(_))) => break,
                    Ok(Err(error)) => return Err(format!("listing {kind}s failed: {error}")),
                    Err(_) => return Err(format!("listing {kind}s took longer than {PATIENCE:?}")),
                };
                for object in &list.items {
                    if let Ok(value) = serde_json::to_value(object) {
                        names.add(kind, &value);
                    }
                }
                match list.metadata.continue_.filter(|token| !token.is_empty()) {
                    Some(token) => page = page.continue_token(&token),
                    None => break,
                }
            }
        }
        Ok(names)
    }

    /// Returns the pod with an address, if only one has it.
    #[must_use]
    pub fn pod(&self, address: IpAddr) -> Option<&Pod> {
        let mut names = self.by_address.get(&address)?.iter();
        match (names.next(), names.next()) {
            (Some(only), None) => self.pods.get(only),
            (None | Some(_), _) => None,
        }
    }

    /// Returns the pod behind an endpoint of a Service in a namespace. Pods with the network of
    /// their node share its address.
    #[must_use]
    pub fn endpoint(&self, namespace: &str, address: IpAddr) -> Option<&Pod> {
        let names = self.by_address.get(&address)?;
        let mut own = names.iter().filter(|name| *name.namespace == *namespace);
        match (own.next(), own.next()) {
            (Some(only), None) => self.pods.get(only),
            (None | Some(_), _) => None,
        }
    }

    /// Returns the pod of a name.
    #[must_use]
    pub fn pod_named(&self, name: &ObjectName) -> Option<&Pod> {
        self.pods.get(name)
    }

    /// Returns the node of a name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// Returns the node that has an address, or whose pods' networks include it, and whether the
    /// address is the node's own.
    #[must_use]
    pub fn node_of(&self, address: IpAddr) -> Option<(&str, bool)> {
        let own = self.nodes.iter().find(|(_, node)| node.addresses.contains(&address));
        let of_pods = || {
            self.nodes
                .iter()
                .find(|(_, node)| node.pod_cidrs.iter().any(|cidr| cidr.contains(&address)))
        };
        own.map(|(name, _)| (name.as_str(), true))
            .or_else(|| of_pods().map(|(name, _)| (name.as_str(), false)))
    }

    /// Whether every pod is known, so that an address without one is nobody's.
    #[must_use]
    pub fn has_pods(&self) -> bool {
        self.has_pods
    }

    /// Returns the labels of a Service; empty if it is not known.
    #[must_use]
    pub fn labels(&self, namespace: &str, service: &str) -> BTreeMap<String, String> {
        self.labels.get(&ObjectName::new(namespace, service)).cloned().unwrap_or_default()
    }

    fn add(&mut self, kind: &str, value: &Value) {
        let word = |path| word(value, path);
        let Some(name) = word("/metadata/name") else { return };
        let namespace = word("/metadata/namespace").unwrap_or("default");
        match kind {
            "Pod" => self.add_pod(value, ObjectName::new(namespace, name)),
            "EndpointSlice" => self.add_slice(value, namespace),
            "Node" => self.add_node(value, name),
            "Service" => {
                let labels = value.pointer("/metadata/labels").and_then(Value::as_object);
                let labels = labels.into_iter().flatten().filter_map(|(key, value)| {
                    value.as_str().map(|value| (key.clone(), value.to_owned()))
                });
                let name = ObjectName::new(namespace, name);
                let _ = self.labels.insert(name, labels.collect());
            }
            _ => {}
        }
    }

    fn add_pod(&mut self, value: &Value, name: ObjectName) {
        self.has_pods = true;
        // One that has ended has given its address back.
        if matches!(word(value, "/status/phase"), Some("Succeeded" | "Failed")) {
            return;
        }
        let all = list(value, "/status/podIPs").filter_map(|ip| word(ip, "/ip"));
        let addresses = all.chain(word(value, "/status/podIP")).filter_map(address).collect();
        let is_on_host =
            value.pointer("/spec/hostNetwork").and_then(Value::as_bool).unwrap_or_default();
        let node = word(value, "/spec/nodeName").map(str::to_owned);
        self.insert(Pod { name, node, addresses, is_on_host });
    }

    fn add_slice(&mut self, value: &Value, namespace: &str) {
        for endpoint in list(value, "/endpoints") {
            if word(endpoint, "/targetRef/kind") != Some("Pod") {
                continue;
            }
            let Some(name) = word(endpoint, "/targetRef/name") else { continue };
            let namespace = word(endpoint, "/targetRef/namespace").unwrap_or(namespace);
            let addresses = list(endpoint, "/addresses").filter_map(Value::as_str);
            self.insert(Pod {
                name: ObjectName::new(namespace, name),
                node: word(endpoint, "/nodeName").map(str::to_owned),
                addresses: addresses.filter_map(address).collect(),
                is_on_host: false,
            });
        }
    }

    fn add_node(&mut self, value: &Value, name: &str) {
        let addresses = list(value, "/status/addresses");
        let of = |wanted: &'static str| {
            let all = addresses.clone().filter(move |found| word(found, "/type") == Some(wanted));
            all.filter_map(|found| word(found, "/address").and_then(address))
        };
        let cidrs = list(value, "/spec/podCIDRs").filter_map(Value::as_str);
        let cidrs = cidrs.chain(word(value, "/spec/podCIDR")).filter_map(|cidr| cidr.parse().ok());
        let node = Node {
            addresses: of("InternalIP").chain(of("ExternalIP")).collect(),
            pod_cidrs: cidrs.collect(),
        };
        let _ = self.nodes.insert(name.to_owned(), node);
    }

    /// Adds a pod, or what else is known of it.
    fn insert(&mut self, pod: Pod) {
        for address in &pod.addresses {
            let _ = self.by_address.entry(*address).or_default().insert(pod.name.clone());
        }
        let known = self
            .pods
            .entry(pod.name.clone())
            .or_insert_with(|| Pod { name: pod.name.clone(), ..Pod::default() });
        known.addresses.extend(pod.addresses);
        known.is_on_host |= pod.is_on_host;
        if known.node.is_none() {
            known.node = pod.node;
        }
    }
}

/// Returns the documents of a directory or file, without those that cannot be parsed.
pub(super) fn documents(path: &Path, wanted: fn(&str, &str) -> bool) -> io::Result<Vec<Value>> {
    let mut values = Vec::new();
    for file in Folder::new(path.to_owned()).list()? {
        // What is not UTF-8 is reported where objects are read.
        let text = String::from_utf8_lossy(&fs::read(&file)?).into_owned();
        let documents = if file.extension().is_some_and(|end| end == "json") {
            json(&text)
        } else {
            yaml(&text, wanted)
        };
        values.extend(documents.into_iter().filter_map(|document| document.content.ok()));
    }
    Ok(values)
}

/// Visits an object, or the objects of a list, each with its kind.
pub(super) fn each(value: &Value, implied: Option<&str>, visit: &mut dyn FnMut(&str, &Value)) {
    let kind = word(value, "/kind").or(implied).unwrap_or_default();
    match kind.strip_suffix("List") {
        Some(of) => {
            for item in list(value, "/items") {
                each(item, Some(of).filter(|of| !of.is_empty()), visit);
            }
        }
        None => visit(kind, value),
    }
}

/// Returns a text in an object.
pub(super) fn word<'v>(value: &'v Value, path: &str) -> Option<&'v str> {
    value.pointer(path).and_then(Value::as_str).filter(|word| !word.is_empty())
}

/// Returns the elements of a list in an object.
pub(super) fn list<'v>(value: &'v Value, path: &str) -> std::slice::Iter<'v, Value> {
    value.pointer(path).and_then(Value::as_array).map_or(&[][..], Vec::as_slice).iter()
}

fn address(text: &str) -> Option<IpAddr> {
    if let Address::Valid(address) = Address::parse(text) { Some(address) } else { None }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn dump() -> Value {
        let node = |name: &str, address: &str, cidr: &str| {
            json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": name},
                   "spec": {"podCIDRs": [cidr]},
                   "status": {"addresses": [{"type": "InternalIP", "address": address}]}})
        };
        let pod = |name: &str, node: &str, address: &str, phase: &str| {
            json!({"kind": "Pod", "apiVersion": "v1", "spec": {"nodeName": node},
                   "metadata": {"name": name, "namespace": "shop"},
                   "status": {"phase": phase, "podIP": address, "podIPs": [{"ip": address}]}})
        };
        json!({"kind": "List", "apiVersion": "v1", "items": [
            node("n1", "192.0.2.1", "10.244.1.0/24"),
            node("n2", "192.0.2.2", "10.244.2.0/24"),
            pod("client", "n1", "10.244.1.5", "Running"),
            pod("job", "n1", "10.244.1.5", "Succeeded"),
            {"kind": "Service", "apiVersion": "v1",
             "metadata": {"name": "web", "namespace": "shop", "labels": {"app": "web"}}},
            {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
             "metadata": {"name": "web-1", "namespace": "shop"},
             "endpoints": [{"addresses": ["10.244.2.7"], "nodeName": "n2",
                            "targetRef": {"kind": "Pod", "name": "web-x", "namespace": "shop"}}]},
        ]})
    }

    #[test]
    fn addresses_have_the_names_of_pods_and_slices() {
        let mut names = Names::default();
        each(&dump(), None, &mut |kind, object| names.add(kind, object));
        let at = |text: &str| address(text).expect("an address");
        let client = names.pod(at("10.244.1.5")).expect("the one that runs");
        assert_eq!(client.name.to_string(), "shop/client");
        let web = names.endpoint("shop", at("10.244.2.7")).expect("by its slice");
        assert_eq!((web.name.to_string(), web.node.as_deref()), ("shop/web-x".into(), Some("n2")));
        assert_eq!(names.endpoint("other", at("10.244.2.7")), None);
        assert_eq!(names.node_of(at("10.244.2.9")), Some(("n2", false)));
        assert_eq!(names.node_of(at("192.0.2.1")), Some(("n1", true)));
        assert_eq!(names.node_of(at("10.9.9.9")), None);
        assert_eq!(names.labels("shop", "web").get("app").map(String::as_str), Some("web"));
        assert!(names.has_pods());
    }
}
