//! What XDP takes upon itself: only what needs nothing of what stands behind it.

use crate::abi::flow;
use crate::packet::answer::is_partial;
use crate::packet::parse::{Headers, Kind, Parse};
use crate::packet::rewrite::can_follow;
use crate::path::{Decision, Hook, Step, Verdict};
use crate::tables::Tables;

use super::open::sockets;

/// Whether XDP may translate a packet, if its frame is for the device that it came in by. It looks
/// up no sockets: where those decide, tc opens the flow.
#[inline(always)]
pub fn may_translate<F: Parse, T: Tables<F>>(
    headers: &Headers<F>,
    decision: &Decision<F>,
    tables: &T,
) -> bool {
    decision.verdict == Verdict::Translate
        && decision.step == Step::Done
        && decision.flow.flags & flow::LOCAL != 0
        && matches!(headers.kind, Kind::Transport | Kind::Fragment)
        && (!decision.datagram || can_follow(headers, &decision.flow))
        && !is_partial(headers)
        && sockets(Hook::Xdp, decision, tables).is_none()
}
