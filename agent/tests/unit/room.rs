//! The distribution of what is not enough for all: the older Service comes first, ClusterIPs come
//! before the rest, and no namespace gets so much that others are refused.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::SystemTime;

use proptest::collection::vec;
use proptest::prelude::*;
use sluice_common::abi::ServiceKey;
use sluice_core::image::Image;
use sluice_core::model::object::{
    Address, Endpoint, IpFamily, PortSpec, Protocol, ServiceSpec, Slice, SliceKind, SliceLabels,
    SlicePart, SlicePort,
};
use sluice_core::model::report::Flaw;
use sluice_core::model::{Change, Desired, Event, Model, ObjectName, Settings, SourceId};
use sluice_core::plan::{Plan, Sizes};

/// Takes changes to the maps' intended content.
struct Engine {
    model: Model,
    plan: Plan,
    maps: Image,
    synced: bool,
}

impl Engine {
    fn new(sizes: Sizes) -> Self {
        Self::with(Plan::new(sizes))
    }

    fn with(plan: Plan) -> Self {
        let settings = Settings { sources: [SourceId::Kubernetes].into(), ..Settings::default() };
        let maps = plan.image().clone();
        Self { model: Model::new(settings), plan, maps, synced: false }
    }

    /// Applies changes, and returns the number of writes that follow.
    fn feed(&mut self, changes: impl IntoIterator<Item = Change>) -> usize {
        let synced = (!std::mem::replace(&mut self.synced, true)).then_some(Change::Synced);
        for change in changes.into_iter().chain(synced) {
            self.model
                .apply(Event { source: SourceId::Kubernetes, change }, SystemTime::UNIX_EPOCH);
        }
        let Some(batch) = self.model.take(SystemTime::UNIX_EPOCH) else { return 0 };
        let update = self.plan.update(&batch);
        for (service, notes) in update.notes {
            self.model.set_plan_notes(&service, notes, SystemTime::UNIX_EPOCH);
        }
        for write in &update.writes {
            self.maps.apply(write);
        }
        assert_eq!(&self.maps, self.plan.image());
        update.writes.len()
    }

    /// Returns what the reports name as refused for lack of room, of Services in a namespace.
    fn refused(&self, namespace: &str) -> Vec<String> {
        let reports = self.model.reports().iter().filter(|report| report.note.flaw == Flaw::NoRoom);
        let texts = reports.map(ToString::to_string);
        texts.filter(|text| text.starts_with(&format!("Service {namespace}/"))).collect()
    }

    fn serves(&self, vip: IpAddr, port: u16) -> bool {
        let IpAddr::V4(address) = vip else { return false };
        let key = ServiceKey { address: address.into(), port, protocol: 6, reserved: 0 };
        self.maps.v4.services.contains_key(&key)
    }
}

/// A Service of the tests.
#[derive(Clone)]
struct Wish {
    name: ObjectName,
    created: Option<i64>,
    cluster_ip: IpAddr,
    ports: u16,
    external_ips: u8,
    ranges: u8,
    pods: u8,
}

impl Wish {
    fn new(namespace: &str, index: u8, created: Option<i64>) -> Self {
        let mark = namespace.bytes().fold(0, u8::wrapping_add);
        Self {
            name: ObjectName::new(namespace, &format!("service-{index}")),
            created,
            cluster_ip: IpAddr::from([10, 96, mark, index]),
            ports: 1,
            external_ips: 0,
            ranges: 0,
            pods: 1,
        }
    }

