//! The maps' keys and values, declared once for kernel and agent.
//!
//! Addresses are the bytes as they stand on the wire; ports are numbers in host order, so that a
//! plain `bpftool map dump` shows `80` and not `20480`. Every struct is free of padding (the sum of
//! its fields' sizes is compared with its own at compile time) and its size is asserted beneath it,
//! since a changed size is a changed layout: raise [`LAYOUT`] with it where the map's entries
//! outlive an upgrade. A map that the agent fills is made anew where it differs.

/// Version of everything in this file; part of the pin path.
///
/// Maps of another version are never reused as they are: [`previous`] tells what becomes of those
/// of the version before.
pub const LAYOUT: u32 = 3 + cfg!(feature = "next-layout") as u32;

/// Entries of [`ServiceKey`] -> [`Service`], per family: 16 Ki x ~64 B = 1 MiB when full.
pub const SERVICES_MAX: u32 = 65_536;
/// Elements of the `ports` array: 64 Ki x 32 B = 2 MiB.
pub const PORTS_MAX: u32 = 65_536;
/// Elements of the `slots` array, [`SLOTS_PER_BLOCK`] ids each: 512 Ki x 64 B = 32 MiB.
pub const SLOT_BLOCKS_MAX: u32 = 524_288;
/// Backend ids in one element of `slots`.
pub const SLOTS_PER_BLOCK: u32 = 16;
/// Elements of `backends_v4` (16 B each) and `backends_v6` (24 B each): 4 and 6 MiB.
pub const BACKENDS_MAX: u32 = 262_144;
/// Entries of each `flows` map: 256 Ki x ~110 B = 28 MiB (IPv4), ~45 MiB (IPv6).
pub const FLOWS_MAX: u32 = 262_144;
/// Entries of each `embryonic` map: 32 Ki x ~110 B = 3.5 MiB (IPv4), ~6 MiB (IPv6).
///
/// Fewer than the source ports that are given to clients ([`crate::path::PORTS`]): packets that
/// nobody answers cannot use those up, however many they are, and even where their forward entries
/// are evicted first.
pub const EMBRYONIC_MAX: u32 = 32_768;
const _: () = assert!(EMBRYONIC_MAX < crate::path::PORTS);
/// Frontends that one UDP socket may ask at a time: kept with the socket, 192 B (IPv4) or 384 B
/// (IPv6) beside what the kernel needs to keep anything with a socket.
pub const PEERS_MAX: usize = 8;
/// Elements of `addresses`: 128 Ki words = 1 MiB, sixteen four-bit lanes a word.
pub const ADDRESS_WORDS: u32 = 131_072;
/// Entries of `devices`.
pub const DEVICES_MAX: u32 = 4_096;
/// Entries of `origins`, per family.
pub const ORIGINS_MAX: u32 = BACKENDS_MAX;
/// Entries of `backend_counts`, filled on first use.
pub const BACKEND_COUNTERS_MAX: u32 = 131_072;
/// Entries of `reason_counts`, filled on first use.
pub const REASON_COUNTERS_MAX: u32 = 65_536;
/// Entries of `socket_counts`, filled on first use.
pub const SOCKET_COUNTERS_MAX: u32 = BACKEND_COUNTERS_MAX;
/// Bytes of the ring `events`: some 3 800 events that nobody has read so far.
pub const EVENTS_BYTES: u32 = 524_288;
/// Entries of `names`, filled as service ports come.
pub const NAMES_MAX: u32 = PORTS_MAX;
/// Entries of `rejects`, the rate limiter's buckets.
pub const REJECTS_MAX: u32 = 4_096;

/// Entries of `callers`: frontends that pods have called, 16 Ki x ~96 B = 1.5 MiB.
pub const CALLERS_MAX: u32 = 16_384;
/// How long an entry of `callers` counts, in [`Ticks`]: about a minute. A pod may begin to keep a
/// frontend to itself; its packets are then met no more.
pub const CALLER_TICKS: Ticks = 60;

