//! The promised size: 5 000 Services with 250 000 endpoints. Run it optimised:
//! `cargo test --release -p sluice --test unit scale -- --ignored --nocapture`.

use std::fs;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use sluice_core::image::{Dataplane, Memory};
use sluice_core::model::object::{
    Address, Endpoint, IpFamily, PortSpec, ServiceSpec, Slice, SliceKind, SliceLabels, SlicePart,
    SlicePort,
};
use sluice_core::model::{Change, Event, Model, ObjectName, Settings, SourceId};
use sluice_core::plan::{Plan, Sizes};

const SERVICES: u32 = 5_000;
const ENDPOINTS: u32 = 50;

fn ip(base: u32, offset: u32) -> Address {
    Address::Valid(IpAddr::from((base + offset).to_be_bytes()))
}

fn name(index: u32) -> ObjectName {
    ObjectName::new("scale", &format!("service-{index}"))
}

fn service(index: u32) -> Change {
    let port = PortSpec { name: "http".into(), number: 80, protocol: "TCP".into(), node_port: 0 };
    let spec = ServiceSpec {
        cluster_ips: vec![ip(0x0a60_0000, index)],
        ports: vec![port],
        ..ServiceSpec::default()
    };
    Change::Service(name(index), Some(spec))
}

fn slice(index: u32, count: u32, node: &Arc<str>) -> Change {
    let endpoint = |offset| Endpoint {
        address: ip(0x0a80_0000, index * ENDPOINTS + offset),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(node.clone()),
        zones: Box::default(),
        nodes: Box::default(),
    };
    let port = SlicePort { name: "http".into(), number: Some(8080), protocol: "TCP".into() };
    let part = SlicePart { ports: vec![port], endpoints: (0..count).map(endpoint).collect() };
    let slice = Slice {
        service: Some(name(index).name),
        family: Ok(Some(IpFamily::V4)),
        labels: SliceLabels::default(),
        parts: vec![part],
        surplus: 0,
        triggered: None,
    };
    Change::Slice(SliceKind::EndpointSlice, name(index), Some(slice))
}

fn resident_mib() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("a process has memory");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<usize>().ok()).expect("a number")
        / 1_024
}

#[test]
#[ignore = "wants an optimised build"]
fn a_quarter_of_a_million_endpoints() {
    let mut model =
        Model::new(Settings { sources: [SourceId::Kubernetes].into(), ..Settings::default() });
    let mut plan = Plan::new(Sizes::default());
    let mut maps = Memory::default();
    let node: Arc<str> = "node".into();
    let feed = |model: &mut Model, change| {
        model.apply(Event { source: SourceId::Kubernetes, change }, SystemTime::UNIX_EPOCH);
    };
    for index in 0..SERVICES {
        feed(&mut model, service(index));
        feed(&mut model, slice(index, ENDPOINTS, &node));
    }
    feed(&mut model, Change::Synced);
    println!("objects: {} MiB", resident_mib());

    let start = Instant::now();
    let batch = model.take(SystemTime::UNIX_EPOCH).expect("a batch");
    println!("derived in {:?}, {} MiB", start.elapsed(), resident_mib());
    let start = Instant::now();
    let update = plan.update(&batch);
    drop(batch);
    println!(
        "planned in {:?}: {} writes, {} MiB",
        start.elapsed(),
        update.writes.len(),
        resident_mib()
    );
    maps.apply(&update.writes).expect("memory takes all");
    drop(update);
    println!("with the maps' copy {} MiB", resident_mib());

    let mut worst = Duration::ZERO;
    let mut writes = 0;
    for round in 0..1_000 {
        feed(&mut model, slice(round * 5, ENDPOINTS - 1 - round % 2, &node));
        let start = Instant::now();
        let batch = model.take(SystemTime::UNIX_EPOCH).expect("a batch");
        let update = plan.update(&batch);
        worst = worst.max(start.elapsed());
        writes += update.writes.len();
        maps.apply(&update.writes).expect("memory takes all");
    }
    println!("one endpoint changed: at most {worst:?}, {} writes each", writes / 1_000);

    let start = Instant::now();
    let image = maps.read().expect("memory can be read");
    drop(maps);
    let _ = Plan::adopt(Sizes::default(), image);
    println!("adopted in {:?}, {} MiB", start.elapsed(), resident_mib());
    assert!(worst < Duration::from_millis(50));
}

/// There are 53 Services with 100 ports each, all over the same 50 pods: 265 000 backends, more
/// than the maps hold.
#[test]
#[ignore = "wants an optimised build"]
fn the_same_endpoints_behind_thousands_of_service_ports() {
    let mut model =
        Model::new(Settings { sources: [SourceId::Kubernetes].into(), ..Settings::default() });
    let mut plan = Plan::new(Sizes::default());
    let node: Arc<str> = "node".into();
    for index in 0..53 {
        let port = |number: i32| PortSpec {
            name: format!("p{number}").into(),
            number: 1_000 + number,
            protocol: "TCP".into(),
            node_port: 0,
        };
        let spec = ServiceSpec {
            cluster_ips: vec![ip(0x0a60_0000, index)],
            ports: (0..100).map(port).collect(),
            ..ServiceSpec::default()
        };
        let Change::Slice(kind, name, Some(mut slice)) = slice(0, ENDPOINTS, &node) else {
            continue;
        };
        let slice_port = |number: i32| SlicePort {
            name: format!("p{number}").into(),
            number: Some(8_080),
            protocol: "TCP".into(),
        };
        slice.parts[0].ports = (0..100).map(slice_port).collect();
        slice.service = Some(self::name(index).name);
        let slice_name = ObjectName { name: self::name(index).name, ..name };
        for change in [
            Change::Service(self::name(index), Some(spec)),
            Change::Slice(kind, slice_name, Some(slice)),
        ] {
            model.apply(Event { source: SourceId::Kubernetes, change }, SystemTime::UNIX_EPOCH);
        }
    }
    let synced = Event { source: SourceId::Kubernetes, change: Change::Synced };
    model.apply(synced, SystemTime::UNIX_EPOCH);
    let start = Instant::now();
    let batch = model.take(SystemTime::UNIX_EPOCH).expect("a batch");
    println!("derived in {:?}", start.elapsed());
    let start = Instant::now();
    let update = plan.update(&batch);
    let backends = plan.image().v4.backends.len();
    println!(
        "planned in {:?}: {} writes, {backends} backends",
        start.elapsed(),
        update.writes.len()
    );
    let start = Instant::now();
    let _ = Plan::adopt(Sizes::default(), plan.image().clone()).update(&batch);
    println!("adopted in {:?}", start.elapsed());
}
