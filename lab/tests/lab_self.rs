//! The lab without an agent: plain routing, servers, capture, injection, and that nothing is left
//! behind.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sluice_lab::{
    Cni, DROP_INVALID, Event, Lab, Namespace, NodeOptions, Overlay, RpFilter, Serve, Unsupported,
    is_root, remove_kept, skipped, sweep,
};

const TOOL: &str = env!("CARGO_BIN_EXE_sluice-lab-server");

/// Says so and is true where the test cannot run and is to be skipped.
fn skip(test: &str) -> bool {
    !is_root() && skipped(&format!("{test}: network namespaces need root"))
}

fn url(ip: impl Into<IpAddr>, port: u16, path: &str) -> String {
    format!("http://{}/{path}", SocketAddr::new(ip.into(), port))
}

/// Every client reaches the server by name, over both families, seen with its own address.
fn all_reach(clients: &[(&Namespace, [IpAddr; 2])], name: &str, server: [IpAddr; 2]) -> Result<()> {
    for (client, own) in clients {
        for (to, own) in server.into_iter().zip(own) {
            let what = format!("{} to {to}", client.name());
            let http = client.http_get(&url(to, 8080, ""), 3).context(what.clone())?;
            ensure!(
                http.iter().all(|reply| reply.name == name && reply.seen.ip() == *own),
                "{what}: {http:?}"
            );
            let udp = client.udp_ask(SocketAddr::new(to, 5353), 3).context(what.clone())?;
            ensure!(
                udp.iter().all(|reply| reply.name == name
                    && reply.seen.ip() == *own
                    && reply.from.ip() == to),
                "{what}: {udp:?}"
            );
        }
    }
    Ok(())
}

fn pods_of_two_nodes_talk(overlay: Overlay, options: &NodeOptions) -> Result<()> {
    let started = Instant::now();
    let lab = Lab::with_overlay("two-nodes", overlay)?;
    let (one, two) = (lab.node("n1", options)?, lab.node("n2", options)?);
    let (server, near, far) = (one.pod("server")?, one.pod("near")?, two.pod("far")?);
    let client = lab.client("outside")?;
    println!("{overlay:?} {options:?}: up in {:?}", started.elapsed());
    let _http = server.serve(Serve::Http, 8080)?;
    let _udp = server.serve(Serve::UdpEcho, 5353)?;
    let mut clients: Vec<(&Namespace, [IpAddr; 2])> = vec![
        (&near, [near.ipv4().into(), near.ipv6().into()]),
        (&far, [far.ipv4().into(), far.ipv6().into()]),
    ];
    if overlay == Overlay::None {
        clients.push((&client, [client.ipv4().into(), client.ipv6().into()]));
        clients.push((&two, [two.ipv4().into(), two.ipv6().into()]));
    }
    let address = [server.ipv4().into(), server.ipv6().into()];
    all_reach(&clients, "server", address)?;
    // Bytes enough for full-sized segments and offloads.
    for to in address {
        let events = far.ask(["http-client", "--url", &url(to, 8080, "bytes/3000000")])?;
        ensure!(
            events.iter().any(|event| matches!(event, Event::Done { bytes: 3_000_000, .. })),
            "{events:?}"
        );
    }
    one.ping(two.ipv4())?;
    client.ping(one.ipv6())?;
    near.ping(one.ipv4())?;
    if overlay == Overlay::None {
        near.ping(client.ipv4())?;
    }
    drop(lab);
    println!("{overlay:?}: done in {:?}", started.elapsed());
    Ok(())
}

#[test]
fn routed_pods_talk() -> Result<()> {
    if skip("routed_pods_talk") {
        return Ok(());
    }
    pods_of_two_nodes_talk(Overlay::None, &NodeOptions::default())
}

#[test]
fn bridged_pods_talk_past_a_rule_that_drops_what_conntrack_calls_invalid() -> Result<()> {
    if skip("bridged_pods_talk") {
        return Ok(());
    }
    let options = NodeOptions {
        cni: Cni::Bridge { bridge_nf: true },
        nft: Some(DROP_INVALID.into()),
        ..NodeOptions::default()
    };
    pods_of_two_nodes_talk(Overlay::None, &options)
}

#[test]
fn pods_talk_over_vxlan() -> Result<()> {
    if skip("pods_talk_over_vxlan") {
        return Ok(());
    }
    pods_of_two_nodes_talk(
        Overlay::Vxlan,
        &NodeOptions { cni: Cni::Bridge { bridge_nf: false }, ..NodeOptions::default() },
    )
}

