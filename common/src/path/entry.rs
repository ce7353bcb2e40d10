//! Flow entries: how the two of a flow belong together, and for how long they count.

use crate::abi::{Flow, Tuple, flow, side, state};
use crate::family::Family;
use crate::packet::header::protocol;
use crate::tables::Tables;

use super::Record;

/// A used flow renews its partner after this many ticks.
pub const RENEW_TICKS: u32 = 9;
/// A flow that has ended keeps its reply tuple from others for this many ticks (TIME_WAIT is 60 s).
pub const CLOSING_TICKS: u32 = 56;
/// One that only one side has closed does so for this many idle ticks (two minutes, as
/// conntrack's).
pub const HALF_CLOSED_TICKS: u32 = 112;
/// One that no packet of the endpoint has proven: for half a minute.
pub const UNPROVEN_TICKS: u32 = 28;
/// A live one: for a day.
pub const IDLE_TICKS: u32 = 80_467;
/// A UDP flow that was idle for this many ticks no longer keeps its reply tuple from others.
pub const UDP_IDLE_TICKS: u32 = 168;

/// The tuple of packets that answer a translated one: the partner entry's key.
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

/// The entry of the other direction.
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

/// Whether an entry leads to this tuple turned round: then it is the partner of the tuple's own
/// entry.
#[inline(always)]
pub fn leads_back<F: Family>(entry: &Flow<F::Address>, key: &Tuple<F::Address>) -> bool {
    entry.source == key.destination
        && entry.destination == key.source
        && entry.source_port == key.destination_port
        && entry.destination_port == key.source_port
}

/// The entry of a tuple, and whether nothing has proven its flow so far.
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

/// As [`entry_of`], for a packet that may be one of a live flow: another CPU may prove the flow
/// between the two looks, and move its entry from `embryonic` to `flows`.
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

/// Whether an entry no longer keeps its tuple from a flow that is recorded like this.
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
        // Refused by the endpoint, or a guess: that gives way to what a client itself says in the
        // middle of a connection.
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

/// Whether two entries make the same packets.
#[inline(always)]
pub fn leads_to<A: Copy + Eq>(one: &Flow<A>, other: &Flow<A>) -> bool {
    one.source == other.source
        && one.destination == other.destination
        && one.source_port == other.source_port
        && one.destination_port == other.destination_port
}

/// Whether an entry was used as lately as a flow, or within the tick before. Ticks wrap, and
/// another CPU's may be ahead.
#[inline(always)]
pub fn is_as_fresh<A: Copy>(entry: &Flow<A>, flow: &Flow<A>) -> bool {
    flow.seen.wrapping_sub(entry.seen).cast_signed() <= 1
}