/// Entries of each affinity map: 64 Ki x ~70 B = 4.5 MiB (IPv4).
pub const AFFINITY_MAX: u32 = 65_536;
/// Entries of each source-range trie, filled as services come.
pub const SOURCE_RANGES_MAX: u32 = 65_536;
/// Entries of each datagram map: datagrams whose fragments are under way.
pub const FRAGMENTS_MAX: u32 = 8_192;
/// Entries of each map of node addresses.
pub const NODE_ADDRESSES_MAX: u32 = 4_096;
/// Entries of each map of netfilter's flows, filled at a takeover; two a connection. 1 Mi x ~64 B =
/// 64 MiB when full (IPv4).
pub const IMPORTED_MAX: u32 = 1_048_576;
/// Entries of each map of routes' MTUs, allocated as they come: 16 Ki x ~64 B = 1 MiB when full.
pub const ROUTE_MTUS_MAX: u32 = 16_384;
/// Elements of `node_ports`: a bit for every port number, 64 an element.
pub const NODE_PORT_WORDS: u32 = 1_024;
/// Entries of `exhausted`.
pub const EXHAUSTED_MAX: u32 = 4_096;

/// Declares map keys and values: C layout, no padding, known size (for a struct of
/// both families: its IPv4 size, then its IPv6 size).
macro_rules! abi {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* pub $field:ident : $ty:ty),* $(,)? } size $size:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(C)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty),* }
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$ty>())* == $size);
        // SAFETY: plain integers without padding: any bytes are a value.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    };
    ($(#[$meta:meta])* pub struct $name:ident<A> { $($(#[$fmeta:meta])* pub $field:ident : $ty:ty),* $(,)? } sizes $v4:literal, $v6:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(C)]
        pub struct $name<A: Copy> { $($(#[$fmeta])* pub $field: $ty),* }
        const _: () = {
            type A = Ipv4Address;
            assert!(size_of::<$name<A>>() == $v4 && 0 $(+ size_of::<$ty>())* == $v4);
        };
        const _: () = {
            type A = Ipv6Address;
            assert!(size_of::<$name<A>>() == $v6 && 0 $(+ size_of::<$ty>())* == $v6);
        };
        // SAFETY: plain integers without padding: any bytes are a value.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name<Ipv4Address> {}
        // SAFETY: as above.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name<Ipv6Address> {}
    };
}

mod flags;
#[cfg(feature = "next-layout")]
mod next;
pub mod previous;
mod tables;

#[cfg(feature = "next-layout")]
pub use next::{Affinity, Flow};
#[cfg(not(feature = "next-layout"))]
pub use tables::{Affinity, Flow};

/// An IPv4 address in wire order. Aligned so that the kernel reads it as one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct Ipv4Address {
    /// The four bytes, most significant first.
    pub octets: [u8; 4],
}

/// An IPv6 address in wire order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct Ipv6Address {
    /// The sixteen bytes, most significant first.
    pub octets: [u8; 16],
}

// SAFETY: bytes: any are a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Ipv4Address {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Ipv6Address {}

abi! {
    /// A packet's five-tuple as it stands on the wire; the key of `flows` and `embryonic`.
    ///
    /// For an ICMP error it is the tuple of the quoted packet, turned round.
    pub struct Tuple<A> {
        /// Source address.
        pub source: A,
        /// Destination address.
        pub destination: A,
        /// Source port, host order.
        pub source_port: u16,
        /// Destination port, host order.
        pub destination_port: u16,
        /// IP protocol number: 6 (TCP) or 17 (UDP).
        pub protocol: u8,
        /// One of [`side`].
        pub side: u8,
        /// Zero.
        pub reserved: [u8; 2],
    } sizes 16, 40
}

impl<A: Copy> Tuple<A> {
    /// The tuple of a packet that answers this one.
    #[inline(always)]
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
            side: self.side,
            reserved: [0; 2],
        }
    }
}

/// Values of [`Tuple::side`]: at which side of the stack a packet of the tuple is translated, where
/// that may be both.
pub mod side {
    /// Any but the other one.
    pub const NEAR: u8 = 0;
    /// At the egress of the device that leads to the backend, where the client's source changes:
    /// the same tuple may come in as well, from a client that speaks to the backend directly.
    pub const FAR: u8 = 1;
}

