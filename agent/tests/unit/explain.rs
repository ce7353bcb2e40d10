//! `sluice explain` and `sluice validate` as people run them: the real binary, manifests, exit
//! codes.
//!
//! The table is kube-proxy's: which endpoints each kind of client may reach, in both ways to
//! masquerade. What people read is compared with files in `explain/`; `SLUICE_BLESS=1 cargo test`
//! rewrites them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use serde_json::Value;
use sluice::tools::explain::{
    Client, Manifests, NamedDevice, Options, Question, Routing, Supposed, Verdict, Way, explain,
};
use sluice_common::abi::{Ipv4Address, RejectBucket, Tuple, phase};
use sluice_core::model::object::Protocol;

/// Runs the binary in a folder.
pub(crate) fn sluice(folder: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(words)
        .current_dir(folder)
        .env_remove("NODE_NAME")
        .env_remove("SLUICE_PIN_PATH")
        .env_remove("COLUMNS")
        .output()
        .expect("the binary runs")
}

/// Runs the command with these words. Returns the exit code and the answer.
fn ask(folder: &Path, words: &str) -> (i32, Value) {
    let words: Vec<&str> =
        ["explain"].into_iter().chain(words.split(' ')).chain(["-o", "json"]).collect();
    let output = sluice(folder, &words);
    let code = output.status.code().expect("it ends by itself");
    let answer = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("{words:?}: {error}: {}", String::from_utf8_lossy(&output.stderr))
    });
    check(&answer);
    (code, answer)
}

/// Holds an answer against docs/schema.json.
pub(crate) fn check(answer: &Value) {
    let checked = sluice_lab::schema::check(&sluice::tools::api::schema(), answer);
    assert_eq!(checked, Ok(()), "{answer}");
}

/// Returns an answer in one line: `forward 10.244.1.1 10.244.2.2 kept`, `drop no_local_backend`.
fn line((code, answer): &(i32, Value)) -> String {
    let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let verdict = word(&answer["verdict"]);
    let expected_code = match verdict.as_str() {
        "reject" => 3,
        "drop" => 4,
        _ => 0,
    };
    assert_eq!(*code, expected_code, "{answer}");
    if verdict != "forward" {
        assert_eq!(answer["backend"], Value::Null);
        assert_eq!(answer["source"], Value::Null);
        assert_eq!(answer["candidates"], Value::Array(Vec::new()));
        return format!("{verdict} {}", word(&answer["reason"]));
    }
    let candidates = answer["candidates"].as_array().expect("a list");
    let shares: f64 = candidates.iter().filter_map(|candidate| candidate["share"].as_f64()).sum();
    assert!((shares - 1.0).abs() < 1e-9, "{answer}");
    let addresses: Vec<String> =
        candidates.iter().map(|candidate| word(&candidate["address"])).collect();
    assert!(addresses.contains(&word(&answer["backend"]["address"])), "{answer}");
    format!("{verdict} {} {}", addresses.join(" "), word(&answer["source"]))
}

