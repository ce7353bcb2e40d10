//! Laws of the image, the plan and Maglev, tested with random data.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use sluice_common::abi::{
    Backend, NAME_MAX, Name, NodeAddress, Range, Service, ServiceKey, ServicePort, backend,
    frontend, listing, node_address, policy,
};
use sluice_common::maglev::{self, Turn};
use sluice_common::{V4, V6};
use sluice_core::image::{
    CLASSES, Dataplane, EntryWrite, FamilyImage, FamilyWrite, Faulty, Image, Memory, PERMITTED,
    Reconciler, SourceKey, Stack, Write, diff, lane, node_port_bit,
};
use sluice_core::model::desired::PortKey;
use sluice_core::model::object::{IpFamily, Protocol};
use sluice_core::model::policy::Policies;
use sluice_core::model::{Batch, Desired, DesiredBackend, DesiredPort, FrontendKind, ObjectName};
use sluice_core::plan::{Plan, Sizes};

/// Prints a failure's seed instead of keeping it in a file.
fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

/// Checks that whatever a packet may find leads on.
fn nothing_dangles(image: &Image) -> Result<(), String> {
    family_is_sound::<V4>(image)?;
    family_is_sound::<V6>(image)?;
    let mut ranges: BTreeMap<u32, u32> = BTreeMap::new();
    for (id, port) in &image.ports {
        for range in port.ranges.map(Range).into_iter().filter(|range| range.size() != 0) {
            let slots =
                image.slots.get(&range.start()).ok_or(format!("port {id} leads to no slots"))?;
            if slots.len() as u32 != range.size() {
                return Err(format!(
                    "range of port {id} has {} slots, not {}",
                    slots.len(),
                    range.size()
                ));
            }
            if range.start() % 16 != 0 {
                return Err(format!("range {} begins within a block", range.start()));
            }
            let _ = ranges.insert(range.start(), range.start() + range.size());
            let version = image.names.get(id).ok_or(format!("port {id} has no name"))?.family;
            let sound = slots.iter().all(|slot| match version {
                4 => is_live::<V4>(image, *slot, *id),
                _ => is_live::<V6>(image, *slot, *id),
            });
            if !sound {
                return Err(format!(
                    "a slot of port {id} names a backend that is not its own, alive and listed"
                ));
            }
        }
    }
    let mut end = 0;
    for (start, next) in ranges {
        if start < end {
            return Err(format!("ranges overlap at {start}"));
        }
        end = next;
    }
    Ok(())
}

fn is_live<F: Stack>(image: &Image, id: u32, port: u32) -> bool {
    F::of(image).backends.get(&id).is_some_and(|found| {
        found.service_port == port
            && found.is_serving()
            && image.listing::<F>(&found.address) & listing::BACKEND != 0
    })
}

fn family_is_sound<F: Stack>(image: &Image) -> Result<(), String> {
    for (key, service) in &F::of(image).services {
        if service.kind == frontend::NODE_PORT {
            if !image.is_node_port(key.port) {
                return Err(format!("{key:?} has no bit"));
            }
        } else if image.listing::<F>(&key.address) & listing::FRONTEND == 0 {
            return Err(format!("{key:?} is not listed"));
        }
        if service.kind == frontend::ADDRESS {
            continue;
        }
        let name =
            image.names.get(&service.service_port).ok_or(format!("{key:?} leads nowhere"))?;
        if name.family != F::VERSION || !image.ports.contains_key(&service.service_port) {
            return Err(format!("{key:?} leads to a port of another family, or none"));
        }
    }
    for (address, node) in &F::of(image).node_addresses {
        if node.serves_node_ports() && image.listing::<F>(address) & listing::NODE_PORTS == 0 {
            return Err(format!("{address:?} serves node ports and is not listed for it"));
        }
    }
    Ok(())
}

/// Reports whether each frontend that is restricted to some sources has at least one, at every
/// moment.
fn sources_are_let_in(image: &Image) -> bool {
    image.ports.iter().filter(|(_, port)| port.restricts_sources()).all(|(id, _)| {
        image.v4.source_ranges.keys().any(|key| key.service_port == *id)
            || image.v6.source_ranges.keys().any(|key| key.service_port == *id)
    })
}

/// Carries out writes one by one and checks the maps in between.
fn carry_out(image: &mut Image, writes: &[Write]) -> Result<(), TestCaseError> {
    for (index, write) in writes.iter().enumerate() {
        image.apply(write);
        if let Err(why) = nothing_dangles(image) {
            let before = writes.get(..=index).unwrap_or_default();
            return Err(TestCaseError::fail(format!("{why}\nafter {before:#?}")));
        }
    }
    Ok(())
}

// --- images ---------------------------------------------------------------------------------

/// A service port of a random image: its id, name and backends, and the place of its ranges.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is drawn by itself")]
struct RandomPort {
    name: u8,
    v6: bool,
    number: u16,
    backends: BTreeMap<u8, (u8, u16, bool)>,
    blocks: [u8; 2],
    sizes: [u8; 2],
    split: bool,
    drops: bool,
    affinity_seconds: u32,
    external_local: bool,
    sources: BTreeMap<u8, u8>,
    /// Number of an address or of a node port, and a kind.
    frontends: Vec<(u8, u32)>,
}

