//! The path and its records as global functions.
//!
//! The verifier checks a global function once and by itself, whatever its callers do. Inlined, or as
//! a static function, the path would be checked anew for every state that reading a packet can
//! end in; that alone exceeded a million instructions.

#![allow(non_upper_case_globals, reason = "a map's name is what `bpftool map` shows")]

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::macros::btf_map;
use sluice_common::parse::{Headers, Parse};
use sluice_common::path::{Decision, Hook, decide_into};
use sluice_common::{Family, V4, V6};

use super::maps::Maps;
use super::record;
use super::tables::Kernel;

/// What is known and decided of a packet, in a map: the stack has no room for it, and kernel 6.1 takes no
/// map key from a global function's argument. Programs that use it run with softirqs off, so that none
/// interrupts another on its CPU.
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
    /// This CPU's scratch. A reference to it must not outlive a call of `decide` or `record`, which take their own.
    fn scratch() -> Option<*mut Scratch<Self>>;
    /// Decides about the packet in this CPU's scratch, met on a device.
    fn decide(ifindex: u32, hook: Hook);
    /// Records the flow of the decision in this CPU's scratch; 0, or the number of the reason why
    /// the packet must not go on.
    fn record() -> u32;
}

macro_rules! global {
    ($family:ident, $decide:ident, $record:ident, $scratch:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $decide(ifindex: u32, hook: u32) -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: this CPU's own; callers hold no reference to it.
            let Scratch { headers, decision } = unsafe { &mut *scratch };
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
        extern "C" fn $record() -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: as above.
            match record::record(unsafe { &(*scratch).decision }) {
                Ok(()) => 0,
                Err(reason) => reason as u32,
            }
        }

        impl Decide for $family {
            #[inline(always)]
            fn scratch() -> Option<*mut Scratch<Self>> {
                $scratch.get_ptr_mut(0)
            }

            #[inline(always)]
            fn decide(ifindex: u32, hook: Hook) {
                let hook = match hook {
                    Hook::Ingress => 0,
                    Hook::Egress => 1,
                    Hook::Xdp => 2,
                };
                let _ = $decide(ifindex, hook);
            }

            #[inline(always)]
            fn record() -> u32 {
                $record()
            }
        }
    };
}

global!(V4, decide_v4, record_v4, scratch_v4);
global!(V6, decide_v6, record_v6, scratch_v6);
