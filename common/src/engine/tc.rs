//! Takes a packet through a program at tc.

use crate::event::Wide;
use crate::packet::answer::Answer;
use crate::packet::parse::Headers;
use crate::path::{Decision, Hook, Step, Verdict};
use crate::reason::Reason;

use super::act::{self, around};
use super::adapter::{Action, Adapter};
use super::open::{Steps, open};

/// A program at tc, with a packet whose headers are read.
pub trait TcProgram<F: Answer>: Steps<F> {
    /// The adapter, which lends the packet and the host.
    type Adapter: Adapter<F>;

    /// Performs [`decide_into`](crate::path::decide_into).
    fn decide(&mut self);
    /// Sets the decision to pass the packet.
    fn pass(&mut self);
    /// Performs [`restrict_foreign`](crate::path::restrict_foreign).
    fn restrict_foreign(&mut self);
    /// Notes a first fragment's ports for the later ones.
    fn note(&mut self);
    /// Performs [`is_for_others`](act::is_for_others).
    fn is_for_others(&self) -> bool;
    /// Performs [`is_foreign`](crate::path::policy::is_foreign).
    fn has_foreign_source(&self) -> bool;
    /// Reports whether the flow may have the port of a socket that cannot be looked up
    /// ([`hides_sockets`](crate::path::policy::hides_sockets)).
    fn has_hidden_socket(&mut self) -> bool;
    /// Begins to open a flow: sets how many source ports to skip, and forgets the routes.
    fn begin(&mut self, ports_to_skip: u32);
    /// Returns the adapter, the packet's headers and the decision.
    fn parts(&mut self) -> (&mut Self::Adapter, &Headers<F>, &Decision<F>);
    /// Sets the reason for what became of the packet.
    fn set_reason(&mut self, reason: Reason);
    /// Counts the packet, and sends an event to whoever listens.
    fn count(&mut self, is_dropped: bool);
}

/// Takes a packet to its action.
#[inline(always)]
pub fn run<F: Answer + Wide, P: TcProgram<F>>(program: &mut P) -> Action {
    program.decide();
    let Decision { verdict, step, is_first_fragment, .. } = *program.decision();
    if verdict == Verdict::Pass && step == Step::Done {
        if is_first_fragment {
            program.note();
        }
        program.count(false);
        return Action::Next;
    }
    let (adapter, ..) = program.parts();
    let (hook, link) = (adapter.hook(), adapter.link());
    if link != 0 && hook == Hook::Ingress && program.is_for_others() {
        return Action::Next;
    }
    if program.decision().depends_on_source && program.has_foreign_source() {
        program.restrict_foreign();
    }
    let refusal = if program.decision().step == Step::Done {
        program.record()
    } else {
        let ports_to_skip = u32::from(hook == Hook::Ingress && program.has_hidden_socket());
        program.begin(ports_to_skip);
        open(program)
    };
    if program.decision().is_first_fragment {
        program.note();
    }
    let (adapter, headers, decision) = program.parts();
    let mut reason = decision.reason;
    let action = act::apply(adapter, headers, decision, refusal, &mut reason);
    program.set_reason(reason);
    program.count(action == Action::Drop);
    action
}

/// Sends around the stack what another program has translated.
#[inline(always)]
pub fn run_translated<F: Answer, P: TcProgram<F>>(program: &mut P) -> Action {
    program.pass();
    let (adapter, headers, decision) = program.parts();
    around(adapter, headers, &decision.flow)
}
