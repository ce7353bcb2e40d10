//! What XDP takes upon itself: only what needs nothing of what stands behind it.

use crate::abi::flow;
use crate::packet::answer::is_partial;
use crate::packet::parse::{Headers, Kind, Parse};
use crate::packet::rewrite::can_follow;
use crate::path::{Decision, Step, Verdict};

/// Whether XDP may translate a packet, if its frame is for the device that it came in by.
#[inline(always)]
pub fn may_translate<F: Parse>(headers: &Headers<F>, decision: &Decision<F>) -> bool {
    decision.verdict == Verdict::Translate
        && decision.step == Step::Done
        && decision.flow.flags & flow::LOCAL != 0
        && matches!(headers.kind, Kind::Transport | Kind::Fragment)
        && (!decision.datagram || can_follow(headers, &decision.flow))
        && !is_partial(headers)
}
