//! docs/screens.md: every command on a terminal of 80 columns. `cargo xtask screens` writes the
//! page; the test compares it with what the commands show now.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sluice_lab::{Backend, Port, Running, Serve, Service};

use crate::support::terminal::{Runs, screen};
use crate::support::{
    Cluster, HTTP, Plan, WEB, cluster_ip, skip, take_fresh_ports, until_backends, url,
};

/// Set by `cargo xtask screens`: the page is to be written.
const WRITE: &str = "SLUICE_SCREENS_WRITE";

/// The parts of a screen that are the same wherever and whenever it is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stays {
    /// All lines, but for numbers and the width of columns.
    Lines,
    /// The first line.
    Head,
    /// Nothing.
    Nothing,
}

/// A screen of the page.
struct Screen {
    args: &'static str,
    about: &'static str,
    runs: Runs,
    stays: Stays,
}

const fn answer(args: &'static str, about: &'static str, stays: Stays) -> Screen {
    Screen { args, about, runs: Runs::ToItsEnd, stays }
}

/// The screens while the agent serves, in the order of the page.
const SERVING: &[Screen] = &[
    answer("status", "The state of the node.", Stays::Head),
    answer("services", "Services, with their counters.", Stays::Head),
    answer("backends", "Backends, with their counters.", Stays::Head),
    answer("flows --limit 6", "The flows in the maps, the most recently used first.", Stays::Head),
    answer(
        "explain {client}:40000 svc/web:http",
        "A packet to a Service that answers.",
        Stays::Head,
    ),
    answer("explain {client}:40000 svc/shop/cart", "One whose endpoint refuses.", Stays::Head),
    answer("explain {client}:40000 svc/shop/empty", "One without endpoints.", Stays::Head),
    answer("top --once", "Rates, as one table.", Stays::Head),
    Screen {
        args: "top",
        about: "Rates, live.",
        runs: Runs::Picture(24, Duration::from_millis(2_500)),
        stays: Stays::Nothing,
    },
    answer("trace --count 6", "Events as they happen.", Stays::Nothing),
    answer("diff", "What the sources ask for beside what the maps hold.", Stays::Nothing),
    answer("validate ./new.yaml", "Objects that would be refused or are wrong.", Stays::Lines),
    answer("plan -f ./new.yaml", "The frontends that a change would change.", Stays::Lines),
    answer("preflight", "What this machine can do.", Stays::Nothing),
    answer("version", "The version of the binary.", Stays::Nothing),
];

/// The page's name in the repository.
fn page() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/screens.md")
}

/// The change that `validate` and `plan` are shown.
const NEW: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10]
  sessionAffinty: ClientIP
  ports: [{name: http, port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10]
  ports: [{name: http, port: 80}]
";

/// Returns a command as a reader of the page types it.
fn sluice(cluster: &Cluster, args: &str) -> Result<(String, Command)> {
    let args = args.replace("{client}", &cluster.client.ipv4().to_string());
    let words: Vec<&str> = args.split(' ').collect();
    let mut command = cluster.node().sluice_command(&words)?;
    let _ = command.current_dir(new_directory(cluster)?);
    Ok((args, command))
}

/// Returns a directory that holds the change.
fn new_directory(cluster: &Cluster) -> Result<PathBuf> {
    let directory = cluster.lab.manifests("new")?.directory().to_owned();
    fs::write(directory.join("new.yaml"), NEW)?;
    Ok(directory)
}

/// Lets the client call every Service until it is stopped.
fn keep_calling(client: &sluice_lab::Namespace) -> Result<Running> {
    let ask = [WEB, 21, 22]
        .map(|number| url(cluster_ip(number)[0], HTTP, ""))
        .map(|url| format!("curl -s -m 1 -o /dev/null {url}"))
        .join("; ");
    client.spawn("sh", ["-c", &format!("while :; do {ask}; sleep 0.2; done")])
}

/// Returns the page.
fn draw(cluster: &Cluster) -> Result<String> {
    let mut text = String::from(
        "# Screens\n\nEvery command on a terminal of 80 columns, on a node with three Services: \
         `default/web` is\nserved by two pods, the only endpoint of `shop/cart` refuses, and \
         `shop/empty` has none. A pod\ncalls each of them five times a second.\n\nThis page is \
         made by `cargo xtask screens`, and a test compares it with what the commands show.\n",
    );
    // The name of a kernel that somebody built for himself says nothing to others.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    for Screen { args, about, runs, .. } in SERVING {
        let (args, command) = sluice(cluster, args)?;
        let shown = screen(command, *runs).with_context(|| format!("sluice {args}"))?;
        let shown = shown.replace(release.trim(), "6.18");
        write!(text, "\n## `sluice {args}`\n\n{about}\n\n```text\n{shown}```\n")?;
    }
    Ok(text)
}

