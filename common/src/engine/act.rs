//! Carries out what was decided about a packet.

use core::hint::black_box;

use crate::abi::{Flow, RejectKey, device_flags, flow};
use crate::event::Wide;
use crate::family::Family;
use crate::packet::answer::{self, Answer, IcmpError, QUOTE, Quoted};
use crate::packet::header::{EthernetHeader, TcpHeader, protocol};
use crate::packet::parse::{Headers, Kind, Packet, Parse};
use crate::packet::rewrite::{Edit, Resize, decrement_ttl};
use crate::path::fragment::{Label, label};
use crate::path::{Decision, Hook, Verdict};
use crate::reason::Reason;

use super::adapter::{
    Action, Adapter, Addressee, Arrival, ForwardQuery, LOOPBACK, RouteQuery, Target,
};
use super::limit::may_answer;
use super::open::Refusal;

/// The bits of a VLAN tag that hold the VLAN's number.
const VLAN: u16 = 0xfff;
/// Length of an Ethernet header, bytes.
const ETHERNET: u32 = 14;
/// IPv4's flag that forbids fragmentation, in the field of flags and fragment offset.
const DONT_FRAGMENT: u16 = 0x4000;

/// Reports whether a frame is not for this host to route, so that the stack would not route it
/// either. `is_edge`: it came in by an edge.
#[inline(always)]
#[must_use]
pub fn is_for_others(arrival: Arrival, is_edge: bool) -> bool {
    // A tag with a priority alone names no VLAN: the stack strips it and takes the frame for its
    // own.
    let is_tagged = matches!(arrival.tag, Some(tag) if tag & VLAN != 0);
    match arrival.to {
        Addressee::Many => true,
        // The device receives a frame for another host; only a bridge port passes such frames on to
        // the stack.
        Addressee::Other => is_tagged || !is_edge,
        // The stack does not take a pod's frame in a VLAN from this device.
        Addressee::Host => is_tagged && is_edge,
    }
}

/// Applies a decision, and sets the reason if the packet is dropped after all.
#[inline(always)]
pub fn apply<F: Answer + Wide, A: Adapter<F>>(
    adapter: &mut A,
    headers: &Headers<F>,
    decision: &Decision<F>,
    refusal: Refusal,
    reason: &mut Reason,
) -> Action {
    match decision.verdict {
        Verdict::Pass => Action::Next,
        Verdict::Drop => Action::Drop,
        Verdict::Hold => {
            let action = hold(adapter);
            if action == Action::Next {
                *reason = Reason::Fragment;
            }
            action
        }
        Verdict::Reset => {
            if reset(adapter, headers, reason) {
                send_answer(adapter)
            } else {
                Action::Drop
            }
        }
        Verdict::Unreachable => unreachable(adapter, headers, reason),
        Verdict::Translate
        | Verdict::Around
        | Verdict::Bounce
        | Verdict::Inject
        | Verdict::Route => match refusal.reason() {
            Some(refused) => {
                *reason = refused;
                Action::Drop
            }
            None => translate(adapter, headers, decision, reason),
        },
    }
}

/// Translates a packet, and sends it where the verdict says.
#[inline(always)]
fn translate<F: Answer + Wide, A: Adapter<F>>(
    adapter: &mut A,
    headers: &Headers<F>,
    decision: &Decision<F>,
    reason: &mut Reason,
) -> Action {
    let flow = &decision.flow;
    let mut way = Way::default();
    if decision.verdict == Verdict::Route {
        match find_way(adapter, headers, flow, reason) {
            Ok(found) => way = found,
            Err(action) => return action,
        }
    }
    // A bypass does what the stack would do. The stack itself does it where it fragments the
    // packet, and for what this host sends itself.
    let bypasses = decision.verdict == Verdict::Bounce
        || decision.verdict == Verdict::Route
            && adapter.hook() != Hook::Egress
            && way.fragments == 0;
    if bypasses && !decrement_ttl(adapter.frame_mut(), headers) {
        *reason = Reason::TtlExceeded;
        return if may_be_answered(adapter, headers) {
            error(adapter, headers, IcmpError::TimeExceeded, 0)
        } else {
            Action::Drop
        };
    }
    // An endpoint's packet is translated where it leaves.
    let is_answer = decision.is_answer();
    if !is_answer && !adapter.rewrite(headers, flow) {
        *reason = Reason::RewriteFailed;
        return Action::Drop;
    }
    // At egress the stack has already forwarded it.
    if decision.verdict == Verdict::Around && adapter.hook() != Hook::Egress {
        let action = around(adapter, headers, flow);
        if action == Action::Drop {
            *reason = Reason::RewriteFailed;
        }
        if action != Action::Next || is_answer {
            return action;
        }
    }
    let action = send(adapter, decision, way);
    if action == Action::Drop {
        *reason = Reason::RewriteFailed;
    }
    action
}

