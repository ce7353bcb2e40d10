//! Values of the tables whose entries are moved in an upgrade, because no source could restore
//! them.

abi! {
    /// The translation of one direction of a flow; the value of `flows` and `embryonic`.
    ///
    /// The entry of the other direction is at the tuple after translation, reversed, and leads to
    /// this entry's key, reversed: each can be made from the other.
    pub struct Flow<A> {
        /// Source address after translation.
        pub source: A,
        /// Destination address after translation.
        pub destination: A,
        /// Source port after translation, host order.
        pub source_port: u16,
        /// Destination port after translation, host order.
        pub destination_port: u16,
        /// Index into `backends` of the flow's family; 0: none (a direct connection that was
        /// remapped).
        pub backend: u32,
        /// Index into `ports`; 0: none.
        pub service_port: u32,
        /// The time of the last renewal, in [`Ticks`](super::Ticks).
        pub seen: u32,
        /// The time at which the endpoint was last heard from, as far as renewals show, in
        /// [`Ticks`](super::Ticks); 0 if not yet. In a [guess](super::state::GUESS) it is the
        /// number that the endpoint must acknowledge. In an unproven flow without an answer it is
        /// not 0 if an ICMP error has been counted as its failure, or if no SYN has opened it.
        pub replied: u32,
        /// The backend's generation when the flow chose it.
        pub generation: u16,
        /// Bits of [`state`](super::state).
        pub state: u8,
        /// Bits of [`flow`](super::flow).
        pub flags: u8,
    } sizes 32, 56
}

abi! {
    /// The backend of a client with session affinity; the value of `affinity_v4` and `affinity_v6`.
    #[derive(Default)]
    pub struct Affinity {
        /// Index into `backends`.
        pub backend: u32,
        /// The time at which the client opened its last flow, in [`Ticks`](super::Ticks).
        pub seen: u32,
        /// The backend's generation then.
        pub generation: u16,
        /// Number of times that the client came back after its affinity had expired; it wraps
        /// around.
        pub round: u16,
    } size 12
}

impl Affinity {
    /// Returns the affinity of a client to a backend.
    #[must_use]
    #[inline(always)]
    pub const fn new(backend: u32, seen: u32, generation: u16, round: u16) -> Self {
        Self { backend, seen, generation, round }
    }
}
