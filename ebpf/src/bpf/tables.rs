//! Answers the path's questions from the maps.

use aya_ebpf::btf_maps::lpm_trie::Key;
use sluice_common::Tables;
use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Flow, Networks,
    OriginKey, Origins, Range, SLOTS_PER_BLOCK, Service, ServiceKey, ServicePort, Settings,
    SourceRange, Ticks, Tuple, device, socket_path,
};
use sluice_common::family::lane;
use sluice_common::tables::Routes;

use super::clock;
use super::decide::Lookups;
use super::maps::{self, Maps};

/// The maps, seen from a device.
pub(super) struct Kernel {
    /// The device whose hook the packet passes; 0 for a socket's call.
    pub(super) ifindex: u32,
    /// The results of the adapter's lookups.
    pub(super) lookups: Lookups,
}

impl Kernel {
    /// Returns the maps, seen from a device, before any lookup.
    #[inline(always)]
    pub(super) fn of(ifindex: u32) -> Self {
        Self { ifindex, lookups: Lookups::skipping(0) }
    }
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
    fn imported(&self, tuple: &Tuple<F::Address>) -> Option<u32> {
        // SAFETY: as in `flow`.
        unsafe { F::imported().get(tuple) }.copied()
    }

    #[inline(always)]
    fn datagram(&self, key: &Datagram<F::Address>) -> Option<&DatagramPorts> {
        // SAFETY: as in `flow`.
        unsafe { F::fragments().get(key) }
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
    fn port(&self, service_port: u32) -> Option<&ServicePort> {
        maps::ports.get(service_port)
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey<F::Address>) -> Option<&Affinity> {
        // SAFETY: as in `flow`.
        unsafe { F::affinity().get(key) }
    }

    #[inline(always)]
    fn in_source_ranges(&self, service_port: u32, address: &F::Address) -> bool {
        let data = SourceRange { service_port: service_port.to_be_bytes(), address: *address };
        let bits = const { 8 * size_of::<SourceRange<F::Address>>() as u32 };
        F::source_ranges().get(&Key::new(bits, data)).is_some()
    }

    #[inline(always)]
    fn is_node_port(&self, port: u16) -> bool {
        match maps::node_ports.get(u32::from(port >> 6)) {
            Some(word) => word >> (port & 63) & 1 != 0,
            None => false,
        }
    }

    #[inline(always)]
    fn is_node_address(&self, address: &F::Address) -> bool {
        // SAFETY: as in `flow`.
        unsafe { F::node_addresses().get(address) }.is_some()
    }

    #[inline(always)]
    fn serves_node_ports(&self, address: &F::Address) -> bool {
        // SAFETY: as in `flow`.
        match unsafe { F::node_addresses().get(address) } {
            Some(address) => address.serves_node_ports(),
            None => false,
        }
    }

    #[inline(always)]
    fn settings(&self) -> Option<&Settings> {
        maps::settings.get(0)
    }

    #[inline(always)]
    fn networks(&self) -> Option<&Networks<F::Address>> {
        F::networks().get(0)
    }

    #[inline(always)]
    fn device(&self, ifindex: u32) -> Option<&Device> {
        maps::device(ifindex)
    }

    #[inline(always)]
    fn hook_device(&self) -> Option<&Device> {
        <Self as Tables<F>>::device(self, self.ifindex)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    #[inline(always)]
    fn routes(&self) -> Option<Routes> {
        if self.lookups.has_routes != 0 { Some(self.lookups.routes) } else { None }
    }

    #[inline(always)]
    fn ports_to_skip(&self) -> u32 {
        self.lookups.ports_to_skip
    }

    #[inline(always)]
    fn translated_at_socket(&self) -> bool {
        match maps::settings.get(0) {
            Some(settings)
                if matches!(settings.socket_path, socket_path::ALL | socket_path::MACHINE) =>
            {
                matches!(<Self as Tables<F>>::hook_device(self), Some(here) if here.role == device::EDGE)
            }
            _ => false,
        }
    }

    #[inline(always)]
    fn now(&self) -> Ticks {
        clock::now()
    }
}
