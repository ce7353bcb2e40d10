//! What the agent tells every program.

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

/// Bits of the values of `imported_v4` and `imported_v6`, keyed by [`Tuple`](super::Tuple): packets
/// that netfilter translates, both directions as they come in.
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