    fn changes(&self) -> Vec<Change> {
        let IpAddr::V4(own) = self.cluster_ip else { return Vec::new() };
        let [.., mark, index] = own.octets();
        let ports = (0..self.ports).map(|number| PortSpec {
            name: format!("p{number}").into(),
            number: 1_000 + i32::from(number),
            protocol: "TCP".into(),
            node_port: 0,
        });
        let spec = ServiceSpec {
            created: self.created,
            kind: if self.ranges > 0 { "LoadBalancer".into() } else { Box::default() },
            cluster_ips: vec![Address::Valid(self.cluster_ip)],
            ports: ports.collect(),
            ingress: if self.ranges > 0 {
                vec![Address::Valid(self.balancer())]
            } else {
                Vec::new()
            },
            external_ips: (0..self.external_ips)
                .map(|low| Address::Valid(IpAddr::from([172, mark, index, low])))
                .collect(),
            source_ranges: (0..self.ranges).map(|low| format!("203.0.{low}.0/24").into()).collect(),
            ..ServiceSpec::default()
        };
        let endpoint = |low| Endpoint {
            address: Address::Valid(IpAddr::from([10, mark, index, low])),
            ready: true,
            serving: true,
            terminating: false,
            node: None,
            zones: Box::default(),
            nodes: Box::default(),
        };
        let slice_port = |number: u16| SlicePort {
            name: format!("p{number}").into(),
            number: Some(8_000 + i32::from(number)),
            protocol: "TCP".into(),
        };
        let part = SlicePart {
            ports: (0..self.ports).map(slice_port).collect(),
            endpoints: (0..self.pods).map(endpoint).collect(),
        };
        let slice = Slice {
            service: Some(self.name.name.clone()),
            family: Ok(Some(IpFamily::V4)),
            labels: SliceLabels::default(),
            parts: vec![part],
            surplus: 0,
            triggered: None,
        };
        vec![
            Change::Service(self.name.clone(), Some(spec)),
            Change::Slice(SliceKind::EndpointSlice, self.name.clone(), Some(slice)),
        ]
    }

    fn balancer(&self) -> IpAddr {
        let IpAddr::V4(own) = self.cluster_ip else { return self.cluster_ip };
        let [.., mark, index] = own.octets();
        IpAddr::from([198, 51, mark, index])
    }

    fn gone(&self) -> Vec<Change> {
        vec![
            Change::Service(self.name.clone(), None),
            Change::Slice(SliceKind::EndpointSlice, self.name.clone(), None),
        ]
    }
}

fn sizes() -> Sizes {
    Sizes {
        ports: 512,
        backends: 2_048,
        services: 1_024,
        slot_blocks: 8_192,
        reserve_blocks: 512,
        source_ranges: 512,
        ..Sizes::default()
    }
}

/// Returns Services that want more of something than there is, and one old Service of another
/// namespace.
fn hog(wish: impl Fn(Wish) -> Wish, count: u8) -> Vec<Wish> {
    (0..count).map(|index| wish(Wish::new("aaa", index, Some(1_700_000_000)))).collect()
}

fn dns() -> Wish {
    Wish {
        ports: 3,
        pods: 2,
        external_ips: 1,
        ranges: 2,
        ..Wish::new("kube-system", 10, Some(1_577_836_800))
    }
}

/// Checks that everything that `dns` wants is programmed, in whatever order it arrived.
fn is_served_whole(engine: &Engine, wish: &Wish) {
    assert_eq!(engine.refused(&wish.name.namespace), [] as [String; 0]);
    let vips = [wish.cluster_ip, wish.balancer()];
    for (vip, port) in
        vips.into_iter().flat_map(|vip| (0..wish.ports).map(move |port| (vip, 1_000 + port)))
    {
        assert!(engine.serves(vip, port), "{vip}:{port}");
    }
}

/// Checks that whatever a namespace wants too much of, another one's Service is served: at a start,
/// when it comes later even if it is the youngest, when it changes, and by an agent that takes
/// over.
fn leaves_room(hog: &[Wish], dns: &Wish) {
    let all = || hog.iter().flat_map(Wish::changes);
    let mut fresh = Engine::new(sizes());
    let _ = fresh.feed(all().chain(dns.changes()));
    assert!(!fresh.refused("aaa").is_empty(), "the test wants too little");
    is_served_whole(&fresh, dns);

    for created in [dns.created, None] {
        let mut later = Engine::new(sizes());
        let _ = later.feed(all());
        let dns = Wish { created, ..dns.clone() };
        let _ = later.feed(dns.changes());
        is_served_whole(&later, &dns);
        let more = Wish { ports: dns.ports + 2, pods: dns.pods + 2, ..dns.clone() };
        let _ = later.feed(more.changes());
        is_served_whole(&later, &more);

        let mut next = Engine::with(Plan::adopt(sizes(), later.maps.clone()));
        let _ = next.feed(all().chain(more.changes()));
        assert_eq!(next.maps.v4.services, later.maps.v4.services, "who has something keeps it");
        assert_eq!(next.maps.names, later.maps.names);
        is_served_whole(&next, &more);
        // When the others go, the rest is served.
        let _ = next.feed(hog.iter().flat_map(Wish::gone));
        assert_eq!(next.refused("aaa"), [] as [String; 0]);
        is_served_whole(&next, &more);
    }
}

