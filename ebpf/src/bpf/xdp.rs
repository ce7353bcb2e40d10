//! The XDP adapter. It takes only what it can finish, which is a packet from outside for a backend
//! on this node, and leaves everything else unmodified to tc.

use core::ffi::c_void;

use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::helpers::generated::bpf_xdp_adjust_meta;
use sluice_common::abi::Flow;
use sluice_common::engine;
use sluice_common::engine::xdp::{Fate, XdpProgram};
use sluice_common::packet::checksum::Delta;
use sluice_common::packet::header::{EthernetHeader, Wire};
use sluice_common::packet::parse::{self, Headers};
use sluice_common::packet::rewrite::{Checksum, Edit, segment};
use sluice_common::path::Hook;
use sluice_common::{Family, Packet, Reason, V4, V6};

use super::count;
use super::decide::{Decide, Scratch};
use super::events::Emit;
use super::fib::{Fib, Origin, has_foreign_source};
use super::maps;
use super::run::{Context, Run};
use super::sctp::sctp_updated;
use super::skb::bounded;
use super::socket_lookup::SocketLookup;

/// Mark in front of a frame that XDP has translated, so that tc leaves it alone.
pub(super) const XDP_DONE: u32 = 0x5c1c_e003;

/// A frame as the driver received it.
struct Frame {
    ctx: *mut xdp_md,
}

impl Frame {
    /// Returns a pointer to a value within the frame.
    #[inline(always)]
    fn at<T>(&self, offset: u32) -> Option<*mut T> {
        // SAFETY: the context is valid while the program runs.
        let (start, end) = unsafe { ((*self.ctx).data as usize, (*self.ctx).data_end as usize) };
        let at = start.wrapping_add(bounded(offset));
        (at.wrapping_add(size_of::<T>()) <= end).then_some(at as *mut T)
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.ctx).data_end.wrapping_sub((*self.ctx).data) }
    }

    #[inline(always)]
    fn read<T: Wire>(&self, offset: u32) -> Option<T> {
        // SAFETY: within the frame; the machine reads unaligned words.
        self.at::<T>(offset).map(|value| unsafe { *value })
    }
}

impl Edit for Frame {
    #[inline(always)]
    fn store<T: Wire>(&mut self, offset: u32, value: T) -> bool {
        let Some(place) = self.at::<T>(offset) else { return false };
        // SAFETY: within the frame; the machine writes unaligned words.
        unsafe { *place = value };
        true
    }

    #[inline(always)]
    fn store_unbalanced<T: Wire>(&mut self, offset: u32, value: T) -> bool {
        self.store(offset, value)
    }

    #[inline(always)]
    fn network_checksum(&mut self, offset: u32, delta: Delta) -> bool {
        let Some(old) = self.read::<u16>(offset) else { return false };
        self.store(offset, delta.apply(old))
    }

    #[inline(always)]
    fn transport_checksum(
        &mut self,
        offset: u32,
        addresses: Delta,
        data: Delta,
        kind: Checksum,
    ) -> bool {
        let Some(old) = self.read::<u16>(offset) else { return false };
        let delta = addresses.and(data);
        let new = match kind {
            Checksum::Plain => delta.apply(old),
            Checksum::Udp => delta.apply_udp(old),
        };
        self.store(offset, new)
    }

    #[inline(always)]
    fn sctp_checksum(&mut self, offset: u32, change: u32, length: u32) -> bool {
        let Some(old) = self.read::<u32>(offset) else { return false };
        self.store_unbalanced(offset, sctp_updated(old, change, length))
    }
}

/// Runs the XDP program.
#[inline(always)]
pub(super) fn run(ctx: *mut xdp_md) -> u32 {
    let frame = Frame { ctx };
    let Some(header) = frame.read::<EthernetHeader>(0) else {
        return xdp_action::XDP_PASS;
    };
    let Some((ethertype, offset)) = parse::untag(&frame, u16::from_be(header.ethertype), 14) else {
        return xdp_action::XDP_PASS;
    };
    match ethertype {
        V4::ETHERTYPE => frame_of::<V4>(ctx, offset),
        V6::ETHERTYPE => frame_of::<V6>(ctx, offset),
        _ => xdp_action::XDP_PASS,
    }
}

/// A family with global functions that read frames: they have stack frames to themselves, and the
/// compiler may not take the context apart on the way to them.
trait Xdp: Emit + Fib + SocketLookup {
    /// Reads the frame into this CPU's scratch. Returns 0 if it is too short.
    fn read(ctx: *mut xdp_md, offset: u32) -> u32;
    /// Reports whether the source of the frame in this CPU's scratch does not belong to the device
    /// that it came in by.
    fn has_foreign_source(ctx: *mut xdp_md, ifindex: u32) -> bool;
}

