//! The answers of `sluice explain` from the live maps, compared with what real packets show.

use std::net::{IpAddr, SocketAddr};

use crate::support::{
    Cluster, DNS, HTTP, Plan, SOON, WEB, addresses_of_client, addresses_of_pod, cluster_ip,
    external_ip, follows_the_schema, listed, reaches, replies, skip, status, until, word,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_lab::Node;

/// Runs the command on the node. Returns the exit code and the answer.
fn ask(node: &Node, words: &str) -> Result<(i32, Value)> {
    let words: Vec<&str> =
        ["explain"].into_iter().chain(words.split(' ')).chain(["-o", "json"]).collect();
    let output = node.sluice_output(&words)?;
    let answer = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{words:?}: {}", String::from_utf8_lossy(&output.stderr)))?;
    follows_the_schema(&answer)?;
    Ok((output.status.code().unwrap_or(-1), answer))
}

#[test]
fn the_backend_that_explain_names_is_the_one_that_answers() -> Result<()> {
    if skip("the_backend_that_is_told") {
        return Ok(());
    }
    let plan = Plan { near: 2, far: 1, args: vec!["--socket-path", "off"], ..Plan::default() };
    let cluster = Cluster::new("explain", &plan)?;
    let node = cluster.node();
    let pods = addresses_of_pod(&cluster.client);
    let clients = addresses_of_client(&cluster.outside);
    let (inside, outside) = (cluster_ip(WEB), external_ip(WEB));
    for (vip, client, from) in inside
        .iter()
        .zip(&pods)
        .map(|(vip, client)| (vip, client, "pod"))
        .chain(outside.iter().zip(&clients).map(|(vip, client)| (vip, client, "external")))
    {
        for port in 4001..4005 {
            let (source, destination) =
                (SocketAddr::new(*client, port), SocketAddr::new(*vip, DNS));
            let words = format!("udp {source} {destination} --from {from}");
            let (code, told) = ask(node, &words)?;
            ensure!(code == 0 && word(&told, "verdict") == "forward", "{words}: {told}");
            let at: IpAddr = word(&told["backend"], "address").parse()?;
            let name = cluster.backends.iter().find(|pod| addresses_of_pod(pod).contains(&at));
            let name = name.with_context(|| format!("{words}: {told}"))?.name();

            let (to, port) = (destination.to_string(), port.to_string());
            let asked = ["udp-client", "--count=1", "--to", &to, "--source-port", &port];
            let events = if from == "pod" {
                cluster.client.ask(asked)?
            } else {
                cluster.outside.ask(asked)?
            };
            let answers = replies(events)?;
            let reply = answers.first().context("an answer")?;
            ensure!(reply.name == name, "{words}: {} answered instead of {name}", reply.name);
            let kept = reply.seen.ip() == *client;
            ensure!(kept == (word(&told, "source") == "kept"), "{words}: {reply:?}: {told}");

            // The answer now names the known flow, and leads to the same backend.
            let (_, again) = ask(node, &words)?;
            let steps = again["steps"].as_array().cloned().unwrap_or_default();
            ensure!(steps.iter().any(|step| word(step, "step") == "flow"), "{words}: {again}");
            ensure!(
                again["backend"] == told["backend"] && again["source"] == told["source"],
                "{words}: {again}"
            );
        }
    }
    Ok(())
}

#[test]
fn explain_leaves_no_trace_and_assumed_objects_change_nothing() -> Result<()> {
    if skip("a_look_leaves_no_trace") {
        return Ok(());
    }
    let cluster = Cluster::new("explain-look", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node();
    reaches(&cluster.client, cluster_ip(WEB), &cluster.names(), None)?;
    let before = (status(node)?["reasons"].clone(), node.sluice(&["flows", "-o", "json"])?);
    let [pod, _] = addresses_of_pod(&cluster.client);
    let [vip, _] = cluster_ip(WEB);
    let words = format!("tcp {}", SocketAddr::new(pod, 4001));
    let web = SocketAddr::new(vip, HTTP);
    let (code, told) = ask(node, &format!("{words} {web} --from pod"))?;
    ensure!(code == 0 && word(&told["socket"], "reason") == "socket_connect", "{told}");
    let (code, told) = ask(node, &format!("{words} {} --from pod", SocketAddr::new(vip, 4)))?;
    ensure!(code == 3 && word(&told, "reason") == "undefined_port", "{told}");

    // A Service that is replaced by one without endpoints.
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: default}}\nspec: {{clusterIP: {vip}, ports: [{{name: http, port: {HTTP}}}]}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-1, namespace: default, labels: {{kubernetes.io/service-name: web}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: 80}}]\nendpoints: []\n"
    );
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("web.yaml");
    std::fs::write(&file, &text)?;
    let asked = format!("{words} {web} --from pod --what-if {}", file.display());
    let (code, both) = ask(node, &asked)?;
    ensure!(code == 3, "{both}");
    ensure!(word(&both["before"], "verdict") == "forward", "{both}");
    ensure!(word(&both["after"], "reason") == "no_backend_reset", "{both}");
    let (service, _) = text.split_once("---").context("two documents")?;
    std::fs::write(&file, service)?;
    let words: Vec<&str> = ["explain"].into_iter().chain(asked.split(' ')).collect();
    let output = node.sluice_output(&words)?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && error.contains("without its EndpointSlices"),
        "{error}"
    );

    let after = (status(node)?["reasons"].clone(), node.sluice(&["flows", "-o", "json"])?);
    ensure!(before.0 == after.0, "{before:?} {after:?}");
    let count = |flows: &str| {
        let flows: Value = serde_json::from_str(flows)?;
        anyhow::Ok(flows["items"].as_array().map(Vec::len))
    };
    ensure!(count(&before.1)? == count(&after.1)?, "{before:?} {after:?}");
    Ok(())
}

