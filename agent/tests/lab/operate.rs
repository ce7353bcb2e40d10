//! Operators' daily problems: broken manifests, the seeds, `sluice cleanup`.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use crate::support::{
    Cluster, Plan, WEB, cluster_ip, listed, number, reaches, service, skip, status, until,
    until_backends, word,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_lab::{Cni, Counter, Node, NodeOptions, Side};

/// Files that no cluster would have, each wrong in its own way.
const HOSTILE: [(&str, &str); 9] = [
    ("a-not-yaml.yaml", "kind: Service\n\tmetadata: [\n"),
    ("b-binary.yaml", "\u{0}\u{1}\u{2}\u{7f}"),
    ("c-scalar.yaml", "42\n"),
    (
        "d-no-name.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {}\nspec: {clusterIP: 10.96.0.99, ports: [{port: 80}]}\n",
    ),
    (
        "e-bad-address.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: bad-address}\nspec: {clusterIP: 10.96.0.999, ports: [{port: 80}]}\n",
    ),
    (
        "f-bad-port.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: bad-port}\nspec: {clusterIP: 10.96.0.98, ports: [{port: 700000}, {port: 81}]}\n",
    ),
    (
        "g-wrong-type.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: wrong-type}\nspec: {clusterIP: {a: b}, ports: nothing}\n",
    ),
    (
        "h-bad-endpoint.yaml",
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-more, namespace: default, labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\nports: [{name: http, protocol: TCP, port: 8080}]\nendpoints: [{addresses: [\"127.0.0.1\"]}, {addresses: [\"not an address\"]}]\n",
    ),
    ("i-deep.yaml", "a: {a: {a: {a: [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}}}}\n"),
];

#[test]
fn hostile_objects_are_reported_and_stop_nothing() -> Result<()> {
    if skip("hostile_objects") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("hostile", &Plan::default())?;
    for (name, text) in HOSTILE {
        cluster.manifests.write_text(name, text)?;
    }
    cluster.start_agents(&[])?;
    let node = cluster.node().clone();
    reaches(&cluster.client, cluster_ip(WEB), &cluster.names(), None)?;
    let told = until("reports", || {
        let status = status(&node)?.get("last").cloned().unwrap_or_default();
        let text = status.to_string();
        Ok(["a-not-yaml", "bad-address", "bad-port", "wrong-type", "web-more"]
            .iter()
            .all(|word| text.contains(word))
            .then_some(status))
    })
    .with_context(|| status(&node).map(|status| status.to_string()).unwrap_or_default())?;
    for report in told.get("reports").and_then(Value::as_array).cloned().unwrap_or_default() {
        println!(
            "{} {} {}: {}",
            word(&report, "level"),
            word(&report, "subject"),
            word(&report, "field"),
            word(&report, "message")
        );
    }
    // The valid parts of a bad object are served.
    let services = listed(&node, &["services"])?;
    ensure!(
        services.iter().any(|row| word(row, "service") == "bad-port" && number(row, "port") == 81),
        "{services:?}"
    );

    // A service whose file becomes invalid keeps its last good form, and follows again once the
    // file is repaired.
    cluster.manifests.write_text("default-web.yaml", "kind: Service\n\tmetadata: [\n")?;
    until("a report about it", || {
        Ok(status(&node)?.to_string().contains("default-web.yaml").then_some(()))
    })?;
    reaches(&cluster.client, cluster_ip(WEB), &cluster.names(), None)?;
    cluster.manifests.write(&cluster.web().backends(&cluster.backends[..1]))?;
    until_backends(&node, "web", 1)?;
    reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)?;
    // A new service next to them.
    cluster.manifests.write(&service("fresh", 20).backends(&cluster.backends))?;
    until_backends(&node, "fresh", 2)?;
    reaches(&cluster.client, cluster_ip(20), &cluster.names(), None)
}

#[test]
fn the_seeds_load_and_show_in_services() -> Result<()> {
    if skip("the_seeds_load") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("seeds", &Plan { near: 0, ..Plan::default() })?;
    cluster.manifests.remove(&cluster.web())?;
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/seeds");
    let mut count = 0;
    for seed in std::fs::read_dir(&seeds).with_context(|| seeds.display().to_string())? {
        let seed = seed?;
        cluster.manifests.write_text(
            &seed.file_name().to_string_lossy(),
            &std::fs::read_to_string(seed.path())?,
        )?;
        count += 1;
    }
    ensure!(count == 5, "{count} seeds");
    cluster.start_agents(&[])?;
    let rows = listed(cluster.node(), &["services"])?;
    let found: BTreeSet<(String, String, u64, u64)> = rows
        .iter()
        .flat_map(|row| {
            let vips = row.get("vips").and_then(Value::as_array).cloned().unwrap_or_default();
            let name = format!("{}/{}", word(row, "namespace"), word(row, "service"));
            vips.into_iter()
                .map(move |vip| {
                    (
                        name.clone(),
                        vip.as_str().unwrap_or_default().to_owned(),
                        number(row, "port"),
                        number(row, "backends"),
                    )
                })
                .collect::<Vec<_>>()
        })
        .collect();
    let expected = [
        ("kube-system/etcd-k8s", "10.233.26.40", 2379, 3),
        ("default/exemple", "10.96.77.21", 80, 1),
        ("default/hello", "10.96.77.20", 80, 2),
        ("default/nginx-svc", "10.233.26.39", 80, 2),
        ("wordpress-ns/wordpress", "*:31895", 80, 2),
        ("wordpress-ns/wordpress", "10.100.200.174", 80, 2),
        ("wordpress-ns/wordpress", "100.64.144.7", 80, 2),
        ("wordpress-ns/wordpress", "192.168.160.115", 80, 2),
    ];
    let expected = expected
        .map(|(name, vip, port, backends)| (name.to_owned(), vip.to_owned(), port, backends));
    ensure!(found == expected.into_iter().collect(), "{found:?}");
    let backends = listed(cluster.node(), &["backends", "hello"])?;
    let addresses: BTreeSet<&str> = backends.iter().map(|row| word(row, "backend")).collect();
    ensure!(addresses == BTreeSet::from(["10.244.0.2:80", "10.244.1.2:80"]), "{addresses:?}");
    Ok(())
}

/// Returns the ids of what is pinned: (kind, id).
fn kernel_objects(node: &Node) -> Result<Vec<(&'static str, u64)>> {
    let mut objects = Vec::new();
    let pins = node.run("find", [&node.pin_path().display().to_string(), "-type", "f"])?;
    for pin in pins.lines() {
        for kind in ["link", "map"] {
            let output = node.output("bpftool", ["-j", kind, "show", "pinned", pin])?;
            let Ok(shown) = serde_json::from_slice::<Value>(&output.stdout) else { continue };
            let id = number(&shown, "id");
            if output.status.success() && id != 0 {
                objects.push((kind, id));
                let program = number(&shown, "prog_id");
                if program != 0 {
                    objects.push(("prog", program));
                }
            }
        }
    }
    Ok(objects)
}

#[test]
fn a_first_start_that_fails_leaves_nothing() -> Result<()> {
    if skip("a_first_start_that_fails") {
        return Ok(());
    }
    let cluster = Cluster::without_agents("first-start", &Plan::default())?;
    let node = cluster.node();
    let broken = cluster.lab.state().join("broken.yaml");
    std::fs::write(&broken, "clusters: [{name: a, cluster: {server: 'not an address'}}]\n")?;
    let broken = broken.display().to_string();
    let manifests = cluster.lab.state().display().to_string();
    for (args, expected) in [
        (&["--kubeconfig", "/nowhere/kubeconfig"][..], "/nowhere/kubeconfig"),
        (&["--kubeconfig", &broken], "kubeconfig"),
        (&["--manifests", &manifests, "--cgroup", "/nowhere/cgroup"], "/nowhere/cgroup"),
    ] {
        let args = [&["agent", "--node-name", "n1"][..], args].concat();
        let output = node.sluice_output(&args)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && said.contains(expected), "{args:?}: {said}");
        ensure!(!node.pin_path().exists(), "{args:?}: {} was made", node.pin_path().display());
        let device = node.output("ip", ["link", "show", "sluice0"])?;
        ensure!(!device.status.success(), "{args:?}: sluice0 was made");
    }
    Ok(())
}

#[test]
fn cleanup_removes_every_trace() -> Result<()> {
    if skip("cleanup_removes") {
        return Ok(());
    }
    // On a bridge: the routed pods' gateway answers for what the node has a route to.
    let node = NodeOptions { cni: Cni::Bridge { bridge_nf: false }, ..NodeOptions::default() };
    let mut cluster =
        Cluster::without_agents("cleanup", &Plan { node, near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let _ = node.ip("route del default")?;
    let before = (node.run("ip", ["-o", "link"])?, node.run("ip", ["route"])?);
    // A filter of another program, so that ours is attached as a filter too.
    let edge = cluster.client.host_device().to_owned();
    let foreign = Counter::load(Side::Source, cluster.backends[0].ipv4())?;
    let pin = node.bpffs().join("foreign");
    foreign.pin(&pin)?;
    let _ = node.run("tc", ["qdisc", "replace", "dev", &edge, "clsact"])?;
    let pin = pin.display().to_string();
    let _ = node.run(
        "tc",
        ["filter", "add", "dev", &edge, "egress", "pref", "7", "bpf", "da", "object-pinned", &pin],
    )?;
    cluster.node().uplink_peer_xdp_pass()?;
    let close_wait =
        || node.run("cat", ["/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait"]);
    let close_wait_before = close_wait()?;
    cluster.start_agents(&[
        "--uplink",
        "eth0",
        "--xdp",
        "native",
        "--conntrack-tcp-timeout-close-wait",
        "1h",
    ])?;
    ensure!(close_wait()?.trim() == "3600", "{}", close_wait()?);
    reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)?;
    reaches(&node, cluster_ip(WEB), &["near-1"], None)?;
    let filters = || node.run("tc", ["filter", "show", "dev", &edge, "egress"]);
    ensure!(filters()?.contains("sluice_"), "no filter of ours: {}", filters()?);
    let objects = kernel_objects(&node)?;
    println!("{} objects are pinned", objects.len());
    // The nine of the sockets and XDP's. Those of TCX are added from Linux 6.6 on.
    ensure!(objects.iter().filter(|(kind, _)| *kind == "link").count() >= 10, "{objects:?}");
    ensure!(objects.iter().filter(|(kind, _)| *kind == "map").count() >= 10, "{objects:?}");
    ensure!(node.output("ip", ["link", "show", "sluice0"])?.status.success(), "no device sluice0");

    let refused = node.sluice_output(&["cleanup"])?;
    ensure!(!refused.status.success(), "cleanup beside a running agent");
    cluster.agent().stop()?;
    reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)
        .context("after the agent was stopped")?;
    println!("{}", node.sluice(&["cleanup"])?);

    for (kind, id) in objects {
        until(&format!("{kind} {id} is gone"), || {
            let output = node.output("bpftool", ["-j", kind, "show", "id", &id.to_string()])?;
            Ok((!output.status.success()).then_some(()))
        })?;
    }
    ensure!(!node.pin_path().exists(), "{} is still there", node.pin_path().display());
    ensure!(close_wait()? == close_wait_before, "{} is left of 3600", close_wait()?);
    let left = filters()?;
    ensure!(left.contains("pref 7") && !left.contains("sluice_"), "{left}");
    ensure!(
        (node.run("ip", ["-o", "link"])?, node.run("ip", ["route"])?) == before,
        "links or routes are left"
    );
    let unreachable = cluster.client.ask([
        "udp-client",
        "--timeout-ms=100",
        "--to",
        &format!("{}:53", cluster_ip(WEB)[0]),
    ])?;
    ensure!(
        unreachable.iter().any(|event| matches!(event, sluice_lab::Event::Lost { .. })),
        "{unreachable:?}"
    );
    // The second time there is nothing to do. The pod's other container only waits.
    let said = node.sluice(&["cleanup"])?;
    ensure!(said.starts_with("found nothing of Sluice"), "{said}");
    let mut waits = node.spawn_command(node.sluice_command(&["pause"])?)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(waits.poll()?.is_none(), "`sluice pause` ended: {}", waits.stderr());
    ensure!(waits.stop()?.success(), "`sluice pause` ended with an error");
    // An agent can start again.
    cluster.agents.clear();
    cluster.start_agents(&["--uplink", "eth0"])?;
    reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)
}
