//! Behaviours as files: manifests in, the maps' content out.
//!
//! A scenario is a text in `scenarios/`: remarks, then sections. `-- file NAME --` writes a
//! manifest, `-- seed NAME --` takes one from `seeds/`, `-- remove NAME --` removes one,
//! `-- options --` holds `node`, `proxy-name`, `interface`, `node-ports` (an interface's address
//! that serves them), `primary`, `external-ips` (`off`, or a range that is allowed) and `leave`,
//! and `-- maps --` is what the maps hold and what is reported once the folder has been read. Ids
//! do not show; for each backend its share of the slots does. Everything runs through the real
//! folder, model and plan into maps in memory.
//!
//! Scenarios with one step run again in other orders of arrival, all at once and one by one, and
//! must come to the same end. `SLUICE_BLESS=1 cargo test` rewrites the expectations.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sluice::daemon::source::manifests::Folder;
use sluice_common::abi::{
    Class, Name, Origins, Range, ServicePort, backend, frontend, listing, policy,
};
use sluice_common::{V4, V6};
use sluice_core::image::{CLASSES, Dataplane, Image, Memory, Stack, diff, node_port_bit};
use sluice_core::model::object::Protocol;
use sluice_core::model::{Change, Event, Model, Settings, SourceId};
use sluice_core::plan::{Plan, Sizes};
use sluice_core::policy::{ExternalIps, cidr};

/// A section's head and body.
type Section = (String, String);

fn sections(text: &str) -> (String, Vec<Section>) {
    let (mut remarks, mut sections) = (String::new(), Vec::<Section>::new());
    for line in text.lines() {
        if let Some(head) = line.strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --")) {
            sections.push((head.to_owned(), String::new()));
            continue;
        }
        let body = sections.last_mut().map_or(&mut remarks, |(_, body)| body);
        body.push_str(line);
        body.push('\n');
    }
    (remarks, sections)
}

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// From changes to maps.
struct Engine {
    model: Model,
    plan: Plan,
    maps: Memory,
}

impl Engine {
    fn new(settings: &Settings, interfaces: &BTreeMap<IpAddr, bool>) -> Self {
        let mut model = Model::new(settings.clone());
        model.set_interfaces(interfaces.clone());
        let mut plan = Plan::new(Sizes::default());
        let mut maps = Memory::default();
        maps.apply(&plan.set_node_addresses(interfaces.clone())).expect("memory takes all");
        Self { model, plan, maps }
    }

    fn feed(&mut self, change: Change) {
        self.model.apply(Event { source: SourceId::Manifests, change }, SystemTime::UNIX_EPOCH);
    }

    fn settle(&mut self) {
        if let Some(batch) = self.model.take(SystemTime::UNIX_EPOCH) {
            let update = self.plan.update(&batch);
            for (service, notes) in update.notes {
                self.model.set_plan_notes(&service, notes, SystemTime::UNIX_EPOCH);
            }
            self.maps.apply(&update.writes).expect("memory takes all");
        }
        assert_eq!(diff(&self.maps.image, self.plan.image()), []);
    }

    fn print(&self, folder: &Path, history: bool) -> String {
        let mut text = String::new();
        print_family::<V4>(&self.maps.image, history, &mut text);
        print_family::<V6>(&self.maps.image, history, &mut text);
        assert_node_ports(&self.maps.image);
        for (service, check) in self.model.health_checks() {
            let _ = writeln!(text, "{service} at {}: healthy through {}", check.port, check.local);
        }
        let mut reports: Vec<String> =
            self.model.reports().iter().map(ToString::to_string).collect();
        reports.sort();
        for report in reports {
            let report = report.replace(&format!("{}/", folder.display()), "");
            let _ = writeln!(text, "! {report}");
        }
        text
    }
}