fn random_port() -> impl Strategy<Value = RandomPort> {
    (
        (0..4_u8, any::<bool>(), 80..82_u16),
        btree_map(1..10_u8, (0..6_u8, 1..3_u16, any::<bool>()), 0..4),
        ([0..6_u8, 0..6_u8], [0..40_u8, 0..40_u8], any::<bool>()),
        (any::<bool>(), 0..2_u32, any::<bool>(), btree_map(0..3_u8, 30..33_u8, 0..3)),
        vec((0..4_u8, frontend::CLUSTER_IP..=frontend::ADDRESS), 0..4),
    )
        .prop_map(
            |(
                (name, v6, number),
                backends,
                (blocks, sizes, split),
                (drops, affinity_seconds, external_local, sources),
                frontends,
            )| RandomPort {
                name,
                v6,
                number,
                backends,
                blocks,
                sizes,
                split,
                drops,
                affinity_seconds,
                external_local,
                sources,
                frontends,
            },
        )
}

/// Returns a valid image with so few ids and blocks that two images conflict.
fn random_image() -> impl Strategy<Value = Image> {
    let nodes = btree_map(0..4_u8, any::<bool>(), 0..3);
    (btree_map(1..5_u32, random_port(), 0..4), btree_map(0..9_u32, 1..8_u8, 0..3), nodes).prop_map(
        |(ports, lanes, nodes)| {
            let mut image = Image { lanes, ..Image::default() };
            let mut blocks = BTreeSet::new();
            for (id, port) in ports {
                let mut name = Name {
                    namespace: [0; NAME_MAX],
                    service: [0; NAME_MAX],
                    port: [0; NAME_MAX],
                    number: port.number,
                    protocol: 6,
                    family: if port.v6 { 6 } else { 4 },
                };
                name.service[0] = port.name;
                let _ = image.names.insert(id, name);
                let (mut v4, mut v6) = (BTreeMap::new(), BTreeMap::new());
                std::mem::swap(&mut v4, &mut image.v4.backends);
                std::mem::swap(&mut v6, &mut image.v6.backends);
                let live = if port.v6 {
                    fill_family::<V6>(&mut image.v6, &mut v6, id, &port, |a| {
                        IpAddr::V6(Ipv6Addr::from([
                            0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a,
                        ]))
                    })
                } else {
                    fill_family::<V4>(&mut image.v4, &mut v4, id, &port, |a| {
                        IpAddr::V4(Ipv4Addr::new(10, 0, 0, a))
                    })
                };
                image.v4.backends = v4;
                image.v6.backends = v6;
                let mut ranges = [Range(0); 2];
                if !live.is_empty() {
                    for ((range, block), size) in ranges.iter_mut().zip(port.blocks).zip(port.sizes)
                    {
                        let taken: BTreeSet<u32> = (0..u32::from(size).div_ceil(16))
                            .map(|more| u32::from(block) + more)
                            .collect();
                        if size == 0 || !blocks.is_disjoint(&taken) {
                            continue;
                        }
                        blocks.extend(taken);
                        let start = u32::from(block) * 16;
                        *range = Range::new(start, u16::from(size));
                        let slots =
                            (0..usize::from(size)).map(|slot| live[slot % live.len()]).collect();
                        let _ = image.slots.insert(start, slots);
                    }
                }
                if !port.split {
                    if ranges[1].size() != 0 {
                        let _ = image.slots.remove(&ranges[1].start());
                    }
                    ranges[1] = ranges[0];
                }
                let none = if port.drops { Range::DROP } else { Range(0) };
                let ranges = [ranges[0], ranges[1], ranges[1]];
                let ranges = ranges.map(|range| if range.size() == 0 { none.0 } else { range.0 });
                let affinity_seconds = port.affinity_seconds;
                let flags = (u32::from(!port.sources.is_empty()) * policy::SOURCE_RANGES)
                    | (u32::from(port.external_local) * policy::EXTERNAL_LOCAL);
                let _ = image.ports.insert(id, ServicePort { ranges, affinity_seconds, flags });
                for (network, length) in port.sources {
                    if port.v6 {
                        insert_source::<V6>(
                            &mut image.v6,
                            id,
                            address(IpFamily::V6, 7, network),
                            length,
                        );
                    } else {
                        insert_source::<V4>(
                            &mut image.v4,
                            id,
                            address(IpFamily::V4, 7, network),
                            length,
                        );
                    }
                }
            }
            for (low, serves) in nodes {
                let node = NodeAddress { flags: u32::from(serves) * node_address::NODE_PORTS };
                for family in IpFamily::ALL {
                    match address(family, 9, low) {
                        IpAddr::V4(address) => {
                            let _ = image.v4.node_addresses.insert(address.into(), node);
                        }
                        IpAddr::V6(address) => {
                            let _ = image.v6.node_addresses.insert(address.into(), node);
                        }
                    }
                }
            }
            list_all::<V4>(&mut image);
            list_all::<V6>(&mut image);
            // Of two ports with one name a plan keeps only the first; images may have both.
            image
        },
    )
}

