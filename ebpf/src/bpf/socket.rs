//! The socket path: translates a call once instead of every packet.

use core::ptr::null_mut;

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock_addr};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval, bpf_sk_storage_get,
};
use sluice_common::abi::{
    Backend, CALLER_TICKS, CallerKey, Flow, Ipv4Address, Ipv6Address, Peer, ServiceKey, socket_path,
};
use sluice_common::event::{At, Fate, Wide};
use sluice_common::packet::header::protocol::{TCP, UDP};
use sluice_common::path::socket::{Choice, choose};
use sluice_common::{Reason, V4, V6};

use super::clock::now;
use super::count;
use super::events;
use super::maps::{self, Maps};
use super::tables::Kernel;

const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const ECONNREFUSED: i32 = 111;
/// The call goes on.
const PROCEED: i32 = 1;
/// The call fails.
const FAIL: i32 = 0;

/// Returns the call's port. The context has it in network order in the low half.
#[inline(always)]
fn port(ctx: *mut bpf_sock_addr) -> u16 {
    // SAFETY: the context is valid while the program runs.
    u16::from_be(unsafe { (*ctx).user_port } as u16)
}

#[inline(always)]
fn set_port(ctx: *mut bpf_sock_addr, port: u16) {
    // SAFETY: as above.
    unsafe { (*ctx).user_port = u32::from(port.to_be()) };
}

#[inline(always)]
fn address_v4(ctx: *mut bpf_sock_addr) -> Ipv4Address {
    // SAFETY: as above.
    Ipv4Address { octets: unsafe { (*ctx).user_ip4 }.to_ne_bytes() }
}

#[inline(always)]
fn words_v6(ctx: *mut bpf_sock_addr) -> [u32; 4] {
    // SAFETY: as above. One load a word: the context may not be read otherwise.
    unsafe {
        [
            (&raw const (*ctx).user_ip6[0]).read_volatile(),
            (&raw const (*ctx).user_ip6[1]).read_volatile(),
            (&raw const (*ctx).user_ip6[2]).read_volatile(),
            (&raw const (*ctx).user_ip6[3]).read_volatile(),
        ]
    }
}

#[inline(always)]
pub(super) fn address_v6(words: [u32; 4]) -> Ipv6Address {
    // SAFETY: same size, and any bytes are a value.
    Ipv6Address { octets: unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(words) } }
}

#[inline(always)]
fn set_words_v6(ctx: *mut bpf_sock_addr, words: [u32; 4]) {
    let [a, b, c, d] = words;
    // SAFETY: as above. One store a word: the context may not be written otherwise.
    unsafe {
        (&raw mut (*ctx).user_ip6[0]).write_volatile(a);
        (&raw mut (*ctx).user_ip6[1]).write_volatile(b);
        (&raw mut (*ctx).user_ip6[2]).write_volatile(c);
        (&raw mut (*ctx).user_ip6[3]).write_volatile(d);
    }
}

/// Returns the IPv4 address in an IPv4-mapped IPv6 address (RFC 4291, 2.5.5.2).
#[inline(always)]
pub(super) fn mapped(words: [u32; 4]) -> Option<Ipv4Address> {
    let [a, b, c, d] = words;
    (a == 0 && b == 0 && c == 0xffff_u32.to_be()).then_some(Ipv4Address { octets: d.to_ne_bytes() })
}

/// Reports whether calls of this socket's network namespace may be translated.
#[inline(always)]
fn is_served(ctx: *mut bpf_sock_addr) -> bool {
    let Some(settings) = maps::settings.get(0) else { return false };
    match settings.socket_path {
        socket_path::ALL | socket_path::MACHINE => true,
        socket_path::HOST => is_host(ctx),
        _ => false,
    }
}

/// Reports whether the socket is in the host's network namespace.
#[inline(always)]
fn is_host(ctx: *mut bpf_sock_addr) -> bool {
    let Some(settings) = maps::settings.get(0) else { return false };
    // SAFETY: the context is valid while the program runs.
    (unsafe { bpf_get_netns_cookie(ctx.cast()) }) == settings.host_netns
}

