//! The packet's path: decides what happens to a packet, and why.
//!
//! [`decide`] reads headers and tables and returns a [`Decision`]: plain data that an adapter
//! applies once. The kernel and the host run the same code.
//!
//! # Where a packet is translated
//!
//! A packet from client to VIP is translated at the ingress of the device where it enters the node;
//! its reply is translated at the egress of the device where it leaves towards the client. In
//! between, the stack sees real addresses only:
//!
//! ```text
//!   client pod ──► edge ingress ──► routing, netfilter, CNI ──► edge egress ──► backend pod
//!               VIP → backend                                  (nothing to do)
//!   client pod ◄── edge egress  ◄── routing, netfilter, CNI ◄── edge ingress ◄── backend pod
//!               backend → VIP                                  (nothing to do)
//! ```
//!
//! A client that is *masqueraded*, that is, shown to the backend as an address of this node, is
//! translated twice, by two pairs of entries that know nothing of each other's addresses. The far
//! pair changes the client's side, outside of what the stack sees:
//!
//! ```text
//!   client ──► ingress ──► routing, netfilter, CNI ──► egress ──► backend
//!           VIP → backend                        client → node
//!   client ◄── egress  ◄── routing, netfilter, CNI ◄── ingress ◄── backend
//!           backend → VIP                        node → client
//! ```
//!
//! The egress learns from the near pair's reply entry that the source has to change.
//!
//! Three kinds of packets bypass the stack, which would drop them as martians:
//! - Packets of a client that is its own backend (*hairpin*). They are bounced back to where they
//!   came from, with the VIP as the peer's address, so that the client's answers come here again.
//! - Answers to packets for services without backends.
//! - Packets that this host's own sockets send to a VIP untranslated. They are translated where
//!   their route leaves and forwarded by the FIB; their replies are translated at ingress and
//!   injected on the device that the route to the VIP names.
//!
//! # Steps
//!
//! [`decide_into`] finishes every packet except the first of a flow in one step. A first packet
//! goes on to [`open_into`], which selects a backend and may have to wait for an answer of the FIB
//! ([`Step::LookUpRoutes`]) or for a longer search of a source port ([`Step::SearchPort`]).

mod entry;
pub mod facts;
pub mod fragment;
mod known;
mod netfilter;
mod open;
pub mod policy;
mod ports;
mod recover;
mod select;
pub mod socket;

use crate::abi::{Flow, Tuple, flow, side};
use crate::family::Family;
use crate::packet::parse::{Fragment, Headers, Kind};
use crate::packet::rewrite::can_follow;
use crate::reason::Reason;
use crate::tables::Tables;

pub use entry::{
    CLOSING_TICKS, HALF_CLOSED_TICKS, IDLE_TICKS, RENEW_TICKS, UDP_IDLE_TICKS, UNPROVEN_TICKS,
    gives_way, is_as_fresh, leads_back, leads_to, partner, partner_key,
};
use entry::{entry_of, entry_of_packet};
use facts::{Facts, classify, is_unassigned};
pub use known::{SILENT_TICKS, STREAM_TICKS, VAIN_TICKS};
use known::{flags_of_reply, follow_entry, reason_of_entry, verdict_of_entry};
use netfilter::left_to_netfilter;
pub use open::open_into;
use open::{Cause, opens, opens_far_pair, reject, remap_direct};
pub use ports::{
    PORT_RANGES, PORTS, REMAP_TRIES, finish_search, is_free, keeps_direct, port_of_step, search,
    search_start, uses_host_address, walk_ports,
};
use recover::{is_bare_reset, is_unknown_connection};
pub use select::find;

/// Bits of [`Tables::marks`]: what has happened at least once. While a bit is clear, the path can
/// skip the lookup that it stands for.
pub mod mark {
    /// A direct connection was remapped.
    pub const DIRECT: u32 = 1;
    /// Replies may come in to an address of this host: a packet of its own was translated at
    /// egress, or a pod called itself.
    pub const HOST: u32 = 2;
    /// A client was masqueraded.
    pub const MASQUERADED: u32 = 4;
}

