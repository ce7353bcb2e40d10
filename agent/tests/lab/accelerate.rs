//! With `--accelerate on`, packets that the stack would only forward go around it, and no others
//! do.

use std::fmt::Write as _;
use std::net::SocketAddr;

use crate::support::stack::{
    ClusterIps, FAR, MODES, NEAR, Proxy, Question, Stack, Way, ask_all, counters, none_wrong,
    replace_table,
};
use crate::support::{
    SOON, addresses_of_pod, listed, skip, status, unless_unsupported, until, word,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_lab::{Cni, Event, NodeOptions, Overlay, Running};

const OFF: &str = "--accelerate=off";
const ON: &str = "--accelerate=on";
const PER_PACKET: &str = "--socket-path=off";

/// Counts every packet between clients and endpoints that passes netfilter's forwarding.
fn count_forwarded(stack: &Stack, more: &str) -> Result<()> {
    let (near, far) = (addresses_of_pod(&stack.near), addresses_of_pod(&stack.far));
    let mut rules = String::new();
    for (family, ip) in ["ip", "ip6"].into_iter().enumerate() {
        let endpoints = format!("{{ {}, {} }}", near[family], far[family]);
        for end in ["saddr", "daddr"] {
            writeln!(rules, "{ip} {end} {endpoints} counter name seen {more}")?;
        }
    }
    replace_table(
        &stack.node,
        "rules",
        &format!(
            "counter seen {{ }}\nchain forward {{ type filter hook forward priority filter; {rules} }}"
        ),
    )
}

fn seen(stack: &Stack) -> Result<u64> {
    counters(&stack.node, "rules")?.get("seen").copied().context("no counter")
}

/// Checks that every client reaches every endpoint by every frontend, and whether netfilter sees
/// its packets.
fn reach(stack: &mut Stack, ways: &[Way]) -> Result<()> {
    for mode in [&MODES[0], &MODES[2], &MODES[4]] {
        for accelerate in [OFF, ON, OFF] {
            let args: Vec<&str> =
                mode.args.iter().copied().chain([PER_PACKET, accelerate]).collect();
            stack.serve_by(Proxy::Sluice, &args, mode.cluster_ips)?;
            count_forwarded(stack, "")?;
            let what = format!("{} {accelerate}", mode.name);
            none_wrong(&what, &ask_all(&stack.questions(ways, mode.cluster_ips))?)?;
            let seen = seen(stack)?;
            ensure!((seen == 0) == (accelerate == ON), "{what}: netfilter saw {seen} packets");
        }
    }
    Ok(())
}

#[test]
fn both_ways_go_around_netfilter_and_pass_it_without_the_flag() -> Result<()> {
    if skip("both_ways_go_around_netfilter") {
        return Ok(());
    }
    let mut stack = Stack::new("around", Overlay::None, &NodeOptions::default())?;
    reach(&mut stack, &[Way::Tcp, Way::Udp, Way::Http, Way::Large])
}

#[test]
fn pods_of_a_bridge_go_around_netfilter_too() -> Result<()> {
    if skip("pods_of_a_bridge_go_around") {
        return Ok(());
    }
    let mut stack = Stack::new(
        "around-br",
        Overlay::None,
        &NodeOptions { cni: Cni::Bridge { bridge_nf: true }, ..NodeOptions::default() },
    )?;
    // Between two ports of the bridge, frames are bridged, or routed by the stack from the bridge
    // to itself.
    let _ = stack.targets.remove(NEAR);
    reach(&mut stack, &[Way::Tcp, Way::Udp, Way::Http])
}

#[test]
fn endpoints_behind_an_overlay_are_reached_around_netfilter() -> Result<()> {
    if skip("endpoints_behind_an_overlay") {
        return Ok(());
    }
    for overlay in [Overlay::Vxlan, Overlay::Tun] {
        unless_unsupported((|| {
            let mut stack = Stack::new("around-ov", overlay, &NodeOptions::default())?;
            reach(&mut stack, &[Way::Tcp, Way::Udp, Way::Http])
        })())?;
    }
    Ok(())
}

#[test]
fn a_rule_that_drops_stops_only_what_passes_the_stack() -> Result<()> {
    if skip("a_rule_that_drops_stops_only") {
        return Ok(());
    }
    let mut stack = Stack::new("around-drop", Overlay::None, &NodeOptions::default())?;
    for accelerate in [OFF, ON] {
        stack.serve_by(Proxy::Sluice, &[PER_PACKET, accelerate], ClusterIps::Kept)?;
        count_forwarded(&stack, "drop")?;
        let mut questions = stack.questions(&[Way::Tcp, Way::Udp], ClusterIps::Kept);
        for question in &mut questions {
            question.is_answered = accelerate == ON;
        }
        none_wrong(&format!("a drop, {accelerate}"), &ask_all(&questions)?)?;
        let report = preflight(&stack, accelerate)?;
        let told = report.get("what").map(ToString::to_string).unwrap_or_default();
        ensure!(told.contains("inet rules forward (forward, priority 0, 4 rules"), "{report}");
        ensure!(
            word(&report, "result") == if accelerate == ON { "warn" } else { "yes" },
            "{report}"
        );
        let next = word(&report, "next");
        ensure!(
            next.contains("inet rules forward: forward handle") == (accelerate == ON),
            "{report}"
        );
    }
    Ok(())
}

/// Returns what `sluice preflight` finds about acceleration.
fn preflight(stack: &Stack, accelerate: &str) -> Result<Value> {
    let output = stack.node.sluice_output(&["preflight", accelerate, "-o", "json"])?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let checks = report.get("checks").and_then(Value::as_array).cloned().unwrap_or_default();
    checks.into_iter().find(|check| word(check, "check") == "accelerate").context("no check")
}

/// A CNI masquerades what leaves the pods' networks: a flow that went around it must not come back
/// through it in part.
#[test]
fn a_cni_that_masquerades_sees_whole_flows_or_nothing() -> Result<()> {
    if skip("a_cni_that_masquerades_meets") {
        return Ok(());
    }
    let mut stack = Stack::new("around-cni", Overlay::None, &NodeOptions::default())?;
    stack.serve_by(Proxy::Sluice, &[PER_PACKET, ON], ClusterIps::Kept)?;
    stack.node.nft(
        "table inet cni {
            chain forward { type filter hook forward priority filter; ct state invalid drop; }
            chain postrouting {
                type nat hook postrouting priority srcnat;
                ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
                ip6 saddr fd00:10:244::/48 ip6 daddr != fd00:10:244::/48 masquerade
            }
        }\n",
    )?;
    let questions = stack.questions(&[Way::Tcp, Way::Udp, Way::Http, Way::Large], ClusterIps::Kept);
    none_wrong("beside a CNI that masquerades", &ask_all(&questions)?)
}

