//! What is asked: a tuple, who sends it, and where it is met.

use std::net::SocketAddr;

use sluice_common::{V4, V6};
use sluice_core::model::object::Protocol;

use super::passage::least_length;

/// Who sends the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Client {
    /// A pod of this node.
    Pod,
    /// A process in this host's network namespace.
    Host,
    /// Somebody on another machine, be it a pod of another node.
    External,
}

/// Where a call or packet is met first.
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
    /// Whom it speaks to.
    pub destination: SocketAddr,
    /// Who the client is.
    pub from: Client,
    /// Where it is met, if a person says so; else the client tells.
    pub way: Option<Way>,
    /// The device that its packets are met on, if a person says so.
    pub device: Option<String>,
    /// The packet's length with its IP header, if a person says so; else it has no payload.
    pub length: Option<u16>,
    /// The packet's TTL or hop limit, if a person says so.
    pub ttl: Option<u8>,
}

impl Question {
    /// The length of its packet without payload.
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
