//! The tc adapter: lets the path decide about an skb and applies the decision once.
//!
//! What is not dropped or redirected returns -1 (`TCX_NEXT`, `TC_ACT_UNSPEC`), never OK: the
//! programs behind ours must see every packet that goes on.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_INGRESS, TC_ACT_SHOT, bpf_check_mtu_flags::BPF_MTU_CHK_SEGS, bpf_redir_neigh,
    bpf_sock, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
};
use aya_ebpf::helpers::generated::{
    bpf_check_mtu, bpf_csum_diff, bpf_redirect, bpf_redirect_neigh, bpf_sk_fullsock,
    bpf_sk_lookup_udp, bpf_sk_release, bpf_sk_storage_get, bpf_skb_change_head,
    bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes, bpf_skb_vlan_pop,
    bpf_skc_lookup_tcp,
};
use sluice_common::abi::{
    CallerKey, Device, Flow, RejectKey, Tuple, device, device_flags, flow, networks,
};
use sluice_common::engine::open::{FlowEnd, Owner, Refusal, Sockets, Steps, sockets};
use sluice_common::engine::{self, limit};
use sluice_common::event::Wide;
use sluice_common::packet::answer::{self, Answer, QUOTE, Trouble};
use sluice_common::packet::header::{EthernetHeader, TcpHeader, protocol};
use sluice_common::packet::parse::{self, Headers, Kind};
use sluice_common::packet::rewrite::{Edit, decrement_ttl, rewrite};
use sluice_common::path::fragment::{HELD_PRIORITY, Label, label, met_at};
use sluice_common::path::{Decision, Hook, Step, Verdict, policy};
use sluice_common::{Family, Packet, Reason, V4, V6};

use super::clock::{now, now_ns};
use super::count;
use super::decide::{Asked, Decide, Scratch};
use super::events::Tell;
use super::fib::{
    Fib, Forwarded, LOOPBACK, Target, Way, ask, forward, neighbour, route, source_is_foreign,
};
use super::maps;
use super::skb::Skb;
use super::tables::Kernel;
use super::xdp::XDP_DONE;

/// The next program decides.
const NEXT: i32 = -1;
const DROP: i32 = TC_ACT_SHOT;
/// The bits of a VLAN tag that name the VLAN.
const VLAN: u32 = 0xfff;
const PACKET_HOST: u32 = 0;
const PACKET_BROADCAST: u32 = 1;
const PACKET_MULTICAST: u32 = 2;
const PACKET_OTHERHOST: u32 = 3;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const TCP_ESTABLISHED: u32 = 1;
/// `BPF_F_CURRENT_NETNS`.
const CURRENT_NETNS: u64 = u64::MAX;

/// Runs a tc program on a device whose link header has `LINK` bytes.
#[inline(always)]
pub(super) fn run<const LINK: u32>(skb: *mut __sk_buff, hook: Hook) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let priority = || unsafe { (*skb).priority };
    if LINK != 0
        && hook == Hook::Egress
        && priority() == HELD_PRIORITY
        && ifindex(skb) == own_device()
    {
        return release(skb);
    }
    let is_done = is_done(skb, hook);
    if is_done && (hook == Hook::Egress || !is_accelerated()) {
        return NEXT;
    }
    let packet = Skb { skb, ipv6: false };
    // SAFETY: the context is valid while the program runs.
    let ethertype = u16::from_be(unsafe { (*skb).protocol } as u16);
    let Some((ethertype, offset)) = parse::untag(&packet, ethertype, LINK) else {
        return NEXT;
    };
    match ethertype {
        V4::ETHERTYPE if is_done => translated::<V4, LINK>(skb, offset),
        V6::ETHERTYPE if is_done => translated::<V6, LINK>(skb, offset),
        V4::ETHERTYPE => packet_of::<V4, LINK>(skb, offset, hook),
        V6::ETHERTYPE => packet_of::<V6, LINK>(skb, offset, hook),
        _ => NEXT,
    }
}

/// What a packet carries that was translated at ingress, and what one that was at egress: another
/// device's program may meet it once more at the same side (a VLAN device's on its parent), where
/// its tuple looks like a client's that speaks to the backend directly. The IP layer, and a bridge,
/// clear it on the way from one side to the other.
const DONE: [u32; 2] = [0x5c1c_e001, 0x5c1c_e002];

/// Whether a program has translated the packet before, at this side of the stack.
#[inline(always)]
fn is_done(skb: *mut __sk_buff, hook: Hook) -> bool {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        if hook == Hook::Egress {
            let [_, done] = DONE;
            return (*skb).cb[0] == done;
        }
        let [done, _] = DONE;
        if (*skb).cb[0] == done {
            return true;
        }
        let (mark, end) = ((*skb).data_meta as usize, (*skb).data as usize);
        mark.wrapping_add(size_of::<u32>()) <= end && *(mark as *const u32) == XDP_DONE
    }
}

/// Notes that the packet is translated at this side of the stack.
#[inline(always)]
fn set_done(skb: *mut __sk_buff, hook: Hook) {
    let [ingress, egress] = DONE;
    // SAFETY: the context is valid while the program runs.
    unsafe { (*skb).cb[0] = if hook == Hook::Egress { egress } else { ingress } };
}

