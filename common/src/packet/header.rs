//! Headers in wire format.
//!
//! Multi-byte fields are in network order; [`u16::from_be`] converts them.

/// Plain integers without padding: any bytes are a value.
///
/// # Safety
///
/// The type is `repr(C)` or a primitive, has no padding and no invalid bit pattern.
pub unsafe trait Wire: Copy {}

macro_rules! wire {
    ($($(#[$meta:meta])* $name:ident { $($field:ident : $ty:ty),* } size $size:literal;)*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(C)]
        #[allow(missing_docs, reason = "the fields are named as in the RFC")]
        pub struct $name { $(pub $field: $ty),* }
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$ty>())* == $size);
        // SAFETY: integers that fill the struct, asserted above.
        unsafe impl Wire for $name {}
    )*};
}

// SAFETY: any bytes are a value of these.
unsafe impl Wire for u16 {}
// SAFETY: as above.
unsafe impl Wire for u32 {}
// SAFETY: as above.
unsafe impl<const N: usize> Wire for [u8; N] {}
// SAFETY: as above.
unsafe impl Wire for [u16; 4] {}
// SAFETY: as above.
unsafe impl Wire for crate::abi::Ipv4Address {}
// SAFETY: as above.
unsafe impl Wire for crate::abi::Ipv6Address {}
// SAFETY: an array of such values has no padding between them.
unsafe impl<A: Wire> Wire for [A; 2] {}

wire! {
    /// IPv4 without options (RFC 791).
    Ipv4Header {
        version_ihl: u8, tos: u8, total_length: u16, id: u16, fragment: u16, ttl: u8, protocol: u8,
        checksum: u16, source: crate::abi::Ipv4Address, destination: crate::abi::Ipv4Address
    } size 20;
    /// IPv6 without extension headers (RFC 8200).
    Ipv6Header {
        version_class_flow: u32, payload_length: u16, next_header: u8, hop_limit: u8,
        source: crate::abi::Ipv6Address, destination: crate::abi::Ipv6Address
    } size 40;
    /// The first bytes of an IPv6 extension header, with the names of a routing header. A fragment
    /// header has offset and flags in the last two, followed by four bytes of identification.
    ExtensionHeader { next_header: u8, length: u8, kind: u8, segments_left: u8 } size 4;
    /// TCP without options (RFC 9293).
    TcpHeader {
        source: u16, destination: u16, sequence: [u16; 2], acknowledgment: [u16; 2], offset: u8, flags: u8,
        window: u16, checksum: u16, urgent: u16
    } size 20;
    /// UDP (RFC 768).
    UdpHeader { source: u16, destination: u16, length: u16, checksum: u16 } size 8;
    /// SCTP's common header and the header of the first chunk (RFC 9260). The checksum is a
    /// little-endian word.
    SctpHeader {
        source: u16, destination: u16, tag: [u16; 2], checksum: u32, chunk: u8, chunk_flags: u8, chunk_length: u16
    } size 16;
    /// ICMP and ICMPv6: the eight bytes in front of a quoted packet.
    IcmpHeader { kind: u8, code: u8, checksum: u16, rest: u32 } size 8;
    /// An 802.1Q or 802.1ad tag after its own ethertype.
    VlanTag { control: u16, ethertype: u16 } size 4;
    /// Ethernet II.
    EthernetHeader { destination: [u8; 6], source: [u8; 6], ethertype: u16 } size 14;
}

/// TCP flag bits.
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Opens a connection.
    pub const SYN: u8 = 2;
    /// Resets a connection.
    pub const RST: u8 = 4;
    /// The acknowledgment field is valid.
    pub const ACK: u8 = 16;
}

/// Chunk types of SCTP that change a connection's state.
pub mod sctp {
    /// Opens a connection.
    pub const INIT: u8 = 1;
    /// Answers an INIT.
    pub const INIT_ACK: u8 = 2;
    /// Aborts a connection.
    pub const ABORT: u8 = 6;
    /// Agrees to a connection's end.
    pub const SHUTDOWN_ACK: u8 = 8;
    /// Ends a connection.
    pub const SHUTDOWN_COMPLETE: u8 = 14;
    /// Bit of an ABORT's chunk flags: its sender knows no such connection.
    pub const T: u8 = 1;
}

/// IP protocol numbers.
pub mod protocol {
    /// Transmission Control Protocol.
    pub const TCP: u8 = 6;
    /// User Datagram Protocol.
    pub const UDP: u8 = 17;
    /// Stream Control Transmission Protocol.
    pub const SCTP: u8 = 132;
}

/// Ethertypes of VLAN tags, host order.
pub mod vlan {
    /// IEEE 802.1Q.
    pub const C_TAG: u16 = 0x8100;
    /// IEEE 802.1ad.
    pub const S_TAG: u16 = 0x88a8;
}
