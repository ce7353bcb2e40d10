//! Connections as the simulation follows them, from their clients' point of view.

use std::net::SocketAddr;

use sluice_common::packet::header::protocol;

use crate::cluster;
use crate::scenario::{Close, Connect};

/// Events that may cost a connection something: bits of [`Connecting::lost`].
pub mod lost {
    /// An event has evicted an entry of it.
    pub const ONE: u32 = 1;
    /// An event has evicted an entry whose partner was gone.
    pub const BOTH: u32 = 2;
    /// An entry of it was evicted from `embryonic` by others.
    pub const UNPROVEN: u32 = 4;
    /// An entry of it was evicted from `flows` by others.
    pub const PUSHED_OUT: u32 = 8;
    /// Its endpoint died.
    pub const DEAD: u32 = 16;
    /// The reply's entry was lost, and is of a kind that cannot be recovered.
    pub const UNRECOVERED: u32 = 64;
    /// A forger has sent what makes a node take its packets for another flow's: what looks like its
    /// middle to a node that masquerades its client, what gets a flow to an endpoint whose sockets
    /// are not looked up, or what a pod sends in the name of another node's process.
    pub const TAKEN: u32 = 256;
    /// A forger has sent a segment in its client's or endpoint's name.
    pub const FORGED: u32 = 128;
    /// Each of these may cost the connection.
    pub const ALTOGETHER: u32 = BOTH | UNPROVEN | DEAD | UNRECOVERED | TAKEN;
    /// Its target has changed meanwhile.
    pub const DISTURBED: u32 = 32;
}

/// The outcome of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All exchanges took place, and both sides closed it.
    Completed,
    /// The client reset it.
    Aborted,
    /// It was reset.
    Reset,
    /// Nobody answered.
    GivenUp,
}

/// A connection, as the simulation follows it.
#[expect(clippy::struct_excessive_bools, reason = "independent facts of one connection")]
#[derive(Clone, Debug)]
pub struct Connecting {
    /// The connection as planned.
    pub connect: Connect,
    /// The client's target.
    pub target: SocketAddr,
    /// Host of the endpoint.
    pub server: Option<usize>,
    /// Whether all endpoints of its target served when it was opened.
    pub is_served: bool,
    /// Whether the client knows that it is open.
    pub is_open: bool,
    /// The outcome.
    pub outcome: Option<Outcome>,
    /// Number of exchanges that are over.
    pub done: usize,
    /// Bits of [`lost`].
    pub lost: u32,
    /// Whether it waits for the end of the run.
    pub stays: bool,
    /// Whether the request of the end has been sent.
    pub is_last: bool,
    /// Whether the endpoint has closed it.
    pub is_peer_closed: bool,
    /// Number of packets that the client and the endpoint have sent.
    pub sent: [u32; 2],
}

impl Connecting {
    /// Returns the client's end.
    #[must_use]
    pub fn client(&self) -> SocketAddr {
        let address = cluster::host(self.connect.client)[usize::from(self.connect.is_v6)];
        (address, self.connect.port).into()
    }

    /// Reports whether an answer may show another source than what was asked.
    #[must_use]
    pub fn may_lose_entries(&self) -> bool {
        let leaves_at_once = self.connect.protocol == protocol::UDP;
        self.lost & (lost::ONE | lost::UNPROVEN | lost::DEAD) != 0
            || self.may_lose_its_port()
            // A question that is asked again, of another endpoint.
            || leaves_at_once && self.lost & lost::DISTURBED != 0
    }

    /// Reports whether its tuple may be another's by now: after a reset that may be its own
    /// party's, an idle flow keeps it for a minute or two.
    fn may_lose_its_port(&self) -> bool {
        self.connect.close == Close::Late && self.lost & lost::FORGED != 0
    }

    /// Reports whether it may be lost altogether. `shares_port`: its client has other connections
    /// from the same port.
    #[must_use]
    pub fn may_be_lost(&self, shares_port: bool) -> bool {
        self.lost & lost::ALTOGETHER != 0
            || self.may_lose_its_port()
            // Its slot may lead elsewhere by now, or no frontend of it be known; and nothing keeps
            // the tuple of a lost entry from another connection.
            || self.lost & lost::ONE != 0 && (self.lost & lost::DISTURBED != 0 || shares_port)
    }

    /// Reports whether another one of the same port may have what this one has, since an event has
    /// concerned its entries.
    #[must_use]
    pub fn is_troubled_by(&self, other: &Self) -> bool {
        self.shares_port(other) && other.lost & !lost::DISTURBED != 0
    }

    /// Reports whether two are the same client's, from one port.
    #[must_use]
    pub fn shares_port(&self, other: &Self) -> bool {
        let of =
            |connect: &Connect| (connect.client, connect.port, connect.is_v6, connect.protocol);
        of(&self.connect) == of(&other.connect) && self.target != other.target
    }
}
