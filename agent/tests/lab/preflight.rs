//! `sluice preflight`: its findings about nodes. It leaves nothing behind.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::support::{
    Cluster, Plan, WEB, cluster_ip, follows_the_schema, reaches, skip, status, unless_unsupported,
    word,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_lab::{Cni, Lab, Node, NodeOptions, Overlay};

/// Returns the arguments, with the node's own cgroup.
fn args(node: &Node, more: &[&str]) -> Vec<String> {
    let own = ["preflight", "--cgroup"].map(str::to_owned).into_iter();
    let cgroup = node.cgroup_root().display().to_string();
    own.chain([cgroup]).chain(more.iter().map(|word| (*word).to_owned())).collect()
}

/// Returns name of a check -> its row; and the exit code.
fn preflight(node: &Node) -> Result<(i32, BTreeMap<String, Value>)> {
    preflight_with(node, &[])
}

/// Returns the same with arguments of the agent.
fn preflight_with(node: &Node, more: &[&str]) -> Result<(i32, BTreeMap<String, Value>)> {
    let args = args(node, &[&["-o", "json"], more].concat());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let Output { status, stdout, stderr } = node.sluice_output(&args)?;
    let report: Value = serde_json::from_slice(&stdout)
        .with_context(|| format!("`sluice preflight` said {}", String::from_utf8_lossy(&stderr)))?;
    follows_the_schema(&report)?;
    let code = status.code().context("it was killed")?;
    ensure!((code == 0) == (word(&report, "can_run") == "yes"), "{code} {report}");
    let rows = report.get("checks").and_then(Value::as_array).cloned().unwrap_or_default();
    let name =
        |row: &Value| format!("{} {}", word(row, "check"), word(row, "subject")).trim().to_owned();
    Ok((code, rows.into_iter().map(|row| (name(&row), row)).collect()))
}

/// Returns the result and the words of a check.
fn check<'a>(rows: &'a BTreeMap<String, Value>, name: &str) -> Result<(&'a str, &'a str)> {
    let row = rows.get(name).with_context(|| format!("no check {name} among {:?}", rows.keys()))?;
    Ok((word(row, "result"), word(row, "what")))
}

/// Returns everything of a node in which a run could leave something.
fn traces(node: &Node) -> Result<String> {
    let cgroups = node.run("find", [&node.cgroup_root().display().to_string(), "-type", "d"])?;
    let pins = node.run("find", [&node.bpffs().display().to_string()])?;
    let tc = node.run("tc", ["qdisc", "show"])?;
    // Other labs come and go on the same machine, so only the mounts of this node count.
    let own = std::fs::read_to_string("/proc/self/mountinfo")?;
    let state = node.state_directory().display().to_string();
    let mounts: Vec<&str> = own.lines().filter(|line| line.contains(&state)).collect();
    let links = node.run("ip", ["-o", "-d", "link"])?;
    let routes = node.run("ip", ["route", "show", "table", "all"])?;
    let reserved = node.run("cat", ["/proc/sys/net/ipv4/ip_local_reserved_ports"])?;
    Ok([cgroups, pins, tc, mounts.join("\n"), links, routes, reserved].join("\n---\n"))
}

/// Returns the number of cgroups that runs have left.
fn left(node: &Node) -> Result<usize> {
    let root = node.cgroup_root();
    let names = std::fs::read_dir(root).with_context(|| root.display().to_string())?.flatten();
    Ok(names
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("sluice-preflight"))
        .count())
}

