//! The node's own netfilter rules decide about Services' packets as they do with kube-proxy,
//! whoever is masqueraded.

use std::fmt::Write as _;

use crate::support::stack::{
    ClusterIps, MODES, Mode, Proxy, Question, Stack, Way, ask_all, counters, none_wrong,
    replace_table,
};
use crate::support::{Pair, addresses_of_client, addresses_of_pod, skip, unless_unsupported};
use anyhow::{Context, Result};
use sluice_lab::{Cni, NodeOptions, Overlay};

/// The conversations that a policy ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ends {
    Nobodys,
    Pods,
    Outsides,
    All,
}

impl Ends {
    fn ends(self, client: &str) -> bool {
        match self {
            Self::Nobodys => false,
            Self::Pods => client == "pod",
            Self::Outsides => client == "outside",
            Self::All => true,
        }
    }
}

/// Returns policies: a name, the hook and priority of a chain, a rule for each family, and the
/// conversations that they end.
fn policies(stack: &Stack) -> Vec<(&'static str, &'static str, [String; 2], Ends)> {
    let pod = addresses_of_pod(&stack.pod);
    let outside = addresses_of_client(&stack.outside);
    let (near, far) = (addresses_of_pod(&stack.near), addresses_of_pod(&stack.far));
    let of_family = |rule: &dyn Fn(usize, &str) -> String| [rule(0, "ip"), rule(1, "ip6")];
    let endpoints = |family: usize| format!("{{ {}, {} }}", near[family], far[family]);
    let forward = "forward priority filter";
    let networks = |family: usize| {
        let [client, length] = [outside[family].to_string(), ["24", "64"][family].to_owned()];
        format!("{client}/{length}")
    };
    let device = stack.pod.host_device();
    let by_device = [
        format!("meta nfproto ipv4 iifname {device}"),
        format!("meta nfproto ipv6 iifname {device}"),
    ];
    vec![
        (
            "nothing",
            forward,
            of_family(&|family, ip| format!("{ip} daddr {} meta mark 0xdead", pod[family])),
            Ends::Nobodys,
        ),
        (
            "to the endpoint",
            forward,
            of_family(&|family, ip| format!("{ip} daddr {}", endpoints(family))),
            Ends::All,
        ),
        (
            "from the endpoint",
            forward,
            of_family(&|family, ip| format!("{ip} saddr {}", endpoints(family))),
            Ends::All,
        ),
        ("from the pod's device", forward, by_device, Ends::Pods),
        (
            "from the pod",
            forward,
            of_family(&|family, ip| format!("{ip} saddr {}", pod[family])),
            Ends::Pods,
        ),
        (
            "to the client",
            forward,
            of_family(&|family, ip| format!("{ip} daddr {}", outside[family])),
            Ends::Outsides,
        ),
        (
            "from the client, raw",
            "prerouting priority raw",
            of_family(&|family, ip| format!("{ip} saddr {}", networks(family))),
            Ends::Outsides,
        ),
        (
            "from the client, mangle",
            "prerouting priority mangle",
            of_family(&|family, ip| format!("{ip} saddr {}", networks(family))),
            Ends::Outsides,
        ),
        (
            "from client to endpoint, behind routing",
            "postrouting priority mangle",
            of_family(&|family, ip| {
                format!(
                    "{ip} saddr {{ {}, {} }} {ip} daddr {}",
                    pod[family],
                    outside[family],
                    endpoints(family)
                )
            }),
            Ends::All,
        ),
    ]
}

fn policies_decide(
    stack: &mut Stack,
    proxy: Proxy,
    mode: &Mode,
    args: &[&str],
) -> Result<Vec<String>> {
    stack.serve_by(proxy, args, mode.cluster_ips)?;
    let mut wrong = Vec::new();
    for (policy, hook, rules, ends) in policies(stack) {
        let [v4, v6] = rules;
        let chain = format!(
            "counter dropped {{ }}\nchain decides {{ type filter hook {hook}; policy accept;
                {v4} counter name dropped drop\n{v6} counter name dropped drop\n}}"
        );
        replace_table(&stack.node, "rules", &chain)?;
        let mut questions = stack.questions(&[Way::Tcp, Way::Udp], mode.cluster_ips);
        for question in &mut questions {
            question.is_answered = !ends.ends(question.client.name());
        }
        let found = ask_all(&questions)?;
        wrong.extend(
            found.into_iter().map(|found| format!("{proxy:?} {args:?}, {policy}: {found}")),
        );
        let dropped =
            counters(&stack.node, "rules")?.get("dropped").copied().context("no counter")?;
        if (dropped > 0) != (ends != Ends::Nobodys) {
            wrong.push(format!("{proxy:?} {args:?}, {policy}: the rule dropped {dropped} packets"));
        }
    }
    stack.node.nft("delete table inet rules")?;
    Ok(wrong)
}

