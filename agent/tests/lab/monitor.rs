//! The endpoints for monitoring over HTTP, at kube-proxy's ports.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::support::{
    Cluster, HTTP, Plan, WEB, cluster_ip, service, skip, status, until, until_backends, word,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_lab::{Namespace, Node};

/// Returns status and body of an answer.
fn get(place: &Namespace, url: &str) -> Result<(String, String)> {
    let text =
        place.run("curl", ["-gsS", "-m", "5", "-w", "\n%{http_code} %{content_type}", url])?;
    let (body, code) = text.rsplit_once('\n').context("no status")?;
    Ok((code.to_owned(), body.to_owned()))
}

fn json(place: &Namespace, url: &str, code: &str) -> Result<Value> {
    let (found, body) = get(place, url)?;
    ensure!(found == format!("{code} application/json"), "{url}: {found}: {body}");
    serde_json::from_str(&body).with_context(|| body)
}

/// The metrics as OpenMetrics.
const OPEN: &str = "Accept: application/openmetrics-text; version=1.0.0";

/// Series -> value, as a scraper reads the text.
fn metrics(node: &Node) -> Result<BTreeMap<String, f64>> {
    let body =
        node.run("curl", ["-sS", "-m", "5", "-H", OPEN, "http://127.0.0.1:10249/metrics"])?;
    ensure!(body.ends_with("# EOF\n") || body.ends_with("# EOF"), "{body}");
    ensure!(body.matches("# EOF").count() == 1, "two texts in one");
    series(&body)
}

fn series(body: &str) -> Result<BTreeMap<String, f64>> {
    let mut all = BTreeMap::new();
    for line in body.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
        ensure!(all.insert(series.to_owned(), value.parse()?).is_none(), "twice: {series}");
    }
    Ok(all)
}

/// Returns the sum of the series of a metric whose labels hold all of these.
fn sum(all: &BTreeMap<String, f64>, metric: &str, labels: &[&str]) -> f64 {
    let is_wanted = |series: &str| {
        series.split('{').next() == Some(metric)
            && labels.iter().all(|label| series.contains(label))
    };
    all.iter().filter(|(series, _)| is_wanted(series)).map(|(_, value)| value).sum()
}

