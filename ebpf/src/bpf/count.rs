//! Counters. A counter that cannot be made or found changes nothing else.

use core::arch::asm;

use aya_ebpf::bindings::BPF_NOEXIST;
use sluice_common::abi::{BackendCounters, FailureKey, ReasonCounters, ReasonKey};
use sluice_common::engine::count::Count;
use sluice_common::packet::parse::Headers;
use sluice_common::path::{Decision, Hook};
use sluice_common::{Failure, Reason};

use super::events::{self, Emit};
use super::maps::{self, Maps};

/// Counts a packet once, by its backend if it followed a flow and otherwise by its reason, and
/// sends an event to whoever listens. A function of its own, so that it has a stack frame to
/// itself.
#[inline(never)]
pub(super) fn packet<F: Emit>(
    decision: &Decision<F>,
    headers: &Headers<F>,
    ifindex: u32,
    hook: Hook,
    is_dropped: bool,
) {
    match Count::of(decision) {
        Count::Nowhere => {}
        Count::Backend { id, direction } => {
            backend::<F>(id, |counters| direction.add(headers, counters));
        }
        Count::Reason { reason, service_port } => {
            self::reason(reason, service_port, headers.length);
        }
    }
    events::packet(decision, headers, ifindex, hook, is_dropped);
}

/// Counts a call that the socket path sent to a backend.
#[inline(always)]
pub(super) fn call<F: Maps>(backend_id: u32) {
    backend::<F>(backend_id, |counters| counters.calls = counters.calls.wrapping_add(1));
}

#[inline(always)]
fn backend<F: Maps>(id: u32, add: impl Fn(&mut BackendCounters)) {
    let key = id | F::COUNTER;
    if let Some(counters) = maps::backend_counts.get_ptr_mut(key) {
        // SAFETY: this CPU's own value; programs on one CPU do not interrupt each other.
        add(unsafe { &mut *counters });
        return;
    }
    let mut counters = BackendCounters {
        forward_packets: 0,
        forward_bytes: 0,
        reply_packets: 0,
        reply_bytes: 0,
        flows: 0,
        calls: 0,
        forward_resets: 0,
        reply_resets: 0,
    };
    add(&mut counters);
    let _ = maps::backend_counts.insert(key, counters, u64::from(BPF_NOEXIST));
}

/// Counts a failure at a backend, a key of `backend_counts`. The addition is atomic because the
/// value is that of all CPUs.
#[inline(always)]
pub(super) fn failure(backend: u32, failure: Failure) {
    let key = FailureKey { backend, failure: failure as u32 };
    if maps::failure_counts.get_ptr_mut(key).is_none() {
        let _ = maps::failure_counts.insert(key, 0, u64::from(BPF_NOEXIST));
    }
    if let Some(count) = maps::failure_counts.get_ptr_mut(key) {
        // SAFETY: the value lives as long as the program runs; it is written by single additions.
        add(unsafe { &mut *count }, 1);
    }
}

/// Adds to a counter in one atomic addition.
#[inline(always)]
pub(super) fn add(counter: &mut u64, more: u64) {
    // SAFETY: one atomic addition to a live, aligned word.
    unsafe {
        asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) core::ptr::from_mut(counter), in(reg) more, options(nostack));
    }
}

/// Counts a packet or call by its reason.
#[inline(always)]
pub(super) fn reason(reason: Reason, service_port: u32, bytes: u32) {
    let key = ReasonKey { reason: reason as u32, service_port };
    if let Some(counters) = maps::reason_counts.get_ptr_mut(key) {
        // SAFETY: as in `backend`.
        let counters = unsafe { &mut *counters };
        counters.packets = counters.packets.wrapping_add(1);
        counters.bytes = counters.bytes.wrapping_add(u64::from(bytes));
        return;
    }
    let counters = ReasonCounters { packets: 1, bytes: u64::from(bytes) };
    let _ = maps::reason_counts.insert(key, counters, u64::from(BPF_NOEXIST));
}