#[test]
fn pods_talk_over_a_tunnel_without_ethernet() -> Result<()> {
    if skip("pods_talk_over_a_tunnel_without_ethernet") {
        return Ok(());
    }
    pods_of_two_nodes_talk(
        Overlay::Tun,
        &NodeOptions { rp_filter: RpFilter::Loose, ..NodeOptions::default() },
    )
}

#[test]
fn a_vlan_uplink_works_or_says_that_it_is_unsupported() -> Result<()> {
    if skip("a_vlan_uplink") {
        return Ok(());
    }
    let lab = Lab::new("vlan")?;
    match lab.node("n1", &NodeOptions { vlan: Some(100), ..NodeOptions::default() }) {
        Ok(node) => node.ping(lab.client("outside")?.ipv4()),
        Err(error) => {
            println!("no VLAN here: {error:#}");
            ensure!(error.downcast_ref::<Unsupported>().is_some(), "{error:#}");
            Ok(())
        }
    }
}

#[test]
fn processes_live_in_the_cgroup_of_their_namespace_and_see_the_bpffs() -> Result<()> {
    if skip("processes_live_in_the_cgroup") {
        return Ok(());
    }
    let lab = Lab::new("cgroups")?;
    let (node, client) = (lab.node("n1", &NodeOptions::default())?, lab.client("outside")?);
    let pod = node.pod("a")?;
    let id = lab.id();
    for (namespace, group) in
        [(&*node, "n1/host"), (&*pod, "n1/pod-a"), (&*client, "outside-outside")]
    {
        let groups = namespace.run("cat", ["/proc/self/cgroup"])?;
        ensure!(groups.lines().any(|line| line == format!("0::/{id}/{group}")), "{groups}");
        let inside = namespace.run("readlink", ["/proc/self/ns/net"])?;
        let closure = namespace.enter(|| std::fs::read_link("/proc/thread-self/ns/net"))??;
        ensure!(
            inside.trim() == closure.to_string_lossy(),
            "{inside} is not {}",
            closure.display()
        );
        ensure!(
            std::fs::read_link("/proc/self/ns/net")? != closure,
            "the lab is in the test's own namespace"
        );
    }
    ensure!(node.cgroup_root().ends_with(format!("{id}/n1")), "{}", node.cgroup_root().display());
    let kind = node.run("stat", ["-f", "-c", "%T", &node.bpffs().to_string_lossy()])?;
    ensure!(kind.trim() == "bpf_fs", "{kind}");
    Ok(())
}

#[test]
fn a_frame_injected_into_a_pods_veth_is_seen_and_answered() -> Result<()> {
    if skip("a_frame_injected") {
        return Ok(());
    }
    let lab = Lab::new("frames")?;
    let node = lab.node("n1", &NodeOptions::default())?;
    let (pod, timeout) = (node.pod("a")?, Duration::from_secs(2));
    let mut capture = node.tcpdump(pod.host_device(), "arp")?;
    let socket = pod.packet_socket("eth0")?;
    // Who has 169.254.1.1? Tell the pod.
    let mut frame = vec![0xff; 6];
    let mac = [2, 0, 0, 0, 0, 9];
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(pod.ipv4().octets());
    frame.extend([0; 6]);
    frame.extend([169, 254, 1, 1]);
    socket.send(&frame)?;
    let answer = socket.receive(timeout, |frame| frame.get(12..14) == Some(&[8, 6]))?;
    ensure!(
        answer.get(20..22) == Some(&[0, 2]) && answer.get(28..32) == Some(&[169, 254, 1, 1]),
        "{answer:02x?}"
    );
    let _ = capture.wait_for("169.254.1.1", timeout)?;
    ensure!(
        capture.finish()?.contains("who-has 169.254.1.1 tell 10.244.1.10"),
        "the capture missed the request"
    );
    Ok(())
}

#[test]
fn xdp_pass_and_full_checksums_can_be_set_up_at_the_uplink() -> Result<()> {
    if skip("xdp_pass") {
        return Ok(());
    }
    let lab = Lab::new("xdp")?;
    let (node, client) = (lab.node("n1", &NodeOptions::default())?, lab.client("outside")?);
    node.uplink_peer_xdp_pass()?;
    node.uplink_peer_xdp_pass().context("a second time")?;
    node.uplink_peer_full_checksums()?;
    let links = lab.router().ip("link show dev to-n1")?;
    ensure!(links.contains("xdp"), "{links}");
    let mut capture = node.tcpdump("eth0", "udp")?;
    let _server = node.serve(Serve::UdpEcho, 7000)?;
    let _ = client.udp_ask_connected((node.ipv4(), 7000).into(), 3)?;
    let text = capture.wait_for("udp sum ok", Duration::from_secs(2))?;
    ensure!(
        !text
            .lines()
            .any(|line| line.contains("> 192.0.2.11.7000") && line.contains("bad udp cksum")),
        "{text}"
    );
    Ok(())
}