/// The devices that a packet leaves by; 0 is none.
#[derive(Clone, Copy, Default)]
struct Way {
    /// The device of its route.
    target: u32,
    /// Our own device, if the packet has to enter the stack to be fragmented.
    fragments: u32,
}

/// Returns the way of a packet that leaves by its route, or what becomes of one that cannot.
#[inline(always)]
fn find_way<F: Answer + Wide, A: Adapter<F>>(
    adapter: &mut A,
    headers: &Headers<F>,
    flow: &Flow<F::Address>,
    reason: &mut Reason,
) -> Result<Way, Action> {
    let mut way = Way::default();
    let query = RouteQuery {
        ifindex: LOOPBACK,
        fwmark: adapter.fwmark(),
        length: segment_length(adapter, headers),
    };
    let exceeded = match adapter.route(&flow.source, &flow.destination, &query) {
        Target::Device(device) => {
            way.target = device;
            exceeded_mtu(adapter, &flow.destination, device, query.length)
        }
        Target::TooBig(mtu) => Some(mtu),
        Target::None => {
            *reason = Reason::NoRoute;
            return Err(Action::Drop);
        }
    };
    let Some(mtu) = exceeded else { return Ok(way) };
    // An error is never answered with another one (RFC 1122, 3.2.2; RFC 4443, 2.4).
    let is_error = headers.kind == Kind::IcmpError;
    let is_answered = !is_error && forbids_fragments(adapter, headers.network);
    if !is_error && !is_answered {
        way.fragments = adapter.own_device();
    }
    if way.fragments != 0 {
        return Ok(way);
    }
    *reason = Reason::TooBig;
    Err(if is_answered { error(adapter, headers, IcmpError::TooBig, mtu) } else { Action::Drop })
}

/// Sends a packet that has been translated.
#[inline(always)]
fn send<F: Answer + Wide, A: Adapter<F>>(
    adapter: &mut A,
    decision: &Decision<F>,
    way: Way,
) -> Action {
    let flow = &decision.flow;
    match decision.verdict {
        Verdict::Translate | Verdict::Around => {
            adapter.set_translated();
            // A masqueraded client's packet is routed, so that its source can change where it
            // leaves.
            if adapter.link() != 0
                && adapter.hook() == Hook::Ingress
                && flow.flags & (flow::REPLY | flow::MASQUERADED) == 0
            {
                stay_on_bridge(adapter, &flow.source, &flow.destination);
            }
            Action::Next
        }
        Verdict::Bounce => bounce(adapter),
        Verdict::Inject => inject(adapter, &flow.destination, &flow.source),
        Verdict::Route if way.fragments != 0 => receive(adapter, way.fragments),
        Verdict::Route => {
            adapter.take_tags_off();
            if has_room_for_link(adapter) { Action::Forward(way.target) } else { Action::Drop }
        }
        Verdict::Pass | Verdict::Drop | Verdict::Reset | Verdict::Unreachable | Verdict::Hold => {
            Action::Next
        }
    }
}

/// Returns the device from which routing sees the packet come: the bridge, if the packet's device
/// is a port of one.
#[inline(always)]
pub fn routed_from<F: Family, A: Adapter<F>>(adapter: &A) -> u32 {
    let here = adapter.ifindex();
    match adapter.device(here) {
        _ if adapter.hook() == Hook::Egress => LOOPBACK,
        Some(device) if device.bridge != 0 => device.bridge,
        _ => here,
    }
}

/// Returns the length of a packet with its IP header, or that of a segment if the device will cut
/// it.
#[inline(always)]
fn segment_length<F: Family, A: Adapter<F>>(adapter: &A, headers: &Headers<F>) -> u32 {
    let size = adapter.segment_size();
    if size == 0 {
        return headers.length;
    }
    let transport = match adapter.frame().read::<TcpHeader>(headers.transport) {
        Some(segment) if headers.tuple.protocol == protocol::TCP => {
            u32::from(segment.offset >> 4).wrapping_mul(4)
        }
        _ => 8,
    };
    headers.transport.wrapping_sub(headers.network).wrapping_add(transport).wrapping_add(size)
}

