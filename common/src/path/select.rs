//! Selects the service port that a packet asks for, and one of its backends.

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

/// Returns the service port that a packet asks for and the kind of the frontend: the one at its
/// address, or else a node port.
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
    // Addresses share their listing's bits: whether node ports are really served at this one is
    // asked last.
    if !to_node_port || !tables.serves_node_ports(&tuple.destination) {
        return None;
    }
    key.address = F::Address::default();
    tables.service(&key).map(|service| (service.service_port, service.kind))
}

/// Reports whether the packet goes to a ClusterIP, whatever its port.
#[inline(always)]
pub(super) fn is_cluster_ip<F: Family, T: Tables<F>>(
    tuple: &Tuple<F::Address>,
    tables: &T,
) -> bool {
    let key = ServiceKey { address: tuple.destination, port: 0, protocol: 0, reserved: 0 };
    matches!(tables.service(&key), Some(service) if service.kind == frontend::ADDRESS)
}

/// Returns the backend of a new flow: the one of the client's affinity, or else a slot's.
///
/// With affinity the slot follows from the client's address, so that the choice is the same on
/// every node and survives the loss of the entry, and from the client's `round`, which is returned:
/// a client that comes back too late is treated as new, and must not get the same backend for ever.
/// A flow that merely continues was opened in time.
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

/// Marks the client's affinity to be recorded if the service port has any: the endpoint has
/// answered for the first time.
#[inline(always)]
pub(super) fn set_affinity<F: Family, T: Tables<F>>(decision: &mut Decision<F>, tables: &T) {
    let Some(port) = tables.port(decision.flow.service_port) else { return };
    if port.affinity_seconds == 0 {
        return;
    }
    decision.records_affinity = true;
    let is_reply = decision.flow.is_reply();
    let client = if is_reply { decision.flow.destination } else { decision.key.source };
    let key = AffinityKey { service_port: decision.flow.service_port, client };
    if let Some(entry) = tables.affinity(&key) {
        let is_over = has_run_out(entry, port.affinity_seconds, tables.now());
        decision.round = if is_over { entry.round.wrapping_add(1) } else { entry.round };
    }
}

/// Reports whether a client has been away for too long.
#[inline(always)]
fn has_run_out(entry: &Affinity, affinity_seconds: u32, now: Ticks) -> bool {
    let idle_ns = u64::from(now.wrapping_sub(entry.seen)) << TICK_SHIFT;
    idle_ns >= u64::from(affinity_seconds).wrapping_mul(1_000_000_000)
}

/// Returns the backend that a tuple's slot leads to.
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
