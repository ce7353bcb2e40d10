//! The tc adapter: takes an skb through the engine.
//!
//! A packet that is not dropped or redirected makes the program return -1 (`TCX_NEXT`,
//! `TC_ACT_UNSPEC`), never OK: the programs after ours must see every packet that goes on.

use core::ffi::c_void;

use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_sk_fullsock, bpf_sk_storage_get};
use sluice_common::abi::{CallerKey, Tuple, device};
use sluice_common::engine::adapter::Adapter;
use sluice_common::engine::tc::{TcProgram, run_translated};
use sluice_common::engine::{self, act};
use sluice_common::event::Wide;
use sluice_common::packet::answer::{Answer, IcmpError};
use sluice_common::packet::header::protocol;
use sluice_common::packet::parse::{self, Headers};
use sluice_common::packet::rewrite::rewrite;
use sluice_common::path::fragment::{HELD_PRIORITY, place_of_mark};
use sluice_common::path::{Decision, Hook, policy};
use sluice_common::{Family, Reason, V4, V6};

use super::clock::now;
use super::count;
use super::decide::{Decide, Scratch, hook_number, hook_of};
use super::events::Emit;
use super::fib::{Fib, Origin, has_foreign_source};
use super::maps;
use super::run::{Context, Run};
use super::skb::{DONE, NEXT, Skb, arrival};
use super::socket_lookup::SocketLookup;
use super::xdp::XDP_DONE;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// Runs a tc program on a device whose link header has `LINK` bytes.
#[inline(always)]
pub(super) fn run<const LINK: u32, const EGRESS: bool>(skb: *mut __sk_buff) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let priority = || unsafe { (*skb).priority };
    if LINK != 0 && EGRESS && priority() == HELD_PRIORITY && ifindex(skb) == maps::own_device() {
        return release(skb);
    }
    let is_done = is_done::<EGRESS>(skb);
    if is_done && (EGRESS || !is_accelerated()) {
        return NEXT;
    }
    // SAFETY: the context is valid while the program runs.
    let ethertype = u16::from_be(unsafe { (*skb).protocol } as u16);
    let packet = Skb::<V4, LINK, EGRESS>::new(skb);
    let Some((ethertype, offset)) = parse::untag(&packet, ethertype, LINK) else {
        return NEXT;
    };
    match ethertype {
        V4::ETHERTYPE if is_done => translated::<V4, LINK, EGRESS>(skb, offset),
        V6::ETHERTYPE if is_done => translated::<V6, LINK, EGRESS>(skb, offset),
        V4::ETHERTYPE => packet_of::<V4, LINK, EGRESS>(skb, offset),
        V6::ETHERTYPE => packet_of::<V6, LINK, EGRESS>(skb, offset),
        _ => NEXT,
    }
}