/// Returns the MTU of a device, or of the route by it, if the packet, or a segment of it, exceeds
/// it.
#[inline(always)]
fn exceeded_mtu<F: Family, A: Adapter<F>>(
    adapter: &A,
    destination: &F::Address,
    target: u32,
    length: u32,
) -> Option<u32> {
    let of_route = adapter.route_mtu(destination, target);
    if of_route != 0 && length > of_route {
        return Some(of_route);
    }
    // The packet is compared with a length that includes the target's link header; ours may have
    // another length.
    let difference = match adapter.device(target) {
        Some(device) => i32::from(device.link_header).wrapping_sub(adapter.link().cast_signed()),
        None => 0,
    };
    adapter.exceeded_mtu(target, difference)
}

/// Reports whether a packet may be answered with "too big": it forbids fragmentation.
#[inline(always)]
fn forbids_fragments<F: Family, A: Adapter<F>>(adapter: &A, network: u32) -> bool {
    F::VERSION == 6
        || matches!(
            adapter.frame().read::<u16>(network.wrapping_add(6)),
            Some(field) if u16::from_be(field) & DONT_FRAGMENT != 0
        )
}

/// Sends a packet that has been translated, or will be where it leaves, where the FIB says, if the
/// stack would do no more than forward it. Returns [`Action::Next`] if the stack has to take it,
/// with all that it does for packets that it cannot forward.
///
/// The target's egress programs see the packet, ours among them, which does the translation that is
/// due there.
#[inline(always)]
pub fn around<F: Parse, A: Adapter<F>>(
    adapter: &mut A,
    headers: &Headers<F>,
    flow: &Flow<F::Address>,
) -> Action {
    let target = way_around(adapter, headers, flow);
    if target == 0 {
        return Action::Next;
    }
    if decrement_ttl(adapter.frame_mut(), headers) && has_room_for_link(adapter) {
        Action::ForwardTo(target)
    } else {
        Action::Drop
    }
}

/// Returns the device by which the stack would forward the packet, or 0 if it is left to the stack.
/// A function of its own, like some below, so that it has a stack frame to itself.
#[inline(never)]
fn way_around<F: Family, A: Adapter<F>>(
    adapter: &mut A,
    headers: &Headers<F>,
    flow: &Flow<F::Address>,
) -> u32 {
    let (is_error, [outer, _]) = (headers.kind == Kind::IcmpError, headers.outer);
    let Some(first) = adapter.frame().read::<u32>(headers.network).map(u32::from_be) else {
        return 0;
    };
    if headers.network != adapter.link()
        || headers.ttl <= 1
        || !is_routed(adapter)
        || has_options(adapter, headers.network, first)
    {
        return 0;
    }
    let (here, from) = (adapter.ifindex(), routed_from(adapter));
    let way = RouteQuery {
        ifindex: from,
        fwmark: adapter.fwmark(),
        length: segment_length(adapter, headers),
    };
    let forwarded = ForwardQuery {
        source: if is_error && outer != headers.tuple.source { outer } else { flow.source },
        destination: flow.destination,
        ports: if is_error { [0; 2] } else { [flow.source_port, flow.destination_port] },
        protocol: if is_error { F::ICMP } else { headers.tuple.protocol },
        class: if F::VERSION == 4 { first >> 16 & 0xff } else { (first & 0x0fff_ffff).to_be() },
        way,
    };
    let Some(target) = adapter.forward(&forwarded) else { return 0 };
    // It goes from one port of a bridge to another, or is too big.
    if target == from && from != here
        || exceeded_mtu(adapter, &flow.destination, target, way.length).is_some()
    {
        return 0;
    }
    target
}

/// Reports whether the stack would route a frame from this device, or from the bridge that it is a
/// port of.
#[inline(always)]
fn is_routed<F: Family, A: Adapter<F>>(adapter: &A) -> bool {
    let Some(here) = adapter.device(adapter.ifindex()) else { return false };
    let Arrival { to, tag } = adapter.arrival();
    // A tag means that another device gets it first.
    if tag.is_some() || here.is_switched() {
        return false;
    }
    if here.bridge == 0 || adapter.link() == 0 {
        return adapter.link() == 0 || to == Addressee::Host;
    }
    let Some(frame) = adapter.frame().read::<EthernetHeader>(0) else { return false };
    device_flags::bridge_mac(frame.destination) == here.flags >> device_flags::BRIDGE_MAC_SHIFT
}

/// Reports whether a packet has options that routers look at, given its first word.
#[inline(always)]
fn has_options<F: Family, A: Adapter<F>>(adapter: &A, network: u32, first: u32) -> bool {
    if F::VERSION == 4 {
        return first >> 24 != 0x45;
    }
    // Hop-by-hop options come first.
    !matches!(adapter.frame().read::<[u8; 1]>(network.wrapping_add(6)), Some([next]) if next != 0)
}

