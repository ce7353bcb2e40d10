//! Services: frontends, slots, backends, source ranges and names.

abi! {
    /// A frontend; the key of `services_v4` and `services_v6`.
    pub struct ServiceKey<A> {
        /// The VIP.
        pub address: A,
        /// Port, host order.
        pub port: u16,
        /// IP protocol number.
        pub protocol: u8,
        /// Zero.
        pub reserved: u8,
    } sizes 8, 20
}

abi! {
    /// The target of a frontend; the value of `services`. Never changed while its key lives.
    #[derive(Default)]
    pub struct Service {
        /// Index into `ports`, from 1; 0 with [`frontend::ADDRESS`].
        pub service_port: u32,
        /// One of [`frontend`].
        pub kind: u32,
    } size 8
}

/// Values of [`Service::kind`].
pub mod frontend {
    /// A ClusterIP.
    pub const CLUSTER_IP: u32 = 1;
    /// An address of `status.loadBalancer.ingress`.
    pub const LOAD_BALANCER: u32 = 2;
    /// An address of `spec.externalIPs`.
    pub const EXTERNAL_IP: u32 = 3;
    /// A node port. The key's address is the unspecified one: any address of this node that serves
    /// node ports.
    pub const NODE_PORT: u32 = 4;
    /// A ClusterIP itself (port and protocol 0 in the key): packets to ports that no service port
    /// has are rejected.
    pub const ADDRESS: u32 = 5;
}

/// A kind of client at a kind of frontend; indexes [`ServicePort::ranges`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Class {
    /// Any client of a ClusterIP.
    Internal = 0,
    /// A pod or process of this node, at an external address.
    ExternalInside = 1,
    /// A client from outside, at an external address.
    ExternalOutside = 2,
}

abi! {
    /// One port of one Service in one family; the element of `ports`.
    #[derive(Default)]
    pub struct ServicePort {
        /// A [`Range`] per [`Class`]; each is read and flipped as one aligned word.
        pub ranges: [u64; 3],
        /// Session affinity in seconds; 0: none.
        pub affinity_seconds: u32,
        /// Bits of [`policy`].
        pub flags: u32,
    } size 32
}

/// Bits of [`ServicePort::flags`].
pub mod policy {
    /// `externalTrafficPolicy: Local`: clients of external addresses keep their source.
    pub const EXTERNAL_LOCAL: u32 = 1;
    /// Only sources in `source_ranges` may use the load balancer's addresses.
    pub const SOURCE_RANGES: u32 = 2;
}

/// A run of slots in the arena, packed into one word so that it flips atomically:
/// bits 0..32 the first slot, 32..48 the number of slots (a prime, 0: no backends),
/// 48..64 bits of [`verdict`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range(pub u64);

impl Range {
    /// Returns the range of `size` slots that begins with slot `start`.
    #[inline(always)]
    pub const fn new(start: u32, size: u16) -> Self {
        Self(start as u64 | (size as u64) << 32)
    }

    /// No slots, and clients are dropped without an answer, because their policy leaves out
    /// backends that exist.
    pub const DROP: Self = Self((verdict::DROP as u64) << 48);

    /// Returns the first slot.
    #[inline(always)]
    pub const fn start(self) -> u32 {
        self.0 as u32
    }

    /// Returns the number of slots; 0 means that the service port has no backends.
    #[inline(always)]
    pub const fn size(self) -> u32 {
        (self.0 >> 32) as u32 & 0xffff
    }

    /// Reports whether clients are dropped, not rejected, if there are no slots.
    #[inline(always)]
    pub const fn drops(self) -> bool {
        (self.0 >> 48) as u16 & verdict::DROP != 0
    }
}

/// Upper bits of a [`Range`].
pub mod verdict {
    /// Without slots, drop instead of rejecting.
    pub const DROP: u16 = 1;
}

abi! {
    /// Sixteen backend ids; the element of `slots` (an array pads its elements to eight bytes,
    /// so single ids would waste half). Slot `i` is id `i % 16` of element `i / 16`.
    #[derive(Default)]
    pub struct SlotBlock {
        /// Indexes into `backends`.
        pub backends: [u32; 16],
    } size 64
}

abi! {
    /// One endpoint of one service port; the element of `backends_v4` and `backends_v6`.
    ///
    /// Address, port and generation are written once while any slot refers to the id.
    pub struct Backend<A> {
        /// The endpoint's address.
        pub address: A,
        /// The endpoint's port, host order.
        pub port: u16,
        /// Raised each time the id gets a new owner. A flow of another generation has lost its
        /// backend.
        pub generation: u16,
        /// Index into `ports` of the service port that owns the id.
        pub service_port: u32,
        /// Bits of [`backend`].
        pub flags: u32,
    } sizes 16, 28
}

/// Bits of [`Backend::flags`].
pub mod backend {
    /// The backend takes traffic. Otherwise UDP flows leave it immediately, and TCP flows drain.
    pub const SERVING: u32 = 1;
    /// The backend is on this node (its own pods and its own addresses).
    pub const LOCAL: u32 = 2;
    /// The backend's address is one of this node's own.
    pub const HOST: u32 = 4;
    /// Bit `SELECTED << c`: the backend is in the set of [`super::Class`] `c`, so that affinity may
    /// lead to it.
    pub const SELECTED: u32 = 8;
}

/// An endpoint as it appears in replies; the key of `origins_v4` and `origins_v6`.
pub type OriginKey<A> = ServiceKey<A>;

/// Number of frontends that an [`Origins`] can hold.
pub const ORIGINS: usize = 4;

abi! {
    /// A frontend that leads to an endpoint.
    pub struct Origin<A> {
        /// The VIP.
        pub address: A,
        /// Port, host order; 0: the element is empty.
        pub port: u16,
        /// Zero.
        pub reserved: u16,
    } sizes 8, 20
}

abi! {
    /// The frontends that lead to an endpoint, the first four in order of address and port;
    /// the value of `origins`.
    ///
    /// Read only when a client resets a connection that it does not know, the sign that the reply's
    /// flow entry was lost.
    pub struct Origins<A> {
        /// Used elements first.
        pub frontends: [Origin<A>; ORIGINS],
    } sizes 32, 80
}

abi! {
    /// The data of a key of `source_ranges_v4` and `source_ranges_v6`. They are tries, and the
    /// prefix length counts these bytes' bits: that of a CIDR plus 32. The value is a `u32`, 1.
    pub struct SourceRange<A> {
        /// Index into `ports`, most significant byte first.
        pub service_port: [u8; 4],
        /// An address of the range.
        pub address: A,
    } sizes 8, 20
}

/// Bytes of each string of a [`Name`].
pub const NAME_MAX: usize = 64;

abi! {
    /// The owner of a service port; the value of `names`, keyed by service-port id.
    ///
    /// Kubernetes limits each string to 63 bytes; the rest is zero.
    pub struct Name {
        /// The Service's namespace.
        pub namespace: [u8; NAME_MAX],
        /// The Service's name.
        pub service: [u8; NAME_MAX],
        /// The port's name; empty for an unnamed port.
        pub port: [u8; NAME_MAX],
        /// Port number of the Service, host order.
        pub number: u16,
        /// IP protocol number.
        pub protocol: u8,
        /// 4 or 6.
        pub family: u8,
    } size 196
}
