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
//! A client that is *masqueraded*, shown to the backend as an address of this node, is translated
//! twice, by two pairs of entries that know nothing of each other's addresses. The second pair
//! changes the client's side, outside of what the stack sees:
//!
//! ```text
//!   client ──► ingress ──► routing, netfilter, CNI ──► egress ──► backend
//!           VIP → backend                        client → node
//!   client ◄── egress  ◄── routing, netfilter, CNI ◄── ingress ◄── backend
//!           backend → VIP                        node → client
//! ```
//!
//! The egress learns from the reply entry of the first pair that the source is to change.
//!
//! Three kinds of packets bypass the stack, which would drop them as martians: those of a client that
//! is its own backend (*hairpin*: turned back where they came from, with the VIP as the
//! other side's address, so that its answers come here again), answers to services
//! without backends, and what this host's own sockets send to a VIP untranslated
//! (translated where its route leaves, sent on by the FIB; its replies are translated
//! at ingress and handed in on the device that the route to the VIP names).
//!
//! # In which steps
//!
//! [`decide_into`] answers for every packet but the first of a flow in one step. A first packet
//! goes on to [`open_into`], which selects a backend and may wait for what the FIB says
//! ([`Step::AskRoutes`]) or for a source port that takes longer to find ([`Step::Search`]).

pub mod policy;
mod select;

use crate::abi::{
    Class, Flow, RejectBucket, RejectKey, ServiceKey, Tuple, backend, device, device_flags, flow, frontend,
    imported, listing, networks, phase, side, state,
};
use crate::family::Family;
use crate::fragment;
use crate::header::{protocol, tcp};
use crate::maglev;
use crate::parse::{Fragment, Headers, Kind};
use crate::reason::Reason;
use crate::rewrite::can_follow;
use crate::tables::Tables;

use policy::Source;
pub use select::find;

/// A used flow renews its partner after this many ticks.
pub const RENEW_TICKS: u32 = 9;
/// A flow that has ended keeps its reply tuple from others for this many ticks (TIME_WAIT is 60 s).
pub const CLOSING_TICKS: u32 = 56;
/// One that only one side has closed does so for this many idle ticks (two minutes, as conntrack's).
pub const HALF_CLOSED_TICKS: u32 = 112;
/// One that no packet of the endpoint has proven: for half a minute.
pub const UNPROVEN_TICKS: u32 = 28;
/// A live one: for a day.
pub const IDLE_TICKS: u32 = 80_467;
/// A client that opens anew leaves an endpoint that no longer serves and was not heard for this many ticks.
pub const SILENT_TICKS: u32 = 28;
/// A UDP flow is more than a question and its answers when it still goes on after this many ticks.
pub const STREAM_TICKS: u32 = 2;
/// A UDP flow that was idle for this many ticks no longer keeps its reply tuple from others.
pub const UDP_IDLE_TICKS: u32 = 168;
/// Source ports tried for a flow that must be remapped.
pub const REMAP_TRIES: u32 = 8;
/// One ICMP error a second to one client, as `net.ipv4.icmp_ratelimit` has it...
pub const REJECT_COST_MS: u32 = 1_000;
/// ...after a burst of six.
pub const REJECT_BURST_MS: u32 = 6_000;

/// ICMP errors by one device: a thousand a second, as `net.ipv4.icmp_msgs_per_sec` has it...
pub const DEVICE_REJECT_COST_MS: u32 = 1;
/// ...after a burst of fifty, as `net.ipv4.icmp_msgs_burst`.
pub const DEVICE_REJECT_BURST_MS: u32 = 50;

/// Bits of [`Tables::marks`]: what has happened at least once, so that the path need not look for it before.
pub mod mark {
    /// A direct connection was remapped.
    pub const DIRECT: u32 = 1;
    /// Answers to a packet may come to an address of this host: its own was translated at egress, or a pod asked itself.
    pub const HOST: u32 = 2;
    /// A client was masqueraded.
    pub const MASQUERADED: u32 = 4;
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
    /// Rewrite it and send it where the FIB says if the stack would only forward it; else as
    /// [`Verdict::Translate`].
    Around,
    /// Answer with a TCP reset.
    Reset,
    /// Answer with ICMP port unreachable.
    Unreachable,
    /// Drop it.
    Drop,
    /// Have it kept until its datagram's first fragment has been seen.
    Hold,
}

/// What to record of the flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Record {
    /// Nothing.
    Nothing,
    /// A new flow, in `embryonic`: the partner if its tuple is free, then this entry.
    Open,
    /// A flow found again in the middle of a connection: as `Open`, but in `flows` where the other half of it still is.
    Establish,
    /// The flow is proven: both entries move from `embryonic` to `flows`.
    Promote,
    /// The flow has ended: both entries move from `flows` to `embryonic`.
    Demote,
    /// The time and state of both entries in `flows`; a missing one is made again.
    Renew,
    /// As `Renew`, in `embryonic`.
    RenewEmbryonic,
}