/// Time since boot in units of 2^30 ns (1.07 s): a shift instead of a division on the hot path.
pub type Ticks = u32;

/// Nanoseconds in one tick, as a power of two.
pub const TICK_SHIFT: u32 = 30;

/// Bits of [`Flow::state`]. Both directions' entries carry the same bits.
pub mod state {
    /// The endpoint has proven the flow: by a segment that is neither SYN nor RST (it knows the
    /// connection), by a datagram; or the client has acknowledged what the endpoint answered.
    pub const ESTABLISHED: u8 = 1;
    /// The client has sent a FIN.
    pub const FIN_FORWARD: u8 = 2;
    /// The backend has sent a FIN.
    pub const FIN_REPLY: u8 = 4;
    /// The client has sent a RST, and the endpoint nothing since. Anybody can forge it (RFC 5961).
    pub const RESET_FORWARD: u8 = 8;
    /// The endpoint has sent a RST.
    pub const RESET_REPLY: u8 = 16;
    /// What a client's slot says of a connection whose entries were lost; no packet has confirmed
    /// it.
    pub const GUESS: u8 = 32;
    /// The endpoint's packet has confirmed a guess; that the client knows the connection is still
    /// to be seen.
    pub const MATCHED: u8 = 64;
    /// The endpoint has answered the SYN of an unproven flow:
    /// [`Flow::replied`](super::Flow::replied) is the number that its client acknowledges then,
    /// which nobody else knows.
    pub const ANSWERED: u8 = 128;
    /// Either side has sent a RST.
    pub const RESET: u8 = RESET_FORWARD | RESET_REPLY;
    /// Somebody has sent a FIN or a RST.
    pub const CLOSING: u8 = FIN_FORWARD | FIN_REPLY | RESET;

    /// Whether the endpoint has ended the flow, or agreed to its end: a client's FIN or RST alone
    /// may be forged.
    #[inline(always)]
    #[must_use]
    pub const fn has_ended(state: u8) -> bool {
        state & RESET_REPLY != 0
            || state & FIN_REPLY != 0 && state & (FIN_FORWARD | RESET_FORWARD) != 0
    }
}

/// Bits of [`Flow::flags`].
pub mod flow {
    /// The entry translates replies (backend to client); else client to backend.
    pub const REPLY: u8 = 1;
    /// The client is a socket of this host: replies are handed in where its route to the VIP
    /// leaves.
    pub const HOST: u8 = 2;
    /// Client and backend are the same address: packets are turned back where they came from.
    pub const HAIRPIN: u8 = 4;
    /// A direct connection whose tuple equalled a live translated one: only its source port
    /// changes.
    pub const DIRECT: u8 = 8;
    /// The backend is on this node.
    pub const LOCAL: u8 = 16;
    /// The client is shown to the backend as an address of this node. With [`HOST`] the entry
    /// itself says as which one; else the entries with [`SOURCE`] do.
    pub const MASQUERADED: u8 = 32;
    /// The entry translates the client's side: its source at the egress of the device that leads to
    /// the backend, and back at that device's ingress. In between, the stack sees client and
    /// backend.
    pub const SOURCE: u8 = 64;
    /// The route back to the client leaves by another device than the client came in by: the reply
    /// is sent on as the routes from the frontend's address say.
    pub const AWAY: u8 = 128;
}

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
    /// Where a frontend leads; the value of `services`. Never changed while its key lives.
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
    /// A ClusterIP as such (port and protocol 0 in the key): its ports that no service port is for
    /// are rejected.
    pub const ADDRESS: u32 = 5;
}

