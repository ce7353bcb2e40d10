//! Recovers lost entries by what a client's reset reveals.

use crate::abi::{Flow, Origins, ServiceKey, flow, frontend, phase, state};
use crate::family::Family;
use crate::packet::header::{protocol, tcp};
use crate::packet::parse::{Headers, Kind};
use crate::reason::Reason;
use crate::tables::Tables;

use super::entry::{entry_of, leads_back, leads_to};
use super::{Decision, Record, Verdict, policy, select};

/// Reports whether a packet is what a client sends when a segment arrives for a connection that it
/// does not know: a reset without acknowledgment.
#[inline(always)]
pub(super) fn is_bare_reset<F: Family>(headers: &Headers<F>) -> bool {
    headers.kind == Kind::Transport
        && headers.tuple.protocol != protocol::UDP
        && headers.tcp_flags & (tcp::RST | tcp::ACK | tcp::SYN) == tcp::RST
}

/// Returns true if a bare reset only shows that a reply's entry was lost, and tries to recover it.
///
/// A client sends one to a backend's own address if it does not know the connection, or if it got a
/// reply untranslated because the entry was lost. In the second case a frontend leads to this
/// endpoint, and either the forward entry still leads here or the client's slot does. Then the
/// reset is dropped and the entries are made again; the backend retransmits the segment. What a
/// slot says is only a guess: several frontends may lead to the endpoint, or the connection may be
/// direct after all and the reset forged. A guess therefore translates only what the reset answers:
/// the endpoint's segment whose acknowledgment number is the reset's sequence number (RFC 9293,
/// 3.10.7.1). If the client resets that too, the next frontend is tried, and after the last one the
/// reset goes on to the backend. Where the client's connections are usually translated at the
/// socket, a reset is most likely about a connection that is direct on the wire, and nothing is
/// guessed.
#[inline(always)]
pub(super) fn is_unknown_connection<F: Family, T: Tables<F>>(
    headers: &Headers<F>,
    to_backend: bool,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let packet = &headers.tuple;
    // In both cases `decision.flow` is what the backend sees of the packet.
    if tables.flow(packet).is_some() {
        return false;
    }
    let is_wrong_guess = match tables.embryonic(packet) {
        Some(entry) if entry.state & state::MATCHED != 0 && !entry.is_reply() => {
            decision.flow = *entry;
            true
        }
        Some(_) => return false,
        None => false,
    };
    if !is_wrong_guess && !to_backend {
        return false;
    }
    let endpoint = ServiceKey {
        address: decision.flow.destination,
        port: decision.flow.destination_port,
        protocol: packet.protocol,
        reserved: 0,
    };
    let Some(origins) = tables.origins(&endpoint) else { return false };
    // A flow whose replies are translated has not lost their entry.
    let translated = match entry_of(&packet.reversed(), tables) {
        Some((entry, _)) if entry.state & state::GUESS == 0 => Some(entry),
        _ => None,
    };
    // An established entry is proof, a slot is a guess: all entries are tried before any slot.
    if recovers_by_entry(origins, translated, tables, decision)
        || translated.is_none()
            && !(packet.protocol == protocol::TCP && tables.translated_at_socket())
            && recovers_by_slot(headers, origins, is_wrong_guess, tables, decision)
    {
        decision.set(Verdict::Drop, Reason::ReplyRecovered);
        decision.record = Record::Establish;
        decision.depends_on_source = true;
        return true;
    }
    decision.key = *packet;
    false
}

/// Looks for a client's entry that leads to the endpoint, at each frontend of the endpoint. Reports
/// whether there is one, and makes the decision's flow of it.
#[inline(always)]
fn recovers_by_entry<F: Family, T: Tables<F>>(
    origins: &Origins<F::Address>,
    translated: Option<&Flow<F::Address>>,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    for origin in &origins.frontends {
        if origin.port == 0 {
            break;
        }
        decision.key.destination = origin.address;
        decision.key.destination_port = origin.port;
        if let Some(entry) = tables.flow(&decision.key)
            && entry.state & state::CLOSING == 0
            && leads_to(entry, &decision.flow)
            && !matches!(translated, Some(entry) if !leads_back::<F>(entry, &decision.key))
        {
            decision.flow = *entry;
            decision.flow.seen = tables.now();
            return true;
        }
    }
    false
}

/// Looks for a frontend without an entry whose slot leads to the endpoint. After a wrong guess, the
/// search goes on behind the frontend that was guessed. Reports whether there is one.
#[inline(always)]
fn recovers_by_slot<F: Family, T: Tables<F>>(
    headers: &Headers<F>,
    origins: &Origins<F::Address>,
    is_wrong_guess: bool,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let packet = &headers.tuple;
    let mut is_next = !is_wrong_guess;
    for origin in &origins.frontends {
        if origin.port == 0 {
            break;
        }
        if !is_next {
            is_next =
                origin.address == packet.destination && origin.port == packet.destination_port;
            continue;
        }
        decision.key.destination = origin.address;
        decision.key.destination_port = origin.port;
        if tables.flow(&decision.key).is_none()
            && tables.embryonic(&decision.key).is_none()
            && guess(headers.sequence, tables, decision)
        {
            return true;
        }
    }
    false
}

/// Makes the entries of a connection again if the slot for the decision's key leads to where the
/// flow goes.
#[inline(always)]
pub(super) fn guess<F: Family, T: Tables<F>>(
    sequence: u32,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    // While netfilter serves too, only what is certain is made again, since its connections look
    // just the same.
    match tables.settings() {
        Some(settings) if settings.phase == phase::SERVE => {}
        Some(settings)
            if settings.phase & phase::MASK == phase::SERVE
                && tables.imported(&decision.key).is_none() => {}
        _ => return false,
    }
    let frontend = ServiceKey {
        address: decision.key.destination,
        port: decision.key.destination_port,
        protocol: decision.key.protocol,
        reserved: 0,
    };
    let Some(service) = tables.service(&frontend) else { return false };
    let is_local = policy::is_local_pod(&decision.key.source, tables);
    if service.kind == frontend::CLUSTER_IP && !is_local {
        // If the guess is wrong, a client out there may have no way back to this address.
        return false;
    }
    let service_port = service.service_port;
    let class = policy::class(service.kind, is_local);
    let Some(range) = tables.range(service_port, class) else { return false };
    let Some((id, backend)) = select::by_tuple(&decision.key, range, tables) else { return false };
    if backend.address != decision.flow.destination
        || backend.port != decision.flow.destination_port
    {
        return false;
    }
    decision.flow.backend = id;
    decision.flow.service_port = service_port;
    decision.flow.generation = backend.generation;
    decision.flow.seen = tables.now();
    decision.flow.replied = sequence;
    decision.flow.state = state::GUESS;
    decision.flow.flags = if backend.is_local() { flow::LOCAL } else { 0 };
    true
}
