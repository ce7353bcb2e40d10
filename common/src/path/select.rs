//! Which service port a packet asks for, and which of its backends it gets.

use crate::abi::{
    Affinity, AffinityKey, Backend, Class, Range, ServiceKey, TICK_SHIFT, Ticks, Tuple,
    backend as flags, frontend,
};
use crate::family::Family;
use crate::maglev;
use crate::packet::header::{protocol, tcp};
use crate::packet::parse::Headers;
use crate::path::Decision;
use crate::tables::Tables;

/// The service port that a packet asks for and the kind of the frontend: its address's own, else a
/// node port.
#[inline(always)]
pub fn find<F: Family, T: Tables<F>>(
    tuple: &Tuple<F::Address>,
    to_node_port: bool,
    tables: &T,
) -> Option<(u32, u32)> {
    let mut key = ServiceKey {
        address: tuple.destination,
        port: tuple.destination_port,
        protocol: tuple.protocol,
        reserved: 0,
    };
    if let Some(service) = tables.service(&key) {
        return Some((service.service_port, service.kind));
    }
    // The lane of an address is shared: whether node ports are really served there is asked last.
    if !to_node_port || !tables.serves_node_ports(&tuple.destination) {
        return None;
    }
    key.address = F::Address::default();
    tables.service(&key).map(|service| (service.service_port, service.kind))
}

/// Whether the packet goes to a ClusterIP, whatever its port.
#[inline(always)]
pub(super) fn is_cluster_ip<F: Family, T: Tables<F>>(
    tuple: &Tuple<F::Address>,
    tables: &T,
) -> bool {
    let key = ServiceKey { address: tuple.destination, port: 0, protocol: 0, reserved: 0 };
    matches!(tables.service(&key), Some(service) if service.kind == frontend::ADDRESS)
}

/// The backend of a flow: where the client's affinity leads, else a slot's.
///
/// With affinity the slot follows from the client's address, so that it holds even when the entry
/// is lost and on every node, and from its `round`, which is told: whoever comes back too late is
/// as new, and shall not meet the same backend for ever. A flow that only goes on was opened in
/// time.
#[inline(always)]
pub(super) fn backend<'t, F: Family, T: Tables<F>>(
    headers: &Headers<F>,
    service_port: u32,
    affinity_seconds: u32,
    class: Class,
    range: Range,
    round: &mut u16,
    tables: &'t T,
) -> Option<(u32, &'t Backend<F::Address>)> {
    let tuple = &headers.tuple;
    if affinity_seconds == 0 {
        return by_tuple(tuple, range, tables);
    }
    let key = AffinityKey { service_port, client: tuple.source };
    if let Some(entry) = tables.affinity(&key) {
        *round = entry.round;
        if has_run_out(entry, affinity_seconds, tables.now())
            && (tuple.protocol == protocol::UDP || headers.tcp_flags & tcp::SYN != 0)
        {
            *round = entry.round.wrapping_add(1);
        } else if let Some(backend) = tables.backend(entry.backend)
            && backend.generation == entry.generation
            && backend.service_port == service_port
            && backend.flags & flags::SELECTED << class as u32 != 0
        {
            return Some((entry.backend, backend));
        }
    }
    let slot = maglev::scale(maglev::in_round(F::hash(&tuple.source), *round), range.size());
    in_slot(slot, range, tables)
}

/// Has the client's affinity recorded, where the service port has any: the endpoint has answered
/// for the first time.
#[inline(always)]
pub(super) fn set_affinity<F: Family, T: Tables<F>>(decision: &mut Decision<F>, tables: &T) {
    let Some(port) = tables.port(decision.flow.service_port) else { return };
    if port.affinity_seconds == 0 {
        return;
    }
    decision.affinity = true;
    let is_reply = decision.flow.is_reply();
    let client = if is_reply { decision.flow.destination } else { decision.key.source };
    let key = AffinityKey { service_port: decision.flow.service_port, client };
    if let Some(entry) = tables.affinity(&key) {
        let is_over = has_run_out(entry, port.affinity_seconds, tables.now());
        decision.round = if is_over { entry.round.wrapping_add(1) } else { entry.round };
    }
}

/// Whether a client has stayed away for too long.
#[inline(always)]
fn has_run_out(entry: &Affinity, affinity_seconds: u32, now: Ticks) -> bool {
    let idle_ns = u64::from(now.wrapping_sub(entry.seen)) << TICK_SHIFT;
    idle_ns >= u64::from(affinity_seconds).wrapping_mul(1_000_000_000)
}

/// The backend that a tuple's slot leads to.
#[inline(always)]
pub(super) fn by_tuple<'t, F: Family, T: Tables<F>>(
    tuple: &Tuple<F::Address>,
    range: Range,
    tables: &'t T,
) -> Option<(u32, &'t Backend<F::Address>)> {
    if range.size() == 0 {
        return None;
    }
    in_slot(maglev::slot::<F>(tuple, range.size()), range, tables)
}

#[inline(always)]
fn in_slot<F: Family, T: Tables<F>>(
    slot: u32,
    range: Range,
    tables: &T,
) -> Option<(u32, &Backend<F::Address>)> {
    let id = tables.slot(range.start().wrapping_add(slot))?;
    tables.backend(id).map(|backend| (id, backend))
}
