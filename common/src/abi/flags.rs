//! The meaning of flag bits, as questions.

use super::{
    Backend, Device, Event, Flow, NodeAddress, ServicePort, Settings, backend, device_flags, flow,
    networks, node_address, phase, policy,
};

/// Declares questions about a struct, one a line, by the field and the bits that answer it.
macro_rules! flags {
    (impl $name:ident $(<$a:ident>)? . $field:ident
        { $($(#[$meta:meta])* $question:ident = $bits:expr;)* }) => {
        impl $(<$a: Copy>)? $name $(<$a>)? {
            $(
                $(#[$meta])*
                #[inline(always)]
                #[must_use]
                pub const fn $question(&self) -> bool {
                    self.$field & $bits != 0
                }
            )*
        }
    };
}

flags! {
    impl Flow<A>.flags {
        /// Whether the entry translates replies: [`flow::REPLY`].
        is_reply = flow::REPLY;
        /// Whether the client is a socket of this host: [`flow::HOST`].
        is_of_host = flow::HOST;
        /// Whether client and backend are the same address: [`flow::HAIRPIN`].
        is_hairpin = flow::HAIRPIN;
        /// Whether nothing but the source port changes: [`flow::DIRECT`].
        is_direct = flow::DIRECT;
        /// Whether the backend is on this node: [`flow::LOCAL`].
        is_local = flow::LOCAL;
        /// Whether the backend sees an address of this node: [`flow::MASQUERADED`].
        is_masqueraded = flow::MASQUERADED;
        /// Whether the entry translates the client's side: [`flow::SOURCE`].
        translates_source = flow::SOURCE;
        /// Whether replies leave by another device than the client came in by: [`flow::AWAY`].
        returns_elsewhere = flow::AWAY;
    }
}

flags! {
    impl Event.flags {
        /// Whether the packet is a reply: [`flow::REPLY`].
        is_reply = flow::REPLY;
    }
}

flags! {
    impl ServicePort.flags {
        /// Whether clients of external addresses keep their source: [`policy::EXTERNAL_LOCAL`].
        is_external_local = policy::EXTERNAL_LOCAL;
        /// Whether only some sources may use the load balancer: [`policy::SOURCE_RANGES`].
        restricts_sources = policy::SOURCE_RANGES;
    }
}

flags! {
    impl Backend<A>.flags {
        /// Whether the backend takes traffic: [`backend::SERVING`].
        is_serving = backend::SERVING;
        /// Whether the backend is on this node: [`backend::LOCAL`].
        is_local = backend::LOCAL;
        /// Whether the backend has an address of this node: [`backend::HOST`].
        is_host = backend::HOST;
    }
}

flags! {
    impl Device.flags {
        /// Whether packets that come in are those of local pods: [`device_flags::LOCAL_PODS`].
        has_local_pods = device_flags::LOCAL_PODS;
        /// Whether the device is a bridge: [`device_flags::BRIDGE`].
        is_bridge = device_flags::BRIDGE;
        /// Whether something takes the device's frames before the stack does:
        /// [`device_flags::SWITCHED`].
        is_switched = device_flags::SWITCHED;
        /// Whether the sockets behind the device cannot be looked up:
        /// [`device_flags::HIDES_SOCKETS`].
        hides_sockets = device_flags::HIDES_SOCKETS;
        /// Whether the pods' gateway is above the bridge: [`device_flags::GATEWAY_ABOVE`].
        has_gateway_above = device_flags::GATEWAY_ABOVE;
    }
}

flags! {
    impl NodeAddress.flags {
        /// Whether node ports are served here: [`node_address::NODE_PORTS`].
        serves_node_ports = node_address::NODE_PORTS;
    }
}

flags! {
    impl Settings.networks {
        /// Whether what the stack would only forward goes around it: [`networks::ACCELERATE`].
        accelerates = networks::ACCELERATE;
        /// Whether IPsec policies suspend that: [`networks::IPSEC`].
        has_ipsec = networks::IPSEC;
    }
}

flags! {
    impl Settings.phase {
        /// Whether netfilter translates some flows: [`phase::IMPORTED`].
        has_imported = phase::IMPORTED;
    }
}
