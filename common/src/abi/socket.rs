//! Data that is kept for sockets and their calls.

use super::PEERS_MAX;

abi! {
    /// A frontend that a socket asked for, and the backend that it is connected to instead; the
    /// value of `peer_v4` and `peer_v6`, kept with a TCP socket.
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
        /// A number that is highest for the newest of a socket's peers.
        pub asked: u32,
    } sizes 24, 48
}

abi! {
    /// The frontends that a UDP socket asked for most recently; the value of `peers_v4` and
    /// `peers_v6`.
    pub struct Peers<A> {
        /// In no order; the least recently used one is replaced.
        pub peers: [Peer<A>; PEERS_MAX],
    } sizes 192, 384
}

abi! {
    /// A pod, identified by its network namespace, and a frontend that one of its packets was seen
    /// on the way to: at an edge, straight from the socket that sent it; the key of `callers`. The
    /// value is when that was last seen, in [`Ticks`](super::Ticks).
    ///
    /// Packets that a namespace keeps to itself (an address of its own, a rule of its own
    /// netfilter) never get there. Neither do those of a namespace behind a pod, since forwarding
    /// detaches a packet from its socket.
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
    /// The part of a translated connection that has been counted; kept with its socket in
    /// `connections`.
    #[derive(Default)]
    pub struct Connection {
        /// Bytes sent, as counted so far.
        pub sent_bytes: u64,
        /// Bytes received, as counted so far.
        pub received_bytes: u64,
        /// Segments sent, as counted so far.
        pub sent_segments: u32,
        /// Segments received, as counted so far.
        pub received_segments: u32,
        /// Segments retransmitted, as counted so far.
        pub retransmitted_segments: u32,
        /// The backend, as a key of `socket_counts`.
        pub backend: u32,
        /// The time at which it was last counted, in [`Ticks`](super::Ticks).
        pub seen: u32,
        /// Zero.
        pub reserved: u32,
    } size 40
}