/// Addresses the frame to the backend if client and backend are ports of one bridge, so that it is
/// bridged as its reply will be. A packet to a backend that the bridge has no neighbour entry for
/// is routed this once.
#[inline(never)]
fn stay_on_bridge<F: Family, A: Adapter<F>>(
    adapter: &mut A,
    source: &F::Address,
    destination: &F::Address,
) {
    let bridge = match adapter.device(adapter.ifindex()) {
        Some(device) if device.bridge != 0 => device.bridge,
        _ => return,
    };
    if let Some(neighbour) = adapter.neighbour(source, destination, bridge) {
        let _ = adapter.frame_mut().store(0, neighbour);
    }
}

/// Sends the packet back out of the device that it came from.
#[inline(always)]
fn bounce<F: Family, A: Adapter<F>>(adapter: &mut A) -> Action {
    if adapter.link() != 0 {
        let Some(header) = adapter.frame().read::<EthernetHeader>(0) else { return Action::Drop };
        if !adapter.frame_mut().store(0, [header.source, header.destination]) {
            return Action::Drop;
        }
    }
    Action::Send(adapter.ifindex())
}

/// Injects the packet into the stack as if it had come in on the device that the route from `local`
/// to `remote` names: strict reverse path filtering drops it elsewhere.
#[inline(always)]
fn inject<F: Family, A: Adapter<F>>(
    adapter: &mut A,
    local: &F::Address,
    remote: &F::Address,
) -> Action {
    let here = adapter.ifindex();
    let leaves = adapter.hook() == Hook::Egress;
    let target = if leaves {
        here
    } else if local == remote || adapter.is_own_address(remote) {
        // The frontend is an address of this host's own: no other device accepts one as a source.
        LOOPBACK
    } else {
        match adapter.route(local, remote, &RouteQuery { ifindex: LOOPBACK, fwmark: 0, length: 0 })
        {
            Target::Device(target) => target,
            Target::TooBig(_) | Target::None => here,
        }
    };
    if target == here && !leaves {
        return Action::Next;
    }
    receive(adapter, target)
}

/// Injects the packet into the stack as if it had come in on a device.
#[inline(always)]
fn receive<F: Family, A: Adapter<F>>(adapter: &mut A, target: u32) -> Action {
    let Some(to) = adapter.device(target) else { return Action::Drop };
    let (link, mac) = (to.link_header, to.mac);
    if target != adapter.ifindex() {
        adapter.take_tags_off();
    }
    let has_header = if link == 0 {
        true
    } else if adapter.link() == 0 {
        add_link_header(adapter, mac)
    } else {
        adapter.frame_mut().store(0, mac)
    };
    if has_header { Action::Receive(target) } else { Action::Drop }
}

/// Makes room for the link header of the device that the packet is forwarded by: the helper strips
/// a header, and drops packets that have none.
#[inline(always)]
fn has_room_for_link<F: Family, A: Adapter<F>>(adapter: &mut A) -> bool {
    adapter.link() != 0 || add_link_header(adapter, [0; 6])
}

/// Puts an Ethernet header before a packet that has none.
#[inline(always)]
fn add_link_header<F: Family, A: Adapter<F>>(adapter: &mut A, mac: [u8; 6]) -> bool {
    let header = EthernetHeader { destination: mac, source: mac, ethertype: F::ETHERTYPE.to_be() };
    adapter.frame_mut().grow_head(ETHERNET) && adapter.frame_mut().store(0, header)
}

/// Has the agent hold a fragment: sends it out of our own device, behind a label. A fragment that
/// cannot be sent there is passed on.
#[inline(always)]
fn hold<F: Family, A: Adapter<F>>(adapter: &mut A) -> Action {
    // A tag that is kept outside of the packet would be lost.
    if adapter.arrival().tag.is_some() {
        return Action::Next;
    }
    let flags = if adapter.hook() == Hook::Egress { label::EGRESS } else { 0 }
        | if adapter.link() == 0 { label::L3 } else { 0 };
    let label = Label::new(adapter.ifindex(), flags);
    if !adapter.frame_mut().grow_head(size_of::<Label>() as u32) {
        return Action::Next;
    }
    if !adapter.frame_mut().store(0, label) {
        return Action::Drop;
    }
    adapter.set_held();
    Action::Send(adapter.own_device())
}

