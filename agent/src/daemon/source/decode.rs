//! Decodes Kubernetes objects into the model's, with only the fields that are used.
//!
//! The API server fills in defaults, and a manifest comes without them. So an absent field means
//! the API server's default.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use sluice_core::model::Change;
use sluice_core::model::object::{
    Address, Endpoint, IpFamily, Maker, NodeSpec, ObjectName, PortSpec, ServiceSpec, Slice,
    SliceKind, SliceLabels, SlicePart, SlicePort,
};
use sluice_core::policy::cidr;

/// The label with the proxy that serves a Service or slice instead of the default one.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// The label of Services without a virtual address.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// The label with the Service of a slice.
pub(super) const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// The label with the controller that manages a slice.
const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
/// The controller that makes slices from the pods of a selector.
const SELECTOR_CONTROLLER: &str = "endpointslice-controller.k8s.io";
/// The controller that makes slices from Endpoints objects.
const MIRROR_CONTROLLER: &str = "endpointslicemirroring-controller.k8s.io";
/// The label of Endpoints objects that do not become slices.
const SKIP_MIRROR_LABEL: &str = "endpointslice.kubernetes.io/skip-mirror";
/// The label with a node's zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// The annotation of slices with the time at which what they describe changed.
pub(super) const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// The taint that the cluster autoscaler puts on a node before it deletes it.
const LEAVING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
/// The default time for which a client stays with its endpoint, in seconds.
const AFFINITY_SECONDS: i32 = 10_800;
/// The field with the node's name in a v1beta1 slice.
const HOSTNAME_TOPOLOGY: &str = "kubernetes.io/hostname";

/// The kinds of objects that Sluice reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A Service.
    Service,
    /// An EndpointSlice, v1 or v1beta1.
    EndpointSlice,
    /// An Endpoints object.
    Endpoints,
    /// A Node.
    Node,
    /// A ServiceCIDR.
    ServiceCidr,
}

impl Kind {
    /// Returns the kind with this name. The group of the API version must match.
    pub fn from_words(kind: &str, version: &str) -> Option<Self> {
        match (kind, version) {
            ("Service", "v1") => Some(Self::Service),
            ("EndpointSlice", "discovery.k8s.io/v1" | "discovery.k8s.io/v1beta1") => {
                Some(Self::EndpointSlice)
            }
            ("Endpoints", "v1") => Some(Self::Endpoints),
            ("Node", "v1") => Some(Self::Node),
            ("ServiceCIDR", "networking.k8s.io/v1") => Some(Self::ServiceCidr),
            _ => None,
        }
    }

    /// All kinds.
    pub const ALL: [Self; 5] =
        [Self::Service, Self::EndpointSlice, Self::Endpoints, Self::Node, Self::ServiceCidr];

    /// Returns the kind's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Endpoints => "Endpoints",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }
}

/// An object's metadata.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Meta {
    /// The object's name.
    pub name: Option<String>,
    /// The object's namespace.
    pub namespace: Option<String>,
    /// The object's labels.
    pub labels: Option<BTreeMap<String, Option<String>>>,
    /// The object's annotations.
    pub annotations: Option<BTreeMap<String, Option<String>>>,
    /// The time at which the object was created, as in RFC 3339.
    pub creation_timestamp: Option<String>,
    /// The time at which the object's deletion began, as in RFC 3339.
    pub deletion_timestamp: Option<String>,
}

impl Meta {
    fn label(&self, key: &str) -> Option<&str> {
        self.labels.as_ref()?.get(key).map(|value| value.as_deref().unwrap_or_default())
    }

    /// Returns what the labels of an object with endpoints say about its Service and its
    /// controller.
    fn slice_labels(&self) -> SliceLabels {
        SliceLabels {
            proxy_name: self.label(PROXY_NAME_LABEL).map(Into::into),
            headless: self.label(HEADLESS_LABEL).is_some(),
            skip_mirror: false,
            maker: match self.label(MANAGED_BY_LABEL) {
                Some(SELECTOR_CONTROLLER) => Maker::Selector,
                Some(MIRROR_CONTROLLER) => Maker::Mirror,
                Some(_) | None => Maker::Other,
            },
        }
    }

