//! What is kept of sockets and their calls.

use super::PEERS_MAX;

abi! {
    /// A frontend that a socket asked for, and the backend that it speaks to instead; with a TCP
    /// socket the value of `peer_v4` and `peer_v6`.
    pub struct Peer<A> {
        /// The VIP.
        pub frontend: A,
        /// The backend's address.
        pub backend: A,
        /// The VIP's port, host order.
        pub frontend_port: u16,
        /// The backend's port, host order.
        pub backend_port: u16,
        /// Index into `backends`; 0: unused.
        pub id: u32,
        /// The backend's generation.
        pub generation: u16,
        /// Zero.
        pub reserved: u16,
        /// The newest of a socket's peers has the highest number.
        pub asked: u32,
    } sizes 24, 48
}

abi! {
    /// The frontends that a UDP socket asked for last; the value of `peers_v4` and `peers_v6`.
    pub struct Peers<A> {
        /// In no order; the one that was asked longest ago gives way.
        pub peers: [Peer<A>; PEERS_MAX],
    } sizes 192, 384
}

abi! {
    /// A pod, told by its network namespace, and a frontend that a packet of it was met on the way
    /// to: at an edge, straight from the socket that sent it; the key of `callers`. The value is
    /// when that was seen last, in [`Ticks`](super::Ticks).
    ///
    /// What a namespace keeps to itself (an address of its own, a rule of its own netfilter) never
    /// gets there, nor does what a namespace behind a pod sends: whoever forwards a packet parts it
    /// from its socket.
    #[derive(Default)]
    pub struct CallerKey {
        /// Cookie of the namespace.
        pub netns: u64,
        /// The VIP; IPv4 as `::ffff:a.b.c.d`.
        pub address: [u8; 16],
        /// The VIP's port, host order.
        pub port: u16,
        /// IP protocol number.
        pub protocol: u8,
        /// Zero.
        pub reserved: [u8; 5],
    } size 32
}

abi! {
    /// A translated connection as far as it is counted; kept with its socket in `connections`.
    #[derive(Default)]
    pub struct Connection {
        /// Bytes sent that are counted.
        pub sent_bytes: u64,
        /// Bytes received that are counted.
        pub received_bytes: u64,
        /// Segments sent that are counted.
        pub sent_segments: u32,
        /// Segments received that are counted.
        pub received_segments: u32,
        /// Segments sent again that are counted.
        pub retransmitted_segments: u32,
        /// The backend, as a key of `socket_counts`.
        pub backend: u32,
        /// When it was counted last, in [`Ticks`](super::Ticks).
        pub seen: u32,
        /// Zero.
        pub reserved: u32,
    } size 40
}
