//! The end of a connection, TCP or SCTP.

use sluice_common::packet::header::protocol;

use crate::packet::Segment;
use crate::sctp::{self, Association};
use crate::tcp::{Connection, Happened, State};

/// One end of a connection.
#[derive(Debug)]
pub enum End {
    /// TCP's.
    Tcp(Connection),
    /// SCTP's.
    Sctp(Association),
}

/// Evaluates an expression on whichever end it is.
macro_rules! either {
    ($self:ident, $end:ident => $call:expr) => {
        match $self {
            Self::Tcp($end) => $call,
            Self::Sctp($end) => $call,
        }
    };
}

impl End {
    /// Returns the state.
    #[must_use]
    pub fn state(&self) -> State {
        either!(self, end => end.state)
    }

    /// Returns the number of packets sent, by which a timer recognises its packet.
    #[must_use]
    pub fn sent(&self) -> u32 {
        either!(self, end => end.sent)
    }

    /// Reports whether a packet waits for its acknowledgment.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        either!(self, end => end.is_waiting())
    }

    /// Returns the microseconds until the packet under way is retransmitted.
    #[must_use]
    pub fn patience(&self) -> u64 {
        either!(self, end => end.patience())
    }

    /// Retransmits the packet under way, whose acknowledgment is overdue.
    pub fn retry(&mut self, out: &mut Vec<Segment>) -> Option<Happened> {
        either!(self, end => end.retry(out))
    }

    /// Sends bytes.
    pub fn send(&mut self, data: Vec<u8>, out: &mut Vec<Segment>) {
        either!(self, end => end.send(data, out));
    }

    /// Closes this end.
    pub fn close(&mut self, out: &mut Vec<Segment>) {
        either!(self, end => end.close(out));
    }

    /// Resets the connection.
    pub fn abort(&mut self, out: &mut Vec<Segment>) {
        either!(self, end => end.abort(out));
    }

    /// Receives a packet.
    pub fn receive(
        &mut self,
        segment: &Segment,
        now: u64,
        out: &mut Vec<Segment>,
    ) -> Vec<Happened> {
        match self {
            Self::Tcp(connection) => connection.receive(segment, now, out),
            Self::Sctp(association) => association.receive(segment, out),
        }
    }
}

/// Returns the answer to a packet without a connection, or [`None`] if there is no answer to it.
#[must_use]
pub fn unknown(segment: &Segment) -> Option<Segment> {
    match segment.protocol {
        protocol::TCP => Connection::unknown(segment),
        protocol::SCTP => sctp::unknown(segment),
        _ => None,
    }
}
