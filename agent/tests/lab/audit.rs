//! What the agent has made and somebody else changes: it is noticed, repaired and reported.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::support::{Cluster, Plan, WEB, cluster_ip, pinned, reaches, skip, until_within};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice::node::status::{self, DriftStatus, Status};
use sluice_lab::{Counter, Node, Side};

/// The ports that the kernel chooses from, and such that some of them are those of clients.
const PORT_RANGE: &str = "net/ipv4/ip_local_port_range";
const OVERLAPPING: &str = "20000 60999";
/// How long the agent may take to notice and repair: half a minute, and more on a busy machine.
const NOTICED: Duration = Duration::from_secs(45);

/// How often each place has drifted, as `what place`, with what was found there.
fn drifted(node: &Node) -> Result<BTreeMap<String, (u64, String)>> {
    let row = |row: DriftStatus| (format!("{} {}", row.what, row.place), (row.times, row.found));
    Ok(last_status(node)?.drift.into_iter().map(row).collect())
}

/// The agent's status as it has written it: without all pins, `sluice status` cannot show it.
fn last_status(node: &Node) -> Result<Status> {
    status::read(&status::state_dir(&node.pin_path())).context("no status")
}

/// Waits until all of these places have drifted so often, and the node is ready.
fn until_repaired(node: &Node, places: &[&str], times: u64) -> Result<()> {
    let what = format!("{places:?} repaired {times} times");
    let result = until_within(NOTICED, &what, || {
        let known = drifted(node)?;
        let has = |place: &&str| known.get(*place).is_some_and(|(found, _)| *found >= times);
        Ok((places.iter().all(has) && is_ready(node)?).then_some(()))
    });
    result.with_context(|| format!("{:?}", drifted(node)))
}

fn is_ready(node: &Node) -> Result<bool> {
    Ok(last_status(node)?.ready)
}

