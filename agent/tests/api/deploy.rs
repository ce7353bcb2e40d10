//! `deploy/`: the kustomize overlays and the chart render the same objects, and a real API server
//! accepts them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::cluster;
use crate::support::control_plane::ADMIN;
use serde_json::{Value, json};

/// The account in the manifests.
const ACCOUNT: &str = "system:serviceaccount:kube-system:sluice";

/// kubectl and helm.
struct Tools {
    kubectl: PathBuf,
    helm: PathBuf,
}

fn tools() -> Option<Tools> {
    let named = |name: &str| {
        let file = std::env::var_os(name).map(PathBuf::from);
        if file.is_none() {
            eprintln!("skipped: {name} names no program; `cargo xtask test api` sets it");
        }
        file
    };
    Some(Tools { kubectl: named("SLUICE_KUBECTL")?, helm: named("SLUICE_HELM")? })
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Returns the overlays, by name.
fn overlays() -> BTreeMap<String, PathBuf> {
    let entries = std::fs::read_dir(deploy().join("overlays")).expect("overlays");
    let paths = entries.map(|entry| entry.expect("an overlay").path());
    paths
        .map(|path| (path.file_name().expect("a name").to_string_lossy().into_owned(), path))
        .collect()
}

/// Runs a program. Returns its output, or what it reports when it fails.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().expect("started");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

impl Tools {
    fn kustomize(&self, folder: &Path) -> String {
        run(Command::new(&self.kubectl).arg("kustomize").arg(folder)).expect("rendered")
    }

    /// Renders the chart; each argument is a file of values, or a value.
    fn template(&self, files: &[&Path], values: &[&str]) -> Result<String, String> {
        self.helm(&["template", "sluice", "--namespace=kube-system"], files, values)
    }

    /// Runs a command of helm on the chart.
    fn helm(&self, words: &[&str], files: &[&Path], values: &[&str]) -> Result<String, String> {
        let home = tempfile::tempdir().expect("a folder");
        let mut command = Command::new(&self.helm);
        let _ = command
            .args(words)
            .arg(deploy().join("chart"))
            .args(files.iter().flat_map(|file| [Path::new("--values"), file]))
            .args(values.iter().flat_map(|value| ["--set", value]))
            .envs(
                ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"]
                    .map(|name| (name, home.path())),
            );
        run(&mut command)
    }
}

/// Returns the objects of a YAML stream by kind and name, each list that is a set in order.
fn objects(text: &str) -> BTreeMap<String, Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).expect("YAML");
    let mut found = BTreeMap::new();
    for mut object in documents.into_iter().filter(|object| !object.is_null()) {
        in_order(&mut object);
        let name = format!("{} {}", object["kind"], object["metadata"]["name"]);
        assert!(found.insert(name.clone(), object).is_none(), "{name} is there twice");
    }
    found
}