    /// Returns when the object's last change was caused.
    fn triggered(&self) -> Option<SystemTime> {
        let text = self.annotations.as_ref()?.get(TRIGGER_ANNOTATION)?.as_deref()?;
        text.parse::<Timestamp>().ok().map(SystemTime::from)
    }
}

/// A decoded object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A Service.
    Service(ServiceSpec),
    /// An EndpointSlice or Endpoints object.
    Slice(Slice),
    /// A Node.
    Node(NodeSpec),
    /// A ServiceCIDR, as its networks.
    ServiceCidr(Vec<IpNet>),
}

/// Returns the change to an object; [`None`] means that the object is gone.
pub fn change(kind: Kind, name: ObjectName, object: Option<Object>) -> Change {
    match (kind, object) {
        (_, Some(Object::Service(spec))) => Change::Service(name, Some(spec)),
        (_, Some(Object::Node(spec))) => Change::Node(name.name, Some(spec)),
        (_, Some(Object::ServiceCidr(networks))) => Change::ServiceCidr(name.name, Some(networks)),
        (Kind::Endpoints, Some(Object::Slice(slice))) => {
            Change::Slice(SliceKind::Endpoints, name, Some(slice))
        }
        (_, Some(Object::Slice(slice))) => {
            Change::Slice(SliceKind::EndpointSlice, name, Some(slice))
        }
        (Kind::Service, None) => Change::Service(name, None),
        (Kind::EndpointSlice, None) => Change::Slice(SliceKind::EndpointSlice, name, None),
        (Kind::Endpoints, None) => Change::Slice(SliceKind::Endpoints, name, None),
        (Kind::Node, None) => Change::Node(name.name, None),
        (Kind::ServiceCidr, None) => Change::ServiceCidr(name.name, None),
    }
}

/// Decodes objects. Texts that many endpoints share are stored once.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    texts: BTreeSet<Arc<str>>,
}

/// The number of shared texts at which unused ones are dropped.
const TEXTS_KEPT: usize = 65_536;

impl Decoder {
    /// Decodes an object of a known kind.
    ///
    /// # Errors
    ///
    /// Fails if a field has a type that the API server would refuse.
    pub fn decode(
        &mut self,
        kind: Kind,
        meta: &Meta,
        body: Value,
    ) -> Result<Object, serde_json::Error> {
        match kind {
            Kind::Service => Ok(Object::Service(service(meta, serde_json::from_value(body)?))),
            Kind::EndpointSlice => {
                Ok(Object::Slice(self.slice(meta, serde_json::from_value(body)?)))
            }
            Kind::Endpoints => {
                Ok(Object::Slice(self.endpoints(meta, serde_json::from_value(body)?)))
            }
            Kind::Node => Ok(Object::Node(self.node(meta, serde_json::from_value(body)?))),
            Kind::ServiceCidr => {
                Ok(Object::ServiceCidr(service_cidr(serde_json::from_value(body)?)))
            }
        }
    }

    fn share(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        if self.texts.len() >= TEXTS_KEPT {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
        }
        let text: Arc<str> = text.into();
        let _ = self.texts.insert(text.clone());
        text
    }

    fn slice(&mut self, meta: &Meta, slice: RawSlice) -> Slice {
        let family = match slice.address_type.as_deref() {
            Some("IPv4") => Ok(Some(IpFamily::V4)),
            Some("IPv6") => Ok(Some(IpFamily::V6)),
            Some(other) => Err(other.into()),
            None => Err("untyped".into()),
        };
        let ports =
            slice.ports.unwrap_or_default().into_iter().map(|port| self.port(&port)).collect();
        let endpoints = slice.endpoints.unwrap_or_default();
        let several = |raw: &&RawEndpoint| raw.addresses.as_ref().is_some_and(|all| all.len() > 1);
        let surplus = endpoints.iter().filter(several).count();
        let endpoints = endpoints.into_iter().map(|raw| self.endpoint(raw)).collect();
        Slice {
            service: meta
                .label(SERVICE_LABEL)
                .filter(|name| !name.is_empty())
                .map(|name| self.share(name)),
            family,
            labels: meta.slice_labels(),
            parts: vec![SlicePart { ports, endpoints }],
            surplus,
            triggered: meta.triggered(),
        }
    }