#[test]
fn a_packet_out_of_hops_is_answered_with_time_exceeded() -> Result<()> {
    if skip("who_runs_out_of_hops") {
        return Ok(());
    }
    let mut stack = Stack::new("around-ttl", Overlay::None, &NodeOptions::default())?;
    for accelerate in [OFF, ON] {
        stack.serve_by(Proxy::Sluice, &[PER_PACKET, accelerate], ClusterIps::Kept)?;
        // The router and the node each take one hop; a packet with one hop left reaches the
        // endpoint.
        for (hops, is_answered) in [("2", false), ("3", true)] {
            stack.outside.sysctl("net/ipv4/ip_default_ttl", hops)?;
            stack.outside.sysctl("net/ipv6/conf/eth0/hop_limit", hops)?;
            for family in 0..2 {
                let wire = stack.outside.packet_socket("eth0")?;
                let to = stack.targets[NEAR].by_node_port(stack.addresses, Way::Udp, family);
                let question =
                    Question { is_answered, ..Question::new(&stack.outside, Way::Udp, to, "near") };
                let what = format!("{accelerate}, {hops} hops, {to}");
                none_wrong(&what, &ask_all(&[question])?)?;
                let told = wire.receive(SOON / 10, is_time_exceeded).is_ok();
                ensure!(told != is_answered, "{what}: time exceeded: {told}");
            }
        }
    }
    Ok(())
}

fn is_time_exceeded(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([8, 0]) => frame.get(23) == Some(&1) && frame.get(34) == Some(&11),
        Some([0x86, 0xdd]) => frame.get(20) == Some(&58) && frame.get(54) == Some(&3),
        _ => false,
    }
}

