//! Sluice's own flows, as a release and its preparation need them: which are live, and which
//! conntrack has to know.

use sluice_common::abi::{Flow, flow, state};
use sluice_common::packet::header::protocol;
use sluice_common::path::partner_key;

use crate::node::conntrack::{End, Translated};
use crate::node::dataplane::{KernelStack, Maps};
use crate::node::fragments::ticks as now;

/// A UDP flow that has been idle for more ticks than this counts as ended. Its entry may be nine
/// ticks older than its last packet.
const UDP_IDLE_TICKS: u32 = 19;
/// So does a connection whose client has not answered for so many ticks, and one that both sides
/// have closed or that was reset.
const UNANSWERED_TICKS: u32 = 30;
const ENDED_TICKS: u32 = 3;

/// Returns the number of live flows of a family. The others are removed: their entries would catch
/// packets of netfilter's connections that happen to get the same source port.
pub(super) fn live<F: KernelStack>(maps: &Maps) -> anyhow::Result<u64> {
    let (flows, now) = (F::maps(maps).read_flows()?, now());
    let mut count = 0;
    let mut dead = Vec::new();
    for entry in flows.iter().filter(|entry| !entry.flow.is_reply()) {
        let idle = now.wrapping_sub(entry.flow.seen);
        if is_live(entry.tuple.protocol, &entry.flow, entry.embryonic, idle) {
            count += u64::from(!entry.flow.translates_source());
        } else {
            dead.extend([entry.tuple, partner_key::<F>(&entry.flow, entry.tuple.protocol)]);
        }
    }
    F::maps(maps).forget(&dead)?;
    Ok(count)
}

/// Returns the connections of this host's own sockets that are translated after conntrack has seen
/// them.
pub(super) fn of_host<F: KernelStack>(maps: &Maps) -> anyhow::Result<Vec<Translated>> {
    let (flows, now) = (F::maps(maps).read_flows()?, now());
    // An ended one would stay in conntrack, and a process may open a connection from the same port.
    let its = flows.iter().filter(|entry| {
        entry.flow.flags & (flow::REPLY | flow::HOST) == flow::HOST
            && is_live(
                entry.tuple.protocol,
                &entry.flow,
                entry.embryonic,
                now.wrapping_sub(entry.flow.seen),
            )
    });
    Ok(its
        .map(|entry| {
            let client = (F::ip(entry.tuple.source), entry.tuple.source_port);
            let frontend = (F::ip(entry.tuple.destination), entry.tuple.destination_port);
            untranslated(entry.tuple.protocol, client, frontend)
        })
        .collect())
}

/// Returns the connections to backends that come from an address of this node, and that netfilter
/// does not see in this form.
pub(super) fn clear<F: KernelStack>(maps: &Maps) -> anyhow::Result<Vec<Translated>> {
    let flows = F::maps(maps).read_flows()?;
    let unseen = flows.iter().filter(|entry| {
        let (seen, flow) = (&entry.tuple, &entry.flow);
        let changes = (flow.source, flow.source_port) != (seen.source, seen.source_port);
        !flow.is_reply() && (flow.is_of_host() || flow.translates_source() && changes)
    });
    Ok(unseen
        .map(|entry| {
            let seen_as = (F::ip(entry.flow.source), entry.flow.source_port);
            let backend = (F::ip(entry.flow.destination), entry.flow.destination_port);
            untranslated(entry.tuple.protocol, seen_as, backend)
        })
        .collect())
}

/// Returns a connection that conntrack sees untranslated.
fn untranslated(protocol: u8, source: End, destination: End) -> Translated {
    Translated {
        protocol,
        client: source,
        frontend: destination,
        backend: destination,
        seen_as: source,
        closing: false,
        left: 0,
    }
}

/// Whether a flow that has been idle for so many ticks may still have packets.
fn is_live<A: Copy>(protocol_number: u8, entry: &Flow<A>, embryonic: bool, idle: u32) -> bool {
    const BOTH: u8 = state::FIN_FORWARD | state::FIN_REPLY;
    if protocol_number == protocol::UDP {
        idle <= UDP_IDLE_TICKS
    } else if entry.state & state::RESET != 0 || entry.state & BOTH == BOTH {
        idle <= ENDED_TICKS
    } else {
        !embryonic || idle <= UNANSWERED_TICKS
    }
}

#[cfg(test)]
mod tests {
    use sluice_common::abi::Ipv4Address;

    use super::*;

    #[test]
    fn flows_are_waited_for_while_they_may_have_packets() {
        use protocol::{TCP, UDP};
        let entry = |state| Flow::<Ipv4Address> { state, ..Flow::default() };
        for (what, protocol, entry, embryonic, idle, lives) in [
            ("an idle connection", TCP, entry(state::ESTABLISHED), false, 100_000, true),
            ("half closed", TCP, entry(state::FIN_FORWARD), false, 5_000, true),
            ("just closed", TCP, entry(state::FIN_FORWARD | state::FIN_REPLY), false, 3, true),
            ("closed", TCP, entry(state::FIN_FORWARD | state::FIN_REPLY), false, 4, false),
            ("reset", TCP, entry(state::RESET), false, 4, false),
            ("a SYN", TCP, entry(0), true, 30, true),
            ("a SYN long ago", TCP, entry(0), true, 31, false),
            ("datagrams", UDP, entry(state::ESTABLISHED), false, 19, true),
            ("datagrams before", UDP, entry(state::ESTABLISHED), false, 20, false),
        ] {
            assert_eq!(is_live(protocol, &entry, embryonic, idle), lives, "{what}");
        }
    }
}
