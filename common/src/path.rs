//! The packet's path: what happens to a packet, and why.
//!
//! [`decide`] reads headers and tables and returns a [`Decision`], plain data that
//! an adapter applies once. It is the same code in the kernel and on the host.
//!
//! # Where a packet is translated
//!
//! Forward (client to VIP) at the ingress of the device where the client's packet
//! enters the node, back at the egress of the device where the reply leaves towards
//! the client. In between, the stack sees real addresses only:
//!
//! ```text
//!   client pod ──► edge ingress ──► routing, netfilter, CNI ──► edge egress ──► backend pod
//!               VIP → backend                                  (nothing to do)
//!   client pod ◄── edge egress  ◄── routing, netfilter, CNI ◄── edge ingress ◄── backend pod
//!               backend → VIP                                  (nothing to do)
//! ```
//!
//! Three kinds of packets bypass the stack, which would drop them as martians: those of a client that
//! is its own backend (*hairpin*: turned back where they came from, with the VIP as the
//! other side's address, so that its answers come here again), answers to services
//! without backends, and what this host's own sockets send to a VIP untranslated:
//! translated where its route leaves, sent on by the FIB; its replies are translated
//! at ingress and handed in on the device that the route to the VIP names.

use crate::abi::{
    self, Class, Flow, RejectBucket, ServiceKey, Tuple, backend, flow, frontend, listing, state,
};
use crate::family::Family;
use crate::header::{protocol, tcp};
use crate::maglev;
use crate::parse::{Headers, Kind};
use crate::reason::Reason;
use crate::tables::Tables;

/// A used flow renews its partner after this many ticks.
pub const RENEW_TICKS: u32 = 9;
/// A closing flow keeps its reply tuple from others for this many ticks (TIME_WAIT is 60 s).
pub const CLOSING_TICKS: u32 = 56;
/// A UDP flow that was idle for this many ticks no longer keeps its reply tuple from others.
pub const UDP_IDLE_TICKS: u32 = 168;
/// Source ports tried for a flow that must be remapped.
pub const REMAP_TRIES: u32 = 8;
/// One ICMP error a second to one client, as `net.ipv4.icmp_ratelimit` has it...
pub const REJECT_COST_MS: u32 = 1_000;
/// ...after a burst of six.
pub const REJECT_BURST_MS: u32 = 6_000;

/// Bits of [`Tables::marks`]: what has happened at least once, so that the path need not look for it before.
pub mod mark {
    /// A direct connection was remapped.
    pub const DIRECT: u32 = 1;
    /// A packet of this host's own was translated at egress.
    pub const HOST: u32 = 2;
}

/// Where a packet is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Hook {
    /// tc ingress.
    Ingress,
    /// tc egress.
    Egress,
    /// XDP; decides as ingress does, the adapter takes only what it can finish.
    Xdp,
}

/// What an adapter does with the packet after the rewrite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// Leave it as it is and let the next program see it.
    Pass,
    /// Rewrite it and let the next program see it.
    Translate,
    /// Rewrite it and send it back out of the device it came from.
    TurnBack,
    /// Rewrite it and hand it to the stack on the device that the route to the VIP names.
    HandIn,
    /// Rewrite it and send it where the FIB says.
    Route,
    /// Answer with a TCP reset.
    Reset,
    /// Answer with ICMP port unreachable.
    Unreachable,
    /// Drop it.
    Drop,
}

/// What to record of the flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Record {
    /// Nothing.
    Nothing,
    /// A new flow, in `embryonic`: the partner if its tuple is free, then this entry.
    Open,
    /// A flow found again in the middle of a connection, in `flows`: as `Open`.
    Establish,
    /// The flow is proven: both entries move from `embryonic` to `flows`.
    Promote,
    /// The time and state of both entries in `flows`; a missing one is made again.
    Renew,
    /// As `Renew`, in `embryonic`.
    RenewEmbryonic,
}

/// What happens to a packet: plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Decision<F: Family> {
    /// What to do with the packet.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// What to record.
    pub record: Record,
    /// The tuple that `flow` is recorded under; the packet's own but where a lost entry is made again.
    pub key: Tuple<F::Address>,
    /// The translation; its addresses and ports are the packet's after the rewrite.
    pub flow: Flow<F::Address>,
}