/// A family as the tc adapter needs it.
trait Tc: Fib + Answer + Tell + Wide {
    /// Reads the packet into this CPU's scratch, by a global function (see `decide`); 0 when it is
    /// too short.
    fn read(skb: *mut __sk_buff, offset: u32) -> u32;
    /// Asks, by a global function, whether the source of the packet in this CPU's scratch does not
    /// belong to the device that it came in by.
    fn source(skb: *mut __sk_buff, from: u32, mark: u32, egress: u32) -> u32;
    /// Rewrites the packet in this CPU's scratch as its decision says, by a global function.
    fn translate(skb: *mut __sk_buff) -> bool;
    /// Turns the packet in this CPU's scratch, by a global function, into an ICMP error about it,
    /// and sends it to where the packet came from. The MTU is that of "too big", else 0.
    fn icmp<const LINK: u32>(skb: *mut __sk_buff, trouble: Trouble, mtu: u32, hook: Hook) -> i32;
    /// The client's key in the rate limiter.
    fn reject_key(address: &Self::Address) -> RejectKey;
    /// Fills in the tuple of a packet; its size in bytes.
    fn sock_tuple(
        tuple: &mut bpf_sock_tuple,
        from: (&Self::Address, u16),
        to: (&Self::Address, u16),
    ) -> u32;
    /// Whether a packet may be answered with "too big": it forbids fragmentation.
    fn forbids_fragments(packet: &Skb, offset: u32) -> bool;
    /// Whether a source address is one that may be answered.
    fn is_answerable(address: &Self::Address) -> bool;
}

macro_rules! global {
    ($family:ident, $read:ident, $source:ident, $translate:ident, $icmp:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $translate(skb: *mut __sk_buff) -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: this CPU's own; callers hold references that only read.
            let Scratch { headers, decision, .. } = unsafe { &*scratch };
            let packet = &mut Skb { skb, ipv6: <$family as Family>::VERSION == 6 };
            u32::from(rewrite(packet, headers, &decision.flow))
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $icmp(
            skb: *mut __sk_buff,
            trouble: u32,
            mtu: u32,
            egress: u32,
            has_link: u32,
        ) -> i32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return DROP };
            // SAFETY: this CPU's own; callers hold references that only read.
            let headers = unsafe { &(*scratch).headers };
            let trouble = Trouble::from_number(trouble);
            icmp(skb, headers, trouble, mtu, egress != 0, has_link != 0)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $source(skb: *mut __sk_buff, from: u32, mark: u32, egress: u32) -> u32 {
            u32::from(source_is_foreign::<$family>(skb.cast(), from, mark, egress != 0))
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $read(skb: *mut __sk_buff, offset: u32) -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // Behind the black box the compiler uses the masked value, whose bounds the verifier
            // knows.
            let offset = core::hint::black_box(offset & 0xfff);
            // SAFETY: this CPU's own; the caller holds no reference to it.
            let headers = unsafe { &mut (*scratch).headers };
            *headers = Headers::default();
            let packet = Skb { skb, ipv6: <$family as Family>::VERSION == 6 };
            u32::from(parse::headers_into(&packet, offset, headers))
        }
    };
}

global!(V4, tc_read_v4, tc_source_v4, tc_translate_v4, tc_icmp_v4);
global!(V6, tc_read_v6, tc_source_v6, tc_translate_v6, tc_icmp_v6);

impl Tc for V4 {
    #[inline(always)]
    fn read(skb: *mut __sk_buff, offset: u32) -> u32 {
        tc_read_v4(skb, offset)
    }

    #[inline(always)]
    fn source(skb: *mut __sk_buff, from: u32, mark: u32, egress: u32) -> u32 {
        tc_source_v4(skb, from, mark, egress)
    }

    #[inline(always)]
    fn translate(skb: *mut __sk_buff) -> bool {
        tc_translate_v4(skb) != 0
    }

    #[inline(always)]
    fn icmp<const LINK: u32>(skb: *mut __sk_buff, trouble: Trouble, mtu: u32, hook: Hook) -> i32 {
        let egress = u32::from(hook == Hook::Egress);
        tc_icmp_v4(skb, trouble as u32, mtu, egress, u32::from(LINK != 0))
    }

    #[inline(always)]
    fn reject_key(address: &Self::Address) -> RejectKey {
        let [a, b, c, d] = address.octets;
        RejectKey { address: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] }
    }

    #[inline(always)]
    fn sock_tuple(
        tuple: &mut bpf_sock_tuple,
        from: (&Self::Address, u16),
        to: (&Self::Address, u16),
    ) -> u32 {
        let ([saddr, ..], [daddr, ..]) = (V4::words(from.0), V4::words(to.0));
        let (sport, dport) = (from.1.to_be(), to.1.to_be());
        tuple.__bindgen_anon_1.ipv4 =
            bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 { saddr, daddr, sport, dport };
        12
    }

    #[inline(always)]
    fn forbids_fragments(packet: &Skb, offset: u32) -> bool {
        matches!(packet.read::<u16>(offset.wrapping_add(6)), Some(field) if u16::from_be(field) & 0x4000 != 0)
    }

    #[inline(always)]
    fn is_answerable(address: &Self::Address) -> bool {
        // Not "this host", multicast, reserved or broadcast.
        let [first, ..] = address.octets;
        first != 0 && first < 224
    }
}

impl Tc for V6 {
    #[inline(always)]
    fn read(skb: *mut __sk_buff, offset: u32) -> u32 {
        tc_read_v6(skb, offset)
    }

    #[inline(always)]
    fn source(skb: *mut __sk_buff, from: u32, mark: u32, egress: u32) -> u32 {
        tc_source_v6(skb, from, mark, egress)
    }

    #[inline(always)]
    fn translate(skb: *mut __sk_buff) -> bool {
        tc_translate_v6(skb) != 0
    }

    #[inline(always)]
    fn icmp<const LINK: u32>(skb: *mut __sk_buff, trouble: Trouble, mtu: u32, hook: Hook) -> i32 {
        let egress = u32::from(hook == Hook::Egress);
        tc_icmp_v6(skb, trouble as u32, mtu, egress, u32::from(LINK != 0))
    }