/// Which client meets which kind of frontend; indexes [`ServicePort::ranges`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Class {
    /// A ClusterIP, whoever asks.
    Internal = 0,
    /// An external address, asked by a pod or process of this node.
    ExternalInside = 1,
    /// An external address, asked from outside.
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
    /// A run of `size` slots that begins with slot `start`.
    #[inline(always)]
    pub const fn new(start: u32, size: u16) -> Self {
        Self(start as u64 | (size as u64) << 32)
    }

    /// No slots: a client is dropped without an answer, where its policy leaves out backends that
    /// there are.
    pub const DROP: Self = Self((verdict::DROP as u64) << 48);

    /// The first slot.
    #[inline(always)]
    pub const fn start(self) -> u32 {
        self.0 as u32
    }

    /// The number of slots; 0 means that the service port has no backends.
    #[inline(always)]
    pub const fn size(self) -> u32 {
        (self.0 >> 32) as u32 & 0xffff
    }

    /// Whether a client is dropped, not rejected, when there are no slots.
    #[inline(always)]
    pub const fn drops(self) -> bool {
        (self.0 >> 48) as u16 & verdict::DROP != 0
    }
}

/// Upper bits of a [`Range`].
pub mod verdict {
    /// Without slots: drop, do not reject.
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
        /// Raised each time the id gets a new owner: a flow of another generation has lost its
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
    /// The backend takes traffic; clear: UDP flows leave it at once, TCP flows drain.
    pub const SERVING: u32 = 1;
    /// The backend is on this node (its own pods and its own addresses).
    pub const LOCAL: u32 = 2;
    /// The backend's address is one of this node's own.
    pub const HOST: u32 = 4;
    /// The backend is in the set of [`super::Class`] `c` (bit `SELECTED << c`): affinity may lead
    /// to it.
    pub const SELECTED: u32 = 8;
}

abi! {
    /// A network device; the value of `devices`, keyed by ifindex.
    #[derive(Default)]
    pub struct Device {
        /// One of [`device`].
        pub role: u32,
        /// The bridge that the device is a port of; 0: none.
        pub bridge: u32,
        /// The device's own link-layer address (zero where it has none).
        pub mac: [u8; 6],
        /// 14 for Ethernet, 0 for devices without a link header.
        pub link_header: u16,
        /// MTU in bytes.
        pub mtu: u32,
        /// The address that clients are shown as to backends behind this device; zero: none.
        pub masquerade_v4: Ipv4Address,
        /// As `masquerade_v4`, IPv6.
        pub masquerade_v6: Ipv6Address,
        /// Bits of [`device_flags`].
        pub flags: u32,
        /// The network namespace of the device's other end, as its id in the node's own, plus one;
        /// 0: none.
        pub netns: u32,
    } size 48
}

/// Bits of [`Device::flags`].
pub mod device_flags {
    /// Packets that come in here are those of local pods (where [`super::Settings::detect_local`]
    /// is by device).
    pub const LOCAL_PODS: u32 = 1;
    /// The device is a bridge: the programs of its ports may have translated a packet before.
    pub const BRIDGE: u32 = 2;
    /// The device is a port of something that takes its frames before the stack does, and is
    /// neither a bridge nor a VRF: a bond, or a switch in software.
    pub const SWITCHED: u32 = 4;
    /// Nobody knows the sockets of what sends by the device: a virtual machine's.
    pub const HIDES_SOCKETS: u32 = 8;
    /// The device is a port of a bridge whose pods' gateway is above it: one end of a veth whose
    /// other end is a port too.
    pub const GATEWAY_ABOVE: u32 = 16;
    /// From this bit on: the last three bytes of the link-layer address that frames have which are
    /// for the bridge that the device is a port of.
    pub const BRIDGE_MAC_SHIFT: u32 = 8;

    /// The bits of a bridge's link-layer address.
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

/// Four bits for every hashed address; a lane of `addresses`.
///
/// Lane `h` is bits `4 * (h % 16)` of word `h / 16`. A set bit may be another
/// address's (then a lookup misses); a clear bit is certain.
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

/// An endpoint as replies show it; the key of `origins_v4` and `origins_v6`.
pub type OriginKey<A> = ServiceKey<A>;

/// How many frontends an [`Origins`] can hold.
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
    /// Read only when a client resets a connection it does not know: the sign that the
    /// reply's flow entry was lost.
    pub struct Origins<A> {
        /// Used elements first.
        pub frontends: [Origin<A>; ORIGINS],
    } sizes 32, 80
}

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
    /// What the agent tells every program; the one element of `settings`.
    #[derive(Default)]
    pub struct Settings {
        /// Cookie of the host's network namespace.
        pub host_netns: u64,
        /// One of [`socket_path`].
        pub socket_path: u32,
        /// One of [`masquerade`].
        pub masquerade: u32,
        /// One of [`detect_local`].
        pub detect_local: u32,
        /// Bits of [`networks`]: which prefixes there are at all, and its further bits.
        pub networks: u32,
        /// Ifindex of our own device; 0: there is none.
        pub own_device: u32,
        /// One of [`phase`]'s first three, and its further bits.
        pub phase: u32,
    } size 32
}

