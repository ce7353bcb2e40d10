//! `sluice plan` and what `sluice validate` finds beyond refused objects, as people run them.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::explain::{check, sluice};

const NOW: &str = "
apiVersion: v1
kind: Node
metadata: {name: a}
status: {addresses: [{type: InternalIP, address: 192.0.2.10}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, creationTimestamp: \"2026-01-01T00:00:00Z\"}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  externalIPs: [198.51.100.77]
  ports: [{name: http, port: 80, nodePort: 30080}]
status: {loadBalancer: {ingress: [{ip: 198.51.100.1}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.1.1], nodeName: a}, {addresses: [10.244.2.1], nodeName: b}]
";

/// Plans a change of the manifests, words for others; the exit code and the answer.
fn plan(folder: &Path, changes: &[(&str, &str)]) -> (Option<i32>, Value) {
    fs::write(folder.join("now.yaml"), NOW).expect("written");
    let new = changes.iter().fold(NOW.to_owned(), |text, (old, new)| {
        assert!(text.contains(old), "{old:?}");
        text.replace(old, new)
    });
    fs::write(folder.join("new.yaml"), new).expect("written");
    let words = ["plan", "-f", "new.yaml", "--manifests", "now.yaml", "-o", "json"];
    let output = sluice(folder, &words);
    let answer: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    check(&answer);
    (output.status.code(), answer)
}

/// The changes in words: `loses changed 10.96.0.10:80: what`.
fn words(answer: &Value) -> Vec<String> {
    let changes = answer["changes"].as_array().into_iter().flatten();
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    changes
        .map(|change| {
            let loses = if change["loses"] == true { "loses " } else { "" };
            let what: Vec<String> =
                change["what"].as_array().into_iter().flatten().map(word).collect();
            format!(
                "{loses}{} {}: {}",
                word(&change["how"]),
                word(&change["frontend"]),
                what.join("; ")
            )
        })
        .collect()
}

#[test]
fn a_plan_names_every_frontend_that_changes_and_who_loses_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let plan = |changes: &[(&str, &str)]| plan(folder.path(), changes);
    let (code, answer) = plan(&[]);
    assert_eq!((code, words(&answer)), (Some(0), Vec::new()));

    // An endpoint more changes answers; nobody loses.
    let (code, answer) = plan(&[("endpoints: [", "endpoints: [{addresses: [10.244.3.1]}, ")]);
    let found = words(&answer);
    assert_eq!((code, found.len()), (Some(2), 4), "{answer}");
    assert!(
        found.iter().all(|line| line.ends_with("clients: +10.244.3.1:8080, now 3 endpoints")),
        "{found:?}"
    );

    // Local: clients outside have the endpoint here alone.
    let (code, answer) =
        plan(&[("  type: LoadBalancer", "  type: LoadBalancer\n  externalTrafficPolicy: Local")]);
    let found = words(&answer);
    assert_eq!((code, found.len()), (Some(2), 3), "{answer}");
    assert!(found[0].contains("clients outside: -10.244.2.1:8080, now 1 endpoint"), "{found:?}");
    assert!(found[0].contains("now keep their source"), "{found:?}");

    // What is gone, what nobody answers and what is closed is lost.
    for (changes, count, lost) in [
        (
            &[("externalIPs: [198.51.100.77]", "externalIPs: []")][..],
            1,
            "loses removed 198.51.100.77:80",
        ),
        (&[("nodePort: 30080", "nodePort: 30081")], 2, "loses removed *:30080"),
        (&[("port: 80,", "port: 81,")], 7, "loses removed 10.96.0.10:80"),
        (
            &[("name: http, port: 8080", "name: web, port: 8080")],
            4,
            "loses changed 10.96.0.10:80: clients: refused",
        ),
        (
            &[("  clusterIP", "  loadBalancerSourceRanges: [203.0.113.0/24]\n  clusterIP")],
            1,
            "loses changed 198.51.100.1:80: open to 203.0.113.0/24, was to everybody",
        ),
    ] {
        let (code, answer) = plan(changes);
        let found = words(&answer);
        assert_eq!((code, found.len()), (Some(3), count), "{changes:?}: {found:?}");
        assert_eq!(answer["loses"], true);
        assert!(found.iter().any(|line| line.starts_with(lost)), "{changes:?}: {found:?}");
    }

    // A Service that claims what another one has gets nothing, and takes nothing.
    let thief = [
        (
            "name: web, namespace: shop, creationTimestamp: \"2026-01-01T00:00:00Z\"",
            "name: thief, namespace: shop",
        ),
        ("clusterIP: 10.96.0.10", "clusterIP: 10.96.0.66"),
        ("nodePort: 30080", "nodePort: 30066"),
        ("service-name: web", "service-name: thief"),
        ("name: web-1", "name: thief-1"),
        ("198.51.100.1}", "198.51.100.66}"),
    ];
    let (code, answer) = plan(&thief);
    assert_eq!((code, words(&answer).len()), (Some(2), 3), "{answer}");
    let problems = answer["problems"].as_array().expect("a list");
    assert!(
        problems
            .iter()
            .any(|row| row["flaw"] == "claim_lost" && row["object"] == "Service shop/thief"),
        "{answer}"
    );

    let text = |words: &[&str]| {
        let output = sluice(folder.path(), words);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (_, read) = text(&["plan", "-f", "new.yaml", "--manifests", "now.yaml"]);
    assert!(
        read.contains("+   10.96.0.66:80 TCP") && read.contains("nobody loses service"),
        "{read}"
    );
    assert!(read.lines().all(|line| line.chars().count() <= 80), "{read}");
    let output =
        sluice(folder.path(), &["plan", "-f", "new.yaml", "--pin-path", "/nonexistent/pins"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("give --manifests DIR"), "{error}");
}

#[test]
fn validation_finds_what_refers_to_nothing_and_what_has_no_effect() {
    let folder = tempfile::tempdir().expect("a folder");
    let findings = |changes: &[(&str, &str)]| {
        let text = changes.iter().fold(NOW.to_owned(), |text, (old, new)| {
            assert!(text.contains(old), "{old:?}");
            text.replace(old, new)
        });
        fs::write(folder.path().join("now.yaml"), text).expect("written");
        let output = sluice(folder.path(), &["validate", ".", "-o", "json"]);
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        check(&answer);
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let rows = answer["items"].as_array().into_iter().flatten();
        let rows = rows.map(|row| {
            format!("{} {} {}", word(&row["kind"]), word(&row["flaw"]), word(&row["field"]))
        });
        (output.status.code(), rows.collect::<Vec<String>>())
    };
    let said = "warning external_ip spec.externalIPs[0]";
    assert_eq!(findings(&[]), (Some(0), vec![said.to_owned()]));
    for (old, new, code, finding) in [
        (
            "  type: LoadBalancer",
            "  type: LoadBalancer\n  affinity: ClientIP",
            0,
            "warning unknown_field spec.affinity",
        ),
        ("  ports: [{", "  port: [{", 1, "refused unmatched_port spec.ports"),
        ("service-name: web", "service-name: wbe", 1, "refused no_service "),
        ("service-name: web", "service-name: wbe", 1, "warning no_endpoints "),
        (
            "name: http, port: 80,",
            "name: wbe, port: 80,",
            1,
            "refused unmatched_port spec.ports[0].name",
        ),
        (
            "creationTimestamp",
            "annotations: {sluice.dev/x: y}, creationTimestamp",
            0,
            "warning unknown_annotation metadata.annotations[sluice.dev/x]",
        ),
        // Served with a default: that is not refused.
        (
            "  type: LoadBalancer",
            "  type: LoadBalancer\n  externalTrafficPolicy: Nearby",
            0,
            "warning bad_value spec.externalTrafficPolicy",
        ),
    ] {
        let (found, rows) = findings(&[(old, new)]);
        assert_eq!(found, Some(code), "{new}: {rows:?}");
        assert!(rows.iter().any(|row| row == finding), "{new}: no {finding:?} in {rows:?}");
    }
}