    fn port(&mut self, port: &RawPort) -> SlicePort {
        SlicePort {
            name: self.share(port.name.as_deref().unwrap_or_default()),
            number: port.port.map(clamp),
            protocol: port.protocol.as_deref().unwrap_or("TCP").into(),
        }
    }

    fn endpoint(&mut self, raw: RawEndpoint) -> Endpoint {
        let conditions = raw.conditions.unwrap_or_default();
        let topology = raw.topology.unwrap_or_default();
        let node = raw.node_name.or_else(|| topology.get(HOSTNAME_TOPOLOGY).cloned().flatten());
        let hints = raw.hints.unwrap_or_default();
        Endpoint {
            // Kubernetes defines the first and ignores the rest.
            address: address(
                raw.addresses.unwrap_or_default().into_iter().next().flatten().as_deref(),
            ),
            ready: conditions.ready.unwrap_or(true),
            serving: conditions.serving.unwrap_or(true),
            terminating: conditions.terminating.unwrap_or(false),
            node: node.map(|node| self.share(&node)),
            zones: self.hinted(hints.for_zones),
            nodes: self.hinted(hints.for_nodes),
        }
    }

    fn hinted(&mut self, hints: Option<Vec<RawHint>>) -> Box<[Arc<str>]> {
        hints
            .unwrap_or_default()
            .into_iter()
            .filter_map(|hint| hint.name)
            .map(|name| self.share(&name))
            .collect()
    }

    fn endpoints(&mut self, meta: &Meta, raw: RawEndpoints) -> Slice {
        let parts = raw
            .subsets
            .unwrap_or_default()
            .into_iter()
            .map(|subset| {
                let ports = subset
                    .ports
                    .unwrap_or_default()
                    .into_iter()
                    .map(|port| self.port(&port))
                    .collect();
                let ready =
                    subset.addresses.unwrap_or_default().into_iter().map(|address| (address, true));
                let waiting = subset
                    .not_ready_addresses
                    .unwrap_or_default()
                    .into_iter()
                    .map(|address| (address, false));
                let endpoints = ready
                    .chain(waiting)
                    .map(|(raw, ready)| Endpoint {
                        address: address(raw.ip.as_deref()),
                        ready,
                        serving: ready,
                        terminating: false,
                        node: raw.node_name.map(|node| self.share(&node)),
                        zones: Box::default(),
                        nodes: Box::default(),
                    })
                    .collect();
                SlicePart { ports, endpoints }
            })
            .collect();
        Slice {
            service: meta.name.as_deref().map(|name| self.share(name)),
            family: Ok(None),
            labels: SliceLabels {
                skip_mirror: meta.label(SKIP_MIRROR_LABEL) == Some("true"),
                ..meta.slice_labels()
            },
            parts,
            surplus: 0,
            triggered: meta.triggered(),
        }
    }

    fn node(&mut self, meta: &Meta, node: RawNode) -> NodeSpec {
        let spec = node.spec.unwrap_or_default();
        let raw = node.status.and_then(|status| status.addresses).unwrap_or_default();
        let addresses = ["InternalIP", "ExternalIP"].into_iter().flat_map(|kind| {
            raw.iter().filter(move |raw| raw.r#type.as_deref() == Some(kind)).filter_map(|raw| {
                match address(raw.address.as_deref()) {
                    Address::Valid(address) => Some(address),
                    Address::Invalid(_) | Address::Missing => None,
                }
            })
        });
        let mut pod_cidrs = spec.pod_cidrs.unwrap_or_default();
        if pod_cidrs.is_empty() {
            pod_cidrs.extend(spec.pod_cidr);
        }
        NodeSpec {
            addresses: addresses.collect(),
            zone: meta
                .label(ZONE_LABEL)
                .filter(|zone| !zone.is_empty())
                .map(|zone| self.share(zone)),
            pod_cidrs: networks(&pod_cidrs),
            leaving: meta.deletion_timestamp.is_some()
                || spec
                    .taints
                    .iter()
                    .flatten()
                    .any(|taint| taint.key.as_deref() == Some(LEAVING_TAINT)),
        }
    }
}