/// A Service with a label, without endpoints, and the client's Pod.
fn named(cluster: &Cluster) -> String {
    let [client, client6] = addresses_of_pod(&cluster.client);
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: client, namespace: shop}}\n\
         spec: {{nodeName: {}}}\n\
         status: {{phase: Running, podIPs: [{{ip: \"{client}\"}}, {{ip: \"{client6}\"}}]}}\n---\n\
         apiVersion: v1\nkind: Service\n\
         metadata: {{name: empty, namespace: shop, labels: {{tier: back}}}}\n\
         spec: {{clusterIP: 10.96.7.7, ports: [{{port: 80}}]}}\n",
        cluster.node().name()
    )
}

#[test]
fn names_stand_for_addresses_and_lists_are_as_kubectls() -> Result<()> {
    if skip("names_stand_for_addresses") {
        return Ok(());
    }
    let cluster = Cluster::new("names", &Plan { near: 1, far: 1, ..Plan::default() })?;
    let node = cluster.node();
    cluster.manifests.write_text("named.yaml", &named(&cluster))?;
    let said = |words: &str| {
        let output = node.sluice_output(&words.split(' ').collect::<Vec<_>>())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        anyhow::Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
    };
    until("the Service in the maps", || {
        Ok(said("services -n shop -o name")?.1.contains("service/shop/empty:80").then_some(()))
    })?;

    let (code, told) = ask(node, "pod/shop/client svc/web:http")?;
    ensure!(code == 0 && word(&told["socket"], "verdict") == "forward", "{told}");
    let far = cluster.backends.last().context("a backend on the other node")?.name().to_owned();
    let outside = addresses_of_client(&cluster.outside)[0];
    for (words, why) in [
        (format!("pod/{far} svc/web:http"), "whose own maps decide about its packets"),
        ("pod/shop/nosuch svc/web:http".to_owned(), "there is no pod shop/nosuch"),
        (format!("{outside}:1 svc/web:http --from pod"), "which leads off the node"),
        (format!("{outside}:1 svc/web:http --from host"), "no device of this node has"),
    ] {
        let (code, text, error) = said(&format!("explain {words}"))?;
        ensure!(code == Some(1) && text.is_empty() && error.contains(why), "{words}: {error}");
    }

    let rows = listed(node, &["backends", "web:http"])?;
    let of_far = rows.iter().filter(|row| word(row, "pod") == format!("default/{far}"));
    ensure!(of_far.count() == 2, "a backend of each family: {rows:?}");
    let (_, wide, _) = said("backends web:http -o wide --no-headers")?;
    ensure!(wide.contains(&format!("default/{far}")) && !wide.contains("SERVICE"), "{wide}");
    let (_, labelled, _) = said("services -l tier=back -o jsonpath={.items[*].service}")?;
    ensure!(labelled == "empty", "{labelled:?}");
    let (code, text, error) = said("services nosuch -n shop")?;
    ensure!(
        (code, text.as_str(), error.as_str())
            == (Some(0), "", "No resources found in shop namespace.\n"),
        "{error}"
    );

    // A plan against the live node: the same objects change nothing, fewer addresses cut off.
    let same = format!("plan -f {}", cluster.manifests.directory().display());
    let (code, text, error) = said(&same)?;
    ensure!(code == Some(0) && text == "No frontend changes.\n", "{text}{error}");
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("web.yaml");
    let [vip, _] = cluster_ip(WEB);
    let less = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: default}}\n\
         spec: {{clusterIP: {vip}, ports: [{{name: http, port: {HTTP}}}]}}\n"
    );
    std::fs::write(&file, less)?;
    let (code, text, error) = said(&format!("plan -f {} -o json", file.display()))?;
    ensure!(code == Some(3), "{text}{error}");
    let plan: Value = serde_json::from_str(&text)?;
    follows_the_schema(&plan)?;
    let lost = plan["changes"].as_array().into_iter().flatten();
    let lost = lost.filter(|change| word(change, "how") == "removed" && change["loses"] == true);
    ensure!(lost.count() > 1 && plan["loses"] == true, "{plan}");

    // A watch prints the row again when it has changed.
    let args = ["services", "web:http", "-w", "-o", "jsonpath={.connections} "];
    let mut watch = node.spawn_command(node.sluice_command(&args)?)?;
    watch
        .wait_until("the first rows", SOON, |this| this.stdout().contains("0 0 ").then_some(()))?;
    reaches(&cluster.client, cluster_ip(WEB), &cluster.names(), None)?;
    reaches(&cluster.client, cluster_ip(WEB), &cluster.names(), None)?;
    watch.wait_until("changed rows", SOON, |this| {
        this.stdout().split(' ').any(|count| count != "0" && !count.is_empty()).then_some(())
    })
}