#[test]
fn a_removed_pod_breaks_its_connections_and_leaves_nothing() -> Result<()> {
    if skip("a_removed_pod") {
        return Ok(());
    }
    let lab = Lab::new("remove")?;
    let node = lab.node("n1", &NodeOptions::default())?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    let _echo = server.serve(Serve::TcpEcho, 7)?;
    let to = format!("--to={}", SocketAddr::new(server.ipv6().into(), 7));
    let mut talk = client.tool(["tcp-client", &to, "--interval-ms=20", "--timeout-ms=300"])?;
    let _ = talk
        .wait_event("a reply", Duration::from_secs(2), |event| matches!(event, Event::Reply(_)))?;
    let (cgroup, device) = (server.cgroup().to_owned(), server.host_device().to_owned());
    server.remove()?;
    let _ = talk.wait_event("the break", Duration::from_secs(2), |event| {
        matches!(event, Event::Broken { .. })
    })?;
    ensure!(!cgroup.exists() && !node.ip("link show")?.contains(&device), "the pod is still there");
    Ok(())
}

#[test]
fn a_v6_socket_that_speaks_v4_sees_plain_answers_and_streams_are_whole() -> Result<()> {
    if skip("a_v6_socket") {
        return Ok(());
    }
    let lab = Lab::new("clients")?;
    let node = lab.node("n1", &NodeOptions::default())?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    let (_udp, _http, _stream) = (
        server.serve(Serve::UdpEcho, 5353)?,
        server.serve(Serve::Http, 80)?,
        server.serve(Serve::Stream, 9)?,
    );
    let to: SocketAddr = (server.ipv4(), 5353).into();
    let events = client.ask([
        "udp-client",
        &format!("--to={to}"),
        "--mapped",
        "--connected",
        "--source-port=4000",
        "--size=4000",
    ])?;
    let own: SocketAddr = (client.ipv4(), 4000).into();
    ensure!(events.contains(&Event::Connected { local: own, peer: to }), "{events:?}");
    ensure!(
        events.iter().any(
            |event| matches!(event, Event::Reply(reply) if reply.from == to && reply.seen == own)
        ),
        "{events:?}"
    );
    let url = url(server.ipv4(), 80, "");
    let events =
        client.ask(["http-client", "--url", &url, "--mapped", "--keep-alive", "--count=5"])?;
    let ports = events.iter().filter_map(|event| {
        if let Event::Reply(reply) = event { Some(reply.seen.port()) } else { None }
    });
    let ports: Vec<u16> = ports.collect();
    ensure!(ports.len() == 5 && ports.iter().all(|port| Some(port) == ports.first()), "{ports:?}");
    let events =
        client.ask(["stream-client", &format!("--to=[{}]:9", server.ipv6()), "--seconds=1"])?;
    println!("{events:?}");
    ensure!(
        events
            .iter()
            .any(|event| matches!(event, Event::Done { received, .. } if *received > 1000)),
        "{events:?}"
    );
    // Nobody listens: lost, and no failure of the client.
    let lost = client.ask(["udp-client", &format!("--to={}:1", server.ipv4()), "--connected"])?;
    ensure!(lost.iter().any(|event| matches!(event, Event::Lost { .. })), "{lost:?}");
    Ok(())
}

#[test]
fn nginx_serves_in_a_pod_and_the_router_spreads_a_route() -> Result<()> {
    if skip("nginx_serves") {
        return Ok(());
    }
    let lab = Lab::new("nginx")?;
    let (one, two) =
        (lab.node("n1", &NodeOptions::default())?, lab.node("n2", &NodeOptions::default())?);
    let (client, pod) = (lab.client("outside")?, one.pod("web")?);
    let _nginx = pod.nginx(80)?;
    let page = client.run("curl", ["-sS", "--max-time", "3", &url(pod.ipv6(), 80, "")])?;
    ensure!(page == format!("web {}\n", client.ipv6()), "{page}");
    for prefix in ["203.0.113.10/32", "2001:db8:f::10/128"] {
        lab.router().route(prefix, &[&one])?;
        lab.router().route(prefix, &[&one, &two])?;
    }
    lab.router().unroute("203.0.113.10/32")?;
    Ok(())
}

fn left_of(id: &str) -> Result<Vec<String>> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut left: Vec<String> = mounts
        .lines()
        .filter(|line| line.contains(&format!("/{id}/")))
        .map(str::to_owned)
        .collect();
    for root in ["/run/sluice-lab", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        let path = Path::new(root).join(id);
        if path.exists() {
            left.push(path.display().to_string());
        }
    }
    Ok(left)
}

