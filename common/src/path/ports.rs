//! Allocates source ports for clients.

use crate::abi::Flow;
use crate::family::Family;
use crate::maglev;
use crate::packet::header::protocol;
use crate::reason::Reason;
use crate::tables::Tables;

use super::entry::{gives_way, leads_back, partner_key};
use super::{Decision, Record, Step, Verdict};

/// Number of source ports tried for a flow that must be remapped.
pub const REMAP_TRIES: u32 = 8;

/// Reports whether the client's address becomes one that this host's own sockets use. Their direct
/// connections to the same backend know nothing of the flow, so it gets a port that the host
/// assigns to no socket.
#[inline(always)]
pub fn uses_host_address<A: Copy + Eq>(flow: &Flow<A>) -> bool {
    !flow.is_direct()
        && (!flow.is_hairpin() && (flow.translates_source() || flow.is_of_host())
            || flow.source == flow.destination)
}

/// Reports whether a direct connection keeps its port: the socket that holds it is the connection's
/// own.
#[inline(always)]
pub fn keeps_direct<F: Family>(decision: &Decision<F>) -> bool {
    decision.flow.is_direct() && decision.flow.source_port == decision.key.source_port
}

/// Finds a source port with which the new flow's reply tuple is free. The packet's own port is
/// tried first, except for a client that gets or has this host's address, whose port follows from
/// its tuple.
#[inline(always)]
pub(super) fn allocate<F: Family, T: Tables<F>>(tables: &T, decision: &mut Decision<F>) {
    let hash = maglev::hash::<F>(&decision.key);
    // The owner of an address that a foreign source uses may have a direct connection from that
    // port.
    let takes_another = decision.is_foreign && decision.record == Record::Open;
    let keeps = !uses_host_address(&decision.flow) && !takes_another;
    let first = tables.ports_to_skip().wrapping_add(u32::from(!keeps));
    for attempt in first..first.wrapping_add(REMAP_TRIES) {
        decision.flow.source_port = if attempt == 0 {
            decision.key.source_port
        } else {
            port_at(maglev::scale(hash.wrapping_add(attempt.wrapping_mul(0x9e37_79b9)), PORTS))
        };
        if is_free(tables, decision, decision.flow.source_port) {
            decision.step = Step::Done;
            return;
        }
    }
    decision.step = Step::SearchPort;
}

/// Takes the last step: walks all source ports. If none is free the client is refused.
pub fn search<F: Family, T: Tables<F>>(tables: &T, decision: &mut Decision<F>) {
    finish_search(walk_ports(tables, decision), decision);
}

/// Returns the first source port that is free, out of all.
pub fn walk_ports<F: Family, T: Tables<F>>(tables: &T, decision: &Decision<F>) -> Option<u16> {
    let start = search_start::<F>(decision);
    let mut ports = (0..PORTS).map(|index| port_of_step(start, index));
    ports.find(|port| is_free(tables, decision, *port))
}

/// Returns where the walk over all source ports begins.
#[inline(always)]
pub fn search_start<F: Family>(decision: &Decision<F>) -> u32 {
    maglev::scale(maglev::hash::<F>(&decision.key), PORTS)
}

/// Returns the port that the walk tries in step `index`, which is below [`PORTS`].
#[inline(always)]
pub fn port_of_step(start: u32, index: u32) -> u16 {
    let at = start.wrapping_add(index);
    port_at(if at < PORTS { at } else { at.wrapping_sub(PORTS) })
}

/// Applies the result of the walk.
#[inline(always)]
pub fn finish_search<F: Family>(found: Option<u16>, decision: &mut Decision<F>) {
    decision.step = Step::Done;
    if let Some(port) = found {
        decision.flow.source_port = port;
    } else {
        // Refuse immediately; a silent drop would leave the client waiting.
        let verdict = if decision.record == Record::Nothing {
            Verdict::Drop
        } else if decision.key.protocol == protocol::TCP {
            Verdict::Reset
        } else {
            Verdict::Unreachable
        };
        decision.set(verdict, Reason::PortsExhausted);
        decision.record = Record::Nothing;
    }
}

/// The ranges of source ports for clients, first and last port of each. They lie outside the usual
/// ephemeral range, so that they collide with no port that a client or this host picks itself.
pub const PORT_RANGES: [(u16, u16); 2] = [(1_024, 29_999), (61_000, 65_535)];
/// Number of ports in [`PORT_RANGES`].
pub const PORTS: u32 = LOW + ports_in(PORT_RANGES[1]);
const LOW: u32 = ports_in(PORT_RANGES[0]);

const fn ports_in((first, last): (u16, u16)) -> u32 {
    (last as u32).saturating_sub(first as u32).saturating_add(1)
}

/// Returns the port with an index below [`PORTS`].
#[inline(always)]
pub(super) fn port_at(index: u32) -> u16 {
    let [low, high] = PORT_RANGES;
    if index < LOW {
        low.0.wrapping_add(index as u16)
    } else {
        high.0.wrapping_add(index.wrapping_sub(LOW) as u16)
    }
}

/// Reports whether a port is in [`PORT_RANGES`].
#[inline(always)]
pub(super) fn is_given(port: u16) -> bool {
    let [low, high] = PORT_RANGES;
    port >= low.0 && port <= low.1 || port >= high.0
}

/// Reports whether the reply tuple of a new flow is free for it with this source port.
#[inline(always)]
pub fn is_free<F: Family, T: Tables<F>>(
    tables: &T,
    decision: &Decision<F>,
    source_port: u16,
) -> bool {
    let key = &decision.key;
    let mut reply = partner_key::<F>(&decision.flow, key.protocol);
    reply.destination_port = source_port;
    if matches!(tables.settings(), Some(settings) if settings.has_imported())
        && tables.imported(&reply).is_some()
    {
        return false;
    }
    let (entry, is_embryonic) = match tables.flow(&reply) {
        Some(entry) => (entry, false),
        None => match tables.embryonic(&reply) {
            Some(entry) => (entry, true),
            None => return true,
        },
    };
    leads_back::<F>(entry, key)
        || gives_way(entry, is_embryonic, key.protocol, decision.record, tables.now())
}