/// The kind of hook that a packet passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Hook {
    /// tc ingress.
    Ingress,
    /// tc egress.
    Egress,
    /// XDP: decides as ingress does, but the adapter takes only what it can finish.
    Xdp,
}

impl Hook {
    /// Reports whether packets leave the node, or enter a pod, by the hook's device.
    #[inline(always)]
    #[must_use]
    pub const fn is_egress(self) -> bool {
        matches!(self, Self::Egress)
    }
}

/// The treatment of a packet by the adapter, after the rewrite if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// Leave it unchanged and let the next program see it.
    Pass,
    /// Rewrite it and let the next program see it.
    Translate,
    /// Rewrite it and send it back out of the device that it came from.
    Bounce,
    /// Rewrite it and inject it into the stack on the device that the route to the VIP names.
    Inject,
    /// Rewrite it and send it where the FIB says.
    Route,
    /// Rewrite it and send it where the FIB says if the stack would do no more than forward it;
    /// otherwise as [`Verdict::Translate`].
    Around,
    /// Answer with a TCP reset.
    Reset,
    /// Answer with ICMP port unreachable.
    Unreachable,
    /// Drop it.
    Drop,
    /// Hold it until its datagram's first fragment has been seen.
    Hold,
}

/// Changes to a flow's entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Record {
    /// Nothing.
    Nothing,
    /// A new flow, in `embryonic`: the partner if its tuple is free, then this entry.
    Open,
    /// A flow recovered in the middle of a connection: as `Open`, but in `flows` if the other half
    /// of the flow is still there.
    Establish,
    /// The flow is proven: both entries move from `embryonic` to `flows`.
    Promote,
    /// The flow has ended: both entries move from `flows` to `embryonic`.
    Demote,
    /// The time and state of both entries in `flows` are updated; a missing entry is made again.
    Renew,
    /// As `Renew`, in `embryonic`.
    RenewEmbryonic,
}

/// The next step of a decision that is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Nothing.
    Done,
    /// A backend of [`Flow::service_port`].
    Select,
    /// [`Tables::routes`]; then [`open_into`] once more.
    LookUpRoutes,
    /// A source port, allocated by [`open_into`].
    AllocatePort,
    /// A source port beyond the few that [`open_into`] tries: [`search`].
    SearchPort,
}

/// A decision about a packet, as plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Decision<F: Family> {
    /// The packet's treatment.
    pub verdict: Verdict,
    /// The reason for the verdict.
    pub reason: Reason,
    /// Changes to the flow's entries.
    pub record: Record,
    /// The next step, if the decision is not complete.
    pub step: Step,
    /// Whether the client's affinity to the backend is recorded, because the endpoint has answered.
    pub records_affinity: bool,
    /// Whether bits of the flow's state are cleared, not only added.
    pub clears_state: bool,
    /// Whether the packet alone changes what becomes of a flow, so that its source has to belong to
    /// the device that it came in by ([`policy::is_foreign`]).
    pub depends_on_source: bool,
    /// The client's [round](crate::abi::Affinity::round), where its affinity is recorded.
    pub round: u16,
    /// Whether the source does not belong to that device ([`restrict_foreign`]).
    pub is_foreign: bool,
    /// Whether the packet is a first fragment whose [ports](fragment::ports) are noted for the
    /// later ones.
    pub is_first_fragment: bool,
    /// The kind of the frontend, one of [`crate::abi::frontend`], if a backend is selected for the
    /// packet; otherwise 0 ([`Decision::selects`]).
    pub kind: u32,
    /// Facts about the packet's addresses.
    pub facts: Facts,
    /// The tuple that `flow` is recorded under: the packet's own, unless a lost entry is made
    /// again.
    pub key: Tuple<F::Address>,
    /// The translation. Its addresses and ports are the packet's after the rewrite.
    pub flow: Flow<F::Address>,
}

