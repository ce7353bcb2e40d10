//! Agents of another version take over, and those that cannot start leave their predecessor's work
//! alone; all of it under load.
//!
//! The other version is `sluice` with another layout of the maps (feature `next-layout`), in
//! `SLUICE_NEXT_BIN`.

use std::path::PathBuf;

use crate::support::{
    Cluster, Plan, SOON, listed, load_of, number, skip, status, under_load, until, until_backends,
    word,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_lab::{Counter, LoadClients, LoadSize, Node, Side};

/// Returns the agent of the next layout, if it has been built.
fn next(test: &str) -> Option<PathBuf> {
    if skip(test) {
        return None;
    }
    let found = std::env::var_os("SLUICE_NEXT_BIN").map(PathBuf::from);
    if found.is_none() {
        println!(
            "{test} skipped: SLUICE_NEXT_BIN names no agent; `cargo xtask test lab` builds it"
        );
    }
    found
}

/// Replaces the running agent by another one, as a DaemonSet does.
fn replace(cluster: &mut Cluster, program: Option<&PathBuf>, args: &[&str]) -> Result<()> {
    cluster.agent().options().program = program.cloned();
    cluster.agent().options().args =
        ["--socket-path=host"].iter().chain(args).map(|arg| (*arg).to_owned()).collect();
    cluster.agent().restart()?;
    cluster.agent().wait_ready(6 * SOON)
}

/// Returns the layouts that have something under a node's pin path.
fn layouts(node: &Node) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(node.pin_path()).context("no pins")?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

/// Returns the number of entries in a map of a layout.
fn entries(node: &Node, layout: &str, map: &str) -> Result<usize> {
    let path = node.pin_path().join(layout).join("maps").join(map);
    let dump = node.run("bpftool", ["-j", "map", "dump", "pinned", &path.display().to_string()])?;
    Ok(serde_json::from_str::<Vec<Value>>(&dump).with_context(|| dump.clone())?.len())
}

/// Connections of the load that open and end: about this many are proven at a time.
const SHORT: usize = 8;

/// Returns the fewest entries that a layout's `flows_v4` has in a second.
fn fewest(node: &Node, layout: &str) -> Result<usize> {
    let mut fewest = entries(node, layout, "flows_v4")?;
    for _ in 0..4 {
        std::thread::sleep(std::time::Duration::from_millis(250));
        fewest = fewest.min(entries(node, layout, "flows_v4")?);
    }
    Ok(fewest)
}

fn unharmed(load: &mut LoadClients, when: &str) -> Result<()> {
    // Retransmissions are printed and are no failure: a busy machine is late as well.
    println!("{when}: {:?}", load.unharmed(when)?);
    Ok(())
}

fn up_and_down(name: &str, next: &PathBuf, filters: bool) -> Result<()> {
    let size = LoadSize::of_this_run();
    let mut cluster = Cluster::without_agents(name, &Plan::default())?;
    if filters {
        // Behind another program's filter ours is a filter too, as on all kernels without TCX.
        foreign_filters(&cluster)?;
    }
    cluster.start_agents(&["--socket-path=host"])?;
    let node = cluster.node().clone();
    let hooks = |node: &Node| -> Result<bool> {
        let devices =
            status(node)?.get("devices").and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(devices.iter().any(|device| {
            device.get("hooks").is_some_and(|hooks| hooks.to_string().contains("clsact"))
        }))
    };
    ensure!(hooks(&node)? == filters, "{}", status(&node)?);
    let mut load = load_of(&cluster, size)?;
    ensure!(layouts(&node)? == ["v3"], "{:?}", layouts(&node)?);
    // Connections that send nothing meanwhile are not recovered by their packets: their entries
    // have to be moved.
    let idle = fewest(&node, "v3")?;
    let ids = |node: &Node| -> Result<Vec<u64>> {
        Ok(listed(node, &["backends"])?.iter().map(|row| number(row, "id")).collect())
    };
    let before = ids(&node)?;

    if !filters {
        replace(&mut cluster, None, &[])?;
        unharmed(&mut load, "after a rolling update")?;
    }
    replace(&mut cluster, Some(next), &[])?;
    unharmed(&mut load, "after the upgrade")?;
    ensure!(layouts(&node)? == ["v4"], "{:?}", layouts(&node)?);
    let moved = fewest(&node, "v4")?;
    ensure!(moved + SHORT >= idle, "{moved} entries, there were {idle}");
    ensure!(ids(&node)? == before, "ids have changed");
    let log = cluster.agent().log();
    for word in ["WritesPrevious", "WritesCurrent", "entries were moved to this layout"] {
        ensure!(log.contains(word), "{word}: {log}");
    }

    if filters {
        return Ok(());
    }

    // The way back: the newer version writes the older one's layout first.
    replace(&mut cluster, Some(next), &["--layout=previous"])?;
    unharmed(&mut load, "when the old layout was written again")?;
    ensure!(layouts(&node)? == ["v3", "v4"], "{:?}", layouts(&node)?);
    ensure!(entries(&node, "v3", "flows_v4")? >= idle, "entries were left behind");
    until("everything to be moved", || Ok((entries(&node, "v4", "flows_v4")? == 0).then_some(())))?;
    let flows: Value = listed(&node, &["flows", "--limit", "5000"])?.into();
    ensure!(flows.as_array().is_some_and(|rows| rows.len() >= idle / 2), "{flows}");

    // It can be killed there and come back, and the upgrade can still go on or be taken back.
    cluster.agent().kill9()?;
    cluster.agent().restart()?;
    cluster.agent().wait_ready(6 * SOON)?;
    unharmed(&mut load, "when it was killed between the layouts")?;

    replace(&mut cluster, None, &[])?;
    unharmed(&mut load, "after the rollback")?;
    ensure!(layouts(&node)? == ["v3"], "{:?}", layouts(&node)?);
    ensure!(ids(&node)? == before, "ids have changed");
    cluster.manifests.write(&cluster.web().backends(&cluster.backends[..1]))?;
    until_backends(&node, "web", 1)?;
    unharmed(&mut load, "when a backend left")
}

/// Adds another program's filter at every egress of a node.
fn foreign_filters(cluster: &Cluster) -> Result<()> {
    let node = cluster.node();
    let pin = node.bpffs().join("foreign");
    Counter::load(Side::Source, cluster.backends[0].ipv4())?.pin(&pin)?;
    let pin = pin.display().to_string();
    let links: Vec<Value> = serde_json::from_str(&node.run("ip", ["-j", "link"])?)?;
    for link in links.iter().map(|link| word(link, "ifname")).filter(|name| *name != "lo") {
        let _ = node.run("tc", ["qdisc", "replace", "dev", link, "clsact"])?;
        let filter =
            ["filter", "add", "dev", link, "egress", "bpf", "direct-action", "object-pinned", &pin];
        let _ = node.run("tc", filter)?;
    }
    Ok(())
}

#[test]
fn an_upgrade_to_another_layout_and_the_way_back_break_nothing() -> Result<()> {
    let Some(next) = next("an_upgrade_to_another_layout") else { return Ok(()) };
    up_and_down("layouts", &next, false)
}

#[test]
fn an_upgrade_breaks_nothing_where_programs_are_filters() -> Result<()> {
    let Some(next) = next("an_upgrade_where_programs_are_filters") else { return Ok(()) };
    up_and_down("layouts-clsact", &next, true)
}

#[test]
fn an_upgrade_that_is_killed_again_and_again_breaks_nothing() -> Result<()> {
    let Some(next) = next("an_upgrade_that_is_killed") else { return Ok(()) };
    let (mut cluster, mut load) =
        under_load("layouts-kill", &Plan::default(), LoadSize::of_this_run())?;
    let node = cluster.node().clone();
    // It is killed at another moment each time, until one attempt succeeds.
    for (round, tenths) in [4, 10, 16].into_iter().enumerate() {
        cluster.agent().kill9()?;
        cluster.agent().options().program = Some(next.clone());
        cluster.agent().restart()?;
        std::thread::sleep(std::time::Duration::from_millis(tenths * 100));
        println!("round {round}: {:?}", layouts(&node)?);
    }
    cluster.agent().wait_ready(6 * SOON)?;
    unharmed(&mut load, "when the upgrade was killed again and again")?;
    ensure!(layouts(&node)? == ["v4"], "{:?}", layouts(&node)?);
    // Without preparation an older version starts with maps of its own, and open connections are
    // recovered by what clients send.
    cluster.agent().options().program = None;
    cluster.agent().restart()?;
    cluster.agent().wait_ready(6 * SOON)?;
    println!("rolled back unprepared: {:?}", load.unharmed("after an unprepared rollback")?);
    ensure!(layouts(&node)? == ["v3"], "{:?}", layouts(&node)?);
    Ok(())
}

#[test]
fn an_agent_that_cannot_start_leaves_the_one_before_serving() -> Result<()> {
    let Some(next) = next("an_agent_that_cannot_start") else { return Ok(()) };
    let (mut cluster, mut load) =
        under_load("no-start", &Plan::default(), LoadSize::of_this_run())?;
    let node = cluster.node().clone();
    // The agents are broken in ways that are found one after the other.
    let broken = broken_agents(&cluster, &next)?;
    cluster.agent().stop()?;
    for (what, program, args, expected) in broken {
        cluster.agent().options().program = Some(program);
        cluster.agent().options().args = args;
        cluster.agent().restart()?;
        let status =
            cluster.agent().process().wait(3 * SOON).with_context(|| format!("{what}: it runs"))?;
        let log = cluster.agent().log();
        ensure!(!status.success(), "{what}: {status}");
        ensure!(log.contains(expected), "{what}: {log}");
        println!("{what}: {}", log.lines().last().unwrap_or_default());
        let _ = load.unharmed(what)?;
        ensure!(layouts(&node)?.contains(&"v3".to_owned()), "{what}: {:?}", layouts(&node)?);
    }
    // The predecessor comes back as if nothing had happened.
    replace(&mut cluster, None, &[])?;
    println!("{:?}", load.unharmed("when the one before was back")?);
    ensure!(layouts(&node)? == ["v3"], "{:?}", layouts(&node)?);
    Ok(())
}

type Broken = (&'static str, PathBuf, Vec<String>, &'static str);

fn broken_agents(cluster: &Cluster, next: &PathBuf) -> Result<Vec<Broken>> {
    let whole = std::fs::read(next).context("the agent of the next layout")?;
    let damaged = |name: &str, damage: &dyn Fn(&mut Vec<u8>) -> Result<()>| -> Result<PathBuf> {
        let mut bytes = whole.clone();
        damage(&mut bytes)?;
        let path = cluster.lab.state().join(name);
        std::fs::write(&path, bytes)?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(path)
    };
    let unreadable = damaged("unreadable", &|bytes| {
        let at = object_at(bytes)?;
        bytes.get_mut(at + 4..at + 64).context("a header")?.fill(0xff);
        Ok(())
    })?;
    let refused = damaged("refused", &|bytes| {
        // `exit` with nothing in r0, as the first instruction of every program.
        let at = object_at(bytes)?;
        for (start, _) in programs_of(bytes.get(at..).context("an object")?)? {
            let first = bytes.get_mut(at + start..at + start + 8).context("an instruction")?;
            first.copy_from_slice(&[0x95, 0, 0, 0, 0, 0, 0, 0]);
        }
        Ok(())
    })?;
    // Each map takes a descriptor: refused in the middle of them.
    let cramped = cluster.lab.state().join("cramped");
    std::fs::write(&cramped, format!("#!/bin/sh\nulimit -n 30\nexec {} \"$@\"\n", next.display()))?;
    std::fs::set_permissions(&cramped, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let args = |more: &[&str]| {
        ["--socket-path=host"].iter().chain(more).map(|arg| (*arg).to_owned()).collect()
    };
    Ok(vec![
        (
            "with an object that cannot be read",
            unreadable,
            args(&[]),
            "cannot read the built-in BPF object",
        ),
        (
            "with programs that the verifier refuses",
            refused,
            args(&[]),
            "the verifier of this kernel refuses",
        ),
        ("with no room for its maps", cramped, args(&[]), "Too many open files"),
        (
            "with a configuration that cannot be used",
            next.clone(),
            args(&["--config=/nowhere.yaml"]),
            "/nowhere.yaml",
        ),
    ])
}

/// Returns the offset of the object in an agent's file: an ELF file for BPF (machine 247).
fn object_at(bytes: &[u8]) -> Result<usize> {
    let found = bytes
        .windows(20)
        .position(|window| window.starts_with(b"\x7fELF") && window.ends_with(&[247, 0]));
    found.context("no BPF object in the agent")
}

/// Returns the sections of an ELF file that hold the programs' instructions: start and length.
fn programs_of(object: &[u8]) -> Result<Vec<(usize, usize)>> {
    let half =
        |at: usize| object.get(at..at + 2).and_then(|b| b.try_into().ok()).map(u16::from_le_bytes);
    let word =
        |at: usize| object.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let long =
        |at: usize| object.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let (table, size, count) = (long(0x28), half(0x3a), half(0x3c));
    let (table, size, count) =
        (table.context("a table")? as usize, size.context("a size")?, count.context("a count")?);
    let mut found = Vec::new();
    for index in 0..usize::from(count) {
        let at = table + index * usize::from(size);
        // Program bits that are executed.
        if word(at + 4) == Some(1) && long(at + 8).is_some_and(|flags| flags & 4 != 0) {
            let (start, length) =
                (long(at + 0x18).context("a start")?, long(at + 0x20).context("a length")?);
            if length > 0 {
                found.push((start as usize, length as usize));
            }
        }
    }
    ensure!(found.len() > 3, "only {} sections with programs", found.len());
    Ok(found)
}