    #[inline(always)]
    fn reject_key(address: &Self::Address) -> RejectKey {
        RejectKey { address: address.octets }
    }

    #[inline(always)]
    fn sock_tuple(
        tuple: &mut bpf_sock_tuple,
        from: (&Self::Address, u16),
        to: (&Self::Address, u16),
    ) -> u32 {
        let (saddr, daddr) = (V6::words(from.0), V6::words(to.0));
        let (sport, dport) = (from.1.to_be(), to.1.to_be());
        tuple.__bindgen_anon_1.ipv6 =
            bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 { saddr, daddr, sport, dport };
        36
    }

    #[inline(always)]
    fn forbids_fragments(_: &Skb, _: u32) -> bool {
        true
    }

    #[inline(always)]
    fn is_answerable(address: &Self::Address) -> bool {
        let [first, ..] = address.octets;
        V6::words(address) != [0; 4] && first != 0xff
    }
}

#[inline(always)]
fn ifindex(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*skb).ifindex }
}

#[inline(always)]
fn device(ifindex: u32) -> Option<&'static Device> {
    // SAFETY: entries are plain data, readable under RCU.
    unsafe { maps::devices.get(ifindex) }
}

/// Sends what XDP, or another device's program, has translated around the stack.
#[inline(never)]
fn translated<F: Tc, const LINK: u32>(skb: *mut __sk_buff, offset: u32) -> i32 {
    let Some(scratch) = F::scratch() else { return NEXT };
    if F::read(skb, offset) == 0 {
        return NEXT;
    }
    // SAFETY: this CPU's own; nothing else takes a reference from here on.
    let Scratch { headers, decision, .. } = unsafe { &mut *scratch };
    *decision = Decision::pass(&headers.tuple);
    around::<F, LINK>(skb, headers, &decision.flow)
}

#[inline(never)]
fn packet_of<F: Tc, const LINK: u32>(skb: *mut __sk_buff, offset: u32, hook: Hook) -> i32 {
    let Some(scratch) = F::scratch() else { return NEXT };
    if F::read(skb, offset) == 0 {
        return NEXT;
    }
    F::decide(ifindex(skb), hook);
    // SAFETY: this CPU's own; the references end before the next call that takes them.
    let Scratch { headers, decision, .. } = unsafe { &*scratch };
    if decision.verdict == Verdict::Pass && decision.step == Step::Done {
        if decision.datagram {
            F::note();
        }
        count::packet(decision, headers, ifindex(skb), hook, false);
        return NEXT;
    }
    if LINK != 0 && hook == Hook::Ingress && is_for_others(skb) != 0 {
        return NEXT;
    }
    if decision.asks_source && is_foreign::<F>(skb, hook) {
        F::disown(hook);
    }
    // SAFETY: as above.
    let is_done = unsafe { (*scratch).decision.step } == Step::Done;
    let number = if is_done {
        F::record()
    } else {
        let takes_another = hook == Hook::Ingress && comes_from_hidden_socket::<F>(skb);
        open::<F>(skb, hook, u32::from(takes_another))
    };
    let refusal = Refusal::from_number(number).reason();
    // SAFETY: as above.
    if unsafe { (*scratch).decision.datagram } {
        F::note();
    }
    // SAFETY: as above; what is called from here on only reads, too.
    let Scratch { headers, decision, .. } = unsafe { &*scratch };
    let mut reason = decision.reason;
    let action = apply::<F, LINK>(skb, headers, decision, &mut reason, refusal, hook);
    // SAFETY: as above; no reference is kept.
    unsafe { (*scratch).decision.reason = reason };
    // SAFETY: as above.
    let Scratch { headers, decision, .. } = unsafe { &*scratch };
    count::packet(decision, headers, ifindex(skb), hook, action == DROP);
    action
}

/// Whether a frame is not for this host to route: the stack would not either. A global function, so
/// that the verifier goes on once behind it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_for_others(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid while the program runs.
    let (kind, has_tag, tag) =
        unsafe { ((*skb).pkt_type, (*skb).vlan_present != 0, (*skb).vlan_tci) };
    // One of priority alone names no VLAN: the stack takes it off, and the frame for its own.
    let is_tagged = has_tag && tag & VLAN != 0;
    let is_edge = || matches!(device(ifindex(skb)), Some(device) if device.role == device::EDGE);
    u32::from(match kind {
        PACKET_BROADCAST | PACKET_MULTICAST => true,
        // One for somebody else that the device hears: only a bridge port passes such on to the
        // stack.
        PACKET_OTHERHOST => is_tagged || !is_edge(),
        // A pod's frame in a VLAN is none that the stack takes from this device.
        _ => is_tagged && is_edge(),
    })
}

/// Whether the flow may have the port of a socket that [`is_held`] cannot find. Where the packet
/// comes straight from a pod's socket whose call was left to packets, it also notes the caller.
///
/// The kernel parts a packet from its socket where somebody forwards it, not on its way through a
/// veth.
#[inline(never)]
fn comes_from_hidden_socket<F: Tc>(skb: *mut __sk_buff) -> bool {
    let Some(here) = device(ifindex(skb)) else { return false };
    let Some(scratch) = F::scratch() else { return false };
    // SAFETY: this CPU's own; nothing else takes a reference here.
    let (tuple, flags) = unsafe { (&(*scratch).headers.tuple, (*scratch).decision.flow.flags) };
    // SAFETY: the context is valid while the program runs; the packet holds the socket.
    let socket = unsafe { (*skb).__bindgen_anon_2.sk };
    // SAFETY: as above.
    let has_socket = !socket.is_null() && matches!(unsafe { (*socket).family }, AF_INET | AF_INET6);
    let is_caller = has_socket && here.role == device::EDGE && learn_caller::<F>(socket, tuple);
    // The calls that follow are direct connections, and meet nothing of this flow's at another
    // port.
    let hides = is_caller && tuple.protocol == protocol::TCP
        || policy::hides_sockets(here, tuple.protocol, has_socket);
    hides && flags & flow::DIRECT == 0
}