fn service_port(port: RawServicePort) -> PortSpec {
    PortSpec {
        name: port.name.unwrap_or_default().into(),
        number: port.port.map_or(0, clamp),
        protocol: port.protocol.as_deref().unwrap_or("TCP").into(),
        node_port: port.node_port.map_or(0, clamp),
    }
}

fn service(meta: &Meta, service: RawService) -> ServiceSpec {
    let spec = service.spec.unwrap_or_default();
    let mut cluster_ips: Vec<String> = spec.cluster_ips.clone().unwrap_or_default();
    if cluster_ips.is_empty() {
        cluster_ips.extend(spec.cluster_ip.clone().filter(|address| !address.is_empty()));
    }
    let ingress = service
        .status
        .and_then(|status| status.load_balancer)
        .and_then(|balancer| balancer.ingress);
    ServiceSpec {
        created: meta
            .creation_timestamp
            .as_deref()
            .and_then(|text| text.parse::<Timestamp>().ok())
            .map(Timestamp::as_second),
        proxy_name: meta.label(PROXY_NAME_LABEL).map(Into::into),
        headless: meta.label(HEADLESS_LABEL).is_some()
            || cluster_ips.iter().any(|address| address == "None"),
        kind: spec.r#type.unwrap_or_default().into(),
        cluster_ips: cluster_ips.iter().map(|text| address(Some(text))).collect(),
        families: spec.ip_families.unwrap_or_default().into_iter().map(Into::into).collect(),
        ingress: ingress
            .unwrap_or_default()
            .into_iter()
            .filter(|ingress| matches!(ingress.ip_mode.as_deref(), None | Some("VIP")))
            .filter_map(|ingress| ingress.ip.filter(|ip| !ip.is_empty()))
            .map(|text| address(Some(&text)))
            .collect(),
        external_ips: spec
            .external_ips
            .unwrap_or_default()
            .iter()
            .map(|text| address(Some(text)))
            .collect(),
        source_ranges: spec
            .load_balancer_source_ranges
            .unwrap_or_default()
            .iter()
            .map(|text| text.trim().into())
            .collect(),
        affinity_seconds: (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
            let config = spec.session_affinity_config.and_then(|config| config.client_ip);
            config.and_then(|client| client.timeout_seconds).map_or(AFFINITY_SECONDS, clamp)
        }),
        internal_policy: spec.internal_traffic_policy.unwrap_or_default().into(),
        external_policy: spec.external_traffic_policy.unwrap_or_default().into(),
        health_check_port: spec.health_check_node_port.map_or(0, clamp),
        ports: spec.ports.unwrap_or_default().into_iter().map(service_port).collect(),
    }
}

/// Returns the texts that are CIDRs. The API server accepts nothing else.
fn networks(texts: &[String]) -> Vec<IpNet> {
    texts.iter().filter_map(|text| cidr(text).ok()).collect()
}

fn service_cidr(object: RawServiceCidr) -> Vec<IpNet> {
    networks(&object.spec.and_then(|spec| spec.cidrs).unwrap_or_default())
}

fn address(text: Option<&str>) -> Address {
    text.map_or(Address::Missing, |text| Address::parse(text.trim()))
}

/// Returns the number if it fits, or else one that is not a valid port.
fn clamp(number: i64) -> i32 {
    i32::try_from(number).unwrap_or(-1)
}