/// Reports whether a call to a frontend is translated here. A pod's call is only if a packet of its
/// namespace was recently seen on the way to the frontend; otherwise nothing shows that the call
/// would leave the namespace at all.
///
/// A UDP socket is decided about once, since packets and calls choose different backends: what
/// began packet by packet goes on like that, and so does what began here.
#[inline(always)]
fn is_translated_here<F: Maps + Wide>(
    ctx: *mut bpf_sock_addr,
    key: &ServiceKey<F::Address>,
) -> bool {
    let Some(settings) = maps::settings.get(0) else { return false };
    // SAFETY: the context is valid while the program runs.
    let netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    if settings.socket_path == socket_path::MACHINE || netns == settings.host_netns {
        return true;
    }
    if key.protocol == UDP {
        if previous_backend::<F>(ctx, &key.address, key.port).is_some() {
            return true;
        }
        if storage(&maps::left_to_packets, ctx, 0).is_some() {
            return false;
        }
    }
    let caller = CallerKey {
        netns,
        address: F::wide(&key.address),
        port: key.port,
        protocol: key.protocol,
        reserved: [0; 5],
    };
    // SAFETY: entries are plain data, readable under RCU.
    let seen = unsafe { maps::callers.get(&caller) };
    if seen.is_some_and(|seen| now().wrapping_sub(*seen) < CALLER_TICKS) {
        return true;
    }
    if let Some(left) = storage(&maps::left_to_packets, ctx, BPF_SK_STORAGE_GET_F_CREATE) {
        *left = netns;
    }
    false
}

/// Reports whether the socket was bound to a port before the call. The process then wants that port
/// seen, and two VIPs with one backend would collide in the host's own socket table: such calls are
/// left to the packet path.
#[inline(always)]
fn is_bound(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context is valid; a socket is readable where it is not null.
    unsafe {
        let socket = (*ctx).__bindgen_anon_1.sk;
        !socket.is_null() && (*socket).src_port != 0
    }
}

/// Reports whether the socket was bound to an address before the call. The route to a backend may
/// not accept it as a source (a loopback address, a bridge's); packets get another source where
/// they leave.
#[inline(always)]
fn has_address(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context is valid; a socket is readable where it is not null. One of IPv6 has a
    // placeholder there.
    unsafe {
        let socket = (*ctx).__bindgen_anon_1.sk;
        !socket.is_null() && (*socket).src_ip4 != 0
    }
}

/// The outcome of a call to an address.
enum Outcome<A> {
    Untouched,
    Refused,
    To(A, u16),
}

/// Returns a call as a flow of the packet that it has not sent yet: without a source.
#[inline(always)]
fn untranslated<F: Maps>(key: &ServiceKey<F::Address>) -> Flow<F::Address> {
    Flow { destination: key.address, destination_port: key.port, ..Flow::default() }
}

/// Returns what a map keeps with a call's socket. With `BPF_SK_STORAGE_GET_F_CREATE` it is made,
/// all zeros, if it is missing.
#[inline(always)]
#[allow(clippy::mut_from_ref, reason = "the value is the socket's, not the map's")]
fn storage<T>(
    map: &'static SkStorage<T>,
    ctx: *mut bpf_sock_addr,
    flags: u32,
) -> Option<&'static mut T> {
    // SAFETY: the context is valid while the program runs.
    let socket = unsafe { (*ctx).__bindgen_anon_1.sk };
    if socket.is_null() {
        return None;
    }
    let map = core::ptr::from_ref(map).cast_mut();
    // SAFETY: map and socket are what the helper takes; the value lives as long as the program
    // runs.
    unsafe {
        bpf_sk_storage_get(map.cast(), socket.cast(), null_mut(), u64::from(flags))
            .cast::<T>()
            .as_mut()
    }
}

/// Returns the backend, and its generation, that a UDP socket was last given for a frontend.
#[inline(always)]
fn previous_backend<F: Maps>(
    ctx: *mut bpf_sock_addr,
    address: &F::Address,
    port: u16,
) -> Option<(u32, u16)> {
    let mut found = None;
    let mut asked = 0;
    for peer in &storage(F::peers(), ctx, 0)?.peers {
        if peer.frontend == *address && peer.frontend_port == port && peer.asked > asked {
            asked = peer.asked;
            found = Some((peer.id, peer.generation));
        }
    }
    found
}

