//! Limits that protect the agent from clients, tenants and processes of the node.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use crate::support::frame::{Frame, Mac, octets};
use crate::support::{
    Cluster, DNS, HTTP, Plan, SOON, WEB, addresses_of_node, addresses_of_pod, cluster_ip,
    external_ip, number, pinned, skip, status, until, until_within, url, word,
};
use anyhow::{Context, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use serde_json::Value;
use sluice::node::status::state_dir;
use sluice_common::abi::{Flow, Ipv4Address, Tuple};
use sluice_lab::{AgentOptions, Namespace, Node, Pod, Port, Service};

/// The port of the health check.
const CHECK: u16 = 32_100;
/// A user that is not root.
const NOBODY: u32 = 65_534;

/// Returns the status code of an answer, which has to come before the kubelet gives up.
fn code(place: &Namespace, to: SocketAddr, path: &str) -> Result<String> {
    let url = url(to.ip(), to.port(), path);
    place
        .run("curl", ["-gsS", "-m", "3", "-o", "/dev/null", "-w", "%{http_code}", &url])
        .with_context(|| format!("{} asks {url}", place.name()))
}

/// A connection of a malicious client.
struct Held {
    stream: TcpStream,
    /// Whether it keeps sending parts of a header.
    slow: bool,
}

/// The outcome of a flood.
#[derive(Debug, Default)]
struct Flood {
    opened: usize,
    closed: usize,
}

/// Keeps this many connections open at each address until it is stopped: half of them silent, half
/// with a request that never becomes complete. Closed ones are opened again.
fn flood(to: &[SocketAddr], each: usize, full: &AtomicBool, end: &AtomicBool) -> Flood {
    let open = |to: &SocketAddr, slow: bool| -> Option<Held> {
        let mut stream = TcpStream::connect_timeout(to, Duration::from_secs(2)).ok()?;
        if slow {
            stream.write_all(b"GET /livez HTTP/1.1\r\n").ok()?;
        }
        stream.set_nonblocking(true).ok()?;
        Some(Held { stream, slow })
    };
    let wanted: Vec<(SocketAddr, bool)> =
        to.iter().flat_map(|to| (0..each).map(move |number| (*to, number % 2 == 0))).collect();
    let mut held: Vec<Option<Held>> = wanted.iter().map(|_| None).collect();
    let mut flood = Flood::default();
    while !end.load(Ordering::Relaxed) {
        for ((to, slow), held) in wanted.iter().zip(&mut held) {
            if end.load(Ordering::Relaxed) {
                break;
            }
            let lives = held.as_mut().is_some_and(|held| {
                let dripped = !held.slow || held.stream.write_all(b"x").is_ok();
                let read = held.stream.read(&mut [0; 512]);
                dripped && read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
            });
            if !lives {
                flood.closed += usize::from(held.is_some());
                *held = open(to, *slow);
                flood.opened += usize::from(held.is_some());
            }
        }
        full.store(true, Ordering::Relaxed);
        sleep(Duration::from_millis(500));
    }
    flood
}

#[test]
fn a_client_that_holds_a_thousand_connections_keeps_nobody_waiting() -> Result<()> {
    if skip("a_client_that_holds_a_thousand_connections") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("crowd", &Plan { near: 1, ..Plan::default() })?;
    let policy = format!("externalTrafficPolicy: Local\n  healthCheckNodePort: {CHECK}");
    cluster.manifests.write(&cluster.web().spec(&policy))?;
    cluster.start_agents(&[])?;
    let node = cluster.node().clone();
    let [v4, v6] = addresses_of_node(&node);
    let ask = || -> Result<()> {
        // The kubelet's probes, those of a scraper on the node, of another pod, and of a load
        // balancer.
        for (place, at, path) in [
            (&*node, SocketAddr::new(v4, 10_256), "livez"),
            (&node, SocketAddr::new(v6, 10_256), "livez"),
            (&node, SocketAddr::new([127, 0, 0, 1].into(), 10_256), "healthz"),
            (&cluster.backends[0], SocketAddr::new(v4, 10_256), "healthz"),
            (&cluster.backends[0], SocketAddr::new(v4, CHECK), ""),
            (&cluster.outside, SocketAddr::new(v4, 10_256), "healthz"),
            (&cluster.outside, SocketAddr::new(v4, CHECK), ""),
            (&cluster.outside, SocketAddr::new(v6, CHECK), ""),
        ] {
            let found = code(place, at, path)?;
            ensure!(found == "200", "{} asks {at}/{path}: {found}", place.name());
        }
        Ok(())
    };
    until("the health check is answered", || Ok(ask().ok()))?;
    let targets = [SocketAddr::new(v4, 10_256), SocketAddr::new(v4, CHECK)];
    let (full, end) = (AtomicBool::new(false), AtomicBool::new(false));
    let flood = scope(|threads| {
        let flooding =
            threads.spawn(|| cluster.client.enter(|| flood(&targets, 1_000, &full, &end)));
        let asked = (|| {
            until_within(Duration::from_mins(1), "the client has opened all", || {
                Ok(full.load(Ordering::Relaxed).then_some(()))
            })?;
            for _ in 0..4 {
                ask()?;
                sleep(Duration::from_millis(500));
            }
            // Meanwhile it held all that it could get: the connections there is room for, and those
            // that wait to be accepted.
            let filter =
                format!("dst {} and ( sport = :10256 or sport = :{CHECK} )", cluster.client.ipv4());
            let all = node.run("ss", ["-Htn", "state", "established", &filter])?;
            Ok::<usize, anyhow::Error>(all.lines().count())
        })();
        end.store(true, Ordering::Relaxed);
        let flood =
            flooding.join().map_err(|_| anyhow::anyhow!("the flood ended in a panic"))??;
        asked.map(|held| (held, flood))
    });
    let (held, flood) = flood?;
    println!("{flood:?}, {held} held at once");
    ensure!(flood.opened >= 2_000 && flood.closed > 1_000, "{flood:?}");
    ensure!(held > 200, "only {held} connections of the client were established");
    ask().context("afterwards")
}

/// Returns a field of the kernel's figures about a process's memory, in KiB.
fn memory(pid: u64, field: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
    Ok(line.trim_matches([':', '\t', ' ', 'k', 'B']).parse()?)
}

/// Reads one whole answer of the metrics.
fn scrape(at: SocketAddr) -> Result<usize> {
    let mut stream = TcpStream::connect(at)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    let length = stream.read_to_string(&mut text)?;
    let is_whole = text.contains("\nsluice_ready{} 1\n") && text.ends_with('\n');
    ensure!(text.starts_with("HTTP/1.1 200 ") && is_whole, "{text}");
    Ok(length)
}

/// Fills the flow table with flows that belong to nobody.
fn fill_flows(node: &Node) -> Result<u32> {
    let map = MapData::from_pin(pinned(node, "flows_v4")?).context("cannot open the flow table")?;
    let max = map.info()?.max_entries();
    let mut flows: HashMap<_, Tuple<Ipv4Address>, Flow<Ipv4Address>> =
        HashMap::try_from(Map::LruHashMap(map)).context("it is no table of flows")?;
    for number in 0..max {
        let source = Ipv4Address { octets: (0x0a80_0000 | number).to_be_bytes() };
        flows.insert(Tuple { source, protocol: 6, ..Tuple::default() }, Flow::default(), 0)?;
    }
    Ok(max)
}

#[test]
fn many_scrapes_at_once_take_no_more_memory_than_one() -> Result<()> {
    if skip("many_scrapes_at_once") {
        return Ok(());
    }
    let cluster = Cluster::new("scrapes", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node();
    println!("{} flows", fill_flows(node)?);
    let at = SocketAddr::new([127, 0, 0, 1].into(), 10_249);
    let pid = number(status(node)?.get("agent").context("no agent")?, "pid");
    // The most memory that was resident during the scrapes.
    let peak = |scrapers: usize| -> Result<u64> {
        fs::write(format!("/proc/{pid}/clear_refs"), "5").context("cannot reset the peak")?;
        scope(|threads| {
            let scraping: Vec<_> =
                (0..scrapers).map(|_| threads.spawn(|| node.enter(|| scrape(at)))).collect();
            scraping.into_iter().try_for_each(|thread| match thread.join() {
                Ok(answer) => answer.and_then(|answer| answer).map(drop),
                Err(_) => bail!("a scraper ended in a panic"),
            })
        })?;
        memory(pid, "VmHWM")
    };
    // Memory that the start and the first scrape took is not returned immediately.
    let (first, one, many) = (peak(1)?, peak(1)?, peak(64)?);
    println!("peak of the first scrape: {first} KiB, of one: {one} KiB, of 64 at once: {many} KiB");
    ensure!(many < 2 * one, "{many} KiB for 64 scrapes, {one} KiB for one");
    Ok(())
}

/// Returns the command that an error suggests.
fn told(text: &str) -> Result<&str> {
    let (_, rest) =
        text.split_once("then run `").with_context(|| format!("no command in: {text}"))?;
    rest.split_once('`').map(|(command, _)| command).context("no end")
}

fn mode(path: &Path) -> Result<u32> {
    Ok(fs::metadata(path)?.mode() & 0o7777)
}

#[test]
fn folders_that_others_may_change_are_refused_with_the_command_that_repairs_them() -> Result<()> {
    if skip("folders_that_others_may_change") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("owned", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node().clone();
    let (pins, state) = (node.pin_path(), state_dir(&node.pin_path()));
    let to_nobody =
        |path: &Path| chown(path, Some(NOBODY), Some(NOBODY)).context("cannot give it away");
    let options = AgentOptions {
        manifests: Some(cluster.manifests.directory().to_owned()),
        ..AgentOptions::default()
    };
    let refused = |what: &str| -> Result<String> {
        let started = node.agent(options.clone())?.wait_ready(SOON);
        let error = format!("{:#}", started.err().with_context(|| format!("{what}: it starts"))?);
        let command = told(&error).context(what.to_owned())?.to_owned();
        println!("{what}: {command}");
        Ok(command)
    };
    let obey = |command: &str| node.run("sh", ["-c", command]).map(drop);
    // Like a BPF file system that was mounted without options, so that somebody else could create a
    // folder first.
    fs::set_permissions(node.bpffs(), fs::Permissions::from_mode(0o1777))?;
    fs::create_dir(&pins)?;
    to_nobody(&pins)?;
    // A link to where an agent, or a cleanup, would be led astray.
    let (victim, astray) = (node.state_directory().join("victim"), pins.join("v999"));
    fs::create_dir(&victim)?;
    fs::write(victim.join("file"), "")?;
    symlink(&victim, &astray)?;
    let command = refused("somebody else's pin path")?;
    let cleanup = node.sluice_output(&["cleanup"])?;
    ensure!(
        !cleanup.status.success() && victim.join("file").exists(),
        "it was cleaned up: {cleanup:?}"
    );
    obey(&command)?;
    let command = refused("a link in the pin path")?;
    ensure!(command == format!("rm {}", astray.display()), "{command}");
    obey(&command)?;
    fs::create_dir_all(&state)?;
    to_nobody(&state)?;
    obey(&refused("somebody else's state directory")?)?;
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777))?;
    obey(&refused("a state directory that everybody may write to")?)?;
    symlink(victim.join("file"), state.join("status.json.new"))?;
    obey(&refused("a link in the state directory")?)?;
    cluster.start_agents(&[])?;
    ensure!(cluster.client.http_get(&url(cluster_ip(WEB)[0], HTTP, ""), 4)?.len() == 4);
    // An existing folder is no longer used once somebody else may change it, whether or not the
    // agent runs.
    to_nobody(&pins)?;
    for words in [&["status"][..], &["services"], &["cleanup", "--force"], &["diff"]] {
        let output = node.sluice_output(words)?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && told(&error).is_ok(), "{words:?}: {output:?}");
    }
    obey(&format!("chown root:root {}", pins.display()))?;
    let _ = node.sluice(&["status"])?;
    // A folder that the agent itself creates, where everybody may create folders, is closed to
    // others.
    cluster.agent().stop()?;
    let _ = node.sluice(&["cleanup"])?;
    ensure!(!pins.exists(), "the pin path is still there");
    cluster.agent().restart()?;
    cluster.agent().wait_ready(3 * SOON)?;
    ensure!(mode(&pins)? == 0o700 && mode(&node.bpffs())? == 0o1777, "{:o}", mode(&pins)?);
    Ok(())
}

