//! The state that the packet path keeps: flows, clients, datagrams.

/// Bits of [`Flow::state`](super::Flow::state). Both directions' entries carry the same bits.
pub mod state {
    /// The endpoint has proven the flow: by a segment that is neither SYN nor RST (it knows the
    /// connection) or by a datagram; or the client has acknowledged the endpoint's answer.
    pub const ESTABLISHED: u8 = 1;
    /// The client has sent a FIN.
    pub const FIN_FORWARD: u8 = 2;
    /// The backend has sent a FIN.
    pub const FIN_REPLY: u8 = 4;
    /// The client has sent a RST, and the endpoint nothing since. Anybody can forge it (RFC 5961).
    pub const RESET_FORWARD: u8 = 8;
    /// The endpoint has sent a RST.
    pub const RESET_REPLY: u8 = 16;
    /// The entry is a guess, made from the client's slot, about a connection whose entries were
    /// lost; no packet has confirmed it.
    pub const GUESS: u8 = 32;
    /// The endpoint's packet has confirmed a guess; the client has not shown yet that it knows the
    /// connection.
    pub const MATCHED: u8 = 64;
    /// The endpoint has answered the SYN of an unproven flow: [`crate::abi::Flow::replied`] is the
    /// number that its client will acknowledge, which nobody else knows.
    pub const ANSWERED: u8 = 128;
    /// Either side has sent a RST.
    pub const RESET: u8 = RESET_FORWARD | RESET_REPLY;
    /// Somebody has sent a FIN or a RST.
    pub const CLOSING: u8 = FIN_FORWARD | FIN_REPLY | RESET;

    /// Reports whether the endpoint has ended the flow, or agreed to its end. A client's FIN or RST
    /// alone may be forged.
    #[inline(always)]
    #[must_use]
    pub const fn has_ended(state: u8) -> bool {
        state & RESET_REPLY != 0
            || state & FIN_REPLY != 0 && state & (FIN_FORWARD | RESET_FORWARD) != 0
    }
}

/// Bits of [`Flow::flags`](super::Flow::flags).
pub mod flow {
    /// The entry translates replies (backend to client); else client to backend.
    pub const REPLY: u8 = 1;
    /// The client is a socket of this host: replies are injected where its route to the VIP leaves.
    pub const HOST: u8 = 2;
    /// Client and backend have the same address: packets are bounced back to where they came from.
    pub const HAIRPIN: u8 = 4;
    /// A direct connection whose tuple equalled a live translated one: only its source port
    /// changes.
    pub const DIRECT: u8 = 8;
    /// The backend is on this node.
    pub const LOCAL: u8 = 16;
    /// The backend sees an address of this node instead of the client's. With [`HOST`] the entry
    /// itself says which one; otherwise the entries with [`SOURCE`] do.
    pub const MASQUERADED: u8 = 32;
    /// The entry translates the client's side: its source at the egress of the device that leads to
    /// the backend, and back at that device's ingress. In between, the stack sees client and
    /// backend.
    pub const SOURCE: u8 = 64;
    /// The route back to the client leaves by another device than the client came in by: the reply
    /// is forwarded as the routes from the frontend's address say.
    pub const AWAY: u8 = 128;
}

abi! {
    /// A client of a service port; the key of `affinity_v4` and `affinity_v6`.
    pub struct AffinityKey<A> {
        /// Index into `ports`.
        pub service_port: u32,
        /// The client's address.
        pub client: A,
    } sizes 8, 20
}

abi! {
    /// A datagram whose fragments are in transit; the key of `fragments_v4` and `fragments_v6`.
    pub struct Datagram<A> {
        /// Source address.
        pub source: A,
        /// Destination address.
        pub destination: A,
        /// The fragments' identification, in memory order.
        pub id: u32,
        /// IP protocol number.
        pub protocol: u8,
        /// Zero.
        pub reserved: [u8; 3],
    } sizes 16, 40
}

abi! {
    /// The ports that only a datagram's first fragment has; the value of `fragments_v4` and
    /// `fragments_v6`.
    #[derive(Default)]
    pub struct DatagramPorts {
        /// Source port, host order.
        pub source_port: u16,
        /// Destination port, host order.
        pub destination_port: u16,
        /// The time at which the first fragment was seen, in [`Ticks`](super::Ticks).
        pub seen: u32,
    } size 8
}