/// Reports whether a source address may be answered: it is a single host's.
#[inline(always)]
fn is_answerable<F: Family>(address: &F::Address) -> bool {
    let words = F::words(address);
    let [word, ..] = words;
    let [first, ..] = word.to_ne_bytes();
    if F::VERSION == 4 {
        // Not "this host", multicast, reserved or broadcast.
        return first != 0 && first < 224;
    }
    words != [0; 4] && first != 0xff
}

/// Sends an answer to where the packet came from.
#[inline(always)]
fn send_answer<F: Family, A: Adapter<F>>(adapter: &mut A) -> Action {
    if adapter.hook() != Hook::Egress {
        return bounce(adapter);
    }
    let here = adapter.ifindex();
    if adapter.link() != 0 {
        let Some(device) = adapter.device(here) else { return Action::Drop };
        let mac = device.mac;
        if !adapter.frame_mut().store(0, mac) {
            return Action::Drop;
        }
    }
    Action::Receive(here)
}

/// Turns the segment into the reset that answers it.
#[inline(never)]
fn reset<F: Answer + Wide, A: Adapter<F>>(
    adapter: &mut A,
    headers: &Headers<F>,
    reason: &mut Reason,
) -> bool {
    let Some(segment) = adapter.frame().read::<TcpHeader>(headers.transport) else { return false };
    if !is_answerable::<F>(&headers.tuple.source) {
        *reason = Reason::NoBackendDropped;
        return false;
    }
    let (network, reset) = answer::reset(headers, &segment);
    let at = headers.network.wrapping_add(F::HEADER);
    if adapter.frame_mut().set_length(at.wrapping_add(20))
        && adapter.frame_mut().store(headers.network, network)
        && adapter.frame_mut().store(at, reset)
    {
        return true;
    }
    *reason = Reason::RewriteFailed;
    false
}

/// Turns the packet into ICMP port unreachable, unless the client has had too many.
#[inline(always)]
fn unreachable<F: Answer + Wide, A: Adapter<F>>(
    adapter: &mut A,
    headers: &Headers<F>,
    reason: &mut Reason,
) -> Action {
    if !is_answerable::<F>(&headers.tuple.source) {
        *reason = Reason::NoBackendDropped;
        return Action::Drop;
    }
    if !may_answer(adapter, &reject_key::<F>(&headers.tuple.source)) {
        *reason = Reason::RejectLimited;
        return Action::Drop;
    }
    error(adapter, headers, IcmpError::PortUnreachable, 0)
}

/// Reports whether a packet may be answered with an ICMP error, and its client has not had too
/// many. Neither an error nor a later fragment is answered (RFC 1122, 3.2.2).
#[inline(never)]
fn may_be_answered<F: Wide, A: Adapter<F>>(adapter: &mut A, headers: &Headers<F>) -> bool {
    headers.kind == Kind::Transport
        && is_answerable::<F>(&headers.tuple.source)
        && may_answer(adapter, &reject_key::<F>(&headers.tuple.source))
}

/// Returns the client's key in the rate limiter.
#[inline(always)]
fn reject_key<F: Wide>(address: &F::Address) -> RejectKey {
    RejectKey { address: F::wide(address) }
}

/// Answers the packet with an ICMP error.
#[inline(always)]
fn error<F: Answer, A: Adapter<F>>(
    adapter: &mut A,
    headers: &Headers<F>,
    kind: IcmpError,
    mtu: u32,
) -> Action {
    if adapter.write_error(headers, kind, mtu) { send_answer(adapter) } else { Action::Drop }
}

/// Turns the packet into an ICMP error about itself. The MTU is that of "too big", otherwise 0.
#[inline(always)]
pub fn write_error<F: Answer, P: Resize>(
    frame: &mut P,
    headers: &Headers<F>,
    kind: IcmpError,
    mtu: u32,
) -> bool {
    // Whole words, so that the sum can be taken, and never less than the headers. Behind the black
    // box the compiler cannot fold the bounds into the arithmetic, where the verifier would not
    // find them.
    let length = black_box(headers.length.min(QUOTE) & 0x7c);
    if length < const { F::HEADER + 8 } || length > QUOTE {
        return false;
    }
    let mut quote = P::room_for_quote();
    let Some(sum) = frame.quote(headers.network, length, &mut quote) else { return false };
    let (network, icmp) = answer::error(headers, kind.code::<F>(), mtu, Quoted { length, sum });
    let at = headers.network.wrapping_add(F::HEADER);
    let quoted_at = at.wrapping_add(8);
    frame.set_length(quoted_at.wrapping_add(length))
        && frame.store(headers.network, network)
        && frame.store(at, icmp)
        && frame.store_quote(quoted_at, length, &quote)
}