/// Sorts lists whose elements have a key of their own: mounts have a path, others a name.
fn in_order(value: &mut Value) {
    match value {
        Value::Array(elements) => {
            elements.iter_mut().for_each(in_order);
            let key = |element: &Value| {
                ["mountPath", "name"]
                    .iter()
                    .find_map(|key| Some(element.get(key)?.as_str()?.to_owned()))
            };
            if elements.iter().all(|element| key(element).is_some()) {
                elements.sort_by_key(key);
            }
        }
        Value::Object(fields) => fields.values_mut().for_each(in_order),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Labels that name a release of Helm, which kustomize's objects do not belong to.
const RELEASE_LABELS: [&str; 4] = [
    "app.kubernetes.io/instance",
    "app.kubernetes.io/version",
    "app.kubernetes.io/managed-by",
    "helm.sh/chart",
];

/// Removes these labels from an object and its pods' template. Returns how many the object had.
fn without_release_labels(object: &mut Value) -> usize {
    let mut removed = 0;
    for (place, count) in [("/metadata/labels", true), ("/spec/template/metadata/labels", false)] {
        if let Some(labels) = object.pointer_mut(place).and_then(Value::as_object_mut) {
            let found = RELEASE_LABELS.iter().filter(|label| labels.remove(**label).is_some());
            let found = found.count();
            removed += if count { found } else { 0 };
        }
    }
    removed
}

fn daemon_set(text: &str) -> Value {
    objects(text).remove(r#""DaemonSet" "sluice""#).expect("a DaemonSet")
}

/// Returns the first container's arguments.
fn args(daemon_set: &Value) -> Vec<String> {
    let args = daemon_set["spec"]["template"]["spec"]["containers"][0]["args"]
        .as_array()
        .expect("arguments");
    args.iter().map(|arg| arg.as_str().expect("a word").to_owned()).collect()
}

#[test]
fn the_chart_renders_every_overlay() {
    let Some(tools) = tools() else { return };
    let overlays = overlays();
    assert_eq!(
        overlays.keys().collect::<Vec<_>>(),
        ["beside-kube-proxy", "dual-stack", "least-capabilities", "privileged"]
    );
    for (name, folder) in overlays {
        let kustomize = objects(&tools.kustomize(&folder));
        let rendered = tools.template(&[&folder.join("values.yaml")], &[]).expect("rendered");
        let mut helm = objects(&rendered);
        for (key, object) in &mut helm {
            assert_eq!(without_release_labels(object), RELEASE_LABELS.len(), "{name}: {key}");
        }
        assert_eq!(kustomize.keys().collect::<Vec<_>>(), helm.keys().collect::<Vec<_>>(), "{name}");
        assert_eq!(kustomize.len(), 4, "{name}");
        for (key, object) in &kustomize {
            assert_eq!(Some(object), helm.get(key), "{name}: {key}");
        }
    }
}

#[test]
fn nothing_but_the_privileged_overlay_asks_for_privileges_in_the_least_one() {
    let Some(tools) = tools() else { return };
    let least = json!({
        "privileged": false,
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"], "add": ["BPF", "NET_ADMIN", "NET_RAW", "PERFMON"]},
        "seccompProfile": {"type": "RuntimeDefault"},
        "appArmorProfile": {"type": "Unconfined"},
        "seLinuxOptions": {"type": "spc_t", "level": "s0"},
    });
    let set = daemon_set(&tools.kustomize(&deploy().join("overlays/least-capabilities")));
    let pod = &set["spec"]["template"]["spec"];
    for kind in ["initContainers", "containers"] {
        for container in pod[kind].as_array().expect("containers") {
            assert_eq!(container["securityContext"], least, "{}", container["name"]);
            let mounts = container["volumeMounts"].as_array().expect("mounts");
            // Kubernetes allows them to privileged containers alone.
            assert!(
                mounts.iter().all(|mount| mount["mountPropagation"] != "Bidirectional"),
                "{mounts:?}"
            );
        }
    }
    assert_eq!(pod["hostPID"], Value::Null);
}

#[test]
fn a_real_api_server_accepts_every_object_and_the_account_may_do_only_what_it_must() {
    let (Some(tools), Some(cluster)) = (tools(), cluster()) else { return };
    let kubeconfig = cluster.plane.kubeconfig(ADMIN);
    let folder = tempfile::tempdir().expect("a folder");
    let kubectl = |args: &[&str]| {
        let outcome = cluster.plane.host().enter(|| {
            run(Command::new(&tools.kubectl)
                .env("KUBECACHEDIR", folder.path())
                .arg("--kubeconfig")
                .arg(&kubeconfig)
                .args(args))
        });
        outcome.expect("entered")
    };
    let apply = |text: &str, how: &[&str]| {
        let file = folder.path().join("objects.yaml");
        std::fs::write(&file, text).expect("written");
        let file = file.to_string_lossy().into_owned();
        kubectl(&[&["apply", "--server-side", "--validate=strict", "-f", &file], how].concat())
    };
    let mut rendered: Vec<(String, String)> =
        overlays().into_iter().map(|(name, folder)| (name, tools.kustomize(&folder))).collect();
    for name in ["cleanup", "example"] {
        rendered.push((name.to_owned(), tools.kustomize(&deploy().join(name))));
    }
    let configured =
        tools.template(&[], &["apiServer.host=192.0.2.1", "kubeProxyConfiguration.mode=nftables"]);
    rendered.push(("chart with a configuration".to_owned(), configured.expect("rendered")));
    for (name, text) in rendered {
        let said =
            apply(&text, &["--dry-run=server"]).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(said.lines().count(), objects(&text).len(), "{name}: {said}");
    }
    // The server has read them in full, and not only checked their kinds.
    let base = tools.kustomize(&deploy().join("overlays/privileged"));
    let wrong =
        apply(&base.replace("hostNetwork: true", "hostNetworks: true"), &["--dry-run=server"]);
    assert!(wrong.as_ref().is_err_and(|said| said.contains("hostNetworks")), "{wrong:?}");

    let _applied = apply(&base, &[]).expect("applied");
    let may = |verb: &str, kind: &str| {
        kubectl(&["auth", "can-i", verb, kind, "--all-namespaces", &format!("--as={ACCOUNT}")])
            .is_ok()
    };
    let watched =
        ["services", "nodes", "endpointslices.discovery.k8s.io", "servicecidrs.networking.k8s.io"];
    for kind in watched {
        for verb in ["list", "watch"] {
            assert!(may(verb, kind), "{verb} {kind}");
        }
        for verb in ["create", "update", "patch", "delete"] {
            assert!(!may(verb, kind), "{verb} {kind}");
        }
    }
    assert!(may("create", "events.events.k8s.io"));
    let forbidden =
        ["secrets", "configmaps", "pods", "endpoints", "serviceaccounts", "events.events.k8s.io"];
    for kind in forbidden {
        for verb in ["get", "list", "watch", "update", "patch", "delete"] {
            assert!(!may(verb, kind), "{verb} {kind}");
        }
    }
    for kind in ["services/status", "nodes/proxy", "pods/exec", "serviceaccounts/token"] {
        assert!(!may("create", kind) && !may("update", kind), "{kind}");
    }
    // Nothing else is allowed, by a rule that the test does not know.
    let role = objects(&base).remove(r#""ClusterRole" "sluice""#).expect("a role");
    let mut granted = Vec::new();
    for rule in role["rules"].as_array().expect("rules") {
        for kind in rule["resources"].as_array().expect("kinds") {
            granted.push(format!("{} {}", kind.as_str().expect("a kind"), rule["verbs"]));
        }
    }
    granted.sort();
    let reads = |kind: &str| format!(r#"{kind} ["list","watch"]"#);
    let mut expected = ["endpointslices", "nodes", "servicecidrs", "services"].map(reads).to_vec();
    expected.insert(1, r#"events ["create"]"#.to_owned());
    assert_eq!(granted, expected);
    let removed = kubectl(&["delete", "--namespace=kube-system", "ds/sluice", "sa/sluice"]);
    let _removed = removed.expect("removed");
}

#[test]
fn a_value_that_is_misspelt_or_impossible_is_refused_by_its_name() {
    let Some(tools) = tools() else { return };
    let host = "apiServer.host=192.0.2.1";
    assert!(tools.template(&[], &[host]).is_ok());
    for (value, word) in [
        ("toleration[0].operator=Exists", "toleration"),
        ("image.tga=1", "tga"),
        ("preflight.enable=false", "enable"),
        ("metrics.bindAddress=127.0.0.1", "bindAddress"),
        ("resources.request.cpu=1", "request"),
        ("privileges=some", "privileges"),
        ("masquerade=sometimes", "masquerade"),
        ("verbosity=9", "verbosity"),
        ("healthz.port=0", "port"),
        ("apiServer.host=https://192.0.2.1", "host"),
        ("detectLocal=guess", "detectLocal"),
        ("image.digest=sha256:12", "digest"),
        ("takeover.enable=true", "enable"),
        ("prometheus.podMonitor.every=1m", "every"),
        ("prometheus.podMonitor.interval=often", "interval"),
        ("cleanup.onDelete=maybe", "onDelete"),
        ("dashboards.labels.a=true", "labels"),
        ("socketPath=true", "socketPath"),
    ] {
        let refused = tools.template(&[], &[host, value]).expect_err(value);
        assert!(refused.contains(word), "{value}: {refused}");
    }
    let without = tools.template(&[], &[]).expect_err("a host is required");
    assert!(without.contains("apiServer.host is required"), "{without}");
}

#[test]
fn an_unquoted_on_or_off_is_the_word_that_it_looks_like() {
    let Some(tools) = tools() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let values = folder.path().join("values.yaml");
    let render = |text: &str| {
        std::fs::write(&values, format!("apiServer: {{host: 192.0.2.1}}\n{text}"))
            .expect("written");
        let set = daemon_set(&tools.template(&[&values], &[]).expect("rendered"));
        let preflight = set["spec"]["template"]["spec"]["initContainers"][0]["args"].to_string();
        (args(&set), preflight)
    };
    let default = "--conntrack-tcp-timeout-close-wait=1h";
    let (words, preflight) = render(
        "socketPath: off\nxdp: off\naccelerate: off\nexternalIPs: [off]\nmetrics: \
         {bindAddresses: [off]}\n",
    );
    assert_eq!(
        words,
        [
            "agent",
            default,
            "--external-ips=off",
            "--socket-path=off",
            "--xdp=off",
            "--accelerate=off",
            "--metrics-bind-address=off",
        ]
    );
    assert_eq!(preflight, r#"["preflight","--socket-path=off","--accelerate=off"]"#);
    let (words, preflight) = render("xdp: on\naccelerate: on\nexternalIPs: [on]\n");
    assert_eq!(words, ["agent", default, "--external-ips=on", "--xdp=on", "--accelerate=on"]);
    assert_eq!(preflight, r#"["preflight","--accelerate=on"]"#);
}

#[test]
fn the_chart_lints_and_each_part_that_is_off_by_default_renders() {
    let Some(tools) = tools() else { return };
    let host = "apiServer.host=192.0.2.1";
    let lint = tools.helm(&["lint", "--strict"], &[], &[host]).expect("no fault");
    assert!(lint.contains("0 chart(s) failed"), "{lint}");
    let render = |values: &[&str]| {
        objects(&tools.template(&[], &[&[host], values].concat()).expect("rendered"))
    };
    let plain = render(&[]);
    let more = |values: &[&str]| {
        let mut found = render(values);
        found.retain(|key, _| !plain.contains_key(key));
        found
    };

    let unreachable = tools.template(&[], &[host, "prometheus.podMonitor.enabled=true"]);
    let refused = unreachable.expect_err("loopback alone");
    assert!(refused.contains("metrics.bindAddresses is required"), "{refused}");
    for (address, port) in
        [("0.0.0.0", 10249), ("0.0.0.0:10349", 10349), ("::", 10249), ("[::]:1034", 1034)]
    {
        let address = format!("metrics.bindAddresses={{{address}}}");
        let all = render(&[
            &address,
            "prometheus.podMonitor.enabled=true",
            "prometheus.podMonitor.interval=30s",
            "prometheus.podMonitor.labels.release=kube-prometheus",
            "prometheus.podMonitor.namespace=monitoring",
        ]);
        let monitor = &all[r#""PodMonitor" "sluice""#];
        assert_eq!(monitor["metadata"]["namespace"], "monitoring");
        assert_eq!(monitor["metadata"]["labels"]["release"], "kube-prometheus");
        assert_eq!(monitor["spec"]["namespaceSelector"]["matchNames"], json!(["kube-system"]));
        let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
        assert_eq!((&endpoint["port"], &endpoint["interval"]), (&"metrics".into(), &"30s".into()));
        let pod = &all[r#""DaemonSet" "sluice""#]["spec"]["template"];
        let ports = &pod["spec"]["containers"][0]["ports"];
        let expected = json!([{"name": "metrics", "containerPort": port, "protocol": "TCP"}]);
        assert_eq!(*ports, expected);
        for (label, value) in
            monitor["spec"]["selector"]["matchLabels"].as_object().expect("labels")
        {
            assert_eq!(pod["metadata"]["labels"][label], *value);
        }
    }

    let file = |name: &str| {
        std::fs::read_to_string(deploy().join(name))
            .unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let rules = more(&["prometheus.rules.enabled=true", "prometheus.rules.labels.role=alerts"]);
    assert_eq!(rules.keys().collect::<Vec<_>>(), [r#""PrometheusRule" "sluice""#]);
    let rule = &rules[r#""PrometheusRule" "sluice""#];
    assert_eq!(rule["metadata"]["labels"]["role"], "alerts");
    let mut shipped: Value = serde_saphyr::from_str(&file("prometheus/alerts.yaml")).expect("YAML");
    in_order(&mut shipped);
    assert_eq!(rule["spec"], shipped);

    let dashboards = more(&["dashboards.enabled=true", "dashboards.namespace=grafana"]);
    assert_eq!(dashboards.keys().collect::<Vec<_>>(), [r#""ConfigMap" "sluice-dashboard""#]);
    let dashboard = &dashboards[r#""ConfigMap" "sluice-dashboard""#];
    assert_eq!(dashboard["metadata"]["labels"]["grafana_dashboard"], "1");
    let text = dashboard["data"]["sluice.json"].as_str().expect("a dashboard");
    let parsed = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    assert_eq!(parsed(text), parsed(&file("grafana/sluice.json")));

    let cleanup = more(&["cleanup.onDelete=true"]);
    assert_eq!(cleanup.keys().collect::<Vec<_>>(), [r#""DaemonSet" "sluice-cleanup""#]);
    let set = &cleanup[r#""DaemonSet" "sluice-cleanup""#];
    assert_eq!(set["metadata"]["annotations"]["helm.sh/hook"], "post-delete");
    let pods = objects(&tools.kustomize(&deploy().join("cleanup")));
    let by_kustomize = &pods[r#""DaemonSet" "sluice-cleanup""#]["spec"]["template"]["spec"];
    assert_eq!(set["spec"]["template"]["spec"], *by_kustomize);

    let refused =
        |values: &[&str]| tools.template(&[], &[&[host], values].concat()).expect_err("refused");
    let off = ["prometheus.podMonitor.enabled=true", "metrics.bindAddresses={off}"];
    assert!(refused(&off).contains("nothing to scrape"));
    let loopback = ["kubeProxyConfiguration.healthzBindAddress=127.0.0.1:10256"];
    assert!(refused(&loopback).contains("healthz.port"));
    let labelled = render(&["cleanup.onDelete=true", "commonLabels.team-name=sluice-net"]);
    let labels = &labelled[r#""DaemonSet" "sluice-cleanup""#]["metadata"]["labels"];
    assert_eq!(labels["team-name"], "sluice-net");
    assert_eq!(labels["app.kubernetes.io/name"], "sluice-cleanup");

    let digest = format!("sha256:{}", "0a".repeat(32));
    let set = |values: &[&str]| render(values)[r#""DaemonSet" "sluice""#].clone();
    let pinned = set(&[&format!("image.digest={digest}")]);
    for kind in ["initContainers", "containers"] {
        let image = &pinned["spec"]["template"]["spec"][kind][0]["image"];
        assert_eq!(*image, format!("localhost/sluice:0.1.0@{digest}"));
    }
    let takeover = args(&set(&["takeover.enabled=true"]));
    assert!(takeover.contains(&"--takeover".to_owned()), "{takeover:?}");

    let named = render(&[
        "commonLabels.team=net",
        "commonAnnotations.owner=net",
        "serviceAccount.annotations.role=none",
        "revisionHistoryLimit=0",
        "extraVolumes[0].name=more",
        "extraVolumeMounts[0].name=more",
        "extraVolumeMounts[0].mountPath=/more",
    ]);
    for (key, object) in &named {
        assert_eq!(object["metadata"]["labels"]["team"], "net", "{key}");
        assert_eq!(object["metadata"]["annotations"]["owner"], "net", "{key}");
        for label in RELEASE_LABELS {
            assert!(object["metadata"]["labels"][label].is_string(), "{key}: {label}");
        }
    }
    let account = &named[r#""ServiceAccount" "sluice""#];
    assert_eq!(account["metadata"]["annotations"]["role"], "none");
    let spec = &named[r#""DaemonSet" "sluice""#]["spec"];
    assert_eq!(spec["revisionHistoryLimit"], 0);
    let pod = &spec["template"]["spec"];
    let has =
        |list: &Value| list.as_array().expect("a list").iter().any(|one| one["name"] == "more");
    assert!(has(&pod["volumes"]) && has(&pod["containers"][0]["volumeMounts"]));
}

#[test]
fn every_value_becomes_a_flag_that_the_agent_takes() {
    let (Some(tools), Some(sluice)) = (tools(), std::env::var_os("SLUICE_BIN")) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let values = folder.path().join("values.yaml");
    let text = json!({
        "apiServer": {"host": "192.0.2.1", "port": 7443},
        "image": {"repository": "registry.example/sluice", "tag": "1.2"},
        "imagePullSecrets": [{"name": "pull"}],
        "serviceProxyName": "sluice",
        "masquerade": "kube-proxy",
        "detectLocal": "cluster-cidr",
        "clusterCIDRs": ["10.244.0.0/16", "fd00:10:244::/48"],
        "serviceCIDRs": ["10.96.0.0/16"],
        "nodePortAddresses": ["primary", "localhost"],
        "externalIPs": ["203.0.113.0/24"],
        "socketPath": "host",
        "xdp": "off",
        "logFormat": "json",
        "verbosity": 2,
        "healthz": {"port": 10356},
        "metrics": {"bindAddresses": ["127.0.0.1:10349"], "detail": "node"},
        "kubeProxyConfiguration": {"mode": "nftables", "conntrack": {"maxPerCore": 0}},
        "extraArgs": ["--flows-max=4096"],
        "extraEnv": [{"name": "SLUICE_LOG", "value": "debug"}],
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "affinity": {"nodeAffinity": {}},
        "preflight": {"enabled": false},
    });
    std::fs::write(&values, text.to_string()).expect("written");
    let rendered = tools.template(&[&values], &[]).expect("rendered");
    let set = daemon_set(&rendered);
    let pod = &set["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let mut words = args(&set);
    assert_eq!(
        words,
        [
            "agent",
            "--config=/etc/sluice/config.yaml",
            "--proxy-name=sluice",
            "--masquerade=kube-proxy",
            "--detect-local=cluster-cidr",
            "--cluster-cidr=10.244.0.0/16,fd00:10:244::/48",
            "--service-cidr=10.96.0.0/16",
            "--nodeport-addresses=primary,localhost",
            "--external-ips=203.0.113.0/24",
            "--socket-path=host",
            "--xdp=off",
            "--log-format=json",
            "--verbose",
            "--verbose",
            "--healthz-bind-address=0.0.0.0:10356,[::]:10356",
            "--metrics-bind-address=127.0.0.1:10349",
            "--metrics-detail=node",
            "--flows-max=4096",
        ]
    );
    assert_eq!(container["image"], "registry.example/sluice:1.2");
    assert_eq!(container["livenessProbe"]["httpGet"]["port"], 10356);
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "pull"}]));
    assert_eq!(pod["initContainers"], Value::Null);
    let env = container["env"].as_array().expect("variables");
    let variable =
        |name: &str| env.iter().find(|one| one["name"] == name).map(|one| one["value"].clone());
    assert_eq!(variable("KUBERNETES_SERVICE_HOST"), Some("192.0.2.1".into()));
    assert_eq!(variable("KUBERNETES_SERVICE_PORT"), Some("7443".into()));
    assert_eq!(variable("SLUICE_LOG"), Some("debug".into()));

    // The configuration is a file of the pod, of a kind that the agent knows.
    let map = objects(&rendered).remove(r#""ConfigMap" "sluice""#).expect("a ConfigMap");
    let config = map["data"]["config.yaml"].as_str().expect("a configuration");
    let content: Value = serde_saphyr::from_str(config).expect("YAML");
    assert_eq!(
        content,
        json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "mode": "nftables", "conntrack": {"maxPerCore": 0},
        })
    );
    let mounts = container["volumeMounts"].as_array().expect("mounts");
    assert!(
        mounts.iter().any(|mount| mount["name"] == "config" && mount["mountPath"] == "/etc/sluice")
    );

    // The agent reads all of it, and gets as far as a folder that does not exist.
    let file = folder.path().join("config.yaml");
    std::fs::write(&file, config).expect("written");
    words[1] = format!("--config={}", file.display());
    words.push("--manifests=/nowhere".to_owned());
    let said = run(Command::new(&sluice).args(&words)).expect_err("no such directory");
    assert!(said.contains("--manifests /nowhere: there is no such directory"), "{said}");
    words.push("--no-such-flag".to_owned());
    let said = run(Command::new(&sluice).args(&words)).expect_err("no such flag");
    assert!(said.contains("--no-such-flag"), "{said}");
}
