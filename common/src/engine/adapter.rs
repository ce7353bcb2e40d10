//! What an adapter lends the engine: a packet, and the host that it is met on.

use crate::abi::{Device, Flow, RejectBucket, RejectKey};
use crate::family::Family;
use crate::packet::answer::IcmpError;
use crate::packet::parse::Headers;
use crate::packet::rewrite::Resize;
use crate::path::Hook;

/// The loopback device of every network namespace. A lookup from it asks as this host's own packets
/// do, without binding them to a device.
pub const LOOPBACK: u32 = 1;

/// What becomes of a packet in the end. Devices are named by their index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The next program decides.
    Next,
    /// It ends here.
    Drop,
    /// It leaves by a device as it is.
    Send(u32),
    /// It enters the stack as if it had come in by a device.
    Receive(u32),
    /// It leaves by a device, to the neighbour that the stack finds for its destination.
    Forward(u32),
    /// It leaves by a device, to the next hop that [`Adapter::forward`] found.
    ForwardTo(u32),
}

/// How a frame came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Whom the link layer says that it is for.
    pub to: Addressee,
    /// Its VLAN tag, if it has one beside it.
    pub tag: Option<u16>,
}

/// Whom a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressee {
    /// The device that it came in by.
    Host,
    /// Everybody, or a group.
    Many,
    /// Another host.
    Other,
}

/// What a packet has besides its addresses that routing asks for.
#[derive(Clone, Copy, Debug)]
pub struct RouteQuery {
    /// Where it comes from: a device, or [`LOOPBACK`] for this host itself.
    pub ifindex: u32,
    /// Its firewall mark.
    pub fwmark: u32,
    /// Its length with the IP header, or that of a segment of it; 0: whether it fits does not
    /// matter.
    pub length: u32,
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Out of a device.
    Device(u32),
    /// Nowhere: it is larger than the route takes, or what was learned of the path.
    TooBig(u32),
    /// Nowhere, or to this host itself.
    None,
}

/// What of a packet routing asks for, where it is forwarded.
#[derive(Clone, Copy, Debug)]
pub struct ForwardQuery<A> {
    /// Its source.
    pub source: A,
    /// Its destination.
    pub destination: A,
    /// Host order; zero where there are none.
    pub ports: [u16; 2],
    /// The number in its IP header.
    pub protocol: u8,
    /// TOS, or the traffic class and flow label as they lie in memory.
    pub class: u32,
    /// The rest.
    pub way: RouteQuery,
}

/// A packet, and the host that it is met on: abilities without an opinion.
pub trait Adapter<F: Family> {
    /// The packet.
    type Frame: Resize;

    /// Returns the packet, to be read.
    fn frame(&self) -> &Self::Frame;
    /// Returns the packet, to be changed.
    fn frame_mut(&mut self) -> &mut Self::Frame;
    /// Returns where the packet is met.
    fn hook(&self) -> Hook;
    /// Returns the bytes of its link header: 14, or 0 on a device without one.
    fn link(&self) -> u32;
    /// Returns the device that it is met on.
    fn ifindex(&self) -> u32;
    /// Returns its firewall mark.
    fn fwmark(&self) -> u32;
    /// Returns how many bytes of payload a segment gets where a device cuts the packet; 0: it is
    /// not to be cut.
    fn segment_size(&self) -> u32;
    /// Returns how the frame came in.
    fn arrival(&self) -> Arrival;

    /// Returns a device that programs are attached to.
    fn device(&self, ifindex: u32) -> Option<&Device>;
    /// Returns the device that belongs to the agent; 0: there is none.
    fn own_device(&self) -> u32;
    /// Whether an address is one of this node's own.
    fn is_own_address(&self, address: &F::Address) -> bool;
    /// Returns where the routing tables lead a packet.
    fn route(&self, source: &F::Address, destination: &F::Address, way: &RouteQuery) -> Target;
    /// Returns the device by which the stack would forward a packet, and keeps the next hop for
    /// [`Action::ForwardTo`]; `None`: it would not forward it, or would do more than that.
    fn forward(&mut self, packet: &ForwardQuery<F::Address>) -> Option<u32>;
    /// Returns the link-layer address of a neighbour on a device, if it is known and there.
    fn neighbour(
        &self,
        source: &F::Address,
        destination: &F::Address,
        ifindex: u32,
    ) -> Option<[u8; 6]>;
    /// Returns the MTU that the route by a device to a destination carries; 0: none.
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

    /// Takes [`rewrite`](crate::packet::rewrite::rewrite), with what is known of this packet and
    /// the flow that is decided: the kernel has both at hand, and looks at no others.
    fn rewrite(&mut self, headers: &Headers<F>, flow: &Flow<F::Address>) -> bool;
    /// Takes [`write_error`](super::act::write_error), with what is known of this packet.
    fn write_error(&mut self, headers: &Headers<F>, error: IcmpError, mtu: u32) -> bool;
    /// Takes off VLAN tags beside the packet.
    fn take_tags_off(&mut self);
    /// Notes that the packet is translated at this side of the stack.
    fn set_translated(&mut self);
    /// Notes that the packet is a fragment on its way to the agent.
    fn set_held(&mut self);
}