/// Writes manifests for endpoints in words, each `STATE` with `L` (local), `z` (hinted for our
/// zone) or `y` (for another).
fn manifests(endpoints: &str, internal: &str, external: &str) -> String {
    let mut text = format!(
        "apiVersion: v1
kind: Node
metadata: {{name: node-a, labels: {{topology.kubernetes.io/zone: z}}}}
status: {{addresses: [{{type: InternalIP, address: 192.0.2.10}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  externalIPs: [198.51.100.9]
  internalTrafficPolicy: {internal}
  externalTrafficPolicy: {external}
  ports: [{{name: http, port: 80, nodePort: 30080}}]
status: {{loadBalancer: {{ingress: [{{ip: 198.51.100.1}}]}}}}
"
    );
    for (index, endpoint) in endpoints.split_whitespace().enumerate() {
        let has = |letter| endpoint.contains(letter);
        let number = index + 1;
        let (net, node) = if has('L') { (1, "node-a") } else { (2, "node-b") };
        // A state that begins with a number belongs to the endpoint of that number.
        let host = endpoint
            .chars()
            .next()
            .and_then(|first| first.to_digit(10))
            .map_or(number, |of| of as usize);
        let (ready, serving, terminating) = (has('R'), has('R') || has('T'), has('T'));
        let hints = match (has('z'), has('y')) {
            (true, _) => ", hints: {forZones: [{name: z}]}",
            (_, true) => ", hints: {forZones: [{name: y}]}",
            _ => "",
        };
        let port = if has('-') { "{name: http}" } else { "{name: http, port: 8080}" };
        write!(
            text,
            "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web-{number}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}
addressType: IPv4
ports: [{port}]
endpoints:
- addresses: [10.244.{net}.{host}]
  nodeName: {node}
  conditions: {{ready: {ready}, serving: {serving}, terminating: {terminating}}}{}
",
            hints.replace(", hints", "\n  hints")
        )
        .expect("written");
    }
    text
}

/// Endpoints and policies -> the fate of a local pod at the ClusterIP, and of a client outside at
/// external addresses.
struct Vector {
    number: u32,
    endpoints: &'static str,
    internal: &'static str,
    external: &'static str,
    cluster_ip: &'static str,
    outside: &'static str,
}

const fn vector(
    number: u32,
    endpoints: &'static str,
    internal: &'static str,
    external: &'static str,
    cluster_ip: &'static str,
    outside: &'static str,
) -> Vector {
    Vector { number, endpoints, internal, external, cluster_ip, outside }
}

const VECTORS: [Vector; 13] = [
    vector(1, "R RL", "Cluster", "Cluster", "10.244.1.2 10.244.2.1", "10.244.1.2 10.244.2.1"),
    vector(2, "R", "Local", "Cluster", "drop no_local_backend", "10.244.2.1"),
    vector(3, "R", "Cluster", "Local", "10.244.2.1", "drop no_local_backend"),
    vector(4, "TL R", "Cluster", "Local", "10.244.2.2", "10.244.1.1"),
    vector(5, "TL", "Cluster", "Local", "10.244.1.1", "10.244.1.1"),
    vector(6, "U", "Cluster", "Local", "reject no_backend_reset", "reject no_backend_reset"),
    vector(7, "Rz Ry", "Cluster", "Cluster", "10.244.2.1", "10.244.2.1"),
    vector(8, "Rz R", "Cluster", "Cluster", "10.244.2.1 10.244.2.2", "10.244.2.1 10.244.2.2"),
    vector(9, "Ry Ry", "Cluster", "Cluster", "10.244.2.1 10.244.2.2", "10.244.2.1 10.244.2.2"),
    vector(10, "Ry Tz", "Cluster", "Cluster", "10.244.2.1", "10.244.2.1"),
    vector(11, "RLy Rz", "Local", "Cluster", "10.244.1.1", "10.244.2.2"),
    vector(12, "1R 1T", "Cluster", "Cluster", "10.244.2.1", "10.244.2.1"),
    vector(13, "R-", "Cluster", "Cluster", "reject no_backend_reset", "reject no_backend_reset"),
];

const KUBE_PROXY: &str = "--masquerade kube-proxy --cluster-cidr 10.244.0.0/16";

#[test]
fn kube_proxys_vectors_hold_in_both_modes() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut failures = String::new();
    for vector in VECTORS {
        let Vector { number, endpoints, internal, external, cluster_ip, outside } = vector;
        fs::write(folder.path().join("all.yaml"), manifests(endpoints, internal, external))
            .expect("written");
        for mode in ["", KUBE_PROXY] {
            let question = |words: &str| {
                let flags = if mode.is_empty() { String::new() } else { format!(" {mode}") };
                ask(folder.path(), &format!("{words} --manifests . --node node-a{flags}"))
            };
            let mut expect = |words: &str, expected: &str, source: &str| {
                let answer = question(words);
                let found = line(&answer);
                let expected = if expected.contains(' ') && !expected.starts_with("10.") {
                    expected.to_owned()
                } else {
                    // By default we keep the source if the backend is on this node.
                    let local = answer.1["backend"]["address"]
                        .as_str()
                        .is_some_and(|at| at.starts_with("10.244.1."));
                    let source = if source == "by backend" && local { "kept" } else { source };
                    format!("forward {expected} {}", source.replace("by backend", "masqueraded"))
                };
                if found != expected {
                    let _ = writeln!(
                        failures,
                        "{number} {mode} {words}: {found} instead of {expected}"
                    );
                }
            };
            expect("tcp 10.244.1.99:4000 10.96.0.10:80 --from pod", cluster_ip, "kept");
            let source = match (external, mode) {
                ("Local", _) => "kept",
                (_, "") => "by backend",
                _ => "masqueraded",
            };
            for address in ["192.0.2.10:30080", "198.51.100.1:80", "198.51.100.9:80"] {
                expect(&format!("tcp 203.0.113.7:4000 {address} --from external"), outside, source);
            }
        }
    }
    assert!(failures.is_empty(), "{failures}");
}

#[test]
fn a_local_pod_and_the_host_are_not_bound_by_the_external_policy() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("all.yaml"), manifests("R", "Cluster", "Local")).expect("written");
    for mode in ["", KUBE_PROXY] {
        let question = |words: &str| {
            let flags = if mode.is_empty() { String::new() } else { format!(" {mode}") };
            line(&ask(folder.path(), &format!("{words} --manifests . --node node-a{flags}")))
        };
        for address in ["192.0.2.10:30080", "198.51.100.1:80", "198.51.100.9:80"] {
            let pod = question(&format!("tcp 10.244.1.99:4000 {address} --from pod"));
            assert_eq!(pod, "forward 10.244.2.1 kept", "{mode} {address}");
            let host = question(&format!("tcp 192.0.2.10:4000 {address} --from host"));
            assert_eq!(host, "forward 10.244.2.1 masqueraded", "{mode} {address}");
        }
    }
}

#[test]
fn a_client_that_is_its_own_backend_is_masqueraded() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("all.yaml"), manifests("RL", "Cluster", "Cluster"))
        .expect("written");
    for mode in ["", KUBE_PROXY] {
        for (client, address) in [
            ("10.244.1.1:4000", "10.96.0.10:80 --from pod"),
            ("10.244.1.1:4000", "198.51.100.1:80 --from pod"),
        ] {
            let flags = if mode.is_empty() { String::new() } else { format!(" {mode}") };
            let words = format!("tcp {client} {address} --manifests . --node node-a{flags}");
            assert_eq!(
                line(&ask(folder.path(), &words)),
                "forward 10.244.1.1 masqueraded",
                "{words}"
            );
        }
    }
}

