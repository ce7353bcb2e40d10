//! Compares what two sets of maps answer, frontend by frontend: `sluice plan`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::Serialize;
use sluice_common::abi::{Range, ServicePort, frontend};
use sluice_common::{V4, V6};
use sluice_core::image::{Image, Stack};

use crate::node::view::{PortName, kind, protocol};

/// How a frontend changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum How {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It answers in another way.
    Changed,
}

/// A frontend whose answer changes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
pub(crate) struct Change {
    /// How it changes.
    pub(crate) how: How,
    /// Whether somebody who is served today is not any more.
    pub(crate) loses: bool,
    /// The address and port; `*:PORT` for a node port.
    pub(crate) frontend: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub(crate) protocol: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalIP`.
    pub(crate) kind: &'static str,
    /// The Service's port, as `namespace/name:port`: the one that has it afterwards, or had it.
    pub(crate) service: String,
    /// What changes, for people.
    pub(crate) what: Vec<String>,
}

/// A frontend's place.
type Key = (u8, u32, String, u8);

/// What decides about a frontend's clients.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    name: PortName,
    kind: u32,
    /// For each kind of client, who may answer.
    classes: Vec<(&'static str, Class)>,
    affinity: u32,
    keeps_source: bool,
    /// The networks that may use it; [`None`] if all may.
    ranges: Option<BTreeSet<IpNet>>,
}

/// Who may answer a kind of client.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Class {
    backends: BTreeSet<SocketAddr>,
    /// Whether clients are dropped where nobody answers, and not refused.
    drops: bool,
}

/// Returns every frontend whose answer changes, those first whose clients lose it.
pub(crate) fn compare(before: &Image, after: &Image) -> Vec<Change> {
    let (old, new) = (facts(before), facts(after));
    let keys: BTreeSet<&Key> = old.keys().chain(new.keys()).collect();
    let mut changes: Vec<Change> =
        keys.into_iter().filter_map(|key| change(key, old.get(key), new.get(key))).collect();
    changes.sort_by(|a, b| {
        (!a.loses, a.how, &a.service, &a.frontend).cmp(&(!b.loses, b.how, &b.service, &b.frontend))
    });
    changes
}

fn change(key: &Key, old: Option<&Facts>, new: Option<&Facts>) -> Option<Change> {
    let (how, loses, what) = match (old, new) {
        (Some(old), Some(new)) if old == new => return None,
        (Some(old), Some(new)) => {
            let (loses, what) = differences(old, new);
            (How::Changed, loses, what)
        }
        (Some(old), None) => {
            let what = "removed: new connections are not served, open ones drain";
            (How::Removed, old.is_answered(), vec![what.to_owned()])
        }
        (None, Some(new)) => {
            let what = new.classes.iter().map(|(who, class)| (*who, class.words())).collect();
            (How::Added, false, joined(what))
        }
        (None, None) => return None,
    };
    let facts = new.or(old)?;
    Some(Change {
        how,
        loses,
        frontend: key.2.clone(),
        protocol: protocol(key.3),
        kind: kind(facts.kind),
        service: facts.name.to_string(),
        what,
    })
}

impl Facts {
    fn is_answered(&self) -> bool {
        self.classes.iter().any(|(_, class)| !class.backends.is_empty())
    }
}

impl Class {
    /// Returns who answers, in words.
    fn words(&self) -> String {
        match (self.backends.len(), self.drops) {
            (0, true) => "dropped, since no endpoint is on this node".to_owned(),
            (0, false) => "refused, since there is no endpoint".to_owned(),
            (count, _) => format!("{count} {}", endpoints(count)),
        }
    }

    /// Returns how the answers differ from earlier ones, in words.
    fn words_since(&self, old: &Self) -> String {
        if self.backends.is_empty() {
            return self.words();
        }
        let list = |sign: &'static str, more: &Self, less: &Self| {
            let all: Vec<String> = more
                .backends
                .difference(&less.backends)
                .map(|address| format!("{sign}{address}"))
                .collect();
            all
        };
        let mut parts = list("-", old, self);
        parts.extend(list("+", self, old));
        let count = self.backends.len();
        format!("{}, now {count} {}", parts.join(" "), endpoints(count))
    }
}

/// Returns what happens to each kind of client, once if it is the same for all.
fn joined(classes: Vec<(&'static str, String)>) -> Vec<String> {
    match &classes[..] {
        [(_, one), (_, other)] if one == other => vec![format!("clients: {one}")],
        _ => classes.into_iter().map(|(who, words)| format!("{who}: {words}")).collect(),
    }
}

fn endpoints(count: usize) -> &'static str {
    if count == 1 { "endpoint" } else { "endpoints" }
}

/// Returns whether somebody loses the frontend, and what changes.
fn differences(old: &Facts, new: &Facts) -> (bool, Vec<String>) {
    let (mut loses, mut what) = (false, Vec::new());
    if old.name.service() != new.name.service() {
        loses = true;
        what.push(format!("{} loses it to {}", old.name.service(), new.name.service()));
    }
    let mut classes = Vec::new();
    for ((who, old), (_, new)) in old.classes.iter().zip(&new.classes) {
        loses |= new.backends.is_empty() && !old.backends.is_empty();
        if old != new {
            classes.push((*who, new.words_since(old)));
        }
    }
    what.extend(joined(classes));
    if old.affinity != new.affinity {
        what.push(format!("affinity: {} s becomes {} s", old.affinity, new.affinity));
    }
    if old.keeps_source != new.keeps_source {
        let kept = if new.keeps_source { "now keep" } else { "no longer keep" };
        what.push(format!("clients {kept} their source address"));
    }
    if old.ranges != new.ranges {
        loses |= narrows(old.ranges.as_ref(), new.ranges.as_ref());
        let words = |ranges: &Option<BTreeSet<IpNet>>| match ranges {
            None => "everybody".to_owned(),
            Some(ranges) => {
                let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
                ranges.join(",")
            }
        };
        what.push(format!("open to {}, was to {}", words(&new.ranges), words(&old.ranges)));
    }
    if old.kind != new.kind {
        what.push(format!("was a {}", kind(old.kind)));
    }
    if what.is_empty() {
        what.push(format!("port {} becomes {}", old.name, new.name));
    }
    (loses, what)
}

/// Whether a network that might use a frontend may not any more.
fn narrows(old: Option<&BTreeSet<IpNet>>, new: Option<&BTreeSet<IpNet>>) -> bool {
    let Some(new) = new else { return false };
    old.is_none_or(|old| !old.iter().all(|range| new.iter().any(|wider| wider.contains(range))))
}

fn facts(image: &Image) -> BTreeMap<Key, Facts> {
    let mut facts = BTreeMap::new();
    add::<V4>(image, 4, &mut facts);
    add::<V6>(image, 6, &mut facts);
    facts
}

fn add<F: Stack>(image: &Image, family: u8, facts: &mut BTreeMap<Key, Facts>) {
    for (key, service) in &F::of(image).services {
        // A whole address only refuses what no frontend takes.
        let Some(name) = image.names.get(&service.service_port).filter(|_| key.port != 0) else {
            continue;
        };
        let port = image.ports.get(&service.service_port).copied().unwrap_or_default();
        let at = match service.kind {
            frontend::NODE_PORT => format!("*:{}", key.port),
            _ => SocketAddr::new(F::ip(key.address), key.port).to_string(),
        };
        let is_external = service.kind != frontend::CLUSTER_IP;
        let ranges = (service.kind == frontend::LOAD_BALANCER && port.restricts_sources())
            .then(|| ranges::<F>(image, service.service_port));
        let found = Facts {
            name: PortName::from(name),
            kind: service.kind,
            classes: classes::<F>(image, &port, is_external),
            affinity: port.affinity_seconds,
            keeps_source: is_external && port.is_external_local(),
            ranges,
        };
        // Node ports of both families have one number.
        let _ = facts.insert((family, u32::from(key.port), at, key.protocol), found);
    }
}

/// Returns who answers each kind of client of a frontend.
fn classes<F: Stack>(
    image: &Image,
    port: &ServicePort,
    is_external: bool,
) -> Vec<(&'static str, Class)> {
    let [internal, inside, outside] = port
        .ranges
        .map(Range)
        .map(|range| Class { backends: backends::<F>(image, range), drops: range.drops() });
    if is_external {
        vec![("clients of this node", inside), ("clients outside", outside)]
    } else {
        vec![("clients", internal)]
    }
}

fn backends<F: Stack>(image: &Image, range: Range) -> BTreeSet<SocketAddr> {
    let slots = image.slots.get(&range.start()).filter(|_| range.size() != 0);
    let backend = |id: &u32| {
        let found = F::of(image).backends.get(id)?;
        Some(SocketAddr::new(F::ip(found.address), found.port))
    };
    slots.into_iter().flatten().filter_map(backend).collect()
}

fn ranges<F: Stack>(image: &Image, service_port: u32) -> BTreeSet<IpNet> {
    let ranges = image.source_ranges::<F>(service_port);
    ranges.filter_map(|key| IpNet::new(F::ip(key.network), key.length).ok()).collect()
}
