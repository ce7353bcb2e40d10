//! Takes a frame through the program at XDP, which handles only what needs nothing of what comes
//! after it.

use crate::packet::answer::is_partial;
use crate::packet::parse::{Headers, Kind, Parse};
use crate::packet::rewrite::can_follow;
use crate::path::{Decision, Step, Verdict};
use crate::reason::Reason;

use super::open::{Refusal, Steps, decide};

/// A program at XDP, with a frame whose headers are read.
pub trait XdpProgram<F: Parse>: Steps<F> {
    /// Performs [`decide_into`](crate::path::decide_into).
    fn decide(&mut self);
    /// Performs [`is_foreign`](crate::path::policy::is_foreign).
    fn has_foreign_source(&self) -> bool;
    /// Begins to open a flow: skips no source port, and forgets the routes.
    fn begin(&mut self);
    /// Returns the frame's headers.
    fn headers(&self) -> &Headers<F>;
    /// Reports whether the frame is addressed to the device that it came in by.
    fn is_addressed_here(&self) -> bool;
    /// Marks the frame as translated, for tc; returns false if there is no room for the mark.
    fn mark_translated(&mut self) -> bool;
    /// Removes the mark.
    fn unmark_translated(&mut self);
    /// Notes a first fragment's ports for the later ones.
    fn note(&mut self);
    /// Performs [`segment`](crate::packet::rewrite::segment).
    fn translate(&mut self) -> bool;
    /// Sets why the frame is dropped.
    fn set_reason(&mut self, reason: Reason);
    /// Counts the frame, and sends an event to whoever listens.
    fn count(&mut self, is_dropped: bool);
}

/// The end of a frame's way through the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on to the stack, translated or not.
    Pass,
    /// It is dropped: an edit failed half-way.
    Drop,
}

/// Takes a frame through the program. What XDP cannot finish goes on as it came: tc finds the same
/// obstacle, and reports the reason.
#[inline(always)]
pub fn run<F: Parse, P: XdpProgram<F>>(program: &mut P) -> Fate {
    program.decide();
    if program.decision().depends_on_source && program.has_foreign_source() {
        return Fate::Pass;
    }
    if program.decision().step != Step::Done {
        program.begin();
        decide(program);
    }
    if !may_translate(program.headers(), program.decision())
        || !program.is_addressed_here()
        || program.is_taken_by_socket()
    {
        return Fate::Pass;
    }
    if !program.mark_translated() {
        // What is there is another program's.
        return Fate::Pass;
    }
    if program.record() != Refusal::NONE {
        program.unmark_translated();
        return Fate::Pass;
    }
    if program.decision().is_first_fragment {
        program.note();
    }
    let is_translated = program.translate();
    if !is_translated {
        program.set_reason(Reason::RewriteFailed);
    }
    program.count(!is_translated);
    if is_translated { Fate::Pass } else { Fate::Drop }
}

/// Reports whether XDP may translate a packet, provided that its frame is for the device that it
/// came in by.
#[inline(always)]
fn may_translate<F: Parse>(headers: &Headers<F>, decision: &Decision<F>) -> bool {
    decision.verdict == Verdict::Translate
        && decision.step == Step::Done
        && decision.flow.is_local()
        && matches!(headers.kind, Kind::Transport | Kind::Fragment)
        && (!decision.is_first_fragment || can_follow(headers, &decision.flow))
        && !is_partial(headers)
}
