//! Decisions made by flags and by the Node object reach the maps and the status.

use crate::support::{
    Cluster, Plan, WEB, cluster_ip, number, pinned, reaches, skip, status, until, word,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sluice_lab::Node;

/// Returns the values of a map by key, as the kernel's type information shows them.
fn dump(node: &Node, map: &str) -> Result<Vec<(Value, Value)>> {
    let path = pinned(node, map)?.display().to_string();
    let dump = node.run("bpftool", ["-j", "map", "dump", "pinned", &path])?;
    let entries: Vec<Value> = serde_json::from_str(&dump).with_context(|| dump.clone())?;
    let entry = |entry: &Value| {
        let entry = entry.get("formatted").unwrap_or(entry);
        Some((entry.get("key")?.clone(), entry.get("value")?.clone()))
    };
    entries.iter().map(|found| entry(found).with_context(|| dump.clone())).collect()
}

/// Returns a field that holds an address's octets.
fn octets(value: &Value, path: &str) -> Value {
    value.pointer(path).and_then(|address| address.get("octets")).cloned().unwrap_or_default()
}

fn policy(node: &Node) -> Result<Value> {
    Ok(status(node)?.pointer("/last/policy").cloned().unwrap_or_default())
}

fn reserved(node: &Node) -> Result<String> {
    Ok(node.run("cat", ["/proc/sys/net/ipv4/ip_local_reserved_ports"])?.trim().to_owned())
}

#[test]
fn flags_and_the_node_object_reach_maps_and_status() -> Result<()> {
    if skip("flags_and_the_node_object") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("policy", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let uplink = node.uplink().to_owned();
    let _ = node.ip(&format!(
        "link set lo up\naddr add 198.51.100.9/24 dev {uplink}\n\
         link add nodelocaldns type bridge\naddr add 10.96.0.77/32 dev nodelocaldns"
    ))?;
    node.sysctl("net/ipv4/ip_local_port_range", "20000 60999")?;
    node.sysctl("net/ipv4/ip_local_reserved_ports", "25000")?;
    cluster.start_agents(&[
        "--masquerade=kube-proxy",
        "--detect-local=node-cidr",
        "--service-cidr=10.96.0.0/16",
        "--nodeport-addresses=primary,localhost,10.0.0.0/8",
    ])?;
    reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)?;

    // Without a Node object the default route's device has the primary addresses.
    let (v4, v6) = (node.ipv4().to_string(), node.ipv6().to_string());
    let told = policy(&node)?;
    println!("{told}");
    println!("{}", String::from_utf8_lossy(&node.sluice_output(&["status"])?.stdout));
    ensure!(
        word(&told, "masquerade") == "kube-proxy" && word(&told, "detect_local") == "node-cidr",
        "{told}"
    );
    ensure!(word(&told, "nodeport_addresses") == "primary,localhost,10.0.0.0/8", "{told}");
    ensure!(told.get("primary") == Some(&json!([v4, v6])), "{told}");
    ensure!(told.get("left_alone") == Some(&json!(["10.96.0.77"])), "{told}");
    let serving = |told: &Value| told.get("serving").cloned().unwrap_or_default().to_string();
    ensure!(serving(&told).contains(&v4) && !serving(&told).contains("10.96.0.77"), "{told}");
    ensure!(serving(&told).contains("127.0.0.1") && serving(&told).contains("\"::1\""), "{told}");
    let settings = dump(&node, "settings")?;
    let settings = settings.first().map(|(_, value)| value).context("no settings")?;
    ensure!(
        ["masquerade", "detect_local", "networks"].map(|field| number(settings, field))
            == [1, 2, 1],
        "{settings}"
    );
    let networks = || -> Result<Value> {
        let networks = dump(&node, "networks_v4")?;
        networks.into_iter().next().map(|(_, value)| value).context("no networks")
    };
    let now = networks()?;
    ensure!(octets(&now, "/services/0/network") == json!([10, 96, 0, 0]), "{now}");
    ensure!(octets(&now, "/services/0/mask") == json!([255, 255, 0, 0]), "{now}");
    ensure!(octets(&now, "/services/1/network") == json!([255, 255, 255, 255]), "{now}");
    ensure!(octets(&now, "/pods/0/network") == json!([255, 255, 255, 255]), "{now}");

    // The Node object comes: its pods' networks, and another primary address.
    let object = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {}}}\nspec: {{podCIDRs: [\"{}\"]}}\n\
         status: {{addresses: [{{type: InternalIP, address: 198.51.100.9}}]}}\n",
        node.name(),
        node.pod_range()
    );
    cluster.manifests.write_text("node.yaml", &object)?;
    let pods = json!([
        10,
        244,
        node.pod_range().split('.').nth(2).and_then(|word| word.parse::<u8>().ok()),
        0
    ]);
    until("the node's pod networks in the map", || {
        Ok((octets(&networks()?, "/pods/0/network") == pods).then_some(()))
    })?;
    until("the Node's address as the primary one", || {
        let told = policy(&node)?;
        Ok((told.get("primary") == Some(&json!(["198.51.100.9", v6]))).then_some(()))
    })?;
    let masquerade = |role: u64| -> Result<Vec<Value>> {
        let devices = dump(&node, "devices")?;
        let of_role = devices.iter().filter(|(_, device)| number(device, "role") == role);
        Ok(of_role.map(|(_, device)| octets(device, "/masquerade_v4")).collect())
    };
    until("the devices' masquerade address", || {
        Ok((masquerade(2)?.iter().all(|octets| *octets == json!([198, 51, 100, 9]))).then_some(()))
    })?;
    reaches(&cluster.client, cluster_ip(WEB), &["near-1"], None)?;

    // An agent that ends leaves the ports that it found reserved to the next one. `cleanup` removes
    // only the ports that an agent entered.
    cluster.agent().stop()?;
    let last = policy(&node)?;
    ensure!(last.get("primary") == Some(&json!(["198.51.100.9", v6])), "{last}");
    ensure!(reserved(&node)? == "20000-29999", "{}", reserved(&node)?);
    let done = node.sluice(&["cleanup"])?;
    println!("{done}");
    ensure!(done.contains("20000-24999,25001-29999"), "{done}");
    ensure!(reserved(&node)? == "25000", "{}", reserved(&node)?);

    // A range that leaves no port free.
    node.sysctl("net/ipv4/ip_local_port_range", "61000 65535")?;
    let refused = node.sluice_output(&["agent", "--manifests", "/tmp"])?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && text.contains("leaves 0 ports"), "{text}");
    Ok(())
}