/// Values and bits of [`Settings::phase`]: which packets without a flow entry are ours. Zero where
/// nothing is left to netfilter.
pub mod phase {
    /// All of them.
    pub const SERVE: u32 = 0;
    /// Those that open a connection. What is mid-stream, and UDP, may be a flow that netfilter
    /// translates.
    pub const IMPORT: u32 = 1;
    /// None: flows that are known are served, everything else passes untouched.
    pub const PASSIVE: u32 = 2;
    /// The bits of the three above.
    pub const MASK: u32 = 3;
    /// Some flows are netfilter's: `imported` has them.
    pub const IMPORTED: u32 = 4;
    /// Some of these are UDP's.
    pub const IMPORTED_UDP: u32 = 8;
}

/// Bits of the values of `imported_v4` and `imported_v6`, keyed by [`Tuple`]: packets that
/// netfilter translates, both directions as they come in.
pub mod imported {
    /// The connection has ended as far as netfilter knows: who opens one from the same port begins
    /// anew.
    pub const CLOSING: u32 = 1;
}

/// Values of [`Settings::masquerade`].
pub mod masquerade {
    /// Clients keep their source wherever replies find back.
    pub const NEEDED: u32 = 0;
    /// As kube-proxy: clients of external addresses (but with `externalTrafficPolicy: Local`), and
    /// clients of ClusterIPs that are no local pods.
    pub const KUBE_PROXY: u32 = 1;
    /// As kube-proxy with `--masquerade-all`: all clients of ClusterIPs too.
    pub const ALL: u32 = 2;
}

/// Values of [`Settings::detect_local`]: how a client is known to be a local pod.
pub mod detect_local {
    /// It is not.
    pub const NONE: u32 = 0;
    /// By the device that it comes in on.
    pub const DEVICE: u32 = 1;
    /// By its address: [`super::Networks::pods`].
    pub const ADDRESS: u32 = 2;
    /// By the device that it comes in on, and not every pod's is one that counts.
    pub const SOME_DEVICES: u32 = 3;
}

/// Bits of [`Settings::networks`].
pub mod networks {
    /// IPv4 Service addresses are known.
    pub const SERVICES_V4: u32 = 1;
    /// IPv6 Service addresses are known.
    pub const SERVICES_V6: u32 = 2;
    /// IPv4 pod addresses are known.
    pub const PODS_V4: u32 = 4;
    /// IPv6 pod addresses are known.
    pub const PODS_V6: u32 = 8;
    /// None of the prefixes: what the stack would only forward goes around it.
    pub const ACCELERATE: u32 = 16;
    /// Nothing does meanwhile: the node has policies of IPsec, which a packet that goes around
    /// would not meet.
    pub const IPSEC: u32 = 32;
}

/// Prefixes of a kind and family at most.
pub const PREFIXES: usize = 4;

abi! {
    /// The addresses `a` with `a & mask == network`. Unused: a mask of zeros and another network.
    pub struct Prefix<A> {
        /// The network.
        pub network: A,
        /// The mask.
        pub mask: A,
    } sizes 8, 32
}

abi! {
    /// Address ranges of the cluster; the one element of `networks_v4` and `networks_v6`.
    pub struct Networks<A> {
        /// Where local pods have their addresses (`--cluster-cidr`, or the node's pod CIDRs).
        pub pods: [Prefix<A>; PREFIXES],
        /// Where Services have their addresses: one that no Service has is dropped on its way out
        /// of the node.
        pub services: [Prefix<A>; PREFIXES],
    } sizes 64, 256
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
    /// The MTU that a route of the main table carries; the value of `route_mtus_v4` and
    /// `route_mtus_v6`, tries keyed by network. The kernel tells programs that of a locked one
    /// alone.
    pub struct RouteMtu {
        /// The device that the route leads to; 0: several.
        pub device: u32,
        /// 0: none. The route lies within one that carries an MTU.
        pub mtu: u32,
    } size 8
}

