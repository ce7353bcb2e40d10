//! Counts packets: each one once, by its backend if it follows a flow, otherwise by its reason.

use crate::abi::BackendCounters;
use crate::family::Family;
use crate::packet::header::tcp;
use crate::packet::parse::Headers;
use crate::path::{Decision, Record};
use crate::reason::Reason;

/// The counter of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Nowhere: it concerns no Service.
    Nowhere,
    /// At a backend, because it follows a flow.
    Backend {
        /// Index into `backends`.
        id: u32,
        /// Its direction.
        direction: Direction,
    },
    /// At a reason.
    Reason {
        /// The reason.
        reason: Reason,
        /// Index into `ports`, or 0.
        service_port: u32,
    },
}

/// The direction of a packet within its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the backend.
    Forward {
        /// Whether the flow is recorded as a new one.
        opens: bool,
    },
    /// From the backend.
    Reply,
}

impl Count {
    /// Returns a packet's counter.
    #[inline(always)]
    pub fn of<F: Family>(decision: &Decision<F>) -> Self {
        let (flow, reason) = (&decision.flow, decision.reason);
        if reason == Reason::Stranger {
            return Self::Nowhere;
        }
        if !matches!(reason, Reason::Forward | Reason::Reply) {
            return Self::Reason { reason, service_port: flow.service_port };
        }
        let direction = if flow.is_reply() {
            Direction::Reply
        } else {
            Direction::Forward {
                opens: matches!(decision.record, Record::Open | Record::Establish),
            }
        };
        Self::Backend { id: flow.backend, direction }
    }
}

impl Direction {
    /// Adds a packet to the counters of its backend.
    #[inline(always)]
    pub fn add<F: Family>(self, headers: &Headers<F>, counters: &mut BackendCounters) {
        let bytes = u64::from(headers.length);
        let resets = u64::from(headers.tcp_flags & tcp::RST != 0);
        let add = |counter: &mut u64, amount: u64| *counter = counter.wrapping_add(amount);
        match self {
            Self::Reply => {
                add(&mut counters.reply_packets, 1);
                add(&mut counters.reply_bytes, bytes);
                add(&mut counters.reply_resets, resets);
            }
            Self::Forward { opens } => {
                add(&mut counters.forward_packets, 1);
                add(&mut counters.forward_bytes, bytes);
                add(&mut counters.forward_resets, resets);
                add(&mut counters.flows, u64::from(opens));
            }
        }
    }
}