#[test]
fn health_mode_and_metrics_are_answered_as_kube_proxy_does() -> Result<()> {
    if skip("health_mode_and_metrics") {
        return Ok(());
    }
    let args = vec!["--metrics-detail", "backend"];
    let cluster = Cluster::new("monitor", &Plan { near: 2, args, ..Plan::default() })?;
    let node = cluster.node();
    // From another machine, by both families.
    for at in [node.ipv4().to_string(), format!("[{}]", node.ipv6())] {
        let healthz = json(&cluster.outside, &format!("http://{at}:10256/healthz"), "200")?;
        ensure!(healthz.get("nodeEligible") == Some(&Value::Bool(true)), "{healthz}");
        for field in ["/healthy", "/status/IPv4/healthy", "/status/IPv6/healthy"] {
            ensure!(healthz.pointer(field) == Some(&Value::Bool(true)), "{field}: {healthz}");
        }
        ensure!(word(&healthz, "lastUpdated").ends_with('Z'), "{healthz}");
        let livez = json(&cluster.outside, &format!("http://{at}:10256/livez"), "200")?;
        ensure!(livez.get("nodeEligible").is_none(), "{livez}");
        // Endpoints that are not for everybody.
        ensure!(
            get(&cluster.outside, &format!("http://{at}:10249/metrics")).is_err(),
            "metrics from outside"
        );
    }
    ensure!(
        get(node, "http://127.0.0.1:10249/proxyMode")?
            == ("200 text/plain; charset=utf-8".into(), "sluice".into())
    );
    ensure!(get(node, "http://127.0.0.1:10249/healthz")?.1 == "ok");
    ensure!(get(node, "http://127.0.0.1:10249/nothing")?.0.starts_with("404"));
    let refused = node.run(
        "curl",
        ["-s", "-o", "/dev/null", "-w", "%{http_code}", "-XPOST", "http://127.0.0.1:10256/healthz"],
    )?;
    ensure!(refused == "405", "{refused}");

    let before = metrics(node)?;
    let [vip, _] = cluster_ip(WEB);
    // Per packet: by connected UDP, and the first connection; at the socket: by TCP.
    ensure!(cluster.client.udp_ask_connected((vip, 53).into(), 20)?.len() == 20);
    ensure!(cluster.client.http_get(&format!("http://{vip}:{HTTP}/"), 21)?.len() == 21);
    let after = metrics(node)?;
    let service = ["namespace=\"default\"", "service=\"web\"", "family=\"IPv4\""];
    let grown = |metric: &str, more: &[&str]| {
        let labels = [&service[..], more].concat();
        sum(&after, metric, &labels) - sum(&before, metric, &labels)
    };
    let calls = grown("sluice_service_calls_total", &["port=\"http\""]);
    let opened = ["port=\"http\"", "path=\"socket\""];
    ensure!(grown("sluice_service_opened_total", &opened).eq(&calls), "{calls} calls");
    let (packet, socket) = ("path=\"packet\"", "path=\"socket\"");
    let (forward, reply) = ("direction=\"forward\"", "direction=\"reply\"");
    let (dns, http) = ("port=\"dns\"", "port=\"http\"");
    for (metric, more, least) in [
        ("sluice_service_packets_total", &[packet, forward, dns][..], 20.0),
        ("sluice_service_packets_total", &[packet, reply, dns], 20.0),
        ("sluice_service_bytes_total", &[packet, forward, dns], 20.0 * 28.0),
        ("sluice_service_opened_total", &[packet, dns], 10.0),
        ("sluice_service_calls_total", &[http], 20.0),
        ("sluice_service_bytes_total", &[socket, forward, http], 20.0 * 40.0),
        ("sluice_service_bytes_total", &[socket, reply, http], 20.0 * 40.0),
        ("sluice_service_packets_total", &[socket, reply, http], 40.0),
        ("sluice_service_rtt_seconds_count", &[socket, http], 10.0),
        ("sluice_backend_bytes_total", &[socket, forward], 20.0 * 40.0),
        ("sluice_backend_packets_total", &[packet, forward], 20.0),
    ] {
        let grown = grown(metric, more);
        ensure!(grown >= least, "{metric} {more:?}: {grown} of {least}");
    }
    for metric in ["packets", "bytes", "opened", "calls"] {
        let of = |level: &str| grown(&format!("sluice_{level}_{metric}_total"), &[]);
        ensure!(
            (of("backend") - of("service")).abs() < 0.5,
            "{metric} of the backends, the Service"
        );
        let node = sum(&after, &format!("sluice_node_{metric}_total"), &[]);
        let all = sum(&after, &format!("sluice_service_{metric}_total"), &[]);
        ensure!((node - all).abs() < 0.5, "{metric} of the node: {node}, of its Services: {all}");
    }
    // A counter of zero has no series, except for the node's sums.
    for (name, value) in &after {
        let of_objects = ["sluice_service_", "sluice_backend_", "sluice_packets_by_reason"];
        let is_zero = of_objects.iter().any(|start| name.starts_with(start)) && value.eq(&0.0);
        ensure!(!is_zero || name.contains("_sum{"), "{name} is zero");
    }
    ensure!(after.contains_key("sluice_node_failed_total{path=\"socket\"}"), "{after:?}");
    for (metric, labels, value) in [
        ("sluice_ready", &[][..], 1.0),
        ("sluice_maps_readable", &[], 1.0),
        ("sluice_backends_left_out", &[], 0.0),
        ("sluice_source_synced", &["source=\"manifests\""], 1.0),
        ("sluice_device_failing", &[], 0.0),
        ("sluice_node_addresses_astray", &[], 0.0),
        ("kubeproxy_sync_proxy_rules_service_changes_pending", &[], 0.0),
    ] {
        ensure!(
            sum(&after, metric, labels).eq(&value),
            "{metric}: {}",
            sum(&after, metric, labels)
        );
    }
    for metric in [
        "sluice_map_capacity",
        "sluice_map_entries",
        "sluice_device_hooks",
        "kubeproxy_sync_proxy_rules_duration_seconds_count",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "kubeproxy_sync_proxy_rules_service_changes_total",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total",
        "kubeproxy_proxy_healthz_total",
        "kubeproxy_proxy_livez_total",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_cpu_seconds_total",
        "process_open_fds",
        "process_max_fds",
        "process_start_time_seconds",
        "sluice_build_info",
    ] {
        ensure!(sum(&after, metric, &[]) > 0.0, "{metric} is not counted");
    }
    Ok(())
}

/// Names of Services and backends, and zeros, make a scrape large: the default is bounded.
#[test]
fn a_quiet_node_of_a_thousand_services_has_few_series() -> Result<()> {
    if skip("a_quiet_node") {
        return Ok(());
    }
    let cluster = Cluster::new("series", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node();
    let mut text = String::new();
    for number in 0..1_000_u32 {
        let (high, low) = (number / 250, number % 250 + 1);
        let endpoints: Vec<String> = (1..=3)
            .map(|last| {
                format!("{{addresses: [10.50.{}.{}]}}", number % 250, number / 250 * 3 + last)
            })
            .collect();
        write!(
            text,
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s{number}}}\nspec: {{clusterIP: \
             10.96.{}.{low}, ports: [{{port: 80}}]}}\n---\napiVersion: discovery.k8s.io/v1\nkind: \
             EndpointSlice\nmetadata: {{name: s{number}, labels: {{kubernetes.io/service-name: \
             s{number}}}}}\naddressType: IPv4\nports: [{{name: '', port: 80}}]\nendpoints: [{}]\n---\n",
            100 + high,
            endpoints.join(", ")
        )?;
    }
    cluster.manifests.write_text("many.yaml", &text)?;
    until_backends(node, "s999", 3)?;
    let scrape = |accept: &str| {
        let url = "http://127.0.0.1:10249/metrics";
        node.run("curl", ["-sS", "-m", "5", "-H", accept, url])
    };
    for accept in [OPEN, "Accept: text/plain"] {
        let body = scrape(accept)?;
        let count = series(&body)?.len();
        println!("{accept}: {count} series, {} bytes", body.len());
        ensure!(count < 3_000 && body.len() < 400_000, "{count} series, {} bytes", body.len());
    }
    Ok(())
}

