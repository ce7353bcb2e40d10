//! Looks up sockets that hold the tuple of a new flow.

use core::ffi::c_void;

use aya_ebpf::bindings::{
    bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
};
use aya_ebpf::helpers::generated::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp};
use sluice_common::engine::open::{FlowEnd, Owner, Sockets, sockets};
use sluice_common::packet::header::protocol;
use sluice_common::path::Hook;
use sluice_common::{Family, V4, V6};

use super::decide::{Decide, Scratch};
use super::tables::Kernel;

/// `BPF_F_CURRENT_NETNS`.
const CURRENT_NETNS: u64 = u64::MAX;

/// A family whose sockets can be looked up.
pub(super) trait SocketLookup: Decide {
    /// Fills in the tuple of a packet, and returns its size in bytes.
    fn sock_tuple(
        tuple: &mut bpf_sock_tuple,
        from: (&Self::Address, u16),
        to: (&Self::Address, u16),
    ) -> u32;
}

impl SocketLookup for V4 {
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
}

impl SocketLookup for V6 {
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
}

/// Reports whether a socket holds the tuple that the flow in this CPU's scratch is to have.
#[inline(never)]
pub(super) fn is_taken_by_socket<F: SocketLookup>(
    ctx: *mut c_void,
    ifindex: u32,
    hook: Hook,
) -> bool {
    let Some(scratch) = F::scratch() else { return false };
    // SAFETY: this CPU's own; nothing else takes a reference here.
    let Scratch { decision, lookups, .. } = unsafe { &*scratch };
    let tables = Kernel { ifindex, lookups: *lookups };
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
    // The tuple of packets that arrive at that end.
    let size = match end {
        FlowEnd::Client => F::sock_tuple(&mut tuple, backend, client),
        FlowEnd::Backend => F::sock_tuple(&mut tuple, client, backend),
    };
    // SAFETY: the helpers read `size` bytes of the tuple; what they find is released.
    unsafe {
        if decision.key.protocol == protocol::TCP {
            let socket = bpf_skc_lookup_tcp(ctx, &raw mut tuple, size, netns, 0);
            if socket.is_null() {
                return false;
            }
            let held = end.is_taken_in(protocol::TCP, (*socket).state);
            let _ = bpf_sk_release(socket.cast());
            return held;
        }
        if decision.key.protocol == protocol::UDP {
            let socket = bpf_sk_lookup_udp(ctx, &raw mut tuple, size, netns, 0);
            if socket.is_null() {
                return false;
            }
            let held = end.is_taken_in(protocol::UDP, (*socket).state);
            let _ = bpf_sk_release(socket.cast());
            return held;
        }
    }
    false
}