/// Notes which frontend a socket's packet is met on the way to; whether its call was left to
/// packets.
#[inline(always)]
fn learn_caller<F: Tc>(socket: *mut bpf_sock, tuple: &Tuple<F::Address>) -> bool {
    // SAFETY: the socket is not null; the packet holds it.
    let socket = unsafe { bpf_sk_fullsock(socket) };
    if socket.is_null() {
        return false;
    }
    let map = (&raw const maps::left_to_packets).cast_mut();
    // SAFETY: map and socket are what the helper takes; the value lives as long as the program
    // runs.
    let netns = unsafe {
        bpf_sk_storage_get(map.cast(), socket.cast(), core::ptr::null_mut(), 0)
            .cast::<u64>()
            .as_ref()
    };
    let Some(netns) = netns else { return false };
    let caller = CallerKey {
        netns: *netns,
        address: F::wide(&tuple.destination),
        port: tuple.destination_port,
        protocol: tuple.protocol,
        reserved: [0; 5],
    };
    // Where there is no room its calls are left to packets once more.
    let _ = maps::callers.insert(&caller, now(), 0);
    true
}

/// Opens a flow; `passed_over`: how many source ports are not to be tried.
#[inline(never)]
fn open<F: Tc>(skb: *mut __sk_buff, hook: Hook, passed_over: u32) -> u32 {
    let Some(scratch) = F::scratch() else { return 0 };
    // SAFETY: this CPU's own; no reference is kept.
    unsafe { (*scratch).asked = Asked::passing_over(passed_over) };
    engine::open::open(&mut Opening::<F> { skb, hook, scratch }).number()
}

/// The steps of opening a flow, about the packet in this CPU's scratch.
struct Opening<F: Tc> {
    skb: *mut __sk_buff,
    hook: Hook,
    /// This CPU's own. No reference to it outlives a method, so that the global functions may take
    /// theirs.
    scratch: *mut Scratch<F>,
}

impl<F: Tc> Steps for Opening<F> {
    #[inline(always)]
    fn step(&self) -> Step {
        // SAFETY: no reference is kept.
        unsafe { (*self.scratch).decision.step }
    }

    #[inline(always)]
    fn set_step(&mut self, step: Step) {
        // SAFETY: as above.
        unsafe { (*self.scratch).decision.step = step };
    }

    #[inline(always)]
    fn open(&mut self) {
        F::open(ifindex(self.skb), self.hook);
    }

    #[inline(always)]
    fn ask_routes(&mut self) {
        ask::<F>(self.skb.cast(), comes_from(self.skb, self.hook), mark(self.skb));
    }

    #[inline(always)]
    fn search(&mut self) {
        F::search();
    }

    #[inline(always)]
    fn is_held(&mut self) -> bool {
        is_held::<F>(self.skb, self.hook)
    }

    #[inline(always)]
    fn pass_over_one(&mut self) {
        // SAFETY: as above.
        let passed_over = unsafe { &mut (*self.scratch).asked.passed_over };
        *passed_over = passed_over.wrapping_add(1);
    }

    #[inline(always)]
    fn record(&mut self) -> Refusal {
        Refusal::from_number(F::record())
    }
}

/// Whether a socket speaks to the backend from the tuple that the flow is to have.
#[inline(never)]
fn is_held<F: Tc>(skb: *mut __sk_buff, hook: Hook) -> bool {
    let Some(scratch) = F::scratch() else { return false };
    // SAFETY: this CPU's own; nothing else takes a reference here.
    let Scratch { decision, asked, .. } = unsafe { &*scratch };
    let tables = Kernel { ifindex: ifindex(skb), asked: *asked };
    let Some(Sockets { of, end }) = sockets::<F, _>(hook, decision, &tables) else { return false };
    let netns = match of {
        Owner::Host => CURRENT_NETNS,
        Owner::Netns(netns) => u64::from(netns),
    };
    let flow = &decision.flow;
    let client = (&flow.source, flow.source_port);
    let backend = (&flow.destination, flow.destination_port);
    // SAFETY: plain integers: zero is a value.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    // As packets come to that end.
    let size = match end {
        FlowEnd::Client => F::sock_tuple(&mut tuple, backend, client),
        FlowEnd::Backend => F::sock_tuple(&mut tuple, client, backend),
    };
    // SAFETY: the helpers read `size` bytes of the tuple; what they find is released.
    unsafe {
        if decision.key.protocol == protocol::TCP {
            let socket = bpf_skc_lookup_tcp(skb.cast(), &raw mut tuple, size, netns, 0);
            if socket.is_null() {
                return false;
            }
            let held = end.is_held_in((*socket).state);
            let _ = bpf_sk_release(socket.cast());
            return held;
        }
        if decision.key.protocol == protocol::UDP {
            let socket = bpf_sk_lookup_udp(skb.cast(), &raw mut tuple, size, netns, 0);
            if socket.is_null() {
                return false;
            }
            let held = (*socket).state == TCP_ESTABLISHED;
            let _ = bpf_sk_release(socket.cast());
            return held;
        }
    }
    false
}

