//! An API server that is away, loses its history, or cannot be reached: packets flow on, and no
//! change is missed.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::support::control_plane::AGENT;
use crate::support::line::Line;
use crate::support::objects::Space;
use crate::support::view::{expect, expect_problem, problem, programmed};
use crate::support::{START, cluster, wait_for};
use serde_json::Value;
use sluice_lab::{LoadClients, LoadSize, Namespace, Router, Serve};

/// The longest wait until the agent tries again after an outage of some seconds.
const NOTICED: Duration = Duration::from_secs(20);

#[test]
fn packets_flow_while_the_server_is_away_and_then_nothing_was_missed() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "away");
    let node = cluster.node("away");
    let (web, asker) = (node.pod("web").expect("a pod"), node.pod("asker").expect("a pod"));
    let _server = web.serve(Serve::Http, 8080).expect("a server");
    let backend = format!("{}:8080", web.ipv4());
    space.bare_service("web", "10.96.1.1");
    space.slice("web-a", "web", 8080, &[&web.ipv4().to_string()]);
    space.bare_service("old", "10.96.1.2");
    space.slice("old-a", "old", 8080, &["10.244.99.1"]);
    let mut agent = cluster.agent(&node);
    let before: &[(&str, &[&str])] =
        &[("10.96.1.1:80", &[&backend]), ("10.96.1.2:80", &["10.244.99.1:8080"])];
    expect(&node, "away", before);
    let ask = || {
        let replies = asker.http_get("http://10.96.1.1:80/", 5).expect("answers");
        assert!(replies.iter().all(|reply| reply.name == "web"), "{replies:?}");
    };
    ask();
    assert_eq!(problem(&node), None);

    cluster.plane.kill_server().expect("killed");
    expect_problem(&node, true, NOTICED);
    ask();
    expect(&node, "away", before);

    // An agent that starts now knows nothing, and removes nothing.
    agent.kill9().expect("killed");
    ask();
    agent.restart().expect("started");
    expect_problem(&node, true, START);
    ask();
    expect(&node, "away", before);
    assert!(agent.wait_ready(Duration::ZERO).is_err(), "it cannot know that all is well");

    cluster.plane.start_server(&[]).expect("the server is back");
    agent.wait_ready(NOTICED).expect("ready");
    expect_problem(&node, false, NOTICED);
    expect(&node, "away", before);

    // The same with an agent that keeps running, and with changes made before the server is back.
    cluster.plane.stop_server().expect("stopped");
    expect_problem(&node, true, NOTICED);
    agent.process().signal(libc::SIGSTOP).expect("frozen");
    cluster.plane.start_server(&[]).expect("the server is back");
    space.delete("services", "old");
    space.bare_service("new", "10.96.1.3");
    space.slice("new-a", "new", 8080, &["10.244.99.3"]);
    agent.process().signal(libc::SIGCONT).expect("thawed");
    expect(
        &node,
        "away",
        &[("10.96.1.1:80", &[&backend]), ("10.96.1.3:80", &["10.244.99.3:8080"])],
    );
    ask();
    expect_problem(&node, false, NOTICED);
}

/// The lines of a log in JSON, without its first bytes.
fn lines(log: &str, from: usize) -> Vec<Value> {
    let lines = log.get(from..).unwrap_or_default().lines();
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect()
}

