//! The fate of a frame at XDP whose edit fails half-way.

use sluice_common::abi::flow;
use sluice_common::engine::open::{Refusal, Steps};
use sluice_common::engine::xdp::{Fate, XdpProgram, run};
use sluice_common::packet::parse::{Headers, Kind};
use sluice_common::path::{Decision, Step, Verdict};
use sluice_common::{Reason, V4};

/// A program that may translate its frame, and either can or cannot.
struct Program {
    headers: Headers<V4>,
    decision: Decision<V4>,
    can_translate: bool,
    counted: Vec<(Reason, bool)>,
}

impl Steps<V4> for Program {
    fn decision(&self) -> &Decision<V4> {
        &self.decision
    }
    fn set_step(&mut self, step: Step) {
        self.decision.step = step;
    }
    fn open(&mut self) {}
    fn look_up_routes(&mut self) {}
    fn search(&mut self) {}
    fn is_taken_by_socket(&mut self) -> bool {
        false
    }
    fn skip_one_port(&mut self) {}
    fn record(&mut self) -> Refusal {
        Refusal::NONE
    }
}

impl XdpProgram<V4> for Program {
    fn decide(&mut self) {
        self.decision.verdict = Verdict::Translate;
        self.decision.reason = Reason::Forward;
        self.decision.flow.flags = flow::LOCAL;
    }
    fn has_foreign_source(&self) -> bool {
        false
    }
    fn begin(&mut self) {}
    fn headers(&self) -> &Headers<V4> {
        &self.headers
    }
    fn is_addressed_here(&self) -> bool {
        true
    }
    fn mark_translated(&mut self) -> bool {
        true
    }
    fn unmark_translated(&mut self) {}
    fn note(&mut self) {}
    fn translate(&mut self) -> bool {
        self.can_translate
    }
    fn set_reason(&mut self, reason: Reason) {
        self.decision.reason = reason;
    }
    fn count(&mut self, is_dropped: bool) {
        self.counted.push((self.decision.reason, is_dropped));
    }
}

#[test]
fn a_frame_that_cannot_be_rewritten_is_dropped_and_counted() {
    for (can_translate, fate, counted) in [
        (true, Fate::Pass, (Reason::Forward, false)),
        (false, Fate::Drop, (Reason::RewriteFailed, true)),
    ] {
        let headers = Headers { kind: Kind::Transport, ..Headers::default() };
        let decision = Decision::pass(&headers.tuple);
        let mut program = Program { headers, decision, can_translate, counted: Vec::new() };
        assert_eq!(run(&mut program), fate);
        assert_eq!(program.counted, [counted]);
    }
}