abi! {
    /// The data of a key of `source_ranges_v4` and `source_ranges_v6` (tries; the prefix length
    /// counts these bytes' bits, so that of a CIDR plus 32). The value is a `u32`, 1.
    pub struct SourceRange<A> {
        /// Index into `ports`, most significant byte first.
        pub service_port: [u8; 4],
        /// An address of the range.
        pub address: A,
    } sizes 8, 20
}

abi! {
    /// A datagram that is under way in fragments; the key of `fragments_v4` and `fragments_v6`.
    pub struct Datagram<A> {
        /// Source address.
        pub source: A,
        /// Destination address.
        pub destination: A,
        /// The fragments' identification, as it lies in memory.
        pub id: u32,
        /// IP protocol number.
        pub protocol: u8,
        /// Zero.
        pub reserved: [u8; 3],
    } sizes 16, 40
}

abi! {
    /// What only a datagram's first fragment tells; the value of `fragments_v4` and `fragments_v6`.
    #[derive(Default)]
    pub struct DatagramPorts {
        /// Source port, host order.
        pub source_port: u16,
        /// Destination port, host order.
        pub destination_port: u16,
        /// When the first fragment was seen, in [`Ticks`].
        pub seen: u32,
    } size 8
}

/// Values of [`Settings::socket_path`].
pub mod socket_path {
    /// No call is translated at the socket.
    pub const OFF: u32 = 0;
    /// Only calls of processes in the host's network namespace.
    pub const HOST: u32 = 1;
    /// Calls of host processes, and those of pods to frontends that `callers` has for them.
    pub const ALL: u32 = 2;
    /// Calls of every process.
    pub const MACHINE: u32 = 3;
}

abi! {
    /// A pod, told by its network namespace, and a frontend that a packet of it was met on the way
    /// to: at an edge, straight from the socket that sent it; the key of `callers`. The value is
    /// when that was seen last, in [`Ticks`].
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
    /// Traffic of one backend, both ways; the per-CPU value of `backend_counts`, keyed by backend
    /// id.
    ///
    /// IPv6 backends have bit 31 of the key set. Per packet, but `calls`: per call of a socket.
    #[derive(Default)]
    pub struct BackendCounters {
        /// Packets from clients.
        pub forward_packets: u64,
        /// Bytes of those packets, IP header included.
        pub forward_bytes: u64,
        /// Packets to clients.
        pub reply_packets: u64,
        /// Bytes of those packets, IP header included.
        pub reply_bytes: u64,
        /// Flows that chose this backend.
        pub flows: u64,
        /// Calls that the socket path sent to this backend.
        pub calls: u64,
        /// Resets from clients: TCP's RST, SCTP's ABORT.
        pub forward_resets: u64,
        /// Resets to clients.
        pub reply_resets: u64,
    } size 64
}

impl BackendCounters {
    /// Adds what was counted elsewhere: on another CPU, or of another backend.
    pub fn add(&mut self, more: &Self) {
        for (sum, more) in [
            (&mut self.forward_packets, more.forward_packets),
            (&mut self.forward_bytes, more.forward_bytes),
            (&mut self.reply_packets, more.reply_packets),
            (&mut self.reply_bytes, more.reply_bytes),
            (&mut self.flows, more.flows),
            (&mut self.calls, more.calls),
            (&mut self.forward_resets, more.forward_resets),
            (&mut self.reply_resets, more.reply_resets),
        ] {
            *sum = sum.wrapping_add(more);
        }
    }
}