fn fill_family<F: Stack>(
    maps: &mut FamilyImage<F>,
    backends: &mut BTreeMap<u32, Backend<F::Address>>,
    id: u32,
    port: &RandomPort,
    address: impl Fn(u8) -> IpAddr,
) -> Vec<u32> {
    let mut live = Vec::new();
    for (backend_id, (at, generation, serving)) in &port.backends {
        let Some(address) = F::address(address(*at)) else { continue };
        let backend_id = u32::from(*backend_id);
        if backends.contains_key(&backend_id) {
            continue;
        }
        let flags = u32::from(*serving) * backend::SERVING;
        let generation = *generation;
        let _ = backends
            .insert(backend_id, Backend { address, port: 80, generation, service_port: id, flags });
        if *serving {
            live.push(backend_id);
        }
    }
    for (at, kind) in &port.frontends {
        let Some(address) = F::address(address(100 + at)) else { continue };
        let (address, number, protocol, service_port) = match *kind {
            frontend::NODE_PORT => (F::Address::default(), 30_000 + u16::from(*at), 6, id),
            frontend::ADDRESS => (address, 0, 0, 0),
            _ => (address, port.number, 6, id),
        };
        let key = ServiceKey { address, port: number, protocol, reserved: 0 };
        let _ = maps.services.insert(key, Service { service_port, kind: *kind });
    }
    live
}

fn insert_source<F: Stack>(
    maps: &mut FamilyImage<F>,
    service_port: u32,
    network: IpAddr,
    length: u8,
) {
    let Some(network) = F::address(network) else { return };
    let _ = maps.source_ranges.insert(SourceKey { service_port, length, network }, PERMITTED);
}

fn list_all<F: Stack>(image: &mut Image) {
    let ports: Vec<u16> = F::of(image)
        .services
        .iter()
        .filter(|(_, service)| service.kind == frontend::NODE_PORT)
        .map(|(key, _)| key.port)
        .collect();
    for (word, bit) in ports.into_iter().map(node_port_bit) {
        *image.node_ports.entry(word).or_default() |= bit;
    }
    let node = |(address, node): (&F::Address, &NodeAddress)| {
        let serves = node.serves_node_ports();
        (lane::<F>(address), listing::NODE | if serves { listing::NODE_PORTS } else { 0 })
    };
    let bits: Vec<(u32, u8)> = F::of(image)
        .services
        .iter()
        .filter(|(_, service)| service.kind != frontend::NODE_PORT)
        .map(|(key, _)| (lane::<F>(&key.address), listing::FRONTEND))
        .chain(F::of(image).node_addresses.iter().map(node))
        .chain(
            F::of(image)
                .backends
                .values()
                .map(|backend| (lane::<F>(&backend.address), listing::BACKEND)),
        )
        .collect();
    for (lane, bits) in bits {
        *image.lanes.entry(lane).or_default() |= bits;
    }
}

proptest! {
    #![proptest_config(config(1_000))]

    #[test]
    fn a_diff_leads_from_any_image_to_any_other_and_nothing_dangles_on_the_way(
        a in random_image(), b in random_image(),
    ) {
        prop_assert_eq!(nothing_dangles(&a), Ok(()));
        prop_assert_eq!(nothing_dangles(&b), Ok(()));
        let writes = diff(&a, &b);
        let mut image = a.clone();
        for write in &writes {
            carry_out(&mut image, std::slice::from_ref(write))?;
            prop_assert!(sources_are_let_in(&image), "nobody is let in after {write:?}");
        }
        prop_assert_eq!(&image, &b);
        prop_assert_eq!(diff(&b, &b), vec![]);
        prop_assert_eq!(writes.is_empty(), a == b);
    }

    #[test]
    fn a_write_may_be_repeated(a in random_image(), b in random_image()) {
        let mut image = a.clone();
        for write in diff(&a, &b) {
            image.apply(&write);
            let once = image.clone();
            image.apply(&write);
            prop_assert_eq!(&image, &once);
        }
    }
}

// --- plans ----------------------------------------------------------------------------------

/// The parameters of one random Service: per family, which of few frontends and endpoints it has.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is drawn by itself")]
struct Wish {
    v4: bool,
    v6: bool,
    number: u16,
    load_balancer: bool,
    /// Whether it has a node port of its own.
    node_port: bool,
    drops: bool,
    affinity_seconds: u32,
    external_local: bool,
    sources: BTreeSet<u8>,
    /// Endpoint -> (selected for inside and outside clients, local).
    endpoints: BTreeMap<u8, (bool, bool, bool)>,
}

fn wish() -> impl Strategy<Value = Wish> {
    (
        any::<[bool; 6]>(),
        (80..82_u16, 0..3_u32, prop::collection::btree_set(0..5_u8, 0..3)),
        btree_map(
            1..24_u8,
            (prop::bool::weighted(0.8), prop::bool::weighted(0.7), any::<bool>()),
            0..12,
        ),
        prop::bool::weighted(0.9),
    )
        .prop_map(|(switches, (number, affinity_seconds, sources), mut endpoints, alike)| {
            let [v4, v6, load_balancer, node_port, drops, external_local] = switches;
            if alike {
                for (inside, outside, _) in endpoints.values_mut() {
                    *outside = *inside;
                }
            }
            Wish {
                v4,
                v6,
                number,
                load_balancer,
                node_port,
                drops,
                affinity_seconds,
                external_local,
                sources,
                endpoints,
            }
        })
}

