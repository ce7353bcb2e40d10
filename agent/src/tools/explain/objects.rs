//! Finds the Kubernetes objects and fields behind the numbers in the maps.
//!
//! The maps have the Service of a service port, and the kind of a frontend implies the field. If
//! the objects themselves are known (manifests), elements of lists and the conditions of endpoints
//! are reported too.

use std::net::IpAddr;

use sluice_common::abi::{Class, Name, frontend};
use sluice_core::model::object::{Address, Endpoint, ServiceSpec, Slice, SliceKind, SlicePart};
use sluice_core::model::{Model, ObjectName, SliceKey};

/// The objects, as far as they are known.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    model: Option<Model>,
}

/// The Service and port behind a service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    /// The Service.
    pub(super) service: ObjectName,
    /// The port's name; empty for an unnamed port.
    label: String,
    /// The Service's own port number.
    number: u16,
    /// The protocol's name.
    protocol: &'static str,
    /// 4 or 6.
    family: u8,
}

impl Owner {
    pub(super) fn new(name: &Name, protocol: &'static str) -> Self {
        let service = ObjectName::new(&text(&name.namespace), &text(&name.service));
        Self {
            service,
            label: text(&name.port),
            number: name.number,
            protocol,
            family: name.family,
        }
    }

    /// Returns the port's name, or its number.
    pub(super) fn port(&self) -> String {
        if self.label.is_empty() { self.number.to_string() } else { self.label.clone() }
    }

    /// Returns the Service, as steps refer to it.
    pub(super) fn object(&self) -> String {
        format!("Service {}", self.service)
    }
}

/// Returns the text before the first zero byte.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// The number of endpoints of a service port in each condition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Census {
    ready: usize,
    terminating: usize,
    not_ready: usize,
    /// The ready ones with hints for zones or nodes.
    hinted: usize,
}

impl std::fmt::Display for Census {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ready, terminating, not_ready, hinted } = *self;
        let all = ready + terminating + not_ready;
        write!(formatter, "{all} {}: {ready} ready", plural(all, "endpoint"))?;
        for (count, word) in [
            (terminating, "terminating"),
            (not_ready, "not ready"),
            (hinted, "with topology hints"),
        ] {
            if count > 0 {
                write!(formatter, ", {count} {word}")?;
            }
        }
        Ok(())
    }
}

/// Returns a noun in the singular or plural.
pub(super) fn plural(count: usize, noun: &str) -> String {
    if count == 1 { noun.to_owned() } else { format!("{noun}s") }
}

impl Objects {
    /// Makes the objects of a model.
    pub(super) fn of(model: Model) -> Self {
        Self { model: Some(model) }
    }

    fn spec(&self, owner: &Owner) -> Option<&ServiceSpec> {
        self.model.as_ref()?.service(&owner.service)
    }

    /// Returns the element of `spec.ports` behind the service port.
    fn port_field(&self, owner: &Owner) -> String {
        let place = self.spec(owner).and_then(|spec| {
            spec.ports.iter().position(|port| {
                *port.name == *owner.label && port.protocol.eq_ignore_ascii_case(owner.protocol)
            })
        });
        match place {
            Some(index) => format!("spec.ports[{index}]"),
            None => format!("spec.ports[{}]", owner.port()),
        }
    }

    /// Returns the field that makes an address a frontend.
    pub(super) fn frontend_field(&self, owner: &Owner, kind: u32, address: IpAddr) -> String {
        let port = self.port_field(owner);
        let spec = self.spec(owner);
        let element = |list: &str, of: fn(&ServiceSpec) -> &Vec<Address>, rest: &str| {
            let place = spec.and_then(|spec| {
                of(spec).iter().position(|found| *found == Address::Valid(address))
            });
            let place = place.map_or(String::new(), |index| format!("[{index}]"));
            format!("{list}{place}{rest}, {port}.port")
        };
        match kind {
            frontend::NODE_PORT => format!("{port}.nodePort"),
            frontend::LOAD_BALANCER => {
                element("status.loadBalancer.ingress", |spec| &spec.ingress, "")
            }
            frontend::EXTERNAL_IP => element("spec.externalIPs", |spec| &spec.external_ips, ""),
            _ => element("spec.clusterIPs", |spec| &spec.cluster_ips, ""),
        }
    }