/// Returns the link-layer address that a pod sends to.
fn gateway(pod: &Pod) -> Result<Mac> {
    let text = pod.node().run("ip", ["-o", "link", "show", "dev", pod.host_device()])?;
    let word = text.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next());
    let bytes: Vec<u8> = word
        .with_context(|| text.clone())?
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("{text}"))
}

/// Returns the ifindex of Sluice's own device according to the system and according to the
/// programs.
fn own_device(node: &Node) -> Result<(Option<u64>, u64)> {
    let links: Vec<Value> = serde_json::from_str(&node.run("ip", ["-j", "link", "show"])?)?;
    let own = links
        .iter()
        .find(|link| word(link, "ifname") == "sluice0")
        .map(|own| number(own, "ifindex"));
    let path = pinned(node, "settings")?.display().to_string();
    let dump: Vec<Value> =
        serde_json::from_str(&node.run("bpftool", ["-j", "map", "dump", "pinned", &path])?)?;
    let value =
        dump.first().and_then(|entry| entry.pointer("/formatted/value")).context("no settings")?;
    Ok((own, number(value, "own_device")))
}

#[test]
fn the_own_device_is_made_again_when_somebody_removes_it() -> Result<()> {
    if skip("the_own_device_is_made_again") {
        return Ok(());
    }
    let plan = Plan { near: 1, args: vec!["--socket-path", "off"], ..Plan::default() };
    let mut cluster = Cluster::new("vanished", &plan)?;
    let node = cluster.node().clone();
    let wire = cluster.client.packet_socket("eth0")?;
    let gateway = gateway(&cluster.client)?;
    // A request whose last fragment comes first is answered, in both families.
    let asks = |id: u32| -> Result<()> {
        for (vip, client) in cluster_ip(WEB).into_iter().zip(addresses_of_pod(&cluster.client)) {
            let data = [b"7 ".to_vec(), vec![b'x'; 3_000]].concat();
            let client = SocketAddr::new(client, 20_123);
            let question = Frame::udp(client, SocketAddr::new(vip, DNS), &data).at(gateway);
            for fragment in question.fragments(id, 1_024).iter().rev() {
                wire.send(&fragment.bytes())?;
            }
            let (source, at) = (octets(vip), if vip.is_ipv4() { 26 } else { 22 });
            let is_answer = |frame: &[u8]| frame.get(at..at + source.len()) == Some(&*source);
            let _ =
                wire.receive(Duration::from_secs(2), is_answer).with_context(|| vip.to_string())?;
        }
        Ok(())
    };
    asks(1).context("before")?;
    let (before, told) = own_device(&node)?;
    ensure!(before == Some(told), "the programs know of {told}, it is {before:?}");
    for round in 0..3 {
        let _ = node.ip("link del sluice0")?;
        let now = until("the programs know of the next device", || {
            let (now, told) = own_device(&node)?;
            Ok((now == Some(told) && now != before).then_some(told))
        })?;
        let known =
            |device: &Value| number(device, "index") == now && device.to_string().contains("tcx");
        until("it is attached, and the node ready", || {
            let status = status(&node)?;
            let devices =
                status.get("devices").and_then(Value::as_array).cloned().unwrap_or_default();
            let is_ready = status.get("ready") == Some(&Value::Bool(true));
            Ok((is_ready && devices.iter().any(known)).then_some(()))
        })?;
        for (setting, value) in [("accept_local", "1"), ("rp_filter", "0")] {
            let found = node.run("cat", [format!("/proc/sys/net/ipv4/conf/sluice0/{setting}")])?;
            ensure!(found.trim() == value, "{setting} is {}", found.trim());
        }
        asks(10 + round).with_context(|| format!("after it was removed {} times", round + 1))?;
    }
    let log = cluster.agent().log();
    ensure!(log.matches("the device is gone").count() == 3, "{log}");
    Ok(())
}