#[test]
fn a_policy_of_the_node_ends_what_it_names_whoever_is_masqueraded() -> Result<()> {
    if skip("a_policy_of_the_node") {
        return Ok(());
    }
    let mut stack = Stack::new("policies", Overlay::None, &NodeOptions::default())?;
    let mut wrong = Vec::new();
    for mode in [&MODES[0], &MODES[2]] {
        wrong.extend(policies_decide(&mut stack, Proxy::Netfilter, mode, mode.args)?);
    }
    none_wrong("control", &wrong)?;
    for mode in &MODES[..4] {
        // A call that was translated leaves nothing to the packet path: once is enough.
        let socket_paths = if mode.args.is_empty() { &["machine", "off"][..] } else { &["off"] };
        for socket_path in socket_paths.iter().map(|word| format!("--socket-path={word}")) {
            let args: Vec<&str> = mode.args.iter().copied().chain([&*socket_path]).collect();
            wrong.extend(policies_decide(&mut stack, Proxy::Sluice, mode, &args)?);
        }
    }
    none_wrong("policies", &wrong)
}

/// Returns the chain of a node that passes only conversations between a client and an endpoint,
/// begun by the client.
fn strict_chain(pairs: &[(String, Pair, Pair)]) -> String {
    let (mut counters, mut rules) = (String::new(), String::new());
    for (name, client, endpoint) in pairs {
        let _ = writeln!(counters, "counter {name}4 {{ }}\ncounter {name}6 {{ }}");
        let _ = write!(
            rules,
            "ip saddr {} ip daddr {} ct state new counter name {name}4 accept\n\
             ip6 saddr {} ip6 daddr {} ct state new counter name {name}6 accept\n",
            client[0], endpoint[0], client[1], endpoint[1]
        );
    }
    format!(
        "counter invalid {{ }}\ncounter established {{ }}\ncounter stranger {{ }}\n{counters}\
         chain forward {{ type filter hook forward priority filter; policy drop;
            ct state invalid counter name invalid drop
            ct state established counter name established accept
            icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report }} accept
            {rules}
            counter name stranger drop
         }}"
    )
}

/// Reports whether client and endpoint are ports of one bridge and the client is not masqueraded.
/// The answers do not pass netfilter if it does not see the bridge, which is why kube-proxy
/// requires `bridge-nf-call-iptables`.
fn stays_on_the_bridge(question: &Question<'_>) -> bool {
    question.client.name() == "pod" && question.name == "near" && question.to.port() < 30_000
}

/// Tests every client at every frontend under the strict chain.
fn only_real_addresses_pass(
    stack: &mut Stack,
    proxy: Proxy,
    mode: &Mode,
    cni: Cni,
) -> Result<Vec<String>> {
    let mut args = mode.args.to_vec();
    args.push("--socket-path=off");
    let mut pairs = Vec::new();
    for (client, of_client) in stack.clients() {
        for target in &stack.targets {
            pairs.push((
                format!("{}_{}_", client.name(), target.name),
                of_client,
                target.addresses,
            ));
        }
    }
    stack.serve_by(proxy, &args, mode.cluster_ips)?;
    let is_bridged = cni == (Cni::Bridge { bridge_nf: false });
    let mut wrong = Vec::new();
    for frontend in ["node port", "ClusterIP"] {
        let what = format!("{proxy:?} {args:?} {cni:?}, {frontend}");
        let mut questions =
            stack.questions(&[Way::Tcp, Way::Udp, Way::Http, Way::Large], mode.cluster_ips);
        questions.retain(|question| (question.to.port() >= 30_000) == (frontend == "node port"));
        if is_bridged && proxy == Proxy::Netfilter && mode.cluster_ips != ClusterIps::All {
            questions.retain(|question| !stays_on_the_bridge(question));
        }
        // Its counters start at zero.
        replace_table(&stack.node, "strict", &strict_chain(&pairs))?;
        // Few packets first, then many: these may displace others where a process carries an
        // overlay's packets.
        let is_small = |question: &Question<'_>| matches!(question.way, Way::Tcp | Way::Udp);
        questions.sort_by_key(|question| !is_small(question));
        let small = questions.iter().take_while(|question| is_small(question)).count();
        let (few, many) = questions.split_at(small);
        for questions in [few, many] {
            wrong.extend(ask_all(questions)?.into_iter().map(|found| format!("{what}: {found}")));
        }
        for (name, packets) in counters(&stack.node, "strict")? {
            let is_asked = questions.iter().any(|question| {
                let family = if question.to.is_ipv4() { 4 } else { 6 };
                name == format!("{}_{}_{family}", question.client.name(), question.name)
            });
            let is_right = match &*name {
                "invalid" | "stranger" => packets == 0,
                "established" => packets > 0,
                // Between two ports of one bridge the chain may see nothing.
                name if name.starts_with("pod_near_") && is_bridged => true,
                _ => (packets > 0) == is_asked,
            };
            if !is_right {
                wrong.push(format!("{what}: the chain counted {packets} packets as {name}"));
            }
        }
    }
    Ok(wrong)
}