#[test]
fn explain_reports_that_a_virtual_machines_port_changes() -> Result<()> {
    if skip("a_virtual_machines_port") {
        return Ok(());
    }
    let cluster = Cluster::new("explain-vm", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node();
    let _ = node.ip(
        "link add vms type bridge\nlink set vms up\ntuntap add tap0 mode tap\nlink set tap0 master vms up",
    )?;
    until("tap0 is an edge", || {
        let is_it =
            |device: &Value| word(device, "name") == "tap0" && word(device, "role") == "edge";
        let devices = status(node)?["devices"].as_array().cloned().unwrap_or_default();
        Ok(devices.iter().any(is_it).then_some(()))
    })?;
    let pods = addresses_of_pod(&cluster.client);
    for (pod, vip) in pods.iter().zip(cluster_ip(WEB)) {
        let source = SocketAddr::new(*pod, 40_001);
        for (protocol, port, changes) in [("tcp", HTTP, true), ("udp", DNS, false)] {
            let asked = format!("{protocol} {source} {}", SocketAddr::new(vip, port));
            let new = format!("source {source} becomes {}", before_port(*pod));
            for (device, changes) in [(" --device tap0", changes), ("", false)] {
                let words = format!("{asked} --from pod{device}");
                let (code, told) = ask(node, &words)?;
                let says = told["steps"].to_string().contains(&new);
                ensure!(code == 0 && says == changes, "{words}: {told}");
            }
        }
    }
    Ok(())
}

/// Returns an address in the form that precedes a port.
fn before_port(address: IpAddr) -> String {
    if address.is_ipv4() { format!("{address}:") } else { format!("[{address}]:") }
}
