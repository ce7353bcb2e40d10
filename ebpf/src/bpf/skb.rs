//! The skb: access to a packet, and the stack's abilities.

use core::arch::asm;
use core::marker::PhantomData;
use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
    TC_ACT_SHOT, bpf_check_mtu_flags::BPF_MTU_CHK_SEGS, bpf_redir_neigh as NextHop,
};
use aya_ebpf::helpers::generated::{
    bpf_check_mtu, bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect,
    bpf_redirect_neigh, bpf_skb_change_head, bpf_skb_change_tail, bpf_skb_load_bytes,
    bpf_skb_store_bytes, bpf_skb_vlan_pop,
};
use sluice_common::abi::{Device, Flow, RejectBucket, RejectKey};
use sluice_common::engine::adapter::{
    Action, Adapter, Addressee, Arrival, ForwardQuery, RouteQuery, Target,
};
use sluice_common::packet::answer::{IcmpError, QUOTE};
use sluice_common::packet::checksum::Delta;
use sluice_common::packet::header::Wire;
use sluice_common::packet::parse::Headers;
use sluice_common::packet::rewrite::{Checksum, Edit, Resize};
use sluice_common::path::Hook;
use sluice_common::path::fragment::HELD_PRIORITY;
use sluice_common::{Family, Packet};

use super::clock::now_ns;
use super::fib;
use super::maps;
use super::sctp::sctp_updated;
use super::tc::Tc;

/// A change of IPv6 addresses does not change the sum over the whole packet, since no header
/// checksum absorbs it; kernels from 6.16 on have to be told so.
const BPF_F_IPV6: u64 = 1 << 7;
const EINVAL: i64 = -22;
const PACKET_BROADCAST: u32 = 1;
const PACKET_MULTICAST: u32 = 2;
const PACKET_OTHERHOST: u32 = 3;
/// The next program decides: `TCX_NEXT`, `TC_ACT_UNSPEC`.
pub(super) const NEXT: i32 = -1;
const DROP: i32 = TC_ACT_SHOT;

/// Marks of a packet that was translated at ingress, and of one that was at egress. Another
/// device's program may see the packet once more at the same side (a VLAN device's on its parent),
/// where its tuple looks like that of a client that speaks to the backend directly. The IP layer,
/// and a bridge, clear the mark on the way from one side to the other.
pub(super) const DONE: [u32; 2] = [0x5c1c_e001, 0x5c1c_e002];

/// Returns an offset into a packet's headers with a bound that the verifier sees; the parser looks
/// nowhere near it.
///
/// The compiler omits a mask in Rust if a comparison has bounded the offset before. The verifier,
/// with the offset in two registers, applies that comparison to only one of them.
#[inline(always)]
pub(super) fn bounded(offset: u32) -> usize {
    let mut bounded = offset as usize;
    // SAFETY: an instruction on one register.
    unsafe { asm!("{0} &= 4095", inout(reg) bounded, options(pure, nomem, nostack)) };
    bounded
}

/// A packet that the kernel has made an skb of, on a device whose link header has `LINK` bytes.
pub(super) struct Skb<F, const LINK: u32, const EGRESS: bool> {
    pub(super) ctx: *mut __sk_buff,
    /// Written by [`Adapter::forward`].
    next: MaybeUninit<NextHop>,
    family: PhantomData<F>,
}

impl<F, const LINK: u32, const EGRESS: bool> Skb<F, LINK, EGRESS> {
    #[inline(always)]
    pub(super) fn new(ctx: *mut __sk_buff) -> Self {
        Self { ctx, next: MaybeUninit::uninit(), family: PhantomData }
    }

    #[inline(always)]
    #[allow(clippy::unused_self, reason = "a packet has a hook, whatever it follows from")]
    pub(super) fn hook(&self) -> Hook {
        if EGRESS { Hook::Egress } else { Hook::Ingress }
    }

    #[inline(always)]
    pub(super) fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.ctx).ifindex }
    }
}