/// Reports whether a program has already translated the packet at this side of the stack.
#[inline(always)]
fn is_done<const EGRESS: bool>(skb: *mut __sk_buff) -> bool {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        if EGRESS {
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

/// A family as the tc adapter needs it.
pub(super) trait Tc: Fib + Answer + Emit + Wide + SocketLookup {
    /// Reads the packet into this CPU's scratch, by a global function (see `decide`). Returns 0 if
    /// it is too short.
    fn read(skb: *mut __sk_buff, offset: u32) -> u32;
    /// Reports, by a global function, whether the source of the packet in this CPU's scratch does
    /// not belong to the device that it came in by.
    fn has_foreign_source(skb: *mut __sk_buff, from: Origin, hook: Hook) -> bool;
    /// Rewrites the packet in this CPU's scratch as its decision says, by a global function.
    fn translate(skb: *mut __sk_buff) -> bool;
    /// Turns the packet in this CPU's scratch into an ICMP error about it, by a global function.
    fn write_error(skb: *mut __sk_buff, error: IcmpError, mtu: u32) -> bool;
}

macro_rules! global {
    ($family:ident, $read:ident, $source:ident, $translate:ident, $error:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $translate(skb: *mut __sk_buff) -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: this CPU's own; callers hold references that only read.
            let Scratch { headers, decision, .. } = unsafe { &*scratch };
            let packet = &mut Skb::<$family, 0, false>::new(skb);
            u32::from(rewrite(packet, headers, &decision.flow))
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $error(skb: *mut __sk_buff, error: u32, mtu: u32) -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: this CPU's own; callers hold references that only read.
            let headers = unsafe { &(*scratch).headers };
            let packet = &mut Skb::<$family, 0, false>::new(skb);
            u32::from(act::write_error(packet, headers, IcmpError::from_number(error), mtu))
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $source(skb: *mut __sk_buff, ifindex: u32, fwmark: u32, hook: u32) -> u32 {
            let from = Origin { ifindex, fwmark };
            u32::from(has_foreign_source::<$family>(skb.cast(), from, hook_of(hook)))
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
            let packet = Skb::<$family, 0, false>::new(skb);
            u32::from(parse::headers_into(&packet, offset, headers))
        }

        impl Tc for $family {
            #[inline(always)]
            fn read(skb: *mut __sk_buff, offset: u32) -> u32 {
                $read(skb, offset)
            }

            #[inline(always)]
            fn has_foreign_source(skb: *mut __sk_buff, from: Origin, hook: Hook) -> bool {
                $source(skb, from.ifindex, from.fwmark, hook_number(hook)) != 0
            }

            #[inline(always)]
            fn translate(skb: *mut __sk_buff) -> bool {
                $translate(skb) != 0
            }

            #[inline(always)]
            fn write_error(skb: *mut __sk_buff, error: IcmpError, mtu: u32) -> bool {
                $error(skb, error as u32, mtu) != 0
            }
        }
    };
}

global!(V4, tc_read_v4, tc_source_v4, tc_translate_v4, tc_error_v4);
global!(V6, tc_read_v6, tc_source_v6, tc_translate_v6, tc_error_v6);

#[inline(always)]
fn ifindex(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*skb).ifindex }
}

/// Sends a packet that XDP, or another device's program, has translated around the stack.
#[inline(never)]
fn translated<F: Tc, const LINK: u32, const EGRESS: bool>(skb: *mut __sk_buff, offset: u32) -> i32 {
    if F::read(skb, offset) == 0 {
        return NEXT;
    }
    let Some(mut run) = Run::<F, _>::new(Skb::<F, LINK, EGRESS>::new(skb)) else { return NEXT };
    let action = run_translated(&mut run);
    run.packet.end(action)
}

#[inline(never)]
fn packet_of<F: Tc, const LINK: u32, const EGRESS: bool>(skb: *mut __sk_buff, offset: u32) -> i32 {
    if F::read(skb, offset) == 0 {
        return NEXT;
    }
    let Some(mut run) = Run::<F, _>::new(Skb::<F, LINK, EGRESS>::new(skb)) else { return NEXT };
    let action = engine::tc::run(&mut run);
    run.packet.end(action)
}

impl<F: Tc, const LINK: u32, const EGRESS: bool> Context for Skb<F, LINK, EGRESS> {
    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.ctx.cast()
    }

    #[inline(always)]
    fn hook(&self) -> Hook {
        Skb::hook(self)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        Skb::ifindex(self)
    }

    #[inline(always)]
    fn origin(&self) -> Origin {
        Origin { ifindex: act::comes_from(self), fwmark: self.fwmark() }
    }
}

impl<F: Tc, const LINK: u32, const EGRESS: bool> TcProgram<F> for Run<F, Skb<F, LINK, EGRESS>> {
    type Adapter = Skb<F, LINK, EGRESS>;

    #[inline(always)]
    fn decide(&mut self) {
        F::decide(self.packet.ifindex(), self.packet.hook());
    }

    #[inline(always)]
    fn pass(&mut self) {
        let Scratch { headers, decision, .. } = self.scratch_mut();
        *decision = Decision::pass(&headers.tuple);
    }

    #[inline(always)]
    fn restrict_foreign(&mut self) {
        F::restrict_foreign(self.packet.hook());
    }

    #[inline(always)]
    fn note(&mut self) {
        F::note();
    }

    #[inline(always)]
    fn is_for_others(&self) -> bool {
        is_for_others(self.packet.ctx) != 0
    }