/// Applies a decision that is not to pass; writes the reason why the packet was dropped after
/// all.
#[inline(always)]
fn apply<F: Tc, const LINK: u32>(
    skb: *mut __sk_buff,
    headers: &Headers<F>,
    decision: &Decision<F>,
    reason: &mut Reason,
    refusal: Option<Reason>,
    hook: Hook,
) -> i32 {
    let packet = &mut Skb { skb, ipv6: F::VERSION == 6 };
    match decision.verdict {
        Verdict::Pass => return NEXT,
        Verdict::Drop => return DROP,
        Verdict::Hold => {
            let action = hold::<LINK>(skb, hook);
            if action == NEXT {
                *reason = Reason::Fragment;
            }
            return action;
        }
        Verdict::Reset => return reset::<F, LINK>(skb, headers, reason, hook),
        Verdict::Unreachable => return unreachable::<F, LINK>(packet, headers, reason, hook),
        Verdict::Translate
        | Verdict::Around
        | Verdict::TurnBack
        | Verdict::HandIn
        | Verdict::Route => {}
    }
    if let Some(refusal) = refusal {
        *reason = refusal;
        return DROP;
    }
    // What this host sends itself has come through the stack.
    let forwards = hook != Hook::Egress;
    let mut target = 0;
    // Our own device, where the packet is to enter the stack to be fragmented.
    let mut fragments = 0;
    if decision.verdict == Verdict::Route {
        let way =
            Way { ifindex: LOOPBACK, mark: mark(skb), length: segment_length(packet, headers) };
        let exceeded =
            match route::<F>(skb.cast(), &decision.flow.source, &decision.flow.destination, way) {
                Target::Device(device) => {
                    target = device;
                    exceeded_mtu::<F>(skb, &decision.flow.destination, target, way.length, LINK)
                }
                Target::TooBig(mtu) => Some(mtu),
                Target::None => {
                    *reason = Reason::NoRoute;
                    return DROP;
                }
            };
        if let Some(mtu) = exceeded {
            // An error is never answered with another (RFC 1122, 3.2.2; RFC 4443, 2.4).
            let is_error = headers.kind == Kind::IcmpError;
            let is_answered = !is_error && F::forbids_fragments(packet, headers.network);
            if !is_error && !is_answered {
                fragments = own_device();
            }
            if fragments == 0 {
                *reason = Reason::TooBig;
                return if is_answered {
                    F::icmp::<LINK>(skb, Trouble::TooBig, mtu, hook)
                } else {
                    DROP
                };
            }
        }
    }
    // A bypass does what the stack would; the stack itself does it where it fragments.
    let bypasses = decision.verdict == Verdict::TurnBack
        || decision.verdict == Verdict::Route && forwards && fragments == 0;
    if bypasses && !decrement_ttl(packet, headers) {
        *reason = Reason::TtlExceeded;
        return time_exceeded::<F, LINK>(skb, headers, hook);
    }
    // An endpoint's packet is translated where it leaves.
    let is_answer = decision.is_answer();
    if !is_answer && !F::translate(skb) {
        *reason = Reason::RewriteFailed;
        return DROP;
    }
    if decision.verdict == Verdict::Around {
        let action = around::<F, LINK>(skb, headers, &decision.flow);
        if action != NEXT || is_answer {
            return action;
        }
    }
    match decision.verdict {
        Verdict::Translate | Verdict::Around => {
            set_done(skb, hook);
            // A masqueraded client's packet is routed, so that its source changes where it leaves.
            if LINK != 0
                && hook == Hook::Ingress
                && decision.flow.flags & (flow::REPLY | flow::MASQUERADED) == 0
            {
                stay_on_bridge::<F>(skb, &decision.flow.source, &decision.flow.destination);
            }
            NEXT
        }
        Verdict::TurnBack => turn_back(packet, LINK != 0),
        Verdict::HandIn => {
            hand_in::<F, LINK>(packet, &decision.flow.destination, &decision.flow.source, hook)
        }
        Verdict::Route if fragments != 0 => hand_to::<F, LINK>(packet, fragments),
        Verdict::Route => {
            take_tags_off(skb);
            // The helper takes away a link header, and drops what has none.
            if LINK == 0 && !add_link_header::<F>(packet, [0; 6]) {
                return DROP;
            }
            // SAFETY: the helper takes no parameters: it finds the neighbour itself.
            (unsafe { bpf_redirect_neigh(target, core::ptr::null_mut(), 0, 0) }) as i32
        }
        Verdict::Pass | Verdict::Drop | Verdict::Reset | Verdict::Unreachable | Verdict::Hold => {
            NEXT
        }
    }
}

/// The packet's mark.
#[inline(always)]
fn mark(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*skb).mark }
}

/// The device from which routing sees a packet come: the bridge, where this one is its port.
#[inline(always)]
fn comes_from(skb: *mut __sk_buff, hook: Hook) -> u32 {
    let here = ifindex(skb);
    match device(here) {
        _ if hook == Hook::Egress => LOOPBACK,
        Some(device) if device.bridge != 0 => device.bridge,
        _ => here,
    }
}

/// Whether the packet's source does not belong to the device that it came in by.
#[inline(always)]
fn is_foreign<F: Tc>(skb: *mut __sk_buff, hook: Hook) -> bool {
    // Both are read, one at a time: the verifier takes no address of a field that is computed.
    // SAFETY: the context is valid while the program runs.
    let came_by = core::hint::black_box(unsafe { (*skb).ingress_ifindex });
    let here = core::hint::black_box(ifindex(skb));
    let egress = hook == Hook::Egress;
    F::source(skb, if egress { came_by } else { here }, mark(skb), u32::from(egress)) != 0
}

/// The length of a packet with its IP header, or that of a segment where the device will cut it.
#[inline(always)]
fn segment_length<F: Tc>(packet: &Skb, headers: &Headers<F>) -> u32 {
    // SAFETY: the context is valid while the program runs.
    let size = unsafe { (*packet.skb).gso_size };
    if size == 0 {
        return headers.length;
    }
    let transport = match packet.read::<TcpHeader>(headers.transport) {
        Some(segment) if headers.tuple.protocol == protocol::TCP => {
            u32::from(segment.offset >> 4) * 4
        }
        _ => 8,
    };
    headers.transport.wrapping_sub(headers.network).wrapping_add(transport).wrapping_add(size)
}

