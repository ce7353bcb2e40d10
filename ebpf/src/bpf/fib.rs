//! Looks routes up in the kernel's routing tables.

use core::ffi::c_void;

use aya_ebpf::bindings::{bpf_fib_lookup as Question, bpf_redir_neigh as NextHop};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use sluice_common::abi::{Ipv4Address, Ipv6Address, RouteMtu};
use sluice_common::engine::adapter::{ForwardQuery, LOOPBACK, RouteQuery, Target};
use sluice_common::path::{Hook, policy};
use sluice_common::{Family, Tables, V4, V6};

use super::decide::{Decide, Scratch};
use super::maps;
use super::tables::Kernel;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const SUCCESS: i64 = 0;
const NO_NEIGHBOUR: i64 = 7;
const FRAG_NEEDED: i64 = 8;
/// `BPF_FIB_LOOKUP_OUTPUT`.
const OUTPUT: u32 = 2;
/// `BPF_FIB_LOOKUP_MARK`, of Linux 6.10: rules that name a packet's mark count.
const MARK: u32 = 32;
/// The error of a kernel that does not know a flag.
const EINVAL: i64 = -22;

/// The origin of a packet, as far as routing depends on it.
#[derive(Clone, Copy)]
pub(super) struct Origin {
    /// The device; [`LOOPBACK`] for what this host sends itself.
    pub(super) ifindex: u32,
    /// The packet's firewall mark.
    pub(super) fwmark: u32,
}

/// A family whose routes can be looked up.
pub(super) trait Fib: Decide {
    /// Fills in family and addresses of a lookup.
    fn fill(question: &mut Question, source: &Self::Address, destination: &Self::Address);
    /// Returns the MTU that the route by a device to a destination carries, or 0 if it carries
    /// none. The kernel omits it from its answers unless it is locked.
    fn route_mtu(destination: &Self::Address, device: u32) -> u32;
}

/// Performs [`Fib::route_mtu`]. A global function, so that the verifier knows only one result of
/// it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn route_mtu_v4(destination: u32, device: u32) -> u32 {
    let data = Ipv4Address { octets: destination.to_ne_bytes() };
    mtu_by(device, maps::route_mtus_v4.get(&Key::new(32, data)))
}

/// As [`route_mtu_v4`], with the destination in halves.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn route_mtu_v6(first: u64, last: u64, device: u32) -> u32 {
    let words = u128::from(last) << 64 | u128::from(first);
    let data = Ipv6Address { octets: words.to_le_bytes() };
    mtu_by(device, maps::route_mtus_v6.get(&Key::new(128, data)))
}

#[inline(always)]
fn mtu_by(device: u32, route: Option<&RouteMtu>) -> u32 {
    match route {
        Some(route) if route.device == 0 || route.device == device => route.mtu,
        _ => 0,
    }
}

impl Fib for V4 {
    #[inline(always)]
    fn fill(question: &mut Question, source: &Self::Address, destination: &Self::Address) {
        question.family = AF_INET;
        let [source, ..] = V4::words(source);
        let [destination, ..] = V4::words(destination);
        question.__bindgen_anon_3.ipv4_src = source;
        question.__bindgen_anon_4.ipv4_dst = destination;
    }

    #[inline(always)]
    fn route_mtu(destination: &Self::Address, device: u32) -> u32 {
        let [destination, ..] = V4::words(destination);
        route_mtu_v4(destination, device)
    }
}

impl Fib for V6 {
    #[inline(always)]
    fn fill(question: &mut Question, source: &Self::Address, destination: &Self::Address) {
        question.family = AF_INET6;
        question.__bindgen_anon_3.ipv6_src = V6::words(source);
        question.__bindgen_anon_4.ipv6_dst = V6::words(destination);
    }

    #[inline(always)]
    fn route_mtu(destination: &Self::Address, device: u32) -> u32 {
        let [a, b, c, d] = V6::words(destination).map(u64::from);
        route_mtu_v6(b << 32 | a, d << 32 | c, device)
    }
}

/// Looks a route up with a program's context. Returns the status; the result is in `question`.
#[inline(always)]
fn lookup<F: Fib>(
    ctx: *mut c_void,
    question: &mut Question,
    source: &F::Address,
    destination: &F::Address,
    ifindex: u32,
    flags: u32,
) -> i64 {
    F::fill(question, source, destination);
    question.ifindex = ifindex;
    // SAFETY: the helper reads and writes the question within its size.
    unsafe { bpf_fib_lookup(ctx, question, size_of::<Question>() as i32, flags) }
}

