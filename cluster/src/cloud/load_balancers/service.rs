//! The part of a Service that a load balancer needs.

use std::fmt;
use std::net::IpAddr;

use serde::Deserialize;

/// The finalizer that keeps a Service until its load balancer has been removed.
pub(super) const FINALIZER: &str = "service.kubernetes.io/load-balancer-cleanup";

#[derive(Deserialize)]
pub(super) struct Services {
    pub(super) items: Vec<Service>,
}

/// A Service, as the API server writes it.
#[derive(Debug, Deserialize)]
pub(super) struct Service {
    metadata: Metadata,
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    uid: String,
    namespace: String,
    name: String,
    #[serde(default)]
    finalizers: Vec<String>,
    deletion_timestamp: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    r#type: String,
    #[serde(default)]
    ip_families: Vec<Family>,
    external_traffic_policy: Option<String>,
    health_check_node_port: Option<u16>,
    session_affinity: Option<String>,
    load_balancer_class: Option<String>,
}

/// An IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) enum Family {
    #[serde(rename = "IPv4")]
    Ipv4,
    #[serde(rename = "IPv6")]
    Ipv6,
}

impl Family {
    pub(super) fn of(address: &IpAddr) -> Self {
        if address.is_ipv6() { Self::Ipv6 } else { Self::Ipv4 }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    #[serde(default)]
    load_balancer: LoadBalancer,
}

#[derive(Debug, Default, Deserialize)]
struct LoadBalancer {
    #[serde(default)]
    ingress: Vec<Ingress>,
}

#[derive(Debug, Deserialize)]
struct Ingress {
    ip: Option<IpAddr>,
}

impl Service {
    pub(super) fn uid(&self) -> &str {
        &self.metadata.uid
    }

    pub(super) fn namespace(&self) -> &str {
        &self.metadata.namespace
    }

    pub(super) fn name(&self) -> &str {
        &self.metadata.name
    }

    pub(super) fn families(&self) -> &[Family] {
        &self.spec.ip_families
    }

    /// Reports whether it requests a load balancer of this kind: one with a class belongs to
    /// somebody else.
    pub(super) fn is_wanted(&self) -> bool {
        self.spec.r#type == "LoadBalancer"
            && self.spec.load_balancer_class.is_none()
            && !self.is_going()
    }

    pub(super) fn is_going(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }

    /// Returns the addresses in its status.
    pub(super) fn ingress(&self) -> Vec<IpAddr> {
        self.status.load_balancer.ingress.iter().filter_map(|ingress| ingress.ip).collect()
    }

    /// Returns the port of the nodes' health checks, if only nodes with endpoints serve it.
    pub(super) fn health_check(&self) -> Option<u16> {
        let is_local = self.spec.external_traffic_policy.as_deref() == Some("Local");
        self.spec.health_check_node_port.filter(|_| is_local)
    }

    pub(super) fn has_affinity(&self) -> bool {
        self.spec.session_affinity.as_deref() == Some("ClientIP")
    }

    pub(super) fn has_finalizer(&self) -> bool {
        self.metadata.finalizers.iter().any(|own| own == FINALIZER)
    }

    pub(super) fn finalizers_with(&self) -> Vec<&str> {
        self.finalizers_without().into_iter().chain([FINALIZER]).collect()
    }

    pub(super) fn finalizers_without(&self) -> Vec<&str> {
        self.metadata
            .finalizers
            .iter()
            .map(String::as_str)
            .filter(|own| *own != FINALIZER)
            .collect()
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace(), self.name())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use anyhow::Result;
    use serde_json::{Value, json};

    use super::*;

    pub(in super::super) fn service(
        uid: &str,
        families: &[&str],
        ingress: &[&str],
    ) -> Result<Service> {
        let ingress: Vec<_> = ingress.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
        read(json!({
            "metadata": {"uid": uid, "namespace": "a", "name": "b", "finalizers": ["else", FINALIZER]},
            "spec": {"type": "LoadBalancer", "ipFamilies": families},
            "status": {"loadBalancer": {"ingress": ingress}},
        }))
    }

    fn read(object: Value) -> Result<Service> {
        Ok(serde_json::from_value(object)?)
    }

    fn with_spec(spec: &Value) -> Result<Service> {
        read(json!({"metadata": {"uid": "1", "namespace": "a", "name": "b"}, "spec": spec}))
    }

    #[test]
    fn only_a_load_balancer_without_a_class_is_wanted() -> Result<()> {
        assert!(with_spec(&json!({"type": "LoadBalancer"}))?.is_wanted());
        assert!(!with_spec(&json!({"type": "NodePort"}))?.is_wanted());
        assert!(
            !with_spec(&json!({"type": "LoadBalancer", "loadBalancerClass": "example.com/other"}))?
                .is_wanted()
        );
        let going = json!({"uid": "1", "namespace": "a", "name": "b", "deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert!(!read(json!({"metadata": going, "spec": {"type": "LoadBalancer"}}))?.is_wanted());
        Ok(())
    }

    #[test]
    fn nodes_are_asked_only_where_the_policy_is_local() -> Result<()> {
        let asked = |policy: &str| {
            let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": policy, "healthCheckNodePort": 30_000});
            Ok::<_, anyhow::Error>(with_spec(&spec)?.health_check())
        };
        assert_eq!(asked("Local")?, Some(30_000));
        assert_eq!(asked("Cluster")?, None);
        Ok(())
    }

    #[test]
    fn the_finalizers_of_others_stay() -> Result<()> {
        let service = service("1", &["IPv4"], &["10.20.0.1"])?;
        assert_eq!(service.finalizers_with(), ["else", FINALIZER]);
        assert_eq!(service.finalizers_without(), ["else"]);
        Ok(())
    }
}
