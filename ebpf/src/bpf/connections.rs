//! Counts TCP connections that were translated at connect(). None of their packets passes a program
//! of ours, so the kernel's own figures are taken when a connection closes, and every few seconds
//! while it sends.

#![allow(non_upper_case_globals, reason = "a map's name is what `bpftool map` shows")]

use core::ptr::null_mut;

use aya_ebpf::bindings::{
    BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_RTT_CB,
    BPF_SOCK_OPS_RTT_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_CLOSING, BPF_TCP_ESTABLISHED,
    BPF_TCP_FIN_WAIT2, BPF_TCP_LAST_ACK, BPF_TCP_SYN_SENT, BPF_TCP_TIME_WAIT, bpf_sock_ops,
};
use aya_ebpf::btf_maps::{PerCpuHashMap, SkStorage};
use aya_ebpf::helpers::generated::{bpf_sk_storage_get, bpf_sock_ops_cb_flags_set};
use aya_ebpf::macros::btf_map;
use sluice_common::abi::{Connection, Ipv4Address, Peer, SOCKET_COUNTERS_MAX, SocketCounters};
use sluice_common::{Failure, V4, V6};

use super::clock::now;
use super::count::{self, add};
use super::maps::Maps;
use super::socket::{address_v6, mapped};

/// The other programs at this hook decide too.
const PROCEED: u32 = 1;
const AF_INET: u32 = 2;
/// A connection that sends is counted again after this many ticks.
const SAMPLE_TICKS: u32 = 4;
/// The id of no backend, for a connection that is not translated.
const NOBODY: u32 = 0;

#[btf_map]
static connections: SkStorage<Connection> = SkStorage::new();
#[btf_map]
static socket_counts: PerCpuHashMap<
    u32,
    SocketCounters,
    { SOCKET_COUNTERS_MAX as usize },
    { BPF_F_NO_PREALLOC as usize },
> = PerCpuHashMap::new();

/// Returns the counters of a backend, which are made on first use. A counter that cannot be made
/// changes nothing else.
///
/// They are written by atomic additions, because an interrupt may count the end of another
/// connection in the middle of one.
#[inline(always)]
fn counters(backend: u32) -> Option<&'static mut SocketCounters> {
    if socket_counts.get_ptr_mut(backend).is_none() {
        let none = SocketCounters {
            connections: 0,
            closed: 0,
            failed: 0,
            resets: 0,
            sent_bytes: 0,
            received_bytes: 0,
            sent_segments: 0,
            received_segments: 0,
            retransmitted_segments: 0,
            rtt_us: 0,
            rtt_count: 0,
        };
        let _ = socket_counts.insert(backend, none, u64::from(BPF_NOEXIST));
    }
    // SAFETY: this CPU's own value; it is written by single additions.
    socket_counts.get_ptr_mut(backend).map(|counters| unsafe { &mut *counters })
}

/// Returns what is kept with the connection's socket.
#[inline(always)]
fn followed(
    ops: *mut bpf_sock_ops,
    fresh: Option<&mut Connection>,
) -> Option<&'static mut Connection> {
    // SAFETY: the context is valid while the program runs.
    let socket = unsafe { (*ops).__bindgen_anon_2.sk };
    if socket.is_null() {
        return None;
    }
    let (fresh, flags) = match fresh {
        Some(fresh) => (core::ptr::from_mut(fresh), u64::from(BPF_SK_STORAGE_GET_F_CREATE)),
        None => (null_mut(), 0),
    };
    let map = (&raw const connections).cast_mut();
    // SAFETY: map, socket and value are what the helper takes; the value lives as long as the
    // program runs.
    unsafe {
        bpf_sk_storage_get(map.cast(), socket.cast(), fresh.cast(), flags)
            .cast::<Connection>()
            .as_mut()
    }
}

/// Runs the program.
#[inline(always)]
pub(super) fn run(ops: *mut bpf_sock_ops) -> u32 {
    // SAFETY: the context is valid while the program runs.
    match unsafe { (*ops).op } {
        BPF_SOCK_OPS_TCP_CONNECT_CB => on_connect(ops),
        BPF_SOCK_OPS_STATE_CB => on_state_change(ops),
        BPF_SOCK_OPS_RTT_CB => on_rtt_sample(ops),
        _ => {}
    }
    PROCEED
}

/// Returns the backend that connect() was translated to, as a key of `socket_counts`.
#[inline(always)]
fn backend<F: Maps>(ops: *mut bpf_sock_ops, address: F::Address, port: u16) -> Option<u32> {
    // SAFETY: the context is valid while the program runs.
    let socket = unsafe { (*ops).__bindgen_anon_2.sk };
    if socket.is_null() {
        return None;
    }
    let map = core::ptr::from_ref(F::peer()).cast_mut();
    // SAFETY: map and socket are what the helper takes; the value lives as long as the program
    // runs.
    let peer = unsafe {
        bpf_sk_storage_get(map.cast(), socket.cast(), null_mut(), 0)
            .cast::<Peer<F::Address>>()
            .as_ref()
    }?;
    (peer.backend == address && peer.backend_port == port).then_some(peer.id | F::COUNTER)
}

