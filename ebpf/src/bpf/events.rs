//! Sends events to whoever listens. It is called only where a packet or call is slow anyway: for a
//! flow's first packets, and for what is counted by its reason.

#![allow(non_upper_case_globals, reason = "a map's name is what `bpftool map` shows")]

use aya_ebpf::btf_maps::{Array, PerCpuArray, RingBuf};
use aya_ebpf::helpers::bpf_get_current_comm;
use aya_ebpf::helpers::generated::{bpf_get_current_pid_tgid, bpf_ktime_get_ns};
use aya_ebpf::macros::btf_map;
use sluice_common::abi::{EVENTS_BYTES, Event, Flow, Listening, Tuple};
use sluice_common::event::{self, At, Fate, Kind, Wide};
use sluice_common::packet::parse::Headers;
use sluice_common::path::{Decision, Hook};
use sluice_common::{Reason, V4, V6};

use super::clock::now_ns;
use super::decide::{Decide, Scratch, hook_number, hook_of};

#[btf_map]
static events: RingBuf<Event, { EVENTS_BYTES as usize }> = RingBuf::new();
#[btf_map]
static listening: Array<Listening, 1> = Array::new();
/// Events for which the ring buffer had no room.
#[btf_map]
static events_lost: PerCpuArray<u64, 1> = PerCpuArray::new();
/// A packet's event while it is written: the stack has no room for it.
#[btf_map]
static event_scratch: PerCpuArray<Event, 1> = PerCpuArray::new();

/// Returns the listener's filter, if anybody listens. Without a listener one word is read; if the
/// listener was killed, the clock too.
#[inline(always)]
fn listener() -> Option<&'static Listening> {
    let filter = listening.get(0)?;
    (filter.until_ns != 0 && filter.is_active(now_ns())).then_some(filter)
}

/// Puts an event into the ring buffer if it passes the filter.
#[inline(always)]
fn emit(filter: &Listening, event: &mut Event) {
    if !filter.matches(event) {
        return;
    }
    // SAFETY: the helper has no preconditions.
    event.time_ns = unsafe { bpf_ktime_get_ns() };
    if events.output(&*event, 0).is_err()
        && let Some(lost) = events_lost.get_ptr_mut(0)
    {
        // SAFETY: this CPU's own. A call that is interrupted here may lose the count of one more.
        unsafe { *lost = (*lost).wrapping_add(1) };
    }
}

/// A family with a global function that sends packets' events (see `decide`).
pub(super) trait Emit: Decide {
    /// Sends the event of the packet in this CPU's scratch, which is at a device's hook.
    fn emit(ifindex: u32, hook: Hook, dropped: bool);
}

/// Sends a packet's event, if it is one and anybody listens.
#[inline(always)]
pub(super) fn packet<F: Emit>(
    decision: &Decision<F>,
    headers: &Headers<F>,
    ifindex: u32,
    hook: Hook,
    dropped: bool,
) {
    if event::kind(decision, headers).is_some() && listener().is_some() {
        F::emit(ifindex, hook, dropped);
    }
}

macro_rules! global {
    ($family:ident, $emit:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $emit(ifindex: u32, hook: u32, dropped: u32) -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            let Some(filter) = listener() else { return 0 };
            let Some(place) = event_scratch.get_ptr_mut(0) else { return 0 };
            // SAFETY: this CPU's own; callers hold references that only read.
            let Scratch { headers, decision, .. } = unsafe { &*scratch };
            let Some(kind) = event::kind(decision, headers) else { return 0 };
            // SAFETY: this CPU's own; nothing else takes a reference here.
            let event = unsafe { &mut *place };
            event.kind = kind as u8;
            event.at = At::from(hook_of(hook)) as u8;
            event.ifindex = ifindex;
            event::packet(event, headers, decision, event::fate(decision.verdict, dropped != 0));
            emit(filter, event);
            0
        }

        impl Emit for $family {
            #[inline(always)]
            fn emit(ifindex: u32, hook: Hook, dropped: bool) {
                let _ = $emit(ifindex, hook_number(hook), u32::from(dropped));
            }
        }
    };
}

global!(V4, emit_v4);
global!(V6, emit_v6);

/// Sends the event of a process's call, if anybody listens. The event is on the stack, since one
/// process may interrupt another here.
#[inline(always)]
pub(super) fn call<F: Wide>(
    at: At,
    reason: Reason,
    fate: Fate,
    protocol: u8,
    before: &Flow<F::Address>,
    after: &Flow<F::Address>,
) {
    let Some(filter) = listener() else { return };
    let mut event = Event::default();
    let before = Tuple {
        source: before.source,
        destination: before.destination,
        source_port: before.source_port,
        destination_port: before.destination_port,
        protocol,
        side: 0,
        reserved: [0; 2],
    };
    event::tuples::<F>(&mut event, &before, after);
    event.kind = Kind::Call as u8;
    event.at = at as u8;
    event.reason = reason as u8;
    event.fate = fate as u8;
    // SAFETY: the helper has no preconditions. The upper half is the process, the lower one its
    // thread.
    event.process = (unsafe { bpf_get_current_pid_tgid() } >> 32) as u32;
    if let Ok(command) = bpf_get_current_comm() {
        event.command = command;
    }
    emit(filter, &mut event);
}