#[test]
fn a_process_of_the_host_is_masqueraded_at_a_cluster_ip_as_kube_proxy_would() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("all.yaml"), manifests("R", "Cluster", "Cluster"))
        .expect("written");
    for (flags, source) in [
        ("", "kept"),
        (" --cluster-cidr 10.244.0.0/16", "masqueraded"),
        (" --masquerade kube-proxy", "kept"),
        (" --masquerade kube-proxy --detect-local device", "masqueraded"),
        (" --masquerade all", "masqueraded"),
    ] {
        let words = format!("tcp 192.0.2.10:4000 10.96.0.10:80 --from host --manifests .{flags}");
        let answer = ask(folder.path(), &words);
        assert_eq!(answer.1["source"], source, "{words}");
        assert_eq!(answer.1["socket"]["source"], source, "{words}");
        assert_eq!(answer.1["socket"]["backend"], Value::Null, "{words}");
    }
}

#[test]
fn an_unassigned_service_address_is_dropped_on_its_way_out() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("all.yaml"), manifests("R", "Cluster", "Cluster"))
        .expect("written");
    for from in ["pod", "host", "external"] {
        let words = format!("tcp 203.0.113.7:4000 10.96.0.77:80 --from {from} --manifests .");
        assert_eq!(line(&ask(folder.path(), &words)), "pass stranger", "{words}");
        let words = format!("{words} --service-cidr 10.96.0.0/16");
        assert_eq!(line(&ask(folder.path(), &words)), "drop unassigned_address", "{words}");
    }
    // A client that is some Service's backend is dropped all the same.
    let words =
        "tcp 10.244.2.1:4000 10.96.0.77:80 --from pod --manifests . --service-cidr 10.96.0.0/16";
    assert_eq!(line(&ask(folder.path(), words)), "drop unassigned_address");
    let undefined =
        ask(folder.path(), "udp 10.244.1.99:4000 10.96.0.10:81 --from pod --manifests .");
    assert_eq!(line(&undefined), "reject undefined_port");
    assert_eq!(undefined.1["service"], "shop/web");
    assert_eq!(undefined.1["port"], Value::Null);
}

#[test]
fn source_ranges_and_affinity_show() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = manifests("R", "Cluster", "Cluster").replace(
        "  ports: [{name",
        "  loadBalancerSourceRanges: [203.0.113.0/24]\n  sessionAffinity: ClientIP\n  ports: [{name",
    );
    fs::write(folder.path().join("all.yaml"), text).expect("written");
    let ask = |words: &str| ask(folder.path(), &format!("{words} --manifests ."));
    let inside = ask("tcp 203.0.113.7:4000 198.51.100.1:80 --from external");
    assert_eq!(line(&inside), "forward 10.244.2.1 masqueraded");
    assert_eq!(inside.1["affinity"]["seconds"], 10_800);
    let outside = ask("tcp 203.0.114.7:4000 198.51.100.1:80 --from external");
    assert_eq!(line(&outside), "drop source_range");
    // Node ports and external IPs are not restricted.
    let node_port = ask("tcp 203.0.114.7:4000 192.0.2.10:30080 --from external");
    assert_eq!(line(&node_port), "forward 10.244.2.1 masqueraded");
    let pod = ask("tcp 10.244.1.9:4000 10.96.0.10:80 --from pod");
    let steps: Vec<&str> = pod.1["steps"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|step| step["step"].as_str())
        .collect();
    assert_eq!(
        steps,
        [
            "packet", "socket", "frontend", "client", "policy", "affinity", "slot", "backend",
            "rewrite", "source", "verdict"
        ]
    );
    assert_eq!(pod.1.get("socket"), None, "affinity goes by the client's address");
}