/// Begins to follow a connection if it was translated.
#[inline(always)]
fn on_connect(ops: *mut bpf_sock_ops) {
    // SAFETY: the context is valid while the program runs; one load a word, it may not be read
    // otherwise.
    let (family, ip4, port, words, flags) = unsafe {
        (
            (*ops).family,
            (&raw const (*ops).remote_ip4).read_volatile(),
            u32::from_be((&raw const (*ops).remote_port).read_volatile()) as u16,
            [
                (&raw const (*ops).remote_ip6[0]).read_volatile(),
                (&raw const (*ops).remote_ip6[1]).read_volatile(),
                (&raw const (*ops).remote_ip6[2]).read_volatile(),
                (&raw const (*ops).remote_ip6[3]).read_volatile(),
            ],
            (*ops).bpf_sock_ops_cb_flags,
        )
    };
    let v4 = if family == AF_INET {
        Some(Ipv4Address { octets: ip4.to_ne_bytes() })
    } else {
        mapped(words)
    };
    let backend = match v4 {
        Some(address) => backend::<V4>(ops, address, port),
        None => backend::<V6>(ops, address_v6(words), port),
    };
    let Some(backend) = backend else {
        // The socket's earlier attempt was translated, this one is not.
        if flags & BPF_SOCK_OPS_STATE_CB_FLAG != 0
            && let Some(connection) = followed(ops, None)
        {
            connection.backend = NOBODY;
        }
        return;
    };
    let mut fresh = Connection {
        sent_bytes: 0,
        received_bytes: 0,
        sent_segments: 0,
        received_segments: 0,
        retransmitted_segments: 0,
        backend,
        seen: now(),
        reserved: 0,
    };
    let Some(connection) = followed(ops, Some(&mut fresh)) else { return };
    // A socket may connect again, even after a failed attempt: the kernel then counts from zero.
    *connection = fresh;
    // Callbacks that other programs at this hook asked for stay on.
    let flags = flags | BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTT_CB_FLAG;
    // SAFETY: the context is valid while the program runs.
    let _ = unsafe { bpf_sock_ops_cb_flags_set(ops, flags as i32) };
}

/// Adds what the kernel has counted for a connection since the last time.
#[inline(always)]
fn count(ops: *mut bpf_sock_ops, connection: &mut Connection, counters: &mut SocketCounters) {
    // SAFETY: the context is valid while the program runs.
    let (sent, received, out, came, again) = unsafe {
        (
            (&raw const (*ops).bytes_acked).read_volatile(),
            (&raw const (*ops).bytes_received).read_volatile(),
            (&raw const (*ops).segs_out).read_volatile(),
            (&raw const (*ops).segs_in).read_volatile(),
            (&raw const (*ops).total_retrans).read_volatile(),
        )
    };
    add(&mut counters.sent_bytes, sent.wrapping_sub(connection.sent_bytes));
    add(&mut counters.received_bytes, received.wrapping_sub(connection.received_bytes));
    add(&mut counters.sent_segments, u64::from(out.wrapping_sub(connection.sent_segments)));
    add(
        &mut counters.received_segments,
        u64::from(came.wrapping_sub(connection.received_segments)),
    );
    add(
        &mut counters.retransmitted_segments,
        u64::from(again.wrapping_sub(connection.retransmitted_segments)),
    );
    connection.sent_bytes = sent;
    connection.received_bytes = received;
    connection.sent_segments = out;
    connection.received_segments = came;
    connection.retransmitted_segments = again;
    connection.seen = now();
}

/// Handles a change of the connection's state.
#[inline(always)]
fn on_state_change(ops: *mut bpf_sock_ops) {
    // SAFETY: the context is valid while the program runs; one load a word.
    let (old, new) = unsafe {
        (
            (&raw const (*ops).__bindgen_anon_1.args[0]).read_volatile(),
            (&raw const (*ops).__bindgen_anon_1.args[1]).read_volatile(),
        )
    };
    if new != BPF_TCP_ESTABLISHED && new != BPF_TCP_CLOSE {
        return;
    }
    let Some(connection) = followed(ops, None) else { return };
    if connection.backend == NOBODY {
        return;
    }
    let Some(counters) = counters(connection.backend) else { return };
    if new == BPF_TCP_ESTABLISHED {
        add(&mut counters.connections, 1);
        return;
    }
    count(ops, connection, counters);
    if old == BPF_TCP_SYN_SENT {
        add(&mut counters.failed, 1);
        // The one segment that ends a handshake is a reset.
        let failure = if connection.received_segments == 0 {
            Failure::SocketUnanswered
        } else {
            Failure::SocketRefused
        };
        count::failure(connection.backend, failure);
        return;
    }
    add(&mut counters.closed, 1);
    if !is_orderly(old) {
        add(&mut counters.resets, 1);
    }
    // SAFETY: the context is valid while the program runs. The kernel keeps eighths.
    let rtt = unsafe { (&raw const (*ops).srtt_us).read_volatile() } >> 3;
    if rtt != 0 {
        add(&mut counters.rtt_us, u64::from(rtt));
        add(&mut counters.rtt_count, 1);
    }
}

/// Reports whether a connection that was in this state ends by a FIN of both sides: it becomes a
/// time-wait socket, or has got the last acknowledgment.
#[inline(always)]
fn is_orderly(old: u32) -> bool {
    matches!(old, BPF_TCP_FIN_WAIT2 | BPF_TCP_CLOSING | BPF_TCP_TIME_WAIT | BPF_TCP_LAST_ACK)
}

/// Handles an acknowledgment of what the connection has sent.
#[inline(always)]
fn on_rtt_sample(ops: *mut bpf_sock_ops) {
    let Some(connection) = followed(ops, None) else { return };
    if connection.backend == NOBODY || now().wrapping_sub(connection.seen) < SAMPLE_TICKS {
        return;
    }
    if let Some(counters) = counters(connection.backend) {
        count(ops, connection, counters);
    }
}