fn service(index: u8) -> ObjectName {
    ObjectName::new("ns", &format!("service-{index}"))
}

fn address(family: IpFamily, high: u8, low: u8) -> IpAddr {
    match family {
        IpFamily::V4 => IpAddr::from([10, high, 0, low]),
        IpFamily::V6 => IpAddr::from([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, high, 0, low]),
    }
}

fn desired(index: u8, wish: &Wish) -> Desired {
    let mut desired = Desired::default();
    for (family, wanted) in [(IpFamily::V4, wish.v4), (IpFamily::V6, wish.v6)] {
        if !wanted {
            continue;
        }
        let key = PortKey {
            service: service(index),
            port: "web".into(),
            protocol: Protocol::Tcp,
            family,
        };
        let external_local = wish.external_local;
        let mut port = DesiredPort {
            number: wish.number,
            affinity_seconds: wish.affinity_seconds,
            policies: Policies { external_local, external: true, ..Policies::default() },
            ..DesiredPort::default()
        };
        let cluster_ip = address(family, 200, index);
        let _ = port.frontends.insert((cluster_ip, wish.number), FrontendKind::ClusterIp);
        let _ = desired.addresses.insert(cluster_ip);
        // An address that all Services share.
        let _ = desired.addresses.insert(address(family, 202, 0));
        if wish.load_balancer {
            let at = (address(family, 201, index), wish.number);
            let _ = port.frontends.insert(at, FrontendKind::LoadBalancer);
        }
        if wish.node_port {
            let at = (family.unspecified(), 30_000 + u16::from(index));
            let _ = port.frontends.insert(at, FrontendKind::NodePort);
        }
        if !wish.sources.is_empty() {
            let range = |low: &u8| {
                IpNet::new(address(family, 203, *low), 31)
                    .expect("a length of both families")
                    .trunc()
            };
            port.sources = Some(wish.sources.iter().map(range).collect());
        }
        for (low, (inside, outside, local)) in &wish.endpoints {
            let want = DesiredBackend {
                selected: [*inside, *inside, *outside],
                local: *local,
                host: low % 7 == 0,
            };
            let _ = port.backends.insert((address(family, 1, *low), 8080), want);
        }
        port.drops = [0, 1, 2].map(|class| {
            wish.drops && !port.backends.values().any(|backend| backend.selected[class])
        });
        let _ = desired.ports.insert(key, port);
    }
    desired
}

/// Rounds of changes to few Services.
fn rounds() -> impl Strategy<Value = Vec<BTreeMap<u8, Wish>>> {
    vec(btree_map(0..5_u8, wish(), 1..4), 1..12)
}

/// Returns the content of maps without ids, which is all that a client can observe.
fn content(image: &Image) -> BTreeMap<String, Vec<String>> {
    fn of<F: Stack>(image: &Image, content: &mut BTreeMap<String, Vec<String>>) {
        for (key, service) in &F::of(image).services {
            if service.kind == frontend::ADDRESS {
                let _ = content.insert(format!("{} rejects", F::ip(key.address)), vec![]);
                continue;
            }
            let port = image.ports[&service.service_port];
            let sources: Vec<String> = F::of(image)
                .source_ranges
                .keys()
                .filter(|key| key.service_port == service.service_port)
                .map(|key| format!("{}/{}", F::ip(key.network), key.length))
                .collect();
            let policies = format!("{} {} {sources:?}", port.affinity_seconds, port.flags);
            for class in CLASSES {
                let range = Range(port.ranges[class as usize]);
                let slots = image.slots.get(&range.start()).filter(|_| range.size() != 0);
                let backends = slots.into_iter().flatten().map(|id| {
                    let Backend { address, port, flags, .. } = F::of(image).backends[id];
                    format!("{}:{port} {flags}", F::ip(address))
                });
                let kind = service.kind;
                let _ = content.insert(
                    format!(
                        "{} {} {class:?} {kind} {policies} {}",
                        F::ip(key.address),
                        key.port,
                        range.drops()
                    ),
                    backends.collect(),
                );
            }
        }
        for (key, origins) in &F::of(image).origins {
            let _ = content.insert(format!("origins {key:?}"), vec![format!("{origins:?}")]);
        }
    }
    let mut all = BTreeMap::new();
    of::<V4>(image, &mut all);
    of::<V6>(image, &mut all);
    all
}

fn batch(complete: bool, wishes: &BTreeMap<u8, Wish>) -> Batch {
    Batch {
        complete,
        services: wishes
            .iter()
            .map(|(index, wish)| (service(*index), desired(*index, wish)))
            .collect(),
    }
}

