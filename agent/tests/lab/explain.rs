//! The answers of `sluice explain` from the live maps, compared with what real packets show.

use std::net::{IpAddr, SocketAddr};

use crate::support::{
    Cluster, DNS, HTTP, Plan, WEB, addresses_of_client, addresses_of_pod, cluster_ip, external_ip,
    reaches, replies, skip, status, until, word,
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
    let count = |flows: &str| serde_json::from_str::<Vec<Value>>(flows).map(|flows| flows.len());
    ensure!(count(&before.1)? == count(&after.1)?, "{before:?} {after:?}");
    Ok(())
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