/// Returns the screens of a page, by what they are called.
fn parts(page: &str) -> Vec<(&str, &str)> {
    page.split("\n## `sluice ")
        .skip(1)
        .filter_map(|part| {
            let (args, rest) = part.split_once("`\n")?;
            let (_, shown) = rest.split_once("```text\n")?;
            Some((args, shown.split_once("```")?.0))
        })
        .collect()
}

/// Returns what stays of a screen: words, one space between them, in place of numbers a sign.
fn lasting(shown: &str, stays: Stays) -> Vec<String> {
    let lines = match stays {
        Stays::Lines => usize::MAX,
        Stays::Head => 1,
        Stays::Nothing => 0,
    };
    let plain = |line: &str| -> String {
        let words = line.split_whitespace().map(|word| {
            let mut word = word.replace(|sign: char| sign.is_ascii_digit(), "#");
            while word.contains("##") {
                word = word.replace("##", "#");
            }
            word
        });
        words.collect::<Vec<_>>().join(" ")
    };
    shown.lines().take(lines).map(plain).collect()
}

#[test]
fn the_page_of_screens_shows_what_the_commands_show() -> Result<()> {
    if skip("the_page_of_screens") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("screens", &Plan::default())?;
    let closed = cluster.node().pod("cart-1")?;
    // It listens at another port than its Service names.
    cluster.servers.push(closed.serve(Serve::Http, 9_999)?);
    let shop = |name: &str, number: u8| {
        Service::new(name)
            .namespace("shop")
            .cluster_ip(cluster_ip(number)[0])
            .port(Port::tcp("http", HTTP, 8080))
    };
    cluster.manifests.write(&shop("cart", 21).backends([Backend::from(&closed)]))?;
    cluster.manifests.write(&shop("empty", 22))?;
    cluster.start_agents(&[])?;
    until_backends(cluster.node(), "web", cluster.backends.len())?;
    take_fresh_ports(&cluster.client)?;
    let calls = keep_calling(&cluster.client)?;
    std::thread::sleep(Duration::from_secs(2));
    let drawn = draw(&cluster)?;
    drop(calls);
    if std::env::var_os(WRITE).is_some() {
        return fs::write(page(), drawn).context("cannot write docs/screens.md");
    }
    let kept = fs::read_to_string(page()).context("cannot read docs/screens.md")?;
    let (kept, drawn) = (parts(&kept), parts(&drawn));
    let mut stale = Vec::new();
    for (Screen { stays, .. }, (args, shown)) in SERVING.iter().zip(&drawn) {
        let page = kept.iter().find(|(name, _)| name == args).map(|(_, shown)| *shown);
        let now = lasting(shown, *stays);
        if page.map(|page| lasting(page, *stays)).as_ref() != Some(&now) {
            stale.push(format!("sluice {args}: {now:#?}"));
        }
    }
    ensure!(
        kept.len() == SERVING.len() && stale.is_empty(),
        "docs/screens.md is stale: run `cargo xtask screens`\n{}",
        stale.join("\n")
    );
    Ok(())
}
