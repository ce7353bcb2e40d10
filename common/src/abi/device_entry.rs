//! Devices, and this node's addresses and routes.

use super::{Ipv4Address, Ipv6Address};

abi! {
    /// A network device; the value of `devices`, keyed by ifindex.
    #[derive(Default)]
    pub struct Device {
        /// One of [`device`].
        pub role: u32,
        /// The bridge that the device is a port of; 0 if none.
        pub bridge: u32,
        /// The device's own link-layer address (zero where it has none).
        pub mac: [u8; 6],
        /// 14 for Ethernet, 0 for devices without a link header.
        pub link_header: u16,
        /// MTU in bytes.
        pub mtu: u32,
        /// The address that backends behind this device see in place of masqueraded clients'; zero
        /// if none.
        pub masquerade_v4: Ipv4Address,
        /// As `masquerade_v4`, IPv6.
        pub masquerade_v6: Ipv6Address,
        /// Bits of [`device_flags`].
        pub flags: u32,
        /// The network namespace of the device's other end, as its id in the node's own, plus one;
        /// 0 if none.
        pub netns: u32,
    } size 48
}

/// Bits of [`Device::flags`].
pub mod device_flags {
    /// Packets that come in here are local pods', where [`crate::abi::Settings::detect_local`] is
    /// by device.
    pub const LOCAL_PODS: u32 = 1;
    /// The device is a bridge: its ports' programs may already have translated a packet.
    pub const BRIDGE: u32 = 2;
    /// The device is a port of something that takes its frames before the stack does, and is
    /// neither a bridge nor a VRF: a bond, or a switch in software.
    pub const SWITCHED: u32 = 4;
    /// The sockets behind the device cannot be looked up, as with a virtual machine.
    pub const HIDES_SOCKETS: u32 = 8;
    /// The device is a port of a bridge whose pods' gateway is above it: one end of a veth whose
    /// other end is a port too.
    pub const GATEWAY_ABOVE: u32 = 16;
    /// The lowest bit of the last three bytes of a bridge's link-layer address: the destination of
    /// frames for the bridge that the device is a port of.
    pub const BRIDGE_MAC_SHIFT: u32 = 8;

    /// Returns the bits of a bridge's link-layer address.
    #[inline(always)]
    #[must_use]
    pub const fn bridge_mac([_, _, _, a, b, c]: [u8; 6]) -> u32 {
        (a as u32) << 16 | (b as u32) << 8 | c as u32
    }
}

/// Values of [`Device::role`].
pub mod device {
    /// The host's end of a pod's link.
    pub const EDGE: u32 = 1;
    /// Carries the node's address or its default route.
    pub const UPLINK: u32 = 2;
    /// An overlay or tunnel device.
    pub const FABRIC: u32 = 3;
    /// Our own device, by which ClusterIPs are routed.
    pub const OWN: u32 = 4;
    /// Carries what this host sends to its own addresses.
    pub const LOOPBACK: u32 = 5;
}

abi! {
    /// An address of this node; the value of `node_addresses_v4` and `node_addresses_v6`, keyed by
    /// address.
    #[derive(Default)]
    pub struct NodeAddress {
        /// Bits of [`node_address`].
        pub flags: u32,
    } size 4
}

/// Bits of [`NodeAddress::flags`].
pub mod node_address {
    /// Node ports are served here.
    pub const NODE_PORTS: u32 = 1;
}

/// The four bits of every hashed address; a lane of `addresses`.
///
/// Lane `h` is bits `4 * (h % 16)` of word `h / 16`. A set bit may be another address's (a lookup
/// then finds nothing); a clear bit is certain.
pub mod listing {
    /// A frontend's address.
    pub const FRONTEND: u8 = 1;
    /// A backend's address.
    pub const BACKEND: u8 = 2;
    /// An address of this node.
    pub const NODE: u8 = 4;
    /// An address of this node at which node ports are served.
    pub const NODE_PORTS: u8 = 8;
}

abi! {
    /// The MTU that a route of the main table carries; the value of `route_mtus_v4` and
    /// `route_mtus_v6`, tries keyed by network. The kernel reports to programs only a locked
    /// route's MTU.
    pub struct RouteMtu {
        /// The device that the route leads to; 0 if several.
        pub device: u32,
        /// The MTU; 0 if the route has none but lies within one that does.
        pub mtu: u32,
    } size 8
}