/// What a decision still needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Nothing.
    Done,
    /// A backend of [`Flow::service_port`].
    Select,
    /// [`Tables::routes`]; then [`open_into`] once more.
    AskRoutes,
    /// A source port: [`open_into`].
    Claim,
    /// A source port beyond the few that were tried: [`search`].
    Search,
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
    /// What is still needed.
    pub step: Step,
    /// Whether the client's affinity to the backend is recorded: the endpoint has answered.
    pub affinity: bool,
    /// Whether bits of the flow's state are taken back, not only added.
    pub takes_back: bool,
    /// Whether the packet's word is taken for what becomes of a flow: then its source has to belong to the device that it came
    /// in by ([`policy::is_foreign`]).
    pub asks_source: bool,
    /// The client's [round](crate::abi::Affinity::round), where its affinity is recorded.
    pub round: u16,
    /// Whether its source does not belong there: [`disown`].
    pub is_foreign: bool,
    /// Whether the packet is a first fragment, and what it [tells](fragment::told) is noted.
    pub datagram: bool,
    /// The kind of the frontend, one of [`frontend`]; 0: none was asked for.
    pub kind: u32,
    /// What the packet's addresses are: bits of [`met`].
    pub met: u32,
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
            step: Step::Done,
            affinity: false,
            takes_back: false,
            asks_source: false,
            is_foreign: false,
            round: 0,
            datagram: false,
            kind: 0,
            met: 0,
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

    /// Whether the packet goes around the stack as it is: an endpoint's, which is translated where
    /// it leaves.
    #[inline(always)]
    #[must_use]
    pub fn is_answer(&self) -> bool {
        self.verdict == Verdict::Around && self.reason == Reason::Stranger && self.flow.flags == 0
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

/// Whether an entry leads to this tuple turned round: then it is the partner of the tuple's own entry.
#[inline(always)]
pub fn leads_back<F: Family>(entry: &Flow<F::Address>, key: &Tuple<F::Address>) -> bool {
    entry.source == key.destination
        && entry.destination == key.source
        && entry.source_port == key.destination_port
        && entry.destination_port == key.source_port
}

/// Decides about a packet, all steps at once.
#[inline(always)]
pub fn decide<F: Family, T: Tables<F>>(hook: Hook, headers: &Headers<F>, tables: &T) -> Decision<F> {
    let mut decision = Decision::pass(&headers.tuple);
    decide_into(hook, headers, tables, &mut decision);
    if decision.step != Step::Done {
        open_into(hook, headers, tables, &mut decision);
    }
    if decision.step == Step::Search {
        search(tables, &mut decision);
    }
    decision
}

/// The first step: what no new flow is needed for. Takes a decision that is to pass so far.
#[inline(always)]
pub fn decide_into<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    if headers.kind != Kind::Other {
        decide_known(hook, headers, tables, decision);
        accelerate(decision);
    }
}

/// Sends what is translated at ingress around the stack, where a person has asked for that.
#[inline(always)]
fn accelerate<F: Family>(decision: &mut Decision<F>) {
    if decision.met & met::ACCELERATED != 0
        && decision.verdict == Verdict::Translate
        && decision.flow.flags & flow::DIRECT == 0
    {
        decision.verdict = Verdict::Around;
    }
}

/// Whether an entry is that of an endpoint's packet which passes ingress as it is, and is
/// translated where it leaves.
#[inline(always)]
fn is_answer(flags: u8) -> bool {
    flags & (flow::REPLY | flow::HOST | flow::HAIRPIN | flow::DIRECT | flow::SOURCE) == flow::REPLY
}

/// What is known of a packet without a new flow.
#[inline(always)]
fn decide_known<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    let key = &headers.tuple;
    let egress = hook == Hook::Egress;
    decision.met = classify(hook, headers, tables);
    // Read back from memory, behind the black box, the bits are any to the verifier: it goes on once, not for each way to them.
    let met = core::hint::black_box(&*decision).met;
    let to_address = met & met::TO_ADDRESS != 0;
    let to_frontend = met & met::TO_FRONTEND != 0;
    let mut leaves = met & met::LEAVES != 0;
    let mut known = met & met::KNOWN != 0;
    let to_backend = met & met::TO_BACKEND != 0;
    if !known && !to_backend {
        if egress && is_stray(headers, tables) {
            decision.set(Verdict::Drop, Reason::UnassignedAddress);
        }
        return;
    }
    match headers.kind {
        Kind::Transport | Kind::IcmpError => {}
        Kind::Fragment if known && fragment::is_transport(key.protocol) => {
            later(egress, leaves, to_address, headers, tables, decision);
            return;
        }
        Kind::Fragment | Kind::Truncated | Kind::Malformed | Kind::Other => {
            if to_address {
                decision.reason = unreadable(headers.kind);
            }
            return;
        }
    }
    if headers.fragment == Fragment::First && known {
        decision.datagram = true;
        if !can_follow(headers, &decision.flow) {
            if to_address {
                decision.reason = Reason::Fragment;
            }
            return;
        }
    }
    if !egress && is_bare_reset(headers) && is_unknown_connection(headers, to_backend, tables, decision) {
        return;
    }
    let mut found = None;
    if leaves {
        let from_node = met & met::FROM_NODE != 0;
        let before = translated_before(key, tables);
        if before == flow::REPLY && !from_node {
            return;
        }
        if before == 0 && !from_node {
            // Of a client that speaks to the endpoint directly, if it is no endpoint's reply itself.
            leaves = false;
            known = met & met::FROM_BACKEND != 0;
        }
        if before & flow::MASQUERADED != 0 || from_node {
            decision.key.side = side::FAR;
            found = entry_of(&decision.key, tables);
            if found.is_none() {
                decision.key.side = side::NEAR;
            }
        }
    }
    if found.is_none() && (known || tables.marks() & mark::DIRECT != 0) {
        found = entry_of(key, tables);
    }
    if let Some((entry, embryonic)) = found {
        decision.met |= met::HAD_ENTRY;
        if along(egress, headers, entry, embryonic, tables, decision) {
            return;
        }
        decision.key.side = side::NEAR;
    }
    if headers.kind == Kind::IcmpError {
        return;
    }
    if to_frontend {
        let (service_port, kind) = find(key, met & met::TO_NODE_PORT != 0, tables).unwrap_or_default();
        if kind != 0 || to_address && select::is_cluster_ip(key, tables) {
            if met & met::TO_NODE != 0 && !opens(headers) && tables.is_node_address(&key.destination) {
                // A connection of the stack's own, or one that netfilter knows.
                return;
            }
            decision.flow.service_port = service_port;
            if let Some(reason) = left_to_netfilter(decision.met & met::HAD_ENTRY != 0, headers, tables) {
                decision.reason = reason;
            } else if kind != 0 {
                decision.kind = kind;
                decision.step = Step::Select;
                decision.asks_source = true;
            } else {
                reject(headers, Reason::UndefinedPort, Reason::UndefinedPort, decision);
            }
            return;
        }
    }
    if leaves && leaves_as_node(headers, tables, decision) {
        return;
    }
    // Backends are clients too, and an address stays listed for a while when its Service is gone.
    if egress && is_stray(headers, tables) {
        decision.set(Verdict::Drop, Reason::UnassignedAddress);
        return;
    }
    if to_backend {
        direct(headers, tables, decision);
    }
}

