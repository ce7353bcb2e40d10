//! Packets that open a flow: selects the backend, and the source address that the backend sees.

use crate::abi::{Backend, Class, ServicePort, Tuple, flow, frontend, listing, phase, side, state};
use crate::family::Family;
use crate::packet::header::{protocol, tcp};
use crate::packet::parse::Headers;
use crate::reason::Reason;
use crate::tables::Tables;

use super::entry::entry_of;
use super::policy::{self, Client, Source};
use super::ports::{allocate, is_given};
use super::{Decision, Hook, Record, Step, Verdict, accelerate, select};

/// Reports whether a packet opens a flow. At an address of the node, where the stack and netfilter
/// have connections of their own, no other packet is taken for a client's.
#[inline(always)]
pub(super) fn opens<F: Family>(headers: &Headers<F>) -> bool {
    headers.tuple.protocol == protocol::UDP || is_opening(headers.tcp_flags)
}

/// Reports whether a datagram leaves from a port that is a node port, so that its answer would look
/// like a client's request. As long as netfilter serves node ports too, the datagram may itself be
/// an answer.
#[inline(always)]
pub(super) fn asks_from_node_port<F: Family, T: Tables<F>>(
    headers: &Headers<F>,
    tables: &T,
) -> bool {
    headers.tuple.protocol == protocol::UDP
        && tables.is_node_port(headers.tuple.source_port)
        && matches!(tables.settings(), Some(settings) if settings.phase == phase::SERVE)
}

/// Decides, for a packet without an entry that leaves for a backend, whether to open the far pair,
/// which changes its source or protects it from change. Returns false if no pair is to be opened.
///
/// A client of a [masqueraded](crate::abi::flow::MASQUERADED) flow is shown as an address of the
/// node. A packet that already leaves with such an address is this host's own or netfilter's. An
/// entry that changes nothing reserves its tuple against our clients, and keeps its answer from
/// being taken for a client's. If one of our clients has the tuple, the packet's port changes.
#[inline(always)]
pub(super) fn opens_far_pair<F: Family, T: Tables<F>>(
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let key = &headers.tuple;
    let reply = key.reversed();
    if let Some((first, _)) = entry_of(&reply, tables) {
        if first.flags & (flow::REPLY | flow::MASQUERADED | flow::HOST | flow::HAIRPIN)
            == flow::REPLY | flow::MASQUERADED
        {
            decision.flow.flags = flow::SOURCE | first.flags & flow::LOCAL;
            decision.flow.backend = first.backend;
            decision.flow.service_port = first.service_port;
            decision.flow.generation = first.generation;
            decision.key.side = side::FAR;
            decision.step = Step::Select;
            return true;
        }
        // It belongs to a flow of this host's own, or is a reply, translated before; or it clashes
        // in the middle of a connection, whose port cannot change.
        if first.is_of_host() || first.flags & (flow::REPLY | flow::SOURCE) == 0 || !opens(headers)
        {
            return false;
        }
    }
    if tables.listing(&key.source) & listing::NODE == 0
        || !is_given(key.source_port) && !asks_from_node_port(headers, tables)
        || !tables.is_node_address(&key.source)
    {
        return false;
    }
    decision.flow.flags = flow::SOURCE | flow::DIRECT;
    decision.key.side = side::FAR;
    decision.step = Step::Select;
    true
}

/// Takes the second step, for the first packet of a flow: selects a backend, the client's source
/// and a source port.
#[inline(always)]
pub fn open_into<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    if decision.step != Step::AllocatePort {
        open(hook, headers, tables, decision);
    }
    if decision.step == Step::AllocatePort {
        allocate(tables, decision);
    }
    accelerate(decision);
}

/// Reports whether a segment opens a connection.
#[inline(always)]
pub(super) fn is_opening(tcp_flags: u8) -> bool {
    tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN
}

/// Opens a flow for its first packet, or for one whose entry was lost.
#[inline(always)]
pub(super) fn open<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    if decision.flow.translates_source() {
        open_far_pair(tables, decision);
        return;
    }
    let key = &headers.tuple;
    let is_egress = hook.is_egress();
    let service_port = decision.flow.service_port;
    decision.step = Step::Done;
    let Some(port) = tables.port(service_port) else { return };
    let is_local = is_egress || policy::is_local_pod(&key.source, tables);
    let class = policy::class(decision.kind, is_local);
    if decision.kind == frontend::LOAD_BALANCER
        && port.restricts_sources()
        && !tables.in_source_ranges(service_port, &key.source)
    {
        decision.set(Verdict::Drop, Reason::SourceRange);
        return;
    }
    let Some(range) = tables.range(service_port, class) else { return };
    if range.size() == 0 {
        if range.drops() {
            decision.set(Verdict::Drop, Reason::NoLocalBackend);
        } else {
            reject(headers, Cause::NoBackend, decision);
        }
        return;
    }
    let Some((id, backend)) = select::backend(
        headers,
        service_port,
        port.affinity_seconds,
        class,
        range,
        &mut decision.round,
        tables,
    ) else {
        reject(headers, Cause::NoBackend, decision);
        return;
    };
    let is_hairpin = backend.address == key.source || is_egress && backend.is_host();
    lead_to(backend, id, is_hairpin, hook, key, tables, decision);
    if !is_hairpin && !keeps_source(hook, is_local, class, port, backend, tables, decision) {
        return;
    }
    record_first(hook, headers, decision);
}