/// Keeps a peer with the socket, for as long as the socket lives. Returns whether it was there
/// already, or [`None`] if there is no memory for it.
///
/// Threads that send by the same socket at once may write the same element: answers to one of the
/// two then show the backend's address until the next send.
#[inline(always)]
fn keep_peer<F: Maps>(
    ctx: *mut bpf_sock_addr,
    peer: Peer<F::Address>,
    protocol: u8,
) -> Option<bool> {
    if protocol == TCP {
        *storage(F::peer(), ctx, BPF_SK_STORAGE_GET_F_CREATE)? = peer;
        return Some(false);
    }
    let peers = &mut storage(F::peers(), ctx, BPF_SK_STORAGE_GET_F_CREATE)?.peers;
    let (mut newest, mut oldest, mut there) = (0, u32::MAX, 0);
    for known in peers.iter() {
        newest = newest.max(known.asked);
        oldest = oldest.min(known.asked);
        let same = known.id == peer.id
            && known.generation == peer.generation
            && known.frontend == peer.frontend
            && known.frontend_port == peer.frontend_port;
        if same {
            there = known.asked;
        }
    }
    if there != 0 && there == newest {
        return Some(true);
    }
    // A known peer becomes the newest; otherwise the oldest is replaced. No other peer has its
    // number.
    let replaced = if there != 0 { there } else { oldest };
    for known in peers.iter_mut() {
        if known.asked == replaced {
            *known = Peer { asked: newest.wrapping_add(1), ..peer };
            break;
        }
    }
    Some(there != 0)
}

/// Records that a UDP socket sends to a backend directly to which it has sent by a frontend before:
/// the answers are the backend's own.
#[inline(always)]
fn keep_direct_peer<F: Maps>(ctx: *mut bpf_sock_addr, address: F::Address, port: u16) {
    let Some(kept) = storage(F::peers(), ctx, 0) else { return };
    if kept.peers.iter().any(|peer| peer.backend == address && peer.backend_port == port) {
        let direct = Peer {
            frontend: address,
            backend: address,
            frontend_port: port,
            backend_port: port,
            id: 0,
            generation: 0,
            reserved: 0,
            asked: 0,
        };
        let _ = keep_peer::<F>(ctx, direct, UDP);
    }
}

/// Chooses a backend, and records the frontend that the socket asked for, so that it can be shown
/// to the process later.
#[inline(always)]
fn translate<F: Maps + Wide>(
    ctx: *mut bpf_sock_addr,
    address: F::Address,
    protocol: u8,
) -> Outcome<F::Address> {
    let port = port(ctx);
    // SAFETY: the context is valid while the program runs.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let key = ServiceKey { address, port, protocol, reserved: 0 };
    let kept = || if protocol == TCP { None } else { previous_backend::<F>(ctx, &address, port) };
    let is_host = is_host(ctx);
    if is_host && has_address(ctx) {
        return Outcome::Untouched;
    }
    match choose::<F, _>(&key, cookie, is_host, kept, &Kernel::of(0)) {
        Choice::Untouched => {
            if protocol == UDP {
                keep_direct_peer::<F>(ctx, address, port);
            }
            Outcome::Untouched
        }
        _ if !is_translated_here::<F>(ctx, &key) => Outcome::Untouched,
        // The packet path answers datagrams with ICMP.
        Choice::Refuse { .. } if protocol != TCP => Outcome::Untouched,
        Choice::Refuse { service_port } => {
            count::reason(Reason::SocketRefused, service_port, 0);
            let refused = Flow { service_port, ..untranslated::<F>(&key) };
            events::call::<F>(
                At::Connect,
                Reason::SocketRefused,
                Fate::Rejected,
                TCP,
                &refused,
                &refused,
            );
            Outcome::Refused
        }
        Choice::Backend { id, backend } => call_backend::<F>(ctx, &key, id, &backend),
    }
}