/// Returns the service ports that have backends, with the class.
fn with_backends(image: &Image) -> BTreeSet<(u32, usize)> {
    let served = |(id, port): (&u32, &ServicePort)| {
        let id = *id;
        let ranges = port.ranges;
        (0..3).filter(move |class| Range(ranges[*class]).size() != 0).map(move |class| (id, class))
    };
    image.ports.iter().flat_map(served).collect()
}

/// Returns sizes with so few slots that tables must shrink and Services be refused.
fn narrow() -> Sizes {
    Sizes {
        ports: 6,
        backends: 40,
        services: 16,
        slot_blocks: 40,
        reserve_blocks: 12,
        source_ranges: 4,
        ..Sizes::default()
    }
}

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn an_update_with_room_never_removes_all_backends_and_its_result_does_not_depend_on_history(rounds in rounds()) {
        let mut plan = Plan::new(Sizes::default());
        let mut maps = Image::default();
        let mut last = BTreeMap::new();
        for (index, round) in rounds.iter().enumerate() {
            last.extend(round.clone());
            let update = plan.update(&batch(index == 0, round));
            let before = with_backends(&maps);
            let mut kept = before.clone();
            for write in &update.writes {
                maps.apply(write);
                prop_assert_eq!(nothing_dangles(&maps), Ok(()));
                prop_assert!(sources_are_let_in(&maps), "nobody is let in after {write:?}");
                let now = with_backends(&maps);
                kept.retain(|port| now.contains(port));
            }
            prop_assert_eq!(&maps, plan.image());
            let still = with_backends(&maps);
            let both: BTreeSet<_> = before.intersection(&still).copied().collect();
            prop_assert!(kept.is_superset(&both), "a service port had no backends for a moment");
            prop_assert!(update.notes.values().all(Vec::is_empty), "{:?}", update.notes);
        }
        let mut fresh = Plan::new(Sizes::default());
        let _ = fresh.update(&batch(true, &last));
        prop_assert_eq!(content(plan.image()), content(fresh.image()));
        for (word, bits) in &fresh.image().node_ports {
            prop_assert_eq!(plan.image().node_ports.get(word).copied().unwrap_or(0) & bits, *bits);
        }
        for (lane, bits) in &fresh.image().lanes {
            prop_assert_eq!(plan.image().lanes.get(lane).copied().unwrap_or(0) & bits, *bits);
        }
    }

    #[test]
    fn an_update_without_room_leaves_nothing_dangling_and_recovers(rounds in rounds()) {
        let mut plan = Plan::new(narrow());
        let mut maps = Image::default();
        let mut known = BTreeSet::new();
        for (index, round) in rounds.iter().enumerate() {
            known.extend(round.keys().copied());
            let update = plan.update(&batch(index == 0, round));
            carry_out(&mut maps, &update.writes)?;
            prop_assert_eq!(&maps, plan.image());
            for (start, slots) in &maps.slots {
                prop_assert!(start + slots.len() as u32 <= 40 * 16);
            }
            prop_assert!(maps.v4.services.len() <= 16 && maps.names.len() < 6);
        }
        // When all Services but one go, it has all the room that it wants.
        let keep = *known.first().unwrap_or(&0);
        let wish = simple(&[1, 2]);
        let gone = Batch { complete: false, services: known.iter().filter(|index| **index != keep).map(|index| (service(*index), Desired::default())).collect() };
        carry_out(&mut maps, &plan.update(&gone).writes)?;
        let last: BTreeMap<u8, Wish> = [(keep, wish)].into();
        let update = plan.update(&batch(false, &last));
        carry_out(&mut maps, &update.writes)?;
        prop_assert!(update.notes.values().all(Vec::is_empty), "{:?}", update.notes);
        let mut fresh = Plan::new(narrow());
        let _ = fresh.update(&batch(true, &last));
        prop_assert_eq!(content(plan.image()), content(fresh.image()));
    }

    #[test]
    fn a_new_agent_keeps_what_the_maps_hold(rounds in rounds(), cut in any::<prop::sample::Index>()) {
        let mut plan = Plan::new(Sizes::default());
        let mut wishes = BTreeMap::new();
        for (index, round) in rounds.iter().enumerate() {
            wishes.extend(round.clone());
            let _ = plan.update(&batch(index == 0, round));
        }
        let mut next = Plan::adopt(Sizes::default(), plan.image().clone());
        let update = next.update(&batch(true, &wishes));
        let only_bits = update.writes.iter().all(|write| matches!(write, Write::Listing { .. } | Write::Grace));
        prop_assert!(only_bits, "{:#?}", update.writes);
        prop_assert_eq!(content(next.image()), content(plan.image()));

        // It is killed in the middle of an update, with a Service gone meanwhile.
        let gone = wishes.keys().next().copied();
        let mut later = plan.clone();
        let removal = Batch { complete: false, services: gone.map(|index| (service(index), Desired::default())).into_iter().collect() };
        let writes = later.update(&removal).writes;
        let mut maps = Memory { image: plan.image().clone() };
        if !writes.is_empty() {
            for write in &writes[..cut.index(writes.len())] {
                maps.image.apply(write);
            }
        }
        if let Some(index) = gone {
            let _ = wishes.remove(&index);
        }
        let read = maps.read().expect("memory can be read");
        let mut next = Plan::adopt(Sizes::default(), read.clone());
        let mut image = read;
        carry_out(&mut image, &next.update(&batch(true, &wishes)).writes)?;
        prop_assert_eq!(&image, next.image());
        prop_assert_eq!(content(&image), content(later.image()));
    }

    #[test]
    fn any_maps_can_be_adopted(image in random_image(), round in btree_map(0..5_u8, wish(), 1..4)) {
        let mut plan = Plan::adopt(Sizes::default(), image.clone());
        let mut maps = image;
        carry_out(&mut maps, &plan.set_node_addresses(BTreeMap::new()))?;
        carry_out(&mut maps, &plan.update(&batch(true, &round)).writes)?;
        prop_assert_eq!(&maps, plan.image());
        let mut fresh = Plan::new(Sizes::default());
        let _ = fresh.update(&batch(true, &round));
        prop_assert_eq!(content(&maps), content(fresh.image()));
    }

    #[test]
    fn failed_writes_leave_the_last_good_state_and_are_repeated(rounds in rounds(), seed in any::<u64>()) {
        let mut plan = Plan::new(Sizes::default());
        let mut reconciler = Reconciler::new(Faulty::new(Memory::default(), 60, seed));
        for (index, round) in rounds.iter().enumerate() {
            reconciler.push(plan.update(&batch(index == 0, round)).writes);
            let _ = reconciler.run();
            prop_assert_eq!(nothing_dangles(&reconciler.dataplane.read().expect("memory can be read")), Ok(()));
        }
        if seed % 2 == 0 {
            reconciler.resync(plan.image()).expect("memory can be read");
        }
        for _ in 0..10_000 {
            if reconciler.run().is_ok() {
                break;
            }
            prop_assert_eq!(nothing_dangles(&reconciler.dataplane.read().expect("memory can be read")), Ok(()));
        }
        prop_assert_eq!(reconciler.due(), 0);
        prop_assert_eq!(&reconciler.dataplane.read().expect("memory can be read"), plan.image());
    }
}