#[test]
fn an_outage_has_a_line_at_its_begin_and_one_at_its_end() {
    // Two minutes show no more than forty seconds.
    let outage = if std::env::var_os("SLUICE_LAB_FULL").is_some() { 120 } else { 40 };
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "quiet");
    let node = cluster.node("quiet");
    space.bare_service("web", "10.96.7.1");
    space.slice("web-a", "web", 8080, &["10.244.99.1", "10.244.99.2"]);
    let mut agent = cluster.start_agent(&node, AGENT, &["--log-format", "json"]);
    agent.wait_ready(START).expect("ready");
    expect(&node, "quiet", &[("10.96.7.1:80", &["10.244.99.1:8080", "10.244.99.2:8080"])]);

    // A Service whose endpoints change has a line.
    let from = agent.log().len();
    let one = serde_json::json!({"endpoints": [{"addresses": ["10.244.99.1"]}]});
    space.edit("endpointslices", "web-a", &one);
    let line = wait_for("a line about the Service", NOTICED, || {
        let all = lines(&agent.log(), from);
        let line = all.iter().find(|line| line["service"] == "quiet/web").cloned();
        line.ok_or_else(|| format!("{all:?}"))
    });
    let fields = ["endpoints", "removed", "added"].map(|field| line[field].clone());
    assert_eq!(fields, ["2->1".into(), "10.244.99.2:8080".into(), Value::Null], "{line}");
    assert!(line["took"].as_str().is_some_and(|took| took.ends_with("ms")), "{line}");

    let from = agent.log().len();
    cluster.plane.kill_server().expect("killed");
    expect_problem(&node, true, NOTICED);
    std::thread::sleep(Duration::from_secs(outage));
    let during = lines(&agent.log(), from);
    let [line] = &during[..] else { panic!("{} lines: {during:#?}", during.len()) };
    let (text, server) = (line["message"].as_str().unwrap_or_default(), &line["server"]);
    assert!(line["level"] == "WARN" && text.contains("failed: "), "{line}");
    assert!(server.as_str().is_some_and(|server| text.contains(server)), "{line}");
    assert!(text.contains("https://") && text.contains("os error 111"), "{line}");

    cluster.plane.start_server(&[]).expect("the server is back");
    expect_problem(&node, false, 3 * NOTICED);
    let end = wait_for("the end", NOTICED, || {
        let all = lines(&agent.log(), from);
        let is_end = |line: &&Value| line["message"].to_string().contains("answers again, after");
        let end = all.iter().position(|line| is_end(&line));
        end.map(|end| (end, all.clone())).ok_or_else(|| format!("{all:#?}"))
    });
    let (end, all) = end;
    println!("{all:#?}");
    // A server that starts may first say that it is not ready, and of each kind that it has
    // forgotten our position.
    assert!(end <= 6 && all.len() <= 10, "{all:#?}");
    assert_eq!(all[end]["level"], "INFO", "{all:#?}");
    assert!(!all.iter().any(|line| line["message"].to_string().contains("no longer")), "{all:#?}");
}

#[test]
fn a_watch_older_than_the_servers_history_starts_over() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "compacted");
    let node = cluster.node("compacted");
    space.bare_service("kept", "10.96.2.1");
    space.bare_service("old", "10.96.2.2");
    space.slice("kept-a", "kept", 8080, &["10.244.99.1", "10.244.99.2"]);
    // Without its cache the server reads from etcd, which knows nothing from before a compaction.
    let without_cache = "--watch-cache-sizes=services#0,endpointslices.discovery.k8s.io#0";
    cluster.plane.stop_server().expect("stopped");
    cluster.plane.start_server(&[without_cache]).expect("the server is back");
    let mut agent = cluster.agent(&node);
    let two = ["10.244.99.1:8080", "10.244.99.2:8080"].as_slice();
    expect(&node, "compacted", &[("10.96.2.1:80", two), ("10.96.2.2:80", &[])]);

    agent.process().signal(libc::SIGSTOP).expect("frozen");
    cluster.plane.stop_server().expect("stopped");
    cluster.plane.start_server(&[without_cache]).expect("the server is back");
    space.delete("services", "old");
    space.delete("endpointslices", "kept-a");
    space.slice("kept-b", "kept", 8080, &["10.244.99.2", "10.244.99.3"]);
    for number in 0..20 {
        space.bare_service(&format!("new-{number}"), &format!("10.96.2.{}", 100 + number));
    }
    for number in 1..20 {
        space.delete("services", &format!("new-{number}"));
    }
    cluster.plane.compact().expect("etcd forgets");
    agent.process().signal(libc::SIGCONT).expect("thawed");

    let two = ["10.244.99.2:8080", "10.244.99.3:8080"].as_slice();
    expect(&node, "compacted", &[("10.96.2.1:80", two), ("10.96.2.100:80", &[])]);
    let log = agent.log();
    // This is etcd's message; the server's cache has another one.
    let too_old = "starts over: The resourceVersion for the provided watch is too old";
    for kind in ["Service", "EndpointSlice"] {
        assert!(
            log.contains(&format!("watching {kind} {too_old}")),
            "no watch of {kind} was too old: {log}"
        );
    }
    expect_problem(&node, false, NOTICED);
    // The watches after the new lists work as well.
    space.delete("services", "new-0");
    expect(&node, "compacted", &[("10.96.2.1:80", two)]);
    cluster.plane.stop_server().expect("stopped");
    cluster.plane.start_server(&[]).expect("the server is back");
}