/// Decides what is done with the first packet of a flow that leads to a backend, and what is
/// recorded.
#[inline(always)]
fn record_first<F: Family>(hook: Hook, headers: &Headers<F>, decision: &mut Decision<F>) {
    let verdict = match (decision.flow.is_hairpin(), hook.is_egress()) {
        (true, true) => Verdict::Inject,
        (true, false) => Verdict::Bounce,
        (false, true) => Verdict::Route,
        (false, false) => Verdict::Translate,
    };
    let tcp_flags = headers.tcp_flags;
    if headers.tuple.protocol != protocol::UDP && !is_opening(tcp_flags) {
        decision.set(verdict, Reason::Recovered);
        if tcp_flags & tcp::RST == 0 && !decision.is_foreign {
            decision.record = Record::Establish;
            // No SYN waits for an answer.
            decision.flow.replied = decision.flow.seen.max(1);
        }
        // Otherwise this is the last packet of the connection, or not its client's: nothing is
        // recorded, but its port stays as it was.
    } else {
        decision.set(verdict, Reason::Forward);
        decision.record = Record::Open;
    }
    decision.step = Step::AllocatePort;
}

/// Makes the decision's flow lead to a backend.
#[inline(always)]
fn lead_to<F: Family, T: Tables<F>>(
    backend: &Backend<F::Address>,
    id: u32,
    is_hairpin: bool,
    hook: Hook,
    key: &Tuple<F::Address>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    let is_egress = hook.is_egress();
    let flow = &mut decision.flow;
    flow.source = key.source;
    flow.destination = backend.address;
    flow.destination_port = backend.port;
    flow.backend = id;
    flow.generation = backend.generation;
    flow.seen = tables.now();
    flow.flags = if is_egress { flow::HOST } else { 0 }
        | if is_hairpin { flow::HAIRPIN } else { 0 }
        | if backend.is_local() { flow::LOCAL } else { 0 };
    if is_hairpin {
        // The client sees itself as the VIP, so that its answers come back here. A VIP that is an
        // address of this host would be answered from that address by a socket that names no
        // source: there, client and server both have the backend's address.
        flow.source = if is_egress && policy::is_loopback_device::<F, T>(tables) {
            backend.address
        } else {
            key.destination
        };
    }
}

/// Opens the client's side of a flow where the packet leaves for the backend: gives it an address
/// of the node, and a port.
#[inline(always)]
fn open_far_pair<F: Family, T: Tables<F>>(tables: &T, decision: &mut Decision<F>) {
    decision.step = Step::Done;
    if !decision.flow.is_direct() {
        let address = match tables.hook_device() {
            Some(here) => F::masquerade(here),
            None => F::Address::default(),
        };
        if address == F::Address::default() {
            decision.set(Verdict::Drop, Reason::NoRoute);
            return;
        }
        decision.flow.source = address;
    }
    decision.flow.seen = tables.now();
    decision.set(Verdict::Translate, Reason::Stranger);
    decision.record = Record::Open;
    decision.step = Step::AllocatePort;
}

