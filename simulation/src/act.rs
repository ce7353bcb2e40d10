//! What an adapter does with a packet at a hook: has it decided about, recorded, rewritten and
//! counted.

use sluice_common::engine::count::{Along, Count};
use sluice_common::engine::limit;
use sluice_common::engine::open::{Refusal, open};
use sluice_common::packet::answer::{self, QUOTE, Trouble};
use sluice_common::packet::header::TcpHeader;
use sluice_common::packet::parse::{self, Headers, Kind};
use sluice_common::packet::rewrite::{Edit, rewrite};
use sluice_common::path::{self, Decision, Hook, Step, Verdict, policy};
use sluice_common::{Packet as _, Reason, V4, V6};

use crate::node::{Node, Side};
use crate::packet::{By, Packet};
use crate::view::{Opening, View, spoil};
use crate::world::World;

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It goes on.
    Next,
    /// It is dropped.
    Drop,
    /// It, or the answer that it has become, leaves by a device.
    Send(u32),
}

/// How a packet was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// Not at all.
    No,
    /// At a backend, to it.
    Forward,
    /// At a backend, from it.
    Reply,
    /// By a reason.
    Reason(Reason),
}

/// Where a packet is met.
#[derive(Clone, Copy, Debug)]
pub struct Met {
    /// The side.
    pub hook: Hook,
    /// The device.
    pub ifindex: u32,
    /// The device by which it came in; 0: the node's own.
    pub came_by: u32,
    /// How many other programs are at work.
    pub depth: u32,
}

/// Runs the program of a device on a packet.
pub fn run(world: &World, node: &Node, met: Met, packet: &mut Packet) -> (End, Counted) {
    node.maps.at_work.set(node.maps.at_work.get() + 1);
    let result = if packet.is_v6() {
        run_family::<V6>(world, node, met, packet)
    } else {
        run_family::<V4>(world, node, met, packet)
    };
    node.maps.at_work.set(node.maps.at_work.get() - 1);
    result
}

fn run_family<F: Side>(
    world: &World,
    node: &Node,
    met: Met,
    packet: &mut Packet,
) -> (End, Counted) {
    let Some(headers) = parse::headers::<F, _>(packet, 0) else { return (End::Next, Counted::No) };
    let asked = (F::ip(headers.tuple.destination), headers.tuple.destination_port).into();
    let mut view = View::<F>::new(world, node, met.ifindex, packet.tag, asked, met.depth);
    let mut decision = Decision::pass(&headers.tuple);
    path::decide_into(met.hook, &headers, &view, &mut decision);
    spoil(world.fault, &headers, &mut decision, &view);
    if decision.verdict == Verdict::Pass && decision.step == Step::Done {
        view.note(&headers, &decision);
        return (End::Next, count(&decision));
    }
    if decision.asks_source && is_foreign(node, met, &headers, &view) {
        path::disown(met.hook, &headers, &view, &mut decision);
    }
    let refusal = if decision.step == Step::Done {
        view.record(&mut decision)
    } else {
        open(&mut Opening {
            view: &mut view,
            hook: met.hook,
            headers: &headers,
            decision: &mut decision,
        })
    };
    view.note(&headers, &decision);
    let end = apply(world, node, met, packet, &headers, &mut decision, refusal);
    (end, count(&decision))
}

fn is_foreign<F: Side>(node: &Node, met: Met, headers: &Headers<F>, view: &View<'_, F>) -> bool {
    let egress = met.hook == Hook::Egress;
    let from = if egress { met.came_by } else { met.ifindex };
    let source = &headers.tuple.source;
    policy::is_foreign(egress, source, from, view, |_| node.route(F::ip(*source)).unwrap_or(0))
}

fn count<F: Side>(decision: &Decision<F>) -> Counted {
    match Count::of(decision) {
        Count::Nowhere => Counted::No,
        Count::Backend { along: Along::Forward { .. }, .. } => Counted::Forward,
        Count::Backend { along: Along::Reply, .. } => Counted::Reply,
        Count::Reason { reason, .. } => Counted::Reason(reason),
    }
}

