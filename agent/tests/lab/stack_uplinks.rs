//! Two uplinks, with routes by source and by mark as Amazon's VPC CNI has them: what came in by the
//! first one leaves by it, wherever the endpoint's own packets go.

use crate::support::stack::{
    MODES, Mode, NEAR, Proxy, Question, Stack, Target, Way, ask_all, counters, none_wrong,
    replace_table,
};
use crate::support::{Pair, addresses_of_client, addresses_of_pod, skip};
use anyhow::{Context, Result};
use sluice_lab::{NodeOptions, Overlay, RpFilter};

/// The node's addresses on its second uplink, and the router's.
const SECOND: [&str; 2] = ["192.0.3.11", "2001:db8:0:3::11"];
const SECOND_GATEWAY: [&str; 2] = ["192.0.3.1", "2001:db8:0:3::1"];
/// The mark of what has come in by the first uplink, and leaves by it.
const MARK: &str = "0x80";

/// Gives the node a second uplink, by which everything from the endpoint's address leaves, and the
/// network there no patience with other sources.
fn add_second_uplink(stack: &Stack, endpoint: Pair) -> Result<()> {
    let [own4, own6] = SECOND;
    let [gateway4, gateway6] = SECOND_GATEWAY;
    let [endpoint4, endpoint6] = endpoint;
    let (node, router) = (&stack.node, stack.lab.router());
    let _ = router.ip(&format!(
        "link add to-eth1 type veth peer name eth1 netns {}\nlink set to-eth1 up\n\
         addr add {gateway4}/24 dev to-eth1\naddr add {gateway6}/64 dev to-eth1 nodad",
        node.path().display()
    ))?;
    let _ = node.ip(&format!(
        "link set eth1 up\naddr add {own4}/24 dev eth1\naddr add {own6}/64 dev eth1 nodad\n\
         route add default via {gateway4} dev eth1 table 200\nroute add default via {gateway6} dev eth1 table 200"
    ))?;
    for (family, endpoint) in [("-4", endpoint4), ("-6", endpoint6)] {
        for rule in [
            format!("pref 512 to {endpoint} lookup main"),
            format!("pref 1024 fwmark {MARK}/{MARK} lookup main"),
            format!("pref 1536 from {endpoint} lookup 200"),
        ] {
            let _ = node.run("ip", [family, "rule", "add"].into_iter().chain(rule.split(' ')))?;
        }
    }
    let _ = router.ip(&format!(
        "route add {endpoint4}/32 via {own4}\nroute add {endpoint6}/128 via {own6}"
    ))?;
    replace_table(
        node,
        "cni",
        &format!(
            "chain mangle {{
                type filter hook prerouting priority mangle;
                iifname {} fib daddr type local ct mark set ct mark or {MARK}
                iifname \"lxc*\" meta mark set ct mark and {MARK}
            }}",
            node.uplink()
        ),
    )?;
    replace_table(
        router,
        "network",
        &format!(
            "counter foreign {{ }}
            chain arrives {{
                type filter hook prerouting priority raw;
                iifname to-eth1 ip saddr != {{ {own4}, {endpoint4} }} counter name foreign drop
                iifname to-eth1 ip6 saddr != {{ {own6}, {endpoint6}, fe80::/10, :: }} counter name foreign drop
            }}"
        ),
    )
}

/// Packets that have left by the second uplink with an address that is not its own.
fn foreign(stack: &Stack) -> Result<u64> {
    let counters = counters(stack.lab.router(), "network")?;
    counters.get("foreign").copied().context("no counter")
}

/// Sends requests of a client outside to node ports of the first uplink.
fn answers_leave_as_questions_came(
    stack: &mut Stack,
    proxy: Proxy,
    mode: &Mode,
    policy: &str,
) -> Result<Vec<String>> {
    stack.serve_by(proxy, mode.args, mode.cluster_ips)?;
    let mut questions = Vec::new();
    for target in &stack.targets {
        for family in 0..2 {
            for way in [Way::Tcp, Way::Udp, Way::Http, Way::Large] {
                let to = target.by_node_port(stack.addresses, way, family);
                let client = &*stack.outside;
                let seen = target.is_local.then(|| addresses_of_client(&stack.outside)[family]);
                questions.push(Question { seen, ..Question::new(client, way, to, target.name) });
            }
        }
    }
    let what = format!("{proxy:?} {} {policy}", mode.name);
    let before = foreign(stack)?;
    let mut wrong: Vec<String> =
        ask_all(&questions)?.into_iter().map(|found| format!("{what}: {found}")).collect();
    let foreign = foreign(stack)? - before;
    if foreign > 0 {
        wrong.push(format!(
            "{what}: {foreign} packets left by the second uplink with another's address"
        ));
    }
    Ok(wrong)
}

#[test]
fn answers_leave_by_the_uplink_that_the_questions_came_by() -> Result<()> {
    if skip("answers_leave_by_the_uplink") {
        return Ok(());
    }
    // As the CNI sets it: what comes by one uplink may have its way back by the other.
    let options = NodeOptions { rp_filter: RpFilter::Loose, ..NodeOptions::default() };
    let mut stack = Stack::new("uplinks", Overlay::None, &options)?;
    let near = addresses_of_pod(&stack.near);
    add_second_uplink(&stack, near)?;
    // Beside it a pod that leaves by the first uplink as everything else.
    let plain = stack.node.pod("plain")?;
    stack.serve(&plain)?;
    stack.targets = vec![stack.targets[NEAR].clone(), Target::of_pod("plain", 25, &plain)];
    let mut wrong = Vec::new();
    for proxy in [Proxy::Netfilter, Proxy::Sluice] {
        for is_local in [false, true] {
            for target in &mut stack.targets {
                target.is_local = is_local;
            }
            for target in stack.targets.clone() {
                stack.publish(&target)?;
            }
            let policy = if is_local { "Local" } else { "Cluster" };
            let modes = if proxy == Proxy::Netfilter { &MODES[..1] } else { &MODES };
            for mode in modes {
                wrong.extend(answers_leave_as_questions_came(&mut stack, proxy, mode, policy)?);
            }
        }
        none_wrong(&format!("two uplinks by {proxy:?}"), &wrong)?;
    }
    Ok(())
}