/// Decides whether the client keeps its source, and masquerades it if not. Returns false if the
/// decision has to wait or the packet is dropped.
#[inline(always)]
fn keeps_source<F: Family, T: Tables<F>>(
    hook: Hook,
    is_local_pod: bool,
    class: Class,
    port: &ServicePort,
    backend: &Backend<F::Address>,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    if hook.is_egress() {
        return keeps_source_of_host(backend, tables, decision);
    }
    let Some(settings) = tables.settings() else { return false };
    let is_at_edge = policy::is_edge::<F, T>(tables);
    let source = if backend.is_host() {
        // The packet is delivered on this node to an address of the node itself: there is no other
        // way back.
        Source::Kept
    } else {
        policy::source::<F>(settings, class, port, Client { is_local_pod, is_at_edge })
    };
    if source == Source::Kept && (is_at_edge || class == Class::Internal) {
        return true;
    }
    let Some(routes) = tables.routes() else {
        decision.step = Step::LookUpRoutes;
        return false;
    };
    // Replies are translated where they leave.
    let has_way_back = is_at_edge || tables.device(routes.to_client).is_some();
    if has_way_back
        && class != Class::Internal
        && !is_at_edge
        && routes.to_client != tables.ifindex()
    {
        decision.flow.flags |= flow::AWAY;
    }
    if source == Source::Kept
        || source == Source::KeptWithWayBack && backend.is_local() && has_way_back
    {
        return true;
    }
    let has_address = match tables.device(routes.to_backend) {
        Some(device) => F::masquerade(device) != F::Address::default(),
        // A bridge that the backend is a port of.
        None => backend.is_local(),
    };
    if !has_way_back || !has_address {
        decision.set(Verdict::Drop, Reason::NoRoute);
        return false;
    }
    decision.flow.flags |= flow::MASQUERADED;
    true
}

/// As [`keeps_source`], for a process of this host: it gets the address that the route to its
/// backend prescribes.
#[inline(always)]
fn keeps_source_of_host<F: Family, T: Tables<F>>(
    backend: &Backend<F::Address>,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    // Nobody else may see a loopback address: such a client is shown as the node, wherever its
    // backend is.
    let is_loopback = F::is_loopback(&decision.flow.source);
    if backend.is_host() || backend.is_local() && !is_loopback {
        return true;
    }
    let Some(routes) = tables.routes() else {
        decision.step = Step::LookUpRoutes;
        return false;
    };
    let leaves_by = match tables.device(routes.to_backend) {
        None if is_loopback => tables.hook_device(),
        device => device,
    };
    let address = match leaves_by {
        Some(device) => F::masquerade(device),
        None => F::Address::default(),
    };
    if address == F::Address::default() {
        if is_loopback {
            decision.set(Verdict::Drop, Reason::NoRoute);
        }
        // Otherwise it does not leave by a device of ours: send it as the host itself would.
        return !is_loopback;
    }
    if address != decision.flow.source {
        decision.flow.source = address;
        decision.flow.flags |= flow::MASQUERADED;
    }
    true
}

/// The cause of a reject.
#[derive(Clone, Copy)]
pub(super) enum Cause {
    /// The service port has no backends.
    NoBackend,
    /// The ClusterIP has no such port.
    UndefinedPort,
}

/// Rejects a packet: with a reset for TCP, otherwise with ICMP port unreachable.
#[inline(always)]
pub(super) fn reject<F: Family>(headers: &Headers<F>, cause: Cause, decision: &mut Decision<F>) {
    let (reset, unreachable) = match cause {
        Cause::NoBackend => (Reason::NoBackendReset, Reason::NoBackendUnreachable),
        Cause::UndefinedPort => (Reason::UndefinedPort, Reason::UndefinedPort),
    };
    if headers.tuple.protocol != protocol::TCP {
        decision.set(Verdict::Unreachable, unreachable);
    } else if headers.tcp_flags & tcp::RST == 0 {
        decision.set(Verdict::Reset, reset);
    } else {
        // A reset is never answered (RFC 9293, 3.10.7.1).
        decision.set(Verdict::Drop, Reason::NoBackendDropped);
    }
}

/// Changes the source port of a direct connection to a backend if a translated flow has its tuple.
#[inline(always)]
pub(super) fn remap_direct<F: Family, T: Tables<F>>(
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    let key = &headers.tuple;
    // The programs of a bridge's ports may have translated the packet before: then it is no direct
    // one.
    if !opens(headers) || matches!(tables.hook_device(), Some(here) if here.is_bridge()) {
        return;
    }
    // A flow that has ended clashes too, since its entry still translates what the backend sends to
    // this tuple. If that entry no longer reserves the tuple, the direct connection's own entry,
    // which changes nothing, replaces it. Another direct connection that was given this one's port
    // clashes as well. A guess does not: it translates none of its packets.
    let clashes = match entry_of(&key.reversed(), tables) {
        Some((entry, _)) => {
            entry.flags & (flow::REPLY | flow::HAIRPIN | flow::HOST | flow::SOURCE) == flow::REPLY
                && entry.state & (state::GUESS | state::MATCHED) != state::GUESS
        }
        // An earlier connection's leftover entry must not translate this one.
        None => decision.facts.had_entry(),
    };
    if !clashes {
        return;
    }
    decision.flow.seen = tables.now();
    decision.flow.flags = flow::DIRECT;
    decision.set(Verdict::Translate, Reason::DirectRemapped);
    decision.record = Record::Open;
    decision.step = Step::AllocatePort;
    decision.depends_on_source = true;
}
