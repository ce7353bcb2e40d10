//! What `sluice-lab-server` reports, one JSON object a line.

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
    /// From the request to the answer, in microseconds.
    pub took_us: u64,
}

impl Reply {
    /// How many of the answers each server gave.
    pub fn shares(replies: &[Self]) -> BTreeMap<String, usize> {
        let mut shares = BTreeMap::new();
        for reply in replies {
            *shares.entry(reply.name.clone()).or_insert(0) += 1;
        }
        shares
    }
}

/// One line of a server's or client's output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A server takes requests from now on.
    Listening {
        /// Where.
        address: SocketAddr,
    },
    /// A client has a connected socket.
    Connected {
        /// Its own address.
        local: SocketAddr,
        /// What getpeername(2) says.
        peer: SocketAddr,
    },
    /// A client has an answer.
    Reply(Reply),
    /// A request got no answer; the client goes on.
    Lost {
        /// The request's number.
        seq: u64,
        /// Why.
        reason: String,
        /// Milliseconds since the client's start.
        at_ms: u64,
    },
    /// A connection that should have gone on has ended; the client ends too.
    Broken {
        /// The number of the request under way.
        seq: u64,
        /// How it ended.
        reason: String,
        /// Milliseconds since the client's start.
        at_ms: u64,
    },
    /// A client has done what it was to do.
    Done {
        /// Requests sent.
        sent: u64,
        /// Answers received.
        received: u64,
        /// Bytes of payload received.
        bytes: u64,
        /// How long it took.
        elapsed_ms: u64,
    },
}