#[test]
fn every_field_of_the_contract_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("all.yaml"), manifests("R RL", "Cluster", "Cluster"))
        .expect("written");
    let (_, answer) =
        ask(folder.path(), "tcp 203.0.113.7:4000 192.0.2.10:30080 --from external --manifests .");
    let keys: BTreeSet<&str> =
        answer.as_object().expect("an object").keys().map(String::as_str).collect();
    let expected = [
        "affinity",
        "apiVersion",
        "backend",
        "candidates",
        "frontend",
        "kind",
        "port",
        "reason",
        "service",
        "source",
        "steps",
        "verdict",
    ];
    assert_eq!(keys, expected.into());
    let frontend = serde_json::json!({"kind": "NodePort", "address": "192.0.2.10", "port": 30080, "protocol": "TCP"});
    assert_eq!(answer["frontend"], frontend);
    assert_eq!(
        (&answer["service"], &answer["port"]),
        (&Value::from("shop/web"), &Value::from("http"))
    );
    assert_eq!(answer["candidates"].as_array().map(Vec::len), Some(2));
    let (_, stranger) =
        ask(folder.path(), "tcp 203.0.113.7:4000 192.0.2.99:80 --from external --manifests .");
    for key in ["service", "port", "frontend", "backend", "source", "affinity"] {
        assert_eq!(stranger.get(key), Some(&Value::Null), "{key}");
    }
}

#[test]
fn a_tuple_finds_the_same_backend_on_every_node() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("all.yaml"), manifests("R R R R R", "Cluster", "Cluster"))
        .expect("written");
    let mut backends = BTreeSet::new();
    for port in 4000..4010 {
        let words = format!("tcp 203.0.113.7:{port} 198.51.100.1:80 --from external --manifests .");
        let [one, other] = ["node-a", "node-c"].map(|node| {
            let answer =
                ask(folder.path(), &format!("{words} --node {node} --node-addresses 192.0.2.10")).1;
            answer["backend"]["address"].as_str().expect("an address").to_owned()
        });
        assert_eq!(one, other, "{words}");
        let _ = backends.insert(one);
    }
    assert!(backends.len() > 1, "{backends:?}");
}

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

