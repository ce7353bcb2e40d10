//! `sluice diff` against a real API server.

use std::time::Duration;

use crate::support::objects::Space;
use crate::support::view::expect;
use crate::support::{cluster, wait_for};
use serde_json::Value;
use sluice_lab::Node;

/// Returns the exit code, the report, and the output on standard error.
fn diff(node: &Node, args: &[&str]) -> (Option<i32>, Value, String) {
    let args: Vec<&str> = ["diff", "-o", "json"].iter().chain(args).copied().collect();
    let output = node.sluice_output(&args).expect("started");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default(), said)
}

#[test]
fn the_servers_objects_are_in_the_maps_and_a_difference_is_repaired() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "diff");
    let node = cluster.node("diff");
    space.bare_service("web", "10.96.6.1");
    space.slice("web-a", "web", 8080, &["10.244.99.1"]);
    let mut agent = cluster.agent(&node);
    expect(&node, "diff", &[("10.96.6.1:80", &["10.244.99.1:8080"])]);
    // The command uses the agent's own flags: its kubeconfig and its name.
    wait_for("the maps to be in step", Duration::from_secs(10), || match diff(&node, &[]) {
        (Some(0), _, _) => Ok(()),
        other => Err(format!("{other:?}")),
    });

    agent.stop().expect("stopped");
    space.slice("web-b", "web", 8080, &["10.244.99.2"]);
    space.bare_service("late", "10.96.6.2");
    let (code, report, said) = diff(&node, &[]);
    let text = report.to_string();
    assert_eq!(code, Some(1), "{report} {said}");
    assert!(text.contains("10.96.6.2:80 TCP") && text.contains("10.244.99.2:8080"), "{report}");
    let (code, report, said) = diff(&node, &["--repair"]);
    assert_eq!(code, Some(0), "{report} {said}");
    expect(
        &node,
        "diff",
        &[("10.96.6.1:80", &["10.244.99.1:8080", "10.244.99.2:8080"]), ("10.96.6.2:80", &[])],
    );

    cluster.plane.kill_server().expect("killed");
    let (code, _, said) = diff(&node, &[]);
    assert!(code == Some(2) && said.contains("at the API server failed"), "{code:?} {said}");
    cluster.plane.start_server(&[]).expect("the server is back");
}