#[test]
fn under_load_the_server_is_away_and_returns_with_changes_and_no_memory() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "load");
    let node = cluster.node("load");
    let pods = ["web-1", "web-2", "web-3"].map(|name| node.pod(name).expect("a pod"));
    let _servers = pods.each_ref().map(|pod| pod.serve(Serve::TcpEcho, 8080).expect("a server"));
    let asker = node.pod("load-asker").expect("a pod");
    let addresses = pods.each_ref().map(|pod| pod.ipv4().to_string());
    let backend = |index: usize| format!("{}:8080", addresses[index]);
    let echo = |vip: &str| SocketAddr::new(vip.parse().expect("an address"), 80);
    space.bare_service("web", "10.96.5.1");
    space.slice("web-a", "web", 8080, &[&addresses[0], &addresses[1]]);
    space.bare_service("kept", "10.96.5.2");
    space.slice("kept-a", "kept", 8080, &[&addresses[0]]);
    for number in 0..24 {
        space.bare_service(&format!("other-{number}"), &format!("10.96.6.{number}"));
    }
    let without_cache = "--watch-cache-sizes=services#0,endpointslices.discovery.k8s.io#0";
    cluster.plane.stop_server().expect("stopped");
    cluster.plane.start_server(&[without_cache]).expect("the server is back");
    let mut agent = cluster.start_agent(&node, AGENT, &["--socket-path=host", "--flows-max=32768"]);
    agent.wait_ready(START).expect("ready");
    let size = LoadSize::of_this_run();
    let vips = vec![echo("10.96.5.1"), echo("10.96.5.2")];
    let places: [(&Namespace, _); 2] = [(&asker, vips.clone()), (&node, vips)];
    let mut load = LoadClients::start(&places, size).expect("a load");

    cluster.plane.kill_server().expect("killed");
    expect_problem(&node, true, NOTICED);
    std::thread::sleep(Duration::from_secs(size.seconds));
    let _ = load.unharmed("while the server was away").expect("unharmed");

    // It returns, changes immediately, and has lost all history: every watch starts over with a
    // list.
    agent.process().signal(libc::SIGSTOP).expect("frozen");
    cluster.plane.start_server(&[without_cache]).expect("the server is back");
    space.delete("endpointslices", "web-a");
    space.slice("web-b", "web", 8080, &[&addresses[1], &addresses[2]]);
    for number in 12..24 {
        space.delete("services", &format!("other-{number}"));
    }
    cluster.plane.compact().expect("etcd forgets");
    agent.process().signal(libc::SIGCONT).expect("thawed");
    let others: Vec<String> = (0..12).map(|number| format!("10.96.6.{number}:80")).collect();
    // The longer it was away, the later the next attempt.
    expect_problem(&node, false, 3 * NOTICED);
    let (second, third, first) = (backend(1), backend(2), backend(0));
    let (web, kept) = ([second.as_str(), third.as_str()], [first.as_str()]);
    let mut wanted: Vec<(&str, &[&str])> = vec![("10.96.5.1:80", &web), ("10.96.5.2:80", &kept)];
    wanted.extend(others.iter().map(|vip| (vip.as_str(), &[] as &[&str])));
    expect(&node, "load", &wanted);
    println!("{:?}", load.unharmed("when the server was back").expect("unharmed"));
    assert!(agent.log().contains("starts over"), "no watch was too old: {}", agent.log());
    cluster.plane.stop_server().expect("stopped");
    cluster.plane.start_server(&[]).expect("the server is back");
}

