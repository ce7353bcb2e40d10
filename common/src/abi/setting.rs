//! The agent's settings for every program.

abi! {
    /// The agent's settings for every program; the only element of `settings`.
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
        /// Bits of [`networks`]: which prefixes exist at all, and more.
        pub networks: u32,
        /// Ifindex of our own device; 0 if there is none.
        pub own_device: u32,
        /// One of the first three of [`phase`], and its further bits.
        pub phase: u32,
    } size 32
}

/// Values and bits of [`Settings::phase`]: which packets without a flow entry are ours. Zero if
/// nothing is left to netfilter.
pub mod phase {
    /// All of them.
    pub const SERVE: u32 = 0;
    /// Those that open a connection. Packets in the middle of one, and UDP, may belong to a flow
    /// that netfilter translates.
    pub const IMPORT: u32 = 1;
    /// None: known flows are served, everything else passes untouched.
    pub const PASSIVE: u32 = 2;
    /// The bits of the three above.
    pub const MASK: u32 = 3;
    /// Netfilter translates some flows, which are in `imported`.
    pub const IMPORTED: u32 = 4;
    /// Some of those are UDP.
    pub const IMPORTED_UDP: u32 = 8;
}

/// Bits of the values of `imported_v4` and `imported_v6`, keyed by [`Tuple`](super::Tuple): packets
/// that netfilter translates, of both directions, as they come in.
pub mod imported {
    /// The connection has ended as far as netfilter knows: a client that opens one from the same
    /// port begins anew.
    pub const CLOSING: u32 = 1;
}

/// Values of [`Settings::masquerade`].
pub mod masquerade {
    /// Clients keep their source wherever replies find their way back.
    pub const NEEDED: u32 = 0;
    /// As kube-proxy: clients of external addresses (except with `externalTrafficPolicy: Local`),
    /// and clients of ClusterIPs that are not local pods.
    pub const KUBE_PROXY: u32 = 1;
    /// As kube-proxy with `--masquerade-all`: all clients of ClusterIPs too.
    pub const ALL: u32 = 2;
}

/// Values of [`Settings::detect_local`]: how a client is known to be a local pod.
pub mod detect_local {
    /// Not at all.
    pub const NONE: u32 = 0;
    /// By the device that it comes in on.
    pub const DEVICE: u32 = 1;
    /// By its address: [`super::Networks::pods`].
    pub const ADDRESS: u32 = 2;
    /// By the device that it comes in on, where some pods' devices do not count.
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
    /// Not about prefixes: what the stack would only forward goes around it.
    pub const ACCELERATE: u32 = 16;
    /// Suspends [`ACCELERATE`]: the node has IPsec policies, which a packet that goes around the
    /// stack would evade.
    pub const IPSEC: u32 = 32;
}

/// Maximum number of prefixes of a kind and family.
pub const PREFIXES: usize = 4;

abi! {
    /// The addresses `a` with `a & mask == network`. An unused element has a mask of zeros and
    /// another network.
    pub struct Prefix<A> {
        /// The network.
        pub network: A,
        /// The mask.
        pub mask: A,
    } sizes 8, 32
}

abi! {
    /// Address ranges of the cluster; the only element of `networks_v4` and `networks_v6`.
    pub struct Networks<A> {
        /// Local pods' addresses (`--cluster-cidr`, or the node's pod CIDRs).
        pub pods: [Prefix<A>; PREFIXES],
        /// Services' addresses. A packet to one that no Service has is dropped on its way out of
        /// the node.
        pub services: [Prefix<A>; PREFIXES],
    } sizes 64, 256
}

/// Values of [`Settings::socket_path`].
pub mod socket_path {
    /// No call is translated at the socket.
    pub const OFF: u32 = 0;
    /// Only calls of processes in the host's network namespace.
    pub const HOST: u32 = 1;
    /// Calls of host processes, and those of pods to frontends that `callers` lists for them.
    pub const ALL: u32 = 2;
    /// Calls of every process.
    pub const MACHINE: u32 = 3;
}