#[inline(always)]
fn question() -> Question {
    // SAFETY: plain integers: zero is a value.
    unsafe { core::mem::zeroed() }
}

/// Returns where packets to a destination leave.
#[inline(always)]
pub(super) fn route<F: Fib>(
    ctx: *mut c_void,
    source: &F::Address,
    destination: &F::Address,
    way: RouteQuery,
) -> Target {
    let answer = ask_route::<F>(
        ctx,
        source,
        destination,
        way.ifindex,
        u64::from(way.length) << 32 | u64::from(way.fwmark),
    );
    match (answer as u32, (answer >> 32) as u32) {
        (0, 0) => Target::None,
        (0, mtu) => Target::TooBig(mtu),
        (ifindex, _) => Target::Device(ifindex),
    }
}

/// As [`route`], with length and mark of a [`RouteQuery`] in one word. Returns the device; or, in
/// the upper half, the MTU if the packet exceeds it; or 0.
#[inline(never)]
fn ask_route<F: Fib>(
    ctx: *mut c_void,
    source: &F::Address,
    destination: &F::Address,
    ifindex: u32,
    length_mark: u64,
) -> u64 {
    let (length, mark) = ((length_mark >> 32) as u32, length_mark as u32);
    let mut question = question();
    let mut flags = 0;
    if mark != 0 {
        // The mark goes where the result has link-layer addresses.
        let [a, b, c, d] = mark.to_ne_bytes();
        question.smac = [a, b, c, d, 0, 0];
        flags = MARK;
    }
    question.__bindgen_anon_1.tot_len = length.min(0xffff) as u16;
    let mut status = lookup::<F>(ctx, &mut question, source, destination, ifindex, flags);
    if status == EINVAL {
        status = lookup::<F>(ctx, &mut question, source, destination, ifindex, 0);
    }
    match status {
        // With a length the route's MTU counts and the device is not returned; without one it is.
        FRAG_NEEDED if length != 0 => {
            // SAFETY: an integer, whichever of the union was written.
            let mtu = unsafe { question.__bindgen_anon_1.mtu_result };
            u64::from(mtu) << 32
        }
        // The device is known even if the neighbour is not yet.
        SUCCESS | NO_NEIGHBOUR | FRAG_NEEDED => u64::from(question.ifindex),
        _ => 0,
    }
}

/// Returns where the stack would forward a packet: the device, and in `next` the next hop on it,
/// whose family is 0 if the device's own routes lead to the same one. Returns [`None`] if the stack
/// would not forward it, or would do more than that.
#[inline(always)]
pub(super) fn forward<F: Fib>(
    ctx: *mut c_void,
    packet: &ForwardQuery<F::Address>,
    next: &mut NextHop,
) -> Option<u32> {
    let mut question = question();
    let status = ask_forward::<F>(ctx, &mut question, packet, packet.way.ifindex, 0);
    if status != SUCCESS && status != NO_NEIGHBOUR {
        return None;
    }
    let target = question.ifindex;
    *next = next_hop(&question);
    if status == NO_NEIGHBOUR {
        // The kernel notifies the sender about a neighbour that does not answer only if it has
        // looked the route up itself.
        let status = ask_forward::<F>(ctx, &mut question, packet, target, OUTPUT);
        let found = next_hop(&question);
        if (status == SUCCESS || status == NO_NEIGHBOUR)
            && question.ifindex == target
            && is_same(&found, next)
        {
            next.nh_family = 0;
        }
    }
    Some(target)
}

#[inline(always)]
fn ask_forward<F: Fib>(
    ctx: *mut c_void,
    question: &mut Question,
    packet: &ForwardQuery<F::Address>,
    ifindex: u32,
    flags: u32,
) -> i64 {
    let [source, destination] = packet.ports;
    question.l4_protocol = packet.protocol;
    question.sport = source.to_be();
    question.dport = destination.to_be();
    question.__bindgen_anon_1.tot_len = packet.way.length.min(0xffff) as u16;
    question.__bindgen_anon_2.flowinfo = packet.class;
    let mark = packet.way.fwmark;
    let [a, b, c, d] = mark.to_ne_bytes();
    question.smac = [a, b, c, d, 0, 0];
    // A kernel that does not know marks here refuses: then the packet is left to the stack.
    let flags = if mark == 0 { flags } else { flags | MARK };
    lookup::<F>(ctx, question, &packet.source, &packet.destination, ifindex, flags)
}

