//! The path's steps as global functions.
//!
//! The verifier checks a global function once and by itself, whatever its callers do. Inlined, or
//! as a static function, the path would be checked anew for every state that reading a packet can
//! end in; that alone exceeded a million instructions.

#![allow(non_upper_case_globals, reason = "a map's name is what `bpftool map` shows")]

use core::ffi::c_void;
use core::ptr::null_mut;

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::helpers::generated::bpf_loop;
use aya_ebpf::macros::btf_map;
use sluice_common::abi::{Ticks, Tuple};
use sluice_common::engine::record::Partner;
use sluice_common::engine::search::{PortSearch, search};
use sluice_common::packet::parse::{Headers, Parse};
use sluice_common::path::{self, Decision, Hook, PORTS, fragment};
use sluice_common::tables::Routes;
use sluice_common::{Family, V4, V6};

use super::clock::now;
use super::maps::Maps;
use super::record;
use super::tables::Kernel;

/// The headers and the decision of a packet, in a map: the stack has no room for them, and kernel
/// 6.1 takes no map key from a global function's argument. Programs that use it run with softirqs
/// off, so that none interrupts another on its CPU.
#[repr(C)]
pub(super) struct Scratch<F: Family> {
    pub(super) headers: Headers<F>,
    pub(super) decision: Decision<F>,
    pub(super) lookups: Lookups,
    /// Space for the entry of the other direction.
    partner: Partner<F>,
}

/// The results of the adapter's lookups, for the path.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Lookups {
    /// Valid if `has_routes` is not zero.
    pub(super) routes: Routes,
    pub(super) has_routes: u32,
    /// Number of source ports to skip: sockets hold them, or may hold them.
    pub(super) ports_to_skip: u32,
    /// The port that a search found, or 0.
    found: u32,
}

impl Lookups {
    /// Returns no results, with a number of source ports to skip.
    pub(super) const fn skipping(ports_to_skip: u32) -> Self {
        Self {
            routes: Routes { to_backend: 0, to_client: 0 },
            has_routes: 0,
            ports_to_skip,
            found: 0,
        }
    }
}

#[btf_map]
static scratch_v4: PerCpuArray<Scratch<V4>, 1> = PerCpuArray::new();
#[btf_map]
static scratch_v6: PerCpuArray<Scratch<V6>, 1> = PerCpuArray::new();

/// A family with global functions that decide and record.
pub(super) trait Decide: Maps + Parse {
    /// Returns this CPU's scratch. A reference to it must not outlive a call of the functions
    /// below, which take their own.
    fn scratch() -> Option<*mut Scratch<Self>>;
    /// Decides about the packet in this CPU's scratch, which is at a device's hook.
    fn decide(ifindex: u32, hook: Hook);
    /// Performs [`path::restrict_foreign`].
    fn restrict_foreign(hook: Hook);
    /// Performs [`path::open_into`].
    fn open(ifindex: u32, hook: Hook);
    /// Performs [`search`] for the decision.
    fn search();
    /// Records the flow of the decision in this CPU's scratch. Returns 0, or the number of the
    /// reason why the packet must not go on.
    fn record() -> u32;
    /// Notes the ports of the first fragment in this CPU's scratch.
    fn note();
}

#[inline(always)]
pub(super) fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Ingress => 0,
        Hook::Egress => 1,
        Hook::Xdp => 2,
    }
}

#[inline(always)]
pub(super) fn hook_of(number: u32) -> Hook {
    match number {
        0 => Hook::Ingress,
        1 => Hook::Egress,
        _ => Hook::Xdp,
    }
}

/// The walk over all source ports, and the table of tuples for which it found none.
struct Ports<'l> {
    /// Receives the port that the loop's steps find.
    found: &'l mut u32,
    /// The loop's body.
    step: extern "C" fn(u32, *mut c_void) -> i64,
}

