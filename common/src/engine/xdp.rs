//! What XDP takes upon itself: only what needs nothing of what stands behind it.

use crate::packet::answer::is_partial;
use crate::packet::parse::{Headers, Kind, Parse};
use crate::packet::rewrite::can_follow;
use crate::path::{Decision, Step, Verdict};
use crate::reason::Reason;

use super::open::{Refusal, Steps, decide};

/// A frame whose headers are read, on its way through a program at XDP.
pub trait XdpProgram<F: Parse>: Steps<F> {
    /// Takes [`decide_into`](crate::path::decide_into).
    fn decide(&mut self);
    /// Returns what [`is_foreign`](crate::path::policy::is_foreign) says.
    fn has_foreign_source(&self) -> bool;
    /// Sets that no source port is passed over, and forgets the routes.
    fn begin(&mut self);
    /// Returns what is known of the frame.
    fn headers(&self) -> &Headers<F>;
    /// Whether the frame is addressed to the device that it came in by.
    fn is_addressed_here(&self) -> bool;
    /// Marks the frame as translated, for tc; false where there is no room for that.
    fn mark_translated(&mut self) -> bool;
    /// Takes the mark away.
    fn unmark_translated(&mut self);
    /// Notes what a first fragment tells.
    fn note(&mut self);
    /// Takes [`segment`](crate::packet::rewrite::segment).
    fn translate(&mut self) -> bool;
    /// Sets why the frame is dropped.
    fn set_reason(&mut self, reason: Reason);
    /// Counts the frame, and tells who listens.
    fn count(&mut self, is_dropped: bool);
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on to the stack, translated or not.
    Pass,
    /// It ends here: an edit failed half-way.
    Drop,
}

/// Takes a frame to its end. What XDP cannot finish goes on as it came: tc meets the same
/// obstacle, and tells the reason.
#[inline(always)]
pub fn run<F: Parse, P: XdpProgram<F>>(program: &mut P) -> Fate {
    program.decide();
    if program.decision().asks_source && program.has_foreign_source() {
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
    if !program.mark_translated() || program.record() != Refusal::NONE {
        program.unmark_translated();
        return Fate::Pass;
    }
    if program.decision().datagram {
        program.note();
    }
    let is_translated = program.translate();
    if !is_translated {
        program.set_reason(Reason::RewriteFailed);
    }
    program.count(!is_translated);
    if is_translated { Fate::Pass } else { Fate::Drop }
}

/// Whether XDP may translate a packet, if its frame is for the device that it came in by.
#[inline(always)]
fn may_translate<F: Parse>(headers: &Headers<F>, decision: &Decision<F>) -> bool {
    decision.verdict == Verdict::Translate
        && decision.step == Step::Done
        && decision.flow.is_local()
        && matches!(headers.kind, Kind::Transport | Kind::Fragment)
        && (!decision.datagram || can_follow(headers, &decision.flow))
        && !is_partial(headers)
}