/// Returns what the status says about acceleration.
fn told(stack: &Stack) -> Result<String> {
    let status = status(&stack.node)?;
    let policy = status.get("last").and_then(|last| last.get("policy")).context("no policy")?;
    Ok(word(policy, "accelerate").to_owned())
}

/// Connections and requests that go on until they are ended.
struct Held(Vec<Running>);

impl Held {
    fn open(stack: &Stack) -> Result<Self> {
        let mut open = Vec::new();
        for target in &stack.targets {
            for (client, _) in stack.clients() {
                for family in 0..2 {
                    let to = |way| target.by_node_port(stack.addresses, way, family).to_string();
                    open.push(client.tool([
                        "tcp-client",
                        "--interval-ms=15",
                        "--to",
                        &to(Way::Tcp),
                    ])?);
                    let udp = [
                        "udp-client",
                        "--count=1000000",
                        "--interval-ms=15",
                        "--to",
                        &to(Way::Udp),
                    ];
                    open.push(client.tool(udp)?);
                }
            }
        }
        for client in &mut open {
            let _ = client
                .wait_event("it is answered", SOON, |event| matches!(event, Event::Reply(_)))?;
        }
        Ok(Self(open))
    }

    /// Checks that all go on and that nothing was lost.
    fn go_on(&mut self, when: &str) -> Result<()> {
        for client in &mut self.0 {
            client.goes_on(3, SOON).with_context(|| format!("it ended {when}"))?;
            let events = client.events();
            let lost = events
                .iter()
                .find(|event| matches!(event, Event::Lost { .. } | Event::Broken { .. }));
            ensure!(lost.is_none(), "{when}: {lost:?}");
        }
        Ok(())
    }
}

#[test]
fn a_restart_turns_it_on_and_off_under_connections_without_a_loss() -> Result<()> {
    if skip("a_restart_turns_it_on_and_off") {
        return Ok(());
    }
    let mut stack = Stack::new("around-turn", Overlay::None, &NodeOptions::default())?;
    stack.serve_by(Proxy::Sluice, &[PER_PACKET, OFF], ClusterIps::Kept)?;
    let mut held = Held::open(&stack)?;
    for accelerate in [ON, OFF, ON] {
        stack.serve_by(Proxy::Sluice, &[PER_PACKET, accelerate], ClusterIps::Kept)?;
        held.go_on(&format!("when the agent came with {accelerate}"))?;
        count_forwarded(&stack, "")?;
        held.go_on(&format!("with {accelerate}"))?;
        let seen = seen(&stack)?;
        ensure!((seen == 0) == (accelerate == ON), "{accelerate}: netfilter saw {seen} packets");
        let told = told(&stack)?;
        ensure!(format!("--accelerate={told}") == accelerate, "the status says {told}");
    }
    Ok(())
}

#[test]
fn a_device_that_goes_takes_its_own_flows_alone() -> Result<()> {
    if skip("a_device_that_goes") {
        return Ok(());
    }
    let mut stack = Stack::new("around-gone", Overlay::None, &NodeOptions::default())?;
    stack.serve_by(Proxy::Sluice, &[PER_PACKET, ON], ClusterIps::Kept)?;
    let to = stack.targets[NEAR].by_node_port(stack.addresses, Way::Tcp, 0).to_string();
    let mut near =
        stack.outside.tool(["tcp-client", "--interval-ms=10", "--timeout-ms=1000", "--to", &to])?;
    let _ = near.wait_event("it is answered", SOON, |event| matches!(event, Event::Reply(_)))?;
    let mut far = Held::open(&stack)?;
    far.0.retain(|client| client.replies().iter().all(|reply| reply.name == "far"));
    ensure!(far.0.len() == 8, "each client asks the far endpoint by both protocols and families");
    let _ = stack.node.ip(&format!("link del {}", stack.near.host_device()))?;
    let _ = near.wait_event("it is lost", SOON, |event| {
        matches!(event, Event::Lost { .. } | Event::Broken { .. })
    })?;
    far.go_on("when another endpoint's device went")?;
    let questions: Vec<Question<'_>> = stack
        .questions(&[Way::Tcp, Way::Udp], ClusterIps::Kept)
        .into_iter()
        .filter(|question| question.name == "far")
        .collect();
    none_wrong("new flows", &ask_all(&questions)?)
}