/// Bits of [`Decision::met`].
pub mod met {
    /// To an address of a frontend.
    pub const TO_ADDRESS: u32 = 1;
    /// To a node port, as far as its number tells.
    pub const TO_NODE_PORT: u32 = 2;
    /// Either of both.
    pub const TO_FRONTEND: u32 = 4;
    /// To a backend's address, at ingress.
    pub const TO_BACKEND: u32 = 8;
    /// To an address of this node.
    pub const TO_NODE: u32 = 16;
    /// It leaves where packets of masqueraded clients leave, or must not meet them.
    pub const LEAVES: u32 = 32;
    /// It may have an entry.
    pub const KNOWN: u32 = 64;
    /// From an address of this node, or to a frontend from anywhere.
    pub const FROM_NODE: u32 = 128;
    /// From a backend's address, and not to a frontend.
    pub const FROM_BACKEND: u32 = 256;
    /// It goes around the stack, if it is a client's or an endpoint's.
    pub const ACCELERATED: u32 = 512;
    /// Its own tuple had an entry.
    pub const HAD_ENTRY: u32 = 1024;
}

/// What a packet's addresses are, as far as their listing and the port numbers tell.
#[inline(always)]
fn classify<F: Family, T: Tables<F>>(hook: Hook, headers: &Headers<F>, tables: &T) -> u32 {
    let egress = hook == Hook::Egress;
    let key = &headers.tuple;
    let destination = tables.listing(&key.destination);
    let to_address = destination & listing::FRONTEND != 0;
    // Of fragments all are taken for one's until their ports are known: the first is to be noted wherever others ask for it.
    let to_node_port = destination & listing::NODE_PORTS != 0
        && (headers.fragment != Fragment::Whole || tables.is_node_port(key.destination_port))
        && policy::may_ask_for_node_ports::<F, T>(egress, &key.destination, tables);
    let to_frontend = to_address || to_node_port;
    let source = if to_frontend { 0 } else { tables.listing(&key.source) };
    let leaves = egress
        && (destination & listing::BACKEND != 0
            && tables.marks() & mark::MASQUERADED != 0
            && (destination & listing::NODE == 0 || !tables.is_node_address(&key.destination))
            || source & listing::NODE_PORTS != 0 && asks_from_node_port(headers, tables));
    // An endpoint's packet too, which else is met where it leaves alone.
    let accelerated = hook == Hook::Ingress
        && (to_frontend || source & listing::BACKEND != 0)
        && matches!(tables.settings(), Some(settings) if settings.networks & networks::ACCELERATE != 0);
    let known = if egress {
        to_frontend || leaves || source & listing::BACKEND != 0
    } else {
        accelerated ||
        // A reply to a masqueraded client, or to this host's own translated packets, comes from a backend to an address of the node.
        to_frontend
            || (source & listing::BACKEND != 0
                && destination & listing::NODE != 0
                && tables.marks() & (mark::HOST | mark::MASQUERADED) != 0)
    };
    let bit = |is: bool, bit: u32| if is { bit } else { 0 };
    bit(to_address, met::TO_ADDRESS)
        | bit(to_node_port, met::TO_NODE_PORT)
        | bit(to_frontend, met::TO_FRONTEND)
        | bit(!egress && destination & listing::BACKEND != 0, met::TO_BACKEND)
        | bit(destination & listing::NODE != 0, met::TO_NODE)
        | bit(leaves, met::LEAVES)
        | bit(known, met::KNOWN)
        | bit(to_frontend || source & listing::NODE != 0, met::FROM_NODE)
        | bit(source & listing::BACKEND != 0, met::FROM_BACKEND)
        | bit(accelerated, met::ACCELERATED)
}

/// What the entry of the replies tells about a packet that leaves towards an endpoint: its flags that say how the packet was
/// translated as it came in; 0: it was not. It is asked first, since most clients keep their address, and then
/// nothing else is to be asked.
#[inline(always)]
fn translated_before<F: Family, T: Tables<F>>(key: &Tuple<F::Address>, tables: &T) -> u8 {
    match entry_of(&key.reversed(), tables) {
        Some((first, _)) => {
            first.flags & (flow::REPLY | flow::MASQUERADED | flow::HOST | flow::HAIRPIN | flow::SOURCE)
        }
        None => 0,
    }
}

/// Whether a packet opens a flow. At an address of the node, whose stack and netfilter have connections of their own there,
/// nothing else is taken for a client's.
#[inline(always)]
fn opens<F: Family>(headers: &Headers<F>) -> bool {
    headers.tuple.protocol == protocol::UDP || is_opening(headers.tcp_flags)
}

/// Whether a datagram leaves from a port that is a node port: its answer would look like a client's question. Beside netfilter's
/// node ports it is an answer itself.
#[inline(always)]
fn asks_from_node_port<F: Family, T: Tables<F>>(headers: &Headers<F>, tables: &T) -> bool {
    headers.tuple.protocol == protocol::UDP
        && tables.is_node_port(headers.tuple.source_port)
        && matches!(tables.settings(), Some(settings) if settings.phase == phase::SERVE)
}

