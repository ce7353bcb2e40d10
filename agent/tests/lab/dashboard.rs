//! Alert rules and dashboard, which are deployed next to the metrics, checked by the real promtool
//! and evaluated by a real Prometheus that scrapes an agent (`SLUICE_PROMETHEUS`: the directory
//! with both).

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::{
    Cluster, DNS, HTTP, Plan, WEB, cluster_ip, external_ip, pinned, route_to, service, skip, until,
    until_backends, until_within, url,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_lab::{Namespace, Node};

/// Returns the directory of the real programs. Reports the test as skipped if there is none.
fn prometheus(test: &str) -> Option<PathBuf> {
    let directory = std::env::var_os("SLUICE_PROMETHEUS").map(PathBuf::from);
    if directory.is_none() {
        println!("{test} skipped: SLUICE_PROMETHEUS is not set (cargo xtask test lab sets it)");
    }
    directory
}

fn deploy(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file)
}

fn read(file: &str) -> Result<String> {
    std::fs::read_to_string(deploy(file)).with_context(|| file.to_owned())
}

#[test]
fn promtool_takes_the_alert_rules_and_each_fires_when_it_should() -> Result<()> {
    let Some(programs) = prometheus("promtool_takes") else { return Ok(()) };
    for arguments in [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]] {
        let output = Command::new(programs.join("promtool"))
            .args(arguments)
            .current_dir(deploy("prometheus"))
            .output()
            .context("cannot run promtool")?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        println!("{said}");
        ensure!(
            output.status.success() && said.contains("SUCCESS"),
            "promtool {arguments:?}: {said}"
        );
    }
    // Every alert has a test in which it fires.
    let (rules, tests) = (read("prometheus/alerts.yaml")?, read("prometheus/alerts_test.yaml")?);
    let alerts: Vec<&str> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    ensure!(alerts.len() > 10, "{alerts:?}");
    for alert in alerts {
        ensure!(
            tests.contains(&format!("alertname: {alert}\n        exp_alerts:\n")),
            "{alert} never fires"
        );
    }
    Ok(())
}

/// Returns the questions of a dashboard: panel and expression, its variables filled in.
fn questions() -> Result<Vec<(String, String)>> {
    let dashboard: Value = serde_json::from_str(&read("grafana/sluice.json")?)?;
    let mut questions = Vec::new();
    for panel in dashboard["panels"].as_array().context("no panels")? {
        let title = panel["title"].as_str().context("a panel without a title")?;
        for target in panel["targets"].as_array().into_iter().flatten() {
            let mut expression =
                target["expr"].as_str().context("a target without an expression")?.to_owned();
            for (variable, value) in [
                ("$instance", ".*"),
                ("$namespace", ".*"),
                ("$service", ".*"),
                ("$__rate_interval", "10s"),
            ] {
                expression = expression.replace(variable, value);
            }
            ensure!(!expression.contains('$'), "{title}: an unknown variable: {expression}");
            questions.push((title.to_owned(), expression));
        }
    }
    Ok(questions)
}