impl<F: Family> Decision<F> {
    /// To pass a packet of this tuple: what every decision starts as.
    #[inline(always)]
    #[must_use]
    pub fn pass(key: &Tuple<F::Address>) -> Self {
        Self {
            verdict: Verdict::Pass,
            reason: Reason::Stranger,
            record: Record::Nothing,
            key: *key,
            flow: Flow {
                source: key.source,
                destination: key.destination,
                source_port: key.source_port,
                destination_port: key.destination_port,
                ..Flow::default()
            },
        }
    }

    #[inline(always)]
    fn set(&mut self, verdict: Verdict, reason: Reason) {
        self.verdict = verdict;
        self.reason = reason;
    }
}

/// The tuple of packets that answer a translated one: the partner entry's key.
#[inline(always)]
pub fn partner_key<F: Family>(flow: &Flow<F::Address>, protocol: u8) -> Tuple<F::Address> {
    Tuple {
        source: flow.destination,
        destination: flow.source,
        source_port: flow.destination_port,
        destination_port: flow.source_port,
        protocol,
        reserved: [0; 3],
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

/// Whether an entry leads to this tuple turned round: then it is the partner of the tuple's own entry.
#[inline(always)]
fn leads_back<F: Family>(entry: &Flow<F::Address>, key: &Tuple<F::Address>) -> bool {
    entry.source == key.destination
        && entry.destination == key.source
        && entry.source_port == key.destination_port
        && entry.destination_port == key.source_port
}

/// Decides about a packet.
#[inline(always)]
pub fn decide<F: Family, T: Tables<F>>(hook: Hook, headers: &Headers<F>, tables: &T) -> Decision<F> {
    let mut decision = Decision::pass(&headers.tuple);
    decide_into(hook, headers, tables, &mut decision);
    decision
}

/// As [`decide`], into a decision that is to pass so far: the kernel's stack has no room for copies.
#[inline(always)]
pub fn decide_into<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    if translation(hook, headers, tables, decision) {
        claim(tables, decision);
    }
}

/// Decides all but the source port of a new flow; true when that is still to be claimed.
#[inline(always)]
fn translation<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let key = &headers.tuple;
    if headers.kind == Kind::Other {
        return false;
    }
    let egress = hook == Hook::Egress;
    let destination = tables.listing(&key.destination);
    let to_frontend = destination & listing::FRONTEND != 0;
    let known = if egress {
        to_frontend || tables.listing(&key.source) & listing::BACKEND != 0
    } else {
        // A reply to this host's own translated packets comes from a backend to an address of the node.
        to_frontend
            || (destination & listing::NODE != 0
                && tables.marks() & mark::HOST != 0
                && tables.listing(&key.source) & listing::BACKEND != 0)
    };
    let to_backend = !egress && destination & listing::BACKEND != 0;
    if !known && !to_backend {
        return false;
    }
    match headers.kind {
        Kind::Transport | Kind::IcmpError => {}
        Kind::Fragment | Kind::Truncated | Kind::Malformed | Kind::Other => {
            if to_frontend {
                decision.reason = unreadable(headers.kind);
            }
            return false;
        }
    }
    if is_bare_reset(headers) && is_unknown_connection(headers, to_backend, tables, decision) {
        return false;
    }
    if known || tables.marks() & mark::DIRECT != 0 {
        let counts = if let Some(entry) = tables.flow(key) {
            along(egress, headers, entry, false, tables, decision)
        } else if let Some(entry) = tables.embryonic(key) {
            along(egress, headers, entry, true, tables, decision)
        } else {
            false
        };
        if counts {
            return false;
        }
    }
    if headers.kind == Kind::IcmpError {
        return false;
    }
    if to_frontend {
        let frontend = ServiceKey {
            address: key.destination,
            port: key.destination_port,
            protocol: key.protocol,
            reserved: 0,
        };
        if let Some(service) = tables.service(&frontend) {
            let class = class(service.kind, egress || tables.inside());
            return open(egress, headers, service.service_port, class, tables, decision);
        }
    }
    to_backend && direct(headers, tables, decision)
}