/// Records that a call goes to a backend instead of a frontend.
#[inline(always)]
fn call_backend<F: Maps + Wide>(
    ctx: *mut bpf_sock_addr,
    key: &ServiceKey<F::Address>,
    id: u32,
    backend: &Backend<F::Address>,
) -> Outcome<F::Address> {
    let peer = Peer {
        frontend: key.address,
        backend: backend.address,
        frontend_port: key.port,
        backend_port: backend.port,
        id,
        generation: backend.generation,
        reserved: 0,
        asked: 0,
    };
    let Some(known) = keep_peer::<F>(ctx, peer, key.protocol) else {
        return Outcome::Untouched;
    };
    count::call::<F>(id);
    // A datagram to the same backend as the one before is not an event.
    if !known {
        let (at, reason) = if key.protocol == TCP {
            (At::Connect, Reason::SocketConnect)
        } else {
            (At::Send, Reason::SocketSend)
        };
        let asked = untranslated::<F>(key);
        let to = Flow {
            destination: backend.address,
            destination_port: backend.port,
            backend: id,
            service_port: backend.service_port,
            ..asked
        };
        events::call::<F>(at, reason, Fate::Forwarded, key.protocol, &asked, &to);
    }
    Outcome::To(backend.address, backend.port)
}

/// Returns the frontend that a socket asked for, given the backend's address.
#[inline(always)]
fn frontend_of<F: Maps>(
    ctx: *mut bpf_sock_addr,
    address: F::Address,
    protocol: u8,
) -> Option<(F::Address, u16)> {
    let port = port(ctx);
    if protocol == TCP {
        let peer = storage(F::peer(), ctx, 0)?;
        return (peer.backend == address && peer.backend_port == port)
            .then_some((peer.frontend, peer.frontend_port));
    }
    // Several frontends may lead to one backend: the most recently used is meant.
    let mut found = None;
    let mut asked = 0;
    for peer in &storage(F::peers(), ctx, 0)?.peers {
        if peer.backend == address && peer.backend_port == port && peer.asked > asked {
            asked = peer.asked;
            found = Some((peer.frontend, peer.frontend_port));
        }
    }
    found
}

#[inline(always)]
fn finish(refused: bool) -> i32 {
    if !refused {
        return PROCEED;
    }
    // SAFETY: the helper has no preconditions.
    let _ = unsafe { bpf_set_retval(-ECONNREFUSED) };
    FAIL
}

/// Translates an IPv4 call.
#[inline(always)]
fn call_v4(ctx: *mut bpf_sock_addr, protocol: u8) -> i32 {
    match translate::<V4>(ctx, address_v4(ctx), protocol) {
        Outcome::Untouched => PROCEED,
        Outcome::Refused => finish(true),
        Outcome::To(address, port) => {
            // SAFETY: the context is valid while the program runs.
            unsafe { (*ctx).user_ip4 = u32::from_ne_bytes(address.octets) };
            set_port(ctx, port);
            PROCEED
        }
    }
}

/// Translates an IPv6 call, to an IPv6 or a mapped address.
#[inline(always)]
fn call_v6(ctx: *mut bpf_sock_addr, protocol: u8) -> i32 {
    let words = words_v6(ctx);
    if let Some(address) = mapped(words) {
        return match translate::<V4>(ctx, address, protocol) {
            Outcome::Untouched => PROCEED,
            Outcome::Refused => finish(true),
            Outcome::To(address, port) => {
                // SAFETY: the context is valid while the program runs.
                unsafe {
                    (&raw mut (*ctx).user_ip6[3])
                        .write_volatile(u32::from_ne_bytes(address.octets));
                };
                set_port(ctx, port);
                PROCEED
            }
        };
    }
    match translate::<V6>(ctx, address_v6(words), protocol) {
        Outcome::Untouched => PROCEED,
        Outcome::Refused => finish(true),
        Outcome::To(address, port) => {
            // SAFETY: same size, and any bytes are a value.
            set_words_v6(ctx, unsafe {
                core::mem::transmute::<[u8; 16], [u32; 4]>(address.octets)
            });
            set_port(ctx, port);
            PROCEED
        }
    }
}

