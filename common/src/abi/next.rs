//! A layout to upgrade to in tests: the same content in another order, and one more field.

use super::previous::{self, Moved};

abi! {
    /// As [`previous::Flow`], otherwise arranged.
    pub struct Flow<A> {
        /// The time of the last renewal, in [`Ticks`](super::Ticks).
        pub seen: u32,
        /// Index into `backends` of the flow's family; 0: none.
        pub backend: u32,
        /// Index into `ports`; 0: none.
        pub service_port: u32,
        /// As [`previous::Flow::replied`].
        pub replied: u32,
        /// A field that makes the value larger.
        pub reserved: u32,
        /// Destination address after translation.
        pub destination: A,
        /// Source address after translation.
        pub source: A,
        /// Destination port after translation, host order.
        pub destination_port: u16,
        /// Source port after translation, host order.
        pub source_port: u16,
        /// The backend's generation when the flow chose it.
        pub generation: u16,
        /// Bits of [`flow`](super::flow).
        pub flags: u8,
        /// Bits of [`state`](super::state).
        pub state: u8,
    } sizes 36, 60
}

abi! {
    /// As [`previous::Affinity`], otherwise arranged.
    #[derive(Default)]
    pub struct Affinity {
        /// The time at which the client opened its last flow, in [`Ticks`](super::Ticks).
        pub seen: u32,
        /// The backend's generation then.
        pub generation: u16,
        /// Number of times that the client came back after its affinity had run out; it wraps
        /// around.
        pub round: u16,
        /// Index into `backends`.
        pub backend: u32,
        /// A field that makes the value larger.
        pub more: u32,
    } size 16
}

impl<A: Copy> Moved for Flow<A> {
    type Before = previous::Flow<A>;

    #[inline(always)]
    fn before(&self) -> Self::Before {
        let Self {
            source, destination, source_port, destination_port, backend, service_port, ..
        } = *self;
        let Self { seen, replied, generation, state, flags, .. } = *self;
        previous::Flow {
            source,
            destination,
            source_port,
            destination_port,
            backend,
            service_port,
            seen,
            replied,
            generation,
            state,
            flags,
        }
    }

    #[inline(always)]
    fn after(before: &Self::Before) -> Self {
        let previous::Flow { source, destination, source_port, destination_port, backend, .. } =
            *before;
        let previous::Flow { service_port, seen, replied, generation, state, flags, .. } = *before;
        Self {
            seen,
            backend,
            service_port,
            replied,
            reserved: 0,
            destination,
            source,
            destination_port,
            source_port,
            generation,
            flags,
            state,
        }
    }
}

impl Moved for Affinity {
    type Before = previous::Affinity;

    #[inline(always)]
    fn before(&self) -> Self::Before {
        let Self { backend, seen, generation, round, .. } = *self;
        previous::Affinity { backend, seen, generation, round }
    }

    #[inline(always)]
    fn after(before: &Self::Before) -> Self {
        let previous::Affinity { backend, seen, generation, round } = *before;
        Self { seen, generation, round, backend, more: 0 }
    }
}

impl Affinity {
    /// Returns the affinity of a client to a backend.
    #[must_use]
    #[inline(always)]
    pub const fn new(backend: u32, seen: u32, generation: u16, round: u16) -> Self {
        Self { backend, seen, generation, round, more: 0 }
    }
}