macro_rules! family {
    ($family:ident, $read:ident, $source:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $source(ctx: *mut xdp_md, ifindex: u32) -> u32 {
            let from = Origin { ifindex, fwmark: 0 };
            u32::from(has_foreign_source::<$family>(ctx.cast(), from, Hook::Xdp))
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $read(ctx: *mut xdp_md, offset: u32) -> u32 {
            let Some(scratch) = <$family as Decide>::scratch() else { return 0 };
            // Behind the black box the compiler uses the masked value, whose bounds the verifier
            // knows.
            let offset = core::hint::black_box(offset & 0xfff);
            // SAFETY: this CPU's own; the caller holds no reference to it.
            let headers = unsafe { &mut (*scratch).headers };
            *headers = Headers::default();
            u32::from(parse::headers_into(&Frame { ctx }, offset, headers))
        }

        impl Xdp for $family {
            #[inline(always)]
            fn read(ctx: *mut xdp_md, offset: u32) -> u32 {
                $read(ctx, offset)
            }

            #[inline(always)]
            fn has_foreign_source(ctx: *mut xdp_md, ifindex: u32) -> bool {
                $source(ctx, ifindex) != 0
            }
        }
    };
}

family!(V4, xdp_read_v4, xdp_source_v4);
family!(V6, xdp_read_v6, xdp_source_v6);

#[inline(never)]
fn frame_of<F: Xdp>(ctx: *mut xdp_md, offset: u32) -> u32 {
    if F::read(ctx, offset) == 0 {
        return xdp_action::XDP_PASS;
    }
    let Some(mut run) = Run::<F, _>::new(Frame { ctx }) else { return xdp_action::XDP_PASS };
    match engine::xdp::run(&mut run) {
        Fate::Pass => xdp_action::XDP_PASS,
        Fate::Drop => xdp_action::XDP_DROP,
    }
}

impl Context for Frame {
    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.ctx.cast()
    }

    #[inline(always)]
    fn hook(&self) -> Hook {
        Hook::Xdp
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn origin(&self) -> Origin {
        Origin { ifindex: self.ifindex(), fwmark: 0 }
    }
}

impl<F: Xdp> XdpProgram<F> for Run<F, Frame> {
    #[inline(always)]
    fn decide(&mut self) {
        F::decide(self.packet.ifindex(), Hook::Xdp);
    }

    #[inline(always)]
    fn has_foreign_source(&self) -> bool {
        F::has_foreign_source(self.packet.ctx, self.packet.ifindex())
    }

    #[inline(always)]
    fn begin(&mut self) {
        self.begin_open(0);
    }

    #[inline(always)]
    fn headers(&self) -> &Headers<F> {
        &self.scratch().headers
    }

    #[inline(always)]
    fn is_addressed_here(&self) -> bool {
        let Some(link) = self.packet.read::<EthernetHeader>(0) else { return false };
        matches!(maps::device(self.packet.ifindex()), Some(here) if here.mac == link.destination)
    }

    #[inline(always)]
    fn mark_translated(&mut self) -> bool {
        mark_done(self.packet.ctx)
    }

    #[inline(always)]
    fn unmark_translated(&mut self) {
        unmark(self.packet.ctx);
    }

    #[inline(always)]
    fn note(&mut self) {
        F::note();
    }

    #[inline(always)]
    fn translate(&mut self) -> bool {
        let Scratch { headers, decision, .. } = self.scratch();
        translate(self.packet.ctx, headers, &decision.flow)
    }

    #[inline(always)]
    fn set_reason(&mut self, reason: Reason) {
        self.scratch_mut().decision.reason = reason;
    }

    #[inline(always)]
    fn count(&mut self, is_dropped: bool) {
        let Scratch { headers, decision, .. } = self.scratch();
        count::packet(decision, headers, self.packet.ifindex(), Hook::Xdp, is_dropped);
    }
}

/// Puts [`XDP_DONE`] in front of the frame. Returns false if the driver has no room for it.
#[inline(always)]
fn mark_done(ctx: *mut xdp_md) -> bool {
    // SAFETY: the helper makes room or fails; the word is written within it.
    unsafe {
        if bpf_xdp_adjust_meta(ctx, (size_of::<u32>() as i32).wrapping_neg()) != 0 {
            return false;
        }
        let (mark, end) = ((*ctx).data_meta as usize, (*ctx).data as usize);
        if mark.wrapping_add(size_of::<u32>()) > end {
            return false;
        }
        *(mark as *mut u32) = XDP_DONE;
    }
    true
}

/// Removes what [`mark_done`] put there.
#[inline(always)]
fn unmark(ctx: *mut xdp_md) {
    // SAFETY: the helper has no preconditions; it fails where there is nothing.
    let _ = unsafe { bpf_xdp_adjust_meta(ctx, size_of::<u32>() as i32) };
}

/// Rewrites the packet. A function of its own, so that it has a stack frame to itself.
#[inline(never)]
fn translate<F: Xdp>(ctx: *mut xdp_md, headers: &Headers<F>, flow: &Flow<F::Address>) -> bool {
    segment(&mut Frame { ctx }, headers, flow)
}
