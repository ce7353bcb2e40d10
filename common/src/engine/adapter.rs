//! The interface between engine and adapter: a packet, and the host that it is on.

use crate::abi::{Device, Flow, RejectBucket, RejectKey};
use crate::family::Family;
use crate::packet::answer::IcmpError;
use crate::packet::parse::Headers;
use crate::packet::rewrite::Resize;
use crate::path::Hook;

/// The loopback device of every network namespace. A lookup from it is one for this host's own
/// packets that are not bound to a device.
pub const LOOPBACK: u32 = 1;

/// The final treatment of a packet. Devices are named by their index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The next program decides.
    Next,
    /// The packet is dropped.
    Drop,
    /// It leaves by a device unchanged.
    Send(u32),
    /// It enters the stack as if it had come in by a device.
    Receive(u32),
    /// It leaves by a device, to the neighbour that the stack finds for its destination.
    Forward(u32),
    /// It leaves by a device, to the next hop that [`Adapter::forward`] found.
    ForwardTo(u32),
}

/// The link layer's view of an incoming frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Whom the link layer addresses it to.
    pub to: Addressee,
    /// Its VLAN tag, if it has one outside of the frame.
    pub tag: Option<u16>,
}

/// The addressee of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressee {
    /// The device that it came in by.
    Host,
    /// Everybody, or a multicast group.
    Many,
    /// Another host.
    Other,
}

/// A packet's properties besides its addresses that routing depends on.
#[derive(Clone, Copy, Debug)]
pub struct RouteQuery {
    /// The device that it comes from, or [`LOOPBACK`] for this host itself.
    pub ifindex: u32,
    /// Its firewall mark.
    pub fwmark: u32,
    /// Its length with the IP header, or that of a segment of it; 0 if it need not fit.
    pub length: u32,
}

/// A destination by the routing tables.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Out of a device.
    Device(u32),
    /// Nowhere: it exceeds this MTU, of the route or as learned of the path.
    TooBig(u32),
    /// Nowhere, or to this host itself.
    None,
}

/// A forwarded packet's properties that routing depends on.
#[derive(Clone, Copy, Debug)]
pub struct ForwardQuery<A> {
    /// Its source.
    pub source: A,
    /// Its destination.
    pub destination: A,
    /// Source and destination port, host order; zero if it has none.
    pub ports: [u16; 2],
    /// The protocol number in its IP header.
    pub protocol: u8,
    /// TOS, or the traffic class and flow label as they lie in memory.
    pub class: u32,
    /// Everything else.
    pub way: RouteQuery,
}

/// A packet, and the host that it is on. An adapter decides nothing.
pub trait Adapter<F: Family> {
    /// The packet.
    type Frame: Resize;

    /// Returns the packet, to be read.
    fn frame(&self) -> &Self::Frame;
    /// Returns the packet, to be changed.
    fn frame_mut(&mut self) -> &mut Self::Frame;
    /// Returns the hook that the packet passes.
    fn hook(&self) -> Hook;
    /// Returns the length of its link header: 14, or 0 on a device without one.
    fn link(&self) -> u32;
    /// Returns the index of the hook's device.
    fn ifindex(&self) -> u32;
    /// Returns its firewall mark.
    fn fwmark(&self) -> u32;
    /// Returns how many bytes of payload each segment gets if a device cuts the packet, or 0 if it
    /// is not to be cut.
    fn segment_size(&self) -> u32;
    /// Returns how the frame came in.
    fn arrival(&self) -> Arrival;

    /// Returns a device that programs are attached to.
    fn device(&self, ifindex: u32) -> Option<&Device>;
    /// Returns the index of the agent's own device, or 0 if there is none.
    fn own_device(&self) -> u32;
    /// Reports whether an address is one of this node's own.
    fn is_own_address(&self, address: &F::Address) -> bool;
    /// Returns where the routing tables lead a packet.
    fn route(&self, source: &F::Address, destination: &F::Address, way: &RouteQuery) -> Target;
    /// Returns the device by which the stack would forward a packet, and keeps the next hop for
    /// [`Action::ForwardTo`]. Returns `None` if the stack would not forward it, or would do more
    /// than that.
    fn forward(&mut self, packet: &ForwardQuery<F::Address>) -> Option<u32>;
    /// Returns the link-layer address of a neighbour on a device, if it is known and on that
    /// device.
    fn neighbour(
        &self,
        source: &F::Address,
        destination: &F::Address,
        ifindex: u32,
    ) -> Option<[u8; 6]>;
    /// Returns the MTU that the route by a device to a destination carries, or 0 if it carries
    /// none.
    fn route_mtu(&self, destination: &F::Address, ifindex: u32) -> u32;
    /// Returns a device's MTU if the packet, or a segment of it, is larger. The device's link
    /// header has `difference` bytes more than the packet's.
    fn exceeded_mtu(&self, ifindex: u32, difference: i32) -> Option<u32>;
    /// Returns the credit of a client or device for ICMP errors.
    fn bucket(&self, key: &RejectKey) -> Option<RejectBucket>;
    /// Sets the credit of a client or device.
    fn set_bucket(&mut self, key: &RejectKey, bucket: &RejectBucket);
    /// Returns the time in milliseconds.
    fn now_ms(&self) -> u32;

    /// Performs [`rewrite`](crate::packet::rewrite::rewrite) with this packet's headers and the
    /// flow that was decided: the kernel keeps both, and looks at no others.
    fn rewrite(&mut self, headers: &Headers<F>, flow: &Flow<F::Address>) -> bool;
    /// Performs [`write_error`](super::act::write_error) with this packet's headers.
    fn write_error(&mut self, headers: &Headers<F>, error: IcmpError, mtu: u32) -> bool;
    /// Removes VLAN tags that are kept outside of the packet.
    fn take_tags_off(&mut self);
    /// Marks the packet as translated at this side of the stack.
    fn set_translated(&mut self);
    /// Marks the packet as a fragment on its way to the agent.
    fn set_held(&mut self);
}
