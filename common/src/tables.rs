//! The questions that the packet's path may ask of the maps.

use crate::abi::{Backend, Class, Flow, OriginKey, Origins, Range, Service, ServiceKey, Ticks, Tuple};
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
    /// Where a frontend leads.
    fn service(&self, key: &ServiceKey<F::Address>) -> Option<&Service>;
    /// The slots of a service port for a class of clients.
    fn range(&self, service_port: u32, class: Class) -> Option<Range>;
    /// The backend id in a slot.
    fn slot(&self, slot: u32) -> Option<u32>;
    /// A backend.
    fn backend(&self, id: u32) -> Option<&Backend<F::Address>>;
    /// The frontends that lead to an endpoint.
    fn origins(&self, key: &OriginKey<F::Address>) -> Option<&Origins<F::Address>>;
    /// Bits of [`crate::path::mark`].
    fn marks(&self) -> u32;
    /// Whether the packet's device is an edge: its sender is a pod of this node.
    fn inside(&self) -> bool;
    /// Whether the connections of the packet's sender are translated at the socket, so that they are direct on the wire.
    fn translated_at_socket(&self) -> bool {
        false
    }
    /// The time.
    fn now(&self) -> Ticks;
}