impl<F: Decide> PortSearch<F> for Ports<'_> {
    #[inline(always)]
    fn now(&self) -> Ticks {
        now()
    }

    #[inline(always)]
    fn failed_at(&self, key: &Tuple<F::Address>) -> Option<Ticks> {
        // SAFETY: entries are plain data, readable under RCU.
        unsafe { F::exhausted().get(key) }.copied()
    }

    #[inline(always)]
    fn set_failed(&mut self, key: &Tuple<F::Address>, at: Ticks) {
        let _ = F::exhausted().insert(key, at, 0);
    }

    #[inline(always)]
    fn walk(&mut self, _: &Decision<F>) -> Option<u16> {
        *self.found = 0;
        // SAFETY: the loop's steps take their own references to this CPU's scratch.
        let port = unsafe {
            let _ = bpf_loop(PORTS, self.step as *mut c_void, null_mut(), 0);
            (&raw const *self.found).read_volatile()
        };
        (port != 0).then_some(port as u16)
    }
}

/// Takes one step of the walk; 1 ends it.
#[inline(always)]
fn try_port<F: Decide>(index: u32) -> i64 {
    let Some(scratch) = F::scratch() else { return 1 };
    // SAFETY: this CPU's own; the search waits for the loop to end.
    let decision = unsafe { &(*scratch).decision };
    let port = path::port_of_step(path::search_start(decision), index);
    if !path::is_free(&Kernel::of(0), decision, port) {
        return 0;
    }
    // SAFETY: as above.
    unsafe { (*scratch).lookups.found = u32::from(port) };
    1
}

macro_rules! global {
    ($family:ident, $decide:ident, $restrict_foreign:ident, $open:ident, $search:ident, $try:ident, $record:ident, $note:ident, $scratch:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $decide(ifindex: u32, hook: u32) -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: this CPU's own; callers hold no reference to it.
            let Scratch { headers, decision, .. } = unsafe { &mut *scratch };
            *decision = Decision::pass(&headers.tuple);
            path::decide_into(hook_of(hook), headers, &Kernel::of(ifindex), decision);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $restrict_foreign(hook: u32) -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: as above.
            let Scratch { headers, decision, .. } = unsafe { &mut *scratch };
            path::restrict_foreign(hook_of(hook), headers, &Kernel::of(0), decision);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $open(ifindex: u32, hook: u32) -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: as above.
            let Scratch { headers, decision, lookups, .. } = unsafe { &mut *scratch };
            path::open_into(
                hook_of(hook),
                headers,
                &Kernel { ifindex, lookups: *lookups },
                decision,
            );
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $search() -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: as above; the loop's steps write `found` alone.
            let Scratch { decision, lookups, .. } = unsafe { &mut *scratch };
            search::<$family, _>(decision, &mut Ports { found: &mut lookups.found, step: $try });
            0
        }

        #[inline(never)]
        extern "C" fn $try(index: u32, _: *mut c_void) -> i64 {
            try_port::<$family>(index)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $record() -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: as above.
            let Scratch { decision, partner, .. } = unsafe { &mut *scratch };
            match record::in_maps(decision, partner) {
                Ok(()) => 0,
                Err(reason) => reason as u32,
            }
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $note() -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // SAFETY: as above.
            let Scratch { headers, decision, .. } = unsafe { &*scratch };
            let ports = fragment::ports(headers, decision, now());
            // Without room, the later fragments go on untouched.
            let _ = <$family as Maps>::fragments().insert(&fragment::key(headers), &ports, 0);
            0
        }

        impl Decide for $family {
            #[inline(always)]
            fn scratch() -> Option<*mut Scratch<Self>> {
                $scratch.get_ptr_mut(0)
            }

            #[inline(always)]
            fn decide(ifindex: u32, hook: Hook) {
                let _ = $decide(ifindex, hook_number(hook));
            }

            #[inline(always)]
            fn restrict_foreign(hook: Hook) {
                let _ = $restrict_foreign(hook_number(hook));
            }

            #[inline(always)]
            fn open(ifindex: u32, hook: Hook) {
                let _ = $open(ifindex, hook_number(hook));
            }

            #[inline(always)]
            fn search() {
                let _ = $search();
            }

            #[inline(always)]
            fn record() -> u32 {
                $record()
            }

            #[inline(always)]
            fn note() {
                let _ = $note();
            }
        }
    };
}

global!(
    V4,
    decide_v4,
    restrict_foreign_v4,
    open_v4,
    search_v4,
    try_port_v4,
    record_v4,
    note_v4,
    scratch_v4
);
global!(
    V6,
    decide_v6,
    restrict_foreign_v6,
    open_v6,
    search_v6,
    try_port_v6,
    record_v6,
    note_v6,
    scratch_v6
);
