//! One run of a program: the steps that tc and XDP programs share.

use core::ffi::c_void;

use sluice_common::engine::open::{Refusal, Steps};
use sluice_common::path::{Decision, Hook, Step};

use super::decide::{Lookups, Scratch};
use super::events::Emit;
use super::fib::{Fib, Origin, look_up_routes};
use super::socket_lookup::{SocketLookup, is_taken_by_socket};

/// The context of a program.
pub(super) trait Context {
    /// Returns the context that the kernel passed.
    fn context(&self) -> *mut c_void;
    /// Returns the hook.
    fn hook(&self) -> Hook;
    /// Returns the index of the hook's device.
    fn ifindex(&self) -> u32;
    /// Returns where the packet comes from, as routing sees it.
    fn origin(&self) -> Origin;
}

/// A run of a program: its packet, with this CPU's scratch.
///
/// The scratch is this CPU's own, and programs that use it do not interrupt each other. References
/// to it live no longer than a borrow of this struct. While one lives, no global function that
/// changes the scratch is called, since those are called by methods that borrow this mutably.
pub(super) struct Run<F: Emit, P> {
    pub(super) packet: P,
    scratch: *mut Scratch<F>,
}

impl<F: Emit, P> Run<F, P> {
    /// Returns the run for a packet whose headers are in this CPU's scratch.
    #[inline(always)]
    pub(super) fn new(packet: P) -> Option<Self> {
        Some(Self { packet, scratch: F::scratch()? })
    }

    /// Returns the scratch.
    #[inline(always)]
    pub(super) fn scratch(&self) -> &Scratch<F> {
        // SAFETY: see [`Run`].
        unsafe { &*self.scratch }
    }

    /// Returns the scratch, to be changed.
    #[inline(always)]
    pub(super) fn scratch_mut(&mut self) -> &mut Scratch<F> {
        // SAFETY: see [`Run`].
        unsafe { &mut *self.scratch }
    }

    /// Returns the packet, to be changed, and the scratch.
    #[inline(always)]
    pub(super) fn split(&mut self) -> (&mut P, &Scratch<F>) {
        // SAFETY: see [`Run`].
        (&mut self.packet, unsafe { &*self.scratch })
    }

    /// Begins to open a flow: sets how many source ports to skip, and forgets the routes.
    #[inline(always)]
    pub(super) fn begin_open(&mut self, ports: u32) {
        self.scratch_mut().lookups = Lookups::skipping(ports);
    }
}

impl<F: Emit + Fib + SocketLookup, P: Context> Steps<F> for Run<F, P> {
    #[inline(always)]
    fn decision(&self) -> &Decision<F> {
        &self.scratch().decision
    }

    #[inline(always)]
    fn set_step(&mut self, step: Step) {
        self.scratch_mut().decision.step = step;
    }

    #[inline(always)]
    fn open(&mut self) {
        F::open(self.packet.ifindex(), self.packet.hook());
    }

    #[inline(always)]
    fn look_up_routes(&mut self) {
        look_up_routes::<F>(self.packet.context(), self.packet.origin());
    }

    #[inline(always)]
    fn search(&mut self) {
        F::search();
    }

    #[inline(always)]
    fn is_taken_by_socket(&mut self) -> bool {
        is_taken_by_socket::<F>(self.packet.context(), self.packet.ifindex(), self.packet.hook())
    }

    #[inline(always)]
    fn skip_one_port(&mut self) {
        let ports_to_skip = &mut self.scratch_mut().lookups.ports_to_skip;
        *ports_to_skip = ports_to_skip.wrapping_add(1);
    }

    #[inline(always)]
    fn record(&mut self) -> Refusal {
        Refusal::from_number(F::record())
    }
}