fn the_stack_sees_client_and_endpoint(name: &str, overlay: Overlay, cni: Cni) -> Result<()> {
    let options = NodeOptions { cni, ..NodeOptions::default() };
    let mut stack = Stack::new(name, overlay, &options)?;
    let mut wrong = Vec::new();
    for mode in [&MODES[0], &MODES[2], &MODES[3]] {
        wrong.extend(only_real_addresses_pass(&mut stack, Proxy::Netfilter, mode, cni)?);
    }
    none_wrong(&format!("{name}: control"), &wrong)?;
    for mode in &MODES {
        wrong.extend(only_real_addresses_pass(&mut stack, Proxy::Sluice, mode, cni)?);
    }
    none_wrong(name, &wrong)
}

#[test]
fn the_stack_sees_client_and_endpoint_where_pods_are_routed() -> Result<()> {
    if skip("the_stack_sees_client_and_endpoint_where_pods_are_routed") {
        return Ok(());
    }
    the_stack_sees_client_and_endpoint("sees-routed", Overlay::None, Cni::Routed)
}

#[test]
fn the_stack_sees_client_and_endpoint_on_a_bridge_without_netfilter() -> Result<()> {
    if skip("the_stack_sees_client_and_endpoint_on_a_bridge_without_netfilter") {
        return Ok(());
    }
    the_stack_sees_client_and_endpoint(
        "sees-bridge",
        Overlay::None,
        Cni::Bridge { bridge_nf: false },
    )
}

#[test]
fn the_stack_sees_client_and_endpoint_on_a_bridge_with_netfilter() -> Result<()> {
    if skip("the_stack_sees_client_and_endpoint_on_a_bridge_with_netfilter") {
        return Ok(());
    }
    let bridge = Cni::Bridge { bridge_nf: true };
    unless_unsupported(the_stack_sees_client_and_endpoint("sees-bridge-nf", Overlay::None, bridge))
}

#[test]
fn the_stack_sees_client_and_endpoint_over_vxlan() -> Result<()> {
    if skip("the_stack_sees_client_and_endpoint_over_vxlan") {
        return Ok(());
    }
    let bridge = Cni::Bridge { bridge_nf: true };
    unless_unsupported(the_stack_sees_client_and_endpoint("sees-vxlan", Overlay::Vxlan, bridge))
}

#[test]
fn the_stack_sees_client_and_endpoint_over_a_tunnel_without_link_headers() -> Result<()> {
    if skip("the_stack_sees_client_and_endpoint_over_a_tunnel") {
        return Ok(());
    }
    unless_unsupported(the_stack_sees_client_and_endpoint("sees-tun", Overlay::Tun, Cni::Routed))
}

/// Another choice of flags: no client is known to be a pod of this node.
const NOBODY_LOCAL: Mode = Mode {
    name: "--detect-local=none",
    args: &["--detect-local=none"],
    cluster_ips: ClusterIps::Kept,
};

/// Tests every client at every frontend of a node whose pods are ports of one bridge.
fn all_are_served(
    stack: &mut Stack,
    proxy: Proxy,
    mode: &Mode,
    bridge_nf: bool,
) -> Result<Vec<String>> {
    let mut args = mode.args.to_vec();
    args.push("--socket-path=off");
    stack.serve_by(proxy, &args, mode.cluster_ips)?;
    let mut questions = stack.questions(&[Way::Tcp, Way::Udp, Way::Large], mode.cluster_ips);
    if proxy == Proxy::Netfilter && !bridge_nf && mode.cluster_ips != ClusterIps::All {
        questions.retain(|question| !stays_on_the_bridge(question));
    }
    let found = ask_all(&questions)?;
    Ok(found.into_iter().map(|found| format!("{proxy:?} {args:?}: {found}")).collect())
}

fn every_client_is_served_on_a_bridge(name: &str, bridge_nf: bool) -> Result<()> {
    let options = NodeOptions { cni: Cni::Bridge { bridge_nf }, ..NodeOptions::default() };
    let mut stack = Stack::new(name, Overlay::None, &options)?;
    let mut wrong = Vec::new();
    for mode in [&MODES[0], &MODES[2], &MODES[3]] {
        wrong.extend(all_are_served(&mut stack, Proxy::Netfilter, mode, bridge_nf)?);
    }
    none_wrong(&format!("{name}: control"), &wrong)?;
    for mode in MODES.iter().chain([&NOBODY_LOCAL]) {
        wrong.extend(all_are_served(&mut stack, Proxy::Sluice, mode, bridge_nf)?);
    }
    none_wrong(name, &wrong)
}

#[test]
fn every_mode_serves_every_client_on_a_bridge_without_netfilter() -> Result<()> {
    if skip("every_mode_serves_every_client_on_a_bridge_without_netfilter") {
        return Ok(());
    }
    every_client_is_served_on_a_bridge("modes-bridge", false)
}

#[test]
fn every_mode_serves_every_client_on_a_bridge_with_netfilter() -> Result<()> {
    if skip("every_mode_serves_every_client_on_a_bridge_with_netfilter") {
        return Ok(());
    }
    unless_unsupported(every_client_is_served_on_a_bridge("modes-bridge-nf", true))
}
