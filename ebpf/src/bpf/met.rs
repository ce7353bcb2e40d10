//! A packet that a program meets, in this CPU's scratch: the steps that both kinds of program take.

use core::ffi::c_void;

use sluice_common::engine::open::{Refusal, Steps};
use sluice_common::path::{Decision, Hook, Step};

use super::decide::{Asked, Scratch};
use super::events::Tell;
use super::fib::{Fib, ask};
use super::held::{Held, is_held};

/// What a program knows of its packet.
pub(super) trait Context {
    /// The program's context.
    fn context(&self) -> *mut c_void;
    /// Where the packet is met.
    fn at(&self) -> Hook;
    /// The device that it is met on.
    fn device(&self) -> u32;
    /// The device from which routing sees it come, and its mark.
    fn origin(&self) -> (u32, u32);
}

/// A packet, and what is known and decided of it.
///
/// The scratch is this CPU's own, and programs that use it do not interrupt each other. References
/// to it live no longer than a borrow of this: while one does, no global function that changes the
/// scratch is called, since those are called by methods that borrow it mutably.
pub(super) struct Met<F: Tell, P> {
    pub(super) packet: P,
    scratch: *mut Scratch<F>,
}

impl<F: Tell, P> Met<F, P> {
    /// A packet whose headers are in this CPU's scratch.
    #[inline(always)]
    pub(super) fn new(packet: P) -> Option<Self> {
        Some(Self { packet, scratch: F::scratch()? })
    }

    /// What is known and decided of the packet.
    #[inline(always)]
    pub(super) fn scratch(&self) -> &Scratch<F> {
        // SAFETY: see [`Met`].
        unsafe { &*self.scratch }
    }

    /// As [`Self::scratch`], to be changed.
    #[inline(always)]
    pub(super) fn scratch_mut(&mut self) -> &mut Scratch<F> {
        // SAFETY: see [`Met`].
        unsafe { &mut *self.scratch }
    }

    /// The packet, and what is known and decided of it.
    #[inline(always)]
    pub(super) fn split(&mut self) -> (&mut P, &Scratch<F>) {
        // SAFETY: see [`Met`].
        (&mut self.packet, unsafe { &*self.scratch })
    }

    /// Sets how many source ports are not to be tried, and forgets the routes.
    #[inline(always)]
    pub(super) fn pass_over(&mut self, ports: u32) {
        self.scratch_mut().asked = Asked::passing_over(ports);
    }
}

impl<F: Tell + Fib + Held, P: Context> Steps<F> for Met<F, P> {
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
        F::open(self.packet.device(), self.packet.at());
    }

    #[inline(always)]
    fn ask_routes(&mut self) {
        let (from, mark) = self.packet.origin();
        ask::<F>(self.packet.context(), from, mark);
    }

    #[inline(always)]
    fn search(&mut self) {
        F::search();
    }

    #[inline(always)]
    fn is_held(&mut self) -> bool {
        is_held::<F>(self.packet.context(), self.packet.device(), self.packet.at())
    }

    #[inline(always)]
    fn pass_over_one(&mut self) {
        let passed_over = &mut self.scratch_mut().asked.passed_over;
        *passed_over = passed_over.wrapping_add(1);
    }

    #[inline(always)]
    fn record(&mut self) -> Refusal {
        Refusal::from_number(F::record())
    }
}
