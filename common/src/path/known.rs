//! A packet that has a flow entry.

use crate::abi::{Flow, Ticks, Tuple, flow, state};
use crate::family::Family;
use crate::packet::header::{protocol, tcp};
use crate::packet::parse::{Headers, Kind};
use crate::reason::Reason;
use crate::tables::Tables;

use super::entry::{RENEW_TICKS, UDP_IDLE_TICKS, entry_of_packet};
use super::open::is_opening;
use super::{Decision, Hook, Record, Verdict, facts, select};

/// A client that opens anew leaves an endpoint that no longer serves and was not heard for this
/// many ticks...
pub const SILENT_TICKS: u32 = 28;
/// ...if the client went on for this many without it: a SYN that breaks a common silence may be
/// forged, and a live endpoint answers it.
pub const VAIN_TICKS: u32 = 12;
/// A UDP flow is more than a question and its answers when it still goes on after this many ticks.
pub const STREAM_TICKS: u32 = 2;

/// Whether an entry is that of an endpoint's packet which passes ingress as it is, and is
/// translated where it leaves.
#[inline(always)]
pub(super) fn is_answer<A: Copy>(entry: &Flow<A>) -> bool {
    entry.flags & (flow::REPLY | flow::HOST | flow::HAIRPIN | flow::DIRECT | flow::SOURCE)
        == flow::REPLY
}

/// What the entry of the replies tells about a packet that leaves towards an endpoint: its flags
/// that say how the packet was translated as it came in; 0: it was not. It is asked first, since
/// most clients keep their address, and then nothing else is to be asked.
#[inline(always)]
pub(super) fn flags_of_reply<F: Family, T: Tables<F>>(key: &Tuple<F::Address>, tables: &T) -> u8 {
    match entry_of_packet(&key.reversed(), tables) {
        Some((first, _)) => {
            first.flags
                & (flow::REPLY | flow::MASQUERADED | flow::HOST | flow::HAIRPIN | flow::SOURCE)
        }
        None => 0,
    }
}

/// What an entry means at a hook: it counts where its direction is translated, elsewhere the packet
/// passes as it is.
#[inline(always)]
pub(super) fn verdict_of_entry<A: Copy>(entry: &Flow<A>, hook: Hook) -> Verdict {
    let is_egress = hook.is_egress();
    let is_reply = entry.is_reply();
    let is_of_host = entry.is_of_host();
    if entry.is_hairpin() {
        match (is_of_host, is_egress) {
            (true, true) => Verdict::Inject,
            (false, false) => Verdict::Bounce,
            (true, false) | (false, true) => Verdict::Pass,
        }
    } else if entry.translates_source() {
        // The client's side: turned round.
        if is_reply == is_egress { Verdict::Pass } else { Verdict::Translate }
    } else if is_reply {
        match (is_of_host, is_egress) {
            (true, false) => Verdict::Inject,
            (false, true) if entry.returns_elsewhere() => Verdict::Route,
            (false, true) => Verdict::Translate,
            (true, true) | (false, false) => Verdict::Pass,
        }
    } else if !is_egress {
        Verdict::Translate
    } else if entry.is_direct() {
        // It counts where the client's packet comes in: what leaves with its tuple is the other
        // flow's.
        Verdict::Pass
    } else {
        Verdict::Route
    }
}

/// A packet that has a flow entry. False: the entry no longer counts, a backend is to be selected
/// anew.
#[inline(always)]
pub(super) fn follow_entry<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    entry: &Flow<F::Address>,
    is_embryonic: bool,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let is_reply = entry.is_reply();
    let verdict = verdict_of_entry(entry, hook);
    if verdict == Verdict::Pass {
        if decision.facts & facts::ACCELERATED != 0 && is_answer(entry) {
            decision.verdict = Verdict::Around;
        }
        return true;
    }
    if headers.kind == Kind::IcmpError {
        decision.flow = *entry;
        decision.set(
            verdict,
            if entry.translates_source() { Reason::Stranger } else { Reason::IcmpError },
        );
        return true;
    }
    let now = tables.now();
    let is_udp = headers.tuple.protocol == protocol::UDP;
    let state = if is_udp {
        if !is_reply && !serves(entry, tables)
            || entry.flags & (flow::SOURCE | flow::DIRECT) == flow::SOURCE | flow::DIRECT
                && now.wrapping_sub(entry.seen) > UDP_IDLE_TICKS
        {
            return false;
        }
        if is_reply { entry.state | state::ESTABLISHED } else { entry.state }
    } else if is_reply {
        if entry.state & (state::GUESS | state::MATCHED) == state::GUESS
            && (headers.tcp_flags & tcp::ACK == 0 || headers.acknowledgment != entry.replied)
        {
            // A connection that knows nothing of the guess.
            return true;
        }
        state_after_endpoint(entry.state, headers)
    } else {
        if entry.state & (state::GUESS | state::MATCHED) == state::GUESS
            || is_opening(headers.tcp_flags)
                && (state::has_ended(entry.state)
                    || (is_embryonic || has_gone_silent(entry, now)) && !serves(entry, tables))
        {
            return false;
        }
        state_after_client(entry, headers)
    };
    let proves = if is_udp {
        entry.state & state::ESTABLISHED != 0 && now.wrapping_sub(entry.seen) >= STREAM_TICKS
    } else {
        state & (state::ESTABLISHED | state::GUESS) == state::ESTABLISHED
            && !state::has_ended(state)
    };
    decision.flow = *entry;
    decision.flow.state = state;
    decision.flow.seen = now;
    decision.takes_back = entry.state & !state != 0;
    let renewed = if is_reply && !is_embryonic { entry.replied } else { entry.seen };
    if state & state::ANSWERED != 0 {
        if is_reply && headers.tcp_flags & tcp::SYN != 0 {
            decision.flow.replied = headers.sequence.wrapping_add(1);
        }
    } else if state & state::GUESS == 0 {
        if is_reply || entry.state & state::ANSWERED != 0 {
            decision.flow.replied = now;
        } else if entry.state & state::GUESS != 0 {
            // It was a number to be acknowledged.
            decision.flow.replied = 0;
        }
    }
    let is_numbered_anew = state & state::ANSWERED != 0 && decision.flow.replied != entry.replied;
    decision.record = if is_embryonic && proves {
        Record::Promote
    } else if !is_embryonic && state::has_ended(state) {
        Record::Demote
    } else if state == entry.state && now.wrapping_sub(renewed) < RENEW_TICKS && !is_numbered_anew {
        Record::Nothing
    } else if is_embryonic {
        Record::RenewEmbryonic
    } else {
        Record::Renew
    };
    if state & !entry.state & state::ESTABLISHED != 0 && !entry.translates_source() {
        select::set_affinity(decision, tables);
    }
    // Who knows the endpoint's number needs no other proof of who it is.
    let is_known = !is_reply && state & !entry.state & state::ESTABLISHED != 0;
    decision.asks_source = !is_known
        && (state != entry.state || is_numbered_anew || decision.record == Record::Promote);
    decision.set(verdict, reason_of_entry(entry));
    true
}

