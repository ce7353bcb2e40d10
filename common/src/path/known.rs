//! Packets that have a flow entry.

use crate::abi::{Flow, Ticks, Tuple, flow, state};
use crate::failure;
use crate::family::Family;
use crate::packet::header::{protocol, tcp};
use crate::packet::parse::{Headers, Kind};
use crate::reason::Reason;
use crate::tables::Tables;

use super::entry::{RENEW_TICKS, UDP_IDLE_TICKS, entry_of_packet};
use super::open::is_opening;
use super::{Decision, Hook, Record, Verdict, select};

/// A client that opens a new connection leaves an endpoint that no longer serves and that has not
/// been heard from for this many ticks...
pub const SILENT_TICKS: u32 = 28;
/// ...if the client kept trying for this many ticks. A SYN that breaks a common silence may be
/// forged, and a live endpoint answers it.
pub const VAIN_TICKS: u32 = 12;
/// A UDP flow that continues after this many ticks is more than a question and its answers.
pub const STREAM_TICKS: u32 = 2;

/// Reports whether an entry is for an endpoint's packets that pass ingress unchanged because they
/// are translated where they leave.
#[inline(always)]
pub(super) fn is_answer<A: Copy>(entry: &Flow<A>) -> bool {
    entry.flags & (flow::REPLY | flow::HOST | flow::HAIRPIN | flow::DIRECT | flow::SOURCE)
        == flow::REPLY
}

/// Returns flags of the entry for the replies to a packet that leaves towards an endpoint. They say
/// how the packet was translated on its way in; 0 means that it was not. This lookup comes first
/// because most clients keep their address, and then no other is needed.
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

/// Returns what an entry means at a hook. It applies where its direction is translated; elsewhere
/// the packet passes unchanged.
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
        // The client's side: the other way round.
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
        // It applies where the client's packet comes in: what leaves with its tuple belongs to the
        // other flow.
        Verdict::Pass
    } else {
        Verdict::Route
    }
}

/// Makes a packet follow its flow entry. Returns false if the entry no longer applies and a new
/// backend has to be selected.
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
        if decision.facts.is_accelerated() && is_answer(entry) {
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
        if is_embryonic
            && is_reply
            && headers.tcp_flags & tcp::RST != 0
            && failure::is_pending(entry)
        {
            // The flow's first error: the time shows the later ones that it is counted.
            decision.flow.replied = tables.now().max(1);
            decision.record = Record::RenewEmbryonic;
            decision.depends_on_source = true;
        }
        return true;
    }
    let now = tables.now();
    let state = match state_after(headers, entry, is_embryonic, now, tables) {
        After::State(state) => state,
        After::Unchanged => return true,
        After::Over => return false,
    };
    decision.flow = *entry;
    decision.flow.state = state;
    decision.flow.seen = now;
    decision.clears_state = entry.state & !state != 0;
    note_answer(headers, entry, state, now, decision);
    let is_numbered_anew = state & state::ANSWERED != 0 && decision.flow.replied != entry.replied;
    let renewed = if is_reply && !is_embryonic { entry.replied } else { entry.seen };
    decision.record = if is_embryonic && is_proof(headers, entry, state, now) {
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
    let establishes = state & !entry.state & state::ESTABLISHED != 0;
    if establishes && !entry.translates_source() {
        select::set_affinity(decision, tables);
    }
    // A client that knows the endpoint's number needs no other proof of its identity.
    let is_known = !is_reply && establishes;
    decision.depends_on_source = !is_known
        && (state != entry.state || is_numbered_anew || decision.record == Record::Promote);
    decision.set(verdict, reason_of_entry(entry));
    true
}

/// What a packet does to its flow.
enum After {
    /// The flow has this state now.
    State(u8),
    /// The packet has nothing to do with the flow.
    Unchanged,
    /// The entry no longer applies.
    Over,
}