/// A packet without an entry that leaves for a backend: decides whether its source is to change, or is to be kept from it.
///
/// A client of a [masqueraded](crate::abi::flow::MASQUERADED) flow is shown as an address of the node. What leaves with
/// such an address already is this host's own or netfilter's: an entry that changes nothing keeps its tuple from our
/// clients, and its answer from being taken for a client's; where one of our clients has the tuple, its port changes.
#[inline(always)]
fn leaves_as_node<F: Family, T: Tables<F>>(
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
        // Of a flow of this host's own, or a reply, translated before; or a clash in the middle of a connection, whose port
        // cannot change.
        if first.flags & flow::HOST != 0 || first.flags & (flow::REPLY | flow::SOURCE) == 0 || !opens(headers)
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

/// Whether the entry of a tuple only [notes](leaves_as_node) that something other than a client of ours has it.
#[inline(always)]
fn is_noted<F: Family, T: Tables<F>>(tuple: &Tuple<F::Address>, tables: &T) -> bool {
    matches!(entry_of(tuple, tables), Some((entry, _)) if entry.flags & flow::SOURCE != 0)
}

/// Why a packet to a frontend that no entry is for is left to netfilter; [`None`]: it is not. A tuple that was ours (its flow has
/// ended, or its backend is gone) stays ours: the entry would meet the next packet.
#[inline(always)]
fn left_to_netfilter<F: Family, T: Tables<F>>(
    was_ours: bool,
    headers: &Headers<F>,
    tables: &T,
) -> Option<Reason> {
    let now = match tables.settings() {
        Some(settings) => settings.phase,
        None => return None,
    };
    if now == phase::SERVE || was_ours && !is_noted(&headers.tuple, tables) {
        return None;
    }
    let opens = headers.tuple.protocol != protocol::UDP && is_opening(headers.tcp_flags);
    if now & phase::IMPORTED != 0
        && let Some(bits) = tables.imported(&headers.tuple)
        && !(opens && bits & imported::CLOSING != 0)
    {
        return Some(Reason::NetfilterFlow);
    }
    match now & phase::MASK {
        phase::SERVE => None,
        phase::IMPORT if opens => None,
        _ => Some(Reason::NotTaken),
    }
}

/// A fragment behind its datagram's first one: goes the first one's way. It has no flags, opens nothing and changes nothing.
#[inline(always)]
fn later<F: Family, T: Tables<F>>(
    egress: bool,
    leaves: bool,
    to_address: bool,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    let told = match tables.datagram(&fragment::key(headers)) {
        Some(told) if fragment::is_fresh(told, tables.now()) => told,
        _ => {
            if headers.length <= fragment::HELD_LENGTH_MAX
                && fragment::is_kept(tables.datagram(&fragment::keeper()), tables.now())
                && matches!(tables.settings(), Some(settings) if settings.own_device != 0)
            {
                decision.set(Verdict::Hold, Reason::FragmentHeld);
            } else if to_address {
                decision.reason = Reason::Fragment;
            }
            return;
        }
    };
    decision.key.source_port = told.source_port;
    decision.key.destination_port = told.destination_port;
    let mut found = None;
    if leaves {
        decision.key.side = side::FAR;
        found = entry_of(&decision.key, tables);
        decision.key.side = side::NEAR;
    }
    if found.is_none() {
        found = entry_of(&decision.key, tables);
    }
    if let Some((entry, _)) = found {
        let verdict = verdict_along(entry.flags, egress);
        if verdict != Verdict::Pass {
            decision.flow = *entry;
            decision.set(verdict, reason_along(entry.flags));
        } else if decision.met & met::ACCELERATED != 0 && is_answer(entry.flags) {
            decision.verdict = Verdict::Around;
        }
    } else if egress && is_stray(headers, tables) {
        decision.set(Verdict::Drop, Reason::UnassignedAddress);
    } else if to_address {
        decision.reason = Reason::Fragment;
    }
}

/// The entry of a tuple, and whether nothing has proven its flow so far.
#[inline(always)]
fn entry_of<'t, F: Family, T: Tables<F>>(
    tuple: &Tuple<F::Address>,
    tables: &'t T,
) -> Option<(&'t Flow<F::Address>, bool)> {
    match tables.flow(tuple) {
        Some(entry) => Some((entry, false)),
        None => tables.embryonic(tuple).map(|entry| (entry, true)),
    }
}

/// Whether a packet leaves this node for an address that Services may have, and none has.
#[inline(always)]
fn is_stray<F: Family, T: Tables<F>>(headers: &Headers<F>, tables: &T) -> bool {
    let bit = if F::VERSION == 4 { networks::SERVICES_V4 } else { networks::SERVICES_V6 };
    let Some(settings) = tables.settings() else { return false };
    if settings.networks & bit == 0
        || settings.phase & phase::MASK != phase::SERVE
        || headers.kind == Kind::IcmpError
    {
        return false;
    }
    // Never at an edge: another proxy of this node may serve it.
    let Some(here) = tables.here() else { return false };
    if here.role != device::UPLINK && here.role != device::FABRIC && here.role != device::OWN {
        return false;
    }
    let Some(networks) = tables.networks() else { return false };
    policy::is_within::<F>(&networks.services, &headers.tuple.destination)
}

/// The second step, for the first packet of a flow: a backend, the client's source, a source port.
#[inline(always)]
pub fn open_into<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    if decision.step != Step::Claim {
        open(hook == Hook::Egress, headers, tables, decision);
    }
    if decision.step == Step::Claim {
        claim(tables, decision);
    }
    accelerate(decision);
}

