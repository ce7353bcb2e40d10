//! The reports of `sluice-lab-server`, one JSON object per line.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// An answer to one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's number, from 0.
    pub seq: u64,
    /// The server's name.
    pub name: String,
    /// The client's address as the server saw it.
    pub seen: SocketAddr,
    /// The server's address as the client saw it: the datagram's source, or the connection's peer.
    pub from: SocketAddr,
    /// Milliseconds since the client's start.
    pub at_ms: u64,
    /// The time from the request to the answer, in microseconds.
    pub took_us: u64,
}

impl Reply {
    /// Counts the answers of each server.
    pub fn shares(replies: &[Self]) -> BTreeMap<String, usize> {
        let mut shares = BTreeMap::new();
        for reply in replies {
            *shares.entry(reply.name.clone()).or_insert(0) += 1;
        }
        shares
    }
}

/// The results of a load so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Lasting connections that are open now.
    pub held: u64,
    /// Requests over them that were answered.
    pub answered: u64,
    /// New connections tried.
    pub tried: u64,
    /// New connections that were answered.
    pub opened: u64,
    /// Connections that were refused.
    pub refused: u64,
    /// Connections that were reset, or that the server ended.
    pub reset: u64,
    /// Connections or requests without an answer in time.
    pub lost: u64,
    /// Answers that were not to the request, or of another server.
    pub wrong: u64,
    /// Other failures, those of the client's own machine among them.
    pub other: u64,
    /// Answers that took more than 0.9 seconds: TCP had to send a packet again.
    pub slow: u64,
    /// The slowest answer, in milliseconds.
    pub worst_ms: u64,
    /// Descriptions of the first failures.
    pub told: Vec<String>,
}

impl Load {
    /// Returns the number of failures.
    pub fn failures(&self) -> u64 {
        self.refused + self.reset + self.lost + self.wrong + self.other
    }

    /// Adds the results of another part of the load.
    pub fn add(&mut self, more: Self) {
        for (sum, more) in [
            (&mut self.held, more.held),
            (&mut self.answered, more.answered),
            (&mut self.tried, more.tried),
            (&mut self.opened, more.opened),
            (&mut self.refused, more.refused),
            (&mut self.reset, more.reset),
            (&mut self.lost, more.lost),
            (&mut self.wrong, more.wrong),
            (&mut self.other, more.other),
            (&mut self.slow, more.slow),
        ] {
            *sum += more;
        }
        self.worst_ms = self.worst_ms.max(more.worst_ms);
        self.told.extend(more.told);
    }
}

/// One line of a server's or client's output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A server accepts requests from now on.
    Listening {
        /// Its address.
        address: SocketAddr,
    },
    /// A client has a connected socket.
    Connected {
        /// Its own address.
        local: SocketAddr,
        /// The address that getpeername(2) returns.
        peer: SocketAddr,
    },
    /// A client has an answer.
    Reply(Reply),
    /// The results of a load so far.
    Load(Load),
    /// A request got no answer; the client goes on.
    Lost {
        /// The request's number.
        seq: u64,
        /// The reason.
        reason: String,
        /// Milliseconds since the client's start.
        at_ms: u64,
    },
    /// A connection that should have gone on has ended; the client ends too.
    Broken {
        /// The number of the current request.
        seq: u64,
        /// The reason.
        reason: String,
        /// Milliseconds since the client's start.
        at_ms: u64,
    },
    /// A client has finished.
    Done {
        /// Requests sent.
        sent: u64,
        /// Answers received.
        received: u64,
        /// Bytes of payload received.
        bytes: u64,
        /// The time it took, in milliseconds.
        elapsed_ms: u64,
    },
}
