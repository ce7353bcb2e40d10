//! Problems with objects of a real API server are reported on these objects, as Events.
//!
//! test-threads: 3

use std::time::Duration;

use crate::support::control_plane::NEWCOMER;
use crate::support::objects::Space;
use crate::support::view::{expect, status};
use crate::support::{Cluster, START, cluster, wait_for};
use serde_json::{Value, json};
use sluice_lab::Serve;

/// A flaw has to last for two seconds, and the nodes' attempts are spread over another eight.
const TOLD: Duration = Duration::from_secs(20);
/// Longer than any node waits with its report.
const QUIET: Duration = Duration::from_secs(12);

/// Returns the Events of a namespace that we have written.
fn events(cluster: &Cluster, namespace: &str) -> Result<Vec<Value>, String> {
    let path = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
    let list = cluster.plane.request("GET", &path, None).map_err(|error| format!("{error:#}"))?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    Ok(items.into_iter().filter(|event| event["reportingController"] == "sluice").collect())
}

/// Waits for exactly this many Events.
#[track_caller]
fn expect_events(cluster: &Cluster, namespace: &str, count: usize) -> Vec<Value> {
    wait_for(&format!("{count} Events"), TOLD, || {
        let events = events(cluster, namespace)?;
        if events.len() == count { Ok(events) } else { Err(format!("{events:?}")) }
    })
}

/// Waits until no agent reports a problem in a namespace.
#[track_caller]
fn expect_all_well(nodes: &[&sluice_lab::Node], namespace: &str) {
    for node in nodes {
        wait_for("no reports", TOLD, || {
            let status = status(node);
            let reports = status.pointer("/last/reports").and_then(Value::as_array);
            let own = reports.iter().copied().flatten().filter(|report| {
                report["level"] == "problem"
                    && report.to_string().contains(&format!("{namespace}/"))
            });
            let own: Vec<String> = own.map(ToString::to_string).collect();
            if own.is_empty() { Ok(()) } else { Err(own.join("\n")) }
        });
    }
}

#[test]
fn a_problem_is_reported_once_by_all_nodes_together_until_it_is_fixed() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "told");
    let nodes = [cluster.node("told-a"), cluster.node("told-b")];
    let _agents = nodes.each_ref().map(|node| cluster.agent(node));

    // Two Services claim one address. They may have been created in the same second, so that the
    // name decides.
    let claiming = |vip: &str| json!({"clusterIP": vip, "externalIPs": ["203.0.113.20"], "ports": [{"port": 80}]});
    space.service("a-first", &claiming("10.96.20.1"));
    space.service("b-second", &claiming("10.96.20.2"));
    // A slice that leads its Service to the Service itself.
    space.bare_service("loop", "10.96.20.3");
    space.slice("loop-1", "loop", 80, &["10.96.20.3"]);

    let told = expect_events(&cluster, "told", 2);
    let find = |reason: &str| {
        told.iter()
            .find(|event| event["reason"] == reason)
            .unwrap_or_else(|| panic!("{reason} in {told:?}"))
    };
    let lost = find("ClaimLost");
    let service =
        cluster.plane.request("GET", &space.path("services", "b-second"), None).expect("a Service");
    assert_eq!(lost["regarding"]["uid"], service["metadata"]["uid"], "{lost}");
    assert_eq!(lost["regarding"]["kind"], "Service", "{lost}");
    assert_eq!(lost["regarding"]["name"], "b-second", "{lost}");
    assert_eq!(lost["type"], "Warning", "{lost}");
    let instance = lost["reportingInstance"].as_str().unwrap_or_default();
    assert!(["told-a", "told-b"].contains(&instance), "{lost}");
    let note = lost["note"].as_str().unwrap_or_default();
    assert!(note.contains("203.0.113.20:80 TCP") && note.contains("told/a-first"), "{lost}");
    let looped = find("Loop");
    assert_eq!(looped["regarding"]["kind"], "EndpointSlice", "{looped}");
    assert_eq!(looped["regarding"]["name"], "loop-1", "{looped}");

    // Neither the other node nor time adds an Event.
    std::thread::sleep(QUIET);
    let later = events(&cluster, "told").expect("Events");
    assert_eq!(later, told, "one Event for what is wrong, whoever sees it");

    // The problem is fixed: deleted Events do not come back.
    space.edit("services", "b-second", &json!({"spec": {"externalIPs": null}}));
    let endpoints = json!({"endpoints": [{"addresses": ["10.244.99.1"]}]});
    space.edit("endpointslices", "loop-1", &endpoints);
    expect_all_well(&nodes.each_ref(), "told");
    let all = "/apis/events.k8s.io/v1/namespaces/told/events";
    let _ = cluster.plane.request("DELETE", all, None).expect("deleted");
    std::thread::sleep(QUIET);
    assert_eq!(events(&cluster, "told"), Ok(Vec::new()));

    // Then there is another problem, which is reported as well.
    space.service(
        "c-third",
        &json!({"clusterIP": "10.96.20.4", "externalIPs": ["203.0.113.20"], "ports": [{"port": 80}]}),
    );
    let third = expect_events(&cluster, "told", 1);
    assert_eq!(third.first().map(|event| &event["regarding"]["name"]), Some(&json!("c-third")));
}

