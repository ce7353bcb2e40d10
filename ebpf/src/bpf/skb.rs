//! Access to an skb.

use core::arch::asm;
use core::mem::MaybeUninit;

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::{
    bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use sluice_common::Packet;
use sluice_common::packet::checksum::Delta;
use sluice_common::packet::header::Wire;
use sluice_common::packet::rewrite::{Checksum, Edit};

use super::sctp::sctp_updated;

/// A change of IPv6 addresses leaves the sum over the whole packet alone, since no header checksum
/// absorbs it; kernels from 6.16 on must be told.
const BPF_F_IPV6: u64 = 1 << 7;
const EINVAL: i64 = -22;

/// An offset into a packet's headers, with a bound that the verifier sees: the parser looks nowhere
/// near it.
///
/// A mask in Rust the compiler leaves out where a comparison has bounded the offset before; the
/// verifier, with the offset in two registers, knows of that comparison only for the one.
#[inline(always)]
pub(super) fn bounded(offset: u32) -> usize {
    let mut bounded = offset as usize;
    // SAFETY: an instruction on one register.
    unsafe { asm!("{0} &= 4095", inout(reg) bounded, options(pure, nomem, nostack)) };
    bounded
}

/// A packet that the kernel has made an skb of.
pub(super) struct Skb {
    pub(super) skb: *mut __sk_buff,
    pub(super) ipv6: bool,
}

impl Packet for Skb {
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.skb).len }
    }

    #[inline(always)]
    fn read<T: Wire>(&self, offset: u32) -> Option<T> {
        // SAFETY: the context is valid; the verifier knows the two fields as packet pointers.
        let (start, end) = unsafe { ((*self.skb).data as usize, (*self.skb).data_end as usize) };
        let at = start.wrapping_add(bounded(offset));
        if at.wrapping_add(size_of::<T>()) <= end {
            // SAFETY: within the packet, checked above; the machine reads unaligned words.
            return Some(unsafe { *(at as *const T) });
        }
        // Not in the linear part, or beyond the end.
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper writes the whole value or fails.
        unsafe {
            let status = bpf_skb_load_bytes(
                self.skb.cast(),
                offset,
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
            );
            (status == 0).then(|| value.assume_init())
        }
    }
}

impl Skb {
    #[inline(always)]
    fn store_with<T: Wire>(&mut self, offset: u32, value: T, flags: u32) -> bool {
        let size = size_of::<T>() as u32;
        // SAFETY: the helper reads the value and checks the offset.
        unsafe {
            bpf_skb_store_bytes(self.skb, offset, (&raw const value).cast(), size, u64::from(flags))
                == 0
        }
    }
}

impl Edit for Skb {
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
        unsafe { bpf_l3_csum_replace(self.skb, offset, 0, u64::from(delta.fold32()), 0) == 0 }
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
            let family = if self.ipv6 { BPF_F_IPV6 } else { 0 };
            // SAFETY: the helper checks the offset.
            let mut status =
                unsafe { bpf_l4_csum_replace(self.skb, offset, 0, difference, pseudo | family) };
            if self.ipv6 && status == EINVAL {
                // SAFETY: as above. A kernel that does not know the flag.
                status = unsafe { bpf_l4_csum_replace(self.skb, offset, 0, difference, pseudo) };
            }
            if status != 0 {
                return false;
            }
        }
        // SAFETY: the helper checks the offset.
        data.is_zero()
            || unsafe {
                bpf_l4_csum_replace(self.skb, offset, 0, u64::from(data.fold32()), flags) == 0
            }
    }

    #[inline(always)]
    fn sctp_checksum(&mut self, offset: u32, change: u32, length: u32) -> bool {
        let Some(old) = self.read::<u32>(offset) else { return false };
        self.store_unbalanced(offset, sctp_updated(old, change, length))
    }
}