fn print_family<F: Stack>(image: &Image, history: bool, text: &mut String) {
    let maps = F::of(image);
    let mut printed = BTreeSet::new();
    let (node_ports, vips): (Vec<_>, Vec<_>) =
        maps.services.iter().partition(|(key, _)| F::ip(key.address).is_unspecified());
    for (key, service) in vips.into_iter().chain(node_ports) {
        let vip = SocketAddr::new(F::ip(key.address), key.port);
        let kind = match service.kind {
            frontend::CLUSTER_IP => "ClusterIP",
            frontend::LOAD_BALANCER => "LoadBalancer",
            frontend::EXTERNAL_IP => "ExternalIP",
            frontend::NODE_PORT => "NodePort",
            frontend::ADDRESS => {
                assert_eq!((key.port, key.protocol, service.service_port), (0, 0, 0));
                assert!(
                    image.listing::<F>(&key.address) & listing::FRONTEND != 0,
                    "{vip} is not listed"
                );
                continue;
            }
            _ => "unknown",
        };
        let protocol = Protocol::from_number(key.protocol).expect("a known protocol").word();
        let listed = image.listing::<F>(&key.address) & listing::FRONTEND != 0;
        assert_eq!(listed, kind != "NodePort", "{vip}");
        let name = image.names[&service.service_port];
        let repeated = !printed.insert(service.service_port);
        let _ = writeln!(
            text,
            "{vip} {protocol} {kind} -> {}{}",
            owner(&name),
            if repeated { ", as above" } else { "" }
        );
        if !repeated {
            print_port::<F>(image, service.service_port, history, text);
        }
    }
    let whole = maps.services.iter().filter(|(_, service)| service.kind == frontend::ADDRESS);
    let whole: Vec<String> = whole.map(|(key, _)| F::ip(key.address).to_string()).collect();
    if !whole.is_empty() {
        let _ = writeln!(text, "{} reject other ports", whole.join(" "));
    }
    for (address, node) in &maps.node_addresses {
        let serves = node.serves_node_ports();
        let bits = image.listing::<F>(address);
        assert!(bits & listing::NODE != 0 && (bits & listing::NODE_PORTS != 0 || !serves));
        if serves {
            let _ = writeln!(text, "{} serves node ports", F::ip(*address));
        }
    }
    if maps.origins.len() <= 20 {
        for (key, origins) in &maps.origins {
            let Origins { frontends } = origins;
            let vips: Vec<String> = frontends
                .iter()
                .filter(|origin| origin.port != 0)
                .map(|origin| SocketAddr::new(F::ip(origin.address), origin.port).to_string())
                .collect();
            let protocol = Protocol::from_number(key.protocol).expect("a known protocol").word();
            let endpoint = SocketAddr::new(F::ip(key.address), key.port);
            let _ = writeln!(text, "{endpoint} {protocol} answers for {}", vips.join(" "));
        }
    }
}

/// Checks that a bit is set for the port number of each node port; those of removed node ports
/// linger.
fn assert_node_ports(image: &Image) {
    let v4 = image.v4.services.iter().map(|(key, service)| (key.port, service.kind));
    let v6 = image.v6.services.iter().map(|(key, service)| (key.port, service.kind));
    let mut words: BTreeMap<u32, u64> = BTreeMap::new();
    for (port, _) in v4.chain(v6).filter(|(_, kind)| *kind == frontend::NODE_PORT) {
        let (word, bit) = node_port_bit(port);
        *words.entry(word).or_default() |= bit;
    }
    for (word, bits) in words {
        assert_eq!(image.node_ports.get(&word).copied().unwrap_or(0) & bits, bits, "word {word}");
    }
}

fn owner(name: &Name) -> String {
    let part = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    let port = part(&name.port);
    let port = if port.is_empty() { "unnamed".to_owned() } else { port };
    format!("{}/{} {port}", part(&name.namespace), part(&name.service))
}

