//! The clock of all programs.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use sluice_common::abi::{TICK_SHIFT, Ticks};

/// Added to the time since boot: zero on every node. The kernel tests load the programs with other
/// values, since no namespace changes this clock: a machine that has just booted, and ticks about
/// to wrap.
#[allow(non_upper_case_globals, reason = "a symbol that a loader looks for")]
#[unsafe(no_mangle)]
static clock_offset_ns: u64 = 0;

/// Returns the nanoseconds since boot, to about a scheduler tick.
#[inline(always)]
pub(super) fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions; the static is read volatile, since a loader may set
    // another value.
    unsafe { bpf_ktime_get_coarse_ns().wrapping_add((&raw const clock_offset_ns).read_volatile()) }
}

/// Returns the time in ticks.
#[inline(always)]
pub(super) fn now() -> Ticks {
    (now_ns() >> TICK_SHIFT) as Ticks
}
