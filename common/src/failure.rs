//! Flows and connections that were sent to a backend and never began.

use crate::abi::{Flow, flow, state};
use crate::family::Family;
use crate::path::{Decision, Record};
use crate::reason::Reason;

/// Declares the failures: number and word in one place.
macro_rules! failures {
    ($($(#[$meta:meta])* $name:ident = $number:literal, $word:literal;)*) => {
        /// The way in which a flow or a connection failed to begin.
        ///
        /// Each flow is counted at most once for each of them. The numbers are part of the ABI.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum Failure { $($(#[$meta])* $name = $number,)* }

        impl Failure {
            /// All failures, in order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Returns the word for people.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }

            /// Returns the failure with a number that was found in a map.
            #[must_use]
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

failures! {
    /// The endpoint answered the first packet of a flow with a reset: TCP's RST, SCTP's ABORT.
    Refused = 1, "refused";
    /// The endpoint did not answer the SYN of a flow. Packets cannot show that, so the agent counts
    /// these.
    Unanswered = 2, "unanswered";
    /// An ICMP error said that the endpoint, its host or its port cannot be reached, before the
    /// endpoint had answered.
    Unreachable = 3, "unreachable";
    /// A connection that was translated at the socket was answered with a reset. This one and the
    /// next add up to [`failed`](crate::abi::SocketCounters::failed).
    SocketRefused = 4, "refused";
    /// A connection that was translated at the socket was not answered, or with an ICMP error.
    SocketUnanswered = 5, "unanswered";
}

impl Failure {
    /// Returns the failure that a packet shows, given what it changes about its flow.
    ///
    /// Called only for packets that change something: the packets of an established flow do not.
    #[inline(always)]
    #[must_use]
    pub fn of<F: Family>(decision: &Decision<F>) -> Option<Self> {
        const BEGUN: u8 = state::ESTABLISHED | state::ANSWERED | state::GUESS | state::MATCHED;
        // The packet has changed the state, if its source belongs to where it came from.
        if decision.record != Record::RenewEmbryonic || !decision.depends_on_source {
            return None;
        }
        if decision.reason == Reason::IcmpError {
            return Some(Self::Unreachable);
        }
        let is_refused = decision.reason == Reason::Reply
            && decision.flow.state & (BEGUN | state::RESET_REPLY) == state::RESET_REPLY;
        is_refused.then_some(Self::Refused)
    }
}

/// Reports whether a packet has opened this unproven flow and nothing has come of it since: the
/// endpoint has not answered, and no failure was counted.
#[inline(always)]
#[must_use]
pub fn is_pending<A: Copy>(entry: &Flow<A>) -> bool {
    const ANSWERED: u8 = state::ESTABLISHED
        | state::ANSWERED
        | state::GUESS
        | state::MATCHED
        | state::RESET_REPLY
        | state::FIN_REPLY;
    entry.state & ANSWERED == 0
        && entry.replied == 0
        && entry.flags & (flow::DIRECT | flow::SOURCE) == 0
}