fn print_port<F: Stack>(image: &Image, id: u32, history: bool, text: &mut String) {
    let ServicePort { ranges, affinity_seconds, flags } = image.ports[&id];
    let ranges = ranges.map(Range);
    if affinity_seconds != 0 {
        let _ = writeln!(text, "  affinity {affinity_seconds} s");
    }
    if flags & policy::EXTERNAL_LOCAL != 0 {
        let _ = writeln!(text, "  clients from outside keep their source");
    }
    let sources = F::of(image).source_ranges.keys().filter(|key| key.service_port == id);
    let sources: Vec<String> =
        sources.map(|key| format!("{}/{}", F::ip(key.network), key.length)).collect();
    assert_eq!(flags & policy::SOURCE_RANGES != 0, !sources.is_empty());
    if !sources.is_empty() {
        let _ = writeln!(text, "  load balancer only from {}", sources.join(" "));
    }
    let classes = if ranges.iter().all(|range| *range == ranges[0]) { 1 } else { CLASSES.len() };
    for class in CLASSES.into_iter().take(classes) {
        let range = ranges[class as usize];
        let who = match class {
            _ if classes == 1 => "",
            Class::Internal => "internal: ",
            Class::ExternalInside => "external, from inside: ",
            Class::ExternalOutside => "external, from outside: ",
        };
        let mut slots: BTreeMap<u32, u32> = BTreeMap::new();
        if range.size() == 0 {
            let verdict = if range.drops() { "dropped" } else { "rejected" };
            let _ = writeln!(text, "  {who}no backends: {verdict}");
        } else {
            for slot in &image.slots[&range.start()] {
                *slots.entry(*slot).or_default() += 1;
            }
            let _ = writeln!(text, "  {who}{} slots", range.size());
        }
        let mut backends: Vec<_> = F::of(image)
            .backends
            .iter()
            .filter(|(_, backend)| backend.service_port == id)
            .collect();
        backends.sort_by_key(|(_, backend)| (backend.address, backend.port));
        if backends.len() > 20 {
            let (least, most) = (slots.values().min(), slots.values().max());
            let _ = writeln!(
                text,
                "    {} backends, of which {} with {least:?} to {most:?} slots",
                backends.len(),
                slots.len()
            );
            continue;
        }
        for (backend_id, found) in backends {
            let at = SocketAddr::new(F::ip(found.address), found.port);
            assert!(
                image.listing::<F>(&found.address) & listing::BACKEND != 0,
                "{at} is not listed"
            );
            let serving = found.is_serving();
            let share = slots.get(backend_id);
            assert_eq!(
                found.flags & (backend::SELECTED << class as u32) != 0,
                share.is_some(),
                "{at}"
            );
            let elsewhere = found.flags & (backend::SELECTED * 0b111) != 0;
            let state = match (serving, share) {
                (true, Some(share)) => share.to_string(),
                (true, None) if elsewhere => continue,
                (true, None) => "no slots".to_owned(),
                (false, None) if !history => continue,
                (false, _) => "gone".to_owned(),
            };
            let local = match found.flags & (backend::LOCAL | backend::HOST) {
                0 => "",
                backend::LOCAL => " local",
                _ => " host",
            };
            let _ = writeln!(text, "    {at} {state}{local}");
        }
    }
}

/// Delivers the changes of a folder in some order; that everything has been delivered comes first
/// or last.
fn arrive(changes: &[Change], seed: u64, one_by_one: bool, engine: &mut Engine) {
    let mut order: Vec<(u64, &Change)> = Vec::new();
    for (index, change) in changes.iter().enumerate() {
        // Multiplication by a generator, modulo a prime, visits each index once.
        order.push(((index as u64 + 1).wrapping_mul(seed) % 65_537, change));
    }
    order.sort_by_key(|(place, _)| *place);
    if one_by_one {
        engine.feed(Change::Synced);
    }
    for (_, change) in order {
        engine.feed(change.clone());
        if one_by_one {
            engine.settle();
        }
    }
    engine.feed(Change::Synced);
    engine.settle();
}