/// Whether what the stack would only forward goes around it.
#[inline(always)]
fn is_accelerated() -> bool {
    matches!(maps::settings.get(0), Some(settings) if settings.networks & networks::ACCELERATE != 0)
}

/// Sends a packet that has been translated where the FIB says, if the stack would do no more than
/// forward it; [`NEXT`]: the stack takes it, with all that it does for what it cannot forward.
///
/// The device's egress programs see it, ours among them, which translates what is to be translated
/// there.
#[inline(never)]
fn around<F: Tc, const LINK: u32>(
    skb: *mut __sk_buff,
    headers: &Headers<F>,
    flow: &Flow<F::Address>,
) -> i32 {
    let packet = &mut Skb { skb, ipv6: F::VERSION == 6 };
    let (is_error, [outer, _]) = (headers.kind == Kind::IcmpError, headers.outer);
    let Some(first) = packet.read::<u32>(headers.network).map(u32::from_be) else { return NEXT };
    if headers.network != LINK
        || headers.ttl <= 1
        || !is_routed::<LINK>(packet)
        || has_options::<F>(packet, headers.network, first)
    {
        return NEXT;
    }
    let from = comes_from(skb, Hook::Ingress);
    let way = Way { ifindex: from, mark: mark(skb), length: segment_length(packet, headers) };
    let forwarded = Forwarded {
        source: if is_error && outer != headers.tuple.source { outer } else { flow.source },
        destination: flow.destination,
        ports: if is_error { [0; 2] } else { [flow.source_port, flow.destination_port] },
        protocol: if is_error { F::ICMP } else { headers.tuple.protocol },
        class: if F::VERSION == 4 { first >> 16 & 0xff } else { (first & 0x0fff_ffff).to_be() },
        way,
    };
    // SAFETY: plain integers: zero is a value.
    let mut next: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    let Some(target) = forward::<F>(skb.cast(), &forwarded, &mut next) else { return NEXT };
    // From one port of a bridge to another, or too big.
    if target == from && from != ifindex(skb)
        || exceeded_mtu::<F>(skb, &flow.destination, target, way.length, LINK).is_some()
    {
        return NEXT;
    }
    if !decrement_ttl(packet, headers) || LINK == 0 && !add_link_header::<F>(packet, [0; 6]) {
        return DROP;
    }
    // SAFETY: the helper reads the next hop within its size, or finds the route itself.
    let action = unsafe {
        if next.nh_family == 0 {
            bpf_redirect_neigh(target, core::ptr::null_mut(), 0, 0)
        } else {
            bpf_redirect_neigh(target, &raw mut next, size_of::<bpf_redir_neigh>() as i32, 0)
        }
    };
    action as i32
}

/// Whether the stack would route a frame from this device, or from the bridge that it is a port of.
#[inline(always)]
fn is_routed<const LINK: u32>(packet: &Skb) -> bool {
    let Some(here) = device(ifindex(packet.skb)) else { return false };
    // SAFETY: the context is valid while the program runs.
    let (kind, is_tagged) = unsafe { ((*packet.skb).pkt_type, (*packet.skb).vlan_present != 0) };
    // A tag says that another device is to have it first.
    if is_tagged || here.flags & device_flags::SWITCHED != 0 {
        return false;
    }
    if here.bridge == 0 || LINK == 0 {
        return LINK == 0 || kind == PACKET_HOST;
    }
    let Some(frame) = packet.read::<EthernetHeader>(0) else { return false };
    device_flags::bridge_mac(frame.destination) == here.flags >> device_flags::BRIDGE_MAC_SHIFT
}

/// Whether a packet has options that routers look at, given its first word.
#[inline(always)]
fn has_options<F: Tc>(packet: &Skb, network: u32, first: u32) -> bool {
    if F::VERSION == 4 {
        return first >> 24 != 0x45;
    }
    // Hop-by-hop options come first.
    !matches!(packet.read::<[u8; 1]>(network.wrapping_add(6)), Some([next]) if next != 0)
}

/// Takes VLAN tags off a packet that goes on by another device: they belong to the one that it came
/// in by.
#[inline(always)]
fn take_tags_off(skb: *mut __sk_buff) {
    for _ in 0..2 {
        // SAFETY: the context is valid while the program runs; the helper takes the tag beside the
        // packet, and puts the next one there.
        unsafe {
            if (*skb).vlan_present == 0 {
                return;
            }
            let _ = bpf_skb_vlan_pop(skb);
        }
    }
}

/// The MTU of a device, or of the route by it, when the packet, or a segment of it, is larger.
#[inline(always)]
fn exceeded_mtu<F: Tc>(
    skb: *mut __sk_buff,
    destination: &F::Address,
    target: u32,
    length: u32,
    link: u32,
) -> Option<u32> {
    let of_route = F::route_mtu(destination, target);
    if of_route != 0 && length > of_route {
        return Some(of_route);
    }
    // The helper compares with the target's link header included: ours may have another length.
    let difference = match device(target) {
        Some(device) => i32::from(device.link_header).wrapping_sub(link as i32),
        None => 0,
    };
    let mut mtu = 0_u32;
    // SAFETY: the helper writes the MTU.
    let status = unsafe {
        bpf_check_mtu(skb.cast(), target, &raw mut mtu, difference, u64::from(BPF_MTU_CHK_SEGS))
    };
    (status > 0).then_some(mtu)
}

