//! docs/troubleshooting.md: every command of the page is run where the fault is that it is about,
//! and has to show what the page shows.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use sluice_lab::{Node, Pod, Port, Serve, Service};

use crate::support::{
    Cluster, HTTP, HTTP_TARGET, Plan, SOON, cluster_ip, external_ip, route_to, skip,
    take_fresh_ports, until_within, url,
};

/// Nobody listens at this port.
const CLOSED: u16 = 8_088;
/// The numbers of the Services' addresses.
const CART: u8 = 21;
const EMPTY: u8 = 22;
const SLOW: u8 = 23;
const MIXED: u8 = 24;
const CLOSED_TO_MOST: u8 = 25;
const LOCAL: u8 = 26;
/// The node port of the Service without an endpoint on the node.
const NODE_PORT: u16 = 30_090;

/// A command of the page, and the lines that it shows.
#[derive(Debug)]
struct Shown {
    args: String,
    lines: Vec<String>,
}

/// Returns the commands of a page: an indented line that begins with `$ sluice`, and the indented
/// lines below it.
fn commands(page: &str) -> Vec<Shown> {
    let mut all: Vec<Shown> = Vec::new();
    let mut is_open = false;
    for line in page.lines() {
        let Some(line) = line.strip_prefix("    ") else {
            is_open = false;
            continue;
        };
        if let Some(args) = line.strip_prefix("$ sluice ") {
            all.push(Shown { args: args.to_owned(), lines: Vec::new() });
            is_open = true;
        } else if let Some(last) = all.last_mut().filter(|_| is_open && line.trim() != "...") {
            last.lines.push(plain(line));
        }
    }
    all
}

/// Returns a line with one space between words, and one sign in place of each number.
fn plain(line: &str) -> String {
    let mut plain = String::new();
    for sign in line.split_whitespace().collect::<Vec<_>>().join(" ").chars() {
        let sign = if sign.is_ascii_digit() { '#' } else { sign };
        if !(sign == '#' && plain.ends_with('#')) {
            plain.push(sign);
        }
    }
    plain
}

/// Runs a command as a reader does, on 80 columns.
fn output(node: &Node, args: &str) -> Result<String> {
    let words: Vec<&str> = args.split(' ').collect();
    let output = node.sluice_command(&words)?.env("COLUMNS", "80").output()?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

/// Writes the Services that have something wrong, and the objects that give the client a name.
fn break_services(cluster: &mut Cluster) -> Result<()> {
    let node = cluster.node().clone();
    let pods = ["one", "two", "three"].map(|name| node.pod(name));
    let [one, two, three]: [Pod; 3] =
        pods.into_iter().collect::<Result<Vec<_>>>()?.try_into().ok().context("three pods")?;
    // The third endpoint of `mixed` does not listen.
    for pod in [&one, &two] {
        cluster.servers.push(pod.serve(Serve::Http, HTTP_TARGET)?);
    }
    let hole = node.pod("hole")?;
    hole.nft(
        "table inet hole {\n chain input {\n type filter hook input priority 0\n \
         tcp dport 8080 drop\n }\n}\n",
    )?;
    let shop = |name: &str, number: u8, target: u16| {
        Service::new(name)
            .namespace("shop")
            .cluster_ip(cluster_ip(number)[0])
            .port(Port::tcp("http", HTTP, target))
    };
    let far = cluster.backends.last().context("a backend on the other node")?;
    for service in [
        shop("cart", CART, CLOSED).backends([&one]),
        shop("empty", EMPTY, HTTP_TARGET),
        shop("slow", SLOW, HTTP_TARGET).backends([&hole]),
        shop("mixed", MIXED, HTTP_TARGET).backends([&one, &two, &three]),
        shop("closed", CLOSED_TO_MOST, HTTP_TARGET)
            .load_balancer_ip(external_ip(CLOSED_TO_MOST)[0])
            .spec("loadBalancerSourceRanges: [198.51.100.0/28]")
            .backends([&one]),
        Service::new("local")
            .namespace("shop")
            .cluster_ip(cluster_ip(LOCAL)[0])
            .port(Port::tcp("http", HTTP, HTTP_TARGET).node_port(NODE_PORT))
            .spec("externalTrafficPolicy: Local")
            .backends([far]),
    ] {
        cluster.manifests.write(&service)?;
    }
    route_to(&cluster.lab, external_ip(CLOSED_TO_MOST)[0], &node)?;
    let client = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: client, namespace: default}}\n\
         spec: {{nodeName: {}, containers: []}}\nstatus: {{podIP: {}}}\n",
        node.name(),
        cluster.client.ipv4()
    );
    cluster.manifests.write_text("client.yaml", &client)
}

/// Calls every Service until each has failed a few times.
fn call(cluster: &Cluster) -> Result<()> {
    take_fresh_ports(&cluster.client)?;
    for number in [CART, EMPTY, SLOW, MIXED] {
        let ask = format!("curl -s -m 1 -o /dev/null {}", url(cluster_ip(number)[0], HTTP, ""));
        let count = if number == MIXED { 30 } else { 3 };
        let _ = cluster
            .client
            .run("sh", ["-c", &format!("for _ in $(seq {count}); do {ask}; done; true")])?;
    }
    Ok(())
}

#[test]
fn the_page_of_troubleshooting_leads_from_symptoms_to_causes() -> Result<()> {
    if skip("the_page_of_troubleshooting") {
        return Ok(());
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/troubleshooting.md");
    let commands = commands(&fs::read_to_string(&page).context("no docs/troubleshooting.md")?);
    ensure!(commands.len() > 5, "the page has no commands: {commands:?}");
    let mut cluster = Cluster::without_agents("trouble", &Plan { far: 1, ..Plan::default() })?;
    break_services(&mut cluster)?;
    cluster.start_agents(&[])?;
    call(&cluster)?;
    for Shown { args, lines } in commands {
        let mut missing = String::new();
        // An attempt that nobody answers counts some seconds after it.
        let found = until_within(3 * SOON, "the page's lines", || {
            let shown = output(cluster.node(), &args)?;
            let all: Vec<String> = shown.lines().map(plain).collect();
            missing.clear();
            for line in &lines {
                if !all.iter().any(|shown| shown.contains(line.as_str())) {
                    missing.push_str(line);
                    missing.push('\n');
                }
            }
            if !missing.is_empty() {
                missing.push_str("in\n");
                missing.push_str(&shown);
            }
            Ok(missing.is_empty().then_some(()))
        });
        found.with_context(|| format!("`sluice {args}` does not show\n{missing}"))?;
        println!("$ sluice {args}\n{}", output(cluster.node(), &args)?);
    }
    Ok(())
}