#[test]
fn a_policy_that_leaves_no_endpoint_is_reported() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "policy");
    let node = cluster.node("policy");
    let _agent = cluster.agent(&node);
    space.service(
        "web",
        &json!({"clusterIP": "10.96.21.1", "internalTrafficPolicy": "Local", "ports": [{"port": 80}]}),
    );
    space.slice("web-1", "web", 8080, &["10.244.99.1"]);
    let told = expect_events(&cluster, "policy", 1);
    let event = told.first().expect("one");
    assert_eq!(
        (&event["reason"], &event["type"]),
        (&json!("NoLocalEndpoint"), &json!("Normal")),
        "{event}"
    );
    let note = event["note"].as_str().unwrap_or_default();
    assert!(
        note.starts_with("on node ") && note.contains("internalTrafficPolicy is Local"),
        "{event}"
    );
}

#[test]
fn a_health_check_that_cannot_be_answered_is_reported_by_its_node_as_by_kube_proxy() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "health");
    let node = cluster.node("health");
    let _taken = node.serve(Serve::Http, 30_999).expect("the port is taken");
    let _agent = cluster.agent(&node);
    space.service(
        "web",
        &json!({
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_999,
            "clusterIP": "10.96.23.1", "ports": [{"port": 80}],
        }),
    );
    let told = expect_events(&cluster, "health", 1);
    let event = told.first().expect("one");
    assert_eq!(event["reason"], "FailedToStartServiceHealthcheck", "{event}");
    assert_eq!(
        (&event["type"], &event["regarding"]["name"]),
        (&json!("Warning"), &json!("web")),
        "{event}"
    );
    // The other tests' nodes answer it.
    assert_eq!(event["reportingInstance"], "health", "{event}");
    assert!(event["note"].as_str().is_some_and(|note| note.contains("30999")), "{event}");
}

#[test]
fn an_agent_that_may_not_write_events_does_all_else() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "silent");
    let node = cluster.node("silent");
    cluster.plane.give_rights(NEWCOMER, &["services", "endpointslices", "nodes"]).expect("rights");
    let mut agent = cluster.start_agent(&node, NEWCOMER, &["--verbose"]);
    agent.wait_ready(START).expect("ready");
    space.bare_service("loop", "10.96.22.1");
    for slice in ["loop-1", "loop-2", "loop-3"] {
        space.slice(slice, "loop", 80, &["10.96.22.1"]);
    }
    let refused = "DEBUG cannot write an Event: ";
    wait_for("a line in the log", TOLD, || {
        if agent.log().contains(refused) { Ok(()) } else { Err(agent.log()) }
    });
    std::thread::sleep(QUIET);
    let log = agent.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("an Event")).collect();
    assert!(matches!(&*lines, [line] if line.contains("forbidden")), "one for all: {lines:#?}");
    space.slice("good", "loop", 8080, &["10.244.99.1"]);
    expect(&node, "silent", &[("10.96.22.1:80", &["10.244.99.1:8080"])]);
    // The agents of the other tests see the same problem, and may report it.
    let written = events(&cluster, "silent").expect("Events");
    assert!(written.iter().all(|event| event["reportingInstance"] != "silent"), "{written:?}");
    assert_eq!(status(&node).pointer("/ready"), Some(&json!(true)));
}