/// The level is set as with Kubernetes' components: by PUT, and only by processes of the node.
#[test]
fn the_log_is_more_verbose_while_that_is_requested() -> Result<()> {
    if skip("the_log_says_more") {
        return Ok(());
    }
    let plan = Plan {
        near: 1,
        args: vec!["--log-format", "json", "--metrics-bind-address", "0.0.0.0"],
        ..Plan::default()
    };
    let mut cluster = Cluster::new("verbosity", &plan)?;
    let node = cluster.node().clone();
    let put = |place: &Namespace, at: &str, body: &str| {
        let url = format!("http://{at}:10249/debug/flags/v");
        place.run("curl", ["-sS", "-m", "5", "-w", "%{http_code}", "-XPUT", "-d", body, &url])
    };
    // Something to log: a change of the manifests.
    let debug = |cluster: &mut Cluster, name: &str, number: u8| -> Result<usize> {
        cluster.manifests.write(&service(name, number))?;
        until_backends(&node, name, 0)?;
        // The line appears a moment after the maps have changed.
        std::thread::sleep(std::time::Duration::from_millis(500));
        let log = cluster.agent().log();
        ensure!(
            log.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()),
            "no JSON: {log}"
        );
        Ok(log.matches("\"level\":\"DEBUG\"").count() + log.matches("\"level\":\"TRACE\"").count())
    };
    ensure!(debug(&mut cluster, "one", 51)? == 0, "it says more than it should");
    let said = put(&node, "127.0.0.1", "2")?;
    ensure!(said == "successfully set the verbosity to 2\n200", "{said}");
    let more = debug(&mut cluster, "two", 52)?;
    ensure!(more > 0, "no more is said");
    ensure!(put(&node, "127.0.0.1", "0")?.ends_with("200"), "it cannot be undone");
    let settled = debug(&mut cluster, "three", 53)?;
    ensure!(
        debug(&mut cluster, "four", 54)? == settled && settled >= more,
        "it says as much as before"
    );
    // No other client, and no other value.
    let (own, much) = (node.ipv4().to_string(), "9".repeat(5000));
    for (place, at, body, code) in [
        (&*cluster.outside, own.as_str(), "2", "403"),
        (&*node, own.as_str(), "2", "403"),
        (&*node, "127.0.0.1", "much", "400"),
        (&*node, "127.0.0.1", much.as_str(), "413"),
    ] {
        let said = put(place, at, body)?;
        ensure!(said.ends_with(code), "{at}, {code}: {said}");
    }
    let (code, _) = get(&node, "http://127.0.0.1:10249/debug/flags/v")?;
    ensure!(code.starts_with("405"), "{code}");
    Ok(())
}

/// A node that is about to leave reports it to load balancers and stays alive. A port that is taken
/// is no reason to stop.
#[test]
fn a_node_that_leaves_is_not_eligible_and_a_taken_port_is_reported() -> Result<()> {
    if skip("a_node_that_leaves") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("leaving", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let mut taken = node.tool(["hold", "--listen=127.0.0.1:10249", "--name=taken"])?;
    cluster.start_agents(&[])?;
    let url = format!("http://{}:10256", node.ipv4());
    let _ = json(&cluster.outside, &format!("{url}/healthz"), "200")?;
    let problem = until("the taken port is told", || {
        let status = status(&node)?;
        let problems =
            status.pointer("/last/problems").and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(problems.iter().find_map(|text| {
            text.as_str().filter(|text| text.contains("127.0.0.1:10249")).map(str::to_owned)
        }))
    })?;
    ensure!(problem.contains("ss -ltnp"), "{problem}");
    let _ = taken.stop()?;
    let _ = until("metrics are answered", || Ok(metrics(&node).ok()))?;

    let object = |taints: &str| {
        format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: n1}}\nspec: {{taints: [{taints}]}}\n"
        )
    };
    cluster.manifests.write_text(
        "node.yaml",
        &object("{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}"),
    )?;
    let healthz = until("the node is not eligible", || {
        Ok(json(&cluster.outside, &format!("{url}/healthz"), "503").ok())
    })?;
    ensure!(healthz.get("nodeEligible") == Some(&Value::Bool(false)), "{healthz}");
    ensure!(healthz.get("healthy") == Some(&Value::Bool(true)), "{healthz}");
    let _ = json(&cluster.outside, &format!("{url}/livez"), "200")?;
    cluster.manifests.write_text("node.yaml", &object("{key: other, effect: NoSchedule}"))?;
    let _ = until("the node is eligible again", || {
        Ok(json(&cluster.outside, &format!("{url}/healthz"), "200").ok())
    })?;
    ensure!(sum(&metrics(&node)?, "kubeproxy_proxy_healthz_total", &["code=\"503\""]) > 0.0);
    Ok(())
}