abi! {
    /// Connections of sockets that were translated at connect(), by backend; the per-CPU value of
    /// `socket_counts`, with the keys of `backend_counts`.
    ///
    /// The kernel's own figures for a connection (those of `TCP_INFO`: SYN and FIN count as a byte
    /// each), added when it closes, and every few seconds while what it sends is acknowledged.
    #[derive(Default)]
    pub struct SocketCounters {
        /// Connections that were established.
        pub connections: u64,
        /// Those of them that have ended.
        pub closed: u64,
        /// Connections that never came about: refused, or without an answer.
        pub failed: u64,
        /// Connections that ended without both sides' FIN: by a reset, or because nobody answered
        /// any more.
        pub resets: u64,
        /// Bytes that clients sent, as far as acknowledged.
        pub sent_bytes: u64,
        /// Bytes that clients received.
        pub received_bytes: u64,
        /// Segments from clients.
        pub sent_segments: u64,
        /// Segments to clients.
        pub received_segments: u64,
        /// Segments from clients that were sent again; part of `sent_segments`.
        pub retransmitted_segments: u64,
        /// Sum of the smoothed round-trip times that ended connections had at last, microseconds.
        pub rtt_us: u64,
        /// How many of those were summed.
        pub rtt_count: u64,
    } size 88
}

impl SocketCounters {
    /// Adds what was counted elsewhere: on another CPU, or of another backend.
    pub fn add(&mut self, more: &Self) {
        for (sum, more) in [
            (&mut self.connections, more.connections),
            (&mut self.closed, more.closed),
            (&mut self.failed, more.failed),
            (&mut self.resets, more.resets),
            (&mut self.sent_bytes, more.sent_bytes),
            (&mut self.received_bytes, more.received_bytes),
            (&mut self.sent_segments, more.sent_segments),
            (&mut self.received_segments, more.received_segments),
            (&mut self.retransmitted_segments, more.retransmitted_segments),
            (&mut self.rtt_us, more.rtt_us),
            (&mut self.rtt_count, more.rtt_count),
        ] {
            *sum = sum.wrapping_add(more);
        }
    }
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
        /// When it was counted last, in [`Ticks`].
        pub seen: u32,
        /// Zero.
        pub reserved: u32,
    } size 40
}

abi! {
    /// Something that happened to a flow, a packet or a call; an element of the ring `events`.
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
        /// Bits of [`flow`].
        pub flags: u8,
        /// The process's name, ended by a zero.
        pub command: [u8; 16],
        /// Zero.
        pub reserved: u32,
    } size 128
}

abi! {
    /// Whether somebody listens to events, and to which; the one element of `listening`.
    ///
    /// The listener renews it, so that its end, whatever ends it, is the end of listening. A zero
    /// sieve lets everything through.
    #[derive(Default)]
    pub struct Listening {
        /// When it ends, nanoseconds since boot; 0: nobody listens.
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

/// Set in the keys of `backend_counts` and `socket_counts` for IPv6 backends.
pub const COUNTER_V6: u32 = 1 << 31;

abi! {
    /// The key of `reason_counts`.
    #[derive(Default)]
    pub struct ReasonKey {
        /// A [`crate::Reason`] as a number.
        pub reason: u32,
        /// Index into `ports`; 0: none.
        pub service_port: u32,
    } size 8
}

abi! {
    /// Per-CPU value of `reason_counts`.
    #[derive(Default)]
    pub struct ReasonCounters {
        /// Packets, or calls for the reasons of the socket path.
        pub packets: u64,
        /// Bytes, IP header included; 0 for calls.
        pub bytes: u64,
    } size 16
}

abi! {
    /// Key of `rejects`: whom a reject would be sent to (IPv4 as `::ffff:a.b.c.d`).
    #[derive(Default)]
    pub struct RejectKey {
        /// The client's address.
        pub address: [u8; 16],
    } size 16
}

abi! {
    /// A token bucket; the value of `rejects`.
    #[derive(Default)]
    pub struct RejectBucket {
        /// Milliseconds since boot of the last refill.
        pub refilled_ms: u32,
        /// Milliseconds of credit; one ICMP error costs [`crate::engine::limit::REJECT_COST_MS`].
        pub credit_ms: u32,
    } size 8
}

/// Bytes of each string of a [`Name`].
pub const NAME_MAX: usize = 64;

abi! {
    /// Whose service port it is; the value of `names`, keyed by service-port id.
    ///
    /// Kubernetes bounds each string at 63 bytes; the rest is zero.
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