impl<F: Family> Decision<F> {
    /// Returns the decision to pass a packet of this tuple, which every decision starts as.
    #[inline(always)]
    #[must_use]
    pub fn pass(key: &Tuple<F::Address>) -> Self {
        Self {
            verdict: Verdict::Pass,
            reason: Reason::Stranger,
            record: Record::Nothing,
            step: Step::Done,
            records_affinity: false,
            clears_state: false,
            depends_on_source: false,
            is_foreign: false,
            round: 0,
            is_first_fragment: false,
            kind: 0,
            facts: Facts::default(),
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

    /// Reports whether a backend is selected for the packet. One that follows an entry, or concerns
    /// no frontend, gets none.
    #[inline(always)]
    #[must_use]
    pub fn selects(&self) -> bool {
        self.kind != 0
    }

    /// Reports whether the packet is an endpoint's that goes around the stack unchanged, because it
    /// is translated where it leaves.
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

/// Decides about a packet in one call, taking all steps.
#[inline(always)]
pub fn decide<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
) -> Decision<F> {
    let mut decision = Decision::pass(&headers.tuple);
    decide_into(hook, headers, tables, &mut decision);
    if decision.step != Step::Done {
        open_into(hook, headers, tables, &mut decision);
    }
    if decision.step == Step::SearchPort {
        search(tables, &mut decision);
    }
    decision
}

/// Takes the first step, which is the only one unless the packet opens a flow. The decision must be
/// one to [pass](Decision::pass).
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

/// Sends a packet that is translated at ingress around the stack if acceleration is on.
#[inline(always)]
fn accelerate<F: Family>(decision: &mut Decision<F>) {
    if decision.facts.is_accelerated()
        && decision.verdict == Verdict::Translate
        && !decision.flow.is_direct()
    {
        decision.verdict = Verdict::Around;
    }
}

/// Decides all that needs no new flow.
#[inline(always)]
fn decide_known<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    decision.facts = classify(hook, headers, tables);
    // Read back from memory behind the black box, the bits are unknown to the verifier: it goes on
    // once, not once for each way to them.
    let facts = core::hint::black_box(&*decision).facts;
    if !facts.may_be_known() && !facts.to_backend() {
        let _ = drop_unassigned(hook, headers, tables, decision);
        return;
    }
    if !is_readable(hook, headers, facts, tables, decision)
        || !hook.is_egress()
            && is_bare_reset(headers)
            && is_unknown_connection(headers, facts.to_backend(), tables, decision)
    {
        return;
    }
    let mut found = None;
    let (mut known, mut is_far) = (facts.may_be_known(), facts.is_far());
    if is_far {
        let from_node = facts.from_node();
        let before = flags_of_reply(&headers.tuple, tables);
        if before == flow::REPLY && !from_node {
            return;
        }
        if before == 0 && !from_node {
            // It belongs to a client that speaks to the endpoint directly, unless it is itself an
            // endpoint's reply.
            is_far = false;
            known = facts.from_backend();
        }
        if before & flow::MASQUERADED != 0 || from_node {
            found = entry_of_far_side(tables, decision);
        }
    }
    if found.is_none() && (known || tables.marks() & mark::DIRECT != 0) {
        found = entry_of_packet(&headers.tuple, tables);
    }
    if let Some((entry, is_embryonic)) = found {
        decision.facts.set_had_entry();
        if follow_entry(hook, headers, entry, is_embryonic, tables, decision) {
            return;
        }
        decision.key.side = side::NEAR;
    }
    if headers.kind == Kind::IcmpError
        || facts.to_frontend() && is_for_frontend(headers, facts, tables, decision)
        || is_far && opens_far_pair(headers, tables, decision)
        || drop_unassigned(hook, headers, tables, decision)
    {
        return;
    }
    if facts.to_backend() {
        remap_direct(headers, tables, decision);
    }
}

/// Drops a packet that leaves for an address of a Service network that no Service has. Reports
/// whether it is one. This comes after all else: backends are clients too, and an address stays
/// listed for a while after its Service is gone.
#[inline(always)]
fn drop_unassigned<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let is_unassigned = hook.is_egress() && is_unassigned(headers, tables);
    if is_unassigned {
        decision.set(Verdict::Drop, Reason::UnassignedAddress);
    }
    is_unassigned
}