/// Takes back what a packet of a foreign source must not do, where a decision [asks for the source](Decision::asks_source): it
/// goes along what there is, and changes nothing. What opens a flow opens one beside those of whoever has its address.
#[inline(always)]
pub fn disown<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    decision.is_foreign = true;
    if decision.step == Step::Select {
        // One that its owner would leave for another backend.
        if let Some((entry, _)) = entry_of(&headers.tuple, tables) {
            decision.flow = *entry;
            decision.set(verdict_along(entry.flags, hook == Hook::Egress), reason_along(entry.flags));
            decision.step = Step::Done;
        }
        return;
    }
    if matches!(decision.reason, Reason::ReplyRecovered | Reason::DirectRemapped)
        && decision.record != Record::Nothing
    {
        // To the backend's own address, as without us.
        decision.key = headers.tuple;
        decision.flow = Decision::<F>::pass(&headers.tuple).flow;
        decision.set(Verdict::Pass, Reason::Stranger);
        decision.step = Step::Done;
    }
    decision.record = Record::Nothing;
    decision.affinity = false;
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
    } else if flags & flow::SOURCE != 0 {
        // The client's side: turned round.
        if reply == egress { Verdict::Pass } else { Verdict::Translate }
    } else if reply {
        match (host, egress) {
            (true, false) => Verdict::HandIn,
            (false, true) if flags & flow::AWAY != 0 => Verdict::Route,
            (false, true) => Verdict::Translate,
            (true, true) | (false, false) => Verdict::Pass,
        }
    } else if !egress {
        Verdict::Translate
    } else if flags & flow::DIRECT != 0 {
        // It counts where the client's packet comes in: what leaves with its tuple is the other flow's.
        Verdict::Pass
    } else {
        Verdict::Route
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
        if decision.met & met::ACCELERATED != 0 && is_answer(flags) {
            decision.verdict = Verdict::Around;
        }
        return true;
    }
    if headers.kind == Kind::IcmpError {
        decision.flow = *entry;
        decision.set(verdict, if flags & flow::SOURCE == 0 { Reason::IcmpError } else { Reason::Stranger });
        return true;
    }
    let now = tables.now();
    let is_udp = headers.tuple.protocol == protocol::UDP;
    let state = if is_udp {
        if !reply && !serves(entry, tables)
            || flags & (flow::SOURCE | flow::DIRECT) == flow::SOURCE | flow::DIRECT
                && now.wrapping_sub(entry.seen) > UDP_IDLE_TICKS
        {
            return false;
        }
        if reply { entry.state | state::ESTABLISHED } else { entry.state }
    } else if reply {
        if entry.state & (state::GUESS | state::MATCHED) == state::GUESS
            && (headers.tcp_flags & tcp::ACK == 0 || headers.acknowledgment != entry.replied)
        {
            // A connection that knows nothing of the guess.
            return true;
        }
        said_by_endpoint(entry.state, headers)
    } else {
        if entry.state & (state::GUESS | state::MATCHED) == state::GUESS
            || is_opening(headers.tcp_flags)
                && (state::has_ended(entry.state)
                    || (embryonic || now.wrapping_sub(entry.replied) >= SILENT_TICKS)
                        && !serves(entry, tables))
        {
            return false;
        }
        said_by_client(entry, headers)
    };
    let proves = if is_udp {
        entry.state & state::ESTABLISHED != 0 && now.wrapping_sub(entry.seen) >= STREAM_TICKS
    } else {
        state & (state::ESTABLISHED | state::GUESS) == state::ESTABLISHED && !state::has_ended(state)
    };
    decision.flow = *entry;
    decision.flow.state = state;
    decision.flow.seen = now;
    decision.takes_back = entry.state & !state != 0;
    let renewed = if reply && !embryonic { entry.replied } else { entry.seen };
    if state & state::ANSWERED != 0 {
        if reply && headers.tcp_flags & tcp::SYN != 0 {
            decision.flow.replied = headers.sequence.wrapping_add(1);
        }
    } else if state & state::GUESS == 0 {
        if reply || entry.state & state::ANSWERED != 0 {
            decision.flow.replied = now;
        } else if entry.state & state::GUESS != 0 {
            // It was a number to be acknowledged.
            decision.flow.replied = 0;
        }
    }
    let is_numbered_anew = state & state::ANSWERED != 0 && decision.flow.replied != entry.replied;
    decision.record = if embryonic && proves {
        Record::Promote
    } else if !embryonic && state::has_ended(state) {
        Record::Demote
    } else if state == entry.state && now.wrapping_sub(renewed) < RENEW_TICKS && !is_numbered_anew {
        Record::Nothing
    } else if embryonic {
        Record::RenewEmbryonic
    } else {
        Record::Renew
    };
    if state & !entry.state & state::ESTABLISHED != 0 && flags & flow::SOURCE == 0 {
        select::proven(decision, tables);
    }
    // Who knows the endpoint's number needs no other proof of who it is.
    let is_known = !reply && state & !entry.state & state::ESTABLISHED != 0;
    decision.asks_source =
        !is_known && (state != entry.state || is_numbered_anew || decision.record == Record::Promote);
    decision.set(verdict, reason_along(flags));
    true
}

/// Whether a segment opens a connection.
#[inline(always)]
fn is_opening(tcp_flags: u8) -> bool {
    tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN
}

/// The state of a flow after a segment of its endpoint.
#[inline(always)]
fn said_by_endpoint<F: Family>(before: u8, headers: &Headers<F>) -> u8 {
    let tcp_flags = headers.tcp_flags;
    if tcp_flags & tcp::RST != 0 {
        return before | state::RESET_REPLY;
    }
    if before & state::GUESS != 0 {
        return before | state::MATCHED;
    }
    if tcp_flags & tcp::SYN != 0 && !state::has_ended(before) {
        // It has accepted a new connection of the same client, who will acknowledge that.
        let is_numbered = headers.tuple.protocol == protocol::TCP && before & state::ESTABLISHED == 0;
        return before & !state::CLOSING | if is_numbered { state::ANSWERED } else { 0 };
    }
    let fin = if tcp_flags & tcp::FIN != 0 { state::FIN_REPLY } else { 0 };
    if state::has_ended(before) {
        return before | fin;
    }
    // It goes on: the client's reset was none.
    before & !(state::RESET_FORWARD | state::ANSWERED) | state::ESTABLISHED | fin
}

/// The state of a flow after a segment of its client, which anybody can forge.
#[inline(always)]
fn said_by_client<F: Family>(entry: &Flow<F::Address>, headers: &Headers<F>) -> u8 {
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
    // The client knows the connection: a guess that the endpoint has confirmed was right.
    before & !(state::GUESS | state::MATCHED) | fin
}

/// Why a packet along an entry is translated. What happens on the client's side is counted on the backend's.
#[inline(always)]
fn reason_along(flags: u8) -> Reason {
    if flags & flow::SOURCE != 0 {
        Reason::Stranger
    } else if flags & flow::DIRECT != 0 {
        Reason::DirectRemapped
    } else if flags & flow::REPLY != 0 {
        Reason::Reply
    } else {
        Reason::Forward
    }
}

/// Whether the backend of a flow still takes traffic.
#[inline(always)]
fn serves<F: Family, T: Tables<F>>(flow: &Flow<F::Address>, tables: &T) -> bool {
    if flow.flags & (flow::DIRECT | flow::SOURCE) != 0 {
        return true;
    }
    match tables.backend(flow.backend) {
        Some(backend) => backend.generation == flow.generation && backend.flags & backend::SERVING != 0,
        None => false,
    }
}