#[test]
fn every_seed_is_explained_and_valid() {
    let seeds = tests().join("seeds");
    for (seed, protocol, address, candidates) in [
        ("hello.yaml", "tcp", "10.96.77.20:80", 2),
        ("exemple.yaml", "tcp", "10.96.77.21:80", 1),
        ("nginx-svc.yaml", "tcp", "10.233.26.39:80", 2),
        ("etcd-k8s.yaml", "tcp", "10.233.26.40:2379", 3),
        ("wordpress.yaml", "tcp", "10.100.200.174:80", 2),
        ("wordpress.yaml", "tcp", "100.64.144.7:80", 2),
        ("wordpress.yaml", "tcp", "192.168.160.115:80", 2),
        ("wordpress.yaml", "tcp", "192.0.2.10:31895", 2),
    ] {
        let words = format!(
            "{protocol} 203.0.113.7:4000 {address} --from external --manifests {seed} --node-addresses 192.0.2.10"
        );
        let (code, answer) = ask(&seeds, &words);
        assert_eq!(code, 0, "{words}: {answer}");
        assert_eq!(
            answer["candidates"].as_array().map(Vec::len),
            Some(candidates),
            "{words}: {answer}"
        );
        let output = sluice(&seeds, &["validate", seed]);
        assert_eq!(
            output.status.code(),
            Some(0),
            "{seed}: {}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
}

#[test]
fn ipv6_addresses_are_in_brackets() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = manifests("R", "Cluster", "Cluster")
        .replace("clusterIP: 10.96.0.10", "clusterIP: fd00:96::10")
        .replace("addressType: IPv4", "addressType: IPv6")
        .replace("10.244.2.1", "fd00:244::1");
    fs::write(folder.path().join("all.yaml"), text).expect("written");
    let answer =
        ask(folder.path(), "TCP [fd00:244::99]:4000 [fd00:96::10]:80 --from pod --manifests .");
    assert_eq!(line(&answer), "forward fd00:244::1 kept");
    // The node's IPv6 address is not known, so one is assumed.
    let words =
        "tcp [2001:db8::7]:4000 [fd00:96::10]:80 --from external --manifests . --masquerade all";
    assert_eq!(line(&ask(folder.path(), words)), "forward fd00:244::1 masqueraded");
}

#[test]
fn a_question_that_makes_no_sense_ends_with_code_2_and_what_is_wrong() {
    let folder = tempfile::tempdir().expect("a folder");
    for (words, why) in [
        ("tcp 10.0.0.1:1 --from pod", "\"tcp\": expected ADDRESS:PORT"),
        ("10.0.0.1:1 --from pod", "2 values required"),
        ("icmp 10.0.0.1:1 10.0.0.2:1 --from pod", "expected tcp, udp or sctp"),
        ("tcp 10.0.0.1 10.0.0.2:1 --from pod", "expected ADDRESS:PORT"),
        ("tcp 10.0.0.1:0 10.0.0.2:1 --from pod", "port 0 is not valid"),
        ("tcp fd00::1:1 10.0.0.2:1 --from pod", "expected ADDRESS:PORT"),
        (
            "tcp [fd00::1]:1 10.0.0.2:1 --from pod --manifests .",
            "are of different address families",
        ),
        ("tcp 10.0.0.1:1 10.0.0.2:1", "give --from pod, host or external"),
        ("tcp 10.0.0.1:1 10.0.0.2:1 --from moon", "possible values: pod, host, external"),
        ("tcp 10.0.0.1:1 10.0.0.2:1 --from external --path socket --manifests .", "makes no calls"),
        ("tcp 10.0.0.1:1 10.0.0.2:1 --from pod --cluster-cidr ten --manifests .", "--cluster-cidr"),
        (
            "tcp 10.0.0.1:1 10.0.0.2:1 --from pod --detect-local cluster-cidr --manifests .",
            "needs --cluster-cidr",
        ),
        ("tcp 10.0.0.1:1 10.0.0.2:1 --from pod --masquerade all", "policy flags need --manifests"),
    ] {
        let words: Vec<&str> = ["explain"].into_iter().chain(words.split(' ')).collect();
        let output = sluice(folder.path(), &words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {error}");
        assert!(error.contains(why), "{words:?}: {error}");
    }
}

#[test]
fn what_cannot_be_read_ends_with_code_1() {
    let folder = tempfile::tempdir().expect("a folder");
    let question = ["explain", "tcp", "10.0.0.1:1", "10.0.0.2:1", "--from", "pod"];
    for (more, why) in [
        (["--manifests", "nowhere"], "cannot read nowhere"),
        (["--pin-path", "nowhere"], "nothing of Sluice is pinned"),
    ] {
        let words: Vec<&str> = question.into_iter().chain(more).collect();
        let output = sluice(folder.path(), &words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {error}");
        assert!(error.contains(why), "{words:?}: {error}");
    }
}

#[test]
fn manifests_that_say_nothing_end_with_code_1_and_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path();
    fs::create_dir(at.join("empty")).expect("made");
    fs::create_dir(at.join("shop")).expect("made");
    fs::write(at.join("shop/all.yaml"), manifests("R", "Cluster", "Cluster")).expect("written");
    fs::write(at.join("broken.yaml"), "kind: Service\nmetadata: {name: [").expect("written");
    fs::write(at.join("nothing.yaml"), "# nothing\n").expect("written");
    let question = "explain tcp 203.0.113.7:4000 198.51.100.1:80 --from external --manifests";
    for (words, why) in [
        (format!("{question} empty"), "found no object in empty: expected a Service"),
        ("validate empty".to_owned(), "found no object in empty: expected a Service"),
        (format!("{question} shop --node nobody"), "its Nodes are node-a: there is no nobody"),
        ("validate shop --node nobody".to_owned(), "its Nodes are node-a: there is no nobody"),
        (format!("{question} shop --what-if broken.yaml"), "broken.yaml document 1: line"),
        (format!("{question} shop --what-if nothing.yaml"), "there is no object in it"),
    ] {
        let output = sluice(at, &words.split(' ').collect::<Vec<_>>());
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words}: {error}");
        assert!(error.contains(why), "{words}: {error}");
        assert_eq!(output.stdout, b"", "{words}");
    }
    // The rest of the manifests still gives answers, and the output says what is missing.
    fs::rename(at.join("broken.yaml"), at.join("shop/broken.yaml")).expect("renamed");
    let words = format!("{question} shop -o json");
    let output = sluice(at, &words.split(' ').collect::<Vec<_>>());
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{error}");
    assert!(error.contains("warning: left out shop/broken.yaml document 1: line"), "{error}");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON, and nothing else");
    assert_eq!(answer["service"], "shop/web");
}

#[test]
fn what_if_shows_both_answers_and_ends_with_the_codes_of_the_second() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::create_dir(folder.path().join("now")).expect("made");
    fs::write(folder.path().join("now/all.yaml"), manifests("R", "Cluster", "Cluster"))
        .expect("written");
    fs::write(folder.path().join("then.yaml"), manifests("R", "Cluster", "Local"))
        .expect("written");
    let words =
        "tcp 203.0.113.7:4000 198.51.100.1:80 --from external --manifests now --what-if then.yaml";
    let (code, both) = ask(folder.path(), words);
    assert_eq!(code, 4);
    assert_eq!(line(&(0, both["before"].clone())), "forward 10.244.2.1 masqueraded");
    assert_eq!(line(&(4, both["after"].clone())), "drop no_local_backend");
}