#[test]
fn a_dropped_lab_leaves_nothing_even_after_a_panic() -> Result<()> {
    if skip("a_dropped_lab") {
        return Ok(());
    }
    let lab = Lab::new("drop")?;
    let id = lab.id().to_owned();
    let panicked = std::thread::spawn(move || {
        let node = lab.node("n1", &NodeOptions::default()).expect("a node");
        let server = node.pod("a").and_then(|pod| pod.serve(Serve::Http, 80)).expect("a server");
        assert!(server.pid() == 0, "as a failed test would");
    })
    .join();
    ensure!(panicked.is_err(), "no panic");
    let left = left_of(&id)?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Not a test: what the next ones start in a process of their own, to end it badly.
#[test]
#[ignore = "run by other tests"]
fn a_process_with_a_lab() -> Result<()> {
    let lab = Lab::new("doomed")?;
    let node = lab.node("n1", &NodeOptions::default())?;
    let server = node.pod("a")?.serve(Serve::Http, 80)?;
    std::fs::write(std::env::var("LAB_READY")?, format!("{} {}", lab.id(), server.pid()))?;
    std::thread::sleep(Duration::from_secs(if std::env::var("SLUICE_LAB_KEEP").is_ok() {
        0
    } else {
        60
    }));
    Ok(())
}

struct Doomed {
    owner: std::process::Child,
    id: String,
    server: String,
}

fn start_doomed(name: &str, keep: bool) -> Result<Doomed> {
    let ready = std::env::temp_dir().join(format!("sluice-lab-{name}-{}", std::process::id()));
    let mut command = Command::new(std::env::current_exe()?);
    let _ = command
        .args(["--ignored", "--exact", "a_process_with_a_lab"])
        .env("LAB_READY", &ready)
        .env("SLUICE_LAB_SERVER", TOOL);
    let _ = if keep {
        command.env("SLUICE_LAB_KEEP", "1")
    } else {
        command.env_remove("SLUICE_LAB_KEEP")
    };
    let owner = command.stdout(std::process::Stdio::null()).spawn()?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let text = std::fs::read_to_string(&ready).unwrap_or_default();
        if let Some((id, server)) = text.split_once(' ') {
            std::fs::remove_file(&ready)?;
            return Ok(Doomed { owner, id: id.to_owned(), server: server.to_owned() });
        }
        ensure!(Instant::now() < deadline, "the process with a lab did not come up");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn lives(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

#[test]
fn what_a_killed_owner_leaves_is_swept() -> Result<()> {
    if skip("what_a_killed_owner_leaves") {
        return Ok(());
    }
    let mut doomed = start_doomed("killed", false)?;
    // A sweep spares the labs of the living.
    let _ = sweep()?;
    ensure!(
        !left_of(&doomed.id)?.is_empty() && lives(&doomed.server),
        "swept while its owner lived"
    );
    doomed.owner.kill()?;
    let _ = doomed.owner.wait()?;
    ensure!(lives(&doomed.server), "the server ended with its owner: nothing to sweep");
    let begun = Instant::now();
    // Another test's lab may be quicker to sweep; then there is nothing left to do.
    let _ = sweep()?;
    println!("swept in {:?}", begun.elapsed());
    let deadline = Instant::now() + Duration::from_secs(5);
    while !left_of(&doomed.id)?.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let left = left_of(&doomed.id)?;
    ensure!(left.is_empty() && !lives(&doomed.server), "{left:?}");
    Ok(())
}

#[test]
fn an_interrupted_owner_cleans_up_itself() -> Result<()> {
    if skip("an_interrupted_owner") {
        return Ok(());
    }
    let mut doomed = start_doomed("interrupted", false)?;
    let _ = Command::new("kill").args(["-INT", &doomed.owner.id().to_string()]).status()?;
    let status = doomed.owner.wait()?;
    let left = left_of(&doomed.id)?;
    ensure!(
        status.code() == Some(130) && left.is_empty() && !lives(&doomed.server),
        "{status}: {left:?}"
    );
    Ok(())
}

#[test]
fn a_kept_lab_stays_until_it_is_removed() -> Result<()> {
    if skip("a_kept_lab_stays") {
        return Ok(());
    }
    let mut doomed = start_doomed("kept", true)?;
    let _ = doomed.owner.wait()?;
    let _ = sweep()?;
    ensure!(!left_of(&doomed.id)?.is_empty() && lives(&doomed.server), "it did not stay");
    let removed = remove_kept(Some(&doomed.id))?;
    let left = left_of(&doomed.id)?;
    ensure!(
        removed.contains(&doomed.id) && left.is_empty() && !lives(&doomed.server),
        "{removed:?} {left:?}"
    );
    Ok(())
}