#[test]
fn a_node_is_ready_and_nothing_is_left_behind() -> Result<()> {
    if skip("a_node_is_ready") {
        return Ok(());
    }
    let lab = Lab::new("preflight")?;
    let node = lab.node("n1", &NodeOptions::default())?;
    let _pods = [node.pod("one")?, node.pod("two")?];
    let before = traces(&node)?;
    let table = args(&node, &[]);
    let table: Vec<&str> = table.iter().map(String::as_str).collect();
    println!("{}", node.sluice(&table)?);
    let (code, rows) = preflight(&node)?;
    ensure!(code == 0, "{rows:?}");
    let programs = rows.keys().filter(|name| name.starts_with("program ")).count();
    ensure!(programs == 14, "{programs} programs");
    for (name, expected, words) in [
        ("privileges", "yes", "CAP_BPF"),
        ("program tc_ingress_l2", "yes", "instructions verified"),
        ("hook xdp native (veth)", "yes", "attached"),
        ("hook cgroup", "yes", "9 socket programs"),
        ("pins", "yes", "accepts pins"),
        ("bpffs", "yes", "in a BPF file system"),
        ("devices uplink", "yes", "eth0"),
        ("devices edge", "yes", "lxc"),
        ("xdp eth0", "skip", "a veth"),
        ("cni", "yes", "2 routed pods"),
        ("rp-filter", "yes", "strict"),
        ("kube-proxy", "yes", "no trace"),
        ("foreign-ebpf", "yes", "no programs of others"),
        ("mtu", "yes", "1500"),
    ] {
        let found = check(&rows, name)?;
        ensure!(found.0 == expected && found.1.contains(words), "{name}: {found:?}");
    }
    let tc = check(&rows, "hook tc")?;
    ensure!(tc.0 == "yes", "{tc:?}");
    let after = traces(&node)?;
    ensure!(before == after, "before:\n{before}\nafter:\n{after}");

    // It is killed at any moment.
    for try_number in 0..10 {
        let mut child = node.sluice_command(&table)?.stdout(Stdio::null()).spawn()?;
        sleep(Duration::from_millis(250 * try_number));
        let signal = if try_number % 2 == 0 { "-KILL" } else { "-TERM" };
        // It may have ended by itself.
        let _ = Command::new("kill").args([signal, &child.id().to_string()]).output()?;
        let status = child.wait()?;
        println!("run {try_number}, {signal}: {status}, {} cgroups left", left(&node)?);
        ensure!(left(&node)? <= 1, "{} cgroups after run {try_number}", left(&node)?);
    }
    // What a killed run may leave is an empty cgroup, which the next run removes.
    let stale = node.cgroup_root().join("sluice-preflight-1");
    std::fs::create_dir(&stale).with_context(|| stale.display().to_string())?;
    let (code, _) = preflight(&node)?;
    let after = traces(&node)?;
    ensure!(
        code == 0 && before == after,
        "before:\n{before}\nafter runs that were killed:\n{after}"
    );
    Ok(())
}

#[test]
fn leftovers_of_others_are_reported() -> Result<()> {
    if skip("what_others_have_left") {
        return Ok(());
    }
    unless_unsupported(others())
}