#[test]
fn a_backend_that_returns_has_its_id_and_generation_and_one_that_leaves_stops_serving() {
    let with = |endpoints: &[u8]| -> BTreeMap<u8, Wish> { [(0, simple(endpoints))].into() };
    let mut plan = Plan::new(Sizes::default());
    let _ = plan.update(&batch(true, &with(&[1, 2])));
    let before = plan.image().clone();
    let update = plan.update(&batch(false, &with(&[2])));
    let left: Vec<_> =
        plan.image().v4.backends.iter().filter(|(_, backend)| backend.flags == 0).collect();
    assert_eq!(left.len(), 1);
    let place =
        |wanted: &dyn Fn(&Write) -> bool| update.writes.iter().position(wanted).expect("written");
    let flip = place(&|write| matches!(write, Write::Range { .. }));
    let stops =
        place(&|write| matches!(write, Write::V4(FamilyWrite::BackendFlags { flags: 0, .. })));
    let grace = place(&|write| *write == Write::Grace);
    let clear = place(&|write| matches!(write, Write::ClearSlots { .. }));
    assert!(flip < stops && stops < grace && grace < clear);
    let _ = plan.update(&batch(false, &with(&[1, 2])));
    assert_eq!(plan.image().v4.backends, before.v4.backends);
}

/// Returns a Service with IPv4 endpoints for all classes alike.
fn simple(endpoints: &[u8]) -> Wish {
    let endpoints = endpoints.iter().map(|low| (*low, (true, true, false))).collect();
    Wish {
        v4: true,
        v6: false,
        number: 80,
        load_balancer: false,
        node_port: false,
        drops: false,
        affinity_seconds: 0,
        external_local: false,
        sources: BTreeSet::new(),
        endpoints,
    }
}

#[test]
fn when_the_arena_is_full_updates_take_the_reserve_and_new_services_wait() {
    // There is room for two tables of four blocks, and one more in reserve.
    let sizes = Sizes { slot_blocks: 12, reserve_blocks: 4, ..Sizes::default() };
    let mut plan = Plan::new(sizes);
    let first: BTreeMap<u8, Wish> = [(0, simple(&[1])), (1, simple(&[2]))].into();
    assert!(plan.update(&batch(true, &first)).notes.values().all(Vec::is_empty));

    let refused = plan.update(&batch(false, &[(2, simple(&[3]))].into()));
    assert_eq!(refused.writes, []);
    assert_eq!(refused.notes[&service(2)].len(), 1, "{:?}", refused.notes);

    let updated = plan.update(&batch(false, &[(0, simple(&[1, 4]))].into()));
    assert_eq!(updated.notes[&service(0)], [], "an update never fails for room");
    assert_eq!(plan.image().v4.services.len(), 7, "what it freed goes to the one that waits");

    // The arena and its reserve are full: the table is overwritten, and the service port is parked
    // meanwhile.
    let again = plan.update(&batch(false, &[(1, simple(&[2, 5]))].into()));
    assert_eq!(again.notes[&service(1)], []);
    let mut fresh = Plan::new(Sizes::default());
    let _ = fresh.update(&batch(
        true,
        &[(0, simple(&[1, 4])), (1, simple(&[2, 5])), (2, simple(&[3]))].into(),
    ));
    assert_eq!(content(plan.image()), content(fresh.image()));
}

