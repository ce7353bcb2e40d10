//! The questions that the packet path may ask of the maps.

use crate::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Flow, Networks,
    OriginKey, Origins, Range, Service, ServiceKey, ServicePort, Settings, Ticks, Tuple,
};
use crate::family::Family;

/// Read access to the maps of one address family.
///
/// The eBPF crate implements it over the kernel's maps; tests, the simulation and `sluice explain`
/// implement it over plain maps.
pub trait Tables<F: Family> {
    /// Returns the bits of [`crate::abi::listing`] for an address.
    fn listing(&self, address: &F::Address) -> u8;
    /// Returns the entry of a proven flow.
    fn flow(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>>;
    /// Returns the entry of a flow that has not been proven yet.
    fn embryonic(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>>;
    /// Returns the bits of [`crate::abi::imported`] if netfilter translates packets of this tuple.
    /// Called only while [`crate::abi::phase::IMPORTED`] is set.
    fn imported(&self, tuple: &Tuple<F::Address>) -> Option<u32>;
    /// Returns the ports that a datagram's first fragment had.
    fn datagram(&self, key: &Datagram<F::Address>) -> Option<&DatagramPorts>;
    /// Returns where a frontend leads.
    fn service(&self, key: &ServiceKey<F::Address>) -> Option<&Service>;
    /// Returns a service port. Its ranges may change while it is read: use [`Self::range`] for
    /// them.
    fn port(&self, service_port: u32) -> Option<&ServicePort>;
    /// Returns the range of slots of a service port for a class of clients.
    fn range(&self, service_port: u32, class: Class) -> Option<Range>;
    /// Returns the backend id in a slot.
    fn slot(&self, slot: u32) -> Option<u32>;
    /// Returns a backend.
    fn backend(&self, id: u32) -> Option<&Backend<F::Address>>;
    /// Returns the affinity of a client of a service port.
    fn affinity(&self, key: &AffinityKey<F::Address>) -> Option<&Affinity>;
    /// Reports whether the source ranges of a service port contain an address.
    fn in_source_ranges(&self, service_port: u32, address: &F::Address) -> bool;
    /// Reports whether any service has this node port, for whatever protocol.
    fn is_node_port(&self, port: u16) -> bool;
    /// Reports whether an address is one of this node's own. Unlike [`Self::listing`] the answer is
    /// exact.
    fn is_node_address(&self, address: &F::Address) -> bool;
    /// Reports whether node ports are served at an address.
    fn serves_node_ports(&self, address: &F::Address) -> bool;
    /// Returns the frontends that lead to an endpoint.
    fn origins(&self, key: &OriginKey<F::Address>) -> Option<&Origins<F::Address>>;
    /// Returns bits of [`crate::path::mark`].
    fn marks(&self) -> u32;
    /// Returns the agent's settings.
    fn settings(&self) -> Option<&Settings>;
    /// Returns the address ranges of the cluster.
    fn networks(&self) -> Option<&Networks<F::Address>>;
    /// Returns a device that programs are attached to.
    fn device(&self, ifindex: u32) -> Option<&Device>;
    /// Returns the device whose hook the packet passes.
    fn hook_device(&self) -> Option<&Device>;
    /// Returns the index of that device, or 0 if there is none.
    fn ifindex(&self) -> u32;
    /// Returns where packets to the backend and to the client of [`crate::path::Decision::flow`]
    /// leave, or `None` if the FIB has not been asked yet; the decision then waits for it.
    fn routes(&self) -> Option<Routes>;
    /// Returns how many source ports to skip, because a socket was found to hold them, or may hold
    /// them unseen.
    fn ports_to_skip(&self) -> u32 {
        0
    }
    /// Reports whether connections of the packet's sender are usually translated at the socket, so
    /// that they are direct on the wire.
    fn translated_at_socket(&self) -> bool {
        false
    }
    /// Returns the time.
    fn now(&self) -> Ticks;
}

/// The devices by which packets leave this node according to the FIB; 0 if there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Routes {
    /// Towards the backend.
    pub to_backend: u32,
    /// Towards the client.
    pub to_client: u32,
}