/// The first packet of a flow, or one whose entry was lost.
#[inline(always)]
fn open<F: Family, T: Tables<F>>(egress: bool, headers: &Headers<F>, tables: &T, decision: &mut Decision<F>) {
    if decision.flow.flags & flow::SOURCE != 0 {
        open_source(tables, decision);
        return;
    }
    let key = &headers.tuple;
    let service_port = decision.flow.service_port;
    decision.step = Step::Done;
    let Some(port) = tables.port(service_port) else { return };
    let is_local = egress || policy::is_local_pod(&key.source, tables);
    let class = policy::class(decision.kind, is_local);
    if decision.kind == frontend::LOAD_BALANCER
        && port.flags & crate::abi::policy::SOURCE_RANGES != 0
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
            reject(headers, Reason::NoBackendReset, Reason::NoBackendUnreachable, decision);
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
        reject(headers, Reason::NoBackendReset, Reason::NoBackendUnreachable, decision);
        return;
    };
    let hairpin = backend.address == key.source || egress && backend.flags & backend::HOST != 0;
    decision.flow.source = key.source;
    decision.flow.destination = backend.address;
    decision.flow.destination_port = backend.port;
    decision.flow.backend = id;
    decision.flow.generation = backend.generation;
    decision.flow.seen = tables.now();
    decision.flow.flags = if egress { flow::HOST } else { 0 }
        | if hairpin { flow::HAIRPIN } else { 0 }
        | if backend.flags & backend::LOCAL != 0 { flow::LOCAL } else { 0 };
    if hairpin {
        // Its client is shown to itself as the VIP, so that its answers come back here. A VIP of this host's own would be
        // answered from itself by a socket that names no source: there client and server have the backend's address.
        decision.flow.source = if egress && policy::is_loopback_device::<F, T>(tables) {
            backend.address
        } else {
            key.destination
        };
    } else if !keeps_source(egress, is_local, class, port.flags, backend.flags, tables, decision) {
        return;
    }
    let verdict = match (hairpin, egress) {
        (true, true) => Verdict::HandIn,
        (true, false) => Verdict::TurnBack,
        (false, true) => Verdict::Route,
        (false, false) => Verdict::Translate,
    };
    let tcp_flags = headers.tcp_flags;
    if key.protocol != protocol::UDP && tcp_flags & (tcp::SYN | tcp::ACK) != tcp::SYN {
        decision.set(verdict, Reason::Recovered);
        if tcp_flags & tcp::RST == 0 && !decision.is_foreign {
            decision.record = Record::Establish;
        }
        // Else it is the last packet there will be, or not its client's: nothing to record, but its port is as it was.
    } else {
        decision.set(verdict, Reason::Forward);
        decision.record = Record::Open;
    }
    decision.step = Step::Claim;
}