/// Compares the output for people with a file.
fn compare(name: &str, words: &[&str], code: i32) {
    let folder = tests().join("explain");
    let output = sluice(&folder, words);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        output.status.code(),
        Some(code),
        "{words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let path = folder.join(name);
    if std::env::var_os("SLUICE_BLESS").is_some() {
        fs::write(&path, &*text).expect("written");
        return;
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "{}: found\n{text}\nexpected\n{expected}", path.display());
}

#[test]
fn people_read_one_answer_of_each_kind() {
    for (name, code, words) in [
        ("forward.txt", 0, "tcp 203.0.113.7:4000 192.0.2.10:30080 --from external"),
        ("forward-call.txt", 0, "tcp 10.244.1.99:4000 10.96.0.10:80 --from pod"),
        ("reject.txt", 3, "udp 10.244.1.99:4000 10.96.0.11:53 --from pod"),
        ("drop.txt", 4, "tcp 203.0.114.7:4000 198.51.100.1:80 --from external"),
        ("pass.txt", 0, "tcp 10.244.1.99:4000 203.0.113.7:443 --from pod"),
        (
            "what-if.txt",
            4,
            "tcp 203.0.113.7:4000 192.0.2.10:30080 --from external --what-if moved.yaml",
        ),
    ] {
        let words = format!("explain {words} --manifests shop --node node-a");
        compare(name, &words.split(' ').collect::<Vec<_>>(), code);
    }
}

/// A dump of two nodes, with Pods.
const DUMP: &str = "
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Node, metadata: {name: n1}, spec: {podCIDRs: [10.244.1.0/24]},
   status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}}
- {apiVersion: v1, kind: Node, metadata: {name: n2}, spec: {podCIDRs: [10.244.2.0/24]},
   status: {addresses: [{type: InternalIP, address: 192.0.2.2}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: client, namespace: shop}, spec: {nodeName: n1},
   status: {phase: Running, podIPs: [{ip: 10.244.1.5}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: web-x, namespace: shop}, spec: {nodeName: n2},
   status: {phase: Running, podIPs: [{ip: 10.244.2.7}]}}
- {apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
   spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80}, {name: dns, port: 53, protocol: UDP}]}}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
  addressType: IPv4
  ports: [{name: http, port: 8080}, {name: dns, port: 5353, protocol: UDP}]
  endpoints:
  - {addresses: [10.244.2.7], nodeName: n2, targetRef: {kind: Pod, name: web-x, namespace: shop}}
";