/// Whether the endpoint of a flow has not been heard for long, and the client has tried since. To a
/// reset it says nothing.
#[inline(always)]
fn has_gone_silent<A: Copy>(entry: &Flow<A>, now: Ticks) -> bool {
    entry.state & state::RESET_FORWARD == 0
        && now.wrapping_sub(entry.replied) >= SILENT_TICKS
        // Another CPU's tick may be behind.
        && entry.seen.wrapping_sub(entry.replied).cast_signed() >= VAIN_TICKS.cast_signed()
}

/// The state of a flow after a segment of its endpoint.
#[inline(always)]
fn state_after_endpoint<F: Family>(before: u8, headers: &Headers<F>) -> u8 {
    let tcp_flags = headers.tcp_flags;
    if tcp_flags & tcp::RST != 0 {
        return before | state::RESET_REPLY;
    }
    if before & state::GUESS != 0 {
        return before | state::MATCHED;
    }
    if tcp_flags & tcp::SYN != 0 && !state::has_ended(before) {
        // It has accepted a new connection of the same client, who will acknowledge that.
        let is_numbered =
            headers.tuple.protocol == protocol::TCP && before & state::ESTABLISHED == 0;
        return before & !state::CLOSING | if is_numbered { state::ANSWERED } else { 0 };
    }
    let fin = if tcp_flags & tcp::FIN != 0 { state::FIN_REPLY } else { 0 };
    if tcp_flags & tcp::SYN != 0 || state::has_ended(before & !state::RESET_REPLY) {
        return before | fin;
    }
    // It goes on: a reset, the client's or one in the endpoint's name, was none.
    before & !(state::RESET | state::ANSWERED) | state::ESTABLISHED | fin
}

/// The state of a flow after a segment of its client, which anybody can forge.
#[inline(always)]
fn state_after_client<F: Family>(entry: &Flow<F::Address>, headers: &Headers<F>) -> u8 {
    let (before, tcp_flags) = (entry.state, headers.tcp_flags);
    if tcp_flags & tcp::RST != 0 {
        return before | state::RESET_FORWARD;
    }
    let fin = if tcp_flags & tcp::FIN != 0 { state::FIN_FORWARD } else { 0 };
    if before & state::ANSWERED != 0
        && tcp_flags & (tcp::SYN | tcp::ACK) == tcp::ACK
        && headers.acknowledgment == entry.replied
    {
        // It has seen what the endpoint answered: proof, even if neither ever says more.
        return before & !state::ANSWERED | state::ESTABLISHED | fin;
    }
    // Who opens anew after a reset waits for an answer: the endpoint's silence counts from then on.
    let reset = if is_opening(tcp_flags) { state::RESET_FORWARD } else { 0 };
    // The client knows the connection: a guess that the endpoint has confirmed was right.
    before & !(state::GUESS | state::MATCHED | reset) | fin
}

/// Why a packet along an entry is translated. What happens on the client's side is counted on the
/// backend's.
#[inline(always)]
pub(super) fn reason_of_entry<A: Copy>(entry: &Flow<A>) -> Reason {
    if entry.translates_source() {
        Reason::Stranger
    } else if entry.is_direct() {
        Reason::DirectRemapped
    } else if entry.is_reply() {
        Reason::Reply
    } else {
        Reason::Forward
    }
}

/// Whether the backend of a flow still takes traffic.
#[inline(always)]
pub(super) fn serves<F: Family, T: Tables<F>>(flow: &Flow<F::Address>, tables: &T) -> bool {
    if flow.flags & (flow::DIRECT | flow::SOURCE) != 0 {
        return true;
    }
    match tables.backend(flow.backend) {
        Some(backend) => backend.generation == flow.generation && backend.is_serving(),
        None => false,
    }
}
