//! Observation: connections counted at the socket, `sluice trace`, `sluice top`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use crate::support;
use crate::support::{
    Cluster, DNS, HTTP, Plan, SOON, WEB, cluster_ip, external_ip, listed, number, route_to,
    service, skip, status, until, until_backends, until_within, url, word,
};
use anyhow::{Context, Result, bail, ensure};
use aya::Ebpf;
use aya::programs::{CgroupAttachMode, SockOps};
use serde_json::Value;
use sluice_common::abi::LAYOUT;
use sluice_lab::{Namespace, Node, Port, Running, Service};

/// The port of iperf3.
const PERF: u16 = 5201;

/// Returns the BPF object.
fn object() -> PathBuf {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/sluice.o");
    std::env::var_os("SLUICE_BPF_OBJECT").map_or_else(built, PathBuf::from)
}

/// Returns the socket path's count for a service, summed over its backends.
fn sockets(node: &Node, service: &str, field: &str) -> Result<u64> {
    let rows = listed(node, &["backends", service])?;
    Ok(rows.iter().filter_map(|row| row.get("sockets")).map(|sockets| number(sockets, field)).sum())
}

/// Downloads this many bytes with curl. Returns the bytes received and sent as curl counts them,
/// with headers.
fn curl(client: &Namespace, vip: IpAddr, bytes: u64) -> Result<(u64, u64)> {
    let form = "%{size_header} %{size_download} %{size_request}";
    let text = client.run(
        "curl",
        ["-gsS", "-o", "/dev/null", "-w", form, &url(vip, HTTP, &format!("bytes/{bytes}"))],
    )?;
    let figures: Vec<u64> =
        text.split(' ').map(str::parse).collect::<Result<_, _>>().context(text)?;
    let [header, body, request] = figures[..] else { bail!("curl says {figures:?}") };
    ensure!(body == bytes, "{body} of {bytes} bytes came");
    Ok((header + body, request))
}

#[test]
fn connections_translated_at_the_socket_are_counted_as_curl_and_iperf3_count_them() -> Result<()> {
    if skip("connections_translated_at_the_socket") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("sockets", &Plan::default())?;
    // Another program is at the hook already.
    let mut other = Ebpf::load_file(object())?;
    let program: &mut SockOps =
        other.program_mut("connection").context("no such program")?.try_into()?;
    program.load()?;
    let cgroup = std::fs::File::open(cluster.node().cgroup_root())?;
    let _ = program.attach(&cgroup, CgroupAttachMode::Single)?;
    cluster.start_agents(&["--socket-path", "machine"])?;
    let node = cluster.node();
    for vip in cluster_ip(WEB) {
        let before = |field: &str| sockets(node, "web:http", field);
        let fields = ["connections", "closed", "received_bytes", "sent_bytes", "resets", "failed"];
        let old = fields.map(before).into_iter().collect::<Result<Vec<u64>>>()?;
        let (mut received, mut sent) = (0, 0);
        for bytes in [0, 1, 100_000, 5_000_000] {
            let figures = curl(&cluster.client, vip, bytes)?;
            received += figures.0;
            sent += figures.1;
        }
        // The side that closes first waits for the other's FIN, so the last connection ends a
        // moment later.
        let new = until("the connections' end", || {
            let new = fields.map(before).into_iter().collect::<Result<Vec<u64>>>()?;
            Ok((new[1] - old[1] == 4).then_some(new))
        })?;
        let grown: Vec<u64> = new.iter().zip(&old).map(|(new, old)| new - old).collect();
        println!("{vip}: {fields:?} {grown:?}; curl received {received}, sent {sent}");
        ensure!(grown[0] == 4 && grown[4] == 0 && grown[5] == 0, "{grown:?}");
        // The kernel counts a byte for each SYN sent and each FIN sent or received.
        ensure!((received..=received + 4).contains(&grown[2]), "received {received}: {grown:?}");
        ensure!((sent..=sent + 8).contains(&grown[3]), "sent {sent}: {grown:?}");
    }
    ensure!(sockets(node, "web:http", "received_segments")? > 20, "no segments");
    let rtt = listed(node, &["backends", "web:http"])?
        .iter()
        .map(|row| row.pointer("/sockets/rtt_us").and_then(Value::as_u64).unwrap_or_default())
        .max();
    ensure!(rtt.is_some_and(|rtt| (1..1_000_000).contains(&rtt)), "{rtt:?}");
    // The program is pinned at its hook beside the other one.
    let pin = node.pin_path().join(format!("v{LAYOUT}/links/cgroup_connection"));
    ensure!(pin.exists(), "no pin at {}", pin.display());
    // Nothing is translated per packet.
    let packets: u64 = listed(node, &["backends", "web:http"])?
        .iter()
        .map(|row| number(row, "forward_packets"))
        .sum();
    ensure!(packets == 0, "{packets} packets");

    perf(&cluster)
}