#[test]
fn a_namespace_that_wants_all_frontends_leaves_others_theirs_and_has_all_its_cluster_ips() {
    let hog = hog(|wish| Wish { ports: 20, external_ips: 20, ..wish }, 7);
    leaves_room(&hog, &dns());
    for changes in [hog.clone(), hog.iter().rev().cloned().collect()] {
        let mut engine = Engine::new(sizes());
        let _ = engine.feed(changes.iter().take(5).flat_map(Wish::changes));
        let _ = engine.feed(changes.iter().skip(5).flat_map(Wish::changes));
        for (wish, port) in
            hog.iter().flat_map(|wish| (0..wish.ports).map(move |port| (wish, port)))
        {
            assert!(engine.serves(wish.cluster_ip, 1_000 + port), "{}", wish.name);
        }
    }
}

#[test]
fn a_namespace_that_wants_all_backends_leaves_others_theirs() {
    leaves_room(&hog(|wish| Wish { ports: 12, pods: 20, ..wish }, 12), &dns());
}

#[test]
fn a_namespace_that_wants_all_service_ports_leaves_others_theirs() {
    leaves_room(&hog(|wish| Wish { ports: 10, ..wish }, 60), &dns());
}

#[test]
fn a_namespace_that_wants_all_source_ranges_leaves_others_theirs() {
    leaves_room(&hog(|wish| Wish { ports: 10, ranges: 10, ..wish }, 8), &dns());
}

#[test]
fn a_namespace_that_wants_all_slots_leaves_others_theirs() {
    // There are fewer blocks than all tables take.
    let sizes = Sizes { slot_blocks: 600, reserve_blocks: 40, ..Sizes::default() };
    let mut engine = Engine::new(sizes);
    let _ = engine
        .feed(hog(|wish| Wish { ports: 10, pods: 20, ..wish }, 8).iter().flat_map(Wish::changes));
    assert!(!engine.refused("aaa").is_empty(), "the test wants too little");
    let _ = engine.feed(dns().changes());
    is_served_whole(&engine, &dns());
}

#[test]
fn a_namespace_alone_has_nearly_all() {
    let mut engine = Engine::new(sizes());
    let _ = engine
        .feed(hog(|wish| Wish { ports: 12, pods: 20, ..wish }, 12).iter().flat_map(Wish::changes));
    let serving = engine.maps.v4.backends.len();
    assert!(serving >= 2_048 * 31 / 32 - 1, "{serving}");
}

#[test]
fn the_older_service_is_served_first_and_what_is_refused_is_served_when_there_is_room() {
    let sizes = Sizes { ports: 3, ..Sizes::default() };
    let old = Wish::new("z", 1, Some(1));
    let wishes = [
        Wish::new("b", 2, None),
        Wish::new("a", 3, Some(9)),
        old.clone(),
        Wish { ports: 1, ..Wish::new("a", 4, Some(5)) },
    ];
    let mut engine = Engine::new(sizes);
    let _ = engine.feed(wishes.iter().flat_map(Wish::changes));
    let served =
        |engine: &Engine| wishes.each_ref().map(|wish| engine.serves(wish.cluster_ip, 1_000));
    assert_eq!(served(&engine), [false, false, true, true]);
    let _ = engine.feed(old.gone());
    assert_eq!(served(&engine), [false, true, false, true], "the oldest of those that wait");
}

#[test]
fn what_goes_makes_room_for_as_many_as_fit_at_once() {
    let sizes = Sizes { ports: 41, ..Sizes::default() };
    let large = Wish { ports: 40, ..Wish::new("large", 1, Some(1)) };
    let mut engine = Engine::new(sizes);
    let _ = engine.feed(large.changes());
    let small: Vec<Wish> = (0..60).map(|index| Wish::new("small", index, Some(2))).collect();
    let _ = engine.feed(small.iter().flat_map(Wish::changes));
    let served =
        |engine: &Engine| small.iter().filter(|wish| engine.serves(wish.cluster_ip, 1_000)).count();
    let before = served(&engine);
    let _ = engine.feed(large.gone());
    assert!(before < 5 && served(&engine) >= 37, "{before}, then {}", served(&engine));
}