/// The bytes of a value as bpftool's arguments take them.
fn bytes(value: Option<&Value>) -> Result<Vec<String>> {
    let all = value.and_then(Value::as_array).context("no bytes")?;
    Ok(all.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

/// Changes one entry of a map: `change` makes the arguments after the key of the first entry.
fn change_one(
    node: &Node,
    map: &str,
    how: &str,
    last_byte: Option<&str>,
    value: bool,
) -> Result<()> {
    let path = pinned(node, map)?.display().to_string();
    let dump: Value =
        serde_json::from_str(&node.run("bpftool", ["-j", "map", "dump", "pinned", &path])?)?;
    let first = dump.get(0).with_context(|| format!("{map} is empty"))?;
    let mut key = bytes(first.get("key"))?;
    if let (Some(byte), Some(last)) = (last_byte, key.first_mut()) {
        byte.clone_into(last);
    }
    let mut args: Vec<String> = ["map", how, "pinned", &path, "key"].map(str::to_owned).to_vec();
    args.extend(key);
    if value {
        args.push("value".to_owned());
        args.extend(bytes(first.get("value"))?);
    }
    node.run("bpftool", args).map(drop)
}

/// The ifindex of a device of the node.
fn index(node: &Node, device: &str) -> Result<String> {
    let text = node.run("ip", ["-o", "link", "show", device])?;
    Ok(text.split(':').next().unwrap_or_default().to_owned())
}

/// The pin of a link: `dev7_ingress`.
fn link(node: &Node, name: &str) -> Result<String> {
    let maps = pinned(node, "slots")?;
    let layout = maps.parent().and_then(|maps| maps.parent()).context("no layout")?;
    Ok(layout.join("links").join(name).display().to_string())
}

/// The routes of VIPs, as `ip route` lists them.
fn routes(node: &Node, family: &str) -> Result<Vec<String>> {
    let listed =
        node.run("ip", [family, "-o", "route", "show", "dev", "sluice0", "proto", "83"])?;
    Ok(listed.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
}

fn metric(node: &Node, what: &str) -> Result<u64> {
    let text = node.run("curl", ["-sS", "-m", "5", "http://127.0.0.1:10249/metrics"])?;
    let series = format!("sluice_drift_total{{what=\"{what}\"}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&series));
    Ok(value.map_or(Ok(0), str::parse)?)
}

#[test]
fn whatever_somebody_changes_is_repaired_within_half_a_minute() -> Result<()> {
    if skip("whatever_somebody_changes") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("audit", &Plan { near: 2, ..Plan::default() })?;
    let node = cluster.node().clone();
    node.sysctl(PORT_RANGE, OVERLAPPING)?;
    cluster.start_agents(&[])?;
    let names = cluster.names().into_iter().map(str::to_owned).collect::<Vec<_>>();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let works = |cluster: &Cluster| -> Result<()> {
        reaches(&cluster.client, cluster_ip(WEB), &names, None)?;
        reaches(cluster.node(), cluster_ip(WEB), &names, None)
    };
    works(&cluster)?;
    ensure!(drifted(&node)?.is_empty(), "nothing has changed: {:?}", drifted(&node)?);

    // Maps: keys that go, one that comes, values.
    for map in ["services_v4", "services_v6", "origins_v6", "devices", "names"] {
        change_one(&node, map, "delete", None, false)?;
    }
    change_one(&node, "node_addresses_v4", "update", Some("0xfe"), true)?;
    let slots = pinned(&node, "slots")?.display().to_string();
    let zeros = ["0"; 64];
    let key = ["map", "update", "pinned", &slots, "key", "0", "0", "0", "0", "value"];
    let _ = node.run("bpftool", key.iter().chain(&zeros))?;
    let backends = pinned(&node, "backends_v6")?.display().to_string();
    let dump =
        node.run("bpftool", ["map", "lookup", "pinned", &backends, "key", "1", "0", "0", "0"]);
    ensure!(dump.is_ok(), "no backend 1: {dump:?}");
    // Pins and programs: of a map, of a link, of the cgroup; a link that is only detached.
    std::fs::remove_file(pinned(&node, "backends_v4")?)?;
    let pod = cluster.client.host_device().to_owned();
    let uplink = node.uplink().to_owned();
    std::fs::remove_file(link(&node, &format!("dev{}_ingress", index(&node, &pod)?))?)?;
    std::fs::remove_file(link(&node, "cgroup_connect4")?)?;
    let detached = link(&node, &format!("dev{}_egress", index(&node, &uplink)?))?;
    let _ = node.run("bpftool", ["link", "detach", "pinned", &detached])?;
    let _ = node.ip("link del sluice0")?;

    let cgroup = format!("hook {} connect4", node.cgroup_root().display());
    let [pod_hook, uplink_hook] = [format!("hook {pod} ingress"), format!("hook {uplink} egress")];
    let places = [
        "map services_v4",
        "map services_v6",
        "map origins_v6",
        "map devices",
        "map names",
        "map node_addresses_v4",
        "map slots",
        "pin backends_v4",
        &pod_hook,
        &uplink_hook,
        &cgroup,
        "device sluice0",
    ];
    until_repaired(&node, &places, 1)?;
    works(&cluster)?;
    let _ = pinned(&node, "backends_v4")?;
    for what in ["map", "pin", "hook", "device"] {
        ensure!(metric(&node, what)? > 0, "no metric of {what}");
    }
    let text = node.sluice(&["status"])?;
    ensure!(text.contains("pin backends_v4: the pin is gone; repaired"), "{text}");

    // Routes, the device's settings, and a whole qdisc with our filter behind a foreign one.
    for family in ["-4", "-6"] {
        let all = routes(&node, family)?;
        let first = all.first().with_context(|| format!("no routes: {family}"))?;
        let _ = node.run("ip", [family, "route", "del", first, "dev", "sluice0", "proto", "83"])?;
    }
    node.sysctl("net/ipv4/conf/sluice0/accept_local", "0")?;
    node.sysctl("net/ipv4/conf/lo/accept_local", "0")?;
    // A client on the node has had ports of its own meanwhile.
    node.sysctl(PORT_RANGE, OVERLAPPING)?;
    node.sysctl("net/ipv4/ip_local_reserved_ports", "8080")?;
    let _ = node.run("tc", ["qdisc", "replace", "dev", &pod, "clsact"])?;
    let counter = Counter::load(Side::Source, cluster.backends[0].ipv4())?;
    let pin = node.bpffs().join("foreign");
    counter.pin(&pin)?;
    let pin = pin.display().to_string();
    let foreign =
        ["filter", "add", "dev", &pod, "egress", "pref", "7", "bpf", "da", "object-pinned"];
    let _ = node.run("tc", foreign.iter().chain(&[&*pin]))?;
    let has_filter = || -> Result<bool> {
        Ok(node.run("tc", ["filter", "show", "dev", &pod, "egress"])?.contains("sluice_"))
    };
    until_within(NOTICED, "the program sits behind the foreign filter", || {
        Ok(has_filter()?.then_some(()))
    })?;
    let _ = node.run("tc", ["qdisc", "del", "dev", &pod, "clsact"])?;
    let pod_egress = format!("hook {pod} egress");
    until_repaired(&node, &[&pod_egress], 1)?;
    until_repaired(&node, &["device sluice0"], 2)?;
    let settings =
        ["setting net.ipv4.conf.lo.accept_local", "setting net.ipv4.ip_local_reserved_ports"];
    until_repaired(&node, &settings, 1)?;
    let reserved = node.run("cat", ["/proc/sys/net/ipv4/ip_local_reserved_ports"])?;
    ensure!(reserved.trim() == "8080,20000-29999", "{reserved}");
    let known = drifted(&node)?;
    let routed = known.keys().filter(|place| place.starts_with("route ")).count();
    ensure!(routed == 2, "{known:?}");
    works(&cluster)?;
    ensure!(metric(&node, "route")? == 2, "{known:?}");

    // One line for each, and none that it is over: nothing was not repaired.
    let log = cluster.agent().log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("drift")).collect();
    println!("{}", lines.join("\n"));
    let times: u64 = known.values().map(|(times, _)| times).sum();
    ensure!(lines.len() as u64 == times, "{} lines for {times}", lines.len());
    Ok(())
}

#[test]
fn what_cannot_be_repaired_makes_the_node_unready() -> Result<()> {
    if skip("what_cannot_be_repaired") {
        return Ok(());
    }
    let mut cluster = Cluster::new("audit-failing", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let pins = node.bpffs().display().to_string();
    std::fs::remove_file(pinned(&node, "slots")?)?;
    std::fs::remove_file(pinned(&node, "names")?)?;
    let _ = node.run("mount", ["-o", "remount,bind,ro", &pins])?;
    let unready = until_within(NOTICED, "the node is not ready", || {
        let status = last_status(&node)?;
        let waiting = status.waiting_for.join("\n");
        Ok((!status.ready && waiting.contains("pin slots")).then_some(waiting))
    })?;
    ensure!(
        unready.contains("Read-only file system") && unready.contains("pin names"),
        "{unready}"
    );
    let said = node.sluice_output(&["status"])?;
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    ensure!(said.contains("The agent waits for the repair of pin names"), "{said}");
    let _ = node.run("mount", ["-o", "remount,bind,rw", &pins])?;
    until_within(NOTICED, "the node is ready again", || Ok(is_ready(&node)?.then_some(())))?;
    reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)?;
    ensure!(metric(&node, "pin")? == 2, "each is counted once");
    let log = cluster.agent().log();
    let count = |text: &str| log.matches(text).count();
    ensure!(count("drift that cannot be repaired; trying again") == 2, "{log}");

    // Under an agent whose node was cleaned up, nothing is repaired.
    let _ = node.sluice(&["cleanup", "--force"])?;
    std::thread::sleep(Duration::from_secs(12));
    let left = node.run("find", [node.pin_path().display().to_string()]);
    ensure!(left.is_err(), "the agent has pinned again: {left:?}");
    let device = node.output("ip", ["link", "show", "sluice0"])?;
    ensure!(!device.status.success(), "sluice0 was made again");
    Ok(())
}
