//! Events, and the listener's filter.

abi! {
    /// Something that happened to a flow, a packet or a call; an element of the ring buffer
    /// `events`.
    ///
    /// IPv4 addresses are IPv4-mapped IPv6 ones; ports are in host order.
    #[derive(Default)]
    pub struct Event {
        /// Nanoseconds since boot.
        pub time_ns: u64,
        /// Source address as the packet came; zero for a call.
        pub source: [u8; 16],
        /// Destination address as the packet came, or as the process asked for it.
        pub destination: [u8; 16],
        /// Source address after translation.
        pub new_source: [u8; 16],
        /// Destination address after translation.
        pub new_destination: [u8; 16],
        /// Source port as the packet came.
        pub source_port: u16,
        /// Destination port as the packet came.
        pub destination_port: u16,
        /// Source port after translation.
        pub new_source_port: u16,
        /// Destination port after translation.
        pub new_destination_port: u16,
        /// Index into `ports`; 0: none.
        pub service_port: u32,
        /// Index into `backends` of the event's family; 0: none.
        pub backend: u32,
        /// The device; 0 for a call.
        pub ifindex: u32,
        /// The process; 0 for a packet.
        pub process: u32,
        /// Length of the packet from its IP header on; 0 for a call.
        pub length: u32,
        /// One of [`crate::event::Kind`].
        pub kind: u8,
        /// One of [`crate::event::At`].
        pub at: u8,
        /// A [`crate::Reason`].
        pub reason: u8,
        /// One of [`crate::event::Fate`].
        pub fate: u8,
        /// 4 or 6.
        pub family: u8,
        /// IP protocol number.
        pub protocol: u8,
        /// TCP flags; for SCTP what its first chunk means in terms of them.
        pub tcp_flags: u8,
        /// Bits of [`flow`](super::flow).
        pub flags: u8,
        /// The process's name, ended by a zero.
        pub command: [u8; 16],
        /// Zero.
        pub reserved: u32,
    } size 128
}

abi! {
    /// Whether anybody listens to events, and to which; the only element of `listening`.
    ///
    /// The listener keeps extending `until_ns`, so that listening ends with it, whatever ends it. A
    /// filter of zero lets everything through.
    #[derive(Default)]
    pub struct Listening {
        /// The time at which listening ends, in nanoseconds since boot; 0 if nobody listens.
        pub until_ns: u64,
        /// A bit for every reason, `1 << number`; 0: any.
        pub reasons: u64,
        /// Any of these service ports.
        pub service_ports: [u32; 4],
        /// One of the four addresses.
        pub address: [u8; 16],
        /// A bit for every [`crate::event::Kind`], `1 << number`; 0: any.
        pub kinds: u32,
        /// A bit for every [`crate::event::At`], `1 << number`; 0: any.
        pub places: u32,
        /// One of the four ports, host order.
        pub port: u16,
        /// IP protocol number.
        pub protocol: u8,
        /// A bit for every [`crate::event::Fate`], `1 << number`; 0: any.
        pub fates: u8,
        /// Zero.
        pub reserved: u32,
    } size 64
}