/// Why a packet for a service is passed untouched.
#[inline(always)]
fn unreadable(kind: Kind) -> Reason {
    match kind {
        Kind::Fragment => Reason::Fragment,
        Kind::Truncated => Reason::Truncated,
        Kind::Malformed => Reason::Malformed,
        Kind::Transport | Kind::IcmpError | Kind::Other => Reason::Stranger,
    }
}

/// The class of clients that a packet belongs to at a kind of frontend.
#[inline(always)]
fn class(kind: u32, inside: bool) -> Class {
    if kind == frontend::CLUSTER_IP {
        Class::Internal
    } else if inside {
        Class::ExternalInside
    } else {
        Class::ExternalOutside
    }
}

/// What an entry means at a hook: it counts where its direction is translated, elsewhere the packet passes as it is.
#[inline(always)]
fn verdict_along(flags: u8, egress: bool) -> Verdict {
    let reply = flags & flow::REPLY != 0;
    let host = flags & flow::HOST != 0;
    if flags & flow::HAIRPIN != 0 {
        match (host, egress) {
            (true, true) => Verdict::HandIn,
            (false, false) => Verdict::TurnBack,
            (true, false) | (false, true) => Verdict::Pass,
        }
    } else if reply {
        match (host, egress) {
            (true, false) => Verdict::HandIn,
            (false, true) => Verdict::Translate,
            (true, true) | (false, false) => Verdict::Pass,
        }
    } else if egress {
        Verdict::Route
    } else {
        Verdict::Translate
    }
}

/// A packet that has a flow entry. False: the entry no longer counts, a backend is to be selected anew.
#[inline(always)]
fn along<F: Family, T: Tables<F>>(
    egress: bool,
    headers: &Headers<F>,
    entry: &Flow<F::Address>,
    embryonic: bool,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let flags = entry.flags;
    let reply = flags & flow::REPLY != 0;
    let verdict = verdict_along(flags, egress);
    if verdict == Verdict::Pass {
        return true;
    }
    if headers.kind == Kind::IcmpError {
        decision.flow = *entry;
        decision.set(verdict, Reason::IcmpError);
        return true;
    }
    let mut state = entry.state;
    let promote = if headers.tuple.protocol == protocol::TCP {
        let tcp_flags = headers.tcp_flags;
        if !reply
            && tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN
            && (state & state::CLOSING != 0 || embryonic && !serves(entry, tables))
        {
            return false;
        }
        if tcp_flags & tcp::FIN != 0 {
            state |= if reply { state::FIN_REPLY } else { state::FIN_FORWARD };
        }
        if tcp_flags & tcp::RST != 0 {
            state |= state::RESET;
        }
        if !reply && tcp_flags & tcp::RST == 0 && !embryonic {
            // Now a guess is certain.
            state |= state::ESTABLISHED;
        }
        embryonic && !reply && tcp_flags & (tcp::SYN | tcp::RST | tcp::ACK) == tcp::ACK
    } else {
        if !reply && !serves(entry, tables) {
            return false;
        }
        embryonic && reply
    };
    if promote {
        state |= state::ESTABLISHED;
    }
    let now = tables.now();
    let renew = state != entry.state || now.wrapping_sub(entry.seen) >= RENEW_TICKS;
    decision.flow = *entry;
    decision.flow.state = state;
    decision.flow.seen = now;
    decision.record = if promote {
        Record::Promote
    } else if !renew {
        Record::Nothing
    } else if embryonic {
        Record::RenewEmbryonic
    } else {
        Record::Renew
    };
    let reason = if flags & flow::DIRECT != 0 {
        Reason::DirectRemapped
    } else if reply {
        Reason::Reply
    } else {
        Reason::Forward
    };
    decision.set(verdict, reason);
    true
}