#[test]
fn names_are_taken_wherever_addresses_are() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("dump.yaml"), DUMP).expect("written");
    let ask = |words: &str| ask(folder.path(), &format!("{words} --manifests dump.yaml --node n1"));
    for words in [
        "tcp 10.244.1.5:40000 10.96.0.10:80 --from pod",
        "10.244.1.5:40000 10.96.0.10:80",
        "pod/shop/client svc/shop/web:http",
        "-n shop pod/client svc/web:80",
        "tcp pod/shop/client web:http",
        "node/n1 svc/web:http",
    ] {
        let answer = ask(words);
        assert_eq!(line(&answer), "forward 10.244.2.7 kept", "{words}");
        assert_eq!((&answer.1["service"], &answer.1["port"]), (&"shop/web".into(), &"http".into()));
    }
    assert_eq!(ask("pod/shop/client svc/web:dns").1["frontend"]["protocol"], "UDP");
    assert_eq!(line(&ask("external svc/web:http")), "forward 10.244.2.7 masqueraded");

    let read = |words: &str| {
        let words = format!("explain {words} --manifests dump.yaml --node n1");
        let output = sluice(folder.path(), &words.split(' ').collect::<Vec<_>>());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (_, text, _) = read("pod/shop/client svc/web:http");
    let first = text.lines().find(|line| line.starts_with("Verdict:")).expect("a verdict");
    let step = text.lines().find(|line| line.starts_with("Frontend:")).expect("a step");
    assert!(text.find(first) < text.find(step), "{text}");
    assert!(text.find("is translated before") < text.find("sends packets instead"), "{text}");
    let row = text.lines().find(|line| line.starts_with("10.244.2.7:8080")).expect("a candidate");
    assert!(row.contains("shop/web-x   n2"), "{row}");

    // A client that cannot be there has no story.
    for (words, code, why) in [
        ("pod/shop/web-x svc/web:http", 1, "pod shop/web-x runs on node n2"),
        ("10.244.2.7:1 10.96.0.10:80 --from pod", 1, "is pod shop/web-x of node n2"),
        ("10.244.2.99:1 10.96.0.10:80 --from pod", 1, "10.244.2.99 belongs to node n2"),
        ("10.9.9.9:1 10.96.0.10:80 --from pod", 1, "no pod has the address 10.9.9.9"),
        ("192.0.2.1:1 10.96.0.10:80 --from pod", 2, "an address of node n1, and no pod's"),
        ("10.244.1.5:1 10.96.0.10:80 --from external", 2, "is pod shop/client of this node"),
        ("192.0.2.2:1 10.96.0.10:80 --from host", 1, "192.0.2.2 belongs to node n2"),
        ("pod/shop/nosuch svc/web:http", 1, "there is no pod shop/nosuch"),
        ("pod/shop/client svc/web", 2, "may be any of shop/web:dns UDP, shop/web:http TCP"),
        ("pod/shop/client svc/nosuch:80", 1, "no Service \"nosuch:80\" is served here"),
        ("svc/web:http pod/shop/web-x:80", 2, "is no client"),
    ] {
        let (found, text, error) = read(words);
        assert_eq!((found, text.as_str()), (Some(code), ""), "{words}: {error}");
        assert!(error.contains(why), "{words}: {error}");
    }
}

#[test]
fn validation_reports_what_is_refused_and_what_is_lost() {
    compare("validate.txt", &["validate", "wrong"], 1);
    let output = sluice(&tests().join("explain"), &["validate", "shop", "-o", "json"]);
    let rows: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    check(&rows);
    assert_eq!(output.status.code(), Some(0), "{rows}");
    assert!(
        rows["items"]
            .as_array()
            .is_some_and(|rows| rows.iter().all(|row| row["kind"] == "warning")),
        "{rows}"
    );
}

#[test]
fn a_thousand_objects_are_answered_about_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    for file in 0..50 {
        let mut text = String::new();
        for index in file * 10..file * 10 + 10 {
            let number = index % 250 + 1;
            let vip = format!("10.96.{}.{number}", index / 250);
            write!(
                text,
                "---
apiVersion: v1
kind: Service
metadata: {{name: s{index}, namespace: default}}
spec: {{type: NodePort, clusterIP: {vip}, ports: [{{port: 80, nodePort: {}}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: s{index}-1, namespace: default, labels: {{kubernetes.io/service-name: s{index}}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{{addresses: [10.244.1.{number}]}}, {{addresses: [10.244.2.{number}]}}]
",
                30_000 + index
            )
            .expect("written");
        }
        fs::write(folder.path().join(format!("{file}.yaml")), text).expect("written");
    }
    let began = Instant::now();
    let (code, answer) =
        ask(folder.path(), "tcp 10.244.1.99:4000 10.96.1.7:80 --from pod --manifests .");
    println!("a thousand objects: {:?}", began.elapsed());
    assert_eq!((code, &answer["service"]), (0, &Value::from("default/s256")));
}

/// While a node is moved in or out, a person sees whose the packets are, and why.
#[test]
fn what_is_left_to_netfilter_is_reported_with_its_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("a.yaml"), manifests("RL", "Cluster", "Cluster"))
        .expect("written");
    let options = Options {
        path: folder.path().to_owned(),
        node: Some("node-a".into()),
        ..Options::default()
    };
    let manifests = Manifests::read(options).expect("read");
    let question = Question {
        protocol: Protocol::Tcp,
        source: "10.244.1.9:40000".parse().expect("an end"),
        destination: "10.96.0.10:80".parse().expect("an end"),
        from: Client::Pod,
        way: Some(Way::Edge),
        device: None,
        length: None,
        ttl: None,
    };
    let (mut world, routing) = manifests.world(&question);
    let mut told = |phase: u32, known: bool| {
        world.settings.phase = phase;
        world.v4.imported.clear();
        if known {
            let tuple = Tuple {
                source: Ipv4Address { octets: [10, 244, 1, 9] },
                destination: Ipv4Address { octets: [10, 96, 0, 10] },
                source_port: 40_000,
                destination_port: 80,
                protocol: 6,
                side: 0,
                reserved: [0; 2],
            };
            let _ = world.v4.imported.insert(tuple, 0);
        }
        let answer = explain(&question, &world, &routing).expect("it is met");
        let why =
            answer.steps.iter().find(|step| step.step == "takeover").map(|step| step.text.clone());
        (answer.verdict, answer.reason, why.unwrap_or_default())
    };
    let (verdict, reason, why) = told(phase::SERVE | phase::IMPORTED, true);
    assert_eq!((verdict, reason), (Verdict::Pass, "netfilter_flow"));
    assert!(why.contains("since before the takeover"), "{why}");
    let (verdict, _, why) = told(phase::SERVE | phase::IMPORTED, false);
    assert_eq!((verdict, why.as_str()), (Verdict::Forward, ""));
    let (verdict, reason, why) = told(phase::PASSIVE, false);
    assert_eq!((verdict, reason), (Verdict::Pass, "not_taken"));
    assert!(why.contains("release"), "{why}");
    let (verdict, _, why) = told(phase::IMPORT, false);
    assert_eq!(verdict, Verdict::Forward, "an opening packet is ours: {why}");
}

/// Routes with an MTU of 1 400 bytes.
struct Narrow(Supposed);

impl Routing for Narrow {
    fn leaves_by(&self, destination: IpAddr) -> Option<u32> {
        self.0.leaves_by(destination)
    }

    fn mtu(&self, _: IpAddr) -> Option<u32> {
        Some(1400)
    }

    fn is_local(&self, address: IpAddr) -> bool {
        self.0.is_local(address)
    }

    fn comes_in_by(
        &self,
        question: &Question,
        devices: &BTreeMap<u32, NamedDevice>,
    ) -> Option<u32> {
        self.0.comes_in_by(question, devices)
    }

    fn supposes(&self) -> &'static str {
        self.0.supposes()
    }
}