#[test]
fn a_slow_connection_that_breaks_within_lists_and_watches_loses_nothing() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "line");
    let node = cluster.node("line");
    let line = Line::new(&cluster.plane).expect("a line");
    // More objects than fit one page of a list.
    let vip = |number: usize| format!("10.96.3.{number}");
    for number in 1..=120 {
        space.bare_service(&format!("s{number}"), &vip(number));
    }
    space.slice("s1-a", "s1", 8080, &["10.244.99.1"]);

    // The lists take some seconds, and the first connections break before their end.
    line.set_rate(100_000);
    line.set_span(30_000);
    let mut agent = cluster.start_agent(&node, AGENT, &["--api", &cluster.plane.url(line.port())]);
    wait_for("several attempts", START, || {
        if line.made() >= 6 { Ok(()) } else { Err(line.made().to_string()) }
    });
    assert_eq!(programmed(&node, "line"), Ok([].into()), "no list is complete");
    line.set_span(0);
    agent.wait_ready(Duration::from_secs(40)).expect("ready");
    let all: Vec<(String, &[&str])> = (1..=120)
        .map(|number| {
            let backends: &[&str] = if number == 1 { &["10.244.99.1:8080"] } else { &[] };
            (format!("{}:80", vip(number)), backends)
        })
        .collect();
    let mut wanted: Vec<(&str, &[&str])> =
        all.iter().map(|(vip, backends)| (vip.as_str(), *backends)).collect();
    expect(&node, "line", &wanted);

    // From now on every connection breaks repeatedly while objects change.
    line.set_rate(0);
    for number in 2..=40 {
        if number % 8 == 0 {
            line.cut();
        }
        space.delete("services", &format!("s{number}"));
    }
    line.cut();
    space.edit(
        "endpointslices",
        "s1-a",
        &serde_json::json!({"endpoints": [{"addresses": ["10.244.99.2"]}]}),
    );
    let _ = wanted.drain(..40);
    wanted.push(("10.96.3.1:80", &["10.244.99.2:8080"]));
    expect(&node, "line", &wanted);
    expect_problem(&node, false, NOTICED);
}

#[test]
fn a_connection_that_dies_silently_is_replaced() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "dead");
    let node = cluster.node("dead");
    space.bare_service("old", "10.96.4.1");
    let agent = cluster.agent(&node);
    expect(&node, "dead", &[("10.96.4.1:80", &[])]);

    // Packets are lost in both directions, and changes do not arrive.
    let dead = DeadLine::new(cluster.lab.router(), [cluster.plane.host().ipv4(), node.ipv4()]);
    space.delete("services", "old");
    space.bare_service("new", "10.96.4.2");
    expect_problem(&node, true, Duration::from_secs(45));
    drop(dead);
    wait_for("the new world", Duration::from_secs(40), || {
        let found = programmed(&node, "dead")?;
        if found.contains_key("10.96.4.2:80") && found.len() == 1 {
            Ok(())
        } else {
            Err(format!("{found:?}: {}", agent.log()))
        }
    });
    expect_problem(&node, false, NOTICED);
}

/// A router that drops what goes to some addresses, until this is dropped.
struct DeadLine<'a> {
    router: &'a Router,
    addresses: [Ipv4Addr; 2],
}

impl<'a> DeadLine<'a> {
    fn new(router: &'a Router, addresses: [Ipv4Addr; 2]) -> Self {
        for address in addresses {
            let _ = router.ip(&format!("route add blackhole {address}/32")).expect("a route");
        }
        Self { router, addresses }
    }
}

impl Drop for DeadLine<'_> {
    fn drop(&mut self) {
        for address in self.addresses {
            self.router.unroute(&format!("blackhole {address}/32")).expect("the route is there");
        }
    }
}