impl<F, const LINK: u32, const EGRESS: bool> Packet for Skb<F, LINK, EGRESS> {
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.ctx).len }
    }

    #[inline(always)]
    fn read<T: Wire>(&self, offset: u32) -> Option<T> {
        // SAFETY: the context is valid; the verifier knows the two fields as packet pointers.
        let (start, end) = unsafe { ((*self.ctx).data as usize, (*self.ctx).data_end as usize) };
        let at = start.wrapping_add(bounded(offset));
        if at.wrapping_add(size_of::<T>()) <= end {
            // SAFETY: within the packet, checked above; the machine reads unaligned words.
            return Some(unsafe { *(at as *const T) });
        }
        // It is not in the linear part, or beyond the end.
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper writes the whole value or fails.
        unsafe {
            let status = bpf_skb_load_bytes(
                self.ctx.cast(),
                offset,
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
            );
            (status == 0).then(|| value.assume_init())
        }
    }
}

impl<F, const LINK: u32, const EGRESS: bool> Skb<F, LINK, EGRESS> {
    #[inline(always)]
    fn store_with<T: Wire>(&mut self, offset: u32, value: T, flags: u32) -> bool {
        let size = size_of::<T>() as u32;
        // SAFETY: the helper reads the value and checks the offset.
        unsafe {
            bpf_skb_store_bytes(self.ctx, offset, (&raw const value).cast(), size, u64::from(flags))
                == 0
        }
    }
}

impl<F: Family, const LINK: u32, const EGRESS: bool> Edit for Skb<F, LINK, EGRESS> {
    #[inline(always)]
    fn store<T: Wire>(&mut self, offset: u32, value: T) -> bool {
        self.store_with(offset, value, 0)
    }

    #[inline(always)]
    fn store_unbalanced<T: Wire>(&mut self, offset: u32, value: T) -> bool {
        self.store_with(offset, value, BPF_F_RECOMPUTE_CSUM)
    }

    #[inline(always)]
    fn network_checksum(&mut self, offset: u32, delta: Delta) -> bool {
        // SAFETY: the helper checks the offset.
        unsafe { bpf_l3_csum_replace(self.ctx, offset, 0, u64::from(delta.fold32()), 0) == 0 }
    }

    #[inline(always)]
    fn transport_checksum(
        &mut self,
        offset: u32,
        addresses: Delta,
        data: Delta,
        kind: Checksum,
    ) -> bool {
        let flags = match kind {
            Checksum::Plain => 0,
            Checksum::Udp => u64::from(BPF_F_MARK_MANGLED_0),
        };
        if !addresses.is_zero() {
            let difference = u64::from(addresses.fold32());
            let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR);
            let family = if F::VERSION == 6 { BPF_F_IPV6 } else { 0 };
            // SAFETY: the helper checks the offset.
            let mut status =
                unsafe { bpf_l4_csum_replace(self.ctx, offset, 0, difference, pseudo | family) };
            if F::VERSION == 6 && status == EINVAL {
                // SAFETY: as above. A kernel that does not know the flag.
                status = unsafe { bpf_l4_csum_replace(self.ctx, offset, 0, difference, pseudo) };
            }
            if status != 0 {
                return false;
            }
        }
        // SAFETY: the helper checks the offset.
        data.is_zero()
            || unsafe {
                bpf_l4_csum_replace(self.ctx, offset, 0, u64::from(data.fold32()), flags) == 0
            }
    }

    #[inline(always)]
    fn sctp_checksum(&mut self, offset: u32, change: u32, length: u32) -> bool {
        let Some(old) = self.read::<u32>(offset) else { return false };
        self.store_unbalanced(offset, sctp_updated(old, change, length))
    }
}

/// Space for what an ICMP error quotes. It is written before it is read, as far as it is read.
type Quote = MaybeUninit<[u32; QUOTE as usize / 4]>;

impl<F: Family, const LINK: u32, const EGRESS: bool> Resize for Skb<F, LINK, EGRESS> {
    type Quote = Quote;