/// Applies a decision; leaves in it the reason why the packet was dropped after all.
fn apply<F: Side>(
    world: &World,
    node: &Node,
    met: Met,
    packet: &mut Packet,
    headers: &Headers<F>,
    decision: &mut Decision<F>,
    refusal: Refusal,
) -> End {
    let ingress = met.hook == Hook::Ingress;
    match decision.verdict {
        Verdict::Pass | Verdict::Hold => return End::Next,
        Verdict::Drop => return End::Drop,
        Verdict::Reset => {
            let Some(segment) = packet.read::<TcpHeader>(headers.transport) else {
                return End::Drop;
            };
            let (network, reset) = answer::reset(headers, &segment);
            packet.bytes.truncate((headers.network + F::HEADER + 20) as usize);
            if !packet.store(headers.network, network)
                || !packet.store(headers.network + F::HEADER, reset)
            {
                return End::Drop;
            }
            packet.tag.by = By::Node;
            return answers(node, met, packet);
        }
        Verdict::Unreachable => {
            if !may_answer(world, node, met, headers) {
                decision.reason = Reason::RejectLimited;
                return End::Drop;
            }
            error(packet, headers, Trouble::PortUnreachable);
            return answers(node, met, packet);
        }
        Verdict::Translate
        | Verdict::Around
        | Verdict::TurnBack
        | Verdict::HandIn
        | Verdict::Route => {}
    }
    if let Some(reason) = refusal.reason() {
        decision.reason = reason;
        return End::Drop;
    }
    let target = node.route(F::ip(decision.flow.destination));
    if decision.verdict == Verdict::Route && target.is_none() {
        decision.reason = Reason::NoRoute;
        return End::Drop;
    }
    let bypasses =
        decision.verdict == Verdict::TurnBack || decision.verdict == Verdict::Route && ingress;
    if bypasses && !packet.forward() {
        decision.reason = Reason::TtlExceeded;
        if headers.kind != Kind::Transport || !may_answer(world, node, met, headers) {
            return End::Drop;
        }
        error(packet, headers, Trouble::TimeExceeded);
        return answers(node, met, packet);
    }
    if !decision.is_answer() && !rewrite(packet, headers, &decision.flow) {
        decision.reason = Reason::RewriteFailed;
        return End::Drop;
    }
    match (decision.verdict, target) {
        (Verdict::TurnBack, _) => End::Send(met.ifindex),
        (Verdict::Route, Some(device)) => End::Send(device),
        _ => End::Next,
    }
}

/// Where an answer goes: back where the packet came from.
fn answers(node: &Node, met: Met, packet: &Packet) -> End {
    if met.hook == Hook::Ingress {
        return End::Send(met.ifindex);
    }
    let (_, destination) = packet.addresses();
    node.route(destination).map_or(End::Drop, End::Send)
}

fn may_answer<F: Side>(world: &World, node: &Node, met: Met, headers: &Headers<F>) -> bool {
    let now = world.milliseconds();
    let mut buckets = node.rejects.borrow_mut();
    let client = F::reject_key(&headers.tuple.source);
    let (bucket, allowed) = limit::take_token(buckets.get(&client).copied(), now);
    let _ = buckets.insert(client, bucket);
    if !allowed {
        return false;
    }
    let device = limit::device_reject_key(met.ifindex);
    let (bucket, allowed) = limit::take_device_token(buckets.get(&device).copied(), now);
    let _ = buckets.insert(device, bucket);
    allowed
}

/// Writes an ICMP error over the packet.
fn error<F: Side>(packet: &mut Packet, headers: &Headers<F>, trouble: Trouble) {
    let start = headers.network as usize;
    let length = (headers.length.min(QUOTE) & !3) as usize;
    let quote = packet.bytes[start..start + length].to_vec();
    let sum = quote.chunks(2).map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]]))).sum();
    let (network, icmp) = answer::error(headers, trouble.code::<F>(), 0, length as u32, sum);
    packet.bytes.resize(start + F::HEADER as usize + 8 + length, 0);
    packet.bytes[start + F::HEADER as usize + 8..].copy_from_slice(&quote);
    let _ =
        packet.store(headers.network, network) && packet.store(headers.network + F::HEADER, icmp);
    packet.tag.by = By::Node;
}