#[derive(Default, Deserialize)]
struct RawService {
    spec: Option<RawServiceSpec>,
    status: Option<RawServiceStatus>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServiceSpec {
    r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    ip_families: Option<Vec<String>>,
    ports: Option<Vec<RawServicePort>>,
    session_affinity: Option<String>,
    session_affinity_config: Option<RawAffinityConfig>,
    external_traffic_policy: Option<String>,
    internal_traffic_policy: Option<String>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    load_balancer_source_ranges: Option<Vec<String>>,
    health_check_node_port: Option<i64>,
}

#[derive(Deserialize)]
struct RawAffinityConfig {
    #[serde(rename = "clientIP")]
    client_ip: Option<RawClientIp>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawClientIp {
    timeout_seconds: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServicePort {
    name: Option<String>,
    port: Option<i64>,
    protocol: Option<String>,
    node_port: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServiceStatus {
    load_balancer: Option<RawLoadBalancer>,
}

#[derive(Deserialize)]
struct RawLoadBalancer {
    ingress: Option<Vec<RawIngress>>,
}

#[derive(Deserialize)]
struct RawIngress {
    ip: Option<String>,
    #[serde(rename = "ipMode")]
    ip_mode: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSlice {
    address_type: Option<String>,
    ports: Option<Vec<RawPort>>,
    endpoints: Option<Vec<RawEndpoint>>,
}

#[derive(Deserialize)]
struct RawPort {
    name: Option<String>,
    port: Option<i64>,
    protocol: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpoint {
    addresses: Option<Vec<Option<String>>>,
    conditions: Option<RawConditions>,
    node_name: Option<String>,
    topology: Option<BTreeMap<String, Option<String>>>,
    hints: Option<RawHints>,
}

#[derive(Default, Deserialize)]
struct RawConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawHints {
    for_zones: Option<Vec<RawHint>>,
    for_nodes: Option<Vec<RawHint>>,
}

#[derive(Deserialize)]
struct RawHint {
    name: Option<String>,
}

#[derive(Deserialize)]
struct RawEndpoints {
    subsets: Option<Vec<RawSubset>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSubset {
    addresses: Option<Vec<RawAddress>>,
    not_ready_addresses: Option<Vec<RawAddress>>,
    ports: Option<Vec<RawPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawAddress {
    ip: Option<String>,
    node_name: Option<String>,
}

#[derive(Deserialize)]
struct RawServiceCidr {
    spec: Option<RawServiceCidrSpec>,
}

#[derive(Deserialize)]
struct RawServiceCidrSpec {
    cidrs: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct RawNode {
    spec: Option<RawNodeSpec>,
    status: Option<RawNodeStatus>,
}

#[derive(Default, Deserialize)]
struct RawNodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
    taints: Option<Vec<RawTaint>>,
}

#[derive(Deserialize)]
struct RawTaint {
    key: Option<String>,
}

#[derive(Deserialize)]
struct RawNodeStatus {
    addresses: Option<Vec<RawNodeAddress>>,
}

#[derive(Deserialize)]
struct RawNodeAddress {
    r#type: Option<String>,
    address: Option<String>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn decode(kind: Kind, body: Value) -> Object {
        Decoder::default().decode(kind, &Meta::default(), body).expect("an object")
    }

    #[test]
    fn a_node_has_its_inner_addresses_first_and_its_pods_networks() {
        let address = |kind: &str, address: &str| json!({"type": kind, "address": address});
        let node = json!({
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd01:0:0:1::/64"]},
            "status": {"addresses": [
                address("ExternalIP", "203.0.113.7"),
                address("Hostname", "192.0.2.9"),
                address("InternalIP", "192.0.2.1"),
                address("InternalIP", "2001:db8::1"),
            ]},
        });
        let Object::Node(node) = decode(Kind::Node, node) else { panic!("another kind") };
        let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["192.0.2.1", "2001:db8::1", "203.0.113.7"]);
        assert_eq!(
            node.pod_cidrs,
            networks(&["10.244.1.0/24".to_owned(), "fd01:0:0:1::/64".to_owned()])
        );
        let old = decode(Kind::Node, json!({"spec": {"podCIDR": "10.244.2.0/24"}}));
        let Object::Node(old) = old else { panic!("another kind") };
        assert_eq!(old.pod_cidrs, networks(&["10.244.2.0/24".to_owned()]));
    }

    #[test]
    fn a_service_cidr_is_its_networks() {
        assert_eq!(
            Kind::from_words("ServiceCIDR", "networking.k8s.io/v1"),
            Some(Kind::ServiceCidr),
            "and no older version"
        );
        assert_eq!(Kind::from_words("ServiceCIDR", "networking.k8s.io/v1beta1"), None);
        let object = json!({"spec": {"cidrs": ["10.96.0.0/12", "fd00:10:96::/112"]}});
        let expected = networks(&["10.96.0.0/12".to_owned(), "fd00:10:96::/112".to_owned()]);
        assert_eq!(decode(Kind::ServiceCidr, object), Object::ServiceCidr(expected));
    }
}
