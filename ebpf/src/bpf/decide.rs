//! The path and its records as global functions.
//!
//! The verifier checks a global function once and by itself, whatever its callers do. Inlined, or as
//! a static function, the path would be checked anew for every state that reading a packet can
//! end in; that alone exceeded a million instructions.

#![allow(non_upper_case_globals, reason = "a map's name is what `bpftool map` shows")]

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::macros::btf_map;
use sluice_common::path::{Decision, Hook, decide_into};
use sluice_common::parse::{Headers, Parse};
use sluice_common::{Family, V4, V6};

use super::maps::Maps;
use super::record;
use super::tables::Kernel;

/// What is known and decided of a packet, in a map: the stack has no room for it. Programs that use
/// it run with softirqs off, so that none interrupts another on its CPU.
#[repr(C)]
pub(super) struct Scratch<F: Family> {
    pub(super) headers: Headers<F>,
    pub(super) decision: Decision<F>,
}

#[btf_map]
static scratch_v4: PerCpuArray<Scratch<V4>, 1> = PerCpuArray::new();
#[btf_map]
static scratch_v6: PerCpuArray<Scratch<V6>, 1> = PerCpuArray::new();

/// A family whose decisions are made and recorded by global functions.
pub(super) trait Decide: Maps + Parse {
    /// This CPU's scratch.
    fn scratch() -> Option<&'static mut Scratch<Self>>;
    /// Decides about a packet met on a device; whatever the decision was before is overwritten.
    fn decide(ifindex: u32, hook: Hook, headers: &Headers<Self>, decision: &mut Decision<Self>);
    /// Records the decision's flow; 0, or the number of the reason why the packet must not go on.
    fn record(decision: &Decision<Self>) -> u32;
}

macro_rules! global {
    ($family:ident, $decide:ident, $record:ident, $scratch:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $decide(
            ifindex: u32,
            hook: u32,
            headers: *const Headers<$family>,
            decision: *mut Decision<$family>,
        ) -> u32 {
            // SAFETY: callers pass references; the verifier wants to see that they are not null.
            let (Some(headers), Some(decision)) =
                (unsafe { headers.as_ref() }, unsafe { decision.as_mut() })
            else {
                return 0;
            };
            let hook = match hook {
                0 => Hook::Ingress,
                1 => Hook::Egress,
                _ => Hook::Xdp,
            };
            *decision = Decision::pass(&headers.tuple);
            decide_into(hook, headers, &Kernel { ifindex }, decision);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $record(decision: *const Decision<$family>) -> u32 {
            // SAFETY: as above.
            let Some(decision) = (unsafe { decision.as_ref() }) else { return 0 };
            match record::record(decision) {
                Ok(()) => 0,
                Err(reason) => reason as u32,
            }
        }

        impl Decide for $family {
            #[inline(always)]
            fn scratch() -> Option<&'static mut Scratch<Self>> {
                // SAFETY: this CPU's own, and nothing else uses it while the program runs.
                $scratch.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
            }

            #[inline(always)]
            fn decide(
                ifindex: u32,
                hook: Hook,
                headers: &Headers<Self>,
                decision: &mut Decision<Self>,
            ) {
                let hook = match hook {
                    Hook::Ingress => 0,
                    Hook::Egress => 1,
                    Hook::Xdp => 2,
                };
                let _ = $decide(ifindex, hook, headers, decision);
            }

            #[inline(always)]
            fn record(decision: &Decision<Self>) -> u32 {
                $record(decision)
            }
        }
    };
}

global!(V4, decide_v4, record_v4, scratch_v4);
global!(V6, decide_v6, record_v6, scratch_v6);