/// A neighbour that does not answer is reported as the stack reports it.
#[test]
fn an_endpoint_that_does_not_resolve_is_reported_unreachable() -> Result<()> {
    if skip("who_asks_for_an_endpoint_that_nobody_finds") {
        return Ok(());
    }
    let mut stack = Stack::new("around-dead", Overlay::None, &NodeOptions::default())?;
    // The endpoint's end of the link is down, so it answers no request for its link-layer address.
    let _ = stack.near.ip("link set eth0 arp off")?;
    for accelerate in [OFF, ON] {
        stack.serve_by(Proxy::Sluice, &[PER_PACKET, accelerate], ClusterIps::Kept)?;
        let device = stack.near.host_device();
        let _ = stack.node.ip(&format!("neigh flush dev {device} nud all"))?;
        let wire = stack.outside.packet_socket("eth0")?;
        let to = stack.targets[NEAR].by_node_port(stack.addresses, Way::Udp, 0).to_string();
        let mut client =
            stack.outside.tool(["udp-client", "--count=1", "--timeout-ms=300", "--to", &to])?;
        let frame = wire.receive(SOON, |frame| {
            frame.get(12..14) == Some(&[8, 0])
                && frame.get(23) == Some(&1)
                && frame.get(34..36) == Some(&[3, 1])
        });
        let _ = client.wait(SOON)?;
        ensure!(frame.is_ok(), "{accelerate}: nobody said \"host unreachable\"");
    }
    Ok(())
}

#[test]
fn policies_of_ipsec_keep_packets_on_the_stack() -> Result<()> {
    if skip("policies_of_ipsec") {
        return Ok(());
    }
    let mut stack = Stack::new("around-ipsec", Overlay::None, &NodeOptions::default())?;
    let policy = "src 198.51.100.0/24 dst 198.51.100.0/24 dir out";
    if stack.node.ip(&format!("xfrm policy add {policy} action block")).is_err() {
        println!("skipped: this kernel has no IPsec");
        return Ok(());
    }
    stack.serve_by(Proxy::Sluice, &[PER_PACKET, ON], ClusterIps::Kept)?;
    for is_there in [true, false, true] {
        let change = match (is_there, stack.node.ip("xfrm policy")?.contains("198.51.100")) {
            (true, false) => format!("xfrm policy add {policy} action block"),
            (false, true) => format!("xfrm policy delete {policy}"),
            _ => "link".to_owned(),
        };
        let _ = stack.node.ip(&change)?;
        until("the status tells it", || {
            Ok((told(&stack)?.contains("IPsec") == is_there).then_some(()))
        })?;
        count_forwarded(&stack, "")?;
        stack.fresh_ports()?;
        let questions = stack.questions(&[Way::Tcp, Way::Udp], ClusterIps::Kept);
        none_wrong(&format!("with IPsec: {is_there}"), &ask_all(&questions)?)?;
        let seen = seen(&stack)?;
        ensure!((seen > 0) == is_there, "with IPsec: {is_there}, netfilter saw {seen} packets");
    }
    Ok(())
}

#[test]
fn explain_says_what_goes_around_netfilter() -> Result<()> {
    if skip("explain_says_what_goes_around") {
        return Ok(());
    }
    let mut stack = Stack::new("around-told", Overlay::None, &NodeOptions::default())?;
    for accelerate in [OFF, ON] {
        stack.serve_by(Proxy::Sluice, &[PER_PACKET, accelerate], ClusterIps::Kept)?;
        for target in [NEAR, FAR] {
            let to = stack.targets[target].by_node_port(stack.addresses, Way::Tcp, 0);
            let from = SocketAddr::new(stack.outside.ipv4().into(), 40_000);
            let text = stack.node.sluice(&[
                "explain",
                "tcp",
                &from.to_string(),
                &to.to_string(),
                "--from",
                "external",
            ])?;
            let says = text.contains("around netfilter: --accelerate is on");
            ensure!(says == (accelerate == ON), "{accelerate}: {text}");
        }
    }
    let rows = listed(&stack.node, &["services"])?;
    ensure!(!rows.is_empty(), "services are listed");
    Ok(())
}