/// Checks an upload by iperf3: it is counted while it runs, and whole at its end. One that is reset
/// is reported as such.
fn perf(cluster: &Cluster) -> Result<()> {
    let node = cluster.node();
    let [vip, vip6] = cluster_ip(30);
    let backend = &cluster.backends[0];
    let perf =
        Service::new("perf").cluster_ip(vip).cluster_ip(vip6).port(Port::tcp("perf", PERF, PERF));
    cluster.manifests.write(&perf.backends([backend]))?;
    until_backends(node, "perf", 1)?;
    let serve = || backend.spawn("iperf3", ["-s", "--forceflush"]);
    let listens = |server: &mut Running| {
        server.wait_until("iperf3 listens", SOON, |this| {
            this.stdout().contains("listening").then_some(())
        })
    };
    let mut server = serve()?;
    listens(&mut server)?;
    let arguments = |seconds: &str| {
        ["-c", &vip6.to_string(), "-J", "-t", seconds, "-b", "200M"].map(str::to_owned)
    };
    let mut client = cluster.client.spawn("iperf3", arguments("9"))?;
    // It is sampled while it runs.
    let live = until_within(Duration::from_secs(8), "bytes of a live connection", || {
        let sent = sockets(node, "perf", "sent_bytes")?;
        ensure!(sockets(node, "perf", "closed")? == 0, "it is over");
        Ok((sent > 10_000_000).then_some(sent))
    })?;
    ensure!(client.wait(Duration::from_secs(30))?.success(), "iperf3: {}", client.stderr());
    let result: Value = serde_json::from_str(&client.stdout())?;
    let figure = |path: &str| result.pointer(path).and_then(Value::as_u64).context("no figure");
    let (sent, received) = (figure("/end/sum_sent/bytes")?, figure("/end/sum_received/bytes")?);
    let counted = until("both connections' end", || {
        Ok((sockets(node, "perf", "closed")? == 2).then_some(sockets(node, "perf", "sent_bytes")?))
    })?;
    println!(
        "iperf3 sent {sent} bytes, {received} came, counted {counted}, of them {live} while it ran"
    );
    // Data that the server no longer reads at the end is not acknowledged. The other connection
    // carries parameters and results.
    ensure!(
        (received..sent + 20_000).contains(&counted),
        "{received} to {sent} bytes, counted {counted}"
    );

    // The server is killed with data unread: its kernel resets the connection.
    let mut client = cluster.client.spawn("iperf3", arguments("20"))?;
    until("the next connections", || {
        Ok((sockets(node, "perf", "connections")? == 4).then_some(()))
    })?;
    sleep(Duration::from_millis(500));
    let before = sockets(node, "perf", "resets")?;
    let _ = server.kill()?;
    let _ = client.wait(Duration::from_secs(30))?;
    until("a reset", || Ok((sockets(node, "perf", "resets")? > before).then_some(())))?;
    // Nobody listens at the backend.
    let refused = cluster.client.output("iperf3", arguments("1"))?;
    let said = String::from_utf8_lossy(&refused.stdout).into_owned();
    ensure!(said.contains("unable to connect"), "{said}");
    until(
        "a connection that failed",
        || Ok((sockets(node, "perf", "failed")? == 1).then_some(())),
    )?;
    // Every command shows it.
    let opened = sockets(node, "perf", "connections")?;
    let failed = format!("1 of {}", opened + 1);
    for command in [&["backends", "perf"][..], &["services"], &["backends", "-o", "wide"]] {
        let table = node.sluice(command)?;
        let rows = table.lines().filter(|row| row.contains("perf") && row.contains(&failed));
        ensure!(rows.count() == 1, "{command:?} does not show {failed}:\n{table}");
    }
    let client = SocketAddr::new(cluster.client.ipv6().into(), 4001).to_string();
    let server = SocketAddr::new(vip6, PERF).to_string();
    let told = node.sluice(&["explain", "tcp", &client, &server, "--from", "pod"])?;
    let line = format!("failed {failed} through this node: 1 refused");
    ensure!(told.contains(&line), "explain does not say {line:?}:\n{told}");
    Ok(())
}