#[test]
fn classes_with_the_same_backends_share_a_range() {
    let mut plan = Plan::new(Sizes::default());
    let _ = plan.update(&batch(true, &[(0, simple(&[1, 2]))].into()));
    assert_eq!(plan.image().slots.len(), 1);
    let mut wish = simple(&[1, 2]);
    let _ = wish.endpoints.insert(3, (true, false, false));
    let _ = plan.update(&batch(false, &[(0, wish)].into()));
    let port = plan.image().ports.values().next().expect("one");
    assert_eq!(plan.image().slots.len(), 2);
    assert_eq!(port.ranges[0], port.ranges[1]);
    assert_ne!(port.ranges[1], port.ranges[2]);
}

/// Returns the index of the first write of a kind in an update.
fn place(update: &[Write], wanted: impl Fn(&Write) -> bool) -> usize {
    update.iter().position(wanted).unwrap_or_else(|| panic!("not among {update:#?}"))
}

#[test]
fn clients_keep_their_source_only_while_their_range_is_local() {
    let cluster: BTreeMap<u8, Wish> = [(0, simple(&[1, 2]))].into();
    let endpoints = [(1, (true, true, true)), (2, (true, false, false))].into();
    let local = [(0, Wish { external_local: true, endpoints, ..simple(&[]) })].into();
    let mut plan = Plan::new(Sizes::default());
    let _ = plan.update(&batch(true, &cluster));
    let outside = |write: &Write| {
        matches!(write, Write::Range { class: sluice_common::abi::Class::ExternalOutside, .. })
    };
    let flags = |write: &Write| matches!(write, Write::Port { .. });
    let closes = plan.update(&batch(false, &local)).writes;
    assert!(place(&closes, outside) < place(&closes, flags));
    let opens = plan.update(&batch(false, &cluster)).writes;
    assert!(place(&opens, flags) < place(&opens, outside));
}

#[test]
fn sources_that_may_not_use_a_frontend_never_reach_it() {
    let plain: BTreeMap<u8, Wish> = [(0, simple(&[1]))].into();
    let restricted =
        [(0, Wish { load_balancer: true, sources: [1, 3].into(), ..simple(&[1]) })].into();
    let mut plan = Plan::new(Sizes::default());
    let _ = plan.update(&batch(true, &plain));
    let flags = |write: &Write| matches!(write, Write::Port { .. });
    let comes = plan.update(&batch(false, &restricted)).writes;
    let lets_in = place(&comes, |write| {
        matches!(write, Write::V4(FamilyWrite::SourceRanges(EntryWrite::Insert { .. })))
    });
    let appears = place(&comes, |write| {
        matches!(write, Write::V4(FamilyWrite::Services(EntryWrite::Insert { .. })))
    });
    assert!(lets_in < place(&comes, flags) && place(&comes, flags) < appears);
    let goes = plan.update(&batch(false, &plain)).writes;
    let disappears = place(&goes, |write| {
        matches!(write, Write::V4(FamilyWrite::Services(EntryWrite::Remove { .. })))
    });
    let grace = place(&goes, |write| *write == Write::Grace);
    let forgets = place(&goes, |write| {
        matches!(write, Write::V4(FamilyWrite::SourceRanges(EntryWrite::Remove { .. })))
    });
    assert!(disappears < place(&goes, flags) && place(&goes, flags) < grace && grace < forgets);
}

#[test]
fn node_addresses_are_listed_and_those_with_node_ports_are_kept_when_room_is_short() {
    let addresses: BTreeMap<IpAddr, bool> =
        (1..=4).map(|low| (address(IpFamily::V4, 9, low), low > 2)).collect();
    let mut plan = Plan::new(Sizes { node_addresses: 3, ..Sizes::default() });
    let mut image = Image::default();
    let mut set = |addresses: BTreeMap<IpAddr, bool>| {
        for write in plan.set_node_addresses(addresses) {
            image.apply(&write);
        }
        assert_eq!(&image, plan.image());
        let listed = (1..=4).map(|low| image.listing::<V4>(&Ipv4Addr::new(10, 9, 0, low).into()));
        let flags: Vec<u32> = image.v4.node_addresses.values().map(|node| node.flags).collect();
        (listed.collect::<Vec<u8>>(), flags)
    };
    let both = listing::NODE | listing::NODE_PORTS;
    assert_eq!(set(addresses), (vec![listing::NODE, listing::NODE, both, both], vec![0, 1, 1]));
    let fewer = (2..=3).map(|low| (address(IpFamily::V4, 9, low), low == 2)).collect();
    assert_eq!(set(fewer), (vec![0, both, listing::NODE, 0], vec![1, 0]));
    assert_eq!(set(BTreeMap::new()), (vec![0; 4], vec![]));
}