    #[inline(always)]
    fn has_foreign_source(&self) -> bool {
        let here = self.packet.ifindex();
        // SAFETY: the context is valid while the program runs.
        let ifindex = if EGRESS { unsafe { (*self.packet.ctx).ingress_ifindex } } else { here };
        let from = Origin { ifindex, fwmark: self.packet.fwmark() };
        F::has_foreign_source(self.packet.ctx, from, self.packet.hook())
    }

    #[inline(always)]
    fn has_hidden_socket(&mut self) -> bool {
        comes_from_hidden_socket::<F>(self.packet.ctx)
    }

    #[inline(always)]
    fn begin(&mut self, ports_to_skip: u32) {
        self.begin_open(ports_to_skip);
    }

    #[inline(always)]
    fn parts(&mut self) -> (&mut Self::Adapter, &Headers<F>, &Decision<F>) {
        let (packet, Scratch { headers, decision, .. }) = self.split();
        (packet, headers, decision)
    }

    #[inline(always)]
    fn set_reason(&mut self, reason: Reason) {
        self.scratch_mut().decision.reason = reason;
    }

    #[inline(always)]
    fn count(&mut self, is_dropped: bool) {
        let Scratch { headers, decision, .. } = self.scratch();
        count::packet(decision, headers, self.packet.ifindex(), self.packet.hook(), is_dropped);
    }
}

/// Reports whether a frame is not for this host to route. A global function, so that the verifier
/// goes on once behind it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_for_others(skb: *mut __sk_buff) -> u32 {
    let here = maps::device(ifindex(skb));
    let is_edge = matches!(here, Some(device) if device.role == device::EDGE);
    u32::from(act::is_for_others(arrival(skb), is_edge))
}

/// Reports whether the flow may have the port of a socket that
/// [`is_taken_by_socket`](super::socket_lookup::is_taken_by_socket) cannot find. If the packet
/// comes straight from a pod's socket whose call was left to packets, it also notes the caller.
///
/// Forwarding detaches a packet from its socket; a veth does not.
#[inline(never)]
fn comes_from_hidden_socket<F: Tc>(skb: *mut __sk_buff) -> bool {
    let Some(here) = maps::device(ifindex(skb)) else { return false };
    let Some(scratch) = F::scratch() else { return false };
    // SAFETY: this CPU's own; nothing else takes a reference here.
    let Scratch { headers, decision, .. } = unsafe { &*scratch };
    let tuple = &headers.tuple;
    // SAFETY: the context is valid while the program runs; the packet holds the socket.
    let socket = unsafe { (*skb).__bindgen_anon_2.sk };
    // SAFETY: as above.
    let has_socket = !socket.is_null() && matches!(unsafe { (*socket).family }, AF_INET | AF_INET6);
    let is_caller = has_socket && here.role == device::EDGE && learn_caller::<F>(socket, tuple);
    // The calls that follow are direct connections, and do not collide with this flow at another
    // port.
    let hides = is_caller && tuple.protocol == protocol::TCP
        || policy::hides_sockets(here, tuple.protocol, has_socket);
    hides && !decision.flow.is_direct()
}

/// Notes the frontend that a socket's packet is on the way to. Returns whether its call was left to
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
    // Without room, its calls are left to packets once more.
    let _ = maps::callers.insert(&caller, now(), 0);
    true
}

/// Reports whether acceleration is on.
#[inline(always)]
fn is_accelerated() -> bool {
    matches!(maps::settings.get(0), Some(settings) if settings.accelerates())
}

/// Sends a fragment that the agent has held to where it came from. A fragment on its way to the
/// agent goes on.
#[inline(always)]
fn release(skb: *mut __sk_buff) -> i32 {
    // SAFETY: the context is valid while the program runs; the helper has no preconditions.
    unsafe {
        let mark = (*skb).mark;
        if mark == 0 {
            return NEXT;
        }
        let (target, leaves) = place_of_mark(mark);
        (*skb).mark = 0;
        (*skb).priority = 0;
        bpf_redirect(target, if leaves { 0 } else { u64::from(BPF_F_INGRESS) }) as i32
    }
}