/// Whether the backend of a flow still takes traffic.
#[inline(always)]
fn serves<F: Family, T: Tables<F>>(flow: &Flow<F::Address>, tables: &T) -> bool {
    if flow.flags & flow::DIRECT != 0 {
        return true;
    }
    match tables.backend(flow.backend) {
        Some(backend) => backend.generation == flow.generation && backend.flags & backend::SERVING != 0,
        None => false,
    }
}

/// The first packet of a flow, or one whose entry was lost. True: its source port is to be claimed.
#[inline(always)]
fn open<F: Family, T: Tables<F>>(
    egress: bool,
    headers: &Headers<F>,
    service_port: u32,
    class: Class,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let key = &headers.tuple;
    decision.flow.service_port = service_port;
    let Some((id, backend)) = select::<F, T>(key, service_port, class, tables) else {
        reject(headers, decision);
        return false;
    };
    let hairpin = backend.address == key.source || egress && backend.flags & backend::HOST != 0;
    if hairpin {
        // Its client is shown to itself as the VIP, so that its answers come back here.
        decision.flow.source = key.destination;
    }
    decision.flow.destination = backend.address;
    decision.flow.destination_port = backend.port;
    decision.flow.backend = id;
    decision.flow.generation = backend.generation;
    decision.flow.seen = tables.now();
    decision.flow.flags = if egress { flow::HOST } else { 0 }
        | if hairpin { flow::HAIRPIN } else { 0 }
        | if backend.flags & backend::LOCAL != 0 { flow::LOCAL } else { 0 };
    let verdict = match (hairpin, egress) {
        (true, true) => Verdict::HandIn,
        (true, false) => Verdict::TurnBack,
        (false, true) => Verdict::Route,
        (false, false) => Verdict::Translate,
    };
    let tcp_flags = headers.tcp_flags;
    if key.protocol == protocol::TCP && tcp_flags & (tcp::SYN | tcp::ACK) != tcp::SYN {
        decision.set(verdict, Reason::Recovered);
        if tcp_flags & tcp::RST != 0 {
            // The last packet there will be: nothing to record.
            return false;
        }
        decision.flow.state = state::ESTABLISHED;
        decision.record = Record::Establish;
    } else {
        decision.set(verdict, Reason::Forward);
        decision.record = Record::Open;
    }
    true
}

/// The backend that a tuple's slot leads to; `None` without backends.
#[inline(always)]
fn select<'t, F: Family, T: Tables<F>>(
    key: &Tuple<F::Address>,
    service_port: u32,
    class: Class,
    tables: &'t T,
) -> Option<(u32, &'t abi::Backend<F::Address>)> {
    let range = tables.range(service_port, class)?;
    if range.size() == 0 {
        return None;
    }
    let slot = maglev::slot::<F>(key, range.size());
    let id = tables.slot(range.start().wrapping_add(slot))?;
    tables.backend(id).map(|backend| (id, backend))
}

/// Finds a source port with which the new flow's reply tuple is free, the packet's own first; without one the packet is dropped.
#[inline(always)]
fn claim<F: Family, T: Tables<F>>(tables: &T, decision: &mut Decision<F>) {
    let hash = maglev::hash::<F>(&decision.key);
    for attempt in 0..REMAP_TRIES {
        if attempt > 0 {
            decision.flow.source_port = remapped(hash.wrapping_add(attempt.wrapping_mul(0x9e37_79b9)));
        }
        if is_free(tables, decision) {
            return;
        }
    }
    decision.set(Verdict::Drop, Reason::PortsExhausted);
    decision.record = Record::Nothing;
}

/// A port outside the usual ephemeral range, so that it meets no port that the client picks itself:
/// 1024-29999 or 61000-65535.
#[inline(always)]
fn remapped(hash: u32) -> u16 {
    const LOW: u32 = 29_999 - 1_024 + 1;
    const HIGH: u32 = 65_535 - 61_000 + 1;
    let pick = maglev::scale(hash, LOW + HIGH);
    if pick < LOW {
        pick.wrapping_add(1_024) as u16
    } else {
        pick.wrapping_sub(LOW).wrapping_add(61_000) as u16
    }
}