    #[inline(always)]
    fn grow_head(&mut self, bytes: u32) -> bool {
        // SAFETY: the helper makes room or fails.
        unsafe { bpf_skb_change_head(self.ctx, bytes, 0) == 0 }
    }

    #[inline(always)]
    fn set_length(&mut self, bytes: u32) -> bool {
        // SAFETY: the helper cuts, makes room or fails.
        unsafe { bpf_skb_change_tail(self.ctx, bytes, 0) == 0 }
    }

    #[inline(always)]
    fn room_for_quote() -> Quote {
        Quote::uninit()
    }

    #[inline(always)]
    fn quote(&self, offset: u32, length: u32, into: &mut Quote) -> Option<u64> {
        // SAFETY: the helpers write and then read `length` bytes of the array, which holds as many:
        // the verifier refuses a program that asks for more.
        unsafe {
            let room = into.as_mut_ptr();
            if bpf_skb_load_bytes(self.ctx.cast(), offset, room.cast(), length) != 0 {
                return None;
            }
            let sum = bpf_csum_diff(core::ptr::null_mut(), 0, room.cast(), length, 0);
            Some(u64::from(sum as u32))
        }
    }

    #[inline(always)]
    fn store_quote(&mut self, offset: u32, length: u32, quote: &Quote) -> bool {
        // SAFETY: the helper checks the offset, and reads `length` bytes, which were written: the
        // verifier sees to that too.
        unsafe { bpf_skb_store_bytes(self.ctx, offset, quote.as_ptr().cast(), length, 0) == 0 }
    }
}

impl<F: Tc, const LINK: u32, const EGRESS: bool> Adapter<F> for Skb<F, LINK, EGRESS> {
    type Frame = Self;

    #[inline(always)]
    fn frame(&self) -> &Self {
        self
    }

    #[inline(always)]
    fn frame_mut(&mut self) -> &mut Self {
        self
    }

    #[inline(always)]
    fn hook(&self) -> Hook {
        Self::hook(self)
    }

    #[inline(always)]
    fn link(&self) -> u32 {
        LINK
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        Self::ifindex(self)
    }

