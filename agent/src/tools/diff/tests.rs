//! Differences between states that a plan has made and states that were damaged.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use sluice_common::abi::Range;
use sluice_core::image::{Image, Write};
use sluice_core::model::Event;
use sluice_core::plan::Sizes;

use super::*;
use crate::daemon::source::manifests;
use crate::node::devices::{Facts, Link, LinkAddress};

const WEB: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  sessionAffinity: ClientIP
  ports: [{name: http, port: 80, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.1.10]}, {addresses: [10.244.1.11]}]
";

const DNS: &str = "\
apiVersion: v1
kind: Service
metadata: {name: dns, namespace: kube-system}
spec: {clusterIP: 'fd00::a', ports: [{port: 53, protocol: UDP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: dns-1, namespace: kube-system, labels: {kubernetes.io/service-name: dns}}
addressType: IPv6
ports: [{name: '', port: 53, protocol: UDP}]
endpoints: [{addresses: ['fd01::5']}]
";

/// Returns the events of manifests, given as files.
fn events(files: &[&str]) -> Vec<Event> {
    let folder = tempfile::tempdir().expect("a folder");
    for (index, text) in files.iter().enumerate() {
        std::fs::write(folder.path().join(format!("{index}.yaml")), text).expect("written");
    }
    manifests::read(&PathBuf::from(folder.path())).expect("read")
}

fn facts() -> Facts {
    let address: IpAddr = "192.0.2.1".parse().expect("an address");
    let link = Link {
        index: 2,
        name: "eth0".to_owned(),
        layer: 1,
        up: true,
        mtu: 1500,
        ..Link::default()
    };
    let address = LinkAddress {
        address,
        prefix: 24,
        scope: 0,
        secondary: false,
        deprecated: false,
        unusable: false,
    };
    Facts {
        links: [(2, link)].into(),
        addresses: [(2, vec![address])].into(),
        default_routes: [2].into(),
    }
}

fn plan(files: &[&str], found: &State) -> Wanted {
    let inputs = Inputs { node: "a".into(), ..Inputs::default() };
    wanted(&inputs, events(files), &facts(), found, Sizes::default())
}

/// Returns the state after the writes are carried out, with the rest of what is wanted.
fn carried_out(wants: &Wanted, mut found: State) -> State {
    let apply = |image: &mut Image, write: &Write| image.apply(write);
    wants.writes.iter().for_each(|write| apply(&mut found.image, write));
    State { image: found.image, ..wants.state.clone() }
}

/// Returns what the agent makes of empty maps.
fn settled(files: &[&str]) -> State {
    carried_out(&plan(files, &State::default()), State::default())
}

fn differences(files: &[&str], found: &State) -> Vec<(Change, &'static str, String)> {
    let rows = compare(&plan(files, found).state, found);
    rows.into_iter().map(|row| (row.change, row.map, row.service.unwrap_or_default())).collect()
}

#[test]
fn what_an_agent_made_is_in_step() {
    let found = settled(&[WEB, DNS]);
    assert_eq!(found.image.names.len(), 2);
    assert_eq!(differences(&[WEB, DNS], &found), []);
    assert_eq!(plan(&[WEB, DNS], &found).writes, []);
}

#[test]
fn ids_that_were_given_in_another_order_are_no_difference() {
    let dns_first = settled(&[DNS]);
    let found = carried_out(&plan(&[WEB, DNS], &dns_first), dns_first);
    assert_ne!(found.image.names, settled(&[WEB, DNS]).image.names);
    assert_eq!(differences(&[WEB, DNS], &found), []);
}

#[test]
fn everything_is_missing_in_empty_maps() {
    let rows = differences(&[WEB], &State::default());
    let maps: BTreeSet<&str> = rows.iter().map(|(_, map, _)| *map).collect();
    let expected = [
        "addresses",
        "backends_v4",
        "devices",
        "names",
        "networks_v4",
        "networks_v6",
        "node_addresses_v4",
        "node_ports",
        "origins_v4",
        "ports",
        "services_v4",
        "settings",
        "slots",
    ];
    assert_eq!(maps, expected.into());
    assert!(rows.iter().all(|(change, _, _)| *change == Change::Missing), "{rows:?}");
}

#[test]
fn a_frontend_that_somebody_removed_is_named_with_its_service() {
    let mut found = settled(&[WEB, DNS]);
    let key = *found.image.v4.services.keys().find(|key| key.port == 80).expect("the ClusterIP");
    let _ = found.image.v4.services.remove(&key);
    let wants = plan(&[WEB, DNS], &found);
    let rows = compare(&wants.state, &found);
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!(
        (row.change, row.map, row.key.as_str(), row.found.as_deref(), row.service.as_deref()),
        (Change::Missing, "services_v4", "10.96.0.10:80 TCP", None, Some("default/web:http"))
    );
    assert!(
        row.wanted.as_ref().is_some_and(|words| words.starts_with("ClusterIP of port id ")),
        "{row:?}"
    );
    let repaired = carried_out(&wants, found);
    assert_eq!(differences(&[WEB, DNS], &repaired), []);
}

/// Damages the maps in one way.
type Spoil = fn(&mut State);

#[test]
fn whatever_is_spoilt_is_shown_and_mended() {
    let good = settled(&[WEB, DNS]);
    let table: [(&str, Spoil); 8] = [
        ("names", |state| {
            let _ = state.image.names.pop_first();
        }),
        ("slots", |state| {
            let slots = state.image.slots.values_mut().next().expect("a range");
            slots[3] = 999;
        }),
        ("ports", |state| {
            let port = state.image.ports.values_mut().next().expect("a port");
            port.ranges[0] = Range(0).0;
        }),
        ("backends_v4", |state| {
            state.image.v4.backends.values_mut().for_each(|backend| backend.flags = 0);
        }),
        ("origins_v4", |state| state.image.v4.origins.clear()),
        ("node_addresses_v4", |state| state.image.v4.node_addresses.clear()),
        ("addresses", |state| state.image.lanes.clear()),
        ("node_ports", |state| state.image.node_ports.clear()),
    ];
    for (map, spoil) in table {
        let mut found = good.clone();
        spoil(&mut found);
        if map == "names" {
            // The maps are read by name: a service port without one is not seen.
            found.image.ports.retain(|id, _| found.image.names.contains_key(id));
        }
        let wants = plan(&[WEB, DNS], &found);
        let rows = compare(&wants.state, &found);
        assert!(rows.iter().any(|row| row.map == map), "{map}: {rows:?}");
        let repaired = carried_out(&wants, found);
        assert_eq!(differences(&[WEB, DNS], &repaired), [], "{map}");
    }
}

#[test]
fn a_service_that_nobody_has_any_more_is_extra() {
    let found = settled(&[WEB, DNS]);
    let rows = differences(&[WEB], &found);
    let dns = "kube-system/dns:53";
    for map in ["services_v6", "names", "ports", "slots", "origins_v6"] {
        assert!(rows.contains(&(Change::Extra, map, dns.to_owned())), "{map}: {rows:?}");
    }
    assert!(rows.contains(&(Change::Different, "backends_v6", dns.to_owned())), "{rows:?}");
    // The ClusterIP itself belongs to no port.
    assert!(
        rows.iter().all(|(_, map, service)| service == dns || *map == "services_v6"),
        "{rows:?}"
    );
    // A repair leaves the frontend's bit for connections that drain. That is not a difference.
    let repaired = carried_out(&plan(&[WEB], &found), found);
    assert_eq!(differences(&[WEB], &repaired), []);
}

#[test]
fn a_policy_that_changed_shows_in_the_settings_of_the_programs() {
    let found = settled(&[WEB]);
    let policy = sluice_core::policy::Policy {
        masquerade: sluice_core::policy::Masquerade::All,
        ..sluice_core::policy::Policy::default()
    };
    let inputs = Inputs { node: "a".into(), policy, ..Inputs::default() };
    let wants = wanted(&inputs, events(&[WEB]), &facts(), &found, Sizes::default());
    let rows = compare(&wants.state, &found);
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((row.change, row.map), (Change::Different, "settings"));
    let wanted = row.wanted.as_deref().unwrap_or_default();
    let found = row.found.as_deref().unwrap_or_default();
    assert!(wanted.contains("masquerade all") && found.contains("masquerade needed"), "{row:?}");
}

#[test]
fn a_document_that_cannot_be_read_is_said_to_be() {
    let wants = plan(&[WEB, "kind: Service\n\tmetadata: [\n"], &State::default());
    assert_eq!((wants.objects, wants.unread.len()), (2, 1), "{:?}", wants.unread);
}