/// Where client and backend are ports of one bridge: addresses the frame to the backend, so that it
/// is bridged as its reply will be. A backend that the bridge has no neighbour entry for is routed
/// this once.
#[inline(never)]
fn stay_on_bridge<F: Tc>(skb: *mut __sk_buff, source: &F::Address, destination: &F::Address) {
    let packet = &mut Skb { skb, ipv6: F::VERSION == 6 };
    let bridge = match device(ifindex(packet.skb)) {
        Some(device) if device.bridge != 0 => device.bridge,
        _ => return,
    };
    if let Some(neighbour) = neighbour::<F>(skb.cast(), source, destination, bridge) {
        let _ = packet.store(0, neighbour);
    }
}

/// Sends the packet back out of the device it came from.
#[inline(always)]
fn turn_back(packet: &mut Skb, has_link: bool) -> i32 {
    if has_link {
        let Some(header) = packet.read::<EthernetHeader>(0) else { return DROP };
        if !packet.store(0, [header.source, header.destination]) {
            return DROP;
        }
    }
    // SAFETY: the helper has no preconditions.
    (unsafe { bpf_redirect(ifindex(packet.skb), 0) }) as i32
}

/// Hands the packet to the stack as if it had come in on the device that the route from `local` to
/// `remote` names: strict reverse path filtering drops it elsewhere.
#[inline(always)]
fn hand_in<F: Tc, const LINK: u32>(
    packet: &mut Skb,
    local: &F::Address,
    remote: &F::Address,
    hook: Hook,
) -> i32 {
    let here = ifindex(packet.skb);
    let target = if hook == Hook::Egress {
        here
    } else if local == remote || is_own::<F>(remote) {
        // The frontend is an address of this host's own: no other device takes one as a source.
        LOOPBACK
    } else {
        let way = Way { ifindex: LOOPBACK, mark: 0, length: 0 };
        match route::<F>(packet.skb.cast(), local, remote, way) {
            Target::Device(target) => target,
            Target::TooBig(_) | Target::None => here,
        }
    };
    if target == here && hook != Hook::Egress {
        return NEXT;
    }
    hand_to::<F, LINK>(packet, target)
}

/// Whether an address is one of this node's own.
#[inline(always)]
fn is_own<F: Tc>(address: &F::Address) -> bool {
    // SAFETY: entries are plain data, readable under RCU.
    unsafe { F::node_addresses().get(address) }.is_some()
}

/// Our own device, which takes packets whose source is an address of this node.
#[inline(always)]
fn own_device() -> u32 {
    match maps::settings.get(0) {
        Some(settings) => settings.own_device,
        None => 0,
    }
}

/// Has the agent keep a fragment: sends it out of our own device, behind a label. Passes on what
/// cannot be sent there.
#[inline(never)]
fn hold<const LINK: u32>(skb: *mut __sk_buff, hook: Hook) -> i32 {
    // SAFETY: the context is valid while the program runs. A tag beside the packet would be lost.
    if unsafe { (*skb).vlan_present } != 0 {
        return NEXT;
    }
    let flags = if hook == Hook::Egress { label::EGRESS } else { 0 }
        | if LINK == 0 { label::BARE } else { 0 };
    let label = Label::new(ifindex(skb), flags);
    let target = own_device();
    // SAFETY: the helper makes room or fails.
    if unsafe { bpf_skb_change_head(skb, size_of::<Label>() as u32, 0) } != 0 {
        return NEXT;
    }
    if !(Skb { skb, ipv6: false }).store(0, label) {
        return DROP;
    }
    // SAFETY: the context is valid while the program runs; the helper has no preconditions.
    unsafe {
        (*skb).mark = 0;
        (*skb).priority = HELD_PRIORITY;
        bpf_redirect(target, 0) as i32
    }
}

/// Sends what the agent has kept to where it was met; what is on its way to the agent goes on.
#[inline(always)]
fn release(skb: *mut __sk_buff) -> i32 {
    // SAFETY: the context is valid while the program runs; the helper has no preconditions.
    unsafe {
        let mark = (*skb).mark;
        if mark == 0 {
            return NEXT;
        }
        let (target, leaves) = met_at(mark);
        (*skb).mark = 0;
        (*skb).priority = 0;
        bpf_redirect(target, if leaves { 0 } else { u64::from(BPF_F_INGRESS) }) as i32
    }
}

/// Hands the packet to the stack as if it had come in on a device.
#[inline(always)]
fn hand_to<F: Tc, const LINK: u32>(packet: &mut Skb, target: u32) -> i32 {
    let Some(to) = device(target) else { return DROP };
    if target != ifindex(packet.skb) {
        take_tags_off(packet.skb);
    }
    let has_header = if to.link_header == 0 {
        true
    } else if LINK == 0 {
        add_link_header::<F>(packet, to.mac)
    } else {
        packet.store(0, to.mac)
    };
    if !has_header {
        return DROP;
    }
    // SAFETY: the helper has no preconditions.
    (unsafe { bpf_redirect(target, u64::from(BPF_F_INGRESS)) }) as i32
}

/// Puts an Ethernet header before a packet that has none.
#[inline(always)]
fn add_link_header<F: Tc>(packet: &mut Skb, mac: [u8; 6]) -> bool {
    // SAFETY: the helper makes room or fails.
    if unsafe { bpf_skb_change_head(packet.skb, 14, 0) } != 0 {
        return false;
    }
    packet
        .store(0, EthernetHeader { destination: mac, source: mac, ethertype: F::ETHERTYPE.to_be() })
}