#[test]
fn a_load_balancer_whose_source_ranges_have_no_room_is_not_served_at_its_address() {
    let sizes = Sizes { source_ranges: 4, ..Sizes::default() };
    let wish = Wish { ranges: 5, ..Wish::new("a", 1, None) };
    let mut engine = Engine::new(sizes);
    let _ = engine.feed(wish.changes());
    assert!(engine.serves(wish.cluster_ip, 1_000) && !engine.serves(wish.balancer(), 1_000));
    assert_eq!(
        engine.refused("a"),
        ["Service a/service-1: no_room: spec.ports p0 TCP IPv4: no room for its 5 source ranges: \
          its load balancer's addresses are not served"]
    );
    assert_eq!(engine.maps.v4.source_ranges.len(), 0);
    let fewer = Wish { ranges: 3, ..wish.clone() };
    let _ = engine.feed(fewer.changes());
    assert!(engine.serves(wish.balancer(), 1_000));
    // A Service that is served goes on with its present source ranges.
    let _ = engine.feed(wish.changes());
    assert!(engine.serves(wish.balancer(), 1_000));
    assert_eq!((engine.maps.v4.source_ranges.len(), engine.refused("a").len()), (4, 1));
}

#[test]
fn the_four_least_frontends_answer_for_an_endpoint_of_many_service_ports() {
    // Every port of every Service leads to the same endpoints.
    let same = |count: u8| {
        let slice_port = SlicePort { name: "".into(), number: Some(80), protocol: "TCP".into() };
        (0..count).flat_map(move |index| {
            let wish = Wish { ports: 1, pods: 4, ..Wish::new("same", index, None) };
            let mut changes = wish.changes();
            for change in &mut changes {
                if let Change::Slice(_, _, Some(slice)) = change {
                    slice.parts[0].ports =
                        vec![SlicePort { name: "p0".into(), ..slice_port.clone() }];
                    for (low, endpoint) in (0..).zip(&mut slice.parts[0].endpoints) {
                        endpoint.address = Address::Valid(IpAddr::from([10, 1, 0, low]));
                    }
                }
            }
            changes
        })
    };
    let mut engine = Engine::new(Sizes::default());
    let _ = engine.feed(same(100));
    // The four least frontends answer for them, whichever Service came first.
    let least: Vec<_> = (0..4).map(|index| Wish::new("same", index, None).cluster_ip).collect();
    assert_eq!(engine.maps.v4.origins.len(), 4);
    for origins in engine.maps.v4.origins.values() {
        let vips = origins
            .frontends
            .iter()
            .map(|origin| IpAddr::from(std::net::Ipv4Addr::from(origin.address)));
        assert_eq!(vips.collect::<Vec<_>>(), least);
    }
    let first = Wish::new("same", 0, None);
    let _ = engine.feed(first.gone());
    assert!(engine.maps.v4.origins.values().all(|origins| {
        IpAddr::from(std::net::Ipv4Addr::from(origins.frontends[0].address)) == least[1]
    }));
}

// --- circles --------------------------------------------------------------------------------

/// A Service and its endpoints, with so few addresses that endpoints are often frontends.
#[derive(Clone, Debug)]
struct Knot {
    created: Option<i64>,
    vips: BTreeSet<u8>,
    node_port: bool,
    endpoints: BTreeSet<u8>,
    there: bool,
}

const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 99));

fn knot() -> impl Strategy<Value = Knot> {
    let low = || prop::collection::btree_set(0..6_u8, 0..3);
    (prop::option::of(0..3_i64), low(), any::<bool>(), low(), prop::bool::weighted(0.8)).prop_map(
        |(created, vips, node_port, endpoints, there)| Knot {
            created,
            vips,
            node_port,
            endpoints,
            there,
        },
    )
}