/// Reports whether a packet has all headers that the path needs. What becomes of another one is
/// decided here.
#[inline(always)]
fn is_readable<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    facts: Facts,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let known = facts.may_be_known();
    match headers.kind {
        Kind::Transport | Kind::IcmpError => {}
        Kind::Fragment if known && fragment::is_transport(headers.tuple.protocol) => {
            fragment::follow_first(hook, headers, tables, decision);
            return false;
        }
        Kind::Fragment | Kind::Truncated | Kind::Malformed | Kind::Other => {
            if facts.to_address() {
                decision.reason = unreadable(headers.kind);
            }
            return false;
        }
    }
    if headers.fragment == Fragment::First && known {
        decision.is_first_fragment = true;
        if !can_follow(headers, &decision.flow) {
            if facts.to_address() {
                decision.reason = Reason::Fragment;
            }
            return false;
        }
    }
    true
}

/// Returns the entry that translates a packet's client, with whether it is embryonic. The
/// decision's key becomes that of the entry.
#[inline(always)]
fn entry_of_far_side<'t, F: Family, T: Tables<F>>(
    tables: &'t T,
    decision: &mut Decision<F>,
) -> Option<(&'t Flow<F::Address>, bool)> {
    decision.key.side = side::FAR;
    let found = entry_of_packet(&decision.key, tables);
    if found.is_none() {
        decision.key.side = side::NEAR;
    }
    found
}

/// Decides about a packet without an entry whose destination may be a frontend. Reports whether it
/// is one, or a ClusterIP.
#[inline(always)]
fn is_for_frontend<F: Family, T: Tables<F>>(
    headers: &Headers<F>,
    facts: Facts,
    tables: &T,
    decision: &mut Decision<F>,
) -> bool {
    let key = &headers.tuple;
    let (service_port, kind) = find(key, facts.to_node_port(), tables).unwrap_or_default();
    if kind == 0 && !(facts.to_address() && select::is_cluster_ip(key, tables)) {
        return false;
    }
    if facts.to_node() && !opens(headers) && tables.is_node_address(&key.destination) {
        // It belongs to a connection of the stack itself, or to one that netfilter knows.
        return true;
    }
    decision.flow.service_port = service_port;
    if let Some(reason) = left_to_netfilter(decision.facts.had_entry(), headers, tables) {
        decision.reason = reason;
    } else if kind != 0 {
        decision.kind = kind;
        decision.step = Step::Select;
        decision.depends_on_source = true;
    } else {
        reject(headers, Cause::UndefinedPort, decision);
    }
    true
}

/// Undoes what a packet with a foreign source must not do, where a decision [depends on the
/// source](Decision::depends_on_source). The packet follows existing entries and changes none of
/// them. If it opens a flow, the new one stands next to those of the address's owner.
#[inline(always)]
pub fn restrict_foreign<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    decision.is_foreign = true;
    if decision.step == Step::Select {
        // Its owner would leave this entry for another backend.
        if let Some((entry, _)) = entry_of(&headers.tuple, tables) {
            decision.flow = *entry;
            decision.set(verdict_of_entry(entry, hook), reason_of_entry(entry));
            decision.step = Step::Done;
        }
        return;
    }
    if matches!(decision.reason, Reason::ReplyRecovered | Reason::DirectRemapped)
        && decision.record != Record::Nothing
    {
        // It goes on to the backend's own address, as it would without Sluice.
        decision.key = headers.tuple;
        decision.flow = Decision::<F>::pass(&headers.tuple).flow;
        decision.set(Verdict::Pass, Reason::Stranger);
        decision.step = Step::Done;
    }
    decision.record = Record::Nothing;
    decision.records_affinity = false;
}

/// Returns why a packet for a service is passed untouched.
#[inline(always)]
fn unreadable(kind: Kind) -> Reason {
    match kind {
        Kind::Fragment => Reason::Fragment,
        Kind::Truncated => Reason::Truncated,
        Kind::Malformed => Reason::Malformed,
        Kind::Transport | Kind::IcmpError | Kind::Other => Reason::Stranger,
    }
}