/// Sends an answer to where the packet came from.
#[inline(always)]
fn send_answer(packet: &mut Skb, egress: bool, has_link: bool) -> i32 {
    if !egress {
        return turn_back(packet, has_link);
    }
    let here = ifindex(packet.skb);
    if has_link {
        let Some(device) = device(here) else { return DROP };
        if !packet.store(0, device.mac) {
            return DROP;
        }
    }
    // SAFETY: the helper has no preconditions.
    (unsafe { bpf_redirect(here, u64::from(BPF_F_INGRESS)) }) as i32
}

/// Turns the segment into the reset that answers it.
#[inline(never)]
fn reset<F: Tc, const LINK: u32>(
    skb: *mut __sk_buff,
    headers: &Headers<F>,
    reason: &mut Reason,
    hook: Hook,
) -> i32 {
    let packet = &mut Skb { skb, ipv6: F::VERSION == 6 };
    let Some(segment) = packet.read::<TcpHeader>(headers.transport) else { return DROP };
    if !F::is_answerable(&headers.tuple.source) {
        *reason = Reason::NoBackendDropped;
        return DROP;
    }
    let answer = answer::reset(headers, &segment);
    let at = headers.network.wrapping_add(F::HEADER);
    let length = at.wrapping_add(20);
    // SAFETY: the helper cuts or fails.
    if unsafe { bpf_skb_change_tail(packet.skb, length, 0) } != 0
        || !packet.store(headers.network, answer.0)
        || !packet.store(at, answer.1)
    {
        *reason = Reason::RewriteFailed;
        return DROP;
    }
    send_answer(packet, hook == Hook::Egress, LINK != 0)
}

/// Turns the packet into ICMP port unreachable, if the client has not had too many.
#[inline(always)]
fn unreachable<F: Tc, const LINK: u32>(
    packet: &mut Skb,
    headers: &Headers<F>,
    reason: &mut Reason,
    hook: Hook,
) -> i32 {
    if !F::is_answerable(&headers.tuple.source) {
        *reason = Reason::NoBackendDropped;
        return DROP;
    }
    if !may_answer(&F::reject_key(&headers.tuple.source), ifindex(packet.skb)) {
        *reason = Reason::RejectLimited;
        return DROP;
    }
    F::icmp::<LINK>(packet.skb, Trouble::PortUnreachable, 0, hook)
}

/// Answers a packet whose TTL or hop limit has run out, if it may be answered.
#[inline(never)]
fn time_exceeded<F: Tc, const LINK: u32>(
    skb: *mut __sk_buff,
    headers: &Headers<F>,
    hook: Hook,
) -> i32 {
    // Neither an error nor a later fragment is answered (RFC 1122, 3.2.2).
    if headers.kind != Kind::Transport
        || !F::is_answerable(&headers.tuple.source)
        || !may_answer(&F::reject_key(&headers.tuple.source), ifindex(skb))
    {
        return DROP;
    }
    F::icmp::<LINK>(skb, Trouble::TimeExceeded, 0, hook)
}

/// Takes one ICMP error from the buckets of a client and of the device by which it leaves; from
/// neither if one is empty.
#[inline(never)]
fn may_answer(key: &RejectKey, ifindex: u32) -> bool {
    let now_ms = (now_ns() / 1_000_000) as u32;
    // SAFETY: entries are plain data, readable under RCU.
    let (client, may_client) =
        limit::take_token(unsafe { maps::rejects.get(key) }.copied(), now_ms);
    let device_key = limit::device_reject_key(ifindex);
    // SAFETY: as above.
    let bucket = unsafe { maps::rejects.get(&device_key) }.copied();
    let (device, may_device) = limit::take_device_token(bucket, now_ms);
    if !may_client || !may_device {
        return false;
    }
    let _ = maps::rejects.insert(key, client, 0);
    let _ = maps::rejects.insert(&device_key, device, 0);
    true
}

/// What [`Tc::icmp`] does.
#[inline(always)]
fn icmp<F: Tc>(
    skb: *mut __sk_buff,
    headers: &Headers<F>,
    trouble: Trouble,
    mtu: u32,
    egress: bool,
    has_link: bool,
) -> i32 {
    let packet = &mut Skb { skb, ipv6: F::VERSION == 6 };
    let kind = trouble.code::<F>();
    // Written before it is read, as far as it is read.
    let mut quote = MaybeUninit::<[u32; QUOTE as usize / 4]>::uninit();
    // Whole words, so that the sum can be taken; never less than the headers. Behind the black box
    // the compiler cannot fold the bounds into the arithmetic, where the verifier would not find
    // them.
    let length = core::hint::black_box(headers.length.min(QUOTE) & 0x7c);
    if length < const { F::HEADER + 8 } || length > QUOTE {
        return DROP;
    }
    // SAFETY: the helpers write and then read `length` bytes of the array, which holds as many.
    let sum = unsafe {
        if bpf_skb_load_bytes(packet.skb.cast(), headers.network, quote.as_mut_ptr().cast(), length)
            != 0
        {
            return DROP;
        }
        bpf_csum_diff(core::ptr::null_mut(), 0, quote.as_mut_ptr().cast(), length, 0)
    };
    let answer = answer::error(headers, kind, mtu, length, u64::from(sum as u32));
    let at = headers.network.wrapping_add(F::HEADER);
    let quoted_at = at.wrapping_add(8);
    // SAFETY: the helpers check offsets and lengths; `length` bytes of the array are read.
    let failed = unsafe {
        bpf_skb_change_tail(packet.skb, quoted_at.wrapping_add(length), 0) != 0
            || !packet.store(headers.network, answer.0)
            || !packet.store(at, answer.1)
            || bpf_skb_store_bytes(packet.skb, quoted_at, quote.as_ptr().cast(), length, 0) != 0
    };
    if failed {
        return DROP;
    }
    send_answer(packet, egress, has_link)
}
