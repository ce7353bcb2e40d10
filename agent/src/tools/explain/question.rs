//! A question: a tuple, who sends it, and where it arrives.

use std::net::SocketAddr;

use sluice_common::{V4, V6};
use sluice_core::model::object::Protocol;

use super::frame::least_length;

/// The sender of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Client {
    /// A pod of this node.
    Pod,
    /// A process in this host's network namespace.
    Host,
    /// A client on another machine, or a pod of another node.
    External,
}

/// The first hook that handles a call or packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// At the socket, as a call.
    Socket,
    /// At the host's end of a pod's link.
    Edge,
    /// At a device that carries the node's address.
    Uplink,
}

/// A question. Both addresses are of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The protocol.
    pub protocol: Protocol,
    /// The client.
    pub source: SocketAddr,
    /// The destination.
    pub destination: SocketAddr,
    /// The kind of client.
    pub from: Client,
    /// The first hook, or [`None`] for the one that the client implies.
    pub way: Option<Way>,
    /// The device that packets arrive on, if given.
    pub device: Option<String>,
    /// The packet's length with its IP header, or [`None`] for no payload.
    pub length: Option<u16>,
    /// The packet's TTL or hop limit, if given.
    pub ttl: Option<u8>,
}

impl Question {
    /// Returns the packet's length without payload.
    #[must_use]
    pub fn least_length(&self) -> u16 {
        let protocol = self.protocol.number();
        if self.source.is_ipv4() {
            least_length::<V4>(protocol)
        } else {
            least_length::<V6>(protocol)
        }
    }
}
