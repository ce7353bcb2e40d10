//! Flows of ours, as a release and what comes before it need them: which still have packets, and
//! what conntrack should know.

use sluice_common::abi::{Flow, flow, state};
use sluice_common::packet::header::protocol;
use sluice_common::path::partner_key;

use crate::node::conntrack::{End, Translated};
use crate::node::dataplane::{KernelStack, Maps};
use crate::node::fragments::ticks as now;

/// A UDP flow that was idle for so many ticks is not waited for. Its entry may be nine ticks older
/// than its last packet.
const UDP_IDLE_TICKS: u32 = 19;
/// Nor is a connection whose client has not answered for so many ticks, or that both sides have
/// ended.
const UNANSWERED_TICKS: u32 = 30;
const ENDED_TICKS: u32 = 3;

/// How many flows of a family are under way. The others are forgotten: their entries would catch
/// packets of netfilter's connections that happen to get the same source port.
pub(super) fn live<F: KernelStack>(maps: &Maps) -> anyhow::Result<u64> {
    let (flows, now) = (F::flows(maps)?, now());
    let mut count = 0;
    let mut dead = Vec::new();
    for entry in flows.iter().filter(|entry| entry.flow.flags & flow::REPLY == 0) {
        let idle = now.wrapping_sub(entry.flow.seen);
        if is_live(entry.tuple.protocol, &entry.flow, entry.embryonic, idle) {
            count += u64::from(entry.flow.flags & flow::SOURCE == 0);
        } else {
            dead.extend([entry.tuple, partner_key::<F>(&entry.flow, entry.tuple.protocol)]);
        }
    }
    F::forget(maps, &dead)?;
    Ok(count)
}

/// The connections of this host's own sockets that are translated behind conntrack, as it sees
/// them.
pub(super) fn of_host<F: KernelStack>(maps: &Maps) -> anyhow::Result<Vec<Translated>> {
    let (flows, now) = (F::flows(maps)?, now());
    // One that has ended would be kept for a connection that a process may open from the same port.
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

/// The connections to backends that appear as this node's and that netfilter does not see as such.
pub(super) fn clear<F: KernelStack>(maps: &Maps) -> anyhow::Result<Vec<Translated>> {
    let flows = F::flows(maps)?;
    let unseen = flows.iter().filter(|entry| {
        let (seen, flow) = (&entry.tuple, &entry.flow);
        let changes = (flow.source, flow.source_port) != (seen.source, seen.source_port);
        flow.flags & flow::REPLY == 0
            && (flow.flags & flow::HOST != 0 || flow.flags & flow::SOURCE != 0 && changes)
    });
    Ok(unseen
        .map(|entry| {
            let seen_as = (F::ip(entry.flow.source), entry.flow.source_port);
            let backend = (F::ip(entry.flow.destination), entry.flow.destination_port);
            untranslated(entry.tuple.protocol, seen_as, backend)
        })
        .collect())
}

/// A connection of which conntrack sees both ends as they are.
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

/// Whether a flow that was idle for so many ticks may still have packets.
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
