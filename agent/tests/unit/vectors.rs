//! The endpoints to which kube-proxy sends a client, case by case: the model must agree.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use sluice_core::model::object::{
    Address, Endpoint, IpFamily, NodeSpec, PortSpec, ServiceSpec, Slice, SliceKind, SliceLabels,
    SlicePart, SlicePort,
};
use sluice_core::model::policy::{Member, Place, Policies, categorize};
use sluice_core::model::{Change, DesiredPort, Event, Model, ObjectName, Settings, SourceId};

/// A case. Endpoints are R (ready), T (terminates, answers still) or U (not ready), then `L`: on
/// this node; `z` and `y`: hinted for this node's zone, for another one. Sets of endpoints are
/// their places in that list.
struct Case {
    number: &'static str,
    endpoints: &'static [&'static str],
    /// Internal and external policy: `C` (Cluster) or `L` (Local).
    policies: &'static str,
    /// Whether it has an external address.
    external: bool,
    cluster: &'static str,
    local: &'static str,
    reachable: &'static str,
    /// The backends of clients of the ClusterIP, of clients of an external address inside, and of
    /// those outside.
    clients: [&'static str; 3],
    /// The number of endpoints that the health check counts.
    health: usize,
}

const CASES: &[Case] = &[
    Case {
        number: "1",
        endpoints: &["R", "RL"],
        policies: "CC",
        external: true,
        cluster: "0 1",
        local: "",
        reachable: "0 1",
        clients: ["0 1", "0 1", "0 1"],
        health: 1,
    },
    Case {
        number: "2",
        endpoints: &["R"],
        policies: "LC",
        external: false,
        cluster: "",
        local: "",
        reachable: "",
        clients: ["drop", "drop", "drop"],
        health: 0,
    },
    Case {
        number: "3",
        endpoints: &["R"],
        policies: "CL",
        external: true,
        cluster: "0",
        local: "",
        reachable: "0",
        clients: ["0", "0", "drop"],
        health: 0,
    },
    Case {
        number: "4",
        endpoints: &["TL", "R"],
        policies: "CL",
        external: true,
        cluster: "1",
        local: "0",
        reachable: "0 1",
        clients: ["1", "1", "0"],
        health: 0,
    },
    Case {
        number: "5",
        endpoints: &["TL"],
        policies: "CL",
        external: true,
        cluster: "0",
        local: "0",
        reachable: "0",
        clients: ["0", "0", "0"],
        health: 0,
    },
    Case {
        number: "6, Cluster",
        endpoints: &["U"],
        policies: "CC",
        external: true,
        cluster: "",
        local: "",
        reachable: "",
        clients: ["reject", "reject", "reject"],
        health: 0,
    },
    Case {
        number: "6, Local",
        endpoints: &["U", "UL"],
        policies: "LL",
        external: true,
        cluster: "",
        local: "",
        reachable: "",
        clients: ["reject", "reject", "reject"],
        health: 0,
    },
    Case {
        number: "7",
        endpoints: &["Rz", "Ry"],
        policies: "CC",
        external: true,
        cluster: "0",
        local: "",
        reachable: "0",
        clients: ["0", "0", "0"],
        health: 0,
    },
    Case {
        number: "8",
        endpoints: &["Rz", "R"],
        policies: "CC",
        external: true,
        cluster: "0 1",
        local: "",
        reachable: "0 1",
        clients: ["0 1", "0 1", "0 1"],
        health: 0,
    },
    Case {
        number: "9",
        endpoints: &["Ry", "Ry"],
        policies: "CC",
        external: true,
        cluster: "0 1",
        local: "",
        reachable: "0 1",
        clients: ["0 1", "0 1", "0 1"],
        health: 0,
    },
    Case {
        number: "10",
        endpoints: &["Ry", "Tz"],
        policies: "CC",
        external: true,
        cluster: "0",
        local: "",
        reachable: "0",
        clients: ["0", "0", "0"],
        health: 0,
    },
    Case {
        number: "11",
        endpoints: &["RLy", "Rz"],
        policies: "LC",
        external: true,
        cluster: "1",
        local: "0",
        reachable: "0 1",
        clients: ["0", "1", "1"],
        health: 1,
    },
];

impl Case {
    fn endpoint(&self, place: usize) -> Endpoint {
        let text = self.endpoints[place];
        let zone = |letter: char, zone: &str| text.contains(letter).then(|| Arc::from(zone));
        Endpoint {
            address: Address::Valid(ip(place)),
            ready: text.starts_with('R'),
            serving: !text.starts_with('U'),
            terminating: text.starts_with('T'),
            node: Some(if text.contains('L') { "here".into() } else { "there".into() }),
            zones: zone('z', "ours").into_iter().chain(zone('y', "other")).collect(),
            nodes: Box::default(),
        }
    }

    fn all(&self) -> Vec<Endpoint> {
        (0..self.endpoints.len()).map(|place| self.endpoint(place)).collect()
    }

    fn spec(&self, kind: &str) -> ServiceSpec {
        let word = |place: usize| {
            if self.policies[place..].starts_with('L') { "Local" } else { "Cluster" }
        };
        ServiceSpec {
            internal_policy: word(0).into(),
            external_policy: word(1).into(),
            ..service(kind, self.external)
        }
    }
}