/// Opens the client's side of a flow, where the packet leaves for the backend: an address of the node, and a port.
#[inline(always)]
fn open_source<F: Family, T: Tables<F>>(tables: &T, decision: &mut Decision<F>) {
    decision.step = Step::Done;
    if decision.flow.flags & flow::DIRECT == 0 {
        let address = match tables.here() {
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
    decision.step = Step::Claim;
}

/// Decides whether the client keeps its source, and masquerades it if not. False: the decision waits, or the packet is dropped.
#[inline(always)]
fn keeps_source<F: Family, T: Tables<F>>(
    egress: bool,
    is_local_pod: bool,
    class: Class,
    policies: u32,
    backend_flags: u32,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    if egress {
        return keeps_source_of_host(backend_flags, tables, decision);
    }
    let Some(settings) = tables.settings() else { return false };
    let is_here = policy::is_edge::<F, T>(tables);
    let source = if backend_flags & backend::HOST != 0 {
        // Delivered on this node, to an address of the node itself: there is no other way back.
        Source::Kept
    } else {
        policy::source::<F>(settings, class, policies, is_local_pod, is_here)
    };
    if source == Source::Kept && (is_here || class == Class::Internal) {
        return true;
    }
    let Some(routes) = tables.routes() else {
        decision.step = Step::AskRoutes;
        return false;
    };
    // Its replies are translated where they leave.
    let has_way_back = is_here || tables.device(routes.to_client).is_some();
    if has_way_back && class != Class::Internal && !is_here && routes.to_client != tables.ifindex() {
        decision.flow.flags |= flow::AWAY;
    }
    let is_local = backend_flags & backend::LOCAL != 0;
    if source == Source::Kept || source == Source::KeptWithWayBack && is_local && has_way_back {
        return true;
    }
    let has_address = match tables.device(routes.to_backend) {
        Some(device) => F::masquerade(device) != F::Address::default(),
        // A bridge, which the backend is a port of.
        None => is_local,
    };
    if !has_way_back || !has_address {
        decision.set(Verdict::Drop, Reason::NoRoute);
        return false;
    }
    decision.flow.flags |= flow::MASQUERADED;
    true
}

/// As [`keeps_source`], for a process of this host: it has the address that the route to its backend gives it.
#[inline(always)]
fn keeps_source_of_host<F: Family, T: Tables<F>>(
    backend_flags: u32,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    // Nobody else may see a loopback address: such a client is shown as the node, wherever its backend is.
    let is_loopback = F::is_loopback(&decision.flow.source);
    if backend_flags & backend::HOST != 0 || backend_flags & backend::LOCAL != 0 && !is_loopback {
        return true;
    }
    let Some(routes) = tables.routes() else {
        decision.step = Step::AskRoutes;
        return false;
    };
    let leaves_by = match tables.device(routes.to_backend) {
        None if is_loopback => tables.here(),
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
        // Else not by a device of ours: as the host itself would send it.
        return !is_loopback;
    }
    if address != decision.flow.source {
        decision.flow.source = address;
        decision.flow.flags |= flow::MASQUERADED;
    }
    true
}

/// Whether the client's address becomes one that this host's own sockets have: their direct connections to the same backend know
/// nothing of the flow, so it takes a port that the host picks for none.
#[inline(always)]
pub fn is_beside_sockets<A: Copy + Eq>(flow: &Flow<A>) -> bool {
    let flags = flow.flags;
    flags & flow::DIRECT == 0
        && (flags & flow::HAIRPIN == 0 && flags & (flow::SOURCE | flow::HOST) != 0
            || flow.source == flow.destination)
}

/// Whether a direct connection keeps its port: the socket that has it is its own.
#[inline(always)]
pub fn keeps_direct<F: Family>(decision: &Decision<F>) -> bool {
    decision.flow.flags & flow::DIRECT != 0 && decision.flow.source_port == decision.key.source_port
}

/// Finds a source port with which the new flow's reply tuple is free: the packet's own first, but for a client that gets or has this
/// host's address, whose port follows from its tuple.
#[inline(always)]
fn claim<F: Family, T: Tables<F>>(tables: &T, decision: &mut Decision<F>) {
    let hash = maglev::hash::<F>(&decision.key);
    // Whoever has the address that a foreign source takes may have a direct connection from the port.
    let takes_another = decision.is_foreign && decision.record == Record::Open;
    let keeps = !is_beside_sockets(&decision.flow) && !takes_another;
    let first = tables.passed_over().wrapping_add(u32::from(!keeps));
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
    decision.step = Step::Search;
}

/// The last step: walks all source ports there are. Without a free one the client is refused.
pub fn search<F: Family, T: Tables<F>>(tables: &T, decision: &mut Decision<F>) {
    let start = search_start::<F>(decision);
    let mut ports = (0..PORTS).map(|index| searched(start, index));
    let found = ports.find(|port| is_free(tables, decision, *port));
    searched_for(found, decision);
}

/// Where the walk over all source ports begins.
#[inline(always)]
pub fn search_start<F: Family>(decision: &Decision<F>) -> u32 {
    maglev::scale(maglev::hash::<F>(&decision.key), PORTS)
}

/// The port that is tried in the walk's step `index`, below [`PORTS`].
#[inline(always)]
pub fn searched(start: u32, index: u32) -> u16 {
    let at = start.wrapping_add(index);
    port_at(if at < PORTS { at } else { at.wrapping_sub(PORTS) })
}

/// Ends the walk.
#[inline(always)]
pub fn searched_for<F: Family>(found: Option<u16>, decision: &mut Decision<F>) {
    decision.step = Step::Done;
    if let Some(port) = found {
        decision.flow.source_port = port;
    } else {
        // Told at once: a client that waits for nothing is worse off than one that can try elsewhere.
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

/// Source ports that are given to clients, first and last of each range: outside the usual ephemeral range, so that
/// they meet no port that a client or this host picks itself.
pub const PORT_RANGES: [(u16, u16); 2] = [(1_024, 29_999), (61_000, 65_535)];
/// How many ports they are.
pub const PORTS: u32 = LOW + ports_in(PORT_RANGES[1]);
const LOW: u32 = ports_in(PORT_RANGES[0]);

const fn ports_in((first, last): (u16, u16)) -> u32 {
    (last as u32).saturating_sub(first as u32).saturating_add(1)
}

/// The port of an index below [`PORTS`].
#[inline(always)]
fn port_at(index: u32) -> u16 {
    let [low, high] = PORT_RANGES;
    if index < LOW {
        low.0.wrapping_add(index as u16)
    } else {
        high.0.wrapping_add(index.wrapping_sub(LOW) as u16)
    }
}

/// Whether a port is one of [`PORT_RANGES`].
#[inline(always)]
fn is_given(port: u16) -> bool {
    let [low, high] = PORT_RANGES;
    port >= low.0 && port <= low.1 || port >= high.0
}

/// Whether the reply tuple of a new flow is free for it when it has this source port.
#[inline(always)]
pub fn is_free<F: Family, T: Tables<F>>(tables: &T, decision: &Decision<F>, source_port: u16) -> bool {
    let key = &decision.key;
    let mut reply = partner_key::<F>(&decision.flow, key.protocol);
    reply.destination_port = source_port;
    if matches!(tables.settings(), Some(settings) if settings.phase & phase::IMPORTED != 0)
        && tables.imported(&reply).is_some()
    {
        return false;
    }
    let (entry, embryonic) = match tables.flow(&reply) {
        Some(entry) => (entry, false),
        None => match tables.embryonic(&reply) {
            Some(entry) => (entry, true),
            None => return true,
        },
    };
    leads_back::<F>(entry, key) || gives_way(entry, embryonic, key.protocol, decision.record, tables.now())
}

/// Whether an entry no longer keeps its tuple from a flow that is recorded like this.
#[inline(always)]
pub fn gives_way<A: Copy>(
    entry: &Flow<A>,
    embryonic: bool,
    protocol_number: u8,
    record: Record,
    now: u32,
) -> bool {
    let idle = now.wrapping_sub(entry.seen);
    if protocol_number == protocol::UDP {
        return idle > UDP_IDLE_TICKS;
    }
    let unproven = embryonic && entry.state & state::ESTABLISHED == 0;
    if unproven {
        // Refused by the endpoint, or a guess: that gives way to what a client itself says in the middle of a connection.
        entry.state & state::RESET_REPLY != 0
            || entry.state & state::GUESS != 0 && record == Record::Establish
            || idle > UNPROVEN_TICKS
    } else if embryonic {
        idle > CLOSING_TICKS
    } else if entry.state & state::CLOSING != 0 {
        idle > HALF_CLOSED_TICKS
    } else {
        idle > IDLE_TICKS
    }
}

/// A packet that is to be answered: a reset for TCP, else ICMP port unreachable.
#[inline(always)]
fn reject<F: Family>(headers: &Headers<F>, reset: Reason, unreachable: Reason, decision: &mut Decision<F>) {
    if headers.tuple.protocol != protocol::TCP {
        decision.set(Verdict::Unreachable, unreachable);
    } else if headers.tcp_flags & tcp::RST == 0 {
        decision.set(Verdict::Reset, reset);
    } else {
        // A reset is never answered (RFC 9293, 3.10.7.1).
        decision.set(Verdict::Drop, Reason::NoBackendDropped);
    }
}

/// A packet that goes to a backend's own address.
#[inline(always)]
fn direct<F: Family, T: Tables<F>>(headers: &Headers<F>, tables: &T, decision: &mut Decision<F>) {
    let key = &headers.tuple;
    // A bridge's ports may have translated it before: there it is no direct packet.
    if !opens(headers) || matches!(tables.here(), Some(here) if here.flags & device_flags::BRIDGE != 0) {
        return;
    }
    // A flow that has ended clashes too: its entry still translates what the backend sends to this tuple. Where it
    // no longer keeps the tuple from others, the direct connection's own entry, which changes nothing, replaces it.
    // So does another direct connection that was given this one's port.
    let clashes = match entry_of(&key.reversed(), tables) {
        Some((entry, _)) => {
            entry.flags & (flow::REPLY | flow::HAIRPIN | flow::HOST | flow::SOURCE) == flow::REPLY
        }
        // What is left of an earlier connection must not translate this one.
        None => decision.met & met::HAD_ENTRY != 0,
    };
    if !clashes {
        return;
    }
    decision.flow.seen = tables.now();
    decision.flow.flags = flow::DIRECT;
    decision.set(Verdict::Translate, Reason::DirectRemapped);
    decision.record = Record::Open;
    decision.step = Step::Claim;
    decision.asks_source = true;
}

/// Whether a packet is what a client sends when a segment arrives for a connection that it does not know: a reset
/// without acknowledgment.
#[inline(always)]
fn is_bare_reset<F: Family>(headers: &Headers<F>) -> bool {
    headers.kind == Kind::Transport
        && headers.tuple.protocol != protocol::UDP
        && headers.tcp_flags & (tcp::RST | tcp::ACK | tcp::SYN) == tcp::RST
}

/// A bare reset: true when it only shows that a reply's entry was lost, and a new one is to be tried.
///
/// To a backend's own address it is sent by a client that does not know the connection, or by
/// one that got a reply untranslated because its entry was lost: then a frontend leads to this
/// endpoint, and either the forward entry still leads here or this client's slot does. In that
/// case the reset is dropped and the entries are made again; the backend sends the segment once
/// more. What a slot says is a guess: several frontends may lead to the endpoint, or the
/// connection may be a direct one after all, and the reset forged. So a guess translates nothing
/// but what the reset answers: the endpoint's segment whose acknowledgment number is the reset's
/// sequence number (RFC 9293, 3.10.7.1). When the client resets that too, the next frontend is
/// tried, and after the last the reset goes on to the backend. Where the client's connections are translated at the
/// socket as a rule, a reset is most likely about one that is direct on the wire, and there is no
/// guessing.
#[inline(always)]
fn is_unknown_connection<F: Family, T: Tables<F>>(
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
        Some(entry) if entry.state & state::MATCHED != 0 && entry.flags & flow::REPLY == 0 => {
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
    // An established entry is proof, a slot is a guess: all entries are asked before any slot.
    for origin in &origins.frontends {
        if origin.port == 0 {
            break;
        }
        decision.key.destination = origin.address;
        decision.key.destination_port = origin.port;
        if let Some(entry) = tables.flow(&decision.key)
            && entry.state & state::CLOSING == 0
            && leads_to(entry, &decision.flow)
        {
            decision.flow = *entry;
            decision.flow.seen = tables.now();
            decision.set(Verdict::Drop, Reason::ReplyRecovered);
            decision.record = Record::Establish;
            decision.asks_source = true;
            return true;
        }
    }
    let mut is_next = !is_wrong_guess;
    for origin in &origins.frontends {
        if origin.port == 0 || packet.protocol == protocol::TCP && tables.translated_at_socket() {
            break;
        }
        if !is_next {
            is_next = origin.address == packet.destination && origin.port == packet.destination_port;
            continue;
        }
        decision.key.destination = origin.address;
        decision.key.destination_port = origin.port;
        if tables.flow(&decision.key).is_none()
            && tables.embryonic(&decision.key).is_none()
            && guess(headers.sequence, tables, decision)
        {
            decision.set(Verdict::Drop, Reason::ReplyRecovered);
            decision.record = Record::Establish;
            decision.asks_source = true;
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

/// Whether an entry was used as lately as a flow, or within the tick before. Ticks wrap, and another CPU's may be ahead.
#[inline(always)]
pub fn is_as_fresh<A: Copy>(entry: &Flow<A>, flow: &Flow<A>) -> bool {
    flow.seen.wrapping_sub(entry.seen).cast_signed() <= 1
}

/// Makes the entries of a connection again if the slot of the decision's key leads to where the flow goes.
#[inline(always)]
fn guess<F: Family, T: Tables<F>>(sequence: u32, tables: &T, decision: &mut Decision<F>) -> bool {
    // Only what is known for certain is made again beside netfilter, whose connections look just the same.
    match tables.settings() {
        Some(settings) if settings.phase == phase::SERVE => {}
        Some(settings)
            if settings.phase & phase::MASK == phase::SERVE && tables.imported(&decision.key).is_none() => {}
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
        // Where the guess is wrong, a client out there may have no way back to this address.
        return false;
    }
    let service_port = service.service_port;
    let class = policy::class(service.kind, is_local);
    let Some(range) = tables.range(service_port, class) else { return false };
    let Some((id, backend)) = select::by_tuple(&decision.key, range, tables) else { return false };
    if backend.address != decision.flow.destination || backend.port != decision.flow.destination_port {
        return false;
    }
    decision.flow.backend = id;
    decision.flow.service_port = service_port;
    decision.flow.generation = backend.generation;
    decision.flow.seen = tables.now();
    decision.flow.replied = sequence;
    decision.flow.state = state::GUESS;
    decision.flow.flags = if backend.flags & backend::LOCAL != 0 { flow::LOCAL } else { 0 };
    true
}

/// Takes the cost of one ICMP error from a client's bucket; false when there is not enough credit.
#[inline(always)]
pub fn spend(bucket: Option<RejectBucket>, now_ms: u32) -> (RejectBucket, bool) {
    spend_of(bucket, now_ms, REJECT_COST_MS, REJECT_BURST_MS)
}

/// As [`spend`], from the bucket of the device by which the error leaves: each has its own, so that a flood by one, from
/// whatever forged sources, takes nothing from the clients of another.
#[inline(always)]
pub fn spend_by_device(bucket: Option<RejectBucket>, now_ms: u32) -> (RejectBucket, bool) {
    spend_of(bucket, now_ms, DEVICE_REJECT_COST_MS, DEVICE_REJECT_BURST_MS)
}

#[inline(always)]
fn spend_of(bucket: Option<RejectBucket>, now_ms: u32, cost_ms: u32, burst_ms: u32) -> (RejectBucket, bool) {
    let credit = match bucket {
        Some(bucket) => {
            let refill = now_ms.wrapping_sub(bucket.refilled_ms).min(burst_ms);
            bucket.credit_ms.wrapping_add(refill).min(burst_ms)
        }
        None => burst_ms,
    };
    let allowed = credit >= cost_ms;
    let credit_ms = if allowed { credit.wrapping_sub(cost_ms) } else { credit };
    (RejectBucket { refilled_ms: now_ms, credit_ms }, allowed)
}

/// The key of a device's bucket among the clients': no source address, which is never multicast, looks like it.
#[inline(always)]
pub fn device_reject_key(ifindex: u32) -> RejectKey {
    let [a, b, c, d] = ifindex.to_be_bytes();
    let ones = 0xff;
    RejectKey {
        address: [ones, ones, ones, ones, ones, ones, ones, ones, ones, ones, ones, ones, a, b, c, d],
    }
}