#[test]
fn the_work_of_a_change_does_not_grow_with_the_cluster() {
    let wish = |count: u8| simple(&(1..=count).collect::<Vec<u8>>());
    let writes = |services: u8| {
        let mut plan = Plan::new(Sizes::default());
        let all: BTreeMap<u8, Wish> = (0..services).map(|index| (index, wish(5))).collect();
        let _ = plan.update(&batch(true, &all));
        plan.update(&batch(false, &[(0, wish(4))].into())).writes.len()
    };
    // All Services share endpoints here, so that the deleted one's reverse frontends change but do
    // not go.
    assert!(writes(250) <= writes(2) + 1);
}

// --- Maglev ---------------------------------------------------------------------------------

fn table(endpoints: &[(u32, u16)], size: u32) -> Vec<(u32, u16)> {
    let mut turns: Vec<Turn> = endpoints
        .iter()
        .enumerate()
        .map(|(index, (address, port))| {
            Turn::new::<V4>(&Ipv4Addr::from(*address).into(), *port, index as u32 + 1)
        })
        .collect();
    let mut slots = vec![0; size as usize];
    maglev::fill(&mut turns, &mut slots);
    slots.iter().map(|id| endpoints[*id as usize - 1]).collect()
}

fn shares(table: &[(u32, u16)]) -> BTreeMap<(u32, u16), u32> {
    let mut shares = BTreeMap::new();
    for endpoint in table {
        *shares.entry(*endpoint).or_default() += 1;
    }
    shares
}

/// Returns neighbouring addresses, as pods have them.
fn endpoints() -> impl Strategy<Value = Vec<(u32, u16)>> {
    (any::<u32>(), 1..400_usize, 1..u16::MAX).prop_map(|(base, count, port)| {
        (0..count as u32).map(|offset| (base.wrapping_add(offset * 3), port)).collect()
    })
}

proptest! {
    #![proptest_config(config(100))]

    #[test]
    fn shares_differ_by_one_slot_at_most(endpoints in endpoints()) {
        let size = maglev::size(endpoints.len() as u32);
        prop_assert!(size >= 16 * endpoints.len() as u32 && size >= 61);
        let shares = shares(&table(&endpoints, size));
        prop_assert_eq!(shares.len(), endpoints.len());
        let (least, most) = (shares.values().min().copied().unwrap_or(0), shares.values().max().copied().unwrap_or(0));
        prop_assert!(most - least <= 1 && f64::from(most) / f64::from(least) <= 1.2);
    }

    #[test]
    fn the_order_of_backends_does_not_matter(endpoints in endpoints(), seed in any::<u64>()) {
        let size = maglev::size(endpoints.len() as u32);
        let mut shuffled = endpoints.clone();
        shuffled.sort_by_key(|(address, _)| u64::from(*address).wrapping_mul(seed | 1));
        prop_assert_eq!(table(&endpoints, size), table(&shuffled, size));
    }

    #[test]
    fn a_backend_that_leaves_moves_few_slots_of_others(endpoints in endpoints(), gone in any::<prop::sample::Index>()) {
        prop_assume!(endpoints.len() > 1);
        let size = maglev::size(endpoints.len() as u32);
        let gone = gone.get(&endpoints);
        let rest: Vec<(u32, u16)> = endpoints.iter().filter(|endpoint| *endpoint != gone).copied().collect();
        let (before, after) = (table(&endpoints, size), table(&rest, size));
        let moved = before.iter().zip(&after).filter(|(old, new)| old != new && *old != gone).count();
        prop_assert!(moved <= size as usize / 4, "{moved} of {size}");
    }
}

#[test]
fn on_average_a_departure_moves_a_few_percent() {
    let endpoints: Vec<(u32, u16)> = (0..50).map(|offset| (0x0a00_0001 + offset, 8080)).collect();
    let size = maglev::size(50);
    let before = table(&endpoints, size);
    let mut moved = 0;
    for gone in &endpoints {
        let rest: Vec<(u32, u16)> =
            endpoints.iter().filter(|endpoint| *endpoint != gone).copied().collect();
        let after = table(&rest, size);
        moved += before.iter().zip(&after).filter(|(old, new)| old != new && *old != gone).count();
    }
    assert!(moved < 50 * size as usize * 8 / 100, "{moved} of {} slots", 50 * size);
}

#[test]
fn sizes_are_primes_that_grow_in_few_steps() {
    let sizes: BTreeSet<u32> = (1..5_000).map(maglev::size).collect();
    assert!(sizes.len() <= 21, "{sizes:?}");
    assert_eq!((sizes.first(), sizes.last()), (Some(&maglev::SIZE_MIN), Some(&maglev::SIZE_MAX)));
    for size in &sizes {
        assert!(
            (2..*size)
                .take_while(|divisor| divisor * divisor <= *size)
                .all(|divisor| size % divisor != 0)
        );
    }
    for backends in 1..4_095 {
        assert!(maglev::size(backends) >= 16 * backends);
    }
    let mut size = maglev::SIZE_MAX;
    for expected in sizes.iter().rev().skip(1) {
        size = maglev::smaller(size);
        assert_eq!(size, *expected);
    }
    assert_eq!(maglev::smaller(size), 0);
}