/// Whether the reply tuple of a new flow is free for it.
#[inline(always)]
fn is_free<F: Family, T: Tables<F>>(tables: &T, decision: &Decision<F>) -> bool {
    let key = &decision.key;
    let reply = partner_key::<F>(&decision.flow, key.protocol);
    let entry = match tables.flow(&reply) {
        Some(entry) => entry,
        None => match tables.embryonic(&reply) {
            Some(entry) => entry,
            None => return true,
        },
    };
    if leads_back::<F>(entry, key) {
        return true;
    }
    let idle = tables.now().wrapping_sub(entry.seen);
    if key.protocol == protocol::UDP {
        idle > UDP_IDLE_TICKS
    } else {
        entry.state & state::CLOSING != 0 && idle > CLOSING_TICKS
    }
}

/// A packet for a service port without backends.
#[inline(always)]
fn reject<F: Family>(headers: &Headers<F>, decision: &mut Decision<F>) {
    if headers.tuple.protocol != protocol::TCP {
        decision.set(Verdict::Unreachable, Reason::NoBackendUnreachable);
    } else if headers.tcp_flags & tcp::RST == 0 {
        decision.set(Verdict::Reset, Reason::NoBackendReset);
    } else {
        // A reset is never answered (RFC 9293, 3.10.7.1).
        decision.set(Verdict::Drop, Reason::NoBackendDropped);
    }
}

/// A packet that goes to a backend's own address. True: its source port is to be claimed.
#[inline(always)]
fn direct<F: Family, T: Tables<F>>(headers: &Headers<F>, tables: &T, decision: &mut Decision<F>) -> bool {
    let key = &headers.tuple;
    let opens = if key.protocol == protocol::TCP {
        headers.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN
    } else {
        // On other devices a packet may be met twice (a VLAN device on its parent): its own flow is no clash.
        tables.inside()
    };
    if !opens {
        return false;
    }
    // Only a proven flow clashes: an unproven one may be this very packet's, met before by another program.
    // One that has ended clashes too: its entry still translates what the backend sends to this tuple. Where it
    // no longer keeps the tuple from others, the direct connection's own entry, which changes nothing, replaces it.
    let Some(entry) = tables.flow(&key.reversed()) else { return false };
    if entry.flags & (flow::REPLY | flow::HAIRPIN | flow::HOST | flow::DIRECT) != flow::REPLY {
        return false;
    }
    decision.flow.seen = tables.now();
    decision.flow.flags = flow::DIRECT;
    decision.set(Verdict::Translate, Reason::DirectRemapped);
    decision.record = Record::Open;
    true
}

/// Whether a packet is what a client sends when a segment arrives for a connection that it does not know: a reset
/// without acknowledgment.
#[inline(always)]
fn is_bare_reset<F: Family>(headers: &Headers<F>) -> bool {
    headers.kind == Kind::Transport
        && headers.tuple.protocol == protocol::TCP
        && headers.tcp_flags & (tcp::RST | tcp::ACK | tcp::SYN) == tcp::RST
}