/// Returns what a packet does to the flow of its entry.
#[inline(always)]
fn state_after<F: Family, T: Tables<F>>(
    headers: &Headers<F>,
    entry: &Flow<F::Address>,
    is_embryonic: bool,
    now: Ticks,
    tables: &T,
) -> After {
    let is_reply = entry.is_reply();
    let is_unmatched = entry.state & (state::GUESS | state::MATCHED) == state::GUESS;
    if headers.tuple.protocol == protocol::UDP {
        if !is_reply && !serves(entry, tables)
            || entry.flags & (flow::SOURCE | flow::DIRECT) == flow::SOURCE | flow::DIRECT
                && now.wrapping_sub(entry.seen) > UDP_IDLE_TICKS
        {
            return After::Over;
        }
        return After::State(if is_reply { entry.state | state::ESTABLISHED } else { entry.state });
    }
    if is_reply {
        if is_unmatched
            && (headers.tcp_flags & tcp::ACK == 0 || headers.acknowledgment != entry.replied)
        {
            // A connection that has nothing to do with the guess.
            return After::Unchanged;
        }
        return After::State(state_after_endpoint(entry.state, headers));
    }
    if is_unmatched
        || is_opening(headers.tcp_flags)
            && (state::has_ended(entry.state)
                || (is_embryonic || has_gone_silent(entry, now)) && !serves(entry, tables))
    {
        return After::Over;
    }
    After::State(state_after_client(entry, headers))
}

/// Reports whether a packet that brings its flow to this state proves the flow.
#[inline(always)]
fn is_proof<F: Family>(
    headers: &Headers<F>,
    entry: &Flow<F::Address>,
    state: u8,
    now: Ticks,
) -> bool {
    if headers.tuple.protocol == protocol::UDP {
        entry.state & state::ESTABLISHED != 0 && now.wrapping_sub(entry.seen) >= STREAM_TICKS
    } else {
        state & (state::ESTABLISHED | state::GUESS) == state::ESTABLISHED
            && !state::has_ended(state)
    }
}

/// Notes in a flow of this state when its endpoint was heard from, or the number that its client
/// has to acknowledge.
#[inline(always)]
fn note_answer<F: Family>(
    headers: &Headers<F>,
    entry: &Flow<F::Address>,
    state: u8,
    now: Ticks,
    decision: &mut Decision<F>,
) {
    let is_reply = entry.is_reply();
    if state & state::ANSWERED != 0 {
        if is_reply && headers.tcp_flags & tcp::SYN != 0 {
            decision.flow.replied = headers.sequence.wrapping_add(1);
        }
    } else if state & state::GUESS == 0 {
        if is_reply || entry.state & state::ANSWERED != 0 {
            decision.flow.replied = now;
        } else if entry.state & state::GUESS != 0 {
            // It held the number to be acknowledged.
            decision.flow.replied = 0;
        }
    }
}

/// Reports whether the endpoint of a flow has not been heard from for long although the client has
/// tried since. An endpoint does not answer a reset.
#[inline(always)]
fn has_gone_silent<A: Copy>(entry: &Flow<A>, now: Ticks) -> bool {
    entry.state & state::RESET_FORWARD == 0
        && now.wrapping_sub(entry.replied) >= SILENT_TICKS
        // Another CPU's tick may be behind.
        && entry.seen.wrapping_sub(entry.replied).cast_signed() >= VAIN_TICKS.cast_signed()
}

/// Returns the state of a flow after a segment of its endpoint.
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
        // The endpoint has accepted a new connection of the same client, which will acknowledge
        // that.
        let is_numbered =
            headers.tuple.protocol == protocol::TCP && before & state::ESTABLISHED == 0;
        return before & !state::CLOSING | if is_numbered { state::ANSWERED } else { 0 };
    }
    let fin = if tcp_flags & tcp::FIN != 0 { state::FIN_REPLY } else { 0 };
    if tcp_flags & tcp::SYN != 0 || state::has_ended(before & !state::RESET_REPLY) {
        return before | fin;
    }
    // The connection goes on, so a reset by the client, or in the endpoint's name, had no effect.
    before & !(state::RESET | state::ANSWERED) | state::ESTABLISHED | fin
}

/// Returns the state of a flow after a segment of its client, which anybody can forge.
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
        // The client has seen the endpoint's answer. That is proof, even if neither side sends
        // anything more.
        return before & !state::ANSWERED | state::ESTABLISHED | fin;
    }
    // A client that opens a new connection after a reset waits for an answer: the endpoint's
    // silence counts from then on.
    let reset = if is_opening(tcp_flags) { state::RESET_FORWARD } else { 0 };
    // The client knows the connection: a guess that the endpoint has confirmed was right.
    before & !(state::GUESS | state::MATCHED | reset) | fin
}

/// Returns why a packet that follows an entry is translated. What happens at the client's side is
/// counted at the backend's.
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

/// Reports whether the backend of a flow still takes traffic.
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