    #[inline(always)]
    fn fwmark(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.ctx).mark }
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.ctx).gso_size }
    }

    #[inline(always)]
    fn arrival(&self) -> Arrival {
        arrival(self.ctx)
    }

    #[inline(always)]
    fn device(&self, ifindex: u32) -> Option<&Device> {
        maps::device(ifindex)
    }

    #[inline(always)]
    fn own_device(&self) -> u32 {
        maps::own_device()
    }

    #[inline(always)]
    fn is_own_address(&self, address: &F::Address) -> bool {
        // SAFETY: entries are plain data, readable under RCU.
        unsafe { F::node_addresses().get(address) }.is_some()
    }

    #[inline(always)]
    fn route(&self, source: &F::Address, destination: &F::Address, way: &RouteQuery) -> Target {
        fib::route::<F>(self.ctx.cast(), source, destination, *way)
    }

    #[inline(always)]
    fn forward(&mut self, packet: &ForwardQuery<F::Address>) -> Option<u32> {
        // SAFETY: plain integers: zero is a value.
        let next = self.next.write(unsafe { core::mem::zeroed() });
        fib::forward::<F>(self.ctx.cast(), packet, next)
    }

    #[inline(always)]
    fn neighbour(
        &self,
        source: &F::Address,
        destination: &F::Address,
        ifindex: u32,
    ) -> Option<[u8; 6]> {
        fib::neighbour::<F>(self.ctx.cast(), source, destination, ifindex)
    }

    #[inline(always)]
    fn route_mtu(&self, destination: &F::Address, ifindex: u32) -> u32 {
        F::route_mtu(destination, ifindex)
    }

    #[inline(always)]
    fn exceeded_mtu(&self, ifindex: u32, difference: i32) -> Option<u32> {
        let mut mtu = 0_u32;
        let flags = u64::from(BPF_MTU_CHK_SEGS);
        // SAFETY: the helper writes the MTU.
        let status =
            unsafe { bpf_check_mtu(self.ctx.cast(), ifindex, &raw mut mtu, difference, flags) };
        (status > 0).then_some(mtu)
    }

    #[inline(always)]
    fn bucket(&self, key: &RejectKey) -> Option<RejectBucket> {
        // SAFETY: entries are plain data, readable under RCU.
        unsafe { maps::rejects.get(key) }.copied()
    }

    #[inline(always)]
    fn set_bucket(&mut self, key: &RejectKey, bucket: &RejectBucket) {
        let _ = maps::rejects.insert(key, bucket, 0);
    }

    #[inline(always)]
    fn now_ms(&self) -> u32 {
        (now_ns() / 1_000_000) as u32
    }

    #[inline(always)]
    fn rewrite(&mut self, _: &Headers<F>, _: &Flow<F::Address>) -> bool {
        // Both are in this CPU's scratch.
        F::translate(self.ctx)
    }

    #[inline(always)]
    fn write_error(&mut self, _: &Headers<F>, error: IcmpError, mtu: u32) -> bool {
        F::write_error(self.ctx, error, mtu)
    }

    #[inline(always)]
    fn take_tags_off(&mut self) {
        for _ in 0..2 {
            // SAFETY: the context is valid while the program runs; the helper takes the tag beside
            // the packet, and puts the next one there.
            unsafe {
                if (*self.ctx).vlan_present == 0 {
                    return;
                }
                let _ = bpf_skb_vlan_pop(self.ctx);
            }
        }
    }

    #[inline(always)]
    fn set_translated(&mut self) {
        let [ingress, egress] = DONE;
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.ctx).cb[0] = if EGRESS { egress } else { ingress } };
    }

    #[inline(always)]
    fn set_held(&mut self) {
        // SAFETY: the context is valid while the program runs.
        unsafe {
            (*self.ctx).mark = 0;
            (*self.ctx).priority = HELD_PRIORITY;
        }
    }
}

impl<F: Tc, const LINK: u32, const EGRESS: bool> Skb<F, LINK, EGRESS> {
    /// Performs an action, and returns the program's return value.
    #[inline(always)]
    pub(super) fn end(&mut self, action: Action) -> i32 {
        let to = (&raw mut self.next).cast();
        // SAFETY: the helpers have no preconditions, but for the next hop, which
        // [`Adapter::forward`] has written where the engine asks for it.
        let status = unsafe {
            match action {
                Action::Next => return NEXT,
                Action::Drop => return DROP,
                Action::Send(device) => bpf_redirect(device, 0),
                Action::Receive(device) => bpf_redirect(device, u64::from(BPF_F_INGRESS)),
                Action::Forward(device) => bpf_redirect_neigh(device, core::ptr::null_mut(), 0, 0),
                // The helper finds the next hop itself if the device's own routes lead there.
                Action::ForwardTo(device) if self.next.assume_init_ref().nh_family == 0 => {
                    bpf_redirect_neigh(device, core::ptr::null_mut(), 0, 0)
                }
                Action::ForwardTo(device) => {
                    bpf_redirect_neigh(device, to, size_of::<NextHop>() as i32, 0)
                }
            }
        };
        status as i32
    }
}

/// Returns how a packet came in.
#[inline(always)]
pub(super) fn arrival(skb: *mut __sk_buff) -> Arrival {
    // SAFETY: the context is valid while the program runs.
    let (kind, has_tag, tag) =
        unsafe { ((*skb).pkt_type, (*skb).vlan_present != 0, (*skb).vlan_tci) };
    let to = match kind {
        PACKET_BROADCAST | PACKET_MULTICAST => Addressee::Many,
        PACKET_OTHERHOST => Addressee::Other,
        _ => Addressee::Host,
    };
    Arrival { to, tag: has_tag.then_some(tag as u16) }
}
