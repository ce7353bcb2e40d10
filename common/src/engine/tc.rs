//! The way of a packet through a program at tc.

use crate::event::Wide;
use crate::packet::answer::Answer;
use crate::packet::parse::Headers;
use crate::path::{Decision, Hook, Step, Verdict};
use crate::reason::Reason;

use super::act::{self, around};
use super::adapter::{Action, Adapter};
use super::open::{Steps, open};

/// A packet whose headers are read, on its way through a program at tc.
pub trait Packets<F: Answer>: Steps<F> {
    /// What lends the packet and the host.
    type Adapter: Adapter<F>;

    /// Takes [`decide_into`](crate::path::decide_into).
    fn decide(&mut self);
    /// Sets the decision to pass the packet.
    fn pass(&mut self);
    /// Takes [`disown`](crate::path::disown).
    fn disown(&mut self);
    /// Notes what a first fragment tells.
    fn note(&mut self);
    /// Returns what [`is_for_others`](act::is_for_others) says.
    fn is_for_others(&self) -> bool;
    /// Returns what [`is_foreign`](crate::path::policy::is_foreign) says.
    fn has_foreign_source(&self) -> bool;
    /// Whether the flow may have the port of a socket that cannot be looked up
    /// ([`hides_sockets`](crate::path::policy::hides_sockets)).
    fn has_hidden_socket(&mut self) -> bool;
    /// Sets how many source ports are not to be tried, and forgets the routes.
    fn begin(&mut self, passed_over: u32);
    /// Returns the packet, and what is known and decided of it.
    fn parts(&mut self) -> (&mut Self::Adapter, &Headers<F>, &Decision<F>);
    /// Sets why the packet met its end.
    fn set_reason(&mut self, reason: Reason);
    /// Counts the packet, and tells who listens.
    fn count(&mut self, is_dropped: bool);
}

/// Takes a packet to its action.
#[inline(always)]
pub fn run<F: Answer + Wide, P: Packets<F>>(packets: &mut P) -> Action {
    packets.decide();
    let Decision { verdict, step, datagram, .. } = *packets.decision();
    if verdict == Verdict::Pass && step == Step::Done {
        if datagram {
            packets.note();
        }
        packets.count(false);
        return Action::Next;
    }
    let (adapter, ..) = packets.parts();
    let (hook, link) = (adapter.hook(), adapter.link());
    if link != 0 && hook == Hook::Ingress && packets.is_for_others() {
        return Action::Next;
    }
    if packets.decision().asks_source && packets.has_foreign_source() {
        packets.disown();
    }
    let refusal = if packets.decision().step == Step::Done {
        packets.record()
    } else {
        let passed_over = u32::from(hook == Hook::Ingress && packets.has_hidden_socket());
        packets.begin(passed_over);
        open(packets)
    };
    if packets.decision().datagram {
        packets.note();
    }
    let (adapter, headers, decision) = packets.parts();
    let mut reason = decision.reason;
    let action = act::apply(adapter, headers, decision, refusal, &mut reason);
    packets.set_reason(reason);
    packets.count(action == Action::Drop);
    action
}

/// Sends around the stack what another program has translated.
#[inline(always)]
pub fn run_translated<F: Answer, P: Packets<F>>(packets: &mut P) -> Action {
    packets.pass();
    let (adapter, headers, decision) = packets.parts();
    around(adapter, headers, &decision.flow)
}
