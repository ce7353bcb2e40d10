//! The questions that the packet's path may ask of the maps.

use crate::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Flow, Networks,
    OriginKey, Origins, Range, Service, ServiceKey, ServicePort, Settings, Ticks, Tuple,
};
use crate::family::Family;

/// Read access to the maps of one address family.
///
/// Implemented over the kernel's maps in the eBPF crate, and over plain maps on the host.
pub trait Tables<F: Family> {
    /// The bits of [`crate::abi::listing`] for an address.
    fn listing(&self, address: &F::Address) -> u8;
    /// The entry of a proven flow.
    fn flow(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>>;
    /// The entry of a flow that nothing has proven so far.
    fn embryonic(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>>;
    /// The bits of [`crate::abi::imported`] if a packet of this tuple is netfilter's to translate;
    /// asked only while [`crate::abi::phase::IMPORTED`] is set.
    fn imported(&self, tuple: &Tuple<F::Address>) -> Option<u32>;
    /// What a datagram's first fragment has told.
    fn datagram(&self, key: &Datagram<F::Address>) -> Option<&DatagramPorts>;
    /// Where a frontend leads.
    fn service(&self, key: &ServiceKey<F::Address>) -> Option<&Service>;
    /// A service port; its ranges may change while it is read, so ask [`Self::range`] for them.
    fn port(&self, service_port: u32) -> Option<&ServicePort>;
    /// The slots of a service port for a class of clients.
    fn range(&self, service_port: u32, class: Class) -> Option<Range>;
    /// The backend id in a slot.
    fn slot(&self, slot: u32) -> Option<u32>;
    /// A backend.
    fn backend(&self, id: u32) -> Option<&Backend<F::Address>>;
    /// Where a client of a service port has been.
    fn affinity(&self, key: &AffinityKey<F::Address>) -> Option<&Affinity>;
    /// Whether the source ranges of a service port hold an address.
    fn in_source_ranges(&self, service_port: u32, address: &F::Address) -> bool;
    /// Whether some service has this node port, of whatever protocol.
    fn is_node_port(&self, port: u16) -> bool;
    /// Whether an address is one of this node's own, whatever the lane says that it shares with
    /// others.
    fn is_node_address(&self, address: &F::Address) -> bool;
    /// Whether node ports are served at an address.
    fn serves_node_ports(&self, address: &F::Address) -> bool;
    /// The frontends that lead to an endpoint.
    fn origins(&self, key: &OriginKey<F::Address>) -> Option<&Origins<F::Address>>;
    /// Bits of [`crate::path::mark`].
    fn marks(&self) -> u32;
    /// What the agent has told.
    fn settings(&self) -> Option<&Settings>;
    /// Address ranges of the cluster.
    fn networks(&self) -> Option<&Networks<F::Address>>;
    /// A device that programs are attached to.
    fn device(&self, ifindex: u32) -> Option<&Device>;
    /// The device that the packet is met on.
    fn hook_device(&self) -> Option<&Device>;
    /// The index of that device; 0: none.
    fn ifindex(&self) -> u32;
    /// Where packets to the backend and to the client of [`crate::path::Decision::flow`] leave;
    /// `None`: nobody has asked the FIB so far, and the decision waits for that.
    fn routes(&self) -> Option<Routes>;
    /// How many source ports to pass over: those that a socket was found to hold, or may hold
    /// unseen.
    fn ports_to_skip(&self) -> u32 {
        0
    }
    /// Whether connections of the packet's sender are translated at the socket as a rule, so that
    /// they are direct on the wire.
    fn translated_at_socket(&self) -> bool {
        false
    }
    /// The time.
    fn now(&self) -> Ticks;
}

/// The devices by which packets leave this node, as the FIB has it; 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Routes {
    /// Towards the backend.
    pub to_backend: u32,
    /// Towards the client.
    pub to_client: u32,
}
