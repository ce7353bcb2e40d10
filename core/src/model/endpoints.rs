//! Finds the Services that have an endpoint. They are derived again when a frontend there appears
//! or disappears, since no endpoint may be a frontend.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::claims::Frontend;
use super::object::ObjectName;

/// A hash of an endpoint, which saves memory where there are a quarter of a million of them. A
/// collision only derives a Service needlessly.
type Fingerprint = u64;

/// The endpoints of all Services that belong to one of their ports.
#[derive(Clone, Debug, Default)]
pub(super) struct Endpoints {
    users: BTreeSet<(Fingerprint, Arc<ObjectName>)>,
    services: BTreeMap<Arc<ObjectName>, Box<[Fingerprint]>>,
}

fn fingerprint(endpoint: &Frontend) -> Fingerprint {
    let mut hasher = DefaultHasher::new();
    endpoint.hash(&mut hasher);
    hasher.finish()
}

impl Endpoints {
    /// Replaces a Service's endpoints.
    pub(super) fn set(&mut self, service: &ObjectName, endpoints: &BTreeSet<Frontend>) {
        let mut new: Vec<Fingerprint> = endpoints.iter().map(fingerprint).collect();
        new.sort_unstable();
        new.dedup();
        let (name, old) = self
            .services
            .remove_entry(service)
            .unwrap_or_else(|| (Arc::new(service.clone()), Box::default()));
        for gone in old.iter().filter(|old| new.binary_search(old).is_err()) {
            let _ = self.users.remove(&(*gone, name.clone()));
        }
        for came in new.iter().filter(|new| old.binary_search(new).is_err()) {
            let _ = self.users.insert((*came, name.clone()));
        }
        if !new.is_empty() {
            let _ = self.services.insert(name, new.into_boxed_slice());
        }
    }

    /// Returns the Services that have an endpoint, and perhaps a few that do not.
    pub(super) fn users(&self, endpoint: Frontend) -> impl Iterator<Item = &ObjectName> {
        let fingerprint = fingerprint(&endpoint);
        let first = (fingerprint, Arc::new(ObjectName::new("", "")));
        let users = self.users.range(first..).take_while(move |(other, _)| *other == fingerprint);
        users.map(|(_, service)| &**service)
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::model::object::Protocol;

    #[test]
    fn an_endpoint_leads_to_every_service_that_has_it_now() {
        let (a, b) = (ObjectName::new("a", "a"), ObjectName::new("b", "b"));
        let at = |port| (IpAddr::from([10, 1, 0, 1]), port, Protocol::Tcp);
        let mut endpoints = Endpoints::default();
        endpoints.set(&a, &[at(80), at(81)].into());
        endpoints.set(&b, &[at(81), at(82)].into());
        let users =
            |endpoints: &Endpoints, port| endpoints.users(at(port)).cloned().collect::<Vec<_>>();
        assert_eq!(users(&endpoints, 80), std::slice::from_ref(&a));
        assert_eq!(users(&endpoints, 81), [a.clone(), b.clone()]);
        endpoints.set(&a, &[at(82)].into());
        assert_eq!([users(&endpoints, 80), users(&endpoints, 81)], [vec![], vec![b.clone()]]);
        assert_eq!(users(&endpoints, 82), [a, b.clone()]);
        endpoints.set(&b, &BTreeSet::new());
        assert_eq!(users(&endpoints, 81), []);
    }
}