fn others() -> Result<()> {
    let lab = Lab::with_overlay("traces", Overlay::Vxlan)?;
    let options = NodeOptions { cni: Cni::Bridge { bridge_nf: true }, ..NodeOptions::default() };
    let node = lab.node("n1", &options)?;
    let _other = lab.node("n2", &options)?;
    let _pod = node.pod("one")?;
    let (code, rows) = preflight(&node)?;
    ensure!(code == 0, "{rows:?}");
    for (name, expected, words) in [
        ("cni", "yes", "1 pods on the bridge cni0"),
        ("devices fabric", "yes", "vxlan0"),
        ("mtu", "yes", "1 overlays fit"),
        ("bridge-nf", "yes", "pass iptables"),
        ("node-local-dns", "skip", "no device"),
    ] {
        let found = check(&rows, name)?;
        ensure!(found.0 == expected && found.1.contains(words), "{name}: {found:?}");
    }

    node.nft(
        "table ip kube-proxy {\n  chain services {\n  }\n}\ntable ip nat {\n  chain ISTIO_POSTRT {\n  }\n}\n",
    )?;
    // The device may be of any kind that this kernel has.
    let _ = node.ip(
        "link add nodelocaldns type ifb\nlink add kube-ipvs0 type ifb\naddr add 10.96.0.10/32 dev nodelocaldns\n\
         link set eth0 mtu 1480",
    )?;
    let (code, rows) = preflight(&node)?;
    ensure!(code == 0, "warnings do not make it impossible: {rows:?}");
    for (name, expected, words) in [
        ("kube-proxy", "warn", "the device kube-ipvs0, the nftables table kube-proxy"),
        ("service-mesh", "yes", "ISTIO_POSTRT"),
        ("mtu", "warn", "do not fit the 1480 of eth0"),
        ("node-local-dns", "yes", "10.96.0.10"),
    ] {
        let found = check(&rows, name)?;
        ensure!(found.0 == expected && found.1.contains(words), "{name}: {found:?}");
    }

    let (_, rows) = preflight_with(&node, &["--socket-path=machine"])?;
    let found = check(&rows, "service-mesh")?;
    ensure!(found.0 == "warn" && found.1.contains("ISTIO_POSTRT"), "{found:?}");

    // An obstacle has an exit code of its own.
    node.sysctl("net/ipv4/ip_local_port_range", "10000 29999")?;
    let (code, rows) = preflight(&node)?;
    let ports = check(&rows, "ports")?;
    ensure!(code == 1 && ports.0 == "no" && ports.1.contains("leaves 0 ports"), "{code} {ports:?}");
    node.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    let (code, rows) = preflight(&node)?;
    let ports = check(&rows, "ports")?;
    ensure!(code == 0 && ports.1.contains("adds 1024-29999,61000-65535"), "{code} {ports:?}");

    // What may not be read is not reported.
    let words = args(&node, &["-o", "json"]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let sluice = node.sluice_command(&words)?;
    let nobody = [
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
    ];
    let words =
        nobody.map(OsStr::new).into_iter().chain([sluice.get_program()]).chain(sluice.get_args());
    let output = node.output("setpriv", words)?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    ensure!(output.status.code() == Some(1) && word(&report, "can_run") == "unknown", "{report}");
    Ok(())
}

#[test]
fn a_running_agent_is_not_disturbed() -> Result<()> {
    if skip("a_running_agent") {
        return Ok(());
    }
    let cluster = Cluster::new("preflight-agent", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let before = traces(&node)?;
    let (code, rows) = preflight(&node)?;
    ensure!(code == 0, "{rows:?}");
    let ours = check(&rows, "sluice")?;
    ensure!(ours.0 == "yes" && ours.1.contains("eth0") && ours.1.contains("cgroup"), "{ours:?}");
    ensure!(
        check(&rows, "foreign-ebpf")?.1.contains("no programs of others"),
        "{:?}",
        check(&rows, "foreign-ebpf")?
    );
    ensure!(traces(&node)? == before, "something is left");
    early_rules(&node)?;
    ensure!(status(&node)?.get("ready") == Some(&Value::Bool(true)), "not ready any more");
    reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)
}

/// Adds rules that name a frontend where netfilter sees the endpoint already.
fn early_rules(node: &Node) -> Result<()> {
    let (_, rows) = preflight(node)?;
    let found = check(&rows, "early-rules")?;
    ensure!(found.0 == "yes" && found.1.contains("a Service's address"), "{found:?}");
    let frontend = cluster_ip(WEB);
    node.nft(&format!(
        "table inet fw {{
           chain pre {{
             type filter hook prerouting priority raw; policy accept;
             tcp dport 22 accept
             ip saddr 192.0.2.0/24 udp dport 0-65535 accept
             jump more
           }}
           chain more {{
             udp dport 30000-30010 accept
           }}
           chain mangled {{
             type filter hook prerouting priority mangle; policy accept;
             ip daddr {v4} meta mark set 7
             ip6 daddr {v6}/112 meta mark set 7
             tcp dport {{ 443, 30443 }} accept
           }}
           chain forward {{
             type filter hook forward priority filter; policy accept;
             tcp dport 30081 drop
             ct original ip daddr {v4} drop
           }}
           chain unused {{
             tcp dport 30083 drop
           }}
         }}
         table ip others {{
           chain pre {{
             type nat hook prerouting priority dstnat; policy accept;
             tcp dport 31000 dnat to 192.0.2.200
           }}
         }}",
        v4 = frontend[0],
        v6 = frontend[1],
    ))?;
    let (code, rows) = preflight(node)?;
    let found = check(&rows, "early-rules")?;
    ensure!(code == 0 && found.0 == "warn", "{found:?}");
    println!("{}", found.1);
    let named = [
        "inet fw more",
        "ports 30000-30010",
        "inet fw mangled",
        &format!("address {}", frontend[0]),
        "port 30443",
    ];
    for words in named {
        ensure!(found.1.contains(words), "{words} is not in {found:?}");
    }
    // Five of six are named.
    ensure!(found.1.contains("and 1 more"), "{found:?}");
    for words in ["port 22", "0-65535", "30081", "30083"] {
        ensure!(!found.1.contains(words), "{words} is in {found:?}");
    }
    node.nft("delete table inet fw")?;
    let (_, rows) = preflight(node)?;
    let found = check(&rows, "early-rules")?;
    ensure!(
        found.0 == "warn" && found.1.contains("ip others pre") && found.1.contains("port 31000"),
        "{found:?}"
    );
    node.nft("delete table ip others")?;
    let (_, rows) = preflight(node)?;
    ensure!(check(&rows, "early-rules")?.0 == "yes", "{rows:?}");
    Ok(())
}