/// A packet's fate is not decided by the choice of a backend alone: a packet that is too large for
/// the path, or whose client has used up its errors, goes nowhere.
#[test]
fn limits_on_a_packets_path_are_in_the_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("a.yaml"), manifests("RL", "Cluster", "Cluster"))
        .expect("written");
    let told = |credit_ms: u32, question: &Question| {
        let options = Options {
            path: folder.path().to_owned(),
            node: Some("node-a".into()),
            ..Options::default()
        };
        let (mut world, routing) = Manifests::read(options).expect("read").world(question);
        let IpAddr::V4(client) = question.source.ip() else { panic!("an IPv4 client") };
        let bucket = RejectBucket { refilled_ms: 0, credit_ms };
        let _ = world.rejects.insert(client.to_ipv6_mapped().octets(), bucket);
        let answer = explain(question, &world, &Narrow(routing)).expect("it is met");
        let steps = answer.steps.iter().filter(|step| step.step == "limit");
        let why: Vec<String> = steps.map(|step| step.text.clone()).collect();
        (answer.verdict, answer.reason, why.join(";"))
    };
    let question = |from: Client, source: &str, length: Option<u16>, ttl: Option<u8>| Question {
        protocol: Protocol::Tcp,
        source: source.parse().expect("an end"),
        destination: "10.96.0.10:80".parse().expect("an end"),
        from,
        way: None,
        device: None,
        length,
        ttl,
    };
    let host = |length: u16| question(Client::Host, "192.0.2.1:40000", Some(length), None);
    let (verdict, reason, why) = told(0, &host(1400));
    assert_eq!((verdict, reason, why.as_str()), (Verdict::Forward, "forward", ""));
    let (verdict, reason, why) = told(0, &host(1401));
    assert_eq!((verdict, reason), (Verdict::Reject, "too_big"));
    assert!(why.starts_with("1401 bytes exceed the MTU of 1400 on the path to "), "{why}");
    // A client that is its own backend is turned back, which counts as forwarding.
    let own = |ttl: u8| question(Client::Pod, "10.244.1.1:40000", None, Some(ttl));
    let (verdict, reason, _) = told(0, &own(2));
    assert_eq!((verdict, reason), (Verdict::Forward, "forward"));
    for (credit_ms, verdict) in [(1_000, Verdict::Reject), (0, Verdict::Drop)] {
        let told = told(credit_ms, &own(1));
        assert_eq!((told.0, told.1), (verdict, "ttl_exceeded"), "{}", told.2);
    }
    let unserved = Question {
        protocol: Protocol::Udp,
        ..question(Client::Pod, "10.244.1.9:40000", None, None)
    };
    for (credit_ms, expected) in
        [(1_000, (Verdict::Reject, "undefined_port")), (0, (Verdict::Drop, "reject_limited"))]
    {
        let (verdict, reason, why) = told(credit_ms, &unserved);
        assert_eq!((verdict, reason), expected, "{why}");
    }
}
