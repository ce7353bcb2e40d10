//! The path's questions, answered by the maps.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use sluice_common::Tables;
use sluice_common::abi::{
    Backend, Class, Flow, OriginKey, Origins, Range, SLOTS_PER_BLOCK, Service, ServiceKey, TICK_SHIFT, Ticks,
    Tuple, device, socket_path,
};
use sluice_common::family::lane;

use super::maps::{self, Maps};

/// The maps, seen from a device.
pub(super) struct Kernel {
    /// The device that the packet is met on; 0 for calls of sockets.
    pub(super) ifindex: u32,
}

/// The time in ticks.
#[inline(always)]
pub(super) fn now() -> Ticks {
    // SAFETY: the helper has no preconditions.
    (unsafe { bpf_ktime_get_coarse_ns() } >> TICK_SHIFT) as Ticks
}

impl<F: Maps> Tables<F> for Kernel {
    #[inline(always)]
    fn listing(&self, address: &F::Address) -> u8 {
        let (word, shift) = lane::<F>(address);
        match maps::addresses.get(word) {
            Some(lanes) => (*lanes >> shift) as u8 & 15,
            None => 0,
        }
    }

    #[inline(always)]
    fn flow(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        // SAFETY: entries are plain data; one that is evicted meanwhile stays readable under RCU.
        unsafe { F::flows().get(tuple) }
    }

    #[inline(always)]
    fn embryonic(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        // SAFETY: as in `flow`.
        unsafe { F::embryonic().get(tuple) }
    }

    #[inline(always)]
    fn service(&self, key: &ServiceKey<F::Address>) -> Option<&Service> {
        // SAFETY: a value never changes while its key lives.
        unsafe { F::services().get(key) }
    }

    #[inline(always)]
    fn range(&self, service_port: u32, class: Class) -> Option<Range> {
        let port = maps::ports.get_ptr(service_port)?;
        // SAFETY: the element is there; one aligned word is read at once.
        let word = unsafe {
            match class {
                Class::Internal => (&raw const (*port).ranges[0]).read_volatile(),
                Class::ExternalInside => (&raw const (*port).ranges[1]).read_volatile(),
                Class::ExternalOutside => (&raw const (*port).ranges[2]).read_volatile(),
            }
        };
        Some(Range(word))
    }

    #[inline(always)]
    fn slot(&self, slot: u32) -> Option<u32> {
        let block = maps::slots.get(slot / SLOTS_PER_BLOCK)?;
        let ids: *const u32 = block.backends.as_ptr();
        // SAFETY: the index is below the array's sixteen elements.
        Some(unsafe { ids.add((slot % SLOTS_PER_BLOCK) as usize).read() })
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Option<&Backend<F::Address>> {
        F::backends().get(id)
    }

    #[inline(always)]
    fn origins(&self, key: &OriginKey<F::Address>) -> Option<&Origins<F::Address>> {
        // SAFETY: as in `flow`.
        unsafe { F::origins().get(key) }
    }

    #[inline(always)]
    fn marks(&self) -> u32 {
        match maps::marks.get(0) {
            Some(marks) => *marks,
            None => 0,
        }
    }

    #[inline(always)]
    fn inside(&self) -> bool {
        // SAFETY: as in `flow`.
        match unsafe { maps::devices.get(self.ifindex) } {
            Some(device) => device.role == device::EDGE,
            None => false,
        }
    }

    #[inline(always)]
    fn translated_at_socket(&self) -> bool {
        match maps::settings.get(0) {
            Some(settings) => settings.socket_path == socket_path::ALL && <Self as Tables<F>>::inside(self),
            None => false,
        }
    }

    #[inline(always)]
    fn now(&self) -> Ticks {
        now()
    }
}