fn knot_changes(index: u8, knot: &Knot) -> Vec<Change> {
    let name = ObjectName::new("ns", &format!("s{index}"));
    let address = |low: &u8| Address::Valid(IpAddr::from([10, 0, 0, *low]));
    let port = PortSpec {
        number: 80,
        protocol: "TCP".into(),
        node_port: if knot.node_port { 80 } else { 0 },
        ..PortSpec::default()
    };
    let spec = ServiceSpec {
        created: knot.created,
        cluster_ips: vec![Address::Valid(IpAddr::from([10, 0, 1, index]))],
        external_ips: knot.vips.iter().map(address).collect(),
        ports: vec![port],
        ..ServiceSpec::default()
    };
    // Some endpoints are ClusterIPs, one is the node.
    let endpoint = |low: &u8| match low {
        5 => Address::Valid(NODE),
        4 => Address::Valid(IpAddr::from([10, 0, 1, (index + 1) % 4])),
        low => address(low),
    };
    let endpoint = |low: &u8| Endpoint {
        address: endpoint(low),
        ready: true,
        serving: true,
        terminating: false,
        node: None,
        zones: Box::default(),
        nodes: Box::default(),
    };
    let slice_port = SlicePort { name: "".into(), number: Some(80), protocol: "TCP".into() };
    let part = SlicePart {
        ports: vec![slice_port],
        endpoints: knot.endpoints.iter().map(endpoint).collect(),
    };
    let slice = Slice {
        service: Some(name.name.clone()),
        family: Ok(Some(IpFamily::V4)),
        labels: SliceLabels::default(),
        parts: vec![part],
        surplus: 0,
        triggered: None,
    };
    vec![
        Change::Service(name.clone(), knot.there.then_some(spec)),
        Change::Slice(SliceKind::EndpointSlice, name, Some(slice)),
    ]
}

fn knots(model: &mut Model, changes: Vec<Change>, all: &mut BTreeMap<ObjectName, Desired>) {
    for change in changes {
        model.apply(Event { source: SourceId::Kubernetes, change }, SystemTime::UNIX_EPOCH);
    }
    if let Some(batch) = model.take(SystemTime::UNIX_EPOCH) {
        all.extend(batch.services);
    }
    all.retain(|_, desired| !desired.ports.is_empty());
}

fn new_model(node_ports: bool) -> Model {
    let settings = Settings { sources: [SourceId::Kubernetes].into(), ..Settings::default() };
    let mut model = Model::new(settings);
    model.set_interfaces([(NODE, node_ports)].into());
    model.apply(
        Event { source: SourceId::Kubernetes, change: Change::Synced },
        SystemTime::UNIX_EPOCH,
    );
    model
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn no_backend_is_a_frontend_and_history_does_not_matter(
        rounds in vec((0..4_u8, knot()), 1..16), node_ports in any::<bool>(), turn in any::<bool>(),
    ) {
        let mut model = new_model(!turn && node_ports);
        let mut all = BTreeMap::new();
        let mut last = BTreeMap::new();
        for (index, knot) in rounds {
            knots(&mut model, knot_changes(index, &knot), &mut all);
            let _ = last.insert(index, knot);
        }
        model.set_interfaces([(NODE, node_ports)].into());
        knots(&mut model, Vec::new(), &mut all);

        let frontends: BTreeSet<(IpAddr, u16, Protocol)> = all
            .values()
            .flat_map(|desired| &desired.ports)
            .flat_map(|(key, port)| port.frontends.keys().map(|(vip, number)| (*vip, *number, key.protocol)))
            .collect();
        let node_port = (IpFamily::V4.unspecified(), 80, Protocol::Tcp);
        for (key, port) in all.values().flat_map(|desired| &desired.ports) {
            for (address, number) in port.backends.keys() {
                prop_assert!(!frontends.contains(&(*address, *number, key.protocol)), "{address} of {key:?}");
                prop_assert!(!(node_ports && *address == NODE && frontends.contains(&node_port)), "{key:?}");
            }
        }
        let mut fresh = new_model(node_ports);
        let mut expected = BTreeMap::new();
        let changes = last.iter().flat_map(|(index, knot)| knot_changes(*index, knot)).collect();
        knots(&mut fresh, changes, &mut expected);
        prop_assert_eq!(all, expected);
        let reports = |model: &Model| model.reports().iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        prop_assert_eq!(reports(&model), reports(&fresh));
    }
}
