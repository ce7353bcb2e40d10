//! Flow entries: how the two entries of a flow belong together, and how long they count.

use crate::abi::{Flow, Tuple, flow, side, state};
use crate::family::Family;
use crate::packet::header::protocol;
use crate::tables::Tables;

use super::Record;

/// A flow in use renews its entries after this many ticks.
pub const RENEW_TICKS: u32 = 9;
/// A flow that has ended reserves its reply tuple for this many ticks (TIME_WAIT is 60 s).
pub const CLOSING_TICKS: u32 = 56;
/// A flow that only one side has closed does so for this many idle ticks (two minutes, as in
/// conntrack).
pub const HALF_CLOSED_TICKS: u32 = 112;
/// A flow that no packet of the endpoint has proven does so for half a minute.
pub const UNPROVEN_TICKS: u32 = 28;
/// A live flow does so for a day.
pub const IDLE_TICKS: u32 = 80_467;
/// A UDP flow that has been idle for this many ticks no longer reserves its reply tuple.
pub const UDP_IDLE_TICKS: u32 = 168;

/// Returns the tuple of the packets that answer a translated one, which is the partner entry's key.
#[inline(always)]
pub fn partner_key<F: Family>(flow: &Flow<F::Address>, protocol: u8) -> Tuple<F::Address> {
    let leaves = flow.flags & (flow::SOURCE | flow::REPLY) == flow::SOURCE | flow::REPLY;
    Tuple {
        source: flow.destination,
        destination: flow.source,
        source_port: flow.destination_port,
        destination_port: flow.source_port,
        protocol,
        side: if leaves { side::FAR } else { side::NEAR },
        reserved: [0; 2],
    }
}

/// Returns the entry of the other direction.
#[inline(always)]
pub fn partner<F: Family>(key: &Tuple<F::Address>, flow: &Flow<F::Address>) -> Flow<F::Address> {
    Flow {
        source: key.destination,
        destination: key.source,
        source_port: key.destination_port,
        destination_port: key.source_port,
        flags: flow.flags ^ flow::REPLY,
        ..*flow
    }
}

/// Reports whether an entry leads to this tuple reversed, which makes it the partner of the tuple's
/// own entry.
#[inline(always)]
pub fn leads_back<F: Family>(entry: &Flow<F::Address>, key: &Tuple<F::Address>) -> bool {
    entry.source == key.destination
        && entry.destination == key.source
        && entry.source_port == key.destination_port
        && entry.destination_port == key.source_port
}

/// Returns the entry of a tuple, and whether its flow is still unproven.
#[inline(always)]
pub(super) fn entry_of<'t, F: Family, T: Tables<F>>(
    tuple: &Tuple<F::Address>,
    tables: &'t T,
) -> Option<(&'t Flow<F::Address>, bool)> {
    match tables.flow(tuple) {
        Some(entry) => Some((entry, false)),
        None => tables.embryonic(tuple).map(|entry| (entry, true)),
    }
}

/// As [`entry_of`], for a packet of what may be a live flow. Another CPU may prove the flow between
/// the two lookups, and so move its entry from `embryonic` to `flows`: `flows` is asked once more.
#[inline(always)]
pub(super) fn entry_of_packet<'t, F: Family, T: Tables<F>>(
    tuple: &Tuple<F::Address>,
    tables: &'t T,
) -> Option<(&'t Flow<F::Address>, bool)> {
    match entry_of(tuple, tables) {
        Some(found) => Some(found),
        None => tables.flow(tuple).map(|entry| (entry, false)),
    }
}

/// Reports whether an entry no longer reserves its tuple against a flow that is recorded in this
/// way.
#[inline(always)]
pub fn gives_way<A: Copy>(
    entry: &Flow<A>,
    is_embryonic: bool,
    protocol_number: u8,
    record: Record,
    now: u32,
) -> bool {
    let idle = now.wrapping_sub(entry.seen);
    if protocol_number == protocol::UDP {
        return idle > UDP_IDLE_TICKS;
    }
    let is_unproven = is_embryonic && entry.state & state::ESTABLISHED == 0;
    if is_unproven {
        // The endpoint has refused it; or it is a guess, which gives way to what the client itself
        // says in the middle of a connection.
        entry.state & state::RESET_REPLY != 0
            || entry.state & state::GUESS != 0 && record == Record::Establish
            || idle > UNPROVEN_TICKS
    } else if is_embryonic {
        idle > CLOSING_TICKS
    } else if entry.state & state::CLOSING != 0 {
        idle > HALF_CLOSED_TICKS
    } else {
        idle > IDLE_TICKS
    }
}

/// Reports whether two entries produce the same packets.
#[inline(always)]
pub fn leads_to<A: Copy + Eq>(one: &Flow<A>, other: &Flow<A>) -> bool {
    one.source == other.source
        && one.destination == other.destination
        && one.source_port == other.source_port
        && one.destination_port == other.destination_port
}

/// Reports whether an entry was used as recently as a flow, or within the tick before. Ticks wrap,
/// and another CPU's may be ahead.
#[inline(always)]
pub fn is_as_fresh<A: Copy>(entry: &Flow<A>, flow: &Flow<A>) -> bool {
    flow.seen.wrapping_sub(entry.seen).cast_signed() <= 1
}