/// Shows the VIP instead of the backend, IPv4.
#[inline(always)]
fn show_v4(ctx: *mut bpf_sock_addr, protocol: u8) -> i32 {
    if let Some((address, port)) = frontend_of::<V4>(ctx, address_v4(ctx), protocol) {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*ctx).user_ip4 = u32::from_ne_bytes(address.octets) };
        set_port(ctx, port);
    }
    PROCEED
}

/// Shows the VIP instead of the backend, IPv6 or mapped.
#[inline(always)]
fn show_v6(ctx: *mut bpf_sock_addr, protocol: u8) -> i32 {
    let words = words_v6(ctx);
    if let Some(address) = mapped(words) {
        if let Some((address, port)) = frontend_of::<V4>(ctx, address, protocol) {
            // SAFETY: the context is valid while the program runs.
            unsafe {
                (&raw mut (*ctx).user_ip6[3]).write_volatile(u32::from_ne_bytes(address.octets));
            };
            set_port(ctx, port);
        }
        return PROCEED;
    }
    if let Some((address, port)) = frontend_of::<V6>(ctx, address_v6(words), protocol) {
        // SAFETY: same size, and any bytes are a value.
        set_words_v6(ctx, unsafe { core::mem::transmute::<[u8; 16], [u32; 4]>(address.octets) });
        set_port(ctx, port);
    }
    PROCEED
}

/// Reports whether the socket path takes a connect(): for TCP alone. A connected UDP socket fires
/// no hook on later sends, so it could not leave a dead backend; it is translated per packet.
#[inline(always)]
fn takes_connect(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context is valid while the program runs.
    let (kind, protocol) = unsafe { ((*ctx).type_, (*ctx).protocol) };
    kind == SOCK_STREAM && protocol == u32::from(TCP) && is_served(ctx) && !is_bound(ctx)
}

/// Reports whether the socket is connected. It then accepts answers from its peer alone, which an
/// answer of the backend is not. Its sends reach this hook if they name a destination, and always
/// from an IPv6 socket that uses IPv4.
#[inline(always)]
fn is_connected(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context is valid; a socket is readable where it is not null.
    unsafe {
        let socket = (*ctx).__bindgen_anon_1.sk;
        !socket.is_null() && (*socket).dst_port != 0
    }
}

#[inline(always)]
fn takes_send(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context is valid while the program runs.
    let (kind, protocol) = unsafe { ((*ctx).type_, (*ctx).protocol) };
    kind == SOCK_DGRAM && protocol == u32::from(UDP) && is_served(ctx) && !is_connected(ctx)
}

pub(super) fn connect4(ctx: *mut bpf_sock_addr) -> i32 {
    if takes_connect(ctx) { call_v4(ctx, TCP) } else { PROCEED }
}

pub(super) fn connect6(ctx: *mut bpf_sock_addr) -> i32 {
    if takes_connect(ctx) { call_v6(ctx, TCP) } else { PROCEED }
}

pub(super) fn sendmsg4(ctx: *mut bpf_sock_addr) -> i32 {
    if takes_send(ctx) { call_v4(ctx, UDP) } else { PROCEED }
}

pub(super) fn sendmsg6(ctx: *mut bpf_sock_addr) -> i32 {
    if takes_send(ctx) { call_v6(ctx, UDP) } else { PROCEED }
}

pub(super) fn recvmsg4(ctx: *mut bpf_sock_addr) -> i32 {
    show_v4(ctx, UDP)
}

pub(super) fn recvmsg6(ctx: *mut bpf_sock_addr) -> i32 {
    show_v6(ctx, UDP)
}

/// Handles getpeername() of a TCP socket. A connected UDP socket shows the VIP already.
pub(super) fn getpeername4(ctx: *mut bpf_sock_addr) -> i32 {
    show_v4(ctx, TCP)
}

pub(super) fn getpeername6(ctx: *mut bpf_sock_addr) -> i32 {
    show_v6(ctx, TCP)
}