/// Returns what `promtool check metrics` objects to in a text.
fn promtool_check(programs: &Path, text: &str) -> Result<String> {
    let mut child = Command::new(programs.join("promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run promtool")?;
    child.stdin.take().context("no input")?.write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(output.status.success() || !said.is_empty(), "promtool ended with {}", output.status);
    Ok(said)
}

/// Returns the names of our metrics in a text.
fn metrics(text: &str) -> BTreeSet<String> {
    text.split(|char: char| !char.is_ascii_alphanumeric() && char != '_')
        .filter(|word| word.starts_with("sluice_") || word.starts_with("kubeproxy_"))
        .map(str::to_owned)
        .collect()
}

/// Asks Prometheus.
fn ask(node: &Node, path: &str, parameters: &[(&str, &str)]) -> Result<Value> {
    let mut arguments =
        vec!["-sS".to_owned(), "-G".to_owned(), format!("http://127.0.0.1:9090/api/v1/{path}")];
    for (name, value) in parameters {
        arguments.extend(["--data-urlencode".to_owned(), format!("{name}={value}")]);
    }
    let text = node.run("curl", &arguments)?;
    serde_json::from_str(&text).with_context(|| text)
}

/// Requests of every kind: by the socket, per packet, refused.
fn traffic(cluster: &Cluster) -> Result<()> {
    let fetch = |client: &Namespace, address, path: &str| {
        client.output("curl", ["-gsS", "-m", "3", "-o", "/dev/null", &url(address, HTTP, path)])
    };
    let _ = fetch(&cluster.client, cluster_ip(WEB)[0], "bytes/200000")?;
    let _ = fetch(&cluster.outside, external_ip(WEB)[0], "bytes/200000")?;
    let _ = fetch(&cluster.outside, external_ip(40)[0], "")?;
    let _ = fetch(&cluster.client, cluster_ip(40)[1], "")?;
    let _ = cluster.client.udp_ask((cluster_ip(WEB)[0], DNS).into(), 5)?;
    Ok(())
}

#[test]
fn every_question_of_dashboard_and_alerts_has_an_answer_in_a_scraped_agent() -> Result<()> {
    if skip("every_question") {
        return Ok(());
    }
    let Some(programs) = prometheus("every_question") else { return Ok(()) };
    let args = vec!["--socket-path", "machine", "--metrics-detail", "backend"];
    let cluster = Cluster::new("dashboard", &Plan { near: 3, args, ..Plan::default() })?;
    let node = cluster.node();
    cluster.manifests.write(&service("empty", 40))?;
    until_backends(node, "empty", 0)?;
    route_to(&cluster.lab, external_ip(40)[0], node)?;

    // Drift has a series once there was some.
    std::fs::remove_file(pinned(node, "names")?)?;
    let _ = until_within(Duration::from_secs(30), "the pin is there again", || {
        Ok(pinned(node, "names").ok())
    })?;

    // Every metric that is named exists.
    let text = node.run("curl", ["-sS", "http://127.0.0.1:10249/metrics"])?;
    let there: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let (dashboard, alerts) = (read("grafana/sluice.json")?, read("prometheus/alerts.yaml")?);
    let named = metrics(&(dashboard + &alerts));
    ensure!(named.len() > 25, "{named:?}");
    for name in &named {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        ensure!(there.contains(family.unwrap_or(name)), "{name} is not in /metrics");
    }
    for round in 0..2 {
        // The second time includes what traffic adds.
        if round == 1 {
            traffic(&cluster)?;
        }
        let text = node.run("curl", ["-sS", "http://127.0.0.1:10249/metrics"])?;
        let said = promtool_check(&programs, &text)?;
        ensure!(said.is_empty(), "promtool check metrics: {said}");
    }

    let state = cluster.lab.state().join("prometheus");
    std::fs::create_dir_all(&state)?;
    let rules = deploy("prometheus/alerts.yaml").canonicalize()?;
    let config = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{}]\nscrape_configs:\n  - job_name: sluice\n    static_configs: [{{targets: ['127.0.0.1:10249']}}]\n",
        rules.display()
    );
    std::fs::write(state.join("prometheus.yaml"), config)?;
    let mut server = node.spawn(
        programs.join("prometheus"),
        [
            format!("--config.file={}", state.join("prometheus.yaml").display()),
            format!("--storage.tsdb.path={}", state.join("data").display()),
            "--web.listen-address=127.0.0.1:9090".to_owned(),
        ],
    )?;
    until_within(Duration::from_secs(20), "Prometheus scrapes", || {
        if let Some(status) = server.poll()? {
            anyhow::bail!("Prometheus ended ({status}): {}", server.stderr());
        }
        let up = ask(node, "query", &[("query", "up{job=\"sluice\"} == 1")]);
        Ok(up.is_ok_and(|up| up.pointer("/data/result/0").is_some()).then_some(()))
    })?;

    // Queries that have no result for a healthy node.
    let quiet = [
        "Resets and connections that failed",
        "From a change of endpoints to the maps",
        "Retransmitted segments at the socket",
    ];
    let questions = questions()?;
    ensure!(questions.len() > 20, "{} questions", questions.len());
    let mut open: Vec<&(String, String)> = questions.iter().collect();
    until_within(Duration::from_mins(1), "an answer to every question", || {
        traffic(&cluster)?;
        let mut left = Vec::new();
        for question in open.drain(..) {
            let answer = ask(node, "query", &[("query", &question.1)])?;
            ensure!(answer["status"] == "success", "{}: {answer}", question.0);
            let is_empty = answer.pointer("/data/result/0").is_none();
            if is_empty && !quiet.contains(&question.0.as_str()) {
                left.push(question);
            }
        }
        open = left;
        println!("{} of {} questions open", open.len(), questions.len());
        Ok(open.is_empty().then_some(()))
    })
    .with_context(|| "some question has no answer".to_owned())?;

    // The rules are evaluated without an error, and no alert fires except those that the traffic
    // causes.
    let groups = until("the rules' evaluation", || {
        let rules = ask(node, "rules", &[])?;
        let all = rules
            .pointer("/data/groups/0/rules")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        Ok((!all.is_empty() && all.iter().all(|rule| rule["health"] == "ok")).then_some(all))
    })?;
    let firing: Vec<&str> = groups
        .iter()
        .filter(|rule| rule["state"] != "inactive")
        .filter_map(|rule| rule["name"].as_str())
        .collect();
    let expected = ["SluiceServiceWithoutBackends", "SluiceDrift"];
    ensure!(firing.iter().all(|name| expected.contains(name)), "{firing:?}");
    let _ = server.stop()?;
    Ok(())
}