#[inline(always)]
fn next_hop(question: &Question) -> NextHop {
    // SAFETY: plain integers: zero is a value.
    let mut next: NextHop = unsafe { core::mem::zeroed() };
    next.nh_family = u32::from(question.family);
    // SAFETY: integers, whichever of the union was written; those of IPv4 are the first of IPv6's.
    next.__bindgen_anon_1.ipv6_nh = unsafe { question.__bindgen_anon_4.ipv6_dst };
    next
}

#[inline(always)]
fn is_same(one: &NextHop, other: &NextHop) -> bool {
    // SAFETY: as in `next_hop`.
    let (one_words, other_words) =
        unsafe { (one.__bindgen_anon_1.ipv6_nh, other.__bindgen_anon_1.ipv6_nh) };
    let ([one_first, ..], [other_first, ..]) = (one_words, other_words);
    one.nh_family == other.nh_family
        && one_first == other_first
        && (one.nh_family == u32::from(AF_INET) || one_words == other_words)
}

/// Returns the link-layer address of a neighbour on a device, or `None` if it is unknown or not on
/// this device.
#[inline(always)]
pub(super) fn neighbour<F: Fib>(
    ctx: *mut c_void,
    source: &F::Address,
    destination: &F::Address,
    ifindex: u32,
) -> Option<[u8; 6]> {
    let mut question = question();
    let status = lookup::<F>(ctx, &mut question, source, destination, ifindex, OUTPUT);
    (status == SUCCESS && question.ifindex == ifindex).then_some(question.dmac)
}

/// Returns the device by which packets of an origin leave, or 0 if there is none.
#[inline(always)]
fn device<F: Fib>(
    ctx: *mut c_void,
    source: &F::Address,
    destination: &F::Address,
    Origin { ifindex, fwmark }: Origin,
) -> u32 {
    match route::<F>(ctx, source, destination, RouteQuery { ifindex, fwmark, length: 0 }) {
        Target::Device(device) => device,
        Target::TooBig(_) | Target::None => 0,
    }
}

/// Looks up where packets of the flow in this CPU's scratch would leave, and stores the results for
/// the path.
#[inline(never)]
pub(super) fn look_up_routes<F: Fib>(ctx: *mut c_void, from: Origin) {
    let Some(scratch) = F::scratch() else { return };
    // SAFETY: this CPU's own; nothing else takes a reference here.
    let Scratch { decision, lookups, .. } = unsafe { &mut *scratch };
    let flow = &decision.flow;
    let here = Origin { ifindex: LOOPBACK, ..from };
    lookups.routes.to_backend = device::<F>(ctx, &flow.source, &flow.destination, from);
    if lookups.routes.to_backend == 0 && from.ifindex != LOOPBACK {
        // A device that may not forward gets no answer.
        lookups.routes.to_backend = device::<F>(ctx, &flow.source, &flow.destination, here);
    }
    lookups.routes.to_client = device::<F>(ctx, &flow.destination, &flow.source, here);
    lookups.has_routes = 1;
}

/// Reports whether the source of the packet in this CPU's scratch does not belong to the device
/// that it came in by, `from`; 0 is this host itself.
#[inline(always)]
pub(super) fn has_foreign_source<F: Fib>(ctx: *mut c_void, from: Origin, hook: Hook) -> bool {
    let Some(scratch) = F::scratch() else { return false };
    // SAFETY: this CPU's own; nothing else takes a reference here.
    let tuple = unsafe { &(*scratch).headers.tuple };
    let tables = &Kernel::of(from.ifindex);
    policy::is_foreign::<F, _>(hook, &tuple.source, from.ifindex, tables, |as_it_came| {
        let bridge = match <Kernel as Tables<F>>::hook_device(tables) {
            Some(device) if as_it_came => device.bridge,
            _ => 0,
        };
        let from = match (as_it_came, bridge) {
            (false, _) => Origin { ifindex: LOOPBACK, fwmark: 0 },
            (true, 0) => from,
            (true, bridge) => Origin { ifindex: bridge, ..from },
        };
        device::<F>(ctx, &tuple.destination, &tuple.source, from)
    })
}