    /// Returns the field of the traffic policy for a class of clients, and its value if the objects
    /// are known.
    pub(super) fn policy(&self, owner: &Owner, class: Class) -> (&'static str, Option<&str>) {
        let word = |of: fn(&ServiceSpec) -> &str| self.spec(owner).map(of);
        let or_cluster =
            |word: Option<_>| word.map(|word: &str| if word.is_empty() { "Cluster" } else { word });
        if class == Class::Internal {
            ("spec.internalTrafficPolicy", or_cluster(word(|spec| &spec.internal_policy)))
        } else {
            ("spec.externalTrafficPolicy", or_cluster(word(|spec| &spec.external_policy)))
        }
    }

    /// Returns the parts of a Service's slices with a port of the service port's name, with the
    /// number of that port.
    fn parts<'a>(
        &'a self,
        owner: &'a Owner,
    ) -> impl Iterator<Item = (&'a SliceKey, &'a SlicePart, Option<i32>)> {
        let slices = || self.model.iter().flat_map(|model| model.slices(&owner.service));
        let of_family = |slice: &Slice| match slice.family {
            Ok(family) => family.is_none_or(|family| family.version() == owner.family),
            Err(_) => false,
        };
        // If there are slices, Endpoints objects only mirror them.
        let sliced = slices()
            .any(|(key, slice)| key.kind == SliceKind::EndpointSlice && slice.family.is_ok());
        let slices = slices().filter(move |(key, slice)| {
            of_family(slice) && !(sliced && key.kind == SliceKind::Endpoints)
        });
        let parts =
            slices.flat_map(|(key, Slice { parts, .. })| parts.iter().map(move |part| (key, part)));
        parts.flat_map(move |(key, part)| {
            let ports = part.ports.iter().filter(|port| {
                *port.name == *owner.label && port.protocol.eq_ignore_ascii_case(owner.protocol)
            });
            ports.map(move |port| (key, part, port.number))
        })
    }

    /// Returns the endpoints of a service port by condition, or [`None`] if the objects are not
    /// known.
    pub(super) fn census(&self, owner: &Owner) -> Option<Census> {
        let _ = self.model.as_ref()?;
        let mut census = Census::default();
        for endpoint in self.parts(owner).flat_map(|(_, part, _)| &part.endpoints) {
            let Endpoint { ready, serving, terminating, .. } = *endpoint;
            if ready {
                census.ready += 1;
                census.hinted +=
                    usize::from(!(endpoint.zones.is_empty() && endpoint.nodes.is_empty()));
            } else if serving && terminating {
                census.terminating += 1;
            } else {
                census.not_ready += 1;
            }
        }
        Some(census)
    }

    /// Returns the object and field of an endpoint. If there are several, a ready one counts.
    pub(super) fn endpoint(
        &self,
        owner: &Owner,
        address: IpAddr,
        port: u16,
    ) -> (String, Option<String>) {
        let here = self.parts(owner).filter(|(_, _, number)| *number == Some(i32::from(port)));
        let found = here.flat_map(|(key, part, _)| {
            let all = part.endpoints.iter().enumerate();
            let same = all.filter(|(_, endpoint)| endpoint.address == Address::Valid(address));
            same.map(move |(index, endpoint)| (endpoint.terminating, key, index))
        });
        match found.min_by_key(|(terminating, ..)| *terminating) {
            Some((_, key, index)) => {
                (key.subject().to_string(), Some(format!("endpoints[{index}]")))
            }
            None => (format!("EndpointSlice of {}", owner.service), None),
        }
    }
}