/// Returns seven Services of a tenant, with more frontends than a node has room for.
fn greedy() -> Vec<Service> {
    let mut all = Vec::new();
    for number in 0..7_u8 {
        let mut service = Service::new(&format!("greedy-{number}"))
            .namespace("tenant")
            .created("2026-01-01T00:00:00Z");
        service = service.cluster_ip(IpAddr::from([10, 96, 1, number + 1]));
        for last in 0..100_u8 {
            service = service.external_ip(IpAddr::from([198, 18, number, last]));
        }
        for port in 0..100_u16 {
            service = service.port(Port::tcp(&format!("p{port}"), 1_000 + port, 8_080));
        }
        all.push(service);
    }
    all
}

#[test]
fn a_node_without_room_is_not_ready_and_stays_alive() -> Result<()> {
    if skip("a_node_without_room") {
        return Ok(());
    }
    let cluster = Cluster::new("full", &Plan { near: 1, ..Plan::default() })?;
    let node = cluster.node();
    let metric = |name: &str| -> Result<Option<f64>> {
        let text = node.run("curl", ["-sS", "-m", "20", "http://127.0.0.1:10249/metrics"])?;
        let mut series = text.lines().filter_map(|line| line.rsplit_once(' '));
        let value = series.find(|(series, _)| series.trim_end_matches("{}") == name);
        Ok(value.and_then(|(_, value)| value.parse().ok()))
    };
    let refused = "sluice_object_flaws{flaw=\"no_room\",level=\"problem\"}";
    let (ready, none) = (metric("sluice_ready")?, metric(refused)?);
    ensure!(ready == Some(1.0) && none.is_none(), "{ready:?}, {none:?}");
    for service in greedy() {
        cluster.manifests.write(&service)?;
    }
    let told = until_within(Duration::from_mins(1), "the node is not ready", || {
        let status = status(node)?;
        let waiting = status
            .pointer("/last/waiting_for")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        let room =
            waiting.iter().filter_map(Value::as_str).find(|text| text.contains("room in the maps"));
        Ok(room.map(str::to_owned).filter(|_| status.get("ready") == Some(&Value::Bool(false))))
    })?;
    println!("{told}");
    ensure!(!node.sluice_output(&["status"])?.status.success(), "the exit code says ready");
    ensure!(
        metric("sluice_ready")? == Some(0.0) && metric(refused)?.is_some_and(|count| count > 0.0)
    );
    // Whatever has room is served, and nobody removes the node because of one tenant.
    for path in ["livez", "healthz"] {
        ensure!(code(node, SocketAddr::new(node.ipv4().into(), 10_256), path)? == "200", "{path}");
    }
    ensure!(cluster.client.http_get(&url(external_ip(WEB)[0], HTTP, ""), 4)?.len() == 4);
    for service in greedy() {
        cluster.manifests.remove(&service)?;
    }
    until_within(Duration::from_mins(1), "it is ready again", || {
        Ok(node.sluice_output(&["status"])?.status.success().then_some(()))
    })
}