fn run(path: &Path) -> Result<(), String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let (remarks, sections) = sections(&text);
    let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
    let folder_path = directory.path();
    let mut settings = Settings { sources: [SourceId::Manifests].into(), ..Settings::default() };
    let mut interfaces = BTreeMap::new();
    let address = |text: &str| text.parse::<IpAddr>().map_err(|error| error.to_string());
    for line in
        sections.iter().filter(|(head, _)| head == "options").flat_map(|(_, body)| body.lines())
    {
        match line.split_once(' ') {
            Some(("node", name)) => settings.node = Some(name.into()),
            Some(("proxy-name", name)) => settings.proxy_name = Some(name.into()),
            Some(("interface", text)) => drop(interfaces.insert(address(text)?, false)),
            Some(("node-ports", text)) => drop(interfaces.insert(address(text)?, true)),
            Some(("primary", text)) => drop(settings.primary.insert(address(text)?)),
            Some(("leave", text)) => drop(settings.leave.insert(address(text)?)),
            Some(("external-ips", "off")) => settings.external_ips = ExternalIps::Off,
            Some(("external-ips", text)) => {
                settings.external_ips = ExternalIps::Within(vec![cidr(text)?]);
            }
            _ => return Err(format!("unknown option {line:?}")),
        }
    }
    let steps = sections.iter().filter(|(head, _)| head == "maps").count();
    let mut engine = Engine::new(&settings, &interfaces);
    let mut folder = Folder::new(folder_path.to_owned());
    let mut first = None;
    let (mut expected, mut found) = (remarks.clone(), remarks);
    for (head, body) in &sections {
        let _ = writeln!(expected, "-- {head} --\n{}", body.trim_end_matches('\n'));
        let mut kept = body.clone();
        match head.split_once(' ').unwrap_or((head, "")) {
            ("file", name) => {
                fs::write(folder_path.join(name), body).map_err(|error| error.to_string())?;
            }
            ("remove", name) => {
                fs::remove_file(folder_path.join(name)).map_err(|error| error.to_string())?;
            }
            ("seed", name) => {
                let _ = fs::copy(tests().join("seeds").join(name), folder_path.join(name))
                    .map_err(|error| error.to_string())?;
            }
            ("options", _) => {}
            ("maps", _) => {
                let changes = folder.scan().map_err(|error| error.to_string())?;
                for change in changes.clone() {
                    engine.feed(change);
                }
                engine.feed(Change::Synced);
                engine.settle();
                kept = engine.print(folder_path, steps > 1);
                let _ = first.get_or_insert((changes, kept.clone()));
            }
            _ => return Err(format!("unknown section {head:?}")),
        }
        let _ = writeln!(found, "-- {head} --\n{}", kept.trim_end_matches('\n'));
    }
    if let Some((changes, print)) = first.filter(|_| steps == 1) {
        for seed in [3, 5, 11, 17, 101, 4_099, 60_013, 65_536] {
            for one_by_one in [false, true] {
                let mut engine = Engine::new(&settings, &interfaces);
                arrive(&changes, seed, one_by_one, &mut engine);
                let other = engine.print(folder_path, false);
                if other != print {
                    return Err(format!(
                        "another order of arrival ({seed}, {one_by_one}) ends in\n{other}instead of\n{print}"
                    ));
                }
            }
        }
    }
    if found == expected {
        return Ok(());
    }
    if std::env::var_os("SLUICE_BLESS").is_some() {
        return fs::write(path, found).map_err(|error| error.to_string());
    }
    Err(format!("found\n{found}\nexpected\n{expected}"))
}

#[test]
fn every_scenario_ends_as_written() {
    let mut scenarios: Vec<PathBuf> = fs::read_dir(tests().join("scenarios"))
        .expect("the scenarios")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|end| end == "txt"))
        .collect();
    scenarios.sort();
    assert!(scenarios.len() >= 25, "only {} scenarios", scenarios.len());
    let failures: Vec<String> = scenarios
        .iter()
        .filter_map(|path| run(path).err().map(|why| format!("=== {}\n{why}", path.display())))
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Returns manifests of one Service's endpoints, a hundred in each slice.
fn crowd(count: usize) -> String {
    let mut text = String::from(
        "apiVersion: v1\nkind: Service\nmetadata: {name: crowd, namespace: default}\nspec:\n  clusterIP: 10.96.0.1\n  ports: [{port: 80}]\n",
    );
    for start in (0..count).step_by(100) {
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: crowd-{start}\n  namespace: default\n  \
             labels: {{kubernetes.io/service-name: crowd}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints:\n"
        );
        for index in start..count.min(start + 100) {
            let _ = writeln!(
                text,
                "- addresses: [10.{}.{}.{}]",
                100 + index / 65_536,
                index / 256 % 256,
                index % 256
            );
        }
    }
    text
}

fn run_crowd(count: usize) -> Engine {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("crowd.yaml"), crowd(count)).expect("written");
    let settings = Settings { sources: [SourceId::Manifests].into(), ..Settings::default() };
    let mut engine = Engine::new(&settings, &BTreeMap::new());
    for change in Folder::new(directory.path().to_owned()).scan().expect("read") {
        engine.feed(change);
    }
    engine.feed(Change::Synced);
    engine.settle();
    engine
}

#[test]
fn ten_thousand_endpoints_all_get_traffic() {
    let engine = run_crowd(10_000);
    let image = &engine.maps.image;
    let slots = image.slots.values().next().expect("a table");
    assert_eq!(slots.len(), 65_521);
    assert_eq!(slots.iter().collect::<BTreeSet<_>>().len(), 10_000);
    assert_eq!(engine.model.reports().iter().count(), 0);
}

#[test]
fn more_endpoints_than_slots_are_reported_and_most_get_traffic() {
    let engine = run_crowd(66_000);
    let slots = engine.maps.image.slots.values().next().expect("a table");
    assert_eq!(slots.iter().collect::<BTreeSet<_>>().len(), 65_521);
    let reports: Vec<String> = engine.model.reports().iter().map(ToString::to_string).collect();
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert!(reports[0].contains("too_many_endpoints"), "{reports:?}");
}