/// Starts `sluice trace`, and waits until it listens.
fn trace(node: &Node, args: &[&str]) -> Result<Running> {
    let args: Vec<&str> = ["trace", "-o", "json"].into_iter().chain(args.iter().copied()).collect();
    // A listener that was killed has left the end of its lease behind.
    let before = lease(node)?;
    let running = node.spawn_command(node.sluice_command(&args)?)?;
    until("somebody listens", || Ok((![0, before].contains(&lease(node)?)).then_some(())))?;
    Ok(running)
}

/// Returns the time until which somebody listens, in nanoseconds since boot.
fn lease(node: &Node) -> Result<u64> {
    let path = support::pinned(node, "listening")?.display().to_string();
    let dump: Value = serde_json::from_str(
        &node
            .run("bpftool", ["-j", "map", "lookup", "pinned", &path, "key", "0", "0", "0", "0"])?,
    )?;
    dump.pointer("/formatted/value/until_ns")
        .and_then(Value::as_u64)
        .with_context(|| dump.to_string())
}

/// Returns the events that a listener has printed so far.
fn told(trace: &Running) -> Vec<Value> {
    trace.stdout().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Waits for an event with these words.
fn wait_told(trace: &mut Running, wanted: &[(&str, &str)]) -> Result<Value> {
    trace.wait_until(&format!("an event {wanted:?}"), SOON, |this| {
        told(this)
            .into_iter()
            .find(|event| wanted.iter().all(|(field, value)| word(event, field) == *value))
    })
}

#[test]
fn trace_prints_flows_calls_and_refusals_while_it_runs() -> Result<()> {
    if skip("trace_tells") {
        return Ok(());
    }
    let cluster = Cluster::new(
        "trace",
        &Plan { near: 2, args: vec!["--socket-path", "machine"], ..Plan::default() },
    )?;
    let node = cluster.node();
    cluster.manifests.write(&service("empty", 40))?;
    until_backends(node, "empty", 0)?;

    let mut all = trace(node, &[])?;
    // Per packet, from outside: opened, proven, closed.
    let external = external_ip(WEB)[0];
    let replies = cluster.outside.http_get(&url(external, HTTP, ""), 1)?;
    let seen = SocketAddr::new(replies[0].seen.ip(), replies[0].seen.port());
    let (to, from) = (SocketAddr::new(external, HTTP).to_string(), seen.to_string());
    let opened = wait_told(
        &mut all,
        &[
            ("kind", "opened"),
            ("hook", "ingress"),
            ("fate", "forwarded"),
            ("source", &from),
            ("destination", &to),
        ],
    )?;
    ensure!(opened.pointer("/service/service") == Some(&"web".into()), "{opened}");
    ensure!(opened.get("new_destination") == opened.get("backend"), "{opened}");
    ensure!(opened.get("tcp_flags") == Some(&serde_json::json!(["SYN"])), "{opened}");
    ensure!(word(&opened, "device") == node.uplink(), "{opened}");
    for kind in ["proven", "closing"] {
        let _ = wait_told(&mut all, &[("kind", kind), ("source", &from)])?;
    }
    let _ = wait_told(&mut all, &[("kind", "closing"), ("hook", "egress"), ("reason", "reply")])?;
    // At the socket: TCP and UDP, translated and refused.
    let ask = |address: IpAddr| {
        cluster
            .client
            .output("curl", ["-gsS", "-m", "3", "-o", "/dev/null", &url(address, HTTP, "")])
    };
    ensure!(ask(cluster_ip(WEB)[1])?.status.success(), "curl is not answered");
    let call = wait_told(
        &mut all,
        &[("kind", "call"), ("hook", "connect"), ("reason", "socket_connect"), ("command", "curl")],
    )?;
    ensure!(number(&call, "process") > 1 && call.get("source").is_none(), "{call}");
    ensure!(
        word(&call, "destination") == SocketAddr::new(cluster_ip(WEB)[1], HTTP).to_string(),
        "{call}"
    );
    ensure!(cluster.client.udp_ask((cluster_ip(WEB)[0], DNS).into(), 1)?.len() == 1);
    let _ = wait_told(&mut all, &[("kind", "call"), ("hook", "send"), ("protocol", "UDP")])?;
    ensure!(!ask(cluster_ip(40)[0])?.status.success(), "the empty service answers");
    let refused = wait_told(&mut all, &[("reason", "socket_refused"), ("fate", "rejected")])?;
    ensure!(refused.pointer("/service/service") == Some(&"empty".into()), "{refused}");
    // From outside, per packet.
    route_to(&cluster.lab, external_ip(40)[0], node)?;
    let _ =
        cluster.outside.output("curl", ["-gsS", "-m", "3", &url(external_ip(40)[0], HTTP, "")])?;
    let _ = wait_told(
        &mut all,
        &[("kind", "counted"), ("reason", "no_backend_reset"), ("fate", "rejected")],
    )?;

    // A second listener is refused with a reason; the first goes on.
    let second = node.sluice_output(&["trace", "--count", "1"])?;
    let error = String::from_utf8_lossy(&second.stderr).into_owned();
    ensure!(
        !second.status.success() && error.contains("another `sluice trace` listens"),
        "{error}"
    );
    let count = told(&all).len();
    ensure!(ask(cluster_ip(WEB)[0])?.status.success(), "curl is not answered");
    until("the first goes on", || Ok((told(&all).len() > count).then_some(())))?;

    // It is killed: the next one can listen immediately, and without one listening ends by itself.
    let _ = all.kill()?;
    let mut drops = trace(node, &["--drops", "--service", "empty", "--duration", "20s"])?;
    ensure!(ask(cluster_ip(WEB)[0])?.status.success(), "curl is not answered");
    ensure!(!ask(cluster_ip(40)[1])?.status.success(), "the empty service answers");
    let _ = wait_told(&mut drops, &[("reason", "socket_refused")])?;
    ensure!(told(&drops).len() == 1, "{:?}", told(&drops));
    let _ = drops.kill()?;
    let until_ns = lease(node)?;
    ensure!(until_ns != 0, "a killed listener cannot clear the word");
    let now = || -> Result<u64> {
        let text = std::fs::read_to_string("/proc/uptime")?;
        Ok((text.split('.').next().unwrap_or_default().parse::<u64>()?) * 1_000_000_000)
    };
    until("the lease has run out", || Ok((now()? > until_ns).then_some(())))?;

    // It prints as many as requested. A listener that ends well clears the word.
    let mut two = trace(
        node,
        &["--count", "2", "--address", &format!("{}/32", cluster_ip(WEB)[0]), "--protocol", "tcp"],
    )?;
    for _ in 0..3 {
        ensure!(ask(cluster_ip(WEB)[0])?.status.success(), "curl is not answered");
    }
    ensure!(two.wait(SOON)?.success(), "{}", two.stderr());
    ensure!(told(&two).len() == 2, "{}", two.stdout());
    ensure!(two.stderr().contains("2 events, 0 lost"), "{}", two.stderr());
    ensure!(lease(node)? == 0, "the word is still there");
    let error = node.sluice_output(&["trace", "--service", "nobody"])?;
    ensure!(String::from_utf8_lossy(&error.stderr).contains("no service \"nobody\""), "{error:?}");
    let table = {
        let mut running = node.spawn_command(node.sluice_command(&["trace", "--count", "1"])?)?;
        until("somebody listens", || Ok((lease(node)? != 0).then_some(())))?;
        ensure!(ask(cluster_ip(WEB)[0])?.status.success(), "curl is not answered");
        let _ = running.wait(SOON)?;
        running.stdout()
    };
    println!("{table}");
    ensure!(table.starts_with("TIME") && table.contains("default/web:http"), "{table}");
    Ok(())
}

#[test]
fn top_shows_rates_once_and_live() -> Result<()> {
    if skip("top_shows") {
        return Ok(());
    }
    let cluster = Cluster::new(
        "top",
        &Plan { near: 2, args: vec!["--socket-path", "machine"], ..Plan::default() },
    )?;
    let node = cluster.node();
    cluster.manifests.write(&service("empty", 40))?;
    until_backends(node, "empty", 0)?;
    let traffic = || -> Result<()> {
        ensure!(cluster.client.http_get(&url(cluster_ip(WEB)[0], HTTP, ""), 20)?.len() == 20);
        ensure!(
            cluster.client.udp_ask_connected((cluster_ip(WEB)[0], DNS).into(), 20)?.len() == 20
        );
        let _ = cluster
            .client
            .output("curl", ["-gsS", "-m", "3", &url(cluster_ip(40)[0], HTTP, "")])?;
        Ok(())
    };
    // Without a terminal it prints one table.
    let mut once = node.spawn_command(node.sluice_command(&["top", "--interval", "3s"])?)?;
    sleep(Duration::from_millis(500));
    traffic()?;
    ensure!(once.wait(SOON)?.success(), "{}", once.stderr());
    let text = once.stdout();
    println!("{text}");
    let row = |port: &str| {
        let rows = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.into_iter().find(|row| row.get(..3) == Some(&["default/web", port, "IPv4"][..]))
    };
    for port in ["80/TCP", "53/UDP"] {
        let row = row(port).with_context(|| format!("no row of {port}"))?;
        ensure!(row[3] != "0" && row[4] != "0" && row[5] != "0", "{row:?}");
    }
    ensure!(text.contains("socket_refused   default/empty"), "{text}");

    // With a terminal it runs until a key is pressed.
    let program = node.sluice_command(&["top", "--interval", "300ms"])?;
    let line: Vec<String> = std::iter::once(program.get_program())
        .chain(program.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let mut command = node.command("script");
    let _ = command
        .args(["-qefc", &format!("stty rows 40 cols 120; exec {}", line.join(" ")), "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut terminal = command.spawn().context("cannot start `script`")?;
    sleep(Duration::from_secs(1));
    traffic()?;
    sleep(Duration::from_secs(1));
    let mut keys = terminal.stdin.take().context("no keys")?;
    std::io::Write::write_all(&mut keys, b"nq")?;
    let output = terminal.wait_with_output()?;
    let screen = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {screen}", output.status);
    for word in ["Services", "Backends", "default/", "quit"] {
        ensure!(screen.contains(word), "no {word}: {screen}");
    }
    // It restores the terminal.
    ensure!(screen.contains("\u{1b}[?1049h") && screen.contains("\u{1b}[?1049l"), "{screen}");
    ensure!(status(node)?.pointer("/last/ready") == Some(&Value::Bool(true)));
    Ok(())
}