fn ip(place: usize) -> IpAddr {
    IpAddr::from([10, 1, 0, place as u8])
}

fn service(kind: &str, external: bool) -> ServiceSpec {
    ServiceSpec {
        kind: kind.into(),
        cluster_ips: vec![Address::Valid(IpAddr::from([10, 96, 0, 1]))],
        ports: vec![PortSpec {
            number: 80,
            protocol: "TCP".into(),
            node_port: if external { 30_080 } else { 0 },
            ..PortSpec::default()
        }],
        health_check_port: 32_000,
        ..ServiceSpec::default()
    }
}

/// Returns what the model derives from a Service with slices.
fn derive(
    spec: ServiceSpec,
    slices: Vec<(Option<i32>, Vec<Endpoint>)>,
) -> (DesiredPort, Option<usize>) {
    let settings = Settings {
        node: Some("here".into()),
        sources: [SourceId::Kubernetes].into(),
        ..Settings::default()
    };
    let mut model = Model::new(settings);
    let name = ObjectName::new("default", "web");
    let node = NodeSpec { zone: Some("ours".into()), ..NodeSpec::default() };
    let mut changes = vec![
        Change::Service(name.clone(), Some(spec)),
        Change::Node("here".into(), Some(node)),
        Change::Synced,
    ];
    for (index, (port, endpoints)) in slices.into_iter().enumerate() {
        let port = SlicePort { name: "".into(), number: port, protocol: "TCP".into() };
        let part = SlicePart { ports: vec![port], endpoints };
        let slice = Slice {
            service: Some("web".into()),
            family: Ok(Some(IpFamily::V4)),
            labels: SliceLabels::default(),
            parts: vec![part],
            surplus: 0,
            triggered: None,
        };
        let slice_name = ObjectName::new("default", &format!("web-{index}"));
        changes.push(Change::Slice(SliceKind::EndpointSlice, slice_name, Some(slice)));
    }
    for change in changes {
        model.apply(Event { source: SourceId::Kubernetes, change }, SystemTime::UNIX_EPOCH);
    }
    let mut batch = model.take(SystemTime::UNIX_EPOCH).expect("a batch");
    let desired = batch.services.remove(&name).expect("the Service");
    let port = desired.ports.into_values().next().expect("its port");
    (port, model.health_checks().get(&name).map(|check| check.local))
}

fn clients(port: &DesiredPort) -> [String; 3] {
    [0, 1, 2].map(|class| {
        let selected = port.backends.iter().filter(|(_, backend)| backend.selected[class]);
        let places: BTreeSet<String> = selected
            .map(|((address, _), _)| {
                address.to_string().rsplit('.').next().unwrap_or_default().to_owned()
            })
            .collect();
        match (places.is_empty(), port.drops[class]) {
            (true, true) => "drop".to_owned(),
            (true, false) => "reject".to_owned(),
            (false, drops) => {
                assert!(!drops, "endpoints, and clients are dropped");
                places.into_iter().collect::<Vec<_>>().join(" ")
            }
        }
    })
}

#[test]
fn every_case_is_decided_as_kube_proxy_decides_it() {
    for case in CASES {
        let all = case.all();
        let members: Vec<Member<'_>> = all
            .iter()
            .map(|endpoint| Member {
                ready: endpoint.ready,
                serving: endpoint.serving,
                terminating: endpoint.terminating,
                local: endpoint.node.as_deref() == Some("here"),
                zones: &endpoint.zones,
                nodes: &endpoint.nodes,
            })
            .collect();
        let policies = Policies {
            internal_local: case.policies.starts_with('L'),
            external_local: case.policies.ends_with('L'),
            external: case.external,
        };
        let place = Place { node: Some("here"), zone: Some("ours") };
        let found = categorize(&members, policies, place);
        let places = |set: &[bool]| {
            let places = set.iter().enumerate().filter(|(_, member)| **member);
            places.map(|(place, _)| place.to_string()).collect::<Vec<_>>().join(" ")
        };
        let sets = [&found.cluster, &found.local, &found.reachable].map(|set| places(set));
        assert_eq!(sets, [case.cluster, case.local, case.reachable], "case {}", case.number);

        let (port, health) = derive(case.spec("LoadBalancer"), vec![(Some(8080), all)]);
        assert_eq!(clients(&port), case.clients, "case {}", case.number);
        let checked = (case.policies.ends_with('L')).then_some(case.health);
        assert_eq!(health, checked, "case {}", case.number);
    }
}

#[test]
fn case_12_the_one_that_lives_beats_the_one_that_terminates_in_either_order() {
    let endpoint = |ready: bool| Endpoint {
        address: Address::Valid(ip(0)),
        ready,
        serving: true,
        terminating: !ready,
        node: None,
        zones: Box::default(),
        nodes: Box::default(),
    };
    for first in [true, false] {
        let slices =
            vec![(Some(8080), vec![endpoint(first)]), (Some(8080), vec![endpoint(!first)])];
        let (port, _) = derive(service("NodePort", true), slices);
        assert_eq!(clients(&port), ["0", "0", "0"]);
    }
}

#[test]
fn case_13_a_slice_without_a_port_has_no_endpoints() {
    let (port, _) = derive(service("NodePort", true), vec![(None, CASES[0].all())]);
    assert_eq!(clients(&port), ["reject", "reject", "reject"]);
}