/// A bare reset: true when it only shows that a reply's entry was lost, and a new one is to be tried.
///
/// To a backend's own address it is sent by a client that does not know the connection, or by
/// one that got a reply untranslated because its entry was lost: then a frontend leads to this
/// endpoint, and either the forward entry still leads here or this client's slot does. In that
/// case the reset is dropped and the entries are made again; the backend sends the segment once
/// more. What a slot says is a guess: several frontends may lead to the endpoint, or the
/// connection may be a direct one after all. Its entry is not `ESTABLISHED` until the client sends
/// along it; when the client resets that too, the next frontend is tried, and after the last
/// the reset goes on to the backend. Where the client's connections are translated at the
/// socket, all of them are direct on the wire, and there is no guessing.
#[inline(always)]
fn is_unknown_connection<F: Family, T: Tables<F>>(
    headers: &Headers<F>,
    to_backend: bool,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let packet = &headers.tuple;
    // In both cases `decision.flow` is what the backend sees of the packet.
    let is_wrong_guess = match tables.flow(packet) {
        Some(entry) if entry.state & state::ESTABLISHED == 0 && entry.flags & flow::REPLY == 0 => {
            decision.flow = *entry;
            true
        }
        Some(_) => return false,
        None => false,
    };
    if !is_wrong_guess && (!to_backend || tables.embryonic(packet).is_some()) {
        return false;
    }
    let endpoint = ServiceKey {
        address: decision.flow.destination,
        port: decision.flow.destination_port,
        protocol: packet.protocol,
        reserved: 0,
    };
    let Some(origins) = tables.origins(&endpoint) else { return false };
    // An established entry is proof, a slot is a guess: all entries are asked before any slot.
    for origin in &origins.frontends {
        if origin.port == 0 {
            break;
        }
        decision.key.destination = origin.address;
        decision.key.destination_port = origin.port;
        if let Some(entry) = tables.flow(&decision.key)
            && entry.state & state::CLOSING == 0
            && (entry.state & state::ESTABLISHED != 0 || !is_wrong_guess)
            && leads_to(entry, &decision.flow)
        {
            decision.flow = *entry;
            decision.flow.seen = tables.now();
            decision.set(Verdict::Drop, Reason::ReplyRecovered);
            decision.record = Record::Establish;
            return true;
        }
    }
    let mut is_next = !is_wrong_guess;
    for origin in &origins.frontends {
        if origin.port == 0 || tables.translated_at_socket() {
            break;
        }
        if !is_next {
            is_next = origin.address == packet.destination && origin.port == packet.destination_port;
            continue;
        }
        decision.key.destination = origin.address;
        decision.key.destination_port = origin.port;
        if tables.flow(&decision.key).is_none() && guess(tables, decision) {
            decision.set(Verdict::Drop, Reason::ReplyRecovered);
            decision.record = Record::Establish;
            return true;
        }
    }
    decision.key = *packet;
    false
}

/// Whether two entries make the same packets.
#[inline(always)]
pub fn leads_to<A: Copy + Eq>(one: &Flow<A>, other: &Flow<A>) -> bool {
    one.source == other.source
        && one.destination == other.destination
        && one.source_port == other.source_port
        && one.destination_port == other.destination_port
}

/// Makes the entries of a connection again if the slot of the decision's key leads to where the flow goes.
#[inline(always)]
fn guess<F: Family, T: Tables<F>>(tables: &T, decision: &mut Decision<F>) -> bool {
    let frontend = ServiceKey {
        address: decision.key.destination,
        port: decision.key.destination_port,
        protocol: decision.key.protocol,
        reserved: 0,
    };
    let Some(service) = tables.service(&frontend) else { return false };
    let inside = tables.inside();
    if service.kind == frontend::CLUSTER_IP && !inside {
        // Where the guess is wrong, a client out there may have no way back to this address.
        return false;
    }
    let class = class(service.kind, inside);
    let service_port = service.service_port;
    let Some((id, backend)) = select::<F, T>(&decision.key, service_port, class, tables) else {
        return false;
    };
    if backend.address != decision.flow.destination || backend.port != decision.flow.destination_port {
        return false;
    }
    decision.flow.backend = id;
    decision.flow.service_port = service_port;
    decision.flow.generation = backend.generation;
    decision.flow.seen = tables.now();
    decision.flow.state = 0;
    decision.flow.flags = if backend.flags & backend::LOCAL != 0 { flow::LOCAL } else { 0 };
    true
}

/// Takes the cost of one ICMP error from a client's bucket; false when there is not enough credit.
#[inline(always)]
pub fn spend(bucket: Option<RejectBucket>, now_ms: u32) -> (RejectBucket, bool) {
    let credit = match bucket {
        Some(bucket) => {
            let refill = now_ms.wrapping_sub(bucket.refilled_ms).min(REJECT_BURST_MS);
            bucket.credit_ms.wrapping_add(refill).min(REJECT_BURST_MS)
        }
        None => REJECT_BURST_MS,
    };
    let allowed = credit >= REJECT_COST_MS;
    let credit_ms = if allowed { credit.wrapping_sub(REJECT_COST_MS) } else { credit };
    (RejectBucket { refilled_ms: now_ms, credit_ms }, allowed)
}
